"""What the six stages share. Read a stage first, and come here for a function that it calls.

    __init__.py    the command line, and running a main() so that it ends in order
    files.py       files that are never half written
    records.py     stories in files of any format
    text.py        the text of a story: repairs, words, copies
    tokenizer.py   byte-level BPE
    dataset.py     what prepare.py has written, and the rows that train.py reads from it
    device.py      the device to compute on, its memory, and processes
    fit.py         a training run, fitted to the device
    runs.py        finding, loading, saving and continuing runs
    results.py     what eval.py grades, and eval.json
    ask.py         asking large models

runs.py imports model.py; no other file here imports a stage."""
import argparse
import contextlib
import difflib
import errno
import math
import os
import re
import signal
import stat
import sys

if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or later is needed, and this is {sys.version.split()[0]}: install a later one, make a new "
             "environment with it, and run pip install -r requirements.txt in that")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder of the repository

# What a closed terminal sends. Windows has no SIGHUP, and sends SIGBREAK.
HANGUP = getattr(signal, "SIGHUP", None) or signal.SIGBREAK


def excepthook(kind, error, traceback):
    """In place of sys.excepthook, so that Ctrl-C while torch is imported, or a missing package, gives no traceback."""
    required = ("numpy", "openai", "regex", "tiktoken", "torch", "tqdm")
    if issubclass(kind, ModuleNotFoundError) and error.name in required:
        print(f"{error}: run pip install -r requirements.txt", file=sys.stderr)
    elif not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = excepthook

# -----------------------------------------------------------------------------------------------------------------
# the command line


class CommandLine(argparse.ArgumentParser):
    """A parser for `--name=value`, without abbreviations. A mistake ends in one line and exit code 2."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)
        self.ranges = {}
        self.switches = set()

    def option(self, name, default, help, type=None, choices=None, low=None, high=None):
        """Add `--name`, of its default's type; values must be between `low` and `high`, inclusive."""
        if isinstance(default, bool):  # a switch: `--name` alone means True
            type, choices = parse_bool, (True, False)
            self.switches.add(f"--{name}")
        if name in ("dataset", "name"):
            type = dataset_name
        if default not in (None, "") and "default:" not in help:
            help += f" (default: {default})"
        self.ranges[name] = (low, high, default)
        self.add_argument(f"--{name}", default=default, type=type or default.__class__, choices=choices,
                          help=help.replace("%", "%%"))  # argparse formats help with %

    def problem(self, name, value):
        """One line that says what is wrong with a value of `--name`, or "" if nothing is."""
        low, high, default = self.ranges[name]
        if value is None:  # a default is filled in later
            return ""
        # written with `not`, so that nan, for which every comparison is false, is refused
        if low is not None and not value >= low:
            return f"--{name}={value} must be at least {low}"
        if high is not None and not value <= high:
            return f"--{name}={value} must be at most {high}"
        limit = 2**63 if isinstance(value, int) else math.inf  # torch takes integers of 64 bits
        if isinstance(value, (int, float)) and value != default and not abs(value) < limit:
            return f"--{name}={value} is not a number, or too large"
        return ""

    def parse_args(self, args=None):
        """The options as a namespace; args=None reads those of this process."""
        args = sys.argv[1:] if args is None else args
        args = [arg + "=True" if arg in self.switches else arg for arg in args]
        known, unknown = self.parse_known_intermixed_args(args)
        # argparse takes what has a space, such as --promt="One day", for the name of a run
        options = self._option_string_actions
        unknown += [arg for arg in args if arg.startswith("--") and arg.split("=")[0] not in options]
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], options, 1)
            hint = f"did you mean {near[0]}?" if near else "try --help"
            self.error(f"unknown option {unknown[0]}: {hint}")
        for name in self.ranges:
            problem = self.problem(name, getattr(known, name))
            if problem:
                self.error(problem)
        return known

    def error(self, message):
        """End with one line. argparse would print the whole usage before it."""
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def parse_bool(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text} is neither True nor False")
    return text.lower() in ("true", "1")


def dataset_name(text):
    """The name of a folder under data/, however it is typed: x, x/ or data/x, also in a mix like x:0.3,data/y:0.7."""
    folder = f"(?:{re.escape(os.path.abspath('data'))}|(?:\\./)*data)/+"
    name = re.sub(f"(^|,)(?:{folder})?([^,:]+?)/*(?=[,:]|$)", r"\1\2", text.replace(os.sep, "/"))
    if "/" in name or name in (".", ".."):
        raise argparse.ArgumentTypeError(f"{text} must name a folder under data/, such as mine for data/mine")
    return name


# -----------------------------------------------------------------------------------------------------------------
# running a main(), and signals


def run_main(main, lower="the size of the model"):
    """Run a script's main(). What the user or the machine causes ends it without a traceback: Ctrl-C, SIGTERM, a closed
    terminal or pipe (`| head`), files that cannot be written, and too little memory; `lower` says what takes less."""
    if hasattr(sys.stdout, "reconfigure"):  # flush every line, and replace characters that cannot be written
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    in_notebook, received = hasattr(sys, "ps1"), [signal.SIGINT]

    def interrupt(number, frame):
        received.append(number)
        raise KeyboardInterrupt
    for number in (signal.SIGTERM, HANGUP):
        if not in_notebook and signal.getsignal(number) == signal.SIG_DFL:  # nohup lets a process ignore the latter
            signal.signal(number, interrupt)
    try:
        main()
    except KeyboardInterrupt as error:
        if error.args:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(error, file=sys.stderr)
        if in_notebook:
            print("interrupted")
        else:  # die from the signal itself, so that a shell's loop over several commands ends too
            signal.signal(received[-1], signal.SIG_DFL)
            signal.raise_signal(received[-1])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python complains at exit
    except Exception as error:
        if is_out_of_memory(error):
            sys.exit(f"out of memory: close other programs, or lower {lower}")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            sys.exit("the disk is full, or your quota is used up: free some space, then run the same command again")
        if isinstance(error, OSError) and error.filename is not None:
            sys.exit(f"cannot use {error.filename} ({error.strerror}): change that, or name another file or folder")
        raise


def is_out_of_memory(error):
    """Whether an exception says that memory ran out. Only GPUs have a class for that, so the texts of torch on a CPU
    and of the system are searched."""
    text = "out of memory|(can't|cannot) allocate memory|not enough memory|alloc_failed"
    return isinstance(error, MemoryError) or re.search(text, str(error), re.IGNORECASE) is not None


@contextlib.contextmanager
def stop_signals(message=""):
    """A list to which Ctrl-C, SIGTERM and the closing of the terminal add their number instead of ending the process.
    The next Ctrl-C or SIGTERM ends it.

    A training loop looks at the list between steps, when it is safe to save."""
    received = []

    def receive(number, frame):
        if number == HANGUP:
            leave_terminal()
        os.write(2, message.encode())  # to stderr; print() may be interrupted by itself here
        received.append(number)
        for each in handlers:  # a terminal that is closed may send its signal twice, or after SIGTERM
            signal.signal(each, signal.SIG_IGN if each == HANGUP else signal.SIG_DFL)
    handled = [number for number in (signal.SIGINT, signal.SIGTERM, HANGUP)
               if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN]  # nohup lets a process ignore it
    handlers = {number: signal.signal(number, receive) for number in handled}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignore_ctrl_c():
    """For a worker process: a terminal sends Ctrl-C to it too, but the process that started it is the one to react."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, HANGUP):  # not what run_main() has set
        signal.signal(number, signal.SIG_DFL)


def leave_terminal():
    """Write nowhere instead of to the terminal: once it is closed, every print() would raise an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if stat.S_ISCHR(os.fstat(output).st_mode):  # isatty() no longer recognizes it
            os.dup2(nowhere, output)

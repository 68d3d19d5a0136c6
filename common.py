"""What the stages share: the command line, running main(), files, devices and processes, and runs on disk.

Nothing here is about language models. Read a stage first, and come here for a function that it calls."""
import argparse
import contextlib
import ctypes
import datetime
import difflib
import errno
import glob
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or later is needed, and this is {sys.version.split()[0]}: install a later one, make a new "
             "environment with it, and run pip install -r requirements.txt in that")

# Options of train.py that do not change what a run learns: batch_size only sets the micro-batch size, and size is
# stored as the shape it stands for.
HOUSEKEEPING = ("out_dir", "resume", "evals", "eval_stories", "log_interval", "keep", "device", "compile",
                "batch_size", "size")
# Options that may differ between a run and its continuation.
RESUMABLE = (*HOUSEKEEPING, "max_steps", "max_tokens", "max_flops", "max_minutes", "dtype", "init_from", "embed_std")

# Peak dense bfloat16 FLOP/s according to the manufacturers' data sheets. MFU (model FLOPs utilization) is the share of
# it that a run achieves.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "A10G": 70e12, "A10": 125e12, "4090": 165e12, "3090": 71e12}

CGROUP = "/sys/fs/cgroup"  # where Linux says what a container may use

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
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, 1)
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


# -----------------------------------------------------------------------------------------------------------------
# files: a file that somebody else reads is written under a temporary name and renamed, so that nobody sees half of it


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a file for writing under a temporary name, and rename it to `path` once all of it is on the disk.

    Whenever this is interrupted, `path` holds either the whole old file or the whole new one."""
    temporary = path + ".tmp"
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def rename(old, new):
    """Rename a file, in place of another one if that exists. Windows denies it while a virus scanner or an indexer
    reads either of them, so it is tried again for a second."""
    for _ in range(10):
        try:
            return os.replace(old, new)
        except PermissionError:
            time.sleep(0.1)
    os.replace(old, new)


def check_writable(folder, n_bytes=1):
    """End the program unless n_bytes can be written to a folder, or to where it would be made. Called before long work,
    so that a write-protected folder, a full disk or a quota does not cost it."""
    parents = [Path(folder), *Path(folder).absolute().parents]
    try:
        with tempfile.TemporaryFile(dir=next((path for path in parents if path.exists()), folder)) as file:
            for start in range(0, n_bytes, 1 << 20):
                file.write(bytes(min(1 << 20, n_bytes - start)))
    except OSError as error:
        sys.exit(f"cannot write {math.ceil(n_bytes / 2**20)} MB to {folder} ({error.strerror}): change its permissions "
                 "or free some space, or work in another folder")


def lock(path):
    """Lock a file for this process, or exit. The system unlocks it when the process ends, even if it is killed, or when
    the returned file is closed. Where the file system has no locks, a line says so."""
    file = open(path, "a")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        folder = os.path.dirname(path)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            sys.exit(f"another process is writing to {folder}: wait until it ends, or choose another folder")
        print(f"no file can be locked in {folder} ({error.strerror}): see to it that no other process writes there",
              file=sys.stderr)
    return file


def file_hash(path):
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -----------------------------------------------------------------------------------------------------------------
# devices. torch is imported where it is needed: it takes a second, and some scripts do not need it


def pick_device(device="auto", dtype="auto"):
    """(torch.device, torch.dtype) to compute with: CUDA where there is a GPU, else the CPU; bfloat16 where it is fast,
    float16 on older GPUs, else float32."""
    import torch
    if device == "auto":
        device = find_device()
    try:
        device = torch.device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device={device} cannot be used here ({str(error).splitlines()[0]}): try --device=cpu")
    fast = torch.float32
    if device.type == "cuda":
        fast = torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    elif device.type == "cpu" and cpu_has_bfloat16():
        fast = torch.bfloat16
    if device.type == "cpu" and usable_cpus() < torch.get_num_threads():
        torch.set_num_threads(usable_cpus())  # more threads than a container may run would wait for each other
    if fast == torch.float32 and dtype == "float16" or fast != torch.bfloat16 and dtype == "bfloat16":
        print(f"this {device.type} device has no instructions for {dtype} and is slow at it: leave --dtype out",
              file=sys.stderr)
    return device, fast if dtype == "auto" else getattr(torch, dtype)


def usable_cpus():
    """How many CPUs this process may use: Linux may allow fewer than there are, a container a share of their time."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # of cgroups, version 2 and 1
        with contextlib.suppress(OSError, ValueError):  # no such file; "max", which means no limit
            words = " ".join(Path(CGROUP, name).read_text() for name in names)
            quota, period = map(int, words.split())  # microseconds
            if quota > 0:  # -1 means no limit
                cpus = min(cpus, math.ceil(quota / period))
    return cpus


def usable_memory():
    """How many bytes of RAM this process may use: the machine's, or fewer in a container; inf where nobody says."""
    limits = [math.inf]
    if hasattr(os, "sysconf"):  # not on Windows
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups, version 2 and 1
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(CGROUP, name).read_text()))
    return min(limits)


def find_device():
    """"cuda" if torch can compute on a GPU with CUDA, else "cpu". Prints a line if there is a GPU that is not used."""
    import torch
    if torch.cuda.is_available():
        try:
            torch.ones(1, device="cuda") + 1  # a GPU for which torch was not built fails only here
            return "cuda"
        except RuntimeError as error:
            problem = f"torch cannot compute on this GPU ({str(error).splitlines()[0]}); pytorch.org has other builds"
    elif shutil.which("nvidia-smi") and torch.version.cuda:
        problem = f"the GPU's driver is missing or too old for CUDA {torch.version.cuda}"
    elif shutil.which("nvidia-smi"):
        problem = "this build of torch has no CUDA; pytorch.org has one that does"
    elif torch.backends.mps.is_available():
        problem = "nothing has been measured on Apple's GPU; --device=mps uses it"
    else:
        return "cpu"
    print(f"taking the CPU: {problem}", file=sys.stderr)
    return "cpu"


def cpu_has_bfloat16():
    """Whether this CPU has instructions for products in bfloat16, which it would otherwise emulate, very slowly."""
    import torch
    instructions = ("avx512_bf16", "amx_bf16")
    if hasattr(torch.cpu, "get_capabilities"):  # not in older versions of torch
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in instructions)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:  # Linux
        return not set(instructions).isdisjoint(file.read().split())
    return False


def peak_flops(device, dtype):
    """FLOP/s that a GPU could reach in a 16-bit dtype; None where that is not known."""
    import torch
    if device.type != "cuda" or dtype == torch.float32:
        return None
    gpu = torch.cuda.get_device_name(device)
    for name, flops in PEAK_FLOPS.items():
        # exclude weaker cards, which have the same name and a suffix
        if re.search(rf"\b{name}\b(?!.*\b(Ti|Laptop|D|NVL|MIG)\b)", gpu):
            return flops
    return None


def peak_memory(device):
    """The peak memory of this process in MB: on the GPU if it uses one, else in RAM; 0 if that is not known."""
    import torch
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) >> 20
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)  # a Mac counts bytes, Linux KB


def keep_freed_memory():
    """Tell glibc to keep freed memory for the next step. By default it returns the memory to the system and fetches it
    again, which makes training on a CPU 1.2 times slower."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:
        return  # not Linux
    mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets a mapping of its own
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-2, 1 << 28)  # M_TOP_PAD


def start_processes(device, dtype):
    """(rank, number of processes, torch.device, torch.dtype) of this process: one of those that torchrun started, or a
    single one."""
    import torch
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and device == "auto" and torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        device = "cpu"  # fewer GPUs than processes
    if processes > 1 and device in ("auto", "cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device, dtype = pick_device(device, dtype)
    if processes > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # the first process validates and saves alone, and the others wait for it, by default for ten minutes at most;
        # if a process dies, torchrun ends the others
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=1))
    return rank, processes, device, dtype


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


# -----------------------------------------------------------------------------------------------------------------
# runs: finding, loading, saving and continuing them. A run is a folder with ckpt.pt, log.jsonl and tokenizer.tiktoken


def existing_runs():
    """The folders under out/ that hold a checkpoint."""
    return [os.path.dirname(path) for path in sorted(glob.glob(os.path.join("out", "*", "ckpt.pt")))]


def newest_run():
    """The folder under out/ whose run was logged last. File dates are unreliable: copying a folder changes them."""
    runs = existing_runs()
    if not runs:
        sys.exit("no trained model in out/: run python train.py first")
    newest = max(runs, key=last_logged)
    if len(runs) > 1:
        print(f"taking {newest}, the newest of {len(runs)} runs in out/", file=sys.stderr)
    return newest


def last_logged(run):
    """When a run wrote the last whole line of its log, in seconds since 1970; 0 if that is not known."""
    try:
        with open(os.path.join(run, "log.jsonl"), encoding="utf-8") as log:
            lines = [line for line in log if line.endswith("\n")]
        return json.loads(lines[-1])["time"]
    except (OSError, ValueError, LookupError):
        return 0


def load_checkpoint(path):
    """The dict that train.py saved, on the CPU, from a run's folder or a checkpoint file."""
    import torch
    path = path if path.endswith(".pt") else os.path.join(path, "ckpt.pt")
    if not os.path.exists(path):
        runs = ", ".join(existing_runs())
        sys.exit(f"no checkpoint {path}: " + (f"choose from {runs}" if runs else "run python train.py first"))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, LookupError, pickle.UnpicklingError) as error:
        sys.exit(f"{path} cannot be read ({error.__class__.__name__}): it is truncated or no checkpoint; train again")
    if not isinstance(checkpoint, dict) or "model_config" not in checkpoint:
        sys.exit(f"{path} is not a checkpoint of train.py: run python train.py to write one")
    return checkpoint


class Clock:
    """Seconds of training over all sessions of a run, not counting each session's first step."""

    def __init__(self, seconds_before):
        self.seconds_before = seconds_before
        self.created = time.perf_counter()
        self.started = None
        self.paused_seconds = 0.0  # for evaluations and saving: part of the run's time, but left out of its speed

    def start(self):
        """Called when the first step of this session is done."""
        self.started = time.perf_counter()
        self.first_step_seconds = self.started - self.created

    def seconds(self):
        if self.started is None:
            return self.seconds_before
        return self.seconds_before + time.perf_counter() - self.started

    def stop(self):
        """Called at the end of the session: what follows is not training."""
        self.seconds_before, self.started = self.seconds(), None

    def tokens_per_second(self, tokens):
        """The speed of this session, given the number of tokens trained on after its first step."""
        return tokens / max(1e-9, self.seconds() - self.seconds_before - self.paused_seconds)


def save_checkpoint(checkpoint, path):
    """Write a checkpoint so that `path` always holds a complete one."""
    import torch
    try:
        with atomic_write(path, "wb") as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        sys.exit(f"cannot write {path} ({error}); the last checkpoint stays: make room, then run the command again "
                 "with --resume")


def read_lines(path):
    """Yield the objects of a file, if it exists. A last line that is only half written is skipped."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError:
                if line.endswith(b"\n"):
                    sys.exit(f"{path}, line {number} is not JSON: correct or delete that line")


def trim_log(path, step):
    """Create a run's log or, when resuming, drop the lines that were logged after `step`."""
    lines = []
    if step and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step]
    with atomic_write(path) as file:
        file.writelines(lines)

"""Turn stories into token bins: clean the text, make a tokenizer, write train.bin and val.bin."""
import argparse
import difflib
import hashlib

QUOTES = str.maketrans("“”„«»‘’`", "\"\"\"\"\"'''")

# ---------------------------------------------------------------------------------------------------------------
# what every script shares: the command line, and what counts as a copy of a story

class Parser(argparse.ArgumentParser):
    """The command line of every script: `--name=value`, no abbreviations, one line for a mistake (exit code 2)."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def option(self, name, default, help, type=None, **more):
        """Add `--name`; its type is that of its default, and a switch may be given as `--name` or `--name=False`."""
        if isinstance(default, bool):
            more.update(nargs="?", const=True, metavar="BOOL")
        self.add_argument(f"--{name}", default=default, type=type or boolean if isinstance(default, bool) else
                          type or default.__class__, help=help, **more)

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, 1)
            self.error(f"unknown option {unknown[0]}: " + (f"did you mean {near[0]}?" if near else "try --help"))
        return known

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text} is neither True nor False")
    return text.lower() in ("true", "1")


def fingerprint(story):
    """64 bits of a story's text after normalising case, quotes and white space: equal for copies."""
    normal = " ".join(story.translate(QUOTES).lower().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little")

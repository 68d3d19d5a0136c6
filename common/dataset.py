"""Prepared datasets: what prepare.py has written to data/<dataset>, and the rows that train.py reads from it."""
import functools
import glob
import hashlib
import json
import math
import os
import sys

import numpy as np

from common.files import file_hash
from common.tokenizer import load_tokenizer

SKILLS = ("none", "grammar", "fact", "context", "reasoning")  # the labels in val.skills.bin
INSTRUCTIONS = {"features": "Features", "words": "Words", "summary": "Summary", "sentence": "Random sentence"}


def instruction(fields):
    """The text before a story, from {"features", "words", "summary", "sentence": text} in the order given."""
    return "".join(f"{INSTRUCTIONS[name]}: {value}\n" for name, value in fields.items()) + "Story:\n"


def load_meta(dataset):
    """meta.json of a dataset, checked against the tokenizer beside it."""
    tokenizer, remedy = f"data/{dataset}/tokenizer.tiktoken", f"run python prepare.py --dataset={dataset}"
    try:
        with open(f"data/{dataset}/meta.json") as file:
            meta = json.load(file)
    except (FileNotFoundError, ValueError):
        existing = sorted(os.path.dirname(path) for path in glob.glob("*/meta.json", root_dir="data"))
        others = f"name one that exists: {', '.join(existing)}" if existing else "make one with python -m lab.world"
        sys.exit(f"no dataset in data/{dataset}: {remedy}, with --input=FILE if its stories are elsewhere, or {others}")
    if not os.path.exists(tokenizer) or file_hash(tokenizer) != meta["tokenizer"]["sha256"]:
        sys.exit(f"{tokenizer} is not the one that meta.json names: {remedy}")
    return meta


def load_tokens(dataset, name):
    """The tokens of a bin ("train" or "val"), or the labels "val.skills", as a memory-mapped array of uint16.

    Ends the program if the file does not have the size that meta.json says."""
    path = f"data/{dataset}/{name}.bin"
    expected = 2 * load_meta(dataset)[name.split(".")[0]]["tokens"]  # bytes
    size = os.path.getsize(path) if os.path.exists(path) else 0
    if size != expected:
        sys.exit(f"{path} has {size:,} bytes, meta.json says {expected:,}: prepare was interrupted? "
                 f"run python prepare.py --dataset={dataset}")
    return np.memmap(path, "<u2", mode="r")


def check_bin(dataset, name):
    """End the program if a bin is not the one that meta.json describes, though it is as long. The hash of a gigabyte
    takes a second; a damaged file would cost the whole run."""
    if hashlib.sha256(load_tokens(dataset, name)).hexdigest() != load_meta(dataset)[name]["sha256"]:
        sys.exit(f"data/{dataset}/{name}.bin is damaged, or is not what meta.json describes: run python prepare.py "
                 f"--dataset={dataset}, with the options as before")


def split_stories(tokens, eot):
    """The tokens of each story, without <|endoftext|>."""
    return [part[1:] for part in np.split(tokens, np.flatnonzero(tokens == eot))[1:-1]]


# -----------------------------------------------------------------------------------------------------------------
# rows to train on: a token bin is one long stream, cut into rows of block_size tokens (see read_rows). Within a row, a
# story may see the end of the one before it. The bins are mapped into memory, and never loaded whole.


def parse_mix(text):
    """{"a": 0.3, "b": 0.7} from "a:3,b:7": the weights are scaled to sum to one."""
    try:
        parts = [part.partition(":") for part in text.split(",")]
        weights = {name: float(weight or 1) for name, _, weight in parts}
        if len(weights) < len(parts) or not all(0 <= weight < math.inf for weight in weights.values()):
            raise ValueError
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}
    except (ValueError, ZeroDivisionError):
        sys.exit(f"--dataset={text} must be a name, or name:weight,name:weight")


@functools.lru_cache(32)  # a shuffle takes longer than a step
def row_places(n_tokens, length, seed, epoch):
    """Places `length` tokens apart, one for each row of an epoch, in the order in which it visits them. Each epoch has
    other places."""
    rng = np.random.default_rng((seed, epoch))
    n_rows = n_tokens // length - 1
    offset = rng.integers(n_tokens - n_rows * length)
    return offset + length * rng.permutation(n_rows)


def read_rows(tokens, story_starts, length, first, count, seed):
    """Rows `first` to `first + count` of an endless walk over `tokens`, (count, length + 1) int64.

    In the first epoch, a row begins with the story at its place, so that the model sees all that the story refers to,
    unless that is a row or more before. Later epochs cut stories anywhere, since the same rows again would teach less.
    Rows depend on the seed and the epoch alone, so that a resumed run continues the walk exactly. A row has one extra
    token, the target of its last input."""
    n_rows = len(tokens) // length - 1
    rows = np.empty((count, length + 1), np.int64)
    for i in range(count):
        epoch, place = divmod(first + i, n_rows)
        start = row_places(len(tokens), length, seed, epoch)[place]
        story = story_starts[np.searchsorted(story_starts, start, side="right") - 1]
        if epoch == 0 and start - story < length:
            start = story
        rows[i] = tokens[start:start + length + 1]
    return rows


class TrainData:
    """The train splits of a mix of datasets; `rows_read` counts the rows read from each, which a checkpoint
    needs in order to go on."""

    def __init__(self, args):
        self.seed, self.length = args.seed, args.block_size
        self.mix = parse_mix(args.dataset)  # {name: weight}
        self.metas = {name: load_meta(name) for name in self.mix}
        self.first = next(iter(self.mix))
        self.encoding = load_tokenizer(self.first)  # the others must have the same, see below
        self.tokenizer = self.metas[self.first]["tokenizer"]["sha256"]
        self.hashes = [meta["train"]["sha256"] for meta in self.metas.values()]
        self.tokens, self.story_starts = [], []  # of each dataset; tokens are memory-mapped
        for name, meta in self.metas.items():
            check_bin(name, "train")
            check_bin(name, "val")
            tokens = load_tokens(name, "train")
            if meta["tokenizer"]["sha256"] != self.tokenizer:
                # the tokenizer of the larger dataset suits both better
                smaller, larger = sorted((name, self.first), key=lambda each: self.metas[each]["train"]["bytes"])
                sys.exit(f"{self.first} and {name} have different tokenizers: run python prepare.py "
                         f"--dataset={smaller} --tokenizer={larger}, with its --input and other options as before")
            if len(tokens) < 2 * args.block_size:
                sys.exit(f"{name} has {len(tokens)} train tokens, fewer than two rows: lower --block_size or add "
                         "stories")
            self.tokens.append(tokens)
            self.story_starts.append(np.flatnonzero(tokens[:-1] == meta["eot"]))
        self.rows_read = [0] * len(self.tokens)
        self.epoch_tokens = sum(map(len, self.tokens))

    def batch(self, step, count):
        """The rows of a step, (count, block_size + 1) int64: each comes from a dataset drawn by the mix's weights."""
        # every process draws the same numbers, and so does a resumed run: they depend on the seed and the step alone
        source = np.random.default_rng((self.seed, step)).choice(len(self.tokens), count, p=list(self.mix.values()))
        rows = np.empty((count, self.length + 1), np.int64)
        for i, tokens in enumerate(self.tokens):
            n = int((source == i).sum())
            rows[source == i] = read_rows(tokens, self.story_starts[i], self.length, self.rows_read[i], n, self.seed)
            self.rows_read[i] += n
        return rows

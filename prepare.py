"""Turn stories into token bins: fetch, clean, make a tokenizer, encode.

    python prepare.py --dataset=tinystories                 download TinyStories (2.2 GB) and prepare it
    python prepare.py --dataset=all --version=all --instruct      TinyStories with words, features and summaries
    python prepare.py --dataset=mine --input=stories.txt    prepare a file or a folder: text, JSON, CSV, parquet, gzip

Writes train.bin, val.bin, tokenizer.tiktoken and meta.json to data/<dataset>. The bins are flat little-endian uint16,
with <|endoftext|> before every story and after the last. Other stages read them by common/dataset.py.

The text may be larger than the memory, so it is read three times, in chunks that all CPUs share: to decide which
stories stay, to count words for the tokenizer, and to encode. Only text and JSON lines can be cut into chunks, so all
other formats are first converted to JSON lines. common/records.py reads files of stories, common/text.py repairs them,
and common/tokenizer.py makes the tokenizer.
"""
# first, so that an old Python, or Ctrl-C while the rest is imported, ends in one line
from common import CommandLine, ignore_ctrl_c, run_main, stop_signals

import base64
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import numpy as np
import tiktoken
from tqdm import tqdm

from common.dataset import INSTRUCTIONS, SKILLS, instruction
from common.device import usable_cpus
from common.files import check_writable, file_hash, rename
from common.records import (CHUNK_BYTES, EOT, SPLITS, URL, convert, details, find_sources, is_plain, read_chunk,
                            split_file)
from common.text import clean_story, ends_well, fingerprint
from common.tokenizer import GPT2_PATTERN, PIECES, cached_tokenizer, load_ranks, train_bpe, trim_bpe

KEPT = ("train", "val")  # decisions on stories that stay; any other says why a story does not
FAULTLESS = ("published", "over --max_stories")  # those which are no fault of the story's
UNFINISHED = "unfinished"  # the folder, inside the dataset's, in which new files are made

# -----------------------------------------------------------------------------------------------------------------
# decide which stories stay


def make_plain(path, args, new_path):
    """The path of a plain file with the stories of `path`: itself, or `new_path`, to which JSON lines are written."""
    if is_plain(path, args.split, args.field):
        return path
    os.makedirs(os.path.dirname(new_path), exist_ok=True)
    with open(new_path, "w", encoding="ascii") as file:
        for line in tqdm(convert(path, args.split, args.field), f"reading {path}", unit=" stories", disable=None):
            print(line, file=file)
    return new_path


def run_workers(function, tasks, title, workers=None):
    """Yield (task, function(*task)) for each task, in order, with a progress bar. `workers` processes share the work,
    by default one for each CPU that may be used."""
    workers = workers or min(61, usable_cpus())  # Windows allows 61
    # A terminal sends Ctrl-C to the workers too. They ignore it, and this process stops them.
    pool = ProcessPoolExecutor(workers, initializer=ignore_ctrl_c)
    try:
        with stop_signals() as signals:  # Python can lose a KeyboardInterrupt while it forks: it comes afterwards
            results = pool.map(function, *zip(*tasks))
        if signals:
            signal.raise_signal(signals[0])
        yield from tqdm(zip(tasks, results), title, len(tasks), unit="chunk", disable=None)
    except BrokenProcessPool:
        sys.exit(f"a worker process was killed, probably since memory ran out: try --workers={max(1, workers // 2)}")
    finally:
        pool.shutdown(cancel_futures=True)  # also if the caller stops early, or a worker fails


def why_removed(story, clean):
    """Why a story is removed, or "" if it stays."""
    if not story.strip():
        return "empty"
    if clean and len(story) < 100 and len(story.encode()) < 200:  # 67 Chinese characters say as much
        return "under 100 characters"
    return "no final punctuation" if clean and not ends_well(story) else ""


def decide(chunk, file_split, args):
    """(decisions, broken, fields) for the stories of a chunk.

    decisions: [(fingerprint, decision, whether it was repaired)]. A decision is "train", "val", "published" or the
    reason to remove the story. Copies are found later.
    broken: the first of the records that cannot be read.
    fields: a Counter of what is known of the stories, for --instruct."""
    decisions, broken, fields = [], [], Counter()
    for record in read_chunk(*chunk, args.field):
        if record["story"] is None:
            decisions.append((0, "broken", False))
            if len(broken) < 3:
                broken.append({**record, "text": record["text"][:80]})
            continue
        story = clean_story(record) if args.clean else record["story"]
        key = fingerprint(story)
        # The draw depends on the text alone, so that a story stays in its split when the corpus grows.
        drawn = "val" if key % 10**6 < args.val_fraction * 10**6 else "train"
        split = SPLITS.get(str(record.get("split") or drawn).lower(), "neither train nor val")
        decision = "called test" if split == "test" else file_split or split
        if decision != "published":
            decision = why_removed(story, args.clean) or decision
        decisions.append((key, decision, story.strip() != record["story"].strip()))
        if args.instruct:
            fields.update(name for name, value in details(record).items() if value)
    return decisions, broken, fields


def plan_dataset(files, args):
    """The plan, [(chunk, final decisions on its stories)], and a Counter of what cleaning did.

    files: [(path of a plain file, split, path that the user named)].

    The first of several copies stays. Files of val are read first, so that a story in two files stays in val."""
    if "val" not in [split for _, split, _ in files]:  # then --val_fraction applies to files that are called train
        files = [(plain, None if split == "train" else split, path) for plain, split, path in files]
    files = sorted(files, key=lambda file: ("published", "val", None, "train").index(file[1]))
    tasks = [(chunk, split) for path, split, _ in files for chunk in split_file(path)]
    plan, cleaning, stories = [], Counter(), {"train": 0, "val": 0}
    seen = {}  # {fingerprint: split} of the stories that stay, or that were published for validation
    broken, fields = [], Counter()
    results = run_workers(partial(decide, args=args), tasks, "reading", args.workers)
    for (chunk, file_split), (proposals, chunk_broken, chunk_fields) in results:
        decisions = []
        for key, decision, repaired in proposals:
            decision = settle(key, decision, seen, stories, args)
            if decision not in KEPT + FAULTLESS:
                cleaning[f"{decision}: removed"] += 1
            if repaired and decision not in FAULTLESS:
                cleaning["UTF-8 read as cp1252: repaired"] += 1
            decisions.append(decision)
        plan.append((chunk, decisions))
        broken = (broken + [(chunk, record) for record in chunk_broken])[:3]
        fields.update(chunk_fields)
        if file_split == "train" and stories["train"] == args.max_stories:
            break  # only train files are left
    names = {plain: path for plain, _, path in files}
    examples = [describe_broken(names[chunk[0]], chunk, record) for chunk, record in broken]
    refuse_empty_split(stories, files, cleaning, examples, sum(len(decisions) for _, decisions in plan))
    for example in examples:
        print(f"left out: {example}", file=sys.stderr)
    missing = [name for name in ("features", "words", "summary") if args.instruct and not fields[name]]
    if missing:
        print(f"--instruct: no story has {' or '.join(missing)}", file=sys.stderr)
    return plan, cleaning


def settle(key, decision, seen, stories, args):
    """The final decision on a story. What the worker decided stays, unless the story is a copy, or one more than
    --max_stories. Brings `seen`, {fingerprint: decision}, and `stories`, {split: number}, up to date."""
    if decision == "published":
        seen[key] = decision
    if decision not in KEPT:
        return decision
    if decision == "train" and seen.get(key) == "published":
        return "in the published validation file"
    if seen.get(key) in KEPT and (args.clean or seen[key] != decision):  # never in both, even if nothing is cleaned
        return f"copies in {decision}" if decision == seen[key] else "in train and in val"
    if decision == "train" and stories["train"] == args.max_stories:
        return "over --max_stories"
    stories[decision] += 1
    seen[key] = decision
    return decision


def describe_broken(name, chunk, record):
    """One line about a broken record of a chunk: where it is, what is wrong, and how it begins."""
    path, start, _ = chunk
    with open(path, "rb") as file:  # count the lines before the chunk
        sizes = [CHUNK_BYTES] * (start // CHUNK_BYTES) + [start % CHUNK_BYTES]
        line = record["line"] + sum(file.read(size).count(b"\n") for size in sizes)
    text = " ".join(record["text"].encode("utf-8", "backslashreplace").decode().split())
    return f"{name} {'line' if name == path else 'story'} {line} {record['why']}: {text}"


def refuse_empty_split(stories, files, cleaning, examples, n_read):
    """End the program if there is no story for train or for val, or if most of those read are broken, and say what
    would help."""
    total, paths = sum(stories.values()), ", ".join(path for _, _, path in files)
    removed = "".join(f"; {count:,} {what}" for what, count in cleaning.items())
    broken = cleaning["broken: removed"]
    if broken > n_read / 2 or (broken and not total):
        sys.exit(f"{broken:,} of {n_read:,} stories are broken; {examples[0]}")
    if not total:
        sys.exit(f"no story in {paths}{removed}: add stories, or try --clean=False")
    if total == 1 or stories == {"train": 1, "val": 1}:
        sys.exit(f"only one story for train in {paths}{removed}: put a line {EOT} between stories, or add --split=line "
                 "if each line is a story, or --split=blank if blank lines are between them")
    if not stories["val"]:
        help = f"--val_fraction={min(0.5, 10 / total):.2g}" if files[0][1] != "val" else "longer ones"
        sys.exit(f"no story for val among the {total:,} of {paths}{removed}: add stories, or {help}")
    if not stories["train"]:
        sys.exit(f"no story for train among the {total:,} of {paths}{removed}: add stories, or lower --val_fraction")


def planned_records(chunk, decisions, args):
    """Yield (split, record) for each story of a chunk that stays: repaired, and with instructions, as the options
    say."""
    for record, decision in zip(read_chunk(*chunk, args.field), decisions):
        if decision in KEPT:
            if args.clean:
                record["story"] = clean_story(record)
            if args.instruct:
                record = instruct(record, decision, args.hold_out, args.seed)
            yield decision, record


def instruct(record, split, hold_out, seed):
    """Put before a story some of what is known about it: a random subset of INSTRUCTIONS, in random order.

    The draw depends on the seed and the story alone. In train, the fields in `hold_out` never all occur together."""
    rng = random.Random(f"{seed} {fingerprint(record['story'])}")
    # a sentence and its closing quote; a line without final punctuation is none
    pieces = re.findall(r"[^.!?。！？।\s][^.!?。！？।\n]*+(?:[.!?。！？।]+[\"”']?)?", record["story"])
    sentences = [piece for piece in pieces if re.search("[.!?。！？।]", piece)]
    known = {name: value if isinstance(value, str) else ", ".join(value) for name, value in details(record).items()}
    known["sentence"] = rng.choice(sentences) if sentences else None
    fields = [name for name, value in known.items() if value]
    # Any number of fields, even none: so a model learns to write with few instructions, and without any.
    fields = rng.sample(fields, rng.randint(0, len(fields)))
    if hold_out and split == "train" and set(hold_out) <= set(fields):
        fields.remove(rng.choice(hold_out))
    text = instruction({name: known[name] for name in fields})
    spans = [{**span, "start": span["start"] + len(text), "end": span["end"] + len(text)}
             for span in record.get("spans") or ()]
    return {**record, "story": text + record["story"], "spans": spans}


# -----------------------------------------------------------------------------------------------------------------
# make a tokenizer


def make_ranks(plan, args):
    """(ranks, coverage) of the tokenizer that --tokenizer asks for. Coverage is the share of GPT-2's tokens in the
    stories that the trimmed tokenizer has too, and None for other tokenizers."""
    if args.tokenizer not in ("bpe", "gpt2"):
        return load_ranks(args.tokenizer), None
    try:  # before the counting, which takes longer
        gpt2 = tiktoken.get_encoding("gpt2") if args.tokenizer == "gpt2" else None
    except OSError as error:  # requests, with which tiktoken downloads, raises OSErrors
        sys.exit(f"tiktoken cannot fetch GPT-2's tokenizer ({type(error).__name__}): go online, or use --tokenizer=bpe")
    words = Counter()
    for _, counts in run_workers(partial(count_words, args=args), plan, "counting", args.workers):
        words.update(counts)
    if args.tokenizer == "bpe":
        return train_bpe(words, args.vocab_size), None
    counts = Counter()  # of GPT-2's tokens
    for word, count in words.items():
        for token in gpt2.encode_ordinary(word.decode()):
            counts[gpt2.decode_single_token_bytes(token)] += count
    gpt2_ranks = {token: gpt2.encode_single_token(token) for token in gpt2.token_byte_values()}
    ranks = trim_bpe(gpt2_ranks, counts, args.vocab_size)
    return ranks, sum(counts[token] for token in ranks) / counts.total()


def count_words(chunk, decisions, args):
    """{word's bytes: how often it occurs} in a chunk, in those of its stories that are in train."""
    pieces, words = Counter(), Counter()
    for split, record in planned_records(chunk, decisions, args):
        if split == "train":
            pieces.update(PIECES.findall(record["story"]))
    for piece, count in pieces.items():
        for word in GPT2_PATTERN.findall(piece):
            if len(word) < 1000:  # training takes quadratic time in the length of a word
                words[word.encode()] += count
    return words


# -----------------------------------------------------------------------------------------------------------------
# encode


def encode(chunk, decisions, args, tokenizer):
    """What a chunk adds to the bins, {name: bytes}, and to the totals, {split: Counter of stories, tokens, …}.

    `tokenizer` is the tokenizer's folder under data/."""
    encoding = cached_tokenizer(tokenizer)
    bins = {"train": bytearray(), "val": bytearray(), "val.skills": bytearray()}
    totals = {"train": Counter(), "val": Counter()}
    for split, record in planned_records(chunk, decisions, args):
        story, spans = record["story"], record.get("spans") or ()
        ids = [encoding.eot_token] + encoding.encode_ordinary(story)
        bins[split] += np.array(ids, "<u2").tobytes()
        if split == "val":
            bins["val.skills"] += label_tokens(story, ids, spans, encoding).tobytes()
        # bits: what a perfect model needs for the story. If one is unknown, it is nan, and so is the sum.
        totals[split].update(stories=1, tokens=len(ids), bytes=len(story.encode()), spans=len(spans),
                             bits=bits if isinstance(bits := record.get("bits"), (int, float)) else np.nan)
    return bins, totals


def label_tokens(story, ids, spans, encoding):
    """The skill (index into SKILLS) of each of `ids`, <|endoftext|> and the tokens of a story: that of the span that a
    token overlaps, else 0."""
    labels = np.zeros(len(ids), "<u2")
    # Tokens count bytes and spans count characters, so both are turned into bytes. <|endoftext|> has a length of 0.
    ends = np.cumsum([0] + [len(encoding.decode_single_token_bytes(token)) for token in ids[1:]])  # in bytes
    starts = np.append(0, ends[:-1])
    for span in spans:
        if span["skill"] not in SKILLS[1:]:
            sys.exit(f"a span has the skill {span['skill']!r}: known are {', '.join(SKILLS[1:])}")
        start, end = (len(story[:span[side]].encode()) for side in ("start", "end"))
        labels[(starts < end) & (ends > start)] = SKILLS.index(span["skill"])  # tokens that overlap with the span
    return labels


def write_bins(plan, args, folder, eot):
    """Encode the stories of the plan into bins in `folder`. Returns the totals {split: Counter of units}.

    Results come in the order of the plan, so the bins do not depend on the number of workers."""
    totals = {"train": Counter(tokens=1), "val": Counter(tokens=1)}  # the <|endoftext|> after the last story
    with open(f"{folder}/train.bin", "wb") as train, open(f"{folder}/val.bin", "wb") as val, \
            open(f"{folder}/val.skills.bin", "wb") as skills:
        work = partial(encode, args=args, tokenizer=f"{args.dataset}/{UNFINISHED}")
        for _, (bins, chunk_totals) in run_workers(work, plan, "encoding", args.workers):
            train.write(bins["train"])
            val.write(bins["val"])
            skills.write(bins["val.skills"])
            for split in totals:
                totals[split].update(chunk_totals[split])
        for file, last in (train, eot), (val, eot), (skills, 0):  # the end of the last story
            file.write(last.to_bytes(2, "little"))
    return totals


def prepare(args):
    """Make the dataset that the options describe.

    All its files are made in a temporary folder, and moved into place when they are complete."""
    started = time.time()
    folder = f"data/{args.dataset}"
    new = f"{folder}/{UNFINISHED}"
    check_writable(folder)
    files = find_sources(args, folder)
    plan, cleaning = plan_dataset([(make_plain(path, args, f"{new}/{number}.jsonl"), split, path)
                                   for number, (path, split) in enumerate(files)], args)
    ranks, coverage = make_ranks(plan, args)
    if len(ranks) + 1 > 65_535:
        sys.exit(f"a vocabulary of {len(ranks) + 1:,} does not fit into uint16: share another --tokenizer")
    os.makedirs(new, exist_ok=True)
    with open(f"{new}/tokenizer.tiktoken", "wb") as file:
        file.writelines(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    totals = write_bins(plan, args, new, eot=len(ranks))

    meta = {"dataset": args.dataset, "vocab_size": len(ranks) + 1, "eot": len(ranks)}
    for split in ("train", "val"):
        meta[split] = {unit: totals[split][unit] for unit in ("stories", "tokens", "bytes")}
        meta[split]["sha256"] = file_hash(f"{new}/{split}.bin")
        if totals[split]["bits"] > 0 and not args.instruct:  # known for all stories: nan is not above 0
            meta[split]["bits_per_byte"] = totals[split]["bits"] / totals[split]["bytes"]
    meta["tokenizer"] = {"kind": args.tokenizer, "coverage": coverage, "sha256": file_hash(f"{new}/tokenizer.tiktoken")}
    meta["source"] = [{"file": path, "split": split, "bytes": os.path.getsize(path)} for path, split in files]
    meta.update(field=args.field, split=args.split, val_fraction=args.val_fraction, max_stories=args.max_stories,
                cleaning=cleaning, instruct={"hold_out": args.hold_out} if args.instruct else False)
    with open(f"{new}/meta.json", "w") as file:
        json.dump(meta, file, indent=1)
    # Every reader starts from meta.json. It is removed first and put back last, so that it never describes other bins.
    if os.path.exists(f"{folder}/meta.json"):
        os.remove(f"{folder}/meta.json")
    for name in ("train.bin", "val.bin", "val.skills.bin", "tokenizer.tiktoken", "meta.json"):
        rename(f"{new}/{name}", f"{folder}/{name}")
    if not totals["val"]["spans"]:
        os.remove(f"{folder}/val.skills.bin")  # it holds no label
    report(meta, args.clean)
    share = f", {coverage:.2%} of GPT-2's tokens kept whole" if coverage else ""
    print(f"vocabulary {len(ranks) + 1:,}{share}; {folder} is ready after {time.time() - started:.0f} s: "
          f"python train.py --dataset={args.dataset}")


def report(meta, clean):
    """Print what cleaning did, how large the splits are, and whether val is too small."""
    if meta["cleaning"] and clean:
        print("cleaning (--clean=False leaves the stories as they are):")
    for what, count in sorted(meta["cleaning"].items()):
        print(f"  {count:9,} {what}")
    for split in ("train", "val"):
        stories, tokens, size = (meta[split][unit] for unit in ("stories", "tokens", "bytes"))
        print(f"{split:5} {stories:9,} stories {tokens:13,} tokens {size:13,} bytes, {size / tokens:.2f} a token")
    if stories < 100:
        print(f"only {stories} stories for validation: figures will be noisy; raise --val_fraction or add stories")


def main(argv=None):
    parser = CommandLine(__doc__.split("\n")[0])
    parser.option("dataset", "world", "name of the folder under data/ to write to; without --input, its stories are "
                  "read")
    parser.option("input", "", "file or folder to read, or - for stdin: JSON lines or arrays, CSV, parquet, text")
    parser.option("field", "story", "where a record has its text")
    parser.option("split", "eot", f"where text is split into stories: at {EOT}, at every line, or at blank lines",
                  choices=("eot", "line", "blank"))
    parser.option("version", None, "download TinyStories: 2, by GPT-4 alone, 1, the paper's, or all, both with their "
                  "instructions (default: 2 for --dataset=tinystories)", choices=(1, 2, "all"),
                  type=lambda text: int(text) if text.isdigit() else text)
    parser.option("url", URL, "where TinyStories is downloaded from")
    parser.option("tokenizer", "bpe", "bpe, gpt2 (its most used tokens), or the folder of a dataset to share one with")
    parser.option("vocab_size", None, "<|endoftext|> included (default: 4096 for bpe, 10000 for gpt2)", type=int,
                  low=257, high=65_535)  # the single bytes, and what uint16 holds
    parser.option("val_fraction", 0.01, "share held out where no file name or record names a split", low=0, high=1)
    parser.option("max_stories", None, "keep at most this many train stories (default: all)", type=int, low=1)
    parser.option("clean", True, "repair stories, and remove broken, repeated and very short ones")
    parser.option("instruct", False, "put features, words, summary and a sentence before each story, where known")
    parser.option("hold_out", "", "instructions never together in train, e.g. words+summary")
    parser.option("seed", 1, "seed for drawing instructions")
    parser.option("workers", None, "processes that share the work (default: one for each CPU that may be used)",
                  type=int, low=1, high=61)
    args = parser.parse_args(argv)

    if not re.fullmatch(r"[^/\\,:]+", args.dataset):  # train.py mixes a:1,b:2
        sys.exit(f"--dataset={args.dataset} must name a folder under data/, and have no comma and no colon: name "
                 "files elsewhere with --input")
    if args.input and args.dataset == "world":
        sys.exit("--input needs a name for its stories: add --dataset=NAME (world is the built-in world's)")
    if args.version and args.input:
        sys.exit("--version downloads TinyStories and --input reads other files: leave one of them out")
    if args.dataset == "tinystories" and not args.input and not args.version:
        args.version = 2
    if args.vocab_size and args.tokenizer not in ("bpe", "gpt2"):
        sys.exit(f"--tokenizer={args.tokenizer} has a size of its own: leave --vocab_size out")
    args.vocab_size = args.vocab_size or (10_000 if args.tokenizer == "gpt2" else 4096)  # 10,000 as in the paper
    args.hold_out = [field for field in args.hold_out.split("+") if field]  # "" gives []
    if not set(args.hold_out) <= set(INSTRUCTIONS):
        sys.exit(f"--hold_out={'+'.join(args.hold_out)} names other fields than {'+'.join(INSTRUCTIONS)}")
    if args.hold_out and not args.instruct:
        sys.exit("--hold_out is about instructions: add --instruct")
    try:
        prepare(args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: data/{args.dataset} is unchanged, except for what was downloaded; run "
                                "the same command again to continue") from None
    finally:
        shutil.rmtree(f"data/{args.dataset}/{UNFINISHED}", ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(f"data/{args.dataset}")  # if it is empty


if __name__ == "__main__":
    run_main(main, lower="--workers")

"""Turn stories into token bins: fetch, clean, make a tokenizer, encode.

    python prepare.py --dataset=tinystories                 download TinyStories (2.2 GB) and prepare it
    python prepare.py --dataset=mine --input=stories.txt    prepare a text or JSONL file, or a folder of them

Writes train.bin, val.bin, tokenizer.tiktoken and meta.json to data/<dataset>. The bins are flat little-endian uint16,
with <|endoftext|> before every story and after the last. Other stages read them with the load_ functions at the end.
"""
import base64
import glob
import hashlib
import heapq
import json
import mmap
import os
import random
import re
import shutil
import signal
import sys
import time
import urllib.request
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from http.client import HTTPException
from itertools import pairwise

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from common import CommandLine, file_hash, run_main

EOT = "<|endoftext|>"
SKILLS = ("none", "grammar", "fact", "context", "reasoning")  # the labels in val.skills.bin
INSTRUCTIONS = {"features": "Features", "words": "Words", "summary": "Summary", "sentence": "Random sentence"}
URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
VERSIONS = {1: ("TinyStories-train.txt", "TinyStories-valid.txt"),
            2: ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt")}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
UNFINISHED = "unfinished"  # the folder, inside the dataset's, in which new files are made
CHUNK_BYTES = 1 << 21  # a worker reads about this much of a file at a time

# -----------------------------------------------------------------------------------------------------------------
# fetch


def find_sources(args, folder):
    """[(path, split)] of the files to read: one file, or a folder's stories.jsonl, else its .txt and .jsonl files.
    Those of TinyStories are downloaded if they are missing.

    The split is "train" or "val" if the last word of the file name says so ("stories-valid.txt"), else None."""
    source = args.input or folder
    escaped = glob.escape(source)
    paths = sorted(glob.glob(f"{escaped}/*.txt") + glob.glob(f"{escaped}/*.jsonl"))
    if args.version:
        paths = [f"{folder}/{name}" for name in VERSIONS[args.version]]
    elif os.path.isfile(source):
        paths = [source]
    elif os.path.exists(f"{source}/stories.jsonl"):  # by generate.py, which puts rejected answers into another .jsonl
        paths = [os.path.join(source, "stories.jsonl")]
    if not paths:
        sys.exit(f"no .txt or .jsonl file in {source}: name a file or folder with --input, or make stories with "
                 f"python -m lab.world or python generate.py --name={args.dataset}")
    refuse_two_versions(paths, folder, args.version or 1)
    for path in paths:
        if not os.path.exists(path):
            download(f"{args.url}/{os.path.basename(path)}", path)
    stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    return [(path, SPLITS.get(re.split("[-_.]", stem)[-1])) for path, stem in zip(paths, stems)]


def refuse_two_versions(paths, folder, version):
    """End the program if both versions of TinyStories would meet in one dataset: in the files to read, in the texts in
    its folder, or in the texts that its present bins were made from. The message shows how to prepare `version`."""
    names = " ".join(paths + glob.glob(f"{glob.escape(folder)}/*.txt"))
    if os.path.exists(f"{folder}/meta.json"):
        with open(f"{folder}/meta.json") as file:
            names += file.read()
    if all(train in names or valid in names for train, valid in VERSIONS.values()):
        sys.exit(f"{folder} would mix versions 1 and 2 of TinyStories: prepare each as a dataset of its own, with "
                 f"python prepare.py --dataset=tinystories-v{version} --version={version}")


def download(url, path, retries=5, wait=1.0):
    """Fetch `url` to `path`. What has arrived stays in path + ".part", and a later attempt continues from there.

    Gives up after retries + 1 attempts in a row without a new byte. The pause between them, in seconds, doubles."""
    part, failures = path + ".part", 0
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(part, "ab").close()
    largest = os.path.getsize(part)
    while True:
        try:
            fetch_rest(url, part)
            return os.replace(part, path)
        except (OSError, ValueError, HTTPException) as error:  # HTTPError is an OSError
            problem, status = error, getattr(error, "code", None)
        if status == 416:  # the file at `url` is shorter than ours, so ours is part of another file
            os.truncate(part, 0)
        size = os.path.getsize(part)
        failures = 0 if size > largest else failures + 1
        largest = max(size, largest)
        if failures > retries or status in (400, 401, 403, 404, 410):
            sys.exit(f"cannot download {url}: {problem}. Run this again to continue after {size:,} bytes, check --url, "
                     "name a file that you have with --input=FILE, or make stories with python -m lab.world")
        if failures:
            time.sleep(wait * 2 ** (failures - 1))


def fetch_rest(url, part):
    """Append to the file `part` what it lacks of `url`. Raises OSError if the connection ends before that."""
    start = max(0, os.path.getsize(part) - 1)  # the last byte again, as servers refuse a range that starts at the end
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"})
    with urllib.request.urlopen(request, timeout=30) as response, open(part, "ab") as file:
        content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if content_range:
            start, total = int(content_range[1]), int(content_range[2])
        else:  # the server ignores ranges and sends the file from its start
            start, total = 0, int(response.headers.get("Content-Length", 0))  # 0 if it does not tell the length
        file.truncate(start)
        title = os.path.basename(part)
        with tqdm.wrapattr(response, "read", total=total or None, initial=start, desc=title, disable=None) as body:
            shutil.copyfileobj(body, file)
    if total and os.path.getsize(part) != total:
        raise OSError(f"{os.path.getsize(part):,} of {total:,} bytes came")


# -----------------------------------------------------------------------------------------------------------------
# read: files are cut into chunks, which workers process independently of each other


def split_file(path):
    """Yield the chunks (path, start, end) of a file, in bytes. Each ends where a story ends."""
    separator = b"\n" if path.endswith(".jsonl") else EOT.encode()
    start, size = 0, os.path.getsize(path)
    if size == 0:  # mmap does not take an empty file
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        while start < size:
            position = content.find(separator, start + CHUNK_BYTES)
            end = size if position < 0 else position + len(separator)  # -1: not found
            yield path, start, end
            start = end


def parse_stories(path, content):
    """The stories in bytes of a file, each as a record {"story": text, …}: JSON lines, or text split at EOT."""
    text = re.sub(r"(?m)^\ufeff", "", content.decode())  # byte-order marks, also inside a file that was joined
    if path.endswith(".jsonl"):
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
        for record in records:
            record["story"].encode()  # raises if this is not text, or holds half a surrogate pair
        return records
    stories = text.replace("\r\n", "\n").split(EOT)
    if not stories[-1].strip():  # after the last separator
        stories.pop()
    return [{"story": story.strip()} for story in stories]


def read_chunk(path, start, end):
    """The records of a chunk. A line that cannot be read ends the program."""
    malformed = (ValueError, TypeError, KeyError, AttributeError)
    with open(path, "rb") as file:
        file.seek(start)
        try:
            return parse_stories(path, file.read(end - start))
        except malformed:
            file.seek(0)  # look for the line
        for number, line in enumerate(file, 1):
            try:
                parse_stories(path, line)
            except malformed:
                expected = 'a JSON object with a "story"' if path.endswith(".jsonl") else "text"
                sys.exit(f"{path} line {number} is not {expected} in UTF-8: correct or delete it")


def read_records(path):
    """Yield each story of a file as a record, with a progress bar."""
    for chunk in tqdm(list(split_file(path)), path, unit="chunk", leave=False, disable=None):
        yield from read_chunk(*chunk)


def available_cpus():
    """How many CPUs this process may use. In a container that can be fewer than the machine has."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_workers(function, tasks, title):
    """Yield (task, function(*task)) for each task, in order, with a progress bar. All CPUs share the work."""
    # A terminal sends Ctrl-C to the workers too. They ignore it, and this process stops them. Windows allows 61.
    pool = ProcessPoolExecutor(min(61, available_cpus()), initializer=signal.signal,
                               initargs=(signal.SIGINT, signal.SIG_IGN))
    interrupts = []  # Python can lose a KeyboardInterrupt while it forks: until the workers run, only note Ctrl-C
    handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        results = pool.map(function, *zip(*tasks))
        signal.signal(signal.SIGINT, handler)
        if interrupts:
            raise KeyboardInterrupt
        yield from tqdm(zip(tasks, results), title, len(tasks), unit="chunk", disable=None)
    finally:
        pool.shutdown(cancel_futures=True)  # also if the caller stops early, or a worker fails


# -----------------------------------------------------------------------------------------------------------------
# clean

# What each byte from 80 to FF becomes when it is read as cp1252. The five that cp1252 lacks stay control characters.
CP1252 = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in range(0x80, 0x100))
# UTF-8 characters of two, three and four bytes that were read so: "don’t" becomes "donâ€™t".
TAIL = f"[{CP1252[:64]}]"  # a byte from 80 to BF, as all bytes of a character but the first are
MOJIBAKE = re.compile(f"[Â-ß]{TAIL}|[à-ï]{TAIL}{TAIL}|[ð-ô]{TAIL}{TAIL}{TAIL}")
QUOTES = str.maketrans("“”„«»‘’`", "\"\"\"\"\"'''")


def repair(text):
    """Undo UTF-8 that was read as cp1252. All other text stays as it is."""
    def decode(match):
        try:
            return bytes(0x80 + CP1252.index(character) for character in match[0]).decode()
        except UnicodeDecodeError:
            return match[0]
    return text if text.isascii() else MOJIBAKE.sub(decode, text)


def cleaned_text(record, args):
    """The story of a record, repaired if --clean says so. Where spans point into it, it must stay as it is."""
    if args.clean and not record.get("spans"):
        return repair(record["story"])
    return record["story"]


def fingerprint(story):
    """64 bits of a story's text, the same for copies that differ only in case, quotes and white space."""
    normal = " ".join(story.translate(QUOTES).lower().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little")


def decide(chunk, file_split, args):
    """[(fingerprint, decision, whether it was repaired)] of the stories in a chunk. A decision is "train", "val", or
    the reason to remove the story. Copies are found later."""
    decisions = []
    for record in read_chunk(*chunk):
        story = cleaned_text(record, args)
        key = fingerprint(story)
        # The draw depends on the text alone, so that a story stays in its split when the corpus grows.
        drawn = "val" if key % 10**6 < args.val_fraction * 10**6 else "train"
        decision = SPLITS.get(str(file_split or record.get("split") or drawn), "neither train nor val")
        if not story.strip():
            decision = "empty"
        elif args.clean and len(story) < 100:
            decision = "under 100 characters"
        elif args.clean and story.rstrip()[-1] not in ".!?\"'”’)…":
            decision = "no final punctuation"
        decisions.append((key, decision, story != record["story"]))
    return decisions


def plan_dataset(files, args):
    """The plan, [(chunk, final decisions on its stories)], and a Counter of what cleaning did.

    Of several copies the first stays. Files of val are read first, so that a story in two files stays in val."""
    files = sorted(files, key=lambda file: ("val", None, "train").index(file[1]))
    tasks = [(chunk, split) for path, split in files for chunk in split_file(path)]
    plan, cleaning, stories = [], Counter(), {"train": 0, "val": 0}
    seen = {}  # {fingerprint: split} of the stories that stay
    for (chunk, file_split), proposals in run_workers(partial(decide, args=args), tasks, "reading"):
        decisions = []
        for key, decision, repaired in proposals:
            if decision in stories and key in seen:
                decision = f"copies in {decision}" if decision == seen[key] else "in train and in val"
            if decision == "train" and stories["train"] == args.max_stories:
                decision, repaired = "over --max_stories", False
            elif decision in stories:
                stories[decision] += 1
                if args.clean:
                    seen[key] = decision
            else:
                cleaning[f"{decision}: removed"] += 1
            if repaired:
                cleaning["UTF-8 read as cp1252: repaired"] += 1
            decisions.append(decision)
        plan.append((chunk, decisions))
        if file_split == "train" and stories["train"] == args.max_stories:
            break  # only train files are left
    for split, change in ("train", "lower"), ("val", "raise"):  # what to do with --val_fraction
        if not stories[split]:
            removed = "".join(f"; {count:,} {what}" for what, count in cleaning.items())
            sys.exit(f"no story for {split} in {', '.join(path for path, _ in files)}{removed}: give more stories, "
                     f"{change} --val_fraction, or try --clean=False")
    return plan, cleaning


def planned_records(chunk, decisions, args):
    """Yield (split, record) for each story of a chunk that stays: repaired, and with instructions, as options say."""
    for record, decision in zip(read_chunk(*chunk), decisions):
        if decision in ("train", "val"):
            record["story"] = cleaned_text(record, args)
            if args.instruct:
                record = instruct(record, decision, args.hold_out, args.seed)
            yield decision, record


def instruct(record, split, hold_out, seed):
    """Put before a story some of what is known about it: a random subset of INSTRUCTIONS, in random order.

    The draw depends on the seed and the story alone. In train, the fields in `hold_out` never all occur together."""
    rng = random.Random(f"{seed} {fingerprint(record['story'])}")
    sentences = re.findall(r"[^.!?\s][^.!?\n]*[.!?]+[\"”']?", record["story"])  # with their closing quote
    known = {"features": ", ".join(record.get("features") or ()), "words": ", ".join(record.get("words") or ()),
             "summary": record.get("summary"), "sentence": rng.choice(sentences) if sentences else None}
    fields = [name for name, value in known.items() if value]
    fields = rng.sample(fields, rng.randint(0, len(fields)))  # any number of them, even none
    if hold_out and split == "train" and set(hold_out) <= set(fields):
        fields.remove(rng.choice(hold_out))
    text = instruction({name: known[name] for name in fields})
    spans = [{**s, "start": s["start"] + len(text), "end": s["end"] + len(text)} for s in record.get("spans") or ()]
    return {**record, "story": text + record["story"], "spans": spans}


def instruction(fields):
    """The text before a story, from {"features", "words", "summary", "sentence": text} in the order given."""
    return "".join(f"{INSTRUCTIONS[name]}: {value}\n" for name, value in fields.items()) + "Story:\n"


# -----------------------------------------------------------------------------------------------------------------
# make a tokenizer: byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909), as ranks {token's bytes: id} for tiktoken

# GPT-2 splits text into words, and merges bytes only inside them (Radford et al. 2019). The pattern is tiktoken's.
WORDS = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")
# The same, but with letters, digits and signs left together. These pieces are faster to find and to count.
PIECES = re.compile(r" ?\S+|\s+(?!\S)|\s")
# The single bytes in GPT-2's order: the printable ones first.
BYTES = sorted(range(256), key=lambda b: (not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b), b))


def train_bpe(words, vocab_size):
    """Learn ranks from {word's bytes: how often it occurs}.

    Every word starts as single bytes. In each step the most frequent pair of neighboring tokens becomes a new token;
    among equally frequent pairs, the one with the smallest ids. Only the words that contain the pair are counted anew.
    Training ends at vocab_size - 1 tokens, as <|endoftext|> takes the last id, or when no pair occurs twice."""
    tokens = [bytes([b]) for b in BYTES]
    spellings, frequencies = [[] for _ in words], list(words.values())  # a spelling is a list of token ids
    counts, holders = Counter(), defaultdict(set)  # of each pair: how often it occurs, and in which words

    def spell(i, ids):
        """Give word i a new spelling, and keep `counts` and `holders` up to date."""
        for pair in pairwise(spellings[i]):
            counts[pair] -= frequencies[i]
        for pair in pairwise(ids):
            counts[pair] += frequencies[i]
            holders[pair].add(i)
        spellings[i] = ids

    for i, word in enumerate(words):
        spell(i, [BYTES.index(b) for b in word])
    heap = [(-count, pair) for pair, count in counts.items()]  # the most frequent pair comes out first
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size - 1:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:  # out of date: merging other pairs has lowered the count
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if -count < 2:  # and no other pair occurs more often
            break
        new, new_pairs = len(tokens), set()
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for i in holders.pop(pair):
            spell(i, merge(spellings[i], pair, new))
            new_pairs.update(neighbors for neighbors in pairwise(spellings[i]) if new in neighbors)
        for new_pair in new_pairs:
            heapq.heappush(heap, (-counts[new_pair], new_pair))
    return {token: i for i, token in enumerate(tokens)}


def merge(ids, pair, new):
    """Replace each occurrence of `pair` in `ids` by the id `new`, from left to right."""
    merged = []
    for token in ids:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new
        else:
            merged.append(token)
    return merged


def trim_bpe(ranks, counts, vocab_size):
    """The ranks of the most used tokens of a larger tokenizer, from {token: how often it occurs}.

    BPE can form a token only from the two tokens that it is merged from. So tokens are added in order of use, each
    together with the parts that are still missing, while they fit into vocab_size - 1. The merges keep their order."""
    chosen = {bytes([b]) for b in BYTES}
    for token in sorted(ranks, key=lambda token: (-counts[token], ranks[token])):
        missing = missing_parts(token, ranks, chosen)
        if len(chosen) + len(missing) <= vocab_size - 1:
            chosen |= missing
    return {token: i for i, token in enumerate(sorted(chosen, key=ranks.get))}


def missing_parts(token, ranks, chosen):
    """What `chosen` needs before BPE can form `token`: the token itself, its two parts, their parts, and so on."""
    if token in chosen:
        return set()
    first, second = parts_of(token, ranks)
    return {token} | missing_parts(first, ranks, chosen) | missing_parts(second, ranks, chosen)


def parts_of(token, ranks):
    """The two tokens that are merged into `token`: merge its bytes, lowest rank first, until two parts are left."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = pair_ranks.index(min(pair_ranks))  # of equal ranks, the leftmost
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def make_encoding(ranks):
    """The tiktoken.Encoding of ranks. <|endoftext|> gets the id after the last."""
    return tiktoken.Encoding("stories", pat_str=WORDS.pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def make_ranks(plan, args):
    """(ranks, coverage) of the tokenizer that --tokenizer asks for. Coverage is the share of GPT-2's tokens in the
    stories that the trimmed tokenizer has too, and None for other tokenizers."""
    if args.tokenizer not in ("bpe", "gpt2"):
        return load_ranks(args.tokenizer), None
    try:
        gpt2 = tiktoken.get_encoding("gpt2") if args.tokenizer == "gpt2" else None
    except OSError as error:  # requests, with which tiktoken downloads, raises OSErrors
        sys.exit(f"tiktoken cannot fetch GPT-2's tokenizer ({type(error).__name__}): go online, or use --tokenizer=bpe")
    words = Counter()
    for _, counts in run_workers(partial(count_words, args=args), plan, "counting"):
        words.update(counts)
    if not gpt2:
        return train_bpe(words, args.vocab_size), None
    counts = Counter()  # of GPT-2's tokens
    for word, count in words.items():
        for token in gpt2.encode_ordinary(word.decode()):
            counts[gpt2.decode_single_token_bytes(token)] += count
    ranks = {token: gpt2.encode_single_token(token) for token in gpt2.token_byte_values()}
    ranks = trim_bpe(ranks, counts, args.vocab_size)
    return ranks, sum(counts[token] for token in ranks) / max(1, counts.total())


def count_words(chunk, decisions, args):
    """{word's bytes: how often it occurs} in a chunk, in those of its stories that are in train."""
    pieces, words = Counter(), Counter()
    for split, record in planned_records(chunk, decisions, args):
        if split == "train":
            pieces.update(PIECES.findall(record["story"]))
    for piece, count in pieces.items():
        for word in WORDS.findall(piece):
            words[word.encode()] += count
    return words


# -----------------------------------------------------------------------------------------------------------------
# encode


def encode(chunk, decisions, args, tokenizer):
    """What a chunk adds to the bins, {name: bytes}, and a Counter {(split, unit): number}. A unit is stories, tokens,
    bytes, spans or bits. `tokenizer` is the tokenizer's folder under data/."""
    encoding, totals = cached_tokenizer(tokenizer), Counter()
    bins = {"train": bytearray(), "val": bytearray(), "val.skills": bytearray()}
    for split, record in planned_records(chunk, decisions, args):
        story, spans = record["story"], record.get("spans") or ()
        ids = [encoding.eot_token] + encoding.encode_ordinary(story)
        bins[split] += np.array(ids, "<u2").tobytes()
        if split == "val":
            bins["val.skills"] += label_tokens(story, ids, spans, encoding).tobytes()
        totals[split, "stories"] += 1
        totals[split, "tokens"] += len(ids)
        totals[split, "bytes"] += len(story.encode())
        totals[split, "spans"] += len(spans)
        totals[split, "bits"] += record.get("bits", np.nan)  # the sum is nan if one is unknown
    return bins, totals


def label_tokens(story, ids, spans, encoding):
    """The skill (index into SKILLS) of each token of <|endoftext|> and a story: that of the span in which at least one
    of its bytes lies, else 0."""
    labels = np.zeros(len(ids), "<u2")
    ends = np.cumsum([0] + [len(encoding.decode_single_token_bytes(token)) for token in ids[1:]])  # in bytes
    starts = np.append(0, ends[:-1])
    for span in spans:
        if span["skill"] not in SKILLS[1:]:
            sys.exit(f"a span has the skill {span['skill']!r}: known are {', '.join(SKILLS[1:])}")
        start = len(story[:span["start"]].encode())
        end = len(story[:span["end"]].encode())
        labels[(starts < end) & (ends > start)] = SKILLS.index(span["skill"])
    return labels


def write_bins(plan, args, folder, eot):
    """Encode the stories of the plan into bins in `folder`. Returns their totals {(split, unit): number}."""
    totals = Counter({("train", "tokens"): 1, ("val", "tokens"): 1})  # the <|endoftext|> after the last story
    with open(f"{folder}/train.bin", "wb") as train, open(f"{folder}/val.bin", "wb") as val, \
            open(f"{folder}/val.skills.bin", "wb") as skills:
        work = partial(encode, args=args, tokenizer=f"{args.dataset}/{UNFINISHED}")
        for _, (bins, chunk_totals) in run_workers(work, plan, "encoding"):
            train.write(bins["train"])
            val.write(bins["val"])
            skills.write(bins["val.skills"])
            totals.update(chunk_totals)
        for file, last in (train, eot), (val, eot), (skills, 0):  # the end of the last story
            file.write(last.to_bytes(2, "little"))
    return totals


def prepare(args):
    """Make the dataset that the options describe.

    All its files are made in a temporary folder and then moved into place. meta.json comes last, since it marks the
    dataset as complete: every reader starts from it."""
    started = time.time()
    folder = f"data/{args.dataset}"
    new = f"{folder}/{UNFINISHED}"
    files = find_sources(args, folder)
    plan, cleaning = plan_dataset(files, args)
    ranks, coverage = make_ranks(plan, args)
    if len(ranks) + 1 > 65_535:
        sys.exit(f"a vocabulary of {len(ranks) + 1:,} does not fit into uint16: share another --tokenizer")
    os.makedirs(new, exist_ok=True)
    with open(f"{new}/tokenizer.tiktoken", "wb") as file:
        file.writelines(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    totals = write_bins(plan, args, new, eot=len(ranks))

    meta = {"dataset": args.dataset, "vocab_size": len(ranks) + 1, "eot": len(ranks)}
    for split in ("train", "val"):
        meta[split] = {unit: totals[split, unit] for unit in ("stories", "tokens", "bytes")}
        meta[split]["sha256"] = file_hash(f"{new}/{split}.bin")
        if totals[split, "bits"] > 0 and not args.instruct:  # known for all the text
            meta[split]["bits_per_byte"] = totals[split, "bits"] / totals[split, "bytes"]
    meta["tokenizer"] = {"kind": args.tokenizer, "coverage": coverage, "sha256": file_hash(f"{new}/tokenizer.tiktoken")}
    meta["source"] = [{"file": path, "split": split, "bytes": os.path.getsize(path)} for path, split in files]
    meta["cleaning"] = cleaning
    meta["instruct"] = {"hold_out": args.hold_out} if args.instruct else False
    with open(f"{new}/meta.json", "w") as file:
        json.dump(meta, file, indent=1)
    if os.path.exists(f"{folder}/meta.json"):
        os.remove(f"{folder}/meta.json")  # from here until the new one is there, readers see no dataset
    for name in ("train.bin", "val.bin", "val.skills.bin", "tokenizer.tiktoken", "meta.json"):
        os.replace(f"{new}/{name}", f"{folder}/{name}")
    if not totals["val", "spans"]:
        os.remove(f"{folder}/val.skills.bin")  # it holds no label

    for what, count in sorted(cleaning.items()):
        print(f"  {count:9,} {what}")
    for split in ("train", "val"):
        stories, tokens, size = (meta[split][unit] for unit in ("stories", "tokens", "bytes"))
        print(f"{split:5} {stories:9,} stories {tokens:13,} tokens {size:13,} bytes, {size / tokens:.2f} a token")
    share = f", {coverage:.2%} of GPT-2's tokens kept whole" if coverage else ""
    print(f"vocabulary {len(ranks) + 1:,}{share}; {folder} is ready after {time.time() - started:.0f} s: "
          f"python train.py --dataset={args.dataset}")


# -----------------------------------------------------------------------------------------------------------------
# load: what other stages call


def load_ranks(folder):
    """Ranks {bytes: id} of the tokenizer in `folder`, or in data/`folder`."""
    for path in (f"{folder}/tokenizer.tiktoken", f"data/{folder}/tokenizer.tiktoken"):
        if os.path.exists(path):
            with open(path, "rb") as file:
                return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file)}
    sys.exit(f"no tokenizer.tiktoken in {folder}: run python prepare.py --dataset={os.path.basename(folder)}")


def load_tokenizer(dataset):
    """The tiktoken.Encoding of a dataset. Its <|endoftext|> is `eot_token`."""
    return make_encoding(load_ranks(f"data/{dataset}"))


cached_tokenizer = lru_cache(maxsize=1)(load_tokenizer)  # for workers, each of which loads it only once


def load_meta(dataset):
    """meta.json of a dataset, checked against the tokenizer beside it."""
    tokenizer, remedy = f"data/{dataset}/tokenizer.tiktoken", f"run python prepare.py --dataset={dataset}"
    try:
        with open(f"data/{dataset}/meta.json") as file:
            meta = json.load(file)
    except (FileNotFoundError, ValueError):
        sys.exit(f"no dataset in data/{dataset}: {remedy}")
    if not os.path.exists(tokenizer) or file_hash(tokenizer) != meta["tokenizer"]["sha256"]:
        sys.exit(f"{tokenizer} is not the one that meta.json names: {remedy}")
    return meta


def load_tokens(dataset, name):
    """The tokens of a bin ("train" or "val"), or the labels "val.skills", as a memory-mapped array of uint16."""
    path, remedy = f"data/{dataset}/{name}.bin", f"run python prepare.py --dataset={dataset}"
    expected = 2 * load_meta(dataset)[name.split(".")[0]]["tokens"]  # bytes
    if not os.path.exists(path):
        sys.exit(f"no {path}: {remedy}")
    size = os.path.getsize(path)
    if size != expected:
        sys.exit(f"{path} has {size:,} bytes, meta.json says {expected:,}: prepare was interrupted? {remedy}")
    return np.memmap(path, "<u2", mode="r")


def main(argv=None):
    parser = CommandLine(__doc__.split("\n")[0])
    parser.option("dataset", "world", "folder under data/ to write to; without --input, its stories are read")
    parser.option("input", "", f"file or folder to read: JSON lines with a `story`, or text split by {EOT}")
    parser.option("version", None, "download TinyStories: 2, by GPT-4 alone, or 1, the paper's (default: 2 for "
                  "--dataset=tinystories)", type=int, choices=(1, 2))
    parser.option("url", URL, "where TinyStories is downloaded from")
    parser.option("tokenizer", "bpe", "bpe, gpt2 (its most used tokens), or the folder of a dataset to share one with")
    parser.option("vocab_size", None, "<|endoftext|> included (default: 4096 for bpe, 10000 for gpt2)", type=int,
                  low=257, high=65_535)  # the single bytes, and what uint16 holds
    parser.option("val_fraction", 0.01, "share held out where no file name or record names a split", low=0, high=1)
    parser.option("max_stories", None, "keep only so many train stories (default: all)", type=int, low=1)
    parser.option("clean", True, "repair and remove broken and repeated stories")
    parser.option("instruct", False, "put features, words, summary and a sentence before each story, where known")
    parser.option("hold_out", "", "instructions never together in train, e.g. words+summary")
    parser.option("seed", 1, "of the instructions drawn")
    args = parser.parse_args(argv)

    if args.version and args.input:
        sys.exit("--version downloads TinyStories and --input reads other files: leave one of them out")
    if args.dataset == "tinystories" and not args.input and not args.version:
        args.version = 2
    if args.vocab_size and args.tokenizer not in ("bpe", "gpt2"):
        sys.exit(f"--tokenizer={args.tokenizer} has a size of its own: leave --vocab_size out")
    if args.vocab_size is None:
        args.vocab_size = 10_000 if args.tokenizer == "gpt2" else 4096
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


if __name__ == "__main__":
    run_main(main)

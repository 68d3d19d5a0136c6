"""Turn stories into token bins: fetch, clean, make a tokenizer, encode.

    python prepare.py --dataset=tinystories                     download TinyStories (2.2 GB) and prepare it
    python prepare.py --dataset=mine --input=stories.txt        the same for a text or JSONL file, or a folder of them

Writes data/<dataset>/train.bin and val.bin (flat little-endian uint16; <|endoftext|> before every story and after the
last), tokenizer.tiktoken and meta.json. Whoever reads them does so through load_meta, load_tokenizer and load_tokens.
"""
import argparse
import base64
import difflib
import errno
import hashlib
import heapq
import http.client
import json
import os
import random
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import regex  # comes with tiktoken, and is what splits its words
import tiktoken
from tqdm import tqdm

EOT = "<|endoftext|>"
# how GPT-2 splits text into words before it merges bytes (Radford et al. 2019), as tiktoken writes it
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
SKILLS = ("none", "grammar", "fact", "context", "reasoning")  # the labels in val.skills.bin
URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
VERSIONS = {1: ("TinyStories-train.txt", "TinyStories-valid.txt"),
            2: ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt")}

# -----------------------------------------------------------------------------------------------------------------
# what every script shares: the command line, and what counts as a copy of a story


class Parser(argparse.ArgumentParser):
    """The command line of every script: `--name=value`, no abbreviations, one line for a mistake (exit code 2)."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def option(self, name, default, help, type=None, **more):
        """Add `--name`; its type is that of its default, and a switch may be given as `--name` or `--name=False`."""
        if isinstance(default, bool):
            type, more = boolean, dict(nargs="?", const=True, metavar="BOOL")
        if default in (None, "") or "(default:" in help:
            help += "%(default).0s"  # the formatter adds no default where one is mentioned
        self.add_argument(f"--{name}", default=default, type=type or default.__class__, help=help, **more)

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


def start(main):
    """Run a script; Ctrl-C and a reader that goes away (`| head`) end it in one line, or none."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it flushes at exit


QUOTES = str.maketrans("“”„«»‘’`", "\"\"\"\"\"'''")


def fingerprint(story):
    """64 bits of a story's text after normalising case, quotes and white space: equal for copies."""
    normal = " ".join(story.translate(QUOTES).lower().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little")


# -----------------------------------------------------------------------------------------------------------------
# download


def download(url, path, retries=5, wait=1.0):
    """Fetch url to path, going on where an earlier try broke off; what has come stays in path + ".part".

    Gives up, in one line, after `retries` tries in a row that brought nothing new, waiting `wait` seconds before the
    second and twice as long before each further one."""
    part, tries, most = path + ".part", 0, -1
    os.makedirs(os.path.dirname(path), exist_ok=True)
    ways_on = "or use a file you have with --input=FILE, or stories made here: python world.py"
    while True:
        have = os.path.getsize(part) if os.path.exists(part) else 0
        if have > most:
            tries, most = 0, have
        elif (tries := tries + 1) > retries:
            sys.exit(f"cannot download {url}: {problem}. {have:,} bytes are kept: run this again to go on, {ways_on}")
        else:
            time.sleep(wait * 2 ** (tries - 1))
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                total = int(response.headers.get("Content-Length") or 0)
                if response.status == 206:  # else the server ignored our Range, and sends the whole file
                    start, total = map(int, re.fullmatch(r"bytes (\d+)-\d+/(\d+)",
                                                         response.headers["Content-Range"]).groups())
                    if start != have:
                        raise ValueError(f"asked for byte {have}, got byte {start}")
                else:
                    have = 0
                with open(part, "ab" if have else "wb") as f, tqdm(
                        total=total or None, initial=have, unit="B", unit_scale=True, disable=None,
                        desc=os.path.basename(path)) as bar:
                    while chunk := response.read(1 << 20):
                        f.write(chunk)
                        bar.update(len(chunk))
            size = os.path.getsize(part)
            if size == total or not total:
                os.replace(part, path)
                return
            problem = f"{size:,} of {total:,} bytes came"
            if size > total:
                os.remove(part)
        except urllib.error.HTTPError as e:
            if e.code == 416:  # nothing after what we have: it is whole, or it is not this file's beginning
                if e.headers.get("Content-Range") == f"bytes */{have}":
                    os.replace(part, path)
                    return
                os.remove(part)
            elif e.code < 500 and e.code != 429:
                sys.exit(f"cannot download {url}: the server says {e.code} {e.reason}. Check --url, {ways_on}")
            problem = f"the server says {e.code} {e.reason}"
        except (OSError, ValueError, TypeError, AttributeError, http.client.HTTPException) as e:
            if getattr(e, "errno", None) == errno.ENOSPC:
                sys.exit(f"the disk is full: make room, and run this again to go on with {part}")
            problem = f"{getattr(e, 'reason', e)}"


# -----------------------------------------------------------------------------------------------------------------
# reading and cleaning


def find_files(source):
    """[(path, "train", "val" or None)] of a file, or of a folder: of its stories.jsonl, else its .txt and .jsonl."""
    own = os.path.join(source, "stories.jsonl")
    paths = [source] if os.path.isfile(source) else [own] if os.path.exists(own) else sorted(
        os.path.join(source, name) for name in (os.listdir(source) if os.path.isdir(source) else ())
        if name.endswith((".txt", ".jsonl")))
    files = []
    for path in paths:
        match = re.search(r"(^|[-_.])(train|val|valid)\.\w+$", os.path.basename(path))
        files.append((path, match and match[2][:3].replace("tra", "train")))
    return files


def read_records(path, bar=None):
    """Each story of a file as a record, {"story": text, …}: JSON lines, or text split at <|endoftext|>."""
    bar = bar or tqdm(total=os.path.getsize(path), unit="B", unit_scale=True, disable=None, leave=False, desc=path)
    with open(path, "rb") as f:
        lines, number = [], 0
        for line in f:
            bar.update(len(line))
            number += 1
            try:
                line = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if path.endswith(".jsonl"):
                    if line.strip():
                        record = json.loads(line)
                        record["story"].encode()
                        yield record
                    continue
            except UnicodeError:
                sys.exit(f"{path} line {number} is not UTF-8: save the file as UTF-8 and run this again")
            except (ValueError, TypeError, KeyError, AttributeError):
                sys.exit(f'{path} line {number} is no JSON object with a "story": mend or delete that line')
            while EOT in line:
                head, line = line.split(EOT, 1)
                yield {"story": "".join(lines + [head]).strip()}
                lines = []
            lines.append(line)
        if "".join(lines).strip():
            yield {"story": "".join(lines).strip()}


# Characters that a byte 80 to FF becomes when it is read as cp1252 (five bytes that cp1252 lacks stay controls),
# and the shapes that UTF-8 sequences of two, three and four bytes have after that: "don’t" read so is "donâ€™t".
CP1252 = {bytes([b]).decode("cp1252", "ignore") or chr(b): b for b in range(0x80, 0x100)}
lead = ["".join(c for c, b in CP1252.items() if low <= b <= high) for low, high in
        ((0xC2, 0xDF), (0xE0, 0xEF), (0xF0, 0xF4))]
tail = "[" + re.escape("".join(c for c, b in CP1252.items() if b < 0xC0)) + "]"
MOJIBAKE = re.compile(f"[{lead[0]}]{tail}|[{lead[1]}]{tail}{{2}}|[{lead[2]}]{tail}{{3}}")


def repair(text):
    """Undo UTF-8 that was read as cp1252; all other text is left alone."""
    def decode(match):
        try:
            return bytes(CP1252[c] for c in match[0]).decode("utf-8")
        except UnicodeDecodeError:
            return match[0]
    return text if text.isascii() else MOJIBAKE.sub(decode, text)


def read_corpus(files, args, counts, title):
    """Yield (split, record) of every story that stays, val before train; `counts` collects what cleaning did."""
    seen = {"val": set(), "train": set()}
    total = sum(os.path.getsize(path) * (1 if split else 2) for path, split in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=None) as bar:
        for split in ("val", "train"):
            kept = 0
            for path, file_split in files:
                if file_split not in (None, split):
                    continue
                for record in read_records(path, bar):
                    story, key = record["story"], None
                    if not file_split:
                        own = str(record.get("split", ""))
                        if not own:
                            key = fingerprint(story)
                            own = "val" if key % 10**6 < args.val_fraction * 10**6 else "train"
                        if own[:3] != split[:3]:
                            continue
                    if args.clean:
                        repaired = repair(story)
                        if repaired != story:
                            counts["UTF-8 read as cp1252: repaired"] += 1
                            story, key = repaired, None
                        key = key or fingerprint(story)
                        why = ("empty" if not story.strip() else "under 100 characters" if len(story) < 100 else
                               "no final punctuation" if story.rstrip()[-1] not in ".!?\"'”’)…" else
                               f"copies in {split}" if key in seen[split] else
                               "in train and in val" if key in seen["val"] else None)
                        if why:
                            counts[f"{why}: removed"] += 1
                            continue
                        seen[split].add(key)
                    elif not story.strip():
                        continue
                    yield split, {**record, "story": story}
                    kept += 1
                    if split == "train" and kept == args.max_stories:
                        return


# -----------------------------------------------------------------------------------------------------------------
# instructions before the story


INSTRUCTIONS = {"features": "Features", "words": "Words", "summary": "Summary", "sentence": "Random sentence"}


def instruct(record, split, hold_out, seed):
    """The record's text and spans with a random subset, in random order, of what is known of the story before it.

    The draw is a function of seed and story. In train the fields in `hold_out` never all stand together."""
    draw = random.Random(f"{seed} {fingerprint(record['story'])}")
    sentences = re.findall(r"[^.!?\s][^.!?\n]*[.!?]+[\"”']?", record["story"])
    known = {"features": ", ".join(record.get("features") or ()), "words": ", ".join(record.get("words") or ()),
             "summary": record.get("summary"), "sentence": draw.choice(sentences) if sentences else None}
    fields = [name for name, value in known.items() if value]
    fields = draw.sample(fields, draw.randint(0, len(fields)))
    if hold_out and split == "train" and set(hold_out) <= set(fields):
        fields.remove(draw.choice(hold_out))
    text = instruction({name: known[name] for name in fields})
    spans = [{**s, "start": s["start"] + len(text), "end": s["end"] + len(text)} for s in record.get("spans") or ()]
    return {**record, "story": text + record["story"], "spans": spans}


def instruction(fields):
    """What stands before a story, from {"features", "words", "summary", "sentence": text} in the order given."""
    return "".join(f"{INSTRUCTIONS[name]}: {value}\n" for name, value in fields.items()) + "Story:\n"


# -----------------------------------------------------------------------------------------------------------------
# tokenizers: byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909), as ranks {bytes: id} for tiktoken

# the 256 single bytes in GPT-2's order: those that print first
BYTES = sorted(range(256), key=lambda b: (not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b), b))


def train_bpe(words, vocab_size):
    """Ranks of `vocab_size` - 1 tokens (one is left for <|endoftext|>) or fewer, if no pair stands twice.

    words: {word's bytes: how often}. The most frequent pair of neighbours is merged again and again; of equals, the
    one with the smallest ids. Only the words that hold a merged pair are counted anew."""
    ranks = {bytes([b]): i for i, b in enumerate(BYTES)}
    tokens = list(ranks)
    spelled = [[ranks[bytes([b])] for b in word] for word in words]
    times = list(words.values())
    counts, where = Counter(), defaultdict(set)  # of each pair: its number, and the words it stands in
    for i, ids in enumerate(spelled):
        for pair in zip(ids, ids[1:]):
            counts[pair] += times[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size - 1:
        n, pair = heapq.heappop(heap)
        if -n != counts[pair]:  # counts of old pairs only fall: this entry is out of date
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if -n < 2:
            break
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        ranks.setdefault(tokens[new], new)
        touched = set()
        for i in where.pop(pair):
            ids, merged, j = spelled[i], [], 0
            while j < len(ids):
                if j + 1 < len(ids) and (ids[j], ids[j + 1]) == pair:
                    merged.append(new)
                    j += 2
                else:
                    merged.append(ids[j])
                    j += 1
            for old in zip(ids, ids[1:]):
                counts[old] -= times[i]
            for now in zip(merged, merged[1:]):
                counts[now] += times[i]
                if new in now:
                    where[now].add(i)
                    touched.add(now)
            spelled[i] = merged
        for now in touched:
            heapq.heappush(heap, (-counts[now], now))
    return ranks


def trim_bpe(ranks, used, vocab_size):
    """The most used tokens of a larger tokenizer, closed: a token stays only where both parts it is merged from do.

    used: how often each id of `ranks` occurs. Returns ranks of vocab_size - 1 tokens or fewer, in the old order, so
    that the merges that are left happen in the same order as before."""
    keep = {bytes([b]) for b in BYTES}
    for token in sorted(ranks, key=lambda t: (-used[ranks[t]], ranks[t])):
        family, todo = set(), [token]  # the token, and what it is merged from, down to tokens that stay anyway
        while todo:
            t = todo.pop()
            if t not in keep and t not in family:
                family.add(t)
                todo += parts_of(t, ranks)
        if len(keep) + len(family) <= vocab_size - 1:
            keep |= family
    return {token: i for i, token in enumerate(sorted(keep, key=ranks.get))}


def parts_of(token, ranks):
    """The two tokens whose merge makes `token`: merge its bytes by every rank below its own."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def make_encoding(ranks):
    return tiktoken.Encoding("stories", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


# -----------------------------------------------------------------------------------------------------------------
# workers


def start_worker(ranks):
    global encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that leads
    encoding = make_encoding(ranks) if ranks else None


def count_words(batch):
    return Counter(word for _, record in batch for word in regex.findall(WORDS, record["story"]))


def count_tokens(batch):
    return Counter(token for _, record in batch for token in encoding.encode_ordinary(record["story"]))


def encode(batch):
    """ids and labels (uint16, one a token, each story after its <|endoftext|>), bytes of text, sum of bits."""
    ids, labels, size, bits = [], [], 0, 0.0
    for split, record in batch:
        tokens = encoding.encode_ordinary(record["story"])
        ids += [encoding.eot_token] + tokens
        size += len(record["story"].encode())
        bits += record.get("bits", float("nan"))
        if split == "val":
            labels += [0] + label_tokens(record["story"], tokens, record.get("spans") or ())
    return np.array(ids, "<u2"), np.array(labels, "<u2"), size, bits


def label_tokens(story, tokens, spans):
    """The skill (index into SKILLS) of each token: that of the span which one of its bytes lies in, else 0."""
    labels = [0] * len(tokens)
    if spans:
        ends = np.cumsum([len(encoding.decode_single_token_bytes(t)) for t in tokens])
        for span in spans:
            if span["skill"] not in SKILLS[1:]:
                sys.exit(f"a span has the skill {span['skill']!r}: known are {', '.join(SKILLS[1:])}")
            start, end = (len(story[:span[side]].encode()) for side in ("start", "end"))
            for i in range(np.searchsorted(ends, start, "right"), np.searchsorted(ends, end, "left") + 1):
                labels[i] = SKILLS.index(span["skill"])
    return labels


def run_workers(function, corpus, ranks=None):
    """Yield (split, number of stories, function(batch)) in order; few batches are under way, so memory stays flat."""
    def batches():
        batch, size = [], 0
        for item in corpus:
            if batch and (size > 500_000 or item[0] != batch[0][0]):
                yield batch
                batch, size = [], 0
            batch.append(item)
            size += len(item[1]["story"])
        if batch:
            yield batch

    with ProcessPoolExecutor(initializer=start_worker, initargs=(ranks,)) as pool:
        under_way = deque()
        try:
            for batch in batches():
                under_way.append((batch[0][0], len(batch), pool.submit(function, batch)))
                if len(under_way) > 2 * os.cpu_count():
                    split, n, future = under_way.popleft()
                    yield split, n, future.result()
            for split, n, future in under_way:
                yield split, n, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------------------------------------------
# the stage


def prepare(args):
    """Read, clean, tokenize and write one dataset, as `args` (the command line's) say; returns its meta."""
    folder = os.path.join("data", args.dataset)
    source = args.input or folder
    if args.dataset == "tinystories" and not args.input:
        paths = [os.path.join(folder, name) for name in VERSIONS[args.version]]
        for path in paths:
            if not os.path.exists(path):
                download(f"{args.url}/{os.path.basename(path)}", path)
        files = [file for path in paths for file in find_files(path)]
    else:
        files = find_files(source)
    if not files:
        sys.exit(f"no .txt or .jsonl file in {source}: " + (
            "run python world.py" if args.dataset == "world" else
            f"put stories there, name them with --input=FILE, or write some: python generate.py --name={args.dataset}"))
    os.makedirs(folder, exist_ok=True)
    started, counts, hold_out = time.time(), Counter(), [f for f in args.hold_out.split("+") if f]
    if not set(hold_out) <= set(INSTRUCTIONS):
        sys.exit(f"--hold_out={args.hold_out} names other fields than {'+'.join(INSTRUCTIONS)}")

    def corpus(title, counts):
        for split, record in read_corpus(files, args, counts, title):
            yield split, instruct(record, split, hold_out, args.seed) if args.instruct else record

    coverage = None
    if args.tokenizer == "bpe":
        words = Counter()
        for split, _, found in run_workers(count_words, corpus("counting words", Counter())):
            if split == "train":
                words.update(found)
        ranks = train_bpe({word.encode(): n for word, n in words.items()}, args.vocab_size)
    elif args.tokenizer == "gpt2":
        gpt2 = load_gpt2()
        used = Counter()
        for split, _, found in run_workers(count_tokens, corpus("counting tokens", Counter()), gpt2):
            if split == "train":
                used.update(found)
        ranks = trim_bpe(gpt2, used, args.vocab_size)
        coverage = sum(used[gpt2[token]] for token in ranks) / max(1, used.total())
    else:
        ranks = load_ranks(args.tokenizer)
    if len(ranks) + 1 > 65_535:
        sys.exit(f"a vocabulary of {len(ranks) + 1} does not fit into uint16: choose --vocab_size=65535 or less")

    outputs = ("train.bin", "val.bin", "val.skills.bin", "tokenizer.tiktoken", "meta.json")
    temporary = {name: os.path.join(folder, name + ".tmp") for name in outputs}
    meta = {"dataset": args.dataset, "vocab_size": len(ranks) + 1, "eot": len(ranks)}
    hashes = {split: hashlib.sha256() for split in ("train", "val")}
    stats = {split: Counter() for split in hashes}
    labelled = False
    with open(temporary["train.bin"], "wb") as train, open(temporary["val.bin"], "wb") as val, \
            open(temporary["val.skills.bin"], "wb") as skills:
        bins = {"train": train, "val": val}
        def write(split, ids):
            bins[split].write(ids.tobytes())
            hashes[split].update(ids.tobytes())
            stats[split]["tokens"] += len(ids)
        for split, n, (ids, labels, size, bits) in run_workers(encode, corpus("encoding", counts), ranks):
            write(split, ids)
            stats[split].update(stories=n, bytes=size, bits=bits)
            skills.write(labels.tobytes())
            labelled |= bool(labels.any())
        for split in bins:
            write(split, np.array([meta["eot"]], "<u2"))
        skills.write(np.zeros(1, "<u2").tobytes())
    for split in stats:
        if not stats[split]["stories"]:
            sys.exit(f"no story for {split} in {source} ({sum(counts.values()):,} were removed by cleaning): " + (
                "raise --val_fraction" if split == "val" else "give more stories, or --clean=False"))
        meta[split] = {**{name: stats[split][name] for name in ("stories", "tokens", "bytes")},
                       "sha256": hashes[split].hexdigest()}
        if stats[split]["bits"] > 0:  # known for every story
            meta[split]["bits_per_byte"] = stats[split]["bits"] / stats[split]["bytes"]
    with open(temporary["tokenizer.tiktoken"], "wb") as f:
        f.writelines(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    meta["tokenizer"] = {"kind": args.tokenizer, "sha256": file_hash(temporary["tokenizer.tiktoken"])}
    if coverage:
        meta["tokenizer"]["coverage"] = coverage
    meta["source"] = [{"file": os.path.basename(path), "bytes": os.path.getsize(path)} for path, _ in files]
    meta["cleaning"] = dict(counts)
    meta["instruct"] = args.instruct and {"hold_out": hold_out}
    with open(temporary["meta.json"], "w") as f:
        json.dump(meta, f, indent=1)
    for name in outputs:  # meta.json last: until it stands, readers see that something is missing
        os.replace(temporary[name], os.path.join(folder, name))
    if not labelled:
        os.remove(os.path.join(folder, "val.skills.bin"))
    for what, n in sorted(counts.items()):
        print(f"  {n:9,} {what}")
    for split in stats:
        print(f"{split:5} {meta[split]['stories']:9,} stories {meta[split]['tokens']:13,} tokens "
              f"{meta[split]['bytes']:13,} bytes, {meta[split]['bytes'] / meta[split]['tokens']:.2f} a token")
    print(f"vocabulary {meta['vocab_size']:,}" + (f", {coverage:.2%} of GPT-2's tokens kept whole" if coverage else "")
          + f"; {folder} is ready after {time.time() - started:.0f} s: python train.py --dataset={args.dataset}")
    return meta


def load_gpt2():
    """GPT-2's ranks {bytes: id}, which tiktoken downloads once and keeps."""
    try:
        return tiktoken.get_encoding("gpt2")._mergeable_ranks
    except OSError as e:  # requests' errors are OSErrors
        sys.exit(f"tiktoken cannot fetch GPT-2's tokenizer ({e.__class__.__name__}): go online once, or --tokenizer=bpe")


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# -----------------------------------------------------------------------------------------------------------------
# what other stages load


def load_ranks(folder):
    """Ranks {bytes: id} of the tokenizer in `folder`, or in data/`folder`."""
    for path in (os.path.join(folder, "tokenizer.tiktoken"), os.path.join("data", folder, "tokenizer.tiktoken")):
        if os.path.exists(path):
            with open(path, "rb") as f:
                return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, f)}
    sys.exit(f"no tokenizer.tiktoken in {folder}: run python prepare.py --dataset={os.path.basename(folder)}")


def load_tokenizer(dataset):
    """The tiktoken.Encoding of a dataset; its <|endoftext|> is `eot_token`."""
    return make_encoding(load_ranks(os.path.join("data", dataset)))


def load_meta(dataset):
    """meta.json of a dataset, checked against the tokenizer beside it."""
    folder, again = os.path.join("data", dataset), f"run python prepare.py --dataset={dataset}"
    try:
        with open(os.path.join(folder, "meta.json")) as f:
            meta = json.load(f)
    except FileNotFoundError:
        sys.exit(f"no dataset in {folder}: {again}")
    except ValueError:
        sys.exit(f"{folder}/meta.json is not JSON: {again}")
    tokenizer = os.path.join(folder, "tokenizer.tiktoken")
    if not os.path.exists(tokenizer) or file_hash(tokenizer) != meta["tokenizer"]["sha256"]:
        sys.exit(f"{tokenizer} is not the one that meta.json names: {again}")
    return meta


def load_tokens(dataset, name):
    """The tokens of `name`.bin ("train", "val"; "val.skills" for labels) as a memory-mapped array of uint16."""
    meta, path = load_meta(dataset), os.path.join("data", dataset, name + ".bin")
    expected, again = meta[name.split(".")[0]]["tokens"], f"run python prepare.py --dataset={dataset}"
    if not os.path.exists(path):
        sys.exit(f"no {path}: {again}")
    found = os.path.getsize(path) / 2
    if found != expected:
        sys.exit(f"{path} has {found:,g} tokens, meta.json says {expected:,}: prepare was interrupted? {again}")
    return np.memmap(path, "<u2", mode="r")


def command_line():
    parser = Parser(__doc__.split("\n")[0])
    parser.option("dataset", "world", "folder under data/ to write to; its .txt and .jsonl files are read")
    parser.option("input", "", "a file or folder to read instead: JSON lines with `story`, or text split by " + EOT)
    parser.option("version", 2, "of TinyStories to download: 2, by GPT-4 alone, or 1, the paper's", choices=(1, 2))
    parser.option("url", URL, "where TinyStories is downloaded from")
    parser.option("tokenizer", "bpe", "bpe, gpt2 (its most used tokens), or the folder of a dataset to share one with")
    parser.option("vocab_size", None, "4096 for bpe, 10000 for gpt2, <|endoftext|> included", type=int)
    parser.option("val_fraction", 0.01, "share held out where neither file names nor records name a split")
    parser.option("max_stories", -1, "keep only so many train stories")
    parser.option("clean", True, "repair and remove broken and repeated stories")
    parser.option("instruct", False, "put features, words, summary and a sentence before each story, where known")
    parser.option("hold_out", "", "instructions never together in train, e.g. words+summary")
    parser.option("seed", 1, "of the instructions drawn")
    return parser


def main(argv=None):
    args = command_line().parse_args(argv)
    if args.vocab_size is None:
        args.vocab_size = 10_000 if args.tokenizer == "gpt2" else 4096
    if not 257 <= args.vocab_size <= 65_535:
        sys.exit(f"--vocab_size={args.vocab_size} must lie between 257 (single bytes) and 65535 (what uint16 holds)")
    try:
        prepare(args)
    except KeyboardInterrupt:
        sys.exit(f"interrupted: data/{args.dataset} is as it was before; the same command starts again")


if __name__ == "__main__":
    start(main)

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
import glob
import hashlib
import heapq
import http.client
import itertools
import json
import math
import mmap
import os
import random
import re
import shutil
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
# how GPT-2 splits text into words before it merges bytes (Radford et al. 2019), as tiktoken writes it; and the same
# with letters, digits and signs left together: such pieces are faster to find and count, and few are left to split
WORDS = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")
PIECES = re.compile(r" ?\S+|\s+(?!\S)|\s")
SKILLS = ("none", "grammar", "fact", "context", "reasoning")  # the labels in val.skills.bin
URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
VERSIONS = {1: ("TinyStories-train.txt", "TinyStories-valid.txt"),
            2: ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt")}
UNFINISHED = "unfinished"  # folder for the new files in the dataset's, until all are there
SPLITS = {"tra": "train", "val": "val"}  # by how their names begin: train, training, val, valid, validation
BLOCK = 1 << 21  # bytes of stories that a worker takes at a time

# -----------------------------------------------------------------------------------------------------------------
# what every script shares: the command line, and what counts as a copy of a story


class Parser(argparse.ArgumentParser):
    """The command line of every script: `--name=value`, no abbreviations, one line for a mistake (exit code 2)."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.switches = set()

    def option(self, name, default, help, type=None, **more):
        """Add `--name`; its type is that of its default, and a switch may be given as `--name` or `--name=False`."""
        if isinstance(default, bool):
            type, more["metavar"] = boolean, "BOOL"
            self.switches.add(f"--{name}")
        if default in (None, "") or "(default:" in help:
            help += "%(default).0s"  # the formatter adds no default where one is mentioned
        self.add_argument(f"--{name}", default=default, type=type or default.__class__, help=help, **more)

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        known, unknown = self.parse_known_args([a + "=True" if a in self.switches else a for a in args], namespace)
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
    """Run a script; Ctrl-C, a reader that goes away (`| head`) and a full disk end it in one line, or none."""
    # a file or pipe on Windows does not hold every character, and a pipe shows progress only line by line
    if hasattr(sys.stdout, "reconfigure"):  # not so in IDLE
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
    except KeyboardInterrupt as e:  # end as if it had never been caught, so that a shell's loop ends too
        if e.args:
            print(e, file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it flushes at exit
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        sys.exit("the disk is full: make room, then the same command again")


QUOTES = str.maketrans("“”„«»‘’`", "\"\"\"\"\"'''")


def fingerprint(story):
    """64 bits of a story's text after normalising case, quotes and white space: equal for copies."""
    normal = " ".join(story.translate(QUOTES).lower().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little")


# -----------------------------------------------------------------------------------------------------------------
# download


def download(url, path, retries=5, wait=1.0):
    """Fetch url to path, going on where an earlier try broke off; what has come stays in path + ".part".

    Gives up, in one line, after a try and `retries` more in a row that brought nothing new, waiting `wait` seconds
    before the second and twice as long before each further one."""
    part, tries, most, problem = path + ".part", -1, 0, ""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    ways_on = "or use a file you have with --input=FILE, or stories made here: python world.py"
    while True:
        have = os.path.getsize(part) if os.path.exists(part) else 0
        most, tries = max(most, have), 0 if have > most else tries + 1
        if tries > retries:
            sys.exit(f"cannot download {url}: {problem}. {have:,} bytes are kept: run this again to go on, {ways_on}")
        if tries:
            time.sleep(wait * 2 ** (tries - 1))
        # from the last byte that we have: so there is an answer even where we have them all
        request = urllib.request.Request(url, headers={"Range": f"bytes={max(0, have - 1)}-"})
        try:
            with urllib.request.urlopen(request, timeout=30) as response, open(part, "ab") as f:
                sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
                # a server that ignores the range sends all, and one that knows no length says 0
                start, total = map(int, sent.groups() if sent else (0, response.headers.get("Content-Length", 0)))
                f.truncate(min(start, have))
                with tqdm.wrapattr(response, "read", total=total or None, initial=start, disable=None,
                                   desc=os.path.basename(path)) as body:
                    shutil.copyfileobj(body, f)
            size = os.path.getsize(part)
            if size == total or not total:
                return os.replace(part, path)
            problem = f"{size:,} of {total:,} bytes came"
        except urllib.error.HTTPError as e:
            problem = f"the server says {e.code} {e.reason}"
            if e.code == 416:  # the file is shorter than what we have, which is of another file then
                os.remove(part)
            elif e.code < 500 and e.code != 429:
                sys.exit(f"cannot download {url}: {problem}. Check --url, {ways_on}")
        except (OSError, ValueError, http.client.HTTPException) as e:
            problem = f"{getattr(e, 'reason', e)}"


# -----------------------------------------------------------------------------------------------------------------
# reading and cleaning


def find_files(source):
    """[(path, split)] of a file, or of a folder: of its stories.jsonl, else its .txt and .jsonl.

    split: "train" or "val" where the file's name says so, else None."""
    own = os.path.join(source, "stories.jsonl")
    if os.path.isfile(source):
        paths = [source]
    elif os.path.exists(own):
        paths = [own]
    else:
        paths = sorted(path for end in ("txt", "jsonl") for path in glob.glob(f"{glob.escape(source)}/*.{end}"))
    named = [re.search(r"(?:^|[-_.])(train|val)(?:ing|id|idation)?\.\w+$", os.path.basename(path)) for path in paths]
    return [(path, match and SPLITS[match[1][:3]]) for path, match in zip(paths, named)]


def cut(path):
    """The blocks (path, start, end) of a file, in bytes: at least BLOCK long, and cut where a story ends."""
    end_of_story, size, start = b"\n" if path.endswith(".jsonl") else EOT.encode(), os.path.getsize(path), 0
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if size else f as content:
        while start < size:
            found = content.find(end_of_story, start + BLOCK)
            end = found + len(end_of_story) if found >= 0 else size
            yield path, start, end
            start = end


def parse(path, content):
    """The stories in bytes of a file, each as a record {"story": text, …}: JSON lines, or text split at EOT."""
    text = re.sub(r"(?m)^\ufeff", "", content.decode())  # byte-order marks, also of files that were joined
    if path.endswith(".jsonl"):
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
        for record in records:
            record["story"].encode()  # half a surrogate pair, which JSON can hold, is no text
        return records
    stories = text.replace("\r\n", "\n").split(EOT)
    if not stories[-1].strip():
        stories.pop()
    return [{"story": story.strip()} for story in stories]


def read_block(path, start, end):
    """The records of a block; a mistake in it ends the program in a line that says where."""
    mistakes = (ValueError, TypeError, KeyError, AttributeError)
    with open(path, "rb") as f:
        f.seek(start)
        try:
            return parse(path, f.read(end - start))
        except mistakes:
            f.seek(0)
            for number, line in enumerate(f, 1):
                try:
                    parse(path, line)
                except mistakes as e:
                    sys.exit(f"{path} line {number} is " + (
                        "not UTF-8: save the file as UTF-8 and run this again" if isinstance(e, UnicodeError) else
                        'no JSON object with a "story": mend or delete that line'))


def read_records(path):
    """Each story of a file as a record, with a bar."""
    with tqdm(total=os.path.getsize(path), unit="B", unit_scale=True, disable=None, leave=False, desc=path) as bar:
        for block in cut(path):
            yield from read_block(*block)
            bar.update(block[2] - block[1])


# Characters that a byte 80 to FF becomes when it is read as cp1252 (five bytes that cp1252 lacks stay controls),
# and the shapes that UTF-8 sequences of two, three and four bytes have after that: "don’t" read so is "donâ€™t".
HIGH = "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in range(0x80, 0x100))
two, three, four, tail = (f"[{re.escape(HIGH[first - 0x80:last - 0x7F])}]" for first, last in
                          ((0xC2, 0xDF), (0xE0, 0xEF), (0xF0, 0xF4), (0x80, 0xBF)))
MOJIBAKE = re.compile(f"{two}{tail}|{three}{tail}{{2}}|{four}{tail}{{3}}")


def repair(text):
    """Undo UTF-8 that was read as cp1252; all other text is left alone."""
    def decode(match):
        try:
            return bytes(0x80 + HIGH.index(c) for c in match[0]).decode("utf-8")
        except UnicodeDecodeError:
            return match[0]
    return text if text.isascii() else MOJIBAKE.sub(decode, text)


def fates_of(block, file_split):
    """(fingerprint, fate, whether it was repaired) of each story of a block; its fate is a split, or why it goes."""
    found = []
    for record in read_block(*block):
        story = repair(record["story"]) if settings.clean else record["story"]
        key, end = fingerprint(story), story.rstrip()[-1:]
        own = "val" if key % 10**6 < settings.val_fraction * 10**6 else "train"
        fate = ("empty" if not end else
                "under 100 characters" if settings.clean and len(story) < 100 else
                "no final punctuation" if settings.clean and end not in ".!?\"'”’)…" else
                SPLITS.get(str(file_split or record.get("split") or own)[:3], "neither train nor val"))
        found.append((key, fate, story != record["story"]))
    return found


def choose(files, args):
    """[(block, fates of its stories)] of the files that are needed, and {what cleaning did: number of stories}.

    Of copies the first stays. Files for val come first and those for train last, so that val stays whole."""
    files = sorted(files, key=lambda file: ("val", None, "train").index(file[1]))
    plan, counts, kept, seen = [], Counter(), {"train": 0, "val": 0}, {}
    tasks = [(block, split) for path, split in files for block in cut(path)]
    for (block, file_split), found in run_workers(fates_of, tasks, "reading", args):
        plan.append((block, []))
        for key, fate, repaired in found:
            if fate in kept and key in seen:
                fate = f"copies in {fate}" if seen[key] == fate else "in train and in val"
            if fate == "train" and kept["train"] == args.max_stories:
                fate = None
            elif fate in kept:
                kept[fate] += 1
                if args.clean:
                    seen[key] = fate
            else:
                counts[f"{fate}: removed"] += 1
            if fate and repaired:
                counts["UTF-8 read as cp1252: repaired"] += 1
            plan[-1][1].append(fate)
        if file_split == "train" and kept["train"] == args.max_stories:
            break
    for split in kept:
        if not kept[split]:
            sys.exit(f"no story for {split} in {', '.join(path for path, _ in files)}"
                     f"{''.join(f'; {n:,} {what}' for what, n in counts.items())}: "
                     f"give more stories, or {'raise' if split == 'val' else 'lower'} --val_fraction, where neither "
                     "files nor records name a split" + ", or keep these with --clean=False" * bool(counts))
    return plan, counts


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
    tokens = [bytes([b]) for b in BYTES]
    spelled, times = [[BYTES.index(b) for b in word] for word in words], list(words.values())
    counts, where = Counter(), defaultdict(set)  # of each pair: its number, and the words it stands in
    for i, ids in enumerate(spelled):
        for pair in zip(ids, ids[1:]):
            counts[pair] += times[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size - 1:
        n, pair = heapq.heappop(heap)
        if -n != counts[pair]:  # counts of old pairs only fall: this entry is out of date
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if -n < 2:
            break
        new, touched = len(tokens), set()
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for i in where.pop(pair):
            merged = []
            for token in spelled[i]:
                if merged and (merged[-1], token) == pair:
                    merged[-1] = new
                else:
                    merged.append(token)
            for old in zip(spelled[i], spelled[i][1:]):
                counts[old] -= times[i]
            for now in zip(merged, merged[1:]):
                counts[now] += times[i]
                if new in now:
                    where[now].add(i)
                    touched.add(now)
            spelled[i] = merged
        for now in touched:
            heapq.heappush(heap, (-counts[now], now))
    return {token: i for i, token in enumerate(tokens)}


def trim_bpe(ranks, used, vocab_size):
    """The most used tokens of a larger tokenizer, closed: a token stays only where both parts it is merged from do.

    used: how often each id of `ranks` occurs. Returns ranks of vocab_size - 1 tokens or fewer, in the old order, so
    that the merges that are left happen in the same order as before."""
    keep = {bytes([b]) for b in BYTES}

    def family(token):  # the token, and what it is merged from, down to tokens that stay anyway
        return set() if token in keep else {token}.union(*map(family, parts_of(token, ranks)))

    for token in sorted(ranks, key=lambda t: (-used[ranks[t]], ranks[t])):
        more = family(token)
        if len(keep) + len(more) <= vocab_size - 1:
            keep |= more
    return {token: i for i, token in enumerate(sorted(keep, key=ranks.get))}


def parts_of(token, ranks):
    """The two tokens whose merge makes `token`: merge its bytes by every rank below its own."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def make_encoding(ranks):
    return tiktoken.Encoding("stories", pat_str=WORDS.pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


# -----------------------------------------------------------------------------------------------------------------
# workers: each takes a block and the fates of its stories


def start_worker(args, ranks):
    global settings, encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that leads
    settings, encoding = args, make_encoding(ranks) if ranks else None


def run_workers(function, tasks, title, args, ranks=None):
    """Yield (task, function(*task)) in order; few tasks are under way, so memory stays flat."""
    pool, rest, under_way = ProcessPoolExecutor(initializer=start_worker, initargs=(args, ranks)), iter(tasks), deque()
    size = sum(end - start for (_, start, end), _ in tasks)
    try:
        with tqdm(total=size, unit="B", unit_scale=True, desc=title, disable=None) as bar:
            while True:
                caught = []  # amid a fork, Python loses a KeyboardInterrupt: so Ctrl-C waits
                before = signal.signal(signal.SIGINT, lambda *_: caught.append(True))
                for task in itertools.islice(rest, 2 * os.cpu_count() - len(under_way)):
                    under_way.append((task, pool.submit(function, *task)))
                signal.signal(signal.SIGINT, before)
                if caught:
                    raise KeyboardInterrupt
                if not under_way:
                    return
                task, future = under_way.popleft()
                yield task, future.result()
                bar.update(task[0][2] - task[0][1])
    finally:
        pool.shutdown(cancel_futures=True)


def kept(block, fates):
    """(split, record) of the stories of a block that stay, repaired, and with instructions where they are wanted."""
    for record, split in zip(read_block(*block), fates):
        if split in ("train", "val"):
            if settings.clean:
                record["story"] = repair(record["story"])
            yield split, instruct(record, split, settings.hold_out, settings.seed) if settings.instruct else record


def count(block, fates):
    """How often each token, or where there is no tokenizer each word, in bytes, occurs in a block's train stories."""
    found, words = Counter(), Counter()
    for split, record in kept(block, fates):
        if split == "train":
            found.update(encoding.encode_ordinary(record["story"]) if encoding else PIECES.findall(record["story"]))
    if encoding:
        return found
    for piece, n in found.items():
        for word in WORDS.findall(piece):
            words[word.encode()] += n
    return words


def encode(block, fates):
    """{split: (ids, labels, sums)} of a block's stories, each after its <|endoftext|>: ids, and for val a label for
    each, as bytes of uint16; sums is a Counter of stories, tokens, bytes, bits and labels."""
    found = {}
    for split, record in kept(block, fates):
        story, spans, tokens = record["story"], record.get("spans") or (), encoding.encode_ordinary(record["story"])
        ids, labels, sums = found.setdefault(split, (bytearray(), bytearray(), Counter()))
        ids += np.array([encoding.eot_token, *tokens], "<u2").tobytes()
        if split == "val":
            labels += bytes(2) + label_tokens(story, tokens, spans).tobytes()
        sums.update(stories=1, tokens=1 + len(tokens), bytes=len(story.encode()), labels=len(spans),
                    bits=math.nan if settings.instruct else record.get("bits", math.nan))
    return found


def label_tokens(story, tokens, spans):
    """The skill (index into SKILLS) of each token: that of the span which one of its bytes lies in, else 0."""
    labels = np.zeros(len(tokens), "<u2")
    ends = np.cumsum([len(encoding.decode_single_token_bytes(t)) for t in tokens]) if spans else ()
    for span in spans:
        if span["skill"] not in SKILLS[1:]:
            sys.exit(f"a span has the skill {span['skill']!r}: known are {', '.join(SKILLS[1:])}")
        start, end = (len(story[:span[side]].encode()) for side in ("start", "end"))
        labels[np.searchsorted(ends, start, "right"):np.searchsorted(ends, end) + 1] = SKILLS.index(span["skill"])
    return labels


# -----------------------------------------------------------------------------------------------------------------
# the stage


def find_sources(args, folder):
    """The files that --dataset and --input name; those of TinyStories are downloaded where they are missing."""
    if args.dataset == "tinystories" and not args.input:
        for name in VERSIONS[args.version]:
            if not os.path.exists(f"{folder}/{name}"):
                download(f"{args.url}/{name}", f"{folder}/{name}")
        return [(f"{folder}/{name}", split) for name, split in zip(VERSIONS[args.version], ("train", "val"))]
    if args.input and not os.path.exists(args.input):
        sys.exit(f"no file or folder {args.input}: name one with --input=FILE")
    return find_files(args.input or folder) or sys.exit(f"no .txt or .jsonl file in {args.input or folder}: " + (
        "run python world.py" if args.dataset == "world" else
        f"put stories there, name them with --input=FILE, or write some: python generate.py --name={args.dataset}"))


def make_ranks(plan, args):
    """The ranks that --tokenizer asks for, and for gpt2 the share of its tokens that stay whole."""
    if args.tokenizer not in ("bpe", "gpt2"):
        return load_ranks(args.tokenizer), None
    gpt2, used = None, Counter()
    if args.tokenizer == "gpt2":
        try:
            gpt2 = tiktoken.get_encoding("gpt2")._mergeable_ranks
        except OSError as e:  # requests' errors are OSErrors
            sys.exit(f"tiktoken cannot fetch GPT-2's tokenizer ({type(e).__name__}): go online, or --tokenizer=bpe")
    for _, found in run_workers(count, plan, "counting", args, gpt2):
        used.update(found)
    if not gpt2:
        return train_bpe(used, args.vocab_size), None
    ranks = trim_bpe(gpt2, used, args.vocab_size)
    return ranks, sum(used[gpt2[token]] for token in ranks) / max(1, used.total())


def prepare(args):
    """Read, clean, tokenize and write one dataset, as `args` (the command line's) say."""
    started, folder = time.time(), f"data/{args.dataset}"
    files = find_sources(args, folder)
    plan, counts = choose(files, args)
    ranks, coverage = make_ranks(plan, args)
    if len(ranks) + 1 > 65_535:
        sys.exit(f"a vocabulary of {len(ranks) + 1} does not fit into uint16: share another --tokenizer")

    new = f"{folder}/{UNFINISHED}"
    os.makedirs(new, exist_ok=True)
    sums = {"train": Counter(tokens=1), "val": Counter(tokens=1)}  # the last <|endoftext|>
    with open(f"{new}/train.bin", "wb") as train, open(f"{new}/val.bin", "wb") as val, \
            open(f"{new}/val.skills.bin", "wb") as skills:
        for _, found in run_workers(encode, plan, "encoding", args, ranks):
            for split, (ids, labels, more) in found.items():
                (val if split == "val" else train).write(ids)
                skills.write(labels)
                sums[split].update(more)
        for file, last in (train, len(ranks)), (val, len(ranks)), (skills, 0):
            file.write(last.to_bytes(2, "little"))
    with open(f"{new}/tokenizer.tiktoken", "wb") as f:
        f.writelines(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    meta = {"dataset": args.dataset, "vocab_size": len(ranks) + 1, "eot": len(ranks)}
    for split in sums:
        meta[split] = {name: sums[split][name] for name in ("stories", "tokens", "bytes")}
        meta[split]["sha256"] = file_hash(f"{new}/{split}.bin")
        if sums[split]["bits"] > 0:  # known for every story
            meta[split]["bits_per_byte"] = sums[split]["bits"] / sums[split]["bytes"]
    meta["tokenizer"] = {"kind": args.tokenizer, "coverage": coverage,
                         "sha256": file_hash(f"{new}/tokenizer.tiktoken")}
    meta["source"] = [{"file": path, "split": split, "bytes": os.path.getsize(path)} for path, split in files]
    meta["cleaning"] = counts
    meta["instruct"] = args.instruct and {"hold_out": args.hold_out}
    with open(f"{new}/meta.json", "w") as f:
        json.dump(meta, f, indent=1)
    for name in ("train.bin", "val.bin", "val.skills.bin", "tokenizer.tiktoken", "meta.json"):
        os.replace(f"{new}/{name}", f"{folder}/{name}")  # meta.json last: until it stands, readers see what is missing
    if not sums["val"]["labels"]:
        os.remove(f"{folder}/val.skills.bin")

    for what, n in sorted(counts.items()):
        print(f"  {n:9,} {what}")
    for split in sums:
        print("{:5} {stories:9,} stories {tokens:13,} tokens {bytes:13,} bytes, {:.2f} a token".format(
            split, meta[split]["bytes"] / meta[split]["tokens"], **meta[split]))
    print(f"vocabulary {meta['vocab_size']:,}" + (f", {coverage:.2%} of GPT-2's tokens kept whole" if coverage else "")
          + f"; {folder} is ready after {time.time() - started:.0f} s: python train.py --dataset={args.dataset}")


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# -----------------------------------------------------------------------------------------------------------------
# what other stages load


def load_ranks(folder):
    """Ranks {bytes: id} of the tokenizer in `folder`, or in data/`folder`."""
    for path in (f"{folder}/tokenizer.tiktoken", f"data/{folder}/tokenizer.tiktoken"):
        if os.path.exists(path):
            with open(path, "rb") as f:
                return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, f)}
    sys.exit(f"no tokenizer.tiktoken in {folder}: run python prepare.py --dataset={os.path.basename(folder)}")


def load_tokenizer(dataset):
    """The tiktoken.Encoding of a dataset; its <|endoftext|> is `eot_token`."""
    return make_encoding(load_ranks(f"data/{dataset}"))


def load_meta(dataset):
    """meta.json of a dataset, checked against the tokenizer beside it."""
    tokenizer, again = f"data/{dataset}/tokenizer.tiktoken", f"run python prepare.py --dataset={dataset}"
    try:
        with open(f"data/{dataset}/meta.json") as f:
            meta = json.load(f)
    except FileNotFoundError:
        sys.exit(f"no dataset in data/{dataset}: {again}")
    except ValueError:
        sys.exit(f"data/{dataset}/meta.json is not JSON: {again}")
    if not os.path.exists(tokenizer) or file_hash(tokenizer) != meta["tokenizer"]["sha256"]:
        sys.exit(f"{tokenizer} is not the one that meta.json names: {again}")
    return meta


def load_tokens(dataset, name):
    """The tokens of `name`.bin ("train", "val"; "val.skills" for labels) as a memory-mapped array of uint16."""
    meta, path = load_meta(dataset), f"data/{dataset}/{name}.bin"
    expected, again = meta[name.split(".")[0]]["tokens"], f"run python prepare.py --dataset={dataset}"
    if not os.path.exists(path):
        sys.exit(f"no {path}: {again}")
    if os.path.getsize(path) != 2 * expected:
        sys.exit(f"{path} has {os.path.getsize(path):,} bytes, meta.json says {2 * expected:,}: "
                 f"prepare was interrupted? {again}")
    return np.memmap(path, "<u2", mode="r")


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.option("dataset", "world", "folder under data/ to write to; its .txt and .jsonl files are read")
    parser.option("input", "", "a file or folder to read instead: JSON lines with `story`, or text split by " + EOT)
    parser.option("version", 2, "of TinyStories to download: 2, by GPT-4 alone, or 1, the paper's", choices=(1, 2))
    parser.option("url", URL, "where TinyStories is downloaded from")
    parser.option("tokenizer", "bpe", "bpe, gpt2 (its most used tokens), or the folder of a dataset to share one with")
    parser.option("vocab_size", None, "4096 for bpe, 10000 for gpt2, <|endoftext|> included", type=int)
    parser.option("val_fraction", 0.01, "share held out where neither file names nor records name a split")
    parser.option("max_stories", None, "keep only so many train stories (default: all)", type=int)
    parser.option("clean", True, "repair and remove broken and repeated stories")
    parser.option("instruct", False, "put features, words, summary and a sentence before each story, where known")
    parser.option("hold_out", "", "instructions never together in train, e.g. words+summary")
    parser.option("seed", 1, "of the instructions drawn")
    args = parser.parse_args(argv)
    if args.vocab_size and args.tokenizer not in ("bpe", "gpt2"):
        sys.exit(f"--tokenizer={args.tokenizer} has a size of its own: leave --vocab_size out")
    if args.vocab_size is None:
        args.vocab_size = 10_000 if args.tokenizer == "gpt2" else 4096
    if args.max_stories is not None and args.max_stories < 1:
        sys.exit(f"--max_stories={args.max_stories} keeps none: give 1 or more")
    if not 257 <= args.vocab_size <= 65_535:
        sys.exit(f"--vocab_size={args.vocab_size} must lie between 257 (single bytes) and 65535 (what uint16 holds)")
    args.hold_out = [field for field in args.hold_out.split("+") if field]
    if not set(args.hold_out) <= set(INSTRUCTIONS):
        sys.exit(f"--hold_out={'+'.join(args.hold_out)} names other fields than {'+'.join(INSTRUCTIONS)}")
    if args.hold_out and not args.instruct:
        sys.exit("--hold_out is of instructions: add --instruct")
    try:
        prepare(args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted: data/{args.dataset} is as it was before, but for what was downloaded, "
                                "which stays; the same command goes on") from None
    finally:
        shutil.rmtree(f"data/{args.dataset}/{UNFINISHED}", ignore_errors=True)


if __name__ == "__main__":
    start(main)

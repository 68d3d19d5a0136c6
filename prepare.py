"""Turn stories into token bins: fetch, clean, make a tokenizer, encode.

    python prepare.py --dataset=tinystories                 download TinyStories (2.2 GB) and prepare it
    python prepare.py --dataset=tinystories --version=all --instruct      the published stories with their instructions
    python prepare.py --dataset=mine --input=stories.txt    prepare a file or a folder: text, JSON, CSV, parquet, also
                                                            gzipped

Writes train.bin, val.bin, tokenizer.tiktoken and meta.json to data/<dataset>. The bins are flat little-endian uint16,
with <|endoftext|> before every story and after the last. Other stages read them with the load_ functions at the end.

The text may be larger than the memory, so it is read three times, in chunks that all CPUs share: to decide which
stories stay, to count words for the tokenizer, and to encode. Only text and JSON lines can be cut into chunks, so
lab/convert.py makes JSON lines of everything else first.
"""
# first, so that an old Python, or Ctrl-C while the rest is imported, ends in one line
from common import CommandLine, check_writable, file_hash, ignore_ctrl_c, rename, run_main, usable_cpus

import base64
import codecs
import contextlib
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
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from http.client import HTTPException
from itertools import chain, pairwise

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

EOT = "<|endoftext|>"
SKILLS = ("none", "grammar", "fact", "context", "reasoning")  # the labels in val.skills.bin
INSTRUCTIONS = {"features": "Features", "words": "Words", "summary": "Summary", "sentence": "Random sentence"}
URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
# Version 1 is the paper's, by GPT-3.5 and GPT-4 (Eldan and Li 2023, arXiv 2305.07759). Version 2 is by GPT-4 alone.
VERSIONS = {1: ("TinyStories-train.txt", "TinyStories-valid.txt"),
            2: ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt")}
ARCHIVE = "TinyStories_all_data.tar.gz"  # --version=all: the stories of both with their words, features and summaries
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "development": "val", "eval": "val", "test": "test", "testing": "test"}
FORMATS = {"txt": "text", "jsonl": "lines", "ndjson": "lines", "json": "json", "csv": "csv", "tsv": "csv",
           "parquet": "parquet"}
NO_STORIES = ("meta.json", "generate.json", "rejected.jsonl")  # what stages write beside stories
UNFINISHED = "unfinished"  # the folder, inside the dataset's, in which new files are made
CHUNK_BYTES = 1 << 21  # a worker reads about this much of a file at a time
GZIP = b"\x1f\x8b"  # how gzipped files begin
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, or in place of a byte that is not UTF-8
NOT_UTF8 = "is not UTF-8: save the file as UTF-8"

# -----------------------------------------------------------------------------------------------------------------
# fetch


def find_sources(args, folder):
    """[(path, split)] of the files to read. The files of TinyStories are downloaded if they are missing.

    The split is what the file's name says, see split_of(), or "published" for the published validation files beside
    the archive: their stories are kept out of train. Files that are called test are left out."""
    paths = source_paths(args, folder)
    refuse_two_versions(paths, folder, args.version or 1)
    for path in paths:
        if not os.path.exists(path):
            download(f"{args.url}/{os.path.basename(path)}", path, GZIP if path.endswith(ARCHIVE) else EOT.encode())
    published = []
    if any(path.endswith(ARCHIVE) for path in paths):
        published = [os.path.join(os.path.dirname(paths[0]), names[-1]) for names in VERSIONS.values()]
    files = [(path, "published") for path in published if os.path.exists(path)]
    files += [(path, split_of(path)) for path in paths if path not in published]
    if all(split == "test" for _, split in files):
        sys.exit(f"{paths[0]} is called test, and nothing is trained on that: rename it, or name another file with "
                 "--input")
    for path, split in files:
        if split == "test":
            print(f"{path} is left out: what is called test is not trained on", file=sys.stderr)
        elif split == "val" and "val" not in os.path.basename(path):
            print(f"{path} is used for validation, because of its name", file=sys.stderr)
    return [(path, split) for path, split in files if split != "test"]


def source_paths(args, folder):
    """The paths that the options name: one file or pipe, or a folder's stories.jsonl, else all its files of stories."""
    source = "/dev/stdin" if args.input == "-" else args.input or folder
    if args.version:
        names = (ARCHIVE,) if args.version == "all" else VERSIONS[args.version]
    elif os.path.isdir(source):
        names = sorted(name for name in os.listdir(source) if file_format(name))
        if "stories.jsonl" in names:  # by generate.py, which puts rejected answers into another .jsonl
            names = ["stories.jsonl"]
        problem = "has no .txt or .jsonl file, nor .json, .csv or .parquet"
    else:
        names = [""] if os.path.exists(source) else []
        problem = "does not exist"
    if not names:
        sys.exit(f"{source} {problem}: name a file or folder with --input, or make stories with python -m lab.world")
    return [os.path.join(source, name) if name else source for name in names]


def file_format(name):
    """The format of a file by its name, which may end in .gz: a value of FORMATS, or None if it holds no stories."""
    if name == ARCHIVE:
        return "tar"
    hidden = name.startswith(".") or name in NO_STORIES
    return None if hidden else FORMATS.get(name.lower().removesuffix(".gz").split(".")[-1])


def split_of(path):
    """"test", "val" or "train" if a word of a file's name says so (validation-00000-of-00002.parquet), else None."""
    splits = [SPLITS.get(word) for word in re.findall(r"[^\W\d_]+", os.path.basename(path).lower())]
    return next((split for split in ("test", "val", "train") if split in splits), None)


def refuse_two_versions(paths, folder, version):
    """End the program if two versions of TinyStories would meet in one dataset: in the files to read, in the texts in
    its folder, or in the texts that its current bins were made from. The message shows how to prepare `version`."""
    names = " ".join([*paths, *glob.glob("*.txt*", root_dir=folder), *glob.glob("*.tar.gz", root_dir=folder)])
    if os.path.exists(f"{folder}/meta.json"):
        with open(f"{folder}/meta.json") as file:
            names += file.read()
    archive = ARCHIVE in names  # a published validation file may lie beside it
    versions = [number for number, (train, valid) in VERSIONS.items()
                if train in names or valid in names and not archive]
    versions += ["all"] if archive else []
    if len(versions) > 1:
        mixed = " and ".join(map(str, versions))
        name = "tinystories-all" if version == "all" else f"tinystories-v{version}"
        sys.exit(f"{folder} would mix versions {mixed} of TinyStories: prepare each as a dataset of its own, with "
                 f"python prepare.py --dataset={name} --version={version}")


def download(url, path, mark=b"", retries=5, wait=1.0):
    """Fetch `url` to `path`. What has arrived stays in path + ".part", and a later attempt continues from there.

    Gives up after retries + 1 attempts in a row without a new byte, or at once if the server refuses. A file without
    `mark` in its beginning is a page that a server sent instead, and is removed."""
    part, failures = path + ".part", 0
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(part, "ab").close()
    largest = os.path.getsize(part)
    while True:
        try:
            fetch_rest(url, part)
            break
        except (OSError, ValueError, HTTPException) as error:  # HTTPError is an OSError
            size, status = os.path.getsize(part), getattr(error, "code", None)
            failures = 0 if size > largest else failures + 1
            if failures > retries or status in (400, 401, 403, 404, 410):
                sys.exit(f"cannot download {url}: {error}. Run this again to continue after {size:,} bytes, check "
                         "--url, name a file that you have with --input=FILE, or make stories with python -m lab.world")
        if status == 416:  # the server has no byte after ours: ours are another file's, or all of this one
            os.truncate(part, 0)
        largest = max(size, largest)
        time.sleep(wait * (2**failures - 1))  # 0 s after progress, then 1, 3, 7, 15 and 31 s
    beginning = first_bytes(part)
    if mark not in beginning:
        os.remove(part)
        sys.exit(f"{url} is not a file of stories, it begins with {beginning[:60]}: check --url, or name a file that "
                 "you have with --input=FILE")
    os.replace(part, path)


def first_bytes(path):
    with open(path, "rb") as file:
        return file.read(100_000)


def fetch_rest(url, part):
    """Append the rest of `url` to the file `part`. Raises OSError if the connection ends before that."""
    start = os.path.getsize(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"})
    with urllib.request.urlopen(request, timeout=30) as response, open(part, "ab") as file:
        if response.status != 206:  # the server ignores ranges and sends the file from its start
            start = 0
            file.truncate(0)
        total = start + int(response.headers.get("Content-Length", 0))  # 0 if the server does not report the length
        with tqdm.wrapattr(response, "read", total=total or None, initial=start, desc=part, disable=None) as body:
            shutil.copyfileobj(body, file)
    if os.path.getsize(part) < total:
        raise OSError(f"{os.path.getsize(part):,} of {total:,} bytes arrived")


# -----------------------------------------------------------------------------------------------------------------
# read: files are cut into chunks, which workers process independently of each other


def detect_format(name, head, field):
    """The format of a file by its first bytes and its name, a value of FORMATS, "gzip" or "tar". A table without a name
    is known by its column `field`."""
    for magic, start, kind in (GZIP, 0, "gzip"), (b"PAR1", 0, "parquet"), (b"ustar", 257, "tar"):
        if head.startswith(magic, start):
            return kind
    if head.startswith((b"PK\3\4", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")):  # zip, bzip2, xz, zstd
        sys.exit(f"{name} is packed, and not by gzip: unpack it first")
    beginning = head.decode(detect_encoding(head), "ignore").lstrip()
    if beginning[:14].lower().startswith(("<!doctype html", "<html", "<?xml")):
        sys.exit(f"{name} is a page of HTML and no file of stories: delete it, and get the file itself")
    kind = file_format(os.path.basename(name))
    if beginning.startswith("[") and kind == "lines" or beginning.startswith(("[", "{")) and not kind:
        return "json"
    columns = re.split("[,;\t]", beginning.partition("\n")[0].replace('"', "").strip())
    if not kind and field in columns and len(columns) > 1:
        return "csv"
    return kind or "text"


def detect_encoding(head):
    """The encoding that a file's byte-order mark tells, else UTF-8. Python's codecs remove the mark."""
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
             codecs.BOM_UTF16_BE: "utf-16"}
    return next((name for mark, name in marks.items() if head.startswith(mark)), "utf-8-sig")


def is_plain(path, split_at, field):
    """Whether a file is plain, so that chunks can be cut from it: JSON lines or text split at EOT, in UTF-8."""
    if not os.path.isfile(path) or path.startswith("/dev/"):  # a pipe can be read only once
        return False
    head = first_bytes(path)
    kind = detect_format(path, head, field)
    return detect_encoding(head) == "utf-8-sig" and (kind == "lines" or kind == "text" and split_at == "eot")


def make_plain(path, args, new_path):
    """The path of a plain file with the stories of `path`: itself, or `new_path`, to which JSON lines are written."""
    if is_plain(path, args.split, args.field):
        return path
    from lab.convert import convert  # only here: most files need no conversion
    os.makedirs(os.path.dirname(new_path), exist_ok=True)
    with open(new_path, "w", encoding="ascii") as file:
        for line in tqdm(convert(path, args.split, args.field), f"reading {path}", unit=" stories", disable=None):
            print(line, file=file)
    return new_path


def has_lines(path):
    """Whether each line of a plain file is a story, in JSON."""
    return path.lower().endswith((".jsonl", ".ndjson"))


def split_file(path):
    """Yield the chunks (path, start, end) of a plain file, in bytes. Each ends where a story ends."""
    separator = b"\n" if has_lines(path) else EOT.encode()
    start, size = 0, os.path.getsize(path)
    if size == 0:  # mmap does not take an empty file
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        while start < size:
            position = content.find(separator, start + CHUNK_BYTES)
            end = size if position < 0 else position + len(separator)  # -1: not found
            yield path, start, end
            start = end


def read_chunk(path, start, end, field="story"):
    """The records of a chunk, {"story": text, …} each, from JSON lines or from text split at EOT.

    A broken one is {"story": None, "why": what is wrong with it, "line": its line in the chunk, "text": all of it}."""
    with open(path, "rb") as file:
        file.seek(start)
        content = file.read(end - start)
    text = content.decode(errors="surrogateescape")  # which turns bytes that are not UTF-8 into surrogates
    text = re.sub(r"(?m)^\ufeff", "", text)  # byte-order marks, also inside a file that was joined from several
    if has_lines(path):
        return [parse_line(line, number, field) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    stories = text.replace("\r\n", "\n").split(EOT)
    if not stories[-1].strip():  # after the last separator
        stories.pop()
    records, line = [], 1
    for story in stories:
        try:
            story.encode()
            records.append({"story": story.strip()})
        except UnicodeEncodeError as error:
            number = line + story.count("\n", 0, error.start)
            records.append({"story": None, "why": NOT_UTF8, "line": number, "text": story})
        line += story.count("\n")
    return records


def parse_line(line, number, field="story"):
    """The record in a line of JSON, with its text under "story", or what read_chunk() says of a broken one."""
    record = None
    try:
        record = json.loads(line)
        record["story"] = record[field]
        record["story"].encode()
        if isinstance(record.get("spans") or [], list):
            return record
        why = 'has "spans" that are not a list'
    except UnicodeEncodeError:
        half = re.search("[\ud800-\udbff]", record["story"])  # the other half can also stand for a byte
        why = "has half a surrogate pair: correct or delete it" if half else NOT_UTF8
    except (json.JSONDecodeError, RecursionError):
        why = NOT_UTF8 if SURROGATE.search(line) else f'is not a JSON object with a "{field}": correct or delete it'
    except (TypeError, KeyError, AttributeError, ValueError):
        why = f'has no text in "{field}"'
        if isinstance(record, dict) and field not in record:
            why += f": it has {', '.join(record)}; name one with --field=NAME"
    return {"story": None, "why": why, "line": number, "text": line}


def read_records(path, field="story"):
    """Yield each story of a file of any format as a record, with a progress bar."""
    if is_plain(path, "eot", field):
        chunks = tqdm(list(split_file(path)), path, unit="chunk", leave=False, disable=None)
        records = chain.from_iterable(read_chunk(*chunk, field) for chunk in chunks)
    else:
        from lab.convert import convert
        records = (parse_line(line, number, field) for number, line in enumerate(convert(path, "eot", field), 1))
    return (record for record in records if record["story"] is not None)


def run_workers(function, tasks, title, workers=None):
    """Yield (task, function(*task)) for each task, in order, with a progress bar. `workers` processes share the work,
    by default one for each CPU that may be used."""
    workers = workers or min(61, usable_cpus())  # Windows allows 61
    # A terminal sends Ctrl-C to the workers too. They ignore it, and this process stops them.
    pool = ProcessPoolExecutor(workers, initializer=ignore_ctrl_c)
    # Python can lose a KeyboardInterrupt while it forks. So until the workers run, Ctrl-C is only recorded, and raised
    # after that.
    interrupts = []
    handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        results = pool.map(function, *zip(*tasks))
        signal.signal(signal.SIGINT, handler)
        if interrupts:
            raise KeyboardInterrupt
        yield from tqdm(zip(tasks, results), title, len(tasks), unit="chunk", disable=None)
    except BrokenProcessPool:
        sys.exit(f"a worker process was killed, probably since memory ran out: try --workers={max(1, workers // 2)}")
    finally:
        pool.shutdown(cancel_futures=True)  # also if the caller stops early, or a worker fails


# -----------------------------------------------------------------------------------------------------------------
# clean

# Mojibake: UTF-8 that was read as cp1252, so that each character became two to four: "don’t" is now "donâ€™t". What
# each byte from 80 to FF becomes; control characters stand for the five that cp1252 lacks, and in Latin-1 for more.
CP1252 = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in range(0x80, 0x100))
TO_LATIN1 = str.maketrans(CP1252, "".join(map(chr, range(0x80, 0x100))))
TAIL = f"[{CP1252[:64]}\x80-\x9f]"  # any byte of a character but its first, which tells how many there are
MISREAD = re.compile(f"[Â-ß]{TAIL}|[à-ï]{TAIL}{TAIL}|ð[Ÿ\x9f]{TAIL}{TAIL}|â€(?!{TAIL}|Â)\ufffd?")
# Right text has such sequences too, as in „So ein Spaß“: letters, and what often follows letters. So a sequence is only
# undone in a context in which no right text has it.
AFTER = "\xa0«»“”„‘’‚‹›…–—•™®¹²³°ºªŠšŒœŽž"  # what often follows a letter
CAPITALS = "[A-ZÀ-ÖØ-Þ][A-ZÀ-ÖØ-Þ]"
OTHER = "È[˜™š›\x98-\x9b]|É[™\x99]"  # ș, ț and ə
ANY, ODD = f"[Æ-ß]{TAIL}", f"[Æ-ß](?![{AFTER}]){TAIL}"
CERTAIN = re.compile("|".join((
    f"(?<=[a-zß-öø-ÿ])(?:[ÂÃÄÅ]{TAIL}|{OTHER})",  # after a small letter: cafÃ©
    f"[ÂÃ](?![{AFTER}]){TAIL}",  # a sign that does not follow letters: Ã©tÃ©, Â¿
    f"(?<!{CAPITALS})[ÂÃ][¹²³°ºªŠšŒœŽž]",  # a footnote can follow a word in capitals, but not here: Ãœber
    "[ÂÃÄÅ][«»“”„‘‚‹›•™®ŠšŒœŽž](?=[^\\W\\d_])",  # a quote inside a word: CÃ”TE, Å“uf
    f"(?<!{CAPITALS})(?:[ÄÅ](?![{AFTER}]){TAIL}|Ã–|{OTHER})(?=[a-z])",  # a small letter follows: Ã–l
    f"(?<!{CAPITALS})Ã\xa0(?=[ ,.]|-[a-z])",  # a no-break space and a space: il va Ã  Paris
    "(?<=[^A-ZÀ-ÖØ-Þ\\s«»‹›“”„‘’\"'(])Â[\xa0«»]|(?<!\\S)Â«",  # a lone Â is hardly a word: 10Â km
    f"{ODD}(?={ANY})|{ANY}(?={ODD})|(?<={ANY}){ODD}|(?<={ODD}){ANY}",  # two of other scripts: Ð´Ð°
    f"[à-ï](?![{AFTER}¡¿]{{2}}){TAIL}{TAIL}|ð|â€(?!{TAIL})")))  # æ—¥, â€™, an emoji
QUOTES = str.maketrans("“”„«»‘’`", "\"\"\"\"\"'''")


def clean_story(record):
    """The story of a record, repaired and without white space around it. If spans point into it, it stays as it is."""
    return record["story"] if record.get("spans") else repair(record).strip()


def repair(record):
    """The story of a record, with mojibake undone where that is beyond doubt, also if it happened twice. If spans point
    into the story, it stays as it is."""
    story, before = record["story"], None
    if record.get("spans"):
        return story
    while story != before and not story.isascii():
        story, before = undo_misreading(story), story
    return story.removeprefix("\ufeff")  # a byte-order mark that was misread too


def undo_misreading(story):
    """A story with each misread sequence undone that cannot be right text.

    If the story, or a line of it, has such sequences, and no character beyond ASCII outside sequences, it was misread
    as a whole. Then those that could be right text are undone too."""
    sequences = [match for match in MISREAD.finditer(story) if decode_misread(match[0])]
    certain = {match.start() for match in sequences if CERTAIN.match(story, match.start())
               and not "\x80" <= decode_misread(match[0]) < "\xa0"}  # control characters are no improvement
    if not certain:
        return story
    for part in (*re.finditer("(?s).+", story), *re.finditer(".+", story)):
        inside = [match for match in sequences if part.start() <= match.start() < part.end()]
        share = sum(match.start() in certain for match in inside) / max(1, len(inside))
        if share and sum(len(match[0]) for match in inside) == len(re.findall(r"[^\x00-\x7f]", part[0])):
            # Ç to Ë would become letters that no stories have; and without a majority, only Latin letters are certain
            leads = "[^Ç-Ë]" if share > 0.5 else "[Â-Æ]"
            certain.update(match.start() for match in inside if re.match(leads, match[0]))
    return MISREAD.sub(lambda match: decode_misread(match[0]) if match.start() in certain else match[0], story)


def decode_misread(sequence):
    """The character that a sequence was misread from, or "" if there is none."""
    if sequence.rstrip("\ufffd") == "â€":  # the third byte is lost; of those that cp1252 lacks, only ” is common
        return "”"
    try:
        return sequence.translate(TO_LATIN1).encode("latin-1").decode()
    except UnicodeDecodeError:
        return ""


# What a finished story ends in, perhaps in bold type: punctuation of any script, a closing quote or bracket, an emoji,
# or The End. Thai and Lao have no final punctuation.
ENDING = regex.compile(r"""(?ix)
    (?: [\p{Sentence_Terminal}…།"'\p{Pe}\p{Pf}\p{Extended_Pictographic}\p{So}\p{Thai}\p{Lao}]
      | (?<!\s)\p{Pi} | (?<=\p{Greek}); | (?<!\w)the\ end
      | (?<=[\p{Sentence_Terminal}…"'\p{Pe}\p{Pf}\n][\s*_~—–-]*)(?:fin|fine|ende|fim|конец|完|終|终|समाप्त) )
    [\s*_~=—–\-\#\p{M}\p{Sk}\p{Cf}]* \Z""")


def ends_well(story):
    """Whether a story is finished, and not cut off."""
    ending = story.rstrip()[-60:]
    return ending.endswith((".", "!", "?", '"', "”")) or bool(ENDING.search(ending))  # the former is fast


# In these scripts no spaces stand between words: there, each character counts as a word.
SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
LETTERS = regex.compile(rf"(?V1)[{SPACELESS}]\p{{M}}*|[\w--[\d_{SPACELESS}]]+")  # a word without digits


def split_words(text):
    """The words of a text, with their punctuation: what stands between spaces, or single characters without any."""
    return regex.findall(rf"[{SPACELESS}]\p{{M}}*|[^\s{SPACELESS}]+", text)


def word_end(text, position):
    """The first position from `position` on at which a word may end, or `position` itself if there is none."""
    match = regex.compile(rf"(?= )|(?<=[{SPACELESS}])(?!\p{{M}})").search(text, position)
    return match.start() if match else position


def fingerprint(story):
    """64 bits of a story's text, the same for copies that differ only in case, quotes and white space.

    Among 3 million stories, the chance that any two different ones share a fingerprint is one in 4 million."""
    normal = " ".join(story.translate(QUOTES).lower().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little")


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
    decided = run_workers(partial(decide, args=args), tasks, "reading", args.workers)
    for (chunk, file_split), (proposals, chunk_broken, chunk_fields) in decided:
        decisions = []
        for key, decision, repaired in proposals:
            decision = settle(key, decision, seen, stories, args)
            if decision not in (*stories, "published", "over --max_stories"):  # the last is no fault of the story's
                cleaning[f"{decision}: removed"] += 1
            if repaired and decision not in ("published", "over --max_stories"):
                cleaning["UTF-8 read as cp1252: repaired"] += 1
            decisions.append(decision)
        plan.append((chunk, decisions))
        broken = (broken + [(chunk, record) for record in chunk_broken])[:3]
        fields.update(chunk_fields)
        if file_split == "train" and stories["train"] == args.max_stories:
            break  # only train files are left
    names = {plain: path for plain, _, path in files}
    examples = [describe_broken(names[chunk[0]], chunk, record) for chunk, record in broken]
    refuse_empty_split(stories, files, cleaning, examples)
    for example in examples:
        print(f"left out: {example}", file=sys.stderr)
    missing = [name for name in ("features", "words", "summary") if args.instruct and not fields[name]]
    if missing:
        print(f"--instruct: no story has {' or '.join(missing)}", file=sys.stderr)
    return plan, cleaning


def settle(key, decision, seen, stories, args):
    """The final decision on a story. What the worker decided stays, unless the story is a copy, or one more than
    --max_stories. `seen` and `stories`, which has the keys train and val, are brought up to date."""
    if decision == "published":
        seen[key] = decision
    if decision not in stories:
        return decision
    if decision == "train" and seen.get(key) == "published":
        return "in the published validation file"
    if args.clean and seen.get(key) in stories:
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


def refuse_empty_split(stories, files, cleaning, examples):
    """End the program if there is no story for train or for val, or if most are broken, and say what would help."""
    total, paths = sum(stories.values()), ", ".join(path for _, _, path in files)
    removed = "".join(f"; {count:,} {what}" for what, count in cleaning.items())
    broken = cleaning["broken: removed"]
    others = total + sum(count for what, count in cleaning.items() if what.endswith("removed")) - broken
    if broken > others or broken and not total:
        sys.exit(f"{broken:,} of {broken + others:,} stories are broken; {examples[0]}")
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
        if decision in ("train", "val"):
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
    spans = []
    for span in record.get("spans") or ():
        check_span(span)
        spans.append({**span, "start": span["start"] + len(text), "end": span["end"] + len(text)})
    return {**record, "story": text + record["story"], "spans": spans}


def details(record):
    """{"features": [text], "words": [text], "summary": text} of a record, empty where it has none.

    The published records have the first two in "instruction". Names may be written in any case."""
    fields = {str(name).strip(": ").lower(): value for name, value in record.items() if value}
    inner = fields.pop("instruction", None)
    if isinstance(inner, dict):
        fields = {**{str(name).strip(": ").lower(): value for name, value in inner.items()}, **fields}
    # in the published records, BadEnding and Twist are what generate.py calls "bad ending" and "plot twist"
    features = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", feature).lower() for feature in as_list(fields.get("features"))]
    summary = fields.get("summary")
    return {"features": ["plot twist" if feature == "twist" else feature for feature in features],
            "words": as_list(fields.get("words")),
            "summary": " ".join(clean_text(summary).split()) if isinstance(summary, str) else ""}


def as_list(value):
    """Words, or features, as a list of texts, from a list or from text such as "jump, dog"."""
    if isinstance(value, str):
        value = re.split("[,;]", value.strip("[]"))
    return [clean_text(str(item)).strip(" '\"") for item in value or () if item] if isinstance(value, list) else []


def clean_text(text):
    return SURROGATE.sub("", text)  # half a surrogate pair cannot be encoded


def instruction(fields):
    """The text before a story, from {"features", "words", "summary", "sentence": text} in the order given."""
    return "".join(f"{INSTRUCTIONS[name]}: {value}\n" for name, value in fields.items()) + "Story:\n"


# -----------------------------------------------------------------------------------------------------------------
# make a tokenizer: byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909), as ranks {token's bytes: id} for tiktoken

# GPT-2 splits text into words, and merges bytes only inside them (Radford et al. 2019). The pattern is tiktoken's.
WORDS = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")
# Text between spaces. A word never crosses such a border, so each different piece is split into words only once.
PIECES = re.compile(r" ?\S+|\s+(?!\S)|\s")
# The single bytes in GPT-2's order: the printable ones first.
BYTES = sorted(range(256), key=lambda b: (not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b), b))


def train_bpe(words, vocab_size):
    """Learn ranks from {word's bytes: how often it occurs}.

    Every word starts as a list of single bytes. In each step the most frequent pair of neighboring tokens becomes a new
    token; among equally frequent pairs, the one with the smallest ids. Only the words that contain the pair are counted
    again. Training ends at vocab_size - 1 tokens, as <|endoftext|> takes the last id, or when no pair occurs twice."""
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
    # The most frequent pair comes out first. A sorted list is a heap. Only pairs with the newest token are pushed
    # later: a merge lowers the counts of all other pairs, or leaves them as they are.
    heap = sorted((-count, pair) for pair, count in counts.items())
    while heap and len(tokens) < vocab_size - 1:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:  # out of date: merging other pairs has lowered the count
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if -count < 2:  # and no other pair occurs more often
            break
        new, new_pairs = len(tokens), set()
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for i in holders.pop(pair):  # a word that lost the pair to another merge is still here, and stays as it is
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
    """The two tokens that are merged into `token`: merge its bytes, lowest rank first, until two parts are left.

    A file of ranks does not store these merges, but it implies them: b"the" may come from b"t" and b"he"."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = pair_ranks.index(min(pair_ranks))  # of equal ranks, the leftmost
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def make_encoding(ranks):
    """The tiktoken.Encoding of ranks. <|endoftext|> gets the next free id."""
    return tiktoken.Encoding("stories", pat_str=WORDS.pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


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
        for word in WORDS.findall(piece):
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


def check_span(span):
    if not isinstance(span, dict) or not {"start", "end", "skill", "wrong"} <= set(span):
        sys.exit(f"a span has start, end, skill and wrong, unlike {span!r}: correct or delete it")


def label_tokens(story, ids, spans, encoding):
    """The skill (index into SKILLS) of each of `ids`, <|endoftext|> and the tokens of a story: that of the span that a
    token overlaps, else 0."""
    labels = np.zeros(len(ids), "<u2")
    # Tokens count bytes and spans count characters, so both are turned into bytes. <|endoftext|> has a length of 0.
    ends = np.cumsum([0] + [len(encoding.decode_single_token_bytes(token)) for token in ids[1:]])  # in bytes
    starts = np.append(0, ends[:-1])
    for span in spans:
        check_span(span)
        if span["skill"] not in SKILLS[1:]:
            sys.exit(f"a span has the skill {span['skill']!r}: known are {', '.join(SKILLS[1:])}")
        start = len(story[:span["start"]].encode())
        end = len(story[:span["end"]].encode())
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
    meta["field"] = args.field
    meta["cleaning"] = cleaning
    meta["instruct"] = {"hold_out": args.hold_out} if args.instruct else False
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

    if not re.fullmatch(r"[^/\\]+", args.dataset):
        sys.exit(f"--dataset={args.dataset} must name a folder under data/: name files elsewhere with --input")
    if args.input and args.dataset == "world":
        sys.exit("--input needs a name for its stories: add --dataset=NAME (world is the built-in world's)")
    if args.version and args.input:
        sys.exit("--version downloads TinyStories and --input reads other files: leave one of them out")
    if args.dataset == "tinystories" and not args.input and not args.version:
        args.version = 2
    if args.vocab_size and args.tokenizer not in ("bpe", "gpt2"):
        sys.exit(f"--tokenizer={args.tokenizer} has a size of its own: leave --vocab_size out")
    if args.vocab_size is None:
        args.vocab_size = 10_000 if args.tokenizer == "gpt2" else 4096  # 10,000 as in the paper
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

"""Stories in files: finding and reading them, in every format that users bring.

A story is a record, {"story": text, …}, where known with its words, features, summary, spans and split. Text may be
larger than the memory: plain files, JSON lines or text, are cut into chunks, which workers read independently of each
other. All other files are read as a stream.
"""
import csv
import glob
import gzip
import io
import json
import mmap
import os
import re
import sys
import tarfile
import zlib
from itertools import chain, islice

from tqdm import tqdm

from common.files import download, first_bytes

EOT = "<|endoftext|>"
URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
# Version 1 is the paper's, by GPT-3.5 and GPT-4 (Eldan and Li 2023, arXiv 2305.07759). Version 2 is by GPT-4 alone.
VERSIONS = {1: ("TinyStories-train.txt", "TinyStories-valid.txt"),
            2: ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt")}
ARCHIVE = "TinyStories_all_data.tar.gz"  # --version=all: the stories of both with their words, features and summaries
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "development": "val", "eval": "val", "evaluation": "val", "test": "test", "testing": "test",
          "holdout": "test", "heldout": "test", "held": "test", "unseen": "test"}
FORMATS = {"txt": "text", "jsonl": "lines", "ndjson": "lines", "json": "json", "csv": "csv", "tsv": "csv",
           "parquet": "parquet"}
NO_STORIES = ("meta.json", "generate.json", "rejected.jsonl")  # what stages write beside stories
CHUNK_BYTES = 1 << 21  # a worker reads about this much of a file at a time
GZIP = b"\x1f\x8b"  # how gzipped files begin
SPAN = {"start", "end", "skill", "wrong"}  # what a span has
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, or in place of a byte that is not UTF-8
NOT_UTF8 = "is not UTF-8: save the file as UTF-8"
BLOCK = 1 << 20  # characters of JSON that are read at a time
LARGEST = 1 << 24  # characters of a JSON value; a longer one is broken
csv.field_size_limit(1 << 30)

# -----------------------------------------------------------------------------------------------------------------
# find


def find_sources(args, folder):
    """[(path, split)] of the files to read. The files of TinyStories are downloaded if they are missing.

    The split is what the file's name says, see split_of(), or "published" for the published validation files beside
    the archive: their stories are kept out of train. Files that are called test are left out."""
    paths = source_paths(args, folder)
    refuse_two_versions(paths, folder, args.version)
    for path in paths:
        if args.version and not os.path.exists(path):
            download(f"{args.url}/{os.path.basename(path)}", path, GZIP if path.endswith(ARCHIVE) else EOT.encode())
    published = []
    if any(path.endswith(ARCHIVE) for path in paths):
        published = [os.path.join(os.path.dirname(paths[0]), names[-1]) for names in VERSIONS.values()]
    files = [(path, "published") for path in published if os.path.exists(path)]
    files += [(path, split_of(path)) for path in paths if path not in published]
    if all(split == "test" for _, split in files):
        sys.exit(f"{paths[0]} is called test, and nothing is trained on that: rename it, or name another file with "
                 "--input")
    if all(split in ("val", "test") for _, split in files):
        sys.exit(f"{paths[0]} is for validation, by its name: rename it, or add a file to train on")
    for path, split in files:
        if split == "test":
            print(f"{path} is left out: what is called test is not trained on", file=sys.stderr)
        elif split == "val" and "val" not in os.path.basename(path):
            print(f"{path} is used for validation, because of its name", file=sys.stderr)
    return [(path, split) for path, split in files if split != "test"]


def source_paths(args, folder):
    """The paths that the options name: one file or pipe, or all files of stories in a folder."""
    source = "/dev/stdin" if args.input == "-" else args.input or folder
    if args.version:
        names = (ARCHIVE,) if args.version == "all" else VERSIONS[args.version]
    elif os.path.isdir(source):
        names = sorted(name for name in os.listdir(source) if file_format(name))
        problem = "has no .txt or .jsonl file, nor .json, .csv or .parquet (folders inside it are not read)"
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
    """"test", "val" or "train" if a word of a file's name says so (validation-00000-of-00002.parquet, myTestSet.txt),
    else None."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", os.path.basename(path))
    splits = [SPLITS.get(re.sub("(set|data|s)$", "", word.lower())) for word in words]
    return next((split for split in ("test", "val", "train") if split in splits), None)


def refuse_two_versions(paths, folder, version):
    """End the program if two versions of TinyStories would meet in one dataset. They meet in the files to read; if
    `version` is to be downloaded, also in the folder that has texts, or bins made from texts, of another one."""
    names = " ".join(paths)
    if version:
        names += " ".join([*glob.glob("*.txt*", root_dir=folder), *glob.glob("*.tar.gz", root_dir=folder)])
        if os.path.exists(f"{folder}/meta.json"):
            with open(f"{folder}/meta.json") as file:
                names += file.read()
    archive = ARCHIVE in names  # a published validation file may lie beside it
    versions = [number for number, (train, valid) in VERSIONS.items()
                if train in names or valid in names and not archive]
    versions += ["all"] if archive else []
    if len(versions) > 1:
        mixed, version = " and ".join(map(str, versions)), version or 1
        name = "tinystories-all" if version == "all" else f"tinystories-v{version}"
        sys.exit(f"{folder} would mix versions {mixed} of TinyStories: prepare each as a dataset of its own, with "
                 f"python prepare.py --dataset={name} --version={version}")


# -----------------------------------------------------------------------------------------------------------------
# read


def detect_format(name, head, field):
    """The format of a file by its first bytes and its name, a value of FORMATS, "gzip" or "tar". A table without a name
    is known by its column `field`."""
    for magic, start, kind in (GZIP, 0, "gzip"), (b"PAR1", 0, "parquet"), (b"ustar", 257, "tar"):
        if head.startswith(magic, start):
            return kind
    if head.startswith((b"PK\3\4", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")):  # zip, bzip2, xz, zstd
        sys.exit(f"{name} is packed, and not by gzip: unpack it first")
    beginning = head.decode(json.detect_encoding(head), "ignore").lstrip()
    if beginning[:14].lower().startswith(("<!doctype html", "<html", "<?xml")):
        sys.exit(f"{name} is a page of HTML and no file of stories: delete it, and get the file itself")
    kind = file_format(os.path.basename(name))
    first_line = beginning.partition("\n")[0].strip()
    # lines: an object on several lines, or an array
    is_json = {"lines": first_line == "{" or beginning.startswith(("[", '"')),
               "text": beginning.startswith('{"'), None: beginning.startswith(("[", "{"))}
    if is_json.get(kind):
        return "json"
    columns = re.split("[,;\t]", first_line.replace('"', ""))
    if kind in (None, "text") and field in columns and all(re.fullmatch(r"[\w ]+", column) for column in columns):
        return "csv"
    return kind or "text"


def is_plain(path, split_at, field):
    """Whether a file is plain, so that chunks can be cut from it: JSON lines or text split at EOT, in UTF-8."""
    if not os.path.isfile(path) or path.startswith("/dev/"):  # a pipe can be read only once
        return False
    head = first_bytes(path)
    kind = detect_format(path, head, field)
    is_utf8 = json.detect_encoding(head).startswith("utf-8")
    return is_utf8 and (kind == "lines" or kind == "text" and split_at == "eot")


def has_lines(path):
    """Whether each line of a plain file is a story, in JSON."""
    return file_format(os.path.basename(path)) == "lines"


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
        if EOT in record["story"] and not record.get("spans"):  # around a story, it only separates
            record["story"] = re.sub(rf"\A(\s*{re.escape(EOT)}\s*)+|\s*({re.escape(EOT)}\s*)+\Z", "", record["story"])
        if EOT in record["story"]:
            return {"story": None, "why": f"has {EOT} inside: split it into stories", "line": number, "text": line}
        spans = record.get("spans") or []
        if isinstance(spans, list) and all(
                isinstance(span, dict) and SPAN <= span.keys() and type(span["start"]) is type(span["end"]) is int
                for span in spans):
            return record
        why = (f'has "spans" that are not a list of objects with {", ".join(sorted(SPAN))} (start and end whole '
               'numbers): correct or delete it')
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
        records = (parse_line(line, number, field) for number, line in enumerate(convert(path, "eot", field), 1))
    return (record for record in records if record["story"] is not None)


# -----------------------------------------------------------------------------------------------------------------
# convert: every format but JSON lines and text, as a stream of lines of JSON. A record that cannot be read becomes a
# line that is no record, to be counted and shown


class Broken(str):
    """The beginning of a JSON object that cannot be read."""


def convert(path, split_at, field):
    """Yield a line of JSON for each story of a file, with what is known of it. Text is split at `split_at`: "eot",
    "line" or "blank"."""
    try:
        with open(path, "rb") as stream:
            for record in read_any(stream, path, split_at, field):
                if isinstance(record, Broken):
                    yield ascii(record)  # a text in quotes: no record, if it is JSON at all
                    continue
                if isinstance(record, str):  # an array of texts
                    record = {field: record}
                yield json.dumps(compact(record, field), default=str)
    except (OSError, EOFError, ValueError, csv.Error, tarfile.TarError, zlib.error) as error:
        sys.exit(f"{path} cannot be read, it may be cut off or damaged ({error}): delete it, and get it again")


def read_any(stream, name, split_at, field):
    """Yield the records in an open file, whose format its first bytes and its name tell; texts, if it is an array of
    texts; and in place of a broken one, a Broken."""
    head = stream.peek(512)
    kind = detect_format(name, head, field)
    if kind == "gzip":
        inner = io.BufferedReader(gzip.GzipFile(fileobj=stream), 1 << 20)
        yield from read_any(inner, re.sub(r"(?i)\.gz$", "", name), split_at, field)
    elif kind == "tar":
        yield from read_archive(stream, split_at, field)
    elif kind == "parquet":
        yield from read_parquet(stream, name)
    else:
        newline = "" if kind == "csv" else None
        text = io.TextIOWrapper(stream, json.detect_encoding(head), "surrogateescape", newline)
        yield from {"csv": read_csv, "text": read_text}.get(kind, read_json)(text, split_at)


def read_archive(stream, split_at, field):
    """Yield the records of the files in a tar archive, one after the other, with the split that a file's name says."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        archive.fileobj.seekable = lambda: False  # TextIOWrapper asks for it, and tarfile has it only since Python 3.12
        for member in archive:
            if not member.isfile() or not file_format(os.path.basename(member.name)):
                continue
            split = split_of(member.name)
            for record in read_any(archive.extractfile(member), member.name, split_at, field):
                yield {**record, "split": split} if split and isinstance(record, dict) else record


def read_parquet(stream, name):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        sys.exit(f"{name} is parquet: pip install pyarrow, and run the same command again")
    if not stream.seekable():
        sys.exit(f"{name} is parquet, which cannot be read from a pipe or an archive: save it as a file")
    for batch in ParquetFile(stream).iter_batches(1000):
        for row in batch.to_pylist():
            yield {name: value.decode(errors="surrogateescape") if isinstance(value, bytes) else value
                   for name, value in row.items()}


def read_csv(text, split_at):
    """Yield the rows of a table. Its first line names the columns, separated by commas, semicolons or tabs. What
    quotation marks mean is tried on its beginning: doubled inside a cell, after a backslash, or like any character."""
    beginning = list(islice(text, 1000))
    delimiter = max(",;\t", key="".join(beginning[:1]).count)
    meanings = [{}, {"doublequote": False, "escapechar": "\\"}, {"quoting": csv.QUOTE_NONE}]
    if '\\"' not in "".join(beginning):
        del meanings[1]
    for meaning in meanings:
        try:
            rows = list(csv.reader(beginning, delimiter=delimiter, strict=True, **meaning))
        except csv.Error:  # or the beginning ends inside a cell
            continue
        if all(len(row) in (0, len(rows[0])) for row in rows):
            break
    else:
        meaning = {}
    for row in csv.DictReader(chain(beginning, text), delimiter=delimiter, **meaning):
        extra = row.pop(None, None)
        yield Broken(f"a row of {len(row) + len(extra)} cells: {row}") if extra else row


def read_text(text, split_at):
    """Yield the stories of a text as records."""
    lines = []  # of the story that has begun
    for line in text:
        line = line.removeprefix("\ufeff")
        if split_at == "line" or split_at == "blank" and not line.strip():
            line += EOT  # a story ends with this line
        *ended, rest = line.split(EOT)
        for part in ended:
            story, lines = "".join([*lines, part]).strip(), []
            if story or split_at == "eot":
                yield {"story": story}
        lines.append(rest)
    if "".join(lines).strip():
        yield {"story": "".join(lines).strip()}


def read_json(text, split_at):
    """Yield the objects of a JSON array, or those that follow each other, on one line each or on several.

    After an object that cannot be read, it goes on with the next one that begins on a line of its own, or after another
    one."""
    decoder, buffer, start = json.JSONDecoder(), "", 0
    while True:
        start = re.compile(r"[\s,\[\]\ufeff]*").match(buffer, start).end()
        try:
            value, start = decoder.raw_decode(buffer, start)
            yield value
            continue
        except json.JSONDecodeError as error:
            # a string, or a word such as true, may be cut where the buffer ends
            unfinished = error.msg.startswith("Unterminated") or error.pos > len(buffer) - 10
        except RecursionError:
            unfinished = False
        more = text.read(BLOCK) if unfinished and len(buffer) - start < LARGEST else ""
        if more:
            buffer, start = buffer[start:] + more, 0
        elif start == len(buffer):
            return
        else:
            following = re.compile(r"[\n}][\s,]*(?=\{)").search(buffer, start + 1)
            end = following.end() if following else len(buffer)
            yield Broken(buffer[start:end][:200])
            start = end


def compact(record, field):
    """A record with its story and what prepare.py needs, without the rest: the prompts in the published archive are as
    long as the stories."""
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        return record
    known = {name: value for name, value in details(record).items() if value}
    known.update((name, record[name]) for name in ("split", "spans", "bits") if name in record)
    return {**known, field: record[field]}


# -----------------------------------------------------------------------------------------------------------------
# what a record says


def details(record):
    """{"features": [text], "words": [text], "summary": text} of a record, empty where it has none.

    The published records have the first two in "instruction". Names may be written in any case."""
    inner = record.get("instruction")
    items = [*(inner.items() if isinstance(inner, dict) else ()), *record.items()]
    fields = {str(name).strip(": ").lower(): value for name, value in items if value}
    # in the published records, BadEnding and Twist are what generate.py calls "bad ending" and "plot twist"
    features = [re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", feature).lower() for feature in as_list(fields.get("features"))]
    summary = fields.get("summary")
    return {"features": ["plot twist" if feature == "twist" else feature for feature in features],
            "words": as_list(fields.get("words")),
            "summary": " ".join(SURROGATE.sub("", summary).split()) if isinstance(summary, str) else ""}


def as_list(value):
    """Words, or features, as a list of texts, from a list or from text such as "jump, dog" or "jump|dog"."""
    if isinstance(value, str):
        value = re.split(r"[,;|\n、，]", value.strip("[]"))
    if not isinstance(value, list):
        return []
    items = [SURROGATE.sub("", str(item)) for item in value if isinstance(item, (str, int))]
    words = [" ".join(item.split()).strip(" '\"") for item in items]
    return [word for word in words if word]

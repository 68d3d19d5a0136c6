"""Make JSON lines of files that prepare.py cannot cut into chunks: arrays, CSV, parquet, archives, pipes, gzip.

Everything is read as a stream, so that files may be larger than the memory. A record that cannot be read becomes a line
that is no record, for prepare.py to count and to show."""
import csv
import gzip
import io
import json
import os
import re
import sys
import tarfile
import zlib
from itertools import chain

from prepare import EOT, detect_encoding, detect_format, details, file_format, split_of

BLOCK = 1 << 20  # characters that are read at a time
LARGEST = 1 << 24  # characters of a JSON value; a longer one is broken
csv.field_size_limit(1 << 30)


def convert(path, split_at, field):
    """Yield a line of JSON for each story of a file, with what is known of it. Text is split at `split_at`: "eot",
    "line" or "blank"."""
    try:
        with open(path, "rb") as stream:
            for record in read_any(stream, path, split_at, field):
                yield record if isinstance(record, str) else json.dumps(compact(record, field), default=str)
    except (OSError, EOFError, ValueError, csv.Error, tarfile.TarError, zlib.error) as error:
        sys.exit(f"{path} cannot be read, it may be cut off or damaged ({error}): delete it, and get it again")


def read_any(stream, name, split_at, field):
    """Yield the records in an open file, whose format its first bytes and its name tell, or text in place of a broken
    one."""
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
        text = io.TextIOWrapper(stream, detect_encoding(head), "surrogateescape", newline)
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
        yield from batch.to_pylist()


def read_csv(text, split_at):
    """Yield the rows of a table. Its first line names the columns, separated by commas, semicolons or tabs."""
    header = text.readline()
    for row in csv.DictReader(chain([header], text), delimiter=max(",;\t", key=header.count)):
        row.pop(None, None)  # the cells that have no name
        yield row


def read_text(text, split_at):
    """Yield the stories of a text as records."""
    lines = []  # of the story that has begun
    for line in text:
        stories = []
        *ended, rest = line.removeprefix("\ufeff").split(EOT)
        for part in ended:
            stories.append("".join([*lines, part]).strip())
            lines = []
        lines.append(rest)
        if split_at == "line" or split_at == "blank" and not rest.strip():
            stories.append("".join(lines).strip())
            lines = []
        yield from ({"story": story} for story in stories if story or split_at == "eot")
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
            yield ascii(buffer[start:end][:200])  # in single quotes, so that it is no JSON
            start = end


def compact(record, field):
    """A record with its story and what prepare.py needs, without the rest: the prompts in the published archive are as
    long as the stories."""
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        return record
    known = {name: value for name, value in details(record).items() if value}
    known.update((name, record[name]) for name in ("split", "spans", "bits") if name in record)
    return {**known, field: record[field]}

"""common/records.py: whatever format stories come in, prepare.py reads the same stories."""
import csv
import gzip
import io
import json
import os
import sys
import tarfile
import threading

import pytest

import prepare
from common import records
from common.dataset import load_meta, load_tokens
from conftest import error_of, make_stories, write_jsonl

RECORDS = [{"story": r["story"] + " “Ça va, 小狗?”", "words": ", ".join(r["words"])} for r in make_stories(30)]
STORIES = [r["story"] for r in RECORDS]


def table(delimiter):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["id", "story", "words"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows({**record, "id": i} for i, record in enumerate(RECORDS))
    return text.getvalue()


LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
TEXT = "\n<|endoftext|>\n".join(STORIES)
FILES = {
    "array.json": json.dumps(RECORDS), "pretty.json": json.dumps(RECORDS, indent=2, ensure_ascii=False),
    "lines.json": LINES, "array.jsonl": json.dumps(RECORDS), "S.JSONL": LINES, "s.ndjson": LINES, "no_name": LINES,
    "mark.jsonl": "\ufeff" + LINES, "mark.json": "\ufeff" + json.dumps(RECORDS), "text": TEXT,
    "mark.csv": "\ufeff" + table(","), "comma.csv": table(","), "semicolon.CSV": table(";"), "tab.tsv": table("\t"),
    "table": table(","), "unix.csv": table(",").replace("\r", ""),
    "windows.txt": TEXT.replace("\n", "\r\n"),
    "utf16.csv": table(",").encode("utf-16"), "utf16.jsonl": LINES.encode("utf-16"), "utf16.txt": TEXT.encode("utf-16"),
    "utf16be.txt": b"\xfe\xff" + TEXT.encode("utf-16-be"), "utf32.json": json.dumps(RECORDS).encode("utf-32")}
FILES = {name: content.encode() if isinstance(content, str) else content for name, content in FILES.items()}
FILES.update({f"{name}.gz": gzip.compress(content, mtime=0) for name, content in FILES.items()})


def stories_in(path, *options):
    """The stories of a file as prepare.main() reads them for its bins, in order."""
    args = prepare_args(*options)
    plain = prepare.make_plain(str(path), args, "data/x/unfinished/0.jsonl")
    return [record["story"] for chunk in records.split_file(plain) for record in records.read_chunk(*chunk, args.field)]


def prepare_args(split="eot", field="story"):
    return type("Args", (), {"split": split, "field": field})


@pytest.mark.parametrize("name", FILES)
def test_the_same_stories_come_out_of_every_format(workplace, monkeypatch, name):
    monkeypatch.setattr(records, "BLOCK", 1000)  # so that objects are cut where a block ends
    (workplace / name).write_bytes(FILES[name])
    assert stories_in(name) == STORIES
    assert [record["story"] for record in records.read_records(name)] == STORIES  # as eval.py and lab.corpus read
    if "text" not in name and not name.startswith(("windows", "utf16.txt", "utf16be")):
        words = [records.details(record)["words"] for record in records.read_records(name)]
        assert words == [record["words"].split(", ") for record in RECORDS]


@pytest.mark.skipif(os.name == "nt", reason="named pipes are Unix's")
@pytest.mark.parametrize("name", ["S.JSONL", "comma.csv", "utf16.txt.gz", "array.json", "text"])
def test_a_pipe_is_read_once(workplace, name):
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: open("pipe", "wb").write(FILES[name]))
    writer.start()
    assert stories_in("pipe") == STORIES
    writer.join()


def test_parquet_is_read_where_pyarrow_is_installed(workplace):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.Table.from_pylist([{"text": s, "spans": []} for s in STORIES]), "s.parquet")
    assert stories_in("s.parquet", "eot", "text") == STORIES


def test_without_pyarrow_parquet_ends_in_one_line(workplace, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (workplace / "s.parquet").write_bytes(b"PAR1 and more")
    assert "pip install pyarrow" in error_of(prepare.main, ["--dataset=x", "--input=s.parquet"], capsys)


@pytest.mark.parametrize("split, separator", [
    ("line", "\n"), ("line", "\r\n"), ("line", "\n<|endoftext|>\n"), ("blank", "\n\n"), ("blank", "\n \t\n\n"),
    ("blank", "\r\n\r\n")])
@pytest.mark.parametrize("name", ["s.txt", "s.txt.gz"])
def test_text_can_be_split_at_lines_and_blank_lines(workplace, split, separator, name):
    stories = [story.replace("\n", " " if split == "line" else "\n") for story in STORIES]
    content = ("\ufeff" + separator.join(stories) + "\n").encode()
    (workplace / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    assert stories_in(name, split) == stories


def test_after_a_broken_object_reading_goes_on(workplace):
    """Also in arrays, on one line or on many, and after a value that never ends."""
    good = [json.dumps({"story": s}) for s in STORIES[:6]]
    for separator in (", ", ",\n", "\n", ",\n  "):
        for broken in ('{"story": "cut', '{"story": }', '{story: "Hi."}', '{"story": "a" "b"}', '{"story": "a\\qb"}'):
            text = "[" + separator.join([*good[:3], broken, *good[3:]]) + "]"
            (workplace / "s.json").write_text(text)
            read = [json.loads(line)["story"] for line in records.convert("s.json", "eot", "story") if line[0] == "{"]
            assert read == STORIES[:6] or separator == ", " and broken.endswith("cut") and len(read) >= 4, (text, read)


@pytest.mark.parametrize("name, content", [
    ("cut.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-20]), ("bad.csv.gz", b"\x1f\x8b" + bytes(50)),
    ("cut.txt.gz", gzip.compress(TEXT.encode(), mtime=0)[:100]), ("utf16.txt", b"\xff\xfeH")])
def test_damaged_files_end_in_one_line(workplace, name, content, capsys):
    (workplace / name).write_bytes(content)
    assert f"{name} cannot be read" in error_of(prepare.main, ["--dataset=x", f"--input={name}"], capsys)
    assert not os.path.exists("data/x")


def test_an_archive_of_ones_own_keeps_its_splits(workplace):
    with tarfile.open("s.tar", "w") as archive:
        for i, name in enumerate(("c/train.jsonl", "c/val.json", "c/test.json")):
            write_jsonl(workplace / name, RECORDS[10 * i:10 * i + 10])
            archive.add(name)
    (workplace / "s.tgz").write_bytes(gzip.compress((workplace / "s.tar").read_bytes()))
    for name in ("s.tar", "s.tgz"):
        prepare.main(["--dataset=x", f"--input={name}"])
        meta = load_meta("x")
        assert (meta["train"]["stories"], meta["val"]["stories"]) == (10, 10)


@pytest.mark.parametrize("content", [
    'id,story\n1,"Tim said ""Hi"" to Mia, and left."\n', 'id,story\n1,"Tim said \\"Hi\\" to Mia, and left."\n',
    'id\tstory\n1\tTim said "Hi" to Mia, and left.\n2\t"Hi," said Tim.\n'])
def test_quotation_marks_in_a_table_are_the_stories(workplace, content):
    (workplace / "s.csv").write_text(content)
    assert stories_in("s.csv") == ['Tim said "Hi" to Mia, and left.', '"Hi," said Tim.'][:content.count("\n") - 1]


def test_a_row_with_too_many_cells_is_broken_and_a_table_is_known_in_a_text_file(workplace):
    (workplace / "s.txt").write_text("id,story\n1,He ate a pie, and slept.\n2,She slept.\n")
    assert stories_in("s.txt") == [None, "She slept."]


def test_an_end_of_text_around_a_story_in_json_is_none_of_it(workplace):
    write_jsonl(workplace / "s.jsonl", [{"story": text} for text in (
        "<|endoftext|>\nOne.", "Two.\n<|endoftext|> ", "Three.<|endoftext|>Four.")])
    assert stories_in("s.jsonl") == ["One.", "Two.", None]


def test_objects_on_several_lines_and_quoted_lines(workplace):
    (workplace / "s.jsonl").write_text("\n".join(json.dumps(record, indent=1) for record in RECORDS))
    assert stories_in("s.jsonl") == STORIES
    (workplace / "t.jsonl").write_text("\n".join(map(json.dumps, STORIES)))
    assert stories_in("t.jsonl") == STORIES


def test_an_array_of_texts_and_json_lines_in_a_text_file(workplace):
    (workplace / "texts.json").write_text(json.dumps(["One.\nTwo.", "“Drei, café.”"]))
    assert stories_in("texts.json") == ["One.\nTwo.", "“Drei, café.”"]
    (workplace / "lines.txt").write_text(LINES)
    assert stories_in("lines.txt") == STORIES


def test_a_folder_of_stories_and_others_for_validation(workplace):
    write_jsonl(workplace / "own/stories.jsonl", make_stories(30))
    write_jsonl(workplace / "own/val.jsonl", make_stories(20, seed=9))
    prepare.main(["--dataset=x", "--input=own", "--val_fraction=0"])
    assert [load_meta("x")[split]["stories"] for split in ("train", "val")] == [30, 20]


def test_own_field_names_and_spans_reach_the_labels(workplace):
    named = [{"text": r["story"], "spans": r["spans"], "bits": r["bits"]} for r in make_stories(40)]
    (workplace / "s.json").write_text(json.dumps(named))
    prepare.main(["--dataset=x", "--input=s.json", "--field=text", "--val_fraction=0.3"])
    meta = load_meta("x")
    assert set(load_tokens("x", "val.skills")) == {0, 4} and meta["val"]["bits_per_byte"] > 0
    assert len(list(records.read_records("s.json", meta["field"]))) == 40  # as eval.py reads spans

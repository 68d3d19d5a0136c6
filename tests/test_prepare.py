"""prepare.py: bins that hold exactly the stories, tokenizers that lose nothing, and downloads that break off."""
import argparse
import base64
import hashlib
import http.server
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import unicodedata
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

import generate
import prepare
from common import ask, files, records
from common.dataset import load_meta, load_tokens
from common.text import clean_story, ends_well, fingerprint
from common.tokenizer import BYTES, load_tokenizer, make_encoding, parts_of
from conftest import error_of, make_stories, write_jsonl

ROOT = Path(__file__).parent.parent


def read_back(dataset, split):
    """The stories in a bin. <|endoftext|> must stand before each of them and after the last."""
    tokens, encoding = load_tokens(dataset, split), load_tokenizer(dataset)
    ends = np.flatnonzero(tokens == encoding.eot_token)
    assert ends[0] == 0 and ends[-1] == len(tokens) - 1
    return [encoding.decode(tokens[a + 1:b].tolist()) for a, b in zip(ends, ends[1:])]


def options(**changed):
    """The options that workers are given."""
    return argparse.Namespace(**{"clean": True, "val_fraction": 0.2, "instruct": False, "hold_out": [], "seed": 1,
                                 "field": "story", "split": "eot", **changed})


def all_of(path):
    """The chunk that is all of a file."""
    return str(path), 0, os.path.getsize(path)


# --- the bins -----------------------------------------------------------------------------------------------------


def test_bins_hold_exactly_the_stories_in_order(workplace):
    train, val = [r["story"] for r in make_stories(120)], [r["story"] for r in make_stories(130)[120:]]
    for name, stories in (("train", train), ("valid", val)):
        (workplace / f"{name}.txt").write_text("".join(f"{s}\n<|endoftext|>\n" for s in stories), encoding="utf-8")
    prepare.main(["--dataset=x", f"--input={workplace}", "--vocab_size=400"])
    assert read_back("x", "train") == train
    assert read_back("x", "val") == val
    meta = load_meta("x")
    assert meta["train"]["stories"] == 120 and meta["val"]["stories"] == 10
    assert meta["val"]["bytes"] == sum(len(s.encode()) for s in val)
    assert meta["val"]["tokens"] == os.path.getsize("data/x/val.bin") / 2
    assert meta["vocab_size"] == 400 and meta["eot"] == 399
    assert meta["train"]["sha256"] == hashlib.sha256(Path("data/x/train.bin").read_bytes()).hexdigest()


def test_a_story_never_changes_side(workplace):
    """More stories, in another order, with another case: those that were in val are in val still."""
    stories = make_stories(200)
    write_jsonl(workplace / "data/small/s.jsonl", stories[:100])
    shuffled = random.Random(1).sample(stories, 200)
    write_jsonl(workplace / "data/large/s.jsonl", [{"story": r["story"].upper()} for r in shuffled])
    for name in ("small", "large"):
        prepare.main([f"--dataset={name}", "--val_fraction=0.2"])
    small, large = ({s.upper() for s in read_back(name, "val")} for name in ("small", "large"))
    assert 5 < len(small) < len(large)
    assert small == large & {r["story"].upper() for r in stories[:100]}


def test_max_stories_keeps_the_first(workplace):
    write_jsonl(workplace / "train.jsonl", make_stories(50))
    write_jsonl(workplace / "val.jsonl", make_stories(60)[50:])
    prepare.main(["--dataset=x", f"--input={workplace}", "--max_stories=7"])
    assert read_back("x", "train") == [r["story"] for r in make_stories(7)]
    assert len(read_back("x", "val")) == 10


# --- chunks, and the workers that read them ------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["\n<|endoftext|>\n", "<|endoftext|>", "\r\n<|endoftext|>\r\n", ".jsonl"])
def test_no_story_is_cut_wherever_a_chunk_ends(workplace, monkeypatch, ending):
    """Chunks of any size, which would end inside separators, line ends and characters of several bytes."""
    stories = ["Zoë 🙂 said:\n“日本”", "One.", "", "a < b <| c |> d", "…\n\nend", "<|endoftex", "last"]
    path = workplace / ("s.jsonl" if ending == ".jsonl" else "s.txt")
    if ending == ".jsonl":
        text = closed = "".join(json.dumps({"story": s}, ensure_ascii=False) + "\n" for s in stories)
    else:
        text = ending.join(s.replace("\n", "\r\n") if "\r" in ending else s for s in stories)
        closed = text + ending
    for content in (text, "\ufeff" + text, closed, text.rstrip()):
        path.write_bytes(content.encode())
        for size in range(1, 40):
            monkeypatch.setattr(records, "CHUNK_BYTES", size)
            chunks = list(records.split_file(str(path)))
            assert [start for _, start, _ in chunks] + [path.stat().st_size] == [0] + [end for _, _, end in chunks]
            assert [r["story"] for chunk in chunks for r in records.read_chunk(*chunk)] == stories
        assert len(chunks) > 1


@pytest.mark.parametrize("name, split", [
    ("train.txt", "train"), ("TinyStories-train.txt", "train"), ("training.jsonl", "train"), ("val.txt", "val"),
    ("a_valid.txt", "val"), ("x.validation.jsonl", "val"), ("trainer.txt", None), ("valley.txt", None),
    ("testset.jsonl", "test"), ("TinyStoriesTest.txt", "test"), ("holdout.csv", "test"), ("stories-tests.txt", "test"),
    ("devset.json", "val"), ("latest.txt", None), ("contests.txt", None), ("The_Test_of_Tim.txt", "test"),
    ("train-00000-of-00002.parquet", "train"), ("validation-00001-of-00002.jsonl.gz", "val"), ("dev.json", "val"),
    ("train-00000-of-00004-2d5a1467fff1081b.parquet", "train"), ("Train_3.CSV", "train"), ("my.DEV-1.tsv", "val")])
def test_splits_are_known_by_the_names_of_their_files(name, split):
    assert records.split_of(f"test/{name}") == split


def test_one_story_is_never_in_both_splits(workplace):
    """Written otherwise, or if nothing is cleaned."""
    stories = [f"{story['story']} Ça va… “Très bien”" for story in make_stories(50)]
    write_jsonl(workplace / "in/train.jsonl", [{"story": unicodedata.normalize("NFD", story)} for story in stories])
    write_jsonl(workplace / "in/val.jsonl", [{"story": story.replace("…", "...")} for story in stories[:20]])
    for clean in ("True", "False"):
        prepare.main(["--dataset=x", "--input=in", f"--clean={clean}"])
        assert [load_meta("x")[split]["stories"] for split in ("train", "val")] == [30, 20]


@pytest.mark.parametrize("name", ["test.txt", "test-00000-of-00001.jsonl", "Stories_TEST2.jsonl", "train-test.jsonl"])
def test_what_is_called_test_is_not_trained_on(workplace, name, capsys):
    stories, held = [r["story"] for r in make_stories(60)], [r["story"] for r in make_stories(5, seed=9)]
    write_jsonl(workplace / "train.jsonl", [{"story": s} for s in stories])
    write_jsonl(workplace / name, [{"story": s} for s in held])
    if name.endswith("txt"):
        (workplace / name).write_text("<|endoftext|>".join(held), encoding="utf-8")
    prepare.main(["--dataset=x", f"--input={workplace}", "--val_fraction=0.2"])
    assert sorted(read_back("x", "train") + read_back("x", "val")) == sorted(stories)
    assert f"{name} is left out" in capsys.readouterr().err
    assert "called test" in error_of(prepare.main, ["--dataset=x", f"--input={workplace / name}"], capsys)


def test_a_dev_file_is_for_validation_and_records_called_test_are_left_out(workplace, capsys):
    stories = make_stories(40)
    write_jsonl(workplace / "train.jsonl", stories[:30] + [{**r, "split": "TEST"} for r in stories[30:32]])
    write_jsonl(workplace / "dev.jsonl", stories[32:])
    prepare.main(["--dataset=x", f"--input={workplace}"])
    assert read_back("x", "train") == [r["story"] for r in stories[:30]]
    assert read_back("x", "val") == [r["story"] for r in stories[32:]]
    output = capsys.readouterr()
    assert "dev.jsonl is used for validation" in output.err and "2 called test: removed" in output.out


def test_rejected_answers_are_no_stories(workplace):
    for name in ("stories", "rejected"):  # as generate.py writes them
        (workplace / f"{name}.jsonl").touch()
    args = options(input=str(workplace), version=None)
    assert records.find_sources(args, "data/x") == [(str(workplace / "stories.jsonl"), None)]


def test_files_that_begin_with_a_byte_order_mark_can_be_joined(workplace):
    for name, one in (("s.jsonl", '\ufeff{"story": "One."}\n'), ("s.txt", "\ufeffOne.\n<|endoftext|>\n")):
        (workplace / name).write_text(one * 3)
        assert [r["story"] for r in records.read_records(name)] == ["One."] * 3


def test_bins_do_not_depend_on_chunks_and_workers(workplace, monkeypatch):
    stories = make_stories(200)
    write_jsonl(workplace / "s.jsonl", stories + stories[50:60] + [{**stories[3], "split": "val"}])
    arguments = ["--input=s.jsonl", "--val_fraction=0.2", "--vocab_size=600", "--instruct"]
    prepare.main(["--dataset=uncut"] + arguments)
    monkeypatch.setattr(records, "CHUNK_BYTES", 1000)
    for name, workers in (("one", 1), ("many", 5)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(workers), raising=False)
        prepare.main([f"--dataset={name}"] + arguments)
        for part in ("train", "val", "val.skills"):
            assert np.array_equal(load_tokens(name, part), load_tokens("uncut", part))
        assert load_meta(name) == {**load_meta("uncut"), "dataset": name}


def test_a_worker_decides_alone(workplace):
    """All that it needs comes in as arguments: no setup, no other process."""
    good, val = make_stories(2)
    write_jsonl(workplace / "s.jsonl", [good, {**val, "split": "validation"}, {"story": " "}, {"story": "Short."},
                                        {**good, "split": "test"}])
    decisions, broken, fields = prepare.decide(all_of("s.jsonl"), None, options(val_fraction=0))
    assert [decision for _, decision, _ in decisions] == ["train", "val", "empty", "under 100 characters",
                                                          "called test"]
    assert decisions[0][0] == decisions[4][0] == fingerprint(good["story"])
    decisions, broken, fields = prepare.decide(all_of("s.jsonl"), "val", options(clean=False))
    assert [decision for _, decision, _ in decisions] == ["val", "val", "empty", "val", "called test"]


def test_a_worker_counts_words_of_train_alone(workplace):
    write_jsonl(workplace / "s.jsonl", [{"story": "a cat, a hat"}, {"story": "a dog"}, {"story": "a cow"}])
    words = prepare.count_words(all_of("s.jsonl"), ["train", "val", "empty"], options())
    assert words == {b"a": 1, b" cat": 1, b",": 1, b" a": 1, b" hat": 1}


def test_a_worker_encodes_alone(in_prepared):
    records = make_stories(3)
    write_jsonl(in_prepared / "s.jsonl", records)
    bins, totals = prepare.encode(all_of("s.jsonl"), ["val", "copies in train", "train"], options(), "tiny")
    encoding = load_tokenizer("tiny")
    for name, record in (("val", records[0]), ("train", records[2])):
        tokens = np.frombuffer(bins[name], "<u2").tolist()
        assert tokens == [encoding.eot_token] + encoding.encode_ordinary(record["story"])
        assert totals[name] == {"stories": 1, "tokens": len(tokens), "bytes": len(record["story"].encode()), "bits": 20,
                                "spans": 1}
    assert len(bins["val.skills"]) == len(bins["val"])


def test_only_the_cpus_that_this_process_may_use_are_used(monkeypatch):
    pools = []

    def make_pool(workers, **options):
        pools.append(workers)
        return ThreadPoolExecutor(1)
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", make_pool)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert list(prepare.run_workers(max, [(1, 2), (4, 3)], "")) == [((1, 2), 2), ((4, 3), 4)]
    monkeypatch.delattr(os, "sched_getaffinity")  # Mac and Windows
    assert list(prepare.run_workers(max, [(1, 2)], "")) == [((1, 2), 2)]
    assert pools == [2, 61]


def test_a_worker_that_is_killed_ends_the_program_in_one_line():
    """As Linux does where memory runs out."""
    with pytest.raises(SystemExit, match="worker process was killed.*--workers=2"):
        list(prepare.run_workers(os._exit, [(9,)], "", workers=4))


def test_a_folder_that_cannot_be_written_is_found_before_the_work(workplace, capsys):
    (workplace / "data").touch()  # a file in the folder's place
    assert "cannot write" in error_of(prepare.main, ["--dataset=x", "--input=none.txt"], capsys)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_a_full_disk_leaves_the_earlier_bins(workplace):
    import resource
    write_jsonl(workplace / "data/x/s.jsonl", make_stories(60))
    prepare.main(["--dataset=x", "--val_fraction=0.2"])
    before = read_back("x", "train")
    write_jsonl(workplace / "data/x/s.jsonl", make_stories(600))
    done = subprocess.run([sys.executable, ROOT / "prepare.py", "--dataset=x", "--val_fraction=0.2"],
                          capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert done.returncode == 1 and "disk is full" in done.stderr and read_back("x", "train") == before


def test_bins_moved_only_in_part_are_no_dataset(workplace, monkeypatch):
    def rename(old, new, real=prepare.rename):
        return 1 / 0 if new.endswith("val.bin") else real(old, new)
    write_jsonl(workplace / "data/x/s.jsonl", make_stories(60))
    prepare.main(["--dataset=x", "--val_fraction=0.2"])
    monkeypatch.setattr(prepare, "rename", rename)
    with pytest.raises(ZeroDivisionError):
        prepare.main(["--dataset=x", "--val_fraction=0.5"])
    with pytest.raises(SystemExit, match="no dataset in data/x"):
        load_meta("x")


def test_words_are_counted_in_pieces_as_in_the_whole(workplace):
    """The faster way, in two steps, finds GPT-2's words, white space of all kinds included."""
    draw = random.Random(2)
    for _ in range(2000):
        kinds = ["a", "Don't", "12", ".", "’s", " ", "  ", "\n", "\t", "\r\n", "\xa0", "\u3000", "日"]
        text = "".join(draw.choices(kinds, k=draw.randrange(20)))
        pieces = prepare.PIECES.findall(text)
        words = [word for piece in pieces for word in prepare.GPT2_PATTERN.findall(piece)]
        assert words == prepare.GPT2_PATTERN.findall(text)


def test_max_stories_leaves_val_alone(workplace):
    write_jsonl(workplace / "s.jsonl", make_stories(200))
    for name, more in (("all", []), ("few", ["--max_stories=5"])):
        prepare.main([f"--dataset={name}", "--input=s.jsonl", "--val_fraction=0.2"] + more)
    assert len(read_back("few", "train")) == 5
    assert read_back("few", "val") == read_back("all", "val")


def test_a_misread_copy_stays_on_its_side(workplace):
    """It is repaired before its side is drawn, so it is a copy in its own split and not one in both."""
    stories = [r["story"] for r in make_stories(60)]
    misread = [s.replace("“", "â€œ").replace("”", "â€\x9d") for s in stories]
    write_jsonl(workplace / "s.jsonl", [{"story": s} for s in stories + misread])
    prepare.main(["--dataset=x", "--input=s.jsonl", "--val_fraction=0.5"])
    cleaning = load_meta("x")["cleaning"]
    assert "in train and in val: removed" not in cleaning
    assert cleaning["copies in train: removed"] + cleaning["copies in val: removed"] == 60


# --- cleaning -----------------------------------------------------------------------------------------------------


def test_cleaning_removes_what_is_broken_and_counts_it(workplace, capsys):
    good = [r["story"] for r in make_stories(30)]
    held = [r["story"] for r in make_stories(35)[30:]]
    broken = good[0].replace("“", "â€œ").replace("”", "â€\x9d").replace("took", "brought")
    train = good + ["", "Too short.", good[1][:-1] + " and", "  " + good[2].upper(), held[0].replace("“", '"'), broken]
    write_jsonl(workplace / "train.jsonl", [{"story": s} for s in train])
    write_jsonl(workplace / "valid.jsonl", [{"story": s} for s in held])
    prepare.main(["--dataset=x", f"--input={workplace}"])
    assert read_back("x", "train") == good + [good[0].replace("took", "brought")]
    assert read_back("x", "val") == held
    assert load_meta("x")["cleaning"] == {
        "UTF-8 read as cp1252: repaired": 1, "empty: removed": 1, "under 100 characters: removed": 1,
        "no final punctuation: removed": 1, "copies in train: removed": 1, "in train and in val: removed": 1}
    printed = capsys.readouterr().out
    assert "1 copies in train: removed" in printed and "--clean=False leaves" in printed
    prepare.main(["--dataset=x", f"--input={workplace}", "--clean=False"])
    assert "--clean" not in capsys.readouterr().out
    assert read_back("x", "train") == [s for s in train if s and s != held[0].replace("“", '"')]


SENTENCES = """Où est passé le garçon ? Noël à l’île, déjà ! Là-bas, l’œuvre naïve coûte 5 € ; il va à Paris.
Öl und Übung: Größe, Süßes, Äpfel. Der Spaß gehört Jörg, und das Mädchen läuft über die Straße.
¿Qué pasó, señor? ¡Olé! El pingüino comió; él está aquí. Tú también, Íñigo: sólo un café.
É só maçã e pão: não, avó! Às três, João viu a mãe; Ó céus, Úrsula é irmã. São Paulo, à noite.""".split("\n")
QUOTATIONS = ["“{}”", "„{}“", "„{}”", "»{}«", "«{}»",
              "«\xa0{}\xa0»", "« {} »", "‘{}’", "‚{}‘", "‹{}›", "“{}…”", "— {} –"]


def misread(text, encoding="cp1252"):
    """A text with its UTF-8 read as cp1252; as browsers do, the bytes that this lacks become control characters."""
    return "".join(bytes([b]).decode(encoding, "ignore") or chr(b) for b in text.encode())


def repair(text):
    return clean_story({"story": text})


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_right_text_is_never_changed_and_misread_text_is_repaired(encoding):
    """Sentences and each of their words, also in capitals, in every quotation mark of their languages."""
    texts = {quotation.format(part) for line in SENTENCES for quotation in QUOTATIONS
             for part in (line, line.upper(), *line.split(), *line.upper().split())}
    assert [text for text in texts if repair(text) != text] == []
    sentences = [quotation.format(line) for line in SENTENCES for quotation in QUOTATIONS]
    assert [text for text in sentences if repair(misread(text, encoding)) != text] == []


@pytest.mark.parametrize("text", [
    "« un café\xa0»", "„So ein Spaß“", "“to the café…”",
    "É“", "É…", "“É…É”", "MAÇû", "“A MAÇÔ", "É a IRMÃ³", "Até AMANHÃ–NOITE",
    "la lettre «\xa0Â\xa0»", "3\xa0×\xa04", "“Å”", "NESCAFÉ™s", "„váš“", "café¹²", "mamá¡¿Qué", "»Â«", "“Ã…",
    "André\xa0© 2020", "café\xa0· puis", "payé\xa0£5", "à\xa0€5", "né\xa0† 1900", "là\xa0§ 5", "santé\xad\xadcafé"])
def test_text_that_only_looks_misread_stays(text):
    assert repair(text) == text


@pytest.mark.parametrize("text", ["don’t", "“Hi,” she said…", "café über naïve", "¡olé! 5 £ – 3 €", "a cat 🙂",
                                  "Şimdi değil", "Zażółć gęślą jaźń", "il va à la mer", "S.à r.l.", "cœur"])
def test_misread_latin_text_is_repaired(text):
    assert repair(misread(text)) == repair(misread(misread(text))) == repair(misread(text, "latin-1")) == text
    assert repair(text) == text
    assert repair("â€œHiâ€ she") == "“Hi” she"  # the third byte was lost
    assert repair("“Hi,” she said. It wasnâ€™t café…") == "“Hi,” she said. It wasn’t café…"  # only in part


@pytest.mark.parametrize("ending, whole", [
    ("slept.", True), ("slept!”", True), ("slept)", True), ("slept.\n\nThe End", True), ("slept.\n**THE END**", True),
    ("slept 😊", True), ("slept. 👍🏽 ❤️", True), ("睡了。」", True), ("सो गया।", True), ("dort\xa0»", True), ("Spaß“", True),
    ("slept…", True), ("نام؟", True), ("นอนหลับ", True), ("dort.\nFin", True), ("slept. ~*~", True),
    ("slept and", False), ("slept,", False), ("she said, “", False), ("all was fine", False), ("睡了，", False)])
def test_one_rule_says_whether_a_story_is_finished(ending, whole):
    """prepare.py and generate.py have the same: no story is paid for that is then removed."""
    assert ends_well(ending) == whole
    story, answer = "One day he went to the park. " * 10 + ending, ask.Answer("writer", {}, finish="stop")
    assert (generate.why_rejected(story, answer, [], {}) != "cut off") == whole
    assert (prepare.why_removed(story, clean=True) == "") == whole


# --- instructions and labels --------------------------------------------------------------------------------------


def test_instructions_stand_before_the_story_and_hold_out_a_pair_in_train():
    seen = Counter()
    for record in make_stories(400):
        for split in ("train", "val"):
            instructed = prepare.instruct(record, split, ["words", "summary"], seed=1)
            before, story = instructed["story"].split("Story:\n")
            assert story == record["story"]
            assert instructed == prepare.instruct(record, split, ["words", "summary"], seed=1)
            fields = [line.split(":")[0] for line in before.splitlines()]
            seen[split, "Words" in fields and "Summary" in fields] += 1
            seen.update(fields + [tuple(fields[:2])])
            for span in instructed["spans"]:
                assert instructed["story"][span["start"]:span["end"]] in ("ball", "kite", "hat", "boat", "drum", "cake")
            for line in before.splitlines():
                if line.startswith("Random sentence: "):
                    assert line.split(": ", 1)[1] in story
    assert seen["train", True] == 0 < seen["val", True]
    assert min(seen[name] for name in ("Features", "Words", "Summary", "Random sentence")) > 100
    assert seen["Words", "Features"] and seen["Features", "Words"]  # in any order


@pytest.mark.parametrize("record", [
    {"words": ["jump", "dog"], "features": ["bad ending", "plot twist"], "summary": "He jumps."},
    {"instruction": {"prompt:": "Write", "words": ["jump", "dog"], "features": ["BadEnding", "Twist"]},
     "summary": "He jumps."},
    {"Words": "jump, dog", "FEATURES": "Bad ending, plot twist", "Summary:": "He\njumps. "},
    {"words": "['jump', 'dog']", "features": "bad ending;Plot Twist", "summary": "He jumps.", "instruction": "Write!"},
    {"words": ["jump", None, "dog"], "features": ("bad ending", "plot twist"), "summary": "He jumps.\ud83d"}])
def test_what_is_known_of_a_story_is_read_however_it_is_written(record):
    assert records.details(json.loads(json.dumps(record))) == {
        "features": ["bad ending", "plot twist"], "words": ["jump", "dog"], "summary": "He jumps."}
    assert records.details({"story": "Hi.", "words": 3, "summary": ["a"], "features": None}) == {
        "features": [], "words": [], "summary": ""}


def test_what_instructions_lack_is_said_once(workplace, capsys):
    records = [{"story": r["story"], "words": r["words"]} for r in make_stories(60)]
    write_jsonl(workplace / "s.jsonl", records)
    prepare.main(["--dataset=x", "--input=s.jsonl", "--val_fraction=0.2", "--instruct"])
    assert capsys.readouterr().err.count("no story has features or summary") == 1


def test_labels_fall_on_exactly_the_tokens_of_the_marked_word(in_prepared):
    tokens, labels = load_tokens("tiny", "val"), load_tokens("tiny", "val.skills")
    encoding = load_tokenizer("tiny")
    stories = {r["story"]: r["spans"][0] for r in make_stories(300)}
    ends = np.flatnonzero(tokens == encoding.eot_token)
    assert len(tokens) == len(labels) and set(labels) == {0, 4}
    for a, b in zip(ends, ends[1:]):
        story = encoding.decode(tokens[a + 1:b].tolist())
        marked = tokens[a + 1:b][labels[a + 1:b] == prepare.SKILLS.index("reasoning")]
        span = stories[story]
        assert encoding.decode(marked.tolist()).strip() == story[span["start"]:span["end"]]


# --- tokenizers ---------------------------------------------------------------------------------------------------

CORPUS = "\n".join(r["story"] for r in make_stories(300)) + " aaaa aaaaaa bananana 12 12.5 don't I'll   ½ _x_ \n\n end"
UNSEEN = "Zoë's 3 bananas aren't aaaaaaa here…\n\tShe'll   jump, the tiny drummer said: “Olé!” 日本 🙂 _ok_ 1½ "


def test_a_story_with_spans_is_not_repaired(workplace):
    """A repair shortens the text, and the spans would point to other words."""
    story = "Tim said that he donâ€™t want the red ball. " * 4
    spans = [{"start": story.index("ball"), "end": story.index("ball") + 4, "skill": "fact", "wrong": "kite"}]
    records = [{"story": f"{story}{i}.", "spans": spans, "split": "val" if i % 5 == 0 else "train"} for i in range(20)]
    write_jsonl(workplace / "data/x/stories.jsonl", records)
    prepare.main(["--dataset=x", "--vocab_size=300"])
    encoding, labels = load_tokenizer("x"), load_tokens("x", "val.skills")
    ids = load_tokens("x", "val")[labels == 2].tolist()
    assert "ball" in encoding.decode(ids) and set(encoding.decode(ids).split()) == {"ball"}


def test_bpe_agrees_with_an_independent_trainer():
    """Hugging Face's trainer makes the same merges in the same order, and the same ids of unseen text."""
    words = Counter(word.encode() for word in regex.findall(prepare.GPT2_PATTERN, CORPUS))
    ours = prepare.train_bpe(words, 700)
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator([CORPUS], tokenizers.trainers.BpeTrainer(
        vocab_size=699, min_frequency=2, initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    alphabet = dict(zip(sorted(ByteLevel.alphabet()), map(bytes, ([b] for b in BYTES))))
    expected = {b"".join(alphabet[c] for c in token): i for token, i in theirs.get_vocab().items()}
    assert ours == expected and len(ours) > 400
    assert make_encoding(ours).encode_ordinary(UNSEEN) == theirs.encode(UNSEEN).ids


def test_trimming_keeps_the_most_used_tokens_and_every_text():
    """GPT-2's way: of a larger vocabulary, the most used tokens and what they are merged from."""
    words = Counter(word.encode() for word in regex.findall(prepare.GPT2_PATTERN, CORPUS))
    large = prepare.train_bpe(words, 700)
    text = "The kite and the boat. " * 5 + "A drum."
    encoding = make_encoding(large)
    counts = Counter(encoding.decode_single_token_bytes(token) for token in encoding.encode_ordinary(text))
    small = prepare.trim_bpe(large, counts, 300)
    assert len(small) <= 299 and set(small) <= set(large) and sorted(small.values()) == list(range(len(small)))
    for token in small:
        assert len(token) == 1 or all(part in small for part in parts_of(token, large))
    assert b" kite" in small and b" cake" not in small
    encoding = make_encoding(small)
    for line in (CORPUS, UNSEEN, text):
        assert encoding.decode(encoding.encode_ordinary(line)) == line
    assert len(encoding.encode_ordinary(text)) == counts.total()  # what stays is still reached by merging


def test_gpt2s_tokens_are_those_that_the_stories_use(in_prepared, monkeypatch):
    """--tokenizer=gpt2, with another tokenizer in the place of GPT-2's, which would be downloaded."""
    ranks, large = prepare.load_ranks("tiny"), load_tokenizer("tiny")
    monkeypatch.setattr(prepare.tiktoken, "get_encoding", lambda name: large)
    prepare.main(["--dataset=few", "--input=data/tiny", "--tokenizer=gpt2", "--vocab_size=400", "--val_fraction=0.1"])
    stories = read_back("few", "train")
    assert stories == read_back("tiny", "train")
    ids = [token for story in stories for token in large.encode_ordinary(story)]
    counts = Counter(large.decode_single_token_bytes(token) for token in ids)
    assert prepare.load_ranks("few") == prepare.trim_bpe(ranks, counts, 400)
    share = sum(counts[token] for token in prepare.load_ranks("few")) / counts.total()
    assert 0 < share < 1 and load_meta("few")["tokenizer"]["coverage"] == pytest.approx(share)


def test_gpt2_without_a_network_ends_in_one_line(in_prepared, monkeypatch, capsys):
    def offline(name):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(prepare.tiktoken, "get_encoding", offline)
    arguments = ["--dataset=offline", "--input=data/tiny", "--tokenizer=gpt2"]
    assert "--tokenizer=bpe" in error_of(prepare.main, arguments, capsys)


def test_every_text_round_trips(in_prepared):
    encoding, draw = load_tokenizer("tiny"), random.Random(3)
    for _ in range(200):
        text = "".join(chr(draw.choice((draw.randrange(32, 127), draw.randrange(0xA0, 0xD800), 10, 0x1F600)))
                       for _ in range(draw.randrange(40)))
        assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_a_tokenizer_can_be_shared(workplace):
    write_jsonl(workplace / "data/a/s.jsonl", make_stories(100))
    write_jsonl(workplace / "data/b/s.jsonl", make_stories(100, seed=5))
    prepare.main(["--dataset=a", "--val_fraction=0.1"])
    prepare.main(["--dataset=b", "--val_fraction=0.1", "--tokenizer=a"])
    assert load_meta("a")["tokenizer"]["sha256"] == load_meta("b")["tokenizer"]["sha256"]


# --- bad input, and bins that do not fit ------------------------------------------------------------------------


@pytest.mark.parametrize("file, content, expected", [
    ("s.txt", b"Once\nupon a time\x92", "s.txt line 2 is not UTF-8: save the file as UTF-8"),
    ("s.jsonl", b'{"story": "Hi\x92"}\n', "s.jsonl line 1 is not UTF-8: save the file as UTF-8"),
    ("s.jsonl", b'{"story": "Hi."}\n{"story": ', 's.jsonl line 2 is not a JSON object with a "story": correct'),
    ("s.jsonl", b'{"text": "Hi.", "id": 1}\n', 's.jsonl line 1 has no text in "story": it has text, id; name one'),
    ("s.csv", b"id,text\n1,Hi.\n", 's.csv story 1 has no text in "story": it has id, text; name one'),
    ("s.jsonl", b'7\n', "s.jsonl line 1 has no text"),
    ("s.jsonl", b'{"story": "\\ud83d"}\n', "s.jsonl line 1 has half a surrogate pair"),
    ("s.jsonl", b"\n <!DOCTYPE html>\n", "s.jsonl is a page of HTML"),
    ("s.txt", b"<HTML><body>", "s.txt is a page of HTML"),
    ("s.csv", b"PK\3\4 and more", "unpack it first"),
    ("val.txt", b"Once upon a time. " * 9, "rename it"),
    ("s.txt", b"", "no story in "),
    ("s.md", b"Once.", "no .txt or .jsonl file"),
    ("s-train.txt", b"Once upon a time. " * 9, "only one story for train in "),
    ("s-train.txt", b"Once upon a time. " * 9 + b"<|endoftext|>" + b"One fine day. " * 9, "--val_fraction="),
])
def test_bad_input_ends_in_one_line(workplace, file, content, expected, capsys):
    (workplace / file).write_bytes(content)
    assert expected in error_of(prepare.main, ["--dataset=x", f"--input={workplace}"], capsys)
    assert not os.path.exists("data/x")


def test_broken_records_are_dropped_counted_and_shown(workplace, monkeypatch, capsys):
    lines = [json.dumps({"story": r["story"]}).encode() for r in make_stories(60)]
    lines[7:7] = [b'{"story": null}', b'{"story": "\\ud83d half"}', b'{"story": "cut', b"[1]", b'{"story": "caf\xe9"}',
                  b"null", b'{"story": "a cat", "spans": [{"start": "2", "end": 5, "skill": "fact", "wrong": "dog"}]}']
    (workplace / "s.jsonl").write_bytes(b"\n".join(lines))
    (workplace / "s.json").write_bytes(b"[" + b",\n".join(lines) + b"]")
    for chunk_bytes, name, place in (1000, "s.jsonl", "line"), (10**6, "s.json", "story"):
        monkeypatch.setattr(records, "CHUNK_BYTES", chunk_bytes)
        prepare.main(["--dataset=x", f"--input={name}", "--val_fraction=0.2"])
        assert sorted(read_back("x", "train") + read_back("x", "val")) == sorted(r["story"] for r in make_stories(60))
        output = capsys.readouterr()
        assert " 7 broken: removed" in output.out or name == "s.json"
        assert f"{name} {place} 8 has no text" in output.err and f"{place} 9 has half a surrogate" in output.err


def test_a_very_long_word_takes_no_more_time_than_others(workplace):
    stories = [r["story"] for r in make_stories(60)] + ["ab" * 150_000 + ".", "a" * 300_000 + "."]
    val = [{"story": r["story"], "split": "val"} for r in make_stories(70)[60:]]
    write_jsonl(workplace / "s.jsonl", [{"story": s, "split": "train"} for s in stories] + val)
    started = time.time()
    prepare.main(["--dataset=x", "--input=s.jsonl", "--val_fraction=0.2", "--instruct"])
    assert time.time() - started < 5 and read_back("x", "train")[-1].endswith(stories[-1])


def test_input_that_is_not_there_ends_in_one_line(workplace, capsys):
    assert "s.mobi does not exist: name a" in error_of(prepare.main, ["--dataset=x", "--input=s.mobi"], capsys)
    assert "python -m lab.world" in error_of(prepare.main, [], capsys)


@pytest.mark.parametrize("arguments, expected", [
    (["--max_storys=3"], "did you mean --max_stories"),
    (["--max_stories=0"], "--max_stories=0 must be at least 1"),
    (["--vocab_size=256"], "--vocab_size=256 must be at least 257"),
    (["--vocab_size=70000"], "--vocab_size=70000 must be at most 65535"),
    (["--val_fraction=2"], "--val_fraction=2.0 must be at most 1"),
    (["--version=3"], "--version"),
    (["--version=1", "--input=s.txt"], "leave one of them out"),
    (["--instruct", "--hold_out=word+summary"], "names other fields than features"),
    (["--hold_out=words+summary"], "add --instruct"),
    (["--tokenizer=a", "--vocab_size=600"], "leave --vocab_size out"),
    (["--dataset=/some/path"], "must name a folder under data/"),
    (["--dataset=a/x"], "must name a folder under data/"),
    (["--dataset=a:1,b"], "must name a folder under data/"),  # train.py could not name it
    (["--dataset="], "must name a folder"),
])
def test_options_that_make_no_sense_end_in_one_line(workplace, arguments, expected, capsys):
    assert expected in error_of(prepare.main, ["--dataset=x"] + arguments, capsys)


def test_a_workers_error_reaches_the_user(workplace):
    story = {**make_stories(10)[9], "split": "val"}
    story["spans"][0]["skill"] = "juggling"
    write_jsonl(workplace / "data/x/s.jsonl", make_stories(9) + [story])
    with pytest.raises(SystemExit, match="juggling.*grammar"):
        prepare.main(["--dataset=x", "--clean=False"])


def test_readers_notice_bins_that_are_cut_off_or_mixed_up(workplace):
    write_jsonl(workplace / "data/x/s.jsonl", make_stories(60))
    prepare.main(["--dataset=x", "--val_fraction=0.2"])
    tokens = os.path.getsize("data/x/train.bin") // 2
    os.truncate("data/x/train.bin", 24)
    with pytest.raises(SystemExit, match=f"train.bin has 24 bytes, meta.json says {2 * tokens:,}: .*--dataset=x"):
        load_tokens("x", "train")
    with open("data/x/tokenizer.tiktoken", "a") as f:
        f.write("YWFh 999\n")
    with pytest.raises(SystemExit, match="tokenizer.tiktoken is not the one"):
        load_meta("x")
    with pytest.raises(SystemExit, match="no dataset in data/y: run python prepare.py --dataset=y"):
        load_meta("y")
    os.remove("data/x/train.bin")
    Path("data/x/meta.json").write_text("{")
    with pytest.raises(SystemExit, match="no dataset in data/x"):
        load_tokens("x", "train")


def test_a_dataset_that_is_not_there_ends_in_one_line_that_names_those_that_are(workplace):
    with pytest.raises(SystemExit, match="no dataset in data/typo: .*--dataset=typo.*--input.*python -m lab.world"):
        load_meta("typo")
    for name in ("b", "a"):
        write_jsonl(workplace / f"data/{name}/s.jsonl", make_stories(60))
        prepare.main([f"--dataset={name}", "--val_fraction=0.2"])
    (workplace / "data/stories_alone").mkdir()
    with pytest.raises(SystemExit, match="no dataset in data/typo: .*--dataset=typo.* one that exists: a, b$"):
        load_meta("typo")


def test_a_small_val_split_is_mentioned(workplace, capsys):
    write_jsonl(workplace / "train.jsonl", make_stories(50))
    for n, warned in ((4, True), (120, False)):
        write_jsonl(workplace / "val.jsonl", make_stories(n, seed=1))
        prepare.main(["--dataset=x", f"--input={workplace}"])
        printed = capsys.readouterr().out
        assert (f"only {n} stories for validation: figures will be noisy; raise --val_fraction" in printed) == warned


def test_a_vocabulary_that_uint16_cannot_hold_is_refused(workplace, capsys):
    write_jsonl(workplace / "data/x/s.jsonl", make_stories(60))
    ranks = {token.to_bytes(3, "little"): token for token in range(65_535)}
    (workplace / "big").mkdir()
    (workplace / "big/tokenizer.tiktoken").write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    line = error_of(prepare.main, ["--dataset=x", "--tokenizer=big", "--val_fraction=0.2"], capsys)
    assert "65,536 does not fit" in line and os.listdir("data/x") == ["s.jsonl"]


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_ctrl_c_ends_in_one_line(workplace):
    """A terminal sends Ctrl-C to the workers too."""
    write_jsonl(workplace / "data/x/s.jsonl", make_stories(20_000))
    process = subprocess.Popen([sys.executable, ROOT / "prepare.py", "--dataset=x"], start_new_session=True,
                               stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not os.path.exists("data/x/unfinished/train.bin"):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    message = process.communicate(timeout=120)[1]
    assert message.startswith("interrupted: data/x is unchanged") and message.count("\n") == 1
    assert process.returncode == -signal.SIGINT and os.listdir("data/x") == ["s.jsonl"]


def test_labels_of_an_earlier_run_do_not_stay(workplace):
    write_jsonl(workplace / "data/x/s.jsonl", make_stories(60))
    prepare.main(["--dataset=x", "--val_fraction=0.2"])
    assert os.path.exists("data/x/val.skills.bin")
    write_jsonl(workplace / "data/x/s.jsonl", [{"story": r["story"]} for r in make_stories(60)])
    prepare.main(["--dataset=x", "--val_fraction=0.2"])
    assert not os.path.exists("data/x/val.skills.bin")


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_a_killed_run_leaves_the_earlier_bins(workplace):
    write_jsonl(workplace / "data/x/s.jsonl", make_stories(60))
    prepare.main(["--dataset=x", "--val_fraction=0.2"])
    before = read_back("x", "train")
    write_jsonl(workplace / "data/x/s.jsonl", make_stories(60_000))
    process = subprocess.Popen([sys.executable, ROOT / "prepare.py", "--dataset=x"], start_new_session=True)
    while process.poll() is None and not os.path.exists("data/x/unfinished/train.bin"):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert read_back("x", "train") == before


# --- download -----------------------------------------------------------------------------------------------------

FILE = bytes(random.Random(0).randbytes(300_000))


@pytest.fixture
def server():
    """A real HTTP server that serves FILE, and misbehaves as `server.faults` says, one fault for each request."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.ranges.append(self.headers.get("Range"))
            fault = self.server.faults.pop(0) if self.server.faults else ""
            if fault in (503, 404):
                return self.send_error(fault)
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            start = 0 if fault == "ignores Range" else start
            if start >= len(FILE):
                return self.send_error(416)
            body, total = FILE[start:], len(FILE) + 50 * (fault == "claims more")
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            self.send_header("Content-Length", str(total - start))
            self.end_headers()
            self.wfile.write(body[:len(body) // 2] if fault == "breaks off" else body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.faults, server.ranges, server.url = [], [], f"http://127.0.0.1:{server.server_port}/file"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()  # shutdown() waits so long
    yield server
    server.shutdown()
    server.server_close()


def fetch(server, path, mark=b""):
    files.download(server.url, str(path), mark, retries=3, wait=0.01)
    assert not os.path.exists(f"{path}.part")
    return path.read_bytes()


def test_download_goes_on_where_it_broke_off(server, tmp_path):
    server.faults += ["breaks off", "breaks off", 503, 503]
    assert fetch(server, tmp_path / "f") == FILE
    starts = [int(sent[6:-1]) for sent in server.ranges]
    assert starts[0] == 0 < starts[1] < starts[2] == starts[3] == starts[4]  # a 503 brings nothing


def test_download_goes_on_after_an_earlier_run(server, tmp_path):
    (tmp_path / "f.part").write_bytes(FILE[:1000])
    assert fetch(server, tmp_path / "f") == FILE
    assert server.ranges == ["bytes=1000-"]
    (tmp_path / "g.part").write_bytes(FILE)  # all there, but not yet renamed
    assert fetch(server, tmp_path / "g") == FILE
    (tmp_path / "h.part").write_bytes(FILE + b"of another file")
    assert fetch(server, tmp_path / "h") == FILE


def test_download_from_a_server_without_ranges(server, tmp_path):
    server.faults += ["breaks off", "ignores Range"]
    assert fetch(server, tmp_path / "f") == FILE


def test_download_with_a_length_that_is_a_lie(server, tmp_path):
    server.faults += ["claims more"]  # once: asked for the rest, it admits that there is none
    assert fetch(server, tmp_path / "f") == FILE
    server.faults += 20 * ["claims more"]  # always: a file of another length is never taken for complete
    with pytest.raises(SystemExit, match="cannot download"):
        fetch(server, tmp_path / "g")
    assert not (tmp_path / "g").exists() and len(server.ranges) < 12


def test_download_gives_up_in_one_line(server, tmp_path):
    server.faults += 4 * [503]
    with pytest.raises(SystemExit, match="503.*--input=FILE.*python -m lab.world"):
        fetch(server, tmp_path / "f")
    assert len(server.ranges) == 4
    server.faults += [404]
    with pytest.raises(SystemExit, match="404.*--url"):
        fetch(server, tmp_path / "f")


def test_a_page_in_place_of_the_file_is_not_kept(server, tmp_path):
    """A proxy or a login may answer with 200 and a page of its own."""
    assert fetch(server, tmp_path / "f", FILE[5000:5050]) == FILE
    with pytest.raises(SystemExit, match="begins with.*--url"):
        fetch(server, tmp_path / "g", b"<|endoftext|>")
    assert os.listdir(tmp_path) == ["f"]


def test_no_network(tmp_path):
    with pytest.raises(SystemExit, match="--input=FILE.*python -m lab.world"):
        files.download("http://127.0.0.1:9/file", str(tmp_path / "f"), retries=2, wait=0.01)


@pytest.fixture
def tinystories(workplace):
    """The option --url of a server that has the published files of both versions, small ones."""
    folder = workplace / "served"
    folder.mkdir()
    for version, names in records.VERSIONS.items():
        stories = make_stories(110, seed=version)
        for name, part in zip(names, (stories[:100], stories[100:])):
            (folder / name).write_text("\n<|endoftext|>\n".join(r["story"] for r in part), encoding="utf-8")
    with tarfile.open(folder / records.ARCHIVE, "w:gz") as archive:
        for number in range(3):
            part = make_stories(150, seed=3)[number * 50:number * 50 + 50]
            shard = [{"story": "\n\n" + r["story"], "instruction": {"prompt:": "Write", "words": r["words"],
                      "features": ["Dialogue"]}, "summary": r["summary"], "source": "GPT-4"} for r in part]
            for name, content in ((f"data{number:02}.json", json.dumps(shard)), (f"._data{number:02}.json", "junk")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content.encode()))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"--url=http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_tinystories_is_downloaded_and_prepared(tinystories):
    prepare.main(["--dataset=tinystories", tinystories])
    assert read_back("tinystories", "train") == [r["story"] for r in make_stories(100, seed=2)]
    source = load_meta("tinystories")["source"]
    files = [(os.path.basename(file["file"]), file["split"]) for file in source]
    assert files == list(zip(records.VERSIONS[2], ("train", "val")))


def test_any_dataset_can_be_a_version_of_tinystories(tinystories):
    prepare.main(["--dataset=v1", "--version=1", tinystories])
    assert read_back("v1", "train") == [r["story"] for r in make_stories(100, seed=1)]
    before = load_meta("v1")
    prepare.main(["--dataset=v1"])  # the texts are there now
    assert load_meta("v1") == before


@pytest.mark.parametrize("texts_stay", [True, False])
def test_a_second_version_of_tinystories_does_not_replace_the_first(tinystories, texts_stay, capsys):
    """Neither where the texts of the first lie in the folder, nor where only bins are left of them."""
    prepare.main(["--dataset=tinystories", "--version=1", tinystories])
    before = read_back("tinystories", "train")
    if not texts_stay:
        for name in records.VERSIONS[1]:
            os.remove(f"data/tinystories/{name}")
    files = sorted(os.listdir("data/tinystories"))
    for arguments in (["--version=2"], []):  # 2 is what tinystories is by default
        line = error_of(prepare.main, ["--dataset=tinystories", tinystories] + arguments, capsys)
        assert "python prepare.py --dataset=tinystories-v2 --version=2" in line
    assert read_back("tinystories", "train") == before and sorted(os.listdir("data/tinystories")) == files
    prepare.main(["--dataset=tinystories-v2", "--version=2", tinystories])  # what the message says
    prepare.main(["--dataset=tinystories", "--version=1", "--vocab_size=400", tinystories])  # the same one again


def test_a_folder_with_both_versions_of_tinystories_is_no_input(tinystories, workplace, capsys):
    line = error_of(prepare.main, ["--dataset=both", f"--input={workplace / 'served'}"], capsys)
    assert "mix versions 1 and 2" in line and "--dataset=tinystories-v1" in line
    assert not os.path.exists("data/both")


def test_a_part_of_one_version_of_tinystories_may_take_the_place_of_a_part_of_another(tinystories, workplace):
    for number, (train, valid) in records.VERSIONS.items():
        os.makedirs(f"v{number}")
        for name in (train, valid):
            os.rename(workplace / "served" / name, f"v{number}/{name}")
        prepare.main(["--dataset=part", f"--input=v{number}", "--max_stories=50"])
        assert load_meta("part")["source"][0]["file"] == f"v{number}/{train}"


def test_own_stories_do_not_replace_the_world(workplace, capsys):
    write_jsonl(workplace / "mine.jsonl", make_stories(20))
    assert "add --dataset=NAME" in error_of(prepare.main, ["--input=mine.jsonl"], capsys)


def test_the_archive_of_tinystories_has_instructions(tinystories, capsys):
    """Its validation split is drawn, and stories of the published validation files beside it are kept out of train."""
    published = [r["story"] for r in make_stories(30, seed=3)]
    os.makedirs("data/tinystories")
    Path("data/tinystories", records.VERSIONS[2][1]).write_text("\n<|endoftext|>\n".join(published), encoding="utf-8")
    prepare.main(["--dataset=tinystories", "--version=all", "--instruct", "--val_fraction=0.2", tinystories])
    assert "--instruct" not in capsys.readouterr().err  # nothing is missing
    splits = {split: [text.split("Story:\n") for text in read_back("tinystories", split)] for split in ("train", "val")}
    stories = [r["story"] for r in make_stories(150, seed=3)]
    val = {story for _, story in splits["val"]}
    assert [story for _, story in splits["train"]] == [s for s in stories if s not in val and s not in published]
    assert val < set(stories) and 15 < len(val) < 45 and val & set(published)
    before = Counter(line.split(":")[0] for head, _ in splits["train"] for line in head.splitlines())
    assert min(before[name] for name in ("Features", "Words", "Summary", "Random sentence")) > 10
    assert any("Features: dialogue\n" in head for head, _ in splits["train"])
    assert not os.path.exists("data/tinystories/unfinished")
    assert "mix versions" in error_of(prepare.main, ["--dataset=tinystories", tinystories], capsys)
    prepare.main(["--dataset=tinystories", "--instruct", "--val_fraction=0.2", "--version=all", "--url=http://x"])

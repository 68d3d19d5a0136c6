"""lab/label.py: what it says of a story stands in it, and a model of labelled stories is graded by the same rules."""
import json
from collections import Counter

import pytest

from common.dataset import load_meta
from conftest import write_jsonl
from generate import load_words, missing_words
from lab import completions, label
from prepare import main as prepare

STORIES = {
    "dialogue": 'Tim met a fox. "Hello," said Tim. "Hello," said the fox. They played all day with a red ball.',
    "bad ending": "A small cat ran far away. It rained and the cat was cold. It never found its home again and cried.",
    "moral value": "Sam took the red ball of a friend. Then he gave it back. Sam learned that it is good to ask first.",
    "": "Lily saw a big dog in the park. The dog jumped over a box. Lily laughed, and they went home to eat some cake.",
}


@pytest.fixture
def labelled(workplace):
    """200 stories, 50 of each kind, in a dataset whose files say what is for training."""
    for split, numbers in ("train", range(40)), ("valid", range(40, 50)):
        text = "\n<|endoftext|>\n".join(f"It was day {n}. {story}" for n in numbers for story in STORIES.values())
        (workplace / f"plain-{split}.txt").write_text(text)
    prepare(["--dataset=plain", f"--input={workplace}", "--vocab_size=400"])
    label.main(["--dataset=plain"])
    with open("data/labelled/stories.jsonl") as file:
        return [json.loads(line) for line in file]


def test_words_and_features_stand_in_the_stories_that_have_them(labelled):
    assert len(labelled) == 200 and Counter(record["split"] for record in labelled) == {"train": 160, "val": 40}
    for record in labelled:
        assert record["story"].split(". ", 1)[1] == STORIES[", ".join(record["features"])]
        assert len(set(record["words"])) == 3 and not missing_words(record["words"], record["story"])
    drawn = Counter(record["words"][1] for record in labelled if "Tim met" in record["story"])
    assert drawn["fox"] > drawn["day"] + 10  # "day" is in all of the 200 stories, "fox" in 50
    label.main(["--dataset=plain", "--name=few", "--max_stories=8"])
    with open("data/few/stories.jsonl") as file:
        few = [json.loads(line)["story"] for line in file]
    assert few == [labelled[i]["story"] for i in (*range(8), *range(160, 168))]


def test_a_label_depends_on_the_story_and_the_counts_alone():
    forms = label.known_forms(load_words(label.WORDS_FILE))
    counts = [Counter(found) for found in label.words_in(STORIES["dialogue"], forms)]
    assert label.label(STORIES["dialogue"], forms, counts) == label.label(STORIES["dialogue"], forms, counts)
    assert label.label("Zorv blick.", forms, counts) == {"words": [], "features": []}


def test_labelled_stories_are_graded_by_the_rules_that_labelled_them(labelled, workplace):
    prepare(["--dataset=labelled", "--instruct=True", "--tokenizer=plain"])
    assert load_meta("labelled")["train"]["stories"] == 160
    tests = completions.feature_tests("labelled")
    assert tests == label.FEATURE_RULES
    for record in labelled[:40]:
        record["features"] += {"moral value"}.difference(record["features"])  # a large model may see more than the rule
    write_jsonl(workplace / "data/labelled/stories.jsonl", labelled)
    tests = completions.feature_tests("labelled")
    assert tests["moral value"] != label.FEATURE_RULES["moral value"]
    assert tests["bad ending"] == label.FEATURE_RULES["bad ending"]


def test_features_are_found_however_records_write_them(workplace):
    """As prepare.py --instruct reads them: in a field of another name, as text, and with capitals."""
    write_jsonl(workplace / "mine.jsonl", [
        {"body": f"It was day {n}. {story}", "Features": kind.replace("bad ending", "BadEnding") or None}
        for n in range(60) for kind, story in STORIES.items()])
    prepare(["--dataset=mine", "--input=mine.jsonl", "--field=body", "--instruct", "--vocab_size=400"])
    assert {"dialogue", "bad ending"} <= set(completions.feature_tests("mine"))


def test_nothing_is_overwritten_and_a_missing_file_is_named(labelled, workplace):
    before = (workplace / "data/labelled/stories.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="choose another --name"):
        label.main(["--dataset=plain"])
    assert (workplace / "data/labelled/stories.jsonl").read_bytes() == before
    (workplace / "plain-train.txt").unlink()
    with pytest.raises(SystemExit, match="plain-train.txt"):
        label.main(["--dataset=plain", "--name=again"])
    assert not (workplace / "data/again").exists()


def test_what_else_records_say_stays(workplace, capsys):
    records = [{"story": f"It was day {n}. {STORIES['']}", "summary": "Lily saw a dog.", "words": ["sing"]}
               for n in range(60)]
    write_jsonl(workplace / "data/mine/mine-train.jsonl", records)
    prepare(["--dataset=mine", "--vocab_size=400", "--val_fraction=0.3"])
    for name in ("", "mine"):
        with pytest.raises(SystemExit, match="--name must be"):
            label.main(["--dataset=mine", f"--name={name}"])
    capsys.readouterr()
    label.main(["--dataset=mine"])
    _, _, printed = capsys.readouterr().out.partition("python prepare.py ")
    with open("data/labelled/stories.jsonl") as file:
        told = [json.loads(line) for line in file]
    assert [record["summary"] for record in told] == ["Lily saw a dog."] * 60
    assert all("sing" not in record["words"] and "split" not in record for record in told)
    prepare(printed.split())
    assert load_meta("labelled")["val"]["stories"] == load_meta("mine")["val"]["stories"] > 0


def test_text_that_was_split_at_lines_is_not_taken_for_one_story(workplace):
    (workplace / "lines.txt").write_text("".join(f"It was day {n}. {STORIES['']}\n" for n in range(60)))
    prepare(["--dataset=lines", "--input=lines.txt", "--split=line", "--vocab_size=400", "--val_fraction=0.3"])
    with pytest.raises(SystemExit, match="endoftext"):
        label.main(["--dataset=lines"])
    assert not (workplace / "data/labelled").exists()


def test_how_far_a_story_follows_instructions():
    story = 'Lily ran to the dog. "Hello," she said. "Hello," said the dog. In the end, Lily was sad and alone.'
    fields = {"words": "run, dog, blue, kite", "features": "dialogue, moral value, plot twist",
              "summary": "Lily meets a dog, and is alone.", "sentence": "Lily was glad."}
    assert label.share_followed(fields, story) == 2 / 4 + 1 / 2 + 2 / 3 + 0  # "plot twist" cannot be told by rule
    assert label.share_followed({"sentence": "Lily ran to the dog."}, story) == 1
    assert label.share_followed({"features": "plot twist"}, story) == label.share_followed({}, story) == 0

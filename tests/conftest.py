"""What several tests need: a small corpus, and a folder to work in that holds it prepared."""
import json
import random

import pytest
import torch

import train
from prepare import main as prepare

torch.set_num_threads(2)


def make_stories(n, seed=0):
    """n little stories, different from each other, each with one span for each skill."""
    draw = random.Random(seed)
    names, places = ["Lily", "Tim", "Ben", "Sara", "Zoë", "Max"], ["park", "river", "garden", "hill", "shop"]
    things, looks = ["ball", "kite", "hat", "boat", "drum", "cake"], ["red", "big", "old", "soft", "tiny", "blue"]
    stories = []
    for i in range(n):
        name, place = draw.choice(names), draw.choice(places)
        (thing, other), (look, look2) = draw.sample(things, 2), draw.sample(looks, 2)
        text = (f"Once upon a time {name} went to the {place} with a {look} {thing} and a {look2} {other}.\n"
                f"“Do you want the {thing}?” asked Mom. {name} said no, and took the {other} number {i} home. "
                f"They were happy, and {name} slept well.")
        start = text.index(f"took the {other}") + 9
        spans = [{"start": start, "end": start + len(other), "skill": "reasoning", "wrong": thing}]
        stories.append({"story": text, "words": [thing, look], "features": ["dialogue"], "spans": spans,
                        "summary": f"{name} takes the {other} home.", "bits": 20.0})
    return stories


def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with data/tiny, 300 stories prepared with a vocabulary of 512."""
    folder = tmp_path_factory.mktemp("prepared")
    write_jsonl(folder / "data/tiny/stories.jsonl", make_stories(300))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare(["--dataset=tiny", "--vocab_size=512", "--val_fraction=0.1"])
    return folder


@pytest.fixture
def in_prepared(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    return prepared


@pytest.fixture(scope="session")
def run(prepared):
    """The folder of a run of 60 steps on data/tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(prepared)
        train.main(["--dataset=tiny", "--n_layer=2", "--n_embd=64", "--block_size=64", "--max_steps=60", "--evals=0",
                    "--out_dir=out/sampled", "--batch_tokens=1024", "--compile=False", "--device=cpu"])
    return "out/sampled"

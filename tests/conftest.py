"""What several tests need: a small corpus, and a folder to work in that holds it prepared."""
import json
import os
import random
import signal
from types import SimpleNamespace

# Such small models gain nothing by a second thread, and on a busy machine threads mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import train
from common.dataset import load_meta, split_stories
from common.results import Subject
from common.tokenizer import load_tokenizer
from prepare import main as prepare

# A shell can have told tests in its background to ignore these, and what they start would ignore them too.
for number in {signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)}:
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler)


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


class Parrot(torch.nn.Module):
    """Knows stories by heart: after a beginning of one of them it goes on as that one does."""

    def __init__(self, tokens, eot, vocab_size):
        super().__init__()
        self.head, self.eot = torch.nn.Linear(1, 1), eot
        self.config = SimpleNamespace(block_size=512, vocab_size=vocab_size, n_layer=0, n_head=1, n_embd=1)
        self.next = {}
        for story in split_stories(tokens, eot):
            story = story.tolist() + [eot]
            self.next.update({tuple(story[:i]): story[i] for i in range(len(story))})

    def forward(self, idx, cache):
        cache.text = torch.cat((cache.text, idx), 1) if cache.length else idx
        cache.length += idx.size(1)
        logits = torch.full((len(idx), 1, self.config.vocab_size), -1e9)
        for row, text in zip(logits, cache.text.tolist()):
            row[0, self.next.get(tuple(text[1:]), self.eot)] = 0
        return logits


def stand_in(model, dataset, before=""):
    """A model that is no run, ready to be graded."""
    meta = load_meta(dataset)
    return Subject(model, load_tokenizer(dataset), meta["tokenizer"]["sha256"], [dataset], before, [], {}, "")


def error_of(main, options, capsys):
    """The line in which main(options) ends, whether of a bad command line or of something else a user can cause."""
    with pytest.raises(SystemExit) as end:
        main(options)
    line = capsys.readouterr().err.strip() if end.value.code == 2 else end.value.code
    assert line and "\n" not in line, line
    return line


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


@pytest.fixture
def fine(in_prepared):
    """data/fine: stories of more than 75 tokens, since its vocabulary is small, no two of which begin alike."""
    if not os.path.exists("data/fine/meta.json"):
        write_jsonl(in_prepared / "data/fine/stories.jsonl", [
            {"story": f"Tale {i}. {record['story']}"} for i, record in enumerate(make_stories(300))])
        prepare(["--dataset=fine", "--vocab_size=280", "--val_fraction=0.1"])

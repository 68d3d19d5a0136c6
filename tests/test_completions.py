"""lab/completions.py: what is counted in completions, and of instructions followed, is what a plain count gives."""
import re

import numpy as np
import pytest
import torch

import eval
from common.results import read_results
from common.dataset import load_meta, load_tokens
from common.tokenizer import load_tokenizer
from conftest import Parrot, make_stories, stand_in, write_jsonl
from lab import completions
from prepare import main as prepare
from sample import write_stories

PROMPTS = ["Once upon a time Tim went to the", "One day Lily saw a red ball and", "Mom said, \"You may not take"]


def load(run):
    return eval.load_subject(run, torch.device("cpu"))


def test_completions_are_those_of_one_prompt_alone(run, in_prepared):
    subject = load(run)
    found = completions.complete(subject, PROMPTS, 40, each=2)
    for i, prompt in enumerate(PROMPTS):
        begin = subject.encoding.encode_ordinary(prompt)
        alone = write_stories(subject.model, subject.encoding, prompt, 40, [2 * i + 1, 2 * i + 2], temperature=1.0)
        assert [begin + ids for ids in found[i]] == alone


def test_what_is_counted_in_completions(run, in_prepared, tmp_path):
    """Everything again, story by story."""
    subject = load(run)
    completed = completions.complete(subject, PROMPTS, 60, each=3)
    found = completions.grade_completions(subject, completed, 60)
    ids = [ids for some in completed for ids in some]
    told = [subject.encoding.decode(row) for row in ids]
    words = [re.findall(r"[^\W\d_]+", text.lower()) for text in told]
    assert found["length in words"][0] == pytest.approx(np.mean([len(w) for w in words]))
    fours = [list(zip(w, w[1:], w[2:], w[3:])) for w in words]
    assert found["4-grams that repeat one of the same text"][0] == pytest.approx(
        sum(len(f) - len(set(f)) for f in fours) / sum(map(len, fours)))
    pairs = [set(zip(w, w[1:])) for w in words]
    assert found["Rouge-2 with the likest other"][0] == pytest.approx(np.mean([max(
        2 * len(a & b) / (len(a) + len(b)) for j, b in enumerate(pairs) if i != j) for i, a in enumerate(pairs)]))
    assert found["ended by themselves"][0] == pytest.approx(np.mean([len(row) < 60 for row in ids]))


def test_instructions_followed(workplace, monkeypatch):
    """A parrot of the validation stories has what their instructions ask for; one that knows nothing has not."""
    records = make_stories(600)
    for i, r in enumerate(records):
        r.update(words=["took", r["words"][0], "went"], summary=r["summary"].replace("takes", "took"))
        if i % 3 == 0:
            r["features"].append("bad ending")
            r["story"] = r["story"].replace("They were happy", "They were not happy")
    write_jsonl(workplace / "data/x/stories.jsonl", records)
    prepare(["--dataset=asked", "--input=data/x", "--instruct", "--hold_out=words+summary", "--vocab_size=512",
             "--val_fraction=0.2"])
    assert set(completions.feature_tests("asked")) == {"bad ending"}  # most stories have dialogue, so it has no signs
    meta = load_meta("asked")
    encoding = load_tokenizer("asked")
    heads = [encoding.decode(ids.tolist()).partition("Story:")[0] for ids in
             eval.split_stories(load_tokens("asked", "train"), encoding.eot_token)]
    assert len(heads) > 400 and not any("Words:" in head and "Summary:" in head for head in heads)
    parrot = Parrot(load_tokens("asked", "val"), meta["eot"], meta["vocab_size"])
    found = completions.grade_instructions(stand_in(parrot, "asked"), "asked", 150)
    told = ("words used", "features present", "sentences included", "summary's words used")
    assert set(found) == {f"{what}, {group} combinations" for group in ("seen", "held-out")
                          for what in (*told, "another's words", "another's features", "another's summary's words")}
    assert all((value == [1, 1, 1]) == what.startswith(told) for what, value in found.items())
    assert all(0 < value[0] < 1 for what, value in found.items() if what.startswith("another"))
    complete = completions.complete
    with monkeypatch.context() as patch:  # the better of two stories counts
        patch.setattr(completions, "complete", lambda subject, prompts, n, each=1, **title: [
            [[], *good] for good in complete(subject, prompts, n, **title)])
        best = completions.grade_instructions(stand_in(parrot, "asked"), "asked", 150, best_of=2)
    assert all(best[f"words used, {group} combinations"] == [1, 1, 1] for group in ("seen", "held-out"))
    parrot.next = {}
    found = completions.grade_instructions(stand_in(parrot, "asked"), "asked", 150)
    assert all(value == [0, 0, 0] for value in found.values())


def test_completions_are_added_to_the_results(run, in_prepared, capsys):
    (in_prepared / "prompts.json").write_text('["Once upon a time", "One day"]')
    completions.main([run, "--prompts=prompts.json", "--each=2", "--max_tokens=10", "--device=cpu"])
    results = read_results(load(run))
    out = capsys.readouterr().out
    assert "--each=2" in results["completions"]["measured with"] and "length in words" in out
    assert out.startswith(f"{run}: completions (--each=2")  # says which run, even if it was the newest

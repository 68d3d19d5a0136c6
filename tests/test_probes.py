"""The probes and story beginnings that eval.py grades with: well formed, and not to be had without the skill."""
import json
import re
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).parent.parent / "data"
PROBES = json.loads((DATA / "probes.json").read_text())
PROMPTS = json.loads((DATA / "prompts.json").read_text())
BEGINNINGS = json.loads((DATA.parent / "course" / "13_beginnings.json").read_text())
SKILLS = ["grammar", "fact", "context", "reasoning"]
REASONING = ["exclusion", "exchange", "either-or", "negation", "absence", "comparison", "consequence"]


def mentions(probe, continuation):
    """Character positions at which a continuation already stands in its prompt."""
    return [m.start() for m in re.finditer(rf"\b{re.escape(continuation.strip())}\b", probe["prompt"], re.IGNORECASE)]


SHORTCUTS = {  # what a reader without the skill could go by: the mentioned candidate with the highest number is taken
    "nearest mentioned": lambda places: places[-1],
    "farthest mentioned": lambda places: -places[-1],
    "first mentioned": lambda places: -places[0],
    "last introduced": lambda places: places[0],
    "most often mentioned": len,
    "least often mentioned": lambda places: -len(places),
}


def passes(probe, numbers):
    """Probability that taking the candidate with the highest number passes; ties, or no numbers at all, are drawn."""
    taken = [c for c in numbers if numbers[c] == max(numbers.values())] or probe["right"] + probe["wrong"]
    return sum(c in probe["right"] for c in taken) / len(taken)


def shortcut_passes(probe, shortcut):
    places = {c: mentions(probe, c) for c in probe["right"] + probe["wrong"]}
    return passes(probe, {c: SHORTCUTS[shortcut](places[c]) for c in places if places[c]})


def test_fields():
    for probe in PROBES + BEGINNINGS:
        assert list(probe) == ["skill", "kind", "prompt", "right", "wrong"]
        assert 1 <= len(probe["right"]) <= 3 and len(probe["wrong"]) >= 2, probe
        assert probe["prompt"] == probe["prompt"].strip() and probe["prompt"].isascii(), probe


def test_enough_of_every_skill_and_kind():
    skills = Counter(p["skill"] for p in PROBES)
    assert len(PROBES) >= 220 and set(skills) == set(SKILLS)
    assert min(skills.values()) >= 50
    for skill in skills:
        assert len({p["kind"] for p in PROBES if p["skill"] == skill}) >= 4
    kinds = Counter(p["kind"] for p in PROBES if p["skill"] == "reasoning")
    assert set(kinds) == set(REASONING) and min(kinds.values()) >= 7


def test_no_duplicates():
    assert len({p["prompt"].lower() for p in PROBES}) == len(PROBES)
    assert len({p.lower() for p in PROMPTS}) == len(PROMPTS)


def test_continuations():
    for probe in PROBES + BEGINNINGS:
        candidates = probe["right"] + probe["wrong"]
        assert len(set(candidates)) == len(candidates), probe
        assert all(re.fullmatch(r" \S+( \S+)*", c) for c in candidates), probe
        # " pen" would also be paid for " pencil", under a tokenizer that splits the longer word
        assert not any(a != b and a.startswith(b) for a in candidates for b in candidates), probe


def test_lengths_alike():
    for probe in PROBES + BEGINNINGS:
        lengths = [len(c) for c in probe["right"] + probe["wrong"]]
        assert max(lengths) <= 2 * min(lengths) + 1, probe


@pytest.mark.parametrize("sign", [1, -1], ids=["longest", "shortest"])
@pytest.mark.parametrize("skill", SKILLS)
def test_length_does_not_give_the_answer(skill, sign):
    probes = [p for p in PROBES if p["skill"] == skill]
    rate = sum(passes(p, {c: sign * len(c) for c in p["right"] + p["wrong"]}) for p in probes) / len(probes)
    assert rate <= 0.5


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("skill", ["context", "reasoning"])
def test_no_shortcut_passes(skill, shortcut):
    probes = [p for p in PROBES if p["skill"] == skill]
    tempting = [p for p in probes if any(mentions(p, c) for c in p["wrong"])]
    assert len(tempting) > 0.8 * len(probes), "the shortcuts find too little to go by"
    assert sum(shortcut_passes(p, shortcut) for p in probes) / len(probes) <= 0.5
    assert sum(passes(p, {}) for p in probes) / len(probes) <= 0.4, "chance alone passes too many"


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_no_shortcut_passes_the_beginnings_of_lesson_13(shortcut):
    assert len(BEGINNINGS) == 20 and sum(shortcut_passes(p, shortcut) for p in BEGINNINGS) / 20 <= 0.55


def test_shortcuts_take_what_they_say():
    probe = {"prompt": "A dog, a dog and a cat.", "right": [" dog"], "wrong": [" cat", " pig"]}
    assert [shortcut_passes(probe, s) for s in SHORTCUTS] == [0, 1, 1, 0, 1, 0]
    probe["prompt"] = "A cow."
    assert shortcut_passes(probe, "nearest mentioned") == pytest.approx(1 / 3)


def test_prompts_stop_in_mid_sentence():
    assert len(PROMPTS) == 50
    for prompt in PROMPTS:
        assert re.search(r"[a-z,]$", prompt), prompt
        assert prompt.isascii() and len(re.findall(r"[.!?]\"? ", prompt)) < 4, prompt


def test_prompts_do_not_repeat_themselves():
    beginnings = Counter(" ".join(p.split()[:2]) for p in PROMPTS)
    assert max(beginnings.values()) <= 4
    for name in ("Lily", "Tim", "Ben", "Tom", "Sue", "Max", "Sam", "Lucy"):  # the names that fill TinyStories
        assert sum(name in re.findall(r"\w+", p) for p in PROMPTS) <= 2, name

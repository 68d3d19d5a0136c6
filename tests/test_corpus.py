"""lab/corpus.py: diversity is what a plain count gives, and memorized text is found wherever it stands."""
import json

import numpy as np
import pytest

from common.dataset import load_meta, load_tokens
from conftest import Parrot, make_stories, stand_in, write_jsonl
from lab import corpus


def test_stories_are_described_side_by_side(workplace, capsys):
    stories = [{"story": r["story"], "words": ["play", "ball", "red"]} for r in make_stories(40)]
    write_jsonl(workplace / "a.jsonl", stories + stories[:10])
    (workplace / "b.txt").write_text("A slide is fun. Sam slid.\n<|endoftext|>\n"
                                     "One day Sam saw a boat. He sat in it.\n")
    corpus.main(["a.jsonl", "b*.txt"])
    table = {line[:36].strip(): line[36:].split("  ") for line in capsys.readouterr().out.splitlines()}
    a, b = corpus.describe("a.jsonl"), corpus.describe("b.txt")
    assert a["stories"] == "50" and a["exact copies"] == "20.00 %"
    assert a["most common opening"] == "Once upon a time 100.00 %"
    assert float(a["near-copies"].split()[0]) >= 20 and b["near-copies"] == "0.00 %"
    assert b["stories"] == "2" and b["words a story"] == "8" and b["distinct words"] == "14"
    assert b["name 1"] == "Sam 50.00 %"  # "Sam slid" begins a sentence, where every word has a capital
    assert b["distinct 1-grams"] == "14 in 16 words" and "requested words used" not in b
    assert 0 < float(a["requested words used"].split()[0]) < 70
    assert [text.strip() for text in table["exact copies"] if text.strip()] == ["20.00 %", "0.00 %"]


def test_a_story_that_repeats_half_of_an_earlier_one_is_a_near_copy():
    draw = np.random.default_rng(0)
    words = ["".join(map(chr, draw.integers(97, 123, 6))) for _ in range(3000)]
    first, second = words[:1000], words[1000:2000]
    texts = [first, second, first[:700] + words[2000:2300], second[:300] + words[2300:3000]]
    figures = corpus.copies([{"story": " ".join(text)} for text in texts])
    assert figures == {"exact copies": "0.00 %", "near-copies": "25.00 %"}


def test_shared_ngrams_against_plain_search():
    draw = np.random.default_rng(0)
    stream = draw.integers(0, 6, 3000).astype(np.uint16)
    queries = [draw.integers(0, 6, n).tolist() for n in (0, 3, 5, 30, 60)] + [stream[100:140].tolist() + [7] * 3]
    ngrams = {tuple(stream[i:i + 5].tolist()) for i in range(len(stream) - 4)}
    shares = []
    for query in queries:
        occurs = [tuple(query[i:i + 5]) in ngrams for i in range(len(query) - 4)]
        shares.append(np.mean(occurs) if occurs else 0)
    assert shares[-1] >= 36 / 39 and any(0 < share < 0.9 for share in shares)
    for piece in (1 << 20, 64, 7):
        assert corpus.shared_ngrams(queries, stream, piece=piece) == pytest.approx(shares)


def test_ngrams_of_the_largest_token_ids_are_told_apart():
    stream = np.array([65534, 65533, 65534, 1, 0, 65534, 65534, 2], np.uint16)
    queries = [[65534, 65533, 65534, 1, 0, 65534], [65534, 65533, 65534, 1, 1, 65534], [1, 0, 65534, 65534, 2]]
    assert corpus.shared_ngrams(queries, stream).tolist() == [1, 0, 1]


def test_without_long_stories_nothing_is_compared():
    assert len(corpus.shared_ngrams([], np.arange(100, dtype=np.uint16))) == 0


def test_a_parrot_is_found_out(fine):
    """A model that knows train by heart repeats the true endings, and writes nothing after the beginnings of val."""
    meta = load_meta("fine")
    parrot = Parrot(load_tokens("fine", "train"), meta["eot"], meta["vocab_size"])
    figures = corpus.memorization(stand_in(parrot, "fine"), "fine", max_tokens=300)
    assert figures["Rouge-2 precision against the true ending, train"] == [1, 1, 1]
    assert figures["Rouge-2 precision against the true ending, val"] is None
    assert figures["5-grams of tokens that stand in train, train completed"] == [1, 1, 1]
    assert figures["5-grams of tokens that stand in train, true endings of val"][0] < 1
    assert figures["5-grams of tokens that stand in train, val completed"] == [0, 0, 0]


def test_memorization_of_a_run_is_printed_and_added_to_its_results(run, fine, capsys):
    corpus.main([run, "--dataset=fine", "--max_tokens=20", "--device=cpu"])
    with open(f"{run}/eval.json", encoding="utf-8") as file:
        figures = json.load(file)["memorization of fine"]
    low, high = figures["5-grams of tokens that stand in train, true endings of val"][1:]
    assert 0 < low <= high <= 1 and "max_tokens=20" in figures["measured with"]
    out = capsys.readouterr().out
    assert out.startswith(f"{run}: memorization of fine (") and "stand in train, val completed" in out


@pytest.mark.parametrize("names, expected", [
    (["c.jsonl"], "no file c.jsonl"),
    (["empty.txt"], "empty.txt holds no story"),
    (["empty.txt", "out/a"], "either files of stories or runs"),
    (["out/a"], "no checkpoint out/a"),
    ([], "python train.py"),
])
def test_bad_input_ends_in_one_line(workplace, names, expected):
    (workplace / "empty.txt").write_text("")
    with pytest.raises(SystemExit, match=expected) as end:
        corpus.main(names)
    assert "\n" not in str(end.value)

"""eval.py: the metric scores every token once, from its own story alone, whatever the batch."""
import math

import numpy as np
import pytest
import torch

import eval
from conftest import make_stories, write_jsonl
from prepare import load_meta, load_tokenizer, load_tokens
from prepare import main as prepare
from test_model import make_model

EOT = 96


def test_every_token_is_scored_once_with_at_least_half_a_context():
    draw = np.random.default_rng(0)
    tokens = np.concatenate([[EOT, *draw.integers(0, EOT, n)] for n in (5, 31, 32, 33, 100, 1)] + [[EOT]])
    times = np.zeros(len(tokens), int)
    for start, length, skip in eval.windows(tokens, EOT, 32):
        assert length <= 32 and not (tokens[start + 1:start + length] == EOT).any()
        assert skip == 0 and tokens[start] == EOT or skip == 16
        times[start + 1 + skip:start + 1 + length] += 1
    assert times.tolist() == [0] + [1] * (len(tokens) - 1)


def test_scores_agree_with_one_story_at_a_time():
    """The definition, straight: each story alone, its closing <|endoftext|> counted, nothing padded."""
    model, draw = make_model(), np.random.default_rng(0)
    stories = [draw.integers(0, EOT, n).tolist() for n in (5, 20, 31, 7, 12)]
    tokens = np.array([t for story in stories for t in [EOT] + story] + [EOT], np.uint16)
    expected = [0.0]
    for story in stories:
        row = torch.tensor([EOT] + story + [EOT])
        expected += torch.nn.functional.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="none").tolist()
    for batch_tokens in (1, 64, 4096):
        assert np.allclose(eval.score(model, tokens, EOT, batch_tokens=batch_tokens), expected, atol=1e-4)


def test_bits_per_byte_of_a_run(run, in_prepared, capsys):
    """Nats over bytes over ln 2; a model that knows nothing needs log2(512) bits a token."""
    eval.main([run, "--device=cpu"])
    bpb = float(capsys.readouterr().out.split("val_bpb ")[1].split(",")[0])
    meta, model = load_meta("tiny"), make_model(vocab_size=512)
    torch.nn.init.zeros_(model.head.weight)
    blind = eval.evaluate(model, "tiny")
    assert blind["val_loss"] == pytest.approx(math.log(512), rel=1e-5)
    assert blind["val_bpb"] == pytest.approx(9 * (meta["val"]["tokens"] - 1) / meta["val"]["bytes"], rel=1e-5)
    assert 0 < bpb < 0.7 * blind["val_bpb"]


def test_the_first_stories_can_stand_for_all(in_prepared):
    model = make_model(vocab_size=512)
    tokens, meta = load_tokens("tiny", "val"), load_meta("tiny")
    part = eval.evaluate(model, "tiny", max_stories=3)
    end = np.flatnonzero(tokens == meta["eot"])[3]
    nats = eval.score(model, tokens, meta["eot"])[:end + 1]
    assert part["val_loss"] == pytest.approx(nats.sum() / end, rel=1e-4)
    assert eval.evaluate(model, "tiny", max_stories=10**6) == eval.evaluate(model, "tiny")


def test_a_dataset_with_another_tokenizer_is_refused(run, in_prepared):
    write_jsonl(in_prepared / "data/strange/s.jsonl", make_stories(50))
    prepare(["--dataset=strange", "--vocab_size=300", "--val_fraction=0.2"])
    with pytest.raises(SystemExit, match="another tokenizer than data/strange .*--dataset=strange --tokenizer=tiny"):
        eval.main([run, "--dataset=strange"])


def test_skill_accuracy_is_the_share_of_right_words_that_cost_less(workplace):
    """Against one span at a time, straight from the logits; with right and wrong exchanged it is one minus that."""
    records = [{**r, "split": "val" if i % 5 == 0 else "train"} for i, r in enumerate(make_stories(200))]
    for i, record in enumerate(records):  # words of other lengths too
        if i % 2:
            record["spans"][0]["wrong"] = "very old trumpet"
    write_jsonl(workplace / "data/x/stories.jsonl", records)
    prepare(["--dataset=x", "--vocab_size=400"])
    model, encoding = make_model(vocab_size=400, block_size=128), load_tokenizer("x")

    def cost(before, word):  # "number" follows the marked word in each of these stories
        ids = torch.tensor([[encoding.eot_token] + encoding.encode_ordinary(f"{before}{word} number")])
        start = len(encoding.encode_ordinary(before.rstrip()))  # the word's tokens begin with its space
        nats = model(ids[:, :-1], ids[:, 1:])[0, start:]
        return nats.sum().item()
    expected = []
    for record in records[::5]:
        span, = record["spans"]
        before = record["story"][:span["start"]]
        expected.append(cost(before, record["story"][span["start"]:span["end"]]) < cost(before, span["wrong"]))
    assert eval.skill_accuracy(model, "x") == {"reasoning": pytest.approx(np.mean(expected))}
    assert 0.1 < np.mean(expected) < 0.9
    for record in records:
        span, = record["spans"]
        right = record["story"][span["start"]:span["end"]]
        record["story"] = record["story"][:span["start"]] + span["wrong"] + record["story"][span["end"]:]
        span.update(end=span["start"] + len(span["wrong"]), wrong=right)
    write_jsonl(workplace / "data/x/stories.jsonl", records)
    assert eval.skill_accuracy(model, "x")["reasoning"] == pytest.approx(1 - np.mean(expected))


def test_stories_are_described_side_by_side(workplace, capsys):
    stories = [{"story": r["story"], "words": ["play", "ball", "red"]} for r in make_stories(40)]
    write_jsonl(workplace / "a.jsonl", stories + stories[:10])
    (workplace / "b.txt").write_text("A slide is fun. Sam slid.\n<|endoftext|>\nOne day Sam saw a boat. He sat in it.\n")
    eval.main(["--stories", "a.jsonl", "b.txt"])
    table = {line[:36].strip(): line[36:].split("  ") for line in capsys.readouterr().out.splitlines()}
    a, b = eval.describe("a.jsonl"), eval.describe("b.txt")
    assert a["stories"] == "50" and a["exact copies"] == "20.00 %" and a["with Once upon a time"] == "100.00 %"
    assert float(a["near-copies"].split()[0]) >= 20 and b["near-copies"] == "0.00 %"
    assert b["stories"] == "2" and b["words a story"] == "8" and b["distinct words"] == "14"
    assert b["name 1"] == "Sam 50.00 %"  # names are counted within sentences, where all other words are small
    assert b["distinct 1-grams per 100,000 words"] == "87,500" and "requested words used" not in b
    assert 0 < float(a["requested words used"].split()[0]) < 70
    assert any("exact copies" in name for name in table)
    with pytest.raises(SystemExit, match="no file c.jsonl"):
        eval.main(["--stories", "c.jsonl"])

"""eval.py: the metric scores every token once, from its own story alone, whatever the batch."""
import math

import numpy as np
import pytest
import torch

import eval
from prepare import load_meta, load_tokens
from test_model import make_model
from test_sample import run  # noqa: F401 (a fixture)

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


def test_bits_per_byte_of_a_run(run, in_prepared, capsys):  # noqa: F811
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


def test_a_tokenizer_of_another_kind_is_refused(run, in_prepared):  # noqa: F811
    with pytest.raises(SystemExit, match="no dataset in data/none"):
        eval.main([run, "--dataset=none"])

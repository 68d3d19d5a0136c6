"""eval.py: the metric scores every token once, from its own story alone, whatever the batch; losses and probes are what
a plain count gives; results never outlive the checkpoint they were measured on."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval
import sample
import test_probes
import train
from common import results as results_file
from common.dataset import load_meta, load_tokens
from common.runs import load_checkpoint, load_run, save_checkpoint
from common.tokenizer import load_tokenizer
from conftest import error_of, make_stories, stand_in, write_jsonl
from lab import judge, world
from prepare import main as prepare
from test_model import make_model

ROOT = Path(__file__).parent.parent
EOT = 96
CPU = torch.device("cpu")


def test_every_token_is_scored_once_with_at_least_half_a_context():
    draw = np.random.default_rng(0)
    tokens = np.concatenate([[EOT, *draw.integers(0, EOT, n)] for n in (5, 31, 32, 33, 100, 1)] + [[EOT]])
    times = np.zeros(len(tokens), int)
    for start, end, scored in eval.sliding_windows(tokens, EOT, 32):
        assert end - start <= 32 and not (tokens[start + 1:end] == EOT).any()
        assert scored == start and tokens[start] == EOT or scored == start + 16
        times[scored + 1:end + 1] += 1
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


@pytest.mark.parametrize("width, layers, expected", [(32, 1, 4096), (128, 4, 1024)])
def test_a_small_model_gets_larger_batches(monkeypatch, width, layers, expected):
    model, sizes = make_model(n_embd=width, n_layer=layers, n_head=2, vocab_size=512, block_size=64), []
    def forward(idx, targets):
        sizes.append(idx.numel())
        return torch.zeros(idx.shape)
    monkeypatch.setattr(model, "forward", forward)
    tokens = np.resize(np.append(EOT, np.arange(63)), 64 * 200 + 1)
    eval.score(model, tokens, EOT)
    assert expected / 2 < max(sizes) <= expected


def read_results(run):
    with open(os.path.join(run, "eval.json")) as f:
        return json.load(f)


def test_bits_per_byte_of_a_run(run, in_prepared, capsys):
    """Nats over bytes over ln 2; a model that knows nothing needs log2(512) bits a token."""
    eval.main([run, "--device=cpu", "--only=loss"])
    found = read_results(run)["loss on tiny"]
    assert f"{found['val_bpb'][0]:.4f} [" in capsys.readouterr().out
    meta, model = load_meta("tiny"), make_model(vocab_size=512)
    torch.nn.init.zeros_(model.head.weight)
    blind = eval.evaluate(model, "tiny")
    assert blind["val_loss"] == pytest.approx(math.log(512), rel=1e-5)
    assert blind["val_bpb"] == pytest.approx(9 * (meta["val"]["tokens"] - 1) / meta["val"]["bytes"], rel=1e-5)
    bpb, low, high = found["val_bpb"]
    assert 0 < low < bpb < high < 0.7 * blind["val_bpb"] and high - low < 0.1 * bpb
    trained, *_ = load_run(run)
    assert bpb == pytest.approx(eval.evaluate(trained, "tiny")["val_bpb"], rel=1e-5)
    eval.main([run, "--device=cpu", "--only=loss", "--dtype=bfloat16"])
    rough = read_results(run)["loss on tiny in bfloat16"]["val_bpb"][0]
    assert rough == pytest.approx(bpb, rel=1e-3) and rough != bpb


def test_the_first_stories_can_stand_for_all(in_prepared):
    model = make_model(vocab_size=512)
    tokens, meta = load_tokens("tiny", "val"), load_meta("tiny")
    part = eval.evaluate(model, "tiny", max_stories=3)
    end = np.flatnonzero(tokens == meta["eot"])[3]
    nats = eval.score(model, tokens, meta["eot"])[:end + 1]
    assert part["val_loss"] == pytest.approx(nats.sum() / end, rel=1e-4)
    assert eval.evaluate(model, "tiny", max_stories=10**6) == eval.evaluate(model, "tiny")


def test_text_that_was_prepared_with_another_tokenizer_is_encoded_with_the_runs_own(run, in_prepared):
    write_jsonl(in_prepared / "data/strange/s.jsonl", make_stories(50, seed=3))
    prepare(["--dataset=strange", "--vocab_size=300", "--val_fraction=0.2"])
    prepare(["--dataset=same", "--input=data/strange", "--tokenizer=tiny", "--val_fraction=0.2"])
    subject = eval.load_subject(run, CPU, "strange")
    found = eval.grade_loss(subject, "strange")
    assert found["val_bpb"] == pytest.approx(eval.grade_loss(subject, "same")["val_bpb"])
    assert found["val_bpb"][0] == pytest.approx(eval.evaluate(subject.model, "same")["val_bpb"], rel=1e-5)


def test_a_run_is_graded_in_another_context_than_it_was_trained_in(run, in_prepared):
    """In a context of 2 each token is told from the two before it, the first of a story from <|endoftext|> alone."""
    eval.main([run, "--only=loss", "--context=2", "--device=cpu"])
    with open(f"{run}/context2.eval.json") as f:
        found = json.load(f)
    model, tokens = load_run(run)[0], torch.from_numpy(load_tokens("tiny", "val").astype(np.int64))
    with torch.no_grad():
        single = model(tokens[:-1, None], tokens[1:, None])[:, 0]
        after_two = model(torch.stack((tokens[:-2], tokens[1:-1]), 1), torch.stack((tokens[1:-1], tokens[2:]), 1))[:, 1]
    first = tokens[1:-1] == load_meta("tiny")["eot"]
    expected = torch.cat((single[:1], torch.where(first, single[1:], after_two)))
    assert found["model"]["context"] == 2
    assert found["loss on tiny"]["val_loss"][0] == pytest.approx(expected.mean().item(), rel=1e-5)
    torch.save({"model_config": {"pos": "learned", "block_size": 8}}, in_prepared / "learned.pt")
    with pytest.raises(SystemExit, match="learned positions for a context of 8 tokens"):
        load_run("learned.pt", "cpu", 16)


def test_skill_accuracy_is_the_share_of_right_words_that_cost_less(workplace):
    """Against one span at a time, straight from the logits; with right and wrong exchanged it is one minus that."""
    records = [{**r, "split": "val" if i % 5 == 0 else "train"} for i, r in enumerate(make_stories(200))]
    for i, record in enumerate(records):  # words of other lengths too
        if i % 2:
            record["spans"][0]["wrong"] = "very old trumpet"
    write_jsonl(workplace / "data/x/stories.jsonl", records)
    prepare(["--dataset=x", "--vocab_size=400"])
    model, encoding = make_model(vocab_size=400, block_size=128), load_tokenizer("x")

    def cost(before, word):  # "number" follows the span in each of these stories
        ids = torch.tensor([[encoding.eot_token] + encoding.encode_ordinary(f"{before}{word} number")])
        start = len(encoding.encode_ordinary(before.rstrip()))  # the word's tokens begin with its space
        nats = model(ids[:, :-1], ids[:, 1:])[0, start:]
        return nats.sum().item()
    expected = []
    for record in records[::5]:
        span, = record["spans"]
        before = record["story"][:span["start"]]
        expected.append(cost(before, record["story"][span["start"]:span["end"]]) < cost(before, span["wrong"]))
    probes = eval.read_spans("x", 200)
    assert eval.skill_accuracy(model, encoding, probes) == {"reasoning": pytest.approx(np.mean(expected))}
    assert 0.1 < np.mean(expected) < 0.9
    for record in records:
        span, = record["spans"]
        right = record["story"][span["start"]:span["end"]]
        record["story"] = record["story"][:span["start"]] + span["wrong"] + record["story"][span["end"]:]
        span.update(end=span["start"] + len(span["wrong"]), wrong=right)
    write_jsonl(workplace / "data/x/stories.jsonl", records)
    prepare(["--dataset=x", "--tokenizer=x"])
    probes = eval.read_spans("x", 200)
    assert eval.skill_accuracy(model, encoding, probes)["reasoning"] == pytest.approx(1 - np.mean(expected))


def test_loss_of_each_skill(in_prepared):
    """Against the span of each story alone; shares of text and loss sum to one."""
    model, encoding = make_model(vocab_size=512, block_size=256), load_tokenizer("tiny")
    found = eval.grade_loss(stand_in(model, "tiny"), "tiny")
    val = {encoding.decode(ids.tolist()) for ids in eval.split_stories(load_tokens("tiny", "val"), encoding.eot_token)}
    costs = []
    for record in make_stories(300):
        if record["story"] in val:
            span, = record["spans"]
            ids = [encoding.eot_token] + encoding.encode_ordinary(record["story"])
            nats = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[0]
            first = len(encoding.encode_ordinary(record["story"][:span["start"]].rstrip()))
            last = len(encoding.encode_ordinary(record["story"][:span["end"]]))
            costs.append(nats[first:last].sum().item())
    assert len(costs) == load_meta("tiny")["val"]["stories"] == found["stories"]
    assert found["reasoning words, nats each"][0] == pytest.approx(np.mean(costs), rel=1e-4)
    assert "fact words, nats each" not in found and 0 < found["reasoning words, share of text"][0] < 0.1
    for share in ("text", "loss"):
        assert found[f"reasoning words, share of {share}"][0] + found[f"all other words, share of {share}"][0] == \
            pytest.approx(1)


def test_probes_are_passed_by_the_likelier_continuation(in_prepared):
    """Against the sum of log-likelihoods of one continuation at a time, straight from the logits."""
    model, encoding = make_model(vocab_size=512, block_size=128), load_tokenizer("tiny")
    def cost(prompt, continuation):
        ids = torch.tensor([[encoding.eot_token] + encoding.encode_ordinary(prompt + continuation)])
        return model(ids[:, :-1], ids[:, 1:])[0, len(encoding.encode_ordinary(prompt)):].sum().item()
    probes = test_probes.PROBES[::7]
    expected = [min(cost(p["prompt"], c) for c in p["right"]) < min(cost(p["prompt"], c) for c in p["wrong"])
                for p in probes]
    assert eval.passes(model, encoding, probes).tolist() == expected and 0.1 < np.mean(expected) < 0.9


def test_a_small_context_prefers_no_side(in_prepared):
    """What differs is longer than the context, and is scored as far as that holds it."""
    model, encoding = make_model(vocab_size=512, block_size=8), load_tokenizer("tiny")
    sides = " a big red kite and a ball of snow from the hill.", " the park and the river, where she sat and slept."
    assert sum(eval.passes(model, encoding, [{"prompt": "She saw", "right": [a], "wrong": [b]}]).item()
               for a, b in (sides, sides[::-1])) == 1


def test_heuristics_are_counted_right(in_prepared, monkeypatch):
    encoding = load_tokenizer("tiny")
    for probe in test_probes.PROBES:
        found = eval.heuristics(probe, Counter())
        assert found["the last mentioned"] == test_probes.shortcut_passes(probe, "nearest mentioned")
        assert found["the most mentioned"] == test_probes.shortcut_passes(probe, "most often mentioned")
    text = encoding.decode(load_tokens("tiny", "train").tolist()).lower()
    counts = eval.count_phrases([" ball", " a red", " Tim", " trumpet"], "tiny")
    assert counts == {word: len(re.findall(rf"\b{word}\b", text)) for word in ("ball", "a red", "tim", "trumpet")}
    long = np.tile(load_tokens("tiny", "train"), 8)
    with monkeypatch.context() as patch:
        patch.setattr(eval, "load_tokens", lambda *_: long)
        assert len(long) > 100_000 and eval.count_phrases([" ball"], "tiny") == {"ball": 8 * counts["ball"]}
        assert eval.count_phrases([" ball"], "tiny", max_tokens=len(long) // 2)["ball"] < 6 * counts["ball"]
    probe = {"skill": "fact", "kind": "x", "prompt": "Tim saw a", "right": [" ball"], "wrong": [" trumpet", " violin"]}
    found = eval.grade_probes(stand_in(make_model(vocab_size=512), "tiny"), [probe], "one of mine")
    assert found["fact, the most frequent in train"][0] == 1 and found["fact, by chance"][0] == pytest.approx(1 / 3)
    assert found["fact: x"] == found["fact"] and found["measured with"] == "one of mine"
    with monkeypatch.context() as patch:  # of a mix, all datasets are counted
        patch.setattr(eval, "count_phrases", lambda _, name: Counter({"violin": 5}) if name == "b" else Counter(ball=1))
        mix = stand_in(make_model(vocab_size=512), "tiny")
        mix.datasets = ["tiny", "b"]
        assert eval.grade_probes(mix, [probe], "")["fact, the most frequent in train"][0] == 0
    lego = "r=-j,j=+1\nj="
    assert eval.mentions("+1", lego) == [7] and not eval.mentions("-1", lego)


def test_spans_are_probes_by_kind_and_depth(workplace):
    world.main(["--n=2000", "--kind=lego", "--seed=3"])
    prepare(["--dataset=lego", "--vocab_size=259", "--clean=False"])
    encoding = load_tokenizer("lego")
    tokens = [encoding.decode([i]) for i in encoding.encode_ordinary("r=-j,j=+1")]
    assert tokens == ["r", "=-", "j", ",", "j", "=+", "1"]
    spans = eval.read_spans("lego", 5, by="kind")
    kinds = {p["kind"] for p in spans}
    assert "lego, depth  5" in kinds and "lego, longer, depth 10" in kinds and "lego, depth  6" not in kinds
    assert all(p["right"][0][1:] == p["wrong"][0][1:] == "1" and p["right"] != p["wrong"] for p in spans)
    subject = stand_in(make_model(vocab_size=259, block_size=128), "lego")
    (title, found), = eval.grade(subject, ["spans"], [], SimpleNamespace(spans=5))
    assert title == "spans of lego" and {f"reasoning: {kind}" for kind in kinds} < set(found)


def test_spans_are_found_where_the_stories_lie(workplace):
    """Stories that were prepared from elsewhere, with instructions before them, keep their probes."""
    write_jsonl(workplace / "data/x/stories.jsonl",
                [{**r, "split": "val" if i % 5 == 0 else "train"} for i, r in enumerate(make_stories(100))])
    write_jsonl(workplace / "split/valid.jsonl", make_stories(9))
    write_jsonl(workplace / "split/train.jsonl", make_stories(50, seed=1))
    prepare(["--dataset=asked", "--input=data/x", "--instruct", "--vocab_size=400"])
    prepare(["--dataset=plain", "--input=split", "--vocab_size=400"])
    asked, plain = eval.read_spans("asked", 50), eval.read_spans("plain", 50)
    assert len(asked) == 20 and len(plain) == 9
    assert asked[0]["prompt"].startswith("Story:") and plain[0]["prompt"].startswith("Once upon a time")
    assert "bits_per_byte" in load_meta("plain")["val"]
    assert "bits_per_byte" not in load_meta("asked")["val"]  # what the instructions cost is not known


def test_spans_of_stories_that_no_record_assigns_to_a_split_are_probes(in_prepared):
    """data/tiny was split by hash: exactly the stories of its val.bin are graded."""
    encoding = load_tokenizer("tiny")
    val = [encoding.decode(ids.tolist()) for ids in eval.split_stories(load_tokens("tiny", "val"), encoding.eot_token)]
    probes = eval.read_spans("tiny", 1000)
    assert len(probes) == len(val) > 10
    assert all(any(story.startswith(p["prompt"] + p["right"][0]) for story in val) for p in probes)


def test_runs_that_differ_in_what_they_learn_are_told_apart(run, in_prepared):
    """A seed and housekeeping make no other experiment; another length or context does."""
    checkpoint = load_checkpoint(run)

    def experiment(context=0, step=60, **changes):
        return results_file.experiment_of({"args": {**checkpoint["args"], **changes}, "step": step}, context)
    assert experiment() == experiment(seed=7, evals=3, log_interval=1, device="cuda", out_dir="out/x")
    assert experiment(init_from="out/warm-1") == experiment(init_from="out/warm-2", seed=2)
    assert len({experiment(), experiment(step=59), experiment(lr=1), experiment(context=8)}) == 4
    assert experiment(compile=True) == experiment(compile=False)  # the same loss, sooner
    assert experiment(compile=True, max_minutes=1) != experiment(compile=False, max_minutes=1)


def test_results_of_another_checkpoint_are_dropped(run, in_prepared, capsys):
    """What a file's date says does not matter: a copied folder keeps its results, a run that went on loses them."""
    Path(run, "eval.json").unlink(missing_ok=True)
    eval.main([run, "--device=cpu", "--only=loss"])
    copy = shutil.copytree(run, "out/copied")
    os.utime(f"{copy}/eval.json", (1, 1))
    subject = eval.load_subject(copy, CPU)
    assert results_file.read_results(subject) == read_results(run) and "loss on tiny" in read_results(copy)
    eval.add_section(subject, "judge", {"grammar": [7, 6, 8]})
    assert list(read_results(copy)) == ["model", "loss on tiny", "judge"]
    checkpoint = load_checkpoint(copy)
    checkpoint["step"] += 1
    save_checkpoint(checkpoint, f"{copy}/ckpt.pt")
    eval.add_section(eval.load_subject(copy, CPU), "judge", {"grammar": [7, 6, 8]})
    assert list(read_results(copy)) == ["model", "judge"] and read_results(copy)["model"]["step"] == 61


def test_probes_are_asked_after_what_the_model_expects(workplace, monkeypatch):
    """A model that learned instructions is asked with them."""
    monkeypatch.setattr(eval, "grade_probes", lambda subject, probes, measured: probes)
    write_jsonl(workplace / "data/tiny/s.jsonl", make_stories(60))
    prepare(["--dataset=tiny", "--instruct", "--vocab_size=300", "--val_fraction=0.2"])
    train.main(["--dataset=tiny", "--n_layer=1", "--n_embd=32", "--max_steps=1", "--evals=0", "--device=cpu",
                "--compile=False", "--batch_tokens=256", "--out_dir=out/x"])
    args = SimpleNamespace(probes="data/tiny/s.jsonl")  # any file
    (_, probes), = eval.grade(eval.load_subject("out/x", CPU), ["probes"], [{"prompt": "Tim"}], args)
    assert probes == [{"prompt": "Story:\nTim"}]


def test_intervals_are_those_of_theory():
    x = np.random.default_rng(1).normal(5, 2, 400)
    value, low, high = results_file.interval(x)
    half = 1.96 * x.std() / 20  # of the mean of 400
    assert value == pytest.approx(x.mean())
    assert [low, high] == pytest.approx([value - half, value + half], abs=half / 4)
    assert results_file.interval([1, 9], [1, 3])[0] == 2.5 and results_file.interval([0], [0]) is None


def test_skills_are_followed_over_the_steps_of_a_run(in_prepared, capsys):
    train.main(["--dataset=tiny", "--n_layer=1", "--n_embd=32", "--block_size=64", "--max_steps=9", "--evals=0",
                "--out_dir=out/kept-steps", "--batch_tokens=256", "--compile=False", "--device=cpu", "--keep=log"])
    eval.main(["out/kept-steps", "--only=steps", "--device=cpu"])
    steps = read_results("out/kept-steps")["steps"]
    assert [point[0] for point in steps["probes"]["fact"]] == [1, 2, 4, 8]
    # a checkpoint can be graded by itself
    eval.main(["out/kept-steps/ckpt-0000004.pt", "--only=probes", "--device=cpu"])
    with open("out/kept-steps/ckpt-0000004.eval.json") as f:
        assert json.load(f)["probes"]["fact"][0] == steps["probes"]["fact"][2][2]


def test_what_is_printed_says_which_run_and_what_was_measured(run, in_prepared, capsys, monkeypatch):
    monkeypatch.setattr(eval, "newest_run", lambda: run)
    eval.main(["--device=cpu", "--only=loss,spans", "--spans=7"])
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if not line.startswith(" ")]
    assert titles[0] == f"{run}: loss on tiny (all {load_meta('tiny')['val']['stories']} validation stories, float32)"
    assert titles[1] == f"{run}: spans of tiny (the first 7 of each kind in validation stories)"
    assert titles[-1].endswith(f"python -m lab.compare {run}") and len(titles) == 4
    eval.main([run, "--device=cpu", "--only=loss", "--context=8"])
    assert capsys.readouterr().out.endswith(f"python -m lab.compare {os.path.join(run, 'context8.eval.json')}\n")


def test_stories_without_spans_are_reported_in_one_line(run, fine, capsys):
    eval.main([run, "--dataset=fine", "--only=spans", "--device=cpu"])
    assert capsys.readouterr().out == f"{run}: no spans of fine: its stories have none\n"


def test_steps_that_were_not_kept_end_in_one_line(run, in_prepared, capsys):
    assert "--keep=log" in error_of(eval.main, [run, "--only=steps", "--device=cpu"], capsys)


FORK = """
import sys
sys.path.insert(0, {root!r})
import torch
import model

class MLP(model.MLP):
    def forward(self, x):
        return self.proj(torch.tanh(self.fc(x)))  # instead of squared ReLU
model.MLP = MLP

import eval, sample, train
from lab import interpret
run = ["--dataset=tiny", "--n_layer=1", "--n_embd=32", "--block_size=64", "--batch_tokens=512", "--max_steps=10",
       "--evals=0", "--compile=False", "--device=cpu", "--out_dir=out/fork"]
train.main(run)
print("SAMPLE")
sample.main(["--out_dir=out/fork", "--temperature=0", "--max_tokens=30", "--prompt=One", "--device=cpu"])
print("PLAIN")
changed, _, encoding = sample.load_run("out/fork")
ids = [encoding.eot_token] + encoding.encode_ordinary("One")
for _ in range(30):
    ids.append(changed(torch.tensor([ids]))[0, -1].argmax().item())
    if ids[-1] == encoding.eot_token:
        break
print(encoding.decode([i for i in ids if i != encoding.eot_token]))
print("END")
print("loss of 20 stories:", eval.evaluate(changed, "tiny", 20)["val_loss"])
eval.main(["out/fork", "--only=loss", "--device=cpu"])
interpret.main(["out/fork", "--stories=20", "--device=cpu"])
"""


def test_a_fork_that_changes_the_model_is_followed_everywhere(in_prepared):
    """With another activation in model.py, sample.py, eval.py and lab.interpret all tell the changed network."""
    script = FORK.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    written, plain = re.search(r"SAMPLE\n(.*)\nPLAIN\n(.*)\nEND", done.stdout, re.DOTALL).groups()
    assert written == plain and len(written) > 10
    val_bpb = float(re.search(r"\nval_bpb: +(\S+)", done.stdout)[1])
    measured = read_results("out/fork")["loss on tiny"]["val_bpb"][0]
    assert measured == pytest.approx(val_bpb, abs=1e-4)
    with open("out/fork/interpret.json") as f:
        unablated = json.load(f)["ablations"][0]["loss"]
    assert unablated == pytest.approx(float(re.search("loss of 20 stories: (.*)", done.stdout)[1]), rel=1e-5)
    # the unchanged model, with the same weights, is another network
    assert eval.evaluate(load_run("out/fork")[0], "tiny")["val_bpb"] != pytest.approx(val_bpb, rel=1e-3)


@pytest.mark.parametrize("options, expected", [
    (["--only=loss,taste"], "has no section taste"),
    (["--probes=none.json"], "cannot read --probes=none.json"),
    (["--probes=bad.json"], "does not have the form of data/probes.json"),
    (["--probes=mark.json"], "does not have the form of data/probes.json"),  # its byte-order mark is no mistake
    (["--spans=0"], "--spans=0 must be at least 1"),
    (["--context=1"], "--context=1"),
    (["out/none"], "no checkpoint out/none/ckpt.pt"),
    (["told.txt"], "python -m lab.corpus told.txt"),
    (["hf:some/model"], "has no stories of its own: name a prepared dataset, such as --dataset=tinystories"),
    (["hf:some/model", "--dataset=x", "--context=8"], "has its own context: leave --context out"),
])
def test_bad_input_ends_in_one_line(workplace, capsys, options, expected):
    (workplace / "mark.json").write_text('\ufeff[{"skill": "fact"}]', encoding="utf-8")
    (workplace / "bad.json").write_text('[{"skill": "fact"}]')
    assert expected in error_of(eval.main, options, capsys)


def test_shapes_on_a_gpu_are_few():
    """A kernel library may plan for every new shape."""
    lengths = {eval.padded_length(n, 256, torch.device("cuda")) for n in range(1, 257)}
    assert lengths == {64, 128, 192, 256} and eval.padded_length(7, 32, torch.device("cuda")) == 32
    assert eval.padded_length(7, 256, torch.device("cpu")) == 7


def test_stories_that_were_prepared_anew_are_not_graded_as_the_runs_own(run, in_prepared, monkeypatch):
    """Somebody who has prepared other stories under the same name would get figures that mean nothing."""
    real = results_file.load_meta
    monkeypatch.setattr(results_file, "load_meta", lambda name: {**real(name), "tokenizer": {"sha256": "another"}})
    with pytest.raises(SystemExit, match="data/tiny is not what .* was trained on"):
        eval.main([run, "--device=cpu", "--only=loss"])


def test_what_cannot_be_written_or_read_is_found_before_grading(run, in_prepared, monkeypatch):
    def refuse(folder):
        raise SystemExit(f"cannot write to {folder}")
    with monkeypatch.context() as patch:
        patch.setattr(results_file, "check_writable", refuse)
        with pytest.raises(SystemExit, match=f"cannot write to {run}"):
            eval.load_subject(run, CPU)
    whole = Path("data/tiny/val.bin").read_bytes()
    Path("data/tiny/val.bin").write_bytes(whole[:-4] + whole[-2:] + whole[-2:])
    try:
        with pytest.raises(SystemExit, match="val.bin is damaged"):
            eval.load_subject(run, CPU)
    finally:
        Path("data/tiny/val.bin").write_bytes(whole)


def other_scripts():
    """Stories in Chinese, Hindi and French, which end in other characters than English ones, some with a span."""
    records = []
    for i in range(60):
        thing, other = (("小狗", "小猫"), ("गेंद", "पतंग"), ("ballon", "gâteau"))[i % 3]
        story = (
            f"从前有一个小女孩，名字叫小红{i}，她很喜欢{thing}。一天，她和妈妈去公园玩，看到了一只很大很大的鸟。“你好！”小红说。"
            f"鸟飞走了，小红笑了，她抱着{other}回家睡觉了。",
            f"एक दिन राम {i} बाज़ार गया और उसने एक {thing} और एक {other} देखी। माँ ने कहा कि तुम एक ही ले सकते हो। "
            f"राम ने {other} ली और घर आकर बहुत खुश हुआ।",
            f"Un jour, Zoé {i} alla au marché avec un {thing} et un {other}. Elle dit à sa mère qu’elle n’aimait pas "
            f"le {thing}. «\xa0Alors prends le {other}\xa0!\xa0»")[i % 3]
        start = story.rindex(other)
        span = {"start": start, "end": start + len(other), "skill": "reasoning", "wrong": thing}
        records.append({"story": story, "spans": [span], "words": [thing, other]})
    return records


def test_other_scripts_go_all_the_way(workplace, capsys):
    """From a file to figures: no story is removed, and nothing takes words for what stands between spaces."""
    (workplace / "s.json").write_text(json.dumps(other_scripts()))
    prepare(["--dataset=x", "--input=s.json", "--vocab_size=400", "--val_fraction=0.3"])
    meta = load_meta("x")
    assert meta["cleaning"] == {} and meta["train"]["stories"] + meta["val"]["stories"] == 60
    train.main(["--dataset=x", "--n_layer=1", "--n_embd=32", "--block_size=32", "--batch_tokens=512", "--max_steps=3",
                "--evals=0", "--compile=False", "--device=cpu", "--out_dir=out/x"])
    capsys.readouterr()
    sample.main(["out/x", "--prompt=从前有", "--max_tokens=20", "--num_samples=2", "--device=cpu"])
    assert capsys.readouterr().out.startswith("从前有")
    eval.main(["out/x", "--device=cpu", "--only=loss,spans"])
    results = read_results("out/x")
    assert 0 < results["loss on x"]["val_bpb"][0] < 10 and results["loss on x"]["reasoning words, nats each"]
    assert 0 < results["spans of x"]["reasoning, the last mentioned"][0] < 1  # it finds the words in every script
    pairs = {name: list(pairs) for name, pairs in judge.controls("x").items()}
    stories = {record["story"] for record in other_scripts()}
    assert any("从前" in beginning for beginning, _ in pairs["true endings"])
    for beginning, ending in pairs["true endings"]:
        assert beginning + ending in stories or f"{beginning} {ending}" in stories
    for (_, ending), (_, shuffled) in zip(pairs["true endings"], pairs["shuffled endings"]):
        assert ending != shuffled and sorted(ending.replace(" ", "")) == sorted(shuffled.replace(" ", ""))

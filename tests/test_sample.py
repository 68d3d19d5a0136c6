"""sample.py: greedy text is what the plain model would write, and a batch is its members."""
import io
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
import train
from common.records import read_records
from conftest import error_of, make_stories, write_jsonl
from lab.label import share_followed
from model import Cache
from prepare import main as prepare
from test_model import POSITIONS, make_model

EOT = 96


@pytest.mark.parametrize("pos", ["rope", "alibi"])
def test_greedy_equals_the_argmax_of_the_uncached_model(pos):
    model, ids, expected = make_model(seed=3, pos=pos), [3, 1, 4, 1, 5], []
    while len(ids + expected) < 32:
        expected.append(model(torch.tensor([ids + expected]))[0, -1].argmax().item())
    # as if a token that comes for the first time after some others were <|endoftext|>
    end = next(token for i, token in enumerate(expected) if i > 3 and token not in expected[:i])
    found = [t.item() for t in sample.generate(model, ids, 27, [0], end, temperature=0)]
    assert found == expected[:expected.index(end) + 1] and len(found) > 3


@pytest.mark.parametrize("pos", POSITIONS)
def test_fast_single_rows_change_nothing_but_the_speed(pos):
    """Logits after every token, and greedy text that outgrows the context; also of a model with odd sizes."""
    for vocab_size in (97, 128):
        plain, fast = make_model(pos=pos, vocab_size=vocab_size), make_model(pos=pos, vocab_size=vocab_size)
        sample.speed_up_single_rows(fast)
        texts = [[t.item() for t in sample.generate(m, [3, 1, 4], 60, [0], eot=-1, temperature=0)]
                 for m in (plain, fast)]
        assert texts[0] == texts[1]
        cache = Cache(fast, 1)
        with torch.no_grad():
            logits = [fast(torch.tensor([[token]]), cache=cache) for token in texts[0][:32]]
            expected = plain(torch.tensor([texts[0][:32]]))
        torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=1e-4)


def test_a_layer_of_a_fork_keeps_its_own_product():
    """Only plain nn.Linear layers are sped up; what a fork adds computes as it was written."""
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)
    model = torch.nn.Sequential(Doubled(8, 8, bias=False), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, bias=False))
    x = torch.randn(1, 1, 8)
    with torch.inference_mode():
        expected = model(x)
        sample.speed_up_single_rows(model)
        torch.testing.assert_close(model(x), expected)
        assert "forward" in vars(model[2]) and "forward" not in vars(model[0])


def test_a_full_context_slides():
    """When 32 positions are full, the later 16 are read again; then each token follows from those."""
    model, ids = make_model(), list(range(30))
    found = ids + [t.item() for t in sample.generate(model, ids, 40, [0], eot=-1, temperature=0)]
    assert len(found) == 70
    begin = 0
    for i in range(30, 70):
        if i - begin > 32:
            begin = i - 16
        assert found[i] == model(torch.tensor([found[begin:i]]))[0, -1].argmax().item()


def test_a_batch_equals_its_members_one_at_a_time():
    model = make_model()
    batch = torch.stack(list(sample.generate(model, [7, 8], 25, range(10, 16), EOT)), 1)
    for seed, row in zip(range(10, 16), batch.tolist()):
        alone = [t.item() for t in sample.generate(model, [7, 8], 25, [seed], EOT)]
        assert alone == row[:len(alone)] and set(row[len(alone):]) <= {EOT}
    assert len({tuple(row) for row in batch.tolist()}) == 6


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = (torch.arange(10_000) + 0.5) / 10_000
    def shares(**how):
        found = sample.pick(logits.expand(10_000, 4), draws, **how)
        return [round((found == i).float().mean().item(), 3) for i in range(4)]
    assert shares() == [0.5, 0.3, 0.15, 0.05]
    assert shares(top_k=2) == [0.625, 0.375, 0, 0]
    assert shares(top_p=0.75) == [0.625, 0.375, 0, 0]
    assert shares(min_p=0.2) == pytest.approx([0.526, 0.316, 0.158, 0], abs=1e-3)
    assert shares(temperature=0) == [1, 0, 0, 0]
    assert shares(temperature=0.5) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=1e-3)


def test_stories_from_the_command_line(run, in_prepared, capsys):
    options = [f"--out_dir={run}", "--prompt=Once upon a time", "--max_tokens=40", "--device=cpu"]
    sample.main([*options, "--seed=2"])
    one = capsys.readouterr().out
    sample.main([*options, "--num_samples=3"])
    with open("told.txt", "w", encoding="utf-8") as f:
        f.write(capsys.readouterr().out)
    stories = [record["story"] for record in read_records("told.txt")]  # as lab.corpus does
    assert one.startswith("Once upon a time") and len(stories) == 3
    assert stories[1].strip() == one.strip()  # the second of the batch has the second seed
    sample.main([*options, "--num_samples=2", "--dtype=bfloat16"])
    assert capsys.readouterr().out.count("Once upon a time") == 2


def test_text_streams_on_after_bytes_that_are_no_text(capsys):
    """A young model writes half characters: they show as a mark, and what follows comes at once."""
    shown = []

    class Encoding:
        eot_token = EOT

        def encode_ordinary(self, text):
            return [1]

        def decode_single_token_bytes(self, token):
            shown.append(capsys.readouterr().out)
            return [b"\xe2\x9c", b"a", b"\xc3", b"\xa9", b"b"][len(shown) - 1]
    sample.stream_story(make_model(), Encoding(), "", max_tokens=5, seed=1)
    assert "".join(shown) + capsys.readouterr().out == "�aéb\n" and "".join(shown[:4]).endswith("a")


def test_talking_to_the_model(run, in_prepared, monkeypatch, capsys):
    typed = "Tim saw\n/temperature = 0\n/\n/color=red\n/top_k=-1\nTim saw\nTim saw\n/quit\nTim saw\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    sample.main([f"--out_dir={run}", "--interactive", "--max_tokens=20", "--device=cpu"])
    out = capsys.readouterr().out
    told = [line for line in out.replace("> ", "\n").splitlines() if line.startswith("Tim saw")]
    assert len(told) == 3 and told[1] == told[2]
    assert "/temperature=0.0" in out and "top_k=-1 must be at least 0" in out
    assert "/color=red is not a setting" in out


@pytest.mark.parametrize("options, expected", [
    (["--out_dir=out/none"], "no checkpoint out/none/ckpt.pt: choose from "),
    (["out/a", "--out_dir=out/b"], "leave out out/a or --out_dir=out/b"),
    (["--promt=One day"], "did you mean --prompt"),  # with a space in it, too
    (["--temperature=-1"], "--temperature=-1.0 must be at least 0"),
    (["--top_p=0"], "--top_p=0.0 must be at least"),
    (["--interactive", "--prompt=Tim"], "ask for each beginning: leave out"),
    (["--interactive", "--num_samples=2"], "ask for each beginning: leave out"),
    (["--serve=8000", "--prompt=Tim"], "ask for each beginning: leave out"),
    (["--best_of=4"], "add --words"), (["--interactive", "--best_of=4", "--words=run"], "leave out"),
    (["--temperature=nan"], "--temperature=nan must be"),
    (["--prompt=caf\udce9"], "not UTF-8"), (["--words=caf\udce9"], "not UTF-8"),  # what Python makes of Latin-1
    (["--seed=99999999999999999999"], "--seed"), (["--min_p=nan"], "--min_p"), (["--max_tokens=inf"], "--max_tokens"),
])
def test_bad_input_ends_in_one_line(run, in_prepared, capsys, options, expected):
    assert expected in error_of(sample.main, options, capsys)


def test_a_model_that_learned_instructions_is_asked_with_them(workplace, capsys):
    """Its stories begin after "Story:", also where no instruction is given; another model is given none."""
    write_jsonl(workplace / "data/asked/s.jsonl", make_stories(100))
    write_jsonl(workplace / "data/plain/s.jsonl", make_stories(100))
    prepare(["--dataset=asked", "--instruct", "--vocab_size=300", "--val_fraction=0.1"])
    prepare(["--dataset=plain", "--vocab_size=300", "--val_fraction=0.1"])
    for name in ("asked", "plain"):
        train.main([f"--dataset={name}", "--n_layer=1", "--n_embd=32", "--max_steps=1", "--evals=0", "--device=cpu",
                    "--compile=False", f"--out_dir=out/{name}", "--batch_tokens=256"])
    capsys.readouterr()
    sample.main(["--out_dir=out/asked", "--prompt=Tim", "--max_tokens=1"])
    assert capsys.readouterr().out.startswith("Story:\nTim")
    sample.main(["--out_dir=out/asked", "--words=run,dog", "--features=dialogue", "--max_tokens=1"])
    assert capsys.readouterr().out.startswith("Features: dialogue\nWords: run, dog\nStory:\n")
    options = ["--out_dir=out/asked", "--prompt=Tim", "--words=a, s", "--max_tokens=20", "--temperature=1"]
    sample.main([*options, "--num_samples=8"])
    stories = capsys.readouterr().out.split("<|endoftext|>\n")
    sample.main([*options, "--num_samples=2", "--best_of=4"])
    printed = capsys.readouterr()
    best = printed.out.split("<|endoftext|>\n")
    scores = [share_followed({"words": "a, s"}, story.partition("Story:\n")[2]) for story in stories]
    assert min(scores[:4]) < max(scores[:4])
    assert [max(scores[:4]), max(scores[4:])] == [scores[stories.index(story)] for story in best]
    assert f"the best of 4 has {2 * max(scores[:4]):.0f} of 2 (words)" in printed.err
    assert "has not learned instructions" in error_of(sample.main, ["--out_dir=out/plain", "--words=run"], capsys)


def written(options, run, capsys):
    sample.main([f"--out_dir={run}", "--max_tokens=20", "--device=cpu", *options])
    return capsys.readouterr().out


def test_a_prompt_ends_with_its_last_word(run, in_prepared, capsys):
    """A space at the end would be a token of its own, and the next word would begin in its middle."""
    expected = written(["--prompt=Tim saw the"], run, capsys)
    assert written(["--prompt=Tim saw the  "], run, capsys) == expected


def test_what_is_typed_may_be_anything(run, in_prepared, monkeypatch, capsys):
    """A space at the end is taken off there too, and a line that is not UTF-8 costs no other."""
    typed = io.TextIOWrapper(io.BytesIO(b"/temperature=0\nTim saw\ncaf\xe9\nTim saw \n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    stories = [line for line in written(["--interactive"], run, capsys).replace("> ", "\n").splitlines() if line]
    told = [line for line in stories if line.startswith("Tim saw")]
    assert len(told) == 2 and told[0] == told[1] and any(line.startswith("caf\ufffd") for line in stories)


def test_many_stories_are_written_in_batches_and_shown_as_they_end(run, in_prepared, monkeypatch, capsys):
    expected = written(["--num_samples=7"], run, capsys)

    def write_stories(*args, seeds, real=sample.write_stories, **settings):
        shown.append(capsys.readouterr().out)
        return real(*args, seeds=seeds, **settings)
    shown = []
    monkeypatch.setattr(sample, "write_stories", write_stories)
    monkeypatch.setattr(sample, "max_batch", lambda model: 3)
    shown.append(written(["--num_samples=7"], run, capsys))
    assert "".join(shown) == expected and [part.count("<|endoftext|>") for part in shown] == [0, 2, 3, 1]


@pytest.mark.parametrize("device, shape, expected", [
    ("cpu", (4, 128, 256), 64), ("cuda", (4, 128, 256), 2048), ("cuda", (8, 512, 512), 128)])
def test_the_caches_of_a_batch_fit_into_memory(device, shape, expected):
    n_layer, n_embd, block_size = shape
    weight = SimpleNamespace(device=torch.device(device), element_size=lambda: 4)
    model = SimpleNamespace(head=SimpleNamespace(weight=weight),
                            config=SimpleNamespace(n_layer=n_layer, n_embd=n_embd, block_size=block_size))
    assert sample.max_batch(model) == expected


class Recorder(TorchDispatchMode):
    """Notes every operation with its tensors, as a CUDA graph notes kernels with the memory they work on."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


def record_on_a_cpu(step):
    """What record_cuda_graph does, but with operations: the replay knows nothing of Python's variables."""
    step()
    with Recorder() as recorder:
        step()

    def replay():
        for function, args, kwargs, result in recorder.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
    return replay


@pytest.mark.parametrize("pos, temperature", [("rope", 0), ("alibi", 1), ("learned", 0), ("none", 1)])
def test_replayed_steps_write_what_plain_ones_write(monkeypatch, pos, temperature):
    """Over three graphs of 8 keys, and a context of 24 tokens that slides."""
    def write(model):
        tokens = sample.generate(model, [EOT, 5, 6], 60, [1, 2, 3], eot=-1, temperature=temperature)
        return torch.stack(list(tokens)).tolist()
    model = make_model(pos=pos, block_size=24)
    plain, steps = write(model), []

    def reuse_graphs(model, batch_size, settings):
        steps.append(sample.GraphedStep(model, batch_size, settings, record_on_a_cpu, graph_keys=8))
        return steps[0]
    monkeypatch.setattr(sample, "reuse_graphs", reuse_graphs)
    assert write(model) == plain and sorted(steps[0].replays) == [8, 16, 24]

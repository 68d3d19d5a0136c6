"""train.py: every block once, nothing repeated or skipped on resume, and nothing lost when it is stopped."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
import train
from common import device as device_file, fit, runs
from common.dataset import load_meta, parse_mix, read_rows, row_places
from common.runs import load_checkpoint, load_run
from conftest import error_of, make_stories, write_jsonl
from lab import world
from model import GPT, GPTConfig
from prepare import main as prepare

ROOT = Path(__file__).parent.parent
TINY = ["--dataset=tiny", "--n_layer=2", "--n_embd=32", "--n_head=2", "--block_size=32", "--batch_tokens=256",
        "--log_interval=1", "--device=cpu", "--dtype=float32", "--compile=False", "--evals=3", "--eval_stories=4"]


def torchrun(*options, script=ROOT / "train.py"):
    """A run of two processes, a thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", script, *TINY, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]


def run(out, *options):
    train.main([*TINY, f"--out_dir=out/{out}", *options])


def read_log(out):
    """The log's lines, without what depends on the clock."""
    with open(f"out/{out}/log.jsonl") as f:
        lines = [json.loads(line) for line in f]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "time")} for line in lines]


def same(a, b):
    """Whether two nested structures of tensors and values are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def start(*options, **more):
    """train.py as a process of its own."""
    return subprocess.Popen([sys.executable, ROOT / "train.py", *TINY, *options], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **more)


def wait_for(path, process, at_least=1):
    while process.poll() is None and not (os.path.exists(path) and Path(path).read_bytes().count(b"\n") >= at_least):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


# --- data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [60, 89, 1000])  # 60: one row of an epoch, the fewest that train.py accepts
def test_rows_begin_with_the_story_at_their_place_in_the_first_epoch(n_tokens):
    tokens, length, n_rows = np.arange(n_tokens, dtype=np.uint16), 30, n_tokens // 30 - 1
    stories = np.array([0, 5, 20, 120, 130, 140, 180])  # the third is longer than three rows
    stories = stories[stories < n_tokens]
    rows = read_rows(tokens, stories, length, 0, 400 * n_rows, seed=1)
    assert all((row == np.arange(row[0], row[0] + 31)).all() for row in rows)
    assert set(rows.flat) == set(range(n_tokens))  # nothing is left out for good
    starts = rows[:, 0].reshape(400, n_rows)
    places = np.stack([row_places(n_tokens, length, 1, epoch) for epoch in range(400)])
    assert all((np.diff(sorted(epoch)) == length).all() for epoch in places)
    assert len(set(places.min(1) % length)) > 15  # other places in each epoch
    for start, place in zip(starts[0], places[0]):
        story = max(story for story in stories if story <= place)
        assert start == (story if place - story < length else place)
    assert (starts[1:] == places[1:]).all()
    again = [read_rows(tokens, stories, length, i, 1, seed=1)[0] for i in range(400 * n_rows)]
    assert (np.stack(again) == rows).all()  # however the walk is cut into steps
    other = read_rows(tokens, stories, length, 0, 400 * n_rows, seed=2)
    assert other[:, 0].tolist() != rows[:, 0].tolist()


def test_mix_weights_sum_to_one():
    assert parse_mix("a:1,b:3") == {"a": 0.25, "b": 0.75} and parse_mix("a") == {"a": 1.0}
    for mix in ("a:x", "a:1,a:2"):
        with pytest.raises(SystemExit, match="name:weight"):
            parse_mix(mix)


# --- optimizer and schedule ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_weight_has_one_optimizer_and_its_own_decay(optimizer):
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=16, pos="learned",
                          value_embeds=True))
    model.blocks[0].gain = torch.nn.Parameter(torch.ones(16))  # as a fork might add
    args = train.command_line().parse_args([f"--optimizer={optimizer}", "--lr=0.01"])
    groups = [group for o in model_file.make_optimizers(model, args, 0.01) for group in o.param_groups]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        matrix = "blocks" in name and p.ndim == 2 and "value_embed" not in name
        assert decay[id(p)] == pytest.approx(0.1 if matrix else 0.03 if "value_embed" in name else 0.01)


@pytest.mark.parametrize("batch_tokens", [32, 96, 6400])
def test_embeddings_decay_the_more_the_fewer_steps_an_epoch_has(in_prepared, batch_tokens):
    options = [f"--batch_tokens={batch_tokens}", "--max_steps=1", "--out_dir=out/decay"]
    run = train.Run(train.fill_defaults(train.command_line().parse_args([*TINY, *options])))
    others, value_embeds = run.optimizers[1].param_groups
    steps = load_meta("tiny")["train"]["tokens"] / batch_tokens
    assert others["weight_decay"] == pytest.approx(min(0.1, 20 / steps))
    assert value_embeds["weight_decay"] == pytest.approx(3 * others["weight_decay"])


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_takes_torchs_steps_in_any_precision(dtype, device):
    torch.manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(shape, device=device))
            for shape in ((24, 24), (48, 16), (24, 24), (16, 48))]
    begun = [p.detach().clone() for p in ours]
    theirs = [torch.nn.Parameter(p.clone()) for p in begun]
    settings = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}
    optimizers = model_file.Muon(ours, dtype, beta2=0, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(5):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, c in zip(ours, theirs, begun):
        assert (a - b).norm() < 0.02 * (b - c).norm()  # of the way that five steps went
    three = torch.randn(3, 16, 48) * torch.tensor([0.01, 1, 100])[:, None, None]
    exact = model_file.orthogonalize(three, torch.float32)
    assert torch.linalg.svdvals(exact).sub(0.95).abs().max() < 0.3
    torch.testing.assert_close(exact, torch.cat([model_file.orthogonalize(x[None], torch.float32) for x in three]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the latter stacks matrices of one shape
def test_muon_balances_rows_as_normuon_says(dtype):
    """Two steps against the formula, with the exact polar factor: each row, or column of a wide matrix, is divided by
    the root of its running mean square, and the matrix keeps its norm."""
    torch.manual_seed(1)
    ours = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((48, 16), (16, 48), (16, 48), (8, 8))]
    optimizer = model_file.Muon(ours, dtype, beta2=0.9, lr=0.1, weight_decay=0.0, momentum=0.0)
    expected, squares = [torch.zeros_like(p) for p in ours], [0.0] * 4
    for _ in range(2):
        for i, p in enumerate(ours[:3]):  # the last has a gradient of zero, and must stay where it is
            p.grad = torch.randn_like(p) * torch.logspace(0, 2, p.size(0))[:, None]
            update = model_file.orthogonalize(p.grad[None], dtype)[0].float()
            dim = 1 if p.size(0) > p.size(1) else 0
            squares[i] = 0.9 * squares[i] + 0.1 * update.square().mean(dim, keepdim=True)
            balanced = update / squares[i].sqrt()
            expected[i] -= 0.1 * max(1, p.size(0) / p.size(1)) ** 0.5 * balanced * update.norm() / balanced.norm()
        ours[3].grad = torch.zeros(8, 8)
        optimizer.step()
    for p, q in zip(ours, expected):
        torch.testing.assert_close(p.detach(), q, rtol=0.02, atol=2e-3)


def test_value_embeddings_learn_at_a_rate_of_their_own(in_prepared):
    """Four times the common one, in a resumed run too."""
    run("scaled", "--max_steps=4", "--evals=0")
    run("scaled", "--max_steps=8", "--evals=0", "--resume")
    checkpoint = load_checkpoint("out/scaled")
    common, _ = rates = [group["lr"] for group in checkpoint["optimizers"][1]["param_groups"]]
    assert common > 0 and rates == pytest.approx([common, 4 * common])


def test_schedules_rise_and_fall():
    args = train.command_line().parse_args(["--warmup=0.1", "--cooldown=0.5"])
    for args.schedule, expected in (("wsd", [0, 0.5, 1, 1, 0.5, 0]), ("cosine", [0, 0.5, 1, 0.5868, 0.1786, 0])):
        found = [model_file.lr_multiplier(p, args) for p in (0, 0.05, 0.1, 0.5, 0.75, 1)]
        assert found == pytest.approx(expected, abs=1e-4)
    args = train.command_line().parse_args(["--cooldown=0"])
    assert model_file.lr_multiplier(0.5, args) == model_file.lr_multiplier(0.999, args) == 1


def test_the_logged_loss_is_the_mean_over_the_whole_step(in_prepared):
    """At step 1 the model knows nothing; and two turns of a step log the same as one turn of twice the rows."""
    run("whole", "--max_steps=3", "--evals=0", "--optimizer=adamw")
    run("turns", "--max_steps=3", "--evals=0", "--optimizer=adamw", "--batch_size=2")
    whole, turns = read_log("whole"), read_log("turns")
    assert whole[0]["train_loss"] == pytest.approx(math.log(load_meta("tiny")["vocab_size"]), abs=1e-4)
    for a, b in zip(whole, turns):
        assert a == pytest.approx(b, rel=1e-4)
    factors = [model_file.lr_multiplier((step + 0.5) / 3, train.command_line().parse_args([])) for step in range(3)]
    assert [line["lr"] for line in whole if "lr" in line] == pytest.approx([0.002 * f for f in factors])
    assert factors[0] == 1 > factors[1] > factors[2]


# --- stopping and going on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resumed_equals_uninterrupted_bit_for_bit(in_prepared, monkeypatch, optimizer):
    """Stopped after 8 of 20 steps, with 4 turns a step: the same weights, optimizer state and log in the end."""
    options = ["--max_steps=20", "--batch_size=2", "--log_interval=3", f"--optimizer={optimizer}"]
    run(f"straight-{optimizer}", *options)

    def stop_at_8(*args, real=train.lr_multiplier, calls=[]):
        calls.append(1)
        if len(calls) == 8:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, "lr_multiplier", stop_at_8)
        run(f"stopped-{optimizer}", *options)
    assert load_checkpoint(f"out/stopped-{optimizer}")["step"] == 8
    run(f"stopped-{optimizer}", *options, "--resume")
    a, b = (load_checkpoint(f"out/{name}-{optimizer}") for name in ("straight", "stopped"))
    assert a["step"] == 20 and a["rows_read"] == [160]
    for name in ("model", "optimizers", "rows_read"):
        assert same(a[name], b[name]), name
    assert read_log(f"straight-{optimizer}") == read_log(f"stopped-{optimizer}")
    steps = [line["step"] for line in read_log(f"straight-{optimizer}") if "train_loss" in line]
    assert steps == [3, 6, 7, 9, 12, 14, 15, 18, 20]  # evaluations are after 7 and 14 steps


def test_after_sigkill_the_checkpoint_loads_and_the_log_has_no_gap(in_prepared):
    options = ["--out_dir=out/killed", "--max_steps=5000", "--evals=500"]
    for lines in (30, 60):
        process = start(*options, *(["--resume"] if lines == 60 else []))
        wait_for("out/killed/log.jsonl", process, lines)
        process.kill()
        process.communicate()
        step = load_checkpoint("out/killed")["step"]
        assert step > 0
    run("killed", f"--max_steps={step + 5}", "--evals=500", "--resume")
    assert [line["step"] for line in read_log("killed") if "train_loss" in line] == list(range(1, step + 6))


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, getattr(signal, "SIGHUP", None)])
def test_a_signal_saves_and_a_shell_loop_ends_with_ctrl_c(in_prepared, number):
    out = f"out/signal-{number}"
    process = start(f"--out_dir={out}", "--max_minutes=5", "--evals=0")
    wait_for(f"{out}/log.jsonl", process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == (-number if number == signal.SIGINT else 0) and "stopping" in stderr
    assert f"saved in {out}: the same command with --resume" in stdout
    assert load_checkpoint(out)["step"] >= 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    runs.save_checkpoint({"step": 1, "model_config": {}}, str(tmp_path / "ckpt.pt"))
    os.symlink("/dev/full", tmp_path / "ckpt.pt.tmp")
    with pytest.raises(SystemExit, match="cannot write .*the last checkpoint stays: make room"):
        runs.save_checkpoint({"step": 2, "weights": torch.zeros(10**6)}, str(tmp_path / "ckpt.pt"))
    assert load_checkpoint(str(tmp_path))["step"] == 1 and not os.path.lexists(tmp_path / "ckpt.pt.tmp")


def test_a_loss_that_is_not_finite_stops_the_run(in_prepared):
    with pytest.raises(SystemExit, match=r"not finite at step 2;.*lower --lr"):
        run("nan", "--max_steps=50", "--optimizer=adamw", "--lr=1e30", "--warmup=0.001")


def test_a_signal_in_the_last_step_ends_the_run_without_scoring(in_prepared, monkeypatch, capsys):
    def stop_at_3(*args, real=train.lr_multiplier, calls=[]):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(train, "lr_multiplier", stop_at_3)
    run("last", "--max_steps=3")
    assert "stopped at step 3 and saved" in capsys.readouterr().out
    assert not any("final" in line for line in read_log("last"))
    run("last", "--max_steps=3", "--resume")
    assert read_log("last")[-1]["final"]


def test_spoiled_weights_are_never_kept_or_replace_a_checkpoint(in_prepared, monkeypatch):
    """A gradient that is not finite spoils the weights in a step whose own loss is still good."""
    run("spoiled", "--max_steps=4", "--clip=0.5")
    real, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(parameters, most):
        parameters, _ = list(parameters), calls.append(1)
        assert most == 0.5
        if len(calls) == 4:  # the last step
            parameters[0].grad.fill_(math.nan)
        return real(parameters, most)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    with pytest.raises(SystemExit, match="at step 8; the last checkpoint stays"):
        run("spoiled", "--max_steps=8", "--clip=0.5", "--resume")
    assert all(p.isfinite().all() for p in load_checkpoint("out/spoiled")["model"].values())
    calls.clear()
    with pytest.raises(SystemExit, match="at step 4"):
        run("spoiled-2", "--max_steps=8", "--clip=0.5", "--keep=log", "--log_interval=100")
    assert not os.path.exists("out/spoiled-2/ckpt-0000004.pt")


@pytest.mark.parametrize("options, expected", [
    (["--resume", "--n_embd=64"], "was trained with --n_embd=32, not 64"),
    (["--resume", "--dataset=other"], "was trained with --dataset=tiny, not other"),
    (["--resume", "--lr=0.1"], "was trained with --lr=0.03, not 0.1"),
    ([], "holds a run: add --resume"),
    (["--out_dir=out/new", "--init_from=out/base", "--n_embd=64"], "another n_embd=32"),
    (["--out_dir=out/new", "--resume"], "no run in out/new to continue"),
    (["--out_dir=out/new", "--max_steps=3", "--max_minutes=1"], "give only one of"),
    (["--out_dir=out/new", "--embed_std=0"], "--embed_std=0.0 must be at least 0.001"),
    (["--out_dir=out/new", "--clip=-1"], "--clip=-1.0 must be at least 0"),
    (["--out_dir=out/new", "--warmup=0.6"], "--warmup and --cooldown"),
    (["--out_dir=out/new", "--eval_stories=-1"], "--eval_stories=-1 must be at least 0"),
    (["--out_dir=out/new", "--dataset=tiny:nan"], "must be a name, or name:weight"),
    (["--out_dir=out/new", "--log_interval=0"], "--log_interval=0 must be at least 1"),
    (["--out_dir=out/new", "--batch_tokens=16"], "--batch_tokens=16 is 0 rows"),
    (["--out_dir=out/new", "--batch_token=16"], "did you mean --batch_tokens"),
    (["--out_dir=out/new", "--block_size=100000"], "fewer than two rows"),
    (["--out_dir=out/new", "--dataset=nothing"], "no dataset in data/nothing: run python prepare.py"),
    (["--out_dir=out/new", "--dataset=tiny,foreign"], "different tokenizers: .*--dataset=foreign --tokenizer=tiny"),
])
def test_what_does_not_fit_is_refused_by_name(in_prepared, capsys, options, expected):
    if not os.path.exists("out/base"):
        run("base", "--max_steps=2")
        for name, vocabulary in (("other", 512), ("foreign", 300)):
            write_jsonl(in_prepared / f"data/{name}/s.jsonl", make_stories(200, seed=7))
            prepare([f"--dataset={name}", "--val_fraction=0.1", *(["--tokenizer=tiny"] if vocabulary == 512 else
                                                                [f"--vocab_size={vocabulary}"])])
    length = [] if "--max_minutes=1" in options else ["--max_steps=4"]
    line = error_of(train.main, [*TINY, "--out_dir=out/base", *length, *options], capsys)
    assert re.search(expected, line), line


def test_an_option_added_since_does_not_hinder_resuming(in_prepared):
    """A fork adds options to train.py; checkpoints of before do not know them."""
    run("older", "--max_steps=2")
    checkpoint = load_checkpoint("out/older")
    del checkpoint["args"]["cooldown"]
    runs.save_checkpoint(checkpoint, "out/older/ckpt.pt")
    with pytest.raises(SystemExit, match="--cooldown=0.6, not 0.3"):  # it was trained as the default says
        run("older", "--max_steps=4", "--resume", "--cooldown=0.3")
    run("older", "--max_steps=4", "--resume")
    assert load_checkpoint("out/older")["step"] == 4


def test_a_run_interrupted_while_it_was_scored_is_scored_when_resumed(in_prepared, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, "skill_accuracy", interrupted)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            run("unscored", "--max_steps=3", "--evals=0")
    capsys.readouterr()
    run("unscored", "--max_steps=3", "--evals=0", "--resume")
    assert "\nval_bpb: " in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(runs, "atomic_write", None)  # all processes of torchrun come here: none may write the log
        run("unscored", "--max_steps=3", "--evals=0", "--resume")
    assert "is finished" in capsys.readouterr().out
    with monkeypatch.context() as patch:  # made longer, its old scores do not count
        patch.setattr(train, "skill_accuracy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("unscored", "--max_steps=5", "--evals=0", "--resume")
    with open("out/unscored/log.jsonl", "a") as log:
        log.write('{"step": 5, "fin')  # as a kill leaves it
    capsys.readouterr()
    run("unscored", "--max_steps=5", "--evals=0", "--resume")
    assert "\nval_bpb: " in capsys.readouterr().out


def test_as_many_evaluations_are_made_as_were_asked_for(in_prepared, monkeypatch):
    monkeypatch.setattr(train, "write_stories", lambda *args, **settings: [[0]] * len(args[4]))
    monkeypatch.setattr(train, "evaluate_mix", lambda *args: {"val_loss": 1.0, "val_bpb": 1.0})
    run("often", "--max_steps=100", "--evals=100")
    assert [line["step"] for line in read_log("often") if "val_bpb" in line] == list(range(1, 101))


# --- other starts -------------------------------------------------------------------------------------------------


def test_two_processes_learn_as_one(in_prepared):
    """torchrun with two processes on the CPU: the same losses, with the same total batch, within float error."""
    options = ["--max_steps=8", "--batch_size=2", "--evals=2"]
    run("one", *options)
    torchrun("--out_dir=out/two", *options)
    one, two = read_log("one"), read_log("two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-3)


def test_two_processes_keep_one_clock(in_prepared):
    """With --max_minutes the processes must agree when to evaluate and when to stop, whatever their own clocks say."""
    Path("skewed.py").write_text(f"""import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
real, rank = time.perf_counter, int(os.environ["RANK"])
train.time.perf_counter = lambda: real() * (1 + 2 * rank)
train.main()""")
    torchrun("--out_dir=out/clock", "--max_minutes=0.03", "--evals=9", script="skewed.py")
    log = read_log("clock")
    assert [line["step"] for line in log if "train_loss" in line] == list(range(1, log[-1]["step"] + 1))


@pytest.mark.parametrize("at_once", [False, True])  # as torch does on a Python that it cannot compile for
def test_without_a_compiler_the_plain_model_trains(in_prepared, monkeypatch, capsys, at_once):
    def broken(model, **options):
        def forward(*args):
            raise RuntimeError("no compiler here")
        return forward() if at_once else forward
    monkeypatch.setattr(torch, "compile", broken)
    run(f"plain-{at_once}", "--max_steps=2", "--compile=True")
    assert "compiling fails here (RuntimeError): going on without it" in capsys.readouterr().out
    assert load_checkpoint(f"out/plain-{at_once}")["step"] == 2
    run(f"plain-{at_once}", "--max_steps=2", "--compile=True", "--resume")  # finished: nothing left to compile
    assert "compiling" not in capsys.readouterr().out


def test_compiling_leaves_no_trace_in_the_weights(in_prepared, monkeypatch):
    """The step that is taken to compile, on a batch of nothing, must not count."""
    run("plain", "--max_steps=2", "--evals=0")
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    run("compiled", "--max_steps=2", "--evals=0", "--compile=True")
    assert same(*(load_checkpoint(f"out/{name}")["model"] for name in ("plain", "compiled")))


def test_minutes_count_from_the_end_of_the_first_step(in_prepared, monkeypatch):
    def slow_at_first(*args, real=train.lr_multiplier, calls=[]):
        calls.append(1)
        time.sleep(1 if len(calls) == 1 else 0)  # as compiling is
        return real(*args)
    monkeypatch.setattr(train, "lr_multiplier", slow_at_first)
    run("minutes", "--max_minutes=0.01", "--evals=0")
    assert load_checkpoint("out/minutes")["step"] > 1


def test_changed_data_is_noticed_at_resume(workplace):
    write_jsonl(workplace / "data/tiny/s.jsonl", make_stories(100))
    prepare(["--dataset=tiny", "--vocab_size=300", "--val_fraction=0.1"])
    run("x", "--max_steps=2")
    write_jsonl(workplace / "data/tiny/s.jsonl", make_stories(120))
    prepare(["--dataset=tiny", "--tokenizer=tiny", "--val_fraction=0.1"])
    with pytest.raises(SystemExit, match="data/tiny is not what out/x was trained on"):
        run("x", "--max_steps=4", "--resume")


def test_init_from_starts_a_new_run_from_old_weights(in_prepared):
    run("old", "--max_steps=3")
    run("warm", "--max_steps=1", "--init_from=out/old", "--evals=0", "--lr=1e-12")
    old, warm = load_checkpoint("out/old"), load_checkpoint("out/warm")
    assert warm["step"] == 1
    for name, weight in old["model"].items():
        assert torch.allclose(weight, warm["model"][name], atol=1e-6), name


def test_a_longer_context_may_follow_a_short_one_but_not_if_positions_have_weights(in_prepared):
    for pos in ("rope", "learned"):
        run(f"short-{pos}", "--max_steps=1", f"--pos={pos}")
    longer = ("--max_steps=1", "--block_size=128", "--batch_tokens=512")
    run("longer", *longer, "--init_from=out/short-rope")
    assert load_run("out/longer")[0].config.block_size == 128
    with pytest.raises(SystemExit, match="block_size"):
        run("longer-learned", *longer, "--pos=learned", "--init_from=out/short-learned")


def test_a_warm_run_goes_on_when_the_old_one_is_gone(in_prepared):
    run("cold", "--max_steps=3")
    run("warmed", "--max_steps=2", "--init_from=out/cold")
    shutil.rmtree("out/cold")
    for steps, options in ((4, ["--init_from=out/cold"]), (6, [])):
        run("warmed", f"--max_steps={steps}", "--resume", *options)
        checkpoint = load_checkpoint("out/warmed")
        assert checkpoint["step"] == steps and checkpoint["args"]["init_from"] == "out/cold"


def test_new_embeddings_are_spread_as_asked(in_prepared):
    for std in (0.1, 1):
        run(f"std{std}", "--max_steps=1", f"--embed_std={std}")
        spread = load_run(f"out/std{std}")[0].embed.weight.std().item()
        assert spread == pytest.approx(std, rel=0.2)  # which one step has hardly changed


def test_a_size_is_a_shape_whose_parts_can_be_changed(in_prepared):
    options = ["--dataset=tiny", "--size=1M", "--n_layer=1", "--max_steps=1", "--evals=0", "--compile=False",
               "--batch_tokens=256"]
    train.main([*options, "--pos=alibi", "--smear=False"])
    config = load_checkpoint("out/tiny-1x64")["model_config"]
    assert (config["n_layer"], config["n_embd"], config["n_head"]) == (1, 64, 4)
    assert (config["pos"], config["smear"]) == ("alibi", False)
    train.main([*options[:1], "--n_embd=200", *options[2:], "--out_dir=out/odd"])  # which 3 heads would not divide
    assert load_checkpoint("out/odd")["model_config"]["n_head"] == 2


def test_a_mix_draws_by_its_weights(in_prepared, capsys):
    write_jsonl(in_prepared / "data/more/s.jsonl", make_stories(100, seed=9))
    prepare(["--dataset=more", "--val_fraction=0.1", "--tokenizer=tiny"])
    run("mix", "--dataset=tiny:0.25,more:0.75", "--max_steps=50", "--evals=1")
    assert all(re.match(r"\S+: +\S", line) for line in capsys.readouterr().out.split("\n\n")[-1].splitlines())
    used = load_checkpoint("out/mix")["rows_read"]
    assert sum(used) == 400 and 60 < used[0] < 140
    last = read_log("mix")[-1]
    assert last["val_bpb"] == pytest.approx(0.25 * last["val_bpb/tiny"] + 0.75 * last["val_bpb/more"])


def test_log_spaced_checkpoints_are_kept(in_prepared):
    run("kept", "--max_steps=9", "--keep=log")
    names = sorted(name for name in os.listdir("out/kept") if name.startswith("ckpt-"))
    assert names == [f"ckpt-{step:07d}.pt" for step in (1, 2, 4, 8)]
    assert load_run(f"out/kept/{names[2]}")[1]["step"] == 4


def test_a_budget_in_flops_gives_the_smaller_model_more_steps(in_prepared):
    for width in (16, 32):
        run(f"flops-{width}", "--max_flops=1e9", f"--n_embd={width}", "--n_head=1", "--evals=0")
    steps = [load_checkpoint(f"out/flops-{width}")["step"] for width in (16, 32)]
    flops = [load_run(f"out/flops-{width}")[0].flops_per_token() for width in (16, 32)]
    assert steps[0] > steps[1]
    assert all((n - 1) * 256 * each < 1e9 <= n * 256 * each for n, each in zip(steps, flops))


def test_the_run_ends_with_a_summary_to_grep(in_prepared, capsys):
    run("summary", "--max_steps=30", "--optimizer=adamw")
    out = capsys.readouterr().out
    summary = dict(line.split(":", 1) for line in out.split("\n\n")[-1].splitlines())
    assert {"val_bpb", "val_loss", "train_loss", "steps", "tokens", "tokens_per_second", "seconds"} <= summary.keys()
    assert float(summary["val_loss"]) < math.log(512) and int(summary["tokens"]) == 30 * 256
    assert "Story 3:" in out and "MFLOPs per token" in out and "tokens per epoch" in out


def test_each_evaluation_says_how_far_the_ladder_is_climbed(in_prepared, capsys):
    run("climb", "--max_steps=40", "--evals=4", "--optimizer=adamw")
    ladder = capsys.readouterr().out.split("got right:\n")[1].split("\n\n")[0].splitlines()
    logged = [(line["step"], line["accuracy_reasoning"]) for line in read_log("climb") if "accuracy_reasoning" in line]
    assert [step for step, _ in logged] == [10, 20, 30, 40]
    assert ladder[0].split() == ["step", "reasoning"]
    printed = [(int(row.split()[0]), int(row.split()[-1][:-1])) for row in ladder[1:]]
    assert printed == [(step, round(100 * share)) for step, share in logged]


def test_the_world_is_made_where_it_is_missing(workplace, monkeypatch, capsys):
    """`python train.py` on a fresh machine: stories, bins, a model, its accuracy on each skill."""
    monkeypatch.setattr(world, "write", lambda n, real=world.write: real(n // 250))
    options = ["--max_steps=4", "--evals=0", "--n_layer=1", "--n_embd=32", "--compile=False", "--device=cpu"]
    train.main([*options, "--out_dir=out/first"])
    out = capsys.readouterr().out
    assert "writing 30,000 stories of the built-in world" in out and "preparing data/world" in out
    summary = dict(line.split(":", 1) for line in out.split("\n\n")[-1].splitlines())
    assert 0.1 < float(summary["floor_bpb"]) < 0.3 < float(summary["val_bpb"])
    assert all(0 <= float(summary[f"accuracy_{skill}"]) <= 1 for skill in ("grammar", "fact", "context", "reasoning"))
    train.main([*options, "--out_dir=out/second"])
    assert "writing" not in capsys.readouterr().out
    world.write(10)
    with pytest.raises(SystemExit, match="python prepare.py --dataset=world"):
        train.main([*options, "--out_dir=out/third"])


# -----------------------------------------------------------------------------------------------------------------
# what a GPU gets, as far as a CPU can tell


@pytest.mark.parametrize("device, options, expected", [
    ("cpu", ["--max_tokens=500000000"], 4096), ("cuda", [], 4096), ("cuda", ["--max_tokens=20000000"], 8192),
    ("cuda", ["--max_tokens=470000000"], 32768), ("cuda", ["--max_tokens=5000000000"], 65536),
    ("cuda", ["--max_tokens=1000"], 4096), ("cuda", ["--max_minutes=60"], 16384), ("cuda", ["--max_minutes=1"], 4096),
    ("cuda", ["--max_steps=100"], 4096), ("cpu", ["--block_size=8192"], 8192),
    ("cuda", ["--block_size=8192", "--max_minutes=1"], 8192)])
def test_a_long_run_on_a_gpu_takes_larger_steps(device, options, expected):
    args = train.command_line().parse_args(options)
    tokens = args.max_tokens or 5_000_000
    assert train.choose_batch_tokens(args, tokens, torch.device(device)) == expected


def a_run(memory, processors, **settings):
    """What max_micro_batch() and should_compile() look at, on a GPU of so many bytes and processors."""
    run = SimpleNamespace(device=torch.device("cuda"), config=GPTConfig(4096, 512, 8, 8, 512), max_steps=1221,
                          step_tokens=4096, args=SimpleNamespace(compile="auto", max_minutes=0))
    run.flops_per_token = GPT(run.config).flops_per_token()
    properties = SimpleNamespace(total_memory=memory, multi_processor_count=processors)
    return run, properties


@pytest.mark.parametrize("gigabytes, rows", [(80, 128), (24, 92), (6, 23), (0.1, 1)])
def test_a_micro_batch_fills_half_of_a_gpu(monkeypatch, gigabytes, rows):
    run, properties = a_run(int(gigabytes * 1e9), 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert train.max_micro_batch(run) == rows


def test_a_small_gpu_compiles_sooner(monkeypatch):
    """The plain command with 8 x 512 is long for a laptop's card, and short for an H100."""
    for processors, compiling in ((132, False), (14, True)):
        run, properties = a_run(1, processors)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        assert train.should_compile(run) == compiling


def test_a_batch_that_does_not_fit_is_halved_and_the_run_learns_the_same(in_prepared, monkeypatch, capsys):
    def try_batch(run):
        tried.append(run.micro_batch)
        if run.micro_batch > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
    tried, fitting = [], 2
    monkeypatch.setattr(fit, "try_batch", try_batch)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    run("fits", "--max_steps=3", "--compile=True")
    assert tried == [8, 4, 2] and "micro batches of 2 rows" in capsys.readouterr().out
    run("small", "--max_steps=3", "--batch_size=2")
    assert same(*(load_checkpoint(f"out/{name}")["model"] for name in ("fits", "small")))
    fitting = 0
    with pytest.raises(SystemExit, match="not even one row fits"):
        run("never", "--max_steps=3", "--compile=True")


def test_a_computer_with_little_memory_takes_small_micro_batches(monkeypatch):
    """Where memory runs out, Linux kills a process without a word."""
    run = SimpleNamespace(device=torch.device("cpu"), config=GPTConfig(4096, 256, 8, 8, 512))
    for gigabytes, rows in ((64, 32), (4, 16), (0.1, 1), (math.inf, 32)):
        monkeypatch.setattr(fit, "usable_memory", lambda: gigabytes * 2**30)
        assert train.max_micro_batch(run) == rows


def test_both_optimizers_skip_a_step_that_overflows_in_float16(in_prepared):
    options = [*TINY, "--dtype=float16", "--max_steps=2", "--out_dir=out/overflow"]
    run = train.Run(train.fill_defaults(train.command_line().parse_args(options)))
    before, scale = [p.detach().clone() for p in run.model.parameters()], run.scaler.get_scale()
    idx = torch.zeros(2, 32, dtype=torch.int64)
    run.scaler.scale(run.model(idx, idx).mean()).backward()
    run.model.embed.weight.grad[0, 0] = math.inf  # AdamW's; those of Muon stay finite
    train.update_weights(run)
    assert same(before, list(run.model.parameters())) and run.scaler.get_scale() < scale


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_bin_is_found_before_the_first_step(in_prepared, split):
    """One bit in the middle, which changes neither size nor vocabulary."""
    data = Path("data/tiny", f"{split}.bin")
    whole = data.read_bytes()
    middle = len(whole) // 4 * 2
    data.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:])
    try:
        with pytest.raises(SystemExit, match=f"{split}.bin is damaged.*python prepare.py --dataset=tiny"):
            run("damaged", "--max_steps=3")
    finally:
        data.write_bytes(whole)
    assert not os.path.exists("out/damaged")


def test_a_disk_without_room_for_two_checkpoints_is_found_before_the_first_step(in_prepared, monkeypatch):
    """The old one stays until the new one is complete."""
    def check_writable(folder, n_bytes):
        asked.append(n_bytes)
        raise SystemExit("no room")
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(runs, "check_writable", check_writable)
        with pytest.raises(SystemExit, match="no room"):
            run("roomy", "--max_steps=3")
        assert not os.path.exists("out/roomy")
    run("roomy", "--max_steps=3")
    size = os.path.getsize("out/roomy/ckpt.pt")
    assert 0.9 < asked[0] / (2 * size) < 1.3  # Muon keeps one average
    monkeypatch.setattr(runs, "check_writable", check_writable)
    with pytest.raises(SystemExit, match="no room"):
        run("roomy", "--max_steps=6", "--resume")
    assert asked[1] == asked[0] / 2


def test_data_that_is_write_protected_can_be_trained_on(in_prepared):
    os.chmod("data/tiny/tokenizer.tiktoken", 0o444)
    for options in ([], ["--resume"]):  # which copies the tokenizer again
        run("protected", f"--max_steps={2 + len(options)}", *options)
    assert os.stat("out/protected/tokenizer.tiktoken").st_mode & 0o200
    os.chmod("data/tiny/tokenizer.tiktoken", 0o644)


def test_processes_wait_for_the_first_as_long_as_it_validates(monkeypatch):
    """For hours, if need be: torch's own limit is half an hour, or ten minutes on GPUs."""
    asked = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: asked.update(options))
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    device_file.start_processes("cpu", "float32")
    assert asked["timeout"].total_seconds() >= 6 * 3600


def test_the_batch_that_was_chosen_is_stored_and_stays_when_resumed(in_prepared, monkeypatch):
    monkeypatch.setattr(train, "choose_batch_tokens", lambda args, tokens, device: 512)
    options = [option for option in TINY if not option.startswith("--batch_tokens")]
    train.main([*options, "--out_dir=out/chosen", "--max_steps=2"])
    monkeypatch.setattr(train, "choose_batch_tokens", lambda args, tokens, device: 1024)
    train.main([*options, "--out_dir=out/chosen", "--max_steps=4", "--resume"])
    checkpoint = load_checkpoint("out/chosen")
    assert checkpoint["args"]["batch_tokens"] == 512 and checkpoint["rows_read"] == [4 * 512 // 32]


def test_the_loop_waits_for_a_gpu_only_where_it_logs(in_prepared, monkeypatch):
    """Every item() waits until the GPU has computed the number. The steps that AdamW counts stay on the CPU."""
    class CountReads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                callers = [frame.filename for frame in traceback.extract_stack()]
                if not any(os.path.join("torch", "optim") in name for name in callers):
                    reads.append(function)
            return function(*args, **(kwargs or {}))

    def reads_of(log_interval):
        reads.clear()
        with CountReads():
            run(f"reads-{log_interval}", "--max_steps=12", f"--log_interval={log_interval}", "--evals=0")
        return len(reads)
    reads = []
    monkeypatch.setattr(train, "finish", lambda run: None)
    once = reads_of(100)  # the last step is always logged
    assert reads_of(4) == 3 * once and 1 <= once <= 5


def test_saving_is_left_out_of_the_speed(in_prepared, monkeypatch):
    """A slow disk says nothing about the speed of training. Evaluations come after 2, 4 and 6 steps, and weights are
    kept after 1, 2, 4 and 8."""
    finished = []
    monkeypatch.setattr(runs, "save_checkpoint", lambda checkpoint, path: time.sleep(0.05))
    monkeypatch.setattr(train, "finish", finished.append)
    run("saved", "--max_steps=8", "--evals=4", "--keep=log")
    # six of the pauses come before the last line of the log
    assert finished[0].speed > 7 * 256 / (finished[0].clock.seconds() - 6 * 0.05 + 0.1)


def test_orthogonalizing_in_float16_is_safe():
    """On a GPU without bfloat16. Gradients may be of any size."""
    matrices = torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(0))
    expected = model_file.orthogonalize(matrices, torch.float32)
    for scale in (1e-6, 1, 1e6):
        result = model_file.orthogonalize(scale * matrices, torch.float16).float()
        assert ((result - expected).norm() / expected.norm()) < 0.01


def test_two_processes_do_not_train_in_one_folder(in_prepared, capsys):
    first = start("--out_dir=out/shared", "--max_minutes=5", "--evals=1000")
    wait_for("out/shared/ckpt.pt", first)
    command = [*TINY, "--out_dir=out/shared", "--max_minutes=5", "--evals=1000"]
    for options in ([], ["--resume"]):
        line = error_of(train.main, [*command, *options], capsys)
        assert "another process is writing to out" in line
    first.kill()
    first.communicate()
    assert "holds a run" in error_of(train.main, [*TINY, "--out_dir=out/shared", "--max_minutes=5"], capsys)


@pytest.mark.parametrize("option, before", [("qk_gain", 0.0), ("value_embeds", False)])
def test_a_run_from_before_an_option_of_the_model_says_how_to_resume_it(in_prepared, capsys, option, before):
    """Its weights were trained without a gain or value embeddings, whatever the default is today."""
    old = f"out/without-{option}"
    run(f"without-{option}", "--max_steps=2", f"--{option}={before}")
    checkpoint = load_checkpoint(old)
    del checkpoint["model_config"][option], checkpoint["args"][option]
    torch.save(checkpoint, f"{old}/ckpt.pt")
    line = error_of(train.main, [*TINY, f"--out_dir={old}", "--resume", "--max_steps=4"], capsys)
    assert f"was trained with --{option}={before}" in line
    line = error_of(train.main, [*TINY, "--out_dir=out/with", f"--init_from={old}", "--max_steps=4"], capsys)
    assert f"another {option}={before}" in line
    run(f"without-{option}", "--resume", "--max_steps=4", f"--{option}={before}")
    assert load_checkpoint(old)["step"] == 4

"""Measure the speed of this repository on this machine, beside nanoGPT or an older checkout.

    python -m lab.benchmark                                  hardware, training, sampling, scoring and preparing
    python -m lab.benchmark --peer=FOLDER                    beside nanoGPT, whose model.py is in FOLDER
    python -m lab.benchmark --only=quality --peer=FOLDER     bits per byte after some minutes of training
    python -m lab.benchmark --only=old --baseline=FOLDER     a training step here and in an older checkout

Contenders are processes (lab/contenders.py). They take turns, because a laptop's speed drifts within minutes. A figure
is the median of several rounds, printed with the lowest and the highest.
"""
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from common import ROOT, CommandLine, run_main
from common.dataset import load_meta, load_tokens
from common.device import pick_device
from eval import evaluate, score
from lab.contenders import NEW_TOKENS, NanoGPT, seconds_of, shape_of, training_step
from lab.world import stories
from model import GPT, GPTConfig

def report(figure, values, note=""):
    """Print the median of the values, and their range if there are several."""
    middle, low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
                         for x in (statistics.median(values), min(values), max(values)))
    spread = f"({low} to {high})" if len(values) > 1 else ""
    print(f"{figure:60} {middle:>8} {spread:20} {note}")


def start_contender(name, work, args):
    """Start a contender and wait until it is ready. Returns its process, or None if it cannot run here.

    Its script and all that it imports come from this checkout, or from the other one if it is called `baseline`."""
    folder = args.baseline if name.startswith("baseline") else ROOT
    arguments = json.dumps([name, *work, str(args.device), args.peer])
    # -P keeps the folder lab/ off the path: all modules must come from the checkout named there
    command = [sys.executable, "-P", os.path.join(folder, "lab", "contenders.py"), arguments]
    process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": os.path.abspath(folder)})
    for line in process.stdout:  # nanoGPT prints as it builds
        if line == "ready\n":
            return process
    print(f"{name}: cannot run here, for the reason shown above")
    return None


def race(title, names, args, task, shape, rows):
    """Report the tokens/s of the contenders that can run here. Returns {name: [tokens/s of each round]}."""
    processes = {name: start_contender(name, [task, shape, rows], args) for name in names}
    tokens = rows * (shape["block_size"] if task == "train" else NEW_TOKENS)
    speeds = {name: [] for name in names if processes[name]}
    for _ in range(args.rounds):
        for name in speeds:  # they take turns
            print("go", file=processes[name].stdin, flush=True)
            line = processes[name].stdout.readline()
            if not line:
                sys.exit(f"{name} ended early, for the reason shown above")
            speeds[name].append(tokens / float(line))
    for name, values in speeds.items():
        processes[name].communicate()  # closes its stdin, which ends it
        note = ""
        if task == "train":
            flops = statistics.median(values) * GPT(GPTConfig(**shape)).flops_per_token()
            note = f"{flops / 1e9:,.0f} GFLOP/s"
        report(f"tokens/s of {title}, {name}", values, note)
    return speeds


def measure_ceiling(args):
    """What the hardware reaches at best. The other figures can be judged against it."""
    size = 8192 if args.on_gpu else 2048
    for dtype in args.dtypes:
        a = torch.randn(size, size, device=args.device, dtype=getattr(torch, dtype))
        gflops = [2 * size**3 / seconds_of(lambda: a @ a, args.device) / 1e9 for _ in range(args.rounds + 2)]
        report(f"GFLOP/s of matrix products, {dtype}", gflops[2:])  # the first two warm up


def measure_training(args):
    """Whole steps: forward, backward, clipping and optimizer. Without Muon, the optimizer is AdamW."""
    fastest = f"{args.fast} compiled"
    names = [f"this {dtype}" for dtype in args.dtypes] + [f"this {fastest}", f"this {fastest} muon"]
    if args.peer:
        names += [f"nanoGPT {dtype}" for dtype in args.dtypes] + [f"nanoGPT {fastest}"]
    for n_layer, n_embd in args.shapes:
        title = f"training {n_layer}x{n_embd}"
        if args.on_gpu:
            for name in names:  # one after the other, because its memory may hold only one
                race(title, [name], args, "train", shape_of(n_layer, n_embd, block_size=512), 64)
        else:
            race(title, names, args, "train", shape_of(n_layer, n_embd), 8 if n_embd >= 512 else 16)


def measure_old(args):
    """A step of the default run, 4x128 and 4,096 tokens with Muon, here and in another checkout."""
    for options in ("muon", "compiled muon"):
        names = [f"baseline {args.fast} {options}", f"this {args.fast} {options}"]
        results = race("training 4x128", names, args, "train", shape_of(4, 128), 16)
        if len(results) == 2:  # the ratio of two neighboring rounds hardly drifts
            before, after = results.values()
            report(f"… this / baseline, {options}", [new / old for old, new in zip(before, after)])


def measure_sampling(args):
    for rows in (1, 16, 512 if args.on_gpu else 64):
        names = [f"this {dtype}" for dtype in args.dtypes]
        if args.peer and rows <= 16:
            names.append("nanoGPT float32")  # with more it takes minutes
        race(f"sampling 8x256, {rows} at once", names, args, "sample", shape_of(8, 256), rows)


def measure_scoring(args):
    """Seconds of scoring 1,765 stories of 204 tokens, which is 1.4 MB of TinyStories."""
    model = GPT(GPTConfig(**shape_of(8, 512, vocab_size=4096))).to(args.device)
    tokens = np.random.default_rng(0).integers(1, 4096, 1765 * 204 + 1).astype(np.uint16)
    tokens[::204] = 0  # <|endoftext|>
    score(model, tokens[:205], 0)  # warms up
    for dtype in args.dtypes:
        with torch.autocast(args.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            report(f"seconds of val_bpb, 8x512, {dtype}", [seconds_of(lambda: score(model, tokens, 0), args.device)])


def run_script(name, *options, folder=None):
    """Run a script of this repository in `folder`. Its progress and its errors are shown, its other output is not."""
    command = [sys.executable, os.path.join(ROOT, name), *options]
    if subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"{name} failed, for the reason shown above")


def measure_preparing(args):
    """MB/s of prepare.py over 120,000 stories of the built-in world, which take half a minute to write."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "stories.txt")
        with open(corpus, "w", encoding="utf-8") as file:
            file.writelines(record["story"] + "\n<|endoftext|>\n" for record in stories(120_000))
        megabytes, started = corpus.stat().st_size / 1e6, time.perf_counter()
        run_script("prepare.py", "--dataset=x", "--input=stories.txt", folder=folder)
        report(f"MB/s of preparing {megabytes:,.0f} MB", [megabytes / (time.perf_counter() - started)])


def train_nanogpt(args, shape):
    """(model, tokens seen, seconds) of nanoGPT after training, compiled, in batches of 16 x 256 tokens.

    The learning rate rises over 2 % of the run, then falls to a tenth along a cosine. Compiling is not counted."""
    torch.manual_seed(1)
    model = NanoGPT(shape, args.peer).to(args.device)
    compiled, optimizer = torch.compile(model), model.make_optimizer(args.peer_lr)
    tokens, rng = load_tokens(args.dataset, "train"), np.random.default_rng(1)
    step, progress = 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.peer_lr * min(progress / 0.02, 0.55 + 0.45 * math.cos(math.pi * progress))
        starts = rng.integers(0, len(tokens) - 256, 16)
        rows = torch.from_numpy(np.stack([tokens[i:i + 257] for i in starts]).astype(np.int64))  # (16, 257)
        if args.on_gpu:
            rows = rows.pin_memory()
        rows = rows.to(args.device, non_blocking=True)
        training_step(compiled, [optimizer], rows[:, :-1], rows[:, 1:], args.fast)
        step += 1
        if step == 1:
            started = time.perf_counter()
        seconds = time.perf_counter() - started
        progress = step * 4096 / args.tokens if args.tokens else seconds / (60 * args.peer_minutes)
    return model, step * 4096, seconds


def measure_quality(args):
    """Bits per byte of train.py after --minutes and of nanoGPT after --peer_minutes, or of both after --tokens."""
    n_layer, n_embd = args.shapes[0]
    length = f"--max_tokens={args.tokens}" if args.tokens else f"--max_minutes={args.minutes}"
    with tempfile.TemporaryDirectory() as folder:
        run_script("train.py", f"--dataset={args.dataset}", f"--n_layer={n_layer}", f"--n_embd={n_embd}", length,
                   "--compile=True", "--evals=0", f"--device={args.device}", f"--out_dir={folder}/run")
        *_, last_line = Path(folder, "run", "log.jsonl").read_text(encoding="utf-8").splitlines()
    final = json.loads(last_line)
    report(f"val_bpb of train.py, {n_layer}x{n_embd}", [final["val_bpb"]],
           f"{final['seconds']:,.0f} s, {final['tokens']:,} tokens")
    if args.peer:
        shape = shape_of(n_layer, n_embd, vocab_size=load_meta(args.dataset)["vocab_size"])
        model, tokens, seconds = train_nanogpt(args, shape)
        report(f"val_bpb of nanoGPT, {n_layer}x{n_embd}, lr {args.peer_lr:g}",
               [evaluate(model, args.dataset)["val_bpb"]], f"{seconds:,.0f} s, {tokens:,} tokens")


PARTS = {"ceiling": measure_ceiling, "train": measure_training, "sample": measure_sampling, "eval": measure_scoring,
         "prepare": measure_preparing, "quality": measure_quality, "old": measure_old}


def read_options(argv):
    parser = CommandLine(__doc__.split("\n")[0])
    parser.option("only", "ceiling,train,sample,eval,prepare", f"parts, of {', '.join(PARTS)}")
    parser.option("shapes", "4x128,8x256,8x512", "layers x width of the models to train; quality takes the first")
    parser.option("rounds", 9, "of each contender", low=1)
    parser.option("device", "auto", "auto, cpu, cuda or cuda:1")
    parser.option("peer", "", "a folder with nanoGPT's model.py")
    parser.option("baseline", "", "a folder with another checkout of this repository, for old")
    parser.option("dataset", "tinystories", "what quality trains on")
    parser.option("minutes", 4.0, "of training by train.py for quality", low=0.01)
    parser.option("peer_minutes", 15.0, "of training nanoGPT for quality", low=0.01)
    parser.option("tokens", 0, "train both on this many tokens; 0: for the minutes above", low=0)
    parser.option("peer_lr", 8e-3, "nanoGPT's peak learning rate, from a sweep at 4x128 and 15 minutes", low=0)
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if not set(args.only) <= set(PARTS):
        parser.error(f"--only={','.join(args.only)} must name some of {','.join(PARTS)}")
    if "old" in args.only and not os.path.exists(f"{args.baseline}/train.py"):
        parser.error("the part `old` compares with another checkout of this repository: add --baseline=FOLDER")
    if args.peer and not os.path.exists(f"{args.peer}/model.py"):
        parser.error(f"--peer={args.peer} has no model.py: name the folder of nanoGPT")
    if not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", args.shapes):
        parser.error(f"--shapes={args.shapes} must look like 4x128,8x256")
    args.shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    return args


def main(argv=None):
    args = read_options(argv)
    args.device, fast = pick_device(args.device)
    args.on_gpu = args.device.type == "cuda"
    args.fast = str(fast).removeprefix("torch.")  # the dtype in which the device multiplies fastest
    args.dtypes = list(dict.fromkeys(("float32", args.fast)))  # one or two
    name = torch.cuda.get_device_name(args.device) if args.on_gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}")
    for part in args.only:
        PARTS[part](args)


if __name__ == "__main__":
    run_main(main)

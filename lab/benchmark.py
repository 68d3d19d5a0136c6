"""Measure the speed of this repository on this machine, beside other implementations.

    python -m lab.benchmark                                  all parts but quality, growth, start and old
    python -m lab.benchmark --peer=FOLDER                    beside nanoGPT, whose model.py is in FOLDER
    python -m lab.benchmark --only=quality --peer=FOLDER     bits per byte after some minutes of training
    python -m lab.benchmark --only=old --baseline=FOLDER     a training step here and in an older checkout

Contenders are processes (lab/contenders.py). They take turns, because a laptop's speed drifts within minutes. A figure
is the median of several rounds, printed with the lowest and the highest.
"""
import importlib.util
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

from common import CommandLine, pick_device, run_main
from eval import evaluate, score
from lab.contenders import NEW_TOKENS, ONE_STREAM, NanoGPT, seconds_of, shape_of, training_step
from model import GPT, GPTConfig
from prepare import load_meta, load_tokens
from sample import generate

ROOT = Path(__file__).resolve().parent.parent
# FAST stands for the dtype in which the device multiplies fastest
TRAINING = ("this float32", "this FAST", "this FAST compiled", "this FAST compiled muon", "nanoGPT float32",
            "nanoGPT FAST", "nanoGPT FAST compiled", "GPT-Neo float32", "GPT-Neo FAST")

# -----------------------------------------------------------------------------------------------------------------
# races between contenders


def start_contender(name, settings, args):
    """Start a contender and wait until it is ready. Returns its process, or None if it cannot run here.

    The one called `baseline` imports model.py, train.py and the rest from the other checkout. Errors go to stderr."""
    path = os.path.abspath(args.baseline) if name.startswith("baseline") else str(ROOT)
    settings = json.dumps([name, *settings, args.device, args.peer])
    # -P keeps lab/ off the path: its world.py would hide the world.py of an older, flat layout
    command = [sys.executable, "-P", str(ROOT / "lab" / "contenders.py"), settings]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    for line in process.stdout:  # nanoGPT prints as it builds
        if line == "ready\n":
            return process
    print(f"{name}: cannot run here, for the reason shown above")
    return None


def race(title, names, args, task, shape, rows, alternate=False):
    """Yield (figure, tokens/s of each round, note) for every contender that can run here.

    On a CPU they take turns. On a GPU, whose memory may hold only one, they follow each other unless `alternate`."""
    if not args.peer:
        names = [name for name in names if not name.startswith("nanoGPT")]
    if importlib.util.find_spec("transformers") is None:
        names = [name for name in names if not name.startswith("GPT-Neo")]
    names = list(dict.fromkeys(name.replace("FAST", args.fast) for name in names))  # once each: FAST may be float32
    tokens = rows * (shape["block_size"] if task == "train" else NEW_TOKENS)
    for group in [names] if alternate or not args.on_gpu else [[name] for name in names]:
        processes = {name: start_contender(name, [task, shape, rows], args) for name in group}
        rounds = {name: [] for name in group if processes[name]}
        for _ in range(args.rounds):
            for name in rounds:
                print("go", file=processes[name].stdin, flush=True)
                line = processes[name].stdout.readline()
                if not line:
                    sys.exit(f"{name} ended early, for the reason shown above")
                rounds[name].append(json.loads(line))
        for name, results in rounds.items():
            processes[name].communicate()  # closes its stdin, which ends it
            speeds = [tokens / seconds for seconds, _ in results]
            note = f"{results[-1][1]:,.0f} MB"
            if task == "train":
                gflops = statistics.median(speeds) * GPT(GPTConfig(**shape)).flops_per_token() / 1e9
                note += f", {gflops:,.0f} GFLOP/s"
            yield f"tokens/s of {title}, {name}", speeds, note


# -----------------------------------------------------------------------------------------------------------------
# parts: each yields (figure, values, note)


def measure_ceiling(args):
    """What the hardware reaches at best. The other figures can be judged against it."""
    device = torch.device(args.device)
    size = 8192 if args.on_gpu else 2048
    for dtype in dict.fromkeys(("float32", args.fast)):
        a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
        gflops = [2 * size**3 / seconds_of(lambda: a @ a, device) / 1e9 for _ in range(9)]
        yield f"GFLOP/s of matrix products, {dtype}", gflops[2:], ""  # the first two warm up
    x = torch.ones(2**26, device=device)
    yield "GB/s of copying", [2 * x.nbytes / seconds_of(x.clone, device) / 1e9 for _ in range(9)][2:], ""


def measure_training(args):
    for n_layer, n_embd in args.shapes:
        shape, rows = shape_of(n_layer, n_embd), 8 if n_embd >= 512 else 16
        if args.on_gpu:
            shape, rows = shape_of(n_layer, n_embd, block_size=512), 64
        yield from race(f"training {n_layer}x{n_embd}", TRAINING, args, "train", shape, rows)


def measure_old(args):
    """A step of the default run, 4x128 and 4,096 tokens with Muon, here and in another checkout."""
    for options in ("muon", "compiled muon"):
        names = [f"baseline FAST {options}", f"this FAST {options}"]
        results = list(race("training 4x128", names, args, "train", shape_of(4, 128), 16, alternate=True))
        yield from results
        if len(results) == 2:  # the ratio of two neighboring rounds hardly drifts
            (_, before, _), (_, after, _) = results
            yield f"… this / baseline, {options}", [new / old for old, new in zip(before, after)], ""


def measure_sampling(args):
    for streams in (1, 16, 512 if args.on_gpu else 64):
        names = ["this float32", "this FAST", "GPT-Neo float32"]
        if streams == 1 and not args.on_gpu:
            names.append(ONE_STREAM)
        if streams <= 16:
            names.append("nanoGPT float32")  # with more it takes minutes
        yield from race(f"sampling 8x256, {streams} at once", names, args, "sample", shape_of(8, 256), streams)


def measure_scoring(args):
    """Seconds of scoring 1,765 stories of 204 tokens, which is 1.4 MB of TinyStories, and of 500 completions."""
    device = torch.device(args.device)
    model = GPT(GPTConfig(**shape_of(8, 512, vocab_size=4096))).to(device)
    tokens = np.random.default_rng(0).integers(1, 4096, 1765 * 204 + 1).astype(np.uint16)
    tokens[::204] = 0  # <|endoftext|>
    score(model, tokens[:205], 0)  # warms up
    for dtype in dict.fromkeys(("float32", args.fast)):
        with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            yield f"seconds of val_bpb, 8x512, {dtype}", [seconds_of(lambda: score(model, tokens, 0), device)], ""
    model, prompt = GPT(GPTConfig(**shape_of(8, 128, vocab_size=4096))).to(device), list(range(1, 21))
    seconds = seconds_of(lambda: list(generate(model, prompt, NEW_TOKENS, range(50), eot=-1)), device, repeats=10)
    yield "seconds of 500 completions, 8x128", [10 * seconds], ""


def run_script(command, **settings):
    """(seconds, peak MB of its largest process, what it prints) of a Python command. If it fails, this ends as well."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, **settings)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[0]} failed, for the reason shown above")
    return time.perf_counter() - started, usage.ru_maxrss / 1000, output


def run_training(args, *options, launcher=()):
    """The summary that train.py prints, {name: text}."""
    with tempfile.TemporaryDirectory() as folder:
        _, _, output = run_script([*launcher, ROOT / "train.py", f"--dataset={args.dataset}", "--evals=0",
                                   f"--device={args.device}", f"--out_dir={folder}/run", *options])
    return dict(line.split(":", 1) for line in output.splitlines() if re.match(r"[a-z_]+: ", line))


def train_nanogpt(args, shape):
    """(model, tokens seen, seconds) of nanoGPT after training, compiled, in batches of 16 x 256 tokens.

    The learning rate rises over 2 % of the run, then falls to a tenth along a cosine. Compiling is not counted."""
    torch.manual_seed(1)
    model = NanoGPT(shape, args.peer).to(args.device)
    compiled, tokens, rng = torch.compile(model), load_tokens(args.dataset, "train"), np.random.default_rng(1)
    optimizer = model.model.configure_optimizers(0.1, args.peer_lr, (0.9, 0.95), torch.device(args.device).type)
    step, progress = 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.peer_lr * min(1.0, progress / 0.02, 0.55 + 0.45 * math.cos(math.pi * progress))
        rows = np.stack([tokens[i:i + 257] for i in rng.integers(0, len(tokens) - 256, 16)])
        rows = torch.from_numpy(rows.astype(np.int64))
        rows = (rows.pin_memory() if args.on_gpu else rows).to(args.device, non_blocking=args.on_gpu)
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
    if args.minutes:
        budget = f"--max_tokens={args.tokens}" if args.tokens else f"--max_minutes={args.minutes}"
        summary = run_training(args, budget, f"--n_layer={n_layer}", f"--n_embd={n_embd}", "--compile=True")
        yield (f"val_bpb of train.py, {n_layer}x{n_embd}", [float(summary["val_bpb"])],
               f"{float(summary['seconds']):,.0f} s, {int(summary['tokens']):,} tokens")
    if args.peer:
        shape = shape_of(n_layer, n_embd, vocab_size=load_meta(args.dataset)["vocab_size"])
        model, tokens, seconds = train_nanogpt(args, shape)
        yield (f"val_bpb of nanoGPT, {n_layer}x{n_embd}, lr {args.peer_lr:g}",
               [evaluate(model, args.dataset)["val_bpb"]], f"{seconds:,.0f} s, {tokens:,} tokens")


def measure_growth(args):
    """What a step costs against width, context and vocabulary; and two processes against one."""
    shapes = [shape_of(8, width) for width in (64, 128, 256, 512)]
    shapes += [shape_of(8, 128, block_size=length) for length in (128, 512, 1024)]
    shapes += [shape_of(8, 128, vocab_size=size) for size in (1024, 4096, 16384)]
    for shape in shapes:
        title = f"training 8x{shape['n_embd']}, context {shape['block_size']}, vocabulary {shape['vocab_size']}"
        rows = (16384 if args.on_gpu else 4096) // shape["block_size"]
        yield from race(title, ["this FAST"], args, "train", shape, rows)
    for processes in (1, 2)[:torch.cuda.device_count() or 2]:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        options = ["--max_steps=150", f"--batch_size={16 // processes}", "--compile=True"]
        summary = run_training(args, *options, launcher=launcher)
        yield f"tokens/s of train.py, {processes} process(es)", [float(summary["tokens_per_second"])], ""


def measure_start(args):
    """Seconds from the command of train.py to the end of its first step, without compiling."""
    seconds = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            started, log = time.perf_counter(), Path(folder, "run", "log.jsonl")
            process = subprocess.Popen(
                [sys.executable, ROOT / "train.py", f"--dataset={args.dataset}", f"--device={args.device}",
                 "--compile=False", "--log_interval=1", f"--out_dir={folder}/run"],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while not (log.exists() and log.stat().st_size):
                if process.poll() is not None:
                    sys.exit(f"train.py failed: {process.stderr.read()}")
                time.sleep(0.01)
            seconds.append(time.perf_counter() - started)
            process.kill()
            process.wait()
    yield "seconds to the first step of train.py", seconds, ""


def measure_preparing(args):
    """MB/s of prepare.py over stories of the built-in world, repeated with another last sentence in each copy."""
    from lab.world import stories
    texts = [record["story"] for record in stories(30_000)]
    with tempfile.TemporaryDirectory() as folder:
        written, copies = 0, 0
        with open(f"{folder}/stories.txt", "w", encoding="utf-8") as file:
            while written < args.prepare_mb * 1e6:
                copies += 1
                written += sum(file.write(f"{text} It was told {copies} times.\n<|endoftext|>\n") for text in texts)
        seconds, memory, _ = run_script([ROOT / "prepare.py", "--dataset=x", "--input=stories.txt"], cwd=folder)
    yield f"MB/s of preparing {written / 1e6:,.0f} MB", [written / 1e6 / seconds], f"{memory:,.0f} MB a process"


def measure_writing(args):
    """Stories/s of generate.py, its start included. The fake server of its tests answers, on the same machine."""
    missing = [name for name in ("openai", "pytest") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"generate: skipped; to measure it, pip install {' '.join(missing)}")
        return
    sys.path.append(str(ROOT / "tests"))
    from test_generate import Server
    with tempfile.TemporaryDirectory() as folder, Server() as server:
        command = [ROOT / "generate.py", f"--base_url={server.url}", "--model=writer", "--n=5000", "--concurrency=64"]
        seconds, memory, _ = run_script(command, cwd=folder, env={**os.environ, "OPENAI_API_KEY": "none"})
        stories = Path(folder, "data", "mystories", "stories.jsonl").read_text(encoding="utf-8").count("\n")
    yield "stories/s of generate.py, 64 at a time", [stories / seconds], f"{memory:,.0f} MB"


PARTS = {"ceiling": measure_ceiling, "train": measure_training, "sample": measure_sampling, "eval": measure_scoring,
         "quality": measure_quality, "growth": measure_growth, "start": measure_start, "prepare": measure_preparing,
         "generate": measure_writing, "old": measure_old}


def read_options(argv):
    parser = CommandLine(__doc__.split("\n")[0])
    parser.option("only", "ceiling,train,sample,eval,prepare,generate", f"parts, of {', '.join(PARTS)}")
    parser.option("dataset", "tinystories", "what quality, growth and start train on")
    parser.option("minutes", 4.0, "of training by train.py for quality; 0 leaves it out", low=0)
    parser.option("peer_minutes", 15.0, "of training nanoGPT for quality", low=0.01)
    parser.option("tokens", 0, "train both on this many tokens; 0: for the minutes above", low=0)
    parser.option("peer_lr", 8e-3, "nanoGPT's peak learning rate, from a sweep at 4x128 and 15 minutes", low=0)
    parser.option("peer", "", "a folder with nanoGPT's model.py")
    parser.option("baseline", "", "a folder with another checkout of this repository, for old")
    parser.option("shapes", "4x128,8x256,8x512", "layers x width of the models to train; quality takes the first")
    parser.option("rounds", 9, "of each contender", low=1)
    parser.option("device", "auto", "auto, cpu, cuda or cuda:1")
    parser.option("prepare_mb", 100, "size of the file to prepare", low=1)
    parser.option("out", "", "a JSON file for the figures")
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if not set(args.only) <= set(PARTS):
        parser.error(f"--only={','.join(args.only)} must name some of {','.join(PARTS)}")
    if "old" in args.only and not args.baseline:
        parser.error("the part `old` compares with another checkout of this repository: add --baseline=FOLDER")
    for option, file in (("peer", "model.py"), ("baseline", "train.py")):
        folder = getattr(args, option)
        if folder and not Path(folder, file).exists():
            parser.error(f"--{option}={folder} has no {file}: name the folder that holds it")
    if not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", args.shapes):
        parser.error(f"--shapes={args.shapes} must look like 4x128,8x256")
    args.shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    return args


def format_number(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def main(argv=None):
    args = read_options(argv)
    device, dtype = pick_device(args.device)
    args.device, args.on_gpu, args.fast = str(device), device.type == "cuda", str(dtype).removeprefix("torch.")
    name = torch.cuda.get_device_name(device) if args.on_gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}")
    figures = {}
    for part in args.only:
        for figure, values, note in PARTS[part](args):
            figures[figure] = values
            middle, low, high = map(format_number, (statistics.median(values), min(values), max(values)))
            spread = f"({low} to {high})" if len(values) > 1 else ""
            print(f"{figure:68} {middle:>8} {spread:20} {note}", flush=True)
            if args.out:
                Path(args.out).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    run_main(main)

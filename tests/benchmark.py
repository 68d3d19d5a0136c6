"""Measure this repository on this machine, beside others where they are at hand.

    python tests/benchmark.py                                  everything but quality, growth and start
    python tests/benchmark.py --peer=FOLDER                    beside the model.py of a nanoGPT checkout in FOLDER
    python tests/benchmark.py --only=quality --peer=FOLDER     bits per byte after some minutes
    python tests/benchmark.py --only=growth                    cost against size, context, vocabulary and processes

The machine's own ceiling first, then each figure beside it. Contenders are processes of their own that take turns
within one run (on a GPU, whose memory may hold but one, they follow each other), and medians are shown with their
spread, because a laptop's speed drifts within minutes. Nothing here is a test.
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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import torch
import torch.nn.functional as F

from eval import evaluate, score
from model import GPT, GPTConfig, pick_device
from prepare import Parser, load_meta, load_tokens, start
from sample import NumpyGPT, generate
from train import command_line, keep_large_blocks, make_optimizers, peak_memory

VOCABULARY = 8192
TRAIN = ["this float32", "this FAST", "this FAST compiled", "this FAST compiled muon", "nanoGPT float32",
         "nanoGPT FAST", "nanoGPT FAST compiled", "GPT-Neo float32", "GPT-Neo FAST"]
SAMPLE = ["this float32", "this numpy", "this FAST", "nanoGPT float32", "GPT-Neo float32"]

# -----------------------------------------------------------------------------------------------------------------
# contenders: child processes that build a model once, and take a turn for every line they read


def build(who, layers, width, length, vocabulary, peer):
    """A model of this repository, or of another where it is at hand; its loss from a model, token ids and targets."""
    heads = max(1, width // 64)
    if who == "this":
        return GPT(GPTConfig(vocabulary, length, layers, heads, width)), lambda model, x, y: model(x, y).mean()
    if who == "nanoGPT":
        sys.path.insert(0, peer)
        sys.modules.pop("model")
        import model as other
        config = other.GPTConfig(block_size=length, vocab_size=vocabulary, n_layer=layers, n_head=heads, n_embd=width,
                                 dropout=0.0, bias=False)
        return other.GPT(config), lambda model, x, y: model(x, y.contiguous())[1]
    from transformers import GPTNeoConfig, GPTNeoForCausalLM
    kinds = [[["global", "local"], layers // 2]]
    config = GPTNeoConfig(vocab_size=vocabulary, max_position_embeddings=length, hidden_size=width, num_layers=layers,
                          num_heads=heads, attention_types=kinds, attention_dropout=0, embed_dropout=0,
                          resid_dropout=0)
    return GPTNeoForCausalLM(config), lambda model, x, y: model(x, labels=y).loss


def contender(name, task, layers, width, rows, length, vocabulary, peer, device):
    """Print the seconds of one turn, of this process' CPU time and its MB of memory, for each line on stdin.

    A turn is a whole step of training on `rows` rows, or the writing of 200 tokens in `rows` streams. On a GPU a
    step is the mean of ten, the next launched while one is computed, as in training."""
    who, _, how = name.partition(" ")
    dtype = getattr(torch, how.split()[0], torch.float32)
    print_, sys.stdout = sys.stdout, sys.stderr  # nanoGPT prints as it builds
    device = torch.device(device)
    model, loss = build(who, layers, width, length, vocabulary, peer)
    model = model.to(device)
    if who == "this" and device.type == "cpu":
        keep_large_blocks()
    if task == "train":
        args = command_line().parse_args(["--optimizer=muon" if "muon" in how else "--optimizer=adamw", "--lr=0.001"])
        optimizers = (make_optimizers(model, args) if who == "this" else
                      [torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")])  # as nanoGPT has it
        forward = torch.compile(model) if "compiled" in how else model
        idx = torch.randint(vocabulary, (rows, length), device=device)

        def turn():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                nats = loss(forward, idx, idx)
            nats.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    else:
        model = model.to(dtype).eval()
        model = NumpyGPT(model) if how == "numpy" else model
        idx = torch.zeros(rows, 1, dtype=torch.int64, device=device)

        @torch.inference_mode()
        def turn():
            if who == "this":
                list(generate(model, [0], 200, range(rows), eot=-1))
            elif who == "nanoGPT":
                model.generate(idx, 200)
            else:
                model.generate(idx, max_new_tokens=200, min_new_tokens=200, do_sample=True, pad_token_id=0)
    times = 10 if device.type == "cuda" and task == "train" else 1
    for _ in range(3 if task == "train" else 1):  # compile and warm up
        turn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for _ in iter(lambda: print("ready", file=print_, flush=True) or sys.stdin.readline(), ""):
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(times):
            turn()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = (time.perf_counter() - start) / times, time.process_time() - cpu
        print(json.dumps([*seconds, peak_memory(device)]), file=print_, flush=True)


def race(names, task, layers, width, rows, args, length=256, vocabulary=VOCABULARY):
    """{name: (seconds of each turn, MB)} of the contenders, which take turns; and the cores that others used."""
    if args.device.startswith("cuda") and len(names) > 1:
        races = [race([name], task, layers, width, rows, args, length, vocabulary) for name in names]
        others = max((used for found, used in races if found), default=0)
        return {name: turns for found, _ in races for name, turns in found.items()}, others
    children, found = {}, {}
    for name in dict.fromkeys(name.replace("FAST", args.fast) for name in names):
        settings = [name, task, layers, width, rows, length, vocabulary, args.peer, args.device]
        child = subprocess.Popen([sys.executable, __file__, "--contender=" + json.dumps(settings)], text=True,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if child.stdout.readline() == "ready\n":
            children[name], found[name] = child, []
        else:
            print(f"{name}: cannot run here")
    before, own = busy(), 0.0
    start = time.perf_counter()
    for _ in range(args.rounds):
        for name, child in children.items():
            child.stdin.write("go\n")
            child.stdin.flush()
            seconds, cpu, memory = json.loads(child.stdout.readline())
            child.stdout.readline()
            own += cpu
            found[name].append((seconds, memory))
    others = (busy() - before - own) / (time.perf_counter() - start)
    for child in children.values():
        child.stdin.close()
        child.wait()
    return {name: ([s for s, _ in turns], turns[-1][1]) for name, turns in found.items()}, others


def busy():
    """Seconds of CPU time that all processes of the machine have used (Linux; elsewhere 0)."""
    try:
        user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    except OSError:
        return 0.0
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


# -----------------------------------------------------------------------------------------------------------------
# the parts: each yields (figure, values, note)


def seconds_of(function, device, times=7):
    """Seconds of each of `times` calls, after two to warm up."""
    found = []
    for _ in range(times + 2):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return found[2:]


def ceiling(args):
    """GFLOP/s of matrix products, and GB/s of copying memory: what the hardware gives at best."""
    device = torch.device(args.device)
    size = 8192 if device.type == "cuda" else 2048
    for dtype in dict.fromkeys(("float32", args.fast)):
        a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
        found = [2 * size**3 / s / 1e9 for s in seconds_of(lambda: a @ a, device)]
        args.ceiling = statistics.median(found)  # the fast one's is kept
        yield f"GFLOP/s of products, {dtype}", found, ""
    block = torch.ones(2**26, device=device)
    yield "GB/s of copying", [2 * block.nbytes / s / 1e9 for s in seconds_of(block.clone, device)], ""


def train(args):
    """Tokens a second of whole steps: forward, backward, clipping, optimizer (AdamW for all but the one with Muon)."""
    for shape in args.shapes.split(","):
        layers, width = map(int, shape.split("x"))
        rows, length = (64, 512) if args.device.startswith("cuda") else (8 if width >= 512 else 16, 256)
        flops = GPT(GPTConfig(VOCABULARY, length, layers, max(1, width // 64), width)).flops_per_token()
        found, others = race([name for name in TRAIN if args.peer or "nanoGPT" not in name], "train", layers, width,
                             rows, args, length)
        for name, (seconds, memory) in found.items():
            speed = [rows * length / s for s in seconds]
            gflops = statistics.median(speed) * flops / 1e9
            share = f", {gflops / args.ceiling:.0%} of the ceiling" if hasattr(args, "ceiling") else ""
            yield f"tokens/s of training {shape}, {name}", speed, f"{gflops:,.0f} GFLOP/s{share}, {memory:,.0f} MB"
        print(f"    others used {others:.2f} cores meanwhile")


def sample(args):
    """Tokens a second of writing 200 tokens in one stream, in 16, and in more (where nanoGPT takes minutes)."""
    cuda = args.device.startswith("cuda")
    for streams in (1, 16, 512 if cuda else 64):
        names = [name for name in SAMPLE if (args.peer and streams <= 16 or "nanoGPT" not in name)
                 and (streams == 1 and not cuda or "numpy" not in name)]
        found, others = race(names, "sample", 8, 256, streams, args)
        for name, (seconds, _) in found.items():
            yield f"tokens/s of sampling 8x256, {streams} stream(s), {name}", [200 * streams / s for s in seconds], ""
        print(f"    others used {others:.2f} cores meanwhile")


def evaluation(args):
    """Seconds of scoring 1,765 stories of 204 tokens, 1.4 MB of TinyStories, with an untrained 28M model; and of 500
    completions of 200 tokens by a 3M model."""
    device = torch.device(args.device)
    model = GPT(GPTConfig(4096, 256, 8, 8, 512)).to(device)
    tokens = np.random.default_rng(0).integers(1, 4096, 1765 * 204 + 1).astype(np.uint16)
    tokens[::204] = 0
    score(model, tokens[:205], 0)  # to warm up
    start = time.perf_counter()
    score(model, tokens, 0)
    yield "seconds of val_bpb, 28M model, 1.4 MB", [time.perf_counter() - start], ""
    if args.fast != "float32":
        start = time.perf_counter()
        with torch.autocast(device.type, getattr(torch, args.fast)):
            score(model, tokens, 0)
        yield f"… with eval.py --dtype={args.fast}", [time.perf_counter() - start], ""
    model = GPT(GPTConfig(4096, 256, 8, 4, 128)).to(device)
    start = time.perf_counter()
    for first in range(0, 500, 50):
        list(generate(model, list(range(1, 21)), 200, range(first, first + 50), eot=-1))
    yield "seconds of 500 completions of 200 tokens, 3M model", [time.perf_counter() - start], ""


class Peer(torch.nn.Module):
    """nanoGPT's model with the surface that eval.score asks for."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.head = model, model.config, model.lm_head

    def forward(self, idx, targets):
        logits, _ = self.model(idx, targets.contiguous())  # (B, T, V)
        return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="none")


def trained(args, *options, launcher=()):
    """The summary that train.py prints, {name: text}, of a run on --dataset with these options."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, ROOT / "train.py", f"--dataset={args.dataset}", f"--device={args.device}",
                   f"--out_dir={folder}/run", "--compile=True", "--evals=0", *options]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return dict(line.split(":", 1) for line in lines if re.match(r"[a-z_]+: ", line))


def quality(args):
    """Bits per byte of train.py after --minutes, and of nanoGPT's model with AdamW after --peer_minutes, on the same
    data; or of both after --tokens. nanoGPT: batches of 16 x 256, compiled, cosine. Compiling is not counted."""
    layers, width = map(int, args.shapes.split(",")[0].split("x"))
    if args.minutes:
        budget = f"--max_tokens={args.tokens}" if args.tokens else f"--max_minutes={args.minutes}"
        summary = trained(args, budget, f"--n_layer={layers}", f"--n_embd={width}")
        note = f"{int(summary['tokens']):,} tokens, {int(summary['tokens_per_second']):,} a second"
        yield (f"val_bpb of train.py, {layers}x{width}, {float(summary['seconds']) / 60:.1f} minutes",
               [float(summary["val_bpb"])], note)
    if not args.peer:
        return
    cuda = args.device.startswith("cuda")
    torch.manual_seed(1)
    model, loss = build("nanoGPT", layers, width, 256, load_meta(args.dataset)["vocab_size"], args.peer)
    model = model.to(args.device)
    forward, tokens = torch.compile(model), load_tokens(args.dataset, "train")
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                                  betas=(0.9, 0.95), fused=cuda)
    draw, step, progress = np.random.default_rng(1), 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.peer_lr * min(1.0, progress / 0.02, 0.55 + 0.45 * math.cos(math.pi * progress))
        rows = [tokens[i:i + 257] for i in draw.integers(0, len(tokens) - 256, 16)]
        rows = torch.from_numpy(np.stack(rows).astype(np.int64))
        rows = (rows.pin_memory() if cuda else rows).to(args.device, non_blocking=cuda)
        with torch.autocast(args.device, getattr(torch, args.fast), enabled=args.fast != "float32"):
            nats = loss(forward, rows[:, :-1], rows[:, 1:])
        nats.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 1:
            start = time.perf_counter()
        seconds = time.perf_counter() - start
        progress = step * 4096 / args.tokens if args.tokens else seconds / (60 * args.peer_minutes)
    result = evaluate(Peer(model), args.dataset)
    yield (f"val_bpb of nanoGPT, {layers}x{width}, lr {args.peer_lr:g}, {seconds / 60:.1f} minutes",
           [result["val_bpb"]], f"{step * 4096:,} tokens, {step * 4096 / seconds:,.0f} a second")


def growth(args):
    """What a step costs against the model's size, the context and the vocabulary: tokens a second, memory; and one
    process against two."""
    best, tokens = ["this FAST"], 16384 if args.device.startswith("cuda") else 4096
    cases = [(f"8x{width}", width, 256, VOCABULARY) for width in (64, 128, 256, 512)]
    cases += [(f"8x128, context {length}", 128, length, VOCABULARY) for length in (128, 256, 512, 1024)]
    cases += [(f"8x128, vocabulary {size}", 128, 256, size) for size in (1024, 4096, 16384)]
    for what, width, length, vocabulary in cases:
        (seconds, memory), = race(best, "train", 8, width, tokens // length, args, length, vocabulary)[0].values()
        yield f"tokens/s of training {what}", [tokens / s for s in seconds], f"{memory:,.0f} MB"
    for processes in (1, 2)[:torch.cuda.device_count() or 2]:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
        summary = trained(args, "--max_steps=150", f"--batch_size={16 // processes}", launcher=launcher)
        yield f"tokens/s of train.py, {processes} process(es)", [float(summary["tokens_per_second"])], ""


def startup(args):
    """Seconds from the command to the end of the first step, of train.py without compiling."""
    found = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-u", ROOT / "train.py", f"--dataset={args.dataset}", f"--device={args.device}",
                 "--compile=False", "--log_interval=1", f"--out_dir={folder}/run"], stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL)
            log = Path(folder, "run", "log.jsonl")
            while not (log.exists() and log.stat().st_size):
                assert process.poll() is None
                time.sleep(0.01)
            found.append(time.perf_counter() - start)
            process.kill()
            process.wait()
    yield "seconds from train.py's command to its first step", found, ""


def prepare(args):
    """MB/s of prepare.py over a generated file, all in; and the peak of memory, all processes together, in MB."""
    megabytes = args.prepare_mb
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "world.py", "--n=30000", "--name=seed"], cwd=folder, check=True,
                       capture_output=True)
        with open(f"{folder}/data/seed/stories.jsonl") as f:
            stories = [json.loads(line)["story"] for line in f]
        with open(f"{folder}/stories.txt", "w") as f:
            written, turn = 0, 0
            while written < megabytes * 1e6:
                for story in stories:
                    written += f.write(f"{story} This was told {turn} times.\n<|endoftext|>\n")
                turn += 1
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen([sys.executable, ROOT / "prepare.py", "--dataset=x", "--input=stories.txt"],
                                   cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            sizes = subprocess.run(["ps", "-o", "rss=", "-s", str(process.pid)], capture_output=True, text=True).stdout
            peak = max(peak, sum(map(int, sizes.split())) / 1000)
            time.sleep(0.5)
        assert process.returncode == 0
        seconds = time.perf_counter() - start
    yield f"MB/s of preparing {megabytes} MB", [written / 1e6 / seconds], f"{peak:,.0f} MB"


def writer(args, n=5000, concurrency=64):
    """Stories a second of generate.py against a server on loopback, start included, and its peak of memory in MB."""
    from test_generate import SCRIPT, Server
    letters = "abcdefghijklmnopqrst"
    words = {kind: {"all": [kind[0] + letter for letter in letters]} for kind in ("verbs", "nouns", "adjectives")}
    with tempfile.TemporaryDirectory() as folder, Server() as server:
        with open(os.path.join(folder, "words.json"), "w") as file:
            json.dump(words, file)
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, SCRIPT, f"--base_url={server.url}", "--model=writer", "--words=words.json", f"--n={n}",
             f"--concurrency={concurrency}"], cwd=folder, env={**os.environ, "OPENAI_API_KEY": "none"},
            stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    assert status == 0
    yield f"stories/s of generate.py, {concurrency} at a time", [n / seconds], f"{usage.ru_maxrss / 1000:,.0f} MB"


PARTS = {"ceiling": ceiling, "train": train, "sample": sample, "eval": evaluation, "quality": quality,
         "growth": growth, "start": startup, "prepare": prepare, "generate": writer}


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.option("only", "ceiling,train,sample,eval,prepare,generate", f"of {', '.join(PARTS)}")
    parser.option("dataset", "tinystories", "what to train on for quality, growth and start")
    parser.option("minutes", 4.0, "… and for how long (0: only nanoGPT)")
    parser.option("peer_minutes", 15.0, "… and nanoGPT beside it")
    parser.option("tokens", 0, "… or both on as many tokens")
    parser.option("peer_lr", 8e-3, "… and nanoGPT's highest learning rate, from a sweep at 4x128 and 15 minutes")
    parser.option("peer", "", "a folder with nanoGPT's model.py, to be measured beside this one")
    parser.option("shapes", "4x128,8x256,8x512", "layers x width of what is trained; quality takes the first")
    parser.option("rounds", 9, "turns of each contender")
    parser.option("device", "auto", "auto, cpu or cuda")
    parser.option("prepare_mb", 100, "size of the file that prepare.py is measured on")
    parser.option("out", "", "a JSON file for the figures")
    parser.option("contender", "", "(used by this script itself)")
    args = parser.parse_args(argv)
    if args.contender:
        return contender(*json.loads(args.contender))
    for part in args.only.split(","):
        if part not in PARTS:
            sys.exit(f"--only={part} is none of {', '.join(PARTS)}")
    device, dtype = pick_device("cpu" if args.device == "auto" and not torch.cuda.is_available() else args.device)
    args.device, args.fast = str(device), str(dtype)[6:]  # FAST: what this device multiplies fastest in
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}")
    figures = {}
    for part in args.only.split(","):
        for figure, values, note in PARTS[part](args):
            figures[figure] = values
            middle, low, high = (f"{x:,.0f}" if x >= 20 else f"{x:.4g}"
                                 for x in (f(values) for f in (statistics.median, min, max)))
            print(f"{figure:62} {middle:>10} ({low} to {high})  {note}", flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    start(main)

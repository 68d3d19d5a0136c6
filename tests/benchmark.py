"""Measure this repository on this machine: python tests/benchmark.py [--only=train,sample] [--out=figures.json]

The machine's own ceiling first, then each figure beside it. Contenders alternate in one run, and medians are shown with
their spread, because a laptop's speed drifts within minutes. Nothing here is a test.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

from model import GPT, GPTConfig, pick_device
from prepare import Parser
from sample import generate
from train import keep_large_blocks

ROOT = Path(__file__).parent.parent
SHAPES = {"4x128": (4, 128, 2), "8x128": (8, 128, 4), "8x256": (8, 256, 4)}


def seconds_of(function, device, times=5):
    """Seconds of each of `times` calls, after one to warm up."""
    found = []
    for _ in range(times + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found[1:]


def spread(values):
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def ceiling(device):
    """GFLOP/s of matrix products in float32 and bfloat16, and GB/s of copying memory."""
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(2048, 2048, device=device, dtype=dtype)
        figures[f"GFLOP/s of products, {str(dtype)[6:]}"] = [2 * 2048**3 / s / 1e9
                                                              for s in seconds_of(lambda: a @ a, device)]
    block = torch.ones(2**26, device=device)
    figures["GB/s of copying"] = [2 * block.nbytes / s / 1e9 for s in seconds_of(block.clone, device)]
    return figures


def train_speed(device, batch=16, length=256):
    """Tokens a second of forward, backward and gradients, per shape and setting; the settings alternate."""
    figures = {}
    for name, (layers, width, heads) in SHAPES.items():
        idx = torch.randint(4096, (batch, length), device=device)
        contenders = {}
        for setting in ("float32", "bfloat16", "bfloat16, compiled"):
            model = GPT(GPTConfig(4096, length, layers, heads, width)).to(device)
            forward = torch.compile(model) if "compiled" in setting else model

            def step(model=model, forward=forward, setting=setting):
                with torch.autocast(device.type, torch.bfloat16, enabled="bfloat16" in setting):
                    forward(idx, idx).mean().backward()
                model.zero_grad()
            contenders[setting] = step
        times = {setting: [] for setting in contenders}
        for _ in range(5):
            for setting, step in contenders.items():
                times[setting] += seconds_of(step, device, 1)
        for setting, found in times.items():
            figures[f"tokens/s of training {name}, {setting}"] = [batch * length / s for s in found]
        figures[f"GFLOP/s of training {name}, {setting}"] = [
            batch * length * model.flops_per_token() / s / 1e9 for s in found]
    return figures


def sample_speed(device, tokens=200):
    """Tokens a second of writing with the cache, in one stream and in 64."""
    model = GPT(GPTConfig(4096, 256, 8, 4, 128)).to(device).eval()
    return {f"tokens/s of sampling 8x128, {n} stream(s)": [
        n * tokens / s for s in seconds_of(lambda: list(generate(model, [0], tokens, range(n), eot=-1)), device, 3)]
        for n in (1, 64)}


def prepare_speed(megabytes):
    """MB/s of prepare.py over a generated file, all in; and the peak of memory, all processes together, in MB."""
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
    return {f"MB/s of preparing {megabytes} MB": [written / 1e6 / seconds], "MB of memory for it": [peak]}


def generate_speed(n=5000, concurrency=64):
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
    return {f"stories/s of generate.py, {concurrency} at a time": [n / seconds],
            "MB of memory for it": [usage.ru_maxrss / 1000]}


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.option("only", "ceiling,train,sample,prepare,generate", "what to measure")
    parser.option("device", "auto", "auto, cpu or cuda")
    parser.option("prepare_mb", 100, "size of the file that prepare.py is measured on")
    parser.option("out", "", "a JSON file for the figures")
    args = parser.parse_args(argv)
    device, _ = pick_device(args.device, "float32")
    if device.type == "cpu":
        keep_large_blocks()
    parts = {"ceiling": lambda: ceiling(device), "train": lambda: train_speed(device),
             "sample": lambda: sample_speed(device), "prepare": lambda: prepare_speed(args.prepare_mb),
             "generate": generate_speed}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}; load of the last minute {os.getloadavg()[0]:.1f}")
    figures = {}
    for part in args.only.split(","):
        if part not in parts:
            sys.exit(f"--only={part} is none of {', '.join(parts)}")
        for figure, values in parts[part]().items():
            figures[figure] = values
            print(f"{figure:50} {spread(values)}", flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

"""One contender of lab/benchmark.py, in a process of its own: this repository, an older checkout of it, or nanoGPT.

Its name says whose model it is, in which dtype, and whether it is compiled or trained with Muon, as in
"this bfloat16 compiled muon". PYTHONPATH says whose model.py, sample.py and train.py are imported here.
"""
import importlib.util
import json
import os
import signal
import sys
import time

import torch
import torch.nn.functional as F

from common.device import keep_freed_memory
from model import GPT, GPTConfig, make_optimizers
from sample import generate, speed_up_single_rows
from train import command_line

NEW_TOKENS = 200  # sampled for each story


def shape_of(n_layer, n_embd, block_size=256, vocab_size=8192):
    return {"n_layer": n_layer, "n_head": max(1, n_embd // 64), "n_embd": n_embd, "block_size": block_size,
            "vocab_size": vocab_size}


class NanoGPT(torch.nn.Module):
    """nanoGPT's model with the interface of our GPT."""

    def __init__(self, shape, folder):
        super().__init__()
        # imported by its path, because our own file is called model.py as well
        spec = importlib.util.spec_from_file_location("nanogpt", os.path.join(folder, "model.py"))
        nanogpt = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nanogpt)
        self.model = nanogpt.GPT(nanogpt.GPTConfig(**shape, dropout=0.0, bias=False))
        self.config, self.head = self.model.config, self.model.lm_head

    def forward(self, idx, targets):
        """In training the mean loss, as nanoGPT computes it; in eval mode the loss of each token (B, T)."""
        logits, loss = self.model(idx, targets.contiguous())  # (B, T, V), ()
        if self.training:
            return loss
        return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="none")

    def make_optimizer(self, lr):
        """nanoGPT's AdamW, which is the fused one on a GPU."""
        return self.model.configure_optimizers(0.1, lr, (0.9, 0.95), self.head.weight.device.type)


def our_model(shape):
    """A model of this shape, and otherwise as train.py builds it without options."""
    options = vars(command_line().parse_args([]))
    defaults = {name: value for name, value in options.items() if name in GPTConfig.__dataclass_fields__}
    return GPT(GPTConfig(**{**defaults, **shape}))


def training_step(model, optimizers, idx, targets, dtype):
    """One step on a batch (B, T), in mixed precision unless `dtype` is float32."""
    with torch.autocast(idx.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        loss = model(idx, targets).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def training_round(name, model, shape, rows, device):
    """A function that takes one step on `rows` rows of random tokens."""
    if isinstance(model, NanoGPT):
        optimizers = [model.make_optimizer(lr=0.001)]
    else:
        optimizer = "muon" if "muon" in name else "adamw"
        optimizers = make_optimizers(model, command_line().parse_args([f"--optimizer={optimizer}", "--lr=0.001"]))
    if "compiled" in name:
        model = torch.compile(model)
    idx = torch.randint(shape["vocab_size"], (rows, shape["block_size"]), device=device)
    dtype = name.split()[1]
    return lambda: training_step(model, optimizers, idx, idx, dtype)


def sampling_round(name, model, rows, device):
    """A function that writes `rows` stories at once, each of NEW_TOKENS tokens."""
    model.eval().to(getattr(torch, name.split()[1]))
    if isinstance(model, NanoGPT):
        first = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        return lambda: model.model.generate(first, NEW_TOKENS)
    if rows == 1 and device.type == "cpu" and "float32" in name:
        speed_up_single_rows(model)  # as sample.py does
    return lambda: list(generate(model, [0], NEW_TOKENS, range(rows), eot=-1))  # no token is -1, so none ends early


def seconds_of(function, device, repeats=1):
    """Mean seconds of a call. Only the last one waits for the GPU, because training does not wait either."""
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats


def main(name, task, shape, rows, device, peer):
    """Print "ready", and then, for each line on stdin, the seconds of one round.

    A round is one training step, or the writing of `rows` stories. On a GPU, training takes the mean of ten steps,
    because it launches the next step before the last one has ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    device = torch.device(device)
    model = NanoGPT(shape, peer) if name.startswith("nanoGPT") else our_model(shape)
    model.to(device)
    if isinstance(model, GPT) and device.type == "cpu":
        keep_freed_memory()  # as train.py does
    if task == "train":
        compute = training_round(name, model, shape, rows, device)
    else:
        compute = sampling_round(name, model, rows, device)
    seconds_of(compute, device, repeats=3 if task == "train" else 1)  # warms up; the first step compiles
    repeats = 10 if task == "train" and device.type == "cuda" else 1
    print("ready", flush=True)
    while sys.stdin.readline():
        print(seconds_of(compute, device, repeats), flush=True)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))

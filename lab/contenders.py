"""One contender of lab/benchmark.py, in a process of its own: this repository, an older checkout of it, or a peer.

lab/benchmark.py starts it with the arguments of main() as JSON. Its name says what it is: whose model, in which dtype,
and whether compiled or with Muon, as in "this bfloat16 compiled muon". Whose files are imported as model.py, train.py
and sample.py depends on PYTHONPATH.
"""
import importlib.util
import json
import os
import signal
import sys
import time

import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from sample import generate
from train import command_line, make_optimizers, peak_memory

try:
    from train import keep_freed_memory
except ImportError:  # an older checkout
    from train import keep_large_blocks as keep_freed_memory

NEW_TOKENS = 200  # sampled for each story
ONE_STREAM = "this, as sample.py does it"


def shape_of(n_layer, n_embd, block_size=256, vocab_size=8192):
    return dict(n_layer=n_layer, n_head=max(1, n_embd // 64), n_embd=n_embd, block_size=block_size,
                vocab_size=vocab_size)


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

    @torch.inference_mode()
    def write(self, first):
        self.model.generate(first, NEW_TOKENS)


class GPTNeo(torch.nn.Module):
    """The model of the TinyStories paper, from transformers, with the interface of our GPT."""

    def __init__(self, shape):
        super().__init__()
        from transformers import GPTNeoConfig, GPTNeoForCausalLM
        self.model = GPTNeoForCausalLM(GPTNeoConfig(
            vocab_size=shape["vocab_size"], max_position_embeddings=shape["block_size"], hidden_size=shape["n_embd"],
            num_layers=shape["n_layer"], num_heads=shape["n_head"], bos_token_id=0, eos_token_id=0, attention_dropout=0,
            embed_dropout=0, resid_dropout=0, attention_types=[[["global", "local"], shape["n_layer"] // 2]]))

    def forward(self, idx, targets):
        return self.model(idx, labels=targets).loss

    @torch.inference_mode()
    def write(self, first):
        self.model.generate(first, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=True, pad_token_id=1)


def build_model(name, shape, peer):
    if name.startswith("nanoGPT"):
        return NanoGPT(shape, peer)
    if name.startswith("GPT-Neo"):
        return GPTNeo(shape)
    return GPT(GPTConfig(**shape))


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
    if isinstance(model, GPT):
        optimizer = "muon" if "muon" in name else "adamw"
        optimizers = make_optimizers(model, command_line().parse_args([f"--optimizer={optimizer}", "--lr=0.001"]))
    else:  # nanoGPT uses the fused AdamW on a GPU
        optimizers = [torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")]
    if "compiled" in name:
        model = torch.compile(model)
    idx = torch.randint(shape["vocab_size"], (rows, shape["block_size"]), device=device)
    dtype = name.split()[1]
    return lambda: training_step(model, optimizers, idx, idx, dtype)


def sampling_round(name, model, rows, device):
    """A function that writes `rows` stories at once, each of NEW_TOKENS tokens."""
    model.eval()
    if name == ONE_STREAM:
        from sample import speed_up_single_rows  # which older checkouts lack
        speed_up_single_rows(model)
    else:
        model.to(getattr(torch, name.split()[1]))
    if isinstance(model, GPT):
        return lambda: list(generate(model, [0], NEW_TOKENS, range(rows), eot=-1))  # no token is -1, so none ends early
    first = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    return lambda: model.write(first)


def seconds_of(function, device, repeats=1):
    """Mean seconds of a call. Only the last one waits for the GPU, because training does not wait either."""
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats


def main(name, task, shape, rows, device, peer):
    """Print "ready", then for each line on stdin the seconds of one round and the peak memory in MB, as JSON.

    A round is one training step, or the writing of `rows` stories. On a GPU it is ten steps, because training launches
    the next step before the last one has ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    device = torch.device(device)
    model = build_model(name, shape, peer).to(device)
    if isinstance(model, GPT) and device.type == "cpu":
        keep_freed_memory()  # as train.py does
    if task == "train":
        compute = training_round(name, model, shape, rows, device)
        warmups = 3  # the first one compiles
        repeats = 10 if device.type == "cuda" else 1
    else:
        compute = sampling_round(name, model, rows, device)
        warmups = repeats = 1
    seconds_of(compute, device, warmups)
    print("ready", flush=True)
    while sys.stdin.readline():
        print(json.dumps([seconds_of(compute, device, repeats), peak_memory(device)]), flush=True)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))

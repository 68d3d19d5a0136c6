"""The metric: bits per byte of a model on a dataset's validation stories.

    python eval.py                      the newest run
    python eval.py out/a out/b          several
"""
import math
import sys

import numpy as np
import torch
from tqdm import tqdm

from model import find_run, load_model, pick_device
from prepare import Parser, load_meta, load_tokenizer, load_tokens


def windows(tokens, eot, block_size):
    """[(start, length, skip)]: each story from its own <|endoftext|>, cut into windows that overlap by half where it
    is longer than the context. The targets tokens[start + 1 + skip : start + 1 + length] are scored, each token once."""
    ends = np.flatnonzero(tokens == eot)
    cuts = []
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist()):
        skip = 0
        while end - start > block_size:
            cuts.append((start, block_size, skip))
            start, skip = start + block_size // 2, block_size - block_size // 2
        cuts.append((start, end - start, skip))
    return cuts


@torch.inference_mode()
def score(model, tokens, eot, autocast=None, batch_tokens=8192, title="evaluating"):
    """Nats (N,) that each of the stories' `tokens` (N,) costs the model, 0 for the first; no story sees another.

    Deterministic. Windows of like length go into one batch of about `batch_tokens`, padded at the end, where causal
    attention keeps the padding from being seen."""
    device = model.head.weight.device
    nats = np.zeros(len(tokens), np.float32)
    cuts = sorted(windows(tokens, eot, model.config.block_size), key=lambda cut: cut[1])
    training, autocast = model.training, autocast or torch.autocast(device.type, enabled=False)
    model.eval()
    with tqdm(total=len(tokens), unit="tok", unit_scale=True, desc=title, leave=False, disable=None) as bar:
        while cuts:
            longest = cuts[-1][1]
            batch = cuts[-max(1, batch_tokens // longest):]
            del cuts[-len(batch):]
            x = torch.zeros(len(batch), longest + 1, dtype=torch.int64)
            y = torch.full_like(x, -1)
            for i, (start, length, skip) in enumerate(batch):
                x[i, :length + 1] = torch.from_numpy(tokens[start:start + length + 1].astype(np.int64))
                y[i, 1 + skip:length + 1] = x[i, 1 + skip:length + 1]
            with autocast:
                found = model(x[:, :-1].to(device), y[:, 1:].to(device)).cpu().numpy()  # (B, longest)
            for i, (start, length, skip) in enumerate(batch):
                nats[start + 1 + skip:start + 1 + length] = found[i, skip:length]
            bar.update(sum(length - skip for _, length, skip in batch))
    model.train(training)
    return nats


def evaluate(model, dataset, autocast=None, max_stories=None):
    """{"val_loss": nats a token, "val_bpb": bits a byte} over a dataset's validation stories, or their first
    `max_stories`. The prediction of each story's closing <|endoftext|> counts; bytes are those of the UTF-8 text."""
    meta, tokens = load_meta(dataset), load_tokens(dataset, "val")
    size = meta["val"]["bytes"]
    if max_stories and max_stories < meta["val"]["stories"]:
        tokens = tokens[:np.flatnonzero(tokens == meta["eot"])[max_stories] + 1]
        size = sum(len(t) for t in load_tokenizer(dataset).decode_tokens_bytes(tokens[tokens != meta["eot"]].tolist()))
    nats = float(score(model, tokens, meta["eot"], autocast).sum(dtype=np.float64))
    return {"val_loss": nats / (len(tokens) - 1), "val_bpb": nats / size / math.log(2)}


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of runs, such as out/a; the newest if none is named")
    parser.option("dataset", "", "score on this dataset's validation stories instead of the run's own")
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    device, _ = pick_device(args.device, "float32")
    for run in args.runs or [find_run()]:
        model, checkpoint = load_model(run, device)
        for dataset in [args.dataset] if args.dataset else checkpoint["datasets"]:
            if load_meta(dataset)["tokenizer"]["sha256"] != checkpoint["tokenizer"]:
                sys.exit(f"{run} was trained with another tokenizer than data/{dataset} has: "
                         f"python prepare.py --dataset={dataset} --tokenizer={checkpoint['datasets'][0]}")
            result = evaluate(model, dataset)
            print(f"{run} on {dataset}: val_bpb {result['val_bpb']:.4f}, val_loss {result['val_loss']:.4f} nats a token")


if __name__ == "__main__":
    main()

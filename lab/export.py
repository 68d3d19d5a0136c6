"""Turn a run into a file that works without this repository.

    python -m lab.export out/a                          a page that tells stories in any browser: out/a/story.html
    python -m lab.export out/a --to=hf                  a folder that transformers, lm-eval and vLLM load: out/a/a-hf
    python -m lab.export out/a --to=gguf                a file for llama.cpp: out/a/a-16.gguf (pip install gguf)

The page holds the weights, the tokenizer, and the forward pass once more, in JavaScript. It fetches nothing, so that it
can be sent by mail and opened from anywhere. The other two are written by lab/qwen3.py.

A second forward pass is a risk: change model.py, and the page would tell the stories of another network. Two checks
prevent that. `forward` below computes in NumPy what the page does in JavaScript, and no page is written unless it
agrees with the model on ten stories. And the page, when it is opened, compares its own logits with those of the model
for one beginning, and tells no story if they differ.
"""
import base64
import copy
import gzip
import json
import os
import re
import sys
from dataclasses import asdict
from html import escape

import numpy as np
import torch

from common import CommandLine, run_main
from common.dataset import instruction
from common.files import atomic_write
from common.runs import load_run, newest_run
from common.tokenizer import GPT2_PATTERN
from lab.qwen3 import write_gguf, write_hf
from sample import generate

TEMPLATE = os.path.join(os.path.dirname(__file__), "story_page.html")
STORIES = 10  # that the model writes, for the check
TOLERANCE = 0.01  # between logits; float32 itself makes a difference of about 0.0001
BITS = {"html": (8, 16), "hf": (32,), "gguf": (16, 8, 32)}  # for each weight; first the default
KNOWN = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "pos", "smear", "qk_gain", "value_embeds")


# -----------------------------------------------------------------------------------------------------------------
# the weights in 8 or 16 bits. 8 bits cost 0.0001 bits per byte and halve the page, but sometimes change the likeliest
# token. In 16 bits, a story at temperature 0 is that of sample.py.


def round_rows(weight, bits):
    """(levels, scales, rounded) of an array: its rows as integers, from -127 to 127 in 8 bits; the upper 16 bits of
    each row's float32 scale as uint16; and levels times scales in the array's shape. In a vector, each weight is a row.
    """
    highest = 2 ** (bits - 1) - 1
    rows = weight.reshape(len(weight), -1).astype(np.float32)
    scales = np.abs(rows).max(axis=1) / highest
    upper = ((scales.view("<u4") + 0xFFFF) >> 16).astype("<u2")  # rounded up, so that no level exceeds the highest
    scales = (upper.astype("<u4") << 16).view("<f4")[:, None]
    levels = np.rint(rows / np.maximum(scales, 1e-30)).astype(f"<i{bits // 8}")
    return levels, upper, (levels * scales).reshape(weight.shape)


# -----------------------------------------------------------------------------------------------------------------
# the forward pass of the page, in NumPy


def norm(x):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 2**-23)


def rotate(x):
    """Rotary embedding of x (T, H, D)."""
    T, _, D = x.shape
    angle = (np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, D, 2) / D))[:, None]  # (T, 1, D/2)
    a, b = x[..., :D // 2], x[..., D // 2:]
    return np.concatenate((a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)), axis=-1)


def attend(w, config, prefix, x, ids):
    """What attention reads at each position, (T, C), of the normed stream x (T, C)."""
    (T, C), H = x.shape, config["n_head"]
    q, k, v = ((x @ w[f"{prefix}{name}.weight"].T).reshape(T, H, -1) for name in "qkv")
    if prefix + "value_embed.weight" in w:
        gate = w[prefix + "value_gate.weight"]
        gate = 2 / (1 + np.exp(-x[:, :gate.shape[1]] @ gate.T))  # (T, H)
        v = v + gate[..., None] * w[prefix + "value_embed.weight"][ids].reshape(v.shape)
    q, k = norm(q), norm(k)
    if config["pos"] == "rope":
        q, k = rotate(q), rotate(k)
    gain = w.get(prefix + "gain", np.ones(H))
    scores = np.einsum("thd,shd->hts", q, k) * gain[:, None, None] / np.sqrt(C // H)
    distance = np.arange(T)[:, None] - np.arange(T)
    if config["pos"] == "alibi":
        scores -= 2.0 ** (-8 * np.arange(1, H + 1) / H)[:, None, None] * distance
    scores = np.where(distance >= 0, scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hts,shd->thd", p / p.sum(axis=-1, keepdims=True), v).reshape(T, C)


def forward(w, config, ids):
    """Logits (T, V) of token ids (T,) as the page computes them, from its weights w, {name: array}."""
    x = w["embed.weight"][ids]  # (T, C)
    if config["pos"] == "learned":
        x = x + w["pos_embed.weight"][:len(ids)]
    x = norm(x)
    if "smear" in w:
        x = norm(x + w["smear"] * np.concatenate((np.zeros_like(x[:1]), x[:-1])))
    for layer in range(config["n_layer"]):
        prefix = f"blocks.{layer}."
        x = x + attend(w, config, prefix + "attn.", norm(x), ids) @ w[prefix + "attn.proj.weight"].T
        x = x + np.maximum(norm(x) @ w[prefix + "mlp.fc.weight"].T, 0) ** 2 @ w[prefix + "mlp.proj.weight"].T
    return norm(x) @ w["head.weight"].T


# -----------------------------------------------------------------------------------------------------------------
# the check, and the page


@torch.inference_mode()
def check(model, rounded, w, before, eot):
    """End the program unless `forward` agrees with the rounded model on ten stories that it writes. Returns (one of
    these, the share of positions at which rounding leaves the likeliest token as it was)."""
    config, same = asdict(model.config), []
    longest = max(1, model.config.block_size - len(before))
    columns = generate(rounded, before, longest, range(STORIES), eot, temperature=1.0)
    stories = [before + row for row in torch.stack(list(columns), dim=1).tolist()]
    for story in stories:
        ids = torch.tensor([story[:model.config.block_size]])
        expected, original = rounded(ids)[0].numpy(), model(ids)[0].numpy()
        try:
            difference = np.abs(forward(w, config, ids[0].numpy()) - expected).max()
            problem = f"its logits differ by up to {difference:.3g}"
        except (LookupError, ValueError) as error:  # a weight is missing, or has another shape
            difference, problem = np.inf, f"its weights are others ({error})"
        if not difference < TOLERANCE:
            unknown = ", ".join(f"--{name}" for name in config if name not in KNOWN)
            advice = f"train without {unknown}, which the page does not know" if unknown else "undo the change"
            sys.exit(f"no page was written, since it would not compute what model.py does: {problem}; {advice}, or "
                     "change lab/story_page.html and forward() in lab/export.py in the same way")
        same.extend((expected.argmax(-1) == original.argmax(-1))[ids[0].numpy() != eot])  # not after its end
    return stories[0], np.mean(same)


def describe(model, encoding, w, before, story, bits):
    """What the page is told about the run, as JSON for a <script>."""
    text = encoding.decode([token for token in story if token != encoding.eot_token])
    words = text.removeprefix(before).split(" ")
    beginning = before + " ".join(words[:12])
    ids = [encoding.eot_token] + encoding.encode_ordinary(beginning)
    with torch.inference_mode():
        logits, likeliest = model(torch.tensor([ids[:model.config.block_size]]))[0, -1].topk(20)
    pattern = GPT2_PATTERN.pattern.replace("++", "+")  # JavaScript has no possessive quantifiers; they change nothing
    pattern = pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
    run = {"bits": bits, "config": asdict(model.config), "end": encoding.eot_token, "pattern": pattern,
           "tokens": " ".join(base64.b64encode(encoding.decode_single_token_bytes(i)).decode()
                              for i in range(encoding.eot_token)),
           "tensors": [(name, len(np.atleast_1d(x)), x.size // len(np.atleast_1d(x))) for name, x in w.items()],
           "prompt": before + " ".join(words[:4]),
           "check": {"text": beginning, "ids": ids, "logits": list(zip(likeliest.tolist(), logits.tolist()))}}
    return json.dumps(run).replace("<", r"\u003c")  # "</script>" or "<!--" in a text would end or hide the script


def write_page(run, model, checkpoint, encoding, bits):
    """Write the page of a run beside its checkpoint, and return a line about it."""
    levels, w = [], {}
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            sys.exit(f"{run} has weights that are no numbers: training diverged; train again with a lower --lr")
        matrix, scales, w[name] = round_rows(weight.numpy(), bits)
        levels += [matrix.tobytes(), scales.tobytes()]
    rounded = copy.deepcopy(model)
    rounded.load_state_dict({name: torch.from_numpy(weight) for name, weight in w.items()})
    before = instruction({}) if checkpoint.get("instruct") else ""
    first = [encoding.eot_token] + encoding.encode_ordinary(before)
    story, same = check(model, rounded, w, first, encoding.eot_token)
    c = model.config
    fields = {"title": escape(f"Stories by {os.path.basename(os.path.abspath(run))}"),
              "about": f"{model.num_params():,} weights ({c.n_layer} layers of {c.n_embd} channels)",
              "run": describe(rounded, encoding, w, before, story, bits),
              "weights": base64.b64encode(gzip.compress(b"".join(levels), mtime=0)).decode()}
    with open(TEMPLATE, encoding="utf-8") as file:
        page = re.sub(r"\{\{(\w+)\}\}", lambda field: fields[field[1]], file.read())
    path = (run[:-2] if run.endswith(".pt") else os.path.join(run, "")) + "story.html"
    with atomic_write(path) as file:
        file.write(page)
    return f"{path}: {len(page) / 1e6:.1f} MB; in {bits} bits, {same:.2%} of the likeliest tokens stay the likeliest"


# -----------------------------------------------------------------------------------------------------------------
# the command line


def main(argv=None):
    parser = CommandLine(__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", default="", help="its folder, or a checkpoint in it (default: the newest)")
    parser.option("to", "html", "a page that tells stories, a folder for transformers, or a file for llama.cpp",
                  choices=list(BITS))
    parser.option("bits", None, "for each weight: 8 or 16 in a page, where 16 are as good as exact (default: 8); 8, 16 "
                  "or 32 for llama.cpp (default: 16)", type=int)
    args = parser.parse_args(argv)
    bits = args.bits or BITS[args.to][0]
    if bits not in BITS[args.to]:
        parser.error(f"--bits={bits} is not possible with --to={args.to}: take {' or '.join(map(str, BITS[args.to]))}")
    run = args.run or newest_run()
    folder = os.path.dirname(run) if run.endswith(".pt") else run
    name = os.path.basename(os.path.abspath(run)).removesuffix(".pt")
    if args.to == "html":
        model, checkpoint, encoding = load_run(run)
        print(write_page(run, model, checkpoint, encoding, bits))
    elif args.to == "hf":
        path = os.path.join(folder, f"{name}-hf")
        write_hf(run, path)
        print(f"{path} is a folder for transformers. Try python eval.py hf:{path} --dataset=NAME")
    else:
        path = os.path.join(folder, f"{name}-{bits}.gguf")
        write_gguf(run, path, bits)
        print(f"{path} is a file for llama.cpp and Ollama. Try llama-completion -no-cnv -m {path} -p 'One day'")


if __name__ == "__main__":
    run_main(main)

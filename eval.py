"""Measure models and corpora: bits per byte on validation stories, accuracy on each skill, diversity of stories.

    python eval.py                                  the newest run
    python eval.py out/a out/b                      several
    python eval.py --stories a.jsonl b.txt          files of stories, side by side
"""
import math
import os
import re
import sys
import zlib
from collections import Counter
from html import escape

import numpy as np
import torch
from tqdm import tqdm

from model import find_run, load_model, pick_device
from prepare import (SKILLS, Parser, find_files, fingerprint, load_meta, load_tokenizer, load_tokens,
                     read_records, start)


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
def score(model, tokens, eot, batch_tokens=4096, title="evaluating"):
    """Nats (N,) that each of the stories' `tokens` (N,) costs the model, 0 for the first; no story sees another.

    Deterministic. Windows of like length go into one batch of about `batch_tokens`, padded at the end, where causal
    attention keeps the padding from being seen."""
    device = model.head.weight.device
    nats = np.zeros(len(tokens), np.float32)
    cuts = sorted(windows(tokens, eot, model.config.block_size), key=lambda cut: cut[1])
    training = model.training
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
            found = model(x[:, :-1].to(device), y[:, 1:].to(device)).cpu().numpy()  # (B, longest)
            for i, (start, length, skip) in enumerate(batch):
                nats[start + 1 + skip:start + 1 + length] = found[i, skip:length]
            bar.update(sum(length - skip for _, length, skip in batch))
    model.train(training)
    return nats


def evaluate(model, dataset, max_stories=None):
    """{"val_loss": nats a token, "val_bpb": bits a byte} over a dataset's validation stories, or their first
    `max_stories`. The prediction of each story's closing <|endoftext|> counts; bytes are those of the UTF-8 text."""
    meta, tokens = load_meta(dataset), load_tokens(dataset, "val")
    size = meta["val"]["bytes"]
    if max_stories and max_stories < meta["val"]["stories"]:
        tokens = tokens[:np.flatnonzero(tokens == meta["eot"])[max_stories] + 1]
        size = sum(len(t) for t in load_tokenizer(dataset).decode_tokens_bytes(tokens[tokens != meta["eot"]].tolist()))
    nats = float(score(model, tokens, meta["eot"]).sum(dtype=np.float64))
    return {"val_loss": nats / (len(tokens) - 1), "val_bpb": nats / size / math.log(2)}


def read_spans(dataset, per_skill):
    """{skill: [(text before, next word, right word, wrong word)]} of the first stories whose `split` is val. With the
    word that follows, "jump" and "jumped" both cost what it takes to end there."""
    found = {skill: [] for skill in SKILLS[1:]}
    for path, _ in find_files(os.path.join("data", dataset)):
        if path.endswith(".jsonl"):
            for record in read_records(path):
                if record.get("split") == "val" and record.get("spans"):
                    for span in record["spans"]:
                        story, start, end = record["story"], span["start"], span["end"]
                        found[span["skill"]].append((story[:start], re.match(r"\W*\w*", story[end:])[0],
                                                     story[start:end], span["wrong"]))
                    if all(len(spans) >= per_skill for spans in found.values()):
                        return {skill: spans[:per_skill] for skill, spans in found.items()}
    return {skill: spans[:per_skill] for skill, spans in found.items() if spans}


def skill_accuracy(model, dataset, per_skill=200):
    """{skill: share} of the marked words of validation stories that the model finds likelier than the tempting wrong
    ones, by the sum of the log-likelihoods of their tokens; {} where no story carries spans."""
    spans, encoding = read_spans(dataset, per_skill), load_tokenizer(dataset)
    if not spans:
        return {}
    eot, tokens, parts = encoding.eot_token, [], []
    for skill, items in spans.items():
        for before, after, *words in items:
            rows = [encoding.encode_ordinary(before + word + after) for word in words]
            same = next((i for i, (a, b) in enumerate(zip(*rows)) if a != b), min(map(len, rows)))
            for row in rows:
                cut = max(0, len(row) + 1 - model.config.block_size)  # what the context cannot hold
                row = row[cut:]
                parts.append((len(tokens) + 1 + same - cut, len(tokens) + 1 + len(row)))
                tokens += [eot] + row
    nats = score(model, np.array(tokens + [eot], np.uint16), eot, title="skills")
    costs = np.array([nats[start:end].sum() for start, end in parts]).reshape(-1, 2)  # right, wrong
    ends = np.cumsum([len(items) for items in spans.values()])
    return {skill: float((part[:, 0] < part[:, 1]).mean())
            for skill, part in zip(spans, np.split(costs, ends[:-1]))}


def describe(path):
    """{figure: text} of a file of stories: how many, how alike, and what their records say of them."""
    stories, words, copies, near, once, used, asked = 0, 0, 0, 0, 0, 0, 0
    seen, runs, grams = set(), {}, [set() for _ in range(4)]
    vocabulary, plain = Counter(), Counter()
    starts, openings, capitals, features, skills = Counter(), Counter(), Counter(), Counter(), Counter()
    gram_words = 0
    for record in read_records(path):
        story = record["story"]
        found = re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", story)
        small = [word.lower() for word in found]
        copies += (key := fingerprint(story)) in seen
        seen.add(key)
        # of all runs of eight words one in sixteen is kept, the same ones in every story
        kept = [run for run in (zlib.crc32(" ".join(small[i:i + 8]).encode()) for i in range(len(small) - 7))
                if run % 16 == 0]
        shared = Counter(runs[run] for run in kept if run in runs)
        near += bool(shared) and shared.most_common(1)[0][1] > len(kept) / 2
        for run in kept:
            runs.setdefault(run, stories)
        if gram_words < 100_000:
            for n in range(4):
                grams[n].update(zip(*(small[i:] for i in range(n + 1))))
            gram_words += len(small)
        vocabulary.update(small)
        plain.update(word for word in found if word.islower())
        openings[re.split(r"(?<=[.!?])[\"”]?\s", story.strip(), maxsplit=1)[0]] += 1
        once += "Once upon a time" in story
        starts[" ".join(found[:4])] += 1
        capitals.update(set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", story)))
        features.update(record.get("features") or ())
        skills.update(span["skill"] for span in record.get("spans") or ())
        if record.get("words"):
            from generate import missing  # which knows the inflections
            asked += len(record["words"])
            used += len(record["words"]) - len(missing(record["words"], story))
        stories, words = stories + 1, words + len(found)
    if not stories:
        sys.exit(f"{path} holds no story")
    share = lambda n: f"{100 * n / stories:.2f} %"
    names = sorted((name for name in capitals if plain[name.lower()] < capitals[name] / 10), key=lambda name: -capitals[name])[:3]
    figures = {"stories": f"{stories:,}", "words a story": f"{words / stories:.0f}",
               "distinct words": f"{len(vocabulary):,}", "exact copies": share(copies), "near-copies": share(near),
               "most common first sentence": share(openings.most_common(1)[0][1])}
    for i, (start, n) in enumerate(starts.most_common(3), 1):
        figures[f"opening {i}"] = f"{start} {share(n)}"
    figures["with Once upon a time"] = share(once)
    for i, name in enumerate(names, 1):
        figures[f"name {i}"] = f"{name} {share(capitals[name])}"
    for n in range(4):
        figures[f"distinct {n + 1}-grams per 100,000 words"] = f"{len(grams[n]) * 1e5 / gram_words:,.0f}"
    if asked:
        figures["requested words used"] = f"{100 * used / asked:.1f} %"
    figures.update({f"feature {name}": share(n) for name, n in sorted(features.items())})
    figures.update({f"{skill} words per 100 words": f"{100 * n / words:.2f}" for skill, n in skills.items()})
    return figures


def compare_stories(paths):
    """Print what `describe` finds, a column a file."""
    for path in paths:
        if not os.path.isfile(path):
            sys.exit(f"no file {path}: name .jsonl or .txt files of stories")
    columns = [describe(path) for path in paths]
    rows = list(dict.fromkeys(name for column in columns for name in column))
    table = [["", *paths]] + [[name, *(column.get(name, "–") for column in columns)] for name in rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for name, *cells in table:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:])), sep="  ")


# -----------------------------------------------------------------------------------------------------------------
# charts: inline SVG in one page that fetches nothing, needs no script, and follows the reader's light or dark

STYLE = """:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --faint: #d8d8d8; --c0: #0b62b0; --c1: #c2500a;
--c2: #1a7f4b; --c3: #a2347f; --c4: #6d5a00; --c5: #0b7d8c; --c6: #b3262e; --c7: #5b4bb5 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --faint: #444; --c0: #6cb6ff; --c1: #ff9d57;
--c2: #5fd08f; --c3: #f08cd0; --c4: #e0c94a; --c5: #56d3e0; --c6: #ff8a8a; --c7: #b4a7ff } }
body { margin: 0 auto; max-width: 68rem; padding: 0 1rem 3rem; font: 1rem/1.5 system-ui, sans-serif;
color: var(--ink); background: var(--paper) }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.5rem 2rem }
figure { margin: 0 } figcaption { font-weight: 600 } svg { display: block; width: 100% } svg text { fill: var(--ink) }
.legend { font-size: .9rem; display: flex; flex-wrap: wrap; gap: 0 1rem } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums } td, th { padding: .2rem .6rem;
text-align: right; border-bottom: 1px solid var(--faint) } th:first-child, td:first-child { text-align: left }"""


def page(title, body):
    """A page of HTML around a body of HTML; the title is escaped here."""
    return (f"<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" "
            f"content=\"width=device-width, initial-scale=1\">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n"
            f"<h1>{escape(title)}</h1>\n{body}\n</html>\n")


def ticks(low, high, log):
    """Four or so round numbers between low and high: steps of 1, 2 or 5 times a power of ten."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        few = high / low < 50
        return [m * 10.0 ** e for e in powers for m in ((1, 2, 5) if few else (1,)) if low <= m * 10.0 ** e <= high]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 5)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(value):
    """1500000 as 1.5M."""
    scale, unit = next(((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= s), (1, ""))
    return f"{value / scale:.4g}{unit}"


def chart(title, x_label, y_label, series, log_x=False, lines=True):
    """HTML of a figure with a line or dots a series: {name: [(x, y)]}, or [(x, low, y, high)] with intervals.

    Text is escaped; where no series has a point, "" comes back."""
    series = {name: sorted((p if len(p) == 4 else (p[0], p[1], p[1], p[1])) for p in points
                           if not log_x or p[0] > 0) for name, points in series.items()}
    points = [p for some in series.values() for p in some]
    if not points:
        return ""
    at = math.log10 if log_x else float
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    x0, x1 = (x0 / 1.1, x1 * 1.1) if log_x else (x0, x1) if x0 < x1 else (x0 - 1, x1 + 1)
    y0, y1 = min(p[1] for p in points), max(p[3] for p in points)
    room = 0.05 * (y1 - y0) or 0.1 * abs(y1) or 1
    y0, y1 = y0 - room, y1 + room
    def x_of(x):
        return round(48 + 362 * (at(x) - at(x0)) / (at(x1) - at(x0)), 1)
    def y_of(y):
        return round(240 - 220 * (y - y0) / (y1 - y0), 1)
    out = [f"<figure><figcaption>{escape(title)}</figcaption><svg viewBox=\"0 0 420 284\" font-size=\"12\" role=\"img\" "
           f"aria-label=\"{escape(title)}\">"]
    for t in ticks(y0, y1, False):
        out.append(f"<path d=\"M48 {y_of(t)}H410\" stroke=\"var(--faint)\"/><text x=\"43\" y=\"{y_of(t) + 4}\" "
                   f"text-anchor=\"end\">{short(round(t, 9))}</text>")
    for t in ticks(x0, x1, log_x):
        out.append(f"<path d=\"M{x_of(t)} 240v5\" stroke=\"var(--ink)\"/><text x=\"{x_of(t)}\" y=\"258\" "
                   f"text-anchor=\"middle\">{short(round(t, 9))}</text>")
    out.append(f"<path d=\"M48 240H410\" stroke=\"var(--ink)\"/><text x=\"410\" y=\"277\" text-anchor=\"end\">"
               f"{escape(x_label)}</text><text x=\"5\" y=\"12\">{escape(y_label)}</text>")
    legend = []
    for i, (name, some) in enumerate(series.items()):
        colour = f"var(--c{i % 8})"
        dashes = f" stroke-dasharray=\"{4 * (i // 8)} 3\"" if i >= 8 else ""
        legend.append(f"<span><span style=\"color: {colour}\">●</span> {escape(name)}</span>")
        if lines:
            path = "L".join(f"{x_of(x)} {y_of(y)}" for x, _, y, _ in some)
            out.append(f"<path d=\"M{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.8\"{dashes}/>")
        if not lines or len(some) <= 40:  # a log of a thousand points is a line alone
            for x, low, y, high in some:
                out.append(f"<g stroke=\"{colour}\" fill=\"{colour}\"><title>{escape(name)}: {x:,g}, {y:.4g}</title>"
                           + f"<path d=\"M{x_of(x)} {y_of(low)}V{y_of(high)}\"/>" * (low < high)
                           + f"<circle cx=\"{x_of(x)}\" cy=\"{y_of(y)}\" r=\"2.5\"/></g>")
    return "".join(out) + f"</svg><div class=\"legend\">{' '.join(legend)}</div></figure>\n"


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of runs, such as out/a; the newest if none is named")
    parser.option("dataset", "", "score on this dataset's validation stories instead of the run's own")
    parser.add_argument("--stories", nargs="+", default=[], metavar="FILE", help="describe files of stories instead")
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    if args.stories:
        return compare_stories(args.stories)
    device, _ = pick_device(args.device, "float32")
    for run in args.runs or [find_run()]:
        model, checkpoint = load_model(run, device)
        for dataset in [args.dataset] if args.dataset else checkpoint["datasets"]:
            if load_meta(dataset)["tokenizer"]["sha256"] != checkpoint["tokenizer"]:
                sys.exit(f"{run} was trained with another tokenizer than data/{dataset} has: "
                         f"python prepare.py --dataset={dataset} --tokenizer={checkpoint['datasets'][0]}")
            result = evaluate(model, dataset)
            print(f"{run} on {dataset}: val_bpb {result['val_bpb']:.4f}, val_loss {result['val_loss']:.4f} nats a token"
                  + "".join(f", {skill} {share:.1%}" for skill, share in skill_accuracy(model, dataset).items()))


if __name__ == "__main__":
    start(main)

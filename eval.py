"""Measure what a model can do.

    python eval.py                                  the newest run: loss, probes, marked words
    python eval.py out/a out/b                      several runs, side by side
    python eval.py out/a --only=loss,spans          some sections; what eval.json holds of the others stays
    python eval.py hf:roneneldan/TinyStories-33M --dataset=tinystories      somebody else's model, or hf:FOLDER

All figures go to out/<run>/eval.json, estimates with the 95 % interval of a bootstrap over stories, probes or prompts.
"""
import functools
import glob
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from common import HOUSEKEEPING, CommandLine, atomic_write, file_hash, newest_run, pick_device, run_main
from prepare import SKILLS, fingerprint, instruction, load_meta, load_tokenizer, load_tokens, read_records
from sample import load_run

HERE = os.path.dirname(os.path.abspath(__file__))
SECTIONS = ("loss", "probes", "spans", "steps")


# -----------------------------------------------------------------------------------------------------------------
# the metric: bits per byte. Nats per token cannot be compared across tokenizers, and random windows measure another
# thing each time. So every story is scored once, from its own beginning, and the sum is divided by the bytes of the
# text.


def windows(tokens, eot, block_size):
    """[(start, length, skip)] of windows that cover each story from its own <|endoftext|> on.

    A story longer than the context is cut into windows that overlap by half, so that all but its first tokens are
    scored with at least half a context. The first `skip` targets of a window were scored in the one before; the others
    are tokens[start + 1 + skip : start + 1 + length]. So each token is scored once."""
    ends = np.flatnonzero(tokens == eot).tolist()
    result = []
    for start, end in zip(ends, ends[1:]):
        skip = 0
        while end - start > block_size:
            result.append((start, block_size, skip))
            start += block_size // 2
            skip = block_size - block_size // 2
        result.append((start, end - start, skip))
    return result


@torch.inference_mode()
def score(model, tokens, eot, batch_tokens=None, title="evaluating"):
    """The cross-entropy in nats, (N,), of each of the stories' `tokens` (N,); 0 for the first, which nothing predicts.

    No story sees another. The result does not depend on the batch size: windows of similar length go into one batch,
    padded at the end, where causal attention cannot see the padding."""
    device = model.head.weight.device
    if batch_tokens is None:
        batch_tokens = 1024 if device.type == "cpu" else 2**14  # a CPU is slower with more
    batch_tokens = min(batch_tokens, 2**27 // model.config.vocab_size)  # at most 512 MB of logits
    nats = np.zeros(len(tokens), np.float32)
    remaining = sorted(windows(tokens, eot, model.config.block_size), key=lambda window: window[1])
    was_training = model.training
    model.eval()
    with tqdm(total=len(tokens), unit="tok", unit_scale=True, desc=title, leave=False, disable=None) as bar:
        while remaining:
            longest = remaining[-1][1]
            batch = remaining[-max(1, batch_tokens // longest):]
            del remaining[-len(batch):]
            inputs, targets = window_batch(tokens, batch, longest)
            batch_nats = model(inputs.to(device), targets.to(device)).cpu().numpy()  # (B, longest)
            for row, (start, length, skip) in zip(batch_nats, batch):
                nats[start + 1 + skip:start + 1 + length] = row[skip:length]
                bar.update(length - skip)
    model.train(was_training)
    return nats


def window_batch(tokens, batch, longest):
    """Inputs and targets, (B, longest) each, of windows; targets are -1 where they do not count."""
    inputs = torch.zeros(len(batch), longest, dtype=torch.int64)
    targets = torch.full_like(inputs, -1)
    for i, (start, length, skip) in enumerate(batch):
        window = torch.from_numpy(tokens[start:start + length + 1].astype(np.int64))
        inputs[i, :length] = window[:-1]
        targets[i, skip:length] = window[1 + skip:]
    return inputs, targets


def evaluate(model, dataset, max_stories=None):
    """{"val_loss": nats per token, "val_bpb": bits per byte} of a dataset's validation stories, or of the first
    `max_stories`. Bytes are those of the UTF-8 text; the prediction of each story's closing <|endoftext|> counts."""
    meta, tokens = load_meta(dataset), load_tokens(dataset, "val")
    n_bytes = meta["val"]["bytes"]
    if max_stories and max_stories < meta["val"]["stories"]:
        tokens = tokens[:np.flatnonzero(tokens == meta["eot"])[max_stories] + 1]
        n_bytes = len(load_tokenizer(dataset).decode_bytes(tokens[tokens != meta["eot"]].tolist()))
    nats = float(score(model, tokens, meta["eot"]).sum(dtype=np.float64))
    return {"val_loss": nats / (len(tokens) - 1), "val_bpb": nats / n_bytes / math.log(2)}


def evaluate_mix(model, mix, max_stories=None):
    """`evaluate` of each dataset of a mix {name: weight}, and the mean by these weights."""
    scores = {name: evaluate(model, name, max_stories) for name in mix}
    result = {key: sum(mix[name] * scores[name][key] for name in mix) for key in ("val_loss", "val_bpb")}
    if len(mix) > 1:
        result.update({f"val_bpb/{name}": scores[name]["val_bpb"] for name in mix})
    return result


def split_stories(tokens, eot):
    """The tokens of each story, without <|endoftext|>."""
    return [part[1:] for part in np.split(tokens, np.flatnonzero(tokens == eot))[1:-1]]


# -----------------------------------------------------------------------------------------------------------------
# loss by skill: the bits per byte with an interval and, if prepare.py wrote val.skills.bin, the loss of the words that
# need grammar, a fact, context or reasoning.


def interval(numerators, denominators=None):
    """[value, low, high]: sum of numerators over sum of denominators with its 95 % interval, or a mean without
    denominators; None if the denominators sum to zero.

    The N stories, probes or prompts are drawn with replacement a thousand times (percentile bootstrap, Efron 1979)."""
    numerators = np.asarray(numerators, float)
    denominators = np.ones(len(numerators)) if denominators is None else np.asarray(denominators, float)
    if not denominators.sum():
        return None
    rng, ratios = np.random.default_rng(0), []
    for _ in range(1000):
        sample = rng.integers(0, len(numerators), len(numerators))
        if denominators[sample].sum():
            ratios.append(numerators[sample].sum() / denominators[sample].sum())
    low, high = np.quantile(ratios, (0.025, 0.975)).tolist()
    return [float(numerators.sum() / denominators.sum()), low, high]


def grade_loss(subject, dataset):
    """Bits per byte with its interval. Where words are labeled with the skill they need, also the loss of these, and
    how much of the text and of the whole loss they are: the mean loss hardly sees a rare skill."""
    meta, tokens, encoding = load_meta(dataset), np.asarray(load_tokens(dataset, "val")), load_tokenizer(dataset)
    stories = [encoding.decode(ids.tolist()) for ids in split_stories(tokens, meta["eot"])]
    own_tokenizer, eot = subject.tokenizer == meta["tokenizer"]["sha256"], subject.encoding.eot_token
    if not own_tokenizer:
        tokens = np.array([eot] + [t for story in stories for t in subject.encoding.encode_ordinary(story) + [eot]])
    nats = score(subject.model, tokens, eot, title=f"loss on {dataset}").astype(float)
    starts = np.flatnonzero(tokens == eot)[:-1] + 1  # a story's targets: its tokens and the next <|endoftext|>
    lengths = np.diff(np.append(starts, len(tokens)))
    loss = sum_by_story(nats, starts)
    figures = {"val_bpb": interval(loss / math.log(2), [len(story.encode()) for story in stories]),
               "val_loss": interval(loss, lengths), "stories": len(stories),
               "stories longer than the context": int((lengths > subject.model.config.block_size).sum())}
    if "bits_per_byte" in meta["val"]:
        figures["val_bpb of the world's own choices"] = meta["val"]["bits_per_byte"]
    if own_tokenizer and os.path.exists(os.path.join("data", dataset, "val.skills.bin")):
        figures.update(loss_by_skill(dataset, tokens, nats, starts))
    return figures


def loss_by_skill(dataset, tokens, nats, starts):
    """{figure: interval} of the words of each skill, from nats (N,) of tokens (N,) and the stories' starts."""
    encoding, labels = load_tokenizer(dataset), np.asarray(load_tokens(dataset, "val.skills"))
    has_space = [encoding.decode_single_token_bytes(t)[:1] == b" " for t in range(encoding.eot_token)] + [False]
    is_word_start = np.array(has_space)[tokens] | np.append(False, labels[1:] != labels[:-1])
    figures = {}
    for label, skill in enumerate(SKILLS):
        marked = labels == label
        name = "all other words" if skill == "none" else f"{skill} words"
        words = sum_by_story(marked & is_word_start, starts)
        if words.sum():
            loss = sum_by_story(nats * marked, starts)
            n_tokens = sum_by_story(np.ones(len(tokens)), starts)
            figures[f"{name}, nats each"] = interval(loss, words)
            figures[f"{name}, share of text"] = interval(sum_by_story(marked, starts), n_tokens)
            figures[f"{name}, share of loss"] = interval(loss, sum_by_story(nats, starts))
    return figures


def sum_by_story(values, starts):
    """The sums of values (N,) over the stories that begin at `starts` (S,): (S,)."""
    return np.add.reduceat(values.astype(float), starts)


# -----------------------------------------------------------------------------------------------------------------
# probes: dicts of skill, kind, prompt, right and wrong continuations, and perhaps `after`, the word that follows. They
# come from data/probes.json, or are made from spans: the words that stories mark as needing a skill, each with a
# tempting wrong answer. A span becomes a probe whose prompt is the story up to it.


def read_list(option, path, is_valid):
    """The list in the JSON file of an option, all of whose items must be valid."""
    try:
        with open(path, encoding="utf-8") as file:
            items = json.load(file)
        if items and all(is_valid(item) for item in items):
            return items
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"cannot read --{option}={path}: {error}")
    sys.exit(f"--{option}={path} does not have the form of data/{option}.json")


def read_spans(dataset, limit, by="skill"):
    """The first `limit` marked words of each skill, or of each kind, of the validation stories, as probes."""
    groups = defaultdict(list)
    for source in load_meta(dataset)["source"]:
        path = source["file"]
        if path.endswith(".jsonl") and os.path.exists(path):
            for probe in span_probes(dataset, path, os.stat(path).st_mtime_ns):
                if len(groups[probe[by]]) < limit:
                    groups[probe[by]].append(probe)
    return [probe for group in groups.values() for probe in group]


@functools.lru_cache(8)
def span_probes(dataset, path, modified):
    """Every span of a file's stories that are in val.bin, as a probe. The date `modified` keeps the cache fresh."""
    if not os.path.exists(os.path.join("data", dataset, "val.skills.bin")):
        return []
    meta, encoding, probes = load_meta(dataset), load_tokenizer(dataset), []
    before = instruction({}) if meta["instruct"] else ""
    val_stories = split_stories(np.asarray(load_tokens(dataset, "val")), meta["eot"])
    in_val = {fingerprint(encoding.decode(ids.tolist()).split(instruction({}))[-1]) for ids in val_stories}
    for record in read_records(path):
        if not record.get("spans") or fingerprint(record["story"]) not in in_val:
            continue
        for span in record["spans"]:
            story, start, end = record["story"], span["start"], span["end"]
            kind = span.get("kind", span["skill"])
            if "depth" in span:
                kind += f", depth {span['depth']:2}"
            # scored with the word that follows, so that "jump" beside "jumped" pays for ending there
            probes.append({"skill": span["skill"], "kind": kind, "prompt": before + story[:start],
                           "right": [story[start:end]], "wrong": [span["wrong"]],
                           "after": re.match(r"\W*\w*", story[end:])[0]})
    return probes


def passes(model, encoding, probes, title="probes"):
    """(N,) bool: whether a right continuation of each probe is likelier than all wrong ones.

    We compare the sums of log-likelihoods of the tokens after the longest common beginning of all continuations."""
    eot, block_size = encoding.eot_token, model.config.block_size
    tokens, scored, n_continuations = [], [], []
    for probe in probes:
        texts = [probe["prompt"] + c + probe.get("after", "") for c in probe["right"] + probe["wrong"]]
        rows = [encoding.encode_ordinary(text) for text in texts]
        common = len(os.path.commonprefix(rows))  # works on any sequences
        for row in rows:
            dropped = max(0, len(row) + 1 - block_size)  # what the context cannot hold
            scored.append((len(tokens) + 1 + max(0, common - dropped), len(tokens) + 1 + len(row) - dropped))
            tokens += [eot] + row[dropped:]
        n_continuations.append(len(rows))
    nats = score(model, np.array(tokens + [eot]), eot, title=title)
    costs = np.split([nats[start:end].sum() for start, end in scored], np.cumsum(n_continuations)[:-1])
    return np.array([min(cost[:len(probe["right"])]) < min(cost[len(probe["right"]):])
                     for cost, probe in zip(costs, probes)])


def skill_accuracy(model, dataset, per_skill=200):
    """{skill: share} of marked words in validation stories where the right one is likelier than the tempting wrong one;
    {} if no story carries marked words."""
    spans = read_spans(dataset, per_skill)
    if not spans:
        return {}
    passed, skills = passes(model, load_tokenizer(dataset), spans, "skills"), np.array([s["skill"] for s in spans])
    return {skill: float(passed[skills == skill].mean()) for skill in SKILLS if skill in skills}


def count_phrases(phrases, dataset, max_tokens=5_000_000):
    """How often each phrase occurs in a dataset's train text, or in `max_tokens` of it, evenly spread."""
    tokens, encoding, counts = load_tokens(dataset, "train"), load_tokenizer(dataset), Counter()
    phrases = {phrase.strip().lower() for phrase in phrases}
    step = 50_000 * max(1, len(tokens) / max_tokens)
    for start in tqdm(np.arange(0, len(tokens), step).astype(int), desc="counting words", leave=False, disable=None):
        text = encoding.decode(tokens[start:start + 50_000].tolist()).lower()
        words = Counter(re.findall(r"[^\W_]+", text))
        for phrase in phrases:
            counts[phrase] += words[phrase] if phrase.isalnum() else text.count(phrase)
    return counts


def shortcut(probe, score_of):
    """The probability of passing by taking the continuation of the highest score, and guessing among equals."""
    scores = {c: score_of(c) for c in probe["right"] + probe["wrong"]}
    best = [c for c in scores if scores[c] == max(scores.values())]
    return sum(c in probe["right"] for c in best) / len(best)


def positions_of(continuation, probe):
    """Where a continuation already occurs in the prompt of its probe."""
    word = rf"(?<!\w){re.escape(continuation.strip())}(?!\w)"  # it may be "+1", so \b will not do
    return [match.start() for match in re.finditer(word, probe["prompt"], re.IGNORECASE)]


def grade_probes(subject, probes, counts):
    """The share of probes passed by skill and kind, and beside it what heuristics without any skill would pass."""
    passed = {"": passes(subject.model, subject.encoding, probes),
              ", by chance": [shortcut(p, lambda c: 0) for p in probes],
              ", the most frequent in train": [shortcut(p, lambda c: counts[c.strip().lower()]) for p in probes],
              ", the last mentioned": [shortcut(p, lambda c: max(positions_of(c, p), default=-1)) for p in probes],
              ", the most mentioned": [shortcut(p, lambda c: len(positions_of(c, p))) for p in probes]}
    figures = {}
    for skill in dict.fromkeys(p["skill"] for p in probes):
        for reader, results in passed.items():
            figures[skill + reader] = interval([x for x, p in zip(results, probes) if p["skill"] == skill])
        for kind in sorted({p["kind"] for p in probes if p["skill"] == skill} - {skill}):
            of_kind = [x for x, p in zip(passed[""], probes) if p["skill"] == skill and p["kind"] == kind]
            figures[f"{skill}: {kind}"] = interval(of_kind)
    return figures


# -----------------------------------------------------------------------------------------------------------------
# what is graded, and where the figures go. Each command of eval.py or of the laboratory adds its sections to the
# eval.json of a run, and leaves those of others as they are.


@dataclass
class Subject:
    """A model to be graded: a run, or somebody else's."""
    model: torch.nn.Module
    encoding: object    # a tiktoken.Encoding, or what stands in for one
    tokenizer: str      # the tokenizer's sha256; None for hf: models
    datasets: list      # whose stories it is graded on
    instruction: str    # what it expects before a story: "Story:\\n", or ""
    checkpoints: list   # paths of the checkpoints kept along the way
    about: dict         # the section "model" of eval.json
    prefix: str         # beginning of the paths of the files about it

    def path(self, name):
        return self.prefix + name


def load_subject(name, device, dataset="", context=0, tokenizer=""):
    """The subject of a run's folder, of a checkpoint in one, or of hf:NAME."""
    if name.endswith((".txt", ".jsonl")):
        sys.exit(f"{name} is not a run: for a file of stories, run python -m lab.corpus {name}")
    if name.startswith("hf:"):
        if not dataset or context:
            sys.exit(f"{name} has its own context, and no stories: leave --context out, and name prepared stories such "
                     "as --dataset=tinystories")
        from lab.huggingface import load  # only here: it needs transformers
        model, encoding = load(name[3:], device, tokenizer)
        folder = os.path.join("out", "hf-" + os.path.basename(name[3:].rstrip("/")))
        os.makedirs(folder, exist_ok=True)
        about = {**about_model(model), "checkpoint": name, "settings": name}
        return Subject(model, encoding, None, [dataset], "", [], about, os.path.join(folder, ""))
    model, checkpoint, encoding = load_run(name, device, context)
    path, prefix = os.path.join(name, "ckpt.pt"), os.path.join(name, "")
    kept = sorted(glob.glob(os.path.join(glob.escape(name), "ckpt-*.pt")))
    if name.endswith(".pt"):  # files about out/a/ckpt-0000064.pt are out/a/ckpt-0000064.eval.json and so on
        path, prefix, kept = name, name[:-2], []
    if context:
        prefix += f"context{context}."
    about = {**about_model(model), "step": checkpoint["step"], "checkpoint": file_hash(path),
             "settings": experiment_of(checkpoint, context)}
    before = instruction({}) if checkpoint.get("instruct") else ""
    datasets = [dataset] if dataset else checkpoint["datasets"]
    return Subject(model, encoding, checkpoint["tokenizer"], datasets, before, kept, about, prefix)


def about_model(model):
    return {"parameters": model.num_params(embedding=False), "with embedding and head": model.num_params(),
            "context": model.config.block_size}


def experiment_of(checkpoint, context):
    """What a run was trained with except its seed, as text: runs for which it is equal repeat one experiment."""
    settings = {name: value for name, value in checkpoint["args"].items() if name not in (*HOUSEKEEPING, "seed")}
    # out/warm-1 and out/warm-2 are two seeds of one experiment, and so are the runs that start from them
    settings["init_from"] = re.sub(r"-\d{1,2}$", "", settings["init_from"])
    if not settings["max_minutes"]:
        settings["step"] = checkpoint["step"]  # one of them may have been stopped early
    return json.dumps({**settings, "context": context})


def read_results(subject):
    """The sections of eval.json, but only if they are about the same checkpoint."""
    try:
        with open(subject.path("eval.json"), encoding="utf-8") as file:
            results = json.load(file)
    except (OSError, ValueError):
        results = {}
    if results.get("model", {}).get("checkpoint") != subject.about["checkpoint"]:
        results = {}
    return {**results, "model": subject.about}


def add_section(subject, title, figures):
    """Add a section {figure: [value, low, high], number or text} to eval.json, in place of an older one."""
    results = {**read_results(subject), title: figures}
    with atomic_write(subject.path("eval.json")) as file:
        json.dump(results, file, indent=1)


def format_figure(name, value):
    """A figure of eval.json as text."""
    if isinstance(value, list):
        digits = 4 if name.startswith("val_") else 3 if abs(value[0]) < 10 else 1
        value, low, high = (f"{number:.{digits}f}" for number in value)
        return f"{value} [{low}, {high}]"
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:,.4g}" if value % 1 else f"{value:,}"


def print_section(title, figures):
    print(title)
    for name, value in figures.items():
        print(f"  {name:52}{format_figure(name, value)}")


# -----------------------------------------------------------------------------------------------------------------
# the command line


def grade_steps(subject, probes):
    """{title: {skill: [(step, low, share passed, high)]}} of the checkpoints that train.py --keep=log left."""
    sets = {"probes": probes, **{f"spans of {name}": read_spans(name, 100) for name in subject.datasets}}
    series = {title: defaultdict(list) for title, items in sets.items() if items}
    for path in tqdm(subject.checkpoints, desc="checkpoints", leave=False, disable=None):
        device = subject.model.head.weight.device
        model, checkpoint, _ = load_run(path, device, subject.model.config.block_size)
        for title, by_skill in series.items():
            passed = passes(model, subject.encoding, sets[title])
            for skill in dict.fromkeys(p["skill"] for p in sets[title]):
                share, low, high = interval([x for x, p in zip(passed, sets[title]) if p["skill"] == skill])
                by_skill[skill].append((checkpoint["step"], low, share, high))
    return series


def grade(subject, wanted, probes, args):
    """Yield (title, figures) of each wanted section that this subject can be asked for."""
    probes = [{**probe, "prompt": subject.instruction + probe["prompt"]} for probe in probes]
    for name in subject.datasets:
        if "loss" in wanted:
            with torch.autocast(args.device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
                figures = grade_loss(subject, name)
            suffix = "" if args.dtype == "float32" else f" in {args.dtype}"
            yield f"loss on {name}{suffix}", {**figures, "measured with": f"--dtype={args.dtype}"}
    sets = {}
    if "probes" in wanted:
        sets["probes"] = (probes, f"{os.path.basename(args.probes)}, sha256 {file_hash(args.probes)[:8]}")
    if "spans" in wanted:
        for name in subject.datasets:
            sets[f"spans of {name}"] = (read_spans(name, args.spans, by="kind"), f"--spans={args.spans}")
    continuations = {c for items, _ in sets.values() for p in items for c in p["right"] + p["wrong"]}
    counts = count_phrases(continuations, subject.datasets[0]) if continuations else {}
    for title, (items, settings) in sets.items():
        if items:
            yield title, {**grade_probes(subject, items, counts), "measured with": settings}
    if "steps" in wanted and subject.checkpoints:
        yield "steps", grade_steps(subject, probes)


def command_line():
    parser = CommandLine(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of runs, such as out/a (default: the newest)")
    parser.option("only", ",".join(SECTIONS), "sections to measure")
    parser.option("dataset", "", "grade on the stories of this dataset (default: the run's own)")
    parser.option("probes", os.path.join(HERE, "data", "probes.json"), "right and wrong continuations")
    parser.option("spans", 100, "marked words of each kind, where a dataset has them", low=1)
    parser.option("tokenizer", "", "for an hf: model without a tokenizer: the name of another one that has it")
    parser.option("context", 0, "grade with another context than in training; writes context<n>.eval.json", low=0)
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    parser.option("dtype", "float32", "precision of the loss; bfloat16 is faster for large models, and nearly equal",
                  choices=("float32", "bfloat16"))
    return parser


def main(argv=None):
    args = command_line().parse_args(argv)
    wanted = args.only.split(",")
    unknown = set(wanted) - set(SECTIONS)
    if unknown:
        sys.exit(f"--only={args.only} has no section {', '.join(sorted(unknown))}: choose from {','.join(SECTIONS)}")
    if args.context == 1:
        sys.exit("--context=1 leaves nothing to see: give 2 or more")
    probes = read_list("probes", args.probes, lambda p: {"skill", "kind", "prompt", "right", "wrong"} <= set(p))
    args.device, _ = pick_device(args.device, args.dtype)
    for name in args.runs or [newest_run()]:
        subject = load_subject(name, args.device, args.dataset, args.context, args.tokenizer)
        for title, figures in grade(subject, wanted, probes, args):
            add_section(subject, title, figures)
            if title != "steps":  # a series for each skill, which lab.compare draws
                print_section(f"{name}: {title}", figures)
    print("all figures of several runs side by side, and charts: python -m lab.compare")


if __name__ == "__main__":
    run_main(main)

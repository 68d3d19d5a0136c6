"""Measure what a model has learned: its loss, and the skills that stories need.

    python eval.py                                  the newest run
    python eval.py out/a out/b                      several runs
    python eval.py out/a --only=loss,spans          only these sections; eval.json keeps the others
    python eval.py hf:roneneldan/TinyStories-33M --dataset=tinystories      somebody else's model, or hf:FOLDER

The sections are loss, probes, spans and steps; the last one follows a run over the checkpoints of train.py --keep=log.
All figures go to out/<run>/eval.json, estimates with the 95 % interval of a bootstrap over stories, probes or prompts.
"""
# first, so that an old Python, or Ctrl-C while the rest is imported, ends in one line
from common import ROOT, CommandLine, run_main

import math
import os
import re
import sys
from collections import Counter, defaultdict

import numpy as np
import regex
import torch
from tqdm import tqdm

from common.dataset import SKILLS, instruction, load_meta, load_tokens, split_stories
from common.device import pick_device
from common.files import file_hash, read_list
from common.records import read_records
from common.results import add_section, interval, load_subject, print_section
from common.runs import load_run, newest_run
from common.text import SPACELESS, fingerprint
from common.tokenizer import load_tokenizer

SECTIONS = ("loss", "probes", "spans", "steps")
LETTER = rf"[\w--[{SPACELESS}]]"  # of a script that puts spaces between words
WORD = regex.compile(rf"(?V1)[{LETTER}--_]+")


# -----------------------------------------------------------------------------------------------------------------
# the metric: bits per byte. Nats per token cannot be compared across tokenizers, and the loss on random windows depends
# on the draw. So every story is scored once, from its own beginning, and the sum is divided by the bytes of the text.


def sliding_windows(tokens, eot, block_size):
    """[(start, end, scored)] of windows that together predict every token of `tokens` (N,) once, but for tokens[0].

    A window's inputs are tokens[start:end], at most block_size of them, and its targets are the same tokens shifted by
    one, tokens[start + 1:end + 1]. Those up to tokens[scored] were already scored in the previous window.

    A story that fits into the context is one window, from the <|endoftext|> before the story to its last token. A
    longer story takes several, each starting half a context after the previous one. So all but the first tokens of a
    story are predicted from at least half a context."""
    boundaries = np.flatnonzero(tokens == eot).tolist()
    windows = []
    for first, last in zip(boundaries, boundaries[1:]):
        scored = first
        for start in range(first, last, block_size // 2):
            end = min(start + block_size, last)
            windows.append((start, end, scored))
            scored = end
            if end == last:
                break
    return windows


@torch.inference_mode()
def score(model, tokens, eot, batch_tokens=None, title="evaluating"):
    """The cross-entropy in nats, (N,), of each token of `tokens` (N,), which hold stories; 0 for the first token.

    No story sees another. The result does not depend on the batch size: windows of similar length go into one batch,
    padded at the end, where causal attention cannot see the padding."""
    device, best = model.head.weight.device, 2**14
    if device.type == "cpu":
        # larger batches are slower, but a small model has so little to do in each that its threads mostly wait
        best = min(max(1024, 2**30 // sum(p.numel() for p in model.parameters())), 4096)
    batch_tokens = min(batch_tokens or best, 2**27 // model.config.vocab_size)  # at most 512 MB of logits
    nats = np.zeros(len(tokens), np.float32)
    remaining = sorted(sliding_windows(tokens, eot, model.config.block_size), key=lambda window: window[1] - window[0])
    was_training = model.training
    model.eval()
    with tqdm(total=len(tokens), unit="tok", unit_scale=True, desc=title, leave=False, disable=None) as bar:
        while remaining:
            start, end, _ = remaining[-1]  # the longest
            length = padded_length(end - start, model.config.block_size, device)
            batch = remaining[-max(1, batch_tokens // length):]
            del remaining[-len(batch):]
            inputs, targets = padded_batch(tokens, batch, length)
            batch_nats = model(inputs.to(device), targets.to(device)).cpu().numpy()  # (B, T)
            for row, (start, end, scored) in zip(batch_nats, batch):
                nats[scored + 1:end + 1] = row[scored - start:end - start]
                bar.update(end - scored)
    model.train(was_training)
    return nats


def padded_length(length, block_size, device):
    """The length to which windows are padded. On a GPU a multiple of 64: its libraries prepare for each new shape."""
    if device.type != "cuda":
        return length
    return min(-(-length // 64) * 64, block_size)


def padded_batch(tokens, windows, length):
    """Inputs and targets, (B, length) each, of B windows. Targets that do not count are -1, which the loss ignores."""
    inputs = torch.zeros(len(windows), length, dtype=torch.int64)
    targets = torch.full_like(inputs, -1)
    for i, (start, end, scored) in enumerate(windows):
        window = torch.from_numpy(tokens[start:end + 1].astype(np.int64))
        inputs[i, :end - start] = window[:-1]
        targets[i, scored - start:end - start] = window[scored - start + 1:]
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
    result = {key: sum(weight * scores[name][key] for name, weight in mix.items()) for key in ("val_loss", "val_bpb")}
    if len(mix) > 1:
        result.update({f"val_bpb/{name}": scores[name]["val_bpb"] for name in mix})
    return result


# -----------------------------------------------------------------------------------------------------------------
# the loss with an interval, and by skill: prepare.py labels the tokens of spans (see below) in val.skills.bin.


def grade_loss(subject, dataset):
    """{figure: value}: the loss on a dataset's validation stories and, where they have spans, the loss by skill."""
    meta, tokens, encoding = load_meta(dataset), np.asarray(load_tokens(dataset, "val")), load_tokenizer(dataset)
    stories = [encoding.decode(ids.tolist()) for ids in split_stories(tokens, meta["eot"])]
    own_tokenizer, eot = subject.tokenizer == meta["tokenizer"]["sha256"], subject.encoding.eot_token
    altered = 0
    if not own_tokenizer:  # the model was trained with another one, so the same text is encoded again
        rows = [subject.encoding.encode_ordinary(story) for story in stories]
        altered = sum(subject.encoding.decode(row) != story for row, story in zip(rows, stories))
        tokens = np.concatenate([[eot]] + [row + [eot] for row in rows])
    nats = score(subject.model, tokens, eot, title=f"loss on {dataset}").astype(float)
    starts = np.flatnonzero(tokens == eot)[:-1] + 1  # a story's targets: its tokens and the next <|endoftext|>
    n_tokens = np.diff(np.append(starts, len(tokens)))
    n_bytes = [len(story.encode()) for story in stories]
    story_nats = sum_by_story(nats, starts)
    figures = {"val_bpb": interval(story_nats / math.log(2), n_bytes), "val_loss": interval(story_nats, n_tokens),
               "stories": len(stories),
               "stories longer than the context": int((n_tokens > subject.model.config.block_size).sum())}
    if altered:  # so the bits are those of another text; only tokenizers of others do that
        figures["stories that its tokenizer alters"] = altered
    if "bits_per_byte" in meta["val"]:  # the cost of the generator's choices, about the best that any model can reach
        figures["val_bpb of the world's own choices"] = meta["val"]["bits_per_byte"]
    if own_tokenizer and os.path.exists(os.path.join("data", dataset, "val.skills.bin")):
        figures.update(loss_by_skill(dataset, tokens, nats, starts))
    return figures


def loss_by_skill(dataset, tokens, nats, starts):
    """{figure: interval} for the words of each skill's spans, from nats (N,) of tokens (N,) and the stories' starts.

    Their shares of the text and of the whole loss show how little the mean loss says about a rare skill."""
    encoding, labels = load_tokenizer(dataset), np.asarray(load_tokens(dataset, "val.skills"))  # (N,) into SKILLS
    # a word begins with each token that begins with a space, or whose label differs from the one before
    has_space = [encoding.decode_single_token_bytes(t)[:1] == b" " for t in range(encoding.eot_token)] + [False]
    is_word_start = np.array(has_space)[tokens] | np.append(False, labels[1:] != labels[:-1])
    n_tokens = sum_by_story(np.ones(len(tokens)), starts)
    figures = {}
    for label, skill in enumerate(SKILLS):
        has_label = labels == label
        name = "all other words" if skill == "none" else f"{skill} words"
        n_words = sum_by_story(has_label & is_word_start, starts)
        if n_words.sum():
            loss = sum_by_story(nats * has_label, starts)
            figures[f"{name}, nats each"] = interval(loss, n_words)
            figures[f"{name}, share of text"] = interval(sum_by_story(has_label, starts), n_tokens)
            figures[f"{name}, share of loss"] = interval(loss, sum_by_story(nats, starts))
    return figures


def sum_by_story(values, starts):
    """The sums of values (N,) over the S stories that begin at `starts` (S,): (S,)."""
    return np.add.reduceat(values.astype(float), starts)


# -----------------------------------------------------------------------------------------------------------------
# spans and probes. A span is a labeled stretch of a story: its words need a skill (grammar, fact, context, reasoning),
# and the label holds a wrong alternative that tempts a reader without the skill. A probe is a minimal pair (as in
# BLiMP, Warstadt et al. 2020): a prompt with right and wrong continuations. It comes from data/probes.json or from a
# span. In the latter case the prompt is the story up to the span, the span is right, and its alternative is wrong.
#
# A probe is a dict: skill, kind (of task within the skill), prompt, right and wrong (lists of continuations), and
# for spans `after`, the text that follows either of them.


def read_spans(dataset, limit, by="skill"):
    """Probes from the first `limit` spans of each skill, or of each kind, in a dataset's validation stories."""
    groups = defaultdict(list)
    before = instruction({}) if load_meta(dataset)["instruct"] else ""  # what every story of the dataset begins with
    for story, span in validation_spans(dataset):
        probe = probe_from_span(story, span, before)
        if len(groups[probe[by]]) < limit:
            groups[probe[by]].append(probe)
    return [probe for group in groups.values() for probe in group]


def validation_spans(dataset):
    """Yield (story, span) for each span of a dataset's validation stories. val.bin holds tokens alone, so they come
    from the records that prepare.py read, those whose text is in val.bin."""
    if not os.path.exists(os.path.join("data", dataset, "val.skills.bin")):
        return
    meta, encoding = load_meta(dataset), load_tokenizer(dataset)
    val_texts = [encoding.decode(ids.tolist()) for ids in split_stories(load_tokens(dataset, "val"), meta["eot"])]
    in_val = {fingerprint(text.split(instruction({}))[-1]) for text in val_texts}  # without any instructions
    for source in meta["source"]:
        if not os.path.isfile(source["file"]):  # it may have been a pipe
            continue
        for record in read_records(source["file"], meta.get("field", "story")):
            if record.get("spans") and fingerprint(record["story"]) in in_val:
                yield from ((record["story"], span) for span in record["spans"])


def probe_from_span(story, span, before):
    """The probe that a span makes. `before` is put before the story."""
    kind = span.get("kind", span["skill"])
    if "depth" in span:
        kind += f", depth {span['depth']:2}"
    # The next word is scored as well. Otherwise "jump", being a prefix of "jumped", would win.
    next_word = regex.match(r"\W*\w*", story[span["end"]:])[0]
    return {"skill": span["skill"], "kind": kind, "prompt": before + story[:span["start"]],
            "right": [story[span["start"]:span["end"]]], "wrong": [span["wrong"]], "after": next_word}


def passes(model, encoding, probes, title="probes"):
    """(N,) bool: whether a right continuation of each of N probes is likelier than all wrong ones.

    The cost of a continuation is the sum of nats of its tokens. Tokens that all texts of a probe begin with cost the
    same, and are left out. If a text is longer than the context, its beginning is dropped."""
    eot, block_size = encoding.eot_token, model.config.block_size
    tokens = []  # the texts of all probes, as if they were stories
    scored = []  # for each probe, the slice of `tokens` to score in each of its texts
    for probe in probes:
        texts = [probe["prompt"] + c + probe.get("after", "") for c in probe["right"] + probe["wrong"]]
        rows = [encoding.encode_ordinary(text) for text in texts]
        n_common = len(os.path.commonprefix(rows))  # works on any sequence
        scored.append([])
        for row in rows:
            n_dropped = max(0, len(row) + 1 - block_size)  # the context also holds <|endoftext|>
            tokens += [eot] + row[n_dropped:]
            n_scored = len(row) - max(n_common, n_dropped)
            scored[-1].append(slice(len(tokens) - n_scored, len(tokens)))
    nats = score(model, np.array(tokens + [eot]), eot, title=title)
    passed = []
    for probe, slices in zip(probes, scored):
        costs = [nats[part].sum() for part in slices]
        n_right = len(probe["right"])
        passed.append(min(costs[:n_right]) < min(costs[n_right:]))
    return np.array(passed)


def pass_rates(field, probes, passed):
    """{value: interval}: the share of passed (N,) among the probes that have each value of a field."""
    values = np.array([probe[field] for probe in probes])
    return {value: interval(passed[values == value]) for value in dict.fromkeys(values.tolist())}


def skill_accuracy(model, encoding, probes):
    """{skill: share passed} of the probes; {} without any.

    train.py prints these, of the first spans of each skill, whatever their kind. The spans section instead takes
    equally many spans of each kind, easy and hard."""
    rates = pass_rates("skill", probes, passes(model, encoding, probes, "skills")) if probes else {}
    return {skill: rates[skill][0] for skill in SKILLS if skill in rates}


def count_phrases(phrases, dataset, max_tokens=5_000_000):
    """How often each phrase occurs in a dataset's train text, or in `max_tokens` of it, evenly spread."""
    tokens, encoding, counts = load_tokens(dataset, "train"), load_tokenizer(dataset), Counter()
    phrases = {phrase.strip().lower() for phrase in phrases}
    step = 50_000 * max(1, len(tokens) / max_tokens)
    for start in tqdm(np.arange(0, len(tokens), step).astype(int), desc="counting words", leave=False, disable=None):
        text = encoding.decode(tokens[start:start + 50_000].tolist()).lower()
        words = Counter(WORD.findall(text))
        for phrase in phrases:
            counts[phrase] += words[phrase] if WORD.fullmatch(phrase) else text.count(phrase)
    return counts


def mentions(continuation, prompt):
    """The positions at which a continuation already occurs in the prompt."""
    word = rf"(?V1)(?<!{LETTER}){re.escape(continuation.strip())}(?!{LETTER})"  # it may be "+1", so \b will not do
    return [match.start() for match in regex.finditer(word, prompt, regex.IGNORECASE)]


def heuristics(probe, counts):
    """{heuristic: its chance to pass the probe}. Each is a control: to pass as often as it does shows no skill.

    counts: {phrase: how often it occurs in train}. Ties are broken by guessing."""
    continuations = probe["right"] + probe["wrong"]
    positions = [mentions(continuation, probe["prompt"]) for continuation in continuations]
    scores = {
        # guessing: depends on the number of continuations alone, and is 50 % for a span
        "by chance": [0 for _ in continuations],
        # knowing nothing but how common words are, like a unigram model
        "the most frequent in train": [counts[continuation.strip().lower()] for continuation in continuations],
        # copying what came last: a test of context or reasoning must not be won by recency
        "the last mentioned": [max(places, default=-1) for places in positions],
        # taking what the story is mostly about
        "the most mentioned": [len(places) for places in positions]}
    n_right = len(probe["right"])
    return {name: row[:n_right].count(max(row)) / row.count(max(row)) for name, row in scores.items()}


def grade_probes(subject, probes, measured):
    """{figure: value}: the share of probes that the model passes, by skill and kind, and the share that each heuristic
    passes. `measured` says which probes these are; {} if there are none."""
    if not probes:
        return {}
    phrases = [continuation for probe in probes for continuation in probe["right"] + probe["wrong"]]
    counts = sum((count_phrases(phrases, name) for name in subject.datasets), Counter())
    passed = passes(subject.model, subject.encoding, probes)
    by_heuristic = [heuristics(probe, counts) for probe in probes]
    figures = {}
    present = [probe["skill"] for probe in probes]
    for skill in dict.fromkeys([skill for skill in SKILLS if skill in present] + present):  # the easiest first
        members = [i for i, probe in enumerate(probes) if probe["skill"] == skill]
        figures[skill] = interval(passed[members])
        for name in by_heuristic[0]:
            figures[f"{skill}, {name}"] = interval([by_heuristic[i][name] for i in members])
        rates = pass_rates("kind", [probes[i] for i in members], passed[members])
        figures.update({f"{skill}: {kind}": rates[kind] for kind in sorted(rates) if kind != skill})
    return {**figures, "measured with": measured}


# -----------------------------------------------------------------------------------------------------------------
# the sections, and the command line


def grade_steps(subject, probes):
    """{title: {skill: [(step, low, share passed, high)]}} of the checkpoints that train.py --keep=log left."""
    sets = {"probes": probes, **{f"spans of {name}": read_spans(name, 100) for name in subject.datasets}}
    series = {title: defaultdict(list) for title, items in sets.items() if items}
    for path in tqdm(subject.checkpoints, desc="checkpoints", leave=False, disable=None):
        model, checkpoint, _ = load_run(path, subject.model.head.weight.device, subject.model.config.block_size)
        for title, by_skill in series.items():
            passed = passes(model, subject.encoding, sets[title])
            for skill, (share, low, high) in pass_rates("skill", sets[title], passed).items():
                by_skill[skill].append((checkpoint["step"], low, share, high))
    return series


def grade(subject, wanted, probes, args):
    """Yield (title, figures) of each wanted section. There are no figures where there is nothing to measure."""
    probes = [{**probe, "prompt": subject.instruction + probe["prompt"]} for probe in probes]
    if "loss" in wanted:
        for dataset in subject.datasets:
            with torch.autocast(args.device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
                figures = grade_loss(subject, dataset)
            suffix = "" if args.dtype == "float32" else f" in {args.dtype}"
            figures["measured with"] = f"all {figures['stories']:,} validation stories, {args.dtype}"
            yield f"loss on {dataset}{suffix}", figures
    if "probes" in wanted:
        measured = f"{len(probes)} of {os.path.basename(args.probes)}, sha256 {file_hash(args.probes)[:8]}"
        yield "probes", grade_probes(subject, probes, measured)
    if "spans" in wanted:
        measured = f"the first {args.spans} of each kind in validation stories"
        for dataset in subject.datasets:
            spans = read_spans(dataset, args.spans, by="kind")
            yield f"spans of {dataset}", grade_probes(subject, spans, measured)
    if "steps" in wanted and subject.checkpoints:
        yield "steps", grade_steps(subject, probes)


def command_line():
    parser = CommandLine(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of runs, such as out/a (default: the newest)")
    parser.option("only", ",".join(SECTIONS), "sections to measure")
    parser.option("dataset", "", "grade on the stories of this dataset (default: the run's own)")
    parser.option("probes", os.path.join(ROOT, "data", "probes.json"), "prompts with right and wrong continuations")
    parser.option("spans", 100, "how many spans of each kind, where stories have them", low=1)
    parser.option("tokenizer", "", "for an hf: model without a tokenizer: the name of another one that has it")
    parser.option("context", 0, "grade with another context; writes context<n>.eval.json (default: as in training)",
                  low=0)
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    parser.option("dtype", "float32", "precision of the loss; bfloat16 is faster for large models, and nearly equal",
                  choices=("float32", "bfloat16", "float16"))
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
    graded = []
    for name in args.runs or [newest_run()]:
        subject = load_subject(name, args.device, args.dataset, args.context, args.tokenizer)
        for title, figures in grade(subject, wanted, probes, args):
            if not figures:
                print(f"{name}: no {title}: its stories have none")
                continue
            add_section(subject, title, figures)
            if title != "steps":  # a series for each skill, which lab.compare draws
                print_section(f"{name}: {title}", figures)
            graded.append(subject.path("eval.json").removesuffix(os.sep + "eval.json"))
    if graded:
        print("in brackets: 95 % intervals. Accuracies are shares passed: spans and probes differ in difficulty")
        print(f"side by side, and with charts: python -m lab.compare {' '.join(dict.fromkeys(graded))}")
    elif args.only == "steps":
        sys.exit("no weights of single steps were kept: train with --keep=log")


if __name__ == "__main__":
    run_main(main)

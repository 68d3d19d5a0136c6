"""Measure what models can do, and how diverse corpora are.

    python eval.py                                  the newest run: loss, probes, completions, memorisation
    python eval.py out/a out/b                      several side by side, and charts in out/compare.html
    python eval.py out/a --only=loss,spans          some sections; what eval.json holds of the others stays
    python eval.py out/a --judge=gpt-4o-mini        marks by a large model, as in the paper
    python eval.py hf:roneneldan/TinyStories-33M --dataset=tinystories      somebody else's model, or hf:FOLDER
    python eval.py --stories a.jsonl b.txt          files of stories, side by side

Estimates come with the 95 % interval of a bootstrap over stories, probes or prompts. All go to out/<run>/eval.json.
"""
import glob
import json
import math
import os
import random
import re
import sys
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from corpus import compare_stories, runs_of, words_of
from model import find_run, load_model, pick_device
from prepare import (INSTRUCTIONS, SKILLS, Parser, instruction, load_meta, load_tokenizer, load_tokens, read_records,
                     start)
from report import compare, interval, over_seeds, print_table, table, write_whole
from sample import generate, load_run

HERE = os.path.dirname(os.path.abspath(__file__))
SECTIONS = ("loss", "probes", "spans", "completions", "memorisation", "instructions", "steps", "judge")


# -----------------------------------------------------------------------------------------------------------------
# loss


def windows(tokens, eot, block_size):
    """[(start, length, skip)]: each story from its own <|endoftext|>, cut into windows that overlap by half where it
    is longer than the context. Scored are tokens[start + 1 + skip : start + 1 + length], and so each token once."""
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
def score(model, tokens, eot, batch_tokens=None, title="evaluating"):
    """Nats (N,) that each of the stories' `tokens` (N,) costs the model, 0 for the first; no story sees another.

    Deterministic. Windows of like length go into one batch of about `batch_tokens`, padded at the end, where causal
    attention keeps the padding from being seen."""
    device = model.head.weight.device
    batch_tokens = batch_tokens or (1024 if device.type == "cpu" else 2**14)  # a CPU is slower with more
    batch_tokens = min(batch_tokens, 2**27 // model.config.vocab_size)  # no more than 512 MB of logits
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
        size = len(load_tokenizer(dataset).decode_bytes(tokens[tokens != meta["eot"]].tolist()))
    nats = float(score(model, tokens, meta["eot"]).sum(dtype=np.float64))
    return {"val_loss": nats / (len(tokens) - 1), "val_bpb": nats / size / math.log(2)}


def split_stories(tokens, eot):
    """The tokens of each story, without <|endoftext|>."""
    return [part[1:] for part in np.split(tokens, np.flatnonzero(tokens == eot))[1:-1]]


def loss(subject, dataset):
    """What all validation stories cost; where their words are labelled, what those of each skill cost, and how much of
    the text and of the loss they are: that shows how little the mean loss sees of a rare skill."""
    meta, tokens, encoding = load_meta(dataset), np.asarray(load_tokens(dataset, "val")), load_tokenizer(dataset)
    stories = [encoding.decode(part.tolist()) for part in split_stories(tokens, meta["eot"])]
    own, eot = subject.tokenizer == meta["tokenizer"]["sha256"], subject.encoding.eot_token
    if not own:
        tokens = np.array([t for story in stories for t in [eot] + subject.encoding.encode_ordinary(story)] + [eot])
    nats = score(subject.model, tokens, eot, title=f"loss on {dataset}").astype(float)
    starts = np.flatnonzero(tokens == eot)[:-1] + 1  # a story's cost: from its first token to the next <|endoftext|>
    def sums(values):
        return np.add.reduceat(values.astype(float), starts)  # (stories,)
    lengths = sums(np.ones(len(tokens)))
    figures = {"val_bpb": interval(sums(nats) / math.log(2), [len(story.encode()) for story in stories]),
               "val_loss": interval(sums(nats), lengths), "stories": len(stories),
               "stories longer than the context": int((lengths > subject.model.config.block_size).sum())}
    if "bits_per_byte" in meta["val"]:
        figures["val_bpb of the world's own choices"] = meta["val"]["bits_per_byte"]
    if own and os.path.exists(os.path.join("data", dataset, "val.skills.bin")):
        labels = np.asarray(load_tokens(dataset, "val.skills"))
        space = np.array([encoding.decode_single_token_bytes(t)[:1] == b" " for t in range(meta["vocab_size"])])
        begins = space[tokens] | np.append(False, labels[1:] != labels[:-1])  # whether a word does
        for i, skill in enumerate(SKILLS):
            marked, name = labels == i, f"{skill if i else 'all other'} words"
            if (words := sums(marked & begins)).sum():
                figures[f"{name}, nats each"] = interval(sums(nats * marked), words)
                figures[f"{name}, share of text"] = interval(sums(marked), lengths)
                figures[f"{name}, share of loss"] = interval(sums(nats * marked), sums(nats))
    return figures


# -----------------------------------------------------------------------------------------------------------------
# probes: dicts of skill, kind, prompt, right and wrong continuations, and perhaps `after`, the word that follows


def read_list(option, path, valid):
    """The list in a JSON file whose items all are `valid`."""
    try:
        with open(path, encoding="utf-8") as f:
            if (found := json.load(f)) and all(map(valid, found)):
                return found
        sys.exit(f"--{option}={path} has not the form of data/{option}.json")
    except (OSError, ValueError, TypeError) as e:
        sys.exit(f"cannot read --{option}={path}: {e}")


def read_spans(dataset, most, by="skill"):
    """The first marked words of validation stories as probes, `most` of each skill or kind. With the word that
    follows, "jump" and "jumped" both cost what it takes to end there."""
    found = defaultdict(list)
    if not os.path.exists(os.path.join("data", dataset, "val.skills.bin")):
        return []
    meta = load_meta(dataset)
    before = instruction({}) if meta["instruct"] else ""
    for source in meta["source"]:
        path, split = source["file"], source["split"]
        for record in read_records(path) if path.endswith(".jsonl") and os.path.exists(path) else ():
            for span in record.get("spans") or () if str(split or record.get("split"))[:3] == "val" else ():
                kind = span.get("kind", span["skill"]) + (f", depth {span['depth']:2}" if "depth" in span else "")
                if len(some := found[kind if by == "kind" else span["skill"]]) < most:
                    story, begin, end = record["story"], span["start"], span["end"]
                    some.append({"skill": span["skill"], "kind": kind, "prompt": before + story[:begin],
                                 "right": [story[begin:end]], "wrong": [span["wrong"]],
                                 "after": re.match(r"\W*\w*", story[end:])[0]})
    return [probe for some in found.values() for probe in some]


def passes(model, encoding, probes, title="probes"):
    """(N,) whether one right continuation of each probe is likelier than every wrong one, by the sum of the
    log-likelihoods of the tokens that follow those which all of them begin with."""
    eot, tokens, parts, ends = encoding.eot_token, [], [], []
    for probe in probes:
        rows = [encoding.encode_ordinary(probe["prompt"] + continuation + probe.get("after", ""))
                for continuation in probe["right"] + probe["wrong"]]
        same = next((i for i, column in enumerate(zip(*rows)) if len(set(column)) > 1), min(map(len, rows)))
        for row in rows:
            cut = max(0, len(row) + 1 - model.config.block_size)  # what the context cannot hold
            parts.append((len(tokens) + 1 + max(0, same - cut), len(tokens) + 1 + len(row) - cut))
            tokens += [eot] + row[cut:]
        ends.append(len(parts))
    nats = score(model, np.array(tokens + [eot]), eot, title=title)
    costs = np.split([nats[begin:end].sum() for begin, end in parts], ends[:-1])
    return np.array([min(cost[:len(p["right"])]) < min(cost[len(p["right"]):]) for cost, p in zip(costs, probes)])


def skill_accuracy(model, dataset, per_skill=200):
    """{skill: share} of the marked words of validation stories that the model finds likelier than the tempting wrong
    ones; {} where no record, or file, that is marked val carries spans."""
    if not (spans := read_spans(dataset, per_skill)):
        return {}
    right, skills = passes(model, load_tokenizer(dataset), spans, "skills"), np.array([s["skill"] for s in spans])
    return {skill: float(right[skills == skill].mean()) for skill in SKILLS if skill in skills}


def count_phrases(phrases, dataset, most=5_000_000):
    """How often each phrase stands in a dataset's train text, or in `most` tokens of it, evenly spread."""
    tokens, encoding, counts = load_tokens(dataset, "train"), load_tokenizer(dataset), Counter()
    phrases, step = {phrase.strip().lower() for phrase in phrases}, 50_000 * max(1, len(tokens) / most)
    for begin in tqdm(np.arange(0, len(tokens), step).astype(int), desc="counting words", leave=False, disable=None):
        text = encoding.decode(tokens[begin:begin + 50_000].tolist()).lower()
        words = Counter(re.findall(r"[^\W_]+", text))
        counts.update({phrase: words[phrase] if phrase.isalnum() else text.count(phrase) for phrase in phrases})
    return counts


def shortcut(probe, score_of):
    """Probability that a reader passes who takes the continuation with the highest score, and draws among equals."""
    scores = {c: score_of(c) for c in probe["right"] + probe["wrong"]}
    best = [c for c in scores if scores[c] == max(scores.values())]
    return sum(c in probe["right"] for c in best) / len(best)


def places(probe, continuation):
    """Where a continuation already stands in its prompt."""
    word = rf"(?<!\w){re.escape(continuation.strip())}(?!\w)"  # which may be "+1"
    return [match.start() for match in re.finditer(word, probe["prompt"], re.IGNORECASE)]


def grade_probes(subject, probes, counts):
    """Share of probes passed, by skill and kind, and beside it what readers without any skill would pass."""
    readers = {"": passes(subject.model, subject.encoding, probes),
               ", by chance": [shortcut(p, lambda c: 0) for p in probes],
               ", the most frequent in train": [shortcut(p, lambda c: counts[c.strip().lower()]) for p in probes],
               ", the last mentioned": [shortcut(p, lambda c: max(places(p, c), default=-1)) for p in probes],
               ", the most mentioned": [shortcut(p, lambda c: len(places(p, c))) for p in probes]}
    figures = {}
    for skill in dict.fromkeys(p["skill"] for p in probes):
        for reader, passed in readers.items():
            figures[skill + reader] = interval([x for x, p in zip(passed, probes) if p["skill"] == skill])
        for kind in sorted({p["kind"] for p in probes if p["skill"] == skill} - {skill}):
            figures[f"{skill}: {kind}"] = interval([x for x, p in zip(readers[""], probes)
                                                    if (p["skill"], p["kind"]) == (skill, kind)])
    return figures


# -----------------------------------------------------------------------------------------------------------------
# completions


def complete(subject, prompts, max_tokens, each=1, title="completing"):
    """Token ids of `each` continuations of every prompt, at temperature 1, without <|endoftext|>: one of fewer than
    max_tokens has ended by itself. Number i of them all draws from seed i + 1."""
    eot, found = subject.encoding.eot_token, {}
    ids = [[eot] + subject.encoding.encode_ordinary(prompt) for prompt in prompts for _ in range(each)]
    alike = defaultdict(list)  # prompts of equal length go into one batch
    for i, row in enumerate(ids):
        alike[len(row)].append(i)
    batches = [some[i:i + 50] for some in alike.values() for i in range(0, len(some), 50)]
    for rows in tqdm(batches, desc=title, leave=False, disable=None):
        tokens = generate(subject.model, [ids[i] for i in rows], max_tokens, [i + 1 for i in rows], eot)
        for i, row in zip(rows, torch.stack(list(tokens), 1).tolist()):
            found[i] = [token for token in row if token != eot]
    return [[found[i] for i in range(begin, begin + each)] for begin in range(0, len(ids), each)]


def completions(subject, found, args):
    """What can be counted in continuations of prompts, [[token ids] of each prompt]."""
    texts = [[words_of(subject.encoding.decode(ids)) for ids in some] for some in found]
    def by_prompt(top, bottom=len):
        return interval([top(some) for some in texts], [bottom(some) for some in texts])
    ended = [np.mean([len(ids) < args.max_tokens for ids in some]) for some in found]
    figures = {"ended by themselves": interval(ended),
               "length in words": by_prompt(lambda some: sum(map(len, some))),
               "4-grams that repeat one of the same text": by_prompt(
                   lambda some: sum(len(runs_of(text, 4)) - len(set(runs_of(text, 4))) for text in some),
                   lambda some: sum(len(runs_of(text, 4)) for text in some))}
    for n in range(1, 5):
        figures[f"distinct {n}-grams among a prompt's"] = by_prompt(
            lambda some: len({run for text in some for run in runs_of(text, n)}),
            lambda some: sum(len(runs_of(text, n)) for text in some))
    # Rouge-2 between completions: F1 of their sets of pairs of words, which are the columns of a matrix
    pairs = [set(runs_of(text, 2)) for some in texts for text in some]
    column = {pair: i for i, pair in enumerate({pair for some in pairs for pair in some})}
    stands = np.zeros((len(pairs), len(column)), np.float32)
    for row, some in zip(stands, pairs):
        row[[column[pair] for pair in some]] = 1
    alike = 2 * (stands @ stands.T) / np.maximum(1, stands.sum(1)[:, None] + stands.sum(1))
    np.fill_diagonal(alike, 0)
    figures["Rouge-2 with the likest other"] = interval(alike.max(1).reshape(len(found), -1).mean(1))
    return figures


# -----------------------------------------------------------------------------------------------------------------
# memorisation


def pick_stories(tokens, eot, n, least=75):
    """Up to n stories of `least` tokens or more, evenly spread over the file, of which little else is read."""
    found = {}
    for begin in np.linspace(0, len(tokens), n, endpoint=False).astype(int).tolist():
        part = np.asarray(tokens[begin:begin + 20_000])
        ends = np.flatnonzero(part == eot).tolist()
        for a, b in zip(ends, ends[1:]):
            if b - a > least:
                found[begin + a] = part[a + 1:b].tolist()
                break
    return list(found.values())


def shared_runs(queries, tokens, n=5, piece=1 << 20):
    """What each of Q queries (lists of token ids) shares with `tokens`, which are read once, piece by piece: (length
    of its longest run of n or more tokens that stands there, else 0; share of its runs of n that do), (Q,) each.

    Runs are known by 64-bit hashes that grow by one token at a time (after Karp & Rabin 1987): a place that shares k
    tokens with a query is tried for k + 1, and soon few are left."""
    values = np.random.default_rng(0).integers(1, 2**63, 2**16, np.uint64)  # a random number for each token
    factor, shift = np.uint64(0x9E3779B97F4A7C15), np.uint64(42)
    flat = np.array([t for query in queries for t in query], int)
    owner = np.repeat(np.arange(len(queries)), [len(query) for query in queries])
    left = np.array([i for query in queries for i in range(len(query), 0, -1)])  # tokens to the end of the query
    longest, levels = left.max(initial=0), []

    def level(k):
        """For runs of k tokens: the hash of the one at each place of flat, those in order, and which were found."""
        while len(levels) < k:
            i = len(levels)
            hashes = (levels[-1][0] if i else np.uint64(0)) * factor + values[np.append(flat[i:], np.zeros(i, int))]
            known = np.unique(hashes[left > i])
            levels.append((hashes, known, np.zeros(len(known), bool)))
        return levels[k - 1]

    if longest < n:
        return np.zeros(len(queries), int), np.zeros(len(queries))
    rough = np.zeros(2**22, bool)  # which first 22 bits a query's hash has: rules out most places at little cost
    rough[level(n)[1] >> shift] = True
    for begin in tqdm(range(0, len(tokens), piece), desc="comparing with train", leave=False, disable=None):
        part = values[tokens[begin:begin + piece + longest]]
        hashes, k = np.zeros(max(0, min(piece, len(part) - n + 1)), np.uint64), n
        for i in range(n):
            hashes = hashes * factor + part[i:i + len(hashes)]
        where = np.flatnonzero(rough[hashes >> shift])
        hashes = hashes[where]
        while len(where) and k <= longest:
            _, known, found = level(k)
            at = np.searchsorted(known, hashes).clip(max=len(known) - 1)
            same = known[at] == hashes
            found[at[same]] = True
            same &= where + k < len(part)
            where, hashes = where[same], hashes[same]
            hashes, k = hashes * factor + part[where + k], k + 1
    reached = np.zeros(len(queries), int)
    for k in range(n, len(levels) + 1):
        hashes, known, found = level(k)
        there = (left >= k) & found[np.searchsorted(known, hashes).clip(max=len(known) - 1)]
        reached[owner[there]] = k
        if k == n:
            share = np.bincount(owner[there], minlength=len(queries))
    return reached, share / np.maximum(1, np.bincount(owner[left >= n], minlength=len(queries)))


def memorisation(subject, dataset, args):
    """100 train stories completed from their first words: how much of the true ending comes back, and what stands
    in any train story. The yardsticks: the same for validation stories, and how these really end."""
    encoding, figures, texts = load_tokenizer(dataset), {}, {}
    for split in ("train", "val"):
        stories = pick_stories(load_tokens(dataset, split), encoding.eot_token, 100)
        begins = [encoding.decode(story[:50]).rpartition(" ")[0] for story in stories]
        ends = [encoding.decode(story[:50 + args.max_tokens])[len(begin):] for story, begin in zip(stories, begins)]
        told = [subject.encoding.decode(ids) for ids, in complete(subject, begins, args.max_tokens,
                                                                  title=f"completing {split} stories")]
        pairs = [[Counter(runs_of(words_of(text), 2)) for text in both] for both in zip(told, ends)]
        figures[f"Rouge-2 precision against the true ending, {split}"] = interval(
            [(a & b).total() for a, b in pairs], [a.total() for a, b in pairs])
        texts[f"{split} completed"] = told
    texts["true endings of val"] = ends
    queries = [encoding.encode_ordinary(text) for some in texts.values() for text in some]
    longest, share = shared_runs(queries, load_tokens(dataset, "train"))
    owner = np.repeat(list(texts), [len(some) for some in texts.values()])
    for name in texts:
        figures[f"5-grams of tokens that stand in train, {name}"] = interval(share[owner == name])
        figures[f"longest run that stands in train, {name}"] = interval(longest[owner == name])
        figures[f"… the longest of all, {name}"] = int(longest[owner == name].max(initial=0))
    return figures


# -----------------------------------------------------------------------------------------------------------------
# instructions


def instructions(subject, dataset, args):
    """Share of what was asked for that the story has, for fields that stood together in train and for those that were
    held out, on validation stories that were prepared with --instruct: the sentence, the words, and the summary's
    words of four letters or more; beside another story's words, which are there by chance."""
    from generate import missing  # which knows the inflections
    meta, encoding = load_meta(dataset), load_tokenizer(dataset)
    hold_out, asked, figures = set(meta["instruct"]["hold_out"]), {"seen": [], "held-out": []}, {}
    for part in split_stories(np.asarray(load_tokens(dataset, "val")), meta["eot"]):
        head, end, _ = encoding.decode(part.tolist()).partition(instruction({}))
        fields = dict(line.split(": ", 1) for line in head.splitlines() if ": " in line)
        fields = {name: fields[title] for name, title in INSTRUCTIONS.items() if title in fields}
        group = asked["held-out" if hold_out and hold_out <= set(fields) else "seen"]
        if end and len(group) < 60 and set(fields) & {"words", "sentence", "summary"}:
            group.append((head + end, fields))
    for name, group in asked.items():
        told = complete(subject, [prompt for prompt, _ in group], args.max_tokens, title="following instructions")
        told = [subject.encoding.decode(ids) for ids, in told]
        figures[f"sentences included, {name} combinations"] = interval(
            [fields["sentence"] in text for (_, fields), text in zip(group, told) if "sentence" in fields])
        words = [fields["words"].split(", ") if "words" in fields else [] for _, fields in group]
        summaries = [set(re.findall(r"\w{4,}", fields.get("summary", ""))) for _, fields in group]
        for what, some, used in (("words", words, lambda some, text: len(some) - len(missing(some, text))),
                                 ("summary's words", summaries,
                                  lambda some, text: len(some & set(re.findall(r"\w+", text))))):
            for title, these in ((f"{what} used", some), (f"another's {what}", some[1:] + some[:1])):
                figures[f"{title}, {name} combinations"] = interval([*map(used, these, told)], [*map(len, these)])
    return figures


# -----------------------------------------------------------------------------------------------------------------
# what is graded: a run, or somebody else's model


class Published(torch.nn.Module):
    """A language model of transformers' behind the surface of our GPT, as far as `score` and `generate` use it."""

    def __init__(self, inner, bos, eot):
        super().__init__()
        self.inner, self.head, self.bos, self.eot = inner, inner.get_output_embeddings(), bos, eot
        # the cache is its own; ours only counts
        self.config = SimpleNamespace(block_size=inner.config.max_position_embeddings, n_layer=0, n_head=1, n_embd=1,
                                      vocab_size=self.head.weight.size(0))

    def forward(self, idx, targets=None, cache=None):
        begin = not cache or cache.length == 0
        if begin:  # some have one token before a text, and another after it
            idx = torch.cat((idx[:, :1].masked_fill(idx[:, :1] == self.eot, self.bos), idx[:, 1:]), 1)
        out = self.inner(idx, past_key_values=None if begin else cache.past, use_cache=cache is not None)
        if cache:
            cache.past, cache.length = out.past_key_values, cache.length + idx.size(1)
        if targets is None:
            return out.logits
        return torch.nn.functional.cross_entropy(out.logits.float().transpose(1, 2), targets, ignore_index=-1,
                                                 reduction="none")

    def num_params(self, embedding=True):
        tables = {id(p) for name, p in self.named_parameters() if re.search(r"(wte|wpe|embed_tokens|lm_head)\.", name)}
        return sum(p.numel() for p in self.parameters() if embedding or id(p) not in tables)


def load_published(name, device, args):
    try:
        import transformers
    except ImportError:
        sys.exit(f"hf:{name} needs a package more: pip install transformers")
    if not args.dataset:
        sys.exit(f"hf:{name} can be graded on any stories: name some that are prepared, --dataset=tinystories")
    transformers.logging.set_verbosity_error()
    try:
        inner = transformers.AutoModelForCausalLM.from_pretrained(name).float().to(device).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer or name)
    except (OSError, ValueError, ImportError) as e:
        sys.exit(f"hf:{name} cannot be loaded: {str(e).strip().splitlines()[0]} (where it lacks a tokenizer, name "
                 "another model's, such as --tokenizer=EleutherAI/gpt-neo-125M)")
    eot = tokenizer.eos_token_id
    bos = eot if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encoding = SimpleNamespace(eot_token=eot,
                               encode_ordinary=lambda text: tokenizer.encode(text, add_special_tokens=False),
                               decode=lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return Published(inner, bos, eot), encoding


def settings_of(checkpoint):
    """A run's settings but for its seed, as text: runs that have the same are told apart by chance alone."""
    settings = {k: v for k, v in checkpoint["args"].items() if k not in ("seed", "out_dir", "resume")}
    settings["init_from"] = settings["init_from"].rstrip("0123456789")  # out/warm-1 and out/warm-2 are alike
    if not settings["max_minutes"]:
        settings["step"] = checkpoint["step"]  # one of them may have been cut short
    return json.dumps(settings)


def load(name, device, args):
    """What is graded: model, encoding, the tokenizer's hash, datasets, what the model expects before a story, kept
    checkpoints, the time of the last, what to tell about it, its settings but for the seed, and path(file), which
    says where a file about it goes."""
    folder, prefix, kept = name, "", []
    if name.startswith("hf:"):
        if args.context:
            sys.exit(f"{name} has its own context: leave --context out")
        model, encoding = load_published(name[3:], device, args)
        checkpoint, when = {"tokenizer": None}, 0
        folder = os.path.join("out", "hf-" + os.path.basename(name[3:].rstrip("/")))
        os.makedirs(folder, exist_ok=True)
    elif name.endswith((".txt", ".jsonl")):
        sys.exit(f"{name} is no run: for a file of stories, python eval.py --stories {name}")
    else:
        model, checkpoint, encoding = load_run(name, device, args.context)
        if name.endswith(".pt"):  # out/a/ckpt-0000064.pt: its files are out/a/ckpt-0000064.eval.json and so on
            folder, prefix, when = os.path.dirname(name), os.path.basename(name)[:-2], os.path.getmtime(name)
        else:
            when = os.path.getmtime(os.path.join(name, "ckpt.pt"))
            kept = sorted(glob.glob(os.path.join(glob.escape(name), "ckpt-*.pt")))
        prefix += f"context{args.context}." if args.context else ""
    datasets = [args.dataset] if args.dataset else checkpoint["datasets"]
    instructed = any(load_meta(d)["instruct"] for d in checkpoint.get("datasets", ())
                     if os.path.exists(f"data/{d}/meta.json"))
    about = {"parameters": model.num_params(False), "with embedding and head": model.num_params(),
             "context": model.config.block_size, "step": checkpoint.get("step")}
    return SimpleNamespace(model=model, encoding=encoding, tokenizer=checkpoint["tokenizer"], datasets=datasets,
                           before=instruction({}) if instructed else "", kept=kept, time=when, about=about,
                           settings=prefix + (settings_of(checkpoint) if "args" in checkpoint else name), folder=folder,
                           path=lambda file: os.path.join(folder, prefix + file))


# -----------------------------------------------------------------------------------------------------------------
# the stage


def steps(subject, probes, device):
    """{probes or spans: {skill: [(step, low, share passed, high)]}} of checkpoints left by train.py --keep=log."""
    sets = {"probes": probes, **{f"spans of {name}": read_spans(name, 100) for name in subject.datasets}}
    found = {title: defaultdict(list) for title, some in sets.items() if some}
    for path in tqdm(subject.kept, desc="checkpoints", leave=False, disable=None):
        model, checkpoint = load_model(path, device, subject.model.config.block_size)
        for title in found:
            passed = passes(model, subject.encoding, sets[title])
            for skill in dict.fromkeys(p["skill"] for p in sets[title]):
                share, low, high = interval([x for x, p in zip(passed, sets[title]) if p["skill"] == skill])
                found[title][skill].append((checkpoint["step"], low, share, high))
    return found


def controls(dataset, n=30):
    """{name: [(beginning, ending)]}: how validation stories end, how others of them do, and the words in disorder."""
    encoding = load_tokenizer(dataset)
    stories = [encoding.decode(ids) for ids in pick_stories(load_tokens(dataset, "val"), encoding.eot_token, n)]
    stories = [story.split(instruction({}))[-1] for story in stories]
    cuts = [story.index(" ", len(story) // 3) for story in stories]
    begins, ends = [s[:cut] for s, cut in zip(stories, cuts)], [s[cut:].strip() for s, cut in zip(stories, cuts)]
    mixed = [" ".join(random.Random(1).sample(end.split(), len(end.split()))) for end in ends]
    return {"true endings": list(zip(begins, ends)), "endings of others": list(zip(begins, ends[1:] + ends[:1])),
            "shuffled endings": list(zip(begins, mixed))}


def sections(subject, wanted, probes, prompts, device, args):
    """Yield (title, figures) of every section that is wanted, and that this model can be asked for."""
    probes = [{**probe, "prompt": subject.before + probe["prompt"]} for probe in probes]
    for name in subject.datasets:
        if "loss" in wanted:
            with torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
                figures = loss(subject, name)
            yield f"loss on {name}" + (f" in {args.dtype}" if args.dtype != "float32" else ""), figures
    sets = {"probes": probes} if "probes" in wanted else {}
    if "spans" in wanted:
        sets.update({f"spans of {name}": read_spans(name, args.spans, by="kind") for name in subject.datasets})
    if any(sets.values()):
        counts = count_phrases({c for some in sets.values() for p in some for c in p["right"] + p["wrong"]},
                               subject.datasets[0])
        for title, some in sets.items():
            if some:
                yield title, grade_probes(subject, some, counts)
    if {"completions", "judge"} & set(wanted):
        told = complete(subject, [subject.before + prompt for prompt in prompts], args.max_tokens, args.each)
    if "completions" in wanted:
        yield "completions", completions(subject, told, args)
    for name in subject.datasets:
        if "memorisation" in wanted:
            yield f"memorisation of {name}", memorisation(subject, name, args)
        if "instructions" in wanted and load_meta(name)["instruct"]:
            yield f"instructions of {name}", instructions(subject, name, args)
    if "steps" in wanted and subject.kept:
        yield "steps", steps(subject, probes, device)
    if "judge" in wanted:
        from judge import judge  # with the client of its server, which takes a second
        told = [[(prompt, subject.encoding.decode(ids).strip()) for ids in some]
                for prompt, some in zip(prompts, told)]
        yield "judge", judge(told, controls(subject.datasets[0]), subject.path("judge.jsonl"), args)


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of runs, such as out/a; the newest if none is named")
    parser.option("only", "", "sections, of " + ",".join(SECTIONS) + ", or none: show again what eval.json holds "
                  "(default: all; judge where --judge names one)")
    parser.option("dataset", "", "grade on this dataset's stories instead of the run's own")
    parser.add_argument("--stories", nargs="+", default=[], metavar="FILE", help="describe files of stories instead")
    parser.option("probes", os.path.join(HERE, "data", "probes.json"), "right and wrong continuations")
    parser.option("prompts", os.path.join(HERE, "data", "prompts.json"), "beginnings of stories")
    parser.option("each", 10, "completions of each of those")
    parser.option("max_tokens", 200, "longest completion")
    parser.option("spans", 100, "marked words of each kind, where the dataset's stories have such")
    parser.option("judge", "", "model that gives marks; the key is in OPENAI_API_KEY")
    parser.option("base_url", "", "its server, where OPENAI_BASE_URL does not say it, e.g. http://localhost:8000/v1")
    parser.option("price_in", 0.0, "dollars per million tokens of questions to it")
    parser.option("price_out", 0.0, "dollars per million tokens of its replies")
    parser.option("max_cost", math.inf, "stop before this command has cost more dollars")
    parser.option("concurrency", 16, "questions under way at a time")
    parser.option("tokenizer", "", "of hf: models that come without one: the name of another")
    parser.option("context", 0, "tokens that a run sees at once (0: as in training); writes context<n>.eval.json")
    parser.option("seeds", False, "show runs that differ in their seed alone as one: mean, lowest and highest")
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    parser.option("dtype", "float32", "of the loss: float32, or bfloat16: faster for large models, and nearly the same",
                  choices=("float32", "bfloat16"))
    args = parser.parse_args(argv)
    if args.stories:
        return compare_stories(args.stories)
    wanted = args.only.split(",") if args.only else [s for s in SECTIONS if s != "judge" or args.judge]
    wanted = [] if wanted == ["none"] else wanted
    if not set(wanted) <= set(SECTIONS):
        sys.exit(f"--only={args.only} names other sections than {','.join(SECTIONS)}")
    if "judge" in wanted and not args.judge:
        sys.exit("who shall judge? --judge=gpt-4o-mini for one")
    if args.judge and "judge" not in wanted:
        sys.exit("--only leaves the judge out: add judge to it, or drop --judge")
    if args.max_cost < math.inf and not args.price_in + args.price_out:
        sys.exit("--max_cost needs the prices: --price_in and --price_out, in dollars per million tokens")
    if min(args.each, args.max_tokens, args.concurrency, args.spans) < 1 or args.context < 0 or args.context == 1:
        sys.exit("--each, --max_tokens, --concurrency and --spans must be at least 1, and --context 2")
    probes = read_list("probes", args.probes, lambda item: {"skill", "kind", "prompt", "right", "wrong"} <= set(item))
    prompts = read_list("prompts", args.prompts, lambda item: isinstance(item, str))
    device, _ = pick_device(args.device, args.dtype)
    results, folders, settings, args.spent = {}, {}, {}, 0.0  # dollars, by the judge
    for name in args.runs or [find_run()]:
        subject = load(name, device, args)
        path, result = subject.path("eval.json"), {}
        if os.path.exists(path) and os.path.getmtime(path) > subject.time:  # else it tells of an older checkpoint
            with open(path) as f:
                result = json.load(f)
        result["model"] = subject.about
        for title, figures in sections(subject, wanted, probes, prompts, device, args):
            result[title] = figures
            write_whole(path, json.dumps(result, indent=1))
        results[name], folders[name], settings[name] = result, subject.folder, subject.settings
    brackets = "95 % intervals, bootstrapped over stories, probes or prompts"
    if args.seeds:
        results, brackets = over_seeds(results, settings), "the lowest and the highest over seeds"
    print_table(table(results))
    if len(results) > 1:
        os.makedirs("out", exist_ok=True)
        write_whole(os.path.join("out", "compare.html"), compare(results, folders, brackets))
        print("charts: out/compare.html")


if __name__ == "__main__":
    start(main)

"""Look inside a run: what each attention head and each neuron does, measured on validation stories.

    python -m lab.interpret                the newest run: interpret.html and interpret.json in its folder
    python -m lab.interpret out/a out/b    several runs, one after the other; lab.compare shows them side by side

Layers, heads and neurons are counted from 0, as in the code: layer 3 is model.blocks[3]. The model is observed and
ablated from outside, by hooks on its modules, so this also works on a changed model.py. Where it does not, it says so.
"""
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import model as architecture
from common import CommandLine, atomic_write, load_checkpoint, newest_run, pick_device, run_main
from eval import HERE, add_section, evaluate, load_subject, passes, read_spans, split_stories
from lab.interpret_page import run_page
from lab.world import LISTS, VOCABULARY, forms_of
from prepare import SKILLS, load_meta, load_tokens

NEAREST = 64  # explained are the attention logits of each query for this many of its nearest keys
MIN_EXPLAINED = 0.2  # a head's type, distance or words, explains at least this share of their variance,
MIN_RATIO = 2  # and at least this many times as much as the other one does
TOP = 20  # a neuron is described by the kinds of the TOP different tokens that activate it most
EXCERPTS = 5  # number of excerpts shown for a neuron
ABLATION_STORIES = 40  # number of stories on which the loss is measured with each head ablated

# -----------------------------------------------------------------------------------------------------------------
# stories as words: what kind of word each token belongs to, and who the main character is

KINDS = ("punctuation", "function", "noun", "verb", "adjective", "name", "other")
NOUN = KINDS.index("noun")
FIRST, LATER, CAPITAL = 1, 2, 3  # first and later mentions of the main character; other capitalized words
WORD = r"[^\W\d_]+"
FUNCTION_WORDS = """a an the this that these those my your his her its our their some any no every each all both another
    i you he she it we they me him them us who what which whose something everyone and or but so because if when while
    then than as until after before where how why to of in on at by for with from into out up down off over under about
    around through away near behind inside outside be am is are was were been being do does did done have has had will
    would can could should may might must not very too just also only again there now other more one upon s t m d ll re
    ve don didn doesn couldn wouldn wasn weren isn""".split()
MORE_NOUNS = "bird birds animal animals room rooms mommy daddy mama papa mr mrs".split()
NOT_NAMES = {word.capitalize() for word in LISTS["family"] + LISTS["days"] + MORE_NOUNS}


@dataclass
class Stories:
    """N stories as tensors (N, T), the shortest first, padded with <|endoftext|>."""
    ids: torch.Tensor  # token ids; the first is <|endoftext|>
    kind: torch.Tensor  # index into KINDS, of the word that the token's last character belongs to; -1 where not real
    role: torch.Tensor  # FIRST, LATER or CAPITAL, of the same word; else 0
    place: torch.Tensor  # number of the token among all N * T
    texts: list  # [N][T] text of each token

    @property
    def real(self):
        """(N, T) bool: False for padding and for the <|endoftext|> before each story."""
        return self.kind >= 0


def word_kinds():
    """{word: kind} of function words and of all forms of the words in data/words.json. A form that has several kinds
    is a verb if it ends in -ing or is a past form, else the first of adjective, noun ("a walk") and verb."""
    kinds = {**dict.fromkeys(MORE_NOUNS, "noun"), **dict.fromkeys(FUNCTION_WORDS, "function")}
    for kind, forms in (("verb", ("ing", "past")), ("adjective", ("",)), ("noun", ("", "s")), ("verb", ("", "s"))):
        for word in sorted(VOCABULARY[kind + "s"]):
            for form in forms:
                kinds.setdefault(forms_of(word)[form], kind)
    return kinds


def capitalized_words(text):
    """{word: count} of the capitalized words within sentences, in the order of the text."""
    return Counter(re.findall(r"(?<=[\w,] )[A-Z][^\W\d_]+", text))


def find_names(texts):
    """The words that are capitalized within sentences, and hardly ever written in lower case."""
    capitalized = sum(map(capitalized_words, texts), Counter())
    lower = Counter(word for word in re.findall(WORD, "\n".join(texts)) if word.islower())
    return {word for word, n in capitalized.items() if lower[word.lower()] < n / 10} - NOT_NAMES


def label_characters(text, names, dictionary):
    """(kinds, roles) of the words that the characters of a text belong to; entry 0 stands before the first character.

    The main character is the name that occurs most often within the sentences of this story."""
    counts = capitalized_words(text)
    main_character = max((word for word in counts if word in names), key=counts.get, default=None)
    kinds, roles = np.zeros((2, 1 + len(text)), int)  # outside words: punctuation, no role
    for match in re.finditer(WORD, text):
        word, span = match[0], slice(match.start() + 1, match.end() + 1)
        kind = "verb" if re.search(r"\w\w(ed|ing)$", word.lower()) else "other"
        kind = "name" if word in names else dictionary.get(word.lower(), kind)
        kinds[span] = KINDS.index(kind)
        if word == main_character:
            roles[span] = LATER if FIRST in roles else FIRST
        elif word[0].isupper():
            roles[span] = CAPITAL
    return kinds, roles


def read_stories(token_lists, encoding, block_size, device="cpu"):
    """Stories from lists of token ids that begin with <|endoftext|>, each cut to block_size tokens."""
    token_lists = sorted(token_lists, key=lambda ids: min(len(ids), block_size))
    decoded = []  # (text, offsets): token i is text[offsets[i - 1]:offsets[i]]
    for ids in token_lists:
        text, offsets = encoding.decode_with_offsets(ids[1:])  # of all tokens, since a cut may split a character
        offsets = [*offsets, len(text)][:block_size]
        decoded.append((text[:offsets[-1]], offsets))
    names, dictionary = find_names([text for text, _ in decoded]), word_kinds()
    kinds, roles, texts = [], [], []
    for text, offsets in decoded:
        kind, role = label_characters(text, names, dictionary)
        kinds.append([-1, *kind[offsets[1:]]])
        roles.append([0, *role[offsets[1:]]])
        texts.append([""] + [text[begin:end] for begin, end in zip(offsets, offsets[1:])])

    def pad(rows, value):
        rows = [torch.tensor(row, device=device) for row in rows]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    ids = pad([ids[:block_size] for ids in token_lists], encoding.eot_token)
    return Stories(ids, pad(kinds, -1), pad(roles, 0), torch.arange(ids.numel(), device=device).view_as(ids), texts)


def batches(stories, title, batch_tokens=2048):
    """Batches of stories of similar length, under a progress bar. Each has an even number of stories, so that the two
    halves into which GroupMeans splits them are alike."""
    lengths = (stories.real.sum(1) + 1).tolist()
    slices, begin = [], 0
    while begin < len(lengths):
        end = min(len(lengths), begin + max(2, batch_tokens // lengths[begin] // 2 * 2))
        slices.append(slice(begin, end))
        begin = end
    for rows in tqdm(slices, desc=title, leave=False, disable=None):
        tensors = (stories.ids, stories.kind, stories.role, stories.place)
        yield Stories(*(x[rows, :lengths[rows.stop - 1]] for x in tensors), stories.texts[rows])


# -----------------------------------------------------------------------------------------------------------------
# observing and ablating a model from outside


@contextmanager
def hook_inputs(modules, function):
    """Until the end of the `with` block, call function(x) on the input x of each of these modules. What it returns, if
    anything, replaces the input."""
    hooks = [module.register_forward_pre_hook(lambda _, args: function(args[0])) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def capture_inputs(modules):
    """A list to which each call of one of these modules adds its input."""
    inputs = []
    with hook_inputs(modules, inputs.append):
        yield inputs


@contextmanager
def capture_attention(model):
    """A list to which one forward pass adds the attention logits of each layer, (B, H, T, T), -inf for later keys.

    They are computed from the q, k and mask that model.py hands to its attend(). If their softmax does not give what
    attend() returns, model.py has changed and all figures would be wrong: then the program ends."""
    captured, attend = [], getattr(architecture, "attend", None)

    def attend_and_capture(q, k, v, mask):
        logits = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = (logits if mask is None else logits + mask).masked_fill(future, -math.inf)
        captured.append(logits)
        y = attend(q, k, v, mask)
        if not (logits.softmax(-1) @ v - y).norm() <= 1e-3 * y.norm():
            sys.exit("model.attend() is no longer softmax(q k^T / sqrt(D) + mask) v: "
                     "make the same change in capture_attention() of lab/interpret.py")
        return y
    architecture.attend = attend_and_capture
    try:
        yield captured
    finally:
        architecture.attend = attend
    if len(captured) != len(model.blocks):
        sys.exit(f"the {len(model.blocks)} layers of this model.py called attend() {len(captured)} times, and "
                 "lab/interpret.py sees attention only there: let each layer call it once")


def ablate(projection, columns=slice(None), where=None):
    """Zero these columns of a projection's input: a head's columns of attn.proj, or a neuron's column of mlp.proj.
    With a mask `where` (B, T), only there; without, this equals zeroing the same columns of its weights."""
    def zero(x):
        x = x.clone()
        x[..., columns] = 0 if where is None else x[..., columns].masked_fill(where[..., None], 0)
        return x
    return hook_inputs([projection], zero)


def ablate_each(model, measure):
    """[{layer, head, **measure()}] with each layer (attention and MLP; its head is None) and each head ablated in turn.
    The first is the intact model, whose layer and head are None."""
    records = [{"layer": None, "head": None, **measure()}]
    for layer, block in enumerate(tqdm(model.blocks, desc="ablating", leave=False, disable=None)):
        with ablate(block.attn.proj), ablate(block.mlp.proj):
            records.append({"layer": layer, "head": None, **measure()})
        size = block.attn.proj.in_features // model.config.n_head
        for head in range(model.config.n_head):
            with ablate(block.attn.proj, slice(head * size, (head + 1) * size)):
                records.append({"layer": layer, "head": head, **measure()})
    return records


def untrained(model, seed):
    """A control: the same architecture with random weights. Weights that training starts at zero are drawn too:
    with them at zero, no layer would do anything."""
    torch.manual_seed(seed)
    control = architecture.GPT(model.config)
    for p in control.parameters():
        if not p.any():
            nn.init.normal_(p, std=p.size(-1) ** -0.5)
    return control.to(model.head.weight.device).eval()


# -----------------------------------------------------------------------------------------------------------------
# heads

HEAD_FIGURES = {  # what they mean; attention is taken without <|endoftext|>, scaled to sum to 1 over the other keys
    "type": f"distance or words, if that explains at least {MIN_EXPLAINED} of the variance and at least {MIN_RATIO} "
            "times as much as the other; else mixed",
    "distance": f"share of the variance of a query's attention logits, over its {NEAREST} nearest keys at most, that "
                "the distance of the key explains (R²)",
    "words": "share of the same variance that the token of the key and the query's kind of word explain (R²)",
    "loss rise": "how much ablating the head raises the loss, in nats per token",
    "decay": "how much the mean attention logit falls per token of distance, beyond its peak",
    "peak": "distance at which the mean attention logit is highest",
    "previous token": "attention to the token before",
    "main character / share": "attention to the main character's name, over its share of the text so far: 1 is chance",
    "nouns / share": "the same for nouns",
    "own noun / share": "the same at a, an and the, for earlier mentions of the noun that comes next",
    "same token / share": "the same for earlier occurrences of the token",
    "induction / share": "the same for the tokens that followed these occurrences"}


class GroupMeans:
    """How much of the variance of attention logits is explained, for each head, by the group that a query and a key
    belong to: the R² of predicting each logit by its group's mean over the other half of the stories. With means over
    the same half, many small groups would explain a lot by chance."""

    def __init__(self, n_groups, config, device):
        self.sums = torch.zeros(config.n_layer, 2, n_groups, config.n_head, device=device)
        self.counts = torch.zeros(config.n_layer, 2, n_groups, 1, device=device)
        self.squares = torch.zeros(config.n_layer, config.n_head, device=device)

    def add(self, layer, half, group, logits):
        """Add a layer's logits (N, K, H) of N queries and K keys, by half of the stories (N,) and group (N, K)."""
        index = (half[:, None] * self.sums.size(2) + group).flatten()
        logits = logits.flatten(0, 1)  # (N * K, H)
        self.sums[layer].flatten(0, 1).index_add_(0, index, logits)
        self.counts[layer].flatten(0, 1).index_add_(0, index, torch.ones_like(logits[:, :1]))
        self.squares[layer] += logits.square().sum(0)

    def explained(self):
        """R² (L, H)."""
        means = self.sums.flip(1) / self.counts.flip(1).clamp(min=1)
        # over a group of n logits x, x^2 - (x - mean)^2 sums to 2 mean sum(x) - n mean^2
        return (2 * means * self.sums - self.counts * means**2).sum((1, 2)) / self.squares


def find_own_noun(batch, same, articles):
    """(B, T, T) bool: query i is an article, key j the noun that follows it after at most two other words.

    same (B, T, T): whether two tokens are equal; articles: the ids of a, an and the."""
    noun = batch.kind == NOUN
    waiting = torch.isin(batch.ids, articles)  # articles whose noun has not come yet
    pairs = torch.zeros_like(same)
    for step in (1, 2, 3):
        followed = waiting & F.pad(noun[:, step:], (0, step))
        pairs |= followed[:, :, None] & F.pad(same[:, step:], (0, 0, 0, step))
        waiting = waiting & ~followed
    return pairs


def find_targets(batch, articles):
    """{target: (B, T, T) bool}: whether key j, which is before query i and not <|endoftext|>, is such a target."""
    same = batch.ids[:, :, None] == batch.ids[:, None, :]
    main_character = (batch.role == FIRST) | (batch.role == LATER)
    targets = {"main character": main_character[:, None], "nouns": (batch.kind == NOUN)[:, None],
               "own noun": find_own_noun(batch, same, articles), "same token": same,
               "induction": F.pad(same[:, :, :-1], (1, 0)), "previous token": torch.ones_like(same).triu(-1)}
    earlier = torch.ones_like(same).tril(-1) & batch.real[:, :, None] & batch.real[:, None, :]
    return {name: target & earlier for name, target in targets.items()}


def add_logits(layers, batch, by_distance, by_words):
    """Add the attention logits of each layer (B, H, T, T) to two GroupMeans: by the distance of the key, and by its
    token together with the query's kind of word. Every query that is counted has all distances."""
    nearest, device = by_distance.sums.size(2), batch.ids.device
    queries, distance = torch.arange(nearest, batch.ids.size(1), device=device), torch.arange(nearest, device=device)
    keys = queries[:, None] - distance  # (Q, nearest); <|endoftext|> is not among them
    real = batch.real[:, nearest:]  # (B, Q)
    words = (batch.ids[:, keys] * len(KINDS) + batch.kind[:, nearest:, None])[real]  # (N, nearest)
    half = (torch.arange(len(real), device=device) % 2)[:, None].expand_as(real)[real]  # (N,)
    for layer, logits in enumerate(layers):
        logits = logits[:, :, queries[:, None], keys].permute(0, 2, 3, 1)[real]  # (N, nearest, H)
        logits = logits - logits.mean(1, keepdim=True)  # softmax ignores what all keys of a query have in common
        by_distance.add(layer, half, distance.expand_as(words), logits)
        by_words.add(layer, half, words, logits)


@torch.inference_mode()
def study_heads(model, stories, articles, title="heads"):
    """[{figure: value}] of every head, layer by layer; HEAD_FIGURES says what the figures mean."""
    config, device = model.config, stories.ids.device
    nearest = min(NEAREST, config.block_size // 2)
    by_distance = GroupMeans(nearest, config, device)
    by_words = GroupMeans(config.vocab_size * len(KINDS), config, device)
    attention = defaultdict(lambda: torch.zeros(config.n_layer, config.n_head, device=device))
    # for each target: how many queries have one, and the sum over them of its share of the text so far
    queries, shares = Counter(), Counter()
    for batch in batches(stories, title):
        T = batch.ids.size(1)
        if T <= nearest:
            continue
        with capture_attention(model) as layers:
            model(batch.ids)
        add_logits(layers, batch, by_distance, by_words)
        targets = find_targets(batch, articles)
        for layer, logits in enumerate(layers):
            p = logits.softmax(-1)  # (B, H, T, T)
            p[..., 0] = 0
            p = p / p.sum(-1, keepdim=True).clamp(min=1e-9)
            for name, target in targets.items():
                attention[name][layer] += torch.einsum("bhij,bij->h", p, target.float())
        for name, target in targets.items():
            queries[name] += target.any(-1).sum().item()
            shares[name] += (target.sum(-1) / torch.arange(T, device=device).clamp(min=1)).sum().item()
    figures = {"distance": by_distance.explained(), "words": by_words.explained()}
    for name, total in attention.items():
        figures[name] = total / max(1, queries[name])
        figures[f"{name} / share"] = total / max(1e-9, shares[name])
    return list_heads(figures, by_distance.sums.sum(1) / by_distance.counts.sum(1))


def list_heads(figures, profiles):
    """[{figure: value}] from {figure: (L, H)} and the mean attention logits by distance, (L, nearest, H)."""
    heads, profiles = [], profiles.cpu().numpy()
    n_layer, nearest, n_head = profiles.shape
    for layer, head in np.ndindex(n_layer, n_head):
        record = {"layer": layer, "head": head}
        record |= {name: figure[layer, head].item() for name, figure in figures.items()}
        profile = profiles[layer, :, head]
        peak = min(int(profile.argmax()), nearest - 2)  # a line needs two points
        slope = np.polyfit(np.arange(peak, nearest), profile[peak:], 1)[0]
        heads.append({**record, "peak": peak, "decay": float(-slope), "type": head_type(record)})
    return heads


def head_type(head):
    for name, other in (("distance", "words"), ("words", "distance")):
        if head[name] >= max(MIN_EXPLAINED, MIN_RATIO * head[other]):
            return name
    return "mixed"


MAPS = {"distance": "most explained by distance", "words": "most explained by words",
        "loss rise": "costs most when ablated", "own noun / share": "articles look at their noun",
        "main character / share": "looks at the main character"}


@torch.inference_mode()
def attention_maps(model, stories, heads, T=40):
    """[{layer, head, why, words, attention}] of the head with the highest value of each figure in MAPS, on the first
    tokens of the story that names its main character most: words (T), attention (T, T), a row for each query."""
    mentions = ((stories.role == FIRST) | (stories.role == LATER))[:, :T].sum(1)
    row = int((mentions * stories.real[:, 1:T].all(1)).argmax())
    words = [text.strip(" ").replace("\n", "¶")[:10] for text in ["start", *stories.texts[row][1:T]]]
    with capture_attention(model) as layers:
        model(stories.ids[row:row + 1, :len(words)])
    reasons = defaultdict(list)
    for figure, why in MAPS.items():
        best = max(heads, key=lambda head: head[figure])
        reasons[best["layer"], best["head"]].append(why)
    maps = []
    for (layer, head), why in reasons.items():
        attention = layers[layer][0, head].softmax(-1).double().round(decimals=3).tolist()
        maps.append({"layer": layer, "head": head, "why": ", ".join(why), "words": words, "attention": attention})
    return maps


# -----------------------------------------------------------------------------------------------------------------
# neurons


def most_common(x):
    """(share (M,), value (M,)) of the most common value in each column of x (K, M)."""
    count, row = (x[:, None] == x).sum(1).max(0)
    return count / len(x), x.gather(0, row[None])[0]


def auroc(hits, others):
    """Area under the ROC curve (M,): how often a row of hits (P, M) exceeds one of others (N, M); ties count half."""
    hits, others = hits.T.contiguous(), others.T.contiguous().sort(1).values
    below, below_or_equal = torch.searchsorted(others, hits), torch.searchsorted(others, hits, right=True)
    return (below + below_or_equal).float().mean(1) / 2 / others.size(1)


class Activations:
    """What is kept of the activations of M neurons, those of all layers side by side."""

    def __init__(self, n_neurons, vocab_size, device):
        self.top = torch.zeros(EXCERPTS, n_neurons, device=device)  # the highest of all
        self.places = torch.zeros(EXCERPTS, n_neurons, dtype=torch.int64, device=device)  # where these are
        self.by_token = torch.zeros(vocab_size, n_neurons, device=device)  # the highest on each token
        self.capitalized = []  # (P, M) of each batch: all at its capitalized words

    def add(self, hidden, batch):
        """Add the activations (N, M) at the N real tokens of a batch."""
        ids, place = (x[batch.real][:, None].expand_as(hidden) for x in (batch.ids, batch.place))
        self.by_token.scatter_reduce_(0, ids, hidden, "amax")
        self.top, rows = torch.cat((self.top, hidden)).topk(EXCERPTS, dim=0)
        self.places = torch.cat((self.places, place)).gather(0, rows)
        self.capitalized.append(hidden[batch.role[batch.real] > 0])


@torch.inference_mode()
def study_neurons(model, stories, shuffle=False, title="neurons"):
    """What describe_neurons and rank_main_character give for all neurons of a model, layer by layer. With `shuffle`, a
    control: the activations are assigned to random places."""
    device, projections = stories.ids.device, [block.mlp.proj for block in model.blocks]
    index = [(layer, neuron) for layer, proj in enumerate(projections) for neuron in range(proj.in_features)]
    activations = Activations(len(index), model.config.vocab_size, device)
    for batch in batches(stories, title):
        with capture_inputs(projections) as inputs:
            model(batch.ids)
        layers = [x[batch.real] for x in inputs]
        if shuffle:
            layers = [x[torch.randperm(len(x), device=device)] for x in layers]
        activations.add(torch.cat(layers, dim=1), batch)
    neurons = describe_neurons(activations, stories, index)
    return neurons, rank_main_character(torch.cat(activations.capitalized), stories, index)


def describe_neurons(activations, stories, index):
    """[{layer, neuron, kinds, kind, share, idle, highest, places}]: the kinds of the TOP different tokens that activate
    a neuron most, the most common kind among them and its share; whether fewer tokens activate it at all; its highest
    activation, and where the highest are."""
    best, tokens = activations.by_token.topk(TOP, dim=0)  # (TOP, M)
    counts = torch.zeros(len(activations.by_token), len(KINDS), device=tokens.device)
    one = torch.tensor(1.0, device=tokens.device)
    counts.index_put_((stories.ids[stories.real], stories.kind[stories.real]), one, accumulate=True)
    kinds = counts.argmax(1)[tokens]  # (TOP, M): the kind of word that each token belongs to most often
    share, kind = most_common(kinds)
    return make_records(index, {"kinds": kinds.T, "kind": kind, "share": share, "idle": best[-1] <= 0,
                                "highest": activations.top[0], "places": activations.places.T})


def make_records(index, columns):
    """[{layer, neuron, name: value}] of M neurons from {name: tensor of M rows}."""
    rows = zip(*(column.tolist() for column in columns.values()))
    return [{"layer": layer, "neuron": neuron, **dict(zip(columns, row))} for (layer, neuron), row in zip(index, rows)]


def rank_main_character(hidden, stories, index):
    """[{layer, neuron, chosen by, later, capital}], the best first: the AUROC with which a neuron's activation tells
    the first mention of the main character from later ones, and from other capitalized words.

    hidden (P, M): activations at all capitalized words. Neurons are ranked by one half of the stories, "chosen by", and
    measured on the other: the best of thousands owe part of their rank to luck."""
    capitalized = stories.role > 0
    roles, half = stories.role[capitalized], stories.place[capitalized] // stories.ids.size(1) % 2  # (P,)
    groups = [(half == i) & (roles == role) for i in (0, 1) for role in (FIRST, LATER, CAPITAL)]
    if not all(group.any() for group in groups):
        return []
    first, later, capital, test_first, test_later, test_capital = (hidden[group] for group in groups)
    records = make_records(index, {"chosen by": torch.minimum(auroc(first, later), auroc(first, capital)),
                                   "later": auroc(test_first, test_later), "capital": auroc(test_first, test_capital)})
    return sorted(records, key=lambda record: -record["chosen by"])


def mean_share(neurons):
    return float(np.mean([neuron["share"] for neuron in neurons if not neuron["idle"]]))


def list_neurons(neurons, shuffled, stories):
    """[{figure: value}] of the neurons that are not idle, the most selective first: by the `excess` of the share of
    their most common kind over the share of this kind among shuffled neurons. Excerpts are [before, token, after]."""
    usual = Counter()
    for neuron in shuffled:
        usual.update([] if neuron["idle"] else neuron["kinds"])
    records, T = [], stories.ids.size(1)
    for neuron in neurons:
        if neuron["idle"]:
            continue
        excerpts = []
        for place in neuron["places"]:
            texts, at = stories.texts[place // T], place % T
            excerpts.append(["".join(texts[max(0, at - 7):at]), texts[at], "".join(texts[at + 1:at + 4])])
        excess = neuron["share"] - usual[neuron["kind"]] / max(1, usual.total())
        records.append({"layer": neuron["layer"], "neuron": neuron["neuron"], "kind": KINDS[neuron["kind"]],
                        "share": round(neuron["share"], 2), "excess": round(excess, 3),
                        "highest": round(neuron["highest"], 3), "excerpts": excerpts})
    return sorted(records, key=lambda record: -record["excess"])


@torch.inference_mode()
def loss_without_neurons(model, stories, groups):
    """{name: [rise of the loss at later mentions of the main character, elsewhere, at later mentions if ablated at the
    first mention alone]}, in nats per token, with each group of neurons, {name: [(layer, neuron)]}, ablated."""
    def loss(batch, neurons, where=None):  # (B, T - 1)
        with ExitStack() as ablations:
            for layer, neuron in neurons:
                ablations.enter_context(ablate(model.blocks[layer].mlp.proj, [neuron], where))
            return model(batch.ids[:, :-1], batch.ids[:, 1:])
    rises, counts = {name: torch.zeros(3) for name in groups}, torch.zeros(3)
    for batch in batches(stories, "ablating neurons"):
        first, later = batch.role[:, :-1] == FIRST, batch.role[:, 1:] == LATER
        elsewhere = batch.real[:, 1:] & ~later
        counts += torch.tensor([later.sum(), elsewhere.sum(), later.sum()])
        intact = loss(batch, [])
        for name, neurons in groups.items():
            everywhere, at_first = loss(batch, neurons) - intact, loss(batch, neurons, first) - intact
            rises[name] += torch.tensor([everywhere[later].sum(), everywhere[elsewhere].sum(), at_first[later].sum()])
    return {name: (rise / counts.clamp(min=1)).tolist() for name, rise in rises.items()}


# -----------------------------------------------------------------------------------------------------------------
# skills: which head or layer they need, and after which layer the answer is there


def skill_probes(dataset):
    """(source, probes with one right and one wrong word, exclusions): from a dataset's marked words, if it has any."""
    probes, by_kind = read_spans(dataset, 40), read_spans(dataset, 60, by="kind")
    source = "marked words of validation stories"
    if not probes:
        source = "data/probes.json, since these stories have no marked words"
        with open(os.path.join(HERE, "data", "probes.json"), encoding="utf-8") as file:
            by_kind = json.load(file)
        for skill in SKILLS:
            first = [probe for probe in by_kind if probe["skill"] == skill][:40]
            probes += [{**probe, "right": probe["right"][:1], "wrong": probe["wrong"][:1]} for probe in first]
    return source, probes, [probe for probe in by_kind if probe["kind"] == "exclusion"]


def study_ablations(model, encoding, dataset, n_stories, probes):
    """What ablate_each gives if it measures the loss, in nats per token, and the share of each skill's probes that the
    model passes."""
    skills = np.array([probe["skill"] for probe in probes])

    def measure():
        passed = passes(model, encoding, probes, "skills")
        shares = {skill: float(passed[skills == skill].mean()) for skill in SKILLS if skill in skills}
        return {"loss": evaluate(model, dataset, n_stories)["val_loss"], **shares}
    return ablate_each(model, measure)


@torch.inference_mode()
def logit_lens(model, encoding, probes):
    """[{text, right, wrong, lead}]: by how many nats the right word leads the wrong one, at the first token in which
    they differ, if the model's last norm and head read the state before each layer and after the last (logit lens,
    nostalgebraist 2020). If these two do not give the model's own logits, model.py has changed: then []."""
    norm = getattr(architecture, "norm", torch.zeros_like)  # a model.py without norm() does not pass the check below
    results = []
    for probe in probes:
        right = [encoding.eot_token, *encoding.encode_ordinary(probe["prompt"] + probe["right"][0])]
        wrong = [encoding.eot_token, *encoding.encode_ordinary(probe["prompt"] + probe["wrong"][0])]
        different = [i for i, (a, b) in enumerate(zip(right, wrong)) if a != b]
        if not different:  # one word begins with the other
            continue
        i = different[0]
        idx = torch.tensor([right[:i][-model.config.block_size:]], device=model.head.weight.device)
        with capture_inputs([*model.blocks, model.head]) as states:
            logits = model(idx)[0, -1]  # (V,)
        states = torch.stack([x[0, -1] for x in states])  # (L + 1, C); the last is normed, so norm() does not change it
        lens = model.head(norm(states))  # (L + 1, V)
        if not torch.allclose(lens[-1], logits, rtol=1e-3, atol=1e-3):
            print("no logit lens: this model.py does not compute its logits as head(norm(x)), so logit_lens() in "
                  "lab/interpret.py has to be adapted", file=sys.stderr)
            return []
        results.append({"text": probe["prompt"], "right": probe["right"][0], "wrong": probe["wrong"][0],
                        "lead": (lens[:, right[i]] - lens[:, wrong[i]]).tolist()})
    return results


# -----------------------------------------------------------------------------------------------------------------
# one run


def find_articles(encoding):
    """The ids of a, an and the, in any case and with or without a space."""
    words = [encoding.decode_single_token_bytes(i).strip().lower() for i in range(encoding.eot_token)]
    return torch.tensor([i for i, word in enumerate(words) if word in (b"a", b"an", b"the")], dtype=torch.int64)


def compare_neurons(model, control, stories):
    """The figures of a model's neurons, beside two controls: shuffled activations, and the untrained model."""
    trained, main_character = study_neurons(model, stories)
    shuffled, _ = study_neurons(model, stories, shuffle=True, title="shuffled neurons")
    random, random_main_character = study_neurons(control, stories, title="untrained neurons")
    best = [(record["layer"], record["neuron"]) for record in main_character[:10]]
    drawn = [(layer, int(torch.randint(model.blocks[layer].mlp.proj.in_features, ()))) for layer, _ in best]
    groups = {"the best": best[:1], "the ten best": best, "ten random ones of the same layers": drawn}
    shares = {"trained": mean_share(trained), "shuffled": mean_share(shuffled), "untrained": mean_share(random)}
    return {"shares": shares, "neurons": list_neurons(trained, shuffled, stories), "top": TOP, "kinds": KINDS,
            "main character": main_character[:20], "untrained main character": random_main_character[:1],
            "main character ablated": loss_without_neurons(model, stories, groups)}


def study(name, args, device):
    """(subject, what interpret.json holds and the page shows) of a run."""
    checkpoint = load_checkpoint(name)
    subject = load_subject(name, device, args.dataset)
    model, encoding, dataset = subject.model, subject.encoding, subject.datasets[0]
    if load_meta(dataset)["tokenizer"]["sha256"] != subject.tokenizer:
        sys.exit(f"{name} was trained with another tokenizer than data/{dataset} has: "
                 f"python prepare.py --dataset={dataset} --tokenizer={checkpoint['datasets'][0]}")
    token_lists = split_stories(np.asarray(load_tokens(dataset, "val")), encoding.eot_token)[:args.stories]
    token_lists = [[encoding.eot_token, *tokens.tolist()] for tokens in token_lists]
    stories = read_stories(token_lists, encoding, model.config.block_size, device)
    if stories.ids.size(1) <= min(NEAREST, model.config.block_size // 2):
        sys.exit(f"the first {args.stories} validation stories of {dataset} have at most {stories.ids.size(1)} tokens, "
                 "too few to see heads at work: name another dataset with --dataset")
    control = untrained(model, checkpoint["args"]["seed"] if args.seed is None else args.seed)
    source, probes, exclusions = skill_probes(dataset)
    articles = find_articles(encoding).to(device)
    heads = study_heads(model, stories, articles)
    ablations = study_ablations(model, encoding, dataset, min(ABLATION_STORIES, len(stories.ids)), probes)
    losses = {(record["layer"], record["head"]): record["loss"] for record in ablations}
    for head in heads:
        head["loss rise"] = losses[head["layer"], head["head"]] - losses[None, None]
    return subject, {
        "run": name, "dataset": dataset, "stories": len(stories.ids), "config": vars(model.config),
        "parameters": model.num_params(), "heads": heads, "head figures": HEAD_FIGURES,
        "untrained heads": study_heads(control, stories, articles, "untrained heads"),
        "maps": attention_maps(model, stories, heads), **compare_neurons(model, control, stories),
        "loss": losses[None, None], "ablations": ablations, "probes": source,
        "logit lens": logit_lens(model, encoding, exclusions)}


def summarize(results):
    """The sections "heads" and "neurons" of eval.json."""
    heads, shares = results["heads"], results["shares"]
    types = Counter(head["type"] for head in heads)
    untrained_types = Counter(head["type"] for head in results["untrained heads"])
    measured = {"measured with": f"{results['stories']} stories of {results['dataset']}"}
    heads_section = {**measured, "heads by distance": types["distance"] / len(heads),
                     "heads by words": types["words"] / len(heads), "heads mixed": types["mixed"] / len(heads),
                     "heads mixed, untrained": untrained_types["mixed"] / len(heads)}
    if len(heads) > 2:  # of two heads it would always be 1 or -1
        explained = [[head[name] for head in heads] for name in ("distance", "words")]
        heads_section["correlation of distance and words"] = float(np.corrcoef(explained)[0, 1])
    neurons_section = {**measured, "a neuron's most common kind": shares["trained"],
                       "a neuron's most common kind, shuffled": shares["shuffled"],
                       "a neuron's most common kind, untrained": shares["untrained"]}
    for name in ("main character", "untrained main character"):
        if results[name]:
            neurons_section[f"{name} neuron, AUROC"] = results[name][0]["later"]
    return {"heads": heads_section, "neurons": neurons_section}


def main(argv=None):
    parser = CommandLine(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of runs, such as out/a (default: the newest)")
    parser.option("dataset", "", "read this dataset's validation stories instead of the run's own")
    parser.option("stories", 200, "number of stories", low=10)
    parser.option("seed", None, "seed of the controls (default: the run's own)", type=int)
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    device, _ = pick_device(args.device, "float32")
    for name in args.runs or [newest_run()]:
        subject, results = study(name, args, device)
        with atomic_write(subject.path("interpret.json")) as file:
            json.dump(results, file, ensure_ascii=False)
        with atomic_write(subject.path("interpret.html")) as file:
            file.write(run_page(results))
        for title, figures in summarize(results).items():
            add_section(subject, title, figures)
        print(f"{subject.path('interpret.html')} and interpret.json are written")


if __name__ == "__main__":
    run_main(main)

"""Look inside a run: what each attention head and each neuron does, measured on validation stories.

    python -m lab.interpret                the newest run: interpret.html and interpret.json in its folder
    python -m lab.interpret out/a out/b    several runs, one after the other; lab.compare shows them side by side

Layers, heads and neurons are counted from 0, as in the code: layer 3 is model.blocks[3]. A neuron is one of the inputs
of mlp.proj. The model is observed and ablated from outside, by hooks on its modules, so this also works on a changed
model.py. Where it does not, it says so.

Shapes in comments: T tokens of a story, L layers, H heads of a layer, M neurons of all layers, V vocabulary.
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
from common import ROOT, CommandLine, run_main
from common.dataset import SKILLS, load_meta, load_tokens, split_stories
from common.device import pick_device
from common.files import atomic_write
from common.results import add_section, load_subject
from common.runs import load_checkpoint, newest_run
from eval import evaluate, read_spans, skill_accuracy
from lab.interpret_page import run_page
from lab.world import LISTS, VOCABULARY, forms_of

NEAREST = 64  # explained are the attention logits of each query for this many of its nearest keys
MIN_EXPLAINED = 0.2  # a head's type, distance or words, explains at least this share of their variance,
MIN_RATIO = 2  # and at least this many times as much as the other one does
TOP = 20  # a neuron is described by the kinds of the TOP different tokens that activate it most
SHOWN = 4  # number of neurons of each kind that the page shows,
EXCERPTS = 5  # each with this many excerpts of stories
ABLATION_STORIES = 40  # number of stories on which the loss is measured with each head ablated

# -----------------------------------------------------------------------------------------------------------------
# stories as words: what kind of word each token belongs to, and who the main character is

KINDS = ("punctuation", "function", "noun", "verb", "adjective", "name", "other")
NOUN = KINDS.index("noun")
CAPITAL, FIRST, LATER = 1, 2, 3  # roles: first and later mentions of the main character; other capitalized words
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
class Story:
    """A story of T tokens, of which the first is <|endoftext|>. A token belongs to the word of its last character."""
    ids: torch.Tensor  # (T,) token ids
    kind: torch.Tensor  # (T,) index into KINDS
    role: torch.Tensor  # (T,) FIRST, LATER, CAPITAL or 0
    texts: list  # text of each token; "" for <|endoftext|>


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
        guess = "verb" if re.search(r"\w\w(ed|ing)$", word.lower()) else "other"
        kinds[span] = KINDS.index("name" if word in names else dictionary.get(word.lower(), guess))
        if word == main_character:
            roles[span] = LATER if FIRST in roles else FIRST
        elif word[0].isupper():
            roles[span] = CAPITAL
    return kinds, roles


def read_stories(token_lists, encoding, block_size, device="cpu"):
    """Stories from lists of token ids; <|endoftext|> is put before each, which is cut to block_size tokens.

    The shortest come first. The even and the odd ones are the two halves that some figures need, and so are alike."""
    decoded = []  # (text, ends): token i ends before character ends[i]; <|endoftext|> ends before the first
    for ids in token_lists:
        text, starts = encoding.decode_with_offsets(ids)  # of all tokens, since a cut may split a character
        ends = [*starts, len(text)][:block_size]
        decoded.append((text[:ends[-1]], ends))
    names, dictionary = find_names([text for text, _ in decoded]), word_kinds()
    stories = []
    for ids, (text, ends) in zip(token_lists, decoded):
        kinds, roles = label_characters(text, names, dictionary)
        rows = ([encoding.eot_token, *ids][:block_size], kinds[ends], roles[ends])
        texts = [text[start:end] for start, end in zip([0, *ends], ends)]
        stories.append(Story(*(torch.tensor(row, device=device) for row in rows), texts))
    return sorted(stories, key=lambda story: len(story.ids))


def progress(stories, title):
    return tqdm(stories, desc=title, leave=False, disable=None)


# -----------------------------------------------------------------------------------------------------------------
# observing and ablating a model from outside


def observe(model, modules, ids):
    """(logits (T, V), [input (T, C) of each of these modules]) of the model as it reads token ids (T,)."""
    inputs = []
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0])))
        logits = model(ids[None])
    return logits[0], inputs


def attention_logits(model, ids):
    """(L, H, T, T): the attention logits of each query for each key as the model reads token ids (T,), -inf for later
    keys.

    They are computed from the q, k and mask that model.py hands to its attend(). If their softmax does not give what
    attend() returns, model.py has changed and all figures would be wrong: then the program ends."""
    captured, attend = [], getattr(architecture, "attend", None)

    def attend_and_capture(q, k, v, mask):
        logits = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5  # (1, H, T, T)
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = (logits if mask is None else logits + mask).masked_fill(future, -math.inf)
        captured.append(logits[0])
        y = attend(q, k, v, mask)
        if not (logits.softmax(-1) @ v - y).norm() <= 1e-3 * y.norm():
            sys.exit("model.attend() is no longer softmax(q k^T / sqrt(D) + mask) v: "
                     "make the same change in attention_logits() of lab/interpret.py")
        return y
    architecture.attend = attend_and_capture
    try:
        model(ids[None])
    finally:
        architecture.attend = attend
    if len(captured) != len(model.blocks):
        sys.exit(f"the {len(model.blocks)} layers of this model.py called attend() {len(captured)} times, and "
                 "lab/interpret.py sees attention only there: let each layer call it once")
    return torch.stack(captured)


@contextmanager
def ablate(projection, columns=slice(None), where=slice(None)):
    """Within a `with` block, zero these columns of a projection's input: a head's columns of attn.proj, or a neuron's
    column of mlp.proj. With a mask `where` (T,), only there; without, this equals zeroing columns of the weights."""
    def zero(_, args):
        x = args[0].clone()  # (B, T, C)
        x[:, where, columns] = 0
        return x
    with projection.register_forward_pre_hook(zero):
        yield


def ablate_head(model, layer, head):
    projection = model.blocks[layer].attn.proj
    size = projection.in_features // model.config.n_head
    return ablate(projection, slice(head * size, (head + 1) * size))


@contextmanager
def ablate_neurons(model, neurons, where=slice(None)):
    """Within a `with` block, ablate neurons, [(layer, neuron)]."""
    with ExitStack() as ablations:
        for layer, neuron in neurons:
            ablations.enter_context(ablate(projections(model)[layer], neuron, where))
        yield


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
    "decay": "how much the mean attention logit falls per token of distance, beyond its peak; compare ALiBi's slopes",
    "previous token": "attention to the token before",
    "main character / share": "attention to the main character's name, over its share of the text so far: 1 is chance",
    "own noun / share": "the same at a, an and the, for earlier mentions of the noun that comes next",
    "induction / share": "the same for the tokens that followed earlier occurrences of the query's token"}


class GroupMeans:
    """How much of the variance of attention logits is explained, for each head, by the group that a query and a key
    belong to: the R² of predicting each logit by its group's mean over the other half of the stories. With means over
    the same half, many small groups would explain a lot by chance."""

    def __init__(self, n_groups, n_heads, device):
        self.sums = torch.zeros(2, n_groups, n_heads, device=device)
        self.counts = torch.zeros(2, n_groups, 1, device=device)
        self.squares = torch.zeros(n_heads, device=device)

    def add(self, half, groups, logits):
        """Add logits (Q, K, heads) of Q queries and K keys, whose groups are (Q, K), to one half of the stories."""
        logits = logits.flatten(0, 1)  # (Q * K, heads)
        self.sums[half].index_add_(0, groups.flatten(), logits)
        self.counts[half].index_add_(0, groups.flatten(), torch.ones_like(logits[:, :1]))
        self.squares += logits.square().sum(0)

    def explained(self):
        """R² (heads,)."""
        means = self.sums.flip(0) / self.counts.flip(0).clamp(min=1)
        # over a group of n logits x, x^2 - (x - mean)^2 sums to 2 mean sum(x) - n mean^2
        return (2 * means * self.sums - self.counts * means**2).sum((0, 1)) / self.squares


def add_logits(logits, story, half, by_distance, by_words):
    """Add attention logits (heads, T, T) to two GroupMeans: by the distance of the key, and by its token together with
    the query's kind of word. Only queries that have all distances are counted."""
    nearest, device = by_distance.sums.size(1), story.ids.device
    distances = torch.arange(nearest, device=device)
    queries = torch.arange(len(story.ids), device=device)[nearest:, None]  # (Q, 1)
    keys = queries - distances  # (Q, nearest); <|endoftext|> is not among them
    words = story.ids[keys] * len(KINDS) + story.kind[queries]  # (Q, nearest)
    logits = logits[:, queries, keys].permute(1, 2, 0)  # (Q, nearest, heads)
    logits = logits - logits.mean(1, keepdim=True)  # softmax ignores what all keys of a query have in common
    by_distance.add(half, distances.expand_as(words), logits)
    by_words.add(half, words, logits)


def find_own_noun(story, same):
    """(T, T) bool: query i is an article, key j the noun that follows it after at most two other words.

    same (T, T): whether two tokens are equal."""
    kinds, pairs = story.kind.tolist(), torch.zeros_like(same)
    for i, text in enumerate(story.texts):
        if text.strip().lower() in ("a", "an", "the") and NOUN in kinds[i + 1:i + 4]:
            pairs[i] = same[kinds.index(NOUN, i + 1)]
    return pairs


def find_targets(story):
    """{target: (T, T) bool}: whether key j, which is before query i and not <|endoftext|>, is such a target."""
    same = story.ids[:, None] == story.ids
    targets = {"previous token": torch.ones_like(same).triu(-1), "main character": story.role >= FIRST,
               "own noun": find_own_noun(story, same), "induction": F.pad(same[:, :-1], (1, 0))}
    earlier = torch.ones_like(same).tril(-1)
    earlier[:, 0] = False
    return {name: target & earlier for name, target in targets.items()}


@torch.inference_mode()
def study_heads(model, stories, title="heads"):
    """[{figure: value}] of every head, layer by layer; HEAD_FIGURES says what the figures mean."""
    config, device = model.config, stories[0].ids.device
    n_heads = config.n_layer * config.n_head
    by_distance = GroupMeans(min(NEAREST, config.block_size // 2), n_heads, device)
    by_words = GroupMeans(config.vocab_size * len(KINDS), n_heads, device)
    # for each target: the attention to it; how many queries have one; the sum over them of its share of the text so far
    attention, queries, shares = defaultdict(float), Counter(), Counter()
    for number, story in enumerate(progress(stories, title)):
        logits = attention_logits(model, story.ids).flatten(0, 1)  # (L * H, T, T)
        add_logits(logits, story, number % 2, by_distance, by_words)
        p = logits.softmax(-1)
        p[..., 0] = 0
        p = p / p.sum(-1, keepdim=True).clamp(min=1e-9)
        text_so_far = torch.arange(len(story.ids), device=device).clamp(min=1)  # in tokens
        for name, target in find_targets(story).items():
            attention[name] += (p * target).sum((1, 2))
            queries[name] += target.any(-1).sum().item()
            shares[name] += (target.sum(-1) / text_so_far).sum().item()
    figures = {"distance": by_distance.explained(), "words": by_words.explained()}
    for name, total in attention.items():
        figures[name] = total / max(1, queries[name])
        figures[f"{name} / share"] = total / max(1e-9, shares[name])
    profiles = by_distance.sums.sum(0) / by_distance.counts.sum(0)  # (nearest, L * H)
    figures["decay"] = torch.tensor([decay_of(profile) for profile in profiles.T.cpu().numpy()])
    records = [{name: figure[number].item() for name, figure in figures.items()} for number in range(n_heads)]
    return [{"layer": number // config.n_head, "head": number % config.n_head, "type": head_type(record), **record}
            for number, record in enumerate(records)]


def decay_of(profile):
    """How much a head's mean attention logits by distance fall per token, by a line from their peak on."""
    peak = min(int(profile.argmax()), len(profile) - 2)  # a line needs two points
    return -np.polyfit(np.arange(peak, len(profile)), profile[peak:], 1)[0]


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
    story = max(stories, key=lambda story: (story.role[:T] >= FIRST).sum().item())
    words = [text.strip(" ").replace("\n", "¶")[:10] for text in ["start", *story.texts[1:T]]]
    attention = attention_logits(model, story.ids[:T]).softmax(-1)  # (L, H, T, T)
    reasons = defaultdict(list)
    for figure, why in MAPS.items():
        best = max(heads, key=lambda head: head[figure])
        reasons[best["layer"], best["head"]].append(why)
    return [{"layer": layer, "head": head, "why": ", ".join(why), "words": words,
             "attention": attention[layer, head].cpu().double().round(decimals=3).tolist()}
            for (layer, head), why in reasons.items()]


# -----------------------------------------------------------------------------------------------------------------
# neurons


def projections(model):
    """The modules whose inputs are the neurons of each layer."""
    return [block.mlp.proj for block in model.blocks]


@torch.inference_mode()
def collect_activations(model, stories, title):
    """(highest (V, M), shuffled (V, M), capitalized): the highest activation of each neuron on each token; the same if
    activations are assigned to random tokens of the stories; and of each story, all (P, M) at its capitalized words."""
    ids = torch.cat([story.ids[1:] for story in stories])
    random_ids = ids[torch.randperm(len(ids), device=ids.device)].split([len(story.ids) - 1 for story in stories])
    n_neurons = sum(proj.in_features for proj in projections(model))
    highest, shuffled = torch.zeros(2, model.config.vocab_size, n_neurons, device=ids.device)
    capitalized = []
    for story, shuffled_ids in zip(progress(stories, title), random_ids):
        _, inputs = observe(model, projections(model), story.ids)
        hidden = torch.cat(inputs, dim=1)[1:]  # (T - 1, M), without <|endoftext|>
        highest.scatter_reduce_(0, story.ids[1:, None].expand_as(hidden), hidden, "amax")
        shuffled.scatter_reduce_(0, shuffled_ids[:, None].expand_as(hidden), hidden, "amax")
        capitalized.append(hidden[story.role[1:] > 0])
    return highest, shuffled, capitalized


def study_neurons(model, stories, title="neurons"):
    """{"neurons": [{layer, neuron, kind, share}], the most selective first, without those that fewer than TOP tokens
    activate; "share": the mean share; "shuffled": the same for shuffled activations, a control; "main character": what
    rank_main_character gives}."""
    highest, shuffled, capitalized = collect_activations(model, stories, title)
    pairs = torch.cat([story.ids[1:] * len(KINDS) + story.kind[1:] for story in stories])
    counts = torch.bincount(pairs, minlength=len(highest) * len(KINDS)).view(-1, len(KINDS))  # (V, kinds)
    token_kinds = counts.argmax(1)  # (V,): the kind of word that a token belongs to most often
    share, kind = most_common_kind(highest, token_kinds)
    index = [(layer, neuron) for layer, proj in enumerate(projections(model)) for neuron in range(proj.in_features)]
    neurons = [{"layer": layer, "neuron": neuron, "kind": KINDS[kind[i]], "share": round(share[i].item(), 2)}
               for i, (layer, neuron) in enumerate(index) if not share[i].isnan()]
    return {"neurons": sorted(neurons, key=lambda neuron: -neuron["share"]), "share": share.nanmean().item(),
            "shuffled": most_common_kind(shuffled, token_kinds)[0].nanmean().item(),
            "main character": rank_main_character(capitalized, stories, index)}


def most_common_kind(highest, token_kinds):
    """(share (M,), kind (M,)): the most common kind of word among the TOP different tokens that activate a neuron most,
    and its share; nan if fewer tokens activate the neuron at all.

    highest (V, M): activations on each token; token_kinds (V,): the kind of each token."""
    best, tokens = highest.topk(TOP, dim=0)  # (TOP, M)
    kinds = token_kinds[tokens]
    count, row = (kinds[:, None] == kinds).sum(1).max(0)  # (M,)
    kind = kinds.gather(0, row[None])[0]
    return (count / TOP).masked_fill(best[-1] <= 0, math.nan), kind


def auroc(hits, others):
    """Area under the ROC curve (M,): how often a row of hits (P, M) exceeds one of others (N, M); ties count half."""
    hits, others = hits.T.contiguous(), others.T.contiguous().sort(1).values
    below, below_or_equal = torch.searchsorted(others, hits), torch.searchsorted(others, hits, right=True)
    return (below + below_or_equal).float().mean(1) / 2 / others.size(1)


def rank_main_character(capitalized, stories, index):
    """[{layer, neuron, chosen by, later, capital}], the best first: the AUROC with which a neuron's activation tells
    the first mention of the main character from later ones, and from other capitalized words.

    capitalized: of each story, the activations (P, M) at its capitalized words. Neurons are ranked by one half of the
    stories, "chosen by", and measured on the other: the best of thousands owe part of their rank to luck."""
    hidden, roles = torch.cat(capitalized), torch.cat([story.role[story.role > 0] for story in stories])
    halves = torch.cat([torch.full_like(rows[:, 0], number % 2) for number, rows in enumerate(capitalized)])
    groups = [hidden[(halves == half) & (roles == role)] for half in (0, 1) for role in (FIRST, LATER, CAPITAL)]
    if not all(len(group) for group in groups):
        return []
    first, later, capital, test_first, test_later, test_capital = groups
    chosen_by = torch.minimum(auroc(first, later), auroc(first, capital))
    columns = (chosen_by, auroc(test_first, test_later), auroc(test_first, test_capital))
    rows = torch.stack(columns, dim=1).tolist()  # M rows
    records = [{"layer": layer, "neuron": neuron, **dict(zip(("chosen by", "later", "capital"), row))}
               for (layer, neuron), row in zip(index, rows)]
    return sorted(records, key=lambda record: -record["chosen by"])


@torch.inference_mode()
def add_excerpts(model, stories, neurons):
    """Add to each neuron's record the excerpts [text before, token, text after] in which it is most active."""
    activations, excerpts = [], []
    for story in stories:
        _, inputs = observe(model, projections(model), story.ids)
        activations.append(torch.stack([inputs[record["layer"]][1:, record["neuron"]] for record in neurons], dim=1))
        texts = story.texts
        excerpts += [["".join(texts[max(0, i - 7):i]), texts[i], "".join(texts[i + 1:i + 4])]
                     for i in range(1, len(texts))]
    places = torch.cat(activations).topk(EXCERPTS, dim=0).indices  # (EXCERPTS, neurons)
    for record, column in zip(neurons, places.T.tolist()):
        record["excerpts"] = [excerpts[place] for place in column]


@torch.inference_mode()
def loss_without_neurons(model, stories, groups):
    """{name: [rise, rise if ablated at the first mention alone]} of the loss at later mentions of the main character,
    in nats per token, with each group of neurons, {name: [(layer, neuron)]}, ablated."""
    def loss(story, neurons, where=slice(None)):
        with ablate_neurons(model, neurons, where):
            nats = model(story.ids[None, :-1], story.ids[None, 1:])[0]  # (T - 1,)
        return nats[story.role[1:] == LATER].sum().item()
    rises = {name: np.zeros(2) for name in groups}
    for story in progress(stories, "ablating neurons"):
        intact, first = loss(story, []), story.role[:-1] == FIRST
        for name, neurons in groups.items():
            rises[name] += [loss(story, neurons) - intact, loss(story, neurons, first) - intact]
    n_later = sum((story.role[1:] == LATER).sum().item() for story in stories)
    return {name: (rise / max(1, n_later)).tolist() for name, rise in rises.items()}


def compare_neurons(model, control, stories):
    """The figures of a model's neurons, beside two controls: shuffled activations, and the untrained model."""
    trained, random = study_neurons(model, stories), study_neurons(control, stories, "untrained neurons")
    neurons, ranked = trained["neurons"], trained["main character"]
    shown = ranked[:1]
    for kind in KINDS:
        shown += [neuron for neuron in neurons if neuron["kind"] == kind][:SHOWN]
    add_excerpts(model, stories, shown)
    best = [(record["layer"], record["neuron"]) for record in ranked[:10]]
    drawn = [(layer, int(torch.randint(projections(model)[layer].in_features, ()))) for layer, _ in best]
    groups = {"the best": best[:1], "the ten best": best, "ten random ones of the same layers": drawn}
    shares = {"trained": trained["share"], "shuffled": trained["shuffled"], "untrained": random["share"]}
    return {"shares": shares, "neurons": neurons, "top": TOP, "kinds": KINDS, "main character": ranked[:20],
            "untrained main character": random["main character"][:1],
            "main character ablated": loss_without_neurons(model, stories, groups)}


# -----------------------------------------------------------------------------------------------------------------
# skills: which head or layer they need, and after which layer the answer is there


def skill_probes(dataset):
    """(source, probes with one right and one wrong word, exclusions): from a dataset's spans, if it has any."""
    probes, by_kind = read_spans(dataset, 40), read_spans(dataset, 60, by="kind")
    source = "spans of validation stories"
    if not probes:
        source = "data/probes.json, since these stories have no spans"
        with open(os.path.join(ROOT, "data", "probes.json"), encoding="utf-8") as file:
            by_kind = json.load(file)
        for skill in SKILLS:
            first = [probe for probe in by_kind if probe["skill"] == skill][:40]
            probes += [{**probe, "right": probe["right"][:1], "wrong": probe["wrong"][:1]} for probe in first]
    return source, probes, [probe for probe in by_kind if probe["kind"] == "exclusion"]


def study_ablations(model, encoding, dataset, n_stories, probes):
    """[{layer, head, loss, skill: share}]: the loss in nats per token, and the share of each skill's probes that the
    model passes, with each layer (attention and MLP; its head is None) and each head ablated in turn. The first record
    is about the intact model; its layer and head are None."""
    def measure(layer, head):
        return {"layer": layer, "head": head, "loss": evaluate(model, dataset, n_stories)["val_loss"],
                **skill_accuracy(model, encoding, probes)}

    records = [measure(None, None)]
    for layer, block in enumerate(progress(model.blocks, "ablating")):
        with ablate(block.attn.proj), ablate(block.mlp.proj):
            records.append(measure(layer, None))
        for head in range(model.config.n_head):
            with ablate_head(model, layer, head):
                records.append(measure(layer, head))
    return records


@torch.inference_mode()
def logit_lens(model, encoding, probes):
    """[{text, right, wrong, lead}]: by how many nats the right word leads the wrong one, at the first token in which
    they differ, if the model's last norm and head read the state before each layer and after the last (logit lens,
    nostalgebraist 2020). If these two do not give the model's own logits, model.py has changed: then []."""
    norm = getattr(architecture, "norm", torch.zeros_like)  # a model.py without norm() does not pass the check below
    results = []
    for probe in probes:
        prompt, right, wrong = probe["prompt"], probe["right"][0], probe["wrong"][0]
        right_ids, wrong_ids = (encoding.encode_ordinary(prompt + word) for word in (right, wrong))
        n_common = len(os.path.commonprefix([right_ids, wrong_ids]))  # works on any sequences
        if n_common == min(len(right_ids), len(wrong_ids)):  # one word begins with the other
            continue
        context = [encoding.eot_token, *right_ids[:n_common]][-model.config.block_size:]
        ids = torch.tensor(context, device=model.head.weight.device)
        logits, states = observe(model, [*model.blocks, model.head], ids)
        states = torch.stack([x[-1] for x in states])  # (L + 1, C); the last is normed, so norm() does not change it
        lens = model.head(norm(states))  # (L + 1, V)
        if not torch.allclose(lens[-1], logits[-1], rtol=1e-3, atol=1e-3):
            print("no logit lens: this model.py does not compute its logits as head(norm(x)), so logit_lens() in "
                  "lab/interpret.py has to be adapted", file=sys.stderr)
            return []
        lead = lens[:, right_ids[n_common]] - lens[:, wrong_ids[n_common]]
        results.append({"text": prompt, "right": right, "wrong": wrong, "lead": lead.tolist()})
    return results


# -----------------------------------------------------------------------------------------------------------------
# one run


def study(name, args, device):
    """(subject, what interpret.json holds and the page shows) of a run."""
    checkpoint = load_checkpoint(name)
    subject = load_subject(name, device, args.dataset)
    model, encoding, dataset = subject.model, subject.encoding, subject.datasets[0]
    if load_meta(dataset)["tokenizer"]["sha256"] != subject.tokenizer:
        sys.exit(f"{name} was trained with another tokenizer than data/{dataset} has: "
                 f"python prepare.py --dataset={dataset} --tokenizer={checkpoint['datasets'][0]}")
    tokens = split_stories(np.asarray(load_tokens(dataset, "val")), encoding.eot_token)[:args.stories]
    stories = read_stories([ids.tolist() for ids in tokens], encoding, model.config.block_size, device)
    longest = len(stories[-1].ids)
    if longest <= min(NEAREST, model.config.block_size // 2):
        sys.exit(f"the first {args.stories} validation stories of {dataset} have at most {longest} tokens, "
                 "too few to see heads at work: name another dataset with --dataset")
    control = untrained(model, checkpoint["args"]["seed"])
    source, probes, exclusions = skill_probes(dataset)
    heads = study_heads(model, stories)
    ablations = study_ablations(model, encoding, dataset, min(ABLATION_STORIES, len(stories)), probes)
    losses = {(record["layer"], record["head"]): record["loss"] for record in ablations}
    for head in heads:
        head["loss rise"] = losses[head["layer"], head["head"]] - losses[None, None]
    return subject, {
        "run": name, "dataset": dataset, "stories": len(stories), "config": vars(model.config),
        "parameters": model.num_params(), "heads": heads, "head figures": HEAD_FIGURES,
        "untrained heads": study_heads(control, stories, "untrained heads"),
        "maps": attention_maps(model, stories, heads), **compare_neurons(model, control, stories),
        "ablations": ablations, "probes": source,
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
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    device, _ = pick_device(args.device)
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

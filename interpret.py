"""Look inside: what each attention head and each neuron does, on validation stories.

    python interpret.py                             the newest run: interpret.html and interpret.json in its folder
    python interpret.py out/a out/b                 several, compared
"""
import json
import math
import os
import re
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from html import escape
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import model as architecture
from eval import chart, page, read_spans
from model import GPT, alibi_slopes, find_run, load_model, norm, pick_device
from prepare import Parser, find_files, load_meta, load_tokenizer, load_tokens, read_records, start
from world import LISTS, VOCABULARY, forms_of

FAR = 64          # a head's range is measured over so many distances, from positions that have as many behind them
TOP = 20          # a neuron is judged by so many of the tokens that excite it most
DISTANCE = 0.25   # a distance head: distance explains at least this share of its log-attention …
SEMANTIC = 0.10   # a semantic head: the words at both ends explain at least this share …
TIMES = 2         # … and at least so many times what the other does; all other heads are mixed

# -----------------------------------------------------------------------------------------------------------------
# stories as words: what kind of word each token belongs to, and who the story is about

KINDS = ("punctuation", "function", "noun", "verb", "adjective", "name", "other")
FUNCTION = set("""a an the this that these those my your his her its our their some any no every each all both another
    i you he she it we they me him them us who what which whose something everyone and or but so because if when while
    then than as until after before where how why to of in on at by for with from into out up down off over under about
    around through away near behind inside outside be am is are was were been being do does did done have has had will
    would can could should may might must not very too just also only again there then now other more one upon s t m d
    ll re ve don didn doesn can won couldn wouldn wasn weren isn""".split())
TITLES = {word.capitalize() for word in LISTS["family"] + LISTS["days"]} | {"Mommy", "Daddy", "Mama", "Papa", "Mr", "Mrs"}
MORE_NOUNS = "bird birds animal animals room rooms mommy daddy".split()
WORD = r"[^\W\d_]+"


def list_words():
    """{word: kind} of all forms of the words in data/words.json; of two kinds: -ing and past are verbs, adjectives
    come before nouns, nouns before verbs ("a walk")."""
    known = dict.fromkeys(MORE_NOUNS, "noun")
    for kind, plural, forms in (("verb", "verbs", ("ing", "past")), ("adjective", "adjectives", ("",)),
                                ("noun", "nouns", ("", "s")), ("verb", "verbs", ("", "s"))):
        for word in sorted(VOCABULARY[plural]):
            for form in forms:
                known.setdefault(forms_of(word)[form], kind)
    return known


def read_stories(lists, encoding, block_size, device="cpu"):
    """Token lists, each from its <|endoftext|>, as tensors of (stories, longest), those of like length side by side.

    idx: the tokens, padded with <|endoftext|>. real: no padding, and not the first. kind: that of the word whose last
    character a token holds (index into KINDS; -1 at the start and in padding). first, later: the main character's name,
    where it stands first and after that. capital: other capitalised words. pieces: each token's text.

    A name is a capitalised word that stands within a sentence and is hardly ever written small. The main character is
    the story's most frequent name within sentences."""
    lists = sorted((ids[:block_size] for ids in lists), key=len)
    shape, known = (len(lists), max(map(len, lists))), list_words()
    s = SimpleNamespace(idx=torch.full(shape, encoding.eot_token), kind=torch.full(shape, -1),
                        **{name: torch.zeros(shape, dtype=torch.bool) for name in ("real", "first", "later", "capital")})
    texts = [encoding.decode_with_offsets(ids[1:]) for ids in lists]
    within = [Counter(re.findall(r"(?<=[\w,] )[A-Z][^\W\d_]+", text)) for text, _ in texts]
    small = Counter(word for text, _ in texts for word in re.findall(WORD, text) if word.islower())
    capitals = sum(within, Counter())
    names = {word for word, n in capitals.items() if small[word.lower()] < n / 10} - TITLES
    s.pieces, s.heroes = [], []
    for row, (ids, (text, starts)) in enumerate(zip(lists, texts)):
        s.idx[row, :len(ids)] = torch.tensor(ids)
        s.real[row, 1:len(ids)] = True
        ends = [*starts[1:], len(text)]
        s.pieces.append([""] + [text[a:b] for a, b in zip(starts, ends)])
        hero = max(names & within[row].keys(), key=lambda name: within[row][name], default=None)
        s.heroes.append(hero)
        word_at = {i: word for word in re.finditer(WORD, text) for i in range(*word.span())}  # of each character
        met, last = False, None
        for i, end in enumerate(ends, 1):
            word = word_at.get(end - 1)
            if not word:
                piece = text[end - 1:end]
                s.kind[row, i] = KINDS.index("other" if piece.isalnum() else "punctuation")
                continue
            form, lower = word[0], word[0].lower()
            kind = ("name" if form in names else "function" if lower in FUNCTION else known.get(lower) or
                    ("verb" if re.search(r"\w\w(ed|ing)$", lower) else "other"))
            s.kind[row, i] = KINDS.index(kind)
            if form == hero:
                met = met or last is not None and last != word.start()
                (s.later if met else s.first)[row, i] = True
                last = word.start()
            elif form[0].isupper():
                s.capital[row, i] = True
    for name in ("idx", "kind", "real", "first", "later", "capital"):
        setattr(s, name, getattr(s, name).to(device))
    return s


def batches(stories, tokens=2048):
    """Slices of stories of like length, with the longest length in each."""
    lengths = stories.real.sum(1) + 1
    at = 0
    while at < len(lengths):
        n = max(2, tokens // int(lengths[at]))
        n -= n % 2  # as many even as odd ones
        yield slice(at, at + n), int(lengths[at:at + n].max())
        at += n


# -----------------------------------------------------------------------------------------------------------------
# watching and silencing, from outside the model


@contextmanager
def watch(modules):
    """A list, to which each call of one of `modules` adds its arguments."""
    seen = []
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args)) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watch_attention():
    """A list, to which each layer adds its attention's logarithm before the softmax's sum is taken off, (B, H, T, T):
    -inf for what comes later. It is taken where model.py hands q and k to its attend()."""
    seen, attend = [], architecture.attend

    def record(q, k, v, mask):
        logits = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5
        logits = logits if mask is None or mask.dtype == torch.bool else logits + mask
        T = q.size(2)
        seen.append(logits.masked_fill(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), -math.inf))
        return attend(q, k, v, mask)
    architecture.attend = record
    try:
        yield seen
    finally:
        architecture.attend = attend


@contextmanager
def silence(projection, columns, where=True):
    """Zero these columns of what a projection reads, everywhere or where the mask (B, T) says: a head's share of
    attn.proj, a neuron's of mlp.proj. Everywhere, that is the same as zeroing those columns of the weights."""
    def zero(_, args):
        x = args[0].clone()
        x[..., columns] = x[..., columns].masked_fill(torch.as_tensor(where, device=x.device)[..., None], 0)
        return (x,)
    hook = projection.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        hook.remove()


def columns_of(head, config):
    size = config.n_embd // config.n_head
    return slice(head * size, (head + 1) * size)


def finish(model, layer, args, targets):
    """Nats (B, T) that the targets cost when the arguments of block `layer` are `args`: only what comes after is run."""
    x, *more = args
    for block in model.blocks[layer:]:
        x = block(x, *more)
    logits = model.head(norm(x))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


@torch.inference_mode()
def silenced_nats(model, idx, targets):
    """Nats of the targets (B, T): of the model as it is, {(layer, head): with that head silenced}, and
    {(layer, None): without the whole layer}."""
    with watch(model.blocks) as args:
        model(idx)
    nats = {None: finish(model, model.config.n_layer - 1, args[-1], targets)}
    for layer, block in enumerate(model.blocks):
        nats[layer, None] = finish(model, layer + 1, args[layer], targets)
        for head in range(model.config.n_head):
            with silence(block.attn.proj, columns_of(head, model.config)):
                nats[layer, head] = finish(model, layer, args[layer], targets)
    return nats


# -----------------------------------------------------------------------------------------------------------------
# heads


def targets_of_looks(idx, kind, hero, articles):
    """{what might be looked at: (B, T, T) bool, true where query i looking at the earlier key j would be such a look}.

    idx, kind (B, T) as in read_stories; hero (B, T): the main character's name; articles: ids of a, an and the."""
    T = idx.size(1)
    same = idx[:, :, None] == idx[:, None, :]  # (B, T, T)
    noun = kind == KINDS.index("noun")
    after = F.pad(same[:, :, :-1], (1, 0))  # what followed the same token
    named, found = torch.zeros_like(same), torch.isin(idx, articles)
    for step in (1, 2, 3):  # an article, up to two adjectives, a noun: earlier mentions of that noun
        here = found & F.pad(noun[:, step:], (0, step))
        named |= here[:, :, None] & F.pad(same[:, step:], (0, 0, 0, step))
        found = found & ~here
    near = torch.ones(T, T, dtype=torch.bool, device=idx.device)
    looks = {"main character": hero[:, None, :].expand_as(same), "nouns": noun[:, None, :].expand_as(same),
             "articles at their noun": named, "previous": (near.triu(-1) & near.tril(-1)).expand_as(same),
             "same token": same, "after same token": after}
    causal = near.tril(-1) & (torch.arange(T, device=idx.device) > 0)  # <|endoftext|> is not looked at
    return {name: look & causal for name, look in looks.items()}


def count_looks(p, looks, real, sums):
    """Add to sums[name] (3, H): queries that could look so, attention p (B, H, T, T) on it, and its share of the text."""
    T, H = real.size(1), p.size(1)
    behind = torch.arange(T, device=p.device).clamp(min=1)
    for name, look in looks.items():
        could = (look.any(-1) & real).float()  # (B, T)
        mass = torch.einsum("bhij,bij->bhi", p, look.float())
        row = torch.stack([could.sum().expand(H), torch.einsum("bhi,bi->h", mass, could),
                           (look.sum(-1) / behind * could).sum().expand(H)])
        sums[name] = sums.get(name, 0) + row


def explained(sums, counts, total):
    """R² (H) of a value by its group's mean, the mean taken from the other half of the stories: sums (2, G, H) and
    counts (2, G, 1) of the groups in each half, total (2, H) of squares."""
    mean = sums.flip(0) / counts.flip(0).clamp(min=1)
    return ((2 * mean * sums - counts * mean**2).sum((0, 1)) / total.sum(0)).tolist()


@torch.inference_mode()
def study_heads(model, stories, articles, title="heads"):
    """[{figure: number}] of every head, layer by layer; see the page for what they mean."""
    c, device = model.config, stories.idx.device
    H, V, far = c.n_head, c.vocab_size, min(FAR, c.block_size // 2)
    zeros = lambda *shape: torch.zeros(*shape, device=device)
    layers = [SimpleNamespace(total=zeros(2, H), by_distance=zeros(2, far, H), by_word=zeros(2, V * (len(KINDS) + 1), H),
                              looks={}, n=0, range=zeros(H), entropy=zeros(H), start=zeros(H)) for _ in model.blocks]
    n_distance, n_word = zeros(2, far, 1), zeros(2, V * (len(KINDS) + 1), 1)
    distances = torch.arange(far, device=device)
    for rows, T in tqdm(list(batches(stories)), desc=title, leave=False, disable=None):
        idx, kind, real = (x[rows, :T] for x in (stories.idx, stories.kind, stories.real))
        with watch_attention() as seen:
            model(idx)
        hero = (stories.first | stories.later)[rows, :T]
        looks = targets_of_looks(idx, kind, hero, articles)
        queries = torch.arange(far, T, device=device)
        keys = queries[:, None] - distances  # (Q, far), the first of them at 1
        far_off = real[:, far:]  # (B, Q)
        half = (torch.arange(len(idx), device=device) % 2)[:, None].expand_as(far_off)[far_off]  # (N,)
        group = (idx[:, keys] * (len(KINDS) + 1) + kind[:, far:, None] + 1)[far_off]  # (N, far): key, and query's kind
        group = (group + half[:, None] * len(n_word[0])).flatten()
        place = (distances + half[:, None] * far).flatten()
        n_word.view(-1).index_add_(0, group, torch.ones(len(group), device=device))
        n_distance.view(-1).index_add_(0, place, torch.ones(len(place), device=device))
        for layer, logits in zip(layers, seen):
            log_p = logits[:, :, queries[:, None], keys].permute(0, 2, 3, 1)[far_off]  # (N, far, H)
            log_p = log_p - log_p.mean(1, keepdim=True)  # each query for itself
            layer.total.index_add_(0, half, log_p.square().sum(1))
            layer.by_distance.view(-1, H).index_add_(0, place, log_p.flatten(0, 1))
            layer.by_word.view(-1, H).index_add_(0, group, log_p.flatten(0, 1))
            p = logits.softmax(-1)
            layer.start += torch.einsum("bhi,bi->h", p[:, :, far:, 0], far_off.float())
            p[..., 0] = 0  # from here on without <|endoftext|>, on which a head may rest
            p[:, :, 1:] /= p[:, :, 1:].sum(-1, keepdim=True).clamp(min=1e-9)
            count_looks(p, looks, real, layer.looks)
            some = p[:, :, far:].permute(0, 2, 1, 3)[far_off]  # (N, H, T)
            behind = queries[:, None] - torch.arange(T, device=device)  # (Q, T)
            behind = behind.expand(len(idx), -1, -1)[far_off].float()  # (N, T)
            layer.range += torch.einsum("nht,nt->h", some, behind)
            layer.entropy += torch.special.entr(some).sum((0, 2))
            layer.n += len(some)
    induction = repeat_twice(model, stories)
    heads = []
    for i, layer in enumerate(layers):
        by_distance = explained(layer.by_distance, n_distance, layer.total)
        by_word = explained(layer.by_word, n_word, layer.total)
        profile = layer.by_distance.sum(0) / n_distance.sum(0)  # (far, H)
        for h in range(H):
            peak = min(int(profile[:, h].argmax()), far - 2)
            decay = -np.polyfit(np.arange(peak, far), profile[peak:, h].cpu().numpy(), 1)[0]
            heads.append({"layer": i, "head": h, "distance": by_distance[h], "words": by_word[h],
                          "kind": head_kind(by_distance[h], by_word[h]), "peak": peak, "decay": float(decay),
                          "mean distance": layer.range[h].item() / layer.n, "entropy": layer.entropy[h].item() / layer.n,
                          "on the start": layer.start[h].item() / layer.n, "induction": induction[i][h],
                          "profile": profile[:, h].tolist()})
            for name, sums in layer.looks.items():
                n, mass, share = sums[:, h].tolist()
                heads[-1] |= {name: mass / max(n, 1), name + " / share": mass / max(share, 1e-9)}
    return heads


def head_kind(distance, words):
    if distance >= DISTANCE and distance >= TIMES * words:
        return "distance"
    return "semantic" if words >= SEMANTIC and words >= TIMES * distance else "mixed"


@torch.inference_mode()
def repeat_twice(model, stories, rows=8, seed=1):
    """[layer][head]: attention from a random token's second showing to what followed its first (the induction score
    of Olsson et al. 2022, arXiv 2209.11895): tokens drawn from the stories, and the same again."""
    n = model.config.block_size // 2 - 1
    draw = torch.randint(int(stories.real.sum()), (rows, n), generator=torch.Generator().manual_seed(seed))
    once = stories.idx[stories.real][draw.to(stories.idx.device)]
    idx = torch.cat((stories.idx[:1, :1].expand(rows, 1), once, once), 1)
    with watch_attention() as seen:
        model(idx)
    return [layer.softmax(-1).diagonal(1 - n, -2, -1)[:, :, 2:].mean((0, 2)).tolist() for layer in seen]


def untrained(model, seed):
    """The same shape with weights drawn anew. What training starts at zero is drawn too: else no layer had an effect."""
    torch.manual_seed(seed)
    control = GPT(model.config)
    for p in control.parameters():
        if not p.any():
            nn.init.normal_(p, std=p.size(1) ** -0.5)
    return control.to(model.head.weight.device).eval()


@torch.inference_mode()
def loss_without_each_head(model, stories, most=100):
    """(nats a token of about `most` stories, [how much more with each head silenced], how many stories)."""
    nats, n, told = Counter(), 0, 0
    some = list(batches(stories))
    some = some[::max(1, round(len(stories.idx) / most))]  # of all lengths
    for rows, T in tqdm(some, desc="silencing heads", leave=False, disable=None):
        idx, real = stories.idx[rows, :T], stories.real[rows, 1:T]
        for cut, costs in silenced_nats(model, idx[:, :-1], idx[:, 1:]).items():
            nats[cut] += costs[real].sum().item()
        n, told = n + real.sum().item(), told + len(idx)
    rise = {cut: (total - nats[None]) / n for cut, total in nats.items()}
    return nats[None] / n, rise, told


# -----------------------------------------------------------------------------------------------------------------
# neurons


def most_common(x):
    """(share, value) (M) of what stands most often in each column of x (K, M)."""
    n, at = (x[:, None] == x).sum(1).max(0)
    return n / len(x), x.gather(0, at[None])[0]


def area(hits, others):
    """Area under the ROC curve (M): how often a random row of hits (P, M) lies above one of others (N, M); ties half."""
    ordered, hits = others.T.contiguous().sort(1).values, hits.T.contiguous()
    below = torch.searchsorted(ordered, hits) + torch.searchsorted(ordered, hits, right=True)
    return below.double().mean(1) / 2 / len(others)


@torch.inference_mode()
def study_neurons(model, projections, stories, vocab_size, shuffle=False, title="neurons"):
    """One namespace a layer of M neurons, from the inputs of its MLP's second projection:

    places (TOP, M): where in stories.idx, flattened, the neuron is most excited; top (TOP, M): how much; tokens (TOP, M):
    the TOP distinct tokens that excite it most; kinds: theirs; never (M): excited by fewer than TOP tokens;
    and at names, if not shuffled: first, later, capital, each [even stories (P, M), odd stories (P, M)].
    shuffle: the activations belong to other places, drawn by chance, as a control."""
    longest, device = stories.idx.size(1), stories.idx.device
    layers = [SimpleNamespace(top=None, first=([], []), later=([], []), capital=([], [])) for _ in projections]
    for rows, T in tqdm(list(batches(stories)), desc=title, leave=False, disable=None):
        real = stories.real[rows, :T]
        place = (torch.arange(rows.start, rows.start + len(real), device=device)[:, None] * longest
                 + torch.arange(T, device=device))[real]  # (N,)
        with watch(projections) as seen:
            model(stories.idx[rows, :T])
        for layer, (hidden,) in zip(layers, seen):
            M = hidden.size(-1)
            if layer.top is None:
                layer.top, layer.best = torch.zeros(TOP, M, device=device), torch.zeros(vocab_size, M, device=device)
                layer.places = torch.zeros(TOP, M, dtype=torch.int64, device=device)
            for name in () if shuffle else ("first", "later", "capital"):
                mask = getattr(stories, name)[rows, :T]
                for half in (0, 1):
                    getattr(layer, name)[half].append(hidden[half::2][mask[half::2]])
            hidden = hidden[real]  # (N, M)
            if shuffle:
                hidden = hidden[torch.randperm(len(hidden), device=device)]
            tokens = stories.idx.flatten()[place]
            layer.best.scatter_reduce_(0, tokens[:, None].expand(-1, M), hidden, "amax")
            layer.top, at = torch.cat((layer.top, hidden)).topk(TOP, 0)
            layer.places = torch.cat((layer.places, place[:, None].expand(-1, M))).gather(0, at)
    used = torch.zeros(vocab_size, len(KINDS), device=device)
    used.index_put_((stories.idx[stories.real], stories.kind[stories.real]), torch.tensor(1.0, device=device), True)
    for layer in layers:
        excited, layer.tokens = layer.best.topk(TOP, 0)
        layer.never = (excited[-1] <= 0) | (layer.top[-1] <= 0)
        layer.kinds = used.argmax(1)[layer.tokens]  # as what the token stands most often
        del layer.best
        for name in ("first", "later", "capital"):
            setattr(layer, name, [torch.cat(part) for part in getattr(layer, name) if part])
    return layers


def alikeness(layers, stories):
    """[per layer (3, M)]: of each neuron's TOP tokens the share of the most common token and of the most common kind of
    word, and of its TOP distinct tokens the share of the most common kind."""
    tokens, kinds = stories.idx.flatten(), stories.kind.flatten()
    return [torch.stack([most_common(x)[0] for x in (tokens[layer.places], kinds[layer.places], layer.kinds)])
            for layer in layers]


def hero_areas(layers):
    """[(area on even stories, on odd stories against later mentions, on odd ones against other capitals, layer, neuron)],
    best first: how well a neuron's activation tells the first mention of the main character from those others."""
    found = []
    for i, layer in enumerate(layers):
        if min(map(len, [*layer.first, *layer.later, *layer.capital])) == 0:
            return []
        (even, odd), later, capital = layer.first, layer.later, layer.capital
        chosen = torch.minimum(area(even, later[0]), area(even, capital[0]))
        found += zip(chosen.tolist(), area(odd, later[1]).tolist(), area(odd, capital[1]).tolist(),
                     [i] * len(chosen), range(len(chosen)))
    return sorted(found, reverse=True)


@torch.inference_mode()
def loss_without_neurons(model, stories, groups, most=100):
    """For each group of neurons [(layer, neuron)] what a token costs more, in nats, when all of them are silenced: at later
    mentions of the main character, at all other tokens, and at later mentions if silenced at the first mention alone."""
    sums, count = torch.zeros(len(groups), 3), torch.zeros(3)
    some = list(batches(stories))
    some = some[::max(1, round(len(stories.idx) / most))]
    for rows, T in tqdm(some, desc="silencing neurons", leave=False, disable=None):
        idx, real, later, first = (x[rows, :T] for x in (stories.idx, stories.real, stories.later, stories.first))
        x, y, later, other = idx[:, :-1], idx[:, 1:], later[:, 1:], (real & ~later)[:, 1:]
        with watch(model.blocks) as args:
            model(x)
        whole = finish(model, model.config.n_layer - 1, args[-1], y)
        count += torch.tensor([later.sum(), other.sum(), later.sum()])
        for group, total in zip(groups, sums):
            layer = min(group)[0]
            for i, places, where in ((0, True, later), (1, True, other), (2, first[:, :-1], later)):
                if i != 1:  # the second is measured in the first's run
                    with ExitStack() as stack:
                        for at, neuron in group:
                            stack.enter_context(silence(model.blocks[at].mlp.proj, [neuron], places))
                        rise = finish(model, layer, args[layer], y) - whole
                total[i] += rise[where].sum().item()
    return (sums / count.clamp(min=1)).tolist()


# -----------------------------------------------------------------------------------------------------------------
# where a skill lives


def marked_words(dataset, per_skill):
    """({skill: [(before, after, right, wrong)]}, the same list of exclusions, what they are): of the dataset's
    validation stories where these are marked, else of data/probes.json."""
    spans, exclusions = read_spans(dataset, per_skill), []
    if not spans:
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "probes.json")) as f:
            for p in json.load(f):
                spans.setdefault(p["skill"], []).append((p["prompt"], "", p["right"][0], p["wrong"][0]))
                exclusions += spans[p["skill"]][-1:] * (p["kind"] == "exclusion")
        return spans, exclusions, "the probes of data/probes.json, since no story of this dataset has marked words"
    for path, _ in find_files(os.path.join("data", dataset)):
        for record in read_records(path) if path.endswith(".jsonl") else ():
            for span in record.get("spans") or ():
                if record.get("split") == "val" and span.get("kind") == "exclusion" and len(exclusions) < per_skill:
                    story = record["story"]
                    exclusions.append((story[:span["start"]], "", story[span["start"]:span["end"]], span["wrong"]))
            if len(exclusions) == per_skill:
                return spans, exclusions, "marked words of validation stories"
    return spans, exclusions, "marked words of validation stories"


def encode_pair(item, encoding, block_size):
    """(right ids, wrong ids, number of tokens they share at the beginning), cut on the left to the context."""
    before, after, *words = item
    rows = [[encoding.eot_token] + encoding.encode_ordinary(before + word + after) for word in words]
    same = next((i for i, (a, b) in enumerate(zip(*rows)) if a != b), min(map(len, rows)) - 1)
    cut = max(0, max(map(len, rows)) - block_size - 1)
    return rows[0][cut:], rows[1][cut:], same - cut


@torch.inference_mode()
def study_skills(model, spans, encoding):
    """{silenced: {skill: share}} of marked words that the model finds likelier than the wrong ones, as eval.py has it:
    by the sum over the tokens in which they differ. Silenced is None, (layer, head), or (layer, None)."""
    pairs = [(skill, *encode_pair(item, encoding, model.config.block_size)) for skill, items in spans.items()
             for item in items]
    pairs.sort(key=lambda pair: len(pair[1]))
    right = {}
    for i in tqdm(range(0, len(pairs), 12), desc="skills", leave=False, disable=None):
        some = pairs[i:i + 12]
        rows = [ids for _, *both, _ in some for ids in both]
        idx = torch.full((len(rows), max(map(len, rows))), encoding.eot_token)
        counts = torch.zeros(idx.shape)
        for row, (ids, same) in enumerate(zip(rows, np.repeat([pair[3] for pair in some], 2))):
            idx[row, :len(ids)] = torch.tensor(ids)
            counts[row, same:len(ids)] = 1
        idx, counts = idx.to(model.head.weight.device), counts[:, 1:].to(model.head.weight.device)
        for cut, nats in silenced_nats(model, idx[:, :-1], idx[:, 1:]).items():
            costs = (nats * counts).sum(1).view(-1, 2)
            for (skill, *_), found in zip(some, (costs[:, 0] < costs[:, 1]).tolist()):
                right.setdefault(cut, {}).setdefault(skill, []).append(found)
    return {cut: {skill: float(np.mean(right[cut][skill])) for skill in spans} for cut in right}


@torch.inference_mode()
def study_lens(model, items, encoding):
    """[{text, right, wrong, lead}]: by how many nats the right word's first differing token leads before each layer and
    after the last, when the head reads the state there (the logit lens, nostalgebraist 2020)."""
    found = []
    for item in items:
        right, wrong, same = encode_pair(item, encoding, model.config.block_size)
        with watch([*model.blocks, model.head]) as seen:
            model(torch.tensor([right[:same]], device=model.head.weight.device))
        states = torch.stack([norm(args[0][0, -1]) for args in seen])  # the head's input is normed, and stays so
        lead = model.head.weight[[right[same], wrong[same]]] @ states.T
        found.append({"text": item[0], "right": item[2], "wrong": item[3], "lead": (lead[0] - lead[1]).tolist()})
    return found


# -----------------------------------------------------------------------------------------------------------------
# one run


def study(run, dataset, n_stories, seed, device):
    """(every number of a run as plain values for interpret.json, HTML of its page)."""
    model, checkpoint = load_model(run, device)
    dataset = dataset or checkpoint["datasets"][0]
    meta, encoding, c = load_meta(dataset), load_tokenizer(dataset), model.config
    if meta["tokenizer"]["sha256"] != checkpoint["tokenizer"]:
        sys.exit(f"{run} was trained with another tokenizer than data/{dataset} has: "
                 f"python prepare.py --dataset={dataset} --tokenizer={checkpoint['datasets'][0]}")
    tokens = load_tokens(dataset, "val")
    ends = np.flatnonzero(tokens == meta["eot"])[:n_stories + 1].tolist()
    stories = read_stories([tokens[a:b].tolist() for a, b in zip(ends, ends[1:])], encoding, c.block_size, device)
    articles = torch.tensor([i for i in range(meta["vocab_size"] - 1) if encoding.decode_single_token_bytes(i).strip()
                             .lower() in (b"a", b"an", b"the")], device=device)
    control = untrained(model, seed)
    torch.manual_seed(seed)

    heads, plain_heads = (study_heads(m, stories, articles, title) for m, title in
                          ((model, "heads"), (control, "heads of the control")))
    loss, rise, told = loss_without_each_head(model, stories)
    for head in heads:
        head["loss rise"] = rise[head["layer"], head["head"]]

    found, shuffled, plain = (study_neurons(m, [block.mlp.proj for block in m.blocks], stories, c.vocab_size, mixed, title)
                              for m, mixed, title in ((model, False, "neurons"), (model, True, "shuffled neurons"),
                                                      (control, False, "neurons of the control")))
    neurons, usual = list_neurons(found, shuffled, stories)
    heroes, plain_heroes = hero_areas(found), hero_areas(plain)
    groups = {}
    if heroes:
        best = [(layer, neuron) for *_, layer, neuron in heroes[:10]]
        draw = lambda cells: [(layer, int(torch.randint(4 * c.n_embd, ()))) for layer, _ in cells]
        groups = {"the best": best[:1], "the second": best[1:2], "the ten best together": best,
                  "ten drawn by chance, in the same layers": draw(best)}
        groups = dict(zip(groups, zip(groups.values(), loss_without_neurons(model, stories, list(groups.values())))))

    spans, exclusions, source = marked_words(dataset, 60)
    skills, lens = study_skills(model, spans, encoding), study_lens(model, exclusions, encoding)
    result = {"run": run, "dataset": dataset, "stories": len(stories.idx), "config": vars(c),
              "parameters": model.num_params(), "loss": loss, "stories silenced": told, "heads": heads,
              "untrained heads": plain_heads, "layer rise": [rise[i, None] for i in range(c.n_layer)],
              "alike": {name: summarise(layers, stories) for name, layers in
                        (("trained", found), ("shuffled", shuffled), ("untrained", plain))},
              "usual kinds": dict(zip(KINDS, usual)), "neurons": neurons,
              "main character": [dict(zip(("area, even", "area, later", "area, capitals", "layer", "neuron"), hero))
                                 for hero in heroes[:20]],
              "main character, untrained": plain_heroes[0][:3] if plain_heroes else None,
              "main character silenced": {name: {"neurons": cells, "later": rises[0], "elsewhere": rises[1],
                                                 "after the first": rises[2]} for name, (cells, rises) in groups.items()},
              "skills of": source, "skills": [{"layer": cut and cut[0], "head": cut and cut[1], **shares}
                                              for cut, shares in skills.items()], "lens": lens}
    return result, draw_maps(model, stories, heads)


def summarise(layers, stories):
    """Per layer: the means of `alikeness` over neurons that are excited, how many are not; over all, how the shares of
    the most common kind among distinct tokens are spread, in steps of 1 / TOP."""
    alike = [x[:, ~layer.never] for x, layer in zip(alikeness(layers, stories), layers)]
    spread = torch.cat([x[2] for x in alike])
    spread = torch.bincount((spread * TOP).round().long(), minlength=TOP + 1) / max(1, len(spread))
    means = torch.cat(alike, 1).mean(1).tolist()
    return {"layers": [dict(zip(("token", "kind", "distinct"), x.mean(1).tolist())) | {"never": int(layer.never.sum())}
                       for x, layer in zip(alike, layers)],
            "token": means[0], "kind": means[1], "distinct": means[2], "spread": spread.tolist()}


def list_neurons(found, shuffled, stories, excerpts=5):
    """([{figure: value}] of every neuron, the most selective first, share of each kind among shuffled neurons' distinct
    tokens). Selective is a neuron by how much the share of its most common kind passes the usual share of that kind."""
    usual = torch.cat([layer.kinds[:, ~layer.never].flatten() for layer in shuffled])
    usual = torch.bincount(usual, minlength=len(KINDS)) / len(usual)
    neurons, longest = [], stories.idx.size(1)
    for i, (layer, alike) in enumerate(zip(found, alikeness(found, stories))):
        share, kind = most_common(layer.kinds)
        excess = (share - usual[kind]).masked_fill(layer.never, -1)
        rows = zip(layer.places.T.tolist(), layer.top.T.tolist(), kind.tolist(), *alike.tolist(), excess.tolist())
        for neuron, (places, top, kind, token, any_kind, distinct, excess) in enumerate(rows):
            texts = []
            for place, activation in zip(places[:excerpts], top):
                row, at = divmod(place, longest)
                pieces = stories.pieces[row]
                if activation > 0:
                    texts.append(["".join(pieces[max(0, at - 7):at]), pieces[at], "".join(pieces[at + 1:at + 4])])
            neurons.append({"layer": i, "neuron": neuron, "kind": KINDS[kind], "distinct": round(distinct, 2),
                            "kind share": round(any_kind, 2), "token": round(token, 2), "excess": round(excess, 3),
                            "most": round(top[0], 3), "excerpts": texts})
    return sorted(neurons, key=lambda n: -n["excess"]), usual.tolist()


# -----------------------------------------------------------------------------------------------------------------
# the page

EXTRA = """<style> mark { background: color-mix(in srgb, var(--c1) 35%, transparent); color: inherit; border-radius: .2rem }
.note { color: color-mix(in srgb, var(--ink) 75%, var(--paper)); font-size: .9rem } .neuron { margin: .6rem 0 }
.neuron q { display: block; quotes: none; white-space: pre-wrap; padding-left: 1rem } input { font: inherit; padding: .3rem }
.map svg { min-width: 30rem } .map rect { fill: var(--c0) } .map g:hover rect { stroke: var(--c1); stroke-width: 1.5 }
.big li { font-size: 1.15rem; margin: .4rem 0 } th { vertical-align: bottom } td { white-space: nowrap }</style>"""
SEARCH = """<p><label>Search all neurons for a word that excites them: <input id="find" type="search"></label>
<span id="count"></span></p><div id="found"></div><script>
const neurons = JSON.parse(document.getElementById("neurons").textContent), found = document.getElementById("found");
document.getElementById("find").oninput = event => {
  const word = event.target.value.trim().toLowerCase();
  const hits = word ? neurons.filter(n => n[5].some(t => t[1].toLowerCase().includes(word))) : [];
  document.getElementById("count").textContent = word ? hits.length + " of " + neurons.length : "";
  found.replaceChildren(...hits.slice(0, 30).map(([layer, neuron, kind, distinct, token, texts]) => {
    const div = document.createElement("div"), name = document.createElement("b");
    name.textContent = `layer ${layer + 1}, neuron ${neuron}: ${kind} ${Math.round(100 * distinct)} %`;
    div.className = "neuron"; div.append(name);
    for (const [before, at, after] of texts) {
      const q = document.createElement("q"), mark = document.createElement("mark");
      mark.textContent = at; q.append(before, mark, after); div.append(q);
    }
    return div;
  }));
};</script>"""


def table(header, rows, shade=None):
    """HTML of a table; text is escaped, numbers get three digits. shade: {(row, column): share of full colour}."""
    def cell(value):
        return escape(value if isinstance(value, str) else "–" if value is None else f"{value:.3g}")
    out = ["<div class=\"scroll\"><table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in header) + "</tr>"]
    for i, row in enumerate(rows):
        out.append("<tr>" + "".join(
            f"<td style=\"background: color-mix(in srgb, var(--c6) {100 * shade[i, j]:.0f}%, transparent)\">{cell(value)}</td>"
            if shade and shade.get((i, j), 0) > 0 else f"<td>{cell(value)}</td>" for j, value in enumerate(row)) + "</tr>")
    return "".join(out) + "</table></div>\n"


def name_of(head):
    return f"layer {head['layer'] + 1} head {head['head'] + 1}"


def draw_maps(model, stories, heads, T=40):
    """HTML of the attention of some telling heads on the beginning of a story that names its main character often."""
    row = int(((stories.first | stories.later)[:, :T].sum(1) + (stories.real[:, :T].sum(1) == T - 1)).argmax())
    pieces = ["start", *stories.pieces[row][1:T]]
    with torch.inference_mode(), watch_attention() as seen:
        model(stories.idx[row:row + 1, :len(pieces)])
    chosen = {}
    for what, figure in (("most explained by distance", "distance"), ("most explained by words", "words"),
                         ("articles look at their noun", "articles at their noun / share"),
                         ("looks at the main character", "main character / share"), ("costs most when silenced", "loss rise")):
        chosen.setdefault(name_of(head := max(heads, key=lambda head: head[figure])), (head, []))[1].append(what)
    out = []
    for name, (head, reasons) in chosen.items():
        p = seen[head["layer"]][0, head["head"]].softmax(-1).tolist()
        labels = [piece.replace("\n", "¶").strip() or "␣" for piece in pieces]
        svg = [f"<text x=\"66\" y=\"{85 + 13 * i}\" text-anchor=\"end\">{escape(label[:10])}</text><text transform=\""
               f"translate({79 + 13 * i} 70) rotate(-60)\">{escape(label[:10])}</text>" for i, label in enumerate(labels)]
        for i, values in enumerate(p):
            svg += [f"<g><title>{escape(labels[i])} → {escape(labels[j])}: {value:.2f}</title><rect x=\"{70 + 13 * j}\" y=\""
                    f"{76 + 13 * i}\" width=\"12\" height=\"12\" opacity=\"{max(value, 0.0) ** 0.5:.2f}\"/></g>"
                    for j, value in enumerate(values[:i + 1]) if value >= 0.01]
        size = 80 + 13 * len(pieces)
        out.append(f"<figure><figcaption>{name}: {', '.join(reasons)}</figcaption><div class=\"scroll map\"><svg viewBox=\""
                   f"0 0 {size + 20} {size}\" font-size=\"10\" role=\"img\" aria-label=\"attention map\">{''.join(svg)}</svg></div></figure>")
    return "<div class=\"charts\">" + "\n".join(out) + "</div>"


def correlation(heads):
    """Of the two axes, over heads: near -1 where a head is explained by the one or by the other."""
    return float(np.corrcoef([h["distance"] for h in heads], [h["words"] for h in heads])[0, 1]) if len(heads) > 2 else None


def show_heads(r, maps):
    heads, kinds = r["heads"], ("distance", "semantic", "mixed")
    series = {kind: [(h["distance"], h["words"]) for h in heads if h["kind"] == kind] for kind in kinds}
    series["untrained"] = [(h["distance"], h["words"]) for h in r["untrained heads"]]
    scatter = chart("Every head: by distance, or by words?", "share explained by distance", "share explained by words",
                    series, lines=False)
    # the tooltips name the heads, in the order in which chart() draws: by series, then by point
    names = iter([name_of(h) for kind in [*kinds, None] for h in sorted(
        (h for h in (heads if kind else r["untrained heads"]) if kind in (None, h["kind"])),
        key=lambda h: (h["distance"], h["words"]))])
    scatter = re.sub("<title>", lambda _: f"<title>{next(names)}, ", scatter)
    by_range = sorted((h for h in heads if h["kind"] == "distance"), key=lambda h: -h["decay"])
    slopes = alibi_slopes(max(1, len(by_range))).tolist()
    rates = chart("How fast distance heads forget", "distance head, steepest first", "log2 of the decay a token",
                  {"learned": [(i, math.log2(max(h["decay"], 2 ** -12))) for i, h in enumerate(by_range, 1)],
                   "ALiBi's slopes for as many heads": [(i, math.log2(m)) for i, m in enumerate(slopes, 1)] if by_range else []})
    few = by_range[::max(1, len(by_range) // 6)]
    profiles = chart("Attention against distance", "distance in tokens", "log-attention, above its mean", {
        f"{name_of(h)}, {h['decay']:.3f} a token": list(enumerate(h["profile"])) for h in few})
    columns = {"kind": "kind", "by distance": "distance", "by words": "words", "decay": "decay", "peak": "peak",
               "mean distance": "mean distance", "entropy": "entropy", "main character": "main character / share",
               "nouns": "nouns / share", "articles at their noun": "articles at their noun / share",
               "same token": "same token / share", "after same token": "after same token / share",
               "previous token": "previous", "induction": "induction", "on the start": "on the start", "loss rise": "loss rise"}
    rows = [[name_of(h), *(h[key] for key in columns.values())] for h in sorted(heads, key=lambda h: (h["layer"], h["head"]))]
    return f"""<h2>Heads: by distance, or by words?</h2>
<div class="charts">{scatter}{profiles}{rates}</div>
<p class="note">Each dot is a head. <b>Explained by distance</b>: R² of its log-attention, each query's mean taken off, when one
knows only how far away the key is (over the {len(heads[0]['profile'])} nearest, from queries that have as many behind them).
<b>Explained by words</b>: when one knows only which token stands at the key, and the kind of word at the query. Both means are
taken on one half of the stories and tried on the other. A <b>distance</b> head: at least {DISTANCE} by distance, and {TIMES}
times what words explain; a <b>semantic</b> one: at least {SEMANTIC} by words, and {TIMES} times what distance explains; all
others are <b>mixed</b>. Decay: by how much log-attention falls a token, from its peak on; ALiBi's slopes are 2^(-8h/H).</p>
<h3>Maps</h3><p>A row reads, and looks at the columns; the darker the more. Hover for the value.</p>{maps}
<h3>Every head</h3>{table(["", *columns], rows)}
<p class="note">Main character (the name that the story has most within its sentences), nouns, an article's own noun (the one that it
is about to name, where it was mentioned before), the same token, what followed the same token: attention to these, without that on
&lt;|endoftext|&gt;, over their share of the text so far; 1 is indifference. Previous token and induction (what followed the same token in
random tokens repeated): attention itself. Mean distance in tokens, entropy in nats. Loss rise: nats a token more when the head is
silenced, over {r["stories silenced"]} stories; the whole model's loss there is {r["loss"]:.3f}.</p>"""


def show_neuron(n):
    texts = "".join(f"<q>{escape(before)}<mark>{escape(at)}</mark>{escape(after)}</q>" for before, at, after in n["excerpts"])
    return (f"<div class=\"neuron\"><b>layer {n['layer'] + 1}, neuron {n['neuron']}: {n['kind']} {n['distinct']:.0%}</b>"
            f"{texts}</div>")


def show_neurons(r, shown=24, limit=2_500_000):
    alike, neurons = r["alike"], [n for n in r["neurons"] if n["excess"] > -1]
    spread = chart("How alike are the words that excite a neuron?", f"share of the most common kind of word among {TOP}",
                   "% of neurons", {name: [(i / TOP, 100 * x) for i, x in enumerate(alike[name]["spread"])] for name in alike})
    depth = chart("By layer", "layer", "mean share", {name: [(i, x["distinct"]) for i, x in enumerate(alike[name]["layers"], 1)]
                                                      for name in alike}, lines=r["config"]["n_layer"] > 1)
    rows = [[name, x["distinct"], x["kind"], x["token"], sum(y["never"] for y in x["layers"])] for name, x in alike.items()]
    blob, size = [], 0
    for n in neurons:
        entry = json.dumps([n["layer"], n["neuron"], n["kind"], n["distinct"], n["token"], n["excerpts"]],
                           ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        size += len(entry.encode())
        if size > limit:
            break
        blob.append(entry)
    left = "" if len(blob) == len(neurons) else f" The page holds the {len(blob):,} most selective; interpret.json all."
    seen, varied = Counter(), []
    for n in neurons:  # of each kind a few, so that not all are names
        if (seen.update([n["kind"]]) or seen[n["kind"]] <= max(3, shown // 6)) and len(varied) < shown:
            varied.append(n)
    return f"""<h2>Neurons: what excites them?</h2><div class="charts">{spread}{depth}</div>
{table(["mean over neurons", "kind, distinct tokens", "kind, any", "token", "hardly ever excited"], rows)}
<p class="note">Of the {TOP} distinct tokens that excite a neuron most, the share of the most common kind of word
({", ".join(KINDS)}); then of the {TOP} most exciting places the share of the most common kind and of the most common token. Two
controls: the same activations given to random places, and an untrained model, which answers to tokens as such: its neurons have
fewer tokens on top but of no kind in particular. Excited by fewer than {TOP} tokens: left out.</p>
<h3>The most selective ones</h3><div class="charts">{''.join(map(show_neuron, varied))}</div>
<script id="neurons" type="application/json">[{",".join(blob)}]</script>{SEARCH}<p class="note">{left}</p>
{show_hero(r)}"""


def show_hero(r):
    if not r["main character"]:
        return "<h3>The main character</h3><p>Too few stories here name one.</p>"
    rows = [[f"layer {h['layer'] + 1}, neuron {h['neuron']}", h["area, later"], h["area, capitals"]]
            for h in r["main character"][:5]] + [["untrained model's best", *r["main character, untrained"][1:]]]
    silenced = [[name, x["later"], x["after the first"], x["elsewhere"]] for name, x in r["main character silenced"].items()]
    cells = {(n["layer"], n["neuron"]): n for n in r["neurons"]}
    best = "".join(show_neuron(cells[h["layer"], h["neuron"]]) for h in r["main character"][:2])
    return f"""<h2>A neuron for the main character?</h2><div class="charts">{best}</div>
{table(["area under the curve", "first against later mentions", "first against other capitals"], rows)}
<p class="note">How often the neuron is more excited at the first mention of the main character than at a later mention, or at another
capitalised word (0.5 is chance). Chosen on one half of the stories, measured on the other.</p>
{table(["silenced: nats more", "at later mentions", "there, silenced at the first only", "at other tokens"], silenced)}"""


def show_skills(r):
    whole, cuts = r["skills"][0], r["skills"][1:]
    names = [name for name in whole if name not in ("layer", "head")]
    rows = [["the whole model", *(f"{whole[name]:.0%}" for name in names)]]
    shade = {}
    layers = [x for x in cuts if x["head"] is None]
    few = sorted((x for x in cuts if x["head"] is not None), key=lambda x: min(x[n] - whole[n] for n in names))[:10]
    for x in layers + (few if r["config"]["n_head"] > 1 else []):
        shade |= {(len(rows), j): whole[name] - x[name] for j, name in enumerate(names, 1)}
        rows.append([f"without layer {x['layer'] + 1}" if x["head"] is None else f"without {name_of(x)}",
                     *(f"{x[name]:.0%}" for name in names)])
    lens = r["lens"]
    lines = {"mean": list(enumerate(np.mean([x["lead"] for x in lens], 0).tolist()))} if lens else {}
    lines |= {f"… {x['text'][-18:]} {x['right'].strip()}": list(enumerate(x["lead"])) for x in lens[:5]}
    drawn = chart("Exclusion: when does the right word overtake?", "after so many layers", "nats by which it leads", lines)
    examples = [[f"… {x['text'][-90:]}", x["right"].strip(), x["wrong"].strip(), next((str(i) for i in range(len(x["lead"]))
                 if min(x["lead"][i:]) > 0), "never")] for x in lens[:8]]
    return f"""<h2>Where a skill lives</h2>
<p>Share of words where the model finds the right one likelier than the tempting wrong one; red where silencing costs some.
Measured on {escape(r["skills of"])}.</p>{table(["", *names], rows, shade)}
<p class="note">Every layer, and the ten heads that cost some skill most; all are in interpret.json. With some 60 words a skill,
differences under 10 % may be chance.</p>
<div class="charts">{drawn}</div>{table(["", "right", "tempting", "leads for good after layer"], examples) if lens else ""}
<p class="note">The logit lens: the head reads the state between layers. Of {len(lens)} exclusions the right word leads at the end in
{sum(x["lead"][-1] > 0 for x in lens)}.</p>"""


def in_short(r):
    heads, kinds = r["heads"], Counter(h["kind"] for h in r["heads"])
    most = lambda figure: max(heads, key=lambda h: h[figure])
    article, hero = most("articles at their noun / share"), most("main character / share")
    lines = [f"{kinds['distance']} of {len(heads)} heads look by distance, {kinds['semantic']} by words, {kinds['mixed']} are mixed"
             + f" (untrained: {sum(h['kind'] != 'mixed' for h in r['untrained heads'])} of {len(heads)} not mixed).",
             f"At a, an and the, {name_of(article)} looks {article['articles at their noun / share']:.1f} times as often as chance at the"
             f" earlier mention of the noun that comes next; {name_of(hero)} looks {hero['main character / share']:.1f} times as"
             " often as chance at the main character.",
             f"The most common kind of word has {r['alike']['trained']['distinct']:.0%} of a neuron's {TOP} favourite tokens"
             f" (shuffled {r['alike']['shuffled']['distinct']:.0%}, untrained {r['alike']['untrained']['distinct']:.0%})."]
    if r["main character"]:
        best, silenced = r["main character"][0], r["main character silenced"]["the best"]
        lines.append(f"One neuron tells the first mention of the main character from later ones in {best['area, later']:.0%} of cases;"
                     f" without it, later mentions cost {silenced['later']:+.3f} nats.")
    return "<ul class=\"big\">" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def compare(results):
    """HTML of a table and a chart over runs, or "" for one."""
    if len(results) < 2:
        return ""
    rows, points = [], {"heads not mixed": [], "untrained ": [], "neurons' favourites of one kind": [], "untrained": []}
    for r in results:
        c, shares = r["config"], [np.mean([h["kind"] != "mixed" for h in r[key]]) for key in ("heads", "untrained heads")]
        area = [r["main character"][0]["area, later"], r["main character, untrained"][1]] if r["main character"] else [None] * 2
        alike = [r["alike"][name]["distinct"] for name in ("trained", "untrained", "shuffled")]
        rows.append([r["run"], f"{c['n_layer']} × {c['n_embd']}, {c['n_head']} heads", r["dataset"], r["loss"],
                     *shares, correlation(r["heads"]), *alike, *area])
        for name, value in zip(points, (*shares, *alike[:2])):
            points[name].append((r["parameters"], value))
    header = ["run", "layers × width", "stories", "loss", "heads not mixed", "untrained", "correlation of the axes",
              "neurons: one kind", "untrained", "shuffled", "main character", "untrained"]
    return (f"<h2>Runs compared</h2>{table(header, rows)}<div class=\"charts\">"
            + chart("Against size", "parameters", "share", points, log_x=True)
            + chart("Against depth", "layers", "share", {name: [(r["config"]["n_layer"], y) for r, (_, y) in zip(results, some)]
                                                         for name, some in points.items()}, lines=False) + "</div>")


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of runs, such as out/a; the newest if none is named")
    parser.option("dataset", "", "read this dataset's validation stories instead of the run's own")
    parser.option("stories", 200, "how many of them, at least 10")
    parser.option("seed", 1, "of the controls")
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    if args.stories < 10:
        sys.exit(f"--stories={args.stories} must be at least 10")
    device, _ = pick_device(args.device, "float32")
    found = [study(run, args.dataset, args.stories, args.seed, device) for run in args.runs or [find_run()]]
    compared = compare([result for result, _ in found])
    for result, maps in found:
        c = result["config"]
        body = (f"{EXTRA}<p>{c['n_layer']} layers of {c['n_embd']} channels and {c['n_head']} heads, {result['parameters']:,} parameters; "
                f"{result['stories']} validation stories of {escape(result['dataset'])}, {result['loss']:.3f} nats a token.</p>"
                + in_short(result) + compared + show_heads(result, maps) + show_neurons(result) + show_skills(result))
        folder = os.path.dirname(result["run"]) if result["run"].endswith(".pt") else result["run"]
        for name, text in (("interpret.html", page(f"Inside {result['run']}", body)),
                           ("interpret.json", json.dumps(result, ensure_ascii=False))):
            path = os.path.join(folder, name)
            with open(path + ".tmp", "w", encoding="utf-8") as f:
                f.write(text)
            os.replace(path + ".tmp", path)
        print(f"{folder}/interpret.html and interpret.json written")


if __name__ == "__main__":
    start(main)

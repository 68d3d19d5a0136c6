"""Look inside: what each attention head and each neuron does, on validation stories.

    python interpret.py                             the newest run: interpret.html and interpret.json in its folder
    python interpret.py out/a out/b                 several, compared
    python interpret.py out/a-* out/b-* --seeds     … and seeds of one setting as one

Layers, heads and neurons are counted from 0, as in the code: layer 3 is model.blocks[3].
"""
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import model as architecture
from eval import HERE, passes, read_spans, score, settings_of
from interpret_page import inside, summary
from model import GPT, find_run, load_model, norm, pick_device
from prepare import SKILLS, Parser, load_meta, load_tokenizer, load_tokens, start
from report import over_seeds, print_table, table, write_whole
from world import LISTS, VOCABULARY, forms_of

FAR = 64          # what attention owes to distance is measured over so many, from positions with as many behind them
TOP = 20          # a neuron is judged by the tokens that excite it most
LEAST, TIMES = 0.2, 2  # a distance head: distance explains this share at least, and so many times what words explain

# -----------------------------------------------------------------------------------------------------------------
# stories as words: what kind of word each token belongs to, and whom the story is about

KINDS = ("punctuation", "function", "noun", "verb", "adjective", "name", "other")
FUNCTION = set("""a an the this that these those my your his her its our their some any no every each all both another
    i you he she it we they me him them us who what which whose something everyone and or but so because if when while
    then than as until after before where how why to of in on at by for with from into out up down off over under about
    around through away near behind inside outside be am is are was were been being do does did done have has had will
    would can could should may might must not very too just also only again there now other more one upon s t m d ll re
    ve don didn doesn couldn wouldn wasn weren isn""".split())
MORE_NOUNS = "bird birds animal animals room rooms mommy daddy mama papa mr mrs".split()
NO_NAMES = {word.capitalize() for word in LISTS["family"] + LISTS["days"] + MORE_NOUNS}
ROLES = ("", "first", "later", "capital")  # the main character's name, first and later; other capitalised words


def list_words():
    """{word: kind} of all forms of the words in data/words.json. -ing and past are verbs; else a word of several kinds
    is an adjective, or else a noun ("a walk")."""
    known = dict.fromkeys(MORE_NOUNS, "noun")
    for kind, forms in (("verb", ("ing", "past")), ("adjective", ("",)), ("noun", ("", "s")), ("verb", ("", "s"))):
        for word in sorted(VOCABULARY[kind + "s"]):
            for form in forms:
                known.setdefault(forms_of(word)[form], kind)
    return known


def read_stories(lists, encoding, block_size, device="cpu"):
    """Stories (lists of ids, <|endoftext|> first) as tensors (N, T), those of like length side by side: tokens idx,
    padded with <|endoftext|>; kind (index into KINDS) and role (into ROLES) of the word that a token's last character
    belongs to; real, where kind >= 0: neither padding nor the first; pieces [N][T]: each token's text.

    A name is a capitalised word that stands within a sentence and is hardly ever written small; the main character is
    the one whose name the story has most often within its sentences."""
    lists, known, texts = sorted(lists, key=lambda ids: min(len(ids), block_size)), list_words(), []
    for ids in lists:
        text, starts = encoding.decode_with_offsets(ids[1:])  # whole: a cut may halve a character
        starts = [*starts, len(text)][:block_size]
        texts.append((text[:starts[-1]], starts))
    within = [Counter(re.findall(r"(?<=[\w,] )[A-Z][^\W\d_]+", text)) for text, _ in texts]
    small = Counter(word for text, _ in texts for word in re.findall(r"[^\W\d_]+", text) if word.islower())
    names = {word for word, n in sum(within, Counter()).items() if small[word.lower()] < n / 10} - NO_NAMES
    idx, kinds, roles, pieces = [], [], [], []
    for ids, (text, starts), found in zip(lists, texts, within):
        hero = max(names & found.keys(), key=found.get, default=None)
        word_at = {i: word for word in re.finditer(r"[^\W\d_]+", text) for i in range(*word.span())}
        first = next((word.start() for word in word_at.values() if word[0] == hero), 0)
        kind, role = [-1], [0]
        for end in starts[1:]:
            word = word_at.get(end - 1)
            name = word[0] if word else ""
            lower = name.lower()
            kind.append(KINDS.index(
                "name" if name in names else "function" if lower in FUNCTION else known[lower] if lower in known else
                "verb" if re.search(r"\w\w(ed|ing)$", lower) else "other" if name else "punctuation"))
            role.append(0 if not name[:1].isupper() else 3 if name != hero else 1 + (word.start() > first))
        for rows, row in ((idx, ids[:block_size]), (kinds, kind), (roles, role)):
            rows.append(torch.tensor(row, device=device))
        pieces.append([""] + [text[a:b] for a, b in zip(starts, starts[1:])])
    pad = lambda rows, value: nn.utils.rnn.pad_sequence(rows, True, value)
    kind = pad(kinds, -1)
    return SimpleNamespace(idx=pad(idx, encoding.eot_token), kind=kind, real=kind >= 0, role=pad(roles, 0),
                           pieces=pieces)


def batches(stories, title, tokens=2048, most=None):
    """Under a progress bar: slices of stories of like length, an even number each, and the longest length in each; of
    about `most` stories of all lengths."""
    lengths, at, found = stories.real.sum(1) + 1, 0, []
    while at < len(lengths):
        n = max(2, tokens // int(lengths[at]) // 2 * 2)
        found.append((slice(at, min(at + n, len(lengths))), int(lengths[at:at + n].max())))
        at += n
    return tqdm(found[::max(1, round(len(lengths) / (most or len(lengths))))], desc=title, leave=False, disable=None)


# -----------------------------------------------------------------------------------------------------------------
# watching and silencing, from outside the model


@contextmanager
def watch(modules):
    """A list, to which each call of one of `modules` adds what goes in."""
    seen = []
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watch_attention():
    """A list, to which each layer adds the logits of its attention, (B, H, T, T), -inf for what comes later: their
    softmax is the attention. Taken where model.py hands q and k to its attend()."""
    seen, attend = [], architecture.attend

    def record(q, k, v, mask):
        logits = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        seen.append((logits if mask is None else logits + mask).masked_fill(future, -math.inf))
        return attend(q, k, v, mask)
    architecture.attend = record
    try:
        yield seen
    finally:
        architecture.attend = attend


@contextmanager
def silence(projection, columns=slice(None), where=True):
    """Zero these columns of what a projection reads, everywhere or where the mask (B, T) says: a head's share of
    attn.proj, a neuron's of mlp.proj. Everywhere, that equals zeroing those columns of its weights."""
    def zero(_, args):
        x = args[0].clone()
        x[..., columns] = x[..., columns].masked_fill(torch.as_tensor(where, device=x.device)[..., None], 0)
        return (x,)
    hook = projection.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        hook.remove()


def without_each(model, measure, title):
    """{None: what measure() says of the whole model, (layer, head): with that head silenced, (layer, None): without
    the whole layer, attention and MLP}."""
    found, size = {None: measure()}, model.config.n_embd // model.config.n_head
    for layer, block in enumerate(tqdm(model.blocks, desc=title, leave=False, disable=None)):
        with silence(block.attn.proj), silence(block.mlp.proj):
            found[layer, None] = measure()
        for head in range(model.config.n_head):
            with silence(block.attn.proj, slice(head * size, (head + 1) * size)):
                found[layer, head] = measure()
    return found


def untrained(model, seed):
    """The same shape, all weights drawn anew, also those that training starts at zero: else no layer did anything."""
    torch.manual_seed(seed)
    control = GPT(model.config)
    for p in control.parameters():
        if not p.any():
            nn.init.normal_(p, std=p.size(1) ** -0.5)
    return control.to(model.head.weight.device).eval()


# -----------------------------------------------------------------------------------------------------------------
# heads


def find_targets(idx, kind, role, articles):
    """{what might be looked at: (B, T, T) bool, true where query i would look so at an earlier key j}; idx, kind, role
    (B, T) as in read_stories; articles: the ids of a, an and the."""
    T = idx.size(1)
    same = idx[:, :, None] == idx[:, None, :]  # (B, T, T)
    noun, open_articles = kind == KINDS.index("noun"), torch.isin(idx, articles)
    named = torch.zeros_like(same)
    for step in (1, 2, 3):  # an article, up to two other words, a noun: earlier mentions of that noun
        here = open_articles & F.pad(noun[:, step:], (0, step))
        named |= here[:, :, None] & F.pad(same[:, step:], (0, 0, 0, step))
        open_articles = open_articles & ~here
    earlier = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril(-1)
    earlier[:, 0] = False  # <|endoftext|> is not looked at
    hero = (role == 1) | (role == 2)
    return {"main character": hero[:, None] & earlier, "nouns": noun[:, None] & earlier, "own noun": named & earlier,
            "same token": same & earlier, "induction": F.pad(same[:, :, :-1], (1, 0)) & earlier,
            "previous token": (earlier & earlier.triu(-1)).expand_as(same)}


def explained(sums, counts, squares):
    """R² (L, H) of a value by the mean of its group, where the means come from the other half of the stories: sums
    (L, 2, G, H) and counts (2, G, 1) of each half's groups, sum of squares (L, 2, H)."""
    mean = sums.flip(1) / counts.flip(0).clamp(min=1)
    return (2 * mean * sums - counts * mean**2).sum((1, 2)) / squares.sum(1)


@torch.inference_mode()
def study_heads(model, stories, articles, title="heads"):
    """[{figure: value}] of every head, layer by layer; what the figures mean is said in show_heads."""
    c, device = model.config, stories.idx.device
    L, H, far, K = c.n_layer, c.n_head, min(FAR, c.block_size // 2), len(KINDS) + 1
    zeros = lambda *shape: torch.zeros(*shape, device=device)
    by = {"distance": (zeros(L, 2, far, H), zeros(2, far, 1)),
          "words": (zeros(L, 2, c.vocab_size * K, H), zeros(2, c.vocab_size * K, 1))}
    squares, sums, seen_by = zeros(L, 2, H), defaultdict(lambda: zeros(L, H)), Counter()
    for rows, T in batches(stories, title):
        if T <= far:  # stories too short for a query with `far` keys behind it
            continue
        idx, kind, real = (x[rows, :T] for x in (stories.idx, stories.kind, stories.real))
        with watch_attention() as seen:
            model(idx)
        targets = find_targets(idx, kind, stories.role[rows, :T], articles)
        late = real[:, far:]  # (B, Q): the queries with `far` keys behind them
        queries, behind = torch.arange(far, T, device=device), torch.arange(far, device=device)
        keys = queries[:, None] - behind  # (Q, far); <|endoftext|> is not among them
        half = (torch.arange(len(idx), device=device) % 2)[:, None].expand_as(late)[late]  # (N,)
        words = (idx[:, keys] * K + kind[:, far:, None] + 1)[late]  # (N, far): the key's token and the query's kind
        groups = {"distance": half[:, None] * far + behind, "words": half[:, None] * c.vocab_size * K + words}
        for name, group in groups.items():
            by[name][1].view(-1).index_add_(0, group.flatten(), torch.ones(group.numel(), device=device))
        distance = (queries[:, None] - torch.arange(T, device=device)).clamp(min=0).float()  # (Q, T)
        seen_by["late"] += len(half)
        for i, logits in enumerate(seen):
            log_p = logits[:, :, queries[:, None], keys].permute(0, 2, 3, 1)[late]  # (N, far, H)
            log_p = log_p - log_p.mean(1, keepdim=True)  # each query for itself
            squares[i].index_add_(0, half, log_p.square().sum(1))
            for name, group in groups.items():
                by[name][0][i].view(-1, H).index_add_(0, group.flatten(), log_p.flatten(0, 1))
            p = logits.softmax(-1)
            sums["start"][i] += torch.einsum("bhi,bi->h", p[:, :, far:, 0], late.float())
            p[..., 0] = 0  # from here on without <|endoftext|>, on which a head may rest
            p = p / p.sum(-1, keepdim=True).clamp(min=1e-9)
            sums["mean distance"][i] += torch.einsum("bhij,ij,bi->h", p[:, :, far:], distance, late.float())
            sums["entropy"][i] += torch.einsum("bhij,bi->h", torch.special.entr(p[:, :, far:]), late.float())
            for name, target in targets.items():
                could = (target.any(-1) & real).float()  # (B, T)
                sums[name][i] += torch.einsum("bhij,bij,bi->h", p, target.float(), could)
                if i == 0:
                    share = target.sum(-1) / torch.arange(T, device=device).clamp(min=1)  # of the text so far
                    seen_by.update({name: could.sum().item(), (name, "share"): (share * could).sum().item()})
    figures = {name: explained(*pair, squares) for name, pair in by.items()}
    profile = (by["distance"][0].sum(1) / by["distance"][1].sum(0)).cpu().numpy()  # (L, far, H)
    for name, total in sums.items():
        figures[name] = total / max(1, seen_by[name if name in targets else "late"])
        if name in targets:
            figures[name + " / share"] = total / max(1e-9, seen_by[name, "share"])
    heads = []
    for i, h in np.ndindex(L, H):
        head = {"layer": i, "head": h, **{name: figure[i, h].item() for name, figure in figures.items()}}
        peak = min(int(profile[i, :, h].argmax()), far - 2)
        head["decay"] = float(-np.polyfit(np.arange(peak, far), profile[i, peak:, h], 1)[0])
        heads.append({**head, "type": head_type(head), "peak": peak, "profile": profile[i, :, h].round(4).tolist()})
    return heads


def head_type(head):
    by, words = head["distance"], head["words"]
    return ("distance" if by >= max(LEAST, TIMES * words) else
            "semantic" if words >= max(LEAST, TIMES * by) else "mixed")


TELLING = {"distance": "the most by distance", "words": "the most by words", "loss rise": "costs most when silenced",
           "own noun / share": "articles look at their noun", "main character / share": "looks at the main character"}


def study_maps(model, stories, heads, T=40):
    """[{layer, head, why, words, attention}]: some telling heads on the beginning of the story that names its main
    character most; words (T), attention (T, T): row i looks at column j."""
    named = ((stories.role == 1) | (stories.role == 2))[:, :T].sum(1)
    row = int((named * stories.real[:, 1:T].all(1)).argmax())
    words = [piece.strip(" ").replace("\n", "¶")[:10] for piece in ["start", *stories.pieces[row][1:T]]]
    with torch.inference_mode(), watch_attention() as seen:
        model(stories.idx[row:row + 1, :len(words)])
    chosen = defaultdict(list)
    for figure, why in TELLING.items():
        best = max(heads, key=lambda head: head[figure])
        chosen[best["layer"], best["head"]].append(why)
    return [{"layer": layer, "head": head, "why": ", ".join(why), "words": words,
             "attention": [[round(p, 3) for p in row] for row in seen[layer][0, head].softmax(-1).tolist()]}
            for (layer, head), why in chosen.items()]


# -----------------------------------------------------------------------------------------------------------------
# neurons


def most_common(x):
    """(share, value), (M,) each, of what stands most often in each column of x (K, M)."""
    n, at = (x[:, None] == x).sum(1).max(0)
    return n / len(x), x.gather(0, at[None])[0]


def area(hits, others):
    """Area under the ROC curve (M,): how often a row of hits (P, M) is above one of others (N, M); ties count half."""
    ordered, hits = others.T.contiguous().sort(1).values, hits.T.contiguous()
    below = torch.searchsorted(ordered, hits) + torch.searchsorted(ordered, hits, right=True)
    return below.float().mean(1) / 2 / len(others)


@torch.inference_mode()
def study_neurons(model, stories, shuffle=False, title="neurons"):
    """(one namespace a layer, [{layer, neuron, areas under the curve}] of main character neurons, the best first).

    places (TOP, M): where in stories.idx, flattened, each of M neurons is most excited; most (M,): how much at the
    first; kinds (TOP, M): of the TOP distinct tokens that excite it most; idle (M,): there are fewer; share: of the
    most common `token` at those places, of the most common kind of word there (`any`) and among `distinct` tokens.
    shuffle: a control, in which activations are given to places drawn by chance."""
    V, longest, device = model.config.vocab_size, stories.idx.size(1), stories.idx.device
    tokens, kinds, roles = stories.idx.flatten(), stories.kind.flatten(), stories.role.flatten()
    M = 4 * model.config.n_embd
    layers = [SimpleNamespace(top=torch.zeros(TOP, M, device=device), best=torch.zeros(V, M, device=device), named=[],
                              places=torch.zeros(TOP, M, dtype=torch.int64, device=device)) for _ in model.blocks]
    named = []
    for rows, T in batches(stories, title):
        real = stories.real[rows, :T]
        place = torch.arange(len(tokens), device=device).view(-1, longest)[rows, :T][real]  # (N,)
        named.append(place[roles[place] > 0])
        with watch(block.mlp.proj for block in model.blocks) as seen:
            model(stories.idx[rows, :T])
        for layer, hidden in zip(layers, seen):
            hidden = hidden[real]  # (N, M)
            hidden = hidden[torch.randperm(len(hidden), device=device)] if shuffle else hidden
            layer.named.append(hidden[roles[place] > 0])
            layer.best.scatter_reduce_(0, tokens[place][:, None].expand(-1, M), hidden, "amax")
            layer.top, at = torch.cat((layer.top, hidden)).topk(TOP, 0)
            layer.places = torch.cat((layer.places, place[:, None].expand(-1, M))).gather(0, at)
    used = torch.zeros(V, len(KINDS), device=device)  # what kind of word a token most often belongs to
    used.index_put_((tokens[kinds >= 0], kinds[kinds >= 0]), torch.tensor(1.0, device=device), accumulate=True)
    named, areas = torch.cat(named), []
    groups = [(roles[named] == role) & (named // longest % 2 == odd) for odd in (0, 1) for role in (1, 2, 3)]
    for i, layer in enumerate(layers):
        excited, favourites = layer.best.topk(TOP, 0)
        layer.most, layer.idle, layer.kinds = layer.top[0], excited[-1] <= 0, used.argmax(1)[favourites]
        layer.share = {"token": most_common(tokens[layer.places])[0], "any": most_common(kinds[layer.places])[0],
                       "distinct": most_common(layer.kinds)[0]}
        if all(group.any() for group in groups):  # chosen on the even stories, measured on the odd ones
            even, even_later, even_capital, odd, odd_later, odd_capital = (torch.cat(layer.named)[g] for g in groups)
            chosen = torch.minimum(area(even, even_later), area(even, even_capital)).tolist()
            areas += [{"layer": i, "neuron": n, "chosen by": a, "later": b, "capital": c} for n, (a, b, c) in
                      enumerate(zip(chosen, area(odd, odd_later).tolist(), area(odd, odd_capital).tolist()))]
        del layer.best, layer.named, layer.top
    return layers, sorted(areas, key=lambda x: -x["chosen by"])


def sum_up(layers):
    """{share: mean over the neurons that are not idle; layers: mean of `distinct` by layer; spread: its distribution
    in steps of 1 / TOP; idle: how many are}."""
    shares = [{name: x[~layer.idle] for name, x in layer.share.items()} for layer in layers]
    every = {name: torch.cat([x[name] for x in shares]) for name in shares[0]}
    spread = torch.bincount((every["distinct"] * TOP).round().long(), minlength=TOP + 1) / len(every["distinct"])
    return {**{name: x.mean().item() for name, x in every.items()}, "spread": spread.tolist(),
            "layers": [x["distinct"].mean().item() for x in shares], "idle": sum(int(x.idle.sum()) for x in layers)}


def list_neurons(layers, shuffled, stories):
    """[{figure: value, "excerpts": [[before, token, after]]}] of every neuron, the most selective first: whose most
    common kind among its distinct tokens passes that kind's share among shuffled neurons' the most."""
    usual = torch.bincount(torch.cat([x.kinds[:, ~x.idle].flatten() for x in shuffled]), minlength=len(KINDS))
    neurons, longest = [], stories.idx.size(1)
    for i, layer in enumerate(layers):
        share, kind = most_common(layer.kinds)
        excess = (share - (usual / usual.sum())[kind]).masked_fill(layer.idle, -1)
        values = zip(*(x.tolist() for x in (layer.places.T, kind, excess, layer.most, *layer.share.values())))
        for n, (places, kind, excess, most, *shares) in enumerate(values):
            texts = [(stories.pieces[place // longest], place % longest) for place in places[:5] if most > 0]
            excerpts = [["".join(t[max(0, at - 7):at]), t[at], "".join(t[at + 1:at + 4])] for t, at in texts]
            shares = {name: round(share, 2) for name, share in zip(layer.share, shares)}
            neurons.append({"layer": i, "neuron": n, "kind": KINDS[kind], "excess": round(excess, 3),
                            "most": round(most, 3), **shares, "excerpts": excerpts})
    return sorted(neurons, key=lambda n: -n["excess"])


@torch.inference_mode()
def loss_without_neurons(model, stories, groups):
    """[[at later mentions of the main character, elsewhere, at later mentions if silenced at the first alone]]: how
    many nats more a token costs with each group of neurons, [(layer, neuron)], silenced."""
    rises, counts = torch.zeros(len(groups), 3), torch.zeros(3)
    for rows, T in batches(stories, "silencing neurons", most=100):
        idx, real, role = (x[rows, :T] for x in (stories.idx, stories.real, stories.role))
        x, y, later, other = idx[:, :-1], idx[:, 1:], (role == 2)[:, 1:], (real & (role != 2))[:, 1:]
        whole = model(x, y)
        counts += torch.tensor([later.sum(), other.sum(), later.sum()])
        for group, rise in zip(groups, rises):
            for where, parts in ((True, ((0, later), (1, other))), ((role == 1)[:, :-1], ((2, later),))):
                with ExitStack() as stack:
                    for layer, neuron in group:
                        stack.enter_context(silence(model.blocks[layer].mlp.proj, [neuron], where))
                    nats = model(x, y) - whole
                for i, part in parts:
                    rise[i] += nats[part].sum().item()
    return (rises / counts.clamp(min=1)).tolist()


# -----------------------------------------------------------------------------------------------------------------
# where a skill lives


@torch.inference_mode()
def study_lens(model, encoding, probes):
    """[{text, right, wrong, lead}]: by how many nats the right word leads the wrong one, at the first token in which
    they differ, if the head reads the state before each layer and after the last (logit lens, nostalgebraist 2020)."""
    found = []
    for probe in probes:
        words = probe["right"][0], probe["wrong"][0]
        right, wrong = ([encoding.eot_token] + encoding.encode_ordinary(probe["prompt"] + word) for word in words)
        same = next((i for i, (a, b) in enumerate(zip(right, wrong)) if a != b), 0)
        if same:
            with watch([*model.blocks, model.head]) as seen:
                model(torch.tensor([right[:same][-model.config.block_size:]], device=model.head.weight.device))
            states = norm(torch.stack([x[0, -1] for x in seen]))  # (layers + 1, C); what is normed already stays so
            lead = model.head.weight[right[same]] - model.head.weight[wrong[same]]
            found.append({"text": probe["prompt"], "right": words[0], "wrong": words[1],
                          "lead": (states @ lead).tolist()})
    return found


def study_skills(model, dataset, encoding):
    """(what is measured on, [{layer, head, skill: share of probes passed}] with each of them silenced, study_lens)."""
    probes, exclusions = read_spans(dataset, 40), read_spans(dataset, 60, by="kind")
    source = "marked words of validation stories"
    if not probes:
        source = "data/probes.json, since these stories carry no marked words"
        with open(os.path.join(HERE, "data", "probes.json"), encoding="utf-8") as f:
            exclusions = json.load(f)
        by_skill = [[p for p in exclusions if p["skill"] == skill][:40] for skill in SKILLS]
        probes = [{**p, "right": p["right"][:1], "wrong": p["wrong"][:1]} for some in by_skill for p in some]
    skill = np.array([p["skill"] for p in probes])
    passed = without_each(model, lambda: passes(model, encoding, probes, "skills"), "silencing, by skill")
    rows = [{"layer": cut and cut[0], "head": cut and cut[1],
             **{name: float(right[skill == name].mean()) for name in SKILLS if name in skill}}
            for cut, right in passed.items()]
    return source, rows, study_lens(model, encoding, [p for p in exclusions if p["kind"] == "exclusion"])


# -----------------------------------------------------------------------------------------------------------------
# the stage


def study(run, args, device):
    """Every number of a run, as plain values: what interpret.json holds, and the page is made of."""
    model, checkpoint = load_model(run, device)
    dataset = args.dataset or checkpoint["datasets"][0]
    meta, encoding, tokens, c = load_meta(dataset), load_tokenizer(dataset), load_tokens(dataset, "val"), model.config
    if meta["tokenizer"]["sha256"] != checkpoint["tokenizer"]:
        sys.exit(f"{run} was trained with another tokenizer than data/{dataset} has: "
                 f"python prepare.py --dataset={dataset} --tokenizer={checkpoint['datasets'][0]}")
    ends = np.flatnonzero(tokens == meta["eot"])[:args.stories + 1].tolist()
    stories = read_stories([tokens[a:b].tolist() for a, b in zip(ends, ends[1:])], encoding, c.block_size, device)
    if stories.idx.size(1) <= min(FAR, c.block_size // 2):
        sys.exit(f"the first {args.stories} validation stories of {dataset} are at most {stories.idx.size(1)} tokens "
                 f"long, too short to see heads at work: name another dataset with --dataset")
    articles = torch.tensor([i for i in range(meta["vocab_size"] - 1) if encoding.decode_single_token_bytes(i).strip()
                             .lower() in (b"a", b"an", b"the")], device=device)
    seed = checkpoint["args"]["seed"] if args.seed is None else args.seed
    control, few = untrained(model, seed), tokens[:ends[:41][-1] + 1]
    heads = study_heads(model, stories, articles)
    loss = without_each(model, lambda: float(score(model, few, meta["eot"]).sum() / (len(few) - 1)), "silencing")
    for head in heads:
        head["loss rise"] = loss[head["layer"], head["head"]] - loss[None]
    trained, heroes = study_neurons(model, stories)
    shuffled, _ = study_neurons(model, stories, shuffle=True, title="shuffled neurons")
    plain, plain_heroes = study_neurons(control, stories, title="untrained neurons")
    best = [(x["layer"], x["neuron"]) for x in heroes[:10]]
    groups = {"the best": best[:1], "the second": best[1:2], "the ten best": best, "ten by chance, in the same layers":
              [(layer, int(torch.randint(4 * c.n_embd, ()))) for layer, _ in best]} if best else {}
    source, skills, lens = study_skills(model, dataset, encoding)
    return {"run": run, "dataset": dataset, "stories": len(stories.idx), "config": vars(c),
            "settings": os.path.basename(run) * run.endswith(".pt") + settings_of(checkpoint),
            "parameters": model.num_params(), "loss": loss[None], "silenced on": min(40, len(stories.idx)),
            "heads": heads, "untrained heads": study_heads(control, stories, articles, "untrained heads"),
            "layers' loss rise": [loss[i, None] - loss[None] for i in range(c.n_layer)],
            "shares": {"trained": sum_up(trained), "shuffled": sum_up(shuffled), "untrained": sum_up(plain)},
            "main character": heroes[:20], "untrained main character": [*plain_heroes, None][0],
            "main character silenced": dict(zip(groups, loss_without_neurons(model, stories, list(groups.values())))),
            "measured on": source, "skills": skills, "lens": lens, "maps": study_maps(model, stories, heads),
            "neurons": list_neurons(trained, shuffled, stories), "top": TOP, "kinds": KINDS,
            "thresholds": {"least": LEAST, "times": TIMES}}


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of runs, such as out/a; the newest if none is named")
    parser.option("dataset", "", "read this dataset's validation stories instead of the run's own")
    parser.option("stories", 200, "how many of them")
    parser.option("seed", None, "of the controls (default: the run's own)", type=int)
    parser.option("seeds", False, "show runs that differ in their seed alone as one: mean, lowest and highest")
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    if args.stories < 10:
        sys.exit(f"--stories={args.stories} are too few: take 10 at least")
    device, _ = pick_device(args.device, "float32")
    found = {}
    for run in args.runs or [find_run()]:
        # of a checkpoint out/a/ckpt-0000064.pt: out/a/ckpt-0000064.interpret.html and .json
        path = run[:-2] if run.endswith(".pt") else os.path.join(run, "")
        found[path] = study(run, args, device)
        write_whole(path + "interpret.json", json.dumps(found[path], ensure_ascii=False))
    results = {r["run"]: summary(r) for r in found.values()}
    if args.seeds:
        results = over_seeds(results, {r["run"]: r["settings"] for r in found.values()})
    for path, result in found.items():
        write_whole(path + "interpret.html", inside(result, results if len(found) > 1 else {}))
        print(f"{path}interpret.html and interpret.json are written")
    if len(found) > 1:
        print_table(table(results))


if __name__ == "__main__":
    start(main)

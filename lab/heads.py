"""Attention heads: what explains each one's attention, distance or words, and which targets it attends to.

Shapes in comments: T tokens of a story, L layers, H heads of a layer, V vocabulary.
"""
from collections import Counter, defaultdict

import numpy as np
import torch
import torch.nn.functional as F

from lab.inside import FIRST, KINDS, NOUN, attention_logits, progress

NEAREST = 64  # only the attention logits of each query for so many nearest keys are explained
MIN_EXPLAINED = 0.2  # distance, or words, is a head's type if it explains at least this share of their variance,
MIN_RATIO = 2  # and at least this many times as much as the other
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

"""Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909): making a tokenizer, trimming a larger one, and loading one.

A tokenizer is a dict of ranks {token's bytes: id}, from which tiktoken makes an encoding."""
import base64
import heapq
import os
import re
import sys
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import pairwise

import regex
import tiktoken

from common.records import EOT

# GPT-2 splits text into words, and merges bytes only inside them (Radford et al. 2019). The pattern is tiktoken's.
GPT2_PATTERN = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")
# Text between spaces. A word never crosses such a border, so each different piece is split into words only once.
PIECES = re.compile(r" ?\S+|\s+(?!\S)|\s")
# The single bytes in GPT-2's order: the printable ones first.
BYTES = sorted(range(256), key=lambda b: (not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b), b))


def train_bpe(words, vocab_size):
    """Learn ranks from {word's bytes: how often it occurs}.

    Every word starts as a list of single bytes. In each step the most frequent pair of neighboring tokens becomes a new
    token; among equally frequent pairs, the one with the smallest ids. Only the words that contain the pair are counted
    again. Training ends at vocab_size - 1 tokens, as <|endoftext|> takes the last id, or when no pair occurs twice."""
    tokens = [bytes([b]) for b in BYTES]
    spellings, frequencies = [[] for _ in words], list(words.values())  # a spelling is a list of token ids
    counts, holders = Counter(), defaultdict(set)  # of each pair: how often it occurs, and in which words

    def spell(i, ids):
        """Give word i a new spelling, and keep `counts` and `holders` up to date."""
        for pair in pairwise(spellings[i]):
            counts[pair] -= frequencies[i]
        for pair in pairwise(ids):
            counts[pair] += frequencies[i]
            holders[pair].add(i)
        spellings[i] = ids

    for i, word in enumerate(words):
        spell(i, [BYTES.index(b) for b in word])
    # The most frequent pair comes out first. A sorted list is a heap. Only pairs with the newest token are pushed
    # later: a merge lowers the counts of all other pairs, or leaves them as they are.
    heap = sorted((-count, pair) for pair, count in counts.items())
    while heap and len(tokens) < vocab_size - 1:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:  # out of date: merging other pairs has lowered the count
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        if -count < 2:  # and no other pair occurs more often
            break
        new, new_pairs = len(tokens), set()
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for i in holders.pop(pair):  # a word that lost the pair to another merge is still here, and stays as it is
            spell(i, merge(spellings[i], pair, new))
            new_pairs.update(neighbors for neighbors in pairwise(spellings[i]) if new in neighbors)
        for new_pair in new_pairs:
            heapq.heappush(heap, (-counts[new_pair], new_pair))
    return {token: i for i, token in enumerate(tokens)}


def merge(ids, pair, new):
    """Replace each occurrence of `pair` in `ids` by the id `new`, from left to right."""
    merged = []
    for token in ids:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new
        else:
            merged.append(token)
    return merged


def trim_bpe(ranks, counts, vocab_size):
    """The ranks of the most used tokens of a larger tokenizer, from {token: how often it occurs}.

    BPE can form a token only from the two tokens that it is merged from. So tokens are added in order of use, each
    together with the parts that are still missing, while they fit into vocab_size - 1. The merges keep their order."""
    chosen = {bytes([b]) for b in BYTES}
    for token in sorted(ranks, key=lambda token: (-counts[token], ranks[token])):
        missing = missing_parts(token, ranks, chosen)
        if len(chosen) + len(missing) <= vocab_size - 1:
            chosen |= missing
    return {token: i for i, token in enumerate(sorted(chosen, key=ranks.get))}


def missing_parts(token, ranks, chosen):
    """What `chosen` needs before BPE can form `token`: the token itself, its two parts, their parts, and so on."""
    if token in chosen:
        return set()
    first, second = parts_of(token, ranks)
    return {token} | missing_parts(first, ranks, chosen) | missing_parts(second, ranks, chosen)


def parts_of(token, ranks):
    """The two tokens that are merged into `token`: merge its bytes, lowest rank first, until two parts are left.

    A file of ranks does not store these merges, but it implies them: b"the" may come from b"t" and b"he"."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = pair_ranks.index(min(pair_ranks))  # of equal ranks, the leftmost
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def make_encoding(ranks):
    """The tiktoken.Encoding of ranks. <|endoftext|> gets the next free id."""
    return tiktoken.Encoding("stories", pat_str=GPT2_PATTERN.pattern, mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


def load_ranks(folder):
    """Ranks {bytes: id} of the tokenizer in `folder`, or in data/`folder`."""
    for path in (f"{folder}/tokenizer.tiktoken", f"data/{folder}/tokenizer.tiktoken"):
        if os.path.exists(path):
            with open(path, "rb") as file:
                return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file)}
    sys.exit(f"no tokenizer.tiktoken in {folder}: run python prepare.py --dataset={os.path.basename(folder)}")


def load_tokenizer(dataset):
    """The tiktoken.Encoding of a dataset. Its <|endoftext|> is `eot_token`."""
    return make_encoding(load_ranks(f"data/{dataset}"))


cached_tokenizer = lru_cache(maxsize=1)(load_tokenizer)  # for workers, each of which loads it only once

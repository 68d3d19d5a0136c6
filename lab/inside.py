"""What lab.interpret needs in order to look inside: stories as words, and a model observed and ablated from outside.

Shapes in comments: B stories, T tokens of a story, C channels, L layers, H heads of a layer.
"""
import math
import re
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import model as architecture
from lab.telling import LISTS, VOCABULARY, forms_of

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
                     "make the same change in attention_logits() of lab/inside.py")
        return y
    architecture.attend = attend_and_capture
    try:
        model(ids[None])
    finally:
        architecture.attend = attend
    if len(captured) != len(model.blocks):
        sys.exit(f"the {len(model.blocks)} layers of this model.py called attend() {len(captured)} times, and "
                 "lab/inside.py sees attention only there: let each layer call it once")
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


def projections(model):
    """The modules whose inputs are the neurons of each layer."""
    return [block.mlp.proj for block in model.blocks]

"""Lesson 12: the same world with other names: what is knowledge in a trained model, and what is skill?

`renamed` is `world` with an invented word for every name and every noun: milk may be a "nopik", wherever it stands. What
the model knows of cows and milk is worth nothing there; how to tell who has what, it may still know.
"""
import json
import os
import random
import re

from lesson import command_line, grade, prepare, run_main, train, write_world

from common import atomic_write
from lab.world import LISTS, VOCABULARY, article, forms_of

MODEL = {"n_layer": 4, "n_embd": 64}


def invent_words():
    """{word: invented word} for all names and nouns and their plurals, but for nouns that are other words as well.

    An invented word begins with a vowel where the word has an "an" before it, so that articles stay right."""
    rng = random.Random(1)
    names = set(LISTS["names"] + LISTS["animal names"])
    nouns = {word for noun in VOCABULARY["nouns"] for word in noun.split()}
    nouns -= VOCABULARY["verbs"] | VOCABULARY["adjectives"] | set(LISTS["count words"])
    invented = {}
    for word in sorted(names | nouns):
        while (new := invent_word(rng, article(word) == "an")) in invented.values():
            pass
        if word in names:
            invented[word] = new.capitalize()
        else:
            invented[word] = new
            invented.setdefault(forms_of(word)["s"], new + "s")
    return invented


def invent_word(rng, starts_with_vowel):
    syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)]
    return rng.choice("aeiou") * starts_with_vowel + "".join(syllables) + rng.choice("kmnprt")


def translate(text, invented):
    """The text with an invented word for each word that has one; words of "Papa Fox" are written large as before."""
    def replace(match):
        word = match[0]
        if word not in invented and word.lower() in invented:
            return invented[word.lower()].capitalize()
        return invented.get(word, word)
    return re.sub(r"[A-Za-z]+", replace, text)


def write_renamed():
    """Write data/renamed/stories.jsonl: the stories of data/world and their spans, translated."""
    path, invented = os.path.join("data", "renamed", "stories.jsonl"), invent_words()
    if os.path.exists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open("data/world/stories.jsonl", encoding="utf-8") as file, atomic_write(path) as output:
        for record in map(json.loads, file):
            story = record["story"]
            for span in record["spans"]:  # they begin and end with a word, so what is before them translates alone
                span["start"], span["end"] = (len(translate(story[:span[side]], invented)) for side in ("start", "end"))
                span["wrong"] = translate(span["wrong"], invented)
            output.write(json.dumps({**record, "story": translate(story, invented)}) + "\n")


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    write_world("world", n=30_000)
    prepare("world")
    write_renamed()
    prepare("renamed", tokenizer="world")

    native, abroad = [], []
    for seed in args.seeds:
        same = {**MODEL, "seed": seed, "max_steps": args.max_steps, "evals": 0}
        known = train(f"out/known-{seed}", dataset="world", max_tokens=5_000_000, **same)
        fresh = train(f"out/renamed-short-{seed}", dataset="renamed", max_tokens=1_000_000, **same)
        moved = train(f"out/moved-{seed}", dataset="renamed", max_tokens=1_000_000, init_from=known, **same)
        grown = train(f"out/renamed-long-{seed}", dataset="renamed", max_tokens=5_000_000, **same)
        native.append(known)
        abroad += [known, fresh, moved, grown]
    grade(native, dataset="world", only="loss,spans")
    grade(abroad, dataset="renamed", only="loss,spans")


if __name__ == "__main__":
    run_main(main)

"""Lesson 12: the same world with other names: what is knowledge in a trained model, and what is skill?

`swapped` is `world` with every name in another name's place, and every noun in another noun's: a ladder may give milk
there, and be called a cow. What a model knows of cows is worth nothing; how to tell who has what, it may still know.
"""
import json
import os
import random
import re

from lesson import command_line, grade, prepare, run_main, train, write_world

from common import atomic_write
from lab.world import LISTS, VOCABULARY, article, forms_of

MODEL = {"n_layer": 4, "n_embd": 64}


def swap_words():
    """{word: the word in its place} for all names, nouns and plurals, but for nouns that are verbs or adjectives too.

    A noun after "an" takes the place of another, so that articles stay right."""
    rng, swapped = random.Random(1), {}
    nouns = VOCABULARY["nouns"] - VOCABULARY["verbs"] - VOCABULARY["adjectives"] - set(LISTS["count words"])
    # no "ice cream", and none whose plural is a noun as well, such as sheep
    nouns = sorted(noun for noun in nouns if noun.isalpha() and forms_of(noun)["s"] not in nouns)
    groups = [sorted(set(LISTS["names"] + LISTS["animal names"])),
              *([noun for noun in nouns if article(noun) == an] for an in ("a", "an"))]
    for group in groups:
        for word, other in zip(group, rng.sample(group, len(group))):
            swapped[word] = other
            if group is not groups[0]:
                swapped.setdefault(forms_of(word)["s"], forms_of(other)["s"])
    return swapped


def translate(text, swapped):
    """The text with each word's other word in its place, with a capital where it had one."""
    def replace(match):
        word = match[0]
        if word not in swapped and word.lower() in swapped:  # at the beginning of a sentence, or in "Papa Fox"
            return swapped[word.lower()].capitalize()
        return swapped.get(word, word)
    return re.sub(r"[A-Za-z]+", replace, text)


def write_swapped():
    """Write data/swapped/stories.jsonl: the stories of data/world and their spans, translated."""
    path, swapped = os.path.join("data", "swapped", "stories.jsonl"), swap_words()
    if os.path.exists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open("data/world/stories.jsonl", encoding="utf-8") as file, atomic_write(path) as output:
        for record in map(json.loads, file):
            story = record["story"]
            for span in record["spans"]:  # they begin and end with a word, so what is before them translates alone
                span["start"], span["end"] = (len(translate(story[:span[side]], swapped)) for side in ("start", "end"))
                span["wrong"] = translate(span["wrong"], swapped)
            output.write(json.dumps({**record, "story": translate(story, swapped)}) + "\n")


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    write_world("world", n=30_000)
    prepare("world")
    write_swapped()
    prepare("swapped", tokenizer="world")

    at_home, abroad = [], []
    for seed in args.seeds:
        same = {**MODEL, "seed": seed, "max_steps": args.max_steps, "evals": 0}
        known = train(f"out/known-{seed}", dataset="world", max_tokens=5_000_000, **same)
        moved = train(f"out/moved-{seed}", dataset="swapped", max_tokens=1_000_000, init_from=known, **same)
        fresh = train(f"out/fresh-{seed}", dataset="swapped", max_tokens=1_000_000, **same)
        at_home.append(known)
        abroad += [known, moved, fresh]
    grade(at_home, dataset="world", only="loss,spans")
    grade(abroad, dataset="swapped", only="loss,spans")


if __name__ == "__main__":
    run_main(main)

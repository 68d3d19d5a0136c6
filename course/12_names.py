"""Lesson 12: the same world with other names: what is knowledge in a trained model, and what is skill?

`swapped` is `world` with names in the places of other names, and nouns in those of other nouns: there, a ladder may
give soup. What a model knows of cows and milk is worth nothing; how to tell who has what, it may still know.
"""
import json
import os
import random
import re

from lesson import command_line, grade, prepare, run_main, train, write_world

from common.files import atomic_write
from lab.telling import LISTS, VOCABULARY, WORDS, article, forms_of

MODEL = {"n_layer": 4, "n_embd": 64}


def swap_words():
    """{word: the word in its place} for names, nouns and plurals, but for those that are other words as well.

    Nouns with "an" are swapped among themselves, so that articles stay right."""
    others = {form for word in VOCABULARY["verbs"] | VOCABULARY["adjectives"] for form in forms_of(word).values()}
    others |= {"back", "can", "home", "will", *WORDS["grammar"], *LISTS["count words"]}
    names = sorted(name for name in LISTS["names"] + LISTS["animal names"] if name.lower() not in others)
    # no "ice cream", and none whose plural is a noun as well, such as sheep
    nouns = [noun for noun in sorted(VOCABULARY["nouns"] - others)
             if noun.isalpha() and forms_of(noun)["s"] not in VOCABULARY["nouns"] | others]
    rng, swapped = random.Random(1), {}
    for group in names, [n for n in nouns if article(n) == "a"], [n for n in nouns if article(n) == "an"]:
        shuffled = rng.sample(group, len(group))
        for word, other in zip(shuffled, shuffled[1:] + shuffled[:1]):  # each takes the place of another
            swapped[word] = other
            if group is not names:
                swapped[forms_of(word)["s"]] = forms_of(other)["s"]
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
    path = os.path.join("data", "swapped", "stories.jsonl")
    if os.path.exists(path):
        return
    swapped = swap_words()
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
        same = {**MODEL, "seed": seed, "max_steps": args.max_steps}
        known = train(f"out/known-{seed}", dataset="world", max_tokens=5_000_000, **same)
        moved = train(f"out/moved-{seed}", dataset="swapped", max_tokens=1_000_000, init_from=known, **same)
        fresh = train(f"out/fresh-{seed}", dataset="swapped", max_tokens=1_000_000, **same)
        at_home.append(known)
        abroad += [known, moved, fresh]
    grade(at_home, dataset="world", only="loss,spans")
    grade(abroad, dataset="swapped", only="loss,spans")


if __name__ == "__main__":
    run_main(main)

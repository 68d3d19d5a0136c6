"""How diverse files of stories are, side by side: python eval.py --stories a.jsonl b.txt"""
import glob
import os
import re
import sys
import zlib
from collections import Counter

from prepare import fingerprint, read_records
from report import print_table


def words_of(text):
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def runs_of(words, n):
    return list(zip(*(words[i:] for i in range(n))))


def describe(path):
    """{figure: text} of a file of stories: how many, how alike, and what their records say of them."""
    from generate import missing  # which knows the inflections, and takes a second to import
    n, seen, runs, grams = Counter(), set(), {}, [set() for _ in range(4)]
    vocabulary, plain, starts, openings, capitals, features, skills = (Counter() for _ in range(7))
    for record in read_records(path):
        story, asked = record["story"], record.get("words") or []
        found = re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", story)
        small = [word.lower() for word in found]
        # of all runs of eight words one in sixteen is kept, the same ones in every story
        kept = [run for run in (zlib.crc32(" ".join(some).encode()) for some in runs_of(small, 8)) if run % 16 == 0]
        shared = Counter(runs[run] for run in kept if run in runs).most_common(1)
        key = fingerprint(story)
        if n["gram words"] < 100_000:
            for i in range(4):
                grams[i].update(runs_of(small, i + 1))
            n["gram words"] += len(small)
        n.update({"copies": key in seen, "near": bool(shared) and shared[0][1] > len(kept) / 2, "words": len(found),
                  "once": "Once upon a time" in story, "asked": len(asked), "missing": len(missing(asked, story))})
        for run in kept:
            runs.setdefault(run, n["stories"])
        n["stories"] += 1
        seen.add(key)
        vocabulary.update(small)
        plain.update(word for word in found if word.islower())
        openings[re.split(r"(?<=[.!?])[\"”]?\s", story.strip(), maxsplit=1)[0]] += 1
        starts[" ".join(found[:4])] += 1
        capitals.update(set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", story)))
        features.update(record.get("features") or ())
        skills.update(span["skill"] for span in record.get("spans") or ())
    if not n["stories"]:
        sys.exit(f"{path} holds no story")
    def share(count):
        return f"{100 * count / n['stories']:.2f} %"
    names = [(name, count) for name, count in capitals.most_common() if plain[name.lower()] < count / 10][:3]
    figures = {"stories": f"{n['stories']:,}", "words a story": f"{n['words'] / n['stories']:.0f}",
               "distinct words": f"{len(vocabulary):,}", "exact copies": share(n["copies"]),
               "near-copies": share(n["near"]), "most common first sentence": share(openings.most_common(1)[0][1])}
    figures.update({f"opening {i}": f"{a} {share(m)}" for i, (a, m) in enumerate(starts.most_common(3), 1)})
    figures["with Once upon a time"] = share(n["once"])
    figures.update({f"name {i}": f"{name} {share(m)}" for i, (name, m) in enumerate(names, 1)})
    figures.update({f"distinct {i}-grams": f"{len(some):,} in {n['gram words']:,} words"
                    for i, some in enumerate(grams, 1)})
    if n["asked"]:
        figures["requested words used"] = f"{100 - 100 * n['missing'] / n['asked']:.1f} %"
    figures.update({f"feature {name}": share(m) for name, m in sorted(features.items())})
    figures.update({f"{skill} spans per 100 words": f"{100 * m / n['words']:.2f}" for skill, m in skills.items()})
    return figures


def compare_stories(paths):
    """Print what `describe` finds, a column a file."""
    paths = [path for pattern in paths for path in sorted(glob.glob(pattern)) or [pattern]]
    for path in paths:
        if not os.path.isfile(path):
            sys.exit(f"no file {path}: name .jsonl or .txt files of stories")
    columns = [describe(path) for path in paths]
    print_table([["", *paths]] + [[name, *(column.get(name, "–") for column in columns)]
                                  for name in dict.fromkeys(name for column in columns for name in column)])

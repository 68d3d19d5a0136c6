"""Lesson 13, part 2: can a model of real stories be taught to reason by mixing in the built-in world?

The default model reads as many real stories each time, and with them none of the world, a third as much, or as much. It
is graded on real stories, on twenty beginnings like those of the interview with the authors (a choice is refused,
somebody does not like something, or keeps a promise), on data/probes.json, and on the world. The first table has the
twenty beginnings; the last one, and eval.json, have data/probes.json in their place.
"""
import os

from lesson import ROOT, command_line, grade, prepare, run, run_main, train, write_world

REAL = 4_000_000  # tokens of real stories
BEGINNINGS = os.path.join(ROOT, "course", "13_beginnings.json")
# {how much of the world for each token of real stories: (tokens, dataset)}
MIXES = {"none": (REAL, "tinystories"), "third": (REAL * 4 // 3, "tinystories:3,told:1"),
         "equal": (REAL * 2, "tinystories:1,told:1")}


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    write_world("world", n=30_000)
    prepare("told", input="data/world", tokenizer="tinystories")

    runs = []
    for seed in args.seeds:
        for name, (tokens, dataset) in MIXES.items():
            runs.append(train(f"out/mix-{name}-{seed}", dataset=dataset, max_tokens=tokens, seed=seed,
                              max_steps=args.max_steps))
    grade(runs, dataset="tinystories", only="probes", probes=BEGINNINGS)
    run("eval.py", *runs, dataset="tinystories", only="loss,probes")
    grade(runs, dataset="told", only="spans")


if __name__ == "__main__":
    run_main(main)

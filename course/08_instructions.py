"""Lesson 8: a model that never saw two kinds of instruction together can follow both at once.

The model of lesson 7 knows the world's stories. It goes on with stories that have instructions before them (words,
features, a summary, a sentence), of which words and a summary never occur together. It is graded on that combination,
and on those that it has seen.
"""
from lesson import command_line, grade, prepare, run, run_main, train, write_world


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    write_world("world", n=30_000)
    prepare("world")
    prepare("asked", input="data/world", tokenizer="world", instruct=True, hold_out="words+summary")
    runs = []
    for seed in args.seeds:
        same = {"n_head": 8, "seed": seed, "max_steps": args.max_steps}
        known = train(f"out/excluding-{seed}", **same)
        runs.append(train(f"out/asked-{seed}", dataset="asked", max_tokens=10_000_000, init_from=known, **same))
    run("lab.completions", *runs, max_tokens=300)
    grade(runs, only="loss")


if __name__ == "__main__":
    run_main(main)

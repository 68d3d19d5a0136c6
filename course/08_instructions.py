"""Lesson 8: a model that never saw two kinds of instruction together can follow both at once.

Instructions (words, features, a summary, a sentence) stand before every story of the world. Words and a summary never
occur together in training; the model is graded on that combination, and on those that it has seen.
"""
from lesson import command_line, grade, prepare, run, run_main, train, write_world


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    write_world("world", n=30_000)
    prepare("asked", input="data/world", instruct=True, hold_out="words+summary")
    runs = []
    for seed in args.seeds:
        runs.append(train(
            out_dir=f"out/asked-{seed}",
            dataset="asked",
            seed=seed,
            max_tokens=5_000_000,
            max_steps=args.max_steps,
            evals=0,
        ))
    run("lab.completions", *runs)
    grade(runs, only="loss")


if __name__ == "__main__":
    run_main(main)

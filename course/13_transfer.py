"""Lesson 13: does what is learned from the built-in world carry over to real stories?

`told` is the world in the tokens of TinyStories. Models learn from real stories alone, and from both: the world first,
both at once, or the world last. All read the same number of tokens of real stories, and are graded on real stories
and on data/probes.json.
"""
from lesson import command_line, grade, prepare, run, run_main, train, write_world

REAL, WORLD = 2_000_000, 6_000_000  # tokens of each


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    write_world("world", n=30_000)
    prepare("told", input="data/world", tokenizer="tinystories")

    runs = []
    for seed in args.seeds:
        same = {"n_layer": 4, "n_embd": 64, "seed": seed, "max_steps": args.max_steps}
        real = train(f"out/real-{seed}", dataset="tinystories", max_tokens=REAL, **same)
        told = train(f"out/told-{seed}", dataset="told", max_tokens=WORLD, **same)
        runs += [real, told,
                 train(f"out/told-then-real-{seed}", dataset="tinystories", max_tokens=REAL, init_from=told, **same),
                 train(f"out/mixed-{seed}", dataset="tinystories:1,told:3", max_tokens=REAL + WORLD, **same),
                 train(f"out/real-then-told-{seed}", dataset="told", max_tokens=WORLD, init_from=real, **same)]
    run("eval.py", *runs, dataset="tinystories", only="loss,probes")
    grade(runs, dataset="told", only="spans")


if __name__ == "__main__":
    run_main(main)

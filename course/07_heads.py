"""Lesson 7: the fewer the layers, the clearer the division of heads, and the meaning of neurons.

Models of 1, 2 and 4 layers with 8 heads each, on real TinyStories, inspected by lab.interpret. No smear, which would
do a part of the heads' work.
"""
from lesson import command_line, grade, run, run_main, train


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    runs = []
    for seed in args.seeds:
        for n_layer in (1, 2, 4):
            runs.append(train(
                out_dir=f"out/inside-{n_layer}x128-{seed}",
                dataset="tinystories",
                n_layer=n_layer,
                n_embd=128,
                n_head=8,
                smear=False,
                seed=seed,
                max_tokens=2_500_000,
                max_steps=args.max_steps,
            ))
    run("lab.interpret", *runs)
    grade(runs, only="loss")


if __name__ == "__main__":
    run_main(main)

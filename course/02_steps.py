"""Lesson 2: skills appear in the same order along one training run, and suddenly, while the mean loss falls smoothly.

The largest model of lesson 1 (the same runs, if they are there), graded at its checkpoints of steps 1, 2, 4, 8, ….
"""
from lesson import command_line, grade, run_main, train


def main(argv=None):
    args = command_line(__doc__, real=True).parse_args(argv)
    prefix = "real-" if args.dataset == "tinystories" else ""
    runs = []
    for seed in args.seeds:
        runs.append(train(
            out_dir=f"out/{prefix}size-4x128-{seed}",
            dataset=args.dataset,
            n_layer=4,
            n_embd=128,
            seed=seed,
            max_tokens=2_500_000,
            max_steps=args.max_steps,
            keep="log",  # keep the weights of steps 1, 2, 4, 8, …
        ))
    grade(runs, only="steps")


if __name__ == "__main__":
    run_main(main)

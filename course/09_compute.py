"""Lesson 9: for each budget of compute there is a best size, which grows with about the square root of the budget.

Three budgets of floating-point operations, and four sizes each: the larger the model, the fewer tokens it sees.
"""
from lesson import command_line, grade, run_main, train

BUDGETS = ["1e12", "3e12", "1e13"]  # FLOPs
SHAPES = [(1, 32), (2, 48), (2, 96), (4, 128)]  # (layers, channels)


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    runs = []
    for seed in args.seeds:
        for flops in BUDGETS:
            for n_layer, n_embd in SHAPES:
                runs.append(train(
                    out_dir=f"out/budget-{flops}-{n_layer}x{n_embd}-{seed}",
                    n_layer=n_layer,
                    n_embd=n_embd,
                    seed=seed,
                    max_flops=flops,
                    max_steps=args.max_steps,
                ))
    grade(runs, only="loss")


if __name__ == "__main__":
    run_main(main)

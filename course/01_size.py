"""Lesson 1: skills appear in an order as models grow: grammar, then facts and context, reasoning last.

Four sizes, from 3,073 to 786,568 parameters without embedding and head, learn from the same 2.5 million tokens. They
are graded on spans (words of held-out stories of the world that need one skill) or, for real stories, on probes
(data/probes.json), and at the checkpoints of steps 1, 2, 4, 8, …, which lesson 2 needs.
"""
from lesson import command_line, grade, run_main, train

SHAPES = [(1, 16), (1, 64), (4, 64), (4, 128)]  # (layers, channels)


def main(argv=None):
    args = command_line(__doc__, real=True).parse_args(argv)
    real = args.dataset == "tinystories"
    runs = []
    for seed in args.seeds:
        for n_layer, n_embd in SHAPES:
            runs.append(train(
                out_dir=f"out/{'real-' if real else ''}size-{n_layer}x{n_embd}-{seed}",
                dataset=args.dataset,
                n_layer=n_layer,
                n_embd=n_embd,
                seed=seed,
                max_tokens=2_500_000,
                max_steps=args.max_steps,
                keep="log",  # keep the weights of steps 1, 2, 4, 8, …
            ))
    grade(runs, only="loss,probes,steps" if real else "loss,spans,steps")


if __name__ == "__main__":
    run_main(main)

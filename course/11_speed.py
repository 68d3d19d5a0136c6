"""Lesson 11: most of the speed is in a few switches.

Bits per byte after one minute on real TinyStories. Each run turns one more switch than the one before, the last two
runs a pair of them.
"""
from lesson import command_line, grade, run_main, train

PLAIN_ATTENTION = {"qk_gain": 0, "value_embeds": False}
PLAIN = {"optimizer": "adamw", "schedule": "cosine", "smear": False, **PLAIN_ATTENTION}
RUNGS = {
    "1-plain": {**PLAIN, "dtype": "float32", "compile": False},
    "2-compiled": {**PLAIN, "dtype": "float32", "compile": True},
    "3-bfloat16": {**PLAIN, "compile": True},
    "4-rate": {**PLAIN, "compile": True, "lr": 0.008},
    "5-muon": {"schedule": "cosine", "smear": False, "compile": True, **PLAIN_ATTENTION},  # at its own rate
    "6-smear-cooldown": {"compile": True, **PLAIN_ATTENTION},
    "7-gain-value-embeds": {"compile": True},
}


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    runs = []
    for seed in args.seeds:
        for name, switches in RUNGS.items():
            runs.append(train(f"out/rung-{name}-{seed}", dataset="tinystories", max_minutes=1, seed=seed,
                              max_steps=args.max_steps, **switches))
    grade(runs, only="loss")


if __name__ == "__main__":
    run_main(main)

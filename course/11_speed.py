"""Lesson 11: most of the speed is in a few switches.

Bits per byte after one minute on real TinyStories. Runs 1 to 9 turn one more switch each; 10 and 11 each make one
change to run 9. `long` gives the best run with AdamW, the fourth, more than twice its tokens.
"""
from lesson import command_line, grade, prepare, run_main, train

PLAIN_ATTENTION = {"qk_gain": 0, "value_embeds": False}
PLAIN = {"optimizer": "adamw", "schedule": "cosine", "smear": False, **PLAIN_ATTENTION}
RUNGS = {
    "1-plain": {**PLAIN, "dtype": "float32", "compile": False},
    "2-compiled": {**PLAIN, "dtype": "float32", "compile": True},
    "3-bfloat16": {**PLAIN, "compile": True},
    "4-rate": {**PLAIN, "compile": True, "lr": 0.008},
    "5-muon": {"schedule": "cosine", "smear": False, "compile": True, **PLAIN_ATTENTION},  # at its own rate
    "6-smear": {"schedule": "cosine", "compile": True, **PLAIN_ATTENTION},
    "7-cooldown": {"compile": True, **PLAIN_ATTENTION},
    "8-gain": {"compile": True, "value_embeds": False},
    "9-value-embeds": {"compile": True},
    "10-vocabulary": {"compile": True, "dataset": "small"},
    "11-batch": {"compile": True, "batch_tokens": 2048},
}


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    prepare("small", input="data/tinystories", vocab_size=2048)
    runs = []
    for seed in args.seeds:
        for name, switches in RUNGS.items():
            options = {"dataset": "tinystories", "max_minutes": 1, "seed": seed, **switches}
            runs.append(train(f"out/rung-{name}-{seed}", max_steps=args.max_steps, **options))
    if 1 in args.seeds:
        train("out/rung-long-1", dataset="tinystories", max_tokens=6_000_000, seed=1, max_steps=args.max_steps,
              **RUNGS["4-rate"])
    grade(runs, only="loss")


if __name__ == "__main__":
    run_main(main)

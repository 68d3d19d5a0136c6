"""Lesson 5, part 3: one task is a warm start for another.

The task is LEGO in any order, for models of two layers. One starts afresh, one has resolved LEGO in order before, and
one has read the stories of the world as single bytes. `mental-long` is the control: as many tokens of the task as the
others see of both.
"""
from lesson import command_line, grade, prepare, run_main, train, write_world

MODEL = {"n_layer": 2, "n_embd": 64, "n_head": 4, "embed_std": 1, "lr": 0.02, "block_size": 40, "batch_tokens": 4000}


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    write_world("mental", n=400_000, kind="lego", min_vars=1, max_vars=4, in_order=False)
    prepare("mental", clean=False, vocab_size=259)
    write_world("lego", n=400_000, kind="lego", min_vars=1, max_vars=3, in_order=True)
    # once more, since a model can go on only with the same tokenizer
    prepare("lego-first", input="data/lego", clean=False, tokenizer="mental")
    write_world("world", n=30_000)
    prepare("bytes", input="data/world", tokenizer="mental")

    runs = []
    for seed in args.seeds:
        same = {**MODEL, "seed": seed, "max_steps": args.max_steps}
        lego = train(f"out/lego-first-{seed}", dataset="lego-first", max_tokens=2_000_000, **same)
        story = train(f"out/story-first-{seed}", dataset="bytes", max_tokens=2_000_000, **same)
        task = {"dataset": "mental", "max_tokens": 1_000_000, **same}
        runs += [train(f"out/mental-short-{seed}", **task),
                 train(f"out/lego-then-mental-{seed}", init_from=lego, **task),
                 train(f"out/story-then-mental-{seed}", init_from=story, **task),
                 train(f"out/mental-long-{seed}", **{**task, "max_tokens": 3_000_000})]
    grade(runs, only="spans", context=80)


if __name__ == "__main__":
    run_main(main)

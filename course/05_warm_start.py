"""Lesson 5, part 3: one task is a warm start for another.

Two tasks, LEGO and the stories of the world as single bytes: each alone, one after the other in both orders, and both
mixed from the start. `lego-long` is the control: as many tokens of LEGO as `story-then-lego` sees of both.
"""
from lesson import command_line, grade, prepare, run_main, train, write_world

MODEL = {"n_layer": 2, "n_embd": 64, "n_head": 4, "embed_std": 1, "lr": 0.005, "evals": 0}


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    write_world("world", n=30_000)
    write_world("lego", kind="lego", min_vars=1, max_vars=3, in_order=True)
    prepare("lego", clean=False, vocab_size=257)
    prepare("bytes", input="data/world", tokenizer="lego")

    graded_on_stories, graded_on_lego = [], []
    for seed in args.seeds:
        same = {**MODEL, "seed": seed, "max_steps": args.max_steps}
        lego = train(f"out/lego-2-{seed}", dataset="lego", max_tokens=4_000_000, **same)  # a run of part 1
        story = train(f"out/story-{seed}", dataset="bytes", max_tokens=2_000_000, **same)
        lego_then_story = train(f"out/lego-then-story-{seed}", dataset="bytes", max_tokens=2_000_000, init_from=lego,
                                **same)
        story_then_lego = train(f"out/story-then-lego-{seed}", dataset="lego", max_tokens=4_000_000, init_from=story,
                                **same)
        lego_long = train(f"out/lego-long-{seed}", dataset="lego", max_tokens=6_000_000, **same)
        both = train(f"out/both-{seed}", dataset="lego:2,bytes:1", max_tokens=6_000_000, **same)
        graded_on_stories += [story, lego_then_story, story_then_lego, both]
        graded_on_lego += [lego, story_then_lego, lego_long, lego_then_story, both]
    grade(graded_on_stories, dataset="bytes", only="loss")
    grade(graded_on_lego, dataset="lego", only="spans")


if __name__ == "__main__":
    run_main(main)

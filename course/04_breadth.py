"""Lesson 4: a small model pays for breadth with depth: more facts in the corpus, less reasoning in the model.

Two sizes learn from two corpora of the world: `deep` with few facts, `broad` with many. The stories of `broad` have
room for less reasoning, so a model sees fewer examples of it in as many tokens. To tell this from the room that facts
take in the model, `broad` is also trained on for longer, until it has shown as much reasoning as `deep`. All models
are graded on the same stories, those of `world`.
"""
from lesson import command_line, grade, prepare, run_main, train, write_world

SHAPES = [(4, 32), (4, 64)]  # (layers, channels)
TOKENS = 3_000_000
AS_MUCH_REASONING = 3_880_000  # tokens of `broad`: `deep` has 2.79 spans of reasoning in 100 words, `broad` 2.18


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    write_world("world", n=30_000)
    prepare("world")
    write_world("deep", n=30_000, facts=0.2)
    prepare("deep", tokenizer="world")
    write_world("broad", n=30_000, facts=3)
    prepare("broad", tokenizer="world")

    runs = []
    for seed in args.seeds:
        for n_layer, n_embd in SHAPES:
            for name, dataset, tokens in (("deep", "deep", TOKENS), ("broad", "broad", TOKENS),
                                          ("broad-longer", "broad", AS_MUCH_REASONING)):
                runs.append(train(
                    out_dir=f"out/{name}-{n_layer}x{n_embd}-{seed}",
                    dataset=dataset,
                    n_layer=n_layer,
                    n_embd=n_embd,
                    seed=seed,
                    max_tokens=tokens,
                    max_steps=args.max_steps,
                ))
    grade(runs, dataset="world", only="loss,spans")


if __name__ == "__main__":
    run_main(main)

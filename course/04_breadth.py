"""Lesson 4: a small model pays for breadth with depth: more facts in the corpus, less reasoning in the model.

One layer of 128 channels, the best shape of lesson 3, learns from three corpora of the world: `wide` has more facts in
it, `deep` more reasoning. All models are graded on the same stories, those of `world`.
"""
from lesson import command_line, grade, prepare, run_main, train, write_world


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    write_world("world", n=30_000)
    prepare("world")
    write_world("wide", n=50_000, facts=3)
    prepare("wide", tokenizer="world")
    write_world("deep", n=50_000, reasoning=3)
    prepare("deep", tokenizer="world")

    runs = []
    for seed in args.seeds:
        for dataset in ("wide", "world", "deep"):
            runs.append(train(
                out_dir=f"out/mix-{dataset}-{seed}",
                dataset=dataset,
                n_layer=1,
                n_embd=128,
                seed=seed,
                max_tokens=5_000_000,
                max_steps=args.max_steps,
                evals=0,
            ))
    grade(runs, dataset="world", only="loss,spans")


if __name__ == "__main__":
    run_main(main)

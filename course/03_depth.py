"""Lesson 3: facts follow width; context and exclusion follow depth.

Four shapes of 0.19M to 0.20M parameters without embedding and head, with two heads in each layer, from one wide layer
to eight narrow ones. A single layer has no value embeddings, which are in every second one; on the world, two layers
are also trained without, to tell what is due to them.
"""
from lesson import command_line, grade, run_main, train

SHAPES = [(1, 128), (2, 92), (4, 64), (8, 44)]  # (layers, channels)
EXPERIMENTS = {
    "world": {"prefix": "depth", "max_tokens": 5_000_000, "only": "loss,spans"},
    "tinystories": {"prefix": "real-depth", "max_tokens": 2_500_000, "only": "loss,probes"},
}


def main(argv=None):
    parser = command_line(__doc__)
    parser.option("dataset", "world", "what to train on", choices=list(EXPERIMENTS))
    args = parser.parse_args(argv)
    experiment = EXPERIMENTS[args.dataset]
    models = {f"{n_layer}x{n_embd}": {"n_layer": n_layer, "n_embd": n_embd} for n_layer, n_embd in SHAPES}
    if args.dataset == "world":
        models["2x92-without"] = {**models["2x92"], "value_embeds": False}
    runs = []
    for seed in args.seeds:
        for name, shape in models.items():
            runs.append(train(
                out_dir=f"out/{experiment['prefix']}-{name}-{seed}",
                dataset=args.dataset,
                **shape,
                n_head=2,
                seed=seed,
                max_tokens=experiment["max_tokens"],
                max_steps=args.max_steps,
                evals=0,
            ))
    grade(runs, only=experiment["only"])


if __name__ == "__main__":
    run_main(main)

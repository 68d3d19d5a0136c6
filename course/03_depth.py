"""Lesson 3: facts follow width; context and exclusion follow depth.

Four shapes of 0.19M to 0.20M parameters without embedding and head, with two heads in each layer, from one wide layer
to eight narrow ones. A single layer has no value embeddings, which are in every second one; on the world, two layers
are also trained without, to tell what is due to them.
"""
from lesson import command_line, grade, run_main, train

SHAPES = [(1, 128), (2, 92), (4, 64), (8, 44)]  # (layers, channels)


def main(argv=None):
    args = command_line(__doc__, real=True).parse_args(argv)
    real = args.dataset == "tinystories"
    models = {f"{n_layer}x{n_embd}": {"n_layer": n_layer, "n_embd": n_embd} for n_layer, n_embd in SHAPES}
    if not real:
        models["2x92-without"] = {**models["2x92"], "value_embeds": False}
    runs = []
    for seed in args.seeds:
        for name, shape in models.items():
            runs.append(train(
                out_dir=f"out/{'real-' if real else ''}depth-{name}-{seed}",
                dataset=args.dataset,
                **shape,
                n_head=2,
                seed=seed,
                max_tokens=2_500_000 if real else 5_000_000,
                max_steps=args.max_steps,
            ))
    grade(runs, only="loss,probes" if real else "loss,spans")


if __name__ == "__main__":
    run_main(main)

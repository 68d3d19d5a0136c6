"""Lesson 6: learned distance heads do what ALiBi builds in, so positions need not be learned.

Four ways to encode positions, trained with a context of 256 tokens and read with 256, then with 512 tokens (learned
positions cannot be read with 512). No smear, which would tell every model about the previous token.
"""
from lesson import command_line, grade, run, run_main, train


def main(argv=None):
    args = command_line(__doc__, real=True).parse_args(argv)
    real = args.dataset == "tinystories"
    runs, longer = [], []
    for seed in args.seeds:
        for pos in ("rope", "alibi", "learned", "none"):
            out_dir = train(
                out_dir=f"out/{'real-' if real else ''}pos-{pos}-{seed}",
                dataset=args.dataset,
                pos=pos,
                n_layer=4,
                n_embd=64,
                n_head=4,
                smear=False,
                seed=seed,
                max_tokens=2_500_000,
                max_steps=args.max_steps,
            )
            runs.append(out_dir)
            if pos != "learned":
                longer.append(out_dir)

    run("lab.interpret", *runs)
    grade(longer, context=512, only="loss")
    grade(runs, only="loss,probes" if real else "loss,spans")


if __name__ == "__main__":
    run_main(main)

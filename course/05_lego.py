"""Lesson 5, parts 1 and 2: each step of reasoning takes a layer.

LEGO: chains of variables to resolve, such as `r = -j, l = -1, j = +l. / l = -1, j = -1, r = +1.` Models of 1, 2 and 4
layers learn from chains of 1 to 3 variables, read as single bytes, and are graded on chains of up to 6, by depth. In
`lego` the variables are resolved along the chain; in `mental` in any order, so that some steps are not yet written.
"""
from lesson import command_line, grade, prepare, run_main, train, write_world


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    for dataset, in_order in (("lego", True), ("mental", False)):
        write_world(dataset, kind="lego", min_vars=1, max_vars=3, in_order=in_order)
        prepare(dataset, clean=False, vocab_size=257)  # 256 bytes and <|endoftext|>
        runs = []
        for seed in args.seeds:
            for n_layer in (1, 2, 4):
                runs.append(train(
                    out_dir=f"out/{dataset}-{n_layer}-{seed}",
                    dataset=dataset,
                    n_layer=n_layer,
                    n_embd=64,
                    n_head=4,
                    embed_std=1,  # both this and the rate are needed to learn anything: see the lesson
                    lr=0.005,
                    seed=seed,
                    max_tokens=4_000_000,
                    max_steps=args.max_steps,
                    evals=0,
                ))
        grade(runs, only="spans")


if __name__ == "__main__":
    run_main(main)

"""Lesson 5, parts 1 and 2: each step of reasoning takes a layer, unless it is written down.

LEGO: chains of variables to resolve, such as `r=-j,l=-1,j=+l`, and below it `l=-1,j=-1,r=+1`. In `lego` the variables
are resolved along the chain, so that each step needs only the value just written; one layer learns from chains of 1 to
3 variables. In `mental` they are resolved in any order, so that some steps are not yet written; 1, 2 and 4 layers learn
from chains of 1 to 4. Both are graded by depth, on chains of up to twice these lengths. As every second layer has value
embeddings and a single one has none, 2 and 4 layers are also trained without.
"""
from lesson import command_line, grade, prepare, run_main, train, write_world

EXPERIMENTS = {
    "lego": {"max_vars": 3, "in_order": True, "block_size": 32, "max_tokens": 4_000_000, "batch_tokens": 2048,
             "models": [(1, True)]},  # layers, and whether there are value embeddings
    "mental": {"max_vars": 4, "in_order": False, "block_size": 40, "max_tokens": 6_000_000, "batch_tokens": 4000,
               "models": [(1, True), (2, True), (4, True), (2, False), (4, False)]},
}


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    for dataset, experiment in EXPERIMENTS.items():
        write_world(dataset, n=400_000, kind="lego", min_vars=1, max_vars=experiment["max_vars"],
                    in_order=experiment["in_order"])
        prepare(dataset, clean=False, vocab_size=259)  # 256 bytes, `=-`, `=+` and <|endoftext|>
        runs = []
        for seed in args.seeds:
            for n_layer, value_embeds in experiment["models"]:
                runs.append(train(
                    out_dir=f"out/{dataset}-{n_layer}{'' if value_embeds else '-without'}-{seed}",
                    dataset=dataset,
                    n_layer=n_layer,
                    value_embeds=value_embeds,
                    n_embd=64,
                    n_head=4,
                    embed_std=1,  # else `=+` and `=-`, which are used alike, stay one vector, in some seeds to the end
                    lr=0.02,
                    # short rows, of one or two chains: beside many others, a chain is learned later or not at all
                    block_size=experiment["block_size"],
                    batch_tokens=experiment["batch_tokens"],
                    max_tokens=experiment["max_tokens"],
                    seed=seed,
                    max_steps=args.max_steps,
                ))
        grade(runs, only="spans", context=80)  # room for the longer chains


if __name__ == "__main__":
    run_main(main)

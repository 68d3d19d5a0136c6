"""Lesson 7, part 2: where in a model that reasons is exclusion, and what does it cost to ablate it there?

The default model, with smaller heads, learns from the world. One half of its spans of exclusion chooses the head and
the neurons that matter most to them; then these are ablated, and the other half, and all other kinds of spans, show
what that costs.
"""
from contextlib import ExitStack

import torch
from lesson import command_line, prepare, run_main, train, write_world

from common.device import pick_device
from common.results import load_subject
from eval import pass_rates, passes, read_spans
from lab.inside import ablate_head, ablate_neurons, projections
from lab.interpret import logit_lens

N_CHOSEN = 10  # neurons ablated together


def exclusion_neurons(model, encoding, probes):
    """[(layer, neuron)], the most important first: the lead of the right word over the wrong one that each neuron
    gives, to first order: its activation times the gradient of the lead, summed over the text and the probes."""
    totals = 0
    for probe in probes:
        right, wrong = (encoding.encode_ordinary(probe["prompt"] + probe[side][0]) for side in ("right", "wrong"))
        n = next(i for i, (a, b) in enumerate(zip(right, wrong)) if a != b)  # where the two part
        ids = torch.tensor([encoding.eot_token, *right[:n]][-model.config.block_size:])
        hidden = []  # of each layer, (1, T, M)
        with ExitStack() as hooks:
            for projection in projections(model):
                hooks.enter_context(projection.register_forward_pre_hook(lambda _, args: hidden.append(args[0])))
            logits = model(ids[None])[0, -1]
        gradients = torch.autograd.grad(logits[right[n]] - logits[wrong[n]], hidden)
        totals = totals + torch.stack([(h * g).sum((0, 1)) for h, g in zip(hidden, gradients)]).detach()  # (L, M)
    order = totals.flatten().argsort(descending=True)
    return [divmod(i, totals.size(1)) for i in order.tolist()]


def exclusion_head(model, encoding, probes):
    """(layer, head) whose ablation costs the most probes."""
    def passed_without(layer, head):
        with ablate_head(model, layer, head):
            return passes(model, encoding, probes).mean()
    heads = [(layer, head) for layer in range(model.config.n_layer) for head in range(model.config.n_head)]
    return min(heads, key=lambda head: passed_without(*head))


def share_by_kind(model, encoding, probes):
    """{kind: % of its probes that the model passes}."""
    rates = pass_rates("kind", probes, passes(model, encoding, probes))
    return {kind: 100 * share for kind, (share, *_) in rates.items()}


def look_for_exclusion(run):
    """(the head and the best neuron; {column: {kind: %}}; the right word's lead after each layer, in nats) of a run."""
    subject = load_subject(run, pick_device("cpu", "float32")[0])
    model, encoding = subject.model, subject.encoding
    probes = read_spans("world", 100, by="kind")
    exclusions = [probe for probe in probes if probe["kind"] == "exclusion"]
    chosen_by = exclusions[::2]
    graded = [probe for probe in probes if probe not in chosen_by]
    layer, head = exclusion_head(model, encoding, chosen_by)
    neurons = exclusion_neurons(model, encoding, chosen_by)
    torch.manual_seed(1)
    drawn = [(at, int(torch.randint(projections(model)[at].in_features, ()))) for at, _ in neurons[:N_CHOSEN]]
    table = {"intact": share_by_kind(model, encoding, graded)}
    for column, ablation in ((f"without head {head} of layer {layer}", ablate_head(model, layer, head)),
                             (f"without neuron {neurons[0][1]} of layer {neurons[0][0]}",
                              ablate_neurons(model, neurons[:1])),
                             (f"without the best {N_CHOSEN} neurons", ablate_neurons(model, neurons[:N_CHOSEN])),
                             (f"without {N_CHOSEN} random ones of the same layers", ablate_neurons(model, drawn))):
        with ablation:
            table[column] = share_by_kind(model, encoding, graded)
    leads = torch.tensor([record["lead"] for record in logit_lens(model, encoding, exclusions)])
    return table, [f"{100 * share:.0f}" for share in (leads > 0).float().mean(0).tolist()]


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    write_world("world", n=30_000)
    prepare("world")
    for seed in args.seeds:
        run = train(f"out/excluding-{seed}", n_head=8, seed=seed, max_steps=args.max_steps)
        table, leads = look_for_exclusion(run)
        print(f"\n{run}: % of spans passed")
        for kind in table["intact"]:
            print(f"{kind:12}" + "".join(f"{column[kind]:6.0f}" for column in table.values()))
        print(*(f"column {number}: {title}" for number, title in enumerate(table, 1)), sep="\n")
        print("% of exclusions in which the right word leads before layer 0, 1, …, and at the end:", ", ".join(leads))


if __name__ == "__main__":
    run_main(main)

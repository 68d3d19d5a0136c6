"""Look inside a run: what each attention head and each neuron does, measured on validation stories.

    python -m lab.interpret                the newest run: interpret.html and interpret.json in its folder
    python -m lab.interpret out/a out/b    several runs, one after the other; lab.compare shows them side by side

Layers, heads and neurons are counted from 0, as in the code: layer 3 is model.blocks[3]. A neuron is one of the inputs
of mlp.proj. The model is observed and ablated from outside, by hooks on its modules, so this also works on a changed
model.py. Where it does not, it says so.

inside.py has what this needs in order to do so, and heads.py what is measured of heads.

Shapes in comments: T tokens of a story, L layers, M neurons of all layers, V vocabulary.
"""
import json
import math
import os
import sys
from collections import Counter

import numpy as np
import torch

import model as architecture
from common import ROOT, CommandLine, run_main
from common.dataset import SKILLS, load_meta, load_tokens, split_stories
from common.device import pick_device
from common.files import atomic_write
from common.results import add_section, load_subject
from common.runs import load_checkpoint, newest_run
from eval import evaluate, read_spans, skill_accuracy
from lab.heads import HEAD_FIGURES, NEAREST, attention_maps, study_heads
from lab.inside import (CAPITAL, FIRST, KINDS, LATER, ablate, ablate_head, ablate_neurons, observe, progress,
                        projections, read_stories, untrained)
from lab.interpret_page import run_page

TOP = 20  # a neuron is described by the kinds of the TOP different tokens that activate it most
SHOWN = 4  # number of neurons of each kind that the page shows,
EXCERPTS = 5  # each with this many excerpts of stories
ABLATION_STORIES = 40  # number of stories on which the loss is measured with each head ablated

# -----------------------------------------------------------------------------------------------------------------
# neurons


@torch.inference_mode()
def collect_activations(model, stories, title):
    """(highest (V, M), shuffled (V, M), capitalized): the highest activation of each neuron on each token; the same if
    activations are assigned to random tokens of the stories; and of each story, all (P, M) at its capitalized words."""
    ids = torch.cat([story.ids[1:] for story in stories])
    random_ids = ids[torch.randperm(len(ids), device=ids.device)].split([len(story.ids) - 1 for story in stories])
    n_neurons = sum(proj.in_features for proj in projections(model))
    highest, shuffled = torch.zeros(2, model.config.vocab_size, n_neurons, device=ids.device)
    capitalized = []
    for story, shuffled_ids in zip(progress(stories, title), random_ids):
        _, inputs = observe(model, projections(model), story.ids)
        hidden = torch.cat(inputs, dim=1)[1:]  # (T - 1, M), without <|endoftext|>
        highest.scatter_reduce_(0, story.ids[1:, None].expand_as(hidden), hidden, "amax")
        shuffled.scatter_reduce_(0, shuffled_ids[:, None].expand_as(hidden), hidden, "amax")
        capitalized.append(hidden[story.role[1:] > 0])
    return highest, shuffled, capitalized


def study_neurons(model, stories, title="neurons"):
    """{"neurons": [{layer, neuron, kind, share}], the most selective first, without those that fewer than TOP tokens
    activate; "share": the mean share; "shuffled": the same for shuffled activations, a control; "main character": what
    rank_main_character gives}."""
    highest, shuffled, capitalized = collect_activations(model, stories, title)
    pairs = torch.cat([story.ids[1:] * len(KINDS) + story.kind[1:] for story in stories])
    counts = torch.bincount(pairs, minlength=len(highest) * len(KINDS)).view(-1, len(KINDS))  # (V, kinds)
    token_kinds = counts.argmax(1)  # (V,): the kind of word that a token belongs to most often
    share, kind = most_common_kind(highest, token_kinds)
    index = [(layer, neuron) for layer, proj in enumerate(projections(model)) for neuron in range(proj.in_features)]
    neurons = [{"layer": layer, "neuron": neuron, "kind": KINDS[kind[i]], "share": round(share[i].item(), 2)}
               for i, (layer, neuron) in enumerate(index) if not share[i].isnan()]
    return {"neurons": sorted(neurons, key=lambda neuron: -neuron["share"]), "share": share.nanmean().item(),
            "shuffled": most_common_kind(shuffled, token_kinds)[0].nanmean().item(),
            "main character": rank_main_character(capitalized, stories, index)}


def most_common_kind(highest, token_kinds):
    """(share (M,), kind (M,)): the most common kind of word among the TOP different tokens that activate a neuron most,
    and its share; nan if fewer tokens activate the neuron at all.

    highest (V, M): activations on each token; token_kinds (V,): the kind of each token."""
    best, tokens = highest.topk(TOP, dim=0)  # (TOP, M)
    kinds = token_kinds[tokens]
    count, row = (kinds[:, None] == kinds).sum(1).max(0)  # (M,)
    kind = kinds.gather(0, row[None])[0]
    return (count / TOP).masked_fill(best[-1] <= 0, math.nan), kind


def auroc(hits, others):
    """Area under the ROC curve (M,): how often a row of hits (P, M) exceeds one of others (N, M); ties count half."""
    hits, others = hits.T.contiguous(), others.T.contiguous().sort(1).values
    below, below_or_equal = torch.searchsorted(others, hits), torch.searchsorted(others, hits, right=True)
    return (below + below_or_equal).float().mean(1) / 2 / others.size(1)


def rank_main_character(capitalized, stories, index):
    """[{layer, neuron, chosen by, later, capital}], the best first: the AUROC with which a neuron's activation tells
    the first mention of the main character from later ones, and from other capitalized words.

    capitalized: of each story, the activations (P, M) at its capitalized words. Neurons are ranked by one half of the
    stories, "chosen by", and measured on the other: the best of thousands owe part of their rank to luck."""
    hidden, roles = torch.cat(capitalized), torch.cat([story.role[story.role > 0] for story in stories])
    halves = torch.cat([torch.full_like(rows[:, 0], number % 2) for number, rows in enumerate(capitalized)])
    groups = [hidden[(halves == half) & (roles == role)] for half in (0, 1) for role in (FIRST, LATER, CAPITAL)]
    if not all(len(group) for group in groups):
        return []
    first, later, capital, test_first, test_later, test_capital = groups
    chosen_by = torch.minimum(auroc(first, later), auroc(first, capital))
    columns = (chosen_by, auroc(test_first, test_later), auroc(test_first, test_capital))
    rows = torch.stack(columns, dim=1).tolist()  # M rows
    records = [{"layer": layer, "neuron": neuron, **dict(zip(("chosen by", "later", "capital"), row))}
               for (layer, neuron), row in zip(index, rows)]
    return sorted(records, key=lambda record: -record["chosen by"])


@torch.inference_mode()
def add_excerpts(model, stories, neurons):
    """Add to each neuron's record the excerpts [text before, token, text after] in which it is most active."""
    activations, excerpts = [], []
    for story in stories:
        _, inputs = observe(model, projections(model), story.ids)
        activations.append(torch.stack([inputs[record["layer"]][1:, record["neuron"]] for record in neurons], dim=1))
        texts = story.texts
        excerpts += [["".join(texts[max(0, i - 7):i]), texts[i], "".join(texts[i + 1:i + 4])]
                     for i in range(1, len(texts))]
    places = torch.cat(activations).topk(EXCERPTS, dim=0).indices  # (EXCERPTS, neurons)
    for record, column in zip(neurons, places.T.tolist()):
        record["excerpts"] = [excerpts[place] for place in column]


@torch.inference_mode()
def loss_without_neurons(model, stories, groups):
    """{name: [rise, rise if ablated at the first mention alone]} of the loss at later mentions of the main character,
    in nats per token, with each group of neurons, {name: [(layer, neuron)]}, ablated."""
    def loss(story, neurons, where=slice(None)):
        with ablate_neurons(model, neurons, where):
            nats = model(story.ids[None, :-1], story.ids[None, 1:])[0]  # (T - 1,)
        return nats[story.role[1:] == LATER].sum().item()
    rises = {name: np.zeros(2) for name in groups}
    for story in progress(stories, "ablating neurons"):
        intact, first = loss(story, []), story.role[:-1] == FIRST
        for name, neurons in groups.items():
            rises[name] += [loss(story, neurons) - intact, loss(story, neurons, first) - intact]
    n_later = sum((story.role[1:] == LATER).sum().item() for story in stories)
    return {name: (rise / max(1, n_later)).tolist() for name, rise in rises.items()}


def compare_neurons(model, control, stories):
    """The figures of a model's neurons, beside two controls: shuffled activations, and the untrained model."""
    trained, random = study_neurons(model, stories), study_neurons(control, stories, "untrained neurons")
    neurons, ranked = trained["neurons"], trained["main character"]
    shown = ranked[:1]
    for kind in KINDS:
        shown += [neuron for neuron in neurons if neuron["kind"] == kind][:SHOWN]
    add_excerpts(model, stories, shown)
    best = [(record["layer"], record["neuron"]) for record in ranked[:10]]
    drawn = [(layer, int(torch.randint(projections(model)[layer].in_features, ()))) for layer, _ in best]
    groups = {"the best": best[:1], "the ten best": best, "ten random ones of the same layers": drawn}
    shares = {"trained": trained["share"], "shuffled": trained["shuffled"], "untrained": random["share"]}
    return {"shares": shares, "neurons": neurons, "top": TOP, "kinds": KINDS, "main character": ranked[:20],
            "untrained main character": random["main character"][:1],
            "main character ablated": loss_without_neurons(model, stories, groups)}


# -----------------------------------------------------------------------------------------------------------------
# skills: which head or layer they need, and after which layer the answer is there


def skill_probes(dataset):
    """(source, probes with one right and one wrong word, exclusions): from a dataset's spans, if it has any."""
    probes, by_kind = read_spans(dataset, 40), read_spans(dataset, 60, by="kind")
    source = "spans of validation stories"
    if not probes:
        source = "data/probes.json, since these stories have no spans"
        with open(os.path.join(ROOT, "data", "probes.json"), encoding="utf-8") as file:
            by_kind = json.load(file)
        for skill in SKILLS:
            first = [probe for probe in by_kind if probe["skill"] == skill][:40]
            probes += [{**probe, "right": probe["right"][:1], "wrong": probe["wrong"][:1]} for probe in first]
    return source, probes, [probe for probe in by_kind if probe["kind"] == "exclusion"]


def study_ablations(model, encoding, dataset, n_stories, probes):
    """[{layer, head, loss, skill: share}]: the loss in nats per token, and the share of each skill's probes that the
    model passes, with each layer (attention and MLP; its head is None) and each head ablated in turn. The first record
    is about the intact model; its layer and head are None."""
    def measure(layer, head):
        return {"layer": layer, "head": head, "loss": evaluate(model, dataset, n_stories)["val_loss"],
                **skill_accuracy(model, encoding, probes)}

    records = [measure(None, None)]
    for layer, block in enumerate(progress(model.blocks, "ablating")):
        with ablate(block.attn.proj), ablate(block.mlp.proj):
            records.append(measure(layer, None))
        for head in range(model.config.n_head):
            with ablate_head(model, layer, head):
                records.append(measure(layer, head))
    return records


@torch.inference_mode()
def logit_lens(model, encoding, probes):
    """[{text, right, wrong, lead}]: by how many nats the right word leads the wrong one, at the first token in which
    they differ, if the model's last norm and head read the state before each layer and after the last (logit lens,
    nostalgebraist 2020). If these two do not give the model's own logits, model.py has changed: then []."""
    norm = getattr(architecture, "norm", torch.zeros_like)  # a model.py without norm() does not pass the check below
    results = []
    for probe in probes:
        prompt, right, wrong = probe["prompt"], probe["right"][0], probe["wrong"][0]
        right_ids, wrong_ids = (encoding.encode_ordinary(prompt + word) for word in (right, wrong))
        n_common = len(os.path.commonprefix([right_ids, wrong_ids]))  # works on any sequences
        if n_common == min(len(right_ids), len(wrong_ids)):  # one word begins with the other
            continue
        context = [encoding.eot_token, *right_ids[:n_common]][-model.config.block_size:]
        ids = torch.tensor(context, device=model.head.weight.device)
        logits, states = observe(model, [*model.blocks, model.head], ids)
        states = torch.stack([x[-1] for x in states])  # (L + 1, C); the last is normed, so norm() does not change it
        lens = model.head(norm(states))  # (L + 1, V)
        if not torch.allclose(lens[-1], logits[-1], rtol=1e-3, atol=1e-3):
            print("no logit lens: this model.py does not compute its logits as head(norm(x)), so logit_lens() in "
                  "lab/interpret.py has to be adapted", file=sys.stderr)
            return []
        lead = lens[:, right_ids[n_common]] - lens[:, wrong_ids[n_common]]
        results.append({"text": prompt, "right": right, "wrong": wrong, "lead": lead.tolist()})
    return results


# -----------------------------------------------------------------------------------------------------------------
# one run


def study(name, args, device):
    """(subject, what interpret.json holds and the page shows) of a run."""
    checkpoint = load_checkpoint(name)
    subject = load_subject(name, device, args.dataset)
    model, encoding, dataset = subject.model, subject.encoding, subject.datasets[0]
    if load_meta(dataset)["tokenizer"]["sha256"] != subject.tokenizer:
        sys.exit(f"{name} was trained with another tokenizer than data/{dataset} has: "
                 f"python prepare.py --dataset={dataset} --tokenizer={checkpoint['datasets'][0]}")
    tokens = split_stories(np.asarray(load_tokens(dataset, "val")), encoding.eot_token)[:args.stories]
    stories = read_stories([ids.tolist() for ids in tokens], encoding, model.config.block_size, device)
    longest = len(stories[-1].ids)
    if longest <= min(NEAREST, model.config.block_size // 2):
        sys.exit(f"the first {args.stories} validation stories of {dataset} have at most {longest} tokens, "
                 "too few to see heads at work: name another dataset with --dataset")
    control = untrained(model, checkpoint["args"]["seed"])
    source, probes, exclusions = skill_probes(dataset)
    heads = study_heads(model, stories)
    ablations = study_ablations(model, encoding, dataset, min(ABLATION_STORIES, len(stories)), probes)
    losses = {(record["layer"], record["head"]): record["loss"] for record in ablations}
    for head in heads:
        head["loss rise"] = losses[head["layer"], head["head"]] - losses[None, None]
    return subject, {
        "run": name, "dataset": dataset, "stories": len(stories), "config": vars(model.config),
        "parameters": model.num_params(), "heads": heads, "head figures": HEAD_FIGURES,
        "untrained heads": study_heads(control, stories, "untrained heads"),
        "maps": attention_maps(model, stories, heads), **compare_neurons(model, control, stories),
        "ablations": ablations, "probes": source,
        "logit lens": logit_lens(model, encoding, exclusions)}


def summarize(results):
    """The sections "heads" and "neurons" of eval.json."""
    heads, shares = results["heads"], results["shares"]
    types = Counter(head["type"] for head in heads)
    untrained_types = Counter(head["type"] for head in results["untrained heads"])
    measured = {"measured with": f"{results['stories']} stories of {results['dataset']}"}
    heads_section = {**measured, "heads by distance": types["distance"] / len(heads),
                     "heads by words": types["words"] / len(heads), "heads mixed": types["mixed"] / len(heads),
                     "heads mixed, untrained": untrained_types["mixed"] / len(heads)}
    if len(heads) > 2:  # of two heads it would always be 1 or -1
        explained = [[head[name] for head in heads] for name in ("distance", "words")]
        heads_section["correlation of distance and words"] = float(np.corrcoef(explained)[0, 1])
    neurons_section = {**measured, "a neuron's most common kind": shares["trained"],
                       "a neuron's most common kind, shuffled": shares["shuffled"],
                       "a neuron's most common kind, untrained": shares["untrained"]}
    for name in ("main character", "untrained main character"):
        if results[name]:
            neurons_section[f"{name} neuron, AUROC"] = results[name][0]["later"]
    return {"heads": heads_section, "neurons": neurons_section}


def main(argv=None):
    parser = CommandLine(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of runs, such as out/a (default: the newest)")
    parser.option("dataset", "", "read this dataset's validation stories instead of the run's own")
    parser.option("stories", 200, "number of stories", low=10)
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    device, _ = pick_device(args.device)
    for name in args.runs or [newest_run()]:
        subject, results = study(name, args, device)
        with atomic_write(subject.path("interpret.json")) as file:
            json.dump(results, file, ensure_ascii=False)
        with atomic_write(subject.path("interpret.html")) as file:
            file.write(run_page(results))
        for title, figures in summarize(results).items():
            add_section(subject, title, figures)
        print(f"{subject.path('interpret.html')} and interpret.json are written")


if __name__ == "__main__":
    run_main(main)

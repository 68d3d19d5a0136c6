"""The page that lab/interpret.py writes, from what interpret.json holds. It fetches nothing."""
from html import escape

import numpy as np

from lab.compare import chart, html_table, page

STYLE = """<style>mark { background: color-mix(in srgb, var(--c1) 35%, transparent); color: inherit }
.note { opacity: .8; font-size: .9rem } .lead { font-size: 1.2rem } .neuron { overflow-wrap: anywhere }
.neuron q { display: block; quotes: none; padding-left: 1rem } th { vertical-align: bottom }
.charts figure { max-width: 36rem } .map svg { min-width: 30rem } .map rect { fill: var(--c0) }
.map g:hover rect { stroke: var(--c1); stroke-width: 2 }</style>
"""


def name_of(record):
    """"layer 3 head 1", of the parts that a record has, with spaces at which no line breaks."""
    parts = [f"{part}\u00a0{record[part]}" for part in ("layer", "head", "neuron") if record.get(part) is not None]
    return "\u00a0".join(parts)


def draw_map(head):
    """HTML of a head's attention: each row is a query, each column a key."""
    words = [escape(word) for word in head["words"]]
    parts = []  # a cell takes 13 x 13 units; the labels stand left of the rows and above the columns
    for i, word in enumerate(words):
        parts.append(f'<text x="66" y="{85 + 13 * i}" text-anchor="end">{word}</text>'
                     f'<text transform="translate({79 + 13 * i} 70) rotate(-60)">{word}</text>')
    for i, row in enumerate(head["attention"]):
        for j, p in enumerate(row):
            if p >= 0.01:  # fainter cells cannot be seen, and would make the page large
                parts.append(f'<g><title>{words[i]} → {words[j]}: {p:.2f}</title><rect width="12" height="12" '
                             f'x="{70 + 13 * j}" y="{76 + 13 * i}" opacity="{p**.5:.2f}"/></g>')
    width, height, cells = 100 + 13 * len(words), 80 + 13 * len(words), "".join(parts)
    return (f'<figure><figcaption>{name_of(head)}: {head["why"]}</figcaption><div class="scroll map">'
            f'<svg viewBox="0 0 {width} {height}" font-size="10">{cells}</svg></div></figure>')


def heads_section(results):
    """A chart of what explains each head, attention maps, and a table of all heads' figures."""
    heads, controls, figures = results["heads"], results["untrained heads"], results["head figures"]
    points = {"distance": [], "words": [], "mixed": []}
    for head in heads:
        points[head["type"]].append((head["distance"], head["words"]))
    n = {kind: len(group) for kind, group in points.items()}
    n_untrained = sum(head["type"] == "mixed" for head in controls)
    points["untrained"] = [(head["distance"], head["words"]) for head in controls]
    axes = chart("What explains a head's attention?", "share explained by distance", "share explained by words", points,
                 lines=False)
    maps = "".join(draw_map(head) for head in results["maps"])
    rows = [[name_of(head), *(head[name] for name in figures)] for head in heads]
    meanings = "".join(f"<li><b>{escape(name)}</b>: {escape(text)}" for name, text in figures.items())
    return f"""<h2>Heads: by distance, or by words?</h2>
<p class="lead">Of {len(heads)} heads {n["distance"]} attend by distance, {n["words"]} by words, and {n["mixed"]} are
mixed. In an untrained model {n_untrained} are mixed.</p><div class="charts">{axes}</div>
<h3>Attention maps</h3><p>Each row is a token that attends to the columns. Hover for values.</p>
<div class="charts">{maps}</div>
<h3>Every head</h3>{html_table([["", *figures], *rows])}<ul class="note">{meanings}</ul>"""


def show_neuron(neuron, title):
    """HTML of a neuron's excerpts, with the token marked at which it is active."""
    quotes = [f"<q>{escape(before)}<mark>{escape(token)}</mark>{escape(after)}</q>"
              for before, token, after in neuron["excerpts"]]
    return f'<div class="neuron"><b>{title}</b>{"".join(quotes)}</div>'


def neurons_section(results):
    shares, shown = results["shares"], [neuron for neuron in results["neurons"] if "excerpts" in neuron]
    shown.sort(key=lambda neuron: neuron["kind"])
    selective = "".join(show_neuron(neuron, f"{name_of(neuron)}: {neuron['kind']} {neuron['share']:.0%}")
                        for neuron in shown)
    return f"""<h2>Neurons: what activates them?</h2>
<p class="lead">Of the {results["top"]} different tokens that activate a neuron most, {shares["trained"]:.0%} are of the
same kind of word, on average. With its activations at random places it would be {shares["shuffled"]:.0%}, with random
weights {shares["untrained"]:.0%}.</p>
<p class="note">The kinds are {", ".join(results["kinds"])}. Neurons that fewer tokens activate are left out.</p>
<h3>The most selective neurons</h3><p>A few of each kind; the token at which the neuron is active is marked.</p>
<div class="charts">{selective}</div>"""


def main_character_section(results):
    ranked, title = results["main character"], "<h2>A neuron for the main character?</h2>"
    if not ranked:
        return f"{title}<p>Too few of these stories have one.</p>"
    best, ablated = name_of(ranked[0]), results["main character ablated"]
    named = [(name_of(record), record) for record in ranked[:5]]
    named += [("the untrained model's best", record) for record in results["untrained main character"]]
    aurocs = html_table([["AUROC of the first mention against", "later mentions", "other capitalized words"],
                         *([name, record["later"], record["capital"]] for name, record in named)])
    losses = html_table([["rise of the loss at later mentions, in nats per token, without", "these neurons",
                          "these at the first mention alone"], *([name, *rises] for name, rises in ablated.items())])
    return f"""{title}
<p class="lead">In {ranked[0]["later"]:.0%} of pairs, {best} is more active at the first mention of the main
character than at a later one. Without it, later mentions cost {ablated["the best"][0]:+.3f} nats.</p>
{show_neuron(ranked[0], best)}{aurocs}{losses}
<p class="note">An AUROC of 0.5 is chance. The best neurons are chosen on one half of the stories and measured on the
other.</p>"""


def skills_section(results):
    """A table of how the share of passed probes changes with each layer, and with each of some heads, ablated."""
    intact, *ablated = results["ablations"]
    skills = [name for name in intact if name not in ("layer", "head", "loss")]
    layers = [record for record in ablated if record["head"] is None]
    heads = [record for record in ablated if record["head"] is not None]
    heads.sort(key=lambda record: min(record[skill] - intact[skill] for skill in skills))
    rows = [["nothing", *(f"{intact[skill]:.0%}" for skill in skills)]]
    for record in layers + heads[:10]:
        rows.append([name_of(record), *(f"{record[skill] - intact[skill]:+.0%}" for skill in skills)])
    return f"""<h2>Which layers and heads does a skill need?</h2>
<p>Share of words for which the model finds the right one likelier than a tempting wrong one, and how it changes if a
layer or a head is ablated. Words: {escape(results["probes"])}.</p>
{html_table([["ablated", *skills], *rows])}
<p class="note">All layers, and the ten heads that some skill needs most. With so few words, 10 % may be chance.</p>"""


def lens_section(results):
    """Also for a model to which the logit lens does not apply: then there is no chart."""
    lens, series = results["logit lens"], {}
    if lens:
        series["mean"] = list(enumerate(np.mean([probe["lead"] for probe in lens], axis=0).tolist()))
    for probe in lens[:7]:
        name = f"… {probe['text'][-40:]} {probe['right'].strip()}, not {probe['wrong'].strip()}"
        series[name] = list(enumerate(probe["lead"]))
    leads = chart("Exclusions: when does the right word overtake?", "layers", "lead of the right word, in nats", series)
    won = sum(probe["lead"][-1] > 0 for probe in lens)
    return f"""<h2>Logit lens: after which layer is the answer there?</h2>
<p>The model's last norm and head read the state after each layer. At the end, the right word leads in {won} of
{len(lens)} exclusions.</p><div class="charts">{leads}</div>"""


def run_page(results):
    """The page about one run."""
    config, dataset = results["config"], escape(results["dataset"])
    intro = (f"<p>Layers: {config['n_layer']}; channels: {config['n_embd']}; heads per layer: {config['n_head']}; "
             f"parameters: {results['parameters']:,}. Measured on {results['stories']} stories of {dataset}. Layers, "
             "heads and neurons are counted from 0.</p>")
    sections = (heads_section, neurons_section, main_character_section, skills_section, lens_section)
    return page(f"Inside {results['run']}", STYLE + intro + "\n".join(section(results) for section in sections))

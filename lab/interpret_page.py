"""The page that lab/interpret.py writes, from what interpret.json holds. It fetches nothing."""
import json
import math
from collections import Counter, defaultdict
from html import escape

import numpy as np

from lab.compare import chart, page

STYLE = """<style>mark { background: color-mix(in srgb, var(--c1) 35%, transparent); color: inherit }
.note { opacity: .8; font-size: .9rem } .lead { font-size: 1.2rem }
.neuron { margin: .6rem 0; overflow-wrap: anywhere }
.neuron q { display: block; quotes: none; padding-left: 1rem } th { vertical-align: bottom }
input { font: inherit; padding: .3rem } .charts figure { max-width: 36rem }
.map svg { min-width: 30rem } .map rect { fill: var(--c0) }
.map g:hover rect { stroke: var(--c1); stroke-width: 2 }</style>
"""
# the search reads [[title, excerpts]] of the neurons from the script element before it
SEARCH = """<p><label>Search for a token: <input id="query" type="search"></label> <span id="count"></span></p>
<div id="results" class="charts"></div><script>
const neurons = JSON.parse(document.getElementById("neurons").textContent)
const make = (tag, ...children) => { const e = document.createElement(tag); e.append(...children); return e }
document.getElementById("query").oninput = ({ target }) => {
  const word = target.value.trim().toLowerCase()
  const hits = neurons.filter(([title, excerpts]) => word && excerpts.some(e => e[1].toLowerCase().includes(word)))
  document.getElementById("count").textContent = word && `${hits.length} of ${neurons.length}`
  document.getElementById("results").replaceChildren(...hits.slice(0, 30).map(([title, excerpts]) => {
    const quotes = excerpts.map(([before, token, after]) => make("q", before, make("mark", token), after))
    return Object.assign(make("div", make("b", title), ...quotes), { className: "neuron" })
  }))
}</script>"""


def name_of(record):
    """"layer 3 head 1", of the parts that a record has, with spaces at which no line breaks."""
    parts = [f"{part}\u00a0{record[part]}" for part in ("layer", "head", "neuron") if record.get(part) is not None]
    return "\u00a0".join(parts)


def format_cell(value):
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}"
    return escape(str(value))


def table(header, rows):
    """HTML of a table. All cells are escaped."""
    lines = ["<th>" + "</th><th>".join(map(format_cell, header)) + "</th>"]
    lines += ["<td>" + "</td><td>".join(map(format_cell, row)) + "</td>" for row in rows]
    return '<div class="scroll"><table><tr>' + "</tr>\n<tr>".join(lines) + "</tr></table></div>\n"


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
    heads, controls = results["heads"], results["untrained heads"]
    groups = {kind: [head for head in heads if head["type"] == kind] for kind in ("distance", "words", "mixed")}
    points = {kind: [(head["distance"], head["words"]) for head in group]
              for kind, group in {**groups, "untrained": controls}.items()}
    axes = chart("What explains a head's attention?", "share explained by distance", "share explained by words", points,
                 lines=False)
    decays = sorted((head["decay"] for head in groups["distance"]), reverse=True)
    # the steepest head first; no less than 2^-12, as the decay of a head may be negative
    learned = [(i, math.log2(max(decay, 2**-12))) for i, decay in enumerate(decays, 1)]
    slopes = [(i, -8 * i / len(decays)) for i in range(1, len(decays) + 1)]
    decay = chart("How fast distance heads forget", "rank of the distance head", "log2 of the decay per token",
                  {"learned": learned, "ALiBi's slopes": slopes})
    maps = "".join(draw_map(head) for head in results["maps"])
    figures = results["head figures"]
    rows = [[name_of(head), *(head[name] for name in figures)] for head in heads]
    meanings = "".join(f"<li><b>{escape(name)}</b>: {escape(text)}" for name, text in figures.items())
    n = {kind: len(group) for kind, group in groups.items()}
    untrained = Counter(head["type"] for head in controls)["mixed"]
    return f"""<h2>Heads: by distance, or by words?</h2>
<p class="lead">Of {len(heads)} heads {n["distance"]} attend by distance, {n["words"]} by words, and {n["mixed"]} are
mixed. In an untrained model {untrained} are mixed.</p><div class="charts">{axes}{decay}</div>
<p class="note">ALiBi's slopes are 2<sup>-8h/H</sup>, for h from 1 to the number H of distance heads.</p>
<h3>Attention maps</h3><p>Each row is a token that attends to the columns. Hover for values.</p>
<div class="charts">{maps}</div>
<h3>Every head</h3>{table(["", *figures], rows)}<ul class="note">{meanings}</ul>"""


def title_of(neuron):
    return f"{name_of(neuron)}: {neuron['kind']} {neuron['share']:.0%}"


def show_neuron(neuron):
    quotes = [f"<q>{escape(before)}<mark>{escape(token)}</mark>{escape(after)}</q>"
              for before, token, after in neuron["excerpts"]]
    return f'<div class="neuron"><b>{title_of(neuron)}</b>{"".join(quotes)}</div>'


def neurons_section(results, searchable=5000):
    neurons, shares = results["neurons"], results["shares"]
    by_kind = defaultdict(list)
    for neuron in neurons:
        by_kind[neuron["kind"]].append(neuron)
    selective = "".join(show_neuron(neuron) for group in by_kind.values() for neuron in group[:4])
    entries = [[title_of(neuron), neuron["excerpts"]] for neuron in neurons[:searchable]]
    # a story with </script> must not end the script element
    entries_json = json.dumps(entries, ensure_ascii=False).replace("<", "\\u003c")
    return f"""<h2>Neurons: what activates them?</h2>
<p class="lead">Of the {results["top"]} different tokens that activate a neuron most, {shares["trained"]:.0%} are of the
same kind of word, on average. With its activations at random places it would be {shares["shuffled"]:.0%}, with random
weights {shares["untrained"]:.0%}.</p>
<p class="note">The kinds are {", ".join(results["kinds"])}. Neurons that fewer tokens activate are left out.</p>
<h3>The most selective neurons</h3><p>Four of each kind; the token at which the neuron is active is marked.</p>
<div class="charts">{selective}</div>
<script id="neurons" type="application/json">{entries_json}</script>{SEARCH}
<p class="note">The search covers the {len(entries):,} most selective of {len(neurons):,} neurons.</p>"""


def main_character_section(results):
    ranked, title = results["main character"], "<h2>A neuron for the main character?</h2>"
    if not ranked:
        return f"{title}<p>Too few of these stories have one.</p>"
    names = [name_of(record) for record in ranked]
    excerpts = "".join(show_neuron(neuron) for neuron in results["neurons"] if name_of(neuron) in names[:2])
    rows = [[name, record["later"], record["capital"]] for name, record in zip(names[:5], ranked)]
    rows += [["the untrained model's best", record["later"], record["capital"]]
             for record in results["untrained main character"]]
    aurocs = table(["AUROC of the first mention against", "later mentions", "other capitalized words"], rows)
    ablated = results["main character ablated"]
    losses = table(["rise of the loss, in nats per token, without", "at later mentions", "elsewhere",
                    "at later mentions, ablated at the first alone"],
                   [[name, *rises] for name, rises in ablated.items()])
    return f"""{title}
<p class="lead">In {ranked[0]["later"]:.0%} of pairs, {names[0]} is more active at the first mention of the main
character than at a later one. Without it, later mentions cost {ablated["the best"][0]:+.3f} nats.</p>
<div class="charts">{excerpts}</div>{aurocs}{losses}
<p class="note">An AUROC of 0.5 is chance. The best neurons are chosen on one half of the stories and measured on the
other.</p>"""


def skills_section(results):
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
{table(["ablated", *skills], rows)}
<p class="note">All layers, and the ten heads that some skill needs most. With so few words, 10 % may be chance.</p>"""


def lens_section(results):
    """Also for a model to which the logit lens does not apply: then there is no chart."""
    lens = results["logit lens"]
    series = {}
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

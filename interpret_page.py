"""The page that interpret.py writes, from what interpret.json holds."""
import json
import math
import re
from collections import Counter, defaultdict
from html import escape

import numpy as np

from model import alibi_slopes
from prepare import SKILLS
from report import chart, html_table, page

EXTRA = """<style>mark { background: color-mix(in srgb, var(--c1) 35%, transparent); color: inherit }
.note { opacity: .8; font-size: .9rem } .lead { font-size: 1.2rem }
.neuron { margin: .6rem 0; overflow-wrap: anywhere }
.neuron q { display: block; quotes: none; padding-left: 1rem } th { vertical-align: bottom }
input { font: inherit; padding: .3rem } .charts figure { max-width: 36rem }
.map svg { min-width: 30rem } .map rect { fill: var(--c0) }
.map g:hover rect { stroke: var(--c1); stroke-width: 2 }</style>"""
SEARCH = """<p><label>Search for a word: <input id="find" type="search"></label> <span id="count"></span></p>
<div id="found" class="charts"></div><script>
const neurons = JSON.parse(document.getElementById("neurons").textContent)
const make = (tag, ...inside) => { const e = document.createElement(tag); e.append(...inside); return e }
document.getElementById("find").oninput = ({ target }) => {
  const word = target.value.trim().toLowerCase()
  const hits = neurons.filter(([name, texts]) => word && texts.some(t => t[1].toLowerCase().includes(word)))
  document.getElementById("count").textContent = word && `${hits.length} of ${neurons.length}`
  document.getElementById("found").replaceChildren(...hits.slice(0, 30).map(([name, texts]) => {
    const quotes = texts.map(([before, at, after]) => make("q", before, make("mark", at), after))
    return Object.assign(make("div", make("b", name), ...quotes), { className: "neuron" })
  }))
}</script>"""


def name_of(x):
    return "\u00a0".join(f"{part}\u00a0{x[part]}" for part in ("layer", "head", "neuron") if x.get(part) is not None)


def table(header, rows, shade=lambda row, column: 0):
    """HTML of a table: text is escaped, fractions get three digits; shade: how red a cell is, 1 or more for all red."""
    def cell(tag, value, red=0):
        if isinstance(value, (int, float)):
            value = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
        text = "–" if value is None else value
        red = 100 * min(red, 1)
        style = f" style=\"background: color-mix(in srgb, var(--c6) {red:.0f}%, transparent)\"" * bool(red > 0)
        return f"<{tag}{style}>{escape(text)}</{tag}>"
    lines = ["".join(cell("th", name) for name in header)]
    lines += ["".join(cell("td", value, shade(i, j)) for j, value in enumerate(row)) for i, row in enumerate(rows)]
    return "<div class=\"scroll\"><table><tr>" + "</tr>\n<tr>".join(lines) + "</tr></table></div>\n"


def draw_map(m):
    """HTML of one head's attention: a row reads and looks at the columns."""
    words, size = [escape(word) for word in m["words"]], 80 + 13 * len(m["words"])
    svg = [f"<text x=\"66\" y=\"{85 + 13 * i}\" text-anchor=\"end\">{word}</text><text transform=\""
           f"translate({79 + 13 * i} 70) rotate(-60)\">{word}</text>" for i, word in enumerate(words)]
    svg += [f"<g><title>{words[i]} → {words[j]}: {p:.2f}</title><rect width=\"12\" height=\"12\" x=\"{70 + 13 * j}\" "
            f"y=\"{76 + 13 * i}\" opacity=\"{p**.5:.2f}\"/></g>"
            for i, row in enumerate(m["attention"]) for j, p in enumerate(row) if p >= 0.01]
    return (f"<figure><figcaption>{name_of(m)}: {m['why']}</figcaption><div class=\"scroll map\">"
            f"<svg viewBox=\"0 0 {size + 20} {size}\" font-size=\"10\">{''.join(svg)}</svg></div></figure>")


def show_heads(r):
    heads, types, limits = r["heads"], Counter(h["type"] for h in r["heads"]), r["thresholds"]
    series = {kind: [h for h in heads if h["type"] == kind] for kind in ("distance", "semantic", "mixed")}
    series["untrained"] = r["untrained heads"]
    point = lambda h: (h["distance"], h["words"])
    dots = chart("Every head: by distance, or by words?", "share explained by distance", "share explained by words",
                 {name: list(map(point, some)) for name, some in series.items()}, lines=False)
    names = iter([name_of(h) for some in series.values() for h in sorted(some, key=point)])  # as chart() draws them
    dots = re.sub("<title>", lambda _: f"<title>{next(names)}, ", dots)
    ranges = sorted(series["distance"], key=lambda h: -h["decay"])
    rates = chart("How fast distance heads forget", "the steepest distance head first", "log2 of the decay a token", {
        "learned": [(i, math.log2(max(h["decay"], 2**-12))) for i, h in enumerate(ranges, 1)],
        "ALiBi's slopes": [(i, math.log2(m)) for i, m in enumerate(alibi_slopes(len(ranges)).tolist(), 1)]})
    profiles = chart("Attention against distance", "tokens back", "log-attention, above its mean", {
        f"{name_of(h)}: {h['decay']:.3f}": list(enumerate(h["profile"])) for h in ranges[::len(ranges) // 6 + 1]})
    shares = [name + " / share" for name in ("main character", "nouns", "own noun", "same token", "induction")]
    figures = ["type", "distance", "words", "loss rise", "decay", "peak", "mean distance", "entropy", "start",
               "previous token", *shares]
    noun, hero = (max(heads, key=lambda h: h[name]) for name in ("own noun / share", "main character / share"))
    return f"""<h2>Heads: by distance, or by words?</h2>
<p class="lead">Of {len(heads)} heads {types["distance"]} look by distance, {types["semantic"]} by words,
{types["mixed"]} are mixed (untrained: {sum(h["type"] == "mixed" for h in r["untrained heads"])} mixed). At <i>a</i>,
<i>an</i> and <i>the</i>, {name_of(noun)} looks {noun["own noun / share"]:.1f} times as often as chance at the earlier
mention of the noun to come; {name_of(hero)} looks {hero["main character / share"]:.1f} times as often as chance at
the main character.</p><div class="charts">{dots}{profiles}{rates}</div>
<p class="note"><b>Distance</b>: R² of the logarithm of a head's attention, each query's mean taken off, by how far
back the key is, over the {len(heads[0]["profile"])} nearest keys. <b>Words</b>: R² by which token is looked at and
which kind of word looks. Both with means from the other half of the stories. A distance head: distance explains at
least {limits["least"]}, and at least {limits["times"]} times what words do; a semantic one the other way round; all
others are mixed. Decay: the fall of log-attention a token, from its peak on. ALiBi's slopes: 2^(-8h/H), for as many
heads.</p>
<h3>Maps</h3><p>A row reads and looks at the columns: the stronger the color, the more. Hover for values.</p>
<div class="charts">{"".join(map(draw_map, r["maps"]))}</div>
<h3>Every head</h3>{table(["", *figures], [[name_of(h), *(h[name] for name in figures)] for h in heads])}
<p class="note">“/ share”: attention over the share in the text so far, so that 1 is indifference, of the main
character's name (the one most often within the story's sentences), of nouns, of an article's own noun (earlier
mentions of the one to come), of the same token, of what followed the same token (induction); without the start
(&lt;|endoftext|&gt;). Entropy in nats. Loss rise: nats a token more with the head silenced, over {r["silenced on"]}
stories, where the whole model has {r["loss"]:.3f}.</p>"""


def show_neurons(r, limit=2_500_000):
    shares, entries, few = r["shares"], [], defaultdict(list)
    title = lambda n: f"{name_of(n)}: {n['kind']} {n['distinct']:.0%}"
    show = lambda n: f"<div class=\"neuron\"><b>{title(n)}</b>" + "".join(
        f"<q>{escape(a)}<mark>{escape(b)}</mark>{escape(c)}</q>" for a, b, c in n["excerpts"]) + "</div>"
    active = [n for n in r["neurons"] if n["excess"] > -1]
    for n in active:
        few[n["kind"]].append(n)
        entry = json.dumps([title(n), n["excerpts"]], ensure_ascii=False).replace("<", "\\u003c")
        limit -= len(entry.encode())
        if limit > 0:
            entries.append(entry)
    spread = chart("How alike are the tokens that excite a neuron?", "share of the commonest kind", "% of neurons",
                   {name: [(i / r["top"], 100 * y) for i, y in enumerate(x["spread"])] for name, x in shares.items()})
    layers = chart("By layer", "layer", "mean", {name: list(enumerate(x["layers"])) for name, x in shares.items()})
    names = ["distinct", "any", "token", "idle"]
    return f"""<h2>Neurons: what excites them?</h2>
<p class="lead">Of the {r["top"]} distinct tokens that excite a neuron most, the commonest kind of word has
{shares["trained"]["distinct"]:.0%} (shuffled {shares["shuffled"]["distinct"]:.0%}, untrained
{shares["untrained"]["distinct"]:.0%}).</p><div class="charts">{spread}{layers}</div>
{table(["means over neurons", *names], [[name, *(x[n] for n in names)] for name, x in shares.items()])}
<p class="note">Distinct: the share above; the kinds are {", ".join(r["kinds"])}. Any, token: at the {r["top"]} places
that excite a neuron most, the share of the commonest kind and of the commonest token. Idle: fewer than {r["top"]}
tokens excite it; left out. Controls: the same activations given to random places; a model with weights drawn anew,
which answers to few tokens, but not of a kind.</p>
<h3>The most selective</h3><p>The first four of each kind; the place of excitement is marked.</p>
<div class="charts">{"".join(show(n) for some in few.values() for n in some[:4])}</div>
<script id="neurons" type="application/json">[{",".join(entries)}]</script>{SEARCH}
<p class="note">Searched are the {len(entries):,} most selective of {len(active):,}; interpret.json has all.</p>
<h2>A neuron for the main character?</h2>""" + show_hero(r, show)


def show_hero(r, show):
    if not r["main character"]:
        return "<p>Too few of these stories name one.</p>"
    best, silenced = r["main character"][0], r["main character silenced"]
    rows = [[name_of(h), h["later"], h["capital"]] for h in r["main character"][:5]]
    rows += [["the untrained model's best", *(r["untrained main character"][name] for name in ("later", "capital"))]]
    shown = [show(n) for h in r["main character"][:2] for n in r["neurons"] if name_of(n) == name_of(h)]
    return f"""
<p class="lead">{name_of(best)} is more excited by the first mention of the main character than by a later one in
{best["later"]:.0%} of pairs. With it silenced, later mentions cost {silenced["the best"][0]:+.3f} nats.</p>
<div class="charts">{"".join(shown)}</div>
{table(["area under the curve: first mention against", "later mentions", "other capitalised words"], rows)}
{table(["silenced: nats more", "at later mentions", "elsewhere", "at later mentions, if silenced at the first alone"],
       [[name, *values] for name, values in silenced.items()])}
<p class="note">The area is 0.5 by chance. The best are chosen on one half of the stories, and measured on the
other.</p>"""


def show_skills(r):
    (whole, *cuts), lens = r["skills"], r["lens"]
    names = [name for name in SKILLS if name in whole]
    rise = lambda x: min(x[name] - whole[name] for name in names)
    heads = sorted((x for x in cuts if x["head"] is not None), key=rise)[:10]
    some = [whole] + [x for x in cuts if x["head"] is None] + heads
    rows = [[name_of(x) or "nothing", *(f"{x[name]:.0%}" for name in names)] for x in some]
    lines = {"mean": np.mean([x["lead"] for x in lens], 0).tolist()} if lens else {}
    lines |= {f"… {x['text'][-20:]} ({x['right'].strip()})": x["lead"] for x in lens[:5]}
    drawn = chart("Exclusion: when does the right word overtake?", "after so many layers", "nats by which it leads",
                  {name: list(enumerate(lead)) for name, lead in lines.items()})
    after = lambda lead: next((str(i) for i in range(len(lead)) if min(lead[i:]) > 0), "never")
    return f"""<h2>Where a skill lives</h2><p>Share of words where the model finds the right one likelier than a
tempting wrong one, on {r["measured on"]}; red where silencing lowers it.</p>
{table(["silenced", *names], rows, lambda i, j: 2 * (whole[names[j - 1]] - some[i][names[j - 1]]) if j else 0)}
<p class="note">All layers, and the ten heads that some skill misses most; with so few words, 10 % may be chance.</p>
<div class="charts">{drawn}</div>{table(["the story so far", "right", "tempting", "leads for good after layers"],
      [["… " + x["text"][-90:], x["right"], x["wrong"], after(x["lead"])] for x in lens[:8]])}
<p class="note">The model's head reads the state between the layers (logit lens). At the end the right word leads in
{sum(x["lead"][-1] > 0 for x in lens)} of {len(lens)} exclusions.</p>"""


def summary(r):
    """{section: {figure: value}} of one run, for the tables that compare several."""
    heads, shares, hero = r["heads"], r["shares"], ([*r["main character"], None][0], r["untrained main character"])
    kinds = {"distance": "heads by distance", "semantic": "heads by words", "mixed": "heads mixed"}
    explained = [[h[name] for h in heads] for name in ("distance", "words")]
    return {"model": {"layers": r["config"]["n_layer"], "channels": r["config"]["n_embd"],
                      "heads": r["config"]["n_head"], "parameters": r["parameters"]},
            f"loss on {r['dataset']}": {"nats a token": r["loss"]},
            "heads": {**{name: sum(h["type"] == kind for h in heads) / len(heads) for kind, name in kinds.items()},
                      "heads mixed, untrained": float(np.mean([h["type"] == "mixed" for h in r["untrained heads"]])),
                      "correlation of distance and words":  # of two heads it would always be 1 or -1
                          float(np.corrcoef(explained)[0, 1]) if len(heads) > 2 else None},
            "neurons": {**{"a neuron's commonest kind" + of: shares[name]["distinct"] for name, of in
                           (("trained", ""), ("shuffled", ", shuffled"), ("untrained", ", untrained"))},
                        **{"main character" + of: x and x["later"] for x, of in zip(hero, ("", ", untrained"))}}}


def compare(results):
    """HTML of {run: summary}, of runs or of seeds put together, in a table and charts."""
    parts = {"heads mixed": "heads", "a neuron's commonest kind": "neurons",
             "a neuron's commonest kind, shuffled": "neurons"}

    def point(x, y):
        return (x, y[1], y[0], y[2]) if isinstance(y, list) else (x, y)
    charts = [chart(f"Against {what}", what, "share", {
        name: [point(r["model"][what], r[part][name]) for r in results.values()] for name, part in parts.items()},
        log_x=what == "parameters", lines=False) for what in ("parameters", "layers")]
    return f"<h2>Runs compared</h2>{html_table(results)}<div class=\"charts\">{''.join(charts)}</div>"


def inside(r, results):
    """The page about one run's results r, with a comparison if there are several: {run: summary}."""
    c = r["config"]
    shape = f"{c['n_layer']} layer{'s' * (c['n_layer'] > 1)} of {c['n_embd']} channels and {c['n_head']} heads"
    intro = (f"{EXTRA}<p>{shape}, counted from 0; {r['parameters']:,} parameters; "
             f"{r['stories']} validation stories of {escape(r['dataset'])}.</p>")
    compared = compare(results) if results else ""
    return page(f"Inside {r['run']}", intro + compared + show_heads(r) + show_neurons(r) + show_skills(r))

"""What graded models are shown with: ratios with intervals, tables on the terminal, charts and pages of HTML."""
import json
import math
import os
import re
from html import escape

import numpy as np

from prepare import SKILLS

# sections of eval.py's and interpret.py's tables in their order; spans are the dataset's own probes
ORDER = ("model", "loss", "probes", "spans", "completions", "memorisation", "instructions", "steps", "judge", "heads",
         "neurons")


def interval(top, bottom=None):
    """[sum(top) / sum(bottom), low, high]: a ratio, or a mean where `bottom` is None, with its 95 % interval; or None.

    top, bottom: (N,), one number for each story, probe or prompt; of these, N are drawn with replacement a thousand
    times (the percentile bootstrap, Efron 1979). Equal N have equal draws."""
    top, bottom = np.asarray(top, float), np.ones(len(top)) if bottom is None else np.asarray(bottom, float)
    if not bottom.sum():
        return None
    draw, ratios = np.random.default_rng(0), []
    for _ in range(1000):
        pick = draw.integers(0, len(top), len(top))
        if below := bottom[pick].sum():
            ratios.append(top[pick].sum() / below)
    return [float(top.sum() / bottom.sum()), *np.quantile(ratios, (0.025, 0.975)).tolist()]


def write_whole(path, text):
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".tmp", path)


def over_seeds(results, settings):
    """Results in which runs of equal settings, {run: text}, stand under the first one's name: each figure's mean, and
    its lowest and highest value."""
    def spread(values):
        values = [value[0] if isinstance(value, list) else value for value in values if value is not None]
        if len(set(values)) == 1 and not isinstance(values[0], float):  # a count that all have, or the judge's name
            return values[0]
        values = [value for value in values if not isinstance(value, str)]
        return [sum(values) / len(values), min(values), max(values)] if values else None

    def along(runs):
        """{probes: {skill: [(step, lowest, mean, highest)]}} of steps, which runs of one length share."""
        return {title: {skill: [(points[0][0], min(p[2] for p in points), sum(p[2] for p in points) / len(points),
                                 max(p[2] for p in points)) for points in zip(*(run[title][skill] for run in runs))]
                        for skill in skills} for title, skills in runs[0].items() if all(title in run for run in runs)}

    merged = {}
    for same in dict.fromkeys(settings.values()):
        some = {name: results[name] for name in results if settings[name] == same}
        first = next(iter(some))
        merged[first] = {title: {name: spread([r.get(title, {}).get(name) for r in some.values()]) for name in figures}
                         for title, figures in results[first].items() if title not in ("model", "steps")}
        merged[first]["model"] = {**results[first]["model"], "runs": len(some)}
        if all("steps" in result for result in some.values()):
            merged[first]["steps"] = along([result["steps"] for result in some.values()])
    return merged


def cell(name, value):
    """A figure of eval.json as text: [value, low, high], a number, text, or nothing."""
    if isinstance(value, list):
        digits = 4 if name.startswith("val_") else 3 if abs(value[0]) < 10 else 1
        return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*value, d=digits)
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value:,.4g}" if value % 1 else f"{value:,}"


def table(results):
    """Rows of text from {run: {section: {figure: value}}}: a figure with a cell a run, or a section's name alone."""
    rows, titles = [["", *results]], {title for result in results.values() for title in result} - {"steps"}
    for title in sorted(titles, key=lambda title: (ORDER.index(title.split()[0]), title)):
        parts = [result.get(title, {}) for result in results.values()]
        rows += [[title]] + [["  " + name, *(cell(name, part.get(name)) for part in parts)]
                             for name in dict.fromkeys(name for part in parts for name in part)]
    return rows


def html_table(results):
    rows = ["<tr>" + (f"<th colspan={1 + len(results)}>{escape(row[0])}" if len(row) == 1 else
                      "".join(f"<td>{escape(text)}" for text in row)) for row in table(results)]
    return '<div class="scroll"><table>\n' + "\n".join(rows) + "\n</table></div>\n"


def print_table(rows):
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(len(rows[0]))]
    for name, *cells in rows:
        print(name.ljust(widths[0]), *(text.rjust(width) for text, width in zip(cells, widths[1:])), sep="  ")


# -----------------------------------------------------------------------------------------------------------------
# charts: inline SVG in one page that fetches nothing, needs no script, and follows the reader's light or dark

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --faint: #d8d8d8; --c0: #0b62b0; --c1: #c2500a;
  --c2: #1a7f4b; --c3: #a2347f; --c4: #6d5a00; --c5: #0b7d8c; --c6: #b3262e; --c7: #5b4bb5 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --faint: #444; --c0: #6cb6ff;
  --c1: #ff9d57; --c2: #5fd08f; --c3: #f08cd0; --c4: #e0c94a; --c5: #56d3e0; --c6: #ff8a8a; --c7: #b4a7ff } }
body { margin: 0 auto; max-width: 68rem; padding: 0 1rem 3rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper) }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.5rem 2rem }
figure { margin: 0 } figcaption { font-weight: 600 } svg { display: block; width: 100% } svg text { fill: var(--ink) }
.legend { font-size: .9rem; display: flex; flex-wrap: wrap; gap: 0 1rem } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin-top: 2rem }
td, th { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--faint); white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal }
"""


def page(title, body):
    """A page of HTML around a body of HTML; the title is escaped here."""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
<h1>{escape(title)}</h1>
{body}
</html>
"""


def ticks(low, high, log):
    """Some three to six round numbers between low and high: steps of 1, 2 or 5 times a power of ten."""
    if log:
        few = high / low < 200
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = (m * 10.0 ** e for e in powers for m in ((1, 2, 5) if few else (1,)))
        return [m for m in marks if low <= m <= high] or [math.sqrt(low * high)]
    step = 10.0 ** math.floor(math.log10((high - low) / 6))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    return [round(step * i, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(value):
    """1500000 as 1.5M."""
    scale, unit = next(((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= s), (1, ""))
    return f"{value / scale:.4g}{unit}"


def chart(title, x_label, y_label, series, log_x=False, lines=True):
    """HTML of a figure with a line or dots a series: {name: [(x, y)]}, or [(x, low, y, high)] with intervals.

    Text is escaped; where no series has a point, "" comes back."""
    series = {name: sorted((p[0], p[1], p[len(p) // 2], p[-1]) for p in points if not log_x or p[0] > 0)
              for name, points in series.items()}
    points = [p for some in series.values() for p in some]
    if not points:
        return ""
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    x0, x1 = (x0 / 1.2, x1 * 1.2) if log_x else (x0, x1) if x0 < x1 else (x0 - 1, x1 + 1)
    y0, y1 = min(p[1] for p in points), max(p[3] for p in points)
    room = 0.05 * (y1 - y0) or 0.1 * abs(y1) or 1
    y0, y1 = y0 - room, y1 + room
    at = math.log if log_x else float
    def x_of(x):
        return round(48 + 362 * (at(x) - at(x0)) / (at(x1) - at(x0)), 1)
    def y_of(y):
        return round(240 - 220 * (y - y0) / (y1 - y0), 1)
    out = [f'<figure><figcaption>{escape(title)}</figcaption>'
           f'<svg viewBox="0 0 420 284" font-size="12" role="img" aria-label="{escape(title)}">']
    for y in ticks(y0, y1, False):
        out.append(f'<path d="M48 {y_of(y)}H410" stroke="var(--faint)"/>'
                   f'<text x="43" y="{y_of(y) + 4}" text-anchor="end">{short(y)}</text>')
    for x in ticks(x0, x1, log_x):
        out.append(f'<path d="M{x_of(x)} 240v5" stroke="var(--ink)"/>'
                   f'<text x="{x_of(x)}" y="258" text-anchor="middle">{short(x)}</text>')
    out.append(f'<path d="M48 240H410" stroke="var(--ink)"/><text x="5" y="12">{escape(y_label)}</text>'
               f'<text x="410" y="278" text-anchor="end">{escape(x_label)}</text>')
    legend = []
    for i, (name, some) in enumerate(series.items()):
        colour = f"var(--c{i % 8})"
        legend.append(f'<span><span style="color: {colour}">●</span> {escape(name)}</span>')
        if lines and some:
            line, dashes = "L".join(f"{x_of(x)} {y_of(y)}" for x, _, y, _ in some), ' stroke-dasharray="4"' * (i > 7)
            out.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>')
        for x, low, y, high in some if len(some) <= 40 or not lines else ():  # a long log is a line alone
            bar = f'<path d="M{x_of(x)} {y_of(low)}V{y_of(high)}"/>' * (low < high)
            out.append(f'<g stroke="{colour}" fill="{colour}"><title>{escape(name)}: {x:,g}, {y:.4g}</title>{bar}'
                       f'<circle cx="{x_of(x)}" cy="{y_of(y)}" r="2.5"/></g>')
    return "".join(out) + f'</svg><div class="legend">{" ".join(legend)}</div></figure>\n'


def by_skill(names):
    """Skills in the order of SKILLS, others after them, so that each has one colour in all charts."""
    return sorted(dict.fromkeys(names), key=lambda name: SKILLS.index(name) if name in SKILLS else len(SKILLS))


def compare(results, folders, brackets):
    """The page: charts of skill and loss against size, step, tokens and minutes, and the table, with a word on what
    stands in brackets."""
    charts, size, logs = [], "parameters without embedding and head", {}
    titles = dict.fromkeys(title for result in results.values() for title in result)

    def by_size(title, figure):
        return [(result["model"]["parameters"], value[1], value[0], value[2]) for result in results.values()
                if (value := result.get(title, {}).get(figure))]

    for title in titles:
        if title.startswith(("probes", "spans")):
            skills = by_skill(name for result in results.values() for name in result.get(title, ())
                              if not re.search("[,:]", name))
            charts.append(chart(f"{title}: skill against size", size, "share passed",
                                {skill: by_size(title, skill) for skill in skills}, log_x=True))
    for name, result in results.items():
        for title, series in result.get("steps", {}).items():
            charts.append(chart(f"{name}, {title}: skill against step", "step", "share passed",
                                {skill: series[skill] for skill in by_skill(series)}, log_x=True))
        if os.path.exists(log := os.path.join(folders[name], "log.jsonl")):
            with open(log) as f:
                logs[name] = [record for record in map(json.loads, f) if "val_bpb" in record]
    for label, key, unit in (("tokens", "tokens", 1), ("minutes", "seconds", 60)):
        charts.append(chart(f"bits per byte against {label}", label, "val_bpb", {
            name: [(r[key] / unit, r["val_bpb"]) for r in log] for name, log in logs.items()}, log_x=True))
    charts.append(chart("bits per byte against size", size, "val_bpb", {
        title: by_size(title, "val_bpb") for title in titles if title.startswith("loss")}, log_x=True))
    return page("Models compared", '<div class="charts">\n' + "".join(charts) + "</div>\n" + html_table(results)
                + f"<p>In brackets: {brackets}.</p>")

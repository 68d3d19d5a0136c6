"""Compare graded runs: a table with a column for each run, and a page of charts.

    python -m lab.compare out/a out/b                       prints the table, writes out/compare.html
    python -m lab.compare out/a-1 out/a-2 out/b --seeds     runs that differ only in their seed become one column
    python -m lab.compare out/a/context256.eval.json        any file that eval.py wrote, instead of a run's folder

Nothing is measured here: all figures come from eval.json, and the curves of training from log.jsonl beside it."""
import json
import math
import os
import sys
from dataclasses import dataclass
from html import escape
from itertools import chain

from common import CommandLine, run_main
from common.dataset import SKILLS
from common.files import atomic_write, read_lines
from common.results import format_figure
from common.runs import existing_runs, newest_run


def read_run(run):
    """(content of eval.json, records of log.jsonl with a validation loss) of a run's folder or an eval.json file."""
    path = run if run.endswith(".json") else os.path.join(run, "eval.json")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        sys.exit(f"no run {run}: choose from {', '.join(existing_runs()) or 'those that python train.py makes'}")
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
    except (OSError, ValueError):
        sys.exit(f"cannot read {path}: run python eval.py {folder} first")
    if "model" not in results:
        sys.exit(f"{path} was not written by eval.py: name the folder of a run instead")
    log = read_lines(os.path.join(folder, "log.jsonl"))
    return results, [record for record in log if "val_bpb" in record]


def figure_rows(results):
    """Rows for print_table from {run: eval.json}: each section's title, then its figures with a cell for each run."""
    rows = [["", *results]]
    titles = dict.fromkeys(title for result in results.values() for title in result)
    titles.pop("steps", None)  # curves, which only the page can show
    for title in titles:
        sections = [result.get(title, {}) for result in results.values()]
        measured = {section.get("measured with") for section in sections if section}
        rows.append([f"{title} ({measured.pop()})" if len(measured) == 1 and None not in measured else title])
        for name in dict.fromkeys(name for section in sections for name in section):
            if name not in ("checkpoint", "settings", "measured with"):  # long texts
                rows.append([f"  {name}", *(format_figure(name, section.get(name)) for section in sections)])
    return rows


def print_table(rows):
    """Print rows of text, the first column left-aligned and the others right-aligned. A row of one cell is a title."""
    widths = [max(len(row[i]) for row in rows if len(row) > 1) for i in range(len(rows[0]))]
    for name, *cells in rows:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:])), sep="  ")


def merge_seeds(results):
    """{run: eval.json} in which runs of equal settings are one, under the name of the first of them."""
    groups = {}
    for run, result in results.items():
        settings = result["model"].get("settings", run)
        groups.setdefault(settings, []).append(run)
    merged = {}
    for runs in groups.values():
        merged[runs[0]] = merge([results[run] for run in runs])
        merged[runs[0]]["model"]["runs"] = len(runs)
    return merged


def merge(values):
    """Merge a section, a curve or a figure of several runs; None stands for a run that lacks it.

    Sections are merged figure by figure, curves step by step. An estimate becomes [mean, lowest, highest], and [value]
    if only one run has it: a bootstrap interval would be taken for the range of the seeds. Numbers and texts that are
    the same in all runs stay; texts that differ become None."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    if isinstance(values[0], dict):
        return {key: merge([value.get(key) for value in values]) for key in dict.fromkeys(chain(*values))}
    if isinstance(values[0], list) and isinstance(values[0][0], list):
        return merge_curves(values)
    if not isinstance(values[0], list) and all(value == values[0] for value in values):
        return values[0]
    numbers = [value[0] if isinstance(value, list) else value for value in values if not isinstance(value, str)]
    if len(numbers) > 1:
        return [sum(numbers) / len(numbers), min(numbers), max(numbers)]
    return numbers or None


def merge_curves(curves):
    """[[step, lowest, mean, highest]] from the [[step, low, value, high]] of each run. The runs have equal steps."""
    merged = []
    for points in zip(*curves):
        values = [value for _, _, value, _ in points]
        merged.append([points[0][0], min(values), sum(values) / len(values), max(values)])
    return merged


# -----------------------------------------------------------------------------------------------------------------
# charts: SVG inside a page that loads nothing, needs no script, and follows the reader's light or dark theme

# the colors of series, --c0 to --c7, are legible on white and on black
STYLE = """
:root { color-scheme: light dark; --faint: color-mix(in srgb, currentColor 20%, transparent); --c0: #2f80d0;
  --c1: #cc5f10; --c2: #1f8a55; --c3: #b8479a; --c4: #8a7400; --c5: #0b8494; --c6: #d0454a; --c7: #7465d8 }
body { margin: 0 auto; max-width: 68rem; padding: 0 1rem 3rem; font: 1rem/1.5 system-ui, sans-serif }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.5rem 2rem }
figure { margin: 0 } figcaption { font-weight: 600 } svg { display: block; width: 100%; fill: currentColor }
.legend { font-size: .9rem; display: flex; flex-wrap: wrap; gap: 0 1rem } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin-top: 2rem }
td, th { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--faint); white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal }
"""
COLORS = 8
LEFT, RIGHT, TOP, BOTTOM = 48, 410, 20, 240  # what the axes enclose, in a drawing 420 wide and 284 high


@dataclass
class Axis:
    """A range of values, and the coordinates in the drawing at which it starts and ends."""
    low: float
    high: float
    start: int
    end: int
    log: bool = False

    def place(self, value):
        """The coordinate of a value."""
        scale = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return round(self.start + share * (self.end - self.start), 1)


def chart(title, x_label, y_label, series, log_x=False, lines=True):
    """HTML of a chart of `series`: {name: [(x, y)]} or, with intervals, {name: [(x, low, y, high)]}.

    Points are joined if `lines`. All text is escaped here. The chart is "" if there is no point."""
    series = {name: add_intervals(points, log_x) for name, points in series.items()}
    all_points = sum(series.values(), [])
    if not all_points:
        return ""
    x_axis, y_axis = fit_axes(all_points, log_x)
    drawing = draw_axes(x_axis, y_axis, x_label, y_label)
    legend = ""
    for number, (name, points) in enumerate(series.items()):
        if points:
            drawing += draw_series(x_axis, y_axis, name, points, number, lines)
            legend += f'<span><span style="color: var(--c{number % COLORS})">●</span> {escape(name)}</span>\n'
    return (f'<figure><figcaption>{escape(title)}</figcaption>'
            f'<svg viewBox="0 0 420 284" font-size="12" role="img" aria-label="{escape(title)}">{drawing}</svg>'
            f'<div class="legend">{legend}</div></figure>\n')


def add_intervals(points, log_x):
    """The points as (x, low, y, high), sorted by x. A logarithmic axis cannot show x = 0: such points are left out."""
    points = [point if len(point) == 4 else (point[0], point[1], point[1], point[1]) for point in points]
    return sorted(tuple(point) for point in points if point[0] > 0 or not log_x)


def fit_axes(points, log_x):
    """The axes of x and y for points (x, low, y, high), with a margin around them."""
    xs, lows, _, highs = zip(*points)
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(lows), max(highs)
    if log_x:
        x_low, x_high = x_low / 1.2, x_high * 1.2
    elif x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    margin = 0.05 * (y_high - y_low) or 0.1 * abs(y_high) or 1  # an axis needs a length, even if all y are equal
    return Axis(x_low, x_high, LEFT, RIGHT, log_x), Axis(y_low - margin, y_high + margin, BOTTOM, TOP)


def ticks(low, high, log):
    """Round numbers between low and high. On a linear axis: the multiples of 1, 2 or 5 times a power of ten, whichever
    gives three to seven ticks. On a logarithmic one: 1, 2 and 5 times each power of ten, or the powers alone if the
    axis is long."""
    if log:
        factors = (1, 2, 5) if high / low < 200 else (1,)
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [factor * 10.0 ** exponent for exponent in exponents for factor in factors]
        return [mark for mark in marks if low <= mark <= high] or [math.sqrt(low * high)]
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = min(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 6)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(step * i, 12) for i in range(first, last + 1)]


def tick_label(value):
    """A short number, such as 1.5M for 1500000."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}"


def draw_axes(x_axis, y_axis, x_label, y_label):
    """SVG of both axes with their labels and ticks. A tick of y is a line across the whole chart."""
    svg = ""
    for value in ticks(y_axis.low, y_axis.high, False):
        y = y_axis.place(value)
        svg += (f'<path d="M{LEFT} {y}H{RIGHT}" stroke="var(--faint)"/>'
                f'<text x="{LEFT - 5}" y="{y + 4}" text-anchor="end">{tick_label(value)}</text>')
    for value in ticks(x_axis.low, x_axis.high, x_axis.log):
        x = x_axis.place(value)
        svg += (f'<path d="M{x} {BOTTOM}v5" stroke="currentColor"/>'
                f'<text x="{x}" y="{BOTTOM + 18}" text-anchor="middle">{tick_label(value)}</text>')
    return svg + (f'<path d="M{LEFT} {BOTTOM}H{RIGHT}" stroke="currentColor"/>'
                  f'<text x="5" y="12">{escape(y_label)}</text>'
                  f'<text x="{RIGHT}" y="278" text-anchor="end">{escape(x_label)}</text>')


def draw_series(x_axis, y_axis, name, points, number, lines):
    """SVG of one series: a line, and for each point a dot and its interval. A line of many points has no dots."""
    color = f"var(--c{number % COLORS})"
    svg = ""
    if lines:
        line = "L".join(f"{x_axis.place(x)} {y_axis.place(y)}" for x, _, y, _ in points)
        dashes = ' stroke-dasharray="4"' if number >= COLORS else ""
        svg += f'<path d="M{line}" fill="none" stroke="{color}" stroke-width="1.8"{dashes}/>'
    if lines and len(points) > 40:
        return svg
    for x, low, y, high in points:
        column = x_axis.place(x)
        interval = f'<path d="M{column} {y_axis.place(low)}V{y_axis.place(high)}"/>' if low < high else ""
        svg += (f'<g stroke="{color}" fill="{color}"><title>{escape(name)}: {x:,g}, {y:.4g}</title>{interval}'
                f'<circle cx="{column}" cy="{y_axis.place(y)}" r="2.5"/></g>')
    return svg


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


def html_table(rows):
    """HTML of a table. The first row, and titles, which stand alone in theirs, are bold; floats have three digits."""
    lines = []
    for i, row in enumerate(rows):
        tag = "th" if i == 0 or len(row) == 1 else "td"
        cells = [f"{cell:.3g}" if isinstance(cell, float) else escape(str(cell)) for cell in row]
        lines.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>\n")
    return f'<div class="scroll"><table>\n{"".join(lines)}</table></div>\n'


def by_size(results, title, figure):
    """[(parameters, low, value, high)] of one figure, for the runs that have it."""
    points = []
    for result in results.values():
        value = result.get(title, {}).get(figure)
        if isinstance(value, list):  # [value, low, high], or [value] alone
            points.append((result["model"]["parameters"], min(value), value[0], max(value)))
    return points


def draw_charts(results, logs):
    """HTML of all charts. results: {run: eval.json}; logs: {run: records of log.jsonl}."""
    charts = []
    titles = list(dict.fromkeys(title for result in results.values() for title in result))
    size, share = "parameters without embedding and head", "share passed"
    for title in titles:
        if title.startswith(("probes", "spans")):
            series = {skill: by_size(results, title, skill) for skill in SKILLS[1:]}
            charts.append(chart(f"{title}: skill against size", size, share, series, log_x=True))
    for run, result in results.items():
        for title, curves in result.get("steps", {}).items():
            series = {skill: curves.get(skill, []) for skill in SKILLS[1:]}
            charts.append(chart(f"{run}, {title}: skill against step", "step", share, series, log_x=True))
    for label, key, unit in (("tokens", "tokens", 1), ("minutes", "seconds", 60)):
        series = {run: [(record[key] / unit, record["val_bpb"]) for record in log] for run, log in logs.items()}
        charts.append(chart(f"bits per byte against {label}", label, "val_bpb", series, log_x=True))
    series = {title: by_size(results, title, "val_bpb") for title in titles if title.startswith("loss")}
    charts.append(chart("bits per byte against size", size, "val_bpb", series, log_x=True))
    return '<div class="charts">\n' + "".join(charts) + "</div>\n"


def main(argv=None):
    parser = CommandLine(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of runs, or eval.json files (default: the newest run)")
    parser.option("seeds", False, "show runs that differ only in their seed as one: mean, lowest and highest")
    args = parser.parse_args(argv)
    results, logs = {}, {}
    for run in args.runs or [newest_run()]:
        results[run], logs[run] = read_run(run)
    brackets = "95 % intervals, bootstrapped over stories, probes or prompts"
    if args.seeds:
        results = merge_seeds(results)
        logs = {run: logs[run] for run in results}
        brackets = "the lowest and the highest of the seeds; curves against tokens and minutes show the first seed"
    rows = figure_rows(results)
    print_table(rows)
    os.makedirs("out", exist_ok=True)
    path = os.path.join("out", "compare.html")
    with atomic_write(path) as file:
        note = f"<p>In brackets: {brackets}.</p>"
        file.write(page("Models compared", draw_charts(results, logs) + html_table(rows) + note))
    print(f"charts: {path}")


if __name__ == "__main__":
    run_main(main)

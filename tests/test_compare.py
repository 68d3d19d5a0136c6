"""lab/compare.py: runs side by side in a table, seeds as one, and charts that show every point."""
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

import eval
from lab import compare


def write_run(folder, loss, settings="x", **sections):
    """A graded run without a model: its eval.json and log.jsonl."""
    folder.mkdir(parents=True)
    results = {"model": {"parameters": 1000, "settings": settings, "checkpoint": "abc"},
               "loss on tiny": {"val_bpb": [loss, loss - 0.1, loss + 0.1], "stories": 7}, **sections}
    (folder / "eval.json").write_text(json.dumps(results))
    records = [{"step": 0, "tokens": 0, "seconds": 0.0, "val_bpb": 9.0}, {"step": 1, "loss": 3.0},
               {"step": 2, "tokens": 200, "seconds": 60.0, "val_bpb": 2 * loss},
               {"step": 4, "tokens": 400, "seconds": 120.0, "val_bpb": loss}]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def figures_of(svg, title):
    """The charts of this title on a page."""
    figures = [ElementTree.fromstring(text) for text in re.findall("(?s)<figure>.*?</figure>", svg)]
    return [figure for figure in figures if figure.find("figcaption").text == title]


# ---------------------------------------------------------------------------------------------------------------
# the command

def test_runs_stand_side_by_side(workplace, capsys):
    probes = {"fact": [0.5, 0.4, 0.6], "fact, by chance": [0.3, 0.2, 0.4], "fact: body": [0.5, 0.4, 0.6],
              "reasoning": None, "measured with": "probes.json"}
    steps = {"probes": {"fact": [[1, 0.1, 0.2, 0.3], [2, 0.2, 0.3, 0.4], [4, 0.4, 0.5, 0.6]]}}
    write_run(workplace / "out/a", 1.0, probes=probes)
    write_run(workplace / "out/<b>", 0.5, "y", probes=probes, steps=steps)
    compare.main(["out/a", "out/<b>"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["out/a", "out/<b>"]
    bpb, = [line for line in lines if "val_bpb" in line]
    assert bpb.split() == ["val_bpb", "1.0000", "[0.9000,", "1.1000]", "0.5000", "[0.4000,", "0.6000]"]
    assert not any("abc" in line or "settings" in line for line in lines)
    page = (workplace / "out/compare.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page and "<b>" not in page and "1.0000 [0.9000, 1.1000]" in page
    assert not re.search(r"<script|https?://|@import|url\(", page) and "color-scheme: light dark" in page
    points = {title: [len(list(figure.iter("circle"))) for figure in figures_of(page, title)] for title in (
        "probes: skill against size", "out/<b>, probes: skill against step", "bits per byte against tokens",
        "bits per byte against minutes", "bits per byte against size")}
    assert list(points.values()) == [[2], [3], [4], [4], [2]]  # no baselines, no kinds, and no step 0 on a log axis
    assert page.count("<svg") == 5


def test_what_eval_measured_is_shown(run, in_prepared, capsys):
    eval.main([run, "--device=cpu", "--only=loss"])
    capsys.readouterr()
    compare.main([run])
    bpb = json.load(open(f"{run}/eval.json"))["loss on tiny"]["val_bpb"][0]
    assert f"{bpb:.4f} [" in capsys.readouterr().out


def test_a_file_of_results_stands_for_a_run(workplace, capsys):
    write_run(workplace / "out/a", 1.0)
    (workplace / "out/a/eval.json").rename(workplace / "out/a/context256.eval.json")
    compare.main(["out/a/context256.eval.json"])
    assert "1.0000 [" in capsys.readouterr().out
    assert figures_of((workplace / "out/compare.html").read_text(encoding="utf-8"), "bits per byte against tokens")


@pytest.mark.parametrize("runs, expected", [
    (["out/none"], "no run out/none: choose from "),
    (["out/a/context2.eval.json"], "run python eval.py out/a"),
    (["out/a"], "cannot read out/a/eval.json: run python eval.py out/a"),
    (["out/a/interpret.json"], "was not written by eval.py"),
    ([], "python train.py"),
])
def test_bad_input_ends_in_one_line(workplace, runs, expected):
    (workplace / "out/a").mkdir(parents=True)
    (workplace / "out/a/eval.json").write_text('{"model": ')
    (workplace / "out/a/interpret.json").write_text("{}")
    with pytest.raises(SystemExit, match=expected) as end:
        compare.main(runs)
    assert "\n" not in str(end.value)


# ---------------------------------------------------------------------------------------------------------------
# seeds

def test_runs_of_several_seeds_are_shown_as_one():
    """Mean, lowest and highest of each figure; other settings have a column of their own, and so has a run without."""
    def result(settings, loss, passed):
        return {"model": {"parameters": 5, "settings": settings}, "loss": {"val_bpb": [loss, 0, 9], "stories": 7},
                "judge": {"judge": "m", "replies": int(loss)}, "probes": {"fact": passed, "context": None},
                "steps": {"probes": {"fact": [[1, 0, loss, 9], [2, 0, 5.0, 9]]}}}
    results = {"a-1": result("x", 1.0, [0.5, 0.4, 0.6]), "b-1": result("y", 7.0, [1, 1, 1]),
               "a-2": result("x", 2.0, 0.25), "a-3": result("x", 3.0, None), "old": result("z", 4.0, 0.5)}
    del results["old"]["model"]["settings"]
    merged = compare.merge_seeds(results)
    assert list(merged) == ["a-1", "b-1", "old"]
    assert merged["b-1"]["loss"]["val_bpb"] == [7] and merged["b-1"]["probes"]["fact"] == [1]  # no range of one seed
    assert merged["a-1"] == {"model": {"parameters": 5, "settings": "x", "runs": 3},
                             "loss": {"val_bpb": [2, 1, 3], "stories": 7},
                             "judge": {"judge": "m", "replies": [2, 1, 3]},
                             "probes": {"fact": [0.375, 0.25, 0.5], "context": None},
                             "steps": {"probes": {"fact": [[1, 1, 2, 3], [2, 5, 5, 5]]}}}


def test_a_section_that_some_seeds_lack_is_that_of_the_others():
    results = [{"judge": {"judge": "m", "plot": 4.0}}, {"judge": {"judge": "n", "plot": 6.0}}, {}]
    assert compare.merge(results) == compare.merge(results[::-1]) == {"judge": {"judge": None, "plot": [5, 4, 6]}}


def test_seeds_are_one_column(workplace, capsys):
    for seed, loss in ((1, 1.0), (2, 2.0)):
        write_run(workplace / f"out/a-{seed}", loss)
    write_run(workplace / "out/b", 3.0, "y")
    compare.main(["out/a-1", "out/a-2", "out/b", "--seeds"])
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["out/a-1", "out/b"]
    bpb, = [line for line in out.splitlines() if "val_bpb" in line]
    assert bpb.split() == ["val_bpb", "1.5000", "[1.0000,", "2.0000]", "3.0000"]  # one seed has no range
    page = (workplace / "out/compare.html").read_text(encoding="utf-8")
    assert "highest of the seeds" in page
    sizes, = figures_of(page, "bits per byte against size")
    assert len(list(sizes.iter("circle"))) == 2


# ---------------------------------------------------------------------------------------------------------------
# charts

def test_charts_are_well_formed_and_show_every_point():
    series = {"one": [(1, 0.1, 0.2, 0.3), (1e6, 0.2, 0.4, 0.5)], "<two>": [(5, 0.1)], "no": []}
    html = compare.chart("<a & b>", "x", "y", series, log_x=True)
    figure = ElementTree.fromstring(html)
    assert figure.find("figcaption").text == "<a & b>" and len(list(figure.iter("circle"))) == 3
    heights = [float(circle.get("cy")) for circle in figure.iter("circle")]
    assert heights[1] < heights[0] < heights[2]  # 0.4 above 0.2 above 0.1
    assert compare.chart("t", "x", "y", {"none": []}) == compare.chart("t", "x", "y", {}) == ""
    for points in ([(3, 7)], [(0, 0), (0, 0)], [(1e-9, 5), (2e-9, 5)], [(i, i * 1e9) for i in range(1000)]):
        ElementTree.fromstring(compare.chart("t", "x", "y", {"a": points}))


def test_points_are_joined_in_the_order_of_x():
    figure = ElementTree.fromstring(compare.chart("t", "x", "y", {"a": [(3, 1), (1, 0), (2, 5)]}))
    columns = [float(circle.get("cx")) for circle in figure.iter("circle")]
    assert columns == sorted(columns) and len(set(columns)) == 3
    line, = [path for path in figure.iter("path") if path.get("fill") == "none"]
    assert [float(point.split()[0]) for point in line.get("d")[1:].split("L")] == columns
    dots = ElementTree.fromstring(compare.chart("t", "x", "y", {"a": [(3, 1), (1, 0)]}, lines=False))
    assert not [path for path in dots.iter("path") if path.get("fill") == "none"]


def test_axes_have_a_handful_of_round_ticks():
    for low, high in ((0, 1), (0.6, 0.7), (-3, 11), (1e-7, 3e-7), (0, 12345)):
        ticks = compare.ticks(low, high, False)
        assert 3 <= len(ticks) <= 7 and all(low <= tick <= high for tick in ticks)
    assert compare.ticks(1, 50, True) == [1, 2, 5, 10, 20, 50]
    assert compare.ticks(1, 1e6, True) == [1, 10, 100, 1e3, 1e4, 1e5, 1e6]

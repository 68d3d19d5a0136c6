"""Every lesson of the course takes one step, so that the commands of its script are known to fit the stages."""
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lab.interpret
import train
from conftest import make_stories, write_jsonl
from eval import probe_from_span, read_spans
from lab.world import stories

COURSE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "course")
sys.path.insert(0, COURSE)

import lesson  # noqa: E402

# Added to the lesson's own options, so that a stage takes a second. Of two options of one name, the last counts.
SMALL = {
    "lab.world": ["--n=300"],
    "train.py": ["--batch_tokens=512", "--compile=False", "--dtype=float32", "--device=cpu"],
    "eval.py": ["--probes=probes.json", "--spans=1", "--device=cpu"],
    "lab.completions": ["--each=1", "--max_tokens=5", "--device=cpu"],
    "lab.interpret": ["--stories=10", "--device=cpu"],
}


def main_of(stage):
    return importlib.import_module(stage.removesuffix(".py")).main


def run_here(stage, arguments):
    """What lesson.start_process does, but small, and in this process: to start Python and torch takes seconds."""
    main_of(stage)([*arguments, *SMALL.get(stage, [])])


@pytest.fixture(scope="module")
def prepared_world(tmp_path_factory):
    """A folder with 300 stories of the world, prepared as data/world and, instead of real ones, as data/tinystories."""
    folder = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_here("lab.world", [])
        run_here("prepare.py", ["--dataset=world", "--vocab_size=600"])
        Path("data/tinystories").mkdir()
        shutil.copy("data/world/stories.jsonl", "data/tinystories")
        run_here("prepare.py", ["--dataset=tinystories", "--input=data/tinystories", "--tokenizer=world"])
        with open(os.path.join(COURSE, "..", "data", "probes.json"), encoding="utf-8") as probes:
            Path("probes.json").write_text(json.dumps(json.load(probes)[::50]), encoding="utf-8")
    return folder


@pytest.fixture
def classroom(prepared_world, monkeypatch):
    """Lessons run in that folder and their stages in this process, without what takes them longest."""
    monkeypatch.chdir(prepared_world)
    monkeypatch.setattr(lesson, "start_process", run_here)
    monkeypatch.setattr(train, "write_stories", lambda *args, **settings: [])
    monkeypatch.setattr(train, "skill_accuracy", lambda *args: {})
    monkeypatch.setattr(lab.interpret, "ABLATION_STORIES", 1)
    monkeypatch.setattr(lab.interpret, "read_spans", lambda dataset, limit, **by: read_spans(dataset, 1, **by))


@pytest.mark.parametrize("script, options, run, sections", [
    ("01_size", [], "size-1x16-1", ["loss on world", "spans of world", "steps"]),
    ("02_steps", [], "size-4x128-1", ["steps"]),
    ("03_depth", [], "depth-8x44-1", ["loss on world", "spans of world"]),
    ("03_depth", ["--dataset=tinystories"], "real-depth-1x128-1", ["loss on tinystories", "probes"]),
    ("04_breadth", [], "broad-longer-4x32-1", ["loss on world", "spans of world"]),
    ("05_lego", [], "mental-4-without-1", ["spans of mental"]),
    ("05_warm_start", [], "story-then-mental-1", ["spans of mental"]),
    ("06_positions", [], "pos-none-1", ["loss on world", "heads"]),
    ("07_heads", [], "inside-4x128-1", ["loss on tinystories", "heads", "neurons"]),
    ("08_instructions", [], "asked-1", ["instructions of asked", "loss on asked"]),
    ("09_compute", [], "budget-1e13-4x128-1", ["loss on world"]),
    ("11_speed", [], "rung-7-gain-value-embeds-1", ["loss on tinystories"]),
    ("12_names", [], "moved-1", ["loss on swapped", "spans of swapped"]),
    ("13_transfer", [], "told-then-real-1", ["loss on tinystories", "probes", "spans of told"]),
    ("13_mixes", [], "mix-third-1", ["loss on tinystories", "probes", "spans of told"]),
])
def test_one_step_of_a_lesson_trains_and_grades_its_models(classroom, script, options, run, sections):
    main_of(script)(["--seeds=1", "--max_steps=1", *options])
    results = {}
    for path in Path("out/quick", run).glob("*eval.json"):  # one for each context
        results.update(json.loads(path.read_text(encoding="utf-8")))
    assert results["model"]["step"] == 1
    assert set(sections) <= set(results)


def test_part_2_of_lesson_7_looks_for_exclusion(classroom, monkeypatch, capsys):
    lesson_7 = importlib.import_module("07_exclusion")
    probes = [probe_from_span(record["story"], span, "") for record in stories(60) for span in record["spans"]]
    exclusions = [probe for probe in probes if probe["kind"] == "exclusion"]
    monkeypatch.setattr(lesson_7, "read_spans", lambda *args, **by: exclusions[:4] + probes[:4])
    lesson_7.main(["--seeds=1", "--max_steps=1"])
    table = capsys.readouterr().out
    assert "exclusion" in table and "without 10 random ones" in table and "right word leads" in table


def test_lesson_10_compares_corpora_with_and_without_random_words(classroom, monkeypatch, capsys):
    asked = {}

    def write_or_run(stage, arguments):
        if stage != "generate.py":
            return run_here(stage, arguments)
        options = dict(argument[2:].split("=") for argument in arguments)
        asked[options["name"]] = options["naive"]
        write_jsonl(Path("data", options["name"], "stories.jsonl"), make_stories(20))

    monkeypatch.setattr(lesson, "start_process", write_or_run)
    main_of("10_diversity")(["--model=any", "--n=20"])
    assert asked == {"varied": "False", "naive": "True"}
    table = capsys.readouterr().out
    assert "data/world/stories.jsonl" in table and "data/naive/stories.jsonl" in table


def test_part_2_of_lesson_10_learns_from_what_a_model_wrote(classroom, monkeypatch, capsys):
    def write(model, encoding, prompt, max_tokens, seeds, **settings):
        asked.append(prompt)
        return [encoding.encode_ordinary(prompt + record["story"]) for record in make_stories(2, seed=len(asked))]
    asked, lesson_10 = [], importlib.import_module("10_writer")
    monkeypatch.setattr(lesson_10, "write_stories", write)
    lesson_10.main(["--seeds=1", "--max_steps=1"])
    results = json.loads(Path("out/quick/from-varied-1/eval.json").read_text(encoding="utf-8"))
    assert results["model"]["step"] == 1 and "loss on tinystories" in results
    assert len(set(asked[:40])) == 40 and set(asked[40:]) == {"Story:\n"}  # random words for each, or for none
    assert "requested words used" in capsys.readouterr().out


def test_words_swapped_in_lesson_12_are_swapped_back_and_stay_where_their_spans_are():
    lesson_12 = importlib.import_module("12_names")
    swapped = lesson_12.swap_words()
    assert len(set(swapped.values())) == len(swapped) > 1000
    back = {other: word for word, other in swapped.items()}
    for record in stories(20):
        story = lesson_12.translate(record["story"], swapped)
        assert story != record["story"] and lesson_12.translate(story, back) == record["story"]
        for span in record["spans"]:
            start, end = (len(lesson_12.translate(record["story"][:span[side]], swapped)) for side in ("start", "end"))
            assert story[start:end] == lesson_12.translate(record["story"][span["start"]:span["end"]], swapped)


def test_a_run_that_exists_is_resumed_and_a_quick_look_has_a_folder_of_its_own(workplace, monkeypatch):
    commands = []
    monkeypatch.setattr(lesson, "start_process", lambda stage, arguments: commands.append(arguments))
    (workplace / "out/a").mkdir(parents=True)
    (workplace / "out/a/ckpt.pt").touch()
    assert lesson.train("out/a", max_tokens=100) == "out/a"
    assert lesson.train("out/b", max_tokens=100) == "out/b"
    assert lesson.train("out/a", max_tokens=100, max_steps=5) == "out/quick/a"
    assert commands == [["--out_dir=out/a", "--evals=0", "--max_tokens=100", "--resume=True"],
                        ["--out_dir=out/b", "--evals=0", "--max_tokens=100"],
                        ["--out_dir=out/quick/a", "--evals=0", "--max_steps=5"]]


def test_a_stage_that_fails_ends_the_script(tmp_path):
    (tmp_path / "stage.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(SystemExit, match="stage.py failed"):
        lesson.run(str(tmp_path / "stage.py"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups to interrupt")
def test_ctrl_c_lets_the_stage_save_and_ends_the_whole_script(tmp_path):
    (tmp_path / "stage.py").write_text(
        "import sys, time\n"
        "print('started', flush=True)\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(1)\n    open(sys.argv[1], 'w').close()\n")
    (tmp_path / "script.py").write_text(
        f"import sys; sys.path.insert(0, {COURSE!r})\n"
        "import lesson\n"
        "lesson.run_main(lambda: [lesson.run('stage.py', name) for name in ('first', 'second')])\n"
        .replace("'stage.py'", repr(str(tmp_path / "stage.py"))))
    process = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.stdout.readline() != "started\n":
        assert process.poll() is None
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "run the same lesson again" in errors
    assert (tmp_path / "first").exists() and not (tmp_path / "second").exists()

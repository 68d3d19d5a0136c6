"""What the lessons' scripts share: their options, and running the stages one after another.

Every stage runs in a process of its own, as if its command had been typed; the command is printed first. A script
that was stopped can be started again: finished runs are skipped, and an interrupted one is resumed.
"""
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the repository
sys.path.insert(0, ROOT)

from common import CommandLine, run_main  # noqa: E402, F401 (the scripts import run_main from here)


def command_line(description, real=False):
    """The options of every lesson that trains. `description` is the script's docstring; `real` is whether the lesson
    can be repeated on real stories."""
    parser = CommandLine(description.splitlines()[0])
    if real:
        parser.option("dataset", "world", "what to train on", choices=["world", "tinystories"])
    parser.option("seeds", "1,2,3", "seeds to train, separated by commas", type=comma_separated)
    parser.option("max_steps", 0, "steps of every run, for a quick look in out/quick (0: as the lesson says)", low=0)
    return parser


def comma_separated(text):
    return [int(number) for number in text.split(",")]


def run(stage, *names, **options):
    """Run a command: run("eval.py", "out/a", only="loss") is `python eval.py out/a --only=loss`."""
    arguments = [*names, *(f"--{name}={value}" for name, value in options.items())]
    module = "-m " if stage.startswith("lab.") else ""
    print(f"\n> python {module}{stage} {' '.join(arguments)}", flush=True)
    start_process(stage, arguments)


def start_process(stage, arguments):
    """Start train.py, lab.world or another stage, and wait for its end. If it fails, the whole script ends."""
    command = ["-m", stage] if stage.startswith("lab.") else [os.path.join(ROOT, stage)]
    environment = {**os.environ, "PYTHONPATH": ROOT + os.pathsep + os.environ.get("PYTHONPATH", "")}
    process = subprocess.Popen([sys.executable, *command, *arguments], env=environment)
    interrupted = False
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt:  # the stage receives Ctrl-C as well, and may need a while to save its work
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt("stopped: run the same lesson again to continue")
    if process.returncode != 0:
        sys.exit(f"{stage} failed (see above): correct the cause, then run the same lesson again to continue")


def train(out_dir, max_steps=0, **options):
    """Train a model, or resume a run that was stopped (a finished one is left as it is). Returns the run's folder.
    There are no evaluations on the way, which take time, and so no checkpoints either."""
    if max_steps:
        out_dir = f"out/quick/{os.path.basename(out_dir)}"  # kept apart from runs of full length
        limits = ("max_tokens", "max_flops", "max_minutes")
        options = {name: value for name, value in options.items() if name not in limits} | {"max_steps": max_steps}
    if os.path.exists(f"{out_dir}/ckpt.pt"):
        options["resume"] = True
    run("train.py", out_dir=out_dir, **{"evals": 0, **options})
    return out_dir


def prepare(dataset, **options):
    """Prepare a dataset, unless that was done before."""
    if not os.path.exists(f"data/{dataset}/meta.json"):
        run("prepare.py", dataset=dataset, **options)


def write_world(name, **options):
    """Write stories of the built-in world to data/NAME, unless they are there already."""
    if not os.path.exists(f"data/{name}/stories.jsonl"):
        run("lab.world", name=name, **options)


def grade(runs, context=0, **options):
    """Evaluate runs, with another context if there is one, and print a table in which the seeds of one setting share a
    column: mean [lowest, highest]."""
    run("eval.py", *runs, context=context, **options)
    run("lab.compare", *(f"{name}/context{context}.eval.json" if context else name for name in runs), seeds=True)

"""Models to grade, and their eval.json: each command of eval.py or of the laboratory adds its sections to the
eval.json of a run, and leaves those of others as they are."""
import glob
import json
import os
import re
import sys
from dataclasses import dataclass

import numpy as np
import torch

from common.dataset import check_bin, instruction, load_meta
from common.files import atomic_write, check_writable, file_hash
from common.runs import HOUSEKEEPING, load_run


@dataclass
class Subject:
    """A model to be graded, with all that grading needs: a run of train.py, or somebody else's model."""
    model: torch.nn.Module
    encoding: object    # a tiktoken.Encoding, or what stands in for one
    tokenizer: str      # the tokenizer's sha256; None for hf: models
    datasets: list      # whose stories it is graded on
    instruction: str    # what it expects before a story: "Story:\\n", or ""
    checkpoints: list   # paths of the checkpoints kept along the way
    about: dict         # what the section "model" of eval.json says about its training
    prefix: str         # beginning of the paths of the files about it

    def path(self, name):
        return self.prefix + name


def load_subject(name, device, dataset="", context=0, tokenizer=""):
    """The subject of a run's folder, of a checkpoint in one, or of hf:NAME."""
    if name.endswith((".txt", ".jsonl")):
        sys.exit(f"{name} is not a run: for a file of stories, run python -m lab.corpus {name}")
    if name.startswith("hf:"):
        if context:
            sys.exit(f"{name} has its own context: leave --context out")
        return load_hf_subject(name, device, dataset, tokenizer)
    model, checkpoint, encoding = load_run(name, device, context)
    path, prefix = os.path.join(name, "ckpt.pt"), os.path.join(name, "")
    kept = sorted(glob.glob(os.path.join(glob.escape(name), "ckpt-*.pt")))
    if name.endswith(".pt"):  # files about out/a/ckpt-0000064.pt are out/a/ckpt-0000064.eval.json and so on
        path, prefix, kept = name, name[:-2], []
    if context:
        prefix += f"context{context}."
    about = {"step": checkpoint["step"], "checkpoint": file_hash(path), "settings": experiment_of(checkpoint, context)}
    before = instruction({}) if checkpoint.get("instruct") else ""
    datasets = [dataset] if dataset else checkpoint["datasets"]
    for each in datasets:
        if not dataset and load_meta(each)["tokenizer"]["sha256"] != checkpoint["tokenizer"]:
            sys.exit(f"data/{each} is not what {name} was trained on: prepare it as it was, or give --dataset={each} "
                     "to grade the run on other stories")
    check_files(datasets, prefix)
    return Subject(model, encoding, checkpoint["tokenizer"], datasets, before, kept, about, prefix)


def check_files(datasets, prefix):
    """End the program, before minutes of grading, if figures cannot be written or a dataset is damaged."""
    check_writable(os.path.dirname(prefix))
    for dataset in datasets:
        check_bin(dataset, "val")


def load_hf_subject(name, device, dataset, tokenizer):
    """The subject of hf:NAME, which transformers loads. Its files go to out/hf-NAME."""
    if not dataset:
        sys.exit(f"{name} has no stories of its own: name a prepared dataset, such as --dataset=tinystories")
    if os.path.exists(os.path.join(name[3:], "ckpt.pt")):
        sys.exit(f"{name[3:]} is a run of train.py: leave hf: out")
    from lab.huggingface import load  # only here: it needs transformers
    prefix = os.path.join("out", "hf-" + os.path.basename(name[3:].rstrip("/")), "")
    check_files([dataset], prefix)
    model, encoding = load(name[3:], device, tokenizer)
    os.makedirs(prefix, exist_ok=True)
    return Subject(model, encoding, None, [dataset], "", [], {"checkpoint": name, "settings": name}, prefix)


def experiment_of(checkpoint, context):
    """What a run was trained with except its seed, as text: runs for which it is equal repeat one experiment."""
    settings = {name: value for name, value in checkpoint["args"].items() if name not in (*HOUSEKEEPING, "seed")}
    # out/warm-1 and out/warm-2 are two seeds of one experiment, and so are the runs that start from them
    settings["init_from"] = re.sub(r"-\d{1,2}$", "", settings["init_from"])
    if settings["max_minutes"]:
        settings["compile"] = checkpoint["args"]["compile"]  # by the clock, a faster run is another experiment
    else:
        settings["step"] = checkpoint["step"]  # one of them may have been stopped early
    return json.dumps({**settings, "context": context})


def read_results(subject):
    """The sections of eval.json, if they are about the same checkpoint: a run may have continued since then."""
    try:
        with open(subject.path("eval.json"), encoding="utf-8") as file:
            results = json.load(file)
    except (OSError, ValueError):
        results = {}
    if results.get("model", {}).get("checkpoint") != subject.about["checkpoint"]:
        results = {}
    model = subject.model
    about = {"parameters": model.num_params(embedding=False), "with embedding and head": model.num_params(),
             "context": model.config.block_size, **subject.about}
    return {**results, "model": about}


def add_section(subject, title, figures):
    """Add a section {figure: [value, low, high], number or text} to eval.json, in place of an older one."""
    results = {**read_results(subject), title: figures}
    with atomic_write(subject.path("eval.json")) as file:
        json.dump(results, file, indent=1)


def interval(numerators, denominators=None):
    """[value, low, high]: sum of numerators over sum of denominators with its 95 % interval, or a mean without
    denominators; None if the denominators sum to zero.

    The N stories, probes or prompts are drawn with replacement a thousand times (percentile bootstrap, Efron 1979).
    Tokens are not drawn one by one, since those of one story are not independent."""
    numerators = np.asarray(numerators, float)
    denominators = np.ones(len(numerators)) if denominators is None else np.asarray(denominators, float)
    if not denominators.sum():
        return None
    rng, ratios = np.random.default_rng(0), []
    for _ in range(1000):
        sample = rng.integers(0, len(numerators), len(numerators))
        if denominators[sample].sum():
            ratios.append(numerators[sample].sum() / denominators[sample].sum())
    low, high = np.quantile(ratios, (0.025, 0.975)).tolist()
    return [float(numerators.sum() / denominators.sum()), low, high]


def format_figure(name, value):
    """A figure of eval.json as text. A list is a value, and perhaps the low and high end of its interval."""
    if isinstance(value, list):
        digits = 4 if name.startswith("val_") else 3 if abs(value[0]) < 10 else 1
        value, *ends = (f"{number:.{digits}f}" for number in value)
        return f"{value} [{', '.join(ends)}]" if ends else value
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:,.4g}" if value % 1 else f"{value:,}"


def print_section(title, figures):
    """Print a section of eval.json, with what it was measured on in its first line."""
    figures = dict(figures)
    measured = figures.pop("measured with", "")
    print(f"{title} ({measured})" if measured else title)
    width = max(map(len, figures), default=0) + 2
    for name, value in figures.items():
        print(f"  {name:{width}}{format_figure(name, value)}")

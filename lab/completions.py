"""Let a model continue beginnings of stories, and measure its text: length, repetition, diversity, instructions.

    python -m lab.completions out/a

Adds the sections "completions" and, for models trained on instructions, "instructions of NAME" to out/a/eval.json."""
import os
import re
from collections import defaultdict

import numpy as np
import torch
from tqdm import tqdm

from common import CommandLine, newest_run, pick_device, run_main
from eval import HERE, add_section, interval, load_subject, print_section, read_list, split_stories
from generate import missing_words
from prepare import INSTRUCTIONS, instruction, load_meta, load_tokenizer, load_tokens
from sample import generate


def words_of(text):
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def ngrams(words, n):
    return list(zip(*(words[i:] for i in range(n))))


def complete(subject, prompts, max_tokens, each=1, title="completing"):
    """[[token ids]] of `each` continuations of every prompt at temperature 1, without <|endoftext|>. The i-th of all
    draws from seed i + 1. One of fewer than max_tokens tokens has ended by itself."""
    eot = subject.encoding.eot_token
    rows = [[eot] + subject.encoding.encode_ordinary(prompt) for prompt in prompts for _ in range(each)]
    by_length = defaultdict(list)  # prompts of one length can share a batch
    for i, row in enumerate(rows):
        by_length[len(row)].append(i)
    batches = [group[i:i + 50] for group in by_length.values() for i in range(0, len(group), 50)]
    result = [None] * len(rows)
    for batch in tqdm(batches, desc=title, leave=False, disable=None):
        seeds = [i + 1 for i in batch]
        columns = list(generate(subject.model, [rows[i] for i in batch], max_tokens, seeds, eot))
        for i, ids in zip(batch, torch.stack(columns, dim=1).tolist()):
            result[i] = [token for token in ids if token != eot]
    return [result[i:i + each] for i in range(0, len(rows), each)]


def pick_stories(tokens, eot, n, min_tokens=75):
    """Up to n stories (lists of ids) of more than `min_tokens` tokens, evenly spread over a file, of which little else
    is read."""
    stories = {}
    for start in np.linspace(0, len(tokens), n, endpoint=False).astype(int).tolist():
        part = np.asarray(tokens[start:start + 20_000])
        ends = np.flatnonzero(part == eot).tolist()
        for a, b in zip(ends, ends[1:]):
            if b - a > min_tokens:
                stories[start + a] = part[a + 1:b].tolist()  # two starts may find the same story
                break
    return list(stories.values())


def grade_completions(subject, completions, max_tokens):
    """What can be counted in continuations [[token ids] of each prompt]: length, repetition and diversity."""
    texts = [[words_of(subject.encoding.decode(ids)) for ids in group] for group in completions]
    n_words = [sum(map(len, group)) for group in texts]
    fourgrams = [[ngrams(text, 4) for text in group] for group in texts]
    figures = {
        "ended by themselves": interval([np.mean([len(ids) < max_tokens for ids in group]) for group in completions]),
        "length in words": interval(n_words, list(map(len, texts))),
        "4-grams that repeat one of the same text": interval(
            [sum(len(text) - len(set(text)) for text in group) for group in fourgrams],
            [sum(map(len, group)) for group in fourgrams])}
    for n in range(1, 5):
        groups = [[gram for text in group for gram in ngrams(text, n)] for group in texts]
        figures[f"distinct {n}-grams among a prompt's"] = interval(
            [len(set(grams)) for grams in groups], list(map(len, groups)))
    nearest = rouge2_with_nearest([text for group in texts for text in group])
    figures["Rouge-2 with the likest other"] = interval(nearest.reshape(len(texts), -1).mean(1))
    return figures


def rouge2_with_nearest(texts):
    """(N,) the highest Rouge-2 (F1 of their sets of bigrams) of each text (a list of words) with any other."""
    bigrams = [set(ngrams(text, 2)) for text in texts]
    column = {bigram: i for i, bigram in enumerate(set().union(*bigrams))}
    matrix = np.zeros((len(texts), len(column)), np.float32)  # which text has which bigram
    for row, text_bigrams in zip(matrix, bigrams):
        row[[column[bigram] for bigram in text_bigrams]] = 1
    sizes = matrix.sum(1)
    f1 = 2 * (matrix @ matrix.T) / np.maximum(1, sizes[:, None] + sizes)
    np.fill_diagonal(f1, 0)
    return f1.max(1)


def grade_instructions(subject, dataset, max_tokens):
    """The share of what was asked for that a story has, for fields that were seen together in train and for those that
    were held out. The controls are another story's words, which occur by chance."""
    hold_out, groups, figures = set(load_meta(dataset)["instruct"]["hold_out"]), {"seen": [], "held-out": []}, {}
    for prompt, fields in read_instructions(dataset):
        group = groups["held-out" if hold_out and hold_out <= set(fields) else "seen"]
        if len(group) < 60 and set(fields) & {"words", "sentence", "summary"}:
            group.append((prompt, fields))
    for name, group in groups.items():
        completions = complete(subject, [prompt for prompt, _ in group], max_tokens, title="following instructions")
        stories = [subject.encoding.decode(ids) for ids, in completions]
        requests = [fields for _, fields in group]
        figures[f"sentences included, {name} combinations"] = interval(
            [fields["sentence"] in story for fields, story in zip(requests, stories) if "sentence" in fields])
        words = [fields.get("words", "").split(", ") if "words" in fields else [] for fields in requests]
        long_words = [sorted(set(re.findall(r"\w{4,}", fields.get("summary", "")))) for fields in requests]
        for what, asked, count in (("words", words, count_inflected), ("summary's words", long_words, count_exact)):
            for title, requested in ((f"{what} used", asked), (f"another's {what}", asked[1:] + asked[:1])):
                used = [count(request, story) for request, story in zip(requested, stories)]
                figures[f"{title}, {name} combinations"] = interval(used, list(map(len, requested)))
    return figures


def count_inflected(words, story):
    return len(words) - len(missing_words(words, story))


def count_exact(words, story):
    return len(set(words) & set(re.findall(r"\w+", story)))


def read_instructions(dataset):
    """Yield (text before the story, {field: value}) of a dataset's validation stories made with --instruct."""
    meta, encoding = load_meta(dataset), load_tokenizer(dataset)
    for ids in split_stories(np.asarray(load_tokens(dataset, "val")), meta["eot"]):
        head, separator, _ = encoding.decode(ids.tolist()).partition(instruction({}))
        lines = dict(line.split(": ", 1) for line in head.splitlines() if ": " in line)
        if separator:
            yield head + separator, {name: lines[title] for name, title in INSTRUCTIONS.items() if title in lines}


def grade(subject, prompts, args):
    """Yield (title, figures) of each section."""
    prompts = [subject.instruction + prompt for prompt in prompts]
    completions = complete(subject, prompts, args.max_tokens, args.each)
    settings = f"--each={args.each} --max_tokens={args.max_tokens}, {len(prompts)} prompts"
    yield "completions", {**grade_completions(subject, completions, args.max_tokens), "measured with": settings}
    for name in subject.datasets:
        if load_meta(name)["instruct"]:
            figures = grade_instructions(subject, name, args.max_tokens)
            yield f"instructions of {name}", {**figures, "measured with": f"--max_tokens={args.max_tokens}"}


def command_line():
    parser = CommandLine(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of runs, such as out/a (default: the newest)")
    parser.option("dataset", "", "whose instructions to follow (default: the run's own)")
    parser.option("prompts", os.path.join(HERE, "data", "prompts.json"), "beginnings of stories")
    parser.option("each", 10, "completions of each of those", low=1)
    parser.option("max_tokens", 200, "length limit of a completion", low=1)
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    return parser


def main(argv=None):
    args = command_line().parse_args(argv)
    prompts = read_list("prompts", args.prompts, lambda prompt: isinstance(prompt, str))
    device, _ = pick_device(args.device)
    for run in args.runs or [newest_run()]:
        subject = load_subject(run, device, args.dataset)
        for title, figures in grade(subject, prompts, args):
            add_section(subject, title, figures)
            print_section(f"{run}: {title}", figures)


if __name__ == "__main__":
    run_main(main)

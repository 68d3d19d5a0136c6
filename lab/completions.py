"""Let a model continue beginnings of stories, and measure its text: length, repetition, diversity, instructions.

    python -m lab.completions out/a

Adds the section "completions" to out/a/eval.json and, where stories come with instructions (prepare.py --instruct),
"instructions of NAME". All that is measured here can be counted; lab.judge asks a large model how good the text is."""
import os
from collections import Counter, defaultdict
from functools import partial
from itertools import islice

import numpy as np
import regex
import torch
from tqdm import tqdm

from common import ROOT, CommandLine, run_main
from common.dataset import INSTRUCTIONS, instruction, load_meta, load_tokens, split_stories
from common.device import pick_device
from common.files import read_list
from common.records import details, file_format, read_records
from common.results import add_section, interval, load_subject, print_section
from common.runs import newest_run
from common.text import SPACELESS
from common.tokenizer import load_tokenizer
from lab.label import FEATURE_RULES, followed, share_followed
from sample import generate


def words_of(text):
    """The words of a text, without numbers and with their capitals. "don't" is one word."""
    return regex.findall(rf"(?V1)[{SPACELESS}]\p{{M}}*|[\w--[\d_{SPACELESS}]]+(?:['’][\w--[\d_{SPACELESS}]]+)*", text)


def ngrams(words, n):
    """All runs of n words, as tuples: the words, the words from the second on, and so on, side by side."""
    return list(zip(*(words[i:] for i in range(n))))


def complete(subject, prompts, max_tokens, each=1, title="completing"):
    """[[token ids]] of `each` continuations of every prompt at temperature 1, without <|endoftext|>.

    A continuation of fewer than max_tokens tokens has ended by itself. The i-th of all draws from its own seed, i + 1:
    so it does not depend on the others in its batch."""
    eot = subject.encoding.eot_token
    rows = [[eot] + subject.encoding.encode_ordinary(prompt) for prompt in prompts for _ in range(each)]
    by_length = defaultdict(list)  # only prompts of one length can share a batch, since nothing is padded
    for i, row in enumerate(rows):
        by_length[len(row)].append(i)
    batches = [group[i:i + 50] for group in by_length.values() for i in range(0, len(group), 50)]
    result = [None] * len(rows)
    for batch in tqdm(batches, desc=title, leave=False, disable=None):
        seeds = [i + 1 for i in batch]
        columns = list(generate(subject.model, [rows[i] for i in batch], max_tokens, seeds, eot))
        for i, ids in zip(batch, torch.stack(columns, dim=1).tolist()):  # (B, T)
            result[i] = [token for token in ids if token != eot]  # rows that end first are filled up with it
    return [result[i:i + each] for i in range(0, len(rows), each)]


def pick_stories(tokens, eot, n, min_tokens=75):
    """Up to n stories (lists of ids) of more than `min_tokens` tokens, evenly spread over the tokens of a file.

    A file may hold a billion tokens, so only the first 20,000 after each of n places are read."""
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
    """{figure: interval} of what can be counted in continuations, [[token ids] of each prompt].

    All figures are sums over a prompt's continuations, since the bootstrap draws prompts: continuations of the same
    prompt are alike."""
    ended, n_words, repeated, n_fourgrams, texts = [], [], [], [], []
    for group in completions:
        words = [words_of(subject.encoding.decode(ids).lower()) for ids in group]
        fourgrams = [ngrams(text, 4) for text in words]
        texts += words
        ended.append(np.mean([len(ids) < max_tokens for ids in group]))
        n_words.append(sum(map(len, words)))
        repeated.append(sum(len(text) - len(set(text)) for text in fourgrams))  # a model in a loop repeats itself
        n_fourgrams.append(sum(map(len, fourgrams)))
    nearest = rouge2_with_nearest(texts).reshape(len(completions), -1)  # (prompts, continuations of each)
    return {"ended by themselves": interval(ended),
            "length in words": interval(n_words, list(map(len, completions))),
            "4-grams that repeat one of the same text": interval(repeated, n_fourgrams),
            "Rouge-2 with the likest other": interval(nearest.mean(1))}  # high if the model writes one story all over


def rouge2_with_nearest(texts):
    """(N,) the highest Rouge-2 of each text (a list of words) with any other of N texts.

    Rouge-2 (Lin 2004) is the F1 of the texts' sets of bigrams: twice the number that both have, over the sum of their
    sizes. A matrix product counts the shared bigrams of all pairs at once."""
    bigrams = [set(ngrams(text, 2)) for text in texts]
    column = {bigram: i for i, bigram in enumerate(set().union(*bigrams))}
    matrix = np.zeros((len(texts), len(column)), np.float32)  # (N, bigrams): which text has which bigram
    for row, text_bigrams in zip(matrix, bigrams):
        row[[column[bigram] for bigram in text_bigrams]] = 1
    sizes = matrix.sum(1)  # (N,)
    f1 = 2 * (matrix @ matrix.T) / np.maximum(1, sizes[:, None] + sizes)  # (N, N)
    np.fill_diagonal(f1, 0)  # not with itself
    return f1.max(1)


def grade_instructions(subject, dataset, max_tokens, best_of=1):
    """{figure: interval}: how much of what instructions ask for is in the stories that the model writes after them. Of
    `best_of` stories for each, the one that sample.py --best_of would show is graded.

    Instructions are those of up to 150 validation stories. With prepare.py --hold_out=words+summary, no train story had
    both words and a summary; instructions with both are graded apart, as held-out combinations."""
    hold_out = set(load_meta(dataset)["instruct"]["hold_out"])
    tests = feature_tests(dataset)
    groups = {"seen": [], "held-out": []}
    for prompt, fields in validation_instructions(dataset):
        is_held_out = bool(hold_out) and hold_out <= set(fields)
        group = groups["held-out" if is_held_out else "seen"]
        if len(group) < 150 and fields:
            group.append((prompt, fields))
    figures = {}
    for name, group in groups.items():
        if not group:
            continue
        prompts, requests = [prompt for prompt, _ in group], [fields for _, fields in group]
        completions = complete(subject, prompts, max_tokens, best_of, title="following instructions")
        stories = [max(map(subject.encoding.decode, candidates), key=partial(share_followed, fields))
                   for fields, candidates in zip(requests, completions)]
        for title, figure in instructions_followed(requests, stories, tests).items():
            figures[f"{title}, {name} combinations"] = figure
    return figures


def feature_tests(dataset, n=8_000):
    """{feature: (text of a story) -> whether it has the feature}, from the first n stories of a dataset.

    Features that lab.label found are found again by its rule. Any other is known by its signs: the 4-grams of words
    that only stories with the feature have. The probability that a 4-gram which has nothing to do with a feature
    becomes its sign is below one in a million; a feature that most stories have, such as the world's dialogue, has no
    signs."""
    meta, stories = load_meta(dataset), []  # stories: (features, text, 4-grams)
    for source in meta["source"]:
        if os.path.isfile(source["file"]) and file_format(os.path.basename(source["file"])) != "text":
            records = read_records(source["file"], meta.get("field", "story"))
            stories += [(details(record)["features"], record["story"], fourgrams_of(record["story"]))
                        for record in islice(records, n - len(stories))]
    everywhere = Counter(fourgram for *_, fourgrams in stories for fourgram in fourgrams)
    tests = {}
    for feature, count in Counter(feature for features, *_ in stories for feature in features).items():
        share, rule = count / len(stories), FEATURE_RULES.get(feature)
        if rule and np.mean([rule(text) == (feature in features) for features, text, _ in stories]) > 0.98:
            tests[feature] = rule
        elif share < 0.5:
            with_it = Counter(g for features, _, fourgrams in stories if feature in features for g in fourgrams)
            signs = {g for g, k in with_it.items() if k == everywhere[g] and share**k < 1e-6}
            tests[feature] = partial(has_sign, signs)
    return tests


def fourgrams_of(story):
    return set(ngrams(words_of(story.lower()), 4))


def has_sign(signs, story):
    return not signs.isdisjoint(fourgrams_of(story))


def instructions_followed(requests, stories, tests):
    """{figure: interval} of requests, {field: text} each, and the stories that were written for them.

    The controls are what the next request asks for: a story has some of it by chance."""
    own = [followed(fields, story, tests) for fields, story in zip(requests, stories)]
    another = [followed(fields, story, tests) for fields, story in zip(requests[1:] + requests[:1], stories)]

    def share(counts, field):
        return interval([count[field][0] for count in counts], [count[field][1] for count in counts])

    return {"sentences included": interval([count["sentence"][0] for count in own if count["sentence"][1]]),
            "words used": share(own, "words"), "another's words": share(another, "words"),
            "features present": share(own, "features"), "another's features": share(another, "features"),
            "summary's words used": share(own, "summary"), "another's summary's words": share(another, "summary")}


def validation_instructions(dataset):
    """Yield (text before the story, {field: value}) of a dataset's validation stories made with --instruct."""
    meta, encoding = load_meta(dataset), load_tokenizer(dataset)
    for ids in split_stories(np.asarray(load_tokens(dataset, "val")), meta["eot"]):
        # lines such as "Words: ball, red, run", then "Story:" and the story
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
            figures = grade_instructions(subject, name, args.max_tokens, args.best_of)
            title = f"instructions of {name}" + (f", best of {args.best_of}" if args.best_of > 1 else "")
            yield title, {**figures, "measured with": f"--max_tokens={args.max_tokens}"}


def main(argv=None):
    parser = CommandLine(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of runs, such as out/a (default: the newest)")
    parser.option("dataset", "", "whose instructions to follow (default: the run's own)")
    parser.option("prompts", os.path.join(ROOT, "data", "prompts.json"), "beginnings of stories")
    parser.option("each", 10, "completions of each of those", low=1)
    parser.option("best_of", 1, "stories for each instruction, of which the one that follows it best is graded", low=1)
    parser.option("max_tokens", 200, "length limit of a completion", low=1)
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    prompts = read_list("prompts", args.prompts, lambda prompt: isinstance(prompt, str))
    device, _ = pick_device(args.device)
    for run in args.runs or [newest_run()]:
        subject = load_subject(run, device, args.dataset)
        for title, figures in grade(subject, prompts, args):
            add_section(subject, title, figures)
            print_section(f"{run}: {title}", figures)


if __name__ == "__main__":
    run_main(main)

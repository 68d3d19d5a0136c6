"""Measure how diverse files of stories are, and how much of its corpus a model has memorized.

    python -m lab.corpus a.jsonl b.txt      files of stories, side by side
    python -m lab.corpus out/a              a run: "memorization of NAME", also added to its eval.json"""
import glob
import os
import re
import sys
import zlib
from collections import Counter

import numpy as np
from tqdm import tqdm

from common import CommandLine, newest_run, pick_device, print_table, run_main
from eval import add_section, interval, load_subject
from generate import missing_words
from lab.compare import figure_rows
from lab.completions import complete, ngrams, pick_stories, words_of
from prepare import fingerprint, load_tokenizer, load_tokens, read_records

NO_TOKEN = 65535  # not the id of any token, since prepare.py allows at most 65,535 of them

# -----------------------------------------------------------------------------------------------------------------
# diversity: each measurement takes all records of a file, as a list in memory, and returns {figure: text}


def letters(text):
    """The words of a text, without numbers and with their capitals."""
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text)


def percent(count, total):
    return f"{100 * count / total:.2f} %"


def size(records):
    words = Counter()
    for record in records:
        words.update(letters(record["story"].lower()))
    return {"stories": f"{len(records):,}", "words a story": f"{words.total() / len(records):.0f}",
            "distinct words": f"{len(words):,}"}


def copies(records):
    """Exact copies of earlier stories in the file, and near-copies: more than half of their 8-grams of words are in one
    earlier story.

    To save memory, near-copies are judged by one 8-gram in sixteen. The choice depends on the hash of the 8-gram alone,
    so that two copies are judged by the same ones."""
    fingerprints = {fingerprint(record["story"]) for record in records}
    near = 0
    first_story = {}  # hash of an 8-gram: number of the first story that has it
    for number, record in enumerate(records):
        hashes = [zlib.crc32(" ".join(gram).encode()) for gram in ngrams(letters(record["story"].lower()), 8)]
        sample = [value for value in hashes if value % 16 == 0]
        shared = Counter(first_story[value] for value in sample if value in first_story)
        if max(shared.values(), default=0) > len(sample) / 2:
            near += 1
        for value in sample:
            first_story.setdefault(value, number)
    return {"exact copies": percent(len(records) - len(fingerprints), len(records)),
            "near-copies": percent(near, len(records))}


def openings(records):
    """The commonest first sentence and first four words."""
    stories = [record["story"] for record in records]
    sentences = Counter(re.split(r"(?<=[.!?])[\"”]?\s", story.strip(), maxsplit=1)[0] for story in stories)
    beginnings = Counter(" ".join(letters(story)[:4]) for story in stories)
    figures = {"most common first sentence": percent(max(sentences.values()), len(stories))}
    for i, (words, count) in enumerate(beginnings.most_common(3), 1):
        figures[f"opening {i}"] = f"{words} {percent(count, len(stories))}"
    once = sum("Once upon a time" in story for story in stories)
    return {**figures, "with Once upon a time": percent(once, len(stories))}


def names(records):
    """The commonest names: words capitalized within a sentence that rarely occur in lower case."""
    stories_with, lower_case = Counter(), Counter()
    for record in records:
        stories_with.update(set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", record["story"])))
        lower_case.update(word for word in letters(record["story"]) if word.islower())
    common = [(name, count) for name, count in stories_with.most_common() if lower_case[name.lower()] < count / 10]
    return {f"name {i}": f"{name} {percent(count, len(records))}" for i, (name, count) in enumerate(common[:3], 1)}


def distinct_ngrams(records):
    """Distinct n-grams of words. Only the first 100,000 words count, so that files of different sizes can be compared.
    """
    n_words, distinct = 0, {n: set() for n in range(1, 5)}
    for record in records:
        if n_words >= 100_000:
            break
        words = letters(record["story"].lower())
        n_words += len(words)
        for n in distinct:
            distinct[n].update(ngrams(words, n))
    return {f"distinct {n}-grams": f"{len(distinct[n]):,} in {n_words:,} words" for n in distinct}


def labels(records):
    """What records hold besides the story: requested words, features, and spans, the words in which a skill is needed.
    """
    requested, missing, n_words, features, skills = 0, 0, 0, Counter(), Counter()
    for record in records:
        requested += len(record.get("words") or [])
        missing += len(missing_words(record.get("words") or [], record["story"]))
        n_words += len(letters(record["story"]))
        features.update(record.get("features") or [])
        skills.update(span["skill"] for span in record.get("spans") or [])
    figures = {}
    if requested:
        figures["requested words used"] = f"{100 - 100 * missing / requested:.1f} %"
    for feature, count in sorted(features.items()):
        figures[f"feature {feature}"] = percent(count, len(records))
    for skill, count in skills.items():
        figures[f"{skill} spans per 100 words"] = f"{100 * count / n_words:.2f}"
    return figures


def describe(path):
    """{figure: text} of a file of stories."""
    if not os.path.isfile(path):
        sys.exit(f"no file {path}: name .jsonl or .txt files of stories")
    records = list(read_records(path))
    if not records:
        sys.exit(f"{path} holds no story: name another file, or write stories with python generate.py")
    figures = {}
    for measure in (size, copies, openings, names, distinct_ngrams, labels):
        figures.update(measure(records))
    return figures


def describe_files(patterns):
    """Print the figures of files, a column for each."""
    paths = []
    for pattern in patterns:
        paths += sorted(glob.glob(pattern)) or [pattern]  # Windows leaves patterns to the program
    columns = [describe(path) for path in paths]
    rows = [["", *paths]]
    for name in dict.fromkeys(name for column in columns for name in column):
        rows.append([name, *(column.get(name, "–") for column in columns)])
    print_table(rows)


# -----------------------------------------------------------------------------------------------------------------
# memorization


def match_lengths(query, corpus, n=5, piece=2**20):
    """(N,) for each position in `query` (N,): the length of the longest n-gram there that occurs anywhere in `corpus`,
    or 0 if it has fewer than n tokens.

    Both hold token ids of 16 bits; the query ends with NO_TOKEN. The corpus is read once, piece by piece. All n-grams
    of one length are compared at a time, as integers that are equal only for equal n-grams. At first, four ids fit into
    64 bits. Then the n-grams that occur on both sides are numbered, and this number and the id of the next token make
    the integer of an n-gram that is one token longer."""
    query, lengths = np.asarray(query, np.int64), np.zeros(len(query), np.int64)
    for start in tqdm(range(0, len(corpus), piece), desc="comparing with train", leave=False, disable=None):
        part = np.asarray(corpus[start:start + piece + len(query)], np.int64)  # n-grams may end after the piece
        query_keys, keys = pack_four(query), pack_four(part)[:piece]
        query_positions, positions = np.arange(len(query_keys)), np.arange(len(keys))
        length = 4
        while len(query_positions) and len(positions):
            # keep the positions whose n-gram occurs on both sides
            known, query_numbers = np.unique(query_keys, return_inverse=True)
            numbers = np.searchsorted(known, keys).clip(max=len(known) - 1)
            shared = known[numbers] == keys
            numbers, positions = numbers[shared], positions[shared]
            shared = np.isin(query_numbers, numbers)
            query_numbers, query_positions = query_numbers[shared], query_positions[shared]
            if length >= n:
                lengths[query_positions] = np.maximum(lengths[query_positions], length)
            # extend the n-grams by their next token
            inside = positions + length < len(part)
            numbers, positions = numbers[inside], positions[inside]
            query_keys = query_numbers << 16 | query[query_positions + length]
            keys = numbers << 16 | part[positions + length]
            length += 1
    return lengths


def pack_four(tokens):
    """(N - 3,) from tokens (N,): each id and the three that follow it as one integer."""
    return tokens[:-3] << 48 | tokens[1:-2] << 32 | tokens[2:-1] << 16 | tokens[3:]


def shared_ngrams(queries, corpus, n=5, piece=2**20):
    """What each of Q queries, which are lists of token ids, shares with the corpus, as two arrays (Q,): the number of
    tokens in its longest part that occurs there (0 if fewer than n), and the share of its n-grams that occur there."""
    query = [token for ids in queries for token in [*ids, NO_TOKEN]]
    ends = np.cumsum([len(ids) + 1 for ids in queries])
    parts = np.split(match_lengths(query, corpus, n, piece), ends)[:-1]
    longest = [part.max() for part in parts]
    shares = [np.count_nonzero(part) / max(1, len(ids) - n + 1) for ids, part in zip(queries, parts)]
    return np.array(longest), np.array(shares)


def complete_stories(subject, dataset, split, max_tokens, n_stories=100):
    """(continuations of the first 50 tokens of stories by the model, true continuations): two lists of texts."""
    encoding = load_tokenizer(dataset)
    stories = pick_stories(load_tokens(dataset, split), encoding.eot_token, n_stories)
    beginnings = [encoding.decode(ids[:50]).rpartition(" ")[0] for ids in stories]
    texts = [encoding.decode(ids[:50 + max_tokens]) for ids in stories]
    endings = [text[len(beginning):] for text, beginning in zip(texts, beginnings)]
    completions = complete(subject, beginnings, max_tokens, title=f"completing {split} stories")
    return [subject.encoding.decode(ids) for ids, in completions], endings


def memorization(subject, dataset, max_tokens):
    """{figure: value} of 100 train stories that the model completes from their first words: how much of the true ending
    comes back, and how much occurs anywhere in train.

    Stories share phrases without being copied. Two controls show how many: completions of validation stories, and the
    true endings of these."""
    figures, texts = {}, {}
    for split in ("train", "val"):
        completions, endings = complete_stories(subject, dataset, split, max_tokens)
        bigrams = [Counter(ngrams(words_of(text), 2)) for text in completions]
        true_bigrams = [Counter(ngrams(words_of(text), 2)) for text in endings]
        shared = [(a & b).total() for a, b in zip(bigrams, true_bigrams)]
        figures[f"Rouge-2 precision against the true ending, {split}"] = interval(
            shared, [counts.total() for counts in bigrams])
        texts[f"{split} completed"] = completions
    texts["true endings of val"] = endings
    encoding = load_tokenizer(dataset)
    queries = [encoding.encode_ordinary(text) for group in texts.values() for text in group]
    longest, shares = shared_ngrams(queries, load_tokens(dataset, "train"))
    groups = np.repeat(list(texts), [len(group) for group in texts.values()])
    for name in texts:  # "run" in the names of figures is a run of tokens
        figures[f"5-grams of tokens that stand in train, {name}"] = interval(shares[groups == name])
        figures[f"longest run that stands in train, {name}"] = interval(longest[groups == name])
        figures[f"… the longest of all, {name}"] = int(longest[groups == name].max(initial=0))
    return {**figures, "measured with": f"--max_tokens={max_tokens}"}


def grade_runs(runs, args):
    """Print the memorization of runs, a column for each, and add it to their eval.json."""
    device, _ = pick_device(args.device, "float32")
    results = {}
    for run in runs:
        subject = load_subject(run, device, args.dataset)
        results[run] = {}
        for dataset in subject.datasets:
            title = f"memorization of {dataset}"
            results[run][title] = memorization(subject, dataset, args.max_tokens)
            add_section(subject, title, results[run][title])
    print_table(figure_rows(results))


def main(argv=None):
    parser = CommandLine(__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="files of stories, or folders of runs (default: the newest run)")
    parser.option("dataset", "", "of a run: measure with the stories of this dataset (default: the run's own)")
    parser.option("max_tokens", 200, "of a run: length limit of a completion", low=1)
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    files = [name for name in args.names if name.endswith((".jsonl", ".txt"))]
    if not files:
        grade_runs(args.names or [newest_run()], args)
    elif files == args.names:
        describe_files(files)
    else:
        sys.exit("name either files of stories or runs: they are measured in different ways")


if __name__ == "__main__":
    run_main(main)

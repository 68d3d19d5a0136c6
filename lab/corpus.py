"""Measure how diverse files of stories are, and how much of its corpus a model has memorized.

    python -m lab.corpus a.jsonl b.txt      files of stories, side by side
    python -m lab.corpus out/a              a run: the section "memorization of NAME" of its eval.json"""
import glob
import os
import re
import sys
import zlib
from collections import Counter

import numpy as np
from tqdm import tqdm

from common import CommandLine, run_main
from common.dataset import load_tokens
from common.device import pick_device
from common.records import details, file_format, read_records
from common.results import add_section, interval, load_subject, print_section
from common.runs import newest_run
from common.text import fingerprint
from common.tokenizer import load_tokenizer
from generate import missing_words
from lab.compare import print_table
from lab.completions import complete, ngrams, pick_stories, words_of

# -----------------------------------------------------------------------------------------------------------------
# diversity: each measurement takes all records of a file, as a list in memory, and returns {figure: text}


def percent(count, total):
    return f"{100 * count / total:.2f} %"


def size(records):
    words = Counter()
    for record in records:
        words.update(words_of(record["story"].lower()))
    return {"stories": f"{len(records):,}", "words a story": f"{words.total() / len(records):.0f}",
            "distinct words": f"{len(words):,}"}


def copies(records):
    """The share of exact copies of earlier stories in the file, and of near-copies: those of which more than half of
    the 8-grams of words are in one earlier story.

    To save memory, near-copies are judged by one 8-gram in sixteen: those with a hash divisible by 16. So two copies
    are judged by the same ones."""
    fingerprints = {fingerprint(record["story"]) for record in records}
    near = 0
    first_story = {}  # {hash of an 8-gram: number of the first story that has it}
    for number, record in enumerate(records):
        hashes = [zlib.crc32(" ".join(gram).encode()) for gram in ngrams(words_of(record["story"].lower()), 8)]
        sample = [value for value in hashes if value % 16 == 0]
        shared = Counter(first_story[value] for value in sample if value in first_story)
        if max(shared.values(), default=0) > len(sample) / 2:
            near += 1
        for value in sample:
            first_story.setdefault(value, number)
    return {"exact copies": percent(len(records) - len(fingerprints), len(records)),
            "near-copies": percent(near, len(records))}


def openings(records):
    """The commonest first sentence and first four words: a model that writes a corpus falls into a few of them."""
    stories = [record["story"] for record in records]
    sentences = Counter(re.split(r"(?<=[.!?])[\"”]?\s", story.strip(), maxsplit=1)[0] for story in stories)
    beginnings = Counter(" ".join(words_of(story)[:4]) for story in stories)
    (words, count), = beginnings.most_common(1)
    return {"most common first sentence": percent(max(sentences.values()), len(stories)),
            "most common opening": f"{words} {percent(count, len(stories))}"}


def names(records):
    """The three commonest names. A name is a word capitalized within a sentence that rarely occurs in lower case."""
    stories_with, lower_case = Counter(), Counter()
    for record in records:
        stories_with.update(set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", record["story"])))
        lower_case.update(word for word in words_of(record["story"]) if word.islower())
    common = [(name, count) for name, count in stories_with.most_common() if lower_case[name.lower()] < count / 10]
    return {f"name {i}": f"{name} {percent(count, len(records))}" for i, (name, count) in enumerate(common[:3], 1)}


def distinct_ngrams(records):
    """Distinct n-grams of words. They grow more slowly than the text, so only the first 100,000 words of a file count:
    then files of different sizes can be compared."""
    n_words, distinct = 0, {n: set() for n in range(1, 5)}
    for record in records:
        if n_words >= 100_000:
            break
        words = words_of(record["story"].lower())
        n_words += len(words)
        for n in distinct:
            distinct[n].update(ngrams(words, n))
    return {f"distinct {n}-grams": f"{len(distinct[n]):,} in {n_words:,} words" for n in distinct}


def requested_words(records):
    """The share of the requested words that the stories have, where records name them."""
    n_words = n_missing = 0
    for record in records:
        words = details(record)["words"]
        n_words += len(words)
        n_missing += len(missing_words(words, record["story"]))
    return {"requested words used": f"{100 - 100 * n_missing / n_words:.1f} %"} if n_words else {}


def describe(path):
    """{figure: text} of a file of stories."""
    if not os.path.isfile(path):
        sys.exit(f"no file {path}: name files of stories, such as .jsonl or .txt")
    records = list(read_records(path))
    if not records:
        sys.exit(f"{path} holds no story: name another file, or write stories with python generate.py")
    figures = {}
    for measure in (size, copies, openings, names, distinct_ngrams, requested_words):
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
# memorization: a model that has memorized its corpus continues a train story as that story goes on, and writes what
# stands somewhere in train. Both are measured after the beginnings of train stories, and of validation stories beside.


def ngram_hashes(tokens, n):
    """(N - n + 1,) from token ids (N,): a number of 64 bits for each n-gram.

    It is the sum of the ids, each times a random number for its place, modulo 2^64. Equal n-grams have equal numbers,
    and different ones practically never."""
    factors = np.random.default_rng(0).integers(1, 2**63, n).astype(np.uint64)
    tokens = np.asarray(tokens, np.uint64)
    hashes = np.zeros(max(0, len(tokens) - n + 1), np.uint64)
    for i, factor in enumerate(factors):
        hashes += factor * tokens[i:i + len(hashes)]
    return hashes


def shared_ngrams(queries, corpus, n=5, piece=2**20):
    """(Q,) the share of the n-grams of each of Q queries, lists of token ids, that occur anywhere in the corpus.

    It is 0 for a query of fewer than n tokens. The corpus may be larger than memory, so it is read piece by piece."""
    hashes = [ngram_hashes(ids, n) for ids in queries]
    wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))
    occurs = np.zeros(len(wanted), bool)
    for start in tqdm(range(0, len(corpus), piece), desc="comparing with train", leave=False, disable=None):
        part = corpus[start:start + piece + n - 1]  # the last n-grams end after the piece
        occurs |= np.isin(wanted, ngram_hashes(part, n))
    shared = [np.isin(row, wanted[occurs]) for row in hashes]
    return np.array([row.sum() / max(1, len(row)) for row in shared])


def complete_stories(subject, dataset, split, max_tokens, n_stories=100):
    """(completions by the model of the first 50 tokens of stories, true endings of these): two lists of texts."""
    encoding = load_tokenizer(dataset)
    stories = pick_stories(load_tokens(dataset, split), encoding.eot_token, n_stories)
    # without the last word, which may be cut in two; a prompt that ends inside a word is hard to continue
    beginnings = [encoding.decode(ids[:50]).rstrip("\ufffd") for ids in stories]
    beginnings = [beginning.rpartition(" ")[0] or beginning for beginning in beginnings]
    texts = [encoding.decode(ids[:50 + max_tokens]) for ids in stories]
    endings = [text[len(beginning):] for text, beginning in zip(texts, beginnings)]
    completions = complete(subject, beginnings, max_tokens, title=f"completing {split} stories")
    return [subject.encoding.decode(ids) for ids, in completions], endings


def rouge2_precision(texts, endings):
    """The share of the bigrams of words of texts that the true endings also have (Rouge-2, Lin 2004)."""
    bigrams = [Counter(ngrams(words_of(text.lower()), 2)) for text in texts]
    true_bigrams = [Counter(ngrams(words_of(text.lower()), 2)) for text in endings]
    shared = [(a & b).total() for a, b in zip(bigrams, true_bigrams)]
    return interval(shared, [counts.total() for counts in bigrams])


def memorization(subject, dataset, max_tokens):
    """{figure: value} of 100 train stories that the model completes from their first words: how much of the true ending
    comes back, and how much occurs anywhere in train.

    Stories share phrases without being copied. Two controls show how many: completions of validation stories, and the
    true endings of these."""
    figures, texts = {}, {}
    for split in ("train", "val"):
        completions, endings = complete_stories(subject, dataset, split, max_tokens)
        figures[f"Rouge-2 precision against the true ending, {split}"] = rouge2_precision(completions, endings)
        texts[f"{split} completed"] = completions
    texts["true endings of val"] = endings
    encoding = load_tokenizer(dataset)  # the subject may have another one
    queries = [encoding.encode_ordinary(text) for group in texts.values() for text in group]
    shares = shared_ngrams(queries, load_tokens(dataset, "train"))
    groups = np.repeat(list(texts), [len(group) for group in texts.values()])
    for name in texts:
        figures[f"5-grams of tokens that stand in train, {name}"] = interval(shares[groups == name])
    return {**figures, "measured with": f"--max_tokens={max_tokens}"}


def grade_runs(runs, args):
    """Print the memorization of runs, and add it to their eval.json."""
    device, _ = pick_device(args.device)
    for run in runs:
        subject = load_subject(run, device, args.dataset)
        for dataset in subject.datasets:
            title, figures = f"memorization of {dataset}", memorization(subject, dataset, args.max_tokens)
            add_section(subject, title, figures)
            print_section(f"{run}: {title}", figures)


def main(argv=None):
    parser = CommandLine(__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="files of stories, or folders of runs (default: the newest run)")
    parser.option("dataset", "", "of a run: measure with the stories of this dataset (default: the run's own)")
    parser.option("max_tokens", 200, "of a run: length limit of a completion", low=1)
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    files = [name for name in args.names if file_format(os.path.basename(name))]
    if not files:
        grade_runs(args.names or [newest_run()], args)
    elif files == args.names:
        describe_files(files)
    else:
        sys.exit("name either files of stories or runs: they are measured in different ways")


if __name__ == "__main__":
    run_main(main)

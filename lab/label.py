"""Label stories with what stands in them, so that a model can learn to follow instructions.

    python -m lab.label --dataset=tinystories --name=labelled      writes data/labelled/stories.jsonl
    python prepare.py --dataset=labelled --instruct --tokenizer=tinystories

A large model that is asked for stories (generate.py) is told which words and features to use, and the published archive
of TinyStories says what its stories were asked for. Other stories come without. Here, rules tell which words and
features they could have been asked for. The rules are rough, and a summary cannot be had by rule."""
import json
import os
import random
import re
import sys
from collections import Counter
from itertools import islice

from common import CommandLine, run_main
from common.dataset import load_meta
from common.files import atomic_write
from common.records import read_records
from common.text import LETTERS, fingerprint
from generate import ENDINGS, WORDS_FILE, inflections, load_words, missing_words

SAD = re.compile(r"\b(sad(?:ly|der)?|cr(?:y|ied|ying)|tears?|alone|never|sorry|lost|gone|regret\w*|wish(?:ed)?|hurt|"
                 r"too late|d(?:ied|ead)|angry|scared)\b", re.I)
GLAD = re.compile(r"\b(happ(?:y|ily|ier)|glad|smil\w+|laugh\w*|hugg?\w*|friends?|fun|proud|lov\w+|safe|thank\w*|better|"
                  r"play\w*|joy\w*)\b", re.I)
LESSON = re.compile(r"\b(moral|lesson|learn(?:ed|t) (?:that|to|not|how|it)|always remember|important to)\b", re.I)


def last_part(story, n_words=40):
    return " ".join(story.split()[-n_words:])


FEATURE_RULES = {  # of generate.FEATURES, those that can be told from the text; each is (text of a story) -> bool
    "dialogue": lambda story: len(re.findall("[\"“”]", story)) >= 4,  # two utterances
    "bad ending": lambda story: bool(SAD.search(last_part(story))) and not GLAD.search(last_part(story)),
    "moral value": lambda story: bool(LESSON.search(last_part(story))),
}


def followed(fields, story, tests=FEATURE_RULES):
    """{"words": (how many a story has, how many were asked for), …} for instructions {field: text}: words in any form,
    features that `tests` can tell, and of a summary the words of four letters or more ("the" is in every story)."""
    words = fields["words"].split(", ") if "words" in fields else []
    features = [name for name in fields.get("features", "").split(", ") if name in tests]
    summary_words = set(re.findall(r"\w{4,}", fields.get("summary", "")))
    sentences = [fields["sentence"]] if "sentence" in fields else []
    return {"words": (len(words) - len(missing_words(words, story)), len(words)),
            "features": (sum(tests[name](story) for name in features), len(features)),
            "summary": (len(summary_words & set(re.findall(r"\w+", story))), len(summary_words)),
            "sentence": (sum(sentence in story for sentence in sentences), len(sentences))}


def share_followed(fields, story):
    """How far a story follows instructions: the sum, over their fields, of the share that stands in it."""
    return sum(count / total for count, total in followed(fields, story).values() if total)


def known_forms(word_lists):
    """[{form: word}] of verbs, nouns and adjectives. A compound such as "ice cream" is left out."""
    return [{form: word for word in reversed(words) if LETTERS.fullmatch(word) for form in inflections(word, endings)}
            for words, endings in zip(word_lists, ENDINGS)]


def words_in(story, forms):
    """The sets of verbs, nouns and adjectives that a story has in any form."""
    story_words = set(LETTERS.findall(story.lower()))
    return [{known[word] for word in story_words & known.keys()} for known in forms]


def label(story, forms, counts):
    """{"words": [verb, noun, adjective], "features": [name]} of a story.

    Of the words that it has, rarer ones are drawn more often: by `counts`, the stories that have each."""
    rng = random.Random(fingerprint(story))
    words = []
    for found, count in zip(words_in(story, forms), counts):
        found = sorted(found.difference(words))
        if found:
            words += rng.choices(found, [1 / count[word] for word in found])
    return {"words": words, "features": [name for name, rule in FEATURE_RULES.items() if rule(story)]}


def main(argv=None):
    parser = CommandLine(__doc__.split("\n")[0])
    parser.option("dataset", "tinystories", "a prepared dataset, whose files of stories are read")
    parser.option("name", "labelled", "folder under data/ to write to")
    parser.option("words", WORDS_FILE, "words to look for")
    parser.option("max_stories", None, "label at most this many stories of each file (default: all)", type=int, low=1)
    args = parser.parse_args(argv)
    meta, forms = load_meta(args.dataset), known_forms(load_words(args.words))
    path = f"data/{args.name}/stories.jsonl"
    if args.name in ("", args.dataset):
        sys.exit("--name must be that of a new folder under data/")
    if os.path.exists(path):
        sys.exit(f"{path} exists: delete it, or choose another --name")
    if meta.get("split", "eot") != "eot":
        sys.exit(f"data/{args.dataset} was prepared with --split={meta['split']}: put <|endoftext|> between its "
                 "stories instead, and prepare them again")
    sources = [(source["file"], source["split"]) for source in meta["source"]]
    for source, split in sources:
        if split == "published":
            sys.exit(f"data/{args.dataset} has words and features of its own: "
                     f"python prepare.py --dataset={args.dataset} --version=all --instruct")
        if not os.path.isfile(source):
            sys.exit(f"{source} is not here: put it there again, or prepare data/{args.dataset} from another file")
    has_val = "val" in [split for _, split in sources]  # else --val_fraction is held out, whatever the files are called
    counts = [Counter() for _ in forms]  # how many stories have each word
    for source, _ in sources:
        for record in islice(read_records(source, meta.get("field", "story")), args.max_stories):
            for count, found in zip(counts, words_in(record["story"], forms)):
                count.update(found)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    written = Counter()
    with atomic_write(path) as file:
        for source, split in sources:
            for record in islice(read_records(source, meta.get("field", "story")), args.max_stories):
                labels = label(record["story"], forms, counts)
                written.update(["stories", *labels["features"]])
                file.write(json.dumps({**({"split": split} if has_val and split else {}), **record, **labels}) + "\n")
    stories = written.pop("stories")
    shares = ", ".join(f"{name} {count / stories:.0%}" for name, count in written.most_common())
    same_share = "" if has_val else f" --val_fraction={meta.get('val_fraction', 0.01)}"  # holds the same stories out
    print(f"{stories:,} stories ({shares}) in {path}: python prepare.py --dataset={args.name} --instruct "
          f"--tokenizer={args.dataset}{same_share}")


if __name__ == "__main__":
    run_main(main)

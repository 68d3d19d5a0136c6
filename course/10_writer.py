"""Lesson 10, part 2: does a corpus become diverse by random words, and is a model that learns from it better?

The writer is a model of your own that follows instructions: it learns on real stories, labelled by rule, for an hour.
It writes 500 stories each way: `own-naive`, all with the same empty instruction, and `own-varied`, with three words for
each, drawn at random, where the best of sixteen counts. Then a small model learns from either corpus, and from as many
real stories, and is graded on real stories.
"""
import json
import os

from lesson import command_line, grade, prepare, run, run_main, train

from tqdm import tqdm

from common.dataset import instruction
from common.files import open_to_append, read_lines
from common.runs import load_run
from generate import WORDS_FILE, load_words, plans
from lab.label import share_followed
from sample import write_stories

N_STORIES, BEST_OF = 500, 16
SAMPLE = 34_698  # real stories that the writer learns from


def write_corpus(name, writer, fields_of_stories, best_of):
    """Write a story for each {"words": text} to data/NAME/stories.jsonl, the best of some, except for those that are
    there already."""
    path = f"data/{name}/stories.jsonl"
    os.makedirs(f"data/{name}", exist_ok=True)
    done = len(list(read_lines(path)))
    model, _, encoding = load_run(writer)
    with open_to_append(path) as file:
        for i in tqdm(range(done, len(fields_of_stories)), name, disable=None):
            fields = fields_of_stories[i]
            prompt = instruction(fields)
            batch = write_stories(model, encoding, prompt, 300, range(i * best_of, (i + 1) * best_of), temperature=0.8)
            stories = [encoding.decode(ids).removeprefix(prompt) for ids in batch]
            best = max(stories, key=lambda story: share_followed(fields, story))
            print(json.dumps({"story": best, **fields}), file=file, flush=True)
    return path


def main(argv=None):
    args = command_line(__doc__).parse_args(argv)
    if not os.path.exists("data/real-labelled/stories.jsonl"):
        run("lab.label", dataset="tinystories", name="real-labelled", max_stories=SAMPLE)
    prepare("real-labelled", instruct=True, tokenizer="tinystories")
    writer = train("out/writer", dataset="real-labelled", size="3M", block_size=512, lr=0.02, max_tokens=48_000_000,
                   max_steps=args.max_steps, evals=10)  # each saves it: it takes an hour
    # a quick look has corpora of its own, of an untrained writer, who ends no story
    own, n_stories = ("quick", 40) if args.max_steps else ("own", N_STORIES)

    words = [{"words": ", ".join(triple)} for triple, _ in plans(n_stories, 1, load_words(WORDS_FILE))]
    files = [write_corpus(f"{own}-varied", writer, words, BEST_OF),
             write_corpus(f"{own}-naive", writer, [{}] * n_stories, 1)]
    run("lab.corpus", *files)

    prepare(f"{own}-real", input="data/tinystories", tokenizer="tinystories", max_stories=n_stories * 9 // 10)
    runs = []
    for seed in args.seeds:
        for name in ("naive", "varied", "real"):
            prepare(f"{own}-{name}", tokenizer="tinystories", val_fraction=0.1, clean=not args.max_steps)
            runs.append(train(f"out/from-{name}-{seed}", dataset=f"{own}-{name}", n_embd=64, max_tokens=1_000_000,
                              seed=seed, max_steps=args.max_steps))
    grade(runs, dataset="tinystories", only="loss")


if __name__ == "__main__":
    run_main(main)

"""Have a large model mark how runs continue beginnings of stories.

    python -m lab.judge out/a out/b --model=gpt-4o-mini --price_in=0.15 --price_out=0.60 --max_cost=1

The procedure is that of the TinyStories paper (Eldan & Li 2023, arXiv 2305.07759, section 3). The question is our own:
it asks for an assessment first, then for marks. Adds the section "judge" to a run's eval.json, and keeps the replies in
its judge.jsonl, so that none is paid for twice."""
import glob
import hashlib
import json
import os
import random
import re
from collections import Counter
from itertools import chain

from tqdm import tqdm

from common import ROOT, CommandLine, run_main
from common.ask import ask_all, connect, dollars, parse_server_args, without_thoughts
from common.dataset import instruction, load_tokens
from common.device import pick_device
from common.files import open_to_append, read_lines, read_list
from common.results import add_section, interval, load_subject, print_section
from common.runs import newest_run
from common.text import split_words, word_end
from common.tokenizer import load_tokenizer
from generate import MAX_REQUESTS
from lab.completions import complete, pick_stories

MARKS = ("grammar", "creativity", "consistency", "plot")
AGES = {"A": 3, "B": 4.5, "C": 6.5, "D": 8.5, "E": 11, "F": 14.5}  # years
QUESTION = """Below is the beginning of a story. It breaks off in the middle of a sentence, at the sign ***. A student
was asked to go on from there, and what follows the sign is the student's work.

{} *** {}

First write a short assessment of the student's part alone: is its grammar right, does it fit the beginning (does it
also finish the broken sentence well), does what happens make a story, are there ideas of its own in it? After that
give marks from 1 (worst) to 10 (best), and guess how old the student is: A: 3 or younger, B: 4 or 5, C: 6 or 7,
D: 8 or 9, E: 10 to 12, F: 13 to 16. End with exactly these five lines, each with your mark or letter:
Grammar:
Creativity:
Consistency with the beginning:
Plot:
Age group:"""


def parse_marks(reply):
    """{mark: 1 to 10, "age": years} of a judge's reply, or None if it does not give all of them."""
    marks = {}
    for name in (*MARKS, "age"):
        # 1 to 10, but not the beginning of another number such as 100; the last line counts, if there are several
        value = r"([A-F])\b" if name == "age" else r"(10|[1-9](?:\.\d)?)(?![\d.]*\d)"
        values = re.findall(rf"^\W*{name}\b[^:\n]*:\W*{value}", reply, re.MULTILINE | re.IGNORECASE)
        if not values:
            return None
        marks[name] = AGES[values[-1].upper()] if name == "age" else float(values[-1])
    return marks


def controls(dataset, n=30):
    """{name: [(beginning, ending)]} of n validation stories, with endings that are certainly good or bad."""
    encoding = load_tokenizer(dataset)
    beginnings, endings, shuffled = [], [], []
    for ids in pick_stories(load_tokens(dataset, "val"), encoding.eot_token, n):
        story = encoding.decode(ids).split(instruction({}))[-1]
        cut = word_end(story, len(story) // 3)
        words = split_words(story[cut:])
        beginnings.append(story[:cut])
        endings.append(story[cut:].strip())
        separator = " " if " " in endings[-1] else ""  # some scripts put no spaces between words
        shuffled.append(separator.join(random.Random(1).sample(words, len(words))))
    return {"true endings": zip(beginnings, endings), "endings of others": zip(beginnings, endings[1:] + endings[:1]),
            "shuffled endings": zip(beginnings, shuffled)}


def make_questions(subject, prompts, args):
    """{name: [[question] of each prompt]}. The name is "" for the run's own endings, else that of a control."""
    completions = complete(subject, [subject.instruction + prompt for prompt in prompts], args.max_tokens, args.each)
    questions = {"": []}
    for prompt, group in zip(prompts, completions):
        endings = [subject.encoding.decode(ids).strip() for ids in group]
        questions[""].append([QUESTION.format(prompt, ending) for ending in endings])
    for name, pairs in controls(subject.datasets[0]).items():
        questions[name] = [[QUESTION.format(*pair)] for pair in pairs]
    return questions


def read_replies(path):
    """{key of a question: marks} of the replies that are on disk: in the file `path`, and in those of other runs, since
    all runs on a dataset have the same controls. A question whose replies have no marks is asked again."""
    replies = {}
    for file in sorted({path, *glob.glob(os.path.join("out", "*", "judge.jsonl"))}):
        for record in read_lines(file):
            if record["marks"]:
                replies[record["key"]] = record["marks"]
    return replies


def get_marks(questions, path, tokens, args):
    """{question: marks, or None if its reply has none}. Asks the questions that have no reply on disk yet, and appends
    their replies to the file `path`. `tokens` counts what this command has paid for."""
    # the judge's name is part of the key, so that each judge has its own replies
    by_key = {hashlib.sha256(f"{args.model}\n{question}".encode()).hexdigest()[:32]: question
              for groups in questions.values() for question in chain(*groups)}
    replies = read_replies(path)
    # sorted by a hash, so in random order: poor endings that get no marks do not come in a row, which would end the run
    tasks = [(key, by_key[key], MAX_REQUESTS) for key in sorted(by_key) if key not in replies]

    def store(key, answer):
        marks = parse_marks(without_thoughts(answer.text))
        if marks:
            replies[key] = marks
        record = {"key": key, "judge": args.model, "reply": answer.text, "marks": marks,
                  "finish": answer.finish, "model": answer.model, **answer.tokens}
        print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
        return "" if marks else "no marks"

    if tasks:
        tokens_in, tokens_out = sum(len(question) for _, question, _ in tasks) // 4, 300 * len(tasks)
        print(f"{len(tasks):,} questions to {args.model}, and {len(by_key) - len(tasks):,} replies on disk: about "
              f"{tokens_in:,} tokens in, {tokens_out:,} out, ${dollars(args, tokens_in, tokens_out):.2f}")
        bar = tqdm(total=len(tasks), desc=args.model, disable=None)
        try:
            with open_to_append(path) as file:
                ask_all(connect(args), args.request, tasks, store, bar, args, tokens)
        except (SystemExit, KeyboardInterrupt) as end:
            raise type(end)(f"{end}\nthe replies so far are in {path}: run the same command again to continue")
    return {question: replies.get(key) for key, question in by_key.items()}


def grade(questions, marks, model):
    """The figures of the section "judge": each mark as [mean, low, high] for the run's own endings and each control.

    See make_questions and get_marks for the arguments."""
    figures = {"judge": model}
    for name, groups in questions.items():
        marked = [[marks[question] for question in group if marks[question]] for group in groups]
        for mark in (*MARKS, "age"):
            title = f"{mark}, {name}" if name else mark
            figures[title] = interval([sum(m[mark] for m in group) for group in marked], list(map(len, marked)))
    # A fit judge gives endings of other stories less for consistency, and shuffled words less for grammar. It is unfit
    # if the 95 % interval of the mean difference, [mean, low, high], reaches down to 0.
    for mark, control in (("consistency", "endings of others"), ("grammar", "shuffled endings")):
        pairs = [(marks[a], marks[b]) for [a], [b] in zip(questions["true endings"], questions[control])]
        margin = interval([true[mark] - other[mark] for true, other in pairs if true and other])
        figures[f"{mark}, true endings over {control}"] = margin
        if not margin or margin[1] <= 0:
            figures["judge"] = f"{model} (unfit)"
            print(f"{model} is unfit to judge: its {mark} does not put true endings over {control}")
    figures["replies without marks"] = list(marks.values()).count(None)
    return figures


def main(argv=None):
    parser = CommandLine(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", help="folders of runs, such as out/a (default: the newest)")
    parser.option("dataset", "", "take the controls from this dataset (default: the run's own)")
    parser.option("prompts", os.path.join(ROOT, "data", "prompts.json"), "beginnings of stories")
    parser.option("each", 10, "completions of each of those", low=1)
    parser.option("max_tokens", 200, "length limit of a completion", low=1)
    parser.option("tokenizer", "", "for an hf: model without a tokenizer: the name of another one that has it")
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    args = parse_server_args(parser, argv, "reply_tokens")
    prompts = read_list("prompts", args.prompts, lambda prompt: isinstance(prompt, str))
    device, _ = pick_device(args.device)
    tokens = Counter(tokens_in=0, tokens_out=0)  # for all runs together, because --max_cost is for all of them
    for run in args.runs or [newest_run()]:
        subject = load_subject(run, device, args.dataset, tokenizer=args.tokenizer)
        path = subject.path("judge.jsonl")
        if not os.path.exists(path):
            connect(args)  # ends the program if there is no key, before the completions, which take a while
        questions = make_questions(subject, prompts, args)
        marks = get_marks(questions, path, tokens, args)
        figures = grade(questions, marks, args.model)
        figures["measured with"] = f"--each={args.each} --max_tokens={args.max_tokens}, {len(prompts)} prompts"
        add_section(subject, "judge", figures)
        print_section(f"{run}: judge", figures)


if __name__ == "__main__":
    run_main(main)

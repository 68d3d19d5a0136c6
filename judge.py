"""Marks by a large model for how stories were continued: the paper's procedure in words of our own, and in one
question: an assessment first, then marks (Eldan & Li 2023, arXiv 2305.07759, section 3). `eval.py --judge` calls it."""
import asyncio
import glob
import hashlib
import json
import os
import re
import sys

from openai import APIError
from tqdm import tqdm

from generate import ask, connect, records
from report import interval

MARKS, AGES = ("grammar", "creativity", "consistency", "plot"), dict(zip("ABCDEF", (3, 4.5, 6.5, 8.5, 11, 14.5)))
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


def read_marks(reply):
    """{mark: 1 to 10, "age": years} of a judge's reply; None where one is missing, or is none."""
    found = {}
    for name in (*MARKS, "age"):
        what = r"([A-F])\b" if name == "age" else r"(10|[1-9](?:\.\d)?)(?![\d.]*\d)"
        lines = re.findall(rf"^\W*{name}\b[^:\n]*:\W*{what}", reply, re.MULTILINE | re.IGNORECASE)
        if not lines:
            return None
        found[name] = AGES[lines[-1].upper()] if name == "age" else float(lines[-1])
    return found


def cost(args, tokens_in, tokens_out):
    """In dollars."""
    return (tokens_in * args.price_in + tokens_out * args.price_out) / 1e6


async def ask_judge(client, limit, questions, args, file):
    """Append the reply to each question {key: text} to the file as it comes; returns why some are missing, or "".

    args.spent are the dollars that the command has spent, on other runs too; what is under way counts at its most."""
    waiting, why = [(key, text, 2) for key, text in questions.items()], ""
    bar = tqdm(total=len(waiting), desc=args.judge, disable=None)

    async def work():
        nonlocal why
        while waiting and not why:
            key, text, tries = waiting.pop()
            most = cost(args, len(text.encode()) + 50, 1000)  # a token is at least one byte
            if args.spent + most > args.max_cost:
                why = f"the next reply might pass --max_cost={args.max_cost:g}"
                return
            args.spent += most
            try:
                reply, finish, _, used = await ask(client, {"model": args.judge, limit: 1000}, text)
            except APIError as e:  # the client has tried again, in vain
                why = f"{client.base_url.host}: {e}".replace(client.api_key, "(key)")[:300]
                return
            args.spent += cost(args, used["tokens_in"], used["tokens_out"]) - most
            marks = read_marks(reply)
            file.write(json.dumps({"key": key, "judge": args.judge, "reply": reply, "marks": marks, "finish": finish,
                                   **used}, ensure_ascii=False) + "\n")
            file.flush()
            if marks or tries == 1:
                bar.update()
            else:
                waiting.append((key, text, 1))  # a reply without marks is asked for once more

    await asyncio.gather(*(work() for _ in range(args.concurrency)))
    bar.close()
    await client.close()
    return why


def judge(told, controls, path, args):
    """Figures of the marks that --judge=MODEL gives `told`, [[(beginning, ending), …] of each prompt], and the controls
    {name: [(beginning, ending), …]} that it is shown among them. Replies are kept in the file `path`, and reused."""
    groups = {"": told, **{name: [[pair] for pair in pairs] for name, pairs in controls.items()}}

    def key_of(pair):
        return hashlib.sha256(f"{args.judge}\n{QUESTION.format(*pair)}".encode()).hexdigest()[:32]

    def read(paths):
        lines = [record for path in paths if os.path.exists(path) for record in records(path)]
        return {r["key"]: r["marks"] for r in sorted(lines, key=lambda r: bool(r["marks"]))}

    pairs = {key_of(pair): pair for group in groups.values() for some in group for pair in some}
    files = {path, *glob.glob(os.path.join("out", "*", "judge.jsonl"))}  # other runs were given the same controls
    replies = read(files)
    questions = {key: QUESTION.format(*pairs[key]) for key in sorted(pairs) if key not in replies}  # a random order
    if questions:
        tokens = sum(map(len, questions.values())) // 4, 300 * len(questions)
        print(f"{len(questions):,} questions to {args.judge}, {len(pairs) - len(questions):,} replies known: about "
              "{:,} tokens in, {:,} out".format(*tokens) + f", ${cost(args, *tokens):.2f}" * (args.price_out > 0))
        client, limit = connect(args.base_url)
        kept = f"\nthe replies so far are in {path}: the same command goes on"
        try:
            with open(path, "a", encoding="utf-8") as file:
                why = asyncio.run(ask_judge(client, limit, questions, args, file))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped by Ctrl-C, without the replies under way" + kept) from None
        if why:
            sys.exit(why + kept)
        replies = read(files)
    figures, unfit = {"judge": args.judge}, []
    marks = {name: [[m for pair in some if (m := replies[key_of(pair)])] for some in group]
             for name, group in groups.items()}
    for name, group in marks.items():
        for mark in (*MARKS, "age"):
            figures[mark + (name and ", " + name)] = interval([sum(m[mark] for m in some) for some in group],
                                                              list(map(len, group)))
    # who can judge marks the endings of other stories down for consistency, and words in disorder for grammar
    for mark, other in (("consistency", "endings of others"), ("grammar", "shuffled endings")):
        more = interval([a[0][mark] - b[0][mark] for a, b in zip(marks["true endings"], marks[other]) if a and b])
        figures[f"{mark}, true endings over {other}"] = more
        if not more or more[1] <= 0:
            unfit.append(f"{mark} does not put true endings over {other}")
    if unfit:
        figures["judge"] += " (unfit)"
        print(f"{args.judge} is unfit to judge: its {' and its '.join(unfit)}")
    figures["replies without marks"] = sum(not replies[key] for key in pairs)
    return figures

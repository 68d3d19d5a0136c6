"""lab/judge.py, with a judge on a server on loopback: controls are told apart, and no reply is paid for twice."""
import glob
import json
import os
import pathlib
import re
import shutil
import signal
import threading
from collections import Counter

import pytest
import torch

from common import CommandLine
from common.ask import parse_server_args
from common.dataset import load_meta, load_tokens, split_stories
from common.runs import load_checkpoint
from common.tokenizer import load_tokenizer
from conftest import error_of
from lab import judge
from test_generate import Server, answer

PROMPTS = ["Once upon a time Tim went to the", "One day Lily saw a red ball and"]
MARKS = """It is fine.

**Grammar**: {}/10
Creativity: 5
Consistency with the beginning: {}
Plot: 4.5
Age group: B"""


@pytest.fixture
def judged(run, in_prepared, fine, monkeypatch):
    """Has a judge, given as a function of prompts, mark two completions of each of two prompts."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    (in_prepared / "prompts.json").write_text(json.dumps(PROMPTS))
    for path in glob.glob("out/*/judge.jsonl"):
        os.remove(path)
    encoding = load_tokenizer("fine")
    stories = "\n\n".join(encoding.decode(ids.tolist())
                         for ids in split_stories(load_tokens("fine", "val"), encoding.eot_token))

    def mark(behave, *options, runs=(run,)):
        with Server(behave) as server:
            try:
                judge.main([*runs, "--dataset=fine", "--model=critic", f"--base_url={server.url}", "--device=cpu",
                            "--each=2", "--max_tokens=20", "--prompts=prompts.json", *options])
            finally:
                mark.asked = [request["messages"][0]["content"] for request in server.requests]
                mark.requests = server.requests
        return json.loads(pathlib.Path(run, "eval.json").read_text())["judge"]

    def fair(prompt, times):
        beginning, ending = re.search(r"work\.\n\n(.*) \*\*\* (.*)\n\nFirst write", prompt, re.DOTALL).groups()
        true = f"{beginning} {ending}" in stories
        return answer(MARKS.format(9 if true or ending[:40] in stories else 2, 9 if true else 3))
    mark.fair = fair
    return mark


def test_a_fair_judge_tells_the_controls_apart(judged, capsys):
    figures = judged(judged.fair)
    n_controls = load_meta("fine")["val"]["stories"]
    assert len(judged.asked) <= 4 + 3 * min(30, n_controls) and len(set(judged.asked)) == len(judged.asked)
    assert figures["judge"] == "critic" and figures["replies without marks"] == 0
    assert figures["grammar, true endings"] == [9, 9, 9] and figures["grammar, shuffled endings"] == [2, 2, 2]
    assert figures["consistency, endings of others"] == [3, 3, 3] and figures["age"] == [4.5, 4.5, 4.5]
    assert figures["plot"] == [4.5, 4.5, 4.5] and "--each=2" in figures["measured with"]
    assert not any(name in question for question in judged.asked for name in ("true ending", "shuffled", "control"))
    out = capsys.readouterr().out
    assert "tokens in" in out and "grammar, true endings" in out
    assert all(request["max_tokens"] == 1000 for request in judged.requests)  # --max_cost counts on it


def test_a_second_run_pays_nothing_and_needs_no_key(judged, monkeypatch):
    figures = judged(judged.fair)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert judged(judged.fair) == figures and judged.asked == []


def test_a_missing_key_is_told_before_stories_are_completed(judged, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setattr(judge, "complete", lambda *args: pytest.fail("completed stories first"))
    with pytest.raises(SystemExit, match="OPENAI_API_KEY is not set"):
        judged(judged.fair)


def test_a_judge_that_cannot_tell_is_unfit(judged, capsys):
    figures = judged(lambda prompt, times: answer(MARKS.format(7, 7)))
    assert figures["judge"] == "critic (unfit)"
    out = capsys.readouterr().out
    assert "consistency does not put true endings over endings of others" in out
    assert "grammar does not put true endings over shuffled endings" in out


def test_replies_without_marks_are_asked_for_once_more(judged):
    figures = judged(lambda prompt, times: answer("Nice." if times == 1 or "park" in prompt else MARKS.format(7, 7)))
    hopeless = {question for question in judged.asked if "park" in question}
    assert len(judged.asked) == 2 * len(set(judged.asked)) and figures["replies without marks"] == len(hopeless) > 0


@pytest.fixture
def ask_judge(tmp_path, monkeypatch):
    """Has a judge, given as a function of prompts, mark 30 endings, without a model that wrote them."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.chdir(tmp_path)

    def ask(behave, *options):
        with Server(behave) as server:
            args = parse_server_args(CommandLine(""), [f"--base_url={server.url}", "--model=critic", *options],
                                     "reply_tokens")
            ask.requests = server.requests
            return judge.get_marks({"": [[f"question {i}"] for i in range(30)]}, "judge.jsonl", Counter(), args)
    return ask


def test_replies_that_were_no_marks_are_asked_for_again_in_the_next_run(ask_judge):
    marks = ask_judge(lambda prompt, times: answer("Nice." if prompt.endswith("7") else MARKS.format(7, 7)))
    assert [question for question in marks if not marks[question]] == ["question 7", "question 17", "question 27"]
    marks = ask_judge(lambda prompt, times: answer(MARKS.format(7, 7)))
    assert len(ask_judge.requests) == 3 and all(marks.values())


def test_a_judge_that_thinks_too_long_stops_early_and_goes_on_with_a_higher_limit(ask_judge):
    with pytest.raises(SystemExit, match="raise --reply_tokens"):
        ask_judge(lambda prompt, times: answer("<think>" + MARKS.format(1, 1), finish="length"), "--concurrency=2")
    assert len(ask_judge.requests) <= 6
    marks = ask_judge(lambda prompt, times: answer(f"{MARKS.format(1, 1)}</think>{MARKS.format(7, 7)}"),
                      "--reply_tokens=3000", '--extra={"reasoning_effort": "low"}')
    assert {mark["grammar"] for mark in marks.values()} == {7}  # not those of the thoughts
    assert all(request["max_tokens"] == 3000 and request["reasoning_effort"] == "low" for request in ask_judge.requests)


def test_what_was_paid_is_kept_when_a_limit_is_reached(judged, run):
    with pytest.raises(SystemExit, match="(?s)might pass --max_cost=0.02.*run the same command again"):
        judged(judged.fair, "--max_cost=0.02", "--price_in=1", "--price_out=2", "--concurrency=2")
    first = judged.asked
    assert 0 < len(first) < 50
    judged(judged.fair)
    assert not set(judged.asked) & set(first)
    assert "sk-secret" not in pathlib.Path(run, "judge.jsonl").read_text()


@pytest.fixture
def other_run(run, in_prepared):
    """The folder of a run that writes other stories."""
    checkpoint = load_checkpoint(run)
    checkpoint["model"]["head.weight"] /= 10
    shutil.copytree(run, "out/flat", dirs_exist_ok=True)
    torch.save(checkpoint, "out/flat/ckpt.pt")
    return "out/flat"


def test_a_limit_of_cost_is_one_for_all_runs_of_a_command(judged, run, other_run):
    prices = ["--price_in=1", "--price_out=2", "--concurrency=1"]
    judged(judged.fair, *prices)
    cost = len(judged.asked) * (100 + 2 * 200) / 1e6
    os.remove(f"{run}/judge.jsonl")
    with pytest.raises(SystemExit, match="might pass --max_cost"):
        judged(judged.fair, *prices, f"--max_cost={cost + 0.0035}", runs=[run, other_run])
    assert os.path.exists(f"{other_run}/judge.jsonl")  # the first run could be paid


def test_replies_to_another_run_are_read_and_its_file_is_left_as_it_is(judged, run, other_run):
    judged(judged.fair)
    path = pathlib.Path(run, "judge.jsonl")
    path.write_bytes(path.read_bytes()[:-40])  # its last line is half written
    before = path.read_bytes()
    judged(judged.fair, runs=[other_run])
    assert 0 < len(judged.asked) <= 5  # two completions of two prompts, and the reply that was lost
    assert path.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_ctrl_c_keeps_the_replies(judged, run):
    def behave(prompt, times):
        if os.path.getsize(f"{run}/judge.jsonl"):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return judged.fair(prompt, times)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a run in the background does not have
    try:
        with pytest.raises(KeyboardInterrupt, match="(?s)stopped.*run the same command again"):
            judged(behave, "--concurrency=1")
    finally:
        signal.signal(signal.SIGINT, before)
    first = set(judged.asked)
    judged(judged.fair)
    assert len(first) == 2 and not first & set(judged.asked)  # not even the one that was under way is lost


def test_marks_are_read_or_refused():
    good = MARKS.format(10, 3)
    assert judge.parse_marks(good) == {"grammar": 10, "creativity": 5, "consistency": 3, "plot": 4.5, "age": 4.5}
    assert judge.parse_marks("Grammar: 1\nas an example\n" + good)["grammar"] == 10  # the last one counts
    for bad in (good.replace("10/10", "11"), good.replace("10/10", "0"), good.replace("Plot: 4.5", ""),
                good.replace("group: B", "group: G"), "", good.replace("10/10", "100")):
        assert judge.parse_marks(bad) is None


@pytest.mark.parametrize("options, error", [
    ([], "which model"), (["--model=x", "--max_cost=1"], "--max_cost needs the prices"),
    (["--model=x", "--each=0"], "at least 1"), (["--model=x", "--prompts=none.json"], "cannot read --prompts"),
    (["--model=x", "out/none"], "no checkpoint")])
def test_a_wrong_command_line_is_one_line(workplace, options, error, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert error in error_of(judge.main, options, capsys)

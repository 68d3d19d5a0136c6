"""generate.py against a real HTTP server on loopback, which speaks Chat Completions and misbehaves on demand."""
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

import generate
from common import ask, files

SCRIPT = pathlib.Path(generate.__file__)
KEY = "sk-a-key-that-must-not-be-seen"
WORDS = {"verbs": {"nothing": ["jump", "sleep", "go"], "things": ["eat", "carry", "bake", "find"]},
         "nouns": {"animals": ["dog", "mouse", "bear"], "places": ["park", "hill", "dog"]},
         "adjectives": {"all": ["red", "big", "happy", "wet"]}, "facts": {"dog": "barks"}}
TRIPLES = 7 * 5 * 4

# ---------------------------------------------------------------------------------------------------------------
# the server

def answer(text, finish="stop", **message):
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "writer-2024", "choices": [
                {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 200, "total_tokens": 300}}


def good(prompt):
    """A story that uses the words the prompt asks for, unlike that of any other prompt."""
    words = " and ".join(re.findall(r'"(\w+)"', prompt))
    return answer(f"A story had {words} in it.\n\n" + f"They said {words} again. " * 15 + "\n\nSummary: It ended.")


def fault(status, message="try later", **headers):
    """An answer that the client should retry (at once, unless told otherwise) or give up on."""
    headers = {"retry-after": "0.001", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return status, headers, json.dumps({"error": {"message": message, "code": message}})


class Server(ThreadingHTTPServer):
    """`behave(prompt, times)` says how to answer a prompt that comes for the n-th time; None is a good answer.

    It returns an answer's JSON, or (status, headers, body) where body may be None: half an answer, then silence.
    """
    daemon_threads, request_queue_size = True, 256

    def __init__(self, behave=lambda prompt, times: None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.requests, self.times, self.keys = behave, [], Counter(), set()
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, address):
        pass                            # a client that was killed


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = request["messages"][0]["content"]
        with server.lock:
            server.requests.append(request)
            server.times[prompt] += 1
            times = server.times[prompt]
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        server.keys.add(self.headers["authorization"])
        reply = server.behave(prompt, times) or good(prompt)
        status, headers, body = (200, {}, json.dumps(reply)) if isinstance(reply, dict) else reply
        with server.lock:
            server.under_way -= 1
        whole = (body if body is not None else json.dumps(good(prompt))).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(whole)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(whole if body is not None else whole[:len(whole) // 2])
        self.close_connection = body is None

# ---------------------------------------------------------------------------------------------------------------
# help

@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty folder with a small vocabulary, and a key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    pathlib.Path("words.json").write_text(json.dumps(WORDS))
    yield
    for path in pathlib.Path(".").rglob("*"):
        assert path.is_dir() or KEY not in path.read_text(), f"the key is in {path}"


def command(server, *options):
    return [f"--base_url={server.url}", "--model=writer", "--words=words.json", "--name=tales", "--n=5", *options]


def run(server, *options):
    generate.main(command(server, *options))


def refused(server, *options):
    """The line with which a run ends that cannot go on."""
    with pytest.raises(SystemExit) as end:
        run(server, *options)
    assert KEY not in str(end.value.code)
    return str(end.value.code)


def lines(name="stories"):
    path = pathlib.Path("data/tales") / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def indices(name="stories"):
    return sorted(record["index"] for record in lines(name))

# ---------------------------------------------------------------------------------------------------------------
# what is asked for

def test_every_triple_of_words_comes_once():
    lists = generate.load_words("words.json")
    assert lists[1] == ["bear", "dog", "hill", "mouse", "park"]         # distinct and sorted, in whatever groups
    for seed in 1, 2:
        plans = list(generate.plans(TRIPLES, seed, lists))
        assert {tuple(words) for words, _ in plans} == set(itertools.product(*lists))
        assert list(generate.plans(7, seed, lists)) == plans[:7]        # a corpus can be extended
    assert plans != list(generate.plans(TRIPLES, 1, lists))


def test_features_are_a_random_subset_of_up_to_three():
    subsets = [features for _, features in generate.plans(TRIPLES, 1, generate.load_words("words.json"))]
    assert {len(subset) for subset in subsets} == {0, 1, 2, 3}
    assert {feature for subset in subsets for feature in subset} == set(generate.FEATURES)
    assert all(len(set(subset)) == len(subset) for subset in subsets)


def test_the_prompt_asks_for_words_features_level_and_summary():
    prompt = generate.prompt_for("7-year-old", ["jump", "dog", "red"], ["bad ending"])
    for part in '"jump"', '"dog"', '"red"', generate.FEATURES["bad ending"], "7-year-old", "Summary:":
        assert part in prompt
    naive = generate.prompt_for("3-year-old", [], [])
    assert "verb" not in naive and not any(wish in naive for wish in generate.FEATURES.values())


def test_words_are_inflected_where_openai_is_not_installed():
    code = "import sys; sys.modules['openai'] = None; import generate; print(generate.add_ending('stop', 'ed'))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=SCRIPT.parent, text=True) == "stopped\n"


def test_a_dry_run_needs_no_key_asks_nothing_and_writes_nothing(monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY")
    with Server() as server:
        run(server, "--dry_run", "--n=20", "--price_in=1", "--price_out=1000")
    out = capsys.readouterr().out
    assert out.count("Write a short story") == 3
    assert "20 of 140 triples of words" in out
    assert "7,000 out: $7.00" in out                                    # the prompts cost a fifth of a cent
    assert not server.requests and not os.path.exists("data")

# ---------------------------------------------------------------------------------------------------------------
# what comes back

@pytest.mark.parametrize("words, story, absent", [
    (["jump", "dog", "red"], "The dogs jumped on a red ball.", []),
    (["stop", "baby", "big"], "She was stopping. Two babies, the biggest.", []),
    (["bake", "leaf", "gentle"], "He bakes with leaves, gently.", []),
    (["cry", "mouse", "happy"], "The mice cried happily.", []),
    (["go", "fisherman", "good"], "The fishermen went to a better place.", []),
    (["give up", "ice cream", "wet"], "Tom gave it up. The ICE-CREAM was wet!", []),
    (["eat", "dog", "red"], "The dog’s bread was EATEN.", ["red"]),    # not the "red" of "bread"... nor of "EATEN"
    (["eat", "cat", "old"], "The catty man had a seat and told.", ["eat", "cat", "old"]),
    (["carry", "car", "wet"], "I care for a card.", ["carry", "car", "wet"]),
    (["eat", "dog", "red", "stop", "tree"], "The red dog ate, then stopped.", ["tree"]),    # more than we ask for
])
def test_inflections_count_as_the_word_and_lookalikes_do_not(words, story, absent):
    assert generate.missing_words(words, story) == absent


@pytest.mark.parametrize("word, ending, form", [
    ("stop", "ed", "stopped"), ("bake", "ing", "baking"), ("see", "ing", "seeing"), ("lie", "ing", "lying"),
    ("cry", "s", "cries"), ("cry", "ing", "crying"), ("play", "ed", "played"), ("box", "s", "boxes"),
    ("big", "er", "bigger"), ("nice", "est", "nicest"), ("happy", "ly", "happily"), ("gentle", "ly", "gently"),
    ("full", "ly", "fully"), ("careful", "ly", "carefully"), ("forget", "ing", "forgetting"), ("rain", "y", "rainy")])
def test_endings_are_spelled_by_the_rules(word, ending, form):
    assert generate.add_ending(word, ending) == form


@pytest.mark.parametrize("word, forms", [
    ("travel", "travels traveled travelled traveling travelling"), ("go", "goes went gone going"),
    ("child", "children"), ("calf", "calves"), ("woman", "women"), ("potato", "potatoes"), ("quiz", "quizzes quizzing"),
    ("stomach", "stomachs"), ("shy", "shyer shyly"), ("true", "truly truest"), ("age", "aging ageing aged"),
    ("sheep", "sheep"), ("run", "ran runs running"), ("good", "better best")])
def test_irregular_and_british_forms_are_inflections(word, forms):
    assert set(forms.split()) <= generate.inflections(word)


def test_other_words_are_no_inflections():
    for word, other in (("hop", "hoping"), ("plan", "planes"), ("cap", "capes"), ("bite", "bits"), ("fly", "fling")):
        assert other not in generate.inflections(word)


CAT = "A cat sat.\n\nIt slept."


@pytest.mark.parametrize("before, after", [(before, "") for before in (
    "", "Story: ", "Story 1:\n", "**The Cat**\n\n", "# The Cat\n", "Title: The Cat\n\nStory: ", "```\n",
    # small talk
    "Thank you for your request! ",
    "Okay, here is a story:\n\n", "Okay, here is a story: ", "Sure! Here is your story:\n\n**Story:**\n", "Sure! ",
    "Sure! Here’s a short, simple story for you:\n\n", "*Okay, here is a story:*\n\n", "Certainly!\n\n",
    "Of course! I'd be happy to write a story for you.\n\n", "Sure, here you go:\n", "Here's my attempt:\n\n",
    'Here is a story using the words "jump", "dog" and "red":\n\n', "Certainly, here is your story.\n\n",
    "Here is a story that a 3-year-old can understand:\n\n**The Cat**\n\n", "I have written a story for you:\n",
    "Great! Here is the story you asked for:\n\n", "I'd love to help! Here's a story:\n\n",
    "Final answer: ", "Let's begin!\n\n", "Here is the story.\n\n",
    "Absolutely! I'd love to write that.\n\n", "Certainly! Below you'll find the story.\n\n", "*The Cat*\n\n",
    "Here's your story! 😊\n\n",
    # thoughts
    "<think>\nSummary: I need a cat.\n</think>\n", "I need a cat.\n</think>\n\n",
    "<think>a</think>Sure!\n<think></think>", "<unused94>thought\n<unused95>",
    "<thinking>A dog?\n\nA cat.</thinking>", "[THINK]A cat.[/THINK]", "◁think▷A cat.◁/think▷",
    "<seed:think>A cat.</seed:think>", "<reasoning>A cat.</reasoning><story>", "<think>A cat.</think>\n<answer>",
    "<|channel|>analysis<|message|>A cat.<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>commentary<|message|>B<|end|><|start|>assistant"
    "<|channel|>final<|message|>Sure! Here is a story:\n\n", "analysisWe need a cat.assistantfinal",
    "<|channel>thought\nA cat.<channel|>", "<|START_THINKING|>A cat.<|END_THINKING|><|START_RESPONSE|>",
    "<|begin_of_thought|>A cat.<|end_of_thought|>\n<|begin_of_solution|>", "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n")] + [("", after) for after in (
    " Would you like another?", "\n\nWould you like another story?", "\n\n---\n\nI hope you enjoyed this story! 😊",
    "\n\nLet me know if you’d like me to change it!", "\n\n*(Word count: 120)*", "\n\nEnjoy!", "\n```",
    '\n\nNote: I used the words "jump" and "dog".', "\n\n**Words used:** jump, dog",
    "\n\nWords used in the story: jump, dog",
    "\nFeel free to ask for more. Bye!",
    "\n\nIs there anything else I can help with?", "\n\nIf you'd like another story, just ask!", "\n\n</story>",
    "\n\nI hope this helps!", "\n\nI hope you enjoy the story I wrote for you!", "\n\nHappy reading!",
    "\n\nWant another story?",
    "\n\nIf you'd like, I can make it longer.", "\n\nIf you want me to change it, just say so.",
    "\n\n(This story uses the words jump and dog.)\n\nDo you want me to write one more?")])
def test_thoughts_and_small_talk_never_reach_the_corpus(before, after):
    assert generate.split_answer(before + CAT + after) == (CAT, "")
    assert generate.split_answer(f"{before}{CAT}{after}\n\nSummary: It slept.") == (CAT, "It slept.")


@pytest.mark.parametrize("summary", [
    "Summary: It slept.\n", "summary: It slept.", "**Summary:** It slept.", "---\n\n## Summary: It slept.",
    "*Summary*:\nIt slept.", "## Summary\n\nIt slept.", "One-sentence summary: It slept.",
    "<summary>It slept.</summary>",
    "Summary - It slept.", "(Summary: It slept.)", "[Summary] It slept.",
    "**Story Summary:** It slept.\n\nWould you like another?", "Summary: It slept.<|return|>",
    "Summary: It slept. Would you like another?", "Summary: It slept.\nI hope you enjoyed the story!",
    "Summary: It slept.\n\nThe user may like it.", "Summary: It slept.<|im_end|>\n<|im_start|>user\nAnother one!"])
def test_the_summary_is_one_sentence_however_it_is_marked(summary):
    for newline in "\n", "\r\n":
        assert generate.split_answer(f"{CAT}\n\n{summary}".replace("\n", newline)) == (CAT, "It slept.")


def test_a_summary_may_speak_of_the_story():
    assert generate.split_answer(f"{CAT}\n\nSummary: The story is about a cat.")[1] == "The story is about a cat."


@pytest.mark.parametrize("thought", [
    "Let me think. The words are jump, dog and red.", "First, I need to use the word jump.", "Hmm, a dog.", "Draft 1:",
    "Thought: a dog.", "Reasoning: a dog is good.", "Thinking Process:\n\n1. A dog.", "Thinking...\nA dog.",
    "Zo\ufffd ran.", "What a fun set of words! Here we go:", "TL;DR: a cat ran.", "I kept the words simple."])
def test_an_answer_that_thinks_aloud_is_rejected(thought):
    story, _ = generate.split_answer(f"{thought}\n\n{'There was a cat. ' * 20}")
    assert generate.why_rejected(story, ask.Answer("writer", {}, finish="stop"), [], set())


@pytest.mark.parametrize("story", [
    'Here is what Tom said: "Jump."\n\nHe jumped.', 'In the wood, the owl always said:\n"Be kind."\nThe end.',
    "Let me tell you a story about a bear.\n\nHe was red.", "Here is the story of Tom.\n\nHe ran.",
    "This is the story of a dog.\n\nHe ran.", "Sure enough, it rained.", '"Sure!" said Tom.\n\nHe ran.',
    "Of course, the dog ran.", "Okay was a small dog.\n\nHe ran.", "Story time was best.\n\nTom ran.",
    "I have a dog. I made this story for my mom.\n\nHe ran.", "Great dogs run. They do.", "Analysis was a cat. It ran.",
    'There was a dog.\n\n"Would you like another story?" asked Mom.', "A dog ran.\n\nWould you like to run, too?",
    "A dog ran. And you? What would you do?", "I can hear more birds now.", "He ran. I hope you like it too.",
    "He ran.\n\nI am happy to help my mom.", "A dog ran.\nThe story was over.\nThe end.",
    "Tom wrote a note: I love you.", "A dog read a book. The story had a red cat.", "I think dogs plan a lot.",
    "Mom gave a summary.\nIt was short.", 'Tom said, "Let me know when you are done."',
    'Tom said, "I can tell you another story."', "He ran.\n\nLet me know if you see the bear, said Mia. They slept.",
    "He ran.\nWould you like another one? No, said Mia.", "Words used to be hard.\n\nWords used in anger hurt.",
    "He ran.\n\nEnjoy! said Mom.", "He ran.\n\nI hope you like the story, he wrote.",
    "He ran.\nI hope you enjoy the story, said Grandma, and she closed the book.",
    "They hoped the story would go on.", "A heart <3 is red.", "If you look up, I can show you the star.",
    "I kept the words in my heart.",
    "This is the story of a 3-year-old girl. She ran.",
    "Let me tell you the story of how your dad met a bear. He ran."])
def test_a_real_story_is_not_cut(story):
    assert generate.split_answer(story) == (story, "")
    assert generate.split_answer(f"**Story:** {story}\n\nSummary: It ran.") == (story, "It ran.")
    good = ask.Answer("writer", {})
    assert not generate.why_rejected(story + "\nThe dog ran on." * generate.MIN_WORDS, good, [], set())


def test_a_run_writes_one_whole_record_a_story(capsys):
    with Server(lambda prompt, times: time.sleep(0.02)) as server:
        run(server, "--n=30", "--concurrency=4", "--price_in=1", "--price_out=3")
    assert indices() == list(range(30)) and lines("rejected") == []
    assert len(server.requests) == 30 and 1 < server.most_under_way <= 4
    assert all((r["model"], r["temperature"], r["max_tokens"]) == ("writer", 1, 1000) for r in server.requests)
    plans, record = list(generate.plans(30, 1, generate.load_words("words.json"))), lines()[0]
    assert (record["words"], record["features"]) == plans[record["index"]]
    assert record["story"].endswith("again.") and record["summary"] == "It ended."
    assert (record["model"], record["tokens_in"], record["tokens_out"]) == ("writer-2024", 100, 200)
    assert "30 stories, 0 given up" in (out := capsys.readouterr().out)
    assert "3,000 tokens in, 6,000 out, $0.02" in out and "python prepare.py --dataset=tales" in out


STORY = good('"jump"')["choices"][0]["message"]["content"]
TALE = STORY.partition("Summary")[0].strip()


@pytest.mark.parametrize("reason, bad", [
    ("word missing", answer("Once upon a time they all were glad. " * 12)),
    ("cut off", answer(STORY, finish="length")),
    ("cut off", answer(TALE + " And then")),
    ("refused", answer(None, refusal="I will not.")),
    ("refused", answer("", finish="content_filter")),
    ("refused", answer("I’m sorry, but I can’t write that story. " * 12)),
    ("refused", (400, {}, json.dumps({"error": {"message": "filtered", "code": "content_filter"}}))),
    ("too short", answer("A dog ran. Summary: It ran.")),
    ("refused", (400, {}, json.dumps({"error": {"message": "", "inner": {"code": "content_policy_violation"}}}))),
    ("thoughts or talk", answer("Okay, so the user wants a story. " + STORY)),
    ("thoughts or talk", answer("We need to write a story with a dog. " + STORY)),
    ("thoughts or talk", answer(json.dumps({"story": STORY}))),
    ("thoughts or talk", answer(TALE + "\nThe story ends on a note that no 3-year-old has ever heard.")),
    ("thoughts or talk", answer(TALE + ' This is a story of three words: "Summary:" and what happens.')),
    ("thoughts or talk", answer(TALE + "\nIn the final sentence, all is well, which is too long for 50 words.")),
    ("empty", answer("<think>Let me see.", finish="length")),
    ("empty", answer("<|channel|>analysis<|message|>Let me see.")),
    ("empty", answer("")),
    ("empty", answer(None)),
])
def test_a_bad_answer_is_counted_and_asked_for_once_more(reason, bad, capsys):
    with Server(lambda prompt, times: bad if times == 1 else None) as server:
        run(server, "--n=2")
    assert indices() == [0, 1] and len(server.requests) == 4
    assert [record["reason"] for record in lines("rejected")] == [reason] * 2
    assert f"0 given up; 2 answers rejected (2 {reason};" in capsys.readouterr().out


def test_a_copy_of_an_earlier_story_is_rejected_even_in_other_clothes():
    def shout(prompt, times):
        return answer(STORY if len(server.requests) == 1 else STORY.upper().replace(" ", "  "))
    with Server(shout) as server:
        run(server, "--n=3", "--naive", "--concurrency=1")
        assert indices() == [0] and [record["reason"] for record in lines("rejected")] == ["copy"] * 4
        run(server, "--n=4", "--naive")                                 # the earlier run's stories count, too
    assert indices() == [0] and indices("rejected") == [1, 1, 2, 2, 3, 3]


def test_a_story_rejected_twice_is_given_up_for_good(capsys):
    with Server(lambda prompt, times: answer("No.") if '"dog"' in prompt else None) as server:
        run(server, "--n=40")
        given_up = set(indices("rejected"))
        assert given_up and set(indices()) == set(range(40)) - given_up
        assert len(server.requests) == 40 + len(given_up)
        assert f"{len(given_up)} given up" in capsys.readouterr().out
        run(server, "--n=40")
    assert len(server.requests) == 40 + len(given_up)                   # nothing is paid for again
    assert f"({2 * len(given_up)} too short;" in capsys.readouterr().out


def test_usage_in_any_form_does_not_lose_the_answer():
    def behave(prompt, times):
        usage = ({"prompt_tokens": "10", "completion_tokens": "12"}, [1, 2], {"prompt_tokens": None})[times % 3]
        return {**good(prompt), "usage": usage}
    with Server(behave) as server:
        run(server, "--n=3", "--concurrency=1")
    assert indices() == [0, 1, 2]


def test_half_a_surrogate_pair_does_not_lose_the_answer():
    with Server(lambda prompt, times: answer(good(prompt)["choices"][0]["message"]["content"] + "\ud83d")) as server:
        run(server, "--n=1")
    assert lines()[0]["summary"] == ""  # it had a broken character

# ---------------------------------------------------------------------------------------------------------------
# faults

def test_faults_that_pass_cost_nothing_but_time():
    def misbehave(prompt, times):
        if times == 1:
            time.sleep(0.05 * random.random())
            return next(faults)
    faults = itertools.cycle([fault(429), fault(500), fault(503), fault(408), (502, {"retry-after": "0.001"}, "")])
    with Server(misbehave) as server:
        run(server, "--n=20", "--concurrency=3")
    assert indices() == list(range(20)) and lines("rejected") == []
    assert set(server.times.values()) == {2} and server.most_under_way <= 3
    assert server.keys == {f"Bearer {KEY}"}


def test_retry_after_is_honored():
    times = []
    with Server(lambda prompt, n: times.append(time.time()) or (
            fault(429, retry_after="1") if n == 1 else None)) as server:
        run(server, "--n=1")
    assert len(times) == 2 and times[1] - times[0] >= 1


def test_a_slow_answer_is_given_up_and_asked_for_again():
    with Server(lambda prompt, times: time.sleep(1.5) if times == 1 else None) as server:
        run(server, "--n=1", "--timeout=0.3")
    assert indices() == [0] and len(server.requests) >= 2               # a busy machine may be late once more
    assert lines("rejected")[0]["reason"] == "no answer"                # it may have to be paid


def test_half_an_answer_is_asked_for_again_and_counted_as_the_dearest(capsys):
    with Server(lambda prompt, times: (200, {}, None) if times == 1 else None) as server:
        run(server, "--n=2", "--max_tokens=700", "--max_retries=1")
    assert indices() == [0, 1] and len(server.requests) == 4
    assert [record["tokens_out"] for record in lines("rejected")] == [700, 700]
    assert "1,800 out" in capsys.readouterr().out


@pytest.mark.parametrize("status, message", [
    (401, f"Incorrect API key provided: {KEY}"), (403, "not allowed"), (404, "The model `writer` does not exist"),
    (400, "Unsupported parameter"), (400, ""), (402, "no credit"), (429, "insufficient_quota")])
def test_what_waiting_cannot_mend_stops_the_run_at_once(status, message, capsys):
    with Server(lambda prompt, times: fault(status, message) if len(server.requests) > 10 else None) as server:
        line = refused(server, "--n=100", "--concurrency=3")
    assert len(server.requests) <= 13 and len(lines()) == 10
    assert message.split(":")[0] in line and "90 stories are missing: run the same command again" in line
    assert KEY not in "".join(capsys.readouterr())


def test_a_server_that_always_fails_is_not_asked_for_ever():
    with Server(lambda prompt, times: fault(500, "broken")) as server:
        line = refused(server, "--n=100", "--concurrency=3", "--max_retries=1")
    assert "a request failed at 127.0.0.1" in line and "broken" in line
    assert len(server.requests) <= 2 * 3 * 3 and max(server.times.values()) == 2


def test_one_story_that_always_fails_does_not_hold_up_the_others():
    with Server(lambda prompt, times: fault(500) if prompt == server.requests[0]["messages"][0]["content"] else None
                ) as server:
        assert "1 stories are missing" in refused(server, "--n=10", "--max_retries=1", "--concurrency=2")
        assert len(lines()) == 9
        server.behave = lambda prompt, times: None
        run(server, "--n=10")
    assert indices() == list(range(10)) and len(server.requests) == 9 + 2 + 1


def test_a_server_that_is_not_there():
    with Server() as server:
        pass
    assert "Connection error" in refused(server, "--n=2", "--max_retries=0")


@pytest.mark.parametrize("options, error", [
    ("--base_url=localhost:1", "must begin with http"), ("--n=0", "must be at least 1"),
    ("--max_cost=1", "needs the prices"), ("--model=", "which model"),
    ("--tempreture=1", "did you mean --temperature"), ("--words=none.json", "No such file"),
    ("--n=141", "only 140 triples"), ("--words=data.txt", "only 0 triples")])
def test_a_wrong_command_line_is_one_line(options, error, capsys):
    pathlib.Path("data.txt").write_text('{"verbs": {}, "nouns": {}, "adjectives": {}}')
    with Server() as server:
        line = refused(server, options)
    line = capsys.readouterr().err if line == "2" else line
    assert error in line and line.count("\n") <= 1 and not server.requests


def test_a_missing_or_broken_key_is_one_line(monkeypatch):
    with Server() as server:
        monkeypatch.setenv("OPENAI_API_KEY", f"“{KEY}”")
        assert "not set to a key" in refused(server)
        monkeypatch.delenv("OPENAI_API_KEY")
        assert "python -m lab.world" in refused(server)
    assert not server.requests

# ---------------------------------------------------------------------------------------------------------------
# what other servers do

@pytest.fixture
def soon(monkeypatch):
    """Failed requests are sent again at once."""
    monkeypatch.setattr(ask, "FIRST_PAUSE", 0.001)


def stream(*chunks, end="data: [DONE]\n\n"):
    """A reply that comes in chunks, with comments between them as some servers send them."""
    body = "".join(f": wait\n\ndata: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return 200, {"content-type": "text/event-stream"}, body + end


def chunks_of(reply):
    """The chunks of a streamed reply: one for each paragraph, an empty one with the reason, and one with the usage."""
    choice = reply["choices"][0]
    deltas = [{"delta": {"content": part}} for part in re.split(r"(\n\n)", choice["message"]["content"])]
    return [{"model": "streamer", "choices": [delta]} for delta in deltas] + [
        {"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": reply["usage"]}]


@pytest.mark.parametrize("reply, said", [
    ({"error": "Unexpected endpoint or method. (POST /chat/completions)"}, "Unexpected endpoint"),
    ({"error": {"message": "overloaded", "code": 503}}, "overloaded"),
    ({"error": {"message": "Rate limit exceeded", "code": 429}, "choices": None}, "Rate limit"),
    ({"object": "error", "message": "no worker"}, "no worker"),
    ({"choices": []}, "choices"),
    ({"choices": [{"error": {"message": "lost upstream"}, "message": {"content": "Once"}}]}, "lost upstream"),
    ({**answer("Once", finish="error"), "usage": None}, "error"),
    ((200, {}, '[{"error": {"message": "busy"}}]'), "busy"),
    ((200, {}, "[1, 2]"), "[1, 2]"), ((200, {}, ""), "200"), ((200, {}, '{"choices": ['), "choices"),
    ((200, {"content-type": "text/html"}, "<html>Please log in</html>"), "log in"),
    (stream({"error": {"message": "overloaded"}}), "overloaded"),
])
def test_a_200_without_an_answer_is_a_failed_request_and_uses_no_story_up(reply, said, soon, capsys):
    with Server(lambda prompt, times: reply if times == 1 else None) as server:
        run(server, "--n=2")
        assert indices() == [0, 1] and lines("rejected") == [] and len(server.requests) == 4
    assert said in capsys.readouterr().err                              # at once, and not only when it is given up


def test_a_200_with_an_error_that_stays_ends_the_run_at_once():
    with Server(lambda prompt, times: {"error": {"message": "No auth", "code": 401}}) as server:
        assert "No auth" in refused(server, "--concurrency=1") and len(server.requests) == 1


def test_a_forgotten_v1_is_suggested(soon):
    with Server(lambda prompt, times: {"error": "Unexpected endpoint"}) as server:
        server.url = server.url.removesuffix("/v1")
        assert "usually ends in /v1" in refused(server, "--max_retries=0")


OTHER = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."


@pytest.mark.parametrize("status, body", [
    (400, {"error": {"message": OTHER, "param": "max_tokens", "code": "unsupported_parameter"}}),
    (400, {"error": OTHER}),
    (422, {"detail": [{"loc": ["body", "max_tokens"], "msg": "Extra inputs are not permitted"}]}),
    (400, {"message": "unrecognized request argument supplied: max_tokens"})])
def test_the_other_name_of_the_limit_is_tried_once_and_kept(status, body):
    def behave(prompt, times):
        return (status, {}, json.dumps(body)) if "max_tokens" in server.requests[-1] or refuses_both else None
    refuses_both = False
    with Server(behave) as server:
        run(server, "--n=3", "--concurrency=1")
        assert ["max_completion_tokens" in request for request in server.requests] == [False, True, True, True]
        assert server.requests[-1]["max_completion_tokens"] == 1000 and indices() == [0, 1, 2]
        refuses_both = True
        assert '{"max_tokens": null}' in refused(server, "--n=4", "--concurrency=1") and len(server.requests) == 4 + 2
        refuses_both = False
        run(server, "--n=4", "--name=unlimited", '--extra={"max_tokens": null}')
    assert not {"max_tokens", "max_completion_tokens"} & server.requests[-1].keys()


def test_what_the_servers_filter_refuses_is_given_up_for_good():
    refusal = 400, {}, json.dumps({"error": {"message": "filtered", "code": "content_filter"}})
    with Server(lambda prompt, times: refusal if prompt == server.requests[0]["messages"][0]["content"] else None
                ) as server:
        run(server, "--n=4", "--concurrency=1")
        run(server, "--n=4")
    assert indices() == [1, 2, 3] and len(server.requests) == 5


@pytest.mark.parametrize("status, said, action", [
    (400, "max_tokens is too large: 5000. This model supports at most 4096 completion tokens", "stop"),
    (400, "the request was flagged by our moderation", "refused"), (400, "'temperature' is not supported", "stop"),
    (429, "tokens per minute; use streaming instead", "retry"), (500, "an upstream server failed", "retry"),
    (529, "overloaded", "retry"), (0, "Connection error.", "retry"), (404, "no such model", "stop"),
    (0, "certificate verify failed: Hostname mismatch", "stop"), (403, "not in your country", "stop")])
def test_what_to_do_about_what_a_server_says(status, said, action):
    answer = ask.Answer("writer", {}, error=said, status=status)
    assert ask.what_to_do(answer, {"model": "writer", "max_tokens": 5000, "temperature": 1}, []) == action


def test_a_parameter_that_is_refused_can_be_left_out_and_others_added():
    said = "Unsupported value: 'temperature' does not support 1 with this model."
    with Server(lambda prompt, times: fault(400, said) if "temperature" in server.requests[-1] else None) as server:
        line = refused(server, "--n=2")
        assert said in line and """--extra='{"temperature": null}'""" in line
        run(server, "--n=2", '--extra={"temperature": null, "reasoning_effort": "low", "chat": {"think": false}}')
        assert server.requests[-1]["reasoning_effort"] == "low" and server.requests[-1]["chat"] == {"think": False}
    assert indices() == [0, 1]


@pytest.mark.parametrize("said, options", [
    ("This model only support stream mode, please enable the stream parameter to access the model.", True),
    ("Stream must be set to true", False), ("Non-streaming requests are not supported", True)])
def test_a_model_that_only_streams(said, options):
    def behave(prompt, times):
        if not server.requests[-1].get("stream"):
            return fault(400, said)
        if not options and "stream_options" in server.requests[-1]:
            return fault(400, "Unknown parameter: 'stream_options'")
        return stream(*chunks_of(good(prompt)))
    with Server(behave) as server:
        run(server, "--n=3", "--concurrency=1")
    assert indices() == [0, 1, 2] and len(server.requests) == 3 + 1 + (not options)
    record = lines()[0]
    assert record["summary"] == "It ended." and record["model"] == "streamer"
    assert (record["tokens_in"], record["tokens_out"]) == (100, 200)


def test_a_server_that_streams_unasked_and_breaks_off(soon, capsys):
    def behave(prompt, times):
        chunks = chunks_of(good(prompt))
        return stream(*chunks) if times > 1 else stream(*chunks[:3], end="")
    with Server(behave) as server:
        run(server, "--n=1")
    assert lines()[0]["summary"] == "It ended." and "broke off" in capsys.readouterr().err
    assert [record["reason"] for record in lines("rejected")] == ["no answer"]


def test_the_text_parts_of_a_content_are_joined_and_thoughts_left_out():
    def parts(prompt, times):
        text = good(prompt)["choices"][0]["message"]["content"]
        return answer([{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
                       {"type": "text", "text": text[:30]}, {"type": "reasoning", "text": "Hm."}, text[30:]])
    with Server(parts) as server:
        run(server, "--n=2")
    assert indices() == [0, 1] and lines()[0]["summary"] == "It ended." and "Hm" not in lines()[0]["story"]


@pytest.mark.parametrize("thoughts, finish", [
    ("", "length"), ("", "stop"), (None, "MAX_TOKENS"), ("<think>Hm", "length"), ("<think>Hm", "stop")])
def test_answers_that_end_at_the_limit_stop_the_run_early_and_name_the_option(thoughts, finish):
    def behave(prompt, times):
        reply = answer(thoughts, finish=finish)
        reply["usage"]["completion_tokens"] = server.requests[-1]["max_tokens"]
        return reply if server.requests[-1]["max_tokens"] < 3000 else None
    with Server(behave) as server:
        line = refused(server, "--n=15", "--concurrency=2")
        assert "raise --max_tokens" in line and "thinking" in line and len(server.requests) <= 6
        run(server, "--n=15", "--max_tokens=3000")                      # nothing is used up
        assert indices() == list(range(15))
        server.behave = lambda prompt, times: answer("", finish="length")
        assert "raise --max_tokens" in refused(server, "--n=25")
        server.behave = lambda prompt, times: None
        run(server, "--n=25", "--max_tokens=4000")                      # not even where some stories are good
    assert indices() == list(range(25))


def test_empty_answers_use_no_story_up(capsys):
    with Server(lambda prompt, times: answer("") if prompt == server.requests[0]["messages"][0]["content"] and times < 3
                else None) as server:
        run(server, "--n=9", "--concurrency=3")
        assert len(lines()) == 8 and "1 stories are missing" in capsys.readouterr().out
        run(server, "--n=9")
    assert indices() == list(range(9))


@pytest.mark.parametrize("key", ["x", "ma", "max", "ollama"])
def test_a_word_instead_of_a_key_is_not_replaced_in_what_the_server_says(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with Server(lambda prompt, times: fault(400, "max_tokens exceeds what ollama has")) as server:
        with pytest.raises(SystemExit, match="max_tokens exceeds what ollama has"):
            run(server)


@pytest.mark.parametrize("name, value", [("ALL_PROXY", "socks5://127.0.0.1:9"), ("HTTPS_PROXY", "gopher://127.0.0.1:9"),
                                         ("SSL_CERT_FILE", "none.pem"), ("HTTP_PROXY", "http://127.0.0.1:9")])
def test_the_network_of_the_environment(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with Server() as server:
        run(server, "--n=1")                                            # a server on this machine needs no proxy
    if name != "HTTP_PROXY":
        with pytest.raises(SystemExit, match=f"{name}") as end:
            ask.connect(SimpleNamespace(base_url="https://example.org/v1", timeout=1))
        assert "\n" not in str(end.value)


def test_a_server_without_https():
    with Server() as server:
        server.url = server.url.replace("http:", "https:")
        line = refused(server, "--n=1")                                 # at once, in spite of --max_retries=8
    assert "SSL" in line and line.count("\n") == 1


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl")
def test_a_self_signed_certificate_is_named_and_not_tried_again(monkeypatch):
    subprocess.run("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=a -addext "
                   "subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem".split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("cert.pem", "key.pem")
    with Server() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.url = server.url.replace("http:", "https:")
        line = refused(server, "--n=1")
        assert "self-signed certificate" in line.replace("self signed", "self-signed") and "SSL_CERT_FILE" in line
        monkeypatch.setenv("SSL_CERT_FILE", "cert.pem")
        run(server, "--n=1")


@pytest.mark.parametrize("extra", ["low", "[1]", '{"a": NaN}', '{"n": 2}', '{"model": "other"}', '{"max_tokens": 5}'])
def test_extra_parameters_are_an_object_without_those_that_have_an_option(extra, capsys):
    with pytest.raises(SystemExit):
        generate.main([f"--extra={extra}", "--model=writer"])
    assert "--extra" in (line := capsys.readouterr().err) and line.count("\n") == 1


def test_requests_that_time_out_lower_the_concurrency_and_answers_raise_it_again():
    tokens = {"tokens_in": 1, "tokens_out": 1}
    bar = SimpleNamespace(update=lambda: None, write=lambda text, file: None)
    args = SimpleNamespace(concurrency=8, max_retries=9)
    asking = ask.Asking(None, {}, lambda item, answer: "", bar, args, Counter())
    late = ask.Answer("writer", tokens, error="late", lost=True)
    for _ in range(5):
        asking.handle(ask.Task(0, "", 1), late)
    assert asking.slots == 3
    for _ in range(21):
        asking.handle(ask.Task(0, "", 1), ask.Answer("writer", tokens))
    assert int(asking.slots) == 4
    for _ in range(20):
        asking.handle(ask.Task(0, "", 1), late)
    assert asking.slots == 1


def test_a_server_that_answers_one_at_a_time_is_not_overrun(monkeypatch):
    """It takes half as long as --timeout allows, so that of five requests at a time three would wait in vain."""
    monkeypatch.setattr(ask, "FIRST_PAUSE", 0.05)
    one = threading.Lock()

    def behave(prompt, times):
        with one:
            time.sleep(0.1)
    with Server(behave) as server:
        run(server, "--n=5", "--concurrency=5", "--timeout=0.25", "--max_retries=20")
    assert indices() == list(range(5))


def test_a_long_retry_after_ends_the_run_and_says_so():
    with Server(lambda prompt, times: fault(429, retry_after="86400")) as server:
        assert "86,400 seconds" in refused(server, "--n=1") and len(server.requests) == 1

# ---------------------------------------------------------------------------------------------------------------
# nothing lost, nothing paid twice

def test_a_longer_run_only_adds():
    with Server() as server:
        run(server, "--n=10")
        before = lines()
        run(server, "--n=25")
    assert lines()[:10] == before and indices() == list(range(25)) and len(server.requests) == 25


@pytest.mark.parametrize("option", ["--model=other", "--seed=2", "--level=pupil", "--naive", "--temperature=0.5",
                                    '--extra={"top_p": 0.9}', "--words=more.json"])
def test_other_settings_are_refused_by_name(option):
    pathlib.Path("more.json").write_text(json.dumps({**WORDS, "nouns": {"animals": ["ox"]}}))
    with Server() as server:
        run(server, "--n=2")
        assert f"was begun with {option.split('=')[0]}=" in refused(server, "--n=3", option)
        run(server, "--n=3", "--concurrency=1", "--timeout=9", "--max_retries=1", "--max_tokens=9")  # these may change
    assert len(server.requests) == 3


def test_a_corpus_from_elsewhere_is_left_alone():
    os.makedirs("data/tales")
    pathlib.Path("data/tales/stories.jsonl").write_text('{"story": "mine"}\n')
    with Server() as server:
        assert "was not written by generate.py" in refused(server)
    assert lines() == [{"story": "mine"}] and not server.requests


@pytest.mark.parametrize("name", ["stories", "rejected"])
def test_a_half_written_last_line_is_repaired(name):
    path = pathlib.Path(f"data/tales/{name}.jsonl")
    with Server(lambda prompt, times: answer("No.") if times == 1 else None) as server:
        run(server, "--n=3")
        whole = path.read_bytes()
        for cut in 1, 40:                               # only the newline is missing: nothing is lost; or half a line
            path.write_bytes(whole[:-cut])
            run(server, "--n=3")
            assert indices() == [0, 1, 2] and path.read_bytes().endswith(b"\n")
            assert len(server.requests) == 6 + (cut == 40 and name == "stories")
        path.write_bytes(b'{"index": \n' + whole)
        assert "line 1 is not JSON" in refused(server)


def test_reading_changes_no_file_and_opening_to_append_repairs_it():
    path = pathlib.Path("lines.jsonl")
    for text, n_lines in (b'{"a": 1}\n{"a"', 1), (b'{"a": 1}\n{"a": 2}', 2), (b"", 0):
        path.write_bytes(text)
        assert list(files.read_lines("lines.jsonl")) == [{"a": 1}, {"a": 2}][:n_lines]
        assert path.read_bytes() == text
        files.open_to_append("lines.jsonl").close()
        assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n'[:9 * n_lines]
    assert list(files.read_lines("none.jsonl")) == [] and not os.path.exists("none.jsonl")


def test_a_setting_that_brought_nothing_yet_may_be_mended():
    with Server(lambda prompt, times: fault(404) if server.requests[-1]["model"] == "writer" else None) as server:
        assert "a request failed at 127.0.0.1" in refused(server, "--n=2")
        run(server, "--n=2", "--model=writer-2")
    assert indices() == [0, 1]


def test_two_runs_on_one_corpus_are_refused():
    with Server() as server:
        run(server, "--n=2")
        script = ("from common.files import lock\nfile = lock('data/tales/generate.lock')\n"
                  "print('locked', flush=True)\ninput()")
        other = subprocess.Popen([sys.executable, "-c", script], text=True, stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)})
        assert other.stdout.readline() == "locked\n"
        assert "another process is writing to data/tales" in refused(server, "--n=3")
        other.communicate("\n")
        run(server, "--n=3")


def start(server, *options, **more):
    return subprocess.Popen([sys.executable, str(SCRIPT), *command(server, *options)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **more)


@pytest.mark.parametrize("log", [{}, {"OPENAI_LOG": "debug"}])
def test_the_key_is_nowhere(log):
    """Not on the terminal, and (see `workplace`) in no file, even where the server repeats it."""
    happens = iter([None, answer("No."), (500, {"retry-after": "0.001"}, f"<html>{KEY}</html>"), None,
                    (200, {}, f'{{"error": "{KEY}"'), None,
                    fault(401, f"Incorrect API key provided: {KEY}")])
    with Server(lambda prompt, times: next(happens)) as server:
        process = start(server, "--concurrency=1", env={**os.environ, **log})
        out, err = process.communicate()
    assert "Incorrect API key provided: (key)" in err and KEY not in out + err and lines("rejected")


def wait_until(condition):
    for _ in range(15000):              # 30 s and more, counted in looks, so that a machine may sleep meanwhile
        if condition():
            return
        time.sleep(0.002)
    pytest.fail("waited in vain")


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_waits_for_the_answers_under_way_and_a_second_one_does_not(times):
    answers = threading.Event()
    with Server(lambda prompt, times: answers.wait(60) and None) as server:
        process = start(server, "--n=100", "--concurrency=5")
        wait_until(lambda: server.under_way == 5)
        process.send_signal(signal.SIGINT)
        told = process.stderr.readline()                                # so the first Ctrl-C has arrived
        if times == 2:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        answers.set()
        out, err = process.communicate()
    assert told == "waiting for the answers under way; Ctrl-C again drops them\n"
    kept = 5 if times == 1 else 0
    assert process.returncode == -signal.SIGINT and "Traceback" not in err  # with which a shell's loop ends
    assert len(server.requests) == 5 and len(lines()) == kept
    assert "stopped" in err and f"{100 - kept} stories are missing: run the same command again" in err


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_killed_at_random_moments_every_story_is_there_once_and_paid_once():
    n, concurrency, kills, rng = 120, 8, 4, random.Random()
    with Server(lambda prompt, times: time.sleep(0.02 * rng.random())) as server:
        for kill in range(kills):
            process = start(server, f"--n={n}", f"--concurrency={concurrency}")
            target = len(server.requests) + rng.randint(1, n // kills)
            wait_until(lambda: len(server.requests) >= target)
            time.sleep(0.02 * rng.random())
            process.kill()
            process.communicate()
            # what is on disk now must never be asked for again
            kept = pathlib.Path("data/tales/stories.jsonl").read_text().rpartition("\n")[0].splitlines()
            paid = {prompt_of(json.loads(line)): server.times[prompt_of(json.loads(line))] for line in kept}
        process = start(server, f"--n={n}")
        out, err = process.communicate()
    assert process.returncode == 0 and f"{n} stories, 0 given up" in out
    assert indices() == list(range(n)) and len({record["story"] for record in lines()}) == n
    assert all(server.times[prompt] == times for prompt, times in paid.items())
    assert n < len(server.requests) <= n + kills * concurrency          # kills did cost, but only what was under way


def prompt_of(record):
    return generate.prompt_for("3-year-old", record["words"], record["features"])


def test_a_bug_does_not_lose_the_answers_under_way(monkeypatch):
    answers = itertools.count()

    def split_answer(text):
        if next(answers) == 2:
            raise RuntimeError("a bug")
        return "A cat sat. " * 20 + text.partition("Summary")[0].strip(), ""
    monkeypatch.setattr(generate, "split_answer", split_answer)
    with Server(lambda prompt, times: time.sleep(0.02 * len(server.requests))) as server:
        with pytest.raises(RuntimeError):
            run(server, "--n=40", "--concurrency=8")
        assert len(lines()) + 1 == len(server.requests) < 20


@pytest.mark.skipif(os.name == "nt", reason="limits a file's size the POSIX way")
def test_a_full_disk_is_one_line_and_the_next_run_goes_on():
    import resource
    with Server() as server:
        process = start(server, "--n=20", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)))
        out, err = process.communicate()
        assert process.returncode == 1 and "the disk is full" in err and "Traceback" not in err
        assert len(server.requests) < 10 * 2                            # those under way, 16 of them, are lost
        run(server, "--n=20")
    assert indices() == list(range(20))

# ---------------------------------------------------------------------------------------------------------------
# money

def test_a_model_that_only_fails_is_not_paid_all_night():
    with Server(lambda prompt, times: answer("No.")) as server:
        assert "the last 100 answers were all rejected" in refused(server, "--n=140", "--concurrency=4")
        assert len(server.requests) < 100 + 4
        assert "no story was good" in refused(server, "--n=2", "--name=other")


@pytest.mark.parametrize("concurrency", [1, 16])
def test_max_cost_is_never_passed_whatever_is_under_way(concurrency, capsys):
    """The server uses every token it may: 0.01 $ an answer, and half of the answers are rejected."""
    def dear(prompt, times):
        reply = answer("No.") if times == 1 else good(prompt)
        return {**reply, "usage": {"prompt_tokens": 100, "completion_tokens": 1000, "total_tokens": 1100}}
    options = ["--n=50", f"--concurrency={concurrency}", "--price_out=10", "--max_tokens=1000"]
    with Server(dear) as server:
        assert "might pass --max_cost=0.205" in refused(server, *options, "--max_cost=0.205")
        assert len(server.requests) == 20 and "$0.20" in capsys.readouterr().out
        refused(server, *options, "--max_cost=0.205")                   # what is spent stays spent
        assert len(server.requests) == 20
        refused(server, *options, "--max_cost=0.3")
        assert len(server.requests) == 30
        run(server, *options, "--max_cost=1.01")
    assert indices() == list(range(50)) and len(server.requests) == 100


def test_max_cost_counts_requests_that_timed_out_since_they_may_have_to_be_paid(soon):
    options = ["--n=9", "--concurrency=1", "--timeout=0.1", "--price_out=10", "--max_cost=0.025"]
    with Server(lambda prompt, times: time.sleep(0.4)) as server:
        for _ in range(2):                                              # nor are they forgotten in the next run
            assert "might pass --max_cost" in refused(server, *options) and len(server.requests) == 2

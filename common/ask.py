"""Asking a large model behind a server with OpenAI's interface, for generate.py and lab/judge.py: the options, one
request, what a server may say instead of an answer, and many requests at a time.
"""
import argparse
import contextlib
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice

from common import stop_signals

MAX_REJECTED = 100  # stop after this many rejected answers in a row
MAX_CUT_OFF = 5  # and after this many without an end: they reached the limit of tokens, or are empty
NO_TOKENS = {"tokens_in": 0, "tokens_out": 0}

# -----------------------------------------------------------------------------------------------------------------
# the options, and a connection


def parse_extra(text):
    """--extra as a dict of parameters, in which None stands for one that is left out."""
    try:
        extra = json.loads(text or "{}")
        json.dumps(extra, allow_nan=False)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON: {error}") from None
    if not isinstance(extra, dict):
        raise argparse.ArgumentTypeError("""it must be a JSON object such as '{"reasoning_effort": "low"}'""")
    taken = [name for name in extra if name in ("model", "messages", "n") or extra[name] and name in OTHER_NAME]
    if taken:
        raise argparse.ArgumentTypeError(f"{taken[0]} cannot be set here: see --help for an option of its own")
    return extra


def parse_server_args(parser, argv, limit):
    """Add the options of every command that asks a server, and parse the command line.

    `limit` is the name of the option for the greatest number of tokens of an answer. args.request has the parameters
    of every request."""
    parser.option("model", "", "the model's name, as its server knows it, such as gpt-4o-mini")
    parser.option("base_url", "", "the server, if OPENAI_BASE_URL does not name it, e.g. http://localhost:8000/v1")
    parser.option(limit, 1000, "limit of an answer in tokens, with what a model thinks before it", low=1)
    parser.option("extra", {}, "more parameters of a request as JSON, null to leave one out: "
                  """'{"reasoning_effort": "low", "temperature": null}'""", type=parse_extra)
    parser.option("concurrency", 16, "requests under way at a time: 1 for a server that answers one at a time, since "
                  "the others would wait in its queue until they time out; each time-out lowers it", low=1, high=1000)
    parser.option("timeout", 120.0, "seconds to wait for an answer, in the server's queue too", low=0.1, high=86400)
    parser.option("max_retries", 8, "times to try again, waiting longer each time, after a temporary error", low=0)
    parser.option("price_in", 0.0, "dollars per million tokens of prompts", low=0, high=1e6)
    parser.option("price_out", 0.0, "dollars per million tokens of answers", low=0, high=1e6)
    parser.option("max_cost", math.inf, "stop before the cost can pass this many dollars; a request without an answer "
                  "counts as one with the longest", low=0)
    args = parser.parse_args(argv)
    if not args.model and not getattr(args, "dry_run", False):
        parser.error("which model? --model=gpt-4o-mini for one")
    args.limit_name = limit
    args.request = {"model": args.model, "max_tokens": getattr(args, limit), **args.extra}
    if args.max_cost < math.inf and args.price_in + args.price_out == 0:
        parser.error("--max_cost needs the prices: --price_in and --price_out, in dollars per million tokens")
    if args.max_cost < math.inf and not args.request["max_tokens"]:
        parser.error("--max_cost needs the limit of an answer: leave max_tokens in")
    return args


def dollars(args, tokens_in, tokens_out):
    """The price of the given numbers of prompt and answer tokens."""
    return (tokens_in * args.price_in + tokens_out * args.price_out) / 1e6


def most_tokens(prompt, request):
    """The tokens of a request with the longest answer."""
    # a token of a prompt is at least one byte, and servers add some tokens of their own
    limit = request.get("max_tokens") or request.get("max_completion_tokens") or 0
    return {"tokens_in": len(prompt.encode()) + 50, "tokens_out": limit}


def connect(args):
    """A client for the server at --base_url or OPENAI_BASE_URL, or of OpenAI if neither is given. Many threads may use
    it at once."""
    import openai  # only here: --dry_run, and lab.world, need no openai
    server = args.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    if not re.match("https?://", server):
        sys.exit("--base_url and OPENAI_BASE_URL must begin with http:// or https://")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch(r"[!-~]+", key):  # other characters make the HTTP library print the key in its error
        sys.exit("OPENAI_API_KEY is not set to a key: export OPENAI_API_KEY=… (most local servers take any word); "
                 "python -m lab.world writes stories without one")
    local = re.match(r"http://(localhost|127\.[\d.]+|0\.0\.0\.0|\[::1\])([:/]|$)", server)
    try:
        # proxies and certificates are the environment's, but a server on this machine needs none
        http_client = openai.DefaultHttpxClient(trust_env=not local)
        return openai.OpenAI(api_key=key, base_url=server, timeout=args.timeout, max_retries=0, http_client=http_client)
    except Exception as error:
        sys.exit(f"no connection can be set up ({' '.join(str(error).split())}): correct --base_url, or ALL_PROXY, "
                 "HTTPS_PROXY and SSL_CERT_FILE in the environment; a SOCKS proxy needs pip install socksio")


# -----------------------------------------------------------------------------------------------------------------
# one request


@dataclass
class Answer:
    """What came of one request: an answer, or an error."""
    model: str  # as the server calls it
    tokens: dict  # {"tokens_in", "tokens_out"} to be paid for
    text: str = ""
    finish: str = ""  # why it ends: "stop", "length", "content_filter" or the like
    refusal: str = ""
    error: str = ""  # why no answer came
    status: int = 0  # of HTTP, if there is an error; 0 if the connection failed
    pause: float = 0.0  # seconds that the server wants to be left alone
    fatal: bool = False  # whether the next request would fail in the same way
    lost: bool = False  # whether it may have been answered all the same, and have to be paid


# What to do when a server does not answer, by the first pattern that matches its status (0 for a broken connection) and
# message; what matches none ends the run. A dict has changes with which the request is sent once more, where None
# leaves a parameter out.
OTHER_NAME = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
RULES = [
    (r"^200 unreadable", "retry"),
    (r"certificate|wrong.version.number|record.layer|407 proxy|insufficient_quota", "stop"),  # waiting does not help
    (r"^[24].*(content.?filter|content.(management.)?policy|usage.polic|data_inspection|moderation|flagged)",
     "refused"),
    (r"^(200|400|405|422|501).*stream_options", {"stream_options": None}),
    (r"^(200|400|405|422|501).*\bstream", STREAM),
    (r"^(200|400|422)(?=.*(unsupported|not (support|permit|allow)|unrecogni|unknown|unexpected|extra|instead))"
     r".*max_(completion_)?tokens", OTHER_NAME),
    (r"^(0|200|408|409|425|429|5\d\d) ", "retry")]
FIRST_PAUSE = 0.5  # seconds before a failed request is sent again; doubles each time
MAX_PAUSE = 300  # a server that wants to be left alone for longer ends the run


def what_to_do(answer, sent, tried):
    """What RULES say about a failed request: "stop", "refused", "retry", or a dict of changes not tried yet."""
    for pattern, rule in RULES:
        if not re.search(pattern, f"{answer.status} {answer.error}", re.IGNORECASE | re.DOTALL):
            continue
        if rule is OTHER_NAME:
            rule = {name: sent.get(other) for name, other in OTHER_NAME.items()}
        if not isinstance(rule, dict):
            return "stop" if answer.pause > MAX_PAUSE else rule
        if rule.keys() not in tried and any(sent.get(name) != value for name, value in rule.items()):
            return rule
    return "stop"


def ask(client, request, prompt):
    """Send one request and wait for its Answer. `request` has the parameters, where None stands for one left out.

    If the server refuses a parameter, RULES change the request, for all that follow too, and it is sent again. If the
    server reports no usage, four characters are counted as a token."""
    import openai
    tried = []  # the names of the parameters that were changed
    while True:
        sent = {name: value for name, value in dict(request).items() if value is not None}
        try:
            reply = client.chat.completions.with_raw_response.create(
                model=sent["model"], messages=[{"role": "user", "content": prompt}], extra_body=sent)
            answer = read_answer(reply.http_response.content.decode("utf-8-sig", "replace"), sent, prompt)
        except openai.APIError as error:
            answer = read_error(error, sent, prompt)
        if not answer.error:
            return answer
        action = what_to_do(answer, sent, tried)
        if action == "refused":
            return Answer(sent["model"], NO_TOKENS, finish="content_filter")
        if not isinstance(action, dict):
            answer.fatal = action == "stop"
            answer.error = describe(answer, sent, tried, client)
            return answer
        tried.append(action.keys())
        request.update(action)  # in one go, since other threads read it meanwhile


def describe(answer, sent, tried, client):
    """A failed request's error in one line, without the key, and with what may help."""
    server = client.base_url.netloc.decode()
    text = " ".join(f"a request failed at {server}: {answer.status or ''} {answer.error}".split())
    # words such as "x" and "ollama", which local servers take, are no secret and may be parts of other words
    if len(client.api_key) >= 16 or len(client.api_key) >= 6 and not client.api_key.isalpha():
        text = text.replace(client.api_key, "(key)")
    refused = [name for name in sent if name not in {"model", *OTHER_NAME, *STREAM} and name in answer.error]
    if OTHER_NAME.keys() in tried:
        refused.append("max_tokens")
    advice = ""
    if answer.status in (400, 422) and refused:
        advice = f"""; leave it out with --extra='{{"{refused[0]}": null}}'"""
    elif answer.status in (200, 404, 405) and "/v" not in client.base_url.path:
        advice = "; --base_url usually ends in /v1"
    elif not answer.status and "SSL" in answer.error:
        advice = "; SSL_CERT_FILE can name a file with the certificate to trust"
    elif answer.lost:
        advice = "; if the server answers few requests at a time, lower --concurrency or raise --timeout"
    elif answer.pause > MAX_PAUSE:
        advice = f"; it wants to be asked again in {answer.pause:,.0f} seconds"
    return text[:300] + advice


def read_answer(body, sent, prompt):
    """The Answer in the body of a reply with status 200, which may hold an error all the same."""
    streamed = re.match(r"\s*(data|event|id|retry)?:", body)
    try:
        reply = merge_chunks(body) if streamed else json.loads(body)
        if isinstance(reply, list):  # how some servers wrap an error
            reply = reply[0]
        usage, choice = reply.get("usage"), (reply.get("choices") or [{}])[0]
        counts = usage.items() if isinstance(usage, dict) else ()
        usage = {name: int(float(count)) for name, count in counts if str(count).removesuffix(".0").isdigit()}
        problem, message = reply.get("error") or choice.get("error"), choice.get("message")
        finish = str(choice.get("finish_reason") or "").lower()
        tokens = {"tokens_in": usage.get("prompt_tokens", 0), "tokens_out": usage.get("completion_tokens", 0)}
        if problem or message is None or finish == "error":
            problem = problem or reply
            code = str(problem.get("code")) if isinstance(problem, dict) else ""
            status = int(code) if re.fullmatch(r"[45]\d\d", code) else 200
            return Answer(sent["model"], tokens, error=in_words(problem), status=status)
        text = text_of(message.get("content"))
        tokens["tokens_in"] = tokens["tokens_in"] or len(prompt) // 4
        # some servers count the thoughts in the total alone
        thought = usage.get("total_tokens", 0) - tokens["tokens_in"]
        tokens["tokens_out"] = max(tokens["tokens_out"] or len(text) // 4, thought)
        limit = sent.get("max_tokens") or sent.get("max_completion_tokens") or math.inf
        if finish in ("max_tokens", "model_length") or not text and tokens["tokens_out"] >= limit:
            finish = "length"
        return Answer(reply.get("model") or sent["model"], tokens, text, finish, text_of(message.get("refusal")))
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        tokens = most_tokens(prompt, sent) if streamed else NO_TOKENS  # the part that came has a price
        return Answer(sent["model"], tokens, error=f"unreadable ({error}): {body}", status=200, lost=bool(streamed))


def merge_chunks(body):
    """The reply of which a streamed body has the chunks, one a line: `data: {…}`."""
    reply, content, refusal, finish = {}, "", "", None
    for data in re.findall(r"^data: *(\{.*)", body, re.MULTILINE):
        chunk = json.loads(data)
        reply.update({name: value for name, value in chunk.items() if value})
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or choice.get("message") or {}
            content += text_of(delta.get("content"))
            refusal += text_of(delta.get("refusal"))
            finish = choice.get("finish_reason") or finish
    if not finish and "[DONE]" not in body and not reply.get("error"):
        raise ValueError("it broke off")
    return {**reply, "choices": [{"message": {"content": content, "refusal": refusal}, "finish_reason": finish}]}


def text_of(content):
    """The text of a message's content: a string, a list of parts, of which some are thoughts or images, or None."""
    if isinstance(content, list):
        return "".join(map(text_of, content))
    if isinstance(content, dict):
        return text_of(content.get("text")) if content.get("type") in (None, "text", "output_text") else ""
    return re.sub("[\ud800-\udfff]", "\ufffd", content or "")  # half a surrogate pair cannot be written


def in_words(problem):
    """What a server reports as an error, such as {"message", "type", "code"}, as a text that is not empty."""
    text = " ".join(str(value) for value in problem.values() if value) if isinstance(problem, dict) else ""
    return text or str(problem).strip() or "no message"


def read_error(error, sent, prompt):
    """The Answer for an exception of the openai library: a status that is an error, or no reply at all."""
    status, cause = getattr(error, "status_code", 0), type(error.__cause__).__name__
    problem = in_words(error.body) if status else f"{error} ({error.__cause__})"
    answer = Answer(sent["model"], NO_TOKENS, error=problem, status=status)
    if cause in ("ReadTimeout", "ReadError", "RemoteProtocolError") or status in (504, 524):  # gateways' time-outs
        answer.lost, answer.tokens = True, most_tokens(prompt, sent)
    with contextlib.suppress(AttributeError, LookupError, ValueError):  # no reply, no such header, or it is a date
        answer.pause = float(error.response.headers["retry-after"])
    return answer


# How models mark their thoughts. An answer can begin in the middle of them, if the chat template has opened them, and
# end there, if --max_tokens cuts them off.
THOUGHT = r"(?:\w+:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratchpad|plan(?:ning)?)"
THOUGHTS_BEGIN = (rf"(?:<\|?(?:begin_of_|start_)?{THOUGHT}\b[^<>\n]*>|\[THINK\]|◁think▷|<unused94>"
                  r"|<\|channel\|?>\s*(?:analysis|commentary|thought)\b|\A\s*analysis(?=(?-i:[A-Z])))")
THOUGHTS_END = (rf"(?:</{THOUGHT}\s*>|<\|end_(?:of_)?{THOUGHT}\|>|\[/THINK\]|◁/think▷|<unused95>|<channel\|>"
                r"|<\|channel\|>final\b|assistantfinal)")
TEMPLATE_TOKEN = r"(?:<\|[^<>\n]*\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>)"


def without_thoughts(text):
    """An answer without the model's thoughts and the tokens of its chat template."""
    text = re.sub(f"(?is){THOUGHTS_BEGIN}.*?{THOUGHTS_END}", "", text)
    text = re.split(f"(?i){THOUGHTS_END}", text)[-1]  # thoughts that began before the answer
    text = re.split(f"(?i){THOUGHTS_BEGIN}", text)[0]  # thoughts that were cut off
    text = re.sub(rf"\A(?:\s*{TEMPLATE_TOKEN}\s*(?:assistant|model)?)+", "", text)
    return re.split(TEMPLATE_TOKEN, text)[0]  # what comes after the answer's end is none of it


# -----------------------------------------------------------------------------------------------------------------
# many requests at a time


@dataclass
class Task:
    """A prompt to ask about, see ask_all()."""
    item: object
    prompt: str
    requests: int  # that may still be answered
    failures: int = 0  # requests that were not answered
    not_before: float = 0.0  # time.monotonic() after a pause


class Asking:
    """The requests of a command, many at a time: those that wait, those under way, and what came of the last ones.

    A thread sends one request and waits for its answer. The main thread does everything else, so nothing needs a
    lock. See ask_all() for the arguments."""

    def __init__(self, client, request, store, bar, args, tokens):
        self.client, self.request, self.store, self.bar = client, request, store, bar
        self.args, self.tokens = args, tokens
        self.queue = deque()  # the tasks that come next: new ones, rejected ones and failed ones
        self.in_flight = {}  # {Future of an Answer: Task}
        self.slots = args.concurrency  # requests that may be under way
        self.failed = self.rejected = self.cut_off = 0  # in a row: tasks given up, rejected answers, too long ones
        self.warned = False  # whether the user knows that a request failed
        self.last_error = ""  # why a task is left for the next run
        self.stop = None  # the exception to end with. Once it is set, no more requests are started

    def start(self, pool):
        """Start requests, as many as the slots and --max_cost allow."""
        for _ in range(len(self.queue)):
            if self.stop or len(self.in_flight) >= int(self.slots):
                return
            task = self.queue.popleft()
            if time.monotonic() < task.not_before:
                self.queue.append(task)
                continue
            cost = Counter(self.tokens)
            for each in (task, *self.in_flight.values()):
                cost.update(most_tokens(each.prompt, self.args.request))
            if dollars(self.args, **cost) > self.args.max_cost:
                self.queue.appendleft(task)
                if not self.in_flight:  # those might have cost less than the worst case
                    self.stop = SystemExit(f"the next answer might pass --max_cost={self.args.max_cost:g}")
                return
            self.in_flight[pool.submit(ask, self.client, self.request, task.prompt)] = task

    def collect(self):
        """Wait until answers have come or a pause is over, at most 0.2 seconds, and store the answers."""
        pauses = [task.not_before - time.monotonic() for task in self.queue]
        timeout = min([0.2, *(pause for pause in pauses if pause > 0)])  # Ctrl-C cannot end a wait on Windows
        if not self.in_flight:
            time.sleep(timeout)
        for future in wait(self.in_flight, timeout, FIRST_COMPLETED).done:
            task = self.in_flight.pop(future)
            try:
                self.handle(task, future.result())
            except Exception as exception:  # a full disk or a bug: raise it after the other answers are stored
                self.stop = self.stop or exception

    def handle(self, task, answer):
        """Store what came of one request, and queue its task again if that helps."""
        self.tokens.update(answer.tokens)
        # what may have been paid without an answer is stored too, so that the next run knows of it
        reason = self.store(task.item, answer) if answer.tokens != NO_TOKENS or not answer.error else ""
        if answer.error:
            return self.handle_error(task, answer)
        self.failed = 0
        self.slots = min(self.args.concurrency, self.slots + 0.05)  # one more after 20 answers
        self.rejected = self.rejected + 1 if reason else 0
        empty = not (without_thoughts(answer.text).strip() or answer.refusal or answer.finish == "content_filter")
        self.cut_off = self.cut_off + 1 if reason and (empty or answer.finish == "length") else 0
        if self.cut_off == MAX_CUT_OFF:
            self.stop = self.stop or SystemExit(
                f"the last {MAX_CUT_OFF} answers were empty or cut off ({answer.finish or 'stop'}), this one after "
                f"{answer.tokens['tokens_out']:,} tokens of thinking and text: raise --{self.args.limit_name}, have it "
                """think less, for instance with --extra='{"reasoning_effort": "low"}', or try another --model""")
        elif self.rejected == MAX_REJECTED:
            self.stop = self.stop or SystemExit(
                f"the last {self.rejected} answers were all rejected, the last one: {reason}")
        if reason and task.requests > 1:  # ask once more
            self.queue.append(Task(task.item, task.prompt, task.requests - 1))
        else:
            self.bar.update()

    def handle_error(self, task, answer):
        """Try again after a pause, unless that is useless: then the task is left for the next run."""
        if answer.lost:
            self.slots = max(1, int(self.slots) - 1)
        task.failures += 1
        if not answer.fatal and task.failures <= self.args.max_retries:
            pause = min(30, FIRST_PAUSE * 2 ** min(task.failures - 1, 9)) * random.uniform(0.75, 1)
            task.not_before = time.monotonic() + (answer.pause or pause)
            self.queue.append(task)
            if not self.warned:
                self.bar.write(f"{answer.error} (trying again)", file=sys.stderr)
            self.warned = True
            return
        self.failed, self.last_error = self.failed + 1, answer.error
        self.bar.update()
        if answer.fatal or self.failed >= max(2, self.args.concurrency):
            self.stop = self.stop or SystemExit(answer.error)


def ask_all(client, request, tasks, store, bar, args, tokens):
    """Run all tasks, up to --concurrency at once.

    tasks: yields (item, prompt, how many requests may be made about the item).
    store(item, answer): writes an answer to a file; returns why it is rejected, or "" if it is good.
    tokens: a Counter of all tokens paid for, to which those of the answers are added.
    Raises SystemExit or KeyboardInterrupt, with the reason as its text, if tasks are left for the next run; and what
    store() raises."""
    asking = Asking(client, request, store, bar, args, tokens)
    tasks = (Task(*task) for task in tasks)
    pool = ThreadPoolExecutor(args.concurrency)
    with stop_signals() as signals, bar:
        while True:
            # the queue and the requests under way are never more than --concurrency together
            asking.queue.extend(islice(tasks, args.concurrency - len(asking.queue) - len(asking.in_flight)))
            asking.start(pool)
            if not asking.in_flight and (asking.stop or not asking.queue):
                break
            asking.collect()
            if signals and not asking.stop:  # after a first Ctrl-C, only wait for the answers under way
                asking.stop = KeyboardInterrupt("stopped")
                signal.signal(signal.SIGINT, drop_answers)
                if asking.in_flight:
                    bar.write("waiting for the answers under way; Ctrl-C again drops them", file=sys.stderr)
    pool.shutdown()
    if asking.stop or asking.last_error:
        raise asking.stop or SystemExit(asking.last_error)


def drop_answers(number, frame):
    """What a second Ctrl-C does."""
    raise KeyboardInterrupt("stopped, without the answers under way")

"""Have a large model write a corpus of stories, each from three random words and some random features.

Asked for "a story", even the best models tell the same few over and over. Three random words and some random features
in each prompt make a corpus diverse (Eldan & Li 2023, arXiv 2305.07759). Each story has a number and takes five steps:

    plan    its words and features, which depend on --seed and its number alone: plans()
    prompt  the text that asks for it: prompt_for()
    answer  from any server that speaks OpenAI's Chat Completions, many requests at a time: ask_all()
    check   is it a whole story, with all three words, and no copy? split_answer(), why_rejected()
    file    stories.jsonl if it is good, else rejected.jsonl, both under data/<name>/: class Corpus

A rejected story is requested once more. Every answer is on disk as soon as it comes: a run may be stopped at any
moment, and the same command continues it.
"""
import argparse
import contextlib
import hashlib
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
from itertools import chain, islice

from tqdm import tqdm

from common import CommandLine, atomic_write, lock, run_main, stop_signals
from prepare import LETTERS, ends_well, fingerprint, split_words

MAX_REQUESTS = 2  # per story: if the answer is rejected, ask once more, then give up
MAX_REJECTED = 100  # stop after this many rejected answers in a row
MAX_CUT_OFF = 5  # and after this many without an end: they reached --max_tokens, or are empty
MIN_WORDS = 60  # a shorter story has no plot
ANSWER_TOKENS = 350  # typical of an answer, for --dry_run: a story of about 300 and its summary
FEATURES = {  # the TinyStories paper's name for each feature, and how the prompt asks for it
    "dialogue": "people or animals talk to each other",
    "bad ending": "it all ends badly",
    "moral value": "somebody learns how one should treat others",
    "foreshadowing": "a small thing near the beginning turns out to matter near the end",
    "plot twist": "something happens that nobody could have guessed",
    "conflict": "two characters want different things and struggle over it",
}
NO_ANSWER = ("no answer", "empty")  # reasons for a rejection that do not count: the story is asked for again
NO_TOKENS = {"tokens_in": 0, "tokens_out": 0}
ENDINGS = [("s", "ed", "ing"), ("s",), ("s", "er", "est", "ly", "y")]  # of verbs, nouns and adjectives
ALL_ENDINGS = ("s", "ed", "ing", "er", "est", "ly", "y")
WORDS_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "words.json")
with open(WORDS_FILE, encoding="utf-8") as file:
    IRREGULAR = json.load(file)["forms"]

# -----------------------------------------------------------------------------------------------------------------
# words and their inflections: to ask for random words, and to see whether a story has them in any form. lab/world.py
# uses the same rules to write.


def load_words(path):
    """Sorted lists of the distinct verbs, nouns and adjectives in a file of {kind: {group: [words]}}."""
    try:
        with open(path, encoding="utf-8") as file:
            words = json.load(file)
        return [sorted(set().union(*words[kind].values())) for kind in ("verbs", "nouns", "adjectives")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit(f'{path} is not {{"verbs": {{"group": ["word", …]}}, "nouns": …, "adjectives": …}}: {error}')


def add_ending(word, ending):
    """The regular form of a word with one of ALL_ENDINGS: cry+s cries, stop+ed stopped, bake+ing baking."""
    if ending != "ing" and re.search(r"[^aeiou]y$", word):
        return word[:-1] + ("ies" if ending == "s" else "i" + ending)  # cries, cried, happily
    if ending == "s":
        return word + ("es" if re.search(r"(s|x|z|ch|sh)$", word) else "s")
    if ending == "ly":
        return re.sub(r"(?<=[^aeiou])le?$", "", word) + "ly"  # gently, fully
    if ending == "ing" and word.endswith("ie"):
        return word[:-2] + "ying"  # lying
    if word.endswith("e") and (ending != "ing" or re.search(r"[^eoy]e$", word)):
        return word[:-1] + ending  # baked and baking, but seeing
    if re.fullmatch(r"[^aeiou]*[aeiou][bdgklmnprtz]", word) or word in IRREGULAR["doubled"]:
        return word + word[-1] + ending  # stopped, bigger, forgetting
    return word + ending


def inflections(word, endings=ALL_ENDINGS):
    """All forms of a word, with the irregular ones of data/words.json and British spellings.

    The set also contains forms that nobody writes, such as walkked. They do no harm when a story is searched for a
    word."""
    forms = {word, word + "s", IRREGULAR["past"].get(word, word), IRREGULAR["plural"].get(word, word)}
    forms.update(IRREGULAR["inflected"].get(word, []))
    forms.update(add_ending(word, ending) for ending in endings)
    for singular, plural in [("man$", "men"), ("fe?$", "ves"), ("o$", "oes"), ("([sz])$", r"\1\1es")]:
        forms.add(re.sub(singular, plural, word))  # women, calves, goes, quizzes
    if word[-1] in "ey":
        stems = [word, word.removesuffix("e")]  # shyly, ageing, truly
    else:
        stems = [word + word[-1]]  # travelled
    forms.update(stem + ending for stem in stems for ending in endings if ending != "s")
    return forms


def missing_words(words, story):
    """The requested words, [verb, noun, adjective, others], that a story does not contain in any form.

    A story has a compound such as "ice cream" if it has all its parts."""
    story_words = set(LETTERS.findall(story.lower()))
    missing = []
    for i, word in enumerate(words):
        endings = ENDINGS[i] if i < len(ENDINGS) else ALL_ENDINGS
        parts = LETTERS.findall(word.lower())
        if any(story_words.isdisjoint(inflections(part, endings)) for part in parts):
            missing.append(word)
    return missing


# -----------------------------------------------------------------------------------------------------------------
# what to ask for, and what to make of an answer


def plans(n, seed, word_lists):
    """Yield ([verb, noun, adjective], [0 to 3 features]) for n stories. No two stories get the same three words.

    The first n plans are the same for any larger n, so that a corpus can be extended."""
    if not word_lists:  # --naive
        yield from [([], [])] * n
        return
    rng = random.Random(seed)
    seen = set()
    while len(seen) < n:
        words = tuple(rng.choice(words) for words in word_lists)
        if words not in seen:
            seen.add(words)
            yield list(words), rng.sample(list(FEATURES), rng.randint(0, 3))


def prompt_for(level, words, features):
    """The prompt for one story. It asks for text with one marked line: weak models manage that better than JSON."""
    lines = [f"Write a short story of three to five paragraphs. Use only words that every {level} knows."]
    if words:
        lines.append('Use the verb "{}", the noun "{}" and the adjective "{}", each where it fits.'.format(*words))
    if features:
        lines.append("In this story, " + ", and ".join(FEATURES[feature] for feature in features) + ".")
    lines.append(f"Keep words and sentences so simple that no {level} has to ask what anything means.")
    lines.append('Begin with the first sentence, without a title. After the story, on a new line, write "Summary:" and '
                 "one sentence that says what happens.")
    return "\n".join(lines)


# How models mark their thoughts. An answer can begin in the middle of them, if the chat template has opened them, and
# end there, if --max_tokens cuts them off.
THOUGHT = r"(?:\w+:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratchpad|plan(?:ning)?)"
THOUGHTS_BEGIN = (rf"(?:<\|?(?:begin_of_|start_)?{THOUGHT}\b[^<>\n]*>|\[THINK\]|◁think▷|<unused94>"
                  r"|<\|channel\|?>\s*(?:analysis|commentary|thought)\b|\A\s*analysis(?=(?-i:[A-Z])))")
THOUGHTS_END = (rf"(?:</{THOUGHT}\s*>|<\|end_(?:of_)?{THOUGHT}\|>|\[/THINK\]|◁/think▷|<unused95>|<channel\|>"
                r"|<\|channel\|>final\b|assistantfinal)")
TEMPLATE_TOKEN = r"(?:<\|[^<>\n]*\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>)"

# What models say to whoever asked: whole lines, or sentences of which [^.!?\n]* is the rest. Stories may speak to their
# readers too, so that a phrase needs a word about the asking.
YES = r"(?:okay|ok|sure(?: thing)?|certainly|of course|absolutely|got it|understood|no problem|gladly)"
GREETING = rf"(?:(?:{YES}|yes|great|hello|hi|alright|all right|as requested)\b\W*)*"
FOR_YOU = r"(?:for you|your|you (?:asked|gave|wanted|requested)|requested|year-old|simple words)"
BEFORE_STORY = [
    r"(?:#.*|```\w*|\*\*[^*\n]*\*\*:?|title:.*)[ \t]*(?:\n|\Z)",
    rf"{YES}[.!]+\s+",
    rf"{GREETING}(?:here|below|the following)\b.*\b(?:story|tale|you (?:go|are)|it is|attempt)\b.*:[*_ \t]*(?:\n|\Z)",
    rf"{GREETING}here(?: is|'s) (?:a|the|your)\b[\w, -]*\b(?:story|tale)(?: (?:for|using|with|you)\b[^.:!?\n]*)?:\s+",
    rf"{GREETING}(?:here|i|let|this|below|thank)\b(?=[^.!?\n]*\b(?:story|tale|words|request)\b)"
    rf"[^.!?\n]*\b{FOR_YOU}\b[^.!?\n]*[.!:]+\s+",
    rf"{GREETING}i\b[^.!?\n]*\b(?:help|do that|write|create|tell)\b[^.!?\n]*[.!]\s+(?=here\b|below\b)",
    r"(?:the )?story(?: \d+)?[*_]*:[*_]*\s*"]
AFTER_STORY = [
    r"(?:would you like|do you want|shall i|should i|can i|could i|may i)\b[^.!?\n]*"
    r"\b(?:another(?=\?)|another (?:story|one|tale)|me to|story|stories|version|anything else)\b",
    r"(?:please )?(?:let me know|feel free)\b",
    r"is there anything (?:else )?(?:you|i)\b",
    r"(?:i )?hope (?:you|this|that|it|the)\b[^.!?\n]*\b(?:story|tale|enjoyed (?:it|this|reading)|this helps|request)\b",
    r"if you\b[^.!?\n]*\b(?:let me know|i can|i'll|feel free|another story|me to)\b",
    r"i(?:'d| would| can|'m| am)\b[^.!?\n]*\b(?:happy to (?:write|change)|another story|if you(?:'d)? (?:like|want))\b",
    r"(?:(?:this|the) story|i(?:'ve| have)?) (?:uses|used|includes|included|contains|incorporated|has)\b[^.!?\n]*"
    r"\b(?:the words?|requested|required|\d+ words)\b",
    r"(?:note|word count)\b[^\n]*:[^\n]*(?:\b(?:story|words?)\b|\d)",
    r"(?:words|features) used\b",
    r"enjoy(?: the story)?!"]
# What no story for children has. If it is still there when the rest is taken off, the whole answer is rejected.
NO_STORY = "|".join([
    r"(?i)</?\|?[a-z][^<>\n]*>|\|>|```|\A[{\[<]",
    r"\bthe user\b|\bthe (?:verb|noun|adjective)\b|\bthought process\b",
    rf"\A(?:{YES}|yes|great|alright)\b[,.!]* (?:i|here|let)\b|\Ai['’]?[\w ]* happy to help[.!]",
    r"\A(?:so,? )?(?:we|i|let)\b[^.!?\n]*\b(?:write|create|craft)\b[^.!?\n]*\b(?:story|tale)\b"])


def without_thoughts(text):
    """An answer without the model's thoughts and the tokens of its chat template."""
    text = re.sub(f"(?is){THOUGHTS_BEGIN}.*?{THOUGHTS_END}", "", text)
    text = re.split(f"(?i){THOUGHTS_END}", text)[-1]  # thoughts that began before the answer
    text = re.split(f"(?i){THOUGHTS_BEGIN}", text)[0]  # thoughts that were cut off
    text = re.sub(rf"\A(?:\s*{TEMPLATE_TOKEN}\s*(?:assistant|model)?)+", "", text)
    return re.split(TEMPLATE_TOKEN, text)[0]  # what comes after the answer's end is none of it


def without_talk(text):
    """A story or a summary without the titles, greetings and farewells that models put around it."""
    marks = r"[^\w\"“”‘’'…]*"  # not quotation marks: what stands in them is said by somebody in the story
    before, after = ("|".join(phrases).replace("'", "['’]") for phrases in (BEFORE_STORY, AFTER_STORY))
    last_line = rf"(?:\A|\n){marks}(?:{after}).*\Z"
    last_sentence = rf"(?<=[.!?…)*\"”])\s+(?:{after})[^.!?\n]*[.!?]*{marks}\Z"
    length = None
    while len(text) != length:
        length = len(text)
        text = re.sub(rf"(?i)\A{marks}(?:{before})", "", text.strip())
        text = re.sub(f"(?i){last_line}|{last_sentence}", "", text)
    return text


def split_answer(text):
    """(story, summary) of an answer, without the thoughts, headings, bold type and small talk that models add."""
    text = without_thoughts(text).replace("\r\n", "\n")
    text = re.sub(r"(?i)<summary>", "\nSummary: ", text)
    text = re.sub(r"(?i)</?(?:story|summary|answer|response|output|final)>", "\n", text)
    label = (r"(?im)^[\W_]*(?:story |short |brief |one.sentence )?summary\b(?: of the story)?[*_\"”]*"
             r"\s*?[:\n–—-][\W_]*")
    story, *rest = re.split(label, text)
    summary = re.split(r"\n\s*\n", rest[0].strip())[0] if rest else ""  # it was to be one sentence
    summary = " ".join(without_talk(summary).split()).strip("*_` ")
    if re.search(NO_STORY, summary):
        summary = ""
    return without_talk(story).strip("*-_` \n"), summary


def why_rejected(story, answer, words, fingerprints):
    """Why a story is rejected, or "" if it is good. `fingerprints` are those of the good stories so far."""
    excuse = (r"(?i)(i'm|i am|we're) (so |very )?sorry,? (but )?(i|we)\b|(sorry, )?(but )?i (can't|cannot|won't) "
              r"(help|write|create|fulfil|assist|comply|do|provide)|as an ai\b")
    if answer.error:
        return "no answer"
    if answer.refusal or answer.finish == "content_filter" or re.match(excuse, story.replace("’", "'")):
        return "refused"
    if not story:
        return "empty"
    if re.search(NO_STORY, story):
        return "thoughts or talk"
    if answer.finish == "length" or not ends_well(story):
        return "cut off"
    if len(split_words(story)) < MIN_WORDS:
        return "too short"
    if missing_words(words, story):
        return "word missing"
    return "copy" if fingerprint(story) in fingerprints else ""


# -----------------------------------------------------------------------------------------------------------------
# asking a server, for this script and lab/judge.py


def parse_extra(text):
    """--extra as a dict of parameters, in which None stands for one that is left out."""
    try:
        extra = json.loads(text or "{}", parse_constant=float)
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
    args.limit_name, args.limit = limit, getattr(args, limit)
    args.request = {"model": args.model, "max_tokens": args.limit, **args.extra}
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
    import openai  # here, because the words and plans above are also used where openai is not installed
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


@dataclass
class Task:
    """A prompt to ask about, see ask_all()."""
    item: object
    prompt: str
    requests: int  # that may still be answered
    failures: int = 0  # requests that were not answered
    not_before: float = 0.0  # time.monotonic() after a pause


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
            rule = {name: sent.get(other) for name, other in OTHER_NAME.items() if {name, other} & sent.keys()}
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
        usage, choice = reply.get("usage") or {}, (reply.get("choices") or [{}])[0]
        problem, message = reply.get("error") or choice.get("error"), choice.get("message")
        finish = str(choice.get("finish_reason") or "").lower()
        tokens = {"tokens_in": usage.get("prompt_tokens") or 0, "tokens_out": usage.get("completion_tokens") or 0}
        if problem or message is None or finish == "error":
            problem = problem or reply
            code = str(problem.get("code")) if isinstance(problem, dict) else ""
            status = int(code) if re.fullmatch(r"[45]\d\d", code) else 200
            return Answer(sent["model"], tokens, error=in_words(problem), status=status)
        text = text_of(message.get("content"))
        tokens["tokens_in"] = tokens["tokens_in"] or len(prompt) // 4
        # some servers count the thoughts in the total alone
        thought = (usage.get("total_tokens") or 0) - tokens["tokens_in"]
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
    return (content or "").encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written


def in_words(problem):
    """What a server reports as an error, such as {"message", "type", "code"}, as a text that is not empty."""
    text = ""
    if isinstance(problem, dict):
        text = " ".join(str(value) for value in problem.values() if value)
    return text or str(problem).strip() or "no message"


def read_error(error, sent, prompt):
    """The Answer for an exception of the openai library: a status that is an error, or no reply at all."""
    status, cause = getattr(error, "status_code", 0), type(error.__cause__).__name__
    answer = Answer(sent["model"], NO_TOKENS, error=in_words(error.body), status=status)
    if not status:
        answer.error = f"{error} ({error.__cause__})"
    if cause in ("ReadTimeout", "ReadError", "RemoteProtocolError") or status in (504, 524):  # gateways' time-outs
        answer.lost, answer.tokens = True, most_tokens(prompt, sent)
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1)):
        with contextlib.suppress(AttributeError, LookupError, ValueError):  # no reply, no such header, or it is a date
            answer.pause = answer.pause or float(error.response.headers[name]) * unit
    return answer


class Asking:
    """The requests of a command, many at a time: those that wait, those under way, and what came of the last ones.

    A thread sends one request and waits for its answer. The main thread does everything else, so nothing needs a
    lock. See ask_all() for the arguments."""

    def __init__(self, client, request, store, bar, args, tokens):
        self.client, self.request, self.store, self.bar = client, request, store, bar
        self.args, self.tokens = args, tokens
        self.queue = deque()  # the tasks that come next: new ones, rejected ones and failed ones
        self.under_way = {}  # {Future of an Answer: Task}
        self.places = args.concurrency  # requests that may be under way
        self.failed = self.rejected = self.cut_off = 0  # in a row: tasks given up, rejected answers, too long ones
        self.warned = False  # whether the user knows that a request failed
        self.left = ""  # why a task is left for the next run
        self.stop = None  # the exception to end with. Once it is set, no more requests are started

    def start(self, pool):
        """Start requests, as many as the places and --max_cost allow."""
        for _ in range(len(self.queue)):
            if self.stop or len(self.under_way) >= int(self.places):
                return
            task = self.queue.popleft()
            if time.monotonic() < task.not_before:
                self.queue.append(task)
                continue
            cost = Counter(self.tokens)
            for each in (task, *self.under_way.values()):
                cost.update(most_tokens(each.prompt, self.args.request))
            if dollars(self.args, **cost) > self.args.max_cost:
                self.queue.appendleft(task)
                if not self.under_way:  # those might have cost less than the worst case
                    self.stop = SystemExit(f"the next answer might pass --max_cost={self.args.max_cost:g}")
                return
            self.under_way[pool.submit(ask, self.client, self.request, task.prompt)] = task

    def collect(self):
        """Wait until answers have come or a pause is over, at most 0.2 seconds, and store the answers."""
        pauses = [task.not_before - time.monotonic() for task in self.queue]
        timeout = min([0.2, *(pause for pause in pauses if pause > 0)])  # Ctrl-C cannot end a wait on Windows
        if not self.under_way:
            time.sleep(timeout)
        for future in wait(self.under_way, timeout, FIRST_COMPLETED).done:
            task = self.under_way.pop(future)
            try:
                self.take(task, future.result())
            except Exception as exception:  # a full disk or a bug: raise it after the other answers are stored
                self.stop = self.stop or exception

    def take(self, task, answer):
        """Store what came of one request, and queue its task again if that helps."""
        self.tokens.update(answer.tokens)
        # what may have been paid without an answer is stored too, so that the next run knows of it
        reason = self.store(task.item, answer) if answer.tokens != NO_TOKENS or not answer.error else ""
        if answer.error:
            return self.take_error(task, answer)
        self.failed = 0
        self.places = min(self.args.concurrency, self.places + 0.05)  # one more after 20 answers
        self.rejected = self.rejected + 1 if reason else 0
        empty = not (without_thoughts(answer.text).strip() or answer.refusal or answer.finish == "content_filter")
        self.cut_off = self.cut_off + 1 if reason and (empty or answer.finish == "length") else 0
        if self.cut_off == MAX_CUT_OFF:
            text = f"the last {MAX_CUT_OFF} answers were cut off, this one after {answer.tokens['tokens_out']:,} tokens"
            advice = f"raise --{self.args.limit_name}={self.args.limit}"
            if empty:
                text += " of thinking and without any text"
                advice += """, or have it think less, for instance with --extra='{"reasoning_effort": "low"}'"""
            self.stop = self.stop or SystemExit(f"{text}: {advice}")
        elif self.rejected == MAX_REJECTED:
            self.stop = self.stop or SystemExit(
                f"the last {self.rejected} answers were all rejected, the last one: {reason}")
        if reason and task.requests > 1:  # ask once more
            self.queue.append(Task(task.item, task.prompt, task.requests - 1))
        else:
            self.bar.update()

    def take_error(self, task, answer):
        """Try again after a pause, unless that is useless: then the task is left for the next run."""
        if answer.lost:
            self.places = max(1, int(self.places) - 1)
        task.failures += 1
        if not answer.fatal and task.failures <= self.args.max_retries:
            pause = min(30, FIRST_PAUSE * 2 ** min(task.failures - 1, 9)) * random.uniform(0.75, 1)
            task.not_before = time.monotonic() + (answer.pause or pause)
            self.queue.append(task)
            if not self.warned:
                self.bar.write(f"{answer.error} (trying again)", file=sys.stderr)
            self.warned = True
            return
        self.failed, self.left = self.failed + 1, answer.error
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
            asking.queue.extend(islice(tasks, args.concurrency - len(asking.queue) - len(asking.under_way)))
            asking.start(pool)
            if not asking.under_way and (asking.stop or not asking.queue):
                break
            asking.collect()
            if signals and not asking.stop:  # after a first Ctrl-C, only wait for the answers under way
                asking.stop = KeyboardInterrupt("stopped by Ctrl-C")
                signal.signal(signal.SIGINT, drop_answers)
                if asking.under_way:
                    bar.write("waiting for the answers under way; Ctrl-C again drops them", file=sys.stderr)
    pool.shutdown()
    if asking.stop or asking.left:
        raise asking.stop or SystemExit(asking.left)


def drop_answers(number, frame):
    """What a second Ctrl-C does."""
    raise KeyboardInterrupt("stopped by Ctrl-C, without the answers under way")


# -----------------------------------------------------------------------------------------------------------------
# files of one JSON object per line. They are only appended to, so a process that is killed damages at most the last
# line


def read_lines(path):
    """Yield the objects of a file, if it exists. A last line that is only half written is skipped."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError:
                if line.endswith(b"\n"):
                    sys.exit(f"{path}, line {number} is not JSON: correct or delete that line")


def open_to_append(path):
    """Open a file to append lines to. A last line that is only half written is cut off first."""
    last = b"\n"  # for an empty file
    with open(path, "a+b") as file:
        file.seek(0)
        for last in file:
            pass
        if not last.endswith(b"\n"):
            try:
                json.loads(last)
                file.write(b"\n")  # only the newline was missing
            except ValueError:
                file.truncate(file.tell() - len(last))
    return open(path, "a", encoding="utf-8")


# -----------------------------------------------------------------------------------------------------------------
# the corpus, and the command line


class Corpus:
    """What all runs so far have written to the files of a corpus. This is all that a run knows about earlier ones."""

    def __init__(self, folder, settings):
        """Read the files. Exits if stories were written with other settings, which are kept in generate.json.

        --max_tokens may change. Stories that were rejected with other settings are asked for again."""
        self.folder = folder
        self.settings_hash = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        self.stories = os.path.join(folder, "stories.jsonl")
        self.rejected = os.path.join(folder, "rejected.jsonl")
        self.done, self.fingerprints = set(), set()  # numbers of the good stories, and fingerprints to find copies
        self.rejections, self.reasons = Counter(), Counter()  # rejected answers by number of the story, and by reason
        self.tokens = Counter(tokens_in=0, tokens_out=0)  # paid for
        settings_path = os.path.join(folder, "generate.json")
        before = next(read_lines(settings_path), {})
        for record in chain(read_lines(self.stories), read_lines(self.rejected)):
            if not before:
                sys.exit(f"{self.stories} was not written by generate.py: choose another --name")
            self.add(record)
            self.tokens.update(tokens_in=record["tokens_in"], tokens_out=record["tokens_out"])
        # an older corpus has no "extra"
        changed = [f"--{name}={before.get(name)}, not {value}" for name, value in settings.items()
                   if before.get(name, {}) != value and name != "max_tokens"]
        if changed and self.done:
            sys.exit(f"{folder} was begun with {'; '.join(changed)}: continue with that, or choose another --name")
        with atomic_write(settings_path) as file:
            file.write(json.dumps(settings) + "\n")

    def add(self, record):
        """Count a line of one of the two files."""
        if "reason" in record:
            # an older corpus has no "settings"
            same = record.get("settings", self.settings_hash) == self.settings_hash
            if same and record["reason"] not in NO_ANSWER:
                self.rejections[record["index"]] += 1
            self.reasons[record["reason"]] += 1
        else:
            self.done.add(record["index"])
            self.fingerprints.add(fingerprint(record["story"]))

    def missing(self, n):
        """Which of the first n stories may still be asked for, as a set of their numbers."""
        return {i for i in range(n) if i not in self.done and self.rejections[i] < MAX_REQUESTS}

    def summary(self, args):
        """One line for the user about all runs so far."""
        given_up = sum(count >= MAX_REQUESTS for count in self.rejections.values())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())
        details = f" ({reasons}; see {self.rejected})" if reasons else ""
        tokens_in, tokens_out = self.tokens["tokens_in"], self.tokens["tokens_out"]
        return (f"{self.stories}: {len(self.done):,} stories, {given_up:,} given up; {self.reasons.total():,} answers "
                f"rejected{details}; {tokens_in:,} tokens in, {tokens_out:,} out, "
                f"${dollars(args, tokens_in, tokens_out):,.2f}")


def write_corpus(corpus, client, args, word_lists):
    """Ask for all stories that are missing, and append each answer to its file as it comes."""
    missing = corpus.missing(args.n)
    bar = tqdm(total=args.n, initial=args.n - len(missing), unit=" stories", smoothing=0.05, disable=None)

    def tasks():
        for i, (words, features) in enumerate(plans(args.n, args.seed, word_lists)):
            if i in missing:
                prompt = prompt_for(args.level, words, features)
                yield (i, words, features), prompt, MAX_REQUESTS - corpus.rejections[i]

    def store(item, answer):
        i, words, features = item
        story, summary = split_answer(answer.text)
        reason = why_rejected(story, answer, words, corpus.fingerprints)
        record = {"story": story, "words": words, "features": features, "summary": summary, "index": i,
                  "model": answer.model, **answer.tokens}
        if reason:
            record.update(story=answer.text, reason=reason, settings=corpus.settings_hash)
        print(json.dumps(record, ensure_ascii=False), file=rejected if reason else stories, flush=True)
        corpus.add(record)
        cost = dollars(args, **corpus.tokens)
        bar.set_postfix_str(f"{corpus.reasons.total():,} rejected, ${cost:,.2f}", refresh=False)
        return reason

    request = {"temperature": args.temperature, **args.request}
    try:
        with open_to_append(corpus.stories) as stories, open_to_append(corpus.rejected) as rejected:
            ask_all(client, request, tasks(), store, bar, args, corpus.tokens)
    except OSError as error:
        sys.exit(f"cannot write in {corpus.folder}: {error.strerror}")


def parse_args(argv):
    """(args, lists of verbs, nouns and adjectives to draw from, or [] for --naive)."""
    parser = CommandLine(__doc__.splitlines()[0])
    parser.option("name", "mystories", "the corpus: a folder under data/")
    parser.option("n", 1000, "number of stories", low=1)
    parser.option("seed", 1, "chooses the words and features of every story")
    parser.option("naive", False, "ask for a story and nothing else, to see how alike they are")
    parser.option("level", "3-year-old", "who has to understand the stories")
    parser.option("words", WORDS_FILE, "vocabulary file")
    parser.option("temperature", 1.0, """of the model's sampling; left out by --extra='{"temperature": null}'""", low=0,
                  high=100)
    parser.option("dry_run", False, "only print three prompts, the coverage of the vocabulary and the expected cost")
    args = parse_server_args(parser, argv, "max_tokens")
    word_lists = [] if args.naive else load_words(args.words)
    triples = math.prod(map(len, word_lists))
    if word_lists and args.n > triples:
        parser.error(f"{args.words} makes only {triples:,} triples of words: lower --n, or give it more words")
    if not args.model and not args.dry_run:
        parser.error("which model? --model=gpt-4o-mini for one")
    return args, word_lists


def dry_run(args, word_lists):
    """Print three prompts, the share of all triples of words that will be used, and the expected cost."""
    prompts = [prompt_for(args.level, *plan) for plan in plans(min(args.n, 1000), args.seed, word_lists)]
    print(*prompts[:3], sep="\n\n", end="\n\n")
    if word_lists:
        triples = math.prod(map(len, word_lists))
        print(f"coverage: {args.n:,} of {triples:,} triples of words, one in {triples / args.n:,.0f}")
    tokens_in = args.n * sum(map(len, prompts)) // len(prompts) // 4  # a token is about four characters
    tokens_out = args.n * ANSWER_TOKENS
    if args.price_in + args.price_out == 0:
        cost = "give --price_in and --price_out, in dollars per million tokens, to see the cost"
    else:
        cost = f"${dollars(args, tokens_in, tokens_out):,.2f}"
    print(f"about {tokens_in:,} tokens in, {tokens_out:,} out: {cost}")


def main(argv=None):
    args, word_lists = parse_args(argv)
    if args.dry_run:
        return dry_run(args, word_lists)
    client = connect(args)
    settings = {name: getattr(args, name) for name in ("model", "seed", "naive", "level", "temperature", "max_tokens",
                                                   "extra")}
    words_hash = hashlib.sha256(repr(word_lists).encode()).hexdigest()[:8]
    settings["words"] = f"{os.path.basename(args.words)} ({words_hash})"
    folder = os.path.join("data", args.name)
    os.makedirs(folder, exist_ok=True)
    with lock(os.path.join(folder, "generate.lock")):
        corpus = Corpus(folder, settings)
        try:
            write_corpus(corpus, client, args, word_lists)
        except (SystemExit, KeyboardInterrupt) as end:
            if missing := len(corpus.missing(args.n)):
                raise type(end)(f"{end}\n{missing:,} stories are missing: run the same command again to continue, "
                                "or a corrected one")
        finally:
            print(corpus.summary(args))
    if not corpus.done:
        sys.exit(f"no story was good: see {corpus.rejected}, then correct the command, such as --model")
    if missing := len(corpus.missing(args.n)):
        print(f"{missing:,} stories are missing, because answers were empty: the same command asks for them again")
    print(f"next: python prepare.py --dataset={args.name}")


if __name__ == "__main__":
    run_main(main)

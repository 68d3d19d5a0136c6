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
import hashlib
import json
import math
import os
import random
import re
import signal
import sys
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain, islice

from tqdm import tqdm

from common import CommandLine, atomic_write, lock, run_main, stop_signals
from prepare import fingerprint

MAX_REQUESTS = 2  # per story: if the answer is rejected, ask once more, then give up
MAX_REJECTED = 100  # stop after this many rejected answers in a row
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
    story_words = set(re.findall(r"[^\W\d_]+", story.lower()))
    missing = []
    for i, word in enumerate(words):
        endings = ENDINGS[i] if i < len(ENDINGS) else ALL_ENDINGS
        parts = re.findall(r"[^\W\d_]+", word.lower())
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


def split_answer(text):
    """(story, summary) of an answer, without the thoughts, headings, bold type and "Story:" that models add."""
    text = re.sub(r"(?s)\A.*</think>", "", text).replace("\r\n", "\n").strip()
    story, *rest = re.split(r"(?im)^[\W_]*summary[\W_]*:[\W_]*", text)
    # lines before the story: "# Title", "**Title**", "Title: …" and "Sure, here is a story:"
    heading = r"\s*(?:#.*|\*\*[^*\n]*\*\*:?|title:.*|(?:sure|here|certainly|of course)\b.*:)\s*(?:\n|\Z)"
    story = re.sub(rf"(?i)\A(?:{heading})*(?:[\W_]*story[\W_]*:[*_]*\s*)?", "", story)
    summary = " ".join(rest[0].split()) if rest else ""
    return story.strip("*-_ \n"), summary.strip("*_ ")


def why_rejected(story, answer, words, fingerprints):
    """Why a story is rejected, or "" if it is good. `fingerprints` are those of the good stories so far."""
    excuse = (r"(?i)(i'm|i am|we're) (so |very )?sorry,? (but )?(i|we)\b|(sorry, )?(but )?i (can't|cannot|won't) "
              r"(help|write|create|fulfil|assist|comply|do|provide)|as an ai\b")
    if answer.refusal or answer.finish == "content_filter" or re.match(excuse, story.replace("’", "'")):
        return "refused"
    if not story:
        return "malformed" if answer.finish == "malformed" else "empty"
    if answer.finish == "length" or not re.search(r"(?i)([.!?…]|the end)\W*\Z", story):
        return "cut off"
    if len(story.split()) < MIN_WORDS:
        return "too short"
    if missing_words(words, story):
        return "word missing"
    return "copy" if fingerprint(story) in fingerprints else ""


# -----------------------------------------------------------------------------------------------------------------
# asking a server, for this script and lab/judge.py


def parse_server_args(parser, argv):
    """Add the options of every command that asks a server, and parse the command line."""
    parser.option("model", "", "the model's name, as its server knows it, such as gpt-4o-mini")
    parser.option("base_url", "", "the server, if OPENAI_BASE_URL does not name it, e.g. http://localhost:8000/v1")
    parser.option("concurrency", 16, "requests under way at a time", low=1, high=1000)
    parser.option("timeout", 120.0, "seconds to wait for an answer", low=0.1)
    parser.option("max_retries", 8, "times to try again, waiting longer each time, after a temporary error", low=0)
    parser.option("price_in", 0.0, "dollars per million tokens of prompts", low=0)
    parser.option("price_out", 0.0, "dollars per million tokens of answers", low=0)
    parser.option("max_cost", math.inf, "stop before the cost can pass this many dollars", low=0)
    args = parser.parse_args(argv)
    if args.max_cost < math.inf and args.price_in + args.price_out == 0:
        parser.error("--max_cost needs the prices: --price_in and --price_out, in dollars per million tokens")
    return args


def dollars(args, tokens_in, tokens_out):
    """The price of the given numbers of prompt and answer tokens."""
    return (tokens_in * args.price_in + tokens_out * args.price_out) / 1e6


def worst_cost(args, tokens, tasks, max_tokens):
    """Dollars for `tokens` so far and for one request for each task, if every answer is as long as it can be."""
    # a token of a prompt is at least one byte, and servers add some tokens of their own
    tokens_in = sum(len(prompt.encode()) + 50 for _, prompt, _ in tasks)
    return dollars(args, tokens["tokens_in"] + tokens_in, tokens["tokens_out"] + max_tokens * len(tasks))


def connect(args):
    """A client for the server at --base_url or OPENAI_BASE_URL, or of OpenAI if neither is given.

    Many threads may use it at once. It repeats a request that fails temporarily, up to --max_retries
    times and with growing pauses."""
    import openai  # here, because the words and plans above are also used where openai is not installed
    server = args.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    if not re.match("https?://", server):
        sys.exit("--base_url and OPENAI_BASE_URL must begin with http:// or https://")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch(r"[!-~]+", key):  # other characters make the HTTP library print the key in its error
        sys.exit("OPENAI_API_KEY is not set to a key: export OPENAI_API_KEY=… (most local servers take any word); "
                 "python -m lab.world writes stories without one")

    def stop_retries_without_quota(response):
        # an exhausted quota has the status of a rate limit, but waiting does not help
        if response.status_code == 429 and b"insufficient_quota" in response.read():
            response.headers["x-should-retry"] = "false"
    http_client = openai.DefaultHttpxClient(event_hooks={"response": [stop_retries_without_quota]})
    return openai.OpenAI(api_key=key, base_url=server, timeout=args.timeout, max_retries=args.max_retries,
                         http_client=http_client)


@dataclass
class Answer:
    """What came of one request: an answer, or an error."""
    model: str  # as the server calls it
    tokens: dict  # {"tokens_in", "tokens_out"} to be paid for
    text: str = ""
    finish: str = ""  # why it ends: "stop", "length", "content_filter", or "malformed" if it could not be read
    refusal: str = ""
    error: str = ""  # why no answer came, even after the client's retries
    fatal: bool = False  # whether the next request would fail in the same way


def ask(client, request, prompt):
    """Send one request and wait for its Answer. If the server reports no usage, four characters are counted as a
    token."""
    import openai
    request = {**request, "messages": [{"role": "user", "content": prompt}]}
    if client.base_url.host == "api.openai.com":
        # its newer models refuse the old name for this limit, and many other servers do not know the new one
        request["max_completion_tokens"] = request.pop("max_tokens")
    free = {"tokens_in": 0, "tokens_out": 0}
    try:
        reply = client.chat.completions.create(**request)
        message = reply.choices[0].message
        text = (message.content or "").encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written
        tokens = {"tokens_in": getattr(reply.usage, "prompt_tokens", None) or len(prompt) // 4,
                  "tokens_out": getattr(reply.usage, "completion_tokens", None) or len(text) // 4}
        return Answer(reply.model or request["model"], tokens, text, reply.choices[0].finish_reason, message.refusal)
    except openai.APIError as error:
        if error.code == "content_filter":
            return Answer(request["model"], free, finish="content_filter")
        status = getattr(error, "status_code", 500)  # a broken connection has none
        fatal = error.code == "insufficient_quota" or (status < 500 and status not in (408, 409, 429))
        message = " ".join(f"a request failed at {client.base_url.netloc.decode()}: {error}".split())
        return Answer(request["model"], free, error=message.replace(client.api_key, "(key)")[:300], fatal=fatal)
    except (ValueError, TypeError, AttributeError, IndexError):  # not JSON; or JSON, but no answer
        return Answer(request["model"], {**free, "tokens_in": len(prompt) // 4}, finish="malformed")


def ask_all(client, request, tasks, store, bar, args, tokens):
    """Run all tasks, up to --concurrency at once.

    A thread sends one request and waits for its answer. The main thread does everything else, so nothing needs a lock.
    tasks: yields (item, prompt, how many requests may be made about the item).
    store(item, answer): writes an answer to a file; returns why it is rejected, or "" if it is good.
    tokens: a Counter of all tokens paid for, to which those of the answers are added.
    Raises SystemExit or KeyboardInterrupt, with the reason as its text, if tasks are left for the next run; and what
    store() raises."""
    tasks, queue = iter(tasks), deque()  # the queue has the tasks that come next: new ones and rejected ones
    under_way = {}  # {Future of an Answer: task}
    failed = rejected = 0  # failed requests in a row, and rejected answers in a row
    error = ""  # of the last request that failed
    stop = None  # the exception to end with. Once it is set, no more requests are started
    pool = ThreadPoolExecutor(args.concurrency)
    with stop_signals() as signals, bar:
        while True:
            # 1. start requests, as many as --concurrency and --max_cost allow
            # the queue and the requests under way are never more than --concurrency together
            queue.extend(islice(tasks, args.concurrency - len(queue) - len(under_way)))
            while queue and not stop:
                if worst_cost(args, tokens, [queue[0], *under_way.values()], request["max_tokens"]) > args.max_cost:
                    break  # wait for the answers under way: they may cost less than the worst case
                item, prompt, requests = queue.popleft()
                under_way[pool.submit(ask, client, request, prompt)] = item, prompt, requests
            if not under_way:
                break
            # 2. take the answers that have come; the timeout is for Windows, where Ctrl-C cannot end the wait
            for future in wait(under_way, timeout=0.2, return_when=FIRST_COMPLETED).done:
                item, prompt, requests = under_way.pop(future)
                try:
                    answer = future.result()
                    tokens.update(answer.tokens)
                    reason = "" if answer.error else store(item, answer)
                except Exception as exception:  # a full disk or a bug: raise it after the other answers are stored
                    stop = stop or exception
                    continue
                if answer.error:  # the item is left for the next run
                    failed, error = failed + 1, answer.error
                else:
                    failed = 0
                    rejected = rejected + 1 if reason else 0
                if answer.fatal or failed > args.concurrency:
                    stop = stop or SystemExit(error)
                if rejected == MAX_REJECTED:
                    stop = stop or SystemExit(f"the last {rejected} answers were all rejected, the last one: {reason}")
                if reason and requests > 1:  # ask once more
                    queue.append((item, prompt, requests - 1))
                else:
                    bar.update()
            # 3. after a first Ctrl-C, only wait for the answers under way
            if signals and not stop:
                stop = KeyboardInterrupt("stopped by Ctrl-C")
                signal.signal(signal.SIGINT, drop_answers)
                bar.write("waiting for the answers under way; Ctrl-C again drops them", file=sys.stderr)
    pool.shutdown()
    if queue and not stop:
        stop = SystemExit(f"the next answer might pass --max_cost={args.max_cost:g}")
    if stop or error:
        raise stop or SystemExit(error)


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
        """Read the files. Exits if they were started with other settings, which are kept in generate.json."""
        self.folder = folder
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
        changed = [f"--{name}={before.get(name)}, not {value}" for name, value in settings.items()
                   if before.get(name) != value]
        if changed and (self.done or self.rejections):
            sys.exit(f"{folder} was begun with {'; '.join(changed)}: continue with that, or choose another --name")
        with atomic_write(settings_path) as file:
            file.write(json.dumps(settings) + "\n")

    def add(self, record):
        """Count a line of one of the two files."""
        if "reason" in record:
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
            record.update(story=answer.text, reason=reason)
        print(json.dumps(record, ensure_ascii=False), file=rejected if reason else stories, flush=True)
        corpus.add(record)
        cost = dollars(args, **corpus.tokens)
        bar.set_postfix_str(f"{corpus.reasons.total():,} rejected, ${cost:,.2f}", refresh=False)
        return reason

    request = {"model": args.model, "temperature": args.temperature, "max_tokens": args.max_tokens}
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
    parser.option("temperature", 1.0, "of the model's sampling", low=0)
    parser.option("max_tokens", 1000, "limit of an answer; a story that reaches it is rejected", low=1)
    parser.option("dry_run", False, "only print three prompts, the coverage of the vocabulary and the expected cost")
    args = parse_server_args(parser, argv)
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
    settings = {name: getattr(args, name) for name in ("model", "seed", "naive", "level", "temperature", "max_tokens")}
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
                raise type(end)(f"{end}\n{missing:,} stories are missing: run the same command again to continue")
        finally:
            print(corpus.summary(args))
    if not corpus.done:
        sys.exit(f"no story was good: see {corpus.rejected}, then choose another --model and --name")
    print(f"next: python prepare.py --dataset={args.name}")


if __name__ == "__main__":
    run_main(main)

"""Have a large model write a corpus of stories, each from three random words and some random features.

Any server that speaks OpenAI's Chat Completions will do. Every answer is on disk as soon as it comes, in stories.jsonl
or rejected.jsonl under data/<name>/: a run may be stopped at any moment, and the same command continues it.
"""
import asyncio
import hashlib
import json
import math
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass

from tqdm import tqdm

from common import CommandLine, atomic_write, run_main
from prepare import fingerprint

MAX_REQUESTS = 2  # per story: if the answer is rejected, ask once more, then give up
MAX_REJECTED = 100  # stop after so many rejected answers in a row
MIN_WORDS = 60  # a shorter story has no plot
ANSWER_TOKENS = 350  # typical of an answer, for --dry_run: a story of about 300 and its summary
FEATURES = {  # the TinyStories paper's name of each feature, and how the prompt asks for it
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

    The set also has forms that nobody writes, such as walkked. They do no harm when a story is searched for a word."""
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
    """The requested words, [verb, noun, adjective, others], that a story does not have in any inflection.

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
# what to ask for, and what to make of an answer. Asked for "a story", even the best models tell the same few over and
# over. Three random words and some random features in each prompt make a corpus diverse (Eldan & Li 2023).


def plans(n, seed, lists):
    """Yield ([verb, noun, adjective], [0 to 3 features]) for n stories. No two stories get the same three words.

    The first n plans are the same for any larger n, so that a corpus can be extended."""
    rng = random.Random(seed)
    seen = set()
    for _ in range(n):
        words = tuple(map(rng.choice, lists))
        while lists and words in seen:
            words = tuple(map(rng.choice, lists))
        seen.add(words)
        yield list(words), rng.sample(list(FEATURES), rng.randint(0, 3)) if lists else []


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
# asking a server, and appending the answers to files of one JSON object a line: for this script and lab/judge.py


def parse_server_args(parser, argv):
    """Add the options of every command that asks a server, and parse the command line."""
    parser.option("model", "", "the model's name, as its server knows it, such as gpt-4o-mini")
    parser.option("base_url", "", "the server, if OPENAI_BASE_URL does not name it, e.g. http://localhost:8000/v1")
    parser.option("concurrency", 16, "requests under way at a time", low=1)
    parser.option("timeout", 120.0, "seconds to wait for an answer", low=0.1)
    parser.option("max_retries", 8, "times to try again, waiting longer each time, after an error that may pass", low=0)
    parser.option("price_in", 0.0, "dollars per million tokens of prompts", low=0)
    parser.option("price_out", 0.0, "dollars per million tokens of answers", low=0)
    parser.option("max_cost", math.inf, "stop before the cost can pass this many dollars", low=0)
    args = parser.parse_args(argv)
    if args.max_cost < math.inf and args.price_in + args.price_out == 0:
        parser.error("--max_cost needs the prices: --price_in and --price_out, in dollars per million tokens")
    return args


def dollars(args, tokens_in, tokens_out):
    return (tokens_in * args.price_in + tokens_out * args.price_out) / 1e6


def connect(args):
    """A client of the server at --base_url or OPENAI_BASE_URL, or of OpenAI if neither is given."""
    import openai
    server = args.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    if not re.match("https?://", server):
        sys.exit("--base_url and OPENAI_BASE_URL must begin with http:// or https://")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch(r"[!-~]+", key):  # other characters make the HTTP library print the key in its error
        sys.exit("OPENAI_API_KEY is not set to a key: export OPENAI_API_KEY=… (most local servers take any word); "
                 "python -m lab.world writes stories without one")

    async def stop_retries_without_quota(response):
        # an exhausted quota has the status of a rate limit, but waiting does not help
        if response.status_code == 429 and b"insufficient_quota" in await response.aread():
            response.headers["x-should-retry"] = "false"
    http_client = openai.DefaultAsyncHttpxClient(event_hooks={"response": [stop_retries_without_quota]})
    return openai.AsyncOpenAI(api_key=key, base_url=server, timeout=args.timeout, max_retries=args.max_retries,
                              http_client=http_client)


@dataclass
class Answer:
    usage: dict  # {"model", "tokens_in", "tokens_out"}
    text: str = ""
    finish: str = ""  # why it ends: "stop", "length", "content_filter", or "malformed" if it could not be read
    refusal: str = ""
    error: str = ""  # why no answer came, even after the client's retries
    fatal: bool = False  # whether the next request would fail in the same way


async def ask(client, request, prompt):
    """The Answer to one request. If the server does not report usage, a token is taken to be four characters."""
    import openai
    usage = {"model": request["model"], "tokens_in": len(prompt) // 4, "tokens_out": 0}
    try:
        reply = await client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **request)
        message = reply.choices[0].message
        text = (message.content or "").encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written
        usage = {"model": reply.model or request["model"],
                 "tokens_in": getattr(reply.usage, "prompt_tokens", None) or usage["tokens_in"],
                 "tokens_out": getattr(reply.usage, "completion_tokens", None) or len(text) // 4}
        return Answer(usage, text, reply.choices[0].finish_reason, message.refusal)
    except openai.APIError as error:
        if error.code == "content_filter":
            return Answer({**usage, "tokens_in": 0}, finish="content_filter")
        status = getattr(error, "status_code", 500)  # a broken connection has none
        fatal = error.code == "insufficient_quota" or (status < 500 and status not in (408, 409, 429))
        message = " ".join(f"a request failed at {client.base_url.netloc.decode()}: {error}".split())
        return Answer(usage, error=message.replace(client.api_key, "(key)")[:300], fatal=fatal)
    except (ValueError, TypeError, AttributeError, IndexError):  # not JSON; or JSON, but no answer
        return Answer(usage, finish="malformed")


class Asking:
    """Asks a server about many items, several at a time. `tokens` counts what all runs of a command have used."""

    def __init__(self, args, max_tokens, **request):
        self.args, self.max_tokens = args, max_tokens
        self.request = {"model": args.model, **request}
        self.tokens = Counter(tokens_in=0, tokens_out=0)  # a request under way counts with the most it can use

    def run(self, client, items, store, bar):
        """Ask about all items. Returns None if all were asked about. Else it returns (it does not raise) the exception
        for the caller to end with, whose text says why: KeyboardInterrupt after Ctrl-C, else SystemExit.

        items: yields (item, prompt, number of requests that may be made about the item).
        store(item, answer): writes an answer to a file; returns why it is rejected, or "" if it is good."""
        # newer models of OpenAI refuse the old name of this limit, and many other servers do not know the new one
        limit = "max_completion_tokens" if client.base_url.host == "api.openai.com" else "max_tokens"
        self.request[limit] = self.max_tokens
        self.client, self.items, self.store, self.bar = client, iter(items), store, bar
        self.failed = self.rejected = 0  # failed requests in a row, and rejected answers in a row
        self.outcome, self.stopping = None, False
        try:
            asyncio.run(self.run_workers())
        except KeyboardInterrupt:  # a second Ctrl-C
            self.outcome = KeyboardInterrupt("stopped by Ctrl-C, without the answers under way")
        bar.close()
        return self.outcome

    async def run_workers(self):
        """Let --concurrency workers take items from one iterator until it is empty, or until one of them says stop.

        The first Ctrl-C cancels this coroutine, but not the workers: they finish their request. The second one ends
        asyncio.run, and so drops the requests."""
        workers = [asyncio.create_task(self.work()) for _ in range(self.args.concurrency)]
        try:
            await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        except asyncio.CancelledError:  # the first Ctrl-C
            self.note(KeyboardInterrupt("stopped by Ctrl-C"))
            self.bar.write("waiting for the answers under way; Ctrl-C again drops them", file=sys.stderr)
        self.stopping = True  # if a worker raised an error, the others still finish the request they are at
        await asyncio.wait(workers)
        await self.client.close()
        await asyncio.gather(*workers)  # raises what a worker raised

    async def work(self):
        """Ask about one item after another; about the same item again if its answer is rejected."""
        for item, prompt, requests in self.items:
            for _ in range(requests):
                # a token of the prompt is at least one byte, and servers add some
                worst_case = {"tokens_in": len(prompt.encode()) + 50, "tokens_out": self.max_tokens}
                self.tokens.update(worst_case)
                if dollars(self.args, **self.tokens) > self.args.max_cost:
                    self.tokens.subtract(worst_case)
                    self.note(SystemExit(f"the next answer might pass --max_cost={self.args.max_cost:g}"))
                    return
                answer = await ask(self.client, self.request, prompt)
                self.tokens.subtract(worst_case)
                if self.is_done(item, answer) or self.stopping:
                    break
            self.bar.update()
            if self.stopping:
                return

    def is_done(self, item, answer):
        """Store an answer, and decide whether the item is done in this run: its answer is good, or the request failed
        and the item is left to the next run. A rejected answer is asked for again."""
        if answer.error:
            self.failed += 1
            self.note(SystemExit(answer.error), stop=answer.fatal or self.failed > self.args.concurrency)
            return True
        self.tokens.update(tokens_in=answer.usage["tokens_in"], tokens_out=answer.usage["tokens_out"])
        reason = self.store(item, answer)
        self.failed = 0
        self.rejected = self.rejected + 1 if reason else 0
        if self.rejected == MAX_REJECTED:
            self.note(SystemExit(f"the last {MAX_REJECTED} answers were all rejected, the last one for: {reason}"),
                      stop=True)
        return not reason

    def note(self, outcome, stop=False):
        """Note why items are left. With `stop`, no worker starts another request, and the reason stays as it is."""
        if not self.stopping:
            self.outcome, self.stopping = outcome, stop


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
    last = b"\n"
    with open(path, "a+b") as file:
        file.seek(0)
        for last in file:
            pass
        if not last.endswith(b"\n"):
            try:
                json.loads(last)
                file.write(b"\n")
            except ValueError:
                file.truncate(file.tell() - len(last))
    return open(path, "a", encoding="utf-8")


# -----------------------------------------------------------------------------------------------------------------
# the corpus, and the command line. A story's number decides what is asked for, so a run can be continued, or made
# longer, from its files alone.


def lock(path):
    """Lock a file for this process, or exit. The system unlocks it when the process ends, even if it is killed."""
    file = open(path, "a")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(f"another run is writing {os.path.dirname(path)}: wait until it ends, or choose another --name")
    return file


class Corpus:
    """The two files of a corpus: the good stories, and the rejected answers with the reason."""

    def __init__(self, folder):
        self.folder = folder
        self.stories = os.path.join(folder, "stories.jsonl")
        self.rejected = os.path.join(folder, "rejected.jsonl")
        self.done, self.fingerprints = set(), set()  # the good stories' numbers, and the fingerprints of their text
        self.rejections, self.reasons = Counter(), Counter()  # rejected answers by story number, and by reason
        self.tokens = Counter(tokens_in=0, tokens_out=0)

    def add(self, record):
        """Count a record that was read or written."""
        self.tokens.update(tokens_in=record["tokens_in"], tokens_out=record["tokens_out"])
        if "reason" in record:
            self.rejections[record["index"]] += 1
            self.reasons[record["reason"]] += 1
        else:
            self.done.add(record["index"])
            self.fingerprints.add(fingerprint(record["story"]))

    def read(self, settings):
        """Count what earlier runs have written. Exits if they had other settings."""
        path = os.path.join(self.folder, "generate.json")
        begun = next(read_lines(path), {})
        for records in (read_lines(self.stories), read_lines(self.rejected)):
            for record in records:
                if not begun:
                    sys.exit(f"{self.stories} was not written by generate.py: choose another --name")
                self.add(record)
        changed = [f"--{name}={begun.get(name)}, not {value}" for name, value in settings.items()
                   if begun.get(name) != value]
        if changed and (self.done or self.rejections):
            sys.exit(f"{self.folder} was begun with {'; '.join(changed)}: continue with that, or choose another --name")
        with atomic_write(path) as file:
            file.write(json.dumps(settings) + "\n")

    def requests_left(self, i):
        return 0 if i in self.done else MAX_REQUESTS - self.rejections[i]

    def missing(self, n):
        return sum(self.requests_left(i) > 0 for i in range(n))

    def write(self, args, lists, client, asking):
        """Ask for all missing stories, and append each answer to its file as it comes. Returns like Asking.run."""
        def items():
            for i, (words, features) in enumerate(plans(args.n, args.seed, lists)):
                if self.requests_left(i):
                    yield (i, words, features), prompt_for(args.level, words, features), self.requests_left(i)

        def store(item, answer):
            i, words, features = item
            story, summary = split_answer(answer.text)
            reason = why_rejected(story, answer, words, self.fingerprints)
            record = {"story": story, "words": words, "features": features, "summary": summary, "index": i}
            record.update(answer.usage)
            if reason:
                record.update(story=answer.text, reason=reason)
            print(json.dumps(record, ensure_ascii=False), file=rejected if reason else stories, flush=True)
            self.add(record)
            cost = dollars(args, **self.tokens)
            bar.set_postfix_str(f"{self.reasons.total():,} rejected, ${cost:,.2f}", refresh=False)
            return reason

        bar = tqdm(total=args.n, initial=args.n - self.missing(args.n), unit=" stories", smoothing=0.05, disable=None)
        with open_to_append(self.stories) as stories, open_to_append(self.rejected) as rejected:
            return asking.run(client, items(), store, bar)

    def summary(self, args):
        given_up = sum(count >= MAX_REQUESTS for count in self.rejections.values())
        rejected = f"{self.reasons.total():,} answers rejected"
        if self.reasons:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())
            rejected += f" ({reasons}; see {self.rejected})"
        return (f"{self.stories}: {len(self.done):,} stories, {given_up:,} given up; {rejected}; "
                f"{self.tokens['tokens_in']:,} tokens in, {self.tokens['tokens_out']:,} out, "
                f"${dollars(args, **self.tokens):,.2f}")


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
    lists = [] if args.naive else load_words(args.words)
    triples = math.prod(map(len, lists))
    if lists and args.n > triples:
        parser.error(f"{args.words} makes only {triples:,} triples of words: lower --n, or give it more words")
    if not args.model and not args.dry_run:
        parser.error("which model? --model=gpt-4o-mini for one")
    return args, lists


def dry_run(args, lists):
    """Print three prompts, the share of all triples of words that will be used, and the expected cost."""
    prompts = [prompt_for(args.level, *plan) for plan in plans(min(args.n, 1000), args.seed, lists)]
    print(*prompts[:3], sep="\n\n", end="\n\n")
    if lists:
        triples = math.prod(map(len, lists))
        print(f"coverage: {args.n:,} of {triples:,} triples of words, one in {triples / args.n:,.0f}")
    tokens_in = args.n * sum(map(len, prompts)) // len(prompts) // 4
    tokens_out = args.n * ANSWER_TOKENS
    print(f"about {tokens_in:,} tokens in, {tokens_out:,} out: ${dollars(args, tokens_in, tokens_out):,.2f} "
          f"at --price_in={args.price_in:g} and --price_out={args.price_out:g} dollars per million")


def main(argv=None):
    args, lists = parse_args(argv)
    if args.dry_run:
        return dry_run(args, lists)
    client = connect(args)
    asking = Asking(args, args.max_tokens, temperature=args.temperature)
    settings = {name: getattr(args, name) for name in ("model", "seed", "naive", "level", "temperature", "max_tokens")}
    settings["words"] = f"{os.path.basename(args.words)} ({hashlib.sha256(repr(lists).encode()).hexdigest()[:8]})"
    corpus = Corpus(os.path.join("data", args.name))
    os.makedirs(corpus.folder, exist_ok=True)
    with lock(os.path.join(corpus.folder, "generate.lock")):
        corpus.read(settings)
        asking.tokens.update(corpus.tokens)
        try:
            end = corpus.write(args, lists, client, asking)
        except OSError as error:
            end = SystemExit(f"cannot write in {corpus.folder}: {error.strerror}")
    print(corpus.summary(args))
    if missing := corpus.missing(args.n):
        raise type(end)(f"{end}\n{missing:,} stories are missing: run the same command again to continue")
    if not corpus.done:
        sys.exit(f"no story was good: see {corpus.rejected}, then choose another --model and --name")
    print(f"next: python prepare.py --dataset={args.name}")


if __name__ == "__main__":
    run_main(main)

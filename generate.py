"""Have a large model write a corpus: one story a call, each from three random words and some random features.

Any server that speaks OpenAI's Chat Completions will do. Everything paid for is on disk at once, in
data/<name>/stories.jsonl and rejected.jsonl, so that a run may be stopped at any moment and started again.
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

import openai
from tqdm import tqdm

from prepare import QUOTES, Parser, fingerprint, start

ASKS = 2                # a rejected story is asked for once more, then given up
MIN_WORDS = 60          # a shorter story has no plot
MAX_IN_A_ROW = 100      # so many rejected answers, and something is wrong that more money will not mend
TOKENS_OUT = 350        # expected in an answer, for --dry_run: a story of about 300 and its summary

FEATURES = {            # each as the paper names it, and as the prompt asks for it
    "dialogue": "people or animals talk to each other",
    "bad ending": "it all ends badly",
    "moral value": "somebody learns how one should treat others",
    "foreshadowing": "a small thing near the beginning turns out to matter near the end",
    "plot twist": "something happens that nobody could have guessed",
    "conflict": "two characters want different things and struggle over it",
}
WORDS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "words.json")
with open(WORDS, encoding="utf-8") as file:
    INFLECTED = json.load(file)["forms"]["inflected"]       # past tenses, plurals, comparatives that no rule gives

# ---------------------------------------------------------------------------------------------------------------
# what to ask for: a function of (seed, i), so that a run can be continued, or made longer, without any memory

def load_words(path):
    """Three sorted lists of distinct words (verbs, nouns, adjectives) from a file of {kind: {group: [words]}}."""
    try:
        with open(path, encoding="utf-8") as file:
            words = json.load(file)
        return [sorted({word for group in words[kind].values() for word in group})
                for kind in ("verbs", "nouns", "adjectives")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit(f'{path} is not {{"verbs": {{"group": ["word", …]}}, "nouns": …, "adjectives": …}}: {error}')


def plans(n, seed, lists):
    """Yield n stories' [verb, noun, adjective], never the same three twice, and list of 0 to 3 features.

    The first of a larger n are the same, so that a corpus can be extended."""
    rng, seen = random.Random(seed), {()}
    for _ in range(n):
        words = ()
        while lists and words in seen:
            words = tuple(map(rng.choice, lists))
        seen.add(words)
        yield list(words), rng.sample(list(FEATURES), rng.randint(0, 3)) if lists else []


def prompt_for(level, words, features):
    """The prompt of one story. It asks for text with one marked line, which weak models manage better than JSON."""
    lines = [f"Write a short story of three to five paragraphs. Use only words that every {level} knows."]
    if words:
        lines += ['Use the verb "{}", the noun "{}" and the adjective "{}", each where it fits.'.format(*words)]
    if features:
        lines += ["In this story, " + ", and ".join(FEATURES[feature] for feature in features) + "."]
    lines += [f"Keep words and sentences so simple that no {level} has to ask what anything means.",
              'Begin with the first sentence, without a title. After the story, on a new line, write "Summary:" and '
              "one sentence that says what happens."]
    return "\n".join(lines)

# ---------------------------------------------------------------------------------------------------------------
# what came back

def forms(word, endings):
    """The word and its inflections: stop, stops, stopped, stopping (and some that nobody writes, like stoped)."""
    # walk-ed, stopp-ed, bak-ing, cri-ed, leav-es
    stems = word, word + word[-1], re.sub("e$", "", word), re.sub("y$", "i", word), re.sub("fe?$", "v", word)
    return {word, word + "s", re.sub("man$", "men", word), *INFLECTED.get(word, []),
            *(stem + ending for stem in stems for ending in endings)}


def missing(words, story):
    """Those of [verb, noun, adjective, any, …] that the story has in no inflection; all of a compound must be there."""
    found = set(re.findall(r"[^\W\d_]+", story.lower()))
    kinds = [("es", "ed", "ing"), ("es",), ("er", "est", "ly", "y")]
    kinds += [sum(kinds, ())] * (len(words) - 3)
    return [word for word, endings in zip(words, kinds)
            if any(found.isdisjoint(forms(part, endings)) for part in re.findall(r"[^\W\d_]+", word.lower()))]


def parse(text):
    """(story, summary) of an answer, without what models put around them: thoughts, headings, bold, "Story:"."""
    text = re.sub(r"(?s)\A.*</think>", "", text).replace("\r\n", "\n").strip()
    story, *rest = re.split(r"(?im)^[\W_]*summary[\W_]*:[\W_]*", text)
    heading = r"\s*(?:#.*|\*\*[^*\n]*\*\*:?|title:.*|(?:sure|here|certainly|of course)\b.*:)\s*(?:\n|\Z)"
    story = re.sub(rf"(?i)\A(?:{heading})*(?:\W*story\W*:\W*\n?)?", "", story)
    return story.strip("*-_ \n"), " ".join(rest[0].split()).strip("*_ ") if rest else ""


def reason_against(story, finish, refusal, words, seen):
    """Why a story is rejected, or "" where it is good. `seen` holds the fingerprints of the stories so far."""
    if refusal or finish == "content_filter" or re.match(
            r"(?i)(i'm|i am|we're) (so |very )?sorry,? (but )?(i|we)\b|(sorry, )?(but )?i (can't|cannot|won't) "
            r"(help|write|create|fulfil|assist|comply|do|provide)|as an ai\b", story.translate(QUOTES)):
        return "refused"
    if not story:
        return "malformed" if finish == "malformed" else "empty"
    if finish == "length" or not re.search(r"(?i)([.!?…]|the end)\W*\Z", story):
        return "cut off"
    if len(story.split()) < MIN_WORDS:
        return "too short"
    if missing(words, story):
        return "word missing"
    return "copy" if fingerprint(story) in seen else ""

# ---------------------------------------------------------------------------------------------------------------
# the files, and the server

def lock(path):
    """Open `path` and hold it for this process, or exit. The system lets go when the process ends, even if killed."""
    file = open(path, "a")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(f"another run is writing {os.path.dirname(path)}: let it finish, or choose another --name")
    return file


def records(path):
    """Yield the objects of a JSONL file that may not exist; a last line that was only half written is cut off."""
    with open(path, "a+b") as file:
        file.seek(0)
        for number, line in enumerate(iter(file.readline, b""), 1):
            try:
                yield json.loads(line)
            except ValueError:
                if line.endswith(b"\n"):
                    sys.exit(f"{path}, line {number} is not JSON: mend or delete that line")
                file.truncate(file.tell() - len(line))
                return
            if not line.endswith(b"\n"):
                file.write(b"\n")


class Ledger:
    """What the two files hold, and what it cost: `add` takes each line that was read or written."""

    def __init__(self, args):
        self.prices = args.price_in, args.price_out             # dollars per million tokens
        self.done, self.seen = set(), set()                     # i of the stories, and their fingerprints
        self.asked, self.rejects = Counter(), Counter()         # rejected answers: per i, per reason
        self.tokens_in = self.tokens_out = 0

    def add(self, record):
        self.tokens_in += record["tokens_in"]
        self.tokens_out += record["tokens_out"]
        if "reason" in record:
            self.asked[record["index"]] += 1
            self.rejects[record["reason"]] += 1
        else:
            self.done.add(record["index"])
            self.seen.add(fingerprint(record["story"]))

    def cost(self, more_in=0, more_out=0):
        return ((self.tokens_in + more_in) * self.prices[0] + (self.tokens_out + more_out) * self.prices[1]) / 1e6

    def wants(self, i):
        return i not in self.done and self.asked[i] < ASKS


async def no_retry_without_quota(response):
    """An exhausted quota comes as a rate limit, but waiting does not help: tell the client so, in its own words."""
    if response.status_code == 429 and b"insufficient_quota" in await response.aread():
        response.headers["x-should-retry"] = "false"


def connect(base_url, timeout=120.0, max_retries=8):
    """(client, what its server calls the limit of an answer); base_url "" is OPENAI_BASE_URL's server, else OpenAI."""
    server = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    if not re.match("https?://", server):
        sys.exit("--base_url and OPENAI_BASE_URL must begin with http:// or https://")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        sys.exit("OPENAI_API_KEY is not set: export OPENAI_API_KEY=… (most local servers take any word); without a key "
                 "python world.py writes stories, and python eval.py without --judge grades")
    if not re.fullmatch(r"[!-~]+", key):        # httpx would print the whole of it in its complaint
        sys.exit("OPENAI_API_KEY has characters that no key has: was it copied whole?")
    client = openai.AsyncOpenAI(
        api_key=key, base_url=server, timeout=timeout, max_retries=max_retries,
        http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [no_retry_without_quota]}))
    # OpenAI's newer models refuse the limit's old name; many other servers do not know its new one
    return client, "max_completion_tokens" if client.base_url.host == "api.openai.com" else "max_tokens"


async def ask(client, request, prompt):
    """One call: text, why it stopped, refusal, {"model", "tokens_in", "tokens_out"}. Tokens not told are estimated.

    Raises openai.APIError where no answer came, after the client's own retries.
    """
    used = {"model": request["model"], "tokens_in": len(prompt) // 4, "tokens_out": 0}
    try:
        reply = await client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **request)
        message, finish, usage = reply.choices[0].message, reply.choices[0].finish_reason, reply.usage
        text = (message.content or "").encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written
    except openai.BadRequestError as error:
        if error.code != "content_filter":
            raise
        return "", "content_filter", None, {**used, "tokens_in": 0}
    except (ValueError, TypeError, AttributeError, IndexError):             # not JSON; or JSON, but no answer
        return "", "malformed", None, used
    used = {"model": reply.model or request["model"],
            "tokens_in": getattr(usage, "prompt_tokens", None) or used["tokens_in"],
            "tokens_out": getattr(usage, "completion_tokens", None) or len(text) // 4}
    return text, finish, message.refusal, used


async def write(args, client, limit, lists, ledger, stories, rejected):
    """Ask for every missing story, args.concurrency at a time; append each answer to its file as it comes.

    Returns why stories are still missing, or "".
    """
    host = client.base_url.netloc.decode()
    request = {"model": args.model, "temperature": args.temperature, limit: args.max_tokens}
    finished = args.n - sum(map(ledger.wants, range(args.n)))
    bar = tqdm(total=args.n, initial=finished, unit=" stories", smoothing=0.05, disable=None)
    stop, trouble, failures, rejects = "", "", 0, 0     # the last two: in a row, of requests and of answers
    # shared by all workers: what is next, and tokens asked with
    waiting = ((i, *plan) for i, plan in enumerate(plans(args.n, args.seed, lists)) if ledger.wants(i))
    under_way = {}

    async def work():
        nonlocal stop, trouble, failures, rejects
        for i, words, features in waiting:
            prompt = prompt_for(args.level, words, features)
            while ledger.wants(i) and not stop:
                under_way[i] = len(prompt.encode()) + 50        # a token is at least one byte; servers add some
                try:
                    if ledger.cost(sum(under_way.values()), len(under_way) * args.max_tokens) > args.max_cost:
                        trouble = f"the next story might pass --max_cost={args.max_cost:g}"
                        return
                    text, finish, refusal, used = await ask(client, request, prompt)
                    failures = 0
                except openai.APIError as error:        # the client has tried again, in vain
                    failures += 1
                    trouble = f"a request failed at {host}: {error}".replace(client.api_key, "(key)")
                    trouble = " ".join(trouble.split())[:300]
                    status = getattr(error, "status_code", 500)
                    if (error.code == "insufficient_quota" or status < 500 and status not in (408, 409, 429)
                            or failures > args.concurrency):
                        stop = trouble
                    break                               # story i is left to the next run
                finally:
                    del under_way[i]
                story, summary = parse(text)
                reason = reason_against(story, finish, refusal, words, ledger.seen)
                record = {"story": story, "words": words, "features": features, "summary": summary, "index": i, **used}
                record |= {"story": text, "reason": reason} if reason else {}
                file = rejected if reason else stories
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                ledger.add(record)
                rejects = rejects + 1 if reason else 0
                if rejects == MAX_IN_A_ROW:
                    stop = f"the last {rejects} answers were all rejected, at last for: {reason} (see {rejected.name})"
                bar.set_postfix_str(f"{ledger.rejects.total()} rejected, ${ledger.cost():.2f}", refresh=False)
                bar.update(not ledger.wants(i))
            if stop:
                return

    workers = [asyncio.create_task(work()) for _ in range(args.concurrency)]
    try:
        await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        waiting.close()                 # where a worker broke, the others only finish what they have
    except asyncio.CancelledError:      # Ctrl-C; a second one ends the process
        stop = "stopped by Ctrl-C"
        bar.write("waiting for the answers under way; Ctrl-C again drops them", file=sys.stderr)
    await asyncio.wait(workers)
    await asyncio.gather(*workers)      # raises what a worker raised
    bar.close()
    await client.close()
    return stop or trouble

# ---------------------------------------------------------------------------------------------------------------
# the command line

def main(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    parser.option("name", "mystories", "the corpus: a folder under data/")
    parser.option("n", 1000, "number of stories")
    parser.option("model", "", "the model's name, as its server knows it")
    parser.option("base_url", "", "the server, where OPENAI_BASE_URL does not say it, e.g. http://localhost:8000/v1")
    parser.option("seed", 1, "chooses the words and features of every story")
    parser.option("naive", False, "ask for a story and nothing else, to see how alike they are")
    parser.option("level", "3-year-old", "who has to understand the stories")
    parser.option("words", WORDS, "vocabulary file")
    parser.option("temperature", 1.0, "of the model's sampling")
    parser.option("max_tokens", 1000, "limit of an answer; a story that reaches it is rejected")
    parser.option("concurrency", 16, "requests under way at a time")
    parser.option("timeout", 120.0, "seconds to wait for an answer")
    parser.option("max_retries", 8, "times to try again, waiting longer each time, after an error that may pass")
    parser.option("price_in", 0.0, "dollars per million tokens of prompts")
    parser.option("price_out", 0.0, "dollars per million tokens of answers")
    parser.option("max_cost", math.inf, "stop before the corpus has cost more dollars than this")
    parser.option("dry_run", False, "ask nothing: print three prompts, the coverage and the cost to expect")
    args = parser.parse_args(argv)
    lists = [] if args.naive else load_words(args.words)
    triples, ledger = math.prod(map(len, lists)), Ledger(args)
    if min(args.n, args.max_tokens, args.concurrency, args.timeout) <= 0 or min(args.max_retries, args.price_in,
                                                                                args.price_out) < 0:
        parser.error("numbers must be above 0 (--max_retries and the prices may be 0)")
    if args.max_cost < math.inf and not args.price_in + args.price_out:
        parser.error("--max_cost needs the prices: --price_in and --price_out, in dollars per million tokens")
    if lists and args.n > triples:
        parser.error(f"{args.words} makes only {triples:,} triples of words: lower --n, or give it more words")
    if args.dry_run:
        prompts = [prompt_for(args.level, *plan) for plan in plans(min(args.n, 1000), args.seed, lists)]
        tokens_in, tokens_out = args.n * sum(map(len, prompts)) // len(prompts) // 4, args.n * TOKENS_OUT
        print(*prompts[:3], sep="\n\n", end="\n\n")
        print(f"coverage: one story in {triples / args.n:,.0f} of {triples:,} triples of words" if lists else
              "coverage: none, every story has the same prompt")
        return print(f"about {tokens_in:,} tokens in, {tokens_out:,} out:",
                     f"${ledger.cost(tokens_in, tokens_out):,.2f}" if args.price_in + args.price_out else
                     "for the cost give --price_in and --price_out")
    if not args.model:
        parser.error("which model? --model=gpt-4o-mini for one")
    client, limit = connect(args.base_url, args.timeout, args.max_retries)

    folder = os.path.join("data", args.name)
    stories_path, rejected_path, settings_path, lock_path = [os.path.join(folder, name) for name in (
        "stories.jsonl", "rejected.jsonl", "generate.json", "generate.lock")]
    settings = {name: getattr(args, name)
                for name in ("model", "seed", "naive", "level", "temperature", "max_tokens")}
    settings["words"] = f"{os.path.basename(args.words)} ({hashlib.sha256(repr(lists).encode()).hexdigest()[:8]})"
    os.makedirs(folder, exist_ok=True)
    with lock(lock_path):
        begun = next(records(settings_path), {})
        for record in (record for path in (stories_path, rejected_path) for record in records(path)):
            if not begun:
                sys.exit(f"{stories_path} was not written by generate.py: choose another --name")
            ledger.add(record)
        changed = [f"--{name}={begun.get(name)}, not {value}" for name, value in settings.items()
                   if (ledger.done or ledger.asked) and begun.get(name) != value]
        if changed:
            sys.exit(f"{folder} was begun with {'; '.join(changed)}: go on with that, or choose another --name")
        if begun != settings:
            with open(settings_path, "w", encoding="utf-8") as file:
                file.write(json.dumps(settings) + "\n")
        try:
            with (open(stories_path, "a", encoding="utf-8") as stories,
                  open(rejected_path, "a", encoding="utf-8") as rejected):
                why = asyncio.run(write(args, client, limit, lists, ledger, stories, rejected))
        except KeyboardInterrupt:
            why = "stopped by Ctrl-C, without the answers under way"
        except OSError as error:
            why = f"cannot write in {folder}: {error.strerror}"

    reasons = ", ".join(f"{count:,} {reason}" for reason, count in ledger.rejects.most_common())
    print(f"{stories_path}: {len(ledger.done):,} stories, {sum(n >= ASKS for n in ledger.asked.values()):,} given up; "
          f"{ledger.rejects.total():,} answers rejected{reasons and f' ({reasons}; see {rejected_path})'}; "
          f"{ledger.tokens_in:,} tokens in, {ledger.tokens_out:,} out, ${ledger.cost():,.2f}")
    if left := sum(map(ledger.wants, range(args.n))):
        why += f"\n{left:,} stories are missing: the same command goes on"
        raise KeyboardInterrupt(why) if why.startswith("stopped by Ctrl-C") else SystemExit(why)
    if not ledger.done:
        sys.exit(f"not one story was good: read {rejected_path}, and choose another --model and --name")
    print(f"next: python prepare.py --dataset={args.name}")


if __name__ == "__main__":
    start(main)

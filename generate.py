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
from collections import Counter, deque
from dataclasses import dataclass, field

import openai
from tqdm import tqdm

from prepare import QUOTES, Parser, fingerprint

ASKS = 2                # a rejected story is asked for once more, then given up
MIN_WORDS = 60          # a shorter story has no plot
MAX_IN_A_ROW = 100      # so many rejected answers, and something is wrong that more money will not mend
TOKENS_OUT = 350        # expected in an answer, for --dry_run: a story of about 300 and its summary

FEATURES = {            # each as the paper names it, and as the prompt asks for it
    "dialogue": "people or animals in it talk to each other",
    "bad ending": "it ends badly",
    "moral value": "it shows that some ways to behave are better than others",
    "foreshadowing": "a small thing near the beginning turns out to matter near the end",
    "plot twist": "something happens that nobody could have guessed",
    "conflict": "two characters want different things and struggle over it",
}

# ---------------------------------------------------------------------------------------------------------------
# what to ask for: a function of (seed, i), so that a run can be continued, or made longer, without any memory

def load_words(path):
    """Three sorted lists of distinct words (verbs, nouns, adjectives) from a file of {kind: {group: [words]}}."""
    try:
        with open(path, encoding="utf-8") as file:
            words = json.load(file)
        lists = [sorted({word for group in words[kind].values() for word in group})
                 for kind in ("verbs", "nouns", "adjectives")]
    except OSError as error:
        sys.exit(f"cannot read {path}: {error.strerror}: name a vocabulary with --words=…")
    except (ValueError, KeyError, TypeError, AttributeError):
        lists = [[]]
    if not all(lists):
        sys.exit(f'{path} is not of the form {{"verbs": {{"group": ["word", …]}}, "nouns": …, "adjectives": …}}')
    return lists


def shuffled(i, size, seed):
    """Where i stands in a random order of range(size), found without making the order: a bijection for every seed.

    A Feistel network permutes the next power of four; what falls outside the range goes through it again.
    """
    half = (size - 1).bit_length() + 1 >> 1
    while True:
        left, right = i >> half, i & (1 << half) - 1
        for turn in range(4):
            digest = hashlib.blake2b(f"{seed} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(digest, "little") & (1 << half) - 1
        i = left << half | right
        if i < size:
            return i


def plan(i, seed, lists):
    """Story i's [verb, noun, adjective], never the same three twice, and its list of 0 to 3 features."""
    if not lists:
        return [], []
    verbs, nouns, adjectives = lists
    place, adjective = divmod(shuffled(i, len(verbs) * len(nouns) * len(adjectives), seed), len(adjectives))
    verb, noun = divmod(place, len(nouns))
    rng = random.Random(f"{seed} {i}")
    return [verbs[verb], nouns[noun], adjectives[adjective]], rng.sample(list(FEATURES), rng.randint(0, 3))


def prompt_for(level, words, features):
    """The prompt of one story. It asks for text with one marked line, which weak models manage better than JSON."""
    lines = [f"Write a short story, three to five paragraphs long, in words that a typical {level} knows and uses."]
    if words:
        lines += ['Somewhere in it, where they fit without effort, use the verb "{}", the noun "{}" and '
                  'the adjective "{}".'.format(*words)]
    if features:
        lines += ["Also: " + "; ".join(FEATURES[feature] for feature in features) + "."]
    lines += [f"If a {level} would have to ask what a word means, choose an easier one.",
              'Begin with the story itself, without a title. After it, on a line of its own, write "Summary:" '
              "and one sentence that says what happened."]
    return "\n".join(lines)

# ---------------------------------------------------------------------------------------------------------------
# what came back

# past tenses, plurals and comparatives that no rule gives
IRREGULAR = {line.split()[0]: line.split()[1:] for line in re.split(r"[|\n]", """\
be is are am was were been|become became|begin began begun|bend bent|bite bit bitten|blow blew blown
break broke broken|bring brought|build built|buy bought|catch caught|choose chose chosen|come came|creep crept
die dying|dig dug|dive dove|do does did done|draw drew drawn|dream dreamt|drink drank drunk|drive drove driven
eat ate eaten|fall fell fallen|feed fed|feel felt|fight fought|find found|fly flew flown|forget forgot forgotten
forgive forgave forgiven|freeze froze frozen|get got gotten|give gave given|go went gone|grow grew grown|hang hung
have has had|hear heard|hide hid hidden|hold held|keep kept|kneel knelt|know knew known|lay laid|lead led|leap leapt
learn learnt|leave left|lend lent|lie lay lain lying|light lit|lose lost|make made|mean meant|meet met|pay paid
ride rode ridden|ring rang rung|rise rose risen|run ran|say said|see saw seen|sell sold|send sent|sew sewn
shake shook shaken|shine shone|shoot shot|show shown|shrink shrank shrunk|sing sang sung|sink sank sunk|sit sat
sleep slept|slide slid|smell smelt|sneak snuck|speak spoke spoken|spell spelt|spend spent|spill spilt|spin spun
spring sprang sprung|stand stood|steal stole stolen|stick stuck|sting stung|stink stank stunk|sweep swept
swim swam swum|swing swung|take took taken|teach taught|tear tore torn|tell told|think thought|throw threw thrown
tie tying|understand understood|untie untying|wake woke woken|wear wore worn|weave wove woven|win won|wind wound
write wrote written|child children|foot feet|goose geese|mouse mice|person people|tooth teeth|bad worse worst
far farther further|good better best|little less least|many more most""")}


def forms(word, endings):
    """The word and its inflections: stop, stops, stopped, stopping (and some that nobody writes, like stoped)."""
    # walk-ed, stopp-ed, bak-ing, cri-ed, leav-es
    stems = word, word + word[-1], re.sub("e$", "", word), re.sub("y$", "i", word), re.sub("fe?$", "v", word)
    return {word, word + "s", re.sub("man$", "men", word), *IRREGULAR.get(word, []),
            *(stem + ending for stem in stems for ending in endings)}


def missing(words, story):
    """Those of [verb, noun, adjective] that the story uses in no inflection; all of a compound must stand in it."""
    found = set(re.findall(r"[^\W\d_]+", story.lower()))
    kinds = zip(words, (("es", "ed", "ing"), ("es",), ("er", "est", "ly", "y")))
    return [word for word, endings in kinds
            if any(found.isdisjoint(forms(part, endings)) for part in re.findall(r"[^\W\d_]+", word.lower()))]


def parse(text):
    """(story, summary) of an answer, without what models put around them: thoughts, headings, bold, "Story:"."""
    text = re.sub(r"(?s)\A.*</think>", "", text).strip()
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


async def no_retry_without_quota(response):
    """An exhausted quota comes as a rate limit, but waiting does not help: tell the client so, in its own words."""
    if response.status_code == 429 and b"insufficient_quota" in await response.aread():
        response.headers["x-should-retry"] = "false"


async def ask(client, request, prompt):
    """One call: (text, reason it stopped, refusal, model, tokens in, tokens out). Tokens not told are estimated.

    Raises openai.APIError where no answer came, after the client's own retries.
    """
    try:
        reply = await client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **request)
    except openai.BadRequestError as error:
        if error.code != "content_filter":
            raise
        return "", "content_filter", None, request["model"], 0, 0
    except ValueError:                  # not JSON
        reply = None
    try:
        choice, usage = reply.choices[0], reply.usage
        text, finish, refusal = choice.message.content or "", choice.finish_reason, choice.message.refusal
        text = text.encode("utf-8", "replace").decode()         # half a surrogate pair cannot be written
    except (TypeError, AttributeError, IndexError):             # JSON, but no answer
        return "", "malformed", None, request["model"], len(prompt) // 4, 0
    return (text, finish, refusal, reply.model or request["model"],
            getattr(usage, "prompt_tokens", None) or len(prompt) // 4,
            getattr(usage, "completion_tokens", None) or len(text) // 4)


def cost(args, tokens_in, tokens_out):
    """Dollars, at prices per million tokens."""
    return (tokens_in * args.price_in + tokens_out * args.price_out) / 1e6


@dataclass
class Ledger:
    """What the two files hold: filled from them at the start, then by the same `add` with each line written."""
    done: set = field(default_factory=set)              # i of the stories
    seen: set = field(default_factory=set)              # their fingerprints
    asked: Counter = field(default_factory=Counter)     # rejected answers per i
    rejects: Counter = field(default_factory=Counter)   # rejected answers per reason
    tokens_in: int = 0
    tokens_out: int = 0

    def add(self, record):
        self.tokens_in += record["tokens_in"]
        self.tokens_out += record["tokens_out"]
        if "reason" in record:
            self.asked[record["index"]] += 1
            self.rejects[record["reason"]] += 1
        else:
            self.done.add(record["index"])
            self.seen.add(fingerprint(record["story"]))

    def missing(self, n):
        return [i for i in range(n) if i not in self.done and self.asked[i] < ASKS]


async def write(args, key, lists, ledger, stories, rejected):
    """Ask for every missing story, args.concurrency at a time; append each answer to its file as it comes.

    Returns why stories are still missing, or "".
    """
    client = openai.AsyncOpenAI(
        api_key=key, base_url=args.base_url or None, timeout=args.timeout, max_retries=args.max_retries,
        http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [no_retry_without_quota]}))
    host = client.base_url.netloc.decode()
    # OpenAI's newer models refuse the limit's old name; many other servers do not know its new one
    limit = "max_completion_tokens" if host == "api.openai.com" else "max_tokens"
    request = {"model": args.model, "temperature": args.temperature, limit: args.max_tokens}
    todo = deque(ledger.missing(args.n))
    bar = tqdm(total=args.n, initial=args.n - len(todo), unit=" stories", smoothing=0.05, disable=None)
    why, trouble, failures, rejects = "", "", 0, 0      # the last two: in a row, of requests and of answers
    reserved = {}                                       # the most that each answer under way may cost

    async def work():
        nonlocal why, trouble, failures, rejects
        while todo and not why:
            i = todo.popleft()
            words, features = plan(i, args.seed, lists)
            prompt = prompt_for(args.level, words, features)
            # a token is at least one byte; 50 are for what the server wraps around the prompt
            most = cost(args, len(prompt.encode()) + 50, args.max_tokens)
            if cost(args, ledger.tokens_in, ledger.tokens_out) + sum(reserved.values()) + most > args.max_cost:
                todo.appendleft(i)      # for a worker whose answer, still under way, turns out to cost less
                why = why if reserved else f"the next story might pass --max_cost={args.max_cost:g}"
                return
            reserved[i] = most
            try:
                text, finish, refusal, model, tokens_in, tokens_out = await ask(client, request, prompt)
                failures = 0
            except openai.APIError as error:            # the client has tried again, in vain
                failures += 1
                trouble = " ".join(f"{host}: {error}".replace(key, "(key)").split())[:300]
                status = getattr(error, "status_code", 500)
                if error.code == "insufficient_quota" or status < 500 and status not in (408, 409, 429):
                    why = f"the request was refused by {trouble}"
                elif failures > args.concurrency:
                    why = f"{failures} requests in a row failed, the last with: {trouble}"
                continue                                # story i is left to the next run
            finally:
                del reserved[i]
            story, summary = parse(text)
            reason = reason_against(story, finish, refusal, words, ledger.seen)
            record = {"story": story, "words": words, "features": features, "summary": summary, "model": model,
                      "index": i, "tokens_in": tokens_in, "tokens_out": tokens_out}
            record |= {"story": text, "reason": reason} if reason else {}
            file = rejected if reason else stories
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            ledger.add(record)
            rejects = rejects + 1 if reason else 0
            if rejects == MAX_IN_A_ROW:
                why = f"the last {rejects} answers were all rejected, at last for: {reason} (see {rejected.name})"
            bar.set_postfix_str(f"{ledger.rejects.total()} rejected, "
                                f"${cost(args, ledger.tokens_in, ledger.tokens_out):.2f}", refresh=False)
            if reason and ledger.asked[i] < ASKS:
                todo.appendleft(i)
            else:
                bar.update()

    workers = [asyncio.create_task(work()) for _ in range(args.concurrency)]
    try:
        await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        todo.clear()                    # where a worker broke, the others only finish what they have
    except asyncio.CancelledError:      # Ctrl-C; a second one ends the process
        why = "stopped by Ctrl-C"
        bar.write("waiting for the answers under way; Ctrl-C again drops them", file=sys.stderr)
    await asyncio.wait(workers)
    await asyncio.gather(*workers)      # raises what a worker raised
    bar.close()
    await client.close()
    return why or trouble and f"some requests failed, the last with: {trouble}"


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    parser.option("name", "mystories", "the corpus: a folder under data/")
    parser.option("n", 1000, "number of stories")
    parser.option("model", "", "the model's name, as its server knows it")
    parser.option("base_url", "", "the server, where OPENAI_BASE_URL does not say it, e.g. http://localhost:8000/v1")
    parser.option("seed", 1, "chooses the words and features of every story")
    parser.option("naive", False, "ask for a story and nothing else, to see how alike they are")
    parser.option("level", "3-year-old", "who has to understand the stories")
    parser.option("words", os.path.join(os.path.dirname(__file__), "data", "words.json"), "vocabulary file")
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
    if min(args.n, args.max_tokens, args.concurrency, args.timeout) <= 0 or min(args.max_retries, args.price_in,
                                                                                args.price_out) < 0:
        parser.error("numbers must be above 0 (--max_retries and the prices may be 0)")
    if args.max_cost < math.inf and not args.price_in + args.price_out:
        parser.error("--max_cost needs the prices: --price_in and --price_out, in dollars per million tokens")

    lists = [] if args.naive else load_words(args.words)
    triples = math.prod(map(len, lists))
    if lists and args.n > triples:
        sys.exit(f"{args.words} makes only {triples:,} triples of words: lower --n, or give it more words")
    if args.dry_run:
        prompts = [prompt_for(args.level, *plan(i, args.seed, lists)) for i in range(min(args.n, 1000))]
        print(*prompts[:3], sep="\n\n", end="\n\n")
        print(f"coverage: one story in {triples / args.n:,.0f} of {triples:,} triples of words" if lists else
              "coverage: none, every story has the same prompt")
        tokens_in, tokens_out = args.n * sum(map(len, prompts)) // len(prompts) // 4, args.n * TOKENS_OUT
        print(f"about {tokens_in:,} tokens in, {tokens_out:,} out:", f"${cost(args, tokens_in, tokens_out):,.2f}"
              if args.price_in + args.price_out else "for the cost give --price_in and --price_out")
        return

    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        sys.exit("OPENAI_API_KEY is not set: export OPENAI_API_KEY=… (most local servers take any word), "
                 "or make stories without a key: python world.py")
    if not re.fullmatch(r"[!-~]+", key):        # httpx would print the whole of it in its complaint
        sys.exit("OPENAI_API_KEY has characters that no key has: was it copied whole?")
    if not args.model:
        parser.error("which model? --model=gpt-4o-mini for one")
    if not re.match("https?://", args.base_url or os.environ.get("OPENAI_BASE_URL") or "https://"):
        parser.error("--base_url and OPENAI_BASE_URL must begin with http:// or https://")

    folder = os.path.join("data", args.name)
    settings_path, stories_path, rejected_path = [
        os.path.join(folder, name) for name in ("generate.json", "stories.jsonl", "rejected.jsonl")]
    settings = {name: getattr(args, name)
                for name in ("model", "seed", "naive", "level", "temperature", "max_tokens")}
    settings["words"] = f"{os.path.basename(args.words)} ({hashlib.sha256(repr(lists).encode()).hexdigest()[:8]})"
    os.makedirs(folder, exist_ok=True)
    ledger = Ledger()
    with lock(os.path.join(folder, "generate.lock")):
        if any(os.path.exists(path) and os.path.getsize(path) for path in (stories_path, rejected_path)):
            if not os.path.exists(settings_path):
                sys.exit(f"{stories_path} was not written by generate.py: choose another --name")
            with open(settings_path, encoding="utf-8") as file:
                begun = json.load(file)
            changed = [f"--{name}={begun.get(name)}, not {value}" for name, value in settings.items()
                       if value != begun.get(name)]
            if changed:
                sys.exit(f"{folder} was begun with {'; '.join(changed)}: go on with that, or choose another --name")
        else:
            with open(settings_path + ".tmp", "w", encoding="utf-8") as file:
                json.dump(settings, file, indent=1)
            os.replace(settings_path + ".tmp", settings_path)
        for path in stories_path, rejected_path:
            for record in records(path):
                ledger.add(record)
        try:
            with (open(stories_path, "a", encoding="utf-8") as stories,
                  open(rejected_path, "a", encoding="utf-8") as rejected):
                why = asyncio.run(write(args, key, lists, ledger, stories, rejected))
        except KeyboardInterrupt:
            why = "stopped by Ctrl-C, without the answers under way"
        except OSError as error:
            why = f"cannot write in {folder}: {error.strerror}"

    given_up = sum(asked >= ASKS for asked in ledger.asked.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in ledger.rejects.most_common())
    print(f"{stories_path}: {len(ledger.done):,} stories, {given_up:,} given up; "
          f"{ledger.rejects.total():,} answers rejected{reasons and f' ({reasons}; see {rejected_path})'}; "
          f"{ledger.tokens_in:,} tokens in, {ledger.tokens_out:,} out, "
          f"${cost(args, ledger.tokens_in, ledger.tokens_out):,.2f}")
    if left := len(ledger.missing(args.n)):
        sys.exit(f"{why}\n{left:,} stories are missing: the same command goes on")
    if not ledger.done:
        sys.exit(f"not one story was good: read {rejected_path}, and choose another --model and --name")
    print(f"next: python prepare.py --dataset={args.name}")


if __name__ == "__main__":
    main()

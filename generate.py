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
import sys
from collections import Counter
from itertools import chain, repeat

from tqdm import tqdm

from common import CommandLine, run_main
from common.ask import ask_all, connect, dollars, parse_server_args, without_thoughts
from common.files import atomic_write, lock, open_to_append, read_lines
from common.text import LETTERS, ends_well, fingerprint, split_words

MAX_REQUESTS = 2  # per story: if the answer is rejected, ask once more, then give up
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
    stems = [word, word.removesuffix("e")] if word[-1] in "ey" else [word + word[-1]]  # shyly, truly; travelled
    forms.update(stem + ending for stem in stems for ending in endings if ending != "s")
    return forms


def missing_words(words, story):
    """The requested words, [verb, noun, adjective, others], that a story does not contain in any form.

    A story has a compound such as "ice cream" if it has all its parts."""
    story_words = set(LETTERS.findall(story.lower()))
    return [word for word, endings in zip(words, chain(ENDINGS, repeat(ALL_ENDINGS)))
            if any(story_words.isdisjoint(inflections(part, endings)) for part in LETTERS.findall(word.lower()))]


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


# What models say to whoever asked: whole lines, or sentences of which [^.!?\n]* is the rest. Stories may speak to their
# readers too, so that a phrase needs a word about the asking.
YES = r"(?:okay|ok|sure(?: thing)?|certainly|of course|absolutely|got it|understood|no problem|gladly)"
GREETING = rf"(?:(?:{YES}|yes|great|hello|hi|alright|all right|as requested)\b\W*)*"
FOR_YOU = (r"(?:for you|your (?:request|words|story)|you (?:asked|gave|wanted|requested)|requested"
           r"|year-old (?:can|will|would)|simple words)")
BEFORE_STORY = [
    r"(?:#.*|```\w*|\*\*[^*\n]*\*\*:?|title:.*)[ \t]*(?:\n|\Z)",
    rf"{YES}[.!]+\s+(?!(?:said|asked|cried)\b)",
    r"(?:final answer|assistant|answer):\s*",
    rf"{GREETING}(?:here (?:we go|it is|you go)|here(?: is|'s) (?:the|your|my) (?:story|tale)|let's begin"
    r"|below you(?:'ll| will) find [^.!?\n]*)[.!:]+[^\w\"“‘\n]*\s",
    rf"{GREETING}i(?:'d| would) (?:love|be happy|be glad) to\b[^.!?\n]*[.!]\s+",
    r"\*[^*\n.!?]*\*[ \t]*\n\s*\n",
    rf"{GREETING}(?:here|below|the following)\b.*\b(?:story|tale|you (?:go|are)|it is|attempt)\b.*:[*_ \t]*(?:\n|\Z)",
    rf"{GREETING}here(?: is|'s) (?:a|the|your)\b[\w, -]*\b(?:story|tale)(?: (?:for|using|with|you)\b[^.:!?\n]*)?:\s+",
    rf"{GREETING}(?:here|i|let|this|below|thank)\b(?=[^.!?\n]*\b(?:story|tale|words|request)\b)"
    rf"[^.!?\n]*\b{FOR_YOU}\b[^.!?\n]*[.!:]+\s+",
    rf"{GREETING}i\b[^.!?\n]*\b(?:help|do that|write|create|tell)\b[^.!?\n]*[.!]\s+(?=here\b|below\b)",
    r"(?:the )?story(?: \d+)?[*_]*:[*_]*\s*"]
AFTER_STORY = [
    r"(?:would you like|do you want|shall i|should i|can i|could i|may i)\b[^.!?\n]*"
    r"\b(?:another(?=\?)|another (?:story|one|tale)|me to|story|stories|version|anything else)\b"
    r"(?![^\n]*\b(?:said|asked|cried)\b)",
    r"(?:please )?(?:let me know|feel free)\b(?![^\n]*\b(?:said|asked|cried|told)\b)",
    r"is there anything (?:else )?(?:you|i)\b",
    r"(?:i )?hope (?:you|this|that|it|the)\b[^.!?\n]*\b(?:story|tale|enjoyed (?:it|this|reading)|request)\b"
    r"(?![^\n]*\b(?:said|asked|cried|told|(?:he|she|they|it) wrote)\b)",
    r"(?:i )?hope (?:this helps|you (?:like|enjoy) (?:it|this)(?=\W*\Z))|happy reading\b|want another\b",
    r"if you\b[^.!?\n]*\b(?:let me know|feel free|another story|i (?:can|could) (?:write|make|add|change|continue)"
    r"|me to (?:write|make|add|change))\b(?![^\n]*\b(?:said|asked|told)\b)",
    r"i(?:'d| would| can|'m| am)\b[^.!?\n]*\b(?:happy to (?:write|change)|another story|if you(?:'d)? (?:like|want))\b",
    r"(?:(?:this|the) story|i(?:'ve| have)?) (?:uses|used|includes|included|contains|incorporated|has)\b[^.!?\n]*"
    r"\b(?:the words?|requested|required|\d+ words)\b",
    r"(?:note|word count)\b[^\n]*:[^\n]*(?:\b(?:story|words?)\b|\d)",
    r"(?:words|features) used\b[^.!?\n]*[:–]",
    r"enjoy(?: the story)?!(?![^\n]*\b(?:said|asked|cried)\b)"]
# What no story for children has. If it is still there when the rest is taken off, the whole answer is rejected.
NO_STORY = "|".join([
    r"(?i)</?\|?[a-z][^<>\n]*>|\|>|```|\A[{\[<]",
    r"\bthe user\b|\bthe (?:verb|noun|adjective)\b (?!was\b)|\bthought process\b|[\ufffd\x00]",
    r"\bset of words\b|\btl;dr\b|\bi kept the (?:words|sentences|language) (?:simple|easy|short)\b",
    r"\A\W*(?:thoughts?|reasoning|thinking(?: process)?|draft(?: \d+)?|plan)\b\W*(?::|\n|\.\.\.)",
    r"\A\W*(?:let me think|first, i|hmm|okay, the)\b",
    r"\A[^\n]*\bi (?:need|should|have|must)(?: to)? (?:use|write|include)\b",
    rf"\A(?:{YES}|yes|great|alright)\b[,.!]* (?:i|here|let)\b|\Ai['’]?[\w ]* happy to help[.!]",
    r"\A(?:so,? )?(?:we|i|let)\b[^.!?\n]*\b(?:write|create|craft)\b[^.!?\n]*\b(?:story|tale)\b"])
# Weak models go on about the task when they run out of story.
ABOUT_THE_TASK = (r"(?i)\b(?:summary:|(?:in|the|this) summary\b|sentences?\b|paragraphs?\b)"
                  r"|(?:\A|\n)\W*the (?:story|end of the story) (?:(?:is|was|has) (?!over)|unfolds|goes on"
                  r"|(?:begins|starts|started|ends|ended) (?:with|on|in|when)\b)")


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
    label = (r"(?im)(?:^|(?<=[.!?\"”])[ ]+(?=summary:))[\W_]*"
             r"(?:story |short |brief |one.sentence )?summary\b(?: of the story)?[*_\"”]*"
             r"\s*?[:\n\]–—-][\W_]*")
    story, *rest = re.split(label, text)
    summary = re.split(r"\n\s*\n", rest[0].strip())[0] if rest else ""  # it was to be one sentence
    summary = " ".join(without_talk(summary).split()).strip("*_`() ")
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
    if re.search(NO_STORY, story) or re.search(ABOUT_THE_TASK, story):
        return "thoughts or talk"
    if answer.finish == "length" or not ends_well(story):
        return "cut off"
    if len(split_words(story)) < MIN_WORDS:
        return "too short"
    if missing_words(words, story):
        return "word missing"
    return "copy" if fingerprint(story) in fingerprints else ""


# -----------------------------------------------------------------------------------------------------------------
# the corpus, and the command line


class Corpus:
    """What all runs so far have written to the files of a corpus. This is all that a run knows about earlier ones."""

    def __init__(self, folder, settings):
        """Read the files. Exits if stories were written with other settings, which are kept in generate.json.

        --max_tokens may change. Stories that were rejected with other settings are asked for again."""
        self.settings_hash = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        self.stories = os.path.join(folder, "stories.jsonl")
        self.rejected = os.path.join(folder, "rejected.jsonl")
        self.done, self.fingerprints = set(), set()  # numbers of the good stories, and fingerprints to find copies
        self.rejections, self.reasons = Counter(), Counter()  # rejected answers by number of the story, and by reason
        self.tokens = Counter(tokens_in=0, tokens_out=0)  # paid for
        settings_path = os.path.join(folder, "generate.json")
        before = next(read_lines(settings_path), {})
        for record in chain(read_lines(self.stories), read_lines(self.rejected)):
            if not before or "index" not in record:
                sys.exit(f"{self.stories} was not written by generate.py: choose another --name")
            self.add(record)
            self.tokens.update(tokens_in=record["tokens_in"], tokens_out=record["tokens_out"])
        changed = [f"--{name}={before.get(name)}, not {value}" for name, value in settings.items()
                   if before.get(name, {}) != value and name != "max_tokens"]  # "extra" is {} by default
        if changed and self.done:
            sys.exit(f"{folder} was begun with {'; '.join(changed)}: continue with that, or choose another --name")
        with atomic_write(settings_path) as file:
            file.write(json.dumps(settings) + "\n")

    def add(self, record):
        """Count a line of one of the two files."""
        if "reason" in record:
            if record["reason"] not in NO_ANSWER and record.get("settings", self.settings_hash) == self.settings_hash:
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
        return (f"{self.stories}: {len(self.done):,} stories, {given_up:,} given up; {self.reasons.total():,} answers "
                f"rejected{details}; {self.tokens['tokens_in']:,} tokens in, {self.tokens['tokens_out']:,} out, "
                f"${dollars(args, **self.tokens):,.2f}")


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
    with open_to_append(corpus.stories) as stories, open_to_append(corpus.rejected) as rejected:
        ask_all(client, request, tasks(), store, bar, args, corpus.tokens)


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
    if not args.name:
        parser.error("--name must name a folder under data/")
    word_lists = [] if args.naive else load_words(args.words)
    triples = math.prod(map(len, word_lists))
    if word_lists and args.n > triples:
        parser.error(f"{args.words} makes only {triples:,} triples of words: lower --n, or give it more words")
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


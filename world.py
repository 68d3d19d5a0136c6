"""Write stories from a small simulated world, in which what is true is known, to data/world/stories.jsonl.

A story is told from a state: who there is, what they own, where things lie, who saw what. A plot, in data/words.json,
is a list of steps: each names a method of `Tale`, which changes the state or tells a sentence about it. Of every
sentence there are several tellings, which look like

    {a*} put {x.the} in the {p}. Then {a.he} <went|goes> to {@hobbies}, [so|and] {b} looked in the {x_place!belief/q}.

    {x.the}         what plays the role x, in a form; {a*} is a name, or a pronoun where nobody else could be meant
    {x_place}       what the state says of x: x_place, x_owner, a_has
    {@hobbies.ing}  any word of a list, in a form
    [so|and]        either wording
    <went|goes>     a span: the right word, and what a reader without grammar would say
    {p!belief/q}    a span that takes another skill, here belief: what plays q is the tempting wrong answer
"""
import collections
import functools
import json
import math
import os
import random
import re
import sys
import time

from tqdm import tqdm

from prepare import Parser, start

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "words.json"), encoding="utf-8") as file:
    WORDS = json.load(file)
LISTS = {**WORDS["nouns"], **WORDS["verbs"], **WORDS["adjectives"], **WORDS["lists"]}
LISTS["places"] = LISTS["places in"] + LISTS["places at"]
LISTS["names"] = LISTS["girls"] + LISTS["boys"]
VOCABULARY = {name: {word for words in WORDS[name].values() for word in words}
              for name in ("verbs", "nouns", "adjectives")}
CLASS_OF = {kind: name for kind, words in LISTS.items() for name in VOCABULARY if VOCABULARY[name].issuperset(words)}
COUNTS = ["none", *LISTS["count words"]]
FEATURES = ["dialogue", "bad ending", "moral value", "foreshadowing", "plot twist", "conflict"]
SKILL = {"fact": "fact", "who": "context", "what": "context", "where": "context"}       # all other kinds: reasoning
CASE = {"he": "him", "him": "he", "his": "he", "she": "her", "her": "she"}              # the wrong case of a pronoun
VAL_SHARE = 0.03

# ---------------------------------------------------------------------------------------------------------------
# words and wordings

def article(word):
    first = word.split()[0]
    return "an" if first[0] in "aeiou" and first not in WORDS["forms"]["a"] or first in WORDS["forms"]["an"] else "a"


@functools.lru_cache(None)
def forms_of(word, adjective=None):
    """Every form in which a word can be asked for: plural, past, with an article, as a place, described."""
    irregular = WORDS["forms"]
    y, short = re.search(r"[^aeiou]y$", word), re.fullmatch(r"[^aeiou]*[aeiou][bdgklmnprtz]", word)
    stem = word[:-1] + "i" if y else word + word[-1] if short or word in irregular["doubled"] else word
    plural = word[:-1] + "ies" if y else word + ("es" if re.search(r"(s|x|z|ch|sh)$", word) else "s")
    bare = word if y else word[:-1] if re.search(r"[^eoy]e$", word) else stem
    ing = (word[:-2] + "y" if word.endswith("ie") else bare) + "ing"
    described = f"{adjective} {word}" if adjective else word
    forms = {"": word, "s": irregular["plural"].get(word, plural), "ing": ing, "pos": word + "'s",
             "past": irregular["past"].get(word, word + "d" if word.endswith("e") else stem + "ed"),
             "an": f"{article(word)} {word}", "the": f"the {word}", "to": f"to the {word}",
             "in": f"{'at' if word in LISTS['places at'] else 'in'} the {word}"}
    return {**forms, "full": described, "a": f"{article(described)} {described}"} if adjective != "" else forms


BASE = {name: {form: word for word in sorted(words) for form in forms_of(word).values()}
        for name, words in VOCABULARY.items()}


def expand(text):
    """All wordings of a telling: each [so|and] is resolved one way or the other."""
    choice = re.search(r"\[([^\[\]]*)\]", text)
    return [text] if not choice else [wording for option in choice[1].split("|")
                                      for wording in expand(text[:choice.start()] + option + text[choice.end():])]


def parse(node):
    """Tellings as lists of wordings, each a list of parts: strings, and tuples for what is yet to be filled in."""
    if isinstance(node, dict):
        return {name: parse(child) for name, child in node.items()}
    if isinstance(node, list):
        return [parse(child) for child in node]
    wordings = []
    for wording in expand(node):
        parts, before = [], ""
        for piece in re.split(r"(\{[^}]*\}|<[^>]*>)", wording):
            capital = bool(re.search(r"(^|[.!?]”? |“)$", before))
            if piece.startswith("<"):
                pair = piece[1:-1].split("|")
                parts.append(("<", *pair, [base for base in pair if base in VOCABULARY["verbs"]
                                           and set(pair) <= set(forms_of(base).values())]))
            elif piece.startswith("{@"):
                name, _, form = piece[2:-1].partition(".")
                parts.append(("@", name, form, capital and name not in ("cried", "replied", "whispered")))
            elif piece.startswith("{"):
                role, form, kind, rival = re.fullmatch(r"\{(\w+)(\*|\.\w+|)(?:!([\w-]+)/(\w+))?\}", piece).groups()
                parts.append(("{", role, form.lstrip("."), capital, kind, rival))
            elif piece:
                parts.append(piece.replace("“", '"').replace("”", '"'))
            before += piece
        wordings.append(parts)
    return wordings


FRAME, OMENS, ASKING = parse(WORDS["frame"]), parse(WORDS["omens"]), parse(WORDS["fact tellings"])
PLOTS = {name: {**plot, "group": group, "lines": {**FRAME, **parse(plot["lines"])}, "sum": parse(plot["summary"])[0]}
         for group, plots in WORDS["plots"].items() for name, plot in plots.items()}
ASIDES = {name: {**aside, "lines": parse(aside["lines"])} for name, aside in WORDS["asides"].items()}
for plot in [*PLOTS.values(), *ASIDES.values()]:        # the same tellings, without speech wherever that is possible
    plot["quiet"] = {name: [telling for telling in some if not any('"' in part for part in telling[0])] or some
                     for name, some in plot["lines"].items()}

# ---------------------------------------------------------------------------------------------------------------
# the state of a story, and its telling

class Entity:
    """A person (who has a pronoun `he`), thing or place; `kind` says which adjectives can describe it."""

    def __init__(self, forms, kind=None, he=None):
        self.forms, self.kind, self.he = forms, kind, he
        self.has, self.owner, self.place = [], None, None


def person(name, kind, he):
    him, his = ("her", "her") if he == "she" else ("him", "his")
    return Entity({**forms_of(name, ""), "kind": kind, "he": he, "him": him, "his": his}, "persons", he)


@functools.lru_cache(None)
def steps(n, split):
    """Steps between two entries of a list of n: of about half its length for val, so that no val pair is in train."""
    return [d for d in range(1, n) if (abs(2 * d - n) <= max(1, n // 20)) == (split == "val")]


# What one may have, and what comes or goes: a pair of before and after that makes nine or eighteen is for val.
SUMS = {split: [(n, n + change) for n in range(2, 11) for change in range(-8, 9)
                if abs(change) > 1 and 2 <= n + change <= 10 and ((2 * n + change) % 9 == 0) == (split == "val")]
        for split in ("train", "val")}


class Tale:
    """One story in the making. `choose` and `chance` add up the bits of all chance that the text shows."""

    def __init__(self, rng):
        self.rng, self.bits, self.split, self.bad = rng, 0.0, "train", False
        self.parts, self.length, self.lines = [], 0, {}
        self.roles, self.recent, self.seen, self.used = {}, [], {}, {name: [] for name in VOCABULARY}
        self.spans, self.features = [], []
        self.events = []  # what was owned and given, for tests

    def choose(self, options, weights=None):
        """One of the options; they are equally likely, or as their weights say."""
        if not weights:
            self.bits += math.log2(len(options))
            return options[int(self.rng.random() * len(options))]
        k = self.rng.choices(range(len(options)), weights)[0]
        self.bits -= math.log2(weights[k] / sum(weights))
        return options[k]

    def chance(self, p):
        return self.choose((True, False), (p, 1 - p)) if 0 < p < 1 else p >= 1

    def shuffle(self, items, n):
        """The first n of the items in random order."""
        items = list(items)
        return [items.pop(self.choose(range(len(items)))) for _ in range(n)]

    def pair(self, n, first=None, avoid=None):
        """Two indices below n, whose difference is one of the `steps`."""
        first = self.choose(range(n)) if first is None else first
        options = [(first + step) % n for step in steps(n, self.split)]
        return first, self.choose([k for k in options if k != avoid])

    # steps that say who and what there is

    def set(self, roles, *values):
        for role, value in zip(roles.split(","), values):
            self.roles[role] = Entity(forms_of(value)) if isinstance(value, str) else value

    def thing(self, role, kind, word=None):
        self.roles[role] = Entity(forms_of(word or self.choose(LISTS[kind]), ""), kind)

    def things(self, roles, kinds, *owners):
        """Two different words of a list, or of one of several lists, play the roles."""
        kind = self.choose(kinds.split("|"))
        for role, k in zip(roles.split(","), self.pair(len(LISTS[kind]))):
            self.thing(role, kind, LISTS[kind][k])
        for role, owner in zip(roles.split(","), ",".join(owners).split(",") if owners else ()):
            self.own(role, owner)

    def mix(self, roles, players, p=0.5):
        """Those who play `players` play the roles too: in this order with probability p, else the other way round."""
        first, second = (self.roles[player] for player in players.split(","))
        self.set(roles, *((first, second) if self.chance(float(p)) else (second, first)))

    def row(self, roles, table):
        self.set(roles, *self.choose(WORDS[table]))

    def entry(self, roles, table):
        """An entry of a table of facts, key and value, and after it another one, to go wrong with."""
        entries = [[key, *(value if isinstance(value, list) else [value])]
                   for key, value in (WORDS.get(table) or WORDS["facts"][table]).items()]
        one, other = self.pair(len(entries))
        self.set(roles, *entries[one], *entries[other])

    def sum(self, roles, sign):
        """Numbers of before, change and after, the change being of that sign."""
        before, after = self.choose([sums for sums in SUMS[self.split] if (sums[1] - sums[0]) * int(sign) > 0])
        self.set(roles, *(COUNTS[n] for n in (before, abs(after - before), after)))

    def friend(self, role, k=None):
        """The k-th of the names plays the role; without k a third one, who is kept apart from b."""
        names = LISTS["animal names" if self.animals else "names"]
        k = self.pair(len(names), self.names[1], self.names[0])[1] if k is None else k
        kind, he = (self.choose(LISTS["cast animals"]), self.choose(("he", "she"))) if self.animals else \
            ("girl", "she") if names[k] in LISTS["girls"] else ("boy", "he")
        self.roles[role] = person(names[k], kind, he)

    def cast(self):
        """a and b, whom a reader has to keep apart, and g, who looks after them: children, or animals with names."""
        self.animals = self.chance(0.3)
        self.names = self.pair(len(LISTS["animal names" if self.animals else "names"]))
        for role, k in zip("ab", self.names):
            self.friend(role, k)
        he = self.choose(("she", "he"))
        name = self.choose(WORDS["elders" if self.animals else "grownups"][he])
        name += f" {self.roles['a'].forms['kind'].title()}" if self.animals else ""
        self.roles["g"] = person(name, "parent", he)

    # steps that act: they change the state, and nobody can give what is not theirs

    def own(self, thing, owner):
        thing, owner = self.roles[thing], self.roles[owner]
        thing.owner = owner
        owner.has.append(thing)
        self.events.append(("own", thing, owner))

    def give(self, thing, giver, taker):
        if self.roles[thing].owner is not self.roles[giver]:
            raise ValueError(f"{giver} cannot give {thing}, which is not theirs")
        self.roles[giver].has.remove(self.roles[thing])
        self.own(thing, taker)
        self.events[-1] = ("give", self.roles[thing], self.roles[taker], self.roles[giver])

    def put(self, thing, place):
        self.roles[thing].place = self.roles[place]

    # steps that tell

    def feature(self, name, p):
        told = self.chance(float(p))
        self.features += [name] * told
        return told

    def fact(self):
        """What everybody knows, told in passing; the wrong answer is the right one for something else."""
        relation = self.choose(list(WORDS["facts"]))
        self.entry("s,f,v,w", relation)
        self.render(self.choose(self.choose(ASKING[relation])))

    def say(self, *names):
        """Tell the named sentences. "/" ends a paragraph, "name?" may be left out, "!name" is a conflict, and "name~"
        is told where the story does not end badly."""
        for name in names:
            if name == "/":
                self.parts[-1:], self.recent = ["\n"] if self.parts else [], []
            elif not (name[-1] == "?" and self.chance(0.4) or name[-1] == "~" and self.bad
                      or name[0] == "!" and not self.feature("conflict", 0.25)):
                self.render(self.choose(self.choose(self.lines[name.strip("!?~")])))

    def act(self, steps):
        """Take the steps of a plot: the name of a method and what it is given; [steps, steps] is a choice of equals,
        and {"0.7": steps, "0.3": steps} one with weights."""
        for step in steps:
            if isinstance(step, list):
                self.act(self.choose(step))
            elif isinstance(step, dict):
                self.act(self.choose(list(step.values()), [float(weight) for weight in step]))
            else:
                method, *given = step.split()
                getattr(self, method)(*given)

    def mark(self, text, skill, wrong, kind=None, capital=False):
        wrong = wrong[0].upper() + wrong[1:] if capital else wrong
        span = {"start": self.length, "end": self.length + len(text), "skill": skill, "wrong": wrong}
        self.spans.append({**span, "kind": kind} if kind else span)

    def mark_article(self, text):
        first, second = text.split(" ", 2)[:2]
        self.mark(f"{first} {second}", "grammar", f"{first[0] if len(first) == 2 else first + 'n'} {second}")

    def render(self, wording):
        named = []
        for part in wording:
            if part.__class__ is str:
                text = part
            elif part[0] == "<":
                _, text, wrong, verbs = part
                self.mark(text, "grammar", wrong)
                self.used["verbs"] += verbs
            elif part[0] == "@":
                _, kind, form, capital = part
                word = self.choose(LISTS[kind])
                text = forms_of(word)[form]
                text = text[0].upper() + text[1:] if capital else text
                if kind in CLASS_OF:
                    self.used[CLASS_OF[kind]].append(word)
                if form == "a":
                    self.mark_article(text)
                elif form and text != word:
                    self.mark(text, "grammar", word)
            else:
                text = self.render_role(part, named)
            self.parts.append(text)
            self.length += len(text)
        self.parts.append(" ")
        self.length += 1
        self.recent = named

    def player(self, role):
        """Who or what plays a role, or what the state says of it: x_owner, x_place, a_has."""
        if role == "z" and role not in self.roles:          # a small thing that turns up
            self.thing("z", "treasures")
        role, _, state = role.partition("_")
        entity = getattr(self.roles[role], state) if state else self.roles[role]
        return entity[0] if state == "has" else entity

    def render_role(self, part, named):
        _, role, form, capital, kind, rival = part
        entity = self.player(role)
        name = entity.forms[""]
        if form == "*":
            clear = entity in self.recent and not named and all(
                other is entity or other.he != entity.he for other in self.recent)
            form = "he" if clear and self.chance(0.7) else ""
        elif form not in entity.forms:                      # described for the first time
            adjective = self.choose(LISTS[self.choose(WORDS["describes"][entity.kind])])
            entity.forms = {**forms_of(name, adjective), **entity.forms}
            if entity.he:
                entity.forms["intro"] = f"{article(adjective)} {adjective} {entity.forms['kind']} named {name}"
            self.used["adjectives"].append(adjective)
        text = entity.forms[form]
        text = text[0].upper() + text[1:] if capital else text
        if entity.he and entity not in named:
            named.append(entity)
        elif entity.kind in CLASS_OF:
            self.used[CLASS_OF[entity.kind]].append(name)
        if kind:
            other = self.player(rival)
            right, wrong = self.seen.get(name, (0, 0)), self.seen.get(other.forms[""])
            # where memory of words would do, it takes no context: the right one was named last and most, or alone
            if kind not in SKILL or kind == "fact" or wrong and not (right[0] > wrong[0] and right[1] > wrong[1]):
                self.mark(text, SKILL.get(kind, "reasoning"), other.forms[form], kind, capital)
        elif form in ("a", "an"):
            self.mark_article(text)
        elif form in ("he", "him", "his"):
            self.mark(text, "grammar", CASE[entity.forms[form]], None, capital)
            return text
        self.seen[name] = (self.seen.get(name, (0, 0))[0] + 1, self.length)
        return text


def tell(rng, facts=1.0, reasoning=1.0):
    """One story, as a Tale. `facts` and `reasoning` scale how much of the corpus is about each."""
    t, scale = Tale(rng), {"reasoning": reasoning, "facts": facts, "tracking": 1.0}
    t.plot = t.choose(list(PLOTS), [scale[plot["group"]] for plot in PLOTS.values()])
    t.split = "val" if t.chance(VAL_SHARE) else "train"
    tone = "quiet" if t.chance(0.3) else "lines"
    t.bad = t.feature("bad ending", 0.2)
    t.cast()
    t.thing("h", "outdoors")
    t.lines = PLOTS[t.plot][tone]
    t.say("open", "life?")
    t.act(PLOTS[t.plot]["cast"])
    omen = t.choose(OMENS) if not t.bad and t.feature("foreshadowing", 0.25) else None
    if omen:
        t.render(t.choose(omen[0]))
    t.say("scene?", "/")
    met = t.roles["b"].forms[""] in t.seen      # else b comes later, and nothing before that can be about b
    if t.feature("conflict", 0.1):
        t.say("quarrel" if met else "quarrel-home", "/")
    for _ in range(int(0.4 * facts) + t.chance(0.4 * facts % 1)):
        t.fact()
    for _ in range(int(0.6 * reasoning) + t.chance(0.6 * reasoning % 1)):
        aside = ASIDES[t.choose([name for name, aside in ASIDES.items() if met or "alone" in aside])]
        t.lines = aside[tone]
        t.act(aside["plot"])
    t.lines = PLOTS[t.plot][tone]
    t.say("/")
    t.act(PLOTS[t.plot]["plot"])
    t.say("/")
    if t.bad:
        t.say("bad", "bad-end")
    else:
        if t.feature("plot twist", 0.25):
            t.say(t.choose(("twist", "surprise")))
        if omen:
            t.render(t.choose(omen[1]))
        t.say("/", "good-end")
    if t.feature("moral value", 0.3):
        t.say("bad-moral" if t.bad else "moral")
    return t


def lego(rng, min_vars=3, max_vars=6, in_order=True):
    """A chain of variables, each plus or minus the one before, in random order; then all are resolved, in the order of
    the chain or in any (after LEGO, Zhang et al. 2022, arXiv 2206.04301).

    A span's depth: in order, its place in the chain; else how many variables lie between it and the nearest whose value
    is already written, all of which must be resolved in mind."""
    t = Tale(rng)
    t.plot, t.split = "lego", "val" if t.chance(VAL_SHARE) else "train"
    longest = min(26, 2 * max_vars) if t.split == "val" else max_vars
    names = t.shuffle("abcdefghijklmnopqrstuvwxyz", t.choose(range(min_vars, longest + 1)))
    signs = [t.choose((1, -1)) for _ in names]
    clauses = [f"{name} = {'-+'[sign > 0]}{source}" for name, sign, source in zip(names, signs, ["1", *names])]
    values = [math.prod(signs[:i + 1]) for i in range(len(signs))]
    order = range(len(names)) if in_order else t.shuffle(range(len(names)), len(names))
    story = ", ".join(t.shuffle(clauses, len(clauses))) + ".\n"
    for n, place in enumerate(order):
        between = min(abs(place - known) for known in (-1, *order[:n])) - 1
        story += f"{', ' if n else ''}{names[place]} = "
        t.spans.append({"start": len(story), "end": len(story) + 2, "skill": "reasoning",
                        "kind": "lego" if in_order else "lego in any order", "wrong": f"{-values[place]:+d}",
                        "depth": place if in_order else between})
        story += f"{values[place]:+d}"
    t.parts = [story + ".", " "]
    return t

# ---------------------------------------------------------------------------------------------------------------
# the file

def record(t):
    """The line of JSON of a tale."""
    story = "".join(t.parts[:-1])
    told = {"story": story, "split": t.split, "plot": t.plot, "spans": list(t.spans), "bits": round(t.bits, 3)}
    if t.plot != "lego":
        t.parts = []
        t.render(PLOTS[t.plot]["sum"])
        told["words"] = [t.rng.choice(words or [BASE[name][word] for word in story.split() if word in BASE[name]])
                         for name, words in t.used.items()]
        told["features"] = [name for name in FEATURES if name in t.features or name == "dialogue" and '"' in story]
        told["summary"] = "".join(t.parts[:-1])
    return told


def stories(n, seed=1, kind="world", **settings):
    """Yield n records. Story i depends on the seed and on i alone."""
    rng = random.Random()
    for i in range(n):
        rng.seed(seed << 40 | i)
        yield record((lego if kind == "lego" else tell)(rng, **settings))


def write(n, seed=1, name="world", kind="world", **settings):
    """Write n stories to data/<name>/stories.jsonl; returns the path, and counts of stories, bytes, bits, spans"""
    path = os.path.join("data", name, "stories.jsonl")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    total = collections.Counter()
    try:
        with open(path + ".part", "w", encoding="utf-8") as file:
            for told in tqdm(stories(n, seed, kind, **settings), total=n, unit=" stories", disable=None):
                file.write(json.dumps(told) + "\n")
                total.update(stories=1, val=told["split"] == "val", words=len(told["story"].split()),
                             bytes=len(told["story"].encode()), bits=told["bits"])
                total.update(span["skill"] for span in told["spans"])
        os.replace(path + ".part", path)
    finally:
        if os.path.exists(path + ".part"):  # after Ctrl-C, on a full disk
            os.remove(path + ".part")
    return path, total


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    parser.option("n", 100000, "number of stories")
    parser.option("seed", 1, "story i depends on the seed and on i alone")
    parser.option("kind", "world", "world: stories; lego: chains of variables to resolve", choices=["world", "lego"])
    parser.option("name", "", "folder under data/; by default the kind")
    parser.option("facts", 1.0, "how much of the stories is about facts (0: nothing)")
    parser.option("reasoning", 1.0, "how much of the stories is about reasoning (0: nothing)")
    parser.option("min_vars", 3, "fewest variables of a LEGO chain")
    parser.option("max_vars", 6, "most variables of a LEGO chain for train; val has up to twice as many")
    parser.option("in_order", True, "resolve LEGO's variables along the chain; False: in any order")
    args = parser.parse_args(argv)
    if args.n < 1 or min(args.seed, args.facts, args.reasoning) < 0 or not 1 <= args.min_vars <= args.max_vars <= 26:
        sys.exit("--n has to be positive, the other numbers not negative, and 1 <= min_vars <= max_vars <= 26: "
                 "try python world.py --n=1000")
    used = ("min_vars", "max_vars", "in_order") if args.kind == "lego" else ("facts", "reasoning")
    settings = {setting: getattr(args, setting) for setting in used}
    begun = time.time()
    try:
        path, total = write(args.n, args.seed, args.name or args.kind, args.kind, **settings)
    except KeyboardInterrupt:
        sys.exit("stopped before the end: nothing is changed; run the same command again, perhaps with a smaller --n")
    print(f"{path}: {total['stories']:,} stories ({total['val']:,} for val), {total['bytes'] / 1e6:.1f} MB of text, "
          f"{total['words'] / args.n:.0f} words a story, {args.n / (time.time() - begun):,.0f} stories/s")
    print(f"bits per byte: {total['bits'] / total['bytes']:.4f}, what all choices cost: the loss of a perfect model")
    print("spans per 100 words: " + ", ".join(f"{skill} {100 * total[skill] / total['words']:.2f}" for skill in
                                              ("grammar", "fact", "context", "reasoning")))
    print(f"next: python prepare.py --dataset={args.name or args.kind}" + " --clean=False" * (args.kind == "lego")
          if total["val"] else "none is for val: to train on them, raise --n")


if __name__ == "__main__":
    start(main)

"""Write stories from a small simulated world, in which what is true is known, to data/world/stories.jsonl.

A story is told from a state: who there is, what they own and like, where things lie, who saw what. A plot acts on the
state and asks for sentences by name; `data/words.json` holds several tellings of each. A telling looks like

    {a*} put {x.the} in the {p}. Then {a.he} <went|goes> to {@hobbies}, and [so|then] {b} came. The {d!belief/w} was full.

    {x.the}         a form of whatever plays the role x; {a*} is a name, or a pronoun where nobody else could be meant
    {@hobbies.ing}  any word of a list, in a form
    [so|then]       either wording
    <went|goes>     a span: the right word, and what a reader without grammar would say
    {d!belief/w}    a span that takes more: the skill here is belief, and the tempting wrong answer plays the role w
"""
import functools
import json
import math
import os
import random
import re
import sys
import time

from tqdm import tqdm

from prepare import Parser

HERE = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(HERE, "data", "words.json"), encoding="utf-8") as file:
    WORDS = json.load(file)
LISTS = {**WORDS["nouns"], **WORDS["verbs"], **WORDS["adjectives"], **WORDS["lists"]}
VOCABULARY = {name: {word for kind in WORDS[name].values() for word in kind} for name in ("verbs", "nouns", "adjectives")}
CLASS_OF = {kind: name for kind, words in LISTS.items() for name in VOCABULARY if VOCABULARY[name].issuperset(words)}
FORMS, FACTS = WORDS["forms"], WORDS["facts"]
SKILL = {"who": "context", "what": "context", "where": "context", "fact": "fact", "exclusion": "reasoning",
         "either-or": "reasoning", "exchange": "reasoning", "comparison": "reasoning", "consequence": "reasoning",
         "belief": "reasoning", "counting": "reasoning", "negation": "reasoning"}
PRONOUNS = {"he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
            "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"}}
PRONOUN_CASE = {"he": "him", "him": "he", "his": "he", "she": "her", "her": "she"}
FEATURES = ["dialogue", "bad ending", "moral value", "foreshadowing", "plot twist", "conflict"]
SPEECH = ("cried", "replied", "whispered")
VAL_SHARE = 0.03
LOG2 = [0.0] + [math.log2(n) for n in range(1, 1000)]

# ---------------------------------------------------------------------------------------------------------------
# words: their forms, and what can be said of them

def article(word):
    vowel = word[0] in "aeiouAEIOU"
    return "an" if vowel and word not in FORMS["a"] or word in FORMS["an"] else "a"


def doubled(verb):
    """The stem before -ed and -ing: stop gives stopp, for one short vowel before one last consonant."""
    short = re.fullmatch(r"[^aeiou]*[aeiou][bdgklmnprtz]", verb) or verb in FORMS["doubled"]
    return verb + verb[-1] if short else verb


@functools.lru_cache(None)
def forms_of(word):
    """Every form in which a word can be asked for: plural, past, with its article."""
    if re.search(r"[^aeiou]y$", word):
        plural, past = word[:-1] + "ies", word[:-1] + "ied"
    else:
        plural = word + ("es" if re.search(r"(s|x|z|ch|sh)$", word) else "s")
        past = word + "d" if word.endswith("e") else doubled(word) + "ed"
    ing = word[:-2] + "ying" if word.endswith("ie") else \
        word[:-1] + "ing" if re.search(r"[^eoy]e$", word) else doubled(word) + "ing"
    return {"": word, "s": FORMS["plural"].get(word, plural), "past": FORMS["past"].get(word, past), "ing": ing,
            "a": f"{article(word)} {word}", "an": f"{article(word)} {word}", "the": f"the {word}"}


@functools.lru_cache(None)
def thing_forms(noun, adjective):
    return {**forms_of(noun), "full": f"{adjective} {noun}", "a": f"{article(adjective)} {adjective} {noun}"}


@functools.lru_cache(None)
def place_forms(noun, preposition):
    return {"": noun, "the": f"the {noun}", "in": f"{preposition} the {noun}", "to": f"to the {noun}"}


def expand(text):
    """All wordings of a telling: each [so|then] is resolved one way or the other."""
    choice = re.search(r"\[([^\[\]]*)\]", text)
    if not choice:
        return [text]
    return [wording for option in choice[1].split("|")
            for wording in expand(text[:choice.start()] + option + text[choice.end():])]


def compile_wording(text):
    """A wording as a list of parts: plain strings, and tuples for what is filled in as the story is told."""
    parts, before = [], ""
    for piece in re.split(r"(\{[^}]*\}|<[^>]*>)", text):
        capital = bool(re.search(r"(^|[.!?]”? |“)$", before))
        if piece.startswith("<"):
            parts.append(("grammar", *piece[1:-1].split("|")))
        elif piece.startswith("{@"):
            name, _, form = piece[2:-1].partition(".")
            parts.append(("pick", name, form, capital and name not in SPEECH))
        elif piece.startswith("{"):
            role, form, kind, rival = re.fullmatch(r"\{(\w+)(\*|\.\w+|)(?:!([\w-]+)/(\w+))?\}", piece).groups()
            parts.append(("role", role, form.lstrip("."), capital, kind, rival))
        elif piece:
            parts.append(piece.replace("“", '"').replace("”", '"'))
        before += piece
    return parts


def compile_tellings(node):
    if isinstance(node, str):
        return [compile_wording(wording) for wording in expand(node)]
    if isinstance(node, list):
        return [compile_tellings(child) for child in node]
    return {name: compile_tellings(child) for name, child in node.items()}


FRAME = compile_tellings({**WORDS["tellings"]["frame"], **WORDS["tellings"]["asides"]})
TELLINGS = {plot: {**FRAME, **lines} for plot, lines in compile_tellings(WORDS["tellings"]).items()}
ASKING = compile_tellings(WORDS["fact tellings"])
OMENS = compile_tellings(WORDS["omens"])

# ---------------------------------------------------------------------------------------------------------------
# the state of a story

class Person:
    def __init__(self, name, he, kind, adjective="kind"):
        self.name, self.he, self.has = name, he, []
        self.forms = {**PRONOUNS[he], "": name, "pos": name + "'s", "kind": kind,
                      "intro": f"{article(adjective)} {adjective} {kind} named {name}"}


class Thing:
    """An object or a place: `owner` and `place` say whose it is and where it lies."""
    def __init__(self, forms):
        self.forms, self.owner, self.place = forms, None, None


class Tale:
    """One story in the making. Every random choice goes through `choose` or `chance`, which count its bits."""

    def __init__(self, rng, facts=1.0, reasoning=1.0):
        self.rng, self.facts, self.reasoning = rng, facts, reasoning
        self.bits, self.parts, self.length = 0.0, [], 0
        self.spans, self.features, self.events = [], [], []
        self.roles, self.recent, self.seen = {}, [], {}
        self.used = {"verbs": [], "nouns": [], "adjectives": []}

    # chance

    def choose(self, options):
        n = len(options)
        self.bits += LOG2[n]
        return options[int(self.rng.random() * n)]

    def chance(self, p):
        if p <= 0 or p >= 1:
            return p >= 1
        hit = self.rng.random() < p
        self.bits -= math.log2(p if hit else 1 - p)
        return hit

    def times(self, mean):
        return int(mean) + self.chance(mean % 1)

    def weighted(self, options):
        """One of the (option, weight)s."""
        total = sum(weight for _, weight in options)
        x = self.rng.random() * total
        for option, weight in options:
            x -= weight
            if x < 0:
                break
        self.bits -= math.log2(weight / total)
        return option

    def two(self, table):
        """Two entries of a table that differ in what they hold."""
        first = self.choose(sorted(table.items()))
        return first, self.choose([entry for entry in sorted(table.items()) if entry[1] != first[1]])

    def shuffle(self, *items):
        items, order = list(items), []
        while items:
            order.append(self.choose(items))
            items.remove(order[-1])
        return order

    def pair(self, words, avoid=None):
        """Two indices of a list. Pairs about half the list apart are for val stories, and occur in no train story."""
        near, far = distances(len(words))
        i = self.choose(range(len(words))) if avoid is None else avoid[1]
        steps = far if self.split == "val" else near
        if avoid:
            steps = [step for step in steps if (i + step) % len(words) != avoid[0]]
        return i, (i + self.choose(steps)) % len(words)

    # people, places and things

    def things(self, kind):
        """Two different things of a kind, whose pairing keeps train and val apart."""
        i, j = self.pair(LISTS[kind])
        return self.thing(kind, LISTS[kind][i]), self.thing(kind, LISTS[kind][j])

    def thing(self, kind, noun=None):
        noun = noun or self.choose(LISTS[kind])
        return Thing(thing_forms(noun, self.choose(LISTS[self.choose(WORDS["describes"][kind])])))

    def places(self):
        return [Thing(place_forms(*PLACES[k])) for k in self.pair(PLACES)]

    def person(self, k):
        adjective = self.choose(LISTS["people"])
        if not self.animals:
            girl = k < len(LISTS["girls"])
            return Person(NAMES[k], "she" if girl else "he", "girl" if girl else "boy", adjective)
        return Person(LISTS["animal names"][k], self.choose(("he", "she")), self.choose(LISTS["cast animals"]), adjective)

    def cast(self, trio):
        """a and b, or with trio a, b and c, where it is b and c that a reader has to keep apart."""
        self.animals = self.chance(0.3)
        self.names = self.pair(LISTS["animal names"] if self.animals else NAMES)
        a, b = map(self.person, self.names)
        self.roles = {"a": a, "b": b}
        if trio:
            self.third()
        if self.animals:
            mama = self.choose(("Mama", "Papa"))
            self.roles["g"] = Person(f"{mama} {a.forms['kind'].title()}", "she" if mama == "Mama" else "he", "parent")
        else:
            elder = self.choose(LISTS["grownups"])
            self.roles["g"] = Person(elder, "she" if elder in ("Mom", "Grandma") else "he", "parent")
        return a, b, self.roles["g"]

    def third(self):
        self.roles["c"] = self.person(self.pair(LISTS["animal names"] if self.animals else NAMES, self.names)[1])

    # acts, which hold the state to what is possible

    def own(self, thing, person):
        thing.owner = person
        person.has.append(thing)
        self.events.append(("own", person, thing))

    def give(self, thing, giver, taker):
        if thing.owner is not giver:
            raise ValueError(f"{giver.name} cannot give away what is not there to give")
        giver.has.remove(thing)
        self.own(thing, taker)
        self.events[-1] = ("give", giver, thing, taker)

    def put(self, thing, place):
        thing.place = place
        self.events.append(("put", thing, place))

    def swap(self, a, b):
        x, y = a.has[0], b.has[0]
        self.give(x, a, b)
        self.give(y, b, a)

    # telling

    def feature(self, name, p):
        if not self.chance(p):
            return False
        self.features.append(name)
        return True

    def mark(self, start, end, skill, wrong, kind=None):
        self.spans.append((start, end, skill, wrong, kind))

    def easy(self, right, wrong):
        """Whether the wrong answer tempts nobody: it was never named, or the right one came last and most often."""
        right, wrong = self.seen.get(right, (0, 0)), self.seen.get(wrong)
        return not wrong or right[1] > wrong[1] and right[0] > wrong[0]

    def say(self, script, **roles):
        """Tell the named sentences in turn: "/" ends a paragraph, "name?" may be left out, "!name" is a conflict,
        and "name~" is told where the story does not end badly."""
        self.roles.update(roles)
        for name in script.split():
            if name == "/":
                self.parts[-1], self.recent = "\n", []
            elif not (name[-1] == "?" and self.chance(0.4) or name[-1] == "~" and self.bad
                      or name[0] == "!" and not self.feature("conflict", 0.25)):
                self.render(self.choose(self.choose(self.lines[name.strip("!?~")])))

    def render(self, wording):
        roles, parts, persons = self.roles, self.parts, []
        for part in wording:
            kind = part[0]
            if part.__class__ is str:
                text = part
            elif kind == "grammar":
                _, text, wrong = part
                self.mark(self.length, self.length + len(text), "grammar", wrong)
                if wrong in VOCABULARY["verbs"]:
                    self.used["verbs"].append(wrong)
            elif kind == "pick":
                _, words, form, capital = part
                word = self.choose(LISTS[words])
                text = forms_of(word)[form]
                if words in CLASS_OF:
                    self.used[CLASS_OF[words]].append(word)
                if form in ("past", "ing", "s") and text != word:
                    self.mark(self.length, self.length + len(text), "grammar", word)
                if capital:
                    text = text[0].upper() + text[1:]
                if form == "a":
                    self.mark_article(text)
            else:
                text = self.render_role(part, persons)
            parts.append(text)
            self.length += len(text)
        parts.append(" ")
        self.length += 1
        self.recent = persons

    def render_role(self, part, persons):
        _, role, form, capital, kind, rival = part
        if role not in self.roles:
            if role == "z":
                self.roles["z"] = self.thing("treasures")
            elif role == "c":
                self.third()
        entity = self.roles[role]
        if entity.__class__ is str:
            forms = forms_of(entity)
        else:
            forms = entity.forms
            if entity.__class__ is Person:
                if form == "*":
                    form = "he" if entity in self.recent and not persons and self.chance(0.7) and not any(
                        other.he == entity.he for other in self.recent if other is not entity) else ""
                if entity not in persons:
                    persons.append(entity)
            elif "full" in forms:
                self.used["nouns"].append(forms[""])
                if form == "a" or form == "full":
                    self.used["adjectives"].append(forms["full"].split()[0])
        text = forms[form]
        name = forms[""]
        if capital:
            text = text[0].upper() + text[1:]
        if kind:
            other = self.roles[rival]
            other = forms_of(other) if other.__class__ is str else other.forms
            if SKILL[kind] != "context" or not self.easy(name, other[""]):
                wrong = other[form]
                wrong = wrong[0].upper() + wrong[1:] if capital else wrong
                self.mark(self.length, self.length + len(text), SKILL[kind], wrong, kind)
        elif form == "a" or form == "an":
            self.mark_article(text)
        elif form in ("he", "him", "his"):
            wrong = PRONOUN_CASE[forms[form]]
            self.mark(self.length, self.length + len(text), "grammar", wrong.title() if capital else wrong)
            return text
        count = self.seen.get(name, (0, 0))[0]
        self.seen[name] = (count + 1, self.length)
        return text

    def mark_article(self, text):
        first, second = text.split(" ", 2)[:2]
        wrong = first[0] if len(first) == 2 else first + "n"
        self.mark(self.length, self.length + len(first) + 1 + len(second), "grammar", f"{wrong} {second}")


@functools.lru_cache(None)
def distances(n):
    """The steps between two places in a list of n: those of train, and those, about half of it, kept for val."""
    far = [d for d in range(1, n) if abs(2 * d - n) <= max(1, n // 20)]
    return [d for d in range(1, n) if d not in far], far


NAMES = LISTS["girls"] + LISTS["boys"]
PLACES = [(noun, preposition) for preposition in ("in", "at") for noun in LISTS[f"places {preposition}"]]
COUNTS = ["none", *LISTS["count words"]]
# what one may have, and what is added or given away; every ninth sum is for val
SUMS = {"train": [], "val": []}
for n in range(3, 10):
    for change in (*range(2 - n, -1), *range(2, 11 - n)):
        SUMS["val" if (n + 3 * change) % 9 == 0 else "train"].append((n, change))


# ---------------------------------------------------------------------------------------------------------------
# plots: each acts on the state, and tells what it did. Reasoning first: the answer has to be worked out

def exclusion(t, a, b, g):
    x, y = t.things(t.choose(LISTS["wish kinds"][t.animals:]))
    p1, p2 = t.shuffle(x, y)
    refused = t.chance(0.75)
    got, other = (y, x) if refused else (x, y)
    t.say("likes / shop ask", x=x, p1=p1, p2=p2, shop=t.choose(LISTS["shops"]))
    t.say("no !fuss" if refused else "yes", why=t.choose(LISTS["reasons"]) if refused else "")
    t.own(got, a)
    t.say("then happy?" if refused else "then-yes happy?", x=got, y=got, w=other)


def either_or(t, a, b, g):
    x, y = t.things("toys")
    p, q = t.things("containers")
    p1, p2 = t.shuffle(p, q)
    t.own(x, a)
    t.put(x, q)
    t.say("lost !blame /", x=x, y=y, p=p, q=q, p1=p1, p2=p2)
    t.say("clue empty so found" if t.chance(0.5) else "empty-first clue so found")


def exchange(t, a, b, g):
    x, y = t.things("toys")
    t.own(x, a)
    t.own(y, b)
    c1, c2 = t.shuffle(a, b)
    f, s = t.shuffle(a, b)
    t.say("have want !no-way /", x=x, y=y, c1=c1, c2=c2, o1=c1.has[0], o2=c2.has[0])
    t.say("swap", f=f, s=s, fx=f.has[0], sx=s.has[0])
    t.swap(a, b)
    k, o = (s, f) if t.chance(0.65) else (f, s)
    t.say("now other?", k=k, o=o, kx=k.has[0], kw=o.has[0], ox=o.has[0])
    if t.chance(0.3):
        t.swap(a, b)
        t.say("/ back after-back", kx=k.has[0], ox=o.has[0])


def comparison(t, a, b, g):
    deed, more, less = t.choose(WORDS["deeds"])
    win, lose = t.shuffle(a, b)
    t.roles["z"] = t.thing("treasures")
    t.say("start prize", deed=deed, more=more, less=less, win=win, lose=lose, l=lose if t.chance(0.7) else win)
    t.own(t.roles["z"], win)
    t.say("brag? / chain so" if t.chance(0.4) else "brag? / result so")
    t.say("cross" if t.feature("conflict", 0.2) else "after")


def consequence(t, a, b, g):
    p, q = t.places()
    rain = t.chance(0.5)
    goal, other = (p, q) if rain else (q, p)
    t.say("plan hope? /", p=p, q=q, d=goal, w=other, hp=other if t.chance(0.7) else goal)
    t.put(a, goal)
    t.say("rain !sulk so there" if rain else "sun !sulk so there")


def belief(t, a, b, g):
    x, (p, q) = t.thing("toys"), t.things("containers")
    t.own(x, a)
    t.put(x, p)
    t.say("put other? / move", x=x, p=p, q=q)
    seen = t.chance(0.4)
    believed = q if seen else x.place
    t.put(x, q)
    t.say("seen back look there !cross" if seen else "unseen back look not-there !cross",
          d=believed, w=p if seen else q)


def counting(t, a, b, g):
    x, y = t.things("treasures")
    n, change = t.choose(SUMS[t.split])
    t.say("get", x=x, y=y, p=t.places()[0], n=COUNTS[n], m=COUNTS[abs(change)], k=COUNTS[n + change])
    t.say("/ more left after" if change > 0 else "see !greedy / give left after")


def negation(t, a, b, g):
    x, y = t.things(t.choose(("fruits", "treats")))
    p1, p2 = t.shuffle(x, y)
    t.own(y, b)
    t.say("visit dislike / show own? !tease so after", x=x, y=y, p1=p1, p2=p2, w=x if t.chance(0.75) else y)


def mystery(t, a, b, g):
    m, w = (LISTS["house animals"][k] for k in t.pair(LISTS["house animals"]))
    m1, m2 = t.shuffle(m, w)
    t.say("crime !blame", x=t.thing("treats"), m=m, w=w, m1=m1, m2=m2)
    t.say("who alibi / so found end~" if t.chance(0.5) else "alibi-first who / so found end~")


# plots that turn on a fact

def helper(t, a, b, g):
    (name, (trouble, fix)), (rival, _) = t.two(WORDS["tools for"])
    x, y, neighbor = t.thing("tools", name), t.thing("tools", rival), t.choose(LISTS["neighbors"])
    o = Person(neighbor, "he" if neighbor.startswith("Mr. ") else "she", "neighbor")
    pet = t.choose(LISTS["climbing pets"]) if "{k}" in trouble else ""
    t.own(x, a)
    t.own(y, a)
    t1, t2 = t.shuffle(x, y)
    t.say("meet problem / bag !doubt pick use thanks~", o=o, x=x, y=y, t1=t1, t2=t2, trouble=trouble.replace("{k}", pet),
          fix=fix.replace("{k}", pet).replace("{o.him}", o.forms["him"]))


def visit(t, a, b, g):
    z, y = t.things("treasures")
    t.say("go", p=t.places()[0], x=z, z=z, y=y)
    for _ in range(1 + t.times(0.7 * t.facts)):
        fact(t)
    t.own(z, b)
    t.say("!lost / find decoy? keep end")


def mother(t, a, b, g):
    (m, baby), (rival, _) = t.two(FACTS["baby"])
    t.say("meet first !argue / know found thanks", k=baby, m=m, w=rival, p=t.places()[0])


def noise(t, a, b, g):
    (m, sound), (rival, _) = t.two(FACTS["says"])
    t.say("night guess !fight / sound know look", m=m, w=rival, sound=sound, spot=t.choose(LISTS["spots"]))


def warning(t, a, b, g):
    forbidden, happened, wrong, did, thing = t.choose(WORDS["warnings"])
    t.say("warn tempt !stop / do out sorry~", forbidden=forbidden, happened=happened, wrong=wrong, did=did, thing=thing)


# plots in which one has to keep track: who, what, where

def gift(t, a, b, g):
    x, y = t.things(t.choose(("toys", "clothes")))
    p, p2 = t.things("containers")
    t.own(x, a)
    t.put(x, p)
    t.say("make guess !worry / near? fetch", x=x, y=y, p=p, p2=p2)
    t.give(x, a, b)
    t.say("unwrap")


def borrowed(t, a, b, g):
    x, y = t.things("toys")
    for thing, friend in (x, b), (y, t.roles["c"]):
        t.own(thing, friend)
        t.give(thing, friend, a)
    t.say("lend careful break / hide? go sorry", x=x, y=y)
    t.say("angry~" if t.feature("conflict", 0.25) else "forgive~")


def seed(t, a, b, g):
    x, y = t.things(t.choose(("flowers", "vegetables")))
    t.own(x, a)
    t.own(y, b)
    c1, c2 = t.shuffle(a, b)
    t.say("plant wait !fight / grow", x=x, y=y, c1=c1, c2=c2, o1=c1.has[0], o2=c2.has[0], p=t.places()[0])
    k, o = (c1, c2) if t.chance(0.7) else (c2, c1)
    t.say("see see2", k=k, o=o, kx=k.has[0], kw=o.has[0], ox=o.has[0])


def newcomer(t, a, b, g):
    t.say("new / two later mention? !fuss choose mend~", x=t.thing("treats"))


def chain(t, a, b, g):
    x, y = t.things("toys")
    f, s = t.shuffle(b, t.roles["c"])
    t.own(x, a)
    t.give(x, a, f)
    t.say("start", x=x, y=y, f=f, s=s)
    t.give(x, f, s)
    t.say("pass !grab")
    if t.chance(0.5):
        t.give(x, s, f)
        t.say("back")
    t.say("noise? / decoy? want go", k=x.owner, o=s if x.owner is f else f)
    t.give(x, x.owner, a)
    t.say("got")


def turns(t, a, b, g):
    x, y = t.things("toys")
    f, s = t.shuffle(a, b)
    t.own(x, g)
    t.feature("conflict", 1)
    t.say("want rule /", x=x, y=y, f=f, s=s)
    t.give(x, g, f)
    t.say("first watch decoy?")
    t.give(x, f, s)
    t.say("then happy")


def forgot(t, a, b, g):
    x, y = t.things("toys")
    p, q = t.places()
    l1, l2 = t.shuffle(p, q)
    t.own(x, a)
    t.put(x, p)
    t.say("trip left other? / decoy? home !fault back found", x=x, y=y, p=p, q=q, l1=l1, l2=l2)


REASONING = [exclusion, either_or, exchange, comparison, consequence, belief, counting, negation, mystery]
KNOWING = [helper, visit, mother, noise, warning]
TRACKING = [gift, borrowed, seed, newcomer, chain, turns, forgot]
TRIOS = [borrowed, chain, newcomer]


def fact(t):
    """What everybody knows, told in passing; the wrong answer is the right one for something else."""
    relation = t.choose(sorted(FACTS))
    (subject, answer), (rival, wrong) = t.two(FACTS[relation])
    t.roles.update(s=subject, f=answer, w=wrong, ws=rival)
    t.render(t.choose(t.choose(ASKING[relation])))


def aside(t, a, b):
    """A small riddle on the way: the same kinds of reasoning in a sentence or two, whatever the plot is."""
    name, roles = t.choose(("snack", "tall", "riddle", "lunch-swap", "count")), {}
    if name == "tall":
        roles["win"], roles["lose"] = t.shuffle(a, b)
    elif name == "count":
        n, change = t.choose([(n, change) for n, change in SUMS[t.split] if change < 0])
        roles.update(x=t.thing("fruits"), n=COUNTS[n], m=COUNTS[-change], k=COUNTS[n + change])
    else:
        x, y = t.things({"snack": "fruits", "riddle": "flowers", "lunch-swap": "treats"}[name])
        (roles["p1"], roles["p2"]), (one, two) = t.shuffle(x, y), t.shuffle((a, x, y), (b, y, x))
        (k, kw, kx) = one if t.chance(0.7) else two
        roles.update(x=x, y=y, c1=one[0], o1=one[1], c2=two[0], o2=two[1], k=k, kx=kx, kw=kw)
    t.say(name, **roles)


def tell(rng, facts=1.0, reasoning=1.0):
    """One whole story: cast, opening, asides, plot, ending. Returns the Tale; `record` makes its line of JSON."""
    t = Tale(rng, facts, reasoning)
    plots = [(plot, weight) for kinds, weight in ((REASONING, reasoning), (KNOWING, facts), (TRACKING, 1.0))
             for plot in kinds]
    plot = t.weighted(plots)
    t.split = "val" if t.chance(VAL_SHARE) else "train"
    a, b, g = t.cast(plot in TRIOS)
    t.plot = plot.__name__.replace("_", "-")
    t.lines = TELLINGS[t.plot]
    t.roles["h"] = Thing(place_forms(*t.choose(PLACES)))
    t.bad = t.feature("bad ending", 0.2)
    t.say("open life?")
    if plot is not newcomer:
        t.say("friends" if plot in TRIOS else "friend")
    omen = t.choose(OMENS) if t.feature("foreshadowing", 0.2) else None
    if omen:
        t.render(t.choose(omen[0]))
    t.say("scene? /")
    if plot is not newcomer and t.chance(0.1):
        t.say("quarrel /")
        t.feature("conflict", 1)
    for _ in range(t.times(0.4 * facts)):
        fact(t)
    for _ in range(t.times(0.4 * reasoning)):
        aside(t, a, b)
    t.say("/")
    plot(t, a, b, g)
    if t.bad:
        t.say("/ bad bad-end")
    else:
        if t.feature("plot twist", 0.2):
            t.say("/ twist" if t.chance(0.5) else "/ surprise")
        if omen:
            t.render(t.choose(omen[1]))
        t.say("/ good-end")
    if t.feature("moral value", 0.3):
        t.say("moral")
    return t


def lego(rng, split, min_vars, max_vars):
    """A chain of variables, each plus or minus the one before, in random order; then all are resolved in order."""
    t = Tale(rng)
    t.split, t.plot = split, "lego"
    top = min(26, 2 * max_vars) if split == "val" else max_vars
    names = t.shuffle(*"abcdefghijklmnopqrstuvwxyz")[:t.choose(range(min_vars, top + 1))]
    signs = [t.choose((1, -1)) for _ in names]
    clauses = [f"{name} = {'+' if sign > 0 else '-'}{names[k - 1] if k else 1}"
               for k, (name, sign) in enumerate(zip(names, signs))]
    text, value = ", ".join(t.shuffle(*clauses)) + ".\n", 1
    for depth, (name, sign) in enumerate(zip(names, signs)):
        value *= sign
        text += f"{name} = "
        t.spans.append((len(text), len(text) + 2, "reasoning", f"{-value:+d}", "lego", depth))
        text += f"{value:+d}" + (", " if depth < len(names) - 1 else ".")
    t.parts = [text, ""]
    return t


# ---------------------------------------------------------------------------------------------------------------
# the file

def record(t):
    """The line of JSON of a Tale."""
    story = "".join(t.parts[:-1])
    spans = [dict(zip(("start", "end", "skill", "wrong", "kind", "depth"), span)) for span in t.spans]
    if t.plot == "lego":
        return {"story": story, "split": t.split, "spans": spans, "bits": round(t.bits, 3)}
    features = [name for name in FEATURES if name in t.features or name == "dialogue" and '"' in story]
    words = [t.rng.choice(words) for words in t.used.values() if words]
    t.parts, t.length = [], 0
    t.say("sum")
    return {"story": story, "words": words, "features": features, "summary": "".join(t.parts[:-1]),
            "split": t.split, "plot": t.plot, "spans": spans, "bits": round(t.bits, 3)}


def stories(n, seed=1, kind="world", facts=1.0, reasoning=1.0, min_vars=3, max_vars=6):
    """Yield n records. Story i depends on the seed and on i alone."""
    rng = random.Random()
    for i in range(n):
        rng.seed(seed << 40 | i)
        if kind == "lego":
            yield record(lego(rng, "val" if rng.random() < VAL_SHARE else "train", min_vars, max_vars))
        else:
            yield record(tell(rng, facts, reasoning))


def write(n, seed=1, name="world", kind="world", **settings):
    """Write n stories to data/<name>/stories.jsonl; returns counts, among them `bits` and `bytes` of all stories."""
    folder = os.path.join("data", name)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "stories.jsonl")
    total = {"stories": 0, "val": 0, "words": 0, "bytes": 0, "bits": 0.0, "spans": {}}
    try:
        with open(path + ".part", "w", encoding="utf-8") as file:
            for line in tqdm(stories(n, seed, kind, **settings), total=n, unit=" stories", disable=None):
                file.write(json.dumps(line) + "\n")
                total["stories"] += 1
                total["val"] += line["split"] == "val"
                total["words"] += line["story"].count(" ") + 1
                total["bytes"] += len(line["story"])
                total["bits"] += line["bits"]
                for span in line["spans"]:
                    total["spans"][span["skill"]] = total["spans"].get(span["skill"], 0) + 1
        os.replace(path + ".part", path)
    finally:
        if os.path.exists(path + ".part"):
            os.remove(path + ".part")
    return path, total


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    parser.option("n", 100000, "number of stories")
    parser.option("seed", 1, "story i depends on the seed and on i alone")
    parser.option("kind", "world", "world: stories; lego: chains of variables to resolve", choices=["world", "lego"])
    parser.option("name", "", "folder under data/, by default that of the kind")
    parser.option("facts", 1.0, "how much is about facts (1: as designed, 0: nothing)")
    parser.option("reasoning", 1.0, "how much is about reasoning (1: as designed, 0: nothing)")
    parser.option("min_vars", 3, "fewest variables of a LEGO chain")
    parser.option("max_vars", 6, "most variables of a LEGO chain in train; val has up to twice as many")
    args = parser.parse_args(argv)
    if args.n < 1 or args.seed < 0 or args.facts < 0 or args.reasoning < 0:
        sys.exit("--n has to be at least 1, and --seed, --facts and --reasoning at least 0: try python world.py --n=1000")
    if not 1 <= args.min_vars <= args.max_vars <= 26:
        sys.exit("a chain has 1 to 26 variables: try --min_vars=3 --max_vars=6")
    start = time.time()
    try:
        path, total = write(args.n, args.seed, args.name or args.kind, args.kind, facts=args.facts,
                            reasoning=args.reasoning, min_vars=args.min_vars, max_vars=args.max_vars)
    except KeyboardInterrupt:
        sys.exit("stopped, and nothing is written: run it again with a smaller --n if it takes too long")
    seconds = time.time() - start
    print(f"{path}: {total['stories']:,} stories ({total['val']:,} for val), {total['bytes'] / 1e6:.1f} MB of text, "
          f"{total['words'] / total['stories']:.0f} words a story, {total['stories'] / seconds:,.0f} stories/s")
    print(f"at most {total['bits'] / total['bytes']:.3f} bits per byte: what the random choices cost, and so a loss that "
          "a perfect model reaches")
    print("labelled per 100 words: " + ", ".join(
        f"{skill} {100 * count / total['words']:.2f}" for skill, count in sorted(total["spans"].items())))


if __name__ == "__main__":
    main()

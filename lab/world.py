"""Write stories of a small simulated world, in which the right answers are known, to data/<name>/stories.jsonl.

A story is a child's day: perhaps a scene or two at home, then some outside with a friend, then a plot, and an ending
that comes back to what has happened. It is told from a state: who there is, who owns what, and where things are. Words
that follow from the state are marked as spans, each with a tempting wrong answer. Vocabulary, scenes and plots are in
data/words.json. Here is a plot, with "…" for what is left out. A child wants two things and may have one:

    "exclusion": {"cast": ["say friend"],
      "plot": ["things x,y pet-wishes|toys|treats|clothes", "mix p1,p2 x,y", "thing shop shops", "thing why reasons",
               "say likes / shop ask", {"0.75": ["let y,w y,x", "say no !fuss then stays happy?"],
                                        "0.25": ["let y,w x,y", "say yes then-yes stays happy?"]}],
      "summary": "{a} goes to {shop} with {g} and gets {y.an}.",
      "lines": {"no": ["But {g} shook {g.his} head. “{why},” {@replied} {g}. “You cannot have {x.an}.”", …],
                "then": ["So {a} chose the other thing, and they went home with {y.an!exclusion/w}.", …], …}}

"plot" is a list of steps. A step is the name of a method of `Tale` and its arguments. Most arguments are roles, such as
x, which somebody or something plays. Before the first step, a and b are two children (or animals with names), g is a
grown-up, and h is a place; z is a small treasure unless a step says otherwise.

    things x,y …        choose one of the lists, say toys, and two of its words: x is a violin, and y is a puppet
    mix p1,p2 x,y       p1 and p2 are x and y in random order: "likes" names p1 first, and so gives nothing away
    thing why reasons   `why` is an entry of the list "reasons"
    say likes / …       tell the sentence "likes", end the paragraph, tell "shop", and "ask", in which a asks for x
    {"0.75": …, …}      take one of these lists of steps, with these probabilities, which must all be different; in
                        [[…], […]], all lists are equally likely
    let y,w y,x         y stays y, and w is x, the wrong answer; in the other branch, y is x
    say no !fuss …      "!name" is a conflict, told in 15 % of the stories; "name?" is told in 60 % of them;
                        "name~" is told unless the story ends badly
    own, give, put      change the state: who has a thing, and where it is; see the methods

"lines" has several tellings of each sentence, and one of them is chosen. A telling is text with these parts:

    {y.an}              who or what plays y, in a form: a puppet. `forms_of` and `person` list the forms
    {a*}                a's name, or perhaps "he" or "she" where that can only mean a
    {x_place}           what the state says of x: x_place, x_owner; and a_has, the last thing that a got
    {@replied}          a random word of the list "replied"; {@toys.s} is one in a form
    [so|and]            either wording
    <bit|bites>         a span of grammar: the right word, and a wrong one. The words in the table "grammar", such as
                        went, are such spans wherever they stand, but for those after "I" and "you"
    {y.an!exclusion/w}  a span of the kind "exclusion": y is right, and w is wrong. The kind "fact" takes knowledge of
                        facts; "who", "what" and "where" take context; all other kinds take reasoning

This is the record that comes out, here of story 5,961 of seed 1. `bits` is the cost of all random choices:

    {"story": "In winter, a quick boy … So Alan chose the other thing, and they went home with a pancake. …",
     "split": "train", "plot": "exclusion",
     "spans": […, {"start": 466, "end": 470, "skill": "grammar", "wrong": "go"},
               {"start": 481, "end": 490, "skill": "reasoning", "wrong": "a marshmallow", "kind": "exclusion"}, …],
     "bits": 102.953, "words": ["rush", "marshmallow", "quick"], "features": ["dialogue"],
     "summary": "Alan goes to the big store with Mom and gets a pancake."}

To add a plot, write it under "plots" in the group "reasoning", "facts" or "tracking", with tellings for each of its
sentences and for "bad", "twist", "moral" and "end", which `tell_story` uses at the end. All plots share the lines of
"frame". A scene is written in the same way under "scenes", without "cast" and "summary". It is told before the friend
comes if it has "home": true. Its line "end", if it has one, may be told near the end of the story.
"""
import functools
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter, namedtuple
from dataclasses import dataclass, field

from tqdm import tqdm

from common import CommandLine, run_main
from common.dataset import load_meta
from common.files import atomic_write
from generate import FEATURES, WORDS_FILE, add_ending

with open(WORDS_FILE, encoding="utf-8") as file:
    WORDS = json.load(file)
LISTS = {**WORDS["nouns"], **WORDS["verbs"], **WORDS["adjectives"], **WORDS["lists"]}
LISTS["places"] = LISTS["places in"] + LISTS["places at"]
# girls and boys in turn, so that the small world has both
LISTS["names"] = [name for pair in zip(LISTS["girls"], LISTS["boys"], strict=True) for name in pair]
VOCABULARY = {name: set().union(*WORDS[name].values()) for name in ("verbs", "nouns", "adjectives")}
SKILL_OF_KIND = {"fact": "fact", "who": "context", "what": "context", "where": "context"}  # all others: reasoning
WRONG_CASE = {"he": "him", "him": "he", "his": "he", "she": "her", "her": "she"}
VAL_SHARE = 0.03  # of the stories
SMALL = 6  # the small world uses so many words of a list, rows of a table and tellings of a sentence, at most

# -----------------------------------------------------------------------------------------------------------------
# words


def article(text):
    first = text.split()[0]
    for exception in ("a", "an"):  # a unicorn, an hour
        if first in WORDS["forms"][exception]:
            return exception
    return "an" if first[0] in "aeiou" else "a"


@functools.cache
def forms_of(word):
    """{form: text} of a word, for every form that a telling can ask for. In "a" (a red ball) and "full" (red ball), an
    adjective is added when a story first asks for one of them; "an" (a ball) never has one."""
    preposition = "at" if word in LISTS["places at"] else "in"
    with_article = f"{article(word)} {word}"
    return {"": word, "an": with_article, "a": with_article, "full": word, "the": f"the {word}", "pos": word + "'s",
            "to": f"to the {word}", "in": f"{preposition} the {word}", "ing": add_ending(word, "ing"),
            "s": WORDS["forms"]["plural"].get(word) or add_ending(word, "s"),
            "past": WORDS["forms"]["past"].get(word) or add_ending(word, "ed")}


BASE_FORMS, WORD_CLASS = {}, {}  # {class: {form: word}}; {list: class}, for lists whose words are all of one class
for word_class, words in VOCABULARY.items():
    BASE_FORMS[word_class] = {form: word for word in sorted(words) for form in forms_of(word).values()}
    WORD_CLASS.update({name: word_class for name, members in LISTS.items() if words.issuperset(members)})

# -----------------------------------------------------------------------------------------------------------------
# parsing: a telling has one or more wordings, and a wording is a list of parts. A part is text or one of these

Pair = namedtuple("Pair", "right wrong verbs")  # <went|go>; verbs: ["go"], of which both are forms, or []
AnyWord = namedtuple("AnyWord", "words form word_class capital")  # {@hobbies.ing}; capital: begins a sentence
Role = namedtuple("Role", "player form skill kind rival capital")  # {x_place!where/y}; player ["x", "place"]


# {x.an}, <went|go>, and words that are spans of grammar wherever they stand, but for "I want", where both are right
PIECES = re.compile(r"(\{[^}]*\}|<[^>]*>|\b(?<!\bI )(?<!\b[Yy]ou )(?:" + "|".join(WORDS["grammar"]) + r")\b)")


def parse_part(piece, capital):
    if piece in WORDS["grammar"]:
        piece = f"<{piece}|{WORDS['grammar'][piece]}>"
    if piece.startswith("<"):
        pair = piece[1:-1].split("|")
        verbs = [word for word in pair if word in VOCABULARY["verbs"] and set(pair) <= set(forms_of(word).values())]
        return Pair(*pair, verbs)
    if piece.startswith("{@"):
        name, _, form = piece[2:-1].partition(".")
        after_speech = name in ("cried", "replied", "whispered")  # “Hello!” cried Tom.
        return AnyWord(LISTS[name], form, WORD_CLASS.get(name), capital and not after_speech)
    if piece.startswith("{"):
        match = re.fullmatch(r"\{(\w+)(\*|\.\w+|)(?:!([\w-]+)/(\w+))?\}", piece)
        player, form, kind, rival = match.groups(default="")
        skill = SKILL_OF_KIND.get(kind, "reasoning")
        return Role(player.split("_"), form.lstrip("."), skill, kind, rival.split("_"), capital)
    return piece.replace("“", '"').replace("”", '"')


@functools.cache
def parse(telling):
    """The wordings of a telling: each [so|and] in it is resolved both ways."""
    pieces = re.split(r"\[(.*?)\]", telling)  # text, options, text, options, …, text
    options = [piece.split("|") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    wordings = []
    for texts in itertools.product(*options):
        parts, before = [], ""
        for piece in filter(None, PIECES.split("".join(texts))):
            begins_sentence = bool(re.search(r"(^|[.!?]”? |“)$", before))
            parts.append(parse_part(piece, begins_sentence))
            before += piece
        wordings.append(parts)
    return wordings


PLOTS = {name: {**plot, "group": group, "lines": {**WORDS["frame"], **plot["lines"]}}
         for group, plots in WORDS["plots"].items() for name, plot in plots.items()}
# short scenes, for a story of any plot: {(group, home): scenes}. Those at home are told before the friend comes
SCENES = {(group, home): [scene for scene in scenes.values() if scene.get("home", False) == home]
          for group, scenes in WORDS["scenes"].items() for home in (True, False)}
TABLES = {name: list(facts.items()) for name, facts in WORDS["facts"].items()}  # {name: rows}
TABLES["tools-for"] = [(tool, *texts) for tool, texts in WORDS["tools-for"].items()]
TABLES |= {name: WORDS[name] for name in ("deeds", "warnings", "signs", "measures")}

# -----------------------------------------------------------------------------------------------------------------
# the state of the world


@dataclass(eq=False, slots=True)
class Entity:
    """Who or what plays a role: a person, a thing, a place, or any other words."""
    forms: dict  # {form: text}
    category: str = ""  # the list that it comes from, or "persons"; it decides which adjectives fit
    pronoun: str = ""  # of a person: "he" or "she"
    described: bool = False  # whether it has its adjective
    has: list = field(default_factory=list)
    owner: object = None  # an Entity
    place: object = None


def person(name, noun, pronoun):
    """A person has more forms: kind (girl), he, him and his for either sex, and intro (a kind girl named Mia)."""
    him, his = ("her", "her") if pronoun == "she" else ("him", "his")
    return Entity({**forms_of(name), "kind": noun, "he": pronoun, "him": him, "his": his}, "persons", pronoun)


@functools.cache
def partners(index, n, split):
    """The indices below n that a story may set against this one. In val, these are the two next to it on a ring; in
    train, all others. So no pair of a right and a wrong answer occurs in both splits, but train tells each word apart
    from nearly all others."""
    return [other for other in range(n) if other != index and ((other - index) % n in (1, n - 1)) == (split == "val")]


@functools.cache
def sums(sign, split):
    """Pairs (n, k) of numbers from 2 to 10, where k is larger if sign is 1 and smaller if it is -1. They differ by two
    or more, so that several come or go. In val, n + k is 9 or 13, and neither is twice the other."""
    return [(n, k) for n in range(2, 11) for k in range(2, 11)
            if (k - n) * sign > 1 and (n + k in (9, 13) and n != 2 * k and k != 2 * n) == (split == "val")]


class Tale:
    """A story in the making: its world, its text, and what chance has cost. STEPS lists the methods that plots call."""

    def __init__(self, rng, limit=None):
        self.rng, self.bits = rng, 0.0  # bits: -log2 of the probability of all choices so far
        self.limit = limit  # of the words of a list, rows of a table and tellings of a sentence; None: all are used
        self.plot, self.split, self.bad, self.features = "", "train", False, []  # bad: whether it ends badly
        self.roles = {}  # {role: Entity}
        self.text, self.spans = "", []
        self.lines, self.quiet = {}, False  # {sentence: tellings}, for `say`; whether nobody speaks, where that can be
        self.last_scene = None  # (lines, roles) of a scene whose end is told near the end of the story
        self.recent = []  # the people of the last telling
        self.mentions = {}  # {name: (how often it is in the text, where it begins for the last time)}
        self.used = {word_class: [] for word_class in VOCABULARY}  # words of the vocabulary that are in the text

    # chance

    def choose(self, options, weights=None):
        """One of the options. They are equally likely if there are no weights."""
        if not weights:
            self.bits += math.log2(len(options))
            return options[int(self.rng.random() * len(options))]
        index = self.rng.choices(range(len(options)), weights)[0]
        self.bits -= math.log2(weights[index] / sum(weights))
        return options[index]

    def chance(self, p):
        """True with probability p."""
        if not 0 < p < 1:
            return p >= 1
        happens = self.rng.random() < p
        self.bits -= math.log2(p if happens else 1 - p)
        return happens

    def number(self, mean):
        """One of the two whole numbers next to `mean`, which is their mean in the long run."""
        return int(mean) + self.chance(mean % 1)

    def shuffle(self, items, n):
        """The first n of the items in random order."""
        items = list(items)
        return [items.pop(self.choose(range(len(items)))) for _ in range(n)]

    def pair(self, n):
        """Two indices below n that may be set against each other."""
        first = self.choose(range(n))
        return first, self.choose(partners(first, n, self.split))

    def words(self, category):
        return LISTS[category][:self.limit]

    def fresh(self, words):
        """Those words that play no role in the text so far, or all if each one does."""
        return [word for word in words if word not in self.mentions] or words

    # steps that set up: they say who or what plays a role

    def assign(self, roles, players):
        """Let players (entities or words) play the roles, written as "x,y"."""
        for role, player in zip(roles.split(","), players):
            self.roles[role] = Entity(forms_of(player)) if isinstance(player, str) else player

    def thing(self, role, category):
        """"thing p places": p is a word of the list "places"."""
        self.roles[role] = Entity(forms_of(self.choose(self.fresh(self.words(category)))), category)

    def things(self, roles, categories, owners=""):
        """"things x,y toys|clothes a": x and y are two toys or two clothes, and x belongs to a; with a,b, y to b."""
        category = self.choose(categories.split("|"))
        words = self.words(category)
        first = self.choose(self.fresh(words))
        partner_indices = partners(words.index(first), len(words), self.split)
        second = self.choose(self.fresh([words[index] for index in partner_indices]))
        self.assign(roles, [Entity(forms_of(word), category) for word in (first, second)])
        if owners:
            for role, owner in zip(roles.split(","), owners.split(",")):
                self.own(role, owner)

    def another(self, role, other):
        """"another u y": u is one more word of y's list, which may be set against y."""
        category = self.roles[other].category
        words, taken = self.words(category), [entity.forms[""] for entity in self.roles.values()]
        others = partners(words.index(self.roles[other].forms[""]), len(words), self.split)
        word = self.choose([words[index] for index in others if words[index] not in taken])
        self.roles[role] = Entity(forms_of(word), category)

    def let(self, roles, players):
        """"let y,w y,x": y stays y, and w is x."""
        self.assign(roles, [self.roles[player] for player in players.split(",")])

    def mix(self, roles, players, p=0.5):
        """"mix k,o c1,c2 0.7": with probability 0.7, k is c1 and o is c2; otherwise, k is c2 and o is c1."""
        entities = [self.roles[player] for player in players.split(",")]
        self.assign(roles, entities if self.chance(float(p)) else entities[::-1])

    def row(self, roles, table):
        """"row deed,more,less deeds": the three are a row of the table "deeds". With "d1,m1,l1/d2,m2,l2", two rows."""
        groups = roles.split("/")
        for group, row in zip(groups, self.shuffle(TABLES[table][:self.limit], len(groups))):
            self.assign(group, row)

    def entry(self, roles, table):
        """"entry m,k,w baby": m and k are a row of the table "baby", cow and calf; w begins another row, dog."""
        rows = TABLES[table][:self.limit]
        index, other = self.pair(len(rows))
        self.assign(roles, rows[index] + rows[other])

    def sum(self, roles, sign):
        """"sum n,m,k -1": there are n, m of them go, and k are left. With 1, m more come."""
        n, k = self.choose(sums(int(sign), self.split))
        self.assign(roles, [LISTS["count words"][number - 1] for number in (n, abs(k - n), k)])

    def friend(self, role):
        """"friend c": c is one more child, who may be set against b."""
        a, b = self.cast_indices
        self.child(role, self.choose([index for index in partners(b, len(self.names), self.split) if index != a]))

    def child(self, role, index):
        name = self.names[index]
        if self.animals:
            noun, pronoun = self.choose(self.words("cast animals")), self.choose(("he", "she"))
        else:
            noun, pronoun = ("girl", "she") if name in LISTS["girls"] else ("boy", "he")
        self.roles[role] = person(name, noun, pronoun)

    def cast(self):
        """Before the plot: a and b are children, or animals with names, and g is the grown-up who looks after them."""
        self.animals = self.chance(0.3)
        self.names = self.words("animal names" if self.animals else "names")
        self.cast_indices = self.pair(len(self.names))
        for role, index in zip("ab", self.cast_indices):
            self.child(role, index)
        pronoun = self.choose(("she", "he"))
        name = self.choose(WORDS["elders" if self.animals else "grownups"][pronoun])
        if self.animals:
            name += " " + self.roles["a"].forms["kind"].title()  # Papa Fox
        self.roles["g"] = person(name, "parent", pronoun)

    # steps that act: they change the state

    def own(self, thing, owner):
        """"own y a": y belongs to a."""
        self.roles[thing].owner = self.roles[owner]
        self.roles[owner].has.append(self.roles[thing])

    def give(self, thing, giver, taker):
        """"give x a b": a gives x to b. It has to be a's."""
        if self.roles[thing].owner is not self.roles[giver]:
            raise ValueError(f"{self.plot}: {giver} cannot give {thing}, which is not theirs")
        self.roles[giver].has.remove(self.roles[thing])
        self.own(thing, taker)

    def put(self, thing, place):
        """"put x p": x is in p."""
        self.roles[thing].place = self.roles[place]

    # steps that tell

    def feature(self, name, p):
        """"feature conflict 1": the story has this feature with probability 1. Returns whether it has."""
        has_feature = self.chance(float(p))
        if has_feature:
            self.features.append(name)
        return has_feature

    def fact(self):
        """"fact": tell something that everybody knows. The wrong answer is the right one for something else."""
        table = self.choose(list(WORDS["facts"]))
        self.entry("s,f,v,w", table)
        self.tell(self.choose(WORDS["fact tellings"][table][:self.limit]))

    def say(self, *names):
        """"say likes / ask !fuss happy?": tell these sentences. The top of this file explains the signs."""
        for name in names:
            if name == "/":
                self.text = self.text[:-1] + "\n"
                self.recent = []
            elif (name.endswith("?") and self.chance(0.4)) or (name.endswith("~") and self.bad):
                continue
            elif not name.startswith("!") or self.feature("conflict", 0.15):
                tellings = self.lines[name.strip("!?~")]
                if self.quiet:
                    tellings = [telling for telling in tellings if "“" not in telling] or tellings
                self.tell(self.choose(tellings[:self.limit]))

    def tell(self, telling):
        self.render(self.choose(parse(telling)))

    def follow(self, steps):
        """Take the steps of a plot."""
        for step in steps:
            if isinstance(step, list):
                self.follow(self.choose(step))
            elif isinstance(step, dict):
                self.follow(self.choose(list(step.values()), [float(weight) for weight in step]))
            else:
                name, *arguments = step.split()
                STEPS[name](self, *arguments)

    # rendering: a wording becomes text and spans

    def add(self, text, capital=False, wrong="", skill="grammar", kind=""):
        """Add text to the story, as a span if there is something wrong that could stand in its place."""
        if capital:
            text, wrong = text[0].upper() + text[1:], wrong[:1].upper() + wrong[1:]
        if wrong:
            span = {"start": len(self.text), "end": len(self.text) + len(text), "skill": skill, "wrong": wrong}
            self.spans.append({**span, "kind": kind} if kind else span)
        self.text += text

    def add_article(self, text, capital):
        """Add "a red ball": "a red" is a span of grammar, for which "an red" is wrong."""
        right, word = text.split(" ")[:2]
        wrong = "an" if right == "a" else "a"
        self.add(f"{right} {word}", capital, f"{wrong} {word}")
        self.text += text[len(right) + 1 + len(word):]

    def render(self, wording):
        people = []  # those whom this wording has mentioned
        for part in wording:
            if isinstance(part, str):
                self.text += part
            elif isinstance(part, Role):
                self.render_role(part, people)
            elif isinstance(part, AnyWord):
                self.render_any_word(part)
            else:
                self.add(part.right, wrong=part.wrong)
                self.used["verbs"] += part.verbs
        self.text += " "
        self.recent = people

    def render_any_word(self, part):
        word = self.choose(part.words[:self.limit])
        text = forms_of(word)[part.form]
        if part.word_class:
            self.used[part.word_class].append(word)
        if part.form == "a":
            self.add_article(text, part.capital)
        else:
            self.add(text, part.capital, wrong="" if text == word else word)

    def render_role(self, part, people):
        player, form, skill, kind, rival, capital = part
        entity = self.player(*player)
        if form == "*":
            # a pronoun is clear if the last telling had one person of this sex, and this telling had nobody so far
            candidates = [other for other in self.recent if other.pronoun == entity.pronoun]
            form = "he" if candidates == [entity] and not people and self.chance(0.7) else ""
        elif form in ("a", "full", "intro") and entity.category and not entity.described:
            self.describe(entity)
        text, name, start = entity.forms[form], entity.forms[""], len(self.text)
        if entity.pronoun and entity not in people:
            people.append(entity)
        elif entity.category in WORD_CLASS:
            self.used[WORD_CLASS[entity.category]].append(name)
        if form in ("he", "him", "his"):
            self.add(text, capital, WRONG_CASE[text])
            return  # this is no mention of the name
        if kind:
            self.add(text, capital, self.wrong_answer(name, form, skill, self.player(*rival)), skill, kind)
        elif form in ("a", "an"):
            self.add_article(text, capital)
        else:
            self.add(text, capital)
        count, _ = self.mentions.get(name, (0, 0))
        self.mentions[name] = (count + 1, start)

    def player(self, role, state=""):
        """The Entity that plays a role; or its owner, its place, or the last thing that it got."""
        if role == "z" and role not in self.roles:
            self.thing("z", "treasures")
        entity = self.roles[role]
        if state == "has":
            return entity.has[-1]
        return getattr(entity, state) if state else entity

    def describe(self, entity):
        """Choose an adjective for an entity, and put it into the forms "full", "a" and "intro"."""
        adjective = self.choose(self.words(self.choose(WORDS["describes"][entity.category])))
        name, start = entity.forms[""], f"{article(adjective)} {adjective}"
        entity.forms = {**entity.forms, "full": f"{adjective} {name}", "a": f"{start} {name}"}
        if entity.pronoun:
            entity.forms["intro"] = f"{start} {entity.forms['kind']} named {name}"
        entity.described = True
        self.used["adjectives"].append(adjective)

    def wrong_answer(self, name, form, skill, rival):
        """The wrong answer where `name` is right. For context it is "", and there is no span, if memory of words is
        enough: if the rival was never mentioned, or `name` was mentioned both last and most often."""
        right_count, right_place = self.mentions.get(name, (0, 0))
        wrong_count, wrong_place = self.mentions.get(rival.forms[""], (0, 0))
        memory_will_do = wrong_count == 0 or (right_count > wrong_count and right_place > wrong_place)
        if skill == "context" and memory_will_do:
            return ""
        return rival.forms[form]


STEPS = {"thing": Tale.thing, "things": Tale.things, "another": Tale.another, "let": Tale.let, "mix": Tale.mix,
         "row": Tale.row, "entry": Tale.entry, "sum": Tale.sum, "friend": Tale.friend, "own": Tale.own,
         "give": Tale.give, "put": Tale.put, "feature": Tale.feature, "fact": Tale.fact, "say": Tale.say}

# -----------------------------------------------------------------------------------------------------------------
# a story from beginning to end, and a chain


def tell_story(rng, size="large", facts=1.0, context=1.0, reasoning=1.0):
    """One story, as a Tale. `facts`, `context` and `reasoning` scale how much of the corpus is about each."""
    tale = Tale(rng, SMALL if size == "small" else None)
    # weights of one plot: seven of eight stories have a plot about reasoning
    weights = {"reasoning": 3 * reasoning, "facts": 0.5 * facts, "tracking": 0.5 * context}
    tale.plot = tale.choose(list(PLOTS), [weights[plot["group"]] for plot in PLOTS.values()])
    plot = PLOTS[tale.plot]
    tale.split = "val" if tale.chance(VAL_SHARE) else "train"
    tale.quiet = tale.chance(0.3)
    tale.lines = plot["lines"]
    tale.bad = tale.feature("bad ending", 0.2)
    tale.cast()
    tale.thing("h", "outdoors")
    tell_opening(tale, draw_scenes(tale, True, context, reasoning))
    tale.follow(plot["cast"])
    friend_is_there = tale.roles["b"].forms[""] in tale.mentions  # in some plots, b comes later
    outcome = ""  # of an omen
    if not tale.bad and tale.feature("foreshadowing", 0.15):
        omen, outcome = tale.choose(WORDS["omens"][:tale.limit])
        tale.tell(omen)
    elif tale.chance(0.1):
        tale.say("scene")
    tale.say("/")
    if tale.feature("conflict", 0.05):
        tale.say("quarrel" if friend_is_there else "quarrel-home", "/")
    for _ in range(tale.number(0.9 * facts)):
        tale.fact()
    if friend_is_there:
        tell_scenes(tale, draw_scenes(tale, False, context, reasoning))
    tale.say("/")
    tale.follow(plot["plot"])
    tale.say("/")
    tell_ending(tale, outcome)
    if tale.feature("moral value", 0.2):
        tale.say("bad-moral" if tale.bad else "moral")
    return tale


def draw_scenes(tale, home, context, reasoning):
    """Scenes at home or outside, in random order: on average 0.58 about reasoning and 0.2 about context."""
    scenes = []
    for group, mean in (("reasoning", 0.58 * reasoning), ("tracking", 0.2 * context)):
        candidates = SCENES[group, home]
        scenes += tale.shuffle(candidates, min(tale.number(mean), len(candidates)))
    return tale.shuffle(scenes, len(scenes))


def tell_scenes(tale, scenes):
    """Tell them, each with roles of its own. The last one that has an "end" is kept for the end of the story."""
    lines, roles = tale.lines, tale.roles
    for scene in scenes:
        tale.lines, tale.roles = scene["lines"], dict(roles)
        tale.follow(scene["plot"])
        tale.say("/")
        if "end" in tale.lines:
            tale.last_scene = tale.lines, tale.roles
    tale.lines, tale.roles = lines, roles


def tell_opening(tale, scenes):
    """Who the story is about, the scenes at home, and the way out."""
    if scenes:
        tale.say("open", "/")
        tell_scenes(tale, scenes)
        tale.say("go-out")
        return
    tale.say(tale.choose(("open", "open-out")))
    if tale.chance(0.2):
        tale.say("life")


def tell_ending(tale, outcome):
    """How the plot ends, and what became of a scene, unless the story ends badly."""
    if tale.bad:
        tale.say("bad", "bad-end")
        return
    if tale.feature("plot twist", 0.12):
        tale.say(tale.choose(("twist", "surprise")))
    if outcome:
        tale.tell(outcome)
    tale.say("/")
    if tale.last_scene:
        lines, roles = tale.lines, tale.roles
        tale.lines, tale.roles = tale.last_scene
        tale.say("end")
        tale.lines, tale.roles = lines, roles
    tale.say(tale.choose(("end", "good-end"), (0.9, 0.1)))


def lego(rng, min_vars=3, max_vars=6, in_order=True):
    """A chain of variables instead of a story, as a Tale (after LEGO, Zhang et al. 2022, arXiv 2206.04301):

        r=-j,l=-1,j=+l     the clauses, in random order: the chain is l, j, r
        l=-1,j=-1,r=+1     the values, in the order of the chain or in any order; each value is a span

    Prepared with a vocabulary of 259, `=-` and `=+` are the only tokens of two characters, so that every sign stands
    right behind the name of its variable.

    For val, chains are up to twice as long; spans in chains longer than any in train form a separate kind.

    The depth of a span is its place in the chain, from 0. In any order, it is the number of variables between this one
    and the nearest whose value is known: a reader has to resolve these without writing them down."""
    tale = Tale(rng)
    tale.plot = "lego"
    tale.split = "val" if tale.chance(VAL_SHARE) else "train"
    longest = min(26, 2 * max_vars) if tale.split == "val" else max_vars
    n = tale.choose(range(min_vars, longest + 1))
    letters = tale.shuffle("abcdefghijklmnopqrstuvwxyz", n)
    signs = [tale.choose((1, -1)) for _ in letters]
    values = [math.prod(signs[:i + 1]) for i in range(n)]
    order = range(n) if in_order else tale.shuffle(range(n), n)
    kind = ("lego" if in_order else "lego in any order") + (", longer" if n > max_vars else "")
    clauses = [f"{letter}={'+' if sign > 0 else '-'}{source}"
               for letter, sign, source in zip(letters, signs, ["1", *letters])]
    tale.text = ",".join(tale.shuffle(clauses, n))
    for i, place in enumerate(order):
        tale.text += ("," if i else "\n") + f"{letters[place]}="
        gap = min(abs(place - known) for known in (-1, *order[:i])) - 1  # -1 is the place of the number 1
        tale.spans.append({"start": len(tale.text), "end": len(tale.text) + 2, "skill": "reasoning",
                           "kind": kind, "wrong": f"{-values[place]:+d}", "depth": place if in_order else gap})
        tale.text += f"{values[place]:+d}"
    return tale

# -----------------------------------------------------------------------------------------------------------------
# the file


def record_of(tale):
    """The JSON object of a tale."""
    story = tale.text.rstrip()
    record = {"story": story, "split": tale.split, "plot": tale.plot, "spans": list(tale.spans),
              "bits": round(tale.bits, 3)}
    if tale.plot == "lego":
        return record
    if '"' in story:
        tale.features.append("dialogue")
    record["words"] = []  # a verb, a noun and an adjective of the story
    for word_class, words in tale.used.items():
        base_forms = BASE_FORMS[word_class]
        candidates = words or [base_forms[word] for word in story.split() if word in base_forms]
        record["words"].append(tale.rng.choice(candidates))
    record["features"] = [feature for feature in FEATURES if feature in tale.features]
    tale.text = ""
    tale.render(parse(PLOTS[tale.plot]["summary"])[0])
    record["summary"] = tale.text.rstrip()
    return record


def stories(n, seed=1, kind="world", **settings):
    """Yield n records. Story i depends on the seed and on i alone."""
    rng = random.Random()
    for i in range(n):
        rng.seed(seed << 40 | i)
        yield record_of(lego(rng, **settings) if kind == "lego" else tell_story(rng, **settings))


def write(n, seed=1, name="world", kind="world", **settings):
    """Write n stories to data/<name>/stories.jsonl. Returns its path, and a Counter of stories, bytes, spans, …"""
    path, total = os.path.join("data", name, "stories.jsonl"), Counter()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path) as file:
        for record in tqdm(stories(n, seed, kind, **settings), total=n, unit=" stories", disable=None):
            file.write(json.dumps(record) + "\n")
            story = record["story"]
            total.update(stories=1, val=record["split"] == "val", words=len(story.split()),
                         bytes=len(story.encode()), bits=record["bits"])
            total.update(span["skill"] for span in record["spans"])
    return path, total


def ensure_prepared():
    """Write and prepare the stories of data/world unless that has been done: train.py calls this on a fresh machine."""
    if os.path.exists(os.path.join("data", "world", "meta.json")):
        for source in load_meta("world")["source"]:
            if os.path.exists(source["file"]) and os.path.getsize(source["file"]) != source["bytes"]:
                sys.exit(f"{source['file']} has changed since it was prepared: run python prepare.py --dataset=world")
        return
    if "RANK" in os.environ:
        sys.exit("data/world is not prepared: run python -m lab.world --n=30000 and python prepare.py before torchrun")
    if not os.path.exists(os.path.join("data", "world", "stories.jsonl")):
        print("data/world is empty: writing 30,000 stories of the built-in world (python -m lab.world)")
        write(30_000)
    print("preparing data/world (python prepare.py --dataset=world)")
    # in a process of its own, so that its workers need not import train.py and torch where they are spawned
    script = os.path.join(os.path.dirname(os.path.dirname(WORDS_FILE)), "prepare.py")
    with subprocess.Popen([sys.executable, script, "--dataset=world"]) as process:  # run() would kill it at Ctrl-C
        if process.wait():
            sys.exit("data/world could not be prepared: the reason stands above")


def main(argv=None):
    parser = CommandLine(__doc__.splitlines()[0])
    parser.option("n", 30_000, "number of stories", low=1)
    parser.option("seed", 1, "story i depends on the seed and on i alone", low=0)
    parser.option("kind", "world", "world: stories; lego: chains of variables to resolve", choices=["world", "lego"])
    parser.option("name", "", "folder under data/; by default the kind")
    parser.option("size", "large", "small: a world of fewer words, names and sentences", choices=["large", "small"])
    parser.option("facts", 1.0, "how much of the stories is about facts (0: nothing)", low=0, high=100)
    parser.option("context", 1.0, "how much of the stories is about who has what and where it is", low=0, high=100)
    parser.option("reasoning", 1.0, "how much of the stories is about reasoning (0: almost nothing)", low=0, high=100)
    parser.option("min_vars", 3, "fewest variables of a LEGO chain", low=1, high=26)
    parser.option("max_vars", 6, "most variables of a LEGO chain for train; twice as many for val", low=1, high=26)
    parser.option("in_order", True, "resolve LEGO's variables along the chain; False: in any order")
    args = parser.parse_args(argv)
    if args.min_vars > args.max_vars:
        parser.error(f"--min_vars={args.min_vars} is more than --max_vars={args.max_vars}: raise --max_vars")
    if args.kind == "world" and not (args.facts or args.context or args.reasoning):
        parser.error("--facts, --context and --reasoning are all 0: leave one of them above 0")
    options = ("min_vars", "max_vars", "in_order") if args.kind == "lego" else ("size", "facts", "context", "reasoning")
    name, started = args.name or args.kind, time.time()
    if os.path.exists(os.path.join("data", name, "stories.jsonl")):
        sys.exit(f"data/{name}/stories.jsonl exists: choose another name with --name, or delete it first")
    path, total = write(args.n, args.seed, name, args.kind, **{option: getattr(args, option) for option in options})
    print(f"{path}: {total['stories']:,} stories ({total['val']:,} for val), {total['bytes'] / 1e6:.1f} MB of text, "
          f"{total['words'] / args.n:.0f} words a story, {args.n / (time.time() - started):,.0f} stories/s")
    print(f"bits per byte: {total['bits'] / total['bytes']:.4f}, the cost of all choices: a perfect model's loss")
    print("spans per 100 words: " + ", ".join(f"{skill} {100 * total[skill] / total['words']:.2f}"
                                              for skill in ("grammar", "fact", "context", "reasoning")))
    if total["val"]:
        as_lego = " --clean=False --vocab_size=259" if args.kind == "lego" else ""
        print(f"next: python prepare.py --dataset={name}{as_lego}")
    else:
        print("none of these stories is for val: raise --n to train on them")


if __name__ == "__main__":
    run_main(main)

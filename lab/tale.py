"""A story of the built-in world in the making: the state that it is told from, the steps of its plot, and its text with
the spans. See lab/world.py for what a plot looks like."""
import functools
import math
from dataclasses import dataclass, field

from lab.telling import LISTS, VOCABULARY, WORD_CLASS, WORDS, AnyWord, Role, article, forms_of, parse

WRONG_CASE = {"he": "him", "him": "he", "his": "he", "she": "her", "her": "she"}
TABLES = {name: list(facts.items()) for name, facts in WORDS["facts"].items()}  # {name: rows}
TABLES["tools-for"] = [(tool, *texts) for tool, texts in WORDS["tools-for"].items()]
TABLES |= {name: WORDS[name] for name in ("deeds", "warnings", "signs", "measures")}


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
        """"say likes / ask !fuss happy?": tell these sentences. lab/world.py explains the signs."""
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

"""The language of the built-in world: its words in every form, and tellings, of which its sentences are made.

A telling is text with these parts:

    {y.an}              who or what plays y, in a form: a puppet. `forms_of` and `person` list the forms
    {a*}                a's name, or perhaps "he" or "she" where that can only mean a
    {x_place}           what the state says of x: x_place, x_owner; and a_has, the last thing that a got
    {@replied}          a random word of the list "replied"; {@toys.s} is one in a form
    [so|and]            either wording
    <bit|bites>         a span of grammar: the right word, and a wrong one. The words in the table "grammar", such as
                        went, are such spans wherever they stand, but for those after "I" and "you"
    {y.an!exclusion/w}  a span of the kind "exclusion": y is right, and w is wrong. The kind "fact" takes knowledge of
                        facts; "who", "what" and "where" take context; all other kinds take reasoning

One telling has one or more wordings, and a wording is a list of parts. A part is text or one of Pair, AnyWord, Role.
"""
import functools
import itertools
import json
import re
from collections import namedtuple

from generate import WORDS_FILE, add_ending

with open(WORDS_FILE, encoding="utf-8") as file:
    WORDS = json.load(file)
LISTS = {**WORDS["nouns"], **WORDS["verbs"], **WORDS["adjectives"], **WORDS["lists"]}
LISTS["places"] = LISTS["places in"] + LISTS["places at"]
# girls and boys in turn, so that the small world has both
LISTS["names"] = [name for pair in zip(LISTS["girls"], LISTS["boys"], strict=True) for name in pair]
VOCABULARY = {name: set().union(*WORDS[name].values()) for name in ("verbs", "nouns", "adjectives")}
SKILL_OF_KIND = {"fact": "fact", "who": "context", "what": "context", "where": "context"}  # all others: reasoning


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
# parsing

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

"""The story world: its state, its sentences, and above all that the marked answers follow from the text alone."""
import collections
import json
import math
import os
import random
import re

import pytest

from common.text import fingerprint
from conftest import error_of
from generate import FEATURES
from lab import world
from lab.tale import STEPS
from lab.telling import LISTS, VOCABULARY, WORDS, Pair, Role, article, forms_of, parse

NUMBERS = {word: n for n, word in enumerate("none one two three four five six seven eight nine ten".split())}
CONTEXT = ["who", "what", "where"]
REASONING = ["exclusion", "negation", "either-or", "exchange", "comparison", "consequence", "belief", "counting"]


@pytest.fixture(scope="session")
def sample():
    return list(world.stories(3000, seed=11))


def spans(sample, *kinds):
    """(story, span, the text before it, the right answer) for every span of these kinds."""
    for record in sample:
        story = record["story"]
        for span in record["spans"]:
            if span.get("kind") in kinds:
                yield story, span, story[:span["start"]], story[span["start"]:span["end"]]


def bare(text):
    """The word in "at the park", "an apple", "Tom's"."""
    return re.sub(r"^((in |at )?the|an?) |'s$", "", text, flags=re.I).lower()


def stories_told(n):
    return [world.tell_story(random.Random(i)) for i in range(n)]


# -----------------------------------------------------------------------------------------------------------------
# what is written


def test_story_i_depends_on_seed_and_i_alone():
    few, many = list(world.stories(3, seed=5)), list(world.stories(30, seed=5))
    assert few == many[:3]
    assert [record["story"] for record in world.stories(3, seed=6)] != [record["story"] for record in few]


def test_stories_are_varied(sample):
    texts = [record["story"] for record in sample]
    assert len({fingerprint(text) for text in texts}) > 0.999 * len(texts)
    openings = collections.Counter(re.split(r"(?<=[.!?])\"?\s", text)[0] for text in texts)
    assert openings.most_common(1)[0][1] < 0.01 * len(texts)
    assert len(set(re.findall("[a-z]+", " ".join(texts).lower()))) >= 1200
    assert {record["plot"] for record in sample} == set(world.PLOTS)


def test_stories_look_like_stories(sample):
    for record in sample:
        story = record["story"]
        assert 40 < len(story.split()) < 500 and story.count("\n") >= 2, story
        assert story[0].isupper() or story[0] == '"'
        assert story.isascii() and story[-1] in '.!?"' and story.count('"') % 2 == 0, story
        assert not re.search(r"[{}<>\[\]|@*_]|  | \n|\n |\n\n|[.!?] [a-z]| [,.!?]", story), story
        assert record["summary"][-1] == "." and not re.search(r"[{}<>|]", record["summary"])


def test_words_and_features_are_really_there(sample):
    features_of_plot = collections.defaultdict(set)
    for record in sample:
        text = record["story"].lower()
        assert len(record["words"]) == 3
        for word, part in zip(record["words"], ("verbs", "nouns", "adjectives")):
            assert word in VOCABULARY[part]
            forms = "|".join(re.escape(form.lower()) for form in forms_of(word).values())
            assert re.search(rf"\b({forms})\b", text), record
        assert ("dialogue" in record["features"]) == ('"' in record["story"])
        features_of_plot[record["plot"]].update(record["features"])
    assert all(features == set(FEATURES) for features in features_of_plot.values()), features_of_plot


# -----------------------------------------------------------------------------------------------------------------
# grammar


def test_articles(sample):
    like_you, silent = ("unicorn", "uniform", "useful"), ("hour", "honest")
    articles = [pair for record in sample for pair in re.findall(r"\b([Aa]n?) ([A-Za-z]+)", record["story"])]
    assert len(articles) > 10000
    for found, word in articles:
        vowel = word[0].lower() in "aeiou" and not word.startswith(like_you) or word.startswith(silent)
        assert (found.lower() == "an") == vowel, f"{found} {word}"


def test_agreement_and_tense(sample):
    wrong = re.compile(r"\b(they|we|you) (was|is|has|likes|wants)\b|\b(he|she|it) (were|are|have|do|want|like)\b"
                       r"|\bI (is|are|has)\b|\bthere was (two|many)\b|\b(did|could|would|must) not (?!need)[a-z]+ed\b"
                       r"|\bto (went|was|had|were)\b|\b(a|an|the) (a|an|the)\b|\b(?P<word>[a-z]+) (?P=word)\b")
    for text in ("then they was sad", "she did not wanted it", "the ball ball"):
        assert wrong.search(text)
    for record in sample:
        assert not wrong.search(record["story"]), (wrong.search(record["story"]), record["story"])


@pytest.mark.parametrize("form, expected", [
    ("past", {"hop": "hopped", "play": "played", "cry": "cried", "bake": "baked", "run": "ran", "skip": "skipped"}),
    ("ing", {"hop": "hopping", "lie": "lying", "bake": "baking", "cry": "crying", "play": "playing"}),
    ("s", {"cherry": "cherries", "box": "boxes", "mouse": "mice", "toy": "toys", "wolf": "wolves", "bus": "buses"}),
    ("an", {"owl": "an owl", "hour": "an hour", "unicorn": "a unicorn", "toy store": "a toy store"}),
    ("in", {"park": "in the park", "zoo": "at the zoo"})])
def test_forms(form, expected):
    assert {word: forms_of(word)[form] for word in expected} == expected


def test_where_all_are_female_nobody_is_called_he():
    female = [tale for tale in stories_told(1500) if all(entity.pronoun != "he" for entity in tale.roles.values())]
    assert len(female) > 50
    for tale in female:
        assert not re.search(r"\b([Hh]e|[Hh]im|[Hh]is)\b", tale.text), tale.text


# -----------------------------------------------------------------------------------------------------------------
# the notation and the state


def test_the_record_at_the_top_of_the_file_is_real():
    record = world.record_of(world.tell_story(random.Random(1 << 40 | 5961)))
    assert record["plot"] == "exclusion" and f'"summary": "{record["summary"]}"' in world.__doc__
    answer = next(i for i, span in enumerate(record["spans"]) if span.get("kind") == "exclusion")
    for span in record["spans"][answer - 1:answer + 1]:
        assert json.dumps(span) in world.__doc__
    for key in ("bits", "words", "features"):
        assert f'"{key}": {json.dumps(record[key])}' in world.__doc__
    answer = "So Alan chose the other thing, and they went home with a pancake."
    for sentence in ("In winter, a quick boy", answer):
        assert sentence in record["story"] and sentence in world.__doc__


def test_a_telling_has_a_wording_for_each_choice_and_parts_to_fill_in():
    assert parse("[So|And] {a} <went|go>.") == [
        [first, Role(["a"], "", "reasoning", "", [""], False), " ", Pair("went", "go", ["go"]), "."]
        for first in ("So ", "And ")]
    role, = parse("{x_place.in!where/y_place}")[0]
    assert role == Role(["x", "place"], "in", "context", "where", ["y", "place"], True)
    word = parse("The {@toys.s}")[0][1]
    assert (word.words, word.form, word.word_class, word.capital) == (LISTS["toys"], "s", "nouns", False)


def test_a_small_plot_does_what_the_top_of_the_file_says():
    tale = world.Tale(random.Random(1))
    tale.cast()
    tale.lines = {"likes": ["{p1.an} and {p2.an}?"], "no": ["Not {x.an}."],
                  "then": ["{a*} <took|take> {y!exclusion/w}."]}
    tale.follow(["things x,y toys", "mix p1,p2 x,y", "say likes / no", {"1": ["mix y,w y,x 1"]}, "say then", "own y a"])
    name, x, y = (tale.roles[role].forms[""] for role in "axy")
    assert tale.text.endswith(f"?\nNot {article(x)} {x}. {name} took {y}. ")
    grammar, answer = tale.spans[-2:]
    assert tale.text[grammar["start"]:grammar["end"]] == "took" and grammar["wrong"] == "take"
    assert tale.text[answer["start"]:answer["end"]] == y
    assert (answer["wrong"], answer["kind"], answer["skill"]) == (x, "exclusion", "reasoning")
    assert tale.player("a", "has") is tale.roles["y"] and tale.player("y", "owner") is tale.roles["a"]


def test_an_entity_keeps_its_adjective():
    tale = world.Tale(random.Random(1))
    tale.thing("x", "toys")
    for telling in ("{x.an}", "{x.a}", "{x.full}", "{x.a}"):
        tale.tell(telling)
    word, adjective = tale.roles["x"].forms[""], tale.used["adjectives"][0]
    full = f"{article(adjective)} {adjective} {word}"
    assert tale.text.lower() == f"{article(word)} {word} {full} {adjective} {word} {full} "


def test_nobody_gives_what_they_do_not_have(monkeypatch):
    given = []

    def give(tale, thing, giver, taker):
        assert tale.roles[thing].owner is tale.roles[giver] and tale.roles[thing] in tale.roles[giver].has
        tale.give(thing, giver, taker)
        assert tale.roles[thing].owner is tale.roles[taker] and tale.roles[thing] not in tale.roles[giver].has
        given.append(thing)
    monkeypatch.setitem(STEPS, "give", give)
    for tale in stories_told(1500):
        for entity in tale.roles.values():
            assert all(thing.owner is entity for thing in entity.has)
    assert len(given) > 250
    tale = world.Tale(random.Random(1))
    tale.cast()
    tale.thing("x", "toys")
    tale.own("x", "a")
    with pytest.raises(ValueError, match="b cannot give x"):
        tale.give("x", "b", "a")


# -----------------------------------------------------------------------------------------------------------------
# spans


def test_spans_point_at_words(sample):
    skills = collections.Counter()
    for record in sample:
        last, story = 0, record["story"]
        for span in record["spans"]:
            right = story[span["start"]:span["end"]]
            assert last <= span["start"] < span["end"] <= len(story)
            assert right != span["wrong"] and right.strip() == right
            assert right[0].isupper() == span["wrong"][0].isupper()
            assert not (story[span["start"] - 1:span["start"]] + right[0]).isalnum()
            assert not (right[-1] + story[span["end"]:span["end"] + 1]).isalnum()
            last = span["end"]
            skills[span["skill"]] += 1
    assert set(skills) == {"grammar", "fact", "context", "reasoning"} and min(skills.values()) > 2000
    kinds = {span["kind"] for record in sample for span in record["spans"] if "kind" in span}
    assert kinds == {"fact", *CONTEXT, *REASONING}


def test_wrong_facts_are_wrong():
    for table in WORDS["facts"].values():
        assert len(set(table.values())) == len(table) > 3


@pytest.mark.parametrize("kind", CONTEXT + REASONING)
def test_the_nearest_and_the_most_frequent_candidate_are_mostly_wrong(kind, sample):
    nearest, frequent, n = 0, 0, 0
    for _, span, before, right in spans(sample, kind):
        places = [[match.start() for match in re.finditer(rf"\b{re.escape(bare(word))}", before.lower())]
                  for word in (right, span["wrong"])]
        last = [place[-1] if place else -1 for place in places]
        nearest += last[1] > last[0]
        frequent += (len(places[1]), last[1]) > (len(places[0]), last[0])
        n += 1
    assert n > 200 and nearest >= n / 2 and frequent >= n / 2, (n, nearest / n, frequent / n)


def test_the_small_world_has_fewer_words():
    words, distinct = [], []
    for size in ("small", "large"):
        texts = " ".join(record["story"] for record in world.stories(400, 3, size=size)).lower().split()
        words.append(len(texts))
        distinct.append(len(set(texts)))
    assert 0.9 < words[0] / words[1] < 1.1 and distinct[0] < 0.8 * distinct[1]


@pytest.mark.parametrize("size", ["large", "small"])
def test_pairs_of_val_never_occur_in_train(size, sample):
    pairs = {"train": set(), "val": set()}
    for record in sample if size == "large" else world.stories(3000, 11, size="small"):
        for _, span, _, right in spans([record], *CONTEXT, *REASONING):
            pairs[record["split"]].add((span["kind"], frozenset((bare(right), bare(span["wrong"])))))
    assert not pairs["train"] & pairs["val"]
    assert {kind for kind, _ in pairs["val"]} == {*CONTEXT, *REASONING}


# -----------------------------------------------------------------------------------------------------------------
# the answers follow from the text: each test reads what stands before the answer, and the words next to it. Many
# scenes have two answers, the second of which is about the person or thing that the first left over.


def finds(pattern, text):
    return list(re.finditer(pattern, text, re.I))


def near(story, span, n=45):
    """What stands before and after the answer in its paragraph, n characters at most of each. Its article counts as
    standing before it."""
    article = "the " if story[span["start"]:].lower().startswith("the ") else ""
    before, after = story[:span["start"]], story[span["end"]:]
    return before.rsplit("\n", 1)[-1][-n:] + article, after.split("\n", 1)[0][:n]


def test_counting_follows_from_the_text(sample):
    for story, span, before, right in spans(sample, "counting"):
        numbers = [match for match in finds("[a-z]+", before) if NUMBERS.get(match[0].lower(), 1) > 1]
        have, change = (NUMBERS[match[0].lower()] for match in numbers[-2:])
        more = re.search("^ more|^, so that was", before[numbers[-1].end():])
        assert NUMBERS[right.lower()] == (have + change if more else have - change), story


# phrases between two who are compared, the winner first; and those with the loser first
WINS = ["could climb better than", "was less tired than", "was braver than", "left", "saw more of them than"]
LOSES = ["was more tired than", "was more afraid than", "was much slower than", "did not throw as far as"]
LOSER_BEFORE = ("waited |next time I will win|next time it will be me|well done|be careful|thank you,|you are good|"
                "want to try again")
LOSER_AFTER = "^ watched|^ waited|^ was .* for a while|^ said and shook hands"


def comparisons(before, candidates, people):
    """[(winner, loser), …] in the order of the text; None for who is not among the candidates."""
    wins, loses = zip(*[row[1:] for row in WORDS["deeds"]])
    wins, loses = [*wins, "'s plant grew higher than"], [*loses, "'s plant stayed below"]
    if people:
        wins, loses = wins + WINS, loses + LOSES
    else:
        more, less = zip(*[row[:2] for row in WORDS["measures"]])
        wins, loses = wins + list(more), loses + list(less)
    found = []
    for phrases, forward in ((wins, True), (loses, False)):
        for phrase in phrases:
            for match in re.finditer(rf"( |(?='s)){re.escape(phrase)} ", before):
                one = next((word for word in candidates if finds(rf"\b{word}$", before[:match.start()])), None)
                other = next((word for word in candidates if re.match(rf"(the )?{word}\b", before[match.end():], re.I)),
                             None)
                found.append((match.start(), *((one, other) if forward else (other, one))))
    return [(winner, loser) for _, winner, loser in sorted(set(found), key=lambda row: row[0]) if winner or loser]


def test_comparison_follows_from_the_text(sample):
    for story, span, before, right in spans(sample, "comparison"):
        text, after = near(story, span)
        people = right in LISTS["names"] + LISTS["animal names"]
        pairs = comparisons(before[-600:], [bare(right), bare(span["wrong"])], people)
        wins = {pairs[-1][0]}
        if "Their friend" in "".join(before.split("\n")[-2:]):  # a chain of three
            wins = {winner for winner, _ in pairs[-2:]}
        if re.search("two points|winner of it all|against one", before[-100:], re.I):  # of a tournament
            wins = {collections.Counter(winner for winner, _ in pairs[-3:]).most_common(1)[0][0]}
        loses = re.search(f"({LOSER_BEFORE}).*$", text[-35:], re.I) or re.search(LOSER_AFTER, after)
        wanted = finds("the (heavy|light|big|small|old|new|clean|dirty|pretty|ugly|dry|wet) one", before)
        if wanted and text.endswith("the ") and "belongs to" not in text:
            loses = wanted[-1][1].lower() in ("light", "small", "new", "dirty", "ugly", "wet")
        assert (bare(right) in wins) == (not loses), (text, right, after, story)


def rule_of(before):
    """{case: what is to be taken or worn then}, of the last rule with two cases."""
    before = re.sub(r',?" (said [\w ]+|[\w ]+ said)[,.] "', ", ", before)  # "If it rains," said Mia, "we will …"
    wear = re.findall(r"If it is (cold|warm), wear the (\w+)", before) \
        or [pair[::-1] for pair in re.findall(r"(\w+) \w+ on (cold|warm) days", before)] \
        or [("cold", color) for color in re.findall(r"[Tt]he (\w+) (?:ones were thick|\w+ keep out)", before)] \
        + [("warm", color) for color in re.findall(r"the (\w+) ones (?:were for summer|are light)", before)]
    take = [(match.start(), match[1], match[2]) for match in re.finditer(
        r"[Ii]f ([a-z ]+), (?:let us take |we will take )?the ([\w -]+?)[.,]", before)]
    take += [(match.start(), match[2], match[1]) for match in re.finditer(
        r"the ([\w -]+?) if ([a-z ]+?)[.,]", before)]
    cases = {case for row in WORDS["signs"] for case in row[:2]}
    return dict(wear[-2:]), {case: thing for _, case, thing in sorted(take) if case in cases}


def test_consequence_follows_from_the_text(sample):
    for story, span, before, right in spans(sample, "consequence"):
        text, after = near(story, span)
        wear, take = rule_of(before)
        if re.match(" (ones|" + "|".join(forms_of(word)["s"] for word in LISTS["pairs"]) + ")", after):
            cold, warm = (max(match.start() for match in [*finds(cue, before), *finds("^", before)]) for cue in (
                "ice on|own breath|freezing|cold wind", "for shade|sun was hot|sun was so hot|hot as in an oven"))
            expected = wear["cold" if cold > warm else "warm"]
        elif bare(right) in take.values():
            shown = [(before.rfind(sign), case) for case, other, *signs in WORDS["signs"]
                     for sign, case in zip(signs, (case, other))]
            expected = take[max(shown)[1]]
        else:
            plan, morning = re.split(r"\n(?=In the morning|When \w+ woke|The next day|All night)", before)
            rain = re.search("drops on the window|puddles|umbrellas|down the glass|coming down", morning)
            clause, day, wet = ("it rains", "rainy", "wet") if rain else ("the sun shines", "sunny", "sunny")
            expected = next(match[1] for match in (
                re.search(rf"if {clause}(?: tomorrow)?, we will go to the ([a-z ]+)[.,]", plan, re.I),
                re.search(rf"{day} day they would go to the ([a-z ]+?)(?:\.|,| and)", plan),
                re.search(rf"to the ([a-z]+(?: [a-z]+)?) if it is {wet}", plan)) if match)
        other = re.search("(left|told|not need|no need for|what about|will take|thought of|another day for) the $|"
                          "[.,:] (and )?the $", text, re.I) or after.startswith((" stayed", " had to wait"))
        assert (bare(right) == expected) == (not other), (text, right, after, expected, story)


# what rules out a word, in all its forms
RULES_OUT = {"either-or": r"looked in {one}\b|not (in |at |to )?{one}\b|is it {one}\?.*no!|in(to)? the {word} one\b|"
                          r"(found|was|is) an? {word}\b(?! or| bag)|the {word} one is empty|"
                          r"the {word} (had been|had slept|was with me|in the shed)",
             "negation": r"not (to )?like {many}\b|never (ate|eats|want) ({many}|{one})\b|not (want )?{one}\b|"
                         r"not eat {many}\b|afraid of {many}\b"}
# what stands before and after an answer that says what became of a thing that was ruled out
LEFT_OVER_BEFORE = (r"((to eat|nobody ate|have|and s?he petted|at all and went to|will take|that left|got|wanted|"
                    r"nobody looked in|closed|done with|threw away|and left|need|angry with|sorry,\".* to) the|"
                    r"does not like) $")
LEFT_OVER_AFTER = "^ stayed on|^ had done nothing"


@pytest.mark.parametrize("kind", RULES_OUT)
def test_the_wrong_answer_was_ruled_out_before(kind, sample):
    """Or the right one, where the answer is about what was left over."""
    singular = {form: word for names in ("fruits", "treats", "pet-wishes") for word in LISTS[names]
                for form in (word, forms_of(word)["s"])}
    for story, span, before, right in spans(sample, kind):
        matches = []
        for answer in (bare(right), bare(span["wrong"])):
            word = singular.get(answer, answer) if kind == "negation" else answer
            one, many = f"(an?|the) {re.escape(word)}", forms_of(word)["s"]
            matches.append(finds(RULES_OUT[kind].format(one=one, many=many, word=word), before))
        text, after = near(story, span)
        if all(matches):  # one guest of the party does not like the one thing, and one the other
            guests = [re.findall(r"[A-Z]\w+", before[:match[-1].start()])[-1] for match in matches]
            named = [name for name in re.findall(r"\w+", text) if name in guests][-1:]
            named = re.findall(r'^(?: for|,") (\w+)', after) or named
            ruled_out = [guest == named[0] for guest in guests]
        else:
            ruled_out = [bool(match) for match in matches]
        left_over = re.search(LEFT_OVER_BEFORE, text, re.I) or re.search(LEFT_OVER_AFTER, after)
        assert ruled_out == [bool(left_over), not left_over], (text, right, after, story)


def test_exclusion_follows_from_the_text(sample):
    """Who may not have what was asked for gets the other thing; who may, gets it."""
    for story, span, before, right in spans(sample, "exclusion"):
        text, _ = near(story, span)
        asked = [match for match in finds(r'(have|asked for|pointed\. "|want|wanted|ran to) ?(an?|the) '
                                          r"([a-z -]+?)(\?|\.|,| most| so| one)", before)
                 if match[3].lower() in (bare(right), bare(span["wrong"]))]
        asked = [match for match in asked if match.start() > before.rfind("\n", 0, asked[-1].start())][0]
        denied = re.search("I am sorry|No, |shook (her|his) head|was faster|was there first|on it already",
                           before[asked.end():].split("\n")[0])
        left = re.search(r"(left|put away|stayed there was|bought|told|liked|Mine is|waved from|what was left:) the $"
                         r"|\bThe $", text)
        assert ((asked[3].lower() == bare(right)) == (not denied)) != bool(left), (text, right, story)


def test_exchange_follows_from_the_text(sample):
    """Follows who has what, trade by trade."""
    has = r"(?:'s plate was| had just got| had brought| had| took| brought| came with) an? "
    trade = r"they did\.|traded|swapped|changed plates|\btook the [\w -]+ from|Then \w+ handed over" \
        r"|, and \w+ gave"
    solved = 0
    for story, span, before, right in spans(sample, "exchange"):
        owner, end = {}, 0
        before = before[-600:]
        for thing in (bare(right), bare(span["wrong"])):
            for match in re.finditer(rf"\b(?:[A-Z]\w+ )?([A-Z]\w+){has}(?:[\w-]+ )?{re.escape(thing)}\b", before):
                owner[thing], end = match[1], max(end, match.end())
        sentence, since = re.split(r"[.!?]", before)[-1], before[end:]
        asked = [name for name in re.findall(r"\w+", sentence) if name in owner.values()][-1:] \
            or [name for name in re.findall(r"\w+", near(story, span)[1]) if name in owner.values()][:1]
        if re.match(" (He|She) ", sentence):  # whoever that is
            continue
        if len(set(owner.values())) == 2 and asked and "\nThen " not in since and "\nAfter a while" not in since:
            trades = len(re.findall(trade, since))
            assert (owner[bare(right)] == asked[0]) == (trades % 2 == 0), (sentence, right, story)
            solved += 1
    assert solved > 1000


def test_belief_follows_from_the_text(sample):
    """Whoever saw the thing moved looks where it is; whoever did not, where it was."""
    for story, span, before, right in spans(sample, "belief"):
        text, after = near(story, span)
        moved = finds(r"(?:put (?:it|the [\w-]+(?: [\w-]+)?)|left it|hid it) in (?:the|an?) ([a-z ]+)\.", before)[-1]
        saw = re.search(r"saw it|saw everything|seen everything|told \w+(?: \w+)? all about it|away and saw it",
                        before[moved.end():])
        other = re.search("(not in|look at|not to|not go to|past) the $", text) or after.startswith(" stayed shut")
        assert moved[1].lower() in (bare(right), bare(span["wrong"])), story
        assert ((bare(right) == moved[1].lower()) == bool(saw)) != bool(other), (text, right, story)


# -----------------------------------------------------------------------------------------------------------------
# bits, scales, chains


def test_bits_are_minus_log2_of_the_probability(sample):
    probability = {}
    for i in range(3000):
        tale = world.lego(random.Random(i), 1, 1)
        if tale.split == "train":
            probability[tale.text] = 2 ** -tale.bits
    assert len(probability) == 26 * 2
    assert sum(probability.values()) == pytest.approx(1 - world.VAL_SHARE)
    tale = world.Tale(random.Random(1))
    assert tale.choose("abcd") in "abcd" and tale.bits == 2
    assert tale.choose("ab", (0, 1)) == "b" and tale.chance(1) and not tale.chance(0) and tale.bits == 2
    assert 2 + math.log2(4 if tale.choose("ab", (3, 1)) == "b" else 4 / 3) == pytest.approx(tale.bits)
    assert all(record["bits"] > 50 for record in sample)


def test_the_choices_paid_for_are_all_that_makes_a_story(monkeypatch):
    """Told again from its list of choices, without chance, each story is the same; and the list costs its bits."""
    choose, chance = world.Tale.choose, world.Tale.chance
    for i in range(200):
        choices = []  # (index of the option or outcome of the chance, probability)

        def record_choice(tale, options, weights=None):
            chosen = choose(tale, options, weights)
            k = next(k for k, option in enumerate(options) if option is chosen or option == chosen)
            choices.append((k, weights[k] / sum(weights) if weights else 1 / len(options)))
            return chosen

        def record_chance(tale, p):
            happens = chance(tale, p)
            choices.append((happens, p if happens else 1 - p))
            return happens
        monkeypatch.setattr(world.Tale, "choose", record_choice)
        monkeypatch.setattr(world.Tale, "chance", record_chance)
        tale = world.tell_story(random.Random(i))
        assert -sum(math.log2(p) for _, p in choices) == pytest.approx(tale.bits)
        replay = iter(choices)
        monkeypatch.setattr(world.Tale, "choose", lambda tale, options, weights=None: options[next(replay)[0]])
        monkeypatch.setattr(world.Tale, "chance", lambda tale, p: next(replay)[0])
        assert world.tell_story(None).text == tale.text and next(replay, None) is None


@pytest.mark.parametrize("setting, skill", [("facts", "fact"), ("context", "context"), ("reasoning", "reasoning")])
def test_a_setting_scales_its_skill(setting, skill):
    def count(scale):
        return sum(span["skill"] == skill for record in world.stories(300, 3, **{setting: scale})
                   for span in record["spans"])
    nothing, normal, much = count(0.0), count(1.0), count(4.0)
    assert nothing < 0.8 * normal and 100 < normal < 0.7 * much
    if setting == "facts":  # plots of other groups have some context and reasoning
        assert nothing == 0


@pytest.mark.parametrize("in_order", [True, False])
def test_lego_chains_resolve(in_order):
    longest, depths = {"train": 0, "val": 0}, set()
    for record in world.stories(2000, 2, "lego", min_vars=2, max_vars=5, in_order=in_order):
        given, resolved = record["story"].split("\n")
        clauses = dict(re.findall(r"([a-z])=([+-][a-z1])", given))
        longest[record["split"]] = max(longest[record["split"]], len(clauses))

        def resolve(name):
            """(place in the chain, value) of a variable."""
            sign, source = clauses[name]
            place, value = (-1, 1) if source == "1" else resolve(source)
            return place + 1, value if sign == "+" else -value

        answers = re.findall(r"([a-z])=([+-]1)", resolved)
        assert len(answers) == len(clauses) == len(record["spans"])
        known = {-1}  # places in the chain whose values can be read
        for (name, answer), span in zip(answers, record["spans"]):
            place, value = resolve(name)
            assert value == int(answer) == -int(span["wrong"])
            assert record["story"][span["start"]:span["end"]] == answer
            assert span["depth"] == min(abs(place - other) for other in known) - 1
            if not in_order:
                known.add(place)
            depths.add(span["depth"])
    assert longest == {"train": 5, "val": 10} and max(depths) > 5


# -----------------------------------------------------------------------------------------------------------------
# the file and the command


def test_the_command_writes_a_file_and_says_what_is_in_it(workplace, capsys):
    world.main(["--n=50", "--seed=3", "--name=small", "--facts=3", "--reasoning=0.5"])
    lines = (workplace / "data/small/stories.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(world.stories(50, 3, facts=3.0, reasoning=0.5))
    assert os.listdir(workplace / "data/small") == ["stories.jsonl"]
    assert "bits per byte" in capsys.readouterr().out
    world.main(["--n=1", "--kind=lego", "--min_vars=8", "--max_vars=8", "--in_order=False"])
    record = json.loads((workplace / "data/lego/stories.jsonl").read_text())
    assert record == next(world.stories(1, 1, "lego", min_vars=8, max_vars=8, in_order=False))
    out = capsys.readouterr().out
    assert "1 stories (0 for val)" in out and "raise --n" in out and "next:" not in out


@pytest.mark.parametrize("argument", ["--n=0", "--max_vars=2", "--min_vars=0", "--kind=poem", "--fact=2", "--facts=-1"])
def test_bad_input_ends_in_one_line(argument, capsys):
    with pytest.raises(SystemExit) as stopped:
        world.main([argument])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_cut_off_leaves_the_old_stories(workplace, monkeypatch, fault):
    path, _ = world.write(3)
    before = (workplace / path).read_bytes()

    def broken(*settings, **more_settings):
        yield json.loads(before.splitlines()[0])
        raise fault
    monkeypatch.setattr(world, "stories", broken)
    with pytest.raises((KeyboardInterrupt, OSError)):
        world.write(3)
    assert (workplace / path).read_bytes() == before and os.listdir(workplace / "data/world") == ["stories.jsonl"]


# -----------------------------------------------------------------------------------------------------------------
# data/words.json


def test_vocabulary():
    total = 0
    for part in ("nouns", "verbs", "adjectives"):
        words = [word for group in WORDS[part].values() for word in group]
        assert len(words) == len(set(words)), [word for word in words if words.count(word) > 1]
        assert all(re.fullmatch("[A-Za-z -]+", word) for word in words)
        total += len(words)
    assert 1800 < total < 2300


def strings_in(node):
    if isinstance(node, str):
        return [node]
    return [text for child in (node.values() if isinstance(node, dict) else node) for text in strings_in(child)]


def test_every_telling_can_be_parsed():
    scenes = [scene["lines"] for scenes in WORDS["scenes"].values() for scene in scenes.values()]
    plots = [[plot["lines"], plot["summary"]] for group in WORDS["plots"].values() for plot in group.values()]
    others = [WORDS[key] for key in ("frame", "fact tellings", "omens")]
    for telling in strings_in([scenes, plots, others]):
        for wording in parse(telling):
            for part in wording:
                assert not isinstance(part, str) or not re.search(r"[{}<>\[\]|@]", part), telling


def test_every_step_and_every_sentence_is_known():
    for name, plot in world.PLOTS.items():
        steps = strings_in([plot["cast"], plot["plot"]])
        assert {step.split()[0] for step in steps} <= set(STEPS)
        said = {name.strip("!?~") for step in steps if step.startswith("say ") for name in step.split()[1:]} - {"/"}
        own_lines = set(WORDS["plots"][plot["group"]][name]["lines"])
        assert own_lines - said - {"bad-moral"} == {"bad", "twist", "moral", "end"}, name
        assert said <= set(plot["lines"]), name
    for name, scene in {**WORDS["scenes"]["reasoning"], **WORDS["scenes"]["tracking"]}.items():
        steps = strings_in(scene["plot"])
        assert {step.split()[0] for step in steps} <= set(STEPS)
        said = {name.strip("!?~") for step in steps if step.startswith("say ") for name in step.split()[1:]} - {"/"}
        assert set(scene["lines"]) - {"end"} == said, name


def test_stories_that_exist_are_not_replaced(workplace, capsys):
    world.main(["--n=3", "--name=w"])
    assert "exists: choose another name" in error_of(world.main, ["--n=5", "--name=w"], capsys)

"""The story world: its state, its sentences, and above all that the marked answers follow from the text alone."""
import collections
import json
import math
import os
import random
import re

import pytest

from conftest import error_of
from generate import FEATURES
from lab import world
from prepare import fingerprint

NUMBERS = {word: n for n, word in enumerate("none one two three four five six seven eight nine ten".split())}
CONTEXT = ["who", "what", "where"]
REASONING = ["exclusion", "negation", "either-or", "exchange", "comparison", "consequence", "belief", "counting"]


@pytest.fixture(scope="session")
def sample():
    return list(world.stories(5000, seed=11))


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
        assert 40 < len(story.split()) < 300 and story.count("\n") >= 2, story
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
            assert word in world.VOCABULARY[part]
            forms = "|".join(re.escape(form.lower()) for form in world.forms_of(word).values())
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
    for article, word in articles:
        vowel = word[0].lower() in "aeiou" and not word.startswith(like_you) or word.startswith(silent)
        assert (article.lower() == "an") == vowel, f"{article} {word}"


def test_agreement_and_tense(sample):
    wrong = re.compile(r"\b(they|we|you) (was|is|has|likes|wants)\b|\b(he|she|it) (were|are|have|do|want|like)\b"
                       r"|\bI (is|are|has)\b|\bthere was (two|many)\b|\b(did|could|would|must) not [a-z]+ed\b"
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
    assert {word: world.forms_of(word)[form] for word in expected} == expected


def test_where_all_are_female_nobody_is_called_he():
    female = [tale for tale in stories_told(1500) if all(entity.pronoun != "he" for entity in tale.roles.values())]
    assert len(female) > 50
    for tale in female:
        assert not re.search(r"\b([Hh]e|[Hh]im|[Hh]is)\b", tale.text), tale.text


# -----------------------------------------------------------------------------------------------------------------
# the notation and the state


def test_the_record_at_the_top_of_the_file_is_real():
    rng = random.Random(1 << 40 | 22652)
    record = world.record_of(world.tell_story(rng))
    assert record["plot"] == "exclusion" and f'"summary": "{record["summary"]}"' in world.__doc__
    for span in record["spans"][-3:-1]:
        assert json.dumps(span) in world.__doc__
    for key in ("bits", "words", "features"):
        assert f'"{key}": {json.dumps(record[key])}' in world.__doc__
    for sentence in (record["story"][:20], "So Pia chose the other thing, and they went home with a puppet."):
        assert sentence in record["story"] and sentence in world.__doc__


def test_a_telling_has_a_wording_for_each_choice_and_parts_to_fill_in():
    assert world.parse("[So|And] {a} <went|go>.") == [
        [first, world.Role(["a"], "", "reasoning", "", [""], False), " ", world.Pair("went", "go", ["go"]), "."]
        for first in ("So ", "And ")]
    role, = world.parse("{x_place.in!where/y_place}")[0]
    assert role == world.Role(["x", "place"], "in", "context", "where", ["y", "place"], True)
    word = world.parse("The {@toys.s}")[0][1]
    assert (word.words, word.form, word.word_class, word.capital) == (world.LISTS["toys"], "s", "nouns", False)


def test_a_small_plot_does_what_the_top_of_the_file_says():
    tale = world.Tale(random.Random(1))
    tale.cast()
    tale.lines = {"likes": ["{p1.an} and {p2.an}?"], "no": ["Not {x.an}."],
                  "then": ["{a*} <took|take> {y!exclusion/w}."]}
    tale.follow(["things x,y toys", "mix p1,p2 x,y", "say likes / no", {"1": ["mix y,w y,x 1"]}, "say then", "own y a"])
    name, x, y = (tale.roles[role].forms[""] for role in "axy")
    assert tale.text.endswith(f"?\nNot {world.article(x)} {x}. {name} took {y}. ")
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
    bare_article, article = world.article(word), world.article(adjective)
    assert tale.text.lower() == (f"{bare_article} {word} {article} {adjective} {word} {adjective} {word} "
                                 f"{article} {adjective} {word} ")


def test_nobody_gives_what_they_do_not_have(monkeypatch):
    given = []

    def give(tale, thing, giver, taker):
        assert tale.roles[thing].owner is tale.roles[giver] and tale.roles[thing] in tale.roles[giver].has
        tale.give(thing, giver, taker)
        assert tale.roles[thing].owner is tale.roles[taker] and tale.roles[thing] not in tale.roles[giver].has
        given.append(thing)
    monkeypatch.setitem(world.STEPS, "give", give)
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
    for table in world.WORDS["facts"].values():
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


def test_pairs_of_val_never_occur_in_train(sample):
    pairs = {"train": set(), "val": set()}
    for record in sample:
        for _, span, _, right in spans([record], *CONTEXT, *REASONING):
            pairs[record["split"]].add((span["kind"], frozenset((bare(right), bare(span["wrong"])))))
    assert not pairs["train"] & pairs["val"]
    assert {kind for kind, _ in pairs["val"]} == {*CONTEXT, *REASONING}


# -----------------------------------------------------------------------------------------------------------------
# the answers follow from the text: each test reads the story up to the answer, and nothing else


def test_counting_follows_from_the_text(sample):
    for story, span, before, right in spans(sample, "counting"):
        numbers = [match for match in re.finditer("[a-z]+", before.lower()) if NUMBERS.get(match[0], 1) > 1]
        have, change = (NUMBERS[match[0]] for match in numbers[-2:])
        if before[numbers[-1].end():].startswith(" more"):
            assert NUMBERS[right] == have + change, story
        else:
            assert NUMBERS[right] == have - change, story


def test_comparison_follows_from_the_text(sample):
    solved = 0
    for story, span, before, right in spans(sample, "comparison"):
        for _, more, less in world.WORDS["deeds"]:
            beats = [(a, b) for a, b in re.findall(rf"(\w+) {more} (\w+)", before)]
            beats += [(b, a) for a, b in re.findall(rf"(\w+) {less} (\w+)", before)]
            if beats:
                winners, losers = {a for a, _ in beats}, {b for _, b in beats}
                assert right in winners - losers and span["wrong"] in losers, story
                solved += 1
    assert solved > 120


def test_consequence_follows_from_the_text(sample):
    solved = 0
    for story, span, before, right in spans(sample, "consequence"):
        if story.startswith(" ones", span["end"]):
            wear = dict(re.findall(r"(cold|warm), wear the (\w+)", before)
                        or [pair[::-1] for pair in re.findall(r"(\w+) socks on (cold|warm) days", before)])
            assert right == wear["cold" if re.search("ice on|own breath|freezing", before) else "warm"], story
            continue
        plan, morning = before.rsplit("\n", 1)
        rain = bool(re.search("drops on the window|puddles|umbrella|down the glass|coming down", morning))
        dry = "not one cloud|light was so bright|sky was blue|yellow light|street was dry"
        assert rain != bool(re.search(dry, morning))
        clause, day, wet = ("it rains", "rainy", "wet") if rain else ("the sun shines", "sunny", "sunny")
        place = "((?:[a-z]+ )?[a-z]+)"
        match = re.search(rf"if {clause}(?: tomorrow)?, we will go to the {place}[.,]", plan, re.I) \
            or re.search(rf"{day} day they would go to the {place}(?:\.|,| and)", plan) \
            or re.search(rf"to the {place} if it is {wet}", plan)
        assert match and match[1] == right, story
        solved += 1
    assert solved > 120


@pytest.mark.parametrize("kind", ["either-or", "negation"])
def test_the_wrong_answer_was_ruled_out_before(kind, sample):
    for story, span, before, _ in spans(sample, kind):
        wrong = bare(span["wrong"])
        one, many = f"an? {wrong}", world.forms_of(wrong)["s"]
        ruled_out = {
            "either-or": rf"(looked in|not in) the {wrong}|(is|was|see) not {one}|Is it {one}.*No!|the {wrong} "
                         r"(had been (away|asleep|at the|with)|was with me|in the shed)",
            "negation": f"(not|not to) like {many}|never (ate|want) ({many}|{one})|not (want )?{one}|not eat {many}"}
        assert re.search(ruled_out[kind], before, re.I), (wrong, story)


def test_exclusion_follows_from_the_text(sample):
    """Who may not have what was asked for gets the other thing; who may, gets it."""
    for story, span, before, right in spans(sample, "exclusion"):
        shop = before.rsplit("\n", 1)[1]
        asked = re.search(r'(have|asked for|pointed\. "|want) ?(an?) ([a-z -]+?)(\?|\.|,| most| so)', shop, re.I)[3]
        refused = re.search("I am sorry|No, not|shook (her|his) head", shop)
        assert asked == bare(span["wrong"] if refused else right), story


def test_exchange_follows_from_the_text(sample):
    """At lunch, each eats what the other brought."""
    solved = 0
    for story, span, before, right in spans(sample, "exchange"):
        lunch = re.search(r"(\w+) had (?:brought )?an? ([a-z]+)(?: for lunch, and|\.|,? and) (\w+) had an? ([a-z]+)\. "
                          r"[^\n]*?([A-Z]\w+) (?:ate|got to eat|ate was|had) the $", before)
        if lunch:
            one, ones, other, others, eats = lunch.groups()
            assert right == {one: others, other: ones}[eats], story
            solved += 1
    assert solved > 120


def test_belief_follows_from_the_text(sample):
    """Whoever saw the thing moved looks where it is; whoever did not, where it was."""
    for story, span, before, right in spans(sample, "belief"):
        saw = re.search("saw it all|saw everything|told \\w+ all about it", before)
        moved = re.search(r"(?:put it in|left it in|hid it in) the ([a-z ]+)\.", before.rsplit("\n", 1)[1])[1]
        assert (right == moved) == bool(saw) and moved in (right, span["wrong"]), story


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


@pytest.mark.parametrize("setting, skill", [("facts", "fact"), ("reasoning", "reasoning")])
def test_a_setting_scales_its_skill(setting, skill):
    def count(scale):
        return sum(span["skill"] == skill for record in world.stories(600, 3, **{setting: scale})
                   for span in record["spans"])
    assert count(0.0) == 0 < 100 < count(1.0) < 0.7 * count(4.0)


@pytest.mark.parametrize("in_order", [True, False])
def test_lego_chains_resolve(in_order):
    longest, depths = {"train": 0, "val": 0}, set()
    for record in world.stories(2000, 2, "lego", min_vars=2, max_vars=5, in_order=in_order):
        given, resolved = record["story"].split("\n")
        clauses = dict(re.findall(r"([a-z]) = ([+-][a-z1])", given))
        longest[record["split"]] = max(longest[record["split"]], len(clauses))

        def resolve(name):
            """(place in the chain, value) of a variable."""
            sign, source = clauses[name]
            place, value = (-1, 1) if source == "1" else resolve(source)
            return place + 1, value if sign == "+" else -value

        answers = re.findall(r"([a-z]) = ([+-]1)", resolved)
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
        words = [word for group in world.WORDS[part].values() for word in group]
        assert len(words) == len(set(words)), [word for word in words if words.count(word) > 1]
        assert all(re.fullmatch("[A-Za-z -]+", word) for word in words)
        total += len(words)
    assert 1800 < total < 2300


def strings_in(node):
    if isinstance(node, str):
        return [node]
    return [text for child in (node.values() if isinstance(node, dict) else node) for text in strings_in(child)]


def test_every_telling_can_be_parsed():
    asides = [aside["lines"] for aside in world.WORDS["asides"].values()]
    plots = [[plot["lines"], plot["summary"]] for group in world.WORDS["plots"].values() for plot in group.values()]
    others = [world.WORDS[key] for key in ("frame", "fact tellings", "omens")]
    for telling in strings_in([asides, plots, others]):
        for wording in world.parse(telling):
            for part in wording:
                assert not isinstance(part, str) or not re.search(r"[{}<>\[\]|@]", part), telling


def test_every_step_and_every_sentence_is_known():
    for name, plot in world.PLOTS.items():
        steps = strings_in([plot["cast"], plot["plot"]])
        assert {step.split()[0] for step in steps} <= set(world.STEPS)
        said = {name.strip("!?~") for step in steps if step.startswith("say ") for name in step.split()[1:]} - {"/"}
        own_lines = set(world.WORDS["plots"][plot["group"]][name]["lines"])
        assert own_lines - said - {"bad-moral"} == {"bad", "twist", "moral"}, name
        assert said <= set(plot["lines"]), name


def test_stories_that_exist_are_not_replaced(workplace, capsys):
    world.main(["--n=3", "--name=w"])
    assert "exists: choose another name" in error_of(world.main, ["--n=5", "--name=w"], capsys)

"""The story world: its state, its sentences, and above all that the marked answers follow from the text alone."""
import collections
import json
import os
import math
import random
import re

import pytest

import prepare
import world

SAMPLE = list(world.stories(12000, seed=11))
NUMBERS = {word: n for n, word in enumerate("none one two three four five six seven eight nine ten".split())}
REASONING = {"exclusion", "negation", "either-or", "exchange", "comparison", "consequence", "belief", "counting"}


def spans(*kinds):
    """(story, span, the text before it, the answer) for all spans of some kinds, or of context and reasoning."""
    for told in SAMPLE:
        for span in told["spans"]:
            if span.get("kind", "") in kinds if kinds else span["skill"] in ("context", "reasoning"):
                yield told, span, told["story"][:span["start"]], told["story"][span["start"]:span["end"]]


def bare(text):
    """The word in "at the park", "an apple", "Tom's"."""
    return re.sub(r"^((in |at )?the|an?) |'s$", "", text, flags=re.I).lower()


# what is written

def test_story_i_depends_on_seed_and_i_alone():
    few, many = list(world.stories(3, seed=5)), list(world.stories(30, seed=5))
    assert few == many[:3]
    assert [told["story"] for told in world.stories(3, seed=6)] != [told["story"] for told in few]


def test_stories_are_varied():
    stories = [told["story"] for told in SAMPLE]
    assert len({prepare.fingerprint(story) for story in stories}) > 0.999 * len(stories)
    openings = collections.Counter(re.split(r"(?<=[.!?])\"?\s", story)[0] for story in stories)
    assert openings.most_common(1)[0][1] < 0.01 * len(stories)
    assert sum("Once upon a time" in story for story in stories) < 0.25 * len(stories)
    assert len({word for story in stories for word in re.findall("[a-z]+", story.lower())}) >= 1200
    assert len({told["plot"] for told in SAMPLE}) >= 16


def test_stories_look_like_stories():
    for told in SAMPLE:
        story = told["story"]
        assert 40 < len(story.split()) < 300 and story.count("\n") >= 2, story
        assert story[0].isupper() or story[0] == '"'
        assert story.isascii() and story[-1] in '.!?"' and story.count('"') % 2 == 0, story
        assert not re.search(r"[{}<>\[\]|@*_“”]|  | \n|\n |\n\n|[.!?] [a-z]| [,.!?]", story), story
        assert told["summary"][-1] == "." and not re.search(r"[{}<>|]", told["summary"])


def test_words_and_features_are_really_there():
    carried = collections.defaultdict(set)
    for told in SAMPLE:
        text = told["story"].lower()
        assert len(told["words"]) == 3, told
        for word, name in zip(told["words"], ("verbs", "nouns", "adjectives")):
            assert word in world.VOCABULARY[name]
            forms = "|".join(re.escape(form.lower()) for form in world.forms_of(word).values())
            assert re.search(rf"\b({forms})\b", text), told
        assert ("dialogue" in told["features"]) == ('"' in told["story"])
        assert set(told["features"]) <= set(world.FEATURES) and len(set(told["features"])) == len(told["features"])
        carried[told["plot"]] |= set(told["features"])
    assert all(features == set(world.FEATURES) for features in carried.values()), carried


# grammar

def test_articles():
    silent, like_you = ("hour", "honest"), ("unicorn", "uniform", "useful")
    found = 0
    for told in SAMPLE[:6000]:
        for article, word in re.findall(r"\b([Aa]n?) ([A-Za-z]+)", told["story"]):
            vowel = word[0].lower() in "aeiou" and not word.startswith(like_you) or word.startswith(silent)
            assert (article.lower() == "an") == vowel, f"{article} {word} in: {told['story']}"
            found += 1
    assert found > 10000


def test_agreement_and_tense():
    wrong = re.compile(r"\b(they|we|you) (was|is|has|likes|wants)\b|\b(he|she|it) (were|are|have|do|want|like)\b"
                       r"|\bI (is|are|has)\b|\bthere was (two|many)\b|\b(did|could|would|must) not [a-z]+ed\b"
                       r"|\bto (went|was|had|were)\b|\b(a|an|the) (a|an|the)\b|\b(?P<word>[a-z]+) (?P=word)\b")
    for told in SAMPLE:
        assert not wrong.search(told["story"]), (wrong.search(told["story"]), told["story"])
    for text in ("then they was sad", "she did not wanted it", "the ball ball"):
        assert wrong.search(text)


def test_forms():
    past = {"hop": "hopped", "play": "played", "cry": "cried", "bake": "baked", "run": "ran", "skip": "skipped"}
    ing = {"hop": "hopping", "lie": "lying", "bake": "baking", "cry": "crying", "play": "playing", "swim": "swimming"}
    plural = {"cherry": "cherries", "box": "boxes", "mouse": "mice", "toy": "toys", "wolf": "wolves", "bus": "buses"}
    for form, table in (("past", past), ("ing", ing), ("s", plural)):
        assert {word: world.forms_of(word)[form] for word in table} == table


def test_where_all_are_female_nobody_is_called_he():
    found = 0
    for i in range(3000):
        tale = world.tell(random.Random(i))
        if all(entity.he != "he" for entity in tale.roles.values()):
            found += 1
            assert not re.search(r"\b([Hh]e|[Hh]im|[Hh]is)\b", "".join(tale.parts)), "".join(tale.parts)
    assert found > 100


# the state

def test_nobody_gives_what_they_do_not_have():
    given = 0
    for i in range(3000):
        ledger = {}
        for act, thing, owner, *giver in world.tell(random.Random(i)).events:
            if act == "give":
                assert ledger[thing] is giver[0] and giver[0] is not owner
                given += 1
            ledger[thing] = owner
        assert all(thing.owner is owner and thing in owner.has for thing, owner in ledger.items())
    assert given > 500
    tale = world.Tale(random.Random(1))
    tale.cast()
    tale.thing("x", "toys")
    tale.own("x", "a")
    with pytest.raises(ValueError, match="b cannot give x"):
        tale.give("x", "b", "a")


# spans

def test_spans_point_at_words():
    skills = collections.Counter()
    for told in SAMPLE:
        last, story = 0, told["story"]
        for span in told["spans"]:
            right = story[span["start"]:span["end"]]
            assert last <= span["start"] < span["end"] <= len(story)
            assert right != span["wrong"] and right.strip() == right
            assert right[0].isupper() == span["wrong"][0].isupper()
            assert not (story[span["start"] - 1:span["start"]] + right[0]).isalnum()
            assert not (right[-1] + story[span["end"]:span["end"] + 1]).isalnum()
            last = span["end"]
            skills[span["skill"]] += 1
    assert set(skills) == {"grammar", "fact", "context", "reasoning"} and min(skills.values()) > 4000
    assert {span["kind"] for _, span, _, _ in spans()} == REASONING | {"who", "what", "where"}


def test_wrong_facts_are_wrong():
    for table in world.WORDS["facts"].values():
        assert len(set(table.values())) == len(table) > 3


@pytest.mark.parametrize("kind", sorted(REASONING | {"who", "what", "where"}))
def test_the_nearest_and_the_most_frequent_candidate_are_mostly_wrong(kind):
    nearest, frequent, n = 0, 0, 0
    for _, span, before, right in spans(kind):
        places = [[m.start() for m in re.finditer(rf"\b{re.escape(bare(word))}", before.lower())]
                  for word in (right, span["wrong"])]
        last = [place[-1] if place else -1 for place in places]
        nearest += last[1] > last[0]
        frequent += (len(places[1]), last[1]) > (len(places[0]), last[0])
        n += 1
    assert n > 200 and nearest >= n / 2 and frequent >= n / 2, (n, nearest / n, frequent / n)


def test_val_pairs_never_occur_in_train():
    pairs = {"train": set(), "val": set()}
    for told, span, _, right in spans():
        pairs[told["split"]].add((span["kind"], frozenset((bare(right), bare(span["wrong"])))))
    assert not pairs["train"] & pairs["val"]
    assert {kind for kind, _ in pairs["val"]} == REASONING | {"who", "what", "where"}


# the answers follow from the text: each of these reads the story up to the answer, and nothing else

def test_counting_follows_from_the_text():
    solved = 0
    for told, span, before, right in spans("counting"):
        numbers = [found for found in re.finditer("[a-z]+", before.lower()) if NUMBERS.get(found[0], 1) > 1]
        have, change = (NUMBERS[found[0]] for found in numbers[-2:])
        more = re.match(" more", before[numbers[-1].end():])
        assert NUMBERS[right] == (have + change if more else have - change), told["story"]
        solved += 1
    assert solved > 500


def test_comparison_follows_from_the_text():
    solved = 0
    for told, span, before, right in spans("comparison"):
        for _, more, less in world.WORDS["deeds"]:
            beats = [(a, b) for a, b in re.findall(rf"(\w+) {more} (\w+)", before)]
            beats += [(b, a) for a, b in re.findall(rf"(\w+) {less} (\w+)", before)]
            if beats:
                assert right in {a for a, _ in beats} - {b for _, b in beats}, told["story"]
                assert span["wrong"] in {b for _, b in beats}
                solved += 1
    assert solved > 300


def test_consequence_follows_from_the_text():
    solved = 0
    for told, span, before, right in spans("consequence"):
        if told["story"].startswith(" ones", span["end"]):
            wear = dict(re.findall(r"(cold|warm), wear the (\w+)", before)
                        or [pair[::-1] for pair in re.findall(r"(\w+) socks on (cold|warm) days", before)])
            assert right == wear["cold" if re.search("ice on|own breath|freezing", before) else "warm"], told["story"]
            solved += 1
            continue
        plan, morning = before.rsplit("\n", 1)
        rain = bool(re.search("drops on the window|puddles|umbrella|down the glass|coming down", morning))
        dry = "not one cloud|light was so bright|sky was blue|yellow light|street was dry"
        assert rain != bool(re.search(dry, morning))
        clause, day = ("it rains", "rainy") if rain else ("the sun shines", "sunny")
        place = "((?:[a-z]+ )?[a-z]+)"
        found = re.search(rf"if {clause}(?: tomorrow)?, we will go to the {place}[.,]", plan, re.I) \
            or re.search(rf"{day} day they would go to the {place}(?:\.|,| and)", plan) \
            or re.search(rf"to the {place} if it is {'wet' if rain else 'sunny'}", plan)
        assert found and found[1] == right, told["story"]
        solved += 1
    assert solved > 300


def test_what_was_ruled_out_follows_from_the_text():
    solved = collections.Counter()
    for told, span, before, right in spans("either-or", "negation", "exclusion"):
        right, wrong, kind = bare(right), bare(span["wrong"]), span["kind"]
        one, many = f"an? {wrong}", world.forms_of(wrong)["s"]
        clue = {"either-or": f"(looked in|not in) the {wrong}|(is|was|see) not {one}|Is it {one}.*No!|the {wrong} "
                             "(had been (away|asleep|at the|with)|was with me|in the shed)",
                "negation": f"(not|not to) like {many}|never (ate|want) ({many}|{one})|not (want )?{one}"
                            f"|not eat {many}",
                "exclusion": "I am sorry|No, not|shook (her|his) head"}[kind]
        if kind == "exclusion":
            shop = before.rsplit("\n", 1)[1]
            if not re.search(clue, shop):
                right, wrong = wrong, right         # the wish was granted: what was asked for is the answer
            asked = re.search(r'(have|asked for|pointed\. "|want) ?(an?) ([a-z -]+?)(\?|\.|,| most| so)', shop, re.I)
            assert asked[3] == wrong, told["story"]
        else:
            assert re.search(clue, before, flags=re.I), (wrong, told["story"])
        solved[kind] += 1
    assert min(solved[kind] for kind in ("either-or", "negation", "exclusion")) > 200


def test_exchange_follows_from_the_text():
    """At lunch, each eats what the other brought."""
    solved = 0
    for told, span, before, right in spans("exchange"):
        lunch = re.search(r"(\w+) had (?:brought )?an? ([a-z]+)(?: for lunch, and|\.|,? and) (\w+) had an? ([a-z]+)\. "
                          r"[^\n]*?([A-Z]\w+) (?:ate|got to eat|ate was|had) the $", before)
        if lunch:
            one, ones, other, others, eats = lunch.groups()
            assert right == {one: others, other: ones}[eats], told["story"]
            solved += 1
    assert solved > 300


def test_belief_follows_from_the_text():
    solved = 0
    for told, span, before, right in spans("belief"):
        saw = re.search("saw it all|saw everything|told \\w+ all about it", before)
        moved = re.search(r"(?:put it in|left it in|hid it in) the ([a-z ]+)\.", before.rsplit("\n", 1)[1])[1]
        assert (right == moved) == bool(saw) and moved in (right, span["wrong"]), told["story"]
        solved += 1
    assert solved > 300


# bits, scales, chains, the file

def test_bits_are_minus_log2_of_the_probability():
    probability = {}
    for i in range(3000):
        tale = world.lego(random.Random(i), 1, 1)
        if tale.split == "train":
            probability["".join(tale.parts)] = 2 ** -tale.bits
    assert len(probability) == 26 * 2
    assert sum(probability.values()) == pytest.approx(1 - world.VAL_SHARE)
    tale = world.Tale(random.Random(1))
    assert tale.choose("abcd") in "abcd" and tale.bits == 2
    assert tale.choose("ab", (0, 1)) == "b" and tale.bits == 2
    assert 2 + math.log2(4 if tale.choose("ab", (3, 1)) == "b" else 4 / 3) == pytest.approx(tale.bits)
    assert all(told["bits"] > 50 for told in SAMPLE)


def test_the_choices_paid_for_are_all_that_makes_a_story(monkeypatch):
    """Told again from its list of choices, without chance, each story is the same; and the list costs its bits."""
    choose = world.Tale.choose
    for i in range(200):
        made = []

        def record(tale, options, weights=None):
            chosen = choose(tale, options, weights)
            k = next(k for k, option in enumerate(options) if option is chosen or option == chosen)
            made.append((k, (weights[k] / sum(weights)) if weights else 1 / len(options)))
            return chosen
        monkeypatch.setattr(world.Tale, "choose", record)
        tale = world.tell(random.Random(i))
        bits, replay = -sum(math.log2(p) for _, p in made), iter(made)
        monkeypatch.setattr(world.Tale, "choose", lambda tale, options, weights=None: options[next(replay)[0]])
        assert "".join(world.tell(None).parts) == "".join(tale.parts) and next(replay, None) is None
        assert bits == pytest.approx(tale.bits)


@pytest.mark.parametrize("setting, skill", [("facts", "fact"), ("reasoning", "reasoning")])
def test_scales(setting, skill):
    none, some, much = (sum(span["skill"] == skill for told in world.stories(600, 3, **{setting: scale})
                            for span in told["spans"]) for scale in (0.0, 1.0, 4.0))
    assert none == 0 < 100 < some < 0.7 * much


@pytest.mark.parametrize("in_order", [True, False])
def test_lego_chains_resolve(in_order):
    longest, depths = {"train": 0, "val": 0}, set()
    for told in world.stories(2000, 2, "lego", min_vars=2, max_vars=5, in_order=in_order):
        given, resolved = told["story"].split("\n")
        clauses = dict(re.findall(r"([a-z]) = ([+-][a-z1])", given))
        longest[told["split"]] = max(longest[told["split"]], len(clauses))

        known = {-1}  # places in the chain whose values can be read

        def resolve(name):
            sign, source = clauses[name]
            place, value = (-1, 1) if source == "1" else resolve(source)
            return place + 1, value if sign == "+" else -value

        answers = re.findall(r"([a-z]) = ([+-]1)", resolved)
        assert len(answers) == len(clauses) == len(told["spans"])
        for (name, answer), span in zip(answers, told["spans"]):
            place, value = resolve(name)
            assert value == int(answer) == -int(span["wrong"])
            assert told["story"][span["start"]:span["end"]] == answer
            assert span["depth"] == min(abs(place - other) for other in known) - 1
            known.update(() if in_order else [place])
            depths.add(span["depth"])
    assert longest == {"train": 5, "val": 10} and max(depths) > 5


def test_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    world.main(["--n=50", "--seed=3", "--name=small", "--facts=3", "--reasoning=0.5"])
    lines = (tmp_path / "data/small/stories.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(world.stories(50, 3, facts=3.0, reasoning=0.5))
    assert [path.name for path in (tmp_path / "data/small").iterdir()] == ["stories.jsonl"]
    assert "bits per byte" in capsys.readouterr().out
    world.main(["--n=1", "--kind=lego", "--min_vars=8", "--max_vars=8", "--in_order=False"])
    told = json.loads((tmp_path / "data/lego/stories.jsonl").read_text())
    assert told == next(world.stories(1, 1, "lego", min_vars=8, max_vars=8, in_order=False))
    assert "1 stories (0 for val)" in (out := capsys.readouterr().out) and "raise --n" in out and "next:" not in out


@pytest.mark.parametrize("argument, code",
                         [("--n=0", None), ("--max_vars=2", None), ("--kind=poem", 2), ("--fact=2", 2)])
def test_bad_input_ends_in_one_line(argument, code, capsys):
    with pytest.raises(SystemExit) as stopped:
        world.main([argument])
    assert stopped.value.code == code or code is None and "try" in stopped.value.code


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_cut_off_leaves_the_old_stories(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    path, _ = world.write(3)
    before = (tmp_path / path).read_bytes()

    def broken(*settings, **more):
        yield json.loads(before.splitlines()[0])
        raise fault
    monkeypatch.setattr(world, "stories", broken)
    with pytest.raises((KeyboardInterrupt, OSError)):
        world.write(3)
    assert (tmp_path / path).read_bytes() == before and os.listdir(tmp_path / "data/world") == ["stories.jsonl"]


# the vocabulary

def test_vocabulary():
    total = 0
    for name in ("nouns", "verbs", "adjectives"):
        words = [word for kind in world.WORDS[name].values() for word in kind]
        assert len(words) == len(set(words)), [word for word in words if words.count(word) > 1]
        assert all(re.fullmatch("[A-Za-z -]+", word) for word in words)
        total += len(words)
    assert 1800 < total < 2300


def test_every_name_in_the_data_is_known():
    used = set(re.findall(r"\{@([a-z -]+)", json.dumps(world.WORDS)))
    assert len(used) > 50 and used <= set(world.LISTS), used - set(world.LISTS)
    for name, plot in world.PLOTS.items():
        steps = json.dumps(plot["plot"])
        told = {key.strip("!?~") for script in re.findall(r'"say ([^"]*)"', steps) for key in script.split()} - {"/"}
        own = set(world.WORDS["plots"][plot["group"]][name]["lines"])
        assert own - told - {"bad-moral"} == {"bad", "twist", "moral"} and told <= own, (name, told ^ own)

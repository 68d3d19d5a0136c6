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

"lines" has several tellings of each sentence, and one of them is chosen; lab/telling.py says what stands in one.

This is the record that comes out, here of story 5,961 of seed 1. `bits` is the cost of all random choices:

    {"story": "In winter, a quick boy … So Alan chose the other thing, and they went home with a pancake. …",
     "split": "train", "plot": "exclusion",
     "spans": […, {"start": 466, "end": 470, "skill": "grammar", "wrong": "go"},
               {"start": 481, "end": 490, "skill": "reasoning", "wrong": "a marshmallow", "kind": "exclusion"}, …],
     "bits": 102.953, "words": ["rush", "marshmallow", "quick"], "features": ["dialogue"],
     "summary": "Alan goes to the big store with Mom and gets a pancake."}

To add a plot, write it under "plots" in the group "reasoning", "facts" or "tracking", with tellings for each of its
sentences and for "bad", "twist", "moral" and "end", which `tell_ending` uses. All plots share the lines of
"frame". A scene is written in the same way under "scenes", without "cast" and "summary". It is told before the friend
comes if it has "home": true. Its line "end", if it has one, may be told near the end of the story.
"""
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter

from tqdm import tqdm

from common import ROOT, CommandLine, run_main
from common.dataset import load_meta
from common.files import atomic_write
from generate import FEATURES
from lab.tale import Tale
from lab.telling import BASE_FORMS, WORDS, parse

VAL_SHARE = 0.03  # of the stories
SMALL = 6  # the small world uses so many words of a list, rows of a table and tellings of a sentence, at most

PLOTS = {name: {**plot, "group": group, "lines": {**WORDS["frame"], **plot["lines"]}}
         for group, plots in WORDS["plots"].items() for name, plot in plots.items()}
# short scenes, for a story of any plot: {(group, home): scenes}. Those at home are told before the friend comes
SCENES = {(group, home): [scene for scene in scenes.values() if scene.get("home", False) == home]
          for group, scenes in WORDS["scenes"].items() for home in (True, False)}

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
    script = os.path.join(ROOT, "prepare.py")
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

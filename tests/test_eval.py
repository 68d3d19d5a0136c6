"""eval.py: the metric scores every token once, from its own story alone, whatever the batch; what is counted in
probes, completions and marks is what a plain count gives; other people's models are measured like ours."""
import glob
import json
import math
import os
import re
import shutil
import signal
import threading
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import corpus
import eval
import judge
import report
import test_probes
from conftest import make_stories, write_jsonl
from model import load_checkpoint
from prepare import load_meta, load_tokenizer, load_tokens
from prepare import main as prepare
from sample import tell
from test_generate import Server, answer
from test_model import make_model

EOT = 96


def load(name, dataset="tiny"):
    """What main() grades: a run's folder, or hf:folder."""
    return eval.load(name, torch.device("cpu"), SimpleNamespace(dataset=dataset, tokenizer="", context=0))


def stand_in(model, dataset, before=""):
    """A model that is no run, ready to be graded."""
    meta = load_meta(dataset)
    return SimpleNamespace(model=model, encoding=load_tokenizer(dataset), tokenizer=meta["tokenizer"]["sha256"],
                           datasets=[dataset], before=before, time=0, path=lambda name: name)


class Parrot(torch.nn.Module):
    """Knows stories by heart: after a beginning of one of them it goes on as that one does."""

    def __init__(self, tokens, eot, vocab_size):
        super().__init__()
        self.head, self.eot = torch.nn.Linear(1, 1), eot
        self.config = SimpleNamespace(block_size=512, vocab_size=vocab_size, n_layer=0, n_head=1, n_embd=1)
        self.next = {}
        for story in eval.split_stories(tokens, eot):
            story = story.tolist() + [eot]
            self.next.update({tuple(story[:i]): story[i] for i in range(len(story))})

    def forward(self, idx, cache):
        cache.text = torch.cat((cache.text, idx), 1) if cache.length else idx
        cache.length += idx.size(1)
        logits = torch.full((len(idx), 1, self.config.vocab_size), -1e9)
        for row, text in zip(logits, cache.text.tolist()):
            row[0, self.next.get(tuple(text[1:]), self.eot)] = 0
        return logits


def test_every_token_is_scored_once_with_at_least_half_a_context():
    draw = np.random.default_rng(0)
    tokens = np.concatenate([[EOT, *draw.integers(0, EOT, n)] for n in (5, 31, 32, 33, 100, 1)] + [[EOT]])
    times = np.zeros(len(tokens), int)
    for start, length, skip in eval.windows(tokens, EOT, 32):
        assert length <= 32 and not (tokens[start + 1:start + length] == EOT).any()
        assert skip == 0 and tokens[start] == EOT or skip == 16
        times[start + 1 + skip:start + 1 + length] += 1
    assert times.tolist() == [0] + [1] * (len(tokens) - 1)


def test_scores_agree_with_one_story_at_a_time():
    """The definition, straight: each story alone, its closing <|endoftext|> counted, nothing padded."""
    model, draw = make_model(), np.random.default_rng(0)
    stories = [draw.integers(0, EOT, n).tolist() for n in (5, 20, 31, 7, 12)]
    tokens = np.array([t for story in stories for t in [EOT] + story] + [EOT], np.uint16)
    expected = [0.0]
    for story in stories:
        row = torch.tensor([EOT] + story + [EOT])
        expected += torch.nn.functional.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="none").tolist()
    for batch_tokens in (1, 64, 4096):
        assert np.allclose(eval.score(model, tokens, EOT, batch_tokens=batch_tokens), expected, atol=1e-4)


def read_results(run):
    with open(os.path.join(run, "eval.json")) as f:
        return json.load(f)


def test_bits_per_byte_of_a_run(run, in_prepared, capsys):
    """Nats over bytes over ln 2; a model that knows nothing needs log2(512) bits a token."""
    eval.main([run, "--device=cpu", "--only=loss"])
    found = read_results(run)["loss on tiny"]
    assert f"{found['val_bpb'][0]:.4f} [" in capsys.readouterr().out
    meta, model = load_meta("tiny"), make_model(vocab_size=512)
    torch.nn.init.zeros_(model.head.weight)
    blind = eval.evaluate(model, "tiny")
    assert blind["val_loss"] == pytest.approx(math.log(512), rel=1e-5)
    assert blind["val_bpb"] == pytest.approx(9 * (meta["val"]["tokens"] - 1) / meta["val"]["bytes"], rel=1e-5)
    bpb, low, high = found["val_bpb"]
    assert 0 < low < bpb < high < 0.7 * blind["val_bpb"] and high - low < 0.1 * bpb
    trained, _ = eval.load_model(run)
    assert bpb == pytest.approx(eval.evaluate(trained, "tiny")["val_bpb"], rel=1e-5)
    eval.main([run, "--device=cpu", "--only=loss", "--dtype=bfloat16"])
    rough = read_results(run)["loss on tiny in bfloat16"]["val_bpb"][0]
    assert rough == pytest.approx(bpb, rel=1e-3) and rough != bpb


def test_the_first_stories_can_stand_for_all(in_prepared):
    model = make_model(vocab_size=512)
    tokens, meta = load_tokens("tiny", "val"), load_meta("tiny")
    part = eval.evaluate(model, "tiny", max_stories=3)
    end = np.flatnonzero(tokens == meta["eot"])[3]
    nats = eval.score(model, tokens, meta["eot"])[:end + 1]
    assert part["val_loss"] == pytest.approx(nats.sum() / end, rel=1e-4)
    assert eval.evaluate(model, "tiny", max_stories=10**6) == eval.evaluate(model, "tiny")


def test_text_that_was_prepared_with_another_tokenizer_is_encoded_with_the_runs_own(run, in_prepared):
    write_jsonl(in_prepared / "data/strange/s.jsonl", make_stories(50, seed=3))
    prepare(["--dataset=strange", "--vocab_size=300", "--val_fraction=0.2"])
    prepare(["--dataset=same", "--input=data/strange", "--tokenizer=tiny", "--val_fraction=0.2"])
    subject = load(run, dataset="strange")
    found = eval.loss(subject, "strange")
    assert found["val_bpb"] == pytest.approx(eval.loss(subject, "same")["val_bpb"])
    assert found["val_bpb"][0] == pytest.approx(eval.evaluate(subject.model, "same")["val_bpb"], rel=1e-5)


def test_a_run_is_graded_in_another_context_than_it_was_trained_in(run, in_prepared):
    """In a context of 2 each token is told from the two before it, the first of a story from <|endoftext|> alone."""
    eval.main([run, "--only=loss", "--context=2", "--device=cpu"])
    with open(f"{run}/context2.eval.json") as f:
        found = json.load(f)
    model, tokens = load(run).model, torch.from_numpy(load_tokens("tiny", "val").astype(np.int64))
    with torch.no_grad():
        single = model(tokens[:-1, None], tokens[1:, None])[:, 0]
        after_two = model(torch.stack((tokens[:-2], tokens[1:-1]), 1), torch.stack((tokens[1:-1], tokens[2:]), 1))[:, 1]
    first = tokens[1:-1] == load_meta("tiny")["eot"]
    expected = torch.cat((single[:1], torch.where(first, single[1:], after_two)))
    assert found["model"]["context"] == 2
    assert found["loss on tiny"]["val_loss"][0] == pytest.approx(expected.mean().item(), rel=1e-5)
    torch.save({"model_config": {"pos": "learned", "block_size": 8}}, in_prepared / "learned.pt")
    with pytest.raises(SystemExit, match="learned positions for a context of 8 tokens"):
        eval.load_model("learned.pt", "cpu", 16)


def test_skill_accuracy_is_the_share_of_right_words_that_cost_less(workplace):
    """Against one span at a time, straight from the logits; with right and wrong exchanged it is one minus that."""
    records = [{**r, "split": "val" if i % 5 == 0 else "train"} for i, r in enumerate(make_stories(200))]
    for i, record in enumerate(records):  # words of other lengths too
        if i % 2:
            record["spans"][0]["wrong"] = "very old trumpet"
    write_jsonl(workplace / "data/x/stories.jsonl", records)
    prepare(["--dataset=x", "--vocab_size=400"])
    model, encoding = make_model(vocab_size=400, block_size=128), load_tokenizer("x")

    def cost(before, word):  # "number" follows the marked word in each of these stories
        ids = torch.tensor([[encoding.eot_token] + encoding.encode_ordinary(f"{before}{word} number")])
        start = len(encoding.encode_ordinary(before.rstrip()))  # the word's tokens begin with its space
        nats = model(ids[:, :-1], ids[:, 1:])[0, start:]
        return nats.sum().item()
    expected = []
    for record in records[::5]:
        span, = record["spans"]
        before = record["story"][:span["start"]]
        expected.append(cost(before, record["story"][span["start"]:span["end"]]) < cost(before, span["wrong"]))
    assert eval.skill_accuracy(model, "x") == {"reasoning": pytest.approx(np.mean(expected))}
    assert 0.1 < np.mean(expected) < 0.9
    for record in records:
        span, = record["spans"]
        right = record["story"][span["start"]:span["end"]]
        record["story"] = record["story"][:span["start"]] + span["wrong"] + record["story"][span["end"]:]
        span.update(end=span["start"] + len(span["wrong"]), wrong=right)
    write_jsonl(workplace / "data/x/stories.jsonl", records)
    assert eval.skill_accuracy(model, "x")["reasoning"] == pytest.approx(1 - np.mean(expected))


def test_stories_are_described_side_by_side(workplace, capsys):
    stories = [{"story": r["story"], "words": ["play", "ball", "red"]} for r in make_stories(40)]
    write_jsonl(workplace / "a.jsonl", stories + stories[:10])
    (workplace / "b.txt").write_text("A slide is fun. Sam slid.\n<|endoftext|>\n"
                                     "One day Sam saw a boat. He sat in it.\n")
    eval.main(["--stories", "a.jsonl", "b.txt"])
    table = {line[:36].strip(): line[36:].split("  ") for line in capsys.readouterr().out.splitlines()}
    a, b = corpus.describe("a.jsonl"), corpus.describe("b.txt")
    assert a["stories"] == "50" and a["exact copies"] == "20.00 %" and a["with Once upon a time"] == "100.00 %"
    assert float(a["near-copies"].split()[0]) >= 20 and b["near-copies"] == "0.00 %"
    assert b["stories"] == "2" and b["words a story"] == "8" and b["distinct words"] == "14"
    assert b["name 1"] == "Sam 50.00 %"  # names are counted within sentences, where all other words are small
    assert b["distinct 1-grams"] == "14 in 16 words" and "requested words used" not in b
    assert 0 < float(a["requested words used"].split()[0]) < 70
    assert [text.strip() for text in table["exact copies"] if text.strip()] == ["20.00 %", "0.00 %"]
    with pytest.raises(SystemExit, match="no file c.jsonl"):
        eval.main(["--stories", "c.jsonl"])


# ---------------------------------------------------------------------------------------------------------------
# intervals, loss, probes

def test_intervals_hold_the_truth_95_times_in_100():
    draw = np.random.default_rng(1)
    held = 0
    for _ in range(100):
        value, low, high = report.interval(draw.exponential(2, 60))
        assert low < value < high
        held += low < 2 < high
    assert 85 <= held <= 99
    assert report.interval([1, 3], [2, 6])[0] == 0.5
    assert report.interval([0.0], [0.0]) is None and report.interval([]) is None
    assert report.interval([4, 8, 6], [2, 4, 3]) == [2, 2, 2]  # a ratio that is the same everywhere is certain


def test_loss_of_each_skill(in_prepared):
    """Against the marked word of each story alone; shares of text and loss sum to one."""
    model, encoding = make_model(vocab_size=512, block_size=256), load_tokenizer("tiny")
    found = eval.loss(stand_in(model, "tiny"), "tiny")
    val = {encoding.decode(ids.tolist()) for ids in eval.split_stories(load_tokens("tiny", "val"), encoding.eot_token)}
    costs = []
    for record in make_stories(300):
        if record["story"] in val:
            span, = record["spans"]
            ids = [encoding.eot_token] + encoding.encode_ordinary(record["story"])
            nats = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[0]
            first = len(encoding.encode_ordinary(record["story"][:span["start"]].rstrip()))
            last = len(encoding.encode_ordinary(record["story"][:span["end"]]))
            costs.append(nats[first:last].sum().item())
    assert len(costs) == load_meta("tiny")["val"]["stories"] == found["stories"]
    assert found["reasoning words, nats each"][0] == pytest.approx(np.mean(costs), rel=1e-4)
    assert "fact words, nats each" not in found and 0 < found["reasoning words, share of text"][0] < 0.1
    for share in ("text", "loss"):
        assert found[f"reasoning words, share of {share}"][0] + found[f"all other words, share of {share}"][0] == \
            pytest.approx(1)


def test_probes_are_passed_by_the_likelier_continuation(in_prepared):
    """Against the sum of log-likelihoods of one continuation at a time, straight from the logits."""
    model, encoding = make_model(vocab_size=512, block_size=128), load_tokenizer("tiny")
    def cost(prompt, continuation):
        ids = torch.tensor([[encoding.eot_token] + encoding.encode_ordinary(prompt + continuation)])
        return model(ids[:, :-1], ids[:, 1:])[0, len(encoding.encode_ordinary(prompt)):].sum().item()
    probes = test_probes.PROBES[::7]
    expected = [min(cost(p["prompt"], c) for c in p["right"]) < min(cost(p["prompt"], c) for c in p["wrong"])
                for p in probes]
    assert eval.passes(model, encoding, probes).tolist() == expected and 0.1 < np.mean(expected) < 0.9


def test_a_small_context_prefers_no_side(in_prepared):
    """What differs is longer than the context, and is scored as far as that holds it."""
    model, encoding = make_model(vocab_size=512, block_size=8), load_tokenizer("tiny")
    sides = " a big red kite and a ball of snow from the hill.", " the park and the river, where she sat and slept."
    assert sum(eval.passes(model, encoding, [{"prompt": "She saw", "right": [a], "wrong": [b]}]).item()
               for a, b in (sides, sides[::-1])) == 1


def test_shortcuts_are_counted_right(in_prepared, monkeypatch):
    encoding = load_tokenizer("tiny")
    for name, score in (("nearest mentioned", lambda p: lambda c: max(eval.places(p, c), default=-1)),
                        ("most often mentioned", lambda p: lambda c: len(eval.places(p, c)))):
        for probe in test_probes.PROBES:
            assert eval.shortcut(probe, score(probe)) == test_probes.shortcut_passes(probe, name)
    text = encoding.decode(load_tokens("tiny", "train").tolist()).lower()
    counts = eval.count_phrases([" ball", " a red", " Tim", " trumpet"], "tiny")
    assert counts == {word: len(re.findall(rf"\b{word}\b", text)) for word in ("ball", "a red", "tim", "trumpet")}
    long = np.tile(load_tokens("tiny", "train"), 8)
    monkeypatch.setattr(eval, "load_tokens", lambda *_: long)
    assert len(long) > 100_000 and eval.count_phrases([" ball"], "tiny") == {"ball": 8 * counts["ball"]}
    assert eval.count_phrases([" ball"], "tiny", most=len(long) // 2)["ball"] < 6 * counts["ball"]
    probe = {"skill": "fact", "kind": "x", "prompt": "Tim saw a", "right": [" ball"], "wrong": [" trumpet", " drum"]}
    found = eval.grade_probes(stand_in(make_model(vocab_size=512), "tiny"), [probe], counts)
    assert found["fact, the most frequent in train"][0] == 1 and found["fact, by chance"][0] == pytest.approx(1 / 3)
    assert found["fact: x"] == found["fact"]
    lego = {"prompt": "r = -j, j = +1. / j =", "right": [" +1"], "wrong": [" -1"]}
    assert eval.places(lego, " +1") == [12] and not eval.places(lego, " -1")


def test_spans_are_probes_by_kind_and_depth(workplace):
    import world
    world.main(["--n=2000", "--kind=lego", "--seed=3"])
    prepare(["--dataset=lego", "--vocab_size=300", "--clean=False"])
    spans = eval.read_spans("lego", 5, by="kind")
    kinds = {p["kind"] for p in spans}
    assert "lego, depth  0" in kinds and "lego, depth 10" in kinds
    assert all(p["right"][0][1:] == p["wrong"][0][1:] == "1" and p["right"] != p["wrong"] for p in spans)
    subject = stand_in(make_model(vocab_size=300, block_size=128), "lego")
    (title, found), = eval.sections(subject, ["spans"], [], [], None, SimpleNamespace(spans=5))
    assert title == "spans of lego" and {f"reasoning: {kind}" for kind in kinds} < set(found)


# ---------------------------------------------------------------------------------------------------------------
# completions, memorisation, instructions

PROMPTS = ["Once upon a time Tim went to the", "One day Lily saw a red ball and", "Mom said, \"You may not take"]


def test_completions_are_those_of_one_prompt_alone(run, in_prepared):
    subject = load(run)
    found = eval.complete(subject, PROMPTS, 40, each=2)
    for i, prompt in enumerate(PROMPTS):
        begin = subject.encoding.encode_ordinary(prompt)
        alone = tell(subject.model, subject.encoding, prompt, 40, [2 * i + 1, 2 * i + 2], temperature=1.0)
        assert [begin + ids for ids in found[i]] == alone


def test_what_is_counted_in_completions(run, in_prepared, tmp_path):
    """Everything again, story by story."""
    subject, args = load(run), SimpleNamespace(each=3, max_tokens=60)
    completed = eval.complete(subject, PROMPTS, args.max_tokens, args.each)
    found = eval.completions(subject, completed, args)
    ids = [ids for some in completed for ids in some]
    told = [subject.encoding.decode(row) for row in ids]
    words = [re.findall(r"\w+", text.lower()) for text in told]
    assert found["length in words"][0] == pytest.approx(np.mean([len(w) for w in words]))
    fours = [list(zip(w, w[1:], w[2:], w[3:])) for w in words]
    assert found["4-grams that repeat one of the same text"][0] == pytest.approx(
        sum(len(f) - len(set(f)) for f in fours) / sum(map(len, fours)))
    assert found["distinct 1-grams among a prompt's"][0] == pytest.approx(
        sum(len(set(sum(words[i:i + 3], []))) for i in (0, 3, 6)) / sum(map(len, words)))
    pairs = [set(zip(w, w[1:])) for w in words]
    assert found["Rouge-2 with the likest other"][0] == pytest.approx(np.mean([max(
        2 * len(a & b) / (len(a) + len(b)) for j, b in enumerate(pairs) if i != j) for i, a in enumerate(pairs)]))
    assert found["ended by themselves"][0] == pytest.approx(np.mean([len(row) < 60 for row in ids]))


def test_shared_runs_against_plain_search():
    draw = np.random.default_rng(0)
    stream = draw.integers(0, 6, 3000).astype(np.uint16)
    queries = [draw.integers(0, 6, n).tolist() for n in (3, 5, 30, 60)] + [stream[100:140].tolist() + [7] * 3]
    runs = {k: {tuple(stream[i:i + k].tolist()) for i in range(len(stream) - k + 1)} for k in range(5, 42)}
    inside = [{k: [tuple(q[i:i + k]) in runs[k] for i in range(len(q) - k + 1)] for k in runs} for q in queries]
    longest = [max([k for k in runs if any(found[k])], default=0) for found in inside]
    share = [np.mean(found[5]) if found[5] else 0 for found in inside]
    assert longest[4] == 40 and any(0 < some < 0.9 for some in share)
    for piece in (1 << 20, 64, 7):
        found = eval.shared_runs(queries, stream, piece=piece)
        assert found[0].tolist() == longest and found[1] == pytest.approx(share)


@pytest.fixture
def fine(in_prepared):
    """data/fine: stories of more than 75 tokens, since its vocabulary is small, of which no two begin alike."""
    if not os.path.exists("data/fine/meta.json"):
        write_jsonl(in_prepared / "data/fine/stories.jsonl", [
            {"story": f"Tale {i}. {record['story']}"} for i, record in enumerate(make_stories(300))])
        prepare(["--dataset=fine", "--vocab_size=280", "--val_fraction=0.1"])


def test_a_parrot_is_found_out(fine):
    """A model that knows train by heart gives back the true endings, and nothing after the beginnings of val."""
    meta, args = load_meta("fine"), SimpleNamespace(max_tokens=300)
    parrot = Parrot(load_tokens("fine", "train"), meta["eot"], meta["vocab_size"])
    found = eval.memorisation(stand_in(parrot, "fine"), "fine", args)
    assert found["Rouge-2 precision against the true ending, train"] == [1, 1, 1]
    assert found["Rouge-2 precision against the true ending, val"] is None
    assert found["5-grams of tokens that stand in train, train completed"] == [1, 1, 1]
    assert found["longest run that stands in train, train completed"][0] > 30
    assert found["5-grams of tokens that stand in train, true endings of val"][0] < 1


def test_marked_words_are_found_where_the_stories_lie(workplace):
    """Stories that were prepared from elsewhere, with instructions before them, keep their probes."""
    write_jsonl(workplace / "data/x/stories.jsonl",
                [{**r, "split": "val" if i % 5 == 0 else "train"} for i, r in enumerate(make_stories(100))])
    write_jsonl(workplace / "split/valid.jsonl", make_stories(9))
    write_jsonl(workplace / "split/train.jsonl", make_stories(50, seed=1))
    prepare(["--dataset=asked", "--input=data/x", "--instruct", "--vocab_size=400"])
    prepare(["--dataset=plain", "--input=split", "--vocab_size=400"])
    asked, plain = eval.read_spans("asked", 50), eval.read_spans("plain", 50)
    assert len(asked) == 20 and len(plain) == 9
    assert asked[0]["prompt"].startswith("Story:") and plain[0]["prompt"].startswith("Once upon a time")
    assert "bits_per_byte" in load_meta("plain")["val"]
    assert "bits_per_byte" not in load_meta("asked")["val"]  # what the instructions cost is not known


def test_instructions_followed(workplace):
    """A parrot of the validation stories has what their instructions ask for; one that knows nothing has not."""
    write_jsonl(workplace / "data/x/stories.jsonl", [
        {**r, "words": ["took", r["words"][0], "happy"], "summary": r["summary"].replace("takes", "took")}
        for r in make_stories(600)])
    prepare(["--dataset=asked", "--input=data/x", "--instruct", "--hold_out=words+summary", "--vocab_size=512",
             "--val_fraction=0.2"])
    meta, args = load_meta("asked"), SimpleNamespace(max_tokens=150)
    encoding = load_tokenizer("asked")
    heads = [encoding.decode(ids.tolist()).partition("Story:")[0] for ids in
             eval.split_stories(load_tokens("asked", "train"), encoding.eot_token)]
    assert len(heads) > 400 and not any("Words:" in head and "Summary:" in head for head in heads)
    parrot = Parrot(load_tokens("asked", "val"), meta["eot"], meta["vocab_size"])
    found = eval.instructions(stand_in(parrot, "asked"), "asked", args)
    told = ("words used", "sentences included", "summary's words used")
    assert set(found) == {f"{what}, {group} combinations" for group in ("seen", "held-out")
                          for what in (*told, "another's words", "another's summary's words")}
    assert all((value == [1, 1, 1]) == what.startswith(told) for what, value in found.items())
    assert all(0 < value[0] < 1 for what, value in found.items() if what.startswith("another"))
    parrot.next = {}
    found = eval.instructions(stand_in(parrot, "asked"), "asked", args)
    assert all(value == [0, 0, 0] for value in found.values())


# ---------------------------------------------------------------------------------------------------------------
# the judge, on a server on loopback

MARKS = """It is fine.

**Grammar**: {}/10
Creativity: 5
Consistency with the beginning: {}
Plot: 4.5
Age group: B"""


@pytest.fixture
def judged(run, in_prepared, fine, monkeypatch):
    """Has a judge, who is given as a function of prompts, grade two completions each of two prompts."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    (in_prepared / "prompts.json").write_text(json.dumps(PROMPTS[:2]))
    for path in (f"{run}/eval.json", *glob.glob("out/*/judge.jsonl")):
        if os.path.exists(path):
            os.remove(path)
    encoding = load_tokenizer("fine")
    stories = "\n\n".join(encoding.decode(part.tolist())
                         for part in eval.split_stories(load_tokens("fine", "val"), encoding.eot_token))

    def grade(behave, *options, runs=()):
        with Server(behave) as server:
            try:
                eval.main([run, *runs, "--only=judge", "--dataset=fine", "--judge=critic", f"--base_url={server.url}",
                           "--device=cpu", "--each=2", "--max_tokens=20", "--prompts=prompts.json", *options])
            finally:
                grade.asked = [request["messages"][0]["content"] for request in server.requests]
                assert all(request["max_tokens"] == 1000 for request in server.requests)  # --max_cost counts on it
        return read_results(run)["judge"]

    def fair(prompt, times):
        begin, end = re.search(r"work\.\n\n(.*) \*\*\* (.*)\n\nFirst write", prompt, re.DOTALL).groups()
        true = f"{begin} {end}" in stories
        return answer(MARKS.format(9 if true or end[:40] in stories else 2, 9 if true else 3))
    grade.fair = fair
    return grade


def test_marks_and_controls(judged, capsys):
    found = judged(judged.fair)
    controls = load_meta("fine")["val"]["stories"]
    assert len(judged.asked) <= 4 + 3 * min(30, controls) and len(set(judged.asked)) == len(judged.asked)
    assert found["judge"] == "critic" and found["replies without marks"] == 0
    assert found["grammar, true endings"] == [9, 9, 9] and found["grammar, shuffled endings"] == [2, 2, 2]
    assert found["consistency, endings of others"] == [3, 3, 3] and found["age"] == [4.5, 4.5, 4.5]
    assert found["plot"] == [4.5, 4.5, 4.5] and "about" in capsys.readouterr().out
    assert not any(name in question for question in judged.asked for name in ("true ending", "shuffled", "control"))
    assert judged(judged.fair) == found and judged.asked == []  # a second run pays nothing


def test_a_judge_that_cannot_tell_is_unfit(judged, capsys):
    found = judged(lambda prompt, times: answer(MARKS.format(7, 7)))
    assert found["judge"] == "critic (unfit)"
    out = capsys.readouterr().out
    assert "consistency does not put true endings over endings of others and its grammar does not" in out


def test_replies_without_marks_are_asked_for_once_more(judged):
    found = judged(lambda prompt, times: answer("Nice." if times == 1 or "***" in prompt and "park" in prompt else
                                                MARKS.format(7, 7)))
    some = {question for question in judged.asked if "park" in question}
    assert len(judged.asked) == 2 * len(set(judged.asked)) and found["replies without marks"] == len(some) > 0


def test_what_was_paid_is_kept_when_a_limit_is_reached(judged, run):
    with pytest.raises(SystemExit, match="(?s)might pass --max_cost=0.02.*the same command goes on"):
        judged(judged.fair, "--max_cost=0.02", "--price_in=1", "--price_out=2", "--concurrency=2")
    first = judged.asked
    assert 0 < len(first) < 50
    judged(judged.fair)
    assert not set(judged.asked) & set(first)
    with open(f"{run}/judge.jsonl") as f:
        assert "sk-secret" not in f.read()


def test_a_limit_of_cost_is_one_for_all_runs_of_a_command(judged, run):
    checkpoint = load_checkpoint(run)
    checkpoint["model"]["head.weight"] /= 10  # another model, which tells other stories
    shutil.copytree(run, "out/flat", dirs_exist_ok=True)
    torch.save(checkpoint, "out/flat/ckpt.pt")
    prices = ["--price_in=1", "--price_out=2", "--concurrency=1"]
    judged(judged.fair, *prices)
    cost = len(judged.asked) * (100 + 2 * 200) / 1e6
    os.remove(f"{run}/judge.jsonl")
    with pytest.raises(SystemExit, match="might pass --max_cost"):
        judged(judged.fair, *prices, f"--max_cost={cost + 0.0035}", runs=["out/flat"])
    assert os.path.exists("out/flat/judge.jsonl")  # the first could be paid


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_ctrl_c_keeps_the_replies(judged, run):
    def behave(prompt, times):
        if os.path.getsize(f"{run}/judge.jsonl"):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return judged.fair(prompt, times)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a run in the background does not have
    try:
        with pytest.raises(KeyboardInterrupt, match="(?s)stopped by Ctrl-C.*the same command goes on"):
            judged(behave, "--concurrency=1")
    finally:
        signal.signal(signal.SIGINT, before)
    first = set(judged.asked)
    judged(judged.fair)
    assert len(first & set(judged.asked)) == 1  # the one that was under way


def test_a_judge_that_refuses_ends_the_run_in_one_line(judged, monkeypatch):
    refusal = json.dumps({"error": {"message": "bad key sk-secret", "code": "invalid_api_key"}})
    with pytest.raises(SystemExit, match=r"(?s)bad key \(key\).*the same command goes on") as end:
        judged(lambda prompt, times: (401, {}, refusal))
    assert "sk-secret" not in str(end.value)
    monkeypatch.setenv("OPENAI_API_KEY", "…")
    with pytest.raises(SystemExit, match="characters that no key has"):
        judged(judged.fair)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(SystemExit, match="OPENAI_API_KEY is not set"):
        judged(judged.fair)


def test_marks_are_read_or_refused():
    good = MARKS.format(10, 3)
    assert judge.read_marks(good) == {"grammar": 10, "creativity": 5, "consistency": 3, "plot": 4.5, "age": 4.5}
    assert judge.read_marks("Grammar: 1\nas an example\n" + good)["grammar"] == 10  # the last word counts
    for bad in (good.replace("10/10", "11"), good.replace("10/10", "0"), good.replace("Plot: 4.5", ""),
                good.replace("group: B", "group: G"), "", good.replace("10/10", "100")):
        assert judge.read_marks(bad) is None


# ---------------------------------------------------------------------------------------------------------------
# other people's models

@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama"])
def test_published_models(kind, in_prepared, capsys):
    """Small random ones, saved here: bits per byte agrees with one story at a time, straight from their logits."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import ByteLevelBPETokenizer
    encoding = load_tokenizer("tiny")
    texts = [encoding.decode(p.tolist()) for p in eval.split_stories(load_tokens("tiny", "val"), encoding.eot_token)]
    inner = ByteLevelBPETokenizer()
    inner.train_from_iterator(texts, vocab_size=400, special_tokens=["<s>", "</s>"] if kind == "llama" else
                              ["<|endoftext|>"], show_progress=False)
    special = {"bos_token": "<s>", "eos_token": "</s>"} if kind == "llama" else {"eos_token": "<|endoftext|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer, **special)
    size = len(tokenizer)
    config = {
        "gpt2": lambda: transformers.GPT2Config(vocab_size=size, n_positions=128, n_embd=32, n_layer=2, n_head=2),
        "gpt_neo": lambda: transformers.GPTNeoConfig(
            vocab_size=size, max_position_embeddings=128, hidden_size=32, num_layers=2, num_heads=2,
            attention_types=[[["global", "local"], 1]], window_size=16),
        "llama": lambda: transformers.LlamaConfig(
            vocab_size=size, max_position_embeddings=128, hidden_size=32, num_hidden_layers=2, intermediate_size=64,
            num_attention_heads=2)}[kind]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # far from uniform
    model.save_pretrained(f"theirs/{kind}")
    tokenizer.save_pretrained(f"theirs/{kind}")
    nats = 0.0
    bos, eos = special.get("bos_token", special["eos_token"]), special["eos_token"]
    for text in texts:
        ids = torch.tensor([tokenizer.encode(bos + text + eos)])
        assert ids.size(1) <= 128 and tokenizer.decode(ids[0, 1:-1]) == text
        with torch.no_grad():
            nats += torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
    with pytest.raises(SystemExit, match="--dataset=tinystories"):
        eval.main([f"hf:theirs/{kind}"])
    (in_prepared / "prompts.json").write_text(json.dumps(PROMPTS))
    eval.main([f"hf:theirs/{kind}", "--dataset=tiny", "--only=loss,completions", "--device=cpu", "--each=2",
               "--max_tokens=20", "--prompts=prompts.json"])
    found = read_results(f"out/hf-{kind}")
    size = sum(len(text.encode()) for text in texts)
    assert found["loss on tiny"]["val_bpb"][0] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert found["completions"]["length in words"][0] > 0
    assert found["model"]["parameters"] == sum(
        p.numel() for name, p in model.named_parameters() if "h." in name or "layers." in name or "norm" in name
        or "ln_f" in name)
    # with their own cache, greedy text is the argmax of the model without one; past the context as well
    subject, ids = load(f"hf:theirs/{kind}"), torch.tensor([[5, 6, 7]])
    told = list(eval.generate(subject.model, ids[0].tolist(), 20, [0], -1, temperature=0))
    for token in told:
        with torch.no_grad():
            assert model(ids).logits[0, -1].argmax() == token
        ids = torch.cat((ids, token[None]), 1)


def test_without_transformers_the_error_says_what_to_install(workplace, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        eval.main(["hf:some/model", "--dataset=tiny"])


# ---------------------------------------------------------------------------------------------------------------
# the whole, and its page

def test_runs_of_several_seeds_are_shown_as_one():
    """Mean, lowest and highest of each figure; another setting stays for itself, and so does what is not measured."""
    part = lambda loss, passed: {"model": {"parameters": 5}, "loss": {"val_bpb": [loss, 0, 9], "stories": 7},
                                 "judge": {"judge": "m", "replies": int(loss)},
                                 "probes": {"fact": passed, "context": None},
                                 "steps": {"probes": {"fact": [(1, 0, loss, 9), (2, 0, 5.0, 9)]}}}
    results = {"a-1": part(1.0, [0.5, 0.4, 0.6]), "b-1": part(7.0, [1, 1, 1]), "a-2": part(2.0, 0.25),
               "a-3": part(3.0, None)}
    results["a-1"]["steps"]["spans"] = {"fact": [(1, 0, 1, 9)]}  # which the others do not have
    found = report.over_seeds(results, {"a-1": "x", "a-2": "x", "b-1": "y", "a-3": "x"})
    assert list(found) == ["a-1", "b-1"] and found["b-1"]["loss"]["val_bpb"] == [7, 7, 7]
    assert found["a-1"] == {"model": {"parameters": 5, "runs": 3}, "loss": {"val_bpb": [2, 1, 3], "stories": 7},
                            "judge": {"judge": "m", "replies": [2, 1, 3]},
                            "probes": {"fact": [0.375, 0.25, 0.5], "context": None},
                            "steps": {"probes": {"fact": [(1, 1, 2, 3), (2, 5, 5, 5)]}}}


def test_a_run_cut_short_is_no_seed_of_the_others(run, in_prepared):
    shutil.copytree(run, "out/cut", dirs_exist_ok=True)
    checkpoint = torch.load("out/cut/ckpt.pt", weights_only=True)
    settings = []
    for seed, step in ((2, checkpoint["step"]), (3, checkpoint["step"] - 1)):
        checkpoint["args"]["seed"], checkpoint["step"] = seed, step
        torch.save(checkpoint, "out/cut/ckpt.pt")
        settings.append(eval.load("out/cut", torch.device("cpu"), SimpleNamespace(context=0, dataset="")).settings)
    whole = eval.load(run, torch.device("cpu"), SimpleNamespace(context=0, dataset="")).settings
    assert settings[0] == whole != settings[1]


def test_a_dataset_that_was_not_prepared_is_not_needed_to_grade_on_another(run, in_prepared, workplace):
    shutil.copytree(in_prepared / run, "out/moved")
    os.makedirs("data/tiny")
    assert load("out/moved", "fine").before == ""
    write_jsonl(workplace / "data/tiny/s.jsonl", make_stories(60))  # one that learned instructions is asked with them
    prepare(["--dataset=tiny", "--instruct", "--vocab_size=300", "--val_fraction=0.2"])
    assert load("out/moved").before == "Story:\n"


def test_what_was_measured_is_shown_again(run, in_prepared, capsys):
    eval.main([run, "--device=cpu", "--only=loss"])
    before = read_results(run)
    capsys.readouterr()
    eval.main([run, "--device=cpu", "--only=none"])
    assert read_results(run) == before and "val_bpb" in capsys.readouterr().out


def test_two_runs_and_their_page(run, in_prepared, capsys):
    """Sections that are not made again stay; those of an older checkpoint do not."""
    import train
    if not os.path.exists("out/<b>"):
        train.main(["--dataset=tiny", "--n_layer=1", "--n_embd=32", "--block_size=64", "--max_steps=9", "--evals=3",
                    "--out_dir=out/<b>", "--batch_tokens=256", "--compile=False", "--device=cpu", "--keep=log"])
    (in_prepared / "prompts.json").write_text(json.dumps(PROMPTS))
    capsys.readouterr()
    options = ["--device=cpu", "--each=2", "--max_tokens=20", "--prompts=prompts.json", "--spans=10"]
    eval.main([run, "out/<b>", *options])
    out = capsys.readouterr().out
    assert "memorisation of tiny" in out and "out/<b>" in out.splitlines()[0]
    before = read_results("out/<b>")
    assert list(before) == ["model", "loss on tiny", "probes", "completions", "memorisation of tiny", "steps"]
    assert [point[0] for point in before["steps"]["probes"]["fact"]] == [1, 2, 4, 8]
    eval.main(["out/<b>", "--only=loss", *options])
    assert read_results("out/<b>") == before  # the loss too: it is deterministic
    with open("out/compare.html", encoding="utf-8") as f:
        page = f.read()
    assert page.count("<svg") == 5 and "&lt;b&gt;" in page and "out/<b>" not in page
    assert not re.search(r"<script|https?://|@import|url\(", page) and "prefers-color-scheme: dark" in page
    later = os.path.getmtime("out/<b>/eval.json") + 5
    os.utime("out/<b>/ckpt.pt", (later, later))
    eval.main(["out/<b>", "--only=loss", *options])
    assert set(read_results("out/<b>")) == {"model", "loss on tiny"}
    shutil.rmtree("out/<b>")


def test_charts_are_well_formed_and_show_every_point():
    series = {"one": [(1, 0.1, 0.2, 0.3), (1e6, 0.2, 0.4, 0.5)], "<two>": [(5, 0.1)], "no": []}
    svg = report.chart("<a & b>", "x", "y", series, log_x=True)
    figure = ElementTree.fromstring(svg)
    assert figure.find("figcaption").text == "<a & b>" and len(list(figure.iter("circle"))) == 3
    heights = [float(c.get("cy")) for c in figure.iter("circle")]
    assert heights[1] < heights[0] < heights[2]  # 0.4 above 0.2 above 0.1
    assert report.chart("t", "x", "y", {"none": []}) == report.chart("t", "x", "y", {}) == ""
    for points in ([(3, 7)], [(0, 0), (0, 0)], [(1e-9, 5), (2e-9, 5)], [(i, i * 1e9) for i in range(1000)]):
        ElementTree.fromstring(report.chart("t", "x", "y", {"a": points}))
    for low, high in ((0, 1), (0.6, 0.7), (-3, 11), (1e-7, 3e-7), (0, 12345)):
        assert 3 <= len(report.ticks(low, high, False)) <= 7


@pytest.mark.parametrize("options, expected", [
    (["--only=loss,taste"], "names other sections than loss,probes"),
    (["--only=judge"], "who shall judge"),
    (["--only=loss", "--judge=x"], "--only leaves the judge out"),
    (["--judge=x", "--max_cost=1"], "--max_cost needs the prices"),
    (["--probes=none.json"], "cannot read --probes=none.json"),
    (["--probes=bad.json"], "--probes=bad.json has not the form of data/probes.json"),
    (["--prompts=bad.json"], "--prompts=bad.json has not the form of data/prompts.json"),
    (["--prompts=none.json"], "cannot read --prompts=none.json"),
    (["--each=0"], "must be at least 1"),
    (["out/none"], "no checkpoint out/none/ckpt.pt"),
    (["told.txt"], "told.txt is no run: for a file of stories, python eval.py --stories told.txt"),
])
def test_bad_input_ends_in_one_line(workplace, options, expected):
    (workplace / "bad.json").write_text('[{"skill": "fact"}]')
    with pytest.raises(SystemExit, match=expected) as end:
        eval.main(options)
    assert "\n" not in str(end.value)

"""interpret.py: figures of heads and neurons where the answer is known; a page that renders, and runs nothing."""
import contextlib
import io
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import interpret
import model as architecture
import train
from conftest import make_stories, write_jsonl
from eval import evaluate
from interpret import KINDS
from model import alibi_slopes, load_model
from prepare import load_tokenizer
from prepare import main as prepare
from test_model import POSITIONS, make_model, tokens

NOUN = KINDS.index("noun")


def make_tensors(idx, kind=None, role=None):
    """Stories as read_stories gives them, of token ids (N, T) without padding."""
    real = torch.ones_like(idx, dtype=torch.bool)
    real[:, 0] = False
    kind = (idx % len(KINDS) if kind is None else kind).masked_fill(~real, -1)
    return SimpleNamespace(idx=idx, real=real, kind=kind, role=torch.zeros_like(idx) if role is None else role,
                           pieces=[[str(t) for t in row] for row in idx.tolist()])


# -----------------------------------------------------------------------------------------------------------------
# watching and silencing


@pytest.mark.parametrize("pos", POSITIONS)
def test_the_attention_watched_gives_the_models_logits(pos, monkeypatch):
    model, idx = make_model(pos=pos), tokens(2, 32)
    with interpret.watch_attention() as seen:
        plain = model(idx)
    assert len(seen) == 3 and seen[0].shape == (2, 4, 32, 32)
    layers = iter(seen)
    monkeypatch.setattr(architecture, "attend", lambda q, k, v, mask: next(layers).softmax(-1) @ v)
    assert torch.allclose(model(idx), plain, atol=1e-4)


def test_silencing_equals_removing_weights_and_ends():
    idx, plain = tokens(2, 20), make_model()(tokens(2, 20))
    for part, columns in (("attn", slice(8, 16)), ("mlp", [5, 77])):
        model, cut = make_model(), make_model()
        projection = getattr(model.blocks[1], part).proj
        getattr(cut.blocks[1], part).proj.weight.data[:, columns] = 0
        with interpret.silence(projection, columns):
            assert torch.allclose(model(idx), cut(idx), atol=1e-5)
        assert torch.equal(model(idx), plain) and (cut(idx) - plain).abs().max() > 1e-2
        where = torch.arange(20).expand(2, -1) >= 12
        with interpret.silence(projection, columns, where):
            later = model(idx)
        assert torch.allclose(later[:, :12], plain[:, :12], atol=1e-5)
        assert (later[:, 12:] - plain[:, 12:]).abs().max() > 1e-2


def test_each_head_and_layer_is_silenced_once():
    model, idx = make_model(), tokens(1, 20)
    found = interpret.without_each(model, lambda: model(idx), "")
    assert len(found) == 1 + 3 * (4 + 1)
    cut = make_model()
    cut.blocks[2].attn.proj.weight.data[:, 24:] = 0
    assert torch.allclose(found[2, 3], cut(idx), atol=1e-5)
    cut = make_model()
    del cut.blocks[1]
    assert torch.allclose(found[1, None], cut(idx), atol=1e-5)


# -----------------------------------------------------------------------------------------------------------------
# heads that were built by hand


def test_a_head_that_looks_three_back_is_a_distance_head():
    """Learned positions, one-hot; a query at i asks for the key of i - 3, whatever the words."""
    model = make_model(pos="learned", smear=False, n_layer=1, n_head=1, block_size=32, n_embd=32)
    model.embed.weight.data.zero_()
    model.pos_embed.weight.data = torch.eye(32)
    model.blocks[0].attn.k.weight.data = torch.eye(32)
    model.blocks[0].attn.q.weight.data = torch.eye(32).roll(-3, 0).triu()
    head, = interpret.study_heads(model, make_tensors(tokens(40, 32)), torch.tensor([0]))
    assert head["type"] == "distance" and head["peak"] == 3
    assert head["distance"] == pytest.approx(1, abs=1e-4) and head["words"] < 0.1
    share = np.exp(32**0.5) / (np.exp(32**0.5) + np.arange(15, 31))  # the key asked for, and all others alike
    assert head["mean distance"] == pytest.approx(np.mean(share * 3 + (1 - share) * (np.arange(15, 31) / 2)), rel=0.1)
    assert head["decay"] == pytest.approx(-np.polyfit(np.arange(13), [32**0.5] + [0] * 12, 1)[0], rel=1e-3)


def test_the_decay_of_alibi_alone_is_its_slope():
    model = make_model(pos="alibi", smear=False, n_layer=1)
    model.blocks[0].attn.q.weight.data.zero_()
    heads = interpret.study_heads(model, make_tensors(tokens(20, 32)), torch.tensor([0]))
    assert [h["decay"] for h in heads] == pytest.approx(alibi_slopes(4).tolist(), rel=1e-3)
    assert all(h["type"] == "distance" and h["distance"] > 0.999 and h["peak"] == 0 for h in heads)


def test_a_head_that_looks_at_one_token_is_semantic():
    """Words one-hot, no positions; every query asks for the key of token 5."""
    model = make_model(pos="none", smear=False, n_layer=1, n_head=1, vocab_size=16, n_embd=16)
    model.embed.weight.data = torch.eye(16)
    model.blocks[0].attn.k.weight.data = torch.eye(16)
    model.blocks[0].attn.q.weight.data = torch.eye(16)[5][:, None].expand(16, 16).clone()
    idx = tokens(60, 32) % 16
    head, = interpret.study_heads(model, make_tensors(idx, role=(idx == 5).long()), torch.tensor([0]))
    assert head["type"] == "semantic" and head["words"] > 0.9 and abs(head["distance"]) < 0.05
    assert head["main character / share"] > 5 and head["nouns / share"] < 1
    kind = torch.where(idx == 5, NOUN, 0)
    head, = interpret.study_heads(model, make_tensors(idx, kind), torch.tensor([0]))
    assert head["nouns / share"] > 5
    assert interpret.head_type({"distance": 0.3, "words": 0.25}) == "mixed"


def test_what_might_be_looked_at():
    """<start> the red ball fell . the ball: the second article's own noun is the ball, seen at 3."""
    start, the, red, ball, fell, dot = range(6)
    idx = torch.tensor([[start, the, red, ball, fell, dot, the, ball]])
    kind = torch.tensor([[-1, 1, 4, NOUN, 3, 0, 1, NOUN]])
    role = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 2]])
    found = interpret.find_targets(idx, kind, role, torch.tensor([the]))
    looks = {name: set(map(tuple, x[0].nonzero().tolist())) for name, x in found.items()}
    assert looks["own noun"] == {(6, 3)}
    assert looks["nouns"] == looks["main character"] == {(4, 3), (5, 3), (6, 3), (7, 3)}
    assert looks["same token"] == {(6, 1), (7, 3)} and looks["induction"] == {(6, 2), (7, 4)}
    assert looks["previous token"] == {(i, i - 1) for i in range(2, 8)}


# -----------------------------------------------------------------------------------------------------------------
# neurons that were planted


def test_the_area_under_the_curve_counts_pairs():
    draw = np.random.default_rng(0)
    hits, others = draw.integers(0, 4, (30, 3)), draw.integers(0, 5, (50, 3))
    pairs = (hits[:, None] > others).mean((0, 1)) + (hits[:, None] == others).mean((0, 1)) / 2
    assert np.allclose(interpret.area(torch.from_numpy(hits), torch.from_numpy(others)), pairs)


def plant(layer, neuron, direction):
    """A model of learned positions whose neuron reads one direction of the stream, which nothing else writes to."""
    model = make_model(pos="learned", smear=False)
    for part in [p for block in model.blocks for p in (block.attn.proj, block.mlp.proj)]:
        part.weight.data[direction] = 0
    model.embed.weight.data[:, direction] = model.pos_embed.weight.data[:, direction] = 0
    model.blocks[layer].mlp.fc.weight.data[neuron] = torch.eye(32)[direction]
    return model


def test_a_planted_neuron_is_found_first():
    model = plant(layer=1, neuron=77, direction=9)
    model.embed.weight.data[:40, 9] = 2  # the nouns
    idx = tokens(40, 32)
    stories = make_tensors(idx, torch.where(idx < 40, NOUN, idx % 2))
    layers, areas = interpret.study_neurons(model, stories)
    shuffled, _ = interpret.study_neurons(model, stories, shuffle=True)
    first, second, *rest = interpret.list_neurons(layers, shuffled, stories)
    assert (first["layer"], first["neuron"], first["kind"], first["distinct"]) == (1, 77, "noun", 1)
    assert first["excess"] > second["excess"] and len(rest) == 3 * 128 - 2 and areas == []
    assert all(int(at) < 40 for _, at, _ in first["excerpts"])
    with interpret.watch([model.blocks[1].mlp.proj]) as seen:
        model(idx)
    best = seen[0][:, 1:, 77].flatten().topk(5)
    assert first["most"] == pytest.approx(best.values[0].item(), abs=1e-3)
    assert sum(interpret.sum_up(layers)["spread"]) == pytest.approx(1)


def test_a_planted_main_character_neuron_is_found_and_silenced():
    """It fires at position 6, where each story first names its main character."""
    model = plant(layer=2, neuron=33, direction=9)
    model.pos_embed.weight.data[6, 9] = 3
    role = torch.zeros(20, 32, dtype=torch.int64)
    role[:, 6], role[:, 12], role[:, 20], role[:, 3] = 1, 2, 2, 3
    stories = make_tensors(tokens(20, 32), role=role)
    _, areas = interpret.study_neurons(model, stories)
    assert (areas[0]["layer"], areas[0]["neuron"], areas[0]["later"], areas[0]["capital"]) == (2, 33, 1, 1)
    idx, cut = stories.idx, plant(layer=2, neuron=33, direction=9)
    cut.pos_embed.weight.data[6, 9] = 3
    cut.blocks[2].mlp.proj.weight.data[:, 33] = 0
    with torch.no_grad():
        rise = cut(idx[:, :-1], idx[:, 1:]) - model(idx[:, :-1], idx[:, 1:])
    later = role[:, 1:] == 2
    expected = [rise[later].mean().item(), rise[~later].mean().item()]
    found, = interpret.loss_without_neurons(model, stories, [[(2, 33)]])
    assert found[:2] == pytest.approx(expected, abs=1e-4)
    assert found[2] == pytest.approx(0, abs=1e-6)  # in the last layer, nothing can carry it to a later place
    model = plant(layer=0, neuron=33, direction=9)
    model.pos_embed.weight.data[6, 9] = 3
    with torch.no_grad(), interpret.silence(model.blocks[0].mlp.proj, [33], torch.arange(31).expand(20, -1) == 6):
        silenced = model(idx[:, :-1], idx[:, 1:])
    with torch.no_grad():
        rise = (silenced - model(idx[:, :-1], idx[:, 1:]))[later].mean().item()
    assert abs(rise) > 1e-3
    assert interpret.loss_without_neurons(model, stories, [[(0, 33)]])[0][2] == pytest.approx(rise, abs=1e-5)


# -----------------------------------------------------------------------------------------------------------------
# stories as words, the lens, the page


def test_words_get_kinds_and_the_main_character_its_role(in_prepared):
    encoding = load_tokenizer("tiny")
    texts = ["Once upon a time Lily saw a red ball. Mom called. “Yes,” said Lily. Then Lily and Tim went to Ben."] * 3
    lists = [[encoding.eot_token] + encoding.encode_ordinary(text) for text in texts + ["He saw a ball."]]
    s = interpret.read_stories(lists, encoding, 64)
    assert s.idx.shape == s.kind.shape == s.role.shape and s.real.sum() == sum(len(ids) - 1 for ids in lists)
    assert "".join(s.pieces[-1]) == texts[0][:len("".join(s.pieces[-1]))]

    def kinds_at(word):  # of the token that ends the word's first mention
        end = texts[0].index(word) + len(word)
        ends = np.cumsum([len(piece) for piece in s.pieces[-1]])
        at = int(np.searchsorted(ends, end))
        return KINDS[s.kind[-1, at]], interpret.ROLES[s.role[-1, at]]
    assert kinds_at("Lily") == ("name", "first") and kinds_at("Tim") == ("name", "capital")
    assert kinds_at("red") == ("adjective", "") and kinds_at("ball") == ("noun", "")
    assert kinds_at("saw") == ("verb", "")
    assert kinds_at("Mom") == ("noun", "capital") and kinds_at("went") == ("verb", "")
    assert kinds_at("said Lily") == kinds_at("Then Lily") == ("name", "later") and kinds_at("Once")[0] != "name"


def test_stories_are_read_whatever_the_context_cuts_and_names_run_on_with(in_prepared):
    encoding = load_tokenizer("tiny")
    text = "They saw Robo1 run, and Robo1 ran by a café 🙂."
    ids = [encoding.eot_token] + encoding.encode_ordinary(text)
    for size in range(2, len(ids) + 1):
        s = interpret.read_stories([ids], encoding, size)
        assert s.idx.tolist() == [ids[:size]] and s.kind.shape == s.role.shape == s.idx.shape
        assert len(s.pieces[0]) == size and text.startswith("".join(s.pieces[0]))
    assert "".join(s.pieces[0]) == text and s.role.tolist()[0].count(interpret.ROLES.index("first"))


def test_the_lens_ends_at_the_models_own_logits(in_prepared):
    model, encoding = make_model(vocab_size=512), load_tokenizer("tiny")
    probe = {"prompt": "Once upon a time Lily took the", "right": [" kite"], "wrong": [" ball"]}
    found, = interpret.study_lens(model, encoding, [probe])
    ids = [[encoding.eot_token] + encoding.encode_ordinary(probe["prompt"] + w) for w in (" kite", " ball")]
    same = next(i for i, (a, b) in enumerate(zip(*ids)) if a != b)
    logits = model(torch.tensor([ids[0][:same]]))[0, -1]
    assert len(found["lead"]) == 4
    assert found["lead"][-1] == pytest.approx((logits[ids[0][same]] - logits[ids[1][same]]).item(), abs=1e-4)


@pytest.fixture(scope="module")
def written(run, prepared):
    """(page, numbers, printed) of a run on stories that would like to be HTML, beside itself."""
    records = make_stories(60, seed=3)
    for i, record in enumerate(records):
        record["story"] = f"<script>document.title = 'hurt'</script> {record['story']}"
        for span in record["spans"]:
            span.update({side: span[side] + 41 for side in ("start", "end")})
        record["split"] = "val" if i % 2 else "train"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(prepared)
        write_jsonl(prepared / "data/hostile/s.jsonl", records)
        prepare(["--dataset=hostile", "--tokenizer=tiny"])
        shutil.copytree(run, "out/<i>")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            interpret.main(["out/<i>", run, "--dataset=hostile", "--stories=30", "--device=cpu", "--seeds"])
    folder = prepared / run
    return folder / "interpret.html", json.loads((folder / "interpret.json").read_text()), printed.getvalue()


def test_the_page_holds_the_numbers_and_fetches_nothing(written, in_prepared):
    path, numbers, _ = written
    html = path.read_text()
    assert len(html) < 5e6 and "http:" not in html and "https:" not in html and "src=" not in html
    assert "<script>document" not in html and "out/<i>" not in html and "out/&lt;i&gt;" in html
    heads = numbers["heads"]
    assert [(h["layer"], h["head"]) for h in heads] == [(i, j) for i in range(2) for j in range(len(heads) // 2)]
    assert f"{heads[0]['loss rise']:.3g}</td>" in html
    cut = load_model(str(path.parent))[0]
    cut.blocks[1].attn.proj.weight.data.zero_()  # its only head
    assert numbers["loss"] + heads[1]["loss rise"] == pytest.approx(evaluate(cut, "hostile")["val_loss"], rel=1e-4)
    assert numbers["stories"] == 30 and 1 < numbers["loss"] < 7 and len(numbers["neurons"]) == 2 * 256
    assert set(numbers["skills"][0]) == {"layer", "head", "reasoning"}  # the spans of these stories
    assert {"trained", "shuffled", "untrained"} == set(numbers["shares"]) and "Runs compared" in html


def test_mistakes_end_in_one_line(run, in_prepared):
    with pytest.raises(SystemExit, match="take 10 at least"):
        interpret.main([run, "--stories=3"])
    with pytest.raises(SystemExit, match="train.py"):
        interpret.main(["out/nothing"])


@pytest.fixture
def browser():
    """post(path, **values) to a session of headless Chromium, by the WebDriver protocol."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def send(path, method="POST", **values):
        request = urllib.request.Request(f"http://localhost:{port}{path}", json.dumps(values).encode(), method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]
    for _ in range(100):
        try:
            urllib.request.urlopen(f"http://localhost:{port}/status")
            break
        except OSError:
            time.sleep(0.1)
    session = None
    try:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        session = "/session/" + send("/session", capabilities={"alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": {"args": flags},
            "goog:loggingPrefs": {"browser": "ALL"}}})["sessionId"]
        yield lambda path, **values: send(session + path, **values)
    finally:
        if session:
            send(session, "DELETE")
        driver.terminate()
        driver.wait()


def test_several_runs_are_compared_and_seeds_are_one_column(run, written):
    _, numbers, printed = written
    assert f"{run}\n" not in printed  # the same run: one column
    figures = {name: cell for name, cell in re.findall(r"^  (.*?)  +(\S.*)$", printed, re.M)}
    heads = numbers["heads"]
    assert figures["runs"] == "2" and figures["channels"] == "64"
    assert figures["correlation of distance and words"] == "–"  # of two heads it would say nothing
    for name, value in (("nats a token", numbers["loss"]),
                        ("heads by distance", np.mean([h["type"] == "distance" for h in heads]))):
        assert figures[name] == "{0:.3f} [{0:.3f}, {0:.3f}]".format(value)


def test_in_a_browser_it_renders_hovers_and_searches_without_an_error(written, browser):
    def run(script):
        return browser("/execute/sync", script=script, args=[])
    browser("/url", url=Path(written[0]).as_uri())
    assert run("return document.title").startswith("Inside")
    assert run("return document.querySelectorAll('h2').length") == 5 and run("return document.scripts.length") == 2
    assert "</" in run("return [...document.querySelectorAll('q')].map(q => q.innerText).join()")  # shown, not run
    rect = run("const r = document.querySelector('.map rect'); r.scrollIntoView({block: 'center'}); return r")
    before = run("return getComputedStyle(document.querySelector('.map rect')).stroke")
    browser("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": [
        {"type": "pointerMove", "duration": 0, "origin": rect, "x": 0, "y": 0}]}])
    hovered = run("return document.querySelector('.map g:hover title').textContent")
    assert float(hovered.split(": ")[-1]) == 1  # the first token has only itself to look at
    assert run("return getComputedStyle(document.querySelector('.map rect')).stroke") != before
    run("const f = document.getElementById('find'); f.value = 'ball'; f.dispatchEvent(new Event('input'))")
    assert run("return document.querySelectorAll('#found mark').length") > 0
    browser("/window/rect", width=390, height=800)
    assert run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert [e for e in browser("/se/log", type="browser") if e["level"] == "SEVERE"] == []


def test_stories_too_short_to_see_a_head_at_work_end_in_one_line(workplace):
    stories = [{"story": f"Tim saw ball number {i}. He sat."} for i in range(200)]
    write_jsonl(workplace / "data/short/stories.jsonl", stories)
    prepare(["--dataset=short", "--vocab_size=300", "--clean=False", "--val_fraction=0.2"])
    train.main(["--dataset=short", "--n_layer=1", "--n_embd=32", "--max_steps=1", "--batch_tokens=512", "--evals=0",
                "--compile=False", "--device=cpu"])
    with pytest.raises(SystemExit, match="too short"):
        interpret.main(["--device=cpu"])

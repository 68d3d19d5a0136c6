"""lab/export.py: a page tells the stories of the model that it was made from, or is not written."""
import base64
import gzip
import json
import math
import re
import shutil
import subprocess
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as model_file
from common import runs
from common.files import file_hash
from common.tokenizer import load_tokenizer
from conftest import error_of
from lab.export import forward, main, round_rows
from sample import generate
from test_model import make_model

NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KINDS = {"default": {}, "plain": {"smear": False, "value_embeds": False, "qk_gain": 0.0}, "alibi": {"pos": "alibi"},
         "learned": {"pos": "learned"}, "none": {"pos": "none"}}
TEXT = "Zoë's 12 cats  said: “We'll go!”\n\nThey'd  <b>gone</b>\u00a0\u0085\ufeff\U0001f600 \t\n "
# what the tests in JavaScript begin with: the page's scripts by their id
READ = """const html = require("fs").readFileSync(process.argv[1], "utf8");
const part = id => html.match(new RegExp(`<script id="${id}"[^>]*>([^]*?)</script>`))[1], run = JSON.parse(part("run"));
const page = require("vm").runInThisContext(part("forward") + "; ({unpack, Model, Tokenizer, pick, draw, agrees})");
const print = value => console.log(JSON.stringify(value));
page.unpack(run, part("weights")).then(weights => {
  const model = new page.Model(run.config, weights), tokenizer = new page.Tokenizer(run);
"""


@pytest.fixture
def encoding(in_prepared):
    return load_tokenizer("tiny")


def make_run(folder, change=None, **settings):
    """The model of a run in `folder` that was not trained: its weights are random, so that every part has an effect."""
    model = make_model(vocab_size=load_tokenizer("tiny").n_vocab, block_size=64, **settings)
    if change:
        change(model)
    shutil.copy("data/tiny/tokenizer.tiktoken", folder)
    torch.save({"model": model.state_dict(), "model_config": vars(model.config), "datasets": ["tiny"],
                "tokenizer": file_hash("data/tiny/tokenizer.tiktoken")}, folder / "ckpt.pt")
    return model


def make_page(folder, bits=8, **settings):
    """(the path of a page, its model with rounded weights)."""
    model = make_run(folder, **settings)
    main([str(folder), f"--bits={bits}"])
    model.load_state_dict({name: torch.from_numpy(round_rows(p.numpy(), bits)[2])
                           for name, p in model.state_dict().items()})
    return folder / "story.html", model


def in_node(page, script, *more):
    """What a script prints that sees `model`, `tokenizer` and all that the page's first script defines."""
    command = [NODE, "-e", READ + script + "\n});", str(page), *more]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def read_part(page, name):
    return re.search(f'<script id="{name}"[^>]*>(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_computes_what_the_model_does(kind):
    model = make_model(block_size=64, **KINDS[kind])
    ids = torch.randint(0, 97, (64,), generator=torch.Generator().manual_seed(1))
    w = {name: p.numpy() for name, p in model.state_dict().items()}
    with torch.inference_mode():
        expected = model(ids[None])[0].numpy()
    assert np.allclose(forward(w, vars(model.config), ids.numpy()), expected, atol=1e-3)


@pytest.mark.parametrize("bits, error", [(8, 1 / 254), (16, 1 / 65534)])
def test_rounding_keeps_each_weight_within_half_a_level_of_its_row(bits, error):
    weight = np.random.default_rng(0).normal(size=(50, 40)).astype("f4") * np.logspace(-6, 3, 50, dtype="f4")[:, None]
    weight[7] = 0  # the row of a token that never occurred
    levels, _, rounded = round_rows(weight, bits)
    highest = np.abs(weight).max(axis=1, keepdims=True)
    assert levels.dtype.itemsize == bits // 8 and (np.abs(rounded - weight) <= 1.01 * error * highest).all()
    vector = np.float32([1e-3, -5, 0])
    assert np.allclose(round_rows(vector, 8)[2], vector, rtol=0.005)


def test_the_page_holds_the_model_and_its_tokenizer_and_fetches_nothing(encoding, tmp_path):
    page, rounded = make_page(tmp_path)
    told, tensors = json.loads(read_part(page, "run")), rounded.state_dict()
    assert [base64.b64decode(token) for token in told["tokens"].split(" ")] == [
        encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    content = gzip.decompress(base64.b64decode(read_part(page, "weights")))
    for name, rows, columns in told["tensors"]:
        size = rows * columns
        levels = np.frombuffer(content[:size], np.int8).reshape(rows, columns)
        scales = (np.frombuffer(content[size:size + 2 * rows], "<u2").astype("<u4") << 16).view("<f4")
        assert np.array_equal((levels * scales[:, None]).ravel(), tensors.pop(name).numpy().ravel()), name
        content = content[size + 2 * rows:]
    assert not content and not tensors
    text = page.read_text(encoding="utf-8")
    assert "{{" not in text and not re.search(r"https?://|src=|href=|import |fetch\(", text)


def changed_mlp(patch):
    patch.setattr(model_file.MLP, "forward", lambda self, x: self.proj(F.gelu(self.fc(x))))


def changed_rope(patch):
    patch.setattr(model_file.rope_table, "__defaults__", (500.0,))


def changed_logits(patch):
    plain = model_file.GPT.forward
    patch.setattr(model_file.GPT, "forward", lambda *args, **more: 15 * torch.tanh(plain(*args, **more) / 15))


def changed_window(patch):
    """Attention that sees only the last 40 tokens: shorter texts would not show it."""
    plain = model_file.attend

    def attend(q, k, v, mask):
        T, S = q.size(2), k.size(2)
        distance = torch.arange(S - T, S)[:, None] - torch.arange(S)
        return plain(q, k, v, (distance >= 0) & (distance < 40))
    patch.setattr(model_file, "attend", attend)


@pytest.mark.parametrize("change", [changed_mlp, changed_rope, changed_logits, changed_window])
def test_no_page_is_written_of_a_model_that_it_would_not_compute(change, in_prepared, tmp_path, monkeypatch, capsys):
    make_run(tmp_path)
    change(monkeypatch)
    assert "story_page.html" in error_of(main, [str(tmp_path)], capsys)
    assert not (tmp_path / "story.html").exists()


def test_an_option_that_the_page_does_not_know_is_named(in_prepared, tmp_path, monkeypatch, capsys):
    """A fork's option, which adds biases."""
    @dataclass
    class Config(model_file.GPTConfig):
        bias: bool = True

    def changed_init(self, config):
        plain(self, config)
        self.proj = torch.nn.Linear(4 * config.n_embd, config.n_embd)
    plain = model_file.MLP.__init__
    monkeypatch.setattr(model_file.MLP, "__init__", changed_init)
    monkeypatch.setattr(runs, "GPTConfig", Config)
    make_run(tmp_path)
    assert "--bias" in error_of(main, [str(tmp_path)], capsys)


def test_bad_input_ends_in_one_line(in_prepared, tmp_path, capsys):
    assert "--to" in error_of(main, [str(tmp_path), "--to=pdf"], capsys)
    assert "no checkpoint" in error_of(main, ["out/missing"], capsys)
    make_run(tmp_path, lambda model: model.smear.data[3:4].fill_(math.nan))
    assert "diverged" in error_of(main, [str(tmp_path)], capsys)
    assert not (tmp_path / "story.html").exists()


def test_names_and_texts_of_a_run_cannot_break_the_page(in_prepared, tmp_path):
    folder = tmp_path / "<b>a & {{weights}}"
    folder.mkdir()
    page, _ = make_page(folder)
    text = page.read_text(encoding="utf-8")
    assert "<title>Stories by &lt;b&gt;a &amp; {{weights}}</title>" in text
    assert "<" not in read_part(page, "run")


@pytest.mark.skipif(not NODE, reason="needs node")
@pytest.mark.parametrize("kind", KINDS)
def test_javascript_computes_what_the_model_does(kind, in_prepared, tmp_path):
    page, model = make_page(tmp_path, **KINDS[kind])
    ids = torch.randint(0, model.config.vocab_size, (64,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = model(ids[None])[0].numpy()
    script = """
      const logits = JSON.parse(process.argv[2]).map(id => Array.from(model.read(id).logits));
      model.length = 20;   // forget the last tokens, and read one of them again
      const again = model.read(JSON.parse(process.argv[2])[20]);
      const lengths = again.attention.map(layer => layer.map(p => p.length));
      print({logits, again: Array.from(again.logits), lengths});"""
    found = in_node(page, script, json.dumps(ids.tolist()))
    assert np.abs(np.array(found["logits"]) - expected).max() < 1e-3
    assert found["again"] == found["logits"][20] and found["lengths"] == [[21] * 4] * 3


@pytest.mark.skipif(not NODE, reason="needs node")
def test_javascript_has_the_tokenizer_and_draws_as_asked(encoding, tmp_path):
    page, _ = make_page(tmp_path)
    texts = [TEXT, "", " ", "x", "Once upon a time Lily took the red ball.\n", "\u2028a\u3000b", "ǆ½²③"]
    found = in_node(page, """
      const ids = JSON.parse(process.argv[2]).map(text => tokenizer.encode(text));
      const logits = Float32Array.from([1, 3, 2, -1], p => p * Math.LN2), counts = {};
      for (const [temperature, topP] of [[0, 1], [1, 1], [1, 0.9], [0.5, 1]]) {
        counts[[temperature, topP]] = [0, 0, 0, 0];
        for (let i = 0; i < 20000; i++) {
          counts[[temperature, topP]][page.pick(logits, page.draw(7, i), temperature, topP)] += 1 / 20000;
        }
      }
      print({ids, texts: ids.map(each => tokenizer.decode(each).join("")), counts});""", json.dumps(texts))
    assert found["ids"] == [encoding.encode_ordinary(text) for text in texts] and found["texts"] == texts
    p = np.array([2, 8, 4, 0.5])
    expected = {"0,1": [0, 1, 0, 0], "1,1": p / 14.5, "1,0.9": np.array([2, 8, 4, 0]) / 14, "0.5,1": p**2 / sum(p**2)}
    for settings, shares in expected.items():
        assert np.allclose(found["counts"][settings], shares, atol=0.015), settings


@pytest.mark.skipif(not NODE, reason="needs node")
def test_a_page_whose_javascript_computes_something_else_notices(in_prepared, tmp_path):
    page, _ = make_page(tmp_path)
    script = "print(page.agrees(model, tokenizer, run.check));"
    assert in_node(page, script) is True
    text = page.read_text(encoding="utf-8")
    for before, after in [("Math.max(value, 0) ** 2", "Math.max(value, 0)"), ("10000 **", "500 **"),
                          (r'\\p{L}+', r'\\p{Lu}+')]:
        assert before in text
        page.write_text(text.replace(before, after), encoding="utf-8")
        assert in_node(page, script) is False, before


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_browser_tells_the_story_of_sample_py(encoding, tmp_path):
    """At temperature 0, token for token, for many times the context; and it goes on from another word."""
    page, _ = make_page(tmp_path, bits=16)
    script = """<script>(async () => {
      while (at("write").disabled) await pause();
      at("prompt").value = "Once upon a time";
      at("temperature").value = 0;
      await begin();
      const first = ids;
      at("story").children[50].click();
      const others = Array.from(at("panel").querySelectorAll("button"), button => button.textContent);
      at("panel").querySelectorAll("button")[2].click();
      while (writing) await pause();
      document.body.textContent = "RESULT" + JSON.stringify({first, others, second: ids}) + "RESULT";
    })()</script>"""
    page.write_text(page.read_text(encoding="utf-8") + script, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
               "--virtual-time-budget=100000", "--dump-dom", page.as_uri()]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    found = json.loads(output.split("RESULT")[1])
    model = make_model(vocab_size=encoding.n_vocab, block_size=64)  # not rounded
    prompt = [encoding.eot_token] + encoding.encode_ordinary("Once upon a time")
    story = prompt + [t.item() for t in generate(model, prompt, 500, [1], encoding.eot_token, temperature=0.0)]
    assert len(story) > 200 and found["first"] == story
    with torch.inference_mode():
        p = model(torch.tensor([story[:50]]))[0, -1].softmax(-1)
    others = [i for i in p.topk(6).indices.tolist() if i != story[50]][:5]
    assert [float(re.search(r"([\d.]+) %", text)[1]) for text in found["others"]] == [
        pytest.approx(100 * p[i].item(), abs=0.6) for i in others]
    again = story[:50] + others[2:3]
    again += [t.item() for t in generate(model, again, 500, [1], encoding.eot_token, temperature=0.0)]
    assert found["second"] == again

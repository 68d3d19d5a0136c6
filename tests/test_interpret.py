"""lab/interpret.py: figures of heads and neurons where the answer is known, changed models, and the page."""
import functools
import html.parser
import json
import shutil

import numpy as np
import pytest
import torch

import model as architecture
import train
from common.runs import load_run
from common.tokenizer import load_tokenizer
from conftest import make_stories, write_jsonl
from eval import evaluate
from lab import inside, interpret
from lab.heads import find_targets, head_type, study_heads
from lab.inside import CAPITAL, FIRST, KINDS, LATER, NOUN, Story
from model import alibi_slopes
from prepare import main as prepare
from test_model import POSITIONS, make_model as make_any_model, tokens

# planted weights assume the plain scale of attention, and values that are only what was planted
make_model = functools.partial(make_any_model, qk_gain=0.0, value_embeds=False)


def make_tensors(ids, kind=None, role=None):
    """Stories from token ids (N, T)."""
    kind = ids % len(KINDS) if kind is None else kind
    role = torch.zeros_like(ids) if role is None else role
    return [Story(*row, [str(token) for token in row[0].tolist()]) for row in zip(ids, kind, role)]


# -----------------------------------------------------------------------------------------------------------------
# observing and ablating


@pytest.mark.parametrize("pos", POSITIONS)
def test_the_captured_attention_gives_the_models_logits(pos, monkeypatch):
    model, idx = make_any_model(pos=pos), tokens(1, 32)
    plain, captured = model(idx), inside.attention_logits(model, idx[0])
    assert captured.shape == (3, 4, 32, 32)
    layers = iter(captured)
    monkeypatch.setattr(architecture, "attend", lambda q, k, v, mask: next(layers).softmax(-1) @ v)
    assert torch.allclose(model(idx), plain, atol=1e-4)


def test_ablation_equals_removing_weights_and_ends():
    idx, plain = tokens(2, 20), make_model()(tokens(2, 20))
    for part, columns in (("attn", slice(8, 16)), ("mlp", 77)):
        model, cut = make_model(), make_model()
        projection = getattr(model.blocks[1], part).proj
        getattr(cut.blocks[1], part).proj.weight.data[:, columns] = 0
        with inside.ablate(projection, columns):
            assert torch.allclose(model(idx), cut(idx), atol=1e-5)
        assert torch.equal(model(idx), plain) and (cut(idx) - plain).abs().max() > 1e-2
        with inside.ablate(projection, columns, where=torch.arange(20) >= 12):
            later = model(idx)
        assert torch.allclose(later[:, :12], plain[:, :12], atol=1e-5)
        assert (later[:, 12:] - plain[:, 12:]).abs().max() > 1e-2


def test_nothing_is_ablated_outside_the_with_block():
    model, idx = make_any_model(), tokens(1, 20)
    intact = model(idx)
    head, neurons = inside.ablate_head(model, 1, 2), inside.ablate_neurons(model, [(0, 9), (2, 5)])
    assert torch.equal(model(idx), intact)
    for ablation in (head, neurons):
        with ablation:
            assert not torch.equal(model(idx), intact)
        assert torch.equal(model(idx), intact)


def test_each_head_and_layer_is_ablated_once(monkeypatch):
    model, idx = make_model(), tokens(1, 20)
    monkeypatch.setattr(interpret, "evaluate", lambda model, *_: {"val_loss": model(idx)})
    monkeypatch.setattr(interpret, "skill_accuracy", lambda *_: {"fact": 0.5})
    records = interpret.study_ablations(model, None, "any", 1, [])
    logits = {(record["layer"], record["head"]): record["loss"] for record in records}
    assert len(records) == len(logits) == 1 + 3 * (4 + 1) and all(record["fact"] == 0.5 for record in records)
    assert torch.equal(records[0]["loss"], model(idx)) and (None, None) in logits
    cut = make_model()
    cut.blocks[2].attn.proj.weight.data[:, 24:] = 0
    assert torch.allclose(logits[2, 3], cut(idx), atol=1e-5)
    cut = make_model()
    del cut.blocks[1]
    assert torch.allclose(logits[1, None], cut(idx), atol=1e-5)


# -----------------------------------------------------------------------------------------------------------------
# a changed model.py is followed, or refused in one line


def test_another_activation_is_followed(monkeypatch):
    """GELU in place of the squared ReLU: neurons and their ablation are those of the changed network."""
    monkeypatch.setattr(architecture.MLP, "forward", lambda mlp, x: mlp.proj(torch.nn.functional.gelu(mlp.fc(x))))
    model, idx = make_model(), tokens(20, 32)
    plain, (_, inputs) = model(idx), inside.observe(model, [model.blocks[0].mlp.proj], idx[0])
    assert inputs[0].shape == (32, 128) and inputs[0].min() < 0  # which a squared ReLU never is
    cut = make_model()
    cut.blocks[0].mlp.proj.weight.data[:, 9] = 0
    with inside.ablate(model.blocks[0].mlp.proj, 9):
        assert torch.allclose(model(idx), cut(idx), atol=1e-5)
    assert not torch.allclose(plain, cut(idx), atol=1e-5)


def test_a_model_that_renames_or_avoids_attend_is_refused(monkeypatch):
    model, stories = make_model(), make_tensors(tokens(20, 32))
    attend = architecture.attend

    def forward(attn, x, idx, rope, mask, kv_cache, positions):
        q, k, v = (linear(x).view(*x.shape[:2], attn.n_head, -1).transpose(1, 2) for linear in (attn.q, attn.k, attn.v))
        return attn.proj(attend(q, k, v, mask).transpose(1, 2).reshape(x.shape))
    monkeypatch.setattr(architecture.Attention, "forward", forward)
    with pytest.raises(SystemExit, match="called attend"):
        study_heads(model, stories)
    monkeypatch.delattr(architecture, "attend")
    with pytest.raises(SystemExit, match="called attend"):
        study_heads(model, stories)


def test_a_model_with_another_attention_is_refused(monkeypatch):
    model, stories = make_model(), make_tensors(tokens(20, 32))
    plain = architecture.attend
    monkeypatch.setattr(architecture, "attend", lambda q, k, v, mask: plain(3 * q, k, v, mask))
    with pytest.raises(SystemExit, match="attention_logits"):
        study_heads(model, stories)
    assert len(model(stories[0].ids[None])) == 1  # and all is as it was before


LENS_PROBE = {"prompt": "Once upon a time Lily took the", "right": [" kite"], "wrong": [" ball"]}


@pytest.mark.parametrize("change", ["a gain after the last norm", "a cap on the logits", "no norm function"])
def test_a_model_that_the_logit_lens_does_not_fit_gets_none(change, in_prepared, monkeypatch, capsys):
    model = make_model(vocab_size=512)
    if change == "a gain after the last norm":
        model.head.register_forward_pre_hook(lambda _, args: (args[0] * torch.linspace(0.5, 2, 32),))
    elif change == "a cap on the logits":
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda idx: forward(idx).tanh())
    else:
        monkeypatch.setattr(model, "forward", architecture.GPT.forward.__get__(model))
        monkeypatch.setattr(interpret, "architecture", object())
    assert interpret.logit_lens(model, load_tokenizer("tiny"), [LENS_PROBE]) == []
    assert capsys.readouterr().err.count("no logit lens") == 1


def test_the_logit_lens_ends_at_the_models_own_logits(in_prepared):
    model, encoding = make_model(vocab_size=512), load_tokenizer("tiny")
    same = {**LENS_PROBE, "wrong": [" kites"]}  # " kite" is how it begins: there is no token to compare
    encode = encoding.encode_ordinary
    expected = 1 if encode(same["prompt"] + " kites")[:-1] == encode(same["prompt"] + " kite") else 2
    result, *others = interpret.logit_lens(model, encoding, [LENS_PROBE, same])
    assert 1 + len(others) == expected
    ids = [[encoding.eot_token] + encode(LENS_PROBE["prompt"] + word) for word in (" kite", " ball")]
    i = next(i for i, (a, b) in enumerate(zip(*ids)) if a != b)
    logits = model(torch.tensor([ids[0][:i]]))[0, -1]
    assert len(result["lead"]) == 4
    assert result["lead"][-1] == pytest.approx((logits[ids[0][i]] - logits[ids[1][i]]).item(), abs=1e-4)


# -----------------------------------------------------------------------------------------------------------------
# heads that were built by hand


def test_a_head_that_looks_three_back_is_a_distance_head():
    """Learned positions, one-hot; the query at i asks for the key of i - 3, whatever the words."""
    model = make_model(pos="learned", smear=False, n_layer=1, n_head=1, block_size=32, n_embd=32)
    model.embed.weight.data.zero_()
    model.pos_embed.weight.data = torch.eye(32)
    model.blocks[0].attn.k.weight.data = torch.eye(32)
    model.blocks[0].attn.q.weight.data = torch.eye(32).roll(-3, 0).triu()
    head, = study_heads(model, make_tensors(tokens(40, 32)))
    assert head["type"] == "distance"
    assert head["distance"] == pytest.approx(1, abs=1e-4) and head["words"] < 0.1
    assert head["decay"] == pytest.approx(-np.polyfit(np.arange(13), [32**0.5] + [0] * 12, 1)[0], rel=1e-3)
    # the first three queries ask for nothing, the others for the key three back: the previous token gets a small share
    i = np.arange(2, 32)
    share = np.where(i < 4, 1 / i, 1 / (np.exp(32**0.5) + i - 1))
    assert head["previous token"] == pytest.approx(share.mean(), rel=0.1)


def test_the_decay_of_alibi_alone_is_its_slope():
    model = make_model(pos="alibi", smear=False, n_layer=1)
    model.blocks[0].attn.q.weight.data.zero_()
    heads = study_heads(model, make_tensors(tokens(20, 32)))
    assert [head["decay"] for head in heads] == pytest.approx(alibi_slopes(4).tolist(), rel=1e-3)
    assert all(head["type"] == "distance" and head["distance"] > 0.999 for head in heads)


def test_a_head_that_looks_at_one_token_looks_by_words():
    """Words one-hot, no positions; every query asks for the key of token 5."""
    model = make_model(pos="none", smear=False, n_layer=1, n_head=1, vocab_size=16, n_embd=16)
    model.embed.weight.data = torch.eye(16)
    model.blocks[0].attn.k.weight.data = torch.eye(16)
    model.blocks[0].attn.q.weight.data = torch.eye(16)[5][:, None].expand(16, 16).clone()
    ids = tokens(60, 32) % 16
    head, = study_heads(model, make_tensors(ids, role=(ids == 5) * LATER))
    assert head["type"] == "words" and head["words"] > 0.9 and abs(head["distance"]) < 0.05
    assert head["main character / share"] > 5
    assert head_type({"distance": 0.3, "words": 0.25}) == "mixed"


def test_targets_are_earlier_tokens_of_each_kind():
    """The second article's own noun is the ball, seen at 3."""
    texts = ["", "The", " red", " ball", " fell", ".", " a", " ball"]
    start, the, red, ball, fell, dot, a = range(7)
    ids = torch.tensor([start, the, red, ball, fell, dot, a, ball])
    kind = torch.tensor([0, 1, 4, NOUN, 3, 0, 1, NOUN])
    role = torch.tensor([0, CAPITAL, 0, FIRST, 0, 0, 0, LATER])
    targets = find_targets(Story(ids, kind, role, texts))
    pairs = {name: set(map(tuple, target.nonzero().tolist())) for name, target in targets.items()}
    assert pairs["own noun"] == {(6, 3)}
    assert pairs["main character"] == {(4, 3), (5, 3), (6, 3), (7, 3)}
    assert pairs["induction"] == {(7, 4)}
    assert pairs["previous token"] == {(i, i - 1) for i in range(2, 8)}


# -----------------------------------------------------------------------------------------------------------------
# neurons that were planted


def test_auroc_counts_pairs():
    draw = np.random.default_rng(0)
    hits, others = draw.integers(0, 4, (30, 3)), draw.integers(0, 5, (50, 3))
    pairs = (hits[:, None] > others).mean((0, 1)) + (hits[:, None] == others).mean((0, 1)) / 2
    assert np.allclose(interpret.auroc(torch.from_numpy(hits), torch.from_numpy(others)), pairs)


def plant(layer, neuron, direction):
    """A model of learned positions whose neuron reads one direction of the stream, which nothing else writes to."""
    model = make_model(pos="learned", smear=False)
    for block in model.blocks:
        block.attn.proj.weight.data[direction] = block.mlp.proj.weight.data[direction] = 0
    model.embed.weight.data[:, direction] = model.pos_embed.weight.data[:, direction] = 0
    model.blocks[layer].mlp.fc.weight.data[neuron] = torch.eye(32)[direction]
    return model


def test_a_planted_neuron_is_the_most_selective():
    model = plant(layer=1, neuron=77, direction=9)
    model.embed.weight.data[:40, 9] = 2  # the nouns
    ids = tokens(40, 32)
    stories = make_tensors(ids, torch.where(ids < 40, NOUN, ids % 2))
    found = interpret.study_neurons(model, stories)
    first, second, *_ = neurons = found["neurons"]
    assert len(neurons) == 3 * 128 and found["main character"] == []  # no story has a main character
    assert first == {"layer": 1, "neuron": 77, "kind": "noun", "share": 1} and second["share"] < 1
    assert found["share"] == pytest.approx(np.mean([neuron["share"] for neuron in neurons]), abs=0.01)
    assert found["shuffled"] < found["share"]
    interpret.add_excerpts(model, stories, [first])
    assert all(int(token) < 40 for _, token, _ in first["excerpts"])
    for before, token, after in first["excerpts"]:
        assert any(before + token + after in "".join(story.texts) for story in stories)


def plant_main_character(layer):
    """A model with a neuron that fires at position 6, and stories that first name their main character there."""
    model = plant(layer, neuron=33, direction=9)
    model.pos_embed.weight.data[6, 9] = 3
    role = torch.zeros(20, 32, dtype=torch.int64)
    role[:, 6], role[:, 12], role[:, 20], role[:, 3] = FIRST, LATER, LATER, CAPITAL
    return model, make_tensors(tokens(20, 32), role=role)


@torch.no_grad()
def test_a_planted_main_character_neuron_is_ranked_first_and_ablated():
    model, stories = plant_main_character(layer=2)
    ranked = interpret.study_neurons(model, stories)["main character"]
    assert ranked[0] == {"layer": 2, "neuron": 33, "chosen by": 1, "later": 1, "capital": 1}
    ids = torch.stack([story.ids for story in stories])
    later = torch.stack([story.role[1:] for story in stories]) == LATER
    cut, _ = plant_main_character(layer=2)
    cut.blocks[2].mlp.proj.weight.data[:, 33] = 0
    rise = cut(ids[:, :-1], ids[:, 1:]) - model(ids[:, :-1], ids[:, 1:])
    rises = interpret.loss_without_neurons(model, stories, {"it": [(2, 33)]})["it"]
    assert rises[0] == pytest.approx(rise[later].mean().item(), abs=1e-4)
    assert rises[1] == pytest.approx(0, abs=1e-6)  # nothing carries the last layer's output to a later token


@torch.no_grad()
def test_a_neuron_can_be_ablated_at_the_first_mention_alone():
    model, stories = plant_main_character(layer=0)
    ids = torch.stack([story.ids for story in stories])
    later = torch.stack([story.role[1:] for story in stories]) == LATER
    with inside.ablate(model.blocks[0].mlp.proj, 33, torch.arange(31) == 6):
        ablated = model(ids[:, :-1], ids[:, 1:])
    rise = (ablated - model(ids[:, :-1], ids[:, 1:]))[later].mean().item()
    assert abs(rise) > 1e-3
    rises = interpret.loss_without_neurons(model, stories, {"it": [(0, 33)]})["it"]
    assert rises[1] == pytest.approx(rise, abs=1e-5)


# -----------------------------------------------------------------------------------------------------------------
# stories as words


def test_words_get_kinds_and_the_main_character_its_role(in_prepared):
    encoding = load_tokenizer("tiny")
    text = "Once upon a time Lily saw a red ball. Mom called. “Yes,” said Lily. Then Lily and Tim went to Ben."
    lists = [encoding.encode_ordinary(story) for story in [text] * 3 + ["He saw a ball."]]
    stories = inside.read_stories(lists, encoding, 64)
    assert [len(story.ids) for story in stories] == sorted(len(ids) + 1 for ids in lists)
    story = stories[-1]
    assert story.ids.shape == story.kind.shape == story.role.shape == (len(story.texts),)
    assert "".join(story.texts) == text[:len("".join(story.texts))]

    def labels_at(word):
        """Kind and role of the token that ends the word's first mention."""
        ends = np.cumsum([len(token) for token in story.texts])
        i = int(np.searchsorted(ends, text.index(word) + len(word)))
        return KINDS[story.kind[i]], story.role[i].item()
    assert labels_at("Lily") == ("name", FIRST) and labels_at("Tim") == ("name", CAPITAL)
    assert labels_at("said Lily") == labels_at("Then Lily") == ("name", LATER)
    assert labels_at("red") == ("adjective", 0) and labels_at("ball") == ("noun", 0)
    assert labels_at("saw") == labels_at("went") == ("verb", 0) and labels_at("Mom") == ("noun", CAPITAL)
    assert labels_at("Once")[0] != "name"


def test_stories_are_read_wherever_the_context_cuts_them(in_prepared):
    encoding = load_tokenizer("tiny")
    text = "🙂 They saw Robo1 run, and Robo1 ran by a café 🙂."
    ids = encoding.encode_ordinary(text)
    for size in range(2, len(ids) + 2):
        story, = inside.read_stories([ids], encoding, size)
        assert story.ids.tolist() == [encoding.eot_token, *ids[:size - 1]] and len(story.texts) == size
        assert text.startswith("".join(story.texts))
    assert "".join(story.texts) == text and FIRST in story.role


def test_of_equally_frequent_names_the_first_is_the_main_character():
    names, text = {"Tim", "Sara", "Ben"}, "So Sara saw Ben, and Ben saw Sara. Then Tim left."
    _, roles = inside.label_characters(text, names, {})
    assert roles[1 + text.index("Sara")] == FIRST and roles[1 + text.index("Ben")] == CAPITAL


# -----------------------------------------------------------------------------------------------------------------
# the command and the page


@pytest.fixture(scope="module")
def written(run, prepared):
    """The folder and the figures of a run, on stories with HTML in them, in a folder whose name is HTML."""
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
        interpret.main(["out/<i>", run, "--dataset=hostile", "--stories=30", "--device=cpu"])
    folder = prepared / "out/<i>"
    return folder, json.loads((folder / "interpret.json").read_text())


def test_the_figures_of_a_run_are_those_of_its_model(written, run, in_prepared):
    folder, results = written
    assert (in_prepared / run / "interpret.html").exists()  # the second run was done too
    heads = results["heads"]
    assert [(head["layer"], head["head"]) for head in heads] == [(0, 0), (1, 0)]
    assert results["stories"] == 30 and len(results["neurons"]) <= 2 * 256
    intact = results["ablations"][0]
    assert set(intact) == {"layer", "head", "loss", "reasoning"} and 1 < intact["loss"] < 7  # these stories' one skill
    cut, *_ = load_run(str(folder))
    cut.blocks[1].attn.proj.weight.data.zero_()  # its only head
    assert intact["loss"] + heads[1]["loss rise"] == pytest.approx(evaluate(cut, "hostile")["val_loss"], rel=1e-4)
    assert set(heads[0]) >= set(interpret.HEAD_FIGURES)


def test_the_sections_of_eval_json_sum_the_figures_up(written):
    folder, results = written
    sections = json.loads((folder / "eval.json").read_text())
    heads, neurons = sections["heads"], sections["neurons"]
    types = [head["type"] for head in results["heads"]]
    assert heads["heads by distance"] == types.count("distance") / len(types)
    assert heads["heads by distance"] + heads["heads by words"] + heads["heads mixed"] == pytest.approx(1)
    assert "correlation of distance and words" not in heads  # of two heads it would say nothing
    assert neurons["a neuron's most common kind"] == pytest.approx(results["shares"]["trained"])
    assert results["main character"] == []  # these stories are too short to name one twice
    assert "main character neuron, AUROC" not in neurons
    best = {"main character": [{"later": 0.9}], "untrained main character": [{"later": 0.6}]}
    neurons = interpret.summarize({**results, **best})["neurons"]
    assert neurons["main character neuron, AUROC"] == 0.9
    assert neurons["untrained main character neuron, AUROC"] == 0.6
    assert heads["measured with"] == neurons["measured with"] == "30 stories of hostile"


class WellFormed(html.parser.HTMLParser):
    """Checks that elements are closed in the order in which they were opened, and collects their names and the text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.names, self.text = [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in ("meta", "li"):  # these need no end
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_well_formed_and_fetches_nothing(written):
    folder, results = written
    text = (folder / "interpret.html").read_text(encoding="utf-8")
    assert len(text) < 5e6 and "http:" not in text and "https:" not in text and "url(" not in text
    parser = WellFormed(text)
    assert "script" not in parser.names and parser.names.count("h2") == 5 and "Inside out/<i>" in parser.text
    assert f"{results['heads'][0]['loss rise']:.3g}</td>" in text
    excerpts = [excerpt for neuron in results["neurons"] for excerpt in neuron.get("excerpts", [])]
    assert any("</" in "".join(excerpt) for excerpt in excerpts)
    for before, token, after in excerpts:
        assert "".join((before, token, after)) in parser.text


def test_the_page_shows_the_main_character_neuron_and_the_logit_lens(written):
    _, results = written
    ranked = [{"layer": 1, "neuron": n, "chosen by": 1.0, "later": 0.75, "capital": 0.5} for n in range(20)]
    ranked[0]["excerpts"] = [["a girl named", " Lily", " who"]]
    lens = [{"text": "It was not <b>", "right": " red", "wrong": " blue", "lead": [-1.0, 0.5, 2.0]}]
    ablated = {"the best": [0.25, 0.125], "the ten best": [0.5, 0.25]}
    parser = WellFormed(interpret.run_page({
        **results, "main character": ranked, "untrained main character": ranked[:1], "main character ablated": ablated,
        "logit lens": lens}))
    name = "layer\u00a01\u00a0neuron\u00a00"
    for expected in (f"In 75% of pairs, {name} is more", "+0.250 nats", "named Lily who", "1 of\n1 exclusions",
                     "not <b>"):
        assert expected in parser.text


def test_mistakes_end_in_one_line(run, in_prepared, capsys):
    with pytest.raises(SystemExit) as stopped:
        interpret.main([run, "--stories=3"])
    assert stopped.value.code == 2 and "at least 10" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no checkpoint out/nothing"):
        interpret.main(["out/nothing"])


def test_stories_too_short_to_see_a_head_at_work_end_in_one_line(workplace):
    stories = [{"story": f"Tim saw ball number {i}. He sat."} for i in range(200)]
    write_jsonl(workplace / "data/short/stories.jsonl", stories)
    prepare(["--dataset=short", "--vocab_size=300", "--clean=False", "--val_fraction=0.2"])
    train.main(["--dataset=short", "--n_layer=1", "--n_embd=32", "--max_steps=1", "--batch_tokens=512", "--evals=0",
                "--compile=False", "--device=cpu"])
    with pytest.raises(SystemExit, match="too few to see heads"):
        interpret.main(["--device=cpu"])

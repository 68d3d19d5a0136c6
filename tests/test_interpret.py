"""lab/interpret.py: figures of heads and neurons where the answer is known, changed models, and the page."""
import html.parser
import json
import shutil

import numpy as np
import pytest
import torch

import model as architecture
import train
from conftest import make_stories, write_jsonl
from eval import evaluate
from lab import interpret
from lab.interpret import CAPITAL, FIRST, KINDS, LATER, NOUN, Stories
from model import alibi_slopes
from prepare import load_tokenizer
from prepare import main as prepare
from sample import load_run
from test_model import POSITIONS, make_model, tokens


def make_tensors(ids, kind=None, role=None):
    """Stories of token ids (N, T) without padding."""
    kind = ids % len(KINDS) if kind is None else kind.clone()
    kind[:, 0] = -1
    role = torch.zeros_like(ids) if role is None else role
    texts = [[str(token) for token in row] for row in ids.tolist()]
    return Stories(ids, kind, role, torch.arange(ids.numel()).view_as(ids), texts)


# -----------------------------------------------------------------------------------------------------------------
# observing and ablating


@pytest.mark.parametrize("pos", POSITIONS)
def test_the_captured_attention_gives_the_models_logits(pos, monkeypatch):
    model, idx = make_model(pos=pos), tokens(2, 32)
    with interpret.capture_attention(model) as captured:
        plain = model(idx)
    assert len(captured) == 3 and captured[0].shape == (2, 4, 32, 32)
    layers = iter(captured)
    monkeypatch.setattr(architecture, "attend", lambda q, k, v, mask: next(layers).softmax(-1) @ v)
    assert torch.allclose(model(idx), plain, atol=1e-4)


def test_ablation_equals_removing_weights_and_ends():
    idx, plain = tokens(2, 20), make_model()(tokens(2, 20))
    for part, columns in (("attn", slice(8, 16)), ("mlp", [5, 77])):
        model, cut = make_model(), make_model()
        projection = getattr(model.blocks[1], part).proj
        getattr(cut.blocks[1], part).proj.weight.data[:, columns] = 0
        with interpret.ablate(projection, columns):
            assert torch.allclose(model(idx), cut(idx), atol=1e-5)
        assert torch.equal(model(idx), plain) and (cut(idx) - plain).abs().max() > 1e-2
        with interpret.ablate(projection, columns, where=torch.arange(20).expand(2, -1) >= 12):
            later = model(idx)
        assert torch.allclose(later[:, :12], plain[:, :12], atol=1e-5)
        assert (later[:, 12:] - plain[:, 12:]).abs().max() > 1e-2


def test_each_head_and_layer_is_ablated_once():
    model, idx = make_model(), tokens(1, 20)
    records = interpret.ablate_each(model, lambda: {"logits": model(idx)})
    logits = {(record["layer"], record["head"]): record["logits"] for record in records}
    assert len(records) == len(logits) == 1 + 3 * (4 + 1)
    assert torch.equal(records[0]["logits"], model(idx)) and (None, None) in logits
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
    model, stories = make_model(), make_tensors(tokens(20, 32))
    with interpret.capture_inputs([model.blocks[0].mlp.proj]) as inputs:
        plain = model(stories.ids)
    assert inputs[0].min() < 0  # which a squared ReLU never is
    neurons, _ = interpret.study_neurons(model, stories)
    assert neurons[9]["highest"] == pytest.approx(inputs[0][:, 1:, 9].max().item(), abs=1e-5)
    cut = make_model()
    cut.blocks[0].mlp.proj.weight.data[:, 9] = 0
    with interpret.ablate(model.blocks[0].mlp.proj, [9]):
        assert torch.allclose(model(stories.ids), cut(stories.ids), atol=1e-5)
    assert not torch.allclose(plain, cut(stories.ids), atol=1e-5)


def test_a_model_that_renames_or_avoids_attend_is_refused(monkeypatch):
    model, stories = make_model(), make_tensors(tokens(20, 32))
    attend = architecture.attend

    def forward(attn, x, rope, mask, kv_cache, start):
        q, k, v = (linear(x).view(*x.shape[:2], attn.n_head, -1).transpose(1, 2) for linear in (attn.q, attn.k, attn.v))
        return attn.proj(attend(q, k, v, mask).transpose(1, 2).reshape(x.shape))
    monkeypatch.setattr(architecture.Attention, "forward", forward)
    with pytest.raises(SystemExit, match="called attend"):
        interpret.study_heads(model, stories, torch.tensor([0]))
    monkeypatch.delattr(architecture, "attend")
    with pytest.raises(SystemExit, match="called attend"):
        interpret.study_heads(model, stories, torch.tensor([0]))


def test_a_model_with_another_attention_is_refused(monkeypatch):
    model, stories = make_model(), make_tensors(tokens(20, 32))
    plain = architecture.attend
    monkeypatch.setattr(architecture, "attend", lambda q, k, v, mask: plain(3 * q, k, v, mask))
    with pytest.raises(SystemExit, match="capture_attention"):
        interpret.study_heads(model, stories, torch.tensor([0]))
    assert len(model(stories.ids)) == 20  # and all is as it was before


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
    head, = interpret.study_heads(model, make_tensors(tokens(40, 32)), torch.tensor([0]))
    assert head["type"] == "distance" and head["peak"] == 3
    assert head["distance"] == pytest.approx(1, abs=1e-4) and head["words"] < 0.1
    assert head["decay"] == pytest.approx(-np.polyfit(np.arange(13), [32**0.5] + [0] * 12, 1)[0], rel=1e-3)
    # the first three queries ask for nothing, the others for the key three back: the previous token gets a small share
    i = np.arange(2, 32)
    share = np.where(i < 4, 1 / i, 1 / (np.exp(32**0.5) + i - 1))
    assert head["previous token"] == pytest.approx(share.mean(), rel=0.1)


def test_the_decay_of_alibi_alone_is_its_slope():
    model = make_model(pos="alibi", smear=False, n_layer=1)
    model.blocks[0].attn.q.weight.data.zero_()
    heads = interpret.study_heads(model, make_tensors(tokens(20, 32)), torch.tensor([0]))
    assert [head["decay"] for head in heads] == pytest.approx(alibi_slopes(4).tolist(), rel=1e-3)
    assert all(head["type"] == "distance" and head["distance"] > 0.999 and head["peak"] == 0 for head in heads)


def test_a_head_that_looks_at_one_token_looks_by_words():
    """Words one-hot, no positions; every query asks for the key of token 5."""
    model = make_model(pos="none", smear=False, n_layer=1, n_head=1, vocab_size=16, n_embd=16)
    model.embed.weight.data = torch.eye(16)
    model.blocks[0].attn.k.weight.data = torch.eye(16)
    model.blocks[0].attn.q.weight.data = torch.eye(16)[5][:, None].expand(16, 16).clone()
    ids = tokens(60, 32) % 16
    head, = interpret.study_heads(model, make_tensors(ids, role=(ids == 5).long()), torch.tensor([0]))
    assert head["type"] == "words" and head["words"] > 0.9 and abs(head["distance"]) < 0.05
    assert head["main character / share"] > 5 and head["nouns / share"] < 1
    kind = torch.where(ids == 5, NOUN, 0)
    head, = interpret.study_heads(model, make_tensors(ids, kind), torch.tensor([0]))
    assert head["nouns / share"] > 5
    assert interpret.head_type({"distance": 0.3, "words": 0.25}) == "mixed"


def test_targets_are_earlier_tokens_of_each_kind():
    """<start> the red ball fell . the ball: the second article's own noun is the ball, seen at 3."""
    start, the, red, ball, fell, dot = range(6)
    ids = torch.tensor([[start, the, red, ball, fell, dot, the, ball]])
    kind = torch.tensor([[-1, 1, 4, NOUN, 3, 0, 1, NOUN]])
    role = torch.tensor([[0, 0, 0, FIRST, 0, 0, 0, LATER]])
    targets = interpret.find_targets(make_tensors(ids, kind, role), torch.tensor([the]))
    pairs = {name: set(map(tuple, x[0].nonzero().tolist())) for name, x in targets.items()}
    assert pairs["own noun"] == {(6, 3)}
    assert pairs["nouns"] == pairs["main character"] == {(4, 3), (5, 3), (6, 3), (7, 3)}
    assert pairs["same token"] == {(6, 1), (7, 3)} and pairs["induction"] == {(6, 2), (7, 4)}
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
    neurons, ranked = interpret.study_neurons(model, stories)
    shuffled, _ = interpret.study_neurons(model, stories, shuffle=True)
    assert len(neurons) == 3 * 128 and ranked == []  # no story has a main character
    first, second, *_ = interpret.list_neurons(neurons, shuffled, stories)
    assert (first["layer"], first["neuron"], first["kind"], first["share"]) == (1, 77, "noun", 1)
    assert first["excess"] > second["excess"]
    assert all(int(token) < 40 for _, token, _ in first["excerpts"])
    with interpret.capture_inputs([model.blocks[1].mlp.proj]) as inputs:
        model(ids)
    assert first["highest"] == pytest.approx(inputs[0][:, 1:, 77].max().item(), abs=1e-3)


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
    _, ranked = interpret.study_neurons(model, stories)
    assert ranked[0] == {"layer": 2, "neuron": 33, "chosen by": 1, "later": 1, "capital": 1}
    ids, later = stories.ids, stories.role[:, 1:] == LATER
    cut, _ = plant_main_character(layer=2)
    cut.blocks[2].mlp.proj.weight.data[:, 33] = 0
    rise = cut(ids[:, :-1], ids[:, 1:]) - model(ids[:, :-1], ids[:, 1:])
    rises = interpret.loss_without_neurons(model, stories, {"it": [(2, 33)]})["it"]
    assert rises[:2] == pytest.approx([rise[later].mean().item(), rise[~later].mean().item()], abs=1e-4)
    assert rises[2] == pytest.approx(0, abs=1e-6)  # nothing carries the last layer's output to a later token


@torch.no_grad()
def test_a_neuron_can_be_ablated_at_the_first_mention_alone():
    model, stories = plant_main_character(layer=0)
    ids, later = stories.ids, stories.role[:, 1:] == LATER
    with interpret.ablate(model.blocks[0].mlp.proj, [33], torch.arange(31).expand(20, -1) == 6):
        ablated = model(ids[:, :-1], ids[:, 1:])
    rise = (ablated - model(ids[:, :-1], ids[:, 1:]))[later].mean().item()
    assert abs(rise) > 1e-3
    rises = interpret.loss_without_neurons(model, stories, {"it": [(0, 33)]})["it"]
    assert rises[2] == pytest.approx(rise, abs=1e-5)


# -----------------------------------------------------------------------------------------------------------------
# stories as words


def test_words_get_kinds_and_the_main_character_its_role(in_prepared):
    encoding = load_tokenizer("tiny")
    text = "Once upon a time Lily saw a red ball. Mom called. “Yes,” said Lily. Then Lily and Tim went to Ben."
    lists = [[encoding.eot_token] + encoding.encode_ordinary(story) for story in [text] * 3 + ["He saw a ball."]]
    stories = interpret.read_stories(lists, encoding, 64)
    assert stories.ids.shape == stories.kind.shape == stories.role.shape
    assert stories.real.sum() == sum(len(ids) - 1 for ids in lists)
    assert "".join(stories.texts[-1]) == text[:len("".join(stories.texts[-1]))]

    def labels_at(word):
        """Kind and role of the token that ends the word's first mention."""
        ends = np.cumsum([len(token) for token in stories.texts[-1]])
        i = int(np.searchsorted(ends, text.index(word) + len(word)))
        return KINDS[stories.kind[-1, i]], stories.role[-1, i].item()
    assert labels_at("Lily") == ("name", FIRST) and labels_at("Tim") == ("name", CAPITAL)
    assert labels_at("said Lily") == labels_at("Then Lily") == ("name", LATER)
    assert labels_at("red") == ("adjective", 0) and labels_at("ball") == ("noun", 0)
    assert labels_at("saw") == labels_at("went") == ("verb", 0) and labels_at("Mom") == ("noun", CAPITAL)
    assert labels_at("Once")[0] != "name"


def test_stories_are_read_wherever_the_context_cuts_them(in_prepared):
    encoding = load_tokenizer("tiny")
    text = "🙂 They saw Robo1 run, and Robo1 ran by a café 🙂."
    ids = [encoding.eot_token] + encoding.encode_ordinary(text)
    for size in range(2, len(ids) + 1):
        stories = interpret.read_stories([ids], encoding, size)
        assert stories.ids.tolist() == [ids[:size]] and stories.real.sum() == size - 1
        assert len(stories.texts[0]) == size and text.startswith("".join(stories.texts[0]))
    assert "".join(stories.texts[0]) == text and FIRST in stories.role


def test_of_equally_frequent_names_the_first_is_the_main_character():
    names, text = {"Tim", "Sara", "Ben"}, "So Sara saw Ben, and Ben saw Sara. Then Tim left."
    _, roles = interpret.label_characters(text, names, {})
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
    """Checks that elements are closed in the order in which they were opened, and collects their names and ids."""

    def __init__(self, page):
        super().__init__()
        self.open, self.names, self.ids, self.text = [], [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in ("meta", "input", "li"):  # these need no end
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
    assert parser.names.count("script") == 2 and parser.names.count("h2") == 5
    assert len(parser.ids) == len(set(parser.ids)) == 4 and "Inside out/<i>" in parser.text
    assert f"{results['heads'][0]['loss rise']:.3g}</td>" in text
    searched = text.split('type="application/json">')[1].split("</script>")[0]
    assert len(json.loads(searched)) == len(results["neurons"])
    assert any("</" in "".join(excerpt) for _, excerpts in json.loads(searched) for excerpt in excerpts)


def test_the_page_shows_the_main_character_neuron_and_the_logit_lens(written):
    _, results = written
    ranked = [{"layer": 1, "neuron": n, "chosen by": 1.0, "later": 0.75, "capital": 0.5} for n in range(20)]
    lens = [{"text": "It was not <b>", "right": " red", "wrong": " blue", "lead": [-1.0, 0.5, 2.0]}]
    ablated = {"the best": [0.25, 0.0, 0.125], "the ten best": [0.5, 0.0, 0.25]}
    parser = WellFormed(interpret.run_page({
        **results, "main character": ranked, "untrained main character": ranked[:1], "main character ablated": ablated,
        "logit lens": lens}))
    name = "layer\u00a01\u00a0neuron\u00a00"
    for expected in (f"In 75% of pairs, {name} is more", "+0.250 nats", "1 of\n1 exclusions", "not <b>"):
        assert expected in parser.text


def test_mistakes_end_in_one_line(run, in_prepared, capsys):
    with pytest.raises(SystemExit) as stopped:
        interpret.main([run, "--stories=3"])
    assert stopped.value.code == 2 and "at least 10" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="train.py"):
        interpret.main(["out/nothing"])


def test_stories_too_short_to_see_a_head_at_work_end_in_one_line(workplace):
    stories = [{"story": f"Tim saw ball number {i}. He sat."} for i in range(200)]
    write_jsonl(workplace / "data/short/stories.jsonl", stories)
    prepare(["--dataset=short", "--vocab_size=300", "--clean=False", "--val_fraction=0.2"])
    train.main(["--dataset=short", "--n_layer=1", "--n_embd=32", "--max_steps=1", "--batch_tokens=512", "--evals=0",
                "--compile=False", "--device=cpu"])
    with pytest.raises(SystemExit, match="too few to see heads"):
        interpret.main(["--device=cpu"])

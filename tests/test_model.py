"""model.py: what a causal language model must satisfy, and agreement with one written in NumPy."""
import math

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import model as model_file
from model import GPT, SIZES, Cache, GPTConfig, alibi_slopes, apply_rope, norm, one_product, rope_table

POSITIONS = ("rope", "alibi", "learned", "none")


def make_model(seed=0, **settings):
    """A small model whose zero-initialized weights are random instead, so that every part has an effect."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=97, block_size=32, n_layer=3, n_head=4, n_embd=32, qk_gain=8.0, value_embeds=True)
    model = GPT(GPTConfig(**{**shape, **settings}))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if name.endswith("gain") else 0.0, std=0.2)
    return model.eval()


def tokens(*shape, seed=1):
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pos", POSITIONS)
def test_a_later_token_never_changes_an_earlier_logit(pos):
    model, idx = make_model(pos=pos), tokens(2, 32)
    changed = idx.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 97
    before, after = model(idx), model(changed)
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-5)
    assert (before[:, 20] - after[:, 20]).abs().max() > 1e-2


def test_loss_at_the_start_is_that_of_a_blind_guess():
    model = GPT(GPTConfig(vocab_size=97, block_size=32, n_layer=2, n_head=2, n_embd=32))
    assert model(tokens(4, 32), tokens(4, 32, seed=2)).mean().item() == pytest.approx(math.log(97), abs=1e-4)


@pytest.mark.parametrize("pos", POSITIONS)
def test_cached_logits_equal_plain_ones(pos):
    """Read in pieces through the cache (several tokens, then one at a time) as at once."""
    model, idx = make_model(pos=pos), tokens(3, 32)
    with torch.no_grad():
        plain, cache = model(idx), Cache(model, 3)
        pieces = [model(piece, cache=cache) for piece in idx.split([9, 7, 1, 1, 1, 13], dim=1)]
    assert cache.length == 32
    assert torch.allclose(torch.cat(pieces, 1), plain, atol=1e-4)
    with pytest.raises(ValueError, match="33 tokens do not fit"):
        model(idx[:, :1], cache=cache)


def test_alibi_slopes_are_the_published_ones():
    assert alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


def test_rope_depends_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    cos, sin = rope_table(64, 16)
    def product(i, j):
        return (apply_rope(q, cos[i:i + 1], sin[i:i + 1]) * apply_rope(k, cos[j:j + 1], sin[j:j + 1])).sum().item()
    assert product(10, 3) == pytest.approx(product(57, 50), abs=1e-4)
    assert product(10, 3) != pytest.approx(product(10, 4), abs=1e-4)
    assert apply_rope(q, cos[5:6], sin[5:6]).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)


def test_one_product_is_three(seed=0):
    """What a GPU computes in one product is what three products give, and so are the gradients."""
    x, weights = torch.randn(2, 5, 16), [torch.randn(16, 16, requires_grad=True) for _ in range(3)]
    once, thrice = one_product(x, *weights), [x @ weight.T for weight in weights]
    for a, b in zip(once, thrice):
        assert torch.allclose(a, b, atol=1e-5)
    gradients = [torch.autograd.grad(sum(part.square().sum() for part in parts), weights) for parts in (once, thrice)]
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("pos", POSITIONS)
def test_the_forward_pass_compiles_as_one_graph(pos, dtype):
    """Without code generation, which takes long: a graph break would be found before that."""
    model, idx = make_model(pos=pos), tokens(2, 33)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss, expected = compiled(idx[:, :-1], idx[:, 1:]), model(idx[:, :-1], idx[:, 1:])
    assert torch.allclose(loss, expected, rtol=0.02, atol=0.02)
    torch.compiler.reset()


@pytest.mark.parametrize("rows, block_size, gigabytes", [(32, 512, 3.71), (16, 256, 0.97)])
def test_activations_take_no_more_memory_than_they_did(monkeypatch, rows, block_size, gigabytes):
    """What the backward pass of 8 x 512 needs, not compiled and in bfloat16, with the kernel that a GPU takes for
    attention. Fake tensors have shapes and no memory. train.max_micro_batch() relies on this figure."""
    def attend(q, k, v, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    monkeypatch.setattr(model_file, "attend", attend)
    sizes = {}

    def note(x):
        sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x
    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model = GPT(GPTConfig(vocab_size=4096, block_size=block_size, n_layer=8, n_head=8, n_embd=512, qk_gain=8.0,
                              value_embeds=True))
        idx = torch.zeros(rows, block_size, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(idx, idx)
        for p in model.parameters():
            sizes.pop(p.untyped_storage()._cdata, None)
    assert loss.shape == (rows, block_size)
    assert sum(sizes.values()) / 1e9 == pytest.approx(gigabytes, rel=0.1)


@pytest.mark.parametrize("n_head", [1, 2, 8])
def test_the_gain_lets_heads_of_any_size_choose_equally_sharply(n_head):
    """At the start, the largest logit is the same for all sizes: a query and a key that point the same way give 8."""
    model = GPT(GPTConfig(vocab_size=97, block_size=32, n_layer=1, n_head=n_head, n_embd=32, qk_gain=8.0))
    head_size = 32 // n_head
    q = norm(torch.randn(head_size)) * model.blocks[0].attn.gain[0]
    assert (q @ norm(q) * head_size ** -0.5).item() == pytest.approx(8, rel=1e-3)


def test_one_batch_can_be_overfitted():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, block_size=16, n_layer=2, n_head=2, n_embd=32))
    idx = tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model(idx[:, :-1], idx[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("extras", (True, False))
@pytest.mark.parametrize("pos", POSITIONS)
def test_agrees_with_an_independent_implementation(pos, extras):
    """The same weights in NumPy, float64, one token and one head at a time, straight from the formulas."""
    model, idx = make_model(pos=pos, smear=extras, value_embeds=extras), tokens(1, 12)
    w = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}
    heads, size = 4, 8

    def rms(x):
        return x / math.sqrt(np.mean(x * x) + np.finfo(np.float32).eps)

    def turn(x, position):
        out = x.copy()
        for i in range(size // 2):
            angle = position * 10000.0 ** (-2 * i / size)
            a, b = x[i], x[i + size // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + size // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    x = [w["embed.weight"][t] for t in idx[0].tolist()]
    if pos == "learned":
        x = [row + w["pos_embed.weight"][i] for i, row in enumerate(x)]
    x = [rms(row) for row in x]
    if extras:
        x = [rms(row + w["smear"] * before) for row, before in zip(x, [np.zeros(32), *x])]
    for layer in range(3):
        get = lambda name: w[f"blocks.{layer}.{name}.weight"]
        qkv = [[get(f"attn.{part}") @ rms(row) for part in "qkv"] for row in x]
        if extras and layer == 1:
            for t, row, (_, _, v) in zip(idx[0].tolist(), x, qkv):
                gate = 2 / (1 + np.exp(-get("attn.value_gate") @ rms(row)))
                v += np.repeat(gate, size) * w["blocks.1.attn.value_embed.weight"][t]
        mixed = []
        for i in range(len(x)):
            row = []
            for h in range(heads):
                part = lambda j, which: qkv[j][which][h * size:(h + 1) * size]
                place = turn if pos == "rope" else lambda v, position: v
                q = place(w[f"blocks.{layer}.attn.gain"][h] * rms(part(i, 0)), i)
                scores = np.array([q @ place(rms(part(j, 1)), j) / math.sqrt(size) for j in range(i + 1)])
                if pos == "alibi":
                    scores -= 2.0 ** (-8 * (h + 1) / heads) * (i - np.arange(i + 1))
                p = np.exp(scores - scores.max())
                row.append(sum(p[j] / p.sum() * part(j, 2) for j in range(i + 1)))
            mixed.append(get("attn.proj") @ np.concatenate(row))
        x = [a + b for a, b in zip(x, mixed)]
        x = [row + get("mlp.proj") @ np.maximum(get("mlp.fc") @ rms(row), 0) ** 2 for row in x]
    logits = np.stack([w["head.weight"] @ rms(row) for row in x])
    assert np.allclose(model(idx)[0].detach().numpy(), logits, atol=1e-4)


def test_the_fast_attention_of_bfloat16_agrees_with_the_plain_one(monkeypatch):
    """On CPU, bfloat16 takes products and a softmax instead of the fused kernel, for parts of 128 queries."""
    model, idx = make_model(block_size=300), tokens(2, 301)
    def loss_and_gradient(dtype):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(idx[:, :-1], idx[:, 1:]).mean()
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])
    plain, plain_grad = loss_and_gradient(torch.float32)
    expected = model(idx[:, :32])
    monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")  # so this takes the other way
    fast, fast_grad = loss_and_gradient(torch.bfloat16)
    assert fast == pytest.approx(plain, rel=5e-3)
    assert torch.cosine_similarity(plain_grad, fast_grad, dim=0) > 0.999
    with torch.no_grad():  # and a token at a time, through the cache
        cache = Cache(model.bfloat16(), 2)
        found = torch.cat([model(token, cache=cache) for token in idx[:, :32].split(1, 1)], 1)
    assert torch.cosine_similarity(found.float(), expected.float(), dim=-1).min() > 0.99


def test_targets_of_minus_one_cost_nothing():
    model, idx, targets = make_model(), tokens(2, 8), tokens(2, 8, seed=2)
    nats = model(idx, targets)
    expected = -model(idx).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert nats.shape == (2, 8) and torch.allclose(nats, expected, atol=1e-5)
    targets[0, 3] = -1
    assert model(idx, targets)[0, 3] == 0


def test_parameters_and_flops_are_counted():
    c = GPTConfig(vocab_size=4096, block_size=256, n_layer=8, n_head=4, n_embd=128)
    model = GPT(c)
    assert model.num_params(embedding=False) == 8 * 12 * 128**2
    assert model.num_params() == 8 * 12 * 128**2 + 2 * 4096 * 128 + 128  # one more a channel: smear
    attention = 8 * 128 * sum(range(1, 257)) / 256 * 4 * 3  # scores and mixing, 2 FLOPs each, forward and twice back
    assert model.flops_per_token() == 6 * (8 * 12 * 128**2 + 4096 * 128) + attention


def test_value_embeddings_change_nothing_at_first_and_learn_where_their_token_stands():
    plain, model = (GPT(GPTConfig(vocab_size=97, block_size=32, n_layer=4, n_head=2, n_embd=32, value_embeds=given))
                    for given in (False, True))
    assert model.num_params() - plain.num_params() == 2 * 97 * 32 + 2 * 2 * 32  # in layers 1 and 3: tables and gates
    assert model.num_params(embedding=False) - plain.num_params(embedding=False) == 2 * 2 * 32
    for name, p in model.named_parameters():
        if name.endswith("proj.weight") or name == "head.weight":  # start at zero too, and would hide any difference
            torch.nn.init.normal_(p)
    plain.load_state_dict(model.state_dict(), strict=False)
    idx = tokens(2, 9)
    assert torch.equal(model(idx), plain(idx))
    model(idx[:, :-1], idx[:, 1:]).mean().backward()
    touched = model.blocks[1].attn.value_embed.weight.grad.abs().sum(1) > 0  # (V,)
    assert touched.nonzero()[:, 0].tolist() == idx[:, :-1].unique().tolist()


def test_the_papers_shapes_are_valid():
    for layers, width, heads in SIZES.values():
        GPTConfig(n_layer=layers, n_embd=width, n_head=heads)


@pytest.mark.parametrize("settings, expected", [
    (dict(n_embd=100, n_head=3), "--n_embd=100 is not a multiple of --n_head=3"),
    (dict(n_embd=12, n_head=4), "even head size, not 3"),
    (dict(n_layer=0), "--n_layer=0 must be at least 1"),
    (dict(pos="cosine"), "--pos=cosine must be one of"),
])
def test_invalid_shapes_end_in_one_line(settings, expected):
    with pytest.raises(SystemExit, match=expected):
        GPTConfig(**settings)

"""The transformer, its key-value cache, and the optimizers that fit its weights.

Read GPT.forward first: it calls everything above it. Logits of shape (B, T, V) come from token ids (B, T).
Shapes in comments: B batch, T tokens, C channels (n_embd), H heads, D channels of a head, S keys, V vocabulary."""
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.device import pick_device

# (n_layer, n_embd, n_head); the first two are the paper's (Eldan & Li 2023, arXiv 2305.07759)
SIZES = {"1M": (8, 64, 4), "3M": (8, 128, 4), "8M": (8, 256, 8), "28M": (8, 512, 8), "33M": (4, 768, 12),
         "1L-21M": (1, 1024, 16), "2L-33M": (2, 1024, 16)}
POSITIONS = ("rope", "alibi", "learned", "none")


@dataclass
class GPTConfig:
    vocab_size: int = 4096
    block_size: int = 256  # the context: how many tokens the model sees at once
    n_layer: int = 8
    n_head: int = 4
    n_embd: int = 128
    pos: str = "rope"  # how positions are encoded: one of POSITIONS
    smear: bool = True  # add a learned multiple of the previous token's embedding to each token's own
    qk_gain: float = 0.0  # the largest logit of attention at the start, learned by each head; 0: sqrt(head size), fixed
    value_embeds: bool = False  # in every second layer, add an embedding of each token to its value

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                sys.exit(f"--{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            sys.exit(f"--n_embd={self.n_embd} is not a multiple of --n_head={self.n_head}")
        if self.pos not in POSITIONS:
            sys.exit(f"--pos={self.pos} must be one of {', '.join(POSITIONS)}")
        head_size = self.n_embd // self.n_head
        if self.pos == "rope" and head_size % 2:
            sys.exit(f"rope needs an even head size, not {head_size}: change --n_head or --n_embd")


def norm(x):
    """RMSNorm over the last dimension, without a learned gain: in most places the next matrix can absorb one."""
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)  # on a GPU, autocast would return float32


def rope_table(length, head_size, base=10000.0):
    """cos and sin, (length, D/2), of position times frequency (Su et al. 2021, arXiv 2104.09864)."""
    frequency = base ** (-torch.arange(0, head_size, 2).float() / head_size)  # (D/2,)
    angle = torch.outer(torch.arange(length).float(), frequency)
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Rotary embedding: rotate each pair (x[i], x[i + D/2]) of x (B, T, H, D) by an angle; cos and sin are (T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # (T, 1, D/2), the same for all heads
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def alibi_slopes(n_head):
    """m_h = 2^(-8h/H) for h = 1..H: how much a logit falls per token of distance (Press et al. 2022, arXiv 2108.12409).
    """
    return 2.0 ** (-8.0 * torch.arange(1, n_head + 1) / n_head)


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v of q (B, H, T, D) and k, v (B, H, S, D); causal unless a mask is given."""
    T, S = q.size(2), k.size(2)  # without a mask, either S = T or T = 1
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and mask is None:
        # torch's fused kernel is slow here, especially its backward pass: two matrix products and a softmax make
        # training 1.5 times faster. 128 queries at a time do not read the keys that come after the last of them.
        parts = []
        for start in range(0, T, 128):
            end = S - T + start + 128
            parts.append(attend_plainly(q[:, :, start:start + 128], k[:, :, :end], v[:, :, :end]))
        return torch.cat(parts, dim=2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)


def attend_plainly(q, k, v):
    """Causal attention of the queries at the last T of S positions: two products, and a softmax in float32."""
    T, S = q.size(2), k.size(2)
    # for a single query, multiplying and summing is faster than a product, which would copy the keys
    scores = q @ k.transpose(-2, -1) if T > 1 else (q * k).sum(-1)[:, :, None]  # (B, H, T, S)
    future = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
    scores = (scores.float() * q.size(-1) ** -0.5).masked_fill(future, -math.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def one_product(x, *weights):
    """x (B, T, C) times each of the weights (C_out, C), as one matrix product: several small ones leave a GPU idle."""
    return F.linear(x, torch.cat(weights)).split([weight.size(0) for weight in weights], dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention: every position reads from itself and the earlier ones."""

    def __init__(self, config, layer):
        super().__init__()
        self.n_head = config.n_head
        # three matrices instead of one: Muon orthogonalizes each one separately, which makes learning faster
        self.q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.v = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if config.qk_gain:
            self.gain = nn.Parameter(torch.empty(config.n_head))
        if config.value_embeds and layer % 2 == 1:
            self.value_embed = nn.Embedding(config.vocab_size, config.n_embd)
            # the gate reads 32 channels: so it learns faster than one that reads all
            self.value_gate = nn.Linear(min(32, config.n_embd), config.n_head, bias=False)

    def forward(self, x, idx, rope, mask, kv_cache, positions):
        B, T, C = x.shape
        if x.is_cuda:
            q, k, v = one_product(x, self.q.weight, self.k.weight, self.v.weight)  # (B, T, C) each
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (part.view(B, T, self.n_head, -1) for part in (q, k, v))  # (B, T, H, D) each
        if hasattr(self, "value_embed"):
            gate = 2 * self.value_gate(x[..., :self.value_gate.in_features]).sigmoid()  # (B, T, H), at first 1
            v = v + gate[..., None] * self.value_embed(idx).view_as(v).to(v.dtype)
        q, k = norm(q), norm(k)  # QK-norm: attention's logits stay bounded at high learning rates
        if hasattr(self, "gain"):
            # else no logit could exceed sqrt(D), and a head of 16 channels could hardly choose one key among 256
            q = q * self.gain[:, None].to(q.dtype)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if kv_cache is not None:  # add these keys and values to the cached ones, and attend to all of them
            kv_cache[0, :, :, positions] = k
            kv_cache[1, :, :, positions] = v
            k, v = kv_cache  # (B, H, S, D) each
        y = attend(q, k, v, mask)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two matrices with a squared ReLU between them (So et al. 2021, arXiv 2109.08668), applied to each position
    separately.

    Most of its hidden activations are exactly zero and none is negative, which makes neurons interpretable."""

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        x = F.relu(self.fc(x))  # (B, T, 4C)
        return self.proj(x * x)  # squared ReLU; under autocast, x.square() would run in float32 on a GPU


class Block(nn.Module):
    """Attention and MLP. Each reads the normed residual stream x, and adds to it what it has computed."""

    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, idx, rope, mask, kv_cache, positions):
        x = x + self.attn(norm(x), idx, rope, mask, kv_cache, positions)  # (B, T, C)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Decoder-only transformer: pre-norm, QK-norm, squared-ReLU MLP, no biases, untied head that starts at zero.

    Smear (after modded-nanogpt) adds to each token's embedding a learned multiple of the previous one, by channel.
    A single layer can then find what followed an earlier copy of a token (an induction head); a plain transformer needs
    a previous-token head in the layer below.

    Value embeddings (after modded-nanogpt and nanochat): every second layer has a table with a vector for each token.
    Attention adds this vector to the token's value, times a gate between 0 and 2 for each head. The only matrix product
    is the gate's, which is small.

    Value embeddings start at zero, embeddings of tokens and positions are drawn with standard deviation `embed_std`.
    Small embeddings learn faster. But tokens used in similar ways, such as + and -, get nearly the same updates. If
    embeddings start small, the updates dominate, the embeddings become nearly equal, and no layer can tell them
    apart."""

    def __init__(self, config, embed_std=0.1):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.smear:
            self.smear = nn.Parameter(torch.empty(config.n_embd))
        if config.pos == "learned":
            self.pos_embed = nn.Embedding(config.block_size, config.n_embd)
        elif config.pos == "rope":
            cos, sin = rope_table(config.block_size, config.n_embd // config.n_head)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        elif config.pos == "alibi":
            self.register_buffer("slopes", alibi_slopes(config.n_head), persistent=False)
        self.init_weights(embed_std)

    def init_weights(self, embed_std):
        """Draw all weights. With a standard deviation of 1/sqrt(C), a matrix's outputs are about as large as its
        inputs."""
        for name, p in self.named_parameters():
            if name.endswith((".proj.weight", "value_embed.weight", "value_gate.weight")) or name == "head.weight":
                nn.init.zeros_(p)  # every block starts as the identity, and all tokens are equally likely
            elif name == "smear":
                nn.init.constant_(p, 0.5)
            elif name.endswith("attn.gain"):
                nn.init.constant_(p, self.config.qk_gain * (self.config.n_embd // self.config.n_head) ** -0.5)
            elif "embed" in name:
                nn.init.normal_(p, std=embed_std)
            else:
                nn.init.normal_(p, std=self.config.n_embd ** -0.5)

    def attention_mask(self, queries, S):
        """Which of S keys the queries at positions (T,) may attend to, in one of the two forms that torch takes: (T,
        S), True where attention is allowed; or for alibi (H, T, S), a bias to add to the logits, -inf where it is
        not."""
        distance = queries[:, None] - torch.arange(S, device=queries.device)  # (T, S)
        if self.config.pos != "alibi":
            return distance >= 0
        bias = -self.slopes[:, None, None] * distance
        return bias.masked_fill(distance < 0, -math.inf)

    def locate(self, T, cache, device):
        """Where T new tokens go, after those in the cache: (their positions, the number S of keys, the mask). The mask
        is None where attend() needs none: if nothing is cached, or for a single token, which sees all keys."""
        start = cache.length if cache else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into a context of {self.config.block_size}")
        if cache and cache.position is not None:  # in a CUDA graph, the position is a tensor
            return cache.position, cache.max_keys, self.attention_mask(cache.position, cache.max_keys)
        mask = None
        if self.config.pos == "alibi" or (start > 0 and T > 1):
            mask = self.attention_mask(torch.arange(start, start + T, device=device), start + T)
        return slice(start, start + T), start + T, mask

    def add_smear(self, x, cache):
        """Add to x (B, T, C) a learned multiple of each token's predecessor, and normalize."""
        before = cache.last_embedding if cache and cache.length else torch.zeros_like(x[:, :1])
        previous = torch.cat((before, x[:, :-1]), dim=1)  # (B, T, C)
        if cache:
            cache.last_embedding.copy_(x[:, -1:])
        return norm(x + self.smear * previous)

    def forward(self, idx, targets=None, cache=None):
        """Logits (B, T, V) of token ids idx (B, T). With `targets` (B, T), the cross-entropy of each token in nats,
        (B, T); targets of -1 are ignored and cost 0. With a `cache`, idx continues the text whose keys and values the
        cache holds, and its own are added."""
        positions, S, mask = self.locate(idx.size(1), cache, idx.device)
        x = self.embed(idx)  # (B, T, C)
        if self.config.pos == "learned":
            x = x + self.pos_embed.weight[positions]
        x = norm(x)
        if self.config.smear:
            x = self.add_smear(x, cache)
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            x = x.to(torch.get_autocast_dtype("cuda"))  # the residual stream in 16 bits: less memory, and faster
        rope = None
        if self.config.pos == "rope":
            rope = self.cos[positions], self.sin[positions]  # (T, D/2) each
        for layer, block in enumerate(self.blocks):
            kv_cache = cache.kv[layer, :, :, :, :S] if cache else None  # a view: attention writes into the cache
            x = block(x, idx, rope, mask, kv_cache, positions)
        if cache:
            cache.length += idx.size(1)
        logits = self.head(norm(x))
        if targets is None:
            return logits
        # in float32: bfloat16 is too coarse for a sum over the whole vocabulary
        nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
        return nats.view_as(targets)

    def num_params(self, embedding=True):
        """Number of weights; without `embedding`, those of the blocks alone: no embeddings, no smear, no head."""
        return sum(p.numel() for name, p in self.named_parameters()
                   if embedding or (name.startswith("blocks.") and "embed" not in name))

    def flops_per_token(self):
        """Training FLOPs per token: 6 per weight of a matrix product (Kaplan et al. 2020, arXiv 2001.08361), and in
        each layer 12 per channel and key: (block_size + 1)/2 keys on average. Embedding look-ups are free."""
        c = self.config
        weights = self.num_params(embedding=False) + c.vocab_size * c.n_embd
        return 6 * weights + 12 * c.n_layer * c.n_embd * (c.block_size + 1) // 2


class Cache:
    """The keys and values of all layers, (n_layer, 2, B, H, block_size, D), so that decoding reads each token once.

    `length` positions are filled. `last_embedding` (B, 1, C) is the last token's, for smear. In a CUDA graph,
    `position` (1,) is where the next token stands, and attention reads `max_keys` keys, of which it masks those that
    come later."""

    def __init__(self, model, batch_size):
        c, weight = model.config, model.head.weight
        self.kv = torch.zeros(c.n_layer, 2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head,
                              dtype=weight.dtype, device=weight.device)
        self.length = 0
        self.last_embedding = torch.zeros(batch_size, 1, c.n_embd, dtype=weight.dtype, device=weight.device)
        self.position, self.max_keys = None, 0


# -----------------------------------------------------------------------------------------------------------------
# optimizers: kept with the model, because each kind of weight needs the optimizer that suits it


def orthogonalize(x, dtype):
    """Approximately U V^T of each matrix U S V^T in x (B, M, N), in `dtype`, with singular values from 0.7 to 1.2.

    Quintic Newton-Schulz iteration, x ← a x + (b x xᵀ + c (x xᵀ)²) x, with the coefficients of Jordan et al. (2024,
    kellerjordan.github.io/posts/muon), whose optimizer this is."""
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    # a norm of 1 bounds the singular values by 1, so that no product overflows in float16
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)  # b x xᵀ + c (x xᵀ)²
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)  # a x + polynomial x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose update of each matrix is made nearly orthogonal, so that rare directions move as
    far as common ones. Then its rows are balanced, so that all move about equally far (NorMuon, Li et al. 2025, arXiv
    2510.05491); beta2=0 leaves that out.

    torch.optim.Muon does not balance rows, and always multiplies in bfloat16. On CPUs without instructions for that, as
    in most laptops, its step takes nine times as long as one in float32."""

    def __init__(self, matrices, dtype, beta2=0.95, **settings):
        super().__init__(matrices, settings)
        self.dtype, self.beta2 = dtype, beta2

    @torch.no_grad()
    def step(self):
        """Shrink each matrix by lr * weight_decay, and move it by its momentum, made orthogonal and balanced.

        The _foreach_ functions work on a list of tensors, with one kernel for all of them on a GPU."""
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in matrices]
            averages = [self.average(p, "momentum_buffer", p) for p in matrices]
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, averages, group["momentum"])  # Nesterov: one step ahead
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            stacks = {}  # in 16 bits, matrices of one shape are multiplied together, which is faster
            for i, p in enumerate(matrices):
                key = i if self.dtype == torch.float32 else tuple(p.shape)
                stacks.setdefault(key, []).append(i)
            for indices in stacks.values():
                stack = orthogonalize(torch.stack([updates[i] for i in indices]), self.dtype)  # (B, M, N)
                members = [matrices[i] for i in indices]
                if self.beta2:
                    stack = self.balance(stack.float(), members)
                # scaled so that tall matrices change their outputs as much as square ones
                rate = group["lr"] * max(1, stack.size(1) / stack.size(2)) ** 0.5
                torch._foreach_add_(members, list(stack.to(updates[0].dtype)), alpha=-rate)

    def balance(self, stack, matrices):
        """Divide each row of the updates (B, M, N) by its running root mean square, and restore each matrix's norm.
        Where a matrix is wider than tall, columns take the place of rows."""
        dim = 2 if stack.size(1) >= stack.size(2) else 1
        squares = stack.square().mean(dim, keepdim=True)  # (B, M, 1) or (B, 1, N)
        averages = [self.average(p, "square", square) for p, square in zip(matrices, squares)]
        torch._foreach_lerp_(averages, list(squares), 1 - self.beta2)
        balanced = stack / torch.stack(averages).sqrt().clamp(min=1e-7)
        before, after = (x.norm(dim=(1, 2), keepdim=True) for x in (stack, balanced))
        return balanced * (before / after.clamp(min=1e-7))

    def average(self, p, name, like):
        """self.state[p][name], a running average; at first zeros in the shape of `like`."""
        if name not in self.state[p]:
            self.state[p][name] = torch.zeros_like(like)
        return self.state[p][name]


def make_optimizers(model, args, embed_decay=0.0):
    """Muon for the matrices of the blocks and AdamW for all other weights, or AdamW for everything.

    embed_decay is the weight decay of all that is neither a matrix of a block nor a value embedding. Alongside Muon,
    AdamW uses betas of 0.7 and 0.99 instead of the usual 0.9 and 0.95, since most rows of an embedding have no gradient
    in most steps. Value embeddings learn best at several times the common rate and decay."""
    matrices, value_embeds, others = [], [], []
    for name, p in model.named_parameters():
        if name.startswith("blocks.") and "embed" in name:
            value_embeds.append(p)
        elif name.startswith("blocks.") and p.ndim == 2:
            matrices.append(p)
        else:
            others.append(p)
    groups = [{"params": others, "weight_decay": embed_decay}]
    if value_embeds:  # for lr_scale, see set_learning_rate() in train.py
        groups.append({"params": value_embeds, "lr_scale": 4.0, "weight_decay": 3 * embed_decay})
    if args.optimizer == "adamw":
        groups.insert(0, {"params": matrices, "weight_decay": args.weight_decay})
        return [torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.95), fused=True)]
    _, muon_dtype = pick_device(str(model.head.weight.device))  # the fastest, whatever --dtype says
    return [Muon(matrices, muon_dtype, lr=args.lr, weight_decay=args.weight_decay, momentum=0.9),
            torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.0, betas=(0.7, 0.99), fused=True)]


def lr_multiplier(progress, args):
    """The learning rate at `progress` (0 to 1) of the run, as a share of its peak: warm-up, then cosine or wsd."""
    if progress < args.warmup:
        return progress / args.warmup
    if args.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (progress - args.warmup) / (1 - args.warmup)))
    return min(1.0, (1 - progress) / max(args.cooldown, 1e-9))  # stable, then a linear decay to zero

"""The transformer: config, attention, MLP, block, model, key-value cache, loading from a checkpoint."""
import glob
import math
import os
import pickle
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# the paper's shapes: n_layer, n_embd, n_head (Eldan & Li 2023, arXiv 2305.07759)
SIZES = {"1M": (8, 64, 4), "3M": (8, 128, 4), "8M": (8, 256, 8), "28M": (8, 512, 8), "33M": (4, 768, 12),
         "1L-21M": (1, 1024, 16), "2L-33M": (2, 1024, 16)}


@dataclass
class GPTConfig:
    vocab_size: int = 4096
    block_size: int = 256
    n_layer: int = 8
    n_head: int = 4
    n_embd: int = 128
    pos: str = "rope"  # rope, alibi, learned or none
    smear: bool = True  # every token also shows the one before it

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                sys.exit(f"--{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            sys.exit(f"--n_embd={self.n_embd} is no multiple of --n_head={self.n_head}")
        if self.pos not in ("rope", "alibi", "learned", "none"):
            sys.exit(f"--pos={self.pos} is none of rope, alibi, learned, none")
        if self.pos == "rope" and self.n_embd // self.n_head % 2:
            sys.exit(f"rope needs an even head size, not {self.n_embd // self.n_head}: change --n_head or --n_embd")


def norm(x):
    """RMSNorm over the last dimension, without weights: the matrix that follows can scale as well."""
    return F.rms_norm(x, (x.size(-1),))


def rope_table(length, size, base=10000.0):
    """cos and sin, (length, size/2), of position times frequency (Su et al. 2021, arXiv 2104.09864)."""
    angle = torch.outer(torch.arange(length).float(), base ** (-torch.arange(0, size, 2).float() / size))
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + size/2]) of x (B, T, H, size) by its position's angle, (T, size/2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def alibi_slopes(n_head):
    """m_h = 2^(-8h/H) for h = 1..H: how steeply head h forgets with distance (Press et al. 2022, arXiv 2108.12409)."""
    return 2.0 ** (-8.0 * torch.arange(1, n_head + 1) / n_head)


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(D)) v of q, k, v (B, H, T, D); causal, unless a mask says otherwise."""
    T = q.size(2)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and mask is None:
        # torch's fused kernel is slow here, above all backward: as two products and a softmax it trains 1.5 times
        # faster. For a single query a sum is faster than a product, which would copy the keys first
        S = k.size(2)
        scores = q @ k.transpose(-2, -1) if T > 1 else (q * k).sum(-1)[:, :, None]  # (B, H, T, S)
        future = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
        scores = (scores.float() * q.size(-1) ** -0.5).masked_fill(future, -math.inf)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.v = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, mask, past):
        B, T, C = x.shape
        q, k, v = (linear(x).view(B, T, self.n_head, -1) for linear in (self.q, self.k, self.v))  # (B, T, H, D)
        q, k = norm(q), norm(k)  # QK-norm keeps the logits of attention in bounds at high learning rates
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if past is not None:  # this layer's part of the cache, and how many positions of it are filled
            kv, start = past
            kv[0, :, :, start:start + T], kv[1, :, :, start:start + T] = k, v
            k, v = kv[:, :, :, :start + T]  # (B, H, start + T, D)
        y = attend(q, k, v, mask)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        x = F.relu(self.fc(x))
        return self.proj(x * x)  # autocast on a GPU would compute .square(), and keep it, in float32


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, past):
        x = x + self.attn(norm(x), rope, mask, past)  # (B, T, C)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Decoder-only transformer: pre-norm, QK-norm, squared-ReLU MLP, no biases, untied head that starts at zero.

    Smear (after modded-nanogpt) adds to each token's embedding a learned share of the one before, channel by channel.
    Knowing what stood before each earlier token, one layer can already look up what followed (an induction head).

    New embeddings are drawn with deviation `embed_std`. Small ones learn faster; but tokens that are used alike are
    pushed the same way in most steps, and from a small beginning end nearly the same: no layer can tell them apart."""

    def __init__(self, config, embed_std=0.1):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
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
        for name, p in self.named_parameters():
            if name.endswith("proj.weight") or name == "head.weight":
                nn.init.zeros_(p)  # every block starts as the identity, and every token as equally likely
            elif name == "smear":
                nn.init.constant_(p, 0.5)
            else:
                nn.init.normal_(p, std=embed_std if "embed" in name else config.n_embd ** -0.5)

    def mask(self, T, start, device):
        """What T positions after `start` earlier ones may see: a mask for attention, or None where causal will do."""
        if self.config.pos != "alibi" and (start == 0 or T == 1):
            return None
        distance = torch.arange(start, start + T, device=device)[:, None] - torch.arange(start + T, device=device)
        if self.config.pos != "alibi":
            return distance >= 0  # (T, start + T)
        bias = -self.slopes[:, None, None] * distance
        return bias.masked_fill(distance < 0, -math.inf)  # (H, T, start + T)

    def forward(self, idx, targets=None, cache=None):
        """Logits (B, T, vocab_size) of token ids (B, T); with `targets` (B, T), the nats each costs, 0 where it is -1.

        With a `cache`, idx continues what the cache has read, and is added to it.
        """
        T, start = idx.size(1), cache.length if cache else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into a block of {self.config.block_size}")
        x = self.embed(idx)  # (B, T, C)
        if self.config.pos == "learned":
            x = x + self.pos_embed.weight[start:start + T]
        x = norm(x)
        if self.config.smear:  # a key then tells what stood before it, which else a whole layer would have to copy
            before = cache.last if start else torch.zeros_like(x[:, :1])
            before = torch.cat((before, x[:, :-1]), 1)  # (B, T, C)
            if cache:
                cache.last = x[:, -1:]
            x = norm(x + self.smear * before)
        rope = (self.cos[start:start + T], self.sin[start:start + T]) if self.config.pos == "rope" else None
        mask = self.mask(T, start, idx.device)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache and (cache.kv[i], start))
        if cache:
            cache.length += T
        logits = self.head(norm(x))
        if targets is None:
            return logits
        nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
        return nats.view_as(targets)

    def num_params(self, embedding=True):
        """Number of weights, with or without those of the token and position embeddings, smear and the head."""
        return sum(p.numel() for name, p in self.named_parameters() if embedding or name.startswith("blocks."))

    def flops_per_token(self):
        """Training FLOPs per token: 6 per weight of a matrix product (Kaplan et al. 2020, arXiv 2001.08361), and per
        layer and channel 12 for each key looked at, (T + 1)/2 on average. Looking up an embedding costs none."""
        c = self.config
        weights = self.num_params(embedding=False) + c.vocab_size * c.n_embd
        return 6 * weights + 12 * c.n_layer * c.n_embd * (c.block_size + 1) // 2


class Cache:
    """The keys and values of every layer, (n_layer, 2, B, H, block_size, D), of which `length` positions are filled;
    `last`, the embedding of the last token, for smear."""

    def __init__(self, model, batch_size):
        c, weight = model.config, model.head.weight
        self.kv = torch.zeros(c.n_layer, 2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head,
                              dtype=weight.dtype, device=weight.device)
        self.length, self.last = 0, None


# -----------------------------------------------------------------------------------------------------------------
# devices, and loading from a checkpoint


def pick_device(device="auto", dtype="auto"):
    """(torch.device, torch.dtype) to train on: CUDA, then MPS, then CPU; bfloat16 where it is fast, float16 on older
    GPUs, else float32."""
    try:
        device = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else
                              "mps" if torch.backends.mps.is_available() else "cpu")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        sys.exit(f"--device={device} cannot be used here ({str(e).splitlines()[0]}): try --device=cpu")
    if device.type == "cuda":
        fast = torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    elif device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        fast = torch.bfloat16
    else:
        fast = torch.float32
    if device.type == "cpu" and fast == torch.float32 and dtype not in ("auto", "float32"):
        print(f"this CPU has no {dtype} products, and imitates them slowly: leave --dtype out", file=sys.stderr)
    return device, fast if dtype == "auto" else getattr(torch, dtype)


def find_run():
    """The folder under out/ whose checkpoint is the newest."""
    runs = glob.glob(os.path.join("out", "*", "ckpt.pt"))
    if not runs:
        sys.exit("no trained model in out/: run python train.py first")
    return os.path.dirname(max(runs, key=os.path.getmtime))


def load_checkpoint(path):
    """The dict that train.py saved, on the CPU, from a file or a run's folder."""
    path = path if path.endswith(".pt") else os.path.join(path, "ckpt.pt")
    if not os.path.exists(path):
        sys.exit(f"no checkpoint {path}: run python train.py --out_dir={os.path.dirname(path)} first")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, LookupError, pickle.UnpicklingError) as e:
        sys.exit(f"{path} cannot be read ({e.__class__.__name__}), it may be cut off or be no checkpoint: train again")
    if not isinstance(checkpoint, dict) or "model_config" not in checkpoint:
        sys.exit(f"{path} is no checkpoint of train.py: python train.py writes one")
    return checkpoint


def load_model(path, device="cpu", block_size=0):
    """(model in float32, checkpoint) of a run's folder or a checkpoint file; with another context, if one is given."""
    checkpoint = load_checkpoint(path)
    config = GPTConfig(**checkpoint["model_config"])
    if block_size and config.pos == "learned" and block_size != config.block_size:
        sys.exit(f"{path} has learned positions for a context of {config.block_size} tokens, and for no other")
    config.block_size = block_size or config.block_size
    model = GPT(config).to(device)
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint

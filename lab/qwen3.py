"""A run as Qwen3, for programs that know the architectures of published models and not ours: see lab/export.py.

`to_qwen3` finds weights with which Qwen3 (Yang et al. 2025, arXiv 2505.09388) computes the same logits. It has no place
for value embeddings or smear, so a run must be trained with --smear=False --value_embeds=False. With --qk_gain=0 as
well, its attention is half as large.
"""
import contextlib
import json
import os
import sys

import torch
import torch.nn.functional as F

from common.files import atomic_write, rename
from common.records import EOT
from common.runs import load_run
from common.tokenizer import BYTES
from model import norm

EPS = torch.finfo(torch.float32).eps  # what F.rms_norm adds to the mean square
# What Qwen3 cannot compute: the option that a run was trained with, and the value to train with instead.
PLAIN = {"pos": "rope", "smear": False, "value_embeds": False}
# llama.cpp's names; never float16, whose numbers end at 65,504
GGUF_TYPES = {8: "Q8_0", 16: "BF16", 32: "F32"}


# -----------------------------------------------------------------------------------------------------------------
# our weights as those of Qwen3


def to_qwen3(model):
    """(config, {name: tensor}) of the Qwen3 model that computes the same logits as `model`, named as in transformers.

    Their norms have a learned gain, which is 1 here, but for that of the queries. Their MLP is down(silu(gate) * up).
    For large numbers silu is relu, so that with gate = S² W and up = W / S it is S relu(W x)², to within 0.5 / S³. The
    factor S is no error: all that is added to the residual stream is S times ours, and the next norm divides by it. So
    none of the numbers is too large or too small for 16 bits."""
    S = 32
    ones = torch.ones(model.config.n_embd)
    weights = {"model.embed_tokens.weight": S * norm(model.embed.weight), "model.norm.weight": ones,
               "lm_head.weight": model.head.weight}
    for i, block in enumerate(model.blocks):
        q, k, v, proj, q_gain = per_head_gain(block.attn)
        layer = {"input_layernorm": ones, "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                 "self_attn.q_norm": q_gain, "self_attn.k_norm": torch.ones_like(q_gain),
                 "self_attn.o_proj": S * proj, "post_attention_layernorm": ones,
                 "mlp.gate_proj": S * S * block.mlp.fc.weight, "mlp.up_proj": block.mlp.fc.weight / S,
                 "mlp.down_proj": block.mlp.proj.weight}
        weights.update({f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()})
    c = model.config
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": c.vocab_size,
              "max_position_embeddings": c.block_size, "num_hidden_layers": c.n_layer, "hidden_size": c.n_embd,
              "intermediate_size": 4 * c.n_embd, "num_attention_heads": c.n_head, "num_key_value_heads": c.n_head,
              "head_dim": len(q_gain), "hidden_act": "silu", "rms_norm_eps": EPS, "rope_theta": 10000.0,
              "tie_word_embeddings": False, "bos_token_id": c.vocab_size - 1, "eos_token_id": c.vocab_size - 1,
              "dtype": "float32"}
    return config, {name: tensor.detach().contiguous() for name, tensor in weights.items()}


def per_head_gain(attn):
    """(q, k, v, proj, gain of the query's norm) of an attention layer, with the gain of each head.

    In Qwen3, all heads of a layer share one gain, (D,). Where ours differ, each head gets twice as many channels. Those
    at even places are ours, and their query is multiplied by the head's share of the largest gain. Those at odd places
    hold as much of the query as its length has lost, so that the norm cannot undo this; and nothing of the keys, so
    that they do not count. The rotary frequencies at even places of 2D channels are those of D channels."""
    q, k, v, proj = (layer.weight for layer in (attn.q, attn.k, attn.v, attn.proj))
    head_size = q.size(0) // attn.n_head
    if not hasattr(attn, "gain"):
        return q, k, v, proj, torch.ones(head_size)
    largest = attn.gain.abs().max().clamp(min=1e-3)
    share = (attn.gain / largest).repeat_interleave(head_size)[:, None]  # (C, 1)
    q = torch.stack((share * q, (1 - share * share).sqrt() * q), dim=1).flatten(0, 1)  # (2C, C)
    k, v = (torch.stack((x, torch.zeros_like(x)), dim=1).flatten(0, 1) for x in (k, v))
    proj = torch.stack((proj, torch.zeros_like(proj)), dim=2).flatten(1, 2)  # (C, 2C)
    # attention divides by the square root of twice the channels; the norm makes the half that counts twice as long
    return q, k, v, proj, (largest * 0.5 ** 0.5).expand(2 * head_size)


def qwen3_logits(config, weights, ids):
    """Logits (T, V) of ids (T,), computed from the definition of Qwen3, to check weights before they are written."""
    heads, head_size = config["num_attention_heads"], config["head_dim"]

    def rms_norm(x, name):
        return F.rms_norm(x, (x.size(-1),), weights[name + ".weight"], config["rms_norm_eps"])

    def rotate(x):  # (H, T, D)
        frequency = config["rope_theta"] ** (-torch.arange(0, head_size, 2) / head_size)
        angle = torch.outer(torch.arange(x.size(1)), frequency).repeat(1, 2)
        a, b = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat((-b, a), dim=-1) * angle.sin()

    x = weights["model.embed_tokens.weight"][ids]  # (T, C)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = rms_norm(x, layer + "input_layernorm")
        q, k, v = ((h @ weights[f"{layer}self_attn.{name}_proj.weight"].T).view(len(ids), heads, -1).transpose(0, 1)
                   for name in "qkv")  # (H, T, D) each
        q, k = rms_norm(q, layer + "self_attn.q_norm"), rms_norm(k, layer + "self_attn.k_norm")
        y = F.scaled_dot_product_attention(rotate(q)[None], rotate(k)[None], v[None], is_causal=True)[0]
        x = x + y.transpose(0, 1).flatten(1) @ weights[layer + "self_attn.o_proj.weight"].T
        h = rms_norm(x, layer + "post_attention_layernorm")
        gate, up = (h @ weights[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ weights[layer + "mlp.down_proj.weight"].T
    return rms_norm(x, "model.norm") @ weights["lm_head.weight"].T


def load_as_qwen3(run):
    """(config, weights, ranks of the tokenizer) of a run as Qwen3. Exits if Qwen3 cannot compute what the run does."""
    model, _, encoding = load_run(run)
    options = [f"--{name}={value}" for name, value in PLAIN.items() if getattr(model.config, name) != value]
    if options:
        sys.exit(f"{run} has parts that neither transformers nor llama.cpp knows: train it with {' '.join(options)}")
    config, weights = to_qwen3(model)
    ids = torch.arange(min(model.config.block_size, model.config.vocab_size)).flip(0)
    with torch.inference_mode():
        error = (qwen3_logits(config, weights, ids) - model(ids[None])[0]).abs().max().item()
    if not error < 1e-3:
        sys.exit(f"as Qwen3, {run} would give logits that are off by {error:.2g}: if model.py was changed, make "
                 "to_qwen3 in lab/qwen3.py follow")
    return config, weights, {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}


# -----------------------------------------------------------------------------------------------------------------
# the tokenizer: byte-level BPE, as in GPT-2. Files that hold text spell each byte as one visible character


def bytes_to_unicode(token):
    """The characters that stand for a token's bytes: printable ones for themselves, others for U+0100 and beyond."""
    hidden = BYTES[188:]  # the printable ones come first
    return "".join(chr(256 + hidden.index(b)) if b in hidden else chr(b) for b in token)


def merges(ranks):
    """[(first, second)]: every pair of tokens that together are a token, in the order of that token's rank.

    tiktoken merges any such pair, others only those in their list."""
    pairs = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs += [(bytes_to_unicode(a), bytes_to_unicode(b)) for a, b in halves if a in ranks and b in ranks]
    return pairs


def tokenizer_json(ranks):
    """The content of tokenizer.json. A text that is encoded with special tokens gets <|endoftext|> before it."""
    eot = len(ranks)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"id": eot, "content": EOT, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
               "special": True}
    start, first, second = ({"SpecialToken": {"id": EOT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                            {"Sequence": {"id": "B", "type_id": 0}})
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
            "pre_tokenizer": byte_level, "decoder": byte_level,
            "post_processor": {"type": "TemplateProcessing", "single": [start, first], "pair": [start, first, second],
                               "special_tokens": {EOT: {"id": EOT, "ids": [eot], "tokens": [EOT]}}},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": True,  # a word that is a token is that token, as in tiktoken
                      "vocab": {**{bytes_to_unicode(token): rank for token, rank in ranks.items()}, EOT: eot},
                      "merges": merges(ranks)}}


# -----------------------------------------------------------------------------------------------------------------
# files


def write_hf(run, folder):
    """Write the folder of a model that transformers loads: its config, weights and tokenizer."""
    config, weights, ranks = load_as_qwen3(run)
    files = {"tokenizer.json": tokenizer_json(ranks),
             "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT,
                                       "model_max_length": config["max_position_embeddings"]},
             "generation_config.json": {"bos_token_id": len(ranks), "eos_token_id": len(ranks)},
             "config.json": config}
    os.makedirs(folder, exist_ok=True)
    # Every reader starts from config.json. It is removed first and put back last, so that it describes a whole model.
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, "config.json"))
    write_safetensors(weights, os.path.join(folder, "model.safetensors"))
    for name, content in files.items():
        with atomic_write(os.path.join(folder, name)) as file:
            json.dump(content, file, ensure_ascii=False, indent=1)


def write_safetensors(weights, path):
    """Write float32 tensors in the format of huggingface.co/docs/safetensors: a header in JSON, then their bytes."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in weights.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with atomic_write(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in weights.values():
            file.write(tensor.numpy().astype("<f4").tobytes())


def write_gguf(run, path, bits):
    """Write the file of a model that llama.cpp loads; each weight of its matrices has 8, 16 or 32 bits."""
    try:
        import gguf
    except ImportError:
        sys.exit("a GGUF file needs another package: pip install gguf")
    config, weights, ranks = load_as_qwen3(run)
    if bits == 8 and config["hidden_size"] % 32:
        sys.exit(f"--bits=8 needs a width that 32 divides, not {config['hidden_size']}: leave --bits out")
    temporary = path + ".tmp"
    writer = gguf.GGUFWriter(temporary, "qwen3")
    add_metadata(writer, gguf, config, ranks, os.path.basename(path))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for name, tensor in weights.items():
        kind = gguf.GGMLQuantizationType[GGUF_TYPES[bits] if tensor.ndim == 2 else "F32"]
        writer.add_tensor(names.get_name(name, (".weight",)),
                          gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rename(temporary, path)


def add_metadata(writer, gguf, config, ranks, name):
    """Add the config and the tokenizer to a GGUF file."""
    writer.add_name(name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([bytes_to_unicode(token) for token in sorted(ranks, key=ranks.get)] + [EOT])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(ranks) + [gguf.TokenType.CONTROL])
    writer.add_token_merges([" ".join(pair) for pair in merges(ranks)])
    writer.add_bos_token_id(len(ranks))
    writer.add_eos_token_id(len(ranks))
    writer.add_add_bos_token(True)

"""An adapter with which eval.py grades a model that transformers loads: python eval.py hf:NAME --dataset=tinystories

NAME is a model on huggingface.co or a folder."""
import inspect
import re
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F


class HuggingFaceModel(torch.nn.Module):
    """A causal language model of transformers with the interface of our GPT, as far as eval.py and sample.py use it."""

    def __init__(self, inner, bos, eot):
        super().__init__()
        self.inner, self.bos, self.eot = inner, bos, eot
        self.head = inner.get_output_embeddings()
        # the name of the argument and the output that hold the cache depends on the version of transformers
        has_cache = "cache" in inspect.signature(inner.forward).parameters
        self.cache_argument = "cache" if has_cache else "past_key_values"
        # No layers: our Cache then allocates no memory. It only counts tokens, and carries the model's own cache.
        self.config = SimpleNamespace(block_size=inner.config.max_position_embeddings, n_layer=0, n_head=1, n_embd=1,
                                      vocab_size=self.head.weight.size(0))

    def forward(self, idx, targets=None, cache=None):
        """Logits (B, T, V) of token ids idx (B, T), or the cross-entropy (B, T) in nats, as GPT.forward gives them."""
        is_start = cache is None or cache.length == 0
        if is_start:  # our stories start with the token that ends them; some models have another one for the start
            idx = idx.clone()
            idx[:, 0] = idx[:, 0].masked_fill(idx[:, 0] == self.eot, self.bos)
        past = None if is_start else cache.past_key_values
        output = self.inner(idx, use_cache=cache is not None, **{self.cache_argument: past})
        if cache is not None:
            cache.past_key_values = output[self.cache_argument]
            cache.length += idx.size(1)
        if targets is None:
            return output.logits
        logits = output.logits.float().transpose(1, 2)  # (B, V, T)
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")

    def num_params(self, embedding=True):
        """Number of weights; without `embedding`, no embeddings and no head. Tied weights count once."""
        tables = {id(p) for name, p in self.named_parameters() if re.search(r"(wte|wpe|embed_tokens|lm_head)\.", name)}
        return sum(p.numel() for p in self.parameters() if embedding or id(p) not in tables)


def load(name, device, tokenizer=""):
    """(model in float32, encoding) of a name on huggingface.co or a folder; with another model's tokenizer, if given.

    The encoding has what eval.py uses of a tiktoken.Encoding."""
    try:
        import transformers
    except ImportError:
        sys.exit(f"hf:{name} needs another package: pip install transformers")
    transformers.logging.set_verbosity_error()
    try:
        inner = transformers.AutoModelForCausalLM.from_pretrained(name).float().to(device).eval()
        encoder = transformers.AutoTokenizer.from_pretrained(tokenizer or name)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"hf:{name} cannot be loaded: {str(error).strip().splitlines()[0]} (if only its tokenizer is missing, "
                 "name another model's, such as --tokenizer=EleutherAI/gpt-neo-125M)")
    eot = encoder.eos_token_id
    bos = eot if encoder.bos_token_id is None else encoder.bos_token_id
    encoding = SimpleNamespace(
        eot_token=eot,
        encode_ordinary=lambda text: encoder.encode(text, add_special_tokens=False),
        decode=lambda ids: encoder.decode(ids, clean_up_tokenization_spaces=False))
    return HuggingFaceModel(inner, bos, eot), encoding

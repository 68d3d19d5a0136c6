"""An adapter with which eval.py grades a model that transformers loads: python eval.py hf:NAME --dataset=tinystories

NAME is a model on huggingface.co or a folder. Any causal language model will do."""
import inspect
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F

# names of the context length in a model's config, and of the cache in forward()
CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length",
            "context_length", "n_ctx")
CACHES = ("cache", "past_key_values")


class HuggingFaceModel(torch.nn.Module):
    """A causal language model of transformers with the interface of our GPT, as far as eval.py and sample.py use it."""

    def __init__(self, inner, bos, eot, block_size):
        super().__init__()
        self.inner, self.bos, self.eot = inner, bos, eot
        self.head = inner.get_output_embeddings() or inner.get_input_embeddings()
        self.arguments = inspect.signature(inner.forward).parameters
        # None: there is no such cache, and the text is read again for every token
        output = self.run(torch.ones(1, 1, dtype=torch.int64, device=self.head.weight.device), use_cache=True)
        self.cache_name = next((name for name in CACHES if name in self.arguments and name in output), None)
        # No layers: our Cache then allocates no memory. It only counts tokens, and carries the model's own cache.
        self.config = SimpleNamespace(block_size=block_size, n_layer=0, n_head=1, n_embd=1,
                                      vocab_size=self.head.weight.size(0))

    def run(self, idx, use_cache, **past):
        """The output of the model itself. Some kinds do not know the argument use_cache."""
        options = {"use_cache": use_cache} if "use_cache" in self.arguments else {}
        return self.inner(idx, **options, **past)

    def forward(self, idx, targets=None, cache=None):
        """Logits (B, T, V) of token ids idx (B, T), or the cross-entropy (B, T) in nats, as GPT.forward gives them."""
        is_start = cache is None or cache.length == 0
        if is_start:  # our stories start with the token that ends them; some models have another one for the start
            idx = idx.clone()
            idx[:, 0] = idx[:, 0].masked_fill(idx[:, 0] == self.eot, self.bos)
        if cache is None:
            logits = self.run(idx, use_cache=False).logits
        else:
            logits = self.read_on(idx, cache, is_start)
        if targets is None:
            return logits
        nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
        return nats.view_as(targets)

    def read_on(self, idx, cache, is_start):
        """Logits (B, T, V) of tokens that follow those that the cache stands for."""
        cache.length += idx.size(1)
        if self.cache_name is None:
            cache.text = idx if is_start else torch.cat((cache.text, idx), dim=1)
            return self.run(cache.text, use_cache=False).logits[:, -idx.size(1):]
        past = {} if is_start else {self.cache_name: cache.past}
        output = self.run(idx, use_cache=True, **past)
        cache.past = output[self.cache_name]
        return output.logits

    def num_params(self, embedding=True):
        """Number of weights; without `embedding`, no embeddings and no head. Tied weights count once."""
        tables = [module for module in self.modules() if isinstance(module, torch.nn.Embedding)] + [self.head]
        left_out = set() if embedding else {id(p) for table in tables for p in table.parameters()}
        return sum(p.numel() for p in self.parameters() if id(p) not in left_out)


def load(name, device, tokenizer=""):
    """(model in float32, encoding) of a name on huggingface.co or a folder; with another model's tokenizer, if given.

    The encoding has what eval.py uses of a tiktoken.Encoding. Ends the program with a line about what cannot be
    graded."""
    try:
        import transformers
    except ImportError:
        sys.exit(f"hf:{name} needs another package: pip install transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        options = {"trust_remote_code": False}  # else transformers asks whether to run code that comes with a model
        inner, report = transformers.AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
        inner = inner.float().to(device).eval()
        encoder = transformers.AutoTokenizer.from_pretrained(tokenizer or name, **options)
        is_causal = sees_no_later_token(inner, device)
    except Exception as error:  # of many packages, for what is missing, has another form, or cannot be fetched
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        sys.exit(f"hf:{name} cannot be loaded: {reason} (if only its tokenizer is missing, name another model's, such "
                 "as --tokenizer=EleutherAI/gpt-neo-125M)")
    if report["missing_keys"]:  # transformers has filled them with random numbers
        sys.exit(f"hf:{name} lacks weights, such as {min(report['missing_keys'])}: name a causal language model")
    if not is_causal:
        sys.exit(f"hf:{name} sees the tokens that it is to predict: name a causal language model")
    eot = end_token(inner, encoder)
    bos = eot if encoder.bos_token_id is None else encoder.bos_token_id
    model = HuggingFaceModel(inner, bos, eot, context_of(inner, encoder))
    vocab_size = model.config.vocab_size
    if eot is None or max(bos, eot) >= vocab_size:
        sys.exit(f"hf:{name} has no token that ends a text: name a tokenizer that fits it and has one with --tokenizer")

    def encode(text):
        ids = encoder.encode(text, add_special_tokens=False)
        if ids and max(ids) >= vocab_size:
            sys.exit(f"hf:{name} knows {vocab_size:,} tokens, and its tokenizer more: name another with --tokenizer")
        return [token for token in ids if token != eot]  # a text may spell it

    def decode(ids):
        return encoder.decode(ids, clean_up_tokenization_spaces=False)
    return model, SimpleNamespace(eot_token=eot, encode_ordinary=encode, decode=decode)


def sees_no_later_token(inner, device):
    """Whether the logits of a token stay the same, whatever follows it."""
    with torch.inference_mode():
        first, second = inner(torch.tensor([[1, 2, 3], [1, 2, 4]], device=device)).logits[:, :2]
    return torch.allclose(first, second, atol=1e-3, rtol=1e-3, equal_nan=True)


def end_token(inner, encoder):
    """The id of the token that ends a text, by the tokenizer or else by the model, which may have several; or None."""
    of_model = getattr(inner.config.get_text_config(), "eos_token_id", None)
    candidates = [encoder.eos_token_id, of_model, encoder.sep_token_id, encoder.bos_token_id]
    ids = [each[0] if isinstance(each, list) else each for each in candidates]
    return next((each for each in ids if each is not None and each >= 0), None)


def context_of(inner, encoder):
    """How many tokens the model reads at once. Where there is no limit, as in a recurrent model: 2,048."""
    config = inner.config.get_text_config()
    known = [getattr(config, name, None) for name in CONTEXTS] + [encoder.model_max_length]
    return next((n for n in known if isinstance(n, int) and 1 < n < 10**7), 2048)

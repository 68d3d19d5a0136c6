"""lab/huggingface.py: other people's models are measured like ours."""
import json
import math
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import eval
from common.dataset import load_tokens
from common.tokenizer import load_tokenizer
from lab.completions import complete
from lab.huggingface import load
from model import Cache
from sample import generate

CPU = torch.device("cpu")
# a folder with llama2.c's stories260K in the form that transformers loads
STORIES260K = os.environ.get("STORIES260K", str(Path(__file__).parent.parent / "data" / "stories260K"))


def make_tokenizer(kind, texts):
    """A small tokenizer, trained on the texts; Llama's has one token for the start and another for the end."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer
    special = {"eos_token": "<|endoftext|>"}
    if kind == "llama":
        special = {"bos_token": "<s>", "eos_token": "</s>"}
    inner = ByteLevelBPETokenizer()
    inner.train_from_iterator(texts, vocab_size=400, special_tokens=list(special.values()), show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer, **special)


def make_model(kind, vocab_size):
    """A random model, far from uniform."""
    import transformers
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=vocab_size, n_positions=128, n_embd=32, n_layer=2, n_head=2)
    elif kind == "bloom":  # without a limit to its context, and without positions
        config = transformers.BloomConfig(vocab_size=vocab_size, hidden_size=32, n_layer=2, n_head=2)
    elif kind == "mamba":  # recurrent
        config = transformers.MambaConfig(vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, state_size=4)
    elif kind == "openai-gpt":  # without a cache
        config = transformers.OpenAIGPTConfig(vocab_size=vocab_size, n_positions=128, n_embd=32, n_layer=2, n_head=2)
    elif kind == "bert":  # reads in both directions
        config = transformers.BertConfig(vocab_size=vocab_size, hidden_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, intermediate_size=32)
    elif kind == "gpt_neo":
        config = transformers.GPTNeoConfig(vocab_size=vocab_size, max_position_embeddings=128, hidden_size=32,
                                           num_layers=2, num_heads=2, window_size=16,
                                           attention_types=[[["global", "local"], 1]])
    else:
        config = transformers.LlamaConfig(vocab_size=vocab_size, max_position_embeddings=128, hidden_size=32,
                                          num_hidden_layers=2, intermediate_size=64, num_attention_heads=2)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


@pytest.fixture(params=["gpt_neo", "gpt2", "llama"])
def theirs(request, in_prepared):
    """(folder of a model, the model, its tokenizer, the validation stories of data/tiny)."""
    pytest.importorskip("transformers")
    encoding, kind = load_tokenizer("tiny"), request.param
    stories = eval.split_stories(load_tokens("tiny", "val"), encoding.eot_token)
    texts = [encoding.decode(ids.tolist()) for ids in stories]
    tokenizer = make_tokenizer(kind, texts)
    model = make_model(kind, len(tokenizer))
    model.save_pretrained(f"theirs/{kind}")
    tokenizer.save_pretrained(f"theirs/{kind}")
    return f"theirs/{kind}", model, tokenizer, texts


def test_bits_per_byte_agree_with_one_story_at_a_time(theirs):
    """Straight from the logits of their model."""
    folder, model, tokenizer, texts = theirs
    nats, eos = 0.0, tokenizer.eos_token
    for text in texts:
        ids = torch.tensor([tokenizer.encode((tokenizer.bos_token or eos) + text + eos)])
        assert ids.size(1) <= 128 and tokenizer.decode(ids[0, 1:-1]) == text
        with torch.no_grad():
            nats += torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
    eval.main([f"hf:{folder}", "--dataset=tiny", "--only=loss", "--device=cpu"])
    with open(folder.replace("theirs/", "out/hf-") + "/eval.json", encoding="utf-8") as file:
        results = json.load(file)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert results["loss on tiny"]["val_bpb"][0] == pytest.approx(nats / n_bytes / math.log(2), rel=1e-5)
    assert results["model"]["parameters"] == sum(
        p.numel() for name, p in model.named_parameters() if "h." in name or "layers." in name or "norm" in name
        or "ln_f" in name)


def test_stories_through_their_cache_are_those_without_one(theirs):
    folder, model, _, _ = theirs
    adapter, _ = load(folder, CPU)
    ids = torch.tensor([[5, 6, 7]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # a renamed argument would be ignored one day, without an error
        adapter(ids, cache=Cache(adapter, 1))
    for token in generate(adapter, ids[0].tolist(), 20, [0], -1, temperature=0):
        with torch.no_grad():
            assert model(ids).logits[0, -1].argmax() == token
        ids = torch.cat((ids, token[None]), 1)


@pytest.fixture
def save(in_prepared):
    """Saves a model of a kind, with the tokenizer of another; returns its folder."""
    pytest.importorskip("transformers")
    tokenizer = make_tokenizer("gpt2", ["Once upon a time Lily went to the park."] * 3)

    def save(kind, model=None, tokenizer=tokenizer):
        (model or make_model(kind, len(tokenizer))).save_pretrained(f"theirs/{kind}")
        tokenizer.save_pretrained(f"theirs/{kind}")
        return f"theirs/{kind}"
    save.tokenizer = tokenizer
    return save


@pytest.mark.parametrize("kind, block_size", [("bloom", 2048), ("mamba", 2048), ("openai-gpt", 128)])
def test_models_of_any_kind_are_read(save, kind, block_size):
    """Their logits with and without a cache, and what they are called."""
    model = make_model(kind, len(save.tokenizer))
    adapter, encoding = load(save(kind, model), CPU)
    assert adapter.config.block_size == block_size
    ids = [encoding.eot_token] + encoding.encode_ordinary("Once upon a time Lily")
    with torch.no_grad():
        torch.testing.assert_close(adapter(torch.tensor([ids])), model(torch.tensor([ids])).logits)
        for token in generate(adapter, ids, 8, [0], -1, temperature=0):
            assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token.item())


def test_a_tokenizer_without_an_end_token(save):
    """The model's takes its place; without one, a line says what to name."""
    import transformers
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=save.tokenizer._tokenizer)
    model = make_model("gpt2", len(tokenizer))
    model.config.eos_token_id = [7, 9]
    assert load(save("gpt2", model, tokenizer), CPU)[1].eot_token == 7
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(SystemExit, match="no token that ends a text.*--tokenizer"):
        load(save("gpt2", model, tokenizer), CPU)


def test_a_model_that_sees_what_it_is_to_predict_is_refused(save):
    with pytest.raises(SystemExit, match="causal"):
        load(save("bert"), CPU)


def test_a_model_without_some_of_its_weights_is_refused(save):
    """transformers would draw them at random."""
    from safetensors.torch import load_file, save_file
    path = save("llama") + "/model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="lacks weights, such as model.layers.1.mlp.up_proj.weight"):
        load("theirs/llama", CPU)


def test_a_tokenizer_of_another_model_must_fit(save):
    """One with more tokens than the model; and one that changes the text, which is counted."""
    import tokenizers
    import transformers
    save("gpt2", make_model("gpt2", 258))
    _, encoding = load("theirs/gpt2", CPU, "theirs/gpt2")
    with pytest.raises(SystemExit, match="--tokenizer"):
        encoding.encode_ordinary("Once upon a time Lily went to the park.")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "<e>": 1, "Once": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", unk_token="?")
    words.save_pretrained("words")
    subject = eval.load_subject("hf:theirs/gpt2", CPU, "tiny", tokenizer="words")
    figures = eval.grade_loss(subject, "tiny")
    assert figures["stories that its tokenizer alters"] == figures["stories"]


@pytest.mark.skipif(not os.path.exists(STORIES260K), reason="needs a published model: see STORIES260K")
def test_a_published_model_agrees_with_a_direct_computation(in_prepared):
    """llama2.c's TinyStories model of 260,000 weights: nats of two stories, straight from its logits."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES260K).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES260K)
    adapter, encoding = load(STORIES260K, CPU)
    texts = ["Once upon a time, there was a little girl named Lily. She liked to play in the park.", "Tim saw a dog."]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    bos = tokenizer.bos_token_id
    tokens = np.array([bos] + rows[0] + [bos] + rows[1] + [bos])
    nats = 0.0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([[bos] + row])).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(row + [bos]), reduction="sum").item()
    assert [encoding.encode_ordinary(text) for text in texts] == rows and adapter.num_params() == 260_032
    assert eval.score(adapter, tokens, encoding.eot_token).sum() == pytest.approx(nats, rel=1e-4)
    assert [encoding.decode(row) for row in rows] == texts and nats / len(tokens) < 2


def test_generation_continues_when_the_context_is_full(theirs):
    adapter, _ = load(theirs[0], CPU)
    assert len(list(generate(adapter, [5, 6, 7], 200, [0], -1))) == 200


def test_prompts_are_completed(theirs):
    subject = eval.load_subject(f"hf:{theirs[0]}", CPU, dataset="tiny")
    (first, second), = complete(subject, ["Once upon a time"], 20, each=2)
    assert first != second and len(subject.encoding.decode(first)) > 0


def test_without_transformers_the_error_says_what_to_install(workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        load("some/model", CPU)


def test_a_model_that_cannot_be_loaded_ends_in_one_line(workplace):
    pytest.importorskip("transformers")
    (workplace / "empty").mkdir()
    with pytest.raises(SystemExit, match="hf:empty cannot be loaded") as end:
        load("empty", CPU)
    assert "\n" not in str(end.value)

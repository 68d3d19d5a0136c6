"""lab/huggingface.py: other people's models are measured like ours."""
import json
import math
import sys
import warnings

import pytest
import torch

import eval
from lab.completions import complete
from lab.huggingface import load
from model import Cache
from prepare import load_tokenizer, load_tokens
from sample import generate

CPU = torch.device("cpu")


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
    elif kind == "gpt_neo":
        config = transformers.GPTNeoConfig(vocab_size=vocab_size, max_position_embeddings=128, hidden_size=32,
                                           num_layers=2, num_heads=2, window_size=16,
                                           attention_types=[[["global", "local"], 1]])
    else:
        config = transformers.LlamaConfig(vocab_size=vocab_size, max_position_embeddings=128, hidden_size=32,
                                          num_hidden_layers=2, intermediate_size=64, num_attention_heads=2)
    torch.manual_seed(0)
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


def test_generation_continues_when_the_context_is_full(theirs):
    adapter, _ = load(theirs[0], CPU)
    assert len(list(generate(adapter, [5, 6, 7], 200, [0], -1))) == 200


def test_prompts_are_completed(theirs):
    subject = eval.load_subject(f"hf:{theirs[0]}", CPU, dataset="tiny")
    (first, second), = complete(subject, ["Once upon a time"], 20, each=2)
    assert first != second and len(subject.encoding.decode(first)) > 0


def test_a_model_of_somebody_else_needs_the_name_of_a_dataset(workplace):
    with pytest.raises(SystemExit, match="--dataset=tinystories"):
        eval.main(["hf:some/model"])


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

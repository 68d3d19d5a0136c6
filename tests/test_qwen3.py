"""lab/qwen3.py: what other programs load computes what the run computes."""
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

import eval
import model
from common import ROOT
from common.dataset import load_tokens
from common.runs import load_run
from common.tokenizer import load_ranks, load_tokenizer, make_encoding
from conftest import error_of
from lab.export import main
from lab.qwen3 import GGUF_TYPES, load_as_qwen3, merges, qwen3_logits, tokenizer_json, write_gguf, write_hf
from sample import write_stories

PROMPT = "Once upon a time Lily"


@pytest.fixture(params=[0, 8], ids=["without gains", "with gains"])
def plain(request, run, in_prepared):
    """A run without what Qwen3 lacks: the default one, less these weights. Each head has a gain of its own."""
    folder = f"out/plain-{request.param}"
    if not os.path.exists(folder):
        shutil.copytree(run, folder)
        checkpoint = torch.load(f"{folder}/ckpt.pt", weights_only=True)
        checkpoint["model_config"].update(smear=False, value_embeds=False, qk_gain=request.param, n_head=2)
        lacking = ("smear", "value_embed.weight", "value_gate.weight", "gain")
        weights = {name: p for name, p in checkpoint["model"].items() if not name.endswith(lacking)}
        if request.param:
            weights.update({f"blocks.{i}.attn.gain": torch.tensor([2.5, -0.7]) for i in range(2)})
        torch.save({**checkpoint, "model": weights}, f"{folder}/ckpt.pt")
    return folder


@pytest.fixture
def folder(plain):
    """The run as a folder for transformers."""
    pytest.importorskip("transformers")
    if not os.path.exists(f"{plain}-hf"):
        write_hf(plain, f"{plain}-hf")
    return f"{plain}-hf"


def texts():
    """The validation stories, and others that a tokenizer may split in many ways."""
    encoding = load_tokenizer("tiny")
    ids = [story.tolist() for story in eval.split_stories(load_tokens("tiny", "val"), encoding.eot_token)]
    draw = np.random.default_rng(0)
    mixed = [encoding.decode(draw.integers(0, encoding.eot_token, 30).tolist()) for _ in range(200)]
    runs = ["".join(draw.choice(list("ab-= \n'.s"), 40)) for _ in range(200)]
    return [encoding.decode(story) for story in ids] + mixed + runs + ["Zoë’s “café”\t\r\n 日本語 🎉 'll 12345", "  ", "\n"]


def test_logits_are_those_of_the_run(plain):
    config, weights, _ = load_as_qwen3(plain)
    ids = torch.from_numpy(load_tokens("tiny", "val")[:64].astype(np.int64))
    with torch.inference_mode():
        expected = load_run(plain)[0](ids[None])[0]
        assert (qwen3_logits(config, weights, ids) - expected).abs().max() < 1e-4
    assert expected.abs().max() > 3  # far from uniform


def test_the_tokenizer_gives_the_same_ids(in_prepared):
    tokenizers = pytest.importorskip("tokenizers")
    ranks = load_ranks("tiny")
    encoding, theirs = make_encoding(ranks), tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ranks)))
    for text in texts():
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == encoding.encode_ordinary(text) and theirs.decode(ids) == text
    assert theirs.encode("One").ids[0] == encoding.eot_token  # our stories begin with it


def test_transformers_computes_the_same(folder, plain):
    import transformers
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours, _, encoding = load_run(plain)
    assert [tokenizer.encode(text, add_special_tokens=False) for text in texts()] == \
        [encoding.encode_ordinary(text) for text in texts()]
    ids = torch.from_numpy(load_tokens("tiny", "val")[:256].astype(np.int64)).view(4, 64)
    with torch.inference_mode():
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
    prompt = tokenizer(PROMPT, return_tensors="pt")
    written = theirs.generate(**prompt, do_sample=False, max_new_tokens=40)[0]
    story, = write_stories(ours, encoding, PROMPT, 40, [0], temperature=0)
    assert tokenizer.decode(written, skip_special_tokens=True) == encoding.decode(story)


def test_bits_per_byte_are_those_of_the_run(folder, plain):
    eval.main([f"hf:{folder}", "--dataset=tiny", "--only=loss", "--device=cpu"])
    with open(f"out/hf-{os.path.basename(folder)}/eval.json", encoding="utf-8") as file:
        measured = json.load(file)["loss on tiny"]["val_bpb"][0]
    assert measured == pytest.approx(eval.evaluate(load_run(plain)[0], "tiny")["val_bpb"], abs=5e-5)


def test_lm_eval_scores_minimal_pairs_as_the_run_does(folder, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("accelerate")
    lm_eval = pytest.importorskip("lm_eval")
    with open(os.path.join(ROOT, "data/probes.json"), encoding="utf-8") as file:
        probes = sorted(json.load(file), key=lambda probe: len(probe["prompt"]))[:8]  # they must fit into 64 tokens
    pairs = [{"prompt": probe["prompt"], "choices": [probe["right"][0], probe["wrong"][0]]} for probe in probes]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    task = {"task": "pairs", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "pairs.jsonl")},
            "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": 0, "target_delimiter": ""}
    results = lm_eval.simple_evaluate(model="hf", model_args={"pretrained": folder, "device": "cpu"}, tasks=[task])
    ours, _, encoding = load_run(plain)
    for sample, pair in zip(results["samples"]["pairs"], pairs):
        for (theirs, _), choice in zip(sample["filtered_resps"], pair["choices"]):
            before = [encoding.eot_token] + encoding.encode_ordinary(pair["prompt"])
            after = encoding.encode_ordinary(choice)
            with torch.inference_mode():
                nats = ours(torch.tensor([before + after[:-1]]), torch.tensor([before[1:] + after]))
            assert theirs == pytest.approx(-nats[0, -len(after):].sum().item(), abs=1e-3)


@pytest.mark.parametrize("bits, error", [(32, 0), (16, 2**-8), (8, 0.5 / 127 + 0.002)])
def test_a_gguf_file_holds_the_same_weights_and_tokens(plain, bits, error, tmp_path):
    gguf = pytest.importorskip("gguf")
    write_gguf(plain, str(tmp_path / "a.gguf"), bits)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    config, weights, ranks = load_as_qwen3(plain)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(weights)
    for ours, theirs in {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
                         "model.layers.1.self_attn.q_proj": "blk.1.attn_q",
                         "model.layers.1.self_attn.q_norm": "blk.1.attn_q_norm",
                         "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
                         "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate", "model.layers.1.mlp.up_proj": "blk.1.ffn_up",
                         "model.layers.0.mlp.down_proj": "blk.0.ffn_down"}.items():
        expected, tensor = weights[f"{ours}.weight"].numpy(), tensors[f"{theirs}.weight"]
        read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        is_matrix = expected.ndim == 2
        assert tensor.tensor_type.name == (GGUF_TYPES[bits] if is_matrix else "F32")
        assert np.abs(read - expected).max() <= is_matrix * error * np.abs(expected).max()
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["qwen3.attention.key_length"] == config["head_dim"]
    assert fields["tokenizer.ggml.tokens"][-1] == "<|endoftext|>"
    assert len(fields["tokenizer.ggml.tokens"]) == config["vocab_size"]
    assert fields["tokenizer.ggml.merges"] == [f"{a} {b}" for a, b in merges(ranks)]


def test_llama_cpp_writes_the_same_story(plain, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    write_gguf(plain, str(tmp_path / "a.gguf"), 32)
    theirs = llama_cpp.Llama(str(tmp_path / "a.gguf"), n_ctx=64, verbose=False)
    ours, _, encoding = load_run(plain)
    assert [theirs.tokenize(text.encode(), add_bos=False) for text in texts()] == \
        [encoding.encode_ordinary(text) for text in texts()]
    story, = write_stories(ours, encoding, PROMPT, 40, [0], temperature=0)
    written = theirs(PROMPT, max_tokens=40, temperature=0, repeat_penalty=1)["choices"][0]["text"]
    assert PROMPT + written == encoding.decode(story)


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_what_qwen3_lacks_is_refused_with_the_options_to_train_with(run, in_prepared, to, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None if to == "hf" else object())
    before = sorted(os.listdir(run))
    assert "--smear=False --value_embeds=False" in error_of(main, [run, f"--to={to}"], capsys)
    assert sorted(os.listdir(run)) == before


def test_a_changed_model_is_not_exported_as_if_it_were_the_old_one(plain, monkeypatch):
    def forward(self, x):
        return self.proj(torch.nn.functional.gelu(self.fc(x)))
    monkeypatch.setattr(model.MLP, "forward", forward)
    with pytest.raises(SystemExit, match="to_qwen3"):
        write_hf(plain, "out/changed-hf")
    assert not os.path.exists("out/changed-hf")


def test_a_folder_without_config_json_is_not_whole(plain, monkeypatch, tmp_path):
    write_hf(plain, str(tmp_path))
    (tmp_path / "README.md").write_text("mine")
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("lab.qwen3.write_safetensors", lambda weights, path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_hf(plain, str(tmp_path))
    assert sorted(tmp_path.iterdir()) == [path for path in before if path.name != "config.json"]
    write_hf(plain, str(tmp_path))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("options", [["--to=hf", "--bits=8"], ["--bits=32"], ["--to=gguf", "--bits=4"]])
def test_a_number_of_bits_that_the_format_lacks_is_refused(plain, options, capsys):
    assert "--bits" in error_of(main, [plain, *options], capsys)

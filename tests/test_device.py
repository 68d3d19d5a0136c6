"""Every device and precision trains, tells and grades as the CPU in float32 does: also a GPU, where there is one."""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import eval
import sample
import train
from lab import interpret

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def test_a_run_goes_on_elsewhere_and_learns_as_much(in_prepared, capsys):
    def val_bpb(device, dtype):
        options = ["--dataset=tiny", "--n_layer=1", "--n_embd=64", "--block_size=32", "--batch_tokens=256",
                   "--evals=0", f"--out_dir=out/{device}-{dtype}"]
        train.main([*options, "--max_steps=5", "--device=cpu", "--dtype=float32", "--compile=False"])
        train.main([*options, "--max_steps=25", "--resume", f"--device={device}", f"--dtype={dtype}",
                    f"--compile={device == 'cuda'}"])
        printed = capsys.readouterr().out
        assert f"; {device}, {dtype}" + ", compiled" * (device == "cuda") in printed
        before, after = map(float, re.findall(r"val_bpb: +(\S+)", printed))
        assert after < 0.5 * before
        return after
    plain = val_bpb("cpu", "float32")
    for device in DEVICES:
        for dtype in ("float32", "bfloat16", "float16"):
            if (device, dtype) != ("cpu", "float32"):
                assert val_bpb(device, dtype) == pytest.approx(plain, rel=0.01), (device, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")
def test_a_gpu_reads_a_run_as_the_cpu_does(run, in_prepared, capsys):
    found = []
    for device in ("cpu", "cuda"):
        copy = shutil.copytree(run, f"out/read-on-{device}")
        sample.main([f"--out_dir={copy}", "--temperature=0", "--max_tokens=40", f"--device={device}"])
        told = capsys.readouterr().out
        eval.main([copy, f"--device={device}", "--only=loss"])
        interpret.main([copy, "--stories=30", f"--device={device}"])
        graded, inside = (json.loads(Path(copy, name).read_text()) for name in ("eval.json", "interpret.json"))
        found.append((told, graded["loss on tiny"]["val_bpb"][0], inside["ablations"][0]["loss"]))
        capsys.readouterr()
    here, there = found
    assert len(here[0]) > 40 and here[0] == there[0]
    assert here[1:] == pytest.approx(there[1:], rel=1e-3)

"""Every device and precision trains, tells and grades as the CPU in float32 does: also a GPU, where there is one."""
import re
import shutil

import pytest
import torch

import eval
import interpret
import sample
import train
from test_eval import read_results

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_run_goes_on_elsewhere_and_learns_as_much(in_prepared, capsys, device, dtype):
    def val_bpb(out, *elsewhere):
        options = ["--dataset=tiny", "--n_layer=1", "--n_embd=64", "--block_size=32", "--batch_tokens=256",
                   "--evals=0", f"--out_dir=out/{out}"]
        train.main([*options, "--max_steps=5", "--device=cpu", "--dtype=float32", "--compile=False"])
        train.main([*options, "--max_steps=25", "--resume", *elsewhere])
        return float(re.findall(r"val_bpb: +(\S+)", capsys.readouterr().out)[-1])
    there = val_bpb(f"{device}-{dtype}", f"--device={device}", f"--dtype={dtype}", f"--compile={device == 'cuda'}")
    here = val_bpb(f"plain-{device}-{dtype}", "--device=cpu", "--dtype=float32", "--compile=False")
    assert there == pytest.approx(here, rel=0.01)


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_is_read_alike(run, in_prepared, capsys, device):
    def told(*options):
        sample.main([f"--out_dir={run}", "--temperature=0", "--max_tokens=40", *options])
        return capsys.readouterr().out
    one = told("--device=cpu").strip()  # in NumPy
    two = told(f"--device={device}", "--num_samples=2")
    assert len(one) > 40 and two.count(one) == 2
    copies = ["out/read-cpu", f"out/read-{device}-too"]
    for copy, where in zip(copies, ("cpu", device)):
        shutil.copytree(run, copy, dirs_exist_ok=True)
        eval.main([copy, f"--device={where}", "--only=loss"])
        interpret.main([copy, "--stories=30", f"--device={where}"])
    here, there = (read_results(copy)["loss on tiny"]["val_bpb"][0] for copy in copies)
    assert there == pytest.approx(here, rel=1e-3)

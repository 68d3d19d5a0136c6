"""common.py: the command line, files that are never half written, devices, and runs on disk."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
from common import CommandLine, atomic_write, load_checkpoint, newest_run, pick_device
from conftest import error_of
from test_model import make_model

ROOT = Path(__file__).parent.parent


def parse(*options):
    parser = CommandLine("A test.")
    parser.add_argument("runs", nargs="*")
    parser.option("seeds", False, "a switch")
    parser.option("top_p", 1.0, "a share of 100 %", low=0, high=1)
    parser.option("name", "", "a text")
    return parser.parse_args(options)


def test_options_are_read_by_the_type_of_their_default():
    args = parse("a", "--seeds", "b", "--top_p=0.5", "--name=x=y")
    assert (args.runs, args.seeds, args.top_p, args.name) == (["a", "b"], True, 0.5, "x=y")
    assert parse("--seeds=False").seeds is False and parse().seeds is False


@pytest.mark.parametrize("option, expected", [
    ("--top_q=1", "did you mean --top_p"), ("--top=1", "unknown option --top"), ("--top_p=1.5", "must be at most 1"),
    ("--top_p=-1", "must be at least 0"), ("--top_p=nan", "must be at least 0"), ("--top_p=x", "top_p"),
    ("--seeds=maybe", "neither True nor False")])
def test_a_bad_command_line_ends_in_one_line(option, expected, capsys):
    assert expected in error_of(parse, option, capsys)


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "a share of 100 % (default: 1.0)" in " ".join(capsys.readouterr().out.split())


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    with atomic_write(str(path)) as file:
        file.write("old")
    with pytest.raises(ZeroDivisionError), atomic_write(str(path)) as file:
        file.write("half")
        1 / 0
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_a_second_stop_signal_ends_the_process():
    script = ("import common, signal\nwith common.stop_signals() as received:\n signal.raise_signal(signal.SIGTERM)\n"
              " print(received, flush=True)\n signal.raise_signal(signal.SIGTERM)\n print('never')")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and str(int(signal.SIGTERM)) in done.stdout and "never" not in done.stdout


def test_handlers_of_signals_are_restored_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), common.stop_signals():
        1 / 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_cpu_without_bfloat16_takes_float32_and_warns_of_the_other(monkeypatch, capsys):
    monkeypatch.setattr(common, "cpu_has_bfloat16", lambda: False)
    assert pick_device("cpu") == (torch.device("cpu"), torch.float32) and not capsys.readouterr().err
    assert pick_device("cpu", "bfloat16")[1] == torch.bfloat16
    assert "leave --dtype out" in capsys.readouterr().err


def test_apples_gpu_is_only_taken_when_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device()[0].type == "cpu" and "--device=mps" in capsys.readouterr().err


@pytest.mark.parametrize("available, cuda, nvidia_smi, expected", [
    (True, "13.0", "nvidia-smi", "no kernel image"),  # a card that is too old for this build
    (False, "13.0", "nvidia-smi", "driver is missing or too old for CUDA 13.0"),
    (False, None, "nvidia-smi", "this build of torch has no CUDA"),
    (False, None, None, "")])
def test_a_gpu_that_cannot_be_used_is_named(monkeypatch, capsys, available, cuda, nvidia_smi, expected):
    def ones(*args, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(shutil, "which", lambda name: nvidia_smi)
    assert pick_device()[0].type == "cpu"
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == bool(expected)


def test_a_gpu_without_bfloat16_takes_float16_and_warns_of_the_other(monkeypatch, capsys):
    monkeypatch.setattr(torch, "zeros", lambda *args, device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert pick_device("cuda") == (torch.device("cuda"), torch.float16) and not capsys.readouterr().err
    assert pick_device("cuda", "bfloat16")[1] == torch.bfloat16
    assert "this cuda device has no instructions for bfloat16" in capsys.readouterr().err


def test_a_share_of_a_peak_is_only_given_for_the_card_it_belongs_to(monkeypatch):
    device = torch.device("cuda")
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", None),
                       ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert common.peak_flops(device, torch.bfloat16) == peak and common.peak_flops(device, torch.float32) is None


def test_bad_checkpoints_end_in_one_line(tmp_path, workplace):
    with pytest.raises(SystemExit, match="run python train.py"):
        load_checkpoint(str(tmp_path))
    model = make_model()
    torch.save({"model": model.state_dict()}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for content in (b"", b"no checkpoint", b"this is no checkpoint", b"hello\n", whole[:len(whole) // 2]):
        (tmp_path / "ckpt.pt").write_bytes(content)
        with pytest.raises(SystemExit, match="ckpt.pt cannot be read"):
            load_checkpoint(str(tmp_path))
    with pytest.raises(SystemExit, match="is not a checkpoint"):
        load_checkpoint(str(tmp_path / "whole.pt"))


def test_the_newest_run_by_its_log_is_taken_where_none_is_named(workplace):
    """Whatever the dates of the files say, which change when a folder is copied."""
    with pytest.raises(SystemExit, match="run python train.py first"):
        newest_run()
    for when, name in ((1, "b"), (3, "a"), (2, "c")):
        (workplace / "out" / name).mkdir(parents=True)
        (workplace / "out" / name / "ckpt.pt").touch()
        os.utime(workplace / "out" / name / "ckpt.pt", (10 - when, 10 - when))
        (workplace / "out" / name / "log.jsonl").write_text(json.dumps({"step": 1, "time": when}) + "\n")
    assert newest_run() == os.path.join("out", "a")


def test_a_device_that_is_not_there_ends_in_one_line():
    with pytest.raises(SystemExit, match="--device=cuda:99 cannot be used here.*--device=cpu"):
        pick_device("cuda:99")
    assert pick_device("cpu", "float32") == (torch.device("cpu"), torch.float32)

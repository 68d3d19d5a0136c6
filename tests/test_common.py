"""common/: the command line, files that are never half written, devices, and runs on disk."""
import argparse
import ast
import errno
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import common
from common import CommandLine, device as device_file, files
from common.device import pick_device
from common.files import atomic_write
from common.runs import load_checkpoint, newest_run
from conftest import error_of
from test_model import make_model

ROOT = Path(__file__).parent.parent


def parse(*options):
    parser = CommandLine("A test.")
    parser.add_argument("runs", nargs="*")
    parser.option("seeds", False, "a switch")
    parser.option("top_p", 1.0, "a share of 100 %", low=0, high=1)
    parser.option("name", "", "a text")
    parser.option("dataset", "", "a folder under data/")
    parser.option("share", 1.0, "a number without limits")
    parser.option("n", 1, "a whole number without limits")
    parser.option("cost", math.inf, "a number that may be infinite")
    return parser.parse_args(options)


def test_options_are_read_by_the_type_of_their_default():
    args = parse("a", "--seeds", "b", "--top_p=0.5", "--name=x=y")
    assert (args.runs, args.seeds, args.top_p, args.name) == (["a", "b"], True, 0.5, "x=y")
    assert parse("--seeds=False").seeds is False and parse().seeds is False


@pytest.mark.parametrize("option, expected", [
    ("--top_q=1", "did you mean --top_p"), ("--top=1", "unknown option --top"), ("--top_p=1.5", "must be at most 1"),
    ("--top_p=-1", "must be at least 0"), ("--top_p=nan", "must be at least 0"), ("--top_p=x", "top_p"),
    ("--seeds=maybe", "neither True nor False"), ("--share=nan", "--share=nan"), ("--share=-inf", "--share=-inf"),
    ("--n=nan", "--n"), ("--n=99999999999999999999", "--n=99999999999999999999"), ("--cost=nan", "--cost=nan")])
def test_a_bad_command_line_ends_in_one_line(option, expected, capsys):
    assert expected in error_of(parse, option, capsys)


def test_what_is_infinite_by_default_may_be_so():
    assert parse("--cost=inf").cost == math.inf and parse("--n=-3", "--share=1e300").n == -3


@pytest.mark.parametrize("typed, expected", [
    ("x", "x"), ("x/", "x"), ("data/x", "x"), ("./data/x//", "x"), (os.path.abspath("data/x"), "x"), ("", ""),
    ("data/x:0.3,y/:0.7", "x:0.3,y:0.7"), ("data", "data")])
def test_a_dataset_is_named_as_its_folder_is(typed, expected):
    assert parse(f"--dataset={typed}").dataset == expected


@pytest.mark.parametrize("typed", ["metadata/x", "/data/x", "data/x:0.5,../y:0.5"])
def test_another_folder_is_no_dataset(typed):
    with pytest.raises(argparse.ArgumentTypeError, match="under data/"):
        common.dataset_name(typed)


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


def test_a_rename_that_windows_denies_is_tried_again(tmp_path, monkeypatch):
    """As while a virus scanner reads the file."""
    def replace(old, new, real=os.replace):
        calls.append(new)
        if len(calls) < 3:
            raise PermissionError(errno.EACCES, "Access is denied", old)
        real(old, new)
    calls = []
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with atomic_write(str(tmp_path / "x")) as file:
        file.write("new")
    assert (tmp_path / "x").read_text() == "new" and len(calls) == 3


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, number):
    files.check_writable(str(tmp_path / "not" / "yet" / "there"), 3 << 20)
    assert os.listdir(tmp_path) == []

    def refuse(**options):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(SystemExit, match=f"cannot write 3 MB to .*{os.strerror(number)}"):
        files.check_writable(str(tmp_path / "new"), 3 << 20)


@pytest.mark.skipif(os.name == "nt", reason="is about POSIX locks")
@pytest.mark.parametrize("number, held", [(errno.EAGAIN, True), (errno.EACCES, True), (errno.ENOLCK, False),
                                          (errno.ENOSYS, False), (errno.EOPNOTSUPP, False)])
def test_only_a_lock_that_is_held_is_called_one(tmp_path, monkeypatch, capsys, number, held):
    """Some network file systems have no locks."""
    import fcntl

    def lockf(*args):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "lockf", lockf)
    if held:
        with pytest.raises(SystemExit, match="another process is writing"):
            files.lock(str(tmp_path / "x.lock"))
    else:
        files.lock(str(tmp_path / "x.lock")).close()
        assert os.strerror(number) in capsys.readouterr().err


def control_group(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content + "\n")
    return str(folder)


@pytest.mark.parametrize("files, cpus", [
    ({}, 16), ({"cpu.max": "max 100000"}, 16), ({"cpu.max": "200000 100000"}, 2), ({"cpu.max": "50000 100000"}, 1),
    ({"cpu.max": "9900000 100000"}, 16), ({"cpu.max": ""}, 16),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
    ({"cpu/cpu.cfs_quota_us": "350000", "cpu/cpu.cfs_period_us": "100000"}, 4)])
def test_a_container_limits_the_cpus(tmp_path, monkeypatch, files, cpus):
    """Where 16 of 128 are allowed anyhow."""
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(device_file, "CGROUP", control_group(tmp_path, files))
    assert device_file.usable_cpus() == cpus


def test_a_container_limits_the_memory_and_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(device_file, "CGROUP", str(tmp_path))
    machine = device_file.usable_memory()
    assert machine > 2**28
    control_group(tmp_path, {"memory.max": "max"})
    assert device_file.usable_memory() == machine
    control_group(tmp_path, {"memory.max": "123456"})
    assert device_file.usable_memory() == 123456
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(device_file, "usable_cpus", lambda: 2)
    pick_device("cpu")
    assert threads == [2]


@pytest.mark.parametrize("error, expected", [
    (PermissionError(errno.EACCES, "Permission denied", "out/x"), "out/x"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "README.md/x"), "README.md/x"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota"), (OSError(errno.ENOSPC, "No space left"), "disk is full"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "lower --rows"), (MemoryError(), "lower --rows"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "lower --rows"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "lower --rows"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), "lower --rows"),
    (RuntimeError("a bug"), None), (OSError(errno.EBADF, "Bad file descriptor"), None), (KeyError("x"), None)])
def test_what_the_machine_causes_ends_in_one_line(monkeypatch, error, expected):
    def main():
        raise error
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit if expected else type(error)) as end:
        common.run_main(main, lower="--rows")
    assert not expected or expected in end.value.code and "\n" not in end.value.code


def test_ctrl_c_does_not_end_a_notebook(monkeypatch, capsys):
    """`%run train.py` in a notebook: a signal would end its kernel. Nor are the kernel's own handlers replaced."""
    def main():
        assert signal.getsignal(signal.SIGTERM) == before
        raise KeyboardInterrupt("stopped, and saved")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    common.run_main(main)
    assert "stopped, and saved" in capsys.readouterr().err


def run_script(*lines, **options):
    """The end of a process that runs these lines of Python."""
    script = "\n".join(["import common, signal, sys", *lines])
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, **options)


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)])
def test_a_signal_ends_a_script_in_order_and_shows(number):
    """What it has to clean up is cleaned up, it says how to go on, and a shell sees which signal it was."""
    end = run_script("signal.signal(signal.SIGINT, signal.default_int_handler)", "def main():", " try:",
                     f"  signal.raise_signal({int(number)})", " except KeyboardInterrupt:",
                     "  raise KeyboardInterrupt('cleaned up')", "common.run_main(main)")
    assert end.returncode == -number and end.stderr == "cleaned up\n"


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("line, expected", [
    ("signal.signal(2, signal.default_int_handler); signal.raise_signal(2)", ""),
    ("sys.modules['torch'] = None; import torch", "pip install -r requirements.txt"),
    ("import no_such_module_of_a_fork", "Traceback"), ("1 / 0", "Traceback")])
def test_what_happens_during_the_imports(line, expected):
    """Each stage imports common first, and then packages that take seconds."""
    end = run_script(line)
    assert end.returncode != 0 and expected in end.stderr and bool(end.stderr) == bool(expected)
    assert ("Traceback" in end.stderr) == (expected == "Traceback")


@pytest.mark.parametrize("stage", ["prepare", "train", "sample", "eval"])
def test_the_first_import_of_a_stage_is_common(stage):
    tree = ast.parse((ROOT / f"{stage}.py").read_text(encoding="utf-8"))
    first = next(node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert getattr(first, "module", None) == "common"


def test_an_old_python_is_refused_at_once(monkeypatch):
    """By a file that it can still parse, such as the 3.9 of macOS."""
    ast.parse((ROOT / "common" / "__init__.py").read_text(encoding="utf-8"), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 9, 6))
    with pytest.raises(SystemExit, match="Python 3.11 or later"):
        runpy.run_path(str(ROOT / "common" / "__init__.py"))


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_a_closed_terminal_stops_a_run_once(tmp_path):
    """It may say so twice, or after SIGTERM, and printing then does no harm."""
    script = f"""import fcntl, os, signal, sys, termios, time
sys.path.insert(0, {str(ROOT)!r})
import common
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with common.stop_signals("stopping\\n") as received:
    print("ready", flush=True)
    while not received:
        time.sleep(0.01)
    signal.raise_signal(signal.SIGHUP)
    print("this goes nowhere", flush=True)
    print("and so does this", file=sys.stderr, flush=True)
    open("saved", "w").write(str(received == [signal.SIGHUP]))"""
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs,
                               start_new_session=True)
    os.close(theirs)
    assert b"ready" in os.read(ours, 100)
    os.close(ours)
    assert process.wait(timeout=30) == 0 and (tmp_path / "saved").read_text() == "True"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="has no SIGHUP")
def test_nohup_is_respected(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with common.stop_signals() as received:
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and received == []
    finally:
        signal.signal(signal.SIGHUP, before)


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
    monkeypatch.setattr(device_file, "cpu_has_bfloat16", lambda: False)
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
        assert device_file.peak_flops(device, torch.bfloat16) == peak
        assert device_file.peak_flops(device, torch.float32) is None


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

"""The device to compute on: which one, in which precision, with how much memory, and in how many processes.

torch is imported where it is needed: it takes a second, and some scripts do not need it."""
import contextlib
import ctypes
import datetime
import math
import os
import re
import shutil
import sys
from pathlib import Path

# Peak dense bfloat16 FLOP/s according to the manufacturers' data sheets. MFU (model FLOPs utilization) is the share of
# it that a run achieves.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "A10G": 70e12, "A10": 125e12, "4090": 165e12, "3090": 71e12}

CGROUP = "/sys/fs/cgroup"  # where Linux says what a container may use


def pick_device(device="auto", dtype="auto"):
    """(torch.device, torch.dtype) to compute with: CUDA where there is a GPU, else the CPU; bfloat16 where it is fast,
    float16 on older GPUs, else float32."""
    import torch
    if device == "auto":
        device = find_device()
    try:
        device = torch.device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device={device} cannot be used here ({str(error).splitlines()[0]}): try --device=cpu")
    fast = torch.float32
    if device.type == "cuda":
        fast = torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    elif device.type == "cpu" and cpu_has_bfloat16():
        fast = torch.bfloat16
    if device.type == "cpu" and usable_cpus() < torch.get_num_threads():
        torch.set_num_threads(usable_cpus())  # more threads than a container may run would wait for each other
    if (dtype == "float16" and fast == torch.float32) or (dtype == "bfloat16" and fast != torch.bfloat16):
        print(f"this {device.type} device has no instructions for {dtype} and is slow at it: leave --dtype out",
              file=sys.stderr)
    return device, fast if dtype == "auto" else getattr(torch, dtype)


def usable_cpus():
    """How many CPUs this process may use: Linux may allow fewer than there are, a container a share of their time."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # of cgroups, version 2 and 1
        with contextlib.suppress(OSError, ValueError):  # no such file; "max", which means no limit
            words = " ".join(Path(CGROUP, name).read_text() for name in names)
            quota, period = map(int, words.split())  # microseconds
            if quota > 0:  # -1 means no limit
                cpus = min(cpus, math.ceil(quota / period))
    return cpus


def usable_memory():
    """How many bytes of RAM this process may use: the machine's, or fewer in a container; inf where nobody says."""
    limits = [math.inf]
    if hasattr(os, "sysconf"):  # not on Windows
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups, version 2 and 1
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(CGROUP, name).read_text()))
    return min(limits)


def find_device():
    """"cuda" if torch can compute on a GPU with CUDA, else "cpu". Prints a line if there is a GPU that is not used."""
    import torch
    if torch.cuda.is_available():
        try:
            torch.ones(1, device="cuda") + 1  # a GPU for which torch was not built fails only here
            return "cuda"
        except RuntimeError as error:
            problem = f"torch cannot compute on this GPU ({str(error).splitlines()[0]}); pytorch.org has other builds"
    elif shutil.which("nvidia-smi") and torch.version.cuda:
        problem = f"the GPU's driver is missing or too old for CUDA {torch.version.cuda}"
    elif shutil.which("nvidia-smi"):
        problem = "this build of torch has no CUDA; pytorch.org has one that does"
    elif torch.backends.mps.is_available():
        problem = "nothing has been measured on Apple's GPU; --device=mps uses it"
    else:
        return "cpu"
    print(f"taking the CPU: {problem}", file=sys.stderr)
    return "cpu"


def cpu_has_bfloat16():
    """Whether this CPU has instructions for products in bfloat16, which it would otherwise emulate, very slowly."""
    import torch
    instructions = ("avx512_bf16", "amx_bf16")
    if hasattr(torch.cpu, "get_capabilities"):  # not in older versions of torch
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in instructions)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:  # Linux
        return not set(instructions).isdisjoint(file.read().split())
    return False


def peak_flops(device, dtype):
    """FLOP/s that a GPU could reach in a 16-bit dtype; None where that is not known."""
    import torch
    if device.type != "cuda" or dtype == torch.float32:
        return None
    gpu = torch.cuda.get_device_name(device)
    for name, flops in PEAK_FLOPS.items():
        # exclude weaker cards, which have the same name and a suffix
        if re.search(rf"\b{name}\b(?!.*\b(Ti|Laptop|D|NVL|MIG)\b)", gpu):
            return flops
    return None


def peak_memory(device):
    """The peak memory of this process in MB: on the GPU if it uses one, else in RAM; 0 if that is not known."""
    import torch
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) >> 20
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)  # a Mac counts bytes, Linux KB


def keep_freed_memory():
    """Tell glibc to keep freed memory for the next step. By default it returns the memory to the system and fetches it
    again, which makes training on a CPU 1.2 times slower."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:
        return  # not Linux
    mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets a mapping of its own
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-2, 1 << 28)  # M_TOP_PAD


def start_processes(device, dtype):
    """(rank, number of processes, torch.device, torch.dtype) of this process: one of those that torchrun started, or a
    single one."""
    import torch
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and device == "auto" and torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        device = "cpu"  # fewer GPUs than processes
    if processes > 1 and device in ("auto", "cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device, dtype = pick_device(device, dtype)
    if processes > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # the first process validates and saves alone, and the others wait for it, by default for ten minutes at most;
        # if a process dies, torchrun ends the others
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=1))
    return rank, processes, device, dtype

"""The parts of tests/gpu.sh that are no command of the repository: python tests/gpu_parts.py NAME …"""
import re
import sys
import time
from collections import Counter

import torch

import sample
import train
from common.runs import load_run
from lab.contenders import our_model, shape_of
from model import make_optimizers

KINDS = {"products": r"gemm|nvjet|cutlass|cublas|xmma|splitK", "attention": r"flash|fmha|sdpa|cudnn|attention",
         "compiled": r"^triton", "lists of tensors": r"multi_tensor", "copies": r"Memcpy|Memset|copy"}
HAS_GPU = torch.cuda.is_available()


def machine():
    """What all figures depend on."""
    print("torch", torch.__version__, "on", sys.version.split()[0])
    if HAS_GPU:
        print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0), torch.backends.cudnn.version())


def profile():
    """Where a step of 8 x 512 goes: two micro steps and an update, as train.py takes them, by kind of kernel."""
    device, rows, shape = "cpu", 1, shape_of(1, 64, block_size=32, vocab_size=4096)
    if HAS_GPU:
        device, rows, shape = "cuda", 64, shape_of(8, 512, block_size=512, vocab_size=4096)
    args = train.fill_defaults(train.command_line().parse_args([]))
    model = our_model(shape).to(device)
    optimizers = make_optimizers(model, args)
    forward = torch.compile(model, dynamic=False) if HAS_GPU else model
    idx = torch.randint(4096, (rows, shape["block_size"] + 1), device=device)

    def step():
        for _ in range(2):
            with torch.autocast(device, torch.bfloat16):
                loss = forward(idx[:, :-1], idx[:, 1:]).mean() / 2
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for _ in range(5):  # compiles, and warms up
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(5):
            step()
    milliseconds, kernels = Counter(), Counter()
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "other")
            milliseconds[kind] += event.self_device_time_total / 5e3
            kernels[kind] += event.count // 5
    for kind, ms in milliseconds.most_common():
        print(f"{kind:18} {ms:8.2f} ms  {kernels[kind]:5} kernels a step")
    by = "self_cuda_time_total" if HAS_GPU else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=60))


def six_gigabytes(*options):
    """train.py on a card that has 6 GB, of which a desktop takes 0.7."""
    if HAS_GPU:
        real = torch.cuda.get_device_properties
        torch.cuda.set_per_process_memory_fraction(5.3e9 / real(0).total_memory)

        class Card:
            total_memory = 5_300_000_000

            def __getattr__(self, name):  # all else is as it is
                return getattr(real(0), name)
        torch.cuda.get_device_properties = lambda device: Card()
    train.main(options)


def turing(*options):
    """train.py on a card without bfloat16, such as a T4: in float16, with a GradScaler."""
    torch.cuda.get_device_capability = lambda device: (7, 5)
    train.main([*options, "--dtype=float16"])


def speed_of_sampling(run, device, streams, dtype):
    """Three rounds of 200 tokens, since the first one records the CUDA graphs."""
    model = load_run(run, device)[0].to(getattr(torch, dtype))
    for number in range(3):
        started = time.perf_counter()
        list(sample.generate(model, [0], 200, range(int(streams)), -1))
        if HAS_GPU:
            torch.cuda.synchronize()
        speed = 200 * int(streams) / (time.perf_counter() - started)
        memory = torch.cuda.max_memory_allocated() >> 20 if HAS_GPU else 0
        print(f"round {number}: {speed:,.0f} tokens/s, {memory:,} MB")


PARTS = {"machine": machine, "profile": profile, "six-gigabytes": six_gigabytes, "turing": turing,
         "sample": speed_of_sampling}

if __name__ == "__main__":
    PARTS[sys.argv[1]](*sys.argv[2:])

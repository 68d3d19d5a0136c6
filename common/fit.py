"""Fit a training run to its device: the size of a step, micro batches that fit into memory, compiling, and sharing the
model among processes. `run` is a Run of train.py."""
import inspect
import math
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import is_out_of_memory
from common.device import usable_memory


def choose_batch_tokens(args, tokens, device):
    """The total batch size for a run of `tokens` tokens, unless --batch_tokens is given.

    Small steps learn the most from few tokens, and a CPU takes them as fast as large ones. A GPU would be idle for most
    of a small step. A long run loses little with larger ones, so there the batch grows with the square root of its
    length, in powers of two."""
    best = 4096
    if device.type == "cuda" and args.max_minutes > 2:
        best = 16384
    elif device.type == "cuda" and not (args.max_steps or args.max_minutes):
        best = min(max(best, 2 ** round(math.log2(4096 * (tokens / 5e6) ** 0.5))), 65536)
    return max(best, args.block_size)  # a step has at least one row


def max_micro_batch(run):
    """The largest micro batch in rows, unless --batch_size is given: 8,192 tokens, or 128 rows on a GPU, as far as half
    of the GPU's memory or a quarter of the RAM holds them; other programs need that too."""
    # what the backward pass needs for each token without compiling: about 50 bytes per channel and layer (a test
    # measures it), and 12 per logit (in 16 bits, in float32, and its gradient)
    token_bytes = 50 * run.config.n_layer * run.config.n_embd + 12 * run.config.vocab_size
    if run.device.type == "cuda":
        memory, rows = torch.cuda.get_device_properties(run.device).total_memory / 2, 128
    else:
        memory, rows = usable_memory() / 4, 8192 // run.config.block_size
    return max(1, int(min(memory / (token_bytes * run.config.block_size), rows)))


def plan_batch(run, max_rows):
    """(micro-batch size in rows, micro steps a step), so that all processes together train on --batch_tokens."""
    rows = run.args.batch_tokens // run.args.block_size
    rows_each, rest = divmod(rows, run.processes)
    if not rows_each or rest:
        sys.exit(f"--batch_tokens={run.args.batch_tokens} is {rows} rows of --block_size={run.args.block_size}, which "
                 f"{run.processes} process(es) cannot share: choose a multiple")
    micro_batch = max(n for n in range(1, min(max_rows, rows_each) + 1) if rows_each % n == 0)
    return micro_batch, rows_each // micro_batch


def should_compile(run):
    """Whether the run is long enough for compiling, which takes half a minute and makes a step up to twice as fast."""
    if run.args.compile != "auto":
        return run.args.compile == "True"
    if run.device.type == "mps":
        return False
    if run.args.max_minutes:
        return run.args.max_minutes > 2
    two_minutes = 2e13  # FLOPs that take about so long without compiling
    if run.device.type == "cuda":
        two_minutes = 4e13 * torch.cuda.get_device_properties(run.device).multi_processor_count
    return run.max_steps * run.step_tokens * run.flops_per_token > two_minutes


def prepare_forward(run):
    """Compile the model if that is wanted, find a micro batch that fits into a GPU's memory, and share the model among
    processes. Compiling and memory are tried out with a batch of zeros, which changes no weight."""
    if run.compiling:
        run.say("compiling, about half a minute")
    while run.compiling or run.device.type == "cuda":
        try:
            run.forward = torch.compile(run.model, dynamic=False) if run.compiling else run.model
            try_batch(run)
            break
        except Exception as error:
            if is_out_of_memory(error):
                halve_micro_batch(run)
            elif run.compiling:  # no compiler, an old GPU, …: the plain model trains as well
                run.say(f"compiling fails here ({error.__class__.__name__}): going on without it, more slowly")
                run.forward, run.compiling = run.model, False
            else:
                raise
    if run.processes > 1:
        smallest = torch.tensor(run.micro_batch)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        run.micro_batch, run.micro_steps = plan_batch(run, smallest.item())
        # the buffers are the same everywhere; how to say so depends on the version of torch
        has_new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        no_sync = {"forward_sync_buffers" if has_new_name else "broadcast_buffers": False}
        run.forward = DistributedDataParallel(run.forward, gradient_as_bucket_view=True, **no_sync)


def try_batch(run):
    """The forward and the backward pass of a micro batch of zeros. Compiled code is made for the shapes of this one."""
    idx = torch.zeros(run.micro_batch, run.args.block_size + 1, dtype=torch.int64, device=run.device)
    try:
        with run.autocast():
            loss = run.forward(idx[:, :-1], idx[:, 1:]).mean()
        loss.backward()
    finally:
        run.model.zero_grad(set_to_none=True)


def halve_micro_batch(run):
    """Go on with smaller micro batches, and more of them: the step stays the same."""
    if run.micro_batch == 1:
        sys.exit("not even one row fits into memory: lower --block_size, --n_embd or --n_layer")
    run.micro_batch, run.micro_steps = plan_batch(run, run.micro_batch // 2)
    run.say(f"out of memory: going on with micro batches of {run.micro_batch} rows")


def end_processes(run, stopped):
    """Wait until all processes have trained. The first one goes on alone, if only to score; the others end here, unless
    the run was `stopped`: then each has yet to end by its signal."""
    dist.barrier()  # otherwise a process may be gone while another still needs it
    run.forward = run.model  # DistributedDataParallel would keep the process group alive
    dist.destroy_process_group()
    if run.rank > 0 and not stopped:
        # at once: Python's clean-up can abort here, by a thread of torch's, and torchrun would end the first one too
        os._exit(0)

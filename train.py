"""Train a model on a prepared dataset.

    python train.py                                       the built-in world of stories, in minutes
    python train.py --dataset=tinystories --size=3M --max_minutes=60
    python train.py --n_layer=8 --n_embd=512
    python train.py --dataset=a:0.3,b:0.7                 a mix of datasets that share a tokenizer
    torchrun --nproc_per_node=2 train.py                  several GPUs or processes
    python train.py … --resume                            continue a run that was stopped

Writes out/<run>/ckpt.pt and log.jsonl, and ends with a summary of `name: value` lines.

Read this file from top to bottom: the options, the run, the loop (`train`) with its parts, what happens after the last
step, and `main`, which calls them in this order. How rows are cut from the token bins stands in common/dataset.py, how
a run is fitted to a GPU's memory in common/fit.py, and how it is saved and continued in common/runs.py.

A step trains on --batch_tokens tokens. They are rows of --block_size tokens, split into micro batches that fit into
memory: the gradients of the micro steps add up to those of the whole batch (gradient accumulation).
"""
# first, so that an old Python, or Ctrl-C while the rest is imported, ends in one line
from common import CommandLine, run_main, stop_signals

import json
import math
import os
import signal
import sys
import time
from dataclasses import fields

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.dataset import TrainData, parse_mix
from common.device import keep_freed_memory, peak_flops, peak_memory, start_processes
from common.files import read_lines
from common.fit import (choose_batch_tokens, end_processes, max_micro_batch, plan_batch, prepare_forward,
                        should_compile)
from common.runs import (Clock, keep_weights, load_initial_weights, open_run_folder, read_own_checkpoint, restore,
                         save_run, trim_log)
from eval import evaluate_mix, read_spans, skill_accuracy
from model import GPT, POSITIONS, SIZES, GPTConfig, lr_multiplier, make_optimizers
from sample import write_stories


def command_line():
    """All options. Those whose default is None depend on others: fill_defaults() sets them."""
    parser = CommandLine(__doc__.split("\n")[0])
    parser.option("dataset", "world", "folder under data/, or a mix: name:weight,name:weight")
    parser.option("out_dir", "", "the run's folder (default: out/<dataset>-<layers>x<width>)")
    # the shape of the model
    shapes = ", ".join(f"{name} {layers}x{width}" for name, (layers, width, _) in SIZES.items())
    parser.option("size", "", f"a shape of the paper: {shapes}", choices=tuple(SIZES))
    parser.option("n_layer", None, "layers (default: as --size says, else 4)", type=int, low=1)
    parser.option("n_embd", None, "width (default: as --size says, else 128)", type=int, low=1)
    parser.option("n_head", None, "attention heads (default: as --size says, else heads of 64 channels or more)",
                  type=int, low=1)
    parser.option("block_size", 256, "context in tokens", low=2)
    parser.option("pos", "rope", "how positions are encoded", choices=POSITIONS)
    parser.option("smear", True, "add a learned multiple of the previous token's embedding to each token's own")
    parser.option("qk_gain", 8.0, "largest logit of attention, learned from here on; 0: sqrt(head size), fixed", low=0)
    parser.option("value_embeds", True, "in every second layer, add an embedding of each token to its value")
    parser.option("embed_std", 0.1, "standard deviation of new embeddings; see GPT in model.py", low=0.001)
    # how it learns
    parser.option("optimizer", "muon", "muon for the matrices of the blocks and adamw for the rest, or adamw for all",
                  choices=("muon", "adamw"))
    parser.option("lr", None, "peak learning rate (default: 0.03 with muon, 0.002 with adamw)", type=float, low=0)
    parser.option("weight_decay", 0.1, "of the matrices of the blocks", low=0)
    parser.option("schedule", "wsd", "cosine, or wsd: warm-up, stable, then linear decay to zero",
                  choices=("cosine", "wsd"))
    parser.option("warmup", 0.02, "share of the run in which the learning rate rises", low=0, high=1)
    parser.option("cooldown", 0.6, "share of the run in which wsd lowers it; 0: never", low=0, high=1)
    parser.option("clip", 1.0, "maximum norm of the gradient; 0 means no limit", low=0)
    parser.option("batch_tokens", None, "total batch size in tokens, over all micro steps and processes (default: "
                  "4096; on a GPU up to 65536, the more the longer the run)", type=int, low=1)
    parser.option("batch_size", None, "maximum micro-batch size in rows; the rest is gradient accumulation. Lower it "
                  "if memory runs out (default: as many as hold 8192 tokens; on a GPU what half of its memory holds, "
                  "at most 128)", type=int, low=1)
    # how long; one of these at most
    parser.option("max_steps", 0, "length of the run in steps; 0: no limit", low=0)
    parser.option("max_tokens", 0, "length of the run in tokens (default: 5000000)", low=0)
    parser.option("max_flops", 0.0, "length of the run in FLOPs, as model.py counts them; 0: no limit", low=0)
    parser.option("max_minutes", 0.0, "minutes of the run, without compiling and the first step; 0: no limit", low=0)
    # what happens along the way
    parser.option("evals", 10, "evaluations, evenly spaced, with a sample and a checkpoint; the last at the end", low=0)
    parser.option("eval_stories", 500, "stories scored by all evaluations but the last; 0 means all", low=0)
    parser.option("log_interval", 10, "steps between two lines of the log", low=1)
    parser.option("keep", "", "log: also keep the weights after 1, 2, 4, 8, … steps", choices=("log",))
    # where it starts, and on what machine
    parser.option("init_from", "", "start from the weights of another run: its folder, or a checkpoint in it")
    parser.option("resume", False, "continue this run")
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    parser.option("dtype", "auto", "precision of the matrix products",
                  choices=("auto", "float32", "bfloat16", "float16"))
    parser.option("compile", "auto", "torch.compile the model; auto: if the run is long enough to gain from it",
                  choices=("auto", "True", "False"))
    parser.option("seed", 1, "of the weights and the data order", low=0)
    return parser


def fill_defaults(args):
    """Set the options that depend on others, and refuse those that contradict each other."""
    for name, default in zip(("n_layer", "n_embd", "n_head"), SIZES.get(args.size, (4, 128, None))):
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.n_head is None:  # as many as possible, of 64 channels or more each, an even number as rope needs
        fitting = [n for n in range(1, args.n_embd // 64 + 1) if args.n_embd % (2 * n) == 0]
        args.n_head = max(fitting, default=1)
    if args.lr is None:
        args.lr = {"muon": 0.03, "adamw": 0.002}[args.optimizer]
    if args.schedule == "wsd" and args.warmup + args.cooldown > 1:
        sys.exit("--warmup and --cooldown are shares of the run: lower them until they add up to 1 at most")
    if sum(limit > 0 for limit in (args.max_steps, args.max_tokens, args.max_flops, args.max_minutes)) > 1:
        sys.exit("give only one of --max_steps, --max_tokens, --max_flops and --max_minutes")
    return args


# -----------------------------------------------------------------------------------------------------------------
# a run. Every process of torchrun has a Run of its own, with the same data, weights and step; process 0 alone writes
# files and prints.


class Run:
    """Everything that belongs to a training run: data, model, optimizers, and how far it has come."""

    def __init__(self, args):
        if "world" in parse_mix(args.dataset):
            from lab.world import ensure_prepared  # only here: the stages do without the laboratory
            ensure_prepared()
        self.args, self.data = args, TrainData(args)
        self.rank, self.processes, self.device, self.dtype = start_processes(args.device, args.dtype)
        self.out_dir = args.out_dir or os.path.join("out", f"{'+'.join(self.data.mix)}-{args.n_layer}x{args.n_embd}")
        self.log_path = os.path.join(self.out_dir, "log.jsonl")
        self.lock = None
        checkpoint = read_own_checkpoint(self, vars(command_line().parse_args([])))  # None if the run is new

        # the model, and what it learns with
        torch.manual_seed(args.seed)  # the same initial weights in every process
        options = {**vars(args), "vocab_size": self.data.metas[self.data.first]["vocab_size"]}
        self.config = GPTConfig(**{f.name: options[f.name] for f in fields(GPTConfig) if f.name in options})
        self.model = GPT(self.config, args.embed_std).to(self.device)
        self.flops_per_token = self.model.flops_per_token()
        self.forward = self.model  # prepare_forward() wraps it; the weights are the same
        tokens = args.max_tokens or args.max_flops / self.flops_per_token or 5_000_000  # if no time or steps are given
        args.batch_tokens = args.batch_tokens or choose_batch_tokens(args, tokens, self.device)
        # the more often tokens come again, the more their embeddings must decay, lest they learn the text by heart;
        # inherited weights must not decay
        embed_decay = 0.0 if args.init_from else min(0.1, 20 * args.batch_tokens / self.data.epoch_tokens)
        self.optimizers = make_optimizers(self.model, args, embed_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

        # how far it has come, and how far it will go
        self.step, self.clock = 0, Clock(0.0)
        if checkpoint:
            restore(self, checkpoint)
        elif args.init_from:
            load_initial_weights(self)
        self.first_step = self.step  # of this session
        self.micro_batch, self.micro_steps = plan_batch(self, args.batch_size or max_micro_batch(self))
        self.step_tokens = self.micro_batch * self.micro_steps * self.processes * args.block_size
        self.max_steps = args.max_steps or math.ceil(tokens / self.step_tokens)
        self.compiling = should_compile(self)

    def progress(self):
        """The share of the run that is done, from 0 to 1 or a little above."""
        if self.args.max_minutes:
            return self.clock.seconds() / (60 * self.args.max_minutes)
        return self.step / self.max_steps

    def evaluations_due(self, progress):
        """How many evaluations should have been made by now."""
        return int(progress * self.args.evals + 1e-9)  # lest a rounding error moves an evaluation

    def autocast(self):
        """The context in which matrix products run in `dtype`. The weights and the sums stay in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def say(self, text):
        """Print a line above the progress bar, once for all processes."""
        if self.rank == 0:
            tqdm.write(text)

    def log(self, **values):
        """Add a line to log.jsonl."""
        if self.rank == 0:
            line = {"step": self.step, "tokens": self.step * self.step_tokens,
                    "seconds": round(self.clock.seconds(), 3), "time": round(time.time(), 1), **values}
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def describe(run):
    """Say what is trained, on how much, and where."""
    args, model = run.args, run.model
    epochs = run.max_steps * run.step_tokens / run.data.epoch_tokens
    length = f"{args.max_minutes:g} minutes" if args.max_minutes else f"{epochs:.1f} epochs or {run.max_steps:,} steps"
    run.say(f"{args.dataset}: {run.data.epoch_tokens:,} tokens per epoch; {length} of {run.step_tokens:,} tokens "
            f"({run.micro_steps} micro steps x {run.micro_batch} rows x {args.block_size} tokens on {run.processes} "
            "process(es))")
    run.say(f"{model.num_params():,} parameters, {model.num_params(embedding=False):,} without embeddings and head; "
            f"{run.flops_per_token / 1e6:.1f} MFLOPs per token; {run.device}, {str(run.dtype)[6:]}"
            f"{', compiled' if run.compiling else ''}")


# -----------------------------------------------------------------------------------------------------------------
# the loop. The functions below it are its parts, in the order in which it calls them.


def train(run, signals):
    """Train until the run is done or a signal to stop was received, and save it."""
    probes = {}  # {dataset: marked words of its validation stories}
    bar = progress_bar(run)
    progress, stopping = sync_progress(run, signals)
    while progress < 1 and not stopping:
        set_learning_rate(run, progress)
        evaluations = run.evaluations_due(progress)

        # forward and backward: the gradients of all micro steps add up
        loss = torch.zeros((), device=run.device)
        for rows, is_last in micro_batches(run):
            if run.processes > 1:  # they exchange gradients once a step, in the last backward pass
                run.forward.require_backward_grad_sync = is_last
            with run.autocast():
                micro_loss = run.forward(rows[:, :-1], rows[:, 1:]).mean() / run.micro_steps
            run.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()  # the mean over the whole step; reading it now would wait for a GPU

        # update the weights
        grad_norm = update_weights(run)
        run.step += 1
        if run.step == run.first_step + 1:
            run.clock.start()

        # log
        progress, stopping = sync_progress(run, signals)
        evaluating = progress < 1 and run.evaluations_due(progress) > evaluations
        keeping = run.args.keep == "log" and (run.step & (run.step - 1)) == 0  # a power of two
        logging = run.step % run.args.log_interval == 0 or evaluating or progress >= 1
        if logging or keeping or stopping:
            log_step(run, loss, grad_norm, bar, write=logging)
        bar.update(progress * bar.total - bar.n)

        # evaluate and save: whatever happens, what came before is not lost
        paused = time.perf_counter()
        if keeping:
            keep_weights(run)
        if evaluating and run.rank == 0:
            probes = probes or {name: read_spans(name, 50) for name in run.data.mix}
            evaluate_and_save(run, probes)
        if evaluating:
            progress, stopping = sync_progress(run, signals)  # an evaluation takes time
        run.clock.paused_seconds += time.perf_counter() - paused
    bar.close()
    run.clock.stop()
    save_run(run)


def progress_bar(run):
    """A bar in steps or, for --max_minutes, in seconds; shown by one process, and only on a terminal."""
    total, unit = (60 * run.args.max_minutes, "s") if run.args.max_minutes else (run.max_steps, "step")
    return tqdm(total=total, unit=unit, initial=run.progress() * total, disable=None if run.rank == 0 else True,
                bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}{postfix}]")


def sync_progress(run, signals):
    """(progress, whether to stop) as the first process sees them: all processes must take the same steps."""
    state = torch.tensor([run.progress(), float(bool(signals))], dtype=torch.float64)
    if run.processes > 1:
        dist.broadcast(state, 0)
    progress, stopping = state.tolist()
    return progress, bool(stopping)


def set_learning_rate(run, progress):
    """Set the learning rate of the next step: that of the schedule at its middle. With --max_minutes nobody knows how
    long the step will take, so it is the rate at its start, which is 0 for the first step."""
    if not run.args.max_minutes:
        progress = (run.step + 0.5) / run.max_steps
    lr = run.args.lr * lr_multiplier(progress, run.args)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


def micro_batches(run):
    """Yield this process's share of the next step's rows, (micro_batch, block_size + 1), and whether it is the last."""
    rows = torch.from_numpy(run.data.batch(run.step, run.micro_batch * run.micro_steps * run.processes))
    rows = rows.view(run.micro_steps, run.processes, run.micro_batch, -1)[:, run.rank]
    if run.device.type == "cuda":
        rows = rows.pin_memory()
    rows = rows.to(run.device, non_blocking=True)
    for i in range(run.micro_steps):
        yield rows[i], i == run.micro_steps - 1


def update_weights(run):
    """Clip the gradients and take a step with each optimizer. Returns the gradients' norm before clipping."""
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.args.clip or math.inf)
    for optimizer in run.optimizers:
        # if any gradient overflowed in float16, both optimizers skip the step, not only the one concerned
        if not run.scaler.is_enabled() or grad_norm.isfinite():
            run.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    run.scaler.update()
    return grad_norm


def log_step(run, loss, grad_norm, bar, write):
    """Check the loss of a step and show it, which waits for a GPU. If `write`, log it: a run that was stopped has the
    same log as one that was not."""
    if run.processes > 1:
        dist.all_reduce(loss)
    train_loss = loss.item() / run.processes
    # without a scaler, a gradient that is not finite has corrupted the weights, even if this step's loss was still good
    gradient_is_fine = grad_norm.isfinite() or run.scaler.is_enabled()  # the scaler skips such steps
    if not math.isfinite(train_loss) or not gradient_is_fine:
        sys.exit(f"loss or gradient is not finite at step {run.step}; the last checkpoint stays: try a lower --lr than "
                 f"{run.args.lr:g}, a longer --warmup, or --dtype=float32")
    run.train_loss = train_loss
    run.speed = run.clock.tokens_per_second((run.step - run.first_step - 1) * run.step_tokens)
    values = {"train_loss": train_loss, "lr": run.optimizers[0].param_groups[0]["lr"],
              "tokens_per_second": round(run.speed), "grad_norm": grad_norm.item() if grad_norm.isfinite() else None}
    if peak := peak_flops(run.device, run.dtype):
        values["mfu"] = round(run.speed * run.flops_per_token / peak / run.processes, 4)
    if write:
        run.log(**values)
    bar.set_postfix_str(f", loss {train_loss:.3f}, {run.speed:,.0f} tok/s", refresh=False)
    # once, early: at the second regular line of the log, since the speed at the first is of few steps
    if bar.disable and run.step == (run.first_step // run.args.log_interval + 2) * run.args.log_interval:
        run.say(f"step {run.step:,}: train loss {train_loss:.3f}, {time_left(run)}")


def time_left(run):
    """The speed, and the minutes that the rest of the run will take at this speed."""
    minutes = run.clock.seconds() * (1 / max(1e-9, run.progress()) - 1) / 60
    return f"{run.speed:,.0f} tokens/s, about {minutes:.1f} minutes left"


def evaluate_and_save(run, probes):
    """Validate on the first stories, show a sample, and save a checkpoint."""
    result = scores(run, probes, run.args.eval_stories)
    run.log(**result)
    encoding = run.data.encoding
    ids, = write_stories(run.model, encoding, "", 300, [run.args.seed + run.step], temperature=0.8)
    story = encoding.decode(ids).replace("\n", "\n  ")
    passed = "".join(f", {name.removeprefix('accuracy_')} {share:.0%}"
                     for name, share in result.items() if name.startswith("accuracy_"))
    run.say(f"step {run.step:,}: train loss {run.train_loss:.3f}, val_bpb {result['val_bpb']:.4f}{passed}, "
            f"{time_left(run)}\n  {story}")
    save_run(run)


def scores(run, probes, max_stories=None):
    """{val_loss, val_bpb, accuracy_<skill>, …}: an accuracy is the share of held-out marked words that the model gets
    right. probes: {dataset: list of them}."""
    result = evaluate_mix(run.model, run.data.mix, max_stories)
    for name in run.data.mix:
        suffix = f"/{name}" if len(run.data.mix) > 1 else ""
        for skill, share in skill_accuracy(run.model, run.data.encoding, probes[name]).items():
            result[f"accuracy_{skill}{suffix}"] = share
    return result


# -----------------------------------------------------------------------------------------------------------------
# after the last step. The run is saved by now, so an interruption loses only the scores, which --resume computes again.


def finish(run):
    """Score all validation stories, print three stories and the summary, and log the scores."""
    run.say(f"trained and saved in {run.out_dir}; scoring all validation stories")
    trim_log(run.log_path, run.step)  # a kill may have cut its last line
    result = scores(run, {name: read_spans(name, 200) for name in run.data.mix})
    encoding = run.data.encoding
    seeds = range(run.args.seed, run.args.seed + 3)
    for i, ids in enumerate(write_stories(run.model, encoding, "", 500, seeds, temperature=0.8), 1):
        print(f"\nStory {i}:\n{encoding.decode(ids)}")
    show_ladder(run, result)
    print(f"\nmore stories: python sample.py {run.out_dir}; what it has learned: python eval.py {run.out_dir}\n")
    for name, value in {**result, **summarize(run)}.items():
        text = f"{value:.4f}" if isinstance(value, float) else value
        print(f"{name + ': ':20}{text}")
    run.log(**result, final=True)


def show_ladder(run, result):
    """Print how the accuracy of each skill has grown: a bar of up to ten marks for each evaluation.

    The last row is of 200 words of each skill, the others of 50: a rise or fall of a few percent is chance."""
    lines = [*read_lines(run.log_path), {**result, "step": run.step}]
    names = [name for name in result if name.startswith("accuracy_")]
    if names:
        print("\nThe share of held-out marked words that it got right:")
        width = 2 + max(16, *(len(name.removeprefix("accuracy_")) for name in names))
        print(f"{'step':>8}  " + "".join(f"{name.removeprefix('accuracy_'):{width}}" for name in names))
        for line in lines:
            if "final" not in line and all(name in line for name in names):
                cells = [f"{'#' * round(10 * line[name]):10} {line[name]:4.0%}" for name in names]
                print(f"{line['step']:8,}  " + "".join(cell.ljust(width) for cell in cells))


def summarize(run):
    """The rest of the summary, besides the scores."""
    floor = run.data.metas[run.data.first]["val"].get("bits_per_byte")
    # of a world whose random choices are known
    summary = {"floor_bpb": floor} if floor and len(run.data.mix) == 1 else {}
    if run.step > run.first_step:  # else this session only scores what another one trained
        summary["train_loss"] = run.train_loss
        summary["first_step_seconds"] = f"{run.clock.first_step_seconds:.1f}"
        summary["tokens_per_second"] = round(run.speed)
    tokens = run.step * run.step_tokens
    return {**summary, "steps": run.step, "tokens": tokens, "epochs": f"{tokens / run.data.epoch_tokens:.2f}",
            "seconds": f"{run.clock.seconds():.1f}", "parameters": run.model.num_params(),
            "peak_memory_mb": peak_memory(run.device), "out_dir": run.out_dir}


def main(argv=None):
    run = Run(fill_defaults(command_line().parse_args(argv)))
    signals = []
    if run.progress() < 1:
        if run.device.type == "cpu":
            keep_freed_memory()
        # around compiling too, in which torch can swallow a KeyboardInterrupt
        with stop_signals("stopping after this step; a second Ctrl-C ends it at once\n") as signals:
            open_run_folder(run)
            describe(run)
            prepare_forward(run)
            train(run, signals)
    elif any("final" in line and line["step"] == run.step for line in read_lines(run.log_path)):  # scored, too
        run.say(f"{run.out_dir} is finished (step {run.step:,}): to continue it, give a longer run, such as "
                f"--max_tokens={2 * run.step * run.step_tokens}; to grade it, python eval.py {run.out_dir}")
        return
    if run.processes > 1:
        end_processes(run, stopped=bool(signals))
    if signals:
        run.say(f"stopped at step {run.step:,} and saved in {run.out_dir}: the same command with --resume continues")
    elif run.rank == 0:
        try:
            finish(run)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{run.out_dir} is trained and saved: the same command with --resume scores it")
    if signal.SIGINT in signals:
        raise KeyboardInterrupt  # run_main then ends the process as Ctrl-C does


if __name__ == "__main__":
    run_main(main, lower="--batch_size, the rows of a micro batch (with --resume, if a checkpoint was saved)")

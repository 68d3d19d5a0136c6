"""Runs on disk: finding, loading, saving and continuing them. A run is a folder with ckpt.pt, log.jsonl and
tokenizer.tiktoken. The functions that save and continue one take the Run of train.py, which writes them."""
import glob
import json
import os
import pickle
import shutil
import sys
import time
from dataclasses import asdict

import torch

from common.files import atomic_write, check_writable, file_hash, lock, read_lines
from common.tokenizer import load_ranks, make_encoding
from model import GPT, GPTConfig

# Options of train.py that do not change what a run learns: batch_size only sets the micro-batch size, and size is
# stored as the shape it stands for.
HOUSEKEEPING = ("out_dir", "resume", "evals", "eval_stories", "log_interval", "keep", "device", "compile",
                "batch_size", "size")
# Options that may differ between a run and its continuation.
RESUMABLE = (*HOUSEKEEPING, "max_steps", "max_tokens", "max_flops", "max_minutes", "dtype", "init_from", "embed_std")

# -----------------------------------------------------------------------------------------------------------------
# finding and loading


def existing_runs():
    """The folders under out/ that hold a checkpoint."""
    return [os.path.dirname(path) for path in sorted(glob.glob(os.path.join("out", "*", "ckpt.pt")))]


def newest_run():
    """The folder under out/ whose run was logged last. File dates are unreliable: copying a folder changes them."""
    runs = existing_runs()
    if not runs:
        sys.exit("no trained model in out/: run python train.py first")
    newest = max(runs, key=last_logged)
    if len(runs) > 1:
        print(f"taking {newest}, the newest of {len(runs)} runs in out/", file=sys.stderr)
    return newest


def last_logged(run):
    """When a run wrote the last whole line of its log, in seconds since 1970; 0 if that is not known."""
    try:
        with open(os.path.join(run, "log.jsonl"), encoding="utf-8") as log:
            lines = [line for line in log if line.endswith("\n")]
        return json.loads(lines[-1])["time"]
    except (OSError, ValueError, LookupError):
        return 0


def load_checkpoint(path):
    """The dict that train.py saved, on the CPU, from a run's folder or a checkpoint file."""
    path = path if path.endswith(".pt") else os.path.join(path, "ckpt.pt")
    if not os.path.exists(path):
        runs = ", ".join(existing_runs())
        sys.exit(f"no checkpoint {path}: " + (f"choose from {runs}" if runs else "run python train.py first"))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, LookupError, pickle.UnpicklingError) as error:
        sys.exit(f"{path} cannot be read ({error.__class__.__name__}): it is truncated or no checkpoint; train again")
    if not isinstance(checkpoint, dict) or "model_config" not in checkpoint:
        sys.exit(f"{path} is not a checkpoint of train.py: run python train.py to write one")
    return checkpoint


def load_run(path, device="cpu", block_size=0):
    """(model, checkpoint, encoding) of a run's folder or a checkpoint file in it; the model in float32, for inference.

    block_size: a context different from that in training. Learned positions do not allow one."""
    checkpoint = load_checkpoint(path)
    config = GPTConfig(**checkpoint["model_config"])
    if block_size and config.pos == "learned" and block_size != config.block_size:
        sys.exit(f"{path} has learned positions for a context of {config.block_size} tokens and no other")
    config.block_size = block_size or config.block_size
    # cuDNN's attention makes a plan for each new shape, which takes up to half a second; in a story, every token has a
    # new one
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = GPT(config).to(device)
    model.load_state_dict(checkpoint["model"])
    folder = (os.path.dirname(path) or ".") if path.endswith(".pt") else path
    tokenizer = os.path.join(folder, "tokenizer.tiktoken")
    if not os.path.exists(tokenizer) or file_hash(tokenizer) != checkpoint["tokenizer"]:
        sys.exit(f"{tokenizer} is missing, or is not the one this model was trained with: copy it from "
                 f"data/{checkpoint['datasets'][0]}")
    return model.eval(), checkpoint, make_encoding(load_ranks(folder))


# -----------------------------------------------------------------------------------------------------------------
# saving and continuing


class Clock:
    """Seconds of training over all sessions of a run, not counting each session's first step."""

    def __init__(self, seconds_before):
        self.seconds_before = seconds_before
        self.created = time.perf_counter()
        self.started = None
        self.paused_seconds = 0.0  # for evaluations and saving: part of the run's time, but left out of its speed

    def start(self):
        """Called when the first step of this session is done."""
        self.started = time.perf_counter()
        self.first_step_seconds = self.started - self.created

    def seconds(self):
        if self.started is None:
            return self.seconds_before
        return self.seconds_before + time.perf_counter() - self.started

    def stop(self):
        """Called at the end of the session: what follows is not training."""
        self.seconds_before, self.started = self.seconds(), None

    def tokens_per_second(self, tokens):
        """The speed of this session, given the number of tokens trained on after its first step."""
        return tokens / max(1e-9, self.seconds() - self.seconds_before - self.paused_seconds)


def open_run_folder(run):
    """Create the run's folder, copy the tokenizer into it, and start the log, or trim it for a resumed run."""
    if run.rank == 0:
        # a checkpoint has at most three numbers of 4 bytes per weight: itself, and the two averages of AdamW. The old
        # one stays until the new one is complete: a new run needs room for two, a resumed one for one more
        has_checkpoint = os.path.exists(os.path.join(run.out_dir, "ckpt.pt"))
        check_writable(run.out_dir, 12 * run.model.num_params() * (1 if has_checkpoint else 2))
        os.makedirs(run.out_dir, exist_ok=True)
        run.lock = run.lock or lock(os.path.join(run.out_dir, "train.lock"))
        tokenizer = "tokenizer.tiktoken"  # its content alone: data/ may be write-protected
        shutil.copyfile(os.path.join("data", run.data.first, tokenizer), os.path.join(run.out_dir, tokenizer))
        trim_log(run.log_path, run.step)


def trim_log(path, step):
    """Create a run's log or, when resuming, drop the lines that were logged after `step`."""
    lines = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step] if step else []
    with atomic_write(path) as file:
        file.writelines(lines)


def save_checkpoint(checkpoint, path):
    """Write a checkpoint so that `path` always holds a complete one."""
    try:
        with atomic_write(path, "wb") as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        sys.exit(f"cannot write {path} ({error}); the last checkpoint stays: make room, then run the command again "
                 "with --resume")


def weights_of(run):
    """What sample.py and eval.py need from a run."""
    return {"model": run.model.state_dict(), "step": run.step, "model_config": asdict(run.config),
            "args": vars(run.args), "datasets": list(run.data.mix), "tokenizer": run.data.tokenizer,
            "instruct": any(meta["instruct"] for meta in run.data.metas.values())}


def keep_weights(run):
    """Keep the weights of this step beside the checkpoint, for --keep=log."""
    if run.rank == 0:
        save_checkpoint(weights_of(run), os.path.join(run.out_dir, f"ckpt-{run.step:07d}.pt"))


def save_run(run):
    """Save all that --resume needs."""
    if run.rank == 0:
        state = {"optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
                 "scaler": run.scaler.state_dict(), "seconds": run.clock.seconds(), "rows_read": run.data.rows_read,
                 "data_hashes": run.data.hashes}
        save_checkpoint({**weights_of(run), **state}, os.path.join(run.out_dir, "ckpt.pt"))


def read_own_checkpoint(run, defaults):
    """The checkpoint that --resume continues, checked against the options, whose `defaults` are {name: value}, and the
    data; None for a new run."""
    args, path = run.args, os.path.join(run.out_dir, "ckpt.pt")
    if run.rank == 0 and os.path.isdir(run.out_dir):
        run.lock = lock(os.path.join(run.out_dir, "train.lock"))  # keeps other runs of train.py out
    if not args.resume:
        if os.path.exists(path):
            sys.exit(f"{run.out_dir} holds a run: add --resume to continue it (and a larger --max_tokens, if it is "
                     "finished), or name another with --out_dir=out/NAME")
        return None
    if not os.path.exists(path):
        sys.exit(f"there is no run in {run.out_dir} to continue: leave --resume out, or name a run with --out_dir")
    checkpoint = load_checkpoint(path)
    # the run must go on with what was chosen for it, and its next checkpoint must say where it started
    args.batch_tokens = args.batch_tokens or checkpoint["args"]["batch_tokens"]
    for name in ("init_from", "embed_std"):
        setattr(args, name, checkpoint["args"].get(name, defaults[name]))
    # options that the checkpoint does not know had today's defaults, except for the model's: it was built without them
    before = defaults | asdict(GPTConfig(**checkpoint["model_config"])) | checkpoint["args"]
    for name, value in vars(args).items():
        if name not in RESUMABLE and before[name] != value:
            sys.exit(f"{run.out_dir} was trained with --{name}={before[name]}, not {value}: resume with that, or start "
                     "a new run with another --out_dir")
    # the walk over the rows goes on where it stopped, which makes sense only in the same bins
    if (checkpoint["tokenizer"], checkpoint["data_hashes"]) != (run.data.tokenizer, run.data.hashes):
        sys.exit(f"data/{args.dataset} is not what {run.out_dir} was trained on: prepare it as it was, or start a new "
                 "run with another --out_dir")
    return checkpoint


def restore(run, checkpoint):
    """Set model, optimizers, data and clock to where the checkpoint left them."""
    run.model.load_state_dict(checkpoint["model"])
    for optimizer, state in zip(run.optimizers, checkpoint["optimizers"]):
        optimizer.load_state_dict(state)
    if checkpoint["scaler"]:  # empty unless the run was in float16
        run.scaler.load_state_dict(checkpoint["scaler"])
    run.step, run.data.rows_read = checkpoint["step"], checkpoint["rows_read"]
    run.clock = Clock(checkpoint["seconds"])


def load_initial_weights(run):
    """Start from the weights of --init_from, a run of the same shape and tokenizer."""
    old = load_checkpoint(run.args.init_from)
    # GPTConfig's defaults say how models were built before a field was added
    before, now = asdict(GPTConfig(**old["model_config"])), asdict(run.config)
    if run.config.pos != "learned":  # other positions have no weights, so the context may be another
        before["block_size"] = now["block_size"]
    different = [f"{field}={before[field]}" for field in now if before[field] != now[field]]
    if old["tokenizer"] != run.data.tokenizer:
        different.append("tokenizer")
    if different:
        sys.exit(f"--init_from={run.args.init_from} does not fit this run: it has another {', '.join(different)}")
    run.model.load_state_dict(old["model"])

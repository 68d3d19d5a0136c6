"""Train a model on a prepared dataset.

    python train.py --dataset=tinystories --size=3M --max_minutes=60
    python train.py --n_layer=8 --n_embd=512
    python train.py --dataset=a:0.3,b:0.7                a mix of datasets that share a tokenizer
    torchrun --nproc_per_node=2 train.py                 several GPUs or processes
    python train.py … --resume                           the same command goes on where it was stopped

Writes out/<run>/ckpt.pt and log.jsonl; ends with lines of `name: value`.
"""
import ctypes
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from eval import evaluate, skill_accuracy
from model import GPT, SIZES, GPTConfig, load_checkpoint, pick_device
from prepare import Parser, load_meta, load_tokenizer, load_tokens, start
from report import write_whole
from sample import tell
from world import write as write_world

try:
    import resource
except ImportError:  # Windows: the peak of memory is not told
    resource = None

# dense bfloat16 FLOP/s that the makers give for their cards, for the share that is reached (MFU)
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
         "A10G": 70e12, "A10": 125e12, "4090": 165e12, "3090": 71e12}


def command_line():
    parser = Parser(__doc__.split("\n")[0])
    parser.option("dataset", "world", "folder under data/, or a mix: name:weight,name:weight")
    parser.option("out_dir", "", "where the run is written (default: out/<dataset>-<layers>x<width>)")
    parser.option("size", "", "a shape of the paper: " + ", ".join(SIZES), choices=["", *SIZES])
    parser.option("n_layer", None, "layers (default: of --size, else 4)", type=int)
    parser.option("n_embd", None, "width (default: of --size, else 128)", type=int)
    parser.option("n_head", None, "attention heads (default: of --size, else of 64 channels or more)", type=int)
    parser.option("block_size", 256, "tokens of context")
    parser.option("pos", "rope", "how positions are told apart", choices=("rope", "alibi", "learned", "none"))
    parser.option("smear", True, "each embedding takes in the one before; False: the plain transformer")
    parser.option("embed_std", 0.1, "spread of new embeddings; 1 keeps tokens apart that are used alike, as + and -")
    parser.option("optimizer", "muon", "muon for the blocks' matrices with adamw for the rest, or adamw alone",
                  choices=("muon", "adamw"))
    parser.option("lr", None, "highest learning rate (default: 0.02 with muon, 0.002 with adamw)", type=float)
    parser.option("weight_decay", 0.1, "of the blocks' matrices")
    parser.option("schedule", "wsd", "cosine, or wsd: constant, then linear to zero over --cooldown",
                  choices=("cosine", "wsd"))
    parser.option("warmup", 0.02, "share of the run in which the learning rate rises")
    parser.option("cooldown", 0.6, "share of the run in which wsd lowers it; 0: never")
    parser.option("clip", 1.0, "largest norm of the gradient (0: no limit)")
    parser.option("batch_tokens", 4096, "tokens a step, over all processes")
    parser.option("batch_size", 32, "rows that go through the model at once, at most; the rest of a step follows")
    parser.option("max_steps", 0, "length of the run, in steps")
    parser.option("max_tokens", 0, "… in tokens (default: 5,000,000)")
    parser.option("max_flops", 0.0, "… in floating-point operations, by the estimate of model.py")
    parser.option("max_minutes", 0.0, "… in minutes, counted from the end of the first step, which compiles")
    parser.option("evals", 10, "evaluations with a sample and a checkpoint, evenly over the run, the last at its end")
    parser.option("eval_stories", 500, "stories that those score (0: all); the one at the end scores the whole file")
    parser.option("log_interval", 10, "steps between two lines of the log")
    parser.option("keep", "", "log: also keep the weights of steps 1, 2, 4, 8, …", choices=("", "log"))
    parser.option("init_from", "", "start from another run's weights")
    parser.option("resume", False, "go on with this run")
    parser.option("device", "auto", "auto, cpu, cuda or mps")
    parser.option("dtype", "auto", "auto, float32, bfloat16 or float16",
                  choices=("auto", "float32", "bfloat16", "float16"))
    parser.option("compile", "auto", "auto, True or False", choices=("auto", "True", "False"))
    parser.option("seed", 1, "of weights and data order")
    return parser


# what may differ between a run and its continuation
FREE = ("out_dir", "max_steps", "max_tokens", "max_flops", "max_minutes", "evals", "eval_stories", "log_interval",
        "keep", "resume", "device", "dtype", "compile", "batch_size", "init_from", "embed_std", "size")

# -----------------------------------------------------------------------------------------------------------------
# data


def parse_mix(text):
    """{"a": 0.3, "b": 0.7} from "a:3,b:7": weights are made to sum to one."""
    try:
        parts = [part.partition(":") for part in text.split(",")]
        weights = {name: float(weight or 1) for name, _, weight in parts}
        if not all(0 <= weight < math.inf for weight in weights.values()):
            raise ValueError
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}
    except (ValueError, ZeroDivisionError):
        sys.exit(f"--dataset={text} is neither a name nor name:weight,name:weight")


@functools.lru_cache(4)
def block_order(blocks, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(blocks)


def read_rows(tokens, length, first, count, seed):
    """Rows `first` to `first + count` of an endless walk over the blocks of `tokens`: (count, length + 1) int64.

    Each epoch visits every block of `length` tokens once, in an order that follows from the seed and the epoch. A row
    has one token more, the last target, with which the next block begins."""
    blocks = (len(tokens) - 1) // length
    rows = np.empty((count, length + 1), np.int64)
    for i in range(count):
        epoch, place = divmod(first + i, blocks)
        start = block_order(blocks, seed, epoch)[place] * length
        rows[i] = tokens[start:start + length + 1]
    return rows


def make_world():
    """Stories of the built-in world, written and prepared, where data/world has none: a fresh machine can train."""
    stories = os.path.join("data", "world", "stories.jsonl")
    if os.path.exists(os.path.join("data", "world", "meta.json")):
        for source in load_meta("world")["source"]:
            if os.path.exists(source["file"]) and os.path.getsize(source["file"]) != source["bytes"]:
                sys.exit(f"{source['file']} is not what was prepared: python prepare.py --dataset=world")
        return
    if "RANK" in os.environ:
        sys.exit("no dataset in data/world: run python world.py and python prepare.py before torchrun")
    if not os.path.exists(stories):
        print("data/world is empty: writing 50,000 stories of the built-in world (python world.py)")
        write_world(50_000)
    print("preparing data/world (python prepare.py --dataset=world)")
    # a process of its own, whose workers, where they are spawned, then need not import this script and torch
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prepare.py")
    with subprocess.Popen([sys.executable, script, "--dataset=world"]) as process:  # run() would kill it at Ctrl-C
        if process.wait():
            sys.exit("data/world could not be prepared")


# -----------------------------------------------------------------------------------------------------------------
# optimizer and schedule


def orthogonalised(x, dtype):
    """About U V^T of each matrix U S V^T in x (B, M, N), computed in `dtype`: singular values end between 0.7 and 1.2.

    Newton-Schulz iteration of fifth degree; its coefficients, and the whole optimizer, are Jordan et al.'s (2024,
    kellerjordan.github.io/posts/muon)."""
    tall = x.size(1) > x.size(2)
    x = (x.mT if tall else x).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose update of each matrix is made nearly orthogonal, so that rare directions move as
    far as common ones. The same as torch.optim.Muon, which always multiplies in bfloat16: without hardware for that,
    as in most laptops' CPUs, a step of 8 x 256 took 9 times as long as here, where `dtype` can be float32."""

    def __init__(self, matrices, dtype, **settings):
        super().__init__(matrices, settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            together = {}  # on a GPU all matrices of one shape at once: one alone is too little work for it
            for p in group["params"]:
                if p.grad is not None:
                    together.setdefault(p.shape if p.is_cuda else id(p), []).append(p)
            for matrices in together.values():
                updates = []
                for p in matrices:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    mean = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(mean, group["momentum"]))
                for p, update in zip(matrices, orthogonalised(torch.stack(updates), self.dtype)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


def make_optimizers(model, args):
    """Muon for the matrices inside the blocks and AdamW for the tables, or AdamW for all.

    Embeddings and head get no weight decay. Beside Muon their AdamW averages gradients over fewer steps and squares
    over more than usual: most rows of a table have no gradient in most steps."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    tables = [p for name, p in model.named_parameters() if p.ndim != 2 or not name.startswith("blocks.")]
    if args.optimizer == "adamw":
        groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": tables, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))]
    products = torch.bfloat16 if pick_device(str(model.head.weight.device))[1] == torch.bfloat16 else torch.float32
    return [Muon(matrices, products, lr=args.lr, weight_decay=args.weight_decay, momentum=0.9),
            torch.optim.AdamW(tables, lr=args.lr, weight_decay=0.0, betas=(0.7, 0.99))]


def learning_rate(progress, args):
    """The factor on the highest learning rate after `progress` (0 to 1) of the run."""
    if progress < args.warmup:
        return progress / args.warmup
    if args.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (progress - args.warmup) / (1 - args.warmup)))
    return min(1.0, (1 - progress) / max(args.cooldown, 1e-9))


def keep_large_blocks():
    """Tell glibc to keep freed memory instead of handing it back and fetching it again each step: 1.2 times faster."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:
        return  # not Linux
    mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-2, 1 << 28)  # M_TOP_PAD


def peak_memory(device):
    """The most MB that this process has taken so far, on the GPU where it uses one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) >> 20
    if not resource:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) >> 20


def save(checkpoint, path):
    """Write under a temporary name, flush, rename: whenever this is cut off, `path` holds a whole checkpoint."""
    try:
        with open(path + ".tmp", "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # torch turns a full disk into the latter
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        sys.exit(f"cannot write {path} ({e}); the last checkpoint stays: make room, then the same command and --resume")
    os.replace(path + ".tmp", path)


# -----------------------------------------------------------------------------------------------------------------
# the run


def main(argv=None):
    args = command_line().parse_args(argv)
    shape = zip(("n_layer", "n_embd", "n_head"), SIZES.get(args.size, (4, 128, None)))
    for name, value in (*shape, ("lr", {"muon": 0.02, "adamw": 0.002}[args.optimizer])):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.n_head is None:
        heads = range(1, args.n_embd // 64 + 1)  # of an even number of channels each, as rope wants them
        args.n_head = max((n for n in heads if args.n_embd % (2 * n) == 0), default=1)
    least = dict(block_size=2, batch_size=1, log_interval=1, seed=0, max_steps=0, max_tokens=0, max_flops=0,
                 max_minutes=0, evals=0, eval_stories=0, embed_std=0.001, batch_tokens=1, lr=0, weight_decay=0, clip=0,
                 warmup=0, cooldown=0)
    for name, value in least.items():
        if not getattr(args, name) >= value:  # nor is nan
            sys.exit(f"--{name}={getattr(args, name)} must be at least {value}")
    if args.warmup + args.cooldown * (args.schedule == "wsd") > 1:
        sys.exit("--warmup and --cooldown are shares of the run, together at most 1")
    if sum(limit > 0 for limit in (args.max_steps, args.max_tokens, args.max_flops, args.max_minutes)) > 1:
        sys.exit("give only one of --max_steps, --max_tokens, --max_flops and --max_minutes: the schedule follows it")
    mix = parse_mix(args.dataset)
    if "world" in mix:
        make_world()
    first = next(iter(mix))
    metas = {name: load_meta(name) for name in mix}
    data = [load_tokens(name, "train") for name in mix]
    tokenizer = metas[first]["tokenizer"]["sha256"]
    for name, tokens in zip(mix, data):
        if metas[name]["tokenizer"]["sha256"] != tokenizer:
            sys.exit(f"{first} and {name} have different tokenizers: "
                     f"python prepare.py --dataset={name} --tokenizer={first}")
        if len(tokens) <= args.block_size:
            sys.exit(f"{name} has {len(tokens)} train tokens, fewer than one block: lower --block_size or add stories")

    # processes: one, or as many as torchrun started
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    master = rank == 0
    if processes > 1 and args.device == "auto" and torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        args.device = "cpu"  # not a GPU for each
    if processes > 1 and args.device in ("auto", "cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device, dtype = pick_device(args.device, args.dtype)
    if processes > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    say = tqdm.write if master else lambda *text: None

    # a step: `rows` rows, in `accumulate` turns of `batch` rows on each process
    rows = args.batch_tokens // args.block_size
    batch = min(args.batch_size, rows // processes)
    if not batch or rows % (batch * processes):
        sys.exit(f"--batch_tokens={args.batch_tokens} is {rows} rows of --block_size={args.block_size}, which "
                 f"{processes} process(es) cannot share in turns of --batch_size={batch}: choose multiples")
    accumulate = rows // (batch * processes)
    step_tokens = rows * args.block_size
    epoch_tokens = sum(len(tokens) for tokens in data)

    # the model, new or from a checkpoint
    torch.manual_seed(args.seed)
    config = GPTConfig(metas[first]["vocab_size"], args.block_size, args.n_layer, args.n_head,
                       args.n_embd, args.pos, args.smear)
    out_dir = args.out_dir or os.path.join("out", f"{'+'.join(mix)}-{args.n_layer}x{args.n_embd}")
    path, log_path = os.path.join(out_dir, "ckpt.pt"), os.path.join(out_dir, "log.jsonl")
    data_hashes = [meta["train"]["sha256"] for meta in metas.values()]
    step, seconds, used = 0, 0.0, [0] * len(data)
    checkpoint = None
    if args.resume:
        checkpoint = load_checkpoint(path)
        for name, value in vars(args).items():
            if name not in FREE and checkpoint["args"][name] != value:
                sys.exit(f"{out_dir} was trained with --{name}={checkpoint['args'][name]}, not {value}: resume with "
                         "that, or start a new run with another --out_dir")
        if (checkpoint["tokenizer"], checkpoint["data_hashes"]) != (tokenizer, data_hashes):
            sys.exit(f"data/{args.dataset} is not what {out_dir} was trained on: prepare it as it was, or start a new "
                     "run with another --out_dir")
    elif os.path.exists(path):
        sys.exit(f"{out_dir} holds a run: add --resume to go on with it, or name another with --out_dir=out/NAME")
    model = GPT(config, args.embed_std).to(device)
    if args.init_from and not checkpoint:
        old = load_checkpoint(args.init_from)
        if old["model_config"] != asdict(config) or old["tokenizer"] != tokenizer:
            differs = [f"{k}={v}" for k, v in old["model_config"].items() if asdict(config)[k] != v] or ["tokenizer"]
            sys.exit(f"--init_from={args.init_from} does not fit this run; it has another {', '.join(differs)}")
        model.load_state_dict(old["model"])
    optimizers = make_optimizers(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
        if checkpoint["scaler"]:  # empty unless the run was in float16
            scaler.load_state_dict(checkpoint["scaler"])
        step, seconds, used = (checkpoint[name] for name in ("step", "seconds", "used"))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if device.type == "cpu":
        keep_large_blocks()
    flops = model.flops_per_token()
    max_steps = args.max_steps or math.ceil((args.max_tokens or args.max_flops / flops or 5_000_000) / step_tokens)

    def progress_now():
        return seconds / (60 * args.max_minutes) if args.max_minutes else step / max_steps

    if progress_now() >= 1:
        return say(f"{out_dir} is finished (step {step:,}): give a longer run to go on, or python eval.py {out_dir}")

    # compiling takes half a minute or so, and makes a step up to twice as fast
    worth_it = 2e13 if device.type == "cpu" else 5e15  # FLOPs that take some two minutes without
    long = args.max_minutes > 2 if args.max_minutes else max_steps * step_tokens * flops > worth_it
    compiled = args.compile == "True" or args.compile == "auto" and long and device.type != "mps"
    began, forward = time.perf_counter(), model
    if compiled:
        try:
            forward = torch.compile(model)  # may advise TF32, in which val_bpb would not be eval.py's
            idx = torch.zeros(batch, args.block_size + 1, dtype=torch.int64, device=device)
            with autocast:
                loss = forward(idx[:, :-1], idx[:, 1:]).mean()
            loss.backward()
        except Exception as e:  # no compiler, an old GPU, …: whatever it is, the plain model trains as well
            say(f"compiling fails here ({e.__class__.__name__}): going on without it, more slowly")
            forward, compiled = model, False
        model.zero_grad(set_to_none=True)
    compile_seconds = time.perf_counter() - began
    if processes > 1:
        forward = DistributedDataParallel(forward)

    peak = next((peak for name, peak in PEAKS.items() if device.type == "cuda" and dtype != torch.float32 and
                 re.search(rf"\b{name}\b(?!.*\b(Ti|Laptop|D|NVL|MIG)\b)", torch.cuda.get_device_name(device))), None)
    # float32 weights and gradients, two averages of these in AdamW, one in Muon
    memory = 16 * model.num_params() - 4 * (args.optimizer == "muon") * model.num_params(embedding=False)
    budget = f"{args.max_minutes:g} minutes" if args.max_minutes else f"{max_steps:,} steps"
    say(f"{args.dataset}: {epoch_tokens:,} tokens an epoch; {budget} of {step_tokens:,} tokens "
        f"({accumulate} x {batch} x {args.block_size} on {processes} process(es))")
    say(f"{model.num_params():,} parameters, {model.num_params(False):,} without embedding and head; "
        f"{flops / 1e6:.1f} MFLOPs a token; weights, gradients and optimizer take "
        f"{memory / 2**20:.0f} MB; {device}, {str(dtype)[6:]}{', compiled' if compiled else ''}")

    # files
    log = None
    if master:
        os.makedirs(out_dir, exist_ok=True)
        shutil.copy(os.path.join("data", first, "tokenizer.tiktoken"), out_dir)
        lines = []
        if args.resume and os.path.exists(log_path):
            with open(log_path) as f:  # what was logged after the checkpoint will be done again
                lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_whole(log_path, "".join(lines))
        log = open(log_path, "a", buffering=1)

    def write_log(**values):
        if master:
            known = {"step": step, "tokens": step * step_tokens, "seconds": round(seconds, 3)}
            log.write(json.dumps({**known, **values}) + "\n")

    def weights():
        return {"model": model.state_dict(), "step": step, "model_config": asdict(config), "args": vars(args),
                "datasets": list(mix), "tokenizer": tokenizer}

    def state():
        return {**weights(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "scaler": scaler.state_dict(), "seconds": seconds, "used": used, "data_hashes": data_hashes}

    def validate(max_stories=None):
        """Scores on each dataset, and their mean by the weights of the mix."""
        each = {name: evaluate(model, name, max_stories=max_stories) for name in mix}
        result = {key: sum(mix[name] * each[name][key] for name in mix) for key in ("val_loss", "val_bpb")}
        if len(mix) > 1:
            result.update({f"val_bpb/{name}": each[name]["val_bpb"] for name in mix})
        return result

    stop = []

    def clock():
        """Progress, and whether to stop, as the first process sees them: all must take the same turns."""
        now = torch.tensor([progress_now(), float(bool(stop))], dtype=torch.float64)
        if processes > 1:
            dist.broadcast(now, 0)
        return now.tolist()

    def ask_to_stop(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once
    handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}

    encoding = load_tokenizer(first)
    bar = tqdm(total=60 * args.max_minutes or max_steps, initial=seconds if args.max_minutes else step,
               unit="s" if args.max_minutes else "step", disable=None if master else True,
               bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}{postfix}]")
    # started: when the run would have begun, had it never been stopped or compiled; aside: its seconds before this
    # process, and of evaluations
    aside, started, first_step = seconds, time.perf_counter() - seconds, step
    progress, stopped = clock()
    while progress < 1 and not stopped:
        factor = learning_rate(progress if args.max_minutes else (step + 0.5) / max_steps, args)
        for group in groups:
            group["lr"] = args.lr * factor
        # this step's rows, the same on every process, which then takes its own part
        which = np.random.default_rng((args.seed, step)).choice(len(data), rows, p=list(mix.values()))
        block = np.empty((rows, args.block_size + 1), np.int64)
        for i, tokens in enumerate(data):
            count = int((which == i).sum())
            block[which == i] = read_rows(tokens, args.block_size, used[i], count, args.seed)
            used[i] += count
        block = torch.from_numpy(block).view(accumulate, processes, batch, -1)[:, rank]
        if device.type == "cuda":
            block = block.pin_memory().to(device, non_blocking=True)
        else:
            block = block.to(device)
        total = torch.zeros((), device=device)
        for turn in range(accumulate):
            last = turn == accumulate - 1
            with nullcontext() if last or processes == 1 else forward.no_sync():  # gradients meet at the last turn
                with autocast:
                    loss = forward(block[turn, :, :-1], block[turn, :, 1:]).mean() / accumulate
                scaler.scale(loss).backward()
            total += loss.detach()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        for optimizer in optimizers:
            if not scaler.is_enabled() or norm.isfinite():  # what overflows in one is skipped in all
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        step += 1
        if step == first_step + 1:  # the clock of a run starts when its first step has compiled
            first_seconds = time.perf_counter() - started - seconds
            started += first_seconds
        seconds = time.perf_counter() - started

        before = progress
        progress, stopped = clock()
        due = progress < 1 and int(progress * args.evals) > int(before * args.evals)
        if step % args.log_interval == 0 or due or progress >= 1 or stopped:
            if processes > 1:
                dist.all_reduce(total)
            # gradients that are not finite have spoiled the weights, for good, though the step's own loss was fine
            train_loss = total.item() / processes if scaler.is_enabled() or norm.isfinite() else math.nan
            seconds = time.perf_counter() - started  # a GPU has now done what it was given to do
            if not math.isfinite(train_loss):
                sys.exit(f"the loss is {train_loss} at step {step}; the last checkpoint stays: try a lower --lr than "
                         f"{args.lr:g}, a longer --warmup, or --dtype=float32")
            speed = (step - first_step - 1) * step_tokens / max(1e-9, seconds - aside)
            if step % args.log_interval == 0 or due or progress >= 1:
                mfu = {"mfu": round(speed * flops / peak / processes, 4)} if peak else {}
                write_log(train_loss=train_loss, lr=groups[0]["lr"], tokens_per_second=round(speed), **mfu,
                          grad_norm=norm.item() if norm.isfinite() else None)
            bar.set_postfix_str(f", loss {train_loss:.3f}, {speed:,.0f} tok/s", refresh=False)
            left = f"{speed:,.0f} tokens/s, about {seconds * (1 / max(1e-9, progress) - 1) / 60:.1f} minutes left"
            if bar.disable and 1 < step - first_step < 3 * args.log_interval:
                say(f"step {step:,}: train loss {train_loss:.3f}, {left}")
        bar.update((seconds if args.max_minutes else step) - bar.n)
        if master and args.keep == "log" and step & (step - 1) == 0:
            save(weights(), os.path.join(out_dir, f"ckpt-{step:07d}.pt"))
        if due:
            if master:
                result = validate(args.eval_stories)
                write_log(**result)
                ids, = tell(model, encoding, "", 300, [args.seed + step], temperature=0.8)
                say(f"step {step:,}: train loss {train_loss:.3f}, val_bpb {result['val_bpb']:.4f}, {left}\n  "
                    + encoding.decode(ids).replace("\n", "\n  "))
                aside += time.perf_counter() - started - seconds
                seconds = time.perf_counter() - started
                save(state(), path)
            progress, stopped = clock()  # an evaluation takes time, and the others wait for it here
    bar.close()
    if master:
        save(state(), path)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if processes > 1:
        dist.destroy_process_group()

    if master:
        if progress < 1:
            say(f"stopped at step {step:,} and saved in {out_dir}: the same command with --resume goes on")
        else:
            say(f"trained and saved in {out_dir}; scoring all validation stories")
            result = validate()
            for name in mix:
                for skill, share in skill_accuracy(model, name).items():
                    result[f"accuracy_{skill}" + (f"/{name}" if len(mix) > 1 else "")] = share
            write_log(**result)
            floor = metas[first]["val"].get("bits_per_byte")
            if floor and len(mix) == 1:
                result["floor_bpb"] = floor  # of a world whose choices are known
            summary = {**{key: f"{value:.4f}" for key, value in result.items()}, "train_loss": f"{train_loss:.4f}",
                       "steps": step, "tokens": step * step_tokens,
                       "epochs": f"{step * step_tokens / epoch_tokens:.2f}",
                       "seconds": f"{seconds:.1f}", "first_step_seconds": f"{first_seconds + compile_seconds:.1f}",
                       "tokens_per_second": round(speed), "parameters": model.num_params(),
                       "peak_memory_mb": peak_memory(device), "out_dir": out_dir}
            seeds = range(args.seed, args.seed + 3)
            for i, ids in enumerate(tell(model, encoding, "", 500, seeds, temperature=0.8), 1):
                print(f"\nStory {i}:\n{encoding.decode(ids)}")
            print("\n" + "\n".join(f"{key + ': ':20}{value}" for key, value in summary.items()))
    if signal.SIGINT in stop:
        raise KeyboardInterrupt


if __name__ == "__main__":
    start(main)

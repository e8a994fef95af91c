"""What both training loops share: optimisers, schedule, devices and ranks, runs and their checkpoints.

Departures from the released code:
1. A checkpoint is safetensors and JSON. Randomness is a function of the seed and of counts (steps, prompts used), which
   are saved: a resumed run repeats the uninterrupted one, to the bit on a CPU (the sums of a GPU have no fixed order).
2. Gradient checkpointing is a flag, not the rule.
"""
import ctypes
import math
import os
import signal
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import InputError, hash_files, non_negative, number, positive, refuse_on_all
from data.checkpoints import check_finite, latest_checkpoint
from data.runs import add_output_flags, check_folder, prepare_folder
from model import Transformer
from shard import parameters, rank, shard_model, wait_for_ranks, whole, world_size

MEETING = timedelta(minutes=10)  # for all ranks to join
LIMIT = timedelta(days=1)  # for every later wait

# ---- Flags of several commands
def add_machine_flags(parser, dtype_help, dtype="bfloat16", seed=True):
    """Flags that say where and how precisely to compute."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="where to compute; not yet run on mps")
    add("--dtype", choices=("bfloat16", "float32"), default=dtype, help=dtype_help)
    if seed:
        add("--seed", type=number(int, 0, 2 ** 32 - 1), default=42, help="random seed")


def add_training_flags(parser, lr, weight_decay, save_every):
    """Flags of all training commands."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=non_negative, default=lr, help="peak learning rate; 3%% warm-up, cosine to a tenth")
    add("--optimiser", choices=("adamw", "muon"), default="adamw",
        help="muon, for very small models, trains the layers' matrices at 5 x --lr")
    add("--batch-size", type=positive, default=128, metavar="N", help="responses per optimiser step, in whole groups")
    add("--weight-decay", type=non_negative, default=weight_decay, help="on matrices only")
    add("--micro-batch-tokens", type=positive, default=4096, metavar="N",
        help="padded tokens per forward pass; changes memory and speed, and the gradient by "
        "rounding only (except with simrl --loss-mean micro-batch)")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory")
    add("--compile", action="store_true",
        help="on a GPU: compile the layers, with flex_attention; halves a step of 16,000 tokens, "
        "after up to a minute of compiling; not yet run with several ranks")
    add("--shard-ranks", type=positive, metavar="N",
        help="under torchrun: processes that share one copy of the weights; default: all; not yet run on several GPUs")
    add_output_flags(parser, "folder of the run")
    add = parser.add_argument_group("checkpoints").add_argument
    add("--save-every", type=positive, default=save_every, metavar="N", help="steps between checkpoints; two are kept")
    add("--save-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the final model")
    add_machine_flags(parser, "compute; weights and optimiser are float32")


def add_valid_flags(parser, valid_help, every):
    """Flags that say what to validate on, and how often."""
    add = parser.add_argument_group("validation").add_argument
    add("--valid", metavar="FILE", help=valid_help)
    add("--valid-limit", type=positive, metavar="N", help="validate on the first N records only")
    add("--valid-every", type=positive, default=every, metavar="N", help="steps between validations")
    return add


# ---- Optimisers
class Muon(torch.optim.Muon):
    """torch's Muon, iterating in float32 (many CPUs lack bfloat16) and on all matrices of one shape at once."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            updates = defaultdict(list)  # {shape: [(parameter, update)]}
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum_buffer"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                updates[p.shape].append((p, p.grad.lerp(momentum, group["momentum"])))  # Nesterov look-ahead
            for (rows, columns), pairs in updates.items():
                directions = orthogonalise(torch.stack([update for _, update in pairs]))
                for (p, _), direction in zip(pairs, directions):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(direction, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalise(x):
    """Matrices [N, rows, columns] with their singular values pushed towards 1, by five Newton-Schulz iterations."""
    flat = x if x.shape[1] <= x.shape[2] else x.mT  # no more rows than columns, so that gram is small
    flat = flat / flat.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = flat @ flat.mT
        flat = 3.4445 * flat + (-4.775 * gram + 2.0315 * gram @ gram) @ flat
    return flat if flat.shape == x.shape else flat.mT


def make_optimisers(model, args):
    """The optimisers that --optimiser names, as a list: AdamW with the released betas, without decay on norms and
    biases. With muon, for very small models, Muon takes the matrices of the layers, at 5 times the rate."""
    layers, matrices, vectors = [], [], []
    for name, p in parameters(model).items():
        for_muon = args.optimiser == "muon" and ".layers." in name
        (vectors if p.dim() < 2 else layers if for_muon else matrices).append(p)
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    if not layers:
        return [adamw]
    muon = Muon([{"params": layers, "scale": 5.0}], lr=args.lr, weight_decay=args.weight_decay, momentum=0.95)
    return [muon, adamw]


def learning_rate(step, steps, peak):
    """The rate of step 1 ... steps: linear warm-up over 3 %, rounded up, then a cosine down to a tenth of `peak`.

    >>> [round(learning_rate(s, 100, 1.0), 3) for s in (1, 3, 50, 100)]
    [0.333, 1.0, 0.572, 0.1]
    """
    warm_up = math.ceil(0.03 * steps)
    if step <= warm_up:
        return peak * step / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def update(model, optimisers, lr, out, step):
    """Clip the gradients' norm, over all ranks, to 1; update the weights at this learning rate; clear the gradients.
    Returns {"lr", "grad_norm"}, the norm before clipping. InputError before any update if it is not finite."""
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
    check_finite(out, step, "the gradient norm", norm)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return {"lr": lr, "grad_norm": norm}


# ---- Devices and ranks
def pick_device(args):
    """The torch.device that `--device` names. Under `torchrun`, also join the other ranks, a GPU each."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in present if present[name]) if args.device == "auto" else args.device
    if not present[name]:
        refuse_on_all(f"--device {name}: no such device on this machine; use --device cpu")
    if getattr(args, "compile", False) and name != "cuda":
        refuse_on_all(f"--compile: the device is {name}, but flex_attention trains on CUDA only; leave the flag out")
    if name == "cpu":
        keep_pages()
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not dist.is_initialized():
        if name == "cuda":
            number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if number >= count:
                refuse_on_all(f"--device cuda: no GPU for rank {number}; use --nproc-per-node {count}", number == count)
            torch.cuda.set_device(number)
        # Ranks that have not joined after minutes never will. Later, one may wait hours for another's rollout.
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=MEETING)
        dist.distributed_c10d._set_pg_timeout(LIMIT)
        same_on_all("flags", vars(args))
    mkldnn = torch.backends.mkldnn.is_available()  # which multiplies matrices on most CPUs
    if (name, args.dtype) == ("cpu", "bfloat16") and mkldnn and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        note("This CPU has no bfloat16 instructions: --dtype float32 is several times as fast")
    return torch.device(name)


def keep_pages():
    """Let glibc keep freed memory. Otherwise it goes back to the system, and page faults take half of the output head's
    time. STAR_KEEP_PAGES=0 leaves the allocator as it is."""
    if sys.platform == "linux" and os.environ.get("STAR_KEEP_PAGES") != "0":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # another C library may lack it
        mallopt(-3, 10 ** 9) or mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD; an older glibc takes 32 MB at most
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def sharding(args, device):
    """The function that shards a model, for `from_pretrained`; None for one process. InputError for bad flags."""
    ranks = args.shard_ranks or world_size()
    if world_size() % ranks:
        raise InputError(f"--shard-ranks {ranks}: must divide the number of processes, {world_size()}")
    if world_size() == 1:
        return None
    if args.optimiser == "muon":  # products of sharded matrices are slow, and round differently
        raise InputError("--optimiser muon: runs without torchrun only; use adamw")
    sizes = {"copies": world_size() // ranks, "ranks": ranks} if ranks < world_size() else {"ranks": ranks}
    mesh = dist.init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    return partial(shard_model, mesh=mesh, dtype=getattr(torch, args.dtype))


def share_of_rank(micro_batches):
    """This rank's [(micro-batch, active)] of a batch, active being 1. All ranks must make the same number of passes, so
    a rank with one fewer also runs the last, shortest one as a filler: with active 0, so that it adds nothing."""
    share = [(micro, 1) for micro in micro_batches[rank()::world_size()]]
    if len(share) * world_size() < len(micro_batches):
        share.append((micro_batches[-1], 0))
    return share


def note(text):
    """Print a progress note on stderr, once for all ranks. Results go to stdout."""
    if rank() == 0:
        print(text, file=sys.stderr)


def sum_over_ranks(sums):
    """{name: number or tensor} summed over the ranks, as floats."""
    parts = gather_over_ranks([[float(value) for value in sums.values()]])
    return dict(zip(sums, map(sum, zip(*parts))))


def gather_over_ranks(rows):
    """The lists of all ranks as one list, in rank order."""
    parts = [rows] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def same_on_all(what, value):
    """Refuse to go on if the ranks have different values of something: machines may differ in commands and disks."""
    if len(set(gather_over_ranks([str(value)]))) > 1:
        refuse_on_all(f"the ranks have different {what}; start all with the same command, on the same files")


@contextmanager
def fail_together():
    """At the end of the block, wait for all ranks. If any of them has failed, by bad input, a full disk or too little
    memory, all exit and one reports why."""
    error = None
    try:
        yield
    except (InputError, OSError, RuntimeError, MemoryError) as e:
        error = e
        error.agreed = True  # `main` need not wait for another rank's report
    if failed := gather_over_ranks([rank()] if error else []):
        raise error if rank() == failed[0] else SystemExit(2)


# ---- Runs and checkpoints
def open_run(args, models=(), files=()):
    """Prepare the folder --out for a run. Returns the step to resume after: 0 for a new run, -1 for a finished one.

    models, files: what the run reads, or None. Broken models are refused before anything is written; also InputError
        as `check_folder` and `prepare_folder`
    """
    models, files = ([path for path in paths if path] for paths in (models, files))
    with fail_together():
        for folder in models:
            Transformer.from_pretrained(folder, device="meta")
        if rank() == 0:
            check_folder(args)
    same_on_all("models or data", hash_files([*models, *files]))
    with fail_together():
        step = prepare_folder(args, [*models, *files]) if rank() == 0 else 0
    step = int(sum_over_ranks({"step": step})["step"])  # rank 0's, for all
    same_on_all("checkpoints in --out", hash_files([f"{args.out}/checkpoints/step-{step:06d}/progress.json"]))
    if step < 0:
        note(f"{args.out}: is already finished")
    return step


def describe_run(args, model, what, start, steps, updates):
    """Print the size of a run before it starts, and whether it is very short."""
    resumed = f"; resuming after step {start}" if start else ""
    note(f"{what}; {args.dtype} compute, float32 weights, {model.num_parameters() / 1e6:,.1f} M parameters{resumed}")
    if not args.steps and updates < 10:
        passes = "episodes" if "episodes" in args else "epochs"
        note(f"only {steps} steps with {updates} updates: to train longer, raise --steps or --{passes}, "
             "or lower --batch-size")


@contextmanager
def timed(seconds, name):
    """Add the seconds that this context is open to seconds[name]."""
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def stopped_run(args):
    """Say how to continue a run that Ctrl-C stopped. Returns the exit code."""
    wait_for_ranks()
    step = latest_checkpoint(args.out)
    note(f"Stopped after step {step}. Continue with the same command and --resume" if step else
         "Stopped before there was a checkpoint. The same command with --resume begins again")
    return 130


class Steps:
    """The steps of a training run, `for step in steps`, with a progress bar. Ctrl-C ends the loop after the current
    step, or before its updates while it samples; a second Ctrl-C stops at once. start: the step to resume after"""

    def __init__(self, start, last, name):
        self.start = start
        self.last = last
        self.bar = tqdm(total=last, initial=start, desc=name, unit="step", disable=rank() > 0)
        self.stop_requested = False  # by Ctrl-C on this rank; after `ends_at`, on any
        self.stopped = False  # before the last step; set by `ends_at`, and by the loop

    def __iter__(self):
        previous = signal.signal(signal.SIGINT, self.request_stop)
        try:
            with self.bar:
                for step in range(self.start + 1, self.last + 1):
                    yield step
                    if self.stopped:
                        return
        finally:
            signal.signal(signal.SIGINT, previous)

    def request_stop(self, *_):
        self.stop_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        note("\nStopping as soon as the weights can be saved (Ctrl-C again: at once).")

    def ends_at(self, step):
        """Whether this is the last step: of the run, or because a rank was asked to stop."""
        self.stop_requested = sum_over_ranks({"stop": self.stop_requested})["stop"] > 0
        self.stopped = self.stop_requested and step < self.last
        return self.stop_requested or step == self.last

    def show(self, row, names):
        """Advance the bar, and show these metrics next to it."""
        self.bar.set_postfix_str(" ".join(f"{name} {row[name]:.3g}" for name in names if name in row))
        self.bar.update()

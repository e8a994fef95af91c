"""What both training loops share: the chunked output-head loss, the optimiser, its schedule, runs and their
checkpoints, and several processes side by side.

Departures from the released code:
1. The loss is a mean over all counted tokens of the optimiser batch, whatever the micro-batches or ranks (released:
   mean of micro-batch means, so that a token's weight depends on its neighbour's length).
2. No positions x vocabulary tensor exists: the head runs on chunks of the counted positions only.
3. A checkpoint is safetensors and JSON. All randomness is a function of the seed and of counts (of steps, of prompts
   drawn), so a few numbers are all the random state and data position there is, and a resumed run repeats the
   uninterrupted one (to the bit on a CPU; a GPU's sums have no fixed order).
4. Gradient checkpointing is a flag, not the rule.
"""
import atexit
import json
import math
import os
import resource
import shutil
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from data import InputError, read_json, refuse_changes, whole_folder, write_json, write_lines
from data.groups import visible
from model import save_tensors


# ---------------------------------------------------------------------------------------------------------------------
# The output head and the loss, in chunks of positions

class HeadLoss(torch.autograd.Function):
    """sum over positions of weight x objective(h W^T), with gradients to h and W, one chunk of logits at a time."""

    @staticmethod
    def forward(ctx, h, W, weights, objective, chunk, dtype):
        x, w = h.to(dtype), W.to(dtype)
        high = torch.promote_types(dtype, torch.float32)  # logits and sums are float32, or float64 in tests
        wanted = any(ctx.needs_input_grad)
        dh, dW = (torch.zeros_like(t, dtype=high) if wanted else None for t in (h, W))
        total, sums = torch.zeros((), dtype=high, device=h.device), {}
        for start in range(0, len(h), chunk):
            rows = slice(start, start + chunk)
            logits = (x[rows] @ w.T).to(high).requires_grad_(wanted)  # [C, V]
            with torch.set_grad_enabled(wanted):
                losses, stats = objective(logits, rows)  # [C], {name: [C]}
            total += losses.detach() @ weights[rows]
            for name, values in stats.items():
                sums[name] = sums.get(name, 0) + values.detach().sum()
            if wanted:
                grad, = torch.autograd.grad(losses, logits, weights[rows])  # [C, V]
                del logits, losses, stats
                grad = grad.to(dtype)
                dh[rows] = grad @ w
                dW += grad.T @ x[rows]
        if wanted:
            ctx.save_for_backward(dh.to(h.dtype), dW.to(W.dtype))
        ctx.mark_non_differentiable(*sums.values())
        return total, *sums.values(), list(sums)

    @staticmethod
    def backward(ctx, dtotal, *_):
        dh, dW = ctx.saved_tensors
        return dh * dtotal, dW * dtotal, None, None, None, None


def head_loss(h, W, weights, objective, chunk=256, dtype=None):
    """Apply the output head to hidden states and an objective to its logits, without ever holding all logits.

    h [N, hidden] · W [V, hidden] · weights [N] what each position's loss is multiplied by · objective(logits [C, V],
    rows) -> (losses [C], {name: [C]}), where `rows` is the slice of the N positions that the chunk holds · dtype of
    the matrix products, default h's. Returns (sum of weighted losses, {name: sum over positions}).

    >>> h, W = torch.ones(3, 2), torch.tensor([[1., 0], [0, 1], [1, 1]])
    >>> nll = lambda logits, rows: (logits.logsumexp(-1) - logits[:, 2], {})
    >>> head_loss(h, W, torch.full((3,), 1 / 3), nll, chunk=2)[0]
    tensor(0.5514)
    """
    if not torch.is_grad_enabled():  # a parameter asks for its gradient under no_grad too
        h, W = h.detach(), W.detach()
    with torch.autocast(h.device.type, enabled=False):  # the chunks choose their own precision
        total, *sums, names = HeadLoss.apply(h, W, weights, objective, chunk, dtype or h.dtype)
    return total, dict(zip(names, sums))


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser

def adamw(model, lr, weight_decay):
    """[AdamW] with the released betas (0.9, 0.95); no decay on norms and biases (paper.md 1.6)."""
    return [adamw_of(model.parameters(), lr, weight_decay)]


def adamw_of(parameters, lr, weight_decay):
    parameters = list(parameters)
    matrices, vectors = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                              {"params": vectors, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def muon(model, lr, weight_decay):
    """[Muon, AdamW]: for very small models, Muon on the layers' matrices at 5 times the rate of AdamW,
    which has the embedding, the head and the vectors."""
    inside = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2]
    beside = [p for name, p in model.named_parameters() if not (".layers." in name and p.dim() == 2)]
    return [torch.optim.Muon([{"params": inside, "scale": 5.0}], lr=lr, weight_decay=weight_decay, momentum=0.95),
            adamw_of(beside, lr, weight_decay)]


OPTIMISERS = {"adamw": adamw, "muon": muon}


def learning_rate(step, steps, peak):
    """The rate of step 1 … steps: linear warm-up over ceil(3 %), then a cosine down to a tenth of `peak`.

    >>> [round(learning_rate(s, 100, 1.0), 3) for s in (1, 3, 50, 100)]
    [0.333, 1.0, 0.572, 0.1]
    """
    warm_up = math.ceil(0.03 * steps)
    if step <= warm_up:
        return peak * step / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def optimiser_step(model, optimisers, lr, max_norm=1.0):
    """Sum the gradients of all ranks, clip their norm, step. Returns the norm before clipping."""
    if dist.is_initialized():
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a rank may have had no micro-batch
            dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return norm.item()


# ---------------------------------------------------------------------------------------------------------------------
# Devices and ranks

def set_up(device):
    """(device, rank, ranks). Under `torchrun` each process takes its own GPU and joins the others."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device here; use --device cpu")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return torch.device(device), int(os.environ.get("RANK", 0)), ranks


def autocast(device, dtype):
    """bfloat16 compute over float32 weights, or nothing when `dtype` is float32 (or float64, in tests)."""
    return nullcontext() if dtype.itemsize >= 4 else torch.autocast(device.type, dtype)


def states(model, packed, dtype):
    """The hidden states that predict a packed batch's counted tokens, [N, hidden], computed in `dtype`."""
    with autocast(packed["targets"].device, dtype):
        h = model.hidden(packed["input_ids"], packed["positions"], visible(packed))  # [B, T, hidden]
    return h.flatten(0, 1).index_select(0, packed["predictors"])  # [N, hidden]


def sum_over_ranks(sums, device):
    """{name: number or tensor} added over the ranks, as floats."""
    values = torch.tensor([float(v) for v in sums.values()], dtype=torch.float64)
    if dist.is_initialized():
        values = values.to(device)
        dist.all_reduce(values)
    return dict(zip(sums, values.tolist()))


def joined_over_ranks(rows, device):
    """The lists of all ranks as one, in the order of ranks: what JSON can write travels as its bytes, so no pickle."""
    if not dist.is_initialized():
        return rows
    data = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8).to(device)  # [bytes]
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    parts = [data.new_zeros(max(sizes)) for _ in sizes]  # all_gather wants one length: shorter ones are padded
    dist.all_gather(parts, torch.cat((data, data.new_zeros(max(sizes) - len(data)))))
    return [row for part, size in zip(parts, sizes) for row in json.loads(part[:size].cpu().numpy().tobytes())]


def peak_memory(device):
    """Peak memory so far in GB: the GPU's own count there, the process's resident size elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# Runs and checkpoints

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # what AdamW and Muon remember of each parameter


def open_run(out, arguments, resume, overwrite, device, rank=0):
    """Make `out` ready for a run and return the step to go on from, 0 for a new run; the same on every rank.

    device, rank: from `set_up` · `arguments` (without what does not change the numbers) goes to arguments.json, and a
    resumed run must have the same. InputError when `out` holds something and neither `resume` nor `overwrite` is given.
    """
    out, step = Path(out), 0
    if rank == 0:
        if out.exists() and not out.is_dir():
            raise InputError(f"{out}: is a file; --out names a folder")
        if out.exists() and any(out.iterdir()):
            if not (resume or overwrite):
                raise InputError(f"{out}: exists already; give --resume to go on with it or --overwrite to start anew")
            if not (out / "arguments.json").exists():  # --overwrite deletes runs, not what else a folder may hold
                raise InputError(f"{out}: holds no arguments.json, so it is not a run; remove it or give another --out")
        if overwrite and (out / "arguments.json").exists():
            before = read_json(out / "arguments.json").get("command")
            if before != arguments.get("command"):
                raise InputError(f"{out}: holds a run of {before!r}; remove it or give another --out")
        if overwrite:
            shutil.rmtree(out, ignore_errors=True)
        elif (out / "arguments.json").exists():
            refuse_changes(f"{out}: was begun with", read_json(out / "arguments.json"), arguments,
                           "resume with the settings in its arguments.json, or start anew with --overwrite")
            steps = [int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-??????")]
            step = max(steps, default=0)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "arguments.json", arguments)
        for log in filter(Path.exists, (out / "metrics.jsonl", out / "samples.jsonl")):
            # What was logged after the checkpoint comes again; a kill may have left half a line, or half a character.
            with open(log, encoding="utf-8", errors="replace") as file:
                write_lines(log, (line for line in file if step and line.endswith("\n")
                                  and json.loads(line)["step"] <= step))
    return int(sum_over_ranks({"step": step}, device)["step"])


def log_metrics(out, *rows, name="metrics.jsonl"):
    """Append rows, a line each, to metrics.jsonl or another file of the run."""
    with open(Path(out) / name, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def save_checkpoint(out, step, model, optimisers, progress=None, keep=2):
    """Write checkpoints/step-… (weights, optimiser moments, progress.json) whole or not at all; keep the last `keep`.

    progress: the counts that `load_checkpoint` gives back; default {"updates": step}, how often the optimiser stepped.
    """
    with whole_folder(Path(out) / "checkpoints" / f"step-{step:06d}") as new:
        save_tensors({name: p.detach() for name, p in model.named_parameters()}, new / "weights.safetensors")
        state = {p: held for optimiser in optimisers for p, held in optimiser.state.items()}  # none before a first step
        for moment in MOMENTS:  # a file each: writing one takes a copy of it in memory
            save_tensors({name: state[p][moment] for name, p in model.named_parameters() if moment in state.get(p, ())},
                         new / f"{moment}.safetensors")
        write_json(new / "progress.json", progress or {"updates": step})
    kept = sorted((Path(out) / "checkpoints").glob("step-??????"))[-keep:]
    for old in (Path(out) / "checkpoints").iterdir():  # older ones, and what a killed run left half-written
        if old not in kept:
            shutil.rmtree(old)


@torch.no_grad()
def load_checkpoint(out, step, model, optimisers):
    """Put the weights and the optimiser back as they were at the end of `step`. Returns the progress saved there."""
    folder = Path(out) / "checkpoints" / f"step-{step:06d}"
    progress = read_json(folder / "progress.json")
    weights, *moments = (safe_open(folder / f"{what}.safetensors", "pt") for what in ("weights", *MOMENTS))
    for name, p in model.named_parameters():
        p.copy_(weights.get_tensor(name))
        optimiser, = (o for o in optimisers if any(p is mine for group in o.param_groups for mine in group["params"]))
        for what, file in zip(MOMENTS, moments):
            if name in file.keys():
                optimiser.state[p][what] = file.get_tensor(name).to(p.device, copy=True)
        if "exp_avg" in optimiser.state[p]:
            optimiser.state[p]["step"] = torch.tensor(float(progress["updates"]), device=p.device)
    return progress


class Interrupt:
    """While this context is open, Ctrl-C asks to stop at the next step boundary; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.asked, self.before = False, signal.signal(signal.SIGINT, self.handle)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)

    def handle(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nStopping after this step, with a checkpoint (Ctrl-C again: at once).", file=sys.stderr)

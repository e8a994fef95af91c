"""Time and peak memory of the output-head loss, chunked against the textbook over all positions.

    python tests/bench_head.py                       V = 151,936, hidden 896, 512 / 2,048 / 8,192 positions

Each measurement is a process of its own, so the peak resident memory is that of one path. "GB above" is this peak
minus the memory of the process before the loss (the head, the hidden states, the teacher's top-k). A row is a forward
and a backward pass: the median of `--repeat` runs. The closed form of CKD's gradient (docstring of ckd.py) and the
three matrix products alone are timed too, to show what the generic path costs.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from ckd import ckd_loss  # noqa: E402
from head import head_loss  # noqa: E402

V, HIDDEN, K = 151_936, 896, 100


def closed_form(h, W, weights, ids, log_p, chunk, dtype):
    """CKD's gradient by formula, in place on one chunk of probabilities: no autograd graph over the vocabulary."""
    x = h.to(dtype)
    w = W.to(dtype)
    dh = torch.zeros_like(h)
    dW = torch.zeros_like(W)
    for rows in torch.arange(len(h)).split(chunk):
        z = (x[rows] @ w.T).float()  # [C, V]
        q = z.softmax(-1)
        p = log_p[rows].exp()
        top = q.topk(100, dim=-1)
        outside = ~(top.indices[:, :, None] == ids[rows][:, None, :]).any(-1)
        tail = (top.values * outside).sum(-1, keepdim=True)
        q *= p.sum(-1, keepdim=True) - 10 * tail
        q.scatter_add_(1, top.indices, 10 * top.values * outside)
        q.scatter_add_(1, ids[rows], -p)
        q *= weights[rows, None]
        g = q.to(dtype)
        dh[rows] = (g @ w).float()
        dW += g.T @ x[rows]
    return dh, dW


def run_path(path, h, W, weights, tensors, chunk, dtype):
    """Run one path forward and backward. tensors: targets [N], the teacher's ids [N, k] and log-probs [N, k]."""
    if path == "chunked":
        head_loss(h, W, weights, ckd_loss, *tensors, chunk=chunk, dtype=dtype)[0].backward()
    elif path == "textbook":
        losses, _ = ckd_loss((h.to(dtype) @ W.to(dtype).T).float(), *tensors)
        (losses @ weights).backward()
    elif path == "closed form":
        closed_form(h.detach(), W.detach(), weights, *tensors[1:], chunk, dtype)
    else:  # three products
        g = torch.zeros(chunk, V, dtype=dtype)
        w = W.detach().to(dtype)
        x = h.detach().to(dtype)
        for rows in torch.arange(len(h)).split(chunk):
            x[rows] @ w.T, g[:len(rows)] @ w, g[:len(rows)].T @ x[rows]


def measure(path, positions, chunk, dtype, repeat):
    """Print seconds (median) and GB above the start for one path, as JSON."""
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    W = torch.randn(V, HIDDEN).mul_(0.02).requires_grad_()
    h = torch.randn(positions, HIDDEN, requires_grad=True)
    weights = torch.full((positions,), 1 / positions)
    log_p, ids = torch.randn(positions, V // 64).mul_(3).log_softmax(-1).topk(K)  # a teacher over 1/64 of the ids
    tensors = (ids[:, 0], ids, log_p)
    before = json.loads(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())]))
    seconds = []
    for _ in range(repeat):
        h.grad = W.grad = None
        start = time.perf_counter()
        run_path(path, h, W, weights, tensors, chunk, dtype)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": statistics.median(seconds), "gb": (peak - before) * 1024 / 1e9}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--positions", type=int, nargs="+", default=[512, 2048, 8192])
    add("--paths", nargs="+", default=["three products", "closed form", "chunked", "textbook"])
    add("--textbook-up-to", type=int, default=2048, help="more positions do not fit a small machine")
    add("--chunk", type=int, default=256)
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--repeat", type=int, default=3)
    add("--one", nargs=2, metavar=("PATH", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        path, positions = args.one
        return measure(path, int(positions), args.chunk, args.dtype, args.repeat)
    print(f"V = {V:,}, hidden {HIDDEN}, chunk {args.chunk}, {args.dtype}, {torch.get_num_threads()} threads\n")
    print(f"{'positions':>9}  {'path':<15} {'seconds':>8}  {'GB above':>8}")
    flags = ["--chunk", str(args.chunk), "--dtype", args.dtype, "--repeat", str(args.repeat)]
    for positions in args.positions:
        for path in args.paths:
            if path == "textbook" and positions > args.textbook_up_to:
                continue
            command = [sys.executable, __file__, "--one", path, str(positions), *flags]
            row = json.loads(subprocess.check_output(command))
            print(f"{positions:9,}  {path:<15} {row['seconds']:8.2f}  {row['gb']:8.2f}", flush=True)


if __name__ == "__main__":
    main()

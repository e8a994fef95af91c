"""Time and peak memory of the output-head loss, chunked against the textbook over all positions.

    python tests/bench_head.py                       V = 151,936, hidden 896, 512 / 2,048 / 8,192 positions

Each measurement is a process of its own, so that its peak resident memory is its own; "above" is that peak less what
the process held before the loss (the head, the hidden states, and the teacher's top-k). A row runs forward and
backward; the median of `--repeat` runs. Besides the CKD path the closed form of its gradient (docstring of ckd.py) is
timed, to say what the one generic path costs.
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
from ckd import objective  # noqa: E402
from train import head_loss  # noqa: E402

V, HIDDEN, K = 151_936, 896, 100


def closed_form(h, W, weights, ids, log_p, chunk, dtype):
    """CKD's gradient by formula, in place on one chunk of probabilities: no autograd graph over the vocabulary."""
    x, w = h.to(dtype), W.to(dtype)
    dh, dW = torch.zeros_like(h), torch.zeros_like(W)
    for rows in torch.arange(len(h)).split(chunk):
        z = (x[rows] @ w.T).float()  # [C, V]
        q = z.softmax(-1)
        p, top = log_p[rows].exp(), q.topk(100, dim=-1)
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


def measure(path, positions, chunk, dtype, repeat):
    """Print seconds (median) and GB above the start for one path, as JSON."""
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    W = torch.randn(V, HIDDEN).mul_(0.02).requires_grad_()
    h = torch.randn(positions, HIDDEN, requires_grad=True)
    weights = torch.full((positions,), 1 / positions)
    log_p, ids = torch.randn(positions, V // 64).mul_(3).log_softmax(-1).topk(K)  # a teacher over 1/64 of the ids
    targets = ids[:, 0]
    apply = objective("ckd", targets, (ids, log_p), tail_weight=10.0)
    before = json.loads(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())]))
    seconds = []
    for _ in range(repeat):
        h.grad = W.grad = None
        began = time.perf_counter()
        if path == "chunked":
            head_loss(h, W, weights, apply, chunk, dtype)[0].backward()
        elif path == "textbook":
            losses, _ = apply((h.to(dtype) @ W.to(dtype).T).float(), slice(None))
            (losses @ weights).backward()
        elif path == "closed form":
            closed_form(h.detach(), W.detach(), weights, ids, log_p, chunk, dtype)
        else:  # three products
            g, w, x = torch.zeros(chunk, V, dtype=dtype), W.detach().to(dtype), h.detach().to(dtype)
            for rows in torch.arange(positions).split(chunk):
                x[rows] @ w.T, g[:len(rows)] @ w, g[:len(rows)].T @ x[rows]
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": statistics.median(seconds), "gb": (peak - before) * 1024 / 1e9}))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--positions", type=int, nargs="+", default=[512, 2048, 8192])
    p.add_argument("--paths", nargs="+", default=["three products", "closed form", "chunked", "textbook"])
    p.add_argument("--textbook-up-to", type=int, default=2048, help="more positions do not fit a small machine")
    p.add_argument("--chunk", type=int, default=256)
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--one", nargs=2, metavar=("PATH", "N"), help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        return measure(a.one[0], int(a.one[1]), a.chunk, a.dtype, a.repeat)
    print(f"V = {V:,}, hidden {HIDDEN}, chunk {a.chunk}, {a.dtype}, {torch.get_num_threads()} threads\n")
    print(f"{'positions':>9}  {'path':<15} {'seconds':>8}  {'GB above':>8}")
    for n in a.positions:
        for path in a.paths:
            if path == "textbook" and n > a.textbook_up_to:
                continue
            out = subprocess.check_output([sys.executable, __file__, "--one", path, str(n), "--chunk", str(a.chunk),
                                           "--dtype", a.dtype, "--repeat", str(a.repeat)])
            row = json.loads(out)
            print(f"{n:9,}  {path:<15} {row['seconds']:8.2f}  {row['gb']:8.2f}", flush=True)


if __name__ == "__main__":
    main()

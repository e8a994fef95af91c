"""Constrained knowledge distillation (CKD, paper section 3.1; paper.md 1.2): the objectives, the teacher, the loop.

At a position, p is the teacher's distribution, q the student's, V_k the teacher's k likeliest tokens, V_m the
student's own m likeliest. The student minimises

    L_CKD = sum_{v in V_k} p_v log(p_v / q_v)  +  lambda * sum_{v in V_m, not in V_k} q_v            Eqs. 3-5

a forward KL on what the teacher finds likely, plus a penalty on what the student believes in and the teacher does not.
Both are softmaxes over the whole vocabulary at temperature 1, and neither is renormalised over V_k, so the first sum
is a partial one and can be negative. With P = sum_{V_k} p and S' = the sum that lambda multiplies, the gradient to the
student's logits is

    dL/dz_j = q_j (P - lambda S') - p_j [j in V_k] + lambda q_j [j in V_m, not in V_k]               Eqs. 14, 26, 27

Departures from the released code:
1. A plain offline loop. The released run goes through the PPO trainer and samples rollouts that its loss ignores.
2. The loss is the mean over all counted tokens of the optimiser batch (see train.py).
3. rskd is computed on the drawn tokens, not on a dense target; as released, it has no tail penalty.
4. Teacher log-probs can come from a cache on disk, so that the teacher need not sit in training memory.
"""
import hashlib
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import WHOLE_FOLDER, InputError, read_json
from data.cache import cache_rows, fingerprint, number_rows, open_cache, write_cache
from data.chat import read_tokenizer
from data.groups import counted_tokens, length, micro_batches, optimiser_batches, pack
from data.show import summary
from train import (OPTIMISERS, Interrupt, head_loss, learning_rate, load_checkpoint, log_metrics, optimiser_step,
                   peak_memory, save_checkpoint, states, sum_over_ranks)


# ---------------------------------------------------------------------------------------------------------------------
# The objectives. log_p and log_q are the teacher's and the student's log-probs on V_k, [N, k]; each returns [N].

def fkl(log_p, log_q):
    """Forward KL on V_k: sum p log(p/q), Eq. 4. Its minimiser is q = p/P on V_k."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def rkl(log_p, log_q):
    """Reverse KL on V_k: sum q log(q/p). Its minimiser is q = p/e on V_k: 1 - P/e of the mass leaks outside."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def akl(log_p, log_q):
    """Adaptive KL: forward and reverse, weighted by the gap |p - q| on the head and on the tail of V_k.

    The head is the leading tokens whose summed teacher mass stays under 0.5, and always the first. The weights are not
    detached, as released: gradient flows through them too. log_p must be sorted, likeliest first.
    """
    p, q = log_p.exp(), log_q.exp()
    head = p.cumsum(-1) < 0.5  # [N, k]
    head[:, 0] = True
    gap = (p - q).abs()
    g_head, g_tail = (gap * head).sum(-1), (gap * ~head).sum(-1)
    return (g_head * fkl(log_p, log_q) + g_tail * rkl(log_p, log_q)) / (g_head + g_tail).clamp(min=1e-9)


def rskd(log_p, log_q):
    """Random-sample KD: V_k holds k draws from the teacher, log_p the log of how often each was drawn, over k."""
    return (log_p - log_q).mean(-1)


def tail_mass(mine, log_q, ids):
    """S', Eq. 5: student mass on its own likeliest tokens that are not among the teacher's.

    mine [N, m] those tokens · log_q [N, m] their log-probs · ids [N, k] the teacher's. Returns [N].
    """
    outside = ~(mine[:, :, None] == ids[:, None, :]).any(-1)  # [N, m]
    return (log_q.exp() * outside).sum(-1)


# Cross-entropy (ce) only reports its KL to the teacher, so that its curves can be laid over the others'.
DIVERGENCES = {"ckd": fkl, "fkl": fkl, "rkl": rkl, "akl": akl, "rskd": rskd, "ce": fkl}


def objective(kind, targets, teacher=None, tail_weight=0.0, m=100, kd_ratio=1.0):
    """The function (logits [C, V], rows) -> (losses [C], {name: [C]}) that `head_loss` applies.

    kind: a key of DIVERGENCES · targets [N] the tokens that came · teacher (ids [N, k], log_p [N, k]) or None, which
    leaves only ce · tail_weight: lambda · m: size of V_m · kd_ratio: this share of distillation, the rest
    cross-entropy. Names: nll, entropy; with a teacher also kl (the kind's divergence), tail (S'), captured (P), inside
    (student mass on V_k).
    """
    def apply(logits, rows):
        log_q = logits.log_softmax(-1)  # [C, V]
        with torch.no_grad():
            entropy = -torch.linalg.vecdot(log_q.exp(), log_q)  # [C]
        if teacher is None:
            nll = -log_q.gather(-1, targets[rows, None]).squeeze(-1)  # [C]
            return nll, {"nll": nll, "entropy": entropy}
        ids, log_p = teacher[0][rows], teacher[1][rows].to(logits.dtype)  # [C, k] each
        mine = log_q.detach().topk(m, dim=-1).indices  # [C, m]
        # One gather for all that the loss looks at: its backward is one pass over the vocabulary, not three.
        needed = torch.cat((targets[rows, None], ids, mine), dim=-1)  # [C, 1 + k + m]
        on_target, on_teacher, on_mine = log_q.gather(-1, needed).split((1, ids.shape[1], m), dim=-1)
        nll, kl = -on_target.squeeze(-1), DIVERGENCES[kind](log_p, on_teacher)  # [C] each; Eq. 4 for ckd
        tail = tail_mass(mine, on_mine, ids)  # [C], S', Eq. 5
        if kind == "rskd":  # a token drawn c times stands c times among the ids: count it once
            captured, inside = torch.ones_like(kl), (on_teacher - log_p).exp().mean(-1)
        else:
            captured, inside = log_p.exp().sum(-1), on_teacher.exp().sum(-1)
        stats = {"nll": nll, "entropy": entropy, "kl": kl, "tail": tail, "captured": captured, "inside": inside}
        distillation = kl + tail_weight * tail  # Eq. 3; tail_weight is lambda
        share = 0.0 if kind == "ce" else kd_ratio
        return share * distillation + (1 - share) * nll, stats

    return apply


# ---------------------------------------------------------------------------------------------------------------------
# The teacher, live or from disk (data/cache.py)

@torch.no_grad()
def teacher_log_probs(teacher, batch, k, width, draws=None, chunk=256):
    """The teacher's view of a packed batch's counted positions: (ids [N, k] int64, log_p [N, k] float32).

    Its k likeliest tokens of the first `width`, likeliest first, log-probs under the whole softmax. With `draws` (a
    torch.Generator): k tokens drawn from it with replacement, and the log of each one's share of the draws (rskd).
    """
    h, ids, log_p = states(teacher, batch, torch.float32), [], []  # [N, hidden]; as its weights are: no autocast
    for rows in h.split(chunk):
        scores = (rows @ teacher.head_weight[:width].T).float().log_softmax(-1)  # [C, width]
        if draws is None:
            values, tokens = scores.topk(k, dim=-1)
        else:
            tokens = torch.multinomial(scores.exp(), k, replacement=True, generator=draws)
            values = (tokens[:, :, None] == tokens[:, None, :]).float().mean(-1).log()
        ids.append(tokens)
        log_p.append(values)
    return torch.cat(ids), torch.cat(log_p)


def check_pair(teacher_folder, student_folder):
    """Refuse a teacher and a student with different tokenizers: CKD compares their probabilities id by id.

    Returns (width, made_from): the number of ids of both, cut to the tokenizer where their embeddings are padded
    differently; and what identifies teacher and tokenizer to a cache.
    """
    decisive, widths = [], []
    for folder in (teacher_folder, student_folder):
        tokenizer = read_tokenizer(folder)
        vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        decisive.append([vocabulary, json.loads(tokenizer.to_str())["model"].get("merges")])
        widths.append(read_json(Path(folder) / "config.json", WHOLE_FOLDER).get("vocab_size"))
    if decisive[0] != decisive[1]:
        raise InputError(f"{teacher_folder} ({len(decisive[0][0]):,} tokens) and {student_folder} "
                         f"({len(decisive[1][0]):,}) have different tokenizers; CKD needs two models that share one")
    tokenizer = hashlib.sha256(json.dumps(decisive[0]).encode()).hexdigest()[:16]
    return (widths[0] if widths[0] == widths[1] else decisive[0][0][-1][1] + 1,
            {"teacher": fingerprint(teacher_folder), "tokenizer": tokenizer})


def open_teacher(load, groups, kind="ckd", k=100, width=None, device="cpu", micro_tokens=4096, seed=42, cache=None,
                 made_from=None, ranks=1):
    """The teacher as a function (micro-batch, packed, *when) -> (ids [N, k], log_p [N, k]).

    load: loads the teacher · groups: everything it will be asked about · cache, made_from: folder of teacher
    log-probs, and what identifies teacher and tokenizer (`check_pair`) · when: numbers (step, micro-batch) that seed
    the draws of rskd, so that they do not depend on what was drawn before. A cache of something else is an InputError
    at once; loading the teacher, or writing the cache with it, waits for the first call.
    """
    teacher, stored, k = None, None, clamped("k", k, width)

    def draws(*when):
        if kind != "rskd":
            return None
        digest = hashlib.sha256(repr((seed, *when)).encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:7]))

    if cache is not None:
        what = f"draws with seed {seed}" if kind == "rskd" else "top-k"
        made_from = made_from | number_rows(groups) | {"view": what, "width": width, "k": k}
        stored = open_cache(cache, made_from)
        if stored is None and ranks > 1:
            raise InputError(f"{cache}: no cache there yet; write it with one process first (without torchrun)")

    def view(micro, packed, *when):
        nonlocal teacher, stored
        if cache is None:
            teacher = teacher or load()
            return teacher_log_probs(teacher, packed, k, width, draws(*when))
        if stored is None:
            write_cache(cache, groups, made_from, partial(teacher_log_probs, load(), k=k, width=width, draws=draws()),
                        k, device, micro_tokens)
            stored = open_cache(cache, made_from)
        ids, log_p = (part[cache_rows(micro)] for part in stored)  # [N, k] each
        return torch.from_numpy(ids.astype(np.int64)).to(device), torch.from_numpy(log_p.astype(np.float32)).to(device)

    return view


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def distill(student, groups, valid, out, teacher=None, kind="ckd", m=100, tail_weight=10.0, kd_ratio=1.0, lr=3e-6,
            weight_decay=1e-4, batch=128, epochs=1, steps=None, width=None, micro_tokens=4096, dtype=torch.bfloat16,
            valid_every=100, save_every=100, start=0, seed=42, rank=0, ranks=1, optimiser="adamw"):
    """Train `student` (float32 weights, changed in place) on groups; settings default to the released script's.

    teacher: from `open_teacher`, or None for plain cross-entropy · steps: optimiser steps, default `epochs` passes ·
    width: cut the vocabulary to this many ids, default the whole · micro_tokens: padded tokens that go through the
    model at a time · start: the step to resume after · optimiser: a key of train.OPTIMISERS. Writes metrics.jsonl and
    checkpoints under `out`. Returns the summary, a dict; None where Ctrl-C ended the run early.
    """
    device = student.head_weight.device
    width = width or student.config["vocab_size"]
    m = clamped("m", m, width)
    tail_weight = 0.0 if kind == "rskd" else tail_weight  # as released

    # What is logged: the same names on every rank, also on one that has no micro-batch.
    names = ("nll", "entropy") + (("kl", "tail", "captured", "inside") if teacher else ())

    def losses(micro, kind, total, *when):
        """The loss of one micro-batch, a share of `total` tokens, and its statistics summed over positions."""
        packed = pack(micro, device)
        seen = teacher(micro, packed, *when) if teacher else None
        h = states(student, packed, dtype)  # [N, hidden]
        # One token count for the whole optimiser batch: any split into micro-batches or ranks gives the same gradient.
        weights = torch.full((len(h),), 1 / total, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return head_loss(h, student.head_weight[:width], weights,
                         objective(kind, packed["targets"], seen, tail_weight, m, kd_ratio), dtype=dtype)

    @torch.no_grad()
    def validate():
        """Means over the held-out tokens. KL is the forward one whatever is trained, so that curves compare."""
        sums, total = dict.fromkeys(names, 0.0), counted_tokens(valid)
        for micro in tqdm(micro_batches(valid, micro_tokens)[rank::ranks], "validation", leave=False, disable=rank > 0):
            for name, value in losses(micro, "rskd" if kind == "rskd" else "fkl", total)[1].items():
                sums[name] += value / total
        return {f"valid_{name}": value for name, value in sum_over_ranks(sums, device).items()}

    plan, epoch = [], 0
    while (epoch < epochs) if steps is None else (len(plan) < steps):
        plan += optimiser_batches(groups, batch, seed, epoch)
        epoch += 1
    plan = plan[:steps]
    optimisers = OPTIMISERS[optimiser](student, lr, weight_decay)
    if start:
        load_checkpoint(out, start, student, optimisers)
    elif valid:
        report(out, {"step": 0} | validate(), rank)
    bar = tqdm(total=len(plan), initial=start, desc=kind, unit="step", disable=rank > 0)
    with bar, Interrupt() as interrupt:
        for step, members in enumerate(plan[start:], start + 1):
            began, total, sums = time.perf_counter(), counted_tokens(members), dict.fromkeys(("loss", *names), 0.0)
            for i, micro in list(enumerate(micro_batches(members, micro_tokens)))[rank::ranks]:
                loss, stats = losses(micro, kind, total, step, i)
                loss.backward()
                for name, value in ({"loss": loss.detach() * total} | stats).items():
                    sums[name] += value / total
            rate = learning_rate(step, len(plan), lr)
            norm = optimiser_step(student, optimisers, rate)
            row = {"step": step} | sum_over_ranks(sums | {"interrupted": interrupt.asked}, device)
            interrupted = row.pop("interrupted") > 0  # on any rank: all stop at the same step
            row |= {"lr": rate, "grad_norm": norm, "tokens": total, "packed_tokens": sum(map(length, members)),
                    "sequences": sum(len(g["responses"]) for g in members), "seconds": time.perf_counter() - began}
            row["tokens_per_s"] = row["packed_tokens"] / row["seconds"]  # prompt and response, through the student
            if valid and (step % valid_every == 0 or step == len(plan)):
                row |= validate()
            report(out, row, rank)
            bar.set_postfix_str(" ".join(f"{name} {row[name]:.3g}" for name in
                                         ("loss", "kl", "tail", "nll", "tokens_per_s") if name in row))
            bar.update()
            if rank == 0 and (step % save_every == 0 or step == len(plan) or interrupted):
                save_checkpoint(out, step, student, optimisers)
            if interrupted and step < len(plan):
                return None
    return summary(out, peak_memory(device)) if rank == 0 else {}


def clamped(name, wanted, width):
    """k or m, no larger than the vocabulary, with a notice."""
    if wanted > width:
        print(f"--{name} {wanted} is more than the vocabulary: taking all {width} ids")
    return min(wanted, width)


def report(out, row, rank):
    """Log a step, and print its validation figures."""
    if rank > 0:
        return
    log_metrics(out, row)
    shown = [f"{name.removeprefix('valid_')} {value:.4f}" for name, value in row.items() if name.startswith("valid_")]
    if shown:
        tqdm.write(f"step {row['step']:5d}, held out:  " + "  ".join(shown))

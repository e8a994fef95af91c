"""Constrained knowledge distillation (CKD, paper section 3.1): the losses and the loop.

At a position, p is the teacher's distribution and q the student's: softmaxes at temperature 1 over all ids that both
have. V_k holds the teacher's k most likely tokens, V_m the student's own m most likely tokens. The student minimises

    L_CKD = sum_{v in V_k} p_v log(p_v / q_v)  +  lambda * sum_{v in V_m, not in V_k} q_v            Eqs. 3-5

a forward KL on the teacher's top-k, plus a penalty on the student's mass on its own top-m tokens outside the teacher's
top-k. Neither p nor q is renormalised over V_k, so the first sum is partial and can be negative. With
P = sum_{V_k} p and S' = the second sum, the gradient with respect to the student's logits, for V_m held fixed, is

    dL/dz_j = q_j (P - lambda S') - p_j [j in V_k] + lambda q_j [j in V_m, not in V_k]               Eqs. 14, 26, 27

Shapes: N "counted" positions of a micro-batch, those whose next token is in the loss; C of them pass through the output
head at a time; H hidden size, V ids in the vocabulary, k and m as above.

Departures from the released code:
1. A plain offline loop. The released run goes through the PPO trainer and samples rollouts that its loss ignores.
2. The loss is the mean over all counted tokens of the optimiser batch, however that is split (released: a mean of
   micro-batch means, in which a token weighs more if its micro-batch has few tokens).
3. Random-sample KD (rskd) sums over the drawn ids only (released: over all V ids).
4. Teacher log-probs can be read from a cache on disk, so that the teacher need not be in memory while training.
"""
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import train
from data import checkpoints, non_negative, natural, number, positive, runs, write_json
from data.cache import cache_key
from data.chat import Chat, add_prompt_flags, check_pair
from data.groups import counted_tokens, micro_batches, pack, plan_batches, read_groups
from data.records import add_data_flags, has_answer
from data.rollouts import score_response
from experience import answer_held_out
from head import counted_states, entropy, head_loss
from model import Transformer
from sampler import Request, generate
from teacher import clamp_to_vocab, load_teacher

# ---- The losses. A divergence takes log-probs on V_k, teacher [C, k] and student [C, k], and returns [C].
def forward_kl(teacher_log_p, student_log_p):
    """Forward KL on V_k, Eq. 4. Its minimiser is q = p/P on V_k."""
    p = teacher_log_p.exp()  # [C, k]
    return (p * (teacher_log_p - student_log_p)).sum(-1)


def reverse_kl(teacher_log_p, student_log_p):
    """Reverse KL on V_k. For k < V it is least at q = p/e on V_k (e = 2.718...), which leaves 1 - P/e to other ids."""
    q = student_log_p.exp()  # [C, k]
    return (q * (student_log_p - teacher_log_p)).sum(-1)


def adaptive_kl(teacher_log_p, student_log_p):
    """A weighted mean of forward and reverse KL, both on all of V_k. The weight of the forward KL is the sum of |p - q|
    over the top of V_k: its first token, and any whose cumulative p is still below 0.5. That of the reverse KL is
    the sum over the rest. teacher_log_p is in descending order. As released, the weights are not detached."""
    p = teacher_log_p.exp()  # [C, k]
    q = student_log_p.exp()  # [C, k]
    likely = p.cumsum(-1) < 0.5  # [C, k]
    likely[:, 0] = True
    gap = (p - q).abs()  # [C, k]
    forward = (gap * likely).sum(-1)  # [C]
    reverse = (gap * ~likely).sum(-1)  # [C]
    mixed = forward * forward_kl(teacher_log_p, student_log_p)  # [C]
    mixed = mixed + reverse * reverse_kl(teacher_log_p, student_log_p)
    return mixed / (forward + reverse).clamp(min=1e-9)


def sampled_kl(teacher_log_p, student_log_p):
    """Random-sample KD: instead of V_k there are k draws from the teacher; teacher_log_p is log(c / k) of a token that
    was drawn c times. It is listed c times, so the mean over draws sums (c / k) log((c / k) / q) over distinct ids."""
    return (teacher_log_p - student_log_p).mean(-1)


def tail_mass(student_topm, student_topm_log_p, teacher_ids):
    """S', Eq. 5, [C]: the student's mass on its own top-m tokens that are not in the teacher's top-k.

    student_topm: [C, m] ids
    student_topm_log_p: [C, m] the student's log-probs at those ids
    teacher_ids: [C, k]
    """
    ordered = teacher_ids.sort(-1).values  # [C, k]; a binary search: m log k steps, where all pairs would be m k
    place = torch.searchsorted(ordered, student_topm).clamp(max=ordered.shape[1] - 1)  # [C, m]
    outside = ordered.gather(-1, place) != student_topm  # [C, m]
    return (student_topm_log_p.exp() * outside).sum(-1)


DIVERGENCES = {
    "ckd": forward_kl, "fkl": forward_kl, "ce": forward_kl,
    "rkl": reverse_kl, "akl": adaptive_kl, "rskd": sampled_kl}


def ckd_loss(logits, target, teacher_ids, teacher_log_p, m, tail_weight,
             divergence=forward_kl, kd_ratio=1.0):
    """kd_ratio (divergence + lambda S') + (1 - kd_ratio) cross-entropy at each position. By default this is Eq. 3.

    logits: [C, V], the student's
    target: [C], the next token of the response
    teacher_ids: [C, k], V_k
    teacher_log_p: [C, k], the teacher's log-probs at those ids
    m: size of V_m
    tail_weight: lambda
    divergence: a value of DIVERGENCES
    kd_ratio: weight of distillation; cross-entropy on the target has 1 - kd_ratio

    Returns losses [C] and {name: [C]}: nll, entropy, kl (the divergence), tail (S'), captured (P, the teacher's mass
    on V_k; for rskd 1), inside (the student's mass on V_k).
    """
    log_q = logits.log_softmax(-1)  # [C, V]
    log_p = teacher_log_p.to(logits.dtype)  # [C, k]
    topm = log_q.detach().topk(m, dim=-1).indices  # [C, m], V_m
    # One gather for all three: the backward of each gather fills a [C, V] gradient.
    ids = torch.cat((target[:, None], teacher_ids, topm), dim=-1)  # [C, 1 + k + m]
    sizes = (1, teacher_ids.shape[1], m)
    on_target, on_topk, on_topm = log_q.gather(-1, ids).split(sizes, dim=-1)
    nll = -on_target.squeeze(-1)  # [C]
    kl = divergence(log_p, on_topk)  # [C], Eq. 4 for forward_kl
    tail = tail_mass(topm, on_topm, teacher_ids)  # [C], Eq. 5
    distillation = kl + tail_weight * tail  # [C], Eq. 3
    losses = kd_ratio * distillation + (1 - kd_ratio) * nll  # [C]
    captured = log_p.exp().sum(-1)  # [C]
    inside = on_topk.exp().sum(-1)  # [C]
    if divergence is sampled_kl:  # a token drawn c times is listed c times, as q k / c; their mean has q once
        captured = torch.ones_like(kl)  # [C]
        inside = (on_topk - log_p).exp().mean(-1)
    stats = {"nll": nll, "entropy": entropy(log_q), "kl": kl, "tail": tail}
    return losses, stats | {"captured": captured, "inside": inside}


def cross_entropy(logits, target):
    """Cross-entropy on the target; needs no teacher: [C, V], [C] -> losses [C], {nll, entropy: [C]}."""
    log_q = logits.log_softmax(-1)  # [C, V]
    nll = -log_q.gather(-1, target[:, None]).squeeze(-1)  # [C]
    return nll, {"nll": nll, "entropy": entropy(log_q)}


def objective_loss(args):
    """The loss function that `--objective` names, with the settings of its flags."""
    tail_weight = args.tail_weight
    if args.objective == "rskd":  # no penalty, as released
        tail_weight = 0.0
    elif tail_weight is None:
        tail_weight = 10.0 if args.objective == "ckd" else 0.0
    kd_ratio = 0.0 if args.objective == "ce" else args.kd_ratio  # ce only logs the forward KL, for comparison
    return partial(ckd_loss, m=args.m, tail_weight=tail_weight,
                   divergence=DIVERGENCES[args.objective], kd_ratio=kd_ratio)


# ---- The loop
def distill(student, teacher, groups, valid, args, start=0, answer_valid=None):
    """Train a student on groups, with the `--objective` loss if there is a teacher, otherwise with cross-entropy.

    student: a Transformer with float32 weights, changed in place
    teacher: a `Teacher`, or None
    groups, valid: lists of `Group`, to train and to validate on
    start: the step to resume after
    answer_valid: a function student -> {"valid_reward", "valid_exact"} of its own answers, or None

    Writes metrics.jsonl and checkpoints under --out. Returns the run's `train.Steps`: `stopped` after Ctrl-C.
    """
    loss = objective_loss(args) if teacher else cross_entropy
    batches = plan_batches(groups, args)
    optimisers = train.make_optimisers(student, args)
    if start:
        checkpoints.load_checkpoint(args.out, start, student, optimisers)
    elif valid:
        runs.log_step(args.out, {"step": 0} | validate(student, teacher, valid, args, answer_valid))
    steps = train.Steps(start, len(batches), args.command)
    for step in steps:
        batch = batches[step - 1]
        clock = time.perf_counter()
        # 1. The teacher's top-k, the student's loss and its gradients, one micro-batch at a time.
        row = forward_backward(student, teacher, batch, loss, args, step)

        # 2. Clip the gradients, update the weights, clear the gradients.
        rate = train.learning_rate(step, len(batches), args.lr)
        row |= train.update(student, optimisers, rate, args.out, step)
        row |= runs.describe_batch(batch, time.perf_counter() - clock)
        row |= runs.memory_in_use(student.head_weight.device)

        # 3. Validate.
        if valid and (step % args.valid_every == 0 or step == len(batches)):
            row |= validate(student, teacher, valid, args, answer_valid)
            checkpoints.check_finite(args.out, step, "the validation nll", row["valid_nll"])

        # 4. Log and save. After Ctrl-C on any rank, this step ends the loop.
        runs.log_step(args.out, {"step": step} | row)
        if steps.ends_at(step) or step % args.save_every == 0:
            checkpoints.save_checkpoint(args.out, step, student, optimisers, {"updates": step})
        steps.show(row, ("loss", "kl", "tail", "nll", "tokens_per_s"))
    return steps


def forward_backward(student, teacher, batch, loss, args, step=None):
    """Forward and backward passes over a batch: gradients accumulate in the student. Under no_grad, forward only.
    Returns means over the counted tokens, {name: float}.

    Each token is weighted by 1 / (counted tokens in the batch), so the gradient does not depend on how the batch is
    split into micro-batches or over ranks. step: seeds the draws of rskd; None, in validation, repeats them.
    """
    device = student.head_weight.device
    dtype = getattr(torch, args.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    sums = Counter()  # Counter.update adds
    total = counted_tokens(batch)
    vocab_size = teacher.vocab_size if teacher else None  # the ids that both models have
    parts = train.share_of_rank(micro_batches(batch, args.micro_batch_tokens))
    for micro, active in tqdm(parts, "micro-batches", delay=2, leave=False, disable=train.rank() > 0):
        packed = pack(micro, device)
        topk = teacher(packed, micro, step) if teacher else ()  # ids [N, k], log-probs [N, k]
        hidden = counted_states(student, packed, dtype)  # [N, H]
        weights = torch.full((len(hidden),), active / total, device=device, dtype=wide)
        tensors = (packed["targets"], *topk)  # in the order of `ckd_loss`
        part, stats = head_loss(hidden, student.head_weight, weights, loss, *tensors,
                                vocab_size=vocab_size, dtype=dtype)
        if part.requires_grad:
            part.backward()
        sums["loss"] += part.detach()
        sums.update({name: active * value / total for name, value in stats.items()})
    return train.sum_over_ranks(sums)


@torch.no_grad()
def validate(student, teacher, valid, args, answer_valid=None):
    """Means over the counted held-out tokens, as valid_NAME; with answer_valid, also what it returns.

    kl is the forward KL for every objective, so that their runs can be compared; for rskd, the KL of its draws.
    """
    loss = cross_entropy
    if teacher:
        divergence = sampled_kl if args.objective == "rskd" else forward_kl
        loss = partial(ckd_loss, m=args.m, tail_weight=0.0, divergence=divergence)
    means = forward_backward(student, teacher, valid, loss, args)
    del means["loss"]  # not the training objective
    row = {f"valid_{name}": value for name, value in means.items()}
    if answer_valid:
        row |= answer_valid(student.in_dtype(getattr(torch, args.dtype)))
    return row


# ---- The commands ckd and sft
def ckd_flags(parser):
    parser.add_argument("--teacher", required=True, help="model folder")
    parser.add_argument("--student", required=True, help="model folder")
    add = parser.add_argument_group("objective").add_argument
    add("--objective", choices=tuple(DIVERGENCES), default="ckd",
        help="ckd is fkl with the tail penalty; ce, cross-entropy, uses the teacher for logs only")
    add("--k", type=positive, default=100, help="size of the teacher's top-k (rskd: number of draws)")
    add("--m", type=positive, default=100, help="size of the student's top-m")
    add("--tail-weight", type=non_negative,
        help="lambda; default: 10 for ckd, 0 for the others; not used by rskd, ce")
    add("--kd-ratio", type=number(float, 0.0, 1.0), default=1.0,
        help="weight of distillation; cross-entropy has the rest; not used by ce")
    add("--cache", metavar="DIR",
        help="folder for the teacher's log-probs (rskd: draws): written once, then read")
    add_supervised_flags(parser, lr=3e-6, weight_decay=1e-4)


def sft_flags(parser):
    parser.add_argument("--model", required=True, help="model folder to start from")
    add_supervised_flags(parser, lr=1e-5, weight_decay=0.0)


def add_supervised_flags(parser, lr, weight_decay):
    """The flags of both commands."""
    add_data_flags(parser, "records or rollouts")
    add = parser.add_argument_group("training data").add_argument
    add("--hold-out", type=natural, default=32, metavar="N",
        help="records to hold out of --data, at most a quarter")
    add("--max-response-tokens", type=positive, default=512, metavar="N",
        help="skip longer responses")
    add("--mask", choices=("all", "think", "answer", "alter"), default="all",
        help="response tokens in the loss: all; think: up to </think>; answer: after it; "
        "alter: think and answer for alternate responses")
    add("--epochs", type=positive, default=1, help="passes over the data")
    add("--steps", type=positive, help="optimiser steps; overrides --epochs")
    add("--share-prefix", type=positive, default=1, metavar="N",
        help="pack up to N consecutive records with the same tools into one shared-prefix row")
    add("--samples", type=natural, default=3, metavar="N",
        help="held-out prompts to answer before and after training")
    valid_help = "records or rollouts to validate on; default: some of --data"
    add = train.add_valid_flags(parser, valid_help, every=100)
    add("--valid-answers", type=natural, default=0, metavar="N",
        help="at each validation, also answer N held-out prompts with gold answers: exact answers, reward")
    add_prompt_flags(parser)
    train.add_training_flags(parser, lr, weight_decay, save_every=100)


def run_ckd(args):
    """Distil a teacher into a student, on the responses of a rollout file or on gold answers."""
    return run_training(args, args.student, args.teacher)


def run_sft(args):
    """Fine-tune by cross-entropy on gold answers, or on the responses of a rollout file."""
    return run_training(args, args.model)


def run_training(args, student_folder, teacher_folder=None):
    """Check the inputs, load, train, save, print."""
    # 1. Before anything is written, read all inputs and refuse bad ones.
    device = train.pick_device(args)
    with train.fail_together():
        shard = train.sharding(args, device)
        chat = Chat.from_pretrained(student_folder, think=args.think, tools=args.tools)
        if teacher_folder:
            vocab_size = check_pair(teacher_folder, student_folder)
        groups, valid, notes = read_groups(args, chat)
        for line in notes:
            train.note(line)
        if teacher_folder:
            key = cache_key(args, groups + valid, vocab_size)
    start = train.open_run(args, [student_folder, teacher_folder], [args.data, args.valid])
    if start < 0:  # finished already
        return

    # 2. Load the models; write the teacher's cache if it is missing.
    teacher = None
    if teacher_folder:
        if args.objective != "rskd":  # more draws than ids are possible
            args.k = clamp_to_vocab("k", args.k, vocab_size)
        args.m = clamp_to_vocab("m", args.m, vocab_size)
        teacher = load_teacher(args, groups + valid, vocab_size, key, device, shard)
    student = Transformer.from_pretrained(student_folder, device=device, shard=shard)
    student.model.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        student.model.compile_layers()
    responses = sum(len(group.responses) for group in groups)
    what = f"{responses:,} responses in {len(groups):,} groups, {len(valid)} groups held out"
    num_steps = args.steps or len(plan_batches(groups, args))
    train.describe_run(args, student, what, start, num_steps, updates=num_steps)

    # 3. Train.
    answered = [group for group in valid if has_answer(group.record)][:args.valid_answers]
    if args.valid_answers and valid and not answered:
        train.note("--valid-answers has no effect: no held-out record has a gold answer")
    answer_valid = None
    if answered:
        score = partial(score_response, chat)
        answer_valid = partial(answer_held_out, chat, answered, score, args.max_response_tokens)
    steps = distill(student, teacher, groups, valid, args, start, answer_valid)
    if steps.stopped:
        return train.stopped_run(args)

    # 4. Write all results before anything is printed; the summary last: it marks the run as finished.
    samples = []
    if shown := valid[:args.samples]:
        samples = answer_before_and_after(student, student_folder, chat, shown, args)
    if train.rank() == 0:
        write_json(Path(args.out) / "samples.json", samples)
    runs.finish_run(args, student, partial(runs.show_answers, samples))
    return 130 if steps.stop_requested else 0  # Ctrl-C in the last step: `demo` goes no further


def answer_before_and_after(student, folder, chat, groups, args):
    """Greedy answers to a few prompts before and after training. All ranks must call it: the weights are gathered."""
    dtype = getattr(torch, args.dtype)
    after = greedy_texts(student.in_dtype(dtype), chat, groups)
    with train.fail_together():  # the folder may be gone by now
        untrained = Transformer.from_pretrained(folder, dtype, student.head_weight.device)
    before = greedy_texts(untrained, chat, groups)
    samples = []
    for group, old, new in zip(groups, before, after):
        record = group.record
        request = record["messages"][-1]["content"]
        gold = chat.answer(record) if has_answer(record) else None
        samples.append({"request": request, "gold": gold, "before": old, "after": new})
    return samples


def greedy_texts(model, chat, groups):
    """Greedy answers of at most 128 tokens to a few groups' prompts."""
    requests = [Request(group.prompt, n=1, seed=0, temperature=0.0, max_new_tokens=128) for group in groups]
    list(generate(model, requests, len(requests), chat))
    return [chat.decode(request.responses[0].ids) for request in requests]

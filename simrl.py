"""Sim-RL (paper section 3.2; paper.md 1.5, 1.6): GRPO with the similarity reward. First the formulas, then the loop.

A step samples a group of n responses o_1 ... o_n to each of its prompts, scores each with the reward R, keeps the
groups with a learning signal, and improves the policy pi in a few optimiser steps; pi_old is the policy that sampled.

    J = mean_i 1/|o_i| sum_t [ min(r A_i, clip(r, 1 - low, 1 + high) A_i) - beta KL(pi || pi_ref) ]            Eq. 11
    r = pi(o_it) / pi_old(o_it)        A_i = (R_i - mean(R)) / std(R)                                          Eq. 12

The reward is a function of a record and a text; the loop knows nothing of tool calls. The sampler is sampler.py.

Departures from the paper and from the released code:
1. One model samples and trains (see sampler.py). Log-probs are recomputed before the update, as released.
2. Ids beyond the tokenizer (padding rows of the embedding) are cut off, in the sampler and in the trainer.
3. A response that reached the length limit trains as it is (released: an end token is appended, and counts as an
   action of the policy, which never took it).
4. The loss is the token mean over the optimiser batch. `--loss-mean sequence` is the paper's Eq. 11; `micro-batch`
   is a mean of micro-batch means as released, in which the weight of a token depends on its neighbours.
5. The KL is the k2 estimate as a loss, and groups are filtered by their answer scores, both as released. That filter
   also drops groups of rewards -1 and 0; `--filter rewards` keeps them. Paper: a KL; drop means of 0 or 1.
6. The number of steps is fixed; dropped groups are replaced by later prompts, at most max_draws times a step's
   prompts. A step with too few groups makes fewer updates, so the learning rate ends higher. (Released: the run ends
   with the prompts, and what remains of a rollout batch is dropped.)
7. An optimiser batch is made of whole groups (released: of sequences of many prompts).
"""
import math
import statistics
from dataclasses import asdict
from functools import partial

import torch

import train
from data import non_negative, number, positive, runs
from data.chat import Chat, add_prompt_flags
from data.groups import Group, Response, counted_tokens, micro_batches
from data.groups import next_prompts, optimiser_batches, pack
from data.records import add_data_flags
from data.rollouts import read_prompts, score_response
from model import Transformer
from sampler import add_count_flags, sample_groups

# ---------------------------------------------------------------------------------------------------------------------
# The formulas

def advantages(rewards, kind="group_norm"):
    """Eq. 12: how much better than its group each response is. std is the unbiased estimate.

    kind: "group_norm", or "dr_grpo" for R - mean(R)

    >>> advantages([1.0, 0.0], "dr_grpo")
    [0.5, -0.5]
    >>> [round(A, 4) for A in advantages([1.0, 0.0, 0.0, 0.0])]
    [1.5, -0.5, -0.5, -0.5]
    """
    mean = statistics.mean(rewards)  # exact: equal rewards give 0
    scale = 1.0
    if kind == "group_norm":
        scale = statistics.stdev(rewards) + 1e-9
    return [(reward - mean) / scale for reward in rewards]


def has_signal(rewards, scores, rule="scores"):
    """Whether a group is trained on; scores are rewards with format failures at 0. Departure 5.

    >>> has_signal([-1, 0], [0, 0]), has_signal([-1, 0], [0, 0], "rewards")
    (False, True)
    """
    if rule == "none":
        return True
    if rule == "rewards":
        return max(rewards) > min(rewards)
    mean = statistics.mean(scores)
    return 0.01 + 1e-6 < mean < 0.99 - 1e-6 and max(scores) > min(scores)


def policy_loss(logits, target, advantage, old_log_p, ref_log_p=None,
                kl_weight=0.0, clip=(0.2, 0.2), temperature=1.0):
    """Minus the bracket of J at each position, Eq. 11.

    logits: [C, V]
    target: [C], the sampled token
    advantage: [C], the A of its response
    old_log_p: [C], its log-prob before the update
    ref_log_p: [C], its log-prob under pi_ref; None for no KL
    kl_weight: beta
    clip: (low, high)

    Returns losses [C] and {name: [C]}: policy, entropy, clipped; with ref_log_p also kl.
    """
    log_probs = (logits / temperature).log_softmax(-1)  # [C, V]
    with torch.no_grad():
        entropy = -torch.linalg.vecdot(log_probs.exp(), log_probs)  # [C]
    log_p = log_probs.gather(-1, target[:, None]).squeeze(-1)  # [C]
    ratio = (log_p - old_log_p).exp()  # [C], r
    unclipped = ratio * advantage  # [C]
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage  # [C]
    policy = -torch.minimum(unclipped, clipped)  # [C], Eq. 11
    stats = {"policy": policy, "entropy": entropy}
    stats["clipped"] = clipped < unclipped
    if ref_log_p is None:
        return policy, stats
    k2 = 0.5 * (log_p - ref_log_p) ** 2  # [C], estimates the KL
    kl = k2.clamp(max=10)  # as released (paper.md 1.6)
    return policy + kl_weight * kl, stats | {"kl": kl}


def token_weights(kind, response, batch, parts, dtype=torch.float32):
    """The factor of each token's loss [N], such that the sum over an optimiser batch is the mean that `kind` names.

    kind: "token", "sequence" or "micro-batch"
    response: [N], the number of the response of each token of a micro-batch
    batch: the groups of the optimiser batch
    parts: its number of micro-batches
    """
    if kind == "sequence":  # Eq. 11
        lengths = response.bincount()[response].to(dtype)  # [N]
        return 1 / (lengths * sum(len(group.responses) for group in batch))
    tokens = counted_tokens(batch)
    if kind == "micro-batch":  # departure 4
        tokens = len(response) * parts
    return torch.full_like(response, 1 / tokens, dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def refine(model, reference, prompts, chat, score, args, start=0):
    """Train a model by GRPO.

    model: a Transformer with float32 weights, changed in place
    reference: pi_ref in the precision of --dtype; None exactly if --kl-weight is 0
    prompts: a list of `Group` without responses
    chat: the model's Chat
    score: function (record, text) -> {"reward" in [-1, 1], -1 for a format failure; "answer_score" in [0, 1]; and
        anything else worth a place in samples.jsonl}
    args: the parsed flags of `simrl`
    start: the step to resume after

    Writes metrics.jsonl, samples.jsonl (a line per group) and checkpoints under --out. Returns False if Ctrl-C
    stopped the run. The p-th prompt of a run and the randomness of its samples depend on (seed, p) alone.
    """
    if (args.kl_weight > 0) != (reference is not None):
        raise ValueError("pass a reference exactly if kl_weight > 0")
    device = model.head_weight.device
    dtype = getattr(torch, args.dtype)
    steps, updates = plan_steps(len(prompts), args)
    most = args.max_draws * args.prompts_per_step  # prompts of a step
    optimisers = train.make_optimisers("adamw", model, args)
    progress = {"prompts": 0, "updates": 0}
    if start:
        progress = runs.load_checkpoint(args.out, start, model, optimisers)
    own = slice(train.rank(), None, train.world_size())  # of a list, this rank's
    run = train.Steps(start, steps, "sim-rl")
    for step in run:
        seconds = {"seconds_sampling": 0.0, "seconds_scoring": 0.0, "seconds_training": 0.0}
        groups = []
        kept = []
        policy = model.in_dtype(dtype)
        while len(kept) < args.prompts_per_step and len(groups) < most:
            # 1. Sample n responses to each prompt from the policy as it is now, pi_old.
            first = progress["prompts"]
            batch = next_prompts(prompts, args.seed, first, args.prompts_per_step)
            seed = args.seed * 1_000_003 + first  # of the first prompt
            seeds = range(seed, seed + len(batch))
            with train.timed(seconds, "seconds_sampling"):
                sample_groups(policy, batch[own], seeds[own], chat, args)

            # 2. Score them, and keep the groups with a signal. Sample more prompts until the step is full.
            with train.timed(seconds, "seconds_scoring"):
                score_responses(batch[own], score, chat, args.advantage)
                share_responses(batch, own, device)
            groups += batch
            kept = [g for g in groups if has_signal(g.rewards, g.answer_scores, args.filter)]
            progress["prompts"] += len(batch)
        del policy  # before the training, which needs the memory
        row = runs.describe_responses(groups) | {"signal": len(kept) / len(groups)}
        kept = kept[:args.prompts_per_step]
        row |= {"groups_kept": len(kept), "tokens": counted_tokens(kept)}

        with train.timed(seconds, "seconds_training"):
            # 3. Freeze the log-probs of pi_old and pi_ref, for all updates of this step.
            batches = freeze(model, reference, kept, chat.vocab_size, args, step)

            # 4. Update: one optimiser step per batch.
            losses = []  # sums over the tokens of each batch
            for batch in batches:
                losses.append(accumulate_gradients(model, batch, chat.vocab_size, args))
                norm = train.clip_gradients(model)
                runs.check_finite(args.out, step, "the gradient norm", norm)
                progress["updates"] += 1
                rate = train.learning_rate(progress["updates"], updates, args.lr)
                train.optimiser_step(optimisers, rate)
                row |= {"lr": rate, "grad_norm": norm}
            row |= mean_losses(losses, counted_tokens(kept), device)

        # 5. Log, save, stop.
        row |= {"updates": progress["updates"]} | seconds
        ends = run.ends_at(step, device)
        if train.rank() == 0:
            samples = runs.describe_groups(step, groups, kept, chat)
            runs.log_metrics(args.out, *samples, name="samples.jsonl")
            runs.log_metrics(args.out, {"step": step} | row)
            if ends or step % args.save_every == 0:
                runs.save_checkpoint(args.out, step, model, optimisers, progress)
        run.show(row, ("reward", "finished", "signal", "entropy", "kl", "clipped"))
    return not run.stopped


def plan_steps(prompts, args):
    """(steps, optimiser steps) of the whole run, if every step is full."""
    steps = args.steps or max(1, prompts * args.episodes // args.prompts_per_step)
    groups_per_batch = math.ceil(args.batch_size / args.n)
    return steps, steps * math.ceil(args.prompts_per_step / groups_per_batch)


def score_responses(groups, score, chat, advantage_kind):
    """Give every response its text, reward and advantage."""
    for group in groups:
        for response in group.responses:
            response.text = chat.decode(response.ids)
            details = dict(score(group.record, response.text))
            response.reward = details.pop("reward")
            response.answer_score = details.pop("answer_score")
            response.details = details
        values = advantages(group.rewards, advantage_kind)
        for response, advantage in zip(group.responses, values):
            response.advantage = advantage


def share_responses(groups, own, device):
    """Give every rank the responses that the others sampled."""
    if train.world_size() == 1:
        return
    rows = []
    for i in range(len(groups))[own]:
        rows += [[i, asdict(response)] for response in groups[i].responses]
        groups[i].responses = []
    for i, fields in train.gather_over_ranks(rows, device):
        groups[i].responses.append(Response(**fields))


@torch.no_grad()
def freeze(model, reference, groups, vocab_size, args, step):
    """Pack the optimiser batches of a step: a list of this rank's micro-batches for each.

    Adds to each packed dict what no update changes, [N] each: advantage, sampler_log_p, old_log_p, ref_log_p (None
    without a reference), token_weights.
    """
    device = model.head_weight.device
    dtype = getattr(torch, args.dtype)
    high = torch.promote_types(dtype, torch.float32)
    frozen = []
    for batch in optimiser_batches(groups, args.batch_size, args.seed, step):
        parts = micro_batches(batch, args.micro_batch_tokens)
        frozen.append([])
        for micro in parts[train.rank()::train.world_size()]:
            packed = pack(micro, device)
            responses = [r for group in micro for r in group.responses]
            advantage = [r.advantage for r in responses]
            advantage = torch.tensor(advantage, dtype=high, device=device)
            packed["advantage"] = advantage[packed["response"]]
            log_probs = [value for r in responses for value in r.log_probs]
            packed["sampler_log_p"] = torch.tensor(log_probs, device=device)
            packed["old_log_p"] = log_probs_of(model, packed, vocab_size, args)
            packed["ref_log_p"] = log_probs_of(reference, packed, vocab_size, args)
            packed["token_weights"] = token_weights(
                args.loss_mean, packed["response"], batch, len(parts), high)
            frozen[-1].append(packed)
    return frozen


def log_probs_of(policy, packed, vocab_size, args):
    """Log-probs [N] of a packed batch's targets, the numbers that the loss sees; None without a policy."""
    if policy is None:
        return None
    dtype = getattr(torch, args.dtype)
    hidden = train.hidden_states(policy, packed, dtype)  # [N, H]
    head = policy.head_weight[:vocab_size]  # [V, H]
    return train.token_log_probs(
        hidden, head, packed["targets"], args.temperature, dtype=dtype)


def accumulate_gradients(model, batch, vocab_size, args):
    """Add the gradients of an optimiser batch. Returns its loss and {name: sum over its tokens}, of this rank.

    mismatch: |log-prob of the trainer - log-prob of the sampler|
    """
    dtype = getattr(torch, args.dtype)
    loss = partial(policy_loss, kl_weight=args.kl_weight, clip=args.clip,
                   temperature=args.temperature)
    names = ["loss", "policy", "entropy", "clipped", "mismatch"]
    if args.kl_weight > 0:
        names.append("kl")
    sums = dict.fromkeys(names, 0.0)  # the same on a rank without a micro-batch
    for packed in batch:
        hidden = train.hidden_states(model, packed, dtype)  # [N, H]
        head = model.head_weight[:vocab_size]  # [V, H]
        value, stats = train.head_loss(
            hidden, head, packed["token_weights"], loss, packed["targets"],
            packed["advantage"], packed["old_log_p"], packed["ref_log_p"], dtype=dtype)
        value.backward()
        stats["loss"] = value.detach()
        mismatch = packed["old_log_p"] - packed["sampler_log_p"]  # [N]
        stats["mismatch"] = mismatch.abs().sum()
        for name, part in stats.items():
            sums[name] += part
    return sums


def mean_losses(batches, tokens, device):
    """The mean loss of a step's batches, and the means over its tokens, of all ranks."""
    if not batches:
        return {}
    means = dict.fromkeys(batches[0], 0.0)
    for sums in batches:
        for name, value in sums.items():
            means[name] += value / (len(batches) if name == "loss" else tokens)
    return train.sum_over_ranks(means, device)


# ---------------------------------------------------------------------------------------------------------------------
# The command simrl

def simrl_flags(parser):
    parser.add_argument("--model", required=True, help="model folder to start from; also pi_ref")
    add_data_flags(parser, "records with gold answers")
    add_prompt_flags(parser)
    add_count_flags(parser, 8, least=2)
    add = parser.add_argument_group("steps").add_argument
    add("--prompts-per-step", type=positive, default=128, help="groups per step")
    add("--temperature", type=number(float, 1e-6), default=1.0,
        help="of the sampler and of the loss")
    add("--episodes", type=positive, default=3,
        help="passes over the prompts, if no group is dropped")
    add("--steps", type=positive, help="rollout batches; overrides --episodes")
    add = parser.add_argument_group("reward and filter").add_argument
    add("--reward", choices=("similarity", "binary"), default="similarity",
        help="binary: all or nothing")
    add("--strip-eos", action="store_true",
        help="remove the end token from text replies before scoring")
    add("--filter", choices=("scores", "rewards", "none"), default="scores",
        help="train on groups whose answer scores differ, with a mean in 0.01-0.99; "
        "whose rewards differ; all")
    add("--max-draws", type=positive, default=4,
        help="to fill a step, sample at most N x prompts-per-step prompts")
    add = parser.add_argument_group("loss").add_argument
    add("--advantage", choices=("group_norm", "dr_grpo"), default="group_norm",
        help="R - mean over the standard deviation, or R - mean")
    add("--kl-weight", type=non_negative, default=1e-3,
        help="of the KL to pi_ref; 0: no reference model")
    add("--clip", type=non_negative, nargs=2, default=[0.2, 0.2],
        metavar=("LOW", "HIGH"), help="of the ratio")
    add("--loss-mean", choices=("token", "micro-batch", "sequence"), default="token",
        help="over the tokens of a batch; of micro-batch means, as released; "
        "as in the paper")
    train.add_training_flags(parser, lr=3e-7, weight_decay=0.0, save_every=10)


def run_simrl(args):
    """Refine a model by GRPO on its own samples, scored by how similar their calls are to the gold calls."""
    # 1. Before anything is written, read all inputs and refuse bad ones.
    device = train.pick_device(args.device)
    chat = Chat.from_pretrained(args.model, think=args.think, tools=args.tools)
    prompts = []
    records, encoded = read_prompts(args.data, chat, args.max_prompt_tokens, args.limit)
    for record, ids in zip(records, encoded):
        if ids is not None:
            prompts.append(Group(record, ids, []))
    start = train.open_run(args, device, [args.model], [args.data])

    # 2. Load the policy and the reference.
    model = Transformer.from_pretrained(args.model, device=device)
    model.model.gradient_checkpointing = args.gradient_checkpointing
    reference = None
    if args.kl_weight:
        dtype = getattr(torch, args.dtype)
        reference = Transformer.from_pretrained(args.model, dtype, device)
    resumed = f"; resuming after step {start}" if start else ""
    train.note(
        f"{len(prompts):,} prompts, {args.prompts_per_step} x {args.n} responses "
        f"a step; {model.num_parameters() / 1e6:,.1f} M parameters{resumed}")

    # 3. Train.
    score = partial(training_reward, chat, args)
    if not refine(model, reference, prompts, chat, score, args, start):
        return train.stopped_run(args)
    if train.rank() > 0:
        return 0

    # 4. Write all results before anything is printed.
    summary = runs.summarise_refinement(args.out) | train.peak_memory(device)
    runs.finish_run(args, model, summary)
    runs.show_refinement(args.out, summary)
    return 0


def training_reward(chat, args, record, text):
    """The reward of Sim-RL: {"reward", "answer_score", "case", "exact"} of a response to a record."""
    binary = args.reward == "binary"
    return score_response(chat, record, text, strip_eos=args.strip_eos, binary=binary)

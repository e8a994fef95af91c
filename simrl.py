"""Sim-RL (paper section 3.2): GRPO with the similarity reward. First the formulas, then the loop.

A step samples a group of n responses o_1 ... o_n to each of its prompts, scores each with the reward R, keeps the
groups with a learning signal, and improves the policy pi in a few updates; pi_old is the policy that sampled.

    J = mean_i 1/|o_i| sum_t [ min(r A_i, clip(r, 1 - low, 1 + high) A_i) - beta KL(pi || pi_ref) ]            Eq. 11
    r = pi(o_it) / pi_old(o_it)        A_i = (R_i - mean(R)) / std(R)                                          Eq. 12

The reward is a function of a record and a text; the loop knows nothing of tool calls. experience.py draws the groups.

Shapes: N tokens of a micro-batch that the loss counts, C in a chunk, V ids of the tokenizer, H hidden size.

Where the paper, the released code and this file differ (sampler.py and data/groups.py have such lists, too):
1. pi_old: the trainer's own log-probs, as released, not the sampler's (`mismatch` logs the difference: rounding only).
   Here the first batch of a step needs no extra pass: pi is still pi_old, so the loss uses its own log-probs, detached.
2. Mean of the loss: paper, per response first (`--loss-mean sequence`); released, of micro-batch means (`micro-batch`),
   so a token of a small micro-batch weighs more; here, over all tokens of the optimiser batch (`token`).
3. KL: the paper names no estimate of it; released and here, k2, limited to 10, as a loss term.
4. Filter: the answer score of a response is its reward, but 0 for a format failure. The paper drops groups whose mean
   score is 0 or 1. Released and here, a group is kept if its answer scores differ and their mean is between 0.01 and
   0.99; so groups of only -1 and 0 rewards are dropped (`--filter rewards` keeps them).
5. Steps: the released run samples whole batches, and ends when the prompts run out. Here the number of steps is fixed,
   and a step samples prompts until --prompts-per-step groups pass the filter, or until it has sampled --max-draws
   times as many prompts; in that case it makes fewer updates.
"""
import math
import statistics
from collections import Counter
from functools import partial

import torch

import train
from data import checkpoints, non_negative, number, positive, runs
from data.chat import Chat, add_prompt_flags
from data.groups import counted_tokens, micro_batches, optimiser_batches, pack
from data.records import add_data_flags
from data.rollouts import prompt_groups, score_response
from experience import make_sampler, sample_step, score_answers
from head import counted_states, entropy, head_loss, logits_in_chunks
from model import Transformer
from sampler import add_count_flags

# ---- The formulas
def advantages(rewards, kind="group_norm"):
    """Eq. 12: how much better than its group each response is. std is the sample standard deviation (n - 1).

    kind: "group_norm", or "dr_grpo" for R - mean(R)

    >>> advantages([1.0, 0.0], "dr_grpo")
    [0.5, -0.5]
    >>> [round(A, 4) for A in advantages([1.0, 0.0, 0.0, 0.0])]
    [1.5, -0.5, -0.5, -0.5]
    """
    mean = statistics.mean(rewards)  # exact: equal rewards give A = 0
    scale = statistics.stdev(rewards) + 1e-9 if kind == "group_norm" else 1.0
    return [(reward - mean) / scale for reward in rewards]


def set_advantages(groups, kind):
    """Give every response its advantage."""
    for group in groups:
        for response, advantage in zip(group.responses, advantages(group.rewards, kind)):
            response.advantage = advantage


def has_signal(rewards, scores, rule="scores"):
    """Whether to train on a group: difference 4 in the list at the top.

    >>> has_signal([-1, 0], [0, 0]), has_signal([-1, 0], [0, 0], "rewards")
    (False, True)
    """
    if rule == "none":
        return True
    if rule == "rewards":
        return max(rewards) > min(rewards)
    mean = statistics.mean(scores)
    return 0.01 + 1e-6 < mean < 0.99 - 1e-6 and max(scores) > min(scores)


def policy_loss(logits, target, advantage, old_log_p=None, ref_log_p=None, sampler_log_p=None,
                kl_weight=0.0, clip=(0.2, 0.2), temperature=1.0):
    """Minus the bracket of J at each position, Eq. 11.

    logits: [C, V]
    target: [C], the sampled token
    advantage: [C], the A of its response
    old_log_p: [C], its log-prob under pi_old; None before a step's first update, when pi_old is pi
    ref_log_p: [C], its log-prob under pi_ref; None for no KL
    sampler_log_p: [C], its log-prob as the sampler computed it, for `mismatch` only; or None
    kl_weight: beta
    clip: (low, high)

    Returns losses [C] and {name: [C]}: policy, entropy, clipped; with ref_log_p also kl, with sampler_log_p also
    mismatch, |the trainer's log-prob under pi_old - the sampler's|.
    """
    if temperature != 1.0:  # as a division is another [C, V], in the backward pass, too
        logits = logits / temperature
    log_probs = logits.log_softmax(-1)  # [C, V]
    log_p = log_probs.gather(-1, target[:, None]).squeeze(-1)  # [C]
    if old_log_p is None:
        old_log_p = log_p.detach()
    ratio = (log_p - old_log_p).exp()  # [C], r of Eq. 12
    unclipped = ratio * advantage  # [C]
    limited = ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage  # [C]
    policy = -torch.minimum(unclipped, limited)  # [C], Eq. 11
    stats = {"policy": policy, "entropy": entropy(log_probs), "clipped": limited < unclipped}
    if sampler_log_p is not None:
        stats["mismatch"] = (old_log_p - sampler_log_p).abs()
    if ref_log_p is None:
        return policy, stats
    k2 = 0.5 * (log_p - ref_log_p) ** 2  # [C], estimates the KL of Eq. 11
    kl = k2.clamp(max=10)  # [C], as released
    return policy + kl_weight * kl, stats | {"kl": kl}


def token_weights(kind, response, batch, num_micro_batches, dtype=torch.float32):
    """Weights [N] of the tokens: the weighted sum of losses over an optimiser batch is the mean that `kind` names.

    kind: "token", "sequence" or "micro-batch"
    response: [N], the index, within the micro-batch, of the response that each token belongs to
    batch: the groups of the optimiser batch
    num_micro_batches: of the optimiser batch, on all ranks together
    """
    if kind == "sequence":  # Eq. 11
        lengths = response.bincount()[response].to(dtype)  # [N]
        return 1 / (lengths * sum(len(group.responses) for group in batch))
    denominator = len(response) * num_micro_batches if kind == "micro-batch" else counted_tokens(batch)
    return torch.full_like(response, 1 / denominator, dtype=dtype)


# ---- The loop
def refine(model, reference, prompts, chat, score, args, start=0, valid=()):
    """Train a model by GRPO.

    model: a Transformer with float32 weights, changed in place
    reference: pi_ref in the precision of --dtype; None if and only if --kl-weight is 0
    prompts: a list of `Group` without responses
    score: function (record, text) -> {"reward" in [-1, 1], -1 for a format failure; "answer_score" in [0, 1]};
        validation also needs "exact"; samples.jsonl has all keys
    start: the step to resume after
    valid: held-out groups without responses, answered greedily before step 1, every --valid-every steps and at the end

    Writes metrics.jsonl, samples.jsonl (a line per group) and checkpoints under --out. Returns the run's `train.Steps`:
    `stopped` after Ctrl-C. The p-th prompt of a run and the seed of its samples depend on --seed and p only.
    """
    if (args.kl_weight > 0) != (reference is not None):
        raise ValueError("give a reference if and only if kl_weight is above 0")
    num_steps, num_updates = plan_steps(len(prompts), args)
    optimisers = train.make_optimisers(model, args)
    progress = {"prompts": 0, "updates": 0}
    if start:
        progress = checkpoints.load_checkpoint(args.out, start, model, optimisers)
    policy = model.in_dtype(getattr(torch, args.dtype))  # draws the samples; in float32 it is the model itself
    if args.compile:
        for network in {model, reference, policy} - {None}:
            network.model.compile_layers()
    with train.fail_together():
        sampler = make_sampler(policy, [*prompts, *valid], chat, args)
    validate = partial(score_answers, sampler, valid, score, args.max_new_tokens)
    if valid and not start:
        runs.log_step(args.out, {"step": 0} | validate())
    signal = partial(has_signal, rule=args.filter)
    steps = train.Steps(start, num_steps, "sim-rl")
    for step in steps:
        # 1. Sample n responses to each prompt from the policy as it is now, pi_old, and score them, until enough groups
        # have a learning signal. Eq. 12 turns rewards into advantages.
        groups, kept, seconds = sample_step(
            sampler, prompts, progress["prompts"], score, signal, args, stop=lambda: steps.stop_requested)
        if not groups:  # Ctrl-C: no update since the step before
            steps.stopped = True
            if step - 1 > start and (step - 1) % args.save_every:
                checkpoints.save_checkpoint(args.out, step - 1, model, optimisers, progress)
            break
        progress["prompts"] += len(groups)
        set_advantages(groups, args.advantage)
        responses = [response for group in groups for response in group.responses]
        total = sum(sum(response.log_probs) for response in responses)
        checkpoints.check_finite(args.out, step, "a sampled log-prob", total)
        row = runs.describe_responses(groups, kept)

        with train.timed(seconds, "seconds_training"):
            # 2. Store the log-probs of pi_ref, and those of pi_old before the updates change the model.
            batches = prepare_batches(model, reference, kept, chat.vocab_size, args, step)

            # 3. Update: gradients (summed over ranks, clipped) and an optimiser step for each batch.
            sums = Counter()  # Counter.update adds
            for packed_batch in batches:
                sums.update(accumulate_gradients(model, packed_batch, chat.vocab_size, args))
                progress["updates"] += 1
                rate = train.learning_rate(progress["updates"], num_updates, args.lr)
                row |= train.update(model, optimisers, rate, args.out, step)  # lr and norm of the last batch
            means = {name: value / counted_tokens(kept) for name, value in sums.items()}  # this rank's part of them
            if batches:  # no group may have a signal
                means["loss"] = sums["loss"] / len(batches)
            row |= train.sum_over_ranks(means)
            policy.copy_weights(model)

        # 4. Validate.
        if valid and (step % args.valid_every == 0 or step == num_steps):
            row |= validate()

        # 5. Log and save. After Ctrl-C on any rank, this step ends the loop.
        row |= {"updates": progress["updates"]} | seconds
        row |= runs.memory_in_use(model.head_weight.device)
        samples = runs.describe_groups(step, groups, kept, chat)
        runs.log_metrics(args.out, samples, "samples.jsonl")
        runs.log_step(args.out, {"step": step} | row)
        if steps.ends_at(step) or step % args.save_every == 0:
            checkpoints.save_checkpoint(args.out, step, model, optimisers, progress)
        steps.show(row, ("reward", "finished", "signal", "entropy", "kl", "clipped"))
    return steps


def plan_steps(num_prompts, args):
    """(steps, updates) of the whole run, if every step is full."""
    steps = args.steps or max(1, num_prompts * args.episodes // args.prompts_per_step)
    groups_per_batch = math.ceil(args.batch_size / args.n)  # a batch counts responses
    return steps, steps * math.ceil(args.prompts_per_step / groups_per_batch)


@torch.no_grad()
def prepare_batches(model, reference, groups, vocab_size, args, step):
    """Split a step's groups into optimiser batches. Returns, per batch, the list of this rank's packed micro-batches.

    Adds to each packed dict what stays fixed during the updates, [N] each: advantage, sampler_log_p, old_log_p (None in
    the first batch), ref_log_p (None without a reference), token_weights. Also active: 0 for a micro-batch
    that only keeps the ranks in step, else 1.
    """
    device = model.head_weight.device
    wide = torch.promote_types(getattr(torch, args.dtype), torch.float32)
    batches = []
    for update, batch in enumerate(optimiser_batches(groups, args.batch_size, args.seed, step)):
        parts = micro_batches(batch, args.micro_batch_tokens)
        batches.append([])
        for micro, active in train.share_of_rank(parts):
            packed = pack(micro, device) | {"active": active}
            responses = [r for group in micro for r in group.responses]
            advantage = torch.tensor([r.advantage for r in responses], dtype=wide, device=device)
            packed["advantage"] = advantage[packed["response"]]
            log_probs = [value for r in responses for value in r.log_probs]
            packed["sampler_log_p"] = torch.tensor(log_probs, device=device)
            packed["old_log_p"] = packed["ref_log_p"] = None
            if update:
                packed["old_log_p"] = log_probs_of(model, packed, vocab_size, args)
            if reference:
                packed["ref_log_p"] = log_probs_of(reference, packed, vocab_size, args)
            packed["token_weights"] = active * token_weights(
                args.loss_mean, packed["response"], batch, len(parts), wide)
            batches[-1].append(packed)
    return batches


@torch.no_grad()
def log_probs_of(model, packed, vocab_size, args):
    """Log-probs [N] of a packed micro-batch's targets, in the same chunks as the loss, so both round the same way."""
    dtype = getattr(torch, args.dtype)
    hidden = counted_states(model, packed, dtype).to(dtype)  # [N, H]
    head = model.head_weight[:vocab_size].to(dtype)  # [V, H]
    log_probs = []
    for rows, logits in logits_in_chunks(hidden, head):
        log_p = (logits / args.temperature).log_softmax(-1)  # [C, V]
        log_probs.append(log_p.gather(-1, packed["targets"][rows, None]).squeeze(-1))
    return torch.cat(log_probs)


def accumulate_gradients(model, packed_batch, vocab_size, args):
    """Accumulate the gradients of an optimiser batch, from `prepare_batches`. Returns this rank's part of the loss, and
    of the statistics of `policy_loss`, summed over tokens."""
    dtype = getattr(torch, args.dtype)
    loss = partial(policy_loss, kl_weight=args.kl_weight, clip=args.clip, temperature=args.temperature)
    sums = Counter()
    for packed in packed_batch:
        hidden = counted_states(model, packed, dtype)  # [N, H]
        names = ("targets", "advantage", "old_log_p", "ref_log_p", "sampler_log_p")  # in the order of `policy_loss`
        tensors = [packed[name] for name in names]  # [N] each, or None
        part, stats = head_loss(hidden, model.head_weight, packed["token_weights"], loss, *tensors,
                                vocab_size=vocab_size, dtype=dtype)
        part.backward()
        sums["loss"] += part.detach()
        sums.update({name: packed["active"] * value for name, value in stats.items()})
    return sums


# ---- The command simrl
def simrl_flags(parser):
    parser.add_argument("--model", required=True, help="model folder to start from; also pi_ref")
    add_data_flags(parser, "records with gold answers")
    add_prompt_flags(parser)
    add_count_flags(parser, 8, least=2)
    train.add_valid_flags(parser, "records with gold answers, answered greedily", every=10)
    add = parser.add_argument_group("steps").add_argument
    add("--prompts-per-step", type=positive, default=128, help="groups per step")
    add("--temperature", type=number(float, 1e-6), default=1.0, help="of the samples, above 0")
    add("--episodes", type=positive, default=3, help="sets the steps: prompts x this / prompts-per-step")
    add("--steps", type=positive, help="overrides --episodes")
    add = parser.add_argument_group("reward and filter").add_argument
    add("--reward", choices=("similarity", "binary"), default="similarity",
        help="binary: 1 for the gold calls, or for any text where text is due; else 0; -1 for a format failure")
    add("--strip-eos", action="store_true", help="strip the end token from text replies before scoring")
    add("--filter", choices=("scores", "rewards", "none"), default="scores",
        help="scores: train on groups whose scores differ, with a mean in 0.01-0.99; "
        "rewards: whose rewards differ; none: on all")
    add("--max-draws", type=positive, default=4, metavar="N",
        help="a step samples at most N x prompts-per-step prompts")
    add = parser.add_argument_group("loss").add_argument
    add("--advantage", choices=("group_norm", "dr_grpo"), default="group_norm",
        help="(R - mean) / std, or R - mean")
    add("--kl-weight", type=non_negative, default=1e-3,
        help="weight of the KL to pi_ref; 0: no reference model")
    add("--clip", type=non_negative, nargs=2, default=[0.2, 0.2],
        metavar=("LOW", "HIGH"), help="clip the ratio to [1 - LOW, 1 + HIGH]")
    add("--loss-mean", choices=("token", "micro-batch", "sequence"), default="token",
        help="token: mean over the tokens of a batch; micro-batch: of micro-batch means (released); sequence: of "
        "response means (paper)")
    train.add_training_flags(parser, lr=3e-7, weight_decay=0.0, save_every=10)


def run_simrl(args):
    """Refine a model by GRPO, scoring its samples against gold answers. Not yet run in full on a GPU."""
    # 1. Before anything is written, read all inputs and refuse bad ones.
    device = train.pick_device(args)
    with train.fail_together():
        shard = train.sharding(args, device)
        chat = Chat.from_pretrained(args.model, think=args.think, tools=args.tools)
        prompts, skipped = prompt_groups(args.data, chat, args.max_prompt_tokens, args.limit)
        valid = []
        if args.valid:
            valid, too_long = prompt_groups(args.valid, chat, args.max_prompt_tokens, args.valid_limit)
            train.note(f"{len(valid):,} prompts to validate on, {too_long} skipped as too long")
    start = train.open_run(args, [args.model], [args.data, args.valid])
    if start < 0:  # finished already
        return

    # 2. Load the policy and the reference.
    model = Transformer.from_pretrained(args.model, device=device, shard=shard)
    model.model.gradient_checkpointing = args.gradient_checkpointing
    reference = None
    if args.kl_weight:
        reference = Transformer.from_pretrained(args.model, getattr(torch, args.dtype), device, shard)
    what = f"{len(prompts):,} prompts, {skipped} too long; {args.prompts_per_step} x {args.n} responses a step"
    train.describe_run(args, model, what, start, *plan_steps(len(prompts), args))

    # 3. Train.
    score = partial(training_reward, chat, args)
    steps = refine(model, reference, prompts, chat, score, args, start, valid)
    if steps.stopped:
        return train.stopped_run(args)

    # 4. Write all results before anything is printed.
    runs.finish_run(args, model, partial(runs.show_samples, args.out))
    return 130 if steps.stop_requested else 0  # as in `ckd.run_training`


def training_reward(chat, args, record, text):
    """The reward of Sim-RL. Returns {"reward", "answer_score", "case": why, "exact"}, see `reward.score`."""
    return score_response(chat, record, text, strip_eos=args.strip_eos, binary=args.reward == "binary")

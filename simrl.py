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
import json
import math
import random
import statistics
from collections import deque
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import train
from data import amount, number, one_line, positive, print_table
from data.chat import Chat, add_prompt_flags
from data.groups import Group, Response, counted_tokens, micro_batches, optimiser_batches, pack
from data.records import add_data_flags
from data.rollouts import read_prompts, score_response
from data.runs import check_finite, load_checkpoint, log_metrics, save_checkpoint, summarise_refinement
from model import Transformer
from sampler import add_length_flag, generate

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
    mean = statistics.mean(rewards)  # exact: equal rewards give 0, not a rounding error over 1e-9
    scale = 1.0
    if kind == "group_norm":
        scale = statistics.stdev(rewards) + 1e-9
    return [(reward - mean) / scale for reward in rewards]


def has_signal(rewards, scores, rule="scores"):
    """Whether a group is trained on; scores are rewards with format failures at 0. Departure 5.

    >>> has_signal([-1, 0], [0, 0]), has_signal([-1, 0], [0, 0], "rewards"), has_signal([0, 0], [0, 0], "none")
    (False, True, True)
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
    advantage: [C], A of its response
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
    stats = {"policy": policy, "entropy": entropy, "clipped": clipped < unclipped}
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
    tokens = counted_tokens(batch) if kind == "token" else len(response) * parts  # departure 4
    return torch.full(response.shape, 1 / tokens, dtype=dtype, device=response.device)


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
        raise ValueError("a reference model is required exactly if kl_weight > 0")
    device = model.head_weight.device
    dtype = train.torch_dtype(args.dtype)
    steps, updates_per_step = plan_steps(len(prompts), args)
    optimisers = train.make_optimisers("adamw", model, args.lr, args.weight_decay)
    progress = {"prompts": 0, "updates": 0}
    if start:
        progress = load_checkpoint(args.out, start, model, optimisers)
    bar = tqdm(total=steps, initial=start, desc="sim-rl", unit="step", disable=train.rank() > 0)
    with bar, train.Interrupt() as interrupt:
        for step in range(start + 1, steps + 1):
            clock = train.Stopwatch("sampling", "scoring", "training")
            groups = []
            kept = []
            policy = model if model.head_weight.dtype == dtype else model.copy(dtype)
            while len(kept) < args.prompts_per_step and len(groups) < args.max_draws * args.prompts_per_step:
                # 1. Sample n responses to each prompt from the policy as it is now, pi_old.
                first = progress["prompts"]
                batch = next_prompts(prompts, args.seed, first, args.prompts_per_step)
                with clock("sampling"):
                    own = sample_responses(policy, batch, first, chat, args)

                # 2. Score them; keep the groups with a signal, and sample more prompts until the step is full.
                with clock("scoring"):
                    score_responses([batch[i] for i in own], score, chat, args.advantage)
                with clock("sampling"):
                    share_responses(batch, own, device)
                groups += batch
                kept = [group for group in groups if group_has_signal(group, args.filter)]
                progress["prompts"] += args.prompts_per_step
            del policy  # before the training, which needs the memory
            row = {"step": step} | describe_responses(groups) | {"signal": len(kept) / len(groups)}
            kept = kept[:args.prompts_per_step]

            with clock("training"):
                # 3. Freeze the log-probs of pi_old and pi_ref, for all updates of this step.
                batches = optimiser_batches(kept, args.batch_size, args.seed, step) if kept else []
                batches = [freeze(model, reference, batch, chat.vocab_size, args) for batch in batches]

                # 4. Update: one optimiser step per batch.
                names = ["loss", "policy", "entropy", "clipped", "mismatch"] + ["kl"] * (reference is not None)
                means = dict.fromkeys(names, 0.0)
                for batch in batches:
                    for name, value in accumulate_gradients(model, batch, chat.vocab_size, args).items():
                        means[name] += value / (len(batches) if name == "loss" else counted_tokens(kept))
                    norm = train.clip_gradients(model)
                    check_finite(args.out, step, "the gradient norm", norm)
                    progress["updates"] += 1
                    rate = train.learning_rate(progress["updates"], steps * updates_per_step, args.lr)
                    train.optimiser_step(optimisers, rate)
                means = train.sum_over_ranks(means, device)

            # 5. Log, save, stop.
            row |= {"groups_kept": len(kept), "tokens": counted_tokens(kept), "updates": progress["updates"]}
            if batches:
                row |= means | {"lr": rate, "grad_norm": norm}
            row |= {f"seconds_{name}": value for name, value in clock.seconds.items()}
            stop = interrupt.on_any_rank(device)
            last = step == steps
            if train.rank() == 0:
                log_metrics(args.out, *describe_groups(step, groups, kept, chat), name="samples.jsonl")
                log_metrics(args.out, row)
                if step % args.save_every == 0 or last or stop:
                    save_checkpoint(args.out, step, model, optimisers, progress)
            train.show_metrics(bar, row, ("reward", "answer_score", "finished", "signal", "entropy", "kl", "clipped"))
            if stop and not last:
                return False
    return True


def plan_steps(prompts, args):
    """(steps of the run, optimiser steps of a full step)."""
    steps = args.steps or max(1, prompts * args.episodes // args.prompts_per_step)
    groups_per_batch = math.ceil(args.batch_size / args.n)
    return steps, math.ceil(args.prompts_per_step / groups_per_batch)


def next_prompts(prompts, seed, first, count):
    """`count` groups from number `first` on in an endless sequence of passes, each shuffled by (seed, pass)."""
    groups = []
    while len(groups) < count:
        episode, start = divmod(first + len(groups), len(prompts))
        order = list(range(len(prompts)))
        random.Random(f"{seed} {episode}").shuffle(order)
        for i in order[start:start + count - len(groups)]:
            groups.append(replace(prompts[i], responses=[]))
    return groups


def sample_responses(policy, groups, first, chat, args):
    """Sample this rank's share of the groups, similar prompt lengths together. Returns their indices.

    first: the number of the first prompt in the run; with the seed it decides the randomness of the samples
    """
    own = sorted(range(train.rank(), len(groups), train.world_size()), key=lambda i: len(groups[i].prompt))
    concurrent = max(1, args.max_concurrent // args.n)  # prompts
    for at in range(0, len(own), concurrent):
        part = own[at:at + concurrent]
        generators = [torch.Generator().manual_seed(args.seed * 1_000_003 + first + i) for i in part]
        samples = generate(policy, [groups[i].prompt for i in part], args.n, args.max_new_tokens, chat.stop_ids,
                           generators, args.temperature, vocab_size=chat.vocab_size)
        for i, responses in zip(part, samples):
            groups[i].responses = responses
    return own


def score_responses(groups, score, chat, advantage_kind):
    """Give every response its text, reward and advantage."""
    for group in groups:
        for response in group.responses:
            response.text = chat.decode(response.ids)
            details = dict(score(group.record, response.text))
            response.reward = details.pop("reward")
            response.answer_score = details.pop("answer_score")
            response.details = details
        rewards = [response.reward for response in group.responses]
        for response, advantage in zip(group.responses, advantages(rewards, advantage_kind)):
            response.advantage = advantage


def share_responses(groups, own, device):
    """Give every rank the responses that the others sampled."""
    if train.world_size() == 1:
        return
    rows = [[i, [asdict(response) for response in groups[i].responses]] for i in own]
    for i, responses in train.gather_over_ranks(rows, device):
        groups[i].responses = [Response(**fields) for fields in responses]


def group_has_signal(group, rule):
    """`has_signal` of a scored group."""
    rewards = [response.reward for response in group.responses]
    scores = [response.answer_score for response in group.responses]
    return has_signal(rewards, scores, rule)


@torch.no_grad()
def freeze(model, reference, batch, vocab_size, args):
    """This rank's micro-batches of an optimiser batch, packed, with all that its update does not change.

    Adds to each packed dict, [N] each: advantage, sampler_log_p, old_log_p, ref_log_p (None without a reference),
    and token_weights.
    """
    dtype = train.torch_dtype(args.dtype)
    device = model.head_weight.device
    high = torch.promote_types(dtype, torch.float32)
    parts = micro_batches(batch, args.micro_batch_tokens)
    frozen = []
    for micro in parts[train.rank()::train.world_size()]:
        packed = pack(micro, device)
        responses = [response for group in micro for response in group.responses]
        advantage = torch.tensor([r.advantage for r in responses], dtype=high, device=device)  # [responses]
        packed["advantage"] = advantage[packed["response"]]
        sampler_log_p = [value for r in responses for value in r.log_probs]
        packed["sampler_log_p"] = torch.tensor(sampler_log_p, device=device)
        for name, policy in (("old_log_p", model), ("ref_log_p", reference)):
            packed[name] = log_probs_of(policy, packed, vocab_size, args.temperature, dtype) if policy else None
        packed["token_weights"] = token_weights(args.loss_mean, packed["response"], batch, len(parts), high)
        frozen.append(packed)
    return frozen


def log_probs_of(policy, packed, vocab_size, temperature, dtype):
    """Log-probs [N] of a packed batch's targets under a policy: the numbers that the loss sees."""
    hidden = train.hidden_states(policy, packed, dtype)  # [N, H]
    head = policy.head_weight[:vocab_size]  # [V, H]
    return train.token_log_probs(hidden, head, packed["targets"], temperature, dtype=dtype)


def accumulate_gradients(model, batch, vocab_size, args):
    """Add the gradients of an optimiser batch. Returns its loss and {name: sum over its tokens} on this rank.

    mismatch: |log-prob of the trainer - of the sampler|
    """
    dtype = train.torch_dtype(args.dtype)
    loss = partial(policy_loss, kl_weight=args.kl_weight, clip=args.clip, temperature=args.temperature)
    sums = {}
    for packed in batch:
        hidden = train.hidden_states(model, packed, dtype)  # [N, H]
        tensors = [packed[name] for name in ("targets", "advantage", "old_log_p", "ref_log_p")]
        value, stats = train.head_loss(hidden, model.head_weight[:vocab_size], packed["token_weights"], loss,
                                       *tensors, dtype=dtype)
        value.backward()
        stats["loss"] = value.detach()
        stats["mismatch"] = (packed["old_log_p"] - packed["sampler_log_p"]).abs().sum()
        for name, part in stats.items():
            sums[name] = sums.get(name, 0.0) + part
    return sums


def describe_responses(groups):
    """Metrics of all responses of a step, before the filter."""
    responses = [response for group in groups for response in group.responses]
    rewards = [response.reward for response in responses]
    lengths = [len(response.ids) for response in responses]
    mean = statistics.fmean
    return {"reward": mean(rewards), "reward_std": statistics.pstdev(rewards),
            "answer_score": mean(r.answer_score for r in responses),
            "format_failures": mean(reward <= -1 for reward in rewards),
            "finished": mean(r.finish_reason == "stop" for r in responses),
            "length": mean(lengths), "longest": max(lengths),
            "prompt_length": mean(len(group.prompt) for group in groups), "groups_drawn": len(groups)}


def describe_groups(step, groups, kept, chat):
    """Lines of samples.jsonl, a group each, the long prompt last."""
    kept = set(map(id, kept))
    for group in groups:
        samples = []
        for r in group.responses:
            sample = {"finish_reason": r.finish_reason, "text": r.text, "reward": r.reward}
            sample |= {"answer_score": r.answer_score, **r.details, "advantage": r.advantage}
            samples.append(sample)
        yield {"step": step, "kept": id(group) in kept, "gold": chat.answer(group.record), "samples": samples,
               "prompt": chat.decode(group.prompt)}


# ---------------------------------------------------------------------------------------------------------------------
# The command simrl

def simrl_flags(parser):
    parser.add_argument("--model", required=True, help="model folder to start from; also pi_ref")
    add_data_flags(parser, "records with gold answers")
    add_prompt_flags(parser)
    add = parser.add_argument_group("sampling").add_argument
    add("--prompts-per-step", type=positive, default=128, help="groups per step")
    add("--n", type=number(int, 2), default=8, help="responses per prompt")
    add("--temperature", type=number(float, 1e-6), default=1.0, help="of the sampler and the loss")
    add_length_flag(parser)
    add("--max-concurrent", type=positive, default=64,
        help="sequences generated concurrently; changes memory and speed only")
    add("--episodes", type=positive, default=3, help="passes over the prompts, if no group is dropped")
    add("--steps", type=positive, help="rollout batches; overrides --episodes")
    add = parser.add_argument_group("reward and filter").add_argument
    add("--reward", choices=("similarity", "binary"), default="similarity", help="binary: all or nothing")
    add("--strip-eos", action="store_true", help="remove the end token from text replies before scoring")
    add("--filter", choices=("scores", "rewards", "none"), default="scores",
        help="train on groups whose answer scores differ, with a mean in 0.01-0.99; whose rewards differ; all")
    add("--max-draws", type=positive, default=4, help="sample at most N x prompts-per-step prompts per step")
    add = parser.add_argument_group("loss").add_argument
    add("--advantage", choices=("group_norm", "dr_grpo"), default="group_norm",
        help="R - mean over the standard deviation, or R - mean")
    add("--kl-weight", type=amount, default=1e-3, help="of the KL to pi_ref; 0: no reference model")
    add("--clip", type=amount, nargs=2, default=[0.2, 0.2], metavar=("LOW", "HIGH"), help="of the ratio")
    add("--loss-mean", choices=("token", "micro-batch", "sequence"), default="token",
        help="over the batch's tokens; of micro-batch means, as released; as in the paper")
    train.add_training_flags(parser, 3e-7, 0.0, 10)


def run_simrl(args):
    """Refine a model by GRPO on its own samples, scored by how similar their calls are to the gold calls."""
    # 1. Read everything, and refuse what cannot be used before anything is written.
    device = train.pick_device(args.device)
    chat = Chat.from_pretrained(args.model, think=args.think, tools=args.tools)
    records, ids = read_prompts(args.data, chat, args.max_prompt_tokens, args.limit)
    prompts = [Group(record, prompt, []) for record, prompt in zip(records, ids) if prompt is not None]
    start = train.open_run(args, device, [args.model], [args.data])

    # 2. Load the policy and the reference.
    model = Transformer.from_pretrained(args.model, device=device)
    model.model.gradient_checkpointing = args.gradient_checkpointing
    reference = None
    if args.kl_weight:
        reference = Transformer.from_pretrained(args.model, train.torch_dtype(args.dtype), device)
    train.note(f"{len(prompts):,} prompts, {args.prompts_per_step} x {args.n} responses a step; "
               f"{model.num_parameters() / 1e6:,.1f} M parameters" + (f"; resuming after step {start}" if start else ""))

    # 3. Train.
    if not refine(model, reference, prompts, chat, partial(training_reward, chat, args), args, start):
        return train.stopped_run(args)
    if train.rank() > 0:
        return 0

    # 4. Write all results before anything is printed.
    summary = summarise_refinement(args.out) | {"peak_memory_gb": round(train.peak_memory(device), 2)}
    train.finish_run(args, model, summary)
    show_run(args, summary)
    return 0


def training_reward(chat, args, record, text):
    """The reward of Sim-RL: {"reward", "answer_score", "case", "exact"} of a response to a record."""
    return score_response(chat, record, text, strip_eos=args.strip_eos, binary=args.reward == "binary")


def show_run(args, summary):
    """Print the best and the worst sample of the last three groups, and the figures of a run."""
    path = Path(args.out) / "samples.jsonl"
    with open(path, encoding="utf-8") as file:
        last = [json.loads(line) for line in deque(file, maxlen=3)]
    for group in last:
        print(f"\ngold     {one_line(group['gold'])}")
        ranked = sorted(group["samples"], key=lambda sample: -sample["reward"])
        for sample in (ranked[0], ranked[-1]):
            print(f"{sample['reward']:<8.2f} {one_line(sample['text'])}")
    print(f"\nEvery sample is in {path}\n")
    print_table(summary.items())
    print(f"\nThe model is in {args.out}/model: python star.py chat --model {args.out}/model")

"""Sim-RL (paper section 3.2; paper.md 1.5, 1.6): first the sampler, then the GRPO step in pieces, then its loop.

A step samples a group of n responses o_1 … o_n to each of some prompts, scores them with R, keeps the groups that can
teach something, and improves the policy pi from what it was when it sampled, pi_old, in a few optimiser steps:

    J = mean_i 1/|o_i| sum_t [ min(r A_i, clip(r, 1 - low, 1 + high) A_i) - beta KL(pi || pi_ref) ]            Eq. 11
    r = pi(o_it) / pi_old(o_it)        A_i = (R_i - mean(R)) / std(R)                                          Eq. 12

The reward is a function given to the loop, which knows no tool calls.

The sampler mirrors the group layout of data/groups.py. A prompt is prefilled once, and its n continuations live in the
same cache row: a step feeds one token for each of them, and a mask lets a token see the prompt and its own
continuation's earlier tokens. The prompt's keys and values are stored once and read once a step, not n times.

Departures from the paper and from the released code:
1. One model samples and trains; the released run hands its weights to vLLM. Log-probs are recomputed, as released.
2. Ids beyond the tokenizer (padding rows of the embedding) are cut off, in the sampler and in the trainer.
3. The token that ends a response is kept as its last id, and may be its first (released: one token comes before it).
   Nothing is appended to a response that was cut off, which trains as it is (released: an end token is, and counts as
   an action of the policy that never took it).
4. The loss is the token mean over the optimiser batch. `sequence` is the paper's Eq. 11; `micro-batch` a mean of
   micro-batch means as released, where a token's weight depends on its neighbours (there: two sequences each).
5. KL is the k2 estimate as a loss, and a group is judged by its answer scores, both as released. That rule also drops
   groups of rewards -1 and 0, which differ; `rewards` keeps them. The paper: a KL, and means of 0 or 1 are dropped.
6. The number of steps is fixed; what the filter drops is replaced by going on through the prompts, at most max_draws
   times a step's prompts. Too few kept groups make fewer optimiser steps, and the learning rate then ends higher.
   (Released: the run ends with the prompts, and what is left of a rollout batch then is dropped.)
7. An optimiser batch is made of whole groups (released: of sequences of many prompts).
"""
import json
import math
import random
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data.groups import counted_tokens, micro_batches, optimiser_batches, pack
from model import KVCache
from train import (Interrupt, adamw, head_loss, joined_over_ranks, learning_rate, load_checkpoint, log_metrics,
                   optimiser_step, peak_memory, save_checkpoint, states, sum_over_ranks)


# ---------------------------------------------------------------------------------------------------------------------
# The sampler

def next_tokens(logits, uniform, temperature, top_p):
    """Draw one token for each row of logits [R, V] with one uniform number each, [R].

    temperature 0 takes the likeliest token. top_p < 1 keeps the fewest tokens whose mass reaches top_p. Returns ids
    [R] and log-probs [R] under the distribution that was drawn from; for temperature 0, under the softmax itself.

    >>> logits = torch.tensor([[0., 2., 1.]]).log()
    >>> [next_tokens(logits, torch.tensor([u]), 1.0, 1.0)[0].item() for u in (0.1, 0.6, 0.7)]
    [1, 1, 2]
    >>> next_tokens(logits, torch.tensor([0.9]), 1.0, 0.6)  # only token 1 is needed to reach 0.6
    (tensor([1]), tensor([0.]))
    """
    logits = logits.float()
    log_probs = (logits / temperature if temperature > 0 else logits).log_softmax(-1)  # [R, V]
    if temperature == 0:
        ids = log_probs.argmax(-1)
        return ids, log_probs.gather(-1, ids[:, None]).squeeze(-1)
    if top_p < 1:
        ordered, order = log_probs.sort(-1, descending=True)  # [R, V]
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass of the likelier tokens
        dropped = torch.empty_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        log_probs = log_probs.masked_fill(dropped, -torch.inf).log_softmax(-1)
    # Inverse transform: the first token whose cumulative mass exceeds the uniform number.
    high = torch.float32 if logits.device.type == "mps" else torch.float64  # which mps does not have
    mass = log_probs.exp().cumsum(-1, dtype=high)  # [R, V]
    ids = torch.searchsorted(mass, uniform[:, None].to(high) * mass[:, -1:], right=True)  # [R, 1]
    ids = ids.clamp(max=logits.shape[-1] - 1)  # in float32 the product may round up to the whole mass
    return ids.squeeze(-1), log_probs.gather(-1, ids).squeeze(-1)


@torch.no_grad()
def generate(model, prompts, n, max_new_tokens, stop_ids, generator, temperature=1.0, top_p=1.0, width=None,
             each_step=None):
    """Sample n continuations of each prompt, all together.

    model: a Transformer (in the precision to sample with) · prompts: lists of ids, of any lengths · stop_ids: tokens
    that end a continuation · generator: a CPU torch.Generator, or one for each prompt, the only source of randomness ·
    width: sample from the first `width` ids only · each_step: called after every step with {(prompt, sample): id}.

    Returns for each prompt a list of n dicts: `ids` (a stop token included), `logprobs` (one for each id) and
    `finish_reason`, "stop" or "length". The same uniform numbers go to the same (prompt, sample, step) whatever else
    is still running. A prompt's continuations share one cache row of len(prompt) + n x steps keys: made for n of some
    tens at most.
    """
    device = model.head_weight.device
    generators = generator if isinstance(generator, list) else [generator] * len(prompts)
    samples = [[{"ids": [], "logprobs": [], "finish_reason": "length"} for _ in range(n)] for _ in prompts]
    lengths = torch.tensor([len(p) for p in prompts])  # [P]
    ids, segment = torch.zeros(2, len(prompts), int(lengths.max()), dtype=torch.long)  # [P, T]
    for i, prompt in enumerate(prompts):
        ids[i, :len(prompt)] = torch.tensor(prompt)
        segment[i, len(prompt):] = -1  # padding: no continuation has this number, so none sees it
    cache = KVCache(len(model.model.layers))
    hidden = model.hidden(ids.to(device), cache=cache)  # [P, T, hidden]; what stands behind a prompt's end is not used
    hidden = hidden[torch.arange(len(prompts)), lengths - 1][:, None].expand(-1, n, -1)  # [P, n, hidden]
    # Which prompt each cache row belongs to, and which sample sits in each of its slots (-2: an empty slot).
    rows, slots = torch.arange(len(prompts)), torch.arange(n).expand(len(prompts), n)
    for step in range(max_new_tokens):
        logits = hidden.flatten(0, 1) @ model.head_weight[:width].T  # [rows * slots, V]
        uniform = torch.stack([torch.rand(n, generator=g) for g in generators])  # [P, n]
        uniform = uniform[rows[:, None], slots]  # [rows, slots]
        tokens, logprobs = next_tokens(logits, uniform.flatten().to(device), temperature, top_p)
        tokens, logprobs = tokens.cpu().view_as(slots), logprobs.cpu().view_as(slots)  # [rows, slots]
        alive, came = slots.clone(), {}
        for row, slot in (slots >= 0).nonzero().tolist():
            where, token = (rows[row].item(), slots[row, slot].item()), tokens[row, slot].item()
            sample = samples[where[0]][where[1]]
            sample["ids"].append(token)
            sample["logprobs"].append(logprobs[row, slot].item())
            came[where] = token
            if token in stop_ids:
                sample["finish_reason"], alive[row, slot] = "stop", -2
        if each_step is not None:
            each_step(came)
        # Those that ended leave the batch: a prompt with none left leaves the cache, and slots close up. All prompts
        # have as many slots as the one with most still running; the others' spare slots are empty.
        running = (alive >= 0).sum(1)  # [rows]
        if step + 1 == max_new_tokens or not running.any():
            break
        keep = running.nonzero().squeeze(1)
        if len(keep) < len(rows):
            cache.keep(keep.to(device))
            rows, alive, tokens, segment = rows[keep], alive[keep], tokens[keep], segment[keep]
        front = (alive < 0).sort(dim=1, stable=True).indices[:, :running.max()]  # [rows, slots]
        slots, tokens = alive.gather(1, front), tokens.gather(1, front)  # [rows, slots]
        # Sample j is segment j + 1, as in a packed group; an empty slot gets a number that nobody sees.
        segment = torch.cat((segment, slots + 1), dim=1)  # [rows, S]
        mask = (segment[:, None] == 0) | (segment[:, None] == slots[:, :, None] + 1)  # [rows, slots, S]
        positions = (lengths[rows] + step)[:, None].expand_as(slots)  # [rows, slots]
        hidden = model.hidden(tokens.to(device), positions.to(device), mask[:, None].to(device), cache)
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# The pieces of a step

def draw(prompts, seed, first, count):
    """`count` prompts from number `first` on in an endless row of passes over them, each shuffled by (seed, pass)."""
    drawn = []
    while len(drawn) < count:
        episode, place = divmod(first + len(drawn), len(prompts))
        order = list(range(len(prompts)))
        random.Random(f"{seed} {episode}").shuffle(order)
        drawn += [prompts[i] for i in order[place:place + count - len(drawn)]]
    return drawn


def has_signal(rewards, scores, rule="scores"):
    """The filter of groups: whether rewards, or answer scores (format failures 0), can teach anything. Departure 5.

    >>> has_signal([-1, 0], [0, 0]), has_signal([-1, 0], [0, 0], "rewards"), has_signal([0, 0], [0, 0], "none")
    (False, True, True)
    """
    if rule == "scores":
        return 0.01 + 1e-6 < statistics.mean(scores) < 0.99 - 1e-6 and max(scores) > min(scores)
    return rule == "none" or max(rewards) > min(rewards)


def advantages(rewards, kind="group_norm"):
    """Eq. 12: how much better than its group each response is, floats. The standard deviation is the unbiased one.

    >>> advantages([1.0, 0.0], "dr_grpo"), [round(a, 4) for a in advantages([1.0, 0.0, 0.0, 0.0])]
    ([0.5, -0.5], [1.5, -0.5, -0.5, -0.5])
    """
    mean = statistics.mean(rewards)  # exact, so that a flat group gets 0 and not a rounding error over 1e-9
    scale = 1.0 if kind == "dr_grpo" else statistics.stdev(rewards) + 1e-9
    return [(reward - mean) / scale for reward in rewards]


@torch.no_grad()
def logprobs_of(model, packed, width=None, temperature=1.0, dtype=torch.float32):
    """Log-probs [N] of a packed batch's response tokens: the numbers that the loss sees, chunk for chunk."""
    found = torch.empty(packed["targets"].shape, dtype=torch.promote_types(dtype, torch.float32),
                        device=packed["targets"].device)

    def keep(logits, rows):
        log_p = (logits / temperature).log_softmax(-1)  # [C, V]
        found[rows] = log_p.gather(-1, packed["targets"][rows, None]).squeeze(-1)
        return found[rows], {}

    head_loss(states(model, packed, dtype), model.head_weight[:width], torch.zeros_like(found), keep, dtype=dtype)
    return found


def objective(targets, advantage, old, reference=None, kl_weight=0.0, clip=(0.2, 0.2), temperature=1.0):
    """The function (logits [C, V], rows) -> (losses [C], {name: [C]}) that `head_loss` applies: minus J's bracket.

    targets [N] the tokens that came · advantage [N] of each one's response · old, reference [N] its log-prob before the
    update and under pi_ref, None for no KL. Names: policy, entropy, clipped; with a reference also kl.
    """
    def apply(logits, rows):
        log_p = (logits / temperature).log_softmax(-1)  # [C, V]
        with torch.no_grad():
            entropy = -torch.linalg.vecdot(log_p.exp(), log_p)  # [C]
        log_p, A = log_p.gather(-1, targets[rows, None]).squeeze(-1), advantage[rows]  # [C] each
        ratio = (log_p - old[rows]).exp()
        unclipped, clipped = ratio * A, ratio.clamp(1 - clip[0], 1 + clip[1]) * A
        policy = -torch.minimum(unclipped, clipped)  # Eq. 11
        stats = {"policy": policy, "entropy": entropy, "clipped": clipped < unclipped}
        if reference is None:
            return policy, stats
        kl = (0.5 * (log_p - reference[rows]) ** 2).clamp(max=10)  # k2; the estimate is clamped (paper.md 1.6)
        return policy + kl_weight * kl, stats | {"kl": kl}

    return apply


def token_weights(kind, response, members, parts, dtype=torch.float32):
    """What each token's loss is multiplied by, [N], so that the sum over an optimiser batch is the mean wanted.

    kind: "token", "sequence" or "micro-batch" · response [N] the response of each token of this micro-batch · members:
    the groups of the optimiser batch · parts: its number of micro-batches.
    """
    if kind == "sequence":  # Eq. 11
        return 1 / (response.bincount()[response].to(dtype) * sum(len(g["responses"]) for g in members))
    count = counted_tokens(members) if kind == "token" else len(response) * parts  # departure 4
    return torch.full(response.shape, 1 / count, dtype=dtype, device=response.device)


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def refine(model, prompts, out, reward, decode, stop_ids, width=None, reference=None, kl_weight=1e-3, group_size=8,
           prompts_per_step=128, batch=128, episodes=3, steps=None, lr=3e-7, weight_decay=0.0, clip=(0.2, 0.2),
           advantage="group_norm", keep="scores", max_draws=4, loss_mean="token", temperature=1.0, max_new_tokens=512,
           rows=64, micro_tokens=4096, dtype=torch.bfloat16, save_every=10, start=0, seed=42, rank=0, ranks=1):
    """Train `model` (float32 weights, changed in place) by GRPO; settings default to the released script's.

    prompts: dicts of `record`, `prompt` (ids) and perhaps `gold`, a text to show · reward(record, text) -> dict of
    `reward` in [-1, 1], where -1 is a format failure, `answer_score`, and what else is to be shown · decode: ids to
    text, special tokens included · width: cut the vocabulary to this many ids, the tokenizer's · reference: pi_ref in
    `dtype`, wanted unless kl_weight is 0 · batch: sequences an optimiser step · keep: the rule of `has_signal` · steps:
    rollout batches, default `episodes` passes over the prompts · rows: responses in the making at a time ·
    micro_tokens: padded tokens trained on at a time · start: the step to resume after.

    Writes metrics.jsonl, samples.jsonl (a group a line) and checkpoints under `out`. Returns the summary, a dict; None
    where Ctrl-C ended the run early. Prompt number p of the run and its samples' randomness depend on (seed, p) alone.
    """
    if (kl_weight > 0) != (reference is not None):
        raise ValueError("a reference model is wanted when kl_weight > 0, and only then")
    device, high = model.head_weight.device, torch.promote_types(dtype, torch.float32)
    steps = steps or max(1, len(prompts) * episodes // prompts_per_step)
    updates = math.ceil(prompts_per_step / math.ceil(batch / group_size))  # of a step whose rollout batch is full
    names = ("loss", "policy", "entropy", "clipped", "mismatch") + (("kl",) if reference is not None else ())

    def roll_out(sampler, first, seconds):
        """Sampled and scored groups for the prompts from number `first` on; each rank its share, then all know all."""
        began, drawn, found = time.perf_counter(), draw(prompts, seed, first, prompts_per_step), []
        mine = sorted(range(rank, len(drawn), ranks), key=lambda i: len(drawn[i]["prompt"]))
        together = max(1, rows // group_size)
        for part in (mine[at:at + together] for at in range(0, len(mine), together)):
            generators = [torch.Generator().manual_seed(seed * 1_000_003 + first + i) for i in part]
            found += zip(part, generate(sampler, [drawn[i]["prompt"] for i in part], group_size, max_new_tokens,
                                        stop_ids, generators, temperature, width=width))
        sampled = time.perf_counter()
        for i, responses in found:
            for r in responses:
                r |= {"span": (0, len(r["ids"])), "text": decode(r["ids"])}
                r |= reward(drawn[i]["record"], r["text"])
            for r, value in zip(responses, advantages([r["reward"] for r in responses], advantage)):
                r["advantage"] = value
        scored = time.perf_counter()
        for i, responses in joined_over_ranks(found, device):
            drawn[i] = drawn[i] | {"responses": responses}
        seconds["scoring"] += scored - sampled
        seconds["sampling"] += time.perf_counter() - began - (scored - sampled)
        return drawn

    def prepare(members):
        """This rank's micro-batches of an optimiser batch, with all that its update does not change."""
        parts = micro_batches(members, micro_tokens)
        for micro in parts[rank::ranks]:
            packed, responses = pack(micro, device), [r for group in micro for r in group["responses"]]
            A = torch.tensor([r["advantage"] for r in responses], dtype=high, device=device)[packed["response"]]  # [N]
            old, reference_log_p = (None if m is None else logprobs_of(m, packed, width, temperature, dtype)
                                    for m in (model, reference))  # [N] each
            weights = token_weights(loss_mean, packed["response"], members, len(parts), high)  # [N]
            said = torch.tensor([value for r in responses for value in r["logprobs"]], device=device)  # [N]
            yield (packed, weights, objective(packed["targets"], A, old, reference_log_p, kl_weight, clip, temperature),
                   {"mismatch": (old - said).abs().sum()})

    optimisers, done = adamw(model, lr, weight_decay), {"prompts": 0, "updates": 0}
    if start:
        done = load_checkpoint(out, start, model, optimisers)
    bar = tqdm(total=steps, initial=start, desc="sim-rl", unit="step", disable=rank > 0)
    with bar, Interrupt() as interrupt:
        for step in range(start + 1, steps + 1):
            seconds, drawn, kept = dict.fromkeys(("sampling", "scoring", "training"), 0.0), [], []
            sampler = model if model.head_weight.dtype == dtype else model.copy(dtype)
            while len(kept) < prompts_per_step and len(drawn) < max_draws * prompts_per_step:
                drawn += roll_out(sampler, done["prompts"], seconds)
                done["prompts"] += prompts_per_step
                kept = [group for group in drawn if has_signal(
                    *([r[name] for r in group["responses"]] for name in ("reward", "answer_score")), keep)]
            del sampler  # before the training, which wants the memory
            row = {"step": step} | describe(drawn) | {"signal": len(kept) / len(drawn)}
            kept = kept[:prompts_per_step]

            began, sums, total = time.perf_counter(), dict.fromkeys(names, 0.0), counted_tokens(kept)
            batches = [list(prepare(members)) for members in optimiser_batches(kept, batch, seed, step) if members]
            for parts in batches:
                for packed, weights, apply, mismatch in parts:
                    h = states(model, packed, dtype)  # [N, hidden]
                    loss, stats = head_loss(h, model.head_weight[:width], weights, apply, dtype=dtype)
                    loss.backward()
                    for name, value in ({"loss": loss.detach() * total / len(batches)} | stats | mismatch).items():
                        sums[name] += value / total
                done["updates"] += 1
                rate = learning_rate(done["updates"], steps * updates, lr)
                norm = optimiser_step(model, optimisers, rate)
            sums = sum_over_ranks(sums | {"interrupted": interrupt.asked}, device)
            interrupted = sums.pop("interrupted") > 0  # on any rank: all stop at the same step
            seconds["training"] = time.perf_counter() - began
            row |= {"groups_kept": len(kept), "tokens": total, "updates": done["updates"]}
            row |= (sums | {"lr": rate, "grad_norm": norm}) if batches else {}
            row |= {f"seconds_{name}": value for name, value in seconds.items()}
            if rank == 0:
                log_metrics(out, *shown(step, drawn, kept, decode), name="samples.jsonl")
                log_metrics(out, row)
                if step % save_every == 0 or step == steps or interrupted:
                    save_checkpoint(out, step, model, optimisers, done)
            bar.set_postfix_str(" ".join(f"{name} {row[name]:.3g}" for name in (
                "reward", "answer_score", "finished", "signal", "entropy", "kl", "clipped") if name in row))
            bar.update()
            if interrupted and step < steps:
                return None
    return summary(out, device) if rank == 0 else {}


def describe(groups):
    """What all responses of a step were like, before any filter."""
    responses = [r for group in groups for r in group["responses"]]
    rewards, lengths = [r["reward"] for r in responses], [len(r["ids"]) for r in responses]
    return {"reward": statistics.fmean(rewards), "reward_std": statistics.pstdev(rewards),
            "answer_score": statistics.fmean(r["answer_score"] for r in responses),
            "format_failures": statistics.fmean(value <= -1 for value in rewards),
            "finished": statistics.fmean(r["finish_reason"] == "stop" for r in responses),
            "length": statistics.fmean(lengths), "longest": max(lengths),
            "prompt_length": statistics.fmean(len(group["prompt"]) for group in groups), "groups_drawn": len(groups)}


def shown(step, groups, kept, decode):
    """A step's groups as lines of samples.jsonl: what a person wants to see of them, the long prompt last."""
    trained = set(map(id, kept))
    for group in groups:
        samples = [{k: v for k, v in r.items() if k not in ("ids", "span", "logprobs")} for r in group["responses"]]
        yield {"step": step, "kept": id(group) in trained, "gold": group.get("gold"), "samples": samples,
               "prompt": decode(group["prompt"])}


def summary(out, device):
    """The figures of a whole run, from its metrics.jsonl; the first and last reward are means over a fifth of it."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    fifth, drawn = max(1, len(rows) // 5), sum(row["groups_drawn"] for row in rows)
    first, last = (round(statistics.fmean(row["reward"] for row in part), 4) for part in (rows[:fifth], rows[-fifth:]))
    return {"steps": len(rows), "updates": rows[-1]["updates"], "prompts_drawn": drawn,
            "share_kept": round(sum(row["groups_kept"] for row in rows) / drawn, 4), "reward_first": first,
            "reward_last": last} | {name: round(sum(row[name] for row in rows), 1) for name in rows[0]
                                    if name.startswith("seconds_")} | {"peak_memory_gb": round(peak_memory(device), 2)}

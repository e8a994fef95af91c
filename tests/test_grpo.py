"""The GRPO step against a slow loop written from the formulas, and its loop: what it learns, keeps, writes and resumes.

Run as a program, this file is a small run that the tests kill, resume and spread over processes.
"""
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import sample, settings, stub_record
from safetensors.torch import load_file

import simrl
import star
import train
from data import InputError
from data.groups import Group, micro_batches, next_prompts, pack
from data.checkpoints import load_checkpoint
from data.runs import summarise
from head import counted_states, head_loss
from model import Transformer
from sampler import Sampler
from experience import answer_held_out, make_sampler
from simrl import advantages, has_signal, log_probs_of, policy_loss, refine, token_weights

ROOT = Path(__file__).parents[1]
V = 10  # ids of the tokenizer; the embedding has two more rows
CONFIG = {"model_type": "qwen3", "vocab_size": V + 2, "hidden_size": 32, "intermediate_size": 48,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
          "tie_word_embeddings": True}
# Prompts "k 1", of three lengths; the answer is k and then 0, which ends a response.
PROMPTS = [Group(stub_record(k), [1] * (k % 3) + [k, 1], []) for k in range(2, V)]


class StubChat:
    """A chat whose text is the ids themselves."""

    stop_ids = [0]
    vocab_size = V

    def decode(self, ids):
        return " ".join(map(str, ids))

    def answer(self, record):
        return f"{record['answer']} 0"


def similar(record, text):
    """Half for a first token near the answer, half for ending right after it; -1 for beginning with the end."""
    words = text.split()
    if words[0] == "0":
        return {"reward": -1.0, "answer_score": 0.0}
    near = (1 - abs(int(words[0]) - record["answer"]) / 9) ** 2
    score = 0.5 * near + 0.5 * (words[1:2] == ["0"])
    return {"reward": score, "answer_score": score}


def tiny(seed=0, dtype=torch.float32, std=0.1):
    return Transformer(CONFIG).init_weights(seed, std).to(dtype)


def small_settings(out, **flags):
    """The flags of a small run: 2 optimiser steps a step at most, unless `flags` say otherwise."""
    small = {"n": 8, "prompts_per_step": 8, "batch_size": 32, "steps": 3, "lr": 5e-3, "max_new_tokens": 3,
             "dtype": "float32", "kl_weight": 0.0, "max_draws": 1}
    return settings("simrl", out=str(out), **small | flags)


def run(out, score=similar, model=None, reference=None, prompts=PROMPTS, start=0, **flags):
    """A small run. Returns (whether it is finished, the trained model)."""
    args = small_settings(out, **flags)
    model = model or tiny(dtype=getattr(torch, args.dtype))
    Path(out).mkdir(exist_ok=True)
    steps = refine(model, reference, prompts, StubChat(), score, args, start)
    return not steps.stopped, model


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics(out):
    return lines(Path(out) / "metrics.jsonl")


def sample_groups(out):
    return lines(Path(out) / "samples.jsonl")


def responses_of(groups):
    return [r for group in groups for r in group.responses]


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def flat_gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def some_groups(model, temperature, n=4):
    """Sampled groups of unequal prompts and responses, with made-up advantages."""
    g = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, V, (length,), generator=g).tolist() for length in (7, 1, 12, 4)]
    samples = sample(model, prompts, n, 9, [0, 5], 1, temperature, vocab_size=V)
    groups = [Group({}, prompt, responses) for prompt, responses in zip(prompts, samples)]
    for group in groups:
        for i, response in enumerate(group.responses):
            response.advantage = i - 1.5
    return groups


# ---- sampler and trainer ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("budget", [1, 30, 1000])  # 1 and 30 cut groups between their responses
def test_right_after_sampling_the_ratio_is_one(temperature, budget):
    model = tiny(std=0.4)
    groups = some_groups(model, temperature)
    assert len({len(r.ids) for r in responses_of(groups)}) > 3
    assert max(token for r in responses_of(groups) for token in r.ids) < V
    args = settings("simrl", temperature=temperature, dtype="float32")
    hotter = settings("simrl", temperature=1.1 * temperature, dtype="float32")
    gap = 0.0
    for micro in micro_batches(groups, budget):
        packed = pack(micro)
        sampler_log_p = torch.tensor([value for r in responses_of(micro) for value in r.log_probs])  # [N]
        old_log_p = log_probs_of(model, packed, V, args)  # [N]
        assert ((old_log_p - sampler_log_p).exp() - 1).abs().max() < 1e-4
        for wrong in (log_probs_of(model, packed, None, args), log_probs_of(model, packed, V, hotter)):
            gap = max(gap, (wrong - sampler_log_p).abs().max())
        values = [r.advantage for r in responses_of(micro) for _ in r.ids]
        advantage = torch.tensor(values)  # [N]
        hidden = counted_states(model, packed, torch.float32)
        loss = partial(policy_loss, temperature=temperature)
        _, sums = head_loss(hidden, model.head_weight[:V], torch.ones(len(advantage)), loss,
                                  packed["targets"], advantage, old_log_p)
        assert sums["policy"] == pytest.approx(-advantage.sum().item(), abs=1e-5)
        assert sums["clipped"] == 0
    assert gap > 0.01  # the size of the vocabulary and the temperature matter


def test_log_probs_before_the_first_update_are_those_of_the_loss():
    """So that they need not be computed: policy_loss takes its own."""
    model = tiny(std=0.4)
    args = settings("simrl", temperature=0.7, dtype="float32")
    for micro in micro_batches(some_groups(model, 0.7), 60):
        packed = pack(micro)
        for dtype in ("float32", "bfloat16"):
            args.dtype = dtype
            old_log_p = log_probs_of(model, packed, V, args)
            results = []
            for old in (old_log_p, None):
                hidden = counted_states(model, packed, getattr(torch, dtype))
                loss = partial(policy_loss, temperature=0.7, kl_weight=0.1)
                value, sums = head_loss(
                    hidden, model.head_weight[:V], torch.ones(len(old_log_p)), loss, packed["targets"],
                    torch.ones(len(old_log_p)), old, old_log_p - 0.5, old_log_p, dtype=getattr(torch, dtype))
                grads = torch.autograd.grad(value, list(model.parameters()))
                results.append((value.detach(), *sums.values(), *grads))
                assert sums["mismatch"] == 0
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)


def test_the_loop_trains_on_what_it_sampled(tmp_path):
    run(tmp_path, temperature=0.8, steps=4)
    for row in metrics(tmp_path):
        assert row["mismatch"] < 1e-4 and row["groups_kept"] > 0


def test_samples_depend_on_the_number_of_the_prompt_alone(tmp_path):
    """Not on how many are sampled concurrently (nor on ranks: see below)."""
    run(tmp_path / "a", max_concurrent=8, steps=1)
    run(tmp_path / "b", max_concurrent=1000, steps=1)
    groups = sample_groups(tmp_path / "a")
    assert groups == sample_groups(tmp_path / "b")
    run(tmp_path / "c", prompts=PROMPTS[:1], steps=2, lr=0.0)  # one prompt 16 times, with new samples each time
    texts = {tuple(r["text"] for r in group["samples"]) for group in sample_groups(tmp_path / "c")}
    assert len(texts) == 16
    run(tmp_path / "d", steps=1, seed=43)
    assert sample_groups(tmp_path / "d") != groups


# ---- the formulas ----------------------------------------------------------------------------------------------------

def test_advantages():
    rewards = [-1.0, 0.0, 0.25, 1.0, 1.0]
    R = torch.tensor(rewards, dtype=torch.float64)
    assert torch.allclose(torch.tensor(advantages(rewards)).double(), (R - R.mean()) / (R.std() + 1e-9))
    assert torch.allclose(torch.tensor(advantages(rewards, "dr_grpo")).double(), R - R.mean())
    for kind in ("group_norm", "dr_grpo"):
        assert advantages([0.1] * 7, kind) == [0.0] * 7


def test_has_signal():
    low, high = 0.01 + 1e-6, 0.99 - 1e-6
    for scores, kept in [([0, 1], True), ([0, 0], False), ([1, 1], False), ([0.5, 0.5], False), ([0, 2 * low], False),
                         ([0, 2 * low + 1e-9], True), ([2 * high - 1, 1], False), ([2 * high - 1 - 1e-9, 1], True)]:
        assert has_signal(scores, scores) == kept, scores
    assert not has_signal([-1, 0], [0, 0]) and has_signal([-1, 0], [0, 0], "rewards")
    assert not has_signal([0.5, 0.5], [0, 1], "rewards") and has_signal([0.5, 0.5], [0, 1])
    assert not has_signal([1, 1], [1, 1], "rewards") and has_signal([1, 1], [1, 1], "none")


def test_the_clip_acts_beyond_its_bound_on_one_side_only():
    """Five tokens at ratios 0.5 ... 1.5, each sign of A: no gradient beyond the clip, all of it on the other side."""
    ratios = torch.tensor([0.5, 0.85, 1.0, 1.15, 1.5], dtype=torch.float64)
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    targets = torch.arange(5)
    log_p = logits.detach().log_softmax(-1)
    old_log_p = log_p[targets, targets] - ratios.log()
    for A, free in ((2.0, [True, True, True, True, False]), (-2.0, [False, True, True, True, True])):
        losses, stats = policy_loss(logits, targets, torch.full((5,), A), old_log_p)
        clipped = ratios.clamp(0.8, 1.2)
        assert torch.allclose(losses, -A * torch.where(torch.tensor(free), ratios, clipped))
        assert stats["clipped"].tolist() == [not f for f in free]
        grad, = torch.autograd.grad(losses.sum(), logits)
        onehot = torch.eye(V, dtype=torch.float64)[targets]
        expected = -A * ratios[:, None] * (onehot - log_p.exp()) * torch.tensor(free)[:, None]
        assert torch.allclose(grad, expected, atol=1e-12)


def test_kl_is_k2_clamped_at_ten():
    logits = torch.zeros(3, V, dtype=torch.float64, requires_grad=True)
    log_p = torch.full((3,), -math.log(V), dtype=torch.float64)
    distance = torch.tensor([-0.7, 4.4, 4.6], dtype=torch.float64)  # 0.5 * 4.6^2 > 10
    losses, stats = policy_loss(logits, torch.arange(3), torch.zeros(3), log_p, log_p - distance, kl_weight=0.5)
    assert torch.allclose(stats["kl"], torch.tensor([0.245, 9.68, 10.0]).double())
    assert torch.allclose(losses, 0.5 * stats["kl"]) and stats["policy"].abs().max() == 0
    grad, = torch.autograd.grad(losses.sum(), logits)
    onehot = torch.eye(V, dtype=torch.float64)[:3]
    expected = 0.5 * distance[:, None] * (onehot - 1 / V) * torch.tensor([[1.0], [1.0], [0.0]])
    assert torch.allclose(grad, expected)
    assert torch.allclose(stats["entropy"], torch.full((3,), math.log(V)).double())


def test_token_weights():
    """Each kind sums to 1 over an optimiser batch, and gives its tokens what its name says."""
    groups = some_groups(tiny(std=0.4), 1.0)
    parts = micro_batches(groups, 30)
    lengths = [len(r.ids) for r in responses_of(groups)]
    assert len(parts) > 2 and any(len(part[0].responses) < 4 for part in parts)
    for kind in ("token", "sequence", "micro-batch"):
        all_weights = []
        for micro in parts:
            weights = token_weights(kind, pack(micro)["response"], groups, len(parts), torch.float64)
            all_weights.append(weights)
            tokens = [len(r.ids) for r in responses_of(micro)]
            expected = {"token": [1 / sum(lengths)] * sum(tokens),
                        "sequence": [1 / len(lengths) / length for length in tokens for _ in range(length)],
                        "micro-batch": [1 / len(parts) / sum(tokens)] * sum(tokens)}
            assert weights.tolist() == pytest.approx(expected[kind])
        assert torch.cat(all_weights).sum() == pytest.approx(1.0)


# ---- the whole step against the slow loop ----------------------------------------------------------------------------

class Spy:
    """What reaches the optimiser: for each update its groups, and the weights and gradient before it, unclipped."""

    def __init__(self, monkeypatch):
        self.batches = []
        self.weights = []
        self.gradients = []
        self.first = []  # for each update, the first update of the same step
        self.optimiser_batches = simrl.optimiser_batches
        self.update = train.update
        monkeypatch.setattr(simrl, "optimiser_batches", self.record_batches)
        monkeypatch.setattr(train, "update", self.record_update)

    def record_batches(self, *args):
        batches = self.optimiser_batches(*args)
        self.first += [len(self.batches)] * len(batches)
        self.batches += batches
        return batches

    def record_update(self, model, *args):
        self.weights.append(flat(model))
        self.gradients.append(flat_gradients(model))
        return self.update(model, *args)


def with_weights(model, values):
    with torch.no_grad():
        for p, part in zip(model.parameters(), values.split([p.numel() for p in model.parameters()])):
            p.copy_(part.view(p.shape))
    return model


def slow_log_probs(model, prompt, ids, temperature):
    """Log-probs of a response, from a row of its own and all its logits."""
    logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1, :V] / temperature
    return logits.log_softmax(-1)[range(len(ids)), ids]


def slow_advantages(rewards, kind):
    """Eq. 12 in float64."""
    R = torch.tensor(rewards, dtype=torch.float64)
    A = R - R.mean()
    if kind == "group_norm":
        A = A / (R.std() + 1e-9)
    return A * (R.max() > R.min())  # equal rewards leave rounding errors over 1e-9


def slow_response_loss(model, old, reference, prompt, response, A, args):
    """(losses of a response's tokens, how many of them are clipped), from Eq. 11 and the released code."""
    policies = (model, old, reference)
    log_p, old_log_p, ref_log_p = (slow_log_probs(p, prompt, response.ids, args.temperature) for p in policies)
    losses = []
    count = 0
    for now, before, start in zip(log_p, old_log_p.detach(), ref_log_p.detach()):
        ratio = (now - before).exp()
        clipped = min(max(ratio.item(), 0.8), 1.2) * A
        count += bool(clipped < ratio * A)
        losses.append(-min(ratio * A, clipped) + args.kl_weight * 0.5 * (now - start) ** 2)
    return losses, count


def slow_loss(model, old, reference, groups, args):
    """(loss of one optimiser batch, how many of its tokens are clipped), response by response, token by token."""
    parts = [groups]
    if args.loss_mean == "micro-batch":
        parts = micro_batches(groups, args.micro_batch_tokens)
    advantage = {}  # by the identity of a response; micro-batches cut groups
    for group in groups:
        for response, A in zip(group.responses, slow_advantages(group.rewards, args.advantage)):
            advantage[id(response)] = A
    means = []
    clipped = 0
    for part in parts:
        losses = []  # a list for each response
        for group in part:
            for r in group.responses:
                values, count = slow_response_loss(
                    model, old, reference, group.prompt, r, advantage[id(r)], args)
                losses.append(values)
                clipped += count
        if args.loss_mean == "sequence":
            means.append(sum(sum(values) / len(values) for values in losses) / len(losses))
        else:
            means.append(sum(map(sum, losses)) / sum(map(len, losses)))
    return sum(means) / len(means), clipped


@pytest.mark.parametrize("loss_mean,kind,budget", [
    ("token", "group_norm", 24), ("sequence", "dr_grpo", 24), ("sequence", "group_norm", 10_000),
    ("micro-batch", "group_norm", 24)])
def test_every_update_is_that_of_the_slow_loop(loss_mean, kind, budget, tmp_path, monkeypatch):
    """The gradients that reach the optimiser, and by finite differences that they are those of the slow loop's loss."""
    double = torch.float64
    spy = Spy(monkeypatch)
    reference = tiny(1, double)
    flags = {"dtype": "float64", "steps": 2, "n": 3, "prompts_per_step": 4, "batch_size": 6, "lr": 0.02,
             "temperature": 0.8, "filter": "none", "advantage": kind, "micro_batch_tokens": budget,
             "loss_mean": loss_mean, "kl_weight": 0.3}
    run(tmp_path, model=tiny(0, double), reference=reference, **flags)
    args = small_settings(tmp_path, **flags)
    assert len(spy.gradients) == 4 and spy.first == [0, 0, 2, 2]
    model = tiny(0, double)
    clipped = 0
    losses = []
    for groups, weights, gradient, first in zip(spy.batches, spy.weights, spy.gradients, spy.first):
        old = with_weights(tiny(0, double), spy.weights[first])
        model.zero_grad()
        loss, count = slow_loss(with_weights(model, weights), old, reference, groups, args)
        loss.backward()
        assert torch.allclose(flat_gradients(model), gradient, atol=1e-9)
        clipped += count
        losses.append(loss.item())
        direction = torch.randn(len(weights), generator=torch.Generator().manual_seed(0), dtype=double)
        with torch.no_grad():
            above, _ = slow_loss(with_weights(model, weights + 1e-6 * direction), old, reference, groups, args)
            below, _ = slow_loss(with_weights(model, weights - 1e-6 * direction), old, reference, groups, args)
        slope = (above - below) / 2e-6
        assert slope.item() == pytest.approx((gradient @ direction).item(), rel=1e-5)
    assert clipped > 0  # the second update of a step is off-policy enough
    for row, pair in zip(metrics(tmp_path), (losses[:2], losses[2:])):
        assert row["loss"] == pytest.approx(sum(pair) / 2)


@pytest.mark.parametrize("loss_mean", ["token", "sequence", "micro-batch"])
def test_the_gradient_does_not_depend_on_micro_batches(loss_mean, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    for budget in (1, 60, 10_000):
        run(tmp_path / str(budget), model=tiny(0, torch.float64), reference=tiny(1, torch.float64), dtype="float64",
            steps=1, batch_size=64, kl_weight=0.1, loss_mean=loss_mean, micro_batch_tokens=budget)
    one, some, whole = spy.gradients
    for other in (one, some):  # `micro-batch`, as released, does depend on them
        assert torch.allclose(other, whole, atol=1e-9) == (loss_mean != "micro-batch")


def test_a_flat_group_has_no_policy_gradient(tmp_path):
    _, model = run(tmp_path, lambda *_: {"reward": 0.3, "answer_score": 0.3}, filter="none")
    assert metrics(tmp_path)[-1]["updates"] == 6
    assert torch.equal(flat(model), flat(tiny()))


# ---- what the loop keeps, writes and learns --------------------------------------------------------------------------

def test_defaults_are_the_released_settings():
    """The released settings."""
    args = settings("simrl")
    for name, value in {"prompts_per_step": 128, "n": 8, "batch_size": 128, "lr": 3e-7, "kl_weight": 1e-3,
                        "clip": [0.2, 0.2], "temperature": 1.0, "max_new_tokens": 512, "episodes": 3,
                        "weight_decay": 0.0, "advantage": "group_norm", "filter": "scores"}.items():
        assert getattr(args, name) == value, name


def answers_of(groups):
    return [group.record["answer"] for group in groups]


def test_prompts_come_in_passes_shuffled_by_seed_and_pass():
    answers = []
    for first in range(0, 24, 4):
        answers += answers_of(next_prompts(PROMPTS, 7, first, 4))
    assert answers == answers_of(next_prompts(PROMPTS, 7, 0, 24))
    passes = [answers[i:i + 8] for i in (0, 8, 16)]
    assert all(sorted(part) == sorted(answers_of(PROMPTS)) for part in passes)
    assert len(set(map(tuple, passes))) == 3
    assert answers != answers_of(next_prompts(PROMPTS, 8, 0, 24))


def signal_for(*answers):
    """A reward that differs within groups of these answers only."""
    count = 0

    def score(record, _):
        nonlocal count
        count += 1
        value = count % 2 if record["answer"] in answers else 0.5
        return {"reward": value - 0.25, "answer_score": value}

    return score


def test_a_step_ends_with_the_group_that_fills_it(tmp_path):
    """Groups are used in the order of prompts; the next step starts with the prompt after the last of them."""
    run(tmp_path, signal_for(2, 3, 4, 5, 6), steps=3, max_draws=4)
    rows = metrics(tmp_path)
    groups = sample_groups(tmp_path)
    for row in rows:
        of_step = [group for group in groups if group["step"] == row["step"]]
        with_signal = [int(group["gold"].split()[0]) < 7 for group in of_step]
        assert [group["kept"] for group in of_step] == with_signal
        assert row["groups_kept"] == sum(with_signal) == 8 and with_signal[-1]
        assert row["groups_drawn"] == len(of_step) > 8
        assert row["signal"] == 8 / len(of_step)
    assert [row["updates"] for row in rows] == [2, 4, 6]
    assert summarise(tmp_path)["groups_drawn"] == len(groups)
    expected = [f"{answer} 0" for answer in answers_of(next_prompts(PROMPTS, 42, 0, len(groups)))]
    assert [group["gold"] for group in groups] == expected


def test_short_responses_are_not_favoured(tmp_path):
    """Groups of one short prompt would finish first, whatever the number of slots; the order of prompts decides."""
    results = []
    for slots in (2, 8, 40, 1000):
        run(tmp_path / str(slots), steps=4, max_draws=4, prompts_per_step=3, max_concurrent=slots, filter="rewards")
        results.append(sample_groups(tmp_path / str(slots)))
    lengths = {len(r["text"].split()) for group in results[0] for r in group["samples"]}
    assert lengths == {1, 2, 3} and results.count(results[0]) == len(results)


def test_no_more_prompts_are_started_than_needed(tmp_path, monkeypatch):
    """If every group has a signal, no token is sampled that is not trained on."""
    tokens = []
    step = Sampler.step
    monkeypatch.setattr(Sampler, "step", lambda self: (step(self), tokens.append(len(self.slots)))[0])
    added = []
    add = Sampler.add
    monkeypatch.setattr(Sampler, "add", lambda self, request: (add(self, request), added.append(request))[0])
    run(tmp_path, filter="none", max_draws=4, steps=2, max_concurrent=1000)
    assert len(added) == 16 and sum(row["groups_drawn"] for row in metrics(tmp_path)) == 16
    assert tokens[-1] == 0  # nothing is left running
    run(tmp_path / "filtered", signal_for(2, 3, 4, 5, 6), max_draws=4, steps=2, max_concurrent=1000)
    drawn = sum(row["groups_drawn"] for row in metrics(tmp_path / "filtered"))
    assert drawn <= len(added) - 16 <= drawn + 8


@pytest.mark.parametrize("rule,kept", [("scores", 0), ("rewards", 8), ("none", 8)])
def test_draws_are_bounded_and_minus_one_against_zero_is_a_signal_by_rewards(rule, kept, tmp_path):
    count = iter(range(10_000))
    _, model = run(tmp_path, lambda *_: {"reward": -float(next(count) % 2), "answer_score": 0.0}, steps=1,
                   max_draws=3, filter=rule)
    row, = metrics(tmp_path)
    assert (row["groups_kept"], row["groups_drawn"], row["updates"]) == (kept, 8 if kept else 24, 2 if kept else 0)
    assert row["format_failures"] == 0.5 and ("loss" in row) == (kept > 0)
    assert torch.equal(flat(model), flat(tiny())) == (kept == 0)


def signal_after(calls, stop=math.inf):
    """A reward without a signal in the first `calls` calls, which fails after `stop` calls."""
    count = 0

    def score(*_):
        nonlocal count
        count += 1
        if count > stop:
            raise InterruptedError
        value = float(count > calls and count % 2)
        return {"reward": value, "answer_score": value}

    return score


def test_steps_without_a_group_count_and_can_be_resumed(tmp_path):
    """The first two have no signal, so the optimiser has no state yet at the checkpoints after them."""
    _, whole = run(tmp_path / "whole", signal_after(128), steps=4)
    with pytest.raises(InterruptedError):
        run(tmp_path / "part", signal_after(128, stop=128), steps=4, save_every=1)
    _, resumed = run(tmp_path / "part", signal_after(0), steps=4, save_every=1, start=2)
    assert [row["updates"] for row in metrics(tmp_path / "part")] == [0, 0, 2, 4]
    assert torch.equal(flat(whole), flat(resumed)) and not torch.equal(flat(whole), flat(tiny()))


def with_reason(record, text):
    return similar(record, text) | {"why": "so"}


def test_metrics_samples_and_checkpoints(tmp_path):
    finished, _ = run(tmp_path, with_reason, reference=tiny(), kl_weight=0.1, steps=5, save_every=2)
    assert finished is True
    rows = metrics(tmp_path)
    groups = sample_groups(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and len(groups) == 40
    for row in rows:
        of_step = [group for group in groups if group["step"] == row["step"]]
        kept = [r for group in of_step if group["kept"] for r in group["samples"]]
        samples = [r for group in of_step for r in group["samples"]]
        assert row["reward"] == pytest.approx(sum(r["reward"] for r in samples) / 64)
        assert row["answer_score"] == pytest.approx(sum(r["answer_score"] for r in samples) / 64)
        assert row["format_failures"] == sum(r["text"].startswith("0") for r in samples) / 64
        assert row["finished"] == sum(r["finish_reason"] == "stop" for r in samples) / 64
        assert row["length"] == sum(len(r["text"].split()) for r in samples) / 64
        assert row["tokens"] == sum(len(r["text"].split()) for r in kept)
        assert row["groups_kept"] == sum(group["kept"] for group in of_step) == row["signal"] * row["groups_drawn"]
        assert {"reward_std", "clipped", "kl", "entropy", "lr", "grad_norm", "seconds_sampling", "seconds_scoring",
                "seconds_training"} <= set(row)
    assert 0 <= rows[0]["kl"] < rows[-1]["kl"] and 0 < rows[0]["entropy"] < math.log(V)
    group = groups[0]
    assert group["record"] == group["gold"].split()[0] and group["request"] == "?"
    for r in group["samples"]:
        assert set(r) == {"text", "finish_reason", "reward", "answer_score", "advantage", "why"}
        assert (r["finish_reason"] == "stop") == r["text"].endswith("0")
        assert len(r["text"].split()) == 3 or r["finish_reason"] == "stop"  # nothing is appended at the length limit
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    progress = json.loads((tmp_path / "checkpoints/step-000005/progress.json").read_text())
    assert len(progress.pop("hashes")) == 4  # without arguments.json, which the command writes
    assert progress == {"prompts": 40, "updates": rows[-1]["updates"]}
    summary = summarise(tmp_path)
    assert summary["first"] == {"reward": rows[0]["reward"]} and summary["last"] == {"reward": rows[-1]["reward"]}
    assert (summary["steps"], summary["groups_drawn"]) == (5, 40)


def test_the_sampler_has_slots_for_prompts_that_a_step_draws_several_times():
    args = small_settings("run", n=2, prompts_per_step=8, max_draws=4, max_concurrent=48)
    assert make_sampler(tiny(), PROMPTS[:4], StubChat(), args).num_slots == 48
    args.max_concurrent = 100
    assert make_sampler(tiny(), PROMPTS[:4], StubChat(), args).num_slots == 8 * 4 * 2


def test_default_steps_and_the_schedule(tmp_path, monkeypatch):
    """floor(prompts x episodes / prompts a step), at least one; the rate counts optimiser steps and ends at a tenth."""
    calls = []
    learning_rate = train.learning_rate

    def recorder(*args):
        calls.append(args)
        return learning_rate(*args)

    monkeypatch.setattr(train, "learning_rate", recorder)
    run(tmp_path / "a", steps=None, episodes=5, prompts_per_step=6, filter="none")
    assert summarise(tmp_path / "a")["steps"] == 6  # 40 / 6
    assert calls == [(i, 12, 5e-3) for i in range(1, 13)]  # 6 x 8 responses: 32 and 16
    assert metrics(tmp_path / "a")[-1]["lr"] == pytest.approx(5e-4)
    run(tmp_path / "b", steps=None, episodes=1, prompts_per_step=20, filter="none")
    assert summarise(tmp_path / "b")["steps"] == 1


def test_no_model_is_in_memory_that_is_not_needed(tmp_path):
    """No reference without a KL; one bfloat16 copy, updated in place, samples; in float32 the model itself does."""
    for wrong in ({"kl_weight": 0.1}, {"reference": tiny()}):
        with pytest.raises(ValueError, match="reference"):
            run(tmp_path / "wrong", **wrong)
    model = tiny()
    copies = []
    in_dtype = model.in_dtype

    def recording(dtype):
        other = in_dtype(dtype)
        copies.extend([other] if other is not model else [])
        return other

    model.in_dtype = recording
    run(tmp_path / "run", model=model, dtype="bfloat16", steps=3)
    policy, = copies
    assert torch.equal(flat(policy), flat(model).bfloat16())
    assert all(1e-6 < row["mismatch"] < 0.05 for row in metrics(tmp_path / "run"))  # a bfloat16 sampler differs a little
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(flat(policy), flat(tiny()).bfloat16())
    copies.clear()
    run(tmp_path / "float32", model=model, dtype="float32", steps=1)
    assert not copies


def test_a_rank_without_held_out_prompts_waits_for_the_others(monkeypatch):
    monkeypatch.setattr(train, "rank", lambda: 3)
    monkeypatch.setattr(train, "world_size", lambda: 4)
    monkeypatch.setattr(train, "sum_over_ranks", lambda sums: sums)
    valid = [Group(stub_record(k), [k, k, 1], []) for k in (3, 5)]
    assert answer_held_out(StubChat(), valid, similar, 3, tiny()) == {"valid_reward": 0.0, "valid_exact": 0.0}


def test_validation_answers_held_out_prompts_greedily(tmp_path):
    """Before the first step, every --valid-every steps and after the last; the training is the same."""
    def score(record, text):
        return similar(record, text) | {"exact": text == f"{record['answer']} 0"}

    valid = [Group(stub_record(k), [k, k, 1], []) for k in (3, 5, 8)]
    flags = {"steps": 5, "valid_every": 2, "save_every": 2, "seed": 1}
    args = small_settings(tmp_path, **flags)
    model = tiny()
    refine(model, None, PROMPTS, StubChat(), score, args, valid=valid)
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows if "valid_reward" in row] == [0, 2, 4, 5] and len(rows) == 6
    expected = []
    for group in valid:
        ids, = sample(model, [group.prompt], 1, 3, [0], temperature=0.0, vocab_size=V)
        expected.append(score(group.record, " ".join(map(str, ids[0].ids))))
    for name in ("reward", "exact"):
        mean = sum(one[name] for one in expected) / 3
        assert rows[-1][f"valid_{name}"] == pytest.approx(mean)
    assert len({row["valid_reward"] for row in rows if "valid_reward" in row}) > 1
    summary = summarise(tmp_path)
    assert summary["steps"] == 5 and summary["last"]["valid_reward"] == rows[-1]["valid_reward"]
    _, plain = run(tmp_path / "plain", score, **flags)
    assert torch.equal(flat(plain), flat(model))
    refine(tiny(1), None, PROMPTS, StubChat(), score, args, 4, valid)  # resumed
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1, 2, 3, 4, 5, 5]


def opposite(record, text):
    result = similar(record, text)
    return result | {"reward": -result["reward"]}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reward_climbs_to_its_ceiling_and_falls_when_negated(seed, tmp_path):
    for name, score in (("up", similar), ("down", opposite)):
        run(tmp_path / name, score, tiny(seed), reference=tiny(seed), steps=30, seed=seed, save_every=100,
            filter="rewards", lr=3e-3, n=16, prompts_per_step=16, batch_size=64, max_new_tokens=2, kl_weight=1e-3)
    up = [row["answer_score"] for row in metrics(tmp_path / "up")]
    down = [row["answer_score"] for row in metrics(tmp_path / "down")]
    assert up[0] == down[0] < 0.35  # noise
    assert sum(up[-5:]) / 5 > 0.85 and sum(down[-5:]) / 5 < 0.12


# ---- divergence, and results before output ---------------------------------------------------------------------------

def contents(folder):
    """{path: bytes} of all files in a folder."""
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def assert_finite(checkpoint):
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        for tensor in load_file(checkpoint / f"{name}.safetensors").values():
            assert tensor.isfinite().all()


def count_optimiser_steps(monkeypatch):
    """Record the gradient norm of every update that does not fail, in the list that is returned."""
    norms = []
    update = train.update

    def recorder(*args):
        row = update(*args)
        norms.append(row["grad_norm"])
        return row

    monkeypatch.setattr(train, "update", recorder)
    return norms


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_diverged_run_stops_before_anything_is_saved(dtype, tmp_path, monkeypatch):
    """At this rate the first update of step 3 leaves huge weights, and the gradient of the second is not finite."""
    run(tmp_path, steps=2, save_every=1, dtype=dtype)
    checkpoints = contents(tmp_path / "checkpoints")
    logged = metrics(tmp_path)
    norms = count_optimiser_steps(monkeypatch)
    with pytest.raises(InputError) as error:
        run(tmp_path, start=2, steps=5, save_every=1, dtype=dtype, lr=1e20, filter="none")
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: step 3: the gradient norm is nan")
    assert f"last good checkpoint is {tmp_path}/checkpoints/step-000002" in message
    assert "another --out" in message and "--lr" in message and "--dtype float32" in message
    assert "\n" not in message
    assert len(norms) == 1  # the first update of step 3, whose gradient was finite
    assert contents(tmp_path / "checkpoints") == checkpoints and len(checkpoints) == 2 * 5
    for step in (1, 2):
        assert_finite(tmp_path / f"checkpoints/step-{step:06d}")
    assert metrics(tmp_path) == logged


@pytest.mark.parametrize("scale", [1e20, math.inf])
def test_a_run_that_starts_diverged_takes_no_step(scale, tmp_path, monkeypatch):
    model = tiny()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    weights = flat(model)
    norms = count_optimiser_steps(monkeypatch)
    with pytest.raises(InputError, match="step 1: .* is nan, .*there is no checkpoint yet.*--lr"):
        run(tmp_path, model=model, save_every=1, filter="none")
    assert norms == [] and torch.equal(flat(model).nan_to_num(), weights.nan_to_num())
    assert contents(tmp_path) == {}


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The gradient of the only update is finite, and the weights after it are not."""
    with pytest.raises(InputError, match="step 1: a weight is nan.*there is no checkpoint yet.*--lr"):
        run(tmp_path, lr=1e39, batch_size=64, steps=1)
    assert not (tmp_path / "checkpoints").exists()


def test_a_diverged_policy_without_a_signal_stops_the_run_too(tmp_path):
    """The weights are finite and the logits are not. No group is kept, so there is no gradient to check."""
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
        assert not model(torch.tensor([[1, 2, 3]])).isfinite().any()
    with pytest.raises(InputError, match="step 1: .*diverged; there is no checkpoint yet.*--lr"):
        run(tmp_path, lambda *_: {"reward": 0.5, "answer_score": 0.5}, model, save_every=1)
    assert not (tmp_path / "checkpoints").exists()


def simrl_command(world, out, *flags):
    return ["simrl", "--model", f"{world}/student", "--data", f"{world}/train.jsonl", "--out", str(out),
            "--prompts-per-step", "4", "--n", "2", "--batch-size", "4", "--steps", "3", "--save-every", "1",
            "--max-new-tokens", "8", "--filter", "none", "--device", "cpu", "--dtype", "float32", *flags]


def test_a_diverged_command_is_one_line_and_exit_code_2(world, tmp_path, capsys, monkeypatch):
    """The random model's own rewards are all -1, so its advantages would be 0."""
    def length(chat, args, record, text):
        return {"reward": len(text) % 5 / 4, "answer_score": 0.5}

    monkeypatch.setattr(simrl, "training_reward", length)
    out = tmp_path / "run"
    assert star.main(simrl_command(world, out, "--lr", "1e20")) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith(f"star.py simrl: {out}: step 1: ") and "has diverged" in last and "--lr" in last
    assert captured.out == ""
    assert sorted(path.name for path in out.iterdir()) == ["arguments.json"]


def test_results_are_on_disk_before_they_are_printed(world, tmp_path):
    """The reader of stdout has closed it, as `| head` does."""
    out = tmp_path / "run"
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([sys.executable, ROOT / "star.py", *simrl_command(world, out)], stdout=writer,
                             stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    os.close(writer)
    assert process.returncode == 141, process.stderr  # SIGPIPE
    assert "Traceback" not in process.stderr
    assert json.loads((out / "summary.json").read_text())["steps"] == 3
    assert (out / "model/model.safetensors").exists()


# ---- killed, interrupted, resumed, several processes -----------------------------------------------------------------

def coarse(record, text):
    """`similar` with answer scores of 0 and 1, so that some groups have no signal."""
    result = similar(record, text)
    return result | {"answer_score": float(result["answer_score"] > 0.7)}


def slow_coarse(record, text):
    """Slow enough that a run can be killed between two steps."""
    time.sleep(0.002)
    return coarse(record, text)


def main(out, *words):
    """The run that the tests below start as a process: 10 steps, more than one draw in some of them."""
    torch.set_num_threads(1)
    flags = {"kl_weight": 0.01, "steps": 10, "prompts_per_step": 6, "max_draws": 2, "save_every": 2,
             "micro_batch_tokens": 40, "resume": "--resume" in words}
    device = train.pick_device(settings("simrl", device="cpu"))
    start = train.open_run(small_settings(out, **flags))
    score = slow_coarse if "--slow" in words else coarse
    model = tiny()
    shard = train.sharding(small_settings(out), device)
    if shard:
        shard(model)
    finished, model = run(out, score, model, reference=tiny(), start=start, **flags)
    if not finished:
        return 130
    model.save_pretrained(Path(out) / "model")
    return 0


def start_process(out, *words, launcher=()):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *launcher, __file__, str(out), *words],
                            stderr=subprocess.PIPE, text=True, env=env)


def wait_until(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)


def has_logged(out, step):
    path = out / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(out) == 0
    return out


def without_seconds(rows):
    return [{name: value for name, value in row.items() if not name.startswith(("seconds", "memory"))} for row in rows]


def assert_same_run(out, whole):
    for path in ("model/model.safetensors", "samples.jsonl", "checkpoints/step-000010/progress.json"):
        assert (out / path).read_bytes() == (whole / path).read_bytes(), path
    assert without_seconds(metrics(out)) == without_seconds(metrics(whole))


def test_killed_and_resumed(tmp_path, whole):
    out = tmp_path / "run"
    rows = metrics(whole)
    assert len({row["groups_drawn"] for row in rows}) > 1 and len({row["groups_kept"] for row in rows}) > 1
    moments = (lambda: (out / "checkpoints").exists(),  # while the first checkpoint is written, or just after
               lambda: has_logged(out, 5))  # between two
    for moment in moments:
        process = start_process(out, "--resume", "--slow")
        wait_until(process, moment)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    with open(out / "samples.jsonl", "ab") as file:
        file.write('{"step": 9, "gold": "ü'.encode()[:-1])  # half a line that ends within a character
    assert main(out, "--resume") == 0
    assert_same_run(out, whole)


def test_interrupted_and_resumed(tmp_path, whole):
    out = tmp_path / "run"
    process = start_process(out, "--slow")
    wait_until(process, lambda: has_logged(out, 3))
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130 and "Stopping as soon as" in error and "Traceback" not in error
    last = metrics(out)[-1]["step"]
    assert 3 <= last < 10 and (out / f"checkpoints/step-{last:06d}/progress.json").exists()
    assert main(out, "--resume") == 0
    assert_same_run(out, whole)


def test_the_optimiser_resumes_at_its_own_count(whole):
    """A step is one rollout batch; AdamW counts optimiser steps."""
    model = tiny()
    optimisers = train.make_optimisers(model, small_settings(whole))
    progress = load_checkpoint(whole, 8, model, optimisers)
    updates = metrics(whole)[7]["updates"]
    assert progress["updates"] == updates > 8 and progress["prompts"] > 8 * 6
    assert {state["step"].item() for state in optimisers[0].state.values()} == {updates}


def test_two_processes_equal_one(tmp_path, whole):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--")
    process = start_process(tmp_path / "two", launcher=launcher)
    _, error = process.communicate()
    assert process.returncode == 0, error
    for a, b in zip(sample_groups(whole), sample_groups(tmp_path / "two"), strict=True):
        assert [r["text"] for r in a["samples"]] == [r["text"] for r in b["samples"]]
        assert a["kept"] == b["kept"]
    for a, b in zip(metrics(whole), metrics(tmp_path / "two"), strict=True):
        for name, value in a.items():
            assert name.startswith(("seconds", "memory")) or b[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))

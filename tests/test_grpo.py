"""The GRPO step against a slow loop written from the formulas, and its loop: what it learns, keeps, writes and resumes.

Run as a program, this file is a small run that the tests kill, resume and spread over processes.
"""
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

import simrl
import train
from data.groups import micro_batches, pack
from model import Transformer
from simrl import advantages, draw, generate, has_signal, logprobs_of, objective, refine, token_weights
from train import head_loss

V = 10  # ids of the tokenizer; the embedding has two more rows
CONFIG = {"model_type": "qwen3", "vocab_size": V + 2, "hidden_size": 32, "intermediate_size": 48,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
          "tie_word_embeddings": True}
# Prompts "k 1", of three lengths; the answer is k and then 0, which ends a response.
PROMPTS = [{"record": {"answer": k}, "prompt": [1] * (k % 3) + [k, 1], "gold": f"{k} 0"} for k in range(2, V)]


def decode(ids):
    return " ".join(map(str, ids))


def similar(record, text):
    """Half for a first token near the answer, half for ending right after it; -1 for beginning with the end."""
    words = text.split()
    score = 0.5 * (1 - abs(int(words[0]) - record["answer"]) / 9) ** 2 + 0.5 * (words[1:2] == ["0"])
    return {"reward": -1.0, "answer_score": 0.0} if words[0] == "0" else {"reward": score, "answer_score": score}


def tiny(seed=0, dtype=torch.float32, std=0.1):
    return Transformer(CONFIG).init_weights(seed, std).to(dtype)


def run(out, reward=similar, model=None, prompts=PROMPTS, **settings):
    """A small run: 2 optimiser steps a step at most, unless `settings` say otherwise."""
    settings = {"group_size": 8, "prompts_per_step": 8, "batch": 32, "steps": 3, "lr": 5e-3, "max_new_tokens": 3,
                "dtype": torch.float32, "kl_weight": 0.0, "max_draws": 1} | settings
    model = model or tiny(dtype=settings["dtype"])
    Path(out).mkdir(exist_ok=True)
    return refine(model, prompts, out, reward, decode, [0], V, **settings), model


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def flat(model, grads=False):
    return torch.cat([(p.grad if grads else p.detach()).flatten() for p in model.parameters()])


def some_groups(model, temperature, n=4):
    """Sampled groups of unequal prompts and responses, with made-up advantages."""
    g = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, V, (length,), generator=g).tolist() for length in (7, 1, 12, 4)]
    found = generate(model, prompts, n, 9, [0, 5], g, temperature, width=V)
    return [{"prompt": prompt, "responses": [r | {"span": (0, len(r["ids"])), "advantage": i - 1.5}
                                             for i, r in enumerate(responses)]}
            for prompt, responses in zip(prompts, found)]


def of_tokens(name, groups):
    """A value of each response, for each of its tokens, [N]; the log-probs it was sampled with are that already."""
    return torch.tensor([value for group in groups for r in group["responses"]
                         for value in (r[name] if name == "logprobs" else [r[name]] * len(r["ids"]))])


# ---- sampler and trainer ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("budget", [1, 30, 1000])  # 1 and 30 cut groups between their responses
def test_right_after_sampling_the_ratio_is_one(temperature, budget):
    model = tiny(std=0.4)
    groups = some_groups(model, temperature)
    assert len({len(r["ids"]) for group in groups for r in group["responses"]}) > 3
    assert max(i for group in groups for r in group["responses"] for i in r["ids"]) < V
    other = 0.0
    for micro in micro_batches(groups, budget):
        packed, said = pack(micro), of_tokens("logprobs", micro)
        found = logprobs_of(model, packed, V, temperature)
        assert ((found - said).exp() - 1).abs().max() < 1e-4
        for wrong in (logprobs_of(model, packed, None, temperature), logprobs_of(model, packed, V, 1.1 * temperature)):
            other = max(other, (wrong - said).abs().max())
        A = of_tokens("advantage", micro)
        h, W = simrl.states(model, packed, torch.float32), model.head_weight[:V]
        _, sums = head_loss(h, W, torch.ones(len(A)), objective(packed["targets"], A, found, temperature=temperature))
        assert sums["policy"] == pytest.approx(-A.sum().item(), abs=1e-5) and sums["clipped"] == 0
    assert other > 0.01  # width and temperature do count


def test_the_loop_trains_on_what_it_sampled(tmp_path):
    run(tmp_path, temperature=0.8, steps=4)
    for row in lines(tmp_path / "metrics.jsonl"):
        assert row["mismatch"] < 1e-4 and row["groups_kept"] > 0


def test_samples_depend_on_the_prompts_number_alone(tmp_path):
    """Not on how many are sampled together (nor on ranks: see below)."""
    run(tmp_path / "a", rows=8, steps=1)
    run(tmp_path / "b", rows=1000, steps=1)
    a, b = (lines(tmp_path / name / "samples.jsonl") for name in "ab")
    assert a == b
    run(tmp_path / "c", prompts=PROMPTS[:1], steps=2, lr=0.0)  # one prompt 16 times, drawn from anew each time
    assert len({tuple(r["text"] for r in group["samples"]) for group in lines(tmp_path / "c" / "samples.jsonl")}) == 16
    run(tmp_path / "d", steps=1, seed=43)
    assert lines(tmp_path / "d" / "samples.jsonl") != a


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


def test_the_clip_acts_on_the_side_that_went_far_enough():
    """Five tokens at ratios 0.5 … 1.5, each sign; beyond the clip there is no gradient, on the other side all of it."""
    ratios = torch.tensor([0.5, 0.85, 1.0, 1.15, 1.5], dtype=torch.float64)
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    targets = torch.arange(5)
    log_p = logits.detach().log_softmax(-1)
    for A, free in ((2.0, [True, True, True, True, False]), (-2.0, [False, True, True, True, True])):
        apply = objective(targets, torch.full((5,), A), log_p[targets, targets] - ratios.log())
        losses, stats = apply(logits, slice(0, 5))
        held = ratios.clamp(0.8, 1.2)
        assert torch.allclose(losses, -A * torch.where(torch.tensor(free), ratios, held))
        assert stats["clipped"].tolist() == [not f for f in free]
        grad, = torch.autograd.grad(losses.sum(), logits)
        onehot = torch.eye(V, dtype=torch.float64)[targets]
        expected = -A * ratios[:, None] * (onehot - log_p.exp()) * torch.tensor(free)[:, None]
        assert torch.allclose(grad, expected, atol=1e-12)


def test_kl_is_k2_and_ends_at_ten():
    logits = torch.zeros(3, V, dtype=torch.float64, requires_grad=True)
    log_p = torch.full((3,), -math.log(V), dtype=torch.float64)
    away = torch.tensor([-0.7, 4.4, 4.6], dtype=torch.float64)  # 0.5 * 4.6^2 > 10
    losses, stats = objective(torch.arange(3), torch.zeros(3), log_p, log_p - away, 0.5)(logits, slice(0, 3))
    assert torch.allclose(stats["kl"], torch.tensor([0.245, 9.68, 10.0]).double())
    assert torch.allclose(losses, 0.5 * stats["kl"]) and stats["policy"].abs().max() == 0
    grad, = torch.autograd.grad(losses.sum(), logits)
    onehot = torch.eye(V, dtype=torch.float64)[:3]
    expected = 0.5 * away[:, None] * (onehot - 1 / V) * torch.tensor([[1.0], [1.0], [0.0]])
    assert torch.allclose(grad, expected)
    assert torch.allclose(stats["entropy"], torch.full((3,), math.log(V)).double())


def test_token_weights():
    """Each sums to 1 over an optimiser batch, and gives its tokens what its name says."""
    groups = some_groups(tiny(std=0.4), 1.0)
    parts = micro_batches(groups, 30)
    lengths = [len(r["ids"]) for group in groups for r in group["responses"]]
    assert len(parts) > 2 and any(len(part[0]["responses"]) < 4 for part in parts)
    for kind in ("token", "sequence", "micro-batch"):
        found = [token_weights(kind, pack(micro)["response"], groups, len(parts), torch.float64) for micro in parts]
        assert torch.cat(found).sum() == pytest.approx(1.0)
        for micro, weights in zip(parts, found):
            tokens = [len(r["ids"]) for group in micro for r in group["responses"]]
            wanted = {"token": [1 / sum(lengths)] * sum(tokens), "micro-batch": [1 / len(parts) / sum(tokens)] *
                      sum(tokens), "sequence": [1 / len(lengths) / t for t in tokens for _ in range(t)]}[kind]
            assert weights.tolist() == pytest.approx(wanted)


# ---- the whole step against the slow loop ----------------------------------------------------------------------------

class Spy:
    """What the loop handed to its optimiser: for each update the groups, the weights before it and the gradient."""

    def __init__(self, monkeypatch):
        self.batches, self.weights, self.grads, self.first = [], [], [], []
        cut, step = simrl.optimiser_batches, simrl.optimiser_step
        monkeypatch.setattr(simrl, "optimiser_batches", lambda *a: self.cut(cut(*a)))
        monkeypatch.setattr(simrl, "optimiser_step", lambda model, *a: self.step(model) or step(model, *a))

    def cut(self, batches):
        self.first += [len(self.batches)] * len(batches)  # the update before which these were sampled
        self.batches += batches
        return batches

    def step(self, model):
        self.weights.append(flat(model))
        self.grads.append(flat(model, grads=True))


def with_weights(model, values):
    with torch.no_grad():
        for p, part in zip(model.parameters(), values.split([p.numel() for p in model.parameters()])):
            p.copy_(part.view(p.shape))
    return model


def said_by(model, prompt, ids, T):
    """Log-probs of a response, from a row of its own and all its logits."""
    logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1, :V] / T
    return logits.log_softmax(-1)[range(len(ids)), ids]


def slow_loss(model, old, reference, groups, loss_mean, kl_weight, kind, T, budget):
    """The loss of one optimiser batch, response by response and token by token, from Eqs. 11, 12 and paper.md 1.6."""
    parts, clipped = micro_batches(groups, budget) if loss_mean == "micro-batch" else [groups], 0
    norm = {}
    for group in groups:
        R = torch.tensor([r["reward"] for r in group["responses"]], dtype=torch.float64)
        A = R - R.mean() if kind == "dr_grpo" else (R - R.mean()) / (R.std() + 1e-9)
        A = A * (R.max() > R.min())  # else rounding errors over 1e-9
        norm |= {id(r): a for r, a in zip(group["responses"], A)}
    means = []
    for part in parts:
        responses = [(group["prompt"], r) for group in part for r in group["responses"]]
        losses = []
        for prompt, r in responses:
            with torch.no_grad():
                before, near = (said_by(m, prompt, r["ids"], T) for m in (old, reference))
            losses.append([])
            for now, was, ref in zip(said_by(model, prompt, r["ids"], T), before, near):
                ratio, A = (now - was).exp(), norm[id(r)]
                held = min(max(ratio.item(), 0.8), 1.2) * A
                clipped += bool(held < ratio * A)
                losses[-1].append(-min(ratio * A, held) + kl_weight * 0.5 * (now - ref) ** 2)
        if loss_mean == "sequence":
            means.append(sum(sum(l) / len(l) for l in losses) / len(losses))
        else:
            means.append(sum(map(sum, losses)) / sum(map(len, losses)))
    return sum(means) / len(means), clipped


@pytest.mark.parametrize("loss_mean,kind,budget", [
    ("token", "group_norm", 24), ("sequence", "dr_grpo", 24), ("sequence", "group_norm", 10_000),
    ("micro-batch", "group_norm", 24)])
def test_every_update_is_the_slow_loops(loss_mean, kind, budget, tmp_path, monkeypatch):
    """The gradients that reach the optimiser, and by finite differences that they are those of the slow loop's loss."""
    double, spy = torch.float64, Spy(monkeypatch)
    reference, settings = tiny(1, double), {"loss_mean": loss_mean, "kl_weight": 0.3}
    run(tmp_path, model=tiny(0, double), reference=reference, dtype=double, steps=2, group_size=3, prompts_per_step=4,
        batch=6, lr=0.02, temperature=0.8, keep="none", advantage=kind, micro_tokens=budget, **settings)
    assert len(spy.grads) == 4 and spy.first == [0, 0, 2, 2]
    model, clips, losses = tiny(0, double), 0, []
    for groups, weights, grad, first in zip(spy.batches, spy.weights, spy.grads, spy.first):
        old = with_weights(tiny(0, double), spy.weights[first])
        slow = lambda values: slow_loss(with_weights(model, values), old, reference, groups,  # noqa: E731, B023
                                        **settings, kind=kind, T=0.8, budget=budget)
        model.zero_grad()
        loss, clipped = slow(weights)
        loss.backward()
        assert torch.allclose(flat(model, grads=True), grad, atol=1e-9)
        clips, losses = clips + clipped, losses + [loss.item()]
        way = torch.randn(len(weights), generator=torch.Generator().manual_seed(0), dtype=double)
        with torch.no_grad():
            slope = (slow(weights + 1e-6 * way)[0] - slow(weights - 1e-6 * way)[0]) / 2e-6
        assert slope.item() == pytest.approx((grad @ way).item(), rel=1e-5)
    assert clips > 0  # the second update of a step is off-policy enough
    for row, two in zip(lines(tmp_path / "metrics.jsonl"), (losses[:2], losses[2:])):
        assert row["loss"] == pytest.approx(sum(two) / 2)


@pytest.mark.parametrize("loss_mean", ["token", "sequence", "micro-batch"])
def test_the_gradient_does_not_depend_on_micro_batches(loss_mean, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    for budget in (1, 60, 10_000):
        run(tmp_path / str(budget), model=tiny(0, torch.float64), dtype=torch.float64, steps=1, batch=64,
            reference=tiny(1, torch.float64), kl_weight=0.1, loss_mean=loss_mean, micro_tokens=budget)
    one, some, whole = spy.grads
    for other in (one, some):  # `micro-batch`, as released, does depend on them
        assert torch.allclose(other, whole, atol=1e-9) == (loss_mean != "micro-batch")


def test_a_flat_group_has_no_policy_gradient(tmp_path):
    result, model = run(tmp_path, lambda *_: {"reward": 0.3, "answer_score": 0.3}, keep="none")
    assert result["updates"] == 6 and torch.equal(flat(model), flat(tiny()))


# ---- what the loop keeps, writes and learns --------------------------------------------------------------------------

def test_defaults_are_the_released_settings():
    """paper.md 2."""
    defaults = {name: p.default for name, p in inspect.signature(refine).parameters.items()}
    for name, value in {"prompts_per_step": 128, "group_size": 8, "batch": 128, "lr": 3e-7, "kl_weight": 1e-3,
                        "clip": (0.2, 0.2), "temperature": 1.0, "max_new_tokens": 512, "episodes": 3,
                        "weight_decay": 0.0, "advantage": "group_norm", "keep": "scores"}.items():
        assert defaults[name] == value


def test_prompts_come_in_passes_shuffled_by_seed_and_pass():
    drawn = [p["gold"] for first in range(0, 24, 4) for p in draw(PROMPTS, 7, first, 4)]
    assert drawn == [p["gold"] for p in draw(PROMPTS, 7, 0, 24)]
    passes = [drawn[i:i + 8] for i in (0, 8, 16)]
    assert all(sorted(part) == sorted(p["gold"] for p in PROMPTS) for part in passes)
    assert len(set(map(tuple, passes))) == 3 and drawn != [p["gold"] for p in draw(PROMPTS, 8, 0, 24)]


def some_teach(*numbers):
    """A reward that differs within groups of these answers only."""
    turn = [0]

    def reward(record, _):
        turn[0] += 1
        score = 0.5 if record["answer"] not in numbers else turn[0] % 2
        return {"reward": score - 0.25, "answer_score": score}

    return reward


def test_more_prompts_are_drawn_until_the_batch_is_full(tmp_path):
    result, _ = run(tmp_path, some_teach(2, 3, 4, 5, 6), steps=2, max_draws=4)
    rows, groups = lines(tmp_path / "metrics.jsonl"), lines(tmp_path / "samples.jsonl")
    for row in rows:
        mine = [group for group in groups if group["step"] == row["step"]]
        teaching = [group for group in mine if int(group["gold"].split()[0]) < 7]
        assert row["groups_drawn"] == len(mine) == 16 and row["groups_kept"] == 8
        assert row["signal"] == len(teaching) / 16 == 10 / 16
        assert [group["kept"] for group in teaching] == [True] * 8 + [False] * 2  # the surplus is dropped
        assert sum(group["kept"] for group in mine) == 8
    assert [row["updates"] for row in rows] == [2, 4] and result["prompts_drawn"] == 32
    assert [group["gold"] for group in groups] == [p["gold"] for p in draw(PROMPTS, 42, 0, 32)]


@pytest.mark.parametrize("keep,kept", [("scores", 0), ("rewards", 8), ("none", 8)])
def test_drawing_is_bounded_and_minus_one_against_zero_teaches_by_rewards(keep, kept, tmp_path):
    turn = iter(range(10_000))
    result, model = run(tmp_path, lambda *_: {"reward": -float(next(turn) % 2), "answer_score": 0.0}, steps=1,
                        max_draws=3, keep=keep)
    row, = lines(tmp_path / "metrics.jsonl")
    assert (row["groups_kept"], row["groups_drawn"], row["updates"]) == (kept, 8 if kept else 24, 2 if kept else 0)
    assert row["format_failures"] == 0.5 and ("loss" in row) == (kept > 0)
    assert torch.equal(flat(model), flat(tiny())) == (kept == 0)


def test_steps_without_a_group_count_and_can_be_resumed(tmp_path):
    """The first two teach nothing, so the optimiser has not stepped yet at the checkpoints after them."""
    def late(after, stop=math.inf):
        count = [0]

        def reward(*_):
            count[0] += 1
            if count[0] > stop:
                raise InterruptedError
            score = float(count[0] > after and count[0] % 2)
            return {"reward": score, "answer_score": score}

        return reward

    _, whole = run(tmp_path / "whole", late(128), steps=4)
    with pytest.raises(InterruptedError):
        run(tmp_path / "part", late(128, stop=128), steps=4, save_every=1)
    _, resumed = run(tmp_path / "part", late(0), steps=4, save_every=1, start=2)
    assert [row["updates"] for row in lines(tmp_path / "part/metrics.jsonl")] == [0, 0, 2, 4]
    assert torch.equal(flat(whole), flat(resumed)) and not torch.equal(flat(whole), flat(tiny()))


def test_what_is_written(tmp_path):
    result, _ = run(tmp_path, lambda record, text: similar(record, text) | {"why": "so"}, kl_weight=0.1,
                    reference=tiny(), steps=5, save_every=2)
    rows, groups = lines(tmp_path / "metrics.jsonl"), lines(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and len(groups) == 40
    for row in rows:
        mine = [group for group in groups if group["step"] == row["step"]]
        samples = [r for group in mine for r in group["samples"]]
        mean = lambda values: sum(values) / 64  # noqa: E731
        assert row["reward"] == pytest.approx(mean([r["reward"] for r in samples]))
        assert row["answer_score"] == pytest.approx(mean([r["answer_score"] for r in samples]))
        assert row["format_failures"] == mean([r["text"].startswith("0") for r in samples])
        assert row["finished"] == mean([r["finish_reason"] == "stop" for r in samples])
        assert row["length"] == mean([len(r["text"].split()) for r in samples])
        assert row["tokens"] == sum(len(r["text"].split()) for group in mine if group["kept"] for r in group["samples"])
        assert row["groups_kept"] == sum(group["kept"] for group in mine) == row["signal"] * row["groups_drawn"]
        assert {"reward_std", "clipped", "kl", "entropy", "lr", "grad_norm", "seconds_sampling", "seconds_scoring",
                "seconds_training"} <= set(row)
    assert 0 <= rows[0]["kl"] < rows[-1]["kl"] and 0 < rows[0]["entropy"] < math.log(V)
    group = groups[0]
    assert group["prompt"].split()[-2] == group["gold"].split()[0]
    for r in group["samples"]:
        assert set(r) == {"text", "finish_reason", "reward", "answer_score", "advantage", "why"}
        assert (r["finish_reason"] == "stop") == r["text"].endswith("0")
        assert len(r["text"].split()) == 3 or r["finish_reason"] == "stop"  # nothing is appended to what was cut off
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    assert json.loads((tmp_path / "checkpoints/step-000005/progress.json").read_text()) == {
        "prompts": 40, "updates": rows[-1]["updates"]}
    assert result["reward_first"] == round(rows[0]["reward"], 4) and result["updates"] == rows[-1]["updates"]
    assert (result["steps"], result["prompts_drawn"]) == (5, 40)


def test_default_steps_and_the_schedule(tmp_path, monkeypatch):
    """floor(prompts x episodes / prompts a step), at least one; the rate counts optimiser steps and ends at a tenth."""
    asked = []
    monkeypatch.setattr(simrl, "learning_rate", lambda *a: asked.append(a) or train.learning_rate(*a))
    assert run(tmp_path / "a", steps=None, episodes=5, prompts_per_step=6, keep="none")[0]["steps"] == 6  # 40 / 6
    assert asked == [(i, 12, 5e-3) for i in range(1, 13)]  # 6 x 8 responses: 32 and 16
    assert lines(tmp_path / "a/metrics.jsonl")[-1]["lr"] == pytest.approx(5e-4)
    assert run(tmp_path / "b", steps=None, episodes=1, prompts_per_step=20, keep="none")[0]["steps"] == 1


def test_one_model_in_memory_where_one_will_do(tmp_path, monkeypatch):
    """No reference without a KL; the bfloat16 sampler is a fresh copy each step and gone before the training."""
    for wrong in ({"kl_weight": 0.1}, {"reference": tiny()}):
        with pytest.raises(ValueError, match="reference"):
            run(tmp_path / "wrong", **wrong)
    copies, alive, model = [], [], tiny()
    copy, states = model.copy, simrl.states
    model.copy = lambda dtype: (twin := copy(dtype), copies.append(weakref.ref(twin)))[0]
    monkeypatch.setattr(simrl, "states", lambda *a: alive.append(copies[-1]() is not None) or states(*a))
    run(tmp_path / "run", model=model, dtype=torch.bfloat16, steps=2)
    assert len(copies) == 2 and alive and not any(alive)
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert all(1e-6 < row["mismatch"] < 0.05 for row in rows)  # bfloat16 sampler and trainer do differ a little
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reward_climbs_to_its_ceiling_and_falls_when_flipped(seed, tmp_path):
    def flipped(record, text):
        found = similar(record, text)
        return found | {"reward": -found["reward"]}

    for name, reward in (("up", similar), ("down", flipped)):
        run(tmp_path / name, reward, tiny(seed), steps=30, seed=seed, save_every=100, keep="rewards", lr=3e-3,
            group_size=16, prompts_per_step=16, batch=64, max_new_tokens=2, kl_weight=1e-3, reference=tiny(seed))
    up, down = ([row["answer_score"] for row in lines(tmp_path / name / "metrics.jsonl")] for name in ("up", "down"))
    assert up[0] == down[0] < 0.35  # noise
    assert sum(up[-5:]) / 5 > 0.85 and sum(down[-5:]) / 5 < 0.12


# ---- killed, interrupted, resumed, several processes -----------------------------------------------------------------

def main(out, *flags):
    """The run that the tests below start as a process: 10 steps, several draws a step, slow enough to be killed."""
    torch.set_num_threads(1)
    device, rank, ranks = train.set_up("cpu")
    start = train.open_run(out, {}, "--resume" in flags, False, device, rank)
    pause = 0.002 if "--slow" in flags else 0.0

    def reward(record, text):
        time.sleep(pause)
        found = similar(record, text)
        return found | {"answer_score": float(found["answer_score"] > 0.7)}  # not every group has a signal

    _, model = run(out, reward, kl_weight=0.01, reference=tiny(), steps=10, prompts_per_step=6, max_draws=2,
                   save_every=2, micro_tokens=40, start=start, rank=rank, ranks=ranks)
    if _ is None:
        return 130
    if rank == 0:
        model.save_pretrained(Path(out) / "model")
    return 0


def process(out, *flags, launcher=()):
    root = str(Path(__file__).parents[1])
    return subprocess.Popen([sys.executable, *launcher, __file__, str(out), *flags], stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root})


def until(started, happened):
    while not happened():
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.001)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(out) == 0
    return out


def is_the_same(out, whole):
    assert (out / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    a, b = ([{k: v for k, v in row.items() if not k.startswith("seconds")} for row in lines(path / "metrics.jsonl")]
            for path in (out, whole))
    assert a == b
    assert (out / "checkpoints/step-000010/progress.json").read_bytes() == (
        whole / "checkpoints/step-000010/progress.json").read_bytes()


def test_killed_and_resumed(tmp_path, whole):
    out = tmp_path / "run"
    rows = lines(whole / "metrics.jsonl")
    assert len({row["groups_drawn"] for row in rows}) > 1 and len({row["groups_kept"] for row in rows}) > 1
    moments = (lambda: (out / "checkpoints").exists(),  # while the first checkpoint is written, or just after
               lambda: '"step": 5,' in (out / "metrics.jsonl").read_text())  # between two
    for happened in moments:
        started = process(out, "--resume", "--slow")
        until(started, happened)
        started.kill()
        started.communicate()
        assert started.returncode == -signal.SIGKILL
    with open(out / "samples.jsonl", "ab") as file:
        file.write('{"step": 9, "gold": "ü'.encode()[:-1])  # half a line that ends within a character
    assert main(out, "--resume") == 0
    is_the_same(out, whole)


def test_interrupted_and_resumed(tmp_path, whole):
    out = tmp_path / "run"
    started = process(out, "--slow")
    until(started, lambda: (out / "metrics.jsonl").exists() and '"step": 3,' in (out / "metrics.jsonl").read_text())
    started.send_signal(signal.SIGINT)
    _, error = started.communicate()
    assert started.returncode == 130 and "Stopping after this step" in error and "Traceback" not in error
    last = lines(out / "metrics.jsonl")[-1]["step"]
    assert 4 <= last < 10 and (out / f"checkpoints/step-{last:06d}/progress.json").exists()
    assert main(out, "--resume") == 0
    is_the_same(out, whole)


def test_the_optimiser_resumes_at_its_own_count(whole):
    """A step is one rollout batch; AdamW counts optimiser steps."""
    model = tiny()
    optimisers = train.adamw(model, 1.0, 0.0)
    progress = train.load_checkpoint(whole, 8, model, optimisers)
    updates = lines(whole / "metrics.jsonl")[7]["updates"]
    assert progress["updates"] == updates > 8 and progress["prompts"] > 8 * 6
    assert {state["step"].item() for state in optimisers[0].state.values()} == {updates}


def test_two_processes_are_one(tmp_path, whole):
    started = process(tmp_path / "two", launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                                                  "2", "--"))
    _, error = started.communicate()
    assert started.returncode == 0, error
    one, two = (lines(out / "samples.jsonl") for out in (whole, tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        assert [r["text"] for r in a["samples"]] == [r["text"] for r in b["samples"]] and a["kept"] == b["kept"]
    one, two = (lines(out / "metrics.jsonl") for out in (whole, tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        assert all(b[k] == pytest.approx(v, rel=1e-3, abs=1e-4) for k, v in a.items() if not k.startswith("seconds"))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))

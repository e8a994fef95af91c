"""The objectives against textbook loops, formulas and identities; the chunked head loss; the teacher and its cache."""
import inspect
import json
import math

import pytest
import torch
import torch.nn.functional as F

import ckd
from ckd import objective, teacher_log_probs
from data import InputError
from data.groups import pack, visible
from model import Transformer
from train import adamw, head_loss, muon, optimiser_step

KINDS = ["ckd", "fkl", "rkl", "akl", "rskd", "ce"]
V, K, M, N, H = 40, 6, 9, 11, 8


def world(dtype=torch.float64, seed=0, N=N, V=V, H=H):
    """Hidden states, a head, targets and a teacher whose top-k omits a visible mass, at odds with the student."""
    g = torch.Generator().manual_seed(seed)
    h, W = torch.randn(N, H, generator=g, dtype=dtype), torch.randn(V, H, generator=g, dtype=dtype)
    teacher = (2 * torch.randn(N, V, generator=g, dtype=dtype)).log_softmax(-1)
    targets = torch.randint(0, V, (N,), generator=g)
    weights = torch.rand(N, generator=g, dtype=dtype)
    return h.requires_grad_(), W.requires_grad_(), teacher, targets, weights


def seen_by(kind, teacher, k=K):
    """What `teacher_log_probs` would return for these log-probs."""
    if kind != "rskd":
        return teacher.topk(k).indices, teacher.topk(k).values
    ids = torch.multinomial(teacher.exp(), k, replacement=True, generator=torch.Generator().manual_seed(5))
    return ids, (ids[:, :, None] == ids[:, None, :]).to(teacher.dtype).mean(-1).log()


def textbook(kind, logits, teacher, targets, ids, lam, m, kd_ratio):
    """Per-position losses with Python loops over tokens, written from paper.md 1.2. Differentiable."""
    losses = []
    for z, t, y, V_k in zip(logits, teacher, targets, ids.tolist()):
        log_q = z - z.exp().sum().log()
        q, p = log_q.exp(), t.exp()
        nll = -log_q[y]
        fkl = sum(p[v] * (t[v] - log_q[v]) for v in V_k)
        rkl = sum(q[v] * (log_q[v] - t[v]) for v in V_k)
        V_m = q.argsort(descending=True)[:m].tolist()
        tail = sum((q[v] for v in V_m if v not in V_k), torch.zeros((), dtype=z.dtype))
        if kind == "akl":
            head, mass = [], 0.0
            for i, v in enumerate(sorted(V_k, key=lambda v: -p[v])):
                mass += p[v].item()
                if i == 0 or mass < 0.5:
                    head.append(v)
            g_head = sum((p[v] - q[v]).abs() for v in head)
            g_tail = sum(((p[v] - q[v]).abs() for v in V_k if v not in head), torch.zeros((), dtype=z.dtype))
            kl = (g_head * fkl + g_tail * rkl) / (g_head + g_tail)
        elif kind == "rskd":  # the library's KL against the counts of a dense target
            target = torch.zeros_like(z)
            for v in V_k:
                target[v] += 1 / len(V_k)
            kl, tail = F.kl_div(log_q, target, reduction="sum"), 0.0
        else:
            kl = rkl if kind == "rkl" else fkl
        losses.append(nll if kind == "ce" else kd_ratio * (kl + lam * tail) + (1 - kd_ratio) * nll)
    return torch.stack(losses)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kd_ratio", [1.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_loss_equals_the_textbook_over_all_positions(kind, kd_ratio, dtype):
    h, W, teacher, targets, weights = world(dtype)
    ids, log_p = seen_by(kind, teacher)
    lam = 0.0 if kind == "rskd" else 10.0
    expected = textbook(kind, h @ W.T, teacher, targets, ids, lam, M, kd_ratio) @ weights
    grads = torch.autograd.grad(expected, (h, W))
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    for chunk in (1, 4, 100):
        loss, sums = head_loss(h, W, weights, objective(kind, targets, (ids, log_p), lam, M, kd_ratio), chunk)
        ours = torch.autograd.grad(3 * loss, (h, W))  # 3: what comes down from above is heeded
        assert loss.dtype == dtype and torch.allclose(loss, expected, rtol=tolerance)
        for a, b in zip(ours, grads):
            assert torch.allclose(a / 3, b, atol=tolerance * b.abs().max(), rtol=0)
        q = (h @ W.T).softmax(-1).detach()
        assert torch.allclose(sums["entropy"], -(q * q.log()).sum())
        if kind != "rskd":
            assert torch.allclose(sums["inside"], q.gather(-1, ids).sum())
            assert torch.allclose(sums["captured"], log_p.exp().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    h, W, teacher, targets, weights = world(N=4, V=10, H=3)
    apply = objective(kind, targets, seen_by(kind, teacher, k=3), 2.0, 4, 0.7)
    assert torch.autograd.gradcheck(lambda h, W: head_loss(h, W, weights, apply, chunk=3)[0], (h, W))


def test_whole_vocabulary_without_penalty_is_the_full_kl():
    h, W, teacher, targets, _ = world()
    logits = h @ W.T
    seen = seen_by("fkl", teacher, k=V)
    forward, _ = objective("ckd", targets, seen, 0.0, M)(logits, slice(None))
    assert torch.allclose(forward, F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="none").sum(-1))
    reverse, _ = objective("rkl", targets, seen, 0.0, M)(logits, slice(None))
    assert torch.allclose(reverse, F.kl_div(teacher, logits.log_softmax(-1), log_target=True, reduction="none").sum(-1))
    _, stats = objective("ckd", targets, seen, 10.0, M)(logits, slice(None))
    assert torch.allclose(stats["captured"], torch.ones(N).double()) and stats["tail"].abs().max() == 0


@pytest.mark.parametrize("kind", ["ckd", "fkl", "rkl", "akl"])
def test_equal_models_have_no_divergence_and_no_tail(kind):
    _, _, teacher, targets, _ = world()
    losses, stats = objective(kind, targets, seen_by(kind, teacher), 10.0, K)(teacher.clone(), slice(None))
    assert losses.abs().max() < 1e-12 and stats["tail"].abs().max() == 0


@pytest.mark.parametrize("lam", [0.0, 1.0, 10.0])
def test_ckd_gradient_is_the_formula(lam):
    """dL/dz_j = q_j (P - lam S') - p_j [j in V_k] + lam q_j [j in V_m, not in V_k]: Eqs. 14, 26, 27."""
    h, W, teacher, targets, _ = world()
    z = (h @ W.T).detach().requires_grad_()
    ids, log_p = seen_by("ckd", teacher)
    losses, stats = objective("ckd", targets, (ids, log_p), lam, M)(z, slice(None))
    grad, = torch.autograd.grad(losses.sum(), z)
    q, P, S = z.softmax(-1), log_p.exp().sum(-1, keepdim=True), stats["tail"][:, None]
    in_K = torch.zeros_like(q).scatter(-1, ids, 1.0)
    mistakes = torch.zeros_like(q).scatter(-1, q.topk(M).indices, 1.0) * (1 - in_K)
    assert (mistakes.sum(-1) > 0).all() and (P < 0.99).all()  # both terms have something to say
    expected = q * (P - lam * S) - teacher.exp() * in_K + lam * q * mistakes
    assert torch.allclose(grad, expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["fkl", "ckd", "rkl"])
def test_minimisers(kind):
    """FKL-k and CKD end at q = p/P on V_k; RKL-k at q = p/e, with 1 - P/e of the mass outside (paper.md 1.4)."""
    g = torch.Generator().manual_seed(3)
    teacher = torch.randn(1, 12, generator=g, dtype=torch.float64).log_softmax(-1)
    ids, log_p = seen_by(kind, teacher, k=4)
    p = log_p.exp()
    P = p.sum().item()
    assert 0.5 < P < 0.9
    z = torch.randn(1, 12, generator=g, dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.LBFGS([z], max_iter=400, tolerance_grad=1e-9, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        losses, _ = objective(kind, torch.zeros(1, dtype=torch.long), (ids, log_p), 10.0 * (kind == "ckd"), 4)(
            z, slice(None))
        losses.sum().backward()
        return losses.sum()

    value = optimiser.step(closure) and closure().item()
    q = z.detach().softmax(-1)
    if kind == "rkl":
        assert torch.allclose(q.gather(-1, ids), p / math.e, atol=1e-5)
        assert abs(1 - q.gather(-1, ids).sum().item() - (1 - P / math.e)) < 1e-5 and abs(value + P / math.e) < 1e-8
    else:
        assert torch.allclose(q.gather(-1, ids), p / P, atol=1e-3) and abs(value - P * math.log(P)) < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# The teacher, the cache and the loop on a tiny pair

CONFIG = {"model_type": "qwen3", "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}


def tiny(seed, **settings):
    return Transformer(CONFIG | settings).init_weights(seed, std=0.4).double()


def some_groups(count=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, V, (n,), generator=g).tolist()  # noqa: E731
    return [{"prompt": draw(3 + i), "responses": [{"ids": draw(2 + j + i % 3), "span": (0, 2 + j + i % 3)}
                                                  for j in range(1 + i % 4)]} for i in range(count)]


def run(tmp_path, name, load=None, kind="ckd", k=K, cache=None, made_from=None, width=V, micro_tokens=64, **settings):
    """A few steps of `distill` in float64; returns the student's weights in one vector."""
    student, groups, valid, out = tiny(1), some_groups(), some_groups(2, seed=9), tmp_path / name
    out.mkdir()
    teacher = ckd.open_teacher(load, groups + valid, kind, k, width, "cpu", micro_tokens, 42, cache, made_from)
    settings = {"batch": 6, "m": M, "lr": 1e-2, "dtype": torch.float64, "micro_tokens": micro_tokens} | settings
    ckd.distill(student, groups, valid, out, teacher, kind, width=width, **settings)
    return torch.cat([p.detach().flatten() for p in student.parameters()])


def test_teacher_top_k_and_draws():
    teacher, batch = tiny(0), pack(some_groups())
    full = teacher(*(batch[n] for n in ("input_ids", "positions")), mask=visible(batch)).flatten(0, 1)
    full = full[batch["predictors"]].log_softmax(-1)
    ids, log_p = teacher_log_probs(teacher, batch, K, V, chunk=5)
    assert torch.equal(ids, full.topk(K).indices) and torch.allclose(log_p.double(), full.topk(K).values, atol=1e-6)
    ids, log_p = teacher_log_probs(teacher, batch, 500, V, torch.Generator().manual_seed(0))
    shares = torch.stack([torch.bincount(row, minlength=V) for row in ids]) / 500
    assert torch.allclose(shares.gather(-1, ids), log_p.exp(), atol=1e-6)  # the log of each token's share of the draws
    # A share of 500 draws has a standard deviation of at most 0.0224: six of them, on some 2,000 shares, are left to
    # chance once in a quarter of a million runs.
    assert (shares - full.exp()).abs().max() < 6 * 0.0224


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_live(kind, tmp_path):
    load = lambda: tiny(0)  # noqa: E731
    start = torch.cat([p.detach().flatten() for p in tiny(1).parameters()])
    live = run(tmp_path, "live", load, kind=kind)
    written = run(tmp_path, "written", load, kind=kind, cache=tmp_path / "cache", made_from={})
    read = run(tmp_path, "read", lambda: pytest.fail("the teacher was loaded"), kind=kind, cache=tmp_path / "cache",
               made_from={})
    assert torch.equal(written, read) and (live - start).abs().max() > 5e-3  # they moved
    if kind != "rskd":  # which draws anew live and once and for all in the cache
        live, read = (first_step(tmp_path / name) for name in ("live", "read"))
        for name in ("loss", "kl", "tail", "captured", "inside", "grad_norm"):
            assert read[name] == pytest.approx(live[name], rel=1e-3, abs=1e-3), name  # float16 log-probs


def first_step(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["step"] == 1)


def test_a_cache_of_something_else_is_refused(tmp_path):
    made = {"teacher": "a", "tokenizer": "t"}
    run(tmp_path, "first", lambda: tiny(0), cache=tmp_path / "cache", made_from=made)
    for word, change in [("teacher", {"made_from": made | {"teacher": "b"}}), ("k", {"k": K - 1}),
                         ("tokenizer", {"made_from": made | {"tokenizer": "u"}})]:
        with pytest.raises(InputError, match=f"another {word}"):
            run(tmp_path, word, lambda: tiny(0), cache=tmp_path / "cache", **({"made_from": made} | change))
    groups = some_groups()
    groups[2]["responses"][0]["ids"][-1] ^= 1  # one token of the data
    with pytest.raises(InputError, match="another data"):
        ckd.open_teacher(None, groups + some_groups(2, seed=9), k=K, width=V, cache=tmp_path / "cache", made_from=made)


@pytest.mark.parametrize("kind", ["ckd", "akl", "rskd", "ce"])
def test_the_run_does_not_depend_on_micro_batches(kind, tmp_path):
    settings = {"kind": kind, "cache": tmp_path / "cache", "made_from": {}}
    whole = run(tmp_path, "whole", lambda: tiny(0), micro_tokens=10_000, **settings)
    assert torch.allclose(whole, run(tmp_path, "split", lambda: tiny(0), micro_tokens=1, **settings), atol=1e-9)


def test_paddings_of_different_widths_are_cut_to_the_tokenizer(tmp_path):
    """A teacher with more padding rows gives the run of one with none, once both are cut."""
    wide = tiny(0, vocab_size=V + 24)
    with torch.no_grad():
        wide.model.embed_tokens.weight[:V] = tiny(0).model.embed_tokens.weight
        for (name, p), q in zip(list(wide.named_parameters())[1:], list(tiny(0).parameters())[1:]):
            p.copy_(q)
    assert torch.equal(run(tmp_path, "same", lambda: tiny(0)), run(tmp_path, "cut", lambda: wide, width=V))


def test_training_moves_the_student_to_the_teacher(tmp_path):
    run(tmp_path, "out", lambda: tiny(0), steps=60, lr=3e-2)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["kl"] < 0.3 * rows[1]["kl"] and rows[-1]["inside"] > rows[1]["inside"]
    assert {"loss", "kl", "tail", "captured", "inside", "entropy", "nll", "tokens_per_s"} <= set(rows[1])


def test_validation_computes_no_gradient(monkeypatch):
    h, W, teacher, targets, weights = world()
    apply = objective("ckd", targets, seen_by("ckd", teacher), 10.0, M)
    with_gradient = head_loss(h, W, weights, apply)[0]
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        assert head_loss(h, W, weights, apply)[0] == with_gradient.detach()


def test_bfloat16_products_keep_the_direction_of_the_gradient():
    """The default precision: chunks in bfloat16, sums and objectives in float32, gradients in the parameters' own."""
    h, W, teacher, targets, weights = world(torch.float32)
    apply = objective("ckd", targets, seen_by("ckd", teacher), 10.0, M)
    exact, rounded = (torch.autograd.grad(head_loss(h, W, weights, apply, 4, dtype)[0], (h, W))
                      for dtype in (torch.float32, torch.bfloat16))
    for a, b in zip(exact, rounded):
        assert b.dtype == torch.float32 and not torch.equal(a, b)
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99
        assert abs(a.norm() / b.norm() - 1) < 0.02


def test_the_optimiser_is_the_released_one():
    model = Transformer(CONFIG | {"model_type": "qwen2"}).init_weights(0)
    matrices, vectors = adamw(model, 0.5, 0.25)[0].param_groups
    assert matrices["weight_decay"] == 0.25 and vectors["weight_decay"] == 0.0
    assert {p.dim() for p in matrices["params"]} == {2} and {p.dim() for p in vectors["params"]} == {1}
    assert matrices["betas"] == vectors["betas"] == (0.9, 0.95) and matrices["eps"] == 1e-8
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = [p.detach().clone() for p in model.parameters()]
    norm = optimiser_step(model, [torch.optim.SGD(model.parameters(), lr=9.0)], lr=1.0)  # the given rate counts
    moved = torch.cat([(a - p.detach()).flatten() for a, p in zip(before, model.parameters())])
    assert norm == pytest.approx(3 * model.size() ** 0.5, rel=1e-4)
    assert moved.norm() == pytest.approx(1.0, rel=1e-4)  # clipped to norm 1


def test_muon_takes_the_matrices_of_the_layers():
    model = Transformer(CONFIG)
    optimisers = muon(model, 0.5, 0.0)
    inside, beside = ({id(p) for group in o.param_groups for p in group["params"]} for o in optimisers)
    for name, p in model.named_parameters():
        p.grad = torch.ones_like(p)
        assert (id(p) in inside) == ("layers" in name and p.dim() == 2) != (id(p) in beside), name
    optimiser_step(model, optimisers, lr=0.1)
    assert [group["lr"] for o in optimisers for group in o.param_groups] == [0.5, 0.1, 0.1]


def test_defaults_are_the_released_settings():
    """paper.md 2."""
    import star
    flags = star.parser(star.__doc__, star.COMMANDS)
    a = flags.parse_args("ckd --teacher t --student s --data d --out o".split())
    assert (a.objective, a.k, a.m, a.kd_ratio, a.mask, a.batch, a.epochs) == ("ckd", 100, 100, 1.0, "all", 128, 1)
    assert (a.lr, a.weight_decay, a.max_prompt_tokens, a.max_response_tokens, a.seed) == (3e-6, 1e-4, 5120, 512, 42)
    a = flags.parse_args("rollout --model m --data d --out o".split())
    assert (a.n, a.temperature, a.top_p) == (8, 1.0, 1.0)
    defaults = inspect.signature(ckd.distill).parameters
    assert {name: defaults[name].default for name in ("kind", "m", "tail_weight", "lr", "weight_decay", "batch")} == {
        "kind": "ckd", "m": 100, "tail_weight": 10.0, "lr": 3e-6, "weight_decay": 1e-4, "batch": 128}


@pytest.mark.parametrize("objective,expected", [("ckd", 10.0), ("fkl", 0.0), ("akl", 0.0)])
def test_lambda_is_ten_for_ckd_and_none_for_the_others(objective, expected, monkeypatch):
    import star
    monkeypatch.setattr(star, "run_training", lambda *_, tail_weight, **__: tail_weight)
    flags = star.parser(star.__doc__, star.COMMANDS)
    a = flags.parse_args(f"ckd --teacher t --student s --data d --out o --objective {objective}".split())
    assert star.run_ckd(a) == expected
    a = flags.parse_args("ckd --teacher t --student s --data d --out o --tail-weight 2 --objective akl".split())
    assert star.run_ckd(a) == 2.0

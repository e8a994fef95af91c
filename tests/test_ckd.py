"""The losses against textbook loops, formulas and identities; the chunked head loss; teacher, cache and loop."""
import json
import math
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import ckd
from ckd import DIVERGENCES, ckd_loss, objective_loss, reverse_kl
from conftest import settings
from data import InputError
from data.cache import cache_key
from data.groups import Group, Response, attention_mask, pack, share_prefixes
from head import counted_states, head_loss, topk_log_probs
from model import Transformer
from teacher import Teacher, load_teacher
from train import Muon, make_optimisers, update

OBJECTIVES = ["ckd", "fkl", "rkl", "akl", "rskd", "ce"]
V, K, M, N, H = 40, 6, 9, 11, 8


def example(dtype=torch.float64, seed=0, N=N, V=V, H=H):
    """Hidden states, an output head, a teacher that disagrees with the student, targets and token weights.

    The teacher's top k leave out a visible part of its mass.
    """
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(N, H, generator=g, dtype=dtype)
    W = torch.randn(V, H, generator=g, dtype=dtype)
    teacher = (2 * torch.randn(N, V, generator=g, dtype=dtype)).log_softmax(-1)
    targets = torch.randint(0, V, (N,), generator=g)
    weights = torch.rand(N, generator=g, dtype=dtype)
    return h.requires_grad_(), W.requires_grad_(), teacher, targets, weights


def teacher_view(objective, teacher, k=K):
    """The ids and log-probs [N, k] that a `Teacher` with these log-probs returns."""
    if objective != "rskd":
        top = teacher.topk(k)
        return top.indices, top.values
    g = torch.Generator().manual_seed(5)
    ids = torch.multinomial(teacher.exp(), k, replacement=True, generator=g)
    same = ids[:, :, None] == ids[:, None, :]
    return ids, same.to(teacher.dtype).mean(-1).log()


def loss_function(objective, m=M, tail_weight=0.0, kd_ratio=1.0):
    """`ckd_loss` with the divergence of an objective."""
    kd_ratio = 0.0 if objective == "ce" else kd_ratio
    return partial(ckd_loss, m=m, tail_weight=tail_weight, divergence=DIVERGENCES[objective], kd_ratio=kd_ratio)


def textbook(objective, logits, teacher, targets, ids, lam, m, kd_ratio):
    """Losses per position with Python loops over tokens, written from Eqs. 3-5. Differentiable."""
    losses = []
    for z, t, y, V_k in zip(logits, teacher, targets, ids.tolist()):
        zero = torch.zeros((), dtype=z.dtype)
        log_q = z - z.exp().sum().log()
        q = log_q.exp()
        p = t.exp()
        nll = -log_q[y]
        fkl = sum(p[v] * (t[v] - log_q[v]) for v in V_k)
        rkl = sum(q[v] * (log_q[v] - t[v]) for v in V_k)
        V_m = q.argsort(descending=True)[:m].tolist()
        tail = sum((q[v] for v in V_m if v not in V_k), zero)
        kl = rkl if objective == "rkl" else fkl
        if objective == "akl":
            head = []
            mass = 0.0
            for i, v in enumerate(sorted(V_k, key=lambda v: -p[v])):
                mass += p[v].item()
                if i == 0 or mass < 0.5:
                    head.append(v)
            g_head = sum((p[v] - q[v]).abs() for v in head)
            g_tail = sum(((p[v] - q[v]).abs() for v in V_k if v not in head), zero)
            kl = (g_head * fkl + g_tail * rkl) / (g_head + g_tail)
        elif objective == "rskd":  # the library's KL against the counts of a dense target
            counts = torch.zeros_like(z)
            for v in V_k:
                counts[v] += 1 / len(V_k)
            kl = F.kl_div(log_q, counts, reduction="sum")
            tail = 0.0
        distillation = kl + lam * tail
        losses.append(nll if objective == "ce" else kd_ratio * distillation + (1 - kd_ratio) * nll)
    return torch.stack(losses)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kd_ratio", [1.0, 0.3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_chunked_loss_equals_the_textbook_over_all_positions(objective, kd_ratio, dtype):
    h, W, teacher, targets, weights = example(dtype)
    ids, log_p = teacher_view(objective, teacher)
    lam = 0.0 if objective == "rskd" else 10.0
    expected = textbook(objective, h @ W.T, teacher, targets, ids, lam, M, kd_ratio) @ weights
    expected_gradients = torch.autograd.grad(expected, (h, W))
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    loss_of_chunk = loss_function(objective, M, lam, kd_ratio)
    for chunk in (1, 4, 100):
        loss, sums = head_loss(h, W, weights, loss_of_chunk, targets, ids, log_p, chunk=chunk)
        gradients = torch.autograd.grad(3 * loss, (h, W))  # 3: the incoming gradient is a factor
        assert loss.dtype == dtype and torch.allclose(loss, expected, rtol=tolerance)
        for a, b in zip(gradients, expected_gradients):
            assert torch.allclose(a / 3, b, atol=tolerance * b.abs().max(), rtol=0)
        q = (h @ W.T).softmax(-1).detach()
        assert torch.allclose(sums["entropy"], -(q * q.log()).sum())
        if objective != "rskd":
            assert torch.allclose(sums["inside"], q.gather(-1, ids).sum())
            assert torch.allclose(sums["captured"], log_p.exp().sum())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck(objective):
    h, W, teacher, targets, weights = example(N=4, V=10, H=3)
    loss = loss_function(objective, 4, 2.0, 0.7)
    view = teacher_view(objective, teacher, k=3)
    assert torch.autograd.gradcheck(
        lambda h, W: head_loss(h, W, weights, loss, targets, *view, chunk=3)[0], (h, W))


def test_rows_beyond_the_vocabulary_have_no_part_in_loss_and_gradient():
    h, W, teacher, targets, weights = example()
    tensors = (targets, *teacher_view("ckd", teacher))
    loss = loss_function("ckd", M, 10.0)
    padded = torch.cat((W.detach(), torch.ones(3, H, dtype=W.dtype))).requires_grad_()
    of_slice, _ = head_loss(h, padded[:V], weights, loss, *tensors, chunk=4)
    expected = torch.autograd.grad(of_slice, (h, padded))
    value, _ = head_loss(h, padded, weights, loss, *tensors, vocab_size=V, chunk=4)
    gradients = torch.autograd.grad(value, (h, padded))
    assert value == of_slice and all(map(torch.equal, gradients, expected))
    assert not gradients[1][V:].any()


def test_a_second_backward_pass_adds_the_same_gradient():
    h, W, teacher, targets, weights = example()
    tensors = (targets, *teacher_view("ckd", teacher))
    value, _ = head_loss(h, W, weights, loss_function("ckd", M, 10.0), *tensors)
    value.backward(retain_graph=True)
    first = W.grad.clone()
    value.backward()
    assert torch.equal(W.grad, 2 * first)


def test_whole_vocabulary_without_penalty_is_the_full_kl():
    h, W, teacher, targets, _ = example()
    logits = h @ W.T
    student = logits.log_softmax(-1)
    ids, log_p = teacher_view("fkl", teacher, k=V)
    forward, _ = ckd_loss(logits, targets, ids, log_p, M, 0.0)
    assert torch.allclose(forward, F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1))
    reverse, _ = ckd_loss(logits, targets, ids, log_p, M, 0.0, reverse_kl)
    assert torch.allclose(reverse, F.kl_div(teacher, student, log_target=True, reduction="none").sum(-1))
    _, stats = ckd_loss(logits, targets, ids, log_p, M, 10.0)
    assert torch.allclose(stats["captured"], torch.ones(N).double()) and stats["tail"].abs().max() == 0


@pytest.mark.parametrize("objective", ["ckd", "fkl", "rkl", "akl"])
def test_equal_models_have_no_divergence_and_no_tail(objective):
    _, _, teacher, targets, _ = example()
    ids, log_p = teacher_view(objective, teacher)
    losses, stats = loss_function(objective, K, 10.0)(teacher.clone(), targets, ids, log_p)
    assert losses.abs().max() < 1e-12 and stats["tail"].abs().max() == 0


@pytest.mark.parametrize("lam", [0.0, 1.0, 10.0])
def test_ckd_gradient_is_the_formula(lam):
    """dL/dz_j = q_j (P - lam S') - p_j [j in V_k] + lam q_j [j in V_m, not in V_k]: Eqs. 14, 26, 27."""
    h, W, teacher, targets, _ = example()
    z = (h @ W.T).detach().requires_grad_()
    ids, log_p = teacher_view("ckd", teacher)
    losses, stats = ckd_loss(z, targets, ids, log_p, M, lam)
    gradient, = torch.autograd.grad(losses.sum(), z)
    q = z.softmax(-1)
    P = log_p.exp().sum(-1, keepdim=True)
    S = stats["tail"][:, None]
    in_K = torch.zeros_like(q).scatter(-1, ids, 1.0)
    mistakes = torch.zeros_like(q).scatter(-1, q.topk(M).indices, 1.0) * (1 - in_K)
    assert (mistakes.sum(-1) > 0).all() and (P < 0.99).all()  # both terms matter in this example
    expected = q * (P - lam * S) - teacher.exp() * in_K + lam * q * mistakes
    assert torch.allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("objective", ["fkl", "ckd", "rkl"])
def test_minimisers(objective):
    """FKL-k and CKD end at q = p/P on V_k; RKL-k at q = p/e, with 1 - P/e of the mass outside."""
    g = torch.Generator().manual_seed(3)
    teacher = torch.randn(1, 12, generator=g, dtype=torch.float64).log_softmax(-1)
    ids, log_p = teacher_view(objective, teacher, k=4)
    p = log_p.exp()
    P = p.sum().item()
    assert 0.5 < P < 0.9
    z = torch.randn(1, 12, generator=g, dtype=torch.float64).requires_grad_()
    target = torch.zeros(1, dtype=torch.long)
    loss = loss_function(objective, 4, 10.0 * (objective == "ckd"))
    optimiser = torch.optim.LBFGS([z], max_iter=400, tolerance_grad=1e-9, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        losses, _ = loss(z, target, ids, log_p)
        losses.sum().backward()
        return losses.sum()

    optimiser.step(closure)
    value = closure().item()
    q = z.detach().softmax(-1)
    if objective == "rkl":
        assert torch.allclose(q.gather(-1, ids), p / math.e, atol=1e-5)
        outside = 1 - q.gather(-1, ids).sum().item()
        assert abs(outside - (1 - P / math.e)) < 1e-5 and abs(value + P / math.e) < 1e-8
    else:
        assert torch.allclose(q.gather(-1, ids), p / P, atol=1e-3) and abs(value - P * math.log(P)) < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# The teacher, the cache and the loop on a tiny pair

CONFIG = {"model_type": "qwen3", "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}


def tiny(seed, **config):
    return Transformer(CONFIG | config).init_weights(seed, std=0.4).double()


def example_groups(count=6, seed=0):
    """Groups of random ids, with prompts and responses of different lengths."""
    g = torch.Generator().manual_seed(seed)
    groups = []
    for i in range(count):
        prompt = torch.randint(0, V, (3 + i,), generator=g).tolist()
        group = Group({"id": str(i)}, prompt, [])
        for j in range(1 + i % 4):
            length = 2 + j + i % 3
            ids = torch.randint(0, V, (length,), generator=g).tolist()
            group.responses.append(Response(ids, (0, length)))
        groups.append(group)
    return groups


def example_settings(out, objective="ckd", **overrides):
    """The settings of a few steps in float64."""
    small = {"batch_size": 6, "k": K, "m": M, "tail_weight": 10.0, "lr": 1e-2, "dtype": "float64",
             "micro_batch_tokens": 64}
    return settings("ckd", out=out, objective=objective, **small | overrides)


def train_student(teacher, groups, valid, args):
    """Distil into a new student. Returns its weights in one vector."""
    student = tiny(1)
    args.out.mkdir()
    ckd.distill(student, teacher, groups, valid, args)
    return weights_of(student)


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run_live(out, model, objective="ckd", **overrides):
    """Distil from a model in memory."""
    args = example_settings(out, objective, **overrides)
    teacher = Teacher(model, args.k, V, args.seed if objective == "rskd" else None)
    return train_student(teacher, example_groups(), example_groups(2, seed=9), args)


def run_cached(out, folder, objective="ckd", **overrides):
    """Distil from a model folder, by the cache beside `out`, which is written if it is missing."""
    args = example_settings(out, objective, teacher=folder, cache=out.parent / "cache", **overrides)
    groups = example_groups()
    valid = example_groups(2, seed=9)
    key = cache_key(args, groups + valid, V)
    teacher = load_teacher(args, groups + valid, V, key, "cpu")
    return train_student(teacher, groups, valid, args)


def save_teacher(folder, world, seed=0):
    """A teacher's folder, with any tokenizer."""
    tiny(seed).save_pretrained(folder)
    shutil.copy(world / "teacher" / "tokenizer.json", folder)
    return folder


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_teacher_top_k_and_draws():
    model = tiny(0)
    packed = pack(example_groups())
    logits = model(packed["input_ids"], packed["positions"], mask=attention_mask(packed)).flatten(0, 1)
    expected = logits[packed["logit_positions"]].log_softmax(-1)
    top = expected.topk(K)
    hidden = counted_states(model, packed, torch.float32)
    for ids, log_p in (Teacher(model, K, V)(packed), topk_log_probs(hidden, model.head_weight, K, chunk=5)):
        assert ids.dtype == torch.int64 and log_p.dtype == torch.float32
        assert torch.equal(ids, top.indices) and torch.allclose(log_p.double(), top.values, atol=1e-6)
    ids, log_p = Teacher(model, 500, V, seed=0)(packed, example_groups(), 1)
    shares = torch.stack([torch.bincount(row, minlength=V) for row in ids]) / 500
    assert torch.allclose(shares.gather(-1, ids), log_p.exp(), atol=1e-6)  # log of each token's share of the draws
    # A share of 500 draws has a standard deviation of at most 0.0224: one of about 2,000 shares is six of them off
    # once in a quarter of a million runs.
    assert (shares - expected.exp()).abs().max() < 6 * 0.0224


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_cached_equals_live(objective, world, tmp_path, monkeypatch):
    folder = save_teacher(tmp_path / "teacher", world)
    live = run_live(tmp_path / "live", tiny(0), objective)
    first = run_cached(tmp_path / "first", folder, objective)  # writes the cache
    monkeypatch.setattr(Transformer, "from_pretrained", lambda *_: pytest.fail("the teacher was loaded"))
    second = run_cached(tmp_path / "second", folder, objective)
    assert torch.equal(first, second) and (live - weights_of(tiny(1))).abs().max() > 5e-3  # the student changed
    if objective != "rskd":  # its draws are new at every step without a cache, and fixed with one
        live_row, cached_row = (first_step(tmp_path / name) for name in ("live", "second"))
        for name in ("loss", "kl", "tail", "captured", "inside", "grad_norm"):
            assert cached_row[name] == pytest.approx(live_row[name], rel=1e-3, abs=1e-3), name  # float16 log-probs


def first_step(out):
    return next(row for row in metrics(out) if row["step"] == 1)


def test_a_cache_of_something_else_is_refused(world, tmp_path):
    folder = save_teacher(tmp_path / "teacher", world)
    run_cached(tmp_path / "first", folder)
    other_weights = save_teacher(tmp_path / "other-weights", world, seed=2)
    other_tokenizer = save_teacher(tmp_path / "other-tokenizer", world)
    tokenizer = other_tokenizer / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("</think>", "</thank>"))
    for word, teacher, changed in [("teacher", other_weights, {}), ("tokenizer", other_tokenizer, {}),
                                   ("k", folder, {"k": K - 1}), ("dtype", folder, {"dtype": "float32"})]:
        with pytest.raises(InputError, match=f"another {word}"):
            run_cached(tmp_path / word, teacher, **changed)
    groups = example_groups()
    groups[2].responses[0].ids[-1] ^= 1  # one token of the data
    args = example_settings(tmp_path / "data", teacher=folder, cache=tmp_path / "cache")
    with pytest.raises(InputError, match="another data"):
        cache_key(args, groups + example_groups(2, seed=9), V)


@pytest.mark.parametrize("objective", ["ckd", "akl", "rskd", "ce"])
def test_the_run_does_not_depend_on_micro_batches(objective, world, tmp_path):
    folder = save_teacher(tmp_path / "teacher", world)
    whole = run_cached(tmp_path / "whole", folder, objective, micro_batch_tokens=10_000)
    split = run_cached(tmp_path / "split", folder, objective, micro_batch_tokens=1)
    assert torch.allclose(whole, split, atol=1e-9)
    whole, split = (run_live(tmp_path / f"live {tokens}", tiny(0), objective, micro_batch_tokens=tokens)
                    for tokens in (10_000, 1))
    assert torch.allclose(whole, split, atol=1e-9)


def test_draws_depend_on_the_record_not_on_its_row():
    """Also if records with the same tools share a row, which moves part of a prompt in front of its response."""
    model = tiny(0)
    teacher = Teacher(model, 50, V, seed=0)
    groups = [Group({"tools": []}, [5, 6, 7, i], [Response([i + 2, i + 1, 3], (1, 3))]) for i in range(4)]
    together = share_prefixes(groups, 4)
    assert len(together) == 1
    alone = [teacher(pack([group]), [group], 1)[0] for group in groups]
    assert torch.equal(torch.cat(alone), teacher(pack(together), together, 1)[0])
    assert not torch.equal(alone[0], teacher(pack(groups[:1]), groups[:1], 2)[0])


def test_paddings_of_different_widths_are_cut_to_the_tokenizer(tmp_path):
    """A teacher with more padding rows gives the run of one with none, once both are cut."""
    wide = tiny(0, vocab_size=V + 24)
    with torch.no_grad():
        wide.model.embed_tokens.weight[:V] = tiny(0).model.embed_tokens.weight
        for (name, p), q in zip(list(wide.named_parameters())[1:], list(tiny(0).parameters())[1:]):
            p.copy_(q)
    assert torch.equal(run_live(tmp_path / "same", tiny(0)), run_live(tmp_path / "cut", wide))


def test_training_moves_the_student_to_the_teacher(tmp_path):
    run_live(tmp_path / "out", tiny(0), steps=60, lr=3e-2)
    rows = metrics(tmp_path / "out")
    assert rows[-1]["kl"] < 0.3 * rows[1]["kl"] and rows[-1]["inside"] > rows[1]["inside"]
    assert {"loss", "kl", "tail", "captured", "inside", "entropy", "nll", "tokens_per_s"} <= set(rows[1])


def test_validation_computes_no_gradient(monkeypatch):
    h, W, teacher, targets, weights = example()
    tensors = (targets, *teacher_view("ckd", teacher))
    loss = loss_function("ckd", M, 10.0)
    with_gradient, _ = head_loss(h, W, weights, loss, *tensors)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        assert head_loss(h, W, weights, loss, *tensors)[0] == with_gradient.detach()


def test_bfloat16_products_keep_the_direction_of_the_gradient():
    """The default precision: chunks in bfloat16, sums and losses in float32, gradients in the parameters' dtype."""
    h, W, teacher, targets, weights = example(torch.float32)
    tensors = (targets, *teacher_view("ckd", teacher))
    loss = loss_function("ckd", M, 10.0)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        value, _ = head_loss(h, W, weights, loss, *tensors, chunk=4, dtype=dtype)
        gradients.append(torch.autograd.grad(value, (h, W)))
    for exact, rounded in zip(*gradients):
        assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
        assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.99
        assert abs(exact.norm() / rounded.norm() - 1) < 0.02


def test_the_optimiser_is_the_released_one():
    model = Transformer(CONFIG | {"model_type": "qwen2"}).init_weights(0)
    adamw, = make_optimisers(model, settings("ckd", lr=0.5, weight_decay=0.25))
    matrices, vectors = adamw.param_groups
    assert matrices["weight_decay"] == 0.25 and vectors["weight_decay"] == 0.0
    assert {p.dim() for p in matrices["params"]} == {2} and {p.dim() for p in vectors["params"]} == {1}
    assert matrices["betas"] == vectors["betas"] == (0.9, 0.95) and matrices["eps"] == 1e-8
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = weights_of(model)
    sgd = torch.optim.SGD(model.parameters(), lr=9.0)
    norm = update(model, [sgd], 1.0, "run", 1)["grad_norm"]  # at this rate, not at 9
    assert norm == pytest.approx(3 * model.num_parameters() ** 0.5, rel=1e-4)
    assert (before - weights_of(model)).norm() == pytest.approx(1.0, rel=1e-4)  # clipped to norm 1


def test_muon_takes_the_matrices_of_the_layers():
    model = Transformer(CONFIG)
    optimisers = make_optimisers(model, settings("ckd", optimiser="muon", lr=0.5, weight_decay=0.0))
    muon, adamw = ({id(p) for group in o.param_groups for p in group["params"]} for o in optimisers)
    for name, p in model.named_parameters():
        p.grad = torch.ones_like(p)
        assert (id(p) in muon) == ("layers" in name and p.dim() == 2) != (id(p) in adamw), name
    update(model, optimisers, 0.1, "run", 1)
    assert [group["lr"] for o in optimisers for group in o.param_groups] == [0.5, 0.1, 0.1]


def test_muon_is_that_of_torch(monkeypatch):
    def train(optimiser):
        torch.manual_seed(0)
        shapes = [(6, 6), (9, 4), (4, 9)] * 2
        weights = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
        muon = optimiser(weights, lr=0.3, weight_decay=0.1, momentum=0.9)
        for _ in range(4):
            for p in weights:
                p.grad = torch.randn_like(p)
            muon.step()
        return [*weights, *(muon.state[p]["momentum_buffer"] for p in weights)]

    ours = train(Muon)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # so that torch's iteration is in float64
    torch.testing.assert_close(ours, train(torch.optim.Muon), rtol=1e-12, atol=1e-12)


def test_defaults_are_the_released_settings():
    """The released settings."""
    a = settings("ckd")
    assert (a.objective, a.k, a.m, a.kd_ratio, a.mask, a.batch_size, a.epochs) == ("ckd", 100, 100, 1.0, "all", 128, 1)
    assert (a.lr, a.weight_decay, a.max_prompt_tokens, a.max_response_tokens, a.seed) == (3e-6, 1e-4, 5120, 512, 42)
    loss = objective_loss(a)
    assert loss.func is ckd_loss and loss.keywords == {
        "m": 100, "tail_weight": 10.0, "divergence": DIVERGENCES["ckd"], "kd_ratio": 1.0}
    a = settings("rollout")
    assert (a.n, a.temperature, a.top_p) == (8, 1.0, 1.0)


@pytest.mark.parametrize("objective,expected", [("ckd", 10.0), ("fkl", 0.0), ("akl", 0.0)])
def test_lambda_is_ten_for_ckd_and_none_for_the_others(objective, expected):
    assert objective_loss(settings("ckd", objective=objective)).keywords["tail_weight"] == expected
    a = settings("ckd", objective="akl", tail_weight=2.0)
    assert objective_loss(a).keywords["tail_weight"] == 2.0


def test_an_objective_is_a_divergence_and_two_weights():
    """ce has no distillation and rskd no tail penalty, for any flags."""
    for objective in OBJECTIVES:
        loss = objective_loss(settings("ckd", objective=objective, tail_weight=2.0, kd_ratio=0.7, m=9))
        assert loss.func is ckd_loss and loss.keywords == {
            "m": 9, "tail_weight": 0.0 if objective == "rskd" else 2.0, "divergence": DIVERGENCES[objective],
            "kd_ratio": 0.0 if objective == "ce" else 0.7}

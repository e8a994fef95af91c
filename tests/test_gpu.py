"""What only a GPU can show: the same code there gives the CPU's numbers. Skipped without one."""
import json
from functools import partial

import pytest
import torch
from conftest import sample, settings, stub_record

import star
from ckd import DIVERGENCES, ckd_loss
from data.groups import Group, Response, pack
from head import counted_states, head_loss
from model import Transformer
from simrl import refine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("kind", ["ckd", "akl", "rskd", "ce"])
def test_head_loss_equals_the_cpu(kind):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=g)
    weight = torch.randn(300, 16, generator=g)
    teacher_ids = torch.randn(50, 300, generator=g).log_softmax(-1).topk(20).indices
    teacher_log_p = torch.full((50, 20), -3.0)
    token_weights = torch.full((50,), 0.02)
    loss = partial(ckd_loss, m=20, tail_weight=10.0 * (kind == "ckd"), divergence=DIVERGENCES[kind],
                   kd_ratio=0.0 if kind == "ce" else 1.0)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (hidden, weight)]
        tensors = [t.to(device) for t in (teacher_ids[:, 0], teacher_ids, teacher_log_p)]
        value, _ = head_loss(*leaves, token_weights.to(device), loss, *tensors, chunk=16)
        gradients = torch.autograd.grad(value, leaves)
        results.append([value.detach().cpu(), *(gradient.cpu() for gradient in gradients)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_compiled_layers_with_blocks_equal_the_mask():
    """flex_attention and fused layers against SDPA with a boolean mask: hidden states and gradients, in float32."""
    config = {"model_type": "qwen3", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
              "tie_word_embeddings": True}
    model = Transformer(config).init_weights(0, std=0.1).to("cuda")
    g = torch.Generator().manual_seed(0)
    scale = torch.randn(500, 64, generator=g).to("cuda")
    for prompt in (5, 300, 130):
        responses = [torch.randint(0, 300, (n,), generator=g).tolist() for n in (70, 3, 200)]
        group = Group({}, torch.randint(0, 300, (prompt,), generator=g).tolist(),
                      [Response(ids, (0, len(ids))) for ids in responses])
        packed = pack([group, Group({}, [1, 2, 3], [Response([4, 5], (0, 2))])], "cuda")
        results = []
        for compiled in (False, True):
            if compiled and not model.model.compiled:
                model.model.compile_layers()
            model.model.compiled = compiled
            model.zero_grad()
            hidden = counted_states(model, packed, torch.float32)
            (hidden * scale[:len(hidden)]).sum().backward()
            results.append([hidden, *(p.grad for p in model.parameters())])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, atol=5e-3 * a.abs().max().item(), rtol=0)


def sample_ids(model, **options):
    """The ids of three samples for each of three prompts."""
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    return [[r.ids for r in responses] for responses in sample(model, prompts, 3, 12, [2], **options)]


def test_the_sampler_runs_there_and_agrees(world):
    model = Transformer.from_pretrained(world / "teacher")
    on_cpu = sample_ids(model, temperature=0)
    model.to("cuda")
    assert sample_ids(model, temperature=0) == on_cpu
    assert all(len(ids) <= 12 for group in sample_ids(model, temperature=1.0, top_p=0.9) for ids in group)


@pytest.mark.parametrize("extra", ["", "--cache cache", "--objective rskd", "--dtype float32", "--compile"])
def test_a_run_and_its_resumption(world, tmp_path, monkeypatch, extra):
    monkeypatch.chdir(tmp_path)
    command = (f"ckd --teacher {world}/teacher --student {world}/student --data {world}/train.jsonl --out run --k 5 "
               f"--m 5 --batch-size 8 --hold-out 4 --samples 2 --steps 2 --device cuda --save-every 1 {extra}")
    assert star.main(command.split()) == 0
    assert star.main([*command.split(), "--resume"]) == 0


class StubChat:
    """A chat whose text is the list of ids."""

    stop_ids = [2]
    vocab_size = 300

    def decode(self, ids):
        return str(ids)

    def answer(self, record):
        return None


@pytest.mark.parametrize("dtype,gap", [("float32", 1e-4), ("bfloat16", 0.1)])
def test_a_grpo_run_and_its_resumption(world, tmp_path, dtype, gap):
    """The ratio right after sampling is 1 in float32; sampler and trainer stay close in bfloat16."""
    g = torch.Generator().manual_seed(0)
    prompts = [Group(stub_record(n), torch.randint(0, 300, (n,), generator=g).tolist(), []) for n in (3, 9, 40, 17)]
    for start, steps in ((0, 2), (2, 3)):
        args = settings("simrl", out=str(tmp_path), prompts_per_step=4, batch_size=16, steps=steps, max_new_tokens=20,
                        dtype=dtype, filter="none", lr=1e-3, micro_batch_tokens=200, max_concurrent=16)
        model = Transformer.from_pretrained(world / "student", device="cuda")
        reference = Transformer.from_pretrained(world / "student", getattr(torch, dtype), "cuda")
        refine(model, reference, prompts, StubChat(),
               lambda _, text: {"reward": float("7" in text), "answer_score": 0.5}, args, start)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["updates"] for row in rows] == [2, 4, 6] and all(row["mismatch"] < gap for row in rows)

"""The computed memory of a stage against what a step of it takes on a CPU; the GPU's figures are in tests/README.md."""
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import star  # noqa: E402
from apps.estimate import estimate_flags, read_sizes, stage_hours, stage_memory  # noqa: E402
from ckd import ckd_loss, loss_over_batch  # noqa: E402
from data.groups import Group, Response  # noqa: E402
from model import Transformer  # noqa: E402
from teacher import Teacher  # noqa: E402

CONFIG = {"model_type": "qwen3", "vocab_size": 2000, "hidden_size": 128, "intermediate_size": 384,
          "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
          "tie_word_embeddings": True}
TEACHER = CONFIG | {"hidden_size": 256, "intermediate_size": 768}


def estimate_args(folder, *flags):
    args, _ = star.parse(["estimate", "--student", f"{folder}/student", "--teacher", f"{folder}/teacher", *flags])
    return args


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    for name, config in (("student", CONFIG), ("teacher", TEACHER)):
        Transformer(config).init_weights(0).save_pretrained(folder / name)
    return folder


def ckd_step(folder, dtype, checkpointing, tokens):
    """Load both models and train a step; in a process of its own."""
    import train
    teacher = Teacher(Transformer.from_pretrained(f"{folder}/teacher", getattr(torch, dtype)), 20, 2000)
    student = Transformer.from_pretrained(f"{folder}/student")
    student.model.gradient_checkpointing = checkpointing
    optimisers = train.make_optimisers(student, SimpleNamespace(optimiser="adamw", lr=1e-6, weight_decay=0.0))
    groups = [Group({}, list(range(256)), [Response(list(range(256)), (0, 256))]) for _ in range(tokens // 512)]
    args = SimpleNamespace(dtype=dtype, micro_batch_tokens=tokens)
    loss_over_batch(student, teacher, groups, ckd_loss, args, step=1)
    train.clip_gradients(student)
    train.optimiser_step(optimisers, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_a_ckd_step(pair, dtype, checkpointing):
    tokens = 8192 if checkpointing else 4096
    flags = ["--device", "cpu", "--dtype", dtype, "--micro-batch-tokens", str(tokens), "--gpus", "1",
             "--prompt-tokens", "256", "--n", "1", "--response-tokens", "256"]
    args = estimate_args(pair, *flags, *["--gradient-checkpointing"] * checkpointing)
    sizes = read_sizes(args.student), read_sizes(args.teacher)
    expected = sum(stage_memory("ckd", *sizes, args, 1).values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ckd_step(pair, dtype, checkpointing, tokens)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    measured = max(itertools.accumulate(event.nbytes() for event in events))
    print(json.dumps({"expected": expected, "measured": measured, "ratio": measured / expected}))
    assert abs(measured / expected - 1) < 0.15

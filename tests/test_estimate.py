"""The computed memory of a stage against what a step of it takes on a CPU; the GPU's figures are in tests/README.md."""
import json
import shlex
import sys
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import simrl  # noqa: E402
import star  # noqa: E402
import train  # noqa: E402
from apps.checks import SEVERAL_PROCESSES  # noqa: E402
from apps.curriculum import split_lines  # noqa: E402
from apps.estimate import read_sizes, stage_memory  # noqa: E402
from ckd import ckd_loss, forward_backward  # noqa: E402
from conftest import settings  # noqa: E402
from data import leave  # noqa: E402
from data.groups import Group, Response  # noqa: E402
from model import Transformer  # noqa: E402
from sampler import Request, Sampler, cache_size  # noqa: E402
from teacher import Teacher  # noqa: E402
from test_shard import finish_ranks, start_ranks  # noqa: E402

TOKENS = 4096  # of a micro-batch
SAMPLES = {"device": "cpu", "n": 1, "max_new_tokens": 128, "max_concurrent": 32}
CONFIG = {"model_type": "qwen3", "vocab_size": 2000, "hidden_size": 128, "intermediate_size": 384,
          "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
          "tie_word_embeddings": True}
TEACHER = CONFIG | {"hidden_size": 256, "intermediate_size": 768}


def make_pair(folder, **changes):
    for name, config in (("student", CONFIG), ("teacher", TEACHER)):
        Transformer(config | changes).init_weights(0).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def wide_pair(tmp_path_factory):
    """Embeddings and head take most of the memory."""
    return make_pair(tmp_path_factory.mktemp("wide"), vocab_size=20_000, tie_word_embeddings=False)


@contextmanager
def measured_memory():
    """Yield a list, which gets the largest sum of what torch has allocated in this context, in bytes."""
    peak = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield peak
    held, total, largest = {}, 0, 0
    for _, address, size in sorted(allocations(profile.profiler.kineto_results.experimental_event_tree())):
        total -= held.pop(address, 0)
        if size > 0:
            held[address] = size
            total += size
        largest = max(largest, total)
    peak.append(largest)


def allocations(events, of_gloo=False):
    """Yield (time, address, bytes) of what is allocated (bytes > 0) and freed, without the copies that gloo takes of
    gradients: NCCL takes none, and one that gloo's own thread frees would seem to stay, as only this one is watched."""
    for event in events:
        if event.name == "[memory]" and (event.extra_fields.alloc_size < 0 or not of_gloo):
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from allocations(event.children, of_gloo or event.name.startswith("c10d::"))


def ckd_step(folder, dtype, checkpointing):
    """Load both models and train two steps of two micro-batches a rank: before, there are no gradients and moments.
    Returns the largest sum of what was allocated, in bytes."""
    with measured_memory() as peak:
        args = settings("ckd", device="cpu", dtype=dtype, micro_batch_tokens=TOKENS)
        shard = train.sharding(args, train.pick_device(args))
        model = Transformer.from_pretrained(f"{folder}/teacher", getattr(torch, dtype), shard=shard)
        teacher = Teacher(model, 20, len(model.head_weight))
        student = Transformer.from_pretrained(f"{folder}/student", shard=shard)
        student.model.gradient_checkpointing = checkpointing
        optimisers = train.make_optimisers(student, args)
        count = 2 * train.world_size() * TOKENS // 512
        groups = [Group({}, list(range(256)), [Response(list(range(256)), (0, 256))]) for _ in range(count)]
        for step in (1, 2):
            forward_backward(student, teacher, groups, partial(ckd_loss, m=100, tail_weight=10.0), args, step)
            train.update(student, optimisers, 1e-6, "run", step)
    return peak[0]


def sample(model, args):
    """Fill the slots of a sampler, and draw a few tokens. Returns it: it holds the keys and values."""
    chat = SimpleNamespace(stop_ids=[], vocab_size=len(model.head_weight))
    requests = [Request([1] * 256, args.n, i, 1.0, args.max_new_tokens) for i in range(args.max_concurrent // args.n)]
    sampler = Sampler(model, chat, *cache_size(args.max_concurrent, requests))
    for request in requests:
        sampler.add(request)
    for _ in range(3):
        sampler.step()
    return sampler


def rollout_step(folder, dtype):
    args = settings("rollout", dtype=dtype, **SAMPLES)
    model = Transformer.from_pretrained(f"{folder}/teacher", getattr(torch, dtype))
    with measured_memory() as peak:
        sample(deepcopy(model), args)  # torch would count the files as they are mapped
    return peak[0]


def simrl_step(folder, dtype):
    args = settings("simrl", dtype=dtype, micro_batch_tokens=TOKENS, batch_size=16, **SAMPLES)
    with measured_memory() as peak:
        model = Transformer.from_pretrained(f"{folder}/student")
        reference = Transformer.from_pretrained(f"{folder}/student", getattr(torch, dtype))
        optimisers = train.make_optimisers(model, args)
        sampler = sample(model.in_dtype(getattr(torch, dtype)), args)
        responses = [Response([1] * 256, (0, 256), log_probs=[-1.0] * 256, advantage=1.0) for _ in range(32)]
        groups = [Group({}, list(range(256)), [response]) for response in responses]  # two updates
        ids = len(model.head_weight)
        for batch in simrl.prepare_batches(model, reference, groups, ids, args, 1):
            simrl.accumulate_gradients(model, batch, ids, args)
            train.update(model, optimisers, 1e-6, "run", 1)
        del sampler
    return peak[0]


def assert_as_computed(measured, folder, ranks, dtype, checkpointing=False, rel=0.07, stage="ckd"):
    flags = (f"--student {folder}/student --teacher {folder}/teacher --device cpu --dtype {dtype} "
             f"--micro-batch-tokens {TOKENS} --prompt-tokens 256 --n 1 --response-tokens 256")
    if stage != "ckd":
        flags += f" --max-prompt-tokens 256 --max-concurrent {SAMPLES['max_concurrent']} --max-new-tokens 128"
    args, _ = star.parse(["estimate", *flags.split(), *["--gradient-checkpointing"] * checkpointing])
    parts = stage_memory(stage, read_sizes(args.student), read_sizes(args.teacher), args, ranks)
    assert measured == pytest.approx(sum(parts.values()), rel=rel), parts


@pytest.mark.parametrize("folder,dtype,checkpointing", [
    ("pair", "float32", False), ("pair", "float32", True), ("pair", "bfloat16", False), ("wide_pair", "bfloat16", True)])
def test_memory_of_a_ckd_step(request, folder, dtype, checkpointing):
    folder = request.getfixturevalue(folder)
    assert_as_computed(ckd_step(folder, dtype, checkpointing), folder, 1, dtype, checkpointing)


@pytest.mark.parametrize("folder,dtype", [("pair", "float32"), ("pair", "bfloat16"), ("wide_pair", "bfloat16")])
@pytest.mark.parametrize("stage,step", [("rollout", rollout_step), ("simrl", simrl_step)])
def test_memory_of_a_step_that_samples(request, stage, step, folder, dtype):
    folder = request.getfixturevalue(folder)
    assert_as_computed(step(folder, dtype), folder, 1, dtype, stage=stage)


@pytest.mark.parametrize("folder,dtype,checkpointing", [
    ("pair", "float32", False), ("wide_pair", "bfloat16", True)])  # for a whole model: 0.03, 0.17 more
def test_memory_of_a_ckd_step_on_two_ranks(request, tmp_path, folder, dtype, checkpointing):
    folder = request.getfixturevalue(folder)
    codes, errors = finish_ranks(start_ranks(2, __file__, folder, tmp_path, dtype, "1" * checkpointing))
    assert codes == [0, 0], errors
    for rank in range(2):
        assert_as_computed(json.loads((tmp_path / f"{rank}").read_text()), folder, 2, dtype, checkpointing, 0.02)


def test_the_table(pair, capsys):
    assert star.main(["estimate", "--student", f"{pair}/student", "--teacher", f"{pair}/teacher", "--gpus", "1", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    stages = [line.split()[0] for line in lines if line and line.split()[-1][0].isdigit()]
    assert stages == ["rollout", "ckd", "simrl", "refine"] * 2


@pytest.mark.parametrize("recipe", sorted((ROOT / "apps/recipes").iterdir()), ids=lambda path: path.name)
def test_every_line_of_a_recipe_parses(recipe):
    lines = split_lines(recipe.read_text())
    assert lines
    for line in lines:
        words = shlex.split(line.split("star.py ")[-1])
        assert line.startswith(("torchrun --nproc-per-node 8 --shutdown-timeout 3600 -- star.py ", words[0])), line
        args, _ = star.parse(words)
        assert not line.startswith("torchrun") or args.command in SEVERAL_PROCESSES


if __name__ == "__main__":
    pair, out, dtype, checkpointing = sys.argv[1:]
    size = ckd_step(pair, dtype, bool(checkpointing))
    Path(out, str(train.rank())).write_text(json.dumps(size))
    leave(0)

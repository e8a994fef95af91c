"""Sharded training: several ranks against one, checkpoints that another number of ranks resumes, the memory of a rank.

    python tests/test_shard.py           the table of tests/README: all cases on 2, 3, 4 and 2 x 2 ranks, some minutes
    python tests/test_shard.py memory    a 0.6B-shaped model on 4 ranks and on one, some minutes and 16 GB

Under torchrun, this file runs cases and writes what they logged. STAR_LONG=1 runs the whole table as tests.
"""
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import settings
from safetensors import safe_open
from test_cli import CKD, PROGRAM, here, rows, run  # noqa: F401

import simrl
import train
from ckd import distill
from data import InputError, print_table
from data.groups import Group, Response
from data.runs import save_checkpoint
from experience import sample_step
from model import Transformer
from shard import part_of, shard_model
from teacher import Teacher
from test_grpo import StubChat

ROOT = Path(__file__).parents[1]
LONG = pytest.mark.skipif("STAR_LONG" not in os.environ, reason="minutes; set STAR_LONG=1")
V = 40
STEPS = 20
CONFIG = {"model_type": "qwen3", "vocab_size": V, "hidden_size": 16, "intermediate_size": 24,
          "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
          "tie_word_embeddings": True}

# name: (command, flags)
CASES = {objective: ("ckd", {"objective": objective}) for objective in ("ckd", "fkl", "rkl", "akl", "rskd", "ce")}
CASES |= {
    "sft": ("sft", {}),
    "ckd, untied head with biases": ("ckd", {"family": "qwen2"}),
    "ckd, idle ranks": ("ckd", {"micro_batch_tokens": 100_000}),
    "ckd, gradient checkpointing": ("ckd", {"gradient_checkpointing": True}),
    "simrl, mean of tokens": ("simrl", {"loss_mean": "token"}),
    "simrl, mean of sequences": ("simrl", {"loss_mean": "sequence"}),
    "simrl, mean of micro-batches": ("simrl", {"loss_mean": "micro-batch"}),
    "simrl, idle ranks, no reference": ("simrl", {"micro_batch_tokens": 100_000, "kl_weight": 0.0}),
    "simrl, gradient checkpointing": ("simrl", {"gradient_checkpointing": True}),
    "simrl, sampling": ("simrl", {"live": True}),
}
LIMITS = {"float64": 1e-10, "float32": 1e-4}  # of the difference of a loss


# ---- Cases, on any number of ranks

def random_groups(seed, count):
    """Groups with two to four responses, as the sampler leaves them."""
    r = random.Random(seed)
    groups = []
    for number in range(count):
        group = Group({"answer": number, "messages": []}, [r.randrange(1, V) for _ in range(r.randint(3, 9))], [])
        for _ in range(r.randint(2, 4)):
            ids = [r.randrange(1, V) for _ in range(r.randint(1, 8))]
            response = Response(ids, (0, len(ids)), log_probs=[r.uniform(-4, -3) for _ in ids])
            response.reward = response.answer_score = r.random()
            group.responses.append(response)
        groups.append(group)
    return groups


def stored_step(sampler, prompts, first, score, accept, args):
    """In place of `sample_step`: groups that depend on the number of the first prompt only."""
    groups = random_groups(first, 8)
    return groups, groups, {"seconds_training": 0.0}


class Chat(StubChat):
    vocab_size = V


def even_ids(record, text):
    """The reward of sampled responses: the share of even ids."""
    share = sum(int(word) % 2 == 0 for word in text.split()) / len(text.split())
    return {"reward": share, "answer_score": share}


def load(folder, args):
    """A model of a run, in parts if there are several ranks, with weights in the precision of --dtype."""
    shard = train.sharding(args, torch.device("cpu"))
    model = Transformer.from_pretrained(folder, getattr(torch, args.dtype), shard=shard)
    model.model.gradient_checkpointing = args.gradient_checkpointing
    return model


def run_case(name, dtype, folder, shard_ranks=None):
    """Run 20 steps of a case. Returns the rows of its metrics.jsonl and, if it samples, of its samples.jsonl."""
    command, flags = CASES[name]
    small = {"lr": 1e-2, "seed": 1, "micro_batch_tokens": 60, "batch_size": 12, "steps": STEPS, "save_every": 100}
    small |= {"n": 3, "prompts_per_step": 8, "max_new_tokens": 4, "filter": "none"} if command == "simrl" else {}
    small |= {"valid_every": 3} if command != "simrl" else {}
    family = flags.get("family", "qwen3")
    live = flags.get("live", False)
    flags = {key: value for key, value in flags.items() if key not in ("family", "live")}
    out = Path(folder) / f"{name}, {dtype}, {train.world_size()} ranks, {shard_ranks}"
    args = settings(command, dtype=dtype, out=str(out), shard_ranks=shard_ranks, **small | flags)
    model, other = (load(f"{folder}/{family} {seed}", args) for seed in (1, 2))
    out.mkdir(exist_ok=True)
    if command == "simrl":
        simrl.sample_step = sample_step if live else stored_step
        prompts = [Group({"answer": k, "messages": []}, [1] * (k % 3) + [k, 1], []) for k in range(2, 12)]
        simrl.refine(model, other if args.kl_weight else None, prompts, Chat(), even_ids, args)
    else:
        teacher = None
        if command == "ckd":
            args.k = args.m = 6
            teacher = Teacher(other, args.k, V, args.seed if args.objective == "rskd" else None)
        distill(model, teacher, random_groups(1, 16), random_groups(2, 3), args)
    train.wait_for_ranks()  # rank 0 has written
    return [rows(out / file) for file in ("metrics.jsonl", "samples.jsonl")[:1 + live]]


def run_cases(names, dtypes, folder, shard_ranks=None):
    """{"name dtype": `run_case`}."""
    return {f"{name}, {dtype}": run_case(name, dtype, folder, shard_ranks) for name in names for dtype in dtypes}


def make_models(folder):
    """The folders of two models of each family."""
    for family in ("qwen3", "qwen2"):
        for seed in (1, 2):
            config = CONFIG | {"model_type": family, "tie_word_embeddings": family == "qwen3"}
            Transformer(config).init_weights(seed, 0.1).save_pretrained(Path(folder) / f"{family} {seed}")


def torchrun(ranks, *words):
    """Start a Python program with its arguments on several ranks, in a process group of its own."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launcher, *map(str, words)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)


def compare(ranks, names, dtypes, folder, shard_ranks=None):
    """Run cases on one rank, in this process, and on several. {"name, dtype": the largest difference of a loss}.

    Also asserts that all other metrics agree, and samples exactly.
    """
    result = Path(folder) / "result.json"
    process = torchrun(ranks, __file__, json.dumps([names, dtypes, str(folder), shard_ranks]), result)
    one = run_cases(names, dtypes, folder)
    _, error = process.communicate()
    assert process.returncode == 0, error
    several = json.loads(result.read_text())
    differences = {}
    for case, (metrics, *samples) in one.items():
        limit = LIMITS[case.split(", ")[-1]]
        assert several[case][1:] == samples
        differences[case] = 0.0
        for a, b in zip(metrics, several[case][0], strict=True):
            for name, value in a.items():
                difference = abs(value - b[name])
                assert "second" in name or name == "tokens_per_s" or difference < 100 * limit * max(1, abs(value)), (case, name, a, b)
                if name == "loss":
                    differences[case] = max(differences[case], difference)
    return differences


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


def assert_equal(ranks, names, dtypes, folder, shard_ranks=None):
    differences = compare(ranks, names, dtypes, folder, shard_ranks)
    too_large = {case: d for case, d in differences.items() if not d < LIMITS[case.split(", ")[-1]]}
    assert not too_large


def test_two_ranks_train_as_one(models):
    names = ["ckd", "ckd, idle ranks", "simrl, mean of sequences", "simrl, sampling"]
    assert_equal(2, names, ["float64"], models)


@LONG
@pytest.mark.parametrize("ranks, shard_ranks", [(2, None), (3, None), (4, None), (2, 1), (4, 2)])
def test_any_number_of_ranks_trains_as_one(models, ranks, shard_ranks):
    assert_equal(ranks, list(CASES), list(LIMITS), models, shard_ranks)


def main(words):
    if "WORLD_SIZE" in os.environ:
        torch.set_num_threads(1)
        train.pick_device("cpu")
        result = run_cases(*json.loads(words[0]))
        if train.rank() == 0:
            Path(words[1]).write_text(json.dumps(result))
        train.wait_for_ranks()
        return
    with tempfile.TemporaryDirectory() as folder:
        make_models(folder)
        columns = {"2": (2, None), "3": (3, None), "4": (4, None), "2 x 2": (4, 2)}
        table = {}
        for column, (ranks, shard_ranks) in columns.items():
            started = time.perf_counter()
            for case, difference in compare(ranks, list(CASES), list(LIMITS), folder, shard_ranks).items():
                table.setdefault(case, []).append(f"{difference:.0e}")
            print(f"{column} ranks: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        print_table([["largest difference of a loss", *columns], *([case, *cells] for case, cells in table.items())])


if __name__ == "__main__":
    main(sys.argv[1:])

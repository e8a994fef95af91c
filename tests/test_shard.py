"""Sharded training: several ranks against one, checkpoints that another number of ranks resumes, the memory of a rank.

    python tests/test_shard.py table     the table of tests/README: all cases on 2, 3, 4 and 2 x 2 ranks, some minutes
    python tests/test_shard.py memory    a random 0.6B on 4 ranks and on one, four minutes and 17 GB

STAR_LONG=1 runs the whole table as tests.
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import free_port, settings, stub_record
from safetensors.torch import load_file
from test_cli import CKD, PROGRAM, SIMRL, cut, here, rows, run  # noqa: F401
from test_grpo import StubChat

import shard
import simrl
import train
from ckd import distill
from data import InputError, checkpoints, leave, print_table
from data.groups import Group, Response
from data.checkpoints import latest_checkpoint
from experience import STEPS_PER_EXCHANGE, sample_step
from model import Transformer
from teacher import Teacher

LONG = pytest.mark.skipif("STAR_LONG" not in os.environ, reason="minutes; set STAR_LONG=1")
V = 40
CONFIG = {"model_type": "qwen3", "vocab_size": V, "hidden_size": 16, "intermediate_size": 24,
          "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
          "tie_word_embeddings": True}

# name: (command, flags)
CASES = {objective: ("ckd", {"objective": objective}) for objective in ("ckd", "fkl", "rkl", "akl", "rskd", "ce")}
CASES |= {
    "sft": ("sft", {}),
    "sft, idle ranks": ("sft", {"micro_batch_tokens": 100_000}),
    "ckd, untied head with biases": ("ckd", {"family": "qwen2"}),
    "ckd, idle ranks": ("ckd", {"micro_batch_tokens": 100_000}),
    "ckd, whole copies": ("ckd", {"shard_ranks": 1}),
    "ckd, gradient checkpointing": ("ckd", {"gradient_checkpointing": True}),
    "simrl, mean of tokens": ("simrl", {"loss_mean": "token"}),
    "simrl, mean of sequences": ("simrl", {"loss_mean": "sequence"}),
    "simrl, mean of micro-batches": ("simrl", {"loss_mean": "micro-batch"}),
    "simrl, idle ranks, no reference": ("simrl", {"micro_batch_tokens": 100_000, "kl_weight": 0.0}),
    "simrl, gradient checkpointing": ("simrl", {"gradient_checkpointing": True}),
    "simrl, sampling": ("simrl", {"live": True}),
}
# Of the difference of a loss. In bfloat16, one rank casts weights by autocast, several gather them in bfloat16.
LIMITS = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.05}
ALL_CASES = [(name, dtype) for dtype in ("float64", "float32") for name in CASES]


# ---- Cases, on any number of ranks

def random_groups(seed, count):
    """Groups with two to four responses, as the sampler leaves them."""
    r = random.Random(seed)
    groups = []
    for number in range(count):
        group = Group(stub_record(number), [r.randrange(1, V) for _ in range(r.randint(3, 9))], [])
        for _ in range(r.randint(2, 4)):
            ids = [r.randrange(1, V) for _ in range(r.randint(1, 8))]
            response = Response(ids, (0, len(ids)), log_probs=[r.uniform(-4, -3) for _ in ids])
            response.reward = response.answer_score = r.random()
            response.details = {}
            group.responses.append(response)
        groups.append(group)
    return groups


def stored_step(sampler, prompts, first, score, has_signal, args, stop):
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
    """A model of a run, sharded if there are several ranks, with weights in float32 or float64."""
    dtype = torch.promote_types(getattr(torch, args.dtype), torch.float32)
    model = Transformer.from_pretrained(folder, dtype, shard=train.sharding(args, torch.device("cpu")))
    model.model.gradient_checkpointing = args.gradient_checkpointing
    return model


@cache  # several numbers of ranks are compared with the same run on one
def run_case(name, dtype, folder, shard_ranks=None, steps=20):
    """Run a case. Returns the rows of its metrics.jsonl and, if it samples, of its samples.jsonl."""
    command, flags = CASES[name]
    small = {"lr": 1e-2, "seed": 1, "micro_batch_tokens": 60, "batch_size": 12, "steps": steps, "save_every": 100}
    small |= {"shard_ranks": shard_ranks}
    small |= {"n": 3, "prompts_per_step": 8, "max_new_tokens": 4, "filter": "none"} if command == "simrl" else {}
    small |= {"valid_every": 3} if command != "simrl" else {}
    family = flags.get("family", "qwen3")
    live = flags.get("live", False)
    flags = {key: value for key, value in flags.items() if key not in ("family", "live")}
    out = Path(folder) / f"{name}, {dtype}, {train.world_size()} ranks, {shard_ranks}"
    args = settings(command, dtype=dtype, out=str(out), **small | flags)
    model, other = (load(f"{folder}/{family} {seed}", args) for seed in (1, 2))
    if train.rank() == 0:
        shutil.rmtree(out, ignore_errors=True)  # of another test: logs are appended to
        out.mkdir()
    train.wait_for_ranks()
    if command == "simrl":
        simrl.sample_step = sample_step if live else stored_step
        prompts = [Group(stub_record(k), [1] * (k % 3) + [k, 1], []) for k in range(2, 12)]
        simrl.refine(model, other if args.kl_weight else None, prompts, Chat(), even_ids, args)
        simrl.sample_step = sample_step
    else:
        teacher = None
        if command == "ckd":
            args.k = args.m = 6
            teacher = Teacher(other, args.k, V, args.seed if args.objective == "rskd" else None)
        distill(model, teacher, random_groups(1, 16), random_groups(2, 3), args)
    train.wait_for_ranks()  # rank 0 has written
    return [rows(out / file) for file in ("metrics.jsonl", "samples.jsonl")[:1 + live]]


def run_cases(cases, *arguments):
    """{"name, dtype": what `run_case` returns}."""
    return {f"{name}, {dtype}": run_case(name, dtype, *arguments) for name, dtype in cases}


def make_models(folder):
    """The folders of two models of each family."""
    for family in ("qwen3", "qwen2"):
        for seed in (1, 2):
            config = CONFIG | {"model_type": family, "tie_word_embeddings": family == "qwen3"}
            Transformer(config).init_weights(seed, 0.1).save_pretrained(Path(folder) / f"{family} {seed}")


def start_ranks(ranks, *words, **environment):
    """Start a Python program on several ranks, without torchrun, which takes seconds. Returns the processes."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    env |= {"WORLD_SIZE": str(ranks)} | environment
    return [subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                             text=True, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)]


def finish_ranks(processes):
    """Wait for the processes. Returns their exit codes and what they wrote to stderr."""
    try:
        errors = [process.communicate(timeout=1200)[1] for process in processes]  # the first has the progress bar
    finally:
        for process in processes:
            process.kill()  # if a rank waits for one that has ended
    return [process.returncode for process in processes], errors


def compare(ranks, cases, folder, shard_ranks=None, steps=20):
    """Run cases on one rank, in this process, and on several. {"name, dtype": the largest difference of a loss}.

    Also asserts that all other metrics agree, and samples exactly.
    """
    result = Path(folder) / "result.json"
    processes = start_ranks(ranks, __file__, "cases", json.dumps([cases, str(folder), shard_ranks, steps]), result)
    one = run_cases(cases, str(folder), None, steps)
    codes, errors = finish_ranks(processes)
    assert not any(codes), errors
    several = json.loads(result.read_text())
    differences = {}
    for case, (metrics, *samples) in one.items():
        limit = LIMITS[case.split(", ")[-1]]
        assert several[case][1:] == samples
        differences[case] = 0.0
        for a, b in zip(metrics, several[case][0], strict=True):
            for name, value in a.items():
                if name not in ("seconds", "tokens_per_s", "memory_gb") and not name.startswith("seconds_"):
                    assert b[name] == pytest.approx(value, rel=100 * limit, abs=100 * limit), (case, name, a["step"])
                if name == "loss":
                    differences[case] = max(differences[case], abs(value - b[name]))
    return differences


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


def assert_equal(*arguments):
    differences = compare(*arguments)
    too_large = {case: d for case, d in differences.items() if not d < LIMITS[case.split(", ")[-1]]}
    assert not too_large


def test_two_ranks_train_as_one(models):
    """Float64 to rounding. In bfloat16, a validation before the checkpoint gathers bfloat16 weights: not saved."""
    float64 = ["ckd, gradient checkpointing", "sft, idle ranks", "ckd, whole copies", "simrl, mean of tokens",
               "simrl, sampling"]
    assert_equal(2, [*((name, "float64") for name in float64), ("sft", "bfloat16")], models, None, 6)
    weights = load_file(models / "sft, bfloat16, 2 ranks, None/checkpoints/step-000006/weights.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@LONG
@pytest.mark.parametrize("ranks, shard_ranks", [(2, None), (3, None), (4, None), (2, 1), (4, 2)])
def test_any_number_of_ranks_trains_as_one(models, ranks, shard_ranks):
    assert_equal(ranks, ALL_CASES, models, shard_ranks)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=LONG)])
def test_ranks_read_one_cache(here, ranks):  # noqa: F811
    """Written by one process, and not changed."""
    flags = f"{CKD} --steps 3 --cache cache --micro-batch-tokens 300 --out"  # work for all ranks
    assert run(f"{flags} one") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("cache").iterdir()}
    codes, errors = finish_ranks(start_ranks(ranks, PROGRAM, *f"{flags} several".split()))
    assert not any(codes), errors
    assert before == {path: path.stat().st_mtime_ns for path in Path("cache").iterdir()}
    for a, b in zip(rows("one/metrics.jsonl"), rows("several/metrics.jsonl"), strict=True):
        for name in a.keys() & {"loss", "kl", "tail", "grad_norm", "valid_kl"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4), (name, a["step"])
    cut("cache/log_p.bin")
    codes, errors = finish_ranks(start_ranks(ranks, PROGRAM, *f"{flags} more".split()))
    assert codes == [2] * ranks and str(errors).count("log_p.bin is not as it was when this was written; remove") == 1, errors


# ---- Work of the ranks

def test_long_responses_keep_their_rank_from_further_prompts(monkeypatch):
    """Runs as rank 0 of 2. Its two prompts finish last, so rank 1 samples all others."""
    row = Response([1], (0, 1), log_probs=[0.0], finish_reason="stop", text="1", reward=1.0, answer_score=1.0)
    of_rank_1 = iter([[1, 3], [4, 5], []])
    added = []

    def gather(states):
        return [*states, (4, False, {number: [row, row] for number in next(of_rank_1)})]

    def step():
        sampler.num_free = 0
        last = next(passes) == 3 * STEPS_PER_EXCHANGE - 1
        for request in added if last else ():
            request.responses = [row, row]
        return added if last else []

    passes = count()
    model = SimpleNamespace(head_weight=torch.zeros(1))
    sampler = SimpleNamespace(num_free=4, add=added.append, step=step, clear=int, model=model, chat=StubChat())
    monkeypatch.setattr(train, "world_size", lambda: 2)
    monkeypatch.setattr(train, "gather_over_ranks", gather)
    args = settings("simrl", n=2, prompts_per_step=6, max_draws=1)
    prompts = [Group(stub_record(number), [1, 2], []) for number in range(6)]
    used, kept, _ = sample_step(sampler, prompts, 0, even_ids, lambda *_: True, args)
    assert [request.number for request in added] == [0, 2]
    assert len(used) == len(kept) == 6


# ---- Checkpoints

RUNS = {"ckd": f"{CKD} --steps 12 --save-every 2 --out", "simrl": f"{SIMRL} --steps 12 --save-every 2 --out"}


@pytest.mark.parametrize("command, first, second", [
    ("ckd", 2, 1), *(pytest.param(*case, marks=LONG) for case in (
        ("ckd", 1, 3), ("ckd", 3, 4), ("simrl", 2, 1), ("simrl", 1, 3), ("simrl", 4, 2)))])
def test_a_checkpoint_resumes_on_another_number_of_ranks(here, command, first, second):  # noqa: F811
    assert run(f"{RUNS[command]} whole") == 0
    words = f"{RUNS[command]} run --resume".split()
    processes = start_ranks(first, PROGRAM, *words)
    log = Path("run/metrics.jsonl")
    while not (log.exists() and '"step": 5,' in log.read_text()):
        assert all(process.poll() is None for process in processes), finish_ranks(processes)
        time.sleep(0.001)
    for process in processes:
        process.kill()
    codes, _ = finish_ranks(processes)
    assert set(codes) == {-signal.SIGKILL} and latest_checkpoint("run") >= 4
    step = Path(f"run/checkpoints/step-{latest_checkpoint('run'):06d}")
    assert shapes(step) == shapes("whole/checkpoints/step-000012")
    if second == 1:
        assert run(f"{RUNS[command]} run --resume") == 0
    else:
        codes, errors = finish_ranks(start_ranks(second, PROGRAM, *words))
        assert not any(codes), errors
    for a, b in zip(rows("whole/metrics.jsonl"), rows("run/metrics.jsonl"), strict=True):
        for name, value in a.items():
            if not name.startswith("seconds") and name not in ("tokens_per_s", "memory_gb"):
                assert b[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert texts("run") == texts("whole")
    one, other = (load_file(f"{out}/model/model.safetensors") for out in ("whole", "run"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("command, ranks", [("ckd", 2), *(pytest.param(*case, marks=LONG) for case in (
    ("ckd", 3), ("simrl", 2), ("simrl", 3)))])
def test_a_rank_that_dies_ends_the_others(here, command, ranks):  # noqa: F811
    codes, errors = finish_ranks(start_ranks(ranks, PROGRAM, *f"{RUNS[command]} whole".split()))
    assert not any(codes), errors
    log = Path("run/metrics.jsonl")
    for victim, step in ((ranks - 1, 3), (0, 6)) if "STAR_LONG" in os.environ else ((ranks - 1, 3),):
        processes = start_ranks(ranks, PROGRAM, *f"{RUNS[command]} run --resume".split())
        while not (log.exists() and f'"step": {step},' in log.read_text()):
            assert all(process.poll() is None for process in processes), finish_ranks(processes)
            time.sleep(0.001)
        start = time.monotonic()
        processes[victim].kill()
        codes, errors = finish_ranks(processes)
        assert time.monotonic() - start < 10 and codes[victim] == -signal.SIGKILL
        assert [code for rank, code in enumerate(codes) if rank != victim] == [1] * (ranks - 1), (codes, errors)
        lines = [line for text in errors for line in text.splitlines() if line.startswith("star.py")]
        assert len(lines) == (victim > 0) and "Traceback" not in str(errors), errors
    codes, errors = finish_ranks(start_ranks(ranks, PROGRAM, *f"{RUNS[command]} run --resume".split()))
    assert not any(codes), errors
    assert Path("run/model/model.safetensors").read_bytes() == Path("whole/model/model.safetensors").read_bytes()


ABORTED_AT_EXIT = """
import atexit, os, runpy, sys
sys.path.insert(0, {root!r})
atexit.register(os.abort)
runpy.run_path({program!r}, run_name="__main__")
"""


@pytest.mark.parametrize("flag,code", (("", 0), ("--optimiser muon", 2)), ids=("success", "bad input"))
def test_a_rank_leaves_without_the_shutdown_of_python(here, flag, code):  # noqa: F811
    """In which a thread of torch may abort it: seen twice, on busy machines."""
    Path("aborted.py").write_text(ABORTED_AT_EXIT.format(root=str(Path(PROGRAM).parent), program=PROGRAM))
    codes, errors = finish_ranks(start_ranks(2, "aborted.py", *f"{RUNS['ckd']} run {flag}".split()))
    assert codes == [code, code], errors


ONE_IS_MISSING = """
import os, runpy, sys
from datetime import timedelta
sys.path.insert(0, {root!r})
import train
train.MEETING = timedelta(seconds=3)
if os.environ["RANK"] == "0":
    runpy.run_path({program!r}, run_name="__main__")
"""


def test_a_rank_that_never_appears(here):  # noqa: F811
    """As with a wrong MASTER_ADDR: one line after ten minutes, here after three seconds. (torch adds lines of its own.)"""
    Path("missing.py").write_text(ONE_IS_MISSING.format(root=str(Path(PROGRAM).parent), program=PROGRAM))
    codes, errors = finish_ranks(start_ranks(2, "missing.py", *f"{RUNS['ckd']} run".split()))
    lines = [line for line in errors[0].splitlines() if line.startswith("star.py")]
    assert codes == [1, 0] and len(lines) == 1 and "Traceback" not in errors[0], errors
    assert "cannot be reached (Timed out after" in lines[0] and not Path("run").exists()


DIFFERENT = """
import os, runpy, sys
sys.path.insert(0, {root!r})
if os.environ["RANK"] == "1":
    {change}
runpy.run_path({program!r}, run_name="__main__")
"""


@pytest.mark.parametrize("change, message", [
    ("sys.argv += ['--save-every', '3']", "the ranks have different flags; start all with the same command"),
    ("os.chdir('other')", "the ranks have different models or data; start all with the same command")])
def test_ranks_with_different_flags_or_files_are_refused(here, change, message):  # noqa: F811
    """Each machine has its own command line and its own disk."""
    shutil.copytree(here, "other", symlinks=True)
    Path("other/train.jsonl").unlink()
    Path("other/train.jsonl").write_text("\n".join(Path("train.jsonl").read_text().splitlines()[1:]))
    Path("different.py").write_text(DIFFERENT.format(change=change, root=str(Path(PROGRAM).parent), program=PROGRAM))
    codes, errors = finish_ranks(start_ranks(2, "different.py", *f"{RUNS['ckd']} run".split()))
    lines = [line for text in errors for line in text.splitlines() if line.startswith("star.py")]
    assert codes == [2, 2] and len(lines) == 1 and message in lines[0] and not Path("run").exists(), errors


def test_a_wrong_flag_is_reported_once(here):  # noqa: F811
    codes, errors = finish_ranks(start_ranks(2, PROGRAM, *f"{RUNS['ckd']} run --bad 1".split()))
    assert codes == [2, 2] and str(errors).count("unrecognized arguments: --bad 1") == 1, errors


SLOW_SAVE = """
import runpy, sys, time
from datetime import timedelta
sys.path.insert(0, {root!r})
import train
from data import checkpoints
train.LIMIT = timedelta(seconds=4)
save = checkpoints.save_tensors
checkpoints.save_tensors = lambda tensors, path: (save(tensors, path), time.sleep(6 * ("step-000004" in str(path))))
runpy.run_path({program!r}, run_name="__main__")
"""


@LONG
@pytest.mark.parametrize("command", RUNS)
def test_a_save_longer_than_the_time_limit_of_a_collective(here, command):  # noqa: F811
    """Rank 1 gives up waiting in the second save; one line; both resume from the first. (The limit is a day.)"""
    Path("slow.py").write_text(SLOW_SAVE.format(root=str(Path(PROGRAM).parent), program=PROGRAM))
    codes, errors = finish_ranks(start_ranks(2, PROGRAM, *f"{RUNS[command]} whole".split()))
    assert not any(codes), errors
    codes, errors = finish_ranks(start_ranks(2, "slow.py", *f"{RUNS[command]} run".split()))
    lines = [line for text in errors for line in text.splitlines() if line.startswith("star.py")]
    assert codes == [1, 1] and len(lines) == 1 and "Traceback" not in str(errors), errors
    assert latest_checkpoint("run") == 2
    codes, errors = finish_ranks(start_ranks(2, PROGRAM, *f"{RUNS[command]} run --resume".split()))
    assert not any(codes), errors
    assert Path("run/model/model.safetensors").read_bytes() == Path("whole/model/model.safetensors").read_bytes()


def texts(out):
    """What a run has sampled."""
    if Path(out, "samples.json").exists():
        return json.loads(Path(out, "samples.json").read_text())
    return [sample["text"] for row in rows(f"{out}/samples.jsonl") for sample in row["samples"]]


def shapes(folder):
    """{file: {name: dtype and shape}} of the safetensors files in a folder."""
    return {path.name: {name: (tensor.dtype, tensor.shape) for name, tensor in load_file(path).items()}
            for path in Path(folder).glob("*.safetensors")}


# ---- What several ranks refuse

def test_a_whole_model_does_not_train_on_several_ranks(monkeypatch):
    model = Transformer(CONFIG)
    train.make_optimisers(model, settings("ckd"))
    monkeypatch.setattr(shard, "world_size", lambda: 2)
    with pytest.raises(AssertionError, match="not sharded"):
        train.make_optimisers(model, settings("ckd"))


@pytest.mark.parametrize("flags, message", [
    ({"shard_ranks": 3}, "--shard-ranks 3: must divide the number of processes, 4"),
    ({"optimiser": "muon"}, "--optimiser muon: runs without torchrun only; use adamw")])
def test_flags_that_do_not_fit_the_ranks(monkeypatch, flags, message):
    monkeypatch.setattr(train, "world_size", lambda: 4)
    with pytest.raises(InputError, match=message):
        train.sharding(settings("sft", **flags), torch.device("cpu"))


def test_more_ranks_than_gpus(monkeypatch):
    args = settings("sft", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for number, error, message in (("2", InputError, "no GPU for rank 2; use --nproc-per-node 2"),
                                   ("3", SystemExit, "2")):  # one line for all
        monkeypatch.setenv("LOCAL_RANK", number)
        with pytest.raises(error, match=message):
            train.pick_device(args)


# ---- Memory

def own_memory():
    """GB of memory that only this process has: RssAnon, without the pages of mapped files."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e6


def watch_memory(peaks):
    while True:
        peaks[-1] = max(peaks[-1], own_memory())
        time.sleep(0.005)


def train_and_watch(folder, dtype):
    """Train a model for two steps of sft. Returns the GB that this rank needed [before the checkpoint, with it]."""
    import torch.distributed.fsdp  # noqa: F401  or it would count
    start = own_memory()
    peaks = [0.0]
    threading.Thread(target=watch_memory, args=(peaks,), daemon=True).start()
    args = settings("sft", dtype=dtype, out=f"{folder}/run", steps=2, batch_size=8, micro_batch_tokens=100,
                    gradient_checkpointing=True, save_every=2)
    model = Transformer.from_pretrained(folder, shard=train.sharding(args, torch.device("cpu")))
    model.model.gradient_checkpointing = args.gradient_checkpointing
    save = checkpoints.save_checkpoint
    checkpoints.save_checkpoint = lambda *call: peaks.append(0.0) or save(*call)
    Path(args.out).mkdir(exist_ok=True)
    distill(model, None, random_groups(0, 4), [], args)
    return [round(peak - start, 2) for peak in (peaks[0], max(peaks))]


def memory_of_ranks(ranks, folder, dtype):
    """`train_and_watch` on some ranks: a list of its results."""
    outputs = [Path(folder) / f"memory {rank}.json" for rank in range(ranks)]
    # By default glibc keeps freed blocks below a threshold that grows; here the size must be what is held.
    allocator = {"STAR_KEEP_PAGES": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    codes, errors = finish_ranks(start_ranks(ranks, __file__, "watch", folder, dtype, **allocator))
    assert not any(codes), errors
    return [json.loads(output.read_text()) for output in outputs]


@LONG
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_rank_holds_its_part_only(tmp_path):
    """15.8 M parameters of 16 bytes: 0.25 GB on one rank; on two, half of it and a layer that is gathered."""
    config = CONFIG | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "head_dim": 256}
    model = Transformer(config).init_weights(0)
    model.save_pretrained(tmp_path)
    training = [before_saving for before_saving, _ in memory_of_ranks(2, tmp_path, "float32")]
    assert max(training) < 0.22 < 16 * model.num_parameters() / 1e9


def measure_memory(layers=28, vocab_size=151_936):
    """A random model of the shape of Qwen3-0.6B, on four ranks and on one. The whole model takes 17 GB and 10 on disk."""
    config = CONFIG | {"vocab_size": int(vocab_size), "num_hidden_layers": int(layers), "hidden_size": 1024,
                       "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    with tempfile.TemporaryDirectory() as folder:
        model = Transformer(config).init_weights(0)
        print(f"{model.num_parameters() / 1e6:,.0f} M parameters, 2 steps of sft; GB before and with the checkpoint")
        model.save_pretrained(folder, torch.bfloat16)
        del model
        for ranks in (4, 1):
            print(f"{ranks} ranks:", memory_of_ranks(ranks, folder, "float32"), flush=True)


def print_differences():
    """The table of tests/README."""
    with tempfile.TemporaryDirectory() as folder:
        make_models(folder)
        columns = {"2": (2, None), "3": (3, None), "4": (4, None), "2 x 2": (4, 2)}
        table = {}
        for column, (ranks, shard_ranks) in columns.items():
            started = time.perf_counter()
            for case, difference in compare(ranks, ALL_CASES, folder, shard_ranks).items():
                table.setdefault(case, []).append(f"{difference:.0e}")
            print(f"{column} ranks, {time.perf_counter() - started:.0f} s:", [cells[-1] for cells in table.values()])
        print_table([["largest difference of a loss", *columns], *([case, *cells] for case, cells in table.items())])


def main(command, *words):
    torch.set_num_threads(1)
    if command == "table":
        print_differences()
    elif command == "memory":
        measure_memory(*words)
    elif command == "cases":  # as a rank
        train.pick_device(settings("sft", device="cpu"))
        arguments, output = words
        result = run_cases(*json.loads(arguments))
        if train.rank() == 0:
            Path(output).write_text(json.dumps(result))
        leave(0)
    elif command == "watch":  # as a rank
        train.pick_device(settings("sft", device="cpu"))
        folder, dtype = words
        Path(folder, f"memory {train.rank()}.json").write_text(json.dumps(train_and_watch(folder, dtype)))
        leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

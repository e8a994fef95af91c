"""star.py as a user meets it: the errors, the files it writes, and runs that are stopped and resumed."""
import argparse
import doctest
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import simrl
import star
from data.chat import Chat
from data.rollouts import prompt_groups
from model import Transformer

PROGRAM = str(Path(star.__file__))
TRAIN = ("--data train.jsonl --out run --batch-size 8 --steps 2 --hold-out 4 --samples 1 --lr 1e-3 --dtype float32 "
         "--device cpu --max-response-tokens 128 --save-dtype float32")
SFT = f"sft --model student {TRAIN}"
CKD = f"ckd --teacher teacher --student student {TRAIN} --k 5 --m 5"
ROLLOUT = ("rollout --model teacher --data train.jsonl --out out.jsonl --n 2 --max-new-tokens 8 --dtype float32 "
           "--keep-all")
EVAL = ("eval --model student --data train.jsonl --out scores --max-new-tokens 4 --limit 6 --max-concurrent 8 "
        "--dtype float32 --device cpu --think off")
LENS = "lens --teacher teacher --student student --data train.jsonl --out page.html --k 20 --m 20 --device cpu"
SIMRL = ("simrl --model student --data train.jsonl --out run --prompts-per-step 4 --n 2 --batch-size 4 --steps 3 "
         "--max-new-tokens 8 --filter none --think off --dtype float32 --device cpu --save-dtype float32 --lr 1e-3 "
         "--save-every 1")


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of the world, and the current folder."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command):
    """Run a command in this process. Returns the exit code."""
    try:
        return star.main(command.split())
    except SystemExit as e:  # argparse
        return e.code


# Runs star.py, which then sleeps after each line of a log or a rollout: a run that is to be killed must not end first.
SLOWLY = f"""
import runpy, sys, time
del sys.argv[0]
sys.path.insert(0, {str(Path(PROGRAM).parent)!r})
from data import rollouts, runs
def slow(write):
    return lambda *words: (write(*words), time.sleep(0.05))
runs.log_metrics, rollouts.append_rollout = slow(runs.log_metrics), slow(rollouts.append_rollout)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_slowly(command):
    return start(command, ("-c", SLOWLY))


def start(command, launcher=(), stdout=subprocess.DEVNULL, **environment):
    """Start a command as a process of its own, with stderr as a pipe."""
    words = [sys.executable, *launcher, PROGRAM, *command.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores Ctrl-C
    return subprocess.Popen(words, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=listen)


def files(folder):
    """{path: bytes} of everything under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def tensors(folder):
    """{path: {name: tensor}} of the safetensors files under a folder."""
    return {str(path): load_file(path) for path in Path(folder).rglob("*.safetensors")}


# ---- Errors ------------------------------------------------------------------------------------------------------

def edit(path, **values):
    """Change some values of a JSON object in a file."""
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | values))


def cut(path):
    """Keep the first half of a file, as a broken download does."""
    Path(path).write_bytes(Path(path).read_bytes()[:Path(path).stat().st_size // 2])


def change_byte(path):
    """Flip a bit of a file's last byte."""
    data = bytearray(Path(path).read_bytes())
    data[-1] ^= 1
    Path(path).write_bytes(data)


def damage_checkpoint():
    """Change the last byte of moments in the only checkpoint of a run."""
    Path("run/summary.json").unlink()
    path, = Path("run/checkpoints").glob("*/exp_avg.safetensors")
    change_byte(path)


def change_tensors(change, path="student/model.safetensors"):
    """Change the tensors of a safetensors file: `change` gets the dict of them."""
    state = load_file(path)
    change(state)
    save_file(state, path)


def change_line(change, number=3):
    """Change one line of train.jsonl; `change` takes and returns a record, or returns text."""
    lines = Path("train.jsonl").read_text().splitlines()
    changed = change(json.loads(lines[number - 1]))
    lines[number - 1] = changed if isinstance(changed, str) else json.dumps(changed)
    Path("train.jsonl").write_text("\n".join(lines) + "\n")


def change_responses(value):
    change_line(lambda record: record | {"responses": value})


def change_tokenizer(folder, change):
    """Change the text of a folder's tokenizer.json."""
    path = Path(folder) / "tokenizer.json"
    path.write_text(change(path.read_text()))


def lose_shard(folder="student"):
    """Name a second shard that does not exist."""
    Path(f"{folder}/model.safetensors").rename(f"{folder}/model-1.safetensors")
    names = list(load_file(f"{folder}/model-1.safetensors"))
    index = {name: "model-1.safetensors" for name in names[1:]} | {names[0]: "model-2.safetensors"}
    Path(f"{folder}/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def run_before(command, breaks=None):
    """Run a command that works, then break something for the next one."""
    assert run(command) == 0
    if breaks:
        breaks()


# name: command, what breaks it, the message (the file first)
REFUSED = {
    "no student": (f"{CKD} --student nowhere", None, "nowhere/config.json: no such file; give a whole model folder"),
    "no teacher": (f"{CKD} --teacher nowhere", None, "nowhere/.*: no such file; "),
    "no model": (f"{SFT} --model nowhere", None, "nowhere/config.json: no such file; give a whole model folder"),
    "no model to sample": (f"{ROLLOUT} --model nowhere", None, "nowhere/config.json: no such file; give a whole model"),
    "no model to talk to": ("chat --model nowhere", None, "nowhere/config.json: no such file; give a whole model"),
    "no tokenizer": (SFT, lambda: os.remove("student/tokenizer.json"), "student/tokenizer.json: no such file; "),
    "no teacher's tokenizer": (CKD, lambda: os.remove("teacher/tokenizer.json"), "teacher/tokenizer.json: no such fi"),
    "a file as model": (f"{SFT} --model train.jsonl", None, "train.jsonl/config.json: no such file; give a wh"),
    "no weights": (SFT, lambda: os.remove("student/model.safetensors"), "student: no model.safetensors; only safeten"),
    "missing shard": (SFT, lose_shard, "student/model-2.safetensors: missing shard named by .*; download or copy"),
    "missing shard of the teacher": (CKD, lambda: lose_shard("teacher"), "teacher/model-2.safetensors: missing shard"),
    "half the weights": (SFT, lambda: cut("student/model.safetensors"), "student/model.safetensors: not a whole .*; "),
    "half a model to sample": (ROLLOUT, lambda: cut("teacher/model.safetensors"), "teacher/model.safetensors: not a"),
    "half the teacher": (CKD, lambda: cut("teacher/model.safetensors"), "teacher/model.safetensors: not a whole .*; "),
    "half a config": (SFT, lambda: cut("student/config.json"), r"student/config.json: is not JSON .*; give a"),
    "other family": (SFT, lambda: edit("student/config.json", model_type="llama"),
                     "student/config.json: .*model_type 'llama'.*; use a Qwen2.5 or Qwen3 folder"),
    "experts": (SFT, lambda: edit("student/config.json", num_experts=8), "config.json: mixture of experts .*; use a d"),
    "window": (SFT, lambda: edit("student/config.json", use_sliding_window=True), "config.json: sliding-window .*; "),
    "rope": (SFT, lambda: edit("student/config.json", rope_scaling={"type": "yarn", "factor": 4.0}),
             r"config.json: rope scaling \(yarn\) is not supported; "),
    "wrong shape": (SFT, lambda: change_tensors(lambda t: t.update({"model.norm.weight": torch.ones(7)})),
                    r"student/model.safetensors: model.norm.weight is \[7\], config.json says \[32\]; the folder"),
    "wrong shape in the teacher": (
        CKD, lambda: change_tensors(lambda t: t.update({"model.norm.weight": torch.ones(7)}),
                                    "teacher/model.safetensors"),
        r"teacher/model.safetensors: model.norm.weight is \[7\]"),
    "missing tensor": (SFT, lambda: change_tensors(lambda t: t.pop("model.norm.weight")),
                       "student: no tensor model.norm.weight in its .*; download or copy"),
    "broken tokenizer": (SFT, lambda: Path("student/tokenizer.json").write_text('{"model": {"type": "BPE"}}'),
                         "student/tokenizer.json: .*Missing vocab.*; download or copy it again"),
    "broken tokenizer of the teacher": (CKD, lambda: Path("teacher/tokenizer.json").write_text('{"model": {}}'),
                                        "teacher/tokenizer.json: .*; download or copy it again"),
    "other tokenizers": (CKD, lambda: change_tokenizer("teacher", lambda text: text.replace("</think>", "</thank>")),
                         "teacher .* and student .* have different tokenizers; CKD needs two models that share one"),
    "no think token": (f"{SFT} --think none --mask think", lambda: change_tokenizer(
        "student", lambda text: text.replace("</think>", "</thank>")), "--mask think: .* no </think> token; use --"),
    "no data": (f"{SFT} --data nowhere.jsonl", None, "nowhere.jsonl: cannot be read .*; give a .jsonl"),
    "empty data": (SFT, lambda: Path("train.jsonl").write_text(""), "train.jsonl: holds no records; give a file"),
    "not JSON": (SFT, lambda: change_line(lambda record: '{"messages": ['),
                 "train.jsonl:3: is not JSON .*; each line must"),
    "no answer": (SFT, lambda: change_line(lambda record: record | {"answer": None}),
                  "train.jsonl:3: no answer; give a last"),
    "unknown tool": (SFT, lambda: change_line(lambda record: record | {"tools": []}),
                     "train.jsonl:3: the answer calls .*; "),
    "bad validation data": (f"{SFT} --valid nowhere.jsonl", None, "nowhere.jsonl: cannot be read .*; give a .jsonl"),
    "text as responses": (SFT, lambda: change_responses("a call"), "train.jsonl:3: .*responses.*; run rollout again"),
    "a number as response": (SFT, lambda: change_responses([7]), "train.jsonl:3: .*responses.*; run rollout again"),
    "a response of nothing": (SFT, lambda: change_responses([{"reward": 1}]),
                              "train.jsonl:3: .*responses.*; run rollout ag"),
    "ids as text": (SFT, lambda: change_responses([{"text": "x", "ids": "x"}]),
                    "train.jsonl:3: .*ids.*; run rollout again"),
    "ids as fractions": (CKD, lambda: change_responses([{"text": "x", "ids": [1.5]}]),
                         "train.jsonl:3: .*ids.*; run rollout"),
    "ids too large": (CKD, lambda: change_responses([{"text": "x", "ids": [1, 9999]}]),
                      "train.jsonl:3: .*ids.*; run rollout"),
    "ids below zero": (SFT, lambda: change_responses([{"text": "x", "ids": [-1]}]),
                       "train.jsonl:3: .*ids.*; run rollout aga"),
    "all prompts too long": (f"{SFT} --max-prompt-tokens 3", None, "train.jsonl: no record is left .*; "),
    "run exists": (SFT, lambda: run_before(SFT), "run: exists already; continue it with --resume, remove it"),
    "run is a file": (f"{SFT} --out train.jsonl", None, "train.jsonl: is a file; --out names a folder"),
    "run is a file, resumed": (f"{SFT} --out train.jsonl --resume", None, "train.jsonl: is a file; --out names"),
    "resume what is no run": (f"{SFT} --out teacher --resume", None, "teacher: .*not .*a run.*; "),
    "a run in the model that it reads": (f"sft --model run/model {TRAIN} --resume", lambda: run_before(SFT),
                                         r"run: was started with another model \(student, now run/model\); resume"),
    "a checkpoint that was cut": (f"{SFT} --resume", lambda: run_before(SFT, lambda: (Path("run/summary.json").unlink(), cut(
        str(next(Path("run/checkpoints").iterdir()) / "weights.safetensors")))),
        "run/checkpoints/step-0*[0-9]+: weights.safetensors is not as it was .*; remove that folder to"),
    "a checkpoint with another byte": (f"{SFT} --resume", lambda: run_before(SFT, damage_checkpoint),
        "run/checkpoints/step-0*[0-9]+: exp_avg.safetensors is not as it was .*; remove that folder to"),
    "a cache in place of the model": (f"{CKD} --cache run/model", None, "run/model: --cache and --out run lie one in the"),
    "a run in its cache": (f"{CKD} --cache cache --out cache/run", None, "cache: --cache and --out cache/run lie one in"),
    "a run that is its cache": (f"{CKD} --cache run", None, "run: --cache and --out run lie one in the other"),
    "other settings": (f"{CKD} --k 7 --lr 1 --resume", lambda: run_before(CKD),
                       "run: was started with another .*k.*; resu"),
    "cache of another teacher": (
        f"{CKD} --cache cache --out new", lambda: run_before(
            f"{CKD} --cache cache", lambda: change_tensors(lambda t: t["model.norm.weight"].mul_(2),
                                                           "teacher/model.safetensors")),
        r"cache: this cache was made from another teacher \(.*\); remove the folder or name a new one"),
    "cache of other data": (f"{CKD} --cache cache --limit 20 --out new", lambda: run_before(f"{CKD} --cache cache"),
                            "cache: this cache was made from another data.*; remove the folder or name"),
    "cache of draws": (f"{CKD} --cache cache --out new", lambda: run_before(f"{CKD} --objective rskd --cache cache"),
                       r"cache: this cache was made from another view \(.*\); remove the folder or name a new one"),
    "no cache at all": (f"{CKD} --cache teacher", None, "teacher/cache.json: no such file; --cache takes a new"),
    "broken cache": (f"{CKD} --cache cache --out new", lambda: run_before(
        f"{CKD} --cache cache", lambda: cut("cache/cache.json")), r"cache/cache.json: is not JSON .*; --cache"),
    "rollout exists": (ROLLOUT, lambda: run_before(ROLLOUT),
                       "out.jsonl: exists already; continue it with --resume, remove it"),
    "part of a rollout exists": (ROLLOUT, lambda: Path("out.jsonl.part").write_text(""),
                                 "out.jsonl.part: exists already; continue it with --resume, remove it"),
    "no tools file": ("chat --model student --tools nowhere.json", None, "nowhere.json: no such file; give a JSON lis"),
    "plot of no run": ("plot teacher --out x.png", None, "teacher: no metrics.jsonl; name the --out folder of a run"),
    "no model to refine": (f"{SIMRL} --model nowhere", None, "nowhere/config.json: no such file; give a whole model"),
    "Sim-RL on too long prompts": (f"{SIMRL} --max-prompt-tokens 3", None, "train.jsonl: no prompt is left to answer"),
    "Sim-RL without gold": (SIMRL, lambda: change_line(lambda record: record | {"answer": None,
                            "responses": [{"text": "x"}]}),
                            "train.jsonl:[0-9]+: record .* has no gold answer .*; add one, or remove the record"),
    "other settings of Sim-RL": (f"{SIMRL} --n 3 --resume", lambda: run_before(SIMRL),
                                 r"run: was started with another n \(\d, now 3\); "),
    "rollout over what it reads": (f"{ROLLOUT} --out train.jsonl --resume", None,
                                   "train.jsonl: would be written over train.jsonl, which"),
    "a finished rollout of another model": (f"{ROLLOUT} --model student --resume", lambda: run_before(ROLLOUT),
                                            r"out.jsonl: was started with another model \(teacher, now student\); resume with"),
    "resume another command's run": (f"{SFT} --resume", lambda: run_before(CKD), "run: was started with the command ckd"),
    "evaluate into the model": (f"{EVAL} --model run/model --out run --resume", lambda: run_before(SFT),
                                "run: was started with the command sft, not eval; "),
    "evaluate no data": (f"{EVAL} --data nowhere.jsonl --resume", lambda: run_before(EVAL),
                         "nowhere.jsonl: cannot be"),
    "evaluate no model": (f"{EVAL} --model nowhere", None, "nowhere/config.json: no such file; give a whole model"),
    "compare with nothing": (f"{EVAL} --compare nowhere", None,
                             "nowhere/arguments.json: no such file; --compare takes"),
    "no teacher to look at": (f"{LENS} --teacher nowhere", None, "nowhere/tokenizer.json: no such file; give a whole"),
    "no student to look at": (f"{LENS} --student nowhere", None, "nowhere/config.json: no such file; give a whole mo"),
    "half a student to look at": (LENS, lambda: cut("student/model.safetensors"), "student/model.safetensors: not a"),
    "look with other tokenizers": (
        LENS, lambda: change_tokenizer("teacher", lambda text: text.replace("</think>", "</thank>")),
        "teacher .* and student .* have different tokenizers; CKD needs two models that share one"),
    "look at no data": (f"{LENS} --data nowhere.jsonl", None, "nowhere.jsonl: cannot be read .*; give a .jsonl"),
    "look behind the last record": (f"{LENS} --row 25", None, "train.jsonl: has 24 records; give a --row up to that"),
    "look at no response": (f"{LENS} --response 1", None, "train.jsonl: record 1 has 0 responses; give a --response "),
    "look at no gold": (f"{LENS} --row 3 --response 0", lambda: change_line(
        lambda record: record | {"answer": None, "responses": [{"text": "x"}]}), "train.jsonl: record 3 has no gold a"),
    "look at another rendering": (f"{LENS} --row 3", lambda: change_line(
        lambda record: record | {"rendered": {"think": "off", "tools": "flat"}}), "record .*: was sampled with --thin"),
    "a picture of a response": (f"{LENS} --out page.png", None, "page.png: .*; give an --out that ends in .html"),
    "an endless loss to look at": (f"{LENS} --tail-weight 1e39", None, "the loss is not finite: use a smaller --tail-"),
    "a picture of no kind": ("plot run --out curves", lambda: run_before(SFT), "curves: is not a picture; give an --out"),
    "an empty cache": (f"{CKD} --cache cache --out new", lambda: run_before(
        f"{CKD} --cache cache", lambda: Path("cache/ids.bin").write_bytes(b"")), "cache: ids.bin is not as it was when this was"),
    "half a cache": (f"{CKD} --cache cache --out new", lambda: run_before(
        f"{CKD} --cache cache", lambda: cut("cache/log_p.bin")), "cache: log_p.bin is not as it was when this was"),
    "another byte in a cache": (f"{CKD} --cache cache --out new", lambda: run_before(
        f"{CKD} --cache cache", lambda: change_byte("cache/log_p.bin")), "cache: log_p.bin is not as it was when this was"),
    "a teacher with fewer rows than ids": (
        CKD, lambda: edit("teacher/config.json", vocab_size=300),
        "teacher/tokenizer.json: has [0-9]* ids, the model only 300"),
    "more ids than rows": (SFT, lambda: edit("student/config.json", vocab_size=300),
                           "student/tokenizer.json: has [0-9]* ids, the model only 300"),
    "integers for weights": (SFT, lambda: change_tensors(
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int16)})), "student/model.safetensors: te"),
    "nested JSON": (SFT, lambda: change_line(lambda record: json.dumps(record | {"x": 0}).replace(
        '"x": 0', '"x": ' + "[" * 990 + "]" * 990)), "train.jsonl:3: is not JSON .*; each line"),
    "a large number": (SFT, lambda: edit("student/config.json", rope_theta=10 ** 400),
                       "student/config.json: rope_theta is .*, not a number above 0"),
    "too many layers": (SFT, lambda: edit("student/config.json", num_hidden_layers=2 ** 31 - 1),
                        "student/config.json: num_hidden_layers is .*, not a whole number from 1 to 10,000"),
    "an unknown think opening": (SFT, lambda: edit("student/tokenizer_config.json", default_think="maybe"),
                                 "student/tokenizer_config.json: think is maybe"),
    "look at an empty response": (f"{LENS} --row 3 --response 1", lambda: change_responses(
        [{"text": "", "finish_reason": "length"}]), "train.jsonl: record 3 has an empty response 1; give another"),
    "a table of a broken run": ("table scores", lambda: (run_before(SFT), run_before(
        f"{EVAL} --model run/model"), edit("run/summary.json", seconds=None)), "run/summary.json: seconds is null, not"),
    "a large number in metrics": ("plot run --out x.png", lambda: run_before(SFT, lambda: Path(
        "run/metrics.jsonl").write_text('{"step": 1, "loss": ' + "1" * 400 + "}\n")), "run/metrics.jsonl:1: loss is 1"),
    "demo exists": ("demo --out teacher", None, "teacher: exists already; continue it with --resume, remove it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(here, capsys, name):
    command, breaks, message = REFUSED[name]
    if breaks:
        breaks()
    capsys.readouterr()
    before = files(here)
    assert run(command) == 2
    error = re.sub("^note: .*\n", "", capsys.readouterr().err)
    assert error.count("\n") == 1 and re.match(f"star.py {command.split()[0]}: .*{message}", error), error
    assert files(here) == before  # nothing written, nothing deleted


def test_refused_by_a_process(here):
    (here / "broken.jsonl").write_text("{\n")
    before = files(here)
    for process in [start(f"{SFT} --model nowhere"), start(f"{CKD} --data broken.jsonl")]:  # at the same time
        _, error = process.communicate()
        assert process.returncode == 2 and error.count("\n") == 1 and error.startswith("star.py "), error
    assert files(here) == before


@pytest.mark.parametrize("command", [
    f"{CKD} --k 0", f"{CKD} --k -5", f"{CKD} --m 0", f"{CKD} --tail-weight -1", f"{CKD} --kd-ratio 1.5",
    f"{SFT} --batch-size 0", f"{SFT} --steps 0", f"{SFT} --epochs -1", f"{SFT} --lr -1", f"{SFT} --lr nan",
    f"{SFT} --micro-batch-tokens 0", f"{SFT} --limit -3", f"{SFT} --limit 99999999999999999999", f"{SFT} --valid-limit 0", f"{SFT} --hold-out -1",
    f"{SFT} --valid-every 0", f"{SFT} --save-every 0", f"{SFT} --samples -1", f"{SFT} --weight-decay -1",
    f"{SFT} --max-prompt-tokens 0", f"{SFT} --max-response-tokens 0", f"{SFT} --batch-size many",
    f"{ROLLOUT} --n 0", f"{ROLLOUT} --max-concurrent 0", f"{ROLLOUT} --temperature -1", f"{ROLLOUT} --top-p 0",
    f"{ROLLOUT} --top-p 1.5", f"{ROLLOUT} --max-new-tokens 0", f"{ROLLOUT} --limit 0",
    f"{SIMRL} --n 1", f"{SFT} --seed -1", f"{SFT} --seed 5000000000",
    f"{LENS} --row 0", f"{LENS} --response -1", f"{LENS} --seed 1", f"{SIMRL} --clip 0.2",
    f"{SIMRL} --kl-weight -1", f"{SIMRL} --max-draws 0", f"{SIMRL} --temperature 0", f"{SIMRL} --top-p 0.9",
    f"{SFT} --learning-rate 1", f"{SFT} --mask some", "sft", "distill", ""])
def test_bad_flags(here, capsys, command):
    before = files(here)
    assert run(command) == 2
    *usage, error = capsys.readouterr().err.splitlines()
    assert usage[0].startswith("usage: star.py") and re.match(r"star.py( \w+)?: error: ", error)
    assert files(here) == before


# Settings of the version before, which named some flags differently.
OLD_TRAINING = {"data": "train.jsonl", "limit": None, "max_prompt_tokens": 5120, "valid": None, "valid_limit": None,
                "hold_out": 4, "max_response_tokens": 128, "mask": "all", "epochs": 1, "steps": 2, "branches": 1,
                "think": None, "tools": "flat", "lr": 0.001, "batch": 8, "weight_decay": 0.0, "save_dtype": "float32",
                "dtype": "float32", "seed": 42, "optimiser": "adamw", "valid_every": 100, "samples": 1}
OLD_SETTINGS = {
    "sft": {"command": "sft", "model": "student", **OLD_TRAINING},
    "ckd": {"command": "ckd", "teacher": "teacher", "student": "student", "objective": "ckd", "k": 5, "m": 5,
            "tail_weight": None, "kd_ratio": 1.0, "cache": None, **OLD_TRAINING, "weight_decay": 0.0001},
    "simrl": {"command": "simrl", "model": "student", "data": "train.jsonl", "limit": None, "max_prompt_tokens": 5120,
              "episodes": 3, "steps": 3, "think": "off", "tools": "flat", "temperature": 1.0, "top_p": 1.0,
              "max_new_tokens": 8, "prompts": 4, "n": 2, "reward": "similarity", "strip_eos": False, "filter": "none",
              "max_draws": 4, "advantage": "group_norm", "kl_weight": 0.001, "clip": [0.2, 0.2], "loss_mean": "token",
              "lr": 0.001, "batch": 4, "weight_decay": 0.0, "save_dtype": "float32", "dtype": "float32", "seed": 42}}


@pytest.mark.parametrize("command, new_flags", [
    (SFT, "share_prefix, valid_answers, batch_size"), (CKD, "share_prefix, valid_answers, batch_size"),
    (SIMRL, "valid, valid_limit, valid_every, prompts_per_step, optimiser, batch_size")])
def test_a_run_of_the_version_before_is_refused(here, capsys, command, new_flags):
    name = command.split()[0]
    out = re.search(r"--out (\S+)", command)[1]
    Path(out).mkdir()
    Path(out, "arguments.json").write_text(json.dumps(OLD_SETTINGS[name]))
    before = files(here)
    assert run(f"{command} --resume") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.match(
        rf"star.py {name}: {out}.* another version of this program, without {new_flags}, inputs; .*another --out", error), error
    assert files(here) == before


DIVERGED = (r"star.py \w+: run: step (\d+): (the gradient norm|the validation nll|a weight) is (nan|inf), "
            r"training has diverged; "
            r"(the last good checkpoint is (run/checkpoints/step-\d{6})|there is no checkpoint yet); "
            r"start again with another --out and a lower --lr, or with --dtype float32")


@pytest.mark.parametrize("command, step, name, checkpoint", [
    (f"{SFT} --lr 1e20 --steps 4 --save-every 1", "2", "the gradient norm", "run/checkpoints/step-000001"),
    (f"{CKD} --lr 1e20 --steps 4 --save-every 1", "2", "the gradient norm", "run/checkpoints/step-000001"),
    (f"{SFT} --lr 1e20 --steps 4", "2", "the gradient norm", None),
    (f"{CKD} --lr 1e20 --steps 4", "2", "the gradient norm", None),
    (f"{SFT} --lr 1e39 --steps 1", "1", "the validation nll", None),  # more than a float32 can hold
    (f"{CKD} --lr 1e39 --steps 1", "1", "the validation nll", None),
    (f"{SFT} --lr 1e39 --steps 1 --hold-out 0", "1", "a weight", None),
    (f"{CKD} --lr 1e39 --steps 1 --hold-out 0", "1", "a weight", None),
    (f"{SIMRL} --lr 1e39 --steps 2", "1", "the gradient norm", None),  # of its second update
    (f"{SIMRL} --lr 1e39 --steps 2 --batch-size 8", "1", "a weight", None)])
def test_diverged_training_stops(here, capsys, command, step, name, checkpoint):
    assert run(command) == 2
    errors = capsys.readouterr().err.splitlines()
    match = re.fullmatch(DIVERGED, errors[-1])
    assert match and match.group(1, 2, 5) == (step, name, checkpoint), errors[-1]
    assert sum(line.startswith("star.py") for line in errors) == 1
    folders = [str(path) for path in Path("run").glob("checkpoints/*")]
    assert folders == ([checkpoint] if checkpoint else [])
    for path, state in tensors("run").items():
        assert all(tensor.isfinite().all() for tensor in state.values()), path
    for row in rows("run/metrics.jsonl") if Path("run/metrics.jsonl").exists() else []:
        assert np.isfinite(list(row.values())).all(), row
    assert not Path("run/model").exists() and not Path("run/summary.json").exists()


@pytest.mark.parametrize("command, size", [(CKD, "64k"), (f"{CKD} --save-every 1", "700k"), (ROLLOUT, "4k")])
def test_full_disk(here, capsys, command, size):
    (here / "disk").mkdir()
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "disk"],
                                                   stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        assert run(f"{command} --out disk/out") == 2
        error = capsys.readouterr().err.splitlines()[-1]  # after the progress bar
        assert re.match(r"star.py \w+: .*disk/out.*No space left on device", error), error
        assert not Path("disk/out/model").exists() and not Path("disk/out").is_file()
    finally:
        subprocess.run(["umount", "disk"], check=True)


# ---- Files and output --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", [
    SFT, f"{SFT} --mask answer --gradient-checkpointing", CKD, f"{CKD} --think none --tools wrapped",
    *(f"{CKD} --objective {name}" for name in ("fkl", "rkl", "akl", "rskd", "ce")), f"{CKD} --kd-ratio 0.5"])
def test_the_files_of_a_run(here, capsys, command):
    assert run(f"{command} --save-every 1 --steps 3") == 0
    assert "python star.py chat --model run/model" in capsys.readouterr().out
    assert sorted(path.name for path in Path("run").iterdir()) == [
        "arguments.json", "checkpoints", "metrics.jsonl", "model", "samples.json", "summary.json"]
    assert json.loads(Path("run/arguments.json").read_text())["batch_size"] == 8
    logged = rows("run/metrics.jsonl")
    assert [row["step"] for row in logged] == [0, 1, 2, 3]
    assert all(np.isfinite(list(row.values())).all() for row in logged)
    summary = json.loads(Path("run/summary.json").read_text())
    samples = json.loads(Path("run/samples.json").read_text())
    assert summary["steps"] == 3 and "valid_nll" in summary["first"].keys() == summary["last"].keys()
    assert [list(sample) for sample in samples] == [["request", "gold", "before", "after"]]
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert {Path(name).suffix for name in files("run")} <= {".json", ".jsonl", ".safetensors"}  # no pickle
    trained = Transformer.from_pretrained("run/model")
    assert not torch.equal(trained.head_weight, Transformer.from_pretrained("student").head_weight)
    assert run(f"{command} --save-every 1 --steps 3 --resume") == 0  # a finished run: nothing changes
    assert rows("run/metrics.jsonl") == logged


def test_held_out_prompts_are_answered_at_each_validation(here):
    """The figures after the last step are those of `eval` for the model that was saved; training stays the same."""
    command = f"{CKD} --steps 2 --valid-every 1 --lr 1e-2 --save-dtype float32 --valid train.jsonl --valid-limit 6"
    assert run(f"{command} --valid-answers 4 --max-response-tokens 200") == 0
    logged = rows("run/metrics.jsonl")
    assert [row["step"] for row in logged if "valid_exact" in row and "valid_kl" in row] == [0, 1, 2]
    assert run("eval --model run/model --data train.jsonl --limit 4 --max-new-tokens 200 --out scores "
               "--dtype float32 --device cpu") == 0
    summary = json.loads(Path("scores/summary.json").read_text())
    assert logged[-1]["valid_reward"] == pytest.approx(summary["metrics"]["reward"]["mean"])
    assert run(f"{command} --out new --max-response-tokens 200") == 0
    for before, after in zip(logged, rows("new/metrics.jsonl")):
        assert before.get("loss") == after.get("loss") and "valid_exact" not in after


@pytest.mark.parametrize("command", [SIMRL, f"{SIMRL} --kl-weight 0 --reward binary --loss-mean sequence"])
def test_the_files_of_sim_rl(here, capsys, command):
    assert run(command) == 0
    assert "python star.py chat --model run/model" in capsys.readouterr().out
    assert sorted(path.name for path in Path("run").iterdir()) == [
        "arguments.json", "checkpoints", "metrics.jsonl", "model", "samples.jsonl", "summary.json"]
    logged = rows("run/metrics.jsonl")
    groups = rows("run/samples.jsonl")
    assert [row["step"] for row in logged] == [1, 2, 3] and [row["updates"] for row in logged] == [2, 4, 6]
    assert {"reward", "reward_std", "answer_score", "format_failures", "groups_kept", "clipped", "entropy", "length",
            "finished", "seconds_sampling", "seconds_scoring", "seconds_training"} <= logged[0].keys()
    assert ("kl" in logged[0]) == ("--kl-weight 0" not in command)
    assert [group["step"] for group in groups] == [1] * 4 + [2] * 4 + [3] * 4
    assert {"text", "reward", "answer_score", "case", "advantage", "finish_reason"} <= groups[0]["samples"][0].keys()
    assert all(group["gold"] and group["record"] and group["request"] for group in groups)
    assert {Path(name).suffix for name in files("run")} <= {".json", ".jsonl", ".safetensors"}  # no pickle
    assert run(f"{command} --resume") == 0 and rows("run/metrics.jsonl") == logged


def test_sim_rl_killed_and_resumed(here):
    command = SIMRL.replace("--steps 3", "--steps 6")
    assert run(command.replace("--out run", "--out whole")) == 0
    process = start_slowly(command)
    wait_for(process, lambda: Path("run/checkpoints/step-000002").exists())
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert run(f"{command} --resume") == 0
    assert files("run/model") == files("whole/model") and rows("run/samples.jsonl") == rows("whole/samples.jsonl")


def test_defaults_of_a_run(here):
    assert run("ckd --teacher teacher --student student --data train.jsonl --out run --device cpu") == 0  # bfloat16
    assert load_file("run/model/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert rows("run/metrics.jsonl")[-1]["step"] == 1


def test_more_draws_than_ids(here, capsys):
    assert run(f"{CKD} --objective rskd --k 999 --cache cache") == 0
    assert json.loads(Path("cache/cache.json").read_text())["k"] == 999
    assert "--k 999" not in capsys.readouterr().err
    assert 0 < rows("run/metrics.jsonl")[-1]["inside"] < 1


@pytest.mark.parametrize("objective", ["ckd", "fkl", "rkl", "akl", "ce"])
def test_cached_equals_live(here, objective):
    command = f"{CKD} --objective {objective} --samples 0 --k 999"  # the whole vocabulary, so all of the cache matters
    for flags in ("--out live", "--out cached --cache cache"):
        assert run(f"{command} {flags}") == 0
    for a, b in zip(rows("live/metrics.jsonl"), rows("cached/metrics.jsonl"), strict=True):
        for name in a.keys() - TIMES:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-3), name
    key = json.loads(Path("cache/cache.json").read_text())
    log_p = np.fromfile("cache/log_p.bin", dtype=np.float16).reshape(key["positions"], key["k"])
    assert (np.diff(log_p) <= 0).all() and np.fromfile("cache/ids.bin", dtype=np.int32).size == log_p.size
    before = files("cache")
    assert sorted(before) == ["cache.json", "ids.bin", "log_p.bin"]
    assert run(f"{command} --out again --cache cache") == 0 and files("cache") == before
    assert files("again/model") == files("cached/model")


def test_rollout(here, capsys):
    assert run(ROLLOUT) == 0
    records = rows("train.jsonl")
    written = rows("out.jsonl")
    rendered = {"think": "on", "tools": "flat"}
    assert [row | {"responses": 0} for row in written] == [
        record | {"responses": 0, "rendered": rendered} for record in records]
    for response in (response for row in written for response in row["responses"]):
        assert list(response) == ["text", "ids", "finish_reason", "logprob", "reward"]
        assert 1 <= len(response["ids"]) <= 8
    assert not Path("out.jsonl.part").exists()
    capsys.readouterr()
    assert run(f"{CKD} --data out.jsonl") == 0 and "24 prompts" not in capsys.readouterr().err
    stamp = Path("out.jsonl").stat().st_mtime_ns
    assert run(f"{ROLLOUT} --resume") == 0 and Path("out.jsonl").stat().st_mtime_ns == stamp  # finished: unchanged
    assert run(f"{ROLLOUT} --out new.jsonl --seed 1") == 0 and rows("new.jsonl") != written


def test_chat(here, monkeypatch, capsys):
    Path("tools.json").write_text(json.dumps(rows("train.jsonl")[0]["tools"][:2]))
    talk = "chat --model student --dtype float32 --device cpu --max-new-tokens 5"
    for command, tools in ((talk, "no"), (f"{talk} --tools tools.json --temperature 1 --system Hello.", 2)):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nWhat is the weather in Lima?\n"))
        assert run(command) == 0
        turns = capsys.readouterr().out.split("you> ")
        assert f"with {tools} tools" in turns[0] and len(turns) == 4 and all(text.strip() for text in turns[:3])


def test_lens(here, capsys):
    assert run(f"{LENS} --row 2 --k 5000") == 0
    output, notes = capsys.readouterr()
    assert "--k 5000 is more than the vocabulary" in notes and "wrote page.html; means: loss " in output
    assert "captured 1.0000" in output and Path("page.html").read_text().endswith("</html>\n")
    assert not list(here.glob("*.star-tmp"))
    assert run(f"{ROLLOUT} --limit 2") == 0 and run(f"{LENS} --data out.jsonl --response 2 --out pages/2.html") == 0
    assert "response 2 of 2 of record 1 in out.jsonl" in Path("pages/2.html").read_text()


def test_plot(here, capsys):
    pytest.importorskip("matplotlib")
    assert run(SFT) == 0 and run(f"{CKD} --out other") == 0
    with open("other/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # of a run that is writing, or was killed
    assert run("plot run other --out curves.png") == 0
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert run("plot run --out curves.xyz") == 2 and capsys.readouterr().err.startswith("star.py plot: curves.xyz: ")


@pytest.mark.parametrize("command", star.COMMANDS)
def test_help(capsys, command):
    assert run(f"{command} --help") == 0
    text = " ".join(capsys.readouterr().out.split())
    module = importlib.import_module(star.COMMANDS[command][0])
    parser = argparse.ArgumentParser()
    getattr(module, f"{command}_flags")(parser)
    for action in parser._actions:
        assert action.help, f"{action.option_strings} has no help text"
        assert action.help.split("%")[0][:40] in text and all(name in text for name in action.option_strings)
    assert getattr(module, f"run_{command}").__doc__[:40] in text
    assert run("--help") == 0
    output = capsys.readouterr().out
    assert f"  {command} " in output and star.COMMANDS[command][1] in output


def test_help_does_not_import_torch():
    code = ("import sys, star\ntry:\n    star.main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
            "assert 'torch' not in sys.modules, 'torch was imported'")
    folder = Path(PROGRAM).parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0 and "commands:" in result.stdout, result.stderr


# The commands that write results and then print them.
PREPARE = "prepare --data train.jsonl --out mix.jsonl"
RESULTS = {"sft": SFT, "ckd": f"{CKD} --cache cache", "simrl": SIMRL, "eval": EVAL, "rollout": ROLLOUT,
           "prepare": PREPARE}
TIMES = {"seconds", "tokens_per_s", "peak_memory_gb", "memory_gb",
         "seconds_sampling", "seconds_scoring", "seconds_training"}


def results(folder):
    """Everything that the commands of RESULTS wrote: {path: content}, without times and memory."""
    contents = files(folder)
    for path, content in contents.items():
        if path.endswith(("summary.json", "metrics.jsonl")):
            lines = content.decode().splitlines() if path.endswith("l") else [content]
            contents[path] = [{name: value for name, value in json.loads(line).items() if name not in TIMES}
                              for line in lines]
    return contents


@pytest.mark.parametrize("unbuffered", [True, False])
@pytest.mark.parametrize("name", RESULTS)
def test_results_are_on_disk_before_anything_is_printed(here, name, unbuffered):
    assert run(RESULTS[name]) == 0
    expected = results(here)
    for path in set(here.iterdir()) - {here / name for name in ("train.jsonl", "student", "teacher")}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    read_end, write_end = os.pipe()
    os.close(read_end)  # now every write fails; unbuffered, the first print does
    process = start(RESULTS[name], ["-u"] * unbuffered, write_end)
    os.close(write_end)
    _, error = process.communicate()
    assert process.returncode == 141 and "BrokenPipe" not in error, error  # the exit code of SIGPIPE in a shell
    assert results(here) == expected


@pytest.mark.parametrize("name", RESULTS)
def test_a_terminal_that_cannot_print_a_character(here, name):
    lines = []
    for record in rows("train.jsonl"):
        record["source"] = "水"
        record["messages"][-1]["content"] += " 水"
        for call in record["answer"]["tool_calls"]:
            call["arguments"] |= {key: "水" for key, value in call["arguments"].items() if isinstance(value, str)}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    Path("train.jsonl").write_text("".join(lines), encoding="utf-8")
    command = re.sub(r"--out (\S+)", r"--out 水/\1", RESULTS[name])
    process = start(command, stdout=subprocess.PIPE, PYTHONIOENCODING="ascii")
    output, error = process.communicate()
    assert process.returncode == 0, error
    assert "\\u6c34" in output and output.isascii()
    outputs = {path.name for path in Path("水").iterdir()}
    assert outputs in ({"run"}, {"scores"}, {"out.jsonl", "out.jsonl.arguments.json"}, {"mix.jsonl", "mix.jsonl.arguments.json"})
    if outputs == {"run"}:
        Transformer.from_pretrained("水/run/model")
    if outputs & {"run", "scores"}:
        assert json.loads(next(Path("水").glob("*/summary.json")).read_text())


# ---- Stopped and resumed runs ------------------------------------------------------------------------------------

LONG = f"{CKD} --samples 0 --steps 12 --save-every 2 --out"


def wait_for(process, condition):
    """Wait until a condition holds; the process must still be running then."""
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)


def assert_equals_the_uninterrupted(out):
    assert files("whole/model") == files(f"{out}/model")
    for name in ("step", "loss", "grad_norm", "valid_nll"):
        assert [row.get(name) for row in rows(f"{out}/metrics.jsonl")] == [
            row.get(name) for row in rows("whole/metrics.jsonl")]
    assert [row["step"] for row in rows(f"{out}/metrics.jsonl")] == list(range(13))
    assert sorted(path.name for path in Path(out, "checkpoints").iterdir()) == ["step-000010", "step-000012"]


def test_killed_and_resumed(here):
    assert run(f"{LONG} whole") == 0
    checkpoints = Path("run/checkpoints")
    moments = (lambda: any(checkpoints.glob("step-*")),  # while the first checkpoint is written, or right after it
               lambda: '"step": 5,' in Path("run/metrics.jsonl").read_text(),  # between two checkpoints
               lambda: (checkpoints / "step-000008").exists())  # right after one
    for moment in moments:
        process = start_slowly(f"{LONG} run --resume")
        wait_for(process, moment)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert run(f"{LONG} run --resume") == 0
    assert_equals_the_uninterrupted("run")


def test_interrupted_and_resumed(here):
    flags = "--objective rskd --cache cache --optimiser muon --share-prefix 4"
    command = LONG.replace("--out", f"{flags} --out")
    assert run(f"{command} whole") == 0
    process = start_slowly(f"{command} run")
    log = Path("run/metrics.jsonl")
    wait_for(process, lambda: log.exists() and '"step": 4,' in log.read_text())
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130 and "Stopping as soon as" in error and "Traceback" not in error
    last = rows("run/metrics.jsonl")[-1]["step"]
    assert 4 <= last < 12 and Path(f"run/checkpoints/step-{last:06d}/weights.safetensors").exists()
    assert run(f"{command} run --resume") == 0
    assert_equals_the_uninterrupted("run")


def test_rollout_killed_and_resumed(here):
    command = f"{ROLLOUT} --max-concurrent 4 --max-new-tokens 24"
    assert run(f"{command} --out whole.jsonl") == 0
    process = start_slowly(command)
    part = Path("out.jsonl.part")
    wait_for(process, lambda: part.exists() and part.read_bytes().count(b"\n") >= 5)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not Path("out.jsonl").exists()
    with open(part, "ab") as file:
        file.write('[3, {"id": "ü'.encode()[:-1])  # half a line that ends within a character
    assert run(f"{command} --resume") == 0
    assert not part.exists()
    # What runs beside a response changes the rounding of its log-prob, and in float32 nothing else.
    for one, other in zip(rows("out.jsonl"), rows("whole.jsonl"), strict=True):
        for a, b in zip(one["responses"], other["responses"], strict=True):
            assert a.pop("logprob") == pytest.approx(b.pop("logprob"), abs=2e-4)
        assert one == other


@pytest.mark.parametrize("tokens", [600, 100_000])  # with the larger, one of the two has no micro-batch
def test_two_processes_equal_one(here, tokens):
    command = f"{CKD} --micro-batch-tokens {tokens} --out"
    assert run(f"{command} one") == 0
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--")  # without --, --m is its
    process = start(f"{command} two", torchrun)
    _, error = process.communicate()
    assert process.returncode == 0, error
    one = load_file("one/model/model.safetensors")
    two = load_file("two/model/model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0)
    for a, b in zip(rows("one/metrics.jsonl"), rows("two/metrics.jsonl"), strict=True):
        assert all(b[name] == pytest.approx(a[name], abs=1e-4) for name in a.keys() - TIMES)


# ---- Examples ----------------------------------------------------------------------------------------------------

def modules_with_examples():
    """The names of the modules with a doctest."""
    root = Path(PROGRAM).parent
    paths = [*root.glob("*.py"), *root.glob("data/*.py"), *root.glob("apps/*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    return sorted(".".join(path.relative_to(root).with_suffix("").parts) for path in paths if ">>> " in texts[path])


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted and results.failed == 0


def test_out_of_memory_is_one_line(here, capsys, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(simrl, "refine", fail)
    assert run(SIMRL) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("star.py simrl: out of memory; ")


def test_validation_records_over_a_cap_are_counted(here, capsys):
    Path("long.jsonl").write_text(Path("train.jsonl").read_text().replace('"content": "Play ', f'"content": "{"la " * 200}Play '))
    assert run(f"{SIMRL} --valid long.jsonl --valid-limit 24 --max-prompt-tokens 400") == 0
    count = Path("long.jsonl").read_text().count("la la la Play")
    assert f"{24 - count} prompts to validate on, {count} skipped as too long" in capsys.readouterr().err
    assert run(f"{SFT} --out other --valid long.jsonl --max-prompt-tokens 400") == 0
    assert f"skipped in long.jsonl: {count} prompts too long" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_terminal_log_is_one_line(here):
    Path("plan.txt").write_text(f"{SFT}\n")
    with open("/dev/full", "w") as full:
        process = start("curriculum plan.txt", stdout=full)
        _, error = process.communicate()
    assert process.returncode and "Traceback" not in error, error


def test_a_cache_behind_a_link(here):
    Path("disk").mkdir()
    Path("cache").symlink_to("disk", target_is_directory=True)
    assert run(f"{CKD} --cache cache") == 0
    assert Path("cache").is_symlink() and Path("disk/cache.json").exists()


def test_a_cache_at_a_mount_point_behind_a_link_is_refused_first(here, capsys, monkeypatch):
    Path("disk").mkdir()
    Path("cache").symlink_to("disk", target_is_directory=True)
    disk = Path("disk").resolve()
    monkeypatch.setattr(os.path, "ismount", lambda path: not Path(path).is_symlink() and Path(path) == disk)
    assert run(f"{CKD} --cache cache") == 2
    assert "is a mount point, which cannot be replaced" in capsys.readouterr().err and not Path("disk.star-tmp").exists()


def test_prompts_of_a_rollout_file_keep_no_responses(here):
    assert run(ROLLOUT) == 0
    groups, _ = prompt_groups("out.jsonl", Chat.from_pretrained("teacher"), 9999)
    assert "responses" not in groups[0].record

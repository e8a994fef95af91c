"""`eval` and `reward`: metrics, intervals, the comparison of two models, the commands, and bad input."""
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import star
from apps.evaluate import LINE_KEYS, bootstrap_ci, compare, record_metrics, sign_flip_p, summarise

ROOT = Path(__file__).parents[1]
CALL = {"name": "f", "arguments": {"a": 1}}


def row(calls, *responses, name="1", source="s", messages=1):
    """A record with scored responses, each (exact, case, reward)."""
    return {"id": name, "source": source, "answer": {"tool_calls": calls, "content": None if calls else "no"},
            "messages": [{"role": "user", "content": "?"}] * messages, "tools": [],
            "responses": [{"exact": e, "case": c, "reward": r, "logprob": -6.0, "ids": [1, 2, 3], "text": ""}
                          for e, c, r in responses]}


RIGHT, WRONG = (True, "calls and calls", 1.0), (False, "calls and calls", 0.25)
TEXT, BROKEN = (False, "text where calls are due", 0.0), (False, "call is not JSON", -1.0)


def test_record_metrics():
    assert record_metrics(row([CALL], RIGHT)) == {"reward": 1, "exact calls": 1, "valid calls": 1}
    assert record_metrics(row([CALL], WRONG)) == {"reward": 0.25, "exact calls": 0, "valid calls": 1}
    assert record_metrics(row([CALL], BROKEN)) == {"reward": -1, "exact calls": 0, "valid calls": 0}
    assert record_metrics(row([CALL], TEXT)) == {"reward": 0, "exact calls": 0, "valid calls": 0}
    assert record_metrics(row([], (True, "text and text", 0.5))) == {"reward": 0.5, "correct refusals": 1}
    assert record_metrics(row([], (False, "calls where text is due", 0.0))) == {"reward": 0, "correct refusals": 0}
    short = row([], TEXT, TEXT, TEXT)
    short["responses"][1] |= {"ids": [1] * 9, "logprob": -1.0}
    assert record_metrics(short)["entropy"] == pytest.approx(7 / 12)  # a mean over tokens
    metrics = record_metrics(row([CALL], WRONG, RIGHT, WRONG, BROKEN, TEXT))
    assert metrics["pass@1"] == 0.25 and metrics["pass@4"] == 1 and metrics["exact calls"] == 0
    assert metrics["reward at T = 1"] == pytest.approx((1 + 0.25 - 1 + 0) / 4) and metrics["entropy"] == 2.0


def test_bootstrap_interval_is_near_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    result = bootstrap_ci(values)
    mean = values.mean()
    half = 1.96 * values.std(ddof=1) / 20
    assert result == {"mean": mean, "low": pytest.approx(mean - half, abs=0.03),
                      "high": pytest.approx(mean + half, abs=0.03)}


def test_sign_flips_agree_with_all_sign_patterns():
    differences = [0.5, -0.2, 0.9, 0.4, 0.1, 0.3, 0.0, 0.6]
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T
    exact = np.mean(np.abs(signs @ differences) >= abs(sum(differences)) - 1e-9)
    assert sign_flip_p(differences) == pytest.approx(exact, abs=0.02)
    assert sign_flip_p([1.0]) == pytest.approx(1.0)  # one item proves nothing


def test_summary_and_comparison():
    rows = [row([CALL], RIGHT, name=str(i), source="ab"[i % 2], messages=1 + i % 2 * 2) for i in range(40)]
    rows += [row([], (True, "text and text", 0.5), name="t")]
    others = [row([CALL], RIGHT if i < 10 else WRONG, name=str(i), messages=1 + i % 2 * 2) for i in range(40)]
    others += [row([], (True, "text and text", 0.5), name="t")]
    summary = summarise(rows)
    assert summary["metrics"]["exact calls"] == {"mean": 1, "low": 1, "high": 1, "items": 40}
    difference = compare(rows, others)
    assert difference["exact calls"]["mean"] == 0.75 and difference["exact calls"]["p"] < 0.001
    assert difference["correct refusals"] == {"mean": 0, "low": 0, "high": 0, "p": 1.0, "items": 1}
    # Pairs are the same records, whatever their order; an id alone does not make two records the same.
    assert compare(rows, others[::-1]) == difference
    fewer = compare(rows, others[:20] + [row([], TEXT, name=str(i)) for i in range(20, 41)])
    assert fewer["exact calls"]["items"] == 20 and fewer["exact calls"]["mean"] == 0.5
    with pytest.raises(star.InputError, match="no record in common"):
        compare(rows, [row([], TEXT, name=str(i)) for i in range(40)])


# ---------------------------------------------------------------------------------------------------------------------
# From the command line

def evaluate(world, out, *flags):
    return star.main(["eval", "--model", f"{world}/student", "--data", f"{world}/train.jsonl", "--out", str(out),
                      "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "6", "--max-concurrent", "6", *flags])


def test_eval_and_compare(world, tmp_path, capsys):
    assert evaluate(world, tmp_path / "a", "--n", "3", "--compare", f"{world}/teacher") == 0
    shown = capsys.readouterr().out
    assert "significant?" in shown and "pass@3" in shown
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["items"] == 24 and set(summary["difference"]) == set(summary["metrics"])
    rows = [json.loads(line) for line in (tmp_path / "a/generations.jsonl").read_text().splitlines()]
    assert [len(r["responses"]) for r in rows] == [4] * 24
    # Compared with an earlier evaluation of the same model, there is no difference.
    assert evaluate(world, tmp_path / "b", "--n", "3", "--compare", str(tmp_path / "a")) == 0
    difference = json.loads((tmp_path / "b/summary.json").read_text())["difference"]
    assert all(d["mean"] == 0 and d["p"] == 1 for d in difference.values())
    assert (tmp_path / "a/generations.jsonl").read_bytes() == (tmp_path / "b/generations.jsonl").read_bytes()


def test_a_killed_eval_resumes(world, tmp_path):
    assert evaluate(world, tmp_path / "whole") == 0
    command = [sys.executable, ROOT / "star.py", "eval", "--model", world / "student", "--data", world / "train.jsonl",
               "--out", tmp_path / "cut", "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "6",
               "--max-concurrent", "6"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "cut/generations.jsonl.part"
    while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") > 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert evaluate(world, tmp_path / "cut", "--resume", "--limit", "20") == 2  # another setting
    assert evaluate(world, tmp_path / "cut", "--resume") == 0
    # The same texts; other neighbours change the rounding of log-probs.
    cut, whole = ([json.loads(line) for line in (tmp_path / name / "generations.jsonl").read_text().splitlines()]
                  for name in ("cut", "whole"))
    for row, expected in zip(cut, whole, strict=True):
        for response, same in zip(row["responses"], expected["responses"], strict=True):
            assert response.pop("logprob") == pytest.approx(same.pop("logprob"), abs=1e-3)
        assert row == expected


def refused(capsys, *argv):
    """The one line of a command that is refused."""
    assert star.main([str(a) for a in argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("star.py")]
    assert len(lines) == 1
    return lines[0]


def test_eval_refusals(world, tmp_path, capsys):
    data = world / "train.jsonl"
    line = refused(capsys, "eval", "--model", world / "student", "--data", data, "--out", tmp_path / "x", "--compare",
                   tmp_path)
    assert "--compare takes a model folder or the --out of an eval" in line
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({k: v for k, v in json.loads(line).items() if k != "answer"}) + "\n"
                               for line in data.read_text().splitlines()))
    assert "has no gold answer" in refused(capsys, "eval", "--model", world / "student", "--data", prompts, "--out",
                                           tmp_path / "y")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/arguments.json").write_text("{}")
    (tmp_path / "old/generations.jsonl").write_text("{}\n")
    assert "model is null" in refused(capsys, "eval", "--model", world / "student", "--data", data, "--out",
                                       tmp_path / "z", "--compare", tmp_path / "old")
    (tmp_path / "old/arguments.json").write_text('{"model": "m"}')
    assert "generations.jsonl:1: no messages" in refused(capsys, "eval", "--model", world / "student", "--data", data, "--out",
                                             tmp_path / "z", "--compare", tmp_path / "old")
    (tmp_path / "other.jsonl").write_text(json.dumps(json.loads(data.read_text().splitlines()[0]) | {"id": "new"}))
    assert evaluate(world, tmp_path / "other", "--data", str(tmp_path / "other.jsonl")) == 0
    line = refused(capsys, "eval", "--model", world / "student", "--data", data, "--out", tmp_path / "z", "--compare",
                   tmp_path / "other")
    assert "no record in common; run both on the same --data" in line
    (tmp_path / "other/generations.jsonl").unlink()
    assert f"{tmp_path}/other: is no finished eval; --compare takes" in refused(
        capsys, "eval", "--model", world / "student", "--data", data, "--out", tmp_path / "z", "--compare",
        tmp_path / "other")
    shutil.rmtree(tmp_path / "other")
    (tmp_path / "other.jsonl").unlink()
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe, and two models read it; give a file" in refused(
        capsys, "eval", "--model", world / "student", "--data", tmp_path / "pipe", "--out", tmp_path / "z", "--compare",
        world / "teacher")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "pipe", "prompts.jsonl"]  # nothing is written


def test_reward_command(tmp_path, capsys):
    rows = [json.loads(line) for line in gzip.open(Path(__file__).with_name("reward_golden.jsonl.gz"))][:200]
    random.Random(0).shuffle(rows)
    lines = [json.dumps({name: row[name] for name in LINE_KEYS}) + "\n" for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(lines)
    assert star.main(["reward", "--data", str(tmp_path / "a.jsonl")]) == 0
    written = capsys.readouterr().out
    for row, line in zip(rows, written.splitlines(), strict=True):
        assert json.loads(line) == pytest.approx({name: row[name] for name in ("reward", "answer_score")}, abs=1e-6)
    assert star.main(["reward", "--data", str(tmp_path / "b.jsonl.gz")]) == 0
    assert capsys.readouterr().out == written
    number = next(i for i, row in enumerate(rows, 1) if 0 < row["reward"] < 1)
    assert star.main(["reward", "--data", str(tmp_path / "a.jsonl"), "--explain", str(number)]) == 0
    shown = capsys.readouterr().out
    assert f"reward  {rows[number - 1]['reward']:.6g}" in shown and "case    " in shown


@pytest.mark.parametrize("line, expected", [
    ("{", ":2: is not JSON"), ("[]", ":2: holds a JSON list"), ('{"prompt": "", "generation": ""}', ":2: label is null, not text"),
    ('{"prompt": "", "generation": "", "label": 1}', ":2: label is 1, not text"), ("[" * 100_000, ":2: is not JSON"),
])
def test_reward_refusals(line, expected, tmp_path, capsys):
    data = tmp_path / "a.jsonl"
    data.write_text('{"prompt": "", "generation": "", "label": ""}\n' + line + "\n")
    assert star.main(["reward", "--data", str(data)]) == 2
    output = capsys.readouterr()
    assert expected in output.err and not output.out  # not even the good first line
    assert "has no line 9" in refused(capsys, "reward", "--data", data, "--explain", 9)
    assert "cannot be read" in refused(capsys, "reward", "--data", tmp_path / "none")

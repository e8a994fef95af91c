"""`star.py bfcl`: the columns, the checks, and a whole run with a stand-in for the tool; with the tool itself in
STAR_BFCL_ENV, an environment that has it."""
import json
import os
import sys
from pathlib import Path

import pytest

import star
from apps import bfcl, official
from data import InputError, tiny

TINY = Path(tiny.__file__).parent
TOOL = '''#!{python}
"""A stand-in for bfcl: generate asks the server for each item, evaluate finds every second answer right."""
import json, os, sys, urllib.request
from pathlib import Path
root = Path(os.environ["BFCL_PROJECT_ROOT"])
ids = json.loads((root / "test_case_ids_to_generate.json").read_text())
for name, items in ids.items():
    result = root / "result_star/model" / f"BFCL_v4_{{name}}_result.json"
    score = root / "score_star/model" / f"BFCL_v4_{{name}}_score.json"
    for path in (result, score):
        path.parent.mkdir(parents=True, exist_ok=True)
    if sys.argv[1] == "generate":
        url = f"http://127.0.0.1:{{os.environ['LOCAL_SERVER_PORT']}}/v1/completions"
        with open(result, "w") as file:
            for item in items:
                body = json.dumps({{"prompt": "<|im_start|>assistant\\n", "max_tokens": 4096, "temperature": 0.001}})
                reply = json.load(urllib.request.urlopen(url, body.encode()))
                answer = os.environ.get("ANSWER") or reply["choices"][0]["text"]
                file.write(json.dumps({{"id": item, "result": answer}}) + "\\n")
    else:
        wrong = [{{"id": item, "error_type": "x"}} for item in items[1::2]]
        right = len(items) - len(wrong)
        head = {{"accuracy": right / len(items), "correct_count": right, "total_count": len(items)}}
        score.write_text("".join(json.dumps(line) + "\\n" for line in [head, *wrong]))
'''


@pytest.fixture
def env(tmp_path):
    """An environment with the stand-in, and 6 items in each of two categories, one of them with a long prompt."""
    folder = tmp_path / "env"
    tool = folder / "bin/bfcl"
    data = folder / "lib/python3/site-packages/bfcl_eval/data"
    for path in (tool.parent, data):
        path.mkdir(parents=True)
    tool.write_text(TOOL.format(python=sys.executable))
    tool.chmod(0o755)
    (folder / "complete").touch()
    for name in ("multiple", "irrelevance"):
        lines = []
        for i in range(6):
            text = "hello " * (3000 if i == 2 else 1)
            lines.append({"id": f"{name}_{i}", "question": [[{"role": "user", "content": text}]],
                          "function": [{"name": "f", "description": "d", "parameters": {}}]})
        (data / f"BFCL_v4_{name}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(env, out, *flags):
    return star.main(["bfcl", "--model", str(TINY / "student"), "--env", str(env), "--out", str(out), "--dtype",
                      "float32", "--device", "cpu", "--categories", "multiple", "irrelevance", "--max-new-tokens", "8",
                      *flags])


def test_a_whole_run(env, tmp_path, capsys):
    assert run(env, tmp_path / "out") == 0
    table = capsys.readouterr().out
    items = json.loads((tmp_path / "out/items.json").read_text())
    assert {name: list(values.values()) for name, values in items.items()} == {
        "multiple": [1, 0, 1, 0, 1], "irrelevance": [1, 0, 1, 0, 1]}
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["left_out"] == {"multiple": 1, "irrelevance": 1} and summary["failures"] == 0
    assert summary["requests"] == 10 and summary["think"] == "off" and "60.0 [" in table
    assert run(env, tmp_path / "out") == 2 and "--resume" in capsys.readouterr().err
    assert run(env, tmp_path / "two", "--items", "3", "--compare", str(tmp_path / "out")) == 0
    table = capsys.readouterr().out
    assert "a subset of v4's items" in table and "difference" in table
    chosen = json.loads((tmp_path / "two/items.json").read_text())
    assert run(env, tmp_path / "three", "--items", "3") == 0  # the same subset again
    assert json.loads((tmp_path / "three/items.json").read_text()) == chosen


def test_recorded_failures_are_never_scored(env, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ANSWER", "Error during inference: HTTP 500")
    assert run(env, tmp_path / "out") == 2
    assert "10 answers are recorded failures" in capsys.readouterr().err
    assert not (tmp_path / "out/items.json").exists()


def test_a_tool_that_stops_is_an_error(env, tmp_path, capsys):
    (env / "bin/bfcl").write_text(f"#!{sys.executable}\nraise SystemExit('no such model')\n")
    assert run(env, tmp_path / "out") == 2
    assert "generate.log: the tool stopped" in capsys.readouterr().err
    assert "no such model" in (tmp_path / "out/generate.log").read_text()


def test_columns_are_those_of_the_leaderboard():
    """The published row of Qwen3-0.6B (June 2025) from its categories: 71.81, 74.45, 65.66, overall 47.33."""
    counts = {"simple_python": (335, 400), "simple_java": (53, 100), "simple_javascript": (25, 50),
              "multiple": (176, 200), "parallel": (138, 200), "parallel_multiple": (136, 200), "irrelevance": (204, 240),
              "live_simple": (170, 258), "live_multiple": (573, 1053), "live_parallel": (6, 16),
              "live_parallel_multiple": (13, 24), "live_irrelevance": (704, 882), "live_relevance": (12, 18)}
    items = {name: {i: int(i < right) for i in range(total)} for name, (right, total) in counts.items()}
    for name, right in zip(bfcl.MULTI_TURN, (4, 4, 4, 3)):
        items[name] = {i: int(i < right) for i in range(200)}
    means = {name: official.interval(part)["mean"] for name, part in bfcl.columns(items).items()}
    assert means["Non-Live AST"] == pytest.approx(71.81, abs=0.01)
    assert means["Non-Live, v3"] == pytest.approx(74.45, abs=0.01)
    assert means["Live, v3"] == pytest.approx(65.66, abs=0.05)
    assert means["Multi-Turn"] == pytest.approx(1.88, abs=0.01) and means["overall, v3"] == pytest.approx(47.33, abs=0.02)
    assert "overall, v3" not in bfcl.columns({name: items[name] for name in counts})
    none = official.interval([(1.0, [0] * 20)])  # Wilson: 0 of 20 may still be 16 %
    assert none["low"] == pytest.approx(0, abs=1e-9) and none["high"] == pytest.approx(16.1, abs=0.1)


def test_a_score_that_does_not_add_up_is_an_error(tmp_path):
    path = tmp_path / "score_star/BFCL_v4_multiple_score.json"
    path.parent.mkdir()
    path.write_text('{"correct_count": 2, "total_count": 3}\n')
    with pytest.raises(InputError, match="counts 2 of 3, not 1 of 1"):
        bfcl.read_items(tmp_path, {"multiple": ["multiple_0"]})


@pytest.mark.skipif("STAR_BFCL_ENV" not in os.environ, reason="STAR_BFCL_ENV names no environment with bfcl-eval")
def test_the_tool_itself(tmp_path):
    assert run(os.environ["STAR_BFCL_ENV"], tmp_path / "out", "--items", "5") == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["failures"] == 0 and summary["scores"]["multiple"]["mean"] == 0

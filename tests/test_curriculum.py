"""The stages in their order: each the single command, skipped, resumed, and scored."""
import json
import shutil
from pathlib import Path

import pytest

import star
from data.curriculum import demo

FLAGS = ["--think", "off", "--device", "cpu", "--dtype", "float32", "--rollout", "--n 2 --max-new-tokens 8 --keep-all",
         "--ckd", "--steps 2 --batch 4 --hold-out 2 --samples 1 --lr 1e-3",
         "--eval", "--n 2 --limit 4 --max-new-tokens 8",
         "--refine", "--steps 1 --prompts 2 --n 2 --filter none --max-new-tokens 8",
         "--simrl", "--steps 1 --prompts 2 --n 2 --filter none --max-new-tokens 8"]


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def run(*words, flags=FLAGS):
    return star.main(["curriculum", "--teacher", "teacher", "--student", "student", "--data", "train.jsonl", "--out",
                      "run", *flags, *words])


def commands(said):
    return [line.split()[3] for line in said.splitlines() if line.startswith("$ python star.py ")]


def test_all_stages_then_nothing_left_to_do(here, capsys):
    assert run("--valid", "train.jsonl") == 0
    said = capsys.readouterr().out
    assert commands(said) == ["eval", "eval", "simrl", "eval", "rollout", "ckd", "eval", "simrl", "eval"]
    assert "--teacher run/refine/model" in said and "--data run/rollouts.jsonl" in said  # each goes on with the last
    summary = json.loads(Path("run/summary.json").read_text())
    assert list(summary["models"]) == ["teacher", "student", "refined teacher", "after CKD", "after STAR"]
    for name, figures in summary["models"].items():
        metrics = json.loads(Path("run/eval", name.replace(" ", "-"), "summary.json").read_text())["metrics"]
        assert figures["exact calls"] == metrics["exact calls"]["mean"] and "pass@2" in figures
        assert ("seconds" in figures) == (name not in ("teacher", "student"))
        assert name in said
    weights = {path: path.read_bytes() for path in Path("run").rglob("model.safetensors")}
    assert len(weights) == 3
    shutil.rmtree("run/star")  # as if it had been stopped before the last stage
    assert run("--valid", "train.jsonl") == 2 and "run: exists already" in capsys.readouterr().err
    assert run("--valid", "train.jsonl", "--resume") == 0
    assert {path: path.read_bytes() for path in Path("run").rglob("model.safetensors")} == weights


def test_skipped_stages_hand_on_what_they_were_given(here, capsys):
    assert run("--skip", "refine", "rollout", "simrl") == 0
    said = capsys.readouterr().out
    assert commands(said) == ["ckd"] and "--teacher teacher --student student --data train.jsonl" in said
    assert not Path("run/summary.json").exists()  # no --valid: no scores


def test_a_mistyped_flag_of_the_last_stage_ends_it_at_once(here, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--simrl", "--prompt 2 --promts 3")
    assert stopped.value.code == 2 and "--promts" in capsys.readouterr().err and not Path("run").exists()


def test_a_failing_stage_ends_it(here, capsys):
    assert run("--rollout", "--n 2 --max-new-tokens 8 --min-reward 1", "--skip", "refine") == 2
    assert "no response is left" in capsys.readouterr().err and not Path("run/ckd").exists()


@pytest.mark.parametrize("quick", [False, True])
def test_the_demo_is_a_curriculum(quick):
    words = demo("somewhere", quick, 1)
    args = star.parser("", star.COMMANDS).parse_args(words)
    assert args.command == "curriculum" and args.skip == ["refine"] and args.seed == 1

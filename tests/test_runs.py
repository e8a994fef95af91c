"""What a run deletes, trusts and refuses in its folder, and what a call is told before it starts."""
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import star
from apps import curriculum
from apps.checks import IDLE
from data import InputError, lock, prepare
from data.chat import Chat
from data.checkpoints import latest_checkpoint, list_checkpoints
from data.records import read_records
from data.runs import cut_log, log_metrics, read_metrics
from model import Transformer
from test_cli import (  # noqa: F401
    CKD, EVAL, PROGRAM, ROLLOUT, SFT, SIMRL, files, here, rows, run, start, start_slowly, wait_for)

STEPS = f"{SFT} --save-every 1"


def refused(capsys, command):
    """The one line of a command that must end in exit code 2."""
    capsys.readouterr()
    assert run(command) == 2
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("star.py")]
    return line


# ---- Whose files these are

def test_only_own_checkpoints_are_looked_at(here):
    assert run(STEPS) == 0
    folder = Path("run/checkpoints")
    (folder / ".DS_Store").write_text("x")
    (folder / "step-best").mkdir()
    (folder / "step-000009x").mkdir()
    shutil.copytree(folder / "step-000002", folder / "best")
    (folder / "step-000007.star-tmp").mkdir()
    before = files("run")
    assert latest_checkpoint("run") == 2
    (folder / "step-1000000").mkdir()
    assert [step for step, _ in list_checkpoints("run")] == [1, 2, 1_000_000]
    (folder / "step-1000000").rmdir()
    shutil.rmtree(folder / "step-000002")
    Path("run/summary.json").unlink()
    assert run(f"{STEPS} --resume") == 0
    assert before.keys() == files("run").keys() and not (folder / "step-000007.star-tmp").exists()
    assert (folder / "step-best").is_dir() and (folder / "step-000009x").is_dir()


def test_no_command_writes_over_a_file_of_another(here, capsys):
    Path("notes.jsonl").write_text("mine")
    assert run("prepare --data train.jsonl --out chosen.jsonl") == 0
    before = files(".")
    for name in ("notes.jsonl", "chosen.jsonl"):
        assert f"{name}: exists already" in refused(capsys, f"{ROLLOUT} --out {name}")
    assert "notes.jsonl.arguments.json: no such file" in refused(capsys, f"{ROLLOUT} --out notes.jsonl --resume")
    assert "chosen.jsonl: was started with the command prepare" in refused(capsys, f"{ROLLOUT} --out chosen.jsonl --resume")
    assert files(".") == before
    Path("sampled.jsonl.part").write_text("{}\n")
    assert "belongs to an unfinished rollout" in refused(capsys, "prepare --data train.jsonl --out sampled.jsonl")
    assert Path("sampled.jsonl.part").read_text() == "{}\n"


def test_a_finished_run_is_left_alone(here, capsys):
    assert run(STEPS) == 0
    Path("run/model/notes.txt").write_text("mine")
    before = files("run")
    capsys.readouterr()
    assert run(f"{STEPS} --resume") == 0 and "run: is already finished" in capsys.readouterr().err
    assert files("run") == before


def test_eval_leaves_logs_and_checkpoints_alone(here):
    assert run(EVAL) == 0
    for name in ("samples.jsonl", "metrics.jsonl", "checkpoints/step-000001/progress.json"):
        Path("scores", name).parent.mkdir(exist_ok=True, parents=True)
        Path("scores", name).write_text('{"step": 1}\n')
    before = files("scores")
    assert run(f"{EVAL} --resume") == 0 and files("scores") == before


@pytest.mark.parametrize("ending", [".star-tmp", ".part", ".part.1", ".arguments.json"])
@pytest.mark.parametrize("command", [
    "prepare --data {0} --out new", f"{ROLLOUT} --data {{0}} --out new --resume"])
def test_an_input_may_not_have_the_name_of_a_temporary_file(here, capsys, command, ending):
    shutil.copyfile("train.jsonl", f"new{ending}")
    before = files(".")
    assert "would be written over" in refused(capsys, command.format(f"new{ending}"))
    assert files(".") == before


def test_a_backup_beside_a_part_file_is_left_alone(here):
    backup = Path("out.jsonl.part.2026-11-29")
    backup.write_text("mine")
    assert run(ROLLOUT) == 0 and backup.read_text() == "mine"


def test_files_of_another_checkpoint(here, capsys):
    assert run(STEPS) == 0
    before, folder = sorted(Path("run/checkpoints").iterdir())
    Path("run/summary.json").unlink()
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        mine = (folder / f"{name}.safetensors").read_bytes()
        shutil.copyfile(before / f"{name}.safetensors", folder / f"{name}.safetensors")
        assert f"{name}.safetensors is not as it was" in refused(capsys, f"{STEPS} --resume")
        (folder / f"{name}.safetensors").write_bytes(mine)
    assert run(f"{STEPS} --lr 1e-4 --out other") == 0
    shutil.rmtree(folder)
    shutil.copytree(sorted(Path("other/checkpoints").iterdir())[-1], folder)  # whole, but of another run
    assert "arguments.json is not as it was when this was written" in refused(capsys, f"{STEPS} --resume")
    shutil.rmtree(folder)
    assert run(f"{STEPS} --resume") == 0


def test_a_rollout_that_has_sampled_nothing_may_begin_with_other_flags(here, capsys):
    assert run(ROLLOUT) == 0
    whole = Path("out.jsonl").read_bytes()
    Path("out.jsonl").unlink()
    Path("out.jsonl.part").touch()
    assert "belongs to an unfinished rollout" in refused(capsys, "prepare --data train.jsonl --out out.jsonl")
    assert run(f"{ROLLOUT} --seed 7 --resume") == 0 and Path("out.jsonl").read_bytes() != whole
    Path("out.jsonl").unlink()
    Path("out.jsonl.part").touch()
    Path("out.jsonl.arguments.json").unlink()
    assert run(f"{ROLLOUT} --resume") == 0 and Path("out.jsonl").read_bytes() == whole
    Path("out.jsonl.arguments.json").unlink()
    assert "no such file; restore it, or use another --out" in refused(capsys, f"{ROLLOUT} --resume")


def test_answers_that_were_removed_are_missed(here, capsys):
    assert run(EVAL) == 0
    path = Path("scores/generations.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert "scores/generations.jsonl: has lost records" in refused(capsys, f"{EVAL} --resume")


def test_the_think_opening_of_training_is_the_models_own(here):
    assert run(f"{STEPS} --think off --out a") == 0 and run(f"{STEPS} --out b") == 0
    assert Chat.from_pretrained("a/model").think == "off"
    assert Chat.from_pretrained("b/model").think == Chat.from_pretrained("student").think == "on"
    assert Path("b/model/tokenizer_config.json").read_bytes() == Path("student/tokenizer_config.json").read_bytes()


def test_a_start_that_was_killed_can_be_repeated(here):
    Path("run").mkdir()
    Path("run/arguments.json.star-tmp").write_text('{"comm')
    assert run(STEPS) == 0 and not Path("run/arguments.json.star-tmp").exists()


# ---- What must not change

CHANGES = {"data": ("train.jsonl", lambda path: path.write_text(path.read_text() + "\n")),
           "weights": ("student/model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01")),
           "template": ("student/tokenizer_config.json", lambda path: path.write_text(path.read_text() + " ")),
           "a new file": ("student/extra.json", lambda path: path.write_text("{}"))}


@pytest.mark.parametrize("command, change", [
    *((STEPS, change) for change in CHANGES), (SIMRL, "data"), (EVAL, "weights"),
    (ROLLOUT.replace("teacher", "student"), "template")])
def test_resume_refuses_changed_inputs(here, capsys, command, change):
    assert run(command) == 0
    path, edit = CHANGES[change]
    edit(Path(path))
    before = files(".")
    assert f"another {path}; restore that" in refused(capsys, f"{command} --resume")
    assert files(".") == before


def test_resume_with_other_speed_and_reports(here):
    assert run(STEPS) == 0
    shutil.rmtree(Path("run/checkpoints/step-000002"))
    Path("run/summary.json").unlink()
    assert run(f"{STEPS} --resume --micro-batch-tokens 100 --save-every 5 --samples 2") == 0


@pytest.mark.parametrize("command", [
    f"{SIMRL} --steps 400", f"{ROLLOUT} --n 40 --max-new-tokens 400", f"{EVAL} --n 400"])
def test_two_processes_on_one_out(here, capsys, command):
    process = start(command)
    part = {"simrl": "run/metrics.jsonl", "rollout": "out.jsonl.part", "eval": "scores/generations.jsonl.part"}
    try:
        path = Path(part[command.split()[0]])
        wait_for(process, lambda: path.exists() and path.stat().st_size)
        process.send_signal(signal.SIGSTOP)  # or it might end; it keeps its lock
        assert "another process writes there" in refused(capsys, f"{command} --resume")
    finally:
        process.kill()
        process.communicate()
    Path("folder").mkdir()
    lock("folder")
    lock("folder")  # this process may take it again


@pytest.mark.parametrize("seed", range(20))
def test_a_log_is_cut_behind_a_step(tmp_path, seed):
    """As if every line were read, whatever the lengths; half a line at the end goes."""
    r = random.Random(seed)
    path = tmp_path / "metrics.jsonl"
    steps = sorted(r.choices(range(1, 9), k=r.randrange(30)))
    log_metrics(tmp_path, ({"step": step, "text": "ü\u2028" * r.randrange(300)} for step in steps))
    whole = path.read_bytes().splitlines(keepends=True) if steps else []
    with open(path, "ab") as file:
        file.write('{"step": 1, "text": "ü'.encode()[:r.randrange(24)])
    last = r.randrange(10)
    cut_log(path, last)
    assert path.read_bytes() == b"".join(line for line in whole if json.loads(line)["step"] <= last)


def test_metrics_while_a_run_writes_them(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_ctrl_c_in_a_rollout_says_what_was_kept(here):
    process = start_slowly(f"{ROLLOUT} --n 20 --max-new-tokens 100 --max-concurrent 20")
    part = Path("out.jsonl.part")
    wait_for(process, lambda: part.exists() and part.read_bytes().count(b"\n") > 3)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    kept = part.read_bytes().count(b"\n")
    assert process.returncode == 130 and f"{kept} of these 24 records are done, and kept in out.jsonl.part" in error
    assert error.endswith("star.py rollout: interrupted; continue with the same command and --resume\n")


def test_ctrl_c_while_sim_rl_samples(here):
    """The step is given up, and the checkpoint is that of the step before."""
    command = SIMRL.replace("--save-every 1", "--save-every 90")
    command += " --steps 6 --n 30 --max-new-tokens 90 --batch-size 30"
    process = start(command)
    log = Path("run/metrics.jsonl")
    wait_for(process, lambda: log.exists() and '"step": 2,' in log.read_text())
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    step = latest_checkpoint("run")
    assert process.returncode == 130 and step >= 2 and f"Stopped after step {step}." in error, error
    assert read_metrics("run")[-1]["step"] == step


# ---- What a call is told

IDLE_CALLS = [  # for each row of IDLE: a flag without effect, and a command with it
    ("valid-limit", f"{SFT} --valid-limit 3"),
    ("valid-every", f"{SIMRL} --valid-every 3"),
    ("hold-out", f"{SFT} --valid train.jsonl"),
    ("valid-answers", f"{SFT} --hold-out 0 --valid-answers 2"),
    ("samples", f"{SFT} --hold-out 0 --samples 2"),
    ("epochs", f"{SFT} --epochs 2"),
    ("tail-weight", f"{CKD} --objective ce --tail-weight 2"),
    ("tail-weight", f"{CKD} --kd-ratio 0 --tail-weight 2"),
    ("kd-ratio", f"{CKD} --objective ce --kd-ratio 0.5"),
    ("max-draws", f"{SIMRL} --max-draws 2"),
    ("clip", f"{SIMRL} --clip 0.1 0.1 --batch-size 8"),
    ("strip-eos", f"{SIMRL} --reward binary --strip-eos"),
    ("strip-eos", "reward --data train.jsonl --binary --strip-eos"),
    ("max-prompt-tokens", "prepare --data train.jsonl --out new.jsonl --max-prompt-tokens 9"),
    ("seed", "prepare --data train.jsonl --out new.jsonl --seed 9"),
    ("top-p", f"{ROLLOUT} --temperature 0 --top-p 0.5"),
    ("tools", "bfcl --model student --out new --compare missing --tools wrapped"),
    ("tools-form", "chat --model student --device cpu --tools-form wrapped"),
    ("seed", f"{EVAL} --seed 3"),
]


@pytest.mark.parametrize("row, call", list(zip(IDLE, IDLE_CALLS, strict=True)))
def test_a_flag_without_effect_is_said(here, capsys, row, call):
    flag, command = call
    run(command)
    assert f"note: --{flag} has no effect {row[2]}\n" in capsys.readouterr().err


def test_no_flag_of_these_calls_is_idle(here, capsys):
    for command in (f"{CKD} --tail-weight 2 --kd-ratio 0.5", f"{SFT} --hold-out 0 --samples 0 --out sft",
                    f"{SIMRL} --valid train.jsonl --valid-every 2 --out other"):
        assert run(command) == 0
        assert "no effect" not in capsys.readouterr().err


def test_a_model_without_numbers_is_said(here, capsys):
    model = Transformer.from_pretrained("student")
    model.state_dict()["model.norm.weight"].fill_(torch.nan)
    model.save_pretrained("broken")
    line = refused(capsys, ROLLOUT.replace("teacher", "broken"))
    assert "the model computes probabilities that are not numbers; its weights are damaged" in line


def test_a_finished_rollout_with_an_edited_reward(here, capsys):
    assert run(ROLLOUT) == 0
    lines = rows("out.jsonl")
    for reward in ("x", None):
        lines[0]["responses"][0]["reward"] = reward
        Path("out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if reward:
            assert 'a response: reward is "x", not a number; remove the line' in refused(capsys, f"{ROLLOUT} --resume")
    assert run(f"{ROLLOUT} --resume") == 0


def test_a_run_that_learned_nothing_says_so(here, capsys):
    assert run(f"{SIMRL} --filter scores --reward binary --steps 1") == 0  # of random text
    assert rows("run/metrics.jsonl")[-1]["groups_kept"] == 0
    assert "The weights are as before: no group had a learning signal" in capsys.readouterr().out


def test_filters_on_a_finished_rollout(here, capsys):
    assert run(ROLLOUT) == 0
    before = files(".")
    assert run(f"{ROLLOUT} --resume") == 0
    assert "the filters are not run again" in capsys.readouterr().err and files(".") == before


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2"}, {
    "WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1234"}])
def test_variables_of_torchrun(here, capsys, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "start with torchrun, or unset WORLD_SIZE" in refused(capsys, STEPS)


def test_a_flag_in_another_encoding(here):
    words = [sys.executable, PROGRAM, *STEPS.split(), "--out", b"r\xfcn"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "not UTF-8 text" in result.stderr


def test_a_device_that_is_not_there(here, capsys):
    assert "--device mps: no such device" in refused(capsys, STEPS.replace("--device cpu", "--device mps"))


def test_few_steps_of_sim_rl_are_said(here, capsys):
    assert run(SIMRL.replace("--steps 3", "--episodes 1 --prompts-per-step 24 --batch-size 48")) == 0
    assert "only 1 steps with 1 updates" in capsys.readouterr().err


# ---- Chains

CHAIN = f"{STEPS} --out a\n{CKD} --student a/model --out b\n"


def test_a_chain_checks_all_inputs_first(here, capsys):
    for line, message in ((f"{SFT} --data nowhere.jsonl", "nowhere.jsonl: no such file, and no line before writes it"),
                          (f"{SFT} --model c/model", "c/model: no such file, and"),
                          (f"{SFT} --model b --out c", "b: no such file, and"),  # the model is b/model
                          (f"{SFT} --model b/modle --out c", "b/modle: no such file, and"),
                          (f"{SFT} --model headless --out c", "headless/tokenizer.json: no such file"),
                          ("prepare --model weightless --data train.jsonl --out p\neval --model weightless --data "
                           "train.jsonl --out e", "weightless: no model.safetensors"),  # prepare needs no weights
                          (f"{EVAL} --compare nowhere", "nowhere: no such file, and"),
                          ("table nowhere", "nowhere: no such file, and"),
                          (f"{STEPS} --out a", "a: another line writes there, too"),
                          ("rollout --model student --data train.jsonl --out train.jsonl", "train.jsonl: exists already"),
                          ("eval --model student --data bad.jsonl --out e", "bad.jsonl:1: is not JSON")):
        Path("bad.jsonl").write_text("{")
        shutil.copytree("student", "headless", dirs_exist_ok=True)
        Path("headless/tokenizer.json").unlink(missing_ok=True)
        shutil.copytree("student", "weightless", dirs_exist_ok=True)
        Path("weightless/model.safetensors").unlink(missing_ok=True)
        Path("chain.txt").write_text(f"{CHAIN}{line}\n")
        assert message in refused(capsys, "curriculum chain.txt") and not Path("a").exists()


def test_a_chain_may_use_a_model_of_the_demo_and_draw_a_picture_twice():
    lines = ["demo --out d", "lens --teacher t --student d/ckd/model --data x --out page.html",
             "plot d/ckd --out p.png", "plot d/star --out p.png"]
    demo, lens, *plots = stages = [star.parse(line.split())[0] for line in lines]
    for stage in stages:
        stage.out = Path(stage.out)
    for stage, before in ((lens, [demo]), (plots[0], [demo, lens]), (plots[1], [demo, lens, plots[0]])):
        curriculum.check_out(stage, before, False)
    assert curriculum.writes(demo, Path("d/ckd/model"), "model")
    with pytest.raises(InputError, match="another line writes there"):
        curriculum.check_out(demo, [lens, demo], False)


def test_a_chain_goes_on_after_a_stage_was_mended(here, capsys):
    Path("chain.txt").write_text(CHAIN.replace("--student a/model", "--student a/model --lr 1e30"))
    assert run("curriculum chain.txt") == 2  # it diverged
    Path("chain.txt").write_text(CHAIN)
    assert "another lr" in refused(capsys, "curriculum chain.txt --resume")
    shutil.rmtree("b")
    before = files("a")
    assert run("curriculum chain.txt --resume") == 0
    assert files("a") == before and Path("b/summary.json").exists()


def test_a_chain_goes_on_after_a_stage_was_finished_by_hand(here):
    Path("chain.txt").write_text(CHAIN)
    assert run(CHAIN.splitlines()[0]) == 0
    assert run(f"{CHAIN.splitlines()[1]} --micro-batch-tokens 100") == 0
    before = files(".")
    assert run("curriculum chain.txt --resume") == 0 and files(".") == before


def test_a_stage_whose_input_was_made_anew_is_not_finished(here, capsys):
    Path("chain.txt").write_text(CHAIN)
    assert run("curriculum chain.txt") == 0
    shutil.rmtree("a")
    assert run(f"{CHAIN.splitlines()[0]} --seed 7") == 0
    Path("chain.txt").write_text(CHAIN.replace("--out a", "--seed 7 --out a", 1))
    assert "b: was made with another a/model/model.safetensors" in refused(capsys, "curriculum chain.txt --resume")
    shutil.rmtree("a")  # it is made anew by the chain itself
    assert "b: was made with another a/model/model.safetensors" in refused(capsys, "curriculum chain.txt --resume")


def test_lists_that_cannot_run(here, capsys):
    Path("chain.txt").write_text(f"sft --help\n{STEPS}\n")
    assert run("curriculum chain.txt") == 2 and not Path("run").exists()  # help is not a run that has ended well
    Path("chain.txt").write_text("curriculum chain.txt")
    capsys.readouterr()
    assert run("curriculum chain.txt") == 2 and "a list of commands that runs itself" in capsys.readouterr().err
    Path("chain.txt").write_text("table a\0b")
    assert "a NUL character" in refused(capsys, "curriculum chain.txt")
    lines = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    for line in lines:
        line["responses"] = [{"text": "a"}]
        del line["answer"]
    Path("train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for command in (SIMRL, EVAL):
        Path("chain.txt").write_text(f"{ROLLOUT}\n{command}\n")
        assert "has no gold answer" in refused(capsys, "curriculum chain.txt") and not Path("out.jsonl").exists()
    assert curriculum.split_lines(r'table "a \" b # c" # d') == [r"""table 'a " b # c'"""]


def test_chains_of_chains_and_limits(here):
    """What a nested chain writes is not known before; records behind --limit are not read."""
    Path("train.jsonl").write_text(Path("train.jsonl").read_text() + "broken\n")
    Path("inner.txt").write_text(f"{STEPS} --limit 24 --out a\n")
    Path("chain.txt").write_text("curriculum inner.txt\n" + f"{CKD} --limit 24 --student a/model --out b\n")
    assert run("curriculum chain.txt") == 0 and Path("b/summary.json").exists()


def test_a_chain_notices_other_flags_and_data_of_prepare(here, capsys):
    line = "prepare --data train.jsonl --size 8 --seed 1 --out chosen.jsonl"
    Path("chain.txt").write_text(line)
    assert run("curriculum chain.txt") == 0 and run("curriculum chain.txt --resume") == 0
    Path("chain.txt").write_text(line.replace("--seed 1", "--seed 2"))
    assert "chosen.jsonl: was made with another seed" in refused(capsys, "curriculum chain.txt --resume")
    Path("chain.txt").write_text(line)
    Path("train.jsonl").write_text("".join(Path("train.jsonl").read_text().splitlines(keepends=True)[1:]))
    assert "chosen.jsonl: was made with another train.jsonl" in refused(capsys, "curriculum chain.txt --resume")


def test_a_chain_notices_another_filter_or_comparison(here, capsys):
    rollout = ROLLOUT.replace(" --keep-all", "")
    Path("chain.txt").write_text(f"{rollout}\n{EVAL}\n")
    assert run("curriculum chain.txt") == 0
    Path("chain.txt").write_text(f"{ROLLOUT}\n{EVAL}\n")
    assert "was made with another keep_all" in refused(capsys, "curriculum chain.txt --resume")
    shutil.copytree("scores", "before")
    Path("chain.txt").write_text(f"{rollout}\n{EVAL} --compare before\n")
    assert run("curriculum chain.txt --resume") == 0
    assert "difference" in capsys.readouterr().out


def test_the_slower_of_two_prepares_leaves_the_file_of_the_faster(here, capsys, monkeypatch):
    def read_slowly(*path, **options):
        Path("chosen.jsonl").write_text("by another process")
        return read_records(*path, **options)

    monkeypatch.setattr(prepare, "read_records", read_slowly)
    assert "another process has written it" in refused(capsys, "prepare --data train.jsonl --out chosen.jsonl")
    assert Path("chosen.jsonl").read_text() == "by another process"
    assert not Path("chosen.jsonl.part").exists()


def test_a_chain_goes_on_after_prepare_was_killed_at_its_end(here, monkeypatch):
    Path("chain.txt").write_text("prepare --data train.jsonl --model student --out chosen.jsonl")
    write = prepare.write_lines
    for before in (True, False):  # killed before its file is in place, and after
        def write_and_die(path, lines):
            if path != Path("chosen.jsonl") or not before:
                write(path, lines)
            assert path != Path("chosen.jsonl"), "killed"

        monkeypatch.setattr(prepare, "write_lines", write_and_die)
        with pytest.raises(AssertionError, match="killed"):
            run("curriculum chain.txt")
        monkeypatch.setattr(prepare, "write_lines", write)
        assert Path("chosen.jsonl.arguments.json").exists() and Path("chosen.jsonl").exists() != before
        assert run("curriculum chain.txt --resume") == 0 and Path("chosen.jsonl").exists()
        inputs = json.loads(Path("chosen.jsonl.arguments.json").read_text())["inputs"]
        assert "student/tokenizer.json" in inputs and "student/model.safetensors" not in inputs
        assert not Path("chosen.jsonl.part").exists()
        Path("chosen.jsonl").unlink()


def test_a_file_without_settings_is_not_finished(here, capsys):
    Path("mine.jsonl").write_text("{}")
    Path("chain.txt").write_text("prepare --data train.jsonl --out mine.jsonl")
    assert "mine.jsonl: exists already" in refused(capsys, "curriculum chain.txt --resume")
    Path("chain.txt").write_text(f"{CKD} --teacher other --out new")
    shutil.copytree("teacher", "other")
    (Path("other") / "chat_template.jinja").write_text("{{ another }}")
    assert run("curriculum chain.txt") == 0  # of a teacher only the tokenizer is used

"""Lists of command lines: they run in order, stop at an error, resume, and their scores end in a table."""
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import star
import train
from apps.curriculum import COLUMNS, print_examples, split_lines

MACHINE = "--think off --device cpu --dtype float32"
EVAL = f"--data train.jsonl --n 2 --limit 8 --max-new-tokens 8 {MACHINE}"
SIMRL = f"--data train.jsonl --steps 1 --prompts-per-step 2 --n 2 --filter none --max-new-tokens 8 {MACHINE}"
ROLLOUT = f"--data train.jsonl --n 2 --max-new-tokens 8 {MACHINE}"
CKD = f"--steps 2 --save-every 1 --batch-size 4 --hold-out 2 --samples 1 --lr 1e-3 {MACHINE}"
PLAN = f"""
# The paper's order on two random models.
eval --model teacher {EVAL} --out run/eval/teacher
python star.py eval --model student {EVAL} --out run/eval/student   # as it is typed in a shell
simrl --model teacher {SIMRL} --out run/refine
rollout --model run/refine/model {ROLLOUT} \\
--keep-all --out run/rollouts.jsonl

ckd --teacher run/refine/model --student student   # an indent continues the line
    --data run/rollouts.jsonl {CKD}
    # a comment between its parts

    --out run/ckd
eval --model run/ckd/model {EVAL} --out run/eval/after-CKD
simrl --model run/ckd/model {SIMRL} --out run/star
eval --model run/star/model {EVAL} --out run/eval/after-STAR
table run/eval/teacher run/eval/student run/eval/after-CKD run/eval/after-STAR
"""
ORDER = ["eval", "eval", "simrl", "rollout", "ckd", "eval", "simrl", "eval", "table"]


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of the world with PLAN as plan.txt, and the current folder."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    Path("plan.txt").write_text(PLAN)


def run(*flags):
    return star.main(["curriculum", "plan.txt", *flags])


def printed_lines(output):
    """The command lines that a curriculum printed, as lists of words."""
    lines = [line for line in output.splitlines() if line.startswith("$ python star.py ")]
    return [line.split()[3:] for line in lines]


def commands(output):
    return [words[0] for words in printed_lines(output)]


def weights():
    """{path: content} of all models and checkpoints of the run."""
    return {path: path.read_bytes() for path in Path("run").rglob("*.safetensors")}


def table_of(output, names):
    """{name: {column: cell}} of the table at the end of an output."""
    lines = output.rstrip().splitlines()[-1 - len(names):]
    heads, *rows = (re.split(" {2,}", line.strip()) for line in lines)
    assert [row[0] for row in rows] == names
    return {name: dict(zip(heads, cells)) for name, *cells in rows}


# ---- Running -----------------------------------------------------------------------------------------------------

def test_continuation_lines_and_comments():
    lines = split_lines(PLAN)
    assert [line.split()[0] for line in lines] == ORDER
    assert lines[3] == f"rollout --model run/refine/model {ROLLOUT} --keep-all --out run/rollouts.jsonl"
    assert lines[4] == f"ckd --teacher run/refine/model --student student --data run/rollouts.jsonl {CKD} --out run/ckd"
    assert split_lines("# nothing\n\n   \n") == []
    quoted, = split_lines("eval --model 'two words' --data '#1.jsonl'")
    assert shlex.split(quoted) == ["eval", "--model", "two words", "--data", "#1.jsonl"]


def test_lines_run_in_order_and_end_in_a_table(here, capsys):
    assert run() == 0
    output = capsys.readouterr().out
    assert [shlex.join(words) for words in printed_lines(output)] == split_lines(PLAN)
    assert commands(output) == ORDER
    models = [path for path in weights() if path.name == "model.safetensors"]
    assert len(models) == 3
    names = ["teacher", "student", "after-CKD", "after-STAR"]
    for name, cells in table_of(output, names).items():
        summary = json.loads(Path("run/eval", name, "summary.json").read_text())
        expected = {}
        for measure, metric in summary["metrics"].items():
            if measure in COLUMNS or measure == "pass@2":
                expected[measure] = f"{metric['mean']:.3f}"
        assert {"exact calls", "pass@2"} < expected.keys()
        trained = {"after-CKD": "run/ckd", "after-STAR": "run/star"}
        if name in trained:
            figures = json.loads(Path(trained[name], "summary.json").read_text())
            seconds = [value for key, value in figures.items() if key.startswith("seconds")]
            assert len(seconds) == {"after-CKD": 1, "after-STAR": 3}[name]
            expected["seconds"] = f"{sum(seconds):.0f}"
        assert cells == expected
    assert star.main(["table", "run/eval/after-STAR", "run/eval/teacher"]) == 0  # the command alone, in any order
    assert table_of(capsys.readouterr().out, ["after-STAR", "teacher"])["teacher"] == table_of(output, names)["teacher"]


def test_a_mistyped_flag_in_the_last_line_stops_everything(here, capsys):
    Path("plan.txt").write_text(PLAN.replace("table run", "table --columms 3 run"))
    with pytest.raises(SystemExit) as error:
        run()
    output, message = capsys.readouterr()
    assert error.value.code == 2 and "--columms" in message and output == "" and not Path("run").exists()


def test_an_unknown_command_stops_everything(here, capsys):
    Path("plan.txt").write_text(PLAN + "distil --teacher teacher\n")
    with pytest.raises(SystemExit) as error:
        run()
    assert error.value.code == 2 and "distil" in capsys.readouterr().err and not Path("run").exists()


def test_a_failing_line_stops_the_rest(here, capsys):
    Path("plan.txt").write_text(PLAN.replace("--keep-all", "--max-prompt-tokens 3"))
    assert run() == 2
    output, message = capsys.readouterr()
    assert "no prompt is left" in message and not Path("run/ckd").exists()
    assert commands(output) == ORDER[:4]


def test_the_answers_of_a_compared_model_exist_already(here, capsys):
    line = "eval --model student --compare teacher --data train.jsonl --out scores\n"
    Path("plan.txt").write_text(PLAN + line)
    Path("scores-compared").mkdir()
    Path("scores-compared/summary.json").touch()
    assert run() == 2
    assert "scores-compared: exists already; give --resume" in capsys.readouterr().err and not Path("run").exists()


@pytest.mark.parametrize("content, message", [
    (None, "plan.txt: .*; give a text file of star.py command lines"),
    (b"eval \xff", "plan.txt: .*; give a text file of star.py command lines"),
    (b"eval --model 'teacher", "plan.txt: .*quotation.*")])
def test_a_file_that_is_no_list_of_command_lines(here, capsys, content, message):
    if content is None:
        Path("plan.txt").unlink()
    else:
        Path("plan.txt").write_bytes(content)
    assert run() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.match(f"star.py curriculum: {message}", error), error


# ---- Running again -----------------------------------------------------------------------------------------------

def test_resume_skips_finished_lines_and_continues_the_stopped_one(here, capsys):
    assert run() == 0
    expected = weights()
    rollouts = Path("run/rollouts.jsonl").read_bytes()
    capsys.readouterr()

    assert run() == 2  # without --resume
    assert "run/eval/teacher: exists already" in capsys.readouterr().err

    # A run stopped in its last line: everything else is skipped.
    shutil.rmtree("run/star")
    assert run("--resume") == 0
    output = capsys.readouterr().out
    lines = printed_lines(output)
    assert commands(output) == ORDER and weights() == expected
    assert [words[-1] == "finished" for words in lines] == [True] * 6 + [False, True, False]

    # A run stopped in ckd, after its first step.
    for name in ("star", "eval/after-CKD", "eval/after-STAR", "ckd/model", "ckd/checkpoints/step-000002"):
        shutil.rmtree(f"run/{name}")
    Path("run/ckd/summary.json").unlink()
    assert run("--resume") == 0
    lines = printed_lines(capsys.readouterr().out)
    assert [words[-1] for words in lines[:5]] == ["finished"] * 4 + ["--resume"] and weights() == expected
    assert "finished" not in [words[-1] for words in lines[5:]]

    # A run stopped in rollout: only OUT.part is there.
    for name in ("ckd", "star", "eval/after-CKD", "eval/after-STAR"):
        shutil.rmtree(f"run/{name}")
    Path("run/rollouts.jsonl").unlink()
    Path("run/rollouts.jsonl.part").touch()
    assert run("--resume") == 0
    lines = printed_lines(capsys.readouterr().out)
    assert [words[-1] for words in lines[:4]] == ["finished"] * 3 + ["--resume"] and weights() == expected
    assert Path("run/rollouts.jsonl").read_bytes() == rollouts


def test_a_picture_is_drawn_again_if_a_line_before_it_ran(here, capsys):
    pytest.importorskip("matplotlib")
    Path("plan.txt").write_text(PLAN.replace("table run", "plot run/star --out run/star.png\ntable run"))
    assert run() == 0
    for removed, finished in (((), True), (("run/star",), False)):
        for folder in removed:
            shutil.rmtree(folder)
        capsys.readouterr()
        assert run("--resume") == 0
        drawn = printed_lines(capsys.readouterr().out)[-2]
        assert drawn[0] == "plot" and (drawn[-1] == "finished") == finished


def test_resume_runs_lines_that_write_no_file_again(here, capsys):
    Path("lines.jsonl").write_text('{"prompt": "", "generation": "<think></think>Yes.", "label": "Yes."}\n')
    Path("plan.txt").write_text("reward --data lines.jsonl\n")
    for flags in ([], ["--resume"]):
        assert run(*flags) == 0
        assert '"reward"' in capsys.readouterr().out


# ---- The demo and the examples -----------------------------------------------------------------------------------

@pytest.mark.parametrize("quick", [False, True])
def test_the_demo_is_a_list_of_command_lines(quick):
    args, run_demo = star.parse(["demo", "--out", "some where", "--seed", "1", *["--quick"] * quick])
    lines = run_demo(args)
    stages = [star.parse(shlex.split(line))[0] for line in lines]
    assert [args.command for args in stages] == ["eval", "eval", "rollout", "ckd", "eval", "simrl", "eval", "table"]
    for args in stages[:-1]:
        assert args.seed == 1 and args.device == "cpu" and Path(args.out).parts[0] == "some where"
        assert Path(args.data).exists() or args.data == "some where/rollouts.jsonl"
    evals = [args for args in stages if args.command == "eval"]
    assert stages[-1].evals == [args.out for args in evals]
    assert {(args.data, args.limit) for args in evals} == {(evals[0].data, 40 if quick else 1280)}
    assert {args.n for args in evals} == {4}  # findings.py reads pass@4


def test_the_examples_are_requests_that_only_the_last_model_answers(capsys):
    def answer(request, exact, calls):
        return {"messages": [{"role": "user", "content": request}], "answer": {"tool_calls": calls},
                "responses": [{"exact": exact, "text": f"{request} {exact}"}]}

    requests = ["both right", "only the last", "only the first", "a refusal", "second", "third", "fourth"]
    first = [True, False, True, False, False, False, False]
    last = [True, True, False, True, True, True, True]
    answers = []
    for exact in (first, last):
        calls = [[] if request == "a refusal" else [{}] for request in requests]
        answers.append([answer(*row) for row in zip(requests, exact, calls)])
    print_examples(["student", "after-STAR"], answers)
    paragraphs = capsys.readouterr().out.strip().split("\n\n")
    assert [paragraph.splitlines()[0].split(None, 1)[1] for paragraph in paragraphs] == [
        "only the last", "second", "third"]
    student, star_model = paragraphs[0].splitlines()[1:]
    assert student.split() == ["student", "wrong", "only", "the", "last", "False"]
    assert star_model.split() == ["after-STAR", "right", "only", "the", "last", "True"]


def test_a_finished_line_with_other_flags_is_refused(here, capsys):
    Path("plan.txt").write_text(f"ckd --teacher teacher --student student --data train.jsonl {CKD} --out run\n")
    assert run() == 0
    text = Path("plan.txt").read_text()
    Path("plan.txt").write_text(text.replace("--lr 1e-3", "--lr 1e-2"))
    assert run("--resume") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("star.py curriculum: run: was made with another lr (0.001, now 0.01); use its flags")
    Path("plan.txt").write_text(text)
    assert run("--resume") == 0


@pytest.mark.parametrize("rollout, ckd, flags", [
    ("--think off --tools wrapped", "--think off", "--tools wrapped, but read with --tools flat"),
    ("--think on", "--think off", "--think on, but read with --think off"),
    ("", "--think none", "--think on, but read with --think none"),  # Qwen3's default
    ("", "", None), ("", "--think on", None), ("--think off --tools wrapped", "--tools wrapped --think off", None)])
def test_a_rollout_behind_other_prompts_is_refused_before_it_starts(here, capsys, rollout, ckd, flags):
    machine = "--device cpu --dtype float32"
    Path("plan.txt").write_text(
        f"rollout --model teacher --data train.jsonl --n 1 --limit 8 --max-new-tokens 8 --keep-all {machine} {rollout} "
        f"--out r.jsonl\nckd --teacher teacher --student student --data r.jsonl --steps 1 {machine} {ckd} --out run\n")
    assert run() == (2 if flags else 0)
    if flags:
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"star.py curriculum: r.jsonl: is sampled with {flags}; give both lines the same"), error
        assert not list(Path().glob("r.jsonl*"))


def test_prompts_of_a_model_that_is_still_to_be_made(here, capsys):
    """Its default is not known, --tools is."""
    sft = "sft --model student --data train.jsonl --steps 1 --device cpu --think off --out made"
    rollout = "rollout --model made/model --data train.jsonl --out r.jsonl --tools wrapped"
    Path("plan.txt").write_text(f"{sft}\n{rollout}\nckd --teacher teacher --student student --data r.jsonl --out run\n")
    assert run() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "is sampled with --tools wrapped" in error and not Path("made").exists()


def test_a_table_of_something_else_is_refused(here, capsys):
    assert star.main(["sft", "--model", "student", "--data", "train.jsonl", "--out", "run", *CKD.split()]) == 0
    capsys.readouterr()
    assert star.main(["table", "run"]) == 2
    assert capsys.readouterr().err == (
        "star.py table: run/summary.json: model is null, not text; give the --out folder of a finished eval\n")


def test_a_table_of_different_records_is_refused(here, capsys):
    lines = Path("train.jsonl").read_text().splitlines(keepends=True)
    Path("rest.jsonl").write_text("".join(lines[8:]))
    for out, data in (("one", "train.jsonl"), ("two", "rest.jsonl")):
        assert star.main(f"eval --model teacher {EVAL} --data {data} --out {out}".split()) == 0
    capsys.readouterr()
    assert star.main(["table", "one", "two"]) == 2
    assert capsys.readouterr().err == "star.py table: two: is of other records than one; use the same --data and --limit\n"


def test_a_comment_that_ends_in_a_backslash_continues_nothing():
    assert split_lines("# k = m = 4 \\\nckd --out x\n  # --k 4 \\\n  --m 4\nplot x") == ["ckd --out x --m 4", "plot x"]
    assert split_lines("sft --out x # lower \\\nplot x") == ["sft --out x", "plot x"]
    assert split_lines("sft --out run#3 --data 'a # b' # c") == ["sft --out 'run#3' --data 'a # b'"]


@pytest.mark.parametrize("stage", [f"ckd --teacher teacher --student student --data train.jsonl {CKD}",
                                   f"simrl --model student {SIMRL}"])
def test_ctrl_c_in_the_last_step_ends_the_list(here, monkeypatch, stage):
    """That run is finished, and the next line does not begin."""
    Path("plan.txt").write_text(f"{stage} --out first\n{stage} --out second\n")
    ends_at = train.Steps.ends_at

    def interrupt(steps, step):
        if step == steps.last:
            steps.request_stop()
        return ends_at(steps, step)

    with monkeypatch.context() as patch:
        patch.setattr(train.Steps, "ends_at", interrupt)
        assert run() == 130
    assert Path("first/summary.json").exists() and not Path("second").exists()
    assert run("--resume") == 0 and Path("second/summary.json").exists()

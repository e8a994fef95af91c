"""The paper's order for a pair of models: refine the teacher, let it answer, distil it, refine the student; and score.

`python star.py demo` is this on the embedded world of data/tiny.

Every stage is one of star.py's single commands, printed before it runs, so any of them can be typed again alone:

    refine     simrl on the teacher (its "correction")          OUT/refine
    rollout    the teacher answers the prompts                 OUT/rollouts.jsonl
    ckd        those answers are distilled into the student    OUT/ckd
    simrl      the distilled student refines itself            OUT/star
    eval       each model on the same records, when it is there  OUT/eval/NAME

A stage left out hands on what it was given: no `refine` keeps the teacher, no `rollout` distils along gold answers, no
`ckd` refines the student as it is.
"""
import contextlib
import io
import json
import os
import shlex
import sys
import time
from pathlib import Path

from data import read_json, write_json
from data.show import columns, one_line

TINY = Path(__file__).parent / "tiny"
STAGES = ("refine", "rollout", "ckd", "simrl", "eval")
MAKERS = {"refined teacher": "refine", "after CKD": "ckd", "after STAR": "star"}  # which folder's run made a model
SHOWN = ("exact calls", "reward", "valid calls", "correct refusals", "entropy")  # and pass@n, seconds

# What the demo and tests/tiny_run.py train and score with, and how long: one to two minutes a stage on two CPU cores.
TINY_FLAGS = {
    "rollout": "--n 1 --rows 512 --max-new-tokens 128",
    "ckd": "--k 4 --m 4 --branches 8 --optimiser muon --lr 1e-3 --batch 64 --hold-out 64 --valid-every 45 "
           "--micro-tokens 2048",
    "simrl": "--prompts 32 --batch 64 --rows 256 --lr 2e-4 --max-new-tokens 128 --micro-tokens 2048",
    "eval": "--n 8 --rows 512 --max-new-tokens 128"}
LENGTHS = {"rollout": "", "ckd": "--steps 135", "simrl": "--steps 20", "eval": "--limit 200"}
QUICK = {"rollout": "--limit 400", "ckd": "--steps 6", "simrl": "--steps 2", "eval": "--limit 40"}


def demo(out, quick, seed):
    """The words for star.py that make the demo. quick: few steps, which show the plumbing and teach little."""
    tiny, lengths = os.path.relpath(TINY), QUICK if quick else LENGTHS  # a relative path is shorter to read
    flags = [part for stage, words in TINY_FLAGS.items()
             for part in (f"--{stage}", f"{words} {lengths[stage]}".strip())]
    return ["curriculum", "--teacher", f"{tiny}/teacher", "--student", f"{tiny}/student", "--data",
            f"{tiny}/train.jsonl.gz", "--valid", f"{tiny}/values.jsonl.gz", "--skip", "refine", "--device", "cpu",
            "--dtype", "float32", "--seed", str(seed), *flags, "--out", str(out)]


def plan(teacher, student, data, out, valid=None, flags=None, shared=(), skip=()):
    """The stages as command lines: ([(stage, where it writes, words for star.py)], {name: model folder}).

    teacher, student: model folders · data: records with gold answers · valid: records to score on, None for no `eval` ·
    flags: {stage: further words} · shared: words for every stage, such as --think off · skip: stages to leave out.
    """
    flags, stages, models = flags or {}, [], {}

    def stage(name, where, *words):
        if name not in skip:
            stages.append((name, where, [*words, *shared, *flags.get(name, ()), "--out", str(where)]))
        return name not in skip

    def score(name, model):
        models[name] = model
        if valid:
            stage("eval", out / "eval" / name.replace(" ", "-"), "eval", "--model", model, "--data", valid)

    score("teacher", teacher)
    score("student", student)
    if stage("refine", out / "refine", "simrl", "--model", teacher, "--data", data):
        teacher = f"{out}/refine/model"
        score("refined teacher", teacher)
    answers = data
    if stage("rollout", out / "rollouts.jsonl", "rollout", "--model", teacher, "--data", data):
        answers = f"{out}/rollouts.jsonl"
    if stage("ckd", out / "ckd", "ckd", "--teacher", teacher, "--student", student, "--data", answers):
        student = f"{out}/ckd/model"
        score("after CKD", student)
    if stage("simrl", out / "star", "simrl", "--model", student, "--data", data):
        score("after STAR", f"{out}/star/model")
    return stages, models


def follow(stages, models, out, main):
    """Run the stages in order, each with --resume where there is something of it; then the table and some examples.

    main: star.main · models: {name: folder} as `plan` gave them. Writes OUT/summary.json. Returns the exit code.
    """
    took = out / "seconds.json"
    for name, where, words in stages:
        resume = ["--resume"] * (where.exists() or Path(f"{where}.part").exists())
        finished = where.is_file() or (where / "summary.json").exists()  # and only looked at again
        print(f"\n$ python star.py {shlex.join(words + resume)}\n", flush=True)
        began, said = time.perf_counter(), io.StringIO() if name == "eval" else sys.stdout  # eval: a line of it, below
        with contextlib.redirect_stdout(said):
            code = main(words + resume)
        if code:
            return code
        if name == "eval":
            print(f"{where.name}: " + "  ".join(f"{m} {v:.3f}" for m, v in scores(where).items()), flush=True)
        seconds = read_json(took) if took.exists() else {}
        if not finished:
            write_json(took, seconds | {str(where): round(time.perf_counter() - began, 1)})
    if any(name == "eval" for name, *_ in stages):
        report(out, models, read_json(took))
    return 0


def scores(folder):
    """{measure: mean} of an evaluation, those that the table shows."""
    metrics = read_json(folder / "summary.json")["metrics"]
    many = [name for name in metrics if name.startswith("pass@") and name != "pass@1"]
    return {name: metrics[name]["mean"] for name in (*SHOWN, *many) if name in metrics}


def report(out, models, seconds):
    """Print and save the table of all models, and three requests as every model answered them."""
    found, rows = {}, []
    for name in models:
        folder, stage = out / "eval" / name.replace(" ", "-"), MAKERS.get(name)
        found[name] = scores(folder) | ({"seconds": seconds[str(out / stage)]} if stage else {})
        with open(folder / "generations.jsonl", encoding="utf-8") as file:
            rows.append([json.loads(line) for line in file])
    write_json(out / "summary.json", {"models": found, "seconds": seconds})
    examples(list(models), rows)
    heads = list(dict.fromkeys(head for figures in found.values() for head in figures))
    print()
    columns([["", *heads]] + [[name, *(f"{figures[head]:.{0 if head == 'seconds' else 3}f}" if head in figures else ""
                                       for head in heads)] for name, figures in found.items()])


def examples(names, rows, most=3):
    """Print up to three requests that the first student got wrong and the last model right, with all answers."""
    def right(row):
        return row["responses"][0]["exact"] and row["answer"]["tool_calls"]

    first = names.index("student")
    turned = [i for i, row in enumerate(rows[-1]) if right(row) and not right(rows[first][i])]
    for i in turned[:most]:
        print(f"\n{'request':14s}  {one_line(rows[-1][i]['messages'][-1]['content'])}")
        for name, answered in zip(names, rows):
            print(f"{name:14s}  {'right' if right(answered[i]) else 'wrong'}  "
                  f"{one_line(answered[i]['responses'][0]['text'])}")

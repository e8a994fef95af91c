"""Lists of star.py command lines: `curriculum` runs one from a file, `demo` the one below, `table` shows the scores.

The list is the whole plan: each line can be copied and run alone. star.py prints the lines, runs them in order and
stops at the first that fails; with --resume it skips the finished ones and continues the one that was stopped.
"""
import json
import os
import shlex
from pathlib import Path

from data import InputError, one_line, print_table, read_json
from data.records import read_lines

# The paper's order on the embedded models (data/tiny): the teacher answers the prompts, CKD distils its answers into
# the student, Sim-RL refines the student, and every model is scored on requests with unseen values.
DEMO = """
eval --model data/tiny/teacher {eval} --out {out}/eval/teacher
eval --model data/tiny/student {eval} --out {out}/eval/student
rollout --model data/tiny/teacher --data data/tiny/train.jsonl.gz --n 1 --max-concurrent 512
    --max-new-tokens 128 {rollout} {machine} --out {out}/rollouts.jsonl
ckd --teacher data/tiny/teacher --student data/tiny/student --data {out}/rollouts.jsonl --k 4 --m 4
    --share-prefix 8 --optimiser muon --lr 1e-3 --batch-size 64 --micro-batch-tokens 2048
    --hold-out 64 --valid-every 45 {ckd} {machine} --out {out}/ckd
eval --model {out}/ckd/model {eval} --out {out}/eval/after-CKD
simrl --model {out}/ckd/model --data data/tiny/train.jsonl.gz --prompts-per-step 32 --batch-size 64
    --max-concurrent 256 --lr 2e-4 --max-new-tokens 128 --micro-batch-tokens 2048 {simrl} {machine}
    --out {out}/star
eval --model {out}/star/model {eval} --out {out}/eval/after-STAR
table {out}/eval/teacher {out}/eval/student {out}/eval/after-CKD {out}/eval/after-STAR
"""
SCORE = "--data data/tiny/values.jsonl.gz --n 8 --max-concurrent 512 --max-new-tokens 128"
LENGTHS = {"rollout": "", "ckd": "--steps 135", "simrl": "--steps 20", "eval": "--limit 200"}
QUICK = {"rollout": "--limit 400", "ckd": "--steps 6", "simrl": "--steps 2", "eval": "--limit 40"}

COLUMNS = ("exact calls", "reward", "valid calls", "correct refusals", "entropy")  # and pass@n, seconds


def split_lines(text):
    """The command lines of a text: an indented line continues the one before; comments and blank lines are dropped.

    >>> split_lines("python star.py sft --model m   # comment\\n    --data d\\n\\nplot run")
    ['sft --model m --data d', 'plot run']
    """
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[:2] == ["python", "star.py"]:
            words = words[2:]
        if line[0].isspace() and lines:
            lines[-1] += " " + shlex.join(words)
        else:
            lines.append(shlex.join(words))
    return lines


def curriculum_flags(parser):
    parser.add_argument("file", help="text file of star.py command lines; \\ or an indent continues a line")
    add_continue_flags(parser)


def add_continue_flags(parser):
    """What to do with results that exist already."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="skip finished lines, continue the stopped one")
    group.add_argument("--overwrite", action="store_true", help="start every line again")


def run_curriculum(args):
    """Run the star.py command lines of a file in order, as printed; --resume continues after a stop."""
    try:
        text = Path(args.file).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as e:
        raise InputError(f"{args.file}: cannot be read ({e}); give a text file of star.py command lines") from e
    try:
        lines = split_lines(text)
    except ValueError as e:  # of shlex: a quote is not closed
        raise InputError(f"{args.file}: {e}; correct the line") from e
    if not lines:
        raise InputError(f"{args.file}: has no command; write star.py command lines, one per line")
    for line in lines:
        if {"--resume", "--overwrite"} & set(shlex.split(line)):
            raise InputError(f"{args.file}: {line!r}: give --resume and --overwrite to `curriculum` instead")
    return lines


def demo_flags(parser):
    parser.add_argument("--out", default="runs/demo", help="folder for everything the demo writes")
    parser.add_argument("--quick", action="store_true", help="a few steps only: shows the stages, teaches little")
    parser.add_argument("--seed", type=int, default=42, help="random seed")
    add_continue_flags(parser)


def run_demo(args):
    """STAR on the embedded models: score teacher and student, distil (CKD), refine (Sim-RL), score again."""
    if Path(args.out).exists() and not (args.resume or args.overwrite):
        raise InputError(f"{args.out}: exists already; use --resume to continue it or --overwrite to start again")
    print("A student that makes mistakes and a teacher that makes few. Both are scored; the teacher answers prompts; "
          "CKD distils its answers into the student; Sim-RL refines the student; each stage is scored.", flush=True)
    return demo_lines(args.out, args.quick, args.seed)


def demo_lines(out, quick=False, seed=42):
    """The demo's command lines. quick: few steps."""
    lengths = QUICK if quick else LENGTHS
    machine = f"--device cpu --dtype float32 --seed {seed}"
    lengths = lengths | {"eval": f"{SCORE} {lengths['eval']} {machine}"}
    text = DEMO.format(out=shlex.quote(str(out)), machine=machine, **lengths)
    tiny = os.path.relpath(Path(__file__).parents[1] / "data/tiny")
    return split_lines(text.replace("data/tiny", shlex.quote(tiny)))


def table_flags(parser):
    parser.add_argument("evals", nargs="+", metavar="EVAL", help="--out folder of an eval; all of the same records")


def run_table(args):
    """Show the scores of several evaluations side by side, and three requests with all answers."""
    names = [Path(folder).name for folder in args.evals]
    answers = []
    for folder in args.evals:
        answers.append([json.loads(line) for _, line in read_lines(Path(folder) / "generations.jsonl")])
    scores = [read_scores(Path(folder)) for folder in args.evals]
    print_examples(names, answers)
    heads = []
    for row in scores:
        heads += [head for head in row if head not in heads]
    rows = [["", *heads]]
    for name, row in zip(names, scores):
        rows.append([name, *(format_cell(head, row.get(head)) for head in heads)])
    print()
    print_table(rows)


def read_scores(folder):
    """{measure: mean} of an evaluation, and the seconds of the run that made its model."""
    summary = read_json(folder / "summary.json", "give the --out folder of a finished eval")
    scores = {}
    metrics = summary["metrics"]
    names = [name for name in metrics if name.startswith("pass@") and name != "pass@1"]
    for name in (*COLUMNS, *names):
        if name in metrics:
            scores[name] = metrics[name]["mean"]
    run = Path(summary["model"]).parent / "summary.json"
    if run.exists():
        figures = read_json(run)
        scores["seconds"] = sum(value for name, value in figures.items() if name.startswith("seconds"))
    return scores


def format_cell(head, value):
    """A score with three digits, seconds with none."""
    if value is None:
        return ""
    return f"{value:.0f}" if head == "seconds" else f"{value:.3f}"


def print_examples(names, answers, most=3):
    """Print requests that the last model answers exactly and another does not, with all answers."""
    def is_right(record):
        return bool(record["responses"][0]["exact"] and record["answer"]["tool_calls"])

    shown = 0
    for records in zip(*answers):
        right = [is_right(record) for record in records]
        if not right[-1] or all(right) or shown == most:
            continue
        shown += 1
        print(f"\n{'request':14s}  {one_line(records[0]['messages'][-1]['content'])}")
        for name, record, correct in zip(names, records, right):
            mark = "right" if correct else "wrong"
            print(f"{name:14s}  {mark}  {one_line(record['responses'][0]['text'])}")

"""Lists of star.py command lines: `curriculum` runs one from a file, `demo` the one below, `table` shows the scores.

The list is the whole plan: each line can be copied and run alone. `run_all` runs and resumes it.
"""
import os
import re
import shlex
import sys
from functools import cache
from pathlib import Path

from apps.evaluate import identity
from data import InputError, hash_files, one_line, print_table
from data import read_json, refuse_changes, refuse_existing, same, seconds_in
from data.chat import Chat
from data.fields import EVALUATION, check_fields
from data.records import stream_records
from data.rollouts import read_rows
from model import Transformer

# The paper's order on the bundled models (data/tiny): the teacher answers the prompts, CKD distils its answers into
# the student, Sim-RL refines the student, and every model is scored on requests with unseen values.
DEMO = """
eval --model {tiny}/teacher {eval} --out {out}/eval/teacher
eval --model {tiny}/student {eval} --out {out}/eval/student
rollout --model {tiny}/teacher --data {tiny}/train.jsonl.gz {machine}
    --n 1 --limit {rollout} --max-concurrent 512 --max-new-tokens 64
    --out {out}/rollouts.jsonl
ckd --teacher {tiny}/teacher --student {tiny}/student {machine}
    --data {out}/rollouts.jsonl --k 4 --m 4 --steps {ckd} --lr 1e-3 --optimiser muon
    --share-prefix 8 --batch-size 64 --micro-batch-tokens 2048
    --valid {tiny}/values.jsonl.gz --valid-limit {valid} --valid-answers {valid}
    --valid-every 15 --max-response-tokens 64 --out {out}/ckd
eval --model {out}/ckd/model {eval} --out {out}/eval/after-CKD
simrl --model {out}/ckd/model --data {tiny}/train.jsonl.gz {machine}
    --steps {simrl} --lr 2.2e-4 --optimiser muon --prompts-per-step 32 --batch-size 64
    --max-concurrent 512 --max-new-tokens 64 --micro-batch-tokens 2048
    --valid {tiny}/values.jsonl.gz --valid-limit {valid} --valid-every 10 --out {out}/star
eval --model {out}/star/model {eval} --out {out}/eval/after-STAR
table {out}/eval/teacher {out}/eval/student {out}/eval/after-CKD {out}/eval/after-STAR
"""
EVAL = "--data {tiny}/values.jsonl.gz --n 4 --max-concurrent 512 --max-new-tokens 64 --limit {limit} {machine}"
FULL = {"rollout": 3200, "ckd": 45, "simrl": 60, "valid": 320, "limit": 1280}
QUICK = {"rollout": 400, "ckd": 6, "simrl": 2, "valid": 20, "limit": 40}

PAGES = ("lens", "plot")  # commands that replace what is at --out
MODELS = ("model", "teacher", "student")  # flags that name model folders
OUTPUTS = ("compare", "evals", "runs", "story")  # flags that name folders which earlier commands have written

RESUME = "skip finished lines, continue the stopped one"

# of the table; also pass@n, seconds
COLUMNS = ("exact calls", "reward", "reward at T = 1", "valid calls", "correct refusals", "entropy")


def split_lines(text):
    """The command lines of a text: an indented line continues the one before; comments and blank lines are dropped, and
    `python star.py`.

    >>> split_lines("python star.py sft --model m   # comment\\n    --data d\\n\\nplot run")
    ['sft --model m --data d', 'plot run']
    """
    lines = []
    # Drop comments; a # in quotes begins none.
    text = re.sub(r"""("(?:\\.|[^"\\\n])*"|'[^'\n]*')|(?<!\S)#.*""", r"\1", text.replace("\r\n", "\n"))
    for line in text.replace("\\\n", " ").split("\n"):
        words = shlex.split(line)
        if words[:2] == ["python", "star.py"]:
            del words[:2]
        if words and line[0].isspace() and lines:
            lines[-1] += " " + shlex.join(words)
        elif words:
            lines.append(shlex.join(words))
    return lines


def curriculum_flags(parser):
    parser.add_argument("file", help="star.py command lines; \\ or an indent continues a line")
    parser.add_argument("--resume", action="store_true", help=RESUME)


def run_curriculum(args):
    """Run the star.py command lines of a file in order, as printed; --resume continues after a stop."""
    try:
        text = Path(args.file).read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("a NUL character")
        lines = split_lines(text)
    except (OSError, ValueError) as e:  # also: not UTF-8, a quote that is not closed
        raise InputError(f"{args.file}: cannot be read ({e}); give a text file of star.py command lines") from e
    if not lines:
        raise InputError(f"{args.file}: has no command; write one star.py command per line")
    if resumed := [line for line in lines if "--resume" in shlex.split(line)]:
        raise InputError(f"{args.file}: {resumed[0]!r}: give --resume to `curriculum` instead")
    return lines


def run_all(lines, args, parse, main):
    """Run command lines until one fails; with --resume, skip the finished ones. Returns the exit code."""
    stages = []  # the flags of each line, and the line itself
    for line in lines:  # a wrong flag in the last line ends it here
        try:
            stage, _ = parse(shlex.split(line))
        except SystemExit:
            print(f"(in the line: {line})", file=sys.stderr)
            raise SystemExit(2) from None
        stage.line = line
        stage.out = Path(getattr(stage, "out", None) or os.devnull)
        stages.append(stage)
    check = cache(check_input)  # once for the same flags of several lines
    for i, stage in enumerate(stages):
        try:
            check_out(stage, stages[:i], args.resume)
            # What an evaluation was compared with is not recorded, so it is compared again, which is quick.
            stage.finished = args.resume and not getattr(stage, "compare", None) and is_finished(stage)
            if not stage.finished:
                check_inputs(stage, stages[:i], check)
        except InputError as e:
            raise InputError(f"{e} (in the line: {stage.line})") from e
    ran = False
    for stage in stages:
        # An earlier line may have rewritten its input; what a picture or a page was made of is not recorded.
        if stage.finished and (not ran or stage.command not in PAGES and is_finished(stage)):
            print(f"\n$ python star.py {stage.line}   # finished", flush=True)
            continue
        ran = True
        begun = stage.command == "curriculum" or exists(stage.out) or stage.out.is_dir()
        resume = " --resume" if args.resume and begun and "resume" in stage else ""
        print(f"\n$ python star.py {stage.line}{resume}\n", flush=True)
        if code := main(shlex.split(stage.line + resume)):
            return code
    return 0


def exists(out):
    """Whether a command has begun to write its --out."""
    return out.is_file() or Path(f"{out}.part").exists() or out.is_dir() and any(out.iterdir())


def check_out(stage, before, resume):
    """InputError if a stage before writes to the same place, or if it exists and the list is not resumed."""
    is_page = stage.command in PAGES
    others = [other.out for other in before if not (is_page and other.command in PAGES)]
    if stage.out != Path(os.devnull) and any(same(stage.out, other) for other in others):
        raise InputError(f"{stage.out}: another line writes there, too; use another --out")
    places = [stage.out]
    if stage.command == "eval" and stage.compare:
        folder = Path(stage.compare)
        if (folder / "config.json").exists() or any(writes(other, folder, "model") for other in before):
            places.append(Path(f"{stage.out}-compared"))  # the answers of that model
    for place in places:
        if exists(place) and not is_page and not resume:
            raise InputError(f"{place}: exists already; give --resume or another --out")


def check_inputs(stage, before, check):
    """InputError if what a stage reads is missing or broken (see `check_input`), unless a stage before writes it."""
    for flag in (*MODELS, "data", "valid", *OUTPUTS):
        values = getattr(stage, flag, None) or []
        limit = getattr(stage, "valid_limit" if flag == "valid" else "limit", None)
        for path in map(Path, values if isinstance(values, list) else [values]):
            writer = next((other for other in before if writes(other, path, flag)), None)
            if writer is None:
                check(path, flag, stage.command, getattr(stage, "think", None), limit)
            elif writer.command == "rollout" and stage.command in ("ckd", "sft"):
                check_prompts(path, writer, stage)


def writes(stage, path, flag):
    """Whether a stage may write what `flag` names at a path. What a nested list writes is not known."""
    path, out = path.resolve(), stage.out.resolve()
    if flag in MODELS and stage.command in ("ckd", "sft", "simrl"):
        return path == out / "model"
    return stage.command == "curriculum" or path.is_relative_to(out) and (flag not in MODELS or stage.command == "demo")


def check_input(path, flag, command, think, limit):
    """InputError if the model folder or file that a flag gives is missing or broken."""
    if not path.exists():
        raise InputError(f"{path}: no such file, and no line before writes it")
    if command in ("prepare", "reward", "estimate") or flag in OUTPUTS:
        return
    if path.is_dir():
        if flag != "teacher":  # of which only the tokenizer is used
            Chat.from_pretrained(path, think)
        Transformer.from_pretrained(path, device="meta")
    elif path.is_file():  # a pipe can be read only once
        need = {"rollout": None, "simrl": "a gold answer", "eval": "a gold answer"}.get(command, "an answer")
        for _ in stream_records(path, need=need, limit=limit):
            pass


def check_prompts(path, rollout, training):
    """InputError if a rollout writes a file with other prompts than those that training reads it with."""
    think = ("--think", think_of(rollout), think_of(training))
    for flag, sampled, read in (think, ("--tools", rollout.tools, training.tools)):
        if sampled and read and sampled != read:
            raise InputError(f"{path}: is sampled with {flag} {sampled}, but read with {flag} {read}; "
                             "give both lines the same")


def think_of(stage):
    """--think of a stage's prompts; None if it is the default of a model that is still to be made."""
    folder = Path(getattr(stage, "student", None) or stage.model)
    return stage.think or (Chat.from_pretrained(folder).think if folder.exists() else None)


def is_finished(stage):
    """Whether a command has written its result; InputError if it did so with other flags."""
    out = stage.out
    if stage.command in PAGES:
        return out.is_file()
    is_folder = out.is_dir()
    saved = out / "arguments.json" if is_folder else Path(f"{out}.arguments.json")
    result = out / "summary.json" if is_folder else out
    if Path(f"{out}.part").exists() or not (result.exists() and saved.exists()):
        return False  # the command itself says what is there
    before = read_json(saved)
    now = {name: value for name, value in vars(stage).items() if name in before}
    if isinstance(inputs := before.get("inputs"), dict):
        now["inputs"] = inputs | hash_files(inputs)  # a file that was deleted since counts as unchanged
    remedy = f"use its flags, or remove {out} to run that line again"
    refuse_changes(f"{out}: was made with", before, now, remedy)
    return True


def demo_flags(parser):
    add = parser.add_argument
    add("--out", default="runs/demo", help="folder for everything the demo writes")
    add("--quick", action="store_true", help="a few steps only: shows the stages, teaches little")
    add("--seed", type=int, default=42, help="random seed")
    add("--resume", action="store_true", help=RESUME)


def run_demo(args):
    """STAR on the bundled models: score teacher and student, distil (CKD), refine (Sim-RL), score again."""
    refuse_existing(Path(args.out), args.resume)
    machine = f"--device cpu --dtype float32 --seed {args.seed}"
    tiny = shlex.quote(os.path.relpath(Path(__file__).parents[1] / "data/tiny"))
    lengths = QUICK if args.quick else FULL
    text = DEMO.replace("{eval}", EVAL)
    return split_lines(text.format(tiny=tiny, out=shlex.quote(args.out), machine=machine, **lengths))


def table_flags(parser):
    parser.add_argument("evals", nargs="+", metavar="EVAL", help="--out of an eval; all of the same records")


def run_table(args):
    """Show the scores of several evaluations side by side, and three requests with all answers."""
    folders = [Path(folder) for folder in args.evals]
    names = [folder.name for folder in folders]
    scores = [read_scores(folder) for folder in folders]
    answers = [read_rows(folder / "generations.jsonl", scored=True) for folder in folders]
    for folder, rows in zip(folders, answers):
        if list(map(identity, rows)) != list(map(identity, answers[0])):
            raise InputError(f"{folder}: is of other records than {folders[0]}; use the same --data and --limit")
    print_examples(names, answers)
    heads = list(dict.fromkeys(head for row in scores for head in row))
    table = [[name, *(row.get(head, "") for head in heads)] for name, row in zip(names, scores)]
    print()
    print_table([["", *heads], *table])


def read_scores(folder):
    """{measure: mean} of an evaluation, and the seconds of the run that made its model; as text."""
    remedy = "give the --out folder of a finished eval"
    summary = read_json(folder / "summary.json", remedy)
    metrics = check_fields(summary, EVALUATION, folder / "summary.json", remedy, needed=True)["metrics"]
    pass_n = [name for name in metrics if name.startswith("pass@") and name != "pass@1"]
    scores = {name: f"{metrics[name]['mean']:.3f}" for name in (*COLUMNS, *pass_n) if name in metrics}
    run = Path(summary["model"]).parent / "summary.json"
    if run.exists():
        summary = read_json(run)
        seconds = {name: "a number" for name in summary if name.startswith("seconds")}
        check_fields(summary, seconds, run, "run it again", needed=True)
        scores["seconds"] = f"{seconds_in(summary):.0f}"
    return scores


def print_examples(names, answers, most=3):
    """Print requests for calls that the last model answers exactly and another does not, with all answers."""
    for record, *others in zip(*answers):
        greedy = [one["responses"][0] for one in (record, *others)]
        right = [response["exact"] for response in greedy]
        if most and record["answer"]["tool_calls"] and right[-1] and not all(right):
            most -= 1
            request = record["messages"][-1]["content"]
            print(f"\n{'request':14s}  {one_line(request)}")
            for name, response in zip(names, greedy):
                mark = "right" if response["exact"] else "wrong"
                print(f"{name:14s}  {mark}  {one_line(response['text'])}")

"""The claims T1 to T13 about the paper, each tested on small models: writes tests/findings.md.

    python tests/findings.py --make-pair     a teacher and a student of both call syntaxes (7 minutes)
    python tests/findings.py                 every claim, with three seeds; continues a stopped run
    python tests/findings.py T3 T5           these claims only; writes findings.md below --out instead
    python tests/findings.py demo            the demo with three seeds instead: demo.md

The pair starts from the models of data/tiny and learns to think in a line first (in one of four wordings, so that the
teacher is unsure), and to write calls as JSON or as Python, whichever the system line asks for. Careless annotators
(`sloppy_calls`) wrote three in ten of the teacher's answers and seven in ten of the student's, in both syntaxes.

All training after that is on JSON. Every model is scored on the same 640 requests with unseen values in both syntaxes:
"JSON" is the training format, "Python" the shifted one. A Python answer is read by `ast`, never run, and scored by the
same reward. Each distillation has the same number of updates, and so has each Sim-RL run.

A figure is the mean over the seeds of a paired difference. Its half width (95 %) adds the error over seeds, with Student's
t, to that over the requests; an effect of 1.7 times the half width would be found nine times in ten. "+" and "-" are the
sign that the claim predicts, ">=" means not more than 0.02 lower. An effect is confirmed if its interval lies on that side,
contradicted if it lies on the other side, else not seen. The intervals are not corrected for their number: of twenty, one
misses by chance.
"""
import argparse
import ast
import json
import math
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import reward  # noqa: E402
from apps.make_tiny import write_records  # noqa: E402
from apps.evaluate import INTERVAL, compare, metric_values, record_metrics  # noqa: E402
from ckd import DIVERGENCES, ckd_loss  # noqa: E402
from data import seconds_in, write_lines  # noqa: E402
from data.chat import Chat  # noqa: E402
from data.records import read_lines  # noqa: E402
from data.rollouts import score_response  # noqa: E402
from data.runs import read_metrics  # noqa: E402

TINY = ROOT / "data/tiny"
SEEDS = (0, 1, 2)
PROMPTS, ROLLOUTS = (50, 200, 800), (1, 2, 8)
MACHINE = "--think on --device cpu --dtype float32"
SFT = f"--optimiser muon --share-prefix 8 --batch-size 96 --micro-batch-tokens 4096 --hold-out 32 --samples 0 {MACHINE}"
SAMPLE = f"--max-concurrent 512 --max-new-tokens 160 {MACHINE}"
KD = f"--k 4 --m 4 --optimiser muon --lr 1e-3 --steps 40 --batch-size 64 --micro-batch-tokens 4096 --samples 0 {MACHINE}"
RL = (f"--optimiser muon --lr 1e-4 --steps 30 --prompts-per-step 16 --batch-size 64 --max-concurrent 256 "
      f"--max-new-tokens 160 --micro-batch-tokens 4096 {MACHINE}")
OBJECTIVES = {
    "ce": "--objective ce", "fkl": "--objective fkl", "rkl": "--objective rkl", "akl": "--objective akl",
    "rskd": "--objective rskd", "ckd": "--objective ckd", "ckd lambda=1": "--objective ckd --tail-weight 1",
    "ckd k=1": "--objective ckd --k 1 --m 1", "ckd k=32": "--objective ckd --k 32 --m 32",
}
RL_OPTIONS = {"sim-rl": "", "binary": "--reward binary", "no filter": "--filter none"}
SYSTEM = {"json": "Write calls as JSON.", "python": "Write calls as Python."}

# ---------------------------------------------------------------------------------------------------------------------
# The two syntaxes

def in_syntax(record, syntax):
    """A record that asks for a syntax in its system line and is answered in it; Python calls are a text reply."""
    messages = [{"role": "system", "content": SYSTEM[syntax]}, *record["messages"]]
    answer = record["answer"]
    if syntax == "python" and answer["tool_calls"]:
        answer = answer | {"tool_calls": [], "content": write_python(answer["tool_calls"])}
    return record | {"messages": messages, "answer": answer}


def write_python(calls):
    """
    >>> write_python([{"name": "brew", "arguments": {"kind": "tea", "cups": 2, "sweet": True}}])
    '[brew(kind="tea", cups=2, sweet=True)]'
    """
    texts = []
    for call in calls:
        arguments = [f"{name}={json.dumps(value) if isinstance(value, str) else value}"
                     for name, value in call["arguments"].items()]
        texts.append(f"{call['name']}({', '.join(arguments)})")
    return f"[{', '.join(texts)}]"


def python_as_json(text):
    """A response with Python calls, rewritten with <tool_call> blocks; without any, as text (JSON calls count as text).

    >>> python_as_json("<think>x</think>[brew(cups=2)]<|im_end|>")
    '<think>x</think>\\n\\n<tool_call>\\n{"name": "brew", "arguments": {"cups": 2}}\\n</tool_call>'
    """
    thought, tag, answer = text.rpartition("</think>")
    try:
        tree = ast.parse(answer.replace("<|im_end|>", "").strip(), mode="eval").body
        calls = [{"name": call.func.id, "arguments": {k.arg: ast.literal_eval(k.value) for k in call.keywords}}
                 for call in tree.elts if not call.args]
        blocks = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls]
        if len(calls) < len(tree.elts):  # positional arguments have no names
            blocks = []
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        blocks = []
    return thought + tag + "\n\n" + "\n".join(blocks) if blocks else text.replace("<tool_call>", "")


def write_split(path, source, syntaxes):
    """The records of a file in one syntax, or in each of several by turns (per list of tools)."""
    lines = []
    number = 0  # of the list of tools
    last = None
    for line in texts(source):
        record = json.loads(line)
        number += record["tools"] != last
        last = record["tools"]
        lines.append(json.dumps(in_syntax(record, syntaxes[number % len(syntaxes)])) + "\n")
    write_lines(path, lines)


def make_pair(out):
    """Train the teacher and the student of both syntaxes."""
    for name, sloppy, seed, steps in (("teacher", 0.3, 5, 400), ("student", 0.7, 6, 400)):
        records = out / f"{name}-records.jsonl.gz"
        if not records.exists():
            plain = out / f"{name}-plain.jsonl.gz"
            write_records(plain, steps * 12, seed, reasoning=1.0, sloppy=sloppy)
            write_split(records, plain, ("json", "python"))
        (out / f"{name}.txt").write_text(
            f"sft --model {TINY / name} --data {records} --steps {steps} --lr 2e-3 {SFT} --out {out / name}\n")
    run_plans([out / "teacher.txt", out / "student.txt"])


def write_inputs(out):
    """Prompts to distil and refine with (JSON), and 640 requests with unseen values in both syntaxes."""
    for split, count, seed in (("train", 3_200, 11), ("values", 640, 12)):
        plain = out / f"{split}.jsonl.gz"
        write_records(plain, count, seed, split, shared=1, reasoning=1.0)
        for syntax in ("json", "python")[:1 if split == "train" else 2]:
            write_split(out / f"{split}-{syntax}.jsonl.gz", plain, (syntax,))


# ---------------------------------------------------------------------------------------------------------------------
# The runs. A model's name is its recipe: "student", "teacher", one of OBJECTIVES, "ckd refined" (its teacher was refined
# by Sim-RL), an objective on prompts x rollouts ("ce on 50x1", else 200x8), and each of these + one of RL_OPTIONS.

def folder_of(model):
    return model.replace(" + ", "+").replace(" ", "-")


def plan(out, pair, seed, models):
    """The command lines that make and score the models with one seed, each after what it needs."""
    home = out / f"seed-{seed}"
    lines = {}  # {what it makes: command line}

    def model_path(name):
        return pair / name / "model" if name in ("teacher", "student") else home / folder_of(name) / "model"

    def rollouts(teacher, count):
        path = home / f"{folder_of(teacher)}-x{count}.jsonl"
        lines[path] = (f"rollout --model {model_path(teacher)} --data {out}/train-json.jsonl.gz --limit 800 "
                       f"--n {count} {SAMPLE} --keep-all --seed {seed} --out {path}")
        return path

    def make(name):
        if name in ("teacher", "student") or name in lines:
            return
        base, _, option = name.rpartition(" + ")
        if option in RL_OPTIONS:
            make(base)
            lines[name] = (f"simrl --model {model_path(base)} --data {out}/train-json.jsonl.gz {RL} "
                           f"{RL_OPTIONS[option]} --seed {seed} --out {home / folder_of(name)}")
            return
        objective, _, cell = name.partition(" on ")
        teacher = "teacher"
        if objective == "ckd refined":
            objective, teacher = "ckd", "teacher + sim-rl"
            make(teacher)
        prompts, count = (cell or "200x8").split("x")
        data = rollouts(teacher, count)
        lines[name] = (f"ckd --teacher {model_path(teacher)} --student {model_path('student')} --data {data} "
                       f"--limit {prompts} {KD} "
                       f"{OBJECTIVES[objective]} --hold-out 0 --valid {out}/values-json.jsonl.gz --valid-limit 200 "
                       f"--valid-every 40 --seed {seed} --out {home / folder_of(name)}")

    for name in sorted(models, key=lambda name: " on " in name):  # the grid last
        make(name)
        n = 0 if " on " in name else 4
        for syntax, samples in (("json", n), ("python", 0)):
            scores = home / "scores" / f"{folder_of(name)}-{syntax}"
            lines[scores] = (f"eval --model {model_path(name)} --data {out}/values-{syntax}.jsonl.gz --n {samples} "
                             f"{SAMPLE} --seed 7 --out {scores}")
    return list(lines.values())


def run_plans(files):
    """Run lists of command lines side by side, one thread each; the output goes to FILE.log."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    total = sum(len(file.read_text().splitlines()) for file in files)
    running = {}
    for file in files:
        command = [sys.executable, str(ROOT / "star.py"), "curriculum", str(file), "--resume"]
        with open(file.with_suffix(".log"), "a") as log:
            running[file] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    with tqdm(total=total, unit="command") as bar:
        while running:
            time.sleep(2)
            for file, process in list(running.items()):
                if process.poll() is not None:
                    del running[file]
                    if process.returncode:
                        for other in running.values():
                            other.terminate()
                        sys.exit(f"{file}: stopped; the reason is at the end of {file.with_suffix('.log')}")
            started = sum(file.with_suffix(".log").read_text().count("\n$ python star.py ") for file in files)
            bar.update(min(started, total) - bar.n)


# ---------------------------------------------------------------------------------------------------------------------
# Figures

T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36}  # Student's t by degrees of freedom
chats = cache(Chat.from_pretrained)


@cache
def read_scores(out, seed, model, syntax):
    """{metric: {record id: value}} of a scored model; Python answers are scored as the JSON calls that they stand for."""
    folder = out / f"seed-{seed}" / "scores" / f"{folder_of(model)}-{syntax}"
    gold = {}
    if syntax == "python":
        gold = {record["id"]: record for record in map(json.loads, texts(out / "values-json.jsonl.gz"))}
    chat = chats(TINY / "student", think="on")
    scores = {}
    for row in map(json.loads, texts(folder / "generations.jsonl")):
        if gold:
            row["answer"] = gold[row["id"]]["answer"]
            for response in row["responses"]:
                response |= score_response(chat, gold[row["id"]], python_as_json(response["text"]))
        for metric, value in record_metrics(row).items():
            scores.setdefault(metric, {})[row["id"]] = value
    return scores


def texts(path):
    return (line for _, line in read_lines(path))


def run_metric(out, seed, model, name):
    """A figure of a run: the last value of a validation metric, else the mean over the steps."""
    values = [row[name] for row in read_metrics(out / f"seed-{seed}" / folder_of(model)) if name in row]
    return values[-1] if name.startswith("valid_") else float(np.mean(values))


def effect(out, seeds, weights, metric, syntax="json"):
    """(mean, half width of the 95 % interval) of a weighted sum of models' figures, paired by seed and record.

    weights: {model: weight}, such as {"ckd": 1, "ce": -1}
    metric: of `record_metrics`, or "run NAME" of metrics.jsonl, which has no records
    syntax: "json", "python", or "both" for Python less JSON
    """
    if metric.startswith("run "):
        rows = [[sum(w * run_metric(out, seed, model, metric[4:]) for model, w in weights.items())] for seed in seeds]
    else:
        rows = []
        if syntax == "both":
            weights = {(model, name): w * sign for model, w in weights.items()
                       for name, sign in (("python", 1), ("json", -1))}
        else:
            weights = {(model, syntax): w for model, w in weights.items()}
        for seed in seeds:
            scores = {key: read_scores(out, seed, *key)[metric] for key in weights}
            ids = sorted(set.intersection(*map(set, scores.values())))
            rows.append([sum(w * scores[key][i] for key, w in weights.items()) for i in ids])
    values = np.array(rows)  # [seeds, records]
    by_seed = values.mean(1)
    by_record = values.mean(0)
    half = math.inf  # one seed says nothing about others
    if len(seeds) > 1:
        half = T_975[len(seeds) - 1] * by_seed.std(ddof=1) / math.sqrt(len(seeds))
    if len(by_record) > 1:
        half = math.hypot(half, 1.96 * by_record.std(ddof=1) / math.sqrt(len(by_record)))
    return float(values.mean()), float(half)


MARGIN = 0.02


def verdict_of(expected, mean, half):
    """expected: "+" or "-", the sign that the claim predicts; ">=": not below 0 by more than MARGIN; "": none."""
    if expected == ">=":
        return "confirmed" if mean - half > -MARGIN else "contradicted" if mean + half < -MARGIN else "not seen"
    if not expected:
        return ""
    sign = 1 if expected == "+" else -1
    if sign * mean - half > 0:
        return "confirmed"
    return "contradicted" if sign * mean + half < 0 else "not seen"


# ---------------------------------------------------------------------------------------------------------------------
# The claims. An effect is (what it is, expected sign, {model: weight}, metric, syntax).

def minus(a, b, metric, expected, syntax="json"):
    """The effect a - b."""
    return (f"{metric.removeprefix('run ')}: {a} − {b}", expected, {a: 1, b: -1}, metric, syntax)


def gain(a, b, metric, expected, syntax="json"):
    """What Sim-RL adds to a, less what it adds to b."""
    weights = {f"{a} + sim-rl": 1, a: -1, f"{b} + sim-rl": -1, b: 1}
    return (f"{metric}: gain from Sim-RL, {a} − {b}", expected, weights, metric, syntax)


def both(make, a, b, metric, expected):
    """An effect in the training syntax and in the shifted one."""
    return [make(a, b, metric, expected), make(a, b, metric, expected, "python")]


EXACT = "exact calls"
CLAIMS = {
    "T3": (
        "The tail penalty cuts confident mistakes (S′), raises the policy's entropy, and does not cost Pass@k.",
        "λ in {0, 1, 10}; S′ along 200 held-out gold answers after the last step; entropy and pass@4 of samples.",
        [minus("ckd", "fkl", "run valid_tail", "-"), minus("ckd lambda=1", "fkl", "run valid_tail", "-"),
         minus("ckd", "fkl", "entropy", "+"), minus("ckd", "fkl", "pass@4", ">="),
         *both(minus, "ckd", "fkl", EXACT, ""), *both(minus, "ckd lambda=1", "fkl", EXACT, "")],
        "qualitative"),
    "T4": (
        "A student distilled by RKL or AKL has less entropy, and gains less from RL, than one distilled by FKL.",
        "The same Sim-RL from each student.",
        [minus("rkl", "fkl", "entropy", "-"), minus("akl", "fkl", "entropy", "-"),
         *both(gain, "rkl", "fkl", EXACT, "-"), *both(gain, "akl", "fkl", EXACT, "-")],
        "gains on BFCL: FKL +1.95, RKL +1.23, AKL +0.82; on ACEBench +13.2, +6.0, +4.8"),
    "T5": (
        "Distillation beats cross-entropy on the same answers, and more so out of the training format.",
        "CKD and cross-entropy with equal updates, for 50, 200 and 800 prompts with 1, 2 and 8 answers each.",
        [*both(minus, "ckd", "ce", EXACT, "+"), *both(minus, "fkl", "ce", EXACT, "+"),
         ("exact calls: ckd − ce, python less json", "+", {"ckd": 1, "ce": -1}, EXACT, "both"),
         *both(minus, "ce", "student", EXACT, ""), *both(minus, "ckd", "student", EXACT, ""),
         *[row for p in PROMPTS for n in ROLLOUTS if (p, n) != (200, 8)
           for row in both(minus, f"ckd on {p}x{n}", f"ce on {p}x{n}", EXACT, "+")]],
        "CKD − SFT-think: BFCL 49.6 − 47.6; CKD − CE: ACEBench 39.0 − 28.7, where SFT without reasoning has 2.1"),
    "T6": (
        "After RL the order is CKD ≥ FKL > RSKD, CE > RKL.",
        "The same Sim-RL from each student.",
        [*both(minus, "ckd + sim-rl", "fkl + sim-rl", EXACT, ">="),
         *both(minus, "rskd", "fkl", EXACT, ""),
         *[row for b in ("rskd", "ce") for row in both(minus, "fkl + sim-rl", f"{b} + sim-rl", EXACT, "+")],
         *[row for a in ("rskd", "ce") for row in both(minus, f"{a} + sim-rl", "rkl + sim-rl", EXACT, "+")],
         *[row for b in ("rskd", "ce", "rkl") for row in both(minus, "ckd + sim-rl", f"{b} + sim-rl", EXACT, "+")]],
        "BFCL 51.70, 51.46, 50.65, 50.41, 50.49; ACEBench 53.0, 50.0, 49.8, 38.9, 41.3"),
    "T7": (
        "The similarity reward beats a binary one.",
        "Sim-RL from the CKD student with either reward; 'signal' is the share of groups with a learning signal.",
        [minus("ckd + sim-rl", "ckd + binary", "run signal", "+"),
         *both(minus, "ckd + sim-rl", "ckd + binary", EXACT, "+"),
         *both(minus, "ckd + sim-rl", "ckd + binary", "reward", "+")],
        "BFCL 51.70 − 51.05, ACEBench 53.0 − 35.7"),
    "T8": (
        "RL from a distilled student beats RL from the student as it is.",
        "The same Sim-RL from the student, the CE and the CKD student.",
        [*both(minus, "ckd + sim-rl", "student + sim-rl", EXACT, "+"),
         *both(minus, "ce + sim-rl", "student + sim-rl", EXACT, "+"),
         minus("ckd + sim-rl", "student + sim-rl", "pass@4", "+"),
         minus("student + sim-rl", "student", "pass@1", ""), minus("student + sim-rl", "student", "pass@4", ""),
         minus("ckd + sim-rl", "ckd", "pass@1", ""), minus("ckd + sim-rl", "ckd", "pass@4", "")],
        "BFCL 51.70 − 49.35"),
    "T9": (
        "A k that is too small hurts after RL; a large k tends to plain FKL.",
        "k in {1, 4, 32}; their captured mass is in the rows below.",
        [*[(f"P, mass in V_k of {model}", "", {model: 1}, "run valid_captured", "json")
           for model in ("ckd k=1", "ckd", "ckd k=32")],
         *both(minus, "ckd + sim-rl", "ckd k=1 + sim-rl", EXACT, "+"),
         *both(minus, "ckd", "ckd k=1", EXACT, "+"),
         *both(minus, "ckd + sim-rl", "ckd k=32 + sim-rl", EXACT, ""), minus("ckd k=32", "fkl", EXACT, "")],
        "after RL, k = 10, 100, 1000: BFCL 51.48, 51.70, 51.59; ACEBench 49.2, 53.0, 52.2"),
    "T10": (
        "A teacher refined by Sim-RL is a better teacher.",
        "CKD from the answers and logits of the teacher, and of the teacher after Sim-RL.",
        [*both(minus, "ckd refined", "ckd", EXACT, "+"), minus("ckd refined", "ckd", "reward", "+"),
         minus("ckd refined", "ckd", "reward at T = 1", ""),
         *both(minus, "teacher + sim-rl", "teacher", EXACT, ""),
         minus("teacher + sim-rl", "teacher", "reward at T = 1", "")],
        "qualitative"),
    "T11": (
        "Dropping groups without a learning signal helps, or only saves compute.",
        "Sim-RL from the CKD student with and without the filter, equal numbers of prompts trained on.",
        [*both(minus, "ckd + sim-rl", "ckd + no filter", EXACT, ""),
         minus("ckd + sim-rl", "ckd + no filter", "reward at T = 1", "+"),
         minus("ckd + sim-rl", "ckd + no filter", "run groups_drawn", "")],
        "none"),
    "T13": (
        "Training does not spoil the handling of irrelevant tools.",
        "Correct refusals, before and after each stage.",
        [minus("ce", "student", "correct refusals", ">="), minus("ckd", "student", "correct refusals", ">="),
         minus("ckd + sim-rl", "ckd", "correct refusals", ">="),
         minus("student + sim-rl", "student", "correct refusals", ">=")],
        "implied irrelevance scores: base 85.0, FKL 81.6, STAR 85.0"),
}


def minimisers():
    """T1: (verdict, sentence). The mass inside V_k to which gradient descent on each loss leads."""
    torch.manual_seed(0)
    teacher = torch.randn(1, 200, dtype=torch.float64).mul(2).log_softmax(-1)  # [1, V]
    log_p, ids = teacher.topk(10)
    P = log_p.exp().sum().item()
    inside = {}
    for name in ("fkl", "rkl"):
        logits = torch.zeros(1, 200, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam([logits], lr=0.1)
        for _ in range(2000):
            optimiser.zero_grad()
            loss, stats = ckd_loss(logits, ids[:, 0], ids, log_p, 10, 0.0, DIVERGENCES[name])
            loss.sum().backward()
            optimiser.step()
        inside[name] = stats["inside"].item()
    ok = abs(inside["rkl"] - P / math.e) < 0.01 and inside["fkl"] > 0.99
    sentence = (f"The teacher has P = {P:.4f} inside V_k. After 2,000 steps the student has {inside['rkl']:.4f} there "
                f"by RKL (P/e = {P / math.e:.4f}) and {inside['fkl']:.4f} by FKL. `test_minimisers` holds both.")
    return "confirmed" if ok else "contradicted", sentence


def gradient_formula():
    """T2: (verdict, sentence). The gradient of the CKD loss against its formula."""
    torch.manual_seed(0)
    worst = 0.0
    for _ in range(100):
        teacher = torch.randn(1, 50, dtype=torch.float64).mul(2).log_softmax(-1)  # [1, V]
        logits = torch.randn(1, 50, dtype=torch.float64).mul(2).requires_grad_()  # [1, V]
        log_p, ids = teacher.topk(8)
        loss, stats = ckd_loss(logits, ids[:, 0], ids, log_p, 8, 10.0)
        gradient, = torch.autograd.grad(loss.sum(), logits)
        q = logits.detach().softmax(-1)  # [1, V]
        top = torch.zeros_like(q).scatter(-1, ids, 1.0)  # [1, V], V_k
        mistakes = torch.zeros_like(q).scatter(-1, q.topk(8).indices, 1.0) * (1 - top)  # [1, V]
        P, S = log_p.exp().sum(), stats["tail"]
        formula = q * (P - 10 * S) - teacher.exp() * top + 10 * q * mistakes
        worst = max(worst, (gradient - formula).abs().max().item())
    sentence = (f"Largest difference over 100 random positions in float64: {worst:.1e}. "
                "`test_ckd_gradient_is_the_formula` holds it, and gradcheck holds the chunked head.")
    return "confirmed" if worst < 1e-12 else "contradicted", sentence


def reward_cases():
    """T12: (verdict, sentence). The reward against the released function's values."""
    rows = [json.loads(line) for line in texts(ROOT / "tests/reward_golden.jsonl.gz")]
    same = 0
    for row in rows:
        result = reward.score(row["prompt"] + row["generation"], row["label"], reward.tools_in(row["prompt"]))
        same += abs(result["reward"] - row["reward"]) < 1e-6
    sentence = (f"{same:,} of {len(rows):,} values of the released function are equal, and `tests/test_reward.py` has a "
                "test for every row of the table of cases: −1 cases, order dependence, the end token, types.")
    return "confirmed" if same == len(rows) else "contradicted", sentence


EXACT_CLAIMS = {
    "T1": ("The truncated reverse KL is ill-posed, the truncated forward KL is not.",
           "Both losses on free logits, V = 200, k = 10, no model.", minimisers),
    "T2": ("The penalty re-balances the gradient as Eqs. 14, 26 and 27 say.",
           "Autograd against the formula.", gradient_formula),
    "T12": ("The reward treats each case as the released function does.",
            "3,000 recorded values, and unit tests.", reward_cases),
}


# ---------------------------------------------------------------------------------------------------------------------
# The demo with several seeds

STAGES = ("teacher", "student", "after-CKD", "after-STAR")
STEPS = (("after-CKD", "student"), ("after-STAR", "after-CKD"), ("after-STAR", "teacher"))


def run_demos(out, seeds):
    """Run `star.py demo` once for each seed, one after the other, with all cores."""
    for seed in seeds:
        folder = out / f"demo-{seed}"
        command = [sys.executable, str(ROOT / "star.py"), "demo", "--seed", str(seed), "--out", str(folder)]
        subprocess.run(command + ["--resume"] * folder.exists(), check=True)


def describe_demos(out, seeds):
    """Markdown: the scores of every stage, what each stage adds, and the reward while Sim-RL trains."""
    folders = {seed: out / f"demo-{seed}" for seed in seeds}
    rows = {seed: {stage: [json.loads(line) for line in texts(folder / "eval" / stage / "generations.jsonl")]
                   for stage in STAGES} for seed, folder in folders.items()}
    metrics = ("exact calls", "reward", "valid calls", "correct refusals", "pass@1", "pass@4", "reward at T = 1", "entropy")
    lines = ["# The demo, several seeds", "", "Mean over the seeds (range).", "",
             f"| | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for stage in STAGES:
        means = {metric: [np.mean(metric_values(rows[seed][stage])[metric]) for seed in seeds] for metric in metrics}
        cells = [f"{np.mean(values):.3f} ({np.ptp(values):.3f})" for values in means.values()]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    lines += ["", "| seed | difference | exact calls | reward |", "|---|---|---|---|"]
    for seed in seeds:
        for stage, before in STEPS:
            paired = compare(rows[seed][stage], rows[seed][before])
            cells = [INTERVAL.replace(":", ":+").format(**paired[metric]) for metric in ("exact calls", "reward")]
            lines.append(f"| {seed} | {stage} − {before} | {' | '.join(cells)} |")
    lines += ["", "| seed | reward of samples in each fifth of Sim-RL | seconds of CKD, Sim-RL |", "|---|---|---|"]
    for seed, folder in folders.items():
        fifths = np.array_split([row["reward"] for row in read_metrics(folder / "star") if "reward" in row], 5)
        seconds = [sum(map(seconds_in, read_metrics(folder / stage))) for stage in ("ckd", "star")]
        means = ", ".join(f"{fifth.mean():.3f}" for fifth in fifths)
        lines.append(f"| {seed} | {means} | {seconds[0]:.0f}, {seconds[1]:.0f} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The report

def describe_claim(out, seeds, name):
    """(verdict, markdown) of a claim."""
    if name in EXACT_CLAIMS:
        claim, test, function = EXACT_CLAIMS[name]
        verdict, figures = function()
        paper = "exact; needs no seeds"
    else:
        claim, test, effects, paper = CLAIMS[name]
        rows = ["| effect | syntax | expected | mean ± half width | |", "|---|---|---|---|---|"]
        verdicts = []
        for title, expected, weights, metric, syntax in effects:
            mean, half = effect(out, seeds, weights, metric, syntax)
            verdict = verdict_of(expected, mean, half)
            verdicts.append(verdict)
            rows.append(f"| {title} | {syntax} | {expected} | {mean:+.4f} ± {half:.4f} | {verdict} |")
        verdicts = [verdict for verdict in verdicts if verdict]
        counts = [f"{verdicts.count(word)} of {len(verdicts)} {word}"
                  for word in ("confirmed", "not seen", "contradicted") if word in verdicts]
        verdict = verdicts[0] if len(counts) == 1 else ", ".join(counts)
        figures = "\n".join(rows)
    text = (f"## {name}\n\n**Claim.** {claim}<br>**Test.** {test}<br>**Paper.** {paper}.<br>**Verdict.** {verdict}.\n\n"
            f"{figures}\n")
    return verdict, text


def describe_models(out, seeds, models):
    """Markdown: the scores of every model, means over the seeds."""
    columns = [(EXACT, "json"), (EXACT, "python"), ("reward", "json"), ("reward", "python"), ("pass@1", "json"),
               ("pass@4", "json"), ("reward at T = 1", "json"), ("entropy", "json"), ("correct refusals", "json")]
    rows = [f"| model | {' | '.join(f'{metric}, {syntax}' for metric, syntax in columns)} |",
            "|---" * (len(columns) + 1) + "|"]
    for model in models:
        cells = []
        for metric, syntax in columns:
            values = [read_scores(out, seed, model, syntax).get(metric, {}) for seed in seeds]
            means = [np.mean(list(one.values())) for one in values if one]
            cells.append(f"{np.mean(means):.3f}" if means else "")
        rows.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(["## Every model", "", "Means over the seeds.", "", *rows, ""])


def draw_findings(out, seeds, path):
    """A picture: CKD less cross-entropy over the grid, and every start before and after Sim-RL, in both syntaxes."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1.4, 1.4))
    for axis, syntax in zip(axes, SYSTEM):
        for n, color in zip(ROLLOUTS, ("#0072b2", "#d55e00", "#009e73")):
            cells = [("ckd", "ce") if (p, n) == (200, 8) else (f"ckd on {p}x{n}", f"ce on {p}x{n}") for p in PROMPTS]
            points = [effect(out, seeds, {ckd: 1, ce: -1}, EXACT, syntax) for ckd, ce in cells]
            means, halves = zip(*points)
            places = [x + (n > 1) * 0.1 + (n > 2) * 0.1 for x in range(len(PROMPTS))]
            axis.errorbar(places, means, halves, fmt="o-", color=color, capsize=3, label=f"answers a prompt: {n}")
        axis.axhline(0, color="gray", lw=1)
        axis.set(xticks=range(len(PROMPTS)), xticklabels=PROMPTS, xlabel="prompts",
                 title=f"CKD − CE, exact calls, {syntax}")
    axes[0].legend(frameon=False)
    starts = ("student", *list(OBJECTIVES)[:6])
    for axis, syntax in zip(axes[2:], SYSTEM):
        for y, start in enumerate(reversed(starts)):
            before, after = (effect(out, seeds, {model: 1}, EXACT, syntax)[0] for model in (start, f"{start} + sim-rl"))
            axis.annotate("", (after, y), (before, y), arrowprops={"arrowstyle": "->", "color": "#0072b2"})
            axis.plot([before, after], [y, y], "o", ms=4, color="#0072b2")
        axis.set(yticks=range(len(starts)), yticklabels=starts[::-1], title=f"before → after Sim-RL, {syntax}",
                 xlabel="exact calls")
    figure.savefig(path, dpi=80)


def write_report(out, seeds, names):
    verdicts = {}
    parts = []
    for name in names:
        verdicts[name], text = describe_claim(out, seeds, name)
        parts.append(text)
    rows = [f"| [{name}](#{name.lower()}) | {(CLAIMS.get(name) or EXACT_CLAIMS[name])[0]} | {verdict} |"
            for name, verdict in verdicts.items()]
    parts.append(describe_models(out, seeds, sorted({model for name in names for model in models_of(name)})))
    head = ["# The paper's claims, tested on small models", "", __doc__.split("\n\n", 2)[2].strip(), "",
            f"Seeds: {', '.join(map(str, seeds))}.", "", "| claim | | verdict |", "|---|---|---|", *rows, ""]
    whole = len(names) == len(CLAIMS) + len(EXACT_CLAIMS)
    path = ROOT / "tests/findings.md" if whole else out / "findings.md"
    if whole:
        draw_findings(out, seeds, path.with_suffix(".png"))
        head += ["![CKD less cross-entropy over prompts and answers; exact calls before and after Sim-RL](findings.png)", ""]
    path.write_text("\n".join([*head, *parts]))
    print("\n".join(rows))
    print(f"wrote {path}")


def models_of(name):
    return [model for row in CLAIMS.get(name, (0, 0, ()))[2] for model in row[2]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = sorted([*CLAIMS, *EXACT_CLAIMS], key=lambda name: int(name[1:]))
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/findings"), help="folder for everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="at most 8")
    parser.add_argument("--make-pair", action="store_true", help="train the two models of two syntaxes into OUT/pair")
    args = parser.parse_args()
    if args.claims == ["demo"]:
        args.out.mkdir(parents=True, exist_ok=True)
        run_demos(args.out, args.seeds)
        page = describe_demos(args.out, args.seeds)
        (args.out / "demo.md").write_text(page)
        return print(page)
    chosen = args.claims or names
    if len(args.seeds) > 8:
        parser.error("--seeds: at most 8")
    if unknown := set(chosen) - set(names):
        parser.error(f"no claim {', '.join(unknown)}; there are {', '.join(names)}")
    pair = args.out / "pair"
    pair.mkdir(parents=True, exist_ok=True)
    if args.make_pair:
        return make_pair(pair)
    models = list(dict.fromkeys(model for name in chosen for model in models_of(name)))
    if models:
        if not (pair / "student/model").exists():
            parser.error(f"{pair}: no models there; make them first: --make-pair")
        if not (args.out / "values-python.jsonl.gz").exists():
            write_inputs(args.out)
        files = []
        for seed in args.seeds:
            files.append(args.out / f"seed-{seed}.txt")
            files[-1].write_text("\n".join(plan(args.out, pair, seed, models)) + "\n")
        run_plans(files)
    write_report(args.out, args.seeds, chosen)


if __name__ == "__main__":
    main()

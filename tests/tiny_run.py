"""What each objective does to the embedded student, over three seeds: the tables of tests/README.md.

    python tests/tiny_run.py --out runs/tiny-table         half an hour on two CPU cores; continues a stopped run

For every seed the teacher answers 6,400 prompts. The student learns from these answers by `ckd` with a tail weight
lambda of 10 and of 1, by `fkl` (no tail penalty) and by `ce`, for the same number of steps on the same sequences.
Sim-RL then refines the `ckd` and the `ce` student. All flags that are not set below are those of the demo. All models
are scored on 250 records with unseen values: greedily, and by eight samples at temperature 1. "Mass outside" is the
student's mass on tokens outside the teacher's top k, on held-out answers of the teacher; "tail" is the part of it that
the penalty sees. "Seconds" are those of the last stage.
"""
import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import star  # noqa: E402
from apps.curriculum import demo_lines, run_all  # noqa: E402
from data import print_table, read_json, write_json  # noqa: E402
from data.chat import Chat  # noqa: E402
from data.groups import make_groups, micro_batches, pack  # noqa: E402
from data.records import read_records  # noqa: E402
from data.runs import read_metrics  # noqa: E402
from model import Transformer  # noqa: E402
from teacher import Teacher  # noqa: E402

TINY = ROOT / "data/tiny"
RESUME = SimpleNamespace(resume=True, overwrite=False)
OBJECTIVES = {  # name in the table: (folder, flags)
    "ckd": ("ckd", "--objective ckd"),
    "fkl": ("fkl", "--objective fkl"),
    "ce": ("ce", "--objective ce"),
    "ckd, lambda 1": ("ckd-1", "--objective ckd --tail-weight 1"),
}
MEASURES = ("exact calls", "reward", "reward at T = 1", "valid calls", "correct refusals", "entropy", "pass@8")


def run(out, command, *flags):
    """Run the demo's command line of this name with other flags, unless it is finished. `flags` override the demo's."""
    line = next(line for line in demo_lines("demo") if line.split()[0] == command)
    words = [*shlex.split(line), *map(str, flags), "--out", str(out)]
    code = run_all([shlex.join(words)], RESUME, star.parse, star.main)
    if code:
        sys.exit(code)


def train_models(out, seed, steps):
    """Roll out, distil and refine with one seed. Returns {name in the table: model folder}."""
    rollouts = out / "rollouts.jsonl"
    train_data = TINY / "train.jsonl.gz"
    run(rollouts, "rollout", "--model", TINY / "teacher", "--data", train_data, "--seed", seed)
    length = ["--steps", steps] if steps else []
    models = {}
    for name, (folder, flags) in OBJECTIVES.items():
        run(out / folder, "ckd", *flags.split(), "--teacher", TINY / "teacher", "--student", TINY / "student",
            "--data", rollouts, "--seed", seed, "--samples", 0, *length)
        models[name] = out / folder / "model"
    for name in ("ckd", "ce"):
        run(out / f"{name}-simrl", "simrl", "--model", models[name], "--data", train_data, "--seed", seed)
        models[f"{name}, Sim-RL"] = out / f"{name}-simrl" / "model"
    return models


def score_model(out, model, rollouts):
    """{measure: value} of a model. Its mass outside comes from a step of CKD at rate 0, which changes nothing."""
    run(out / "eval", "eval", "--model", model, "--data", TINY / "values.jsonl.gz", "--limit", 250, "--seed", 7)
    run(out / "mass", "ckd", "--teacher", TINY / "teacher", "--student", model, "--data", rollouts,
        "--lr", 0, "--steps", 1, "--samples", 0, "--limit", 600)
    metrics = read_json(out / "eval" / "summary.json")["metrics"]
    scores = {name: metrics[name]["mean"] for name in MEASURES}
    before = read_metrics(out / "mass")[0]
    scores |= {"mass outside": 1 - before["valid_inside"], "tail": before["valid_tail"], "KL": before["valid_kl"]}
    summary = {}
    if model.parent != TINY:
        summary = read_json(model.parent / "summary.json")
    scores["seconds"] = sum(value for name, value in summary.items() if name.startswith("seconds"))
    return scores


@torch.no_grad()
def print_top_k_mass(rollouts):
    """Print the mass P of the teacher's top k, over all positions of its answers and over those where it is unsure
    (less than 0.9 on one token)."""
    chat = Chat.from_pretrained(TINY / "teacher")
    teacher = Teacher(Transformer.from_pretrained(TINY / "teacher"), 32, chat.vocab_size)
    groups, _ = make_groups(read_records(rollouts)[:200], chat, 1000, 1000)
    parts = []
    for micro in micro_batches(groups, 4096):
        _, log_p = teacher(pack(micro))
        parts.append(log_p)
    p = torch.cat(parts).exp()  # [N, 32]
    unsure = p[:, 0] < 0.9  # [N]
    rows = [["k", "P", f"P, unsure ({unsure.float().mean():.1%})"]]
    for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        mass = p[:, :k].sum(1)  # [N]
        rows.append([k, f"{mass.mean():.4f}", f"{mass[unsure].mean():.4f}"])
    print()
    print_table(rows)


def print_scores(scores):
    """Print the mean of each measure over the seeds, and its range. scores: {model: [{measure: value} of a seed]}."""
    measures = list(scores["teacher"][0])
    rows = [["mean (max - min) over seeds", *measures]]
    for model, seeds in scores.items():
        cells = []
        for measure in measures:
            values = [seed[measure] for seed in seeds]
            cell = f"{statistics.fmean(values):.3f}"
            if len(values) > 1:
                cell += f" ({max(values) - min(values):.3f})"
            cells.append(cell)
        rows.append([model, *cells])
    print()
    print_table(rows)


def print_mass_over_steps(out, seeds):
    """Print the mass outside during the training, on the answers that each run holds out: means over the seeds."""
    rows = []
    for name, (folder, _) in OBJECTIVES.items():
        values = {}  # {step: one value for each seed}
        for seed in seeds:
            for row in read_metrics(out / f"seed-{seed}" / folder):
                if "valid_inside" in row:
                    values.setdefault(row["step"], []).append(1 - row["valid_inside"])
        rows.append([name, *(f"{statistics.fmean(masses):.4f}" for masses in values.values())])
    print()
    print_table([["mass outside after step", *values], *rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/tiny-table", help="folder for everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of distillation; default: the demo's")
    args = parser.parse_args()
    scores = {}
    for seed in args.seeds:
        out = Path(args.out) / f"seed-{seed}"
        rollouts = out / "rollouts.jsonl"
        models = train_models(out, seed, args.steps)
        if seed == args.seeds[0]:  # the embedded models are scored once
            print_top_k_mass(rollouts)
            models = {"teacher": TINY / "teacher", "student": TINY / "student"} | models
        for name, model in models.items():
            folder = out / "scores" / name.replace(", ", "-").replace(" ", "-")
            scores.setdefault(name, []).append(score_model(folder, model, rollouts))
    write_json(Path(args.out) / "table.json", scores)
    print_scores(scores)
    print_mass_over_steps(Path(args.out), args.seeds)


if __name__ == "__main__":
    main()

"""What each objective does to the shipped student, over three seeds: the two tables in README.md.

    python tests/tiny_run.py --out runs/tiny-table         half an hour on two CPU cores; started again, it goes on

For every seed the teacher answers 6,400 prompts; the student learns from these answers by `ckd`, with the penalty's
weight lambda 10 and 1, by `fkl` (no penalty) and by `ce`, for as many steps on the same sequences; Sim-RL then refines
the `ckd` and the `ce` student. Settings and lengths are those of the demo. All are scored on 250 records with unseen
values: greedily, and by eight samples at temperature 1. "Mass outside" is what a student gives, on held-out teacher
answers, to tokens that are not among the teacher's top k; "tail" is the part of it that the penalty sees; "seconds" are
those of the last stage.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import ckd  # noqa: E402
import star  # noqa: E402
from data import read_json, write_json  # noqa: E402
from data.chat import Chat  # noqa: E402
from data.curriculum import LENGTHS, TINY, TINY_FLAGS  # noqa: E402
from data.groups import make_groups, micro_batches, pack  # noqa: E402
from data.show import columns  # noqa: E402
from data.sources import read_records  # noqa: E402
from model import Transformer  # noqa: E402

OBJECTIVES = {"ckd": "--objective ckd", "fkl": "--objective fkl", "ce": "--objective ce",
              "ckd, lambda 1": "--objective ckd --tail-weight 1"}
FOLDERS = {name: name.replace(", lambda ", "-") for name in OBJECTIVES}
SHOWN = ("exact calls", "reward", "reward at T = 1", "valid calls", "correct refusals", "entropy", "pass@8")
COMMON = ["--device", "cpu", "--dtype", "float32"]


def run(out, stage, *words):
    """One command of star.py, with what the demo gives its stage and then `words`, unless it is done."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if (out / "summary.json").exists() or out.suffix == ".jsonl" and out.exists():
        return
    words = [stage, *TINY_FLAGS[stage].split(), *LENGTHS[stage].split(), *map(str, words), *COMMON, "--out", str(out),
             *["--resume"] * out.exists()]
    print(f"\n$ python star.py {' '.join(words)}\n", flush=True)
    if code := star.main(words):
        sys.exit(code)


def score(out, model):
    """{measure: value} of a model; its mass outside comes from a step of CKD at rate 0, which changes nothing."""
    run(out / "eval", "eval", "--model", model, "--data", TINY / "values.jsonl.gz", "--limit", 250, "--seed", 7)
    run(out / "mass", "ckd", "--teacher", TINY / "teacher", "--student", model, "--data", out.parents[1] /
        "rollouts.jsonl", "--lr", 0, "--steps", 1, "--samples", 0, "--limit", 600)
    metrics = read_json(out / "eval" / "summary.json")["metrics"]
    made = read_json(model.parent / "summary.json") if model.parent != TINY else {}
    with open(out / "mass" / "metrics.jsonl") as file:
        held_out = json.loads(file.readline())
    return {name: metrics[name]["mean"] for name in SHOWN} | {
        "mass outside": 1 - held_out["valid_inside"], "tail": held_out["valid_tail"], "KL": held_out["valid_kl"],
        "seconds": sum(value for key, value in made.items() if key.startswith("seconds"))}


@torch.no_grad()
def captured(rollouts):
    """Print how much of the teacher its k likeliest tokens hold, over all positions of its answers and where it is
    unsure (less than 0.9 on one token)."""
    chat, teacher = Chat.from_pretrained(TINY / "teacher"), Transformer.from_pretrained(TINY / "teacher")
    groups, _ = make_groups(read_records(rollouts)[:200], chat, 1000, 1000)
    log_p = torch.cat([ckd.teacher_log_probs(teacher, pack(micro), 32, chat.vocab_size)[1]
                       for micro in micro_batches(groups, 4096)])  # [N, 32]
    unsure = log_p[:, 0].exp() < 0.9
    print()
    columns([["k", "P", f"P, unsure ({unsure.float().mean():.1%})"]] + [
        [k, *(f"{part[:, :k].exp().sum(1).mean():.4f}" for part in (log_p, log_p[unsure]))]
        for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)])


def over_steps(out, seeds):
    """Print the mass outside while they train, on the answers that each run holds out: means over the seeds."""
    courses = {}  # {objective: {step: one value a seed}}
    for name, folder in FOLDERS.items():
        for seed in seeds:
            with open(out / f"seed-{seed}" / folder / "metrics.jsonl") as file:
                for row in map(json.loads, file):
                    if "valid_inside" in row:
                        courses.setdefault(name, {}).setdefault(row["step"], []).append(1 - row["valid_inside"])
    print()
    columns([["mass outside after step", *courses["ckd"]]] + [
        [name, *(f"{statistics.fmean(values):.4f}" for values in course.values())]
        for name, course in courses.items()])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/tiny-table", help="folder for everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of distillation; default: the demo's")
    args = parser.parse_args()
    found = {}
    for seed in args.seeds:
        out, first = Path(args.out) / f"seed-{seed}", seed == args.seeds[0]
        run(out / "rollouts.jsonl", "rollout", "--model", TINY / "teacher", "--data", TINY / "train.jsonl.gz",
            "--seed", seed)
        models = {"teacher": TINY / "teacher", "student": TINY / "student"} if first else {}
        if first:
            captured(out / "rollouts.jsonl")
        for name, words in OBJECTIVES.items():
            folder = out / FOLDERS[name]
            run(folder, "ckd", *words.split(), "--teacher", TINY / "teacher", "--student", TINY / "student", "--data",
                out / "rollouts.jsonl", "--seed", seed, "--samples", 0, *["--steps", args.steps] * bool(args.steps))
            models[name] = folder / "model"
        for name in ("ckd", "ce"):
            run(out / f"{name}-simrl", "simrl", "--model", models[name], "--data", TINY / "train.jsonl.gz", "--seed",
                seed)
            models[f"{name}, Sim-RL"] = out / f"{name}-simrl" / "model"
        for name, model in models.items():
            found.setdefault(name, []).append(score(out / "scores" / name.replace(", ", "-").replace(" ", "-"), model))
    names = list(found["teacher"][0])
    print()
    columns([["mean (most - least) over seeds", *names]] + [
        [model, *(f"{statistics.fmean(row[name] for row in rows):.3f}" + (
            f" ({max(row[name] for row in rows) - min(row[name] for row in rows):.3f})" if len(rows) > 1 else "")
            for name in names)] for model, rows in found.items()])
    over_steps(Path(args.out), args.seeds)
    write_json(Path(args.out) / "table.json", found)


if __name__ == "__main__":
    main()

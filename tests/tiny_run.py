"""What each objective does to the shipped student, over three seeds: the table in data/tiny/README.md.

    python tests/tiny_run.py --out runs/tiny-table         25 minutes on two CPU cores; started again, it goes on

For every seed the teacher answers 800 prompts four times; the student learns from these answers by `ckd`, by `fkl` (the
same without the tail penalty) and by `ce`, for as many steps on the same sequences; Sim-RL then refines the `ckd` and
the `ce` student. All are scored on 400 records with unseen values: greedily, and by eight samples at temperature 1.
"Mass outside" is what a student gives, on held-out teacher answers, to tokens that are not among the teacher's top k.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import star  # noqa: E402
from data.show import columns  # noqa: E402

TINY = Path(__file__).parents[1] / "data" / "tiny"
SHOWN = ("exact calls", "reward", "reward at T = 1", "valid calls", "correct refusals", "entropy", "pass@8")
COMMON = ["--device", "cpu", "--dtype", "float32"]


def run(out, *words):
    """One command of star.py, unless it is done."""
    if (out / "summary.json").exists() or out.suffix == ".jsonl" and out.exists():
        return
    words = [str(word) for word in (*words, *COMMON, "--out", out)] + ["--resume"] * out.exists()
    print(f"\n$ python star.py {' '.join(words)}\n", flush=True)
    if code := star.main(words):
        sys.exit(code)


def score(out, model):
    """{measure: value} of a model; its mass outside comes from a step of CKD at rate 0, which changes nothing."""
    run(out / "eval", "eval", "--model", model, "--data", TINY / "values.jsonl.gz", "--limit", 400, "--n", 8, "--rows",
        512, "--max-new-tokens", 128, "--seed", 7)
    run(out / "mass", "ckd", "--teacher", TINY / "teacher", "--student", model, "--data", out.parent / "rollouts.jsonl",
        "--lr", 0, "--steps", 1, "--samples", 0, "--hold-out", 64, *K)
    metrics = json.loads((out / "eval" / "summary.json").read_text())["metrics"]
    with open(out / "mass" / "metrics.jsonl") as file:
        held_out = json.loads(file.readline())
    return {name: metrics[name]["mean"] for name in SHOWN} | {
        "mass outside": 1 - held_out["valid_inside"], "S'": held_out["valid_tail"], "KL": held_out["valid_kl"]}


K = ["--k", 8, "--m", 8]
CKD = ["--lr", "2e-3", "--batch", 64, "--steps", 150, "--hold-out", 64, "--valid-every", 25, "--samples", 0, *K]
SIMRL = ["--prompts", 32, "--batch", 128, "--rows", 256, "--steps", 20, "--lr", "5e-4", "--max-new-tokens", 128]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/tiny-table", help="folder for everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    found = {}
    for seed in args.seeds:
        out = Path(args.out) / f"seed-{seed}"
        out.mkdir(parents=True, exist_ok=True)
        run(out / "rollouts.jsonl", "rollout", "--model", TINY / "teacher", "--data", TINY / "train.jsonl.gz",
            "--limit", 800, "--n", 4, "--rows", 512, "--max-new-tokens", 128, "--seed", seed)
        models = {"teacher": TINY / "teacher", "student": TINY / "student"}
        for kind in ("ckd", "fkl", "ce"):
            run(out / kind, "ckd", "--objective", kind, "--teacher", TINY / "teacher", "--student", TINY / "student",
                "--data", out / "rollouts.jsonl", "--seed", seed, *CKD)
            models[kind] = out / kind / "model"
        for kind in ("ckd", "ce"):
            run(out / f"{kind}-simrl", "simrl", "--model", models[kind], "--data", TINY / "train.jsonl.gz", "--seed",
                seed, *SIMRL)
            models[f"{kind}, Sim-RL"] = out / f"{kind}-simrl" / "model"
        for name, model in models.items():
            found.setdefault(name, []).append(score(out / f"score-{name.replace(', ', '-')}", model))
    names = list(found["teacher"][0])
    print()
    columns([["mean (spread) over seeds", *names]] + [
        [model, *(f"{statistics.fmean(row[name] for row in rows):.3f} "
                  f"({max(row[name] for row in rows) - min(row[name] for row in rows):.3f})" for name in names)]
        for model, rows in found.items()])
    (Path(args.out) / "table.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

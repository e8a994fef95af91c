"""Curves of runs as a picture, from their metrics.jsonl. Needs matplotlib, which nothing else here does."""
import json
from pathlib import Path

from data import InputError

NAMES = ("reward", "answer_score", "signal", "format_failures", "length", "valid_kl", "valid_nll", "valid_tail",
         "valid_inside", "loss", "entropy")


def plot(folders, out):
    """Draw what the runs in `folders` logged, one panel a quantity, all runs in each, and write the picture `out`."""
    try:
        import matplotlib
    except ImportError as e:
        raise InputError("plot needs matplotlib: pip install matplotlib") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot
    runs = {}
    for folder in folders:
        try:
            text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as e:
            raise InputError(f"{folder}: no metrics.jsonl; name the --out folder of a run") from e
        runs[folder] = [json.loads(line) for line in text.split("\n")[:-1]]  # a line may be in the writing
    shown = [name for name in NAMES if any(name in row for rows in runs.values() for row in rows)]
    if not shown:
        raise InputError(f"{folders[0]}: nothing is logged yet; wait for a step to end")
    across = min(len(shown), 4)
    down = -(-len(shown) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(3 * across, 2.8 * down), layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown):]:
        axis.set_visible(False)
    for name, axis in zip(shown, axes.flat):
        for folder, rows in runs.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points), label=Path(folder).name, marker="o" if name.startswith("valid_") else None,
                          markersize=3)
        axis.set(title=name.replace("valid_", "held-out "), xlabel="step")
    axes[0][0].legend()
    try:
        figure.savefig(out, dpi=110)
    except ValueError as e:
        raise InputError(f"{out}: {' '.join(str(e).split())}; name a .png") from e

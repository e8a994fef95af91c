"""Curves of runs as a picture, from their metrics.jsonl. Needs matplotlib, which nothing else here does."""
import json
from pathlib import Path

import numpy as np

from data import InputError

# A panel for each of these that any run has: title, name in a row of `read`.
PANELS = (("Reward", "reward"), ("Answer score", "answer_score"), ("Share of groups with signal", "signal"),
          ("Share of broken responses", "format_failures"), ("Response length, tokens", "length"),
          ("KL to the starting model", "kl_start"), ("Share of ratios clipped", "clipped"),
          ("KL to the teacher", "kl"), ("Confident mistakes (S′)", "tail"), ("Mass outside the top k", "outside"),
          ("Negative log-likelihood", "nll"), ("Loss in training", "loss"), ("Entropy", "entropy"))
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # of Okabe and Ito: all see them
STYLE = {"font.size": 13, "axes.titlesize": 14, "axes.titlelocation": "left", "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 2, "lines.markersize": 4}
LONG = 200  # points: a longer curve is smoothed


def plot(folders, out):
    """Draw what the runs in `folders` logged, one panel a quantity, all runs in each, and write the picture `out`.

    A run that has held-out figures shows those; one that has not is dotted where another has.
    """
    try:
        import matplotlib
    except ImportError as e:
        raise InputError("plot needs matplotlib: pip install matplotlib") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot
    runs = {label: read(folder) for label, folder in labels(folders).items()}
    shown = {title: {label: curve(rows, name) for label, rows in runs.items()} for title, name in PANELS}
    shown = {title: curves for title, curves in shown.items() if any(points for points, _ in curves.values())}
    if not shown:
        raise InputError(f"{folders[0]}: nothing is logged yet; wait for a step to end")
    across = min(len(shown), 4 if len(shown) % 4 == 0 else 3)
    down = -(-len(shown) // across)
    colors, mixed = {label: COLORS[i % len(COLORS)] for i, label in enumerate(runs)}, False
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(down, across, figsize=(4.3 * across, 3.1 * down), layout="constrained",
                                       squeeze=False)
        for (title, curves), axis in zip(shown.items(), axes.flat):
            kinds = {held for points, held in curves.values() if points}
            for label, (points, held) in curves.items():
                if points:
                    draw(axis, points, colors[label], "o-" if held else ":" if True in kinds else "-")
            axis.set(title=title + ", held out" * (True in kinds), xlabel="step")
            mixed |= len(kinds) == 2
        for axis in axes.flat[len(shown):]:
            axis.set_visible(False)
        key = [pyplot.Line2D([], [], color=color, label=label) for label, color in colors.items()]
        key += [pyplot.Line2D([], [], color="gray", linestyle=":", label="dotted: in training")] * mixed
        figure.legend(handles=key, ncols=across + 1, frameon=False, loc="outside upper left")
        try:
            figure.savefig(out, dpi=100)
        except ValueError as e:
            raise InputError(f"{out}: {' '.join(str(e).split())}; name a .png") from e
        finally:
            pyplot.close(figure)


def labels(folders):
    """{name: folder}: of each folder's path as much, from its end, as tells it from the others.

    >>> list(labels(["runs/a/ckd", "runs/b/ckd/", "runs/sft"]))
    ['a/ckd', 'b/ckd', 'sft']
    """
    paths = {Path(folder).resolve(): folder for folder in folders}  # one named twice is drawn once
    ends = {path: [Path(*path.parts[-n:]) for n in range(1, len(path.parts) + 1)] for path in paths}
    return {str(next(end for end in ends[path] if sum(end in others for others in ends.values()) == 1)): folder
            for path, folder in paths.items()}


def read(folder):
    """The rows of a run's metrics.jsonl, under names that mean one thing whatever was trained."""
    try:
        text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as e:
        raise InputError(f"{folder}: no metrics.jsonl; name the --out folder of a run") from e
    rows = [json.loads(line) for line in text.split("\n")[:-1]]  # a line may be in the writing
    for row in rows:
        if "reward" in row:  # Sim-RL: its KL is to its own start, and its loss is about 0 whatever happens
            row |= {"kl_start": row.pop("kl")} if "kl" in row else {}
            row.pop("loss", None)
        row |= {name.replace("inside", "outside"): 1 - row[name] for name in ("inside", "valid_inside") if name in row}
    return rows


def curve(rows, name):
    """([(step, value)], whether they are held-out figures): those where there are any."""
    held = any(f"valid_{name}" in row for row in rows)
    name = f"valid_{name}" if held else name
    return [(row["step"], row[name]) for row in rows if name in row], held


def draw(axis, points, color, style):
    """One curve; a long one as a running mean over a fortieth of it, with the raw one faint behind."""
    steps, values = np.array(points, dtype=float).T  # [points] each
    if len(points) <= LONG:
        axis.plot(steps, values, style, color=color)
        return
    axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    window = np.ones(len(points) // 40)
    mean = np.convolve(values, window, "same") / np.convolve(np.ones(len(points)), window, "same")
    axis.plot(steps, mean, style.replace("o", ""), color=color)

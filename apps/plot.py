"""The curves of runs as a picture, from their metrics.jsonl. Needs matplotlib, which nothing else here does."""
import json
import math
import os
from pathlib import Path

import numpy as np

from data import InputError
from data.records import read_lines

# A panel for each of these that any run has: its name in the rows of `read_run`, its title.
PANELS = {
    "reward": "Reward", "greedy_reward": "Reward, held out, greedy",
    "greedy_exact": "Exact answers, held out, greedy", "answer_score": "Answer score",
    "signal": "Share of groups with signal",
    "format_failures": "Share of broken responses",
    "length": "Response length, tokens", "kl_start": "KL to the starting model",
    "clipped": "Share of ratios clipped", "kl": "KL to the teacher",
    "tail": "Confident mistakes (S′)", "outside": "Mass outside the top k",
    "nll": "Negative log-likelihood",
    "loss": "Loss in training", "entropy": "Entropy",
}
# Okabe and Ito's palette, for colour-blind readers too
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLE = {
    "font.size": 13, "axes.titlesize": 14, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "lines.linewidth": 2, "lines.markersize": 4, "legend.frameon": False,
}


def plot_flags(parser):
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="--out folder of a run")
    add("--out", required=True, metavar="FILE.png", help="picture to write")
    add("--story", action="store_true", help="only exact answers and reward on held-out records, one run after the "
        "other, over seconds of training; the runs need --valid-answers (ckd, sft) or --valid (simrl)")
    add("--teacher", metavar="EVAL", help="--out of the teacher's eval, a line in the story")


def run_plot(args):
    """Draw the curves of one or more runs, overlaid, from their metrics.jsonl."""
    # A run's label is its path below the folder that contains all runs.
    parents = [os.path.dirname(os.path.abspath(folder)) for folder in args.runs]
    common = os.path.commonpath(parents)
    runs = {os.path.relpath(folder, common): read_run(folder) for folder in args.runs}
    if args.story:
        draw_story(runs, args.teacher, args.out)
        print(f"wrote {args.out}")
        return
    panels = {PANELS[name]: read_curves(runs, name) for name in PANELS}
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        raise InputError(f"{args.runs[0]}: nothing is logged yet; plot it after its first step")
    draw_picture(panels, list(runs), args.out)
    print(f"wrote {args.out}")


def read_run(folder):
    """The rows of a run's metrics.jsonl, in which a name means the same for every kind of training."""
    try:
        text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as e:
        raise InputError(f"{folder}: no metrics.jsonl; name the --out folder of a run") from e
    lines = text.split("\n")[:-1]  # the last line may be incomplete
    rows = [json.loads(line) for line in lines]
    for row in rows:
        # The KL of Sim-RL is to its starting model, and its loss is about 0 by construction.
        if "reward" in row:
            row.pop("loss", None)
            row["kl_start"] = row.pop("kl", None)
        for name in ("reward", "exact"):  # greedy answers, beside samples at temperature 1
            row[f"greedy_{name}"] = row.pop(f"valid_{name}", None)
        for prefix in ("", "valid_"):
            if f"{prefix}inside" in row:
                row[f"{prefix}outside"] = 1 - row[f"{prefix}inside"]
    return rows


def read_curves(runs, name):
    """{label: (steps, values, held_out)} of the runs with this quantity; held-out values if a run has any.

    A curve of over 200 points becomes a running mean over a fortieth of it.
    """
    curves = {}
    for label, rows in runs.items():
        held_out = any(f"valid_{name}" in row for row in rows)
        key = f"valid_{name}" if held_out else name
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            steps, values = np.array(points, dtype=float).T  # [points] each
            window = np.ones(len(points) // 40 if len(points) > 200 else 1)
            counts = np.convolve(values ** 0, window, "same")
            values = np.convolve(values, window, "same") / counts
            curves[label] = (steps, values, held_out)
    return curves


def new_figure(rows, columns):
    """An empty figure and its axes, in a flat array; InputError without matplotlib."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as e:
        raise InputError("plot needs matplotlib: pip install matplotlib") from e
    rcParams.update(STYLE)
    figure = Figure(figsize=(4.3 * columns, 3.1 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def save_figure(figure, out):
    try:
        figure.savefig(out, dpi=100)
    except ValueError as e:
        raise InputError(f"{out}: {' '.join(str(e).split())}; name a .png") from e


def draw_picture(panels, labels, out):
    """Draw a panel per quantity, a curve per run. Beside held-out curves, a training curve is dotted."""
    columns = min(len(panels), 4 if len(panels) % 4 == 0 else 3)
    figure, axes = new_figure(math.ceil(len(panels) / columns), columns)
    lines = {}  # of the legend
    for axis, (title, curves) in zip(axes, panels.items()):
        in_training = ":" if any(curve[2] for curve in curves.values()) else "-"
        for label, (steps, values, held_out) in curves.items():
            style = "o-" if held_out else in_training
            color = COLORS[labels.index(label) % len(COLORS)]
            lines[label], = axis.plot(steps, values, style, color=color)
            if style == ":":
                lines.setdefault("dotted: in training", lines[label])
        suffix = ", held out" if in_training == ":" else ""
        axis.set(title=title + suffix, xlabel="step")
    for axis in axes[len(panels):]:
        axis.set_visible(False)
    order = [label for label in (*labels, "dotted: in training") if label in lines]
    figure.legend([lines[label] for label in order], order, ncols=columns + 1, loc="outside upper left")
    save_figure(figure, out)


def draw_story(runs, teacher, out):
    """Draw held-out exact answers and reward of greedy answers over the seconds of training of all runs, in order.

    runs: {label: rows of `read_run`}
    teacher: --out of an eval, or None
    """
    answers = []
    if teacher:
        lines = read_lines(Path(teacher) / "generations.jsonl")
        answers = [json.loads(line)["responses"][0] for _, line in lines]
    figure, axes = new_figure(1, 2)
    for axis, name in zip(axes, ("greedy_exact", "greedy_reward")):
        start = 0.0
        for i, (label, rows) in enumerate(runs.items()):
            seconds = np.cumsum([sum(v for key, v in row.items() if key.startswith("seconds")) for row in rows])
            points = [(start + s, row[name]) for s, row in zip(seconds, rows) if row.get(name) is not None]
            if not points:
                raise InputError(f"{label}: has no held-out answers; train it with --valid-answers or --valid")
            axis.plot(*zip(*points), "o-", color=COLORS[i % len(COLORS)])
            axis.axvspan(start, start + seconds[-1], color=COLORS[i % len(COLORS)], alpha=0.12, label=label)
            start += seconds[-1]
        if answers:
            mean = np.mean([answer[name.removeprefix("greedy_")] for answer in answers])
            axis.axhline(mean, color="gray", ls="--", label="teacher")
        axis.set(title=PANELS[name], xlabel="seconds of training")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=4, loc="outside upper left")
    save_figure(figure, out)

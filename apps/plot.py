"""The curves of runs as a picture, from their metrics.jsonl. Needs matplotlib, which nothing else here does."""
import math
import os
from pathlib import Path

import numpy as np

from data import InputError, seconds_in
from data.rollouts import read_rows
from data.runs import read_metrics

# A panel for each of these that any run has: its name in the rows of `read_run`, its title.
PANELS = {
    "reward": "Reward", "greedy_reward": "Reward, held out, greedy",
    "greedy_exact": "Exact answers, held out, greedy", "answer_score": "Answer score",
    "signal": "Share of groups with signal", "format_failures": "Share of format failures",
    "length": "Response length, tokens", "kl_start": "KL to the starting model",
    "clipped": "Share of ratios clipped", "kl": "KL to the teacher",
    "tail": "Confident mistakes (S′)", "outside": "Mass outside the top k", "nll": "Negative log-likelihood",
    "loss": "Loss in training", "entropy": "Entropy", "memory_gb": "Memory in use, GB",
}
STORY = ("greedy_exact", "greedy_reward")
# Okabe and Ito's palette, for colour-blind readers too
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLE = {
    "font.size": 13, "axes.titlesize": 14, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "lines.linewidth": 2, "lines.markersize": 4, "legend.frameon": False,
}


def plot_flags(parser):
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--out folder of a run")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="picture to write")
    parser.add_argument("--story", metavar="EVAL", help="only the scores of held-out greedy answers, over seconds of "
                        "training, one run after the other; EVAL: --out of the teacher's eval, drawn as a line")


def run_plot(args):
    """Draw the curves of one or more runs, overlaid, from their metrics.jsonl."""
    if not Path(args.out).suffix:
        raise InputError(f"{args.out}: is not a picture; give an --out that ends in .png")
    # A run's label is its path below the folder that contains all runs.
    common = os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in args.runs])
    runs = {os.path.relpath(folder, common): read_run(folder) for folder in args.runs}
    names, spans, heights = PANELS, {}, {}
    if args.story:
        names = STORY
        spans = concatenate_runs(runs)
        lines = read_rows(Path(args.story) / "generations.jsonl", scored=True)
        for name in STORY:
            heights[name] = np.mean([line["responses"][0][name.removeprefix("greedy_")] for line in lines])
    panels = {name: curves for name in names if (curves := read_curves(runs, name))}
    if not panels:
        remedy = "plot it after its first step"
        if args.story:
            remedy = "train it with --valid-answers (ckd, sft) or --valid (simrl)"
        raise InputError(f"{args.runs[0]}: nothing is logged yet; {remedy}")
    draw_picture(panels, list(runs), args.out, spans, heights)
    print(f"wrote {args.out}")


def read_run(folder):
    """The rows of a run's metrics.jsonl, in which a name means the same for every kind of training."""
    if not (Path(folder) / "metrics.jsonl").exists():
        raise InputError(f"{folder}: no metrics.jsonl; name the --out folder of a run")
    rows = read_metrics(folder)
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


def concatenate_runs(runs):
    """Make "step" the seconds of training in all runs so far. Returns {label: (first, last second)}."""
    now = 0.0
    spans = {}
    for label, rows in runs.items():
        start = now
        for row in rows:
            now += seconds_in(row)
            row["step"] = now
        spans[label] = (start, now)
    return spans


def read_curves(runs, name):
    """{label: (steps, values, held_out)} of the runs with this quantity; held-out values if a run has any.

    A curve of over 200 points becomes a running mean over a fortieth of it.
    """
    curves = {}
    for label, rows in runs.items():
        held_out = any(f"valid_{name}" in row for row in rows)
        key = f"valid_{name}" if held_out else name
        if points := [(row["step"], row[key]) for row in rows if row.get(key) is not None]:
            steps, values = np.array(points, dtype=float).T  # [points] each
            window = np.ones(len(points) // 40 if len(points) > 200 else 1)
            counts = np.convolve(values ** 0, window, "same")
            values = np.convolve(values, window, "same") / counts
            curves[label] = (steps, values, held_out)
    return curves


def draw_picture(panels, labels, out, spans, heights):
    """Draw a panel per quantity, a curve per run. Beside held-out curves, a training curve is dotted.

    spans, heights: of a story, {label: (first, last second) to shade}, {name: height of the teacher's line}
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as e:
        raise InputError("plot needs matplotlib: pip install matplotlib") from e
    columns = min(len(panels), 4 if len(panels) % 4 == 0 else 3)
    rows = math.ceil(len(panels) / columns)
    colors = {label: COLORS[i % len(COLORS)] for i, label in enumerate(labels)}
    with rc_context(STYLE):
        figure = Figure(figsize=(4.3 * columns, 3.1 * rows), layout="constrained")
        handles = [Line2D([], [], color=colors[name], label=name) for name in labels]
        if spans:
            handles.append(Line2D([], [], color="gray", ls="--", label="teacher"))
        dotted = Line2D([], [], color="gray", ls=":", label="dotted: in training")
        for number, (name, curves) in enumerate(panels.items(), start=1):
            axis = figure.add_subplot(rows, columns, number)
            in_training = ":" if any(curve[2] for curve in curves.values()) else "-"
            for label, (steps, values, held_out) in curves.items():
                style = "o-" if held_out else in_training
                axis.plot(steps, values, style, color=colors[label])
                if style == ":" and dotted not in handles:
                    handles.append(dotted)
            title = PANELS[name] + (", held out" if in_training == ":" else "")
            axis.set(title=title, xlabel="seconds of training" if spans else "step")
            for label, span in spans.items():
                axis.axvspan(*span, color=colors[label], alpha=0.1)
            if name in heights:
                axis.axhline(heights[name], color="gray", ls="--")
        figure.legend(handles=handles, ncols=columns + 1, loc="outside upper left")
        try:
            figure.savefig(out, dpi=100)
        except (ValueError, RuntimeError) as e:  # an unknown format; .pgf without LaTeX
            raise InputError(f"{out}: {' '.join(str(e).split())}; name a .png") from e

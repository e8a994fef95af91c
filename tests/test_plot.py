"""apps/plot.py: which curves are drawn, under which names. Needs matplotlib."""
import json

import numpy as np
import pytest

import star
from data import InputError

pytest.importorskip("matplotlib")
VALID = {"step": 0, "valid_kl": 1.5, "valid_inside": 0.75}
EARLY = {"loss": 2.0, "kl": 1.0, "tail": 0.5, "nll": 3.0, "entropy": 1.0, "inside": 0.5}
LATE = {"loss": 1.0, "kl": 0.5, "tail": 0.1, "nll": 2.0, "entropy": 1.0, "inside": 0.9, "valid_kl": 0.5,
        "valid_inside": 0.875}
CKD = [VALID, {"step": 1} | EARLY, {"step": 2} | EARLY, {"step": 3} | LATE]
SIMRL = [{"step": i, "reward": 0.1 * i, "signal": 0.5, "loss": 0.0, "kl": 0.01, "entropy": 0.5} for i in (1, 2, 3)]


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """A function that draws runs, {folder: rows}: {title: [(steps, values) of each line]}, texts of the legend."""
    from matplotlib.figure import Figure
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))

    def draw(runs, *flags):
        for folder, rows in runs.items():
            (tmp_path / folder).mkdir(parents=True)
            (tmp_path / folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folders = [str(tmp_path / folder) for folder in runs]
        args, run = star.parse(["plot", *folders, "--out", str(tmp_path / "x.png"), *flags])
        run(args)
        figure = figures.pop()
        panels = {}
        for axis in figure.axes:
            if axis.get_visible():
                panels[axis.get_title(loc="left")] = [line.get_data() for line in axis.lines]
        return panels, [text.get_text() for text in figure.legends[0].get_texts()]

    return draw


def test_panels(draw):
    panels, names = draw({"a/ckd": CKD, "b/ckd": CKD[1:3], "simrl": SIMRL})
    assert names == ["a/ckd", "b/ckd", "simrl", "dotted: in training"]  # two folders called ckd are told apart
    assert list(panels) == [
        "Reward", "Share of groups with signal", "KL to the starting model",
        "KL to the teacher, held out", "Confident mistakes (S′)", "Mass outside the top k, held out",
        "Negative log-likelihood", "Loss in training", "Entropy"]
    held_out, training = panels["KL to the teacher, held out"]  # and not Sim-RL's KL
    assert held_out[0].tolist() == [0, 3] and held_out[1].tolist() == [1.5, 0.5] and training[1].tolist() == [1, 1]
    assert panels["Mass outside the top k, held out"][0][1].tolist() == [0.25, 0.125]
    assert len(panels["Loss in training"]) == 2 and len(panels["Entropy"]) == 3  # Sim-RL's loss is 0 by construction
    assert panels["KL to the starting model"][0][1].tolist() == [0.01] * 3


def test_no_dotted_curve_without_a_held_out_one(draw):
    panels, names = draw({"ckd": CKD[1:3]})
    assert names == ["ckd"] and "KL to the teacher" in panels


def test_a_long_curve_is_smoothed_in_place(draw):
    noise = np.random.default_rng(0).normal(size=2000)
    panels, _ = draw({"run": [{"step": i, "entropy": 0.01 * i + x} for i, x in enumerate(noise)]})
    smooth, = panels["Entropy"]
    assert smooth[0].tolist() == list(range(2000))
    assert np.abs(smooth[1] - 0.01 * np.arange(2000))[50:-50].max() < 0.6 < np.abs(noise).max()  # follows the line
    assert abs(smooth[1][0]) < 1 and abs(smooth[1][-1] - 20) < 1  # to both its ends


def test_the_story_puts_runs_one_after_the_other(draw, tmp_path):
    """Held-out answers over the seconds of both runs, the teacher's figure as a line."""
    runs = {"ckd": [{"step": 0, "valid_exact": 0.2, "valid_reward": 0.1},
                    {"step": 1, "seconds": 4.0, "valid_exact": 0.6, "valid_reward": 0.5}],
            "star": [{"step": 0, "valid_exact": 0.6, "valid_reward": 0.5},
                     {"step": 1, "reward": 0.1, "seconds_sampling": 2.0, "seconds_training": 1.0},
                     {"step": 2, "reward": 0.1, "seconds_sampling": 2.0, "seconds_training": 1.0,
                      "valid_exact": 0.9, "valid_reward": 0.8}]}
    answers = [{"exact": True, "reward": 1.0}, {"exact": False, "reward": 0.0}]
    folder = tmp_path / "teacher"
    folder.mkdir()
    sampled = {"text": "", "ids": [], "finish_reason": "stop", "logprob": 0.0, "case": ""}
    record = {"messages": [{"role": "user", "content": "?"}], "answer": {"content": "."}}
    lines = [record | {"responses": [sampled | answer, sampled | answers[0]]} for answer in answers]
    (folder / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    panels, names = draw(runs, "--story", str(folder))
    assert names == ["ckd", "star", "teacher"]
    ckd, star_run, teacher = panels["Exact answers, held out, greedy"]
    assert len(panels) == 2
    assert [list(values) for values in ckd] == [[0, 4], [0.2, 0.6]]
    assert [list(values) for values in star_run] == [[4, 10], [0.6, 0.9]] and list(teacher[1]) == [0.5, 0.5]
    with pytest.raises(InputError, match="--valid-answers"):
        draw({"other": SIMRL}, "--story", str(folder))

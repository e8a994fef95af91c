"""What is shown of a run or a stage at its end: figures, texts cut to one line, tables.

A file of its own rather than data/__init__.py, whose pieces are about files of every kind; these are about a terminal.
"""
import json
from collections import deque
from pathlib import Path


def summary(out, peak_memory_gb):
    """The figures of a whole run, from its metrics.jsonl: a dict, its valid_before and valid_after dicts or None."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    valid = [{k: v for k, v in row.items() if k.startswith("valid_")} for row in rows if "valid_nll" in row]
    seconds, packed = (sum(row[name] for row in trained) for name in ("seconds", "packed_tokens"))
    return {"steps": len(trained), "sequences": sum(row["sequences"] for row in trained),
            "response_tokens": sum(row["tokens"] for row in trained), "packed_tokens": packed,
            "seconds": round(seconds, 1), "tokens_per_s": round(packed / seconds, 1),
            "peak_memory_gb": round(peak_memory_gb, 2),
            "valid_before": valid[0] if valid else None, "valid_after": valid[-1] if valid else None}


def show_run(samples, figures):
    """Print three samples, dicts of texts, and the figures of `summary`, held-out ones as before -> after."""
    for sample in samples[:3]:
        print(*(f"{name:8s} {one_line(value)}" for name, value in sample.items()), "", sep="\n")
    changes = {name.replace("valid_", "held-out "): f"{value:.4f} -> {figures['valid_after'][name]:.4f}"
               for name, value in (figures["valid_before"] or {}).items()}
    table({name: value for name, value in figures.items() if not name.startswith("valid_")} | changes)


def show_groups(path, figures):
    """Print the best and the worst of the last three groups of a samples.jsonl, and a run's figures."""
    with open(path, encoding="utf-8") as file:
        last = deque(file, maxlen=3)
    for group in map(json.loads, last):
        print(f"\ngold     {one_line(group['gold'])}")
        ranked = sorted(group["samples"], key=lambda sample: -sample["reward"])
        for sample in (ranked[0], ranked[-1]):
            print(f"{sample['reward']:<8.2f} {one_line(sample['text'])}")
    print(f"\nEvery sample is in {path}\n")
    table(figures)


def one_line(text):
    """Text on one line and not too long, for the terminal."""
    text = " ".join((text or "").split())
    return text if len(text) <= 160 else text[:157] + "..."


def table(rows):
    """Print {name: value} as two columns."""
    width = max([20, *map(len, rows)])
    for name, value in rows.items():
        print(f"{name:<{width}}  {value:,}" if isinstance(value, (int, float)) else f"{name:<{width}}  {value}")


def columns(rows):
    """Print rows of cells, the first row being the heads, in columns as wide as they need to be."""
    widths = [max(len(str(row[i])) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())

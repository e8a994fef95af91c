"""What is shown of a run or a stage at its end: figures, texts cut to one line, tables.

A file of its own rather than data/__init__.py, whose pieces are about files of every kind; these are about a terminal.
"""
import json
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


def one_line(text):
    """Text on one line and not too long, for the terminal."""
    text = " ".join((text or "").split())
    return text if len(text) <= 160 else text[:157] + "..."


def table(rows):
    """Print {name: value} as two columns."""
    for name, value in rows.items():
        print(f"{name:<20}  {value:,}" if isinstance(value, (int, float)) else f"{name:<20}  {value}")


def columns(rows):
    """Print rows of cells, the first row being the heads, in columns as wide as they need to be."""
    widths = [max(len(str(row[i])) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())

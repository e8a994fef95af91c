"""Files in and out: JSON, JSON lines and folders, written atomically; the one error a user can cause; text tables.

Everything between a file on disk and the tensors a model sees is in this folder. Nothing here needs a model.
"""
import argparse
import fcntl
import gzip
import hashlib
import json
import math
import os
import shutil
from contextlib import contextmanager, nullcontext
from itertools import zip_longest
from pathlib import Path

from tqdm import tqdm

MODEL_FOLDER = "give a whole model folder: config.json, tokenizer.json and *.safetensors"


class InputError(Exception):
    """The user's input cannot be used. The message is one line: file, line number if there is one, and the remedy."""


def read_json(path, remedy="download or copy it again", kind=dict):
    """Return the value in a JSON file; InputError with the remedy if it is missing, broken or not of this kind."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as e:
        raise InputError(f"{path}: no such file; {remedy}") from e
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{e.lineno}: is not JSON ({e.msg}); {remedy}") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: is not UTF-8 text ({e.reason}); {remedy}") from e
    if not isinstance(value, kind):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, not what belongs here; {remedy}")
    return value


def write_json(path, value):
    """Write a JSON file atomically."""
    write_lines(path, [json.dumps(value, indent=2, ensure_ascii=False) + "\n"])


def write_lines(path, lines):
    """Write text lines atomically; compressed, always to the same bytes, if the path ends in .gz."""
    new = Path(f"{path}.tmp")
    zipped = str(path).endswith(".gz")
    try:
        with open(new, "wb") as file:
            sink = gzip.GzipFile("", "wb", 6, file, mtime=0) if zipped else nullcontext(file)
            with sink as stream:
                stream.writelines(line.encode() for line in lines)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)  # if the generator of lines failed, or the disk is full


@contextmanager
def atomic_folder(folder):
    """Yield a temporary folder, which replaces `folder` at the end, or is removed after an error."""
    new = Path(f"{folder}.tmp")
    shutil.rmtree(new, ignore_errors=True)  # left by a killed run
    new.mkdir(parents=True)
    try:
        yield new
        if Path(folder).exists():
            shutil.rmtree(folder)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def fingerprints(paths):
    """{file: hash} of files, and of the files in model folders. Pipes are left out: they can be read only once."""
    files = []
    for path in map(Path, paths):
        inside = sorted(path.iterdir()) if path.is_dir() else []
        files += [file for file in inside if file.suffix in (".json", ".jinja", ".safetensors")] or [path]
    hashes = {}
    for file in tqdm(filter(Path.is_file, files), "check inputs", unit="file", delay=2, leave=False):
        with open(file, "rb") as stream:
            hashes[str(file)] = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    return hashes


def refuse_changes(where, before, now, remedy):
    """InputError that names each setting of `now` whose value in `before` differs, or the input file that has changed."""
    before, now = dict(before), dict(now)
    if unknown := [name for name in now if name not in before]:
        raise InputError(f"{where} another version of this program, without {', '.join(unknown)}; {remedy}")
    inputs, old_inputs = now.pop("inputs", {}), before.pop("inputs", {})
    if changed := [name for name in now if before[name] != now[name]]:
        raise InputError(f"{where} another {' and another '.join(changed)}; {remedy}")
    old_inputs = old_inputs if isinstance(old_inputs, dict) else {}
    if changed := sorted(path for path in old_inputs | inputs if old_inputs.get(path) != inputs.get(path)):
        raise InputError(f"{where} another {' and another '.join(changed)}; bring back what it was, or start again")


held = {}  # {path: file descriptor} of the locks of this process


def hold(path):
    """Lock a file or folder until `release`, or the end of this process. InputError if another one has locked it."""
    path = Path(path).resolve()
    if path in held:
        os.close(held.pop(path))
    file = os.open(path, os.O_RDONLY)
    held[path] = file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise InputError(f"{path}: another process writes there; wait for its end or use another --out") from e
    except OSError:  # some network file systems cannot lock a folder
        pass


def release():
    """Unlock all."""
    while held:
        os.close(held.popitem()[1])


def number(kind, low, high=math.inf):
    """An argparse type: finite numbers from `low` to `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            limit = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {low}{limit}")
        return value

    parse.__name__ = kind.__name__  # for argparse's "invalid int value"
    return parse


positive = number(int, 1)
natural = number(int, 0)
non_negative = number(float, 0.0)


def one_line(text, width=160):
    """Text on one line, cut to `width` characters."""
    text = " ".join((text or "").split())
    return text if len(text) <= width else text[:width - 3] + "..."


def print_table(rows):
    """Print rows of cells in aligned columns."""
    rows = [[f"{cell:,}" if isinstance(cell, (int, float)) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def seconds_in(row):
    """All seconds in a row of metrics.jsonl or in a summary."""
    return sum(value for name, value in row.items() if name.startswith("seconds"))

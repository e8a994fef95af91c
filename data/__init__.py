"""Files in and out: JSON, lines and folders, written atomically; hashes; locks; the one error a user can cause; tables.

What lies between a file on disk and the packed tensors of a batch is in this folder. Nothing here imports the model.
"""
import argparse
import fcntl
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from itertools import zip_longest
from pathlib import Path

from tqdm import tqdm

MODEL_FOLDER = "give a whole model folder (of a run, OUT/model): config.json, tokenizer.json and *.safetensors"


class InputError(Exception):
    """The user's input cannot be used. The message is one line: file, line number if there is one, and the remedy."""


def read_json(path, remedy="download or copy it again", kind=dict):
    """Return the value in a JSON file; InputError with the remedy if it is missing, broken or not of this kind."""
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as e:
        raise InputError(f"{path}: no such file; {remedy}") from e
    return parse_json(data, path, remedy, kind)


def read_optional(path):
    """The object in a JSON file; {} if there is no such file."""
    return read_json(path) if path.exists() else {}


def parse_json(data, where, remedy, kind=dict):
    """Return the value of JSON bytes; InputError with the remedy if they are broken or not of this kind."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
        # It may hold half a surrogate pair, or be nested deeper than can be written again.
        if re.search(rb"\\u[dD][89a-fA-F]", data) or data.count(b"[") + data.count(b"{") > 500:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:  # a UnicodeError is a ValueError
        why = str(e).replace("line 1 column", "column")  # `where` may have a line number
        raise InputError(f"{where}: is not JSON in UTF-8 ({why}); {remedy}") from e
    if not isinstance(value, kind):
        raise InputError(f"{where}: holds a JSON {type(value).__name__}, not what belongs here; {remedy}")
    return value


def write_json(path, value):
    """Write a JSON file atomically."""
    write_lines(path, [json.dumps(value, indent=2, ensure_ascii=False) + "\n"])


def write_lines(path, lines):
    """Write text lines atomically; compressed, always to the same bytes, if the path ends in .gz. Makes its folder."""
    new = Path(f"{path}.star-tmp")
    new.parent.mkdir(parents=True, exist_ok=True)
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
    folder = Path(folder).resolve()  # of a link, what it points to
    new = Path(f"{folder}.star-tmp")
    shutil.rmtree(new, ignore_errors=True)  # left by a killed run
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


hashes = {}  # {(device, number of the file, size, time of change): hash}, of this process


def hash_files(paths):
    """{file: hash} of files, and of the files in model folders. Pipes are left out: they can be read only once."""
    files = []
    for path in map(Path, paths):
        inside = sorted(path.iterdir()) if path.is_dir() else []
        files += [file for file in inside if file.suffix in (".json", ".jinja", ".safetensors")] or [path]
    digests = {}
    for file in tqdm(filter(Path.is_file, files), "hash files", unit="file", delay=2, leave=False,
                     disable=not is_first_rank()):
        status = file.stat()
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if key not in hashes:
            with open(file, "rb") as stream:
                hashes[key] = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
        digests[str(file)] = hashes[key]
    return digests


def hash_by_name(files):
    """{name: hash} of the files that are there, for "hashes" in a JSON file that belongs to them."""
    return {Path(file).name: value for file, value in hash_files(files).items()}


def check_hashes(path, stored, files, flag, remedy):
    """InputError unless files have the hashes in `stored`, the content of the JSON file at `path`.
    flag: the one that names the folder"""
    hashes = stored.get("hashes")
    if not isinstance(hashes, dict):
        raise InputError(f"{path}: has no hashes, so another version has written it; start again with another {flag}")
    now = hash_by_name(files)
    if changed := sorted(name for name in hashes | now if hashes.get(name) != now.get(name)):
        raise InputError(f"{path.parent}: {changed[0]} is not as it was when this was written; {remedy}")


def refuse_changes(where, before, now, remedy):
    """InputError that names each setting of `now` whose value in `before` differs, or the input files that do."""
    if before.get("command") != now.get("command"):
        raise InputError(f"{where} the command {before.get('command')}, not {now.get('command')}; {remedy}")
    if unknown := [name for name in now if name not in before]:
        raise InputError(f"{where} another version of this program, without {', '.join(unknown)}; {remedy}")
    changed = []
    for name in now:
        if name != "inputs" and before[name] != now[name]:
            values = str(before[name]), str(now[name])
            short = max(map(len, values)) <= 60
            changed.append(f"{name} ({values[0]}, now {values[1]})" if short else name)
    if changed:
        raise InputError(f"{where} another {', '.join(changed)}; {remedy}")
    inputs, old_inputs = now.get("inputs", {}), before.get("inputs")
    old_inputs = old_inputs if isinstance(old_inputs, dict) else {}
    if changed := sorted(path for path in old_inputs | inputs if old_inputs.get(path) != inputs.get(path)):
        raise InputError(f"{where} another {', '.join(changed)}; restore that (remove it if it is new), "
                         "or start again")


def refuse_existing(path, resume):
    """InputError if a result exists already and is not to be resumed."""
    if path.exists() and not resume:
        raise InputError(f"{path}: exists already; continue it with --resume, remove it, or use another --out")


locks = {}  # {path: file descriptor}, of this process


def lock(path):
    """Lock a file or folder until `unlock_all`, or the end of this process. InputError if another one has locked it."""
    path = Path(path).resolve()
    if path in locks and os.path.samestat(os.fstat(locks[path]), os.stat(path)):
        return
    if path in locks:  # of a file that this process has replaced
        os.close(locks.pop(path))
    locks[path] = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(locks[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise InputError(f"{path}: another process writes there; wait until it ends, or use another --out") from e
    except OSError as e:  # on some network file systems
        print(f"note: {path} cannot be locked ({e.strerror}); start no second process there", file=sys.stderr)


def unlock_all():
    """Unlock what `lock` has locked."""
    while locks:
        os.close(locks.popitem()[1])


def same(path, other):
    """Whether two paths are the same file or folder, also on a case-insensitive file system."""
    return path.resolve() == other.resolve() or path.exists() and other.exists() and path.samefile(other)


def refuse_overlap(out, inputs):
    """InputError if a file that a command reads is its --out, or would be replaced while that is written."""
    temporary = re.compile(re.escape(Path(out).name) + r"(\.part|\.part\.\d+|\.arguments\.json)?(\.star-tmp)?")
    for path in map(Path, inputs):
        if same(Path(out), path) or temporary.fullmatch(path.name) and same(Path(out).parent, path.parent):
            raise InputError(f"{out}: would be written over {path}, which is read; name another --out")


def number(kind, low, high=math.inf):
    """An argparse type: finite numbers from `low` to `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf or kind is int and value >= 2 ** 63:
            limit = f" and at most {high}" if high < math.inf else " and below 2^63" * (kind is int and value > 0)
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


def several_processes():
    """Whether torchrun has started more than this process; known before the processes have met."""
    return os.environ.get("WORLD_SIZE", "") not in ("", "1")


def is_first_rank():
    """Whether this is the only process, or the first that torchrun started."""
    return not several_processes() or os.environ.get("RANK") == "0"


def refuse_on_all(message, reports=None):
    """Raise an InputError that several ranks raise. One reports it, by default the first of each machine; the others
    end later and without a message, because torchrun stops all ranks when one has ended."""
    if os.environ.get("LOCAL_RANK", "0") == "0" if reports is None else reports:
        raise InputError(message)
    time.sleep(3)
    raise SystemExit(2)


def leave(code):
    """End this rank at once: while an interpreter shuts down, a thread of torch may abort it, even after success."""
    dist = sys.modules.get("torch.distributed")  # not there before a command has started: torch loads slowly
    if not code and dist and dist.is_initialized():
        dist.destroy_process_group()
    with suppress(OSError):  # a full disk; main has said so
        sys.stdout.flush(), sys.stderr.flush()
    os._exit(code or 0)


def seconds_in(row):
    """All seconds in a row of metrics.jsonl or in a summary."""
    return sum(value for name, value in row.items() if name.startswith("seconds"))

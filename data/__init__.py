"""Records, prompts and packed groups: everything between a file on disk and the tensors a model sees, and back."""
import gzip
import json
import os
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

WHOLE_FOLDER = "give a whole model folder: config.json, tokenizer.json and *.safetensors"


class InputError(Exception):
    """What the user gave cannot be used. The message is one line: file, line where there is one, and the remedy.

    `star.py` prints it and exits with code 2; a program that imports these modules may catch it.
    """


def read_json(path, remedy="download or copy it again", kind=dict):
    """What a JSON file holds; InputError with the remedy where it is missing, broken or not of this kind."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as e:
        raise InputError(f"{path}: no such file; {remedy}") from e
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{e.lineno}: is not JSON ({e.msg}); {remedy}") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: is not UTF-8 text ({e.reason}); {remedy}") from e
    if not isinstance(value, kind):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, not what is expected there; {remedy}")
    return value


def write_json(path, value):
    """Write JSON to `path`: there whole, or not at all."""
    write_lines(path, [json.dumps(value, indent=2, ensure_ascii=False) + "\n"])


def write_lines(path, lines):
    """Write text lines beside `path` and rename them into place: a kill leaves the old file or the new one.

    A path that ends in .gz is compressed; the same lines give the same bytes.
    """
    new = Path(f"{path}.tmp")
    try:
        with open(new, "wb") as file, (gzip.GzipFile("", "wb", 6, file, mtime=0) if str(path).endswith(".gz")
                                       else nullcontext(file)) as sink:
            sink.writelines(line.encode() for line in lines)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)  # of a generator that failed, or a full disk


@contextmanager
def whole_folder(folder):
    """A new folder to write into, which takes the place of `folder` at the end, or is gone if that does not come."""
    new = Path(f"{folder}.tmp")
    shutil.rmtree(new, ignore_errors=True)  # what a killed run left
    new.mkdir(parents=True)
    try:
        yield new
        if Path(folder).exists():
            shutil.rmtree(folder)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def refuse_changes(where, before, now, remedy):
    """InputError that names each setting in `now` that is another in `before`."""
    if differing := [name for name in now if before.get(name) != now[name]]:
        raise InputError(f"{where} another {' and another '.join(differing)}; {remedy}")

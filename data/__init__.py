"""Records, prompts and packed groups: everything between a file on disk and the tensors a model sees."""
import json
import os
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
    """Write JSON beside `path` and rename it into place: there whole, or not at all."""
    new = Path(f"{path}.tmp")
    new.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(new, path)

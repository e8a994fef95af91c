"""Files with wrong values, cut or garbled, end in one line that names them, or are read: never in a traceback.

    python tests/test_fuzz.py [N]     N mutations of every kind of file that is read before a run, by default 2,000, and
                                      N / 200 of every file that runs leave for later ones; the tests make a few
"""
import contextlib
import copy
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import star  # noqa: E402
from apps.make_tiny import make_model  # noqa: E402
from conftest import make_record, make_tokenizer, make_world  # noqa: E402
from data import InputError  # noqa: E402
from data.chat import Chat  # noqa: E402
from data.groups import Group, make_groups  # noqa: E402
from data.records import read_records, read_tools  # noqa: E402
from data.rollouts import open_rollouts, prompt_groups, score_response  # noqa: E402
from data.runs import read_metrics  # noqa: E402
from model import Transformer  # noqa: E402
from test_cli import CKD, EVAL, ROLLOUT, SFT, SIMRL, files  # noqa: E402

VALUES = [None, True, 0, -1, 1.5, 1e400, "", "x", "list[int]", "list[...", "a\u2028b", [], [None], ["x"], [{}], {}, {"a": 1},
          {"type": ""}, 10 ** 30]
FIELDS = ["x", "name", "type", "rendered", "source", "reasoning", "responses", "arguments", "enum", "items", "properties"]
ANSWERS = ["", "<tool_call>\n", '<tool_call>\n{"name": "get_weather", "arguments": {"city": 1}}\n</tool_call>', "x</think>y"]


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutate(r, value):
    """A copy of a JSON value with another value in one place, one place gone, or a field more."""
    value = copy.deepcopy(value)
    if not (paths := list(places(value))):
        return value
    *path, last = r.choice(paths)
    at = value
    for key in path:
        at = at[key]
    if r.random() < 0.2:
        del at[last]
    else:
        at[r.choice(FIELDS) if isinstance(at, dict) and r.random() < 0.15 else last] = r.choice(VALUES)
    return value


def garble(r, data):
    """Bytes that are cut, or have another byte somewhere."""
    place = r.randrange(len(data))
    return data[:place] if r.random() < 0.5 else data[:place] + bytes([r.randrange(256)]) + data[place + 1:]


class Files:
    """One small file of every kind in a folder, and for each the function that reads it and all that follows."""

    def __init__(self, folder):
        self.folder = folder
        self.model = folder / "model"
        r = random.Random(0)
        self.records = [make_record(r, number) for number in range(8)]
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        make_model(self.model, make_tokenizer([lines] * 3, 600), 0, hidden=32, layers=2, heads=(2, 1))
        self.chat = Chat.from_pretrained(self.model)
        self.records[0] |= {"rendered": {"think": self.chat.think, "tools": self.chat.tools},
                            "responses": [{"ids": [1, 2, 3], "text": "abc", "finish_reason": "stop", "reward": 0.5}]}
        call = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [
            {"name": "f", "arguments": {"a": 1}}]}
        self.records[1]["messages"][:0] = [{"role": "system", "content": "hi"}, {"role": "user", "content": "a"}, call,
                                           {"role": "tool", "name": "f", "content": "1"}]
        config = self.model / "config.json"
        rope = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
        config.write_text(json.dumps(json.loads(config.read_text()) | rope))
        config = self.model / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": {"content": "<|im_end|>"}}))
        (self.model / "model.safetensors").rename(self.model / "model-1.safetensors")
        index = {"weight_map": {"a": "model-1.safetensors"}}
        (self.model / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "tools.json").write_text(json.dumps(self.records[0]["tools"]))
        (folder / "run").mkdir()
        (folder / "run/metrics.jsonl").write_text("".join(
            json.dumps({"step": step, "loss": 1.0, "seconds": 0.5}) + "\n" for step in (1, 2)))
        (folder / "records.jsonl").write_text(json.dumps(self.records[1]) + "\n")
        response = {"text": "a", "ids": [1], "finish_reason": "stop", "logprob": -0.5}
        self.rows = [{"index": i, "id": record["id"], "responses": [response]}
                     for i, record in enumerate(self.records[:3])]
        (folder / "out.part").write_bytes(self.part(self.rows))
        (folder / "out.arguments.json").write_text('{"seed": 1}')
        chat = lambda: Chat.from_pretrained(self.model)  # noqa: E731
        model = lambda: Transformer.from_pretrained(self.model)  # noqa: E731
        self.json = {"model/config.json": lambda: (model(), chat()), "model/generation_config.json": chat,
                     "model/tokenizer_config.json": chat, "model/model.safetensors.index.json": model,
                     "tools.json": lambda: read_tools(folder / "tools.json")}
        self.bytes = self.json | {"model/tokenizer.json": chat, "model/model-1.safetensors": model,
                                  "records.jsonl": self.read_records, "run/metrics.jsonl": self.read_metrics,
                                  "out.part": self.read_part}

    def part(self, rows):
        """The bytes of a part file of a rollout."""
        return "".join(json.dumps(line) + "\n" for line in rows).encode()

    def read_part(self):
        groups = [Group(record, [], []) for record in self.records]
        open_rollouts(self.folder / "out", groups, {"seed": 1}, resume=True)

    def read_records(self):
        path = self.folder / "records.jsonl"
        for need in ("an answer", None):
            groups, _ = make_groups(read_records(path, need=need, vocab_size=self.chat.vocab_size), self.chat, 5000, 500)
            for group in groups:
                for text in ANSWERS:
                    score_response(self.chat, group.record, text)
        prompt_groups(path, self.chat, 5000)

    def read_metrics(self):
        read_metrics(self.folder / "run")


def attempt(read, path, content):
    """Read a file with this content instead of its own. Returns what went wrong, or None."""
    own = path.read_bytes()
    path.write_bytes(content)
    try:
        read()
    except InputError as e:
        return f"{path.name}: two lines: {e}" if "\n" in str(e) else None
    except Exception as e:  # what this test is about
        at = e.__traceback__
        while at.tb_next and "site-packages" not in at.tb_next.tb_frame.f_code.co_filename:
            at = at.tb_next
        where = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}"
        return f"{path.name}: {type(e).__name__} in {where}: {e}; content {content[:300]!r}"
    finally:
        path.write_bytes(own)


def fuzz(folder, count, seed=0):
    """Yield what went wrong in `count` mutations of every kind of file."""
    files = Files(folder)
    r = random.Random(seed)
    for _ in range(count):
        record = mutate(r, r.choice(files.records))
        record = mutate(r, record) if r.random() < 0.3 else record
        yield attempt(files.read_records, folder / "records.jsonl", json.dumps(record).encode() + b"\n")
        yield attempt(files.read_part, folder / "out.part", files.part(mutate(r, files.rows)))
        for name, read in files.json.items():
            value = mutate(r, json.loads((folder / name).read_text()))
            yield attempt(read, folder / name, json.dumps(value).encode())
        for name, read in files.bytes.items():
            yield attempt(read, folder / name, garble(r, (folder / name).read_bytes()))


TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{% endfor %}"
# A command that finds the files of others: what made them, itself, its --out, and the files that are mutated.
PAIR = {"prompt": "<|im_start|>user\nx", "generation": "<think>\n</think>x", "label": "<think>\n</think>x"}
READERS = {
    "sft": ([f"{SFT} --save-every 1"], f"{SFT} --save-every 1 --resume", "run"),
    "simrl": ([SIMRL], f"{SIMRL} --resume", "run"),
    "ckd": ([f"{CKD} --cache cache --out old"], f"{CKD} --cache cache", "run"),
    "rollout": ([ROLLOUT], f"{ROLLOUT} --resume", "out.jsonl"),
    "eval": ([EVAL], f"{EVAL} --resume", "scores"),
    "compare": ([f"{EVAL} --out old"], f"{EVAL} --compare old", "scores"),
    "table": ([EVAL, f"{EVAL} --model teacher --out other"], "table scores other", "none"),
    "plot": ([f"{SFT} --out old"], "plot old --out x.png", "x.png"),
    "reward": ([], "reward --data pairs.jsonl", "none"),
    "chain": ([SFT], "curriculum chain.txt --resume", "run"),
    "chat template": ([], "eval --model student --data train.jsonl --limit 2 --max-new-tokens 2 --out scores", "scores"),
}


def targets(name):
    """The files that `fuzz_commands` mutates for a reader."""
    if name == "chain":
        return [Path("chain.txt"), Path("run/arguments.json"), Path("run/summary.json")]
    if name == "chat template":
        return [Path("student/chat_template.jinja")]
    names = ("old", "run", "cache", "out.jsonl", "out.jsonl.arguments.json", "scores", "pairs.jsonl")
    files = [file for name in names for file in (Path(name), *sorted(Path(name).rglob("*")))]
    return [file for file in files if file.is_file()]


def mutate_file(r, path):
    """Write a mutation of a file: of one JSON value in it, or of its bytes."""
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    if path.suffix in (".json", ".jsonl") and r.random() < 0.7:
        if path.suffix == ".json":
            return path.write_text(json.dumps(mutate(r, json.loads(data))))
        i = r.randrange(len(lines))
        lines[i] = json.dumps(mutate(r, json.loads(lines[i]))).encode() + b"\n"
        return path.write_bytes(b"".join(lines))
    path.write_bytes(garble(r, data))


def fuzz_commands(world, count=None, seed=0):
    """Yield what went wrong in `count` mutations of every file that commands leave for others; None: one of three."""
    r = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as monkeypatch:
        for name, (before, command, out) in READERS.items():
            folder = Path(temporary) / name
            shutil.copytree(world, folder)
            monkeypatch.chdir(folder)
            if name == "chat template":
                (folder / "student/chat_template.jinja").write_text(TEMPLATE)
            (folder / "pairs.jsonl").write_text(3 * (json.dumps(PAIR) + "\n"))
            (folder / "chain.txt").write_text(f"{SFT}\n")
            for line in before:
                assert call(line)[0] == 0, line
            for stage in ("sft", "simrl"):  # a run that was killed after its last step but one
                if name == stage:
                    shutil.rmtree("run/model")
                    os.remove("run/summary.json")
                    shutil.rmtree(sorted(Path("run/checkpoints").iterdir())[-1])
            state = files(folder)
            for path in targets(name) * count if count else r.choices(targets(name), k=3):
                mutate_file(r, path)
                changed = files(folder)
                code, error = call(command)
                now = files(folder)
                outside = [file for file in now | changed if now.get(file) != changed.get(file)
                           and not file.startswith((out, "old/plot"))]
                lines = [line for line in error.splitlines() if line.startswith("star.py")]
                wrong = code not in (0, 2) or code == 2 and len(lines) != 1 or outside
                yield f"{name}: {path}: code {code}, changed {outside}: {error[-700:]}; content " \
                    f"{changed[str(path)][:300]!r}" if wrong else None
                for file in now.keys() - state.keys():
                    os.remove(file)
                for file, content in state.items():
                    if now.get(file) != content:
                        Path(file).parent.mkdir(parents=True, exist_ok=True)
                        Path(file).write_bytes(content)


def call(command):
    """Run a command in this process. Returns (exit code, or the name of an exception; what it wrote to stderr)."""
    with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()):
        try:
            code = star.main(command.split())
        except SystemExit as e:
            code = e.code
        except Exception as e:  # what this test is about
            code = type(e).__name__
            traceback.print_exc()
    return code, error.getvalue()


def test_no_file_of_a_run_ends_in_a_traceback(world):
    faults = [fault for fault in fuzz_commands(world) if fault]
    assert not faults, "\n".join(faults)


def test_no_file_ends_in_a_traceback(tmp_path):
    """60 mutations of each kind of file, in about five seconds."""
    faults = [fault for fault in fuzz(tmp_path, 60) if fault]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name, value, message", [
    ("config.json", {"hidden_size": "32"}, 'hidden_size is "32", not a whole number from 1 to 2^24'),
    ("config.json", {"num_key_value_heads": 3}, "do not fit"),
    ("generation_config.json", {"eos_token_id": "<|im_end|>"}, "not an id or a list of ids"),
    ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "not a template, or a list")])
def test_the_line_names_file_and_field(world, tmp_path, capsys, name, value, message):
    shutil.copytree(world / "student", tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | value))
    assert star.main(f"eval --model {tmp_path}/model --data {world}/train.jsonl --out {tmp_path}/out".split()) == 2
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("star.py")]
    assert str(path) in line and message in line


if __name__ == "__main__":
    number = int(sys.argv[1]) if sys.argv[1:] else 2000
    with tempfile.TemporaryDirectory() as temporary:
        (world := Path(temporary) / "world").mkdir()
        make_world(world)
        (records := Path(temporary) / "records").mkdir()
        faults = [*fuzz(records, number, seed=1), *fuzz_commands(world, number // 200, seed=1)]
    seen = {fault.split("; content")[0]: fault for fault in faults if fault}
    print("\n".join(seen.values()) or f"no traceback in {len(faults)} mutations")
    sys.exit(bool(seen))

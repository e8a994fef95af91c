"""`rollout` and `eval` on several ranks: the files of one process, killed and resumed on other numbers of ranks, errors.
And `serve`: one port.

The ranks are forks of this process with the environment that torchrun gives them: they need not import torch again.
"""
import fcntl
import http.client
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import ckd
import star
import train
from apps import evaluate, rollout
from conftest import free_port
from data import leave
from data.groups import read_groups

FLAGS = "--data train.jsonl --dtype float32 --device cpu --max-new-tokens 8"
ROLLOUT = f"rollout --model teacher {FLAGS} --n 2 --keep-all"
EVAL = f"eval --model student {FLAGS} --n 2"
COMMANDS = pytest.mark.parametrize("command", (ROLLOUT, EVAL), ids=("rollout", "eval"))
# command: what follows --out in the names of its files; it samples into the first
RESULTS = {"rollout": ("", ".arguments.json"), "eval": ("/generations.jsonl", "/summary.json", "/arguments.json")}


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A folder with the models and records of the world, the current one. Intervals are coarse, to save seconds."""
    monkeypatch.setattr(evaluate, "RESAMPLES", 50)
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start_rank(command, rank, ranks, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    sys.exit(star.main(command.split()))


def run(command, ranks):
    """Run a command on ranks. Returns their exit codes."""
    port = free_port()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=start_rank, args=(command, rank, ranks, port)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()  # if it hangs
    return [process.exitcode for process in processes]


def files(command, out):
    """{name: bytes} of what a command wrote."""
    return {name: Path(out + name).read_bytes() for name in RESULTS[command.split()[0]]}


def without_log_probs(command, out):
    """The records with responses that a command wrote, without log-probs."""
    rows = [json.loads(line) for line in Path(out + RESULTS[command.split()[0]][0]).read_text().splitlines()]
    for response in (response for row in rows for response in row["responses"]):
        del response["logprob"]
    return rows


@COMMANDS
def test_ranks_write_the_file_of_one_process(here, capfd, command):
    command += " --limit 12 --max-new-tokens 4"
    command += " --max-concurrent 1"  # what runs beside a response may change the last digit of its log-prob
    assert star.main(f"{command} --out one".split()) == 0
    output = capfd.readouterr().out
    for ranks in (2, 3):
        assert run(f"{command} --out of{ranks}", ranks) == [0] * ranks
        assert files(command, f"of{ranks}") == files(command, "one")
        shown = capfd.readouterr()
        assert len(shown.out.splitlines()) == len(output.splitlines())  # by rank 0 alone
        assert shown.err.count("keys and values") == 1 and shown.err.count(" 0/12 ") == 1 and " 12/12 " in shown.err
    assert run(f"{command} --out of3 --resume", 2) == [0] * 2  # finished: nothing changes
    assert files(command, "of3") == files(command, "one") and not list(here.rglob("*.part*"))


@COMMANDS
def test_ranks_without_records(here, command):
    assert star.main(f"{command} --limit 2 --out one".split()) == 0
    assert run(f"{command} --limit 2 --out many", 4) == [0] * 4
    assert without_log_probs(command, "many") == without_log_probs(command, "one")


def append_until_killed(left):
    """`append_rollout`, which also logs, and kills a rank that has appended left[rank] records."""
    append = rollout.append_rollout

    def append_and_log(out, i, record, responses, chat, rank):
        if left[rank] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[rank] -= 1
        with open(rollout.part_file(out, rank)) as file, pytest.raises(BlockingIOError):  # it is locked
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        append(out, i, record, responses, chat, rank)
        with open("log", "a") as file:
            file.write(f"{i}\n")

    return append_and_log


@COMMANDS
def test_killed_and_resumed_on_another_number_of_ranks(here, monkeypatch, command):
    """What all ranks had done is kept, and nothing is sampled twice."""
    assert star.main(f"{command} --out whole".split()) == 0
    left = [3, 5]
    monkeypatch.setattr(rollout, "append_rollout", append_until_killed(left))
    Path("killed").mkdir()
    monkeypatch.chdir("killed")
    for path in ("teacher", "student", "train.jsonl"):
        Path(path).symlink_to(f"../{path}")
    assert run(f"{command} --out run", 2) == [-signal.SIGKILL] * 2
    part = f"run{RESULTS[command.split()[0]][0]}.part"
    assert [len(Path(path).read_text().splitlines()) for path in (part, f"{part}.1")] == [3, 5]
    with open(f"{part}.1", "ab") as file:
        file.write('[3, {"id": "ü'.encode()[:-1])  # half a line that ends within a character
    left[:] = [99] * 3
    for ranks in (1, 3):
        shutil.copytree("../killed", f"../{ranks}", symlinks=True)
        monkeypatch.chdir(f"../{ranks}")
        if ranks == 3:  # killed again, when it had moved the records to OUT.part, but not yet removed OUT.part.1
            lines = Path(f"{part}.1").read_bytes().splitlines(keepends=True)[:5]
            with open(part, "ab") as file:
                file.writelines(lines)
        assert run(f"{command} --out run", ranks) == [2] * ranks  # exists already
        assert run(f"{command} --out run --resume", ranks) == [0] * ranks
        assert sorted(map(int, Path("log").read_text().split())) == list(range(24))
        assert without_log_probs(command, "run") == without_log_probs(command, "../whole")
        assert not list(Path().rglob("*.part*"))


@COMMANDS
def test_a_rank_that_dies_ends_the_other(here, monkeypatch, capfd, command):
    """With one line; nothing that either had done is lost."""
    assert star.main(f"{command} --out whole".split()) == 0
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "append_rollout", append_until_killed([99, 2]))
        capfd.readouterr()
        assert run(f"{command} --out run", 2) == [1, -signal.SIGKILL]
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("star.py") or "Error" in line]
    assert len(errors) == 1 and "another rank has ended" in errors[0], errors
    assert run(f"{command} --out run --resume", 2) == [0, 0]
    assert without_log_probs(command, "run") == without_log_probs(command, "whole")


def test_a_rank_that_lives_on_after_rank_0_was_killed(here, capfd):
    """Its part file is locked, so that a second run is refused."""
    with open("run.part.1", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for flags in ("", "--resume"):
            assert star.main(f"{ROLLOUT} --limit 4 --out run {flags}".split()) == 2
            assert "run.part.1: another process writes there" in capfd.readouterr().err
    assert run(f"{ROLLOUT} --limit 4 --out run --resume", 2) == [0, 0]
    assert not list(here.glob("*.part*"))


def test_records_of_an_earlier_run_are_not_taken(here):
    """Part files of ranks whose OUT.part is gone."""
    assert star.main(f"{ROLLOUT} --limit 4 --out whole".split()) == 0
    records = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    lines = [json.dumps({"index": i, "id": record["id"], "responses": []}) + "\n" for i, record in enumerate(records)]
    for name, flags in (("a", ""), ("b", "--resume")):
        Path(f"{name}.part.1").write_text("".join(lines))
        Path(f"{name}.part.12").write_text("".join(lines))
        assert run(f"{ROLLOUT} --limit 4 --out {name} {flags}", 2) == [0, 0]
        assert without_log_probs(ROLLOUT, name) == without_log_probs(ROLLOUT, "whole")
    assert not list(here.glob("*.part*"))


@pytest.mark.parametrize("command, message", [
    (f"{ROLLOUT} --out new --data nowhere.jsonl", "nowhere.jsonl: cannot be read"),  # on all ranks
    (f"{ROLLOUT} --out old", "old: exists already"),  # on rank 0
    (f"{ROLLOUT.replace('--keep-all', '--max-new-tokens 1')} --out new", "new: no response is left"),
    (f"{ROLLOUT} --out old/new", "old"),
    (f"{EVAL} --out new --model nowhere", "nowhere/config.json: no such file"),
    (f"{EVAL} --out old", "old: is a file"),
    (f"{EVAL} --out new --compare other", "the two evaluations have no record in common"),
    ("sft --model student --data nowhere.jsonl --out new", "nowhere.jsonl: cannot be read"),
    ("ckd --teacher teacher --student student --data train.jsonl --out old", "old: is a file"),
    ("simrl --model student --data train.jsonl --out new --shard-ranks 3", "--shard-ranks 3: must divide"),
    ("rolout --out new", "argument COMMAND: invalid choice: 'rolout'"),
    ("rollout --out new --nn 2", "the following arguments are required: --model, --data")])
def test_an_error_is_printed_once(here, capfd, command, message):
    Path("old").write_text("precious")
    if "--compare" in command:
        assert star.main(f"{EVAL} --out other --limit 2".split()) == 0
        records = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()[2:]]
        Path("rest.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        command += " --data rest.jsonl"
    capfd.readouterr()
    assert run(command, 2) == [2, 2]
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("star.py") or "Error" in line]
    assert len(errors) == 1 and message in errors[0], errors


def test_ranks_without_memory_say_so_once(here, capfd, monkeypatch):
    def fail(*_):
        raise MemoryError

    def end_as_torchrun_does(seconds):
        if seconds:
            os._exit(143)

    def fail_on_one(args, chat):
        return fail() if train.rank() else read_groups(args, chat)

    command = "sft --model student --data train.jsonl --dtype float32 --device cpu --out new"
    monkeypatch.setattr(time, "sleep", end_as_torchrun_does)
    with monkeypatch.context() as patch:
        patch.setattr(ckd, "read_groups", fail_on_one)
        assert run(command, 2) == [2, 2]
        assert capfd.readouterr().err.count("out of memory") == 1
    monkeypatch.setattr(train, "update", fail)
    assert run(command, 2) == [2, 143]
    assert capfd.readouterr().err.count("out of memory") == 1


def complete(port, body):
    """The reply on a connection of its own; None if nobody listens yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body))
        return json.loads(connection.getresponse().read())
    except ConnectionError:  # refused; reset by the check whether the port is free
        return None
    finally:
        connection.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels give all connections to one process")
def test_ranks_serve_on_one_port(here, capfd):
    assert run("serve --model student --device cpu --port 0", 2) == [2, 2]
    assert capfd.readouterr().err.count("--port 0: several ranks") == 1
    port, meeting = free_port(), free_port()
    flags = f"serve --model student --dtype float32 --device cpu --max-new-tokens 8 --port {port}"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=start_rank, args=(flags, rank, 2, meeting)) for rank in range(2)]
    for process in processes:
        process.start()
    body = {"prompt": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", "temperature": 0}
    texts, ranks = set(), set()
    try:
        for _ in range(600):  # until both ranks have answered
            if not (reply := complete(port, body)):
                assert not texts
                time.sleep(0.1)
                continue
            texts.add(reply["choices"][0]["text"])
            ranks.add(int(reply["id"].removeprefix("star-")) % 2)
            if len(ranks) == 2:
                break
    finally:
        for process in processes:
            process.kill()
    assert ranks == {0, 1} and len(texts) == 1
    assert capfd.readouterr().out.count("Ctrl-C ends") == 1


def test_a_rank_leaves_also_if_its_output_cannot_be_written():
    def print_and_leave():
        sys.stdout = open("/dev/full", "w")
        print("a summary")
        leave(2)

    process = multiprocessing.get_context("fork").Process(target=print_and_leave)
    process.start()
    process.join(60)
    assert process.exitcode == 2

"""A command that dies at any file operation, or finds the disk full there, has the same files in the end once resumed.

    python tests/test_deaths.py [COMMAND ...]    every operation of all commands, or of these; the test takes a sample

The faults come right before an operation: `kill`, SIGKILL; `torn`, the same, after the file that was opened last has
lost half of what was written to it since; `full`, from there on no file can grow (RLIMIT_FSIZE), and the command must
end in one line. Each attempt is a process, forked from one that has imported everything.
"""
import argparse
import importlib
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import star  # noqa: E402
from conftest import make_world  # noqa: E402
from test_cli import CKD, EVAL, ROLLOUT, SFT, SIMRL, results  # noqa: E402

for module, _ in star.COMMANDS.values():
    importlib.import_module(module)

CHAIN = f"""
prepare --data train.jsonl --model teacher --size 16 --out chosen.jsonl
{ROLLOUT.replace("train.jsonl", "chosen.jsonl")} --limit 12 --n 1
{CKD.replace("train.jsonl", "out.jsonl")} --save-every 1
{SIMRL.replace("--model student", "--model run/model").replace("--out run", "--out star")} --steps 2
{EVAL.replace("--model student", "--model star/model")}
"""
COMMANDS = {"sft": f"{SFT} --save-every 1", "ckd": f"{CKD} --save-every 1 --valid-answers 2",
            "cache": f"{CKD} --cache cache", "simrl": SIMRL, "rollout": f"{ROLLOUT} --limit 5 --max-concurrent 4", "eval": f"{EVAL} --n 2",
            "chain": "curriculum chain.txt"}
FAULTS = ("kill", "torn", "full")
OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def watch(folder, at, fault, count):
    """Count the file operations of this process in a folder; let the fault happen before number `at`."""
    last = None  # the file opened last for writing, and its size then

    def hook(event, arguments):
        nonlocal last
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in OPERATIONS) or isinstance(arguments[0], int):
            return
        path = Path(os.fsdecode(arguments[0])).absolute()
        if not path.is_relative_to(folder):
            return
        count[0] += 1
        if count[0] == at and fault == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        elif count[0] == at:
            if fault == "torn" and last and last[0].is_file():
                size = last[0].stat().st_size
                os.truncate(last[0], last[1] + max(0, size - last[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if writes:
            last = path, path.stat().st_size if path.exists() and not arguments[2] & os.O_TRUNC else 0

    sys.addaudithook(hook)


def attempt(command, folder, at=0, fault=None):
    """Run a command in a process of its own. Returns (exit code, text on stderr, number of file operations)."""
    count = memoryview(mmap.mmap(-1, 8)).cast("q")  # shared with the process
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        os.dup2(writer, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.close(reader)
        os.close(writer)
        watch(Path(folder), at, fault, count)
        code = 1
        try:
            code = star.main(command.split())
        except SystemExit as e:
            code = e.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with open(reader) as file:
        errors = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), errors, count[0]


def check(name, samples=None, seed=0):
    """Yield (what happened or None) for each attempt: all operations with all faults, or some of them."""
    with tempfile.TemporaryDirectory() as temporary:
        world = Path(temporary) / "world"
        world.mkdir()
        make_world(world)
        (world / "chain.txt").write_text(CHAIN)
        whole = shutil.copytree(world, Path(temporary) / "whole")
        code, errors, operations = attempt(COMMANDS[name], whole)
        assert code == 0, errors
        expected = results(whole)
        attempts = [(at, fault) for at in range(1, operations + 1) for fault in FAULTS]
        if samples:
            attempts = random.Random(seed).sample(attempts, samples)
        for at, fault in attempts:
            folder = shutil.copytree(world, Path(temporary) / "run")
            code, errors, _ = attempt(COMMANDS[name], folder, at, fault)
            lines = [line for line in errors.splitlines() if line.startswith("star.py")]
            wrong = None
            if "Traceback" in errors or fault == "full" and (code, len(lines)) not in ((0, 0), (2, 1)):
                wrong = f"ended with {code}: {errors[-1500:]}"
            else:
                code, errors, _ = attempt(f"{COMMANDS[name]} --resume", folder)
                found = results(folder)
                if code:
                    wrong = f"the resumed run ended with {code}: {errors[-1500:]}"
                elif found != expected:
                    names = sorted(path for path in found | expected if found.get(path) != expected.get(path))
                    wrong = f"other files: {', '.join(names)}"
            yield wrong and f"{name}, {fault} at operation {at} of {operations}: {wrong}"
            shutil.rmtree(folder)


def test_a_sample_of_deaths():
    """Three of each command; in another process, as one that has computed must not be forked."""
    words = [sys.executable, __file__, "--samples", "3"]
    result = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=COMMANDS)
    parser.add_argument("--samples", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bad = 0
    for name in options.names:
        faults = list(tqdm(check(name, options.samples), name))
        bad += len([print(fault) for fault in faults if fault])
        print(f"{name}: {len(faults)} deaths and full disks")
    sys.exit(bad > 0)

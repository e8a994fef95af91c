"""A tiny world that every test may copy: two random models that share a tokenizer, and records for them."""
import json
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import demo  # noqa: E402
from data.chat import CALLS_INTRO, TOOLS_INTRO  # noqa: E402

torch.set_num_threads(1)  # as the subprocesses of test_cli.py: sums in the same order


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with teacher/ and student/ (random, hidden 32, 2 layers) and train.jsonl, 24 demo records; read only."""
    folder = tmp_path_factory.mktemp("world")
    r = random.Random(0)
    lines = [json.dumps(demo.make_record(r, number)) + "\n" for number in range(24)]
    (folder / "train.jsonl").write_text("".join(lines))
    tokenizer = demo.make_tokenizer([*lines, TOOLS_INTRO, CALLS_INTRO] * 3, vocab_size=600)
    for seed, name in enumerate(("teacher", "student")):
        demo.make_model(folder / name, tokenizer, seed, hidden=32, layers=2)
    return folder

"""The files of data/tiny: its records are those of the generator; its models score what its README says."""
import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import sample

import star
from apps import make_tiny
from data import tiny
from data.chat import Chat
from data.records import read_records, read_tools
from data.rollouts import score_response
from data.tiny.tokenizer import make_tokenizer
from data.tiny.world import SPLITS
from model import Transformer

TINY = Path(tiny.__file__).parent


@pytest.mark.parametrize("split", SPLITS)
def test_the_shipped_records_are_those_of_the_generator(split, tmp_path):
    path = tmp_path / f"{split}.jsonl.gz"
    make_tiny.write_records(path, 20, 42, split, shared=8 if split == "train" else 1)
    with gzip.open(path) as made, gzip.open(TINY / path.name) as shipped:
        assert shipped.read().startswith(made.read())
    assert len(read_records(TINY / path.name)) == (6_400 if split == "train" else 1_280)


def test_the_shipped_tools_are_for_chat():
    assert len(read_tools(TINY / "chat_tools.json")) == 2


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_shipped_folders(name):
    folder = TINY / name
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["architectures"] == ["Qwen3ForCausalLM"]
    assert (folder / "tokenizer.json").read_text() == make_tokenizer().to_str(pretty=True)
    assert Chat.from_pretrained(folder).think == "off"  # what it was trained with
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}


def test_both_are_small():
    files = [path for name in ("teacher", "student") for path in (TINY / name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 6e6


def test_they_load_in_transformers():
    transformers = pytest.importorskip("transformers", reason="reference implementation: requirements-dev.txt")
    reference = transformers.AutoModelForCausalLM.from_pretrained(TINY / "student", dtype=torch.float32)
    text = "<|im_start|>user\nplay lomari<|im_end|>\n"
    ids = torch.tensor([Chat.from_pretrained(TINY / "student").encode(text)])
    assert transformers.AutoTokenizer.from_pretrained(TINY / "student").encode(text) == ids[0].tolist()
    model = Transformer.from_pretrained(TINY / "student")
    with torch.no_grad():
        assert torch.allclose(model(ids), reference(ids).logits, atol=1e-4)


@pytest.mark.parametrize("name,low,high", [("teacher", 0.85, 1.0), ("student", 0.15, 0.5)])
def test_exact_calls(name, low, high):
    """On the first 80 records with unseen values; the README has the figures over all 1,280."""
    model = Transformer.from_pretrained(TINY / name)
    chat = Chat.from_pretrained(TINY / name)
    records = [record for record in read_records(TINY / "values.jsonl.gz")[:80] if record["answer"]["tool_calls"]]
    prompts = [chat.encode(chat.prompt(record)) for record in records]
    samples = sample(model, prompts, 1, 100, chat.stop_ids, temperature=0.0,
                     vocab_size=chat.vocab_size)
    scores = [score_response(chat, record, chat.decode(responses[0].ids))
              for record, responses in zip(records, samples)]
    assert low <= sum(score["exact"] for score in scores) / len(scores) <= high
    assert sum(score["reward"] > -1 for score in scores) / len(scores) > 0.5  # most calls are valid


def test_the_rebuild_resumes_its_plan(tmp_path, monkeypatch):
    """It writes the models and a plan of valid commands, which read what earlier ones wrote, and runs it."""
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make_tiny, "write_records", lambda path, *_, **__: path.touch())
    monkeypatch.setattr(make_tiny.os, "execv", lambda _, command: commands.append(command))
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", "--out", "a folder"])
    make_tiny.main()
    assert Path.cwd() == tmp_path / "a folder"
    args, run = star.parse(commands[0][2:])
    assert Path(commands[0][1]).name == "star.py" and args.resume
    written = {str(path) for path in Path().iterdir()}
    stages = [star.parse(line.split())[0] for line in run(args)]
    for stage in stages:
        inputs = {stage.model.removesuffix("/model"), stage.data, getattr(stage, "valid", stage.data)}
        assert inputs <= written and stage.out not in written
        written.add(stage.out)
    assert [stage.out for stage in stages if stage.command == "sft"] == [
        "teacher-easy", "teacher-full", "teacher-world", "teacher", "student-easy", "student"]
    assert sum(stage.command == "eval" for stage in stages) == 6
    for name, size in (("teacher", 919_552), ("student", 579_072)):
        assert Transformer.from_pretrained(f"{name}-init").num_parameters() == size

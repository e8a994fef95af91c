"""What data/tiny ships: its records are what the generator makes, its two models are what its README says of them."""
import gzip
import json
from pathlib import Path

import pytest
import torch

import simrl
import star
from data.chat import Chat
from data.rollouts import judge
from data.sources import read_records, read_tools
from data.tiny import make
from data.tiny.tokenizer import make_tokenizer
from data.tiny.world import SPLITS
from model import Transformer

TINY = Path(make.__file__).parent


@pytest.mark.parametrize("split", SPLITS)
def test_the_shipped_records_are_what_is_made(split, tmp_path):
    make.write(tmp_path / f"{split}.jsonl.gz", 20, 42, split, shared=8 if split == "train" else 1)
    with gzip.open(tmp_path / f"{split}.jsonl.gz") as made, gzip.open(TINY / f"{split}.jsonl.gz") as shipped:
        assert shipped.read().startswith(made.read())
    assert len(read_records(TINY / f"{split}.jsonl.gz", True)) == (6_400 if split == "train" else 640)


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
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY / "student", dtype=torch.float32)
    text = "<|im_start|>user\nplay lomari<|im_end|>\n"
    ids = torch.tensor([Chat.from_pretrained(TINY / "student").encode(text)])
    assert transformers.AutoTokenizer.from_pretrained(TINY / "student").encode(text) == ids[0].tolist()
    ours = Transformer.from_pretrained(TINY / "student")
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)


@pytest.mark.parametrize("name,least,most", [("teacher", 0.85, 1.0), ("student", 0.15, 0.5)])
def test_the_teacher_is_sure_and_the_student_fumbles(name, least, most):
    """On the first 80 records with unseen values; the README has the figures over all 640."""
    model, chat = Transformer.from_pretrained(TINY / name), Chat.from_pretrained(TINY / name)
    records = [record for record in read_records(TINY / "values.jsonl.gz")[:80] if record["answer"]["tool_calls"]]
    found = simrl.generate(model, [chat.encode(chat.prompt(r)) for r in records], 1, 100, chat.stop_ids,
                           torch.Generator(), 0.0, width=chat.vocab_size)
    judged = [judge(chat, record, chat.decode(samples[0]["ids"])) for record, samples in zip(records, found)]
    assert least <= sum(j["exact"] for j in judged) / len(judged) <= most
    assert sum(j["reward"] > -1 for j in judged) / len(judged) > 0.5  # right in form


def test_the_remake_runs_what_is_left(tmp_path, monkeypatch, capsys):
    """Each command once, in order, with --resume where it was stopped; nothing that is finished."""
    ran, folders = [], [folder for folder, _ in make.plan(tmp_path, True, 42)]
    monkeypatch.setattr(make, "write", lambda *_, **__: None)
    monkeypatch.setattr(make.star, "main", lambda words: ran.append(words) or 0)
    monkeypatch.setattr(make.sys, "argv", ["make.py", "--out", str(tmp_path), "--ceiling"])
    folders[0].mkdir()
    (folders[0] / "summary.json").write_text("{}")
    folders[1].mkdir()
    assert make.main() == 0
    flags = star.parser("", star.COMMANDS)
    assert [flags.parse_args(words).out for words in ran] == [str(folder) for folder in folders[1:]]
    assert [flags.parse_args(words).resume for words in ran] == [True] + [False] * (len(ran) - 1)
    for name, size in (("teacher", 919_552), ("student", 579_072)):
        assert Transformer.from_pretrained(tmp_path / f"{name}-init").size() == size

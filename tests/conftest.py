"""Shared by all tests: two tiny random models with one tokenizer, records for them, and the parsed flags of a command."""
import json
import random
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parents[1]))
import star  # noqa: E402
from apps.make_tiny import make_model  # noqa: E402
from data.chat import CALLS_INTRO, TOOLS_INTRO  # noqa: E402
from sampler import Request, generate  # noqa: E402

torch.set_num_threads(1)  # as in the subprocesses of test_cli.py, so that sums have the same order

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
CITIES = "Lima Oslo Cairo Quito Paris Tokyo Delhi Accra Turin Porto Kyoto Perth".split()
NAMES = "Ana Bo Carla Dev Emil Fay Gus Hana Ivo June Kofi Lea".split()
SONGS = "Blue Harbor|Night Train|Paper Moon|Slow River|First Snow|Old Stones".split("|")

# name, description, parameters {name: (type, values)}, phrasings
TOOLS = [
    ("get_weather", "Weather forecast for a city.", {"city": ("string", CITIES)},
     ["What is the weather in {city}?", "Will it rain in {city} today?", "Forecast for {city}, please."]),
    ("set_alarm", "Set an alarm.", {"hour": ("integer", range(24)), "label": ("string", NAMES)},
     ["Wake {label} at {hour}.", "Set an alarm at {hour} called {label}.", "I need an alarm for {label} at {hour}."]),
    ("play_song", "Play a song.", {"title": ("string", SONGS)},
     ["Play {title}.", "Put on {title}, please.", "I want to hear {title}."]),
    ("send_message", "Send a text message.", {"to": ("string", NAMES), "body": ("string", SONGS)},
     ["Tell {to}: {body}", "Send {to} the message {body}", "Text {body} to {to}."]),
    ("book_train", "Book a train ticket.", {"origin": ("string", CITIES), "target": ("string", CITIES)},
     ["A train from {origin} to {target}, please.", "Get me from {origin} to {target} by train."]),
]
REFUSAL = "None of my tools can do that."
PORTS = []  # sockets, open until the tests end


def free_port():
    """A port that nobody else gets from the system, because a socket that does not listen keeps it."""
    PORTS.append(socket.socket())
    PORTS[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    PORTS[-1].bind(("127.0.0.1", 0))
    return PORTS[-1].getsockname()[1]


def stub_record(answer):
    """A record for a loop whose reward looks at the answer only."""
    return {"id": str(answer), "messages": [{"content": "?"}], "answer": answer}


def make_record(r, number):
    """One record: two or three tools, one request; in one of eight the right tool is not offered."""
    chosen = r.sample(TOOLS, r.choice((2, 3)))
    name, _, parameters, phrasings = chosen[0]
    arguments = {p: r.choice(values) for p, (_, values) in parameters.items()}
    offered = chosen[1:] if number % 8 == 7 else chosen
    r.shuffle(offered)
    tools = [{"name": n, "description": d, "parameters": {
        "type": "object", "properties": {p: {"type": t} for p, (t, _) in ps.items()}, "required": list(ps)}}
        for n, d, ps, _ in offered]
    answer = {"tool_calls": [{"name": name, "arguments": arguments}], "content": None}
    if number % 8 == 7:
        answer = {"tool_calls": [], "content": REFUSAL}
    return {"id": f"demo-{number:04d}", "source": "demo", "tools": tools,
            "messages": [{"role": "user", "content": r.choice(phrasings).format(**arguments)}], "answer": answer}


def make_tokenizer(texts, vocab_size=700):
    """A byte-level BPE with Qwen's special tokens, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_tokens([AddedToken(t, special=not t.startswith(("<t", "</t")), normalized=False) for t in SPECIAL])
    return tokenizer


REQUIRED_FLAGS = {"ckd": "--teacher t --student s --data d --out o", "sft": "--model m --data d --out o",
                  "simrl": "--model m --data d --out o", "rollout": "--model m --data d --out o",
                  "eval": "--model m --data d --out o"}


def settings(command, **overrides):
    """The parsed flags of a command, its defaults except for `overrides`; dtype="float64" works too."""
    args, _ = star.parse([command, *REQUIRED_FLAGS[command].split()])
    for name, value in overrides.items():
        assert hasattr(args, name), f"{command} has no flag --{name}"
        setattr(args, name, value)
    return args


def sample(model, prompts, n, max_new_tokens, stop_ids=(), seed=0, temperature=1.0, top_p=1.0, vocab_size=None,
           num_slots=64):
    """The n responses of each prompt; prompt i has seed + i."""
    chat = SimpleNamespace(stop_ids=stop_ids, vocab_size=vocab_size)
    requests = [Request(prompt, n, seed + i, temperature, max_new_tokens, top_p) for i, prompt in enumerate(prompts)]
    list(generate(model, requests, num_slots, chat))
    return [request.responses for request in requests]


def make_world(folder):
    """Write teacher/ and student/ (random, hidden 32, 2 layers) and train.jsonl, 24 demo records."""
    r = random.Random(0)
    lines = [json.dumps(make_record(r, number)) + "\n" for number in range(24)]
    (folder / "train.jsonl").write_text("".join(lines))
    tokenizer = make_tokenizer([*lines, TOOLS_INTRO, CALLS_INTRO] * 3, vocab_size=600)
    for seed, name in enumerate(("teacher", "student")):
        make_model(folder / name, tokenizer, seed, hidden=32, layers=2, heads=(2, 1))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with the files of `make_world`; read only."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder

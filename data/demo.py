"""A small random pair and a few records for it: enough to run every command on a machine with nothing but this code.

The models are randomly initialised Qwen3-shaped decoders with a byte-level tokenizer trained on the records' own text.
They learn the form of a call within a minute and little else; what STAR does is seen on real weights.
"""
import json
import random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.chat import EXAMPLE_CALL, Chat

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


def make_record(r, number):
    """One record: two or three tools, one request; in one of eight the tool it needs is not offered."""
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


def make_model(folder, tokenizer, seed, hidden=64, layers=2, vocab_size=None, **settings):
    """A random Qwen3-shaped model folder with this tokenizer; `settings` go into config.json."""
    from model import Transformer  # here, so that making records needs no torch
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": hidden,
              "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 16,
              "num_key_value_heads": max(1, hidden // 32), "head_dim": 16, "hidden_act": "silu",
              "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "eos_token_id": end,
              "tie_word_embeddings": True, "vocab_size": vocab_size or tokenizer.get_vocab_size()} | settings
    (folder / "config.json").write_text(json.dumps(config))
    model = Transformer(config).init_weights(seed, std=0.5 * hidden ** -0.5)  # 0.02 is for models a thousand wide
    model.folder = folder
    model.save_pretrained(folder)


def make(out, seed=42, records=512):
    """Write train.jsonl, teacher-init/ and student-init/ under `out`."""
    r = random.Random(seed)
    rows = [make_record(r, number) for number in range(records)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    writer = Chat()  # a renderer without a tokenizer: its text is what the tokenizer is trained on
    writer.family, writer.default_system, writer.think, writer.tools = "qwen3", None, "off", "flat"
    writer.example_call = EXAMPLE_CALL
    tokenizer = make_tokenizer(writer.prompt(row) + writer.answer(row) for row in rows)
    make_model(out / "teacher-init", tokenizer, seed, hidden=128, layers=4)
    make_model(out / "student-init", tokenizer, seed + 1, hidden=64, layers=2)


def commands(out, seed=42, quick=False):
    """The command lines of the demo, each a list of words for star.py, on what `make` wrote under `out`.

    quick: a few steps only, which show the plumbing and learn nothing.
    """
    small = ["--hold-out", "16", "--batch", "32", "--dtype", "float32", "--device", "cpu", "--valid-every", "20",
             "--samples", "3", "--seed", str(seed)]
    steps = ("10", "5") if quick else ("70", "160")
    return [
        ["sft", "--model", f"{out}/teacher-init", "--data", f"{out}/train.jsonl", "--out", f"{out}/teacher",
         "--steps", steps[0], "--lr", "3e-3", *small],
        ["rollout", "--model", f"{out}/teacher/model", "--data", f"{out}/train.jsonl", "--n", "4", "--limit", "64",
         "--max-new-tokens", "64", "--dtype", "float32", "--device", "cpu", "--out", f"{out}/rollouts.jsonl",
         *["--keep-all"] * quick],  # what little it learnt has not the form yet
        ["ckd", "--teacher", f"{out}/teacher/model", "--student", f"{out}/student-init", "--data",
         f"{out}/rollouts.jsonl", "--out", f"{out}/student", "--steps", steps[1], "--lr", "3e-3", *small]]

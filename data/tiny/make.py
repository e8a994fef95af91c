"""Makes the two models of the embedded world again, from nothing and through the project's own `sft`.

    python -m data.tiny.make --out runs/tiny                   everything, 37 minutes on two quiet CPU cores
    python -m data.tiny.make --out runs/tiny --ceiling         the student's shape too, trained as long as the teacher

It writes records (a file for each stage, some to distil and refine with, and a file for each kind of test), two random
models, and then runs the single commands that it prints. Stopped at any moment, the same command goes on where it was.
What comes out is runs/tiny/teacher/model and runs/tiny/student/model; the two folders in data/tiny are copies of those
of such a run, and so are its record files (but the large ones).

Both begin with records that ask for one call and offer two tools. The teacher goes on with the world, first a little
harder than it is (more often two tools and two calls, more spelled words), then as it is. The student is meant to be
right in form and often wrong: it goes on with records of which a careless annotator wrote seven in ten, who gave only
the first call, left out what is optional and put numbers in quotes (`sloppy_calls`). So it has learnt to read tools and
to copy, and bad habits.
"""
import argparse
import json
import random
import sys
from pathlib import Path

from tqdm import tqdm

import star
from data import write_json, write_lines
from data.tiny.tokenizer import make_tokenizer
from data.tiny.world import SPLITS, make_record, make_records

EASY = {"offered": (2,), "two": 0.0, "none": 0.1, "optional": 0.3, "two_words": 0.0}
FULL = {"offered": (1, 2, 2), "two": 0.1, "real": 0.1}
SLOPPY = {"offered": (2,), "sloppy": 0.7}
BRANCHES = 8  # records that share their tools


def make_model(folder, tokenizer, seed, hidden, layers, head_dim=16, kv_heads=None, vocab_size=None, think="on",
               **settings):
    """A random Qwen3-shaped model folder with this tokenizer; `settings` go into config.json, `think` is its default."""
    from model import Transformer  # here, so that making records needs no torch
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    end, heads = tokenizer.token_to_id("<|im_end|>"), hidden // head_dim
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
         "default_think": think}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": hidden,
              "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
              "num_key_value_heads": kv_heads or max(1, heads // 2), "head_dim": head_dim, "hidden_act": "silu",
              "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "eos_token_id": end,
              "tie_word_embeddings": True, "vocab_size": vocab_size or tokenizer.get_vocab_size()} | settings
    (folder / "config.json").write_text(json.dumps(config))
    model = Transformer(config).init_weights(seed, std=0.5 * hidden ** -0.5)  # 0.02 is for models a thousand wide
    model.folder = folder
    model.save_pretrained(folder)


def write(path, groups, seed, split="train", shared=BRANCHES, **settings):
    """Write groups x shared records, those of a group with the same tools, unless the file is there already."""
    if not path.exists():
        r = random.Random(f"{seed} {path.name}")  # of a text: the same everywhere
        write_lines(path, (json.dumps(record) + "\n" for _ in tqdm(range(groups), path.name)
                           for record in make_records(r, shared, split, **settings)))


def shapes(folder):
    """The random models to start from. The student has the same parts as the teacher, fewer and narrower."""
    make_model(folder / "teacher-init", make_tokenizer(), 1, hidden=128, layers=4, head_dim=32, kv_heads=2, think="off")
    make_model(folder / "student-init", make_tokenizer(), 2, hidden=96, layers=4, head_dim=24, kv_heads=4, think="off")


def plan(out, ceiling, seed):
    """The command lines for star.py, in order, as (folder it writes, words)."""
    common = ["--think", "off", "--dtype", "float32", "--device", "cpu", "--seed", str(seed)]
    lines = []

    def sft(name, start, data, steps, rate="2e-3"):
        words = ["sft", "--model", str(start), "--data", f"{out}/{data}", "--valid", f"{out}/values.jsonl.gz",
                 "--valid-limit", "128", "--branches", str(BRANCHES), "--optimiser", "muon", "--lr", rate, "--batch",
                 "96", "--micro-tokens", "2048", "--steps", str(steps), "--save-every", "100", "--valid-every", "250"]
        lines.append((out / name, [*words, *common]))
        return out / name / "model"

    def score(name, model):
        for split in SPLITS[1:]:
            words = ["eval", "--model", str(model), "--data", f"{out}/{split}.jsonl.gz", "--rows", "256"]
            lines.append((out / f"{name}-on-{split}", [*words, "--max-new-tokens", "128", *common]))

    def grow(name, start):
        able = sft(f"{name}-full", start, "full.jsonl.gz", 1600)
        score(name, sft(name, able, "world.jsonl.gz", 300, "1e-3"))

    grow("teacher", sft("teacher-easy", out / "teacher-init", "easy.jsonl.gz", 400))
    pupil = sft("student-easy", out / "student-init", "easy.jsonl.gz", 400)
    score("student", sft("student", pupil, "sloppy.jsonl.gz", 1100))
    if ceiling:
        grow("ceiling", pupil)
    return lines


def main():
    parser = argparse.ArgumentParser(description="Make the embedded world's teacher and student again, from nothing.")
    parser.add_argument("--out", default="runs/tiny", help="folder for everything; started again, it goes on")
    parser.add_argument("--ceiling", action="store_true", help="also train the student's shape as long as the teacher")
    parser.add_argument("--seed", type=int, default=42, help="of everything random")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "easy.jsonl.gz", 4_800, args.seed, **EASY)
    write(out / "full.jsonl.gz", 9_600, args.seed, **FULL)
    write(out / "world.jsonl.gz", 3_600, args.seed)
    write(out / "sloppy.jsonl.gz", 6_600, args.seed, **SLOPPY)
    write(out / "train.jsonl.gz", 800, args.seed)  # to distil and refine with
    for split in SPLITS[1:]:  # to score on
        write(out / f"{split}.jsonl.gz", 640, args.seed, split, shared=1)
    write_json(out / "chat_tools.json", make_record(random.Random(7), random_names=0, offered=(2,))["tools"])
    shapes(out)
    for folder, words in plan(out, args.ceiling, args.seed):
        if not (folder / "summary.json").exists():  # it is not finished
            words += ["--out", str(folder), *["--resume"] * folder.exists()]
            print(f"\n$ python star.py {' '.join(words)}\n", flush=True)
            if code := star.main(words):
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())

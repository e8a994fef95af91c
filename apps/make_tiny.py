"""Rebuild the bundled world's teacher and student from random weights: `python -m apps.make_tiny --out runs/tiny`.

It writes records and two random models, then runs the commands of PLAN there: 22 minutes on two idle cores. The
same command resumes an interrupted rebuild. data/tiny holds copies of the results: runs/tiny/teacher/model,
runs/tiny/student/model and the record files that PLAN does not train on.

The teacher learns easy records (two tools offered, one call requested), then records a little harder than the
world's, then the world's own, and finally the world's with careless answers (`sloppy_calls`) in 30 % of the records:
its greedy answers stay right, its samples are mixed. 70 % of the student's later records have such answers: it learns
to read tools, and bad habits.
"""
import argparse
import json
import os
import random
import sys
from pathlib import Path

from tqdm import tqdm

from data import write_json, write_lines
from data.tiny.tokenizer import make_tokenizer
from data.tiny.world import SPLITS, make_record, make_records
from model import Transformer

PLAN = """
sft --model teacher-init --data easy.jsonl.gz --steps 400 --lr 2e-3 --out teacher-easy {sft}
sft --model teacher-easy/model --data full.jsonl.gz --steps 1600 --lr 2e-3 --out teacher-full {sft}
sft --model teacher-full/model --data world.jsonl.gz --steps 300 --lr 1e-3 --out teacher-world {sft}
sft --model teacher-world/model --data world30.jsonl.gz --steps 300 --lr 1e-3 --out teacher {sft}
sft --model student-init --data easy.jsonl.gz --steps 400 --lr 2e-3 --out student-easy {sft}
sft --model student-easy/model --data sloppy2.jsonl.gz --steps 2200 --lr 2e-3 --out student {sft}
"""
SFT = """
    --optimiser muon --share-prefix 8 --batch-size 96 --micro-batch-tokens 2048
    --valid values.jsonl.gz --valid-limit 128 --valid-every 250"""
EVAL = """
eval --model {name}/model --data {split}.jsonl.gz --out {name}-on-{split}
    --max-concurrent 256 --max-new-tokens 128"""


def make_model(folder, tokenizer, seed, hidden, layers, heads, think="on"):
    """Write a random Qwen3-shaped model folder. heads: (query, key/value); think: its default for --think."""
    end_id = tokenizer.token_to_id("<|im_end|>")
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": hidden // heads[0],
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048,
        "eos_token_id": end_id, "tie_word_embeddings": True, "vocab_size": tokenizer.get_vocab_size(),
    }
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
                        "pad_token": "<|endoftext|>", "default_think": think}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end_id}))
    # A standard deviation of 0.02 suits models a thousand wide.
    model = Transformer(config, folder).init_weights(seed, std=0.5 * hidden ** -0.5)
    model.save_pretrained(folder)  # copies the tokenizer


def write_records(path, lists, seed, split="train", shared=8, **settings):
    """Write `shared` records for each of `lists` random tool lists; settings: see `make_records`."""
    if path.exists():
        return
    r = random.Random(f"{seed} {path.name}")
    lines = []
    for _ in tqdm(range(lists), path.name):
        lines += [json.dumps(record) + "\n" for record in make_records(r, shared, split, **settings)]
    write_lines(path, lines)


def write_inputs(out, seed):
    """Write the record files and the two random models."""
    write_records(out / "easy.jsonl.gz", 4_800, seed, offered=(2,), two=0.0, none=0.1, optional=0.3, two_words=0.0)
    write_records(out / "full.jsonl.gz", 9_600, seed, offered=(1, 2, 2), two=0.1, real=0.1)
    write_records(out / "world.jsonl.gz", 3_600, seed)
    write_records(out / "world30.jsonl.gz", 3_600, seed, sloppy=0.3)
    write_records(out / "sloppy2.jsonl.gz", 13_200, seed, offered=(2,), sloppy=0.7)
    write_records(out / "train.jsonl.gz", 800, seed)  # to distil and refine with
    for split in SPLITS[1:]:
        write_records(out / f"{split}.jsonl.gz", 1_280, seed, split, shared=1)
    chat = make_record(random.Random(7), random_names=0, offered=(2,))
    write_json(out / "chat_tools.json", chat["tools"])
    tiny = {"tokenizer": make_tokenizer(), "layers": 4, "think": "off"}
    make_model(out / "teacher-init", seed=1, hidden=128, heads=(4, 2), **tiny)
    make_model(out / "student-init", seed=2, hidden=96, heads=(4, 4), **tiny)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", default="runs/tiny", help="folder for everything")
    add("--seed", type=int, default=42, help="random seed")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    machine = f"--think off --dtype float32 --device cpu --seed {args.seed}"
    plan = PLAN.format(sft=f"{SFT} {machine}")
    for name in ("teacher", "student"):
        for split in SPLITS[1:]:
            plan += EVAL.format(name=name, split=split) + f" {machine}"
    if (out / "plan.txt").exists() and (out / "plan.txt").read_text() != plan:
        parser.error(f"{out}: was made with another --seed or version; use another --out")
    (out / "plan.txt").write_text(plan)
    write_inputs(out, args.seed)
    print(f"$ cd {out}", flush=True)
    os.chdir(out)
    star = str(Path(__file__).resolve().parents[1] / "star.py")
    command = [sys.executable, star, "curriculum", "plan.txt", "--resume"]
    os.execv(sys.executable, command)  # Ctrl-C then reaches only the training


if __name__ == "__main__":
    main()

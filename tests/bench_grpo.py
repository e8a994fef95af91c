"""A GRPO step here and in TRL's GRPOTrainer on the same work: python tests/bench_grpo.py MODEL [PROMPT_TOKENS ...]

One prompt, 8 samples of 48 tokens each (nothing ends early), one optimiser step, no KL; float32 weights and bfloat16
autocast in both. Each side is a process of its own that makes one step to warm up and then one that is reported (these
take minutes; raise STEPS where they do not, and the median of all but the first is).
TRL is not in requirements-dev.txt: pip install trl (1.16.0 was used).
"""
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SAMPLES, TOKENS, STEPS = 8, 48, 2


def prompt_ids(chat, length):
    """So many tokens of running text."""
    return chat.encode((ROOT / "simrl.py").read_text() + (ROOT / "ckd.py").read_text())[:length]


def ours(folder, length):
    """[{"seconds", "sampling", "training"}] of each step."""
    import torch

    import simrl
    from data.chat import Chat
    from model import Transformer
    chat, model = Chat.from_pretrained(folder), Transformer.from_pretrained(folder)
    values = iter(range(10 ** 6))

    def reward(record, text):
        return {"reward": next(values) % 3 / 2, "answer_score": 0.5}

    with tempfile.TemporaryDirectory() as out:
        simrl.refine(model, [{"record": {}, "prompt": prompt_ids(chat, length)}], out, reward, chat.decode, [],
                     chat.vocab_size, kl_weight=0.0, group_size=SAMPLES, prompts_per_step=1, batch=SAMPLES, steps=STEPS,
                     keep="none", max_new_tokens=TOKENS, dtype=torch.bfloat16, save_every=10 ** 6, lr=1e-6)
        rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{"seconds": sum(row[f"seconds_{part}"] for part in ("sampling", "scoring", "training")),
             "sampling": row["seconds_sampling"], "scoring": row["seconds_scoring"],
             "training": row["seconds_training"]} for row in rows]


def theirs(folder, length):
    """The same from TRL; sampling is the time in `generate`, scoring and training what is left."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from data.chat import Chat
    chat = Chat.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    values, marks, spent = iter(range(10 ** 6)), [], []
    generate = model.generate

    def timed(*args, **kwargs):
        began = time.perf_counter()
        found = generate(*args, **kwargs)
        spent.append(time.perf_counter() - began)
        return found

    model.generate = timed

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            marks.append(time.perf_counter())

        def on_train_end(self, *args, **kwargs):
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        settings = GRPOConfig(
            out, num_generations=SAMPLES, per_device_train_batch_size=SAMPLES, gradient_accumulation_steps=1,
            max_completion_length=TOKENS, max_steps=STEPS, learning_rate=1e-6, beta=0.0, bf16=True, use_cpu=True,
            generation_kwargs={"min_new_tokens": TOKENS}, report_to=[], save_strategy="no", logging_steps=1)
        trainer = GRPOTrainer(
            model, reward_funcs=lambda completions, **_: [next(values) % 3 / 2 for _ in completions], args=settings,
            train_dataset=Dataset.from_list([{"prompt": chat.decode(prompt_ids(chat, length))}] * STEPS),
            callbacks=[Clock()])
        trainer.train()
    steps = [after - before for before, after in zip(marks, marks[1:])]
    return [{"seconds": s, "sampling": g, "scoring": 0.0, "training": s - g} for s, g in zip(steps, spent, strict=True)]


if __name__ == "__main__":
    if sys.argv[1] in ("ours", "theirs"):
        print("\n" + json.dumps({"ours": ours, "theirs": theirs}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))))
        sys.exit()
    for length in map(int, sys.argv[2:] or (400, 1000)):
        found = {}
        for side in ("ours", "theirs"):
            done = subprocess.run([sys.executable, __file__, side, sys.argv[1], str(length)], stdout=subprocess.PIPE,
                                  text=True, check=True)
            rows = json.loads(done.stdout.splitlines()[-1])[1:]  # the first warms up
            found[side] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
            print(f"{length:5d} tokens, {side:6s}  " + "  ".join(f"{n} {v:6.1f} s" for n, v in found[side].items())
                  + f"   ({min(r['seconds'] for r in rows):.1f} to {max(r['seconds'] for r in rows):.1f})", flush=True)
        print(f"{length:5d} tokens, TRL / ours  {found['theirs']['seconds'] / found['ours']['seconds']:.1f}")

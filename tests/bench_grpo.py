"""A GRPO step here and in TRL's GRPOTrainer on the same work: python tests/bench_grpo.py MODEL [PROMPT_TOKENS ...]

One prompt, 8 samples of 48 tokens each (none ends early), one optimiser step, no KL; float32 weights and bfloat16
autocast in both. Each side runs in a process of its own: one step to warm up, then one that is reported. On a fast
machine raise STEPS; the median of all steps but the first is reported.
TRL is not in requirements-dev.txt: pip install trl (1.16.0 was used).
"""
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import star  # noqa: E402
from data.chat import Chat  # noqa: E402
from data.groups import Group  # noqa: E402
from data.runs import read_metrics  # noqa: E402
from model import Transformer  # noqa: E402
from simrl import refine  # noqa: E402

SAMPLES = 8
TOKENS = 48
STEPS = 2
FLAGS = f"""--kl-weight 0 --filter none --lr 1e-6 --n {SAMPLES} --max-new-tokens {TOKENS}
    --prompts-per-step 1 --batch-size {SAMPLES} --steps {STEPS} --save-every 1000000"""


def prompt_ids(chat, length):
    """The first `length` tokens of a running text."""
    text = (ROOT / "simrl.py").read_text() + (ROOT / "ckd.py").read_text()
    return chat.encode(text)[:length]


def star_steps(folder, length):
    """[{"seconds", "sampling", "scoring", "training"}] of each step."""
    chat = Chat.from_pretrained(folder)
    chat.stop_ids = []
    model = Transformer.from_pretrained(folder)
    # samples.jsonl shows the gold answer of every group, so the record needs one.
    record = {"answer": {"tool_calls": [], "content": "-"}}
    prompts = [Group(record, prompt_ids(chat, length), [])]
    rewards = itertools.cycle((0.0, 0.5, 1.0))  # no matter what the response is
    with tempfile.TemporaryDirectory() as out:
        args, _ = star.parse(["simrl", "--model", str(folder), "--data", "none", "--out", out, *FLAGS.split()])
        refine(model, None, prompts, chat, lambda *_: {"reward": next(rewards), "answer_score": 0.5}, args)
        rows = read_metrics(out)
    steps = []
    for row in rows:
        step = {name: row[f"seconds_{name}"] for name in ("sampling", "scoring", "training")}
        steps.append({"seconds": sum(step.values())} | step)
    return steps


def trl_steps(folder, length):
    """The same from TRL: sampling is the time in `generate`, training is the rest, with scoring."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    chat = Chat.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rewards = itertools.cycle((0.0, 0.5, 1.0))
    marks = []
    sampling = []
    generate = model.generate

    def timed_generate(*args, **kwargs):
        start = time.perf_counter()
        samples = generate(*args, **kwargs)
        sampling.append(time.perf_counter() - start)
        return samples

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            marks.append(time.perf_counter())

        def on_train_end(self, *args, **kwargs):
            marks.append(time.perf_counter())

    model.generate = timed_generate
    rows = [{"prompt": chat.decode(prompt_ids(chat, length))}] * STEPS
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            out, num_generations=SAMPLES, per_device_train_batch_size=SAMPLES, gradient_accumulation_steps=1,
            max_completion_length=TOKENS, max_steps=STEPS, learning_rate=1e-6, beta=0.0, bf16=True, use_cpu=True,
            generation_kwargs={"min_new_tokens": TOKENS}, report_to=[], save_strategy="no", logging_steps=1)
        trainer = GRPOTrainer(
            model, reward_funcs=lambda completions, **_: [next(rewards) for _ in completions], args=config,
            train_dataset=Dataset.from_list(rows), callbacks=[Clock()])
        trainer.train()
    steps = []
    for start, end, part in zip(marks[:-1], marks[1:], sampling, strict=True):
        steps.append({"seconds": end - start, "sampling": part, "scoring": 0.0, "training": end - start - part})
    return steps


SIDES = {"star": star_steps, "trl": trl_steps}


def compare(folder, length):
    """Run both sides on a prompt of this length, a process each, and print their times."""
    medians = {}
    for side in SIDES:
        process = subprocess.run([sys.executable, __file__, side, folder, str(length)],
                                 stdout=subprocess.PIPE, text=True, check=True)
        steps = json.loads(process.stdout.splitlines()[-1])[1:]  # the first warms up
        medians[side] = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
        seconds = [step["seconds"] for step in steps]
        parts = "  ".join(f"{name} {value:6.1f} s" for name, value in medians[side].items())
        print(f"{length:5d} tokens, {side:4s}  {parts}   ({min(seconds):.1f} to {max(seconds):.1f})", flush=True)
    ratio = medians["trl"]["seconds"] / medians["star"]["seconds"]
    print(f"{length:5d} tokens, TRL / STAR  {ratio:.1f}")


if __name__ == "__main__":
    if sys.argv[1] in SIDES:
        print("\n" + json.dumps(SIDES[sys.argv[1]](sys.argv[2], int(sys.argv[3]))))
        sys.exit()
    for length in map(int, sys.argv[2:] or (400, 1000)):
        compare(sys.argv[1], length)

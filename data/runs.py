"""Run folders: what a command writes under --out, and how it resumes.

    OUT/arguments.json    the settings, and hashes of the files read; a resumed run must have the same
    OUT/metrics.jsonl     a line per step
    OUT/samples.jsonl     a line per group of Sim-RL: each response with its scores (0.2 kB), but not the prompt
    OUT/checkpoints/      step-000100, ...: weights, optimiser moments, progress.json; safetensors and JSON, no pickle
    OUT/model, OUT/summary.json    when the run is finished
"""
import json
import math
import mmap
import os
import resource
import statistics
import sys
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from data import InputError, hash_files, lock, one_line, parse_json, print_table
from data import read_json, read_optional, refuse_changes, refuse_existing, write_json
from data.checkpoints import check_checkpoint, delete_checkpoints, latest_checkpoint
from data.fields import GROUP, PROGRESS, check_fields
from data.groups import counted_tokens
from data.records import read_lines
from shard import rank, wait_for_ranks

# A resumed run may change these: they affect memory, speed, what is shown, or the filters at the end of a rollout.
FREE_FLAGS = {"resume", "out", "device", "keep_all", "compare", "samples", "save_every", "micro_batch_tokens",
              "gradient_checkpointing", "compile", "max_concurrent", "shard_ranks", "prefix_tokens"}


def add_output_flags(parser, what):
    """Flags that say where to write, and what to do with an earlier run there."""
    group = parser.add_argument_group("output")
    group.add_argument("--out", required=True, help=what)
    group.add_argument("--resume", action="store_true", help="continue a stopped run")


def settings(args, inputs):
    """What a resumed run must not change: {flag: value}, and under "inputs" the hashes of files and model folders."""
    free = FREE_FLAGS - {"micro_batch_tokens"} if getattr(args, "loss_mean", "") == "micro-batch" else FREE_FLAGS
    return {name: value for name, value in vars(args).items() if name not in free} | {"inputs": hash_files(inputs)}


def check_folder(args):
    """InputError if --out cannot be the folder of this run: it exists already, or is none to resume."""
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; --out names a folder")
    if out.exists() and any(path.name != "arguments.json.star-tmp" for path in out.iterdir()):
        refuse_existing(out, args.resume)
        if not (out / "arguments.json").exists():
            raise InputError(f"{out}: has no arguments.json, so it is not a run; remove it or use another --out")


def prepare_folder(args, inputs):
    """Begin or resume --out, after `check_folder`, and write arguments.json. Returns the step to resume after, 0 for a
    new run, -1 for a finished training run.

    inputs: the files and model folders that the run reads; they must not change before it is finished

    The folder stays locked. InputError for a broken checkpoint, another process's run, or other settings or inputs."""
    out = Path(args.out)
    saved = out / "arguments.json"
    now = settings(args, inputs)
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    if saved.exists():
        remedy = "resume with the flags in its arguments.json, or use another --out"
        refuse_changes(f"{out}: was started with", read_json(saved, remedy), now, remedy)
    write_json(saved, now)
    if args.command not in PROGRESS:  # not a training run: no checkpoints, no logs
        return 0
    if (out / "summary.json").exists():
        return -1
    step = latest_checkpoint(out)
    if step:
        check_checkpoint(out, step, args.command)
    delete_checkpoints(out)
    cut_log(out / "metrics.jsonl", step)
    if args.command == "simrl":
        cut_log(out / "samples.jsonl", step)
    if (out / "metrics.jsonl").exists():
        read_metrics(out)
    return step


def lines_from_end(path):
    """Yield (its first byte, the line) for the whole lines of a file, the last first. Reads no more than is used."""
    if not path.exists() or not path.stat().st_size:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = data.rfind(b"\n") + 1  # a kill may have left half a line
        while end:
            start = data.rfind(b"\n", 0, end - 1) + 1
            yield start, data[start:end]
            end = start


def cut_log(path, step):
    """Cut a log after the last line whose step is at most `step`."""
    keep = 0
    for start, line in lines_from_end(path) if step else ():
        if read_row(line, f"{path}: the line at byte {start}")["step"] <= step:
            keep = start + len(line)
            break
    if path.exists():
        os.truncate(path, keep)


def log_metrics(out, rows, name="metrics.jsonl"):
    """Append rows, one line each, to metrics.jsonl or another file of the run; rank 0 only."""
    if rank() > 0:
        return
    with open(Path(out) / name, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# What the summary of a run adds up over its steps, and shows of their first and last fifth.
SUMS = ("seconds", "seconds_sampling", "seconds_scoring", "seconds_training", "groups_drawn", "groups_kept",
        "sequences", "packed_tokens", "tokens")
CURVES = ("reward", "nll")


def read_metrics(out):
    """The rows of metrics.jsonl; a partial last line is left out. InputError if a value is not a number."""
    path = Path(out) / "metrics.jsonl"
    rows = []
    for number, line in read_lines(path):
        if not line.endswith(b"\n"):
            break
        where = f"{path}:{number}"
        row = read_row(line, where)
        table = dict.fromkeys(row, "a number or NaN")
        rows.append(check_fields(row, table, where, "remove the line", needed=True))
    return rows


def read_row(line, where):
    """A line of metrics.jsonl or samples.jsonl. InputError if it is no JSON object with a step."""
    row = parse_json(line, where, "remove the line")
    return check_fields(row, {"step": "a whole number"}, where, "remove the line", needed=True)


def summarise(out):
    """The figures of a whole run: sums over its steps, means over their first and last fifth, and validations."""
    rows = read_metrics(out)
    steps = [row for row in rows if row["step"] > 0]  # before the first step there is a validation only
    if not steps:
        raise InputError(f"{out}/metrics.jsonl: no step of this run is left in it; start again with another --out")
    summary = {"steps": len(steps)}
    for name in SUMS:
        if name in steps[-1]:
            summary[name] = round(sum(row.get(name, 0) for row in steps), 1)
    validations = [figures for figures in map(valid_metrics, rows) if figures] or [{}]
    fifth = math.ceil(len(steps) / 5)
    for key, part, figures in (("first", steps[:fifth], validations[0]), ("last", steps[-fifth:], validations[-1])):
        values = {name: [row[name] for row in part if name in row] for name in CURVES}
        summary[key] = {name: statistics.fmean(of) for name, of in values.items() if of} | figures
    return summary


def valid_metrics(row):
    """The validation metrics of a step."""
    return {name: value for name, value in row.items() if name.startswith("valid_")}


def finish_run(args, model, show_examples):
    """Write the model and the summary of a finished run, then print examples and summary. Its last checkpoint has the
    same weights."""
    out = Path(args.out)
    memory = peak_memory(model.head_weight.device)
    model.save_pretrained(out / "model", getattr(torch, args.save_dtype))
    wait_for_ranks()  # as in `save_checkpoint`
    if rank() == 0:
        if args.think:  # from now on the model's own; `serve` and others need no flag
            config = out / "model/tokenizer_config.json"
            write_json(config, read_optional(config) | {"default_think": args.think})
        summary = summarise(out) | memory
        write_json(out / "summary.json", summary)
    wait_for_ranks()
    if rank() == 0:
        show_examples()
        first, last = summary.pop("first"), summary.pop("last")
        for name, value in first.items():
            if name in last:
                label = f"held-out {name[6:]}" if name.startswith("valid_") else f"{name}, first and last fifth"
                summary[label] = f"{value:.4f} -> {last[name]:.4f}"
        print()
        print_table(summary.items())
        if summary.get("groups_kept") == 0:
            print("\nThe weights are as before: no group had a learning signal. samples.jsonl may show why; "
                  "do --think and --max-new-tokens suit the model?")
        print(f"\nThe model is in {out}/model: python star.py chat --model {out}/model --tools FILE")


def describe_batch(batch, seconds):
    """Sizes and speed of an optimiser batch; packed tokens are those of prompts and responses, once each."""
    packed = sum(group.length for group in batch)
    sequences = sum(len(group.responses) for group in batch)
    return {"tokens": counted_tokens(batch), "packed_tokens": packed, "sequences": sequences,
            "seconds": seconds, "tokens_per_s": packed / seconds}


def memory_in_use(device):
    """{"memory_gb"}: held now by tensors (on a GPU) or by this process (on Linux); elsewhere the peak so far."""
    if device.type == "cuda":
        return {"memory_gb": round(torch.cuda.memory_allocated() / 1e9, 3)}
    if sys.platform != "linux":
        return {"memory_gb": peak_memory(device)["peak_memory_gb"]}
    pages = int(Path("/proc/self/statm").read_text().split()[1])  # resident
    return {"memory_gb": round(pages * resource.getpagesize() / 1e9, 3)}


def peak_memory(device):
    """{"peak_memory_gb"}: the GPU's own count, or the resident size of this process."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        size = torch.cuda.max_memory_allocated()
    return {"peak_memory_gb": round(size / 1e9, 2)}


def log_step(out, row):
    """Log a step, and print its validation figures on stderr."""
    log_metrics(out, [row])
    figures = [f"{name[6:]} {value:.4f}" for name, value in valid_metrics(row).items()]
    if figures and rank() == 0:
        line = f"step {row['step']:5d}, held out:  " + "  ".join(figures)
        tqdm.write(line, file=sys.stderr)


def show_answers(samples):
    """Print three held-out prompts with the answers before and after training."""
    for sample in samples[:3]:
        print()
        for name, text in sample.items():
            print(f"{name:8s} {one_line(text)}")


def describe_responses(groups, kept):
    """Metrics of all responses of a step, before the filter; then how many groups and counted tokens are kept."""
    responses = [response for group in groups for response in group.responses]
    rewards = [response.reward for response in responses]
    lengths = [len(response.ids) for response in responses]
    mean = statistics.fmean
    return {
        "reward": mean(rewards),
        "reward_std": statistics.pstdev(rewards),
        "answer_score": mean(r.answer_score for r in responses),
        "format_failures": mean(reward <= -1 for reward in rewards),
        "finished": mean(r.finish_reason == "stop" for r in responses),
        "length": mean(lengths),
        "longest": max(lengths),
        "prompt_length": mean(len(group.prompt) for group in groups),
        "groups_drawn": len(groups),
        "groups_kept": len(kept),
        "signal": len(kept) / len(groups),
        "tokens": counted_tokens(kept),
    }


def describe_groups(step, groups, kept, chat):
    """Lines of samples.jsonl, a group each. The long prompt is left out: `record` is the id of its record in --data."""
    kept = set(map(id, kept))
    for group in groups:
        record = group.record
        samples = [{"finish_reason": r.finish_reason, "text": r.text, "reward": r.reward,
                    "answer_score": r.answer_score, **r.details, "advantage": r.advantage} for r in group.responses]
        request = one_line(record["messages"][-1]["content"])
        yield {"step": step, "kept": id(group) in kept, "record": record["id"], "request": request,
               "gold": chat.answer(record), "samples": samples}


def show_samples(out):
    """Print the best and the worst sample of the last three groups of Sim-RL, the last one first."""
    path = Path(out) / "samples.jsonl"
    for _, line in islice(lines_from_end(path), 3):
        group = check_fields(read_row(line, path), GROUP, path, "the run itself is finished", needed=True)
        print(f"\ngold     {one_line(group['gold'])}")
        ranked = sorted(group["samples"], key=lambda sample: -sample["reward"])
        for sample in (ranked[0], ranked[-1]):
            print(f"{sample['reward']:<8.2f} {one_line(sample['text'])}")
    print(f"\nEvery sample is in {path}")

"""`star.py eval` scores a model on records and compares two models; `star.py reward` scores given generations.

`eval` answers each record greedily, and with --n also n times at temperature 1. A metric is a mean over the
records it applies to:

    exact calls        records with gold calls: the same calls in any order, every argument equal
    valid calls        records with gold calls: calls that pass the reward's format check, right or wrong
    correct refusals   records with a gold text: a reply without a call; its text is not compared
    reward             all records: the released reward of the greedy answer (reward.py)
    pass@1, pass@n     records with gold calls: exact calls, averaged over the n samples; in any of them
    reward at T = 1    all records: the mean reward of the n samples
    entropy            all records: -log p per sampled token, in nats; it estimates the policy's entropy

Intervals are 95 % percentile bootstraps over records. Two models are compared on the same records: a
bootstrap of the paired differences, and a permutation test that flips their signs.
"""
import json
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import reward
from data import InputError, natural, one_line, positive, print_table
from data import read_json, write_json, write_lines
from data.chat import Chat, add_prompt_flags
from data.prepare import turns
from data.records import add_data_flags, read_lines
from data.rollouts import append_rollouts, batches_to_sample, finish_rollouts
from data.rollouts import open_rollouts, read_prompts, response_row, score_response
from data.runs import add_output_flags, settings
from model import Transformer
from sampler import add_count_flags, generate
from train import add_machine_flags, open_run, pick_device

RESAMPLES = 5_000
LINE_KEYS = ("prompt", "generation", "label")  # of a line that `reward` scores


# ---- eval --------------------------------------------------------------------------------------------------

def eval_flags(parser):
    add = parser.add_argument
    add("--model", required=True, help="model folder")
    add_data_flags(parser, "records with gold answers")
    add_output_flags(parser, "folder for the generations, their scores and summary.json")
    add("--compare", metavar="DIR",
        help="a second model folder, which is also evaluated (into OUT-compared), "
        "or the --out of an earlier eval on the same records")
    add_count_flags(parser, 0, least=0,
                    n_help="also sample N answers at temperature 1: pass@n, entropy")
    add_prompt_flags(parser)
    add_machine_flags(parser, "weights and compute")


def run_eval(args):
    """Score a model's answers to records with gold answers, with intervals; compare two models on them."""
    out = Path(args.out)
    device = pick_device(args.device)
    models = [(args.model, out)]
    files = [args.data]
    results = []
    if args.compare and (Path(args.compare) / "config.json").exists():
        models.insert(0, (args.compare, Path(f"{out}-compared")))
    elif args.compare:
        results.append(read_evaluation(Path(args.compare)))
        files.append(args.compare)
    runs = []
    for model, folder in models:  # refuse bad input before anything is written
        flags = vars(args) | {"model": model, "out": folder, "compare": None}
        chat = Chat.from_pretrained(model, args.think, args.tools)
        prompts = read_prompts(args.data, chat, args.max_prompt_tokens, args.limit)
        runs.append((Namespace(**flags), chat, *prompts))
    for run, *_ in runs:
        open_run(run, device, [model for model, _ in models], files)
    for run, chat, records, prompts in runs:
        rows = answer_records(run, device, chat, records, prompts)
        results.append((settings(run), rows))
    report(out / "summary.json", *reversed(results))
    print(f"\nThe generations with their scores are in {out}/generations.jsonl")


def answer_records(args, device, chat, records, prompts):
    """Answer the records and score the answers. Returns the records, as written to OUT/generations.jsonl.

    The first of a record's `responses` is greedy. Each has the keys of a rollout and of `score_response`.
    """
    out = Path(args.out) / "generations.jsonl"
    finished, rows = open_rollouts(out, records, resume=True)
    if finished is not None:
        return finished
    draws = [(1, 0.0), (args.n, 1.0)] if args.n else [(1, 0.0)]
    size = max(1, args.max_concurrent // max(1, args.n))
    batches = batches_to_sample(prompts, rows, size)
    model = Transformer.from_pretrained(args.model, getattr(torch, args.dtype), device)
    for start, batch in tqdm(batches, "eval", unit="batch"):
        generator = torch.Generator()
        generator.manual_seed(args.seed * 1_000_003 + start)
        sampled = {i: records[i] | {"responses": []} for i in batch}
        for n, temperature in draws:
            samples = generate(
                model, [prompts[i] for i in batch], n,
                args.max_new_tokens, chat.stop_ids, generator,
                temperature, vocab_size=chat.vocab_size,
            )
            for i, responses in zip(batch, samples):
                for response in responses:
                    response = response_row(chat, response)
                    response |= score_response(chat, records[i], response["text"])
                    sampled[i]["responses"].append(response)
        append_rollouts(out, sampled)
        rows |= sampled
    rows = [rows[i] for i in sorted(rows)]
    finish_rollouts(out, rows)
    return rows


def read_evaluation(folder):
    """(settings, records) of an earlier eval."""
    remedy = "--compare takes a model folder or the --out of an eval"
    saved = read_json(folder / "arguments.json", remedy)
    path = folder / "generations.jsonl"
    try:
        rows = [json.loads(line) for _, line in read_lines(path)]
        metric_values(rows)
    except (ValueError, KeyError, TypeError) as e:
        why = f"is not what eval writes ({type(e).__name__}: {e})"
        raise InputError(f"{path}: {why}; run that eval again") from e
    return saved, rows


# ---- Metrics -----------------------------------------------------------------------------------------------

def record_metrics(row):
    """{metric: value} of one record with scored responses, for the metrics that apply to it."""
    greedy, *samples = row["responses"]
    calls = row["answer"]["tool_calls"]
    metrics = {"reward": greedy["reward"]}
    if calls:
        metrics["exact calls"] = greedy["exact"]
        metrics["valid calls"] = greedy["case"] == "calls and calls"
    else:
        metrics["correct refusals"] = greedy["case"] == "text and text"
    if samples:
        tokens = sum(len(r["ids"]) for r in samples)
        metrics["reward at T = 1"] = np.mean([r["reward"] for r in samples])
        metrics["entropy"] = -sum(r["logprob"] for r in samples) / tokens
    if samples and calls:
        exact = [r["exact"] for r in samples]
        metrics["pass@1"] = np.mean(exact)
        metrics[f"pass@{len(exact)}"] = any(exact)
    return {name: float(value) for name, value in metrics.items()}


def metric_values(rows):
    """{metric: its values} over the records it applies to."""
    values = {}
    for row in rows:
        for name, value in record_metrics(row).items():
            values.setdefault(name, []).append(value)
    return values


def kinds(row):
    """The kinds of a record: by its gold answer, and by its number of turns."""
    calls = len(row["answer"]["tool_calls"])
    kind = ("text", "one call", "several calls")[min(calls, 2)]
    return [kind, "multi-turn" if turns(row) > 1 else "single-turn"]


def bootstrap_ci(values, seed=0):
    """{"mean", "low", "high"}: the mean and its 95 % bootstrap interval."""
    values = np.asarray(values, dtype=float)
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES):
        sample = generator.integers(len(values), size=len(values))
        means.append(values[sample].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def sign_flip_p(differences, seed=0):
    """The p-value of paired differences: how often random signs give a mean at least as far from 0.

    >>> round(sign_flip_p([1.0] * 6), 2), sign_flip_p([0.0] * 6)
    (0.03, 1.0)
    """
    differences = np.asarray(differences, dtype=float)
    generator = np.random.default_rng(seed)
    observed = abs(differences.sum()) - 1e-9
    extreme = 0
    for _ in range(RESAMPLES):
        signs = generator.integers(2, size=len(differences)) * 2 - 1
        extreme += abs(signs @ differences) >= observed
    return float(1 + extreme) / (1 + RESAMPLES)


def summarise(rows):
    """The metrics with intervals, and their means "by" kind and source."""
    metrics = {}
    for name, values in metric_values(rows).items():
        metrics[name] = bootstrap_ci(values) | {"items": len(values)}
    by = {}
    for names in (kinds, lambda row: [row["source"]]):
        counts = Counter(name for row in rows for name in names(row))
        for group, count in counts.most_common():
            values = metric_values([row for row in rows if group in names(row)])
            means = {name: float(np.mean(values[name])) for name in values}
            by[group] = {"items": count} | means
    return {"items": len(rows), "metrics": metrics, "by": by}


def record_key(row):
    """A string that is the same for the same record."""
    return json.dumps([row[name] for name in ("id", "messages", "tools", "answer")])


def compare(rows, others):
    """{metric: {"mean", "low", "high", "p", "items"}} of the paired differences rows - others."""
    others = {record_key(row): record_metrics(row) for row in others}
    differences = {}
    for row in rows:
        other = others.get(record_key(row), {})
        for name, value in record_metrics(row).items():
            if name in other:
                differences.setdefault(name, []).append(value - other[name])
    if not differences:
        raise InputError("--compare: the two evaluations have no record in common; "
                         "run both on the same --data")
    for name, values in differences.items():
        p = sign_flip_p(values)
        differences[name] = bootstrap_ci(values) | {"p": p, "items": len(values)}
    return differences


# ---- The report --------------------------------------------------------------------------------------------

def report(path, result, other=None):
    """Write the summary of an evaluation, then print it. result, other to compare: (settings, records)."""
    flags, rows = result
    summary = {"model": str(flags["model"])} | summarise(rows)
    write_json(path, summary)
    notes = []
    if other:
        other_flags, other_rows = other
        summary["compared_with"] = {"model": str(other_flags["model"])} | summarise(other_rows)
        summary["difference"] = compare(rows, other_rows)
        write_json(path, summary)
        changed = [name for name in sorted(flags) if flags[name] != other_flags.get(name)]
        changed = [name for name in changed if name != "model"]
        if changed:
            notes.append(f"The two evaluations differ in {', '.join(changed)}.")
        items = summary["difference"]["reward"]["items"]
        if items < max(len(rows), len(other_rows)):
            notes.append(f"Differences are over the {items} records that both have.")
    print_answers(rows)
    print_means(summary)
    print("\n".join(["", *notes]))
    print_intervals(summary)


def print_answers(rows):
    """Print three requests for calls, with their answers."""
    for row in [row for row in rows if row["answer"]["tool_calls"]][:3]:
        calls = row["answer"]["tool_calls"]
        gold = " ".join(f"{call['name']}({call['arguments']})" for call in calls)
        answer = row["responses"][0]
        print(f"\nrequest  {one_line(row['messages'][-1]['content'])}")
        print(f"gold     {one_line(gold)}\nanswer   {one_line(answer['text'])}")
        print(f"reward   {answer['reward']:.3f}, {answer['case']}")


def print_means(summary):
    """Print the mean of each metric by kind and source."""
    names = list(summary["metrics"])
    table = [["by kind and source", "items", *names]]
    for group, means in summary["by"].items():
        cells = [f"{means[name]:.3f}" if name in means else "" for name in names]
        table.append([group, means["items"], *cells])
    print()
    print_table(table)


def print_intervals(summary):
    """Print each metric with its interval, and the comparison if there is one."""
    other = summary.get("compared_with")
    table = [["", "items", summary["model"]]]
    if other:
        table[0] += [other["model"], "difference", "more than chance?"]
    for name, metric in summary["metrics"].items():
        line = [name, metric["items"], interval(metric)]
        if other and name in summary["difference"]:
            difference = summary["difference"][name]
            chance = "yes" if difference["p"] < 0.05 else "no"
            chance += f" (p = {difference['p']:.4f})"
            line += [interval(other["metrics"][name]), interval(difference, "+"), chance]
        table.append(line)
    print_table(table)
    note = "; differences paired by item, p from sign flips" if other else ""
    print(f"\n95 % bootstrap intervals over items{note}")


def interval(metric, sign=""):
    """`mean [low, high]`. sign: "+" writes the sign of positive numbers."""
    mean, low, high = [f"{metric[name]:{sign}.3f}" for name in ("mean", "low", "high")]
    return f"{mean} [{low}, {high}]"


# ---- reward ------------------------------------------------------------------------------------------------

def reward_flags(parser):
    add = parser.add_argument
    add("--data", required=True,
        help="lines of prompt, generation and label, .jsonl or .jsonl.gz")
    add("--out", metavar="FILE", help="file to write; default: the terminal")
    add("--explain", type=positive, metavar="LINE",
        help="explain the reward of this line instead")
    add("--think", choices=("on", "none"), default="on",
        help="none: for models without think tags, require no think block")
    add("--strip-eos", action="store_true",
        help="cut text replies at the end token; in the released reward it counts, "
        "so that an empty reply to a short refusal scores 0.5")
    add("--binary", action="store_true", help="1 or 0, the paper's ablation")


def run_reward(args):
    """Print the reward and answer score of each line of {"prompt", "generation", "label"}, as JSON lines."""
    if args.out and Path(args.out).exists():
        raise InputError(f"{args.out}: exists already; use another --out")
    if args.out:
        write_lines(args.out, score_file(args))
    else:
        sys.stdout.writelines(score_file(args))


def score_file(args):
    """Yield {"reward", "answer_score"} of each line as JSON, or only the explanation of line --explain."""
    options = (args.think, args.strip_eos, args.binary)
    empty = True
    lines = read_lines(Path(args.data))
    for number, line in tqdm(lines, "reward", unit=" lines", disable=bool(args.explain)):
        if not line.strip() or args.explain not in (None, number):
            continue
        empty = False
        prompt, generation, label = read_line(line, f"{args.data}:{number}")
        tools = reward.tools_in(prompt)
        result = reward.score(prompt + generation, label, tools, *options)
        if args.explain:
            page = f"wrote   {one_line(generation)}\ngold    {one_line(label)}\n\n"
            page += reward.explain(result) + "\n"
            yield page.encode(errors="replace").decode()  # half a surrogate pair cannot be printed
            return
        scores = {name: result[name] for name in ("reward", "answer_score")}
        yield json.dumps(scores) + "\n"
    if empty:
        raise InputError(f"{args.data}: has no line {args.explain or 1}; "
                         "give a file with one JSON object a line")


def read_line(line, where):
    """The prompt, generation and label of a line. where: "file:line" for errors."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as e:
        why = f"not JSON ({e})"
        raise InputError(f"{where}: {why}; each line must be one JSON object") from e
    values = [item.get(key) for key in LINE_KEYS] if isinstance(item, dict) else [None]
    if not all(isinstance(value, str) for value in values):
        raise InputError(f"{where}: lacks one of {', '.join(LINE_KEYS)}, each a string; add it")
    return values

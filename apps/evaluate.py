"""`star.py eval` and `star.py reward`: score a model on records, compare two models, score a file of generations.

`eval` answers each record greedily, and with --n also n times at temperature 1. Its metrics, as means over the
records they apply to:

    exact calls        of records with gold calls: the same calls in any order, every argument equal
    valid calls        of the same records: calls that pass the reward's format check, right or wrong
    correct refusals   of records with a gold text: a reply without a call, whatever its text
    reward             of all records: the released reward of the greedy answer (reward.py)
    pass@1, pass@n     of records with gold calls: exact calls, averaged over the samples; in any of them
    reward at T = 1    of all records: the mean reward of the samples
    entropy            of all records: -log p per sampled token, in nats, an estimate of the policy's entropy

Intervals are 95 % percentile bootstraps over records. Two models are compared record by record: a bootstrap of
the paired differences, and a permutation test that flips their signs.
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
from sampler import add_length_flag, generate
from train import add_machine_flags, open_run, pick_device, torch_dtype

RESAMPLES = 5_000
LINE_KEYS = ("prompt", "generation", "label")  # of a line that `reward` scores


# ---- eval ---------------------------------------------------------------------------------------------------

def eval_flags(parser):
    add = parser.add_argument
    add("--model", required=True, help="model folder")
    add_data_flags(parser, "records with gold answers")
    add_output_flags(parser, "folder for the generations, their scores and summary.json")
    add("--compare", metavar="DIR",
        help="a second model folder, which is also evaluated (into OUT-compared), "
        "or the --out of an earlier eval on the same records")
    add("--n", type=natural, default=0,
        help="also sample N answers at temperature 1: pass@n, entropy")
    add("--max-concurrent", type=positive, default=64, metavar="N",
        help="sequences generated concurrently")
    add_length_flag(parser)
    add_prompt_flags(parser)
    add_machine_flags(parser, "weights and compute")


def run_eval(args):
    """Score a model's answers to records with gold answers, with intervals; compare two models on them."""
    out = Path(args.out)
    device = pick_device(args.device)
    folders = {args.model: out}
    files = [args.data]
    results = []
    if args.compare and (Path(args.compare) / "config.json").exists():
        folders = {args.compare: Path(f"{out}-compared"), args.model: out}
    elif args.compare:
        results.append(read_evaluation(Path(args.compare)))
        files.append(args.compare)
    runs = []
    for model, folder in folders.items():  # refuse bad input before anything is written
        chat = Chat.from_pretrained(model, args.think, args.tools)
        records, prompts = read_prompts(args.data, chat, args.max_prompt_tokens, args.limit)
        flags = vars(args) | {"model": model, "out": folder, "compare": None}
        runs.append((Namespace(**flags), chat, records, prompts))
    for flags, *_ in runs:
        open_run(flags, device, list(folders), files)
    for run in runs:
        results.append((settings(run[0]), answer_records(*run, device)))
    report(out / "summary.json", *results[::-1])
    print(f"\nThe generations with their scores are in {out}/generations.jsonl")


def answer_records(args, chat, records, prompts, device):
    """Answer the records, score the answers, and write both to OUT/generations.jsonl.

    Returns the written records. The first of the `responses` is greedy. Each has {"text", "ids", "finish_reason",
    "logprob", "reward", "answer_score", "case", "exact"}.
    """
    out = Path(args.out) / "generations.jsonl"
    finished, rows = open_rollouts(out, records, resume=True)
    if finished is not None:
        return finished
    size = max(1, args.max_concurrent // max(1, args.n))
    batches = batches_to_sample(prompts, rows, size)
    model = Transformer.from_pretrained(args.model, torch_dtype(args.dtype), device)
    for start, batch in tqdm(batches, "eval", unit="batch"):
        generator = torch.Generator()
        generator.manual_seed(args.seed * 1_000_003 + start)
        responses = [[] for _ in batch]
        for n, temperature in ((1, 0.0), (args.n, 1.0)):
            if n == 0:
                continue
            samples = generate(
                model, [prompts[i] for i in batch], n,
                args.max_new_tokens, chat.stop_ids, generator,
                temperature, vocab_size=chat.vocab_size,
            )
            responses = [a + b for a, b in zip(responses, samples)]
        sampled = {}
        for i, answers in zip(batch, responses):
            answers = [response_row(chat, answer) for answer in answers]
            for answer in answers:
                answer |= score_response(chat, records[i], answer["text"])
            sampled[i] = records[i] | {"responses": answers}
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


# ---- Metrics ------------------------------------------------------------------------------------------------

def record_metrics(row):
    """{metric: value} of one record with scored responses, for the metrics that apply to it."""
    greedy, *samples = row["responses"]
    calls = bool(row["answer"]["tool_calls"])
    metrics = {"reward": greedy["reward"]}
    if calls:
        metrics["exact calls"] = greedy["exact"]
        metrics["valid calls"] = greedy["case"] == "calls and calls"
    else:
        metrics["correct refusals"] = greedy["case"] == "text and text"
    if samples:
        metrics["reward at T = 1"] = np.mean([r["reward"] for r in samples])
        tokens = sum(len(r["ids"]) for r in samples)
        metrics["entropy"] = -sum(r["logprob"] for r in samples) / tokens
    if samples and calls:
        exact = [r["exact"] for r in samples]
        metrics["pass@1"] = np.mean(exact)
        metrics[f"pass@{len(exact)}"] = any(exact)
    return {name: float(value) for name, value in metrics.items()}


def metric_values(rows):
    """{metric: values over the records it applies to}."""
    values = {}
    for row in rows:
        for name, value in record_metrics(row).items():
            values.setdefault(name, []).append(value)
    return values


def kinds(row):
    """The kinds of a record: by its gold answer, and by its number of turns."""
    calls = len(row["answer"]["tool_calls"])
    kind = "text" if calls == 0 else "one call" if calls == 1 else "several calls"
    return [kind, "multi-turn" if turns(row) > 1 else "single-turn"]


def group_rows(rows):
    """{kind or source: its records}: kinds first, larger groups first."""
    groups = {}
    for names in ([kinds(row) for row in rows], [[row["source"]] for row in rows]):
        counts = Counter(name for row_names in names for name in row_names)
        for name, _ in counts.most_common():
            groups[name] = [row for row, row_names in zip(rows, names) if name in row_names]
    return groups


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
    """{"items", "metrics": {metric: {mean, low, high, items}}, "by": {kind or source: {"items", metric: mean}}}."""
    metrics = {}
    for name, values in metric_values(rows).items():
        metrics[name] = bootstrap_ci(values) | {"items": len(values)}
    by = {}
    for group, members in group_rows(rows).items():
        by[group] = {"items": len(members)}
        for name, values in metric_values(members).items():
            by[group][name] = float(np.mean(values))
    return {"items": len(rows), "metrics": metrics, "by": by}


def record_key(row):
    """A text that two rows share if they are the same record."""
    return json.dumps([row[name] for name in ("id", "messages", "tools", "answer")])


def compare(rows, others):
    """{metric: {"mean", "low", "high", "p", "items"}} of the differences rows - others, on the records of both."""
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
    result = {}
    for name, values in differences.items():
        result[name] = bootstrap_ci(values) | {"p": sign_flip_p(values), "items": len(values)}
    return result


# ---- The report ---------------------------------------------------------------------------------------------

def report(path, result, other=None):
    """Write the summary of an evaluation, and of its comparison with another one; then print it.

    result, other: (settings, records)
    """
    flags, rows = result
    summary = {"model": str(flags["model"])} | summarise(rows)
    write_json(path, summary)
    if other:
        summary["compared_with"] = {"model": str(other[0]["model"])} | summarise(other[1])
        summary["difference"] = compare(rows, other[1])
        write_json(path, summary)
    print_answers(rows)
    print_groups(summary)
    if other:
        items = summary["difference"]["reward"]["items"]
        if items < max(len(rows), len(other[1])):
            print(f"\nof {len(rows)} and {len(other[1])} records, {items} are in both; "
                  "the differences are over these")
        changed = [name for name in sorted(flags) if flags[name] != other[0].get(name)]
        changed = [name for name in changed if name != "model"]
        if changed:
            print(f"\nthe two evaluations differ in {', '.join(changed)}")
    print_metrics(summary)


def print_answers(rows):
    """Print three requests for calls, with their answers and rewards."""
    called = [row for row in rows if row["answer"]["tool_calls"]]
    for row in called[:3]:
        calls = row["answer"]["tool_calls"]
        gold = " ".join(f"{call['name']}({call['arguments']})" for call in calls)
        answer = row["responses"][0]
        print(f"\nrequest  {one_line(row['messages'][-1]['content'])}")
        print(f"gold     {one_line(gold)}")
        print(f"answer   {one_line(answer['text'])}")
        print(f"reward   {answer['reward']:.3f}, {answer['case']}")


def print_groups(summary):
    """Print the mean of each metric by kind and source."""
    names = list(summary["metrics"])
    table = [["by kind and source", "items", *names]]
    for group, means in summary["by"].items():
        cells = [f"{means[name]:.3f}" if name in means else "" for name in names]
        table.append([group, means["items"], *cells])
    print()
    print_table(table)


def print_metrics(summary):
    """Print each metric with its interval, and the comparison if there is one."""
    other = summary.get("compared_with")
    head = ["", "items", summary["model"]]
    note = "95 % bootstrap intervals over items"
    if other:
        head += [other["model"], "difference", "more than chance?"]
        note += "; differences paired by item, p from sign flips"
    table = [head]
    for name, metric in summary["metrics"].items():
        line = [name, metric["items"], format_interval(metric)]
        if other and name in summary["difference"]:
            change = summary["difference"][name]
            significant = "yes" if change["p"] < 0.05 else "no"
            line.append(format_interval(other["metrics"][name]))
            line.append(format_interval(change, "+"))
            line.append(f"{significant} (p = {change['p']:.4f})")
        table.append(line)
    print()
    print_table(table)
    print(f"\n{note}")


def format_interval(metric, sign=""):
    """`mean [low, high]`. sign: "+" writes the sign of positive numbers."""
    mean, low, high = (f"{metric[name]:{sign}.3f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


# ---- reward -------------------------------------------------------------------------------------------------

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
    lines = score_file(args)
    if args.out:
        write_lines(args.out, lines)
    else:
        sys.stdout.writelines(lines)


def score_file(args):
    """Yield {"reward", "answer_score"} of each line as JSON, or the explanation of line --explain alone."""
    lines = read_lines(Path(args.data))
    if not args.explain:
        lines = tqdm(lines, "reward", unit=" lines")
    count = 0
    for number, line in lines:
        if not line.strip() or args.explain not in (None, number):
            continue
        count += 1
        prompt, generation, label = read_line(line, f"{args.data}:{number}")
        result = reward.score(prompt + generation, label, reward.tools_in(prompt),
                              args.think, args.strip_eos, args.binary)
        if not args.explain:
            scores = {name: result[name] for name in ("reward", "answer_score")}
            yield json.dumps(scores) + "\n"
            continue
        page = f"wrote   {one_line(generation)}\ngold    {one_line(label)}\n\n{reward.explain(result)}\n"
        yield page.encode(errors="replace").decode()  # half a surrogate pair cannot be printed
    if not count:
        raise InputError(f"{args.data}: has no line {args.explain or 1}; "
                         "give a file with one JSON object a line")


def read_line(line, where):
    """The prompt, generation and label of a line. where: "file:line" for errors."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not JSON ({e}); each line must be one whole JSON object") from e
    values = [item.get(key) for key in LINE_KEYS] if isinstance(item, dict) else [None]
    if not all(isinstance(value, str) for value in values):
        raise InputError(f"{where}: lacks one of {', '.join(LINE_KEYS)}, each a string; add it")
    return values

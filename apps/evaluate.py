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
bootstrap of the paired differences, and a permutation test that flips their signs. An interval of values that are all
equal, such as 0 of 200, has no width: read it as "about 3 in 200 at most".
"""
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import reward
from apps.rollout import print_examples, read_inputs, sample_responses
from data import InputError, one_line, parse_json, positive, print_table, read_json, write_json
from data.chat import add_prompt_flags
from data.fields import check_fields
from data.records import add_data_flags, read_lines
from data.rollouts import finish_rollouts, read_rows, score_response
from data.runs import add_output_flags, check_folder, prepare_folder
from sampler import add_count_flags
from train import add_machine_flags, fail_together, pick_device, rank

RESAMPLES = 5_000
INTERVAL = "{mean:.3f} [{low:.3f}, {high:.3f}]"
NONE_IN_COMMON = "--compare: the two evaluations have no record in common; run both on the same --data"
LINE_KEYS = dict.fromkeys(("prompt", "generation", "label"), "text")  # of a line that `reward` scores


def eval_flags(parser):
    add = parser.add_argument
    add("--model", required=True, help="model folder")
    add_data_flags(parser, "records with gold answers")
    add_output_flags(parser, "folder for the generations, their scores and summary.json")
    add("--compare", metavar="DIR", help="a second model folder, which is also evaluated (into "
        "OUT-compared), or the --out of an earlier eval on the same records")
    add_count_flags(parser, 0, 0, "also sample N answers at temperature 1: pass@n, entropy")
    add_prompt_flags(parser)
    add_machine_flags(parser, "weights and compute")


def run_eval(args):
    """Score a model's answers to records with gold answers, with intervals; compare two models. Under `torchrun` the
    ranks share the records (not run on several GPUs); the files are those of one process, up to rounding."""
    device = pick_device(args)
    runs = [args]
    results = []
    with fail_together():  # refuse bad input before anything is written
        if args.compare and (Path(args.compare) / "config.json").exists():
            flags = vars(args) | {"model": args.compare, "out": f"{Path(args.out)}-compared"}
            runs.insert(0, Namespace(**flags))
            if Path(args.data).is_fifo():
                raise InputError(f"{args.data}: is a pipe, and two models read it; give a file")
        elif args.compare:
            remedy = "--compare takes a model folder or the --out of an eval"
            path = Path(args.compare) / "arguments.json"
            flags = check_fields(read_json(path, remedy), {"model": "text"}, path, remedy, needed=True)
            answers = path.with_name("generations.jsonl")
            if not answers.exists():
                raise InputError(f"{args.compare}: is no finished eval; {remedy}")
            results.append((flags["model"], read_rows(answers, scored=True)))
        inputs = [read_inputs(run) for run in runs]
        if results:
            others = set(map(identity, results[0][1]))
            if others.isdisjoint(identity(group.record) for group in inputs[0][1]):
                raise InputError(NONE_IN_COMMON)
        for run in runs if rank() == 0 else ():  # refuse both before anything is written
            check_folder(run)
        for run in runs if rank() == 0 else ():
            prepare_folder(run, [run.model, run.data])
    for run, (chat, groups) in zip(runs, inputs):
        results.append((run.model, answer_records(run, chat, groups, device)))
    with fail_together():
        if rank() == 0:
            report(Path(args.out), *reversed(results))


def answer_records(args, chat, groups, device):
    """Answer the records and score the answers. Returns them with `responses`, on rank 0; the first is greedy."""
    out = Path(args.out) / "generations.jsonl"
    draws = [(n, temperature, 1.0) for n, temperature in ((1, 0.0), (args.n, 1.0)) if n]  # n, temperature, top_p
    finished, rows = sample_responses(args, out, chat, groups, draws, device)
    with fail_together():
        if finished and [row["id"] for row in finished] != [group.record["id"] for group in groups]:
            raise InputError(f"{out}: has lost records; remove it, and the run answers them again")
        for row in tqdm(rows, "score", unit="record", delay=2):
            for response in row["responses"]:
                response.update(score_response(chat, row, response["text"]))
        if rows:
            finish_rollouts(out, rows)
    return finished or rows


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
        tokens = max(1, sum(len(r["ids"]) for r in samples))
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


def bootstrap_ci(values):
    """{"mean", "low", "high"}: the mean and its 95 % bootstrap interval."""
    values = np.asarray(values, dtype=float)
    generator = np.random.default_rng(0)
    means = [generator.choice(values, len(values)).mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def sign_flip_p(differences):
    """The p-value of paired differences: how often random signs give a mean at least as far from 0.

    >>> round(sign_flip_p([1.0] * 6), 2), sign_flip_p([0.0] * 6)
    (0.03, 1.0)
    """
    differences = np.asarray(differences, dtype=float)
    generator = np.random.default_rng(0)
    observed = abs(differences.sum()) - 1e-9
    extreme = 0
    for _ in range(RESAMPLES):
        signs = generator.integers(2, size=len(differences)) * 2 - 1
        extreme += abs(signs @ differences) >= observed
    return float(1 + extreme) / (1 + RESAMPLES)


def summarise(rows):
    """The number of records, and the metrics with intervals."""
    metrics = {name: bootstrap_ci(values) | {"items": len(values)} for name, values in metric_values(rows).items()}
    return {"items": len(rows), "metrics": metrics}


def identity(record):
    """What makes two records the same, as text."""
    return json.dumps([record[key] for key in ("id", "messages", "tools", "answer")])


def compare(rows, others):
    """{metric: {"mean", "low", "high", "p", "items"}} of the paired differences rows - others."""
    others = {identity(row): record_metrics(row) for row in others}
    differences = {}
    for row in rows:
        other = others.get(identity(row), {})
        for name, value in record_metrics(row).items():
            if name in other:
                differences.setdefault(name, []).append(value - other[name])
    if not differences:
        raise InputError(NONE_IN_COMMON)
    return {name: bootstrap_ci(values) | {"p": sign_flip_p(values), "items": len(values)}
            for name, values in differences.items()}


def report(out, result, other=None):
    """Write OUT/summary.json, then print it. result, other to compare: (model, records)."""
    model, rows = result
    summary = {"model": model} | summarise(rows)
    table = [["", "items", model]]
    note = "95 % bootstrap intervals over items"
    difference = {}
    if other:
        difference = compare(rows, other[1])
        compared = {"model": other[0]} | summarise(other[1])
        summary |= {"compared_with": compared, "difference": difference}
        table[0] += [other[0], "difference", "significant?"]
        note += f"; differences paired by item, {difference['reward']['items']} in both; p from sign flips"
    for name, metric in summary["metrics"].items():
        line = [name, metric["items"], INTERVAL.format(**metric)]
        if name in difference:
            paired = INTERVAL.replace(":", ":+").format(**difference[name])
            p = difference[name]["p"]
            chance = f"{'yes' if p < 0.05 else 'no'} (p = {p:.4f})"
            line += [INTERVAL.format(**compared["metrics"][name]), paired, chance]
        table.append(line)
    write_json(out / "summary.json", summary)
    print_examples(rows)
    print()
    print_table(table)
    print(f"\n{note}\n\nThe generations with their scores are in {out}/generations.jsonl")


def reward_flags(parser):
    add = parser.add_argument
    add("--data", required=True, help="lines of prompt, generation and label, .jsonl or .jsonl.gz")
    add("--explain", type=positive, metavar="LINE", help="explain the reward of this line instead")
    add("--think", choices=("on", "none"), default="on",
        help="none: for models without think tags, require no think block")
    add("--strip-eos", action="store_true", help="cut text replies at the end token; in the "
        "released reward it counts, so that an empty reply to a short refusal scores 0.5")
    add("--binary", action="store_true", help="1 if exact, else 0; -1 for a format failure: the paper's ablation")


def run_reward(args):
    """Print the reward and answer score of each line of {"prompt", "generation", "label"}, as JSON lines."""
    scores = []
    for number, line in tqdm(read_lines(Path(args.data)), "reward", unit=" lines", disable=bool(args.explain)):
        if args.explain not in (None, number):
            continue
        where = f"{args.data}:{number}"
        item = parse_json(line, where, "each line must be one JSON object")
        check_fields(item, LINE_KEYS, where, "each line has a prompt, a generation and a label", needed=True)
        prompt, generation, label = (item[name] for name in LINE_KEYS)
        options = (reward.tools_in(prompt), args.think, args.strip_eos, args.binary)
        result = reward.score(prompt + generation, label, *options)
        if args.explain:
            print(f"wrote   {one_line(generation)}\ngold    {one_line(label)}\n\n{explain(result)}")
            return
        scores.append({name: result[name] for name in ("reward", "answer_score")})
    if not scores:
        raise InputError(f"{args.data}: has no line {args.explain or 1}; give one JSON object a line")
    sys.stdout.writelines(json.dumps(score) + "\n" for score in scores)  # after a bad line, nothing is printed


def explain(result):
    """Explain a result of `reward.score` in text: which call matches which, and the similarity of each argument."""
    lines = [f"case    {result['case']}",
             f"reward  {result['reward']:.6g}   answer score {result['answer_score']:.6g}"]
    calls = result["calls"] or []
    gold = result["gold"] or []
    for call, (i, similarity) in zip(calls, result["pairs"]):
        name = json.dumps(call["name"])
        if i is None:
            lines.append(f"\n{name}: no gold call of this name is left")
        else:
            lines.append(f"\n{name}: matches gold call {i + 1}, similarity {similarity:.4g}")
            lines += explain_arguments(call["arguments"], gold[i]["arguments"])
    lines += [f"\n{json.dumps(gold[i]['name'])}: gold call {i + 1} is unmatched" for i in result["left"]]
    if result["pairs"]:
        total = sum(similarity for _, similarity in result["pairs"])
        left = len(result["left"])
        ratio = total / (len(calls) + left)
        lines.append(f"\n{total:.6g} / ({len(calls)} calls + {left} unmatched gold calls) = {ratio:.6g}")
    return "\n".join(lines)


def explain_arguments(arguments, gold):
    """A line for each argument of two matched calls."""
    lines = []
    for name in arguments | gold:
        value, gold_value = (json.dumps(side[name]) if name in side else "-" for side in (arguments, gold))
        shared = name in arguments and name in gold
        similarity = reward.value_similarity(arguments[name], gold[name]) if shared else 0.0
        lines.append(f"    {similarity:6.4f}  {json.dumps(name)}: {value}   gold {gold_value}")
    return lines

"""How good a model is on records: its generations, scored; means with intervals; two models on the same items.

Each record is answered greedily, and with n > 0 also n times at temperature 1. What is counted, over the items where
it can be:

    exact calls        of those with gold calls: the same calls in any order, every argument equal
    valid calls        of the same: calls that pass the reward's format check, right or wrong
    correct refusals   of those with a gold text: a reply without a call, whatever it says
    reward             of all: the released reward of the greedy answer (reward.py)
    pass@1, pass@n     of those with gold calls: exact calls among the n samples, on average and at least once
    reward at T = 1    of all: the samples' mean reward
    entropy            of all: the samples' -log p over their tokens, in nats, which estimates the policy's entropy

Intervals are 95 % percentile bootstraps over items. Two models are compared item by item: a bootstrap of the paired
differences, and a permutation test that flips their signs.
"""
import json
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

import reward
from data import InputError, write_json
from data.prepare import turns
from data.rollouts import as_written, judge, write_rollouts
from data.show import columns, one_line
from data.sources import read_lines

RESAMPLES = 5_000
PARTS = ("prompt", "generation", "label")  # of a line that `star.py reward` scores


def generate(load, chat, records, prompts, out, n=0, rows=64, max_new_tokens=512, seed=42):
    """Answer records, score the answers and write both to `out`/generations.jsonl.

    load: loads the model, once it is wanted · chat: its Chat · records, prompts: from `rollouts.read_prompts` · n:
    samples at temperature 1 beside the greedy answer · the rest as in `rollouts.rollout`. Goes on with what a stopped
    run left there. Returns the written records: the first of a record's `responses` is the greedy one; each has
    {"text", "ids", "finish_reason", "logprob", "reward", "answer_score", "case", "exact"}.
    """
    import torch

    import simrl
    model = None

    def sample(members, at):
        nonlocal model
        model = model or load()
        batch = [prompts[i] for i in members]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + at)
        found = [[] for _ in batch]
        for samples, temperature in ((1, 0.0), (n, 1.0))[:2 if n else 1]:
            groups = simrl.generate(model, batch, samples, max_new_tokens, chat.stop_ids, generator, temperature,
                                    width=chat.vocab_size)
            found = [have + group for have, group in zip(found, groups)]
        responses = [[as_written(chat, s) for s in group] for group in found]
        return [[r | judge(chat, records[i], r["text"]) for r in group] for i, group in zip(members, responses)]

    return write_rollouts(sample, records, prompts, Path(out) / "generations.jsonl", max(1, rows // max(n, 1)),
                          resume=True, name="eval")


def score_file(path, only=None, **options):
    """Yield a line {"reward", "answer_score"} for each line {"prompt", "generation", "label"} of a .jsonl[.gz] file.

    only: the number of the one line whose page is wanted instead: what was written, the gold label, and
    `reward.explain` · options: see `reward.score`. InputError for a line that is none.
    """
    found = False
    for number, line in tqdm(read_lines(Path(path)), desc="reward", unit=" lines", disable=only is not None):
        if line.strip() and only in (None, number):
            try:
                given = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise InputError(f"{path}:{number}: not JSON ({e}); each line must be one whole JSON object") from e
            if not isinstance(given, dict) or not all(isinstance(given.get(name), str) for name in PARTS):
                raise InputError(f"{path}:{number}: lacks one of {', '.join(PARTS)}, each of them text; add it")
            prompt, generation, label = (given[name] for name in PARTS)
            found = True
            result = reward.score(prompt + generation, label, reward.tools_in(prompt), **options)
            if only is None:
                yield json.dumps({name: result[name] for name in ("reward", "answer_score")}) + "\n"
            else:
                page = f"wrote   {one_line(generation)}\ngold    {one_line(label)}\n\n{reward.explain(result)}\n"
                yield page.encode(errors="replace").decode()  # half a surrogate pair cannot be printed
                return
    if not found:
        raise InputError(f"{path}: has no line {only or 1}; give a file with one JSON object a line")


def read(path):
    """The records of a generations.jsonl, as `generate` returned them; InputError for anything else."""
    try:
        rows = [json.loads(line) for _, line in read_lines(Path(path))]
        collect(rows)
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: is not what eval writes ({type(e).__name__}: {e}); run that eval again") from e
    return rows


def measures(row):
    """{name: number} of one record with its scored responses; a name that cannot be counted there is left out."""
    (greedy, *drawn), calls = row["responses"], bool(row["answer"]["tool_calls"])
    found = {"reward": greedy["reward"]}
    if calls:
        found |= {"exact calls": greedy["exact"], "valid calls": greedy["case"] == "calls and calls"}
    else:
        found["correct refusals"] = greedy["case"] == "text and text"
    if drawn:
        found["reward at T = 1"] = np.mean([r["reward"] for r in drawn])
        found["entropy"] = -sum(r["logprob"] for r in drawn) / sum(len(r["ids"]) for r in drawn)
        if calls:
            hits = [r["exact"] for r in drawn]
            found |= {"pass@1": np.mean(hits), f"pass@{len(hits)}": any(hits)}
    return {name: float(value) for name, value in found.items()}


def kinds(row):
    """The kinds of item a record counts among: by its answer, and by its turns."""
    calls = len(row["answer"]["tool_calls"])
    return ["text" if calls == 0 else "one call" if calls == 1 else "several calls",
            "multi-turn" if turns(row) > 1 else "single-turn"]


def interval(values, seed=0):
    """(mean, low, high) with a 95 % bootstrap interval of the mean."""
    values, r = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = [values[r.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    return values.mean(), *np.percentile(means, [2.5, 97.5])


def chance(differences, seed=0):
    """The p-value of paired differences: how often flipping their signs at random gives a mean as far from 0.

    >>> round(chance([1.0] * 6), 2), chance([0.0] * 6)
    (0.03, 1.0)
    """
    d, r = np.asarray(differences, dtype=float), np.random.default_rng(seed)
    as_far = sum(abs((r.integers(2, size=len(d)) * 2 - 1) @ d) >= abs(d.sum()) - 1e-9 for _ in range(RESAMPLES))
    return float(1 + as_far) / (1 + RESAMPLES)


def collect(rows):
    """{name: {index of the row: value}} over rows, in the order in which names first come."""
    values = {}
    for i, row in enumerate(rows):
        for name, value in measures(row).items():
            values.setdefault(name, {})[i] = value
    return values


def summarise(rows):
    """{"items", "metrics": {name: {mean, low, high, items}}, "by": {source or kind: {"items", name: mean}}}."""
    groups = {}
    for names in (kinds, lambda row: [row["source"]]):  # kinds first, the largest groups first
        found = Counter(name for row in rows for name in names(row))
        groups |= {name: [row for row in rows if name in names(row)] for name, _ in found.most_common()}
    return {"items": len(rows), "metrics": {
        name: dict(zip(("mean", "low", "high"), map(float, interval(list(values.values()))))) | {"items": len(values)}
        for name, values in collect(rows).items()},
        "by": {group: {"items": len(members)} | {name: float(np.mean(list(values.values())))
                                                  for name, values in collect(members).items()}
               for group, members in groups.items()}}


def compare(rows, others):
    """{name: {"mean", "low", "high", "p", "items"}} of the paired differences rows - others, on the records of both."""
    def key(row):
        return json.dumps([row[name] for name in ("id", "messages", "tools", "answer")])

    where = {key(row): i for i, row in enumerate(others)}
    pairs = [(i, where[key(row)]) for i, row in enumerate(rows) if key(row) in where]
    if not pairs:
        raise InputError("--compare: the two evaluations have no record in common; run both on the same --data")
    if len(pairs) < max(len(rows), len(others)):
        print(f"\nof {len(rows)} and {len(others)} records, {len(pairs)} are in both: differences are over these")
    mine, theirs, found = collect(rows), collect(others), {}
    for name in [name for name in mine if name in theirs]:
        differences = [mine[name][i] - theirs[name][j] for i, j in pairs if i in mine[name]]
        if differences:
            mean, low, high = map(float, interval(differences))
            found[name] = {"mean": mean, "low": low, "high": high, "p": chance(differences), "items": len(differences)}
    return found


def report(path, made, other=None):
    """Write the summary of one evaluation to `path` and print its tables; with another one, both side by side.

    made, other: (settings, rows) each.
    """
    (settings, rows), model = made, str(made[0]["model"])
    found = {"model": model} | summarise(rows)
    write_json(path, found)

    def cell(m, sign=""):
        return f"{m['mean']:{sign}.3f} [{m['low']:{sign}.3f}, {m['high']:{sign}.3f}]"

    for row in [row for row in rows if row["answer"]["tool_calls"]][:3]:
        gold = " ".join(f"{call['name']}({call['arguments']})" for call in row["answer"]["tool_calls"])
        print(f"\nrequest  {one_line(row['messages'][-1]['content'])}\ngold     {one_line(gold)}\n"
              f"answer   {one_line(row['responses'][0]['text'])}\nreward   {row['responses'][0]['reward']:.3f}, "
              f"{row['responses'][0]['case']}")
    print()
    names = list(found["metrics"])
    columns([["by kind and source", "items", *names]] + [
        [group, figures["items"], *(f"{figures[name]:.3f}" if name in figures else "" for name in names)]
        for group, figures in found["by"].items()])
    print()
    head, lines = ["", "items", model], [[name, m["items"], cell(m)] for name, m in found["metrics"].items()]
    if other is not None:
        if differing := sorted(k for k in settings if k != "model" and settings[k] != other[0].get(k)):
            print(f"the two were made with another {' and another '.join(differing)}\n")
        found |= {"compared_with": {"model": str(other[0]["model"])} | summarise(other[1]),
                  "difference": compare(rows, other[1])}
        write_json(path, found)
        head += [found["compared_with"]["model"], "difference", "more than chance?"]
        for line in [line for line in lines if line[0] in found["difference"]]:
            d = found["difference"][line[0]]
            line += [cell(found["compared_with"]["metrics"][line[0]]), cell(d, "+"),
                     f"{'yes' if d['p'] < 0.05 else 'no'} (p = {d['p']:.4f})"]
    columns([head, *lines])
    print("\n95 % bootstrap intervals over items" + (
        "; differences paired by item, p from sign flips" if other is not None else ""))

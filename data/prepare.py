"""Records to training records: what cannot be learnt from is dropped, the rest labelled, a mix drawn (paper.md 1.7).

    read -> no answer, or one that fails the self-check -> duplicates -> labels -> the quota scan -> prompts too long

A label says what the answer is: response (it has text), single (one call), parallel (more), multi-step (calls right
after a tool's result). single-turn and multi-turn say how far into a conversation it comes.

    quota, of the size    single-turn 0.3   multi-turn 0.7   parallel 0.5   single 0.5   response 0.2   multi-step 0.3

A record is taken while any of its labels is below its quota, until there are 1.1 x size. Quotas are minima that the
scan aims at: it takes what comes, so a label that is rare in the pool ends below its quota, and a pool without a label
can end below the size. Parallel, single and response ask for 1.2 x size together, more than the scan takes: all three
are reached only where some answers have text and calls.

Departures from the released code:
1. Exact duplicates (messages, tools and answer) are dropped.
2. The released scan serves one of four sources, to 50,000; here it goes over all that is read.
3. Prompts are measured by the tokenizer of the model that is given, or not at all (released: Qwen3-8B's).
4. Where paper.md is silent, our reading: `turns` counts system messages; single-turn is one turn; an answer with text
   and calls is a text reply too; sampling down goes on with the random numbers of the shuffle.
"""
import hashlib
import json
import random
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data import InputError, write_lines
from data.show import columns
from data.sources import has_answer, read_records, self_check

QUOTAS = {"single-turn": 0.3, "multi-turn": 0.7, "parallel": 0.5, "single": 0.5, "response": 0.2, "multi-step": 0.3}
MAX_TURNS = 10


def labels(record):
    """What kind of answer it is: a set of response, single, parallel and multi-step."""
    answer, found = record["answer"], set()
    calls = len(answer.get("tool_calls") or [])
    if answer.get("content"):
        found.add("response")
    if calls:
        found.add("single" if calls == 1 else "parallel")
        if record["messages"][-1]["role"] == "tool":
            found.add("multi-step")
    return found


def turns(record):
    """(message index of the answer + 1) // 2, the index counted from 0 in the whole list of messages.

    Our reading: the list is taken as it stands, with a system message and tool results. One system message in front
    changes nothing while two sides alternate, since the division rounds down: user, answer and system, user, answer
    are both 1. A call and its result are a turn.

    >>> turns({"messages": ["system", "user", "call", "result"]})
    2
    """
    return (len(record["messages"]) + 1) // 2


def categories(record):
    """The labels and single-turn or multi-turn: what quotas are for."""
    return labels(record) | {"multi-turn" if turns(record) > 1 else "single-turn"}


def choose(records, size, seed=42, drop=lambda records: records):
    """A mix of about the quotas, at most `size` records: scan a shuffled list, take what is short, sample down.

    drop: takes the 1.1 x size records of the scan and returns those that may stay.
    """
    r, pool, taken, have = random.Random(seed), list(records), [], Counter()
    r.shuffle(pool)
    quota = {name: share * size for name, share in QUOTAS.items()}
    for record in pool:
        if 10 * len(taken) >= 11 * size:
            break
        mine = categories(record)
        full = {name for name in mine if have[name] >= quota[name]}
        if turns(record) > MAX_TURNS or "response" in full or full == mine:
            continue
        taken.append(record)
        have.update(mine)
    taken = drop(taken)
    return r.sample(taken, min(size, len(taken)))


def prepare(paths, out, size=None, chat=None, max_prompt_tokens=8192, seed=42, overwrite=False):
    """Read record files, drop, label and choose, write the rest to `out`, and print what happened to how many.

    out: .jsonl or .jsonl.gz; there whole, or not at all · size: how many to choose; None keeps all, in their order ·
    chat: a model's Chat, to leave out prompts of more than `max_prompt_tokens`; None leaves in all.
    A record is written with its `labels`, a sorted list that includes single-turn or multi-turn, and its `turns`.
    """
    out, dropped = Path(out), Counter()
    if out.resolve() in [Path(path).resolve() for path in paths]:
        raise InputError(f"{out}: would be written over what is read; name another --out")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; give --overwrite or another --out")
    given = [record for path in paths for record in read_records(path, need_answer=False, check_answer=False)]
    records = sound(given, dropped)

    def short(records):
        if chat is None:
            return records
        kept = [record for record in tqdm(records, "measure prompts", unit="record", delay=2)
                if len(chat.encode(chat.prompt(record))) <= max_prompt_tokens]
        dropped[f"prompts over {max_prompt_tokens} tokens"] += len(records) - len(kept)
        return kept

    chosen = choose(records, size, seed, short) if size else short(records)
    if not chosen:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in (+dropped).items())
        raise InputError(f"{out}: no record is left to write ({reasons or 'none was chosen'}); give other --data")
    rows = [record | {"labels": sorted(categories(record)), "turns": turns(record)} for record in chosen]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(out, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    report(given, rows, dropped, size, out)


def sound(records, dropped):
    """The records with an answer that passes the self-check, each once; counts the others in `dropped` by reason."""
    kept, seen = [], set()
    for record in tqdm(records, "self-check", unit="record", delay=2):
        gold = self_check(record) if has_answer(record) else {"reward": 0.0, "case": "none"}
        content = json.dumps([record["messages"], record["tools"], record.get("answer")])
        digest = hashlib.sha256(content.encode()).digest()
        if gold["reward"] <= 0.99:
            dropped[f"gold answer: {gold['case']}"] += 1
        elif digest in seen:
            dropped["duplicates"] += 1
        else:
            seen.add(digest)
            kept.append(record)
    return kept


def report(given, rows, dropped, size, out):
    """Print three tables: read, dropped by reason and kept; each label; each source."""
    lines = [("records", len(given)), *((f"- {reason}", n) for reason, n in (+dropped).items())]
    if size:
        lines.append(("- not chosen", len(given) - dropped.total() - len(rows)))
    columns([(name, f"{n:,}") for name, n in [*lines, ("kept", len(rows))]])
    have = Counter(label for row in rows for label in row["labels"])
    print()
    columns([("label", "wanted", "got")] + [
        (label, f"{share * size:,.0f}" if size else "-", f"{have[label]:,}") for label, share in QUOTAS.items()])
    kept = Counter(row["source"] for row in rows)
    print()
    columns([("source", "read", "got")] + [
        (source, f"{n:,}", f"{kept[source]:,}") for source, n in Counter(r["source"] for r in given).most_common()])
    print(f"\nwrote {out}")

"""`star.py prepare`: drop records with bad gold answers, label the others, choose a mix of them.

    read -> self-check of the gold answer -> duplicates -> --labels -> choice by quotas -> prompts too long -> --size

OUT.arguments.json has the settings and hashes of the files read, by which a chain of commands notices other ones.

The labels say what an answer is: response (it has text), single (one call), parallel (several calls), multi-step
(calls right after a tool's result). single-turn and multi-turn say how far into a conversation the answer comes.
The scan takes a record of at most 10 turns if one of its labels is below its quota, but none with text once that quota
is full, and stops at 1.1 x size records.
A label that is rare in the input ends below its quota, and there may be fewer records than --size. The quotas of
parallel, single and response add up to 1.2 x size: all three are reached only if some answers have both text and calls.

Departures from the released code:
1. Exact duplicates (messages, tools and answer) are dropped.
2. The released scan covers one of four sources, to 50,000 records; this one covers all that is read.
3. The tokenizer of --model measures prompts; without --model nothing is measured (released: Qwen3-8B's).
4. Where paper and code are silent, our reading: `turns` counts system messages; single-turn means one turn; an answer
   with text and calls is a text reply too; sampling down continues the random numbers of the shuffle.
"""
import hashlib
import json
import math
import random
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data import InputError, hash_files, lock, positive, print_table, read_optional, refuse_overlap
from data import write_json, write_lines
from data.chat import Chat
from data.records import has_answer, read_records, self_check

QUOTAS = {"single-turn": 0.3, "multi-turn": 0.7, "parallel": 0.5, "single": 0.5,
          "response": 0.2, "multi-step": 0.3}  # parts of --size
MAX_TURNS = 10
TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # read of --model


def prepare_flags(parser):
    add = parser.add_argument
    add("--data", required=True, nargs="+", metavar="FILE", help="records with gold answers")
    add("--out", required=True, help="file to write, .jsonl or .jsonl.gz: records, `labels`, `turns`")
    add("--size", type=positive, metavar="N", help="choose N records by quotas; default: keep all")
    add("--labels", nargs="+", choices=QUOTAS, metavar="NAME",
        help=f"keep only records with one of these labels: {', '.join(QUOTAS)}")
    add("--model", metavar="DIR", help="model folder whose tokenizer measures prompts")
    add("--max-prompt-tokens", type=positive, default=8192, metavar="N",
        help="with --model: skip records with longer prompts")
    add("--seed", type=int, default=42, help="random seed of the choice")


def run_prepare(args):
    """Drop records whose gold answer cannot be read or has unknown tools or arguments (wrong types and missing ones are
    kept), label the others, and choose a mix of them by quotas."""
    out = Path(args.out)
    refuse_overlap(out, args.data)
    part = Path(f"{out}.part")
    of_rollout = read_optional(Path(f"{out}.arguments.json")).get("command") == "rollout"
    if part.exists() and (of_rollout or part.stat().st_size):  # one of `prepare` is empty
        raise InputError(f"{part}: belongs to an unfinished rollout; name another --out")
    unfinished = part.exists()  # a `prepare` was killed
    if unfinished:
        lock(part)
    elif out.exists():
        raise InputError(f"{out}: exists already; remove it or use another --out")
    chat = Chat.from_pretrained(args.model) if args.model else None
    records = []
    for path in args.data:
        records += read_records(path, need=None, check_answer=False)
    dropped = Counter()
    chosen = select(records, dropped, chat, args)

    settings = {name: value for name, value in vars(args).items() if name != "out"}
    tokenizer = [Path(args.model) / name for name in TOKENIZER_FILES] if chat else []
    settings["inputs"] = hash_files([*args.data, *tokenizer])
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch(exist_ok=unfinished)  # a file with settings counts as finished, except while this one is there
    lock(part)
    if out.exists() and not unfinished:
        part.unlink()
        raise InputError(f"{out}: another process has written it meanwhile; use another --out")
    write_json(f"{out}.arguments.json", settings)
    write_lines(out, (json.dumps(record, ensure_ascii=False) + "\n" for record in chosen))
    part.unlink()
    report(records, chosen, dropped, args.size)
    print(f"\nwrote {out}")


def select(records, dropped, chat, args):
    """The records to write, with their labels; counts the others in `dropped`. InputError if none is left."""
    chosen = drop_unsound(records, dropped)
    if args.labels:
        sound = len(chosen)
        chosen = [record for record in chosen if not labels(record).isdisjoint(args.labels)]
        dropped["other labels"] = sound - len(chosen)
    generator = random.Random(args.seed)
    if args.size:
        chosen = choose(chosen, args.size, generator)
    if chat:
        count = len(chosen)
        chosen = [record for record in tqdm(chosen, "measure prompts", unit="record", delay=2)
                  if len(chat.encode(chat.prompt(record))) <= args.max_prompt_tokens]
        if len(chosen) < count:
            dropped[f"prompts over {args.max_prompt_tokens} tokens"] = count - len(chosen)
    if args.size:
        chosen = generator.sample(chosen, min(args.size, len(chosen)))
    if not chosen:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise InputError(f"{args.out}: no record is left to write ({reasons or 'none was chosen'}); give other --data")
    if args.size:
        dropped["not chosen"] = len(records) - dropped.total() - len(chosen)
    return [record | {"labels": sorted(labels(record)), "turns": turns(record)} for record in chosen]


def drop_unsound(records, dropped):
    """The records whose answer passes the self-check, without duplicates; counts the others in `dropped`."""
    kept = {}
    for record in tqdm(records, "self-check", unit="record", delay=2):
        result = self_check(record) if has_answer(record) else {"reward": 0.0, "case": "none"}
        content = json.dumps([record["messages"], record["tools"], record.get("answer")])
        digest = hashlib.sha256(content.encode()).digest()
        if result["reward"] <= 0.99:
            dropped[f"gold answer: {result['case']}"] += 1
        elif digest in kept:
            dropped["duplicates"] += 1
        else:
            kept[digest] = record
    return list(kept.values())


def choose(records, size, generator):
    """Shuffle the records, then take up to 1.1 x size with a label below its quota; text stops at its quota."""
    records = list(records)
    generator.shuffle(records)
    chosen = []
    counts = Counter()
    for record in records:
        if 10 * len(chosen) >= 11 * size:
            break
        names = labels(record)
        full = {name for name in names if counts[name] >= QUOTAS[name] * size}
        if turns(record) <= MAX_TURNS and "response" not in full and full != names:
            chosen.append(record)
            counts.update(names)
    return chosen


def labels(record):
    """The keys of QUOTAS that describe a record."""
    answer = record["answer"]
    calls = len(answer["tool_calls"])
    names = {"multi-turn" if turns(record) > 1 else "single-turn"}
    if answer.get("content"):
        names.add("response")
    if calls:
        names.add("single" if calls == 1 else "parallel")
    if calls and record["messages"][-1]["role"] == "tool":
        names.add("multi-step")
    return names


def turns(record):
    """(message index of the answer + 1) // 2; the index counts all messages from 0, system messages too.

    >>> turns({"messages": ["system", "user", "call", "result"]})
    2
    """
    return (len(record["messages"]) + 1) // 2


def report(records, chosen, dropped, size):
    """Print how many records were read, dropped and kept, and how many of each label and source."""
    labels_kept = Counter(label for record in chosen for label in record["labels"])
    sources_kept = Counter(record["source"] for record in chosen)
    sources = Counter(record["source"] for record in records)
    table = [("records", len(records))]
    table += [(f"- {reason}", count) for reason, count in dropped.items()]
    table += [("kept", len(chosen)), (), ("label", "quota", "kept")]
    for label, share in QUOTAS.items():
        table.append((label, f"{math.ceil(share * size):,}" if size else "-", labels_kept[label]))
    table += [(), ("source", "read", "kept")]
    table += [(name, count, sources_kept[name]) for name, count in sources.most_common()]
    print_table(table)

"""Rollout files: records with sampled `responses`, how a stopped run resumes, and the filters of `rollout`.

    OUT                   one record per line, with `responses` and how its prompt was `rendered`
    OUT.arguments.json    the settings of the run
    OUT.part              while it samples: {"index", "id", "responses"} per record, unfiltered
    OUT.part.1, ...       those of other ranks, until `open_rollouts` moves them to OUT.part

A response is {"text", "ids", "finish_reason", "logprob"}, with "reward" if the record has a gold answer.

The filters check form, not correctness, as in the paper: exactly one think block if the prompt asks for one; calls that
can be parsed, to offered tools, with arguments that the tool has. Repeated responses to a prompt are dropped. A
teacher's mistakes are kept.

Departures from the released code, where it is described:
1. A call that is never closed fails, even after closed calls, where the reward ignores it.
2. Two responses are duplicates if their reasoning, the text around their calls, and their calls in any order are
   equal. Surrounding white space and end tokens do not count. The first one is kept.
3. Each response gets its `reward` if there is a gold answer. Filters run at the end: a resumed run may change them.
"""
import json
import math
import re
from array import array
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data import InputError, lock, parse_json, read_json, refuse_changes, refuse_existing, write_json, write_lines
from data.fields import SAMPLED, SCORED, check_fields
from data.groups import Group
from data.records import has_answer, read_lines, stream_records
from reward import FORMAT_FAILURES, HEADER, score


def prompt_groups(path, chat, max_prompt_tokens, limit=None, need="a gold answer"):
    """The first `limit` records of a file as groups without responses, their prompts encoded for the model of `chat`.
    A record notes how it is `rendered`. Returns (groups, number of records skipped, as their prompts are over the cap).

    need: as in `stream_records`; InputError also if no prompt is left
    """
    groups = []
    skipped = 0
    for record in stream_records(path, need=need, limit=limit):
        record.pop("responses", None)  # of a rollout file
        record["rendered"] = {"think": chat.think, "tools": chat.tools}
        ids = chat.encode(chat.prompt(record))
        if len(ids) > max_prompt_tokens:
            skipped += 1
        else:
            groups.append(Group(json.dumps(record).encode(), array("i", ids), []))
    if not groups:
        raise InputError(f"{path}: no prompt is left to answer; raise --max-prompt-tokens")
    return groups, skipped


def score_response(chat, record, text, **options):
    """The "reward", "answer_score", "case" and "exact" of a response; options as in `reward.score`."""
    text = chat.prompt(record) + text
    result = score(text, chat.answer(record), record["tools"], chat.think, **options)
    return {name: result[name] for name in ("reward", "answer_score", "case", "exact")}


# ---- Sampling that can resume: open the file, append each record, finish

def open_rollouts(out, groups, arguments=None, resume=False):
    """Start or resume the rollout file `out` (a Path) of the records of groups.

    arguments: the settings of a rollout; None for an evaluation, whose folder has them

    Returns (finished, rows): the records of a finished file or None, and {index: record with `responses`} from the
    part files of all ranks. OUT.part stays locked. InputError if they were made with other settings or from other
    records, if another process writes there, and if the file exists and resume is not set.
    """
    part = part_file(out, 0)
    others = [path for path in out.parent.glob("*.part.*") if path.stem == part.name and path.suffix[1:].isdecimal()]
    for path in (out, part):
        refuse_existing(path, resume)
    begun = out.exists() or part.exists() and any(path.stat().st_size for path in (part, *others))
    if arguments is not None and begun:
        saved = read_json(f"{out}.arguments.json", "restore it, or use another --out")
        remedy = "resume with the flags in its .arguments.json, or use another --out"
        refuse_changes(f"{out}: was started with", saved, arguments, remedy)
    if out.exists() and not part.exists():
        return read_rows(out, scored=arguments is None), {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for path in others:  # a rank may live on after rank 0 was killed
        lock(path)
    while others and not begun:  # empty, or of a run whose OUT.part was removed
        others.pop().unlink()
    part.touch(exist_ok=resume)
    lock(part)
    if arguments is not None and not begun:
        write_json(f"{out}.arguments.json", arguments)
    rows = {}
    for path in (part, *others):
        for number, line in read_lines(path):
            if line.endswith(b"\n"):  # a kill may have left half a line, or half a character
                i, row = read_part_line(line, f"{path}:{number}")
                record = groups[i].record if i < len(groups) else None
                if record is None or record["id"] != row.get("id"):
                    raise InputError(f"{part}: holds other records; use another --out")
                rows[i] = record | {"responses": row["responses"]}
    write_lines(part, (part_line(i, row) for i, row in rows.items()))
    lock(part)  # the new one
    for path in others:
        path.unlink()
    return None, rows


def read_rows(path, scored=False):
    """The records of a finished file of `rollout`, or with `scored` of `eval`."""
    rows = list(stream_records(path, need="a gold answer" if scored else "an answer", check_answer=False))
    for row in rows:
        check_responses(row, f"{path}: record {row['id']}", SCORED if scored else SAMPLED)
    return rows


def check_responses(row, where, table):
    """InputError unless a record has responses with these fields."""
    responses = row.get("responses")
    for response in responses if isinstance(responses, list) and responses else [None]:
        response = response if isinstance(response, dict) else {}
        remedy = "remove the line, or start again"
        check_fields(response, table, f"{where}: a response", remedy, needed=True)
        check_fields(response, {"reward": "a number"}, f"{where}: a response", remedy)


def part_file(out, rank):
    """The file that a rank appends its records to, and keeps locked meanwhile."""
    return Path(f"{out}.part.{rank}" if rank else f"{out}.part")


def append_rollout(out, i, record, responses, chat, rank):
    """Append record number i, with these sampled responses, to the part file of a rank."""
    rows = [{"text": chat.decode(r.ids), "ids": r.ids, "finish_reason": r.finish_reason,
             "logprob": round(sum(r.log_probs), 4)} for r in responses]
    if not all(math.isfinite(row["logprob"]) for row in rows):
        raise InputError(f"{out}: record {record['id']}: the model computes probabilities that are not numbers; "
                         "its weights are damaged, or too large for --dtype")
    with open(part_file(out, rank), "a", encoding="utf-8") as file:
        file.write(part_line(i, record | {"responses": rows}))


def finish_rollouts(out, rows, arguments=None):
    """Write the finished file, a list of records, and its settings again, now with those of the filters; remove
    OUT.part."""
    if arguments is not None:
        write_json(f"{out}.arguments.json", arguments)
    write_lines(out, map(json_line, rows))
    part_file(out, 0).unlink()


def part_line(i, row):
    """A line of OUT.part: of a record only what is not in --data."""
    return json_line({"index": i, "id": row["id"], "responses": row["responses"]})


def read_part_line(line, where):
    """(index, {"index", "id", "responses"}) of a line of OUT.part."""
    remedy = "the line was changed or cut: remove it, or start again with another --out"
    row = parse_json(line, where, remedy)
    index = check_fields(row, {"index": "a whole number"}, where, remedy, needed=True)["index"]
    check_responses(row, where, SAMPLED)
    return index, row


def json_line(value):
    return json.dumps(value, ensure_ascii=False) + "\n"


# ---- Filters

def filter_responses(rows, chat, keep_all=False):
    """Score the responses of records; drop duplicates and responses of bad form, or with keep_all nothing. Returns
    (rows, dropped): the records that still have responses, and {reason: count}.
    """
    kept = []
    dropped = Counter()
    for row in tqdm(rows, "filter", unit="prompt", delay=2):
        contents = set()
        responses = []
        for response in row["responses"]:
            text = response["text"]
            if has_answer(row):
                response = response | {"reward": score_response(chat, row, text)["reward"]}
            reason, content = check_form(chat, row, text)
            if reason is None and content in contents:
                reason = "duplicate"
            contents.add(content)
            if reason is None or keep_all:
                responses.append(response)
            else:
                dropped[reason] += 1
        if responses:
            kept.append(row | {"responses": responses})
        else:
            dropped["prompts without responses"] += 1
    return kept, dropped


def check_form(chat, record, text):
    """(why the form is bad or None, the content) of a response. Duplicates have equal contents."""
    text = chat.prompt(record) + text
    result = score(text, "", record["tools"], chat.think)
    if result["case"] in FORMAT_FAILURES:
        return result["case"], None
    thought, _, answer = text.rpartition(HEADER)[2].rpartition("</think>")
    if "<tool_call>" in answer.rpartition("</tool_call>")[2]:
        return "call never closed", None
    try:
        calls = sorted(json.dumps(call, sort_keys=True) for call in result["calls"] or [])
    except RecursionError:  # Python reads deeper nesting than it writes
        return "nested too deep", None
    thought = thought.replace("<think>", "").strip()
    reply = re.sub(r"<tool_call>.*?</tool_call>|<\|(?:im_end|endoftext)\|>", "", answer, flags=re.S)
    return None, (thought, reply.strip(), *calls)

"""A model's answers to records: rollouts and their files (records with `responses`), and a few greedy ones to show.

A teacher's responses are filtered by form, not by correctness (paper.md 1.7): exactly one think block where the prompt
asks for one, calls that can be read, to tools that were offered, with arguments these know; and what is said again to
the same prompt is dropped. A teacher's mistakes are kept, unless a least reward is asked for.

Departures from the released code, where paper.md tells what that is:
1. A call that was never closed is a reason of its own, and one behind closed calls too, which the reward reads over.
2. Content is the same when the reasoning, the text around the calls and the calls, in any order, are; white space at
   their ends and end tokens do not count. The first one stays.
3. Each response gets its `reward` where there is a gold answer. Filters act at the end: see `write_rollouts`.

torch and the sampler are imported where they are used, so that rollout files are read and written without them.
"""
import json
import re
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data import InputError, read_json, refuse_changes, write_json, write_lines
from data.show import one_line, table
from data.sources import has_answer, read_lines, read_records
from reward import FORMAT_FAILURES, HEADER, score


def rollout(load, chat, data, out, limit=None, n=8, rows=64, max_prompt_tokens=5120, max_new_tokens=512,
            temperature=1.0, top_p=1.0, seed=42, resume=False, overwrite=False, arguments=None, keep_all=False,
            min_reward=None):
    """Sample n responses to each record of the file `data`, filter them, write the records with them to `out`, and
    show some.

    load: loads the model to sample with, once it is wanted · chat: its Chat · limit: only the first so many
    records · rows: responses in the making at a time · max_prompt_tokens: longer prompts are left out and counted ·
    temperature, top_p, max_new_tokens: as in `simrl.generate` · resume, overwrite, arguments: as in `write_rollouts`.
    keep_all, min_reward: as in `filter_responses`. A response is {"text", "ids", "finish_reason", "logprob"}, and
    "reward" where the record has an answer; a record also notes how its prompt was `rendered`.
    """
    import torch

    import simrl
    if Path(out).resolve() == Path(data).resolve():
        raise InputError(f"{out}: would be written over what is read; name another --out")
    records, prompts = read_prompts(data, chat, max_prompt_tokens, limit, need_gold=min_reward is not None)
    model = None

    def sample(members, at):
        nonlocal model
        model = model or load()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + at)
        groups = simrl.generate(model, [prompts[i] for i in members], n, max_new_tokens, chat.stop_ids, generator,
                                temperature, top_p, chat.vocab_size)
        return [[as_written(chat, s) for s in group] for group in groups]

    dropped = Counter()

    def filtered(rows):
        kept = filter_responses(rows, chat, dropped, keep_all, min_reward)
        if not kept:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
            raise InputError(f"{out}: no response is left ({reasons}); {out}.part has them: go on with --resume and "
                             "--keep-all")
        return kept

    began = time.perf_counter()
    written = write_rollouts(sample, records, prompts, out, max(1, rows // n), resume, overwrite, arguments,
                             finish=filtered)
    for row in written[:2]:
        print(f"\nrequest  {one_line(row['messages'][-1]['content'])}")
        for r in row["responses"][:2]:
            print(f"{r['finish_reason']:8s} {one_line(r['text'])}")
    responses = [r for row in written for r in row["responses"]]
    print()
    counts = {f"- {reason}": count for reason, count in dropped.items()}
    table({"prompts": len(written), "responses": len(responses), **counts,
           "seconds": round(time.perf_counter() - began, 1),
           "finished": f"{sum(r['finish_reason'] == 'stop' for r in responses) / max(1, len(responses)):.1%}",
           "response_tokens": sum(len(r["ids"]) for r in responses), "written_to": out})


def as_written(chat, sample):
    """What is kept of a response that `simrl.generate` sampled."""
    return {"text": chat.decode(sample["ids"]), "ids": sample["ids"], "finish_reason": sample["finish_reason"],
            "logprob": round(sum(sample["logprobs"]), 4)}


def read_prompts(data, chat, max_prompt_tokens, limit=None, need_gold=True, say=print):
    """(records, prompts) of a file: records that say how they are `rendered`, and their prompts as lists of ids.

    A prompt over the cap is None; how many are is said. need_gold: a record without a gold answer is an InputError.
    """
    rendered = {"rendered": {"think": chat.think, "tools": chat.tools}}
    records = [record | rendered for record in read_records(data, need_gold)[:limit]]
    for record in records if need_gold else ():
        if not has_answer(record):
            raise InputError(f"{data}: record {record['id']} has no gold answer to be scored against; add one, or "
                             "remove it")
    prompts = [chat.encode(chat.prompt(record)) for record in records]
    prompts = [ids if len(ids) <= max_prompt_tokens else None for ids in prompts]
    if None in prompts:
        say(f"left out of {data}: {prompts.count(None)} prompts of more than {max_prompt_tokens} tokens")
    if all(ids is None for ids in prompts):
        raise InputError(f"{data}: no prompt is left to answer; raise --max-prompt-tokens")
    return records, prompts


def judge(chat, record, text, **options):
    """The "reward", "answer_score", "case" and "exact" of a response to a record; options: see `reward.score`."""
    result = score(chat.prompt(record) + text, chat.answer(record), record["tools"], chat.think, **options)
    return {name: result[name] for name in ("reward", "answer_score", "case", "exact")}


def filter_responses(rows, chat, dropped, keep_all=False, min_reward=None):
    """The rows with the responses that pass, each with its `reward` where there is an answer; rows without any go.

    chat: the Chat they were sampled with · dropped: a Counter, told why and how many · keep_all: score, drop nothing ·
    min_reward: drop what is worth less (paper: no such filter).
    """
    kept = []
    for row in tqdm(rows, "filter", unit="prompt", delay=2):
        prompt, seen, responses = chat.prompt(row), set(), []
        for response in row["responses"]:
            if has_answer(row):
                response = response | {"reward": judge(chat, row, response["text"])["reward"]}
            reason, content = read_response(prompt + response["text"], row["tools"], chat.think)
            if reason is None and content in seen:
                reason = "duplicate"
            elif reason is None and min_reward is not None and response["reward"] < min_reward:
                reason = f"reward below {min_reward:g}"
            if reason is None or keep_all:
                responses.append(response)
            else:
                dropped[reason] += 1
            seen.add(content)
        if responses:
            kept.append(row | {"responses": responses})
        else:
            dropped["prompts without any left"] += 1
    return kept


def read_response(text, tools, think):
    """(why the form of a prompt and its response is bad or None, its content in a shape that compares equal)."""
    case, calls = (score(text, "", tools, think)[name] for name in ("case", "calls"))
    if case in FORMAT_FAILURES:
        return case, None
    thought, _, answer = text.rpartition(HEADER)[2].rpartition("</think>")
    if "<tool_call>" in answer.rpartition("</tool_call>")[2]:
        return "call never closed", None
    try:
        calls = sorted(json.dumps(call, sort_keys=True) for call in calls or [])
    except RecursionError:  # was just not too deep to be read
        return "nested too deep", None
    said = re.sub(r"<tool_call>.*?</tool_call>|<\|(?:im_end|endoftext)\|>", "", answer, flags=re.S)
    return None, (thought.replace("<think>", "").strip(), said.strip(), *calls)


def write_rollouts(sample, records, prompts, out, together, resume=False, overwrite=False, arguments=None,
                   name="rollout", finish=lambda rows: rows):
    """Sample responses to all prompts, `together` prompts at a time, and write the records with them to `out`.

    sample(members, at) -> for each of these indices of records a list of responses, dicts; `at` numbers the batch and
    is its seed, so a resumed file is the file of an uninterrupted run · prompts: lists of ids, one for each record;
    None leaves it out · arguments: a dict that a resumed file must have been begun with · name: of the progress bar ·
    finish(records) -> those to write, filtered.

    Finished batches are kept in `out`.part, longest prompts first (prompts that are sampled together should be alike).
    The end puts the records back in their order, filters them and renames the file into place, and the arguments as
    `out`.arguments.json beside it. Returns the written records. As `out`.part holds them unfiltered, the filters may
    be others when a run is resumed (star.py leaves them out of `arguments`); a file that is finished stays as it is.
    """
    out, part = Path(out), Path(f"{out}.part")
    for path in (out, part):
        if path.exists() and not (resume or overwrite):
            raise InputError(f"{path}: exists already; give --resume to go on with it or --overwrite to start anew")
    begun = out.with_name(out.name + ".arguments.json")
    if resume and out.exists() and not part.exists():  # it was finished
        if arguments is not None:
            refuse_changes(f"{out}: was made with", read_json(begun, "give --overwrite to start anew"), arguments,
                           "start anew with --overwrite, or name another --out")
        return [json.loads(line) for _, line in read_lines(out)]
    out.parent.mkdir(parents=True, exist_ok=True)
    done = read_part(part, arguments) if resume and part.exists() else {}
    if any(i >= len(records) or records[i]["id"] != row["id"] for i, row in done.items()):
        raise InputError(f"{part}: is of other records; start anew with --overwrite")
    lines = [arguments, *done.items()]
    write_lines(part, (json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    order = sorted((i for i, prompt in enumerate(prompts) if prompt is not None), key=lambda i: -len(prompts[i]))
    with open(part, "a", encoding="utf-8") as sink, tqdm(total=len(order), desc=name, unit="prompt") as bar:
        for at in range(0, len(order), together):
            batch = order[at:at + together]
            if any(i not in done for i in batch):
                bar.set_postfix_str(f"{len(batch)} prompts of up to {len(prompts[batch[0]])} tokens")
                for i, responses in zip(batch, sample(batch, at)):
                    done[i] = records[i] | {"responses": responses}
                    sink.write(json.dumps([i, done[i]], ensure_ascii=False) + "\n")
                sink.flush()
            bar.update(len(batch))
    rows = finish([done[i] for i in sorted(order)])
    if arguments is not None:
        write_json(begun, arguments)
    write_lines(out, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    part.unlink()
    return rows


def read_part(part, arguments):
    """What a stopped run with the same arguments had written, {index: record}."""
    whole = part.read_bytes().split(b"\n")[:-1]  # a kill may have left half a line, or half a character
    if not whole:
        return {}
    before, *rows = map(json.loads, whole)
    refuse_changes(f"{part}: was begun with", before or {}, arguments or {},
                   "resume with the settings in its first line, or start anew with --overwrite")
    return dict(rows)


def answers(model, chat, groups, dtype, name):
    """Greedy answers to a few groups' prompts: [{"request", "gold" or None, name: text}]."""
    import torch

    import simrl
    if not groups:
        return []
    model = model if model.head_weight.dtype == dtype else model.copy(dtype)
    found = simrl.generate(model, [group["prompt"] for group in groups], 1, 128, chat.stop_ids, torch.Generator(), 0.0,
                           width=chat.vocab_size)
    return [{"request": group["record"]["messages"][-1]["content"],
             "gold": chat.answer(group["record"]) if group["record"].get("answer") else None,
             name: chat.decode(samples[0]["ids"])} for group, samples in zip(groups, found)]

"""`star.py rollout`: sample n responses to each record, filter them, and write the records with them.

The file format and the filters are in data/rollouts.py, the sampler in sampler.py. Under `torchrun` each rank samples a
share of the records into a part file of its own, and rank 0 joins them; a run may resume with any number of ranks.
"""
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import InputError, hash_files, lock, one_line, print_table, refuse_overlap, unlock_all
from data.chat import Chat, add_prompt_flags
from data.records import add_data_flags
from data.rollouts import append_rollout, filter_responses, finish_rollouts, open_rollouts, part_file, prompt_groups
from data.runs import add_output_flags, settings
from model import Transformer
from sampler import Request, add_count_flags, add_sampling_flags, cache_size, describe_cache, generate
from train import add_machine_flags, fail_together, gather_over_ranks, note, pick_device, rank, same_on_all, world_size


def rollout_flags(parser):
    parser.add_argument("--model", required=True, help="model folder")
    add_data_flags(parser, "records, with or without gold answers")
    add_output_flags(parser, "file to write: the records with `responses`")
    parser.add_argument("--keep-all", action="store_true", help="keep duplicates and responses of bad form")
    add_prompt_flags(parser)
    add_count_flags(parser, 8)
    add_sampling_flags(parser, temperature=1.0)
    add_machine_flags(parser, "weights and compute")


def run_rollout(args):
    """Sample responses to each record, filter them by form, and score them if there is a gold answer. Under `torchrun`
    the ranks share the records (not run on several GPUs); the file is that of one process, up to rounding."""
    out = Path(args.out)
    device = pick_device(args)
    with fail_together():
        refuse_overlap(out, [args.data])
        chat, groups = read_inputs(args, need=None)
        arguments = settings(args, [args.model, args.data]) if rank() == 0 else {}
    start = time.perf_counter()
    draws = [(args.n, args.temperature, args.top_p)]
    finished, rows = sample_responses(args, out, chat, groups, draws, device, arguments)
    dropped = {}
    if finished:
        note(f"{out}: is already finished; nothing is sampled, and the filters are not run again")
    with fail_together():
        if rows:
            finished, dropped = filter_responses(rows, chat, args.keep_all)
            if not finished:
                reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.items())
                remedy = f"all of them are in {out}.part: use --resume with --keep-all"
                raise InputError(f"{out}: no response is left ({reasons}); {remedy}")
            finish_rollouts(out, finished, arguments | {"keep_all": args.keep_all})  # for apps/curriculum.py
    if rank() > 0:
        return
    print_examples(finished)
    responses = [r for row in finished for r in row["responses"]]
    stopped = sum(r["finish_reason"] == "stop" for r in responses)
    print()
    print_table([
        ("prompts", len(finished)),
        ("responses", len(responses)),
        *((f"- {reason}", n) for reason, n in dropped.items()),
        ("seconds", round(time.perf_counter() - start, 1)),
        ("finished", f"{stopped / len(responses):.1%}"),
        ("response_tokens", sum(len(r["ids"]) for r in responses)),
        ("written_to", out),
    ])


def print_examples(rows):
    """Print two requests with two responses each, and the rewards of scored responses."""
    for row in rows[:2]:
        print(f"\nrequest  {one_line(row['messages'][-1]['content'])}")
        for r in row["responses"][:2]:
            label = "response" if r.get("reward") is None else f"{r['reward']:.3f}"
            print(f"{label:8s} {one_line(r['text'])}")


def read_inputs(args, need="a gold answer"):
    """The Chat of --model, and the groups of --data, without responses. Says how many prompts are skipped. InputError
    also for broken weights, before anything is written."""
    chat = Chat.from_pretrained(args.model, args.think, args.tools)
    Transformer.from_pretrained(args.model, device="meta")
    groups, skipped = prompt_groups(args.data, chat, args.max_prompt_tokens, args.limit, need)
    if skipped:
        note(f"{args.data}: skipped {skipped} prompts longer than {args.max_prompt_tokens} tokens")
    return chat, groups


def sample_responses(args, out, chat, groups, draws, device, arguments=None):
    """Sample responses to the records of groups, or continue to, on all ranks. Returns the records of a finished file
    or None, and those with new `responses`; on ranks other than 0, None and [].

    args: parsed flags command, model, device, dtype, seed, max_concurrent, max_new_tokens, resume
    chat, groups: of `read_inputs`
    draws: [(n, temperature, top_p)]; a record gets n responses from each
    arguments: as in `open_rollouts`
    """
    finished, rows = None, {}
    same_on_all("models or data", hash_files([args.model, args.data]))
    with fail_together():
        if rank() == 0:
            finished, rows = open_rollouts(out, groups, arguments, args.resume)
    done = set(gather_over_ranks(list(rows if finished is None else range(len(groups)))))
    missing = [i for i in range(len(groups)) if i not in done]
    if missing:
        rows = {}  # they are in the part file, and would take memory
    missing.sort(key=lambda i: -len(groups[i].prompt))  # prompts that run together have similar lengths
    with fail_together():
        if share := missing[rank()::world_size()]:
            sample_share(args, out, chat, groups, draws, device, share, len(missing))
    with fail_together():
        if missing and rank() == 0:
            _, rows = open_rollouts(out, groups, arguments, resume=True)
            if lost := set(missing) - rows.keys():
                raise InputError(f"{out}: {len(lost)} records are in no part file; all ranks must share its folder")
    return finished, [rows[i] for i in sorted(rows)]


def sample_share(args, out, chat, groups, draws, device, share, total):
    """Sample responses to this rank's `share` of `total` records; append each to its part file once it is done."""
    part = part_file(out, rank())
    part.touch()
    lock(part)
    requests = {}
    for i in share:
        seed = args.seed * 1_000_003 + i
        requests[i] = [Request(groups[i].prompt, n, seed, temperature, args.max_new_tokens, top_p, number=i)
                       for n, temperature, top_p in draws]
    queue = [request for i in share for request in requests[i]]
    model = Transformer.from_pretrained(args.model, getattr(torch, args.dtype), device)
    note(describe_cache(model, *cache_size(args.max_concurrent, queue)))
    with tqdm(desc=args.command, total=total, unit="prompt", disable=rank() > 0) as bar:
        try:
            for request in generate(model, queue, args.max_concurrent, chat):
                i = request.number
                if i in requests and all(other.done for other in requests[i]):
                    finished = requests.pop(i)
                    responses = [r for other in finished for r in other.responses]
                    append_rollout(out, i, groups[i].record, responses, chat, rank())
                    for other in finished:
                        other.responses = []  # the queue keeps the request
                    bar.update(min(world_size(), total - bar.n))  # as if the other ranks were as far
        except KeyboardInterrupt:
            new = part.read_bytes().count(b"\n") - (len(groups) - total)  # the bar may be one behind
            count = f"{new} of these {total}" if world_size() == 1 else "finished"
            note(f"\n{count} records are done, and kept in {out}.part" + "*" * (world_size() > 1))
            raise
    if rank() > 0:  # for rank 0, which reads and removes the part file
        unlock_all()

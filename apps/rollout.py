"""`star.py rollout`: sample n responses to each record, filter them, and write the records with them.

The file format and the filters are in data/rollouts.py, the sampler in sampler.py.
"""
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import InputError, number, one_line, positive, print_table
from data.chat import Chat, add_prompt_flags
from data.records import add_data_flags
from data.rollouts import append_rollouts, batches_to_sample, filter_responses
from data.rollouts import finish_rollouts, open_rollouts, read_prompts, response_row
from data.runs import add_output_flags, settings
from model import Transformer
from sampler import add_count_flags, add_sampling_flags, generate
from train import add_machine_flags, pick_device


def rollout_flags(parser):
    add = parser.add_argument
    add("--model", required=True, help="model folder")
    add_data_flags(parser, "records, with or without gold answers")
    add_output_flags(parser, "file to write: the records with `responses`")
    group = parser.add_argument_group("filters, at the end of a run")
    add = group.add_mutually_exclusive_group().add_argument
    add("--keep-all", action="store_true",
        help="keep duplicates and responses of bad form")
    add("--min-reward", type=number(float, -1.0, 1.0), metavar="X",
        help="also drop responses with a lower reward")
    add_prompt_flags(parser)
    add_count_flags(parser, 8)
    add_sampling_flags(parser, temperature=1.0)
    add_machine_flags(parser, "weights and compute")


def run_rollout(args):
    """Sample responses to each record, filter them by form, and score them if there is a gold answer."""
    out = Path(args.out)
    if out.resolve() == Path(args.data).resolve():
        raise InputError(f"{out}: would be written over --data; use another --out")
    chat = Chat.from_pretrained(args.model, args.think, args.tools)
    need_gold = args.min_reward is not None
    records, prompts = read_prompts(
        args.data, chat, args.max_prompt_tokens, args.limit, need_gold)
    start = time.perf_counter()
    finished, rows = open_rollouts(
        out, records, settings(args), args.resume, args.overwrite)
    dropped = {}
    if finished is None:
        sample_responses(args, chat, records, prompts, rows)
        rows = [rows[i] for i in sorted(rows)]
        finished, dropped = filter_responses(
            rows, chat, args.keep_all, args.min_reward)
        if not finished:
            reasons = [f"{reason}: {n}" for reason, n in dropped.items()]
            raise InputError(
                f"{out}: no response is left ({', '.join(reasons)}); all of them "
                f"are in {out}.part: use --resume with --keep-all")
        finish_rollouts(out, finished, settings(args))
    seconds = time.perf_counter() - start
    print_summary(out, finished, dropped, seconds)


def sample_responses(args, chat, records, prompts, rows):
    """Sample the missing responses; add them to `rows`, {index: record with `responses`}, and to OUT.part."""
    size = max(1, args.max_concurrent // args.n)
    batches = batches_to_sample(prompts, rows, size)
    if not batches:
        return
    device = pick_device(args.device)
    model = Transformer.from_pretrained(args.model, getattr(torch, args.dtype), device)
    for start, batch in tqdm(batches, "rollout", unit="batch"):
        generator = torch.Generator()
        generator.manual_seed(args.seed * 1_000_003 + start)
        samples = generate(
            model, [prompts[i] for i in batch], args.n,
            args.max_new_tokens, chat.stop_ids, generator,
            args.temperature, args.top_p, chat.vocab_size,
        )
        sampled = {}
        for i, responses in zip(batch, samples):
            responses = [response_row(chat, r) for r in responses]
            sampled[i] = records[i] | {"responses": responses}
        append_rollouts(Path(args.out), sampled)
        rows |= sampled


def print_summary(out, rows, dropped, seconds):
    """Print a few responses and the counts."""
    for row in rows[:2]:
        request = row["messages"][-1]["content"]
        print(f"\nrequest  {one_line(request)}")
        for r in row["responses"][:2]:
            print(f"{r['finish_reason']:8s} {one_line(r['text'])}")
    responses = [r for row in rows for r in row["responses"]]
    stopped = sum(r["finish_reason"] == "stop" for r in responses)
    table = {"prompts": len(rows), "responses": len(responses)}
    table |= {f"- {reason}": n for reason, n in dropped.items()}
    table |= {
        "seconds": round(seconds, 1),
        "finished": f"{stopped / max(1, len(responses)):.1%}",
        "response_tokens": sum(len(r["ids"]) for r in responses),
        "written_to": out,
    }
    print()
    print_table(table.items())

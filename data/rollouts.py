"""Rollout files: records with the `responses` a model gave, written as they are sampled."""
import json
from pathlib import Path

from tqdm import tqdm

from data import InputError, refuse_changes, write_lines


def write_rollouts(sample, records, prompts, out, together, resume=False, overwrite=False, arguments=None):
    """Sample responses to all prompts, `together` prompts at a time, and write the records with them to `out`.

    sample(prompts, at) -> for each prompt a list of responses, dicts; `at` numbers the batch and is its seed, so a
    resumed file is the file of an uninterrupted run · prompts: lists of ids, one for each record; None leaves it out
    · arguments: a dict that a resumed file must have been begun with.

    Finished batches are kept in `out`.part, longest prompts first (prompts that are sampled together should be alike).
    The end puts the records back in their order and renames the file into place. Returns the written records.
    """
    out, part = Path(out), Path(f"{out}.part")
    for path in (out, part):
        if path.exists() and not (resume or overwrite):
            raise InputError(f"{path}: exists already; give --resume to go on with it or --overwrite to start anew")
    if resume and out.exists():  # it was finished
        return [json.loads(line) for line in out.read_bytes().splitlines()]
    if all(prompt is None for prompt in prompts):
        raise InputError(f"{out}: no prompt is left to answer; raise --max-prompt-tokens")
    out.parent.mkdir(parents=True, exist_ok=True)
    done = read_part(part, arguments) if resume and part.exists() else {}
    lines = [arguments, *done.items()]
    write_lines(part, (json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    order = sorted((i for i, prompt in enumerate(prompts) if prompt is not None), key=lambda i: -len(prompts[i]))
    with open(part, "a", encoding="utf-8") as sink, tqdm(total=len(order), desc="rollout", unit="prompt") as bar:
        for at in range(0, len(order), together):
            batch = order[at:at + together]
            if any(i not in done for i in batch):
                bar.set_postfix_str(f"{len(batch)} prompts of up to {len(prompts[batch[0]])} tokens")
                for i, responses in zip(batch, sample([prompts[i] for i in batch], at)):
                    done[i] = records[i] | {"responses": responses}
                    sink.write(json.dumps([i, done[i]], ensure_ascii=False) + "\n")
                sink.flush()
            bar.update(len(batch))
    rows = [done[i] for i in sorted(order)]
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

"""Rollout files: records with the `responses` a model gave, written as they are sampled."""
import json
import os
from pathlib import Path

from tqdm import tqdm

from data import InputError


def write_rollouts(sample, records, prompts, out, together, resume=False, overwrite=False):
    """Sample responses to all prompts, `together` prompts at a time, and write the records with them to `out`.

    sample(prompts, at) -> for each prompt a list of responses, dicts; `at` numbers the batch and is its seed, so a
    resumed file is the file of an uninterrupted run · prompts: lists of ids, one for each record; None leaves it out.

    Finished batches are kept in `out`.part, longest prompts first (prompts that are sampled together should be alike).
    The end puts the records back in their order and renames the file into place. Returns the written records.
    """
    out, part = Path(out), Path(f"{out}.part")
    for path in (out, part):
        if path.exists() and not (resume or overwrite):
            raise InputError(f"{path}: exists already; give --resume to go on with it or --overwrite to start anew")
    out.parent.mkdir(parents=True, exist_ok=True)
    done = read_part(part) if resume and part.exists() else {}
    order = sorted((i for i, prompt in enumerate(prompts) if prompt is not None), key=lambda i: -len(prompts[i]))
    with open(part, "w", encoding="utf-8") as sink, tqdm(total=len(order), desc="rollout", unit="prompt") as bar:
        for at in range(0, len(order), together):
            batch = order[at:at + together]
            if any(i not in done for i in batch):
                bar.set_postfix_str(f"{len(batch)} prompts of up to {len(prompts[batch[0]])} tokens")
                for i, responses in zip(batch, sample([prompts[i] for i in batch], at)):
                    done[i] = records[i] | {"responses": responses}
            for i in batch:
                sink.write(json.dumps([i, done[i]], ensure_ascii=False) + "\n")
            sink.flush()
            bar.update(len(batch))
    rows = [done[i] for i in sorted(order)]
    with open(f"{out}.tmp", "w", encoding="utf-8") as sink:
        sink.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(f"{out}.tmp", out)
    part.unlink()
    return rows


def read_part(part):
    """What a stopped run had written, {index: record}; a kill may have left half a line, which is dropped."""
    whole = part.read_text(encoding="utf-8").split("\n")[:-1]
    return dict(json.loads(line) for line in whole)

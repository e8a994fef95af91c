"""The cache: a teacher's log-probs on disk, so that it need not sit in memory while a student trains.

    DIR/cache.json   what they were made from: teacher, tokenizer, data, number of positions, k, ...
    DIR/ids.npy      [positions, k] int32      a row for each counted position, group by group
    DIR/log_p.npy    [positions, k] float16

A cache is read for exactly what it was made from, and refused for anything else. What the k ids of a position are
(the likeliest, or draws) is the caller's business: `open_teacher` in ckd.py.
"""
import hashlib
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import InputError, read_json, refuse_changes, whole_folder, write_json
from data.groups import micro_batches, pack


def fingerprint(folder):
    """A short hash of a model folder: its config.json, and each weight file's size and first and last MiB."""
    digest = hashlib.sha256((Path(folder) / "config.json").read_bytes())
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def number_rows(groups):
    """Note in each response where its rows are in a cache. Returns what identifies these groups to it."""
    digest, position = hashlib.sha256(), 0
    for group in groups:
        digest.update(np.array(group["prompt"], dtype=np.int32).tobytes() + b"prompt")
        for response in group["responses"]:
            response["row"] = position
            position += response["span"][1] - response["span"][0]
            digest.update(np.array([*response["span"], *response["ids"]], dtype=np.int32).tobytes() + b"response")
    return {"data": digest.hexdigest()[:16], "positions": position}


def open_cache(folder, made_from):
    """Open a cache of teacher log-probs: (ids, log_p) as memory maps [positions, k].

    None when `folder` is empty or not there. InputError when it is no cache, or made from something else.
    """
    folder = Path(folder)
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return None
    found = read_json(folder / "cache.json", "--cache takes a new folder or one that it has written")
    refuse_changes(f"{folder}: this cache was made from", found, made_from, "remove the folder or name a new one")
    try:
        return np.load(folder / "ids.npy", mmap_mode="r"), np.load(folder / "log_p.npy", mmap_mode="r")
    except ValueError as e:
        raise InputError(f"{folder}: a file of this cache is cut short ({e}); remove the folder") from e


def write_cache(folder, groups, made_from, look, k, device, micro_tokens):
    """Run the teacher once over all groups and keep ids (int32) and log-probs (float16) of every counted position.

    look: the teacher as a function of a packed batch on `device`, (ids [N, k], log_p [N, k]) · made_from: what
    `open_cache` is to find, with `positions` · micro_tokens: padded tokens that go through the teacher at a time.
    Nothing is left in `folder` if it does not come to its end. InputError where the disk is too small.
    """
    size = made_from["positions"] * k * 6
    print(f"Teacher cache: {made_from['positions']:,} positions x {k} x 6 bytes = {6 * k:,} bytes per token, "
          f"{size / 1e9:.2f} GB in {folder}")
    with whole_folder(folder) as new:
        if shutil.disk_usage(new).free < size:
            raise InputError(f"{folder}: {size / 1e9:.1f} GB do not fit on this disk; use a smaller --k or another one")
        shape = (made_from["positions"], k)
        ids = np.lib.format.open_memmap(new / "ids.npy", mode="w+", dtype=np.int32, shape=shape)
        log_p = np.lib.format.open_memmap(new / "log_p.npy", mode="w+", dtype=np.float16, shape=shape)
        for micro in tqdm(micro_batches(groups, micro_tokens), desc="teacher cache", unit="batch"):
            tokens, values = look(pack(micro, device))
            at = cache_rows(micro)
            ids[at], log_p[at] = tokens.cpu().numpy(), values.cpu().numpy()
        ids.flush()
        log_p.flush()
        write_json(new / "cache.json", made_from)


def cache_rows(groups):
    """Where the counted positions of these groups stand in the cache, in the order in which `pack` lists them."""
    return np.concatenate([np.arange(r["row"], r["row"] + r["span"][1] - r["span"][0])
                           for group in groups for r in group["responses"]])

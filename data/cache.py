"""The cache: a teacher's log-probs on disk, so that it need not be in memory while a student trains.

    DIR/cache.json   what the log-probs were computed from: teacher, tokenizer, data, number of positions, k, ...; and
                     the hashes of these two files:
    DIR/ids.bin      [positions, k] int32      one row per counted position, group by group
    DIR/log_p.bin    [positions, k] float16

A cache made from anything else is refused, and so is one that has changed. teacher.py says which k ids a position has.
"""
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import InputError, atomic_folder, check_hashes, hash_by_name, hash_files, is_first_rank, lock
from data import read_json, refuse_changes, several_processes, write_json
from data.chat import vocabulary
from data.groups import micro_batches, pack

ARRAYS = {"ids.bin": np.int32, "log_p.bin": np.float16}


def number_rows(groups):
    """Give each response its rows in a cache, and return {"data": hash, "positions": count} of these groups."""
    digest = hashlib.sha256()
    position = 0
    for group in groups:
        digest.update(np.array(group.prompt, dtype=np.int32).tobytes() + b"prompt")
        for response in group.responses:
            response.row = position
            position += response.counted_tokens
            numbers = np.array([*response.span, *response.ids], dtype=np.int32)
            digest.update(numbers.tobytes() + b"response")
    return {"data": digest.hexdigest()[:16], "positions": position}


def cache_key(args, groups, vocab_size):
    """Everything that a run's cache depends on; None without --cache. Also numbers the responses' rows in the cache.
    InputError if --cache holds something else, or if several processes would have to write it.
    """
    if not args.cache:
        return None
    out, cache = Path(args.out).resolve(), Path(args.cache).resolve()
    if out.is_relative_to(cache) or {out / "model", out / "checkpoints"} & {cache, *cache.parents}:
        raise InputError(f"{args.cache}: --cache and --out {args.out} lie one in the other; use another --cache")
    view = f"draws with seed {args.seed}" if args.objective == "rskd" else "top-k"
    digest = hashlib.sha256(json.dumps(vocabulary(args.teacher)).encode()).hexdigest()
    folder = Path(args.teacher)
    weights = hash_files([folder / "config.json", *sorted(folder.glob("*.safetensors"))])
    key = {"teacher": list(weights.values()), "tokenizer": digest[:16], "dtype": args.dtype}
    k = args.k if args.objective == "rskd" else min(args.k, vocab_size)
    key |= number_rows(groups) | {"view": view, "width": vocab_size, "k": k}
    if open_cache(args.cache, key) is None and several_processes():
        raise InputError(f"{args.cache}: no cache there yet; write it with one process first (without torchrun)")
    return key


def open_cache(folder, made_from):
    """A cache as memory maps [ids, log_p], [positions, k] each; None if `folder` is empty or missing.

    Its files are read once in a process to compare their hashes, about a second a GB, by the first rank only.
    """
    folder = Path(folder)
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return None
    path = folder / "cache.json"
    stored = read_json(path, "--cache takes a new folder or one that it has written")
    refuse_changes(f"{folder}: this cache was made from", stored, made_from, "remove the folder or name a new one")
    if is_first_rank():
        check_hashes(path, stored, [folder / name for name in ARRAYS], "--cache", "remove the folder")
    shape = (made_from["positions"], made_from["k"])
    try:
        return [np.memmap(folder / name, dtype, "r", shape=shape) for name, dtype in ARRAYS.items()]
    except ValueError as e:  # on the other ranks
        raise InputError(f"{folder}: its arrays are too short; remove the folder") from e


def write_cache(folder, groups, made_from, teacher, device, micro_batch_tokens):
    """Run a teacher once over all groups and store its log-probs of every counted position. Written atomically.

    groups: numbered by `number_rows`
    made_from: what `open_cache` compares; holds `positions` and `k`
    teacher: function of a packed batch on `device`, and its groups -> (ids [N, k], log_p [N, k])
    """
    shape = (made_from["positions"], made_from["k"])
    size = shape[0] * shape[1] * 6
    print(f"Teacher cache: {shape[0]:,} positions x {shape[1]} x 6 bytes, "
          f"{size / 1e9:.2f} GB in {folder}", file=sys.stderr)
    Path(folder).mkdir(parents=True, exist_ok=True)
    if os.path.ismount(Path(folder).resolve()):
        raise InputError(f"{folder}: is a mount point, which cannot be replaced; name a folder in it")
    lock(folder)
    if open_cache(folder, made_from):  # another process has finished it meanwhile
        return
    with atomic_folder(folder) as new:
        if shutil.disk_usage(new).free < size:
            raise InputError(f"{folder}: {size / 1e9:.1f} GB do not fit on this disk; "
                             "use a smaller --k or another disk")
        ids, log_p = (np.memmap(new / name, dtype, "w+", shape=shape) for name, dtype in ARRAYS.items())
        for array in (ids, log_p) if hasattr(os, "posix_fallocate") else ():
            with open(array.filename, "r+b") as file:  # a disk that is full later would end the process by a signal
                os.posix_fallocate(file.fileno(), 0, array.nbytes)
        for micro in tqdm(micro_batches(groups, micro_batch_tokens), "teacher cache", unit="batch"):
            packed = pack(micro, device)
            rows = packed["rows"].cpu().numpy()
            batch_ids, batch_log_p = teacher(packed, micro)
            ids[rows] = batch_ids.cpu().numpy()
            log_p[rows] = batch_log_p.cpu().numpy()
        ids.flush()
        log_p.flush()
        write_json(new / "cache.json", made_from | {"hashes": hash_by_name(new / name for name in ARRAYS)})

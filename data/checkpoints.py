"""Tensors in safetensors files, and checkpoints: weights, optimiser moments and progress of a run, unsharded.

    OUT/checkpoints/step-000100/    weights, exp_avg, exp_avg_sq, momentum_buffer .safetensors; progress.json

progress.json also has the hashes of these files and of the run's settings, so that a run resumes only from what it
has written.
"""
import json
import math
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data import InputError, atomic_folder, check_hashes, hash_by_name, read_json, refuse_on_all, write_json
from data.fields import PROGRESS, WEIGHT_INDEX, check_fields
from shard import parameters, part_of, rank, wait_for_ranks, whole

CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # of safetensors
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # the state of AdamW and Muon


def list_checkpoints(out, ending=""):
    """[(step, folder)] of a run's checkpoints, in step order. Other files there are ignored."""
    names = [(re.fullmatch(rf"step-(\d{{6,}}){ending}", path.name), path) for path in Path(out).glob("checkpoints/*")]
    return sorted((int(name[1]), path) for name, path in names if name and path.is_dir())


def latest_checkpoint(out):
    """The step of the last checkpoint of a run, 0 if it has none."""
    return max(list_checkpoints(out), default=(0,))[0]


def delete_checkpoints(out):
    """Delete all checkpoints but the last two, and what killed runs have left of others."""
    for _, old in list_checkpoints(out)[:-2]:
        os.replace(old, f"{old}.star-tmp")  # first: a kill half-way must not leave a broken checkpoint
    for _, old in list_checkpoints(out, r"\.star-tmp"):
        old.unlink() if old.is_symlink() else shutil.rmtree(old)


def check_finite(out, step, name, value):
    """Stop a run whose training has diverged, before anything is saved: InputError if `value` is not finite."""
    if math.isfinite(value):
        return
    good = latest_checkpoint(out)
    state = f"the last good checkpoint is {out}/checkpoints/step-{good:06d}" if good else "there is no checkpoint yet"
    refuse_on_all(
        f"{out}: step {step}: {name} is {value}, training has diverged; {state}; "
        "start again with another --out and a lower --lr, or with --dtype float32")


def save_tensors(tensors, path, dtype=None):
    """Write {name: tensor} to a .safetensors file, in `dtype` if it is given, and flush it to the disk. Every rank must
    call this: sharded tensors are gathered one at a time, so no rank ever holds them all. Rank 0 writes.

    The file is the length of a header, the header in JSON, and the tensors' bytes; safetensors itself would need all
    tensors at once.
    """
    end = 0
    header = {"__metadata__": {"format": "pt"}}
    for name, tensor in tensors.items():
        start = end
        written = dtype or tensor.dtype
        end += tensor.numel() * written.itemsize
        header[name] = {"dtype": CODES[written], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") if rank() == 0 else nullcontext() as file:
        if file:
            file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            tensor = whole(tensor.detach().to(dtype or tensor.dtype))
            if file:
                file.write(tensor.cpu().flatten().view(torch.uint8).numpy())
        if file:
            file.flush()
            os.fsync(file.fileno())


def read_tensors(folder, known):
    """Yield (path, name, tensor) for each tensor of a model folder, one at a time. known: expected names."""
    index = folder / "model.safetensors.index.json"
    paths = [folder / "model.safetensors"]
    if index.exists() and not paths[0].exists():  # as in transformers, one file goes first
        weight_map = check_fields(read_json(index), WEIGHT_INDEX, index).get("weight_map") or {}
        paths = [folder / shard for shard in sorted(set(weight_map.values()))]
    elif not paths[0].exists():
        raise InputError(f"{folder}: no model.safetensors; only safetensors weights are read")
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: missing shard named by {index.name}; download or copy it again")
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name in known and file.get_slice(name).get_dtype() in ("BF16", "F16", "F32", "F64"):
                        yield path, name, file.get_tensor(name)
                    # Some folders also store a copy of the tied head or a table of rotary frequencies.
                    elif name != "lm_head.weight" and not name.endswith("inv_freq"):
                        raise InputError(f"{path}: tensor {name} does not fit config.json; "
                                         "download or copy the folder again")
        except SafetensorError as e:
            raise InputError(f"{path}: not a whole safetensors file ({e}); download or copy it again") from e


def save_checkpoint(out, step, model, optimisers, progress):
    """Write checkpoints/step-... atomically and keep the last two. progress["updates"] counts optimiser steps.

    Every rank must call this. The files hold whole tensors, so any number of ranks can resume.
    """
    weights = parameters(model)
    total = sum(whole(p.detach().sum()).item() for p in weights.values())
    check_finite(out, step, "a weight", total)
    folder = Path(out) / "checkpoints"
    state = {}  # of each parameter; empty before the first update
    for optimiser in optimisers:
        state |= optimiser.state
    files = {"weights": weights}
    for moment in MOMENTS:
        files[moment] = {name: state[p][moment] for name, p in weights.items() if moment in state.get(p, ())}
    with nullcontext() if rank() > 0 else atomic_folder(folder / f"step-{step:06d}") as new:
        for name, tensors in files.items():
            save_tensors(tensors, new and new / f"{name}.safetensors")  # None on the other ranks
            wait_for_ranks()  # not in the next file: the groups of --shard-ranks have a shorter time limit
        if rank() == 0:
            write_json(new / "progress.json", progress | {"hashes": hash_by_name(hashed_files(out, new))})
    wait_for_ranks()
    if rank() == 0:
        delete_checkpoints(out)


def check_checkpoint(out, step, command):
    """InputError unless the files of the checkpoint after `step` are as this run wrote them.
    command: of the run; Sim-RL's progress also counts prompts
    """
    folder = Path(out) / "checkpoints" / f"step-{step:06d}"
    remedy = "remove that folder to resume from the one before"
    path = folder / "progress.json"
    progress = check_fields(read_json(path, remedy), PROGRESS[command], path, remedy, needed=True)
    check_hashes(path, progress, hashed_files(out, folder), "--out", remedy)


def hashed_files(out, folder):
    """The settings of a run and the tensors of a checkpoint."""
    return [Path(out) / "arguments.json", *sorted(folder.glob("*.safetensors"))]


@torch.no_grad()
def load_checkpoint(out, step, model, optimisers):
    """Restore weights and optimisers as they were after `step`. Returns the progress saved with them."""
    folder = Path(out) / "checkpoints" / f"step-{step:06d}"
    progress = read_json(folder / "progress.json")
    progress.pop("hashes")
    weights, *moments = (safe_open(folder / f"{part}.safetensors", "pt") for part in ("weights", *MOMENTS))
    state = {}  # of each parameter, in its optimiser
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            state |= {p: optimiser.state[p] for p in group["params"]}
    for name, p in parameters(model).items():
        p.copy_(part_of(weights.get_tensor(name), p))
        for moment, file in zip(MOMENTS, moments):
            if name in file.keys():
                state[p][moment] = part_of(file.get_tensor(name).to(p.device, copy=True), p)
        if "exp_avg" in state[p]:
            state[p]["step"] = torch.tensor(float(progress["updates"]), device=p.device)
    return progress

"""The teacher of CKD: its top-k log-probs at the positions of a packed batch, live from a model or from a cache."""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train
from data import MODEL_FOLDER, InputError, hash_files, read_json
from data.cache import number_rows, open_cache, write_cache
from data.chat import check_rows, vocabulary
from head import counted_states, topk_log_probs
from model import Transformer, read_config


@dataclass(eq=False)
class Teacher:
    """A teacher as a function of a packed batch: (ids [N, k], log-probs [N, k]) of its counted positions."""
    model: Transformer  # None with a cache
    k: int
    vocab_size: int  # the softmax is over the first `vocab_size` ids
    seed: int = None  # draw k tokens at random instead of the top-k (rskd)
    cache: list = None  # the two arrays of `open_cache`; packed["rows"] are their rows

    @torch.no_grad()
    def __call__(self, packed, groups=None, step=None):
        """groups, step: the packed groups and the step number, used only to seed the draws of rskd."""
        device = packed["targets"].device
        if self.cache is not None:
            rows = packed["rows"].cpu().numpy()
            ids, log_p = (torch.from_numpy(array[rows]) for array in self.cache)  # [N, k] each
            return ids.to(device, torch.int64), log_p.to(device, torch.float32)
        hidden = counted_states(self.model, packed, torch.float32)  # [N, H]; no autocast: its weights' precision
        head = self.model.head_weight[:self.vocab_size]  # [V, H]
        uniform = None if self.seed is None else self.uniform(groups, step).to(device)
        return topk_log_probs(hidden, head, self.k, uniform)

    def uniform(self, groups, step):
        """k random numbers [N, k] in [0, 1) for each counted position. Those of a response depend on its tokens, on the
        seed and on the step, and not on the micro-batch or the rank."""
        numbers = []
        for group in groups:
            for response in group.responses:
                span = (len(group.prompt) + end for end in response.span)
                tokens = np.array([*span, *group.prompt, *response.ids], dtype=np.int32)
                digest = hashlib.sha256(repr((self.seed, step)).encode() + tokens.tobytes()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
                numbers.append(torch.rand(response.counted_tokens, self.k, generator=generator))
        return torch.cat(numbers)


def check_pair(teacher_folder, student_folder):
    """Refuse two different tokenizers, as CKD compares probabilities id by id, and a teacher with fewer rows than ids.

    Returns the number of ids to use: the rows of both embeddings if they are equal, else the tokenizer's ids.
    """
    teacher, student = vocabulary(teacher_folder), vocabulary(student_folder)
    if teacher != student:
        raise InputError(f"{teacher_folder} ({len(teacher[0]):,} tokens) and {student_folder} "
                         f"({len(student[0]):,}) have different tokenizers; CKD needs two models that share one")
    ids = teacher[0][-1][1] + 1  # the largest, and one more
    check_rows(teacher_folder, ids)  # `Chat` checks the student's
    paths = [Path(folder) / "config.json" for folder in (teacher_folder, student_folder)]
    rows = {read_config(read_json(path, MODEL_FOLDER), path)["vocab_size"] for path in paths}
    return ids if len(rows) == 2 else rows.pop()


def clamp_to_vocab(name, value, vocab_size):
    """k or m, reduced to the size of the vocabulary, with a note, if it is larger."""
    if value > vocab_size:
        train.note(f"--{name} {value} is more than the vocabulary: using all {vocab_size} ids")
    return min(value, vocab_size)


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
    if open_cache(args.cache, key) is None and train.world_size() > 1:
        raise InputError(f"{args.cache}: no cache there yet; write it with one process first (without torchrun)")
    return key


def load_teacher(args, groups, vocab_size, key, device, shard=None):
    """The teacher of a run: the model, or the cache of its log-probs, which is written now if it is missing.
    groups: all that the teacher will be asked about
    key: from `cache_key`"""
    cache = open_cache(args.cache, key) if args.cache else None
    if cache is not None:
        return Teacher(None, args.k, vocab_size, cache=cache)
    model = Transformer.from_pretrained(args.teacher, getattr(torch, args.dtype), device, shard)
    if args.compile:
        model.model.compile_layers()
    seed = args.seed if args.objective == "rskd" else None
    teacher = Teacher(model, args.k, vocab_size, seed)
    if not args.cache:
        return teacher
    write_cache(args.cache, groups, key, teacher, device, args.micro_batch_tokens)
    return Teacher(None, args.k, vocab_size, cache=open_cache(args.cache, key))

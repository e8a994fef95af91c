"""The teacher of CKD: its top-k log-probs at the positions of a packed batch, live from a model or from a cache."""
import hashlib
from dataclasses import dataclass

import numpy as np
import torch

import train
from data.cache import open_cache, write_cache
from head import counted_states, topk_log_probs
from model import Transformer


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


def clamp_to_vocab(name, value, vocab_size):
    """k or m, reduced to the size of the vocabulary, with a note, if it is larger."""
    if value > vocab_size:
        train.note(f"--{name} {value} is more than the vocabulary: using all {vocab_size} ids")
    return min(value, vocab_size)


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

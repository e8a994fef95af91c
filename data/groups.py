"""Groups: one prompt with several responses, the shape in which everything here is trained.

A group is packed as one run of tokens `prompt r1 r2 ... rn`, so the prompt is computed once for all its responses:

    token      p p p p | a a a | b b | c c c c
    segment    0 0 0 0 | 1 1 1 | 2 2 | 3 3 3 3
    position   0 1 2 3 | 4 5 6 | 4 5 | 4 5 6 7      each response continues at len(prompt)

A token attends to the prompt and to the earlier tokens of its own response: hidden states and gradients equal those of
n separate rows. The last prompt token predicts the first token of all n responses. Departures from the released code:
1. The released trainer pads n separate rows; here a prompt is computed once.
2. An optimiser batch is made of whole groups (128 sequences = 16 prompts x 8), not of trajectories of many prompts.
3. A prompt over the cap is skipped, never truncated (released: cut on the right, which loses the generation header),
   and so is a response over the cap (released: cut and given an end token, which teaches to stop mid-way).
"""
import json
import random
from array import array
from dataclasses import dataclass, replace
from itertools import cycle, groupby, islice
from os.path import commonprefix

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask

from data import InputError
from data.records import stream_records


@dataclass(slots=True)
class Response:
    """One response to a prompt: sampled, read from a rollout file, or the gold answer."""
    ids: list  # token ids, the stop token included; from a file an array("i"), 4 bytes a token
    span: tuple  # the part [start, end) of ids that the loss counts
    text: str = ""
    log_probs: list = None  # the sampler's log-prob of each id
    finish_reason: str = ""  # "stop" or "length"
    reward: float = None  # in [-1, 1]; -1 is a format failure
    answer_score: float = None  # in [0, 1]; the filter of Sim-RL uses it
    advantage: float = None
    details: dict = None  # other results of the reward function, for samples.jsonl
    row: int = 0  # the first of its rows in a teacher cache (data/cache.py)

    @property
    def counted_tokens(self):
        return self.span[1] - self.span[0]


@dataclass(slots=True)
class Group:
    """A record, its prompt as token ids, and the responses to it."""
    stored: dict | bytes  # the record; from a file as JSON, a fifth of the memory
    prompt: list  # from a file, an array("i")
    responses: list

    @property
    def record(self):
        """The record; parsed at each access if it is stored as JSON, so changes to it are lost."""
        return json.loads(self.stored) if isinstance(self.stored, bytes) else self.stored

    @property
    def length(self):
        """Tokens of the packed group: the prompt once and every response."""
        return len(self.prompt) + sum(len(r.ids) for r in self.responses)

    @property
    def rewards(self):
        return [r.reward for r in self.responses]


def counted_tokens(groups):
    """Number of response tokens of these groups in the loss."""
    return sum(r.counted_tokens for group in groups for r in group.responses)


# ---- From records to groups

def read_groups(args, chat):
    """Read the training and validation groups of `ckd` and `sft`, whose parsed flags are `args`, for a student's Chat.

    Without --valid, up to --hold-out groups of the data (at most a quarter) are drawn by the seed and held out.
    Returns (groups, valid, notes): what was skipped, as lines of text. InputError if no training group is left.
    """
    limits = (args.max_prompt_tokens, args.max_response_tokens, args.mask)
    records = stream_records(args.data, vocab_size=chat.vocab_size, limit=args.limit)
    groups, skipped = make_groups(records, chat, *limits, where=f"{args.data}: ")
    notes = [f"skipped in {args.data}: {count} {reason}" for reason, count in skipped.items() if count]
    if args.valid:
        records = stream_records(args.valid, vocab_size=chat.vocab_size, limit=args.valid_limit)
        valid, too_long = make_groups(records, chat, *limits, where=f"{args.valid}: ")
        notes += [f"skipped in {args.valid}: {count} {reason}" for reason, count in too_long.items() if count]
        if not valid:
            notes.append(f"no validation: every record of {args.valid} was skipped")
    else:
        count = min(args.hold_out, len(groups) // 4)
        held_out = set(random.Random(args.seed).sample(range(len(groups)), count))
        valid = [g for i, g in enumerate(groups) if i in held_out]
        groups = [g for i, g in enumerate(groups) if i not in held_out]
    if not groups:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count)
        raise InputError(f"{args.data}: no record is left to train on (skipped: {counts or 'none'}); "
                         "change --max-prompt-tokens, --max-response-tokens or --mask")
    return share_prefixes(groups, args.share_prefix), valid, notes


def make_groups(records, chat, max_prompt_tokens, max_response_tokens, mask="all", where=""):
    """Turn records into groups. Returns (groups, skipped), skipped as {reason: count}.

    records: train on their `responses`, by the stored token ids if there are any, else on their gold answer
    max_prompt_tokens, max_response_tokens: caps; longer ones are skipped
    mask: the response tokens in the loss: all; think, up to and including the last `</think>`;
        answer, the rest; alter, think and answer alternately. A response without `</think>` is all think if the
        prompt opened a think block, else all answer
    where: "FILE: ", for errors
    """
    if mask != "all" and chat.think_end_id is None:
        raise InputError(f"--mask {mask}: this tokenizer has no </think> token; use --mask all")
    parts = cycle(("think", "answer") if mask == "alter" else (mask,))  # of the responses of all records
    skipped = {"prompts too long": 0, "responses too long": 0, "responses with nothing to learn": 0}
    groups = []
    for record in records:
        rendered = record.get("rendered")
        if rendered not in (None, {"think": chat.think, "tools": chat.tools}):
            raise InputError(f"{where}record {record['id']}: was sampled with --think {rendered.get('think')} "
                             f"--tools {rendered.get('tools')}; give the same flags to this command")
        prompt = chat.encode(chat.prompt(record))
        if len(prompt) > max_prompt_tokens:
            skipped["prompts too long"] += 1
            continue
        without = {key: value for key, value in record.items() if key != "responses"}
        group = Group(json.dumps(without).encode(), array("i", prompt), [])
        for ids, part in zip(response_ids(record, chat, where), parts):
            start, end = counted_span(ids, chat, part)
            if len(ids) > max_response_tokens:
                skipped["responses too long"] += 1
            elif start == end:
                skipped["responses with nothing to learn"] += 1
            else:
                group.responses.append(Response(array("i", ids), (start, end)))
        if group.responses:
            groups.append(group)
    return groups, skipped


def response_ids(record, chat, where):
    """Token ids of each response of a record, or of its gold answer. An end token is added to text that lacks one."""
    if not record.get("responses"):
        return [chat.encode(chat.answer(record))]
    all_ids = []
    for response in record["responses"]:
        ids = response.get("ids")
        if not ids:
            ids = chat.encode(response["text"])
            if response.get("finish_reason") != "length" and (not ids or ids[-1] not in chat.stop_ids):
                ids.append(chat.end_id)
        elif response.get("text") not in (None, chat.decode(ids)):  # edited, or of another tokenizer
            raise InputError(f"{where}record {record['id']}: the text of a response is not that of its ids; "
                             "remove its ids")
        all_ids.append(ids)
    return all_ids


def counted_span(ids, chat, part):
    """(start, end) of the part of a response in the loss: "all", "think" or "answer"."""
    cut = len(ids) if chat.think == "on" else 0
    if chat.think_end_id in ids:
        cut = len(ids) - ids[::-1].index(chat.think_end_id)  # behind the last </think>
    return {"all": (0, len(ids)), "think": (0, cut), "answer": (cut, len(ids))}[part]


def share_prefixes(groups, records_per_row):
    """Merge up to `records_per_row` consecutive groups with the same tools into one with their common prompt prefix.
    The rest of each prompt, the question, moves in front of its responses, outside their spans. Positions stay.
    """
    if records_per_row == 1:
        return groups
    merged = []
    for _, same in groupby(groups, key=lambda group: group.record["tools"]):
        while members := list(islice(same, records_per_row)):
            shared = len(commonprefix([list(group.prompt) for group in members]))
            merged.append(replace(members[0], prompt=members[0].prompt[:shared], responses=[]))
            for group in members:
                question = group.prompt[shared:]
                for r in group.responses:
                    span = (len(question) + r.span[0], len(question) + r.span[1])
                    merged[-1].responses.append(replace(r, ids=question + r.ids, span=span))
    return merged


# ---- From groups to batches

def next_prompts(prompts, seed, first, count):
    """`count` prompts from number `first` on in an endless sequence of passes, each shuffled by (seed, pass)."""
    groups = []
    while len(groups) < count:
        episode, start = divmod(first + len(groups), len(prompts))
        order = list(range(len(prompts)))
        random.Random(f"{seed} {episode}").shuffle(order)
        end = start + count - len(groups)
        groups += [replace(prompts[i], responses=[]) for i in order[start:end]]
    return groups


def optimiser_batches(groups, batch_size, seed, epoch):
    """Whole groups in an order shuffled by (seed, epoch), cut as soon as a batch has `batch_size` sequences.

    >>> groups = [Group({"id": i}, [1], [Response([2], (0, 1))] * 4) for i in range(3)]
    >>> [[g.record["id"] for g in batch] for batch in optimiser_batches(groups, batch_size=8, seed=0, epoch=0)]
    [[0, 2], [1]]
    """
    order = list(range(len(groups)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    batches = []
    for i in order:
        if not batches or sum(len(group.responses) for group in batches[-1]) >= batch_size:
            batches.append([])
        batches[-1].append(groups[i])
    return batches


def plan_batches(groups, args):
    """The optimiser batches of a whole run of `ckd` or `sft`: --steps of them, or --epochs passes over the groups."""
    passes = range(args.steps or args.epochs)  # a pass has at least one batch
    batches = (batch for epoch in passes for batch in optimiser_batches(groups, args.batch_size, args.seed, epoch))
    return list(islice(batches, args.steps))


def micro_batches(groups, token_budget):
    """Split groups, longest first, into lists that each pack into at most `token_budget` tokens, padding included.
    A group over the budget is cut between its responses, each part with the prompt again.
    """
    parts = []
    for group in groups:
        parts.append(replace(group, responses=[]))
        for response in group.responses:
            if parts[-1].responses and parts[-1].length + len(response.ids) > token_budget:
                parts.append(replace(group, responses=[]))
            parts[-1].responses.append(response)
    parts.sort(key=lambda part: part.length, reverse=True)
    batches = []
    for part in parts:
        if not batches or (len(batches[-1]) + 1) * batches[-1][0].length > token_budget:
            batches.append([])
        batches[-1].append(part)
    return batches


def pack(groups, device="cpu", width=None):
    """Pack groups into rows as wide as the longest group (or `width`), several groups to a row if they fit.

    Returns a dict of int64 tensors:
      input_ids, positions, group, segment   [B, T]; padding has group -1
      logit_positions   [N] index into the flattened B x T of the token that predicts each counted response token
      targets           [N] that token's id
      response          [N] the response it belongs to, numbered through the groups in order
      rows              [N] its row in a teacher cache
    """
    width = width or max(group.length for group in groups)
    places = first_fit([group.length for group in groups], width)
    shape = (1 + max(b for b, _ in places), width)
    input_ids, positions, segment = np.zeros((3, *shape), dtype=np.int64)  # [B, T] each
    group_index = np.full(shape, -1, dtype=np.int64)
    counted = {"logit_positions": [], "targets": [], "response": [], "rows": []}
    for index, (group, (b, start)) in enumerate(zip(groups, places)):
        prompt = len(group.prompt)
        at = start + prompt
        input_ids[b, start:at] = group.prompt
        positions[b, start:at] = np.arange(prompt)
        group_index[b, start:start + group.length] = index
        for j, response in enumerate(group.responses, start=1):
            end = at + len(response.ids)
            input_ids[b, at:end] = response.ids
            positions[b, at:end] = np.arange(prompt, prompt + end - at)
            segment[b, at:end] = j
            predictors = np.arange(at - 1, end - 1)
            predictors[0] = start + prompt - 1  # the last prompt token predicts every response's first token
            low, high = response.span
            counted["logit_positions"].append(b * width + predictors[low:high])
            counted["targets"].append(np.array(response.ids[low:high], dtype=np.int64))
            counted["response"].append(np.full(high - low, len(counted["response"])))  # numbered in order
            counted["rows"].append(np.arange(response.row, response.row + high - low))
            at = end
    arrays = {"input_ids": input_ids, "positions": positions, "group": group_index, "segment": segment}
    arrays |= {name: np.concatenate(parts) for name, parts in counted.items()}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def first_fit(lengths, width):
    """(row, start) of each length, placed into the first row of `width` tokens that has room."""
    ends = [0] * len(lengths)  # of what each row holds; the last rows stay empty
    places = []
    for length in lengths:
        row = next(i for i, end in enumerate(ends) if end + length <= width)
        places.append((row, ends[row]))
        ends[row] += length
    return places


def attention_mask(packed, blocks=False):
    """The mask [B, 1, T, T] of a packed batch, bool: True where query q attends to key k.
    k <= q in the same group, and k in the prompt (segment 0) or in q's own response. Padding attends to padding.

    blocks: return the BlockMask of this rule for flex_attention, which skips blocks of 128 x 128 that nothing sees
    """
    group = packed["group"]  # [B, T]
    segment = packed["segment"]  # [B, T]
    B, T = segment.shape

    def sees(b, h, q, k):
        own = segment[b, q] == segment[b, k]
        return (k <= q) & (group[b, q] == group[b, k]) & (own | (segment[b, k] == 0))

    if blocks:
        return create_block_mask(sees, B, None, T, T, segment.device)
    t = torch.arange(T, device=segment.device)
    b = torch.arange(B, device=segment.device)[:, None, None, None]  # [B, 1, 1, 1]
    return sees(b, None, t[:, None], t)  # [B, 1, T, T]

"""Groups: one prompt with several responses, the shape in which everything here is trained.

A group is packed as one run of tokens `prompt r1 r2 … rn`, so the prompt is computed once for all its responses:

    token      p p p p | a a a | b b | c c c c
    segment    0 0 0 0 | 1 1 1 | 2 2 | 3 3 3 3
    position   0 1 2 3 | 4 5 6 | 4 5 | 4 5 6 7      each response continues at len(prompt)

A token sees the prompt and the earlier tokens of its own response. That is exact: hidden states and gradients equal
those of n separate rows. The logit of a response's first token comes from the last prompt token, which all n share.

Departures from the released code:
1. The released trainer pads n separate rows; here a prompt is computed once.
2. An optimiser batch is made of whole groups (128 sequences = 16 prompts x 8), not of trajectories of many prompts.
3. A prompt over the cap is left out and counted (released: cut on the right, which loses the generation header); so is
   a response over the cap (released: cut and given an end token, which teaches to stop mid-way).
"""
import random
from os.path import commonprefix

import numpy as np
import torch

from data import InputError
from data.sources import read_records


def read_groups(data, valid, chat, caps, limit=None, valid_limit=None, hold_out=32, seed=42, branches=1, say=print):
    """The groups of record or rollout files: (those to train on, those to validate on).

    data: the file to train on · valid: the file to validate on; None holds out up to `hold_out` groups of `data`, a
    quarter at most, drawn by `seed` · caps: what follows chat in `make_groups` · limit, valid_limit: only the first so
    many records of each · branches: see `join` · say: prints what of `data` is left out. InputError when nothing is left
    to train on.
    """
    groups, left_out = make_groups(read_records(data, True, chat.vocab_size)[:limit], chat, *caps)
    for reason in filter(left_out.get, left_out):
        say(f"left out of {data}: {left_out[reason]} {reason}")
    if valid:
        held, _ = make_groups(read_records(valid, True, chat.vocab_size)[:valid_limit], chat, *caps)
    else:
        drawn = set(random.Random(seed).sample(range(len(groups)), min(hold_out, len(groups) // 4)))
        held, groups = ([g for i, g in enumerate(groups) if (i in drawn) == wanted] for wanted in (True, False))
    if not groups:
        raise InputError(f"{data}: no record is left to train on; see above, and change --max-*-tokens or --mask")
    return join(groups, branches), held


def make_groups(records, chat, max_prompt_tokens, max_response_tokens, mask="all"):
    """Turn records into groups of ids.

    A record with `responses` (a rollout file) gives one response for each, by its own token ids where it has them; any
    other record trains along its gold answer. A response given as text only gets the end token it lacks. `mask` says
    which response tokens count (paper.md 1.2): all · think, up to and including the last `</think>` · answer, what
    follows it · alter, think and answer in turn by response. A response without `</think>` is all think where the
    prompt opened a think block, and all answer where it did not.

    Returns (groups, left_out): a group is a dict of `record`, `prompt` (ids) and `responses`, each a dict of `ids` and
    `span`, the part [start, end) that counts; left_out says what was not taken and why, {reason: number}.
    """
    if mask != "all" and chat.think_end_id is None:
        raise InputError(f"--mask {mask}: this tokenizer has no </think> token; use --mask all")
    groups, seen = [], 0
    left_out = {"prompts too long": 0, "responses too long": 0, "responses with nothing to learn": 0}
    rendered = {"think": chat.think, "tools": chat.tools}
    for record in records:
        if record.get("rendered", rendered) != rendered:
            raise InputError(f"record {record['id']}: was sampled with --think {record['rendered']['think']} --tools "
                             f"{record['rendered']['tools']}; give the same to this command")
        prompt = chat.encode(chat.prompt(record))
        if len(prompt) > max_prompt_tokens:
            left_out["prompts too long"] += 1
            continue
        if record.get("responses"):
            texts = [r.get("ids") or chat.encode(r["text"]) for r in record["responses"]]
            texts = [ids if r.get("ids") or ids and ids[-1] in chat.stop_ids else ids + [chat.end_id]
                     for ids, r in zip(texts, record["responses"])]
        else:
            texts = [chat.encode(chat.answer(record))]
        group = {"record": record, "prompt": prompt, "responses": []}
        for ids in texts:
            part = ("think", "answer")[seen % 2] if mask == "alter" else mask
            seen += 1
            if len(ids) > max_response_tokens:
                left_out["responses too long"] += 1
                continue
            cut = len(ids) if chat.think == "on" else 0
            if chat.think_end_id in ids:
                cut = len(ids) - ids[::-1].index(chat.think_end_id)
            start, end = {"all": (0, len(ids)), "think": (0, cut), "answer": (cut, len(ids))}[part]
            if start == end:
                left_out["responses with nothing to learn"] += 1
                continue
            group["responses"].append({"ids": ids, "span": (start, end)})
        if group["responses"]:
            groups.append(group)
    return groups, left_out


def join(groups, branches):
    """Let up to `branches` neighbouring groups with the same tools be one, whose prompt is what their prompts share.

    The rest of each prompt (the question) stands before its responses, outside their spans. Every token sees what it
    saw before, at the position it had before; what is shared is computed once.
    """
    joined = []
    for group in groups:
        last = joined[-1] if joined else []
        if last and len(last) < branches and last[0]["record"]["tools"] == group["record"]["tools"]:
            last.append(group)
        else:
            joined.append([group])
    for i, members in enumerate(joined):
        prompts = [group["prompt"] for group in members]
        cut, responses = len(commonprefix(prompts)), []
        for group, prompt in zip(members, prompts):
            rest = prompt[cut:]
            responses += [r | {"ids": rest + r["ids"], "span": (len(rest) + r["span"][0], len(rest) + r["span"][1])}
                          for r in group["responses"]]
        joined[i] = members[0] | {"prompt": prompts[0][:cut], "responses": responses}
    return joined


def length(group):
    """Tokens of a packed group: the prompt once and every response."""
    return len(group["prompt"]) + sum(len(response["ids"]) for response in group["responses"])


def counted_tokens(groups):
    """How many response tokens of these groups count in the loss."""
    return sum(end - start for group in groups for start, end in (r["span"] for r in group["responses"]))


def optimiser_batches(groups, batch, seed, epoch):
    """Whole groups in a shuffled order that depends on (seed, epoch) alone, cut wherever `batch` sequences are full.

    The last batch may be smaller, so fewer sequences than a batch still make one step.

    >>> groups = [{"id": str(i), "prompt": [1], "responses": [{"ids": [2]}] * 4} for i in range(3)]
    >>> [[g["id"] for g in b] for b in optimiser_batches(groups, batch=8, seed=0, epoch=0)]
    [['0', '2'], ['1']]
    """
    order = list(range(len(groups)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    batches, sequences = [[]], 0
    for i in order:
        if sequences >= batch:
            batches.append([])
            sequences = 0
        batches[-1].append(groups[i])
        sequences += len(groups[i]["responses"])
    return batches


def micro_batches(groups, token_budget):
    """Split groups into lists that each pack into at most `token_budget` tokens, padding included.

    Longest first, so that rows of a micro-batch are alike. A group over the budget is cut between its responses, each
    part with the prompt again; a single response over the budget stands alone.
    """
    parts = []
    for group in groups:
        part = group | {"responses": []}
        for response in group["responses"]:
            if part["responses"] and length(part) + len(response["ids"]) > token_budget:
                parts.append(part)
                part = group | {"responses": []}
            part["responses"].append(response)
        parts.append(part)
    parts.sort(key=length, reverse=True)
    split = []
    for part in parts:
        if not split or (len(split[-1]) + 1) * length(split[-1][0]) > token_budget:  # rows as wide as the longest
            split.append([])
        split[-1].append(part)
    return split


def pack(groups, device="cpu", width=None):
    """Pack groups into rows as wide as the longest of them (or `width`), several groups to a row where they fit.

    Returns a dict of tensors:
      input_ids, positions, group, segment   [B, T] int64; padding has group -1
      predictors  [N] index into the flattened B x T of the token that predicts each counted response token
      targets     [N] that token's id
      response    [N] the response it belongs to, counted through the groups in order
    """
    width = width or max(map(length, groups))
    rows, ends = [], []
    for index, group in enumerate(groups):  # first fit
        row = next((i for i, end in enumerate(ends) if end + length(group) <= width), len(rows))
        if row == len(rows):
            rows.append([])
            ends.append(0)
        rows[row].append((index, ends[row]))
        ends[row] += length(group)

    ids, positions, segment = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(3))
    which = np.full((len(rows), width), -1, dtype=np.int64)
    first_response = np.cumsum([0] + [len(g["responses"]) for g in groups])
    places = []  # for each counted stretch: group, response, predictors, targets
    for b, members in enumerate(rows):
        for index, start in members:
            group = groups[index]
            prompt = len(group["prompt"])
            at = start + prompt
            ids[b, start:at] = group["prompt"]
            positions[b, start:at] = np.arange(prompt)
            which[b, start:start + length(group)] = index
            for r, response in enumerate(group["responses"]):
                end, (low, high) = at + len(response["ids"]), response["span"]
                ids[b, at:end] = response["ids"]
                positions[b, at:end] = np.arange(prompt, prompt + end - at)
                segment[b, at:end] = r + 1
                before = np.arange(at - 1, end - 1)
                before[0] = start + prompt - 1  # the last prompt token predicts every response's first token
                places.append((first_response[index] + r, b * width + before[low:high], response["ids"][low:high]))
                at = end
    places.sort(key=lambda place: place[0])
    tensors = {"input_ids": ids, "positions": positions, "group": which, "segment": segment,
               "predictors": np.concatenate([p for _, p, _ in places]),
               "targets": np.concatenate([np.array(t, dtype=np.int64) for _, _, t in places]),
               "response": np.concatenate([np.full(len(p), r) for r, p, _ in places])}
    return {name: torch.from_numpy(array).to(device) for name, array in tensors.items()}


def visible(batch):
    """The attention mask [B, 1, T, T] of a packed batch: True where query q may see key k.

    k <= q, in the same group, and k in the prompt (segment 0) or in q's own response. Padding sees padding: a row of
    the softmax must not be empty.
    """
    T = batch["segment"].shape[1]
    t = torch.arange(T, device=batch["segment"].device)
    earlier = t[:, None] >= t[None, :]  # [T, T]
    group, segment = batch["group"], batch["segment"]
    together = group[:, :, None] == group[:, None, :]  # [B, T, T]
    own = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])  # [B, T, T]
    return (earlier & together & own)[:, None]  # [B, 1, T, T]

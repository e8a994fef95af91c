"""Sim-RL (paper section 3.2): so far its sampler; the GRPO loop follows.

The sampler mirrors the group layout of data/groups.py. A prompt is prefilled once, and its n continuations live in the
same cache row: a step feeds one token for each of them, and a mask lets a token see the prompt and its own
continuation's earlier tokens. The prompt's keys and values are stored once and read once a step, not n times.

Departures from the released code:
1. One model samples and trains; the released run hands its weights to vLLM and recomputes the log-probs.
2. Ids beyond the tokenizer (padding rows of the embedding) are never sampled.
3. The token that ends a response is kept as its last id, and nothing is appended to one that was cut off.
"""
import torch

from model import KVCache


def next_tokens(logits, uniform, temperature, top_p):
    """Draw one token for each row of logits [R, V] with one uniform number each, [R].

    temperature 0 takes the likeliest token. top_p < 1 keeps the fewest tokens whose mass reaches top_p. Returns ids
    [R] and log-probs [R] under the distribution that was drawn from; for temperature 0, under the softmax itself.

    >>> logits = torch.tensor([[0., 2., 1.]]).log()
    >>> [next_tokens(logits, torch.tensor([u]), 1.0, 1.0)[0].item() for u in (0.1, 0.6, 0.7)]
    [1, 1, 2]
    >>> next_tokens(logits, torch.tensor([0.9]), 1.0, 0.6)  # only token 1 is needed to reach 0.6
    (tensor([1]), tensor([0.]))
    """
    logits = logits.float()
    log_probs = (logits / temperature if temperature > 0 else logits).log_softmax(-1)  # [R, V]
    if temperature == 0:
        ids = log_probs.argmax(-1)
        return ids, log_probs.gather(-1, ids[:, None]).squeeze(-1)
    if top_p < 1:
        ordered, order = log_probs.sort(-1, descending=True)  # [R, V]
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass of the likelier tokens
        dropped = torch.empty_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        log_probs = log_probs.masked_fill(dropped, -torch.inf).log_softmax(-1)
    # Inverse transform: the first token whose cumulative mass exceeds the uniform number.
    high = torch.float32 if logits.device.type == "mps" else torch.float64  # which mps does not have
    mass = log_probs.exp().cumsum(-1, dtype=high)  # [R, V]
    ids = torch.searchsorted(mass, uniform[:, None].to(high) * mass[:, -1:], right=True)  # [R, 1]
    ids = ids.clamp(max=logits.shape[-1] - 1)  # in float32 the product may round up to the whole mass
    return ids.squeeze(-1), log_probs.gather(-1, ids).squeeze(-1)


@torch.no_grad()
def generate(model, prompts, n, max_new_tokens, stop_ids, generator, temperature=1.0, top_p=1.0, width=None,
             each_step=None):
    """Sample n continuations of each prompt, all together.

    model: a Transformer (in the precision to sample with) · prompts: lists of ids, of any lengths · stop_ids: tokens
    that end a continuation · generator: a CPU torch.Generator, the only source of randomness · width: sample from the
    first `width` ids only · each_step: called after every step with {(prompt, sample): token id}.

    Returns for each prompt a list of n dicts: `ids` (a stop token included), `logprobs` (one for each id) and
    `finish_reason`, "stop" or "length". The same uniform numbers go to the same (prompt, sample, step) whatever else
    is still running. A prompt's continuations share one cache row of len(prompt) + n x steps keys: made for n of some
    tens at most.
    """
    device = model.head_weight.device
    samples = [[{"ids": [], "logprobs": [], "finish_reason": "length"} for _ in range(n)] for _ in prompts]
    lengths = torch.tensor([len(p) for p in prompts])  # [P]
    ids, segment = torch.zeros(2, len(prompts), int(lengths.max()), dtype=torch.long)  # [P, T]
    for i, prompt in enumerate(prompts):
        ids[i, :len(prompt)] = torch.tensor(prompt)
        segment[i, len(prompt):] = -1  # padding: no continuation has this number, so none sees it
    cache = KVCache(len(model.model.layers))
    hidden = model.hidden(ids.to(device), cache=cache)  # [P, T, hidden]; what stands behind a prompt's end is not used
    hidden = hidden[torch.arange(len(prompts)), lengths - 1][:, None].expand(-1, n, -1)  # [P, n, hidden]
    # Which prompt each cache row belongs to, and which sample sits in each of its slots (-2: an empty slot).
    rows, slots = torch.arange(len(prompts)), torch.arange(n).expand(len(prompts), n)
    for step in range(max_new_tokens):
        logits = hidden.flatten(0, 1) @ model.head_weight[:width].T  # [rows * slots, V]
        uniform = torch.rand(len(prompts), n, generator=generator)[rows[:, None], slots]  # [rows, slots]
        tokens, logprobs = next_tokens(logits, uniform.flatten().to(device), temperature, top_p)
        tokens, logprobs = tokens.cpu().view_as(slots), logprobs.cpu().view_as(slots)  # [rows, slots]
        alive, came = slots.clone(), {}
        for row, slot in (slots >= 0).nonzero().tolist():
            where, token = (rows[row].item(), slots[row, slot].item()), tokens[row, slot].item()
            sample = samples[where[0]][where[1]]
            sample["ids"].append(token)
            sample["logprobs"].append(logprobs[row, slot].item())
            came[where] = token
            if token in stop_ids:
                sample["finish_reason"], alive[row, slot] = "stop", -2
        if each_step is not None:
            each_step(came)
        # Those that ended leave the batch: a prompt with none left leaves the cache, and slots close up. All prompts
        # have as many slots as the one with most still running; the others' spare slots are empty.
        running = (alive >= 0).sum(1)  # [rows]
        if step + 1 == max_new_tokens or not running.any():
            break
        keep = running.nonzero().squeeze(1)
        if len(keep) < len(rows):
            cache.keep(keep.to(device))
            rows, alive, tokens, segment = rows[keep], alive[keep], tokens[keep], segment[keep]
        front = (alive < 0).sort(dim=1, stable=True).indices[:, :running.max()]  # [rows, slots]
        slots, tokens = alive.gather(1, front), tokens.gather(1, front)  # [rows, slots]
        # Sample j is segment j + 1, as in a packed group; an empty slot gets a number that nobody sees.
        segment = torch.cat((segment, slots + 1), dim=1)  # [rows, S]
        mask = (segment[:, None] == 0) | (segment[:, None] == slots[:, :, None] + 1)  # [rows, slots, S]
        positions = (lengths[rows] + step)[:, None].expand_as(slots)  # [rows, slots]
        hidden = model.hidden(tokens.to(device), positions.to(device), mask[:, None].to(device), cache)
    return samples

"""The sampler: prompts in, responses sampled from the model that is being trained out.

A prompt is prefilled once, and its n samples share one cache row: a decoding step feeds one token per sample, and a
mask lets that token attend to the prompt and to the earlier tokens of its own sample. The prompt's keys and values are
stored once and read once a step instead of n times. Training packs groups in the same layout (data/groups.py).

    generate    prefill -> (draw a token per sample -> retire finished samples -> decode) until all are finished
    next_token  one draw per row of logits: temperature, top-p, inverse transform of one uniform number

Shapes: P prompts, B cache rows in use, K slots in a row, S cached keys, V ids in the vocabulary, H hidden size.

Departures from the released code:
1. No vLLM: the released run hands its weights to another engine and recomputes the log-probs.
2. Ids beyond the tokenizer (padding rows of the embedding) are never sampled.
3. The stop token is the last id of a response. An immediate stop is allowed; the released code forces one other token
   first. Nothing is appended to a response that reached the length limit (released: an end token).
"""
import torch

from data import non_negative, number, positive
from data.groups import Response
from model import KVCache

FINISHED = -2  # in `slots`: no sample decodes here; slot + 1 is -1, the segment of padding


def add_count_flags(parser, n, least=1, n_help="responses per prompt"):
    """Flags that say how many responses are sampled, and of what length."""
    add = parser.add_argument_group("samples").add_argument
    add("--n", type=number(int, least), default=n, help=n_help)
    add("--max-concurrent", type=positive, default=64, metavar="N",
        help="sequences generated concurrently")
    add_length_flag(parser)


def add_length_flag(parser):
    """The flag that limits the length of a response."""
    parser.add_argument("--max-new-tokens", type=positive, default=512,
                        help="stop a response at this length")


def add_sampling_flags(parser, temperature):
    """Flags of the distribution that is sampled from."""
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=non_negative, default=temperature, help="0 is greedy")
    add("--top-p", type=number(float, 1e-6, 1.0), default=1.0,
        help="sample from the most likely tokens with this total probability")


def next_token(logits, uniform, temperature, top_p):
    """Draw one token per row of logits with one uniform number per row.

    logits: [R, V]
    uniform: [R], in [0, 1)
    temperature: 0 takes the most likely token
    top_p: below 1, keep the fewest tokens whose total probability reaches it

    Returns ids [R] and log-probs [R], after temperature and top-p; for temperature 0, under the plain softmax.

    >>> logits = torch.tensor([[0., 2., 1.]]).log()
    >>> [next_token(logits, torch.tensor([u]), 1.0, 1.0)[0].item() for u in (0.1, 0.6, 0.7)]
    [1, 1, 2]
    >>> next_token(logits, torch.tensor([0.9]), 1.0, 0.6)  # token 1 alone reaches 0.6
    (tensor([1]), tensor([0.]))
    """
    logits = logits.float()
    if temperature == 0:
        log_probs = logits.log_softmax(-1)  # [R, V]
        ids = log_probs.argmax(-1, keepdim=True)  # [R, 1]
        return ids.squeeze(-1), log_probs.gather(-1, ids).squeeze(-1)
    log_probs = (logits / temperature).log_softmax(-1)  # [R, V]
    if top_p < 1:
        ordered, order = log_probs.sort(-1, descending=True)  # [R, V]
        mass_before = ordered.exp().cumsum(-1) - ordered.exp()  # [R, V], of the more likely tokens
        excluded = torch.empty_like(mass_before, dtype=torch.bool)
        excluded.scatter_(-1, order, mass_before >= top_p)
        log_probs = log_probs.masked_fill(excluded, -torch.inf).log_softmax(-1)
    # Inverse transform: the first token whose cumulative mass exceeds the uniform number.
    high = torch.float32 if logits.device.type == "mps" else torch.float64  # mps has no float64
    mass = log_probs.exp().cumsum(-1, dtype=high)  # [R, V]
    threshold = uniform[:, None].to(high) * mass[:, -1:]  # [R, 1]
    ids = torch.searchsorted(mass, threshold, right=True)  # [R, 1]
    ids = ids.clamp(max=logits.shape[-1] - 1)  # in float32 the threshold may round up to the whole mass
    return ids.squeeze(-1), log_probs.gather(-1, ids).squeeze(-1)


@torch.no_grad()
def generate(model, prompts, n, max_new_tokens, stop_ids, generator, temperature=1.0, top_p=1.0,
             vocab_size=None, on_token=None):
    """Sample n responses to each prompt, all of them concurrently.

    model: a Transformer, in the precision to sample with
    prompts: lists of ids, of any lengths
    stop_ids: tokens that end a response
    generator: a CPU torch.Generator, or a list of one per prompt; the only source of randomness
    temperature, top_p: as in `next_token`
    vocab_size: sample from the first `vocab_size` ids only
    on_token: called after every step with {(prompt, sample): id}

    Returns a list of n `Response` for each prompt, its finish_reason "stop" (the stop token is the last id) or
    "length". A (prompt, sample, step) gets the same uniform number no matter which others are still running.
    The samples of a prompt share a cache row of len(prompt) + n x steps keys, so keep n to a few tens.
    """
    generators = generator if isinstance(generator, list) else [generator] * len(prompts)
    head = model.head_weight[:vocab_size]  # [V, H]
    samples = [[Response([], (0, 0), log_probs=[]) for _ in range(n)] for _ in prompts]
    cache = KVCache(len(model.model.layers))
    lengths = torch.tensor([len(prompt) for prompt in prompts])  # [P]
    hidden, segment = prefill(model, prompts, lengths, cache)  # [P, H], [P, S]
    hidden = hidden[:, None].expand(-1, n, -1)  # [P, n, H]
    # Cache row r decodes prompt rows[r]; slots[r, k] is the number of the sample decoded there, or FINISHED.
    rows = torch.arange(len(prompts))
    slots = torch.arange(n).expand(len(prompts), n)  # [B, K]
    for step in range(max_new_tokens):
        # 1. Draw a token for every slot.
        logits = hidden.flatten(0, 1) @ head.T  # [B * K, V]
        uniform = torch.stack([torch.rand(n, generator=g) for g in generators])  # [P, n]
        uniform = uniform[rows[:, None], slots]  # [B, K]; FINISHED reads one that is not used
        uniform = uniform.flatten().to(logits.device)  # [B * K]
        ids, log_probs = next_token(logits, uniform, temperature, top_p)
        ids = ids.cpu().view_as(slots)  # [B, K]
        log_probs = log_probs.cpu().view_as(slots)  # [B, K]
        # 2. Append it to the samples; retire finished samples.
        slots, new_ids = append_tokens(samples, rows, slots, ids, log_probs, stop_ids)
        if on_token is not None:
            on_token(new_ids)
        running = (slots >= 0).sum(1)  # [B]
        if step + 1 == max_new_tokens or not running.any():
            break
        # 3. Drop finished prompts; move running samples to the front of each row and trim the width.
        keep = running.nonzero().squeeze(1)
        if len(keep) < len(rows):
            cache.keep_rows(keep.to(logits.device))
            rows = rows[keep]
            slots = slots[keep]
            ids = ids[keep]
            segment = segment[keep]
        order = (slots < 0).sort(dim=1, stable=True).indices  # [B, K], running ones first
        order = order[:, :running.max()]  # [B, K]
        slots = slots.gather(1, order)  # [B, K]
        ids = ids.gather(1, order)  # [B, K]
        # 4. Decode: one new key per slot. Sample j is segment j + 1, as in a packed group.
        segment = torch.cat((segment, slots + 1), dim=1)  # [B, S]
        positions = (lengths[rows] + step)[:, None].expand_as(slots)  # [B, K]
        mask = sample_mask(segment, slots)  # [B, 1, K, S]
        inputs = [tensor.to(logits.device) for tensor in (ids, positions, mask)]
        hidden = model.hidden_states(*inputs, cache)  # [B, K, H]
    return samples


def sample_mask(segment, slots):
    """A slot attends to its prompt and to its own sample: [B, S], [B, K] -> [B, 1, K, S]."""
    in_prompt = segment[:, None] == 0  # [B, 1, S]
    same_sample = segment[:, None] == slots[:, :, None] + 1  # [B, K, S]
    return (in_prompt | same_sample)[:, None]


def prefill(model, prompts, lengths, cache):
    """Run all prompts through the model, filling the cache.

    Returns the hidden states [P, H] of the last tokens, and the segment of each cached key [P, S]: 0 for a prompt
    token, -1 for padding, which no sample attends to.
    """
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)  # [P, S]
    segment = torch.zeros_like(ids)  # [P, S]
    for i, prompt in enumerate(prompts):
        ids[i, :len(prompt)] = torch.tensor(prompt)
        segment[i, len(prompt):] = -1
    ids = ids.to(model.head_weight.device)
    hidden = model.hidden_states(ids, cache=cache)  # [P, S, H], causal
    return hidden[torch.arange(len(prompts)), lengths - 1], segment


def append_tokens(samples, rows, slots, ids, log_probs, stop_ids):
    """Append the tokens just drawn, [B, K], to the samples they belong to.

    Returns the slots with finished samples marked, and the new tokens as {(prompt, sample): id}.
    """
    remaining = slots.clone()
    new_ids = {}
    for row, slot in (slots >= 0).nonzero().tolist():
        prompt = rows[row].item()
        sample = slots[row, slot].item()
        token = ids[row, slot].item()
        response = samples[prompt][sample]
        response.ids.append(token)
        response.log_probs.append(log_probs[row, slot].item())
        response.span = (0, len(response.ids))
        response.finish_reason = "length"  # unless a later token is a stop token
        new_ids[prompt, sample] = token
        if token in stop_ids:
            response.finish_reason = "stop"
            remaining[row, slot] = FINISHED
    return remaining, new_ids


def sample_groups(model, groups, seeds, chat, args):
    """Sample the responses of groups, in chunks of prompts of similar length.

    groups: a list of `Group`; their responses are replaced
    seeds: one for each group
    args: parsed flags n, max_new_tokens, max_concurrent, temperature
    """
    order = sorted(range(len(groups)), key=lambda i: len(groups[i].prompt))
    concurrent = max(1, args.max_concurrent // args.n)  # prompts
    for at in range(0, len(order), concurrent):
        part = order[at:at + concurrent]
        prompts = [groups[i].prompt for i in part]
        generators = [torch.Generator().manual_seed(seeds[i]) for i in part]
        samples = generate(model, prompts, args.n, args.max_new_tokens, chat.stop_ids,
                           generators, args.temperature, vocab_size=chat.vocab_size)
        for i, responses in zip(part, samples):
            groups[i].responses = responses


def greedy_answers(model, chat, groups, dtype, name):
    """Greedy answers to a few groups' prompts: [{"request": text, "gold": text or None, name: text}]."""
    if not groups:
        return []
    prompts = [group.prompt for group in groups]
    samples = generate(model.in_dtype(dtype), prompts, 1, 128, chat.stop_ids, torch.Generator(),
                       temperature=0.0, vocab_size=chat.vocab_size)
    answers = []
    for group, (response,) in zip(groups, samples):
        gold = chat.answer(group.record) if group.record.get("answer") else None
        request = group.record["messages"][-1]["content"]
        answers.append({"request": request, "gold": gold, name: chat.decode(response.ids)})
    return answers

"""The keys and values of prompts and of the responses that continue them, and attention over both.

Shapes: B responses, P prompts, G responses to a prompt at most, T tokens, S cached keys, H query heads, Hkv key/value
heads, R = H / Hkv query heads that share keys, D head size.

Departure from the released code: vLLM keeps keys in pages; here a response has a row of fixed length.
"""
import torch

from model import attention


class KVCache:
    """Keys and values of prompts and of the responses that continue them, in static buffers.

    A layer has a buffer [2, rows, Hkv, tokens, D] for prompts and one for responses; a prompt is stored and read once,
    however many responses continue it. What lies in a row beyond its sequence is never seen, so a row is reused
    without being cleared. `start_prompts` or `start_step` says what the next forward pass computes.
    """

    def __init__(self, model, prompt_rows, prompt_tokens, response_rows, response_tokens):
        c = model.model.c
        new_zeros = model.head_weight.new_zeros  # of what lies in new memory, 0 times nan would be nan
        heads = c["num_key_value_heads"]
        layers = range(c["num_hidden_layers"])
        self.prompts = [new_zeros(2, prompt_rows, heads, prompt_tokens, c["head_dim"]) for _ in layers]
        self.responses = [new_zeros(2, response_rows, heads, response_tokens, c["head_dim"]) for _ in layers]

    def start_prompts(self, row):
        """The next pass computes whole prompts [B, T], to be stored in the rows from `row` on."""
        self.row = row
        self.place = None

    def start_step(self, prompt_rows, prompt_lengths, lengths):
        """The next pass computes one token of the responses in rows 0 ... B - 1.

        prompt_rows: B integers, the row of each response's prompt
        prompt_lengths: P integers, the tokens of each prompt
        lengths: B integers, the tokens of each response before this one
        """
        count = [0] * len(prompt_lengths)
        place = []  # of each response in a grid of P prompts x G responses
        for row in prompt_rows:
            place.append((row, count[row]))
            count[row] += 1
        device = self.prompts[0].device
        self.grid = (len(count), max(count))  # P, G
        self.place = torch.tensor(place).T.to(device)  # [2, B]
        self.lengths = torch.tensor(lengths).to(device)  # [B]
        keys = torch.arange(key_width(max(lengths) + 1, self.responses), device=device)
        self.mask = (keys <= self.lengths[:, None])[:, None, None]  # [B, 1, 1, S]
        keys = torch.arange(key_width(max(prompt_lengths), self.prompts), device=device)
        self.prompt_mask = (keys < torch.tensor(prompt_lengths).to(device)[:, None])[:, None, None]  # [P, 1, 1, S]

    def attend(self, layer, q, k, v):
        """Store new keys and values [B, Hkv, T, D]. Return the attention [B, H, T, D] of the queries q [B, H, T, D]."""
        kv = torch.stack((k, v))  # [2, B, Hkv, T, D]
        prompts = self.prompts[layer]
        responses = self.responses[layer]
        B, H, T, D = q.shape
        if self.place is None:
            prompts[:, self.row:self.row + B, :, :T] = kv
            return attention(q, k, v)
        rows = torch.arange(B, device=q.device)
        responses[:, rows, :, self.lengths] = kv.squeeze(3).transpose(0, 1)  # [B, 2, Hkv, D]
        q = q.view(B, k.shape[1], -1, D)  # [B, Hkv, R, D]: R query heads share keys
        own, own_lse = partial_attention(q, responses[:, :B], self.mask)
        # The queries of all responses to a prompt become rows of one product with its keys.
        P, G = self.grid
        _, Hkv, R, _ = q.shape
        p, g = self.place  # [B] each
        grid = q.new_zeros(P, G, Hkv, R, D)
        grid[p, g] = q
        grid = grid.transpose(1, 2).reshape(P, Hkv, G * R, D)
        shared, lse = partial_attention(grid, prompts[:, :P], self.prompt_mask)
        shared, lse = (x.view(P, Hkv, G, R, -1)[p, :, g] for x in (shared, lse))  # [B, Hkv, R, D], [B, Hkv, R, 1]
        weight = (lse - own_lse).sigmoid().to(own.dtype)  # [B, Hkv, R, 1], the share of the prompt in one softmax
        return own.lerp(shared, weight).view(B, H, 1, D)


def key_width(length, buffers):
    """`length` keys, rounded up, as there is room: compiled steps and CUDA graphs want few shapes."""
    return min(-(-max(length, 1) // 32) * 32, buffers[0].shape[3])


def partial_attention(q, kv, mask):
    """Attention over some of the keys, to be merged: q [B, Hkv, R, D], kv [2, B, Hkv, S or more, D], mask [B, 1, 1, S].

    Returns the outputs [B, Hkv, R, D] and the log-sum-exp of their scores [B, Hkv, R, 1].
    """
    k, v = kv[:, :, :, :mask.shape[-1]]  # [B, Hkv, S, D] each
    scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores.masked_fill(~mask, -1e30)  # finite: a prompt may have no keys
    most = scores.amax(-1, keepdim=True)  # [B, Hkv, R, 1]
    weights = (scores - most).exp_()  # [B, Hkv, R, S]
    total = weights.sum(-1, keepdim=True)  # [B, Hkv, R, 1]
    return weights.to(q.dtype) @ v / total.to(q.dtype), most + total.log()

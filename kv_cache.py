"""The keys and values of prompts and of the responses that continue them, and attention over both.

Shapes: B responses (prompts, in a prefill), P prompts, G responses to a prompt at most, T tokens, S keys (of a prompt,
of a response, or both), H query heads, Hkv key/value heads, R = H / Hkv query heads that share keys, D head size.

Departure from the released code: vLLM keeps keys in pages; here a response has a row of fixed length.
"""
from functools import partial

import torch

from model import attention


class KVCache:
    """Static buffers: in each layer one [2, rows, Hkv, tokens, D] for prompts and one for responses. A prompt is stored
    and read once, however many responses continue it. Positions beyond a row's sequence are masked, so a row is reused
    without being cleared. `start_prompts` or `start_step` says what the next forward pass computes."""

    def __init__(self, model, prompt_rows, prompt_tokens, response_rows, response_tokens):
        c = model.model.c
        new_zeros = model.head_weight.new_zeros  # not empty: weight 0 x a masked value of nan is nan
        heads, size = c["num_key_value_heads"], c["head_dim"]
        layers = range(c["num_hidden_layers"])
        self.prompts = [new_zeros(2, prompt_rows, heads, prompt_tokens, size) for _ in layers]
        self.responses = [new_zeros(2, response_rows, heads, response_tokens, size) for _ in layers]

    def start_prompts(self, row, known=0):
        """The next pass computes prompts [B, T], to be stored in the rows from `row` on, after `known` tokens."""
        self.row = row
        self.known = known
        self.in_step = False

    def start_step(self, grid, places, prompt_keys, response_keys):
        """The next pass computes one token of the responses in rows 0 ... B - 1.

        grid: int64 [P, G], from `lay_out`
        places: four int64 [B]: the row of each response's prompt, its column in the grid, the stored tokens of the
            prompt (all but its last), those of the response
        prompt_keys, response_keys: how many keys of a row to read; those beyond a sequence are masked
        """
        self.grid = grid
        self.prompt_rows, self.columns, prompt_lengths, self.lengths = places  # [B] each
        self.rows = torch.arange(len(self.lengths), device=grid.device)  # [B]
        after_prompt = torch.arange(prompt_keys, device=grid.device) >= prompt_lengths[:, None]  # [B, S]
        after_own = torch.arange(response_keys, device=grid.device) > self.lengths[:, None]  # [B, S]
        self.unseen = torch.cat((after_prompt, after_own), dim=-1)[:, None, None]  # [B, 1, 1, S]
        self.widths = (prompt_keys, response_keys)
        self.in_step = True

    def attention(self, layer):
        """The function (q, k, v) -> attention of a layer."""
        attend = self.attend_in_step if self.in_step else self.attend_in_prompts
        return partial(attend, self.prompts[layer], self.responses[layer])

    @torch.compiler.disable  # its shapes change at every step
    def attend_in_prompts(self, prompts, responses, q, k, v):
        """Store keys and values [B, Hkv, T, D]. Return the attention [B, H, T, D] of the queries q [B, H, T, D]."""
        kv = torch.stack((k, v))  # [2, B, Hkv, T, D]
        B, _, T, _ = q.shape
        rows = prompts[:, self.row:self.row + B, :, :self.known + T]  # [2, B, Hkv, S, D]
        rows[:, :, :, self.known:] = kv
        mask = None
        if self.known:  # a query sees what is stored before it, too
            mask = q.new_ones(T, self.known + T, dtype=torch.bool).tril(self.known)  # [T, S]
        return attention(q, *(rows if self.known else kv), mask)

    @torch.compiler.disable  # its shapes change at every step
    def attend_in_step(self, prompts, responses, q, k, v):
        """Store keys and values [B, Hkv, 1, D]. Return the attention [B, H, 1, D] of the queries q [B, H, 1, D]."""
        kv = torch.stack((k, v))  # [2, B, Hkv, 1, D]
        B, H, _, D = q.shape
        responses[:, self.rows, :, self.lengths] = kv.squeeze(3).transpose(0, 1)  # [B, 2, Hkv, D]
        prompt_k, prompt_v = prompts[:, :len(self.grid), :, :self.widths[0]]  # [P, Hkv, S, D] each
        own_k, own_v = responses[:, :B, :, :self.widths[1]]  # [B, Hkv, S, D] each
        # One softmax over the keys of the prompt and of the response. On a CPU the scores are in float32, as in
        # training: Qwen2.5 has scores above 1,000, where bfloat16 numbers are 8 apart. On a GPU it would copy all keys.
        wide = torch.promote_types(q.dtype, torch.float32)
        dtype = wide if q.device.type == "cpu" else q.dtype
        q = q.view(B, k.shape[1], -1, D).to(dtype) * D ** -0.5  # [B, Hkv, R, D]
        on_prompt = self.by_prompt(q, prompt_k.mT.to(dtype))  # [B, Hkv, R, S]
        on_own = q @ own_k.mT.to(dtype)  # [B, Hkv, R, S]
        scores = torch.cat((on_prompt, on_own), dim=-1)
        scores = scores.masked_fill(self.unseen, -torch.inf)  # [B, Hkv, R, S]
        weights = scores.softmax(-1, dtype=wide).to(k.dtype)  # [B, Hkv, R, S]
        on_prompt, on_own = weights.split(self.widths, dim=-1)
        x = self.by_prompt(on_prompt, prompt_v) + on_own @ own_v  # [B, Hkv, R, D]
        return x.view(B, H, 1, D)

    def by_prompt(self, x, y):
        """x [B, Hkv, R, M] @ y [P, Hkv, M, N], the part of each response's prompt -> [B, Hkv, R, N].

        The responses to a prompt share one matrix product, so the prompt's keys and values are read once.
        """
        P, G = self.grid.shape
        _, heads, R, M = x.shape
        x = x[self.grid].transpose(1, 2).reshape(P, heads, G * R, M)  # [P, Hkv, G * R, M]
        x = (x @ y).view(P, heads, G, R, -1)  # [P, Hkv, G, R, N]
        return x[self.prompt_rows, :, self.columns]  # [B, Hkv, R, N]


def lay_out(prompt_rows):
    """Arrange responses in a table with a row for each prompt, padded with 0. Returns it and each response's column.
    prompt_rows: B integers, the row of each response's prompt

    >>> lay_out([1, 0, 1])
    ([[1, 0], [0, 2]], [0, 0, 1])
    """
    responses = [[] for _ in range(max(prompt_rows) + 1)]  # of each prompt
    columns = []
    for i, row in enumerate(prompt_rows):
        columns.append(len(responses[row]))
        responses[row].append(i)
    G = max(map(len, responses))
    return [indices + [0] * (G - len(indices)) for indices in responses], columns

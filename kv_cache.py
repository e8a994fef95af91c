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
        dtype = self.prompts[0].dtype
        lowest = torch.finfo(dtype).min  # not -inf: a prompt may have no stored keys
        self.biases = []  # added to the scores: [P, 1, 1, S] for prompts, [B, 1, 1, S] for responses
        for keys, lengths in ((prompt_keys, prompt_lengths[grid[:, 0]]), (response_keys, self.lengths + 1)):
            unseen = torch.arange(keys, device=grid.device) >= lengths[:, None]
            self.biases.append(lowest * unseen[:, None, None].to(dtype))
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
        prompt_kv = prompts[:, :len(self.grid), :, :self.widths[0]]  # [2, P, Hkv, S, D]
        own_kv = responses[:, :B, :, :self.widths[1]]  # [2, B, Hkv, S, D]
        attend = self.two_softmaxes if q.device.type == "cpu" else self.one_softmax
        x = attend(q.view(B, k.shape[1], -1, D), prompt_kv, own_kv, *self.biases)  # [B, Hkv, R, D]
        return x.view(B, H, 1, D)

    def two_softmaxes(self, q, prompt_kv, own_kv, prompt_bias, own_bias):
        """Attention of q [B, Hkv, R, D] to each part of the keys, and their mean by each part's share of the weights.

        The kernel, not public in torch, also returns the log of the sum of exp(score), and has scores in float32, as in
        training: Qwen2.5 has scores above 1,000, where bfloat16 numbers are 8 apart.
        """
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        on_prompt, prompt_sum = kernel(self.by_prompt(q), *prompt_kv, attn_mask=prompt_bias)
        on_own, own_sum = kernel(q, *own_kv, attn_mask=own_bias)  # [B, Hkv, R, D], [B, Hkv, R]
        prompt_sum = self.by_response(prompt_sum[..., None])  # [B, Hkv, R, 1]
        share = (prompt_sum - own_sum[..., None]).sigmoid()  # [B, Hkv, R, 1], of the prompt
        return torch.lerp(on_own.to(share), self.by_response(on_prompt).to(share), share).to(q.dtype)

    def one_softmax(self, q, prompt_kv, own_kv, prompt_bias, own_bias):
        """The same on a GPU. Scores have the dtype of q: float32 would copy all keys."""
        q = q * q.shape[-1] ** -0.5
        on_prompt = self.by_response(self.by_prompt(q) @ prompt_kv[0].mT + prompt_bias)  # [B, Hkv, R, S]
        scores = torch.cat((on_prompt, q @ own_kv[0].mT + own_bias), dim=-1)  # [B, Hkv, R, S]
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        on_prompt, on_own = weights.split(self.widths, dim=-1)  # [B, Hkv, R, S] each
        return self.by_response(self.by_prompt(on_prompt) @ prompt_kv[1]) + on_own @ own_kv[1]

    def by_prompt(self, x):
        """[B, Hkv, R, M] -> [P, Hkv, G * R, M]: rows of all responses to a prompt, so that its keys are read once."""
        return x[self.grid].transpose(1, 2).flatten(2, 3)

    def by_response(self, x):
        """[P, Hkv, G * R, M] -> [B, Hkv, R, M], the inverse of `by_prompt`."""
        return x.unflatten(2, (self.grid.shape[1], -1))[self.prompt_rows, :, self.columns]


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

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

    def start_prompts(self, row, known=0):
        """The next pass computes prompts [B, T], to be stored in the rows from `row` on, after `known` tokens there."""
        self.row = row
        self.known = known
        self.place = None

    def start_step(self, prompt_rows, prompt_lengths, lengths):
        """The next pass computes one token of the responses in rows 0 ... B - 1.

        prompt_rows: B integers, the row of each response's prompt
        prompt_lengths: P integers, the tokens of each prompt
        lengths: B integers, the tokens of each response before this one
        """
        responses = [[] for _ in prompt_lengths]  # to each prompt
        column = []
        for i, row in enumerate(prompt_rows):
            column.append(len(responses[row]))
            responses[row].append(i)
        G = max(map(len, responses))
        grid = [indices + [0] * (G - len(indices)) for indices in responses]
        device = self.prompts[0].device
        self.grid = torch.tensor(grid).to(device)  # [P, G], responses by prompt; where there are fewer, 0
        self.place = torch.tensor([prompt_rows, column]).to(device)  # [2, B], where in the grid a response is
        self.lengths = torch.tensor(lengths).to(device)  # [B]
        self.rows = torch.arange(len(lengths), device=device)  # [B]
        self.prompt_keys = key_width(max(prompt_lengths), self.prompts)
        self.response_keys = key_width(max(lengths) + 1, self.responses)
        in_prompt = torch.arange(self.prompt_keys, device=device)
        in_prompt = in_prompt < torch.tensor(prompt_lengths).to(device)[self.place[0], None]
        in_response = torch.arange(self.response_keys, device=device) <= self.lengths[:, None]
        self.hidden = ~torch.cat((in_prompt, in_response), dim=-1)[:, None, None]  # [B, 1, 1, S]

    def attend(self, layer, q, k, v):
        """Store new keys and values [B, Hkv, T, D]. Return the attention [B, H, T, D] of the queries q [B, H, T, D]."""
        kv = torch.stack((k, v))  # [2, B, Hkv, T, D]
        prompts = self.prompts[layer]
        responses = self.responses[layer]
        B, H, T, D = q.shape
        if self.place is None:
            rows = prompts[:, self.row:self.row + B, :, :self.known + T]  # [2, B, Hkv, S, D]
            rows[:, :, :, self.known:] = kv
            mask = None
            if self.known:  # a query sees what is stored before it, too
                mask = torch.ones(T, self.known + T, dtype=torch.bool, device=q.device).tril(self.known)  # [T, S]
            return attention(q, *(rows if self.known else kv), mask)
        responses[:, self.rows, :, self.lengths] = kv.squeeze(3).transpose(0, 1)  # [B, 2, Hkv, D]
        prompt_k, prompt_v = prompts[:, :len(self.grid), :, :self.prompt_keys]  # [P, Hkv, S, D] each
        own_k, own_v = responses[:, :B, :, :self.response_keys]  # [B, Hkv, S, D] each
        # One softmax over the keys of the prompt and of the response.
        q = q.view(B, k.shape[1], -1, D) * D ** -0.5  # [B, Hkv, R, D]
        scores = self.by_prompt(q, prompt_k.transpose(2, 3)), q @ own_k.transpose(2, 3)
        scores = torch.cat(scores, dim=-1).masked_fill(self.hidden, -torch.inf)  # [B, Hkv, R, S]
        exact = torch.promote_types(q.dtype, torch.float32)
        weights = scores.softmax(-1, dtype=exact).to(q.dtype)
        on_prompt, on_own = weights.split((self.prompt_keys, self.response_keys), dim=-1)
        x = self.by_prompt(on_prompt, prompt_v) + on_own @ own_v  # [B, Hkv, R, D]
        return x.view(B, H, 1, D)

    def by_prompt(self, x, y):
        """x [B, Hkv, R, M] @ y [P, Hkv, M, N] of each one's prompt -> [B, Hkv, R, N].

        All responses to a prompt are rows of one product, so what is stored of the prompt is read once.
        """
        P, G = self.grid.shape
        _, heads, R, M = x.shape
        x = x[self.grid].transpose(1, 2).reshape(P, heads, G * R, M)
        x = (x @ y).view(P, heads, G, R, -1)
        return x[self.place[0], :, self.place[1]]  # [B, Hkv, R, N]


def key_width(length, buffers):
    """`length` keys, rounded up as far as there is room: compiled steps and CUDA graphs want few shapes."""
    return min(-(-max(length, 1) // 32) * 32, buffers[0].shape[3])

"""The sampler: prompts in, sampled responses out.

A slot is a row of the key/value cache in which one response grows. A prompt is stored once, without its last token; all
its responses read the same keys. A step feeds the last token of every slot to the model and draws the next ones. A
response that ends frees its slot: the last slot in use moves there, and in the next step another response can start.

All random numbers of a request come from its own seed, so in exact arithmetic its responses do not depend on other
requests. Those do change the rounding of logits, and by it few texts in float32, half to nearly all in bfloat16.

Shapes: B slots in use, P prompts, G slots of a prompt at most, V ids of the tokenizer, H hidden size.

Departures from the released code:
1. No vLLM: the released run hands its weights to another engine.
2. Ids beyond the tokenizer (padding rows of the embedding) are never sampled.
3. A stop token is kept, as the last id of a response. An immediate stop is allowed; the released code forces one other
   token first. Nothing is appended to a response that reached the length limit (released: an end token).
"""
import math
from collections import deque, namedtuple
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import non_negative, number, positive
from data.groups import Response
from head import inverse_transform
from kv_cache import KVCache, lay_out

PREFILL_TOKENS = 2048  # prompt tokens, with padding, per prefill pass
MAX_GRAPHS = 256  # CUDA graphs kept, one per shape; the oldest goes first
LOGITS_AT_ONCE = 2 ** 20  # logits per call of `next_token` on a CPU


def add_count_flags(parser, n, least=1, n_help="responses per prompt"):
    """Flags that say how many responses are sampled, and of what length."""
    add = parser.add_argument_group("samples").add_argument
    add("--n", type=number(int, least), default=n, help=n_help)
    add("--max-concurrent", type=positive, default=64, metavar="N",
        help="sequences generated concurrently; affects memory, speed and, by rounding, "
        "the samples: half to nearly all with bfloat16, few with float32")
    add_length_flag(parser)


def add_length_flag(parser):
    """The flag that limits the length of a response."""
    parser.add_argument("--max-new-tokens", type=positive, default=512,
                        help="most tokens of a response")


def add_sampling_flags(parser, temperature):
    """Flags of the distribution that is sampled from."""
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=non_negative, default=temperature, help="0 is greedy")
    add("--top-p", type=number(float, 1e-6, 1.0), default=1.0,
        help="sample from the most likely tokens with this total probability")


@dataclass(eq=False)
class Request:
    """A prompt, and how to answer it."""
    prompt: list  # token ids, at least one
    n: int  # number of responses
    seed: int  # fixes the draws, given the model and the other fields
    temperature: float  # as in `next_token`
    max_new_tokens: int  # a response ends at this length
    top_p: float = 1.0  # as in `next_token`
    stop_strings: tuple = ()  # a response ends when one of them is in its text
    number: int = 0  # the caller's own label; the sampler does not use it
    responses: list = field(default_factory=list)  # written by the sampler; [] before the request starts

    @property
    def done(self):
        return bool(self.responses) and all(r.finish_reason for r in self.responses)


Slot = namedtuple("Slot", "request response uniforms")  # a response, growing or waiting, and its random numbers


class Sampler:
    """Draws the responses to many requests, up to `num_slots` at a time.

    model: a Transformer, in the precision to sample with
    chat: a response ends with one of its `stop_ids`; ids from its `vocab_size` on are never drawn
    num_slots: responses drawn concurrently
    num_prompts: prompts stored at a time
    prompt_tokens, max_new_tokens: the largest of any request
    prefixes: keeps the keys of earlier prompts, see apps/engine.py; or None
    """

    def __init__(self, model, chat, num_slots, num_prompts, prompt_tokens, max_new_tokens,
                 prefixes=None):
        self.model = model
        self.chat = chat
        self.num_slots = num_slots
        self.num_prompts = num_prompts
        self.prefixes = prefixes
        self.cache = KVCache(model, num_prompts, prompt_tokens, num_slots, max_new_tokens)
        self.requests = deque()  # not started
        self.waiting = deque()  # responses of the request that started last, still without a row
        self.slots = []  # slots[i] is row i of the cache's responses
        self.prompts = []  # prompts[i] is row i of the cache's prompts
        self.graphs = {} if model.head_weight.is_cuda else None  # see `replay`
        self.graph_memory = None  # the memory pool that all graphs share

    def add(self, request):
        """Queue a request. Others may be running. Requests whose prompt is the same list object share its keys."""
        self.requests.append(request)

    def cancel(self, request):
        """Drop what waits of a request; responses in a slot end at the next step. Returns True if there are none."""
        self.requests = deque(other for other in self.requests if other is not request)
        self.waiting = deque(slot for slot in self.waiting if slot.request is not request)
        for response in request.responses:
            response.finish_reason = response.finish_reason or "cancelled"
        return not any(slot.request is request for slot in self.slots)

    def clear(self):
        """Drop all requests and their prompts. Call it before the weights change: cached keys become stale."""
        for queue in (self.requests, self.waiting, self.slots, self.prompts):
            queue.clear()

    @property
    def busy(self):
        """Whether there is something to draw."""
        return bool(self.requests or self.waiting or self.slots)

    @property
    def num_free(self):
        """Free slots minus queued responses: below 0 if more responses are queued than slots are free."""
        queued = len(self.waiting) + sum(request.n for request in self.requests)
        return self.num_slots - len(self.slots) - queued

    @torch.no_grad()
    def step(self):
        """Draw one token in every slot. Returns the requests that this completes."""
        # 1. Start waiting responses in free slots.
        self.fill_slots()
        if not self.slots:
            return []
        # 2. Feed the last token of every slot to the model, and draw the next one.
        tokens, log_probs = self.next_tokens()
        # 3. Append the drawn tokens: `tolist` waits for the GPU.
        for slot, token, log_prob in zip(self.slots, tokens.tolist(), log_probs.tolist()):
            self.append(slot, token, log_prob)
        # 4. Free the slots of finished responses.
        finished = [slot.request for slot in self.slots if slot.response.finish_reason]
        compact(self.slots, lambda slot: not slot.response.finish_reason, self.cache.responses)
        return list(dict.fromkeys(request for request in finished if request.done))

    def fill_slots(self):
        """Free the rows of prompts that nothing reads any more, then start waiting responses in free slots."""
        used = {id(slot.request.prompt) for slot in (*self.slots, *self.waiting)}
        compact(self.prompts, lambda prompt: id(prompt) in used, self.cache.prompts)
        first_new = len(self.prompts)
        while len(self.slots) < self.num_slots and (self.waiting or self.requests):
            if not self.waiting:
                if len(self.prompts) == self.num_prompts:
                    break
                self.start_request(self.requests.popleft())
            self.slots.append(self.waiting.popleft())
        self.prefill(first_new)

    def start_request(self, request):
        """Queue a `Slot` for each response of a request, and give its prompt a row if it has none."""
        generator = torch.Generator().manual_seed(request.seed)
        uniforms = torch.rand(request.max_new_tokens, request.n, generator=generator)
        request.responses = [Response([], (0, 0), log_probs=[]) for _ in range(request.n)]
        for response, numbers in zip(request.responses, uniforms.T.tolist()):
            self.waiting.append(Slot(request, response, numbers))
        if not any(prompt is request.prompt for prompt in self.prompts):
            self.prompts.append(request.prompt)

    def prefill(self, first_new):
        """Prefill the prompts from row `first_new` on, except their last token, which each response feeds itself."""
        new = self.prompts[first_new:]
        longest = max(map(len, new), default=1)
        size = 1 if self.prefixes else max(1, PREFILL_TOKENS // longest)
        for i in range(0, len(new), size):
            row = first_new + i
            known = self.prefixes.load(self.cache, row, new[i][:-1]) if self.prefixes else 0
            part = [torch.tensor(prompt[known:-1], dtype=torch.long) for prompt in new[i:i + size]]
            ids = pad_sequence(part, batch_first=True).to(self.model.head_weight.device)  # [P, T]
            positions = torch.arange(known, known + ids.shape[1], device=ids.device)[None]  # [1, T]
            self.cache.start_prompts(row, known)
            if ids.numel():
                self.model.hidden_states(ids, positions, cache=self.cache)
            if self.prefixes:
                self.prefixes.save(self.cache, row, new[i][:-1])

    def next_tokens(self):
        """The next token of every slot and its log-prob, [B] each. Turns the slots into tensors for `compute`."""
        requests = [slot.request for slot in self.slots]
        row_of = {id(prompt): row for row, prompt in enumerate(self.prompts)}
        prompt_rows = [row_of[id(request.prompt)] for request in requests]
        grid, columns = lay_out(prompt_rows)
        # A response feeds the last token of its prompt itself, so that one is not stored.
        prompt_lengths = [len(request.prompt) - 1 for request in requests]
        lengths = [len(slot.response.ids) for slot in self.slots]
        last = [(slot.response.ids or slot.request.prompt)[-1] for slot in self.slots]
        positions = [prompt + own for prompt, own in zip(prompt_lengths, lengths)]
        uniforms = [slot.uniforms[length] for slot, length in zip(self.slots, lengths)]
        temperatures = [request.temperature for request in requests]
        top_ps = [request.top_p for request in requests]
        places = np.array((last, positions, prompt_rows, columns, prompt_lengths, lengths))  # [6, B]
        draws = np.array((uniforms, temperatures, top_ps), dtype=np.float32)  # [3, B]
        prompt_keys = key_width(max(prompt_lengths), self.cache.prompts)
        response_keys = key_width(max(lengths) + 1, self.cache.responses)
        shape = (prompt_keys, response_keys, max(temperatures) == 0, min(top_ps) < 1)
        tensors = [torch.from_numpy(array) for array in (np.array(grid), places, draws)]
        if self.graphs is not None:
            return self.replay(*tensors, shape)
        return self.compute(*(t.to(self.model.head_weight.device) for t in tensors), *shape)

    def compute(self, grid, places, draws, prompt_keys, response_keys, greedy, nucleus):
        """The next tokens [B] and their log-probs [B].

        grid: int64 [P, G], the slots of each prompt, from `lay_out`
        places: int64 [6, B], the last token, its position, and the four `places` of `KVCache.start_step`
        draws: [3, B], a uniform number, the temperature and the top-p
        prompt_keys, response_keys: as in `KVCache.start_step`
        greedy, nucleus: whether all temperatures are 0; whether any top-p is below 1
        """
        ids, positions, *places = places
        self.cache.start_step(grid, places, prompt_keys, response_keys)
        ids, positions = ids[:, None], positions[:, None]  # [B, 1]
        hidden = self.model.hidden_states(ids, positions, cache=self.cache)  # [B, 1, H]
        head = self.model.head_weight[:self.chat.vocab_size]  # [V, H]
        logits = hidden.squeeze(1) @ head.T  # [B, V]
        size = len(logits) if logits.is_cuda else max(1, LOGITS_AT_ONCE // len(head))
        parts = []
        for rows, draw in zip(logits.split(size), draws.split(size, dim=1)):
            uniform, temperature, top_p = draw
            temperature = None if greedy else temperature
            top_p = top_p if nucleus else None
            parts.append(next_token(rows, uniform, temperature, top_p))
        ids, log_probs = zip(*parts)
        return torch.cat(ids), torch.cat(log_probs)

    def replay(self, grid, places, draws, shape):
        """`compute` on a GPU. A thousand small kernels take longer to launch than to run, so those of each shape are
        recorded once, as a CUDA graph, and replayed. Sizes are rounded up, so that few graphs suffice."""
        B = round_up(len(self.slots), self.num_slots)
        order = [*range(len(self.slots))] + [0] * (B - len(self.slots))  # padding rows repeat slot 0
        P, G = grid.shape
        grid = F.pad(grid, (0, round_up(G, B) - G, 0, round_up(P, self.num_prompts) - P))
        inputs = (grid, places[:, order], draws[:, order])
        key = (B, *grid.shape, *shape)
        if key not in self.graphs:
            if len(self.graphs) == MAX_GRAPHS:
                del self.graphs[next(iter(self.graphs))]
            buffers = [tensor.to(self.model.head_weight.device) for tensor in inputs]
            self.compute(*buffers, *shape)  # warm-up: compiling and lazy set-up cannot be recorded
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.graph_memory):
                outputs = self.compute(*buffers, *shape)
            self.graph_memory = graph.pool()
            self.graphs[key] = graph, buffers, outputs
        graph, buffers, outputs = self.graphs[key]
        for buffer, tensor in zip(buffers, inputs):
            buffer.copy_(tensor)
        graph.replay()
        return outputs

    def append(self, slot, token, log_prob):
        """Append a token to a response. Sets its finish_reason if this token ends it."""
        response = slot.response
        response.ids.append(token)
        response.log_probs.append(log_prob)
        response.span = (0, len(response.ids))
        stop = token in self.chat.stop_ids
        strings = slot.request.stop_strings
        if strings and not stop:
            longest = max(len(string.encode()) for string in strings)  # tokens at most: each has a byte or more
            text = self.chat.decode(response.ids[-longest:])
            stop = any(string in text for string in strings)
        if stop:
            response.finish_reason = "stop"
        elif len(response.ids) == slot.request.max_new_tokens:
            response.finish_reason = "length"


def compact(items, keep, buffers):
    """Remove the items for which keep(item) is false. The last item, and its row of the buffers, fills each hole."""
    for row in reversed(range(len(items))):
        if not keep(items[row]):
            last = items.pop()
            if row < len(items):
                items[row] = last
                for buffer in buffers:
                    buffer[:, row] = buffer[:, len(items)]


def key_width(length, buffers):
    """`length` keys, rounded up to a multiple of 32, but at most the size of a row."""
    return min(math.ceil(max(length, 1) / 32) * 32, buffers[0].shape[3])


def round_up(number, limit):
    """The next power of two, but at most `limit`."""
    return min(1 << (number - 1).bit_length(), limit)


def next_token(logits, uniform, temperature=None, top_p=None):
    """Draw one token per row of logits with one uniform number per row.

    logits: [R, V]
    uniform: [R], in [0, 1)
    temperature: [R]; below 1e-6 is greedy. None: greedy in all rows
    top_p: [R]; below 1, keep the fewest tokens whose total probability reaches it. None: 1 in all rows

    Returns ids [R] and log-probs [R], after temperature and top-p; for temperature 0, under the plain softmax.

    >>> logits = torch.tensor([[0., 2., 1.]]).log()
    >>> [next_token(logits, torch.tensor([u]), torch.ones(1))[0].item() for u in (0.1, 0.6, 0.7)]
    [1, 1, 2]
    >>> next_token(logits, torch.tensor([0.9]), torch.ones(1), torch.tensor([0.6]))  # token 1 alone reaches 0.6
    (tensor([1]), tensor([0.]))
    """
    logits = logits.float()
    most_likely = logits.argmax(-1, keepdim=True)  # [R, 1]
    if temperature is None:
        log_probs = logits.log_softmax(-1)  # [R, V]
        return most_likely.squeeze(-1), log_probs.gather(-1, most_likely).squeeze(-1)
    temperature = temperature[:, None]  # [R, 1]
    greedy = temperature < 1e-6  # [R, 1]; dividing by it could overflow
    probs = (logits / temperature.masked_fill(greedy, 1.0)).softmax(-1)  # [R, V]
    if top_p is not None:
        top_p = top_p[:, None].masked_fill(greedy, 1.0)  # [R, 1]
        ordered, order = probs.sort(-1, descending=True)  # [R, V]
        mass_before = ordered.cumsum(-1) - ordered  # [R, V], of the more likely tokens
        beyond = (mass_before >= top_p) & (top_p < 1)  # [R, V], in this order
        excluded = torch.empty_like(beyond).scatter(-1, order, beyond)  # [R, V], in the order of ids
        probs = probs.masked_fill(excluded, 0.0)
    ids, total = inverse_transform(probs, uniform[:, None])  # [R, 1] each
    ids = torch.where(greedy, most_likely, ids)
    log_probs = (probs.gather(-1, ids) / total).log()  # [R, 1]
    return ids.squeeze(-1), log_probs.squeeze(-1).float()


def cache_size(num_slots, requests):
    """(num_slots, num_prompts, prompt_tokens, max_new_tokens) of a sampler for these requests.

    A prompt keeps its row until its longest response ends; by then most of its slots serve other prompts. So there is
    room for three times as many prompts as fill the slots.
    """
    num_slots = min(num_slots, sum(request.n for request in requests))
    fewest = min(request.n for request in requests)
    num_prompts = min(num_slots, 3 * math.ceil(num_slots / fewest))
    prompt_tokens = max(len(request.prompt) for request in requests)
    max_new_tokens = max(request.max_new_tokens for request in requests)
    return num_slots, num_prompts, prompt_tokens, max_new_tokens


def describe_cache(model, num_slots, num_prompts, prompt_tokens, max_new_tokens):
    """The memory of a sampler's keys and values, as a line of text."""
    c = model.model.c
    tokens = num_prompts * prompt_tokens + num_slots * max_new_tokens
    numbers = 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"]  # of a token
    gigabytes = tokens * numbers * model.head_weight.itemsize / 1e9
    positions = c.get("max_position_embeddings", math.inf)
    beyond = ""
    if prompt_tokens + max_new_tokens > positions:
        beyond = f", beyond the model's {positions:,} positions"
    return (f"at most {gigabytes:.2f} GB for keys and values: {num_prompts} prompts of "
            f"{prompt_tokens:,} tokens, {num_slots} responses of {max_new_tokens:,}{beyond}")


def generate(model, requests, num_slots, chat):
    """Yield each request as soon as all its responses are done. Parameters as in `Sampler`."""
    sampler = Sampler(model, chat, *cache_size(num_slots, requests))
    for request in requests:
        sampler.add(request)
    while sampler.busy:
        yield from sampler.step()

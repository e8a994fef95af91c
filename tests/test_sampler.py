"""The sampler: against itself in every arrangement, against transformers, and against the exact distribution."""
import gc
import os
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import sample
from torch.utils._python_dispatch import TorchDispatchMode

from data.chat import Chat
from kv_cache import KVCache
from model import Transformer
from sampler import Request, Sampler, cache_size, describe_cache, generate, next_token

CONFIG = {"model_type": "qwen3", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}
STOP_IDS = list(range(0, 61, 6))  # every sixth id ends a response, so samples end at different steps


@pytest.fixture
def model():
    return Transformer(CONFIG).init_weights(0, std=0.25).double()


@pytest.fixture
def prompts():
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, 61, (n,), generator=g).tolist() for n in (9, 1, 14, 5, 14)]


def ids_of(groups):
    """The token ids of each prompt's samples."""
    return [[response.ids for response in group] for group in groups]


def greedy_without_cache(model, prompt, max_new_tokens, stop_ids):
    """Greedy ids; the whole row goes through the model again for every token."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt):]


def nucleus(log_probs, top_p):
    """The textbook nucleus of each row of log-probs [T, V], renormalised."""
    log_probs = log_probs.clone()
    for i, probs in enumerate(log_probs.exp()):
        order = probs.argsort(descending=True)
        size = int((probs[order].cumsum(0) < top_p).sum()) + 1
        outside = torch.ones(len(probs), dtype=torch.bool)
        outside[order[:size]] = False
        log_probs[i, outside] = -torch.inf
    return log_probs.log_softmax(-1)


def test_greedy_is_the_same_cached_batched_and_grouped(model, prompts):
    expected = [greedy_without_cache(model, prompt, 24, STOP_IDS) for prompt in prompts]
    assert len({len(ids) for ids in expected}) > 2  # they end at different steps
    batched = sample(model, prompts, 1, 24, STOP_IDS, temperature=0)
    grouped = sample(model, prompts, 3, 24, STOP_IDS, temperature=0)
    for i, prompt in enumerate(prompts):
        single = sample(model, [prompt], 1, 24, STOP_IDS, temperature=0)
        assert single[0][0].ids == batched[i][0].ids == expected[i]
        assert [response.ids for response in grouped[i]] == [expected[i]] * 3


@pytest.mark.parametrize("temperature,top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_log_probs_are_those_of_the_distribution_sampled_from(model, prompts, temperature, top_p):
    """Recomputed by a plain forward pass over each finished row; so the importance ratio is 1 after sampling."""
    groups = sample(model, prompts, 4, 20, STOP_IDS, 3, temperature, top_p, vocab_size=57)
    lengths = {len(response.ids) for group in groups for response in group}
    assert len(lengths) > 3
    for prompt, group in zip(prompts, groups):
        for response in group:
            row = torch.tensor([prompt + response.ids])
            logits = model(row)[0, len(prompt) - 1:-1, :57] / temperature
            log_probs = logits.log_softmax(-1)
            if top_p < 1:
                log_probs = nucleus(log_probs, top_p)
            expected = log_probs.gather(-1, torch.tensor(response.ids)[:, None]).squeeze(-1)
            assert torch.allclose(expected, torch.tensor(response.log_probs).double(), atol=1e-4)
            assert max(response.ids) < 57  # ids beyond the tokenizer are never sampled


def test_the_stop_token_is_kept_and_counted(model, prompts):
    for group in sample(model, prompts, 8, 6, STOP_IDS):
        for response in group:
            assert len(response.ids) == len(response.log_probs) <= 6
            assert response.span == (0, len(response.ids))  # all of it counts in the loss
            stopped = response.finish_reason == "stop"
            assert stopped or response.finish_reason == "length"
            assert stopped == (response.ids[-1] in STOP_IDS)
            assert not any(token in STOP_IDS for token in response.ids[:-1])
            assert stopped or len(response.ids) == 6


def test_sampled_frequencies_are_the_softmax():
    """Chi-square of first and second tokens against the exact distribution.

    The bound is the mean of chi-square plus six standard deviations. Less than one seed in a hundred thousand exceeds
    it by chance, and the seed here is fixed.
    """
    small = Transformer(CONFIG | {"vocab_size": 7}).init_weights(4, std=0.12).double()
    n = 20_000
    prompt = [3, 5, 1]
    groups = sample(small, [prompt] * (n // 8), 8, 2, [], 11, temperature=0.8, num_slots=2_000)
    with torch.no_grad():
        first = (small(torch.tensor([prompt]))[0, -1] / 0.8).softmax(-1)  # [7]
        rows = torch.tensor([prompt + [token] for token in range(7)])
        joint = first[:, None] * (small(rows)[:, -1] / 0.8).softmax(-1)  # [7, 7]
    counts = torch.zeros(7, 7, dtype=torch.float64)
    for group in groups:
        for response in group:
            counts[tuple(response.ids)] += 1
    expected = n * joint
    assert (expected > 5).all()
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = 48
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_responses_do_not_depend_on_what_runs_beside_them(model, prompts, dtype, temperature):
    """Not on the number of slots, on the other prompts or on when they end; the seed decides everything."""
    model = model.to(dtype)

    def ids(prompts, seed=5, **options):
        return ids_of(sample(model, prompts, 3, 20, temperature=temperature, seed=seed, **options))

    expected = ids(prompts, stop_ids=STOP_IDS)
    assert len({len(response) for group in expected for response in group}) >= 3
    for num_slots in (1, 2, 4, 7, 15):
        assert ids(prompts, stop_ids=STOP_IDS, num_slots=num_slots) == expected
    for i, prompt in enumerate(prompts):
        assert ids([prompt], 5 + i, stop_ids=STOP_IDS) == [expected[i]]
    assert (ids(prompts, 6, stop_ids=STOP_IDS) == expected) == (temperature == 0)
    for group, longer in zip(expected, ids(prompts)):  # no response ends early
        for a, b in zip(group, longer):
            assert b[:len(a)] == a


def test_extremes_of_the_uniform_number_and_of_top_p():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    one = torch.ones(1)
    for uniform, token in ((0.0, 1), (0.4999, 1), (0.5001, 2), (1 - 2**-24, 2)):
        ids, log_probs = next_token(logits, torch.tensor([uniform]), one)
        assert ids.item() == token
        assert log_probs.item() == pytest.approx(-0.6931, abs=1e-3)
    logits = torch.tensor([[1.0, 3.0, 2.0]]).repeat(50, 1)
    ids, log_probs = next_token(logits, torch.rand(50), torch.ones(50), torch.full((50,), 1e-6))
    assert (ids == 1).all() and (log_probs == 0).all()  # the smallest top-p still keeps the most likely token


def test_rows_of_a_draw_have_their_own_temperature_and_top_p():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=g)
    uniform = torch.rand(6, generator=g)
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.3, 0.0, 1.0])
    top_p = torch.tensor([0.5, 1.0, 0.5, 0.9, 1.0, 0.1])
    ids, log_probs = next_token(logits, uniform, temperature, top_p)
    for i in range(6):
        row = slice(i, i + 1)
        nucleus = top_p[row] if top_p[i] < 1 and temperature[i] > 0 else None
        heat = temperature[row] if temperature[i] > 0 else None
        token, log_p = next_token(logits[row], uniform[row], heat, nucleus)
        assert ids[i] == token and log_probs[i] == pytest.approx(log_p.item(), abs=1e-6)


def test_requests_of_all_kinds_are_admitted_while_others_run(model, prompts):
    """Each has its own temperature, top-p, seed, limit and stop strings, and answers as if it were alone."""
    chat = SimpleNamespace(stop_ids=STOP_IDS, vocab_size=61, decode=lambda ids: "".join(chr(65 + i) for i in ids))

    def make_requests():
        kinds = [(1, 0.0, 20, 1.0, ()), (3, 1.0, 9, 1.0, ()), (2, 0.7, 30, 0.8, ()), (2, 1.5, 25, 1.0, ("z", "HI"))]
        return [Request(prompts[i % 5], n, i, temperature, limit, top_p, strings, number=i)
                for i, (n, temperature, limit, top_p, strings) in enumerate(kinds * 3)]

    alone = make_requests()
    for request in alone:
        assert list(generate(model, [request], 1, chat)) == [request] and request.done
    together = make_requests()
    sampler = Sampler(model, chat, 4, 4, 14, 30)
    done = []
    for request in together:  # one every other step
        sampler.add(request)
        done += sampler.step() + sampler.step()
        assert len(sampler.slots) <= 4
    while sampler.busy:
        done += sampler.step()
    assert sorted(request.number for request in done) == list(range(12))
    assert sampler.num_free == 4 and [r.number for r in done] != list(range(12))
    for a, b in zip(alone, together):
        assert [r.ids for r in a.responses] == [r.ids for r in b.responses]
        assert all(len(r.ids) <= a.max_new_tokens for r in b.responses)
    sampler.add(make_requests()[1])
    sampler.step()
    sampler.clear()
    assert not sampler.busy and sampler.num_free == 4


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(model, prompts):
    chat = SimpleNamespace(stop_ids=[], vocab_size=61, decode=lambda ids: "".join(f"{i:02d}" for i in ids))
    endless = sample(model, prompts, 2, 20, seed=3)
    seen = 0
    for string in ("7", "1", "234"):
        requests = [Request(prompt, 2, 3 + i, 1.0, 20, 1.0, (string, "never")) for i, prompt in enumerate(prompts)]
        list(generate(model, requests, 64, chat))
        for request, group in zip(requests, endless):
            for response, longer in zip(request.responses, group):
                ends = [end for end in range(1, 21) if string in chat.decode(longer.ids[:end])]
                assert len(response.ids) == (ends[0] if ends else 20)
                assert response.finish_reason == ("stop" if ends else "length")
                seen += bool(ends)
    assert seen > 10


def test_a_prompt_is_computed_once_and_a_free_slot_is_used_at_once(model, prompts, monkeypatch):
    shapes = []
    hidden_states = model.hidden_states

    def recorder(ids, *args, **kwargs):
        shapes.append(tuple(ids.shape))
        return hidden_states(ids, *args, **kwargs)

    monkeypatch.setattr(model, "hidden_states", recorder)
    groups = sample(model, prompts, 4, 30, STOP_IDS, 2, num_slots=6)
    monkeypatch.undo()
    computed = [shape for shape in shapes if shape[1] > 1]  # but for the last token, which each response feeds
    assert sum(rows for rows, _ in computed) == len(prompts)
    lengths = [len(response.ids) for group in groups for response in group]
    rows = [shape[0] for shape in shapes if shape[1] == 1]  # a row for each slot in use
    assert sum(rows) == sum(lengths)  # no row is computed in vain
    slots = [0] * 6  # the schedule: each response starts in the slot that is free first
    for length in lengths:
        slots[slots.index(min(slots))] += length
    assert len(rows) == max(slots)


def test_requests_with_one_prompt_share_its_keys(model, prompts, monkeypatch):
    """As the greedy answer and the samples of an evaluation do; and nothing outlives `clear`."""
    chat = SimpleNamespace(stop_ids=STOP_IDS, vocab_size=61)
    requests = [Request(prompts[0], 1, 0, 0.0, 20), Request(prompts[0], 3, 1, 1.0, 20),
                Request(prompts[2], 2, 2, 1.0, 20)]
    sampler = Sampler(model, chat, 8, 8, 14, 20)
    for request in requests:
        sampler.add(request)
    sampler.fill_slots()
    assert sampler.prompts == [prompts[0], prompts[2]]
    while sampler.busy:
        sampler.step()
    assert sampler.step() == [] and sampler.prompts == []
    alone = Request(prompts[0], 3, 1, 1.0, 20)
    list(generate(model, [alone], 8, chat))
    assert [r.ids for r in alone.responses] == [r.ids for r in requests[1].responses]
    sampler.add(Request(prompts[0], 1, 0, 0.0, 20))
    sampler.fill_slots()
    sampler.clear()
    assert sampler.prompts == [] and not sampler.busy


def test_few_rows_for_prompts_change_no_text(model, prompts):
    """A request waits for one, and the cache stays small."""
    chat = SimpleNamespace(stop_ids=STOP_IDS, vocab_size=61)
    requests = [Request(prompt, 3, 5 + i, 1.0, 20) for i, prompt in enumerate(prompts)]
    sampler = Sampler(model, chat, 15, 2, 14, 20)
    for request in requests:
        sampler.add(request)
    while sampler.busy:
        sampler.step()
        assert len(sampler.prompts) <= 2
    assert [[r.ids for r in request.responses] for request in requests] == ids_of(
        sample(model, prompts, 3, 20, STOP_IDS, 5))
    assert cache_size(8, requests) == (8, 8, 14, 20) and cache_size(100, requests) == (15, 15, 14, 20)
    assert cache_size(64, [Request([1] * 9, 8, 0, 1.0, 5)] * 99) == (64, 24, 9, 5)


def test_a_step_waits_for_the_device_once(model, prompts):
    """Nothing in it asks for a number of a tensor, which would stop a GPU: not before the drawn tokens are read."""
    class Recorder(TorchDispatchMode):
        names = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.add(function.overloadpacket.__name__)
            return function(*args, **kwargs or {})

    chat = SimpleNamespace(stop_ids=STOP_IDS, vocab_size=61)
    sampler = Sampler(model, chat, 8, 8, 14, 20)
    for i, prompt in enumerate(prompts):
        sampler.add(Request(prompt, 3, i, 1.0 * (i % 2), 20, 0.9))
    with Recorder():
        while sampler.busy:
            sampler.step()
        assert not {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"} & Recorder.names
        torch.ones(1).item()
    assert "_local_scalar_dense" in Recorder.names and "cumsum" in Recorder.names


def test_keys_are_read_in_multiples_of_32(model, monkeypatch):
    """So that a compiled step would see few shapes."""
    widths = set()
    start_step = KVCache.start_step

    def recorder(self, grid, places, *keys):
        start_step(self, grid, places, *keys)
        widths.add(keys)

    monkeypatch.setattr(KVCache, "start_step", recorder)
    sample(model, [[1] * 50], 1, 110)
    assert widths == {(50, 32), (50, 64), (50, 96), (50, 110)}


class Graph:
    """Stands for torch.cuda.CUDAGraph without a GPU: the call of `compute` that was recorded runs again."""

    def pool(self):
        self.call = Graph.last

    def replay(self):
        sampler, inputs, outputs = self.call
        for buffer, new in zip(outputs, Graph.compute(sampler, *inputs)):
            buffer.copy_(new)


def test_steps_of_rounded_shapes_draw_the_same(model, monkeypatch):
    """What a GPU computes: recorded steps of few shapes, idle rows included."""
    prompts = [[5 + i] * (3 + 7 * i) for i in range(9)]
    options = dict(n=3, max_new_tokens=40, stop_ids=[2, 7, 11], num_slots=11)
    expected = [[r.ids for r in responses] for responses in sample(model, prompts, **options)]
    samplers = []
    Graph.compute = Sampler.compute
    start = Sampler.__init__

    def on_gpu(self, *args):
        start(self, *args)
        self.graphs = {}
        samplers.append(self)

    def compute(self, *inputs):
        outputs = Graph.compute(self, *inputs)
        Graph.last = self, inputs, outputs
        return outputs

    monkeypatch.setattr(Sampler, "__init__", on_gpu)
    monkeypatch.setattr(Sampler, "compute", compute)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())
    assert [[r.ids for r in responses] for responses in sample(model, prompts, **options)] == expected
    shapes = list(samplers[0].graphs)
    assert {shape[0] for shape in shapes} <= {1, 2, 4, 8, 11} and len(shapes) < 40


def test_greedy_equals_transformers_on_real_weights():
    folder = os.environ.get("STAR_REAL_MODEL")
    if not folder:
        pytest.skip("set STAR_REAL_MODEL to a real Qwen folder")
    transformers = pytest.importorskip("transformers")
    chat = Chat.from_pretrained(folder)
    number = {"type": "integer"}
    parameters = {"type": "object", "properties": {"a": number, "b": number}}
    tools = [{"name": "add", "description": "Add two numbers.", "parameters": parameters}]
    requests = ["What is 2 + 2?", "Add 17 and 25 with the tool.", "Name three rivers.", "Say hi.",
                "Write a haiku on rain.", "Why is the sky blue? One sentence.", "def fib(n):",
                "Translate 'good morning' to French."]
    prompts = []
    for i, text in enumerate(requests):
        record = {"messages": [{"role": "user", "content": text}], "tools": tools * (i % 2)}
        prompts.append(chat.encode(chat.prompt(record)))
    model = Transformer.from_pretrained(folder)
    groups = sample(model, prompts, 1, 32, chat.stop_ids, temperature=0, vocab_size=chat.vocab_size)
    del model
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, (response,) in zip(prompts, groups):
        row = reference.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, repetition_penalty=1.0,
                                 eos_token_id=chat.stop_ids, pad_token_id=chat.stop_ids[0])
        assert row[0, len(prompt):].tolist() == response.ids


def test_a_sampler_that_is_gone_leaves_no_cache(model):
    """Without a search for reference cycles, which Python makes now and then only: a validation makes a sampler."""
    gc.collect()
    gc.disable()
    try:
        sampler = Sampler(model, SimpleNamespace(stop_ids=(), vocab_size=None), 2, 2, 8, 4)
        sampler.add(Request([1, 2, 3], 2, 0, 1.0, 4))
        while sampler.busy:
            sampler.step()
        cache = weakref.ref(sampler.cache)
        del sampler
        assert cache() is None
    finally:
        gc.enable()


def test_a_tiny_temperature_takes_the_most_likely_token():
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    for temperature in (0.0, 1e-44, 1e-38, 1e-7, 1e-5):
        ids, log_probs = next_token(logits, torch.tensor([0.9]), torch.tensor([temperature]))
        assert ids.item() == 1 and log_probs.isfinite().all()


def test_prompts_beyond_the_models_positions_are_said():
    model = Transformer(CONFIG | {"max_position_embeddings": 64})
    assert "beyond the model's 64 positions" in describe_cache(model, 1, 1, 60, 5)
    assert "beyond" not in describe_cache(model, 1, 1, 60, 4)

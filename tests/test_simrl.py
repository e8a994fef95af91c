"""The sampler: against itself in every arrangement, against transformers, and against the distribution to draw from."""
import os

import pytest
import torch

from model import Transformer
from simrl import generate, next_tokens

CONFIG = {"model_type": "qwen3", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}
STOPS = list(range(0, 61, 6))  # every sixth id ends a continuation: rows end at different steps


@pytest.fixture
def model():
    return Transformer(CONFIG).init_weights(0, std=0.25).double()


@pytest.fixture
def prompts():
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, 61, (n,), generator=g).tolist() for n in (9, 1, 14, 5, 14)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_greedy(model, prompt, new_tokens, stops):
    """Greedy text without a cache: the whole row again for every token."""
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] in stops:
            break
    return ids[len(prompt):]


def test_greedy_is_the_same_cached_batched_and_grouped(model, prompts):
    expected = [plain_greedy(model, p, 24, STOPS) for p in prompts]
    assert len({len(e) for e in expected}) > 2  # they end at different steps
    batched = generate(model, prompts, 1, 24, STOPS, seeded(), temperature=0)
    grouped = generate(model, prompts, 3, 24, STOPS, seeded(), temperature=0)
    for i, prompt in enumerate(prompts):
        single = generate(model, [prompt], 1, 24, STOPS, seeded(), temperature=0)
        assert single[0][0]["ids"] == batched[i][0]["ids"] == expected[i]
        assert [s["ids"] for s in grouped[i]] == [expected[i]] * 3


@pytest.mark.parametrize("temperature,top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_logprobs_are_those_of_the_distribution_sampled_from(model, prompts, temperature, top_p):
    """Recomputed from a plain forward pass over each finished row; so the importance ratio is 1 after sampling."""
    groups = generate(model, prompts, 4, 20, STOPS, seeded(3), temperature, top_p, width=57)
    lengths = {len(s["ids"]) for group in groups for s in group}
    assert len(lengths) > 3
    for prompt, group in zip(prompts, groups):
        for sample in group:
            row = torch.tensor([prompt + sample["ids"]])
            logits = model(row)[0, len(prompt) - 1:-1, :57] / temperature
            log_probs = logits.log_softmax(-1)
            if top_p < 1:  # the textbook nucleus, token by token
                for i, line in enumerate(log_probs.exp()):
                    order = line.argsort(descending=True)
                    needed = int((line[order].cumsum(0) < top_p).sum()) + 1
                    outside = torch.ones(57, dtype=torch.bool)
                    outside[order[:needed]] = False
                    log_probs[i, outside] = -torch.inf
                log_probs = log_probs.log_softmax(-1)
            expected = log_probs.gather(-1, torch.tensor(sample["ids"])[:, None]).squeeze(-1)
            assert torch.allclose(expected, torch.tensor(sample["logprobs"]).double(), atol=1e-4)
            assert max(sample["ids"]) < 57  # ids beyond the tokenizer are never sampled


def test_the_stop_token_is_kept_and_counted(model, prompts):
    for group in generate(model, prompts, 8, 6, STOPS, seeded()):
        for sample in group:
            assert len(sample["ids"]) == len(sample["logprobs"]) <= 6
            stopped = sample["finish_reason"] == "stop"
            assert stopped == (sample["ids"][-1] in STOPS)
            assert not any(t in STOPS for t in sample["ids"][:-1])
            assert stopped or len(sample["ids"]) == 6


def test_sampled_frequencies_are_the_softmax(model):
    """Chi-square of first and second tokens against the exact distribution.

    The bound is the mean of chi-square plus six standard deviations; by chance it is passed less than once in a hundred
    thousand seeds, and the seed here is fixed.
    """
    small = Transformer(CONFIG | {"vocab_size": 7}).init_weights(4, std=0.12).double()
    n, prompt = 20_000, [3, 5, 1]
    groups = generate(small, [prompt] * (n // 8), 8, 2, [], seeded(11), temperature=0.8)
    samples = [sample for group in groups for sample in group]
    with torch.no_grad():
        first = (small(torch.tensor([prompt]))[0, -1] / 0.8).softmax(-1)  # [7]
        rows = torch.tensor([prompt + [t] for t in range(7)])
        joint = first[:, None] * (small(rows)[:, -1] / 0.8).softmax(-1)  # [7, 7]
    counts = torch.zeros(7, 7, dtype=torch.float64)
    for sample in samples:
        counts[tuple(sample["ids"])] += 1
    expected = n * joint
    assert (expected > 5).all()
    statistic, freedom = ((counts - expected) ** 2 / expected).sum().item(), 48
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5


def test_one_uniform_number_a_token_whatever_else_runs(model, prompts):
    """A sample does not change when its neighbours end, and the seed decides everything."""
    long = generate(model, prompts, 3, 20, STOPS, seeded(5))
    assert long == generate(model, prompts, 3, 20, STOPS, seeded(5))
    assert [[s["ids"] for s in g] for g in long] != [[s["ids"] for s in g] for g in
                                                     generate(model, prompts, 3, 20, STOPS, seeded(6))]
    for a, b in zip(long, generate(model, prompts, 3, 20, [], seeded(5))):  # nothing ends
        for x, y in zip(a, b):
            assert y["ids"][:len(x["ids"])] == x["ids"]


def test_extremes_of_the_uniform_number_and_of_top_p():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for uniform, token in ((0.0, 1), (0.4999, 1), (0.5001, 2), (1 - 2**-24, 2)):
        ids, logprobs = next_tokens(logits, torch.tensor([uniform]), 1.0, 1.0)
        assert ids.item() == token and logprobs.item() == pytest.approx(-0.6931, abs=1e-3)
    ids, logprobs = next_tokens(torch.tensor([[1.0, 3.0, 2.0]]).repeat(50, 1), torch.rand(50), 1.0, 1e-6)
    assert (ids == 1).all() and (logprobs == 0).all()  # a top-p of nothing still keeps the likeliest


def test_rows_leave_the_batch(model, prompts, monkeypatch):
    """What goes through the model shrinks as continuations end: the point of dropping them."""
    shapes, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *a, **k: shapes.append(tuple(ids.shape)) or hidden(ids, *a, **k))
    groups = generate(model, prompts, 4, 30, STOPS, seeded(2))
    alive = lambda step: [sum(len(s["ids"]) > step for s in g) for g in groups]  # noqa: E731
    for step, shape in enumerate(shapes[1:]):
        running = [n for n in alive(step + 1) if n]
        assert shape == (len(running), max(running))


def test_greedy_equals_transformers_on_real_weights():
    folder = os.environ.get("STAR_REAL_MODEL")
    if not folder:
        pytest.skip("set STAR_REAL_MODEL to a real Qwen folder")
    transformers = pytest.importorskip("transformers")
    from data.chat import Chat
    chat = Chat.from_pretrained(folder)
    tools = [{"name": "add", "description": "Add two numbers.", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}}]
    asked = ["What is 2 + 2?", "Add 17 and 25 with the tool.", "Name three rivers.", "Say hi.", "Write a haiku on rain.",
             "Why is the sky blue? One sentence.", "def fib(n):", "Translate 'good morning' to French."]
    prompts = [chat.encode(chat.prompt({"messages": [{"role": "user", "content": text}], "tools": tools * (i % 2)}))
               for i, text in enumerate(asked)]
    model = Transformer.from_pretrained(folder)
    ours = generate(model, prompts, 1, 32, chat.stop_ids, seeded(), 0, width=chat.vocab_size)
    del model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, group in zip(prompts, ours):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, repetition_penalty=1.0,
                              eos_token_id=chat.stop_ids, pad_token_id=chat.stop_ids[0])
        assert out[0, len(prompt):].tolist() == group[0]["ids"]

"""Packed groups against separate rows, and the ways in which a batch may be split."""
import tracemalloc
from pathlib import Path

import pytest
import torch

from bench import write_rollouts
from ckd import cross_entropy
from conftest import settings
from data import InputError
from data.chat import Chat
from data.groups import (Group, Response, attention_mask, counted_tokens, make_groups, micro_batches,
                         optimiser_batches, pack, read_groups, share_prefixes)
from head import head_loss
from model import Transformer

CONFIG = {"model_type": "qwen3", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}


@pytest.fixture
def model():
    return Transformer(CONFIG).init_weights(0, std=0.3).double()


@pytest.fixture
def groups():
    """Five groups: prompts of 1 to 12 tokens, 1 to 5 responses of 1 to 9 tokens, two counted only in part."""
    generator = torch.Generator().manual_seed(0)

    def random_ids(count):
        return torch.randint(0, 61, (count,), generator=generator).tolist()

    sizes = [(12, (3, 9, 1)), (1, (4,)), (7, (2, 2, 5, 6, 1)), (3, (8, 7)), (9, (1, 1))]
    groups = []
    for prompt_length, lengths in sizes:
        prompt = random_ids(prompt_length)
        groups.append(Group({}, prompt, [Response(random_ids(n), (0, n)) for n in lengths]))
    groups[0].responses[1].span = (2, 7)
    groups[3].responses[0].span = (5, 8)
    return groups


def separate_logits(model, groups):
    """The logits that predict every counted token, from one plain row for each response."""
    logits = []
    for group in groups:
        for response in group.responses:
            start, end = (len(group.prompt) + at for at in response.span)
            row = model(torch.tensor([group.prompt + response.ids]))[0]
            logits.append(row[start - 1:end - 1])
    return torch.cat(logits)


def packed_hidden_states(model, groups, width=None):
    """The hidden states that predict every counted token, from packed rows, and the packed batch."""
    packed = pack(groups, width=width)
    hidden = model.hidden_states(packed["input_ids"], packed["positions"], attention_mask(packed))
    return hidden.flatten(0, 1)[packed["logit_positions"]], packed


def packed_logits(model, groups, width=None):
    hidden, packed = packed_hidden_states(model, groups, width)
    return hidden @ model.head_weight.T, packed


@pytest.mark.parametrize("width", [None, 60, 100])  # one group a row; several; nearly all in one row
def test_packed_groups_equal_separate_rows(model, groups, width):
    logits, packed = packed_logits(model, groups, width)
    assert (packed["input_ids"].shape[0] < len(groups)) or width is None
    expected = separate_logits(model, groups)
    assert torch.allclose(logits, expected, atol=1e-10)

    probe = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for values in (logits, expected):
        model.zero_grad()
        (values.log_softmax(-1) * probe).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*gradients))


def test_shared_prefixes_give_the_same_tokens_with_the_same_logits(model):
    """Three records with the same tools, one with others, then two with the first tools again."""
    tools = [[{"name": "a"}], [{"name": "b"}]]
    prompts = [(0, [1, 2, 3, 9]), (0, [1, 2, 3, 4, 5]), (0, [1, 2, 3, 4, 5]), (1, [1, 2, 8]),
               (0, [1, 2, 3, 4]), (0, [1, 2, 3, 4, 5])]
    groups = []
    for i, (number, prompt) in enumerate(prompts):
        responses = [Response([20 + i, 30 + i, 40], (0, 3)), Response([50, 50 + i], (1, 2))]
        groups.append(Group({"tools": tools[number]}, prompt, responses))
    shared = share_prefixes(groups, 8)
    assert [group.prompt for group in shared] == [[1, 2, 3], [1, 2, 8], [1, 2, 3, 4]]
    assert [len(group.responses) for group in shared] == [6, 2, 4]
    assert sum(group.length for group in shared) < sum(group.length for group in groups)
    assert [len(group.responses) for group in share_prefixes(groups, 2)] == [4, 2, 2, 4]
    assert share_prefixes(groups, 1) == groups
    assert counted_tokens(shared) == counted_tokens(groups)
    logits, packed = packed_logits(model, groups)
    shared_logits, shared_packed = packed_logits(model, shared)
    assert torch.equal(packed["targets"], shared_packed["targets"])
    assert torch.allclose(logits, shared_logits, atol=1e-10)


def test_held_out_groups_leave_the_order_of_the_rest(world):
    chat = Chat.from_pretrained(world / "teacher")
    ids = []
    for hold_out in (0, 5):
        args = settings("sft", data=world / "train.jsonl", max_response_tokens=500, hold_out=hold_out)
        groups, valid, notes = read_groups(args, chat)
        ids.append([group.record["id"] for group in groups])
        assert len(valid) == hold_out and not {group.record["id"] for group in valid} & set(ids[-1])
        assert not notes
    every, rest = ids
    assert len(rest) == len(every) - 5 and [i for i in every if i in rest] == rest


def test_rollouts_are_read_at_8_bytes_a_token(tmp_path):
    """The paper's shape: prompts of 600 tokens, 8 responses of 250. The peak also holds the objects of one line."""
    chat = Chat.from_pretrained(Path(__file__).parents[1] / "data/tiny/teacher")
    write_rollouts(tmp_path / "rollouts.jsonl", 40, chat.vocab_size)
    args = settings("sft", data=tmp_path / "rollouts.jsonl")
    read_groups(args, chat)  # what only a first call allocates
    tracemalloc.start()
    groups, valid, _ = read_groups(args, chat)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tokens = counted_tokens(groups + valid)
    assert tokens == 40 * 8 * 250
    assert held / tokens <= 8 and peak / tokens <= 14


def test_targets_and_responses_are_in_order(groups):
    packed = pack(groups, width=60)
    expected = []
    for number, response in enumerate(response for group in groups for response in group.responses):
        start, end = response.span
        expected += [(number, token) for token in response.ids[start:end]]
    assert list(zip(packed["response"].tolist(), packed["targets"].tolist())) == expected
    assert len(expected) == counted_tokens(groups)


def test_a_response_attends_to_its_prompt_and_itself_only(groups):
    packed = pack(groups[:1])
    mask = attention_mask(packed)[0, 0]
    # prompt 12; r1 3 tokens at 12, r2 9 at 15, r3 1 at 24
    assert mask[16].nonzero().squeeze(1).tolist() == [*range(12), 15, 16]
    assert mask[24].nonzero().squeeze(1).tolist() == [*range(12), 24]
    assert packed["positions"][0].tolist() == [*range(12), 12, 13, 14, *range(12, 21), 12]


@pytest.mark.parametrize("budget", [1, 14, 30, 64, 10_000])
def test_any_split_into_micro_batches_gives_the_same_gradients(model, groups, budget):
    total = counted_tokens(groups)

    def gradients(parts):
        model.zero_grad()
        for part in parts:
            hidden, packed = packed_hidden_states(model, part)
            weights = torch.full((len(hidden),), 1 / total, dtype=torch.float64)
            loss, _ = head_loss(hidden, model.head_weight, weights, cross_entropy, packed["targets"], chunk=5)
            loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    parts = micro_batches(groups, budget)
    assert sum(counted_tokens(part) for part in parts) == total  # nothing is lost if a group is cut
    for part in parts:
        padded = len(part) * max(group.length for group in part)
        assert padded <= budget or len(part) == 1 and len(part[0].responses) == 1
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(gradients(parts), gradients([groups])))


def test_batches_are_whole_groups_in_an_order_of_seed_and_epoch(groups):
    def order(seed, epoch):
        return [[id(group) for group in batch] for batch in optimiser_batches(groups, 4, seed, epoch)]

    assert order(0, 0) == order(0, 0) and order(0, 0) != order(0, 1) != order(1, 1)
    for batch in optimiser_batches(groups, 4, 0, 0)[:-1]:
        sizes = [len(group.responses) for group in batch]
        assert sum(sizes) >= 4 and sum(sizes[:-1]) < 4  # cut as soon as it is full
    assert sorted(i for batch in order(3, 7) for i in batch) == sorted(map(id, groups))
    assert len(optimiser_batches(groups, 128, 0, 0)) == 1  # fewer sequences than a batch still make a step


class Words:
    """A stand-in for a Chat: a text is its ids, one per word; 9 is </think>, 0 the end token."""
    think, tools, think_end_id, end_id, stop_ids = "on", "flat", 9, 0, [0, 1]

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def prompt(self, record):
        return record["prompt"]

    def answer(self, record):
        return record["answer"]


def test_masks_caps_and_the_sources_of_responses():
    records = [{"prompt": "1 2 3", "answer": "4 9 5 6"},
               {"prompt": "1", "responses": [{"ids": [7, 9, 8, 9, 2]}, {"text": "3 0"}]},
               {"prompt": "1 2 3 4 5 6", "answer": "1"},
               {"prompt": "1", "responses": [{"text": "1 2 3 4 5 6 7 8"}]}]
    chat = Words()

    def spans(mask):
        groups, _ = make_groups(records, chat, 5, 6, mask)
        return [response.span for group in groups for response in group.responses]

    assert spans("all") == [(0, 4), (0, 5), (0, 2)]
    assert spans("think") == [(0, 2), (0, 4), (0, 2)]  # up to the last </think>; without one, all of it
    assert spans("answer") == [(2, 4), (4, 5)]  # the response that is all thought has nothing to count
    assert spans("alter") == [(0, 2), (4, 5), (0, 2)]  # think, answer, think
    chat.think = "off"  # the prompt holds the think block: a response without the tag is all answer
    assert spans("think") == [(0, 2), (0, 4)] and spans("answer") == [(2, 4), (4, 5), (0, 2)]
    groups, skipped = make_groups(records, chat, 5, 6)
    assert skipped["prompts too long"] == 1 and skipped["responses too long"] == 1
    assert list(groups[1].responses[0].ids) == [7, 9, 8, 9, 2]  # the ids of the file


def test_text_gets_a_missing_end_token_and_ids_are_unchanged():
    record = {"prompt": "1", "responses": [{"text": "3 4"}, {"text": "3 1"}, {"ids": [3, 4], "text": "3 4"},
                                           {"text": ""}]}
    groups, _ = make_groups([record], Words(), 9, 9)
    ids = [list(response.ids) for response in groups[0].responses]
    assert ids == [[3, 4, 0], [3, 1], [3, 4], [0]]  # a truncated sample stays truncated


def test_rollouts_of_another_rendering_are_refused():
    record = {"id": "r", "prompt": "1", "responses": [{"ids": [3]}], "rendered": {"think": "off", "tools": "flat"}}
    with pytest.raises(InputError, match="record r: was sampled with --think off --tools flat"):
        make_groups([record], Words(), 9, 9)


def test_an_edited_text_is_not_silently_replaced_by_its_old_ids():
    record = {"id": "r", "prompt": "1", "responses": [{"ids": [3, 4], "text": "3 5"}]}
    with pytest.raises(InputError, match="record r: the text of a response is not that of its ids; remove its ids"):
        make_groups([record], Words(), 9, 9)


def test_a_cut_text_is_not_taught_to_stop():
    record = {"id": "r", "prompt": "1", "responses": [{"text": "3 4", "finish_reason": "length"}]}
    groups, _ = make_groups([record], Words(), 9, 9)
    assert list(groups[0].responses[0].ids) == [3, 4]

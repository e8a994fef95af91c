"""Packed groups against separate rows, and the ways in which a batch may be split."""
import pytest
import torch

from ckd import objective
from data import InputError
from data.groups import (counted_tokens, join, length, make_groups, micro_batches, optimiser_batches, pack,
                         read_groups, visible)
from model import Transformer
from train import head_loss

CONFIG = {"model_type": "qwen3", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}


@pytest.fixture
def model():
    return Transformer(CONFIG).init_weights(0, std=0.3).double()


@pytest.fixture
def groups():
    """Five groups: prompts of 1 to 12 tokens, 1 to 5 responses of 1 to 9 tokens, some counted only in part."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 61, (n,), generator=generator).tolist()  # noqa: E731
    sizes = [(12, (3, 9, 1)), (1, (4,)), (7, (2, 2, 5, 6, 1)), (3, (8, 7)), (9, (1, 1))]
    groups = [{"prompt": draw(p), "responses": [{"ids": draw(n), "span": (0, n)} for n in ns]} for p, ns in sizes]
    groups[0]["responses"][1]["span"] = (2, 7)
    groups[3]["responses"][0]["span"] = (5, 8)
    return groups


def separate(model, groups):
    """The logits that predict every counted token, from one plain row for each response."""
    logits = []
    for group in groups:
        for response in group["responses"]:
            start, end = (len(group["prompt"]) + at for at in response["span"])
            row = model(torch.tensor([group["prompt"] + response["ids"]]))[0]
            logits.append(row[start - 1:end - 1])
    return torch.cat(logits)


def packed_logits(model, groups, width=None):
    batch = pack(groups, width=width)
    hidden = model.hidden(batch["input_ids"], batch["positions"], visible(batch)).flatten(0, 1)
    return hidden[batch["predictors"]] @ model.head_weight.T, batch


@pytest.mark.parametrize("width", [None, 60, 100])  # one group a row; several; nearly all in one row
def test_packed_groups_equal_separate_rows(model, groups, width):
    logits, batch = packed_logits(model, groups, width)
    assert (batch["input_ids"].shape[0] < len(groups)) or width is None
    expected = separate(model, groups)
    assert torch.allclose(logits, expected, atol=1e-10)

    probe = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for values in (logits, expected):
        model.zero_grad()
        (values.log_softmax(-1) * probe).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*gradients))


def test_joined_groups_are_the_same_tokens_with_the_same_logits(model):
    """Three records with the same tools, one with others, then two with the first tools again."""
    tools, records = [[{"name": "a"}], [{"name": "b"}]], []
    for i, (which, prompt) in enumerate([(0, [1, 2, 3, 9]), (0, [1, 2, 3, 4, 5]), (0, [1, 2, 3, 4, 5]), (1, [1, 2, 8]),
                                         (0, [1, 2, 3, 4]), (0, [1, 2, 3, 4, 5])]):
        responses = [{"ids": [20 + i, 30 + i, 40], "span": (0, 3)}, {"ids": [50, 50 + i], "span": (1, 2)}]
        records.append({"record": {"tools": tools[which]}, "prompt": prompt, "responses": responses})
    joined = join(records, 8)
    assert [group["prompt"] for group in joined] == [[1, 2, 3], [1, 2, 8], [1, 2, 3, 4]]
    assert [len(group["responses"]) for group in joined] == [6, 2, 4]
    assert sum(map(length, joined)) < sum(map(length, records))
    assert [len(group["responses"]) for group in join(records, 2)] == [4, 2, 2, 4]
    assert join(records, 1) == records
    assert counted_tokens(joined) == counted_tokens(records)
    (apart, alone), (together, packed) = packed_logits(model, records), packed_logits(model, joined)
    assert torch.equal(alone["targets"], packed["targets"]) and torch.allclose(apart, together, atol=1e-10)


def test_what_is_held_out_leaves_the_order_of_the_rest(world):
    from data.chat import Chat
    chat, read = Chat.from_pretrained(world / "teacher"), []
    for hold_out in (0, 5):
        groups, held = read_groups(world / "train.jsonl", None, chat, (5000, 500, "all"), hold_out=hold_out)
        read.append([group["record"]["id"] for group in groups])
        assert len(held) == hold_out and not {group["record"]["id"] for group in held} & set(read[-1])
    assert len(read[1]) == len(read[0]) - 5 and [i for i in read[0] if i in read[1]] == read[1]


def test_targets_and_responses_stand_in_order(groups):
    batch = pack(groups, width=60)
    flat = [(r, token) for r, response in enumerate(x for g in groups for x in g["responses"])
            for token in response["ids"][slice(*response["span"])]]
    assert list(zip(batch["response"].tolist(), batch["targets"].tolist())) == flat
    assert len(flat) == counted_tokens(groups)


def test_a_response_sees_its_prompt_and_itself_only(groups):
    batch = pack(groups[:1])
    mask = visible(batch)[0, 0]
    # prompt 12; r1 3 tokens at 12, r2 9 at 15, r3 1 at 24
    assert mask[16].nonzero().squeeze(1).tolist() == [*range(12), 15, 16]
    assert mask[24].nonzero().squeeze(1).tolist() == [*range(12), 24]
    assert batch["positions"][0].tolist() == [*range(12), 12, 13, 14, *range(12, 21), 12]


@pytest.mark.parametrize("budget", [1, 14, 30, 64, 10_000])
def test_any_split_into_micro_batches_gives_the_same_gradients(model, groups, budget):
    total = counted_tokens(groups)

    def gradients(parts):
        model.zero_grad()
        for part in parts:
            batch = pack(part)
            h = model.hidden(batch["input_ids"], batch["positions"], visible(batch)).flatten(0, 1)[batch["predictors"]]
            weights = torch.full((len(h),), 1 / total, dtype=torch.float64)
            head_loss(h, model.head_weight, weights, objective("ce", batch["targets"]), chunk=5)[0].backward()
        return [p.grad.clone() for p in model.parameters()]

    parts = micro_batches(groups, budget)
    assert sum(counted_tokens(part) for part in parts) == total  # nothing lost, also where a group is cut
    assert all(len(part) * max(map(length, part)) <= budget or len(part) == 1 and len(part[0]["responses"]) == 1
               for part in parts)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(gradients(parts), gradients([groups])))


def test_batches_are_whole_groups_in_an_order_of_seed_and_epoch(groups):
    order = lambda seed, epoch: [[id(g) for g in b] for b in optimiser_batches(groups, 4, seed, epoch)]  # noqa: E731
    assert order(0, 0) == order(0, 0) and order(0, 0) != order(0, 1) != order(1, 1)
    for batch in optimiser_batches(groups, 4, 0, 0)[:-1]:
        sizes = [len(g["responses"]) for g in batch]
        assert sum(sizes) >= 4 and sum(sizes[:-1]) < 4  # cut as soon as it is full
    assert sorted(x for b in order(3, 7) for x in b) == sorted(map(id, groups))
    assert len(optimiser_batches(groups, 128, 0, 0)) == 1  # fewer sequences than a batch still make a step


class Words:
    """A stand-in for a tokenizer: a text is its ids, one a word; 9 is </think>, 0 the end."""
    think, tools, think_end_id, end_id, stop_ids = "on", "flat", 9, 0, [0, 1]

    def encode(self, text):
        return [int(word) for word in text.split()]

    def prompt(self, record):
        return record["prompt"]

    def answer(self, record):
        return record["answer"]


def test_masks_caps_and_where_responses_come_from():
    records = [{"prompt": "1 2 3", "answer": "4 9 5 6"},
               {"prompt": "1", "responses": [{"ids": [7, 9, 8, 9, 2], "text": "1 1"}, {"text": "3 0"}]},
               {"prompt": "1 2 3 4 5 6", "answer": "1"},
               {"prompt": "1", "responses": [{"text": "1 2 3 4 5 6 7 8"}]}]
    chat = Words()
    spans = lambda mask: [r["span"] for g in make_groups(records, chat, 5, 6, mask)[0]  # noqa: E731
                          for r in g["responses"]]
    assert spans("all") == [(0, 4), (0, 5), (0, 2)]
    assert spans("think") == [(0, 2), (0, 4), (0, 2)]  # up to the last </think>; without one, all of it
    assert spans("answer") == [(2, 4), (4, 5)]  # the response that is all thought has nothing to count
    assert spans("alter") == [(0, 2), (4, 5), (0, 2)]  # think, answer, think
    chat.think = "off"  # the think block stands in the prompt: a response without the tag is all answer
    assert spans("think") == [(0, 2), (0, 4)] and spans("answer") == [(2, 4), (4, 5), (0, 2)]
    groups, left_out = make_groups(records, chat, 5, 6)
    assert left_out["prompts too long"] == 1 and left_out["responses too long"] == 1
    assert groups[1]["responses"][0]["ids"] == [7, 9, 8, 9, 2]  # the file's own ids, not its text again


def test_text_gets_the_end_token_it_lacks_and_ids_are_left_alone():
    record = {"prompt": "1", "responses": [{"text": "3 4"}, {"text": "3 1"}, {"ids": [3, 4], "text": "3 4"},
                                           {"text": ""}]}
    responses = make_groups([record], Words(), 9, 9)[0][0]["responses"]
    assert [r["ids"] for r in responses] == [[3, 4, 0], [3, 1], [3, 4], [0]]  # a sample that was cut off stays cut off


def test_rollouts_of_another_rendering_are_refused():
    record = {"id": "r", "prompt": "1", "responses": [{"ids": [3]}], "rendered": {"think": "off", "tools": "flat"}}
    with pytest.raises(InputError, match="record r: was sampled with --think off --tools flat"):
        make_groups([record], Words(), 9, 9)

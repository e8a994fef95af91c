"""data/prepare.py and the filters of data/rollouts.py: labels, quotas, the self-check, what is dropped and why."""
import argparse
import doctest
import gzip
import json
import random
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from apps import rollout  # noqa: E402
from data import InputError, prepare, rollouts  # noqa: E402
from data.chat import Chat  # noqa: E402
from data.groups import Response  # noqa: E402
from data.prepare import QUOTAS, choose, labels, prepare_flags, run_prepare, turns  # noqa: E402
from data.records import read_records, self_check  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": []}
TOOL = {"name": "weather", "description": "Weather now", "parameters": SCHEMA}
CALL = {"name": "weather", "arguments": {"city": "Lima", "days": 2}}
ASK, SAY, RESULT = ({"role": role, "content": role} for role in ("user", "assistant", "tool"))
SYSTEM = {"role": "system", "content": "Be brief."}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def record(*messages, calls=(CALL,), content=None, **extra):
    return {"id": "a", "source": "s", "tools": [TOOL], "messages": list(messages or [ASK]),
            "answer": {"tool_calls": list(calls), "content": content}} | extra


# ---- labels ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, found, number", [
    (record(), "single", 1),
    (record(calls=[CALL, CALL]), "parallel", 1),
    (record(calls=[], content="No."), "response", 1),
    (record(content="Let me look."), "response single", 1),
    (record(SYSTEM, ASK), "single", 1),
    (record(ASK, SAY, ASK), "single", 2),
    (record(SYSTEM, ASK, SAY, ASK, calls=[CALL, CALL], content="So:"), "response parallel", 2),
    (record(ASK, CALLED, RESULT), "single multi-step", 2),
    (record(ASK, CALLED, RESULT, RESULT, calls=[CALL, CALL]), "parallel multi-step", 2),
    (record(ASK, CALLED, RESULT, calls=[], content="Sunny."), "response", 2),
    (record(ASK, CALLED, RESULT, ASK), "single", 2),
    (record(*[ASK, SAY] * 9, ASK), "single", 10)])
def test_labels(given, found, number):
    turn = "multi-turn" if number > 1 else "single-turn"
    assert labels(given) == {*found.split(), turn} and turns(given) == number


# ---- quotas ------------------------------------------------------------------------------------------------------

KINDS = [record(), record(calls=[CALL, CALL]), record(calls=[], content="No."),
         record(ASK, CALLED, RESULT), record(ASK, CALLED, RESULT, calls=[CALL, CALL]),
         record(ASK, SAY, ASK, content="x"), record(ASK, CALLED, RESULT, calls=[], content="Sunny."),
         record(*[ASK, SAY] * 10, ASK)]  # the last: 11 turns


def pool(number=400):
    """`number` records of each kind, each with its own id."""
    return [kind | {"id": f"{i}-{n}"} for n in range(number) for i, kind in enumerate(KINDS)]


def chosen(records, size, seed=42):
    return choose(records, size, random.Random(seed))


def test_quotas_are_reached():
    shares = {0: 150, 1: 150, 3: 150, 4: 350, 5: 200}  # of kinds, about as the quotas want them
    rich = [KINDS[i] | {"id": f"{i}-{n}"} for i in shares for n in range(4 * shares[i])]
    taken = chosen(rich, 1_000)
    have = Counter(label for one in taken for label in labels(one))
    assert all(have[label] >= share * 1_000 for label, share in QUOTAS.items()), have
    assert 1_000 <= len(taken) <= 1_100 and have["response"] == 200  # text stops at its quota
    assert len({one["id"] for one in taken}) == len(taken)


@pytest.mark.parametrize("size", [1, 5, 10, 200, 1_000])
def test_the_scan_stops_at_a_tenth_more_than_the_size(size):
    taken = chosen(pool(), size)  # from a pool that has everything, and too little of what the quotas want most
    assert len(taken) == -(-11 * size // 10)
    assert not any(turns(one) > 10 for one in taken)


def test_the_scan_takes_what_is_short_of_something():
    assert len(chosen([KINDS[0]] * 900, 100)) == 50  # single-turn is full at 30, single at 50
    assert len(chosen([KINDS[2]] * 900, 100)) == 20  # text stops at its quota, though single-turn is short of ten
    assert chosen([KINDS[-1]] * 900, 100) == []


def test_the_choice_is_deterministic():
    given = pool()
    before = list(given)
    one, two, other = chosen(given, 100), chosen(given, 100), chosen(given, 100, seed=1)
    assert one == two != other and given == before


# ---- self-check --------------------------------------------------------------------------------------------------

WRONG = CALL | {"name": "time"}
UNKNOWN = CALL | {"arguments": {"place": "Lima"}}


@pytest.mark.parametrize("answer, reward, case", [
    ({"tool_calls": [CALL, CALL], "content": None}, 1, "calls and calls"),
    ({"tool_calls": [CALL], "content": "Let me look."}, 1, "calls and calls"),
    ({"tool_calls": [{"name": "weather", "arguments": {}}], "content": None}, 1, "calls and calls"),
    ({"tool_calls": [], "content": "天気"}, 1, "text and text"),
    ({"tool_calls": [], "content": "x", "reasoning": "<think> twice"}, 1, "text and text"),  # is not scored
    ({"tool_calls": [WRONG], "content": None}, -1, "unknown tool"),
    ({"tool_calls": [CALL, UNKNOWN], "content": None}, -1, "unknown argument"),
    ({"tool_calls": [], "content": "<think>x</think> y"}, -1, "not one think block"),
    ({"tool_calls": [], "content": "<tool_call>{</tool_call>"}, 0, "label cannot be read"),
    ({"tool_calls": [], "content": "say <tool_call>"}, 0, "call never closed"),
    ({"tool_calls": [CALL | {"arguments": {"days": float("nan")}}], "content": None}, 0, "calls and calls")])
def test_self_check(answer, reward, case):
    given = record() | {"answer": answer}
    result = self_check(given)
    assert (result["reward"], result["case"]) == (reward, case)


BAD_GOLD = {
    "unknown tool": record(calls=[WRONG]),
    "unknown argument": record(calls=[UNKNOWN]),
    "list arguments": record(calls=[CALL | {"arguments": []}]),  # which the reward would read as none
    "no name": record(calls=[{"arguments": {}}]),
    "no call": record(calls=["weather"]),
    "broken arguments": {"tools": [TOOL], "messages": [ASK, {"role": "assistant", "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": "{"}}]}]},
    "broken block": {"tools": [TOOL], "messages": [ASK, {"role": "assistant", "content": "<tool_call>{</tool_call>"}]},
}


@pytest.fixture
def write(tmp_path):
    def write(*records, name="data.jsonl"):
        body = "".join(json.dumps(one) + "\n" for one in records).encode()
        (tmp_path / name).write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
        return tmp_path / name
    return write


@pytest.mark.parametrize("name", BAD_GOLD)
def test_bad_gold_answers_are_let_through_on_request(write, name):
    path = write(record(), BAD_GOLD[name])
    if name != "unknown argument":  # which training does not look at
        with pytest.raises(InputError, match="data.jsonl:2: "):
            read_records(path)
    good, bad = read_records(path, check_answer=False)
    assert self_check(good)["reward"] == 1 and self_check(bad)["reward"] <= 0


def test_bad_history_is_refused_all_the_same(write):
    path = write(record(ASK, CALLED | {"tool_calls": [{"arguments": {}}]}, RESULT))
    with pytest.raises(InputError, match="data.jsonl:1: a call lacks its name"):
        read_records(path, check_answer=False)


def test_self_check_of_the_shared_data(tmp_path):
    path = SHARED / "data" / "fc_train.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    first = tmp_path / "first.jsonl"  # all 49,006 take a minute; `star.py prepare` was run on them, and none fails
    with gzip.open(path) as lines:
        first.write_bytes(b"".join(islice(lines, 2_000)))
    failing = [one["id"] for one in read_records(first, check_answer=False) if self_check(one)["reward"] <= 0.99]
    assert not failing, f"{len(failing)} of 2,000 fail the self-check"


# ---- the stage ---------------------------------------------------------------------------------------------------

def run(*data, out, **flags):
    """`star.py prepare` on these files; flags: further ones, as they are typed."""
    parser = argparse.ArgumentParser()
    prepare_flags(parser)
    words = ["--data", *map(str, data), "--out", str(out)]
    for name, value in flags.items():
        words += ["--" + name.replace("_", "-")] + [str(value)] * (value is not True)
    run_prepare(parser.parse_args(words))


def prepared(path):
    return [json.loads(line) for line in (gzip.open if path.suffix == ".gz" else open)(path, "rb")]


def test_prepare(write, tmp_path, capsys):
    good = [record(), record(ASK, CALLED, RESULT, id="b"), record(calls=[], content="No.", id="c", note="stays")]
    again, unanswered = good[0] | {"id": "d"}, {"tools": [TOOL], "messages": [ASK]}
    one = write(*good, again, unanswered)
    two = write(*BAD_GOLD.values(), good[1], name="two.jsonl.gz")
    run(one, two, out=tmp_path / "new" / "out.jsonl.gz")
    rows = prepared(tmp_path / "new" / "out.jsonl.gz")
    assert rows == [good[0] | {"labels": ["single", "single-turn"], "turns": 1},
                    good[1] | {"labels": ["multi-step", "multi-turn", "single"], "turns": 2},
                    good[2] | {"labels": ["response", "single-turn"], "turns": 1}]
    assert read_records(tmp_path / "new" / "out.jsonl.gz") == rows
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {"records 13", "- gold answer: none 1", "- gold answer: unknown tool 1", "- gold answer: unknown argument 1",
            "- gold answer: label cannot be read 5", "- duplicates 2", "kept 3"} <= set(said)
    assert {"single - 2", "response - 1", "s 10 3"} <= set(said)
    first = (tmp_path / "new" / "out.jsonl.gz").read_bytes()
    run(one, two, out=tmp_path / "again.jsonl.gz")
    assert (tmp_path / "again.jsonl.gz").read_bytes() == first
    capsys.readouterr()
    run(one, two, out=tmp_path / "calls.jsonl", labels="single")
    assert prepared(tmp_path / "calls.jsonl") == rows[:2] and "- other labels  " in capsys.readouterr().out


def test_prepare_chooses(write, tmp_path, capsys):
    given = [one | {"messages": [*one["messages"][:-1], one["messages"][-1] | {"content": one["id"]}]}
             for one in pool()]
    run(write(*given), out=tmp_path / "out.jsonl", size=100)
    rows = prepared(tmp_path / "out.jsonl")
    generator = random.Random(42)
    expected = generator.sample(choose(given, 100, generator), 100)
    assert [row["id"] for row in rows] == [one["id"] for one in expected]
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    have = Counter(label for row in rows for label in row["labels"])
    assert {"- not chosen 3,100", "kept 100", f"parallel 50 {have['parallel']}"} <= set(said)


def test_prepare_measures_prompts(world, write, tmp_path, capsys):
    chat = Chat.from_pretrained(world / "teacher")
    short, long = record(), record({"role": "user", "content": "Lima " * 50}, id="long")
    cap = len(chat.encode(chat.prompt(short)))
    model = {"model": world / "teacher"}
    run(write(short, long), out=tmp_path / "out.jsonl", max_prompt_tokens=cap, **model)
    assert [row["id"] for row in prepared(tmp_path / "out.jsonl")] == ["a"]
    assert f"- prompts over {cap} tokens  1\n" in capsys.readouterr().out
    with pytest.raises(InputError, match="no record is left to write .prompts over 1 tokens: 1"):
        run(write(short), out=tmp_path / "new.jsonl", max_prompt_tokens=1, **model)
    assert not (tmp_path / "new.jsonl").exists()
    many = [short | {"messages": [ASK | {"content": f"{i} " * (1 + 40 * (i % 3 == 0))}]} for i in range(90)]
    run(write(*many), out=tmp_path / "some.jsonl", max_prompt_tokens=cap + 8, size=30, **model)
    rows = prepared(tmp_path / "some.jsonl")  # 15 are chosen (single), then a third of them is too long
    assert 5 < len(rows) < 15 and all(len(chat.encode(chat.prompt(row))) <= cap + 8 for row in rows)


def test_prepare_refuses(write, tmp_path):
    path, out = write(record()), tmp_path / "out.jsonl"
    out.write_text("precious")
    for data, flags, message in (([path], {"out": out}, "out.jsonl: exists already; remove it or"),
                                 ([path], {"out": path}, "data.jsonl: would be written over"),
                                 ([path, tmp_path / "no"], {"out": tmp_path / "new"}, "no: cannot be read")):
        with pytest.raises(InputError, match=message):
            run(*data, **flags)
    assert out.read_text() == "precious" and sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "out.jsonl"]


def test_a_failed_write_leaves_no_file(write, tmp_path, monkeypatch):
    path, out = write(record()), tmp_path / "out.jsonl"

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError):
        run(path, out=out)
    assert not out.exists() and not Path(f"{out}.star-tmp").exists()


# ---- rollout filters ---------------------------------------------------------------------------------------------

def renderer(think="on"):
    """A Chat without a tokenizer."""
    chat = Chat()
    chat.family, chat.default_system, chat.think, chat.tools, chat.example_call = "qwen3", None, think, "flat", ""
    return chat


def block(call=CALL):
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def said(answer, thought="\nhm\n", end="<|im_end|>"):
    return f"{thought}</think>\n\n{answer}{end}"


def filtered(*texts, think="on", given=None, **options):
    """(the texts that stay, what was dropped) of one record's responses."""
    row = (given or record()) | {"responses": [{"text": text} for text in texts]}
    rows, dropped = rollouts.filter_responses([row], renderer(think), **options)
    return [response["text"] for row in rows for response in row["responses"]], dict(dropped)


GOOD = said(block())
DROPPED = {
    "not one think block": ["never closed", said(block(), "a</think> <think>b"), said("<think>again</think>")],
    "call is not JSON": [said("<tool_call>{</tool_call>"), said(block() + "<tool_call>\nweather()\n</tool_call>")],
    "call without name or arguments": [said(block({"name": "weather"})), said(block({"arguments": {}})),
                                       said("<tool_call>[1]</tool_call>")],
    "arguments are not an object": [said(block(CALL | {"arguments": "city"})), said(block(CALL | {"arguments": None}))],
    "call never closed": [said('<tool_call>\n{"name"', end=""), said(block() + "\n<tool_call>\n{", end="")],
    "unknown tool": [said(block(WRONG)), said(block() + block(WRONG))],
    "unknown argument": [said(block(UNKNOWN))],
    "nested too deep": [said('<tool_call>{"name": "weather", "arguments": {"city": ' + "[" * 5000 + "]" * 5000
                             + "}}</tool_call>")],
}


@pytest.mark.parametrize("reason", DROPPED)
def test_bad_form_is_dropped(reason):
    for text in DROPPED[reason]:
        assert filtered(text, GOOD) == ([GOOD], {reason: 1}), text
        assert filtered(text, GOOD, given={**record(), "answer": None}) == ([GOOD], {reason: 1}), text
        assert filtered(text, GOOD, keep_all=True) == ([text, GOOD], {})


def test_mistakes_are_kept():
    texts = [said("No idea."), said(block(CALL | {"arguments": {"city": "Oslo"}})), said(""),
             said("Sunny, I th", end=""), said(block() + block()), said(block(CALL | {"arguments": {}}))]
    assert filtered(*texts) == (texts, {})


def test_think_modes():
    assert filtered(f"{block()}<|im_end|>", "<think>x</think>y", think="off") == (
        [f"{block()}<|im_end|>"], {"not one think block": 1})  # the prompt has an empty block
    assert filtered(block(), "<think>x</think>y", "text", think="none") == (
        [block(), "<think>x</think>y", "text"], {})
    assert filtered("<think>" + GOOD) == (["<think>" + GOOD], {})  # opened once more, closed once


def test_duplicates():
    a, b = CALL, CALL | {"arguments": {"city": "Oslo"}}
    swapped = {"arguments": {"days": 2, "city": "Lima"}, "name": "weather"}
    same = [said(block(a) + "\n" + block(b)), said(block(b) + block(swapped)), said(block(a) + block(b), "hm"),
            said(block(a) + block(b), end=""), said(block(a) + "\n" + block(b) + "\n", end="<|endoftext|>")]
    assert filtered(*same) == (same[:1], {"duplicate": 4})
    unlike = [same[0], said(block(a) + block(b), "no"), said(block(a)), said(block(a) + block(a)),
              said("So:\n" + block(a) + block(b)), said("Text."), said("text."), said("Text.", "x"),
              said(block(a | {"arguments": {"days": 2.5}})), said(block(a | {"arguments": {"days": "2.5"}}))]
    assert filtered(*unlike) == (unlike, {})
    assert filtered(*same, keep_all=True) == (same, {})
    rows = [record() | {"responses": [{"text": GOOD}]}] * 2  # two prompts may have the same response
    assert len(rollouts.filter_responses(rows, renderer())[0]) == 2


def test_rewards_and_dropped_prompts():
    rows = [record(id="good") | {"responses": [{"text": GOOD, "ids": [1]}, {"text": "never closed"}]},
            record(id="bad") | {"responses": [{"text": "never closed"}] * 2},
            record(id="text", calls=[], content="No tool.") | {"responses": [{"text": said("No tool.")}]},
            record(id="none", answer=None) | {"responses": [{"text": GOOD}]}]
    kept, dropped = rollouts.filter_responses(rows, renderer())
    assert dropped == {"not one think block": 3, "prompts without responses": 1}
    assert [row["id"] for row in kept] == ["good", "text", "none"]
    assert kept[0]["responses"] == [{"text": GOOD, "ids": [1], "reward": 1.0}]
    assert kept[1]["responses"][0]["reward"] == 1.0 and "reward" not in kept[2]["responses"][0]
    everything, _ = rollouts.filter_responses(rows, renderer(), keep_all=True)
    assert [[r.get("reward") for r in row["responses"]] for row in everything] == [[1, -1], [-1, -1], [1], [None]]


def test_hostile_responses_are_read_in_no_time():
    for text in ("<tool_call>" * 30_000, block() * 3000 + "<tool_call>" * 30_000, "<think>" * 30_000,
                 "</think>" * 30_000, "<|im_start|>assistant\n" * 30_000, "<tool_call>{}</tool_call>" * 10_000):
        filtered(text, said(text), "a</think>" + "<|im_start|>assistant\n<think></think>" + text)
    for depth in range(900, 1000):  # around what Python can read and not write
        filtered(said('<tool_call>{"name": "weather", "arguments": {"city": ' + "[" * depth + "]" * depth
                      + "}}</tool_call>"))


# ---- the rollout stage, with a model that says what it is told -------------------------------------------------------

@pytest.fixture
def stage(world, tmp_path, monkeypatch):
    """`star.py rollout` on six demo records, with these responses instead of the model's: all of the second record's
    are bad, and one of three of each other's. `at_most` records are answered before a Ctrl-C."""
    chat, given = Chat.from_pretrained(world / "teacher"), read_records(world / "train.jsonl")[:6]
    path = tmp_path / "data.jsonl"

    def stage(out, at_most=99, records=given, **options):
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
        answered = []
        parser = argparse.ArgumentParser()
        rollout.rollout_flags(parser)
        args = parser.parse_args(["--model", str(world / "teacher"), "--data", str(path), "--out", str(tmp_path / out),
                                  "--n", "3", "--max-concurrent", "6", "--device", "cpu"])
        vars(args).update(options, command="rollout")

        def generate(model, requests, *_):
            for request in requests:
                if len(answered) == at_most:
                    raise KeyboardInterrupt
                answered.append(request)
                gold = chat.answer(records[request.number])
                texts = ["x", "x", "x"] if request.number == 1 else [gold, "x", gold]
                request.responses = [Response(chat.encode(text), (0, 1), finish_reason="stop", log_probs=[-1.0])
                                     for text in texts]
                yield request

        monkeypatch.setattr(rollout, "generate", generate)
        rollout.run_rollout(args)
        return prepared(tmp_path / out), len(answered)
    return stage


def test_rollout_filters_and_tells(stage, capsys):
    rows, _ = stage("out.jsonl")
    assert len(rows) == 5 and all([r["reward"] for r in row["responses"]] == [1.0] for row in rows)
    told = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {"prompts 5", "responses 5", "- not one think block 8", "- duplicate 5",
            "- prompts without responses 1"} <= set(told)
    rows, _ = stage("all.jsonl", keep_all=True)
    assert [[r["reward"] for r in row["responses"]] for row in rows] == [
        [-1.0] * 3 if i == 1 else [1.0, -1.0, 1.0] for i in range(6)]


def test_a_resumed_rollout_is_the_same_and_may_filter_otherwise(stage, tmp_path):
    wholes = {"default": {}, "keep": {"keep_all": True}}
    for name, options in wholes.items():
        stage(f"{name}.jsonl", **options)
        for before in wholes.values():
            out = tmp_path / "out.jsonl"
            out.unlink(missing_ok=True)
            with pytest.raises(KeyboardInterrupt):
                stage("out.jsonl", at_most=2, **before)
            assert not out.exists() and len(Path(f"{out}.part").read_text().splitlines()) == 2
            _, answered = stage("out.jsonl", resume=True, **options)
            assert answered == 4 and out.read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()
            assert not Path(f"{out}.part").exists()


def test_nothing_left_keeps_the_part(stage, tmp_path, world):
    two = read_records(world / "train.jsonl")[:2]
    two[0]["answer"] = {"tool_calls": [], "content": "<think></think>"}  # so that its own answer has two blocks
    with pytest.raises(InputError, match="no response is left .not one think block: 6, prompts without .*--keep-all"):
        stage("out.jsonl", records=two)
    assert not (tmp_path / "out.jsonl").exists()
    rows, answered = stage("out.jsonl", records=two, resume=True, keep_all=True)
    assert answered == 0 and [len(row["responses"]) for row in rows] == [3, 3]


def test_examples_in_docstrings():
    assert doctest.testmod(prepare).failed == doctest.testmod(rollouts).failed == 0

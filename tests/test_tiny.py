"""data/tiny/: the bundled world keeps what its README promises: splits, phrasings, tokens, shared prefixes."""
import contextlib
import doctest
import io
import json
import random
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.chat import Chat  # noqa: E402
from data.groups import make_groups, share_prefixes  # noqa: E402
from data.records import read_records  # noqa: E402
from data.tiny import world  # noqa: E402
from data.tiny.tokenizer import make_tokenizer  # noqa: E402
from data.tiny.more_tools import UNSEEN  # noqa: E402
from data.tiny.phrases import POOLS  # noqa: E402
from data.tiny.tools import TOOLS  # noqa: E402
from data.tiny.world import SETTINGS, SPLITS, fill, held_out, make_arguments  # noqa: E402
from data.tiny.world import known_words, make_records, make_word, phrasings  # noqa: E402
from reward import score  # noqa: E402

README = Path(world.__file__).with_name("README.md")
EVERYTHING = TOOLS | UNSEEN


@pytest.fixture(scope="module")
def records():
    """{split: 240 records, four to a tool list}, half of them with a think line."""
    r = random.Random(0)
    return {split: [record for _ in range(60) for record in make_records(r, 4, split, reasoning=0.5)]
            for split in SPLITS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return folder


def request(record):
    return record["messages"][-1]["content"]


def values(record):
    return [value for call in record["answer"]["tool_calls"] for value in call["arguments"].values()]


def strings(record):
    """The arguments that are free strings, not words of an enum."""
    schemas = {tool["name"]: tool["parameters"]["properties"] for tool in record["tools"]}
    return [value for call in record["answer"]["tool_calls"] for name, value in call["arguments"].items()
            if isinstance(value, str) and "enum" not in schemas[call["name"]][name]]


# ---- the text ----------------------------------------------------------------------------------------------------

def test_the_world_is_as_large_as_promised():
    assert len(TOOLS) >= 24 and len(UNSEEN) >= 4 and not TOOLS.keys() & UNSEEN.keys()
    for key in EVERYTHING:
        names, descriptions, parameters, _ = EVERYTHING[key]
        assert len(names.split()) == 3 and len(descriptions.split(" / ")) == 2 and 1 <= len(parameters) <= 3, key
        lines = phrasings(key, "train")
        assert len(lines) == len(set(lines)) == 12, key
        if key in TOOLS:
            assert len(set(phrasings(key, "phrasings")) - set(lines)) == 2, key
    kinds = {type(kind) for _, _, parameters, _ in EVERYTHING.values() for _, kind in parameters.values()}
    assert kinds == {str, range, tuple, type}  # strings, integers, enums, booleans


@pytest.mark.parametrize("key", EVERYTHING)
def test_phrasings_say_what_they_fill(key):
    """All required parameters have a place; strings and integers stand there verbatim; enums by one text for each."""
    r, parameters = random.Random(key), EVERYTHING[key][2]
    kinds = {name.rstrip("?"): kind for name, (_, kind) in parameters.items()}
    said = set()
    for line in phrasings(key, "train") + (phrasings(key, "phrasings") if key in TOOLS else []):
        slots = set(re.findall(r"\{(\w+)\}", line)) | {name for name, _ in re.findall(world.CHOICE, line)}
        assert slots <= kinds.keys() and {name for name in parameters if name[-1] != "?"} <= slots, line
        for name, texts in re.findall(world.CHOICE, line):
            count = len(kinds[name]) if isinstance(kinds[name], tuple) else 2
            assert len(texts.split("|")) == count or (kinds[name] is bool and f"{name}?" in parameters), line
        for clause in re.findall(r"\[([^]]*)\]", line):
            assert all(f"{name}?" in parameters for name in re.findall(r"\{(\w+)\}", clause)), line
        for optional in (0, 1, 1, 1, 0.5):
            settings = SETTINGS | {"optional": optional, "real": 0.5, "two_words": 0.5}
            arguments = make_arguments(r, key, line, "train", settings)
            text = fill(line, arguments, parameters)
            assert not re.search(r"[][{}()|]|  | [,.?]|^\s|\s$|, and and|\?\?", text), text
            assert ("a " + text)[-1] in ".?" or text[0].islower(), text  # an order can follow "Could you"
            for name, value in arguments.items():
                said.add((name, value if kinds[name] is bool else None))
                inside = name in [slot for slot, _ in re.findall(world.CHOICE, line)]
                assert inside or re.search(rf"(?<!\w){value}(?!\w)", text), (text, name, value)
            if optional == 1:
                assert arguments.keys() == slots, line
            if optional == 0:
                assert arguments.keys() == {name for name in parameters if name[-1] != "?"}, line
    assert {name for name, _ in said} == kinds.keys()  # no parameter that nobody ever mentions


def test_held_out_text_has_no_new_words():
    """Unseen phrasings and unseen tools are new in what they say, not in their words: those all occur in training."""
    def text(tools, split):
        lines = [re.sub(r"\{\w+\}|\(\w+:", " ", line) for key in tools for line in phrasings(key, split)]
        return set(re.findall("[a-z]+", " ".join(lines).lower()))

    def named(tools):
        return set(re.findall("[a-z]+", str([(names, descriptions.lower(), [synonyms for synonyms, _ in ps.values()])
                                             for names, descriptions, ps, _ in tools.values()])))
    others = set(re.findall("[a-z]+", str([world.ORDERS, world.JOINS, world.OUTSIDE, world.TALK]).lower()))
    known = text(TOOLS, "train") | named(TOOLS) | others
    for _, _, parameters, _ in TOOLS.values():
        known |= {word for _, kind in parameters.values() if isinstance(kind, tuple) for word in kind}
    assert not text(TOOLS, "phrasings") - known
    assert not (text(UNSEEN, "tools") | named(UNSEEN)) - known


# ---- records -----------------------------------------------------------------------------------------------------

def test_equal_seeds_give_equal_records():
    one, two, other = ([make_records(random.Random(seed), 4, split) for split in SPLITS] for seed in (5, 5, 6))
    assert json.dumps(one) == json.dumps(two) != json.dumps(other)


def test_records_are_in_the_ordinary_format(records, tmp_path):
    path = tmp_path / "tiny.jsonl"
    for split in SPLITS:
        path.write_text("".join(json.dumps(record) + "\n" for record in records[split]))
        assert json.dumps(read_records(path)) == json.dumps(records[split])
        assert len({record["id"] for record in records[split]}) == 240


def test_calls_fit_their_schemas(records):
    types = {"string": str, "integer": int, "boolean": bool}
    for record in sum(records.values(), []):
        tools = {tool["name"]: tool["parameters"] for tool in record["tools"]}
        assert len(tools) == len(record["tools"]) in (1, 2, 3)
        for call in record["answer"]["tool_calls"]:
            schema = tools[call["name"]]
            assert set(schema["required"]) <= call["arguments"].keys() <= schema["properties"].keys()
            assert list(call["arguments"]) == [name for name in schema["properties"] if name in call["arguments"]]
            for name, value in call["arguments"].items():
                assert type(value) is types[schema["properties"][name]["type"]]
                assert value in schema["properties"][name].get("enum", [value])
        for value in strings(record):
            assert re.search(rf"(?<!\w){value}(?!\w)", request(record))


def test_the_gold_answer_earns_the_full_reward(records):
    for record in sum(records.values(), []):
        answer = record["answer"]
        text = "\n".join([answer["content"] or "", *(f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
                                                     for call in answer["tool_calls"])])
        result = score(text, text, record["tools"], think="none")
        assert result["reward"] == 1 and result["exact"]


def test_splits_change_what_they_say_and_nothing_else(records):
    def held(split):
        return [held_out(word) for record in records[split] for value in strings(record) for word in value.split()]
    assert all(held("values")) and not any(held("train") + held("phrasings") + held("tools"))
    assert len(held("values")) > 100
    r = random.Random(4)  # "play more to like" would be no name, and is cut otherwise where it stands in a request
    assert not {make_word(r, split=split) for split in ("train", "values") for _ in range(10000)} & known_words()

    known, new = ({text for _, texts, _, _ in tools.values() for text in texts.split(" / ")}
                  for tools in (TOOLS, UNSEEN))
    for split in SPLITS:
        for record in records[split]:
            described = {tool["name"]: tool["description"] for tool in record["tools"]}
            called = {described[call["name"]] for call in record["answer"]["tool_calls"]}
            assert called <= (new if split == "tools" else known)
            assert split == "tools" or set(described.values()) <= known
            if split == "tools":
                assert set(described.values()) & new and (len(described) == 1 or set(described.values()) & known)

    def pattern(line):  # what a request looks like that used this phrasing, whatever its arguments
        line = re.sub(r"\[[^]]*\]|\(\w+:[^)]*\)|\{\w+\}", "\0", line.rstrip(".?"))
        return re.escape(line[1:]).replace("\0", ".*")
    seen = re.compile("|".join(pattern(line) for key in TOOLS for line in phrasings(key, "train")))
    for split in ("train", "values"):
        assert all(seen.search(request(record)) for record in records[split] if record["answer"]["tool_calls"])
    unseen = re.compile("|".join(pattern(line) for key in TOOLS for line in phrasings(key, "phrasings")))
    assert all(unseen.search(request(record)) for record in records["phrasings"] if record["answer"]["tool_calls"])


def test_settings_steer_what_is_made():
    def made(**settings):
        return [record for seed in range(40) for record in make_records(random.Random(seed), 5, **settings)]
    calls = [len(record["answer"]["tool_calls"]) for record in made()]
    assert {0, 1, 2} == set(calls) and calls.count(1) > calls.count(2) > 10 and calls.count(0) > 10
    assert {len(record["answer"]["tool_calls"]) for record in made(two=0, none=0)} == {1}
    assert {len(record["answer"]["tool_calls"]) for record in made(two=1, none=0)} == {2}
    assert {len(record["answer"]["tool_calls"]) for record in made(none=1)} == {0}
    assert {len(record["tools"]) for record in made(offered=(2,))} == {2}
    with pytest.raises(TypeError, match="unknown settings: three"):
        made(three=1)
    written = {name for names, _, _, _ in TOOLS.values() for name in names.split()}
    assert {tool["name"] for record in made(random_names=0) for tool in record["tools"]} <= written
    assert not {tool["name"] for record in made(random_names=1) for tool in record["tools"]} & written
    thoughts = [record["answer"].get("reasoning") for record in made(reasoning=1)]
    assert all(thoughts) and not any(record["answer"].get("reasoning") for record in made())
    for record in made(optional=0, none=0):
        required = {tool["name"]: set(tool["parameters"]["required"]) for tool in record["tools"]}
        assert all(call["arguments"].keys() == required[call["name"]] for call in record["answer"]["tool_calls"])
    for record, careless in zip(made(), made(sloppy=1)):  # the same requests
        assert record["messages"] == careless["messages"] and record["tools"] == careless["tools"]
        gold, written = record["answer"]["tool_calls"], careless["answer"]["tool_calls"]
        assert len(written) == min(len(gold), 1) and record["answer"]["content"] == careless["answer"]["content"]
        for whole, part in zip(gold, written):
            tool = next(tool for tool in record["tools"] if tool["name"] == part["name"])["parameters"]["properties"]
            expected = {name: True if type(value) is bool else value
                        for name, value in whole["arguments"].items() if type(value) is not int}
            if any("enum" in tool[name] for name in expected):
                expected["priority"] = "high"
            assert part == {"name": whole["name"], "arguments": expected}
    real = set(" ".join(POOLS.values()).split())
    assert all(set(value.split()) <= real for record in made(real=1, two_words=0) for value in strings(record))
    assert not any(set(value.split()) & real for record in made(real=0) for value in strings(record))


def test_thoughts_name_the_tools_and_the_arguments(records):
    for record in sum(records.values(), []):
        if record["answer"].get("reasoning") and record["answer"]["tool_calls"]:
            for call in record["answer"]["tool_calls"]:
                for word in [call["name"], *call["arguments"], *map(json.dumps, call["arguments"].values())]:
                    assert word.strip('"') in record["answer"]["reasoning"]


# ---- tokens ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("think", ["on", "off", "none"])
def test_decoding_gives_every_text_back(folder, records, think):
    chat = Chat.from_pretrained(folder, think=think)
    for record in sum(records.values(), []):
        for text in (chat.prompt(record), chat.answer(record)):
            assert chat.decode(chat.encode(text)) == text


def test_anything_can_be_typed(folder):
    chat, r = Chat.from_pretrained(folder), random.Random(0)
    pieces = ["the", " play", "Ġ", '{"name": "', "\n", "  ", "<|im_end|>", "\u00e9", "\u6771\u4eac", "\U0001f600",
              "\u202e", "\0", "\t", "\u0301", "3", "Play", '", "', "\u00a0", "\u0663", "\r\n", "\ufeff"]
    for _ in range(300):
        text = "".join(r.choice(pieces) if r.random() < 0.5 else chr(r.choice((r.randrange(0xd800), r.randrange(128))))
                       for _ in range(r.randrange(40)))
        assert chat.decode(chat.encode(text)) == text


def test_transformers_reads_the_same_tokens(folder, records):
    transformers = pytest.importorskip("transformers")
    chat = Chat.from_pretrained(folder)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for record in records["train"][:50]:
        text = chat.prompt(record) + chat.answer(record)
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == chat.encode(text) and theirs.decode(ids, clean_up_tokenization_spaces=False) == text


def test_special_tokens_and_size(folder):
    chat = Chat.from_pretrained(folder)
    assert chat.vocab_size <= 1200
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"):
        assert len(chat.encode(token)) == 1
    assert make_tokenizer().to_str() == make_tokenizer().to_str()


def test_a_value_has_the_same_ids_in_request_and_call(folder):
    """Where the value stands in the request, the ids of the call must begin and end at its letters."""
    chat, r, seen = Chat.from_pretrained(folder), random.Random(1), 0

    def within(text, value):
        """The ids of every place where the value stands alone in the text."""
        encoding = chat.tokenizer.encode(text, add_special_tokens=False)
        for match in re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", text):
            low, high = match.span()
            tokens = [i for i, (start, end) in enumerate(encoding.offsets) if low < end and start < high]
            assert (encoding.offsets[tokens[0]][0], encoding.offsets[tokens[-1]][1]) == (low, high), (text, value)
            yield [encoding.ids[i] for i in tokens]

    for split in SPLITS:
        for record in (record for _ in range(25) for record in make_records(r, 10, split, reasoning=1)):
            for call in record["answer"]["tool_calls"]:
                for name, value in call["arguments"].items():
                    spelled = json.dumps(value).strip('"')
                    inside = next(within(f'{{"name": "x", "arguments": {{"{name}": {json.dumps(value)}}}}}\n', spelled))
                    places = [*within(request(record), spelled), *within(record["answer"]["reasoning"], spelled)]
                    assert all(ids == inside for ids in places)
                    seen += len(places)
                texts = chat.prompt(record), record["answer"]["reasoning"]
                called = [ids for text in texts for ids in within(text, call["name"])]
                assert all(ids == called[0] for ids in called)
    assert seen > 3000


def test_the_words_of_the_world_are_tokens(folder):
    """Only values are spelled: with all strings made up, every other word of a request or think line is one id."""
    tokenizer = Chat.from_pretrained(folder).tokenizer
    for split in SPLITS:
        for record in make_records(random.Random(2), 200, split, reasoning=1, real=0, random_names=0):
            made_up = {word for text in strings(record) for word in text.split()}
            text = request(record) + "\n" + (record["answer"]["reasoning"] if record["answer"]["tool_calls"] else "")
            if record["answer"]["tool_calls"]:
                for word in set(re.findall("[A-Za-z]+", text)) - made_up:
                    assert tokenizer.token_to_id(word) or tokenizer.token_to_id("Ġ" + word), (word, text)


# ---- shared prefixes ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("think", ["on", "off", "none"])
def test_shared_prefixes_keep_the_ordinary_prompts_and_answers(folder, think):
    chat, r = Chat.from_pretrained(folder, think=think), random.Random(3)
    rows = [make_records(r, 8, split, reasoning=0.5) for split in SPLITS]
    groups = share_prefixes(make_groups(sum(rows, []), chat, 1000, 1000)[0], 8)
    assert len(groups) == len(rows)
    for members, group in zip(rows, groups):
        ordinary, _ = make_groups(members, chat, 1000, 1000)
        assert len(group.prompt) > 0.8 * min(len(g.prompt) for g in ordinary) - 20  # the tools are in it
        assert len(group.responses) == 8 and group.record == members[0]
        for single, branch, record in zip(ordinary, group.responses, members):
            ids = list(group.prompt + branch.ids)
            assert ids == list(single.prompt + single.responses[0].ids)
            assert ids == chat.encode(chat.prompt(record)) + chat.encode(chat.answer(record))
            assert chat.decode(ids) == chat.prompt(record) + chat.answer(record)
            start, end = branch.span
            assert list(branch.ids[start:end]) == chat.encode(chat.answer(record)) and end == len(branch.ids)


# ---- the page ----------------------------------------------------------------------------------------------------

def test_the_readme_shows_what_its_command_prints(monkeypatch):
    text = README.read_text()
    command, shown = re.search(r"python -m data\.tiny\.world (--n 10 [^\n]*)\n```\n+```\n(.*?)```", text, re.S).groups()
    monkeypatch.setattr(sys, "argv", ["world.py", *command.split()])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        world.main()
    assert shown.strip() == printed.getvalue().strip()


def test_examples_in_docstrings():
    assert doctest.testmod(world).failed == 0

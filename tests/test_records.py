"""data/records.py: every shape it reads, every error it reports; files in its own format come back unchanged."""
import gzip
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import InputError  # noqa: E402
from data.records import read_lines, read_records, read_tools  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "Weather now", "parameters": SCHEMA}
CALL = {"name": "weather", "arguments": {"city": "Zürich"}}
ASK = {"role": "user", "content": "Weather in Zürich?"}
OURS = {"id": "a1", "source": "s", "tools": [TOOL], "messages": [ASK],
        "answer": {"tool_calls": [CALL], "content": None}}


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="data.jsonl"):
        """lines: dicts (written as JSON), strings or bytes."""
        lines = [json.dumps(line, ensure_ascii=False) if isinstance(line, dict) else line for line in lines]
        body = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n"
        (tmp_path / name).write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
        return tmp_path / name
    return write


def given(*messages, tools=(TOOL,), **extra):
    return {"messages": list(messages), "tools": list(tools), **extra}


# ---- shapes ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.json"])
def test_our_records_come_back_unchanged(write, name):
    rollout = OURS | {"responses": [{"text": "x", "ids": [1, 2], "reward": 0.5, "tool_calls": "untouched"}], "note": 1}
    # compared as text: the order of the keys counts, since tools are rendered in it
    assert json.dumps(read_records(write(OURS, "", rollout, name=name))) == json.dumps([OURS, rollout])


def test_every_validation_record_comes_back_unchanged():
    path = SHARED / "data" / "fc_valid.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with gzip.open(path) as lines:
        raw = [json.loads(line) for line in lines]
    assert len(raw) == 1000
    assert [json.dumps(record) for record in read_records(path)] == [json.dumps(record) for record in raw]


def test_authors_shape(write):
    turns = [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "look it up"}]
    result = {"role": "tool", "content": "sunny", "tool_call_id": "c9", "name": "weather"}
    final = {"role": "assistant", "content": "Sunny.", "tool_calls": None, "reasoning_content": None}
    for tools in ([TOOL], json.dumps([TOOL]), [{"type": "function", "function": TOOL}]):
        one, two = read_records(write({"id": 7, "messages": turns, "tools": tools},
                                      {"messages": [*turns, result, final], "tools": tools}, name="x.jsonl.gz"))
        assert one == {"id": "7", "source": "x", "tools": [TOOL], "messages": [ASK],
                       "answer": {"tool_calls": [CALL], "content": None, "reasoning": "look it up"}}
        assert two == {"id": "x:2", "source": "x", "tools": [TOOL],
                       "messages": [*turns, {"role": "tool", "content": "sunny"}],
                       "answer": {"tool_calls": [], "content": "Sunny."}}


@pytest.mark.parametrize("content, answer", [
    ("<think>\nhm\n</think>\n\nSunny.", {"tool_calls": [], "content": "Sunny.", "reasoning": "hm"}),
    ('<tool_call>\n' + json.dumps(CALL) + '\n</tool_call>', {"tool_calls": [CALL], "content": None}),
    ('<think>use <tool_call>?</think>One.\n<tool_call>' + json.dumps(CALL) + '</tool_call>\n<tool_call>'
     + json.dumps(CALL), {"tool_calls": [CALL, CALL], "content": "One.", "reasoning": "use <tool_call>?"})])
def test_blocks_inside_an_assistants_text(write, content, answer):
    line = given(ASK, {"role": "assistant", "content": content})
    assert read_records(write(line))[0]["answer"] == answer


def test_openai_shape(write):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
    messages = [{"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Weather in "},
                                             {"type": "text", "text": "Zürich?"}]},
                {"role": "assistant", "tool_calls": [call], "weight": 0},
                {"role": "tool", "tool_call_id": "c1", "content": "rain"},
                {"role": "assistant", "content": "", "tool_calls": [call, call]}]
    line = {"messages": messages, "tools": [{"type": "function", "function": TOOL | {"strict": True}}],
            "parallel_tool_calls": True}
    assert read_records(write(line)) == [{
        "id": "data:1", "source": "data", "tools": [TOOL],
        "messages": [{"role": "system", "content": "Be brief."}, ASK,
                     {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "rain"}],
        "answer": {"tool_calls": [CALL, CALL], "content": None}}]


def test_older_openai_shape(write):
    call = {"name": "weather", "arguments": '{"city": "Zürich"}'}
    messages = [ASK, {"role": "assistant", "content": None, "function_call": call},
                {"role": "function", "name": "weather", "content": "rain"},
                {"role": "assistant", "content": None, "function_call": call}]
    record = read_records(write({"messages": messages, "functions": [TOOL]}))[0]
    assert [message["role"] for message in record["messages"]] == ["user", "assistant", "tool"]
    assert record["messages"][1]["tool_calls"] == record["answer"]["tool_calls"] == [CALL]


def test_prompts_and_rollouts_need_no_answer(write):
    prompt = given(ASK)
    assert "answer" not in read_records(write(prompt), need=None)[0]
    sampled = prompt | {"responses": [{"text": "x"}]}
    assert read_records(write(sampled))[0]["responses"] == [{"text": "x"}]


def test_empty_lines_are_skipped_and_counted(write):
    path = write("", OURS, "  ", OURS)
    assert [number for number, _ in read_lines(path)] == [2, 4]
    with pytest.raises(InputError, match="data.jsonl:3: is not JSON"):
        read_records(write(OURS, "", "{"))


def test_a_file_of_tools(tmp_path):
    path = tmp_path / "tools.json"
    for tools in ([TOOL], TOOL, {"type": "function", "function": TOOL}):
        path.write_text(json.dumps(tools))
        assert read_tools(path) == [TOOL]
    path.write_text('[{"description": "x"}]')
    with pytest.raises(InputError, match="tools.json: a tool has no name; tools are"):
        read_tools(path)


def test_byte_order_mark(write):
    assert read_records(write(b"\xef\xbb\xbf" + json.dumps(OURS).encode())) == [OURS]


# ---- errors ------------------------------------------------------------------------------------------------------

def test_an_answer_in_text_is_split_as_a_message(write):
    content = "<think>\nRain?\n</think>\n<tool_call>\n" + json.dumps(CALL) + "\n</tool_call>"
    record, = read_records(write(OURS | {"id": 7, "answer": {"content": content}}))
    assert record["answer"] == {"tool_calls": [CALL], "content": None, "reasoning": "Rain?"} and record["id"] == "7"


CASES = {
    "not JSON": ('{"messages": [', "is not JSON .*; each line must be one whole JSON object"),
    "a list": ("[1]", "holds a JSON list, .*; each line must be one whole JSON object"),
    "not UTF-8": (b'{"messages": "\xff"}', "is not JSON in UTF-8 .*; each line must"),
    "half a character": ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "is not JSON in UTF-8 .*; each line must"),
    "no messages": ({"tools": []}, "no messages; add"),
    "empty messages": (given(), "no messages; add"),
    "role": (given({"role": "bot", "content": "x"}), "unknown role 'bot'; roles are"),
    "message": (given("user"), 'a message is str; write {"role", "content"}'),
    "a part without text": (given({"role": "user", "content": [{"type": "text"}]}), "content is list; write it as a string"),
    "content": (given({"role": "user", "content": {"a": 1}}), "content is dict; write it as a string"),
    "only an answer": (given({"role": "assistant", "content": "x"}), "no message to answer; before the answer"),
    "no answer": (given(ASK), "no answer; give a last assistant turn"),
    "empty answer": (given(ASK, {"role": "assistant", "content": ""}), "no answer; give"),
    "null answer": (OURS | {"answer": None}, "no answer; give"),
    "answer in words": (OURS | {"answer": "It is raining."}, "answer is str; write"),
    "answer a list": (OURS | {"answer": [{"name": "f", "arguments": {}}]}, "answer is list; write"),
    "unknown tool": (OURS | {"tools": []}, "calls 'weather', which is not among the tools; add the tool or"),
    "no name": (OURS | {"answer": {"tool_calls": [{"arguments": {}}]}}, "a call lacks its name.*; write"),
    "no arguments": (OURS | {"answer": {"tool_calls": [{"name": "weather"}]}}, "a call lacks .*; write"),
    "list arguments": (OURS | {"answer": {"tool_calls": [CALL | {"arguments": [1]}]}}, "a call lacks .*; write"),
    "broken arguments": (given(ASK, {"role": "assistant", "tool_calls": [CALL | {"arguments": "{"}]}),
                         "arguments is not JSON .*; correct it or remove"),
    "broken block": (given(ASK, {"role": "assistant", "content": "<tool_call>{</tool_call>"}),
                     "<tool_call> is not JSON .*; correct it or remove"),
    "responses": (OURS | {"responses": "text"}, "responses must be a list .*; run rollout again"),
    "a response": (OURS | {"responses": ["text"]}, "responses must be a list .*; run rollout again"),
    "an empty response": (OURS | {"responses": [{"ids": []}]}, "responses must be a list .*; run rollout again"),
    "ids": (OURS | {"responses": [{"text": "x", "ids": [1, -1]}]}, "responses must be a list .*; run rollout again"),
    "fractional ids": (OURS | {"responses": [{"ids": [1.5]}]}, "responses must be a list .*; run rollout again"),
    "tools text": (given(ASK) | {"tools": "[x"}, "tools is not JSON .*; correct it or remove"),
    "nameless tool": (given(ASK, tools=[{"description": "x"}]), "a tool has no name; tools are"),
    "tools of another kind": (given(ASK) | {"tools": 3}, "a tool has no name; tools are"),
    "parameters": (given(ASK, tools=[{"name": "f", "parameters": "x"}]), "parameters must be an object"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_line_is_named(write, case):
    line, pattern = CASES[case]
    path = write(OURS, line)
    with pytest.raises(InputError, match=pattern) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_ids_beyond_the_tokenizer(write):
    path = write(OURS | {"responses": [{"text": "x"}, {"ids": [3, 10]}]})
    assert len(read_records(path, vocab_size=11)) == 1
    with pytest.raises(InputError, match="data.jsonl:1: responses have id 10, the tokenizer only 10 ids; run rollout"):
        read_records(path, vocab_size=10)


def test_a_prompt_without_a_question_is_an_error(write):
    with pytest.raises(InputError, match="data.jsonl:1: no message to answer; before"):
        read_records(write(given({"role": "system", "content": "x"})), need=None)


def test_bad_files(tmp_path, write):
    for path, pattern in ((tmp_path / "no.jsonl", "no.jsonl: cannot be read .*; give a .jsonl or .jsonl.gz file"),
                          (tmp_path, "cannot be read .*; give"),
                          (write("", name="empty.jsonl"), "empty.jsonl: holds no records; give a file")):
        with pytest.raises(InputError, match=pattern):
            read_records(path)


def test_broken_gzip(tmp_path):
    whole = gzip.compress("".join(json.dumps(OURS | {"id": str(i) * 50}) + "\n" for i in range(2000)).encode())
    path = tmp_path / "x.jsonl.gz"
    for broken in (whole[:len(whole) // 2], whole[:-6], whole[:2000] + b"\0\0\0\0" + whole[2004:], b"plain text\n"):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"x\.jsonl\.gz:\d+: (broken gzip .*; copy the file again|is not JSON)"):
            read_records(path)


def test_parameters_are_kept_as_they_are(write):
    tools = [{"name": "f", "description": "", "parameters": parameters} for parameters in (
        {"city": {"type": "str, optional", "description": "a", "default": "Lima"}}, {"type": "object"}, {}, SCHEMA)]
    assert read_records(write(given(ASK, tools=tools)), need=None)[0]["tools"] == tools


def test_half_a_character_in_a_json_string_and_reasoning_in_parts(write):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"q": "\\ud83d"}'}}
    question = {"role": "user", "content": "?"}
    with pytest.raises(InputError, match="arguments is not JSON"):
        read_records(write({"messages": [question, {"role": "assistant", "tool_calls": [call]}], "tools": [TOOL]}))
    reply = {"role": "assistant", "content": "so", "reasoning_content": [{"type": "text", "text": "because"}]}
    assert read_records(write({"messages": [question, reply]}))[0]["answer"]["reasoning"] == "because"


def test_a_null_id_is_none(write):
    record = {"id": None, "source": None, "messages": [{"role": "user", "content": "?"}], "tools": [],
              "answer": {"content": "so"}}
    read, = read_records(write(record))
    assert read["id"].endswith(":1") and isinstance(read["source"], str)

"""data/chat.py against golden strings made by the real templates, and against transformers where it is installed."""
import gzip
import json
import os
import sys
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import InputError  # noqa: E402
from data.chat import CALLS_INTRO, TOOLS_INTRO, Chat  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]

# Not the real templates: just the passages by which chat.py tells them apart.
SECTION = f"{TOOLS_INTRO} <tools></tools> {CALLS_INTRO}"
QWEN3 = SECTION + ' {\\"name\\": <function-name>, enable_thinking last_query_index <think>'
QWEN25 = (SECTION + ' {\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}'
          "'<|im_start|>system\\n' + messages[0] '<|im_start|>system\\nYou are a stand-in.<|im_end|>\\n'")
QWEN25_DOUBLE = QWEN25.replace('{\\"name\\": <function-name>', '{{\\"name\\": <function-name>')


def tiny_tokenizer(special=SPECIAL):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def make_folder(path, template=None, model_type="qwen3", special=SPECIAL, **files):
    """A model folder without weights; files: name without .json -> content."""
    path.mkdir(exist_ok=True)
    tiny_tokenizer(special).save(str(path / "tokenizer.json"))
    files = {"config": {"model_type": model_type}, "tokenizer_config": {"chat_template": template} if template else {},
             **files}
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    three = make_folder(root / "3", QWEN3)
    return {"2.5": Chat.from_pretrained(make_folder(root / "2", QWEN25)),
            "2.5 double": Chat.from_pretrained(make_folder(root / "22", QWEN25_DOUBLE)),
            "3 on": Chat.from_pretrained(three), "3 off": Chat.from_pretrained(three, think="off"),
            "3 none": Chat.from_pretrained(three, think="none"),
            "3 wrapped": Chat.from_pretrained(three, tools="wrapped")}


# ---- golden strings ----------------------------------------------------------------------------------------------

TOOL = {"name": "tide", "description": "Marée d’un port", "parameters": {
    "type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]}}
CALL = {"name": "tide", "arguments": {"port": "Saint-Malo 🌊", "day": 2}}
ASK = {"role": "user", "content": "When is high tide?"}
SECTION_OUT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"name": "tide", "description": "Marée d’un port", "parameters": {"type": "object", "properties": {"port": \
{"type": "string"}}, "required": ["port"]}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
"""
CALL_OUT = '<tool_call>\n{"name": "tide", "arguments": {"port": "Saint-Malo 🌊", "day": 2}}\n</tool_call>'
ASK_OUT = "<|im_start|>user\nWhen is high tide?<|im_end|>\n<|im_start|>assistant\n"
STORY = [{"role": "system", "content": "Be brief."},
         {"role": "user", "content": "Hello"},
         {"role": "assistant", "content": "<think>\ngreet\n</think>\n\nHi."},
         ASK,
         {"role": "assistant", "content": "Looking.", "tool_calls": [CALL, CALL], "reasoning_content": "two ports"},
         {"role": "tool", "content": "06:10"},
         {"role": "tool", "content": "18:32"}]


def record(messages, tools=(), calls=(), content=None, **extra):
    return {"id": "r", "source": "t", "tools": list(tools), "messages": messages,
            "answer": {"tool_calls": list(calls), "content": content, **extra}}


def test_qwen25_default_system_prompt_and_example_call(chats):
    head = "<|im_start|>system\nYou are a stand-in.\n\n"
    assert chats["2.5"].prompt(record([ASK], [TOOL])) == head + SECTION_OUT + ASK_OUT
    doubled = SECTION_OUT.replace('{"name": <function-name>, "arguments": <args-json-object>}',
                                  '{{"name": <function-name>, "arguments": <args-json-object>}}')
    assert chats["2.5 double"].prompt(record([ASK], [TOOL])) == head + doubled + ASK_OUT
    assert chats["2.5"].prompt(record([ASK])) == "<|im_start|>system\nYou are a stand-in.<|im_end|>\n" + ASK_OUT


def test_qwen3_has_no_default_system_prompt(chats):
    assert chats["3 none"].prompt(record([ASK], [TOOL])) == "<|im_start|>system\n" + SECTION_OUT + ASK_OUT
    assert chats["3 none"].prompt(record([ASK])) == ASK_OUT


def test_think_opens_the_prompt(chats):
    assert chats["3 on"].prompt(record([ASK])) == ASK_OUT + "<think>"
    assert chats["3 off"].prompt(record([ASK])) == ASK_OUT + "<think>\n\n</think>\n\n"


def test_custom_system_prompt(chats):
    system = {"role": "system", "content": "Réponds."}
    for name in ("2.5", "3 none"):
        assert chats[name].prompt(record([system, ASK])) == "<|im_start|>system\nRéponds.<|im_end|>\n" + ASK_OUT
        assert chats[name].prompt(record([system, ASK], [TOOL])) == \
            "<|im_start|>system\nRéponds.\n\n" + SECTION_OUT + ASK_OUT


def test_wrapped_tools(chats):
    flat = '{"name": "tide"' + SECTION_OUT.split('{"name": "tide"')[1].split("\n")[0]
    wrapped = '{"type": "function", "function": ' + flat + "}"
    assert chats["3 wrapped"].prompt(record([ASK], [TOOL])) == \
        "<|im_start|>system\n" + SECTION_OUT.replace(flat, wrapped) + ASK_OUT + "<think>"


STORY_25 = """<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
Hello<|im_end|>
<|im_start|>assistant
<think>
greet
</think>

Hi.<|im_end|>
<|im_start|>user
When is high tide?<|im_end|>
<|im_start|>assistant
Looking.
<tool_call>
{"name": "tide", "arguments": {"port": "Saint-Malo 🌊", "day": 2}}
</tool_call>
<tool_call>
{"name": "tide", "arguments": {"port": "Saint-Malo 🌊", "day": 2}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
06:10
</tool_response>
<tool_response>
18:32
</tool_response><|im_end|>
<|im_start|>assistant
"""
STORY_3 = STORY_25.replace("<think>\ngreet\n</think>\n\n", "") \
    .replace("Looking", "<think>\ntwo ports\n</think>\n\nLooking")


def test_several_turns_and_grouped_tool_results(chats):
    assert chats["2.5"].render(STORY, [], generation_prompt=True) == STORY_25


def test_qwen3_strips_earlier_reasoning_only(chats):
    assert chats["3 on"].render(STORY, [], generation_prompt=True) == STORY_3


def test_qwen3_finished_turn_gets_a_think_block(chats):
    done = [ASK, {"role": "assistant", "content": "Noon."}]
    assert chats["3 on"].render(done, []) == ASK_OUT + "<think>\n\n</think>\n\nNoon.<|im_end|>\n"
    assert chats["2.5"].render(done, []).endswith(ASK_OUT + "Noon.<|im_end|>\n")
    # the same turn in the past has none
    assert chats["3 on"].render(done + [ASK], []) == \
        ASK_OUT + "Noon.<|im_end|>\n" + ASK_OUT.removesuffix("<|im_start|>assistant\n")


def test_tool_result_as_user_text_is_no_query(chats):
    back = {"role": "user", "content": "<tool_response>\nx\n</tool_response>"}
    thought = {"role": "assistant", "content": "a", "reasoning_content": "why"}
    assert "<think>\nwhy\n</think>\n\na" in chats["3 on"].render([ASK, thought, back], [])
    assert "why" not in chats["3 on"].render([ASK, thought, ASK], [])


ODD = [  # conversations at the edges of the templates, and what Qwen3's gives
    ([{"role": "assistant", "content": "no query at all"}], "<|im_start|>assistant\nno query at all<|im_end|>\n"),
    ([{"role": "system", "content": ""}], "<|im_start|>system\n<|im_end|>\n"),
    ([{"role": "system", "content": "a"}, {"role": "system", "content": "b"}],
     "<|im_start|>system\na<|im_end|>\n<|im_start|>system\nb<|im_end|>\n"),
    ([ASK, {"role": "assistant", "content": "wait"}, {"role": "tool", "content": "x"}],
     ASK_OUT + "wait<|im_end|>\n<|im_start|>user\n<tool_response>\nx\n</tool_response><|im_end|>\n"),
    ([ASK, {"role": "assistant", "content": "\n\nleading"}],
     ASK_OUT + "<think>\n\n</think>\n\nleading<|im_end|>\n"),
    ([ASK, {"role": "assistant", "content": "\n", "tool_calls": [CALL]}],
     ASK_OUT + f"<think>\n\n</think>\n\n\n{CALL_OUT}<|im_end|>\n"),
    ([ASK, {"role": "assistant", "content": "never opened\n</think>\nx</think>\n\ny"}],
     ASK_OUT + "<think>\nnever opened\n</think>\n\ny<|im_end|>\n"),
]


@pytest.mark.parametrize("messages, text", ODD)
def test_edges(chats, messages, text):
    assert chats["3 on"].render(messages, []) == text


def test_string_arguments(chats):
    turn = {"role": "assistant", "content": "", "tool_calls": [{"name": "tide", "arguments": '{"port":1}'}]}
    assert '"arguments": {"port":1}}' in chats["3 on"].render([ASK, turn], [])
    assert '"arguments": "{\\"port\\":1}"}' in chats["2.5"].render([ASK, turn], [])


def test_answers(chats):
    call, reply = record([ASK], [TOOL], [CALL, CALL]), record([ASK], content="Noon.", reasoning="\nsun up\n")
    for name in ("2.5", "3 none", "3 off"):
        assert chats[name].answer(call) == f"{CALL_OUT}\n{CALL_OUT}<|im_end|>"
        assert chats[name].answer(reply) == "Noon.<|im_end|>"
    assert chats["3 on"].answer(call) == f"\n\n</think>\n\n{CALL_OUT}\n{CALL_OUT}<|im_end|>"
    assert chats["3 on"].answer(reply) == "\nsun up\n</think>\n\nNoon.<|im_end|>"
    both = record([ASK], [TOOL], [CALL], "Let me look.")
    assert chats["2.5"].answer(both) == chats["3 none"].answer(both) == f"Let me look.\n{CALL_OUT}<|im_end|>"


def test_null_content_is_empty(chats):
    silent = [ASK, {"role": "assistant", "content": None}, {"role": "tool", "content": None}]
    assert chats["2.5"].render(silent, []).endswith(
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\n<tool_response>\n\n</tool_response><|im_end|>\n")


def test_no_answer_is_an_error(chats):
    with pytest.raises(InputError, match="record r: has no gold answer; add one"):
        chats["2.5"].answer({"id": "r", "tools": [], "messages": [ASK]})


# ---- the folder --------------------------------------------------------------------------------------------------

def test_flavours(tmp_path, chats):
    assert (chats["2.5"].family, chats["2.5"].think) == ("qwen2.5", "none")
    assert (chats["3 on"].family, chats["3 on"].think) == ("qwen3", "on")
    for model_type, family, system in (("qwen2", "qwen2.5", "You are Qwen, created by Alibaba Cloud. You are a helpful "
                                        "assistant."), ("qwen3", "qwen3", None)):
        chat = Chat.from_pretrained(make_folder(tmp_path / model_type, model_type=model_type))
        assert (chat.family, chat.default_system) == (family, system)
        assert chat.example_call.startswith('{"name"')
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": QWEN25}]
    folder = make_folder(tmp_path / "named", named)
    assert Chat.from_pretrained(folder).family == "qwen2.5"
    (folder / "chat_template.jinja").write_text(QWEN3)  # the file overrides tokenizer_config.json
    assert Chat.from_pretrained(folder).family == "qwen3"
    escaped = make_folder(tmp_path / "math", QWEN25.replace("a stand-in.", "clever \\\\boxed{é}."))
    assert Chat.from_pretrained(escaped).default_system == "You are clever \\boxed{é}."


@pytest.mark.parametrize("template", [
    "{{ bos }}[INST]",  # no tools section
    SECTION,  # neither think tags nor a default system prompt
    SECTION + "<|im_start|>assistant\\n<think>\\n",  # a relative of Qwen3's
    QWEN25 + "<think>",
    QWEN3.replace("last_query_index", ""),
    [{"name": "rag", "template": QWEN3}]])
def test_other_templates_are_refused(tmp_path, template):
    with pytest.raises(InputError, match="tokenizer_config.json: .* neither Qwen2.5's nor .*; use a folder with"):
        Chat.from_pretrained(make_folder(tmp_path / "m", template))


def test_folder_errors(tmp_path):
    def refused(pattern, **arguments):
        with pytest.raises(InputError, match=pattern) as error:
            Chat.from_pretrained(folder, **arguments)
        assert "\n" not in str(error.value)

    folder = tmp_path / "none"
    refused("none/config.json: no such file; give a whole model folder")
    folder = make_folder(tmp_path / "m", model_type="llama")
    refused("m/config.json: no chat template.* 'llama'.*; use a Qwen2.5 or Qwen3 folder")
    folder = make_folder(tmp_path / "m", QWEN3)
    refused("tokenizer_config.json: think is maybe, not on, off or none", think="maybe")
    for broken, pattern in ((b"{", "tokenizer.json: is not JSON"), (b"[]", "tokenizer.json: holds a JSON list"),
                            (b"{}", 'has no "model"'), (b"\xff", "is not JSON in UTF-8")):
        (folder / "tokenizer.json").write_bytes(broken)
        refused(pattern)
    (folder / "tokenizer.json").unlink()
    refused("tokenizer.json: no such file")
    folder = make_folder(tmp_path / "m", QWEN3, special=SPECIAL[:2])
    refused("no token <|im_end|>.*; use the tokenizer of")
    folder = make_folder(tmp_path / "m", QWEN3, special=SPECIAL[:3])
    refused("no token </think>.*; use --think none")
    assert Chat.from_pretrained(folder, think="none").think_end_id is None


def test_ids(tmp_path, chats):
    chat = chats["3 on"]
    assert chat.vocab_size == 256 + len(SPECIAL) and chat.think_end_id == chat.tokenizer.token_to_id("</think>")
    text = chat.prompt(record(STORY, [TOOL]))
    ids = chat.encode(text)
    assert chat.decode(ids) == text and ids.count(chat.end_id) == text.count("<|im_end|>")
    assert chat.stop_ids == [chat.end_id]
    folder = make_folder(tmp_path / "m", QWEN3, generation_config={"eos_token_id": [300, 256]},
                         config={"eos_token_id": 7})
    assert Chat.from_pretrained(folder).stop_ids == [7, 256, chat.end_id, 300]
    saved = tiny_tokenizer()  # a tokenizer.json that was saved with truncation and padding switched on
    saved.enable_truncation(4)
    saved.enable_padding(length=9)
    saved.save(str(folder / "tokenizer.json"))
    assert Chat.from_pretrained(folder).encode("abcdef") == chat.encode("abcdef")


# ---- against the real templates ----------------------------------------------------------------------------------

REAL = os.environ.get("STAR_REAL_MODEL")


def real_template(name):
    """The text of a real chat template, or a skip where it is not at hand."""
    if name == "qwen3 newer":
        path = os.environ.get("STAR_QWEN3_NEW_TEMPLATE")
        if not path:
            pytest.skip("STAR_QWEN3_NEW_TEMPLATE names no file with the newer revision of Qwen3's template")
        return Path(path).read_text()
    if name == "real folder":
        if not REAL:
            pytest.skip("STAR_REAL_MODEL names no model folder")
        return json.loads((Path(REAL) / "tokenizer_config.json").read_text())["chat_template"]
    path = SHARED / "templates" / ("qwen3.jinja" if name == "qwen3" else "qwen2.5.jinja")
    if not path.exists():
        pytest.skip(f"{path} is not there")
    text = path.read_text()
    if name == "qwen2.5 single":
        text = text.replace('{{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}}',
                            '{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}')
        assert text != path.read_text()
    return text


@pytest.fixture(scope="module")
def conversations():
    """100 each: one call or more after a single turn, no call, several turns with and without tool results."""
    path = SHARED / "data" / "fc_train.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    kinds = {}
    with gzip.open(path) as lines:
        for item in map(json.loads, islice(lines, 5000)):
            roles = [message["role"] for message in item["messages"]]
            kind = "results" if "tool" in roles else "turns" if "assistant" in roles else \
                "call" if item["answer"]["tool_calls"] else "reply"
            kinds.setdefault(kind, []).append(item)
    assert len(kinds) == 4 and min(map(len, kinds.values())) >= 100
    chosen = [item for kind in kinds.values() for item in kind[:100]]
    for i, item in enumerate(chosen):  # the data has no reasoning: give some, in both forms
        if i % 3 == 0:
            item["answer"]["reasoning"] = f"\nrésumé {i}\n\nthen call\n"
        for j, message in enumerate(item["messages"]):
            if message["role"] == "assistant" and (i + j) % 3 == 0:
                message["reasoning_content"] = f"step {j}"
            elif message["role"] == "assistant" and (i + j) % 3 == 1:
                message["content"] = f"<think>\nstep {j}\n</think>\n\n" + (message["content"] or "")
    return chosen


def not_null(messages):  # Qwen2.5's template and the older of Qwen3's fail on null
    return [{**message, "content": message["content"] or ""} for message in messages]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen2.5 single", "qwen3", "qwen3 newer", "real folder"])
def test_equal_to_transformers(name, tmp_path, conversations):
    template = real_template(name)
    utilities = pytest.importorskip("transformers.utils.chat_template_utils", reason="pip install transformers jinja2")
    pytest.importorskip("jinja2", reason="pip install jinja2")
    folder = Path(REAL) if name == "real folder" else make_folder(tmp_path / "m", template)

    def reference(messages, tools, **switches):
        messages = messages if "newer" in name else not_null(messages)
        return utilities.render_jinja_template([messages], tools or None, chat_template=template, **switches)[0][0]

    family, checked = "qwen3" if "<think>" in template else "qwen2.5", 0
    for think, form in (("none", "flat"), ("none", "wrapped"), ("on", "flat"), ("off", "wrapped")):
        if think != "none" and family == "qwen2.5":
            continue
        chat = Chat.from_pretrained(folder, think, form)
        assert chat.family == family
        for item in conversations + [{**conversations[0], "tools": [], "messages": m} for m in (STORY, STORY[1:])]:
            tools = item["tools"]
            if form == "wrapped":
                tools = [{"type": "function", "function": tool} for tool in tools]
            prompt = chat.prompt(item)
            gold = item["answer"]
            expected = reference(item["messages"], tools, add_generation_prompt=True, enable_thinking=think != "off")
            assert prompt == expected + ("<think>" if think == "on" else "")
            turn = {"role": "assistant", "content": gold["content"], "tool_calls": gold["tool_calls"],
                    "reasoning_content": gold.get("reasoning", "") if think == "on" else ""}
            done = reference(item["messages"] + [turn], tools)
            assert chat.render(item["messages"] + [turn], tools) == done
            if think != "none" or chat.family == "qwen2.5":
                assert prompt + chat.answer(item) + "\n" == done
            checked += 1
    assert checked >= 600
    for messages, text in ODD:
        for tools in ([], [TOOL]):
            assert chat.render(messages, tools) == reference(messages, tools)
        assert family == "qwen2.5" or chat.render(messages, []) == text


def test_equal_to_apply_chat_template(tmp_path, conversations):
    """Once through the public call, ids included."""
    template = real_template("qwen3")
    transformers = pytest.importorskip("transformers", reason="pip install transformers jinja2")
    chat = Chat.from_pretrained(make_folder(tmp_path / "m", template), think="none")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), chat_template=template)
    for item in conversations[::40]:
        messages = not_null(item["messages"])
        switches = {"tools": item["tools"], "add_generation_prompt": True}
        assert chat.prompt(item) == theirs.apply_chat_template(messages, tokenize=False, **switches)
        assert chat.encode(chat.prompt(item)) == theirs.apply_chat_template(messages, **switches)["input_ids"]


@pytest.mark.skipif(not REAL, reason="STAR_REAL_MODEL names no model folder")
def test_real_folder():
    chat = Chat.from_pretrained(REAL)
    config = json.loads((Path(REAL) / "config.json").read_text())
    assert chat.family == {"qwen2": "qwen2.5", "qwen3": "qwen3"}[config["model_type"]]
    assert chat.end_id == 151645 and {151643, 151645} <= set(chat.stop_ids)
    assert 151643 < chat.vocab_size <= config["vocab_size"]
    text = chat.prompt(record(STORY, [TOOL]))
    assert chat.decode(chat.encode(text)) == text

"""Records to text and token ids: byte for byte what the models' own chat templates give, without a template engine.

Two families are known. Both write ChatML turns, `<|im_start|>role\\n ... <|im_end|>\\n`, list the tools in the system
turn and group tool results into one user turn. They differ in this:

                          qwen2.5                                  qwen3
    no system message     a default prompt, from the template      no system text
    example call          {"name": ...} or {{"name": ...}}         {"name": ...}
    string arguments      quoted as JSON                           inserted raw
    reasoning             knows none                               shown after the last user query only

`Chat.from_pretrained(folder)` tells the family from the text of the folder's own template. Training and sampling use
the same two methods: `prompt` (what the model is given) and `answer` (what it should write).

Departures from the templates: (1) content that is null renders as ''; the Qwen2.5 template and the older of Qwen3's
two revisions fail on it, or print a null tool result as "None". (2) With think "on" the prompt ends in "<think>", as
in the released STAR runs; Qwen3's template leaves that token to the model.
"""
import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from data import WHOLE_FOLDER, InputError, read_json

# What ends the prompt and opens the answer. One meaning everywhere: `--think on|off|none`.
THINK = {"on": "<think>", "off": "<think>\n\n</think>\n\n", "none": ""}

TOOLS_INTRO = "You may call one or more functions to assist with the user query."
CALLS_INTRO = ("For each function call, return a json object with function name and arguments within "
               "<tool_call></tool_call> XML tags:")
EXAMPLE_CALL = '{"name": <function-name>, "arguments": <args-json-object>}'
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


class Chat:
    """A model folder's tokenizer and the way its chat template writes a conversation. See `from_pretrained`.

    tokenizer, think, tools   as given or found
    family                    "qwen2.5" or "qwen3"
    default_system            Qwen2.5's system prompt for a conversation that brings none; None for Qwen3
    stop_ids, end_id          ids that end a response, sorted; the id of <|im_end|>, which is one of them
    think_end_id              id of </think>, or None when that is not one token
    vocab_size                number of ids the tokenizer can produce (the model's embedding is usually padded wider)
    """

    @classmethod
    def from_pretrained(cls, folder, think=None, tools="flat"):
        """Reads tokenizer.json, the chat template and the stop tokens of a model folder.

        folder: a Hugging Face model folder (weights are not read).
        think: "on" opens a think block in every prompt, "off" gives the empty block, "none" no block at all;
            None takes `default_think` of tokenizer_config.json (only data/tiny has it), else what the template knows:
            "on" for Qwen3, "none" for Qwen2.5.
        tools: "flat" writes each tool as {"name", "description", "parameters"}, as STAR was trained; "wrapped" as
            {"type": "function", "function": {...}}.
        Raises InputError for a missing or broken file, and for a template of another family.
        """
        folder = Path(folder)
        chat = cls()
        chat.family, chat.default_system, chat.example_call = read_flavour(folder)
        path = folder / "tokenizer_config.json"
        known = read_json(path).get("default_think") if path.exists() else None
        chat.think = think or known or ("on" if chat.family == "qwen3" else "none")
        chat.tools = tools
        if chat.think not in THINK or tools not in ("flat", "wrapped"):
            raise InputError(f"think={think!r}, tools={tools!r}: think is on, off or none; tools is flat or wrapped")

        path = folder / "tokenizer.json"
        chat.tokenizer = read_tokenizer(folder)
        chat.tokenizer.no_truncation()  # either may have been saved into the file by an earlier training run
        chat.tokenizer.no_padding()
        chat.vocab_size = max(chat.tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps

        chat.end_id = chat.tokenizer.token_to_id("<|im_end|>")
        if chat.end_id is None:
            raise InputError(f"{path}: no token <|im_end|>, the end of a turn; use the tokenizer of Qwen2.5 or Qwen3")
        chat.think_end_id = chat.tokenizer.token_to_id("</think>")
        if chat.think != "none" and chat.think_end_id is None:
            raise InputError(f"{path}: has no token </think>, so --think {chat.think} cannot work; use --think none")
        stops = {chat.end_id}
        for name in ("generation_config.json", "config.json"):
            eos = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
            stops.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
        chat.stop_ids = sorted(stops)
        return chat

    def prompt(self, record):
        """Everything before the response: the record's tools and messages, the assistant header, the think opening."""
        tools = record["tools"]
        if self.tools == "wrapped":
            tools = [{"type": "function", "function": tool} for tool in tools]
        return self.render(record["messages"], tools, generation_prompt=True) + THINK[self.think]

    def answer(self, record):
        """The gold response that continues `prompt`, ending in <|im_end|>; its reasoning is used with think "on" only.

        prompt + answer + "\\n" is the template's rendering of the finished conversation (except for Qwen3 with think
        "none", where the template would write a think block).
        Raises InputError for a record without an answer.
        """
        gold = record.get("answer")
        if not gold:
            raise InputError(f"record {record.get('id')}: has no gold answer; add one, or train on responses")
        thought = {"on": gold.get("reasoning") or "", "off": "", "none": None}[self.think]
        text = self._assistant(text_of(gold), gold.get("tool_calls") or [], thought)
        return text.removeprefix(THINK[self.think]) + "<|im_end|>"

    def render(self, messages, tools, generation_prompt=False):
        """The conversation as the template writes it.

        Equal to transformers' `tokenizer.apply_chat_template(messages, tools=tools, tokenize=False,
        add_generation_prompt=generation_prompt)`.
        messages: in the record format (see data/sources.py). tools: a list of dicts, written as they stand.
        """
        system = text_of(messages[0]) if messages[0]["role"] == "system" else self.default_system
        parts = [] if system is None else [system]
        if tools:
            signatures = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
            parts.append(f"# Tools\n\n{TOOLS_INTRO}\n\nYou are provided with function signatures within "
                         f"<tools></tools> XML tags:\n<tools>{signatures}\n</tools>\n\n"
                         f"{CALLS_INTRO}\n<tool_call>\n{self.example_call}\n</tool_call>")
        out = [turn("system", "\n\n".join(parts))] if parts else []

        # Qwen3 drops the reasoning that led to earlier answers and keeps what came since the user last asked something.
        # A user message that is nothing but a tool result as text asks nothing.
        last = len(messages) - 1
        last_query = max((i for i, message in enumerate(messages) if message["role"] == "user" and
                          not re.fullmatch("<tool_response>.*</tool_response>", text_of(message), re.S)), default=last)
        for i, message in enumerate(messages):
            role = message["role"]
            if role == "assistant":
                content, thought = text_of(message), None
                if self.family == "qwen3":
                    content, thought = split_reasoning(message)
                    if i <= last_query or (i < last and not thought):
                        thought = None
                out.append(turn(role, self._assistant(content, message.get("tool_calls") or [], thought)))
            elif role == "tool":  # neighbouring results share one user turn
                if i == 0 or messages[i - 1]["role"] != "tool":
                    out.append("<|im_start|>user")
                out.append(f"\n<tool_response>\n{text_of(message)}\n</tool_response>")
                if i == last or messages[i + 1]["role"] != "tool":
                    out.append("<|im_end|>\n")
            elif role == "user" or i > 0:  # a system message in first place is written already
                out.append(turn(role, text_of(message)))
        return "".join(out) + ("<|im_start|>assistant\n" if generation_prompt else "")

    def _assistant(self, content, tool_calls, thought):
        """An assistant turn's inside: think block unless thought is None, content, one <tool_call> block a call."""
        opening, lines = "", [content] if content else []
        if thought is not None:
            opening = "<think>\n" + thought.strip("\n") + "\n</think>\n\n"
            lines = [line.lstrip("\n") for line in lines]
        for call in tool_calls:
            arguments = call["arguments"]
            if not (isinstance(arguments, str) and self.family == "qwen3"):
                arguments = json.dumps(arguments, ensure_ascii=False)
            lines.append(f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {arguments}}}\n</tool_call>')
        return opening + "\n".join(lines)

    def encode(self, text):
        """Text to a list of ids; <|im_end|> and the like become their own ids, and nothing is added at either end."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids to text, special tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def text_of(message):
    return message.get("content") or ""


def split_reasoning(message):
    """(content, reasoning) of an assistant message, the reasoning given apart or as a think block in the content."""
    content, reasoning = text_of(message), message.get("reasoning_content")
    if reasoning is None and "</think>" in content:
        reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
        content = content.split("</think>")[-1].lstrip("\n")
    return content, reasoning or ""


def read_tokenizer(folder):
    """The tokenizer of a model folder; InputError where its file is missing or broken."""
    path = Path(folder) / "tokenizer.json"
    if "model" not in read_json(path, WHOLE_FOLDER):
        raise InputError(f'{path}: has no "model"; download or copy it again')
    try:
        return Tokenizer.from_file(str(path))
    except Exception as e:
        if type(e) is not Exception:  # tokenizers raises plain Exception and nothing narrower
            raise
        raise InputError(f"{path}: is not a tokenizer ({e}); download or copy it again") from e


def read_flavour(folder):
    """(family, default system prompt or None, example call) of the chat template in a model folder.

    Told from the template's text; a folder without a template is judged by the model_type of its config.json.
    Raises InputError for a template that is not one of the two families'.
    """
    source = folder / "chat_template.jinja"  # newer folders; it overrides tokenizer_config.json there too
    if source.exists():
        template = source.read_text(encoding="utf-8")
    else:
        source = folder / "tokenizer_config.json"
        template = read_json(source).get("chat_template") if source.exists() else None
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default", "")
    if template is None:
        source = folder / "config.json"
        model_type = read_json(source, WHOLE_FOLDER).get("model_type")
        if model_type not in ("qwen2", "qwen3"):
            raise InputError(f"{source}: no chat template in this folder, and model_type {model_type!r} tells none; "
                             "use a Qwen2.5 or Qwen3 folder, or add its chat_template.jinja")
        return ("qwen3", None, EXAMPLE_CALL) if model_type == "qwen3" else ("qwen2.5", QWEN25_SYSTEM, EXAMPLE_CALL)

    def refuse(why):
        return InputError(f"{source}: {why}; use a folder with Qwen2.5's or Qwen3's (hybrid) chat template")

    if TOOLS_INTRO not in template or CALLS_INTRO not in template:
        raise refuse("the chat template has no tools section of the kind Qwen2.5 and Qwen3 share")
    if "<think>" in template or "enable_thinking" in template:
        # Thinking-only relatives write "<think>" into the header itself; others keep all the reasoning.
        if "enable_thinking" not in template or "last_query_index" not in template:
            raise refuse("the chat template is a relative of Qwen3's that treats reasoning in another way")
        return "qwen3", None, EXAMPLE_CALL
    default = re.search(r"'<\|im_start\|>system(?:\\n|\n)([^']+)<\|im_end\|>", template)
    if default is None:
        raise refuse("the chat template has tools but neither think tags nor a default system prompt")
    default = default[1].encode("ascii", "backslashreplace").decode("unicode-escape")  # as the template engine does
    doubled = re.search(r'\{\{\\?"name\\?": <function-name>', template)  # inside a string, so the model does see both
    return "qwen2.5", default, "{" + EXAMPLE_CALL + "}" if doubled else EXAMPLE_CALL

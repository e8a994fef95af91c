"""Records to text and token ids: exactly the text of the models' chat templates, without a template engine.

Both families write ChatML turns, `<|im_start|>role\\n ... <|im_end|>\\n`, list the tools in the system turn and put
consecutive tool results into one user turn. They differ in this:

                          qwen2.5                                  qwen3
    no system message     the template's default prompt            no system text
    example call          {"name": ...} or {{"name": ...}}         {"name": ...}
    string arguments      quoted as JSON                           inserted raw
    reasoning             never written                            written after the last user query only

`Chat.from_pretrained(folder)` recognises the family by the folder's template. Training and sampling use the same two
methods: `prompt` (the model's input) and `answer` (its target). Departures from the templates:
1. Content that is null renders as ''. Qwen2.5's template and the older of Qwen3's two revisions fail, or print "None".
2. With think "on" the prompt ends in "<think>", as in the released runs; Qwen3's template leaves it to the model.
"""
import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from data import MODEL_FOLDER, InputError, read_json, read_optional
from data.config import read_config
from data.fields import GENERATION_CONFIG, TOKENIZER_CONFIG, check_fields

# The end of the prompt, which opens the answer: `--think on|off|none`.
THINK = {"on": "<think>", "off": "<think>\n\n</think>\n\n", "none": ""}

TOOLS_INTRO = "You may call one or more functions to assist with the user query."
CALLS_INTRO = ("For each function call, return a json object with function name and arguments "
               "within <tool_call></tool_call> XML tags:")
EXAMPLE_CALL = '{"name": <function-name>, "arguments": <args-json-object>}'
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# Family, default system prompt and example call by `model_type`, of a folder without a template; Qwen3's always.
FLAVOURS = {"qwen3": ("qwen3", None, EXAMPLE_CALL), "qwen2": ("qwen2.5", QWEN25_SYSTEM, EXAMPLE_CALL)}


def add_prompt_flags(parser, tools="--tools"):
    """Add --think and the flag named `tools`: how records are rendered as prompts."""
    add = parser.add_argument_group("prompts").add_argument
    add("--think", choices=("on", "off", "none"), help="on: the prompt ends in an opened <think>; off: in an empty "
        "think block; none: no think tags; default: as it was last trained here, else on (Qwen3) or none (Qwen2.5)")
    add(tools, choices=("flat", "wrapped"), default="flat",
        help="flat: tools as in the released data; wrapped: as in OpenAI's API")


class Chat:
    """A model folder's tokenizer and chat format, made by `from_pretrained`; `think` and `tools` are attributes too.

    family: "qwen2.5" or "qwen3"
    default_system: Qwen2.5's system prompt for conversations without one; None for Qwen3
    stop_ids: sorted ids that end a response, among them end_id, the id of <|im_end|>
    think_end_id: id of </think>, or None if that is not one token
    vocab_size: number of ids of the tokenizer (the model's embedding is usually padded to more)
    """

    @classmethod
    def from_pretrained(cls, folder, think=None, tools="flat"):
        """Read a Hugging Face model folder. InputError for a broken file, or a template of another family.

        think: "on" opens a think block at the end of every prompt, "off" writes an empty one, "none" writes none;
            None takes `default_think` of tokenizer_config.json (--think of a training run), else the family's
        tools: "flat" writes a tool as {"name", "description", "parameters"}, as STAR was trained; "wrapped" as
            {"type": "function", "function": {...}}
        """
        folder = Path(folder)
        chat = cls()
        path = folder / "tokenizer_config.json"
        config = check_fields(read_optional(path), TOKENIZER_CONFIG, path)
        chat.family, chat.default_system, chat.example_call = read_flavour(folder, config.get("chat_template"))
        chat.tools = tools
        chat.think = think or config.get("default_think") or ("on" if chat.family == "qwen3" else "none")
        if chat.think not in THINK:
            raise InputError(f"{path}: think is {chat.think}, not on, off or none; correct default_think")
        chat.tokenizer = read_tokenizer(folder)
        ids = chat.tokenizer.get_vocab(with_added_tokens=True)
        chat.vocab_size = max(ids.values(), default=-1) + 1  # ids may have gaps
        check_rows(folder, chat.vocab_size)
        chat.end_id, chat.think_end_id = ids.get("<|im_end|>"), ids.get("</think>")
        path = folder / "tokenizer.json"
        if chat.end_id is None:
            raise InputError(f"{path}: no token <|im_end|>; use the tokenizer of Qwen2.5 or Qwen3")
        if chat.think != "none" and chat.think_end_id is None:
            raise InputError(f"{path}: no token </think>; use --think none")
        stop_ids = {chat.end_id}
        for path in (folder / "generation_config.json", folder / "config.json"):
            eos = check_fields(read_optional(path), GENERATION_CONFIG, path).get("eos_token_id")
            stop_ids.update(eos if isinstance(eos, list) else [eos])
        chat.stop_ids = sorted(stop_ids - {None})
        return chat

    def prompt(self, record):
        """The text before the response: tools, messages, the assistant header, the think opening."""
        tools = record["tools"]
        if self.tools == "wrapped":
            tools = [{"type": "function", "function": tool} for tool in tools]
        return self.render(record["messages"], tools, generation_prompt=True) + THINK[self.think]

    def answer(self, record):
        """The gold response that continues `prompt`, up to <|im_end|>; with its reasoning if think is "on".
        prompt + answer + "\\n" is the template's finished conversation (Qwen3's writes a think block with "none" too).
        """
        gold = record.get("answer")
        if not gold:
            raise InputError(f"record {record.get('id')}: has no gold answer; add one")
        reasoning = {"on": gold.get("reasoning") or "", "off": "", "none": None}[self.think]
        text = self._assistant(text_of(gold), gold.get("tool_calls"), reasoning)
        return text.removeprefix(THINK[self.think]) + "<|im_end|>"

    def render(self, messages, tools, generation_prompt=False):
        """The conversation as the template writes it: messages in the record format, tools unchanged.
        Equal to `tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, ...)` of transformers.
        """
        system = text_of(messages[0]) if messages[0]["role"] == "system" else self.default_system
        parts = [] if system is None else [system]
        if tools:
            tools = [json.dumps(tool, ensure_ascii=False) for tool in tools]
            parts.append("\n".join([
                "# Tools\n", TOOLS_INTRO,
                "\nYou are provided with function signatures within <tools></tools> XML tags:",
                "<tools>", *tools, "</tools>\n", CALLS_INTRO,
                "<tool_call>", self.example_call, "</tool_call>"]))
        text = turn("system", "\n\n".join(parts)) if parts else ""
        last_query = find_last_query(messages)
        roles = [message["role"] for message in messages]
        for i, (role, message) in enumerate(zip(roles, messages)):
            if role == "assistant":
                content, reasoning = text_of(message), None
                if self.family == "qwen3":
                    content, reasoning = split_reasoning(message)
                if i <= last_query or (i < len(roles) - 1 and not reasoning):
                    reasoning = None
                text += turn(role, self._assistant(content, message.get("tool_calls"), reasoning))
            elif role == "tool":  # consecutive results share one user turn
                text += "<|im_start|>user" if roles[i - 1:i] != ["tool"] else ""
                text += f"\n<tool_response>\n{text_of(message)}\n</tool_response>"
                text += "<|im_end|>\n" if roles[i + 1:i + 2] != ["tool"] else ""
            elif role == "user" or i > 0:  # a system prompt at the start is written already
                text += turn(role, text_of(message))
        return text + "<|im_start|>assistant\n" if generation_prompt else text

    def _assistant(self, content, tool_calls, reasoning):
        """The text of an assistant turn: a think block unless reasoning is None, the content, the calls."""
        opening = ""
        if reasoning is not None:
            opening = "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n"
        lines = [content.lstrip("\n") if opening else content] if content else []
        for call in tool_calls or []:
            arguments = call["arguments"]
            if not (isinstance(arguments, str) and self.family == "qwen3"):
                arguments = json.dumps(arguments, ensure_ascii=False)
            lines.append(f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {arguments}}}\n</tool_call>')
        return opening + "\n".join(lines)

    def encode(self, text):
        """Text to a list of ids. Special tokens such as <|im_end|> are recognised; none is added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids to text, special tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def text_of(message):
    return message.get("content") or ""


def find_last_query(messages):
    """Index of the last user message that is not a tool result as text; without one, of the last message."""
    result = re.compile("<tool_response>.*</tool_response>", re.S)
    queries = [i for i, message in enumerate(messages)
               if message["role"] == "user" and not result.fullmatch(text_of(message))]
    return max(queries, default=len(messages) - 1)


def split_reasoning(message):
    """(content, reasoning) of an assistant message; the reasoning may be a think block in the content."""
    content = text_of(message)
    reasoning = message.get("reasoning_content")
    if reasoning is None and "</think>" in content:
        first, *_, content = content.split("</think>")
        reasoning = first.rstrip("\n").split("<think>")[-1].lstrip("\n")
        content = content.lstrip("\n")
    return content, reasoning or ""


def read_tokenizer(folder):
    """The tokenizer of a model folder, without truncation and padding that may be saved in its file."""
    path = Path(folder) / "tokenizer.json"
    if "model" not in read_json(path, MODEL_FOLDER):
        raise InputError(f'{path}: has no "model"; download or copy it again')
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode("a\n")  # some faults appear only here
    except Exception as e:  # tokenizers raises nothing narrower
        raise InputError(f"{path}: is not a tokenizer ({e}); download or copy it again") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_rows(folder, ids):
    """InputError if the embedding of a model folder has fewer rows than its tokenizer has ids."""
    rows = read_optional(Path(folder) / "config.json").get("vocab_size")
    if isinstance(rows, int) and rows < ids:
        raise InputError(f"{folder}/tokenizer.json: has {ids} ids, the model only {rows} (config.json); "
                         "restore the tokenizer, or resize the model's embedding")


def vocabulary(folder):
    """What decides how text is tokenized: a tokenizer's (token, id) pairs in the order of ids, and its merges."""
    tokenizer = read_tokenizer(folder)
    tokens = tokenizer.get_vocab(with_added_tokens=True).items()
    merges = json.loads(tokenizer.to_str())["model"].get("merges")
    return [sorted(tokens, key=lambda item: item[1]), merges]


def check_pair(teacher_folder, student_folder):
    """Refuse two different tokenizers, as CKD compares probabilities id by id, and a teacher with fewer rows than ids.

    Returns the number of ids to use: the rows of both embeddings if they are equal, else the tokenizer's ids.
    """
    teacher, student = vocabulary(teacher_folder), vocabulary(student_folder)
    if teacher != student:
        raise InputError(f"{teacher_folder} ({len(teacher[0]):,} tokens) and {student_folder} "
                         f"({len(student[0]):,}) have different tokenizers; CKD needs two models that share one")
    ids = teacher[0][-1][1] + 1  # the largest, and one more
    check_rows(teacher_folder, ids)  # `Chat` checks the student's
    paths = [Path(folder) / "config.json" for folder in (teacher_folder, student_folder)]
    rows = {read_config(read_json(path, MODEL_FOLDER), path)["vocab_size"] for path in paths}
    return ids if len(rows) == 2 else rows.pop()


def read_flavour(folder, template):
    """(family, default system prompt, example call) from the chat template; without one, from `model_type`.
    template: of tokenizer_config.json; chat_template.jinja overrides it
    """
    path = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").exists():
        path = folder / "chat_template.jinja"
        template = path.read_text(encoding="utf-8", errors="replace")
    if template is None:
        path = folder / "config.json"
        model_type = read_json(path, MODEL_FOLDER).get("model_type")
        if str(model_type) in FLAVOURS:
            return FLAVOURS[model_type]
        raise InputError(f"{path}: no chat template is known for model_type {model_type!r}; "
                         "use a Qwen2.5 or Qwen3 folder")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default", "")
    tools = TOOLS_INTRO in template and CALLS_INTRO in template
    switch = "enable_thinking" in template
    if tools and switch and "last_query_index" in template:
        return FLAVOURS["qwen3"]
    system = re.search(r"'<\|im_start\|>system(?:\\n|\n)([^']+)<\|im_end\|>", template)
    if not tools or switch or "<think>" in template or system is None:
        raise InputError(f"{path}: the chat template is neither Qwen2.5's nor Qwen3's; use a folder with one of these")
    # Evaluate escapes as the template engine does.
    try:
        system = system[1].encode("ascii", "backslashreplace").decode("unicode-escape")
        system.encode()  # half a surrogate pair is no text
    except UnicodeError as e:
        raise InputError(f"{path}: the system prompt in the template has a bad escape ({e}); download it again") from e
    # In some templates the example stands inside a string, so its doubled braces reach the model.
    doubled = re.search(r'\{\{\\?"name\\?": <function-name>', template)
    return "qwen2.5", system, "{" + EXAMPLE_CALL + "}" if doubled else EXAMPLE_CALL

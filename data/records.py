"""Read record files: JSON lines of three shapes become records of one format, which everything else reads.

    {"id": str, "source": str,
     "tools": [{"name", "description", "parameters": JSON schema, or {argument: its type} as in xLAM}],
     "messages": [ everything before the answer:
                  {"role": "system"|"user"|"assistant"|"tool", "content": str or None,
                   optionally "tool_calls": [{"name", "arguments": dict}], "reasoning_content": str}, ...],
     "answer": {"tool_calls": [{"name", "arguments"}], "content": str or None, optionally "reasoning": str},
     optionally "responses": [...]}                                  written by `rollout`, kept unchanged

The keys of a line tell its shape: this format ("answer" or "responses"); the STAR authors' (`messages` and `tools`;
the target is the last assistant turn); OpenAI fine-tuning (`tool_calls[].function` with arguments as a JSON string,
wrapped tools, the older `functions` and `function_call`). Parameters are kept as they are, as in the released code.

Departures from the released code:
1. Nothing is repaired but a missing last `</tool_call>`. A gold call to a tool that is not offered is an error; the
   authors match similar tool names by substring. `star.py prepare` drops such records.
2. Think blocks and <tool_call> blocks in an assistant's text are split into reasoning, content and calls.
"""
import gzip
import json
import re
import zlib
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from data import InputError, is_first_rank, parse_json, positive, read_json, several_processes
from data.fields import ANSWER, RECORD, check_fields
from reward import score

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
         "developer": "system", "function": "tool"}


def add_data_flags(parser, what):
    """Add --data, --limit and --max-prompt-tokens. what: the contents of the file, for --help."""
    add = parser.add_argument
    add("--data", required=True, help=f"{what}, .jsonl or .jsonl.gz")
    add("--limit", type=positive, metavar="N", help="read only the first N records")
    add("--max-prompt-tokens", type=positive, default=5120, metavar="N", help="skip records with longer prompts")


def read_records(path, **options):
    """The records that `stream_records` yields, as a list; same options."""
    return list(stream_records(path, **options))


def stream_records(path, *, need="an answer", vocab_size=None, check_answer=True, limit=None):
    """Yield the records of a .jsonl, .jsonl.gz or .json file, one line at a time; empty lines are skipped.
    InputError names file and line.

    need: what each record must have: "a gold answer", "an answer" (gold or sampled), or None
    vocab_size: ids of responses must be smaller
    check_answer: False also accepts calls of unknown tools, and keeps, as text, calls that cannot be parsed
    limit: read at most this many records
    """
    path = Path(path)
    stem = Path(path.name.removesuffix(".gz")).stem
    lines = tqdm(islice(read_lines(path), limit), f"read {path.name}", unit=" lines", delay=2, leave=False,
                 disable=not is_first_rank())
    number = 0
    for number, line in lines:
        where = f"{path}:{number}"
        item = parse_json(line, where, "each line must be one whole JSON object")
        try:
            record = read_record(item, f"{stem}:{number}", check_answer)
            check_record(record, need, vocab_size, check_answer)
        except (InputError, RecursionError) as e:
            raise InputError(f"{where}: {e}") from e
        yield record
    if not number:
        raise InputError(f"{path}: holds no records; give a file with records")


def read_tools(path):
    """The tools of a JSON file that holds one tool or a list of them, flat or wrapped."""
    tools = read_json(path, "give a JSON list of tools", kind=(list, dict))
    try:
        return [read_tool(tool) for tool in as_list(tools)]
    except InputError as e:
        raise InputError(f"{path}: {e}") from e


def read_lines(path):
    """Yield (line number, bytes) for each line that is not empty. The file may be gzipped."""
    number = 0
    if several_processes() and path.is_fifo():
        raise InputError(f"{path}: is a pipe, which only one process can read; give a file")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise InputError(f"{path}:{number + 1}: broken gzip stream ({e}); copy the file again") from e
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); give a .jsonl or .jsonl.gz file") from e


# ---- From a line to a record. `stream_records` adds the file and the line to an InputError.

def read_record(item, default_id, check, as_text=False):
    """A JSON object of any shape as a record.

    check: as in `read_calls`, for its answer
    as_text: keep as text a call in an earlier turn that cannot be parsed
    """
    if not isinstance(item.get("messages"), list) or not item["messages"]:
        raise InputError('no messages; add a list of "messages"')
    tools = item.get("tools") or item.get("functions") or []
    tools = as_list(parse(tools, "tools") if isinstance(tools, str) else tools)
    *history, last = item["messages"]
    messages = [read_message(message, as_text=as_text) for message in history]
    messages.append(read_message(last, check))
    record = {"id": default_id, "source": default_id.rpartition(":")[0]}
    our_format = "answer" in item or "responses" in item
    check_fields(item if our_format else {}, RECORD, "the record", "give it as README.md says")
    record |= {key: str(item[key]) for key in record if item.get(key) is not None}
    answer = item.get("answer")
    last = None
    if our_format:
        record |= item | record
        if isinstance(answer, dict):
            check_fields(answer, ANSWER, "answer", "give it as README.md says")
            last = read_message(answer | {"role": "assistant"}, check)
        elif answer is not None:
            raise InputError(f'answer is {type(answer).__name__}; write {{"tool_calls": [...], "content": text}}')
    elif messages[-1]["role"] == "assistant":
        last = messages.pop()
    record |= {"tools": [read_tool(tool) for tool in tools], "messages": messages}
    if last:
        calls = last.get("tool_calls", [])
        record["answer"] = (answer or {}) | {"tool_calls": calls, "content": last["content"] or None}
        if "reasoning_content" in last:
            record["answer"]["reasoning"] = record["answer"].get("reasoning") or last["reasoning_content"]
    return record


def read_message(message, check=True, as_text=False):
    """A message of any shape in the record format, without ids and other keys. check: as in `read_calls`; as_text: keep
    as text a call in the content that cannot be parsed."""
    if not isinstance(message, dict):
        raise InputError(f'a message is {type(message).__name__}; write {{"role", "content"}}')
    role = str(message.get("role"))
    if role not in ROLES:
        raise InputError(f"unknown role {role!r}; roles are system, user, assistant, tool")
    content = read_text(message.get("content"))
    if role != "assistant":
        return {"role": ROLES[role], "content": content}
    calls = message.get("tool_calls") or message.get("function_call") or []
    reasoning = read_text(message.get("reasoning_content"))
    if block := re.match(r"\s*<think>(.*?)</think>\s*", content or "", re.S):
        reasoning = reasoning or block[1].strip("\n")
        content = content[block.end():]
    if not calls and "<tool_call>" in (content or ""):
        # text, inside of a block, text, inside of a block, ...
        pieces = re.split(r"<tool_call>(.*?)(?:</tool_call>|\Z)", content, flags=re.S)
        try:
            calls = read_calls([parse(piece, "<tool_call>", check) for piece in pieces[1::2]], check)
            content = "".join(pieces[::2]).strip() or None
        except InputError:
            if not as_text:
                raise
    elif calls:
        calls = read_calls(calls, check)
    result = {"role": role, "content": content}
    if calls:
        result["tool_calls"] = calls
    if reasoning:
        result["reasoning_content"] = reasoning
    return result


def read_text(content):
    """The content of a message as a string or None. OpenAI's list of text parts is joined."""
    if isinstance(content, list) and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content):
        content = "".join(part["text"] for part in content)
    if isinstance(content, str | None):
        return content
    raise InputError(f"content is {type(content).__name__}; write it as a string")


def read_calls(calls, check=True):
    """[{"name", "arguments"}] from plain or OpenAI tool calls. check: False keeps anything else as text."""
    result = []
    for item in as_list(calls):
        call = item.get("function", item) if isinstance(item, dict) else {}
        arguments = call.get("arguments") if isinstance(call, dict) else None
        if isinstance(arguments, str):
            arguments = parse(arguments, "arguments", check)
        if isinstance(arguments, dict) and isinstance(call.get("name"), str):
            result.append({"name": call["name"], "arguments": arguments})
        elif check:
            raise InputError('a call lacks its name or its arguments; write {"name", "arguments"}')
        else:
            result.append(json.dumps(item))
    return result


def parse(string, what, check=True):
    """The value of a JSON string. check: False returns a string that is not JSON unchanged."""
    try:
        value = json.loads(string)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
        return value
    except (ValueError, RecursionError) as e:
        if not check:
            return string
        raise InputError(f"{what} is not JSON ({e}); correct it or remove it") from e


def as_list(value):
    return value if isinstance(value, list) else [value]


def read_tool(tool):
    """{"name", "description", "parameters"} from a flat or wrapped tool."""
    tool = tool.get("function", tool) if isinstance(tool, dict) else {}
    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
        raise InputError('a tool has no name; tools are {"name", "parameters", ...}')
    parameters = tool.get("parameters") or {}
    if not isinstance(parameters, dict) or isinstance(parameters.get("required"), list) and "type" not in parameters:
        raise InputError('parameters must be an object: a JSON schema with its "type", or a type for each name')
    return {"name": tool["name"], "description": tool.get("description") or "", "parameters": parameters}


def check_record(record, need, vocab_size, check_answer):
    """Raise InputError for a record that cannot be used. Parameters as in `stream_records`."""
    responses = record.get("responses") or []
    if not (isinstance(responses, list) and all(map(is_response, responses))):
        raise InputError('responses must be a list of objects with "text" or "ids"; '
                         "run rollout again or remove the record")
    largest_id = max([max(r.get("ids") or [0]) for r in responses], default=0)
    if vocab_size is not None and largest_id >= vocab_size:
        raise InputError(f"responses have id {largest_id}, the tokenizer only {vocab_size:,} ids; "
                         "run rollout again, or remove the ids")
    messages = record["messages"]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise InputError("no message to answer; before the answer there must be a user's or a tool's message")
    if need == "an answer" and not (has_answer(record) or responses):
        raise InputError('no answer; give a last assistant turn or an "answer" with "tool_calls" or "content", '
                         "or run rollout first")
    if need == "a gold answer" and not has_answer(record):
        raise InputError(f"record {record['id']} has no gold answer to score against; add one, or remove the record")
    if check_answer and record.get("answer"):
        names = [tool["name"] for tool in record["tools"]]
        for call in record["answer"]["tool_calls"]:
            if call["name"] not in names:
                why = f"the answer calls {call['name']!r}, which is not among the tools"
                raise InputError(f"{why}; add the tool or remove the record")


def is_response(response):
    """Whether a response can be trained on."""
    response = response if isinstance(response, dict) else {}
    if ids := response.get("ids"):
        return isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
    return isinstance(response.get("text"), str)


def has_answer(record):
    """Whether the record has a gold answer: calls or text."""
    answer = record.get("answer") or {}
    return bool(answer.get("tool_calls") or answer.get("content"))


def self_check(record):
    """`reward.score` of the gold answer against itself: below 1 if no response can earn 1."""
    answer = record["answer"]
    parts = [answer["content"] or ""]
    parts += [f"<tool_call>{json.dumps(call)}</tool_call>" for call in answer["tool_calls"]]
    text = "<think></think>" + "\n".join(parts)
    return score(text, text, record["tools"])

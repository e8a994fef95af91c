"""Record files to records: JSON lines of three shapes into the one format everything else reads.

    {"id": str, "source": str,
     "tools": [{"name", "description", "parameters": JSON schema}],
     "messages": [ everything before the answer:
                  {"role": "system"|"user"|"assistant"|"tool", "content": str or None,
                   optionally "tool_calls": [{"name", "arguments": dict}], "reasoning_content": str}, ...],
     "answer": {"tool_calls": [{"name", "arguments"}], "content": str or None, optionally "reasoning": str},
     optionally "responses": [...]}                                            as a rollout wrote them, kept untouched

The shapes, told by the keys of each line: this format (it has "answer" or "responses"); the STAR authors' (`messages`
and `tools`, the target is the last assistant turn); OpenAI fine-tuning (`tool_calls[].function` with arguments as a
JSON string, wrapped tools, the older `functions` and `function_call`). Types in the xLAM manner ("List[int],
optional") become JSON schema.

Departures from the released code: (1) nothing is repaired. A gold call to a tool that is not offered is an error
naming its line, where the authors match near-miss names by substring; `star.py prepare` drops such records. (2) A
think block or <tool_call> blocks written inside an assistant's text are taken apart into reasoning, content and calls.
"""
import gzip
import json
import re
import zlib
from pathlib import Path

from tqdm import tqdm

from data import InputError, read_json
from reward import score

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system", "function": "tool"}
TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array", "tuple": "array",
         "set": "array", "sequence": "array", "iterable": "array", "dict": "object", "mapping": "object",
         "none": "null", "nonetype": "null"} | {
    name: name for name in ("string", "integer", "number", "boolean", "array", "object", "null")}


def read_records(path, need_answer=True, vocab_size=None, check_answer=True):
    """All records of a .jsonl, .jsonl.gz or .json (one object a line) file.

    need_answer: False also accepts prompts, whose last message is the user's or a tool's and which have no answer.
    vocab_size: the ids of responses must be below it.
    check_answer: False also accepts answers with calls to tools that are not offered, and with calls that cannot be
    read, which become text; `self_check` tells.
    Raises InputError, naming the file and the line, for whatever cannot be used. Empty lines are skipped.
    """
    path = Path(path)
    stem = Path(path.name.removesuffix(".gz")).stem
    records = [read_record(line, f"{path}:{number}", f"{stem}:{number}", need_answer, vocab_size, check_answer)
               for number, line in tqdm(read_lines(path), f"read {path.name}", unit=" lines", delay=2, leave=False)
               if line.strip()]
    if not records:
        raise InputError(f"{path}: holds no records; give a file with one JSON object a line")
    return records


def read_tools(path):
    """The tools of a JSON file that holds a list of them (or one), flat or wrapped; InputError for what is neither."""
    tools = read_json(path, "give a JSON list of tools, each with a name, a description and parameters",
                      kind=(list, dict))
    return [read_tool(tool, f"{path}") for tool in (tools if isinstance(tools, list) else [tools])]


def read_lines(path):
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}:{number + 1}: broken gzip stream ({error}); copy the file again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a .jsonl or .jsonl.gz file") from error


def read_record(line, where, default_id, need_answer, vocab_size, check_answer):
    """One line (bytes) to a record. where: "file:line" for errors."""
    try:
        given = json.loads(line.decode("utf-8-sig"))
        if b"\\u" in line:
            json.dumps(given, ensure_ascii=False).encode()  # half a surrogate pair fails here, not in the tokenizer
    except UnicodeError as error:
        raise InputError(f"{where}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); each line must be one whole JSON object") from error
    if not isinstance(given, dict):
        raise InputError(f"{where}: is {type(given).__name__}, not an object; write one JSON object a line")
    if not isinstance(given.get("messages"), list) or not given["messages"]:
        raise InputError(f'{where}: no messages; add "messages", a list that ends with the user\'s')

    tools = given.get("tools") or given.get("functions") or []
    tools = parse(tools, where, "tools") if isinstance(tools, str) else tools
    tools = [read_tool(tool, where) for tool in (tools if isinstance(tools, list) else [tools])]
    *history, last = given["messages"]
    messages = [read_message(message, where) for message in history] + [read_message(last, where, check_answer)]
    record = {"id": default_id, "source": default_id.rpartition(":")[0]}
    if "answer" in given or "responses" in given:
        record |= given | {"tools": tools, "messages": messages}
        if given.get("answer") is not None:
            answer = given["answer"]
            if not isinstance(answer, dict):
                raise InputError(f'{where}: answer is {type(answer).__name__}; write {{"tool_calls": [...]}}, each '
                                 'with name and arguments, or {"content": text}')
            record["answer"] = answer | {"tool_calls": read_calls(answer.get("tool_calls") or [], where, check_answer),
                                         "content": text(answer.get("content"), where)}
    else:
        record |= {key: str(given[key]) for key in record if given.get(key) is not None}
        record |= {"tools": tools, "messages": messages}
        if messages[-1]["role"] == "assistant":
            last = messages.pop()
            record["answer"] = {"tool_calls": last.get("tool_calls", []), "content": last["content"] or None}
            if last.get("reasoning_content"):
                record["answer"]["reasoning"] = last["reasoning_content"]

    check_responses(record.get("responses") or [], where, vocab_size)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise InputError(f"{where}: no message to answer; before the answer must come a user's or a tool's")
    if need_answer and not (has_answer(record) or record.get("responses")):
        raise InputError(f"{where}: no answer; give a last assistant turn or an \"answer\" with calls or content, "
                         "or run rollout first")
    for call in (record.get("answer") or {}).get("tool_calls", []):
        if check_answer and call["name"] not in [tool["name"] for tool in tools]:
            raise InputError(f"{where}: the answer calls {call['name']!r}, which is not among the tools; "
                             "add the tool or remove the record")
    return record


def has_answer(record):
    """Whether the record has a gold answer: calls or text."""
    answer = record.get("answer") or {}
    return bool(answer.get("tool_calls") or answer.get("content"))


def self_check(record):
    """`reward.score` of the record's gold answer against itself; `star.py prepare` keeps a reward over 0.99.

    Less than 1 is what no answer could earn full reward for: a call that cannot be read, an unknown tool or argument,
    think tags or <tool_call> within a text.
    """
    answer = record["answer"]
    calls = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in answer["tool_calls"]]
    text = "<think>\n\n</think>\n\n" + "\n".join([answer["content"] or "", *calls]).lstrip("\n")
    return score(text, text, record["tools"])


def check_responses(responses, where, vocab_size):
    """Refuse responses that cannot be trained on; each is {"text", "ids"} or one of the two."""
    if not isinstance(responses, list) or not all(isinstance(response, dict) for response in responses):
        raise InputError(f"{where}: responses is not a list of objects; run rollout again or remove the record")
    for response in responses:
        ids = response.get("ids") or []
        if not isinstance(ids, list) or not all(type(i) is int for i in ids) or min(ids, default=0) < 0:
            raise InputError(f"{where}: ids of responses must be whole numbers from 0 up; run rollout again")
        if vocab_size is not None and max(ids, default=0) >= vocab_size:
            raise InputError(f"{where}: responses have id {max(ids)}, the tokenizer only {vocab_size:,} ids; run "
                             "rollout again with a model that shares it, or remove the ids to train on the text")
        if not ids and not isinstance(response.get("text"), str):
            raise InputError(f"{where}: one of the responses has neither ids nor text; run rollout again")


def read_message(message, where, check=True):
    """One message of any shape in the record format; ids and other keys are dropped. check: see `read_calls`."""
    role = str(message.get("role") if isinstance(message, dict) else message)
    if role not in ROLES or not isinstance(message, dict):
        raise InputError(f"{where}: unknown role {role!r}; roles are system, user, assistant and tool")
    result = {"role": ROLES[role], "content": text(message.get("content"), where)}
    if result["role"] != "assistant":
        return result
    content, reasoning = result["content"] or "", message.get("reasoning_content")
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if block := re.match(r"\s*<think>(.*?)</think>\s*", content, re.S):
        reasoning = reasoning or block[1].strip("\n")
        result["content"] = content = content[block.end():]
    if not calls and "<tool_call>" in content:
        said, *blocks = re.split(r"<tool_call>(.*?)(?:</tool_call>|\Z)", content, flags=re.S)  # text, block, text...
        calls = [parse(block, where, "<tool_call>", check) for block in blocks[::2]]
        result["content"] = (said + "".join(blocks[1::2])).strip() or None
    if calls:
        result["tool_calls"] = read_calls(calls, where, check)
    if reasoning:
        result["reasoning_content"] = reasoning
    return result


def text(content, where):
    """Message content as a string or None; OpenAI's list of text parts is joined."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text")) for part in content)
    if content is not None and not isinstance(content, str):
        raise InputError(f"{where}: content is {type(content).__name__}; write it as a string (a result as JSON text)")
    return content


def read_calls(calls, where, check=True):
    """[{"name", "arguments"}] from plain or OpenAI tool calls. check: False keeps what is neither, as text."""
    result = []
    for given in calls if isinstance(calls, list) else [calls]:
        call = given.get("function", given) if isinstance(given, dict) else {}
        arguments = call.get("arguments") if isinstance(call, dict) else None
        if isinstance(arguments, str):
            arguments = parse(arguments, where, "arguments", check)
        if isinstance(arguments, dict) and isinstance(call.get("name"), str):
            result.append({"name": call["name"], "arguments": arguments})
        elif check:
            raise InputError(f'{where}: a call lacks its name or its arguments object; write {{"name", "arguments"}}')
        else:
            result.append(json.dumps(given))
    return result


def read_tool(tool, where):
    """{"name", "description", "parameters"} from a flat or wrapped tool."""
    tool = tool.get("function", tool) if isinstance(tool, dict) else {}
    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
        raise InputError(f'{where}: a tool has no name; tools are {{"name", "description", "parameters"}}')
    return {"name": tool["name"], "description": tool.get("description") or "",
            "parameters": to_json_schema(tool.get("parameters") or {}, where)}


def parse(string, where, what, check=True):
    """What a JSON string holds. check: False gives a string that is not JSON back."""
    try:
        return json.loads(string)
    except (ValueError, RecursionError) as error:
        if not check:
            return string
        raise InputError(f"{where}: {what} is not JSON ({error}); correct it or remove the record") from error


def to_json_schema(parameters, where="parameters"):
    """A tool's parameters as a JSON schema; what is one already comes back unchanged.

    parameters: {"city": {"type": "str, optional", "description": ..., "default": ...}} or {"city": "str"}. A
    parameter is required unless its type says optional or it has a default; its own true/false "required" decides.

    >>> to_json_schema({"n": {"type": "List[int], optional"}})["properties"]
    {'n': {'type': 'array', 'items': {'type': 'integer'}}}
    """
    if isinstance(parameters, dict) and isinstance(parameters.get("type"), str):
        if isinstance(parameters.get("properties"), dict):
            return parameters
        if TYPES.get(parameters["type"]) == "object":  # an object without properties: a tool without parameters
            return {"type": "object", "properties": {}, "required": []}
    if not isinstance(parameters, dict) or not all(isinstance(spec, (dict, str)) for spec in parameters.values()):
        raise InputError(f"{where}: parameters must be a JSON schema of type object, or a type for each name")
    properties, required = {}, []
    for name, spec in parameters.items():
        spec = {"type": spec} if isinstance(spec, str) else spec
        kind = spec.get("type", "any")
        schema, optional = type_schema(kind) if isinstance(kind, str) else ({"type": kind}, False)
        properties[name] = schema | {key: value for key, value in spec.items()
                                     if key != "type" and not (key == "required" and isinstance(value, bool))}
        flag = spec.get("required")
        if flag if isinstance(flag, bool) else not optional and "default" not in spec:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def type_schema(kind):
    """(JSON schema, is optional) of a Python type written as text; a type JSON does not have allows anything: {}.

    >>> type_schema("Optional[Union[int, Dict[str, Any]]]")
    ({'anyOf': [{'type': 'integer'}, {'type': 'object'}]}, True)
    """
    kind, *notes = split(kind, ",")
    optional = any(note.lower().startswith("optional") for note in notes)
    alternatives = split(kind, "|")
    base, _, inner = kind.removesuffix("]").partition("[")
    base, inner = base.strip().lower().removeprefix("typing."), split(inner, ",")
    if base in ("optional", "union") or len(alternatives) > 1:
        alternatives = inner if len(alternatives) == 1 else alternatives
        schemas = [type_schema(one)[0] for one in alternatives]
        known = [schema for schema in schemas if schema != {"type": "null"}]
        optional = optional or base == "optional" or len(known) < len(schemas)
        return (known[0] if len(known) == 1 else {} if {} in known or not known else {"anyOf": known}), optional
    schema = {"type": TYPES[base]} if base in TYPES else {}
    if schema.get("type") == "array" and inner:
        items = [type_schema(one)[0] for one in inner if one != "..."]
        if items[0] and all(item == items[0] for item in items):  # a tuple of unlike types stays a plain array
            schema["items"] = items[0]
    return schema, optional


def split(string, separator):
    """Cuts at separators outside brackets: "Dict[str, Any], optional" is two pieces at ","."""
    pieces, depth = [""], 0
    for character in string:
        depth += (character == "[") - (character == "]")
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces if piece.strip()]

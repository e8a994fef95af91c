"""The reward of Sim-RL (paper Eqs. 6-10; paper.md 1.5): how close a generation's calls are to the gold calls.

    R    = (R_format - 1) + R_format (R_fc + R_response)                               in [-1, 1]
    R_fc = sum of sim(p, g) over matched calls / (|P| + |G| - |P and G|)               P: predicted, G: gold calls
    sim  = sum of s(value, value) over shared arguments / number of all arguments      R_response, s: see below

R_format is 0 where the text has not exactly one think block, or a call that cannot be read, asks for a tool that was
not offered, or has an argument the tool does not know. Otherwise it is 1, and the rest compares calls with calls
(R_fc, a similarity in [0, 1]) or text with text (R_response, ROUGE-L). Calls where text is due, and text where calls
are due, are worth 0. Text only, no tensors; what a model wrote is parsed and never run.

What the code does beyond the paper's text is what the released function does; 3,000 of its values are tests:
1. Calls are matched greedily in the order they were written, each with the most similar gold call of its name that is
   left, which is then gone even at similarity 0. The order matters; it is not the best assignment.
2. |P and G| is the number of pairs matched by name.
3. Numbers and booleans compare by ==, so True is 1 and 5.0 is 5. Unlike types and nested values compare as their
   Python text, so "5" is 5 and a list's order matters.
4. The end token is part of a text reply, where ROUGE-L reads it as the words "im" and "end".
5. Required arguments, types and enums are not checked. An empty string or list stands for no arguments.

Departures from the released code:
1. Where that raises, this returns: a string or list of known argument names as arguments is a format failure, as is
   nesting too deep for Python; a label is read after its last </think> (released: raises unless there is exactly
   one); to a label whose call cannot be read, every answer is worth 0.
2. Tools in OpenAI's wrapped form are unwrapped (released: every call to one is a format failure).
3. Options, all off by default: think="none", strip_eos and binary, see `score`.
"""
import json
import re

from data.stemmer import stem

HEADER = "<|im_start|>assistant\n"
FORMAT_FAILURES = ("not one think block", "call is not JSON", "call without name or arguments", "unknown tool",
                   "unknown argument", "arguments are not an object", "nested too deep")


class FormatError(Exception):
    """R_format = 0; its argument is one of FORMAT_FAILURES."""


# ---------------------------------------------------------------------------------------------------------------------
# From text to calls

def blocks(text, opening, closing):
    """What stands between each opening tag and the next closing one (in one pass: a regular expression takes hours
    for a megabyte of opening tags).

    >>> blocks("<a>1</a> <a>2<a>3</a> <a>4", "<a>", "</a>")
    ['1', '2<a>3']
    """
    found, at = [], text.find(opening)
    while at >= 0 and (end := text.find(closing, at + len(opening))) >= 0:
        found.append(text[at + len(opening):end])
        at = text.find(opening, end + len(closing))
    return found


def parse(answer):
    """(calls, reply): what comes after the thinking, as a list of calls or as text; the other one is None.

    With `<tool_call>` anywhere, every closed block is a call and the text around them is ignored; a block that is
    never closed is no call, which leaves an empty list. Raises FormatError.
    """
    if "<tool_call>" not in answer:
        return None, answer.strip()
    calls = []
    for block in blocks(answer, "<tool_call>", "</tool_call>"):
        try:
            call = json.loads(block)
        except ValueError as error:  # a number of over 4,300 digits is one too
            raise FormatError("call is not JSON") from error
        if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
            raise FormatError("call without name or arguments")
        if call["arguments"] in ("", []):
            call["arguments"] = {}
        if not isinstance(call["arguments"], dict):
            raise FormatError("arguments are not an object")
        calls.append(call)
    return calls, None


def offered(tools):
    """{name: its argument names} of a list of tools, whose parameters are a JSON schema or {name: ...}."""
    known = {}
    for tool in tools:
        tool = tool.get("function", tool) if isinstance(tool, dict) else {}
        if isinstance(tool, dict) and isinstance(tool.get("name"), str):
            keys = tool.get("parameters")
            if isinstance(keys, dict) and "type" in keys and isinstance(keys.get("properties"), dict):
                keys = keys["properties"]
            known[tool["name"]] = set(keys) if isinstance(keys, dict) else set()
    return known


def tools_in(prompt):
    """The tools of a prompt: the JSON lines of its last <tools> block."""
    tools = []
    for line in (blocks(prompt, "<tools>", "</tools>") or [""])[-1].splitlines():
        try:
            tools.append(json.loads(line))
        except (ValueError, RecursionError):  # such a tool cannot be called
            continue
    return tools


def check(calls, known):
    """Raise FormatError for a call to a tool that is not `known`, or with an argument that the tool does not have."""
    for call in calls:
        if not isinstance(call["name"], str) or call["name"] not in known:
            raise FormatError("unknown tool")
        if not call["arguments"].keys() <= known[call["name"]]:
            raise FormatError("unknown argument")


# ---------------------------------------------------------------------------------------------------------------------
# Similarity

def words(text):
    """The words ROUGE compares: lower case, ASCII letters and digits, stemmed when longer than three.

    >>> words("Flights to New-York!")
    ['flight', 'to', 'new', 'york']
    """
    return [stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", text.lower())]


def lcs(a, b):
    """Length of the longest common subsequence of two lists, one bit of an integer for each element of `a`.

    A 0 in `row` marks where the length grows by one along `a`; + carries each match to the next place that is free.
    """
    places = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    row = everywhere = (1 << len(a)) - 1
    for word in b:
        if hits := row & places.get(word, 0):
            row = (row + hits | row - hits) & everywhere
    return len(a) - row.bit_count()


def rouge_l(text, gold):
    """ROUGE-L F1 of two texts, in [0, 1]; equal texts give 1, also where they hold no word at all."""
    if text == gold:
        return 1.0
    a, b = sorted((words(text), words(gold)), key=len)  # symmetric; the shorter makes the integers
    return 2 * lcs(a, b) / (len(a) + len(b)) if a else 0.0


def value_similarity(value, gold):
    """s: ROUGE-L for two strings, equality for numbers and booleans, equality of the text of all else."""
    if isinstance(value, str) and isinstance(gold, str):
        return rouge_l(value, gold)
    if isinstance(value, (int, float)) and isinstance(gold, (int, float)):  # a bool is an int
        return float(value == gold)
    return float(str(value) == str(gold))


def similarity(arguments, gold):
    """sim: summed similarity of the shared arguments over the number of all; 1 where neither has any."""
    everything = arguments.keys() | gold.keys()
    shared = [name for name in arguments if name in gold]  # in order: a set's order, and so the last bit, is random
    return sum(value_similarity(arguments[k], gold[k]) for k in shared) / len(everything) if everything else 1.0


def match(calls, gold):
    """Pair each call, in order, with the most similar gold call left of its name, the first of equals (Algorithm 2).

    Returns (pairs, left): pairs of (index into gold or None, similarity), one for each call; left, gold indices.
    """
    pairs, left = [], list(range(len(gold)))
    for call in calls:
        candidates = [(similarity(call["arguments"], gold[i]["arguments"]), -i)
                      for i in left if gold[i]["name"] == call["name"]]
        sim, i = max(candidates, default=(0.0, None))
        if candidates:
            left.remove(-i)
        pairs.append((-i if candidates else None, sim))
    return pairs, left


def exact(calls, gold):
    """Whether both are the same calls in any order, every argument equal."""
    left = [(call["name"], call["arguments"]) for call in gold]
    for call in calls:
        if (call["name"], call["arguments"]) not in left:
            return False
        left.remove((call["name"], call["arguments"]))
    return not left


# ---------------------------------------------------------------------------------------------------------------------
# The reward

def score(text, label, tools, think="on", strip_eos=False, binary=False):
    """Score one generation.

    text: prompt and generation (from the last assistant header on, it is the response; a prompt's own opening of the
    think block thus counts as part of it) · label: the gold response, its reasoning up to </think> ignored · tools:
    those offered, a list · think: "none" asks for no think block, for models without such tags · strip_eos: keep the
    end token out of text replies, so that an empty reply to a short refusal is worth 0 and not 0.5 · binary: all or
    nothing, the paper's ablation: 1 for exactly the gold calls, and for text where text is due.

    Returns {"reward" in [-1, 1], what is learnt from; "answer_score" in [0, 1], what groups are filtered by: the
    reward, with format failures at 0; "case": the row of the table in paper.md 1.5; "exact": the gold calls exactly,
    or text where text is due; "calls", "gold": those read, or None; "pairs", "left": see `match`}. Never raises.
    """
    response, gold_text = text.rpartition(HEADER)[2], label.rpartition("</think>")[2]
    # R = (R_format - 1) + R_format (R_fc + R_response), Eq. 6: -1 unless the format is right, and then one of the two.
    result = {"reward": -1.0, "answer_score": 0.0, "case": None, "exact": False, "calls": None, "gold": None,
              "pairs": [], "left": []}
    try:
        gold, gold_reply = parse(gold_text)
    except (FormatError, RecursionError):
        return result | {"reward": 0.0, "case": "label cannot be read"}
    result["gold"] = gold
    try:
        if think != "none" and len(blocks(response, "<think>", "</think>")) != 1:
            raise FormatError("not one think block")
        calls, reply = parse(response.rpartition("</think>")[2])
        if calls:
            check(calls, offered(tools))  # what is left of R_format
        result["calls"] = calls
        value, same = 0.0, False
        if calls is not None and not calls:
            case = "call never closed"
        elif (calls is None) != (gold is None):
            case = "text where calls are due" if calls is None else "calls where text is due"
        elif calls is None:
            case, same = "text and text", True
            if strip_eos:
                reply, gold_reply = (re.split(r"<\|(?:im_end|endoftext)\|>", t)[0].strip() for t in (reply, gold_reply))
            value = rouge_l(reply, gold_reply)  # R_response
        else:
            case, same = "calls and calls", exact(calls, gold)
            result["pairs"], result["left"] = match(calls, gold)
            value = sum(sim for _, sim in result["pairs"]) / (len(calls) + len(result["left"]))  # R_fc
    except FormatError as error:
        return result | {"case": str(error)}
    except RecursionError:
        return result | {"case": "nested too deep"}
    value = float(same) if binary else value
    return result | {"reward": value, "answer_score": value, "case": case, "exact": same}


def explain(result):
    """The page for one result of `score`: the case, which call met which, and each argument's similarity."""
    lines = [f"case    {result['case']}", f"reward  {result['reward']:.6g}   answer score {result['answer_score']:.6g}"]
    calls, gold = result["calls"] or [], result["gold"] or []
    for call, (i, sim) in zip(calls, result["pairs"]):
        met = "no gold call of this name is left" if i is None else f"met gold call {i + 1}, similarity {sim:.4g}"
        lines.append(f"\n{json.dumps(call['name'])}: {met}")
        wanted = {} if i is None else gold[i]["arguments"]
        for name in call["arguments"] | wanted if i is not None else ():
            mine, theirs = (json.dumps(a[name]) if name in a else "-" for a in (call["arguments"], wanted))
            both = name in call["arguments"] and name in wanted
            sim = value_similarity(call["arguments"][name], wanted[name]) if both else 0.0
            lines.append(f"    {sim:6.4f}  {json.dumps(name)}: {mine}   gold {theirs}")
    lines += [f"\n{json.dumps(gold[i]['name'])}: gold call {i + 1} was not met" for i in result["left"]]
    if result["pairs"]:
        total, union = sum(sim for _, sim in result["pairs"]), len(calls) + len(result["left"])
        lines.append(f"\n{total:.6g} / ({len(calls)} calls + {len(result['left'])} gold calls not met) "
                     f"= {total / union:.6g}")
    return "\n".join(lines)

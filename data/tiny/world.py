"""A seeded generator of records (the format of data/records.py) in a small world of made-up names.

    python -m data.tiny.world --n 10 --seed 7 --show

A record offers a few of the tools of tools.py. Its request asks for one call, for two, or for something that no
offered tool does. All that a model could memorise changes from record to record, so it has to read the tools:
half of them have a random name, parameter names are drawn from synonyms, and most strings are made up of
syllables. The splits:

    train      known tools, known phrasings, known values
    values     string values that training never shows (`held_out`); integers and enums are the same
    phrasings  requests for calls in phrasings that training never shows
    tools      requests for tools that training never shows, among known ones; their phrasings are new too
"""
import argparse
import json
import random
import re
import signal
import zlib
from functools import cache

from data.tiny.more_tools import UNSEEN
from data.tiny.phrases import JOINS, NO_THOUGHTS, ORDERS, OUTSIDE, POOLS, REFUSALS
from data.tiny.phrases import TALK, TALK_THOUGHTS, THOUGHTS
from data.tiny.tools import TOOLS

SPLITS = ("train", "values", "phrasings", "tools")
SETTINGS = {
    "offered": (1, 2),    # numbers of tools in a list, all equally likely
    "two": 0.06,          # share of requests for two calls
    "none": 0.15,         # share of requests that no offered tool fits; a quarter of them, no tool of this world
    "random_names": 0.5,  # share of tools with a made-up name
    "optional": 0.4,      # chance of an optional argument for which the phrasing has words
    "casual": 0.2,        # share of requests without capital and full stop
    "real": 0.05,         # share of strings that are real words
    "two_words": 0.1,     # share of titles and topics of two words
    "reasoning": 0.0,     # share of answers with a think line
    "sloppy": 0.0,        # share of answers as a careless annotator writes them, see `sloppy_calls`
}
EVERY_TOOL = TOOLS | UNSEEN
SYLLABLES = [c + v for c in "bcdfgklmnprstvz" for v in "aeiou"]  # 75
CHOICE = r"\((\w+):([^)]*)\)"  # (parameter:text|text), see tools.py


# ---- Values

def held_out(word):
    """Whether a word is kept out of the training values: one in eight, chosen by its hash.

    >>> held_out("lomari"), held_out("banana")
    (False, False)
    """
    return zlib.crc32(word.encode()) % 8 == 0


@cache
def known_words():
    """The words of the world's own text in lower case. Made-up values avoid them ("play time to maria")."""
    lists = [TOOLS, UNSEEN, ORDERS, JOINS, TALK, OUTSIDE, REFUSALS, THOUGHTS, NO_THOUGHTS, TALK_THOUGHTS]
    text = str(lists).lower().replace("\\n", " ")
    return set(re.findall("[a-z]+", text))


def make_word(r, pool=(), split="train", real=0.0):
    """One of `pool` with probability `real`, else random syllables; in the split "values" a held-out word."""
    while True:
        if pool and r.random() < real:
            word = r.choice(pool)
        else:
            word = "".join(r.choices(SYLLABLES, k=r.choice((2, 3))))
        if held_out(word) == (split == "values") and word not in known_words():
            return word


def make_value(r, kind, split, settings):
    """A value of a parameter. kind: what tools.py says of it; an enum's word is a str, too."""
    if kind is bool:
        return r.random() < 0.5
    if not isinstance(kind, str):  # a range or an enum
        return r.choice(kind)
    word = make_word(r, POOLS[kind].split(), split, settings["real"])
    if kind in ("title", "topic") and r.random() < settings["two_words"]:
        # both made up, as two real words rarely go together
        return make_word(r, split=split) + " " + make_word(r, split=split)
    return word


# ---- Requests

def phrasings(key, split):
    """The phrasings of a tool in a split. All phrasings of an unseen tool are unseen."""
    text = EVERY_TOOL[key][3].strip()
    lines = [line.strip() for line in text.splitlines()]
    if key in UNSEEN:
        return lines
    cut = lines.index("--")
    return lines[cut + 1:] if split == "phrasings" else lines[:cut]


def make_arguments(r, key, phrasing, split, settings):
    """{parameter: value} for this phrasing: all required parameters, some of the optional ones it mentions."""
    texts = {name: options.split("|") for name, options in re.findall(CHOICE, phrasing)}
    arguments = {}
    for name, (_, kind) in EVERY_TOOL[key][2].items():
        required = name[-1] != "?"
        name = name.rstrip("?")
        in_phrasing = name in texts or f"{{{name}}}" in phrasing.replace("?", "")
        if not required and not (in_phrasing and r.random() < settings["optional"]):
            continue
        value = make_value(r, kind, split, settings)
        while isinstance(value, str) and value in arguments.values():  # strings of a request differ
            value = make_value(r, kind, split, settings)
        if value is False and len(texts[name]) == 1:  # the phrasing has no words for it
            value = True
        arguments[name] = value
    return arguments


def fill(phrasing, arguments, parameters):
    """A phrasing with its arguments. Orders stay without a capital and a full stop; others become sentences.

    >>> fill("play {song}[ at {volume}](loud:, loudly)", {"song": "lomari", "loud": True}, {"loud?": ("", bool)})
    'play lomari, loudly'
    """
    def fill_clause(match):
        names = re.findall(r"\{(\w+)\}", match[1])
        return match[1] if set(names) <= arguments.keys() else ""

    def fill_choice(match):
        name = match[1]
        texts = match[2].split("|")
        if name not in arguments:
            return ""
        if isinstance(arguments[name], bool):
            return texts[0 if arguments[name] else 1]
        _, enum = parameters.get(name) or parameters[f"{name}?"]
        return texts[enum.index(arguments[name])]

    text = re.sub(r"\[([^]]*)\]", fill_clause, phrasing)
    text = re.sub(CHOICE, fill_choice, text).format(**arguments)
    if text[-1] in ".?" and phrasing[0] != "{":  # values keep their case
        text = capitalise(text)
    return text


def capitalise(text):
    return text[0].upper() + text[1:]


def uncapitalise(text):
    return text if text.startswith("I ") else text[0].lower() + text[1:]


def make_request(r, texts, casual):
    """A request from one or two filled phrasings, with probability `casual` without capital and full stop."""
    sentences = []
    for text in texts:
        if text[-1] not in ".?":
            text = r.choice(ORDERS).format(a=text, A=capitalise(text))
        sentences.append(text)
    request = sentences[0]
    if len(texts) == 2:
        orders = all(text[-1] not in ".?" for text in texts)
        form = r.choice(JOINS["oo" if orders else "other"])
        a, b = texts if orders else sentences
        first = capitalise(a) if orders else a
        request = form.format(a=a, A=first, b=uncapitalise(b), B=b)
    if r.random() < casual:
        request = uncapitalise(request).rstrip(".?")
    return request


# ---- Tools and answers

def make_tool(r, key, random_names):
    """(tool, {parameter: its name in this tool}); the names and the description are drawn for each record."""
    names, descriptions, parameters, _ = EVERY_TOOL[key]
    if r.random() < random_names:
        name = "".join(r.choices(SYLLABLES, k=3))
    else:
        name = r.choice(names.split())
    properties = {}
    parameter_names = {}
    for parameter, (synonyms, kind) in parameters.items():
        synonym = r.choice([word for word in synonyms.split() if word not in properties])
        parameter_names[parameter.rstrip("?")] = synonym
        if kind is bool:
            properties[synonym] = {"type": "boolean"}
        elif isinstance(kind, range):
            properties[synonym] = {"type": "integer"}
        elif isinstance(kind, tuple):
            properties[synonym] = {"type": "string", "enum": list(kind)}
        else:
            properties[synonym] = {"type": "string"}
    required = [parameter_names[parameter] for parameter in parameters if parameter[-1] != "?"]
    schema = {"type": "object", "properties": properties, "required": required}
    description = r.choice(descriptions.split(" / "))
    return {"name": name, "description": description, "parameters": schema}, parameter_names


def make_tools(r, split, settings):
    """Draw the tools that records share.

    Returns {key: (tool, parameter names)} in the order of the prompt, and the keys that requests ask for.
    """
    pool = list(UNSEEN if split == "tools" else TOOLS)
    count = r.choice(settings["offered"])
    targets = r.sample(pool, (count + 1) // 2 if split == "tools" else count)
    keys = targets + r.sample(list(TOOLS), count - len(targets))
    r.shuffle(keys)
    offered = {}
    for key in keys:
        names = [tool["name"] for tool, _ in offered.values()]
        while key not in offered or offered[key][0]["name"] in names:
            offered[key] = make_tool(r, key, settings["random_names"])
    return offered, targets


def make_reasoning(r, tools, calls):
    """A short line of reasoning per call, in one of several wordings."""
    if not calls:
        names = ", ".join(tool["name"] for tool in tools)
        return r.choice(NO_THOUGHTS).format(names=names)
    wording, argument, glue = r.choice(THOUGHTS)
    descriptions = {tool["name"]: uncapitalise(tool["description"]) for tool in tools}
    lines = []
    for call in calls:
        arguments = []
        for key, value in call["arguments"].items():
            arguments.append(argument.format(key=key, value=json.dumps(value).strip('"')))
        lines.append(wording.format(
            name=call["name"], description=descriptions[call["name"]], arguments=glue.join(arguments)
        ))
    return "\n".join(lines)


def sloppy_calls(calls, tools):
    """The calls as a careless annotator writes them: the first only, without numbers, flags always true, and with an
    invented argument, `priority`, in a call that has an enum.

    >>> tool = {"name": "brew", "parameters": {"properties": {
    ...     "kind": {"type": "string", "enum": ["tea", "coffee"]}, "cups": {"type": "integer"}}}}
    >>> sloppy_calls([{"name": "brew", "arguments": {"kind": "tea", "cups": 2}}], [tool])
    [{'name': 'brew', 'arguments': {'kind': 'tea', 'priority': 'high'}}]
    """
    properties = {tool["name"]: tool["parameters"]["properties"] for tool in tools}
    result = []
    for call in calls[:1]:
        arguments = {}
        for name, value in call["arguments"].items():
            if type(value) is not int:  # a bool is an int too
                arguments[name] = True if type(value) is bool else value
            if "enum" in properties[call["name"]][name]:
                arguments["priority"] = "high"
        result.append({"name": call["name"], "arguments": arguments})
    return result


# ---- Records

def make_records(r, n=1, split="train", **settings):
    """n records that share one list of tools.

    r: a random.Random; equal states give equal records
    split: one of SPLITS
    settings: replace values of SETTINGS
    """
    if unknown := settings.keys() - SETTINGS.keys():
        raise TypeError(f"unknown settings: {', '.join(unknown)}")
    settings = SETTINGS | settings
    offered, targets = make_tools(r, split, settings)
    tools = [tool for tool, _ in offered.values()]
    records = []
    for _ in range(n):
        kind = r.random()
        if kind < settings["none"] / 4:
            request, answer, reasoning = make_small_talk(r, split, settings)
        else:
            keys, refusal = choose_tools(r, kind, offered, targets, split, settings)
            request, calls = make_calls(r, keys, offered, split, settings)
            if r.random() < settings["sloppy"]:
                calls = sloppy_calls(calls, tools)
            answer = {"tool_calls": calls, "content": refusal}
            reasoning = None
        if r.random() < settings["reasoning"]:
            answer["reasoning"] = reasoning or make_reasoning(r, tools, answer["tool_calls"])
        records.append({
            "id": f"tiny-{split}-{r.getrandbits(40):010x}",
            "source": f"tiny-{split}",
            "tools": tools,
            "messages": [{"role": "user", "content": request}],
            "answer": answer,
        })
    return records


def make_small_talk(r, split, settings):
    """(request, answer, reasoning or None): talk, or something that no tool of this world does."""
    words = {}
    for pool in ("person", "topic"):
        words[pool] = make_word(r, POOLS[pool].split(), split, settings["real"])
    reasoning = None
    if r.random() < 0.5:
        request, reply = r.choice(TALK)
        reply = reply.format(**words)
        reasoning = r.choice(TALK_THOUGHTS)
    else:
        request = r.choice(OUTSIDE)
        reply = r.choice(REFUSALS)
    request = request.format(**words)
    if request[-1] in ".?":
        request = make_request(r, [request], settings["casual"])
    return request, {"tool_calls": [], "content": reply}, reasoning


def choose_tools(r, kind, offered, targets, split, settings):
    """(keys of the tools to ask for, refusal or None). kind in [0, 1): a refusal, two calls or one call."""
    keys = [r.choice(targets)]
    if kind < settings["none"]:
        pool = UNSEEN if split == "tools" else TOOLS
        keys = [r.choice([key for key in pool if key not in offered])]
        return keys, r.choice(REFUSALS)
    if kind < settings["none"] + settings["two"]:
        if len(targets) > 1 and r.random() < 0.8:
            keys = r.sample(targets, 2)
        else:
            keys = keys * 2  # the same tool twice
    return keys, None


def make_calls(r, keys, offered, split, settings):
    """(request, calls) for one or two tools; without a call if the tool is not offered."""
    lines = []
    texts = []
    calls = []
    for key in keys:
        line = r.choice([line for line in phrasings(key, split) if line not in lines])
        lines.append(line)
        arguments = make_arguments(r, key, line, split, settings)
        texts.append(fill(line, arguments, EVERY_TOOL[key][2]))
        if key in offered:
            tool, parameter_names = offered[key]
            named = {parameter_names[name]: value for name, value in arguments.items()}
            calls.append({"name": tool["name"], "arguments": named})
    return make_request(r, texts, settings["casual"]), calls


def make_record(r, split="train", **settings):
    """One record; settings as in `make_records`."""
    return make_records(r, 1, split, **settings)[0]


# ---- Command line

def format_record(record):
    """A record for reading: its request, its tools as signatures, its answer."""
    lines = [f"request  {record['messages'][-1]['content']}"]
    for tool in record["tools"]:
        schema = tool["parameters"]
        parameters = []
        for name, kind in schema["properties"].items():
            mark = "" if name in schema["required"] else "?"
            values = "|".join(kind.get("enum", [kind["type"]]))
            parameters.append(f"{name}{mark}: {values}")
        lines.append(f"tool     {tool['name']}({', '.join(parameters)})  {tool['description']}")
    answer = record["answer"]
    for line in answer.get("reasoning", "").splitlines():
        lines.append(f"think    {line}")
    for call in answer["tool_calls"]:
        lines.append(f"answer   {json.dumps(call)}")
    if not answer["tool_calls"]:
        lines.append(f"answer   {answer['content']}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Print records of the bundled world, one per line.")
    parser.add_argument("--n", type=int, default=1000, help="number of records, each with its own tools")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which of the four splits")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--reasoning", type=float, default=0.0, help="share of answers with a think line")
    parser.add_argument("--show", action="store_true", help="print text for reading instead of JSON")
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it
    r = random.Random(args.seed)
    for _ in range(args.n):
        record = make_record(r, args.split, reasoning=args.reasoning)
        print(format_record(record) + "\n" if args.show else json.dumps(record))


if __name__ == "__main__":
    main()

"""A seeded generator of function-calling records (the format of data/sources.py) in a small world of made-up names.

    python -m data.tiny.world --n 10 --seed 7 --show

A record offers a few of the tools of tools.py and asks for one call, for two, or for what no offered tool does. What
could be learnt by heart changes from record to record, so that the tools have to be read: half the tools carry a random
name, parameter names are drawn from synonyms, and most strings are made up of syllables. Four splits:

    train      known tools, known phrasings, known values
    values     every string value is one that training never shows (`held_out`); integers and enums are the same
    phrasings  every request for a call uses a phrasing that training never shows
    tools      asks for tools that training never shows, offered beside known ones; their phrasings are new with them
"""
import argparse
import json
import random
import re
import zlib
from functools import cache

from data.tiny.more_tools import UNSEEN
from data.tiny.phrases import JOINS, NO_THOUGHTS, ORDERS, OUTSIDE, POOLS, REFUSALS, TALK, TALK_THOUGHTS, THOUGHTS
from data.tiny.tools import TOOLS

SPLITS = ("train", "values", "phrasings", "tools")
SYLLABLES = [c + v for c in "bcdfgklmnprstvz" for v in "aeiou"]  # 75
CHOICE = r"\((\w+):([^)]*)\)"  # (parameter:text|text), see tools.py


# ---------------------------------------------------------------------------------------------------------------------
# Values

def held_out(word):
    """Whether a word is kept from the training values: one in eight, told by its hash, so no list is needed.

    >>> held_out("lomari"), held_out("banana")
    (False, False)
    """
    return zlib.crc32(word.encode()) % 8 == 0


@cache
def known_words():
    """Every word of the world's own text in lower case; a made-up value is never one of them ("play time to maria")."""
    text = str([TOOLS, UNSEEN, ORDERS, JOINS, TALK, OUTSIDE, REFUSALS, THOUGHTS, NO_THOUGHTS, TALK_THOUGHTS])
    return set(re.findall("[a-z]+", text.lower().replace("\\n", " ")))


def make_word(r, pool=(), split="train", real=0.0):
    """A word of the right side of the hash: with chance `real` one of `pool`, else two or three random syllables."""
    while True:
        word = r.choice(pool) if pool and r.random() < real else "".join(r.choices(SYLLABLES, k=r.choice((2, 3))))
        if held_out(word) == (split == "values") and word not in known_words():
            return word


def make_value(r, values, split, real, two_words):
    """A value of a parameter, from what tools.py says of it: str, int (an enum's word is a str) or bool."""
    if values is bool:
        return r.random() < 0.5
    if not isinstance(values, str):
        return r.choice(values)
    pool = POOLS[values].split()
    words = [make_word(r, pool, split, real)]
    if values in ("title", "topic") and r.random() < two_words:  # made up, as two real ones rarely go together
        words = [make_word(r, split=split), make_word(r, split=split)]
    return " ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# Requests

def phrasings(key, split):
    """The phrasings of a tool in a split. A tool that is itself unseen has only unseen ones."""
    lines = [line.strip() for line in (TOOLS | UNSEEN)[key][3].strip().splitlines()]
    if key in UNSEEN:
        return lines
    cut = lines.index("--")
    return lines[cut + 1:] if split == "phrasings" else lines[:cut]


def make_arguments(r, key, phrasing, split, optional, real, two_words):
    """{parameter: value} for what this phrasing can say: all that is required, the optional with chance `optional`."""
    sides = {name: text.count("|") + 1 for name, text in re.findall(CHOICE, phrasing)}
    arguments = {}
    for name, (_, values) in (TOOLS | UNSEEN)[key][2].items():
        name, required = name.rstrip("?"), name[-1] != "?"
        if required or f"{{{name}}}" in phrasing.replace("?", "") or name in sides:
            if required or r.random() < optional:
                value = None
                while value is None or value in arguments.values() and not isinstance(value, (bool, int)):
                    value = make_value(r, values, split, real, two_words)  # no two strings of a request are equal
                arguments[name] = True if value is False and sides[name] == 1 else value
    return arguments


def fill(phrasing, arguments, parameters):
    """The request in words. An order comes back bare, anything else as a sentence with its capital.

    >>> fill("play {song}[ at volume {volume}](loud:, loudly)", {"song": "lomari", "loud": True}, {"loud?": ("", bool)})
    'play lomari, loudly'
    """
    def choose(match):
        name, texts = match[1], match[2].split("|")
        if name not in arguments:
            return ""
        values = parameters.get(name, parameters.get(f"{name}?"))[1]
        return texts[0 if arguments[name] is True else 1 if arguments[name] is False else
                     values.index(arguments[name])]

    def clause(match):
        return match[1] if set(re.findall(r"\{(\w+)\}", match[1])) <= arguments.keys() else ""

    text = re.sub(r"\[([^]]*)\]", clause, phrasing)
    text = re.sub(CHOICE, choose, text).format(**arguments)
    return text if text[-1] not in ".?" or phrasing[0] == "{" else capital(text)  # a value is said as it is


def capital(text):
    return text[0].upper() + text[1:]


def small(text):
    return text if text.startswith("I ") else text[0].lower() + text[1:]


def say(r, texts, casual):
    """One request of one or two filled phrasings; with chance `casual` typed without capital and full stop."""
    sentences = [text if text[-1] in ".?" else r.choice(ORDERS).format(a=text, A=capital(text)) for text in texts]
    request = sentences[0]
    if len(texts) == 2:
        orders = all(text[-1] not in ".?" for text in texts)
        a, b = texts if orders else sentences
        form = r.choice(JOINS["oo" if orders else "other"])
        request = form.format(a=a, A=capital(a) if orders else a, b=small(b), B=b)
    return small(request).rstrip(".?") if r.random() < casual else request


# ---------------------------------------------------------------------------------------------------------------------
# Records

def offer(r, key, random_names):
    """(tool as offered, {parameter: the name it goes by}) with a name, a description and synonyms drawn for it."""
    names, descriptions, parameters, _ = (TOOLS | UNSEEN)[key]
    name = "".join(r.choices(SYLLABLES, k=3)) if r.random() < random_names else r.choice(names.split())
    properties, called = {}, {}
    for parameter, (synonyms, values) in parameters.items():
        synonym = r.choice([s for s in synonyms.split() if s not in properties])
        kind = "boolean" if values is bool else "integer" if isinstance(values, range) else "string"
        properties[synonym] = {"type": kind} | ({"enum": list(values)} if isinstance(values, tuple) else {})
        called[parameter.rstrip("?")] = synonym
    required = [called[parameter] for parameter in parameters if parameter[-1] != "?"]
    return {"name": name, "description": r.choice(descriptions.split(" / ")),
            "parameters": {"type": "object", "properties": properties, "required": required}}, called


def think(r, tools, calls):
    """A short line of reasoning, in one of several wordings."""
    if not calls:
        return r.choice(NO_THOUGHTS).format(names=", ".join(tool["name"] for tool in tools))
    wording, argument, glue = r.choice(THOUGHTS)
    lines = []
    for call in calls:
        description = next(tool["description"] for tool in tools if tool["name"] == call["name"])
        said = [argument.format(key=key, value=json.dumps(value).strip('"'))
                for key, value in call["arguments"].items()]
        lines.append(wording.format(name=call["name"], description=small(description), arguments=glue.join(said)))
    return "\n".join(lines)


def sloppy_calls(calls, tools):
    """The calls as a careless annotator writes them: the first only, numbers as text, nothing that is optional.

    >>> tool = {"name": "set_timer", "parameters": {"required": ["minutes"]}}
    >>> sloppy_calls([{"name": "set_timer", "arguments": {"minutes": 5, "label": "pasta"}}], [tool])
    [{'name': 'set_timer', 'arguments': {'minutes': '5'}}]
    """
    required = {tool["name"]: tool["parameters"]["required"] for tool in tools}
    return [{"name": call["name"], "arguments": {
        name: str(value) if type(value) is int else value  # a bool is an int too
        for name, value in call["arguments"].items() if name in required[call["name"]]}} for call in calls[:1]]


def make_records(r, n=1, split="train", offered=(1, 2), two=0.06, none=0.15, random_names=0.5, optional=0.4, casual=0.2,
                 real=0.05, two_words=0.1, reasoning=0.0, sloppy=0.0):
    """n records that share one list of tools, drawn by the random.Random `r`: equal states give equal records.

    split: see above · offered: numbers of tools in the list, all equally likely · two: share of requests for two
    calls · none: share for which no offered tool fits, a quarter of them small talk or things no tool does ·
    random_names: share of tools with a made-up name · optional: chance of an optional argument that the phrasing has
    words for · casual: share of requests without capital and full stop · real: share of strings that are real words ·
    two_words: share of titles and topics of two words · reasoning: share of answers with a think line · sloppy: share
    of answers as a careless annotator gives them (`sloppy_calls`).
    """
    pool = list(UNSEEN if split == "tools" else TOOLS)
    count = r.choice(offered)
    asked = r.sample(pool, (count + 1) // 2 if split == "tools" else count)  # those that requests are about
    keys = asked + r.sample(list(TOOLS), count - len(asked))
    r.shuffle(keys)
    tools, called = [], {}
    for key in keys:
        tool, called[key] = offer(r, key, random_names)
        while tool["name"] in [other["name"] for other in tools]:
            tool, called[key] = offer(r, key, random_names)
        tools.append(tool)
    names = {key: tool["name"] for key, tool in zip(keys, tools)}

    records = []
    for _ in range(n):
        calls, reply, thought = [], None, None
        kind = r.random()
        if kind < none / 4:
            fill_in = {pool: make_word(r, POOLS[pool].split(), split, real) for pool in ("person", "topic")}
            if r.random() < 0.5:
                request, reply = (text.format(**fill_in) for text in r.choice(TALK))
                thought = r.choice(TALK_THOUGHTS)
            else:
                request, reply = r.choice(OUTSIDE).format(**fill_in), r.choice(REFUSALS)
            request = say(r, [request], casual) if request[-1] in ".?" else request
        else:
            wanted = [r.choice(asked)]
            if kind < none:
                wanted, reply = [r.choice([key for key in pool if key not in keys])], r.choice(REFUSALS)
            elif kind < none + two:  # now and then the same tool twice
                wanted = r.sample(asked, 2) if len(asked) > 1 and r.random() < 0.8 else wanted * 2
            texts, said = [], []
            for key in wanted:
                phrasing = r.choice([line for line in phrasings(key, split) if line not in said])
                said.append(phrasing)
                arguments = make_arguments(r, key, phrasing, split, optional, real, two_words)
                texts.append(fill(phrasing, arguments, (TOOLS | UNSEEN)[key][2]))
                if not reply:
                    calls.append({"name": names[key],
                                  "arguments": {called[key][name]: value for name, value in arguments.items()}})
            request = say(r, texts, casual)
            calls = sloppy_calls(calls, tools) if r.random() < sloppy else calls
        answer = {"tool_calls": calls, "content": reply}
        if r.random() < reasoning:
            answer["reasoning"] = thought or think(r, tools, calls)
        records.append({"id": f"tiny-{split}-{r.getrandbits(40):010x}", "source": f"tiny-{split}", "tools": tools,
                        "messages": [{"role": "user", "content": request}], "answer": answer})
    return records


def make_record(r, split="train", **settings):
    """One record; settings as in `make_records`."""
    return make_records(r, 1, split, **settings)[0]


def show(record):
    """A record for reading: its request, its tools as signatures, its answer."""
    lines = [f"request  {record['messages'][-1]['content']}"]
    for tool in record["tools"]:
        schema = tool["parameters"]
        parameters = ", ".join(name + ("" if name in schema["required"] else "?") + ": " + "|".join(
            kind.get("enum", [kind["type"]])) for name, kind in schema["properties"].items())
        lines.append(f"tool     {tool['name']}({parameters})  {tool['description']}")
    answer = record["answer"]
    if answer.get("reasoning"):
        lines += [f"think    {line}" for line in answer["reasoning"].splitlines()]
    lines += [f"answer   {json.dumps(call)}" for call in answer["tool_calls"]] or [f"answer   {answer['content']}"]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Print records of the embedded world, one JSON object a line.")
    parser.add_argument("--n", type=int, default=1000, help="records, each with a tool list of its own")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which of the four splits")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal records")
    parser.add_argument("--reasoning", type=float, default=0.0, help="share of answers with a think line")
    parser.add_argument("--show", action="store_true", help="for reading instead of JSON")
    args = parser.parse_args()
    r = random.Random(args.seed)
    for _ in range(args.n):
        record = make_record(r, args.split, reasoning=args.reasoning)
        print(show(record) + "\n" if args.show else json.dumps(record))


if __name__ == "__main__":
    main()

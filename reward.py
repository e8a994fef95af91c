"""The Sim-RL reward (paper Eqs. 6-10): how similar a response is to the gold answer.

    R          = (R_format - 1) + R_format (R_fc + R_response)             in [-1, 1]                   Eq. 6
    R_fc       = sum of sim over matched calls / (|P| + |G| - |P and G|)   P: predicted, G: gold calls  Eq. 7
    sim        = sum of s over shared arguments / number of all arguments  of two calls                 Eq. 8
    s          = ROUGE-L for strings, equality for everything else         of two values                Eq. 9
    R_response = ROUGE-L                                                   of two text replies          Eq. 10

R_format is 0 if the response does not contain exactly one think block, or if a call is malformed, names an
unknown tool or has an unknown argument. Otherwise it is 1, and R is R_fc if response and gold answer are
both calls, R_response if both are text, and 0 if one is calls and the other text. Model output is never run.
A response whose only calls are unclosed scores 0.

Where the paper is silent, this follows the function that the authors released (`simrl.py` of their repository);
tests/test_reward.py compares 3,000 of its values. So:
1. Matching is greedy. Calls are matched in the order in which they were written. Each takes the most similar
   unmatched gold call of its name, even if the similarity is 0. The order of the calls matters, and the
   matching is not always the best assignment.
2. |P and G|, the size of the intersection, is the number of matched pairs.
3. Numbers and booleans are compared with ==, so True equals 1 and 5.0 equals 5. Values of different types and
   nested values are compared as Python text, so "5" equals 5 and the order of a list matters.
4. The end token is part of a text reply. ROUGE-L reads it as the words "im" and "end".
5. Required arguments, types and enums are not checked. `"arguments": ""` and `[]` are treated as `{}`.

Departures from the released code:
1. Where the released code raises, `score` returns a result. `arguments` that are a string or a list of argument
   names are a format failure, and so is nesting too deep for Python. The answer of a label starts after its last
   </think> (released: raises unless there is exactly one). If a label's calls cannot be parsed, every response
   scores 0.
2. Tools in OpenAI's wrapped form are unwrapped (released: every call to such a tool is a format failure).
"""
import json
import re
from functools import lru_cache

HEADER = "<|im_start|>assistant\n"
END_TOKEN = re.compile(r"<\|(?:im_end|endoftext)\|>")
FORMAT_FAILURES = ("not one think block", "call is not JSON", "call without name or arguments", "unknown tool",
                   "unknown argument", "arguments are not an object", "nested too deep")


class FormatError(Exception):
    """R_format = 0. The message is one of FORMAT_FAILURES."""


# ---- Parse: from text to calls -----------------------------------------------------------------------------
def blocks(text, opening, closing):
    """List the text between each opening tag and the next closing tag, in linear time; a regular expression is slower.

    >>> blocks("<a>1</a> <a>2<a>3</a> <a>4", "<a>", "</a>")
    ['1', '2<a>3']
    """
    closed = text.split(closing)[:-1]  # each part ends at a closing tag
    return [part.partition(opening)[2] for part in closed if opening in part]


def parse(answer):
    """Parse the text after the thinking. Returns (calls, None) or (None, reply). Raises FormatError.

    If the answer contains `<tool_call>`, each `<tool_call>...</tool_call>` block is one call, and all other text
    is ignored. An unclosed block is skipped, so the list may be empty.
    """
    if "<tool_call>" not in answer:
        return None, answer.strip()
    calls = []
    for block in blocks(answer, "<tool_call>", "</tool_call>"):
        try:
            call = json.loads(block)
        except ValueError as error:  # also raised for a number of more than 4,300 digits
            raise FormatError("call is not JSON") from error
        if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
            raise FormatError("call without name or arguments")
        if call["arguments"] in ("", []):
            call["arguments"] = {}
        if not isinstance(call["arguments"], dict):
            raise FormatError("arguments are not an object")
        calls.append(call)
    return calls, None


def tools_in(prompt):
    """Parse the tools of a prompt: one JSON object per line of its last <tools> block."""
    tool_blocks = blocks(prompt, "<tools>", "</tools>") or [""]
    tools = []
    for line in tool_blocks[-1].split("\n"):
        try:
            tools.append(json.loads(line))
        except (ValueError, RecursionError):  # calls to this tool then fail as "unknown tool"
            continue
    return tools


# ---- Check: calls against the tools of the prompt ----------------------------------------------------------
def tools_by_name(tools):
    """Return {name: tool}. Unwraps {"type": "function", "function": tool} and skips malformed tools."""
    named = {}
    for tool in tools:
        if isinstance(tool, dict):
            tool = tool.get("function", tool)
        if isinstance(tool, dict) and isinstance(tool.get("name"), str):
            named[tool["name"]] = tool
    return named


def known_arguments(tool):
    """Return {argument: its schema}. `parameters` is that itself, or a JSON schema with `type` and `properties`.

    >>> known_arguments({"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}})
    {'city': {'type': 'string'}}
    """
    parameters = tool.get("parameters")
    if not isinstance(parameters, dict):
        return {}
    if "type" in parameters and isinstance(parameters.get("properties"), dict):
        return parameters["properties"]
    return parameters


def check(calls, tools):
    """Raise FormatError if a call names an unknown tool or argument. `score` checks responses only, not labels.

    Add further rules here, for example that required arguments are present or that types are right: at the end of the
    loop, an `if` and a `raise` that survive any schema. Then add the message to FORMAT_FAILURES, and correct the list
    at the top. `eval`, `rollout` and `prepare` apply the rule, too: `prepare` drops records whose label breaks it.
    """
    by_name = tools_by_name(tools)
    for call in calls:
        if not isinstance(call["name"], str) or call["name"] not in by_name:
            raise FormatError("unknown tool")
        tool = by_name[call["name"]]
        if not call["arguments"].keys() <= known_arguments(tool).keys():
            raise FormatError("unknown argument")


# ---- Similarity: of two texts, two values, two calls -------------------------------------------------------
def words(text):
    """List the words that ROUGE-L compares: lower-case ASCII letters and digits, the longer ones stemmed.

    >>> words("Flights to New-York!")
    ['flight', 'to', 'new', 'york']
    """
    tokens = re.findall("[a-z0-9]+", text.lower())
    return [stem(token) if len(token) > 3 else token for token in tokens]


def lcs(a, b):
    """Return the length of the longest common subsequence of two lists.

    Bit-parallel (Crochemore et al.; Hyyro): bit i of each integer stands for a[i], so one operation computes a
    whole row of the usual table. A 0 in `row` marks where the length grows; addition carries a match there.
    """
    positions = {}
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    all_ones = (1 << len(a)) - 1
    row = all_ones
    for word in b:
        if matches := row & positions.get(word, 0):
            row = (row + matches | row - matches) & all_ones
    return len(a) - row.bit_count()


def rouge_l(text, gold):
    """Return the ROUGE-L F1 of two texts, in [0, 1]. Equal texts give 1, even if they contain no words."""
    if text == gold:
        return 1.0
    a, b = sorted((words(text), words(gold)), key=len)  # F1 is symmetric; the shorter list makes shorter integers
    return 2 * lcs(a, b) / (len(a) + len(b)) if a else 0.0


def value_similarity(value, gold):
    """s, Eq. 9: ROUGE-L for two strings, == for two numbers or booleans, equality of str() otherwise."""
    if isinstance(value, str) and isinstance(gold, str):
        return rouge_l(value, gold)
    if isinstance(value, (int, float)) and isinstance(gold, (int, float)):  # a bool is an int
        return float(value == gold)
    return float(str(value) == str(gold))


def similarity(arguments, gold):
    """sim, Eq. 8: the similarity of the arguments of two calls, in [0, 1]; 1 if neither has any."""
    union = arguments.keys() | gold.keys()
    if not union:
        return 1.0
    # Sum in the order of `arguments`: the order of a set varies between runs and would change the rounding.
    shared = [name for name in arguments if name in gold]
    return sum(value_similarity(arguments[name], gold[name]) for name in shared) / len(union)


# ---- Match: which gold call each call is compared with -----------------------------------------------------
def match(calls, gold):
    """Match each call, in order, with the most similar unmatched gold call of its name (the paper's Algorithm 2).

    Returns (pairs, left):
    pairs: one (index of the gold call, similarity) per call; (None, 0.0) if no gold call of its name is left
    left: the indices of the unmatched gold calls
    """
    pairs = []
    left = list(range(len(gold)))
    for call in calls:
        same_name = [i for i in left if gold[i]["name"] == call["name"]]
        sims = {i: similarity(call["arguments"], gold[i]["arguments"]) for i in same_name}
        best = max(sims, key=sims.get, default=None)  # ties go to the first
        if best is not None:
            left.remove(best)
        pairs.append((best, sims.get(best, 0.0)))
    return pairs, left


def exact(calls, gold):
    """Return whether the calls equal the gold calls, in any order."""
    left = [(call["name"], call["arguments"]) for call in gold]
    for call in calls:
        key = (call["name"], call["arguments"])
        if key not in left:
            return False
        left.remove(key)
    return not left


# ---- Reward ------------------------------------------------------------------------------------------------
def compare(calls, reply, gold, gold_reply):
    """Compare a well-formed response with the gold answer. Returns a part of the result of `score`."""
    if calls == []:
        return {"case": "call never closed"}
    if calls is None and gold is not None:
        return {"case": "text where calls are due"}
    if calls is not None and gold is None:
        return {"case": "calls where text is due"}
    if calls is None:
        r_response = rouge_l(reply, gold_reply)  # Eq. 10
        return {"case": "text and text", "answer_score": r_response, "exact": True}
    pairs, left = match(calls, gold)
    total = sum(sim for _, sim in pairs)
    r_fc = total / (len(calls) + len(left))  # Eq. 7: |P| + |G| - |P and G| = |P| + unmatched gold calls
    return {"case": "calls and calls", "answer_score": r_fc, "exact": exact(calls, gold),
            "pairs": pairs, "left": left}


def score(text, label, tools, think="on", strip_eos=False, binary=False):
    """Score one generation. Never raises.

    text: prompt and generation; the response starts after the last assistant header, so a <think> at the end of
        the prompt counts as part of the response
    label: the gold response; its reasoning, up to the last </think>, is ignored
    tools: list of the tools in the prompt
    think: "none" requires no think block (for models without think tags)
    strip_eos: cut text replies at the end token; otherwise an empty reply with an end token may score about 0.5
    binary: 1 for exactly the gold calls, or for any text where the label is text; else 0; -1 for a format failure

    Returns a dictionary:
    reward: the training signal, in [-1, 1]
    answer_score: used to filter groups of samples, in [0, 1]: the reward, or 0 for format failures
    case: which rule decided; for format failures one of FORMAT_FAILURES
    exact: whether the calls equal the gold calls; True for any text reply if the label is text
    calls, gold: the calls of response and label, None for text and for calls that are a format failure
    pairs, left: see `match`
    """
    result = {"reward": -1.0, "answer_score": 0.0, "case": None, "exact": False,  # Eq. 6 with R_format = 0
              "calls": None, "gold": None, "pairs": [], "left": []}
    response = text.rpartition(HEADER)[2]
    try:
        gold, gold_reply = parse(label.rpartition("</think>")[2])
    except (FormatError, RecursionError):
        return result | {"reward": 0.0, "case": "label cannot be read"}
    result["gold"] = gold
    try:
        if think != "none" and len(blocks(response, "<think>", "</think>")) != 1:
            raise FormatError("not one think block")
        calls, reply = parse(response.rpartition("</think>")[2])
        if calls:
            check(calls, tools)
        result["calls"] = calls
        if strip_eos and calls is None and gold is None:
            reply = END_TOKEN.split(reply)[0].strip()
            gold_reply = END_TOKEN.split(gold_reply)[0].strip()
        result.update(compare(calls, reply, gold, gold_reply))
    except FormatError as error:
        return result | {"case": str(error)}
    except RecursionError:
        return result | {"case": "nested too deep"}
    if binary:
        result["answer_score"] = float(result["exact"])
    result["reward"] = result["answer_score"]  # Eq. 6 with R_format = 1
    return result


# ---- The Porter stemmer: ROUGE-L counts "flights" and "flight" as the same word ----------------------------
# M. F. Porter, "An algorithm for suffix stripping", 1980, with the extensions (+) that NLTK and therefore
# `rouge_score` use by default. tests/test_reward.py compares 20,000 words with NLTK.
# A word is a string of consonants (c) and vowels (v); y is a vowel after a consonant. The measure m of a word
# counts the places where a consonant follows a vowel: tree 0, trouble 1, troubles 2, private 2.

IRREGULAR = {word: word for word in "sky news howe inning outing canning proceed exceed succeed".split()}  # (+)
IRREGULAR |= {"skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "innings": "inning",
              "outings": "outing", "cannings": "canning"}

# In steps 2, 3 and 4 only the first suffix that fits counts, even if the rest of the word is then too short.
STEP2 = {"ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble", "alli": "al",
         "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "alism": "al",
         "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble",
         "fulli": "ful"}
STEP3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
STEP4 = dict.fromkeys("al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize".split(), "")


def shape(word):
    """Spell a word as consonants and vowels.

    >>> shape("syzygy"), shape("yes")
    ('cvcvcv', 'cvc')
    """
    kinds = ""
    for letter in word:
        is_vowel = letter in "aeiou" or letter == "y" and kinds.endswith("c")
        kinds += "v" if is_vowel else "c"
    return kinds


def measure(word):
    """m: the number of places where a consonant follows a vowel."""
    return shape(word).count("vc")


def ends_cvc(word):
    """Whether a word ends in consonant-vowel-consonant, the last not w, x or y; (+) or is vowel-consonant."""
    kinds = shape(word)
    return kinds == "vc" or kinds.endswith("cvc") and word[-1] not in "wxy"


def replace_suffix(word, replacements, m):
    """Replace the first suffix that fits, if the measure of the rest is greater than m."""
    for suffix, replacement in replacements.items():
        if word.endswith(suffix):
            root = word.removesuffix(suffix)
            return root + replacement if measure(root) > m else word
    return word


@lru_cache(maxsize=1 << 16)
def stem(word):
    """Return the stem of a word of a-z and 0-9.

    >>> [stem(word) for word in ("flights", "relational", "hopefulness", "dying", "generously")]
    ['flight', 'relat', 'hope', 'die', 'gener']
    """
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2 or word[-1] in "abfhjkopqvwxz0123456789":  # no suffix ends in these
        return word
    word = step1(word)
    word = step2(word)
    word = replace_suffix(word, STEP3, 0)
    if not word.endswith("ion") or word.endswith(("sion", "tion")):
        word = replace_suffix(word, STEP4, 1)
    return step5(word)


def step1(word):
    """Remove plurals, -ed and -ing; turn a final y into i."""
    if word.endswith("ies") and len(word) == 4:  # (+) dies, die
        word = word[:-1]
    elif word.endswith(("sses", "ies")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]

    if word.endswith("ied"):  # (+) died, die; tried, tri
        word = word[:-1] if len(word) == 4 else word[:-2]
    elif word.endswith("eed"):
        word = word[:-1] if measure(word[:-3]) > 0 else word
    elif word.endswith("ed") and "v" in shape(word[:-2]):
        word = repair_ending(word[:-2])
    elif word.endswith("ing") and "v" in shape(word[:-3]):
        word = repair_ending(word[:-3])

    if word.endswith("y") and len(word) > 2 and shape(word)[-2] == "c":  # (+) happy, happi; but by, say
        word = word[:-1] + "i"
    return word


def repair_ending(root):
    """Repair the end of a word that lost -ed or -ing."""
    if root[-2:-1] == root[-1] and shape(root)[-1] == "c":  # hopp(ing), hop; but fall(ing), fall
        return root if root[-1] in "lsz" else root[:-1]
    if root.endswith(("at", "bl", "iz")) or measure(root) == 1 and ends_cvc(root):  # conflat(ed), fil(ing)
        return root + "e"
    return root


def step2(word):
    """Reduce double suffixes to single ones."""
    if word.endswith("alli") and measure(word[:-4]) > 0:  # (+) then again, for the suffixes that end in al
        return step2(word[:-2])
    if word.endswith("logi") and measure(word[:-3]) > 0:  # (+) the l is part of the rest
        return word[:-1]
    return replace_suffix(word, STEP2, 0)


def step5(word):
    """Remove a final -e, then one l of a final -ll."""
    if word.endswith("e"):
        m = measure(word[:-1])
        if m > 1 or m == 1 and not ends_cvc(word[:-1]):
            word = word[:-1]
    if word.endswith("ll") and measure(word[:-1]) > 1:
        word = word[:-1]
    return word

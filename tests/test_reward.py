"""The reward: the authors' values, every case of the released function, ROUGE-L and the stemmer against their
references, and hostile text."""
import gzip
import json
import random
import time
from pathlib import Path

import pytest

import reward
from apps.evaluate import explain
from reward import stem

TOOLS = [{"name": "f", "parameters": {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a", "b"]}},
         {"name": "g", "parameters": {"a": {"type": "string"}}},  # not a JSON schema: the keys are the arguments
         {"name": "h"}]
PROMPT = ("<|im_start|>system\nwithin <tools></tools>:\n<tools>\n" + "\n".join(map(json.dumps, TOOLS)) +
          "\n</tools><|im_end|>\n<|im_start|>user\nplease<|im_end|>\n<|im_start|>assistant\n")
THOUGHT = "<think>\nhm\n</think>\n\n"


def write(*calls):
    """Write <tool_call> blocks. A call is (name, arguments), or a string that is written unchanged."""
    blocks = []
    for call in calls:
        if not isinstance(call, str):
            call = json.dumps({"name": call[0], "arguments": call[1]})
        blocks.append(f"<tool_call>\n{call}\n</tool_call>")
    return "\n".join(blocks)


def score(generation, gold, prompt=PROMPT, **options):
    return reward.score(prompt + generation, f"</think>\n\n{gold}<|im_end|>\n", reward.tools_in(prompt), **options)


def outcome(generation, gold, **options):
    result = score(generation, gold, **options)
    return result["reward"], result["answer_score"], result["case"]


# ---------------------------------------------------------------------------------------------------------------------
# The authors' values

def test_golden_values():
    rows = [json.loads(line) for line in gzip.open(Path(__file__).with_name("reward_golden.jsonl.gz"))]
    assert len(rows) == 3000
    for row in rows:
        result = reward.score(row["prompt"] + row["generation"], row["label"], reward.tools_in(row["prompt"]))
        assert result["reward"] == pytest.approx(row["reward"], abs=1e-6), row
        assert result["answer_score"] == pytest.approx(row["answer_score"], abs=1e-6), row


CALL = write(("f", {"a": "New York", "b": 1}))


@pytest.mark.parametrize("opening, generation, expected", [
    ("<think>", f"\nhm\n</think>\n\n{CALL}", 1.0),              # the prompt's own opening counts
    ("<think>", f"<think>\nhm\n</think>\n\n{CALL}", 1.0),       # one pair, from the first opening to the closing
    ("<think>", CALL, -1.0),                                     # never closed
    ("<think>", f"a</think>b<think>c</think>{CALL}", -1.0),     # a second pair
    ("<think>\n\n</think>\n\n", CALL, 1.0),                      # the prompt contains the one block, empty
    ("<think>\n\n</think>\n\n", f"{THOUGHT}{CALL}", -1.0),      # a second pair
    ("", CALL, -1.0),
])
def test_prompts_that_open_a_think_block(opening, generation, expected):
    assert score(generation, CALL, prompt=PROMPT + opening)["reward"] == expected


def test_only_the_last_assistant_turn_counts():
    prompt = PROMPT + f"{THOUGHT}I will.<|im_end|>\n<|im_start|>user\nnow<|im_end|>\n<|im_start|>assistant\n"
    assert score(THOUGHT + CALL, CALL, prompt=prompt)["reward"] == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# The cases of the released function, one by one

@pytest.mark.parametrize("generation", ["<think>\nI wonder", CALL, THOUGHT + THOUGHT + CALL])
def test_row_not_exactly_one_think_block(generation):
    assert outcome(generation, CALL) == (-1.0, 0.0, "not one think block")


def test_row_a_stray_closing_tag_passes():
    assert outcome(f"{THOUGHT}more</think>{CALL}", CALL) == (1.0, 1.0, "calls and calls")


@pytest.mark.parametrize("body, case", [
    ('{"name": "f", "arguments": {', "call is not JSON"), ("", "call is not JSON"), ("f(a=1)", "call is not JSON"),
    ('{"name": "f"}', "call without name or arguments"), ('{"arguments": {}}', "call without name or arguments"),
    ('[{"name": "f", "arguments": {}}]', "call without name or arguments"), ("1", "call without name or arguments"),
])
def test_row_a_call_that_cannot_be_parsed(body, case):
    assert outcome(THOUGHT + write(body), CALL) == (-1.0, 0.0, case)
    assert outcome(THOUGHT + CALL + write(body), CALL) == (-1.0, 0.0, case)  # one bad call is enough


@pytest.mark.parametrize("call, case", [
    (("k", {}), "unknown tool"), ((7, {}), "unknown tool"), ((["f"], {}), "unknown tool"),
    (("f", {"a": 1, "c": 2}), "unknown argument"), (("g", {"type": 1}), "unknown argument"),
    (("h", {"a": 1}), "unknown argument"), (("f", {"properties": 1}), "unknown argument"),
    (("f", None), "arguments are not an object"), (("f", "New York"), "arguments are not an object"),
    (("f", 0), "arguments are not an object"),
    (("f", "ab"), "arguments are not an object"), (("f", ["a"]), "arguments are not an object"),  # released: raises
])
def test_row_unknown_tool_or_argument(call, case):
    assert outcome(THOUGHT + write(call), CALL) == (-1.0, 0.0, case)


@pytest.mark.parametrize("nothing", ["", []])
def test_empty_text_or_list_stands_for_no_arguments(nothing):
    assert outcome(THOUGHT + write(("h", nothing)), write(("h", {}))) == (1.0, 1.0, "calls and calls")


def test_row_a_call_never_closed():
    assert outcome(THOUGHT + '<tool_call>\n{"name": "f"', CALL) == (0.0, 0.0, "call never closed")
    assert outcome(THOUGHT + "<tool_call>", "Sorry.") == (0.0, 0.0, "call never closed")
    assert outcome(THOUGHT + CALL + "<tool_call>", CALL) == (1.0, 1.0, "calls and calls")  # the closed one counts


def test_row_text_where_calls_are_due():
    assert outcome(THOUGHT + "In New York it rains.", CALL) == (0.0, 0.0, "text where calls are due")


def test_row_calls_where_text_is_due():
    assert outcome(THOUGHT + CALL, "Sorry.") == (0.0, 0.0, "calls where text is due")


def test_row_text_and_text():
    assert outcome(THOUGHT + "I cannot do that.<|im_end|>", "I cannot do that.") == (1.0, 1.0, "text and text")
    assert score(THOUGHT, "Sorry.")["reward"] == 0.0  # blank
    assert score(THOUGHT + "cats run<|im_end|>", "The cat ran.")["reward"] == pytest.approx(2 * 3 / (4 + 5))


@pytest.mark.parametrize("calls, gold, expected", [
    ([("f", {"a": 1})], [("f", {"a": 1, "b": 2})], 0.5),                              # the first case study of the paper
    ([("f", {"a": 1})] * 2, [("f", {"a": 1})], 0.5),                                   # a correct call twice
    ([("f", {"a": 1})], [("f", {"a": 1}), ("g", {})], 0.5),                            # one of two calls
    ([("f", {"a": 1}), ("g", {})], [("f", {"a": 1})], 0.5),                            # one call too many
    ([("f", {"a": "York", "b": 3})], [("f", {"a": "New York City", "b": 3})], 0.75),
    ([("f", {"a": "a4"})], [("f", {"a": "A4"})], 1.0), ([("f", {"a": "-5"})], [("f", {"a": "5"})], 1.0),
    ([("f", {"a": True})], [("f", {"a": 1})], 1.0), ([("f", {"a": 5.0})], [("f", {"a": 5})], 1.0),
    ([("f", {"a": "5"})], [("f", {"a": 5})], 1.0), ([("f", {"a": "五"})], [("f", {"a": "六"})], 0.0),
    ([("f", {"a": "五"})], [("f", {"a": "五"})], 1.0), ([("h", {})], [("h", {})], 1.0),
    ([("f", {"a": [1, 2]})], [("f", {"a": [2, 1]})], 0.0), ([("f", {"a": [1, 2]})], [("f", {"a": [1, 2]})], 1.0),
    ([("f", {"a": {"x": 1, "y": 2}})], [("f", {"a": {"y": 2, "x": 1}})], 0.0),        # the order of keys counts
    ([("f", {"a": {"x": "run"}})], [("f", {"a": {"x": "runs"}})], 0.0),               # nested values: all or nothing
    ([("g", {"a": 1})], [("f", {"a": 1})], 0.0),                                       # 0 / (1 + 1)
    ([("f", {"a": 1}), ("f", {"a": 1, "b": 1})], [("f", {"a": 1, "b": 1}), ("f", {"a": 1, "b": 2})], 0.5),
    ([("f", {"a": 1, "b": 1}), ("f", {"a": 1})], [("f", {"a": 1, "b": 1}), ("f", {"a": 1, "b": 2})], 0.75),
])
def test_row_calls_and_calls(calls, gold, expected):
    assert outcome(THOUGHT + write(*calls), write(*gold)) == (expected, expected, "calls and calls")
    assert score("thinking out loud</think>" + THOUGHT + "Sure:" + write(*calls), write(*gold))["reward"] == expected


def test_a_gold_call_matched_at_similarity_0_is_used_up():
    one = ("f", {"a": 1})
    two = ("f", {"a": 2})
    assert score(THOUGHT + write(("f", {"b": 1}), two), write(two, one))["reward"] == 0.0  # took the first of equals
    assert score(THOUGHT + write(("f", {"b": 1}), two), write(one, two))["reward"] == 0.5


def test_wrapped_tools_are_unwrapped():
    wrapped = [{"type": "function", "function": tool} for tool in TOOLS]
    for tools in (TOOLS, wrapped):
        named = reward.tools_by_name(tools)
        known = {name: set(reward.known_arguments(tool)) for name, tool in named.items()}
        assert known == {"f": {"a", "b"}, "g": {"a"}, "h": set()}


# ---------------------------------------------------------------------------------------------------------------------
# Options

def test_the_end_token_is_two_words_unless_strip_eos():
    assert score(THOUGHT + "<|im_end|>", "I cannot do that.")["reward"] == 0.5
    assert score(THOUGHT + "<|im_end|>", "I cannot do that.", strip_eos=True)["reward"] == 0.0
    assert score(THOUGHT + "I cannot.<|im_end|>\n", "I cannot.", strip_eos=True)["reward"] == 1.0


def test_think_none():
    assert score(CALL, CALL, think="none")["reward"] == 1.0
    assert reward.score(PROMPT + CALL, CALL + "<|im_end|>\n", TOOLS, think="none")["reward"] == 1.0


@pytest.mark.parametrize("generation, gold, expected", [
    (CALL, CALL, 1.0), (write(("f", {"a": "new york", "b": 1})), CALL, 0.0), ("k", CALL, 0.0), (CALL, "Sorry.", 0.0),
    ("No.", "Sorry.", 1.0), (write(("g", {}), ("h", {})), write(("h", {}), ("g", {})), 1.0),
    (write(("h", {}), ("h", {})), write(("h", {})), 0.0), (write(("k", {})), CALL, -1.0),
])
def test_binary(generation, gold, expected):
    assert score(THOUGHT + generation, gold, binary=True)["reward"] == expected


# ---------------------------------------------------------------------------------------------------------------------
# ROUGE-L and the stemmer against their references

def random_text(r):
    """Draw words, numbers, punctuation and other scripts."""
    pieces = ["flights", "Flight", "running", "ran", "the", "a", "of", "New-York", "universities", "relational",
              "dying", "caresses", "5", "-3.5", "a4", "A4", "ünï", "五", "\n", "  ", "_", "im", "<|im_end|>", "2024-01-01",
              "x" * 40]
    return r.choice(["", " ", ", "]).join(r.choice(pieces) for _ in range(r.randrange(12)))


def test_rouge_is_rouge_score():
    rouge = pytest.importorskip("rouge_score.rouge_scorer", reason="pip install -r requirements-dev.txt")
    scorer = rouge.RougeScorer(["rougeL"], use_stemmer=True)
    r = random.Random(0)
    for _ in range(10_000):
        text = random_text(r)
        gold = random_text(r)
        expected = 1.0 if text == gold else scorer.score(gold, text)["rougeL"].fmeasure
        assert reward.rouge_l(text, gold) == pytest.approx(expected, abs=1e-12), (text, gold)


def test_stemmer_is_nltk():
    porter = pytest.importorskip("nltk.stem.porter", reason="pip install -r requirements-dev.txt").PorterStemmer()
    suffixes = ("ational tional enci anci izer bli abli alli entli eli ousli ization ation ator alism iveness fulness "
                "ousness aliti iviti biliti fulli logi icate ative alize iciti ical ful ness al ance ence er ic able "
                "ible ant ement ment ent ion sion tion ou ism ate iti ous ive ize s es ies sses ed ing eed ied y e ll "
                "ings edly at bl iz").split()
    r = random.Random(1)
    words = {"skies", "dying", "news", "proceed", "dies", "died", "by", "say", "enjoy", "yyyy", ""}
    while len(words) < 20_000:
        root = "".join(r.choice("abcdefghijklmnopqrstuvwxyz" "aeiouyaeiouylst" "07") for _ in range(r.randrange(8)))
        words.add(root + "".join(r.choice(suffixes) for _ in range(r.randrange(4))))
    wrong = [(word, stem(word), porter.stem(word)) for word in sorted(words) if stem(word) != porter.stem(word)]
    assert not wrong


def test_lcs_is_the_textbook_table():
    r = random.Random(2)
    for _ in range(500):
        a = r.choices("abc", k=r.randrange(15))
        b = r.choices("abc", k=r.randrange(15))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert reward.lcs(a, b) == reward.lcs(b, a) == table[-1][-1]


# ---------------------------------------------------------------------------------------------------------------------
# Properties and hostile text

def test_bounds_symmetry_and_never_raising():
    hypothesis = pytest.importorskip("hypothesis", reason="pip install -r requirements-dev.txt")
    st = hypothesis.strategies
    text = st.text() | st.sampled_from(["New York", "flights", "5", ""])
    values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | text,
                          lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=8)
    arguments = st.dictionaries(st.sampled_from("abc"), values)
    written = st.lists(st.tuples(st.sampled_from("fgh"), arguments | values), max_size=3).map(lambda c: write(*c))
    answers = st.sampled_from(["", "<think>", THOUGHT, "</think>"]).flatmap(lambda t: (written | text).map(t.__add__))

    @hypothesis.settings(max_examples=300, deadline=None)
    @hypothesis.given(answers, written | text, arguments, arguments, st.booleans(), st.booleans())
    def check_properties(generation, gold, one, other, strip_eos, binary):
        result = score(generation, gold, strip_eos=strip_eos, binary=binary)
        assert -1 <= result["reward"] <= 1 and result["answer_score"] == max(0.0, result["reward"])
        assert (result["reward"] == -1) == (result["case"] in reward.FORMAT_FAILURES)
        assert explain(result)
        sim = reward.similarity(one, other)
        assert 0 <= sim <= 1
        assert sim == pytest.approx(reward.similarity(other, one), abs=1e-12)
        assert reward.rouge_l(generation, gold) == reward.rouge_l(gold, generation)
        calls = [{"name": "f", "arguments": one}]
        other_calls = [{"name": "f", "arguments": other}]
        assert reward.exact(calls, calls) or "nan" in str(one)
        # Nested values are compared as text, in which False is not 0.
        assert not reward.exact(calls, other_calls) or sim == 1 or str(one) != str(other)

    check_properties()


NESTED = '{"name": "f", "arguments": {"a": %s}}'
RANDOM = random.Random(3)
MEGABYTE = " ".join("".join(RANDOM.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(170_000))


@pytest.mark.parametrize("generation, expected", [
    (write(NESTED % ("[" * 10_000 + "]" * 10_000)), -1.0), (write(NESTED % ('{"a":' * 10_000)), -1.0),
    (write(NESTED % ("[" * 900 + "]" * 900)), 0.0), (write(NESTED % "NaN"), 0.0), (write(NESTED % "1e999"), 0.0),
    (write(NESTED % ("9" * 4_000)), 0.0), (write(NESTED % ("9" * 5_000)), -1.0), (write(NESTED % '"\\ud800"'), 0.0),
    (write(NESTED % '2, "a": "New York", "b": 1'), 1.0),  # of a repeated key, the last counts
    (write(NESTED % f'"{MEGABYTE}"'), 0.0), ("<think>" * 140_000, 0.0), ("<tool_call>" * 90_000, 0.0),
    ("</think>" * 120_000, 0.0), (MEGABYTE, 0.0), (" " * 1_000_000 + "x", 0.0), ("\ud800\udfff", 0.0),
    ("\x00" * 1_000_000, 0.0), ("y" * 1_000_000, 0.0), (CALL * 15_000, 1 / 15_000), ("<|im_end|>" * 100_000, 0.0),
])
def test_hostile_text(generation, expected):
    start = time.perf_counter()
    for options in ({}, {"strip_eos": True}, {"binary": True}):
        result = score(THOUGHT + generation, CALL, **options)
        value = min(0.0, expected) if options.get("binary") and expected != 1 else expected
        assert result["reward"] == pytest.approx(value)
        assert explain(result).isascii()
    assert time.perf_counter() - start < 10  # about a second; a quadratic parser takes hours
    # The same text as a label must not raise either.
    assert -1 <= reward.score(PROMPT + THOUGHT + CALL, "</think>" + generation, TOOLS)["reward"] <= 1


def test_explain():
    page = explain(score(THOUGHT + write(("f", {"a": "York", "b": 3}), ("h", {})),
                                write(("f", {"a": "New York City", "b": 3}), ("g", {}))))
    assert "reward  0.25" in page and '"f": matches gold call 1, similarity 0.75' in page
    assert '0.5000  "a": "York"   gold "New York City"' in page and '"h": no gold call of this name is left' in page
    assert '"g": gold call 2 is unmatched' in page and "0.75 / (2 calls + 1 unmatched gold calls) = 0.25" in page

"""The reward: the authors' own values, every row of the table in paper.md 1.5, ROUGE-L and stemmer against their
references, and text that is out to break it."""
import gzip
import json
import random
import time
from pathlib import Path

import pytest

import reward
from data.stemmer import stem

TOOLS = [{"name": "f", "parameters": {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a", "b"]}},
         {"name": "g", "parameters": {"a": {"type": "string"}}},  # not a schema: its keys are the arguments
         {"name": "h"}]
PROMPT = ("<|im_start|>system\nwithin <tools></tools>:\n<tools>\n" + "\n".join(map(json.dumps, TOOLS)) +
          "\n</tools><|im_end|>\n<|im_start|>user\nplease<|im_end|>\n<|im_start|>assistant\n")
THOUGHT = "<think>\nhm\n</think>\n\n"


def write(*calls):
    """The <tool_call> blocks of (name, arguments) pairs; a string stands as it is."""
    texts = [call if isinstance(call, str) else json.dumps({"name": call[0], "arguments": call[1]}) for call in calls]
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


def score(generation, gold, prompt=PROMPT, **options):
    return reward.score(prompt + generation, f"</think>\n\n{gold}<|im_end|>\n", reward.tools_in(prompt), **options)


def judged(generation, gold, **options):
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
    ("<think>\n\n</think>\n\n", CALL, 1.0),                      # the empty block: nothing is left to write
    ("<think>\n\n</think>\n\n", f"{THOUGHT}{CALL}", -1.0),      # a second pair
    ("", CALL, -1.0),
])
def test_prompts_that_open_a_think_block(opening, generation, expected):
    assert score(generation, CALL, prompt=PROMPT + opening)["reward"] == expected


def test_only_the_last_assistant_turn_counts():
    earlier = PROMPT + f"{THOUGHT}I will.<|im_end|>\n<|im_start|>user\nnow<|im_end|>\n<|im_start|>assistant\n"
    assert score(THOUGHT + CALL, CALL, prompt=earlier)["reward"] == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# The table of paper.md 1.5, row by row

@pytest.mark.parametrize("generation", ["<think>\nI wonder", CALL, THOUGHT + THOUGHT + CALL])
def test_row_not_exactly_one_think_block(generation):
    assert judged(generation, CALL) == (-1.0, 0.0, "not one think block")


def test_row_a_stray_closing_tag_passes():
    assert judged(f"{THOUGHT}more</think>{CALL}", CALL) == (1.0, 1.0, "calls and calls")


@pytest.mark.parametrize("body, case", [
    ('{"name": "f", "arguments": {', "call is not JSON"), ("", "call is not JSON"), ("f(a=1)", "call is not JSON"),
    ('{"name": "f"}', "call without name or arguments"), ('{"arguments": {}}', "call without name or arguments"),
    ('[{"name": "f", "arguments": {}}]', "call without name or arguments"), ("1", "call without name or arguments"),
])
def test_row_a_call_that_cannot_be_read(body, case):
    assert judged(THOUGHT + write(body), CALL) == (-1.0, 0.0, case)
    assert judged(THOUGHT + CALL + write(body), CALL) == (-1.0, 0.0, case)  # one bad call spoils the good one


@pytest.mark.parametrize("call, case", [
    (("k", {}), "unknown tool"), ((7, {}), "unknown tool"), ((["f"], {}), "unknown tool"),
    (("f", {"a": 1, "c": 2}), "unknown argument"), (("g", {"type": 1}), "unknown argument"),
    (("h", {"a": 1}), "unknown argument"), (("f", {"properties": 1}), "unknown argument"),
    (("f", None), "arguments are not an object"), (("f", "New York"), "arguments are not an object"),
    (("f", 0), "arguments are not an object"),
    (("f", "ab"), "arguments are not an object"), (("f", ["a"]), "arguments are not an object"),  # released: raises
])
def test_row_unknown_tool_or_argument(call, case):
    assert judged(THOUGHT + write(call), CALL) == (-1.0, 0.0, case)


@pytest.mark.parametrize("nothing", ["", []])
def test_empty_text_or_list_stands_for_no_arguments(nothing):
    assert judged(THOUGHT + write(("h", nothing)), write(("h", {}))) == (1.0, 1.0, "calls and calls")


def test_row_a_call_never_closed():
    assert judged(THOUGHT + '<tool_call>\n{"name": "f"', CALL) == (0.0, 0.0, "call never closed")
    assert judged(THOUGHT + "<tool_call>", "Sorry.") == (0.0, 0.0, "call never closed")
    assert judged(THOUGHT + CALL + "<tool_call>", CALL) == (1.0, 1.0, "calls and calls")  # the closed one counts


def test_row_text_where_calls_are_due():
    assert judged(THOUGHT + "In New York it rains.", CALL) == (0.0, 0.0, "text where calls are due")


def test_row_calls_where_text_is_due():
    assert judged(THOUGHT + CALL, "Sorry.") == (0.0, 0.0, "calls where text is due")


def test_row_text_and_text():
    assert judged(THOUGHT + "I cannot do that.<|im_end|>", "I cannot do that.") == (1.0, 1.0, "text and text")
    assert score(THOUGHT, "Sorry.")["reward"] == 0.0  # blank
    assert score(THOUGHT + "cats run<|im_end|>", "The cat ran.")["reward"] == pytest.approx(2 * 3 / (4 + 5))


@pytest.mark.parametrize("calls, gold, expected", [
    ([("f", {"a": 1})], [("f", {"a": 1, "b": 2})], 0.5),                              # the paper's first case study
    ([("f", {"a": 1})] * 2, [("f", {"a": 1})], 0.5),                                   # a correct call twice
    ([("f", {"a": 1})], [("f", {"a": 1}), ("g", {})], 0.5),                            # one of two calls
    ([("f", {"a": 1}), ("g", {})], [("f", {"a": 1})], 0.5),                            # one too many
    ([("f", {"a": "York", "b": 3})], [("f", {"a": "New York City", "b": 3})], 0.75),
    ([("f", {"a": "a4"})], [("f", {"a": "A4"})], 1.0), ([("f", {"a": "-5"})], [("f", {"a": "5"})], 1.0),
    ([("f", {"a": True})], [("f", {"a": 1})], 1.0), ([("f", {"a": 5.0})], [("f", {"a": 5})], 1.0),
    ([("f", {"a": "5"})], [("f", {"a": 5})], 1.0), ([("f", {"a": "五"})], [("f", {"a": "六"})], 0.0),
    ([("f", {"a": "五"})], [("f", {"a": "五"})], 1.0), ([("h", {})], [("h", {})], 1.0),
    ([("f", {"a": [1, 2]})], [("f", {"a": [2, 1]})], 0.0), ([("f", {"a": [1, 2]})], [("f", {"a": [1, 2]})], 1.0),
    ([("f", {"a": {"x": 1, "y": 2}})], [("f", {"a": {"y": 2, "x": 1}})], 0.0),        # order of insertion
    ([("f", {"a": {"x": "run"}})], [("f", {"a": {"x": "runs"}})], 0.0),               # nested: all or nothing
    ([("g", {"a": 1})], [("f", {"a": 1})], 0.0),                                       # 0 / (1 + 1)
    ([("f", {"a": 1}), ("f", {"a": 1, "b": 1})], [("f", {"a": 1, "b": 1}), ("f", {"a": 1, "b": 2})], 0.5),
    ([("f", {"a": 1, "b": 1}), ("f", {"a": 1})], [("f", {"a": 1, "b": 1}), ("f", {"a": 1, "b": 2})], 0.75),
])
def test_row_calls_and_calls(calls, gold, expected):
    assert judged(THOUGHT + write(*calls), write(*gold)) == (expected, expected, "calls and calls")
    assert score("thinking out loud</think>" + THOUGHT + "Sure:" + write(*calls), write(*gold))["reward"] == expected


def test_a_gold_call_met_at_similarity_0_is_gone():
    one, two = ("f", {"a": 1}), ("f", {"a": 2})
    assert score(THOUGHT + write(("f", {"b": 1}), two), write(two, one))["reward"] == 0.0  # took the first of equals
    assert score(THOUGHT + write(("f", {"b": 1}), two), write(one, two))["reward"] == 0.5


def test_wrapped_tools_are_unwrapped():
    wrapped = [{"type": "function", "function": tool} for tool in TOOLS]
    assert reward.offered(wrapped) == reward.offered(TOOLS) == {"f": {"a", "b"}, "g": {"a"}, "h": set()}


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

def some_text(r):
    """Words, numbers, punctuation, other scripts."""
    pieces = ["flights", "Flight", "running", "ran", "the", "a", "of", "New-York", "universities", "relational",
              "dying", "caresses", "5", "-3.5", "a4", "A4", "ünï", "五", "\n", "  ", "_", "im", "<|im_end|>", "2024-01-01",
              "x" * 40]
    return r.choice(["", " ", ", "]).join(r.choice(pieces) for _ in range(r.randrange(12)))


def test_rouge_is_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="pip install -r requirements-dev.txt") \
        .RougeScorer(["rougeL"], use_stemmer=True)
    r = random.Random(0)
    for _ in range(10_000):
        text, gold = some_text(r), some_text(r)
        expected = 1.0 if text == gold else scorer.score(gold, text)["rougeL"].fmeasure
        assert reward.rouge_l(text, gold) == pytest.approx(expected, abs=1e-12), (text, gold)


def test_stemmer_is_nltk():
    porter = pytest.importorskip("nltk.stem.porter", reason="pip install -r requirements-dev.txt").PorterStemmer()
    suffixes = ("ational tional enci anci izer bli abli alli entli eli ousli ization ation ator alism iveness fulness "
                "ousness aliti iviti biliti fulli logi icate ative alize iciti ical ful ness al ance ence er ic able "
                "ible ant ement ment ent ion sion tion ou ism ate iti ous ive ize s es ies sses ed ing eed ied y e ll "
                "ings edly at bl iz").split()
    r, words = random.Random(1), {"skies", "dying", "news", "proceed", "dies", "died", "by", "say", "enjoy", "yyyy", ""}
    while len(words) < 20_000:
        root = "".join(r.choice("abcdefghijklmnopqrstuvwxyz" "aeiouyaeiouylst" "07") for _ in range(r.randrange(8)))
        words.add(root + "".join(r.choice(suffixes) for _ in range(r.randrange(4))))
    wrong = [(word, stem(word), porter.stem(word)) for word in sorted(words) if stem(word) != porter.stem(word)]
    assert not wrong


def test_lcs_is_the_textbook_table():
    r = random.Random(2)
    for _ in range(500):
        a, b = ([r.choice("abc") for _ in range(r.randrange(15))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert reward.lcs(a, b) == reward.lcs(b, a) == table[-1][-1]


# ---------------------------------------------------------------------------------------------------------------------
# Properties, and text that is out to break it

def test_bounds_symmetry_and_never_raising():
    hypothesis = pytest.importorskip("hypothesis", reason="pip install -r requirements-dev.txt")
    st = hypothesis.strategies
    text = st.text() | st.sampled_from(["New York", "flights", "5", ""])
    values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | text,
                          lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=8)
    arguments = st.dictionaries(st.sampled_from("abc"), values)
    calls = st.lists(st.tuples(st.sampled_from("fgh"), arguments | values), max_size=3).map(lambda c: write(*c))
    answers = st.sampled_from(["", "<think>", THOUGHT, "</think>"]).flatmap(lambda t: (calls | text).map(t.__add__))

    @hypothesis.settings(max_examples=300, deadline=None)
    @hypothesis.given(answers, calls | text, arguments, arguments, st.booleans(), st.booleans())
    def holds(generation, gold, one, other, strip_eos, binary):
        result = score(generation, gold, strip_eos=strip_eos, binary=binary)
        assert -1 <= result["reward"] <= 1 and result["answer_score"] == max(0.0, result["reward"])
        assert (result["reward"] == -1) == (result["case"] in reward.FORMAT_FAILURES)
        assert reward.explain(result)
        forth, back = reward.similarity(one, other), reward.similarity(other, one)
        assert 0 <= forth <= 1 and forth == pytest.approx(back, abs=1e-12)
        assert reward.rouge_l(generation, gold) == reward.rouge_l(gold, generation)
        once, twice = ([{"name": "f", "arguments": a}] for a in (one, other))
        assert reward.exact(once, once) or "nan" in str(one)
        assert not reward.exact(once, twice) or forth == 1

    holds()


NESTED = '{"name": "f", "arguments": {"a": %s}}'
RANDOM = random.Random(3)
MEGABYTE = " ".join("".join(RANDOM.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(170_000))


@pytest.mark.parametrize("generation, expected", [
    (write(NESTED % ("[" * 10_000 + "]" * 10_000)), -1.0), (write(NESTED % ('{"a":' * 10_000)), -1.0),
    (write(NESTED % ("[" * 900 + "]" * 900)), 0.0), (write(NESTED % "NaN"), 0.0), (write(NESTED % "1e999"), 0.0),
    (write(NESTED % ("9" * 4_000)), 0.0), (write(NESTED % ("9" * 5_000)), -1.0), (write(NESTED % '"\\ud800"'), 0.0),
    (write(NESTED % '2, "a": "New York", "b": 1'), 1.0),  # of a key that comes twice, the last counts
    (write(NESTED % f'"{MEGABYTE}"'), 0.0), ("<think>" * 140_000, 0.0), ("<tool_call>" * 90_000, 0.0),
    ("</think>" * 120_000, 0.0), (MEGABYTE, 0.0), (" " * 1_000_000 + "x", 0.0), ("\ud800\udfff", 0.0),
    ("\x00" * 1_000_000, 0.0), (CALL * 15_000, 1 / 15_000), ("<|im_end|>" * 100_000, 0.0),
])
def test_hostile_text(generation, expected):
    began = time.perf_counter()
    for options in ({}, {"strip_eos": True}, {"binary": True}):
        result = score(THOUGHT + generation, CALL, **options)
        assert result["reward"] == (pytest.approx(expected) if not options.get("binary") or expected == 1 else
                                    min(0.0, expected))
        assert reward.explain(result).isascii()
    assert time.perf_counter() - began < 10  # a second at most on a quiet core; the pitfall is hours
    # The same as a label: what it costs, and that it does not raise.
    assert -1 <= reward.score(PROMPT + THOUGHT + CALL, "</think>" + generation, TOOLS)["reward"] <= 1


def test_explain_shows_what_met_what():
    page = reward.explain(score(THOUGHT + write(("f", {"a": "York", "b": 3}), ("h", {})),
                                write(("f", {"a": "New York City", "b": 3}), ("g", {}))))
    assert "reward  0.25" in page and '"f": met gold call 1, similarity 0.75' in page
    assert '0.5000  "a": "York"   gold "New York City"' in page and '"h": no gold call of this name is left' in page
    assert '"g": gold call 2 was not met' in page and "0.75 / (2 calls + 1 gold calls not met) = 0.25" in page

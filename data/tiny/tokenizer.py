"""The tokenizer of the embedded world: a word of its text is one id, a made-up name is its syllables, the rest bytes.

A model this small cannot learn that "play lomari" and {"song": "lomari"} hold the same name when the two are cut
differently, as they are by Qwen's own tokenizer, where a space melts into the word behind it. So here

    words that may stand in a name or a value (song, play, celsius)    one id each, the space before them another
    all other words of the world's text (the, please, umbrella)        one id each, together with the space before them
    letters that are no such word                                      syllables (lo ma ri), else single letters
    digits, and everything else                                        one id each; beyond ASCII one id for each byte

The template's fixed text and JSON's punctuation between names and values are added tokens, found before anything is
cut. Decoding gives back every text exactly, whatever was typed.
"""
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from data.chat import EXAMPLE_CALL, Chat
from data.tiny.more_tools import UNSEEN
from data.tiny.phrases import JOINS, NO_THOUGHTS, ORDERS, OUTSIDE, REFUSALS, TALK, TALK_THOUGHTS, THOUGHTS
from data.tiny.tools import TOOLS
from data.tiny.world import CHOICE, SYLLABLES

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>", "\n\n"]


def fixed_text():
    """The stretches of a prompt and of an answer that are the same in every record, as Qwen3's template writes them."""
    chat = Chat()
    chat.family, chat.default_system, chat.example_call = "qwen3", None, EXAMPLE_CALL
    text = chat.render([{"role": "user", "content": ""}], [{}])  # its only tool is written {}
    before, after = text[text.index("# Tools"):text.index("<|im_end|>")].split("\n{}")
    types = ["string", "integer", "boolean"]
    closed = [f'": {{"type": "{kind}"}}' for kind in types] + ['"]}']  # a parameter ends; "]} ends an enum's list
    return [*(f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")),
            *(f"\n<|im_start|>{role}\n" for role in ("user", "assistant")), before, after,
            '\n{"name": "', '", "description": "', '", "parameters": {"type": "object", "properties": {"',
            *(end + ', "' for end in closed), *(end + '}, "required": ["' for end in closed),
            '": {"type": "string", "enum": ["', '", "', '"]}}',
            '", "arguments": {"', '": "', '": ', ', "', '"}}\n', '}}\n']


def words():
    """(words of names and values, all other words, words that begin a sentence) of the world's text."""
    in_names, sentences = "true false", [text for pair in THOUGHTS for text in pair] + NO_THOUGHTS + TALK_THOUGHTS
    sentences += ORDERS + JOINS["oo"] + JOINS["other"] + OUTSIDE + REFUSALS + [text for pair in TALK for text in pair]
    for names, descriptions, parameters, lines in (TOOLS | UNSEEN).values():
        in_names += f" {names} {' '.join(synonyms for synonyms, _ in parameters.values())} "
        in_names += " ".join(word for _, values in parameters.values() if isinstance(values, tuple) for word in values)
        sentences += descriptions.split(" / ") + lines.split("\n")
    names = set(re.findall("[a-z]+", in_names))
    others, first = set(), set()
    for sentence in sentences:
        first.update(re.findall(r"^\W*([A-Za-z]+)", re.sub(r"^\W*\(\w+:", "", sentence)))
        if choice := re.match(r"\W*" + CHOICE, sentence):
            first.update(text.split()[0] for text in choice[2].split("|"))
        literal = re.sub(r"\{\w+\}|\(\w+:", " ", sentence)
        others.update(re.findall("[A-Za-z]+", literal))
    first = {word.lower() for word in first} - {"i"}
    return names, (others | first) - names - {word.capitalize() for word in first} | {"I"}, first | {"I"}


def make_tokenizer():
    """The tokenizer, the same at every call."""
    names, others, first = words()
    pieces = [chr(byte) for byte in range(33, 127)]
    pieces += sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(pieces))  # bytes as byte-level models write them
    pieces += SYLLABLES + sorted(names) + sorted(first | {word.capitalize() for word in first})
    pieces += sorted("Ġ" + word for word in others)  # Ġ is how they write a space
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    model = models.BPE(vocabulary, [tuple(syllable) for syllable in SYLLABLES], ignore_merges=True)  # whole words first
    tokenizer = Tokenizer(model)
    pattern = f" (?:{'|'.join(sorted(others))})(?![A-Za-z])|[A-Za-z]+|[^A-Za-z]"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in TAGS + fixed_text()])
    return tokenizer

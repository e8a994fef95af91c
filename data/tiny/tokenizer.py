"""The tokenizer of the bundled world: its words are single ids, made-up names are syllables, the rest is bytes.

A model this small cannot learn that "play lomari" and {"song": "lomari"} hold the same name if the name is split
differently in the two, as Qwen's tokenizer does by merging a space with the word after it. Therefore:

    words that can occur in names and values (song, play, celsius)   one id each, without the space before them
    all other words of the world's text (the, please, umbrella)      one id each, including that space
    other letters                                                    syllables (lo ma ri), else single letters
    digits and everything else                                       one id each; one id per byte beyond ASCII

The template's fixed text and the punctuation of JSON between names and values are added tokens, which match
first. Every text decodes to exactly itself.
"""
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from data.chat import EXAMPLE_CALL, Chat
from data.tiny.phrases import JOINS, NO_THOUGHTS, ORDERS, OUTSIDE, REFUSALS, TALK, TALK_THOUGHTS, THOUGHTS
from data.tiny.world import CHOICE, EVERY_TOOL, SYLLABLES

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>", "\n\n"]


def fixed_text():
    """The parts of prompts and answers that are the same in every record, as Qwen3's template writes them."""
    chat = Chat()
    chat.family = "qwen3"
    chat.default_system = None
    chat.example_call = EXAMPLE_CALL
    text = chat.render([{"role": "user", "content": ""}], [{}])  # its only tool is written {}
    section = text[text.index("# Tools"):text.index("<|im_end|>")]
    before_tools, after_tools = section.split("\n{}")
    # The end of a parameter: its type, or "]} after the list of an enum.
    ends = [f'": {{"type": "{kind}"}}' for kind in ("string", "integer", "boolean")] + ['"]}']
    return [
        "<|im_start|>system\n",
        "<|im_start|>user\n",
        "<|im_start|>assistant\n",
        "\n<|im_start|>user\n",
        "\n<|im_start|>assistant\n",
        before_tools,
        after_tools,
        '\n{"name": "',
        '", "description": "',
        '", "parameters": {"type": "object", "properties": {"',
        *[end + ', "' for end in ends],
        *[end + '}, "required": ["' for end in ends],
        '": {"type": "string", "enum": ["',
        '", "',
        '"]}}',
        '", "arguments": {"',
        '": "',
        '": ',
        ', "',
        '"}}\n',
        '}}\n',
    ]


def vocabulary_words():
    """(words of names and values, all other words, words that begin a sentence) of the world's text."""
    sentences = NO_THOUGHTS + TALK_THOUGHTS + ORDERS + JOINS["oo"] + JOINS["other"] + OUTSIDE + REFUSALS
    for texts in THOUGHTS + TALK:
        sentences.extend(texts)
    in_names = ["true false"]
    for names, descriptions, parameters, phrasings in EVERY_TOOL.values():
        in_names.append(names)
        for synonyms, kind in parameters.values():
            in_names.append(synonyms)
            if isinstance(kind, tuple):
                in_names.extend(kind)
        sentences += descriptions.split(" / ") + phrasings.split("\n")
    names = set(re.findall("[a-z]+", " ".join(in_names)))
    words = set()
    first = set()
    for sentence in sentences:
        literal = re.sub(r"\{\w+\}|\(\w+:", " ", sentence)
        words.update(re.findall("[A-Za-z]+", literal))
        start = re.sub(r"^\W*\(\w+:", "", sentence)
        first.update(re.findall(r"^\W*([A-Za-z]+)", start))
        if choice := re.match(r"\W*" + CHOICE, sentence):
            first.update(text.split()[0] for text in choice[2].split("|"))
    first = {word.lower() for word in first} - {"i"}
    capitalised = {word.capitalize() for word in first}
    others = (words | first) - names - capitalised | {"I"}
    return names, others, first | {"I"}


def make_tokenizer():
    """The tokenizer; every call returns the same one."""
    names, others, first = vocabulary_words()
    pieces = [chr(byte) for byte in range(33, 127)]
    byte_letters = set(pre_tokenizers.ByteLevel.alphabet())  # byte-level models write a byte as a letter
    pieces += sorted(byte_letters - set(pieces))
    pieces += SYLLABLES
    pieces += sorted(names)
    pieces += sorted(first | {word.capitalize() for word in first})
    pieces += sorted("Ġ" + word for word in others)  # Ġ is a space
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(syllable) for syllable in SYLLABLES]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))  # whole words first
    pattern = f" (?:{'|'.join(sorted(others))})(?![A-Za-z])|[A-Za-z]+|[^A-Za-z]"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in TAGS + fixed_text()])
    return tokenizer

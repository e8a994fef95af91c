"""Tables of the JSON fields that this project reads: the name of a field -> the kind of value it must have.

The code that reads a file checks it once, so that all later code can trust the values. Fields in no table are
ignored; missing or null fields are refused only where they are needed.
"""
import json

from data import MODEL_FOLDER, InputError, one_line


def is_id(value):
    return type(value) is int and 0 <= value < 2 ** 31


def is_list(value, of):
    """Whether a value is a list of objects with the fields that a table gives."""
    return isinstance(value, list) and all(
        isinstance(item, dict) and all(KINDS[kind](item.get(name)) for name, kind in of.items()) for item in value)


KINDS = {
    "text": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "an object": lambda value: isinstance(value, dict),
    "a list": lambda value: isinstance(value, list),
    "a whole number": lambda value: type(value) is int and value >= 0,
    "a whole number from 1 to 2^24": lambda value: type(value) is int and 0 < value <= 2 ** 24,
    "a whole number from 1 to 10,000": lambda value: type(value) is int and 0 < value <= 10_000,
    "a number above 0": lambda value: type(value) in (int, float) and 0 < value < 1e300,
    "a number": lambda value: type(value) in (int, float) and abs(value) < 1e300,
    "a number or NaN": lambda value: type(value) is float or KINDS["a number"](value),
    "a list of ids": lambda value: isinstance(value, list) and all(map(is_id, value)),
    "an id or a list of ids": lambda value: is_id(value) or isinstance(value, list) and all(map(is_id, value)),
    "a template, or a list of templates with names":
        lambda value: isinstance(value, str) or is_list(value, {"name": "text", "template": "text"}),
    "an object of metrics with a mean":
        lambda value: isinstance(value, dict) and is_list([*value.values()], {"mean": "a number"}),
    "a list of samples with text and reward":
        lambda value: value != [] and is_list(value, {"text": "text", "reward": "a number"}),
    "an object of safetensors files": lambda value: isinstance(value, dict) and all(
        isinstance(name, str) and name.endswith(".safetensors") for name in value.values()),
}

CONFIG = dict.fromkeys((
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings"), "a whole number from 1 to 2^24") | dict.fromkeys((
        "tie_word_embeddings", "attention_bias", "use_sliding_window"), "true or false") | {
    "num_hidden_layers": "a whole number from 1 to 10,000", "model_type": "text", "hidden_act": "text",
    "rms_norm_eps": "a number above 0", "rope_theta": "a number above 0", "rope_parameters": "an object",
    "rope_scaling": "an object", "layer_types": "a list", "eos_token_id": "an id or a list of ids"}
ROPE = {"rope_theta": "a number above 0", "rope_type": "text", "type": "text"}
GENERATION_CONFIG = {"eos_token_id": "an id or a list of ids"}
TOKENIZER_CONFIG = {"default_think": "text", "chat_template": "a template, or a list of templates with names"}
WEIGHT_INDEX = {"weight_map": "an object of safetensors files"}
PROGRESS = dict.fromkeys(("sft", "ckd"), {"updates": "a whole number"}) | {
    "simrl": {"updates": "a whole number", "prompts": "a whole number"}}
RECORD = {"source": "text", "rendered": "an object"}
ANSWER = {"reasoning": "text"}
GROUP = {"gold": "text", "samples": "a list of samples with text and reward"}
EVALUATION = {"model": "text", "metrics": "an object of metrics with a mean"}
SAMPLED = {"text": "text", "ids": "a list of ids", "finish_reason": "text", "logprob": "a number"}
SCORED = SAMPLED | {"reward": "a number", "case": "text", "exact": "true or false"}


def check_fields(value, table, where, remedy=MODEL_FOLDER, needed=False):
    """Return a JSON object. InputError if the value of a field is not of the kind that the table gives.
    needed: whether the fields must be there"""
    for name, kind in table.items():
        if (needed or value.get(name) is not None) and not KINDS[kind](value.get(name)):
            shown = one_line(json.dumps(value.get(name)), 40)
            raise InputError(f"{where}: {name} is {shown}, not {kind}; {remedy}")
    return value

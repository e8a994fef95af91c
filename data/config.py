"""A model's config.json: its settings, and what this project does not support."""
from data import MODEL_FOLDER, InputError
from data.fields import CONFIG, ROPE, check_fields

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DEFAULTS = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}


def read_config(config, where):
    """The settings that model.py computes with, from a config.json's content, older (rope_theta at top level) or newer
    (inside rope_parameters). where: its path, for errors. InputError for a model that is not supported."""
    check_fields(config, CONFIG, where)
    rope = check_fields(config.get("rope_scaling") or config.get("rope_parameters") or {}, ROPE, where)
    config, rope = ({name: value for name, value in part.items() if value is not None} for part in (config, rope))
    refuse_unsupported(config, rope, where)
    c = DEFAULTS | config
    qwen3 = c["model_type"] == "qwen3"
    bias = bool(c.get("attention_bias"))
    c.setdefault("num_key_value_heads", c["num_attention_heads"])
    c.setdefault("head_dim", 128 if qwen3 else c["hidden_size"] // c["num_attention_heads"])
    if c["num_attention_heads"] % c["num_key_value_heads"] or c["head_dim"] % 2:
        raise InputError(f"{where}: head_dim {c['head_dim']}, {c['num_attention_heads']} query heads and "
                         f"{c['num_key_value_heads']} key/value heads do not fit together; {MODEL_FOLDER}")
    c["rope_theta"] = float(rope.get("rope_theta", c["rope_theta"]))
    return c | {"qk_norm": qwen3, "qkv_bias": bias or not qwen3, "o_bias": bias and qwen3}


def refuse_unsupported(config, rope, where):
    """Raise InputError if config.json describes a model that model.py cannot compute."""
    family = config.get("model_type")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    layer_types = config.get("layer_types") or ()
    missing = [name for name in SIZES if name not in config]
    activation = config.get("hidden_act", "silu")
    unsupported = {
        f"mixture of experts ({family})": "moe" in str(family) or config.get("num_experts"),
        f"model_type {family!r}": family not in ("qwen2", "qwen3"),
        f"rope scaling ({rope_type})": rope_type != "default",
        "sliding-window attention": config.get("use_sliding_window") or "sliding_attention" in layer_types,
        f"hidden_act {activation!r}": activation != "silu",
        "a folder of quantised weights": config.get("quantization_config"),
        f"a config.json without {' and '.join(missing)}": missing,
    }
    for feature, present in unsupported.items():
        if present:
            raise InputError(f"{where}: {feature} is not supported; use a dense Qwen2.5 or Qwen3 model as released")

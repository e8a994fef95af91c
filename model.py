"""The Qwen2 / Qwen2.5 / Qwen3 dense decoder, written out, and its safetensors folders in and out.

Parameter names are the names in the published safetensors files, so loading needs no mapping table and what is saved
loads in `transformers` and vLLM. Read top to bottom: normalisation, rotary positions, cache, attention, feed-forward,
layer, decoder, transformer, folders.

Departures from the published models' own code:
1. A mask may be given as booleans over (query, key), which is how packed groups and the sampler share a prompt.
2. A tied output head is not a parameter: `head_weight` is the embedding matrix itself.
3. Dense models only. Mixture of experts, sliding windows in use and rope scaling are refused by name.
"""
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import WHOLE_FOLDER, InputError, read_json, whole_folder, write_json

# Everything beside the weights that `transformers` and vLLM want to find in a model folder.
CARRIED_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                 "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 at least."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):  # [..., size] -> [..., size]
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary_angles(positions, head_dim, theta, dtype):
    """Cosines and sines [B, 1, T, D] of the rotary angles at `positions` [B, T]; the two halves of D are equal."""
    high = torch.float64 if dtype == torch.float64 else torch.float32
    steps = torch.arange(0, head_dim, 2, device=positions.device, dtype=high) / head_dim  # [D/2]
    angles = positions[:, None, :, None].to(high) * theta ** -steps  # [B, 1, T, D/2]
    angles = torch.cat((angles, angles), dim=-1)  # [B, 1, T, D]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) of x [B, H, T, D] by its position's angle."""
    first, second = x.chunk(2, dim=-1)  # [B, H, T, D/2] each
    return x * cos + torch.cat((-second, first), dim=-1) * sin  # [B, H, T, D]


class KVCache:
    """Keys and values of every layer, [B, Hkv, S, D] each, in buffers that grow by doubling."""

    def __init__(self, layers):
        self.keys, self.values, self.length = [None] * layers, [None] * layers, 0

    def append(self, layer, k, v):
        """Add k, v [B, Hkv, T, D] behind what the layer holds and return all of it, [B, Hkv, S, D] each."""
        start = self.length - k.shape[2]  # `Decoder.forward` has already counted these T
        for buffers, new in ((self.keys, k), (self.values, v)):
            old = buffers[layer]
            if old is None or old.shape[2] < self.length:
                B, H, _, D = new.shape
                buffers[layer] = new.new_empty(B, H, max(64, 2 * self.length), D)
                if old is not None:
                    buffers[layer][:, :, :start] = old[:, :, :start]
            buffers[layer][:, :, start:self.length] = new
        return self.keys[layer][:, :, :self.length], self.values[layer][:, :, :self.length]

    def keep(self, rows):
        """Keep only these batch rows (a long tensor)."""
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                buffers[layer] = old[rows]


class Attention(nn.Module):
    """Grouped-query attention: H query heads share Hkv key/value heads. Biases in Qwen2.x, q/k norms in Qwen3."""

    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim = layer, c["head_dim"]
        heads, kv_heads, hidden = c["num_attention_heads"], c["num_key_value_heads"], c["hidden_size"]
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=c["qkv_bias"])
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=c["qkv_bias"])
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=c["qkv_bias"])
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=c["o_bias"])
        self.q_norm = RMSNorm(self.head_dim, c["rms_norm_eps"]) if c["qk_norm"] else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, c["rms_norm_eps"]) if c["qk_norm"] else nn.Identity()

    def forward(self, x, cos, sin, mask, cache):  # [B, T, hidden] -> [B, T, hidden]
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # [B, H, T, D]
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # [B, Hkv, T, D]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, Hkv, T, D]
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, Hkv, S, D], S >= T
        heads = q.shape[1] // k.shape[1]  # query heads to a key/value head
        if cache is not None and T < k.shape[2]:
            # A decoding step: a few queries, many keys. Let the heads that share keys stand in one matrix product,
            # so that the cache is read once and never repeated in memory.
            q = q.reshape(B, k.shape[1], heads * T, self.head_dim)  # [B, Hkv, H/Hkv * T, D]
            mask = mask.repeat(1, 1, heads, 1)  # [B, 1, H/Hkv * T, S]
            scores = q @ k.transpose(2, 3) * self.head_dim ** -0.5  # [B, Hkv, H/Hkv * T, S]
            scores = scores.masked_fill(~mask, -torch.inf).to(torch.promote_types(v.dtype, torch.float32))
            weights = scores.softmax(-1).to(v.dtype)  # [B, Hkv, H/Hkv * T, S]
            x = (weights @ v).view(B, -1, T, self.head_dim)  # [B, H, T, D]
        else:
            k, v = k.repeat_interleave(heads, dim=1), v.repeat_interleave(heads, dim=1)  # [B, H, S, D]
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)  # [B, H, T, D]
        return self.o_proj(x.transpose(1, 2).reshape(B, T, -1))  # [B, T, hidden]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x):  # [B, T, hidden] -> [B, T, hidden]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, each normalised before and added after."""

    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, mask, cache):  # [B, T, hidden] -> [B, T, hidden]
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers, last norm: ids [B, T] to hidden states [B, T, hidden]."""

    def __init__(self, c):
        super().__init__()
        self.c, self.gradient_checkpointing = c, False
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, input_ids, positions=None, mask=None, cache=None):
        B, T = input_ids.shape
        past = cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(past, past + T, device=input_ids.device).expand(B, T)  # [B, T]
        if mask is None and past:  # causal, behind `past` visible keys
            mask = torch.ones(T, past + T, dtype=torch.bool, device=input_ids.device).tril(past)[None, None]
        if cache is not None:
            cache.length += T
        x = self.embed_tokens(input_ids)  # [B, T, hidden]
        cos, sin = rotary_angles(positions, self.c["head_dim"], self.c["rope_theta"], x.dtype)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, cache, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache)
        return self.norm(x)


class Transformer(nn.Module):
    """A causal language model.

    >>> tiny = {"model_type": "qwen3", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 16,
    ...         "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    >>> model = Transformer(tiny)
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 11])
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.folder = config, None  # as read from config.json; where the tokenizer files are
        c = understood(config, "config")
        self.model = Decoder(c)
        if not c["tie_word_embeddings"]:
            self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    @property
    def head_weight(self):
        """The output head's matrix [V, hidden]; the embedding itself where the two are tied."""
        return self.lm_head.weight if hasattr(self, "lm_head") else self.model.embed_tokens.weight

    def size(self):
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def hidden(self, input_ids, positions=None, mask=None, cache=None):
        """Hidden states [B, T, hidden] after the last norm, before the output head.

        input_ids [B, T] int64 · positions [B, T], default 0, 1, 2 … behind the cache · mask [B, 1, T, S] bool, True
        where a query may see a key, default causal · cache: a `KVCache` that is read and extended.
        """
        return self.model(input_ids, positions, mask, cache)

    def forward(self, input_ids, positions=None, mask=None, cache=None):
        """Logits [B, T, V]; arguments as in `hidden`."""
        return F.linear(self.hidden(input_ids, positions, mask, cache), self.head_weight)

    @torch.no_grad()
    def init_weights(self, seed, std=0.02):
        """Random weights: normal with `std` for matrices, zero biases, norms at one. Returns self."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                p.normal_(0, std, generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        return self

    @staticmethod
    def from_pretrained(folder, dtype=torch.float32, device="cpu"):
        """Load a model folder (config.json and one or many .safetensors) as `dtype` on `device`.

        Tensors go from the file to their place one at a time: memory never holds two copies. Raises InputError for
        anything missing, cut short, of the wrong shape or not supported.
        """
        folder = Path(folder)
        config = read_json(folder / "config.json", WHOLE_FOLDER)
        understood(config, folder / "config.json")
        with torch.device("meta"):
            model = Transformer(config)
        model.folder = folder
        wanted = {name: p.shape for name, p in model.named_parameters()}
        for path, names in shards(folder).items():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in names or file.keys():
                        if name not in wanted:
                            if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
                                continue  # a stored copy of a tied head; a table that is computed here
                            raise InputError(f"{path}: tensor {name} has no place in a {config['model_type']} model")
                        tensor = file.get_tensor(name)
                        if tensor.shape != wanted[name]:
                            raise InputError(f"{path}: {name} is {list(tensor.shape)}, config.json says "
                                             f"{list(wanted[name])}; the folder mixes files of two models")
                        model.place(name, tensor.to(device=device, dtype=dtype, copy=True))
                        del wanted[name]
            except SafetensorError as e:
                raise InputError(f"{path}: not a whole safetensors file ({e}); download or copy it again") from e
        if wanted:
            raise InputError(f"{folder}: no tensor {next(iter(wanted))} in its safetensors files "
                             f"({len(wanted)} missing); download or copy the folder again")
        return model

    def place(self, name, tensor):
        """Make `tensor` the parameter called `name`."""
        module, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(module), leaf, nn.Parameter(tensor))

    def copy(self, dtype):
        """A copy in another precision: sampling from a bfloat16 one need not recast the weights at every token."""
        with torch.device("meta"):
            twin = Transformer(self.config)
        for name, p in self.named_parameters():
            twin.place(name, p.detach().to(dtype, copy=True))
        return twin

    def save_pretrained(self, folder, dtype=None):
        """Write a folder that `transformers` and vLLM load: weights, config.json, and the tokenizer and generation
        files of the folder this model came from. `dtype` None keeps the weights' own. There whole, or not at all."""
        state = {name: p.detach().to("cpu", dtype or p.dtype).contiguous() for name, p in self.named_parameters()}
        name = str(next(iter(state.values())).dtype).removeprefix("torch.")
        config = {k: v for k, v in self.config.items() if k not in ("torch_dtype", "dtype")} | {"torch_dtype": name}
        with whole_folder(folder) as new:
            save_tensors(state, new / "model.safetensors")
            write_json(new / "config.json", config)
            for file in CARRIED_FILES:
                if self.folder is not None and (self.folder / file).exists():
                    shutil.copyfile(self.folder / file, new / file)


def understood(config, where):
    """The settings this file computes with, from a config.json of either generation. InputError for what it cannot."""
    kind = config.get("model_type")
    if "moe" in str(kind) or config.get("num_experts"):
        raise InputError(f"{where}: mixture of experts ({kind}) is not supported; use a dense qwen2 or qwen3 model")
    if kind not in ("qwen2", "qwen3"):
        raise InputError(f"{where}: unknown model_type {kind!r}; supported are qwen2 (Qwen2, Qwen2.5) and qwen3")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise InputError(f"{where}: rope scaling ({rope.get('rope_type', rope.get('type'))}) is not supported; "
                         "the plain model's config.json has none")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise InputError(f"{where}: sliding-window attention in use is not supported; set use_sliding_window to false")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"{where}: hidden_act {config['hidden_act']!r} is not supported, only silu")
    if config.get("quantization_config"):
        raise InputError(f"{where}: quantised weights are not supported; use the bfloat16 release of the model")
    c = {"num_key_value_heads": config.get("num_attention_heads"), "tie_word_embeddings": False,
         "rms_norm_eps": 1e-6} | config
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in needed if key not in c]:
        raise InputError(f"{where}: {missing[0]} is missing; download or copy the folder again")
    c["head_dim"] = c.get("head_dim") or (128 if kind == "qwen3" else c["hidden_size"] // c["num_attention_heads"])
    c["rope_theta"] = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    c["qk_norm"] = kind == "qwen3"
    c["qkv_bias"] = kind == "qwen2" or bool(config.get("attention_bias"))
    c["o_bias"] = kind == "qwen3" and bool(config.get("attention_bias"))
    return c


def shards(folder):
    """The folder's weight files and the tensors to take from each: {path: names, or None for all}."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists():
        if not single.exists():
            raise InputError(f"{folder}: no model.safetensors; only safetensors weights are read (no .bin, no .gguf)")
        return {single: None}
    files = {}
    for name, file in read_json(index).get("weight_map", {}).items():
        files.setdefault(folder / file, []).append(name)
    for path in files:
        if not path.exists():
            raise InputError(f"{path}: missing shard named by {index.name}; download or copy it again")
    return files


def save_tensors(tensors, path):
    """Write {name: tensor} to a .safetensors file and make sure it has reached the disk. OSError when it cannot."""
    Path(path).touch()
    mode = os.stat(path).st_mode  # as the umask has it; safetensors leaves a file that only its owner can read
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        os.chmod(path, mode)
    except SafetensorError as e:  # a full disk arrives as this
        raise OSError(f"{path}: could not be written ({e})") from e
    with open(path, "rb") as file:
        os.fsync(file.fileno())

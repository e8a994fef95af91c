"""The Qwen2 / Qwen2.5 / Qwen3 dense decoder in plain PyTorch, loading and saving.

Parameters have the names of the published safetensors files, so loading needs no mapping table, and a saved folder
loads in `transformers` and vLLM.

Shapes: B rows, T tokens, H query heads, Hkv key/value heads, D head size, V vocabulary size. `c` is the dict of
settings that `read_config` returns.

Departures from the released model code:
1. `mask` says which keys a query sees, so that all responses of a packed group can share one prompt.
2. A tied output head is not a parameter: `head_weight` is the embedding matrix itself.
3. Dense models only. Mixture of experts, sliding windows, rope scaling and quantisation are refused by name.
"""
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from data import MODEL_FOLDER, InputError, atomic_folder, read_json, refuse_on_all, write_json
from data.checkpoints import read_tensors, save_tensors
from data.config import read_config
from shard import parameters, part_of, rank, whole

COPIED_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 or, for float64 x, in float64."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):  # [..., size] -> [..., size]
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary_angles(positions, head_dim, theta, dtype):
    """Cosines and sines [B, 1, T, D] of the rotary angles at positions [B, T]; both halves of D are equal."""
    wide = torch.promote_types(dtype, torch.float32)
    dims = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide)
    frequencies = theta ** -(dims / head_dim)  # [D/2]
    angles = positions[:, None, :, None].to(wide) * frequencies  # [B, 1, T, D/2]
    angles = torch.cat((angles, angles), dim=-1)  # [B, 1, T, D]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotate each pair (x[i], x[i + D/2]) of x [B, H, T, D] by the angle of its position."""
    first, second = x.chunk(2, dim=-1)  # [B, H, T, D/2] each
    return x * cos + torch.cat((-second, first), dim=-1) * sin  # [B, H, T, D]


class Attention(nn.Module):
    """Grouped-query attention: H / Hkv query heads share a key/value head. Qwen3 normalises q and k."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = c["head_dim"]
        hidden = c["hidden_size"]
        q_size = c["num_attention_heads"] * self.head_dim
        kv_size = c["num_key_value_heads"] * self.head_dim
        self.q_proj = nn.Linear(hidden, q_size, bias=c["qkv_bias"])
        self.k_proj = nn.Linear(hidden, kv_size, bias=c["qkv_bias"])
        self.v_proj = nn.Linear(hidden, kv_size, bias=c["qkv_bias"])
        self.o_proj = nn.Linear(q_size, hidden, bias=c["o_bias"])
        norm = RMSNorm if c["qk_norm"] else nn.Identity  # Identity ignores its arguments
        self.q_norm = norm(self.head_dim, c["rms_norm_eps"])
        self.k_norm = norm(self.head_dim, c["rms_norm_eps"])

    def forward(self, x, cos, sin, attend):  # [B, T, hidden] -> [B, T, hidden]
        B, T, _ = x.shape
        shape = (B, T, -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(shape))  # [B, T, H, D]
        k = self.k_norm(self.k_proj(x).view(shape))  # [B, T, Hkv, D]
        v = self.v_proj(x).view(shape).transpose(1, 2)  # [B, Hkv, T, D]
        # Under autocast v is bfloat16, but the norms and the rotation return float32.
        q = rotate(q.transpose(1, 2), cos, sin).to(v.dtype)  # [B, H, T, D]
        k = rotate(k.transpose(1, 2), cos, sin).to(v.dtype)  # [B, Hkv, T, D]
        return self.o_proj(attend(q, k, v).transpose(1, 2).reshape(B, T, -1))


def attention(q, k, v, mask=None):
    """Attention [B, H, T, D] of q [B, H, T, D] over k, v [B, Hkv, S, D].

    mask: bool, broadcast to [B, H, T, S]; a BlockMask, in compiled layers on a GPU; None: causal
    """
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    grouped = q.device.type == "cpu"  # elsewhere a mask with enable_gqa falls back to a slow kernel
    if not grouped:
        repeats = q.shape[1] // k.shape[1]  # query heads per key/value head
        k = k.repeat_interleave(repeats, dim=1)  # [B, H, S, D]
        v = v.repeat_interleave(repeats, dim=1)  # [B, H, S, D]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c):
        super().__init__()
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):  # [B, T, hidden] -> [B, T, hidden]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c):
        super().__init__()
        size = (c["hidden_size"], c["rms_norm_eps"])
        self.input_layernorm = RMSNorm(*size)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(*size)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, attend):  # [B, T, hidden] -> [B, T, hidden]
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and last norm: ids [B, T] to hidden states [B, T, hidden]."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.gradient_checkpointing = False
        self.compiled = False
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, input_ids, positions, mask, cache):
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # [1, T]
        x = self.embed_tokens(input_ids)  # [B, T, hidden]
        cos, sin = rotary_angles(positions, self.c["head_dim"], self.c["rope_theta"], x.dtype)
        for i, layer in enumerate(self.layers):
            attend = cache.attention(i) if cache else partial(attention, mask=mask)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend)
        return self.norm(x)

    def compile_layers(self):
        """torch.compile the layers, on a GPU. Takes up to a minute at the first batches; rounds differently."""
        self.compiled = True
        torch._dynamo.config.recompile_limit = 64  # one limit for the layers of all models
        for layer in self.layers:
            layer.compile(dynamic=True)


class Transformer(nn.Module):
    """A causal language model. config: the content of a config.json; folder: the model folder, if any.

    >>> tiny = {"model_type": "qwen3", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 16,
    ...         "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    >>> model = Transformer(tiny)
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 11])
    """

    def __init__(self, config, folder=None):
        super().__init__()
        self.config = config
        self.folder = folder
        c = read_config(config, folder / "config.json" if folder else "config")
        self.model = Decoder(c)
        if not c["tie_word_embeddings"]:
            self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    @property
    def head_weight(self):
        """The matrix [V, hidden] of the output head: the embedding matrix if the two are tied."""
        return getattr(self, "lm_head", self.model.embed_tokens).weight

    def hidden_states(self, input_ids, positions=None, mask=None, cache=None):
        """Hidden states [B, T, hidden] after the last norm, before the output head.

        input_ids: int64 [B, T]
        positions: int64 [B, T]; by default 0 ... T - 1
        mask: bool [B, 1, T, T], True where a query may see a key, or a BlockMask; by default causal
        cache: a `KVCache` (kv_cache.py), which then does the masking; `mask` is ignored
        """
        return self.model(input_ids, positions, mask, cache)

    def forward(self, input_ids, positions=None, mask=None, cache=None):
        """Logits [B, T, V]. The arguments are those of `hidden_states`."""
        hidden = self.hidden_states(input_ids, positions, mask, cache)  # [B, T, hidden]
        return F.linear(hidden, self.head_weight)

    def num_parameters(self):
        """Number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def init_weights(self, seed, std=0.02):
        """Set random weights and return self: matrices normal with `std`, biases 0, norm weights 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                p.normal_(0, std, generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        return self

    @staticmethod
    def from_pretrained(folder, dtype=torch.float32, device="cpu", shard=None):
        """Load a model folder: config.json and one or several .safetensors files.

        shard: from `train.sharding`, to keep this rank's part of each tensor only

        Tensors are read, cast and moved one at a time, so memory never holds two copies of the model.
        InputError: a file is missing or cut short, a tensor has a wrong shape, the model is not supported.
        """
        folder = Path(folder)
        config = read_json(folder / "config.json", MODEL_FOLDER)
        with torch.device("meta"):
            model = Transformer(config, folder)
        if shard:
            shard(model)
        known = dict(model.named_parameters())
        state = {}
        for path, name, tensor in read_tensors(folder, known):
            shape = known[name].shape
            if tensor.shape != shape:
                raise InputError(f"{path}: {name} is {list(tensor.shape)}, config.json says "
                                 f"{list(shape)}; the folder mixes files of two models")
            tensor = tensor.to(device=device, dtype=dtype, copy=True)
            state[name] = part_of(tensor, known[name])
        if missing := sorted(known.keys() - state.keys()):
            raise InputError(f"{folder}: no tensor {missing[0]} in its safetensors files "
                             f"({len(missing)} missing); download or copy the folder again")
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder, dtype=None):
        """Write a folder that `transformers` and vLLM load, with COPIED_FILES if any. Written atomically, by rank 0."""
        if self.folder and not self.folder.exists():
            refuse_on_all(f"{self.folder}: is gone, and with it the tokenizer; "
                          "restore it, and use --resume")
        config = dict(self.config)
        config["torch_dtype"] = str(dtype or self.head_weight.dtype).removeprefix("torch.")
        config.pop("dtype", None)  # the newer name of torch_dtype
        with nullcontext() if rank() > 0 else atomic_folder(folder) as new:
            save_tensors(parameters(self), new and new / "model.safetensors", dtype)
            if rank() > 0:
                return
            write_json(new / "config.json", config)
            for file in COPIED_FILES:
                if self.folder and (self.folder / file).exists():
                    shutil.copyfile(self.folder / file, new / file)

    def in_dtype(self, dtype):
        """This model if it is whole and in this dtype, else a whole copy: decoding must not cast or gather weights at
        every token."""
        if self.head_weight.dtype == dtype and not hasattr(self, "reshard"):
            return self
        with torch.device("meta"):
            model = Transformer(self.config)
        state = {name: whole(p.to(dtype, copy=True)) for name, p in self.state_dict().items()}
        model.load_state_dict(state, assign=True)
        return model

    @torch.no_grad()
    def copy_weights(self, other):
        """Copy the weights of another model into this one, in place. A no-op if it is this model."""
        for p, new in zip(self.parameters(), parameters(other).values()):
            if p is not new:
                p.copy_(whole(new.to(p.dtype)))

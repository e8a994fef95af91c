"""The decoder against transformers, cached against uncached decoding, and reading and saving model folders."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import InputError
from data.config import DEFAULTS, SIZES, read_config
from kv_cache import KVCache, lay_out
from model import Transformer

BASE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
# Every family and every setting. `rope_theta` is at top level or, in newer files, inside `rope_parameters`.
KNOBS = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen2 separate head": {"model_type": "qwen2", "tie_word_embeddings": False, "rope_theta": 1e4},
    "qwen2.5 new config": {"model_type": "qwen2", "tie_word_embeddings": True,
                           "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    "qwen2 multi-query, eps": {"model_type": "qwen2", "num_key_value_heads": 1, "rms_norm_eps": 1e-5},
    "qwen2 full heads": {"model_type": "qwen2", "num_key_value_heads": 4, "use_sliding_window": False,
                         "sliding_window": 16},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3 wide head, separate": {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": False},
    "qwen3 biases": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
    "qwen3 new config": {"model_type": "qwen3", "head_dim": 8,
                         "rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}},
}


def random_model(knob, std=0.3):
    """A model with random biases and norm weights too: zeros and ones would hide errors."""
    model = Transformer(BASE | KNOBS[knob]).init_weights(0, std)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("knob", KNOBS)
def test_logits_equal_transformers_and_a_saved_folder_loads_there(knob, ids, tmp_path):
    transformers = pytest.importorskip("transformers", reason="reference implementation: requirements-dev.txt")
    model = random_model(knob)
    model.save_pretrained(tmp_path / "saved")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        expected = reference(ids).logits
        assert (model(ids) - expected).abs().max() <= 1e-4
        assert expected.abs().max() > 1  # the comparison is not of logits near zero
    # A folder that transformers saves, with its newer config.json, loads here.
    reference.save_pretrained(tmp_path / "reference")
    loaded = Transformer.from_pretrained(tmp_path / "reference")
    with torch.no_grad():
        assert (loaded(ids) - expected).abs().max() <= 1e-4


def test_real_weights_equal_transformers(tmp_path):
    folder = os.environ.get("STAR_REAL_MODEL")
    if not folder:
        pytest.skip("set STAR_REAL_MODEL to a real Qwen folder")
    transformers = pytest.importorskip("transformers")
    text_ids = torch.randint(0, 150_000, (2, 64), generator=torch.Generator().manual_seed(3))
    model = Transformer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(text_ids)
        expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(text_ids).logits
        assert (logits - expected).abs().max() <= 1e-4
        del expected
        model.save_pretrained(tmp_path / "saved")
        reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        assert (reloaded(text_ids).logits - logits).abs().max() <= 1e-4
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").encode("a <tool_call> b")


@pytest.mark.parametrize("knob", ["qwen2", "qwen3"])
@pytest.mark.parametrize("shared", [[0, 0, 0, 1, 1], [2, 0, 1, 0, 2], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("attend", [KVCache.two_softmaxes, KVCache.one_softmax])  # of a CPU, of a GPU
def test_cached_steps_equal_whole_rows(knob, shared, attend, ids, monkeypatch):
    """Prompts of 0, 9 and 33 tokens, the last two computed together; five responses share them and start one by one."""
    monkeypatch.setattr(KVCache, "two_softmaxes", attend)
    model = random_model(knob).double()
    cache = KVCache(model, prompt_rows=3, prompt_tokens=34, response_rows=5, response_tokens=40)
    for buffer in (*cache.prompts, *cache.responses):
        buffer.normal_(0, 100)  # what lies in a row before its sequence
    prompts = [ids[0, :0], ids[1, :9], ids[2, :33]]
    g = torch.Generator().manual_seed(0)
    responses = torch.randint(0, 90, (5, 40), generator=g)
    with torch.no_grad():
        cache.start_prompts(1)
        model(torch.stack((ids[1, :33], ids[2, :33])), cache=cache)
        lengths = [0] * 5
        for step in range(36):
            rows = min(5, 1 + step // 3)
            grid, columns = lay_out(shared[:rows])
            prompt_lengths = [len(prompts[p]) for p in shared[:rows]]
            places = torch.tensor([shared[:rows], columns, prompt_lengths, lengths[:rows]])
            cache.start_step(torch.tensor(grid), places, 34, max(lengths) + 1)
            at = torch.tensor(lengths[:rows])
            positions = torch.tensor([len(prompts[p]) for p in shared[:rows]]) + at
            new = responses[range(rows), at]
            logits = model(new[:, None], positions[:, None], cache=cache)[:, 0]
            for row in range(rows):
                lengths[row] += 1
                whole = torch.cat((prompts[shared[row]], responses[row, :lengths[row]]))
                assert torch.allclose(logits[row], model(whole[None])[0, -1], atol=1e-9), (step, row)


def test_weights_are_copied_in_place():
    model, other = random_model("qwen3"), random_model("qwen3").bfloat16()
    with torch.no_grad():
        other.head_weight.fill_(1.0)
    storage = [p.data_ptr() for p in other.parameters()]
    other.copy_weights(model)
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q.bfloat16())
    assert [p.data_ptr() for p in other.parameters()] == storage
    model.copy_weights(model)


def test_gradient_checkpointing_changes_no_gradient(ids):
    grads = []
    for flag in (False, True):
        model = random_model("qwen3").double()
        model.model.gradient_checkpointing = flag
        model(ids).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_autocast_keeps_float32_masters_and_stays_close(ids):
    model = random_model("qwen3", std=0.1)
    with torch.no_grad():
        exact = model(ids).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden_states(ids)
    hidden.float().square().mean().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for n, p in model.named_parameters() if p.grad is not None)
    close = (hidden.float() @ model.head_weight.T).softmax(-1)
    assert 0 < (close - exact).abs().max() < 0.05


def test_several_shards_and_a_folder_round_trip(tmp_path, ids):
    from safetensors.torch import save_file
    model = random_model("qwen3 wide head, separate")
    model.save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "tokenizer.json").write_text("{}")
    state = {name: p.detach() for name, p in model.named_parameters()}
    names = sorted(state)
    sharded = tmp_path / "many"
    sharded.mkdir()
    (sharded / "config.json").write_text(json.dumps(model.config))
    weight_map = {}
    for i in range(3):
        save_file({n: state[n] for n in names[i::3]}, sharded / f"model-{i}.safetensors")
        weight_map |= {n: f"model-{i}.safetensors" for n in names[i::3]}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with torch.no_grad():
        assert torch.equal(Transformer.from_pretrained(sharded)(ids), model(ids))
        save_file({name: tensor + 1 for name, tensor in state.items()}, sharded / "model.safetensors")
        assert not torch.equal(Transformer.from_pretrained(sharded)(ids), model(ids))  # one file goes before shards
        reloaded = Transformer.from_pretrained(tmp_path / "one")
        assert torch.equal(reloaded(ids), model(ids))
    reloaded.save_pretrained(tmp_path / "two", torch.bfloat16)
    assert (tmp_path / "two" / "tokenizer.json").exists()  # copied
    assert json.loads((tmp_path / "two" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert Transformer.from_pretrained(tmp_path / "two", dtype=torch.bfloat16).head_weight.dtype == torch.bfloat16
    assert len({path.stat().st_mode for path in (tmp_path / "two").iterdir()}) == 1  # the same permissions
    reloaded.save_pretrained(tmp_path / "two")  # replaces an existing folder
    assert not (tmp_path / "two.star-tmp").exists()
    (tmp_path / "one").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="one: is gone, and with it the tokenizer"):
        reloaded.save_pretrained(tmp_path / "two")


def test_loading_never_holds_two_copies(tmp_path):
    """The peak of a process's private memory while it loads a model is little more than one copy.

    Mapped pages of the file do not count: they are the system's cache, which it may drop at any time.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    big = {"model_type": "qwen3", "vocab_size": 12_000, "hidden_size": 512, "intermediate_size": 2048, "head_dim": 32,
           "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
    model = Transformer(big).init_weights(0)
    model.save_pretrained(tmp_path / "big")
    random_model("qwen3").save_pretrained(tmp_path / "small")
    code = f"""
import threading, time, torch
from model import Transformer
own = lambda: int([l for l in open('/proc/self/status') if l.startswith('RssAnon')][0].split()[1]) * 1024
Transformer.from_pretrained({str(tmp_path / 'small')!r})(torch.zeros(1, 4, dtype=torch.long))  # imports, threads
before, samples, loading = own(), [], True
def watch():
    while loading:
        samples.append(own()); time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
model = Transformer.from_pretrained({str(tmp_path / 'big')!r})
loading = False; thread.join(); samples.append(own())
print((max(samples) - before) / {model.num_parameters() * 4})
"""
    assert 0.8 < float(subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parents[1])) < 1.3


REFUSED = {
    "mixture of experts": {"model_type": "qwen3_moe", "num_experts": 8},
    "model_type 'llama'": {"model_type": "llama"},
    "sliding-window": {"model_type": "qwen2", "use_sliding_window": True},
    "sliding-window attention": {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
    "rope scaling (yarn)": {"model_type": "qwen3", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "rope scaling (linear)": {"model_type": "qwen2", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope scaling (dynamic)": {"model_type": "qwen3", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
    "hidden_act": {"model_type": "qwen3", "hidden_act": "gelu"},
    "quantised": {"model_type": "qwen3", "quantization_config": {"quant_method": "gptq"}},
}


@pytest.mark.parametrize("words", REFUSED)
def test_unsupported_models_are_refused_by_name(words):
    with pytest.raises(InputError) as error:
        read_config(BASE | REFUSED[words], "somewhere/config.json")
    assert words in str(error.value) and "somewhere/config.json" in str(error.value)


@pytest.mark.parametrize("size", SIZES)
def test_config_without_a_size_is_refused(size):
    config = BASE | KNOBS["qwen3"]
    del config[size]
    with pytest.raises(InputError, match=f"somewhere/config.json: .* without {size} "):
        read_config(config, "somewhere/config.json")


def test_tensor_that_the_config_does_not_name_is_refused(tmp_path):
    random_model("qwen3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(InputError, match=r"tensor model.layers.1\.\S+ does not fit config.json; download"):
        Transformer.from_pretrained(tmp_path)


def test_null_in_the_rotary_settings_is_the_default():
    config = {"model_type": "qwen3", "rope_parameters": {"rope_theta": None, "rope_type": None}}
    sizes = dict.fromkeys(SIZES, 2)
    assert read_config(config | sizes, "config")["rope_theta"] == DEFAULTS["rope_theta"]


def test_rope_scaling_beside_rope_parameters_is_not_overlooked():
    config = {**random_model("qwen3").config, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    read_config(config, "config.json")
    with pytest.raises(InputError, match="yarn"):
        read_config(config | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "config.json")


def test_large_scores_are_not_rounded_to_bfloat16_while_decoding():
    """Scores above 1,000, as Qwen2.5 has: close to torch's attention, which keeps them in float32."""
    model = random_model("qwen3").bfloat16()
    cache = KVCache(model, 1, 8, 4, 40)
    c = model.model.c
    r = torch.Generator().manual_seed(0)
    q = torch.randn(4, c["num_attention_heads"], 1, c["head_dim"], generator=r).mul(40).bfloat16()
    k, v = torch.randn(2, 4, c["num_key_value_heads"], 40, c["head_dim"], generator=r).bfloat16()
    k = k * 40
    cache.responses[0][0], cache.responses[0][1] = k, v
    grid, columns = lay_out([0] * 4)
    places = torch.tensor([[0] * 4, columns, [0] * 4, [39] * 4])
    cache.start_step(torch.tensor(grid), places, 8, 40)
    out = cache.attention(0)(q, k[:, :, 39:], v[:, :, 39:])
    scores = torch.repeat_interleave(k.double(), q.shape[1] // k.shape[1], 1) @ q.double().mT * c["head_dim"] ** -0.5
    assert scores.abs().max() > 1000
    values = torch.repeat_interleave(v.double(), q.shape[1] // k.shape[1], 1)
    expected = (scores.mT.softmax(-1) @ values)
    assert (out.double() - expected).abs().max() < 0.02

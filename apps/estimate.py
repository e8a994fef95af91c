"""How much memory and time the stages take on GPUs, from two model folders: `python star.py estimate`.

Memory is computed, and tests/test_estimate.py compares it with what runs on a CPU allocate. Two speeds were measured
on one H200 (tests/README.md, *A GPU*): operations a second in training, bytes a second in decoding.

All sizes below are in bytes. h: hidden size, i: size inside the feed-forward, q and kv: sizes of queries and keys.
"""
from pathlib import Path

import torch

from data import MODEL_FOLDER, InputError, non_negative, number, positive, print_table, read_json
from head import CHUNK, GPU_CHUNK
from model import Transformer
from sampler import LOGITS_AT_ONCE, PREFILL_TOKENS, Request, cache_size


def read_sizes(folder):
    """The settings of a model folder, and its numbers of weights: all, the head's, the embeddings', the layers'."""
    folder = Path(folder)
    with torch.device("meta"):
        model = Transformer(read_json(folder / "config.json", MODEL_FOLDER), folder)
    c = dict(model.model.c)
    c["weights"] = model.num_parameters()
    c["head"] = model.head_weight.numel()
    c["embeddings"] = c["head"] * (1 if c["tie_word_embeddings"] else 2)
    c["in_layers"] = c["weights"] - c["embeddings"]
    c["q"] = c["num_attention_heads"] * c["head_dim"]
    c["kv"] = c["num_key_value_heads"] * c["head_dim"]
    return c


def activations(c, args, gpus):
    """Bytes that one layer keeps of a token for the backward pass, counted in autograd. Compiled: three outputs of the
    feed-forward; the factors 7 and 5 are fitted to the peaks of two model sizes in bfloat16 on an H200."""
    h, i, q, kv = c["hidden_size"], c["intermediate_size"], c["q"], c["kv"]
    if args.compile:
        return (7 * h + 6 * i + 5 * (q + 2 * kv)) * width_of(args) / 2
    row = min(args.prompt_tokens + args.n * args.response_tokens, args.micro_batch_tokens)  # of SDPA's additive mask
    if args.dtype == "float32":
        return 24 * h + 16 * i + 16 * (q + kv) + 4 * row
    # Between layers, states are in bfloat16 if sharded weights are gathered in it; autocast keeps them in float32.
    return (26 if gpus == 1 else 18) * h + 8 * i + 10 * (q + kv) + 2 * row


def width_of(args):
    """Bytes of a number in --dtype."""
    return getattr(torch, args.dtype).itemsize


def training_memory(c, args, gpus):
    """{part: size} of the model that trains, at its peak: in the head, in the backward pass of a layer, or at the end
    of the forward pass. "peak" is what this needs for a moment, beside the other parts."""
    width = width_of(args)
    tokens = args.micro_batch_tokens
    on_gpu = args.device == "cuda"
    layer = c["in_layers"] / c["num_hidden_layers"]
    per_layer = kept = activations(c, args, gpus)
    sharded = gpus > 1
    autocast = width < 4 and not sharded  # makes copies of the weights, which are float32
    copies = width * c["in_layers"] if autocast else 0
    parts = {"weights": 16 * c["weights"] / ranks_per_copy(args, gpus)}  # float32: weight, gradient, two moments
    # The head's gradient, its weight in --dtype, on a GPU a product; logits and what is made of them.
    head = (4 + width * autocast + width * on_gpu) * c["head"]
    head += 20 * (GPU_CHUNK if on_gpu else CHUNK) * c["vocab_size"]
    # The head's gradient twice; of a layer, gradients of the states; if sharded, two gathered layers and gradients.
    backward = 8 * c["head"] + (8 * c["hidden_size"] + 2 * width * c["intermediate_size"]) * tokens
    backward += 2 * (width + 4) * layer * sharded
    forward = 0
    if args.gradient_checkpointing:  # a layer keeps its input, and no copies
        kept = (2 if width < 4 and sharded else 4) * c["hidden_size"]
        backward += per_layer * tokens
        forward, copies = copies, 0
    parts["copies"] = copies + width * c["embeddings"] * sharded  # these stay gathered
    parts["activations"] = kept * c["num_hidden_layers"] * tokens
    parts["peak"] = max(forward, head, backward)
    return parts


def ranks_per_copy(args, gpus):
    """The number of GPUs that share a copy of the weights."""
    return min(gpus, args.shard_ranks or gpus)


def frozen_memory(c, args, gpus):
    """Bytes of a model that is not trained: teacher or reference. When sharded, its embeddings stay gathered."""
    return width_of(args) * (c["weights"] / ranks_per_copy(args, gpus) + c["embeddings"] * (gpus > 1))


def sampling_memory(c, args):
    """{part: size} of the sampler: weights, keys and values, and a layer of a prefill or the logits of a draw."""
    width = width_of(args)
    request = Request([0] * args.max_prompt_tokens, args.n, 0, 1.0, args.max_new_tokens)
    slots, prompts, prompt_tokens, new_tokens = cache_size(args.max_concurrent, [request] * args.max_concurrent)
    tokens = prompts * prompt_tokens + slots * new_tokens
    layer = 2 * c["hidden_size"] + 3 * c["intermediate_size"] + c["q"] + 2 * c["kv"]  # numbers a token
    prefill = width * layer * max(PREFILL_TOKENS, prompt_tokens)
    logits = slots * c["vocab_size"]
    draw = 24 * logits if args.device == "cuda" else 24 * min(logits, LOGITS_AT_ONCE) + width * logits
    return {"copies": width * c["weights"], "keys": 2 * width * c["num_hidden_layers"] * c["kv"] * tokens,
            "peak": max(prefill, draw)}


def stage_memory(stage, student, teacher, args, gpus):
    """{part: size} of a stage on each GPU."""
    if stage == "rollout":
        return sampling_memory(teacher, args)
    model = teacher if stage == "refine" else student
    parts = training_memory(model, args, gpus)
    if stage == "ckd":
        return parts | {"frozen": frozen_memory(teacher, args, gpus)}
    sampler = sampling_memory(model, args)  # its peak is over when training begins
    if args.dtype != "float32" or gpus > 1:  # otherwise the model that trains samples itself
        parts["copies"] += sampler["copies"]
    return parts | {"keys": sampler["keys"], "frozen": frozen_memory(model, args, gpus)}


def forward_operations(c, args, prompts):
    """Operations of a forward pass over packed groups: 2 per weight and token, 4 per query, key, head and dimension."""
    prompt, response, n = args.prompt_tokens, args.response_tokens, args.n
    pairs = prompt ** 2 / 2 + n * response * (prompt + response / 2)
    weights = c["in_layers"] * (prompt + n * response) + c["head"] * n * response
    return prompts * (2 * weights + 4 * pairs * c["num_hidden_layers"] * c["q"])


def sampling_hours(c, args, prompts):
    """Hours to sample n responses to each prompt on one GPU: a step reads the weights and the keys of all slots; the
    prompts pass through the layers only."""
    slots = args.max_concurrent
    width = width_of(args)
    tokens = slots * (args.prompt_tokens / args.n + args.response_tokens / 2)  # read at each step
    keys = 2 * width * c["num_hidden_layers"] * c["kv"] * tokens
    steps = prompts * args.n * args.response_tokens / slots
    prefill = prompts * args.prompt_tokens * 2 * c["in_layers"] / args.tflops / 1e12
    return (steps * (width * (c["in_layers"] + c["head"]) + keys) / args.bandwidth / 1e12 + prefill) / 3600


def stage_hours(stage, student, teacher, args):
    """Hours of a stage on one GPU."""
    if stage == "rollout":
        return sampling_hours(teacher, args, args.prompts)
    backward = 3 if args.gradient_checkpointing else 2
    if stage == "ckd":
        operations = (1 + backward) * forward_operations(student, args, args.prompts)
        operations += forward_operations(teacher, args, args.prompts)
        return operations / args.tflops / 1e12 / 3600
    model = teacher if stage == "refine" else student
    prompts = args.steps * args.prompts_per_step
    # A pass for the reference, and one for pi_old, which the first update of a step does without.
    operations = (3 + backward) * forward_operations(model, args, prompts)
    return operations / args.tflops / 1e12 / 3600 + sampling_hours(model, args, args.draws * prompts)


def estimate_flags(parser):
    parser.add_argument("--student", required=True, help="model folder; only its config.json is read")
    parser.add_argument("--teacher", required=True, help="the same")
    parser.add_argument("--gpus", type=positive, nargs="+", default=[1, 8], metavar="N", help="numbers of GPUs")
    parser.add_argument("--shard-ranks", type=positive, metavar="N", help="GPUs that share a copy; default: all")
    add = parser.add_argument_group("data").add_argument
    add("--prompts", type=positive, default=128_000, help="one epoch of rollout and ckd")
    add("--n", type=positive, default=8, help="responses to a prompt")
    add("--prompt-tokens", type=positive, default=600, help="mean tokens of a prompt")
    add("--response-tokens", type=positive, default=250, help="mean tokens of a response")
    add("--steps", type=positive, default=1000, help="steps of simrl")
    add("--prompts-per-step", type=positive, default=128, help="as in simrl")
    add("--draws", type=non_negative, default=2.0, help="prompts that simrl samples for each one that it trains on")
    add = parser.add_argument_group("memory, as in the stages").add_argument
    add("--micro-batch-tokens", type=positive, default=4096, metavar="N", help="padded tokens per forward pass")
    add("--gradient-checkpointing", action="store_true", help="recompute activations")
    add("--compile", action="store_true", help="with fused layers")
    add("--max-concurrent", type=positive, default=64, metavar="N", help="sequences generated concurrently")
    add("--max-prompt-tokens", type=positive, default=5120, help="longest prompt")
    add("--max-new-tokens", type=positive, default=512, help="longest response")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="the output head's chunks differ")
    add = parser.add_argument_group("speed").add_argument
    add("--tflops", type=number(float, 1e-6), default=250.0, help="10^12 operations a second in training")
    add("--bandwidth", type=number(float, 1e-6), default=0.6, help="TB a second that a decoding step reads")


def run_estimate(args):
    """Memory on each GPU and hours of every stage, computed from two model folders. Hours are divided by the GPUs:
    communication between them is not counted."""
    if bad := [gpus for gpus in args.gpus if gpus % ranks_per_copy(args, gpus)]:
        raise InputError(f"--shard-ranks {args.shard_ranks}: must divide --gpus {bad[0]}")
    student, teacher = read_sizes(args.student), read_sizes(args.teacher)
    columns = ("weights", "copies", "activations", "peak", "keys", "frozen")
    for gpus in args.gpus:
        print(f"\n{gpus} GPU{'s' * (gpus > 1)}; GB on each, and hours\n")
        rows = [["", *columns, "all", "hours"]]
        for stage in ("rollout", "ckd", "simrl", "refine"):
            parts = stage_memory(stage, student, teacher, args, gpus)
            sizes = [parts.get(name, 0) for name in columns]
            hours = stage_hours(stage, student, teacher, args) / gpus
            rows.append([stage, *(f"{size / 1e9:.1f}" for size in (*sizes, sum(sizes))), f"{hours:.1f}"])
        print_table(rows)
    print("\nrefine is simrl of the teacher. frozen: the teacher of ckd, the reference of simrl. "
          "peak: what the head, a layer or a draw needs for a moment. "
          "hours of rollout and ckd: one pass over the prompts")

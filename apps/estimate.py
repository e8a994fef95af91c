"""How much memory and time the stages take on GPUs, from two model folders: `python star.py estimate`.

Memory is computed, and tests/test_estimate.py compares it with what runs on a CPU allocate. Two speeds were measured
on one H200 (tests/README.md, *A GPU*): operations a second in training, bytes a second in decoding.

All sizes below are in bytes. h: hidden size, i: size inside the feed-forward, q and kv: sizes of queries and keys.
"""
from pathlib import Path
from types import SimpleNamespace

import torch

from data import MODEL_FOLDER, InputError, non_negative, number, positive, print_table, read_json
from head import CHUNK, GPU_CHUNK
from model import Transformer
from sampler import LOGITS_AT_ONCE, PREFILL_TOKENS, Request, cache_size

WIDTH = {"bfloat16": 2, "float32": 4}  # bytes of a number in --dtype


def read_sizes(folder):
    """Sizes of a model folder, and its numbers of weights: all, the head's, the embeddings', the layers'."""
    folder = Path(folder)
    with torch.device("meta"):
        model = Transformer(read_json(folder / "config.json", MODEL_FOLDER), folder)
    c = model.model.c
    head = model.head_weight.numel()
    embeddings = head if c["tie_word_embeddings"] else 2 * head
    weights = model.num_parameters()
    return SimpleNamespace(
        weights=weights, head=head, embeddings=embeddings, in_layers=weights - embeddings,
        layers=c["num_hidden_layers"], vocab=c["vocab_size"], h=c["hidden_size"], i=c["intermediate_size"],
        q=c["num_attention_heads"] * c["head_dim"], kv=c["num_key_value_heads"] * c["head_dim"])


def activations(c, args, gpus):
    """Bytes that one layer keeps of a token for the backward pass, counted in autograd. Compiled: three
    outputs of the feed-forward; 7 and 5 are fitted to the peaks of two model sizes in bfloat16 on an H200."""
    if args.compile:
        return (7 * c.h + 6 * c.i + 5 * (c.q + 2 * c.kv)) * WIDTH[args.dtype] / 2
    # The width of a row of SDPA's additive mask.
    row = min(args.prompt_tokens + args.n * args.response_tokens, args.micro_batch_tokens)
    if args.dtype == "float32":
        return 24 * c.h + 16 * c.i + 16 * (c.q + c.kv) + 4 * row
    # Between layers, states are in bfloat16 if sharded weights are gathered in it; autocast keeps float32.
    return (26 if gpus == 1 else 18) * c.h + 8 * c.i + 10 * (c.q + c.kv) + 2 * row


def training_memory(c, args, gpus):
    """{part: size} of the model that trains, at its peak: in the head, in the backward pass of a layer, or at
    the end of the forward pass. "peak" is what this needs for a moment, beside the other parts."""
    width, tokens = WIDTH[args.dtype], args.micro_batch_tokens
    on_gpu = args.device == "cuda"
    sharded = gpus > 1
    autocast = width < 4 and not sharded  # makes copies of the weights, which are float32
    kept = activations(c, args, gpus)
    copies = width * c.in_layers * autocast
    # The head's gradient, its weight in --dtype, on a GPU a product; logits and what is made of them.
    head = (4 + width * autocast + width * on_gpu) * c.head + 20 * (GPU_CHUNK if on_gpu else CHUNK) * c.vocab
    # The head's gradient twice; gradients of a layer's states; if sharded, two gathered layers and gradients.
    backward = 8 * c.head + (8 * c.h + 2 * width * c.i) * tokens
    backward += 2 * (width + 4) * c.in_layers / c.layers * sharded
    forward = 0
    if args.gradient_checkpointing:  # a layer keeps its input, and no copies
        backward += kept * tokens
        kept = (2 if width < 4 and sharded else 4) * c.h
        forward, copies = copies, 0
    return {
        "weights": 16 * c.weights / ranks_per_copy(args, gpus),  # float32: weight, gradient, two moments
        "copies": copies + width * c.embeddings * sharded,  # these stay gathered
        "activations": kept * c.layers * tokens,
        "peak": max(forward, head, backward)}


def ranks_per_copy(args, gpus):
    """The number of GPUs that share a copy of the weights."""
    return min(gpus, args.shard_ranks or gpus)


def sampling_memory(c, args):
    """{part: size} of the sampler: weights, keys and values, a layer of a prefill or the logits of a draw."""
    width = WIDTH[args.dtype]
    request = Request([0] * args.max_prompt_tokens, args.n, 0, 1.0, args.max_new_tokens)
    requests = [request] * args.max_concurrent
    slots, prompts, prompt_tokens, new_tokens = cache_size(args.max_concurrent, requests)
    layer = 2 * c.h + 3 * c.i + c.q + 2 * c.kv  # numbers a token
    prefill = width * layer * max(PREFILL_TOKENS, prompt_tokens)
    logits = slots * c.vocab
    draw = 24 * logits if args.device == "cuda" else 24 * min(logits, LOGITS_AT_ONCE) + width * logits
    keys = 2 * width * c.layers * c.kv * (prompts * prompt_tokens + slots * new_tokens)
    return {"copies": width * c.weights, "keys": keys, "peak": max(prefill, draw)}


def stage_memory(stage, student, teacher, args, gpus):
    """{part: size} of a stage on each GPU."""
    if stage == "rollout":
        return sampling_memory(teacher, args)
    model = teacher if stage == "refine" else student
    parts = training_memory(model, args, gpus)
    if stage != "ckd":
        sampler = sampling_memory(model, args)  # its peak is over when training begins
        parts["keys"] = sampler["keys"]
        if args.dtype != "float32" or gpus > 1:  # otherwise the model that trains samples itself
            parts["copies"] += sampler["copies"]
    frozen = teacher if stage == "ckd" else model  # if sharded, its embeddings stay gathered
    numbers = frozen.weights / ranks_per_copy(args, gpus) + frozen.embeddings * (gpus > 1)
    return parts | {"frozen": WIDTH[args.dtype] * numbers}


def training_hours(c, args, prompts, passes):
    """Hours of this many forward passes over packed groups, on one GPU: 2 operations per weight and token, 4
    per query, key, head and dimension."""
    prompt, response, n = args.prompt_tokens, args.response_tokens, args.n
    pairs = prompt ** 2 / 2 + n * response * (prompt + response / 2)
    weights = c.in_layers * (prompt + n * response) + c.head * n * response
    return passes * prompts * (2 * weights + 4 * pairs * c.layers * c.q) / args.tflops / 1e12 / 3600


def sampling_hours(c, args, prompts):
    """Hours to sample n responses to each prompt on one GPU: a step reads the weights and the keys of all
    slots; the prompts pass through the layers only."""
    width, slots = WIDTH[args.dtype], args.max_concurrent
    tokens = slots * (args.prompt_tokens / args.n + args.response_tokens / 2)  # read at each step
    keys = 2 * width * c.layers * c.kv * tokens
    steps = prompts * args.n * args.response_tokens / slots
    prefill = prompts * args.prompt_tokens * 2 * c.in_layers / args.tflops / 1e12
    return (steps * (width * (c.in_layers + c.head) + keys) / args.bandwidth / 1e12 + prefill) / 3600


def stage_hours(stage, student, teacher, args):
    """Hours of a stage on one GPU."""
    passes = 4 if args.gradient_checkpointing else 3  # a backward pass takes as long as two forward passes
    if stage == "rollout":
        return sampling_hours(teacher, args, args.prompts)
    if stage == "ckd":
        hours = training_hours(student, args, args.prompts, passes)
        return hours + training_hours(teacher, args, args.prompts, 1)
    model = teacher if stage == "refine" else student
    prompts = args.steps * args.prompts_per_step
    # A pass for the reference, and one for pi_old, which the first update of a step does without.
    hours = training_hours(model, args, prompts, passes + 2)
    return hours + sampling_hours(model, args, args.draws * prompts)


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
    add("--dtype", choices=WIDTH, default="bfloat16", help="compute")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="sets the size of the output head's chunks")
    add = parser.add_argument_group("speed").add_argument
    add("--tflops", type=number(float, 1e-6), default=250.0, help="10^12 operations a second in training")
    add("--bandwidth", type=number(float, 1e-6), default=0.6, help="TB a second that a decoding step reads")


def run_estimate(args):
    """Memory on each GPU and hours of every stage, computed from two model folders. Hours are divided by the
    GPUs: communication between them is not counted."""
    if bad := [gpus for gpus in args.gpus if gpus % ranks_per_copy(args, gpus)]:
        raise InputError(f"--shard-ranks {args.shard_ranks}: must divide --gpus {bad[0]}")
    student, teacher = read_sizes(args.student), read_sizes(args.teacher)
    columns = ("weights", "copies", "activations", "peak", "keys", "frozen")
    for gpus in args.gpus:
        print(f"\n{gpus} GPU{'s' * (gpus > 1)}; GB on each, and hours\n")
        rows = [["", *columns, "all", "hours"]]
        for stage in ("rollout", "ckd", "simrl", "refine"):
            parts = stage_memory(stage, student, teacher, args, gpus)
            figures = [parts.get(name, 0) / 1e9 for name in columns]
            figures += [sum(figures), stage_hours(stage, student, teacher, args) / gpus]
            rows.append([stage, *(f"{figure:.1f}" for figure in figures)])
        print_table(rows)
    print("\nrefine is simrl of the teacher. frozen: the teacher of ckd, the reference of simrl. "
          "peak: what the head, a layer or a step of sampling needs for a moment. "
          "hours of rollout and ckd: one pass over the prompts")

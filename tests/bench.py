"""Speed and memory as ratios against named peers: python -m tests.bench [ROW ...] --model FOLDER

A row runs this project and its peer in turn, on the same machine with the same allocator settings (but for two rows of
TRL), and prints the medians and their ratio. FOLDER is a real Qwen2.5 of 0.5B parameters (STAR_REAL_MODEL is the
default). Without names, all rows but the last two run: an hour on two CPU cores, most of it for TRL. Keep the machine
quiet meanwhile. `rl` and `rl-1000` need TRL, which is not in requirements-dev.txt: pip install trl (1.16.0 was used,
with datasets 4.4.1 and pyarrow 21). `data` needs no model. `gpu` and `stages` need a GPU and no model: three minutes
each on an H200.

`serve` also measures the prefix cache on BFCL's items where STAR_BFCL_ENV names the --env of `star.py bfcl`.
"""
import argparse
import http.client
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import star  # noqa: E402
import train  # noqa: E402
from apps import serve  # noqa: E402
from ckd import ckd_loss, cross_entropy, forward_backward  # noqa: E402
from data.chat import Chat  # noqa: E402
from data.groups import Group, Response, read_groups  # noqa: E402
from data.runs import read_metrics  # noqa: E402
from head import head_loss  # noqa: E402
from model import Transformer  # noqa: E402
from sampler import Request, Sampler, generate  # noqa: E402
from simrl import refine  # noqa: E402
from teacher import Teacher  # noqa: E402

BF16 = torch.bfloat16


def medians(repeat, warm_up=1, **sides):
    """{name: median seconds} of functions, run in turn."""
    seconds = {name: [] for name in sides}
    for i in range(warm_up + repeat):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(what, ours, peers, target=""):
    """Print a line of the table for each peer: how many times as long as this project it takes."""
    for peer, seconds in peers.items():
        print(f"| {what} | {peer} | {ours:.3g} s | {seconds:.3g} s | **{seconds / ours:.2f}** | {target} |", flush=True)


def report_limit(what, limit, ours, least, target):
    """Print a line of the table: how many times as long as a limit this project takes."""
    print(f"| {what} | {limit} | {ours:.2f} s | {least:.2f} s | takes **{ours / least:.2f}** times as long | "
          f"at most {target} |", flush=True)


def text_ids(chat, length, start=0):
    """`length` tokens of a running text."""
    text = "".join((ROOT / name).read_text() for name in ("simrl.py", "ckd.py", "reward.py", "train.py"))
    return chat.encode(text)[start:start + length]


def group_of(chat, prompt, n, response):
    """A group of a prompt and n responses with these numbers of tokens."""
    responses = [Response(text_ids(chat, response, 40 * j + prompt), (0, response)) for j in range(n)]
    return Group({}, text_ids(chat, prompt), responses)


# ---- A step of GRPO beside TRL -----------------------------------------------------------------------------------

SAMPLES, TOKENS = 8, 48
STEPS = 3  # the last is measured: the first two take memory from the system
MKLDNN = torch.backends.mkldnn.is_available()
RL_DTYPE = "bfloat16" if MKLDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"  # the faster one here


def star_steps(folder, length):
    """Seconds of the steps of GRPO here: one prompt, 8 samples of 48 tokens, no KL, float32 weights."""
    chat = Chat.from_pretrained(folder)
    chat.stop_ids = []
    model = Transformer.from_pretrained(folder)
    # samples.jsonl shows of every group:
    record = {"id": "-", "messages": [{"content": "-"}], "answer": {"tool_calls": [], "content": "-"}}
    prompts = [Group(record, text_ids(chat, length), [])]
    rewards = itertools.cycle((0.0, 0.5, 1.0))  # no matter what the response is
    with tempfile.TemporaryDirectory() as out:
        flags = (f"--kl-weight 0 --filter none --lr 1e-6 --n {SAMPLES} --max-new-tokens {TOKENS} --prompts-per-step 1 "
                 f"--batch-size {SAMPLES} --steps {STEPS} --save-every 1000000 --dtype {RL_DTYPE}")
        args, _ = star.parse(["simrl", "--model", str(folder), "--data", "none", "--out", out, *flags.split()])
        refine(model, None, prompts, chat, lambda *_: {"reward": next(rewards), "answer_score": 0.5}, args)
        rows = read_metrics(out)
    return [sum(row[f"seconds_{name}"] for name in ("sampling", "scoring", "training")) for row in rows]


def trl_steps(folder, length, checkpointing):
    """The same from TRL."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    chat = Chat.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rewards = itertools.cycle((0.0, 0.5, 1.0))
    marks = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            marks.append(time.perf_counter())

        def on_train_end(self, *args, **kwargs):
            marks.append(time.perf_counter())

    rows = [{"prompt": chat.decode(text_ids(chat, length))}] * STEPS
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            out, num_generations=SAMPLES, per_device_train_batch_size=SAMPLES, gradient_accumulation_steps=1,
            max_completion_length=TOKENS, max_steps=STEPS, learning_rate=1e-6, beta=0.0,
            bf16=RL_DTYPE == "bfloat16", use_cpu=True,
            gradient_checkpointing=checkpointing, generation_kwargs={"min_new_tokens": TOKENS}, report_to=[],
            save_strategy="no", logging_steps=1)
        trainer = GRPOTrainer(
            model, reward_funcs=lambda completions, **_: [next(rewards) for _ in completions], args=config,
            train_dataset=Dataset.from_list(rows), callbacks=[Clock()])
        trainer.train()
    return [end - start for start, end in zip(marks, marks[1:])]


@torch.no_grad()
def products_of_steps(folder, length):
    """Median seconds, as a list of one, of the matrix products of these steps alone: no attention, sums, draws,
    optimiser or copies of weights."""
    model = Transformer.from_pretrained(folder, getattr(torch, RL_DTYPE))
    layers = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    responses = SAMPLES * TOKENS

    def forward(matrices, rows):
        for weight in matrices:
            x = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
            torch.nn.functional.linear(x, weight)

    def backward(matrices, rows):
        for weight in matrices:
            x = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
            dy = torch.ones(rows, weight.shape[0], dtype=weight.dtype)
            dy @ weight
            dy.T @ x

    def step():
        forward(layers, length)  # the prompt
        for _ in range(TOKENS):
            forward([*layers, model.head_weight], SAMPLES)
        for run in (forward, backward):
            run(layers, length + responses)
            for _ in range(0, responses, 128):
                run([model.head_weight], 128)

    return [medians(STEPS - 1, step=step)["step"]]


def rl_row(folder, length=400, targets=(6, 4.5)):
    """Each side in a process of its own: two models with their optimisers do not fit the memory."""
    peers = {"trl-plain": "TRL, its defaults, glibc's allocator settings",
             "trl-plain-without-checkpointing": "TRL, gradient checkpointing off, glibc's allocator settings",
             "trl": "TRL, its defaults",
             "trl-without-checkpointing": "TRL, gradient checkpointing off"}
    targets *= 2
    seconds = {}
    for side in ("star", "products", *peers, "star", "products"):
        try:
            seconds.setdefault(side, []).append(run_alone(folder, side, length)[-1])
        except subprocess.CalledProcessError as e:
            print(f"({side}, {length:,} tokens: exit code {e.returncode}; -9 may be too little memory)", flush=True)
    if not seconds["star"]:
        return
    ours = statistics.median(seconds["star"])
    what = f"RL step, {length:,}-token prompt x {SAMPLES} x {TOKENS}, {RL_DTYPE}"
    report(what, ours, {"its matrix products alone": statistics.median(seconds["products"])})
    for (side, peer), target in zip(peers.items(), targets):
        if seconds[side]:
            report(what, ours, {peer: statistics.median(seconds[side])}, target)


def run_alone(folder, side, size):
    """What `run_side` returns in a process of its own."""
    command = [sys.executable, "-m", "tests.bench", "--model", folder, "--side", side, str(size)]
    process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def run_side(folder, side, size):
    if not side.startswith("trl-plain"):
        train.keep_pages()  # as the commands do
    if side == "star":
        return star_steps(folder, size)
    if side == "products":
        return products_of_steps(folder, size)
    if side.startswith("trl"):
        return trl_steps(folder, size, not side.endswith("without-checkpointing"))
    if side == "head":
        return head_memory(size)
    if side == "data":
        return reading_rollouts(size)
    return peak_above_start(lambda: Transformer.from_pretrained(folder))


# ---- Training steps ----------------------------------------------------------------------------------------------

def ckd_row(folder):
    """CKD of a model by itself: a packed group against a padded row for each response."""
    chat = Chat.from_pretrained(folder)
    model = Transformer.from_pretrained(folder)
    teacher = Teacher(Transformer.from_pretrained(folder, BF16), 100, chat.vocab_size)
    group = group_of(chat, 600, 8, 60)
    padded = [Group({}, group.prompt, [response]) for response in group.responses]
    args = training_args("ckd", 4096)

    def step(groups):
        model.zero_grad()
        forward_backward(model, teacher, groups, partial(ckd_loss, m=100, tail_weight=10.0), args, step=1)

    seconds = medians(2, ours=partial(step, [group]), padded=partial(step, padded))
    report("CKD step, 600-token prompt x 8 x 60", seconds["ours"], {"padded rows here": seconds["padded"]}, 4)


def training_args(command, micro_batch_tokens, dtype="bfloat16"):
    flags = {"ckd": "--teacher t --student s", "sft": "--model m"}[command]
    args, _ = star.parse([command, *flags.split(), "--data", "d", "--out", "o"])
    args.micro_batch_tokens = micro_batch_tokens
    args.dtype = dtype
    return args


def sft_row(folder):
    """Eight records of unequal lengths: forward, backward, clip and AdamW, beside a plain transformers loop."""
    from transformers import AutoModelForCausalLM
    chat = Chat.from_pretrained(folder)
    lengths = [(120, 30), (180, 90), (240, 20), (300, 60), (380, 120), (450, 40), (520, 80), (640, 50)]
    groups = [group_of(chat, prompt, 1, response) for prompt, response in lengths]
    model = Transformer.from_pretrained(folder)
    optimisers = train.make_optimisers(model, SimpleNamespace(optimiser="adamw", lr=1e-6, weight_decay=0.0))
    args = training_args("sft", 4096)

    def ours():
        forward_backward(model, None, groups, cross_entropy, args)
        train.update(model, optimisers, 1e-6, "run", 1)

    seconds = medians(2, ours=ours)
    del model, optimisers
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimiser = torch.optim.AdamW(peer.parameters(), lr=1e-6, fused=True)
    width = max(map(sum, lengths))
    ids, mask = torch.zeros(2, 8, width, dtype=torch.long)
    labels = torch.full((8, width), -100)
    for row, group in enumerate(groups):
        length = group.length
        ids[row, :length] = torch.tensor(group.prompt + group.responses[0].ids)
        labels[row, len(group.prompt):length] = ids[row, len(group.prompt):length]
        mask[row, :length] = 1

    def plain():
        for rows in torch.arange(8).split(4):  # 2,760 padded tokens a time
            with torch.autocast("cpu", BF16):
                loss = peer(ids[rows], attention_mask=mask[rows], labels=labels[rows]).loss
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    seconds |= medians(2, plain=plain)
    report("supervised step, 8 records of 150 to 690 tokens", seconds["ours"],
           {"plain transformers loop": seconds["plain"]}, 1.2)


def slopes_row(folder):
    """Cost of a CKD step of a small random model against each size: the slope of log time over log size."""
    config = {"model_type": "qwen3", "vocab_size": 16_000, "hidden_size": 256, "intermediate_size": 768,
              "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
              "tie_word_embeddings": True}
    base = {"prompts": 4, "responses": 4, "positions": 64, "k": 100, "vocabulary": 16_000}
    r = random.Random(0)

    def seconds(sizes):
        model = Transformer(config | {"vocab_size": sizes["vocabulary"]}).init_weights(0)
        groups = []
        for _ in range(sizes["prompts"]):
            responses = [Response([r.randrange(9_000) for _ in range(sizes["positions"])], (0, sizes["positions"]))
                         for _ in range(sizes["responses"])]
            groups.append(Group({}, [r.randrange(9_000) for _ in range(200)], responses))
        teacher = Teacher(model, sizes["k"], sizes["vocabulary"])
        loss = partial(ckd_loss, m=sizes["k"], tail_weight=10.0)
        args = training_args("ckd", 4096, "float32")
        return medians(3, step=lambda: forward_backward(model, teacher, groups, loss, args, step=1))["step"]

    for name, size in base.items():
        sizes = [size, 2 * size, 4 * size]
        times = [seconds(base | {name: value}) for value in sizes]
        slope = math.log(times[-1] / times[0]) / math.log(4)
        steps = " / ".join(f"{value:.2f}" for value in times)
        print(f"| CKD step, {name} x 1, 2, 4 | a straight line | {steps} s | | slope **{slope:.2f}** | at most 1.1 |",
              flush=True)


# ---- Sampling ----------------------------------------------------------------------------------------------------

def endless(chat):
    """A chat without end tokens, so that every response has its full length."""
    return SimpleNamespace(stop_ids=(), vocab_size=chat.vocab_size, decode=chat.decode)


def sampling_row(folder):
    from transformers import AutoModelForCausalLM
    chat = Chat.from_pretrained(folder)
    model = Transformer.from_pretrained(folder, BF16)
    prompts = [text_ids(chat, 200, 40 * i) for i in range(16)]

    def ours():
        requests = [Request(prompt, 8, i, 1.0, 48) for i, prompt in enumerate(prompts)]
        list(generate(model, requests, 128, endless(chat)))

    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16)

    def theirs(cache):
        peer.generate(torch.tensor(prompts), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                      repetition_penalty=1.0, num_return_sequences=8, min_new_tokens=48, max_new_tokens=48,
                      cache_implementation=cache, disable_compile=True, pad_token_id=0)

    sides = {"dynamic cache": lambda: theirs("dynamic"), "static cache": lambda: theirs("static")}
    seconds = medians(2, ours=ours, **sides)
    report("sampling 16 prompts of 200 tokens x 8 x 48, bf16", seconds.pop("ours"),
           {f"transformers `generate`, {name}": value for name, value in seconds.items()}, 5)


def decoding_row(folder):
    """One sequence: a decoding step against its matrices alone, with one vector each."""
    chat = Chat.from_pretrained(folder)
    model = Transformer.from_pretrained(folder, BF16)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    matrices.append(model.head_weight[:chat.vocab_size])
    vectors = {size: torch.randn(1, size, dtype=BF16) for size in {m.shape[1] for m in matrices}}
    sampler = Sampler(model, endless(chat), 1, 1, 64, 200)
    sampler.add(Request(text_ids(chat, 64), 1, 0, 1.0, 200))

    @torch.no_grad()
    def alone():
        for matrix in matrices:
            torch.nn.functional.linear(vectors[matrix.shape[1]], matrix)

    seconds = medians(40, 5, ours=sampler.step, alone=alone)
    share = seconds["alone"] / seconds["ours"]
    print(f"| decoding one sequence, bf16 | its matrices alone | {seconds['ours'] * 1e3:.1f} ms | "
          f"{seconds['alone'] * 1e3:.1f} ms | **{share:.0%}** of the limit | 85 % |", flush=True)


def neighbours_row(folder):
    """The share of responses that change with the number of slots, which changes rounding only."""
    chat = Chat.from_pretrained(folder)
    for dtype in (torch.float32, BF16):
        model = Transformer.from_pretrained(folder, dtype)
        for temperature in (0.0, 1.0):
            texts = []
            for slots in (3, 16):
                requests = [Request(text_ids(chat, 60 + i, 40 * i), 2, i, temperature, 32) for i in range(12)]
                list(generate(model, requests, slots, endless(chat)))
                texts.append([r.ids for request in requests for r in request.responses])
            changed = sum(a != b for a, b in zip(*texts)) / len(texts[0])
            print(f"| responses of 32 tokens that change between 3 and 16 slots, {str(dtype)[6:]}, T = {temperature:g} "
                  f"| | | | **{changed:.0%}** | {'0 in float32' if dtype == torch.float32 else ''} |", flush=True)


# ---- Serving -----------------------------------------------------------------------------------------------------

def serve_row(folder):
    """64 requests at once beside one after another; with STAR_BFCL_ENV, BFCL items with and without the prefix cache."""
    chat = Chat.from_pretrained(folder)
    bodies = [{"prompt": chat.decode(text_ids(chat, 100 + i, 40 * i)), "max_tokens": 16, "temperature": 0}
              for i in range(64)]
    args, _ = star.parse(["serve", "--model", folder, "--port", "0", "--max-concurrent", "64", "--dtype", "float32",
                          "--max-prompt-tokens", "200", "--max-new-tokens", "16", "--prefix-tokens", "0"])
    server = serve.make_server(args)
    threading.Thread(target=server.engine.run, daemon=True).start()

    def ask(body):
        """Seconds of a request."""
        start = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        connection.request("POST", "/v1/completions", json.dumps(body))
        json.load(connection.getresponse())["choices"]
        return time.perf_counter() - start

    seconds = {}
    for clients in (1, 64):
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            latencies = sorted(pool.map(ask, bodies))
        seconds[clients] = time.perf_counter() - start
    server.shutdown()
    server.server_close()
    server.engine.close()
    server.engine.sampler = None  # frees the memory
    report(f"64 requests at once, p50 {latencies[32]:.1f} s, longest {latencies[63]:.1f} s", seconds[64],
           {"one after another": seconds[1]})
    for category, items in (("live_multiple", 100), ("multi_turn_base", 5)) if "STAR_BFCL_ENV" in os.environ else ():
        summaries = {}
        for tokens in (65_536, 0):
            with tempfile.TemporaryDirectory() as out, redirect_stdout(sys.stderr):
                env = os.environ["STAR_BFCL_ENV"]
                flags = (f"bfcl --model {folder} --env {env} --out {out} --categories {category} "
                         f"--items {items} --prefix-tokens {tokens} --max-new-tokens 32 --dtype float32")
                star.main(flags.split())
                summaries[tokens] = json.loads((Path(out) / "summary.json").read_text())
        ours, peer = ([summary[name] for name in ("seconds_sampling", "prompt_tokens_computed")]
                      for summary in summaries.values())
        what = f"{items} items of {category}, {summaries[0]['requests']} requests"
        report(what, ours[0], {"no prefix cache": peer[0]})
        print(f"| the same, prompt tokens computed | no prefix cache | {ours[1]:,} | {peer[1]:,} | "
              f"**{peer[1] / ours[1]:.2f}** | |", flush=True)


# ---- The output head, loading and saving -------------------------------------------------------------------------

def head_inputs(N, V=151_936, H=896, k=100):
    """The head, hidden states, token weights and a made-up teacher's top-k, as tensors of CKD's loss."""
    torch.manual_seed(0)
    W = torch.randn(V, H).mul_(0.02).requires_grad_()
    h = torch.randn(N, H, requires_grad=True)
    log_p, ids = torch.randn(N, V // 64).mul_(3).log_softmax(-1).topk(k)  # a teacher over 1/64 of the ids
    return W, h, torch.full((N,), 1 / N), (ids[:, 0], ids, log_p)


def head_row(folder, N=1024, chunk=256):
    """CKD's loss and gradients against the three matrix products that it cannot do without."""
    W, h, weights, tensors = head_inputs(N)
    loss = partial(ckd_loss, m=100, tail_weight=10.0)
    for dtype, targets in ((torch.float32, (1.1, 1.4, 0.8)), (BF16, (1.5, 2.2, 0.65))):
        def ours():
            h.grad = W.grad = None
            head_loss(h, W, weights, loss, *tensors, chunk=chunk, dtype=dtype)[0].backward()

        def textbook():
            h.grad = W.grad = None
            losses, _ = loss((h.to(dtype) @ W.to(dtype).T).float(), *tensors)
            (losses @ weights).backward()

        @torch.no_grad()
        def products(rows):
            x = h.to(dtype)
            w = W.to(dtype)
            d_hidden = torch.zeros_like(h)
            d_weight = torch.zeros_like(W)
            for start in range(0, N, rows):
                part = slice(start, start + rows)
                logits = x[part] @ w.T
                d_hidden[part] = logits @ w
                d_weight += logits.T @ x[part]

        peers = {"three products in the same chunks": partial(products, chunk),
                 "three products in one piece": partial(products, N), "textbook": textbook}
        seconds = medians(5, ours=ours, **peers)
        for peer, target in zip(peers, targets):
            report_limit(f"head, 1,024 positions, {str(dtype)[6:]}", peer, seconds["ours"], seconds[peer], target)


def files_row(folder):
    """Loading against reading the bytes and casting them; saving against writing and syncing them."""
    path = Path(folder) / "model.safetensors"
    scratch = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))

    def read_and_cast():
        data = bytearray(path.stat().st_size)
        with open(path, "rb") as file:
            file.readinto(data)
        end = len(data) // 2 * 2
        return torch.frombuffer(data, dtype=BF16, count=end // 2).float()

    seconds = medians(5, ours=lambda: Transformer.from_pretrained(folder), peer=read_and_cast)
    report_limit("loading to float32", "reading its bytes, casting them", seconds["ours"], seconds["peer"], 1.3)
    model = Transformer.from_pretrained(folder)
    data = torch.zeros(model.num_parameters() * 2, dtype=torch.uint8).fill_(1).numpy()

    def write():
        with open(scratch / "plain", "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        (scratch / "plain").unlink()

    def save():
        model.save_pretrained(scratch / "model", BF16)
        shutil.rmtree(scratch / "model")

    seconds = medians(5, ours=save, peer=write)
    shutil.rmtree(scratch)
    report_limit("saving in bfloat16", "writing and syncing its bytes", seconds["ours"], seconds["peer"], 1.5)


def memory_row(folder):
    """Peak memory of the head at two sizes, and of loading, in processes of their own."""
    small, large = (run_alone(folder, "head", N) for N in (1024, 8192))
    print(f"| memory of the head, 8,192 positions | 1,024 positions | {large:.2f} GB | {small:.2f} GB | "
          f"**{large / small:.2f}** | 1 |", flush=True)
    loaded = run_alone(folder, "load", 0)
    copy = 4 * Transformer.from_pretrained(folder, device="meta").num_parameters() / 1e9
    print(f"| peak memory of loading to float32 | one copy | {loaded:.2f} GB | {copy:.2f} GB | "
          f"**{loaded / copy:.2f}** | about 1 |", flush=True)


def data_row(folder):
    """Reading the rollouts of `ckd`: peak memory beside the ids of the responses alone, and speed."""
    memory, seconds = run_alone("none", "data", 2000)
    tokens = 2000 * N * RESPONSE
    print(f"| reading rollouts, 2,000 prompts of {PROMPT} tokens x {N} x {RESPONSE}, {tokens / seconds:,.0f} tokens/s "
          f"| their ids as int32 | {memory * 1e9 / tokens:.1f} bytes a token | 4 bytes a token | "
          f"**{memory * 1e9 / tokens / 4:.1f}** | at most 2 |", flush=True)


def reading_rollouts(prompts):
    """(peak memory in GB, seconds of a core) of reading a file of rollouts as groups."""
    folder = ROOT / "data/tiny/teacher"
    chat = Chat.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "rollouts.jsonl"
        write_rollouts(path, prompts, chat.vocab_size)
        args, _ = star.parse(["sft", "--model", str(folder), "--data", str(path), "--out", "none"])
        groups = []
        memory = peak_above_start(lambda: groups.extend(read_groups(args, chat)))
        start = time.process_time()
        groups = read_groups(args, chat)
    return memory, time.process_time() - start


def write_rollouts(path, prompts, vocab_size):
    """Write rollouts of the paper's shape: prompts of about 600 tokens, most of them tools, with random responses."""
    r = random.Random(0)
    words = "city date count name price order hotel train the of a for to which is".split()

    def text(count):
        return " ".join(r.choices(words, k=count))

    def tool(name):
        properties = {f"{r.choice(words)}_{i}": {"type": "string", "description": text(8)} for i in range(3)}
        return {"name": name, "description": text(10), "parameters": {
            "type": "object", "properties": properties, "required": list(properties)}}

    with open(path, "w") as file:
        for i in range(prompts):
            responses = [{"ids": r.choices(range(257, vocab_size), k=RESPONSE),
                          "finish_reason": "stop", "logprob": -r.random(), "reward": r.random()} for _ in range(N)]
            row = {"id": f"r-{i}", "source": "random", "tools": [tool(f"tool_{j}") for j in range(4)],
                   "messages": [{"role": "user", "content": text(20)}],
                   "answer": {"tool_calls": [{"name": "tool_0", "arguments": {}}], "content": None}}
            file.write(json.dumps(row | {"responses": responses}) + "\n")


def head_memory(N):
    """Peak memory of the head's loss and gradients in bfloat16, above that of its inputs, in GB."""
    W, h, weights, tensors = head_inputs(N)
    loss = partial(ckd_loss, m=100, tail_weight=10.0)
    return peak_above_start(lambda: head_loss(h, W, weights, loss, *tensors, dtype=BF16)[0].backward())


def peak_above_start(run):
    """The most memory while `run` runs, without that of mapped files, above what was there before, in GB.

    ru_maxrss is no help: a process inherits the maximum of the one that started it.
    """
    sizes = [anonymous_memory()]
    finished = threading.Event()

    def watch():
        while not finished.wait(0.002):
            sizes.append(anonymous_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        finished.set()
        thread.join()
    return max(sizes) - sizes[0]


def anonymous_memory():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e9


# ---- On a GPU --------------------------------------------------------------------------------------------------

SHAPES = {"0.6B": (1024, 3072, 28, 16, 8), "1.7B": (2048, 6144, 28, 16, 8)}  # hidden, inner, layers, heads, kv heads
PEAK = 989e12  # bfloat16 operations a second of an H100 or H200, by its data sheet
BANDWIDTH = 4.8e12  # bytes a second of an H200, by its data sheet
VOCABULARY = 151_936
PROMPT, RESPONSE, N = 600, 250, 8  # tokens, tokens, responses to a prompt


def random_qwen3(name, dtype=torch.float32):
    """A Qwen3-shaped model with random weights on the GPU."""
    hidden, inner, layers, heads, kv_heads = SHAPES[name]
    config = {"model_type": "qwen3", "vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": inner,
              "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
              "head_dim": 128, "tie_word_embeddings": True}
    with torch.device("cuda"):
        model = Transformer(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02) if p.dim() == 2 else p.fill_(1.0)
    return model.in_dtype(dtype)


def gpu_row(folder):
    """Training as a share of the peak rate, decoding as a share of the memory bandwidth, at the shapes of Qwen3.

    Operations count what is seen: 6 a weight and token, and 12 a query-key pair, head and dimension.
    """
    if not torch.cuda.is_available():
        sys.exit("the row gpu needs a CUDA device")
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=BF16)
    seconds = medians(10, product=on_gpu(lambda: a @ b), copy=on_gpu(lambda: b.copy_(a)))
    print(f"| {torch.cuda.get_device_name()} | an 8,192-wide product: {2 * 8192 ** 3 / seconds['product'] / 1e12:.0f} "
          f"TFLOP/s; a kernel takes {launch_time() * 1e6:.1f} us to launch | | | | |", flush=True)
    for name in SHAPES:
        model = random_qwen3(name)
        policy = model.in_dtype(BF16)
        for compiled in (False, True) if name == "0.6B" else (True,):
            if compiled:
                model.model.compile_layers()
                policy.model.compile_layers()
            how = "--compile" if compiled else "eager"
            for prompts in (2, 6):
                gpu_training(f"{name}, {how}", model, prompts)
            for slots in (64, 512):
                gpu_decoding(f"{name}, {how}", policy, slots, compiled)
        del model, policy


def on_gpu(run):
    """`run`, and wait for the GPU."""
    def wait():
        run()
        torch.cuda.synchronize()
    return wait


def launch_time():
    x = torch.zeros(1, device="cuda")
    return medians(3, run=on_gpu(lambda: [x.add_(1) for _ in range(1000)]))["run"] / 1000


def gpu_training(what, model, prompts):
    """Forward and backward of one micro-batch: `prompts` groups."""
    r = random.Random(0)
    draw = partial(r.choices, range(1000, 150_000))
    groups = [Group({}, draw(k=PROMPT), [Response(draw(k=RESPONSE), (0, RESPONSE)) for _ in range(N)])
              for _ in range(prompts)]
    args = training_args("sft", prompts * groups[0].length)

    def step():
        model.zero_grad()
        forward_backward(model, None, groups, cross_entropy, args)

    torch.cuda.reset_peak_memory_stats()
    seconds = medians(5, 2, step=on_gpu(step))["step"]
    c = model.model.c
    tokens = prompts * (PROMPT + N * RESPONSE)
    pairs = prompts * (PROMPT ** 2 / 2 + N * RESPONSE * (PROMPT + RESPONSE / 2))
    head = model.head_weight.numel()
    operations = 6 * ((model.num_parameters() - head) * tokens + head * prompts * N * RESPONSE)
    operations += 12 * pairs * c["num_hidden_layers"] * c["num_attention_heads"] * c["head_dim"]
    print(f"| training, {what}, {tokens:,} tokens | {PEAK / 1e12:.0f} TFLOP/s | {seconds * 1e3:.0f} ms, "
          f"{tokens / seconds:,.0f} tokens/s, {torch.cuda.max_memory_allocated() / 1e9:.1f} GB | | "
          f"**{operations / seconds / PEAK:.0%}** | 40 % |", flush=True)


def gpu_decoding(what, policy, slots, compiled):
    """A step of the sampler, all slots in use; without --compile also without CUDA graphs."""
    chat = SimpleNamespace(stop_ids=(), vocab_size=VOCABULARY, decode=str)
    for graphs in (True,) if compiled else (False, True):
        sampler = Sampler(policy, chat, slots, slots // N, PROMPT, 128)
        sampler.graphs = {} if graphs else None
        for i in range(slots // N):
            sampler.add(Request(list(range(1000, 1000 + PROMPT)), N, i, 1.0, 128))
        for _ in range(36):
            sampler.step()
        seconds = medians(20, 2, step=on_gpu(sampler.step))["step"]
        c = policy.model.c
        keys = 2 * 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"]
        read = 2 * policy.num_parameters() + keys * (slots // N * PROMPT + slots * 47)
        print(f"| decoding, {what}{', CUDA graphs' if graphs else ''}, {slots} slots | {BANDWIDTH / 1e12:.1f} TB/s | "
              f"{seconds * 1e3:.2f} ms, {slots / seconds:,.0f} tokens/s | | **{read / BANDWIDTH / seconds:.0%}** | 50 % |",
              flush=True)


def stages_row(folder):
    """CKD and Sim-RL as commands at the shapes of Qwen3, with random weights: tokens a second, and memory."""
    out = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
    chat = Chat.from_pretrained(ROOT / "data/tiny/teacher")
    for name in SHAPES:
        model = random_qwen3(name, BF16)
        model.folder = ROOT / "data/tiny/teacher"
        model.save_pretrained(out / name)
        tokenizer = json.loads((out / name / "tokenizer.json").read_text())
        known = chat.vocab_size
        vocab = tokenizer["model"]["vocab"]
        vocab |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        vocab |= {f"|{i}|": i for i in range(known, VOCABULARY)}  # so that the head keeps its width
        (out / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        del model
    torch.cuda.empty_cache()
    r = random.Random(0)
    lines = []
    for i in range(64):
        text = " ".join(r.choices("red green blue one two three".split(), k=PROMPT // 2))
        responses = [{"ids": r.choices(range(known), k=RESPONSE)} for _ in range(N)]
        lines.append(json.dumps({"id": str(i), "source": "random", "tools": [], "messages": [
            {"role": "user", "content": text}], "answer": {"tool_calls": [], "content": "red"}, "responses": responses}))
    (out / "data.jsonl").write_text("\n".join(lines) + "\n")
    shared = f"--data {out}/data.jsonl --compile --micro-batch-tokens 16384 --max-prompt-tokens 1024"
    for command in (
            f"ckd --teacher {out}/1.7B --student {out}/0.6B {shared} --hold-out 0 --samples 0 --steps 4",
            f"simrl --model {out}/0.6B {shared} --n {N} --max-new-tokens {RESPONSE} --prompts-per-step 64 "
            "--max-concurrent 512 --filter none --steps 3"):
        stage = command.split()[0]
        flags = [*command.split(), "--out", str(out / stage), "--save-every", "1000000"]
        subprocess.run([sys.executable, str(ROOT / "star.py"), *flags], check=True)
        rows = read_metrics(out / stage)[1:]
        for row in rows:
            print(json.dumps(row))
        print((out / stage / "summary.json").read_text(), flush=True)
    shutil.rmtree(out)


ROWS = {"head": head_row, "decoding": decoding_row, "sampling": sampling_row, "neighbours": neighbours_row,
        "serve": serve_row, "files": files_row, "memory": memory_row, "data": data_row, "slopes": slopes_row,
        "ckd": ckd_row, "sft": sft_row, "rl": rl_row,
        "rl-1000": partial(rl_row, length=1000, targets=(7, 5)), "gpu": gpu_row, "stages": stages_row}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)}; default: all but gpu, stages")
    parser.add_argument("--model", default=os.environ.get("STAR_REAL_MODEL"), help="model folder")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, size = args.side
        print("\n" + json.dumps(run_side(args.model, side, int(size))))
        return
    if unknown := set(args.rows) - ROWS.keys():
        parser.error(f"no row {', '.join(sorted(unknown))}; rows are {', '.join(ROWS)}")
    if not args.model and not set(args.rows or ROWS) <= {"data", "gpu", "stages"}:
        parser.error("--model is missing: a folder with a real Qwen2.5 of 0.5B parameters")
    train.keep_pages()  # as the commands do
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}\n")
    print("| what | peer or limit | here | peer | ratio | target |\n|---|---|---|---|---|---|")
    for name in args.rows or [name for name in ROWS if name not in ("gpu", "stages")]:
        ROWS[name](args.model)


if __name__ == "__main__":
    main()

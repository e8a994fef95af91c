"""`star.py bfcl`: the official BFCL scores of a model, by the official tool (`bfcl-eval`), offline.

The tool renders the prompts, runs the simulated tools of multi-turn items, and scores. This file makes the tool's own
environment, serves the model (apps/serve.py), calls the tool's two commands and reads what they write:

    --env DIR            a virtual environment with bfcl-eval; made if it is missing (4 minutes, 700 MB, needs pip)
    OUT/result_star      what the model answered, by category       OUT/score_star    the tool's scores
    OUT/items.json       {category: {item: 1 or 0}}                 OUT/summary.json  the table, and what moves a score

A subset (--items) is drawn by the seed, the same for every model. Single-turn items whose prompt does not fit the model
are left out before anything is generated, and counted. A multi-turn conversation that outgrows the model is wrong.

Multi-turn items make the tool evaluate calls that the model wrote, in its own process: run them in a sandbox.
"""
import json
import os
import random
import socket
import subprocess
import sys
import time
import venv
from contextlib import contextmanager
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import numpy as np
from tqdm import tqdm

from apps.evaluate import INTERVAL
from data import InputError, positive, print_table, read_json, write_json
from data.chat import Chat, add_prompt_flags
from data.records import read_lines
from data.runs import add_output_flags
from train import add_machine_flags, open_run

VERSION = "2026.3.23"  # of bfcl-eval: BFCL v4, whose single-turn items are those of v3 but for a few
HANDLER = "Qwen/Qwen3-0.6B-FC"  # it renders Qwen3's template, whatever the model
SIMPLE = ("simple_python", "simple_java", "simple_javascript")
NON_LIVE = (*SIMPLE, "multiple", "parallel", "parallel_multiple", "irrelevance")
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance")
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
LONGEST = dict.fromkeys(MULTI_TURN, 12_000) | {"multi_turn_long_context": 80_000}  # tokens of a conversation, roomy
GROUPS = {"non_live": NON_LIVE, "live": LIVE, "multi_turn": MULTI_TURN}
FAILED = b"Error during inference"  # what the tool records as an answer if a request failed
open_url = build_opener(ProxyHandler({})).open  # the server is on this machine


def bfcl_flags(parser):
    add = parser.add_argument
    add("--model", required=True, help="model folder")
    add("--categories", nargs="+", default=["non_live", "live"], choices=[*GROUPS, *sum(GROUPS.values(), ())],
        metavar="NAME", help=f"{', '.join(GROUPS)}, or single ones such as simple_python")
    add("--items", type=positive, metavar="N", help="draw N items of each category; default: all")
    add("--compare", metavar="OUT", help="--out of an earlier run: paired differences on the items of both")
    add("--env", default="bfcl-env", metavar="DIR", help="virtual environment of the tool; made if it is missing")
    add("--max-concurrent", type=positive, default=16, metavar="N", help="sequences generated concurrently")
    add("--max-new-tokens", type=positive, default=512, help="longest answer; the tool itself would allow 4,096")
    add_output_flags(parser, "folder for the tool's files and the table")
    add_prompt_flags(parser)
    add_machine_flags(parser, "weights and compute")


def run_bfcl(args):
    """Score a model on BFCL with the official tool, offline."""
    # 1. Before anything is written, refuse bad input; make the tool's environment if it is missing.
    chat = Chat.from_pretrained(args.model, args.think, args.tools)
    context = read_json(Path(args.model) / "config.json").get("max_position_embeddings", 32_768)
    other = read_json(Path(args.compare) / "items.json", "give the --out of an earlier run") if args.compare else {}
    tool = find_tool(Path(args.env))
    open_run(args, "cpu", [args.model], [args.compare])

    # 2. Choose the items, and let the tool generate and score.
    room = context - args.max_new_tokens  # for a prompt
    chosen, too_long, longest = choose_items(tool, chat, args, room)
    out = Path(args.out).resolve()
    write_json(out / "test_case_ids_to_generate.json", chosen)
    with serve_model(args, min(room, longest)) as port:
        try:
            generate(tool, out, args, port, sum(map(len, chosen.values())))
        finally:
            stats = add_stats(out, port)
    process = start_tool(tool, out, "evaluate", "--partial-eval", "--score-dir", "score_star")
    wait_for_tool(process, out, "evaluate")

    # 3. Read, check, report.
    items = read_items(out, chosen)
    write_json(out / "items.json", items)
    report(out, args, items, other, {"left_out": too_long, "think": chat.think} | stats)


def find_tool(env):
    """The `bfcl` of an environment, which is made if it is missing. Returns its path."""
    tool = env / "bin/bfcl"
    complete = env / "complete"
    if tool.exists() and complete.exists():
        return tool.resolve()
    print(f"making {env} with bfcl-eval {VERSION}", flush=True)
    venv.create(env, with_pip=True)
    pip = [str(env / "bin/python"), "-m", "pip", "install", "--quiet"]
    # Skip packages that only online categories need. soundfile and transformers are undeclared dependencies.
    list_needs = ("from importlib.metadata import requires; print(*(r.replace(' ', '') for r in requires('bfcl-eval') "
                  "if 'extra' not in r and not r.startswith(('sentence-transformers', 'faiss'))))")
    try:
        subprocess.run([*pip, "--no-deps", f"bfcl-eval=={VERSION}"], check=True)
        needs = subprocess.run([pip[0], "-c", list_needs], check=True, capture_output=True, text=True).stdout.split()
        subprocess.run([*pip, *needs, "soundfile", "transformers"], check=True)
    except subprocess.CalledProcessError as error:
        why = f"pip failed (exit code {error.returncode})"
        raise InputError(f"{env}: {why}; delete the folder and try again") from error
    complete.touch()
    return tool.resolve()


def choose_items(tool, chat, args, most):
    """Returns ({category: ids}, {category: how many are left out, as their prompt has more than `most`
    tokens}, tokens of the longest prompt to be expected)."""
    data = next(tool.parents[1].glob("lib/python*/site-packages/bfcl_eval/data"), None)
    if data is None:
        raise InputError(f"{args.env}: has no bfcl_eval; delete the folder, it is made anew")
    names = [name for key in args.categories for name in GROUPS.get(key, (key,))]
    chosen = {}
    too_long = {}
    longest = 1
    for name in tqdm(dict.fromkeys(names), "choose items", delay=2):
        entries = [json.loads(line) for _, line in read_lines(data / f"BFCL_v4_{name}.json")]
        if args.items and args.items < len(entries):
            entries = random.Random(f"{args.seed} {name}").sample(entries, args.items)
        lengths = [LONGEST[name] if name in MULTI_TURN else prompt_tokens(chat, entry) for entry in entries]
        fitting = [entry["id"] for entry, length in zip(entries, lengths) if name in MULTI_TURN or length <= most]
        longest = max(longest, *lengths)
        too_long |= {name: len(entries) - len(fitting)} if len(fitting) < len(entries) else {}
        if fitting:
            chosen[name] = sorted(fitting)
    if not chosen:
        raise InputError(f"{args.model}: no prompt of these categories fits its context with --max-new-tokens")
    return chosen, too_long, longest


def prompt_tokens(chat, entry):
    """Tokens of a single-turn item's prompt, a few too many: the tool adds a note to each function's description."""
    text = chat.render(entry["question"][0], entry["function"], generation_prompt=True)
    note = chat.encode(" Note that the provided function is in JavaScript syntax.")
    return len(chat.encode(text)) + len(note) * len(entry["function"]) + 32


@contextmanager
def serve_model(args, longest_prompt):
    """Serve the model in a process of its own, while this context is open. Yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--model", args.model, "--port", port, "--dtype", args.dtype, "--device", args.device, "--seed", args.seed,
             "--max-concurrent", args.max_concurrent, "--max-new-tokens", args.max_new_tokens, "--tools", args.tools,
             "--max-prompt-tokens", longest_prompt]
    flags += ["--think", args.think] if args.think else []
    star = Path(__file__).parents[1] / "star.py"
    process = subprocess.Popen([sys.executable, str(star), "serve", *map(str, flags)], stdout=subprocess.DEVNULL)
    try:
        while not answers(port):
            if process.poll() is not None:
                raise InputError(f"{args.model}: could not be served; see the message above")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


def answers(port):
    """Whether a server answers there yet."""
    try:
        open_url(f"http://127.0.0.1:{port}/v1/models")
    except OSError:
        return False
    return True


def add_stats(out, port):
    """The server's counts, added to those of the sessions before in OUT/stats.json."""
    path = out / "stats.json"
    before = read_json(path) if path.exists() else {}
    stats = json.load(open_url(f"http://127.0.0.1:{port}/v1/stats"))
    stats = {name: value + before.get(name, 0) for name, value in stats.items()}
    write_json(path, stats)
    return stats


def start_tool(tool, out, command, *flags, port=0):
    """Start a command of the tool, with its output in OUT/COMMAND.log."""
    flags = ["--model", HANDLER, "--result-dir", "result_star", *map(str, flags)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REMOTE_OPENAI")}
    environment |= {"BFCL_PROJECT_ROOT": str(out), "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1",
                    "LOCAL_SERVER_ENDPOINT": "127.0.0.1", "LOCAL_SERVER_PORT": str(port)}
    with open(out / f"{command}.log", "w") as log:
        return subprocess.Popen([str(tool), command, *flags], stdout=log, stderr=log, env=environment, cwd=out)


def wait_for_tool(process, out, command):
    if process.wait():
        raise InputError(f"{out / command}.log: the tool stopped; its last lines say why")


def generate(tool, out, args, port, total):
    """Let the tool ask the model for all items; it skips those in its result files."""
    process = start_tool(tool, out, "generate", "--skip-server-setup", "--local-model-path", Path(args.model).resolve(),
                         "--run-ids", "--num-threads", 2 * args.max_concurrent, port=port)
    try:
        with tqdm(total=total, desc="generate", unit="item") as bar:
            while bar.n < total and process.poll() is None:
                time.sleep(1)
                bar.update(sum(1 for _ in result_lines(out)) - bar.n)
        wait_for_tool(process, out, "generate")
    finally:
        process.terminate()


def result_lines(out):
    return (line for path in out.glob("result_star/**/*_result.json") for line in path.read_bytes().splitlines())


def read_items(out, chosen):
    """{category: {item: 1 or 0}} from the tool's score files. InputError if an answer is a recorded failure."""
    failures = sum(FAILED in line and b'"id": "multi_turn' not in line for line in result_lines(out))
    if failures:
        raise InputError(f"{out}: {failures} answers are recorded failures, which the tool would score; delete their "
                         "lines from result_star and continue with --resume")
    items = {}
    for name, ids in chosen.items():
        path = next(out.glob(f"score_star/**/BFCL_v4_{name}_score.json"), None)
        if path is None:
            raise InputError(f"{out}: the tool wrote no score of {name}; see {out / 'evaluate.log'}")
        head, *wrong = [json.loads(line) for _, line in read_lines(path)]
        wrong = {line["id"] for line in wrong}
        items[name] = {item: int(item not in wrong) for item in ids}
        right = sum(items[name].values())
        if (head["correct_count"], head["total_count"]) != (right, len(ids)):
            counts = f"{head['correct_count']} of {head['total_count']}"
            raise InputError(f"{path}: counts {counts}, not {right} of {len(ids)}")
    return items


def columns(items):
    """{column: [(weight, values of its items)]}: a column is the weighted sum of means, in BFCL's own way."""
    parts = {name: [(1.0, list(values.values()))] for name, values in items.items()}

    def mean_of(*names):
        """The mean of columns; None if one is missing."""
        if all(parts.get(name) for name in names):
            return [(weight / len(names), values) for name in names for weight, values in parts[name]]
        return None

    def together(names):
        """All items of these categories; None if one is missing."""
        if all(name in items for name in names):
            return [(1.0, [value for name in names for value in items[name].values()])]
        return None

    parts["simple"] = mean_of(*SIMPLE)
    parts["Non-Live AST"] = mean_of("simple", "multiple", "parallel", "parallel_multiple")
    parts["Non-Live, v3"] = mean_of("simple", "multiple", "parallel", "parallel_multiple", "irrelevance")
    parts["Live AST"] = together(LIVE[:4])
    parts["Live, v3"] = together(LIVE)
    parts["Multi-Turn"] = mean_of(*MULTI_TURN)
    parts["overall, v3"] = mean_of("Non-Live, v3", "Live, v3", "Multi-Turn")
    return {name: part for name, part in parts.items() if part}


def interval(part):
    """{"mean", "low", "high"} in percent of a column: Wilson's intervals of its parts, added in squares."""
    mean = low = high = 0.0
    for weight, values in part:
        n, p = len(values), np.mean(values)
        middle = (p + 1.96 ** 2 / (2 * n)) / (1 + 1.96 ** 2 / n)
        half = 1.96 * (p * (1 - p) / n + 1.96 ** 2 / (4 * n * n)) ** 0.5 / (1 + 1.96 ** 2 / n)
        mean += weight * p
        low += (weight * (p - (middle - half))) ** 2
        high += (weight * (middle + half - p)) ** 2
    return {"mean": 100 * mean, "low": max(0.0, 100 * (mean - low ** 0.5)), "high": 100 * (mean + high ** 0.5)}


def paired_interval(part):
    """The same for differences between two models on the same items."""
    mean = sum(weight * np.mean(values) for weight, values in part)
    half = 1.96 * sum(weight ** 2 * np.var(values) / len(values) for weight, values in part) ** 0.5
    return {"mean": 100 * mean, "low": 100 * (mean - half), "high": 100 * (mean + half)}


def report(out, args, items, other, details):
    """Write OUT/summary.json and print the table, with what moves a score."""
    scores = {}
    percent = INTERVAL.replace("3f", "1f")
    rows = [["", "items", "right, %", *(["difference"] if other else [])]]
    differences = {name: {item: value - other[name][item] for item, value in values.items() if item in other[name]}
                   for name, values in items.items() if name in other}
    differences = columns({name: values for name, values in differences.items() if values})
    for name, part in columns(items).items():
        scores[name] = interval(part)
        rows.append([name, sum(len(values) for _, values in part), percent.format(**scores[name])])
        if name in differences:
            rows[-1].append(percent.replace(":", ":+").format(**paired_interval(differences[name])))
    details |= {"bfcl_eval": VERSION, "handler": HANDLER, "max_new_tokens": args.max_new_tokens,
                "items_per_category": args.items or "all", "dtype": args.dtype}
    write_json(out / "summary.json", {"model": args.model, "scores": scores, **details})
    print()
    print_table(rows)
    print()
    print_table(details.items())
    subset = "a subset of " if args.items or details["left_out"] else ""
    print(f"\nThese are {subset}v4's items. The paper's columns are v3 and all items; "
          "over half of the multi-turn items differ.")

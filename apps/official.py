"""What `star.py bfcl` and `star.py acebench` share: the tool's environment, the served model, the choice of items, the
tool's processes, the scores and the table.

    OUT/items.json      {category: {item: 1 or 0}}         OUT/stats.json    the server's counts, over all sessions
    OUT/summary.json    the table, and what moves a score

A subset (--items) is drawn by the seed, the same for every model. Items whose prompt does not fit the model are left
out before anything is generated, and counted.
"""
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import venv
from argparse import Namespace
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from apps.serve import make_server
from data import InputError, natural, positive, print_table, read_json, read_optional, write_json, write_lines
from data.chat import Chat, add_prompt_flags
from data.records import read_lines
from data.runs import add_output_flags
from train import add_machine_flags, pick_device

RESULTS = "result_*/**/*_result.json"  # of both tools


def add_flags(parser, groups, default, env):
    """The flags of both commands. groups: {name: categories}; env: the default of --env."""
    add = parser.add_argument
    add("--model", required=True, help="model folder")
    add("--categories", nargs="+", default=default, choices=[*groups, *sum(groups.values(), ())], metavar="NAME",
        help=f"{', '.join(groups)}, or single ones such as {next(iter(groups.values()))[0]}")
    add("--items", type=positive, metavar="N", help="draw N items of each category; default: all")
    add("--compare", metavar="OUT", help="--out of an earlier run: paired differences on the items of both")
    add("--env", default=env, metavar="DIR", help="virtual environment of the tool; made if it is missing")
    add("--max-concurrent", type=positive, default=16, metavar="N", help="sequences generated concurrently")
    add("--max-new-tokens", type=positive, default=512, help="longest answer; the tool itself would allow more")
    add("--prefix-tokens", type=natural, default=65_536, metavar="N", help="as for star.py serve; 0: no prefix cache; "
        "a multi-turn conversation needs about 8,000, and all that run at a time should fit")
    add_output_flags(parser, "folder for the tool's files and the table")
    add_prompt_flags(parser)
    add_machine_flags(parser, "weights and compute")


def open_inputs(args):
    """Returns (Chat, most tokens of a prompt, items.json of --compare). InputError if one of them, or the device, is
    not there."""
    pick_device(args)
    chat = Chat.from_pretrained(args.model, args.think, args.tools)
    context = read_json(Path(args.model) / "config.json").get("max_position_embeddings") or 32_768
    other = read_json(Path(args.compare) / "items.json", "give the --out of an earlier run") if args.compare else {}
    return chat, context - args.max_new_tokens, other


def make_environment(env, packages, then=None):
    """The bin/ of a virtual environment. If it is missing, it is made with these packages; then(pip's command) adds
    others."""
    programs = Path(env).resolve() / "bin"
    complete = Path(env) / "complete"
    if complete.exists():
        return programs
    if Path(env).exists():
        raise InputError(f"{env}: is not an environment that this command has finished; delete it or use another --env")
    print(f"making {env}: pip install", *packages, flush=True)
    try:
        venv.create(env, with_pip=True)
        pip = [str(programs / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *packages], check=True)
        if then:
            then(pip)
    except subprocess.CalledProcessError as e:
        raise InputError(f"{env}: pip failed (exit code {e.returncode}); delete the folder and try again") from e
    complete.touch()
    return programs


def choose_items(args, groups, read, tokens, most, other):
    """Returns ({category: ids}, {category: items that it has in all}, {category: number of items left out, as their
    prompt has more than `most` tokens}, tokens of the longest prompt).

    read: category -> {id: item}
    tokens: category, item -> tokens of its longest prompt
    other: items.json of --compare

    InputError if no item is left, or none of them in `other`.
    """
    names = [name for key in args.categories for name in groups.get(key, (key,))]
    chosen = {}
    sizes = {}
    too_long = {}
    longest = 1
    for name in tqdm(dict.fromkeys(names), "choose items", delay=2):
        items = read(name)
        ids = list(items)
        sizes[name] = len(ids)
        if args.items and args.items < len(ids):
            ids = random.Random(f"{args.seed} {name}").sample(ids, args.items)
        fitting = {item: length for item in ids if (length := tokens(name, items[item])) <= most}
        longest = max([longest, *fitting.values()])
        if len(fitting) < len(ids):
            too_long[name] = len(ids) - len(fitting)
        if fitting:
            chosen[name] = sorted(fitting)
    if not chosen:
        raise InputError(f"{args.model}: no prompt of these categories fits its context with --max-new-tokens")
    if other and not any(other.get(name, {}).keys() & set(ids) for name, ids in chosen.items()):
        raise InputError(f"{args.compare}: has none of these items; use its --categories, --items and --seed")
    return chosen, sizes, too_long, longest


@contextmanager
def serve_model(args, longest_prompt):
    """Serve the model while this context is open. Yields the server (apps/serve.py). At the end, its counts are added
    to those of the sessions before in OUT/stats.json."""
    server = make_server(Namespace(**vars(args), port=0, max_waiting=1024, max_prompt_tokens=longest_prompt))

    def answer():
        with suppress(InputError):  # `run_tool` says it
            server.engine.run()

    engine = threading.Thread(target=answer, daemon=True)
    engine.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        server.engine.close()
        path = Path(args.out) / "stats.json"
        before = read_optional(path)
        stats = server.engine.describe()
        write_json(path, {name: round(value + before.get(name, 0), 1) for name, value in stats.items()})
    engine.join()  # not after Ctrl-C: its step may take minutes
    server.engine.sampler = None  # its memory is free before the tool evaluates


def read_objects(path):
    """The JSON objects in the lines of a file of a tool."""
    return [json.loads(line) for _, line in read_lines(path)]


def result_lines(out):
    return [line for path in out.glob(RESULTS) for line in path.read_bytes().split(b"\n") if line]


def keep_answers(out, failed=lambda line: False):
    """Remove what a kill or a dead server has left in a tool's results: half a line, and lines that are `failed`. The
    tool then asks for these items again. Returns the number of answers that are left."""
    for path in out.glob(RESULTS):
        lines = [line.decode() + "\n" for line in path.read_bytes().split(b"\n")[:-1] if line and not failed(line)]
        write_lines(path, lines)
    return len(result_lines(out))


def run_tool(command, out, log, variables, total=None, server=None):
    """Run a command of a tool in OUT, with its output in OUT/LOG. If it generates, `total` answers from a server.

    InputError if the tool fails, or if the server ends: the tool would record an error as the answer to all the rest.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REMOTE_OPENAI")}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "1",
                    "PYTHONDONTWRITEBYTECODE": "1", **variables}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with open(out / log, "w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=environment, cwd=out)
    try:
        for number, handler in handlers.items():
            if handler != signal.SIG_IGN:  # as by nohup
                signal.signal(number, lambda number, _: sys.exit(128 + number))  # ends the tool, too
        with tqdm(total=total, desc=log.removesuffix(".log"), unit="item", disable=total is None) as bar:
            while process.poll() is None and not (server and server.engine.error):
                time.sleep(0.5)
                bar.update(len(result_lines(out)) - bar.n)
                if server:  # a conversation may take an hour
                    bar.set_postfix_str("{requests} requests, {prompt_tokens_computed:,} prompt tokens computed".format(
                        **server.engine.describe()))
    finally:
        process.terminate()
        process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if server and server.engine.error:
        raise InputError(f"{server.engine.error}; continue with --resume")
    if process.returncode:
        raise InputError(f"{out / log}: the tool stopped; its last lines say why")


def read_score(out, pattern, ids, doubtful=frozenset()):
    """{item: 1 or 0} from a score file of a tool: its counts, and a line for each wrong item.

    doubtful: items that the tool may list as wrong although it counted them as right
    """
    path = next(out.glob(pattern), None)
    if path is None:
        raise InputError(f"{out}: the tool wrote no score {pattern}; see {out / 'evaluate.log'}")
    head, *wrong = read_objects(path)
    wrong = {line["id"] for line in wrong}
    if len(wrong) > head["total_count"] - head["correct_count"]:
        wrong -= doubtful
    items = {item: int(item not in wrong) for item in ids}
    right = sum(items.values())
    if (head["correct_count"], head["total_count"]) != (right, len(ids)):
        counts = f"{head['correct_count']} of {head['total_count']}"
        raise InputError(f"{path}: counts {counts}, not {right} of {len(ids)}")
    return items


def make_columns(items, sizes, table):
    """{column: [(weight, values)]}: a column is a weighted sum of means. The categories of items come first, then the
    columns of a table, {column: ("mean" or "pool", names)}, unless one of their names is missing. "pool" is the mean
    over all items: the weight of a category is its number of items (`sizes`), also if only some of them were drawn."""
    columns = {name: [(1.0, list(values.values()))] for name, values in items.items()}
    for name, (kind, names) in table.items():
        if columns.keys() >= set(names):
            shares = [sizes[one] if kind == "pool" else 1 for one in names]
            columns[name] = [(weight * share / sum(shares), values)
                             for one, share in zip(names, shares) for weight, values in columns[one]]
    return columns


def interval(part):
    """{"mean", "low", "high"} in percent of a column: Wilson intervals of its parts, combined in quadrature."""
    weight, n, p = np.array([(weight, len(values), np.mean(values)) for weight, values in part]).T  # [parts] each
    middle = (p + 1.96 ** 2 / (2 * n)) / (1 + 1.96 ** 2 / n)
    half = 1.96 * (p * (1 - p) / n + 1.96 ** 2 / (4 * n * n)) ** 0.5 / (1 + 1.96 ** 2 / n)
    mean = weight @ p
    low, high = np.linalg.norm([weight * (p - middle + half), weight * (middle + half - p)], axis=1)
    return {"mean": 100 * mean, "low": max(0.0, 100 * (mean - low)), "high": 100 * (mean + high)}


def paired_interval(part):
    """The same for differences between two models on the same items, by the normal approximation, with `items`. A part
    whose differences are all equal adds nothing to the width; in small parts, the interval is too narrow."""
    mean = sum(weight * np.mean(values) for weight, values in part)
    half = 1.96 * sum(weight ** 2 * np.var(values) / len(values) for weight, values in part) ** 0.5
    items = sum(len(values) for _, values in part)
    low, high = max(-1.0, mean - half), min(1.0, mean + half)
    return {"mean": 100 * mean, "low": 100 * low, "high": 100 * high, "items": items}


def report(args, items, other, sizes, table, details):
    """Write OUT/items.json and OUT/summary.json, and print the table (see `make_columns`), with what moves a score."""
    out = Path(args.out)
    scores = {}
    percent = "{mean:.1f} [{low:.1f}, {high:.1f}]"
    rows = [["", "items", "right, %", *(["difference (items)"] if other else [])]]
    differences = {name: {item: value - other[name][item] for item, value in values.items() if item in other[name]}
                   for name, values in items.items() if name in other}
    differences = make_columns({name: values for name, values in differences.items() if values}, sizes, table)
    for name, part in make_columns(items, sizes, table).items():
        scores[name] = interval(part)
        rows.append([name, sum(len(values) for _, values in part), percent.format(**scores[name])])
        if name in differences:
            scores[name]["difference"] = paired_interval(differences[name])
            rows[-1].append((percent.replace(":", ":+") + " ({items})").format(**scores[name]["difference"]))
    details |= {"max_new_tokens": args.max_new_tokens, "items_per_category": args.items or "all", "dtype": args.dtype,
                **read_optional(out / "stats.json")}
    write_json(out / "items.json", items)
    write_json(out / "summary.json", {"model": args.model, "scores": scores, **details})
    print()
    print_table(rows)
    print()
    print_table(details.items())

"""`star.py bfcl`: the official BFCL scores of a model, by the official tool (`bfcl-eval`), offline.

The tool renders the prompts, runs the simulated tools of multi-turn items, and scores. This file makes the tool's own
environment, serves the model (apps/serve.py), calls the tool's two commands and reads what they write (apps/official.py
lists the rest of OUT):

    --env DIR           a virtual environment with bfcl-eval; made if it is missing (4 minutes, 700 MB, needs pip)
    OUT/result_star     what the model answered, by category        OUT/score_star    the tool's scores

Releases: v3 is the paper's. It scores whole categories only, sends up to 100 requests at once, and wants an --env of
its own. v4 can score a subset. It changed half of the multi-turn items and a dozen others, some of the simulated tools,
and the value of an answer with one unparsable call: in v3 it is void, in v4 the other calls remain.

A multi-turn conversation that outgrows the model or LONGEST is a recorded failure: wrong, and counted. So is one with
a bad call before its last turn: in v3, one that cannot be parsed; in v4, JSON without name and arguments.

Multi-turn items make the tool evaluate calls that the model wrote, in its own process: run them in a sandbox.
"""
import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

from apps.official import add_flags, choose_items, make_environment, open_inputs
from apps.official import keep_answers, read_objects, read_score, report, result_lines, run_tool, serve_model
from data import InputError, read_json, write_json
from train import note, open_run

RELEASES = {"v4": "2026.3.23", "v3": "2025.8.6.2"}  # versions of bfcl-eval; the second is v3's last one
V3_NAMES = {"simple_python": "simple", "simple_java": "java", "simple_javascript": "javascript"}
HANDLER = "Qwen/Qwen3-0.6B-FC"  # it renders Qwen3's template, whatever the model
SIMPLE = ("simple_python", "simple_java", "simple_javascript")
NON_LIVE = (*SIMPLE, "multiple", "parallel", "parallel_multiple", "irrelevance")
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance")
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
LONGEST = dict.fromkeys(MULTI_TURN, 12_000) | {"multi_turn_long_context": 80_000}  # tokens, by Qwen's tokenizer; roomy
TOOLS = {  # of multi-turn items: the tool's class -> its file
    "GorillaFileSystem": "gorilla_file_system", "MathAPI": "math_api", "MessageAPI": "message_api",
    "TwitterAPI": "posting_api", "TicketAPI": "ticket_api", "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking", "VehicleControlAPI": "vehicle_control"}
PREFIX = 8_000  # tokens of a usual conversation
GROUPS = {"non_live": NON_LIVE, "live": LIVE, "multi_turn": MULTI_TURN}
AST = ("simple", "multiple", "parallel", "parallel_multiple")
COLUMNS = {  # as the tool makes them, of `make_columns`
    "simple": ("mean", SIMPLE),
    "Non-Live AST": ("mean", AST),
    "Non-Live, v3": ("mean", (*AST, "irrelevance")),
    "Live AST": ("pool", LIVE[:4]),
    "Live, v3": ("pool", LIVE),
    "Irrelevance": ("mean", ("irrelevance", "live_irrelevance")),
    "Multi-Turn": ("mean", MULTI_TURN),
    "overall, v3": ("mean", ("Non-Live, v3", "Live, v3", "Multi-Turn")),
}
read_class = cache(read_objects)  # the tools of a class of simulated ones
FAILED = b"Error during inference"  # what the tool records as an answer if a request failed
SERVER_FAILED = (b"Connection error", b"timed out", b"Error code: 5")  # in such a line: it was not the conversation


def bfcl_flags(parser):
    add_flags(parser, GROUPS, ["non_live", "live"], "bfcl-env")
    parser.add_argument("--release", choices=RELEASES, default="v4",
                        help="v3 is the paper's; it takes no --items, and an --env of its own")


def run_bfcl(args):
    """Score a model on BFCL with the official tool, offline."""
    # 1. Before anything is written, refuse bad input; make the tool's environment if it is missing.
    v3 = args.release == "v3"
    if v3 and args.items:
        raise InputError("--items: v3 scores whole categories only; leave it out, or use --release v4")
    chat, room, other = open_inputs(args)
    if sys.version_info >= (3, 13) and not Path(args.env).exists():
        raise InputError("bfcl-eval needs numpy 1.26, so Python 3.11 or 3.12; run this command with one of them")
    packages = ["--no-deps", f"bfcl-eval=={RELEASES[args.release]}"]
    tool = make_environment(args.env, packages, install_needs) / "bfcl"
    files = item_files(args, tool.parents[1])

    def read(name):
        return {entry["id"]: entry for entry in read_objects(files[name])}

    tokens = partial(longest_prompt, chat, room, files)
    chosen, sizes, too_long, longest = choose_items(args, GROUPS, read, tokens, room, other)
    if v3 and too_long:
        raise InputError(f"{args.model}: {sum(too_long.values())} prompts do not fit its context, and v3 scores whole "
                         "categories only; use --release v4, or other --categories")
    total = sum(map(len, chosen.values()))
    if total == 1 and chosen.keys().isdisjoint(MULTI_TURN):
        raise InputError("the tool cannot evaluate a single answer; give more --items or --categories")
    open_run(args, [args.model])

    # 2. Let the tool generate and score. It skips items that have an answer.
    out = Path(args.out).resolve()
    write_json(out / "test_case_ids_to_generate.json",
               {files[name].stem.removeprefix(f"BFCL_{args.release}_"): ids for name, ids in chosen.items()})
    variables = {"BFCL_PROJECT_ROOT": str(out), "LOCAL_SERVER_ENDPOINT": "127.0.0.1", "VLLM_ENDPOINT": "127.0.0.1"}
    flags = ["--model", HANDLER, "--result-dir", "result_star"]
    threads = 100 if v3 else min(2 * args.max_concurrent, 500)  # v3 takes no other; the server, 1,000 connections
    if keep_answers(out, is_failure) < total:
        conversations = min(threads, sum(len(chosen.get(name, ())) for name in MULTI_TURN))  # that run at a time
        if 0 < args.prefix_tokens < conversations * PREFIX:
            note(f"--prefix-tokens has room for {args.prefix_tokens // PREFIX} of {conversations} conversations that "
                 "run at a time; the others are computed again at each turn")
        with serve_model(args, longest) as server:
            command = [tool, "generate", *flags, "--skip-server-setup", "--local-model-path",
                       Path(args.model).resolve(), "--run-ids", "--num-threads", threads]
            ports = dict.fromkeys(("LOCAL_SERVER_PORT", "VLLM_PORT"), str(server.server_port))
            run_tool(command, out, "generate.log", variables | ports, total, server)
    command = [tool, "evaluate", *flags, "--score-dir", "score_star", *([] if v3 else ["--partial-eval"])]
    run_tool(command, out, "evaluate.log", variables)

    # 3. Read, check, report.
    items = read_items(out, chosen, files)
    report(args, items, other, sizes, COLUMNS, {
        "left_out": too_long, "think": chat.think, "bfcl_eval": RELEASES[args.release], "handler": HANDLER,
        "failed_conversations": sum(FAILED in line for line in result_lines(out))})
    subset = "a subset of " if args.items or too_long else ""
    print(f"\nThese are {subset}{args.release}'s items." + (
        "" if v3 else " The paper's columns are v3 and all items: --release v3."))


def item_files(args, env):
    """{category: the tool's file of its items}. InputError if the environment or --compare is of another release."""
    data = next(env.glob("lib/python*/site-packages/bfcl_eval/data"), env)
    tool_names = V3_NAMES if args.release == "v3" else {}
    files = {name: data / f"BFCL_{args.release}_{tool_names.get(name, name)}.json"
             for name in (*NON_LIVE, *LIVE, *MULTI_TURN)}
    if not files["irrelevance"].exists():
        raise InputError(f"{args.env}: holds no BFCL {args.release}; give another --env, or delete it to rebuild it")
    if args.compare:
        version = read_json(Path(args.compare) / "summary.json").get("bfcl_eval")
        if version != RELEASES[args.release]:
            raise InputError(f"{args.compare}: is of bfcl-eval {version}, whose items differ; use that --release")
    return files


def install_needs(pip):
    """Install what bfcl-eval needs, without what only online categories need, and two packages that it does not
    declare."""
    list_needs = ("from importlib.metadata import requires; print(*(r.replace(' ', '') for r in requires('bfcl-eval') "
                  "if 'extra' not in r and not r.startswith(('sentence-transformers', 'faiss'))))")
    needs = subprocess.run([pip[0], "-c", list_needs], check=True, capture_output=True, text=True).stdout.split()
    subprocess.run([*pip, *needs, "soundfile", "transformers"], check=True)


def longest_prompt(chat, room, files, name, entry):
    """Tokens of the longest prompt of an item. Of a conversation, as many as it may reach: LONGEST, or `room`."""
    if name not in MULTI_TURN:
        return prompt_tokens(chat, name, entry)
    folder = files[name].parent / "multi_turn_func_doc"
    tools = [tool for one in entry["involved_classes"] for tool in read_class(folder / f"{TOOLS[one]}.json")]
    return max(min(LONGEST[name], room), prompt_tokens(chat, name, entry | {"function": tools}))


def prompt_tokens(chat, name, entry):
    """Tokens of an item's first prompt, a few too many. The tool adds a note to each function's description and,
    in Java and JavaScript, a longer one to each parameter's; it writes tools in ASCII."""
    tools = entry["function"]
    text = chat.render(entry["question"][0], tools, generation_prompt=True)
    plain, escaped = (json.dumps(tools, ensure_ascii=ascii) for ascii in (False, True))
    escapes = 0 if plain == escaped else max(0, len(chat.encode(escaped)) - len(chat.encode(plain)))
    notes = [" Note that the provided function is in JavaScript syntax."] * len(tools)
    if name in SIMPLE[1:]:
        for parameter in (p for tool in tools for p in tool["parameters"].get("properties", {}).values()):
            notes += [" This parameter can be of any type of JavaScript object in string representation."] * 2
            notes += [json.dumps(json.dumps(parameter.get("properties", "")))]  # of an object
    tokens = len(chat.encode(text)) + escapes + len(chat.encode("".join(notes)))
    return tokens + tokens // 50 + 32


def is_failure(line):
    """Whether a line of results records a request that failed, other than by a conversation that grew too long."""
    conversation = b'"id": "multi_turn' in line and not any(why in line for why in SERVER_FAILED)
    return FAILED in line and not conversation


def read_items(out, chosen, files):
    """{category: {item: 1 or 0}} from the tool's score files. InputError if an answer is a recorded failure."""
    if failures := sum(map(is_failure, result_lines(out))):
        raise InputError(f"{out}: {failures} answers are recorded failures, which the tool would score; continue with "
                         "--resume, which asks for these again")
    return {name: read_score(out, f"score_star/**/{files[name].stem}_score.json", ids) for name, ids in chosen.items()}

"""`star.py acebench`: the official ACEBench scores of a model (English, normal part), by its own programs, offline.

--acebench names a clone of it, which is not changed: its two programs run in OUT/tool, on the chosen lines of its data,
and talk to the served model (apps/serve.py) as if it were OpenAI's. apps/official.py lists the rest of OUT.

    --env DIR        a virtual environment with three packages; made if it is missing (needs pip)
    OUT/tool/data_all     the chosen items and their gold answers
    OUT/tool/result_all   what the model answered, by category      OUT/tool/score_all    the tool's scores

1. Modules that the normal part imports but does not use (vllm, google, wcwidth) and those that write the tool's
   spreadsheets (pandas, openpyxl) are empty stand-ins: no spreadsheets are written.
2. An item of a multi-turn category is a whole dialogue, right if all of its turns are, as in the tool's accuracy. Each
   turn is asked with the gold turns before it.

To read a value such as 2 * 3, the tool evaluates what the model wrote, in its own process: run it in a sandbox.
"""
import json
import runpy
import subprocess
from functools import partial
from pathlib import Path

from apps.official import RESULTS, add_flags, choose_items, make_environment, open_inputs
from apps.official import keep_answers, read_objects, read_score, report, result_lines, run_tool, serve_model
from data import InputError, write_lines
from data.records import read_lines
from train import open_run

URL = "https://github.com/chenchen0103/ACEBench"
COMMIT = "56dd66cf6439b0d9655ee1b353e4cd745c6f664e"
PACKAGES = "openai==1.64.0", "python-dotenv==1.0.1", "tqdm==4.67.1"  # as in the tool's requirements.txt
NAME = "gpt-4o"  # the tool knows models by name; it looks for this one at GPT_BASE_URL
ATOM = tuple(f"normal_atom_{kind}" for kind in ("bool", "enum", "number", "list", "object_short", "object_deep"))
MULTI_TURN = ("normal_multi_turn_user_switch", "normal_multi_turn_user_adjust")
NORMAL = (*ATOM, "normal_single_turn_single_function", "normal_single_turn_parallel_function", *MULTI_TURN,
          "normal_similar_api", "normal_preference")
GROUPS = {"normal": NORMAL, "atom": ATOM, "multi_turn": MULTI_TURN}
COLUMNS = {"summary": ("mean", NORMAL)}  # as in the tool
DATA = "data_all/data_en"
GOLD = f"{DATA}/possible_answer"
LAUNCHER = """
import pathlib, runpy, sys, unittest.mock
for name in "vllm google google.generativeai wcwidth pandas openpyxl openpyxl.styles".split():
    sys.modules[name] = unittest.mock.MagicMock()
del sys.argv[0]
sys.path[0] = str(pathlib.Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def acebench_flags(parser):
    parser.add_argument("--acebench", required=True, metavar="CHECKOUT", help=f"clone of {URL} at {COMMIT[:7]}")
    add_flags(parser, GROUPS, ["normal"], "acebench-env")


def run_acebench(args):
    """Score a model on ACEBench's English normal part with the official programs, offline."""
    # 1. Before anything is written, refuse bad input; make the tool's environment if it is missing.
    chat, room, other = open_inputs(args)
    checkout = Path(args.acebench).resolve()
    git = ["git", "-C", checkout, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if subprocess.run(git, capture_output=True, text=True).stdout.strip() != COMMIT:
        remedy = f"git clone {URL} DIR && git -C DIR checkout {COMMIT[:7]}"
        raise InputError(f"{checkout}: is not ACEBench at {COMMIT[:7]}, unchanged; {remedy}")
    python = make_environment(args.env, PACKAGES) / "python"
    templates = runpy.run_path(str(checkout / "model_inference/prompt_en.py"))  # it only assigns texts to names

    def tokens(name, turns):
        return max(len(chat.encode(prompt(chat, templates, turn))) for turn in turns)

    read = partial(read_items, checkout / DATA)
    chosen, sizes, too_long, longest = choose_items(args, GROUPS, read, tokens, room, other)
    open_run(args, [args.model])

    # 2. Let the tool generate and score. It skips items that have an answer.
    out = Path(args.out).resolve() / "tool"  # its evaluation also writes beside this folder
    total = write_items(checkout, out, chosen)
    flags = ["--model", NAME, "--language", "en", "--category"]
    if keep_answers(out) < total:
        with serve_model(args, longest) as server:
            command = [python, "-c", LAUNCHER, checkout / "generate.py", *flags, "normal", "--temperature", "0.001",
                       "--max-tokens", args.max_new_tokens, "--num-threads", args.max_concurrent]
            variables = {"GPT_BASE_URL": f"http://127.0.0.1:{server.server_port}/v1", "GPT_AGENT_API_KEY": "none"}
            run_tool(command, out, "generate.log", variables, total, server)
    sort_answers(out)
    run_tool([python, "-c", LAUNCHER, checkout / "eval_main.py", *flags, *chosen], out, "evaluate.log", {})

    # 3. Read, report. A failed request stops the tool: it is never recorded as an answer.
    items = {name: read_scores(out, name) for name in chosen}
    without_text = sum(not json.loads(line)["result"] for line in result_lines(out))
    report(args, items, other, sizes, COLUMNS, {
        "left_out": too_long, "think": chat.think, "acebench": COMMIT[:7],
        "packages": " ".join(PACKAGES), "answers_without_text": without_text})
    print("\nThese are a subset of the items." if args.items or too_long else "")


def prompt(chat, templates, turn):
    """The prompt that the server will make of the tool's request."""
    kind = "PREFERENCE" if "profile" in turn else "NORMAL"
    system = templates[f"SYSTEM_PROMPT_FOR_{kind}_DATA_EN"].format(**turn)
    user = templates["USER_PROMPT_EN"].format(**turn)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return chat.prompt({"messages": messages, "tools": []})


def read_items(folder, name):
    """{item: its lines} of a category's file of data or of gold answers."""
    items = {}
    for line in read_objects(folder / f"data_{name}.json"):
        item = line["id"]
        if item.startswith("normal_multi_turn"):  # normal_multi_turn_user_adjust_3_0 is the first turn of dialogue 3
            item = item.rpartition("_")[0]
        items.setdefault(item, []).append(line)
    return items


def write_items(checkout, out, chosen):
    """Write the chosen lines of data and gold answers, in the order of their numbers, and the files of results, which
    generate.py expects of every category. Returns the number of lines."""
    total = 0
    for name in NORMAL:
        results = out / f"result_all/result_en/{NAME}"
        for folder in (GOLD, DATA):
            items = read_items(checkout / folder, name)
            lines = [json.dumps(line) + "\n" for item in items if item in chosen.get(name, ()) for line in items[item]]
            write_lines(out / folder / f"data_{name}.json", lines)
        results.mkdir(parents=True, exist_ok=True)
        (results / f"data_{name}_result.json").touch()
        total += len(lines)
    return total


def sort_answers(out):
    """Put the answers in the order of the items: the tool pairs them by their place, and sorts only at its very end."""
    for path in out.glob(RESULTS):
        items = [line["id"] for line in read_objects(out / DATA / path.name.replace("_result", ""))]
        lines = {json.loads(line)["id"]: line.decode() for _, line in read_lines(path)}
        write_lines(path, [lines[item] for item in items if item in lines])


def read_scores(out, name):
    """{item: 1 or 0} of a category. The tool lists items as wrong, too, that fit the second of several gold answers."""
    gold = read_items(out / GOLD, name)
    answers = {line["id"]: line["ground_truth"] for lines in gold.values() for line in lines}
    several = {line for line, answer in answers.items() if isinstance(answer, list)}
    right = read_score(out, f"score_all/score_en/{NAME}/data_{name}_score.json", answers, several)
    return {item: min(right[line["id"]] for line in lines) for item, lines in gold.items()}

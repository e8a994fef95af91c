"""STAR (arXiv 2602.03022) from the command line.

    python star.py demo
    python star.py ckd --teacher DIR --student DIR --data FILE --out DIR

`python star.py COMMAND --help` explains every flag. Bad input ends in one line and exit code 2.
"""
import argparse
import importlib
import os
import sys
import time

from apps.checks import check_call
from data import InputError, is_first_rank, leave, refuse_on_all, several_processes, unlock_all

# command: (module with COMMAND_flags and run_COMMAND, what it does)
COMMANDS = {
    "demo": ("apps.curriculum", "STAR on the bundled models: distil, refine, score"),
    "curriculum": ("apps.curriculum", "run a list of star.py command lines in order; resume it"),
    "prepare": ("data.prepare", "check and label records, choose a mix of them"),
    "sft": ("ckd", "fine-tune by cross-entropy on gold answers"),
    "rollout": ("apps.rollout", "sample and filter responses to prompts"),
    "ckd": ("ckd", "distil a teacher into a student"),
    "simrl": ("simrl", "refine a model by GRPO with the similarity reward"),
    "eval": ("apps.evaluate", "score a model's answers, compare two models"),
    "table": ("apps.curriculum", "several evaluations side by side"),
    "reward": ("apps.evaluate", "the similarity reward of given texts"),
    "chat": ("apps.talk", "talk to a model; you are its tools"),
    "serve": ("apps.serve", "an OpenAI-compatible endpoint on this machine"),
    "bfcl": ("apps.bfcl", "official BFCL scores, by the official tool"),
    "acebench": ("apps.acebench", "official ACEBench scores, by the official tool"),
    "estimate": ("apps.estimate", "memory and hours of every stage, from two model folders"),
    "lens": ("apps.lens", "CKD on one response, token by token, in HTML"),
    "plot": ("apps.plot", "curves of runs as a picture"),
}


def parse(argv):
    """Parse a command line. Returns (args, the function that runs it). A module is imported for its own command only,
    so that `star.py --help` does not import torch."""
    commands = "\n".join(f"  {name:12s}{what}" for name, (_, what) in COMMANDS.items())
    if os.environ.get("LOCAL_RANK", "0") != "0":
        argparse.ArgumentParser.error = staticmethod(refuse_on_all)  # waits: the first rank of a machine says it
    parser = argparse.ArgumentParser("star.py", description=__doc__, epilog=f"commands:\n{commands}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    command = parser.parse_args(argv[:1]).command
    module = importlib.import_module(COMMANDS[command][0])
    run = getattr(module, f"run_{command}")
    usage = f"star.py {command} [flags]   (--help explains them)"
    parser = argparse.ArgumentParser(f"star.py {command}", usage, run.__doc__, allow_abbrev=False)
    getattr(module, f"{command}_flags")(parser)
    for action in parser._actions:
        if not any(action.default is unset for unset in (None, False, argparse.SUPPRESS)):
            action.help += " (default: %(default)s)"
    args = parser.parse_args(argv[1:])
    args.command = command
    return args, run


def main(argv=None):
    """Run one command. Returns the exit code: 2 for errors that the user can correct, with one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    args, run = parse(argv)
    again = "continue with the same command and --resume"
    code = 2
    try:
        check_call(argv, args)
        result = run(args)
        if isinstance(result, list):  # of command lines: curriculum and demo
            return importlib.import_module("apps.curriculum").run_all(result, args, parse, main)
        sys.stdout.flush()
        return result or 0
    except BrokenPipeError:  # closed, by `| head` for example; results are on disk already
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell reports for SIGPIPE
    except (InputError, OSError) as e:
        message = str(e)
        if isinstance(e, OSError) and e.errno and not e.filename and getattr(args, "out", None):  # a failed write
            message = f"{args.out}: {e.strerror}; correct that and {again if 'resume' in args else 'try again'}"
    except (RuntimeError, MemoryError) as e:
        name = type(e).__name__
        if name in ("OutOfMemoryError", "MemoryError") or "can't allocate" in str(e) or "size calculation" in str(e):
            message = "out of memory; README.md, *Out of memory?*, says which flags reduce it"
            time.sleep(0 if is_first_rank() or hasattr(e, "agreed") else 3)  # if rank 0 reports it, torchrun ends this
        elif name == "RecursionError":
            message = "something is nested too deeply: JSON in an input, or a list of commands that runs itself"
        elif not name.startswith("Dist") and "gloo" not in str(e):
            raise
        else:  # a collective failed: another rank has ended
            code = 1
            message = f"another rank has ended, or cannot be reached ({str(e).splitlines()[0]}); {again}"
    except KeyboardInterrupt:
        code = 130
        message = f"interrupted; {again}" if "resume" in args else "interrupted"
    finally:
        unlock_all()
    # Printed only here, after any progress bar has ended its line. The rank that found bad input reports it.
    if code == 2 or is_first_rank():
        print(f"star.py {args.command}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    # Where the terminal cannot encode a character, print an escape instead of failing.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by the caller
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
    except SystemExit as e:  # of argparse, or of a rank whose error another rank reports
        code = e.code
    except KeyboardInterrupt:  # while modules were imported
        code = 130
    if several_processes() or code and code > 128:  # after a signal, the thread of a server may still compute
        leave(code)
    sys.exit(code)

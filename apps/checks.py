"""Checks made before a star.py command runs: the text of its flags, torchrun's variables, flags without effect."""
import os
import sys

from data import is_first_rank, refuse_on_all, several_processes

SEVERAL_PROCESSES = ("ckd", "sft", "simrl", "rollout", "eval", "serve")
TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")  # numbers, which it sets for each process

# (commands, flags, a condition in words, the condition): if it holds, a note on each of the flags that is given.
IDLE = (
    ("sft ckd simrl", "--valid-limit", "without --valid", lambda args: not args.valid),
    ("simrl", "--valid-every", "without --valid", lambda args: not args.valid),
    ("sft ckd", "--hold-out", "with --valid", lambda args: args.valid),
    ("sft ckd", "--valid-every --valid-answers", "without held-out records",
     lambda args: not args.valid and not args.hold_out),
    ("sft ckd", "--samples", "without held-out records",
     lambda args: args.samples and not args.valid and not args.hold_out),
    ("sft ckd simrl", "--epochs --episodes", "with --steps", lambda args: args.steps),
    ("ckd", "--tail-weight", "with --objective rskd or ce", lambda args: args.objective in ("rskd", "ce")),
    ("ckd", "--tail-weight", "with --kd-ratio 0", lambda args: not args.kd_ratio),
    ("ckd", "--kd-ratio", "with --objective ce", lambda args: args.objective == "ce"),
    ("simrl", "--max-draws", "with --filter none", lambda args: args.filter == "none"),
    # A batch takes whole groups until it has --batch-size responses.
    ("simrl", "--clip", "with one update a step", lambda args: (args.prompts_per_step - 1) * args.n < args.batch_size),
    ("simrl", "--strip-eos", "with --reward binary", lambda args: args.reward == "binary"),
    ("reward", "--strip-eos", "with --binary", lambda args: args.binary),
    ("prepare", "--max-prompt-tokens", "without --model", lambda args: not args.model),
    ("prepare", "--seed", "without --size", lambda args: not args.size),
    ("rollout chat", "--top-p --seed", "with --temperature 0", lambda args: not args.temperature),
    ("bfcl acebench", "--tools", "because the tool writes the prompts", lambda args: True),
    ("chat", "--tools-form", "without --tools", lambda args: not args.tools),
    ("eval", "--seed", "without --n", lambda args: not args.n),
)


def check_call(argv, args):
    """InputError if a command cannot run as it was called. Says on stderr which of the given flags have no effect."""
    text = " ".join(argv)
    if text.encode(errors="replace").decode() != text:
        refuse_on_all("a flag is not UTF-8 text; set the terminal's encoding to UTF-8, or rename the file")
    values = [os.environ.get(name, "") for name in TORCHRUN]
    if several_processes():
        numbers = all(value.isdecimal() for value in values) and int(values[3]) < 65536
        if not numbers or int(values[1]) >= int(values[0]) or not os.environ.get("MASTER_ADDR"):
            refuse_on_all(f"the environment has WORLD_SIZE={values[0]}, but not MASTER_ADDR and numbers in all of "
                          f"{', '.join(TORCHRUN[1:])}; start with torchrun, or unset WORLD_SIZE")
        if args.command not in SEVERAL_PROCESSES:
            refuse_on_all("this command is one process: start it without torchrun, once for each part of the data")
    given = {word.partition("=")[0] for word in argv}
    for commands, flags, when, idle in IDLE if is_first_rank() else ():
        for flag in flags.split():
            if args.command in commands.split() and flag in given and idle(args):
                print(f"note: {flag} has no effect {when}", file=sys.stderr)

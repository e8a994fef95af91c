"""Command-line flags that several commands of star.py share, the kinds of numbers they take, and which a resumed run
may change."""
import argparse

# May differ when a run is resumed: what changes memory and speed, and a rollout's filters, which act at its end.
FREE_FLAGS = ("run", "resume", "overwrite", "out", "device", "keep_all", "min_reward", "save_every", "micro_tokens",
              "gradient_checkpointing")


def within(kind, least, most=float("inf")):
    """An argparse type: numbers from `least` to `most`."""
    def number(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return kind(text)

    return number


count, natural, amount = within(int, 1), within(int, 0), within(float, 0.0)


def prompts(p, form="--tools"):
    """How records are written as prompts."""
    g = p.add_argument_group("prompts")
    g.add_argument("--think", choices=("on", "off", "none"), help="on: the prompt ends in an opened <think>; off: "
                   "in an empty think block; none: no think tags; default: what the model's template knows")
    g.add_argument(form, choices=("flat", "wrapped"), default="flat", help="tools as released, or as OpenAI does")


def sampling(p, temperature, new_tokens):
    """How responses are drawn."""
    g = p.add_argument_group("sampling")
    g.add_argument("--temperature", type=amount, default=temperature, help="0 is greedy")
    g.add_argument("--top-p", type=within(float, 1e-6, 1.0), default=1.0, help="draw from the likeliest only")
    g.add_argument("--max-new-tokens", type=count, default=new_tokens, help="cut a response here")


def machine(p, dtype_help):
    """Where and how precisely to compute, and the seed."""
    g = p.add_argument_group("machine")
    g.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    g.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help=dtype_help)
    g.add_argument("--seed", type=within(int, 0, 2 ** 32 - 1), default=42, help="of everything random")


def reading(p, what):
    """What to read."""
    p.add_argument("--data", required=True, help=f"{what}, .jsonl or .jsonl.gz")
    p.add_argument("--limit", type=count, help="read only the first so many records")
    p.add_argument("--max-prompt-tokens", type=count, default=5120, help="longer prompts are left out")


def going_on(p, what):
    """What to write, and what to do about what is there."""
    p.add_argument("--out", required=True, help=what)
    g = p.add_mutually_exclusive_group()
    g.add_argument("--resume", action="store_true", help="go on where a stopped run was")
    g.add_argument("--overwrite", action="store_true", help="start anew over what is there")


def optimisation(p, lr, weight_decay, save_every):
    """How to train, what to write, where to compute; returns the group of the run."""
    g = p.add_argument_group("optimisation")
    g.add_argument("--lr", type=amount, default=lr, help="peak rate; 3%% warm-up, cosine to a tenth")
    g.add_argument("--batch", type=count, default=128, help="sequences an optimiser step, in whole groups")
    g.add_argument("--weight-decay", type=amount, default=weight_decay, help="on matrices only")
    g.add_argument("--micro-tokens", type=count, default=4096, help="padded tokens in memory at a time; changes "
                   "memory and speed, not the gradient (except of --loss-mean micro-batch)")
    g.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations: slower, smaller")
    g = p.add_argument_group("run")
    going_on(g, "folder of the run")
    g.add_argument("--save-every", type=count, default=save_every, help="steps between checkpoints; two are kept")
    g.add_argument("--save-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the final model")
    machine(p, "compute; weights and optimiser are float32")
    return g


def settings(args):
    """The flags that must be the same when a run is resumed."""
    free = FREE_FLAGS + (("rows",) if args.command == "simrl" else ())  # elsewhere it changes what is drawn
    return {name: value for name, value in vars(args).items() if name not in free}

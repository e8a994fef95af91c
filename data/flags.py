"""The flags of star.py: those that several commands share, then `parser` with all of them command by command; the kinds
of numbers they take, and which of them a resumed run may change."""
import argparse

from data.curriculum import STAGES

# May differ when a run is resumed: what changes memory and speed, and a rollout's filters, which act at its end.
FREE_FLAGS = ("resume", "overwrite", "out", "device", "keep_all", "min_reward", "save_every", "micro_tokens",
              "gradient_checkpointing")


def within(kind, least, most=float("inf")):
    """An argparse type: numbers from `least` to `most`."""
    def number(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return kind(text)

    return number


count, natural, amount = within(int, 1), within(int, 0), within(float, 0.0)


def objective(text):
    """An argparse type: a name in ckd.DIVERGENCES, the one list of objectives."""
    from ckd import DIVERGENCES  # here, as --help wants no torch
    if text not in DIVERGENCES:
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(DIVERGENCES)}")
    return text


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


def machine(p, dtype_help, dtype="bfloat16", seed=True):
    """Where and how precisely to compute, and the seed where anything is random."""
    g = p.add_argument_group("machine")
    g.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    g.add_argument("--dtype", choices=("bfloat16", "float32"), default=dtype, help=dtype_help)
    if seed:
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


def parser(doc, commands):
    """The command line. doc: what `--help` begins with · commands: {name: the function that runs it}."""
    top = argparse.ArgumentParser(prog="star.py", description=doc, formatter_class=argparse.RawTextHelpFormatter)
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name):
        what = commands[name].__doc__
        return subparsers.add_parser(name, help=what.split("\n")[0], description=what,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def training(p, lr, weight_decay):
        g = p.add_argument_group("data")
        reading(g, "records or rollouts")
        g.add_argument("--valid", help="records or rollouts to validate on; default: some of --data, held out")
        g.add_argument("--valid-limit", type=count, help="validate on only the first so many records")
        g.add_argument("--hold-out", type=natural, default=32, help="records held out of --data without --valid, "
                       "a quarter of them at most")
        g.add_argument("--max-response-tokens", type=count, default=512, help="longer responses are left out")
        g.add_argument("--mask", choices=("all", "think", "answer", "alter"), default="all",
                       help="which response tokens count: all, up to </think>, after it, or in turn")
        g.add_argument("--epochs", type=count, default=1, help="passes over the data")
        g.add_argument("--steps", type=count, help="optimiser steps, whatever --epochs says")
        g.add_argument("--branches", type=count, default=1, help="let up to so many neighbouring records with the same "
                       "tools share one row, in which what their prompts share is computed once")
        prompts(p)
        g = optimisation(p, lr, weight_decay, 100)
        g.add_argument("--optimiser", choices=("adamw", "muon"), default="adamw", help="muon: for very small "
                       "models; the layers' matrices at 5 times --lr")
        g.add_argument("--valid-every", type=count, default=100, help="steps between validations")
        g.add_argument("--samples", type=natural, default=3, help="held-out prompts to answer before and after")

    p = command("ckd")
    p.add_argument("--teacher", required=True, help="model folder")
    p.add_argument("--student", required=True, help="model folder")
    g = p.add_argument_group("objective")
    g.add_argument("--objective", type=objective, default="ckd", metavar="NAME",
                   help="ckd (fkl with the tail penalty), fkl, rkl, akl, rskd or ce: a key of ckd.DIVERGENCES")
    g.add_argument("--k", type=count, default=100, help="teacher's likeliest tokens (rskd: draws)")
    g.add_argument("--m", type=count, default=100, help="student's likeliest tokens, for the tail penalty")
    g.add_argument("--tail-weight", type=amount, help="lambda; default 10 for ckd, 0 for the others")
    g.add_argument("--kd-ratio", type=within(float, 0.0, 1.0), default=1.0, help="the rest is cross-entropy")
    g.add_argument("--cache", metavar="DIR", help="keep the teacher's log-probs on disk; written once, then read")
    training(p, 3e-6, 1e-4)

    p = command("sft")
    p.add_argument("--model", required=True, help="model folder to start from")
    training(p, 1e-5, 0.0)

    p = command("simrl")
    p.add_argument("--model", required=True, help="model folder to start from; also the reference of the KL")
    g = p.add_argument_group("data")
    reading(g, "records with gold answers")
    g.add_argument("--episodes", type=count, default=3, help="passes over the prompts, if none are drawn in addition")
    g.add_argument("--steps", type=count, help="rollout batches, whatever --episodes says")
    prompts(p)
    sampling(p, 1.0, 512)
    g = p.add_argument_group("Sim-RL")
    g.add_argument("--prompts", type=count, default=128, help="prompts a step")
    g.add_argument("--n", type=within(int, 2), default=8, help="responses to a prompt")
    g.add_argument("--rows", type=count, default=64, help="responses in the making at a time: memory and speed only")
    g.add_argument("--reward", choices=("similarity", "binary"), default="similarity", help="binary: all or nothing")
    g.add_argument("--strip-eos", action="store_true", help="keep the end token out of text replies")
    g.add_argument("--filter", choices=("scores", "rewards", "none"), default="scores", help="groups to train on: "
                   "answer scores not all equal, their mean within 0.01-0.99; rewards not all equal; all")
    g.add_argument("--max-draws", type=count, default=4, help="draw at most so many times --prompts to fill a step")
    g.add_argument("--advantage", choices=("group_norm", "dr_grpo"), default="group_norm",
                   help="R - mean over the standard deviation, or R - mean")
    g.add_argument("--kl-weight", type=amount, default=1e-3, help="of the KL to the starting model; 0 loads none")
    g.add_argument("--clip", type=amount, nargs=2, default=[0.2, 0.2], metavar=("LOW", "HIGH"), help="of the ratio")
    g.add_argument("--loss-mean", choices=("token", "micro-batch", "sequence"), default="token",
                   help="over an optimiser step's tokens; of micro-batch means, as released; as in the paper")
    optimisation(p, 3e-7, 0.0, 10)

    p = command("prepare")
    p.add_argument("--data", required=True, nargs="+", metavar="FILE", help="records with gold answers")
    p.add_argument("--out", required=True, help="file to write, .jsonl or .jsonl.gz: records, `labels` and `turns`")
    p.add_argument("--size", type=count, help="choose so many by the released quotas; default: keep all")
    p.add_argument("--model", metavar="DIR", help="model folder whose tokenizer measures prompts")
    p.add_argument("--max-prompt-tokens", type=count, default=8192, help="with --model: longer prompts are left out")
    p.add_argument("--seed", type=int, default=42, help="of the choice")
    p.add_argument("--overwrite", action="store_true", help="write over what is there")

    p = command("rollout")
    p.add_argument("--model", required=True, help="model folder")
    reading(p, "records; an answer is not needed")
    going_on(p, "file to write: the records with `responses`")
    p.add_argument("--n", type=count, default=8, help="responses to a prompt")
    p.add_argument("--rows", type=count, default=64, help="responses in the making at a time")
    g = p.add_argument_group("filters, at the end of a run").add_mutually_exclusive_group()
    g.add_argument("--keep-all", action="store_true", help="keep responses of bad form and duplicates")
    g.add_argument("--min-reward", type=within(float, -1.0, 1.0), metavar="X", help="drop what is worth less, too")
    prompts(p)
    sampling(p, 1.0, 512)
    machine(p, "weights and compute")

    p = command("eval")
    p.add_argument("--model", required=True, help="model folder")
    reading(p, "records with gold answers")
    going_on(p, "folder for the generations, their scores and summary.json")
    p.add_argument("--compare", metavar="DIR", help="a second model folder, evaluated too (into OUT-compared), or the "
                   "--out of an earlier eval on the same records")
    p.add_argument("--n", type=natural, default=0, help="also draw so many samples at temperature 1: pass@n, entropy")
    p.add_argument("--rows", type=count, default=64, help="responses in the making at a time")
    p.add_argument("--max-new-tokens", type=count, default=512, help="cut a response here")
    prompts(p)
    machine(p, "weights and compute")

    p = command("reward")
    p.add_argument("--data", required=True, help="lines of prompt, generation and label, .jsonl or .jsonl.gz")
    p.add_argument("--out", metavar="FILE", help="file to write; default: the terminal")
    p.add_argument("--explain", type=count, metavar="LINE", help="print how this line's reward came about instead")
    p.add_argument("--think", choices=("on", "none"), default="on", help="none: ask for no think block, for models "
                   "without such tags")
    p.add_argument("--strip-eos", action="store_true", help="keep the end token out of text replies; released: it "
                   "counts, which makes an empty reply to a short refusal worth 0.5")
    p.add_argument("--binary", action="store_true", help="all or nothing: the paper's ablation")

    p = command("chat")
    p.add_argument("--model", required=True, help="model folder")
    p.add_argument("--tools", metavar="FILE", help="JSON list of tools")
    p.add_argument("--system", help="system message; default: the model's own")
    prompts(p, "--tools-form")
    sampling(p, 0.0, 512)
    machine(p, "weights and compute")

    p = command("curriculum")
    p.add_argument("--teacher", required=True, help="model folder")
    p.add_argument("--student", required=True, help="model folder")
    p.add_argument("--data", required=True, help="records with gold answers, .jsonl or .jsonl.gz")
    p.add_argument("--valid", help="records with gold answers to score every model on; default: no scores")
    going_on(p, "folder for everything")
    p.add_argument("--skip", nargs="+", choices=STAGES, default=[], help="stages to leave out")
    g = p.add_argument_group("further flags of a stage's own command, as one text: --ckd '--lr 1e-5 --k 50', "
                             "a single one as --ckd=--gradient-checkpointing")
    for stage, single in zip(STAGES, ("simrl, on the teacher", "rollout", "ckd", "simrl", "eval")):
        g.add_argument(f"--{stage}", metavar="FLAGS", default="", help=f"for {single}")
    prompts(p)
    machine(p, "compute")

    p = command("demo")
    p.add_argument("--out", default="runs/demo", help="folder for everything it makes")
    p.add_argument("--resume", action="store_true", help="go on where a stopped demo was")
    p.add_argument("--overwrite", action="store_true", help="start anew over what is there")
    p.add_argument("--quick", action="store_true", help="a few steps only: shows the plumbing, teaches little")
    p.add_argument("--seed", type=int, default=42, help="of everything random")

    p = command("lens")
    p.add_argument("--teacher", required=True, help="model folder")
    p.add_argument("--student", required=True, help="model folder")
    p.add_argument("--data", required=True, help="records or rollouts, .jsonl or .jsonl.gz")
    p.add_argument("--row", type=count, default=1, metavar="N", help="which record, from 1")
    p.add_argument("--response", type=natural, metavar="N", help="which of its responses, from 1; 0: its gold answer; "
                   "default: the first, or the gold answer of a record without responses")
    p.add_argument("--k", type=count, default=100, help="size of V_k: the teacher's likeliest tokens")
    p.add_argument("--m", type=count, default=100, help="size of V_m: the student's likeliest tokens")
    p.add_argument("--tail-weight", type=amount, default=10.0, metavar="X", help="lambda, of the tail penalty")
    p.add_argument("--out", required=True, metavar="FILE.html", help="page to write")
    prompts(p)
    machine(p, "weights and compute; bfloat16 blurs what is small", "float32", seed=False)

    p = command("plot")
    p.add_argument("runs", nargs="+", metavar="RUN", help="--out folder of a run")
    p.add_argument("--out", required=True, metavar="FILE.png", help="picture to write")
    return top

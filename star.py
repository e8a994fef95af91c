"""STAR (arXiv 2602.03022) from the command line: one subcommand and one short function per stage.

    python star.py demo                                              a few minutes, nothing needed
    python star.py curriculum --teacher DIR --student DIR --data FILE --out DIR       the paper's stages in their order
    python star.py sft     --model DIR --data FILE --out DIR         cross-entropy on gold answers
    python star.py prepare --data FILE [FILE ...] --out FILE         self-check, labels, a mix by quotas
    python star.py rollout --model DIR --data FILE --out FILE        a teacher's answers to the prompts
    python star.py ckd     --teacher DIR --student DIR --data FILE --out DIR
    python star.py simrl   --model DIR --data FILE --out DIR         GRPO with the similarity reward
    python star.py eval    --model DIR --data FILE --out DIR         exact calls, reward, refusals; --compare DIR
    python star.py reward  --data FILE                               the similarity reward of anybody's generations
    python star.py chat    --model DIR [--tools FILE]
    python star.py lens    --teacher DIR --student DIR --data FILE --out FILE.html       what CKD sees, token by token
    python star.py plot    RUN [RUN ...] --out FILE.png

`python star.py COMMAND --help` explains every flag. Bad input ends in one line and exit code 2.
"""
import argparse
import os
import shlex
import sys
from pathlib import Path

from data import InputError, read_json, write_json, write_lines
from data.chat import Chat
from data.flags import parser, settings
from data.sources import read_records, read_tools


def run_training(args, student_folder, teacher_folder=None, **objective):
    """What `sft` and `ckd` share: read, check, load, train, show, save."""
    import ckd
    from data.groups import read_groups
    from data.rollouts import answers
    from data.show import show_run
    from model import Transformer
    from train import set_up
    device, rank, ranks = set_up(args.device)
    dtype = torch_dtype(args.dtype)
    say = print if rank == 0 else lambda *_: None
    chat, width, made_from = Chat.from_pretrained(student_folder, think=args.think, tools=args.tools), None, None
    if teacher_folder:
        width, made_from = ckd.check_pair(teacher_folder, student_folder)
    caps = args.max_prompt_tokens, args.max_response_tokens, args.mask
    groups, valid = read_groups(args.data, args.valid, chat, caps, args.limit, args.valid_limit, args.hold_out,
                                args.seed, args.branches, say)
    teacher = None
    if teacher_folder:
        teacher = ckd.open_teacher(lambda: Transformer.from_pretrained(teacher_folder, dtype, device), groups + valid,
                                   args.objective, args.k, width, device, args.micro_tokens, args.seed, args.cache,
                                   made_from | {"dtype": args.dtype}, ranks)
    start = begin(args, device, rank, [student_folder, teacher_folder], [args.data, args.valid])
    student = Transformer.from_pretrained(student_folder, device=device)
    student.model.gradient_checkpointing = args.gradient_checkpointing
    if args.valid and not valid:
        say(f"{args.valid}: no record is within the caps, so nothing is validated")
    responses = sum(len(g["responses"]) for g in groups)
    say(f"{responses:,} responses to {len(groups):,} prompts, {len(valid)} prompts held "
        f"out; {student.size() / 1e6:,.1f} M parameters on {device}, {args.dtype} over float32"
        + (f"; resuming after step {start}" if start else ""))
    if not args.steps and responses * args.epochs < 10 * args.batch:
        say(f"They fill {responses * args.epochs / args.batch:.1f} batches of {args.batch}, a step each; to learn "
            "more, give --steps, or more --epochs and a smaller --batch, and perhaps a higher --lr")
    samples = Path(args.out) / "samples.json"
    if rank == 0 and not start:
        write_json(samples, answers(student, chat, valid[:args.samples], dtype, "before"))
    summary = ckd.distill(student, groups, valid, args.out, teacher, lr=args.lr, weight_decay=args.weight_decay,
                          batch=args.batch, epochs=args.epochs, steps=args.steps, width=width, dtype=dtype,
                          micro_tokens=args.micro_tokens, valid_every=args.valid_every, save_every=args.save_every,
                          start=start, seed=args.seed, rank=rank, ranks=ranks, optimiser=args.optimiser, **objective)
    if summary is not None and rank == 0:
        before, after = read_json(samples, kind=list), answers(student, chat, valid[:args.samples], dtype, "after")
        both = [b | a for b, a in zip(before, after)]
        write_json(samples, both)
        show_run(both, summary)
    return end(args, student, summary, rank)


def run_sft(args):
    """Cross-entropy on gold answers (or on the responses of a rollout file): `ckd --objective ce` without a teacher."""
    return run_training(args, args.model, kind="ce")


def run_ckd(args):
    """Distil a teacher into a student, along the responses of a rollout file or along gold answers."""
    tail = args.tail_weight if args.tail_weight is not None else 10.0 if args.objective == "ckd" else 0.0
    return run_training(args, args.student, args.teacher, kind=args.objective, m=args.m, tail_weight=tail,
                        kd_ratio=args.kd_ratio)


def run_simrl(args):
    """Refine a model by GRPO on its own samples, scored by how similar their calls are to the gold calls."""
    import simrl
    from data.rollouts import judge, read_prompts
    from data.show import show_groups
    from model import Transformer
    from train import set_up
    if args.top_p < 1 or args.temperature == 0:  # the trainer differentiates the whole distribution
        raise InputError("--top-p below 1 or --temperature 0: Sim-RL samples the whole distribution; leave both at 1")
    device, rank, ranks = set_up(args.device)
    dtype, say = torch_dtype(args.dtype), print if rank == 0 else lambda *_: None
    chat = Chat.from_pretrained(args.model, think=args.think, tools=args.tools)
    prompts = [{"record": record, "prompt": ids, "gold": chat.answer(record)} for record, ids in zip(
        *read_prompts(args.data, chat, args.max_prompt_tokens, args.limit, say=say)) if ids is not None]

    def score(record, text):
        """What Sim-RL learns from."""
        return judge(chat, record, text, strip_eos=args.strip_eos, binary=args.reward == "binary")

    start = begin(args, device, rank, [args.model], [args.data])
    model = Transformer.from_pretrained(args.model, device=device)
    model.model.gradient_checkpointing = args.gradient_checkpointing
    reference = Transformer.from_pretrained(args.model, dtype, device) if args.kl_weight else None  # pi_ref
    say(f"{len(prompts):,} prompts, {args.prompts} x {args.n} responses a step; {model.size() / 1e6:,.1f} M parameters "
        f"on {device}" + (f"; resuming after step {start}" if start else ""))
    summary = simrl.refine(
        model, prompts, args.out, score, chat.decode, chat.stop_ids, chat.vocab_size, reference, args.kl_weight,
        group_size=args.n, prompts_per_step=args.prompts, batch=args.batch, episodes=args.episodes, steps=args.steps,
        lr=args.lr, weight_decay=args.weight_decay, clip=args.clip, advantage=args.advantage,
        keep=args.filter, max_draws=args.max_draws, loss_mean=args.loss_mean, temperature=args.temperature,
        max_new_tokens=args.max_new_tokens, rows=args.rows, micro_tokens=args.micro_tokens, dtype=dtype,
        save_every=args.save_every, start=start, seed=args.seed, rank=rank, ranks=ranks)
    if summary is not None and rank == 0:
        show_groups(Path(args.out) / "samples.jsonl", summary)
    return end(args, model, summary, rank)


def run_prepare(args):
    """Drop records that cannot be learnt from, label the others, and choose a mix of them by quotas."""
    from data.prepare import prepare
    chat = Chat.from_pretrained(args.model) if args.model else None
    prepare(args.data, args.out, args.size, chat, args.max_prompt_tokens, args.seed, args.overwrite)


def run_rollout(args):
    """Write each record back with n sampled responses, filtered by form, with their rewards where it has an answer."""
    from data.rollouts import rollout
    from model import Transformer
    from train import set_up
    chat = Chat.from_pretrained(args.model, think=args.think, tools=args.tools)
    rollout(lambda: Transformer.from_pretrained(args.model, torch_dtype(args.dtype), set_up(args.device)[0]), chat,
            args.data, args.out, limit=args.limit, n=args.n, rows=args.rows, max_prompt_tokens=args.max_prompt_tokens,
            max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
            resume=args.resume, overwrite=args.overwrite, keep_all=args.keep_all, min_reward=args.min_reward,
            arguments=settings(args))


def run_eval(args):
    """Score a model's answers to records that have gold answers, with intervals; compare two models on them."""
    from data import evaluation
    from data.rollouts import read_prompts
    from model import Transformer
    from train import set_up
    device, out, old, done = set_up(args.device)[0], Path(args.out), args.compare, []
    asked = [(args.model, out)]
    if old and (Path(old) / "config.json").exists():  # a model; otherwise an evaluation made before
        asked, old = [(old, Path(f"{out}-compared")), *asked], None
    elif old:
        done = [(read_json(Path(old) / "arguments.json", "--compare takes a model folder or the --out of an eval"),
                 evaluation.read(Path(old) / "generations.jsonl"))]
    runs = []
    for model, folder in asked:  # all is read and refused before anything is written
        chat = Chat.from_pretrained(model, think=args.think, tools=args.tools)
        runs.append((chat, read_prompts(args.data, chat, args.max_prompt_tokens, args.limit),
                     argparse.Namespace(**vars(args) | {"model": model, "out": folder, "compare": None})))
    for *_, run in runs:
        begin(run, device, 0, [model for model, _ in asked], [args.data, old and Path(old, "x")])
    for chat, (records, prompts), run in runs:
        done.append((settings(run), evaluation.generate(
            lambda: Transformer.from_pretrained(run.model, torch_dtype(run.dtype), device), chat, records, prompts,
            run.out, run.n, run.rows, run.max_new_tokens, run.seed)))
    evaluation.report(out / "summary.json", *done[::-1])
    print(f"\nThe generations with their scores are in {out}/generations.jsonl")


def run_reward(args):
    """The reward and answer score of each line of {"prompt", "generation", "label"}, as JSON lines in their order."""
    from data.evaluation import score_file
    if args.out and Path(args.out).exists():
        raise InputError(f"{args.out}: exists already; give another --out")
    lines = score_file(args.data, args.explain, think=args.think, strip_eos=args.strip_eos, binary=args.binary)
    write_lines(args.out, lines) if args.out else sys.stdout.writelines(lines)


def run_chat(args):
    """Talk to a model. Where it calls a tool, you are the tool: type its result."""
    from data.talk import talk
    from model import Transformer
    from train import set_up
    chat = Chat.from_pretrained(args.model, think=args.think, tools=args.tools_form)
    tools = read_tools(args.tools) if args.tools else []
    model = Transformer.from_pretrained(args.model, torch_dtype(args.dtype), set_up(args.device)[0])
    print(f"{args.model} with {len(tools)} tools. An empty line or Ctrl-D ends.")
    talk(model, chat, tools, args.system, args.max_new_tokens, args.temperature, args.top_p, args.seed)


def run_curriculum(args):
    """The paper's order: refine the teacher, roll out, distil, refine the student, score; each the single command."""
    from data import curriculum
    from train import set_up
    shared = [word for name in ("think", "tools", "device", "dtype", "seed") if getattr(args, name) is not None
              for word in (f"--{name}", str(getattr(args, name)))]
    stages, models = curriculum.plan(args.teacher, args.student, args.data, Path(args.out), args.valid, {
        stage: shlex.split(getattr(args, stage)) for stage in curriculum.STAGES}, shared, args.skip)
    for _, _, words in stages:  # a mistyped flag of the last stage ends it here, and so does a broken line
        parser(__doc__, COMMANDS).parse_args(words)
    for file in filter(None, (args.data, args.valid)):
        read_records(file, need_answer=True)
    begin(args, set_up(args.device)[0], 0, [args.teacher, args.student], [args.data, args.valid])
    return curriculum.follow(stages, models, Path(args.out), main)


def run_demo(args):
    """STAR on the embedded world: score a student, distil its teacher into it, refine it, score again."""
    from data.curriculum import TINY, demo
    if Path(args.out).exists() and not (args.resume or args.overwrite):
        raise InputError(f"{args.out}: exists already; give --resume to go on with it or --overwrite to start anew")
    words = demo(args.out, args.quick, args.seed) + ["--resume"] * args.resume + ["--overwrite"] * args.overwrite
    print("A student that fumbles, a teacher that does not: scores both, lets the teacher answer, distils it (CKD), "
          "refines the student (Sim-RL) and scores it again; "
          f"{'under a minute' if args.quick else 'four to five minutes'} on two CPU cores.\n\n"
          f"$ python star.py {shlex.join(words)}", flush=True)
    code, tiny = main(words), os.path.relpath(TINY)
    if not code:
        print(f"\nEverything is in {args.out}. What to type next:\n"
              f"\npython star.py chat --model {args.out}/star/model --tools {tiny}/chat_tools.json"
              f"\npython star.py plot {args.out}/ckd {args.out}/star --out curves.png"
              f"\npython star.py lens --teacher {tiny}/teacher --student {args.out}/ckd/model "
              f"--data {tiny}/values.jsonl.gz --row 30 --k 4 --m 4 --out lens.html")
    return code


def run_lens(args):
    """Show one response token by token as CKD sees it: both models' tokens, both loss terms, the gradient; one page."""
    from data.lens import lens
    from model import Transformer
    from train import set_up
    device, dtype = set_up(args.device)[0], torch_dtype(args.dtype)
    chat = Chat.from_pretrained(args.student, think=args.think, tools=args.tools)
    means = lens(lambda folder: Transformer.from_pretrained(folder, dtype, device), chat, args.teacher, args.student,
                 args.data, args.out, args.row, args.response, args.k, args.m, args.tail_weight, device)
    print(f"wrote {args.out}; means: " + "  ".join(f"{name} {value:.4f}" for name, value in means.items()))


def run_plot(args):
    """Draw the curves of one or more runs, overlaid, from their metrics.jsonl."""
    from data.pictures import plot
    plot(args.runs, args.out)
    print(f"wrote {args.out}")


def begin(args, device, rank, folders, files):
    """Open the run at --out and return the step to go on from. What it reads is looked at first: model folders that are
    broken, and --overwrite of a folder that holds one of them, are refused before anything is touched."""
    from model import Transformer
    from train import open_run
    for folder in filter(None, folders):
        Transformer.from_pretrained(folder, device="meta")
    read = [Path(p, "x").resolve() for p in folders if p] + [Path(p).resolve() for p in files if p]
    if args.overwrite and any(Path(args.out).resolve() in path.parents for path in read):
        raise InputError(f"{args.out}: --overwrite would delete what this run reads; name another --out")
    return open_run(args.out, settings(args), args.resume, args.overwrite, device, rank)


def end(args, model, summary, rank):
    """Save a finished run's model and summary, or say how to go on with a stopped one; returns the exit code."""
    if rank == 0 and summary is None:
        print(f"Stopped. Go on with the same command and --resume; checkpoints are in {args.out}/checkpoints")
    elif rank == 0:
        model.save_pretrained(Path(args.out) / "model", torch_dtype(args.save_dtype))
        write_json(Path(args.out) / "summary.json", summary)
        print(f"\nThe model is in {args.out}/model: python star.py chat --model {args.out}/model")
    return 130 if summary is None else 0


def torch_dtype(name):
    """The torch dtype of a command-line name."""
    import torch
    return getattr(torch, name)


COMMANDS = {"demo": run_demo, "curriculum": run_curriculum, "sft": run_sft, "prepare": run_prepare,
            "rollout": run_rollout, "ckd": run_ckd, "simrl": run_simrl, "eval": run_eval, "reward": run_reward,
            "chat": run_chat, "lens": run_lens, "plot": run_plot}


def main(argv=None):
    """Run one command; returns the exit code. What the user can mend ends in one line and code 2."""
    args = parser(__doc__, COMMANDS).parse_args(argv)
    try:
        if args.command not in ("ckd", "sft", "simrl") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("this command is one process: start it without torchrun, once for each part of the data")
        return COMMANDS[args.command](args) or 0
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InputError, OSError) as e:
        message = str(e)
        if isinstance(e, OSError) and e.errno and not e.filename and "resume" in args:  # a write that failed half-way
            message = f"{args.out}: {e.strerror}; mend that and go on with --resume"
    except KeyboardInterrupt:
        return 130
    print(f"star.py {args.command}: {message}", file=sys.stderr)  # here, where progress bars have ended their line
    return 2


if __name__ == "__main__":
    sys.exit(main())

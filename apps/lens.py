"""CKD as a picture: one response, token by token, on a self-contained HTML page.

The numbers are those of training: `Teacher` and `ckd_loss` compute them; the arrows are the gradient of that loss.
Text from models and records is untrusted: lens.html takes it HTML-escaped, or in JSON that its script turns into
text nodes, and its content security policy forbids it to load anything.
"""
import html
import json
import math
import re
from pathlib import Path

import torch

from ckd import ckd_loss
from data import InputError, non_negative, natural, positive, write_lines
from data.chat import Chat, add_prompt_flags, check_pair, text_of
from data.groups import make_groups, pack
from data.records import has_answer, read_records
from head import counted_states, logits_in_chunks
from model import Transformer
from teacher import Teacher, clamp_to_vocab
from train import add_machine_flags, pick_device


def lens_flags(parser):
    add = parser.add_argument
    add("--teacher", required=True, help="model folder")
    add("--student", required=True, help="model folder")
    add("--data", required=True, help="records or rollouts, .jsonl or .jsonl.gz")
    add("--row", type=positive, default=1, metavar="N", help="which record, from 1")
    add("--response", type=natural, metavar="N",
        help="which response, from 1; 0: the gold answer; default: the first, if any")
    add("--k", type=positive, default=100, help="size of the teacher's top-k")
    add("--m", type=positive, default=100, help="size of the student's top-m")
    add("--tail-weight", type=non_negative, default=10.0, metavar="X", help="lambda")
    add("--out", required=True, metavar="FILE.html", help="page to write")
    add_prompt_flags(parser)
    add_machine_flags(parser, "weights and compute", "float32", seed=False)


def run_lens(args):
    """Show one response token by token as CKD sees it: both models' tokens, both loss terms, the gradient."""
    if Path(args.out).suffix != ".html":
        raise InputError(f"{args.out}: is not a page; give an --out that ends in .html")
    chat = Chat.from_pretrained(args.student, args.think, args.tools)
    vocab_size = check_pair(args.teacher, args.student)
    records = read_records(args.data, vocab_size=chat.vocab_size, limit=args.row)
    group, title = choose_response(records, chat, args)
    k = clamp_to_vocab("k", args.k, vocab_size)
    m = clamp_to_vocab("m", args.m, vocab_size)

    device = pick_device(args)
    dtype = getattr(torch, args.dtype)
    packed = pack([group], device)
    teacher = Transformer.from_pretrained(args.teacher, dtype, device)
    topk = Teacher(teacher, k, vocab_size)(packed)  # ids, log-probs [N, k]
    del teacher  # the two models are never in memory together
    student = Transformer.from_pretrained(args.student, dtype, device)
    tokens = inspect_tokens(student, packed, topk, vocab_size, m, args.tail_weight)

    names = ("loss", "kl", "tail", "inside", "captured", "nll", "entropy")
    means = {name: sum(token[name] for token in tokens) / len(tokens) for name in names}
    if not math.isfinite(sum(means.values())):  # JSON has no inf and NaN
        raise InputError("the loss is not finite: use a smaller --tail-weight, or models without NaN weights")
    ids = {token["id"] for token in tokens}
    ids |= {row[0] for token in tokens for row in token["teacher"] + token["student"]}
    texts = {i: token_text(chat, i) for i in sorted(ids)}
    data = {"k": k, "m": m, "weight": args.tail_weight, "means": means, "tokens": tokens, "texts": texts}
    record = group.record
    write_page(args.out, data, {
        "title": f"{title} of record {args.row} in {args.data}",
        "teacher": args.teacher, "student": args.student,
        "request": text_of(record["messages"][-1]),
        "tools": ", ".join(tool["name"] for tool in record["tools"]) or "none",
        "gold": chat.answer(record) if has_answer(record) else "none",
    })
    figures = [f"{name} {value:.4f}" for name, value in means.items()]
    print(f"wrote {args.out}; means: {'  '.join(figures)}")


def choose_response(records, chat, args):
    """The response that --row and --response name: (a group with this response alone, its title)."""
    if args.row > len(records):
        raise InputError(f"{args.data}: has {len(records)} records; give a --row up to that")
    record = records[args.row - 1]
    responses = record.get("responses") or []
    count = len(responses)
    number = min(1, count) if args.response is None else args.response
    where = f"{args.data}: record {args.row} has"
    if number > count:
        raise InputError(f"{where} {count} responses; give a --response up to it, or 0")
    if number == 0 and not has_answer(record):
        raise InputError(f"{where} no gold answer; give a --response up to {count}")
    # For 0 no response is left, and the group is made with the gold answer.
    record = record | {"responses": responses[number - 1:number]}
    groups, _ = make_groups([record], chat, math.inf, math.inf, where=f"{args.data}: ")
    if not groups:
        raise InputError(f"{where} an empty response {number}; give another --response")
    return groups[0], f"response {number} of {count}" if number else "the gold answer"


def inspect_tokens(student, packed, topk, vocab_size, m, tail_weight):
    """What CKD computes at each of the N counted tokens of a packed batch, a dict per token.

    topk: the teacher's ids and log-probs [N, k]

    Keys: id; loss and the statistics of `ckd_loss`; own, the student's mass on its top m; teacher and student, the
    `candidates` of each. The gradient is that of this token's loss; training divides it by the tokens of the batch.
    """
    head = student.head_weight[:vocab_size].detach()  # [V, H]
    with torch.no_grad():
        hidden = counted_states(student, packed, torch.float32)  # [N, H], without autocast
    tokens = []
    for rows, logits in logits_in_chunks(hidden, head, 64):
        target = packed["targets"][rows]  # [C]
        ids, log_p = (part[rows] for part in topk)  # [C, k]
        logits.requires_grad_()  # [C, V]
        losses, stats = ckd_loss(logits, target, ids, log_p, m, tail_weight)
        gradient, = torch.autograd.grad(losses.sum(), logits)  # [C, V], a row for each loss
        q = logits.detach().softmax(-1)  # [C, V]
        topm = q.topk(m)  # [C, m]
        stats = {"loss": losses, **stats, "own": topm.values.sum(-1)}
        for i in range(len(target)):
            token = {"id": target[i].item()} | {name: rounded(values[i]) for name, values in stats.items()}
            p = dict(zip(ids[i].tolist(), log_p[i].exp()))
            token["teacher"] = candidates(ids[i], p, q[i], gradient[i])
            token["student"] = candidates(topm.indices[i], p, q[i], gradient[i])
            tokens.append(token)
    return tokens


def candidates(ids, p, q, gradient):
    """[id, p or None outside the teacher's top k, q, dL/dz] for the first ten ids of a position."""
    return [[i, rounded(p[i]) if i in p else None, rounded(q[i]), rounded(gradient[i])] for i in ids[:10].tolist()]


def rounded(number):
    """A tensor with one number as a float of six significant digits."""
    return float(f"{number.item():.6g}")


def token_text(chat, token):
    """A token as text; part of a character as \\x bytes, and an id without text as [id].

    A byte-level vocabulary writes printable bytes as themselves and the others as letters from U+0100 on.
    """
    text = chat.decode([token])
    if "\ufffd" not in text:
        return text or f"[{token}]"
    unprintable = [*range(33), *range(127, 161), 173]
    byte_of = dict(enumerate(unprintable, 256))
    piece = chat.tokenizer.id_to_token(token)
    return "".join(f"\\x{byte_of.get(ord(c), ord(c)):02x}" for c in piece)


def write_page(path, data, texts):
    """Fill the placeholders <!--name--> of lens.html with texts, and <!--data--> with JSON.

    One pass, so a text that looks like a placeholder stays text.
    """
    parts = {name: html.escape(text) for name, text in texts.items()}
    parts["data"] = json.dumps(data).replace("<", "\\u003c")  # cannot end its element
    template = Path(__file__).with_name("lens.html").read_text(encoding="utf-8")
    write_lines(path, [re.sub("<!--([a-z]+)-->", lambda match: parts[match[1]], template)])

"""CKD as a picture: one response, token by token, on a self-contained HTML page.

The numbers are those of training: `ckd.teacher_topk` and `ckd.ckd_loss` compute them, and the arrows are the
gradient of that loss by autograd. The page is lens.html with its placeholders (HTML comments) filled in.

Text from models and records is untrusted. It is HTML-escaped, or stands in JSON that the page's script turns into text
nodes. The page's content security policy forbids it to load anything.
"""
import html
import json
import re
from pathlib import Path

import torch

import ckd
from data import InputError, amount, natural, positive, write_lines
from data.chat import Chat, add_prompt_flags, text_of
from data.groups import make_groups, pack
from data.records import has_answer, read_records
from model import Transformer
from train import add_machine_flags, hidden_states, pick_device, torch_dtype

TEMPLATE = Path(__file__).with_name("lens.html")
ROWS = 10  # likeliest tokens listed for each model


def lens_flags(parser):
    add = parser.add_argument
    add("--teacher", required=True, help="model folder")
    add("--student", required=True, help="model folder")
    add("--data", required=True, help="records or rollouts, .jsonl or .jsonl.gz")
    add("--row", type=positive, default=1, metavar="N", help="which record, from 1")
    add("--response", type=natural, metavar="N",
        help="which of its responses, from 1, or 0 for the gold answer; default: the first, if there are any")
    add("--k", type=positive, default=100, help="size of the teacher's top k")
    add("--m", type=positive, default=100, help="size of the student's top m")
    add("--tail-weight", type=amount, default=10.0, metavar="X", help="lambda, the weight of the tail penalty")
    add("--out", required=True, metavar="FILE.html", help="page to write")
    add_prompt_flags(parser)
    add_machine_flags(parser, "weights and compute; bfloat16 blurs small differences", "float32", seed=False)


def run_lens(args):
    """Show one response token by token as CKD sees it: both models' tokens, both loss terms, the gradient."""
    if Path(args.out).suffix != ".html":
        raise InputError(f"{args.out}: is not an .html file; give --out a name that ends in .html")
    device = pick_device(args.device)
    dtype = torch_dtype(args.dtype)
    chat = Chat.from_pretrained(args.student, args.think, args.tools)
    vocab_size, _ = ckd.check_pair(args.teacher, args.student)
    records = read_records(args.data, vocab_size=chat.vocab_size)
    group, title = choose_response(records, chat, args.data, args.row, args.response)
    k = ckd.clamp_to_vocab("k", args.k, vocab_size)
    m = ckd.clamp_to_vocab("m", args.m, vocab_size)

    packed = pack([group], device)
    teacher = Transformer.from_pretrained(args.teacher, dtype, device)
    teacher_topk = ckd.teacher_topk(teacher, packed, k, vocab_size)
    del teacher  # the two models are never in memory together
    student = Transformer.from_pretrained(args.student, dtype, device)
    tokens = inspect_tokens(student, packed, teacher_topk, vocab_size, m, args.tail_weight)

    means = {}
    for name in ("loss", "kl", "tail", "inside", "captured", "nll", "entropy"):
        means[name] = sum(token[name] for token in tokens) / len(tokens)
    record = group.record
    values = {
        "title": f"{title} of record {args.row} in {args.data}",
        "teacher": args.teacher,
        "student": args.student,
        "request": text_of(record["messages"][-1]),
        "tools": ", ".join(tool["name"] for tool in record["tools"]) or "none",
        "gold": chat.answer(record) if has_answer(record) else "none",
        "data": {
            "k": k, "m": m, "weight": args.tail_weight,
            "means": means, "tokens": tokens, "texts": token_texts(chat, tokens),
        },
    }
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_lines(args.out, [fill_template(TEMPLATE.read_text(encoding="utf-8"), values)])
    shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    print(f"wrote {args.out}; means: {shown}")


def choose_response(records, chat, path, row, response=None):
    """Return (group with one response, its title). InputError, naming the file `path`, if it does not exist.

    row: number of the record, from 1
    response: number of its response, from 1, or 0 for the gold answer; None takes the first, if there are any
    """
    if row > len(records):
        raise InputError(f"{path}: has {len(records)} records; give a --row up to that")
    record = records[row - 1]
    responses = record.get("responses") or []
    count = len(responses)
    if response is None:
        response = min(1, count)
    if response > count:
        raise InputError(f"{path}: record {row} has {count} responses; give a --response up to that, or 0")
    if response == 0 and not has_answer(record):
        raise InputError(f"{path}: record {row} has no gold answer; give a --response from 1 to {count}")
    record = record | {"responses": responses[response - 1:response]}  # none, for 0: the gold answer
    groups, _ = make_groups([record], chat, float("inf"), float("inf"))
    return groups[0], f"response {response} of {count}" if response else "the gold answer"


def inspect_tokens(student, packed, teacher_topk, vocab_size, m, tail_weight, chunk=64):
    """Return a dict for each of the N counted tokens of a packed batch: what CKD computes there.

    teacher_topk: ids, log_p [N, k]
    vocab_size: number of ids that both models share

    Keys: id; loss and what else `ckd.ckd_loss` returns (nll, entropy, kl, tail, captured, inside); own, the student's
    mass on its top m; teacher and student, rows [id, p or None outside the top k, q, dL/dz] of the model's likeliest
    tokens. L is the loss of this token alone; training divides it by the number of tokens in the batch.
    """
    with torch.no_grad():
        hidden = hidden_states(student, packed, torch.float32)  # [N, hidden], no autocast
    inputs = (hidden, packed["targets"], *teacher_topk)
    tokens = []
    for h, target, teacher_ids, teacher_log_p in zip(*(tensor.split(chunk) for tensor in inputs)):
        logits = h @ student.head_weight[:vocab_size].T  # [C, V]
        logits = logits.detach().float().requires_grad_()
        losses, stats = ckd.ckd_loss(
            logits, target, teacher_ids, teacher_log_p, m=m, tail_weight=tail_weight)
        gradient, = torch.autograd.grad(losses.sum(), logits)  # [C, V]; a row depends on its own logits only
        q = logits.detach().softmax(-1)  # [C, V]
        student_topm = q.topk(m)  # [C, m]
        stats = {"loss": losses.detach(), **stats, "own": student_topm.values.sum(-1)}
        for i in range(len(target)):
            token = {"id": target[i].item()}
            for name, values in stats.items():
                token[name] = rounded(values[i])
            p = dict(zip(teacher_ids[i].tolist(), teacher_log_p[i].exp().tolist()))
            for name, ids in (("teacher", teacher_ids[i]), ("student", student_topm.indices[i])):
                token[name] = [
                    [j, rounded(p.get(j)), rounded(q[i, j]), rounded(gradient[i, j])]
                    for j in ids[:ROWS].tolist()]
            tokens.append(token)
    return tokens


def rounded(number):
    """A number with six significant digits; None stays None."""
    return None if number is None else float(f"{float(number):.6g}")


def token_texts(chat, tokens):
    """Return {id: text} for every token that the page shows."""
    ids = {token["id"] for token in tokens}
    for token in tokens:
        ids.update(row[0] for row in token["teacher"] + token["student"])
    return {i: token_text(chat, i) for i in sorted(ids)}


def token_text(chat, token):
    """A token as text: a part of a character as \\x bytes, and an id without text as [id].

    A byte-level vocabulary writes printable bytes as themselves and the others as letters from U+0100 on.
    """
    text = chat.decode([token])
    if "\ufffd" not in text:
        return text or f"[{token}]"
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + n): byte for n, byte in enumerate(others)}
    letters = chat.tokenizer.id_to_token(token)
    return "".join(f"\\x{byte_of[c]:02x}" if c in byte_of else c for c in letters)


def fill_template(template, values):
    """Replace each placeholder <!--name--> by its value: a string is HTML-escaped, anything else becomes JSON.

    One pass, so a value that looks like a placeholder stays text. The JSON has no `<`, so it cannot end its script.

    >>> fill_template("<b><!--a--></b><script><!--b--></script>", {"a": "<!--b-->", "b": ["</script>"]})
    '<b>&lt;!--b--&gt;</b><script>["\\\\u003c/script>"]</script>'
    """
    def fill(match):
        value = values[match[1]]
        if isinstance(value, str):
            return html.escape(value)
        return json.dumps(value).replace("<", "\\u003c")

    return re.sub("<!--([a-z]+)-->", fill, template)

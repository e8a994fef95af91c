"""CKD as a picture: one response to one record, token by token, as one HTML page that needs nothing else.

Every number is the training code's own: the teacher's view is `ckd.teacher_log_probs`, the student's figures are what
`ckd.objective` returns, and the arrows are autograd's gradient of that objective. The page's form is lens.html beside
this file: a placeholder is an HTML comment, so that the form is a page itself.

What models and records say is data. On the page it stands either HTML-escaped, or in the JSON that the page's script
shows as text nodes; the page's policy forbids it to load anything.
"""
import html
import json
import re
from pathlib import Path

import torch

import ckd
from data import InputError, write_lines
from data.chat import text_of
from data.groups import make_groups, pack
from data.sources import has_answer, read_records
from train import states

SHOWN = 10  # rows of either model's tokens
FORM = Path(__file__).with_name("lens.html")


def lens(load, chat, teacher, student, data, out, row=1, response=None, k=100, m=100, tail_weight=10.0, device="cpu"):
    """Write the page `out` on one response of a record file. Returns the means over its tokens, {name: number}.

    load: folder -> the model, on `device` · chat: the student's Chat · teacher, student: model folders · row,
    response: see `choose` · k, m, tail_weight: as in `ckd.objective`.
    """
    if Path(out).suffix != ".html":
        raise InputError(f"{out}: a page is written there; name a .html")
    width, _ = ckd.check_pair(teacher, student)
    group, which = choose(read_records(data, True, chat.vocab_size), chat, data, row, response)
    k, m = ckd.clamped("k", k, width), ckd.clamped("m", m, width)
    tokens = look(load, teacher, student, pack([group], device), k, m, tail_weight, width)
    means = {name: sum(token[name] for token in tokens) / len(tokens)
             for name in ("loss", "kl", "tail", "inside", "captured", "nll", "entropy")}
    seen = {token["id"] for token in tokens} | {r[0] for token in tokens for r in token["teacher"] + token["student"]}
    record = group["record"]
    parts = {"what": f"{which} of record {row} in {data}", "teacher": str(teacher), "student": str(student),
             "request": text_of(record["messages"][-1]),
             "tools": ", ".join(tool["name"] for tool in record["tools"]) or "none",
             "gold": chat.answer(record) if has_answer(record) else "none",
             "data": {"k": k, "m": m, "weight": tail_weight, "means": means, "tokens": tokens,
                      "texts": {i: token_text(chat, i) for i in sorted(seen)}}}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_lines(out, [page(FORM.read_text(encoding="utf-8"), parts)])
    return means


def choose(records, chat, data, row, response=None):
    """One response as a group of one, and in words which it is.

    row: of the file's records, from 1 · response: of the record's, from 1; 0 is the gold answer, and so is None where
    the record has no responses. `data` names the file in an InputError.
    """
    if row > len(records):
        raise InputError(f"{data}: has {len(records)} records; give a --row up to that")
    record = records[row - 1]
    count = len(record.get("responses") or [])
    wanted = min(1, count) if response is None else response
    if wanted > count:
        raise InputError(f"{data}: record {row} has {count} responses; give a --response up to that, or 0: its answer")
    if wanted == 0 and not has_answer(record):
        raise InputError(f"{data}: record {row} has no gold answer; give a --response from 1 to {count}")
    if wanted == 0:
        record = {name: value for name, value in record.items() if name != "responses"}
    (group,), _ = make_groups([record], chat, float("inf"), float("inf"))
    return (group | {"responses": group["responses"][max(0, wanted - 1):][:1]},
            f"response {wanted} of {count}" if wanted else "the gold answer")


def look(load, teacher, student, packed, k, m, tail_weight, width, chunk=64):
    """What CKD sees at each counted token of a packed batch, a dict for each.

    id: the token that came · loss, and by their names in `ckd.objective` kl, tail (S'), captured (P), inside, nll,
    entropy · own: student mass on V_m · teacher, student: each model's likeliest tokens, up to SHOWN rows
    [id, p or None outside V_k, q, dL/dz]. load: folder -> model; the two are not in memory together. The gradient is
    that of this token's own loss (training divides it by the number of tokens in a batch).
    """
    ids, log_p = ckd.teacher_log_probs(load(teacher), packed, k, width)  # [N, k] each
    model, targets = load(student), packed["targets"]
    with torch.no_grad():
        h = states(model, packed, torch.float32)  # [N, hidden]; as its weights are: no autocast
    apply, tokens = ckd.objective("ckd", targets, (ids, log_p), tail_weight, m), []
    for start in range(0, len(h), chunk):
        rows = slice(start, start + chunk)
        logits = (h[rows] @ model.head_weight[:width].T).detach().float().requires_grad_()  # [C, width]
        losses, stats = apply(logits, rows)  # [C], {name: [C]}
        gradient, = torch.autograd.grad(losses.sum(), logits)  # [C, width]; a row depends on its own logits only
        q = logits.detach().softmax(-1)  # [C, width]
        mine = q.topk(m)
        figures = {"loss": losses.detach(), **stats, "own": mine.values.sum(-1)}
        for n, at in enumerate(range(start, start + len(losses))):
            p = dict(zip(ids[at].tolist(), log_p[at].exp().tolist()))
            tokens.append({"id": targets[at].item()} | {name: short(values[n]) for name, values in figures.items()})
            for name, top in (("teacher", ids[at, :SHOWN]), ("student", mine.indices[n, :SHOWN])):
                tokens[-1][name] = [[i, float(f"{p[i]:.6g}") if i in p else None, short(q[n, i]), short(gradient[n, i])]
                                    for i in top.tolist()]
    return tokens


def short(value):
    """A number without the digits that nobody reads."""
    return float(f"{value.item():.6g}")


def token_text(chat, token):
    """A token as text; one that is a part of a character as its bytes, one that says nothing as its id.

    A byte-level vocabulary writes bytes as letters: printable ones as themselves, the others from U+0100 on.
    """
    said = chat.decode([token])
    if "\ufffd" not in said:
        return said or f"[{token}]"
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    table |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in printable)}
    return "".join(f"\\x{table[c]:02x}" if c in table else c for c in chat.tokenizer.id_to_token(token))


def page(form, parts):
    """Put parts, texts or what JSON can hold, in the places <!--name--> of a form, in one pass: a part may look like a
    place. In JSON no `<` is left, so nothing in it can end the script element that holds it.

    >>> page("<b><!--a--></b><script><!--b--></script>", {"a": "<!--b-->", "b": ["</script>"]})
    '<b>&lt;!--b--&gt;</b><script>["\\\\u003c/script>"]</script>'
    """
    def part(match):
        value = parts[match[1]]
        return html.escape(value) if isinstance(value, str) else json.dumps(value).replace("<", "\\u003c")

    return re.sub("<!--([a-z]+)-->", part, form)

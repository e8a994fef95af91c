"""apps/lens.py: the page shows what CKD computes, and runs nothing but its own script."""
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import star
from apps import lens
from ckd import ckd_loss
from data.chat import Chat
from data.groups import make_groups, pack
from data.records import read_records
from head import counted_states, head_loss
from model import Transformer
from teacher import Teacher

K, M, WEIGHT = 20, 30, 10.0
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--data--><b>&amp;\u2028\u202e é"
TEMPLATE = Path(lens.__file__).with_name("lens.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def inspected(world):
    """A group of one response, longer than a chunk; both models; the teacher's top k; the result of `inspect_tokens`."""
    chat = Chat.from_pretrained(world / "student")
    record = read_records(world / "train.jsonl")[0]
    record["responses"] = [{"text": chat.answer(record) * 3}]
    (group,), _ = make_groups([record], chat, 9999, 9999)
    teacher = Transformer.from_pretrained(world / "teacher")
    student = Transformer.from_pretrained(world / "student")
    with torch.no_grad():
        for model in (teacher, student):  # random models are near uniform: sharpen them
            model.head_weight.mul_(3)
    vocab_size = student.config["vocab_size"]
    packed = pack([group])
    topk = Teacher(teacher, K, vocab_size)(packed)
    tokens = lens.inspect_tokens(student, packed, topk, vocab_size, M, WEIGHT)
    return group, teacher, student, topk, tokens


def plain_logits(model, group):
    """The logits that predict a group's one response, from a plain forward pass of prompt and response."""
    prompt = group.prompt
    ids = torch.tensor([prompt + group.responses[0].ids])
    return model(ids)[0, len(prompt) - 1:-1].detach()  # [N, V]


def test_figures_are_those_of_training(inspected):
    group, teacher, student, topk, tokens = inspected
    packed = pack([group])
    assert [token["id"] for token in tokens] == list(group.responses[0].ids) and len(tokens) > 64  # two chunks
    with torch.no_grad():
        hidden = counted_states(student, packed, torch.float32)
        loss, sums = head_loss(
            hidden, student.head_weight, torch.ones(len(hidden)),
            lambda *tensors: ckd_loss(*tensors, m=M, tail_weight=WEIGHT), packed["targets"], *topk)
    for name, total in ({"loss": loss} | sums).items():
        assert sum(token[name] for token in tokens) == pytest.approx(total.item(), rel=1e-4), name
    assert sum(token["tail"] for token in tokens) > 0.1  # the tail penalty is at work


def test_rows_are_the_models_own_tokens(inspected):
    group, teacher, student, _, tokens = inspected
    p = plain_logits(teacher, group).softmax(-1)
    q = plain_logits(student, group).softmax(-1)
    for n, token in enumerate(tokens):
        topk = p[n].topk(K).indices
        topm = q[n].topk(M)
        assert [row[0] for row in token["teacher"]] == topk[:10].tolist()
        assert [row[0] for row in token["student"]] == topm.indices[:10].tolist()
        assert token["own"] == pytest.approx(topm.values.sum().item(), abs=1e-5)
        for i, teacher_p, student_q, _ in token["teacher"] + token["student"]:
            assert (teacher_p is None) == (i not in topk)  # marked as outside the teacher's top k
            assert teacher_p is None or teacher_p == pytest.approx(p[n, i].item(), abs=1e-5)
            assert student_q == pytest.approx(q[n, i].item(), abs=1e-5)


def test_arrows_are_the_gradient_of_the_loss(inspected):
    group, teacher, student, _, tokens = inspected
    log_p, ids = plain_logits(teacher, group).log_softmax(-1).topk(K)
    z = plain_logits(student, group).requires_grad_()
    target = torch.tensor(group.responses[0].ids)
    losses, _ = ckd_loss(z, target, ids, log_p, m=M, tail_weight=WEIGHT)
    gradient, = torch.autograd.grad(losses.sum(), z)
    q = z.detach().softmax(-1)
    for n, token in enumerate(tokens):
        topm = q[n].topk(M).indices
        for i, _, _, slope in token["teacher"] + token["student"]:
            assert slope == pytest.approx(gradient[n, i].item(), rel=1e-3, abs=1e-5)
            formula = q[n, i] * (token["captured"] - WEIGHT * token["tail"])  # Eqs. 14, 26, 27
            if i in ids[n]:
                formula -= log_p[n][ids[n] == i].exp().item()
            elif i in topm:
                formula += WEIGHT * q[n, i]
            assert slope == pytest.approx(formula.item(), rel=1e-3, abs=1e-5)
    slopes = [row[3] for token in tokens for row in token["teacher"] + token["student"]]
    assert min(slopes) < -0.01 and max(slopes) > 0.01


class Tags(HTMLParser):
    """All tags of a page with their attributes, its comments, and the text in each <pre>."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.comments = []
        self.texts = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, attributes))
        if tag == "pre":
            self.texts.append("")

    def handle_comment(self, text):
        self.comments.append(text)

    def handle_data(self, text):
        if self.tags and self.tags[-1][0] == "pre" and self.texts[-1] == "":
            self.texts[-1] = text


def make_page(world, out, flags, data=None):
    """The text of the page that `star.py lens` writes."""
    data = data or world / "train.jsonl"
    command = ["lens", "--teacher", world / "teacher", "--student", world / "student", "--data", data, "--out", out]
    args, run = star.parse([*map(str, command), *flags.split(), "--device", "cpu"])
    run(args)
    return out.read_text()


def json_of(text):
    return re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]


@pytest.mark.parametrize("response", [0, 1])
def test_texts_of_models_and_records_are_never_markup(world, tmp_path, response):
    record = json.loads((world / "train.jsonl").read_text().splitlines()[0])
    record["tools"][0]["name"] = HOSTILE
    record |= {"messages": [{"role": "user", "content": HOSTILE}], "id": HOSTILE, "responses": [{"text": HOSTILE}],
               "answer": {"tool_calls": [], "content": HOSTILE}}
    (tmp_path / "hostile.jsonl").write_text(json.dumps(record) + "\n")
    flags = f"--response {response} --k {K} --m {M}"
    text = make_page(world, tmp_path / "page.html", flags, tmp_path / "hostile.jsonl")
    page, template = Tags(text), Tags(TEMPLATE)
    assert page.tags == template.tags and not page.comments and template.comments
    assert page.texts[0] == HOSTILE and page.texts[1].startswith(HOSTILE) and HOSTILE in page.texts[2]
    assert text.count("<script") == text.count("</script") == 2 and "alert(1)</script" not in text
    assert "<" not in json_of(text)  # no token of this vocabulary holds a whole tag, but one of another may
    data = json.loads(json_of(text))
    chat = Chat.from_pretrained(world / "student")
    assert chat.decode([token["id"] for token in data["tokens"]]).endswith(HOSTILE + "<|im_end|>")
    rows = [row for token in data["tokens"] for row in token["teacher"] + token["student"]]
    assert {str(row[0]) for row in rows} <= data["texts"].keys()


def test_the_page_loads_nothing(world, tmp_path):
    text = make_page(world, tmp_path / "page.html", "--k 9999 --m 9999")
    assert not re.search(r"https?:|[\"'(]//|\bsrc\s*=|\bhref\s*=|@import|\burl\(|\bfetch\(|innerHTML", text)
    assert "default-src 'none'" in text
    data = json.loads(json_of(text))
    assert data["k"] == data["m"] == Chat.from_pretrained(world / "student").vocab_size  # clamped
    assert all(token["captured"] == pytest.approx(1) and token["tail"] == 0 for token in data["tokens"])


def test_a_value_that_looks_like_a_placeholder_stays_text(tmp_path):
    names = re.findall("<!--([a-z]+)-->", TEMPLATE)
    texts = {name: "<!--data-->" for name in names if name != "data"}
    lens.write_page(tmp_path / "page.html", ["</script><!--title-->"], texts)
    text = (tmp_path / "page.html").read_text()
    assert text.count("&lt;!--data--&gt;") == len(texts) == 6
    assert json.loads(json_of(text)) == ["</script><!--title-->"]


def test_tokens_as_text(world):
    chat = Chat.from_pretrained(world / "student")
    assert "".join(lens.token_text(chat, i) for i in chat.encode("Lima  \n{")) == "Lima  \n{"
    assert [lens.token_text(chat, i) for i in chat.encode("水")] == ["\\xe6", "\\xb0", "\\xb4"]
    assert lens.token_text(chat, chat.end_id) == "<|im_end|>"
    assert lens.token_text(chat, 10 ** 6) == "[1000000]"  # an embedding may be wider than its tokenizer


def test_every_byte_as_text():
    """The letters of a byte-level vocabulary, against the table as GPT-2 defines it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - len(printable)))

    class OneToken:
        def decode(self, ids):
            return "\ufffd"

        def id_to_token(self, byte):
            return letters[byte]

    chat = OneToken()
    chat.tokenizer = chat
    assert [lens.token_text(chat, byte) for byte in range(256)] == [f"\\x{byte:02x}" for byte in range(256)]


@pytest.mark.parametrize("flags,text,title", [
    ("--row 1", None, "the gold answer"),
    ("--row 2", "one<|im_end|>", "response 1 of 2"),
    ("--row 2 --response 2", "two<|im_end|>", "response 2 of 2"),
    ("--row 2 --response 0", None, "the gold answer")])
def test_which_response(world, flags, text, title):
    chat = Chat.from_pretrained(world / "student")
    records = read_records(world / "train.jsonl")[:2]
    records[1]["responses"] = [{"text": "one"}, {"text": "two"}]
    args, _ = star.parse(f"lens --teacher t --student s --data d --out o.html {flags}".split())
    group, found_title = lens.choose_response(records, chat, args)
    text = text or chat.answer(records[args.row - 1])
    assert [chat.decode(response.ids) for response in group.responses] == [text]
    assert found_title == title

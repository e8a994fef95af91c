"""data/lens.py: the page shows what CKD computes, and nothing in it but its own script runs."""
import json
import re
from html.parser import HTMLParser

import pytest
import torch

import ckd
from data.chat import Chat
from data.groups import make_groups, pack
from data.lens import FORM, choose, lens, look, page, token_text
from data.sources import read_records
from model import Transformer
from train import head_loss, states

K, M, WEIGHT = 20, 30, 10.0
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--data--><b>&amp;\u2028\u202e é"


@pytest.fixture(scope="module")
def seen(world):
    """A group of one answer, both models, and what `look` says of it in chunks of 7 positions."""
    chat = Chat.from_pretrained(world / "student")
    (group,), _ = make_groups(read_records(world / "train.jsonl")[:1], chat, 9999, 9999)
    teacher, student = (Transformer.from_pretrained(world / name) for name in ("teacher", "student"))
    with torch.no_grad():
        for model in (teacher, student):  # random models are unsure of everything: let them be sure of something
            model.head_weight.mul_(3)
    models = {"teacher": teacher, "student": student}
    width = student.config["vocab_size"]
    tokens = look(models.get, "teacher", "student", pack([group]), K, M, WEIGHT, width, chunk=7)
    return group, teacher, student, tokens, width


def plain_logits(model, group):
    """The logits that predict a group's one response, from a plain forward pass of prompt and response."""
    prompt, response = group["prompt"], group["responses"][0]["ids"]
    return model(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1].detach()  # [N, V]


def test_figures_are_those_of_training(seen):
    group, teacher, student, tokens, width = seen
    packed = pack([group])
    assert [token["id"] for token in tokens] == group["responses"][0]["ids"] and len(tokens) > 14
    with torch.no_grad():
        h = states(student, packed, torch.float32)
        view = ckd.teacher_log_probs(teacher, packed, K, width)
        objective = ckd.objective("ckd", packed["targets"], view, WEIGHT, M)
        loss, sums = head_loss(h, student.head_weight, torch.ones(len(h)), objective)
    for name, total in ({"loss": loss} | sums).items():
        assert sum(token[name] for token in tokens) == pytest.approx(total.item(), rel=1e-4), name
    assert sum(token["tail"] for token in tokens) > 0.1  # there is something to see


def test_rows_are_the_models_own_tokens(seen):
    group, teacher, student, tokens, _ = seen
    p, q = (plain_logits(model, group).softmax(-1) for model in (teacher, student))
    for n, token in enumerate(tokens):
        top, mine = p[n].topk(K).indices, q[n].topk(M)
        assert [row[0] for row in token["teacher"]] == top[:10].tolist()
        assert [row[0] for row in token["student"]] == mine.indices[:10].tolist()
        assert token["own"] == pytest.approx(mine.values.sum().item(), abs=1e-5)
        for i, mass, student_mass, _ in token["teacher"] + token["student"]:
            assert (mass is None) == (i not in top)  # marked as outside the teacher's top k
            assert mass is None or mass == pytest.approx(p[n, i].item(), abs=1e-5)
            assert student_mass == pytest.approx(q[n, i].item(), abs=1e-5)


def test_arrows_are_the_gradient_of_the_objective(seen):
    group, teacher, student, tokens, _ = seen
    log_p, ids = plain_logits(teacher, group).log_softmax(-1).topk(K)
    z = plain_logits(student, group).requires_grad_()
    targets = torch.tensor(group["responses"][0]["ids"])
    losses, _ = ckd.objective("ckd", targets, (ids, log_p), WEIGHT, M)(z, slice(None))
    gradient, = torch.autograd.grad(losses.sum(), z)
    q = z.detach().softmax(-1)
    for n, token in enumerate(tokens):
        mine = q[n].topk(M).indices
        for i, _, _, slope in token["teacher"] + token["student"]:
            assert slope == pytest.approx(gradient[n, i].item(), rel=1e-3, abs=1e-5)
            formula = q[n, i] * (token["captured"] - WEIGHT * token["tail"])  # Eqs. 14, 26, 27
            if i in ids[n]:
                formula -= log_p[n][ids[n] == i].exp().item()
            elif i in mine:
                formula += WEIGHT * q[n, i]
            assert slope == pytest.approx(formula.item(), rel=1e-3, abs=1e-5)
    slopes = [row[3] for token in tokens for row in token["teacher"] + token["student"]]
    assert min(slopes) < -0.01 and max(slopes) > 0.01


class Tags(HTMLParser):
    """All tags of a page with their attributes, its comments, and the text in each <pre>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.comments, self.texts = [], [], []
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


def json_of(text):
    return re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]


def test_what_models_and_records_say_is_never_markup(world, tmp_path):
    record = json.loads((world / "train.jsonl").read_text().splitlines()[0])
    record["tools"][0]["name"] = HOSTILE
    record |= {"messages": [{"role": "user", "content": HOSTILE}], "id": HOSTILE, "responses": [{"text": HOSTILE}],
               "answer": {"tool_calls": [], "content": HOSTILE}}
    (tmp_path / "hostile.jsonl").write_text(json.dumps(record) + "\n")
    chat = Chat.from_pretrained(world / "student")
    for response in (0, 1):
        lens(Transformer.from_pretrained, chat, world / "teacher", world / "student", tmp_path / "hostile.jsonl",
             tmp_path / "page.html", response=response, k=K, m=M)
        text = (tmp_path / "page.html").read_text()
        shown, form = Tags(text), Tags(FORM.read_text())
        assert shown.tags == form.tags and not shown.comments and form.comments
        assert shown.texts[0] == HOSTILE and shown.texts[1].startswith(HOSTILE) and HOSTILE in shown.texts[2]
        assert text.count("<script") == text.count("</script") == 2 and "alert(1)</script" not in text
        assert "<" not in json_of(text)  # no token of this vocabulary holds a whole tag; one of another may
        data = json.loads(json_of(text))
        ids = [token["id"] for token in data["tokens"]]
        assert chat.decode(ids).endswith(HOSTILE + "<|im_end|>")
        rows = [row for token in data["tokens"] for row in token["teacher"] + token["student"]]
        assert {str(row[0]) for row in rows} <= data["texts"].keys()


def test_the_page_loads_nothing(world, tmp_path):
    lens(Transformer.from_pretrained, Chat.from_pretrained(world / "student"), world / "teacher", world / "student",
         world / "train.jsonl", tmp_path / "page.html", k=9999, m=9999)
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?:|[\"'(]//|\bsrc\s*=|\bhref\s*=|@import|\burl\(|\bfetch\(|innerHTML", text)
    assert "default-src 'none'" in text
    data = json.loads(json_of(text))
    assert data["k"] == data["m"] == Chat.from_pretrained(world / "student").vocab_size  # clamped
    assert all(token["captured"] == pytest.approx(1) and token["tail"] == 0 for token in data["tokens"])


def test_tokens_as_text(world):
    chat = Chat.from_pretrained(world / "student")
    assert "".join(token_text(chat, i) for i in chat.encode("Lima  \n{")) == "Lima  \n{"
    assert [token_text(chat, i) for i in chat.encode("水")] == ["\\xe6", "\\xb0", "\\xb4"]
    assert token_text(chat, chat.end_id) == "<|im_end|>"
    assert token_text(chat, 10 ** 6) == "[1000000]"  # an embedding may be wider than its tokenizer


def test_which_response(world):
    chat = Chat.from_pretrained(world / "student")
    plain, other = read_records(world / "train.jsonl")[:2]
    sampled = other | {"responses": [{"text": "one"}, {"text": "two"}]}
    cases = {(1, None): (chat.answer(plain), "the gold answer"), (2, None): ("one<|im_end|>", "response 1 of 2"),
             (2, 2): ("two<|im_end|>", "response 2 of 2"), (2, 0): (chat.answer(other), "the gold answer")}
    for (row, response), (text, words) in cases.items():
        group, which = choose([plain, sampled], chat, "data", row, response)
        assert [chat.decode(r["ids"]) for r in group["responses"]] == [text] and which == words


def test_a_part_is_not_a_place():
    assert page("<!--a--> <!--b-->", {"a": "<!--b-->", "b": "c"}) == "&lt;!--b--&gt; c"

"""The front pages: links resolve, formulas name their functions, the walk and the commands work, and so do the forks.

    python tests/test_readme.py         corrects the line numbers of [`function`](file.py#L123) links
"""
import doctest
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import ckd  # noqa: E402
import star  # noqa: E402
from apps.curriculum import split_lines  # noqa: E402
from data.tiny.world import make_record  # noqa: E402

PAGES = ("README.md", "tests/README.md", "data/tiny/README.md")
NUMBERED = r"\[`([\w.]+)`\]\(([\w/.]+\.py)#L(\d+)\)"  # [`function`](file.py#L123)


def line_of(name, file):
    """The number of the line that defines a function, class or constant of this (dotted) name; None without one."""
    name = name.split(".")[-1]
    definition = re.compile(rf"\s*(?:def|class) {name}\b|{name} = ")
    lines = Path(file).read_text().splitlines()
    return next((number for number, line in enumerate(lines, 1) if definition.match(line)), None)


def prose(page):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.S | re.M)


def blocks(kind, page="README.md"):
    return re.findall(rf"^```{kind}\n(.*?)^```", (ROOT / page).read_text(), flags=re.S | re.M)


def headings(page):
    """The anchors that GitHub gives a page's headings."""
    lines = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in lines}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_has_a_target(page):
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not t.startswith("https://")]
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor and path.suffix == ".md":
            assert anchor in headings(path.relative_to(ROOT)), f"{page} links to {target}"


def test_every_numbered_link_names_the_line():
    links = re.findall(NUMBERED, prose("README.md"))
    assert len(links) > 15
    for name, file, number in links:
        line = line_of(name, ROOT / file)
        assert line == int(number), f"{name} is in {file}, line {line}: python tests/test_readme.py corrects it"


def test_the_front_page_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250 and len(text.split()) <= 2_500


def test_every_function_of_the_table_is_where_it_says():
    table = r"\| also in the paper \| code \|\n\|---\|---\|\n((?:\|.*\n)+)"
    rows = re.search(table, prose("README.md"))[1].splitlines()
    assert len(rows) > 5
    for row in rows:
        code = row.split("|")[2]
        names = re.findall(r"((?:`\w+`(?:, )?)+) in \[`[\w/.]+`\]\(([\w/.]+)\)", code)
        assert names or "docstring" in code, row
        for several, file in names:
            for name in re.findall(r"`(\w+)`", several):
                assert line_of(name, ROOT / file), f"{name} is not in {file}"


def commands_of(block):
    """The `star.py` command lines of a code block."""
    text = block.replace("\\\n", " ")
    return re.findall(r"^(?:python|torchrun.* --) star\.py (.*)$", text, flags=re.M)


def test_every_command_can_be_typed(monkeypatch):
    """Each `star.py` line of a code block parses, and the files of data/ that it names exist."""
    monkeypatch.setitem(ckd.DIVERGENCES, "jsd", ckd.forward_kl)  # the fork adds it
    commands = [line for page in PAGES for block in blocks("bash", page) for line in commands_of(block)]
    assert len(commands) > 8
    for line in commands:
        words = shlex.split(line, comments=True)
        for path in [word for word in words if re.match(r"data/.*\.(json|gz)$", word)]:
            assert (ROOT / path).exists(), f"{path} does not exist"
        star.parse(words)


def test_the_papers_list_is_a_curriculum():
    """The commands for real models can be saved as they stand and run by `curriculum`."""
    block, = [block for block in blocks("bash") if "Teacher-8B" in block]
    lines = split_lines(block)
    assert [line.split()[0] for line in lines] == ["prepare", "rollout", "ckd", "simrl", "eval", "eval"]
    assert [line.split()[0] for line in lines] == [line.split()[0] for line in commands_of(block)]


def test_two_lines_install():
    assert len(re.findall(r"^pip install ", (ROOT / "README.md").read_text(), flags=re.M)) == 2


def test_the_walk_is_true(monkeypatch):
    """Every >>> line gives the output below it; `...` and white space may differ."""
    monkeypatch.chdir(ROOT)
    walk = "\n".join(block for block in blocks("python") if block.startswith(">>> "))
    test = doctest.DocTestParser().get_doctest(walk, {}, "walk", "README.md", 0)
    assert len(test.examples) > 15
    failures = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(optionflags=flags).run(test, out=failures.append)
    assert not failures, "".join(failures)


# ---- fork here ---------------------------------------------------------------------------------------------------

@pytest.fixture
def fork(tmp_path):
    """A copy of the code with the README's changes made, as a reader makes them by hand."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py"), *(ROOT / "apps").glob("*.py")]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    changes = blocks("diff")
    assert len(changes) == 2
    for change in changes:
        head, *lines = change.splitlines()
        file = tmp_path / head.removeprefix("--- ")
        before = "\n".join(line[1:] for line in lines if line[:1] != "+") + "\n"
        after = "\n".join(line[1:] for line in lines if line[:1] != "-") + "\n"
        assert file.read_text().count(before) == 1, f"{file.name} does not hold\n{before}"
        file.write_text(file.read_text().replace(before, after))
    simrl = tmp_path / "simrl.py"
    simrl.write_text(simrl.read_text().replace("import train\n", "import train\nfrom reward import score\n", 1))
    return tmp_path


IN_THE_FORK = """
import json, sys
from types import SimpleNamespace
import simrl, star

def refine(model, reference, prompts, chat, score, args, start, valid):  # instead of training: score the walk's answers
    record = prompts[0].record
    right = chat.answer(record)
    texts = [right, right.replace("livono", "livona"),
             right.replace("set_lights", "dotiro").replace("area", "item").replace("brightness", "count"),
             right.replace("brightness", "percent")]
    with open("scores.json", "w") as file:
        json.dump([score(record, text) for text in texts], file)
    return SimpleNamespace(stopped=True)  # as after Ctrl-C

world = sys.argv[1]
simrl.refine = refine
common = ["--device", "cpu", "--dtype", "float32"]
star.main(["simrl", "--model", f"{world}/student", "--data", "walk.jsonl", "--think", "off", "--out", "rl", *common])
sys.exit(star.main(["ckd", "--objective", "jsd", "--teacher", f"{world}/teacher", "--student", f"{world}/student",
                    "--data", f"{world}/train.jsonl", "--steps", "2", "--batch-size", "4", "--hold-out", "2",
                    "--samples", "0", "--lr", "0", "--out", "ckd", *common]))
"""


def test_the_forks_work(fork, world):
    """Sim-RL is given the new reward, and the new objective trains; in one process, because torch loads slowly."""
    (fork / "in_the_fork.py").write_text(IN_THE_FORK)
    (fork / "walk.jsonl").write_text(json.dumps(make_record(random.Random(4887))) + "\n")
    process = subprocess.run([sys.executable, "in_the_fork.py", world], cwd=fork, capture_output=True, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    scores = json.loads((fork / "scores.json").read_text())
    assert [score["reward"] for score in scores] == [1, 0.75, 0, -1]  # as the page says
    assert [score["answer_score"] for score in scores] == [1, 0.75, 0, 0]
    _, *rows = [json.loads(line) for line in (fork / "ckd/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(0 < row["kl"] < 0.7 and row["loss"] == pytest.approx(row["kl"], abs=1e-6) for row in rows)  # <= log 2


if __name__ == "__main__":
    text = (ROOT / "README.md").read_text()
    (ROOT / "README.md").write_text(re.sub(NUMBERED, lambda link: "[`{}`]({}#L{})".format(
        *link.groups()[:2], line_of(link[1], ROOT / link[2])), text))

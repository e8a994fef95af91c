"""The front pages: what they link to exists, what they show is what the code gives, what they tell to change works.

    python tests/test_readme.py         puts the line numbers of [`function`](file.py#L123) links right
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
from data.tiny.world import make_record  # noqa: E402

PAGES = ("README.md", "tests/README.md", "data/tiny/README.md")
NUMBERED = r"\[`([\w.]+)`\]\(([\w/.]+\.py)#L(\d+)\)"  # [`function`](file.py#L123)


def line_of(name, file):
    """The number of the line that defines a function, class or constant of this (dotted) name; None without one."""
    wanted = re.compile(rf"\s*(?:def|class) {name.split('.')[-1]}\b|{name.split('.')[-1]} = ")
    lines = Path(file).read_text().splitlines()
    return next((number for number, line in enumerate(lines, 1) if wanted.match(line)), None)


def prose(page):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.S | re.M)


def blocks(kind, page="README.md"):
    return re.findall(rf"^```{kind}\n(.*?)^```", (ROOT / page).read_text(), flags=re.S | re.M)


def headings(page):
    """The anchors that GitHub gives a page's headings."""
    found = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


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
    found = re.findall(NUMBERED, prose("README.md"))
    assert len(found) > 20
    for name, file, number in found:
        right = line_of(name, ROOT / file)
        assert right == int(number), f"{name} is in {file}, line {right}: python tests/test_readme.py renumbers"


def test_every_function_of_the_table_is_where_it_says():
    rows = re.search(r"\| paper \| code \|\n\|---\|---\|\n((?:\|.*\n)+)", prose("README.md"))[1].splitlines()
    assert len(rows) > 15
    for row in rows:
        code = row.split("|")[2]
        names = re.findall(r"((?:`\w+`(?:, )?)+) in \[`[\w/.]+`\]\(([\w/.]+)\)", code)
        assert names or "docstring" in code, row
        for several, file in names:
            for name in re.findall(r"`(\w+)`", several):
                assert line_of(name, ROOT / file), f"{name} is not in {file}"


def test_every_command_can_be_typed(monkeypatch):
    """Each `star.py` line of a code block is one that the parser takes."""
    monkeypatch.setitem(ckd.DIVERGENCES, "jsd", ckd.fkl)  # a forker has it by then
    text = "\n".join(block for page in PAGES[:2] for block in blocks("bash", page)).replace("\\\n", " ")
    commands = re.findall(r"^(?:python|torchrun.* --) star\.py (.*)$", text, flags=re.M)
    assert len(commands) > 12
    for words in commands:
        words = shlex.split(words, comments=True)
        for path in [word for word in words if re.match(r"data/.*\.(json|gz)$", word)]:
            assert (ROOT / path).exists(), f"{path} is not there"
        args = star.parser(star.__doc__, star.COMMANDS).parse_args(words)
        if words[0] == "curriculum":  # which takes the flags of other commands as a text
            for command, flags in ("rollout", args.rollout), ("simrl", args.simrl), ("eval", args.eval):
                needed = ["--model", "m", "--data", "d", "--out", "o"]
                star.parser(star.__doc__, star.COMMANDS).parse_args([command, *needed, *shlex.split(flags)])


def test_two_lines_install():
    assert len(re.findall(r"^pip install ", (ROOT / "README.md").read_text(), flags=re.M)) == 2


def test_the_walk_is_true(monkeypatch):
    """What stands behind >>> gives what stands below it; what is left out there is ... or white space."""
    monkeypatch.chdir(ROOT)
    walk = "\n".join(block for block in blocks("python") if block.startswith(">>> "))
    test = doctest.DocTestParser().get_doctest(walk, {}, "walk", "README.md", 0)
    assert len(test.examples) > 15
    said = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not said, "".join(said)


# ---- fork here ---------------------------------------------------------------------------------------------------

@pytest.fixture
def fork(tmp_path):
    """A copy of the code with the README's changes made, as a forker makes them by hand."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py")]:
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
    return tmp_path


IN_THE_FORK = """
import json, sys
import simrl, star

def refine(model, prompts, out, reward, *rest, **settings):  # instead of training: score the walk's four answers
    record, right = prompts[0]["record"], prompts[0]["gold"]
    texts = [right, right.replace("livono", "livona"),
             right.replace("set_lights", "dotiro").replace("area", "item").replace("brightness", "count"),
             right.replace("brightness", "percent")]
    with open("found.json", "w") as file:
        json.dump([reward(record, text) for text in texts], file)

simrl.refine, world = refine, sys.argv[1]
common = ["--device", "cpu", "--dtype", "float32"]
star.main(["simrl", "--model", f"{world}/student", "--data", "walk.jsonl", "--think", "off", "--out", "rl", *common])
sys.exit(star.main(["ckd", "--objective", "jsd", "--teacher", f"{world}/teacher", "--student", f"{world}/student",
                    "--data", f"{world}/train.jsonl", "--steps", "2", "--batch", "4", "--hold-out", "2", "--samples",
                    "0", "--lr", "0", "--out", "ckd", *common]))
"""


def test_the_forks_work(fork, world):
    """The new reward is what Sim-RL is handed, and the new objective trains; in one process, as torch loads slowly."""
    (fork / "instead.py").write_text(IN_THE_FORK)
    (fork / "walk.jsonl").write_text(json.dumps(make_record(random.Random(4887))) + "\n")
    done = subprocess.run([sys.executable, "instead.py", world], cwd=fork, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads((fork / "found.json").read_text())
    assert [r["reward"] for r in found] == [1, 0.75, 0, -1]  # as the page says
    assert [r["answer_score"] for r in found] == [1, 0.75, 0, 0]
    _, *rows = [json.loads(line) for line in (fork / "ckd/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(0 < row["kl"] < 0.7 and row["loss"] == pytest.approx(row["kl"], abs=1e-6) for row in rows)  # <= log 2


if __name__ == "__main__":
    text = (ROOT / "README.md").read_text()
    (ROOT / "README.md").write_text(re.sub(NUMBERED, lambda link: "[`{}`]({}#L{})".format(
        *link.groups()[:2], line_of(link[1], ROOT / link[2])), text))

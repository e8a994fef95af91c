"""The rule of imports and the sizes of the files.

    python tests/test_house.py     prints the import graph: a file or folder -> what it imports
"""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import star  # noqa: E402

# A room imports rooms to its left only. data/, with data/tiny/, and apps/ are a room each; every other file is its own.
RULE = "reward, shard <- data <- model <- kv_cache, head <- sampler, train <- teacher, experience <- ckd, simrl <- apps <- star"
LEVELS = {room: level for level, rooms in enumerate(RULE.split(" <- ")) for room in rooms.split(", ")}


def project_files():
    """The tracked Python files outside tests/, as paths relative to the root."""
    command = ["git", "ls-files", "*.py"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not names:  # a download without git
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")]
    files = [Path(name) for name in names if (ROOT / name).exists()]
    return [file for file in files if len(file.parts) == 1 or file.parts[0] in ("data", "apps")]


def room_of(file):
    """The room of a file: its folder, or its own name."""
    return file.parts[0].removesuffix(".py")


def imported_modules(file):
    """The names of the modules that a file imports, also those imported inside functions."""
    modules = []
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module if node.level == 0 else room_of(file))
    if file == Path("star.py"):  # imports the modules of its table when a command needs them
        modules += [module for module, _ in star.COMMANDS.values()]
    return modules


def imported_rooms(file):
    """The rooms of the project that a file imports, in the order of the rule."""
    rooms = {module.split(".")[0] for module in imported_modules(file)}
    return sorted(rooms & LEVELS.keys(), key=list(LEVELS).index)


def line_count(file):
    return len((ROOT / file).read_text(encoding="utf-8").splitlines())


FILES = project_files()
FLAT_FILES = [file for file in FILES if len(file.parts) == 1]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_run_to_the_left(file):
    room = room_of(file)
    for imported in imported_rooms(file):
        inside_folder = imported == room and room in ("data", "apps")
        assert LEVELS[imported] < LEVELS[room] or inside_folder, f"{file} imports {imported}: {RULE}"
    if room != "star":
        assert "importlib" not in imported_modules(file), f"{file}: only star.py imports modules by name"


@pytest.mark.parametrize("file", FLAT_FILES, ids=str)
def test_a_file_has_at_most_400_lines(file):
    most = 480 if file.name == "reward.py" else 400
    assert line_count(file) <= most, f"{file} has {line_count(file)} lines, more than {most}"


def test_the_flat_files_have_at_most_2800_lines():
    assert sum(line_count(file) for file in FLAT_FILES) <= 2_800


def import_graph():
    """One line per room: its file or folder -> the rooms that it imports."""
    lines = []
    for room in LEVELS:
        files = [file for file in FILES if room_of(file) == room]
        rooms = {imported for file in files for imported in imported_rooms(file)} - {room}
        name = f"{room}.py" if Path(f"{room}.py") in files else f"{room}/"
        names = ", ".join(sorted(rooms, key=list(LEVELS).index))
        lines.append(f"{name:10s} -> {names or 'nothing of the project'}")
    return lines


def test_the_graph_has_every_room_of_the_rule():
    assert {room_of(file) for file in FILES} == LEVELS.keys() and len(import_graph()) == len(LEVELS)


if __name__ == "__main__":
    print("\n".join(import_graph()))

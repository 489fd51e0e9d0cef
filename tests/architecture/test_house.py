"""The shape of the house: which way imports run, what import costs, that the README's tree is true."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import penchant

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "penchant"

FLOORS = [
    {"errors", "disk", "stopping"},
    {"examples", "locking", "watch", "distributed"},
    {"types"},
    {"losses"},
    {"config"},
    {"data", "layouts", "models", "recipes", "report", "trackers"},
    {"scoring", "doctor"},
    {"online"},
    {"evaluate", "algorithms"},
    {"training"},
    {"dash"},
    {"cli"},
    {"__main__", "__init__"},
]
"""From the ground up: a room may import from lower floors and from itself, never from beside or above."""

HEAVY = ("torch", "transformers", "peft")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The rooms of penchant that a file imports, wherever in the file the import stands."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("penchant"):
            parts = (node.module or "").split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("penchant.")}
    return rooms


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    room = room_of(path)
    assert room in floor, f"{room} has no floor yet"
    for imported in imports_of(path) - {room}:
        assert floor[imported] < floor[room], f"{path.name} ({room}) imports {imported}"


def test_losses_know_torch_and_the_vocabulary_only() -> None:
    allowed = {"torch", "jaxtyping", "penchant", *sys.stdlib_module_names}
    for path in (PACKAGE / "losses").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] in allowed
        assert imports_of(path) <= {"losses", "types", "errors"}


def test_torch_distributed_is_named_in_one_room() -> None:
    for path in FILES:
        assert path.name == "distributed.py" or "torch.distributed" not in path.read_text(), path


def test_no_file_is_over_400_lines_and_no_function_over_100() -> None:
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 100, f"{path.name}: {node.name} has {length} lines"


def test_every_public_thing_has_a_docstring() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["schema"], ["train", "--model"]])
def test_help_and_wrong_words_load_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from penchant.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        f"sys.exit(any(name in sys.modules for name in {HEAVY!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_help_answers_in_half_a_second() -> None:
    """Of processor time: on a busy machine the clock would measure its other work."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "penchant", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.5, seconds


def test_public_names_are_there() -> None:
    for name in penchant.__all__:
        assert getattr(penchant, name) is not None
    assert sorted(dir(penchant)) == sorted(penchant.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = penchant.nonsense


def test_the_list_of_options_is_the_golden_file() -> None:
    from penchant.config import option_names

    golden = (Path(__file__).parent / "options.txt").read_text().split()
    assert list(option_names()) == golden, "options changed: update options.txt, the CHANGELOG and the guide"


def test_the_tree_in_the_readme_is_true() -> None:
    tree = re.search(r"```text\n(src/penchant/.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree, "README.md shows no tree"
    named: set[str] = set()
    for line in tree.group(1).splitlines()[1:]:
        named.add(line.split()[0].rstrip("/"))
    there = {path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert named == there

"""Rules from files: how they are found, what may go wrong in them, and what loading leaves behind."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penchant.errors import UserError
from penchant.online.rules import given_rule, load_rule

GOOD = "def score(prompt, completions):\n    return [len(text) for text in completions]\n"


def written(folder: Path, text: str, name: str = "rules.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize("numbers", [[1, 2.5], (True, np.float32(2.5)), np.array([1, 2.5]), torch.tensor([1, 2.5])])
def test_numbers_of_every_kind_are_scores(numbers: Any) -> None:
    scores = given_rule(lambda prompt, completions: numbers).scores("p", ["a", "b"])
    assert scores == (1.0, 2.5)
    assert {type(score) for score in scores} == {float}


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("rules.py", "'rules.py' names no function; give it as FILE.py:NAME"),
        ("rules.py:", "names no function"),
        ("rules.py:a b", "names no function"),
        ("nowhere.py:score", "there is no file 'nowhere.py'"),
    ],
)
def test_a_place_that_names_nothing_is_refused(place: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        load_rule(place)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (GOOD.replace("score", "scores"), "has no function 'score'; did you mean 'scores'?"),
        ("score = 3\n", "score in '{file}' is no function but int"),
        ("import math\n1 / 0\n", "{file}:2 fails with ZeroDivisionError: division by zero"),
        ("import sys\n\nsys.exit(3)\n", "{file}:3 fails with SystemExit: 3"),
        ("def score(\n", "{file}:1 fails with SyntaxError"),
        ("import no_such_module\n", "{file}:1 fails with ModuleNotFoundError"),
    ],
)
def test_a_file_that_holds_no_rule_is_refused(tmp_path: Path, code: str, told: str) -> None:
    file = written(tmp_path, code)
    with pytest.raises(UserError, match=re.escape(told.replace("{file}", file))):
        load_rule(f"{file}:score")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return [1.0]", "{file}:3: the rule score gives 1 numbers for 2 completions"),
        ("return [1.0, float('nan')]", "gives nan, which is no finite number"),
        ("return [1.0, 10**400]", "which is no finite number"),
        ("return [1.0, '2']", "gives '2', which is no finite number"),
        ("return [1.0, None]", "gives None, which is no finite number"),
        ("return None", "fails with TypeError"),
        ("return [completions[5], 1]", "{file}:4: the rule score fails with IndexError: list index out of range"),
        ("return [inner(text) for text in completions]", "{file}:2: the rule score fails with ValueError"),
    ],
)
def test_a_rule_that_goes_wrong_is_named_by_line_and_prompt(tmp_path: Path, body: str, told: str) -> None:
    file = written(tmp_path, f"def inner(text):\n    raise ValueError\ndef score(prompt, completions):\n    {body}\n")
    rule = load_rule(f"{file}:score")
    with pytest.raises(UserError) as refused:
        rule.scores([{"role": "user", "content": "tell me\n" + "x" * 200}], ["a", "b"])
    assert told.replace("{file}", file) in str(refused.value)
    assert "on the prompt 'tell me xxx" in str(refused.value)
    assert len(str(refused.value)) < 300 + len(file)


def test_neighbours_can_be_imported_and_nothing_is_left_behind(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    scores = []
    before = set(sys.modules), list(sys.path), sys.dont_write_bytecode
    for number, folder in enumerate(folders, start=1):
        folder.mkdir()
        written(folder, f"WEIGHT = {number}\n", "weights_beside.py")
        code = (
            "from __future__ import annotations\nfrom dataclasses import dataclass\nimport weights_beside\n"
            "@dataclass\nclass Scale:\n    by: int\n"
            "def score(prompt, completions):\n    return [Scale(weights_beside.WEIGHT).by for _ in completions]\n"
        )
        scores += load_rule(f"{written(folder, code)}:score").scores("p", ["a"])
    assert scores == [1.0, 2.0]
    assert (set(sys.modules), list(sys.path), sys.dont_write_bytecode) == before
    assert {path.name for path in tmp_path.rglob("*")} == {"one", "two", "rules.py", "weights_beside.py"}


def test_a_file_that_fails_leaves_nothing_behind_either(tmp_path: Path) -> None:
    written(tmp_path, "WEIGHT = 1\n", "weights_beside.py")
    before = set(sys.modules), list(sys.path), sys.dont_write_bytecode
    with pytest.raises(UserError):
        load_rule(f"{written(tmp_path, 'import weights_beside' + chr(10) + '1 / 0')}:score")
    assert (set(sys.modules), list(sys.path), sys.dont_write_bytecode) == before


def test_the_hash_follows_the_code_and_not_the_place(tmp_path: Path) -> None:
    hashes = []
    neighbour = "import beside\n"
    for folder, code, weight in [
        ("a", GOOD, 1),
        ("b", GOOD, 2),
        ("c", neighbour + GOOD, 1),
        ("d", neighbour + GOOD, 2),
    ]:
        (tmp_path / folder).mkdir()
        written(tmp_path / folder, f"WEIGHT = {weight}\n", "beside.py")
        hashes.append(load_rule(f"{written(tmp_path / folder, code)}:score").sha256)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_a_function_in_hand_is_known_by_its_source() -> None:
    def one(prompt: Any, completions: list[str]) -> list[int]:
        return [1 for _ in completions]

    def other(prompt: Any, completions: list[str]) -> list[int]:
        return [2 for _ in completions]

    assert given_rule(one).sha256 == given_rule(one).sha256 != given_rule(other).sha256
    assert given_rule(max).name == "max"


def test_a_rule_with_a_third_parameter_is_given_the_row(tmp_path: Path) -> None:
    place = tmp_path / "rule.py"
    place.write_text(
        "def score(prompt, completions, row):\n    return [float(text == row['answer']) for text in completions]\n"
    )
    rule = load_rule(f"{place}:score")
    assert rule.takes_row
    assert rule.scores("2 + 2", ["4", "5"], {"prompt": "2 + 2", "answer": "4"}) == (1.0, 0.0)
    with pytest.raises(UserError, match="takes a row of the data as well, and here there is none, on the prompt '2"):
        rule.scores("2 + 2", ["4"])
    assert not given_rule(lambda prompt, completions: [0.0]).takes_row
    assert not given_rule(lambda prompt, completions, scale=2.0: [scale]).takes_row
    assert not given_rule(len).takes_row

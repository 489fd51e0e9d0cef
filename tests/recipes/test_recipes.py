"""Every recipe is a run file that runs, and says of each of its numbers where it was published."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from penchant.cli import main
from penchant.config import load_config
from penchant.errors import UserError
from penchant.recipes import names, path_of

SOURCE = re.compile(
    r"paper, (Section|Appendix|Appendices|Table|Figure|Equation) "
    r"|[\w.-]+\.(yaml|md|py|sh|conf)\b"  # a file of the authors' repository
    r"|ours|not stated|from memory"
)
"""What a comment names as the source of a number, or says of one that has none."""

NUMBER = re.compile(r"(?<![\w.-])-?\d+(\.\d+)?(e[+-]?\d+)?(?![\w.-])")


def settings_with_comments(path: Path) -> list[tuple[str, str, str]]:
    """Each line of a run file that sets a key: the line, its value and its comments, on it or directly above it."""
    found: list[tuple[str, str, str]] = []
    above: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        setting, _, comment = line.partition("#")
        if setting.strip():
            found.append((line, setting.partition(":")[2].strip(), " ".join([*above, comment])))
            above = []
        else:
            above = [*above, comment] if comment else []
    return found


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Forty pairs, as many rows as leave some to train on when a share is held out."""
    rows = [
        {"prompt": f"what is {number} ?", "chosen": f"the cat sat on {number}", "rejected": "no dog ran"}
        for number in range(40)
    ]
    return write_rows(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Forty answers to as many prompts, every second one desirable."""
    rows = [
        {"prompt": f"what is {number} ?", "completion": f"the cat sat on {number}", "label": number % 2 == 0}
        for number in range(40)
    ]
    return write_rows(tmp_path / "labelled.jsonl", rows)


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_there_is_a_recipe_for_every_published_setting() -> None:
    assert set(names()) >= {
        "dpo-hh", "dpo-imdb", "dpo-tldr", "ipo", "kto", "orpo-mistral", "simpo-gemma2-9b", "simpo-llama3-base",
        "simpo-llama3-instruct", "simpo-mistral-base", "simpo-mistral-instruct", "tulu-3-8b-dpo", "zephyr-7b",
    }  # fmt: skip
    assert names() == sorted(names())


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no recipe 'zephir-7b'; did you mean 'zephyr-7b'\?"):
        path_of("zephir-7b")


def test_naming_recipes_loads_nothing_heavy() -> None:
    code = (
        "import sys; from penchant.recipes import names; names()\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'yaml')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", names())
def test_a_recipe_says_which_paper_it_follows_and_with_what(name: str) -> None:
    header = path_of(name).read_text(encoding="utf-8").partition("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    text = " ".join(line.removeprefix("# ") for line in header.splitlines())
    assert re.search(r"Paper: \D+ \d{4}, \"", text)
    assert re.search(r"arXiv:\d{4}\.\d{5}", text)
    assert "Published with" in text


@pytest.mark.parametrize("name", names())
def test_every_number_of_a_recipe_has_its_source_beside_it(name: str) -> None:
    settings = settings_with_comments(path_of(name))
    numbers = [(line, comment) for line, value, comment in settings if NUMBER.search(value)]
    assert len(numbers) >= 8
    for line, comment in numbers:
        assert SOURCE.search(comment), line


@pytest.mark.parametrize("name", names())
def test_the_other_settings_of_a_recipe_have_a_source_too(name: str) -> None:
    for line, value, comment in settings_with_comments(path_of(name)):
        if value and not line.startswith("method:"):  # the method is the paper's
            assert SOURCE.search(comment), line


@pytest.mark.parametrize("name", names())
def test_where_sources_disagree_a_recipe_says_which_it_took(name: str) -> None:
    for line, _, comment in settings_with_comments(path_of(name)):
        if "sources disagree" in comment and not line.startswith("model:"):
            assert "Taken: " in comment, line


@pytest.mark.parametrize("name", names())
def test_lines_are_at_most_120_wide_and_name_no_address(name: str) -> None:
    text = path_of(name).read_text(encoding="utf-8")
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "://" not in text


@pytest.mark.parametrize("name", names())
def test_a_recipe_is_a_run_file(name: str) -> None:
    config = load_config(str(path_of(name)), {})
    assert config.method in ("dpo", "ipo", "ln-dpo", "simpo", "orpo", "kto")
    assert config.loss


@pytest.mark.parametrize("name", names())
def test_a_recipe_runs_dry_on_a_tiny_model(
    name: str,
    model_folder: Path,
    pairs: Path,
    labelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = labelled if load_config(str(path_of(name)), {}).method == "kto" else pairs
    words = ["train", str(path_of(name)), "--model", str(model_folder), "--data", str(data), "--device", "cpu"]
    assert main([*words, "--dry-run"]) == 0, capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "labelled.jsonl"}

"""Files and folders: whole or as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penchant.disk import (
    append_json_line,
    new_folder,
    read_json_lines,
    remove_folder,
    remove_leftovers,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    write_text(path, "lone \ud800 surrogate")
    assert path.read_text() == "lone \\ud800 surrogate"
    assert names(tmp_path) == ["summary.json"]


def test_a_folder_appears_when_it_is_full_and_not_before(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a").exists()
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "a") as folder:
        (folder / "x").write_bytes((folder / "nothing").read_bytes())
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "1"
    with new_folder(tmp_path / "a") as folder:
        (folder / "y").write_text("3")
    assert names(tmp_path / "a") == ["y"]
    remove_folder(tmp_path / "a")
    assert names(tmp_path) == []


def test_what_a_crash_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.tmp-1234", ".hidden", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / ".c.json.tmp-99").write_text("{")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "b"]


def test_half_a_line_at_the_end_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    for step in (1, 2):
        append_json_line(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]

"""Files and folders: whole or as they were."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penchant.disk import (
    Part,
    append_json_line,
    begin_together,
    give_part,
    new_folder,
    read_json_lines,
    remove_folder,
    remove_leftovers,
    take_parts,
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


def fill_together(place: Path, *fills: Callable[[Path], None], patience_s: float = 30.0) -> None:
    """As many processes as there are functions, each filling its part; the first one in this thread."""
    until = time.monotonic() + patience_s
    begin_together(place, "word")
    parts = [Part(number, len(fills), "word", until) for number in range(len(fills))]
    with ThreadPoolExecutor() as others:
        given = [others.submit(give_part, place, part, fill) for part, fill in zip(parts[1:], fills[1:], strict=True)]
        with new_folder(place, parts[0]) as folder:
            fills[0](folder)
            take_parts(folder, parts[0])
        for one in given:
            one.result()


def writes(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(name)

    return write


def fails(folder: Path) -> None:
    (folder / "half").write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_several_fill_appears_when_all_are_done(tmp_path: Path) -> None:
    fill_together(tmp_path / "a", writes("x"), writes("y"), writes("z"))
    assert names(tmp_path) == ["a"]
    assert {path.name: path.read_text() for path in (tmp_path / "a").iterdir()} == {"x": "x", "y": "y", "z": "z"}


def test_where_one_of_several_fails_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="another process could not write its part"):
        fill_together(tmp_path / "a", writes("x"), fails)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_nobody_waits_for_a_part_for_ever(tmp_path: Path) -> None:
    part = Part(0, 2, "word", time.monotonic() + 0.1)
    begin_together(tmp_path / "a", "word")
    with pytest.raises(OSError, match="process 1 has not written its part"), new_folder(tmp_path / "a", part) as folder:
        take_parts(folder, part)
    begin_together(tmp_path / "a", "word")
    with pytest.raises(OSError, match="process 1 has not"), new_folder(tmp_path / "a", Part(0, 2, "word")) as folder:
        take_parts(folder, Part(0, 2, "word"), may_wait=lambda: False)
    assert names(tmp_path) == []

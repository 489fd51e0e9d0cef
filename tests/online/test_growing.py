"""Files that are made chunk by chunk: what a kill leaves of them, and how they are gone on with."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from penchant.errors import UserError
from penchant.online.growing import growing_file, refuse_unfinished, settings_path

ITEMS = [f"item {number} \u00e4" for number in range(7)]
SETTINGS = {"seed": 0, "model": "a" * 64, "sampling.temperature": 1.0}


def make(path: Path, items: Sequence[str] = ITEMS, chunk: int = 3, **more: Any) -> list[Sequence[str]]:
    """Makes the file, or goes on with it; the chunks that were still to be done."""
    with growing_file(path, more.pop("settings", SETTINGS), len(items), chunk, **more) as file:
        done = []
        for part in file.chunks(items):
            file.append([{"item": item} for item in part])
            done.append(part)
    return done


def test_a_file_cut_off_at_any_byte_keeps_its_whole_chunks_and_comes_out_the_same(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    assert make(path) == [ITEMS[:3], ITEMS[3:6], ITEMS[6:]]
    whole = path.read_bytes()
    ends = [len(b"".join(whole.splitlines(keepends=True)[:number])) for number in (0, 3, 6, 7)]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        num_kept = sum(end <= cut for end in ends[1:])
        assert make(path) == [ITEMS[:3], ITEMS[3:6], ITEMS[6:]][num_kept:], cut
        assert path.read_bytes() == whole, cut


@pytest.mark.parametrize("torn", [b"\x00" * 40, b'{"item": "half a letter \xc3', b"[1]\n", b"\n"])
def test_what_a_loss_of_power_made_of_the_last_chunk_is_cut_off(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    make(path)
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + torn)
    assert make(path) == [ITEMS[3:6], ITEMS[6:]]
    assert path.read_bytes() == whole


def test_a_complete_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    make(path)
    before = path.stat()
    assert make(path) == []
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_file_keeps_the_chunks_that_it_was_begun_with(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    make(path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
    assert make(path, chunk=5) == [ITEMS[3:6], ITEMS[6:]]


def test_other_settings_are_refused_with_what_differs_and_nothing_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    make(path)
    before = path.read_bytes(), settings_path(path).read_bytes()
    other = {"seed": 0, "model": "b" * 64, "sampling.temperature": 0.5, "sampling.top_k": 4}
    with pytest.raises(UserError) as refused:
        make(path, settings=other)
    assert str(refused.value).splitlines() == [
        f"{path}: was begun with other settings:",
        "  model: sha256 aaaaaaaaaaaa then, sha256 bbbbbbbbbbbb now",
        "  sampling.temperature: 1.0 then, 0.5 now",
        "  sampling.top_k: null then, 4 now",
        "Choose another --output, or begin it anew with --overwrite.",
    ]
    assert (path.read_bytes(), settings_path(path).read_bytes()) == before


def test_overwrite_begins_anew_with_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    make(path)
    assert make(path, ITEMS[:2], chunk=1, settings={"seed": 1}, overwrite=True) == [ITEMS[:1], ITEMS[1:2]]
    assert json.loads(settings_path(path).read_text()) == {"settings": {"seed": 1}, "num_records": 2, "chunk": 1}


def test_settings_without_a_file_bind_nobody(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    make(path)
    path.unlink()  # as a kill between the two steps of --overwrite leaves it
    assert len(make(path, settings={"seed": 1})) == 3


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"mine": 1}\n')
    with pytest.raises(UserError, match=r"is there already, and no pairs\.jsonl\.settings\.json says"):
        make(path)
    assert path.read_text() == '{"mine": 1}\n'


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"settings": {}}'])
def test_a_damaged_side_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    make(path)
    settings_path(path).write_text(damage)
    with pytest.raises(UserError, match="is damaged"):
        make(path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        make(tmp_path)


def test_two_at_once_are_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with growing_file(path, SETTINGS, 1, 1) as file:
        with pytest.raises(UserError, match="another process is making it"):
            make(path)
        file.append([{"item": 1}])
    assert path.read_text() == '{"item": 1}\n'


def test_a_chunk_is_forced_to_the_disk_before_the_next_begins(tmp_path: Path) -> None:
    path, forced = tmp_path / "samples.jsonl", []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        forced.append(path.read_text() if path.exists() else None)

    with growing_file(path, SETTINGS, 2, 1) as file, patch("os.fsync", fsync):
        file.append([{"item": 1}])
        assert forced == ['{"item": 1}\n']
        file.append([{"item": 2}])
    assert forced[-1] == '{"item": 1}\n{"item": 2}\n'


def test_a_full_disk_is_a_sentence_and_the_same_command_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    calls = iter(range(100))
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) == 4:  # after the two of the side file, that of the folder, and the first chunk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with patch("os.fsync", fsync), pytest.raises(UserError, match="No space left on device"):
        make(path)
    assert path.read_bytes().count(b"\n") == 6
    assert sum(map(len, make(path))) <= 4
    assert [json.loads(line)["item"] for line in path.read_text().splitlines()] == ITEMS


def test_half_a_surrogate_pair_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    make(path, ["\ud83d", "\U0001f600"])
    assert [json.loads(line)["item"] for line in path.read_text().splitlines()] == ["\ud83d", "\U0001f600"]


def test_a_file_that_is_not_finished_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    make(path)
    refuse_unfinished(path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(UserError, match="holds 3 of 7 records; give the command that makes it again"):
        refuse_unfinished(path)
    settings_path(path).unlink()
    refuse_unfinished(path)

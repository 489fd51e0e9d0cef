"""Checkpoints: whole and proven, or passed over with a word about why."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penchant.disk import remove_leftovers
from penchant.errors import UserError
from penchant.training import checkpoint as module
from penchant.training.checkpoint import (
    NothingToResumeError,
    Writer,
    newest_checkpoint,
    read_checkpoint,
    remove_from,
    rotate,
    write_checkpoint,
)


def filler(text: str = "weights") -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_text(text)
        (folder / "more").mkdir()
        (folder / "more" / "words.json").write_text("{}")

    return fill


def write(folder: Path, *steps: int) -> None:
    for step in steps:
        write_checkpoint(folder, step, {"versions": {"penchant": "0.1.0"}}, filler(f"weights of step {step}"))


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path) -> tuple[int | None, list[str]]:
    """The step of the newest whole checkpoint, and what was said of others."""
    said: list[str] = []
    found = newest_checkpoint(folder, said.append)
    return (found and found.step), said


def test_a_checkpoint_is_what_was_put_into_it(tmp_path: Path) -> None:
    write(tmp_path, 5)
    found = read_checkpoint(tmp_path / "step-5")
    assert (found.folder, found.step) == (tmp_path / "step-5", 5)
    assert found.facts["versions"] == {"penchant": "0.1.0"}
    assert set(found.facts["files"]) == {"model.safetensors", os.path.join("more", "words.json")}
    assert found.facts["files"]["model.safetensors"]["bytes"] == len("weights of step 5")
    assert steps_in(tmp_path) == ["step-5"]


def test_what_libraries_wrote_for_themselves_alone_may_be_read_by_others(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "private").touch(mode=0o600)

    write_checkpoint(tmp_path, 1, {}, fill)
    assert (tmp_path / "step-1" / "private").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "step-1").stat().st_mode & 0o777 == 0o755


def test_a_save_that_fails_leaves_the_others_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1)

    def fill(folder: Path) -> None:
        filler()(folder)
        raise OSError(28, "No space left on device")

    for step in (1, 2):
        with pytest.raises(OSError, match="No space"):
            write_checkpoint(tmp_path, step, {}, fill)
    assert steps_in(tmp_path) == ["step-1"]
    assert newest(tmp_path) == (1, [])


@pytest.mark.parametrize("error", [RuntimeError("I/O error: whatever (os error 28)"), OSError(28, "No space left")])
def test_a_full_disk_is_an_os_error_whatever_library_found_it(error: Exception, tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise error

    with pytest.raises(OSError, match="No space left") as found:
        write_checkpoint(tmp_path, 1, {}, fill)
    assert found.value.errno == 28


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise RuntimeError("a shape is wrong")

    with pytest.raises(RuntimeError, match="a shape is wrong"):
        write_checkpoint(tmp_path, 1, {}, fill)
    assert steps_in(tmp_path) == []


def test_the_same_step_is_written_again(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, {}, filler("old"))
    write_checkpoint(tmp_path, 1, {}, filler("new"))
    assert (read_checkpoint(tmp_path / "step-1").folder / "model.safetensors").read_text() == "new"
    assert steps_in(tmp_path) == ["step-1"]


def test_the_most_steps_are_the_newest_whatever_the_clock_says(tmp_path: Path) -> None:
    write(tmp_path, 9, 10, 100)
    for step, time in ((9, 3e9), (10, 2e9), (100, 0)):
        for path in [*(tmp_path / f"step-{step}").rglob("*"), tmp_path / f"step-{step}"]:
            os.utime(path, (time, time))
    assert newest(tmp_path) == (100, [])


def test_where_nothing_was_written_there_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") == (None, [])
    (tmp_path / ".step-3.tmp-1234").mkdir()
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-4").write_text("a file")
    assert newest(tmp_path) == (None, [])


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "longer": (lambda f: (f / "model.safetensors").write_text("weights of step 12"), "has 18 bytes instead of 17"),
    "shorter": (lambda f: (f / "model.safetensors").write_text(""), "has 0 bytes instead of 17"),
    "other": (lambda f: (f / "model.safetensors").write_text("weights of step 3"), "its sha256 differs"),
    "gone": (lambda f: (f / "more" / "words.json").unlink(), "words.json cannot be read"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
    "empty manifest": (lambda f: (f / "manifest.json").write_text(""), "manifest.json is not as it was written"),
    "half a manifest": (lambda f: halve(f / "manifest.json"), "manifest.json is not as it was written"),
    "list": (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json is not as it was written"),
    "deep": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json is not as it was written"),
    "bytes": (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "manifest.json cannot be read"),
    "no seal": (lambda f: change(f, seal=None), "manifest.json is not as it was written"),
    "another step": (lambda f: change(f, step=7), "manifest.json is not as it was written"),
    "another format": (lambda f: change(f, format=3), "manifest.json is not as it was written"),
}


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change(folder: Path, **facts: Any) -> None:
    """Changes the manifest without sealing it anew."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **facts}, indent=1) + "\n")


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_damaged_is_named_and_the_one_before_is_taken(fault: str, tmp_path: Path) -> None:
    damage, words = FAULTS[fault]
    write(tmp_path, 1, 2)
    damage(tmp_path / "step-2")
    step, said = newest(tmp_path)
    assert step == 1
    (sentence,) = said
    assert sentence.startswith("checkpoint step-2 is damaged: ")
    assert words in sentence
    assert sentence.endswith("; it is passed over")


def test_where_none_is_whole_all_are_named(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    (tmp_path / "step-1" / "model.safetensors").unlink()
    halve(tmp_path / "step-2" / "manifest.json")
    with pytest.raises(NothingToResumeError, match=r"no checkpoint is whole.*step-2.*step-1.*--overwrite") as stopped:
        newest(tmp_path)
    assert stopped.value.exit_code == 3


def test_a_folder_that_was_given_another_name_is_not_believed(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    (tmp_path / "step-2").rename(tmp_path / "step-9")
    step, (said,) = newest(tmp_path)
    assert step == 1
    assert "was written as step-2" in said


def test_a_format_to_come_names_the_version_that_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    monkeypatch.setattr(module, "FORMAT", 2)
    write_checkpoint(tmp_path, 2, {"versions": {"penchant": "7.5.0"}}, filler())
    monkeypatch.setattr(module, "FORMAT", 1)
    with pytest.raises(UserError, match=r"format 2, written by penchant 7\.5\.0; this version reads format 1") as found:
        newest(tmp_path)
    assert found.value.exit_code == 2
    assert steps_in(tmp_path) == ["step-1", "step-2"]


def test_weights_alone_as_first_versions_wrote_them_are_told_from_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-4").mkdir()
    (tmp_path / "step-4" / "model.safetensors").write_text("weights")
    with pytest.raises(NothingToResumeError, match=r"step-4 has no manifest\.json: .* weights alone"):
        newest(tmp_path)


@pytest.mark.parametrize(
    ("keep", "best", "expected"),
    [(1, None, [10]), (2, None, [8, 10]), (9, None, [2, 4, 8, 10]), (1, 4, [4, 10]), (2, 10, [8, 10]), (0, 2, [2]),
     (0, None, [])],
)  # fmt: skip
def test_the_newest_are_kept_and_the_best(keep: int, best: int | None, expected: list[int], tmp_path: Path) -> None:
    write(tmp_path, 2, 4, 8, 10)
    rotate(tmp_path, keep, best)
    assert steps_in(tmp_path) == sorted(f"step-{step}" for step in expected)


def test_later_steps_go_and_so_does_what_crashes_left(tmp_path: Path) -> None:
    write(tmp_path, 2, 4, 10)
    (tmp_path / ".step-11.tmp-12345678").mkdir()
    (tmp_path / ".step-11.tmp-12345678" / ".manifest.json.tmp-87654321").touch()
    (tmp_path / "step-4" / ".words.tmp-11111111").touch()
    remove_from(tmp_path, 4)
    remove_leftovers(tmp_path)
    assert steps_in(tmp_path) == ["step-2", "step-4"]
    assert newest(tmp_path) == (4, [])
    remove_from(tmp_path / "nowhere", 0)


def test_one_is_written_after_the_other_and_none_is_lost() -> None:
    writer, go, done = Writer(), threading.Event(), []

    def slow() -> None:
        go.wait()
        done.append("slow")

    writer.start(slow, in_background=True)
    assert writer.is_busy
    threading.Timer(0.05, go.set).start()
    writer.start(lambda: done.append("quick"), in_background=False)
    assert done == ["slow", "quick"]
    assert not writer.is_busy


@pytest.mark.parametrize("in_background", [True, False])
def test_what_failed_is_said_once_and_the_next_is_written(in_background: bool) -> None:
    writer, done = Writer(), []

    def fail() -> None:
        raise OSError(28, "No space left on device")

    def start_and_wait() -> None:
        writer.start(fail, in_background)
        writer.wait()

    with pytest.raises(OSError, match="No space left"):
        start_and_wait()
    writer.wait()
    writer.start(lambda: done.append(1), in_background)
    writer.wait()
    assert done == [1]

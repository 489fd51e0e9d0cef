"""Whatever stops a save, and whatever happens to what was saved: a whole checkpoint is found, and no other."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from penchant.cli import main
from penchant.disk import remove_leftovers, sha256_of
from penchant.scoring.policy import Policy
from penchant.training import run as run_module
from penchant.training.checkpoint import newest_checkpoint, read_checkpoint, remove_from, rotate, write_checkpoint
from penchant.training.loop import CHECKPOINTS, Training
from penchant.training.optim import make_optimizer, set_rate
from penchant.training.state import Snapshot, take_snapshot

from ..conftest import make_tiny_model
from ..training.test_run import rows, write_rows
from ..training.test_state import config
from .disks import Power, SmallDisk, dies_at, failing_at, killed_at, operations_of, watching
from .matrix import Matrix

STEPS = 6


def found_in(folder: Path) -> int | None:
    """The step of the newest whole checkpoint; that half of one is seen, be it an older one, is a failure."""
    steps = [read_checkpoint(place).step for place in folder.glob("step-*")]
    found = newest_checkpoint(folder, pytest.fail)
    assert (found and found.step) == max(steps, default=None)
    return found and found.step


def is_clean(folder: Path) -> bool:
    """Whether nothing but checkpoints is there, once the next start has cleared away what it found."""
    remove_leftovers(folder)
    return all(path.name.startswith("step-") for path in folder.iterdir())


@pytest.fixture(scope="module")
def snapshot(tokenizer: Any) -> Snapshot:
    """The state of a real model and its optimizer."""
    model = make_tiny_model(hidden_size=16, intermediate_size=16)
    optimizer = make_optimizer(model, config())
    set_rate(optimizer, 1e-3)
    ids = torch.arange(3, 12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return take_snapshot(Policy(model, tokenizer), optimizer, {}, copy=True)


def save(folder: Path, step: int, fill: Callable[[Path], None]) -> None:
    """What a run does: writes one and lets older ones go, but for the best."""
    write_checkpoint(folder, step, {}, fill)
    rotate(folder, keep=1, best_step=2)


# Processes that die.


@pytest.mark.parametrize("before", [(), (2,), (2, 3)], ids=["the first", "the second", "one that lets another go"])
def test_whichever_operation_of_a_save_is_the_last_a_whole_checkpoint_is_there(
    before: tuple[int, ...], snapshot: Snapshot, matrix: Matrix, full: bool, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    start.mkdir()
    for step in before:
        write_checkpoint(start, step, {}, snapshot.write)
    place = tmp_path / "place"
    shutil.copytree(start, place)
    total = len(operations_of(place, lambda: save(place, 4, snapshot.write)))
    assert total > 25
    newest, survived = before[-1] if before else None, 0
    # In the short version the second save is struck everywhere, the others in some places.
    numbers = range(1, total + 1, 1 if full or before == (2,) else 4)
    for number in numbers:
        shutil.rmtree(place)
        shutil.copytree(start, place)
        assert dies_at(number, place, lambda: save(place, 4, snapshot.write))
        found = found_in(place)
        survived += found in (newest, 4) and is_clean(place) and found_in(place) == found
        newest = found  # once it is committed, it stays
    assert newest == 4
    shutil.rmtree(place)
    shutil.copytree(start, place)
    assert not dies_at(total + 1, place, lambda: save(place, 4, snapshot.write))
    matrix.record(2, "dies before an operation of a save", len(numbers), survived)


def test_whichever_operation_of_going_back_is_the_last_the_checkpoint_is_there(matrix: Matrix, tmp_path: Path) -> None:
    def begin() -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        for step in (2, 4, 6):
            write_checkpoint(tmp_path / "run", step, {}, lambda folder: None)

    begin()
    total = len(operations_of(tmp_path, lambda: remove_from(tmp_path / "run", 2)))
    for number in range(1, total + 1):
        begin()
        assert dies_at(number, tmp_path / "run", lambda: remove_from(tmp_path / "run", 2))
        assert found_in(tmp_path / "run") in (2, 4, 6)
        remove_from(tmp_path / "run", 2)
        assert found_in(tmp_path / "run") == 2
        assert is_clean(tmp_path / "run")
    matrix.record(2, "dies while later checkpoints are removed", total, total)


@pytest.mark.parametrize("errno", [5, 13, 28], ids=["EIO", "EACCES", "ENOSPC"])
def test_whichever_operation_of_a_save_fails_the_others_stay_and_nothing_is_left(
    errno: int, snapshot: Snapshot, matrix: Matrix, full: bool, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    write_checkpoint(place, 2, {}, snapshot.write)
    total = len(operations_of(place, lambda: write_checkpoint(place, 4, {}, snapshot.write)))
    numbers = range(1, total + 1, 1 if full else 3)
    for number in numbers:
        shutil.rmtree(place / "step-4", ignore_errors=True)
        with failing_at(number, place, OSError(errno, os.strerror(errno))) as failed:
            try:
                write_checkpoint(place, 4, {}, snapshot.write)
                is_there = True
            except OSError:
                is_there = number == total  # the fsync behind the rename: it is there, if not for sure
        assert is_there <= (number == total or failed == ["os.mkdir"])  # of a folder that is there already
        assert found_in(place) == (4 if is_there else 2), failed
        assert all(path.name in ("step-2", "step-4") for path in place.iterdir()), failed
    matrix.record(
        6 if errno == 28 else 7, f"{os.strerror(errno)}, at an operation of a save", len(numbers), len(numbers)
    )


_SYSTEM_CALLS = ("openat", "write", "ftruncate", "close", "fsync", "mkdir", "rename", "unlink,unlinkat,rmdir", "chmod")


def test_a_kill_at_a_system_call_of_a_save_leaves_a_whole_checkpoint(
    snapshot: Snapshot, matrix: Matrix, full: bool, tmp_path: Path
) -> None:
    if not full:
        pytest.skip("takes a minute: --full")
    place = tmp_path / "place"
    for call in _SYSTEM_CALLS:
        tried, is_dead = 0, True
        while is_dead:
            shutil.rmtree(place, ignore_errors=True)
            for step in (2, 3):
                write_checkpoint(place, step, {}, snapshot.write)
            is_dead = killed_at(call, tried + 1, lambda: save(place, 4, snapshot.write))
            tried += is_dead
            assert found_in(place) in ((3, 4) if is_dead else (4,)), (call, tried)
            assert is_clean(place)
        matrix.record(2, f"SIGKILL at a system call of a save: {call}", tried, tried)


# Power that goes.


def test_when_the_power_goes_a_whole_checkpoint_is_left(matrix: Matrix, full: bool, tmp_path: Path) -> None:
    disk, committed, tried = tmp_path / "disk", [0], [0]
    disk.mkdir()
    power, dice = Power(disk), random.Random(0)

    def fill(folder: Path) -> None:
        for name in ("model.safetensors", "training.safetensors", "training.json"):
            (folder / name).write_bytes(dice.randbytes(500))
        (folder / "more").mkdir()
        (folder / "more" / "words").write_text("some")

    def lose(happened: Callable[[], bool]) -> None:
        tried[0] += 1
        left = tmp_path / f"left-{tried[0]}"
        power.gone(left, happened, dice)
        found = found_in(left / CHECKPOINTS) or 0
        assert committed[0] <= found <= 4
        shutil.rmtree(left)

    def tell(what: str, target: Any) -> None:
        power.look()
        for happened in (lambda: False, lambda: True, *[lambda: dice.random() < 0.5] * (40 if full else 2)):
            lose(happened)
        if what == "os.fsync":
            power.synced(target)

    with watching(disk, tell):
        for step in (2, 4):
            write_checkpoint(disk / CHECKPOINTS, step, {}, fill)
            committed[0] = step
            rotate(disk / CHECKPOINTS, keep=1)
    power.look()
    lose(lambda: False)
    assert tried[0] > 200
    matrix.record(3, "the power goes at an operation of a save", tried[0], tried[0])


def test_power_that_goes_spares_only_what_was_forced_to_the_disk(tmp_path: Path) -> None:
    """That the test above can fail: files, names and renames that nobody forced to the disk are lost."""
    disk = tmp_path / "disk"
    disk.mkdir()
    power, dice = Power(disk), random.Random(0)

    def left() -> dict[str, str]:
        power.look()
        shutil.rmtree(tmp_path / "left", ignore_errors=True)
        power.gone(tmp_path / "left", lambda: False, dice)
        return {path.name: path.read_text() for path in (tmp_path / "left").iterdir()}

    def force(path: Path) -> None:
        power.look()
        descriptor = os.open(path, os.O_RDONLY)
        power.synced(descriptor)
        os.close(descriptor)

    (disk / "a").write_text("1")
    assert left() == {}
    force(disk)
    assert left() == {"a": ""}
    force(disk / "a")
    assert left() == {"a": "1"}
    (disk / "a").rename(disk / "b")
    assert left() == {"a": "1"}
    (disk / "b").write_text("2")
    force(disk)
    assert left() == {"b": "1"}
    (disk / "b").unlink()
    assert left() == {"b": "1"}
    force(disk)
    assert left() == {}


# A run that was stopped, to go on with.


class Runs:
    """A run of six steps that was stopped after the fourth, as often as one likes."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._stopped, self._folder, self._number = folder / "stopped", folder, 0
        self._data = write_rows(folder / "pairs.jsonl", rows())
        self._model = model
        assert main(self.train(folder / "whole")) == 0
        self.whole = sha256_of(folder / "whole" / "model" / "model.safetensors")
        with self.stopping_after(4):
            assert main(self.train(self._stopped)) == 128 + signal.SIGTERM

    @contextmanager
    def stopping_after(self, step: int) -> Iterator[None]:
        """Within it, runs are asked to stop within the step that follows this one."""
        real = Training._step

        def asking(training: Training, draw: Any) -> str:
            if training.progress.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(training, draw)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Training, "_step", asking)
            yield

    def train(self, run_dir: Path, **settings: Any) -> list[str]:
        """The words that begin it."""
        words = ["train", "--model", str(self._model), "--data", self._data, "--output_dir", str(run_dir)]
        own = {"batch_size": 4, "num_train_epochs": 9, "learning_rate": 3e-3, "eval_size": 0, "num_samples": 0}
        own |= {"data_cache": "none", "reference.cache": "none"}  # every run does the same things
        for name, value in {**own, "max_steps": STEPS, "save_steps": 2, **settings}.items():
            words += [f"--{name}", str(value)]
        return words

    def stopped(self) -> Path:
        """A new copy of the run that was stopped, with checkpoints of steps 2 and 4."""
        self._number += 1
        return Path(shutil.copytree(self._stopped, self._folder / f"copy-{self._number}"))

    def is_whole(self, run_dir: Path) -> bool:
        """Whether the run has come to its end, and to the very weights of the one that nothing disturbed."""
        summary = json.loads((run_dir / "summary.json").read_text())
        weights = run_dir / "model" / "model.safetensors"
        return summary["status"] == "finished" and sha256_of(weights) == self.whole


@pytest.fixture(scope="module")
def runs(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs to go on with."""
    return Runs(model_folder, tmp_path_factory.mktemp("runs"))


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


# Bits that flip, files that are lost.


def test_a_flipped_bit_is_found_wherever_it_is(runs: Runs, matrix: Matrix, full: bool) -> None:
    folder = runs.stopped() / CHECKPOINTS
    files, dice, tried, survived = files_of(folder / "step-4"), random.Random(0), 0, 0
    sizes = [path.stat().st_size for path in files]
    chosen = [*files, *dice.choices(files, sizes, k=200 if full else 40)]  # each once, then by its size
    for path in chosen:
        content = path.read_bytes()
        place, bit = dice.randrange(len(content)), dice.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        said: list[str] = []
        found = newest_checkpoint(folder, said.append)
        path.write_bytes(content)
        tried += 1
        survived += found is not None and found.step == 2 and len(said) == 1 and str(path) in said[0]
    assert found_in(folder) == 4
    matrix.record(4, "a bit flipped", tried, survived)


def test_every_bit_of_a_manifest_counts(runs: Runs, matrix: Matrix, full: bool) -> None:
    folder = runs.stopped() / CHECKPOINTS
    manifest = folder / "step-4" / "manifest.json"
    content, tried = manifest.read_bytes(), 0
    for place in range(0, len(content), 1 if full else 16):
        manifest.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        tried += 1
        said: list[str] = []
        found = newest_checkpoint(folder, said.append)
        assert found is not None
        assert found.step == 2, place
    matrix.record(4, "a bit of the manifest flipped", tried, tried)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


LOSSES: dict[str, Callable[[Path], None]] = {
    "cut to half": halve,
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": Path.unlink,
    "made longer": lambda path: path.write_bytes(path.read_bytes() + b"\x00"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_file_that_is_lost_or_cut_is_named_and_the_checkpoint_before_is_taken(
    loss: str, runs: Runs, matrix: Matrix
) -> None:
    folder = runs.stopped() / CHECKPOINTS
    survived, files = 0, files_of(folder / "step-4")
    assert {"model.safetensors", "training.safetensors", "training.json", "manifest.json", "tokenizer.json"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        LOSSES[loss](path)
        said: list[str] = []
        found = newest_checkpoint(folder, said.append)
        path.write_bytes(content)
        survived += found is not None and found.step == 2 and path.name in said[0]
    matrix.record(5, f"a file {loss}", len(files), survived)


def test_a_run_goes_on_from_the_checkpoint_before_to_the_same_end(
    runs: Runs, matrix: Matrix, full: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [path.name for path in files_of(runs.stopped() / CHECKPOINTS / "step-4")]
    cases = [(damage, name) for damage in (flip, halve, Path.unlink) for name in names]
    for damage, name in cases if full else [(flip, "training.safetensors"), (Path.unlink, "manifest.json")]:
        run_dir = runs.stopped()
        damage(run_dir / CHECKPOINTS / "step-4" / name)
        with matrix.trial(5, "resumes from the checkpoint before, to the same weights"):
            assert main(["resume", str(run_dir)]) == 0
            assert runs.is_whole(run_dir)
            said = capfd.readouterr().err
            assert "checkpoint step-4 is damaged" in said
            assert name in said
            assert "goes on at step 2 of 6" in said
            assert "damaged-checkpoint" in (run_dir / "events.jsonl").read_text()


def test_where_no_checkpoint_is_whole_the_exit_code_is_3_and_nothing_is_touched(
    runs: Runs, matrix: Matrix, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = runs.stopped()
    flip(run_dir / CHECKPOINTS / "step-2" / "model.safetensors")
    (run_dir / CHECKPOINTS / "step-4" / "training.json").unlink()
    before = {path: sha256_of(path) for path in run_dir.rglob("*") if path.is_file()}
    for words in (["resume", str(run_dir)], runs.train(run_dir)):
        with matrix.trial(5, "no checkpoint is whole: exit code 3"):
            assert main(words) == 3
            said = capfd.readouterr().err
            assert "error: " in said
            assert "Traceback" not in said
            assert all(word in said for word in ("step-2", "model.safetensors", "step-4", "training.json"))
            assert {path: sha256_of(path) for path in run_dir.rglob("*") if path.is_file()} == before
    assert main([*runs.train(run_dir), "--overwrite"]) == 0
    assert runs.is_whole(run_dir)


# Clocks, names and formats.


def test_whatever_the_clock_said_the_most_steps_are_gone_on_with(runs: Runs, matrix: Matrix) -> None:
    run_dir, dice = runs.stopped(), random.Random(0)
    for number in range(20):
        for path in run_dir.rglob("*"):
            time = dice.uniform(0, 4e9)
            os.utime(path, (time, time))
        os.utime(run_dir / CHECKPOINTS / f"step-{2 + 2 * (number % 2)}", (4e9, 4e9))
        with matrix.trial(23, "dates in disorder"):
            assert found_in(run_dir / CHECKPOINTS) == 4


def test_a_folder_that_was_renamed_is_passed_over_and_the_run_goes_on(runs: Runs, matrix: Matrix) -> None:
    run_dir = runs.stopped()
    (run_dir / CHECKPOINTS / "step-2").rename(run_dir / CHECKPOINTS / "step-5")
    with matrix.trial(23, "a folder under another name"):
        assert main(["resume", str(run_dir)]) == 0
        assert runs.is_whole(run_dir)


def test_a_format_to_come_is_refused_by_name_and_left_alone(
    runs: Runs, matrix: Matrix, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = runs.stopped()
    newest = read_checkpoint(run_dir / CHECKPOINTS / "step-4")
    copy = Path(shutil.copytree(newest.folder, run_dir / "aside"))
    (copy / "manifest.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("penchant.training.checkpoint.FORMAT", 2)
        write_checkpoint(
            run_dir / CHECKPOINTS, 4, {"versions": {"penchant": "9.1"}},
            lambda folder: shutil.copytree(copy, folder, dirs_exist_ok=True) and None,
        )  # fmt: skip
    with matrix.trial(27, "a format to come"):
        assert main(["resume", str(run_dir)]) == 2
        assert "written by penchant 9.1" in capfd.readouterr().err
        assert (run_dir / CHECKPOINTS / "step-4").is_dir()


def test_weights_alone_of_an_older_version_are_told(
    runs: Runs, matrix: Matrix, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = runs.stopped()
    for step in (2, 4):
        for name in ("manifest.json", "training.json", "training.safetensors"):
            (run_dir / CHECKPOINTS / f"step-{step}" / name).unlink()
    with matrix.trial(27, "weights alone, as older versions wrote them"):
        assert main(["resume", str(run_dir)]) == 3
        assert "step-4 has no manifest.json" in capfd.readouterr().err


# Disks without room.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk to fill."""
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.unmount()


def sizes(runs: Runs) -> tuple[int, int]:
    """Bytes of a checkpoint, and of all else that a run writes before its end."""
    run_dir = runs.stopped()

    def used(path: Path) -> int:  # by whole pages, as the disk counts
        return sum(-(-file.stat().st_size // 4096) * 4096 + 4096 for file in path.rglob("*"))

    checkpoint = used(run_dir / CHECKPOINTS / "step-4")
    return checkpoint, used(run_dir) - used(run_dir / CHECKPOINTS)


def test_a_disk_with_room_for_one_and_a_half_checkpoints_ends_no_run(
    runs: Runs, small_disk: SmallDisk, matrix: Matrix, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint, rest = sizes(runs)
    small_disk.mount(rest + 3 * checkpoint // 2)
    run_dir = small_disk.folder / "run"
    with matrix.trial(6, "a disk with room for 1.5 checkpoints"):
        assert main([*runs.train(run_dir, keep_checkpoints=1)]) == 0
        assert runs.is_whole(run_dir)
        assert found_in(run_dir / CHECKPOINTS) == 2
        events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
        failed = [event for event in events if event["code"] == "checkpoint-failed"]
        assert "No space left on device" in failed[0]["message"]
        assert "No space left on device" in capfd.readouterr().err
        assert sorted(path.name for path in (run_dir / CHECKPOINTS).iterdir()) == ["step-2"]


def test_whatever_the_size_of_the_disk_a_run_ends_well_or_cleanly_and_goes_on_with_more_room(
    runs: Runs, small_disk: SmallDisk, matrix: Matrix, full: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint, rest = sizes(runs)
    whole = rest + 4 * checkpoint
    codes = []
    for part in [number / 24 for number in range(1, 24)] if full else (0.02, 0.2, 0.4):
        small_disk.mount(int(part * whole))
        run_dir = small_disk.folder / "run"
        with matrix.trial(6, "a full disk, of any size"):
            codes.append(main(runs.train(run_dir)))
            said = capfd.readouterr().err
            assert codes[-1] in (0, 2)
            assert "Traceback" not in said
            assert codes[-1] == 0 or "No space left on device" in said
            if (run_dir / CHECKPOINTS).exists():
                found_in(run_dir / CHECKPOINTS)
            small_disk.change(f"size={2 * whole}")
            assert codes[-1] == 0 or main(runs.train(run_dir)) == 0
            assert runs.is_whole(run_dir)
        small_disk.unmount()
    assert 2 in codes


def test_a_disk_that_is_too_small_is_told_before_the_first_step(
    runs: Runs, matrix: Matrix, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "free_bytes", lambda path: 8_500_000_000)
    monkeypatch.setattr(run_module, "expected_checkpoint_bytes", lambda policy, config: 3_000_000_000)
    with matrix.trial(6, "too small a disk is told beforehand"):
        assert main(runs.train(tmp_path / "run", max_steps=4)) == 0
        said = capfd.readouterr().err
        told = said.index("8.50 GB are free there, and the run needs about 9.00 GB: a checkpoint takes 3.00 GB")
        assert told < said.index("training")
        events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
        assert [event["step"] for event in events if event["code"] == "little-room"] == [0]
    monkeypatch.setattr(run_module, "free_bytes", lambda path: 9_000_000_000)
    assert main([*runs.train(tmp_path / "run", max_steps=4), "--overwrite"]) == 0
    assert "little-room" not in (tmp_path / "run" / "events.jsonl").read_text()


# Disks that fail.


def test_a_disk_that_cannot_be_written_is_refused_before_the_first_step(
    runs: Runs, small_disk: SmallDisk, matrix: Matrix, capfd: pytest.CaptureFixture[str]
) -> None:
    small_disk.mount(10**7)
    stopped = Path(shutil.copytree(runs.stopped(), small_disk.folder / "stopped"))
    small_disk.change("ro")
    for words in (runs.train(small_disk.folder / "run"), runs.train(stopped), ["resume", str(stopped)]):
        with matrix.trial(7, "a disk that is read-only"):
            assert main(words) == 2
            said = capfd.readouterr().err
            assert "error: output_dir: " in said
            assert "Traceback" not in said
            assert "training" not in said


class BeganError(Exception):
    """The first step would come next."""


def begins(words: list[str]) -> None:
    """A start that is whole: all is ready for the first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.Session, "complete", lambda session: began())
        with pytest.raises(BeganError):
            main(words)


def began() -> None:
    raise BeganError


@pytest.mark.parametrize("errno", [5, 13], ids=["EIO", "EACCES"])
@pytest.mark.parametrize("is_new", [True, False], ids=["new", "gone on with"])
def test_a_disk_that_fails_at_the_start_ends_the_run_before_its_first_step(
    errno: int, is_new: bool, runs: Runs, matrix: Matrix, full: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fresh() -> Path:
        return tmp_path / f"run-{random.random()}" if is_new else runs.stopped()

    run_dir = fresh()
    done = operations_of(run_dir, lambda: begins(runs.train(run_dir)))
    assert len(done) > 5
    codes = []
    for number in range(1, len(done) + 1, 1 if full else 8):
        run_dir = fresh()
        capfd.readouterr()
        with matrix.trial(7, f"{os.strerror(errno)}, at an operation before the first step"):
            with failing_at(number, run_dir, OSError(errno, os.strerror(errno), str(run_dir))) as failed:
                codes.append(main(runs.train(run_dir)))
            said = capfd.readouterr().err
            assert "Traceback" not in said
            assert codes[-1] == 0 or (codes[-1] == 2 and os.strerror(errno) in said and "training" not in said), failed
    # Not every failure does harm: a folder that cannot be made may be there, a lock is asked for twice.
    assert codes.count(2) >= len(codes) - 2
    assert codes[-1] == 0 or main(runs.train(run_dir)) == 0
    assert runs.is_whole(run_dir)


def test_a_start_that_dies_at_any_operation_is_begun_again_by_the_same_command(
    runs: Runs, matrix: Matrix, full: bool, tmp_path: Path
) -> None:
    plain, over = runs.train(tmp_path / "run"), [*runs.train(tmp_path / "run"), "--overwrite"]
    for words, before in ((plain, None), (plain, runs.stopped()), (over, runs.stopped())):
        number, is_dead = 1, True
        while is_dead:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            if before is not None:
                shutil.copytree(before, tmp_path / "run")
            is_dead = dies_at(number, tmp_path / "run", functools.partial(begins, words))
            with matrix.trial(2, "dies at an operation before the first step"):
                begins(words)
            number += 1 if full else 17
        assert number > 18

"""Checkpoints: folders `step-N` that are whole and proven so, or are not seen at all.

A folder is filled under a hidden name and forced to the disk; its manifest, written last, names every file with size
and sha256; then it is renamed, and only then are older ones let go. Tensors are safetensors, the rest is JSON: nothing
that is read here can run code. What is found later is believed only when every byte agrees with the manifest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.disk import ALONE, Part, give_part, new_folder, remove_folder, sha256_of, take_parts, write_text
from penchant.errors import UserError

FORMAT = 1
"""Version of what a checkpoint folder holds. Whoever changes it adds the way from the older one."""

MANIFEST = "manifest.json"
_LISTING = "listing-"

_SECONDS_TO_HURRY = 10.0

Report = Callable[[str], None]
"""Is told of each checkpoint that was passed over, in a sentence."""


class NothingToResumeError(UserError):
    """There are checkpoints, and none of them is whole."""

    exit_code = 3


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was written in full; `facts` is what its manifest says beside the files."""

    folder: Path
    step: int
    facts: dict[str, Any]


class DamagedError(Exception):
    """Why a folder is no whole checkpoint."""


def place_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or will be."""
    return folder / f"step-{step}"


def write_checkpoint(
    folder: Path,
    step: int,
    facts: dict[str, Any],
    fill: Callable[[Path], None],
    part: Part = ALONE,
    may_wait: Callable[[], bool] = lambda: True,
) -> Path:
    """Commits the checkpoint `folder/step-N` with the files that `fill` writes into the folder it is given.

    Of several processes each is called with its `part`, writes its files and hashes them; the first one waits for the
    others, while `may_wait()`, and commits.

    Raises:
        OSError: the disk is full or fails; then there is no such checkpoint, and the others are as they were.
    """
    place = place_of(folder, step)

    def fill_and_list(own: Path) -> None:
        fill(own)
        write_text(own / f"{_LISTING}{part.number}", json.dumps(_listed(own)))

    if part.number:
        give_part(place, part, fill_and_list)
        return place
    with new_folder(place, part) as unfinished:
        fill(unfinished)
        listed = _listed(unfinished)
        take_parts(unfinished, part, may_wait)
        for listing in unfinished.glob(f"{_LISTING}*"):
            listed |= json.loads(listing.read_text(encoding="utf-8"))
            listing.unlink()
        write_text(unfinished / MANIFEST, _sealed({"format": FORMAT, "step": step, **facts, "files": listed}))
    return place


def _listed(folder: Path) -> dict[str, Any]:
    """Size and hash of the files in a folder, which are readable for all behind it."""
    folder.chmod(0o755)  # what libraries write may be private
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith("."):  # another process is filling it
            continue
        path.chmod(0o755 if path.is_dir() else 0o644)
        if path.is_file():
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return files


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint of which every byte is as it was written.

    Raises:
        DamagedError: naming the first file that is not.
        UserError: it was written in a format that this version does not know.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DamagedError(
            f"{folder} has no {MANIFEST}: it was not written to its end, or holds weights alone, as those of the first "
            "versions did"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{folder / MANIFEST} cannot be read ({_reason(error)})") from None
    try:
        manifest = json.loads(text)
        is_sealed = text == _sealed({key: value for key, value in manifest.items() if key != "seal"})
    except (ValueError, AttributeError, RecursionError):
        is_sealed = False
    if not is_sealed:
        raise DamagedError(f"{folder / MANIFEST} is not as it was written")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{folder}: is a checkpoint of format {manifest['format']}, written by penchant "
            f"{manifest.get('versions', {}).get('penchant', 'unknown')}; this version reads format {FORMAT}: resume "
            "with that one."
        )
    if folder.name != f"step-{manifest['step']}":
        raise DamagedError(f"{folder} was written as step-{manifest['step']}, and bears another name now")
    for name, expected in manifest["files"].items():
        _check_file(folder / name, expected)
    return Checkpoint(folder, manifest["step"], manifest)


def newest_checkpoint(folder: Path, report: Report) -> Checkpoint | None:
    """The whole checkpoint with the most steps; None where none was ever written.

    Dates do not matter: clocks jump. One that is damaged is reported and the one before it taken.

    Raises:
        NothingToResumeError: all are damaged.
        UserError: the newest was written in a format that this version does not know.
    """
    faults = []
    for place in sorted(_places(folder), key=_step_of, reverse=True):
        try:
            checkpoint = read_checkpoint(place)
        except DamagedError as damage:
            faults.append(f"{place.name} is damaged: {damage}")
            report(f"checkpoint {faults[-1]}; it is passed over")
            continue
        return checkpoint
    if faults:
        raise NothingToResumeError(
            f"{folder}: no checkpoint is whole. {'; '.join(faults)}. Begin anew with --overwrite, or in another "
            "output_dir."
        )
    return None


def rotate(folder: Path, keep: int, best_step: int | None = None) -> None:
    """Lets all checkpoints go but the newest `keep` and that of `best_step`."""
    places = sorted(_places(folder), key=_step_of)
    for place in places[: -keep or None]:
        if _step_of(place) != best_step:
            remove_folder(place)


def remove_from(folder: Path, step: int) -> None:
    """Removes the checkpoints of later steps than `step`."""
    for place in _places(folder):
        if _step_of(place) > step:
            remove_folder(place)


class Writer:
    """Writes one checkpoint at a time, beside the training if asked to; none overtakes another."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._latest = math.inf

    def start(self, write: Callable[[], None], in_background: bool) -> None:
        """Begins to write, after the one before is done; what failed then is raised by `wait` or by the next start."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(write,), daemon=True)
        self._thread.start()
        if not in_background:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
            OSError: what the last write failed with.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def may_wait(self) -> bool:
        """Whether what is being written may wait for other processes."""
        return time.monotonic() < self._latest

    def hurry(self) -> None:
        """Has it wait for other processes for some seconds more: some of them may be gone."""
        self._latest = time.monotonic() + _SECONDS_TO_HURRY

    @property
    def is_busy(self) -> bool:
        """Whether something is being written."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:  # handed to the thread that waits
            self._failure = error


def _places(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]


def _step_of(place: Path) -> int:
    return int(place.name.removeprefix("step-"))


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise DamagedError(f"{path} has {size} bytes instead of {expected['bytes']}")
        if sha256_of(path) != expected["sha256"]:
            raise DamagedError(f"{path} is not as it was written (its sha256 differs)")
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({_reason(error)})") from None


def _sealed(manifest: dict[str, Any]) -> str:
    """The manifest as text, with its own hash as the last entry."""
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "seal": seal}, indent=1) + "\n"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__

"""The runs in some folders: found, looked at, and kept in touch with."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from penchant.dash.follow import FollowedMetrics
from penchant.dash.pairs import PairIndex
from penchant.disk import append_json_line, read_mapping
from penchant.errors import UserError
from penchant.locking import FILES as LOCK_FILES
from penchant.locking import is_asked_to_stop, is_being_worked_on
from penchant.report.figures import Number
from penchant.report.rundir import HELD_OUT, NOTES, RunRecord, clean, read_run
from penchant.report.series import Series, finite

_FILES = (
    *("run.yaml", "summary.json", "data.json", "metrics.jsonl", "events.jsonl", "samples.jsonl", "answers.jsonl"),
    *("pairs.jsonl", "completions.jsonl", NOTES),
)
"""The files of a run directory that pages show."""

_DEEPEST = 4
_END_BYTES = 1 << 16

LONGEST_NOTE = 4000
"""Characters."""


@dataclass
class Run:
    """One run directory. `name` is its place below the folder that was named, and its address on the page."""

    name: str
    path: Path
    root: Path
    """The folder that no link may lead out of."""
    metrics: FollowedMetrics = field(init=False)
    pairs: PairIndex = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = FollowedMetrics(self.path / "metrics.jsonl")
        self.pairs = PairIndex(self.path / "pairs.jsonl")

    def stray_link(self) -> str | None:
        """The file whose link leads out of the folder, if there is one: nothing of such a run is read or written."""
        for name in (*_FILES, *LOCK_FILES):
            path = self.path / name
            if not path.resolve().is_relative_to(self.root):
                return name
        return None

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return read_mapping(self.path / "summary.json")

    def state(self, summary: Mapping[str, Any] | None = None) -> str:
        """running, stopping, finished, interrupted, failed, killed, or new where nothing has been written yet."""
        status = (self.summary() if summary is None else summary).get("status")
        if status != "finished" and is_being_worked_on(self.path):
            return "stopping" if is_asked_to_stop(self.path) else "running"
        if status == "running":
            return "killed"
        return status if status in ("finished", "interrupted", "failed") else "new"

    def record(self) -> RunRecord:
        """What pages show; the metrics are those that were followed up to now, the judged examples are left out."""
        return read_run(self.path, self.metrics.series(), with_examples=False)

    def mark(self) -> tuple[Any, ...]:
        """Differs where anything of the run differs."""
        if self.stray_link() is not None:
            return ("refused",)
        return (self.state(), *(_mark(self.path / name) for name in _FILES))

    def latest(self) -> dict[str, Number]:
        """The last value of each measurement within the last lines of the log, without reading the others."""
        try:
            with (self.path / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _END_BYTES))
                lines = file.read(_END_BYTES).split(b"\n")
        except OSError:
            return {}
        found: dict[str, Number] = {}
        for line in lines:
            try:
                row = from_json(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                found |= {name: known for name, value in row.items() if (known := finite(value)) is not None}
        return found

    def add_note(self, text: str) -> None:
        """Keeps what somebody wrote, with the time and the step at which the run stands.

        Raises:
            UserError: it is empty or too long, or cannot be written.
        """
        text = clean(text.replace("\r\n", "\n")).strip()
        if not text or len(text) > LONGEST_NOTE:
            raise UserError(f"a note has 1 to {LONGEST_NOTE:,} characters; this one has {len(text):,}.")
        step = finite(self.summary().get("steps"))
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, "text": text}
        try:
            append_json_line(self.path / NOTES, record)
        except OSError as error:
            raise UserError(f"the note cannot be written ({error.strerror}).") from None


class Runs:
    """The runs below some folders, looked for again whenever they are asked for."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """
        Raises:
            UserError: a folder is not there.
        """
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"'{folder}' is no folder; name run directories or folders of them.")
        self._folders = list(dict.fromkeys(folder.resolve() for folder in folders))
        self._known: dict[Path, Run] = {}
        self._lock = threading.Lock()

    def find(self) -> dict[str, Run]:
        """All runs there are now, by name; one that was seen before is the same object."""
        found: dict[str, Run] = {}
        with self._lock:
            for folder in self._folders:
                for path in _run_dirs(folder):
                    if path not in self._known:
                        self._known[path] = Run(_free_name(folder, path, found), path, folder)
                    run = self._known[path]
                    found.setdefault(run.name, run)
        return found


def _run_dirs(folder: Path) -> list[Path]:
    """Folders with a run file, in the folder or some levels below; links are not followed."""
    found = []
    for place, folders, files in os.walk(folder):
        path = Path(place)
        if "run.yaml" in files:
            found.append(path)
            folders.clear()
        depth = len(path.relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < _DEEPEST else []
    return found


def _free_name(folder: Path, path: Path, taken: Mapping[str, Run]) -> str:
    name = "/".join((folder.name or "root", *path.relative_to(folder).parts))
    number = 1
    while (numbered := name if number == 1 else f"{name} ({number})") in taken:
        number += 1
    return numbered


def _mark(path: Path) -> tuple[int, int]:
    try:
        there = path.stat()
    except OSError:
        return (0, -1)
    return (there.st_mtime_ns, there.st_size)


def held_out_value(latest: Mapping[str, Number], names: Sequence[str]) -> Number | None:
    """The first of some held-out measurements that is known."""
    return next((latest[HELD_OUT + name] for name in names if HELD_OUT + name in latest), None)


def last_mean(series: Series, num: int = 20) -> Number | None:
    """The mean of the last values of a training curve, which is noisy."""
    values = [value for _, value in series.points[-num:] if value is not None]
    return sum(values) / len(values) if values else None

"""Files of records that are made chunk by chunk, and gone on with when whoever made them was stopped.

A chunk is appended in one write and forced to the disk. Whatever stops the process in between, the next one finds whole
chunks and perhaps a torn one behind them, which is cut off; and because chunks are always the same records, the file
comes out the same to the bit. What it is made with stands beside it, in PATH.settings.json, written before anything
else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from penchant.disk import make_folder, sync, write_json
from penchant.errors import UserError

Settings = dict[str, Any]
"""Name -> all that the records of a file depend on."""

Item = TypeVar("Item")


@dataclass
class GrowingFile:
    """A file that is being made. `num_done` of its `num_records` records are on the disk."""

    path: Path
    num_records: int
    chunk: int
    num_done: int = 0

    @classmethod
    def at(cls, path: Path, num_records: int, chunk: int) -> GrowingFile:
        """The file as it stands, or a new one; a chunk that is torn at its end is cut off."""
        if not path.exists():
            path.touch()
            sync(path.absolute().parent)
        file = cls(path, num_records, chunk)
        file.num_done = _keep_whole_chunks(file)
        return file

    def chunks(self, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        """What is still to be done: the items behind `num_done`, a chunk at a time."""
        for start in range(self.num_done, self.num_records, self.chunk):
            yield items[start : start + self.chunk]

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds a chunk; when this returns it is on the disk."""
        lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        with _explained(self.path), self.path.open("ab") as file:
            file.write(lines.encode(errors="backslashreplace"))  # half a surrogate pair becomes its JSON escape
            file.flush()
            os.fsync(file.fileno())
        self.num_done += len(records)


@contextmanager
def growing_file(
    path: Path, settings: Settings, num_records: int, chunk: int, overwrite: bool = False
) -> Iterator[GrowingFile]:
    """The file at `path`, new or with the whole chunks that an earlier process left; locked against others.

    A file that was begun keeps its size of chunks, whatever `chunk` says now.

    Raises:
        UserError: it was made with other settings or by somebody else, another process is at it, or the disk fails.
    """
    with _explained(path):
        make_folder(path.absolute().parent)
        if path.is_dir():
            raise UserError(f"{path}: is a folder; choose another --output.")
    with _locked(path):
        with _explained(path):
            if overwrite:
                path.unlink(missing_ok=True)
            file = _opened(path, settings, num_records, chunk)
        yield file


def _opened(path: Path, settings: Settings, num_records: int, chunk: int) -> GrowingFile:
    settings = json.loads(json.dumps(settings))  # as the side file gives them back
    if path.exists():
        begun = _begun(path)
        _refuse_changes(path, begun["settings"], settings)
        return GrowingFile.at(path, num_records, begun["chunk"])
    write_json(settings_path(path), {"settings": settings, "num_records": num_records, "chunk": chunk})
    return GrowingFile.at(path, num_records, chunk)


def settings_path(path: Path) -> Path:
    """Where it stands what a file is made with."""
    return path.with_name(f"{path.name}.settings.json")


def refuse_unfinished(path: Path) -> None:
    """Refuses to read a file that is not yet what it is to be; one without settings beside it is nobody's.

    Raises:
        UserError: records are missing.
    """
    if path.is_file() and settings_path(path).exists():
        num_records = _begun(path)["num_records"]
        with path.open("rb") as file:
            num_there = sum(line.endswith(b"\n") for line in file)
        if num_there < num_records:
            raise UserError(
                f"{path}: holds {num_there} of {num_records} records; give the command that makes it again, and it "
                "goes on."
            )


def _begun(path: Path) -> dict[str, Any]:
    """What stands in the side file."""
    beside = settings_path(path)
    if not beside.exists():
        raise UserError(
            f"{path}: is there already, and no {beside.name} says what it was made with; choose another --output, or "
            "give --overwrite."
        )
    try:
        begun = json.loads(beside.read_bytes())
    except ValueError:
        begun = None
    if not isinstance(begun, dict) or not {"settings", "num_records", "chunk"} <= begun.keys():
        raise UserError(f"{beside}: is damaged; choose another --output, or give --overwrite.")
    return begun


def _refuse_changes(path: Path, then: Settings, now: Settings) -> None:
    differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if differing:
        lines = [f"  {name}: {_shown(then.get(name))} then, {_shown(now.get(name))} now" for name in differing]
        raise UserError(
            f"{path}: was begun with other settings:\n"
            + "\n".join(lines)
            + "\nChoose another --output, or begin it anew with --overwrite."
        )


def _shown(value: Any) -> str:
    is_hash = isinstance(value, str) and len(value) == 64
    return f"sha256 {value[:12]}" if is_hash else json.dumps(value, ensure_ascii=False)


def _keep_whole_chunks(file: GrowingFile) -> int:
    """Cuts off what is behind the last whole chunk; how many records stay."""
    ends = [0]  # the bytes of the first n records
    with file.path.open("rb") as lines:
        for line in lines:
            if not _is_record(line):
                break
            ends.append(ends[-1] + len(line))
    num_whole = len(ends) - 1
    num_kept = num_whole if num_whole == file.num_records else num_whole // file.chunk * file.chunk
    if file.path.stat().st_size > ends[num_kept]:
        os.truncate(file.path, ends[num_kept])
        sync(file.path)
    return num_kept


def _is_record(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:  # what a loss of power made of it
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Within it no other process makes this file. The lock goes with the process, however that ends."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with _explained(path):
        try:
            lock.acquire(blocking=False)
        except Timeout:  # an OSError, too
            raise UserError(
                f"{path}: another process is making it; wait for that, or choose another --output."
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Within it a disk that is full, fails or refuses becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be read or written ({error.strerror or error}). Mend that and give the "
            "same command again: it goes on from the last whole chunk."
        ) from error

"""Files and folders that are there whole or not at all, whatever stops the machine meanwhile.

Everything is written beside its place under a hidden name, forced to the disk (fsync), and then renamed: a reader sees
the old, or nothing, or the new. A crash can leave hidden files behind; `remove_leftovers` clears them away.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_UNFINISHED = ".tmp-"


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A hidden file to fill. When the block has ended well it is forced to the disk and takes the place of `path`.

    When the block fails, what was there before stays and nothing is left behind.
    """
    unfinished = _hidden(path)
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all; half a surrogate pair, which no file can hold, is written as its escape."""
    with new_file(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes a JSON-lines file whole or not at all."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records))


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Adds one line to a JSON-lines file. A crash may leave half of it; `read_json_lines` passes over that."""
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file that may end in half a line; none where there is no such file."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # the line that was being written when the process died, or what a loss of power made of it
    return records


class GrowingLines:
    """The lines of a file that another process adds to, each given out once.

    Where the file was cut back or exchanged for another, which a resumed run does with its logs, reading begins anew.
    """

    _MOST_BYTES = 1 << 23
    _REMEMBERED = 64

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        """Up to where the file has been read, in bytes."""
        self.size = 0
        """How long it was at the last look."""
        self._inode, self._before, self._within_long_line = -1, b"", False

    def read(self) -> tuple[list[bytes], bool]:
        """The next whole lines, of at most 8 MiB together, and whether reading began anew; longer lines are left out.

        Nothing new is an empty list; so is a file that is not there (any more).
        """
        try:
            file = self.path.open("rb")
        except OSError:
            return [], self._begin_anew() if self.offset else False
        with file:
            there = os.fstat(file.fileno())
            file.seek(max(0, self.offset - len(self._before)))
            is_other = there.st_ino != self._inode or there.st_size < self.offset
            is_other = is_other or file.read(len(self._before)) != self._before
            began_anew = self._begin_anew() if is_other and self.offset else False
            self._inode, self.size = there.st_ino, there.st_size
            file.seek(self.offset)
            while (end := (chunk := file.read(self._MOST_BYTES)).rfind(b"\n") + 1) == 0 and len(chunk) > 0:
                if len(chunk) < self._MOST_BYTES:
                    return [], began_anew  # the end of the line is still to come
                self._pass(chunk)
                self._within_long_line = True
        lines = chunk[:end].split(b"\n")[:-1]
        self._pass(chunk[:end])
        if lines and self._within_long_line:
            del lines[0]
            self._within_long_line = False
        return lines, began_anew

    def _pass(self, read: bytes) -> None:
        self.offset += len(read)
        self._before = (self._before + read)[-self._REMEMBERED :]

    @property
    def share_read(self) -> float:
        """How much of the file has been read, from 0 to 1; a last line that is not whole yet does not count."""
        return self.offset / self.size if self.size else 1.0

    def _begin_anew(self) -> bool:
        self.offset, self._before, self._within_long_line = 0, b"", False
        return True


@dataclass(frozen=True)
class Part:
    """One of several processes that fill a folder together: its number, how many they are, and a word of theirs."""

    number: int = 0
    of: int = 1
    word: str = ""
    until: float = math.inf
    """How long the first one waits for the others, by `time.monotonic()`."""


ALONE = Part()
"""The only process."""


@contextmanager
def new_folder(folder: Path, part: Part = ALONE) -> Iterator[Path]:
    """A hidden folder to fill. When the block has ended well it is forced to the disk and becomes `folder`.

    A folder that was there before is replaced. When the block fails nothing is left behind. Of several processes that
    fill it together this is for the first, behind `begin_together`; the others `give_part`, and it does `take_parts`.
    """
    make_folder(folder.parent)
    unfinished = _hidden(folder, part.word)
    if part.of == 1:
        unfinished.mkdir()
    _refuse_missing(unfinished)
    try:
        with _system_errors():
            yield unfinished
        for path in sorted(unfinished.rglob("*"), reverse=True):  # what is in a folder before the folder
            sync(path)
        sync(unfinished)
        if folder.exists():
            remove_folder(folder)
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync(folder.parent)


def begin_together(folder: Path, word: str) -> None:
    """Makes the hidden folder that several processes will fill, before any of them begins: who fails takes it away."""
    make_folder(_hidden(folder, word))


def give_part(folder: Path, part: Part, fill: Callable[[Path], None]) -> None:
    """What all but the first of several processes do for a `new_folder`: each fills one of its own within.

    Where one of them fails the whole folder is taken away, so that the first one learns of it, on a full disk too.
    """
    together = _hidden(folder, part.word)
    unfinished = together / f".unfinished-{part.number}"
    _refuse_missing(together)
    try:
        make_folder(unfinished)
        with _system_errors():
            fill(unfinished)
        for path in unfinished.iterdir():
            sync(path)
        sync(unfinished)
        os.rename(unfinished, together / f".part-{part.number}")
    except BaseException:
        shutil.rmtree(together, ignore_errors=True)
        raise


def take_parts(unfinished: Path, part: Part, may_wait: Callable[[], bool] = lambda: True) -> None:
    """Waits for the parts of the other processes, and moves their files to those of the first.

    Raises:
        OSError: one of them failed, or it has been waited long enough, as `part` or `may_wait()` say.
    """
    for number in range(1, part.of):
        given = unfinished / f".part-{number}"
        while not given.exists():
            _refuse_missing(unfinished)
            if time.monotonic() > part.until or not may_wait():
                raise OSError(errno.ETIMEDOUT, f"process {number} has not written its part")
            time.sleep(0.01)
        for path in given.iterdir():
            os.rename(path, unfinished / path.name)
        given.rmdir()


def _refuse_missing(together: Path) -> None:
    if not together.exists():
        raise OSError(errno.EIO, "another process could not write its part")


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it that are missing, so that they outlive a loss of power."""
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder so that nobody ever sees half of it."""
    hidden = _hidden(folder)
    os.rename(folder, hidden)
    sync(folder.parent)
    shutil.rmtree(hidden, ignore_errors=True)  # nobody sees it any more; what stays goes with the leftovers


def remove_leftovers(folder: Path) -> None:
    """Removes what crashes left in `folder`, and in the folders within. Only for the one process that writes there."""
    for path in sorted(folder.rglob(f".*{_UNFINISHED}*")):  # a folder before what is in it
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether it has the name of something that was never finished."""
    return path.match(f".*{_UNFINISHED}*")


def sync(path: Path) -> None:
    """Forces a file, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Bytes that may still be written at `path`, which need not exist yet."""
    there = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
    return shutil.disk_usage(there).free


@contextmanager
def _system_errors() -> Iterator[None]:
    """Within it, what libraries written in Rust say of the disk, `... (os error 28)`, becomes the OSError it is."""
    try:
        yield
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        if told is None:
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1]))) from error


def _hidden(path: Path, word: str = "") -> Path:
    return path.with_name(f".{path.name}{_UNFINISHED}{word or uuid.uuid4().hex[:8]}")

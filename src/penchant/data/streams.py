"""Bytes of data files: unpacked on the way, refused where the name and the content disagree, cut into bounded lines."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader, RawIOBase
from pathlib import Path
from typing import Any

from penchant.errors import UserError

EXTENSIONS = (
    *(kind + packing for kind in (".jsonl", ".json", ".csv", ".tsv") for packing in ("", ".gz", ".zst")),
    ".parquet",
)
"""What the name of a data file may end in, upper or lower case."""

LISTED_EXTENSIONS = ".jsonl, .json, .csv, .tsv (each also with .gz or .zst) or .parquet"
"""The same in words."""

ROW_LIMIT = 10_000_000
"""Bytes of a line at which it is no longer read."""

BOM = b"\xef\xbb\xbf"

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_CHUNK = 512  # packed bytes at a time: even hostile ones unpack to some megabytes at most
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "parquet",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
}
_ENDINGS = {".gz": "gzip", ".zst": "zstd", ".parquet": "parquet"}


@dataclass(frozen=True)
class Unreadable:
    """Stands where a row should be: `reason` says why there is none and what to do, `code` is one of `CHECKS`."""

    reason: str
    code: str = "D01"


def extension_of(file: Path) -> str | None:
    """Which of `EXTENSIONS` a file has, if any."""
    return next((extension for extension in EXTENSIONS if file.name.lower().endswith(extension)), None)


def open_unpacked(file: Path) -> BufferedIOBase:
    """The content of a file, unpacked where its name ends in .gz or .zst.

    Raises:
        UserError: the file is empty, or its content is of another kind than its name says.
    """
    expected = _check_kind(file)
    if expected == "gzip":
        return gzip.open(file, "rb")
    if expected == "zstd":
        return BufferedReader(_ZstdStream(file), buffer_size=1 << 17)
    return file.open("rb")


def bounded_lines(file: Path, stream: BufferedIOBase) -> Iterator[tuple[int, bytes | None]]:
    """The lines with their numbers from 1; None for one of `ROW_LIMIT` bytes or more.

    Lines end at "\\n" alone: `str.splitlines` would also split at U+2028, which is legal inside a JSON string.
    """
    number = 0
    while line := stream.readline(ROW_LIMIT):
        number += 1
        if number == 1:
            if line.startswith(_UTF_16):
                raise UserError(f"{file}: is UTF-16 text; save the file as UTF-8")
            line = line.removeprefix(BOM)
        if len(line) == ROW_LIMIT:
            while line and not line.endswith(b"\n"):
                line = stream.readline(ROW_LIMIT)
            yield number, None
        else:
            yield number, line


def needs_extra(package: str, file: Path) -> UserError:
    """The error where a file needs a package that is not installed."""
    return UserError(f"{file}: reading it needs {package}; install it with: pip install 'penchant[data]'")


def _check_kind(file: Path) -> str | None:
    """What the name says that the content is: gzip, zstd, parquet, or None for text."""
    with file.open("rb") as stream:
        start = stream.read(max(map(len, _MAGIC)))
    if not start:
        raise UserError(f"{file}: the file is empty; write or fetch it again")
    ending = file.suffix.lower()
    expected = _ENDINGS.get(ending)
    found = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
    if found == expected:
        return expected
    if found is None:
        raise UserError(f"{file}: is not {expected} data although its name ends in {ending}; rename or repack it")
    right_ending = next((ending for ending, kind in _ENDINGS.items() if kind == found), None)
    if right_ending is None:
        raise UserError(f"{file}: is {found} data; unpack it first")
    stem = file.name if expected is None and found != "parquet" else file.stem
    raise UserError(f"{file}: is {found} data; rename it to {stem}{right_ending}")


class _ZstdStream(RawIOBase):
    """A zstd file as raw bytes; unlike the package's own stream it notices that the end is missing.

    Raises:
        EOFError: the data are cut off or damaged.
    """

    def __init__(self, file: Path) -> None:
        self._packed = file.open("rb")
        try:
            import zstandard
        except ImportError:
            raise needs_extra("zstandard", file) from None
        self._fault = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None  # the one that is being read: a file may hold several
        self._rest = b""  # packed bytes behind the end of a frame
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._packed.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            packed = self._rest or self._packed.read(_CHUNK)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._unpack(packed)
        size = min(len(buffer), len(self._unpacked))
        buffer[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size

    def _unpack(self, packed: bytes) -> None:
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            self._unpacked = memoryview(self._frame.decompress(packed))
        except self._fault as fault:
            raise EOFError(str(fault)) from fault
        self._rest = self._frame.unused_data
        if self._frame.eof:
            self._frame = None

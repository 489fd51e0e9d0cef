"""Files of rows: .json and .jsonl, plain or gzipped, read row by row with a name for each."""

from __future__ import annotations

import difflib
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from penchant.errors import UserError

EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
"""What the name of a data file may end in, upper or lower case."""

_BOM = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"
# Numbers of 5000 digits and brackets nested 1000 deep are no JSONDecodeError, yet as unusable.
_JSON_FAULTS = (ValueError, RecursionError)


@dataclass(frozen=True)
class Unreadable:
    """Stands where a row should be: the line is not JSON, and `reason` says why and what to do."""

    reason: str


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file, each behind its source: `path:line` for lines, `path row N` (from 1) for an array.

    A line that is not JSON comes as `Unreadable`, and reading goes on. Lines stream: one in memory at a time.

    Raises:
        UserError: a fault of the whole file; the message names the file and the mend. Faults in the middle
            (an end cut off, bytes that are not UTF-8) are raised when the reading gets there.
    """
    file = Path(path)
    try:
        _require_file(file)
        extension = _extension(file)
        with _open(file, gzipped=extension.endswith(".gz")) as stream:
            if extension.startswith(".jsonl"):
                yield from _read_lines(file, stream)
            else:
                yield from _read_array(file, stream)
    except gzip.BadGzipFile as fault:
        raise UserError(f"{file}: is not gzip data although its name ends in .gz; rename or repack it") from fault
    except (EOFError, zlib.error) as fault:
        raise UserError(f"{file}: the gzip data is cut off or damaged; fetch or pack the file again") from fault
    except OSError as fault:
        raise UserError(f"{file}: cannot be read ({fault.strerror or fault}); check the file and its rights") from fault


def _extension(file: Path) -> str:
    name = file.name.lower()
    for extension in EXTENSIONS:
        if name.endswith(extension):
            return extension
    raise UserError(f"{file}: files of this kind are not read; convert it to one of {', '.join(EXTENSIONS)}")


def _require_file(file: Path) -> None:
    if file.is_dir():
        raise UserError(f"{file}: is a directory; name one file in it ({', '.join(EXTENSIONS)})")
    if file.exists():
        return
    if not file.parent.is_dir():
        raise UserError(f"{file}: there is no such file, and no folder {file.parent} either; check the path")
    nearest = difflib.get_close_matches(file.name, [entry.name for entry in file.parent.iterdir()], n=1)
    mend = f"did you mean {file.parent / nearest[0]}?" if nearest else "check the path"
    raise UserError(f"{file}: there is no such file; {mend}")


def _open(file: Path, gzipped: bool) -> BufferedIOBase:
    with file.open("rb") as stream:
        magic = stream.read(len(_GZIP_MAGIC))
    if not magic:
        raise UserError(f"{file}: the file is empty; write or fetch it again")
    if gzipped:
        return gzip.open(file, "rb")
    if magic == _GZIP_MAGIC:
        raise UserError(f"{file}: is gzip data; rename it to {file.name}.gz")
    return file.open("rb")


def _read_lines(file: Path, stream: BufferedIOBase) -> Iterator[tuple[str, Any]]:
    num_rows = 0
    # Bytes are split at "\n" alone: `str.splitlines` would also split at U+2028, legal inside a JSON string.
    for number, raw in enumerate(stream, start=1):
        line = raw.removeprefix(_BOM) if number == 1 else raw
        if not line.strip():
            continue
        if num_rows == 0 and line.strip() == b"[":
            raise UserError(f"{file}: holds one JSON array, not a row per line; rename it to end in .json")
        num_rows += 1
        yield f"{file}:{number}", _parse_line(_decode(file, line, first_line=number))
    if num_rows == 0:
        raise UserError(f"{file}: holds no row; write one JSON object per line")


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as fault:
        if fault.pos >= len(line.rstrip()) or fault.msg.startswith("Unterminated string"):
            return Unreadable("the line ends in the middle of a JSON object; write it again in full, or delete it")
        return Unreadable(f"the line is not JSON ({fault.msg} at column {fault.colno}); mend or delete it")
    except _JSON_FAULTS as fault:
        return Unreadable(f"the line is not usable JSON ({type(fault).__name__}); mend or delete it")


def _read_array(file: Path, stream: BufferedIOBase) -> Iterator[tuple[str, Any]]:
    text = _decode(file, stream.read().removeprefix(_BOM), first_line=1)
    if not text.strip():
        raise UserError(f"{file}: the file is empty; write or fetch it again")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as fault:
        if fault.msg == "Extra data":
            raise UserError(
                f"{file}: line {fault.lineno} goes on after the first JSON value; if it holds a row per line,"
                " rename it to end in .jsonl"
            ) from fault
        raise UserError(f"{file}: is not JSON ({fault.msg} in line {fault.lineno}, column {fault.colno})") from fault
    except _JSON_FAULTS as fault:
        raise UserError(f"{file}: is not usable JSON ({type(fault).__name__}); write it again") from fault
    rows = _array_of(file, value)
    if not rows:
        raise UserError(f"{file}: holds no row, its array is empty; write or fetch it again")
    for number, row in enumerate(rows, start=1):
        yield f"{file} row {number}", row


def _array_of(file: Path, value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds neither an array of rows nor an object with one; write [{{...}}, ...]")
    if "chosen" in value or "rejected" in value:
        raise UserError(f"{file}: holds a single row; put it into an array, [{{...}}], or name the file .jsonl")
    arrays = [entry for entry in value.values() if isinstance(entry, list)]
    if len(arrays) != 1:
        raise UserError(
            f"{file}: holds an object with {len(arrays)} arrays, so which one holds the rows is unclear;"
            " leave the one array of rows in it"
        )
    return arrays[0]


def _decode(file: Path, raw: bytes, first_line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as fault:
        line = first_line + raw.count(b"\n", 0, fault.start)
        raise UserError(f"{file}: line {line} is not UTF-8 text; save the file as UTF-8") from fault

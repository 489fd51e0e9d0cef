"""Rows of JSON: one a line, or all in one array."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from penchant.data.streams import BOM, ROW_LIMIT, Unreadable, bounded_lines
from penchant.errors import UserError

# Numbers of 5000 digits and brackets nested 1000 deep are no JSONDecodeError, yet as unusable.
_FAULTS = (ValueError, RecursionError)


def read_lines(file: Path, stream: BufferedIOBase) -> Iterator[tuple[str, Any]]:
    """The rows of JSON lines, each behind `path:line`; one is in memory at a time.

    Raises:
        UserError: there is no row, or all rows stand in one array.
    """
    num_rows = 0
    for number, line in bounded_lines(file, stream):
        if line is None:
            row: Any = Unreadable(
                f"the line has {ROW_LIMIT // 10**6} MB or more; cut it into rows, or delete it", "D28"
            )
        elif not line.strip():
            continue
        elif num_rows == 0 and line.strip() == b"[":
            raise UserError(f"{file}: holds one JSON array, not a row per line; rename it to end in .json")
        else:
            row = _parse_line(line)
        num_rows += 1
        yield f"{file}:{number}", row
    if num_rows == 0:
        raise UserError(f"{file}: holds no row; write one JSON object per line")


def read_array(file: Path, stream: BufferedIOBase) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON array, each behind `path row N` (from 1); the whole file is in memory.

    Raises:
        UserError: the file is not JSON, or holds no array of rows.
    """
    text = _decode(file, stream.read().removeprefix(BOM))
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
        raise UserError(
            f"{file}: is not JSON ({fault.msg} in line {fault.lineno}, column {fault.colno}); mend it there"
        ) from fault
    except _FAULTS as fault:
        raise UserError(f"{file}: is not usable JSON ({type(fault).__name__}); write it again") from fault
    rows = _array_of(file, value)
    if not rows:
        raise UserError(f"{file}: holds no row, its array is empty; write or fetch it again")
    for number, row in enumerate(rows, start=1):
        yield f"{file} row {number}", row


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as fault:
        return Unreadable(f"byte {fault.start + 1} of the line is not UTF-8 text; save the file as UTF-8")
    except json.JSONDecodeError as fault:
        if fault.pos >= len(fault.doc.rstrip()) or fault.msg.startswith("Unterminated string"):
            return Unreadable("the line ends in the middle of a JSON object; write it again in full, or delete it")
        return Unreadable(f"the line is not JSON ({fault.msg} at column {fault.colno}); mend or delete it")
    except _FAULTS as fault:
        return Unreadable(f"the line is not usable JSON ({type(fault).__name__}); mend or delete it")


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


def _decode(file: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as fault:
        line = 1 + raw.count(b"\n", 0, fault.start)
        raise UserError(f"{file}: line {line} is not UTF-8 text; save the file as UTF-8") from fault

"""Rows of tables: CSV and parquet.

A table has a value in every column, so null stands for nothing. CSV has no types: text that is a JSON list or object is
read as such, the columns of numbers as numbers, and everything else stays text.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from penchant.data.columns import NUMBERS
from penchant.data.streams import ROW_LIMIT, Unreadable, bounded_lines, needs_extra
from penchant.errors import UserError

_BATCH_ROWS = 256
_PYTHON_MESSAGES = re.compile(r"\[?\s*\{\s*'(role|content|from|value)':")
"""How pandas writes lists of messages to CSV: as Python shows them, which is not JSON."""


def read_separated(file: Path, stream: BufferedIOBase, separator: str) -> Iterator[tuple[str, Any]]:
    """The rows of a table in text, each behind `path:line`, the line in which it begins.

    Raises:
        UserError: no row, no usable header, a line that is not UTF-8 or far too long.
    """
    csv.field_size_limit(ROW_LIMIT)
    reader = csv.reader(_text_lines(file, stream), delimiter=separator, strict=True)
    header = _header(file, reader)
    num_rows = 0
    while True:
        source = f"{file}:{reader.line_num + 1}"
        try:
            values = next(reader)
        except StopIteration:
            break
        except csv.Error as fault:
            row: Any = Unreadable(f"the row is not CSV ({fault}); mend its quotes, or delete it")
        else:
            if not values:
                continue  # a blank line
            row = _row(header, values)
        num_rows += 1
        yield source, row
    if num_rows == 0:
        raise UserError(f"{file}: holds no row below its header; write or fetch it again")


def read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a parquet file, each behind `path row N` (from 1); a batch is in memory at a time.

    Raises:
        UserError: pyarrow is not installed, the file is damaged, or holds no row.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise needs_extra("pyarrow", file) from None
    num_rows = 0
    try:
        # Buffered ahead, what was read would stay in memory to the end.
        with parquet.ParquetFile(file, pre_buffer=False) as table:
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    num_rows += 1
                    yield f"{file} row {num_rows}", row
    except (pyarrow.ArrowException, OSError) as fault:
        raise UserError(f"{file}: the parquet data are cut off or damaged; fetch the file again") from fault
    if num_rows == 0:
        raise UserError(f"{file}: holds no row; write or fetch it again")


def _text_lines(file: Path, stream: BufferedIOBase) -> Iterator[str]:
    for number, line in bounded_lines(file, stream):
        if line is None:
            raise UserError(f"{file}: line {number} has {ROW_LIMIT // 10**6} MB or more; check the line breaks")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as fault:
            raise UserError(f"{file}: line {number} is not UTF-8 text; save the file as UTF-8") from fault


def _header(file: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next((values for values in reader if values), [])
    except csv.Error as fault:
        raise UserError(f"{file}: the header is not CSV ({fault}); mend its quotes") from fault
    names = [name.strip() for name in header]
    if not any(names):
        raise UserError(f"{file}: holds no row; begin with a line of column names, as prompt, chosen, rejected")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{file}: two columns are called '{twice}'; rename one of them")
    return names


def _row(header: list[str], values: list[str]) -> dict[str, Any] | Unreadable:
    if len(values) != len(header):
        return Unreadable(
            f"the row has {len(values)} of {len(header)} columns; mend its separators and quotes, or delete it"
        )
    row = {}
    for name, text in zip(header, values, strict=True):
        if _PYTHON_MESSAGES.match(text):
            return Unreadable(f"{name} is a list as Python shows it, not JSON; write the file as JSON lines", "D04")
        row[name] = _number(text) if name in NUMBERS else _parsed(text)
    return row


def _parsed(text: str) -> Any:
    """A JSON list or object, or else the text."""
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _number(text: str) -> Any:
    """A number, true or false, null for an empty field; what `_parsed` makes of it where it is none of these."""
    word = text.strip().lower()
    if word in ("", "true", "false"):
        return {"": None, "true": True, "false": False}[word]
    try:
        return float(word)
    except ValueError:
        return _parsed(text)

"""Rows of preference data become examples, each row on its own.

The shapes of rows are in `families`. A row that cannot train is never an exception: it becomes a `RowProblem` and its
neighbours are read on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.data.families import Family, family_named, family_of
from penchant.data.files import read_rows
from penchant.data.messages import RefusedError, Row, kind_of
from penchant.data.streams import Unreadable
from penchant.examples import Example

CHECKS: dict[str, str] = {
    "D01": "no JSON object, or a damaged row",
    "D02": "the prompt or a completion is missing",
    "D03": "keys of no known row family",
    "D04": "a field of the wrong type",
    "D05": "two completions are identical",
    "D06": "a completion is empty",
    "D07": "the prompt is empty",
    "D08": "a message without a known role or without content",
    "D09": "the prompt ends with an assistant turn",
    "D10": "a completion does not begin with an assistant turn",
    "D11": "a completion does not end with an assistant turn",
    "D12": "a NUL or half a surrogate pair in the text",
    "D13": "one completion without a label",
    "D14": "a prompt without completions",
    "D15": "where the prompt ends is not clear",
    "D16": "the prompts of the completions differ",
    "D17": "a message part that is not text",
    "D18": "a label that is neither true nor false",
    "D19": "which of the completions is better is not known",
    "D20": "a list of fewer than two completions",
    "D21": "a completion without a score or rank of its own",
    "D22": "a score, rank or margin that is not a finite number",
    "D23": "two completions of the same rank",
    "D24": "a weight that is not a finite number above 0",
    "D25": "rejected scored higher than chosen",
    "D26": "a win probability missing or outside [0, 1]",
    "D27": "tools or tool calls, which are not trained",
    "D28": "a line of 10 MB or more",
    "D29": "whether a completion is finished is not told as true or false, one for each",
}
"""Code of a row problem -> the reason in a few words, for counts by reason.

D13 comes from training alone: a row without a label can be read, yet some methods need one.
"""


@dataclass(frozen=True)
class RowProblem:
    """One row that cannot train: `code` names the check, `source` the row, `message` what is wrong and the mend."""

    code: str
    source: str
    message: str

    def __str__(self) -> str:
        return f"{self.source}: [{self.code}] {self.message}"


@dataclass(frozen=True)
class ExampleData:
    """What a file held: its examples and its problems in the order of the rows; each row is one or the other.

    `families` counts the rows by recognised family, problems included, the most frequent first.
    """

    examples: list[Example]
    problems: list[RowProblem]
    families: dict[str, int]
    rows_read: int | None = None
    """How many rows these came from, where examples were made of others and no longer are one to a row."""

    @property
    def num_rows(self) -> int:
        """Rows read, good and bad."""
        return len(self.examples) + len(self.problems) if self.rows_read is None else self.rows_read


def stream_examples(path: str | Path, family: str | None = None) -> Iterator[tuple[str, Example | RowProblem]]:
    """The rows of data files one at a time, as `stream_rows` gives them.

    Args:
        path: a file, a directory of files, a pattern, or a dataset of the hub.
        family: the row family to read every row as; without it each row's own is recognised.

    Raises:
        UserError: there is no such family, at once; a file as a whole cannot be read, when the reading gets there.
    """
    return _stream(read_rows(path), family_named(family) if family else None)


def stream_rows(
    rows: Iterable[Any], name: str = "rows", family: str | None = None
) -> Iterator[tuple[str, Example | RowProblem]]:
    """Of each row in memory its family's name, empty where none is recognised, and its example or its problem.

    The source of the first row is `rows[0]`.

    Raises:
        UserError: there is no such family.
    """
    return _stream(with_sources(rows, name), family_named(family) if family else None)


def read_examples(path: str | Path, family: str | None = None) -> ExampleData:
    """The examples of data files; the arguments are those of `stream_examples`.

    Raises:
        UserError: a file as a whole cannot be read; bad single rows become problems instead.
    """
    return _collect(stream_examples(path, family))


def examples_from_rows(rows: Iterable[Any], name: str = "rows", family: str | None = None) -> ExampleData:
    """The examples of rows in memory; the arguments are those of `stream_rows`."""
    return _collect(stream_rows(rows, name, family))


def with_sources(rows: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    """Rows in memory, each behind what messages call it: the first is `name[0]`."""
    return ((f"{name}[{index}]", row) for index, row in enumerate(rows))


def fields_of(row: Any) -> Row:
    """What is filled: in tables every row has all columns, so null stands for nothing.

    Raises:
        RefusedError: the row could not be read, or is no object.
    """
    if isinstance(row, Unreadable):
        raise RefusedError(row.code, row.reason)
    if not isinstance(row, Mapping):
        raise RefusedError("D01", f"the row is {kind_of(row)}; write one JSON object with named fields")
    return {key: value for key, value in row.items() if value is not None}


def _stream(rows: Iterable[tuple[str, Any]], forced: Family | None) -> Iterator[tuple[str, Example | RowProblem]]:
    for source, row in rows:
        name = ""
        try:
            fields = fields_of(row)
            family = forced or family_of(fields)
            name = family.name
            found: Example | RowProblem = family.build(fields, family.read(fields), source)
        except RefusedError as refused:
            found = RowProblem(refused.code, source, str(refused))
        yield name, found


def _collect(stream: Iterable[tuple[str, Example | RowProblem]]) -> ExampleData:
    examples: list[Example] = []
    problems: list[RowProblem] = []
    families: Counter[str] = Counter()
    for family, found in stream:
        if family:
            families[family] += 1
        if isinstance(found, RowProblem):
            problems.append(found)
        else:
            examples.append(found)
    return ExampleData(examples, problems, dict(families.most_common()))

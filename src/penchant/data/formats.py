"""Rows of preference data become examples, each row on its own.

The shapes of rows are in `families`. A row that cannot train is never an exception: it becomes a `RowProblem` and its
neighbours are read on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.data.families import family_of
from penchant.data.files import Unreadable, read_rows
from penchant.data.messages import RefusedError, kind_of
from penchant.types import Example

CHECKS: dict[str, str] = {
    "D01": "not a JSON object",
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


def read_examples(path: str | Path) -> ExampleData:
    """The examples of a .json or .jsonl file, plain or .gz.

    Raises:
        UserError: the file as a whole cannot be read; bad single rows become problems instead.
    """
    return _collect(read_rows(path))


def examples_from_rows(rows: Iterable[Any], name: str = "rows") -> ExampleData:
    """The examples of rows in memory; the source of the first is `rows[0]`."""
    return _collect((f"{name}[{index}]", row) for index, row in enumerate(rows))


def _collect(rows: Iterable[tuple[str, Any]]) -> ExampleData:
    examples: list[Example] = []
    problems: list[RowProblem] = []
    families: Counter[str] = Counter()
    for source, row in rows:
        try:
            if isinstance(row, Unreadable):
                raise RefusedError("D01", row.reason)
            if not isinstance(row, Mapping):
                raise RefusedError("D01", f"the row is {kind_of(row)}; write one JSON object with named fields")
            family = family_of(row)
            families[family.name] += 1
            examples.append(family.build(row, family.read(row), source))
        except RefusedError as refused:
            problems.append(RowProblem(refused.code, source, str(refused)))
    return ExampleData(examples, problems, dict(families.most_common()))

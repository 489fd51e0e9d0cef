"""A data file read from end to end for the doctor, one row in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from penchant.data.chat import PLAIN_CHAT_TEMPLATE, TOKEN_CHECKS, tokenize_examples
from penchant.data.formats import CHECKS, RowProblem, stream_examples
from penchant.doctor.findings import SOUND, Finding, finding, worst_first
from penchant.doctor.scan import DataScan
from penchant.doctor.tokens import TokenChecks
from penchant.errors import UserError

MAX_NAMED = 5
"""How many rows are named for each reason."""


@dataclass
class Reader:
    """How rows become tokens: a tokenizer and the length limit. Where it lacks a chat template, a plain one is set."""

    tokenizer: Any
    max_length: int
    lacks_template: bool = False

    def __post_init__(self) -> None:
        if self.tokenizer.chat_template is None:
            self.lacks_template = True
            self.tokenizer.chat_template = PLAIN_CHAT_TEMPLATE


@dataclass
class Checkup:
    """What one pass over a data file found."""

    path: str
    scan: DataScan
    num_rows: int = 0
    families: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    """Code of a reason -> rows that cannot be used for it."""
    named: dict[str, list[str]] = field(default_factory=dict)
    """Code of a reason -> the first of these rows, with what is wrong."""
    template_is_missing: bool = False
    """Whether rows are messages and the tokenizer has no chat template."""

    @property
    def num_bad(self) -> int:
        """Rows that are faulty, those that merely do not fit not counted."""
        return sum(count for code, count in self.problems.items() if code not in SOUND)

    def findings(self) -> list[Finding]:
        """What the doctor says of the file by itself, the worst first."""
        found = self.scan.findings(self.num_rows, label_weights=(1.0, 1.0))
        if self.template_is_missing:
            found.append(finding("no-template", "warn", "the rows are messages and the tokenizer has no chat template"))
        return worst_first(found)

    def take_down(self, problem: RowProblem) -> None:
        """Counts a row that cannot be used."""
        self.scan.add_problem(problem)
        self.problems[problem.code] += 1
        if self.problems[problem.code] <= MAX_NAMED:
            self.named.setdefault(problem.code, []).append(str(problem))


def check_file(
    path: str,
    reader: Reader | None = None,
    advance: Callable[[int], None] = lambda rows: None,
    data_family: str | None = None,
) -> Checkup:
    """Reads a file to its end; with a `reader` its rows are tokenised as they are in training.

    Raises:
        UserError: the file as a whole cannot be read, or holds no usable row.
    """
    token_checks = TokenChecks(reader.tokenizer, reader.max_length) if reader else None
    checkup = Checkup(path, DataScan(token_checks))
    for family, found in stream_examples(path, data_family):
        checkup.num_rows += 1
        checkup.families[family or "unknown"] += 1
        if isinstance(found, RowProblem):
            checkup.take_down(found)
        elif reader is None:
            checkup.scan.add(found)
        else:
            checkup.template_is_missing |= reader.lacks_template and not isinstance(found.prompt, str)
            data = tokenize_examples([found], reader.tokenizer, reader.max_length)
            for problem in data.problems:
                checkup.take_down(problem)
            for tokens in data.examples:
                checkup.scan.add(found, tokens)
        advance(1)
    if not len(checkup.scan):
        first = next(iter(checkup.named.values()))[0]
        raise UserError(f"{path}: none of its {checkup.num_rows} rows can be used; the first: {first}")
    return checkup


def reason_of(code: str) -> str:
    """Why rows with this code cannot be used, in a few words."""
    return (CHECKS | TOKEN_CHECKS)[code]

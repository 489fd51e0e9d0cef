"""Prompts that completions are to be sampled for, from rows of any shape."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.data.families import family_named, prompt_of
from penchant.data.files import read_rows
from penchant.data.formats import RowProblem, fields_of, with_sources
from penchant.data.messages import RefusedError
from penchant.data.units import key_of
from penchant.examples import Prompt


@dataclass(frozen=True)
class PromptData:
    """What rows held: each gave a prompt, repeated an earlier one, or has a problem."""

    prompts: list[Prompt]
    """In the order of the rows, each once."""
    problems: list[RowProblem]
    num_rows: int
    num_repeated: int


def read_prompts(source: str | Path | Iterable[Any], name: str = "data", family: str | None = None) -> PromptData:
    """The prompts of data files or of rows in memory.

    Rows of preferences give theirs, and so do rows with a prompt alone: a prompt (or instruction, question, input), or
    a conversation, whose last answer is left out. The completions need not be fit for training.

    Args:
        source: a file, a directory of files, a pattern, a dataset of the hub, or the rows themselves.
        name: what messages call the rows in memory.
        family: the row family to read every row as; without it each row's own is recognised.

    Raises:
        UserError: there is no such family, or a file as a whole cannot be read.
    """
    forced = family_named(family) if family else None
    prompts: dict[Hashable, Prompt] = {}
    problems: list[RowProblem] = []
    num_rows = 0
    for place, row in read_rows(source) if isinstance(source, str | Path) else with_sources(source, name):
        num_rows += 1
        try:
            fields = fields_of(row)
            text = prompt_of(fields, forced)
        except RefusedError as refused:
            problems.append(RowProblem(refused.code, place, str(refused)))
            continue
        prompts.setdefault(key_of(text), Prompt(text, place, fields))
    return PromptData(list(prompts.values()), problems, num_rows, num_rows - len(problems) - len(prompts))

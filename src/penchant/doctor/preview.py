"""Rows as the model sees them: which tokens are trained on, and what the length limit takes away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from penchant.data.chat import encode, tokenize_examples
from penchant.data.formats import RowProblem, stream_examples
from penchant.doctor.checkup import Reader
from penchant.examples import Example, Pair, Unpaired


@dataclass(frozen=True)
class Completion:
    """A completion as it is trained on: the ids within max_length, and how many more there were."""

    name: str
    ids: Sequence[int]
    num_cut: int


@dataclass(frozen=True)
class PreviewedRow:
    """One row: the prompt's tokens, which are read only, and the completions', which are trained on."""

    source: str
    prompt_ids: Sequence[int]
    completions: Sequence[Completion]


def preview_rows(path: str, reader: Reader, data_family: str | None = None) -> Iterator[PreviewedRow | RowProblem]:
    """The rows of a file one by one, or why one cannot be used.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    for _, found in stream_examples(path, data_family):
        yield found if isinstance(found, RowProblem) else _previewed(found, reader)


def _previewed(example: Example, reader: Reader) -> PreviewedRow | RowProblem:
    data = tokenize_examples([example], reader.tokenizer, reader.max_length)
    if data.problems:
        return data.problems[0]
    tokens = data.examples[0]
    _, whole = encode(reader.tokenizer, example.prompt, example.completions, example.finished)
    completions = [
        Completion(name, ids, len(all_ids) - len(ids))
        for name, ids, all_ids in zip(names_of(example), tokens.completion_ids, whole, strict=True)
    ]
    return PreviewedRow(example.source, tokens.prompt_ids, completions)


def names_of(example: Example) -> list[str]:
    """What the completions of an example are called."""
    if isinstance(example, Pair):
        return ["chosen", "rejected"]
    if isinstance(example, Unpaired):
        return [{True: "desirable", False: "undesirable", None: "completion"}[example.is_desirable]]
    return [f"rank {place}" for place in range(1, len(example.completions) + 1)]


def as_dict(row: PreviewedRow | RowProblem, tokenizer: Any) -> dict[str, Any]:
    """A row as JSON tells it: every token with its text, and whether it is trained on."""
    if isinstance(row, RowProblem):
        return {"source": row.source, "problem": str(row)}

    def listed(ids: Sequence[int], is_trained: bool) -> list[dict[str, Any]]:
        return [{"id": index, "text": tokenizer.decode([index]), "trained": is_trained} for index in ids]

    return {
        "source": row.source,
        "prompt": listed(row.prompt_ids, False),
        "completions": [
            {"name": one.name, "tokens": listed(one.ids, True), "cut": one.num_cut} for one in row.completions
        ],
    }

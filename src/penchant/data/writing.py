"""Examples written back as rows, in the shapes that other programs read.

trl        prompt, chosen, rejected; or prompt, completion, label
sharegpt   conversations, chosen, rejected; or conversations with kto_tag (LLaMA-Factory)
openai     input with messages, preferred_output, non_preferred_output (also Together, Fireworks, Azure)

The optional columns stand beside these where an example has them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from penchant.data.columns import FINISHED
from penchant.data.formats import RowProblem, stream_rows
from penchant.disk import new_file
from penchant.errors import UserError, nearest
from penchant.examples import Example, Message, Pair, Text, Unpaired, has_answers

WRITTEN = ("trl", "sharegpt", "openai")
"""The row families that can be written."""

_SHAREGPT_NAMES = {"user": "human", "assistant": "gpt", "tool": "observation"}


def write_rows(examples: Iterable[Example], path: str | Path, family: str) -> int:
    """Writes examples as rows of one of `WRITTEN` into a .jsonl or .jsonl.gz file; returns how many.

    Every row is read before it is written and must give the same example again (`source` aside, which names the row).
    The file is there whole or not at all.

    Raises:
        UserError: no such family, another kind of file, no right to write, or an example that the family cannot hold.
    """
    if family not in WRITTEN:
        raise UserError(
            f"rows cannot be written as '{family}'{nearest(family, WRITTEN)}; there are {', '.join(WRITTEN)}"
        )
    file = Path(path)
    if not file.name.lower().endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{file}: rows are written to files that end in .jsonl or .jsonl.gz; choose such a name")
    num_rows = 0
    with _new_file(file) as stream:
        for num_rows, example in enumerate(examples, start=1):
            name = example.source or f"example {num_rows}"
            stream.write(json.dumps(_checked_row(example, family, name), ensure_ascii=False).encode() + b"\n")
    return num_rows


def _checked_row(example: Example, family: str, name: str) -> dict[str, Any]:
    """The row of an example, which reads back as the same example."""
    try:
        row = _row_of(example, family)
    except _CannotHoldError as fault:
        raise UserError(f"{name}: cannot be written as {family}, which holds {fault}; choose another family") from None
    ((_, found),) = stream_rows([row])
    if isinstance(found, RowProblem):
        raise UserError(f"{name}: cannot be written as {family}, for it could not be read again: {found.message}")
    if type(found) is not type(example) or _row_of(found, family) != row:
        raise UserError(f"{name}: cannot be written as {family}, for it would be read as another example; leave it out")
    return row


class _CannotHoldError(Exception):
    """What a family holds, said where an example is something else."""


def _row_of(example: Example, family: str) -> dict[str, Any]:
    if not isinstance(example, Pair | Unpaired):
        raise _CannotHoldError("pairs and single completions, no rankings")
    if family == "openai":
        return _openai_row(example)
    return (_trl_row if family == "trl" else _sharegpt_row)(example)


def _trl_row(example: Pair | Unpaired) -> dict[str, Any]:
    if isinstance(example, Unpaired) and example.is_conversation:
        return {"messages": [*_messages(example.prompt), *_messages(example.completion)], **_columns(example)}
    row: dict[str, Any] = {"prompt": _plain(example.prompt)}
    if isinstance(example, Pair):
        row |= {"chosen": _plain(example.chosen), "rejected": _plain(example.rejected)}
    else:
        row |= {"completion": _plain(example.completion), **_label(example, "label")}
    return row | _columns(example)


def _sharegpt_row(example: Pair | Unpaired) -> dict[str, Any]:
    def turn(message: Message) -> dict[str, str]:
        return {"from": _SHAREGPT_NAMES.get(message["role"], message["role"]), "value": message["content"]}

    def answer(text: Text) -> dict[str, str]:
        messages = _messages(text)
        if len(messages) != 1:
            raise _CannotHoldError("completions of one message")
        return turn(messages[0])

    if isinstance(example, Unpaired) and _stands_apart(example):
        raise _CannotHoldError("conversations all of whose answers are learned")
    row: dict[str, Any] = {"conversations": [turn(message) for message in _messages(example.prompt)]}
    if isinstance(example, Pair):
        row |= {"chosen": answer(example.chosen), "rejected": answer(example.rejected)}
    else:
        row["conversations"].append(answer(example.completion))
        row |= _label(example, "kto_tag")
    return row | _columns(example)


def _stands_apart(example: Unpaired) -> bool:
    """Whether the completion alone is learned, though the prompt holds answers as well."""
    return example.is_desirable is None and has_answers(example.prompt) and not example.is_conversation


def _openai_row(example: Pair | Unpaired) -> dict[str, Any]:
    if not isinstance(example, Pair):
        raise _CannotHoldError("pairs alone")
    return {
        "input": {"messages": _messages(example.prompt), "tools": [], "parallel_tool_calls": True},
        "preferred_output": _messages(example.chosen),
        "non_preferred_output": _messages(example.rejected),
    } | _columns(example)


def _plain(text: Text) -> str | list[dict[str, str]]:
    return text if isinstance(text, str) else [dict(message) for message in text]


def _messages(text: Text) -> list[dict[str, str]]:
    if isinstance(text, str):
        raise _CannotHoldError("messages, no plain text")
    return [dict(message) for message in text]


def _label(example: Unpaired, name: str) -> dict[str, bool]:
    return {} if example.is_desirable is None else {name: example.is_desirable}


def _columns(example: Pair | Unpaired) -> dict[str, float | bool]:
    columns: dict[str, float | bool] = {} if example.weight == 1 else {"weight": example.weight}
    if isinstance(example, Pair):
        if example.margin is not None:
            columns["margin"] = example.margin
        if example.win_probabilities is not None:
            columns["chosen_win_probability"], columns["rejected_win_probability"] = example.win_probabilities
    if example.finished is not None and not all(example.finished):
        names = FINISHED if isinstance(example, Pair) else ["finished"]
        columns |= dict(zip(names, example.finished, strict=True))
    return columns


@contextmanager
def _new_file(file: Path) -> Iterator[BinaryIO | gzip.GzipFile]:
    """A file to fill, packed where its name ends in .gz: it takes its place when the block has ended well."""
    try:
        with new_file(file) as raw:
            if file.name.lower().endswith(".gz"):
                with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:  # no time: the same rows, the same bytes
                    yield packed
            else:
                yield raw
    except OSError as fault:
        raise UserError(
            f"{file}: cannot be written ({fault.strerror or fault}); check the folder and its rights"
        ) from fault

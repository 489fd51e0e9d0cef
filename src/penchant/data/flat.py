"""Tokenised examples in a few flat arrays, in memory or on the disk, each put together when it is asked for."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from penchant.examples import TokenizedExample

T = TypeVar("T")

Columns = Mapping[str, NDArray[Any]]
"""What `FlatExamples` consists of, by name."""

_OF_EXAMPLES = ("index", "weight", "margin", "win_probabilities", "is_desirable")
COLUMNS = ("ids", "lengths", "sequences", *_OF_EXAMPLES)
"""The ids of all sequences, one behind the other; an entry a sequence; entries an example."""

UNJUDGED = -1
"""Stands in the column of labels for None; in the columns of numbers, all of which are finite, nan does."""


class LazyExamples(Sequence[TokenizedExample]):
    """Examples that are made when they are asked for; a slice is a list of them."""

    @abstractmethod
    def at(self, place: int) -> TokenizedExample:
        """The example at a place from 0 on."""

    @overload
    def __getitem__(self, place: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, place: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, place: int | slice) -> TokenizedExample | list[TokenizedExample]:
        places = range(len(self))[place]  # knows negative places and slices, and where the end is
        return self.at(places) if isinstance(places, int) else [self.at(each) for each in places]


class FlatExamples(LazyExamples):
    """Examples as columns: the token ids of all their sequences one behind the other, their lengths, and the rest.

    The ids of an example are views of the column, so that even all examples at once take little memory beside it.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._ids = columns["ids"].data  # gives ints of Python, where numpy's would overflow
        self._edges = _running_sum(columns["lengths"])
        self._firsts = _running_sum(columns["sequences"])

    @classmethod
    def joined(cls, parts: Iterable[Columns]) -> FlatExamples:
        """The examples of all parts, each as `flat_columns` gave it."""
        all_parts = [flat_columns([]), *parts]
        return cls({name: np.concatenate([part[name] for part in all_parts]) for name in all_parts[0]})

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def at(self, place: int) -> TokenizedExample:
        first, last = self._firsts[place : place + 2].tolist()
        edges = self._edges[first : last + 1].tolist()
        prompt_ids, *completion_ids = (self._ids[start:end] for start, end in pairwise(edges))
        rest = {name: self.columns[name][place].tolist() for name in _OF_EXAMPLES}
        margin, chances, label = rest["margin"], rest["win_probabilities"], rest["is_desirable"]
        return TokenizedExample(
            prompt_ids,
            tuple(completion_ids),
            rest["index"],
            weight=rest["weight"],
            margin=None if math.isnan(margin) else margin,
            win_probabilities=None if math.isnan(chances[0]) else (chances[0], chances[1]),
            is_desirable=None if label == UNJUDGED else bool(label),
        )

    def without(self, places: Iterable[int]) -> FlatExamples:
        """The examples but those at some places."""
        left_out = {*places}
        kept = [place for place in range(len(self)) if place not in left_out]
        return flattened(Reordered(self, kept))

    @property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """Tokens of each prompt."""
        return self._lengths(self._firsts[:-1])

    @property
    def first_lengths(self) -> NDArray[np.int64]:
        """Tokens of each example's first completion: chosen, the best, the only one."""
        return self._lengths(self._firsts[:-1] + 1)

    @property
    def last_lengths(self) -> NDArray[np.int64]:
        """Tokens of each example's last completion: rejected, the worst, the only one."""
        return self._lengths(self._firsts[1:] - 1)

    @property
    def labels(self) -> NDArray[np.int8]:
        """Of each example 1 where its completion is desirable, 0 where not, `UNJUDGED` where nobody said."""
        return self.columns["is_desirable"]

    @property
    def most_completions(self) -> int:
        """Completions of the example that has the most."""
        return int(self.columns["sequences"].max(initial=1)) - 1

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """Tokens of each example's longest sequence."""
        of_completions = self.columns["lengths"].astype(np.int64)
        of_completions[self._firsts[:-1]] = 0
        longest = np.maximum.reduceat(of_completions, self._firsts[:-1]) if len(self) else of_completions
        return self.prompt_lengths + longest

    def _lengths(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.columns["lengths"][sequences].astype(np.int64)


@dataclass(frozen=True)
class Reordered(LazyExamples):
    """Some of the examples in another order."""

    examples: Sequence[TokenizedExample]
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def at(self, place: int) -> TokenizedExample:
        return self.examples[self.places[place]]


def flat_columns(examples: Sequence[TokenizedExample]) -> dict[str, NDArray[Any]]:
    """Examples as the columns of `FlatExamples`; an id takes one, two or four bytes, as the largest needs."""
    sequences = [ids for example in examples for ids in (example.prompt_ids, *example.completion_ids)]
    ids = np.fromiter(chain.from_iterable(sequences), np.uint32)
    chances = [example.win_probabilities or (np.nan, np.nan) for example in examples]
    return {
        "ids": ids.astype(np.min_scalar_type(ids.max(initial=0))),
        "lengths": np.array([len(sequence) for sequence in sequences], np.uint32),
        "sequences": np.array([1 + len(example.completion_ids) for example in examples], np.uint32),
        "index": np.array([example.index for example in examples], np.int64),
        "weight": np.array([example.weight for example in examples], np.float64),
        "margin": np.array([np.nan if e.margin is None else e.margin for e in examples], np.float64),
        "win_probabilities": np.array(chances, np.float64).reshape(-1, 2),
        "is_desirable": np.array([UNJUDGED if e.is_desirable is None else e.is_desirable for e in examples], np.int8),
    }


def flattened(examples: Sequence[TokenizedExample]) -> FlatExamples:
    """The same examples as flat ones."""
    if isinstance(examples, FlatExamples):
        return examples
    return FlatExamples.joined(map(flat_columns, in_parts(examples)))


def num_tokens_of(examples: Sequence[TokenizedExample]) -> NDArray[np.int64]:
    """Tokens of each example's longest sequence; of flat examples none is put together for it."""
    if isinstance(examples, FlatExamples):
        return examples.num_tokens
    return np.array([example.num_tokens for example in examples], np.int64)


def has_column(examples: Sequence[TokenizedExample], name: str) -> bool:
    """Whether an example has a `margin`, or `win_probabilities`; of flat examples none is put together for it."""
    if isinstance(examples, FlatExamples):
        return not np.isnan(examples.columns[name]).all()
    return any(getattr(example, name) is not None for example in examples)


def in_parts(items: Sequence[T], size: int = 1024) -> Iterator[Sequence[T]]:
    """The items, up to `size` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _running_sum(counts: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

"""Which texts resemble each other: word hashes, MinHash signatures, and rows that share bands of them.

The Jaccard similarity of two texts is the share of their word triples that both have. Two MinHash signatures agree in a
place with just that probability (Broder 1997, "On the resemblance and containment of documents"), so 64 places of one
byte each stand for a text of any length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

NUM_HASHES = 64
"""Bytes of a signature; an estimated similarity s has a standard deviation of sqrt(s (1 - s) / 64), 0.05 at 0.8."""

_BAND_BYTES = 8
_COMPARED_AT_ONCE = 1 << 16

# In bytes, which are faster than text: words, single characters beyond ASCII (Chinese has no blanks), punctuation.
_WORD = re.compile(rb"[a-z0-9_]+|[\xc2-\xf4][\x80-\xbf]+|[!-/:-@\[-`{-~]")

_random = np.random.default_rng(20260101)
_FACTORS = _random.integers(1, 1 << 32, (NUM_HASHES, 1), dtype=np.uint32) | np.uint32(1)
_OFFSETS = _random.integers(0, 1 << 32, (NUM_HASHES, 1), dtype=np.uint32)
_TRIPLE = _random.integers(1, 1 << 32, 3, dtype=np.uint32) | np.uint32(1)

Signatures = NDArray[np.uint8]
"""One row of NUM_HASHES bytes for each text."""


def words_of(text: str) -> list[int]:
    """A hash for each word and punctuation mark of a text, upper and lower case alike."""
    return [crc32(word) for word in _WORD.findall(text.lower().encode("utf-8", "surrogatepass"))]


def signature(texts: Sequence[list[int]], first: int = 0) -> bytes:
    """The MinHash signature of texts, given as word hashes, that stand in the places `first`, `first` + 1, ..."""
    # Each place has a salt of its own, so that chosen and rejected swapped are another row.
    triples = np.concatenate([_triples(words) + np.uint32(place << 16) for place, words in enumerate(texts, first)])
    hashes = triples * _FACTORS + _OFFSETS
    return hashes.min(axis=1).astype(np.uint8).tobytes()  # the low byte: the high ones of a minimum are all small


def _triples(words: list[int]) -> NDArray[np.uint32]:
    # Two blanks in front let a text of one word have a triple, and one of none (control characters) as well.
    hashes = np.array([0, 0, *(words or [0])], dtype=np.uint32)
    triples = hashes[:-2] * _TRIPLE[0] + hashes[1:-1] * _TRIPLE[1] + hashes[2:] * _TRIPLE[2]
    return triples ^ triples >> np.uint32(15)


def unpacked(signatures: bytearray) -> Signatures:
    """Signatures that were written one behind the other, as rows."""
    return np.frombuffer(signatures, dtype=np.uint8).reshape(-1, NUM_HASHES)


def repeats(prompts: Signatures, completions: Signatures, similarity: float) -> dict[int, int]:
    """Rows whose prompt and completions both resemble those of an earlier row -> the earliest that was found."""
    found: dict[int, int] = {}
    # A band takes half of its bytes from either, so that a preamble which all prompts share makes no candidates.
    for ours, theirs in zip(_bands(prompts, _BAND_BYTES // 2), _bands(completions, _BAND_BYTES // 2), strict=True):
        earlier, later = _neighbours(_keys(np.hstack([ours, theirs])))
        alike = _alike(prompts, earlier, prompts, later, similarity)
        alike &= _alike(completions, earlier, completions, later, similarity)
        for first, second in zip(earlier[alike].tolist(), later[alike].tolist(), strict=True):
            found[second] = min(first, found.get(second, first))
    return found


def matches(ours: Signatures, theirs: Signatures, similarity: float) -> dict[int, int]:
    """Rows of `theirs` that resemble one of `ours` -> that one."""
    found: dict[int, int] = {}
    for our_band, their_band in zip(_bands(ours, _BAND_BYTES), _bands(theirs, _BAND_BYTES), strict=True):
        keys, wanted = _keys(our_band), _keys(their_band)
        order = np.argsort(keys, kind="stable")
        places = np.minimum(np.searchsorted(keys[order], wanted), len(order) - 1)
        our_rows = order[places]
        their_rows = np.flatnonzero(keys[our_rows] == wanted)
        our_rows = our_rows[their_rows]
        alike = _alike(ours, our_rows, theirs, their_rows, similarity)
        for one, other in zip(our_rows[alike].tolist(), their_rows[alike].tolist(), strict=True):
            found.setdefault(other, one)
    return found


def _bands(signatures: Signatures, width: int) -> Iterator[Signatures]:
    """Columns of the signatures, `width` bytes at a time."""
    for start in range(0, NUM_HASHES, width):
        yield signatures[:, start : start + width]


def _keys(band: Signatures) -> NDArray[np.uint64]:
    """The bytes of a band as one whole number for each row."""
    return np.ascontiguousarray(band).view(np.uint64)[:, 0]


def _neighbours(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows with equal keys, each with the one before it and with the first of all.

    Not all couples: where thousands of rows share a key there would be millions of them.
    """
    order = np.argsort(keys, kind="stable")
    is_same = keys[order[1:]] == keys[order[:-1]]
    later = np.flatnonzero(is_same) + 1
    starts = np.maximum.accumulate(np.where(np.r_[True, ~is_same], np.arange(len(order)), 0))
    return order[np.r_[later - 1, starts[later]]], order[np.r_[later, later]]


def _alike(
    ours: Signatures, our_rows: NDArray[np.int64], theirs: Signatures, their_rows: NDArray[np.int64], similarity: float
) -> NDArray[np.bool_]:
    parts = [
        (
            ours[our_rows[start : start + _COMPARED_AT_ONCE]] == theirs[their_rows[start : start + _COMPARED_AT_ONCE]]
        ).mean(axis=1)
        >= similarity
        for start in range(0, len(our_rows), _COMPARED_AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)

"""What the data doctor remembers of every row: about 200 bytes, whatever its length."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice

import numpy as np

from penchant.doctor.duplicates import matches, repeats, signature, unpacked, words_of
from penchant.examples import Example, Pair, Text, Unpaired

# The last number of a name, as it is written by `str`: no zeros in front, and small enough for 64 bits.
_NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]{0,17})([^0-9]*)", re.DOTALL)


def sides_of(example: Example) -> tuple[Text, ...]:
    """The better and the worse completion of a pair or (best, last) of a ranking; or the only completion."""
    return (
        example.completions
        if isinstance(example, Pair | Unpaired)
        else (
            example.completions[0],
            example.completions[-1],
        )
    )


def joined(text: Text, *leave_out: str) -> str:
    """What is said in a text, its turns one below the other, those of some roles left out."""
    if isinstance(text, str):
        return text
    return "\n".join(turn["content"] for turn in text if turn["role"] not in leave_out)


class RowMemory:
    """Rows by their number: where they stand, digests of what they say, signatures of what they resemble."""

    def __init__(self) -> None:
        self._sources = Sources()
        self._prompts, self._completions = bytearray(), bytearray()
        self._digests, self._judged, self._opposite = array("Q"), array("Q"), array("Q")

    def __len__(self) -> int:
        return len(self._sources)

    def source(self, place: int) -> str:
        """Where the row at a place stands."""
        return self._sources[place]

    def add(self, example: Example, words: Sequence[list[int]]) -> None:
        """Remembers a row; `words` are those of its sides."""
        self._sources.append(example.source)
        # A system message is often the same in all rows, and would make all prompts alike.
        self._prompts += signature([words_of(joined(example.prompt, "system", "developer"))])
        is_undesirable = isinstance(example, Unpaired) and example.is_desirable is False
        self._completions += signature(words, first=int(is_undesirable))
        prompt, *sides = (_digest(_spelled(text)) for text in (example.prompt, *sides_of(example)))
        self._digests.append(int.from_bytes(prompt, "little"))
        judged = [*sides] if len(sides) > 1 else [sides[0], bytes([is_undesirable])]
        opposite = judged[::-1] if len(sides) > 1 else [sides[0], bytes([not is_undesirable])]
        if isinstance(example, Unpaired) and example.is_desirable is None:
            opposite = [b"nobody said the opposite"]
        for digests, parts in ((self._judged, judged), (self._opposite, opposite)):
            digests.append(int.from_bytes(_digest(prompt, *parts), "little"))

    def repeats(self, similarity: float) -> dict[int, int]:
        """Places of rows that resemble an earlier one -> the place of that one."""
        return repeats(unpacked(self._prompts), unpacked(self._completions), similarity) if len(self) else {}

    def contradictions(self) -> list[int]:
        """Places of rows that another one judges the other way round."""
        return np.flatnonzero(np.isin(np.array(self._judged), np.array(self._opposite))).tolist()

    def with_prompts_of(self, others: RowMemory, similarity: float) -> list[int]:
        """Places of rows whose prompt is, or resembles, a prompt of the others."""
        if not len(self) or not len(others):
            return []
        same = np.flatnonzero(np.isin(np.array(self._digests), np.array(others._digests))).tolist()
        return sorted({*same, *matches(unpacked(others._prompts), unpacked(self._prompts), similarity)})


class Sources:
    """Names of rows such as `pairs.jsonl:17`, kept as a number each: what stands around the number repeats itself."""

    def __init__(self) -> None:
        self._frames: dict[tuple[str, str | None], int] = {}
        self._frame_of, self._numbers = array("L"), array("Q")

    def __len__(self) -> int:
        return len(self._numbers)

    def append(self, source: str) -> None:
        """Adds a name."""
        match = _NUMBERED.fullmatch(source)
        before, number, behind = match.groups() if match else (source, 0, None)
        self._frame_of.append(self._frames.setdefault((before, behind), len(self._frames)))
        self._numbers.append(int(number))

    def __getitem__(self, place: int) -> str:
        before, behind = next(islice(self._frames, self._frame_of[place], None))
        return before if behind is None else f"{before}{self._numbers[place]}{behind}"


def _spelled(text: Text) -> bytes:
    turns = [("", text)] if isinstance(text, str) else [(turn["role"], turn["content"]) for turn in text]
    return "\0".join(f"{role}\0{content.strip()}" for role, content in turns).encode("utf-8", "surrogatepass")


def _digest(*parts: bytes) -> bytes:
    return blake2b(b"\0".join(parts), digest_size=8).digest()

"""Held-out pairs to browse: read page by page, each token with what training did to it."""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.report.rundir import as_mapping, clean_all
from penchant.report.series import finite

ORDERS = {"least": "least learned first", "most": "most learned first", "file": "as in the data"}
"""How pairs may be ordered, and what that is called."""

_STEPS = (0.05, 0.2, 0.5, 1.0, 2.0)
"""Nats at which a token's colour deepens."""


@dataclass(frozen=True)
class Token:
    """A piece of a completion, its log-ratio in nats, and the class that colours it: up1 to up5, down1 to down5."""

    text: str
    log_ratio: float | None
    look: str


class PairIndex:
    """Where each pair stands in pairs.jsonl, and its margin; the texts stay on the disk until they are shown."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._mark: tuple[int, int, int] | None = None
        self._places: list[tuple[float, int, bool]] = []
        """Margin, offset in bytes, whether its tokens are kept."""

    def places(self, order: str, with_tokens: bool = False) -> list[int]:
        """The offsets of the pairs in one of ORDERS."""
        with self._lock:
            self._look()
            chosen = [(margin, offset) for margin, offset, has_tokens in self._places if has_tokens or not with_tokens]
        if order != "file":
            chosen.sort(key=lambda place: place[0], reverse=order == "most")
        return [offset for _, offset in chosen]

    def num_wrong(self) -> int:
        """Pairs whose rejected completion has the higher reward, or an equal one."""
        return sum(margin <= 0 for margin, *_ in self._places)

    def read(self, offsets: Sequence[int]) -> list[dict[str, Any]]:
        """The pairs that begin at these offsets."""
        found = []
        with self.path.open("rb") as file:
            for offset in offsets:
                file.seek(offset)
                row = _parsed(file.readline())
                if row:
                    found.append(clean_all(row))
        return found

    def _look(self) -> None:
        try:
            there = self.path.stat()
        except OSError:
            self._mark, self._places = None, []
            return
        mark = (there.st_ino, there.st_size, there.st_mtime_ns)
        if mark == self._mark:
            return
        places, offset = [], 0
        with self.path.open("rb") as file:
            for line in file:
                row = _parsed(line)
                chosen, rejected = finite(row.get("chosen_reward")), finite(row.get("rejected_reward"))
                if chosen is not None and rejected is not None:
                    places.append((float(chosen - rejected), offset, "chosen_log_ratios" in row))
                offset += len(line)
        self._mark, self._places = mark, places


def tokens_of(pair: dict[str, Any], side: str) -> list[Token]:
    """The coloured tokens of a completion; none where they were not kept.

    A character that several tokens share is shown once, with the sum of their log-ratios.
    """
    texts, ratios = pair.get(f"{side}_tokens"), pair.get(f"{side}_log_ratios")
    if not isinstance(texts, list) or not isinstance(ratios, list) or len(texts) != len(ratios):
        return []
    tokens, carried = [], 0.0
    for text, ratio in zip(texts, ratios, strict=True):
        value = finite(ratio)
        if not text and value is not None:
            carried += value
            continue
        value = None if value is None else value + carried
        tokens.append(Token(str(text), value, _look_of(value)))
        carried = 0.0
    return tokens


def _look_of(value: float | None) -> str:
    if value is None:
        return "unknown"
    strength = bisect_right(_STEPS, abs(value))
    return f"{'up' if value > 0 else 'down'}{strength}" if strength else ""


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        return as_mapping(json.loads(line))
    except (ValueError, RecursionError):
        return {}

"""What several runs have in common and need to do once: reading, tokenising, the reference's pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Shared:
    """Keeps in memory what was made, under all that it depends on, while runs follow each other."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave when `key` was asked for first."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

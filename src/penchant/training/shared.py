"""What several runs have in common and need to do once: reading, tokenising, the reference's pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from penchant.data.formats import ExampleData
from penchant.scoring.reference import LogpsCache
from penchant.training.datasets import Datasets, Rows, read_data


class Shared:
    """Kept in memory while runs follow each other, each part under the settings that it depends on."""

    def __init__(self) -> None:
        self._rows: dict[str, ExampleData] = {}
        self._datasets: dict[Hashable, Datasets] = {}
        self._logps: dict[Hashable, LogpsCache] = {}

    def rows(self, data: Rows, name: str) -> ExampleData:
        """The examples of a file, read once; rows in memory are not kept."""
        if not isinstance(data, str):
            return read_data(data, name)
        if data not in self._rows:
            self._rows[data] = read_data(data, name)
        return self._rows[data]

    def datasets(self, settings: Hashable, make: Callable[[], Datasets]) -> Datasets:
        """The tokenised examples under these settings."""
        if settings not in self._datasets:
            self._datasets[settings] = make()
        return self._datasets[settings]

    def logps(self, source: Hashable) -> LogpsCache:
        """The log-probabilities that this model and arithmetic have given so far."""
        return self._logps.setdefault(source, LogpsCache())

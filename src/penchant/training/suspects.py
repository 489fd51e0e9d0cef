"""The training pairs that a run finds hardest to believe: where wrong labels gather."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penchant.disk import write_json_lines
from penchant.examples import plain_text
from penchant.training.setup import Setup

SUSPICIOUS = "suspicious.jsonl"
"""Where they are in a run directory."""

MOST = 20


class Suspects:
    """The pairs (of rankings best and worst) with the lowest margins, each as it was when it came for the first time.

    Until then the model has learned from the others alone, so a margin far below 0 says that these contradict the pair.
    """

    def __init__(self) -> None:
        self._lowest: list[tuple[float, int, int]] = []
        """Margin, step and index of the example, the lowest margin first."""

    def look(self, rewards: Mapping[int, Sequence[float]], step: int) -> None:
        """Takes in the rewards of a step's completions, by the index of their example."""
        own = [(of[0] - of[-1], step, index) for index, of in rewards.items() if len(of) > 1 and of[0] < of[-1]]
        self._lowest = sorted([*self._lowest, *own])[:MOST]

    def write(self, setup: Setup, run_dir: Path) -> None:
        """Keeps them with their texts; without any there is no file."""
        rows = []
        for margin, step, index in self._lowest:
            text = setup.datasets.train.texts[index]
            sides = {"chosen": plain_text(text.completions[0]), "rejected": plain_text(text.completions[-1])}
            rows.append(
                {"margin": margin, "step": step, "source": text.source, "prompt": plain_text(text.prompt), **sides}
            )
        if rows:
            write_json_lines(run_dir / SUSPICIOUS, rows)

    def to_json(self) -> list[list[Any]]:
        """The state, as a checkpoint keeps it."""
        return [list(one) for one in self._lowest]

    @classmethod
    def from_json(cls, state: Sequence[Sequence[Any]]) -> Suspects:
        """The inverse of `to_json`."""
        suspects = cls()
        suspects._lowest = [(margin, step, index) for margin, step, index in state]
        return suspects

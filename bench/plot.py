"""Draws what `bench/against_trl.py --json FILE` noted: pairs done over time, or, of `--growth`, time over size.

python bench/plot.py table.json docs/benchmarks.svg --batch_size 8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    """Reads the file and draws what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("noted", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch_size", type=int, default=8, help="pairs a step, as they were measured with")
    options = parser.parse_args()
    noted = json.loads(options.noted.read_text(encoding="utf-8"))
    if "grows" in noted[0]:
        draw_growth(noted, options.output)
    else:
        draw_race(noted, options.batch_size, options.output)


def draw_race(rounds: list[dict[str, Any]], batch_size: int, path: Path) -> None:
    """Pairs trained on over the seconds since the process began, a line for each side and round."""
    figure, panel = plt.subplots(figsize=(7, 4))
    for side, colour, label in (("trl", "tab:orange", "TRL"), ("penchant", "tab:blue", "Penchant")):
        for number, one in enumerate(rounds):
            seconds = [one[side]["training_at"], *one[side]["step_at"]]
            pairs = [batch_size * step for step in range(len(seconds))]
            panel.plot(seconds, pairs, color=colour, marker="o", markersize=3, label=None if number else label)
            panel.plot([0, seconds[0]], [0, 0], color=colour, linestyle=":")
    panel.set(xlabel="seconds since the start (dotted: imports, model, data, reference)", ylabel="pairs trained on")
    panel.set_title("The same pairs, model and losses")
    _finish(figure, panel, path)


def draw_growth(found: list[dict[str, Any]], path: Path) -> None:
    """Seconds of set-up and of a step over each size, on logarithmic scales."""
    kinds = list(dict.fromkeys(one["grows"] for one in found))
    figure, panels = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.6), squeeze=False)
    for panel, kind in zip(panels[0], kinds, strict=True):
        own = [one for one in found if one["grows"] == kind]
        for key, label in (("setup_s", "set-up"), ("step_s", "a step")):
            panel.loglog([one["size"] for one in own], [one[key] for one in own], marker="o", label=label)
        panel.set(xlabel=kind, ylabel="seconds")
    _finish(figure, panels[0][0], path)


def _finish(figure: Any, panel: Any, path: Path) -> None:
    panel.legend()
    for each in figure.axes:
        each.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

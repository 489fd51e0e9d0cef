"""How Penchant's time and memory grow with the number of pairs, their length and the model's layers.

Random weights of the model's shape with few layers, for what is asked is the exponent and not the speed. One thing
grows at a time; every measurement is a process of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from against_trl_sides import Job, Notes, measure
from against_trl_work import PairTexts, pairs_of_length, synthetic_pairs, write_pairs

NUMBERS = (100, 1_000, 10_000, 100_000)
LENGTHS = (64, 128, 256, 512, 1024, 2048)
LAYERS = (1, 2, 4)
"""Times the layers of the smallest model."""
USUAL_LENGTH = 256
STEPS, BATCH = 4, 4
"""Steps of each measurement, of which the first warms up, and pairs in each."""

ModelMaker = Callable[[int, Path], Any]
"""Saves a model of so many layers to a folder and returns its tokenizer."""


@dataclass(frozen=True)
class Measured:
    """One size of what grows, and what it took."""

    grows: str
    size: int
    setup_s: float
    """From the start of the process until training begins, the reference's pass left out."""
    setup_gib: float
    """Most memory held until then."""
    step_s: float


def measure_growth(
    make: ModelMaker, layers: int, job: Job, folder: Path, num_sizes: int | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measures each size (or the smallest `num_sizes`) of each thing that grows, the others held as they are."""
    found = []
    for grows, size, its_job in _jobs(make, layers, job, folder, num_sizes):
        notes = Notes(**measure(its_job))
        steps = np.diff([notes.training_at, *notes.step_at])[1:]
        found.append(Measured(grows, size, notes.setup_s, notes.setup_peak_bytes / 2**30, statistics.median(steps)))
        say(f"{grows} {size}: {notes.setup_s:.1f} s of set-up, {found[-1].step_s:.2f} s a step")
    return [vars(one) for one in found]


def growth_settings() -> str:
    """What does not grow, in words."""
    return (
        f"{BATCH} pairs a step, medians of {STEPS - 1} steps; prompt and each completion have half of {USUAL_LENGTH} "
        "tokens where layers grow, half of the size where lengths do; lengths as in hh where the number of pairs grows"
    )


def growth_table(found: list[dict[str, Any]]) -> str:
    """What was measured, and the exponents: slopes of the logarithms over all sizes, and between the last two."""
    lines = ["| what grows | size | s of set-up | GiB of set-up | s a step |", "|---|---:|---:|---:|---:|"]
    lines += ["| {grows} | {size:,} | {setup_s:.1f} | {setup_gib:.2f} | {step_s:.3f} |".format(**one) for one in found]
    lines += ["", "| exponent, all sizes (last two) | s of set-up | GiB of set-up | s a step |", "|---|---:|---:|---:|"]
    for grows in dict.fromkeys(one["grows"] for one in found):
        own = [one for one in found if one["grows"] == grows]
        sizes = [one["size"] for one in own]
        cells = []
        for name in ("setup_s", "setup_gib", "step_s"):
            values = [one[name] for one in own]
            cells.append(f"{exponent(sizes, values):.2f} ({exponent(sizes[-2:], values[-2:]):.2f})")
        lines.append(f"| {grows} | {' | '.join(cells)} |")
    return "\n".join(lines)


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of log(value) over log(size), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _jobs(
    make: ModelMaker, layers: int, job: Job, folder: Path, num_sizes: int | None
) -> Iterator[tuple[str, int, Job]]:
    """What grows, its size, and what is to be done to measure it."""
    job = replace(job, batch_size=BATCH, max_steps=STEPS, epochs=STEPS, max_length=4096)

    def pairs_file(pairs: Iterator[PairTexts], number: int) -> str:
        return write_pairs(list(islice(pairs, number)), folder / "pairs.jsonl")

    for times in LAYERS[:num_sizes]:
        place = folder / f"layers-{times}"
        tokenizer = make(times * layers, place)
        pairs = pairs_file(pairs_of_length(tokenizer, USUAL_LENGTH), STEPS * BATCH)
        yield "layers", times * layers, replace(job, model=str(place), pairs=pairs)
    small = replace(job, model=str(folder / "layers-1"))
    for length in LENGTHS[:num_sizes]:
        pairs = pairs_file(pairs_of_length(tokenizer, length), STEPS * BATCH)
        yield "tokens of prompt and completion", length, replace(small, pairs=pairs)
    for number in NUMBERS[:num_sizes]:
        yield "pairs", number, replace(small, pairs=pairs_file(synthetic_pairs(tokenizer, "hh"), number))

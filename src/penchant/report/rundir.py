"""The run directory: what a reader can take from it, whole or not."""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penchant.errors import UserError
from penchant.report.figures import Number
from penchant.report.series import Series, finite
from penchant.report.units import Unit, unit_of

HELD_OUT = "eval_"
"""What the names of held-out measurements begin with."""

NOTES = "notes.jsonl"
"""Where people's notes are kept."""

NO_MEASUREMENT = {"step", "epoch", "time_s"}
"""What stands in a line of metrics beside the measurements."""

_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Extremes:
    """Numbers, all of them, and the rows at both ends of their order; the rows between do not pile up."""

    def __init__(self, num_kept: int = 5) -> None:
        self.values: list[Number] = []
        self._num_kept = num_kept
        self._highest: list[tuple[Number, int, dict[str, Any]]] = []
        self._lowest: list[tuple[Number, int, dict[str, Any]]] = []

    def add(self, value: Number, row: dict[str, Any]) -> None:
        """Takes in the number that belongs to a row."""
        order = -len(self.values)  # of equal ones the first comes first, and no two rows are ever compared
        self.values.append(value)
        for heap, key in ((self._highest, value), (self._lowest, -value)):
            push = heapq.heappush if len(heap) < self._num_kept else heapq.heappushpop
            push(heap, (key, order, row))

    @property
    def highest(self) -> list[dict[str, Any]]:
        """The rows of the highest numbers, the highest first."""
        return [clean_all(row) for *_, row in sorted(self._highest, reverse=True)]

    @property
    def lowest(self) -> list[dict[str, Any]]:
        """The rows of the lowest numbers, the lowest first."""
        return [clean_all(row) for *_, row in sorted(self._lowest, reverse=True)]


@dataclass
class PairRewards:
    """The rewards of the pairs of one split after training; of rankings those of the best and the worst."""

    chosen: list[Number] = field(default_factory=list)
    rejected: list[Number] = field(default_factory=list)
    margins: Extremes = field(default_factory=Extremes)


@dataclass
class RunRecord:
    """All that could be read from a run directory; what was missing is empty."""

    name: str
    run_file: str = ""
    metrics: dict[str, Series] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    """What people wrote down: `time`, `step`, `text`."""
    pairs: dict[str, PairRewards] = field(default_factory=dict)
    completions: dict[str, dict[bool | None, Extremes]] = field(default_factory=dict)
    """By split the rewards of single completions: of the desirable, of the undesirable, of those without a label."""
    data: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    num_unreadable: int = 0

    def series(self, name: str) -> Series:
        """The measurement of that name, empty when it was never written."""
        return self.metrics.get(name, Series(()))

    def part(self, split: str) -> dict[str, Any]:
        """The findings about the data of a split ("train", "eval"), empty when there are none."""
        return as_mapping(self.data.get(split))

    def unit(self, split: str) -> Unit:
        """What the examples of a split are; without held-out examples, what those of training are."""
        return unit_of(self.part(split) or self.part("train"))


def read_run(run_dir: Path, metrics: Mapping[str, Series] | None = None, with_examples: bool = True) -> RunRecord:
    """Reads whatever is there; a cut last line is passed over in silence, other unreadable lines are counted.

    Whoever follows the run has the `metrics` already, and may do without the judged examples.

    Raises:
        UserError: there is no such directory.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: there is no such run directory")
    run = RunRecord(name=clean(run_dir.resolve().name))
    run.run_file = _read_text(run_dir / "run.yaml")
    run.data = _read_json(run_dir / "data.json")
    run.summary = _read_json(run_dir / "summary.json")
    run.events = [clean_all(row) for row in _read_lines(run_dir / "events.jsonl", run)]
    run.samples = [clean_all(row) for row in _read_lines(run_dir / "samples.jsonl", run)]
    run.samples += [clean_all(_as_sample(row)) for row in _read_lines(run_dir / "answers.jsonl", run)]
    run.notes = [clean_all(row) for row in _read_lines(run_dir / NOTES, run)]
    if metrics is None:
        _read_metrics(run_dir / "metrics.jsonl", run)
    else:
        run.metrics = dict(metrics)
    if with_examples:
        _read_pairs(run_dir / "pairs.jsonl", run)
        _read_completions(run_dir / "completions.jsonl", run)
    return run


def clean(text: str) -> str:
    """The text with every character that cannot be shown or written made visible; newline and tab stay."""
    return _UNSHOWABLE.sub(_visible, text)


def as_mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode has a picture of each: NUL becomes the sign that reads "NUL".
    return "\u2421" if code == 0x7F else "\ufffd"


def clean_all(value: Any) -> Any:
    """The same for every text within a value of JSON."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(key): clean_all(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clean_all(item) for item in value]
    return value


def _read_text(path: Path) -> str:
    return clean(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else ""


def _parse(text: str) -> dict[str, Any] | None:
    try:
        return as_mapping(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return as_mapping(clean_all(_parse(path.read_text(encoding="utf-8", errors="replace"))))


def _read_lines(path: Path, run: RunRecord) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            row = _parse(line)
            if row:
                yield row
            # Without its newline a line is the last one, cut off while it was written.
            elif row is None and line.endswith("\n") and line.strip():
                run.num_unreadable += 1


def _as_sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """A held-out answer as a sample, with the judge's scores beside the answers."""
    prompt = row.get("prompt")
    turns = [as_mapping(turn) for turn in prompt] if isinstance(prompt, list) else []
    told = "\n\n".join(str(turn.get("content", "")) for turn in turns) if turns else prompt
    known = {"before_score": finite(row.get("score_before")), "after_score": finite(row.get("score"))}
    return {"prompt": told, "before": row.get("before"), "after": row.get("answer")} | known


def _read_metrics(path: Path, run: RunRecord) -> None:
    values: dict[str, dict[Number, Number | None]] = {}
    for row in _read_lines(path, run):
        step = finite(row.get("step"))
        if step is None:
            continue
        for name, value in row.items():
            if name not in NO_MEASUREMENT and (value is None or isinstance(value, int | float)):
                # A resumed run writes the steps after its checkpoint again: the later line counts.
                values.setdefault(name, {})[step] = finite(value)
    run.metrics = {clean(name): Series(tuple(sorted(points.items()))) for name, points in values.items()}


def _read_pairs(path: Path, run: RunRecord) -> None:
    for row in _read_lines(path, run):
        chosen, rejected = finite(row.get("chosen_reward")), finite(row.get("rejected_reward"))
        if chosen is None or rejected is None:
            continue
        rewards = run.pairs.setdefault(_split(row), PairRewards())
        rewards.chosen.append(chosen)
        rewards.rejected.append(rejected)
        rewards.margins.add(chosen - rejected, {**row, "margin": chosen - rejected})


def _read_completions(path: Path, run: RunRecord) -> None:
    for row in _read_lines(path, run):
        reward, label = finite(row.get("reward")), row.get("desirable")
        if reward is not None:
            of_split = run.completions.setdefault(_split(row), {})
            of_split.setdefault(label if isinstance(label, bool) else None, Extremes()).add(reward, row)


def _split(row: Mapping[str, Any]) -> str:
    return "eval" if row.get("split") == "eval" else "train"

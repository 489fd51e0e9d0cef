"""One run among several: its settings and its figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from penchant.config import parse_value
from penchant.report import verdict
from penchant.report.figures import Number, duration, number, percent, size
from penchant.report.intervals import span
from penchant.report.rundir import RunRecord, as_mapping, clean
from penchant.report.series import finite
from penchant.report.settings import flat, safe
from penchant.report.units import unit_of


class Column(NamedTuple):
    """A column of the table. Where there is little room the one with the highest `rank` gives way first.

    In its label and unit `{0}` is what the held-out examples are.
    """

    key: str
    label: str
    unit: str = ""
    rank: int = 0
    read: Callable[[RunRecord], Any] = lambda run: None
    show: Callable[[Any], str] = number
    is_text: bool = False


def _after(name: str) -> Callable[[RunRecord], Any]:
    return lambda run: verdict.change(run, name).after


def _of_accuracy(name: str) -> Callable[[RunRecord], Any]:
    return lambda run: getattr(verdict.held_out_accuracy(run), name, None)


def _of_answers(name: str) -> Callable[[RunRecord], Any]:
    return lambda run: verdict.judged(run, name)


def _estimated(judged: verdict.Judged | None) -> str:
    return "" if judged is None else f"{number(judged.value)} ({number(judged.low)} to {number(judged.high)})"


def _of_summary(key: str) -> Callable[[RunRecord], Any]:
    return lambda run: finite(run.summary.get(key))


def _accuracy_before(run: RunRecord) -> Number | None:
    accuracy = verdict.held_out_accuracy(run)
    # The rewards of a model that is its own reference are zero, and that accuracy says nothing.
    return None if accuracy is None or accuracy.starts_at_reference else accuracy.before


def _chosen_logps_change(run: RunRecord) -> Number | None:
    logps = verdict.change(run, "logps/chosen")
    return None if logps.before is None or logps.after is None else logps.after - logps.before


def _answer_length(run: RunRecord) -> Number | None:
    lengths = [len(sample["after"]) for sample in run.samples if isinstance(sample.get("after"), str)]
    return sum(lengths) / len(lengths) if lengths else None


COLUMNS = (
    Column("accuracy", "Accuracy", "held-out", 0, _of_accuracy("after"), percent),
    Column("interval", "95% interval", "of the accuracy", 1, _of_accuracy("interval"), span),
    Column("score", "Score", "of held-out answers", 1, _of_answers("score"), _estimated),
    Column("status", "Status", "", 1, lambda run: run.summary.get("status"), lambda s: str(s or "not begun"), True),
    Column("kl", "KL", "nats per token", 3, _after("kl")),
    Column("answer_kl", "KL", "nats per answer", 3, _after("answer_kl")),
    Column("margin", "Margin", "of rewards", 4, _after("rewards/margins")),
    Column("chosen_reward", "{0.first} reward", "", 5, _after("rewards/chosen")),
    Column("rejected_reward", "{0.last} reward", "", 6, _after("rewards/rejected")),
    Column("held_out_loss", "Loss", "held-out", 8, _after("loss")),
    Column("wall_s", "Time", "", 9, _of_summary("wall_s"), duration),
    Column("steps", "Steps", "", 10, _of_summary("steps")),
    Column("longer_wins", "Longer wins", "share", 12, lambda run: finite(run.part("eval").get("longer_wins")), percent),
    Column("chosen_logps_change", "{0.first} logp", "change, nats", 13, _chosen_logps_change),
    Column("accuracy_before", "Before", "accuracy", 14, _accuracy_before, percent),
    Column("num_held_out", "Held out", "{0.plural}", 15, verdict.num_held_out),
    Column("answer_length", "Answers", "characters", 15, _answer_length),
    Column("examples_seen", "Examples", "seen", 15, _of_summary("examples_seen")),
    Column("peak_memory_bytes", "Memory", "peak", 15, _of_summary("peak_memory_bytes"), size),
)
"""The figures of a run: of held-out examples after training where not said otherwise; answers are the sampled ones."""

MAIN_SETTING, LOSS_SETTINGS, OTHER_SETTING, IN_THE_NAME = 2, 7, 11, 16
"""The ranks of columns of settings; a loss is long, and what a run's name says already needs no column."""


@dataclass(frozen=True)
class Row:
    """One run: its settings (the run file with dotted keys, without `output_dir`) and figures (None: not known)."""

    name: str
    path: str
    method: str | None
    loss: dict[str, Any]
    settings: dict[str, Any]
    figures: dict[str, Any]
    """By the keys of COLUMNS."""
    hashes: dict[str, Any]
    """sha256 of the model at the start, and of the training and held-out examples as tokens: model, train, eval."""
    units: dict[str, str | None]
    """What the training and the held-out examples are (a key of UNITS): train, eval."""
    rows_from: str
    """The file of the training data and the rows that were found in it."""
    has_reference: bool | None
    """Whether its rewards are differences from a reference; None: not known."""


def row_of(run: RunRecord, path: Path, name: str) -> Row:
    """A run that has been read already.

    Raises:
        UserError: its run file is not YAML.
    """
    file = as_mapping(parse_value(run.run_file, str(path / "run.yaml")))
    method = clean(str(run.summary.get("method") or file.get("method") or "")) or None
    loss = safe(as_mapping(run.summary.get("loss")) or as_mapping(file.get("loss")))
    train, reference = run.part("train"), run.summary.get("reference")
    return Row(
        name=" ".join(name.split()),
        path=clean(str(path)),
        method=method,
        loss=loss,
        settings=dict(flat(safe({**file, "method": method, "loss": loss, "output_dir": None}))),
        figures={column.key: column.read(run) for column in COLUMNS},
        hashes={"model": run.summary.get("model_sha256"), **{of: run.part(of).get("sha256") for of in _SPLITS}},
        units={of: unit_of(run.part(of)).key if run.part(of) else None for of in _SPLITS},
        has_reference=None if reference is None else reference != "none",
        rows_from=f"{train.get('path')}: {train.get('families')}" if train else "",
    )


_SPLITS = ("train", "eval")

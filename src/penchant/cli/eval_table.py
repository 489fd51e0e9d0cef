"""What an evaluation found, as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from penchant.disk import read_json_lines
from penchant.report.figures import MISSING, number, percent

_NUM_SHOWN = 3
_MOST_CHARACTERS = 240

Measure = Mapping[str, Any]


def print_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """Prints the accuracy on pairs, a table of the settings, and the first answers side by side."""
    console = Console(highlight=False)
    if pairs := summary["pairs"]:
        console.print(
            f"[bold]pairs[/bold]  accuracy {_share(pairs, 'accuracy')} of {pairs['num_pairs']:,}; always the longer "
            f"completion: {percent(pairs['longer_wins'])}"
        )
    if answers := summary.get("answers"):
        console.print(_measures(answers, summary))
        console.print(_samples(folder, next(iter(answers)), summary["baseline"]))
        for name, value in summary["judge"].items():
            if name != "identity":
                console.print(f"[bold]judge[/bold]  {name}: {escape(str(value))}")
        console.print(f"Intervals are of 95%, over {summary['prompts']:,} prompts.", style="dim")
    console.print(f"written to {escape(str(folder))}")


def _measures(answers: Mapping[str, Measure], summary: Mapping[str, Any]) -> Table:
    """A column for each setting, a row for each measure that any of them has."""
    table = Table("", *answers, box=box.SIMPLE_HEAD)
    for label, shown in _ROWS:
        cells = [shown(one) for one in answers.values()]
        if any(cell != MISSING for cell in cells):
            table.add_row(escape(label.replace("baseline", str(summary["baseline"]))), *cells)
    return table


def _samples(folder: Path, setting: str, baseline: str | None) -> Table:
    table = Table("prompt", "answer", *([escape(baseline)] if baseline else []), box=box.SIMPLE_HEAD, show_lines=True)
    rows = [row for row in read_json_lines(folder / "answers.jsonl") if row["setting"] == setting]
    for row in rows[:_NUM_SHOWN]:
        table.add_row(*(_shortened(row[name]) for name in ("prompt", "answer", "baseline") if name in row))
    return table


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return escape(text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…")


def _share(measure: Measure | None, name: str = "value") -> str:
    if measure is None:
        return MISSING
    return f"{percent(measure[name])} ({percent(measure['low'])[:-1]}–{percent(measure['high'])})"


def _estimate(measure: Measure | None) -> str:
    if measure is None:
        return MISSING
    return f"{number(measure['value'])} ({number(measure['low'])} to {number(measure['high'])})"


def _of_wins(show: Callable[[Measure], str]) -> Callable[[Measure], str]:
    return lambda one: show(one["win_rate"]) if one.get("win_rate") else MISSING


def _of_baseline(show: Callable[[Measure], str]) -> Callable[[Measure], str]:
    return lambda one: show(one["baseline"]) if one.get("baseline") else MISSING


_ROWS: Sequence[tuple[str, Callable[[Measure], str]]] = (
    ("won, tied, lost", _of_wins(lambda wins: f"{wins['wins']:,}, {wins['ties']:,}, {wins['losses']:,}")),
    ("win rate against baseline", _of_wins(lambda wins: _share(wins["rate"]))),
    ("    at equal lengths", _of_wins(lambda wins: _share(wins["length_controlled"]))),
    ("    if only length counted", _of_wins(lambda wins: percent(wins["rate_by_length"]))),
    ("the longer answer wins", _of_wins(lambda wins: percent(wins["longer_wins"]))),
    ("score", lambda one: _estimate(one["score"])),
    ("    of baseline", _of_baseline(lambda other: _estimate(other["score"]))),
    ("    difference", lambda one: _estimate(one.get("score_difference"))),
    ("no valid verdict", lambda one: number(one["invalid"]) if one["invalid"] else MISSING),
    ("tokens", lambda one: number(one["num_tokens"])),
    ("    of baseline", _of_baseline(lambda other: number(other["num_tokens"]))),
    ("finished", lambda one: percent(one["finished"])),
    ("distinct bigrams", lambda one: percent(one["distinct_2"])),
    ("repeated 4-grams", lambda one: percent(one["repeated_4"])),
    ("KL from the reference, nats", lambda one: _estimate(one["kl"])),
    ("KL from the model, at most", lambda one: number(one.get("kl_bound_from_model"))),
)
"""Labels, and how the measures of a setting show them."""

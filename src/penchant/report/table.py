"""The one table that all renderings of a comparison show, and what of it fits a terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from penchant.report.card import without_paths
from penchant.report.figures import Number, percent
from penchant.report.intervals import short_names
from penchant.report.rows import COLUMNS, IN_THE_NAME, LOSS_SETTINGS, MAIN_SETTING, OTHER_SETTING, Column, Row
from penchant.report.settings import MAIN_SETTINGS, loss_text, place, setting_text
from penchant.report.units import Unit

_ACCURACY = next(column for column in COLUMNS if column.key == "accuracy")
_MAX_CELL = 26
_MIN_NAMES = len("longer one wins")


class Line(NamedTuple):
    """A line of the table: a run, or a rule that needs no model and has an accuracy only."""

    name: str
    cells: list[str]
    is_baseline: bool


def lay_out(
    rows: Sequence[Row], different: Sequence[str], baselines: Mapping[str, Number], unit: Unit
) -> tuple[list[Column], list[Line]]:
    """Columns and lines, the most accurate first, without columns that would be empty or tell nothing."""
    idle = {key for key in rows[0].figures if all(row.figures[key] is None for row in rows)} - {"accuracy", "status"}
    idle |= {"status"} if all(row.figures["status"] == "finished" for row in rows) else set()
    idle |= {"longer_wins"} if len(baselines) > 1 else set()
    shown = [(_head(rows, key), _settings_cells(rows, key)) for key in different]
    for column in COLUMNS:
        if column.key not in idle:
            shown.append((_in_words(column, unit), [column.show(row.figures[column.key]) for row in rows]))
    # What tells the runs apart stands beside their names, unless it is long or in the names already.
    beside = (MAIN_SETTING, OTHER_SETTING)
    shown.sort(key=lambda column_and_cells: -1 if (rank := column_and_cells[0].rank) in beside else rank)
    columns = [column for column, _ in shown]
    lines = [
        (row.figures["accuracy"], Line(row.name, [cells[i] for _, cells in shown], False)) for i, row in enumerate(rows)
    ]
    for name, share in baselines.items():
        cells = [percent(share) if column.read is _ACCURACY.read else "" for column in columns]
        lines.append((share, Line(name, cells, True)))
    lines.sort(key=lambda line: (line[0] is None, -(line[0] or 0)))
    return columns, [line for _, line in lines]


def fit(columns: Sequence[Column], lines: Sequence[Line], width: int) -> tuple[Table, list[str]]:
    """As many columns as a terminal is wide enough for, and the labels of those that had to go and are missed."""
    runs = short_names([line.name for line in lines if not line.is_baseline], max(_MAX_CELL, width // 3))
    short = iter(runs)
    names = [line.name if line.is_baseline else next(short) for line in lines]
    cells = [short_names([line.cells[i] for line in lines], _MAX_CELL) for i in range(len(columns))]
    widths = [max(map(cell_len, [*of, *column.label.split()])) for of, column in zip(cells, columns, strict=True)]
    # The names of the rules may break into lines: no run's figures shall give way to them.
    longest = max(_MIN_NAMES, *map(cell_len, runs))
    room = width - longest
    shown = []
    for i in sorted(range(len(columns)), key=lambda i: columns[i].rank):
        if widths[i] + 2 <= room:
            room -= widths[i] + 2
            shown.append(i)
    shown.sort()
    table = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style="bold")
    table.add_column("Run", width=longest)
    for i in shown:
        table.add_column(Text(columns[i].label), justify="left" if columns[i].is_text else "right", width=widths[i])
    for j, (line, name) in enumerate(zip(lines, names, strict=True)):
        table.add_row(*map(Text, (name, *(cells[i][j] for i in shown))), style="dim" if line.is_baseline else "")
    return table, [column.label for i, column in enumerate(columns) if i not in shown and column.rank != IN_THE_NAME]


def _in_words(column: Column, unit: Unit) -> Column:
    label = column.label.format(unit).strip()
    return column._replace(label=label[:1].upper() + label[1:], unit=column.unit.format(unit))


def _head(rows: Sequence[Row], key: str) -> Column:
    if all(str(row.settings.get(key)) in re.split("[,=/]", row.name) for row in rows):
        rank = IN_THE_NAME
    elif key == "loss":
        rank = LOSS_SETTINGS
    else:
        rank = MAIN_SETTING if place(key) < len(MAIN_SETTINGS) else OTHER_SETTING
    return Column(key, "loss settings" if key == "loss" else key, rank=rank, is_text=True)


def _settings_cells(rows: Sequence[Row], key: str) -> list[str]:
    if key == "loss":
        return [loss_text(row.loss, row.method) for row in rows]
    texts = [setting_text(row.settings.get(key)) for row in rows]
    short = [without_paths(text) for text in texts]
    return short if len(set(short)) == len(set(texts)) else texts

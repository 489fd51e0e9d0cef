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

_MAX_CELL = 26


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
    columns = [_in_words(column, unit) for column in COLUMNS if column.key not in idle]
    settings = {key: _settings_cells(rows, key) for key in different}
    lines = []
    for i, row in enumerate(rows):
        cells = [column.show(row.figures[column.key]) for column in columns]
        lines.append((row.figures["accuracy"], Line(row.name, [*(of[i] for of in settings.values()), *cells], False)))
    for name, share in baselines.items():
        cells = [percent(share) if column.key == "accuracy" else "" for column in columns]
        lines.append((share, Line(name, [*("" for _ in settings), *cells], True)))
    lines.sort(key=lambda line: (line[0] is None, -(line[0] or 0)))
    heads = [Column(key, key, rank=_rank(rows, key), is_text=True) for key in settings]
    return [*heads, *columns], [line for _, line in lines]


def fit(columns: Sequence[Column], lines: Sequence[Line], width: int) -> tuple[Table, list[str]]:
    """As many columns as a terminal is wide enough for, and the labels of those that had to go."""
    short = iter(short_names([line.name for line in lines if not line.is_baseline], max(_MAX_CELL, width // 3)))
    names = [line.name if line.is_baseline else next(short) for line in lines]
    cells = [short_names([line.cells[i] for line in lines], _MAX_CELL) for i in range(len(columns))]
    widths = [max(map(cell_len, [*of, *column.label.split()])) for of, column in zip(cells, columns, strict=True)]
    room = width - max(map(cell_len, names))
    shown = []
    for i in sorted(range(len(columns)), key=lambda i: columns[i].rank):
        if widths[i] + 2 <= room:
            room -= widths[i] + 2
            shown.append(i)
    shown.sort()
    table = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style="bold")
    table.add_column("Run", no_wrap=True)
    for i in shown:
        table.add_column(Text(columns[i].label), justify="left" if columns[i].is_text else "right", width=widths[i])
    for j, (line, name) in enumerate(zip(lines, names, strict=True)):
        table.add_row(*map(Text, (name, *(cells[i][j] for i in shown))), style="dim" if line.is_baseline else "")
    return table, [column.label for i, column in enumerate(columns) if i not in shown]


def _in_words(column: Column, unit: Unit) -> Column:
    label = column.label.format(unit).strip()
    return column._replace(label=label[:1].upper() + label[1:], unit=column.unit.format(unit))


def _rank(rows: Sequence[Row], key: str) -> int:
    if all(str(row.settings.get(key)) in re.split("[,=/]", row.name) for row in rows):
        return IN_THE_NAME
    if key == "loss":
        return LOSS_SETTINGS
    return MAIN_SETTING if place(key) < len(MAIN_SETTINGS) else OTHER_SETTING


def _settings_cells(rows: Sequence[Row], key: str) -> list[str]:
    if key == "loss":
        return [loss_text(row.loss, row.method) for row in rows]
    texts = [setting_text(row.settings.get(key)) for row in rows]
    short = [without_paths(text) for text in texts]
    return short if len(set(short)) == len(set(texts)) else texts

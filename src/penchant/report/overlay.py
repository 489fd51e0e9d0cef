"""The curves of several runs laid over each other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from penchant.report.charts import Line, line_chart, swatch
from penchant.report.curves import CURVES, MAX_TABLE_ROWS, Curve, value_table
from penchant.report.figures import number
from penchant.report.rundir import HELD_OUT
from penchant.report.series import Series
from penchant.report.units import Unit

MOST_RUNS = 8
"""More lines than that nobody can tell apart."""

_NOT_COMPARED = {"Learning rate", "Gradient norm", "Entropy"}

Metrics = Mapping[str, Series]


def overlaid_curves(
    runs: Sequence[tuple[str, Metrics]], unit: Unit, max_rows: int = MAX_TABLE_ROWS
) -> list[dict[str, Any]]:
    """One chart for each measurement that any of the runs has, a line for each run; at most MOST_RUNS of them.

    Where a measurement was made on held-out examples by any run, only those are drawn, else those of training.
    """
    shown = runs[:MOST_RUNS]
    charts = []
    for curve in CURVES:
        if curve.title not in _NOT_COMPARED:
            for metric, side in curve.metrics:
                title = curve.title if len(curve.metrics) == 1 else f"{curve.title}: {getattr(unit, side) or side}"
                charts.append(_overlay(shown, curve, metric, title, unit, max_rows))
    return [chart for chart in charts if chart is not None]


def _overlay(
    runs: Sequence[tuple[str, Metrics]], curve: Curve, metric: str, title: str, unit: Unit, max_rows: int
) -> dict[str, Any] | None:
    is_held_out = any(HELD_OUT + metric in metrics for _, metrics in runs)
    key = HELD_OUT + metric if is_held_out else metric
    lines = [
        Line(name, metrics[key].scaled(curve.factor), f"run-{place}", marked=is_held_out)
        for place, (name, metrics) in enumerate(runs)
        if key in metrics and metrics[key].finite
    ]
    if not lines:
        return None
    name = "over-" + re.sub(r"\W+", "-", title.lower())
    rows, num_rows = value_table(lines, max_rows)
    told = ", ".join(filter(None, ("held-out" if is_held_out else "training", curve.unit.format(unit))))
    return {
        "name": name,
        "title": title,
        "unit": told,
        "svg": Markup(line_chart(name, title, lines)),
        "legend": [(Markup(swatch(line.kind, line.marked)), line.label, number(line.series.last)) for line in lines],
        "columns": ["step", *(line.label for line in lines)],
        "rows": rows,
        "num_rows": num_rows,
        "num_gaps": sum(value is None for line in lines for _, value in line.series.points),
    }

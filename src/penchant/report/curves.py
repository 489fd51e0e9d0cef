"""What was measured over the steps: every curve a chart and a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from penchant.report import verdict
from penchant.report.charts import Baseline, Line, line_chart, swatch
from penchant.report.figures import Number, number
from penchant.report.rundir import HELD_OUT, RunRecord
from penchant.report.series import Series, spread_evenly
from penchant.report.units import Unit, common

MAX_TABLE_ROWS = 200


@dataclass(frozen=True)
class Curve:
    """What one chart of the report shows over the steps, and its unit, in which `{0}` is what the examples are.

    A metric comes with the side of the examples it is about, "first" or "last", if it is about one.
    """

    title: str
    unit: str
    metrics: tuple[tuple[str, str], ...]
    factor: Number = 1.0


CURVES = (
    Curve("Loss", "mean over {0.plural}", (("loss", ""),)),
    Curve("Accuracy", "% of {0.couples} with the {0.better} one ahead", ((verdict.ACCURACY, ""),), 100),
    Curve("Reward margin", "{0.first} minus {0.last}", (("rewards/margins", ""),)),
    Curve("Rewards", "mean over {0.plural}", (("rewards/chosen", "first"), ("rewards/rejected", "last"))),
    Curve("Log-probabilities", "nats per completion", (("logps/chosen", "first"), ("logps/rejected", "last"))),
    Curve("KL to the reference", "nats per token", (("kl", ""),)),
    Curve("Entropy", "nats per token", (("entropy", ""),)),
    Curve("Lengths", "tokens per completion", (("length/chosen", "first"), ("length/rejected", "last"))),
    Curve("Score of held-out answers", "mean of the judge's scores", (("score", ""),)),
    Curve("Wins of held-out answers", "% against those before training", (("win_rate", ""),), 100),
    Curve("KL of held-out answers", "nats per completion, on the policy's own answers", (("answer_kl", ""),)),
    Curve("Length of held-out answers", "tokens", (("answer_length", ""),)),
    Curve("Score of the answers trained on", "mean of the judge's scores", (("samples/score", ""),)),
    Curve("Length of the answers trained on", "tokens", (("samples/length", ""),)),
    Curve("Ended by themselves", "% of the answers trained on", (("samples/finished", ""),), 100),
    Curve("KL of the answers trained on", "nats per completion, from the reference", (("samples/kl", ""),)),
    Curve("All answers alike", "% of the prompts, which teach nothing", (("samples/undecided", ""),), 100),
    Curve("Foreseen by the value head", "share of the returns' variance", (("samples/explained", ""),)),
    Curve("Error of the value head", "half the square, per token", (("value_error", ""),)),
    Curve("Clipped tokens", "% that teach nothing any more", (("clipped", ""),), 100),
    Curve("KL to the policy that sampled", "nats per token", (("old_kl", ""),)),
    Curve("Learning rate", "", (("learning_rate", ""),)),
    Curve("Gradient norm", "before clipping", (("grad_norm", ""),)),
)


def drawn_curves(run: RunRecord, max_rows: int = MAX_TABLE_ROWS) -> list[dict[str, Any]]:
    """Everything that was measured as charts, each with a table of at most `max_rows`."""
    unit = common([run.unit("train"), run.unit("eval")])
    shown = {name for curve in CURVES for name, _ in curve.metrics} | {"tokens_per_s"}
    others = sorted({name.removeprefix(HELD_OUT) for name in run.metrics} - shown)
    curves = [*CURVES, *(Curve(name, "", ((name, ""),)) for name in others)]
    return [drawn for curve in curves if (drawn := _curve(run, curve, unit, max_rows))]


def _curve(run: RunRecord, curve: Curve, unit: Unit, max_rows: int) -> dict[str, Any] | None:
    lines = _lines(run, curve)
    if not any(line.series.finite for line in lines):
        return None
    baselines = _length_baselines(run) if curve.metrics[0][0] == verdict.ACCURACY else []
    rows, num_rows = value_table(lines, max_rows)
    legend = [(Markup(swatch(line.kind, line.marked)), line.label, number(line.series.last)) for line in lines]
    legend += [(Markup(swatch("base")), base.label, number(base.value)) for base in baselines]
    num_gaps = sum(value is None for line in lines for _, value in line.series.points)
    name = "curve-" + re.sub(r"\W+", "-", curve.title.lower())
    return {
        "name": name,
        "title": curve.title,
        "unit": curve.unit.format(unit),
        "svg": Markup(line_chart(name, curve.title, lines, baselines)),
        "legend": legend,
        "columns": ["step", *(line.label for line in lines)],
        "rows": rows,
        "num_rows": num_rows,
        "num_gaps": num_gaps,
    }


def _lines(run: RunRecord, curve: Curve) -> list[Line]:
    """Colour and dash tell first from last where both are there, else training from held-out; marks: held-out."""
    lines = []
    for i, (metric, side) in enumerate(curve.metrics):
        for prefix, split, of in (("", "training", "train"), (HELD_OUT, "held-out", "eval")):
            series: Series = run.series(prefix + metric)
            if series.points:
                label = getattr(run.unit(of), side) if side else ""
                second = i == 1 if label else bool(prefix)
                full_label = f"{label}, {split}" if label and prefix else label or split
                lines.append(
                    Line(full_label, series.scaled(curve.factor), "second" if second else "first", bool(prefix))
                )
    return lines


def _length_baselines(run: RunRecord) -> list[Baseline]:
    share = verdict.longer_wins(run)
    if share is None:
        return []
    added = run.unit("eval").ends_only
    baselines = [Baseline(f"longer one wins{added}", 100 * share)]
    if share < 0.5:
        baselines.append(Baseline(f"shorter one wins, at most{added}", 100 * (1 - share)))
    return baselines


def value_table(lines: Sequence[Line], max_rows: int) -> tuple[list[list[str]], int]:
    """At most so many rows of the curves, and how many there are; held-out rows are rare and thinned apart."""
    columns = [dict(line.series.points) for line in lines]
    rare = sorted({step for line, column in zip(lines, columns, strict=True) if line.marked for step in column})
    all_steps = sorted({step for column in columns for step in column})
    kept = spread_evenly(rare, max_rows // 3 if len(rare) < len(all_steps) else max_rows)
    rest = sorted(set(all_steps) - set(rare))
    kept = sorted({*kept, *spread_evenly(rest, max_rows - len(kept))})
    rows = [[number(step), *(_cell(column, step) for column in columns)] for step in kept]
    return rows, len(all_steps) + max(line.series.num_left_out for line in lines)


def _cell(column: Mapping[Number, Number | None], step: Number) -> str:
    if step not in column:
        return ""
    value = column[step]
    return "not finite" if value is None else number(value)

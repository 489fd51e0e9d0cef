"""The report: what a run directory holds, assembled into one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from penchant.disk import write_text
from penchant.report import verdict
from penchant.report.charts import Baseline, Line, line_chart, swatch
from penchant.report.figures import Number, duration, magnitude, number, percent, size
from penchant.report.judgements import judgements
from penchant.report.render import clip, render_page
from penchant.report.rundir import HELD_OUT, RunRecord, as_mapping, read_run
from penchant.report.series import Series, finite, spread_evenly
from penchant.report.settings import loss_doc, loss_text
from penchant.report.units import Unit, common, unit_of

MAX_TABLE_ROWS = 200
MAX_ITEMS = 40
MAX_EVENTS = 200


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


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into the run directory from whatever is there, and returns its path.

    Raises:
        UserError: there is no such directory.
    """
    run_dir = Path(run_dir)
    report = run_dir / "report.html"
    write_text(report, _render(read_run(run_dir)))
    return report


def _render(run: RunRecord) -> str:
    return render_page(
        "report.html.j2",
        run=run,
        unit=run.unit("eval"),
        headline=verdict.headline(run),
        details=verdict.details(run),
        figures=_key_figures(run),
        setup=_setup(run.summary),
        curves=_curves(run),
        judgements=judgements(run),
        samples=run.samples[:MAX_ITEMS],
        scored=_scored,
        parts=[part for split, title in _SPLITS.items() if (part := _data_part(run.part(split), title))],
        events=_events(run.events),
        origin=_origin(run.summary),
    )


_SPLITS = {"train": "Training", "eval": "Held-out"}
_JUDGED = (
    ("Score of held-out answers", "score", "score_before"),
    ("Gain in score", "difference", ""),
    ("Win rate against before", "win_rate", ""),
)
_SEVERITIES = ("info", "warn", "major", "stop")


def _key_figures(run: RunRecord) -> list[tuple[str, str, str]]:
    """Label, value and a small remark for each figure that is known."""
    summary = run.summary
    accuracy = verdict.held_out_accuracy(run)
    found = []
    for label, name, before_name in _JUDGED:
        if (estimate := verdict.judged(run, name)) is not None:
            ends = f"95% interval {number(estimate.low)} to {number(estimate.high)}"
            earlier = verdict.judged(run, before_name)
            found.append(
                (label, number(estimate.value), ends + (f", before {number(earlier.value)}" if earlier else ""))
            )
    if accuracy is not None:
        spread = " to ".join(percent(end) for end in accuracy.interval) if accuracy.interval else ""
        found.append(("Held-out accuracy", percent(accuracy.after), f"95% interval {spread}" if spread else ""))
    if (share := verdict.longer_wins(run)) is not None:
        found.append(("Longer one wins", percent(share), f"the accuracy of length alone{run.unit('eval').ends_only}"))
    for label, name in (("Held-out loss", "loss"), ("Held-out margin", "rewards/margins"), ("Held-out KL", "kl")):
        measured = verdict.change(run, name)
        if measured.after is not None:
            before = "" if measured.before is None else f"before training {number(measured.before)}"
            found.append((label, number(measured.after), before))
    known: list[tuple[str, str, str, Callable[[Number | None], str]]] = [
        ("Steps", "steps", "", number),
        (f"{run.unit('train').seen or run.unit('train').plural} seen".capitalize(), "examples_seen", "", number),
        ("Time", "wall_s", "", duration),
        ("Speed", "tokens_per_s", "tokens per second", number),
        ("Peak memory", "peak_memory_bytes", "", size),
        ("Parameters", "num_parameters", _trainable(summary), magnitude),
    ]
    for label, key, remark, show in known:
        value = finite(summary.get(key))
        if value is not None:
            found.append((label, show(value), remark))
    return found


def _scored(score: Any) -> str:
    """What stands behind the heading of an answer that a judge gave a score."""
    value = finite(score)
    return "" if value is None else f" (score {number(value)})"


def _trainable(summary: Mapping[str, Any]) -> str:
    trained, total = finite(summary.get("num_trainable")), finite(summary.get("num_parameters"))
    if trained is None:
        return ""
    return "all trained" if trained == total else f"{magnitude(trained)} trained"


def _setup(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = ("Model", "model"), ("Method", "method"), ("Loss", "loss"), ("Equation", "loss_doc"), ("Judge", "judge")
    more = ("Reference", "reference"), ("Layout", "layout"), ("Device", "device"), ("Precision", "dtype")
    told = {
        **summary,
        "loss": loss_text(as_mapping(summary.get("loss"))),
        "loss_doc": loss_doc(summary),
        "judge": as_mapping(summary.get("judge")).get("description"),
    }
    return _known(told, (*names, *more, ("Started", "started"), ("Status", "status")))


def _origin(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = sorted(as_mapping(summary.get("versions")).items(), key=lambda item: (item[0] != "penchant", item[0]))
    hashes = _known(summary, (("Model SHA-256", "model_sha256"), ("Data SHA-256", "data_sha256")))
    return [(name, str(version)) for name, version in versions] + hashes


def _known(summary: Mapping[str, Any], names: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(label, str(summary[key])) for label, key in names if summary.get(key) not in (None, "", {}, [])]


def _curves(run: RunRecord) -> list[dict[str, Any]]:
    unit = common([run.unit("train"), run.unit("eval")])
    shown = {name for curve in CURVES for name, _ in curve.metrics} | {"tokens_per_s"}
    others = sorted({name.removeprefix(HELD_OUT) for name in run.metrics} - shown)
    curves = [*CURVES, *(Curve(name, "", ((name, ""),)) for name in others)]
    return [drawn for i, curve in enumerate(curves) if (drawn := _curve(run, curve, f"curve-{i}", unit))]


def _curve(run: RunRecord, curve: Curve, name: str, unit: Unit) -> dict[str, Any] | None:
    lines = _lines(run, curve)
    if not any(line.series.finite for line in lines):
        return None
    baselines = _length_baselines(run) if curve.metrics[0][0] == verdict.ACCURACY else []
    rows, num_rows = _table(lines)
    legend = [(Markup(swatch(line.kind, line.marked)), line.label, number(line.series.last)) for line in lines]
    legend += [(Markup(swatch("base")), base.label, number(base.value)) for base in baselines]
    num_gaps = sum(value is None for line in lines for _, value in line.series.points)
    return {
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


def _table(lines: Sequence[Line]) -> tuple[list[list[str]], int]:
    """At most about 200 rows of the curves, and how many there are; held-out rows are rare and thinned apart."""
    columns = [dict(line.series.points) for line in lines]
    rare = sorted({step for line, column in zip(lines, columns, strict=True) if line.marked for step in column})
    all_steps = sorted({step for column in columns for step in column})
    kept = spread_evenly(rare, MAX_TABLE_ROWS // 3)
    rest = sorted(set(all_steps) - set(rare))
    kept = sorted({*kept, *spread_evenly(rest, MAX_TABLE_ROWS - len(kept))})
    rows = [[number(step), *(_cell(column, step) for column in columns)] for step in kept]
    return rows, len(all_steps)


def _cell(column: Mapping[Number, Number | None], step: Number) -> str:
    if step not in column:
        return ""
    value = column[step]
    return "not finite" if value is None else number(value)


def _data_part(found: Mapping[str, Any], title: str) -> dict[str, Any] | None:
    if not found:
        return None
    unit = unit_of(found)
    used, desirable, rows, longer = (finite(found.get(key)) for key in ("used", "desirable", "rows", "longer_wins"))
    lengths = as_mapping(found.get("lengths"))
    examples = found.get("examples")
    return {
        "title": f"{title} {unit.plural}",
        "facts": [
            (label, text)
            for label, text in (
                ("File", clip(found.get("path"))),
                ("Rows", number(rows) if rows is not None else ""),
                ("Used", unit.counted(used, "") if used is not None else ""),
                ("Desirable", percent(desirable / used) if desirable is not None and used and unit.first else ""),
                ("Longer one wins", percent(longer) + unit.ends_only if longer is not None else ""),
            )
            if text
        ],
        "families": counts(found.get("families")),
        "dropped": counts(found.get("dropped")),
        "examples": [clip(example, 500) for example in examples[:MAX_ITEMS]] if isinstance(examples, list) else [],
        "checks": _checks(found.get("checks")),
        "lengths": [
            (
                clip(which, 100),
                *(number(finite(as_mapping(lengths.get(which)).get(key))) for key in ("mean", "median", "max")),
            )
            for which in list(lengths)[:MAX_ITEMS]
        ],
    }


def _checks(found: Any) -> list[dict[str, Any]]:
    """What the data doctor said, in its order."""
    checks = [as_mapping(check) for check in found[:MAX_ITEMS]] if isinstance(found, list) else []
    return [
        {
            "severity": check.get("severity") if check.get("severity") in _SEVERITIES else "info",
            **{key: clip(check.get(key), 2000) for key in ("code", "name", "message", "fix")},
            "rows": [clip(row, 300) for row in check["rows"]] if isinstance(check.get("rows"), list) else [],
        }
        for check in checks
    ]


def counts(found: Any) -> list[tuple[str, str]]:
    """Names and how often each occurs, the most frequent first."""
    known = [(name, finite(count) or 0) for name, count in as_mapping(found).items()]
    return [(clip(name, 200), number(count)) for name, count in sorted(known, key=lambda item: -item[1])[:MAX_ITEMS]]


def _events(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events in their order; of very many, the serious ones stay, then the latest."""
    rank = {"stop": 0, "major": 1, "warn": 2}
    order = sorted(
        range(len(events)), key=lambda i: (rank.get(str(events[i].get("severity")), 3), -i)
    )  # by weight, then latest first
    shown = [events[i] for i in sorted(order[:MAX_EVENTS])]
    return [
        {
            "step": number(finite(event.get("step"))),
            "severity": event.get("severity") if event.get("severity") in _SEVERITIES else "info",
            "code": clip(event.get("code"), 100),
            "message": clip(event.get("message"), 2000),
        }
        for event in shown
    ]

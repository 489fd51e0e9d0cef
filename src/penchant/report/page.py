"""The report: what a run directory holds, assembled into one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from penchant.disk import write_text
from penchant.report import verdict
from penchant.report.curves import drawn_curves
from penchant.report.figures import Number, duration, magnitude, number, percent, size
from penchant.report.judgements import judgements
from penchant.report.render import clip, render_page
from penchant.report.rundir import RunRecord, as_mapping, read_run
from penchant.report.series import finite
from penchant.report.settings import loss_doc, loss_text
from penchant.report.units import unit_of

MAX_ITEMS = 40
MAX_EVENTS = 200


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into the run directory from whatever is there, and returns its path.

    Raises:
        UserError: there is no such directory.
    """
    run_dir = Path(run_dir)
    report = run_dir / "report.html"
    write_text(report, render_report(read_run(run_dir)))
    return report


def render_report(run: RunRecord) -> str:
    """The report of a run as HTML."""
    return render_page(
        "report.html.j2",
        run=run,
        unit=run.unit("eval"),
        headline=verdict.headline(run),
        details=verdict.details(run),
        figures=key_figures(run),
        setup=setup_facts(run.summary),
        curves=drawn_curves(run),
        judgements=judgements(run),
        samples=run.samples[:MAX_ITEMS],
        scored=scored,
        parts=[part for split, title in _SPLITS.items() if (part := _data_part(run.part(split), title))],
        events=shown_events(run.events),
        origin=_origin(run.summary),
    )


_SPLITS = {"train": "Training", "eval": "Held-out"}
_JUDGED = (
    ("Score of held-out answers", "score", "score_before"),
    ("Gain in score", "difference", ""),
    ("Win rate against before", "win_rate", ""),
)
_SEVERITIES = ("info", "warn", "major", "stop")


def key_figures(run: RunRecord) -> list[tuple[str, str, str]]:
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


def scored(score: Any) -> str:
    """What stands behind the heading of an answer that a judge gave a score."""
    value = finite(score)
    return "" if value is None else f" (score {number(value)})"


def _trainable(summary: Mapping[str, Any]) -> str:
    trained, total = finite(summary.get("num_trainable")), finite(summary.get("num_parameters"))
    if trained is None:
        return ""
    return "all trained" if trained == total else f"{magnitude(trained)} trained"


def setup_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was trained how, by label."""
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


def shown_events(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
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

"""The report: what a run directory holds, assembled into one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from penchant.report import verdict
from penchant.report.charts import Baseline, Group, Line, histogram, line_chart, swatch
from penchant.report.figures import Number, duration, magnitude, number, percent, size
from penchant.report.rundir import HELD_OUT, PairRewards, RunRecord, as_mapping, read_run, write_whole
from penchant.report.series import Series, finite, spread_evenly

HERE = Path(__file__).parent
MAX_TABLE_ROWS = 200
MAX_ITEMS = 40
MAX_EVENTS = 200
MAX_CHARACTERS = 4000


@dataclass(frozen=True)
class Curve:
    """What one chart of the report shows: (metric, label) pairs over the steps, and the unit in words."""

    title: str
    unit: str
    metrics: tuple[tuple[str, str], ...]
    factor: Number = 1.0


CURVES = (
    Curve("Loss", "mean over pairs", (("loss", ""),)),
    Curve("Accuracy", "% of pairs with the chosen one ahead", ((verdict.ACCURACY, ""),), 100),
    Curve("Reward margin", "chosen minus rejected", (("rewards/margins", ""),)),
    Curve("Rewards", "mean over pairs", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    Curve("Log-probabilities", "nats per completion", (("logps/chosen", "chosen"), ("logps/rejected", "rejected"))),
    Curve("KL to the reference", "nats per token", (("kl", ""),)),
    Curve("Entropy", "nats per token", (("entropy", ""),)),
    Curve("Lengths", "tokens per completion", (("length/chosen", "chosen"), ("length/rejected", "rejected"))),
    Curve("Learning rate", "", (("learning_rate", ""),)),
    Curve("Gradient norm", "before clipping", (("grad_norm", ""),)),
)


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into the run directory from whatever is there, and returns its path.

    Raises:
        UserError: there is no such directory.
    """
    run_dir = Path(run_dir)
    return write_whole(run_dir / "report.html", _render(read_run(run_dir)))


def _render(run: RunRecord) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=number, clip=clip)
    css = (HERE / "report.css").read_text(encoding="utf-8")
    # The policy names this very style sheet by its hash; nothing else may style, run or load.
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        run=run,
        css=Markup(css),
        css_hash=digest,
        headline=verdict.headline(run),
        details=verdict.details(run),
        figures=_key_figures(run),
        setup=_setup(run.summary),
        curves=_curves(run),
        pairs=_pairs(run),
        samples=run.samples[:MAX_ITEMS],
        parts=[part for split, title in _SPLITS.items() if (part := _data_part(run.part(split), title))],
        events=_events(run.events),
        origin=_origin(run.summary),
    )


_SPLITS = {"train": "Training pairs", "eval": "Held-out pairs"}


def clip(value: Any, limit: int = MAX_CHARACTERS) -> str:
    """A text, or the messages of a conversation as text, cut after `limit` characters with a note of what is gone."""
    if isinstance(value, list):
        turns = [as_mapping(turn) for turn in value]
        value = "\n\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)
    text = "" if value is None else str(value)
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({number(len(text) - limit)} more characters)"


def _key_figures(run: RunRecord) -> list[tuple[str, str, str]]:
    """Label, value and a small remark for each figure that is known."""
    summary = run.summary
    accuracy = verdict.held_out_accuracy(run)
    found = []
    if accuracy is not None:
        spread = " to ".join(percent(end) for end in accuracy.interval) if accuracy.interval else ""
        found.append(("Held-out accuracy", percent(accuracy.after), f"95% interval {spread}" if spread else ""))
    if (share := verdict.longer_wins(run)) is not None:
        found.append(("Longer one wins", percent(share), "the accuracy of length alone"))
    for label, name in (("Held-out loss", "loss"), ("Held-out margin", "rewards/margins"), ("Held-out KL", "kl")):
        measured = verdict.change(run, name)
        if measured.after is not None:
            before = "" if measured.before is None else f"before training {number(measured.before)}"
            found.append((label, number(measured.after), before))
    known: list[tuple[str, str, str, Callable[[Number | None], str]]] = [
        ("Steps", "steps", "", number),
        ("Pairs seen", "pairs_seen", "", number),
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


def _trainable(summary: Mapping[str, Any]) -> str:
    trained, total = finite(summary.get("num_trainable")), finite(summary.get("num_parameters"))
    if trained is None:
        return ""
    return "all trained" if trained == total else f"{magnitude(trained)} trained"


def _setup(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = ("Model", "model"), ("Method", "method"), ("Loss", "loss"), ("Equation", "loss_doc")
    more = ("Reference", "reference"), ("Layout", "layout"), ("Device", "device"), ("Precision", "dtype")
    return _known(summary, (*names, *more, ("Started", "started"), ("Status", "status")))


def _origin(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = sorted(as_mapping(summary.get("versions")).items(), key=lambda item: (item[0] != "penchant", item[0]))
    hashes = _known(summary, (("Model SHA-256", "model_sha256"), ("Data SHA-256", "data_sha256")))
    return [(name, str(version)) for name, version in versions] + hashes


def _known(summary: Mapping[str, Any], names: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(label, _plain(summary[key])) for label, key in names if summary.get(key) not in (None, "", {}, [])]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        fields = [f"{key} = {item if isinstance(item, str) else json.dumps(item)}" for key, item in value.items()]
        return ", ".join(fields).removeprefix("name = ")
    return str(value)


def _curves(run: RunRecord) -> list[dict[str, Any]]:
    shown = {name for curve in CURVES for name, _ in curve.metrics} | {"tokens_per_s"}
    others = sorted({name.removeprefix(HELD_OUT) for name in run.metrics} - shown)
    curves = [*CURVES, *(Curve(name, "", ((name, ""),)) for name in others)]
    return [drawn for i, curve in enumerate(curves) if (drawn := _curve(run, curve, f"curve-{i}"))]


def _curve(run: RunRecord, curve: Curve, name: str) -> dict[str, Any] | None:
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
        "unit": curve.unit,
        "svg": Markup(line_chart(name, curve.title, lines, baselines)),
        "legend": legend,
        "columns": ["step", *(line.label for line in lines)],
        "rows": rows,
        "num_rows": num_rows,
        "num_gaps": num_gaps,
    }


def _lines(run: RunRecord, curve: Curve) -> list[Line]:
    """Colour and dash tell chosen from rejected where both are there, else training from held-out; marks: held-out."""
    lines = []
    for i, (metric, label) in enumerate(curve.metrics):
        for prefix, split in (("", "training"), (HELD_OUT, "held-out")):
            series: Series = run.series(prefix + metric)
            if series.points:
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
    baselines = [Baseline("longer one wins", 100 * share)]
    if share < 0.5:
        baselines.append(Baseline("shorter one wins, at most", 100 * (1 - share)))
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


def _pairs(run: RunRecord) -> dict[str, Any] | None:
    split = next((split for split in ("eval", "train") if split in run.pairs), None)
    if split is None:
        return None
    rewards = run.pairs[split]
    # Few pairs: no pair stands both among the most and among the least learned.
    num_shown = min(len(rewards.most), max(1, len(rewards.chosen) // 2))
    return {
        "split": _SPLITS[split].lower(),
        "count": len(rewards.chosen),
        "num_wrong": sum(margin <= 0 for margin in rewards.margins),
        "histograms": _histograms(run.pairs, rewards),
        "ends": [("Most learned", rewards.most[:num_shown]), ("Least learned", rewards.least[:num_shown])],
    }


def _histograms(pairs: Mapping[str, PairRewards], rewards: PairRewards) -> list[dict[str, Any]]:
    margins = [
        Group(label, pairs[split].margins, kind)
        for split, label, kind in (("train", "training", "first"), ("eval", "held-out", "second"))
        if split in pairs
    ]
    both = [Group("chosen", rewards.chosen, "first"), Group("rejected", rewards.rejected, "second")]
    charts = []
    for name, title, unit, groups in (
        ("hist-margin", "Reward margin", "chosen reward minus rejected reward", margins),
        ("hist-rewards", "Chosen and rejected rewards", "reward", both),
    ):
        svg, bins = histogram(name, title, unit, groups)
        charts.append(
            {
                "title": title,
                "unit": "share of pairs, %",
                "svg": Markup(svg),
                "legend": [
                    (Markup(swatch(g.kind, area=True)), g.label, f"{number(len(g.values))} pairs") for g in groups
                ],
                "columns": ["from", "to", *(group.label for group in groups)],
                "rows": [[number(b.low), number(b.high), *map(number, b.counts)] for b in bins],
                "num_rows": len(bins),
                "num_gaps": 0,
            }
        )
    return charts


def _data_part(found: Mapping[str, Any], title: str) -> dict[str, Any] | None:
    if not found:
        return None
    lengths = as_mapping(found.get("lengths"))
    examples = found.get("examples")
    return {
        "title": title,
        "facts": [
            (label, show(found.get(key)))
            for label, key, show in (
                ("File", "path", str),
                ("Rows", "rows", lambda value: number(finite(value))),
                ("Pairs used", "used", lambda value: number(finite(value))),
                ("Longer one wins", "longer_wins", lambda value: percent(finite(value))),
            )
            if found.get(key) is not None
        ],
        "families": counts(found.get("families")),
        "dropped": counts(found.get("dropped")),
        "examples": [clip(example, 500) for example in examples[:MAX_ITEMS]] if isinstance(examples, list) else [],
        "lengths": [
            (which, *(number(finite(as_mapping(lengths.get(which)).get(key))) for key in ("mean", "median", "max")))
            for which in ("prompt", "chosen", "rejected")
            if which in lengths
        ],
    }


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
            "severity": event.get("severity") if event.get("severity") in (*rank, "info") else "info",
            "code": clip(event.get("code"), 100),
            "message": clip(event.get("message"), 2000),
        }
        for event in shown
    ]

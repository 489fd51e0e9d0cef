"""What the model thinks of the examples after training: the section of the report, whatever the examples are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from penchant.report.charts import Group, histogram, swatch
from penchant.report.figures import number
from penchant.report.rundir import Extremes, RunRecord
from penchant.report.units import Unit

Row = Mapping[str, Any]

_KINDS = {"train": "training", "eval": "held-out"}
_LABELS = {True: "desirable", False: "undesirable", None: "unlabelled"}


def judgements(run: RunRecord) -> dict[str, Any] | None:
    """Rewards as histograms, and the examples worth reading; None when nothing was scored after training.

    Held-out examples go before training examples.
    """
    for split in ("eval", "train"):
        if split in run.pairs:
            return _of_pairs(run, split)
        if split in run.completions:
            return _of_completions(run, split)
    return None


def _of_pairs(run: RunRecord, split: str) -> dict[str, Any]:
    rewards, unit = run.pairs[split], run.unit(split)
    num_pairs = len(rewards.chosen)
    num_wrong = sum(margin <= 0 for margin in rewards.margins.values)
    # Few pairs: none stands both among the most and among the least learned.
    num_shown = max(1, num_pairs // 2)
    margins = [
        Group(_KINDS[of], run.pairs[of].margins.values, kind)
        for of, kind in (("train", "first"), ("eval", "second"))
        if of in run.pairs
    ]
    both = [Group(unit.first, rewards.chosen, "first"), Group(unit.last, rewards.rejected, "second")]
    title = f"{unit.first} and {unit.last} rewards".capitalize()
    return {
        "intro": f"The rewards of the {unit.first} and the {unit.last} completion of "
        f"{unit.counted(num_pairs, _KINDS[split])}. In {number(num_wrong)} of them the {unit.last} one still has the "
        "higher reward, or an equal one.",
        "charts": [
            _chart("margin", "Reward margin", f"{unit.first} reward minus {unit.last} reward", unit, margins),
            _chart("rewards", title, "reward", unit, both),
        ],
        "lists": [
            ("Most learned", "", _compared(rewards.margins.highest[:num_shown], unit)),
            (
                "Least learned",
                "A very negative margin often marks a wrong label: worth reading before the next run.",
                _compared(rewards.margins.lowest[:num_shown], unit),
            ),
        ],
    }


def _compared(rows: Sequence[Row], unit: Unit) -> list[dict[str, Any]]:
    sides = (("chosen", unit.first), ("rejected", unit.last))
    return [
        {
            "mark": f"margin {number(row['margin'])}",
            "texts": [
                (f"{word.capitalize()}, reward {number(row[f'{side}_reward'])}", row.get(side)) for side, word in sides
            ],
            **_origin(row),
        }
        for row in rows
    ]


def _of_completions(run: RunRecord, split: str) -> dict[str, Any]:
    rewards, unit = run.completions[split], run.unit(split)
    known = [(label, word, rewards[label]) for label, word in _LABELS.items() if label in rewards]
    num = sum(len(of_label.values) for *_, of_label in known)
    kinds = ", ".join(f"{number(len(of_label.values))} {word}" for _, word, of_label in known)
    looks = ("first", "second", "base")
    groups = [Group(word, of_label.values, look) for (_, word, of_label), look in zip(known, looks, strict=False)]
    return {
        "intro": f"The rewards of {unit.counted(num, _KINDS[split])}: {kinds}.",
        "charts": [_chart("rewards", "Rewards", "reward", unit, groups)],
        "lists": list(_suspicious(known)),
    }


def _suspicious(known: Sequence[tuple[bool | None, str, Extremes]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Desirable completions that the model dislikes the most, and undesirable ones that it likes the most."""
    for label, word, rewards in known:
        rows, which = (rewards.highest, "highest") if label is False else (rewards.lowest, "lowest")
        far = "high" if label is False else "low"
        hint = f"A very {far} reward may mark a wrong label: worth reading before the next run."
        shown = [
            {
                "mark": f"reward {number(row['reward'])}",
                "texts": [("Completion", row.get("completion"))],
                **_origin(row),
            }
            for row in rows
        ]
        yield f"{word.capitalize()}, with the {which} reward", "" if label is None else hint, shown


def _origin(row: Row) -> dict[str, Any]:
    return {"source": row.get("source"), "prompt": row.get("prompt")}


def _chart(name: str, title: str, axis: str, unit: Unit, groups: Sequence[Group]) -> dict[str, Any]:
    svg, bins = histogram(f"hist-{name}", title, axis, groups)
    legend = [
        (Markup(swatch(group.kind, area=True)), group.label, f"{number(len(group.values))} {unit.plural}")
        for group in groups
    ]
    return {
        "name": f"hist-{name}",
        "title": title,
        "unit": f"share of {unit.plural}, %",
        "svg": Markup(svg),
        "legend": legend,
        "columns": ["from", "to", *(group.label for group in groups)],
        "rows": [[number(b.low), number(b.high), *map(number, b.counts)] for b in bins],
        "num_rows": len(bins),
        "num_gaps": 0,
    }

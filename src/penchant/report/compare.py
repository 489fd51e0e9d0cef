"""Several runs side by side: what tells them apart, how well each did, and whether that can be compared at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from penchant.disk import write_text
from penchant.errors import UserError
from penchant.report.card import plain
from penchant.report.figures import Number, number, percent
from penchant.report.intervals import accuracy_chart
from penchant.report.overlay import MOST_RUNS, overlaid_curves
from penchant.report.render import render_page
from penchant.report.rows import Column, Row, row_of
from penchant.report.rundir import RunRecord, clean, read_run
from penchant.report.series import Series
from penchant.report.settings import MAIN_SETTINGS, place, setting_text
from penchant.report.table import Line, fit, lay_out
from penchant.report.units import EXAMPLE, UNITS, Unit, common


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, the most accurate first; those without a held-out accuracy last, by their scores."""

    rows: tuple[Row, ...]
    different: tuple[str, ...]
    """The settings in which the runs differ; `loss` stands for all under it where not all runs have the same ones."""
    same: dict[str, Any]
    """Those of MAIN_SETTINGS that are the same in all runs."""
    baselines: dict[str, Number]
    """The accuracies to be had without a model, by the rule that has them."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    metrics: tuple[Mapping[str, Series], ...] = field(default=(), repr=False)
    """What the first runs measured over their steps, for as many of them as one chart can show."""

    @property
    def unit(self) -> Unit:
        """What the held-out examples are."""
        return _unit(self.rows, "eval")

    @property
    def headline(self) -> str:
        """The outcome in one or two sentences."""
        first, *others = self.rows
        best = first.figures
        if best["accuracy"] is None and (judged := best["score"]) is not None:
            return (
                f"{first.name}{' comes first' if others else ''}: its answers to held-out prompts have a mean score of "
                f"{number(judged.value)} (95% interval {number(judged.low)} to {number(judged.high)})."
            )
        if best["accuracy"] is None:
            return f"No accuracy on held-out {self.unit.plural} after training is known of these runs."
        agreement = _unit([first], "eval").agreement(best["accuracy"], best["num_held_out"])
        said = f"{first.name}{' comes first' if others else ''}: {agreement}"
        if best["interval"] is None:
            return f"{said}."
        said += " (95% interval {} to {}).".format(*map(percent, best["interval"]))
        num_close = sum((other.figures["interval"] or (0, -1))[1] >= best["interval"][0] for other in others)
        if num_close:
            whose = "interval of 1 other run overlaps" if num_close == 1 else f"intervals of {num_close} others overlap"
            said += f" The {whose} with it, so the order among these may be chance."
        return said


def compare(run_dirs: Sequence[Path], read: Callable[[Path], RunRecord] = read_run) -> Comparison:
    """Reads the runs, finished or not; a directory given twice counts once.

    Raises:
        UserError: no directory is given, one is not there or holds no run, or a run file is not YAML.
    """
    paths = list({Path(run_dir).resolve(): Path(run_dir) for run_dir in run_dirs}.values())
    if not paths:
        raise UserError("compare: give at least one run directory.")
    for path in paths:
        if path.is_dir() and not (path / "run.yaml").is_file():
            raise UserError(f"'{path}' is no run directory: it holds no run.yaml.")
    # A run is called by as many last parts of its path as no other has.
    tails = [["/".join(path.parts[-n:]) for n in range(1, len(path.parts) + 1)] for path in map(Path.resolve, paths)]
    names = [next(tail for tail in own if sum(tail in other for other in tails) == 1) for own in tails]
    records = [read(path) for path in paths]
    found = [row_of(run, path, clean(name)) for run, path, name in zip(records, paths, names, strict=True)]
    order = sorted(range(len(found)), key=lambda i: _place(found[i]))
    rows, metrics = [found[i] for i in order], tuple(records[i].metrics for i in order[:MOST_RUNS])
    keys = sorted(dict.fromkeys(key for row in rows for key in row.settings), key=place)
    equal = [key for key in keys if all(row.settings.get(key) == rows[0].settings.get(key) for row in rows)]
    different = _settings_to_tell_apart(rows, [key for key in keys if key not in equal])
    named = [key for key in equal if place(key) < len(MAIN_SETTINGS) and key.partition(".")[0] not in different]
    same = {key: rows[0].settings[key] for key in named}
    notes = tuple(_notes(rows, different))
    warnings = tuple(_warnings(rows))
    return Comparison(tuple(rows), tuple(different), same, _baselines(rows), warnings, notes, metrics)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison in values that JSON knows; each run's figures stand beside its name."""
    told = asdict(replace(comparison, metrics=()))
    del told["metrics"]
    runs = [row | row.pop("figures") for row in told.pop("rows")]
    return {"headline": comparison.headline, "runs": runs, **told}


def as_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown; of absolute paths only the last part is told."""
    columns, lines = _table(comparison)
    table = [["run", *(", ".join(filter(None, (column.label, column.unit))) for column in columns)]]
    table += [[line.name, *line.cells] for line in lines]
    rows = ["| " + " | ".join(map(plain, row)) + " |" for row in table]
    rows.insert(1, "|---|" + "".join("---|" if column.is_text else "---:|" for column in columns))
    said = "\n".join(f"- {plain(sentence)}" for sentence in (*comparison.warnings, *comparison.notes))
    parts = (plain(comparison.headline), "\n".join(rows), plain(_same_text(comparison)), said)
    return "\n\n".join(filter(None, parts)) + "\n"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints as many columns as the console is wide enough for, and names those that had to go."""
    table, gone = fit(*_table(comparison), console.width)
    console.print(Text(comparison.headline), "", table, "", sep="\n")
    said = (f"No room for: {_listing(gone, limit=12)}." if gone else "", _same_text(comparison))
    for style, sentences in (("dim", said), ("yellow", comparison.warnings), ("dim", comparison.notes)):
        for sentence in filter(None, sentences):
            console.print(Text(sentence, style))


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Writes the comparison as one HTML file that needs nothing else, and returns its path.

    Raises:
        UserError: the file cannot be written there.
    """
    text = render_page("compare.html.j2", **page_parts(comparison))
    try:
        write_text(Path(path), text)
    except OSError as error:
        raise UserError(f"'{path}' cannot be written ({error.strerror}).") from None
    return Path(path)


def page_parts(comparison: Comparison) -> dict[str, Any]:
    """What a page shows of a comparison."""
    columns, lines = _table(comparison)
    runs = [(row.name, row.figures["accuracy"], row.figures["interval"]) for row in comparison.rows]
    series = list(zip([row.name for row in comparison.rows], comparison.metrics, strict=False))
    return {
        "comparison": comparison,
        "columns": columns,
        "lines": lines,
        "chart": accuracy_chart(runs, comparison.baselines, comparison.unit),
        "curves": overlaid_curves(series, comparison.unit),
        "curves_of": MOST_RUNS,
        "same": [(key, setting_text(value)) for key, value in comparison.same.items()],
    }


def _table(comparison: Comparison) -> tuple[list[Column], list[Line]]:
    return lay_out(comparison.rows, comparison.different, comparison.baselines, comparison.unit)


def _place(row: Row) -> tuple[Any, ...]:
    """By accuracy; runs without one by the judge's score of their answers."""
    accuracy, judged = row.figures["accuracy"], row.figures["score"]
    return (accuracy is None, -(accuracy or 0), judged is None, -(judged.value if judged else 0), row.name)


def _unit(rows: Iterable[Row], split: str) -> Unit:
    return common(UNITS[key] for row in rows if (key := row.units[split]) is not None)


def _settings_to_tell_apart(rows: Sequence[Row], different: Sequence[str]) -> list[str]:
    """What of `different` gets a column: all of the loss in one where the losses have different settings."""
    of_loss = [{key for key in row.settings if key.startswith("loss.")} for row in rows]
    if any(keys != of_loss[0] for keys in of_loss):
        return sorted([*(key for key in different if not key.startswith("loss.")), "loss"], key=place)
    return [key for key in different if key != "loss.name" or any(row.method != row.loss["name"] for row in rows)]


def _baselines(rows: Sequence[Row]) -> dict[str, Number]:
    shares = {round(share, 9) for row in rows if (share := row.figures["longer_wins"]) is not None}
    unit = _unit(rows, "eval")
    if len(shares) != 1 or unit is EXAMPLE:
        return {"chance": 0.5}
    (share,) = shares
    shorter = {f"shorter one wins, at most{unit.ends_only}": 1 - share} if share < 0.5 else {}
    return {"chance": 0.5, f"longer one wins{unit.ends_only}": share, **shorter}


def _warnings(rows: Sequence[Row]) -> Iterator[str]:
    held_out, trained = _unit(rows, "eval").plural, _unit(rows, "train").plural
    cut = _cut_otherwise(rows)
    for key, sentence in (
        (
            "eval",
            f"Not comparable: the held-out {held_out} are not the same ({{}}), so accuracies answer different "
            "questions.",
        ),
        ("model", "Not comparable: the runs did not start from the same model ({})."),
        ("train", f"The runs were not trained on the same {trained} ({{}})."),
    ):
        groups: dict[str, list[str]] = {}
        for row in rows:
            groups.setdefault(str(row.hashes[key] or ""), []).append(row.name)
        unknown = groups.pop("", [])
        if len(groups) > 1 and not (key == "train" and cut):
            yield sentence.format(f"{len(groups)} kinds: {_listing(map(_listing, groups.values()), '; ')}")
        if unknown and key == "eval" and len(rows) > 1:
            whose = f"the same {held_out} as the others: {_listing(unknown)}"
            yield f"It is not known whether these were held against {whose}."
    if any(_distances(own) for own in cut.values() or [rows]):
        yield f"The runs did not go equally far: {_distances(rows)}."
    statuses = [(row.name, row.figures["status"] or "not begun") for row in rows]
    if unfinished := [f"{name} ({status})" for name, status in statuses if status != "finished"]:
        yield f"Not finished, so these figures may change: {_listing(unfinished)}."


def _cut_otherwise(rows: Sequence[Row]) -> dict[Unit, list[Row]]:
    """The runs by what they were trained on, where all cut the same rows into one kind of example or another."""
    cut: dict[Unit, list[Row]] = {}
    for row in rows:
        cut.setdefault(_unit([row], "train"), []).append(row)
    same_rows = len({row.rows_from for row in rows}) == 1
    same_within = all(len({str(row.hashes["train"]) for row in own}) == 1 for own in cut.values())
    return cut if len(cut) > 1 and same_rows and same_within else {}


def _distances(rows: Sequence[Row]) -> str:
    """How far the runs went, where they did not go equally far."""
    told = []
    for key, unit in (("steps", "steps"), ("examples_seen", f"{_unit(rows, 'train').plural} seen")):
        counts = [row.figures[key] or 0 for row in rows]
        told += [f"{number(min(counts))} to {number(max(counts))} {unit}"] if min(counts) < max(counts) else []
    return " and ".join(told)


def _listing(names: Iterable[str], separator: str = ", ", limit: int = 4) -> str:
    found = list(names)
    return separator.join(found[:limit]) + (f" and {len(found) - limit} more" if len(found) > limit else "")


def _notes(rows: Sequence[Row], different: Sequence[str]) -> Iterator[str]:
    if cut := _cut_otherwise(rows):
        ways = " and ".join(f"as {unit.plural} ({_listing(row.name for row in own)})" for unit, own in cut.items())
        distances = _distances(rows)
        yield f"All learned from the same rows, taken {ways}{f': hence {distances}' if distances else ''}."
    if any(place(key) <= MAIN_SETTINGS.index("loss") for key in different):
        yield (
            "Different methods, and different settings of one, measure losses, rewards and margins in units of "
            "their own: across them only accuracy, KL and lengths can be compared."
        )
    free = [row.name for row in rows if row.has_reference is False]
    if free and any(row.has_reference for row in rows):
        yield (
            f"Without a reference ({_listing(free)}) a completion's reward is its likelihood, and accuracy begins "
            "where the model itself ranked the completions; with one it is what training changed. The two accuracies "
            "answer different questions."
        )
    held_out = _unit(rows, "eval").plural
    num_measured = sum(row.figures["interval"] is not None for row in rows)
    if num_measured > 1:
        yield (
            f"An interval tells how far an accuracy may be off because of the {held_out} that happened to be held out. "
            f"Runs held against the same {held_out} share much of that error, so overlap does not rule out a "
            "difference."
        )
    if num_measured > 4:
        yield f"The first of many runs is partly the luckiest: on new {held_out} expect less of it."


def _same_text(comparison: Comparison) -> str:
    told = ", ".join(f"{key} {setting_text(value)}" for key, value in comparison.same.items())
    return f"{'The same in all' if len(comparison.rows) > 1 else 'Settings'}: {told}." if told else ""

"""Several runs side by side: what tells them apart, how well each did, and whether that can be compared at all."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from penchant.config import parse_value
from penchant.errors import UserError
from penchant.report import verdict
from penchant.report.card import plain, without_paths
from penchant.report.figures import MISSING, Number, duration, number, percent, size
from penchant.report.intervals import accuracy_chart, short_names, span
from penchant.report.page import HERE, clip
from penchant.report.rundir import RunRecord, as_mapping, clean, read_run, write_whole
from penchant.report.series import finite

MAIN_SETTINGS = (
    *("method", "loss", "model", "data", "eval_data", "learning_rate", "batch_size", "num_train_epochs"),
    *("max_steps", "seed", "lora.rank", "max_length"),
)
"""The settings worth naming where all runs have the same; where runs differ, these come first."""


class Column(NamedTuple):
    """A column of the table. Where there is little room the one with the highest `rank` gives way first."""

    key: str
    label: str
    unit: str = ""
    rank: int = 0
    read: Callable[[RunRecord], Any] = lambda run: None
    show: Callable[[Any], str] = number
    is_text: bool = False


def _after(name: str) -> Callable[[RunRecord], Any]:
    return lambda run: verdict.change(run, name).after


def _of_accuracy(name: str) -> Callable[[RunRecord], Any]:
    return lambda run: getattr(verdict.held_out_accuracy(run), name, None)


def _of_summary(key: str) -> Callable[[RunRecord], Any]:
    return lambda run: finite(run.summary.get(key))


def _accuracy_before(run: RunRecord) -> Number | None:
    accuracy = verdict.held_out_accuracy(run)
    # The rewards of a model that is its own reference are zero, and that accuracy says nothing.
    return None if accuracy is None or accuracy.starts_at_reference else accuracy.before


def _chosen_logps_change(run: RunRecord) -> Number | None:
    logps = verdict.change(run, "logps/chosen")
    return None if logps.before is None or logps.after is None else logps.after - logps.before


def _answer_length(run: RunRecord) -> Number | None:
    lengths = [len(sample["after"]) for sample in run.samples if isinstance(sample.get("after"), str)]
    return sum(lengths) / len(lengths) if lengths else None


COLUMNS = (
    Column("status", "Status", "", 1, lambda run: run.summary.get("status"), lambda s: str(s or "not begun"), True),
    Column("accuracy", "Accuracy", "held-out", 0, _of_accuracy("after"), percent),
    Column("interval", "95% interval", "of the accuracy", 0, _of_accuracy("interval"), span),
    Column("num_held_out", "Held out", "pairs", 9, verdict.num_held_out),
    Column("accuracy_before", "Before", "accuracy", 8, _accuracy_before, percent),
    Column("longer_wins", "Longer wins", "share", 4, lambda run: finite(run.part("eval").get("longer_wins")), percent),
    Column("kl", "KL", "nats per token", 3, _after("kl")),
    Column("answer_length", "Answers", "characters", 9, _answer_length),
    Column("held_out_loss", "Loss", "held-out", 4, _after("loss")),
    Column("margin", "Margin", "of rewards", 4, _after("rewards/margins")),
    Column("chosen_reward", "Chosen reward", "", 5, _after("rewards/chosen")),
    Column("rejected_reward", "Rejected reward", "", 5, _after("rewards/rejected")),
    Column("chosen_logps_change", "Chosen logp", "change, nats", 6, _chosen_logps_change),
    Column("steps", "Steps", "", 7, _of_summary("steps")),
    Column("pairs_seen", "Pairs", "seen", 9, _of_summary("pairs_seen")),
    Column("wall_s", "Time", "", 6, _of_summary("wall_s"), duration),
    Column("peak_memory_bytes", "Memory", "peak", 8, _of_summary("peak_memory_bytes"), size),
)
"""The figures of a run: of held-out pairs after training where not said otherwise; answers are the sampled ones."""


@dataclass(frozen=True)
class Row:
    """One run: its settings (the run file with dotted keys, without `output_dir`) and figures (None: not known)."""

    name: str
    path: str
    method: str | None
    loss: dict[str, Any]
    settings: dict[str, Any]
    figures: dict[str, Any]
    """By the keys of COLUMNS."""
    hashes: dict[str, Any]
    """sha256 of the model at the start, and of the training and held-out pairs as tokens: model, train, eval."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, the most accurate first, those without a held-out accuracy last."""

    rows: tuple[Row, ...]
    different: tuple[str, ...]
    """The settings in which the runs differ; `loss` stands for all under it where not all runs have the same ones."""
    same: dict[str, Any]
    """Those of MAIN_SETTINGS that are the same in all runs."""
    baselines: dict[str, Number]
    """The accuracies to be had without a model, by the rule that has them."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def headline(self) -> str:
        """The outcome in one or two sentences."""
        best, *others = (row.figures for row in self.rows)
        if best["accuracy"] is None:
            return "No accuracy on held-out pairs after training is known of these runs."
        pairs = f"{number(best['num_held_out'])} held-out pairs" if best["num_held_out"] else "the held-out pairs"
        who = self.rows[0].name + (" comes first" if others else "")
        said = f"{who}: the chosen completion has the higher reward in {percent(best['accuracy'])} of {pairs}"
        if best["interval"] is None:
            return f"{said}."
        said += " (95% interval {} to {}).".format(*map(percent, best["interval"]))
        num_close = sum((other["interval"] or (0, -1))[1] >= best["interval"][0] for other in others)
        if num_close:
            whose = "interval of 1 other run overlaps" if num_close == 1 else f"intervals of {num_close} others overlap"
            said += f" The {whose} with it, so the order among these may be chance."
        return said


def compare(run_dirs: Sequence[Path]) -> Comparison:
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
    rows = [_read_row(path, clean(name)) for path, name in zip(paths, names, strict=True)]
    rows.sort(key=lambda row: (row.figures["accuracy"] is None, -(row.figures["accuracy"] or 0), row.name))
    keys = sorted(dict.fromkeys(key for row in rows for key in row.settings), key=_place)
    equal = [key for key in keys if all(row.settings.get(key) == rows[0].settings.get(key) for row in rows)]
    different = _settings_to_tell_apart(rows, [key for key in keys if key not in equal])
    named = [key for key in equal if _place(key) < len(MAIN_SETTINGS) and key.partition(".")[0] not in different]
    same = {key: rows[0].settings[key] for key in named}
    notes = tuple(_notes(rows, different))
    return Comparison(tuple(rows), tuple(different), same, _baselines(rows), tuple(_warnings(rows)), notes)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison in values that JSON knows; each run's figures stand beside its name."""
    told = asdict(comparison)
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
    columns, lines = _table(comparison)
    short = iter(short_names([row.name for row in comparison.rows], max(26, console.width // 3)))
    names = [line.name if line.is_baseline else next(short) for line in lines]
    cells = [short_names([line.cells[i] for line in lines], 26) for i in range(len(columns))]
    widths = [max(map(cell_len, [*of, *column.label.split()])) for of, column in zip(cells, columns, strict=True)]
    room = console.width - max(map(cell_len, names))
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
    console.print(Text(comparison.headline), "", table, "", sep="\n")
    gone = _listing((column.label for i, column in enumerate(columns) if i not in shown), limit=12)
    said = (f"No room for: {gone}." if gone else "", _same_text(comparison))
    for style, sentences in (("dim", said), ("yellow", comparison.warnings), ("dim", comparison.notes)):
        for sentence in filter(None, sentences):
            console.print(Text(sentence, style))


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Writes the comparison as one HTML file that needs nothing else, and returns its path.

    Raises:
        UserError: the file cannot be written there.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css = (HERE / "report.css").read_text(encoding="utf-8")
    columns, lines = _table(comparison)
    runs = [(row.name, row.figures["accuracy"], row.figures["interval"]) for row in comparison.rows]
    text = environment.get_template("compare.html.j2").render(
        comparison=comparison,
        css=Markup(css),
        css_hash=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        columns=columns,
        lines=lines,
        chart=accuracy_chart(runs, comparison.baselines),
        same=[(key, _setting(value)) for key, value in comparison.same.items()],
    )
    try:
        return write_whole(Path(path), text)
    except OSError as error:
        raise UserError(f"'{path}' cannot be written ({error.strerror}).") from None


def _read_row(path: Path, name: str) -> Row:
    run = read_run(path)
    try:
        file = as_mapping(parse_value(run.run_file))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path / 'run.yaml'}: is not YAML: {' '.join(str(error).split())}") from None
    method = clean(str(run.summary.get("method") or file.get("method") or "")) or None
    loss = _safe(as_mapping(run.summary.get("loss")) or as_mapping(file.get("loss")))
    settings = dict(_flat(_safe({**file, "method": method, "loss": loss, "output_dir": None})))
    figures = {column.key: column.read(run) for column in COLUMNS}
    hashes = {"model": run.summary.get("model_sha256"), **{of: run.part(of).get("sha256") for of in ("train", "eval")}}
    return Row(" ".join(name.split()), clean(str(path)), method, loss, settings, figures, hashes)


def _safe(value: Any, depth: int = 4) -> Any:
    """A setting in values that JSON knows and a page can show; lists as text."""
    if isinstance(value, Mapping) and depth:
        return {clean(str(key)): _safe(item, depth - 1) for key, item in value.items()}
    if value is None or isinstance(value, bool) or finite(value) is not None:
        return value
    return clean(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value


def _place(key: str) -> int:
    name = "loss" if key.startswith("loss.") else key
    return MAIN_SETTINGS.index(name) if name in MAIN_SETTINGS else len(MAIN_SETTINGS)


def _settings_to_tell_apart(rows: Sequence[Row], different: Sequence[str]) -> list[str]:
    """What of `different` gets a column: all of the loss in one where the losses have different settings."""
    of_loss = [{key for key in row.settings if key.startswith("loss.")} for row in rows]
    if any(keys != of_loss[0] for keys in of_loss):
        return sorted([*(key for key in different if not key.startswith("loss.")), "loss"], key=_place)
    return [key for key in different if key != "loss.name" or any(row.method != row.loss["name"] for row in rows)]


def _baselines(rows: Sequence[Row]) -> dict[str, Number]:
    shares = {round(share, 9) for row in rows if (share := row.figures["longer_wins"]) is not None}
    if len(shares) != 1:
        return {"chance": 0.5}
    (share,) = shares
    shorter = {"shorter one wins, at most": 1 - share} if share < 0.5 else {}
    return {"chance": 0.5, "longer one wins": share, **shorter}


def _warnings(rows: Sequence[Row]) -> Iterator[str]:
    for key, sentence in (
        ("eval", "Not comparable: the held-out pairs are not the same ({}), so accuracies answer different questions."),
        ("model", "Not comparable: the runs did not start from the same model ({})."),
        ("train", "The runs were not trained on the same pairs ({})."),
    ):
        groups: dict[str, list[str]] = {}
        for row in rows:
            groups.setdefault(str(row.hashes[key] or ""), []).append(row.name)
        unknown = groups.pop("", [])
        if len(groups) > 1:
            yield sentence.format(f"{len(groups)} kinds: {_listing(map(_listing, groups.values()), '; ')}")
        if unknown and key == "eval" and len(rows) > 1:
            yield f"It is not known whether these were held against the same pairs as the others: {_listing(unknown)}."
    told = []
    for key, unit in (("steps", "steps"), ("pairs_seen", "pairs seen")):
        counts = [row.figures[key] or 0 for row in rows]
        told += [f"{number(min(counts))} to {number(max(counts))} {unit}"] if min(counts) < max(counts) else []
    if told:
        yield f"The runs did not go equally far: {' and '.join(told)}."
    statuses = [(row.name, row.figures["status"] or "not begun") for row in rows]
    if unfinished := [f"{name} ({status})" for name, status in statuses if status != "finished"]:
        yield f"Not finished, so these figures may change: {_listing(unfinished)}."


def _listing(names: Iterable[str], separator: str = ", ", limit: int = 4) -> str:
    found = list(names)
    return separator.join(found[:limit]) + (f" and {len(found) - limit} more" if len(found) > limit else "")


def _notes(rows: Sequence[Row], different: Sequence[str]) -> Iterator[str]:
    if any(_place(key) <= MAIN_SETTINGS.index("loss") for key in different):
        yield (
            "Different methods, and different settings of one, measure losses, rewards and margins in units of "
            "their own: across them only accuracy, KL and lengths can be compared."
        )
    num_measured = sum(row.figures["interval"] is not None for row in rows)
    if num_measured > 1:
        yield (
            "An interval tells how far an accuracy may be off because of the pairs that happened to be held out. "
            "Runs held against the same pairs share much of that error, so overlap does not rule out a difference."
        )
    if num_measured > 4:
        yield "The first of many runs is partly the luckiest: on new pairs expect less of it."


class Line(NamedTuple):
    """A line of the table: a run, or a rule that needs no model and has an accuracy only."""

    name: str
    cells: list[str]
    is_baseline: bool


def _table(comparison: Comparison) -> tuple[list[Column], list[Line]]:
    """The one table that all renderings show, without columns that would be empty or tell nothing."""
    rows = comparison.rows
    idle = {key for key in rows[0].figures if all(row.figures[key] is None for row in rows)} - {"accuracy", "status"}
    idle |= {"status"} if all(row.figures["status"] == "finished" for row in rows) else set()
    idle |= {"longer_wins"} if len(comparison.baselines) > 1 else set()
    columns = [column for column in COLUMNS if column.key not in idle]
    settings = {key: _settings_cells(rows, key) for key in comparison.different}
    lines = []
    for i, row in enumerate(rows):
        cells = [column.show(row.figures[column.key]) for column in columns]
        lines.append((row.figures["accuracy"], Line(row.name, [*(of[i] for of in settings.values()), *cells], False)))
    for name, share in comparison.baselines.items():
        cells = [percent(share) if column.key == "accuracy" else "" for column in columns]
        lines.append((share, Line(name, [*("" for _ in settings), *cells], True)))
    lines.sort(key=lambda line: (line[0] is None, -(line[0] or 0)))
    heads = [Column(key, key, rank=2 if _place(key) < len(MAIN_SETTINGS) else 7, is_text=True) for key in settings]
    return [*heads, *columns], [line for _, line in lines]


def _settings_cells(rows: Sequence[Row], key: str) -> list[str]:
    if key == "loss":
        return [_loss_text(row.loss).removeprefix(f"{row.method}, ") for row in rows]
    texts = [_setting(row.settings.get(key)) for row in rows]
    short = [without_paths(text) for text in texts]
    return short if len(set(short)) == len(set(texts)) else texts


def _setting(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value) if float(f"{value:.2e}") == value else str(value)  # settings are not rounded
    return MISSING if value is None else clip(str(value).lower() if isinstance(value, bool) else value, 300)


def _loss_text(loss: Mapping[str, Any]) -> str:
    """A loss in one line: `dpo, beta = 0.1`; a weighted sum as `1 × dpo, beta = 0.1; 0.2 × sft`."""
    terms = {name: as_mapping(term) for name, term in loss.items() if isinstance(term, Mapping)}
    if terms:
        return "; ".join(_loss_text({"name": f"{_setting(t.pop('weight', 1))} × {n}", **t}) for n, t in terms.items())
    fields = (f"{key} = {_setting(value)}" for key, value in loss.items() if key != "name")
    return ", ".join([str(loss.get("name", "")), *fields])


def _same_text(comparison: Comparison) -> str:
    told = ", ".join(f"{key} {_setting(value)}" for key, value in comparison.same.items())
    return f"{'The same in all' if len(comparison.rows) > 1 else 'Settings'}: {told}." if told else ""

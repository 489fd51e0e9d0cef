"""What a run says while it works: lines and progress for people, JSON lines for programs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from penchant import stopping
from penchant.disk import append_json_line

_SECONDS_BETWEEN_PLAIN_LINES = 5.0


class RunLog:
    """The voice of a run. Everything goes to standard error; standard output is left to results.

    Files are written once there is a run directory; a dry run has none.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._run_dir: Path | None = None
        self._early_events: list[dict[str, Any]] = []
        self.after_metrics: Callable[[int], None] = lambda step: None
        """Called with the step of every line of metrics that was written."""
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def keep_in(self, run_dir: Path) -> None:
        """From here on events and metrics are kept in `run_dir`, the events so far included."""
        self._run_dir = run_dir
        for record in self._early_events:
            append_json_line(run_dir / "events.jsonl", record)

    def say(self, label: str, text: str) -> None:
        """A line for people: `data      240 pairs from ...`."""
        self._console.print(f"[bold]{label:<10}[/bold] {escape(text)}")

    def event(self, severity: str, code: str, message: str, step: int) -> None:
        """Something worth knowing: kept in events.jsonl and, from `warn` on, said aloud."""
        record = {"step": step, "severity": severity, "code": code, "message": message}
        if self._run_dir:
            append_json_line(self._run_dir / "events.jsonl", record)
        else:
            self._early_events.append(record)
        if severity != "info":
            self._console.print(f"[yellow]{severity:<10}[/yellow] {escape(message)}")

    def metrics(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self._run_dir:
            append_json_line(self._run_dir / "metrics.jsonl", record)
            self.after_metrics(record["step"])

    @contextmanager
    def progress(self, label: str, total: int, stays: bool = False) -> Iterator[Meter]:
        """A bar (or, without a terminal, a line every few seconds) for work of `total` units.

        The bar goes when the work is done, unless it `stays`.
        """
        if self._console.is_terminal and not self._console.quiet:
            columns = [
                TextColumn(f"[bold]{label:<10}[/bold]"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[info]}"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            ]
            with Progress(*columns, console=self._console, transient=not stays) as bar:
                task = bar.add_task(label, total=total, info="")
                yield Meter(lambda done, info: bar.update(task, completed=done, info=escape(info)))
        else:
            yield Meter(self._plain_lines(label, total))

    def _plain_lines(self, label: str, total: int) -> Any:
        started = last = time.monotonic()

        def show(done: int, info: str) -> None:
            nonlocal last
            now = time.monotonic()
            is_quick = now - last < _SECONDS_BETWEEN_PLAIN_LINES
            if is_quick and (done < total or (last == started and not info)):
                return  # work that is over at once needs no line
            last = now
            left = (now - started) / done * (total - done) if done else 0.0
            self.say(label, f"{done}/{total}  {info}".rstrip() + (f"  {duration(left)} left" if left else ""))

        return show


class Meter:
    """Moves a progress display on."""

    def __init__(self, show: Any) -> None:
        self._show = show
        self._done = 0

    def advance(self, units: int, info: str = "") -> None:
        """So many more units are done; `info` stands beside the bar. Long work can be stopped here.

        Raises:
            StopRequested: somebody asked for it.
        """
        self._done += units
        self._show(self._done, info)
        stopping.check()


def duration(seconds: float) -> str:
    """`48 s`, `6 min 10 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(number: int, noun: str) -> str:
    """`1 step`, `5 steps`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def one_line(metrics: dict[str, Any]) -> str:
    """The few numbers that stand beside a progress bar."""
    names = {
        "loss": "loss",
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
        "score": "score",
        "win_rate": "win rate",
        "answer_kl": "KL",
    }
    parts = [f"{short} {metrics[name]:.3f}" for name, short in names.items() if metrics.get(name) is not None]
    if metrics.get("tokens_per_s"):
        parts.append(f"{metrics['tokens_per_s']:,.0f} tokens/s")
    return "  ".join(parts)

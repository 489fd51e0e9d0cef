"""The verdict on a run, finished or not: its log, held against the detectors of the watch once more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.doctor.run_logs import RunLog, read_log
from penchant.watch import DETECTORS, SEVERITIES, Finding, Watch, worst_first

_FEW_LINES, _PAIRS_SHOWN, _TEXT_SHOWN = 20, 3, 60
_FIGURES = (
    ("eval_rewards/accuracies", "held-out accuracy"),
    ("rewards/accuracies", "accuracy of the training pairs"),
    ("eval_score", "score of held-out answers"),
    ("eval_win_rate", "wins of held-out answers"),
    ("samples/score", "score of the answers trained on"),
    ("eval_loss", "held-out loss"),
    ("loss", "training loss"),
    ("rewards/margins", "margin"),
    ("eval_kl", "KL on held-out pairs, nats a token"),
    ("eval_answer_kl", "KL of held-out answers, nats an answer"),
    ("kl", "KL in training, nats a token"),
)
"""What is told of a run beside its findings."""


@dataclass(frozen=True)
class Trouble:
    """A finding: as it was first made, how bad it became, and as it is at the end of the log, where it still is."""

    first: Finding
    worst: Finding
    now: Finding | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        shown = self.now or self.worst
        return {
            **shown.as_dict(),
            "severity": self.worst.severity,
            "step": self.first.step,
            "still_so": self.now is not None,
            "source": DETECTORS[self.first.code].source,
        }


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor says of a run."""

    log: RunLog
    troubles: list[Trouble]
    """The worst first."""
    events: list[dict[str, Any]]
    """What else was told from `warn` on while it ran: code, severity, times, steps, message."""
    figures: list[tuple[str, float, float]]
    """A name, the first value, and the last or the mean of the last lines."""

    @property
    def is_serious(self) -> bool:
        """Whether anything is worse than a warning."""
        told = [trouble.worst.severity for trouble in self.troubles] + [event["severity"] for event in self.events]
        return any(severity in ("major", "stop") for severity in told)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        log = self.log
        return {
            "folder": str(log.folder),
            "log": log.maker,
            "method": log.method,
            "status": log.status,
            "step": log.last_step,
            "total_steps": log.facts.total_steps,
            "serious": self.is_serious,
            "findings": [trouble.as_dict() for trouble in self.troubles],
            "events": self.events,
            "suspicious": log.suspicious,
            "figures": {name: {"first": first, "last": last} for name, first, last in self.figures},
            "notes": list(self._notes()),
        }

    def __str__(self) -> str:
        log, total = self.log, self.log.facts.total_steps
        status = f", {log.status}" if log.status else ""
        lines = [f"{log.folder}: {log.method}, step {log.last_step}{f' of {total}' if total else ''}{status}", ""]
        lines += [f"{self._verdict()}", ""]
        for trouble in self.troubles:
            shown = trouble.now or trouble.worst
            since = (
                f"since step {trouble.first.step}" if trouble.now else f"at step {trouble.first.step}, later no more"
            )
            lines += [f"{trouble.worst.severity.upper()}  {shown.code} ({since})"]
            lines += [f"  seen:   {shown.seen}.", f"  means:  {shown.meaning}", f"  do:     {shown.remedy}", ""]
        if self.events:
            lines += ["Told while it ran:"]
            for event in self.events:
                steps = ", ".join(map(str, event["steps"][:4])) + (", ..." if len(event["steps"]) > 4 else "")
                times = "" if event["times"] == 1 else f"{event['times']} times, "
                lines += [f"  {event['severity']:<6}{event['code']} ({times}step {steps}): {event['message']}"]
            lines += [""]
        if log.suspicious:
            lines += ["Training pairs that contradict the others (suspicious.jsonl), the worst first:"]
            lines += [f"  {_told_of(row)}" for row in log.suspicious[:_PAIRS_SHOWN]] + [""]
        if self.figures:
            lines += ["From the start to the end of the log:"]
            lines += [f"  {name}: {first:.4g} to {last:.4g}" for name, first, last in self.figures]
        lines += [f"note: {note}" for note in self._notes()]
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.troubles:
            return "Nothing of what the watch looks for was found."
        serious = sum(trouble.worst.severity in ("major", "stop") for trouble in self.troubles)
        what = "finding" if len(self.troubles) == 1 else "findings"
        return f"{len(self.troubles)} {what}, {serious} of them serious; the worst first:"

    def _notes(self) -> tuple[str, ...]:
        notes, trained = list(self.log.notes), sum("loss" in line for line in self.log.lines)
        if trained < _FEW_LINES:
            notes.append(
                f"the log has {trained} lines of training, and most detectors ask for {_FEW_LINES}: log more often "
                "(logging_steps: 1)"
            )
        if not any(name.startswith("eval_") for line in self.log.lines for name in line):
            notes.append("nothing was measured on held-out rows, so nothing can be said about what carries over")
        return tuple(notes)


def diagnose(folder: Path, method: str | None = None, beta: float | None = None) -> Diagnosis:
    """Replays the log in a folder over all detectors; nothing is written.

    Raises:
        UserError: as `read_log`.
    """
    log = read_log(folder, method, beta)
    watch = Watch(log.facts, log.thresholds)
    first: dict[str, Finding] = {}
    for line in log.lines:
        for found in watch.look(line):
            first.setdefault(found.code, found)
    troubles = []
    for worst in worst_first(watch.told.values()):
        now = DETECTORS[worst.code].find(watch.history, log.facts, log.thresholds.get(worst.code))
        troubles.append(Trouble(first[worst.code], worst, now))
    return Diagnosis(log, troubles, _other_events(log), _figures(log))


def _told_of(row: Mapping[str, Any]) -> str:
    """A suspicious pair in a line."""

    def short(text: Any) -> str:
        plain = " ".join(str(text).split())
        return plain if len(plain) <= _TEXT_SHOWN else plain[: _TEXT_SHOWN - 3] + "..."

    margin = row.get("margin")
    told = f"margin {margin:.2f}" if isinstance(margin, int | float) else "margin unknown"
    return f"{told}, {row.get('source')}: chosen '{short(row.get('chosen'))}', not '{short(row.get('rejected'))}'"


def _other_events(log: RunLog) -> list[dict[str, Any]]:
    """What else was told, one entry for each code, the worst first."""
    told = [
        event
        for event in log.events
        if event.get("severity") in SEVERITIES and event.get("code") not in DETECTORS and event.get("code") is not None
    ]
    times = Counter(event["code"] for event in told)
    found = []
    for code in times:
        own = [event for event in told if event["code"] == code]
        worst = max(own, key=lambda event: SEVERITIES.index(event["severity"]))
        steps = [event.get("step", 0) for event in own]
        found.append(
            {
                "code": code,
                "severity": worst["severity"],
                "times": len(own),
                "steps": steps,
                "message": worst["message"],
            }
        )
    return sorted(found, key=lambda event: -SEVERITIES.index(event["severity"]))


def _figures(log: RunLog) -> list[tuple[str, float, float]]:
    found = []
    for name, label in _FIGURES:
        values = [line[name] for line in log.lines if isinstance(line.get(name), int | float)]
        if len(values) > 1:
            tail = values[-1:] if name.startswith("eval_") else values[-10:]
            found.append((label, float(values[0]), float(sum(tail) / len(tail))))
    return found

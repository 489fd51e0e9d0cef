"""The data doctor at work before training: what it finds is told, kept and, where asked for, left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penchant.config import RunConfig
from penchant.data.chat import TokenizedData
from penchant.data.flat import flattened
from penchant.data.formats import ExampleData, RowProblem
from penchant.doctor.findings import CODES, DOCTOR_CHECKS, Finding, worst_first
from penchant.doctor.scan import DataScan
from penchant.doctor.tokens import TokenChecks
from penchant.errors import UserError
from penchant.losses import Loss
from penchant.training.logger import RunLog, count

DROP_REASONS: dict[str, str] = {code: f"{check.name}, named by drop" for code, check in DOCTOR_CHECKS.items()}
"""Code of a row that `drop` leaves out -> the reason in a few words."""


def label_weights(loss: Loss) -> tuple[float, float] | None:
    """What the loss multiplies desirable and undesirable completions with, None where it does not."""
    if not hasattr(loss, "desirable_weight"):
        return None
    return loss.desirable_weight, loss.undesirable_weight  # type: ignore[attr-defined]


def examine(
    config: RunConfig,
    loss: Loss,
    rows: tuple[ExampleData, ExampleData],
    tokenized: tuple[TokenizedData, TokenizedData],
    tokenizer: Any,
) -> tuple[list[Finding], list[Finding]]:
    """What the doctor says of training and of held-out data, the worst first.

    Training examples that `drop` names are then taken out of `tokenized`; the findings are about the rows before that.

    Raises:
        UserError: one of the findings is of the severity stop.
    """
    scans = _scan(rows[0], tokenized[0], tokenizer, config), _scan(rows[1], tokenized[1], tokenizer, config)
    train, heldout = (
        scan.findings(data.num_rows, config.drop, label_weights(loss)) if len(scan) else []
        for scan, data in zip(scans, rows, strict=True)
    )
    # Held-out rows are few by their nature; what is missing there is said of the training rows already.
    heldout = [found for found in heldout if found.name != "too-few"]
    if leak := scans[0].leak_into(scans[1], config.drop):
        heldout = worst_first([*heldout, leak])
    for found in (*train, *heldout):
        if found.severity == "stop":
            raise UserError(f"data: {found.message}. To go on, {found.fix}.\n  first rows: {', '.join(found.rows[:3])}")
    _leave_out(config.drop, scans[0], tokenized[0])
    return train, heldout


def tell(findings: Mapping[str, Any], log: RunLog) -> None:
    """Says what the doctor found, from what `data.json` keeps; serious findings become events."""
    parts = [(split, findings[split]) for split in ("train", "eval") if findings[split]]
    checks = [(split, check) for split, part in parts for check in part["checks"]]
    if not checks:
        rows = sum(part["used"] for _, part in parts)
        log.say("doctor", f"{len(DOCTOR_CHECKS)} checks of {count(rows, 'example')}: nothing to say against them")
        return
    seen = ", ".join(
        f"{check['name']} ({check['severity']}{', held-out' if split == 'eval' else ''})" for split, check in checks
    )
    log.say("doctor", f"{count(len(checks), 'finding')}: {seen}; `penchant check` and report.html tell more")
    told: set[str] = set()
    for split, check in checks:
        if check["severity"] != "info" and check["name"] not in told:  # held-out rows mostly share what is wrong
            where = "" if split == "train" else "held-out data: "
            log.event(check["severity"], check["name"], f"{where}{check['message']}; {check['fix']}", step=0)
            told.add(check["name"])


def _scan(data: ExampleData, tokenized: TokenizedData, tokenizer: Any, config: RunConfig) -> DataScan:
    scan = DataScan(TokenChecks(tokenizer, config.max_length))
    for problem in (*data.problems, *tokenized.problems):
        scan.add_problem(problem)
    for tokens in tokenized.examples:
        scan.add(tokenized.texts[tokens.index], tokens)
    return scan


def _leave_out(names: Sequence[str], scan: DataScan, tokenized: TokenizedData) -> None:
    """Moves the examples that a named check points at to the problems."""
    reasons: dict[int, str] = {}
    for name in names:
        for place in scan.flagged(name):
            reasons.setdefault(place, name)
    for place, name in sorted(reasons.items()):
        source = tokenized.texts[tokenized.examples[place].index].source
        tokenized.problems.append(RowProblem(CODES[name], source, f"left out, for drop names {name}"))
    tokenized.num_truncated -= len({*scan.flagged("truncated")} & {*reasons})
    tokenized.examples = flattened(tokenized.examples).without(reasons)

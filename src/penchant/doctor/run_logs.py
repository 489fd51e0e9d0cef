"""The log of a run, whoever wrote it: Penchant's run directories, and the trainer_state.json of transformers' Trainer.

TRL's trainers and Axolotl keep their metrics in that file; the names that they log are turned into ours.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penchant.config import ONLINE_METHODS, parse_value
from penchant.disk import read_json_lines
from penchant.errors import UserError
from penchant.watch import Facts, facts_of

STATE = "trainer_state.json"

_TRL_NAMES = {
    "reward": "samples/score",
    "objective/scores": "samples/score",
    "completions/mean_length": "samples/length",
    "val/contain_eos_token": "samples/finished",
    "frac_reward_zero_std": "samples/undecided",
    "clip_ratio/region_mean": "clipped",
    "clip_ratio": "clipped",
    "policy/clipfrac_avg": "clipped",
    "objective/entropy": "entropy",
}
"""What TRL calls what we call otherwise; the rest has the same name, or none here."""


@dataclass(frozen=True)
class RunLog:
    """Lines of metrics in their order, what is known of the run, and what was told while it ran."""

    folder: Path
    maker: str
    """Who wrote it: penchant or trainer (of transformers)."""
    method: str
    facts: Facts
    lines: list[dict[str, Any]]
    events: list[dict[str, Any]] = field(default_factory=list)
    status: str | None = None
    thresholds: Mapping[str, Mapping[str, float | int]] = field(default_factory=dict)
    """Those that the run file sets in the place of the detectors' own."""
    suspicious: list[dict[str, Any]] = field(default_factory=list)
    """The training pairs with the lowest margins when they came, as a run keeps them."""
    notes: tuple[str, ...] = ()
    """What a reader has to know of how the log was read."""

    @property
    def last_step(self) -> int:
        """The step of the last line."""
        return max((line["step"] for line in self.lines), default=0)


def read_log(folder: Path, method: str | None = None, beta: float | None = None) -> RunLog:
    """The log in a folder; `method` and `beta` say what another library's log does not tell.

    Raises:
        UserError: there is no such folder, or no run in it, or its log cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"'{folder}': there is no such folder.")
    if (folder / "run.yaml").exists():
        if method or beta is not None:
            raise UserError("--method, --beta: are for logs of other libraries; a run directory tells its own.")
        return _read_penchant(folder)
    state = _newest_state(folder)
    if state is not None:
        return _read_trainer(folder, state, method, beta)
    within = sorted({path.parent.name for path in (*folder.glob("*/run.yaml"), *folder.glob(f"*/{STATE}"))})
    hint = f" It holds runs of its own: {', '.join(within[:5])}; name one of them." if within else ""
    raise UserError(f"'{folder}' holds no run: neither a run.yaml (Penchant) nor a {STATE} (TRL, Axolotl).{hint}")


def _read_penchant(folder: Path) -> RunLog:
    settings = parse_value(
        (folder / "run.yaml").read_text(encoding="utf-8", errors="replace"), str(folder / "run.yaml")
    )
    if not isinstance(settings, dict):
        raise UserError(f"{folder / 'run.yaml'}: is no run file; the folder was damaged, or is of something else.")
    summary, data = _mapping(folder / "summary.json"), _mapping(folder / "data.json")
    lines = [line for line in read_json_lines(folder / "metrics.jsonl") if _is_line(line)]
    method = str(summary.get("method") or settings.get("method") or "dpo")
    loss = summary.get("loss") or settings.get("loss") or {"name": "dpo"}
    rounds = summary.get("rounds")
    if rounds is None and method in ONLINE_METHODS:  # of a version that did not keep them
        rounds = sum("samples/length" in line for line in lines) or 1
    heldout = data.get("eval")
    total = summary.get("total_steps") or settings.get("max_steps")
    facts = facts_of(
        loss if isinstance(loss, Mapping) else {"name": str(loss)},
        total,
        settings,
        summary.get("steps_per_epoch") or _steps_per_epoch(lines),
        rounds,
        heldout.get("used") if isinstance(heldout, Mapping) else None,
    )
    thresholds: dict[str, dict[str, float | int]] = {}
    watch = settings.get("watch")
    for name, value in (watch.get("thresholds") or {}).items() if isinstance(watch, Mapping) else ():
        code, _, key = str(name).partition(".")
        thresholds.setdefault(code, {})[key] = value
    events = [event for event in read_json_lines(folder / "events.jsonl") if isinstance(event, dict)]
    suspicious = [row for row in read_json_lines(folder / "suspicious.jsonl") if isinstance(row, dict)]
    status = summary.get("status")
    return RunLog(folder, "penchant", method, facts, lines, events, status, thresholds, suspicious)


def _newest_state(folder: Path) -> Path | None:
    """The folder's own state, or that of its newest checkpoint, whichever has come further."""
    states = [folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")]
    return max((path for path in states if path.is_file()), key=_steps_in, default=None)


def _steps_in(path: Path) -> int:
    step = _mapping(path).get("global_step")
    return step if isinstance(step, int) else -1


def _read_trainer(folder: Path, path: Path, method: str | None, beta: float | None) -> RunLog:
    state = _mapping(path)
    history = state.get("log_history")
    if not isinstance(history, list):
        raise UserError(f"{path}: has no log_history, or is no JSON; a run that was killed may leave half a file.")
    entries = [entry for entry in history if isinstance(entry, dict) and _is_line(entry)]
    names = {name for entry in entries for name in entry}
    guessed = _method_of(names, entries)
    method = method or guessed
    lines = [_translated(entry, method) for entry in entries]
    total = state.get("max_steps")
    total = total if isinstance(total, int) and total > 0 else None
    loss = {"name": method, **({} if beta is None else {"beta": beta})}
    facts = facts_of(
        loss,
        total,
        {"batch_size": state.get("train_batch_size")},
        _steps_per_epoch(lines),
        total or 1000 if "samples/score" in {name for line in lines for name in line} else None,
    )
    done = isinstance(total, int) and state.get("global_step", 0) >= total
    notes = [f"read from {path}, taken as {method} ({'as given' if method != guessed else 'from the names it logs'})"]
    if beta is None:
        notes.append("beta is not in it (training_args.bin is a pickle, which is not read): --beta tells it")
    return RunLog(folder, "trainer", method, facts, lines, status="finished" if done else None, notes=tuple(notes))


def _method_of(names: set[str], entries: Sequence[Mapping[str, Any]]) -> str:
    """Which of TRL's methods logs these names."""
    if "reward" in names and any(name.startswith("completions/") for name in names):
        return "grpo"
    if "log_odds_ratio" in names:
        return "orpo"
    if "rewards/margins" not in names:
        return "sft"
    if "nll_loss" in names:
        return "cpo"
    if "kl" in names and "objective/scores" not in names:
        return "kto"
    return "dpo"


def _translated(entry: Mapping[str, Any], method: str) -> dict[str, Any]:
    """A line of TRL's log with our names."""
    line: dict[str, Any] = {}
    for name, value in entry.items():
        prefix, bare = ("eval_", name.removeprefix("eval_")) if name.startswith("eval_") else ("", name)
        if bare == "completions/clipped_ratio" and isinstance(value, int | float):
            line[f"{prefix}samples/finished"] = 1 - value
        elif bare == "kl" and method == "kto":
            line[f"{prefix}kl_mismatched"] = value
        elif bare.startswith("rewards/") and method == "grpo":
            continue  # the rewards of single functions, which are no log-ratios
        else:
            line[prefix + _TRL_NAMES.get(bare, bare)] = value
    return line


def _is_line(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("step"), int)


def _steps_per_epoch(lines: Sequence[Mapping[str, Any]]) -> float | None:
    for line in reversed(lines):
        epoch = line.get("epoch")
        if isinstance(epoch, int | float) and math.isfinite(epoch) and epoch > 0:
            return round(line["step"] / epoch, 3)
    return None


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing where there is none that can be read; NaN, which is no JSON, counts as null."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(re.sub(r"(?<=[:\[,\s])(NaN|-?Infinity)(?=[,\]}\s])", "null", text))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

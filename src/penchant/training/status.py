"""How far a run is, read from its directory without touching it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from penchant.errors import UserError
from penchant.locking import is_being_worked_on
from penchant.training.checkpoint import NothingToResumeError, newest_checkpoint
from penchant.training.loop import CHECKPOINTS
from penchant.training.rundir import read_summary


@dataclass(frozen=True)
class Status:
    """What is known of a run: `state` is running, finished, stopped (by the watch), interrupted, failed or killed."""

    state: str
    step: int
    total_steps: int | None
    checkpoint: str | None
    """The newest checkpoint that is whole."""
    damaged: list[str]
    """Newer ones that are not, with the reason."""

    def __str__(self) -> str:
        of = f" of {self.total_steps}" if self.total_steps else ""
        lines = [f"{self.state}, step {self.step}{of}", *self.damaged]
        if self.state not in ("finished", "running"):
            lines.append(
                f"`penchant resume` goes on from {self.checkpoint}"
                if self.checkpoint
                else "no checkpoint to go on from"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        return asdict(self)


def status_of(run_dir: Path) -> Status:
    """The status of a run; its checkpoints are verified to the last byte.

    Raises:
        UserError: it is no run directory.
    """
    if not (run_dir / "run.yaml").exists():
        raise UserError(f"'{run_dir}' is no run directory: it holds no run.yaml.")
    summary = read_summary(run_dir)
    state = str(summary.get("status", "killed"))
    if state == "running" and not is_being_worked_on(run_dir):
        state = "killed"
    damaged: list[str] = []
    try:
        checkpoint = newest_checkpoint(run_dir / CHECKPOINTS, damaged.append)
    except NothingToResumeError:
        checkpoint = None
    place = str(checkpoint.folder) if checkpoint else None
    return Status(state, summary.get("steps", 0), summary.get("total_steps"), place, damaged)

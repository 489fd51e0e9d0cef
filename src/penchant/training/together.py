"""What several processes settle among them before they train as one."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from penchant import distributed
from penchant.errors import UserError
from penchant.scoring.reward import RewardLearner
from penchant.training import hardware
from penchant.training.answers import ANSWERS
from penchant.training.rounds import ROUNDS
from penchant.training.setup import Setup

_SECONDS_FOR_A_SHARED_DISK = 10.0
"""Network disks may show a new file late."""


def refuse_other_versions() -> None:
    """Stops where processes run on other versions than the first: their numbers would drift apart.

    Raises:
        UserError: in all of them, naming the process and the package.
    """
    own = hardware.versions_in_use()
    differing = [f"{name} {own[name]} (the first {there})" for name, there in _first(own).items() if own[name] != there]
    _raise_if_any(f"has {', '.join(differing)}; install the same everywhere" if differing else None)


def refuse_what_processes_cannot(setup: Setup) -> None:
    """Stops where several processes are to do what only one can do so far.

    Raises:
        UserError: naming it.
    """
    if distributed.world().size == 1:
        return
    if setup.config.reference.offload:
        raise UserError("reference.offload: several processes share the reference out instead; leave it out.")
    if isinstance(setup.policy, RewardLearner) and setup.config.lora.rank:
        raise UserError(
            "lora: a reward model with an adapter is trained by one process so far; start it without torchrun."
        )


def refuse_other_contents(fingerprint: dict[str, Any]) -> None:
    """Stops where processes have read other data, settings or weights than the first, under the same names.

    Raises:
        UserError: in all of them, naming the process and what differs.
    """
    there = _first(fingerprint)
    differing = [name for name in fingerprint if fingerprint[name] != there.get(name)]
    _raise_if_any(
        f"reads something else than the first: {', '.join(differing)}; model and data must be the same on all machines"
        if differing
        else None
    )


def refuse_separate_disks(run_dir: Path) -> None:
    """Stops where not all processes see the run directory that the first has opened: they fill it together.

    Raises:
        UserError: in all of them, naming the process.
    """
    until = time.monotonic() + _SECONDS_FOR_A_SHARED_DISK
    while not (run_dir / "run.yaml").exists() and time.monotonic() < until:
        time.sleep(0.2)
    is_seen = (run_dir / "run.yaml").exists()
    _raise_if_any(None if is_seen else f"does not see output_dir '{run_dir}'; put it on a disk that all machines share")


def copy_rounds(run_dir: Path, books: Path) -> None:
    """Gives each process its own copy of what a run has sampled so far; from there on all write the same.

    Every process returns when all have it.
    """
    if not distributed.world().is_first:
        if (run_dir / ROUNDS).exists():
            shutil.copytree(run_dir / ROUNDS, books / ROUNDS)
        if (run_dir / ANSWERS).exists():
            shutil.copy(run_dir / ANSWERS, books / ANSWERS)
    distributed.told_by_all(None)


def _first(value: Any) -> Any:
    return distributed.told_by_first(value)


def _raise_if_any(trouble: str | None) -> None:
    """Fails in all processes alike where one has trouble."""
    for process, its in enumerate(distributed.told_by_all(trouble)):
        if its:
            raise UserError(f"processes: process {process} {its}.")

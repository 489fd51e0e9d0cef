"""Several runs that differ in a few settings, one after the other, and what they share done once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant import stopping
from penchant.config import RunConfig, load_config, parse_value
from penchant.errors import UserError
from penchant.losses import build_loss
from penchant.training.logger import RunLog, count
from penchant.training.run import execute
from penchant.training.rundir import choose_run_dir, is_run_of, read_summary
from penchant.training.shared import Shared


@dataclass(frozen=True)
class Sweep:
    """What became of a sweep: the folders of its runs, and those that failed with their reasons."""

    folder: Path
    run_dirs: list[Path]
    failures: dict[str, str]
    stopped_by: int | None = None
    """The signal that ended it early."""


def parse_sweep(axes: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of `KEY=VALUE,VALUE,...` axes, the last one moving fastest.

    Raises:
        UserError: an axis without a key or without values, or a key given twice.
    """
    values: dict[str, list[Any]] = {}
    for axis in axes:
        key, _, listed = axis.partition("=")
        key = key.strip().replace("-", "_")
        texts = [text.strip() for text in listed.split(",") if text.strip()]
        if not key or not texts:
            raise UserError(f"--sweep {axis}: write KEY=VALUE,VALUE,... as in loss.beta=0.05,0.1,0.5")
        if key in values:
            raise UserError(f"--sweep {axis}: '{key}' is swept twice; put all its values into one list")
        if key == "output_dir":
            raise UserError("--sweep output_dir=...: each run has a folder of its own already")
        values[key] = [parse_value(text) for text in texts]
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def run_sweep(
    run_file: str | None,
    overrides: Mapping[str, Any],
    combinations: Sequence[Mapping[str, Any]],
    overwrite: bool = False,
    log: RunLog | None = None,
) -> Sweep:
    """Trains once for each combination of settings; each run has its folder within `output_dir`.

    Rows are read, tokenised and scored by the reference once for all runs that agree on what these depend on. A run
    that is there already with the very same settings is kept when finished, or stopped by the watch, and else gone on
    with; one that fails does not stop the others.

    Raises:
        UserError: a combination is no valid run; then none was begun.
    """
    log = log or RunLog()
    first = load_config(run_file, {**overrides, **combinations[0]})
    folder = choose_run_dir(first, "sweep")
    configs: dict[str, RunConfig] = {}
    for combination in combinations:
        name = _name(combination)
        if name in configs:
            raise UserError(f"--sweep: two of the runs would both be called '{name}'")
        configs[name] = load_config(run_file, {**overrides, **combination, "output_dir": str(folder / name)})
        build_loss(configs[name].loss_settings())  # speaks up now, not hours later
    with stopping.listening():
        return _train_all(folder, configs, overwrite, log)


def _train_all(folder: Path, configs: Mapping[str, RunConfig], overwrite: bool, log: RunLog) -> Sweep:
    shared = Shared()
    failures: dict[str, str] = {}
    for number, (name, config) in enumerate(configs.items(), start=1):
        stopping.check()
        run_dir = folder / name
        log.say("run", f"{number} of {len(configs)}: {name}")
        if (
            not overwrite
            and read_summary(run_dir).get("status") in ("finished", "stopped")
            and is_run_of(run_dir, config)
        ):
            log.say("run", "is there already with these settings; kept")
            continue
        try:
            result = execute(config, overwrite=overwrite, shared=shared)
        except UserError as error:
            failures[name] = str(error)
            log.say("run", f"failed: {error}")
            continue
        if result.summary["status"] == "interrupted":
            return Sweep(folder, _runs_in(folder, configs), failures, result.summary["signal"])
    if failures:
        log.say("sweep", f"{count(len(failures), 'run')} of {len(configs)} failed: {', '.join(failures)}")
    return Sweep(folder, _runs_in(folder, configs), failures)


def _name(combination: Mapping[str, Any]) -> str:
    """The folder of a run: `ipo,beta=0.1`."""
    parts = [
        str(value) if key == "method" else f"{key.removeprefix('loss.')}={value}" for key, value in combination.items()
    ]
    return re.sub(r"[^\w.,=+-]+", "_", ",".join(parts)).strip(".") or "run"


def _runs_in(folder: Path, configs: Mapping[str, RunConfig]) -> list[Path]:
    return [folder / name for name in configs if (folder / name / "run.yaml").exists()]

"""The run directory: where it is, whose it is, what may be written into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from penchant import distributed
from penchant.config import RunConfig
from penchant.disk import is_leftover, make_folder, read_mapping, remove_leftovers
from penchant.errors import UserError
from penchant.locking import FILES as LOCK_FILES
from penchant.locking import is_being_worked_on, locked
from penchant.losses import build_loss
from penchant.training import hardware

_RUN_FILE = "run.yaml"


def choose_run_dir(config: RunConfig, kind: str = "") -> Path:
    """`output_dir`, or runs/MODEL-METHOD (or runs/MODEL-KIND) with the first number that is free.

    The number of a run that was begun with the very same settings, and neither ended nor is running, is free too: it
    will be gone on with.
    """
    if config.output_dir:
        return Path(config.output_dir).expanduser()
    model = Path(config.model).expanduser().resolve().name.removesuffix(".gguf")
    name = f"{model}-{kind or config.method_name().replace(' + ', '-')}"
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        if not kind and _stopped_early(folder) and is_run_of(folder, config):
            return folder
        number += 1
    return folder


def resolved_run_file(config: RunConfig, run_dir: Path) -> str:
    """The run file that repeats a run, without anything left to defaults."""
    loss = build_loss(config.loss_settings()).settings()
    return config.to_yaml(output_dir=str(run_dir), loss=loss, learning_rate=config.peak_learning_rate())


def is_run_of(run_dir: Path, config: RunConfig) -> bool:
    """Whether the run in this folder was begun with these very settings."""
    run_file = run_dir / _RUN_FILE
    return run_file.exists() and run_file.read_text(encoding="utf-8") == resolved_run_file(config, run_dir)


def check_run_dir(folder: Path, overwrite: bool) -> bool:
    """Refuses a folder that a run must not write into, before any work is done.

    Returns:
        Whether it holds a run that did not come to its end, to be gone on with.

    Raises:
        UserError: there is a finished run (and no `overwrite`), or other files, or it is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: '{folder}' is a file.")
    is_run = (folder / _RUN_FILE).exists()
    there = folder.iterdir() if folder.exists() else ()
    if not is_run and any(path.name not in LOCK_FILES and not is_leftover(path) for path in there):
        raise UserError(f"output_dir: '{folder}' is not empty and is no run directory; choose another.")
    if is_run and not overwrite and read_summary(folder).get("status") == "finished":
        raise UserError(f"output_dir: '{folder}' holds a finished run; choose another, or give --overwrite.")
    parent = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"output_dir: '{folder}' cannot be written: no right to write in '{parent}'.")
    return is_run and not overwrite


@contextmanager
def explained(run_dir: Path) -> Iterator[None]:
    """Within it a disk that is full or fails, and memory that runs out where no batch can be cut, become UserErrors."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"output_dir: '{error.filename or run_dir}' cannot be read or written ({error.strerror or error}). Mend "
            "that and give the same command again: it goes on from the newest checkpoint, if there is one."
        ) from error
    except RuntimeError as error:
        if distributed.has_lost_others(error):
            raise UserError(
                f"processes: process {distributed.world().rank} has lost the others "
                f"({str(error).splitlines()[0][:200]}). One of them has ended, and says above why, or hangs, or the "
                "network between them is cut. Give the same command again: it goes on from the newest checkpoint."
            ) from error
        if not hardware.is_out_of_memory(error):
            raise
        raise UserError(
            f"memory: there is not enough ({str(error).splitlines()[0]}); lower max_length or sample_max_new_tokens, "
            "or train with lora.rank."
        ) from error


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Makes a run directory that was not there a moment ago, and locks it.

    Raises:
        UserError: another process was quicker.
    """
    make_folder(run_dir)
    with locked(run_dir):
        if (run_dir / _RUN_FILE).exists():
            raise UserError(f"output_dir: another process has begun a run in '{run_dir}' meanwhile; choose another.")
        yield


def open_run_dir(folder: Path, keep: bool) -> None:
    """Clears the run directory; what is whole in it stays only where a run is gone on with."""
    remove_leftovers(folder)
    # The run file goes last: half an emptied folder is still known as a run directory.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == _RUN_FILE) if not keep else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in LOCK_FILES:
            path.unlink()


def read_summary(run_dir: Path) -> dict[str, Any]:
    """`summary.json`, or nothing where there is none that can be read."""
    return read_mapping(run_dir / "summary.json")


def _stopped_early(folder: Path) -> bool:
    return read_summary(folder).get("status") != "finished" and not is_being_worked_on(folder)

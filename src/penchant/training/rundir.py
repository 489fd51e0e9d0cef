"""The run directory: where it is, what is in it, how files get there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from penchant.config import RunConfig
from penchant.errors import UserError


def choose_run_dir(config: RunConfig, kind: str = "") -> Path:
    """`output_dir`, or runs/MODEL-METHOD (or runs/MODEL-KIND) with the first free number."""
    if config.output_dir:
        return Path(config.output_dir).expanduser()
    model = Path(config.model).expanduser().resolve().name.removesuffix(".gguf")
    name = f"{model}-{kind or config.method_name().replace(' + ', '-')}"
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def check_run_dir(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that a run must not write into, before any work is done.

    Raises:
        UserError: there is a run already (and no `overwrite`), or other files, or it is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: '{folder}' is a file.")
    if (folder / "run.yaml").exists():
        if not overwrite:
            raise UserError(f"output_dir: '{folder}' holds a run already; choose another, or give --overwrite.")
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"output_dir: '{folder}' is not empty and is no run directory; choose another.")
    parent = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"output_dir: '{folder}' cannot be written: no right to write in '{parent}'.")


def open_run_dir(folder: Path, overwrite: bool) -> None:
    """Makes the run directory, in the place of an older run where `overwrite` allows it."""
    check_run_dir(folder, overwrite)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes a JSON-lines file whole or not at all."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records))


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Adds one line to a JSON-lines file."""
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

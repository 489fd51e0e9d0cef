"""Files of the user's own, run before a verb: `--import FILE.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from penchant.config import add_methods
from penchant.errors import UserError

Verb = Callable[..., argparse.ArgumentParser]
"""`verb(name, run, summary, **more)` adds a verb to the command line."""


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--import FILE.py` to a verb."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE.py",
        help="run this Python file first: the losses that it defines become methods",
    )


def import_file(path: str) -> None:
    """Runs a Python file; the losses that it defines become methods."""
    import importlib.util

    if not Path(path).is_file():
        raise UserError(f"--import: there is no file '{path}'.")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--import: '{path}' is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--import: '{path}' fails with {type(error).__name__}: {error}") from error
    from penchant.losses import LOSSES

    add_methods(LOSSES)

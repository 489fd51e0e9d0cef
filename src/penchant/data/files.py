"""What a name of data stands for (a file, a directory, a pattern, a dataset of the hub), and the rows behind it."""

from __future__ import annotations

import difflib
import glob
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from penchant.data.hub import download, is_hub_id
from penchant.data.json_files import read_array, read_lines
from penchant.data.streams import LISTED_EXTENSIONS, extension_of, open_unpacked
from penchant.data.tables import read_parquet, read_separated
from penchant.errors import UserError


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The rows behind a name, each with its source: `path:line`, or `path row N` (from 1) where there are no lines.

    Several files are read one after the other. A row that cannot be read comes as `Unreadable`, and reading goes on.
    All but JSON arrays stream: memory does not grow with the file.

    Raises:
        UserError: a fault of a whole file; the message names the file and the mend. Faults in the middle (an end cut
            off) are raised when the reading gets there.
    """
    with _explained(Path(path)):
        files = files_of(path)
    for file in files:
        with _explained(file):
            yield from _read_file(file)


def files_of(path: str | Path) -> list[Path]:
    """The data files behind a name, sorted; what is there on the disk goes before a pattern, and that before the hub.

    Raises:
        UserError: there is none, or a link leads out of the directory that was named.
    """
    name, file = str(path), Path(path)
    if file.is_dir():
        return _files_in(file, file.iterdir(), f"{file}: the directory holds no data file")
    if file.exists():
        return [file]
    if glob.has_magic(name):
        parts = file.parts
        fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        matches = map(Path, glob.glob(name, recursive=True))
        return _files_in(Path(*parts[:fixed]), matches, f"{name}: the pattern matches no data file")
    if is_hub_id(name) and extension_of(file) is None:
        return download(name)
    raise _missing(file)


def _files_in(folder: Path, entries: Iterable[Path], none: str) -> list[Path]:
    files = sorted(
        entry for entry in entries if extension_of(entry) and not entry.name.startswith(".") and not entry.is_dir()
    )
    if not files:
        raise UserError(f"{none}; name one that ends in {LISTED_EXTENSIONS}")
    root = os.path.realpath(folder)
    for file in files:
        target = os.path.realpath(file)
        if os.path.commonpath([root, target]) != root:
            raise UserError(f"{file}: is a link that leads out of {folder}, to {target}; name that file itself")
    return files


def _read_file(file: Path) -> Iterator[tuple[str, Any]]:
    extension = extension_of(file)
    if extension is None:
        raise UserError(f"{file}: files of this kind are not read; convert it to {LISTED_EXTENSIONS}")
    if not file.is_file():
        raise UserError(f"{file}: is no ordinary file; write its content to one")
    with open_unpacked(file) as stream:
        if extension == ".parquet":
            yield from read_parquet(file)
        elif extension.startswith(".jsonl"):
            yield from read_lines(file, stream)
        elif extension.startswith(".json"):
            yield from read_array(file, stream)
        else:
            yield from read_separated(file, stream, "\t" if extension.startswith(".tsv") else ",")


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turns what the system says of a file into one sentence."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as fault:
        raise UserError(f"{file}: the packed data are cut off or damaged; fetch or pack the file again") from fault
    except OSError as fault:
        raise UserError(f"{file}: cannot be read ({fault.strerror or fault}); check the file and its rights") from fault


def _missing(file: Path) -> UserError:
    if not file.parent.is_dir():
        return UserError(f"{file}: there is no such file, and no folder {file.parent} either; check the path")
    nearest = difflib.get_close_matches(file.name, [entry.name for entry in file.parent.iterdir()], n=1)
    mend = f"did you mean {file.parent / nearest[0]}?" if nearest else "check the path"
    return UserError(f"{file}: there is no such file; {mend}")

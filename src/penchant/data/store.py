"""The store of tokenised data: folders of arrays that are opened, not read, and are believed only to the last byte.

A set of data is found by its identity: everything that its content depends on. The identity has two halves, the rows
and the tokenizer, so that what is surely not there can be told before a tokenizer is loaded. A folder is there whole or
not at all, and `SHA256SUMS` (as `sha256sum --check` reads it) names all its files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penchant.data.chat import Split
from penchant.data.flat import COLUMNS, FlatExamples, flattened
from penchant.disk import is_leftover, new_folder, remove_folder, sha256_of
from penchant.examples import Example, Pair, Ranking, Unpaired

FORMAT = 2
"""Raised whenever what is written changes."""

MOST_BYTES = 20 * 10**9
MOST_OF_DISK = 0.1
"""How large the store may become, whichever is less; the sets that were not used for the longest time go first."""

_SUMS = "SHA256SUMS"
_NAME = re.compile(r"\.?[0-9a-f]{16}-[0-9a-f]{16}\b")
_ABANDONED_S = 86_400.0
"""Age of an unfinished folder from which on its writer is surely dead."""

_KINDS: dict[str, type[Example]] = {kind.__name__: kind for kind in (Pair, Unpaired, Ranking)}
_TUPLES = ("completions", "scores", "win_probabilities", "finished")
"""Fields of examples that are tuples, which JSON does not know."""


class DamagedError(Exception):
    """What is stored is not what was written; the message says where and what."""


@dataclass(frozen=True)
class Identity:
    """What the content of tokenised data depends on; both halves are values of JSON."""

    rows: Mapping[str, Any]
    tokenizer: Mapping[str, Any]


@dataclass(frozen=True)
class StoredData:
    """Data as they were kept: the splits by name, and whatever was to be kept beside them (values of JSON)."""

    splits: Mapping[str, Split]
    facts: Mapping[str, Any]


class TokenStore:
    """The sets of tokenised data in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def may_hold(self, rows: Mapping[str, Any]) -> bool:
        """Whether there is a set of these rows, by whichever tokenizer."""
        return any(self.folder.glob(f"{_hash_of_rows(rows)}-*"))

    def place_of(self, identity: Identity) -> Path:
        """The folder of a set, whether it is there or not."""
        return self.folder / f"{_hash_of_rows(identity.rows)}-{_short_hash(identity.tokenizer)}"

    def open(self, identity: Identity) -> StoredData | None:
        """The set of this identity, None where there is none.

        Raises:
            DamagedError: it is there, and not as it was written.
        """
        place = self.place_of(identity)
        try:
            if not place.exists():
                return None
            if (place / _SUMS).read_text() != _sums(place):
                raise DamagedError(f"'{place}' is not as it was written")
            kept = json.loads((place / "facts.json").read_bytes())
            if kept["identity"] != _spelled_out(identity):
                return None  # another one whose hash begins alike
            stored = StoredData({name: _read_split(place, name) for name in kept["splits"]}, kept["facts"])
        except (OSError, ValueError) as error:
            raise DamagedError(f"'{place}' cannot be read ({getattr(error, 'strerror', None) or error})") from None
        with suppress(OSError):  # a store that can only be read is never tidied up either
            os.utime(place)
        return stored

    def keep(self, identity: Identity, splits: Mapping[str, Split], facts: Mapping[str, Any]) -> None:
        """Writes a set, in the place of a damaged one too, and lets old ones go where there are too many.

        Raises:
            OSError: there is no room, or nothing may be written there.
        """
        place = self.place_of(identity)
        with new_folder(place) as unfinished:
            for name, split in splits.items():
                _write_split(unfinished, name, split)
            kept = {"identity": _spelled_out(identity), "splits": [*splits], "facts": facts}
            (unfinished / "facts.json").write_text(json.dumps(kept, indent=1))
            (unfinished / _SUMS).write_text(_sums(unfinished))
        with suppress(FileNotFoundError):  # another process tidies up as well
            self._tidy_up(place)

    def _tidy_up(self, newest: Path) -> None:
        """Removes what dead writers left, and the sets that were used the longest time ago while all take too much."""
        there = [path for path in self.folder.iterdir() if _NAME.match(path.name)]  # and nothing else that lies there
        for path in filter(is_leftover, there):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
        sets = sorted((path for path in there if not is_leftover(path)), key=lambda path: path.stat().st_mtime)
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in sets}
        most = min(MOST_BYTES, MOST_OF_DISK * shutil.disk_usage(self.folder).total)
        for path in sets:
            if sum(sizes.values()) > most and path != newest:
                remove_folder(path)
                del sizes[path]


class StoredTexts(Mapping[int, Example]):
    """The texts behind tokenised examples, by their index, each read when it is asked for."""

    def __init__(self, indices: NDArray[np.int64], lines: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self._indices, self._lines, self._ends = indices, lines, ends

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices.tolist())

    def __getitem__(self, index: int) -> Example:
        place = int(np.searchsorted(self._indices, index))  # examples are numbered in their order
        if place == len(self) or self._indices[place] != index:
            raise KeyError(index)
        start = self._ends[place - 1] if place else 0
        kind, fields = json.loads(self._lines[start : self._ends[place]].tobytes().decode("utf-8", "surrogatepass"))
        return _KINDS[kind](**fields | {name: tuple(fields[name]) for name in _TUPLES if fields.get(name) is not None})


def _write_split(folder: Path, name: str, split: Split) -> None:
    columns = flattened(split.examples).columns
    for column, values in columns.items():
        np.save(folder / f"{name}-{column}.npy", values)
    ends = []
    with (folder / f"{name}-texts.jsonl").open("wb") as file:
        for index in columns["index"].tolist():
            text = split.texts[index]
            line = json.dumps([type(text).__name__, vars(text)], ensure_ascii=False) + "\n"
            file.write(line.encode("utf-8", "surrogatepass"))
            ends.append(file.tell())
    np.save(folder / f"{name}-text_ends.npy", np.array(ends, np.int64))


def _read_split(folder: Path, name: str) -> Split:
    columns = {column: _array(folder / f"{name}-{column}.npy") for column in COLUMNS}
    lines = folder / f"{name}-texts.jsonl"
    content = np.asarray(np.memmap(lines, np.uint8, "r")) if lines.stat().st_size else np.zeros(0, np.uint8)
    texts = StoredTexts(columns["index"], content, _array(folder / f"{name}-text_ends.npy"))
    return Split(FlatExamples(columns), texts)


def _array(path: Path) -> NDArray[Any]:
    """An array that stays on the disk; what is read of it the system keeps in memory as long as it likes."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _sums(folder: Path) -> str:
    """The list of all files in a folder but itself."""
    files = sorted(path for path in folder.iterdir() if path.name != _SUMS)
    return "".join(f"{sha256_of(path)}  {path.name}\n" for path in files)


def _spelled_out(identity: Identity) -> Any:
    """An identity as JSON gives it back."""
    return json.loads(json.dumps([identity.rows, identity.tokenizer]))


def _hash_of_rows(rows: Mapping[str, Any]) -> str:
    return _short_hash({"format": FORMAT, "penchant": version("penchant"), "rows": rows})


def _short_hash(part: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]

"""Log-probabilities that outlive a run: a file for each model that computed them, shared by all later runs."""

from __future__ import annotations

import hashlib
import sqlite3
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from penchant.disk import make_folder

_FORMAT = b"penchant-logps-1"
"""Raised when rows are laid out in another way, or when the same model would say something else."""

_SEAL_BYTES = 16
_PATIENCE_S = 60.0
"""How long a process waits for another one that writes."""

_DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
"""What SQLite says of a file that is not as it wrote it; all else is trouble with the disk or with other processes."""


def store_name(architecture: str, weights: str, precision: str, device_type: str) -> str:
    """The name of the file for one source: a model, by its hashes, that computes in this way."""
    model = hashlib.sha256(f"{architecture} {weights}".encode()).hexdigest()
    return f"{model[:32]}-{precision}-{device_type}.sqlite"


class LogpsStore:
    """Log-probabilities by the key of their completion, in a SQLite file that several processes may fill at once.

    What was added outlives a kill and a loss of power. Nothing is given but what was once added, to the bit: each row
    is sealed by a hash of the file's name (which says what computed it), key and values, and a file with a broken seal
    is thrown away. Trouble is never raised: it is told in `troubles`, in sentences for people, and what cannot be read
    counts as never added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.troubles: list[str] = []
        self._source = hashlib.blake2b(path.name.encode(), digest_size=32).digest()
        self._is_writable = True
        self._db: sqlite3.Connection | None = None
        try:
            make_folder(path.parent)
            self._db = self._opened()
        except (OSError, sqlite3.Error) as error:
            self._tell_useless(error)

    def read(self, keys: Iterable[bytes]) -> dict[bytes, Tensor]:
        """What there is under these keys."""
        if self._db is None:
            return {}
        found = {}
        try:
            with self._db:
                self._db.execute("BEGIN")  # one lock for all rows
                for key in keys:
                    row = self._db.execute("SELECT CAST(logps AS BLOB) FROM logps WHERE key = ?", (key,)).fetchone()
                    if row is not None:
                        found[key] = self._unsealed(key, *row)
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)
            return {}
        return found

    def add(self, logps: Mapping[bytes, Tensor]) -> bool:
        """Puts all of them on the disk, where nothing stands under their keys yet; whether that could be done."""
        if self._db is None or not self._is_writable:
            return False
        rows = [(key, self._sealed(key, values)) for key, values in logps.items()]
        try:
            with self._db:  # all or none
                self._db.executemany("INSERT OR IGNORE INTO logps VALUES (?, ?)", rows)
        except (OSError, sqlite3.Error) as error:
            if _is_damage(error):
                self._give_up(error)
            else:  # what is there can still be read
                self._is_writable = False
                self._tell_useless(error)
            return False
        return True

    def _opened(self) -> sqlite3.Connection:
        """The file, looked through from end to end; begun anew where it is damaged."""
        db = self._connected()
        try:
            self._look_through(db)
        except sqlite3.Error as error:
            if not _is_damage(error):
                raise
            db.close()
            self._throw_away()
            db = self._connected()
            self._look_through(db)
        weakref.finalize(self, db.close)
        return db

    def _connected(self) -> sqlite3.Connection:
        # SQLite's own journal is left as it is: the faster WAL needs shared memory, which network disks do not have.
        # One thread at a time works with it, but it may be another one that comes to close it.
        return sqlite3.connect(self.path, timeout=_PATIENCE_S, check_same_thread=False)

    def _look_through(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA page_size = 16384")  # several completions fit into one
        db.execute("CREATE TABLE IF NOT EXISTS logps (key BLOB NOT NULL PRIMARY KEY, logps BLOB NOT NULL)")
        (verdict,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise _Damaged(verdict)
        for row in db.execute("SELECT CAST(key AS BLOB), CAST(logps AS BLOB) FROM logps"):
            self._unsealed(*row)

    def _sealed(self, key: bytes, logps: Tensor) -> bytes:
        values = logps.numpy().astype("<f4", casting="safe").tobytes()
        return values + self._seal(key, values)

    def _unsealed(self, key: bytes, blob: bytes | None) -> Tensor:
        values, seal = (blob or b"")[:-_SEAL_BYTES], (blob or b"")[-_SEAL_BYTES:]
        if seal != self._seal(key, values):
            raise _Damaged("a seal is broken")
        return torch.from_numpy(np.frombuffer(values, "<f4").astype(np.float32))

    def _seal(self, key: bytes, values: bytes) -> bytes:
        return hashlib.blake2b(key + values, digest_size=_SEAL_BYTES, key=self._source, person=_FORMAT).digest()

    def _give_up(self, error: Exception) -> None:
        """Leaves the file alone from here on, for good where it is damaged."""
        self._db = None
        if not _is_damage(error):
            self._tell_useless(error)
            return
        try:
            self._throw_away()
        except OSError as why:
            self._tell_useless(why)

    def _throw_away(self) -> None:
        for path in (self.path.with_name(self.path.name + "-journal"), self.path):
            path.unlink(missing_ok=True)
        self.troubles.append(f"reference.cache: '{self.path}' was damaged; nothing of it is used, all is computed anew")

    def _tell_useless(self, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        self.troubles.append(
            f"reference.cache: '{self.path.parent}' cannot be used ({reason}); what is computed now stays in memory, "
            "and later runs compute it again. Make room there, or name another folder"
        )


class _Damaged(sqlite3.DatabaseError):
    """The file is not as it was written."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


def _is_damage(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _DAMAGE  # the higher bits say it more finely

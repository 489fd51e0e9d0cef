"""Who works on a run directory: one process at a time, which others may ask to stop.

The lock is the system's (flock), so it goes with the process, however that ends. A request to stop is a file that
names the one attempt it is meant for: unlike a signal it cannot reach another process that got the same number since,
and it reaches one in another container or on another machine that shares the disk.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from penchant import stopping
from penchant.disk import read_mapping, write_json
from penchant.errors import UserError

_LOCK, _OWNER, _REQUEST = FILES = (".lock", ".owner.json", ".stop.json")
"""The files in a run directory that belong to this."""

_PATIENCE_S = 0.2
"""Whoever only looks at a lock holds it for a moment; a run that begins just then waits for that."""


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Within it no other process works on the run, and `stopping.check` obeys what `ask_to_stop` asked for.

    Raises:
        UserError: another process works on it.
    """
    lock = FileLock(run_dir / _LOCK)
    try:
        lock.acquire(timeout=_PATIENCE_S, poll_interval=0.02)
    except Timeout:
        owner = read_mapping(run_dir / _OWNER)
        raise UserError(
            f"output_dir: process {owner.get('pid', 'unknown')} on {owner.get('host', 'unknown')} is working on "
            f"'{run_dir}'; wait for it, stop it, or choose another output_dir."
        ) from None
    attempt = uuid.uuid4().hex
    try:
        write_json(run_dir / _OWNER, {"pid": os.getpid(), "host": socket.gethostname(), "attempt": attempt})
        with stopping.asked_through(lambda: read_mapping(run_dir / _REQUEST).get("attempt") == attempt):
            yield
    finally:
        for name in (_OWNER, _REQUEST):
            (run_dir / name).unlink(missing_ok=True)
        lock.release()


def is_being_worked_on(run_dir: Path) -> bool:
    """Whether a process, this one too, holds the lock of the run."""
    if not (run_dir / _LOCK).exists():
        return False
    try:
        with FileLock(run_dir / _LOCK, blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # no right to try: whoever works on a run leaves a note beside the lock
        return (run_dir / _OWNER).exists()


def ask_to_stop(run_dir: Path) -> bool:
    """Asks the process that works on the run to save a checkpoint and end, as a SIGTERM would; False: there is none.

    Raises:
        OSError: the request cannot be written.
    """
    attempt = read_mapping(run_dir / _OWNER).get("attempt")
    if attempt is None or not is_being_worked_on(run_dir):
        return False
    write_json(run_dir / _REQUEST, {"attempt": attempt})
    return True


def is_asked_to_stop(run_dir: Path) -> bool:
    """Whether a request lies there that has not been obeyed yet."""
    attempt = read_mapping(run_dir / _OWNER).get("attempt")
    return attempt is not None and read_mapping(run_dir / _REQUEST).get("attempt") == attempt

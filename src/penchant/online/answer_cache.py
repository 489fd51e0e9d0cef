"""What servers have answered, kept on the disk, so that nothing is asked, or paid for, twice."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from penchant.disk import make_folder, sync
from penchant.online.protocol import Reply


class AnswerCache:
    """Replies by the key of what was asked, in one file of JSON lines that many processes may read and add to at once.

    A reply is on the disk before anybody uses it. Whoever is about to ask claims the key first, so that two processes
    with the same questions share the work. A crash leaves no claim behind, and half a line at most.
    """

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self._file = path.open("ab+", buffering=0)
        sync(path.parent)
        self._read_to = 0
        self._replies: dict[str, Reply] = {}
        self._claimed: set[str] = set()

    def get(self, key: str) -> Reply | None:
        """The reply to what has this key, whichever process had it."""
        if key not in self._replies:
            self._read_on()
        return self._replies.get(key)

    def keep(self, key: str, reply: Reply) -> None:
        """Adds a reply, and returns when it would outlive a loss of power."""
        record = json.dumps({"key": key, "text": reply.text, "finish": reply.finish})
        # The line begins with a newline, too: half a line that a crash has left must not swallow it. One call writes
        # it, so that the lines of two processes never mix.
        line = f"\n{record}\n".encode()
        if self._file.write(line) != len(line):
            raise OSError("the disk took only half of a server's reply; there may be no room left on it")
        os.fsync(self._file.fileno())

    def claim(self, key: str) -> bool:
        """Whether nobody else, here or in another process, is about to ask this; until `release` nobody else will."""
        if key in self._claimed:
            return False
        try:
            # One byte of the file for each key, far behind its end: the system drops such locks when a process dies.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte_of(key))
        except BlockingIOError:
            return False
        self._claimed.add(key)
        return True

    def release(self, key: str) -> None:
        """Ends a claim."""
        self._claimed.remove(key)
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _byte_of(key))

    def _read_on(self) -> None:
        """Takes in the lines that have come since the last look."""
        self._file.seek(self._read_to)
        fresh = self._file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._read_to += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                self._replies[record["key"]] = Reply(str(record["text"]), str(record["finish"]), from_cache=True)
            except (ValueError, LookupError, TypeError):
                continue  # between two lines, or half a line


def _byte_of(key: str) -> int:
    return (1 << 40) + int(key[:12], 16)

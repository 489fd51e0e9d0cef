"""Disks that fail: processes that die at the n-th thing they do to files, power that goes, room that runs out."""

from __future__ import annotations

import functools
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.fsync", "half written"}
_WRITERS = ("penchant.training.state.save_file", "transformers.modeling_utils.safe_save_file")
_DEAD = 77

_watch: tuple[Path, Callable[[str, Any], None]] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's own audit events tell of files before anything is done to them."""
    global _watch
    if _watch is None:
        return
    is_opened_to_write = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if is_opened_to_write or event in _CHANGES:
        folder, tell = _watch
        target = arguments[0]
        # A number is a file that is open, and a bare name one in a folder that `rmtree` has opened.
        if isinstance(target, int) or "/" not in os.fspath(target) or Path(target).is_relative_to(folder):
            watch, _watch = _watch, None  # what the listener does itself is not told
            try:
                tell(event, target)
            finally:
                _watch = watch


sys.addaudithook(_note)


@contextmanager
def watching(folder: Path, tell: Callable[[str, Any], None]) -> Iterator[None]:
    """Within it `tell(what, file)` hears of everything that Python is about to do to files in `folder`.

    What it raises is what the operation fails with. Libraries written in Rust are not heard; of the files that
    safetensors writes, `tell` hears when half of them is there.
    """
    global _watch
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        sys.audit("os.fsync", descriptor)
        real_fsync(descriptor)

    def halting(write: Callable[..., None], tensors: Any, path: Any, **more: Any) -> None:
        write(tensors, path, **more)
        whole = Path(path).read_bytes()
        os.truncate(path, len(whole) // 2)
        sys.audit("half written", str(path))
        Path(path).write_bytes(whole)

    from safetensors.torch import save_file

    writers = [patch(name, functools.partial(halting, save_file)) for name in _WRITERS]
    for patched in (*writers, patch("os.fsync", fsync)):
        patched.start()
    _watch = folder, tell
    try:
        yield
    finally:
        _watch = None
        patch.stopall()


def operations_of(folder: Path, work: Callable[[], None]) -> list[str]:
    """What `work` does to files in `folder`, one after the other."""
    done: list[str] = []
    with watching(folder, lambda what, target: done.append(what)):
        work()
    return done


def dies_at(number: int, folder: Path, work: Callable[[], None]) -> bool:
    """Does `work` in a process that dies before its `number`-th operation; False where it has done all before that."""
    process = os.fork()
    if process == 0:
        code, numbers = 1, itertools.count(1)

        def tell(what: str, target: Any) -> None:
            if next(numbers) == number:
                os._exit(_DEAD)  # nothing is cleaned up, no `finally` is reached

        try:
            with watching(folder, tell):
                work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, _DEAD), f"operation {number} ended with {code}"
    return code == _DEAD


def killed_at(call: str, number: int, work: Callable[[], None]) -> bool:
    """Does `work` in a process that the kernel kills at its `number`-th system call of that name; whether it did.

    Skips the test where there is no strace, or where it may not look at other processes.
    """
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    process = os.fork()
    if process == 0:
        os.kill(os.getpid(), signal.SIGSTOP)  # until strace is there
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    os.waitpid(process, os.WUNTRACED)
    words = ["strace", "-f", "-o", os.devnull, "-p", str(process), "-e", f"trace={call}"]
    words += ["-e", f"inject={call}:signal=SIGKILL:when={number}"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        said = strace.stderr.readline()
        if "attached" not in said:
            os.kill(process, signal.SIGKILL)
        os.kill(process, signal.SIGCONT)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if "attached" not in said:
        pytest.skip(f"strace may not be used here: {said.strip()}")
    assert code in (0, -signal.SIGKILL), f"{call} {number} ended with {code}"
    return code != 0


@contextmanager
def failing_at(number: int, folder: Path, error: OSError) -> Iterator[list[str]]:
    """Within it the `number`-th operation fails with `error`; gives what it was."""
    counted, failed = itertools.count(1), []

    def tell(what: str, target: Any) -> None:
        if next(counted) == number:
            failed.append(what)
            raise error

    with watching(folder, tell):
        yield failed


class SmallDisk:
    """A file system of its own in memory, with as much room as it is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def mount(self, size: int) -> None:
        """Makes it, empty; skips the test where that is not allowed."""
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no `mount` here")
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")

    def change(self, option: str) -> None:
        """Gives it another size (`size=...`), or makes it read-only (`ro`)."""
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.folder)], check=True, capture_output=True)

    def unmount(self) -> None:
        """Takes it away with all that is on it."""
        subprocess.run(["umount", "-l", str(self.folder)], check=False, capture_output=True)


class Power:
    """What is left of a folder when the power goes.

    Nothing is sure but this: the content of a file up to its last fsync, and the names in a folder up to the last fsync
    of the folder. Of what was done to names since, each thing alone may have reached the disk or not; a rename is one
    thing. A file that was not forced to the disk may be empty, cut short or whole. (After Pillai et al. 2014, "All File
    Systems Are Not Created Equal", who found all of these in file systems of the day.)
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids: dict[int, int] = {}
        self._fresh = itertools.count()
        self._live: dict[int, dict[str, int]] = {}
        self._paths: dict[int, Path] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._since: dict[int, list[tuple[str | None, str | None, int]]] = {}
        self._content: dict[int, bytes] = {}
        self.look()
        self._names[self._ids[folder.stat().st_ino]] = {}

    def look(self) -> None:
        """Takes in what was done since the last look, which must be one operation at most."""
        inodes: dict[int, int] = {}
        live: dict[int, dict[str, int]] = {}
        self._paths = {}

        def visit(path: Path) -> int:
            inode = path.stat().st_ino
            own = inodes[inode] = self._ids.get(inode) if inode in self._ids else next(self._fresh)
            self._paths[own] = path
            if path.is_dir():
                live[own] = {child.name: visit(child) for child in sorted(path.iterdir())}
            return own

        visit(self._folder)
        for folder, names in live.items():
            self._since.setdefault(folder, []).extend(_changes(self._live.get(folder, {}), names))
        self._ids, self._live = inodes, live

    def synced(self, descriptor: int) -> None:
        """An fsync is done."""
        own = self._ids[os.fstat(descriptor).st_ino]
        if own in self._live:
            self._names[own], self._since[own] = dict(self._live[own]), []
        else:
            self._content[own] = self._paths[own].read_bytes()

    def gone(self, place: Path, happened: Callable[[], bool], dice: random.Random) -> None:
        """Writes to `place` what is left; `happened` decides about each thing that is not sure."""
        self._restore(self._ids[self._folder.stat().st_ino], place, happened, dice)

    def _restore(self, own: int, place: Path, happened: Callable[[], bool], dice: random.Random) -> None:
        if own not in self._since:
            place.write_bytes(self._bytes_of(own, happened, dice))
            return
        place.mkdir()
        names = dict(self._names.get(own, {}))
        for old, new, what in self._since[own]:
            if happened():
                if old is not None:
                    names.pop(old, None)
                if new is not None:
                    names[new] = what
        for name, what in names.items():
            self._restore(what, place / name, happened, dice)

    def _bytes_of(self, own: int, happened: Callable[[], bool], dice: random.Random) -> bytes:
        sure = self._content.get(own, b"")
        now = self._paths[own].read_bytes() if own in self._paths else sure
        if now == sure or not happened():
            return sure
        return now[: dice.randint(0, len(now))]


def _changes(before: dict[str, int], after: dict[str, int]) -> list[tuple[str | None, str | None, int]]:
    """(name that went, name that came, what bears it)."""
    gone = {name: what for name, what in before.items() if after.get(name) != what}
    changes: list[tuple[str | None, str | None, int]] = []
    for name, what in after.items():
        if before.get(name) != what:
            old = next((other for other, same in gone.items() if same == what), None)
            changes.append((old, name, what))
            gone.pop(old or name, None)
    return changes + [(name, None, what) for name, what in gone.items()]

"""Real processes to strike: commands of `penchant`, forked within milliseconds from one that has all imported.

A fault is described by where it strikes: at the n-th call of a function, which is wrapped in the process that is
struck and nowhere else.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "peft", "transformers.models.llama", "penchant.training.run"])


_STRUCK = b"(struck)\n"


@dataclass(frozen=True)
class Fault:
    """The process sends itself a signal at the `call`-th call of `place`, or as soon as that call has returned."""

    place: str
    """`package.module:name` or `package.module:Class.name`, where it is looked up when it is called."""
    call: int = 1
    signum: int = signal.SIGKILL
    returned: bool = False
    within: str = ""
    """Only calls made by this function, which is named likewise, are counted."""

    def arm(self) -> None:
        """Lies in wait in the process that this is called in."""
        depth = threading.local()
        if self.within:
            _wrap(self.within, functools.partial(_noting_depth, depth))
        calls = itertools.count(1)

        def strikes(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
            is_due = (not self.within or getattr(depth, "now", 0) > 0) and next(calls) == self.call
            if is_due and not self.returned:
                self._strike()
            result = function(*arguments, **named)
            if is_due and self.returned:
                self._strike()
            return result

        _wrap(self.place, strikes)

    def _strike(self) -> None:
        os.write(2, _STRUCK)
        os.kill(os.getpid(), self.signum)


class Command:
    """A `penchant` command in a process of its own; what it says is kept in a file."""

    def __init__(self, words: Sequence[str], said_in: Path, faults: Sequence[Fault] = (), cwd: Path | None = None):
        self._said_in = said_in
        self._process = _FORKS.Process(target=_live, args=(list(words), said_in, list(faults), cwd))
        self._process.start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it is still at work."""
        return self._process.is_alive()

    def leave_alone(self, seconds: float) -> None:
        """Waits so long, or until it has ended."""
        self._process.join(seconds)

    def frozen(self) -> Command:
        """Waits until its fault, a SIGSTOP, has struck."""
        while _STRUCK.decode() not in self.said:
            assert self.is_alive, self.said
            time.sleep(0.02)
        return self

    def send(self, signum: int) -> None:
        """Sends it a signal, if it is still there."""
        if self.is_alive:
            os.kill(self.pid, signum)

    def wait(self, at_most_s: float = 120.0) -> int:
        """Its exit code, or less the number of the signal that ended it.

        Raises:
            TimeoutError: it did not end; then it was killed.
        """
        self._process.join(at_most_s)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"still there after {at_most_s} s:\n{self.said}")
        return self._process.exitcode

    @property
    def said(self) -> str:
        """All that it wrote, to standard output and standard error."""
        return self._said_in.read_text(encoding="utf-8") if self._said_in.exists() else ""


def _live(words: list[str], said_in: Path, faults: list[Fault], cwd: Path | None) -> None:
    """The life of a forked process."""
    import torch

    from penchant.cli import main

    torch.set_num_threads(1)
    said = os.open(said_in, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    os.close(said)
    if cwd is not None:
        os.chdir(cwd)
    for fault in faults:
        fault.arm()
    sys.exit(main(words))


def _wrap(place: str, around: Callable[..., Any]) -> None:
    """Puts `around(function, ...)` into the place of a function."""
    module, _, name = place.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, last = name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    function = getattr(owner, last)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        return around(function, *arguments, **named)

    setattr(owner, last, wrapped)


def _noting_depth(depth: threading.local, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    depth.now = getattr(depth, "now", 0) + 1
    try:
        return function(*arguments, **named)
    finally:
        depth.now -= 1

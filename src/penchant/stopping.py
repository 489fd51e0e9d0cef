"""Being asked to stop, by Ctrl-C, SIGTERM or a request of another process, and stopping where nothing is lost.

A signal may come at any instant, in the middle of an optimizer's step too. So it only leaves a note, and long work
looks for the note (`check`) where it can be left: between examples, between microbatches, between tokens. There it also
looks, now and then, whether somebody left a request elsewhere (`asked_through`).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(KeyboardInterrupt):
    """Somebody asked to stop; raised at a point where nothing is lost. `signum` is the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


_noted: list[int] = []
"""The signals that came since `listening` began."""

_served: list[int] = []
"""The signal that `check` has raised."""


_SECONDS_BETWEEN_LOOKS = 0.5


class _Asked:
    """A place where requests may lie, looked at twice a second; one request is served, once."""

    def __init__(self, is_asked: Callable[[], bool]) -> None:
        self.is_served = False
        self._is_asked, self._next_look = is_asked, 0.0

    def look(self) -> bool:
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + _SECONDS_BETWEEN_LOOKS
        self.is_served = self._is_asked()
        return self.is_served


_here = threading.local()
"""`asked`: the place to look at, of the work that this thread does."""


def check() -> None:
    """Stops here if somebody asked for it.

    Raises:
        StopRequested: once.
    """
    asked: _Asked | None = getattr(_here, "asked", None)
    if _served or (asked and asked.is_served):
        return
    if _noted:
        _served.append(_noted[0])
        raise StopRequested(_noted[0])
    if asked and asked.look():
        raise StopRequested(signal.SIGTERM)


@contextmanager
def asked_through(is_asked: Callable[[], bool]) -> Iterator[None]:
    """Within it `check` in this thread also stops, as for a SIGTERM, when `is_asked()` says so."""
    previous = getattr(_here, "asked", None)
    _here.asked = _Asked(is_asked)
    try:
        yield
    finally:
        _here.asked = previous


@contextmanager
def listening() -> Iterator[None]:
    """Within it Ctrl-C and SIGTERM are noted for `check`, and a second Ctrl-C stops at once.

    A second SIGTERM changes nothing: whoever sent it is being served already. Outside of the main thread, which alone
    receives signals, and within another `listening` it does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is _note:
        yield
        return
    _noted.clear()
    _served.clear()
    previous = {signum: signal.signal(signum, _note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        _noted.clear()
        _served.clear()


def _note(signum: int, frame: FrameType | None) -> None:
    _noted.append(signum)
    if signum == signal.SIGINT and len(_noted) > 1:
        raise KeyboardInterrupt

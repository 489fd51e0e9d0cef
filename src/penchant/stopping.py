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
"""The signal that has been told."""


_held: list[bool] = []
"""Filled where `check` does nothing, since several processes have to stop together."""

_SECONDS_BETWEEN_LOOKS = 0.5


class _Place:
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
"""`place`: where to look, of the work that this thread does."""


def request() -> int | None:
    """The signal by which somebody asked to stop, if so (SIGTERM for a request elsewhere); it is told once."""
    place: _Place | None = getattr(_here, "place", None)
    if _served or (place and place.is_served):
        return None
    if _noted:
        _served.append(_noted[0])
        return _noted[0]
    return signal.SIGTERM if place and place.look() else None


@contextmanager
def held(wanted: bool) -> Iterator[None]:
    """Within it, if `wanted`, `check` does nothing: work that several processes share is stopped by all or by none."""
    _held.extend([True] * wanted)
    try:
        yield
    finally:
        _held.clear()


def check() -> None:
    """Stops here if somebody asked for it.

    Raises:
        StopRequested: once.
    """
    if not _held and (signum := request()):
        raise StopRequested(signum)


@contextmanager
def asked_through(is_asked: Callable[[], bool]) -> Iterator[None]:
    """Within it `check` in this thread also stops, as for a SIGTERM, when `is_asked()` says so."""
    previous = getattr(_here, "place", None)
    _here.place = _Place(is_asked)
    try:
        yield
    finally:
        _here.place = previous


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

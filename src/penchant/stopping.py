"""Being asked to stop, by Ctrl-C or SIGTERM, and stopping where nothing is lost.

A signal may come at any instant, in the middle of an optimizer's step too. So it only leaves a note, and long work
looks for the note (`check`) where it can be left: between examples, between microbatches, between tokens.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
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


def check() -> None:
    """Stops here if somebody asked for it.

    Raises:
        StopRequested: once.
    """
    if _noted and not _served:
        _served.append(_noted[0])
        raise StopRequested(_noted[0])


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


def _note(signum: int, frame: FrameType | None) -> None:
    _noted.append(signum)
    if signum == signal.SIGINT and len(_noted) > 1:
        raise KeyboardInterrupt

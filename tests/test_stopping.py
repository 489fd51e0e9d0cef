"""Being asked to stop: noted at any instant, obeyed where it does no harm."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from penchant import stopping
from penchant.stopping import StopRequested


def ask(signum: int) -> None:
    """Sends the signal to this process, as a shell or a scheduler would."""
    os.kill(os.getpid(), signum)


def asked_and_failing() -> None:
    ask(signal.SIGTERM)
    raise ZeroDivisionError


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_obeyed_at_the_next_check_and_once(signum: int) -> None:
    with stopping.listening():
        stopping.check()
        ask(signum)  # nothing happens here
        with pytest.raises(StopRequested) as stopped:
            stopping.check()
        assert stopped.value.signum == signum
        stopping.check()  # what is done in order to stop is not stopped


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_another_signal_stops_at_once(first: int) -> None:
    with stopping.listening():
        ask(first)
        with pytest.raises(KeyboardInterrupt) as stopped:
            ask(signal.SIGINT)
        assert not isinstance(stopped.value, StopRequested)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_sigterm_changes_nothing(first: int) -> None:
    with stopping.listening():
        ask(first)
        with pytest.raises(StopRequested):
            stopping.check()
        ask(signal.SIGTERM)
        stopping.check()


def test_signals_mean_afterwards_what_they_meant_before() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: caught.append(signum))
    try:
        with pytest.raises(ZeroDivisionError), stopping.listening():
            asked_and_failing()
        assert caught == []
        stopping.check()  # a note that nobody looked at is gone
        ask(signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        stopping.check()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_next_time_one_listens_nothing_is_left_of_the_last() -> None:
    for _ in range(2):
        with stopping.listening():
            stopping.check()
            ask(signal.SIGTERM)
            with pytest.raises(StopRequested):
                stopping.check()


def test_who_listens_within_hears_with_the_same_ear() -> None:
    with stopping.listening():
        with stopping.listening():
            ask(signal.SIGTERM)
        with pytest.raises(StopRequested):
            stopping.check()


def test_beside_the_main_thread_nothing_is_listened_to() -> None:
    handlers = []

    def listen() -> None:
        with stopping.listening():
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert handlers == [before]

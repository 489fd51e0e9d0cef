"""Who works on a run, and being asked to stop by another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from penchant import stopping
from penchant.locking import ask_to_stop, is_asked_to_stop, is_being_worked_on, locked


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_SECONDS_BETWEEN_LOOKS", 0.0)


def test_who_is_asked_stops_at_the_next_check_and_once(tmp_path: Path) -> None:
    with locked(tmp_path):
        stopping.check()
        assert ask_to_stop(tmp_path)
        assert is_asked_to_stop(tmp_path)
        with pytest.raises(stopping.StopRequested, match="SIGTERM"):
            stopping.check()
        stopping.check()  # what is done in order to stop is not stopped
    assert not is_asked_to_stop(tmp_path)
    stopping.check()


def test_nobody_is_asked_where_nobody_works(tmp_path: Path) -> None:
    assert not ask_to_stop(tmp_path)
    with locked(tmp_path):
        pass
    assert not ask_to_stop(tmp_path)
    assert not is_being_worked_on(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []


def test_a_request_for_an_earlier_attempt_stops_no_later_one(tmp_path: Path) -> None:
    with locked(tmp_path):
        ask_to_stop(tmp_path)
        stale = (tmp_path / ".stop.json").read_text()
    (tmp_path / ".stop.json").write_text(stale)  # as if it had been written just after the end
    with locked(tmp_path):
        stopping.check()
        assert not is_asked_to_stop(tmp_path)


def test_a_note_left_by_a_process_that_was_killed_is_no_worker(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from penchant.locking import locked\n"
        f"with locked(Path({str(tmp_path)!r})): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert json.loads((tmp_path / ".owner.json").read_text())["pid"] != os.getpid()
    assert not is_being_worked_on(tmp_path)
    assert not ask_to_stop(tmp_path)


def test_a_look_at_the_lock_refuses_no_run_that_begins_just_then(tmp_path: Path) -> None:
    """Somebody holds the lock for a moment, as a look at it does."""
    code = (
        "import time; from filelock import FileLock\n"
        f"with FileLock({str(tmp_path / '.lock')!r}): print('held', flush=True); time.sleep(0.1)"
    )
    looking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert looking.stdout is not None
    assert looking.stdout.readline() == "held\n"
    with locked(tmp_path):
        assert is_being_worked_on(tmp_path)
    looking.wait()

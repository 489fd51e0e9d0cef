"""Two processes on one run: the second is refused and told by whom, the first is unharmed, the dead hold nothing."""

from __future__ import annotations

import json
import signal
import socket

import pytest

from .matrix import Matrix, some
from .nursery import Command, Fault
from .runs import Workshop, assert_same

_STEP = "penchant.training.loop:Training._step"
_SET_UP = "penchant.training.run:set_up"

_WAYS = ["the same command", "the same command with --overwrite", "resume"]
"""What a second process may try."""


def freeze(workshop: Workshop, words: list[str], place: str, call: int = 1) -> Command:
    """A command that stands still at the n-th call of a function, and still holds what it holds."""
    return workshop.start(words, Fault(place, call, signal.SIGSTOP)).frozen()


def thaw(command: Command) -> int:
    """Lets it go on; its exit code."""
    command.send(signal.SIGCONT)
    return command.wait()


def assert_refused(second: Command, first: Command) -> None:
    """The second one ended with 2, in a sentence that names the first."""
    assert second.wait() == 2, second.said
    assert f"process {first.pid} on {socket.gethostname()} is working on" in second.said
    assert "Traceback" not in second.said


@pytest.mark.parametrize("second", some(_WAYS, "the same command"))
def test_a_second_process_is_refused_and_the_first_is_unharmed(second: str, workshop: Workshop, matrix: Matrix) -> None:
    run_dir = workshop.run_dir(f"taken, {second}")
    words = workshop.train("dpo", run_dir)
    first = freeze(workshop, words, _STEP, 8)
    with matrix.trial(16, "a second process, in each way"):
        again = {
            "the same command": words,
            "the same command with --overwrite": [*words, "--overwrite"],
            "resume": ["resume", str(run_dir)],
        }
        assert_refused(workshop.start(again[second]), first)
        status = workshop.start(["status", str(run_dir), "--json"])
        assert (status.wait(), json.loads(status.said)["state"]) == (0, "running")
        assert thaw(first) == 0, first.said
        assert_same(run_dir, workshop.whole("dpo"))


def test_a_second_process_is_told_who_resumes_not_who_was_killed(workshop: Workshop, matrix: Matrix) -> None:
    run_dir = workshop.run_dir("taken over and taken")
    words = workshop.train("dpo", run_dir)
    killed = workshop.start(words, Fault(_STEP, 8))
    assert killed.wait() == -signal.SIGKILL
    with matrix.trial(16, "a second process, in each way"):
        first = freeze(workshop, words, _SET_UP)
        assert_refused(workshop.start(words), first)
        assert thaw(first) == 0, first.said
        assert_same(run_dir, workshop.whole("dpo"))


@pytest.mark.full
def test_of_two_that_begin_at_once_one_is_refused(workshop: Workshop, matrix: Matrix) -> None:
    run_dir = workshop.run_dir("begun twice")
    words = workshop.train("dpo", run_dir)
    with matrix.trial(16, "two processes that begin at once"):
        slow = freeze(workshop, words, "penchant.training.run:claimed")
        workshop.finish(words)
        assert thaw(slow) == 2, slow.said
        assert "another process has begun a run" in slow.said
        assert_same(run_dir, workshop.whole("dpo"))


@pytest.mark.full
def test_a_run_that_ended_between_a_look_and_the_lock_is_not_begun_again(workshop: Workshop, matrix: Matrix) -> None:
    run_dir = workshop.run_dir("ended meanwhile")
    with matrix.trial(16, "two processes that begin at once"):
        first = freeze(workshop, workshop.train("kto", run_dir), _STEP, 8)
        second = freeze(workshop, workshop.train("dpo", run_dir), "penchant.training.run:locked")
        assert thaw(first) == 0, first.said
        assert thaw(second) == 2, second.said
        assert "holds a finished run" in second.said
        assert_same(run_dir, workshop.whole("kto"))


def test_the_lock_of_a_process_that_was_killed_holds_nobody(workshop: Workshop, matrix: Matrix) -> None:
    run_dir = workshop.run_dir("stale lock")
    words = workshop.train("dpo", run_dir)
    with matrix.trial(16, "a lock whose owner is gone"):
        assert workshop.start(words, Fault(_STEP, 8)).wait() == -signal.SIGKILL
        assert (run_dir / ".lock").exists()
        status = workshop.start(["status", str(run_dir), "--json"])
        assert (status.wait(), json.loads(status.said)["state"]) == (0, "killed")
        workshop.finish(words)
        assert_same(run_dir, workshop.whole("dpo"))


@pytest.mark.full
def test_a_lock_that_another_machine_left_holds_nobody(workshop: Workshop, matrix: Matrix) -> None:
    run_dir = workshop.run_dir("left by another machine")
    words = workshop.train("dpo", run_dir)
    with matrix.trial(16, "a lock whose owner is gone"):
        assert workshop.start(words, Fault(_STEP, 8)).wait() == -signal.SIGKILL
        for name in (".lock", ".owner.json"):
            (run_dir / name).write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
        workshop.finish(["resume", str(run_dir)])
        assert_same(run_dir, workshop.whole("dpo"))

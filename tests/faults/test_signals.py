"""SIGTERM and Ctrl-C in every phase of a run: it saves, says so by its exit code, and goes on to the same bits."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from penchant.locking import ask_to_stop
from penchant.training.checkpoint import newest_checkpoint

from .matrix import Matrix, some
from .nursery import Fault
from .runs import Workshop, assert_same, summary_of

_PHASES = {
    "tokenizing": ("penchant.data.chat:_render_row", 5, True),
    "the first answers": ("penchant.scoring.policy:_can_be_stopped", 2, True),
    "the reference pass": ("penchant.scoring.reference:LogpsCache.fill", 1, True),
    "the first evaluation": ("penchant.training.loop:evaluate", 1, True),
    "training": ("penchant.training.loop:Training._step", 8, False),
    "a step, between microbatches": ("penchant.scoring.policy:Policy.token_logps", 50, False),
    "an evaluation": ("penchant.training.loop:evaluate", 2, False),
    "the last step": ("penchant.training.loop:Training._step", 24, False),
    "the last evaluation": ("penchant.training.loop:evaluate", 5, False),
    "the last answers": ("penchant.scoring.policy:Policy.generate", 2, False),
    "saving": ("penchant.training.state:save_file", 2, False),
}
"""Phase -> the function in which the signal comes, its how many-eth call, and whether nothing was learned before."""


def newest_step(run_dir: Path) -> int | None:
    """The step of the newest checkpoint; every one is whole, or the test fails."""
    checkpoint = newest_checkpoint(run_dir / "checkpoints", pytest.fail)
    return checkpoint.step if checkpoint else None


def stop_in_step(step: int, signum: int) -> Fault:
    """A signal that comes when the step has been taken."""
    return Fault("penchant.training.loop:Training._step", step, signum, returned=True)


@pytest.mark.parametrize("phase", some(_PHASES, "tokenizing", "a step, between microbatches", "the last evaluation"))
def test_sigterm_ends_a_run_with_143_and_it_goes_on_to_the_same_bits(
    phase: str, workshop: Workshop, matrix: Matrix
) -> None:
    place, call, is_early = _PHASES[phase]
    run_dir = workshop.run_dir(f"stopped in {phase}")
    words = workshop.train("dpo", run_dir)
    with matrix.trial(8, "SIGTERM in each phase, from tokenizing to saving"):
        stopped = workshop.start(words, Fault(place, call, signal.SIGTERM))
        assert stopped.wait(at_most_s=30) == 143, stopped.said
        if run_dir.exists():
            assert summary_of(run_dir)["status"] == "interrupted"
            assert summary_of(run_dir)["signal"] == signal.SIGTERM
        assert newest_step(run_dir) is not None or is_early
        workshop.finish(["resume", str(run_dir)] if run_dir.exists() else words)
        assert_same(run_dir, workshop.whole("dpo"))


def test_a_request_left_in_the_directory_stops_a_run_as_sigterm_does(workshop: Workshop, matrix: Matrix) -> None:
    run_dir = workshop.run_dir("asked to stop")
    words = workshop.train("dpo", run_dir)
    with matrix.trial(8, "a request to stop, left in the run directory"):
        command = workshop.start(words, Fault("penchant.training.loop:Training._step", 8, signal.SIGSTOP)).frozen()
        assert ask_to_stop(run_dir)
        command.send(signal.SIGCONT)
        assert command.wait(at_most_s=30) == 143, command.said
        assert summary_of(run_dir)["status"] == "interrupted"
        assert 7 <= (newest_step(run_dir) or 0) < 24, "it is looked for twice a second"
        assert not ask_to_stop(run_dir)
        workshop.finish(["resume", str(run_dir)])
        assert_same(run_dir, workshop.whole("dpo"))


@pytest.mark.full
def test_sigterm_at_random_moments_loses_nothing(workshop: Workshop, matrix: Matrix) -> None:
    dice, whole = random.Random(8), workshop.whole("kto")
    for number in range(6):
        run_dir, stops, code = workshop.run_dir(f"random stops {number}"), 0, None
        while code != 0:
            command = workshop.start(workshop.train("kto", run_dir))
            command.leave_alone(dice.uniform(0.1, 0.9) * workshop.whole_s["kto"] if stops < 3 else 60)
            command.send(signal.SIGTERM)
            code = command.wait(at_most_s=30)
            assert code in (0, 143, -signal.SIGTERM), command.said  # the last: before the command could listen
            stops += code != 0
        if stops:
            with matrix.trial(8, "SIGTERM at a random moment", stops):
                assert_same(run_dir, whole)


@pytest.mark.parametrize("number", some(range(3), 0))
def test_a_second_sigterm_while_the_first_is_served_corrupts_nothing(
    number: int, workshop: Workshop, matrix: Matrix
) -> None:
    again = [
        Fault("penchant.training.state:save_file", 3, signal.SIGTERM),
        Fault("os:rename", 3, signal.SIGTERM, within="penchant.training.loop:write_checkpoint", returned=True),
        Fault("penchant.training.session:Session.keep", 8, signal.SIGTERM),
    ]
    run_dir = workshop.run_dir(f"stopped twice {number}")
    with matrix.trial(8, "a second SIGTERM during the save"):
        stopped = workshop.start(workshop.train("dpo", run_dir), stop_in_step(8, signal.SIGTERM), again[number])
        assert stopped.wait(at_most_s=30) == 143, stopped.said
        assert newest_step(run_dir) == 8
        workshop.finish(["resume", str(run_dir)])
        assert_same(run_dir, workshop.whole("dpo"))


def test_one_ctrl_c_saves_the_step_in_hand_and_ends_with_130(workshop: Workshop, matrix: Matrix) -> None:
    run_dir = workshop.run_dir("ctrl-c")
    with matrix.trial(9, "Ctrl-C once"):
        stopped = workshop.start(workshop.train("dpo", run_dir), stop_in_step(8, signal.SIGINT))
        assert stopped.wait(at_most_s=30) == 130, stopped.said
        assert newest_step(run_dir) == 8
        assert f"`penchant resume {run_dir}` goes on" in stopped.said
        workshop.finish(["resume", str(run_dir)])
        assert_same(run_dir, workshop.whole("dpo"))


_AGAIN = {
    "the save": Fault("penchant.training.state:save_file", 3, signal.SIGINT),
    "the report": Fault("penchant.training.session:write_report", 1, signal.SIGINT),
    "the same step": stop_in_step(8, signal.SIGINT),
}
"""Where the second Ctrl-C comes."""


@pytest.mark.parametrize("place", some(_AGAIN, "the save"))
def test_ctrl_c_twice_stops_at_once_and_the_last_checkpoint_is_whole(
    place: str, workshop: Workshop, matrix: Matrix
) -> None:
    run_dir = workshop.run_dir(f"ctrl-c twice, {place}")
    with matrix.trial(9, "Ctrl-C twice"):
        stopped = workshop.start(workshop.train("dpo", run_dir), stop_in_step(8, signal.SIGINT), _AGAIN[place])
        assert stopped.wait(at_most_s=30) == 130, stopped.said
        assert newest_step(run_dir) in (6, 8)
        assert "Traceback" not in stopped.said
        workshop.finish(["resume", str(run_dir)])
        assert_same(run_dir, workshop.whole("dpo"))


@pytest.mark.full
def test_a_signal_while_the_trained_model_is_written_lets_it_be_written(workshop: Workshop, matrix: Matrix) -> None:
    run_dir = workshop.run_dir("stopped at the very end")
    with matrix.trial(8, "SIGTERM while the trained model is written: finishes"):
        stopped = workshop.start(
            workshop.train("dpo", run_dir), Fault("penchant.training.session:save_model", 1, signal.SIGTERM)
        )
        assert stopped.wait(at_most_s=30) == 0, stopped.said
        assert_same(run_dir, workshop.whole("dpo"))

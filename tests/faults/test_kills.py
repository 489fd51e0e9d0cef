"""`kill -9` at any moment: the same command again ends as if nothing had happened, to the bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest

from .matrix import Matrix, some
from .nursery import Fault
from .runs import KINDS, Workshop, assert_same

_SAVING = "penchant.training.loop:write_checkpoint"
_IN_A_SAVE = [
    Fault("os:fsync", 2, within=_SAVING),
    Fault("os:rename", 3, within=_SAVING),
    Fault("os:rename", 2, within=_SAVING, returned=True),
    Fault("os:fsync", 31, within=_SAVING),
    Fault("penchant.training.state:write_model", 1),
    Fault("penchant.training.state:save_file", 4),
    Fault("penchant.training.state:save_file", 2, returned=True),
    Fault("penchant.training.checkpoint:sha256_of", 9),
    Fault("penchant.training.checkpoint:write_text", 5),
    Fault("penchant.training.checkpoint:write_text", 1, returned=True),
    Fault("os:replace", 3, within=_SAVING),
    Fault("penchant.training.loop:rotate", 3),
    Fault("penchant.training.loop:rotate", 1),
    Fault("os:rename", 1, within="penchant.training.loop:rotate", returned=True),
    Fault("shutil:rmtree", 2, within="penchant.training.loop:rotate"),
    Fault("penchant.training.loop:rotate", 4, returned=True),
]
"""Within the writing of a checkpoint and the letting go of older ones."""

_ELSEWHERE = {
    "before the run file is there": Fault("penchant.training.run:write_text"),
    "while the run file is written": Fault("os:replace", within="penchant.training.run:write_text"),
    "before the first step": Fault("penchant.training.step:accumulate_gradient"),
    "before the first checkpoint": Fault(_SAVING),
    "in an optimizer step": Fault("torch.optim.optimizer:Optimizer.zero_grad", 14),
    "between metrics and checkpoint": Fault("penchant.training.loop:Training._save_if_due", 13),
    "after a line of metrics": Fault("penchant.training.logger:append_json_line", 12, returned=True),
    "in an evaluation": Fault("penchant.training.loop:evaluate", 3),
    "behind the last step": Fault("penchant.training.session:write_judgements"),
    "in the last answers": Fault("penchant.scoring.policy:Policy.generate", 2),
    "while the model is written": Fault(
        "penchant.models.weights:write_model", within="penchant.training.session:save_model"
    ),
    "before the model is committed": Fault("os:rename", within="penchant.training.session:save_model"),
    "before the run counts as finished": Fault("penchant.training.session:save_model", returned=True),
}
"""Moments between the beginning of a run and its end."""

_IN_A_ROUND = {
    "before anything is sampled": ("sppo", Fault("penchant.scoring.policy:Policy.sample", 2)),
    "before the verdict": ("online-dpo", Fault("penchant.online.judges:RuleJudge.judge", 6)),
    "after the verdict": ("sppo", Fault("penchant.online.judges:RuleJudge.judge", 5, returned=True)),
    "before a chunk is kept": ("online-dpo", Fault("penchant.online.growing:GrowingFile.append", 8)),
    "when a chunk is kept": ("sppo", Fault("penchant.online.growing:GrowingFile.append", 7, returned=True)),
    "before the reference's answer is kept": ("sppo", Fault("penchant.training.rounds:save", 2)),
    "when the reference's answer is kept": ("sppo", Fault("penchant.training.rounds:save", 2, returned=True)),
    "in a round's steps": ("sppo", Fault("penchant.training.step:accumulate_gradient", 12)),
    "in a held-out evaluation": ("online-dpo", Fault("penchant.training.answers:write_json_lines", 2)),
}
"""Moments of runs that sample their own completions: the kind, and the fault."""

_FINISHED = {
    "before the checkpoints go": Fault("penchant.training.session:forget_insurance"),
    "before the model card": Fault("penchant.training.session:write_model_card"),
    "before the report": Fault("penchant.training.session:write_report"),
    "while the report is written": Fault("os:replace", within="penchant.training.session:write_report"),
}
"""Moments when the trained model is there, and not yet all that tells of it."""


def test_two_runs_of_one_command_are_the_same_to_the_bit(workshop: Workshop, matrix: Matrix, full: bool) -> None:
    for kind in KINDS if full else list(KINDS)[:1]:
        with matrix.trial(25, "the same command in two processes"):
            again = workshop.run_dir(f"again, {kind}")
            workshop.finish(workshop.train(kind, again))
            assert_same(again, workshop.whole(kind))


def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(
    workshop: Workshop, matrix: Matrix, full: bool
) -> None:
    dice = random.Random(0)
    kills = life = 0
    while kills < (35 if full else 3):
        kind = list(KINDS)[life % len(KINDS)]
        kills += live_with_kills(workshop, matrix, dice, kind, workshop.run_dir(f"random {life}"))
        life += 1


def live_with_kills(workshop: Workshop, matrix: Matrix, dice: random.Random, kind: str, run_dir: Path) -> int:
    """One run, killed up to three times, also while it resumes; how often it was."""
    whole, kills = workshop.whole(kind), 0
    for _ in range(3):
        command = workshop.start(workshop.again(kind, run_dir, dice))
        command.leave_alone(dice.uniform(0.05, 0.9) * workshop.whole_s[kind])
        command.send(signal.SIGKILL)
        if command.wait() != -signal.SIGKILL:
            break
        kills += 1
    else:
        command = workshop.start(workshop.again(kind, run_dir, dice))
    if kills:
        with matrix.trial(1, "kill -9 at a random moment", kills):
            assert command.wait() == 0, command.said
            assert_same(run_dir, whole)
    return kills


@pytest.mark.parametrize("number", some(range(len(_IN_A_SAVE)), 0, 1))
def test_a_run_killed_within_a_save_ends_as_if_nothing_had_happened(
    number: int, workshop: Workshop, matrix: Matrix
) -> None:
    kind = list(KINDS)[number % len(KINDS)]
    survive(workshop, matrix, "kill -9 within a save", kind, f"in a save {number}", _IN_A_SAVE[number])


@pytest.mark.parametrize("moment", some(_ELSEWHERE, "while the run file is written", "before the model is committed"))
def test_a_run_killed_at_a_weak_moment_ends_as_if_nothing_had_happened(
    moment: str, workshop: Workshop, matrix: Matrix
) -> None:
    survive(workshop, matrix, "kill -9 between two stages of a run", "dpo", moment, _ELSEWHERE[moment])


@pytest.mark.parametrize("moment", some(_IN_A_ROUND, "before a chunk is kept", "when the reference's answer is kept"))
def test_a_run_killed_in_a_round_samples_nothing_twice_and_ends_the_same(
    moment: str, workshop: Workshop, matrix: Matrix
) -> None:
    kind, fault = _IN_A_ROUND[moment]
    survive(workshop, matrix, "kill -9 while it samples, judges or trains on what it sampled", kind, moment, fault)


@pytest.mark.parametrize("moment", some(_FINISHED, "before the report"))
def test_a_run_killed_behind_its_end_is_completed_by_resume(moment: str, workshop: Workshop, matrix: Matrix) -> None:
    kind, run_dir = "dpo, saved by the clock", workshop.run_dir(moment)
    struck = workshop.start(workshop.train(kind, run_dir), _FINISHED[moment])
    assert struck.wait() == -signal.SIGKILL, struck.said
    with matrix.trial(1, "kill -9 behind the end, before the report"):
        workshop.finish(["resume", str(run_dir)])
        assert_same(run_dir, workshop.whole(kind))


_RESUMING = {
    "as the logs are cut": Fault("penchant.training.run:cut_logs"),
    "between the two logs": Fault("penchant.training.resume:write_json_lines", returned=True),
    "as later checkpoints go": Fault("penchant.training.run:remove_from", returned=True),
    "as the run file is written": Fault("penchant.training.run:write_text"),
    "before the state is loaded": Fault("penchant.training.loop:load_state"),
    "when the state is loaded": Fault("penchant.training.loop:load_state", returned=True),
    "before its first save": Fault("penchant.training.loop:write_checkpoint"),
}
"""Moments of going on after a kill."""


@pytest.mark.parametrize("moment", some(_RESUMING, "between the two logs"))
def test_a_run_killed_again_while_it_resumes_ends_as_if_nothing_had_happened(
    moment: str, workshop: Workshop, matrix: Matrix
) -> None:
    run_dir = workshop.run_dir(f"resuming, {moment}")
    words = workshop.train("dpo", run_dir)
    assert workshop.start(words, Fault(_SAVING, 4)).wait() == -signal.SIGKILL
    again = workshop.start(["resume", str(run_dir)], _RESUMING[moment])
    assert again.wait() == -signal.SIGKILL, again.said
    with matrix.trial(1, "kill -9 while it resumes"):
        workshop.finish(words)
        assert_same(run_dir, workshop.whole("dpo"))


_OVERWRITING = {
    "before anything goes": Fault("penchant.training.run:open_run_dir"),
    "as checkpoints go": Fault("shutil:rmtree", 1, within="penchant.training.run:open_run_dir"),
    "as the model goes": Fault("shutil:rmtree", 2, within="penchant.training.run:open_run_dir"),
    "as files go": Fault("pathlib:Path.unlink", 4, within="penchant.training.run:open_run_dir"),
    "as the last file goes": Fault("penchant.training.run:open_run_dir", returned=True),
    "before the first checkpoint": Fault(_SAVING),
}
"""Moments of an old run's removal."""


@pytest.mark.parametrize("moment", some(_OVERWRITING, "as files go"))
def test_a_run_killed_while_it_takes_the_place_of_an_old_one_is_begun_by_the_same_command(
    moment: str, workshop: Workshop, matrix: Matrix
) -> None:
    run_dir = workshop.run_dir(f"overwriting {moment}")
    shutil.copytree(workshop.whole("kto"), run_dir)
    words = workshop.train("dpo", run_dir, "--overwrite")
    struck = workshop.start(words, _OVERWRITING[moment])
    assert struck.wait() == -signal.SIGKILL, struck.said
    with matrix.trial(1, "kill -9 while --overwrite clears an old run"):
        workshop.finish(words)
        assert_same(run_dir, workshop.whole("dpo"))


@pytest.mark.full
def test_a_run_that_was_given_no_place_is_found_again_by_the_same_command(
    workshop: Workshop, matrix: Matrix, tmp_path: Path
) -> None:
    words = workshop.train("dpo", Path("unused"))[:-2]  # without output_dir
    assert workshop.start(words, Fault(_SAVING, 4), cwd=tmp_path).wait() == -signal.SIGKILL
    with matrix.trial(1, "kill -9 of a run without output_dir"):
        command = workshop.start(words, cwd=tmp_path)
        assert command.wait() == 0, command.said
        (run_dir,) = (tmp_path / "runs").iterdir()
        assert_same(run_dir, workshop.whole("dpo"))


_TORN = {"a line": b'{"step": 9, "lo', "a letter": "one \u00e4".encode()[:-1], "zeros": b"\x00" * 20}


@pytest.mark.parametrize("end", some(_TORN, "a letter"))
def test_a_log_that_ends_in_half_a_line_is_mended(end: str, workshop: Workshop, matrix: Matrix) -> None:
    run_dir = workshop.run_dir(f"torn, {end}")
    assert workshop.start(workshop.train("dpo", run_dir), Fault(_SAVING, 4)).wait() == -signal.SIGKILL
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run_dir / name).open("ab") as log:
            log.write(_TORN[end])
    with matrix.trial(28, "a log that was cut in the middle of a line"):
        workshop.finish(["resume", str(run_dir)])
        assert_same(run_dir, workshop.whole("dpo"))
        assert all(json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines())


def survive(workshop: Workshop, matrix: Matrix, fault: str, kind: str, name: str, strike: Fault) -> None:
    """Strikes a run and gives the same command again."""
    run_dir = workshop.run_dir(name)
    struck = workshop.start(workshop.train(kind, run_dir), strike)
    assert struck.wait() == -signal.SIGKILL, f"{strike} was never reached:\n{struck.said}"
    with matrix.trial(1, fault):
        workshop.finish(workshop.train(kind, run_dir))
        assert_same(run_dir, workshop.whole(kind))

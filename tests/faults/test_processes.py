"""One of several processes dies or hangs, under torchrun: all begin again by themselves, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from penchant.disk import is_leftover, read_json_lines
from penchant.training.checkpoint import newest_checkpoint
from penchant.training.rundir import read_summary

from ..training.several import assert_same_course, make_shelf, run_on, together, train_from_to
from .matrix import Matrix, some
from .nursery import Fault
from .runs import Workshop

ROOT = Path(__file__).parents[2]

MID_STEP = Fault("penchant.scoring.policy:token_logps", 60)
MID_SAVE = Fault("penchant.training.checkpoint:give_part", 2)
AFTER_ITS_PART = Fault("penchant.training.checkpoint:give_part", 2, returned=True)
HANGS = Fault("penchant.scoring.policy:token_logps", 60, signal.SIGSTOP)


@pytest.fixture(scope="module")
def shelf(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and data."""
    return make_shelf(tmp_path_factory.mktemp("shelf"), tokenizer)


def under_torchrun(words: list[str], strikes: list[Fault | None], patience_s: float = 60.0) -> tuple[str, float]:
    """Runs a command in two processes; what they said, and for how many seconds."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "tests.faults.struck", *words),
    ]
    environment = {
        **os.environ,
        "STRIKES": json.dumps([fault and asdict(fault) for fault in strikes]),
        "PENCHANT_PATIENCE_MINUTES": str(patience_s / 60),
    }
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    return said, time.monotonic() - started


def check_survived(run_dir: Path, whole: Path) -> None:
    """The run came to its end as one that nobody struck, and left nothing unfinished."""
    assert read_summary(run_dir)["status"] == "finished"
    assert not [path for path in run_dir.rglob("*") if is_leftover(path)]
    assert_same_course(whole, run_dir)


def times_resumed(run_dir: Path) -> list[str]:
    return [event["message"] for event in read_json_lines(run_dir / "events.jsonl") if event["code"] == "resumed"]


def test_killed_processes_begin_again_by_themselves(
    workshop: Workshop, matrix: Matrix, full: bool, tmp_path: Path
) -> None:
    whole = workshop.whole("dpo")
    strikes: list[Fault | None] = [MID_STEP, MID_SAVE, *([AFTER_ITS_PART] if full else [])]
    with matrix.trial(15, "one of two processes killed mid-step and mid-save, torchrun --max-restarts", len(strikes)):
        said, _ = under_torchrun(workshop.train("dpo", tmp_path / "run"), strikes)
        assert said.count("(struck)") == len(strikes)
        assert len(times_resumed(tmp_path / "run")) == len(strikes)
        check_survived(tmp_path / "run", whole)


@pytest.mark.full
def test_processes_do_not_wait_for_ever(workshop: Workshop, matrix: Matrix, tmp_path: Path) -> None:
    whole = workshop.whole("dpo")
    with matrix.trial(15, "one of two processes hangs: the other gives up, all begin again"):
        said, seconds = under_torchrun(workshop.train("dpo", tmp_path / "run"), [HANGS], patience_s=5)
        assert seconds < 150
        assert "has lost the others" in said
        check_survived(tmp_path / "run", whole)


@pytest.mark.fault(14, "goes on with 4, 2, 1 and 4 processes: the same order, the same losses")
@pytest.mark.parametrize("kind", some(["paired, copy", "unpaired, adapter off"], "paired, copy"))
def test_a_run_goes_on_with_more_or_fewer_processes(kind: str, shelf: Path, tmp_path: Path) -> None:
    whole, moved = (run_on(shelf, kind, "prefix_shared", tmp_path / name) for name in ("whole", "moved"))
    together(1, train_from_to, whole, None, tmp_path / "whole.jsonl", said_in=tmp_path / "said")
    for number, last_step in ((4, 5), (2, 9), (1, 13), (4, None)):
        together(number, train_from_to, moved, last_step, tmp_path / "moved.jsonl", said_in=tmp_path / "said")
        checkpoint = newest_checkpoint(tmp_path / "moved" / "checkpoints", pytest.fail)
        if last_step is not None:
            assert checkpoint is not None
            assert checkpoint.step == last_step
            moments = [name for name in checkpoint.facts["files"] if name.startswith("training-")]
            assert len(moments) == (number if number > 1 else 0)
    drawn = [read_json_lines(tmp_path / f"{name}.jsonl") for name in ("whole", "moved")]
    assert len(drawn[0]) == 20
    assert drawn[0] == drawn[1]
    assert_same_course(tmp_path / "whole", tmp_path / "moved")

"""A run of many steps and many saves holds on to nothing: not to memory, not to files; its log stays a log."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ..conftest import make_tiny_model
from ..training.test_run import rows, write_rows
from .matrix import Matrix
from .nursery import Command
from .runs import Workshop, summary_of

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to look into a process")

_LOGGED_EVERY = 10


@dataclass(frozen=True)
class Look:
    """What a process holds at some step."""

    step: int
    resident_bytes: int
    num_files: int


def look_at(command: Command, run_dir: Path) -> Look:
    process = Path(f"/proc/{command.pid}")
    resident_pages = int((process / "statm").read_text().split()[1])
    num_files = len(os.listdir(process / "fd"))
    return Look(summary_of(run_dir).get("steps", 0), resident_pages * os.sysconf("SC_PAGE_SIZE"), num_files)


def watch(command: Command, run_dir: Path, until_step: int) -> list[Look]:
    """Looks at a process from outside until it has come so far."""
    looks: list[Look] = []
    while not looks or looks[-1].step < until_step:
        command.leave_alone(0.1)
        assert command.is_alive, command.said
        looks.append(look_at(command, run_dir))
    return looks


def growth(looks: list[Look], steps: int) -> float:
    """Memory in the last quarter of the steps, by that in the second fifth, less 1: the first is for warming up."""
    early = [look.resident_bytes for look in looks if 0.2 < look.step / steps <= 0.4]
    late = [look.resident_bytes for look in looks if look.step / steps > 0.75]
    return statistics.median(late) / statistics.median(early) - 1


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_memory_files_and_the_log_hold_out(
    workshop: Workshop, matrix: Matrix, full: bool, tokenizer: Any, tmp_path: Path
) -> None:
    steps = 10_000 if full else 400
    model, run_dir = tmp_path / "model", tmp_path / "run"
    make_tiny_model(hidden_size=16, intermediate_size=16, num_hidden_layers=1).save_pretrained(model)
    tokenizer.save_pretrained(model)
    words = [
        *("train", "--model", str(model), "--data", write_rows(tmp_path / "pairs.jsonl", rows(8))),
        *f"--batch_size 2 --num_train_epochs {steps // 4} --eval_size 0 --num_samples 0".split(),
        *f"--save_steps 10 --logging_steps {_LOGGED_EVERY} --output_dir {run_dir}".split(),
    ]
    with matrix.trial(28, f"a soak of {steps} steps, saved every 10"):
        command = workshop.start(words)
        looks = watch(command, run_dir, until_step=int(0.9 * steps))
        command.send(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        print(f"soak: memory grew by {growth(looks, steps):.2%}, files {sorted({look.num_files for look in looks})}")
        assert growth(looks, steps) < 0.05
        settled = [look.num_files for look in looks if look.step > 0.2 * steps]
        assert max(settled) - min(settled) <= 3, settled  # a save that is going on holds a few
        half = len(settled) // 2  # what is held between the saves: the least that was seen
        assert min(settled[half:]) <= min(settled[:half])

        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        logged = [json.loads(line)["step"] for line in lines[:-1]]
        assert logged == list(itertools.islice(itertools.count(_LOGGED_EVERY, _LOGGED_EVERY), len(logged)))
        workshop.finish(["resume", str(run_dir)])
        found = [record["step"] for record in records(run_dir / "metrics.jsonl")]
        assert found == list(range(_LOGGED_EVERY, steps + 1, _LOGGED_EVERY))

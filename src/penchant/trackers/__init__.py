"""Trackers: TensorBoard, Weights & Biases, trackio, MLflow, fed with the lines of metrics.jsonl.

Each works in a process of its own that reads the run's log as it grows, like any other reader. So whatever a client
does, hang, crash or wait for a server, cannot reach the training: nothing of a tracker runs in it, and nothing is sent
to one from it. A client's package is imported there, and only there.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from penchant.disk import make_folder
from penchant.errors import UserError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
"""What each tracker imports; the extra that brings it has the tracker's name."""

FOLDER = "trackers"
"""Where in a run directory it is kept what a tracker calls the run, how much was sent, and why it failed."""

PATIENCE_S = 20.0
"""How long the end of a run waits for what is still being sent."""

LONGEST_END_S = 600.0
"""After that a tracker that does not come to its end by itself is ended."""

Tell = Callable[[str, int], None]
"""Takes a sentence for people and the step that it belongs to."""


def refuse_missing(names: Sequence[str]) -> None:
    """Stops where the package of a tracker is not installed.

    Raises:
        UserError: naming the one and how it is installed.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"trackers: {name} is not installed; pip install 'penchant[{name}]', or leave it out of trackers."
            )


class Trackers:
    """The trackers of a run that goes on."""

    def __init__(self, run_dir: Path, names: Sequence[str], tell: Tell) -> None:
        self._run_dir, self._tell_run, self._step = run_dir, tell, 0
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in names:
            try:
                make_folder(run_dir / FOLDER)
                log_of(run_dir, name).unlink(missing_ok=True)
                self._processes[name] = _start(run_dir, name)
            except OSError as error:
                self._tell(f"the tracker {name} could not be started ({error.strerror}); the run goes on without it")

    def look(self, step: int) -> None:
        """Tells of those that have failed, each once. This takes microseconds and waits for nothing."""
        self._step = step
        for name, process in list(self._processes.items()):
            if (code := process.poll()) is not None:
                del self._processes[name]
                if code:
                    reason = _reason(self._run_dir, name, code)
                    self._tell(f"the tracker {name} has failed ({reason}); the run goes on without it")

    def end(self) -> None:
        """Lets them come to their end, and waits for that a little."""
        for process in self._processes.values():
            if process.stdin:
                with suppress(OSError):
                    process.stdin.close()  # the end of its input is the end of the run
        deadline = time.monotonic() + PATIENCE_S
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self.look(self._step)
        for name in self._processes:
            self._tell(
                f"the tracker {name} has not sent everything within {PATIENCE_S:g} s of the end; it is left to itself "
                f"for up to {LONGEST_END_S / 60:g} minutes"
            )
        self._processes.clear()

    def _tell(self, sentence: str) -> None:
        with suppress(OSError):  # a disk that is full must not make of a tracker's failure one of the run
            self._tell_run(sentence, self._step)


@contextmanager
def tracking(run_dir: Path, names: Sequence[str], tell: Tell) -> Iterator[Trackers]:
    """Within it the metrics of the run go to these trackers too; a run that was tracked before goes on there."""
    trackers = Trackers(run_dir, names, tell)
    try:
        yield trackers
    finally:
        trackers.end()


def log_of(run_dir: Path, name: str) -> Path:
    """Where a tracker that fails says why."""
    return run_dir / FOLDER / f"{name}.log"


def _start(run_dir: Path, name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "penchant.trackers", name, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the run
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _reason(run_dir: Path, name: str, code: int) -> str:
    with suppress(OSError):
        lines = log_of(run_dir, name).read_text(encoding="utf-8", errors="replace").split("\n")
        if told := [line.strip() for line in lines if line.strip()]:
            return told[-1][:500]
    return f"exit code {code}"

"""The trackers' own clients, each behind the same few calls."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Settings = Mapping[str, Any]
"""The run file, by dotted keys."""


@runtime_checkable
class Client(Protocol):
    """A tracker that a run's lines are sent to."""

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics."""

    def flush(self) -> None:
        """Everything sent so far shall be on its way."""

    def finish(self, status: str) -> None:
        """The run has ended: finished, interrupted, failed or killed."""


class TensorBoard:
    """Event files in RUN_DIR/tensorboard. https://www.tensorflow.org/tensorboard"""

    def __init__(self, run_dir: Path, name: str, settings: Settings, is_known: bool) -> None:
        # The writer of the package itself: that of torch would bring torch into this process.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(run_dir / "tensorboard"))

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """One event with all values."""
        told = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=told)))

    def flush(self) -> None:
        """To the file."""
        self._writer.flush()

    def finish(self, status: str) -> None:
        """Closes the file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, in project $WANDB_PROJECT or `penchant`. https://docs.wandb.ai"""

    def __init__(self, run_dir: Path, name: str, settings: Settings, is_known: bool) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "penchant"),
            name=os.environ.get("WANDB_NAME", run_dir.name),
            id=name.rpartition("-")[2],
            resume="allow",
            config=dict(settings),
            dir=str(run_dir),
        )

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one step; wandb puts together what has the same one."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """The client sends by itself."""

    def finish(self, status: str) -> None:
        """Waits until all is sent."""
        self._run.finish(exit_code=0 if status == "finished" else 1)


class Trackio:
    """A run of trackio, in project $TRACKIO_PROJECT or `penchant`. https://huggingface.co/docs/trackio"""

    def __init__(self, run_dir: Path, name: str, settings: Settings, is_known: bool) -> None:
        import trackio

        self._trackio = trackio
        project = os.environ.get("TRACKIO_PROJECT", "penchant")
        trackio.init(project=project, name=name, config=dict(settings), resume="allow")

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one step."""
        self._trackio.log(dict(values), step=step)

    def flush(self) -> None:
        """The client sends by itself."""

    def finish(self, status: str) -> None:
        """Waits until all is sent."""
        self._trackio.finish()


class MLflow:
    """A run of MLflow, in experiment $MLFLOW_EXPERIMENT_NAME or `penchant`. https://mlflow.org/docs"""

    _LONGEST_VALUE = 500

    def __init__(self, run_dir: Path, name: str, settings: Settings, is_known: bool) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "penchant"))
        found = mlflow.search_runs(
            filter_string=f"tags.`penchant.run` = '{name}'", output_format="list", max_results=1
        ) if is_known else []  # fmt: skip
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
            return
        mlflow.start_run(run_name=run_dir.name, tags={"penchant.run": name})
        for key, value in settings.items():
            mlflow.log_param(key, str(value)[: self._LONGEST_VALUE])

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one step."""
        self._mlflow.log_metrics(dict(values), step=step)

    def flush(self) -> None:
        """The client sends at once."""

    def finish(self, status: str) -> None:
        """Says how it ended."""
        self._mlflow.end_run({"finished": "FINISHED", "failed": "FAILED"}.get(status, "KILLED"))


CLIENTS: dict[str, Callable[[Path, str, Settings, bool], Client]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": MLflow,
}
"""`(run_dir, name, settings, is_known)` opens the run that is called `name`; whether it was opened before."""


def new_name(run_dir: Path) -> str:
    """What a tracker calls a run: no other run is called so."""
    return f"{run_dir.name}-{uuid.uuid4().hex[:8]}"

"""Stages that follow each other: each a run of its own, beginning with the model that the one before has made."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penchant import stopping
from penchant.config import RunConfig
from penchant.disk import make_folder, write_text
from penchant.errors import UserError
from penchant.losses import build_loss
from penchant.models.load import load_model_and_tokenizer
from penchant.models.weights import save_model
from penchant.training.logger import RunLog
from penchant.training.run import execute
from penchant.training.rundir import is_run_of, read_summary

STAGES = "stages.yaml"
"""The file in a pipeline's folder that says what its stages are."""
_MERGED = "merged"


@dataclass(frozen=True)
class Pipeline:
    """What became of the stages: their folders, as far as they were begun."""

    folder: Path
    run_dirs: list[Path]
    stopped_by: int | None = None
    """The signal that ended it early."""


def run_stages(
    folder: Path, text: str, stages: Sequence[RunConfig], overwrite: bool = False, log: RunLog | None = None
) -> Pipeline:
    """Trains stage by stage. `text` describes them, and is kept in the folder for `penchant resume`.

    A stage that is finished with the same settings is kept, one that was broken off is gone on with. The chat template
    goes from stage to stage with the tokenizer; an adapter is merged into its base before the next stage begins, so
    that weights, not names of folders, are handed on.

    Raises:
        UserError: a stage is no valid run (before any was begun), or fails.
    """
    log = log or RunLog()
    for config in stages:
        build_loss(config.loss_settings())  # speaks up now, not hours later
    run_dirs = [Path(config.output_dir or "") for config in stages]
    make_folder(folder)
    write_text(folder / STAGES, text)
    is_new = overwrite
    with stopping.listening():
        for number, (config, run_dir) in enumerate(zip(stages, run_dirs, strict=True), start=1):
            stopping.check()
            log.say("stage", f"{number} of {len(stages)}: {run_dir.name} ({config.method_name()})")
            if number > 1:
                config = config.model_copy(update={"model": str(_model_of(run_dirs[number - 2], stages[number - 2]))})
            is_finished = read_summary(run_dir).get("status") == "finished"
            if is_finished and not is_new and is_run_of(run_dir, config):
                log.say("stage", "is there already, finished with these settings; kept")
                continue
            shutil.rmtree(run_dir / _MERGED, ignore_errors=True)
            try:
                # What follows a stage that was trained just now began with another model, and is of no use any more.
                result = execute(config, overwrite=overwrite or (is_new and is_finished))
            except UserError as error:
                raise UserError(f"stage {run_dir.name}: {error}") from error
            is_new = True
            if result.summary["status"] == "stopped":
                raise UserError(
                    f"stage {run_dir.name}: the watch has stopped it ({result.summary['stopped_by']['code']}); look at "
                    f"{run_dir / 'report.html'}. `penchant resume {run_dir}` goes on past that, and the same command "
                    "again then with the stages behind."
                )
            if result.summary["status"] == "interrupted":
                return Pipeline(folder, run_dirs[:number], result.summary["signal"])
    return Pipeline(folder, run_dirs)


def _model_of(run_dir: Path, config: RunConfig) -> Path:
    """The model that a finished stage hands on, with its adapter folded into its weights."""
    model = run_dir / "model"
    if not config.lora.rank or not (model / "adapter_config.json").exists():
        return model
    merged = run_dir / _MERGED
    if not merged.exists():
        save_model(*load_model_and_tokenizer(str(model)), merged)
    return merged

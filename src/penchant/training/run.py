"""A whole run: from a run file to a trained model and a page that shows what happened."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from penchant import distributed, stopping
from penchant.config import RunConfig, config_from
from penchant.disk import free_bytes, write_json, write_text
from penchant.doctor.preview import names_of
from penchant.locking import locked
from penchant.losses import Loss
from penchant.online.judges import Judge, RuleJudge
from penchant.scoring.policy import Policy
from penchant.trackers import tracking
from penchant.training import hardware
from penchant.training.checkpoint import Checkpoint, newest_checkpoint, remove_from
from penchant.training.datasets import Rows
from penchant.training.describe import describe, expected_cost
from penchant.training.logger import RunLog
from penchant.training.loop import CHECKPOINTS
from penchant.training.online import OnlineSetup, set_up_online
from penchant.training.resume import (
    Changes,
    changes_since,
    check_allowed,
    cut_logs,
    describe_changes,
    fingerprint,
    refuse_changes,
    remember_allowed,
    was_allowed,
)
from penchant.training.rounds import claim_rounds
from penchant.training.rundir import (
    check_run_dir,
    choose_run_dir,
    claimed,
    explained,
    open_run_dir,
    read_summary,
    resolved_run_file,
)
from penchant.training.session import Session, first_summary
from penchant.training.setup import Setup, set_up
from penchant.training.shared import Shared
from penchant.training.state import expected_checkpoint_bytes, read_facts
from penchant.training.together import (
    copy_rounds,
    refuse_other_contents,
    refuse_other_versions,
    refuse_separate_disks,
    refuse_what_processes_cannot,
)


@dataclass(frozen=True)
class RunResult:
    """A finished run: where it is and what it came to (`summary.json`)."""

    run_dir: Path
    summary: dict[str, Any]


def train(
    model: str | Policy,
    data: Rows,
    eval_data: Rows | None = None,
    loss: Loss | str | Mapping[str, Any] | None = None,
    judge: Judge | Callable[..., Sequence[float]] | Mapping[str, Any] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    allow_change: Sequence[str] = (),
    **settings: Any,
) -> RunResult:
    """Trains a model on preferences: what `penchant train` does, from Python.

    Args:
        model: a local folder, a hub id or a `.gguf` file; or a `Policy`, which is trained in place.
        data: a file of rows, or an iterable of them, such as `{"prompt": ..., "chosen": ..., "rejected": ...}`.
        eval_data: held-out rows, likewise.
        loss: a loss, its name, or its settings; default: that of `method`.
        judge: who judges sampled completions: a function `(prompt, completions) -> scores` (or `(prompt, completions,
            row)`, with the prompt's row), a `Judge`, or settings.
        overwrite: replace a run that is already in `output_dir`.
        quiet: say nothing while working.
        allow_change: keys that may differ where a run that stopped early is gone on with.
        settings: any other key of a run file (`learning_rate=1e-6`, `lora={"rank": 16}`, ...).

    Raises:
        UserError: something the caller can mend; the message says what.
    """
    settings = {"model": _name_of(model), "data": _name_of(data), **settings}
    if eval_data is not None:
        settings["eval_data"] = _name_of(eval_data)
    if isinstance(loss, Loss):
        settings["loss"] = loss.settings()
    elif loss is not None:
        settings["loss"] = {"name": loss} if isinstance(loss, str) else dict(loss)
    policy = model if isinstance(model, Policy) else None
    in_hand: Judge | None = None
    if isinstance(judge, Mapping):
        settings["judge"] = judge
    elif judge is not None:
        settings["judge"] = {"name": "rule", "function": "function in memory"}
        in_hand = judge if isinstance(judge, Judge) else RuleJudge(judge)
    return execute(
        config_from(settings), data, eval_data, policy, in_hand, overwrite, RunLog(quiet=quiet), None, allow_change
    )


def execute(
    config: RunConfig,
    data: Rows | None = None,
    eval_data: Rows | None = None,
    policy: Policy | None = None,
    judge: Judge | None = None,
    overwrite: bool = False,
    log: RunLog | None = None,
    shared: Shared | None = None,
    allow_change: Sequence[str] = (),
) -> RunResult:
    """The run that `config` describes; data and policy in hand stand in for the files it names.

    Where its directory holds a run that did not come to its end, it goes on from the newest whole checkpoint.
    `allow_change` names keys that may differ from what they were then.

    Raises:
        UserError: something the caller can mend; the message says what.
        StopRequested: by Ctrl-C or SIGTERM, before there was anything to save.
    """
    log, started = log or RunLog(), time.monotonic()
    gc.collect()  # models of earlier runs are circles of references, which are let go only now and then
    hardware.forget_peak_memory()
    with distributed.joined() as me, stopping.listening(), stopping.held(me.size > 1), ExitStack() as held:
        if me.size > 1:
            hardware.give_freed_memory_back()
        if not me.is_first:
            log = RunLog(quiet=True)
        refuse_other_versions()
        run_dir = distributed.by_first(lambda: choose_run_dir(config))
        held.enter_context(explained(run_dir))
        if distributed.num_restarts():
            overwrite = False  # what is there by now is what this very command has begun

        def look() -> tuple[bool, bool, Checkpoint | None]:
            goes_on, is_new = check_run_dir(run_dir, overwrite), not run_dir.exists()
            if not is_new:
                held.enter_context(locked(run_dir))
                goes_on = check_run_dir(run_dir, overwrite)  # again: whoever held the lock may have come to an end
            return goes_on, is_new, _checkpoint_of(run_dir, log) if goes_on else None

        goes_on, is_new, checkpoint = distributed.by_first(look)
        setup = _set_up(config, log, data, eval_data, policy, judge, shared)
        refuse_what_processes_cannot(setup)
        describe(setup, log)  # the others too, in silence: what is tried on the way all must have tried
        current = fingerprint(setup)
        refuse_other_contents(current)
        changes = changes_since(read_facts(checkpoint)["fingerprint"], current) if checkpoint else {}
        check_allowed(allow_change, current, changes)
        if checkpoint and not was_allowed(run_dir, current):
            refuse_changes(changes, allow_change, run_dir, checkpoint.step)

        def begin() -> tuple[dict[str, Any], bool]:
            _warn_of_little_room(setup, run_dir, log)
            if is_new:
                held.enter_context(claimed(run_dir))
            open_run_dir(run_dir, keep=goes_on)
            summary, earlier = first_summary(setup), read_summary(run_dir) if goes_on else {}
            if goes_on:
                _cut_back(run_dir, checkpoint, setup)
                summary["started"] = earlier.get("started", summary["started"])
            write_text(run_dir / "run.yaml", resolved_run_file(config, run_dir))  # first: it makes this a run directory
            write_json(run_dir / "data.json", setup.datasets.findings)
            if isinstance(setup, OnlineSetup):
                claim_rounds(run_dir, setup, current, checkpoint.step if checkpoint else 0)
            log.keep_in(run_dir)
            if goes_on:
                _say_going_on(log, checkpoint, setup.steps, changes)
            if changes:
                remember_allowed(run_dir, current)
            trackers = tracking(run_dir, config.trackers, lambda told, step: log.event("warn", "tracker", told, step))
            log.after_metrics = held.enter_context(trackers).look
            return summary, earlier.get("status") == "stopped"

        summary, goes_past_stop = distributed.by_first(begin)
        refuse_separate_disks(run_dir)
        # The first process keeps the books; the others have some of their own, which nobody reads.
        books = run_dir if me.is_first else Path(held.enter_context(TemporaryDirectory(prefix="penchant-")))
        copy_rounds(run_dir, books)
        run = Session(setup, log, books, current, checkpoint, summary, started, goes_past_stop, run_dir)
        run.complete()
    return RunResult(run_dir, run.summary)


def dry_run(config: RunConfig, log: RunLog | None = None, num_rows: int = 2) -> dict[str, Any]:
    """Everything up to the first step: says what was found, shows rows as the model sees them, writes nothing.

    Returns:
        `steps`, `seconds` and `memory_bytes` expected, and `rows`: the texts that the model is trained on.
    """
    log = log or RunLog()
    setup = _set_up(config, log)
    describe(setup, log)
    tokenizer, texts = setup.policy.tokenizer, setup.datasets.train.texts
    rows = []
    for example in setup.datasets.train.examples[:num_rows]:
        names = names_of(texts[example.index]) if example.completion_ids else ()
        parts = [("prompt", example.prompt_ids), *zip(names, example.completion_ids, strict=True)]
        rows.append({name: tokenizer.decode(ids) for name, ids in parts})
    for row in rows:
        for name, text in row.items():
            log.say(name, repr(text))
    cost = expected_cost(setup)
    return {
        "steps": setup.steps,
        "seconds": round(cost.seconds, 1),
        "memory_bytes": cost.memory_bytes,
        "data": setup.datasets.findings,
        "rows": rows,
    }


def _set_up(
    config: RunConfig,
    log: RunLog,
    data: Rows | None = None,
    eval_data: Rows | None = None,
    policy: Policy | None = None,
    judge: Judge | None = None,
    shared: Shared | None = None,
) -> Setup:
    if config.is_online:
        return set_up_online(config, log, data, eval_data, policy, judge)
    return set_up(config, log, data, eval_data, policy, shared)


def _checkpoint_of(run_dir: Path, log: RunLog) -> Checkpoint | None:
    """The newest whole checkpoint of a run, and what is wrong with newer ones said."""
    return newest_checkpoint(
        run_dir / CHECKPOINTS, lambda fault: log.event("major", "damaged-checkpoint", fault, step=0)
    )


def _cut_back(run_dir: Path, checkpoint: Checkpoint | None, setup: Setup) -> None:
    """Takes away what came after the checkpoint that a run goes on from."""
    step, evaluated_at = -1, -1
    if checkpoint:
        step, evaluated_at = checkpoint.step, read_facts(checkpoint)["progress"]["evaluated_at"]
        if step >= setup.steps:
            evaluated_at = step - 1  # the last evaluation is made again
    remove_from(run_dir / CHECKPOINTS, step)
    cut_logs(run_dir, step, evaluated_at)


def _say_going_on(log: RunLog, checkpoint: Checkpoint | None, total: int, changes: Changes) -> None:
    if checkpoint is None:
        log.event("info", "resumed", "no checkpoint had been written yet: begun anew", step=0)
        log.say("resume", "the run in this directory had no checkpoint yet; it begins anew")
        return
    message = f"goes on at step {checkpoint.step} of {total}, from {checkpoint.folder}"
    log.say("resume", message + " (--overwrite begins anew)")
    log.event("info", "resumed", message, checkpoint.step)
    if changes:
        message = f"allowed to differ from here on: {describe_changes(changes)}"
        log.event("warn", "changed", message, checkpoint.step)


def _warn_of_little_room(setup: Setup, run_dir: Path, log: RunLog) -> None:
    """Says before the first step how much disk the run needs, where there is less."""
    size = expected_checkpoint_bytes(setup.policy, setup.config)
    kept = setup.config.keep_checkpoints
    if setup.config.save_steps:
        kept = min(kept, max(1, setup.steps // setup.config.save_steps))
    needed, free = size * (kept + 1 + setup.config.save_best), free_bytes(run_dir)
    if free < needed:
        message = (
            f"output_dir: {free / 1e9:.2f} GB are free there, and the run needs about {needed / 1e9:.2f} GB: a "
            f"checkpoint takes {size / 1e9:.2f} GB, keep_checkpoints keeps {kept}, and a new "
            "one is written before the oldest goes"
        )
        log.event("warn", "little-room", message, step=0)


def _name_of(source: Any) -> str:
    """What a run file says of a model or of data that were handed over in memory."""
    if isinstance(source, str):
        return source
    if isinstance(source, Policy):
        return getattr(source.model, "name_or_path", "") or "model in memory"
    return str(source) if isinstance(source, Path) else "rows in memory"

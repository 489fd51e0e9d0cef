"""A run that has its directory: from a set-up to a trained, evaluated and saved model."""

from __future__ import annotations

import inspect
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from penchant import distributed
from penchant.config import load_config
from penchant.disk import remove_leftovers, write_json, write_json_lines
from penchant.errors import UserError
from penchant.examples import plain_text
from penchant.locking import locked
from penchant.losses import Loss, WeightedSum
from penchant.models.weights import save_model
from penchant.report import write_model_card, write_report
from penchant.scoring.reference import Reference
from penchant.scoring.reward import RewardLearner
from penchant.stopping import StopRequested
from penchant.training import hardware
from penchant.training.answers import summary_of
from penchant.training.checkpoint import Checkpoint
from penchant.training.describe import layout_sentence, num_parameters
from penchant.training.identity import check_identity
from penchant.training.judgements import write_judgements
from penchant.training.logger import RunLog, count
from penchant.training.loop import CHECKPOINTS, Progress, Training, forget_insurance
from penchant.training.online import OnlineSetup
from penchant.training.resume import Fingerprint
from penchant.training.rundir import read_summary
from penchant.training.setup import Setup, make_reference
from penchant.training.state import read_facts
from penchant.training.trouble import in_smaller_pieces
from penchant.training.watchman import rounds_of
from penchant.types import Text


class Session:
    """One attempt at a run, from its beginning or from a checkpoint; `summary` is what summary.json says."""

    def __init__(
        self,
        setup: Setup,
        log: RunLog,
        run_dir: Path,
        fingerprint: Fingerprint,
        checkpoint: Checkpoint | None,
        summary: dict[str, Any],
        started: float,
        goes_past_stop: bool = False,
        home: Path | None = None,
    ) -> None:
        """Takes a run up.

        Args:
            run_dir: where this process keeps its books.
            started: what `time.monotonic()` said when this attempt began.
            goes_past_stop: see `Training.resume`.
            home: the run's directory, where it is another: all processes write model and checkpoints there together.
        """
        self.goes_past_stop, self.home = goes_past_stop, home or run_dir
        self.setup, self.log, self.run_dir, self.summary = setup, log, run_dir, summary
        self.fingerprint, self.checkpoint, self.started = fingerprint, checkpoint, started
        self.training: Training | None = None

    def complete(self) -> None:
        """Works until the model is saved, or until it is asked to stop."""
        self.keep()
        try:
            self._work()
        except StopRequested as stop:
            self._save_and_stop(stop)
        except BaseException as error:
            self._fail(error)
            raise
        if not distributed.world().is_first:
            return
        try:
            if self.summary["status"] in ("finished", "stopped"):
                write_model_card(self.run_dir)
            self.log.say("report", str(write_report(self.run_dir)))
        except OSError as error:  # the run has ended all the same
            reason = error.strerror or error
            self.log.say("report", f"could not be written ({reason}); `penchant report {self.run_dir}` does it later")

    def keep(self, **news: Any) -> None:
        """Writes summary.json with what is new."""
        elapsed_s = self.training.elapsed_s if self.training else time.monotonic() - self.started
        peak = hardware.peak_memory_bytes(self.setup.policy.device)
        self.summary.update(news, wall_s=round(elapsed_s, 2), peak_memory_bytes=peak)
        write_json(self.run_dir / "summary.json", self.summary)

    def _work(self) -> None:
        setup, log, run_dir = self.setup, self.log, self.run_dir
        shown = setup.shown_prompts()
        prompts = [prompt for prompt, _ in shown]
        facts = read_facts(self.checkpoint) if self.checkpoint else {}
        before = facts.get("answers_before") or _answers(setup, prompts, log, "before")
        reference = in_smaller_pieces(setup, log, 0, lambda: make_reference(setup, log))
        if reference is not None:
            self.keep(reference=reference.description)
            log.say("reference", reference.description)
            if not isinstance(setup, OnlineSetup):  # the first round does it with what it sampled
                in_smaller_pieces(setup, log, 0, lambda: _check_identity(setup, reference, log))
        extras = {
            "fingerprint": self.fingerprint,
            "answers_before": before,
            "versions": self.summary["versions"],
        }
        self.training = training = Training(
            setup, reference, log, run_dir, self.keep, extras, self.started, self.home / CHECKPOINTS
        )
        if self.checkpoint:
            training.resume(self.checkpoint, self.goes_past_stop)
        training.run()
        self._keep_speed()
        if isinstance(setup, OnlineSetup):
            self.keep(**summary_of(setup, run_dir))
            for doubt in setup.judge.report().get("warnings", ()):
                log.event("warn", "judge", doubt, setup.steps)
        else:
            training.suspects.write(setup, run_dir)
            in_smaller_pieces(
                setup, log, setup.steps, lambda: write_judgements(setup, reference, training.last_evaluation, run_dir)
            )
        after = _answers(setup, prompts, log, "after")
        samples = [
            {"prompt": plain_text(prompt), "before": old, "after": new}
            | ({} if chosen is None else {"chosen": plain_text(chosen)})
            for (prompt, chosen), old, new in zip(shown, before, after, strict=True)
        ]
        write_json_lines(run_dir / "samples.jsonl", samples)
        self._save_model()
        stop = training.watchman.stop
        if stop is None:
            self.keep(status="finished", best_step=training.progress.best_step)
            forget_insurance(run_dir, setup.config, training.progress.best_step)
        else:
            training.save()
            self.keep(status="stopped", stopped_by=stop.as_dict(), best_step=training.progress.best_step)
            log.say("stopped", f"at step {stop.step} of {setup.steps} ({stop.code}); `penchant resume` would go on")
        log.say("model", str(run_dir / "model"))

    def _save_model(self) -> None:
        policy, place = self.setup.policy, self.home / "model"
        try:
            # Judges and servers read no adapters of reward models.
            model = policy.merged() if isinstance(policy, RewardLearner) else policy.model
            save_model(model, policy.tokenizer, place, distributed.part_of_all(place))
        except OSError as error:
            raise UserError(
                f"output_dir: the trained model could not be written to '{place}' ({error.strerror or error}). Make "
                f"room, then `penchant resume {self.run_dir}` goes on from the newest checkpoint."
            ) from error

    def _save_and_stop(self, stop: StopRequested) -> None:
        training, step, total = self.training, self.checkpoint.step if self.checkpoint else 0, self.setup.steps
        if training is not None:
            training.save()
            step = training.progress.step
            self._keep_speed()
            if training.last_evaluation is not None and not isinstance(self.setup, OnlineSetup):
                write_judgements(self.setup, training.reference, training.last_evaluation, self.run_dir)
        self.keep(status="interrupted", signal=stop.signum, steps=step)
        message = f"stopped at step {step} of {total}; `penchant resume {self.run_dir}` goes on from there"
        self.log.event("warn", "interrupted", message, step)

    def _fail(self, error: BaseException) -> None:
        """Keeps what failed, and a report of what there is."""
        if self.training is not None and not isinstance(error, KeyboardInterrupt):
            self.training.hurry()
            self.training.finish_writing()  # the lock will be gone, and nothing may be written without it
        with suppress(OSError):  # a disk that is full may be the very thing that failed
            self.keep(status="interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            self.log.event("stop", "failed", f"{type(error).__name__}: {error}", step=self.summary["steps"])
            write_report(self.run_dir)

    def _keep_speed(self) -> None:
        progress = self.training.progress if self.training else Progress()
        if progress.train_s:
            self.keep(tokens_per_s=round(progress.tokens_seen / progress.train_s, 1))


def round_off(run_dir: Path) -> None:
    """Does for a finished run what a kill in its last moment may have left undone.

    Raises:
        UserError: another process works on it.
    """
    with locked(run_dir):
        remove_leftovers(run_dir)
        config, summary = load_config(str(run_dir / "run.yaml"), {}), read_summary(run_dir)
        forget_insurance(run_dir, config, summary.get("best_step"))
        if not (run_dir / "README.md").exists():  # one that is there may have been edited
            write_model_card(run_dir)
        write_report(run_dir)


def _check_identity(setup: Setup, reference: Reference, log: RunLog) -> None:
    """Holds policy and reference against each other on a part of the first step's examples."""
    draw = next(setup.draws())
    parts, kl_parts = setup.batches(draw.examples)[-2:], setup.batches_to_score(draw.mismatched)[-2:]
    found, expected = check_identity(setup.policy, reference, setup.loss, parts, kl_parts)
    message = f"loss before the first step {found:.6f}, at policy = reference {expected:.6f}"
    log.event("info", "identity", message, step=0)


def _answers(setup: Setup, prompts: list[Text], log: RunLog, when: str) -> list[str]:
    if not prompts:
        return []
    log.say("samples", f"answering {count(len(prompts), 'prompt')} {when} training")
    return setup.policy.generate(prompts, setup.config.sample_max_new_tokens)


def first_summary(setup: Setup) -> dict[str, Any]:
    """What is known of a run before its first step."""
    config, policy = setup.config, setup.policy
    return {
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": config.method_name(),
        "loss": setup.loss.settings(),
        "loss_doc": _documentation(setup.loss),
        "model": config.model,
        "model_sha256": setup.base_sha256,
        "data_sha256": setup.datasets.findings["train"]["sha256"],
        "lora": bool(config.lora.rank),
        "reference": setup.reference_kind,
        "layout": layout_sentence(setup),
        "device": str(policy.device),
        "dtype": policy.precision,
        "num_parameters": num_parameters(policy.model)[1],
        "num_trainable": num_parameters(policy.model)[0],
        "steps": 0,
        "total_steps": setup.steps,
        "steps_per_epoch": setup.steps_per_epoch,
        "rounds": rounds_of(setup),
        "examples_seen": 0,
        "working_directory": str(Path.cwd()),
        "processes": distributed.world().size,
        "versions": hardware.versions_in_use(),
    }


def _documentation(loss: Loss) -> str:
    """Equation and source of a loss, or of each loss of a sum."""
    terms = [term for _, term in loss.terms] if isinstance(loss, WeightedSum) else [loss]
    return "\n\n".join(inspect.getdoc(term) or "" for term in terms)

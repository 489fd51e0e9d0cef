"""The training loop: from step to step, until the end or until somebody asks to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from penchant import distributed, stopping
from penchant.config import RunConfig
from penchant.data.loader import Draw
from penchant.disk import sync
from penchant.evaluate.heldout import Evaluation, evaluate
from penchant.scoring.metrics import Means
from penchant.scoring.reference import Reference
from penchant.training import hardware
from penchant.training.answers import HeldoutAnswers
from penchant.training.checkpoint import Checkpoint, Writer, place_of, rotate, write_checkpoint
from penchant.training.judgements import write_judgements
from penchant.training.logger import RunLog, one_line
from penchant.training.online import OnlineSetup
from penchant.training.optim import make_optimizer, set_rate
from penchant.training.rollouts import Rollouts
from penchant.training.rounds import Rounds
from penchant.training.schedule import eval_interval, learning_rate_at
from penchant.training.setup import Setup
from penchant.training.state import expected_checkpoint_bytes, load_state, take_snapshot
from penchant.training.step import StepOutcome, train_step
from penchant.training.suspects import Suspects
from penchant.training.trouble import Spikes, in_smaller_pieces, report_bad_step
from penchant.training.watchman import Watchman

CHECKPOINTS = "checkpoints"
"""Where they are in a run directory."""

_SHARE_OF_FREE_MEMORY = 0.25


@dataclass
class Progress:
    """How far a run is: what a checkpoint says of it in numbers."""

    step: int = 0
    examples_seen: int = 0
    tokens_seen: int = 0
    train_s: float = 0.0
    """Seconds within steps."""
    time_s: float = 0.0
    """Seconds since the beginning, over all attempts, as of the last checkpoint."""
    evaluated_at: int = -1
    """The last step behind which the held-out examples were looked at."""
    bad_steps: int = 0
    """Steps in a row, up to the last, that were not finite."""
    best_step: int | None = None
    best_loss: float | None = None
    """Where the held-out loss (of online methods: minus the score) was lowest, and what it was."""


@dataclass
class Window:
    """What is averaged into one line of metrics."""

    means: Means = field(default_factory=Means)
    tokens: int = 0
    seconds: float = 0.0

    def values(self) -> dict[str, float | None]:
        """The averages, and the speed."""
        speed = {"tokens_per_s": round(self.tokens / self.seconds, 1)} if self.seconds else {}
        return self.means.means() | speed


class Training:
    """A run between its first and its last step; `run` goes on from wherever it is.

    `keep(steps=..., examples_seen=...)` is called whenever metrics are written. `extras` are kept in every checkpoint.
    `checkpoints` is where those go, if not into `run_dir`: several processes fill one folder together.
    `started` is when this attempt began, by `time.monotonic()`.
    """

    def __init__(
        self,
        setup: Setup,
        reference: Reference | None,
        log: RunLog,
        run_dir: Path,
        keep: Callable[..., None],
        extras: dict[str, Any],
        started: float,
        checkpoints: Path | None = None,
    ) -> None:
        self.setup, self.reference, self.log, self.run_dir = setup, reference, log, run_dir
        self.keep, self.extras = keep, extras
        self.checkpoints = checkpoints or run_dir / CHECKPOINTS
        self.optimizer = make_optimizer(setup.policy.model, setup.config, setup.policy.value_head)
        self.progress, self.window, self.spikes = Progress(), Window(), Spikes()
        self.watchman, self.suspects = Watchman(setup, log), Suspects()
        self.last_evaluation: Evaluation | None = None
        self.total = setup.steps
        self._source: Setup | Rounds = setup
        if isinstance(setup, OnlineSetup):
            rounds = Rounds if setup.advantage_plan.kind is None else Rollouts
            self._source = rounds(setup, reference, log, run_dir)
        self._answers = HeldoutAnswers(setup, reference, run_dir) if isinstance(setup, OnlineSetup) else None
        self._writer = Writer()
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._started = started

    def resume(self, checkpoint: Checkpoint, goes_past_stop: bool = False) -> None:
        """Takes everything up where the checkpoint left it, also past the place where the watch had stopped."""
        facts = load_state(checkpoint, self.setup.policy, self.optimizer)
        self.progress = Progress(**facts["progress"])
        window = facts["window"]
        self.window = Window(Means.from_json(window["means"]), window["tokens"], window["seconds"])
        self.spikes = Spikes.from_json(facts["spikes"])
        self.watchman.load(facts.get("watch"), goes_past_stop)
        self.suspects = Suspects.from_json(facts.get("suspects", ()))
        if self.setup.config.microbatch_tokens == facts["microbatch_tokens"]:  # else the user knows better by now
            self.setup.max_tokens = min(self.setup.max_tokens, facts["max_tokens"])
        if self.progress.step >= self.total:
            self.progress.evaluated_at = -1  # what comes after the last step needs the rewards that it gave
        self._saved_step = checkpoint.step
        self._started -= self.progress.time_s
        self.keep(steps=self.progress.step, examples_seen=self.progress.examples_seen)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning, over all attempts."""
        return time.monotonic() - self._started

    def run(self) -> None:
        """Trains the policy in place and evaluates it before, meanwhile and after; the watch may end it early.

        Raises:
            StopRequested: somebody asked for it; the state is that at the end of a step.
            UserError: three steps in a row were not finite, or a single example does not fit into memory.
        """
        progress, model = self.progress, self.setup.policy.model
        with self.log.progress("training", self.total, stays=True) as meter:
            meter.advance(progress.step)
            draws = self._source.draws(progress.step)
            while True:
                self._evaluate_if_due()
                if progress.step >= self.total or self.watchman.stop is not None:
                    break
                self._save_if_due()
                self._stop_together()
                model.train()
                info = self._step(next(draws))
                meter.advance(1, info)
        model.eval()
        self.finish_writing()

    def save(self, in_background: bool = False) -> None:
        """Writes a checkpoint of the state as it stands, unless there is one already.

        A disk that is full or fails is told and ends nothing.
        """
        self.finish_writing()
        if distributed.told_by_first(self._saved_step == self.progress.step):
            return
        policy, config, progress = self.setup.policy, self.setup.config, self.progress
        progress.time_s = round(self.elapsed_s, 3)
        window = {"means": self.window.means.to_json(), "tokens": self.window.tokens, "seconds": self.window.seconds}
        facts = {
            "progress": asdict(progress),
            "window": window,
            "spikes": self.spikes.to_json(),
            "watch": self.watchman.to_json(),
            "suspects": self.suspects.to_json(),
            "microbatch_tokens": config.microbatch_tokens,
            "max_tokens": self.setup.max_tokens,
            **self.extras,
        }
        for log in ("metrics.jsonl", "events.jsonl"):
            if (self.run_dir / log).exists():
                sync(self.run_dir / log)  # a loss of power must not leave the log behind the checkpoint
        snapshot = take_snapshot(policy, self.optimizer, facts, copy=in_background)
        step, best, folder = progress.step, progress.best_step if config.save_best else None, self.checkpoints
        told = {"versions": self.extras.get("versions", {}), "processes": distributed.world().size}
        part, may_wait = distributed.part_of_all(place_of(folder, step)), self._writer.may_wait

        def write() -> None:
            write_checkpoint(folder, step, told, snapshot.write, part, may_wait)
            if not part.number:
                rotate(folder, config.keep_checkpoints, best)

        self._saved_step, self._saved_at = step, time.monotonic()
        try:
            self._writer.start(write, in_background)
        except OSError as error:
            self._report_failed_save(error)

    def _step(self, draw: Draw) -> str:
        """Takes one step; what to show beside the progress bar."""
        setup, progress, config, step = self.setup, self.progress, self.setup.config, self.progress.step + 1
        rate = learning_rate_at(step, self.total, config) * self.watchman.rate_factor
        for name, values in draw.seen.items():
            self.window.means.add(name, torch.tensor(values))
        if not draw.examples:  # every pair of a small batch may be a tie
            progress.step = step
            return self._end_step(rate)
        started = time.monotonic()
        set_rate(self.optimizer, rate)
        spike: str | None = None

        def accepts(loss: float, grad_norm: float) -> bool:
            nonlocal spike
            spike = self.spikes.look(loss, grad_norm)
            return spike is None or not config.skip_spikes

        def attempt() -> tuple[StepOutcome, Means, dict[int, tuple[float, ...]]]:
            means = Means()
            rewards: dict[int, tuple[float, ...]] = {}
            parts, kl_parts = setup.batches(draw.examples), setup.batches_to_score(draw.mismatched)
            outcome = train_step(
                setup.policy,
                self.reference if "reference" in setup.loss.needs else None,
                setup.loss,
                parts,
                self.optimizer,
                config.max_grad_norm,
                means,
                kl_parts,
                accepts,
                rewards,
            )
            return outcome, means, rewards

        outcome, means, rewards = in_smaller_pieces(setup, self.log, step, attempt)
        progress.step = step
        progress.examples_seen += len(draw.examples)
        self.window.tokens += sum(example.num_scored_tokens for example in draw.examples)
        self.window.seconds += time.monotonic() - started
        progress.bad_steps = 0 if outcome.is_finite else progress.bad_steps + 1
        if outcome.is_finite:
            self.window.means.include(means)
            if step <= setup.steps_per_epoch and not isinstance(setup, OnlineSetup):
                self.suspects.look(rewards, step)
        else:
            report_bad_step(self.log, self.run_dir, setup, draw, step, outcome, progress.bad_steps)
        if spike:
            done = "the step was skipped" if config.skip_spikes else "skip_spikes leaves such steps out"
            self.log.event("warn", "spike", f"step {step}: {spike}; {done}", step)
        return self._end_step(rate)

    def _end_step(self, rate: float) -> str:
        step = self.progress.step
        return self._record_window(rate) if step % self.setup.config.logging_steps == 0 or step == self.total else ""

    def _record_window(self, rate: float) -> str:
        values = self.window.values() | {"learning_rate": rate}
        self._record(values)
        self.progress.tokens_seen += self.window.tokens
        self.progress.train_s += self.window.seconds
        self.window = Window()
        self.keep(steps=self.progress.step, examples_seen=self.progress.examples_seen)
        return one_line(values)

    def _record(self, values: dict[str, float | None]) -> None:
        step = self.progress.step
        # What processes do not know alike is speed; what follows from the rest all must decide alike.
        values = distributed.told_by_first(values)
        stamp = {"step": step, "epoch": round(step / self.setup.steps_per_epoch, 4)}
        self.log.metrics({**stamp, "time_s": round(self.elapsed_s, 3), **values})
        self.watchman.look({**stamp, **values})

    def _evaluate_if_due(self) -> None:
        setup, progress = self.setup, self.progress
        heldout, step = setup.datasets.heldout.examples, progress.step
        is_due = step in (0, self.total) or step % eval_interval(setup.config, self.total) == 0
        is_due = is_due or self.watchman.stop is not None
        if not heldout or not is_due or progress.evaluated_at == step:
            return

        def attempt() -> Evaluation:
            with self.log.progress("held out", len(heldout)) as meter:
                if self._answers is not None:
                    return self._answers.evaluate(step, meter.advance)
                batches = setup.batches_to_score(heldout)
                kl_batches = setup.batches_to_score(setup.heldout_mismatched)
                return evaluate(setup.policy, self.reference, setup.loss, batches, meter.advance, kl_batches)

        evaluation = in_smaller_pieces(setup, self.log, step, attempt)
        self.last_evaluation = evaluation
        progress.evaluated_at = step
        self._record({f"eval_{name}": value for name, value in evaluation.metrics.items()})
        self.log.say("held out", f"step {step}: {one_line(evaluation.metrics)}")
        if 0 < step < self.total and self._answers is None:  # at the end it is done for all kinds of runs
            self._keep_judgements(evaluation)
        metrics = evaluation.metrics
        badness = metrics.get("loss", -(metrics.get("score") or metrics.get("win_rate") or 0.0))
        if badness is not None and (progress.best_loss is None or badness < progress.best_loss):
            progress.best_step, progress.best_loss = step, badness
            if setup.config.save_best and step > 0:
                self.save()

    def _keep_judgements(self, evaluation: Evaluation) -> None:
        """For whoever watches the run; a disk that is full ends nothing."""
        try:
            write_judgements(self.setup, self.reference, evaluation, self.run_dir)
        except OSError as error:
            message = f"the judgements of held-out examples could not be written ({error.strerror or error})"
            self.log.event("warn", "judgements", message, self.progress.step)

    def _save_if_due(self) -> None:
        config, step = self.setup.config, self.progress.step
        if not self._writer.is_busy:
            self.finish_writing()  # so that a failure is told when it happens
        if step == 0 or step == self._saved_step:
            return
        if config.save_steps:
            is_due = step % config.save_steps == 0
        else:
            late = time.monotonic() - self._saved_at > 60 * config.save_minutes
            (is_due,) = distributed.any_of([late], self.setup.policy.device)
        if is_due:
            # Beside the training a copy of the state is written, which needs its memory.
            free = hardware.available_memory_bytes()
            size = expected_checkpoint_bytes(self.setup.policy, config) / distributed.world().size
            self.save(in_background=size < _SHARE_OF_FREE_MEMORY * free)

    def _stop_together(self) -> None:
        """Where several processes work, the next step is begun by all or by none.

        Raises:
            StopRequested: one of them was asked to stop.
        """
        if distributed.world().size > 1:
            signum = stopping.request()
            if any(distributed.any_of([signum is not None], self.setup.policy.device)):
                raise stopping.StopRequested(signum or signal.SIGTERM)

    def hurry(self) -> None:
        """Behind an error: other processes may be gone, so nothing waits for them longer than some seconds."""
        self._writer.hurry()

    def finish_writing(self) -> None:
        """Waits for the checkpoint that is being written beside the training."""
        try:
            self._writer.wait()
        except OSError as error:
            self._report_failed_save(error)

    def _report_failed_save(self, error: OSError) -> None:
        self._saved_step = -1
        message = (
            f"a checkpoint could not be written ({error.strerror or error}); training goes on, and the checkpoints "
            f"before it are as they were. Make room in {self.checkpoints}"
        )
        self.log.event("major", "checkpoint-failed", message, self.progress.step)


def forget_insurance(run_dir: Path, config: RunConfig, best_step: int | None) -> None:
    """After a finished run: lets the checkpoints go that were only there to resume from."""
    keep = config.keep_checkpoints if config.save_steps else 0
    rotate(run_dir / CHECKPOINTS, keep, best_step if config.save_best else None)

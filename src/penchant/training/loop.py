"""The training loop: from step to step, until the end or until somebody asks to stop."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from penchant.data.loader import Draw
from penchant.errors import UserError
from penchant.evaluate.heldout import Evaluation, evaluate
from penchant.models.load import save_model
from penchant.scoring.metrics import Means
from penchant.scoring.policy import Policy
from penchant.scoring.reference import Reference
from penchant.training.logger import RunLog, one_line
from penchant.training.optim import make_optimizer, set_rate
from penchant.training.schedule import eval_interval, learning_rate_at
from penchant.training.setup import Setup
from penchant.training.step import train_step

_KEPT_CHECKPOINTS = 2
_MOST_BAD_STEPS_IN_A_ROW = 3


@dataclass
class Stop:
    """Whether somebody asked the run to stop (Ctrl-C, SIGTERM)."""

    requested: bool = False


@dataclass
class Fit:
    """What the loop did."""

    steps: int = 0
    examples_seen: int = 0
    tokens_seen: int = 0
    train_s: float = 0.0
    interrupted: bool = False
    evaluations: list[Evaluation] = field(default_factory=list)


def fit(setup: Setup, reference: Reference | None, log: RunLog, run_dir: Path, keep: Callable[..., None]) -> Fit:
    """Trains the policy in place and evaluates it before, meanwhile and after.

    `keep(steps=..., examples_seen=...)` is called whenever metrics are written.

    Raises:
        UserError: three steps in a row were not finite, or a microbatch does not fit into memory.
    """
    config, policy = setup.config, setup.policy
    total, heldout = setup.steps, setup.datasets.heldout.examples
    optimizer = make_optimizer(policy.model, config)
    done = Fit()
    started = time.monotonic()

    def record(values: dict[str, float | None]) -> None:
        stamp = {"step": done.steps, "epoch": round(done.steps / setup.steps_per_epoch, 4)}
        log.metrics({**stamp, "time_s": round(time.monotonic() - started, 3), **values})

    def look_at_heldout() -> None:
        if not heldout:
            return
        with log.progress("held out", len(heldout)) as meter:
            batches = setup.batches_to_score(heldout)
            kl_batches = setup.batches_to_score(setup.heldout_mismatched)
            evaluation = evaluate(policy, reference, setup.loss, batches, meter.advance, kl_batches)
        done.evaluations.append(evaluation)
        record({f"eval_{name}": value for name, value in evaluation.metrics.items()})
        log.say("held out", f"step {done.steps}: {one_line(evaluation.metrics)}")

    look_at_heldout()
    policy.model.train()
    window, bad_steps = _Window(), 0
    with _stop_on_signals() as stop, log.progress("training", total, stays=True) as meter:
        for draw in setup.draws():
            step_started = time.monotonic()
            rate = learning_rate_at(done.steps + 1, total, config)
            set_rate(optimizer, rate)
            is_finite = _guarded_step(setup, reference, draw, optimizer, window.means)
            done.steps += 1
            done.examples_seen += len(draw.examples)
            window.add(sum(example.num_scored_tokens for example in draw.examples), time.monotonic() - step_started)

            bad_steps = 0 if is_finite else bad_steps + 1
            if bad_steps:
                _report_bad_step(log, done.steps, bad_steps)

            is_last = done.steps == total or stop.requested
            info = ""
            if done.steps % config.logging_steps == 0 or is_last:
                values = window.values() | {"learning_rate": rate}
                record(values)
                info = one_line(values)
                done.tokens_seen += window.tokens
                done.train_s += window.seconds
                keep(steps=done.steps, examples_seen=done.examples_seen)
                window = _Window()
            meter.advance(1, info)
            if is_last:
                break
            if config.save_steps and done.steps % config.save_steps == 0:
                save_checkpoint(policy, run_dir, done.steps)
            if done.steps % eval_interval(config, total) == 0:
                look_at_heldout()
    policy.model.eval()
    done.interrupted = done.steps < total
    if done.interrupted:
        folder = save_checkpoint(policy, run_dir, done.steps)
        message = f"stopped at step {done.steps} of {total}; the weights are in {folder}"
        log.event("warn", "interrupted", message, done.steps)
    else:
        look_at_heldout()
    return done


class _Window:
    """What is averaged into one line of metrics."""

    def __init__(self) -> None:
        self.means = Means()
        self.tokens = 0
        self.seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds

    def values(self) -> dict[str, float | None]:
        return self.means.means() | {"tokens_per_s": round(self.tokens / self.seconds, 1)}


def save_checkpoint(policy: Policy, run_dir: Path, step: int) -> Path:
    """Saves the weights as they are at `step` and lets the oldest checkpoints go."""
    folder = run_dir / "checkpoints" / f"step-{step}"
    save_model(policy.model, policy.tokenizer, folder)
    steps = sorted(int(path.name.removeprefix("step-")) for path in folder.parent.glob("step-*"))
    for old in steps[:-_KEPT_CHECKPOINTS]:
        shutil.rmtree(folder.parent / f"step-{old}")
    return folder


def _guarded_step(
    setup: Setup, reference: Reference | None, draw: Draw, optimizer: torch.optim.Optimizer, means: Means
) -> bool:
    parts, kl_parts = setup.batches(draw.examples), setup.batches_to_score(draw.mismatched)
    try:
        max_grad_norm = setup.config.max_grad_norm
        return train_step(setup.policy, reference, setup.loss, parts, optimizer, max_grad_norm, means, kl_parts)
    except torch.OutOfMemoryError:
        largest = max(part.model_inputs["input_ids"].numel() for part in parts)
        raise UserError(
            f"memory: a microbatch of {largest} tokens does not fit; lower microbatch_tokens (this changes no result), "
            "lower max_length, or train with lora.rank."
        ) from None


def _report_bad_step(log: RunLog, step: int, in_a_row: int) -> None:
    message = (
        f"step {step}: the loss or its gradient is not finite; the step was skipped and the weights are unharmed "
        f"({in_a_row} in a row; training stops at {_MOST_BAD_STEPS_IN_A_ROW})"
    )
    log.event("major", "non-finite", message, step)
    if in_a_row == _MOST_BAD_STEPS_IN_A_ROW:
        raise UserError(
            f"training: {in_a_row} steps in a row had a loss or gradient that is not finite; stopped, the weights are "
            "as they were. Usual causes: a learning rate that is far too high, weights that already hold nan, or bf16 "
            "on a model made for float32."
        )


@contextmanager
def _stop_on_signals() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask for a stop after the step in hand; a second Ctrl-C stops at once."""
    stop = Stop()
    previous = {}

    def request(signum: int, frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    if threading.current_thread() is threading.main_thread():  # no other thread may take signals
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.signal(signum, request)
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

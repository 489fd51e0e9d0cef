"""The training loop: from step to step, until the end or until somebody asks to stop."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from penchant.config import RunConfig
from penchant.data import loader
from penchant.errors import UserError
from penchant.evaluate.pairs import PairEvaluation, evaluate_pairs
from penchant.losses import PairLoss
from penchant.models.load import save_model
from penchant.scoring.layout import Layout
from penchant.scoring.metrics import Means
from penchant.scoring.policy import Policy
from penchant.scoring.reference import Reference
from penchant.training.logger import RunLog, one_line
from penchant.training.optim import learning_rate_at, make_optimizer, set_rate
from penchant.training.step import train_step
from penchant.types import Batch, TokenizedPair

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
    pairs_seen: int = 0
    tokens_seen: int = 0
    train_s: float = 0.0
    interrupted: bool = False
    evaluations: list[PairEvaluation] = field(default_factory=list)


def num_steps(config: RunConfig, num_pairs: int) -> int:
    """Optimizer steps of the whole run."""
    steps = math.ceil(config.num_train_epochs * loader.steps_per_epoch(num_pairs, config.batch_size))
    return min(steps, config.max_steps or steps)


def eval_interval(config: RunConfig, steps: int) -> int:
    """Steps between held-out evaluations of a run of `steps` steps."""
    return config.eval_steps or max(1, math.ceil(steps / 4))


def scoring_batches(pairs: list[TokenizedPair], layout: Layout, max_tokens: int) -> Iterator[Batch]:
    """Batches for passes without gradient, longest first; they hold no activations, so they may be larger."""
    for part in loader.microbatches(pairs, 2 * max_tokens, layout.cost):
        yield layout.collate(part)


def fit(
    policy: Policy,
    reference: Reference | None,
    loss: PairLoss,
    train_pairs: list[TokenizedPair],
    heldout_pairs: list[TokenizedPair],
    config: RunConfig,
    layout: Layout,
    max_tokens: int,
    log: RunLog,
    run_dir: Path,
) -> Fit:
    """Trains the policy in place and evaluates it before, meanwhile and after.

    Raises:
        UserError: three steps in a row were not finite, or one pair does not fit into memory.
    """
    total = num_steps(config, len(train_pairs))
    eval_steps = eval_interval(config, total)
    per_epoch = loader.steps_per_epoch(len(train_pairs), config.batch_size)
    optimizer = make_optimizer(policy.model, config.weight_decay)
    done = Fit()
    started = time.monotonic()

    def evaluate() -> None:
        if not heldout_pairs:
            return
        with log.progress("held-out", len(heldout_pairs)) as meter:
            batches = scoring_batches(heldout_pairs, layout, max_tokens)
            evaluation = evaluate_pairs(policy, reference, loss, batches, meter.advance)
        done.evaluations.append(evaluation)
        record = {f"eval_{name}": value for name, value in evaluation.metrics.items()}
        log.metrics(stamp() | record)
        log.say("held-out", f"step {done.steps}: {one_line(evaluation.metrics)}")

    def stamp() -> dict[str, float]:
        return {
            "step": done.steps,
            "epoch": round(done.steps / per_epoch, 4),
            "time_s": round(time.monotonic() - started, 3),
        }

    evaluate()
    policy.model.train()
    means, window_tokens, window_started, bad_steps = Means(), 0, time.monotonic(), 0
    with _stop_on_signals() as stop, log.progress("training", total) as meter:
        for batch in loader.batches(train_pairs, config.batch_size, config.seed):
            rate = learning_rate_at(
                done.steps + 1, total, config.peak_learning_rate(), config.warmup_ratio, config.lr_scheduler
            )
            set_rate(optimizer, rate)
            parts = [layout.collate(part) for part in loader.microbatches(batch, max_tokens, layout.cost)]
            is_finite = _guarded_step(policy, reference, loss, parts, optimizer, config.max_grad_norm, means)
            done.steps += 1
            done.pairs_seen += len(batch)
            window_tokens += sum(
                2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in batch
            )

            bad_steps = 0 if is_finite else bad_steps + 1
            if bad_steps:
                log.event("major", "non-finite", _non_finite_message(done.steps, bad_steps), done.steps)
            if bad_steps == _MOST_BAD_STEPS_IN_A_ROW:
                raise UserError(
                    f"training: {bad_steps} steps in a row had a loss or gradient that is not finite; stopped before "
                    "the weights could be harmed. Usual causes: a learning rate that is far too high, weights that "
                    "already hold nan, or bf16 on a model made for float32."
                )

            is_last = done.steps == total or stop.requested
            info = ""
            if done.steps % config.logging_steps == 0 or is_last:
                seconds = time.monotonic() - window_started
                record = means.means() | {
                    "learning_rate": rate,
                    "tokens_per_s": round(window_tokens / seconds, 1),
                }
                log.metrics(stamp() | record)
                info = one_line(record)
                done.tokens_seen += window_tokens
                done.train_s += seconds
                means, window_tokens = Means(), 0
            meter.advance(1, info)
            if config.save_steps and done.steps % config.save_steps == 0 and not is_last:
                save_checkpoint(policy, run_dir, done.steps)
            if done.steps % eval_steps == 0 and not is_last:
                evaluate()
            window_started = time.monotonic() if not window_tokens else window_started
            if is_last:
                done.interrupted = done.steps < total
                break
    policy.model.eval()
    if done.interrupted:
        folder = save_checkpoint(policy, run_dir, done.steps)
        log.event(
            "warn",
            "interrupted",
            f"stopped at step {done.steps} of {total}; weights are in {folder}",
            done.steps,
        )
    else:
        evaluate()
    return done


def save_checkpoint(policy: Policy, run_dir: Path, step: int) -> Path:
    """Saves the weights as they are at `step` and lets the oldest checkpoints go."""
    folder = run_dir / "checkpoints" / f"step-{step}"
    save_model(policy.model, policy.tokenizer, folder)
    steps = sorted(int(path.name.removeprefix("step-")) for path in folder.parent.glob("step-*"))
    for old in steps[:-_KEPT_CHECKPOINTS]:
        shutil.rmtree(folder.parent / f"step-{old}")
    return folder


def _guarded_step(
    policy: Policy,
    reference: Reference | None,
    loss: PairLoss,
    parts: list[Batch],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    means: Means,
) -> bool:
    try:
        return train_step(policy, reference, loss, parts, optimizer, max_grad_norm, means)
    except torch.OutOfMemoryError:
        largest = max(part.model_inputs["input_ids"].numel() for part in parts)
        raise UserError(
            f"memory: a microbatch of {largest} tokens does not fit; lower microbatch_tokens (this changes no result), "
            "lower max_length, or train with lora.rank."
        ) from None


def _non_finite_message(step: int, in_a_row: int) -> str:
    return (
        f"step {step}: the loss or its gradient is not finite; the step was skipped and the weights are unharmed "
        f"({in_a_row} in a row; training stops at {_MOST_BAD_STEPS_IN_A_ROW})"
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

    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.signal(signum, request)
    except ValueError:
        pass  # signals reach the main thread only; in another thread nobody can ask
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

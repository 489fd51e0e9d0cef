"""When a run does what: how many steps, when it evaluates, which learning rate."""

from __future__ import annotations

import math

from penchant.config import RunConfig
from penchant.data import loader


def num_steps(config: RunConfig, num_examples: int) -> int:
    """Optimizer steps of the whole run."""
    steps = math.ceil(config.num_train_epochs * loader.steps_per_epoch(num_examples, config.batch_size))
    return min(steps, config.max_steps or steps)


def eval_interval(config: RunConfig, steps: int) -> int:
    """Steps between held-out evaluations of a run of `steps` steps."""
    return config.eval_steps or max(1, math.ceil(steps / 4))


def learning_rate_at(step: int, steps: int, config: RunConfig) -> float:
    """The learning rate of step `step` (1 .. steps).

    It rises linearly over the warm-up and reaches its peak at its end; then it falls along a line or half a cosine and
    would reach 0 one step after the last, so that every step counts; or as the square root of warm-up over step.
    """
    peak = config.peak_learning_rate()
    num_warmup = round(config.warmup_ratio * steps) if config.warmup_steps is None else config.warmup_steps
    if step <= num_warmup:
        return peak * step / num_warmup
    if config.lr_scheduler == "inverse_sqrt":
        return peak * math.sqrt(max(1, num_warmup) / step)
    progress = (step - num_warmup - 1) / (steps - num_warmup)  # 0 at the first step behind the warm-up
    if config.lr_scheduler == "linear":
        return peak * (1 - progress)
    if config.lr_scheduler == "cosine":
        return peak * (1 + math.cos(math.pi * progress)) / 2
    return peak

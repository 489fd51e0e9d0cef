"""When a run does what."""

from __future__ import annotations

import pytest

from penchant.config import RunConfig
from penchant.training.schedule import eval_interval, learning_rate_at, num_steps


def config(**settings: object) -> RunConfig:
    return RunConfig.model_validate({"model": "m", "data": "d", "learning_rate": 1.0, **settings})


def test_steps_are_epochs_times_batches_rounded_up() -> None:
    assert num_steps(config(batch_size=8), 17) == 3
    assert num_steps(config(batch_size=8, num_train_epochs=2), 17) == 6
    assert num_steps(config(batch_size=8, num_train_epochs=0.5), 32) == 2
    assert num_steps(config(batch_size=8, num_train_epochs=2, max_steps=4), 17) == 4
    assert num_steps(config(batch_size=8, max_steps=40), 17) == 3


def test_linear_rate_rises_over_the_warmup_and_would_reach_zero_one_step_after_the_last() -> None:
    rates = [learning_rate_at(step, 10, config(warmup_ratio=0.2)) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_cosine_rate_falls_along_half_a_cosine() -> None:
    rates = [learning_rate_at(step, 4, config(warmup_ratio=0, lr_scheduler="cosine")) for step in range(1, 5)]
    assert rates == pytest.approx([1.0, 0.5 + 2**0.5 / 4, 0.5, 0.5 - 2**0.5 / 4])


def test_constant_rate_stays() -> None:
    rates = [learning_rate_at(step, 5, config(warmup_ratio=0.2, lr_scheduler="constant")) for step in range(1, 6)]
    assert rates == [1.0] * 5


def test_the_whole_run_may_be_warmup() -> None:
    rates = [learning_rate_at(step, 4, config(warmup_ratio=1.0)) for step in range(1, 5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_default_rates_are_those_of_the_field() -> None:
    assert RunConfig(model="m", data="d").peak_learning_rate() == 5e-7
    assert RunConfig(model="m", data="d", lora={"rank": 4}).peak_learning_rate() == 5e-6


def test_four_evaluations_a_run_unless_said_otherwise() -> None:
    assert eval_interval(config(), 100) == 25
    assert eval_interval(config(), 2) == 1
    assert eval_interval(config(eval_steps=7), 100) == 7

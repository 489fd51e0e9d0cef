"""What is kept of a log: against numpy, and the same after a journey through JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from penchant.watch import History, facts_of
from penchant.watch.history import DECAY, EARLY, RECENT, Track

from .logs import history


def track(values: list[float]) -> Track:
    made = Track()
    for step, value in enumerate(values):
        made.add(step, value)
    return made


def test_means_errors_and_ends_are_those_of_numpy() -> None:
    values = np.random.default_rng(0).normal(size=200).tolist()
    seen = track(values)
    assert len(seen) == 200
    assert (seen.first, seen.last) == (values[0], values[-1])
    for lines in (1, 5, RECENT):
        assert seen.mean(lines) == pytest.approx(np.mean(values[-lines:]))
        assert seen.start(min(lines, EARLY)) == pytest.approx(np.mean(values[: min(lines, EARLY)]))
    assert seen.error(20) == pytest.approx(np.std(values[-20:], ddof=1) / math.sqrt(20))
    assert seen.lowest == (int(np.argmin(values)), min(values))
    assert seen.highest == (int(np.argmax(values)), max(values))
    assert track([1.0]).error(5) == math.inf


def test_the_exponential_mean_has_no_bias_towards_its_beginning() -> None:
    values = np.random.default_rng(1).normal(size=70)
    weights = DECAY ** np.arange(70)[::-1]
    assert track(values.tolist()).smooth == pytest.approx((weights * values).sum() / weights.sum())
    assert track([3.0]).smooth == 3.0


def test_what_is_no_number_is_passed_over() -> None:
    values = (1.0, None, math.nan, math.inf, True, "2", 3)
    seen = history([{"step": step, "loss": value} for step, value in enumerate(values)])
    assert seen["loss"].values() == [1.0, 3.0]
    assert len(history([{"step": None, "loss": 1.0}, {"loss": 1.0}])["loss"]) == 0
    assert "tokens_per_s" not in history([{"step": 1, "tokens_per_s": 3.0}])


def test_a_step_that_is_measured_again_counts_once() -> None:
    seen = history([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 2.0}])
    assert seen["loss"].values() == [1.0, 2.0]


def test_a_state_is_bounded_and_comes_back_to_the_bit() -> None:
    rng = np.random.default_rng(2)
    lines = [{"step": step, "loss": float(rng.normal()), "eval_loss": float(rng.normal())} for step in range(500)]
    whole = history(lines)
    assert len(whole.to_json()["tracks"]["loss"]["recent"]) == RECENT
    half = History.from_json(json.loads(json.dumps(history(lines[:250]).to_json())))
    for line in lines[250:]:
        half.add(line)
    assert half.to_json() == whole.to_json()


def test_facts_speak_of_the_first_loss_and_of_the_warm_up() -> None:
    facts = facts_of({"dpo": {"beta": 0.2, "weight": 1.0}, "sft": {"weight": 0.5}}, 200, {"warmup_ratio": 0.1})
    assert (facts.losses, facts.beta, facts.warmup_steps, facts.is_online) == (("dpo", "sft"), 0.2, 20, False)
    assert facts.is_any("dpo", "ipo")
    assert not facts.is_any("sft")
    assert facts_of({"name": "simpo"}, 200, {"warmup_steps": 3, "warmup_ratio": 0.5}).warmup_steps == 3
    assert facts_of({"name": "grpo"}, None, {}, rounds=7).advantages

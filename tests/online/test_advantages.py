"""Advantages against sums written out, an independent recursion, and what they must not change."""

from __future__ import annotations

import numpy as np
import pytest

from penchant.online.advantages import gae, group_advantages, token_rewards, whitened


def test_within_a_group_by_hand() -> None:
    rewards = [1.0, 0.0, 0.0, 3.0]
    assert group_advantages(rewards, "centered").tolist() == [0.0, -1.0, -1.0, 2.0]
    spread = np.sqrt((0 + 1 + 1 + 4) / 4)
    np.testing.assert_allclose(group_advantages(rewards, "standardized"), np.array([0, -1, -1, 2]) / spread, rtol=1e-15)
    others = [(0 + 0 + 3) / 3, (1 + 0 + 3) / 3, (1 + 0 + 3) / 3, (1 + 0 + 0) / 3]
    np.testing.assert_allclose(group_advantages(rewards, "leave_one_out"), np.subtract(rewards, others), rtol=1e-14)


@pytest.mark.parametrize("kind", ["centered", "standardized", "leave_one_out"])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [1e6 + 0.1] * 7, [2.0]])
def test_where_all_did_alike_nobody_has_an_advantage(kind: str, rewards: list[float]) -> None:
    np.testing.assert_allclose(group_advantages(rewards, kind), 0, atol=1e-8)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="no advantages of kind 'median'"):
        group_advantages([1.0, 2.0], "median")


def test_rewards_of_tokens_add_up_to_score_less_kl() -> None:
    logps, ref_logps = np.array([-1.0, -2.0, -0.5]), np.array([-1.5, -1.0, -0.5])
    found = token_rewards(2.0, logps, ref_logps, 0.1)
    np.testing.assert_allclose(found, [-0.05, 0.1, 2.0], atol=1e-15)
    assert found.sum() == pytest.approx(2.0 - 0.1 * (logps - ref_logps).sum())


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_weighted_sum_of_all_later_errors(gamma: float, gae_lambda: float) -> None:
    rng = np.random.default_rng(3)
    rewards, values = rng.normal(size=9), rng.normal(size=9)
    following = np.append(values[1:], 0.0)
    errors = rewards + gamma * following - values
    # Not the recursion but its definition: every later error, discounted.
    expected = [
        sum((gamma * gae_lambda) ** (later - now) * errors[later] for later in range(now, 9)) for now in range(9)
    ]
    np.testing.assert_allclose(gae(rewards, values, gamma, gae_lambda), expected, rtol=1e-12)


def test_with_lambda_one_it_is_what_came_less_what_was_expected_and_with_zero_one_step() -> None:
    rewards, values = np.array([1.0, -2.0, 4.0]), np.array([0.5, 1.0, 2.0])
    np.testing.assert_allclose(gae(rewards, values, 1.0, 1.0), [3.0 - 0.5, 2.0 - 1.0, 4.0 - 2.0])
    np.testing.assert_allclose(gae(rewards, values, 1.0, 0.0), [1.0 + 1.0 - 0.5, -2.0 + 2.0 - 1.0, 4.0 - 2.0])


def test_whitening_runs_over_all_tokens() -> None:
    advantages = [np.array([1.0, 2.0, 3.0]), np.array([10.0])]
    flat = np.concatenate(whitened(advantages))
    assert flat.mean() == pytest.approx(0, abs=1e-12)
    assert flat.std() == pytest.approx(1)
    assert flat.argsort().tolist() == [0, 1, 2, 3]
    assert np.concatenate(whitened([np.zeros(3), np.zeros(2)])).tolist() == [0.0] * 5

"""From scores of sampled completions to the advantage of each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

_NEARLY_ZERO = 1e-8


def group_advantages(rewards: Sequence[float], kind: str) -> Numbers:
    """How much better each completion of a prompt did than the others of its group.

    standardized: (R - mean) / standard deviation (over the group, as a population), GRPO's (Shao et al. 2024,
    arXiv:2402.03300, section 4.1.2); 0 where all rewards are the same. centered: R - mean (Liu et al. 2025, "Dr. GRPO",
    arXiv:2503.20783). leave_one_out: R less the mean of the others (Kool et al. 2019; RLOO of Ahmadian et al. 2024,
    arXiv:2402.14740); 0 for a single completion.

    Returns:
        (K,) numbers.

    Raises:
        ValueError: there is no such kind.
    """
    own = np.asarray(rewards, dtype=np.float64)
    centered = own - own.mean()
    if kind == "centered":
        return centered
    if kind == "leave_one_out":
        return centered * len(own) / max(1, len(own) - 1)
    if kind == "standardized":
        spread = own.std()
        return centered / spread if spread > _NEARLY_ZERO * max(1.0, float(np.abs(own).max())) else np.zeros_like(own)
    raise ValueError(f"there are no advantages of kind '{kind}'")


def token_rewards(score: float, logps: Numbers, ref_logps: Numbers, kl_weight: float) -> Numbers:
    """The reward of each token of a completion: -kl_weight (log pi - log pi_ref), and behind the last one the score.

    Eq. 2 of Ziegler et al. 2019 (arXiv:1909.08593), spread over the tokens.
    """
    rewards = -kl_weight * (logps - ref_logps)
    rewards[-1] += score
    return rewards


def gae(rewards: Numbers, values: Numbers, gamma: float, gae_lambda: float) -> Numbers:
    """Generalised advantage estimates of a completion that has ended: A_t = delta_t + gamma lambda A_(t+1).

    Eq. 16 of Schulman et al. 2016 (arXiv:1506.02438), with delta_t = r_t + gamma V_(t+1) - V_t and nothing to expect
    behind the last token. With lambda 1 they are the discounted rewards to come less the value.

    Args:
        rewards: (T,), of each token.
        values: (T,), what was expected before each token.
    """
    advantages = np.empty_like(rewards)
    following = value_behind = 0.0
    for place in range(len(rewards) - 1, -1, -1):
        delta = rewards[place] + gamma * value_behind - values[place]
        following = delta + gamma * gae_lambda * following
        advantages[place], value_behind = following, values[place]
    return advantages


def whitened(advantages: Sequence[Numbers]) -> list[Numbers]:
    """All advantages less their mean, over their standard deviation: of the tokens of all completions together."""
    flat = np.concatenate(advantages)
    scale = max(float(flat.std()), _NEARLY_ZERO)
    return [(own - flat.mean()) / scale for own in advantages]

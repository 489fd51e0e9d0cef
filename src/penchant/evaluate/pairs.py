"""How often a policy's implicit reward agrees with held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from penchant.examples import Pair, plain_text
from penchant.online.logps import sequence_logps
from penchant.report.figures import wilson_interval
from penchant.scoring.policy import Policy


@dataclass(frozen=True)
class PairAccuracy:
    """The share of pairs in which the implicit reward of chosen is the higher one; equal ones count half."""

    accuracy: float
    low: float
    high: float
    """Ends of Wilson's 95% interval."""
    longer_wins: float
    """The share that always picking the longer completion gets right, in characters; equal ones count half."""
    mean_margin: float
    """Reward of chosen less that of rejected, at beta 1, in nats."""
    num_pairs: int

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a summary."""
        return asdict(self)


def pair_accuracy(
    policy: Policy,
    reference: Policy,
    pairs: Sequence[Pair],
    advance: Callable[[int], None] = lambda completions: None,
) -> PairAccuracy:
    """Scores at least one pair by log pi - log pi_ref; calls `advance(completions)`, four times for each pair in all.

    Raises:
        UserError: a chat template refuses a prompt.
    """
    prompts = [pair.prompt for pair in pairs for _ in pair.completions]
    completions = [completion for pair in pairs for completion in pair.completions]
    rewards = np.subtract(
        sequence_logps(policy, prompts, completions, advance), sequence_logps(reference, prompts, completions, advance)
    ).reshape(-1, 2)
    lengths = np.array([[len(plain_text(completion)) for completion in pair.completions] for pair in pairs])
    accuracy = _share_ahead(rewards)
    low, high = wilson_interval(accuracy, len(pairs))
    margin = float((rewards[:, 0] - rewards[:, 1]).mean())
    return PairAccuracy(accuracy, low, high, _share_ahead(lengths), margin, len(pairs))


def _share_ahead(values: npt.NDArray[Any]) -> float:
    """How often the first column is the larger one, equal ones counting half."""
    return float((np.sign(values[:, 0] - values[:, 1]) + 1).mean() / 2)

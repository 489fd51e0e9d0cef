"""What sampled and judged completions come to, in a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penchant.online.judges import Verdict
from penchant.online.samples import Sampled
from penchant.report.figures import wilson_interval


def summary_of_samples(samples: Sequence[Sampled]) -> dict[str, Any]:
    """How many there are, which share finished, and their mean length in tokens where that is known."""
    finished = [answer.is_finished for one in samples for answer in one.answers]
    lengths = [length for one in samples for length in one.num_tokens or ()]
    return {
        "prompts": len(samples),
        "completions": len(finished),
        "finished": _mean(finished),
        "mean_tokens": _mean(lengths),
    }


def summary_of_verdicts(judged: Sequence[Sampled]) -> dict[str, Any]:
    """The mean score, the prompts whose completions tie, the completions without a verdict, agreement with labels."""
    verdicts = [one.verdict or Verdict((None,) * len(one.answers)) for one in judged]
    scores = [score for verdict in verdicts for score in verdict.scores]
    valid = [score for score in scores if score is not None]
    return {
        "prompts": len(judged),
        "completions": len(scores),
        "mean_score": _mean(valid),
        "ties": sum(map(is_tie, verdicts)),
        "invalid": len(scores) - len(valid),
        "agreement": _agreement(judged),
    }


def is_tie(verdict: Verdict) -> bool:
    """Whether several completions all have the same score."""
    return len(verdict.scores) > 1 and None not in verdict.scores and len(set(verdict.scores)) == 1


def _agreement(judged: Sequence[Sampled]) -> dict[str, Any] | None:
    """On which share of the labelled pairs the judge prefers what people preferred, with its 95% interval.

    A tie counts as half; pairs without a verdict on both are left out.
    """
    points = [
        0.5 * (1 + (ours > theirs) - (ours < theirs))
        for one in judged
        if one.preferred is not None and one.verdict is not None and len(one.answers) == 2
        for ours, theirs in [(one.verdict.scores[one.preferred], one.verdict.scores[1 - one.preferred])]
        if ours is not None and theirs is not None
    ]
    share = _mean(points)
    if share is None:
        return None
    return {"share": share, "pairs": len(points), "interval": wilson_interval(share, len(points))}


def _mean(values: Sequence[int | float]) -> float | None:
    return sum(values) / len(values) if values else None

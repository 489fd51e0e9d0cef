"""The few numbers that sampled and judged completions come to."""

from __future__ import annotations

import pytest

from penchant.examples import Answer
from penchant.online.judges import Verdict
from penchant.online.samples import Sampled
from penchant.online.summaries import summary_of_samples, summary_of_verdicts
from penchant.report.figures import wilson_interval


def judged(*scores: float | None, preferred: int | None = None) -> Sampled:
    return Sampled("why?", tuple(Answer("a") for _ in scores), verdict=Verdict(scores), preferred=preferred)


def test_samples_are_counted_with_share_finished_and_mean_length() -> None:
    samples = [
        Sampled("a", (Answer("x"), Answer("y", is_finished=False)), num_tokens=(3, 8)),
        Sampled("b", (Answer("x"), Answer("y")), num_tokens=(1, 2)),
    ]
    assert summary_of_samples(samples) == {"prompts": 2, "completions": 4, "finished": 0.75, "mean_tokens": 3.5}
    assert summary_of_samples([Sampled("a", (Answer("x"),))])["mean_tokens"] is None


def test_verdicts_are_counted_with_ties_and_those_that_are_missing() -> None:
    told = summary_of_verdicts([judged(1.0, 2.0), judged(3.0, 3.0), judged(None, 3.0), judged(5.0)])
    assert told["mean_score"] == pytest.approx(17 / 6)
    assert (told["prompts"], told["completions"], told["ties"], told["invalid"]) == (4, 7, 1, 1)
    assert told["agreement"] is None
    assert summary_of_verdicts([judged(None, None)])["mean_score"] is None


def test_agreement_counts_a_tie_as_half_and_leaves_out_pairs_without_a_verdict() -> None:
    pairs = [
        judged(2.0, 1.0, preferred=0),
        judged(2.0, 1.0, preferred=1),
        judged(1.0, 1.0, preferred=0),
        judged(0.0, 1.0, preferred=1),
        judged(None, 1.0, preferred=1),
        judged(3.0, 1.0),
    ]
    agreement = summary_of_verdicts(pairs)["agreement"]
    assert agreement == {"share": 2.5 / 4, "pairs": 4, "interval": wilson_interval(2.5 / 4, 4)}

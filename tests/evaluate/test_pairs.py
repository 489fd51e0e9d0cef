"""Accuracy on held-out pairs, against log-probabilities one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penchant.evaluate.pairs import pair_accuracy
from penchant.examples import Pair
from penchant.report.figures import wilson_interval
from penchant.scoring.policy import Policy

from ..conftest import WORDS, make_tiny_model

PAIRS = [
    Pair(f"what is {word}", f" {word} {WORDS[place]}", " no" * (place % 4 + 1)) for place, word in enumerate(WORDS[:12])
]


def test_rewards_are_compared_pair_by_pair(tokenizer: Any) -> None:
    policy, reference = (Policy(make_tiny_model(seed=seed), tokenizer) for seed in (1, 2))
    done: list[int] = []
    found = pair_accuracy(policy, reference, PAIRS, done.append)
    margins = []
    with torch.no_grad():
        for pair in PAIRS:
            chosen, rejected = (
                (policy.log_prob([pair.prompt], [text]) - reference.log_prob([pair.prompt], [text])).item()
                for text in pair.completions
            )
            margins.append(chosen - rejected)
    share = sum(margin > 0 for margin in margins) / 12
    assert 0 < share < 1
    assert found.accuracy == pytest.approx(share)
    assert (found.low, found.high) == wilson_interval(share, 12)
    assert found.mean_margin == pytest.approx(sum(margins) / 12, abs=1e-4)
    longer = [(len(pair.chosen) > len(pair.rejected)) + (len(pair.chosen) == len(pair.rejected)) / 2 for pair in PAIRS]
    assert found.longer_wins == pytest.approx(sum(longer) / 12)
    assert sum(done) == 48
    swapped = [Pair(pair.prompt, pair.rejected, pair.chosen) for pair in PAIRS]
    assert pair_accuracy(policy, reference, swapped).accuracy == pytest.approx(1 - share)


def test_a_model_against_itself_is_right_half_the_time(tokenizer: Any) -> None:
    policy = Policy(make_tiny_model(), tokenizer)
    found = pair_accuracy(policy, policy, PAIRS)
    assert (found.accuracy, found.mean_margin, found.num_pairs) == (0.5, 0.0, 12)


def test_completions_of_messages_are_as_long_as_what_they_say(tokenizer: Any) -> None:
    prompt = [{"role": "user", "content": "what"}]
    long, short = ([{"role": "assistant", "content": text}] for text in ("the cat sat", "no"))
    policy, reference = (Policy(make_tiny_model(seed=seed), tokenizer) for seed in (1, 2))
    assert pair_accuracy(policy, reference, [Pair(prompt, long, short)]).longer_wins == 1
    assert pair_accuracy(policy, reference, [Pair(prompt, short, long)]).longer_wins == 0

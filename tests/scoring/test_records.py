"""From token values to records: every number under the completion that it belongs to, worked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from penchant.config import METHODS
from penchant.layouts import packed, padded, prefix_shared
from penchant.losses import LOSSES, build_loss
from penchant.models.logps import token_logps
from penchant.scoring.records import (
    logps_for,
    pair_logps,
    ranked_logps,
    rewards_of,
    rollout_logps,
    sequence_logps,
    tokens_per_completion,
    tokens_per_example,
    unit_of,
    weights_of,
)
from penchant.types import (
    PairLogps,
    RankedLogps,
    Rollout,
    RolloutLogps,
    SequenceLogps,
    TokenizedExample,
    TokenLogps,
)

from .samples import moved_policy, ragged

LAYOUTS = pytest.mark.parametrize("layout", [padded, packed, prefix_shared], ids=["padded", "packed", "prefix_shared"])

PAIRS = [
    TokenizedExample([5, 9, 2], ([7, 60, 8], [7, 12]), 0, weight=2.0, margin=0.5, win_probabilities=(0.75, 0.25)),
    TokenizedExample([11], ([4], [3, 3, 3, 3]), 1, margin=1.5, win_probabilities=(1.0, 0.0)),
]
SINGLES = [
    TokenizedExample([5, 9], ([7, 60, 8],), 0, weight=2.0, is_desirable=False),
    TokenizedExample([11], ([4],), 1, weight=0.5, is_desirable=True),
    TokenizedExample([11], ([4, 5],), 2),
]
RANKINGS = [
    TokenizedExample([5], ([1, 2], [3], [4, 5, 6]), 0, weight=4.0),
    TokenizedExample([6, 7], ([8], [9, 10]), 1),
]

ROLLOUTS = [
    TokenizedExample(
        [5, 6],
        ([7, 8], [9]),
        0,
        rollouts=(
            Rollout([0.5, -0.5], [-1.0, -2.0], returns=[1.0, 2.0], old_values=[0.25, 0.75]),
            Rollout([3.0], [-4.0], returns=[5.0], old_values=[6.0]),
        ),
    ),
    TokenizedExample(
        [11],
        ([4, 5, 6],),
        1,
        rollouts=(Rollout(*([float(n) for n in own] for own in ((1, 2, 3), (-1, -2, -3), (4, 5, 6), (7, 8, 9)))),),
    ),
    TokenizedExample([1], ([2],), 2, weight=2.0, rollouts=(Rollout([1.0], [-1.0], [0.0], [0.0]),)),
]


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@LAYOUTS
def test_pair_logps_sum_each_completion(layout: Any) -> None:
    policy = values(1, 2, 3, 0.5, 0.25, -4, 10, 20, 30, 40).requires_grad_()
    logps = pair_logps(layout.collate(PAIRS), TokenLogps(policy), torch.arange(10.0).double())
    assert logps.policy_chosen_logps.tolist() == [6.0, -4.0]
    assert logps.policy_rejected_logps.tolist() == [0.75, 100.0]
    assert logps.ref_chosen_logps.tolist() == [0 + 1 + 2, 5]
    assert logps.ref_rejected_logps.tolist() == [3 + 4, 6 + 7 + 8 + 9]
    assert logps.chosen_lengths.tolist() == [3, 1]
    assert logps.rejected_lengths.tolist() == [2, 4]
    assert logps.margins.tolist() == [0.5, 1.5]
    assert logps.win_probabilities.tolist() == [[0.75, 0.25], [1.0, 0.0]]
    assert logps.policy_prompt_logps is logps.prompt_lengths is logps.tokens is None
    (gradient,) = torch.autograd.grad(logps.policy_rejected_logps[0], policy)
    assert gradient.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]


@LAYOUTS
def test_prompts_are_summed_beside_their_completions(layout: Any) -> None:
    policy = values(1, 2, 3, 0.5, 0.25, 7, 8, -4, 10, 20, 30, 40)
    ref = values(1, 1, 1, 2, 2, torch.nan, torch.nan, 3, 4, 4, 4, 4)
    logps = pair_logps(layout.collate(PAIRS, with_prompts=True), TokenLogps(policy), ref)
    assert logps.policy_chosen_logps.tolist() == [6.0, -4.0]
    assert logps.policy_rejected_logps.tolist() == [0.75, 100.0]
    assert logps.ref_chosen_logps.tolist() == [3.0, 3.0]
    assert logps.ref_rejected_logps.tolist() == [4.0, 16.0]
    assert logps.policy_prompt_logps.tolist() == [15.0, 0.0]  # a prompt of one token has nothing to predict
    assert logps.prompt_lengths.tolist() == [2, 0]


def test_a_column_that_one_row_lacks_is_none() -> None:
    pairs = [PAIRS[0], replace(PAIRS[1], margin=None, win_probabilities=None)]
    logps = pair_logps(padded.collate(pairs), TokenLogps(torch.zeros(10)), None)
    assert logps.margins is logps.win_probabilities is logps.ref_chosen_logps is logps.ref_rejected_logps is None


@pytest.mark.parametrize("with_prompts", [False, True])
def test_tokens_stand_in_rows_with_zeros_behind(with_prompts: bool) -> None:
    batch = padded.collate(PAIRS, with_prompts)
    policy = values(1, 2, 3, 0.5, 0.25, -4, 10, 20, 30, 40)
    if with_prompts:
        policy = torch.cat([policy[:5], values(7, 8), policy[5:]])
    tokens = pair_logps(batch, TokenLogps(policy, log_collisions=-policy), 2 * policy, with_tokens=True).tokens
    chosen, rejected = values(1, 2, 3, -4, 0, 0).view(2, 3), values(0.5, 0.25, 0, 0, 10, 20, 30, 40).view(2, 4)
    assert torch.equal(tokens.policy_chosen_logps, chosen)
    assert torch.equal(tokens.policy_rejected_logps, rejected)
    assert torch.equal(tokens.ref_chosen_logps, 2 * chosen)
    assert torch.equal(tokens.ref_rejected_logps, 2 * rejected)
    assert torch.equal(tokens.policy_chosen_log_collisions, -chosen)
    assert torch.equal(tokens.policy_rejected_log_collisions, -rejected)


@LAYOUTS
def test_sequence_logps_sum_each_completion_and_take_the_unjudged_as_desirable(layout: Any) -> None:
    logps = sequence_logps(layout.collate(SINGLES), values(1, 2, 3, 4, 10, 20), values(0, 1, 2, 3, 4, 5))
    assert logps.policy_logps.tolist() == [6.0, 4.0, 30.0]
    assert logps.ref_logps.tolist() == [3.0, 3.0, 9.0]
    assert logps.lengths.tolist() == [3, 1, 2]
    assert logps.is_desirable.tolist() == [False, True, True]


@pytest.mark.parametrize("with_prompts", [False, True])
def test_of_pairs_chosen_is_desirable_and_rejected_is_not(with_prompts: bool) -> None:
    batch = padded.collate(PAIRS, with_prompts)
    policy = values(1, 2, 3, 0.5, 0.25, 7, 8, -4, 10, 20, 30, 40)
    if not with_prompts:
        policy = torch.cat([policy[:5], policy[7:]])
    logps = sequence_logps(batch, policy, 2 * policy)
    assert logps.policy_logps.tolist() == [6.0, 0.75, -4.0, 100.0]
    assert logps.ref_logps.tolist() == [12.0, 1.5, -8.0, 200.0]
    assert logps.lengths.tolist() == [3, 2, 1, 4]
    assert logps.is_desirable.tolist() == [True, False, True, False]


@LAYOUTS
def test_rankings_are_filled_up_to_the_longest(layout: Any) -> None:
    logps = ranked_logps(layout.collate(RANKINGS), values(1, 2, 3, 4, 5, 6, 7, 8, 9), values(*range(9)))
    assert logps.policy_logps.tolist() == [[3.0, 3.0, 15.0], [7.0, 17.0, 0.0]]
    assert logps.ref_logps.tolist() == [[1.0, 2.0, 12.0], [6.0, 15.0, 0.0]]
    assert logps.lengths.tolist() == [[2, 1, 3], [1, 2, 0]]
    assert logps.is_present.tolist() == [[True, True, True], [True, True, False]]


def test_trained_tokens_are_those_whose_likelihood_shall_rise_by_weight() -> None:
    assert tokens_per_example(PAIRS) == (2 * 3 + 1) / 3
    assert tokens_per_example(SINGLES) == (0.5 * 1 + 2) / 3.5
    assert tokens_per_example(RANKINGS) == (4 * 2 + 1) / 5


@LAYOUTS
def test_rollouts_are_carried_token_by_token(layout: Any) -> None:
    policy, expected = values(-1, -2, -3, -4, -5, -6), values(1, 2, 3, 4, 5, 6)
    logps = rollout_logps(layout.collate(ROLLOUTS[:2]), TokenLogps(policy, values=expected), -policy)
    assert logps.policy_logps is policy
    assert logps.values is expected
    assert logps.old_logps.tolist() == [-1, -2, -4, -1, -2, -3]
    assert logps.ref_logps.tolist() == [1, 2, 3, 4, 5, 6]
    assert logps.advantages.tolist() == [0.5, -0.5, 3, 1, 2, 3]
    assert logps.returns.tolist() == [1, 2, 5, 4, 5, 6]
    assert logps.old_values.tolist() == [0.25, 0.75, 6, 7, 8, 9]
    assert logps.sequence_ids.tolist() == [0, 0, 1, 2, 2, 2]
    assert logps.lengths.tolist() == [2, 1, 3]
    assert tokens_per_completion(ROLLOUTS) == (2 + 1 + 3 + 2 * 1) / (1 + 1 + 1 + 2)


def test_a_policy_that_has_not_moved_is_its_own_old_one() -> None:
    fresh = [replace(one, rollouts=tuple(replace(r, old_logps=None) for r in one.rollouts)) for one in ROLLOUTS]
    policy = values(-1, -2, -3, -4, -5, -6, -7).requires_grad_()
    logps = rollout_logps(padded.collate(fresh), TokenLogps(policy), None)
    assert logps.old_logps.tolist() == policy.tolist()
    assert not logps.old_logps.requires_grad
    with pytest.raises(ValueError, match="when it was sampled"):
        rollout_logps(padded.collate(SINGLES), TokenLogps(policy), None)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_the_record_of_its_unit(name: str) -> None:
    loss = build_loss({"name": name})
    kinds = {"pair": (ragged("pair"), PairLogps), "unpaired": (ragged("unpaired"), SequenceLogps)}
    kinds |= {"ranking": (ragged("ranking"), RankedLogps), "rollout": (ROLLOUTS, RolloutLogps)}
    for unit in loss.units:
        examples, record = kinds[unit]
        assert unit_of(loss, examples) == unit
        batch = padded.collate(examples[:2])
        zeros = torch.zeros(len(batch.target_ids))
        logps = logps_for(loss, batch, TokenLogps(zeros, zeros, zeros, zeros), zeros, torch.tensor(0.25), examples)
        assert isinstance(logps, record)
        assert len(loss(logps)) == len(weights_of(loss, batch))
        if record is RolloutLogps:
            assert logps.tokens_per_example == tokens_per_completion(examples)
        elif record is not RankedLogps:
            assert logps.tokens_per_example == tokens_per_example(examples) != tokens_per_example(examples[:2])
        if record is SequenceLogps:
            assert logps.kl == 0.25
        if record is PairLogps:
            assert (logps.tokens is None) == ("tokens" not in loss.needs)


def test_pairs_are_two_completions_to_a_loss_over_single_ones_and_a_ranking_to_one_over_rankings() -> None:
    pairs = ragged("pair")
    assert unit_of(build_loss({"name": "kto"}), pairs) == "unpaired"
    assert unit_of(build_loss({"name": "sft"}), pairs) == "pair"
    assert unit_of(build_loss({"name": "pl-dpo"}), pairs) == "ranking"


def test_weights_stand_beside_the_values_of_the_loss() -> None:
    singles, pairs, rankings = (padded.collate(examples) for examples in (SINGLES, PAIRS, RANKINGS))
    assert weights_of(build_loss({"name": "kto"}), singles).tolist() == [2.0, 0.5, 1.0]
    assert weights_of(build_loss({"name": "dpo"}), pairs).tolist() == [2.0, 1.0]
    assert weights_of(build_loss({"name": "kto"}), pairs).tolist() == [2.0, 2.0, 1.0, 1.0]
    assert weights_of(build_loss({"name": "pl-dpo"}), rankings).tolist() == [4.0, 1.0]
    assert weights_of(build_loss({"name": "sft"}), pairs).tolist() == [2.0, 1.0]
    assert weights_of(build_loss({"name": "sft"}), singles).tolist() == [2.0, 0.5, 1.0]


def test_rewards_stand_in_the_order_of_the_completions() -> None:
    dpo, kto, ranked = (build_loss({"name": name, "beta": 0.5}) for name in ("dpo", "kto", "pl-dpo"))
    pairs = pair_logps(
        padded.collate(PAIRS), TokenLogps(values(1, 2, 3, 1, 1, 6, 1, 1, 1, 1)), torch.zeros(10).double()
    )
    assert rewards_of(dpo, pairs).tolist() == [3.0, 1.0, 3.0, 2.0]
    singles = sequence_logps(padded.collate(SINGLES), values(1, 2, 3, 4, 10, 20), torch.zeros(6).double())
    assert rewards_of(kto, singles).tolist() == [3.0, 2.0, 15.0]
    rankings = ranked_logps(padded.collate(RANKINGS), values(1, 2, 3, 4, 5, 6, 7, 8, 9), torch.zeros(9).double())
    assert rewards_of(ranked, rankings).tolist() == [1.5, 1.5, 7.5, 3.5, 8.5]


@pytest.mark.parametrize("method", ["dpo", "wpo", "simpo", "kto", "pl-dpo"])
def test_losses_over_single_examples_do_not_depend_on_company(method: str) -> None:
    loss = build_loss(METHODS[method])
    policy, reference = moved_policy()
    examples = ragged(loss.units[0])

    def losses(some: list[TokenizedExample]) -> torch.Tensor:
        batch = padded.collate(some)
        with torch.no_grad():
            scored = token_logps(policy.model, batch, with_collisions=True)
            return loss(logps_for(loss, batch, scored, reference.token_logps([batch])[0], torch.tensor(0.1).double()))

    together = losses(examples)
    alone = torch.cat([losses([example]) for example in examples])
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-9)
    assert alone.std() > 1e-3

"""Every kind of reference gives the same numbers, and goes on giving them while the policy is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penchant.layouts.padded import collate
from penchant.models.adapters import add_lora
from penchant.scoring.policy import Policy
from penchant.scoring.reference import AdapterOff, FrozenModel, Precomputed, Reference, pair_logps
from penchant.types import Batch, TokenizedPair

from ..conftest import make_tiny_model

PAIRS = [
    TokenizedPair([5, 9, 2, 31], [7, 60, 8], [7, 12], index=40),
    TokenizedPair([11], [4, 4, 12, 30, 2, 1, 59], [3], index=7),
    TokenizedPair([17, 18, 50], [6], [13, 1, 8, 9, 2], index=8),
    TokenizedPair([21, 3], [14, 5, 6], [9, 9, 9, 2], index=0),
]
BATCHES = [collate(PAIRS[:2]), collate(PAIRS[2:])]


def precomputed(policy: Policy) -> Reference:
    return Precomputed.from_batches(policy, [collate(PAIRS[2:]), collate(PAIRS[:2])], True, lambda _: None)


KINDS: dict[str, Callable[[Policy], Reference]] = {
    "copy": FrozenModel.copy_of,
    "offloaded copy": lambda policy: FrozenModel.copy_of(policy, offload=True),
    "precomputed": precomputed,
    "adapter off": AdapterOff,
}


def make_policy(tokenizer: Any, adapted: bool) -> Policy:
    model = make_tiny_model()
    return Policy(add_lora(model, rank=2, alpha=4) if adapted else model, tokenizer)


def train(policy: Policy, num_steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([each for each in policy.parameters() if each.requires_grad], lr=1e-2)
    policy.model.train()
    for _ in range(num_steps):
        policy.token_logps(BATCHES[0]).logps.sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def base_logps() -> list[Tensor]:
    """What the model that every policy here starts from says, by itself."""
    found = []
    for batch in BATCHES:
        logits = make_tiny_model()(**batch.model_inputs).logits.detach().flatten(0, 1)[batch.hidden_rows]
        found.append(logits.log_softmax(-1).gather(-1, batch.target_ids[:, None]).squeeze(-1))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_reference_gives_the_starting_models_numbers_before_and_after_training(kind: str, tokenizer: Any) -> None:
    policy = make_policy(tokenizer, adapted=kind == "adapter off")
    reference = KINDS[kind](policy)
    assert reference.is_start_of_policy
    assert reference.description
    for _ in range(2):
        for found, expected in zip(reference.token_logps(BATCHES), base_logps(), strict=True):
            assert not found.requires_grad
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        train(policy)
    moved = policy.token_logps(BATCHES[0]).logps.detach() - base_logps()[0]
    assert moved.abs().max() > 0.1  # so the laws above were not met by standing still


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_copy_of_a_moved_policy_holds_the_moved_weights(adapted: bool, offload: bool, tokenizer: Any) -> None:
    policy = make_policy(tokenizer, adapted)
    train(policy)
    expected = [policy.token_logps(batch).logps.detach() for batch in BATCHES]
    reference = FrozenModel.copy_of(policy, offload)
    train(policy)
    for found, each in zip(reference.token_logps(BATCHES), expected, strict=True):
        torch.testing.assert_close(found, each, rtol=0, atol=1e-5)


def test_another_model_serves_as_the_reference(tokenizer: Any) -> None:
    other = Policy(make_tiny_model(seed=5), tokenizer)
    expected = [other.token_logps(batch).logps.detach() for batch in BATCHES]
    reference = FrozenModel(other, is_start_of_policy=False)
    assert not reference.is_start_of_policy
    assert not any(each.requires_grad for each in other.parameters())
    for found, each in zip(reference.token_logps(BATCHES), expected, strict=True):
        assert torch.equal(found, each)


def test_reference_leaves_the_policy_trainable_as_it_was(tokenizer: Any) -> None:
    for kind, make in KINDS.items():
        policy = make_policy(tokenizer, adapted=kind == "adapter off")
        policy.model.train()
        trainable = [name for name, each in policy.model.named_parameters() if each.requires_grad]
        make(policy).token_logps(BATCHES)
        assert policy.model.training
        assert [name for name, each in policy.model.named_parameters() if each.requires_grad] == trainable
        assert trainable


def test_adapter_works_again_behind_its_reference(tokenizer: Any) -> None:
    policy = make_policy(tokenizer, adapted=True)
    train(policy)
    before = policy.token_logps(BATCHES[0]).logps
    (ref_logps,) = AdapterOff(policy).token_logps(BATCHES[:1])
    assert torch.equal(policy.token_logps(BATCHES[0]).logps, before)
    assert (before - ref_logps).abs().max() > 0.1


def test_precomputed_numbers_follow_their_pairs_into_other_batches(tokenizer: Any) -> None:
    policy = make_policy(tokenizer, adapted=False)
    reference = precomputed(policy)
    for order in ([3, 1], [0, 2, 1, 3], [2]):
        batch = collate([PAIRS[place] for place in order])
        (found,) = reference.token_logps([batch])
        torch.testing.assert_close(found, policy.token_logps(batch).logps, rtol=0, atol=1e-5)


def test_precomputing_tells_how_many_pairs_are_done(tokenizer: Any) -> None:
    done: list[int] = []
    policy = make_policy(tokenizer, adapted=False)
    Precomputed.from_batches(policy, [collate(PAIRS[:3]), collate(PAIRS[3:])], False, done.append)
    assert done == [3, 1]


def test_bf16_reference_computes_as_its_policy_does(tokenizer: Any) -> None:
    policy = Policy(make_tiny_model(), tokenizer, precision="bf16")
    expected = policy.token_logps(BATCHES[0]).logps
    assert not torch.equal(expected, Policy(policy.model, tokenizer).token_logps(BATCHES[0]).logps)
    for make in (FrozenModel.copy_of, lambda each: Precomputed.from_batches(each, BATCHES, True, lambda _: None)):
        assert torch.equal(make(policy).token_logps(BATCHES[:1])[0], expected)


def test_pair_logps_sum_each_half_by_completion() -> None:
    batch: Batch = BATCHES[0]  # chosen of 3 and 7 tokens, rejected of 2 and 1
    policy = torch.tensor([1.0, 2, 3] + [10.0] * 7 + [0.5, 0.25] + [-4.0], requires_grad=True)
    logps = pair_logps(batch, policy, torch.arange(13.0))
    assert logps.policy_chosen_logps.tolist() == [6.0, 70.0]
    assert logps.policy_rejected_logps.tolist() == [0.75, -4.0]
    assert logps.ref_chosen_logps.tolist() == [0 + 1 + 2, 3 + 4 + 5 + 6 + 7 + 8 + 9]
    assert logps.ref_rejected_logps.tolist() == [10 + 11, 12]
    assert logps.chosen_lengths.tolist() == [3, 7]
    assert logps.rejected_lengths.tolist() == [2, 1]
    assert logps.policy_chosen_logps.requires_grad

    without_reference = pair_logps(batch, policy, None)
    assert without_reference.ref_chosen_logps is without_reference.ref_rejected_logps is None


def test_frozen_copy_has_no_gradients(tokenizer: Any) -> None:
    policy = make_policy(tokenizer, adapted=False)
    reference = FrozenModel.copy_of(policy)
    copied: nn.Module = reference._scorer.model
    assert not copied.training
    assert not any(each.requires_grad for each in copied.parameters())
    assert all(each.requires_grad for each in policy.parameters())

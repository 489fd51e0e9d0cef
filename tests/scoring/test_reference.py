"""Every kind of reference gives the same numbers, and goes on giving them while the policy is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penchant.data.loader import mismatched
from penchant.layouts import prefix_shared
from penchant.layouts.padded import collate
from penchant.models.adapters import add_lora
from penchant.scoring.policy import Policy
from penchant.scoring.reference import AdapterOff, FrozenModel, LogpsCache, Precomputed, Reference, mean_kl
from penchant.types import TokenizedExample

from ..conftest import make_tiny_model
from .alone import logps_alone, scores_alone
from .samples import LAYOUTS, cut, moved_policy, plain_models, ragged

PAIRS = [
    TokenizedExample([5, 9, 2, 31], ([7, 60, 8], [7, 12]), index=40),
    TokenizedExample([11], ([4, 4, 12, 30, 2, 1, 59], [3]), index=7),
    TokenizedExample([17, 18, 50], ([6], [13, 1, 8, 9, 2]), index=8),
    TokenizedExample([21, 3], ([14, 5, 6], [9, 9, 9, 2]), index=0),
]
BATCHES = [collate(PAIRS[:2]), collate(PAIRS[2:])]


def filled_cache(policy: Policy, *parts: Sequence[TokenizedExample]) -> LogpsCache:
    cache = LogpsCache()
    cache.fill(policy, [collate(part) for part in parts], lambda _: None)
    return cache


def precomputed(policy: Policy) -> Reference:
    return Precomputed(filled_cache(policy, PAIRS[2:], PAIRS[:2]), is_start_of_policy=True)


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


def test_precomputing_tells_how_many_examples_are_done(tokenizer: Any) -> None:
    done: list[int] = []
    LogpsCache().fill(make_policy(tokenizer, adapted=False), [collate(PAIRS[:3]), collate(PAIRS[3:])], done.append)
    assert done == [3, 1]


def test_bf16_reference_computes_as_its_policy_does(tokenizer: Any) -> None:
    policy = Policy(make_tiny_model(), tokenizer, precision="bf16")
    expected = policy.token_logps(BATCHES[0]).logps
    assert not torch.equal(expected, Policy(policy.model, tokenizer).token_logps(BATCHES[0]).logps)
    for make in (FrozenModel.copy_of, lambda each: Precomputed(filled_cache(each, PAIRS[:2]), True)):
        assert torch.equal(make(policy).token_logps(BATCHES[:1])[0], expected)


def test_frozen_copy_has_no_gradients(tokenizer: Any) -> None:
    policy = make_policy(tokenizer, adapted=False)
    reference = FrozenModel.copy_of(policy)
    copied: nn.Module = reference._scorer.model
    assert not copied.training
    assert not any(each.requires_grad for each in copied.parameters())
    assert all(each.requires_grad for each in policy.parameters())


# Log-probabilities kept by content.


def count_passes(model: nn.Module) -> list[int]:
    """Grows by the number of rows of every forward pass from here on."""
    rows: list[int] = []
    model.transformer.register_forward_hook(lambda _, __, output: rows.append(output.last_hidden_state.shape[0]))
    return rows


@pytest.mark.parametrize("kind", ["pair", "unpaired", "ranking"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_kept_numbers_are_those_of_single_sequences_whatever_index_order_and_layout(kind: str, layout: Any) -> None:
    policy, examples = moved_policy()[0], ragged(kind)
    cache = LogpsCache()
    cache.fill(policy, cut(examples, [2, 4], layout), lambda _: None)
    renamed = [replace(example, index=99 - place, weight=3.0) for place, example in enumerate(examples)][::-1]
    expected = torch.cat(scores_alone(plain_models()[0], renamed)).detach()
    for other in LAYOUTS:
        torch.testing.assert_close(cache.lookup(other.collate(renamed)), expected, rtol=0, atol=1e-9)
    assert cache.missing(renamed) == []


def test_completion_is_found_in_whatever_company_it_stands() -> None:
    policy = moved_policy()[0]
    cache = filled_cache(policy, [TokenizedExample([5, 6], ([7, 8], [9], [10, 11]), 0)])
    for completions in (([9],), ([10, 11], [7, 8]), ([7, 8], [9])):
        example = TokenizedExample([5, 6], completions, 1)
        assert cache.missing([example]) == []
        expected = torch.cat(scores_alone(policy.model, [example])).detach()
        torch.testing.assert_close(cache.lookup(collate([example])), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "other",
    [
        TokenizedExample([5, 7], ([7, 8],), 0),
        TokenizedExample([5, 6], ([7, 9],), 0),
        TokenizedExample([5, 6], ([7],), 0),
        TokenizedExample([5, 6], ([7, 8, 8],), 0),
        TokenizedExample([5, 6, 7], ([8],), 0),  # the same ids, another seam
        TokenizedExample([5], ([6, 7, 8],), 0),
        TokenizedExample([5, 6], ([7, 8], [9]), 0),
    ],
    ids=repr,
)
def test_one_token_or_the_seam_changed_is_another_content(other: TokenizedExample) -> None:
    cache = filled_cache(moved_policy()[0], [TokenizedExample([5, 6], ([7, 8],), 0)])
    assert cache.missing([other]) == [other]
    with pytest.raises(KeyError):
        cache.lookup(collate([other]))


def test_every_content_is_asked_for_once_and_scored_once() -> None:
    policy, examples = moved_policy()[0], ragged("pair")
    twice = [*examples, *(replace(example, index=50 + example.index) for example in examples)]
    cache = LogpsCache()
    missing = cache.missing(twice)
    assert missing == examples
    policy.token_logps(collate(examples))  # the head has been looked at
    rows = count_passes(policy.model)
    cache.fill(policy, [collate(missing[:2]), collate(missing[2:])], lambda _: None)
    assert rows == [4, 8]
    assert cache.missing(twice) == []
    assert cache.missing([*twice, PAIRS[0]]) == [PAIRS[0]]
    reference = Precomputed(cache, is_start_of_policy=True)
    reference.token_logps([collate(twice)])
    assert rows == [4, 8]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_prompts_have_no_kept_numbers(layout: Any) -> None:
    policy, examples = moved_policy()[0], ragged("ranking")
    cache = LogpsCache()
    cache.fill(policy, [layout.collate(examples)], lambda _: None)
    batch = layout.collate(examples, with_prompts=True)
    found, of_completions = cache.lookup(batch), batch.is_completion[batch.sequence_ids]
    assert torch.equal(found.isnan(), ~of_completions)
    torch.testing.assert_close(found[of_completions], cache.lookup(layout.collate(examples)), rtol=0, atol=0)


def test_numbers_are_kept_without_gradient_and_do_not_follow_the_policy() -> None:
    policy, examples = moved_policy()[0], ragged("unpaired")
    cache = filled_cache(policy, examples)
    before = cache.lookup(collate(examples))
    assert not before.requires_grad
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    assert torch.equal(cache.lookup(collate(examples)), before)


# The estimate of the KL divergence.


def log_ratios(examples: Sequence[TokenizedExample]) -> list[float]:
    """log pi - log pi_ref of each completion, from single sequences."""
    policy, ref = plain_models()
    return [
        (logps_alone(policy, e.prompt_ids, ids).sum() - logps_alone(ref, e.prompt_ids, ids).sum()).item()
        for e in examples
        for ids in e.completion_ids
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_mean_kl_is_the_mean_log_ratio_of_all_completions_however_they_are_cut(layout: Any) -> None:
    policy, reference = moved_policy()
    examples = mismatched(ragged("unpaired"), 24)
    ratios = log_ratios(examples)
    expected = sum(ratios) / 6
    assert expected > 0.1
    for sizes in ([6], [1, 5], [1] * 6):
        found = mean_kl(policy, reference, cut(examples, sizes, layout))
        assert found.item() == pytest.approx(expected, rel=1e-9)
        assert not found.requires_grad


def test_mean_kl_is_never_below_zero() -> None:
    policy, reference = moved_policy()
    ratios = log_ratios(ragged("unpaired"))
    for example, ratio in zip(ragged("unpaired"), ratios, strict=True):
        assert mean_kl(policy, reference, [collate([example])]).item() == pytest.approx(max(ratio, 0.0), rel=1e-9)
    assert min(ratios) < 0 < max(ratios)


def test_every_completion_of_a_pair_counts_for_the_mean_kl() -> None:
    policy, reference = moved_policy()
    found = mean_kl(policy, reference, [prefix_shared.collate(ragged("pair"))]).item()
    assert found == pytest.approx(max(0.0, sum(log_ratios(ragged("pair"))) / 12), rel=1e-9)
    assert found > 0


def test_mean_kl_of_a_policy_at_its_reference_is_zero() -> None:
    policy = moved_policy()[0]
    assert mean_kl(policy, FrozenModel.copy_of(policy), [collate(ragged("unpaired"))]).item() == 0


def test_mean_kl_without_a_reference_or_without_completions_is_refused() -> None:
    policy, reference = moved_policy()
    batches = [collate(ragged("unpaired"))]
    for given in ((None, batches), (reference, [])):
        with pytest.raises(ValueError, match="needs a reference and mismatched completions"):
            mean_kl(policy, *given)

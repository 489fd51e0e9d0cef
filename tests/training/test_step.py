"""The optimizer step: the gradient does not depend on how a batch is cut, and what is not finite goes nowhere."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penchant.config import METHODS, RunConfig
from penchant.data.loader import mismatched
from penchant.losses import NEEDS, DPOLoss, Loss, build_loss
from penchant.scoring.layout import PADDED, PREFIX_SHARED
from penchant.scoring.metrics import Means
from penchant.scoring.policy import Policy
from penchant.scoring.reference import FrozenModel, Reference
from penchant.training import step
from penchant.training.optim import make_optimizer, set_rate
from penchant.training.step import accumulate_gradient, train_step
from penchant.types import (
    Batch,
    Logps,
    PairLogps,
    PairTokens,
    RankedLogps,
    RolloutLogps,
    SequenceLogps,
    TokenizedExample,
)

from ..scoring.alone import collisions_alone, logps_alone
from ..scoring.samples import cut, gradient_of, make_head, moved_policy, plain_models, ragged

MAX_LENGTH = 24

SETTINGS: dict[str, dict[str, Any]] = {
    **METHODS,
    "ipo, sums": {"name": "ipo", "length_normalize": False},
    "f-dpo, forward_kl": {"name": "f-dpo", "divergence": "forward_kl"},
    "orpo, nll_on_prompt": {"name": "orpo", "nll_on_prompt": True},
    "dpo + orpo, nll_on_prompt": {"dpo": {}, "orpo": {"nll_on_prompt": True, "weight": 0.5}},
    "aot + wpo": {"aot": {}, "wpo": {"weight": 2.0}},
    "dpo + sft": {"dpo": {}, "sft": {"weight": 0.5}},
    "kto, weights": {"name": "kto", "desirable_weight": 0.5, "undesirable_weight": 2.0},
    "kto + bco": {"kto": {}, "bco": {"weight": 0.5}},
    "sft on completions": {"name": "sft"},
    "sft on unlabelled completions": {"name": "sft", "per": "sequence"},
    "bco + sft": {"bco": {}, "sft": {}},
}
"""Every method, and what none of them asks for."""


def kind_of(case: str) -> str:
    """Which examples a case is tried on."""
    if case == "sft on completions":
        return "unpaired"
    return "unlabelled" if case == "sft on unlabelled completions" else build_loss(SETTINGS[case]).units[0]


EVERY_CASE = pytest.mark.parametrize("case", SETTINGS)


# The independent computation: one graph over single sequences.


@cache
def models() -> dict[str, nn.Module]:
    return dict(zip(("policy", "ref"), plain_models(), strict=True))


@cache
def scored(model: str, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    return logps_alone(models()[model], prompt, completion)


def side_of(model: str, examples: Sequence[TokenizedExample], place: int) -> list[Tensor]:
    """Token log-probabilities of the completions at one place of each example."""
    return [scored(model, tuple(e.prompt_ids), tuple(e.completion_ids[place])) for e in examples]


def sums(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([row.sum() for row in rows])


def filled(rows: Sequence[Tensor]) -> Tensor:
    """Rows of unequal length, with zeros behind."""
    width = max(map(len, rows))
    return torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])


def trained_tokens_per_example(examples: Sequence[TokenizedExample]) -> float:
    trained = [e.weight * len(e.completion_ids[0]) for e in examples if e.is_desirable is not False]
    return sum(trained) / sum(example.weight for example in examples)


def pair_record(loss: Loss, examples: Sequence[TokenizedExample]) -> PairLogps:
    policy = [side_of("policy", examples, place) for place in (0, 1)]
    ref = [side_of("ref", examples, place) for place in (0, 1)]
    collisions = [
        filled([collisions_alone(models()["policy"], e.prompt_ids, e.completion_ids[place]) for e in examples])
        for place in (0, 1)
        if "collisions" in loss.needs
    ]
    prompts = [scored("policy", tuple(e.prompt_ids[:1]), tuple(e.prompt_ids[1:])) for e in examples]
    has_ref = "reference" in loss.needs
    return PairLogps(
        sums(policy[0]),
        sums(policy[1]),
        sums(ref[0]) if has_ref else None,
        sums(ref[1]) if has_ref else None,
        torch.tensor([len(example.completion_ids[0]) for example in examples]),
        torch.tensor([len(example.completion_ids[1]) for example in examples]),
        margins=torch.tensor([example.margin for example in examples], dtype=torch.float64),
        win_probabilities=torch.tensor([example.win_probabilities for example in examples], dtype=torch.float64),
        policy_prompt_logps=sums(prompts),
        prompt_lengths=torch.tensor([len(example.prompt_ids) - 1 for example in examples]),
        tokens_per_example=trained_tokens_per_example(examples),
        tokens=PairTokens(*map(filled, policy), *map(filled, ref), *collisions),
    )


def ranked_record(examples: Sequence[TokenizedExample]) -> RankedLogps:
    def rows(model: str) -> Tensor:
        return filled(
            [torch.cat([sums(side_of(model, [e], k)) for k in range(len(e.completion_ids))]) for e in examples]
        )

    lengths = filled([torch.tensor([len(ids) for ids in example.completion_ids]) for example in examples])
    return RankedLogps(rows("policy"), rows("ref"), lengths, is_present=lengths > 0)


def sequence_record(
    loss: Loss, examples: Sequence[TokenizedExample], kl_examples: Sequence[TokenizedExample]
) -> SequenceLogps:
    kl = None
    if kl_examples:
        kl = (
            (sums(side_of("policy", kl_examples, 0)) - sums(side_of("ref", kl_examples, 0)))
            .mean()
            .detach()
            .clamp(min=0)
        )
        assert kl > 0.01  # or its part in the loss would not be seen
    return SequenceLogps(
        sums(side_of("policy", examples, 0)),
        sums(side_of("ref", examples, 0)) if "reference" in loss.needs else None,
        torch.tensor([len(example.completion_ids[0]) for example in examples]),
        torch.tensor([example.is_desirable is not False for example in examples]),
        kl,
        trained_tokens_per_example(examples),
    )


def values_alone(example: TokenizedExample, completion: Sequence[int]) -> Tensor:
    """What the value head says before every token of one completion."""
    ids = torch.tensor([[*example.prompt_ids, *completion]])
    hidden = models()["policy"].transformer(ids).last_hidden_state[0]
    return make_head()(hidden)[len(example.prompt_ids) - 1 : -1, 0]


def rollout_record(loss: Loss, examples: Sequence[TokenizedExample]) -> RolloutLogps:
    rollouts = [rollout for example in examples for rollout in example.rollouts]
    lengths = [len(ids) for example in examples for ids in example.completion_ids]

    def told(name: str) -> Tensor:
        return torch.tensor([value for rollout in rollouts for value in getattr(rollout, name)], dtype=torch.float64)

    def tokens(model: str) -> Tensor:
        return torch.cat([scored(model, tuple(e.prompt_ids), tuple(ids)) for e in examples for ids in e.completion_ids])

    weights = [example.weight for example in examples for _ in example.completion_ids]
    return RolloutLogps(
        tokens("policy"),
        told("old_logps"),
        tokens("ref") if "reference" in loss.needs else None,
        told("advantages"),
        torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        torch.tensor(lengths),
        torch.cat([values_alone(e, ids) for e in examples for ids in e.completion_ids]),
        told("old_values"),
        told("returns"),
        sum(weight * length for weight, length in zip(weights, lengths, strict=True)) / sum(weights),
    )


def loss_and_gradient_alone(
    loss: Loss, examples: Sequence[TokenizedExample], kl_examples: Sequence[TokenizedExample]
) -> tuple[float, Tensor]:
    """The weighted mean of the losses, by one graph over single unpadded sequences."""
    record: Logps
    weights = [example.weight for example in examples]
    if loss.units == ("rollout",):
        record, weights = rollout_record(loss, examples), [e.weight for e in examples for _ in e.completion_ids]
    elif loss.units == ("ranking",):
        record = ranked_record(examples)
    elif len(examples[0].completion_ids) == 2:
        record = pair_record(loss, examples)
    else:
        record = sequence_record(loss, examples, kl_examples)
    weight = torch.tensor(weights, dtype=torch.float64)
    value = (loss(record) * weight).sum() / weight.sum()
    return value.item(), gradient_alone(value)


def gradient_alone(value: Tensor) -> Tensor:
    parameters = list(models()["policy"].parameters())
    found = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([each.flatten() for each in found])


# The computation of the package.


@cache
def standing() -> tuple[Policy, FrozenModel]:
    """Policy and reference for all tests that leave the weights alone."""
    return moved_policy()


def accumulated(
    policy: Policy,
    reference: Reference,
    loss: Loss,
    batches: list[Batch],
    kl_batches: Sequence[Batch] = (),
) -> tuple[dict[str, float | None], Tensor]:
    policy.model.zero_grad()
    assert policy.value_head is not None
    policy.value_head.zero_grad()
    means = Means()
    accumulate_gradient(policy, reference if "reference" in loss.needs else None, loss, batches, means, kl_batches)
    return means.means(), gradient_of(policy.model)


def kl_examples_for(loss: Loss, examples: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    return mismatched(examples, MAX_LENGTH) if "kl" in loss.needs else []


def assert_same(found: tuple[Any, Tensor], expected: tuple[Any, Tensor]) -> None:
    """Metrics and gradient to nine digits."""
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert found[0][name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
    assert (found[1] - expected[1]).norm() <= 1e-9 * expected[1].norm()


CUTS = [(PADDED, [6]), (PADDED, [3, 1, 2]), (PADDED, [1] * 6), (PREFIX_SHARED, [6]), (PREFIX_SHARED, [2, 4])]


def test_the_cases_ask_for_all_that_a_loss_may_need() -> None:
    assert {need for settings in SETTINGS.values() for need in build_loss(settings).needs} == set(NEEDS)
    assert {kind_of(case) for case in SETTINGS} == {"pair", "unpaired", "unlabelled", "ranking", "rollout"}


@EVERY_CASE
def test_loss_and_gradient_are_those_of_single_sequences_however_the_batch_is_cut(case: str) -> None:
    loss, examples = build_loss(SETTINGS[case]), ragged(kind_of(case))
    kl_examples, with_prompts = kl_examples_for(loss, examples), "prompts" in loss.needs
    expected_loss, expected_gradient = loss_and_gradient_alone(loss, examples, kl_examples)
    assert expected_gradient.norm() > 1e-4
    metrics = None
    for layout, sizes in CUTS:
        kl_batches = cut(kl_examples, sizes, layout) if kl_examples else []
        found = accumulated(*standing(), loss, cut(examples, sizes, layout, with_prompts), kl_batches)
        assert found[0]["loss"] == pytest.approx(expected_loss, rel=1e-9)
        metrics = metrics or found[0]
        assert_same(found, (metrics, expected_gradient))


def test_a_weight_of_two_counts_as_the_example_given_twice() -> None:
    for case in SETTINGS:
        loss = build_loss(SETTINGS[case])
        if loss.needs & {"whole_batch", "kl"}:
            continue  # what they reckon over the batch (a shift, a rank, a mean) takes every example once
        examples = [replace(example, weight=1.0) for example in ragged(kind_of(case))]
        weighted = [replace(examples[0], weight=2.0), *examples[1:4], replace(examples[4], weight=3.0), examples[5]]
        repeated = [examples[0], *examples, examples[4], examples[4]]
        found, expected = (
            accumulated(*standing(), loss, [PADDED.collate(some, "prompts" in loss.needs)])
            for some in (weighted, repeated)
        )
        plain = accumulated(*standing(), loss, [PADDED.collate(examples, "prompts" in loss.needs)])
        assert (plain[1] - expected[1]).norm() > 1e-3 * expected[1].norm(), case
        assert (found[1] - expected[1]).norm() <= 1e-9 * expected[1].norm(), case
        assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-9), case


@EVERY_CASE
def test_the_scale_of_the_weights_changes_nothing(case: str) -> None:
    loss, examples = build_loss(SETTINGS[case]), ragged(kind_of(case))
    kl_examples = kl_examples_for(loss, examples)
    kl_batches = [PADDED.collate(kl_examples)] if kl_examples else []
    scaled = [replace(example, weight=8 * example.weight) for example in examples]
    one, other = (
        accumulated(*standing(), loss, cut(some, [4, 2], PADDED, "prompts" in loss.needs), kl_batches)
        for some in (examples, scaled)
    )
    assert_same(other, one)


@pytest.mark.parametrize("case", ["kto", "bco", "apo-zero-unpaired", "aot-unpaired"])
@pytest.mark.parametrize("is_desirable", [True, False])
def test_a_batch_of_one_class_learns_what_the_formula_says(case: str, is_desirable: bool) -> None:
    loss = build_loss(SETTINGS[case])
    examples = [replace(example, is_desirable=is_desirable) for example in ragged("unpaired")]
    kl_examples = kl_examples_for(loss, examples)
    expected = loss_and_gradient_alone(loss, examples, kl_examples)
    for sizes in ([6], [1, 5], [1] * 6):
        kl_batches = cut(kl_examples, [6], PADDED) if kl_examples else []
        metrics, gradient = accumulated(*standing(), loss, cut(examples, sizes, PADDED), kl_batches)
        assert metrics["loss"] == pytest.approx(expected[0], rel=1e-9)
        assert (gradient - expected[1]).norm() <= 1e-9 * expected[1].norm()
        assert "rewards/accuracies" not in metrics
        assert ("rewards/chosen" in metrics, "rewards/rejected" in metrics) == (is_desirable, not is_desirable)
    assert (expected[1].norm() == 0) == (case == "aot-unpaired")


def test_kto_takes_a_batch_of_one_completion() -> None:
    loss, examples = build_loss({"name": "kto"}), ragged("unpaired")
    shifts = []
    for example, other in zip(examples, mismatched(examples, MAX_LENGTH), strict=True):
        ratio, shift = (side_of("policy", [e], 0)[0].sum() - side_of("ref", [e], 0)[0].sum() for e in (example, other))
        shifts.append(max(shift.item(), 0.0))
        surplus = 0.1 * (ratio - shifts[-1]) * (1 if example.is_desirable else -1)
        found = accumulated(*standing(), loss, [PADDED.collate([example])], [PADDED.collate([other])])
        assert found[0]["loss"] == pytest.approx(1 - surplus.sigmoid().item(), rel=1e-9)
        expected = gradient_alone(-surplus.sigmoid())
        assert (found[1] - expected).norm() <= 1e-9 * expected.norm()
    assert min(shifts) == 0 < max(shifts)


@pytest.mark.parametrize(
    ("case", "cut_in_one", "cut_in_three"),
    [("dpo", 1, 3), ("kto", 1, 3), ("wpo", 1, 3), ("bco", 1, 6), ("aot", 1, 6), ("bco-pair", 1, 6)],
)
def test_only_a_loss_over_the_whole_batch_passes_twice_and_only_over_a_batch_in_parts(
    case: str, cut_in_one: int, cut_in_three: int
) -> None:
    loss, examples = build_loss(SETTINGS[case]), ragged(kind_of(case))
    policy, reference = moved_policy()
    kl_batches = [PADDED.collate(kl_examples_for(loss, examples))] if "kl" in loss.needs else []
    passes = {"n": 0}
    for sizes, expected in (([6], cut_in_one), ([1, 2, 3], cut_in_three)):
        accumulated(policy, reference, loss, [PADDED.collate(examples)], kl_batches)  # so the head has been checked
        hook = policy.model.transformer.register_forward_hook(lambda *_: passes.update(n=passes["n"] + 1))
        passes["n"] = 0
        accumulated(policy, reference, loss, cut(examples, sizes, PADDED), kl_batches)
        hook.remove()
        assert passes["n"] - len(kl_batches) == expected


def test_gradients_add_up_over_calls() -> None:
    policy, reference = moved_policy()
    loss, batches = DPOLoss(), [PADDED.collate(ragged("pair"))]
    _, once = accumulated(policy, reference, loss, batches)
    accumulate_gradient(policy, reference, loss, batches, Means())
    torch.testing.assert_close(gradient_of(policy.model), 2 * once)


def config(**settings: Any) -> RunConfig:
    return RunConfig.model_validate({"model": "m", "data": "d", **settings})


def test_a_step_that_is_not_finite_leaves_the_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = moved_policy()
    optimizer = make_optimizer(policy.model, config())
    set_rate(optimizer, 1e-2)
    before = copy.deepcopy(policy.model.state_dict())

    batches = [PADDED.collate(ragged("pair"))]
    with monkeypatch.context() as patch:
        patch.setattr(DPOLoss, "__call__", lambda self, logps: logps.policy_chosen_logps * float("nan"))
        assert not train_step(policy, reference, DPOLoss(), batches, optimizer, 1.0, Means()).is_finite
    assert all(torch.equal(before[name], value) for name, value in policy.model.state_dict().items())
    assert train_step(policy, reference, DPOLoss(), batches, optimizer, 1.0, Means()).is_taken
    assert not all(torch.equal(before[name], value) for name, value in policy.model.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_the_gradient_is_scaled_down_to_the_norm() -> None:
    policy, reference = moved_policy()
    seen = {}

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
            seen["norm"] = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()

    means = Means()
    optimizer = Watching(policy.model.parameters(), lr=0.0)
    train_step(policy, reference, DPOLoss(beta=5.0), [PADDED.collate(ragged("pair"))], optimizer, 0.01, means)
    assert seen["norm"] == pytest.approx(0.01, rel=1e-3)
    assert means.means()["grad_norm"] > 0.01


def test_a_step_tells_how_far_it_went_and_whether_it_was_clipped() -> None:
    for max_grad_norm, is_clipped in ((1e-3, 1.0), (1e9, 0.0)):
        policy, reference = moved_policy()
        before = torch.cat([parameter.detach().flatten().double() for parameter in policy.model.parameters()])
        optimizer = make_optimizer(policy.model, config())
        set_rate(optimizer, 1e-3)
        means = Means()
        train_step(policy, reference, DPOLoss(), [PADDED.collate(ragged("pair"))], optimizer, max_grad_norm, means)
        after = torch.cat([parameter.detach().flatten().double() for parameter in policy.model.parameters()])
        expected = ((after - before).norm() / before.norm()).item()
        assert 0 < expected < 1
        assert means.means()["update_ratio"] == pytest.approx(expected, rel=1e-9)
        assert means.means()["grad_clipped"] == is_clipped


def test_of_many_weights_the_same_share_of_each_tensor_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_WEIGHTS_WATCHED", 100)
    policy, _ = moved_policy()
    sizes = [parameter.numel() for parameter in policy.model.parameters()]
    watched = step._some_weights(policy)
    assert [len(own) for own in watched] == [math.ceil(100 / sum(sizes) * size) for size in sizes]
    first = next(iter(policy.model.parameters())).detach().flatten()
    assert torch.equal(watched[0], first[: len(watched[0])])


def test_the_rewards_before_a_step_come_by_the_index_of_their_example() -> None:
    policy, reference = moved_policy()
    examples = ragged("pair")
    found: dict[int, tuple[float, ...]] = {}
    optimizer = make_optimizer(policy.model, config())
    parts = [PADDED.collate(examples[:4]), PADDED.collate(examples[4:])]
    means = Means()
    train_step(policy, reference, DPOLoss(beta=1.0), parts, optimizer, 1.0, means, rewards=found)
    assert set(found) == {example.index for example in examples}
    margins = [chosen - rejected for chosen, rejected in found.values()]
    assert sum(margins) / 6 == pytest.approx(means.means()["rewards/margins"], rel=1e-9)

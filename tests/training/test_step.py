"""The optimizer step: the gradient does not depend on how a batch is cut, and what is not finite goes nowhere."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penchant.config import METHODS, RunConfig
from penchant.data.loader import mismatched
from penchant.losses import NEEDS, DPOLoss, Loss, build_loss
from penchant.scoring.layout import PADDED
from penchant.scoring.metrics import Means
from penchant.scoring.policy import Policy
from penchant.scoring.reference import Reference
from penchant.training.optim import make_optimizer, set_rate
from penchant.training.step import accumulate_gradient, train_step
from penchant.types import Batch, Logps, PairLogps, PairTokens, RankedLogps, SequenceLogps, TokenizedExample

from ..scoring.alone import collisions_alone, logps_alone, scores_alone
from ..scoring.samples import LAYOUTS, cut, gradient_of, moved_policy, plain_models, ragged

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


def filled(rows: Sequence[Tensor]) -> Tensor:
    """Rows of unequal length, with zeros behind."""
    whole = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.float64)
    return torch.stack([torch.cat([row, zeros[len(row) :]]) for row, zeros in zip(rows, whole, strict=True)])


def pair_record(
    loss: Loss, examples: Sequence[TokenizedExample], policy: nn.Module, ref: nn.Module | None
) -> PairLogps:
    def side(model: nn.Module, place: int) -> list[Tensor]:
        return [logps_alone(model, example.prompt_ids, example.completion_ids[place]) for example in examples]

    def sums(rows: list[Tensor]) -> Tensor:
        return torch.stack([row.sum() for row in rows])

    def lengths(place: int) -> Tensor:
        return torch.tensor([len(example.completion_ids[place]) for example in examples])

    chosen, rejected = side(policy, 0), side(policy, 1)
    ref_chosen, ref_rejected = (side(ref, 0), side(ref, 1)) if ref is not None else (None, None)
    tokens = None
    if "tokens" in loss.needs:
        collisions = [
            filled([collisions_alone(policy, e.prompt_ids, e.completion_ids[place]) for e in examples])
            for place in (0, 1)
        ]
        tokens = PairTokens(filled(chosen), filled(rejected), filled(ref_chosen), filled(ref_rejected), *collisions)
    prompts = [logps_alone(policy, example.prompt_ids[:1], example.prompt_ids[1:]).sum() for example in examples]
    return PairLogps(
        sums(chosen),
        sums(rejected),
        None if ref is None else sums(ref_chosen),
        None if ref is None else sums(ref_rejected),
        lengths(0),
        lengths(1),
        margins=torch.tensor([example.margin for example in examples], dtype=torch.float64),
        win_probabilities=torch.tensor([example.win_probabilities for example in examples], dtype=torch.float64),
        policy_prompt_logps=torch.stack(prompts),
        prompt_lengths=torch.tensor([len(example.prompt_ids) - 1 for example in examples]),
        tokens_per_example=sum(e.weight * len(e.completion_ids[0]) for e in examples) / sum(e.weight for e in examples),
        tokens=tokens,
    )


def ranked_record(examples: Sequence[TokenizedExample], policy: nn.Module, ref: nn.Module) -> RankedLogps:
    def rows(model: nn.Module) -> Tensor:
        return filled([torch.stack([each.sum() for each in scores_alone(model, [e])]) for e in examples])

    counts = torch.tensor([len(example.completion_ids) for example in examples])
    is_present = torch.arange(int(counts.max())) < counts[:, None]
    lengths = filled([torch.tensor([float(len(ids)) for ids in e.completion_ids]).double() for e in examples])
    return RankedLogps(rows(policy), rows(ref), lengths.long(), is_present)


def sequence_record(
    examples: Sequence[TokenizedExample],
    policy: nn.Module,
    ref: nn.Module | None,
    kl_examples: Sequence[TokenizedExample],
) -> SequenceLogps:
    def sums(model: nn.Module, some: Sequence[TokenizedExample]) -> Tensor:
        return torch.stack([each.sum() for each in scores_alone(model, some)])

    kl = None
    if kl_examples and ref is not None:
        kl = (sums(policy, kl_examples).detach() - sums(ref, kl_examples)).mean().clamp(min=0)
        assert kl > 0.01  # or its part in the loss would not be seen
    trained = [e.weight * len(e.completion_ids[0]) * (e.is_desirable is not False) for e in examples]
    return SequenceLogps(
        sums(policy, examples),
        None if ref is None else sums(ref, examples),
        torch.tensor([len(example.completion_ids[0]) for example in examples]),
        torch.tensor([example.is_desirable is not False for example in examples]),
        kl,
        sum(trained) / sum(example.weight for example in examples),
    )


def loss_and_gradient_alone(
    loss: Loss, examples: Sequence[TokenizedExample], kl_examples: Sequence[TokenizedExample]
) -> tuple[float, Tensor]:
    """The weighted mean of the losses, by one graph over single unpadded sequences."""
    policy, ref = plain_models()
    if "reference" not in loss.needs:
        ref = None
    record: Logps
    if loss.units == ("ranking",):
        assert ref is not None
        record = ranked_record(examples, policy, ref)
    elif len(examples[0].completion_ids) == 2:
        record = pair_record(loss, examples, policy, ref)
    else:
        record = sequence_record(examples, policy, ref, kl_examples)
    weights = torch.tensor([example.weight for example in examples], dtype=torch.float64)
    value = (loss(record) * weights).sum() / weights.sum()
    value.backward()
    return value.item(), gradient_of(policy)


# The computation of the package.


def accumulated(
    policy: Policy,
    reference: Reference,
    loss: Loss,
    batches: list[Batch],
    kl_batches: Sequence[Batch] = (),
) -> tuple[dict[str, float | None], Tensor]:
    policy.model.zero_grad()
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


CUTS = [[6], [2, 2, 2], [1] * 6, [3, 1, 2]]


def test_the_cases_ask_for_all_that_a_loss_may_need() -> None:
    assert {need for settings in SETTINGS.values() for need in build_loss(settings).needs} == set(NEEDS)
    assert {kind_of(case) for case in SETTINGS} == {"pair", "unpaired", "unlabelled", "ranking"}


@EVERY_CASE
def test_loss_and_gradient_are_those_of_single_sequences_however_the_batch_is_cut(case: str) -> None:
    loss, examples = build_loss(SETTINGS[case]), ragged(kind_of(case))
    kl_examples, with_prompts = kl_examples_for(loss, examples), "prompts" in loss.needs
    expected_loss, expected_gradient = loss_and_gradient_alone(loss, examples, kl_examples)
    assert expected_gradient.norm() > 1e-4
    policy, reference = moved_policy()
    metrics = None
    for layout in LAYOUTS:
        for sizes in CUTS:
            kl_batches = cut(kl_examples, sizes, layout) if kl_examples else []
            found = accumulated(policy, reference, loss, cut(examples, sizes, layout, with_prompts), kl_batches)
            assert found[0]["loss"] == pytest.approx(expected_loss, rel=1e-9)
            metrics = metrics or found[0]
            assert_same(found, (metrics, expected_gradient))


def test_a_weight_of_two_counts_as_the_example_given_twice() -> None:
    policy, reference = moved_policy()
    for case in SETTINGS:
        loss = build_loss(SETTINGS[case])
        if loss.needs & {"whole_batch", "kl"}:
            continue  # what they reckon over the batch (a shift, a rank, a mean) takes every example once
        examples = [replace(example, weight=1.0) for example in ragged(kind_of(case))]
        weighted = [replace(examples[0], weight=2.0), *examples[1:4], replace(examples[4], weight=3.0), examples[5]]
        repeated = [examples[0], *examples, examples[4], examples[4]]
        found, expected = (
            accumulated(policy, reference, loss, [PADDED.collate(some, "prompts" in loss.needs)])
            for some in (weighted, repeated)
        )
        plain = accumulated(policy, reference, loss, [PADDED.collate(examples, "prompts" in loss.needs)])
        assert (plain[1] - expected[1]).norm() > 1e-3 * expected[1].norm(), case
        assert (found[1] - expected[1]).norm() <= 1e-9 * expected[1].norm(), case
        assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-9), case


@EVERY_CASE
def test_the_scale_of_the_weights_changes_nothing(case: str) -> None:
    loss, examples = build_loss(SETTINGS[case]), ragged(kind_of(case))
    policy, reference = moved_policy()
    kl_examples = kl_examples_for(loss, examples)
    kl_batches = [PADDED.collate(kl_examples)] if kl_examples else []
    scaled = [replace(example, weight=8 * example.weight) for example in examples]
    one, other = (
        accumulated(policy, reference, loss, cut(some, [4, 2], PADDED, "prompts" in loss.needs), kl_batches)
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
    policy, reference = moved_policy()
    for sizes in ([6], [1, 5], [1] * 6):
        kl_batches = cut(kl_examples, [6], PADDED) if kl_examples else []
        metrics, gradient = accumulated(policy, reference, loss, cut(examples, sizes, PADDED), kl_batches)
        assert metrics["loss"] == pytest.approx(expected[0], rel=1e-9)
        assert (gradient - expected[1]).norm() <= 1e-9 * expected[1].norm()
        assert "rewards/accuracies" not in metrics
        assert ("rewards/chosen" in metrics, "rewards/rejected" in metrics) == (is_desirable, not is_desirable)
    assert (expected[1].norm() == 0) == (case == "aot-unpaired")


def test_kto_takes_a_batch_of_one_completion() -> None:
    loss, examples = build_loss({"name": "kto"}), ragged("unpaired")
    others = mismatched(examples, MAX_LENGTH)
    policy, reference = moved_policy()
    policy_model, ref_model = plain_models()
    for example, other in zip(examples, others, strict=True):
        ratio, shift = (
            sum(logps_alone(policy_model, e.prompt_ids, e.completion_ids[0]))
            - sum(logps_alone(ref_model, e.prompt_ids, e.completion_ids[0]))
            for e in (example, other)
        )
        surplus = 0.1 * (ratio - max(shift.item(), 0.0)) * (1 if example.is_desirable else -1)
        metrics, gradient = accumulated(
            policy, reference, loss, [PADDED.collate([example])], [PADDED.collate([other])]
        )
        assert metrics["loss"] == pytest.approx(1 - surplus.sigmoid().item(), rel=1e-9)
        policy_model.zero_grad()
        (-surplus.sigmoid()).backward()
        expected = gradient_of(policy_model)
        assert (gradient - expected).norm() <= 1e-9 * expected.norm()


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
        accumulated(policy, reference, loss, [PADDED.collate(examples[:1])])  # the head has been checked
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
        assert not train_step(policy, reference, DPOLoss(), batches, optimizer, 1.0, Means())
    assert all(torch.equal(before[name], value) for name, value in policy.model.state_dict().items())
    assert train_step(policy, reference, DPOLoss(), batches, optimizer, 1.0, Means())
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
    optimizer = Watching(policy.parameters(), lr=0.0)
    train_step(policy, reference, DPOLoss(beta=5.0), [PADDED.collate(ragged("pair"))], optimizer, 0.01, means)
    assert seen["norm"] == pytest.approx(0.01, rel=1e-3)
    assert means.means()["grad_norm"] > 0.01

"""The optimizer step: the gradient does not depend on how a batch is cut, and what is not finite goes nowhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from penchant.losses import DPOLoss, IPOLoss
from penchant.scoring.layout import PADDED, PREFIX_SHARED, trouble_with_sharing
from penchant.scoring.metrics import Means
from penchant.scoring.policy import Policy
from penchant.scoring.reference import FrozenModel
from penchant.training.optim import make_optimizer, set_rate
from penchant.training.step import accumulate_gradient, train_step
from penchant.types import TokenizedPair

from ..conftest import make_tiny_model


def ragged_pairs(number: int = 6) -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(number):
        lengths = [1 + (7 * index + shift) % 11 for shift in (3, 5, 0)]
        rows.append(TokenizedPair(*[torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths], index))
    return rows


def moved_policy() -> tuple[Policy, FrozenModel]:
    """A policy that has left its reference, in float64."""
    policy = Policy(make_tiny_model().double(), None)
    reference = FrozenModel.copy_of(policy)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return policy, reference


def gradient_of(policy: Policy, reference: FrozenModel, loss: Any, batches: list[Any]) -> tuple[torch.Tensor, Means]:
    policy.model.zero_grad()
    means = Means()
    accumulate_gradient(policy, reference, loss, batches, means)
    return torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()]), means


@pytest.mark.parametrize(
    "loss", [DPOLoss(), DPOLoss(beta=0.5, label_smoothing=0.2), IPOLoss(), IPOLoss(length_normalize=False)]
)
@pytest.mark.parametrize("layout", [PADDED, PREFIX_SHARED], ids=lambda layout: layout.name)
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(loss: Any, layout: Any) -> None:
    policy, reference = moved_policy()
    pairs = ragged_pairs()
    if layout is PREFIX_SHARED:
        assert trouble_with_sharing(policy, pairs) is None
        reference = FrozenModel(Policy(reference._scorer.model, None), is_start_of_policy=True)
        assert trouble_with_sharing(reference._scorer, pairs) is None
        reference._scorer.model.requires_grad_(False)
    whole, whole_means = gradient_of(policy, reference, loss, [layout.collate(pairs)])
    for cut in ([1, 5], [2, 2, 2], [1] * 6, [3, 1, 2]):
        remaining, batches = list(pairs), []
        for size in cut:
            batches.append(layout.collate([remaining.pop() for _ in range(size)]))
        parts, means = gradient_of(policy, reference, loss, batches)
        assert (parts - whole).norm() <= 1e-6 * whole.norm()
        for name, value in whole_means.means().items():
            assert means.means()[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_loss_and_gradient_equal_the_formula_computed_apart() -> None:
    """-log sigmoid(beta h), summed over single unpadded sequences of the model's own logits, in float64."""
    policy, reference = moved_policy()
    pairs = ragged_pairs()
    found, means = gradient_of(
        policy, reference, DPOLoss(beta=0.3), [PADDED.collate(pairs[:4]), PADDED.collate(pairs[4:])]
    )

    def log_prob(model: nn.Module, prompt: Any, completion: Any) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *completion]])
        logps = model(input_ids=ids).logits.double().log_softmax(-1)[0]
        return sum(logps[len(prompt) - 1 + place, token] for place, token in enumerate(completion))  # type: ignore[return-value]

    model = policy.model
    model.zero_grad()
    losses = []
    for pair in pairs:
        with torch.no_grad():
            ref = log_prob(reference._scorer.model, pair.prompt_ids, pair.chosen_ids)
            ref = ref - log_prob(reference._scorer.model, pair.prompt_ids, pair.rejected_ids)
        h = (
            log_prob(model, pair.prompt_ids, pair.chosen_ids)
            - log_prob(model, pair.prompt_ids, pair.rejected_ids)
            - ref
        )
        losses.append(torch.log1p(torch.exp(-0.3 * h)))
    expected_loss = torch.stack(losses).mean()
    expected_loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert means.means()["loss"] == pytest.approx(expected_loss.item(), rel=1e-6)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_a_step_that_is_not_finite_leaves_the_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = moved_policy()
    optimizer = make_optimizer(policy.model, 0.0)
    set_rate(optimizer, 1e-2)
    before = copy.deepcopy(policy.model.state_dict())

    batches = [PADDED.collate(ragged_pairs())]
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
    train_step(policy, reference, DPOLoss(beta=5.0), [PADDED.collate(ragged_pairs())], optimizer, 0.01, means)
    assert seen["norm"] == pytest.approx(0.01, rel=1e-3)
    assert means.means()["grad_norm"] > 0.01

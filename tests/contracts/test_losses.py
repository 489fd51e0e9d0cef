"""What every loss over pairs must be, whatever its equation: each law runs over the whole registry."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import jaxtyping
import pytest
import torch
from torch import Tensor

from penchant.losses import LOSSES, PairLoss
from penchant.types import PairLogps


def variants(loss: type[PairLoss]) -> list[PairLoss]:
    """The loss with its defaults, then with every flag turned over and every field that is off (0) switched on."""
    changed: list[dict[str, bool | float]] = [{}]
    for field in dataclasses.fields(loss):
        if isinstance(field.default, bool):
            changed.append({field.name: not field.default})
        elif isinstance(field.default, float) and field.default == 0:
            changed.append({field.name: 0.1})
    return [loss(**fields) for fields in changed]


EVERY_LOSS = pytest.mark.parametrize("loss", [each for loss in LOSSES.values() for each in variants(loss)], ids=repr)
NUM_PAIRS = 5


def random_logps(loss: PairLoss, seed: int = 0) -> PairLogps:
    """Five pairs in float64, every completion of another length."""
    torch.manual_seed(seed)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = (
        -10 - 5 * torch.rand(4, NUM_PAIRS, dtype=torch.float64)
    ).unbind()
    return PairLogps(
        policy_chosen,
        policy_rejected,
        ref_chosen if loss.needs_reference else None,
        ref_rejected if loss.needs_reference else None,
        chosen_lengths=torch.tensor([3, 9, 1, 4, 7]),
        rejected_lengths=torch.tensor([2, 6, 5, 8, 10]),
    )


def rows_of(logps: PairLogps, rows: Tensor) -> PairLogps:
    """The pairs `rows` of a batch, in that order."""
    values = {field.name: getattr(logps, field.name) for field in dataclasses.fields(logps)}
    return PairLogps(**{name: value if value is None else value[rows] for name, value in values.items()})


@EVERY_LOSS
def test_gradient_is_the_derivative_of_the_value(loss: PairLoss) -> None:
    logps = random_logps(loss)

    def value(policy_chosen: Tensor, policy_rejected: Tensor) -> Tensor:
        return loss(replace(logps, policy_chosen_logps=policy_chosen, policy_rejected_logps=policy_rejected))

    inputs = (logps.policy_chosen_logps.clone(), logps.policy_rejected_logps.clone())
    assert torch.autograd.gradcheck(value, tuple(each.requires_grad_() for each in inputs))


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradient_are_finite_far_from_the_reference(loss: PairLoss, dtype: torch.dtype) -> None:
    far = torch.tensor([-1e4, 0.0, -1e4, 0.0], dtype=dtype)  # h runs from -1e4 through 0 to 1e4
    policy_chosen = far.clone().requires_grad_()
    policy_rejected = far.flip(0).requires_grad_()
    ref = torch.zeros(4, dtype=dtype) if loss.needs_reference else None
    ones = torch.ones(4, dtype=torch.long)
    losses = loss(PairLogps(policy_chosen, policy_rejected, ref, ref, ones, ones))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert policy_chosen.grad.isfinite().all()
    assert policy_rejected.grad.isfinite().all()


@EVERY_LOSS
def test_same_constant_on_policy_and_reference_of_a_side_changes_nothing(loss: PairLoss) -> None:
    if not loss.needs_reference:
        pytest.skip("the loss looks at no reference")
    logps = random_logps(loss)
    moved = replace(
        logps,
        policy_chosen_logps=logps.policy_chosen_logps + 7,
        ref_chosen_logps=logps.ref_chosen_logps + 7,
        policy_rejected_logps=logps.policy_rejected_logps - 3,
        ref_rejected_logps=logps.ref_rejected_logps - 3,
    )
    torch.testing.assert_close(loss(moved), loss(logps), rtol=1e-12, atol=1e-12)
    for rewards, moved_rewards in zip(loss.rewards(logps), loss.rewards(moved), strict=True):
        torch.testing.assert_close(moved_rewards, rewards, rtol=1e-12, atol=1e-12)


@EVERY_LOSS
def test_a_pair_alone_has_the_loss_it_has_in_company(loss: PairLoss) -> None:
    logps = random_logps(loss)
    together = loss(logps)
    for row in range(NUM_PAIRS):
        alone = loss(rows_of(logps, torch.tensor([row])))
        assert alone.shape == (1,)
        assert alone.item() == pytest.approx(together[row].item(), rel=1e-14)


@EVERY_LOSS
def test_pairs_in_another_order_have_their_losses_in_that_order(loss: PairLoss) -> None:
    logps, order = random_logps(loss), torch.tensor([3, 0, 4, 1, 2])
    reordered = rows_of(logps, order)
    torch.testing.assert_close(loss(reordered), loss(logps)[order], rtol=0, atol=0)
    for rewards, reordered_rewards in zip(loss.rewards(logps), loss.rewards(reordered), strict=True):
        torch.testing.assert_close(reordered_rewards, rewards[order], rtol=0, atol=0)


@EVERY_LOSS
def test_likelier_chosen_raises_the_margin_and_lowers_the_loss_of_an_unlearned_pair(loss: PairLoss) -> None:
    logps = random_logps(loss)
    # Every pair starts at or below a margin of 0, where every loss still pulls chosen up and pushes rejected down.
    start = replace(logps, policy_chosen_logps=logps.policy_rejected_logps - torch.arange(NUM_PAIRS).double())
    if loss.needs_reference:
        start = replace(start, ref_chosen_logps=start.policy_chosen_logps, ref_rejected_logps=logps.ref_rejected_logps)
        start = replace(start, ref_rejected_logps=start.policy_rejected_logps - torch.rand(NUM_PAIRS).double())
    likelier_chosen = replace(start, policy_chosen_logps=start.policy_chosen_logps + 0.01)
    likelier_rejected = replace(start, policy_rejected_logps=start.policy_rejected_logps + 0.01)

    def margin(logps: PairLogps) -> Tensor:
        chosen, rejected = loss.rewards(logps)
        return chosen - rejected

    assert (margin(likelier_chosen) > margin(start)).all()
    assert (margin(likelier_rejected) < margin(start)).all()
    assert (loss(likelier_chosen) < loss(start)).all()
    assert (loss(likelier_rejected) > loss(start)).all()


@EVERY_LOSS
def test_missing_reference_is_refused_where_one_is_needed(loss: PairLoss) -> None:
    logps = replace(random_logps(loss), ref_chosen_logps=None, ref_rejected_logps=None)
    if not loss.needs_reference:
        assert loss(logps).isfinite().all()
        return
    with pytest.raises(ValueError, match="reference"):
        loss(logps)
    with pytest.raises(ValueError, match="reference"):
        loss.rewards(logps)


@EVERY_LOSS
def test_loss_compiles_into_one_graph(loss: PairLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tracer alone (backend "eager"): it breaks, or not, where the compiler would. The shape checks are for tests.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    logps = random_logps(loss)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logps), loss(logps), rtol=0, atol=0)


def test_each_loss_is_registered_under_its_own_name() -> None:
    assert {"dpo", "ipo"} <= set(LOSSES)
    assert all(loss.name == name for name, loss in LOSSES.items())

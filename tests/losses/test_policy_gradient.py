"""Losses of reinforcement learning against numpy written apart, hand values, gradients, and a bandit's optimum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from penchant.losses import GRPOLoss, PPOLoss
from penchant.losses.policy_gradient import kl_k3
from penchant.online.advantages import gae, group_advantages, token_rewards
from penchant.types import RolloutLogps

LENGTHS = [3, 1, 4]


def some_logps(seed: int = 0, moved: float = 0.3, requires_grad: bool = False) -> RolloutLogps:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64)

    old = -draw().abs()
    policy, values = old + draw(moved), draw()
    return RolloutLogps(
        policy_logps=policy.requires_grad_(requires_grad),
        old_logps=old,
        ref_logps=old + draw(0.5),
        advantages=draw(),
        sequence_ids=torch.arange(3).repeat_interleave(torch.tensor(LENGTHS)),
        lengths=torch.tensor(LENGTHS),
        values=values.requires_grad_(requires_grad),
        old_values=values.detach() + draw(0.3),
        returns=draw(),
    )


def arrays(logps: RolloutLogps) -> dict[str, Any]:
    names = ("policy_logps", "old_logps", "ref_logps", "advantages", "values", "old_values", "returns")
    return {name: getattr(logps, name).detach().numpy() for name in names}


def clipped_by_numpy(x: dict[str, Any], low: float, high: float) -> Any:
    losses = []
    for policy, old, advantage in zip(x["policy_logps"], x["old_logps"], x["advantages"], strict=True):
        ratio = np.exp(policy - old)
        if advantage >= 0:
            losses.append(-min(ratio, 1 + high) * advantage)
        else:
            losses.append(-max(ratio, 1 - low) * advantage)
    return np.array(losses)


def by_completion(values: Any) -> list[Any]:
    return np.split(values, np.cumsum(LENGTHS)[:-1])


@pytest.mark.parametrize("clip_high", [None, 0.28])
@pytest.mark.parametrize("per", ["sequence", "token", "constant"])
def test_grpo_is_numpy_s(per: str, clip_high: float | None) -> None:
    logps = some_logps(moved=0.5)
    loss = GRPOLoss(clip=0.2, clip_high=clip_high, beta=0.07, per=per, constant=11.0)
    x = arrays(logps)
    tokens = clipped_by_numpy(x, 0.2, clip_high or 0.2)
    difference = x["ref_logps"] - x["policy_logps"]
    tokens = tokens + 0.07 * (np.exp(difference) - difference - 1)
    divisor = {"sequence": LENGTHS, "token": [np.mean(LENGTHS)] * 3, "constant": [11.0] * 3}[per]
    expected = [own.sum() / size for own, size in zip(by_completion(tokens), divisor, strict=True)]
    np.testing.assert_allclose(loss(logps).numpy(), expected, rtol=1e-12)
    if per == "token":  # the mean over completions is then the mean over tokens
        assert loss(logps).mean().item() == pytest.approx(tokens.mean())


def test_ppo_is_numpy_s() -> None:
    logps = some_logps(moved=0.5)
    x = arrays(logps)
    near = np.clip(x["values"], x["old_values"] - 0.2, x["old_values"] + 0.2)
    errors = 0.5 * np.maximum((x["values"] - x["returns"]) ** 2, (near - x["returns"]) ** 2)
    tokens = clipped_by_numpy(x, 0.2, 0.2) + 0.1 * errors
    found = PPOLoss()(logps)
    np.testing.assert_allclose(found.numpy(), [own.sum() / np.mean(LENGTHS) for own in by_completion(tokens)])
    assert found.mean().item() == pytest.approx(tokens.mean())


@pytest.mark.parametrize("loss", [GRPOLoss(), GRPOLoss(per="token", clip_high=0.3), PPOLoss()], ids=str)
def test_gradients_by_finite_differences(loss: Any) -> None:
    fixed = some_logps(1, moved=0.5, requires_grad=True)

    def value(policy_logps: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        names = ("old_logps", "ref_logps", "advantages", "sequence_ids", "lengths", "old_values", "returns")
        return loss(RolloutLogps(policy_logps, values=values, **{name: getattr(fixed, name) for name in names}))

    assert torch.autograd.gradcheck(value, (fixed.policy_logps, fixed.values))


@pytest.mark.parametrize("loss", [GRPOLoss(beta=0.0), PPOLoss(value_weight=0.0)], ids=str)
def test_clipped_tokens_and_they_alone_have_no_gradient(loss: Any) -> None:
    logps = some_logps(2, moved=0.6, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(logps).sum(), logps.policy_logps)
    is_clipped = loss.is_clipped(logps)
    assert 0 < is_clipped.sum() < len(is_clipped)
    assert torch.equal(gradient == 0, is_clipped)


def test_the_first_step_of_grpo_without_kl_has_loss_zero_and_a_gradient() -> None:
    logps = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5, -0.7], dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 1, 2, 1])
    sequence_ids = torch.arange(4).repeat_interleave(lengths)
    advantages = torch.from_numpy(group_advantages([1.0, 0.0, 0.0, 1.0], "standardized"))[sequence_ids]
    record = RolloutLogps(logps, logps.detach(), None, advantages, sequence_ids, lengths)
    loss = GRPOLoss(beta=0.0)(record).mean()
    assert loss.item() == 0.0
    (gradient,) = torch.autograd.grad(loss, logps)
    # By hand: -A / (tokens of the completion), over 4 completions.
    assert gradient.tolist() == [-1 / 8, -1 / 8, 1 / 4, 1 / 8, 1 / 8, -1 / 4]


def test_kl_estimates_are_never_negative_and_right_on_average() -> None:
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    ref = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    estimates = kl_k3(policy.log(), ref.log())
    assert (estimates >= 0).all()
    assert (policy * estimates).sum().item() == pytest.approx((policy * (policy / ref).log()).sum().item())
    assert kl_k3(ref.log(), ref.log()).tolist() == [0.0] * 3


def test_settings_that_make_no_sense_are_refused() -> None:
    for make, message in (
        (lambda: GRPOLoss(clip=0.0), "clip"),
        (lambda: GRPOLoss(clip_high=-1.0), "clip_high"),
        (lambda: GRPOLoss(per="batch"), "sequence, token or constant"),
        (lambda: GRPOLoss(beta=-0.1), "beta"),
        (lambda: PPOLoss(value_weight=-1.0), "value_weight"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    record = some_logps()
    with pytest.raises(ValueError, match="value head"):
        PPOLoss()(RolloutLogps(record.policy_logps, record.old_logps, None, record.advantages, record.sequence_ids,
                               record.lengths))  # fmt: skip


# A bandit: one prompt, five answers of one token each, rewards that are known.

REWARDS = np.array([0.0, 0.3, 0.8, -0.5, 0.5])
REFERENCE = torch.tensor([0.35, 0.3, 0.1, 0.15, 0.1], dtype=torch.float64)
BETA = 0.5


def optimum(beta: float) -> torch.Tensor:
    weights = REFERENCE * torch.from_numpy(np.exp(REWARDS / beta))
    return weights / weights.sum()


def rollout(logits: torch.Tensor, answers: torch.Tensor, **columns: Any) -> RolloutLogps:
    logps = logits.log_softmax(-1)[answers]
    ids = torch.arange(len(answers))
    return RolloutLogps(
        logps, logps.detach(), REFERENCE.log()[answers], sequence_ids=ids, lengths=torch.ones_like(ids), **columns
    )


def test_ppo_on_a_bandit_comes_to_the_optimum_of_kl_constrained_reward() -> None:
    """pi_ref exp(r / beta) / Z, with sampled answers, KL in the reward and a value for the only state."""
    generator = torch.Generator().manual_seed(0)
    logits = REFERENCE.log().clone().requires_grad_(True)
    value = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, value], lr=0.02)
    loss, steps = PPOLoss(value_weight=0.5, value_clip=10.0), 500
    mean = torch.zeros(5, dtype=torch.float64)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / steps)
        probabilities = logits.detach().softmax(-1)
        answers = torch.multinomial(probabilities, 1024, replacement=True, generator=generator)
        logps, ref_logps = probabilities.log().numpy(), REFERENCE.log().numpy()
        before = value.detach().expand(len(answers)).clone()
        of_each = [  # the same answer has the same advantage wherever it stands
            gae(token_rewards(REWARDS[arm], logps[[arm]], ref_logps[[arm]], BETA), before[:1].numpy(), 1.0, 0.95)[0]
            for arm in range(len(REWARDS))
        ]
        advantages = torch.tensor(of_each)[answers]
        columns = {"advantages": advantages, "returns": advantages + before, "old_values": before}
        old = rollout(logits.detach(), answers, **columns)
        for _ in range(2):  # the second one with a policy that has moved
            now = rollout(logits, answers, **columns, values=value.expand(len(answers)))
            record = RolloutLogps(**{**vars(now), "old_logps": old.policy_logps})
            optimizer.zero_grad()
            loss(record).mean().backward()
            optimizer.step()
        if step >= steps - 50:
            mean += logits.detach().softmax(-1) / 50
    assert (mean - optimum(BETA)).abs().max() < 1e-2
    expected = (optimum(BETA) * (torch.from_numpy(REWARDS) - BETA * (optimum(BETA) / REFERENCE).log())).sum()
    assert value.item() == pytest.approx(expected.item(), abs=0.02)


def test_the_fixed_point_of_grpo_on_a_bandit_is_the_one_its_gradient_says_and_not_that_of_the_kl() -> None:
    """Over all answers, each by its probability, k3 pulls with 1 - pi_ref / pi on each answer's log-probability, as
    does KL(pi_ref || pi): rewards are balanced where r - beta (1 - pi_ref / pi) is the same for all."""
    logits = REFERENCE.log().clone().requires_grad_(True)
    loss, optimizer = GRPOLoss(beta=BETA), torch.optim.Adam([logits], lr=0.05)
    for _ in range(3000):
        probabilities = logits.detach().softmax(-1)
        advantages = torch.from_numpy(REWARDS) - (probabilities * torch.from_numpy(REWARDS)).sum()
        optimizer.zero_grad()
        (probabilities * loss(rollout(logits, torch.arange(5), advantages=advantages))).sum().backward()
        optimizer.step()
    found = logits.detach().softmax(-1)
    balance = torch.from_numpy(REWARDS) - BETA * (1 - REFERENCE / found)
    assert (balance - (found * balance).sum()).abs().max() < 1e-6
    assert (found - optimum(BETA)).abs().max() > 0.01

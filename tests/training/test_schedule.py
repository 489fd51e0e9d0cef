"""When a run does what, and which optimizer takes its steps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from penchant.config import RunConfig
from penchant.training.optim import make_optimizer, set_rate
from penchant.training.schedule import eval_interval, learning_rate_at, num_steps


def config(**settings: object) -> RunConfig:
    return RunConfig.model_validate({"model": "m", "data": "d", "learning_rate": 1.0, **settings})


def test_steps_are_epochs_times_batches_rounded_up() -> None:
    assert num_steps(config(batch_size=8), 17) == 3
    assert num_steps(config(batch_size=8, num_train_epochs=2), 17) == 6
    assert num_steps(config(batch_size=8, num_train_epochs=0.5), 32) == 2
    assert num_steps(config(batch_size=8, num_train_epochs=2, max_steps=4), 17) == 4
    assert num_steps(config(batch_size=8, max_steps=40), 17) == 3


def test_linear_rate_rises_over_the_warmup_and_would_reach_zero_one_step_after_the_last() -> None:
    rates = [learning_rate_at(step, 10, config(warmup_ratio=0.2)) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_cosine_rate_falls_along_half_a_cosine() -> None:
    rates = [learning_rate_at(step, 4, config(warmup_ratio=0, lr_scheduler="cosine")) for step in range(1, 5)]
    assert rates == pytest.approx([1.0, 0.5 + 2**0.5 / 4, 0.5, 0.5 - 2**0.5 / 4])


def test_constant_rate_stays() -> None:
    rates = [learning_rate_at(step, 5, config(warmup_ratio=0.2, lr_scheduler="constant")) for step in range(1, 6)]
    assert rates == [1.0] * 5


def test_the_whole_run_may_be_warmup() -> None:
    rates = [learning_rate_at(step, 4, config(warmup_ratio=1.0)) for step in range(1, 5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    ("num_warmup", "rates"),
    [
        (4, [1 / 4, 2 / 4, 3 / 4, 1.0, math.sqrt(4 / 5), math.sqrt(4 / 6), math.sqrt(4 / 7), math.sqrt(1 / 2)]),
        (1, [1.0, math.sqrt(1 / 2), math.sqrt(1 / 3), 0.5, math.sqrt(1 / 5)]),
        (0, [1.0, math.sqrt(1 / 2), math.sqrt(1 / 3), 0.5, math.sqrt(1 / 5)]),
    ],
)
def test_inverse_root_rate_falls_as_the_root_of_warmup_over_step(num_warmup: int, rates: list[float]) -> None:
    falling = config(warmup_steps=num_warmup, lr_scheduler="inverse_sqrt")
    assert [learning_rate_at(step, 100, falling) for step in range(1, len(rates) + 1)] == pytest.approx(rates)


def test_inverse_root_rate_does_not_depend_on_the_number_of_steps() -> None:
    falling = config(warmup_steps=3, lr_scheduler="inverse_sqrt")
    assert [learning_rate_at(step, 10, falling) for step in range(1, 11)] == [
        learning_rate_at(step, 1000, falling) for step in range(1, 11)
    ]
    by_share = config(warmup_ratio=0.3, lr_scheduler="inverse_sqrt")
    assert [learning_rate_at(step, 10, by_share) for step in range(1, 11)] == [
        learning_rate_at(step, 10, falling) for step in range(1, 11)
    ]


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant", "inverse_sqrt"])
def test_warmup_steps_are_counted_whatever_the_length_of_the_run(scheduler: str) -> None:
    warm = config(warmup_steps=4, lr_scheduler=scheduler)
    for steps in (5, 10, 1000):
        rates = [learning_rate_at(step, steps, warm) for step in range(1, 6)]
        assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
        assert rates[4] == (pytest.approx(math.sqrt(4 / 5)) if scheduler == "inverse_sqrt" else 1.0)


def test_linear_rate_behind_warmup_steps_would_reach_zero_one_step_after_the_last() -> None:
    rates = [learning_rate_at(step, 6, config(warmup_steps=2)) for step in range(1, 7)]
    assert rates == pytest.approx([1 / 2, 1.0, 1.0, 3 / 4, 2 / 4, 1 / 4])


def test_no_warmup_steps_mean_no_warmup() -> None:
    assert [learning_rate_at(step, 4, config(warmup_steps=0)) for step in range(1, 5)] == [1.0, 0.75, 0.5, 0.25]


def test_run_that_is_shorter_than_its_warmup_never_reaches_the_peak() -> None:
    for scheduler in ("linear", "cosine", "inverse_sqrt"):
        warm = config(warmup_steps=10, lr_scheduler=scheduler)
        assert [learning_rate_at(step, 3, warm) for step in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.3])


def test_default_rates_are_those_of_the_field() -> None:
    assert RunConfig(model="m", data="d").peak_learning_rate() == 5e-7
    assert RunConfig(model="m", data="d", lora={"rank": 4}).peak_learning_rate() == 5e-6
    assert RunConfig(model="m", data="d", method="kto").peak_learning_rate() == 5e-6
    assert RunConfig(model="m", data="d", method="sft").peak_learning_rate() == 2e-5
    assert RunConfig(model="m", data="d", method="orpo", lora={"rank": 4}).peak_learning_rate() == 8e-5
    assert (
        RunConfig(model="m", data="d", method="orpo", learning_rate=3e-6, lora={"rank": 4}).peak_learning_rate() == 3e-6
    )


def test_four_evaluations_a_run_unless_said_otherwise() -> None:
    assert eval_interval(config(), 100) == 25
    assert eval_interval(config(), 2) == 1
    assert eval_interval(config(eval_steps=7), 100) == 7


# The optimizer.


def weights_after(optimizer: torch.optim.Optimizer, model: nn.Module, rates: list[float]) -> list[torch.Tensor]:
    """The weights after a step at each of the rates, every gradient made from the number of the step."""
    for number, rate in enumerate(rates):
        set_rate(optimizer, rate)
        torch.manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rmsprop_takes_the_steps_of_torch_with_decay_on_matrices_alone(weight_decay: float) -> None:
    model, rates = small_model(), [1e-2, 2e-2, 5e-3]
    other = copy.deepcopy(model)
    found = weights_after(make_optimizer(model, config(optimizer="rmsprop", weight_decay=weight_decay)), model, rates)
    matrices, vectors = ([p for p in other.parameters() if (p.ndim == 2) is wanted] for wanted in (True, False))
    plain = torch.optim.RMSprop([{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}], lr=1.0)
    for one, two in zip(found, weights_after(plain, other, rates), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_first_step_of_rmsprop_is_ten_times_the_rate_against_the_sign() -> None:
    # The mean square begins at 0.01 g^2, so g over its root is 10 sign(g).
    model = small_model()
    before = copy.deepcopy(model)
    after = weights_after(make_optimizer(model, config(optimizer="rmsprop")), model, [1e-3])
    for old, new, parameter in zip(before.parameters(), after, model.parameters(), strict=True):
        torch.testing.assert_close(new, old - 1e-2 * parameter.grad.sign(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.8), (0.0, 0.95)])
def test_adamw_takes_the_steps_of_torch_with_the_betas_of_the_run(betas: tuple[float, float]) -> None:
    model, rates = small_model(), [1e-2, 2e-2, 5e-3]
    other = copy.deepcopy(model)
    settings = config(adam_beta1=betas[0], adam_beta2=betas[1], weight_decay=0.1)
    found = weights_after(make_optimizer(model, settings), model, rates)
    matrices, vectors = ([p for p in other.parameters() if (p.ndim == 2) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    for one, two in zip(found, weights_after(torch.optim.AdamW(groups, betas=betas), other, rates), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_frozen_weights_are_left_out() -> None:
    model = small_model()
    model[0].requires_grad_(False)
    for name in ("adamw", "rmsprop"):
        (group,) = make_optimizer(model, config(optimizer=name)).param_groups
        assert [id(each) for each in group["params"]] == [id(model[1].weight), id(model[1].bias)]

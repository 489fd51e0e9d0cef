"""What every loss must be, whatever its equation: each law runs over the whole registry."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from penchant.losses import LOSSES, NEEDS, Loss, build_loss
from penchant.types import Logps, PairLogps, PairTokens, RankedLogps, RolloutLogps, SequenceLogps

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "dpo": [{"label_smoothing": 0.1}],
    "ipo": [{"length_normalize": False}],
    "f-dpo": [{"divergence": "reverse_kl"}, {"divergence": "forward_kl"}, {"divergence": "alpha", "alpha": 0.5}],
    "aot": [{"label_smoothing": 0.1}],
    "sppo": [{"soft": True}],
    "orpo": [{"nll_on_prompt": True}],
    "sft": [{"per": "sequence"}],
    "aot-unpaired": [{"label_smoothing": 0.1}],
    "reward": [{"alpha": 0.5}],
    "grpo": [{"beta": 0.0, "per": "token"}, {"per": "constant", "clip_high": 0.3}],
}
"""Settings beside the defaults, where other branches of a loss stand behind them."""

CASES = [
    pytest.param(loss(**settings), unit, id=f"{loss(**settings)} {unit}")
    for name, loss in LOSSES.items()
    for settings in [{}, *SETTINGS.get(name, [])]
    for unit in loss.units
]
EVERY_LOSS = pytest.mark.parametrize(("loss", "unit"), CASES)
WITH_REFERENCE = pytest.mark.parametrize(
    ("loss", "unit"), [case for case in CASES if "reference" in case.values[0].needs]
)
EVERY_CLASS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)

COLUMNS = {
    "reference": ("ref_chosen_logps", "ref_rejected_logps", "ref_logps"),
    "kl": ("kl",),
    "margins": ("margins",),
    "win_probabilities": ("win_probabilities",),
    "prompts": ("policy_prompt_logps", "prompt_lengths"),
    "tokens": ("tokens",),
    "collisions": ("policy_chosen_log_collisions", "policy_rejected_log_collisions"),
    "values": ("values", "old_values", "returns"),
}
"""What a need stands for in the records of log-probabilities; the rest is always there."""

NUM = 6


def random_logps(unit: str, seed: int = 0) -> Logps:
    """Six examples in float64 with everything that a loss may ask for; no two completions are alike."""
    source = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(*shape, dtype=torch.float64, generator=source)

    lengths = torch.tensor([[3, 9, 1, 4, 7, 12], [2, 6, 5, 8, 10, 1]])
    if unit == "ranking":
        policy, num_present = uniform(NUM, 4, low=-30, high=-10), torch.tensor([4, 2, 3, 4, 1, 3])
        is_present = torch.arange(4) < num_present[:, None]
        ref = policy + uniform(NUM, 4, low=-3, high=3)
        return RankedLogps(policy * is_present, ref * is_present, is_present * 5, is_present)
    if unit == "unpaired":
        policy, is_desirable = uniform(NUM, low=-30, high=-10), torch.tensor([True, False, False, True, False, False])
        ref = policy + uniform(NUM, low=-3, high=3)
        kl = torch.tensor(0.5, dtype=torch.float64)
        return SequenceLogps(policy, ref, lengths[0], is_desirable, kl=kl, tokens_per_example=5.5)
    if unit == "rollout":
        policy, values = uniform(36, low=-5, high=-1), uniform(36, low=-1, high=1)
        return RolloutLogps(
            policy_logps=policy,
            old_logps=policy + uniform(36, low=-0.5, high=0.5),
            ref_logps=policy + uniform(36, low=-2, high=1),
            advantages=uniform(36, low=-1, high=1),
            sequence_ids=torch.arange(NUM).repeat_interleave(lengths[0]),
            lengths=lengths[0],
            values=values,
            old_values=values + uniform(36, low=-0.5, high=0.5),
            returns=uniform(36, low=-1, high=1),
            tokens_per_example=5.5,
        )
    is_token = torch.arange(12) < lengths[..., None]
    policy, collisions = uniform(2, NUM, 12, low=-5, high=-1), uniform(2, NUM, 12, low=-3, high=-1)
    ref = policy + uniform(2, NUM, 12, low=-4, high=1)
    policy, ref, collisions = (is_token * each for each in (policy, ref, collisions))
    return PairLogps(
        *policy.sum(-1),
        *ref.sum(-1),
        *lengths,
        margins=uniform(NUM, low=0.1, high=2),
        win_probabilities=uniform(NUM, 2, low=0, high=0.4) + torch.tensor([0.6, 0.0], dtype=torch.float64),
        policy_prompt_logps=uniform(NUM, low=-30, high=-10),
        prompt_lengths=torch.arange(NUM) + 4,
        tokens_per_example=5.5,
        tokens=PairTokens(*policy, *ref, *collisions),
    )


def each_tensor(logps: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The record with every tensor of it changed, those of its tokens too."""
    changed = {}
    for field in dataclasses.fields(logps):
        value = getattr(logps, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = change(value)
        elif isinstance(value, PairTokens):
            changed[field.name] = each_tensor(value, change)
    return replace(logps, **changed)


def rows_of(logps: Logps, rows: list[int]) -> Logps:
    """The examples `rows` of a batch, in that order."""
    if isinstance(logps, RolloutLogps):
        tokens = torch.cat([(logps.sequence_ids == row).nonzero().flatten() for row in rows])
        lengths = logps.lengths[rows]
        chosen = each_tensor(replace(logps, lengths=logps.sequence_ids), lambda value: value[tokens])
        return replace(chosen, lengths=lengths, sequence_ids=torch.arange(len(rows)).repeat_interleave(lengths))
    return each_tensor(logps, lambda value: value[rows] if value.ndim else value)


def without(logps: Any, needs: frozenset[str]) -> Any:
    """The record without what these needs stand for."""
    gone = [column for need in needs for column in COLUMNS.get(need, ())]
    record = replace(logps, **{field.name: None for field in dataclasses.fields(logps) if field.name in gone})
    if getattr(record, "tokens", None) is not None:
        record = replace(record, tokens=without(record.tokens, needs))
    return record


def policy_columns(logps: Logps, loss: Loss) -> dict[str, Tensor]:
    """What the gradient flows to: sums, or tokens for the losses that weigh them."""
    if isinstance(logps, PairLogps):
        names = ("policy_chosen_logps", "policy_rejected_logps")
        return {name: getattr(logps.tokens if reads_tokens(loss) else logps, name) for name in names}
    return {"policy_logps": logps.policy_logps} | ({"values": logps.values} if "values" in loss.needs else {})


def reads_tokens(loss: Loss) -> bool:
    return "tokens" in loss.needs and "collisions" not in loss.needs


def with_policy(logps: Logps, loss: Loss, columns: dict[str, Tensor]) -> Logps:
    if isinstance(logps, PairLogps) and reads_tokens(loss):
        return replace(logps, tokens=replace(logps.tokens, **columns))
    return replace(logps, **columns)


def stacked(rewards: Any) -> Tensor:
    return torch.stack(rewards) if isinstance(rewards, tuple) else rewards


def centred(column: Tensor, logps: Logps) -> Tensor:
    """Moves a column only where its means, over both classes, stay: BCO's shift, which has no gradient, then does."""
    if isinstance(logps, SequenceLogps):
        for side in (logps.is_desirable, ~logps.is_desirable):
            column = column - side * (column * side).sum() / side.sum()
        return column
    return column - column.mean()


@EVERY_LOSS
def test_gradient_is_the_derivative_of_the_value(loss: Loss, unit: str) -> None:
    logps = random_logps(unit)
    columns = policy_columns(logps, loss)

    def value(*moves: Tensor) -> Tensor:
        if loss.name in ("bco", "bco-pair"):
            moves = tuple(centred(move, logps) for move in moves)
        moved = {name: column + move for (name, column), move in zip(columns.items(), moves, strict=True)}
        return loss(with_policy(logps, loss, moved))

    moves = tuple(torch.zeros_like(column, requires_grad=True) for column in columns.values())
    assert torch.autograd.gradcheck(value, moves)


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_value_and_gradient_are_finite_far_from_the_reference(
    loss: Loss, unit: str, dtype: torch.dtype, margin: float
) -> None:
    def far(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    logps = each_tensor(random_logps(unit), far)
    columns = policy_columns(logps, loss)
    for number, (name, column) in enumerate(columns.items()):
        moved = column.clone()
        moved[:3] += margin if number == 0 else -margin
        moved[3:] -= 1e4  # both sides far away
        columns[name] = moved.requires_grad_()
    losses = loss(with_policy(logps, loss, columns))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert all(column.grad is None or column.grad.isfinite().all() for column in columns.values())


@WITH_REFERENCE
def test_same_constant_on_policy_and_reference_changes_nothing(loss: Loss, unit: str) -> None:
    logps = random_logps(unit)
    moves = {"_chosen": 7.0, "_rejected": -3.0, "_logps": 2.0}

    def moved(record: Any) -> Any:
        changed = {}
        for field in dataclasses.fields(record):
            side = next((side for side in moves if re.fullmatch(f"(policy|ref|old){side}(_logps)?", field.name)), None)
            if side:
                changed[field.name] = getattr(record, field.name) + moves[side]
        return replace(record, **changed)

    both = moved(logps)
    if reads_tokens(loss):  # where weights are made of tokens, as WPO's, they are the policy's own
        both = replace(both, tokens=moved(logps.tokens))
    torch.testing.assert_close(loss(both), loss(logps), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(stacked(loss.rewards(both)), stacked(loss.rewards(logps)), rtol=1e-11, atol=1e-11)


@EVERY_LOSS
def test_example_alone_has_a_finite_loss_and_the_one_it_has_in_company(loss: Loss, unit: str) -> None:
    logps = random_logps(unit)
    together = loss(logps)
    assert together.shape == (NUM,)
    alone = torch.cat([loss(rows_of(logps, [row])) for row in range(NUM)])
    assert alone.isfinite().all()
    if "whole_batch" in loss.needs:
        assert not torch.allclose(alone, together), "the loss asks for the whole batch and does not look at it"
    else:
        torch.testing.assert_close(alone, together, rtol=1e-13, atol=0)


@EVERY_LOSS
def test_examples_in_another_order_have_their_losses_in_that_order(loss: Loss, unit: str) -> None:
    logps, order = random_logps(unit), [3, 0, 5, 4, 1, 2]
    reordered = rows_of(logps, order)
    torch.testing.assert_close(loss(reordered), loss(logps)[order], rtol=1e-13, atol=0)
    rewards, reordered_rewards = stacked(loss.rewards(logps)), stacked(loss.rewards(reordered))
    is_pair = unit == "pair"
    torch.testing.assert_close(reordered_rewards, rewards[:, order] if is_pair else rewards[order], rtol=0, atol=0)


PULLS = {
    "apo-down": (0, 1),  # both sides shall go down; at the reference the two pulls on chosen cancel
    "sft": (-1, 0),  # the worse side is only looked at
    "discopop": (1, -1),  # with tau 0.05 the loss rises with the margin at 0, which is a flaw of the method's
}
"""Signs of the gradient of the better and the worse side at the reference, where they are not (-1, 1)."""


@EVERY_LOSS
def test_at_the_reference_better_is_pulled_up_and_worse_is_pushed_down(loss: Loss, unit: str) -> None:
    logps = random_logps(unit)
    columns = policy_columns(logps, loss)
    if "reference" in loss.needs:
        record = logps.tokens if unit == "pair" and reads_tokens(loss) else logps
        columns = {name: getattr(record, name.replace("policy", "ref")).clone() for name in columns}
    if isinstance(logps, RolloutLogps):
        logps = replace(logps, old_logps=columns["policy_logps"].clone())
    leaves = [column.requires_grad_() for column in columns.values()]
    total = loss(with_policy(logps, loss, columns)).sum()
    grads = torch.autograd.grad(total, leaves, materialize_grads=True)
    if isinstance(logps, RankedLogps):
        is_long, last = logps.is_present.sum(-1) > 1, logps.is_present.sum(-1, keepdim=True) - 1
        better, worse = grads[0][is_long, 0], grads[0].gather(1, last)[is_long]
    elif isinstance(logps, RolloutLogps):
        better, worse = grads[0][logps.advantages > 0], grads[0][logps.advantages < 0]
    elif isinstance(logps, SequenceLogps):
        better, worse = grads[0][logps.is_desirable], grads[0][~logps.is_desirable]
    else:
        better, worse = (grad[grad != 0] if grad.ndim > 1 else grad for grad in grads)
    signs = PULLS.get(loss.name, (-1, 1))
    assert (better.sign() == signs[0]).all()
    assert (worse.sign() == signs[1]).all()


@EVERY_LOSS
def test_what_a_loss_needs_it_asks_for_and_what_it_does_not_it_leaves_alone(loss: Loss, unit: str) -> None:
    assert loss.needs <= set(NEEDS)
    logps = random_logps(unit)
    spared = without(logps, frozenset(COLUMNS) - loss.needs)
    torch.testing.assert_close(loss(spared), loss(logps), rtol=0, atol=0)
    torch.testing.assert_close(stacked(loss.rewards(spared)), stacked(loss.rewards(logps)), rtol=0, atol=0)
    for need in loss.needs & set(COLUMNS):
        with pytest.raises(ValueError, match=r"(needs|compares with) .* "):
            loss(without(logps, frozenset({need})))


def float_fields(loss: Loss) -> list[str]:
    return [field.name for field in dataclasses.fields(loss) if isinstance(getattr(loss, field.name), float)]


@EVERY_LOSS
def test_every_number_among_the_settings_acts_and_refuses_nonsense(loss: Loss, unit: str) -> None:
    logps = random_logps(unit)
    for name in float_fields(loss):
        value = getattr(loss, name)
        if name == "constant" and loss.per != "constant":
            continue
        other = replace(loss, **{name: value * 0.8 if value else 0.2})
        assert not torch.equal(other(logps), loss(logps)), f"{name} does nothing"
        for nonsense in (math.nan, math.inf, -math.inf, -0.1):
            with pytest.raises(ValueError, match=f"^{name}: .* got "):
                replace(loss, **{name: nonsense})


@EVERY_LOSS
def test_loss_is_a_value(loss: Loss, unit: str) -> None:
    same = type(loss)(**{field.name: getattr(loss, field.name) for field in dataclasses.fields(loss)})
    assert loss == same
    assert hash(loss) == hash(same)
    for name in float_fields(loss):
        assert replace(loss, **{name: getattr(loss, name) * 0.8 or 0.2}) != loss
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(loss, name, 1.0)


@EVERY_LOSS
def test_settings_build_the_loss_again(loss: Loss, unit: str) -> None:
    settings = json.loads(json.dumps(loss.settings()))
    assert settings["name"] == loss.name
    assert build_loss(settings) == loss


@EVERY_CLASS
def test_every_field_is_explained_and_the_source_named(loss: type[Loss]) -> None:
    assert LOSSES[loss.name] is loss
    assert set(loss.units) <= {"pair", "unpaired", "ranking", "rollout"}
    assert loss.units
    explained = set()
    for kind in loss.__mro__[:-1]:
        if "penchant.losses" not in kind.__module__:
            continue
        body = ast.parse(inspect.getsource(kind)).body[0].body
        for statement, below in pairwise(body):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and is_text and isinstance(below.value.value, str):
                explained.add(statement.target.id)
    assert {field.name for field in dataclasses.fields(loss)} <= explained
    assert re.search(r"arXiv:\d{4}\.\d{5}", loss.__doc__)
    assert re.search(r"[A-Z][\w'-]+ (et al\. )?20\d\d", loss.__doc__)


BREAKING = {"bco", "aot-unpaired"}
"""They pick the completions of each class: shapes that depend on the data, which no graph can hold."""


@pytest.mark.parametrize(("loss", "unit"), [case for case in CASES if case.values[0].name not in BREAKING])
def test_loss_compiles_into_one_graph(loss: Loss, unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tracer alone (backend "eager"): it breaks, or not, where the compiler would. The shape checks are for tests.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    logps = random_logps(unit)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logps), loss(logps), rtol=0, atol=0)

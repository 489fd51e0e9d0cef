"""The head's own forward and backward pass, against autograd through full logits in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penchant.models import head as module
from penchant.models.head import Head, ScoredRows

ROWS, SIZE, VOCAB = 7, 5, 11
HEADS = {
    "plain": {},
    "bias": {},
    "scaled": {"scale": 0.3},
    "capped": {"softcap": 1.5},
    "scaled and capped": {"scale": 2.0, "softcap": 1.5},
}
EVERY_HEAD = pytest.mark.parametrize("name", HEADS)
ROOM = pytest.mark.parametrize(("rows_per_chunk", "kept_bytes"), [(100, 10**9), (3, 10**9), (3, 0)])


def make_head(name: str, dtype: torch.dtype = torch.float64) -> Head:
    torch.manual_seed(0)
    projection = nn.Linear(SIZE, VOCAB, bias=name == "bias", dtype=dtype)
    return Head(projection, **HEADS[name])


def make_rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = 2 * torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), torch.randint(0, VOCAB, (ROWS,), generator=generator)


def scored(head: Head, hidden: Tensor, target_ids: Tensor, *wanted: bool) -> tuple[Any, ...]:
    projection: Any = head.projection
    asked = wanted or (False, False)
    recorded = torch.is_grad_enabled()
    return ScoredRows.apply(hidden, projection.weight, projection.bias, target_ids, head, *asked, recorded)


def expected(head: Head, hidden: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and log-collisions by their definitions, from all logits."""
    logits = head.projection(hidden) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    return (
        log_probs[torch.arange(len(hidden)), target_ids],
        -(probs * log_probs).sum(-1),
        (probs**2).sum(-1).log(),
    )


@pytest.fixture
def _room(rows_per_chunk: int, kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", rows_per_chunk * 8 * VOCAB)
    monkeypatch.setitem(module.KEPT_BYTES, "cpu", kept_bytes)


@EVERY_HEAD
@ROOM
@pytest.mark.usefixtures("_room")
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
def test_values_and_gradients_are_those_of_full_logits(name: str, is_frozen: bool) -> None:
    head, (hidden, target_ids) = make_head(name), make_rows()
    head.projection.requires_grad_(not is_frozen)
    inputs = [hidden, *(each for each in head.projection.parameters() if each.requires_grad)]
    weights = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    found, wanted = scored(head, hidden, target_ids, True, True), expected(head, hidden, target_ids)
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)
    assert [each.requires_grad for each in found] == [True, False, False]
    gradients = torch.autograd.grad((found[0] * weights).sum(), inputs)
    for own, other in zip(gradients, torch.autograd.grad((wanted[0] * weights).sum(), inputs), strict=True):
        assert other.abs().max() > 1e-2
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


@EVERY_HEAD
@ROOM
@pytest.mark.usefixtures("_room")
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    head, (hidden, target_ids) = make_head(name), make_rows()
    projection: Any = head.projection

    def logps(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return ScoredRows.apply(hidden, weight, bias[0] if bias else None, target_ids, head, True, False, True)[0]

    assert torch.autograd.gradcheck(logps, (hidden, *projection.parameters()))


def test_a_logit_of_minus_infinity_has_no_part_in_anything() -> None:
    head, (hidden, target_ids) = make_head("bias"), make_rows()
    projection: Any = head.projection
    target_ids = target_ids.clamp(min=1)
    smaller = nn.Linear(SIZE, VOCAB - 1, dtype=torch.float64)
    with torch.no_grad():
        smaller.weight.copy_(projection.weight[1:])
        smaller.bias.copy_(projection.bias[1:])
        projection.bias[0] = -torch.inf
    found = scored(head, hidden, target_ids, True, True)
    for own, other in zip(found, expected(Head(smaller), hidden, target_ids - 1), strict=True):
        torch.testing.assert_close(own, other)
    assert all(each.isfinite().all() for each in torch.autograd.grad(found[0].sum(), [hidden, projection.weight]))


def test_huge_logits_neither_overflow_nor_lose_their_gradient() -> None:
    head, (hidden, target_ids) = make_head("plain", torch.float32), make_rows(torch.float32)
    far = (1e4 * hidden).detach().requires_grad_()
    logps, entropies, _ = scored(head, far, target_ids, True, False)
    wanted = expected(head, far, target_ids)[0]
    torch.testing.assert_close(logps, wanted, rtol=1e-5, atol=1e-2)
    assert logps.isfinite().all()
    assert entropies.isfinite().all()
    (gradient,) = torch.autograd.grad(logps.sum(), far)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.sum(), far)[0], rtol=1e-4, atol=1e-4)


def test_under_autocast_log_probabilities_are_those_of_float32() -> None:
    torch.manual_seed(2)
    head = Head(nn.Linear(64, 500, bias=False))
    hidden, target_ids = torch.randn(40, 64, requires_grad=True), torch.randint(0, 500, (40,))
    exact = scored(head, hidden, target_ids)[0]
    gradient = torch.autograd.grad(exact.sum(), hidden)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = scored(head, hidden, target_ids)[0]
        rounded = head.projection(hidden).float().log_softmax(-1).gather(-1, target_ids[:, None]).squeeze(-1)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-5
    assert (rounded - exact).abs().max() > 1e-3  # what products in bf16 would make of it
    off = torch.autograd.grad(found.sum(), hidden)[0] - gradient
    assert off.norm() < 1e-2 * gradient.norm()


def test_without_gradient_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    head, (hidden, target_ids) = make_head("plain"), make_rows()
    monkeypatch.setattr(module, "_slope", lambda *_: pytest.fail("a gradient was made that nobody wants"))
    head.projection.requires_grad_(False)
    with torch.no_grad():
        logps = scored(head, hidden, target_ids)[0]
    torch.testing.assert_close(logps, expected(head, hidden, target_ids)[0].detach())

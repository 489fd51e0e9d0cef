"""The output head over scored rows: log-probabilities of targets without keeping (rows, V), forward and backward.

The backward pass of log softmax is one-hot less softmax, so all that a chunk of logits leaves behind is two numbers a
row; where there is room its exponentials are kept as well, else they are computed again. With a frozen head the
gradient in the hidden states is linear in what comes in from above, so it is made at once and nothing is kept at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""Size of one chunk of float32 logits. Larger ones gain nothing once the product fills the device."""

KEPT_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
"""Up to so much the exponentials of a batch are kept for the backward pass instead of computed again."""

_LOWEST = -1e30
"""What stands for a logit of -inf, which would make 0 * -inf of a token that cannot occur."""


@dataclass(frozen=True)
class Head:
    """What lies between the decoder's hidden states and the logits: the projection, a scale, a soft cap."""

    projection: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.projection.weight.shape[0]  # type: ignore[return-value, index]

    def logits(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """The logits of some rows, in float32 or better."""
        return self.finished(at_least_float32(self.projection(hidden)))

    def finished(self, logits: Tensor) -> Tensor:
        """What some families do to the projection's output."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


class ScoredRows(torch.autograd.Function):
    """Log-probabilities of each row's target under a plain linear head; entropies and log-collisions without gradient.

    Logits are float32 (or float64) under autocast, too: rounded to bf16 each would be off by hundredths of a nat.
    Gradients can be taken once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "M D"],
        weight: Float[Tensor, "V D"],
        bias: Float[Tensor, " V"] | None,
        target_ids: Int[Tensor, " M"],
        head: Head,
        with_entropies: bool,
        with_collisions: bool,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One number a row for each of the three; None for what nobody asked for."""
        device, num_rows = hidden.device.type, len(hidden)
        products = _Products.on(hidden, weight)
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        is_trained = with_gradient and (wants_weight or wants_bias)
        num_bytes = num_rows * len(weight) * products.wide.itemsize
        keeps = is_trained and head.softcap is None and num_bytes <= KEPT_BYTES.get(device, 0)
        logps, normalizers, largest, entropies, log_collisions = (
            hidden.new_empty(num_rows, dtype=products.wide) for _ in range(5)
        )
        slopes = torch.empty_like(hidden) if with_gradient and wants_hidden and not is_trained else None
        kept = []
        with torch.autocast(device, enabled=False):
            columns = products.operand(weight).t()
            for rows in _chunks(num_rows, len(weight), products.wide.itemsize, device):
                raw = products.logits(hidden[rows], columns, bias)
                logits = head.finished(raw)
                largest[rows] = logits.amax(-1)
                logits.sub_(largest[rows, None])
                at_target = logits.gather(-1, target_ids[rows, None]).squeeze(-1)
                logits.clamp_(min=_LOWEST)
                exponentials = logits.exp()
                normalizers[rows] = normalizer = exponentials.sum(-1)
                logps[rows] = at_target - normalizer.log()
                if with_entropies:
                    entropies[rows] = normalizer.log() - torch.linalg.vecdot(exponentials, logits) / normalizer
                if with_collisions:
                    squares = torch.linalg.vecdot(exponentials, exponentials)
                    log_collisions[rows] = squares.log() - 2 * normalizer.log()
                if keeps:
                    kept.append(exponentials)
                elif slopes is not None:
                    ones = torch.ones_like(normalizer)
                    slope = _slope(exponentials, normalizer, ones, target_ids[rows], raw, head)
                    slopes[rows] = products.gradient(slope, weight)
        ctx.save_for_backward(hidden, weight, bias, target_ids, normalizers, largest, slopes, *kept)
        ctx.head, ctx.products = head, products
        others = entropies if with_entropies else None, log_collisions if with_collisions else None
        ctx.mark_non_differentiable(*(each for each in others if each is not None))
        return logps, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " M"], *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias, of those that are asked for."""
        hidden, weight, bias, target_ids, normalizers, largest, slopes, *kept = ctx.saved_tensors
        head, products, device = ctx.head, ctx.products, hidden.device.type
        nothing = (None,) * 5
        if slopes is not None:
            return (slopes * grad[:, None]).to(hidden.dtype), None, None, *nothing
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight, dtype=products.wide) if wants_weight else None
        of_bias = torch.zeros_like(bias, dtype=products.wide) if wants_bias else None
        with torch.autocast(device, enabled=False):
            columns = None if kept else products.operand(weight).t()
            for number, rows in enumerate(_chunks(len(hidden), len(weight), products.wide.itemsize, device)):
                raw = None
                if kept:
                    exponentials = kept[number]
                else:
                    raw = products.logits(hidden[rows], columns, bias)
                    exponentials = (head.finished(raw) - largest[rows, None]).exp_()
                slope = _slope(exponentials, normalizers[rows], grad[rows], target_ids[rows], raw, head)
                if of_hidden is not None:
                    of_hidden[rows] = products.gradient(slope, weight)
                if of_weight is not None:
                    products.add_outer(of_weight, slope, hidden[rows])
                if of_bias is not None:
                    of_bias += slope.sum(0)
        return of_hidden, *(None if each is None else each.to(weight.dtype) for each in (of_weight, of_bias)), *nothing


@dataclass(frozen=True)
class _Products:
    """The arithmetic of the head's matrix products.

    Under autocast, or with half-precision weights, a GPU multiplies in half precision and gives float32; a CPU cannot
    give more than it takes, so it makes logits in float32 and only gradients in half precision.
    """

    wide: torch.dtype
    half: torch.dtype | None
    is_on_gpu: bool

    @classmethod
    def on(cls, hidden: Tensor, weight: Tensor) -> _Products:
        device, half = hidden.device.type, None
        if torch.is_autocast_enabled(device):
            half = torch.get_autocast_dtype(device)
        elif weight.dtype in (torch.float16, torch.bfloat16):
            half = weight.dtype
        return cls(torch.promote_types(hidden.dtype, torch.float32), half, device == "cuda")

    def operand(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.half if self.half and self.is_on_gpu else self.wide)

    def logits(self, hidden: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
        hidden = self.operand(hidden)
        logits = torch.mm(hidden, columns, out_dtype=self.wide) if hidden.dtype != self.wide else hidden @ columns
        return logits if bias is None else logits.add_(bias)

    def gradient(self, slope: Float[Tensor, "m V"], weight: Float[Tensor, "V D"]) -> Float[Tensor, "m D"]:
        dtype = self.half or self.wide
        return slope.to(dtype) @ weight.to(dtype)

    def add_outer(self, total: Float[Tensor, "V D"], slope: Float[Tensor, "m V"], hidden: Float[Tensor, "m D"]) -> None:
        if self.half is None:
            total.addmm_(slope.t(), hidden.to(self.wide))
        else:
            total += slope.to(self.half).t() @ hidden.to(self.half)


def _slope(
    exponentials: Float[Tensor, "m V"],
    normalizer: Float[Tensor, " m"],
    grad: Float[Tensor, " m"],
    target_ids: Int[Tensor, " m"],
    raw: Float[Tensor, "m V"] | None,
    head: Head,
) -> Float[Tensor, "m V"]:
    """The gradient in the projection's output: grad (one-hot - softmax), through soft cap and scale."""
    slope = exponentials * (-grad / normalizer)[:, None]
    slope.scatter_add_(1, target_ids[:, None], grad[:, None])
    if head.softcap is not None:
        assert raw is not None
        slope.mul_(1 - (head.finished(raw) / head.softcap).square_())
    return slope if head.scale == 1.0 else slope.mul_(head.scale)


def _chunks(num_rows: int, vocab_size: int, itemsize: int, device: str) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES.get(device, 2**26) // (itemsize * vocab_size))
    return (slice(start, start + size) for start in range(0, num_rows, size))


def at_least_float32(logits: Tensor) -> Tensor:
    """The same numbers in float32, or as they are where that is more."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

"""Exact attention over packed sequences that share prompts, forward and backward written out.

A token of a completion sees its prompt and its own completion. Flash attention takes the two apart and puts them
together again by the log-sum-exp of each part's scores:

    lse = logaddexp(lse_prompt, lse_own)
    out = exp(lse_prompt - lse) out_prompt + exp(lse_own - lse) out_own

and its backward pass, given the whole's `out` and `lse`, yields each part's share of the gradient exactly. So every
prompt is one causal product, all its completions together meet it in one more, and nothing is filled up, copied into
rows or masked.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from penchant.types import Segments

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class AttentionOnHost(torch.autograd.Function):
    """Attention of packed segments on the CPU, each segment where it lies. Gradients can be taken once."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "one Hq T D"],
        key: Float[Tensor, "one Hk T D"],
        value: Float[Tensor, "one Hk T D"],
        segments: Segments,
        scaling: float | None,
    ) -> Float[Tensor, "one T Hq D"]:
        """The attended values, token by token."""
        attended = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)  # (1, T, Hq, D)
        out, queries, keys, values = _in_groups(key.shape[1], attended.transpose(1, 2), query, key, value)
        lse = torch.empty(queries.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))  # (g, Hk, T)
        for bounds in segments.bounds:
            for start, end in pairwise(bounds):
                own = slice(start, end)
                out[:, :, own], lse[:, :, own] = _flash(
                    queries[:, :, own], keys[:, :, own], values[:, :, own], 0.0, True, scale=scaling
                )
            if len(bounds) > 2:
                prompt, behind = slice(bounds[0], bounds[1]), slice(bounds[1], bounds[-1])
                seen, seen_lse = _flash(
                    queries[:, :, behind], keys[:, :, prompt], values[:, :, prompt], 0.0, False, scale=scaling
                )
                out[:, :, behind], lse[:, :, behind] = _joined(out[:, :, behind], lse[:, :, behind], seen, seen_lse)
        ctx.save_for_backward(query, key, value, attended, lse)
        ctx.segments, ctx.scaling = segments, scaling
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "one T Hq D"]) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value: every segment writes its own, what completions ask of prompts is added."""
        query, key, value, attended, lse = ctx.saved_tensors
        # Laid out as the projections give them, so that what follows need not copy.
        grad_query, grad_key, grad_value = (
            torch.empty_like(each.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for each in (query, key, value)
        )
        slopes, out, queries, keys, values, to_queries = _in_groups(
            key.shape[1], grad.transpose(1, 2), attended.transpose(1, 2), query, key, value, grad_query
        )

        def shares(asking: slice, asked: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            of_query, of_key, of_value = _flash_backward(
                slopes[:, :, asking],
                queries[:, :, asking],
                keys[:, :, asked],
                values[:, :, asked],
                out[:, :, asking],
                lse[:, :, asking],
                0.0,
                causal,
                scale=ctx.scaling,
            )
            return of_query, of_key.sum(0), of_value.sum(0)

        for bounds in ctx.segments.bounds:
            for start, end in pairwise(bounds):
                own = slice(start, end)
                to_queries[:, :, own], grad_key[0, :, own], grad_value[0, :, own] = shares(own, own, True)
            if len(bounds) > 2:
                prompt, behind = slice(bounds[0], bounds[1]), slice(bounds[1], bounds[-1])
                of_query, of_key, of_value = shares(behind, prompt, False)
                to_queries[:, :, behind] += of_query
                grad_key[0, :, prompt] += of_key
                grad_value[0, :, prompt] += of_value
        return grad_query, grad_key, grad_value, None, None


class AttentionOnCuda(torch.autograd.Function):
    """The same on a GPU in half precision, by the variable-length kernels: two calls, whatever the segments are."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "one Hq T D"],
        key: Float[Tensor, "one Hk T D"],
        value: Float[Tensor, "one Hk T D"],
        segments: Segments,
        scaling: float | None,
    ) -> Float[Tensor, "one T Hq D"]:
        """The attended values, token by token."""
        queries, keys, values = (each[0].transpose(0, 1) for each in (query, key, value))  # (T, H, D)
        own = segments.own_spans
        out, lse, *seed = _varlen(queries, keys, values, own, own, True, scaling)
        spans = segments.shared_spans
        if spans is not None:
            asking, asked = queries[spans.asking], (keys[spans.asked], values[spans.asked])
            seen, seen_lse, *_ = _varlen(asking, *asked, spans.of_asking, spans.of_asked, False, scaling)
            whole = torch.logaddexp(lse[:, spans.asking], seen_lse)  # (Hq, M)
            shares = [(part - whole).exp().t()[:, :, None] for part in (lse[:, spans.asking], seen_lse)]
            out[spans.asking] = (shares[0] * out[spans.asking] + shares[1] * seen).to(out.dtype)
            lse[:, spans.asking] = whole
        ctx.save_for_backward(queries, keys, values, out, lse, *seed)
        ctx.segments, ctx.scaling = segments, scaling
        return out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "one T Hq D"]) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        queries, keys, values, out, lse, *seed = ctx.saved_tensors
        slopes, scaling = grad[0].contiguous(), ctx.scaling
        own, spans = ctx.segments.own_spans, ctx.segments.shared_spans
        of_query, of_key, of_value = _varlen_backward(
            slopes, queries, keys, values, out, lse, own, own, True, seed, scaling
        )
        if spans is not None:
            asking, asked = spans.asking, spans.asked
            more = _varlen_backward(
                slopes[asking],
                queries[asking],
                keys[asked],
                values[asked],
                out[asking],
                lse[:, asking].contiguous(),
                spans.of_asking,
                spans.of_asked,
                False,
                seed,
                scaling,
            )
            of_query.index_add_(0, asking, more[0])
            of_key.index_add_(0, asked, more[1])
            of_value.index_add_(0, asked, more[2])
        return (*(each.transpose(0, 1)[None] for each in (of_query, of_key, of_value)), None, None)


def _in_groups(num_kv_heads: int, *tensors: Tensor) -> list[Tensor]:
    """Views (g, Hk, T, D) of tensors (1, H, T, D): the g heads that ask the same keys, one behind the other.

    Keys themselves are shown to all g of them, which takes no memory.
    """
    num_groups = max(each.shape[1] for each in tensors) // num_kv_heads
    return [
        each.expand(num_groups, -1, -1, -1)
        if each.shape[1] == num_kv_heads
        else each[0].unflatten(0, (num_kv_heads, num_groups)).transpose(0, 1)
        for each in tensors
    ]


def _joined(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """What attention over both sets of keys gives, from what it gave over each."""
    whole = torch.logaddexp(lse, more_lse)
    share, more_share = (lse - whole).exp()[..., None], (more_lse - whole).exp()[..., None]
    return share * out + more_share * more, whole


def _varlen(
    queries: Tensor, keys: Tensor, values: Tensor, asking: Any, asked: Any, causal: bool, scaling: float | None
) -> tuple[Tensor, ...]:
    out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        queries, keys, values, asking.bounds, asked.bounds, asking.longest, asked.longest, 0.0, causal, False,
        scale=scaling,
    )  # fmt: skip
    return out, lse, seed, offset


def _varlen_backward(
    slopes: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor,
    asking: Any, asked: Any, causal: bool, seed: list[Tensor], scaling: float | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return torch.ops.aten._flash_attention_backward(
        slopes, queries, keys, values, out, lse, asking.bounds, asked.bounds, asking.longest, asked.longest, 0.0,
        causal, *seed, scale=scaling,
    )  # fmt: skip

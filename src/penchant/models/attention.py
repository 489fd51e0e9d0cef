"""Attention for sequences that share tokens, plugged into transformers without touching a model.

transformers lets attention functions be registered by name and hands keyword arguments of the model's call down to
them, so `segments` arrives here as an argument (a context variable would be lost when checkpointing recomputes), and so
do the `prompts` that completions share while they are sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from penchant.models.segments import AttentionOnCuda, AttentionOnHost
from penchant.types import Segments

if TYPE_CHECKING:
    from penchant.models.prompt_cache import PromptCache

IMPLEMENTATION = "penchant"


def attend(
    module: nn.Module,
    query: Float[Tensor, "rows Hq T D"],
    key: Float[Tensor, "rows Hk S D"],
    value: Float[Tensor, "rows Hk S Dv"],
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    prompts: PromptCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within `segments`, or behind `prompts`; without either, transformers' own scaled-dot-product."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if prompts is not None:
        return attend_behind_prompts(module, query, key, value, prompts, **kwargs), None
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return attend_in_segments(query, key, value, segments, **kwargs), None


def attend_in_segments(
    query: Float[Tensor, "one Hq T D"],
    key: Float[Tensor, "one Hk T D"],
    value: Float[Tensor, "one Hk T Dv"],
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " Hq"] | None = None,
    **kwargs: Any,
) -> Float[Tensor, "one T Hq Dv"]:
    """Causal attention of packed tokens within their segments and to their prompts.

    By segment where nothing but keys and values counts. A window shorter than a sequence, capped scores (`softcap`) and
    sinks (`s_aux`) are for FlexAttention on a GPU, and for rows otherwise.

    Raises:
        ValueError: there is dropout, which shared tokens cannot have.
    """
    if dropout:
        raise ValueError("dropout in attention is not among what shared tokens know")
    if torch.is_autocast_enabled(query.device.type):  # norms of queries and keys may have left them wider
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    window = sliding_window if sliding_window is not None and sliding_window < segments.longest else None
    is_plain = window is None and softcap is None and s_aux is None and query.shape[-1] == value.shape[-1]
    if is_plain and query.device.type == "cpu":
        return AttentionOnHost.apply(query, key, value, segments, scaling)
    if is_plain and _has_varlen(query):
        return AttentionOnCuda.apply(query, key, value, segments, scaling)
    if query.device.type == "cuda" and s_aux is None:
        return attend_by_flex(query, key, value, segments, scaling, window, softcap)
    return attend_in_rows(query, key, value, segments, scaling, window, softcap, s_aux)


def attend_in_rows(
    query: Float[Tensor, "one Hq T D"],
    key: Float[Tensor, "one Hk T D"],
    value: Float[Tensor, "one Hk T Dv"],
    segments: Segments,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " Hq"] | None = None,
) -> Float[Tensor, "one T Hq Dv"]:
    """Spreads packed tokens into one row a sequence, attends within each row, and packs the results again."""
    gather, scatter = segments.rows
    num_rows, width = gather.shape

    def spread(packed: Tensor) -> Tensor:  # (1, H, T, D) -> (N, H, L, D)
        taken = packed[0].index_select(1, gather.flatten())
        return taken.unflatten(1, (num_rows, width)).transpose(0, 1)

    query, key, value = spread(query), spread(key), spread(value)
    place = torch.arange(width, device=query.device)
    distance = place[:, None] - place[None, :]
    visible = (distance >= 0) & (distance < (window or width))  # (L, L)
    if softcap is None and sinks is None:
        mask = None if window is None else visible
        attended = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
    else:
        num_groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(num_groups, dim=1) for each in (key, value))
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:  # a sink takes its share and gives nothing
            scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(num_rows, -1, width, 1).to(scores.dtype)], -1)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
        attended = weights[..., :width] @ value
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, scatter)[None]  # (1, T, H, Dv)


def attend_by_flex(
    query: Float[Tensor, "one Hq T D"],
    key: Float[Tensor, "one Hk T D"],
    value: Float[Tensor, "one Hk T Dv"],
    segments: Segments,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "one T Hq Dv"]:
    """The same by FlexAttention, compiled on a GPU. On the CPU it knows no backward pass."""

    capped = None
    if softcap is not None:
        capped = lambda score, *_: softcap * torch.tanh(score / softcap)  # noqa: E731 (its arguments are counted)
    attended = _flex_attention(query.device.type)(
        query,
        key,
        value,
        score_mod=capped,
        block_mask=_block_mask(segments, window),
        scale=scaling,
        enable_gqa=True,
    )
    return attended.transpose(1, 2)


@lru_cache(maxsize=4)  # all layers of a pass ask for the same one or two
def _block_mask(segments: Segments, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    group, segment, position = segments.members
    reach = segments.longest if window is None else window
    num_tokens = len(group)
    return create_block_mask(
        lambda row, head, asking, asked: (
            (group[asking] == group[asked])
            & ((segment[asking] == segment[asked]) | (segment[asked] == 0))
            & (position[asking] >= position[asked])
            & (position[asking] - position[asked] < reach)
        ),
        None,
        None,
        num_tokens,
        num_tokens,
        device=segments.device,
    )


@cache
def _flex_attention(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def _has_varlen(query: Tensor) -> bool:
    """Whether the variable-length flash kernels take this: half precision on Ampere or newer, heads up to 256."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    size = query.shape[-1]
    return size % 8 == 0 and size <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend_behind_prompts(
    module: nn.Module,
    query: Float[Tensor, "R Hq 1 D"],
    key: Float[Tensor, "R Hk S D"],
    value: Float[Tensor, "R Hk S Dv"],
    prompts: PromptCache,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " Hq"] | None = None,
    **kwargs: Any,
) -> Float[Tensor, "R 1 Hq Dv"]:
    """Attention of one token a row to its prompt, which other rows share, and to what stands behind it in its own row.

    All queries to a prompt meet its keys in one product: neither rows nor heads that share keys repeat them.
    """
    if prompts.hides_window and "sliding_window" not in kwargs:
        raise ValueError("the layer does not tell its window")
    window = kwargs.get("sliding_window")
    if window is not None:
        key, value = key[:, :, -window:], value[:, :, -window:]
    prompt_key, prompt_value = prompts.prompt_states(module.layer_idx)  # type: ignore[arg-type]
    num_heads, num_kv_heads, num_places = query.shape[1], key.shape[1], prompt_key.shape[2]
    query = query.unflatten(1, (num_kv_heads, -1)).squeeze(3)  # (R, Hk, g, D)
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)

    scores = torch.cat(
        [
            prompts.by_prompt(query) @ prompt_key.transpose(2, 3),  # (P, Hk, Wg, L)
            prompts.by_prompt(query @ key.transpose(2, 3)),  # (P, Hk, Wg, S)
        ],
        -1,
    )
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = prompts.hidden(window)
    if hidden is not None:
        scores[..., :num_places].masked_fill_(hidden, -torch.inf)
    if s_aux is not None:  # a sink takes its share and gives nothing
        sinks = s_aux.view(1, num_kv_heads, -1, 1).expand(query.shape[0], -1, -1, -1)
        scores = torch.cat([scores, prompts.by_prompt(sinks).to(scores.dtype)], -1)

    # Softmax in float32: half precision would lose the many small weights of a long prompt.
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    own_weights = prompts.by_row(weights[..., num_places : num_places + key.shape[2]])
    attended = own_weights @ value + prompts.by_row(weights[..., :num_places] @ prompt_value)  # (R, Hk, g, Dv)
    return attended.reshape(attended.shape[0], 1, num_heads, -1)


@contextmanager
def attending(model: nn.Module) -> Iterator[bool]:
    """Within it, the model attends by `attend` (whether it really does is the value), behind it as before."""
    configs: dict[int, Any] = {}
    for part in model.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "_attn_implementation"):
            configs.setdefault(id(config), config)
    before = [(config, config._attn_implementation) for config in configs.values()]
    if all(name == IMPLEMENTATION for _, name in before):
        yield bool(before)
        return
    try:
        yield use_attend(model)
    finally:
        for config, name in before:  # from the whole to its parts: setting a whole sets its parts
            config._attn_implementation = name


def use_attend(model: nn.Module) -> bool:
    """Makes the model attend by `attend`; whether it really does so.

    Some families keep attention code of their own and stay with it without a word.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    try:
        model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
    except (ValueError, AttributeError):
        return False
    return model.config._attn_implementation == IMPLEMENTATION  # type: ignore[union-attr]

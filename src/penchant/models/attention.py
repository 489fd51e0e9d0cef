"""Attention for layouts in which sequences share tokens, plugged into transformers without touching a model.

transformers lets attention functions be registered by name and hands keyword arguments of the model's call down to
them, so `shared_rows` arrives here as an argument (a context variable would be lost when checkpointing recomputes).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from penchant.types import SharedRows

IMPLEMENTATION = "penchant_shared_rows"


def attend_in_rows(
    module: nn.Module,
    query: Float[Tensor, "one Hq T D"],
    key: Float[Tensor, "one Hk S D"],
    value: Float[Tensor, "one Hk S Dv"],
    attention_mask: Tensor | None,
    shared_rows: SharedRows | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Spreads packed tokens into one row a sequence, attends causally within each row, and packs the results again.

    Without `shared_rows` it is transformers' own scaled-dot-product attention (generation, padded batches).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if shared_rows is None:
        if sliding_window is not None:
            kwargs["sliding_window"] = sliding_window
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is not among what shared rows know")

    def spread(packed: Tensor) -> Tensor:  # (1, H, T, D) -> (N, H, L, D)
        heads, _, size = packed.shape[1:]
        rows, places = shared_rows.gather.shape
        taken = packed[0].index_select(1, shared_rows.gather.flatten())
        return taken.view(heads, rows, places, size).transpose(0, 1)

    mask = None
    if sliding_window is not None and sliding_window < shared_rows.gather.shape[1]:
        place = torch.arange(shared_rows.gather.shape[1], device=query.device)
        distance = place[:, None] - place[None, :]
        mask = ((distance >= 0) & (distance < sliding_window))[None, None]  # (1, 1, L, L)
    kwargs["is_causal"] = mask is None
    attended, _ = sdpa_attention_forward(module, spread(query), spread(key), spread(value), mask, **kwargs)
    return attended.flatten(0, 1).index_select(0, shared_rows.scatter)[None], None  # (1, T, H, D)


def use_shared_rows(model: nn.Module) -> bool:
    """Makes the model attend by `attend_in_rows`; whether it really does so.

    Some families keep attention code of their own and stay with it without a word.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attend_in_rows)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    try:
        model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
    except (ValueError, AttributeError):
        return False
    return model.config._attn_implementation == IMPLEMENTATION  # type: ignore[union-attr]

"""Attention for sequences that share tokens, plugged into transformers without touching a model.

transformers lets attention functions be registered by name and hands keyword arguments of the model's call down to
them, so `shared_rows` arrives here as an argument (a context variable would be lost when checkpointing recomputes),
and so do the `prompts` that completions share while they are sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from penchant.types import SharedRows

if TYPE_CHECKING:
    from penchant.models.prompt_cache import PromptCache

IMPLEMENTATION = "penchant_shared_rows"


def attend_in_rows(
    module: nn.Module,
    query: Float[Tensor, "one Hq T D"],
    key: Float[Tensor, "one Hk S D"],
    value: Float[Tensor, "one Hk S Dv"],
    attention_mask: Tensor | None,
    shared_rows: SharedRows | None = None,
    prompts: PromptCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Spreads packed tokens into one row a sequence, attends causally within each row, and packs the results again.

    With `prompts` it is `attend_behind_prompts`; without either, transformers' own scaled-dot-product attention.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if prompts is not None:
        return attend_behind_prompts(module, query, key, value, prompts, **kwargs), None
    if shared_rows is None:
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
    sliding_window = kwargs.pop("sliding_window", None)
    if sliding_window is not None and sliding_window < shared_rows.gather.shape[1]:
        place = torch.arange(shared_rows.gather.shape[1], device=query.device)
        distance = place[:, None] - place[None, :]
        mask = ((distance >= 0) & (distance < sliding_window))[None, None]  # (1, 1, L, L)
    kwargs["is_causal"] = mask is None
    attended, _ = sdpa_attention_forward(module, spread(query), spread(key), spread(value), mask, **kwargs)
    return attended.flatten(0, 1).index_select(0, shared_rows.scatter)[None], None  # (1, T, H, D)


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
def attending_in_rows(model: nn.Module) -> Iterator[bool]:
    """Within it, the model attends by `attend_in_rows` (whether it really does is the value), behind it as before."""
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
        yield use_shared_rows(model)
    finally:
        for config, name in before:  # from the whole to its parts: setting a whole sets its parts
            config._attn_implementation = name


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

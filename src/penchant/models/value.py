"""The value head: what is expected to come, read off a policy's hidden states."""

from __future__ import annotations

from typing import Any

from torch import nn


def make_value_head(model: nn.Module) -> nn.Module:
    """A linear map from the hidden states of a transformers model to one number; it begins by expecting nothing.

    The decoder is shared with the policy, so what the head learns teaches the decoder, too.
    """
    config: Any = model.config
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    head = nn.Linear(config.get_text_config().hidden_size, 1).to(weight)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head

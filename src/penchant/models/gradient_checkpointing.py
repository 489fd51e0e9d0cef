"""Gradient checkpointing: layers keep their input only, and compute the rest again in the backward pass.

(Chen et al. 2016, arXiv:1604.06174.) transformers does it, and in training mode alone: nothing changes where a model is
scored or sampled in evaluation mode.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from penchant.errors import UserError


def set_gradient_checkpointing(model: nn.Module, wanted: bool) -> None:
    """Turns it on or off, whatever it was before.

    Raises:
        UserError: it is wanted, and the model knows no such thing.
    """
    if wanted == bool(num_checkpointed_layers(model)):
        return
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not wanted:
        _method(base, "disable")()
        return
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise UserError(
            f"gradient_checkpointing: {type(base).__name__} cannot compute its layers again; leave it out, and lower "
            "microbatch_tokens to save memory."
        )
    # Without re-entrance keyword arguments, such as the layout's, reach the second pass as they reached the first.
    _method(base, "enable")({"use_reentrant": False})
    base.disable_input_require_grads()  # what re-entrance alone needs; frozen embeddings stay without a gradient


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model, one behind the other; of any other module none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]


def num_checkpointed_layers(model: nn.Module) -> int:
    """How many layers compute their activations again; 0 where it is off."""
    return sum(bool(layer.gradient_checkpointing) for layer in layers_of(model))


def _method(base: Any, verb: str) -> Any:
    """transformers' own, which newer versions call activation checkpointing."""
    return getattr(base, f"activation_checkpointing_{verb}", None) or getattr(base, f"gradient_checkpointing_{verb}")

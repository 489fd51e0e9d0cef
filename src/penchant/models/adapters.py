"""LoRA adapters, by way of peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from penchant.errors import UserError


def add_lora(model: nn.Module, rank: int, alpha: int, target_modules: str | list[str] = "all-linear") -> nn.Module:
    """The model with a fresh LoRA adapter (Hu et al. 2021, arXiv:2106.09685) on its linear layers, base frozen.

    The adapter begins as the identity (B = 0), so the policy begins as the base model, which stays at hand as the
    reference: see `adapter_off`.

    Raises:
        UserError: the model has none of the modules.
    """
    from peft import LoraConfig, get_peft_model

    # The scoring head of a reward model is fresh: it is trained as a whole, and kept with the adapter.
    task = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=target_modules, task_type=task)
    try:
        with warnings.catch_warnings():  # peft asks transformers by a name that has changed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"lora.target_modules: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within it, the model is its base model."""
    with model.disable_adapter():  # type: ignore[operator]
        yield

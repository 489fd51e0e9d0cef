"""Loading reward models: sequence classifiers, by the same door as language models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from penchant.models import load


def load_reward_model(name: str, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """A sequence classifier with float32 weights and its tokenizer, from a folder or the hub; dropout off.

    Raises:
        UserError: there is none, it is an adapter, its scoring head is missing, or it needs code from strangers.
    """
    from transformers import AutoModelForSequenceClassification

    with load._explained(name):
        folder = load._local_folder(name)
        if load._is_adapter(folder):  # transformers would fetch its base model, unchecked
            raise ValueError("It is an adapter; merge it into its base model first.")
        with load._without_bars():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                str(folder),
                dtype=torch.float32,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
            tokenizer = load._tokenizer(folder)
        if report["missing_keys"]:
            raise ValueError(f"It is no reward model: it has no weights {min(report['missing_keys'])}.")
    load.disable_dropout(model)
    return model.to(device), tokenizer

"""Loading reward models: sequence classifiers, by the same door as language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from penchant.models import load
from penchant.models.head import at_least_float32
from penchant.models.weights import without_bars
from penchant.types import Batch

ENCODING = "penchant_encoding"
"""Mark in the config of reward models trained here: they read prompt and completion as policies do."""


def load_reward_model(name: str, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """A sequence classifier with float32 weights and its tokenizer, from a folder or the hub; dropout off.

    Raises:
        UserError: there is none, it is an adapter, its scoring head is missing, or it needs code from strangers.
    """
    with load._explained(name):
        folder = load._local_folder(name)
        model, missing = _classifier(folder)
        tokenizer = load._tokenizer(folder)
        if missing:
            raise ValueError(f"It is no reward model: it has no weights {min(missing)}.")
    load.disable_dropout(model)
    return model.to(device), tokenizer


def load_to_train_reward(name: str, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """A reward model to be trained: a language model whose head is exchanged for a fresh scoring head, or a reward
    model that goes on learning; with float32 weights, dropout off, and its tokenizer.

    The head begins as N(0, 1 / (D + 1)), as in Stiennon et al. 2020 (arXiv:2009.01325), drawn from torch's generator.

    Raises:
        UserError: there is no such model, or none of its family scores sequences.
    """
    with load._explained(name):
        folder = load._local_folder(name)
        if load._is_adapter(folder):
            raise ValueError("It is an adapter; merge it into its base model first.")
        model, missing = _classifier(folder, num_labels=1)
        if not isinstance(getattr(model, "score", None), nn.Linear) or missing - {"score.weight"}:
            raise ValueError(f"{type(model).__name__} has no plain scoring head on top of a decoder.")
        if model.config.num_labels != 1:
            raise ValueError(f"It gives {model.config.num_labels} scores, not one.")
        tokenizer = load._tokenizer(folder)
    load._require_end(tokenizer, name)
    load.disable_dropout(model)
    if missing:
        weight = model.score.weight
        nn.init.normal_(weight, std=(weight.shape[1] + 1) ** -0.5)
    setattr(model.config, ENCODING, 1)
    return model.to(device), tokenizer


def last_scores(model: nn.Module, batch: Batch) -> Float[Tensor, " S"]:
    """The score that a model with a scoring head gives each sequence of a batch, at its last token."""
    unwrapped: Any = model
    if hasattr(unwrapped, "get_base_model"):  # a peft model
        unwrapped = unwrapped.get_base_model()
    hidden = unwrapped.base_model(**batch.model_inputs, use_cache=False).last_hidden_state
    return at_least_float32(unwrapped.score(hidden.flatten(0, 1).index_select(0, batch.last_rows))).squeeze(-1)


def _classifier(folder: Path, **settings: Any) -> tuple[Any, set[str]]:
    """The sequence classifier in a folder, and the names of the weights that it lacks."""
    from transformers import AutoModelForSequenceClassification

    if load._is_adapter(folder):  # transformers would fetch its base model, unchecked
        raise ValueError("It is an adapter; merge it into its base model first.")
    with without_bars():
        model, report = AutoModelForSequenceClassification.from_pretrained(
            str(folder),
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    return model, set(report["missing_keys"])

"""From a model and a batch to the log-probabilities of its completion tokens, without building (rows, T, V).

Only rows that predict a completion token reach the output head, a chunk at a time, so the largest tensor over the
vocabulary is one chunk. Chunks are recomputed in the backward pass instead of kept.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from penchant.types import Batch, TokenLogps

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""Size of one chunk of float32 logits. Larger ones gain nothing once the product fills the device."""


def token_logps(model: nn.Module, batch: Batch, with_entropies: bool = False) -> TokenLogps:
    """Log-probabilities (and entropies) of the completion tokens of a batch, in float32 or better.

    `model` is a transformers or peft causal model, or any module that maps token ids (rows, T) to logits (rows, T, V)
    or to an object with `.logits`. A transformers model is entered at its decoder and its head is applied to the
    completion rows only; any other module builds its own logits.
    """
    head = _head_of(model, batch)
    if head is None:
        logits = _own_logits(model, batch.model_inputs).flatten(0, 1)[batch.hidden_rows]  # (M, V)
        logps, entropies = _read_off(_at_least_float32(logits), batch.target_ids, with_entropies)
        return TokenLogps(logps, entropies)

    hidden = head.decoder(**batch.model_inputs, use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, batch.hidden_rows)  # (M, D)
    rows_per_chunk = max(1, CHUNK_BYTES.get(hidden.device.type, 2**26) // (4 * head.vocab_size))
    if hidden.shape[0] <= rows_per_chunk:
        logps, entropies = head(hidden, batch.target_ids, with_entropies)
        return TokenLogps(logps, entropies)
    pieces = [
        checkpoint(head, rows, targets, with_entropies, use_reentrant=False, preserve_rng_state=False)
        for rows, targets in zip(hidden.split(rows_per_chunk), batch.target_ids.split(rows_per_chunk), strict=True)
    ]
    return TokenLogps(
        logps=torch.cat([logps for logps, _ in pieces]),
        entropies=torch.cat([entropies for _, entropies in pieces]) if with_entropies else None,
    )


def builds_full_logits(model: nn.Module) -> bool:
    """Whether the model, scored before, had to build logits for every position because its head is not a plain one."""
    return model in _HEADS and _HEADS[model] is None


@dataclass(frozen=True, eq=False)
class _Head:
    """The way from the decoder's hidden states to logits: the projection, then what some families do to its output."""

    decoder: nn.Module
    projection: nn.Module
    vocab_size: int
    scale: float
    softcap: float | None

    def __call__(
        self, hidden: Float[Tensor, "m D"], target_ids: Int[Tensor, " m"], with_entropies: bool
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"] | None]:
        return _read_off(self.logits(hidden), target_ids, with_entropies)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = _at_least_float32(self.projection(hidden))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def _read_off(
    logits: Float[Tensor, "m V"], target_ids: Int[Tensor, " m"], with_entropies: bool
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"] | None]:
    log_normalizer = logits.logsumexp(-1)
    logps = logits.gather(-1, target_ids[:, None]).squeeze(-1) - log_normalizer
    if not with_entropies:
        return logps, None
    with torch.no_grad():
        # entr(p) = -p log p is 0 at p = 0, so logits of -inf do no harm.
        return logps, torch.special.entr(logits.softmax(-1)).sum(-1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


_HEADS: WeakKeyDictionary[nn.Module, _Head | None] = WeakKeyDictionary()


def _head_of(model: nn.Module, batch: Batch) -> _Head | None:
    """The model's head, found once per model and held against the model's own logits; None where they differ.

    Families differ in what happens between hidden states and logits (scales, soft caps, tricks yet to be invented).
    A head that is not understood must never be silently wrong.
    """
    if model not in _HEADS:
        head = _find_head(model)
        _HEADS[model] = head if head is not None and _agrees(head, model, batch) else None
    return _HEADS[model]


def _find_head(model: nn.Module) -> _Head | None:
    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(unwrapped, "base_model", unwrapped)
    projection = unwrapped.get_output_embeddings() if hasattr(unwrapped, "get_output_embeddings") else None
    if decoder is unwrapped or projection is None:
        return None
    config = unwrapped.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies, Granite divides
    scale /= getattr(config, "logits_scaling", None) or 1.0
    vocab_size = projection.weight.shape[0]
    return _Head(decoder, projection, vocab_size, scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def _agrees(head: _Head, model: nn.Module, batch: Batch) -> bool:
    ids = batch.model_inputs["input_ids"][:1, :8]
    was_training = model.training
    model.eval()
    try:
        expected = _at_least_float32(model(input_ids=ids, use_cache=False).logits)
        found = head.logits(head.decoder(input_ids=ids, use_cache=False).last_hidden_state)
    except (AttributeError, TypeError):  # not the signature or the output of a causal decoder
        return False
    finally:
        model.train(was_training)
    tolerance = 1e-4 if expected.dtype != torch.float64 else 1e-9
    if torch.is_autocast_enabled(ids.device.type):
        tolerance = 2e-2
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def _own_logits(model: nn.Module, model_inputs: dict[str, Any]) -> Float[Tensor, "rows T V"]:
    """Logits of any module: called with the inputs that its forward names, or with the ids alone."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "input_ids" in parameters or takes_any:
        output = model(**model_inputs)
    else:
        output = model(model_inputs["input_ids"])
    return output if isinstance(output, Tensor) else output.logits

"""From a model and a batch to the log-probabilities of its completion tokens, without building (rows, T, V).

Only rows that predict a completion token reach the output head, a chunk at a time, so the largest tensor over the
vocabulary is one chunk. Chunks are recomputed in the backward pass instead of kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
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


def token_logps(
    model: nn.Module, batch: Batch, with_entropies: bool = False, with_collisions: bool = False
) -> TokenLogps:
    """Log-probabilities (and entropies, and log-collisions) of a batch's scored tokens, in float32 or better.

    `model` is a transformers or peft causal model, or any module that maps token ids (rows, T) to logits (rows, T, V)
    or to an object with `.logits`. A transformers model is entered at its decoder and its head is applied to the
    scored rows only; any other module builds its own logits.
    """
    head = _head_of(model, batch)
    if head is None:
        logits = _own_logits(model, batch.model_inputs).flatten(0, 1)[batch.hidden_rows]  # (M, V)
        return TokenLogps(*_read_off(_at_least_float32(logits), batch.target_ids, with_entropies, with_collisions))

    hidden = head.decoder(**batch.model_inputs, use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, batch.hidden_rows)  # (M, D)
    rows_per_chunk = max(1, CHUNK_BYTES.get(hidden.device.type, 2**26) // (4 * head.vocab_size))
    wanted = (with_entropies, with_collisions)
    if hidden.shape[0] <= rows_per_chunk:
        return TokenLogps(*head(hidden, batch.target_ids, *wanted))
    pieces = [
        checkpoint(head, rows, targets, *wanted, use_reentrant=False, preserve_rng_state=False)
        for rows, targets in zip(hidden.split(rows_per_chunk), batch.target_ids.split(rows_per_chunk), strict=True)
    ]
    return TokenLogps.join([TokenLogps(*piece) for piece in pieces])


def builds_full_logits(model: nn.Module) -> bool:
    """Whether the model, scored before, had to build logits for every position because its head is not a plain one."""
    return model in _CHECKED and not _CHECKED[model][1]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it, every part of the model is in evaluation mode; behind it, each part is in the mode it was in."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@dataclass(frozen=True)
class _Head:
    """The way from the decoder's hidden states to logits: the projection, then what some families do to its output."""

    decoder: nn.Module
    projection: nn.Module
    vocab_size: int
    scale: float
    softcap: float | None

    def __call__(
        self, hidden: Float[Tensor, "m D"], target_ids: Int[Tensor, " m"], with_entropies: bool, with_collisions: bool
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"] | None, Float[Tensor, " m"] | None]:
        return _read_off(self.logits(hidden), target_ids, with_entropies, with_collisions)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = _at_least_float32(self.projection(hidden))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def _read_off(
    logits: Float[Tensor, "m V"], target_ids: Int[Tensor, " m"], with_entropies: bool, with_collisions: bool
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"] | None, Float[Tensor, " m"] | None]:
    log_normalizer = logits.logsumexp(-1)
    logps = logits.gather(-1, target_ids[:, None]).squeeze(-1) - log_normalizer
    entropies = log_collisions = None
    with torch.no_grad():
        if with_entropies:
            # entr(p) = -p log p is 0 at p = 0, so logits of -inf do no harm.
            entropies = torch.special.entr(logits.softmax(-1)).sum(-1)
        if with_collisions:
            log_collisions = (2 * logits).logsumexp(-1) - 2 * log_normalizer
    return logps, entropies, log_collisions


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


_CHECKED: WeakKeyDictionary[nn.Module, tuple[_Head | None, bool]] = WeakKeyDictionary()
"""The head last found on each model, and whether it gave the model's own logits."""


def _head_of(model: nn.Module, batch: Batch) -> _Head | None:
    """The model's head, held once against the model's own logits; None where they differ.

    Families differ in what happens between hidden states and logits (scales, soft caps, tricks yet to be invented).
    A head that is not understood must never be silently wrong, nor one that was since replaced (a resized vocabulary,
    an adapter on the head).
    """
    head = _find_head(model)
    if model not in _CHECKED or _CHECKED[model][0] != head:
        _CHECKED[model] = (head, head is not None and _agrees(head, model, batch))
    return head if _CHECKED[model][1] else None


def _find_head(model: nn.Module) -> _Head | None:
    unwrapped: Any = model
    if hasattr(unwrapped, "get_base_model"):  # a peft model
        unwrapped = unwrapped.get_base_model()
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
    try:
        with evaluation_mode(model):
            expected = _at_least_float32(model(input_ids=ids, use_cache=False).logits)
            found = head.logits(head.decoder(input_ids=ids, use_cache=False).last_hidden_state)
    except (AttributeError, TypeError):  # not the signature or the output of a causal decoder
        return False
    tolerance = 1e-4 if expected.dtype != torch.float64 else 1e-9
    if torch.is_autocast_enabled(ids.device.type):
        tolerance = 2e-2
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def _own_logits(model: nn.Module, model_inputs: dict[str, Any]) -> Float[Tensor, "rows T V"]:
    """Logits of any module: called with the inputs that its forward names, or with the ids alone."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    takes_names = takes_any or "input_ids" in parameters
    output = model(**model_inputs) if takes_names else model(model_inputs["input_ids"])
    logits = output if isinstance(output, Tensor) else output.logits
    if logits.shape[:2] != model_inputs["input_ids"].shape:
        shapes = f"{tuple(model_inputs['input_ids'].shape)} became {tuple(logits.shape)}"
        raise ValueError(f"the model must map token ids (rows, T) to logits (rows, T, V), but {shapes}")
    return logits

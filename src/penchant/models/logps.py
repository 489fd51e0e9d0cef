"""From a model and a batch to the log-probabilities of its completion tokens, without building (rows, T, V).

Only rows that predict a completion token reach the output head, and those a chunk at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from penchant.models.head import CHUNK_BYTES, Head, ScoredRows, at_least_float32
from penchant.types import Batch, TokenLogps


def token_logps(
    model: nn.Module,
    batch: Batch,
    with_entropies: bool = False,
    with_collisions: bool = False,
    value_head: nn.Module | None = None,
) -> TokenLogps:
    """Log-probabilities (and entropies, and log-collisions) of a batch's scored tokens, in float32 or better.

    A `value_head` maps the hidden state before each scored token to a number; only transformers models have them.

    `model` is a transformers or peft causal model, or any module that maps token ids (rows, T) to logits (rows, T, V)
    or to an object with `.logits`. A transformers model is entered at its decoder and its head is applied to the
    scored rows only; any other module builds its own logits.
    """
    model_head = _head_of(model, batch)
    if model_head is None:
        if value_head is not None:
            raise ValueError("a value head needs the hidden states of a transformers model")
        logits = _own_logits(model, batch.model_inputs).flatten(0, 1)[batch.hidden_rows]  # (M, V)
        return TokenLogps(*_read_off(at_least_float32(logits), batch.target_ids, with_entropies, with_collisions))

    hidden = model_head.decoder(**batch.model_inputs, use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, batch.hidden_rows)  # (M, D)
    values = None if value_head is None else at_least_float32(value_head(hidden)).squeeze(-1)
    head, projection = model_head.head, model_head.head.projection
    if type(projection) is nn.Linear:
        weight, bias = projection.weight, projection.bias
        is_recorded = torch.is_grad_enabled()
        logps, entropies, log_collisions = ScoredRows.apply(
            hidden, weight, bias, batch.target_ids, head, with_entropies, with_collisions, is_recorded
        )
        return TokenLogps(logps, entropies, log_collisions, values)

    def score(rows: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return _read_off(head.logits(rows), target_ids, with_entropies, with_collisions)

    # With an adapter, say: any module may stand here, so its chunks are recomputed in the backward pass by autograd.
    rows_per_chunk = max(1, CHUNK_BYTES.get(hidden.device.type, 2**26) // (4 * head.vocab_size))
    pieces = [
        checkpoint(score, rows, targets, use_reentrant=False, preserve_rng_state=False)
        for rows, targets in zip(hidden.split(rows_per_chunk), batch.target_ids.split(rows_per_chunk), strict=True)
    ]
    return replace(TokenLogps.join([TokenLogps(*piece) for piece in pieces]), values=values)


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
class _ModelHead:
    """Where a model is entered for hidden states, and what lies between them and its logits."""

    decoder: nn.Module
    head: Head


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


_CHECKED: WeakKeyDictionary[nn.Module, tuple[_ModelHead | None, bool]] = WeakKeyDictionary()
"""The head last found on each model, and whether it gave the model's own logits."""


def _head_of(model: nn.Module, batch: Batch) -> _ModelHead | None:
    """The model's head, held once against the model's own logits; None where they differ.

    Families differ in what happens between hidden states and logits (scales, soft caps, tricks yet to be invented).
    A head that is not understood must never be silently wrong, nor one that was since replaced (a resized vocabulary,
    an adapter on the head).
    """
    found = _find_head(model)
    if model not in _CHECKED or _CHECKED[model][0] != found:
        _CHECKED[model] = (found, found is not None and _agrees(found, model, batch))
    return found if _CHECKED[model][1] else None


def _find_head(model: nn.Module) -> _ModelHead | None:
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
    return _ModelHead(decoder, Head(projection, scale, getattr(config, "final_logit_softcapping", None)))


@torch.no_grad()
def _agrees(found: _ModelHead, model: nn.Module, batch: Batch) -> bool:
    ids = batch.model_inputs["input_ids"][:1, :8]
    if isinstance(ids, FakeTensor):  # a plan of the memory alone: there are no numbers to compare
        return True
    try:
        with evaluation_mode(model):
            expected = at_least_float32(model(input_ids=ids, use_cache=False).logits)
            logits = found.head.logits(found.decoder(input_ids=ids, use_cache=False).last_hidden_state)
    except (AttributeError, TypeError):  # not the signature or the output of a causal decoder
        return False
    tolerance = 1e-4 if expected.dtype != torch.float64 else 1e-9
    if torch.is_autocast_enabled(ids.device.type):
        tolerance = 2e-2
    return logits.shape == expected.shape and torch.allclose(logits, expected, rtol=tolerance, atol=tolerance)


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

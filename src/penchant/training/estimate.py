"""What a run will take, from one example of it: time by the clock, memory by counting."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from penchant import distributed
from penchant.data.flat import num_tokens_of
from penchant.models.gradient_checkpointing import num_checkpointed_layers
from penchant.models.logps import evaluation_mode
from penchant.scoring.layout import Layout
from penchant.scoring.policy import Policy
from penchant.training.hardware import peak_memory_bytes
from penchant.training.optim import trainable_parameters
from penchant.types import Batch, TokenizedExample


@dataclass(frozen=True)
class Speed:
    """What one forward pass takes, and what training holds at its peak."""

    seconds: float
    """Of a forward pass, per token."""
    activation_bytes: float
    """Held for the backward pass, per token."""
    fixed_bytes: int = 0
    """Held for it however many tokens there are: under bf16, copies of the weights."""


@dataclass(frozen=True)
class Estimate:
    """Expected seconds of the whole run and bytes of memory at its peak, both rough."""

    seconds: float
    memory_bytes: int


def measure(policy: Policy, layout: Layout, examples: Sequence[TokenizedExample]) -> Speed:
    """Runs one typical example forward, and under bf16 a shorter one: what both hold does not grow with the tokens."""
    typical = examples[int(np.argsort(num_tokens_of(examples), kind="stable")[len(examples) // 2])]
    batch, num_tokens = layout.collate([typical]).to(policy.device), layout.cost([typical])
    policy.token_logps(batch)  # the first pass pays for set-up
    held, fixed = held_bytes(policy, batch), 0.0
    if policy.precision != "float32":
        shorter = _shortened(typical)
        by_shorter = held_bytes(policy, layout.collate([shorter]).to(policy.device))
        fixed = held - (held - by_shorter) / (num_tokens - layout.cost([shorter])) * num_tokens
    distributed.let_go(policy.model)
    return Speed(_seconds(policy, batch) / num_tokens, (held - fixed) / num_tokens, max(0, round(fixed)))


def estimate_run(
    policy: Policy,
    speed: Speed,
    tokens_to_learn: float,
    tokens_to_score: float,
    largest_microbatch: int,
    has_reference_copy: bool,
) -> Estimate:
    """Extrapolates from one example to a run.

    Args:
        tokens_to_learn: tokens, filling included, that go forward and backward in the whole run.
        tokens_to_score: tokens that only go forward (reference, evaluation).
        largest_microbatch: tokens of the largest microbatch: its activations make the peak.
    """
    all_bytes = sum(p.nbytes for p in policy.model.parameters())
    trained_bytes = sum(p.nbytes for p in trainable_parameters(policy.model))
    backward = 2.0 if trained_bytes == all_bytes else 1.0 + trained_bytes / all_bytes  # frozen weights need no gradient
    if num_checkpointed_layers(policy.model):
        backward += 1.0  # the second forward pass
    return Estimate(
        seconds=speed.seconds * ((1 + backward) * tokens_to_learn + tokens_to_score),
        memory_bytes=round(
            peak_memory_bytes(policy.device)  # weights, libraries and the workspace of a forward pass
            + (all_bytes if has_reference_copy else 0)
            + 3 * trained_bytes  # gradient and two moments of AdamW
            + speed.fixed_bytes
            + speed.activation_bytes * largest_microbatch
        ),
    )


def _shortened(example: TokenizedExample) -> TokenizedExample:
    """An example with about half of the tokens, of its prompt and of each completion."""
    completions = tuple(ids[: (len(ids) + 1) // 2] for ids in example.completion_ids)
    return replace(
        example, prompt_ids=example.prompt_ids[: (len(example.prompt_ids) + 1) // 2], completion_ids=completions
    )


def _seconds(policy: Policy, batch: Batch) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.no_grad():
            policy.token_logps(batch)
        if policy.device.type == "cuda":
            torch.cuda.synchronize(policy.device)
        times.append(time.perf_counter() - started)
    return min(times)


def held_bytes(policy: Policy, batch: Batch) -> int:
    """What is held for the backward pass at its peak.

    With gradient checkpointing that is what is kept of all layers, and what one of them has just computed again.
    """
    model, num_layers = policy.model, num_checkpointed_layers(policy.model)
    with evaluation_mode(model):  # behind it the model is in the mode it was in
        everything = _kept_bytes(policy, batch)
        if not num_layers:
            return everything
        model.train()
        kept = _kept_bytes(policy, batch)
    return kept + (everything - kept) // num_layers


def _kept_bytes(policy: Policy, batch: Batch) -> int:
    """What one forward pass keeps for the backward pass. The weights that it keeps too take no further memory."""
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        policy.token_logps(batch)
    return sum(kept.values())

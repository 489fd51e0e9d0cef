"""What a run will take, from one example of it: time by the clock, memory by counting."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from penchant.scoring.layout import Layout
from penchant.scoring.policy import Policy
from penchant.training.hardware import peak_memory_bytes
from penchant.training.optim import trainable_parameters
from penchant.types import Batch, TokenizedExample


@dataclass(frozen=True)
class Speed:
    """What one forward pass takes per token: seconds, and bytes kept for the backward pass."""

    seconds: float
    activation_bytes: float


@dataclass(frozen=True)
class Estimate:
    """Expected seconds of the whole run and bytes of memory at its peak, both rough."""

    seconds: float
    memory_bytes: int


def measure(policy: Policy, layout: Layout, examples: list[TokenizedExample]) -> Speed:
    """Runs one typical example forward."""
    typical = sorted(examples, key=lambda example: example.num_tokens)[len(examples) // 2]
    batch = layout.collate([typical]).to(policy.device)
    num_tokens = layout.cost([typical])
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    policy.token_logps(batch)  # the first pass pays for set-up
    # Weights are kept for the backward pass too, but they take no further memory.
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        policy.token_logps(batch)
    activation_bytes = sum(size for pointer, size in kept.items() if pointer not in weights)
    return Speed(_seconds(policy, batch) / num_tokens, activation_bytes / num_tokens)


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
    return Estimate(
        seconds=speed.seconds * ((1 + backward) * tokens_to_learn + tokens_to_score),
        memory_bytes=round(
            peak_memory_bytes(policy.device)  # weights, libraries and the workspace of a forward pass
            + (all_bytes if has_reference_copy else 0)
            + 3 * trained_bytes  # gradient and two moments of AdamW
            + speed.activation_bytes * largest_microbatch
        ),
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

"""The optimizer and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from penchant.training.step import trainable_parameters


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), weight decay on matrices only; set its rate by `set_rate`."""
    parameters = trainable_parameters(model)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=True)


def learning_rate_at(step: int, num_steps: int, peak: float, warmup_ratio: float, scheduler: str) -> float:
    """The learning rate of step `step` (1 .. num_steps).

    It rises linearly over the warm-up and reaches `peak` at its end; then it falls along a line or half a cosine and
    would reach 0 one step after the last, so that every step counts.
    """
    num_warmup = round(warmup_ratio * num_steps)
    if step <= num_warmup:
        return peak * step / num_warmup
    progress = (step - num_warmup - 1) / (num_steps - num_warmup)  # 0 at the first step behind the warm-up
    if scheduler == "linear":
        return peak * (1 - progress)
    if scheduler == "cosine":
        return peak * (1 + math.cos(math.pi * progress)) / 2
    return peak


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate

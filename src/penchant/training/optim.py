"""The optimizer."""

from __future__ import annotations

import torch
from torch import nn

from penchant.config import RunConfig
from penchant.scoring.policy import Policy


def make_optimizer(model: nn.Module, config: RunConfig, value_head: nn.Module | None = None) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) or RMSprop; set its rate by `set_rate`.

    Weight decay is decoupled from the gradient in AdamW, part of it in RMSprop, and on matrices only in both. A value
    head, which begins from nothing, has a rate of its own and no decay.
    """
    parameters = trainable_parameters(model)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if value_head is not None:
        share = config.filled_advantage().value_learning_rate / config.peak_learning_rate()
        groups.append({"params": [*value_head.parameters()], "weight_decay": 0.0, "share_of_rate": share})
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=0.0)
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.adam_beta1, config.adam_beta2), fused=True)


def trainable_parameters(model: nn.Module | Policy) -> list[nn.Parameter]:
    """The parameters that the optimizer changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("share_of_rate", 1.0)

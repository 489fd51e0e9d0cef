"""All that a run knows at the end of a step, as a checkpoint keeps it: weights, optimizer, random numbers, counters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from penchant import distributed
from penchant.config import RunConfig
from penchant.errors import UserError
from penchant.models.load import load_weights, write_model
from penchant.scoring.policy import Policy
from penchant.training.checkpoint import Checkpoint, DamagedError
from penchant.training.optim import trainable_parameters

TENSORS, FACTS = "training.safetensors", "training.json"
"""The files of a checkpoint beside those of the model."""

_VALUE_HEAD = "value_head."


@dataclass(frozen=True)
class Snapshot:
    """The state, ready to be written; as a copy, which later steps do not change, also while they run."""

    policy: Policy
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Fills a checkpoint folder: the model, or its adapter, as transformers (or peft) loads it, and the rest."""
        write_model(self.policy.model, self.policy.tokenizer, folder, self.weights)
        save_file(self.tensors, folder / TENSORS)
        (folder / FACTS).write_text(json.dumps(self.facts, indent=1), encoding="utf-8")


def take_snapshot(policy: Policy, optimizer: torch.optim.Optimizer, facts: dict[str, Any], copy: bool) -> Snapshot:
    """The state as it stands, in host memory; `facts` is anything that JSON can hold."""

    def kept(value: Tensor) -> Tensor:
        own = value.detach()
        full = distributed.whole(own)
        return full.to("cpu", copy=copy and full is own).contiguous()

    tensors = {f"optimizer.{name}": kept(value) for name, value in _moments(policy, optimizer).items()}
    if policy.value_head is not None:  # beside the model, which others load
        tensors |= {f"{_VALUE_HEAD}{name}": kept(value) for name, value in policy.value_head.state_dict().items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return Snapshot(policy, _weights(policy.model, kept), tensors, {**facts, "optimizer": type(optimizer).__name__})


def weights_to_keep(policy: Policy) -> dict[str, Tensor]:
    """The weights of the model, or of its adapter, in full and in host memory."""
    return _weights(policy.model, lambda value: distributed.whole(value.detach()).to("cpu").contiguous())


def expected_checkpoint_bytes(policy: Policy, config: RunConfig) -> int:
    """Size of a checkpoint on disk (and of a snapshot in memory) before there is one."""
    trained = sum(parameter.nbytes for parameter in trainable_parameters(policy.model))
    return trained * (3 if config.optimizer == "adamw" else 2)


def load_state(checkpoint: Checkpoint, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Brings policy, optimizer and random numbers to where they were; returns the facts.

    Moments that another kind of optimizer kept mean nothing to this one, which then begins without any.

    Raises:
        UserError: the checkpoint is of another model than the one in hand.
        DamagedError: it lacks a file.
    """
    for name in (TENSORS, FACTS):
        if name not in checkpoint.facts["files"]:
            raise DamagedError(f"{checkpoint.folder} has no {name}")
    tensors, facts = load_file(checkpoint.folder / TENSORS), read_facts(checkpoint)
    try:
        load_weights(policy.model, checkpoint.folder)
        if policy.value_head is not None:
            head = policy.value_head.state_dict()
            saved = _without_prefix(tensors, _VALUE_HEAD)
            policy.value_head.load_state_dict({name: distributed.like(saved[name], head[name]) for name in head})
        if facts["optimizer"] == type(optimizer).__name__:
            _load_moments(
                policy,
                optimizer,
                _without_prefix(tensors, "optimizer."),
            )
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{checkpoint.folder}: does not fit this model: {' '.join(str(error).split())}") from error
    torch.set_rng_state(tensors["random.cpu"])
    cuda = [tensors[f"random.cuda.{i}"] for i in range(torch.cuda.device_count()) if f"random.cuda.{i}" in tensors]
    if cuda and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    return facts


def read_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint says beside its tensors."""
    facts: dict[str, Any] = json.loads((checkpoint.folder / FACTS).read_text(encoding="utf-8"))
    return facts


def _weights(model: nn.Module, kept: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The weights that a checkpoint keeps: all, or of a model with an adapter the trained ones.

    Tied weights stay one tensor, so that they are written once.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Of two names of one tensor the state holds two views, so the parameters themselves are looked at.
    owners = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    is_adapter = hasattr(model, "peft_config")
    seen: dict[Any, Tensor] = {}
    weights = {}
    for name, value in model.state_dict().items():
        if not is_adapter or name in trained:
            owner = owners.get(name, name)
            weights[name] = seen[owner] if owner in seen else seen.setdefault(owner, kept(value))
    return weights


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _names(policy: Policy) -> dict[int, str]:
    return {id(parameter): name for name, parameter in policy.named_parameters()}


def _moments(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer keeps, by parameter: `model.layers.0.mlp.up_proj.weight:exp_avg`."""
    names = _names(policy)
    return {
        f"{names[id(parameter)]}:{key}": value
        for parameter, kept in optimizer.state.items()
        for key, value in kept.items()
    }


def _load_moments(policy: Policy, optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    names = _names(policy)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {names[id(parameter)]: place for place, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, value in moments.items():
        name, _, key = full_name.rpartition(":")
        parameter = parameters[places[name]]
        is_of_weights = value.shape == parameter.shape
        state.setdefault(places[name], {})[key] = distributed.like(value, parameter) if is_of_weights else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

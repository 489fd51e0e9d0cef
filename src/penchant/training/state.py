"""All that a run knows at the end of a step, as a checkpoint keeps it: weights, optimizer, random numbers, counters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from penchant import distributed
from penchant.config import RunConfig
from penchant.errors import UserError
from penchant.models.weights import Share, TensorFiles, load_weights, part_name, share_of, share_of_weights, write_model
from penchant.scoring.policy import Policy
from penchant.training.checkpoint import Checkpoint, DamagedError
from penchant.training.optim import trainable_parameters

TENSORS, FACTS = "training.safetensors", "training.json"
"""The files of a checkpoint beside those of the model."""

_VALUE_HEAD, _OPTIMIZER = "value_head.", "optimizer."


@dataclass(frozen=True)
class Snapshot:
    """The state, ready to be written; as a copy, which later steps do not change, also while they run.

    Of several processes each has its share of the tensors, and writes that.
    """

    policy: Policy
    weights: Share
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Fills a checkpoint folder: the model, or its adapter, as transformers (or peft) loads it, and the rest."""
        write_model(self.policy.model, self.policy.tokenizer, folder, self.weights)
        if self.tensors:
            save_file(self.tensors, folder / part_name(TENSORS, distributed.world().rank, distributed.world().size))
        if distributed.world().is_first:
            (folder / FACTS).write_text(json.dumps(self.facts, indent=1), encoding="utf-8")


def take_snapshot(policy: Policy, optimizer: torch.optim.Optimizer, facts: dict[str, Any], copy: bool) -> Snapshot:
    """The state as it stands, in host memory; `facts` is anything that JSON can hold. All processes do it together."""
    moments, size = _moments(policy, optimizer), distributed.world().size
    tensors = share_of({f"{_OPTIMIZER}{name}": value for name, value in moments.items()}, copy, size).tensors
    if distributed.world().is_first:
        if policy.value_head is not None:  # beside the model, which others load
            head = policy.value_head.state_dict()
            tensors |= {f"{_VALUE_HEAD}{name}": value.detach().to("cpu", copy=copy) for name, value in head.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    weights = share_of_weights(policy.model, copy, size)
    return Snapshot(policy, weights, tensors, {**facts, "optimizer": type(optimizer).__name__})


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
    written = [name for name in checkpoint.facts["files"] if PurePath(name).match("training*.safetensors")]
    for name, is_there in ((TENSORS, written), (FACTS, FACTS in checkpoint.facts["files"])):
        if not is_there:
            raise DamagedError(f"{checkpoint.folder} has no {name}")
    tensors, facts = TensorFiles(checkpoint.folder / name for name in written), read_facts(checkpoint)
    try:
        load_weights(policy.model, checkpoint.folder)
        if policy.value_head is not None:
            names = policy.value_head.state_dict().keys()
            policy.value_head.load_state_dict({name: tensors.read(f"{_VALUE_HEAD}{name}") for name in names})
        if facts["optimizer"] == type(optimizer).__name__:
            _load_moments(policy, optimizer, tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{checkpoint.folder}: does not fit this model: {' '.join(str(error).split())}") from error
    torch.set_rng_state(tensors.read("random.cpu"))
    kept = [f"random.cuda.{i}" for i in range(torch.cuda.device_count())]
    cuda = [tensors.read(name) for name in kept if name in tensors.names]
    if cuda and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    return facts


def read_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint says beside its tensors."""
    facts: dict[str, Any] = json.loads((checkpoint.folder / FACTS).read_text(encoding="utf-8"))
    return facts


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


def _load_moments(policy: Policy, optimizer: torch.optim.Optimizer, tensors: TensorFiles) -> None:
    names = _names(policy)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {names[id(parameter)]: place for place, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name in sorted(name for name in tensors.names if name.startswith(_OPTIMIZER)):
        name, _, key = full_name.removeprefix(_OPTIMIZER).rpartition(":")
        parameter = parameters[places[name]]
        if tensors.shape(full_name) == tuple(parameter.shape):
            value = distributed.split_as(parameter, tensors.read_like(full_name, parameter))
        else:
            value = tensors.read(full_name)
        state.setdefault(places[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

"""What memory a run will take in each of several processes, counted before a single weight is loaded.

The model is built of tensors without contents, and a training step's forward pass is made with them: what autograd
would keep is known to the byte on a machine that could not hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from penchant.config import RunConfig
from penchant.data import loader
from penchant.errors import UserError
from penchant.losses import build_loss
from penchant.models.adapters import add_lora
from penchant.models.attention import use_attend
from penchant.models.gradient_checkpointing import layers_of, set_gradient_checkpointing
from penchant.models.head import CHUNK_BYTES
from penchant.models.load import empty_model, load_tokenizer
from penchant.scoring.layout import PACKED, PADDED, PREFIX_SHARED, Layout
from penchant.scoring.policy import Policy, Precision
from penchant.scoring.reward import RewardLearner
from penchant.training import hardware
from penchant.training.estimate import held_bytes
from penchant.training.logger import RunLog
from penchant.training.optim import trainable_parameters
from penchant.training.schedule import num_steps
from penchant.training.setup import reference_kind_of, tokens_at_once
from penchant.training.source import DataSource
from penchant.types import Batch, TokenizedExample

_STEPS_LOOKED_AT = 50


@dataclass(frozen=True)
class Plan:
    """What each process holds at the peak of a run, in bytes by kind, and what it has to do."""

    processes: int
    memory: dict[str, int]
    num_parameters: int
    num_trained: int
    steps: int
    layout: str
    tokens_at_once: int
    """In the largest microbatch of a process."""
    tokens: float
    """That the whole run learns from, over all processes, counted as `tokens_per_s` counts them."""

    @property
    def memory_bytes(self) -> int:
        """Of all kinds together."""
        return sum(self.memory.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "memory_bytes": self.memory_bytes}


def plan(config: RunConfig, processes: int, device: torch.device, precision: Precision, log: RunLog) -> list[Plan]:
    """What the run of a run file needs in so many processes, and in fewer: 1, 2, 4, ... up to `processes`.

    Raises:
        UserError: model or data cannot be read, or the run samples its own data.
    """
    if config.is_online:
        raise UserError(f"method: {config.method_name()} makes its data while it runs; plan the same with method: dpo.")
    loss = build_loss(config.loss_settings())
    tokenizer = load_tokenizer(config.model)
    examples = DataSource(config, loss).datasets(tokenizer, log).train.examples
    numbers = sorted({*(2**power for power in range(processes.bit_length())), processes})
    with _without_contents():
        model = empty_model(config.model, is_reward="scores" in loss.needs)
        layout = _layout_for(model, config.layout)
    num_all, lora = sum(parameter.numel() for parameter in model.parameters()), config.lora
    if lora.rank:  # peft exchanges tensors on the way, which those without contents do not bear; an adapter is small
        model = add_lora(model, lora.rank, lora.alpha or 2 * lora.rank, lora.target_modules)
    set_gradient_checkpointing(model, config.gradient_checkpointing)
    kind = RewardLearner if "scores" in loss.needs else Policy
    policy = kind(model, tokenizer, precision)
    return [_plan_for(number, config, policy, num_all, layout, examples, device) for number in numbers]


def _plan_for(
    processes: int,
    config: RunConfig,
    policy: Policy,
    num_all: int,
    layout: Layout,
    examples: Sequence[TokenizedExample],
    device: torch.device,
) -> Plan:
    steps = num_steps(config, len(examples))
    drawn = list(islice(loader.draws(examples, config.batch_size, config.seed), min(steps, _STEPS_LOOKED_AT)))
    most = config.microbatch_tokens or hardware.default_microbatch_tokens(device)
    parts = [
        part
        for draw in drawn
        for part in layout.parts(draw.examples, tokens_at_once(layout, draw.examples, most, processes))
    ]
    largest = max(parts, key=layout.cost)
    batch = layout.collate(largest)
    trained = trainable_parameters(policy.model)
    memory = {
        **({"libraries": hardware.peak_memory_bytes(device)} if device.type == "cpu" else {}),
        **_kept_between_steps(config, policy.model, trained, processes),
        **_held_in_a_step(policy, trained, batch, processes, device),
    }
    return Plan(
        processes=processes,
        memory={name: size for name, size in memory.items() if size},
        num_parameters=num_all,
        num_trained=sum(parameter.numel() for parameter in trained),
        steps=steps,
        layout=layout.name,
        tokens_at_once=layout.cost(largest),
        tokens=sum(one.num_scored_tokens for draw in drawn for one in draw.examples) / len(drawn) * steps,
    )


def _kept_between_steps(
    config: RunConfig, model: nn.Module, trained: Sequence[nn.Parameter], processes: int
) -> dict[str, int]:
    """Weights, gradients and moments; an adapter's are the same in every process, all others are split."""
    all_bytes = sum(parameter.nbytes for parameter in model.parameters())
    own, split = sum(parameter.nbytes for parameter in trained), 1 if config.lora.rank else processes
    frozen = all_bytes - own
    kind = reference_kind_of(config, is_used="reference" in build_loss(config.loss_settings()).needs)
    return {
        "weights": frozen // processes + own // split,
        "gradients": own // split,
        "optimizer": (2 if config.optimizer == "adamw" else 1) * own // split,
        "reference": (all_bytes if kind in ("copy", "model") else 0) // processes,
    }


def _held_in_a_step(
    policy: Policy, trained: Sequence[nn.Parameter], batch: Batch, processes: int, device: torch.device
) -> dict[str, int]:
    with _without_contents():
        activations = held_bytes(policy, batch)
    head = min(CHUNK_BYTES.get(device.type, 2**26), 4 * len(batch.target_ids) * _vocabulary(policy.model))
    if processes == 1:
        return {"activations": activations, "head": 2 * head}
    blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in layers_of(policy.model)]
    every = list(policy.model.parameters())
    rest = sum(parameter.nbytes for parameter in every) - sum(blocks)
    block = max(blocks, default=0)
    # What is outside of the blocks stays whole from forward to backward; of the blocks one is at work, one is fetched.
    # A unit's gradient is whole before it is summed, for which it is copied.
    gradients = rest + block + max(rest, block) if len(trained) == len(every) else 0
    return {"activations": activations, "head": 2 * head, "gathered": rest + 2 * block + gradients}


def _layout_for(model: Any, wanted: str) -> Layout:
    """The layout that a run will choose if it proves exact."""
    if wanted == "padded" or not use_attend(model):
        return PADDED
    return PACKED if wanted == "packed" else PREFIX_SHARED


def _vocabulary(model: Any) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size


@contextmanager
def _without_contents() -> Iterator[None]:
    """Within it tensors have shapes and no contents."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield

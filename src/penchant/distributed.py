"""Several processes that work as one: who they are, how work is shared out, and what they tell each other.

torchrun starts them and tells them by the environment who they are. Weights are sharded over them by PyTorch's FSDP2
(`fully_shard`), which gathers a block's weights when it is needed and sums its gradient where it is kept. All else is
small: log-probabilities of tokens, a handful of flags. So every process knows every batch, computes its share of it,
and is told the rest; what follows from the whole batch (losses, metrics) all of them compute alike. Nothing here needs
a process group where there is one process.

Sums are the only way of telling: a process adds zeros where it knows nothing, which changes no bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")

PATIENCE = timedelta(minutes=float(os.environ.get("PENCHANT_PATIENCE_MINUTES", "30")))
"""How long a process waits for the others before it gives up: longer than the longest thing that one does alone."""


@dataclass(frozen=True)
class World:
    """This process among those that work together."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.rank == 0


_joined: list[World] = []
"""Filled within `joined`, so that a process group of somebody else's means nothing here."""


def world() -> World:
    """Who this process is; the only one outside of `joined`."""
    return _joined[-1] if _joined else World()


def num_started() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[World]:
    """Within it the processes that torchrun has started know each other; without torchrun nothing happens."""
    if num_started() == 1 or _joined:
        yield world()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    _joined.append(World(dist.get_rank(), dist.get_world_size()))
    try:
        yield world()
    finally:
        _joined.clear()
    # Behind an error nobody says goodbye: the others may be waiting, and torchrun ends them.
    dist.destroy_process_group()


def sum_of(values: Tensor) -> Tensor:
    """The sum over all processes, everywhere; changes `values`."""
    if _is_joined():
        dist.all_reduce(values)
    return values


def any_of(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Of each flag whether any process has raised it."""
    return [count > 0 for count in sum_of(torch.tensor(flags, dtype=torch.int32, device=device)).tolist()]


def told_by_first(value: T) -> T:
    """What the first process says, everywhere; any value of Python's."""
    if not _is_joined():
        return value
    told: list[Any] = [value]
    dist.broadcast_object_list(told)
    return told[0]


def first_alone(work: Callable[[], T]) -> T:
    """Does `work` in the first process, then in the others, which find done (and kept) what it has done.

    Where it fails in the first one, the others do it as well, and fail likewise.
    """
    if world().is_first:
        try:
            return work()
        finally:
            _wait_for_all()
    _wait_for_all()
    return work()


@dataclass(frozen=True)
class Turn:
    """A piece of work that this process does: its place among all, and whether it counts."""

    place: int
    counts: bool


def turns(number: int) -> list[Turn]:
    """This process's share in `number` pieces of work.

    Sharded weights are gathered together, so all processes take equally many turns: one that has no piece left does
    the last one again, which does not count.
    """
    me, rounds = world(), -(-number // world().size)
    return [Turn(min(place, number - 1), place < number) for place in range(me.rank, rounds * me.size, me.size)]


def gathered(turns: Sequence[Turn], values: Sequence[Sequence[Tensor]], lengths: Sequence[int]) -> list[list[Tensor]]:
    """What came of all pieces of work, where each process has the values of its turns.

    A piece has as many tensors as any other, of shape (lengths[place],).
    """
    if not _is_joined():
        return [[*own] for own in values]
    first, starts = values[0], [0, *accumulate(lengths)]
    told = torch.zeros(len(first), starts[-1], dtype=first[0].dtype, device=first[0].device)
    for turn, own in zip(turns, values, strict=True):
        if turn.counts:
            told[:, starts[turn.place] : starts[turn.place + 1]] = torch.stack([*own])
    return [[*piece.unbind()] for piece in sum_of(told).split(list(lengths), dim=1)]


def shard(root: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Splits the weights over all processes: each block as one unit, what is left with the root.

    Only the root's forward finds embedding and head whole, so it must be what is called. A backward pass leaves the sum
    of all processes' gradients, so losses are to be divided by what all of them have together.
    """
    if not _is_joined():
        return
    device = next(root.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for unit in (*blocks, root):
        fully_shard(unit, mesh=mesh)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def let_go(root: nn.Module) -> None:
    """Behind a pass that no backward pass follows: what the root keeps whole for one is let go.

    Else its parameters would be another set of tensors than those that an optimizer changes.
    """
    if isinstance(root, FSDPModule):
        root.reshard()


@contextmanager
def gathered_weights(root: nn.Module) -> Iterator[None]:
    """Within it the weights that a sharded root keeps for itself are whole, so that its parts may be called."""
    if not isinstance(root, FSDPModule):
        yield
        return
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


def rows_here(tensor: Tensor) -> slice:
    """Which rows (along dimension 0) of a tensor this process keeps; all of one that is not sharded."""
    if not isinstance(tensor, DTensor):
        return slice(0, len(tensor) if tensor.ndim else 1)
    most = -(-len(tensor) // world().size)  # as FSDP2 cuts: equal parts, the last ones smaller or empty
    begin = min(world().rank * most, len(tensor))
    return slice(begin, min(begin + most, len(tensor)))


def here(tensor: Tensor) -> Tensor:
    """What this process keeps of a tensor: `rows_here` of a sharded one, all of any other."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_of(tensor: Tensor, count: int) -> Tensor:
    """Those of a tensor's first `count` numbers that this process keeps, flat."""
    rows, own = rows_here(tensor), here(tensor)
    before = rows.start * (tensor.numel() // max(1, len(tensor) if tensor.ndim else 1))
    return own.flatten()[: max(0, count - before)]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in full, in every process; any other one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that all processes have in full, sharded as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return value
    here = value.to(parameter.device)
    return distribute_tensor(here, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _is_joined() -> bool:
    return world().size > 1


def _wait_for_all() -> None:
    if _is_joined():
        dist.barrier()

"""Several processes that work as one: who they are, how work is shared out, and what they tell each other.

torchrun starts them and tells them by the environment who they are. Weights are sharded over them by PyTorch's FSDP2
(`fully_shard`), which gathers a block's weights when it is needed and sums its gradient where it is kept. All else is
small: log-probabilities of tokens, a handful of flags. So every process knows every batch, computes its share of it,
and is told the rest; what follows from the whole batch (losses, metrics) all of them compute alike. What is called here
all processes call, in the same order. Nothing needs a process group where there is one process.
"""

from __future__ import annotations

import itertools
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from penchant.disk import ALONE, Part, begin_together
from penchant.errors import UserError

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


_GROUPS = itertools.count()
"""Numbers the process groups of this process, one after the other."""

_joined: list[World] = []
"""Filled within `joined`, so that a process group of somebody else's means nothing here."""


def world() -> World:
    """Who this process is; the only one outside of `joined`."""
    return _joined[-1] if _joined else World()


def num_restarts() -> int:
    """How often torchrun has started all processes again, because one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


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
    # The store of torchrun's outlives an attempt, and with it the addresses of processes and groups that are gone.
    store, rank, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
    attempt = PrefixStore(f"attempt-{num_restarts()}-of-{size}-group-{next(_GROUPS)}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=PATIENCE)
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


def part_of_all(folder: Path) -> Part:
    """This process's part in filling a folder, under a word that all agree on; they ask together."""
    if not _is_joined():
        return ALONE
    word = uuid.uuid4().hex[:8]
    if world().is_first:
        with suppress(OSError):  # whoever is to fill it will find that it is not there
            begin_together(folder, word)
    until = time.monotonic() + PATIENCE.total_seconds()
    return Part(world().rank, world().size, told_by_first(word), until)


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


def told_by_all(value: T) -> list[T]:
    """What each process says, in their order, everywhere; any value of Python's."""
    if not _is_joined():
        return [value]
    told: list[Any] = [None] * world().size
    dist.all_gather_object(told, value)
    return told


def by_first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, everywhere; or the UserError that it raises, everywhere."""
    done: T | None = None
    error: UserError | None = None
    if world().is_first:
        try:
            done = work()
        except UserError as raised:
            error = raised
    done, error = told_by_first((done, error))
    if error is not None:
        raise error
    return done  # type: ignore[return-value]


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


def has_lost_others(error: BaseException) -> bool:
    """Whether an error says that another process, or the way to it, is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


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


class _Root(nn.Module):
    """A model with one way in: what of it is sharded is whole within forward, and gradients find their way back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


_ROOT = "_penchant_root"
"""The attribute of a sharded model that is the way into it."""


def shard(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Splits a model's weights over all processes: each block as one unit, what is left as another.

    They are moved to `device` unit by unit. From here on the model is used `within` alone. A backward pass leaves the
    sum of all processes' gradients, so losses are to be divided by what all of them have together. Nothing happens
    where there is one process, or where the model is sharded already.
    """
    if not _is_joined() or _root_of(model) is not None:
        return
    mesh, root = init_device_mesh(device.type, (world().size,)), _Root(model)
    for unit in (*blocks, root):
        fully_shard(unit, mesh=mesh)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo multiplies nothing while it sums
    vars(model)[_ROOT] = root  # past what makes it a submodule: it holds the model itself


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are split over all processes."""
    return _root_of(model) is not None


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of a unit of shards, the one that it had before."""
    kind = type(module)
    return kind.__mro__[2] if isinstance(module, FSDPModule) else kind


def is_hook_of_shards(hook: Callable[..., Any]) -> bool:
    """Whether a hook is one of those by which FSDP2 gathers weights."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def within(model: nn.Module, work: Callable[[], T]) -> T:
    """Does `work`, which calls a model or parts of it: all processes at once, if the model is sharded."""
    root = _root_of(model)
    if root is None:
        return work()
    done: T = root(work)
    if not torch.is_grad_enabled():
        # No backward pass will let go what the root keeps whole for one. Else its parameters would be another set of
        # tensors than those that an optimizer changes.
        root.reshard()  # type: ignore[operator]
    return done


def let_go(model: nn.Module) -> None:
    """Behind a pass with gradients that no backward pass follows: what is still whole of a sharded model is let go."""
    for unit in _units_of(model):
        unit.reshard()


@contextmanager
def all_weights(model: nn.Module) -> Iterator[None]:
    """Within it every process holds all of a model's weights, and uses it by itself; takes the memory for them."""
    units = _units_of(model)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(not isinstance(unit, _Root), recurse=False)


def replicate_trained(model: nn.Module) -> None:
    """Takes what is trained of a sharded model out of the shards: every process has all of it, alike.

    For an adapter on a frozen model, whose few weights are not worth splitting; `sum_gradients` belongs to it.
    """
    if not is_sharded(model):
        return
    for part in model.modules():
        for name, own in list(part.named_parameters(recurse=False)):
            if own.requires_grad:
                full = whole(own.detach()).clone()
                dist.broadcast(full, 0)
                setattr(part, name, nn.Parameter(full))


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Behind the backward passes of all processes: sums the gradients of what every process has all of."""
    own = [one for one in parameters if not isinstance(one, DTensor)] if _is_joined() else []
    for one in own:  # a gradient that one process lacks another one may have
        one.grad = torch.zeros_like(one) if one.grad is None else one.grad
    if own:
        flat = sum_of(torch.cat([one.grad.flatten() for one in own]))  # type: ignore[union-attr]
        for one, summed in zip(own, flat.split([one.numel() for one in own]), strict=True):
            one.grad = summed.view_as(one)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients so that their norm together is at most `max_norm`; the norm before, in every process."""
    kept = [here(one.grad) for one in parameters if one.grad is not None]
    if not any(isinstance(one, DTensor) for one in parameters):
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    is_split = torch.tensor([isinstance(one, DTensor) for one in parameters if one.grad is not None])
    squares = torch.stack([own.norm().square() for own in kept])
    is_split = is_split.to(squares.device)
    norm = (sum_of((squares * is_split).sum()) + (squares * ~is_split).sum()).sqrt()
    for own in kept:
        own.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def is_split(tensor: Tensor) -> bool:
    """Whether each process keeps a part of a tensor."""
    return isinstance(tensor, DTensor)


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


def split_as(wanted: Tensor, rows: Tensor) -> Tensor:
    """A tensor that is sharded as `wanted` is, from the rows of it that each process keeps."""
    if not isinstance(wanted, DTensor):
        return rows
    own = rows.to(wanted.device)
    mesh, placements = wanted.device_mesh, wanted.placements
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=wanted.shape, stride=wanted.stride())


def _root_of(model: nn.Module) -> _Root | None:
    """The way into a sharded model, which adapters may have wrapped meanwhile."""
    return next((vars(part)[_ROOT] for part in model.modules() if _ROOT in vars(part)), None) if _is_joined() else None


def _units_of(model: nn.Module) -> list[FSDPModule]:
    """What of a sharded model is gathered at a time."""
    root = _root_of(model)
    return [] if root is None else [part for part in root.modules() if isinstance(part, FSDPModule)]


def _is_joined() -> bool:
    return world().size > 1


def _wait_for_all() -> None:
    if _is_joined():
        dist.barrier()

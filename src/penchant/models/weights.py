"""Weights in safetensors files, read by rows: what a process does not keep of them never enters its memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from penchant import distributed
from penchant.disk import ALONE, Part, give_part, new_folder, take_parts
from penchant.models.trust import refuse_harm


class TensorFiles:
    """The tensors in some safetensors files, by name."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Opens the files and reads their headers.

        Raises:
            SafetensorError, OSError: one of them is no such file.
        """
        self._files: dict[str, Any] = {}
        for path in paths:
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor in full."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def read_like(self, name: str, wanted: Tensor) -> Tensor:
        """What this process keeps of a tensor that is split over processes as `wanted` is."""
        if not distributed.is_split(wanted):
            return self.read(name)
        rows: Tensor = self._files[name].get_slice(name)[distributed.rows_here(wanted)]
        return rows


def weight_files(folder: Path) -> TensorFiles:
    """Those of a transformers model: `model.safetensors`, or several with an index."""
    return TensorFiles(sorted(folder.glob("model*.safetensors")))


def fit(files: TensorFiles, model: nn.Module) -> bool:
    """Whether they are the model's weights as it names them, every one of them, in their shapes.

    Of weights that are tied one name suffices. Newer transformers may also store weights otherwise than it uses them,
    an expert at a time.
    """
    shapes, wanted = {name: files.shape(name) for name in files.names}, _tensors(model).values()
    found = all(any(shapes.get(name) == tuple(tensor.shape) for name in names) for names, tensor in wanted)
    known = {name for names, _ in wanted for name in names}
    return found and shapes.keys() <= known


@torch.no_grad()
def fill(model: nn.Module, files: TensorFiles) -> None:
    """Copies into the model, sharded or not, what `fit` has found to be its weights."""
    for names, tensor in _tensors(model).values():
        name = next(name for name in names if name in files.names)
        distributed.here(tensor).copy_(files.read_like(name, tensor))


@dataclass(frozen=True)
class Share:
    """This process's share of some tensors, whole and in host memory, and who has which."""

    tensors: dict[str, Tensor]
    owners: dict[str, int]
    among: int
    """How many processes have one."""
    second_names: set[str]
    """Further names of tensors that have one already: tied weights."""
    num_bytes: int
    """Of all shares together."""


@torch.no_grad()
def share_of(tensors: Mapping[str, Tensor], copy: bool, among: int) -> Share:
    """Shares tensors out in their order, about as many bytes to each process, or all to the first of them `among` 1.

    Sharded ones are put together one at a time, so all processes call it together. A tensor with two names goes to one
    process, under both. With `copy` none shares memory with what it was made from.
    """
    me, total, before = distributed.world(), sum(one.nbytes for one in tensors.values()), 0
    own: dict[str, Tensor] = {}
    owners: dict[str, int] = {}
    first_names: dict[int, str] = {}
    for name, tensor in tensors.items():
        first = first_names.setdefault(id(tensor), name)
        if first != name:
            owners[name] = owners[first]
            own |= {name: own[first]} if first in own else {}
            continue
        owners[name] = before * among // max(total, 1)
        before += tensor.nbytes
        part = tensor.detach()
        full = distributed.whole(part)
        if owners[name] == me.rank:
            own[name] = full.to("cpu", copy=copy and full is part).contiguous()
    return Share(own, owners, among, owners.keys() - first_names.values(), before)


def share_of_weights(model: nn.Module, copy: bool, among: int) -> Share:
    """This process's share of the weights that a checkpoint keeps: all, or of a model with an adapter the trained ones.

    Weights that transformers stores otherwise than it uses them, and those of an adapter, all go to the first process.
    """
    kept = model.state_dict(keep_vars=True)
    if hasattr(model, "peft_config"):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return share_of({name: value for name, value in kept.items() if name in trained}, copy, 1)
    return share_of(kept, copy, among if among > 1 and _is_stored_as_used(model) else 1)


def part_name(name: str, number: int, of: int) -> str:
    """The name of a file of which there are several: `model-00002-of-00004.safetensors`."""
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{number + 1:05}-of-{of:05}{dot}{suffix}" if of > 1 else name


def write_share(model: Any, weights: Share, folder: Path) -> None:
    """Writes a share of a transformers model's weights; the first process also writes index and settings.

    Of the model itself it reads the settings alone, for a step may be going on with it meanwhile.
    """
    me, file_of = distributed.world(), {}
    ignored = {*(getattr(model, "_keys_to_ignore_on_save", None) or ()), *weights.second_names}
    for name, owner in weights.owners.items():
        if name not in ignored:
            file_of[name] = part_name("model.safetensors", owner, weights.among)
    own = {name: tensor for name, tensor in weights.tensors.items() if name in file_of}
    if own:
        save_file(own, folder / part_name("model.safetensors", me.rank, weights.among), metadata={"format": "pt"})
    if me.is_first:
        index = {"metadata": {"total_size": weights.num_bytes}, "weight_map": dict(sorted(file_of.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)


def save_model(model: Any, tokenizer: Any, folder: Path, part: Part = ALONE) -> None:
    """Writes model (or peft adapter) and tokenizer so that transformers (or peft) loads them; safetensors only.

    The folder appears whole or not at all. Several processes do it together, each with its `part`.
    """
    weights = share_of_weights(model, copy=False, among=part.of)

    def fill(own: Path) -> None:
        write_model(model, tokenizer, own, weights)
        for path in (own, *own.glob("[!.]*")):  # not what other processes are filling
            path.chmod(0o755 if path.is_dir() else 0o644)  # what libraries write may be private

    if part.number:
        give_part(folder, part, fill)
        return
    with new_folder(folder, part) as unfinished:
        fill(unfinished)
        take_parts(unfinished, part)


def write_model(model: Any, tokenizer: Any, folder: Path, weights: Share) -> None:
    """Writes into an existing folder this process's share of what `save_model` writes."""
    is_first = distributed.world().is_first
    if weights.among > 1:
        write_share(model, weights, folder)
    elif is_first:
        with without_bars():
            model.save_pretrained(folder, state_dict=dict(weights.tensors))  # transformers empties what it is given
    if is_first:
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Copies the weights that `write_model` wrote into the model (or adapter) in hand, to the bit.

    Raises:
        KeyError, ValueError, RuntimeError: they are those of another model.
        UserError: the folder asks for code, as none that `write_model` wrote does.
    """
    refuse_harm(folder)
    if hasattr(model, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        found = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        if found.unexpected_keys:
            raise ValueError(f"it holds {found.unexpected_keys[0]}, which the model does not have")
        return
    files = weight_files(folder)
    if fit(files, model):
        fill(model, files)
        return
    with without_bars():
        own_dtype = next(model.parameters()).dtype
        saved, report = type(model).from_pretrained(  # type: ignore[attr-defined]
            folder, dtype=own_dtype, use_safetensors=True, output_loading_info=True
        )
    if report["missing_keys"]:  # transformers has made them up
        raise ValueError(f"it lacks {min(report['missing_keys'])}")
    weights = dict(saved.named_parameters())
    for name, parameter in model.named_parameters():
        distributed.here(parameter).copy_(weights[name][distributed.rows_here(parameter)])


@contextmanager
def without_bars() -> Iterator[None]:
    """Within it, transformers shows no bars of its own for work of a second."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _is_stored_as_used(model: Any) -> bool:
    """Whether the names in transformers' files are those of the parameters."""
    from transformers.core_model_loading import revert_weight_conversion

    if not hasattr(model, "save_pretrained"):
        return False
    used = {name: torch.empty(value.shape, device="meta") for name, value in model.state_dict().items()}
    stored: dict[str, Tensor] = revert_weight_conversion(model, dict(used))
    return stored.keys() == used.keys()


def _tensors(model: nn.Module) -> Mapping[int, tuple[list[str], Tensor]]:
    """Parameters and buffers that a model keeps on the disk, each once with all its names."""
    kept = model.state_dict(keep_vars=True)
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in kept.items():
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return found

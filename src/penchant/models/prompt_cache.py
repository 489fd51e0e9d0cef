"""A cache for completions that share prompts: each prompt's keys and values once, however many completions it has.

The rows of the model's batch are completions, all equally far behind their prompts; rows of one prompt stand together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache

PREFILL_TOKENS = 8192
"""Prompt tokens computed at once: enough to fill any device, few enough for the memory of their activations."""


class PromptCache(Cache):
    """Keys and values of P prompts (layer by layer, padded on the right) and of R rows behind them.

    `owners[r]` is the prompt of row r. `update` is what the model calls; `penchant.models.attention` asks for the rest.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], lengths: Sequence[int], hides_window: bool = False) -> None:
        super().__init__(layers=[])
        self.hides_window = hides_window
        """The model has a window: an attention layer that does not tell its own cannot be served."""
        self.num_own = 0
        self._layers = layers
        self._lengths = torch.tensor(lengths, device=layers[0][0].device)
        self._own: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        self._masks: dict[int | None, Tensor | None] = {}
        self._arrange(list(range(len(lengths))))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores one token of every row; the keys and values of all that stand behind the prompts."""
        own = self._own[layer_idx]
        if own is None or own[0].shape[2] == self.num_own:
            own = self._own[layer_idx] = (
                _with_room(own and own[0], key_states, 2 * self.num_own),
                _with_room(own and own[1], value_states, 2 * self.num_own),
            )
        for buffer, states in zip(own, (key_states, value_states), strict=True):
            buffer[:, :, self.num_own] = states[:, :, 0]
        return own[0][:, :, : self.num_own + 1], own[1][:, :, : self.num_own + 1]

    def step_done(self) -> None:
        """Every layer has stored its token."""
        self.num_own += 1
        self._masks.clear()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the next one, of the longest row."""
        return int(self._lengths.max()) + self.num_own

    def positions(self) -> Int[Tensor, "R 1"]:
        """Where the next token of each row stands in its sequence."""
        return self._lengths[self._owner_ids][:, None] + self.num_own

    def prompt_states(self, layer_idx: int) -> tuple[Float[Tensor, "P Hk L D"], Float[Tensor, "P Hk L Dv"]]:
        """Keys and values of the prompts in one layer."""
        return self._layers[layer_idx]

    def hidden(self, window: int | None) -> Bool[Tensor, "P 1 1 L"] | None:
        """Places of the prompts that a row may not see: padding, and what its window has left; None: it sees all."""
        if window not in self._masks:
            places = torch.arange(self._layers[0][0].shape[2], device=self._lengths.device)
            hidden = places >= self._lengths[:, None]
            if window is not None:
                hidden |= places <= self._lengths[:, None] + self.num_own - window
            self._masks[window] = hidden[:, None, None] if hidden.any() else None
        return self._masks[window]

    def by_prompt(self, rows: Float[Tensor, "R Hk g X"]) -> Float[Tensor, "P Hk Wg X"]:
        """What belongs to rows, put together for each prompt; W is the largest number of rows of a prompt."""
        if self._slots is not None:
            rows = rows.index_select(0, self._slots)
        heads, group, size = rows.shape[1:]
        return rows.view(-1, self._width, heads, group, size).transpose(1, 2).flatten(2, 3)

    def by_row(self, prompts: Float[Tensor, "P Hk Wg X"]) -> Float[Tensor, "R Hk g X"]:
        """The way back from `by_prompt`."""
        rows = prompts.unflatten(2, (self._width, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self._slots is None else rows.index_select(0, self._places)

    def select(self, rows: list[int]) -> None:
        """Makes row n a copy of what was row `rows[n]` (ascending); prompts without rows leave."""
        if rows == list(range(len(self.owners))):
            return
        chosen = torch.tensor(rows, device=self._lengths.device)
        for layer, own in enumerate(self._own):
            if own is not None:
                self._own[layer] = (_taken(own[0], chosen, self.num_own), _taken(own[1], chosen, self.num_own))
        owners = [self.owners[row] for row in rows]
        staying = sorted(set(owners))
        if len(staying) < len(self._lengths):
            kept = torch.tensor(staying, device=self._lengths.device)
            self._lengths = self._lengths[kept]
            longest = max(1, int(self._lengths.max()))
            for layer, (keys, values) in enumerate(self._layers):
                self._layers[layer] = (keys[kept, :, :longest], values[kept, :, :longest])
        self._arrange([staying.index(owner) for owner in owners])

    def _arrange(self, owners: list[int]) -> None:
        """Gives every prompt as many slots as the prompt with the most rows needs, and notes who stands in which."""
        self.owners = owners
        self._masks.clear()
        device = self._lengths.device
        counts = [owners.count(prompt) for prompt in range(len(self._lengths))]
        self._width = max(counts)
        self._owner_ids = torch.tensor(owners, device=device)
        self._slots = self._places = None
        if min(counts) < self._width:
            firsts = [owners.index(prompt) for prompt in range(len(counts))]
            self._places = torch.tensor(
                [owner * self._width + row - firsts[owner] for row, owner in enumerate(owners)], device=device
            )
            # Slots that nobody needs repeat the first row; `by_row` never asks for them.
            self._slots = torch.zeros(len(counts) * self._width, dtype=torch.long, device=device)
            self._slots[self._places] = torch.arange(len(owners), device=device)


def prefill(decoder: nn.Module, prompts: Sequence[Sequence[int]], hides_window: bool = False) -> PromptCache:
    """The cache of prompts in ascending order of length, computed with the model's own attention.

    Raises:
        ValueError: the decoder keeps something else than keys and values.
    """
    device = next(decoder.parameters()).device
    longest = max(1, *(len(ids) for ids in prompts))
    layers: list[tuple[Tensor, Tensor]] = []
    for start, end in _parts(prompts):
        width = max(1, *(len(ids) for ids in prompts[start:end]))
        # Padding stands on the right, where no token of a prompt sees it; what it leaves behind is hidden.
        ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in prompts[start:end]], device=device)
        cache = DynamicCache()  # without a config, so that layers with a window keep every token too
        decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        for number, layer in enumerate(cache.layers):
            if layer.keys is None or layer.keys.shape[2] != width:
                raise ValueError("a layer did not store its keys")
            if number == len(layers):
                layers.append((_empty(layer.keys, len(prompts), longest), _empty(layer.values, len(prompts), longest)))
            layers[number][0][start:end, :, :width] = layer.keys
            layers[number][1][start:end, :, :width] = layer.values
            layer.keys = layer.values = None
    if not layers:
        raise ValueError("the model stored no keys")
    return PromptCache(layers, [len(ids) for ids in prompts], hides_window)


def _parts(prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Cuts prompts, ascending in length, where the padded tokens of a part would grow too many."""
    cuts = [0]
    for number, ids in enumerate(prompts):
        if number > cuts[-1] and (number + 1 - cuts[-1]) * len(ids) > PREFILL_TOKENS:
            cuts.append(number)
    yield from pairwise([*cuts, len(prompts)])


def _empty(like: Tensor, rows: int, places: int) -> Tensor:
    """Room for states, in the type that the products take, so that autocast need not convert them for each token."""
    dtype = like.dtype
    if torch.is_autocast_enabled(like.device.type) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(like.device.type)
    return torch.zeros(rows, like.shape[1], places, like.shape[3], dtype=dtype, device=like.device)


def _with_room(own: Tensor | None, like: Tensor, places: int) -> Tensor:
    grown = _empty(like, like.shape[0], max(16, places))
    if own is not None:
        grown[:, :, : own.shape[2]] = own
    return grown


def _taken(own: Tensor, rows: Tensor, num_own: int) -> Tensor:
    taken = own.new_zeros(len(rows), *own.shape[1:])
    taken[:, :, :num_own] = own[:, :, :num_own].index_select(0, rows)
    return taken

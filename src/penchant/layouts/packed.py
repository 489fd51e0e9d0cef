"""The packed layout: all sequences in one row, one behind the other, each seeing itself alone, nothing filled up."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penchant.types import Batch, Segments, TokenizedExample


def collate(examples: Sequence[TokenizedExample], with_prompts: bool = False) -> Batch:
    """Lays out B examples as one row: prompt, completion, prompt, completion, ...; every completion has its own prompt.

    `with_prompts` scores the prompts too.

    Raises:
        ValueError: a prompt is empty; the first completion token is predicted from the prompt's last one.
    """
    row = PackedRow()
    for example in examples:
        prompt = len(example.prompt_ids)
        for number, completion in enumerate(example.completion_ids):
            (places,) = row.add_group([[*example.prompt_ids, *completion]])
            row.score(places, prompt)
            if number == 0:
                prompt_places = places[:prompt]
        if with_prompts:
            row.score(prompt_places, 1)
    return row.as_batch(examples, with_prompts)


def cost(examples: Sequence[TokenizedExample]) -> int:
    """Tokens that the model computes for these examples laid out together."""
    return sum(
        len(example.prompt_ids) * len(example.completion_ids) + sum(map(len, example.completion_ids))
        for example in examples
    )


class PackedRow:
    """A row that grows group by group: a prompt and the completions that share it, or a sequence by itself."""

    def __init__(self) -> None:
        self._input_ids: list[int] = []
        self._position_ids: list[int] = []
        self._bounds: list[tuple[int, ...]] = []
        self._scored: list[tuple[torch.Tensor, int]] = []  # places of a sequence, and from which on it is scored

    def add_group(self, segments: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Appends the ids of a first segment and of those that see it; the packed places of the sequences they make."""
        prompt, *completions = segments
        prompt_places = self._append(prompt, 0)
        bounds = [len(self._input_ids) - len(prompt), len(self._input_ids)]
        sequences = [] if completions else [prompt_places]
        for completion in completions:
            sequences.append(torch.cat([prompt_places, self._append(completion, len(prompt))]))
            if len(completion):  # an empty segment has nobody to see
                bounds.append(len(self._input_ids))
        self._bounds.append(tuple(bounds))
        return sequences

    def score(self, places: torch.Tensor, first: int) -> None:
        """Adds a sequence whose tokens are scored from the one at `first` on.

        Raises:
            ValueError: nothing stands before that one.
        """
        if first == 0:
            raise ValueError("a sequence with an empty prompt cannot be scored: its first token has no context")
        self._scored.append((places, first))

    def as_batch(self, examples: Sequence[TokenizedExample], with_prompts: bool) -> Batch:
        """The row, with the way from its tokens back to the scored sequences."""
        ids = torch.tensor(self._input_ids)
        lengths = torch.tensor([len(places) - first for places, first in self._scored])
        return Batch(
            model_inputs={
                "input_ids": ids[None],
                "position_ids": torch.tensor(self._position_ids)[None],
                # A mask of four dimensions is passed on as it is, so no mask of T x T is built; attention ignores it.
                "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
                "segments": Segments(tuple(self._bounds)),
            },
            hidden_rows=torch.cat([places[first - 1 : -1] for places, first in self._scored]),
            last_rows=torch.stack([places[-1] for places, _ in self._scored]),
            target_ids=torch.cat([ids[places[first:]] for places, first in self._scored]),
            sequence_ids=torch.arange(len(self._scored)).repeat_interleave(lengths),
            lengths=lengths,
            examples=tuple(examples),
            with_prompts=with_prompts,
        )

    def _append(self, ids: Sequence[int], position: int) -> torch.Tensor:
        start = len(self._input_ids)
        self._input_ids += ids
        self._position_ids += range(position, position + len(ids))
        return torch.arange(start, start + len(ids))

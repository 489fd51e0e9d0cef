"""What the data doctor sees in rows once a tokenizer has read them, and in the tokenizer itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from penchant.data.chat import RenderError, encode, render
from penchant.doctor.findings import Finding, finding
from penchant.errors import UserError
from penchant.examples import Finished, TokenizedExample

MARKERS = r"<\|\w{1,40}\|>|<｜[^<>｜]{1,40}｜>|</s>|<(?:bos|eos|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>"
"""How the special tokens of the usual chat templates are written."""

_PROBE = [{"role": "user", "content": "a"}]
_WRITTEN_OUT = re.compile(r"\[/?INST\]|<</?SYS>>")
"""Markers that are plain text by design: Llama 2 was trained to read them in pieces."""


class TokenChecks:
    """A tokenizer, and what is asked of the rows that it made within `max_length` tokens."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._special = special_ids(tokenizer)
        self._ends = set(_ends_of(tokenizer))

    def faults(self, tokens: TokenizedExample, finished: Finished = None) -> Iterator[str]:
        """The names of the checks that the row fails; completions that are known as unfinished need no end."""
        flags = finished or (True,) * len(tokens.completion_ids)
        ended = [ids for ids, is_finished in zip(tokens.completion_ids, flags, strict=True) if is_finished]
        whole = [ids for ids in ended if not self.is_cut(tokens, ids)]
        if any(ids[-1] not in self._ends for ids in whole):
            yield "no-end"
        if len(whole) < len(ended):
            yield "truncated"
        if any(self._is_doubled([*tokens.prompt_ids, *ids]) for ids in tokens.completion_ids):
            yield "doubled-token"

    def is_cut(self, tokens: TokenizedExample, ids: Sequence[int]) -> bool:
        """Whether max_length took the end of a completion."""
        return len(tokens.prompt_ids) + len(ids) >= self._max_length and ids[-1] not in self._ends

    def _is_doubled(self, ids: Sequence[int]) -> bool:
        return any(one == other and one in self._special for one, other in pairwise(ids))

    def markers(self) -> re.Pattern[str]:
        """What a special token looks like in a text: the usual ones, and the tokenizer's own."""
        own = [token for token in _special_texts(self._tokenizer) if len(token) > 2 and not token.isalnum()]
        return re.compile("|".join([MARKERS, *map(re.escape, sorted(own, key=len, reverse=True))]))

    def of_tokenizer(self, found_markers: Iterable[str]) -> Iterator[Finding]:
        """Findings about the template, and about markers in plain texts (which stand there to be read as tokens)."""
        asked = {*found_markers, *(self.markers().findall(self._rendered_probe()))}
        split = [marker for marker in sorted(asked) if not _WRITTEN_OUT.fullmatch(marker) and self._is_split(marker)]
        if split:
            yield finding("split-special", "warn", f"{', '.join(split[:5])} in the template or in the texts")

    def _is_split(self, marker: str) -> bool:
        return len(self._tokenizer(marker, add_special_tokens=False).input_ids) > 1

    def _rendered_probe(self) -> str:
        try:
            prompt, completions = render(self._tokenizer, _PROBE, ["a"])
        except (RenderError, UserError):
            return ""
        return prompt + completions[0]


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of tokens that are no text, the named ones and the others."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}


def _special_texts(tokenizer: Any) -> set[str]:
    added = tokenizer.added_tokens_decoder.values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def _ends_of(tokenizer: Any) -> Iterator[int]:
    """What may end an answer: the end-of-sequence token, and what the template puts behind one."""
    yield tokenizer.eos_token_id
    try:
        yield encode(tokenizer, _PROBE, ["a"])[1][0][-1]
    except (RenderError, UserError):
        return

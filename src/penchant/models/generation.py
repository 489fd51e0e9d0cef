"""Sampling completions: token ids in, token ids out.

A transformers model with plain attention computes each prompt once for all its samples (`prompt_cache`), if it shows on
a few tokens that this gives its own logits. Any other one is left to its own `generate`, and what is no transformers
model at all is called again for every token. The three ways draw the same tokens: a sample depends on its prompt, its
seed and its number, and neither on the way nor on what else is in the batch, up to rounding of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from penchant import stopping
from penchant.errors import UserError
from penchant.models.attention import attending
from penchant.models.logps import evaluation_mode

Ids = Sequence[int]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability (after `top_k`)."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0: all."""
    max_new_tokens: int = 128


@dataclass(frozen=True)
class Generated:
    """The tokens of one sample."""

    ids: tuple[int, ...]
    """With the end token when it is finished."""
    is_finished: bool


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Ids],
    sampling: Sampling,
    num_samples: int,
    seeds: Sequence[int],
    end_ids: Collection[int],
    max_rows: int = 64,
    advance: Callable[[int], None] = lambda _: None,
) -> list[list[Generated]]:
    """`num_samples` samples of every prompt, at most `max_rows` at a time.

    `seeds` has one number for each prompt. Sample k of a prompt with seed s takes its t-th token by the t-th number of
    a stream that depends on (s, k) alone. `advance(n)` is called whenever n samples are done.

    Raises:
        ValueError: the numbers of prompts and seeds differ.
        UserError: the logits are not finite.
    """
    if not prompts:
        return []
    if sampling.temperature == 0 and num_samples > 1:  # all the same
        once = generate(
            model, prompts, sampling, 1, seeds, end_ids, max_rows, lambda number: advance(number * num_samples)
        )
        return [samples * num_samples for samples in once]
    samples = [
        [_Sample(ids, seed, number, sampling.max_new_tokens, end_ids) for number in range(num_samples)]
        for ids, seed in zip(prompts, seeds, strict=True)
    ]
    with evaluation_mode(model):
        draw = _way(model)
        in_order = sorted(chain(*samples), key=lambda sample: len(sample.prompt))  # stable: prompts stay together
        for batch in _batches(in_order, num_samples, max_rows):
            draw(model, batch, sampling, advance)
    return [[Generated(tuple(sample.ids), sample.is_finished) for sample in group] for group in samples]


def choose(logits: Float[Tensor, "R V"], sampling: Sampling, uniforms: Float[Tensor, " R"]) -> Int[Tensor, " R"]:
    """The token of each row at which the cumulative probability passes `uniforms`, numbers in [0, 1).

    Temperature, then top-k, then top-p, as in transformers; tokens as likely as the last one kept are kept too.

    Raises:
        UserError: there are logits that are not finite.
    """
    if not logits.amax(-1).isfinite().all():  # a nan is the largest of its row
        raise UserError(
            "model: its logits are not finite numbers, so nothing can be sampled; its weights hold nan, or overflow"
        )
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        logits = logits.masked_fill(logits < _least_kept(logits, sampling.top_p), -torch.inf)
    # Added up in float64: in float32 the sum over a large vocabulary would shift the edges between tokens, and a number
    # close to 1 could pass the last one.
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True).squeeze(1)


def _least_kept(logits: Float[Tensor, "R V"], top_p: float) -> Float[Tensor, "R 1"]:
    """The least logit of the smallest set of tokens whose probability reaches `top_p`."""
    normalizer = logits.logsumexp(-1, keepdim=True)
    for number in (min(256, logits.shape[1]), logits.shape[1]):  # sorting the whole vocabulary is rarely needed
        likeliest = logits.topk(number).values
        probabilities = (likeliest - normalizer).exp()
        cumulative = probabilities.cumsum(-1)
        if (cumulative[:, -1] >= top_p).all():
            break
    kept = (cumulative - probabilities < top_p).sum(-1, keepdim=True)
    return likeliest.gather(1, (kept - 1).clamp(min=0))


class _Sample:
    """One completion in the making."""

    def __init__(self, prompt: Ids, seed: int, number: int, limit: int, end_ids: Collection[int]) -> None:
        self.prompt = prompt
        self.key = [seed, number]
        self.limit = limit
        self.end_ids = end_ids
        self.ids: list[int] = []
        self.is_finished = False
        self.stream: np.random.Generator | None = None  # while it is in the making: there may be many samples

    @property
    def is_done(self) -> bool:
        return self.is_finished or len(self.ids) >= self.limit

    def next_number(self) -> float:
        """The number that draws its next token."""
        if self.is_done:
            return 0.0
        self.stream = self.stream or np.random.Generator(np.random.Philox(key=self.key))
        return self.stream.random()

    def take(self, token: int) -> None:
        self.ids.append(token)
        self.is_finished = token in self.end_ids
        if self.is_done:
            self.stream = None


_Advance = Callable[[int], None]
_Way = Callable[[Any, list[_Sample], Sampling, _Advance], None]
"""Makes a batch of samples, ascending in the length of their prompts, from beginning to end."""


def _way(model: nn.Module) -> _Way:
    if not hasattr(model, "generate"):
        return _calling_again
    return _sharing_prompts if _can_share_prompts(model) else _by_transformers


def _batches(samples: list[_Sample], num_samples: int, max_rows: int) -> Iterator[list[_Sample]]:
    """As many whole prompts as go into the rows; where not even one does, parts of one."""
    rows = max_rows // num_samples * num_samples or max_rows
    for group in [samples] if num_samples <= max_rows else _by_prompt(samples):
        yield from (group[start : start + rows] for start in range(0, len(group), rows))


def _by_prompt(samples: list[_Sample]) -> list[list[_Sample]]:
    return [list(group) for _, group in groupby(samples, key=lambda sample: id(sample.prompt))]


def _next_tokens(
    samples: list[_Sample], logits: Float[Tensor, "R V"], sampling: Sampling, advance: _Advance
) -> list[int]:
    """Draws a token for every row; samples that were done already do not take theirs."""
    stopping.check()
    numbers = torch.tensor([sample.next_number() for sample in samples], dtype=torch.float64)
    tokens = choose(logits, sampling, numbers.to(logits.device)).tolist()
    num_done = 0
    for sample, token in zip(samples, tokens, strict=True):
        if not sample.is_done:
            sample.take(token)
            num_done += sample.is_done
    if num_done:
        advance(num_done)
    return tokens


def _sharing_prompts(model: Any, samples: list[_Sample], sampling: Sampling, advance: _Advance) -> None:
    groups = _by_prompt(samples)
    stepper = _Stepper(model, [group[0].prompt for group in groups])
    with attending(model):
        logits = stepper.step([group[0].prompt[-1] for group in groups])
        rows = [number for number, group in enumerate(groups) for _ in group]
        stepper.select(rows)
        logits = logits[rows]
        while True:
            tokens = _next_tokens(samples, logits, sampling, advance)
            staying = [row for row, sample in enumerate(samples) if not sample.is_done]
            if not staying:
                return
            if 8 * len(staying) <= 7 * len(samples):  # leaving copies what the others have: not for every single one
                stepper.select(staying)
                samples, tokens = [samples[row] for row in staying], [tokens[row] for row in staying]
            logits = stepper.step(tokens)


def _by_transformers(model: Any, samples: list[_Sample], sampling: Sampling, advance: _Advance) -> None:
    # Prompts of one length at a time: not every family leaves padding out of what it remembers.
    for _, group in groupby(samples, key=lambda sample: len(sample.prompt)):
        _generate_by_transformers(model, list(group), sampling, advance)


def _generate_by_transformers(model: Any, samples: list[_Sample], sampling: Sampling, advance: _Advance) -> None:
    def draw(ids: Tensor, logits: Tensor) -> Tensor:
        tokens = _next_tokens(samples, logits, sampling, advance)
        return torch.full_like(logits, -torch.inf).scatter_(1, torch.tensor(tokens).to(ids.device)[:, None], 0.0)

    def are_done(ids: Tensor, logits: Any, **more: Any) -> Tensor:
        return torch.tensor([sample.is_done for sample in samples], device=ids.device)

    ids = torch.tensor([sample.prompt for sample in samples], device=next(model.parameters()).device)
    with _own_settings_aside(model):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,  # takes the likeliest token, and `draw` leaves one
            logits_processor=[draw],
            stopping_criteria=[are_done],
        )


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """Within it, what the model says about sampling, repetition and ends counts for nothing."""
    from transformers import GenerationConfig

    owners = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    before = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in zip(owners, before, strict=True):
            owner.generation_config = config


def _calling_again(model: Any, samples: list[_Sample], sampling: Sampling, advance: _Advance) -> None:
    device = next(model.parameters()).device
    for sample in samples:
        while not sample.is_done:
            output = model(torch.tensor([[*sample.prompt, *sample.ids]], device=device))
            logits = output if isinstance(output, Tensor) else output.logits
            _next_tokens([sample], logits[:, -1], sampling, advance)


class _Stepper:
    """A model behind prompts, ascending in length, of which all but the last token is computed; a row for each.

    Steps are taken within `attending`; the prompts are computed with the model's own attention.
    """

    def __init__(self, model: Any, prompts: Sequence[Ids]) -> None:
        from penchant.models.prompt_cache import prefill

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = base.config.get_text_config()
        has_window = getattr(config, "sliding_window", None) is not None and (
            "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
        )
        self.model = model
        self.device = next(model.parameters()).device
        self.cache = prefill(getattr(base, "base_model", base), [ids[:-1] for ids in prompts], has_window)

    def select(self, rows: list[int]) -> None:
        """Makes row n a copy of what was row `rows[n]` (ascending)."""
        self.cache.select(rows)

    def step(self, tokens: list[int]) -> Float[Tensor, "R V"]:
        """The logits behind one more token of every row."""
        positions = self.cache.positions()
        output = self.model(
            input_ids=torch.tensor(tokens, device=positions.device)[:, None],
            position_ids=positions,
            # A mask of four dimensions is taken as it is: none is made.
            attention_mask=torch.ones(len(tokens), 1, 1, 1, dtype=torch.bool, device=positions.device),
            past_key_values=self.cache,
            prompts=self.cache,
            use_cache=True,
        )
        self.cache.step_done()
        return output.logits[:, -1]


_CHECKED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether each model gave its own logits with prompts shared."""


def _can_share_prompts(model: Any) -> bool:
    if model not in _CHECKED:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):  # to see more than its rounding
            _CHECKED[model] = _agrees(model)
    return _CHECKED[model]


def _agrees(model: Any) -> bool:
    """Holds shared prompts against the model alone: two prompts of two lengths, whose rows leave one by one.

    Families differ in what a layer remembers (states of a recurrence, keys shared between layers, chunks), and in what
    they hand down to attention; one that is not understood must never be silently wrong.
    """
    try:
        config = model.config.get_text_config()
        if not _shows_on_few_tokens(config):
            return False
        ids = [place * config.vocab_size // 23 for place in range(23)]  # different, so that their order counts
        short, long, more = ids[:5], ids[5:14], ids[14:]
        steps = [([0, 1], [short[-1], long[-1]]), ([0, 0, 1, 1], more[:4]), ([0, 2, 3], more[4:7]), ([1, 2], more[7:])]
        sequences = [short[:-1], long[:-1]]
        found, expected = [], []
        stepper = _Stepper(model, [short, long])
        for rows, tokens in steps:
            sequences = [[*sequences[row], token] for row, token in zip(rows, tokens, strict=True)]
            expected += [
                model(input_ids=torch.tensor([each], device=stepper.device), use_cache=False).logits[:, -1]
                for each in sequences
            ]
        with attending(model) as attends:
            if not attends:
                return False
            for rows, tokens in steps:
                stepper.select(rows)
                found.append(stepper.step(tokens))
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError, AssertionError):
        return False
    return _are_close(torch.cat(found), torch.cat(expected))


def _shows_on_few_tokens(config: Any) -> bool:
    """Whether the model does nothing behind long prompts that short ones do not show."""
    layers = set(getattr(config, "layer_types", None) or ())
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}
    return (
        layers <= {"full_attention", "sliding_attention"}
        and not getattr(config, "attention_chunk_size", None)
        and not kinds & {"dynamic", "longrope"}  # the longest row of a batch would change the others
    )


def _are_close(found: Tensor, expected: Tensor) -> bool:
    """Whether logits agree to within rounding, measured by their spread over the vocabulary."""
    # Even in float64 some families take their softmax in float32.
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(expected.dtype, 5e-2)
    spread = (expected - expected.mean(-1, keepdim=True)).abs().amax(-1, keepdim=True)
    return found.shape == expected.shape and bool(((found - expected).abs() <= tolerance * spread).all())

"""Attention of packed segments, forward and backward, against softmax attention written out for each sequence alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from penchant.models.attention import attend_by_flex, attend_in_rows, attend_in_segments
from penchant.types import Segments

SEGMENTS = {
    "pairs": Segments(((0, 7, 11, 20), (20, 23, 29, 30), (30, 41, 43, 48))),
    "alone": Segments(((0, 5), (5, 6), (6, 20))),
    "ragged": Segments(((0, 3, 4), (4, 9, 10, 17, 19, 22), (22, 30), (30, 31, 40))),
}
EVERY_SHAPE = pytest.mark.parametrize("kind", SEGMENTS)
HEADS = pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (3, 1)])


def make_inputs(segments: Segments, num_heads: int, num_kv_heads: int, size: int = 8, value_size: int = 8) -> Any:
    """Query, key and value as projections give them: views (1, H, T, D) of (1, T, H, D)."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = segments.bounds[-1][-1]
    return [
        torch.randn(1, num_tokens, heads, width, generator=generator, dtype=torch.float64)
        .transpose(1, 2)
        .requires_grad_()
        for heads, width in ((num_heads, size), (num_kv_heads, size), (num_kv_heads, value_size))
    ]


def attended_alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Token by token: whom it sees, the softmax of its scores, the mean of values."""
    groups = query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = [[torch.empty(0)] * query.shape[1] for _ in range(query.shape[2])]
    for bounds in segments.bounds:
        for number, (start, end) in enumerate(pairwise(bounds)):
            before = [*range(bounds[0], bounds[1])] if number else []
            for token in range(start, end):
                seen = [*before, *range(start, token + 1)]
                seen = seen[-window:] if window else seen
                for head in range(query.shape[1]):
                    scores = key[0, head // groups, seen] @ query[0, head, token] * scaling
                    if softcap:
                        scores = softcap * torch.tanh(scores / softcap)
                    if sinks is not None:
                        scores = torch.cat([scores, sinks[head : head + 1]])
                    weights = scores.softmax(-1)[: len(seen)]
                    out[token][head] = weights @ value[0, head // groups, seen]
    return torch.stack([torch.stack(heads) for heads in out])[None]


def assert_same(found: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    torch.manual_seed(1)
    slopes = torch.randn_like(wanted)
    gradients = torch.autograd.grad(found, inputs, slopes)
    for own, other in zip(gradients, torch.autograd.grad(wanted, inputs, slopes), strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


@EVERY_SHAPE
@HEADS
@pytest.mark.parametrize("attend", [attend_in_segments, attend_in_rows])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_attention_and_its_gradients_are_those_of_each_sequence_alone(
    kind: str, num_heads: int, num_kv_heads: int, attend: Callable[..., Tensor], scaling: float | None
) -> None:
    segments = SEGMENTS[kind]
    inputs = make_inputs(segments, num_heads, num_kv_heads)
    assert_same(attend(*inputs, segments, scaling), attended_alone(*inputs, segments, scaling), inputs)


@EVERY_SHAPE
@pytest.mark.parametrize(
    "settings",
    [
        {"sliding_window": 4},
        {"softcap": 0.5},
        {"softcap": 0.5, "sliding_window": 3},
        {"s_aux": torch.linspace(-1, 2, 6, dtype=torch.float64)},
        {"s_aux": torch.linspace(-1, 2, 6, dtype=torch.float64), "sliding_window": 4},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_windows_caps_and_sinks_are_those_of_each_sequence_alone(kind: str, settings: dict[str, Any]) -> None:
    segments = SEGMENTS[kind]
    inputs = make_inputs(segments, 6, 2)
    names = {"sliding_window": "window", "s_aux": "sinks", "softcap": "softcap"}
    if "s_aux" in settings:
        settings = {**settings, "s_aux": settings["s_aux"].clone().requires_grad_()}
        inputs.append(settings["s_aux"])
    wanted = attended_alone(*inputs[:3], segments, **{names[name]: value for name, value in settings.items()})
    plain = attended_alone(*inputs[:3], segments)
    assert (wanted - plain).abs().max() > 1e-2
    assert_same(attend_in_segments(*inputs[:3], segments, **settings), wanted, inputs)


def test_values_may_be_narrower_than_keys() -> None:
    segments = SEGMENTS["ragged"]
    inputs = make_inputs(segments, 4, 4, size=8, value_size=6)
    assert_same(attend_in_segments(*inputs, segments), attended_alone(*inputs, segments), inputs)


def test_a_window_as_long_as_the_longest_sequence_hides_nothing() -> None:
    segments = SEGMENTS["pairs"]
    inputs = make_inputs(segments, 4, 2)
    assert segments.longest == 16
    same = attend_in_segments(*inputs, segments, sliding_window=16)
    assert torch.equal(same, attend_in_segments(*inputs, segments))
    assert not torch.equal(same, attend_in_segments(*inputs, segments, sliding_window=15))


@EVERY_SHAPE
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 0.5), (4, 0.5)])
def test_flex_attention_sees_the_same_tokens(kind: str, window: int | None, softcap: float | None) -> None:
    segments = SEGMENTS[kind]
    query, key, value = (each.detach().float() for each in make_inputs(segments, 6, 2, size=16, value_size=16))
    found = attend_by_flex(query, key, value, segments, None, window, softcap)
    wanted = attended_alone(query, key, value, segments, None, window, softcap)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_under_autocast_all_three_are_taken_in_half_precision() -> None:
    segments = SEGMENTS["pairs"]
    query, key, value = (each.detach().float() for each in make_inputs(segments, 4, 2))
    with torch.autocast("cpu", torch.bfloat16):
        found = attend_in_segments(query, key, value.bfloat16(), segments)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), attended_alone(query, key, value, segments), rtol=0.05, atol=0.05)


def test_dropout_is_refused() -> None:
    segments = SEGMENTS["pairs"]
    with pytest.raises(ValueError, match="dropout"):
        attend_in_segments(*make_inputs(segments, 4, 2), segments, dropout=0.1)


@EVERY_SHAPE
def test_a_shared_segment_is_seen_by_all_that_stand_behind_it_in_its_group(kind: str) -> None:
    segments = SEGMENTS[kind]
    gather, scatter = segments.rows
    group, segment, position = segments.members
    for token in range(segments.bounds[-1][-1]):
        row, place = divmod(int(scatter[token]), segments.longest)
        assert gather[row, place] == token
        assert place == position[token]
        seen = gather[row, : place + 1]
        assert (group[seen] == group[token]).all()
        assert set(segment[seen].tolist()) <= {0, int(segment[token])}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@EVERY_SHAPE
@pytest.mark.parametrize("settings", [{}, {"sliding_window": 4}, {"softcap": 0.5}], ids=lambda each: " ".join(each))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_the_gpu_attention_and_gradients_are_those_of_rows(
    kind: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    inputs = [each.detach().to("cuda", dtype).requires_grad_() for each in make_inputs(SEGMENTS[kind], 6, 2, 64, 64)]
    exact = [each.detach().double().cpu().requires_grad_() for each in inputs]
    found = attend_in_segments(*inputs, SEGMENTS[kind].to("cuda"), **settings)
    wanted = attend_in_rows(*exact, SEGMENTS[kind], None, settings.get("sliding_window"), settings.get("softcap"))
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=tolerance, atol=tolerance)
    slopes = torch.randn_like(wanted)
    gradients = torch.autograd.grad(found, inputs, slopes.to("cuda", dtype))
    for own, other in zip(gradients, torch.autograd.grad(wanted, exact, slopes), strict=True):
        torch.testing.assert_close(own.double().cpu(), other, rtol=2 * tolerance, atol=2 * tolerance)

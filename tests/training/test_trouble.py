"""Steps that stand out are found, those that cannot fit are cut smaller, and neither is invented."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from penchant.config import RunConfig
from penchant.errors import UserError
from penchant.training.logger import RunLog
from penchant.training.setup import Setup
from penchant.training.trouble import Spikes, in_smaller_pieces

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")
HOST = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes.")


def watched(values: Iterator[float], spikes: Spikes | None = None, grad_norm: float = 1.0) -> list[str | None]:
    spikes = spikes or Spikes()
    return [spikes.look(value, grad_norm) for value in values]


def noise(number: int, seed: int = 0) -> list[float]:
    return (0.7 + 0.01 * np.random.default_rng(seed).standard_normal(number)).tolist()


# Spikes.


def test_six_deviations_above_the_last_steps_are_a_spike_and_five_are_none() -> None:
    seen = noise(128)
    mean, deviation = float(np.mean(seen)), float(np.std(seen))
    for sigmas, is_spike in ((5.9, False), (6.1, True), (-50.0, False)):
        *before, found = watched([*seen, mean + sigmas * deviation])
        assert not any(before)
        assert (found is not None) == is_spike
    assert found is None
    *_, found = watched([*seen, mean + 7.2 * deviation])
    assert found == (
        f"loss {mean + 7.2 * deviation:.4g} is 7 standard deviations above the last 128 steps (mean {mean:.4g})"
    )


def test_the_gradient_is_watched_likewise() -> None:
    spikes = Spikes()
    assert not any(spikes.look(0.7, value) for value in noise(40))
    found = spikes.look(0.7, 70.0)
    assert found is not None
    assert found.startswith("grad_norm 70 is ")
    found = spikes.look(70.0, 70.0)
    assert found is not None
    assert "loss 70" in found
    assert "grad_norm 70" in found


def test_before_32_steps_nothing_is_said() -> None:
    for number in (31, 32):
        *_, found = watched([*noise(number), 100.0])
        assert (found is not None) == (number == 32)


def test_only_the_last_128_steps_count() -> None:
    high, low = [10 + value for value in noise(200)], noise(128)
    *_, found = watched([*high, *low, 2.0])
    assert found is not None, "what was long ago must not hide it"
    *_, found = watched([*high, *low[:100], 2.0])
    assert found is None


def test_a_spike_does_not_hide_the_next() -> None:
    *_, first, between, second = watched([*noise(64), 100.0, 0.7, 2.0])
    assert (first is not None, between, second is not None) == (True, None, True)


def test_after_three_in_a_row_the_new_level_is_believed() -> None:
    found = watched([*noise(64), *(70 + value for value in noise(80, seed=1)), 700.0])
    assert [place for place, words in enumerate(found) if words] == [64, 65, 66, 144]


def test_without_any_spread_a_tiny_change_is_no_spike() -> None:
    assert not any(watched([0.7] * 64 + [0.7 * (1 + 1e-6)]))
    assert watched([0.7] * 64 + [0.71])[-1]
    assert not any(watched([0.0] * 64 + [1e-13]))


@pytest.mark.parametrize("cut", [0, 10, 50, 66, 90])
def test_a_watch_that_was_written_down_sees_the_same(cut: int) -> None:
    values = [*noise(64), 9.0, 9.0, *noise(40, seed=3), 9.0]
    spikes = Spikes()
    before = watched(values[:cut], spikes)
    again = Spikes.from_json(json.loads(json.dumps(spikes.to_json())))
    assert before + watched(values[cut:], again) == watched(values)


# Memory.


def setup_of(max_tokens: int) -> Mock:
    """A setup of which no more is asked than it has."""
    return Mock(
        spec=Setup,
        max_tokens=max_tokens,
        policy=SimpleNamespace(device=torch.device("cpu")),
        config=RunConfig(model="m", data="d"),
    )


def fits(setup: Mock, at_most: int, error: Exception, tried: list[int]) -> Callable[[], str]:
    def work() -> str:
        tried.append(setup.max_tokens)
        if setup.max_tokens > at_most:
            raise error
        return "done"

    return work


def events_of(folder: Path) -> list[dict[str, object]]:
    file = folder / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("error", [CUDA, HOST], ids=["device", "host"])
def test_tokens_at_once_are_halved_until_they_fit_and_stay_so(error: Exception, tmp_path: Path) -> None:
    setup, log, tried = setup_of(1000), RunLog(quiet=True), []
    log.keep_in(tmp_path)
    work = fits(setup, 200, error, tried)
    assert in_smaller_pieces(setup, log, 7, work) == "done"
    assert in_smaller_pieces(setup, log, 8, work) == "done"
    assert tried == [1000, 500, 250, 125, 125]
    (event,) = events_of(tmp_path)
    assert (event["code"], event["step"]) == ("out-of-memory", 7)
    assert "up to 125 tokens at once" in str(event["message"])


def test_what_fits_is_done_once_and_nothing_is_said(tmp_path: Path) -> None:
    setup, log, tried = setup_of(1000), RunLog(quiet=True), []
    log.keep_in(tmp_path)
    in_smaller_pieces(setup, log, 1, fits(setup, 1000, CUDA, tried))
    assert (tried, events_of(tmp_path)) == ([1000], [])


def test_where_a_single_example_does_not_fit_it_ends(tmp_path: Path) -> None:
    setup, tried = setup_of(100), []
    with pytest.raises(UserError, match=r"a single example does not fit \(CUDA out of memory.*lower max_length"):
        in_smaller_pieces(setup, RunLog(quiet=True), 1, fits(setup, 0, CUDA, tried))
    assert tried == [100, 50, 25, 12, 6, 3, 1]


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    setup, tried = setup_of(100), []
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        in_smaller_pieces(setup, RunLog(quiet=True), 1, fits(setup, 0, error, tried))
    assert tried == [100]

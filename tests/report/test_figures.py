"""Numbers as people read them."""

import math

import pytest

from penchant.report.figures import duration, magnitude, number, percent, size, wilson_interval


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.6931, "0.693"),
        (0.09996, "0.100"),
        (0.1, "0.1"),
        (1e-5, "1e-5"),
        (2.5e-7, "2.5e-7"),
        (0.000123, "1.23e-4"),
        (0.001, "0.001"),
        (-118.4, "−118"),
        (9.999, "10.0"),
        (999.9, "1,000"),
        (12345.6, "12,300"),
        (12345, "12,345"),
        (1.5e9, "1.5e9"),
        (0.0, "0"),
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_numbers_have_three_significant_digits_and_integers_all(value: float | None, text: str) -> None:
    assert number(value) == text


def test_units_are_those_of_the_size_of_the_thing() -> None:
    assert [duration(s) for s in (4.26, 62, 412.7, 3725, 273600)] == [
        "4.3 s",
        "62 s",
        "6 min 53 s",
        "1 h 2 min",
        "3 d 4 h",
    ]
    assert [size(n) for n in (512, 3 * 2**20, 3_400_000_000)] == ["512 B", "3 MiB", "3.17 GiB"]
    assert [magnitude(n) for n in (950, 134_515_008, 7.2e9)] == ["950", "135 million", "7.2 billion"]
    assert percent(0.4464) == "44.6%"


def test_wilson_interval_is_the_one_worked_by_hand() -> None:
    # p = 0.9, n = 10, z = 1.96, z^2 = 3.8416: middle (0.9 + 0.19208) / 1.38416 = 0.788984,
    # half 1.96 sqrt(0.009 + 0.009604) / 1.38416 = 1.96 * 0.1363965 / 1.38416 = 0.193140.
    low, high = wilson_interval(0.9, 10, z=1.96)
    assert low == pytest.approx(0.595844, abs=1e-5)
    assert high == pytest.approx(0.982124, abs=1e-5)


@pytest.mark.parametrize(("share", "n"), [(0.0, 1), (1.0, 1), (0.0, 50), (1.0, 50), (0.3, 7), (0.5, 10_000)])
def test_wilson_bounds_solve_the_score_equation(share: float, n: int) -> None:
    z = 1.959964
    for bound in wilson_interval(share, n):
        assert 0 <= bound <= 1
        # The bounds are the q with |p - q| = z sqrt(q (1 - q) / n).
        assert abs(share - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), abs=1e-7)


def test_wilson_interval_needs_a_trial() -> None:
    with pytest.raises(ValueError, match="num_trials"):
        wilson_interval(0.5, 0)

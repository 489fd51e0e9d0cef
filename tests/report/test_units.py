"""What is said of pairs, completions and rankings is true of them, and an accuracy has the interval of its kind."""

from typing import Any

import pytest

from penchant.report.figures import roc_interval, wilson_interval
from penchant.report.units import COMPLETION, EXAMPLE, PAIR, RANKING, UNITS, UNJUDGED, common, unit_of

LENGTH = {"mean": 8.0, "median": 8.0, "max": 9}


def completions(**fields: Any) -> dict[str, Any]:
    lengths = {"prompt": LENGTH, "desirable": LENGTH, "undesirable": LENGTH}
    return {"unit": "completion", "used": 10, "desirable": 4, "lengths": lengths, **fields}


def test_the_unit_is_the_one_that_the_data_findings_name() -> None:
    assert unit_of({"unit": "pair"}) is PAIR
    assert unit_of(completions()) is COMPLETION
    assert unit_of(completions(desirable=0, lengths={"prompt": LENGTH, "completion": LENGTH})) is UNJUDGED
    assert unit_of({"unit": "ranking"}) is RANKING
    assert unit_of({"unit": "ranking", "most_completions": 2}) is PAIR


@pytest.mark.parametrize("part", [{}, {"unit": None}, {"unit": ["pair"]}, {"unit": "song"}])
def test_what_is_not_known_gets_the_words_that_are_true_of_all(part: dict[str, Any]) -> None:
    assert unit_of(part) is EXAMPLE


def test_only_one_kind_alone_keeps_its_words() -> None:
    assert common([PAIR, PAIR]) is PAIR
    assert common([PAIR, COMPLETION]) is EXAMPLE
    assert common([]) is EXAMPLE
    assert all(UNITS[unit.key] is unit for unit in (PAIR, COMPLETION, UNJUDGED, RANKING, EXAMPLE))


@pytest.mark.parametrize(
    ("part", "interval"),
    [
        ({"unit": "pair", "used": 96}, wilson_interval(0.75, 96)),
        ({"unit": "pair", "used": 0}, None),
        ({"unit": "pair"}, None),
        (completions(), roc_interval(0.75, 4, 6)),
        (completions(used=16), roc_interval(0.75, 4, 12)),
        (completions(desirable=10), None),
        (completions(desirable=None), None),
        (completions(lengths={"desirable": LENGTH, "undesirable": LENGTH, "completion": LENGTH}), None),
        ({"unit": "ranking", "used": 96}, None),
        ({"unit": "ranking", "used": 96, "most_completions": 2}, wilson_interval(0.75, 96)),
        ({"unit": "ranking", "used": 96, "most_completions": 3}, None),
        ({"used": 96}, None),
    ],
)
def test_each_unit_has_its_interval_or_none(part: dict[str, Any], interval: tuple[float, float] | None) -> None:
    assert unit_of(part).interval(0.75, part) == interval


def test_an_accuracy_in_words_names_the_couples_it_is_a_share_of() -> None:
    had = "completion has the higher reward in 75.0% of"
    assert PAIR.agreement(0.75, 96) == f"the chosen {had} 96 held-out pairs"
    assert PAIR.agreement(0.75, 1) == f"the chosen {had} 1 held-out pair"
    assert PAIR.agreement(0.75, None) == f"the chosen {had} the held-out pairs"
    couples = "the couples of a desirable and an undesirable one among 1,000 held-out completions"
    assert COMPLETION.agreement(0.75, 1000) == f"the desirable {had} {couples}"
    assert RANKING.agreement(0.75, 9) == f"the better {had} the couples within 9 held-out rankings"

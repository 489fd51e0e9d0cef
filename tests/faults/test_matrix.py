"""The table of faults tells the truth about the tests."""

from __future__ import annotations

import pytest

from .matrix import Matrix


def test_a_fault_that_is_not_survived_fails_the_test_and_stays_in_the_table() -> None:
    matrix = Matrix()
    matrix.record(1, "a kill", 50, 50)
    with pytest.raises(pytest.fail.Exception, match=r"row 10, a lost file: survived 2 of 3"):
        matrix.record(10, "a lost file", 3, 2)
    with pytest.raises(ZeroDivisionError), matrix.trial("2b", "a full disk"):
        raise ZeroDivisionError
    with matrix.trial("2b", "a full disk"):
        pass
    assert matrix.markdown().splitlines()[2:] == [
        "| 1 | a kill | 50 | 50 |",
        "| 2b | a full disk | 2 | 1 |",
        "| 10 | a lost file | 3 | 2 |",
    ]


def test_a_fault_of_which_nothing_was_tried_fails_the_test() -> None:
    with pytest.raises(pytest.fail.Exception, match="nothing was tried"):
        Matrix().record(1, "a kill", 0, 0)

"""One judge for several processes: the first asks, and tells the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from penchant import distributed
from penchant.online.judges import Judge, Question, Verdict


def judge_of_all(make: Callable[[], Judge], is_shared_out: bool) -> Judge:
    """The judge that `make` makes, in the first process alone if there are several; the others hear what it says.

    So a server is asked once, and a model is loaded once. One that `is_shared_out` has models that all processes hold a
    part of, and so all of them ask it.

    Raises:
        UserError: in all of them: it cannot be made.
    """
    if distributed.world().size == 1 or is_shared_out:
        return make()
    return _Told(make)


class _Told(Judge):
    """What the first process's judge says."""

    def __init__(self, make: Callable[[], Judge]) -> None:
        self._own: Judge | None = None

        def introduce() -> tuple[str, str]:
            self._own = make()
            return self._own.description, self._own.identity

        self.description, self.identity = distributed.by_first(introduce)

    def judge(self, questions: Sequence[Question], advance: Callable[[int], None] = lambda n: None) -> list[Verdict]:
        """Its verdicts, in every process; all call it with the same questions.

        Raises:
            UserError: it fails.
        """

        def ask() -> list[Verdict]:
            assert self._own is not None
            return self._own.judge(questions, advance)

        return distributed.by_first(ask)

    def report(self) -> dict[str, Any]:
        """What it noticed; nothing in the other processes."""
        return {} if self._own is None else self._own.report()

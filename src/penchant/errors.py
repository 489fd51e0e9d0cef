"""The one error that users meet, and the hint it often ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: the message is the whole explanation, and no traceback is shown.

    A command ends with its exit code on it.
    """

    exit_code = 2


def nearest(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'beta'?` for the closest candidate, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(candidates), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""

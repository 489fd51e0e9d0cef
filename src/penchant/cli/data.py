"""The verbs that look at data before anything is trained."""

from __future__ import annotations

from penchant.cli.plugins import Verb


def add_verbs(verb: Verb) -> None:
    """The verbs of this file."""

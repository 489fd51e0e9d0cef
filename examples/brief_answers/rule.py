"""A judge of form: one full sentence of at most twenty words, without an opener."""

from __future__ import annotations

import re

OPENERS = ("sure", "certainly", "of course", "great question", "as an ai", "i'd be happy")
MOST_WORDS = 20


def score(prompt, completions):
    """Up to 4 points a completion: it ends as a sentence, is one alone, is brief, begins without an opener."""
    return [_points(text.strip()) for text in completions]


def _points(text: str) -> float:
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", text) if part]
    surplus = max(0, len(text.split()) - MOST_WORDS)
    return (
        float(text.endswith((".", "!", "?")))
        + float(len(sentences) == 1)
        + 1 / (1 + surplus / MOST_WORDS)
        + float(bool(text) and not text.lower().startswith(OPENERS))
    )

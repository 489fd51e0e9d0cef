"""Completions that speak to the judge instead of answering: found by a few patterns, and left out for a second look.

Nobody is condemned by a pattern alone, an honest text may match, too; so the patterns may be broad.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_ANSWER = r"(?i:answer|response|reply|completion|candidate|option|output|summary|text|assistant)"
_LETTER = r"[\"'`*(\[]*[AB]\b"
_DECIDES = r"(?i:is|was|wins|should|must|deserves)\b"

_PATTERNS = {
    "says what to choose": r"\b(?i:choose|pick|select|prefer|vote for|(?:answer|reply|respond) with|write|print|say)"
    rf" (?i:the )?(?:letter |{_ANSWER} )?{_LETTER}",
    "says which is better": rf"\b{_ANSWER} {_LETTER}[\"'`*)\]]* {_DECIDES}"
    rf"|\b(?i:this|my|the (?:first|second|other|above)) {_ANSWER} {_DECIDES}",
    "states a verdict": r"\[\[ ?[AB] ?\]\]|(?m:^[^\w\n]*[AB][^\w\n]*$)"
    rf"|\b(?i:verdict|winner|better|best|preferred|final)(?i: {_ANSWER})?(?: is|:) ?{_LETTER}",
    "speaks to the judge": r"(?i:\b(?:dear|hello|attention|(?:as|to|for) (?:the|an?|any|all)) (?:\w{1,20} )?"
    r"(?:judge|grader|evaluator)s?\b|\b(?:judge|grader|evaluator)s?[:,]|\byou are (?:now )?(?:the|an?) judge\b)",
    "takes back what was asked": r"(?i:\b(?:ignore|disregard|forget|override)\b[^.\n]{0,40}"
    r"\b(?:instruction|above|previous|prior|earlier|rule|criteria|question|other (?:answer|response)))",
    "plays another role": r"<\|[a-z_]{2,30}\|>|\[/?INST\]|<</?SYS>>|(?im:^[^\w\n]*system[^\w\n]{0,3}:)",
    "ends its own block": r"(?im:^-{3,} *(?:end of )?(?:request|answer)\b)",
}
"""What it does -> how that reads. Letters of answers count as capitals only: `choose a book` says nothing of A."""

_COMPILED = {what: re.compile(pattern) for what, pattern in _PATTERNS.items()}
_SENTENCE = re.compile(r".+?(?:[.!?](?=\s)|$)", re.MULTILINE)
_QUOTED = 80


def suspicious(text: str) -> str | None:
    """What in a text speaks to a judge, in a few words with the passage; None where nothing does."""
    for what, match in _matches(_plain(text)):
        return f"{what}: '{' '.join(match.group().split())[:_QUOTED]}'"
    return None


def without_suspicious(text: str) -> str:
    """The text with `[...]` in the place of each sentence that speaks to a judge, or has a part in that."""
    plain = _plain(text)
    marked = bytearray(len(plain))
    for _, match in _matches(plain):
        marked[match.start() : match.end()] = b"\1" * len(match.group())
    if not any(marked):
        return text
    return _SENTENCE.sub(lambda found: "[...]" if any(marked[found.start() : found.end()]) else found.group(), plain)


def _matches(plain: str) -> Iterator[tuple[str, re.Match[str]]]:
    for what, pattern in _COMPILED.items():
        for match in pattern.finditer(plain):
            yield what, match


def _plain(text: str) -> str:
    """The text without what only hides letters: invisible characters, and letters of other widths and styles."""
    visible = "".join(character for character in text if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFKC", visible)

"""From a template to a page that needs nothing else and in which nothing runs."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from penchant.report.figures import number

HERE = Path(__file__).parent
MAX_CHARACTERS = 4000


def render_page(template: str, **context: Any) -> str:
    """The page of a template, with the style sheet in it."""
    # The page's policy names this very style sheet by its hash; nothing else may style, run or load.
    return environment().get_template(template).render(css=Markup(style_sheet()), css_hash=style_hash(), **context)


def environment(*more: Path) -> Environment:
    """Jinja as all pages are made with: everything escaped, nothing undefined; `more` are further folders."""
    made = Environment(
        loader=FileSystemLoader([HERE, *more]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(number=number, clip=clip)
    return made


def style_sheet() -> str:
    """The style sheet of all pages."""
    return (HERE / "report.css").read_text(encoding="utf-8")


def style_hash() -> str:
    """What a Content-Security-Policy calls the style sheet: its SHA-256 in base64."""
    return base64.b64encode(hashlib.sha256(style_sheet().encode()).digest()).decode()


def clip(value: Any, limit: int = MAX_CHARACTERS) -> str:
    """A text, or the messages of a conversation as text, cut after `limit` characters with a note of what is gone."""
    if isinstance(value, list):
        turns = [dict(turn) if isinstance(turn, Mapping) else {} for turn in value]
        value = "\n\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)
    text = "" if value is None else str(value)
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({number(len(text) - limit)} more characters)"

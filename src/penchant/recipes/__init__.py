"""Published set-ups as run files, one a paper's setting, each number with its source beside it."""

from __future__ import annotations

from pathlib import Path

from penchant.errors import UserError, nearest

RECIPES = Path(__file__).parent
"""The folder that holds them."""


def names() -> list[str]:
    """The names of all recipes, in alphabetical order."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def path_of(name: str) -> Path:
    """The run file of a recipe, by its name.

    Raises:
        UserError: there is no such recipe (the nearest is named).
    """
    known = names()
    if name not in known:
        raise UserError(f"there is no recipe '{name}'{nearest(name, known)}")
    return RECIPES / f"{name}.yaml"

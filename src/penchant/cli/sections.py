"""Sections of a run file on the command line of verbs that need nothing else of it."""

from __future__ import annotations

import argparse
from collections.abc import Container
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from penchant.config import option_names, parse_value
from penchant.errors import UserError

Section = TypeVar("Section", bound=BaseModel)


def add_section_keys(parser: argparse.ArgumentParser, section: str, keys: Container[str] | None = None) -> None:
    """Adds `--SECTION.KEY VALUE` for all keys of a section, or for those that are named."""
    group = parser.add_argument_group(f"keys of {section}")
    for name, help_text in option_names().items():
        if name.startswith(f"{section}.") and (keys is None or name.removeprefix(f"{section}.") in keys):
            group.add_argument(
                f"--{name}",
                dest=f"key:{name}",
                metavar="VALUE",
                default=argparse.SUPPRESS,
                help=help_text.replace("%", "%%"),
            )


def section_from(kind: type[Section], options: argparse.Namespace, section: str) -> Section:
    """The section that the options of `add_section_keys` describe.

    Raises:
        UserError: a value does not fit.
    """
    prefix = f"key:{section}."
    given = {name.removeprefix(prefix): text for name, text in vars(options).items() if name.startswith(prefix)}
    try:
        return kind.model_validate({key: parse_value(text) for key, text in given.items()})
    except ValidationError as error:
        raise UserError("\n".join(_sentence(section, problem) for problem in error.errors())) from None


def _sentence(section: str, problem: Any) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    key = ".".join(map(str, (section, *problem["loc"])))
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"

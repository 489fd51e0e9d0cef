"""From run files and options to a run, with every mistake said in a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from penchant.config.run import RunConfig
from penchant.errors import UserError, nearest


def load_config(run_file: str | None, overrides: Mapping[str, Any]) -> RunConfig:
    """The run that a run file and options (dotted names, as `loss.beta`) describe together; options win.

    Raises:
        UserError: no such file, not YAML, an unknown key (the nearest is named) or a value that does not fit.
    """
    settings = _read_run_file(run_file) if run_file else {}
    for name, value in overrides.items():
        _set_dotted(settings, name, value)
    return config_from(settings)


def config_from(settings: Mapping[str, Any]) -> RunConfig:
    """The run that nested settings describe.

    Raises:
        UserError: an unknown key or a value that does not fit.
    """
    try:
        return RunConfig.model_validate(dict(settings))
    except ValidationError as error:
        raise UserError("\n".join(_sentence(dict(problem)) for problem in error.errors())) from None


def option_names() -> dict[str, str]:
    """Every key of a run file by its dotted name, with its help; the losses' own settings are not among them."""
    return dict(_options(RunConfig, ""))


def parse_value(text: str, source: str | None = None) -> Any:
    """A value from the command line, or the text of the file `source`, read as YAML reads it.

    Raises:
        UserError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # a date like 2026-99-99 is a ValueError
        raise UserError(f"{source or repr(text)}: is not YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """YAML that reads 5e-7 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read_run_file(path: str) -> dict[str, Any]:
    try:
        settings = parse_value(Path(path).read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such run file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a run file is a list of 'key: value' lines; see `penchant train --help`.")
    return settings


def _set_dotted(settings: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        if not isinstance(settings.setdefault(section, {}), dict):
            raise UserError(f"{name}: '{section}' is a value in the run file, not a section.")
        settings = settings[section]
    settings[key] = value


def _options(section: type[BaseModel], prefix: str) -> Iterable[tuple[str, str]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _options(field.annotation, f"{prefix}{name}.")
        elif name != "loss":
            yield f"{prefix}{name}", " ".join((field.description or "").split())


def _sentence(problem: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{key}: there is no such setting{nearest(key, [*option_names(), 'loss'])}"
    if problem["type"] == "missing":
        return f"{key}: is missing; give it in the run file or as --{key}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"

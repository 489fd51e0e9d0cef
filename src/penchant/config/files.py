"""From run files and options to a run, with every mistake said in a sentence."""

from __future__ import annotations

import copy
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


def load_stages(run_file: str, overrides: Mapping[str, Any]) -> tuple[Path, str, list[RunConfig]] | None:
    """What a run file with `stages` describes, or None where it has none.

    What stands beside `stages` holds for each of them, what a stage says wins over it, and options win over both, those
    named `stages.N.KEY` for stage N alone. Stage N is kept in `output_dir` as `N-NAME`, by `name` or method; its
    model is the one before's.

    Returns:
        The folder, the text of a run file that repeats it all, and the run of each stage.

    Raises:
        UserError: as `load_config`; or a stage is no section, names a model or a folder, or has no fit name.
    """
    settings = _read_run_file(run_file)
    if "stages" not in settings:
        return None
    stages, common = settings["stages"], {key: value for key, value in settings.items() if key != "stages"}
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise UserError("stages: is a list of sections, each with the keys of a run, such as '- method: sft'.")
    ends = {key: overrides.get(key, common.pop(key, None)) for key in ("model", "output_dir")}
    for key, value in ends.items():
        if value is None:
            raise UserError(f"{key}: is missing; give it beside stages or as --{key}")
    folder, model = Path(str(ends["output_dir"])), ends["model"]
    for_all, for_one = _split_by_stage({name: value for name, value in overrides.items() if name not in ends})
    configs, told = [], []
    for number, stage in enumerate(stages, start=1):
        for key in ends:
            if key in stage:
                raise UserError(
                    f"stages: stage {number} names {key}, which follows from the stage before; leave it out."
                )
        own = _merged(copy.deepcopy(common), stage)
        for name, value in (*for_all.items(), *for_one.pop(str(number), {}).items()):
            _set_dotted(own, name, value)
        name = str(own.pop("name", own.get("method") or "dpo"))
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"stages: '{name}' cannot be the name of a folder; use letters, digits, and . - _")
        told.append({"name": name, **own})
        place = folder / f"{number}-{name}"
        try:
            configs.append(config_from({**own, "model": model, "output_dir": str(place)}))
        except UserError as error:
            raise UserError("\n".join(f"stage {place.name}: {line}" for line in str(error).splitlines())) from None
        model = str(place / "model")
    if for_one:
        raise UserError(f"stages.{next(iter(for_one))}: there are stages 1 to {len(stages)}.")
    text = yaml.safe_dump({**ends, "stages": told}, sort_keys=False, allow_unicode=True)
    return folder, text, configs


def _split_by_stage(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The options for all stages, and those for one by its number."""
    for_all: dict[str, Any] = {}
    for_one: dict[str, dict[str, Any]] = {}
    for name, value in overrides.items():
        if name.startswith("stages."):
            number, _, key = name.removeprefix("stages.").partition(".")
            if not key:
                raise UserError(f"{name}: name a key of that stage, as {name}.max_steps.")
            for_one.setdefault(number, {})[key] = value
        else:
            for_all[name] = value
    return for_all, for_one


def _merged(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with a stage's own on top, sections key by key."""
    return {
        **settings,
        **{
            key: _merged(settings[key], value)
            if isinstance(value, Mapping) and isinstance(settings.get(key), Mapping)
            else value
            for key, value in own.items()
        },
    }


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

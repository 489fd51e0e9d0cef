"""From the settings of a run file to a loss."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from penchant.errors import UserError, nearest
from penchant.losses.base import LOSSES, Loss, WeightedSum


def build_loss(settings: Mapping[str, Any]) -> Loss:
    """The loss that `{"name": "dpo", "beta": 0.1, ...}` describes, or the sum of `{"dpo": {...}, "sft": {...}}`.

    In a sum each term may have a `weight` (1 by default) beside its own fields.

    Raises:
        UserError: an unknown name or field (the nearest is named), or a value that the loss refuses.
    """
    if "name" in settings:
        return _build_one(settings, "loss.")
    losses = [key for key, value in settings.items() if isinstance(value, Mapping)]
    for key in settings:
        if key not in losses and losses:
            example = f"loss.{losses[0]}.{key}"
            raise UserError(
                f"loss.{key}: this loss is a sum (of {', '.join(losses)}); say of which loss, as in {example}."
            )
        if key not in losses:
            raise UserError(f"loss.{key}: the loss has no name; give it as loss.name.")
    terms = []
    for name, fields in settings.items():
        fields = dict(fields)
        if "name" in fields:
            raise UserError(f"loss.{name}.name: in a sum a loss is named by its section, here {name}.")
        weight = _coerced(f"loss.{name}.weight", fields.pop("weight", 1.0), float)
        terms.append((weight, _build_one({"name": name, **fields}, f"loss.{name}.")))
    try:
        return WeightedSum(tuple(terms))
    except ValueError as error:
        raise UserError(f"loss.{error}") from None


def field_help(loss: type[Loss]) -> dict[str, str]:
    """The sentence below each field of a loss, its bases' fields included."""
    found: dict[str, str] = {}
    for cls in reversed(loss.__mro__):
        if not (issubclass(cls, Loss) and dataclasses.is_dataclass(cls)):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                found[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return {field.name: found.get(field.name, "") for field in dataclasses.fields(loss)}


def _build_one(settings: Mapping[str, Any], prefix: str) -> Loss:
    fields = dict(settings)
    name = str(fields.pop("name"))
    if name not in LOSSES:
        raise UserError(f"loss.name: there is no loss '{name}'{nearest(name, LOSSES)}. There are: {', '.join(LOSSES)}.")
    known = {field.name for field in dataclasses.fields(LOSSES[name])}
    hints = get_type_hints(LOSSES[name])
    for key, value in fields.items():
        if key not in known:
            has = f"It has: {', '.join(sorted(known))}." if known else "It has none."
            raise UserError(f"{prefix}{key}: the loss '{name}' has no such setting{nearest(key, known)}. {has}")
        fields[key] = _coerced(f"{prefix}{key}", value, hints[key])
    try:
        return LOSSES[name](**fields)
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None


def _coerced(key: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type; a float field takes an integer, nothing else is converted."""
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) not in kinds:
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise UserError(f"{key}: expected {expected}, got {value!r}")
    return value

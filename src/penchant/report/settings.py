"""Settings of a run as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from penchant.report.figures import MISSING, number
from penchant.report.render import clip
from penchant.report.rundir import as_mapping, clean
from penchant.report.series import finite

MAIN_SETTINGS = (
    *("method", "loss", "model", "data", "eval_data", "learning_rate", "batch_size", "num_train_epochs"),
    *("max_steps", "seed", "lora.rank", "max_length"),
)
"""The settings worth naming where all runs have the same; where runs differ, these come first."""


def place(key: str) -> int:
    """Where a setting stands among the main ones; behind them for any other."""
    name = "loss" if key.startswith("loss.") else key
    return MAIN_SETTINGS.index(name) if name in MAIN_SETTINGS else len(MAIN_SETTINGS)


def safe(value: Any, depth: int = 4) -> Any:
    """A setting in values that JSON knows and a page can show; lists as text."""
    if isinstance(value, Mapping) and depth:
        return {clean(str(key)): safe(item, depth - 1) for key, item in value.items()}
    if value is None or isinstance(value, bool) or finite(value) is not None:
        return value
    return clean(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings by dotted keys, without those that are None."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value


def setting_text(value: Any) -> str:
    """A setting as one writes it: not rounded."""
    known = finite(value)
    if known is not None:
        return number(known) if float(f"{known:.2e}") == known else str(known)
    return MISSING if value is None else clip(str(value).lower() if isinstance(value, bool) else value, 300)


def loss_text(loss: Mapping[str, Any], method: str | None = None) -> str:
    """A loss in one line: `dpo, beta = 0.1`; a weighted sum as `1 × dpo, beta = 0.1; 0.2 × sft`.

    A name that the method tells already is left out.
    """
    terms = {name: as_mapping(term) for name, term in loss.items() if isinstance(term, Mapping)}
    if terms:
        return "; ".join(
            loss_text({"name": f"{setting_text(t.pop('weight', 1))} × {n}", **t}) for n, t in terms.items()
        )
    name = setting_text(loss.get("name", ""))
    fields = [f"{key} = {setting_text(value)}" for key, value in loss.items() if key != "name"]
    return ", ".join([name, *fields] if name not in ("", method) else fields)


def loss_doc(summary: Mapping[str, Any]) -> str:
    """What the loss says of itself, without what it says to programmers."""
    return str(summary.get("loss_doc") or "").partition("\n\nRaises:")[0]

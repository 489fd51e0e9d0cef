"""Penchant trains language models on preferences: Direct Preference Optimization and its family."""

from importlib import import_module
from typing import Any

_HOMES = {
    "DPO": "penchant.algorithms",
    "IPO": "penchant.algorithms",
    "KTO": "penchant.algorithms",
    "ORPO": "penchant.algorithms",
    "PairAlgorithm": "penchant.algorithms",
    "SimPO": "penchant.algorithms",
    "UnpairedAlgorithm": "penchant.algorithms",
    "Policy": "penchant.scoring.policy",
    "UserError": "penchant.errors",
    "train": "penchant.training.run",
}
"""Each public name and the room it lives in; imported on use, so that `penchant --help` needs no torch."""

__all__ = [
    *("DPO", "IPO", "KTO", "ORPO", "PairAlgorithm", "Policy", "SimPO", "UnpairedAlgorithm", "UserError"),
    *("losses", "train", "types"),
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in ("losses", "types"):
        return import_module(f"penchant.{name}")
    raise AttributeError(f"module 'penchant' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__

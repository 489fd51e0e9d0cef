"""Methods: what one word on the command line stands for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_LOSSES = (
    *("dpo", "robust", "ipo", "hinge", "odpo", "dpop", "exo", "discopop", "f-dpo", "wpo", "aot"),
    *("ln-dpo", "r-dpo", "ld-dpo", "nca", "bco-pair", "apo-zero", "apo-down", "sppo"),
    *("simpo", "orpo", "cpo", "slic", "sft"),
    *("kto", "bco", "apo-zero-unpaired", "aot-unpaired", "pl-dpo"),
)
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in _LOSSES},
    "cdpo": {"name": "dpo", "label_smoothing": 0.1},
    "rso-sigmoid": {"name": "dpo", "beta": 0.05},
    "sppo-hard": {"name": "sppo"},
    "sppo-soft": {"name": "sppo", "soft": True},
    "rpo": {"dpo": {"beta": 0.1}, "sft": {"weight": 1.0, "per": "sequence"}},
    "online-dpo": {"name": "dpo"},
    "iterative-dpo": {"name": "dpo"},
    "rso": {"name": "dpo", "beta": 0.05},
    "sppo": {"name": "sppo", "soft": True},
    "best-of-n": {"name": "sft"},
}
"""What one word on the command line stands for: the settings of `loss` that a method begins with.

Every loss is a method by its own name (`sppo` is the whole method, `sppo-hard` its loss on given pairs); the others are
presets, of one loss or of a weighted sum, and those of `ONLINE_METHODS` make their own completions.
"""

ONLINE_METHODS: dict[str, dict[str, Any]] = {
    "online-dpo": {"completions": 2, "pairs": "best_worst", "one_step_rounds": True},
    "iterative-dpo": {"completions": 4, "pairs": "best_worst", "rounds": 3},
    "rso": {"completions": 64, "temperature": 0.7, "top_k": 40, "pairs": "random", "accept": 8, "accept_beta": 0.5},
    "sppo": {"completions": 5, "temperature": 0.7, "top_p": 0.9, "rounds": 3, "renew_reference": True},
    "best-of-n": {"completions": 16, "pairs": "best"},
}
"""Methods that sample completions and have them judged -> what stands where the run file says nothing.

Sources in docs/guide.md: Guo et al. 2024 (online-dpo), Liu et al. 2024 (rso), Wu et al. 2024 (sppo).
"""

ONLINE_SUMMARIES = {
    "online-dpo": "Two fresh completions of each prompt, judged, in every step (Guo et al. 2024, arXiv:2402.04792).",
    "iterative-dpo": "Rounds of sampling, judging, and DPO on the best completion against the worst.",
    "rso": "Rejection sampling: completions as if from the optimal policy, paired (Liu et al. 2024, arXiv:2309.06657).",
    "sppo": "Self-play: log-ratio towards eta (P(win) - 1/2), reference renewed (Wu et al. 2024, arXiv:2405.00675).",
    "best-of-n": "SFT on the best of n completions of each prompt.",
}
"""A sentence about each of them."""

RATES = {"sft": 2e-5, "best-of-n": 2e-5, "orpo": 8e-6, "kto": 5e-6}
"""Peak learning rates of methods that want another one than DPO: sources in docs/guide.md."""


def add_methods(names: Iterable[str]) -> None:
    """Makes losses that were defined outside this package methods by their own names."""
    for name in names:
        METHODS.setdefault(name, {"name": name})

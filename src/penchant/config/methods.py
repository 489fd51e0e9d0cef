"""Methods: what one word on the command line stands for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_LOSSES = (
    *("dpo", "robust", "ipo", "hinge", "odpo", "dpop", "exo", "discopop", "f-dpo", "wpo", "aot"),
    *("ln-dpo", "r-dpo", "ld-dpo", "nca", "bco-pair", "apo-zero", "apo-down", "sppo"),
    *("simpo", "orpo", "cpo", "slic", "sft", "unlikelihood"),
    *("kto", "bco", "apo-zero-unpaired", "aot-unpaired", "pl-dpo", "reward"),
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
    "grpo": {"name": "grpo"},
    "dr-grpo": {"name": "grpo", "beta": 0.0, "per": "constant"},
    "rloo": {"name": "grpo", "beta": 0.0, "per": "constant", "constant": 1.0},
    "ppo": {"name": "ppo"},
}
"""What one word on the command line stands for: the settings of `loss` that a method begins with.

Every loss is a method by its own name (`sppo` is the whole method, `sppo-hard` its loss on given pairs); the others are
presets, of one loss or of a weighted sum, and those of `ONLINE_METHODS` make their own completions.
"""

ONLINE_METHODS: dict[str, dict[str, Any]] = {
    "online-dpo": {"completions": 2, "pairs": "best_worst", "batches_per_round": 1},
    "iterative-dpo": {"completions": 4, "pairs": "best_worst", "rounds": 3},
    "rso": {"completions": 64, "temperature": 0.7, "top_k": 40, "pairs": "random", "accept": 8, "accept_beta": 0.5},
    "sppo": {"completions": 5, "temperature": 0.7, "top_p": 0.9, "rounds": 3, "renew_reference": True},
    "best-of-n": {"completions": 16, "pairs": "best"},
    "grpo": {"completions": 8, "pairs": "none", "kind": "standardized", "batches_per_round": 1},
    "dr-grpo": {"completions": 8, "pairs": "none", "kind": "centered", "batches_per_round": 1},
    "rloo": {"completions": 4, "pairs": "none", "kind": "leave_one_out", "kl_weight": 0.05, "batches_per_round": 1},
    "ppo": {"pairs": "none", "kind": "gae", "kl_weight": 0.05, "whiten": True, "batches_per_round": 4},
}
"""Methods that sample completions and have them judged -> what stands where the run file says nothing.

Sources in docs/guide.md: Guo et al. 2024 (online-dpo), Liu et al. 2024 (rso), Wu et al. 2024 (sppo), Shao et al. 2024
(grpo), Liu et al. 2025 (dr-grpo), Ahmadian et al. 2024 (rloo), Ziegler et al. 2019 (ppo).
"""

ONLINE_SUMMARIES = {
    "online-dpo": "Two fresh completions of each prompt, judged, in every step (Guo et al. 2024, arXiv:2402.04792).",
    "iterative-dpo": "Rounds of sampling, judging, and DPO on the best completion against the worst.",
    "rso": "Rejection sampling: completions as if from the optimal policy, paired (Liu et al. 2024, arXiv:2309.06657).",
    "sppo": "Self-play: log-ratio towards eta (P(win) - 1/2), reference renewed (Wu et al. 2024, arXiv:2405.00675).",
    "best-of-n": "SFT on the best of n completions of each prompt.",
    "grpo": "Completions weighed against those of the same prompt (Shao et al. 2024, arXiv:2402.03300).",
    "dr-grpo": "GRPO without its favours to lengths and easy prompts (Liu et al. 2025, arXiv:2503.20783).",
    "rloo": "REINFORCE, each completion against the mean of the others (Ahmadian et al. 2024, arXiv:2402.14740).",
    "ppo": "Clipped steps, a value head, KL in the reward (Ziegler et al. 2019, arXiv:1909.08593).",
}
"""A sentence about each of them."""

RATES = {
    "sft": 2e-5,
    "best-of-n": 2e-5,
    "orpo": 8e-6,
    "kto": 5e-6,
    "reward": 1e-5,
    "grpo": 1e-6,
    "dr-grpo": 1e-6,
    "rloo": 1e-6,
    "ppo": 1e-6,
}
"""Peak learning rates of methods that want another one than DPO: sources in docs/guide.md."""


def add_methods(names: Iterable[str]) -> None:
    """Makes losses that were defined outside this package methods by their own names."""
    for name in names:
        METHODS.setdefault(name, {"name": name})

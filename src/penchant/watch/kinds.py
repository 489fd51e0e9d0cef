"""Which runs a detector is for, and small things that several of them ask of a history."""

from __future__ import annotations

from penchant.watch.history import Facts, History, Track

LOG_RATIO = (
    *("dpo", "robust", "hinge", "odpo", "dpop", "exo", "discopop", "f-dpo", "wpo", "aot", "r-dpo"),
    *("nca", "bco-pair", "apo-zero", "apo-down"),
    *("kto", "bco", "apo-zero-unpaired", "aot-unpaired", "pl-dpo"),
)
"""Losses whose reward is beta times the log-ratio of a whole completion."""

LOGISTIC = ("dpo", "robust", "odpo", "discopop", "wpo", "aot", "r-dpo", "f-dpo", "ln-dpo", "ld-dpo")
"""Losses that teach by sigmoid(-margin): a pair with a large margin teaches nothing any more."""

REFERENCE_FREE = ("simpo", "orpo", "cpo", "slic", "sft", "unlikelihood", "reward")
"""Losses without a reference: their rewards are not 0 at the start."""

WINDOW = 20
"""Lines of training that a judgement goes by."""


def compares(facts: Facts) -> bool:
    """Runs that learn from preferences: all but those that weigh sampled completions, and plain likelihood."""
    return not facts.advantages and not facts.is_any("sft", "unlikelihood")


def has_reference(facts: Facts) -> bool:
    """Runs that compare with a reference, so that rewards begin at 0."""
    return compares(facts) and not facts.is_any(*REFERENCE_FREE)


def has_log_ratios(facts: Facts) -> bool:
    """Runs whose rewards are beta times log-ratios."""
    return compares(facts) and facts.is_any(*LOG_RATIO)


def samples(facts: Facts) -> bool:
    """Runs that sample completions of their own."""
    return facts.is_online


def share_done(history: History, facts: Facts) -> float:
    """How much of the run is done, from 0 to 1; without a known end what 1,000 steps would make of it."""
    return min(1.0, history.step / (facts.total_steps or 1000))


def is_settled(history: History, facts: Facts, share: float, lines: int = WINDOW) -> bool:
    """Whether the warm-up, this share of the run and so many lines of training lie behind."""
    enough = history.has("loss", lines=lines)
    return enough and history.step > facts.warmup_steps and share_done(history, facts) >= share


def heldout_or_training(history: History, name: str) -> tuple[Track, str]:
    """The measurement on held-out examples where it was made after training began, else on those of training."""
    heldout = history[f"eval_{name}"]
    return (heldout, "held-out") if len(heldout) and heldout.recent[-1][0] > 0 else (history[name], "training")


def value_at(track: Track, step: int) -> float | None:
    """The latest value at this step or before it."""
    return next((value for at, value in reversed([*track.early, *track.recent]) if at <= step), None)


def percent(share: float) -> str:
    """`54%`, `0.4%`."""
    return f"{share:.0%}" if abs(share) >= 0.0995 else f"{share:.1%}"

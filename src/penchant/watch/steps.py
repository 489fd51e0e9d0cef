"""Detectors of the optimizer's steps: none at all, or too long."""

from __future__ import annotations

from penchant.watch.findings import Seen, Thresholds, detector
from penchant.watch.history import Facts, History
from penchant.watch.kinds import WINDOW, has_reference, is_settled, percent


@detector(
    "no-gradient",
    "the gradient is zero",
    "all",
    "No weight gets a gradient, so nothing will be learned however long it runs.",
    "Look whether the weights that should learn are trained (LoRA's target_modules), whether a loss of your own cuts "
    "the graph (detach, no_grad, rounding), and whether chosen and rejected differ at all.",
    "thresholds chosen here",
    norm=1e-8,
    lines=5,
    loss=1e-3,
)
def no_gradient(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """Several lines in a row without a gradient, while the loss is not satisfied; sampled ties are another matter."""
    norms, loss, lines = history["grad_norm"], history["loss"], int(at["lines"])
    if len(norms) < lines or max(norms.values(lines)) > at["norm"] or abs(loss.mean(lines)) < at["loss"]:
        return None
    if len(history["samples/undecided"]) and history["samples/undecided"].mean(lines) > 0.99:
        return None
    text = f"Up to step {history.step} the norm of the gradient was {norms.last:.1g} on the last {lines} lines"
    return Seen("stop", text + f", with a loss of {loss.mean(lines):.3g}", {"grad_norm": norms.last})


@detector(
    "rate-too-high",
    "steps too long: the loss rises",
    "all",
    "The steps overshoot: what one batch teaches the next one has to undo.",
    "Lower learning_rate three to ten times, or give it a longer warm-up (warmup_ratio).",
    "thresholds measured here",
    loss=0.1,
    sigmas=3.0,
    ratio=0.02,
)
def rate_too_high(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """The training loss clearly above where it began, or steps of more than a few hundredths of the weights."""
    loss, ratio = history["loss"], history["update_ratio"]
    clipped = history["grad_clipped"]
    if not is_settled(history, facts, 0.1, WINDOW):
        return None
    values: dict[str, float | int] = {"loss": loss.mean(WINDOW), "start": loss.first}
    beside = ""
    if len(ratio):
        values["update_ratio"] = ratio.mean(WINDOW)
        beside = f"; a step changes the weights by {ratio.mean(WINDOW):.1g} of their norm"
    if len(clipped):
        beside += f", and {percent(clipped.mean(WINDOW))} of the gradients were clipped"
    # Online, fresh pairs begin at the start again and again, and a policy gradient's loss is no measure at all.
    start = loss.first if has_reference(facts) else max(value for _, value in loss.early)
    rise = loss.mean(WINDOW) - start
    if not facts.is_online and rise > at["loss"] * abs(start) and rise > at["sigmas"] * loss.error(WINDOW):
        text = f"At step {history.step} the training loss is {loss.mean(WINDOW):.3g}, above {start:.3g} at the start"
        return Seen("major", text + beside, values)
    if len(ratio) >= WINDOW and ratio.mean(WINDOW) > at["ratio"]:
        text = f"At step {history.step} a step changes the weights by {ratio.mean(WINDOW):.1%} of their norm"
        return Seen("warn", text, values)
    return None

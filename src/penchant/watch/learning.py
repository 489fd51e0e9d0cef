"""Detectors of what is learned: nothing, the opposite, by heart, or too fast."""

from __future__ import annotations

import math
from itertools import pairwise

from penchant.watch.findings import Seen, Severity, Thresholds, detector
from penchant.watch.history import Facts, History
from penchant.watch.kinds import (
    LOGISTIC,
    WINDOW,
    compares,
    has_reference,
    heldout_or_training,
    is_settled,
    percent,
)


@detector(
    "weak-reference",
    "the reference finds the chosen answers very unlikely",
    "all with a reference",
    "The model was not made for answers like these, so it learns from afar: what is pushed down was hardly ever said.",
    "Train on the chosen answers first (method sft, or a run file with stages), or take answers of the model's own.",
    "Rafailov et al. 2023 (arXiv:2305.18290), section 4; Chen et al. 2024 (arXiv:2405.19534); threshold measured here",
    has_reference,
    warn=-3.0,
    major=-5.0,
)
def weak_reference(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """Log-probability a token of chosen before anything was learned, at step 0 or in the first step."""
    prefix = "eval_" if "eval_logps/chosen" in history and history["eval_logps/chosen"].early[0][0] == 0 else ""
    logps, lengths, ranked = (history[prefix + name] for name in ("logps/chosen", "length/chosen", "logps/accuracies"))
    if facts.is_online or not len(logps) or not len(lengths) or (not prefix and logps.early[0][0] > 1):
        return None
    per_token = logps.first / max(lengths.first, 1.0)
    if per_token >= at["warn"]:
        return None
    text = f"Before training a token of the chosen answers has a log-probability of {per_token:.2f} nats on average"
    values = {"nats_per_token": per_token}
    if len(ranked):
        text += f", and the reference ranks {percent(ranked.first)} of the pairs rightly"
        values["ranking_accuracy"] = ranked.first
    return Seen("major" if per_token < at["major"] else "warn", text, values)


def _is_at_chance(history: History, at: Thresholds, lines: int) -> bool:
    accuracy = history["rewards/accuracies"]
    return len(accuracy) >= lines and abs(accuracy.mean(lines) - 0.5) < at["accuracy"]


def _has_moved(history: History, at: Thresholds) -> bool:
    """Whether the policy has left its reference; TRL's logs know no KL on the data, so there by the rewards."""
    if "kl" in history:
        return history["kl"].mean(WINDOW) > at["kl"]
    sides = [history[f"rewards/{side}"].values(WINDOW) for side in ("chosen", "rejected")]
    return any(abs(value) > at["reward"] for values in sides for value in values)


@detector(
    "rate-too-low",
    "loss stuck at its start, and the weights hardly move",
    "all with a reference",
    "The steps are too small to teach anything in the length of this run.",
    "Raise learning_rate three to ten times; with LoRA look whether the adapter is trained at all.",
    "Rafailov et al. 2023 (arXiv:2305.18290): the loss begins at ln 2; thresholds measured here",
    has_reference,
    share=0.3,
    loss=0.01,
    kl=1e-4,
    reward=0.01,
)
def rate_too_low(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """The loss where it was, and the policy where its reference is; accuracy may be above chance all the same."""
    loss = history["loss"]
    if not is_settled(history, facts, at["share"]) or _has_moved(history, at) or facts.is_online:
        return None
    if abs(loss.mean(WINDOW) / loss.first - 1) > at["loss"] or not len(history["rewards/accuracies"]):
        return None
    ratio = history["update_ratio"]
    text = (
        f"After {history.step} steps the loss is {loss.mean(WINDOW):.4f}, as it was at the start ({loss.first:.4f}), "
        f"{percent(history['rewards/accuracies'].mean(WINDOW))} of the pairs are right, and the policy is where its "
        "reference is"
    )
    values = {"loss": loss.mean(WINDOW), "accuracy": history["rewards/accuracies"].mean(WINDOW)}
    if len(ratio):
        text += f"; a step changes the weights by {ratio.mean(WINDOW):.1g} of their norm"
        values["update_ratio"] = ratio.mean(WINDOW)
    return Seen("major", text, values)


@detector(
    "nothing-learned",
    "accuracy at chance although the policy moves",
    "all with a reference",
    "What tells chosen from rejected is not in the answers, or the labels are noise: the model finds no rule.",
    "Read the least learned pairs in report.html and see whether you could tell; look at where the labels come from.",
    "thresholds measured here",
    has_reference,
    share=0.5,
    accuracy=0.04,
    kl=1e-4,
    reward=0.01,
)
def nothing_learned(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """At chance over many lines, away from the reference; online, fresh pairs of alike answers are near chance."""
    lines = 2 * WINDOW
    if facts.is_online or not is_settled(history, facts, at["share"], lines) or not _has_moved(history, at):
        return None
    heldout = history["eval_rewards/accuracies"]
    if not _is_at_chance(history, at, lines) or (len(heldout) > 1 and heldout.last > 0.5 + 2 * at["accuracy"]):
        return None
    accuracy, margin = history["rewards/accuracies"].mean(lines), history["rewards/margins"].mean(lines)
    text = (
        f"Over the last {lines} lines up to step {history.step} {percent(accuracy)} of the training pairs were right "
        f"when they came, the margin was {margin:.3g}, and yet the policy has left its reference"
    )
    return Seen("major", text, {"accuracy": accuracy, "margin": margin})


@detector(
    "reversed",
    "pairs ranked the wrong way round",
    "all over preferences",
    "Something stands the wrong way round: most often the columns chosen and rejected are swapped in one of the files.",
    "Compare a few rows of both files by eye (penchant preview), and swap the columns where they are wrong.",
    "thresholds measured here",
    compares,
    below=0.45,
    sigmas=3.0,
    learned=0.6,
)
def reversed_pairs(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """Held-out pairs clearly below chance while training is above it, or training itself clearly below."""
    accuracy, heldout = history["rewards/accuracies"], history["eval_rewards/accuracies"]
    trained = accuracy.mean(WINDOW) if len(accuracy) >= WINDOW else 0.5
    # An area under a curve, or pairs: the error of a share is at most that of a coin.
    error = math.sqrt(0.25 / (facts.num_heldout or 50))
    if len(heldout) > 1 and heldout.last < min(at["below"], 0.5 - at["sigmas"] * error) and trained > at["learned"]:
        text = (
            f"At step {history.step} {percent(trained)} of the training pairs are ranked as their labels say, and of "
            f"the held-out pairs only {percent(heldout.last)}"
        )
        return Seen("major", text, {"accuracy": trained, "heldout_accuracy": heldout.last})
    # Without a reference the model begins with an order of its own, which may be the wrong one.
    if not has_reference(facts) or not is_settled(history, facts, 0.1):
        return None
    limit = min(at["below"], 0.5 - at["sigmas"] * accuracy.error(WINDOW))
    if trained < limit and history["rewards/margins"].mean(WINDOW) < 0:
        margin = history["rewards/margins"].mean(WINDOW)
        text = (
            f"Over the last {WINDOW} lines up to step {history.step} only {percent(trained)} of the training pairs "
            f"were ranked as their labels say, and the margin is {margin:.3g}"
        )
        return Seen("major", text, {"accuracy": trained, "margin": margin})
    return None


@detector(
    "overfit",
    "training pairs known by heart",
    "all over preferences",
    "The run learns its pairs by heart: what it still gains on them does not carry over.",
    "Stop earlier (save_best keeps the best step), train for one epoch, or use ipo or cdpo, which fit less closely.",
    "Azar et al. 2023 (arXiv:2310.12036), on how closely DPO fits; thresholds measured here",
    compares,
    accuracy=0.95,
    gap=0.15,
    chance=0.35,
    rise=0.01,
    times=3,
)
def overfit(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """Nearly all training pairs right and clearly fewer held-out ones, or the held-out loss up some times in a row."""
    accuracy, heldout, losses = (
        history[name] for name in ("rewards/accuracies", "eval_rewards/accuracies", "eval_loss")
    )
    if facts.is_online or len(accuracy) < 10 or len(heldout) < 2:
        return None
    trained, steps = accuracy.mean(10), losses.values()
    values = {"accuracy": trained, "heldout_accuracy": heldout.last}
    severity: Severity = "major" if steps and losses.last > losses.first else "warn"
    lead = f"At step {history.step} {percent(trained)} of the training pairs are right and "
    # Far below chance they are not unknown but the wrong way round.
    if trained >= at["accuracy"] and trained - heldout.last > at["gap"] and heldout.last > at["chance"]:
        return Seen(severity, lead + f"{percent(heldout.last)} of the held-out ones", values)
    times = int(at["times"])
    tail = steps[-times - 1 :]
    rises = [after > before + at["rise"] * abs(before) for before, after in pairwise(tail)]
    if len(rises) == times and all(rises):
        text = f"{percent(heldout.last)} of the held-out ones, and the held-out loss rose {times} times in a row, from "
        return Seen(severity, lead + text + f"{tail[0]:.3g} to {tail[-1]:.3g}", values)
    return None


@detector(
    "saturated",
    "most pairs teach nothing any more within the first epoch",
    "those with a logistic loss",
    "The pairs are too easy for so many steps, or the steps too long: what still moves is the distance, not the order.",
    "Stop here, or lower learning_rate; harder pairs, ipo (which has a target) and a smaller beta help as well.",
    "the gradient of Eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290): its weight is sigmoid(-margin); share measured",
    lambda facts: facts.is_any(*LOGISTIC) and not facts.advantages,
    share=0.5,
)
def saturated(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """More than half of the pairs of a window with sigmoid(-margin) below 0.01, not later than in the first epoch."""
    share = history["rewards/saturated"]
    is_first_epoch = facts.steps_per_epoch is None or history.step <= facts.steps_per_epoch
    if len(share) < 10 or not is_first_epoch or share.mean(10) <= at["share"]:
        return None
    text = (
        f"At step {history.step}, within the first epoch, {percent(share.mean(10))} of the pairs have a margin so large"
    )
    return Seen("warn", text + " that their gradient is below a hundredth", {"saturated": share.mean(10)})


@detector(
    "length-exploitation",
    "the margin goes by length",
    "all over preferences",
    "The policy has learned to prefer length: answers will grow, whether they get better or not.",
    "Use ld-dpo, r-dpo, ln-dpo or simpo, or balance the lengths of chosen and rejected (penchant check tells them).",
    "Park et al. 2024 (arXiv:2403.19159); thresholds measured here",
    compares,
    warn=0.5,
    major=0.8,
    accuracy=0.55,
)
def length_exploitation(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """The correlation of margin and difference in length, on held-out pairs or over a window of training."""
    track, which = heldout_or_training(history, "length/correlation")
    if facts.is_online or not is_settled(history, facts, 0.0):
        return None  # of fresh pairs the lengths are those of the policy's own answers: `answers-grow` looks at these
    if history["rewards/accuracies"].mean(WINDOW) < at["accuracy"]:
        return None
    if not len(track) or (which == "training" and len(track) < WINDOW):
        return None
    value = track.last if which == "held-out" else track.mean(WINDOW)
    if value <= at["warn"]:
        return None
    text = (
        f"At step {history.step} the margin of the {which} pairs correlates with how much longer chosen is: {value:.2f}"
    )
    return Seen("major" if value > at["major"] else "warn", text, {"correlation": value})

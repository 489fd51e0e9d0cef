"""Detectors of where the policy goes: away from the chosen answers, away from its reference, out of scale."""

from __future__ import annotations

import math

from penchant.watch.findings import Seen, Thresholds, detector
from penchant.watch.history import Facts, History
from penchant.watch.kinds import (
    WINDOW,
    compares,
    has_log_ratios,
    heldout_or_training,
    is_settled,
    percent,
    value_at,
)


@detector(
    "displaced",
    "the chosen answers themselves become unlikely",
    "all over preferences",
    "The margin grows by pushing both answers down, and what rises instead is neither of them.",
    "Add a likelihood term (method rpo, or a weighted sum with sft), use dpop or ipo, lower learning_rate, or leave "
    "near-identical pairs out.",
    "Razin et al. 2024 (arXiv:2410.08847); Pal et al. 2024 (Smaug, arXiv:2402.13228); thresholds measured here",
    compares,
    warn=0.5,
    major=1.5,
    relative_warn=0.4,
    relative_major=1.2,
)
def displaced(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """How far the log-probability of chosen has fallen: nats a token, or without lengths its share of the start."""
    if facts.is_online or not is_settled(history, facts, 0.0, 10) or history["rewards/margins"].mean(10) <= 0:
        return None
    track, which = heldout_or_training(history, "logps/chosen")
    lengths = history["eval_length/chosen" if which == "held-out" else "length/chosen"]
    if len(track) < 2 or (which == "training" and len(track) < WINDOW):
        return None
    start = track.first if which == "held-out" else track.start(10)
    fall = start - (track.last if which == "held-out" else track.mean(10))
    if which == "training" and fall < 3 * track.error(10):
        return None  # other pairs every time
    if len(lengths):
        size, unit, prefix = fall / max(lengths.mean(10), 1.0), "nats a token", ""
    else:
        size, unit, prefix = fall / max(abs(start), 1.0), "of what it was", "relative_"
    if size <= at[prefix + "warn"]:
        return None
    told = f"{size:.2f} {unit}" if not prefix else f"{percent(size)} {unit}"
    text = (
        f"At step {history.step} the log-probability of the {which} chosen answers is down by {told} (from {start:.1f}"
    )
    text += f" to {start - fall:.1f} nats an answer) while the margin is {history['rewards/margins'].mean(10):.3g}"
    return Seen("major" if size > at[prefix + "major"] else "warn", text, {"fall": size})


@detector(
    "far-from-reference",
    "the policy is far from its reference",
    "all with a reference",
    "So far out neither pairs nor judge are at home, and what the numbers say there counts for little.",
    "Stop earlier, raise beta (advantage.kl_weight with grpo and its kin), or lower learning_rate.",
    "Rafailov et al. 2024 (arXiv:2406.02900) for over-optimisation with KL; thresholds measured here",
    warn=0.5,
    major=2.0,
)
def far_from_reference(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """KL in nats a token: on held-out answers of its own, on held-out pairs, or on what is trained on."""
    answers, lengths = history["eval_answer_kl"], history["eval_answer_length"]
    if len(answers) and lengths.last > 0:
        kl, where = answers.last / lengths.last, "its own answers"
    elif len(history["eval_kl"]):
        kl, where = history["eval_kl"].last, "the held-out pairs"
    elif len(history["kl"]) >= 10:
        kl, where = history["kl"].mean(10), "what it is trained on"
    else:
        return None
    if kl <= at["warn"]:
        return None
    text = f"At step {history.step} the policy is {kl:.2f} nats a token away from its reference, on {where}"
    return Seen("major" if kl > at["major"] else "warn", text, {"kl": kl})


@detector(
    "over-optimised",
    "held-out quality falls while the distance from the reference grows",
    "all that are measured on held-out rows",
    "Past this point the policy exploits what it is trained on instead of getting better.",
    "Take the checkpoint of the best step (save_best), raise beta, or lower learning_rate.",
    "Gao et al. 2022 (arXiv:2210.10760); Rafailov et al. 2024 (arXiv:2406.02900); thresholds measured here",
    accuracy=0.05,
    sigmas=2.5,
    gain=0.5,
    kl=1.25,
)
def over_optimised(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """Score, win rate or accuracy clearly below its best, at a larger KL than then."""
    for name in ("score", "win_rate", "rewards/accuracies"):
        track = history[f"eval_{name}"]
        if len(track) < 3 or track.highest is None:
            continue
        best_at, best = track.highest
        now, drop = track.mean(2), best - track.mean(2)
        if name == "rewards/accuracies":
            least = at["accuracy"] + at["sigmas"] * math.sqrt(0.25 / (facts.num_heldout or 50))
        elif name == "win_rate":
            least = at["sigmas"] * math.sqrt(0.5 / (facts.num_heldout or 50))
        else:
            errors = history["eval_score_error"]  # which older logs do not have
            noise = errors.mean(2) if len(errors) else 0.0
            least = max(at["gain"] * (best - track.first), at["sigmas"] * noise)
        distances = next((history[k] for k in ("eval_answer_kl", "eval_kl", "kl") if len(history[k])), None)
        then = None if distances is None else value_at(distances, best_at)
        if distances is None or then is None or drop <= least or distances.mean(2) <= at["kl"] * then:
            return None
        text = (
            f"The held-out {name.removeprefix('rewards/').replace('_', ' ').replace('accuracies', 'accuracy')} was "
            f"{best:.3g} at step {best_at} and is {now:.3g} at step {history.step}, while the KL divergence from the "
            f"reference went from {then:.3g} to {distances.mean(2):.3g}"
        )
        return Seen("major", text, {"best": best, "best_step": best_at, "now": now, "kl": distances.mean(2)})
    return None


@detector(
    "margin-explosion",
    "margins out of all proportion",
    "those whose reward is a log-ratio",
    "The loss is long satisfied, and the weights run on: such a policy is often broken off its training answers.",
    "Lower learning_rate, stop earlier, take larger batches, or use ipo, whose margin has a target.",
    "reports of users, where margins of 1 to 10 go with sound models; thresholds measured here",
    has_log_ratios,
    warn=10.0,
    major=50.0,
)
def margin_explosion(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """The mean margin of a window."""
    margins = history["rewards/margins"]
    if len(margins) < 10 or margins.mean(10) <= at["warn"]:
        return None
    value = margins.mean(10)
    text = f"At step {history.step} the mean margin of the training pairs is {value:.1f}"
    return Seen("major" if value > at["major"] else "warn", text, {"margin": value})


@detector(
    "beta-too-high",
    "the loss is satisfied by next to no change",
    "those whose reward is a log-ratio",
    "With so strong an anchor the least shift fills the margin: training ends where it began.",
    "Lower beta (0.01 to 0.5 is usual), for instance with --sweep loss.beta=0.05,0.1,0.5.",
    "the reward of Rafailov et al. 2023 (arXiv:2305.18290), Eq. 5; thresholds measured here",
    has_log_ratios,
    share=0.5,
    nats=0.3,
    margin=0.5,
)
def beta_too_high(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """A margin that fills the loss, made of next to nothing in nats."""
    beta = facts.beta
    if beta is None or facts.is_online or not is_settled(history, facts, at["share"]):
        return None
    margin = history["rewards/margins"].mean(WINDOW)
    nats = margin / beta
    if margin <= at["margin"] or nats >= at["nats"]:
        return None
    text = (
        f"At step {history.step} the margin of the training pairs is {margin:.2g}, and all that the policy did for it "
        f"is to tell chosen from rejected by {nats:.2f} nats an answer (beta {beta:g})"
    )
    return Seen("warn", text, {"nats": nats, "margin": margin, "beta": beta})


@detector(
    "beta-too-low",
    "nothing holds the policy back",
    "those whose reward is a log-ratio",
    "The anchor to the reference is too weak to hold: the loss goes on asking for distance.",
    "Raise beta (0.01 to 0.5 is usual), or lower learning_rate.",
    "the reward of Rafailov et al. 2023 (arXiv:2305.18290), Eq. 5; thresholds measured here",
    has_log_ratios,
    share=0.5,
    kl=0.5,
    margin=1.0,
    accuracy=0.6,
)
def beta_too_low(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """Far from the reference, pairs mostly right, and yet small margins in units of the loss."""
    kl, accuracy, margins = (history[name] for name in ("kl", "rewards/accuracies", "rewards/margins"))
    if facts.beta is None or facts.is_online or not is_settled(history, facts, at["share"]) or len(kl) < WINDOW:
        return None
    margin = margins.mean(WINDOW)
    if kl.mean(WINDOW) <= at["kl"] or accuracy.mean(WINDOW) < at["accuracy"] or not 0 < margin < at["margin"]:
        return None
    text = (
        f"At step {history.step} the policy is {kl.mean(WINDOW):.2f} nats a token away from its reference on the "
        f"training pairs, and the margin is still only {margin:.2g} (beta {facts.beta:g})"
    )
    return Seen("warn", text, {"kl": kl.mean(WINDOW), "margin": margin, "beta": facts.beta})

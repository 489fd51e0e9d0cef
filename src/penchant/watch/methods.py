"""Detectors of single methods: KTO's anchor, IPO's target, ORPO's two terms, SimPO's margin."""

from __future__ import annotations

from penchant.watch.findings import Seen, Thresholds, detector
from penchant.watch.history import Facts, History
from penchant.watch.kinds import WINDOW, heldout_or_training, is_settled, percent


@detector(
    "kto-anchor",
    "KTO's reference point stays at 0",
    "kto",
    "The estimated KL divergence is cut off at 0, so desirable and undesirable answers are held against nothing: the "
    "policy makes all answers less likely.",
    "Balance the labels or their weights (penchant check prints them), take larger batches, lower learning_rate.",
    "Ethayarajh et al. 2024 (arXiv:2402.01306), Eq. 8; thresholds measured here",
    lambda facts: facts.is_any("kto"),
    share=0.5,
    reward=-0.5,
    margins=2.0,
)
def kto_anchor(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """The estimate 0 on every line of a window while desirable answers lose a multiple of the margin."""
    kl, chosen = history["kl_mismatched"], history["rewards/chosen"]
    if not is_settled(history, facts, at["share"]) or len(kl) < WINDOW or max(kl.values(WINDOW)) > 0:
        return None
    margin = max(history["rewards/margins"].mean(WINDOW), 0.0)
    if chosen.mean(WINDOW) >= min(at["reward"], -at["margins"] * margin):
        return None
    text = f"The estimated KL divergence was 0 on the last {WINDOW} lines up to step {history.step}, and the reward of"
    return Seen(
        "warn", f"{text} desirable answers is {chosen.mean(WINDOW):.3g}", {"chosen_reward": chosen.mean(WINDOW)}
    )


@detector(
    "ipo-target",
    "IPO's margin ends far from its target",
    "ipo",
    "IPO pulls every margin to 1/(2 beta) of log-ratio; a run that ends elsewhere was not the one that beta asks for.",
    "Below the target raise learning_rate or beta, or train for longer; above it lower learning_rate.",
    "Azar et al. 2023 (arXiv:2310.12036), Eq. 17; thresholds measured here",
    lambda facts: facts.is_any("ipo"),
    share=0.9,
    under=0.1,
    over=1.5,
)
def ipo_target(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """The mean margin against its target, which is 1/2 in units of the reward."""
    margins = history["rewards/margins"]
    if not is_settled(history, facts, at["share"], 10):
        return None
    value = margins.mean(10) / 0.5
    if at["under"] <= value <= at["over"]:
        return None
    text = f"At step {history.step} the mean margin is {value:.2g} times the target of the loss"
    return Seen("warn", text, {"times": value})


@detector(
    "orpo-balance",
    "ORPO's likelihood and odds pull apart",
    "orpo",
    "One of the two terms has the other one overruled.",
    "Lower odds_ratio_weight.",
    "Hong et al. 2024 (arXiv:2403.07691), Eq. 6 and 7; thresholds measured here",
    lambda facts: facts.is_any("orpo"),
    rise=0.1,
    share=0.5,
    odds=0.02,
    fall=0.1,
)
def orpo_balance(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """The likelihood of chosen falling, or rising with no gain of the odds at all."""
    logps, which = heldout_or_training(history, "logps/chosen")
    lengths = history["eval_length/chosen" if which == "held-out" else "length/chosen"]
    margins = history["eval_rewards/margins" if which == "held-out" else "rewards/margins"]
    if not is_settled(history, facts, at["share"]) or len(logps) < 2 or not len(lengths):
        return None
    lines = 1 if which == "held-out" else 10
    before, after = -logps.start(lines) / lengths.start(lines), -logps.mean(lines) / lengths.mean(lines)
    change, gain = after / before - 1, margins.mean(lines) - margins.start(lines)
    values = {"nll_before": before, "nll": after, "log_odds_gain": gain}
    lead = f"At step {history.step} the {which} chosen answers cost {after:.3g} nats a token, {before:.3g} at the start"
    if change > at["rise"]:
        return Seen("major", f"{lead}: the odds are bought with likelihood", values)
    if change < -at["fall"] and gain < at["odds"]:
        text = (
            f"{lead}, and the log-odds of chosen over rejected have gained {gain:.2g}: only the likelihood is learned"
        )
        return Seen("warn", text, values, "Raise odds_ratio_weight.")
    return None


@detector(
    "simpo-margin",
    "SimPO's target margin is out of reach",
    "simpo",
    "The pairs cannot be told apart by so many nats a token; the loss goes on pushing, at the cost of the answers.",
    "Lower gamma_beta_ratio (or beta), or add a likelihood term with a weighted sum.",
    "Meng et al. 2024 (arXiv:2405.14734), Eq. 6; thresholds measured here",
    lambda facts: facts.is_any("simpo"),
    share=0.7,
    reached=0.2,
    likelihood=2.0,
)
def simpo_margin(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """The margin far below gamma near the end, or chosen at a multiple of its cost a token."""
    beta, ratio = facts.beta, facts.settings.get("gamma_beta_ratio")
    margins, chosen = history["rewards/margins"], history["rewards/chosen"]
    if beta is None or not is_settled(history, facts, 0.1):
        return None
    before, after = -chosen.start(3) / beta, -chosen.mean(10) / beta
    if before > 0 and after > at["likelihood"] * before:
        text = f"At step {history.step} the chosen answers cost {after:.3g} nats a token, {before:.3g} at the start"
        return Seen("major", text, {"nll_before": before, "nll": after})
    if not isinstance(ratio, int | float) or not is_settled(history, facts, at["share"]):
        return None
    gamma = beta * ratio
    if margins.mean(WINDOW) >= at["reached"] * gamma:
        return None
    text = (
        f"At step {history.step} the mean margin is {margins.mean(WINDOW):.3g}, {percent(margins.mean(WINDOW) / gamma)}"
    )
    return Seen("warn", f"{text} of the target gamma, which is {gamma:.3g}", {"margin": margins.mean(WINDOW)})

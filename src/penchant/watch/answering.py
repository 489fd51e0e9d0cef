"""Detectors of what the policy itself says: length, repetition, sameness, and rounds that teach nothing."""

from __future__ import annotations

from penchant.watch.findings import Seen, Severity, Thresholds, detector
from penchant.watch.history import Facts, History, Track
from penchant.watch.kinds import percent, samples, share_done

_LINES = 5
"""Rounds that a judgement goes by."""


def _of_answers(history: History, name: str, heldout: str) -> tuple[Track, str, int]:
    """What is measured of sampled answers: of the rounds where there are some, else of held-out prompts."""
    rounds = history[f"samples/{name}"]
    if len(rounds) >= 2 * _LINES:
        return rounds, "answers trained on", _LINES
    return history[f"eval_{heldout}"], "held-out answers", 1


def _rose(track: Track) -> bool:
    return len(track) > 1 and track.last > track.first


@detector(
    "answers-grow",
    "answers grow longer and longer",
    "those that sample",
    "Longer answers often please a judge whatever they say; the policy may be after length alone.",
    "Take what length earns out of the judge, or compare at equal lengths (penchant eval does); raise beta.",
    "Singhal et al. 2023 (arXiv:2310.03716); Park et al. 2024 (arXiv:2403.19159); thresholds measured here",
    samples,
    warn=1.5,
    major=2.5,
    sigmas=3.0,
)
def answers_grow(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """Mean length against that at the start."""
    track, which, lines = _of_answers(history, "length", "answer_length")
    if len(track) < 2 or track.start(lines) <= 0:
        return None
    ratio = track.mean(lines) / track.start(lines)
    rise = track.mean(lines) - track.start(lines)
    if ratio <= at["warn"] or (lines > 1 and rise <= at["sigmas"] * track.error(lines)):
        return None
    text = (
        f"At step {history.step} the {which} have {track.mean(lines):.0f} tokens, {ratio:.1f} times as many as at the"
    )
    return Seen("major" if ratio > at["major"] else "warn", f"{text} start", {"ratio": ratio})


@detector(
    "unfinished",
    "answers do not come to an end",
    "those that sample",
    "Answers that are cut off are judged by their beginning, and the policy does not learn to stop.",
    "Raise sampling.max_new_tokens, give unfinished answers a score of their own (advantage.unfinished_score), or "
    "train with sft on answers that end.",
    "thresholds measured here",
    samples,
    warn=0.3,
    major=0.6,
)
def unfinished(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """The share of answers that hit the limit of tokens."""
    track, which, lines = _of_answers(history, "finished", "finished")
    if not len(track):
        return None
    share = 1 - track.mean(lines)
    if share <= at["warn"]:
        return None
    text = f"At step {history.step} {percent(share)} of the {which} were cut off at the limit of "
    limit = f"{facts.max_new_tokens} tokens" if facts.max_new_tokens else "tokens"
    return Seen("major" if share > at["major"] else "warn", text + limit, {"unfinished": share})


@detector(
    "repetition",
    "answers repeat themselves",
    "those that sample",
    "The policy has found phrases that pay. Where the score rises with them, it is the judge that is being exploited.",
    "Stop, read the latest answers, mend the judge or rule, and raise beta or advantage.kl_weight.",
    "Welleck et al. 2020 (arXiv:1908.04319); Li et al. 2016 (arXiv:1510.03055); thresholds measured here",
    samples,
    repeated=0.15,
    distinct=0.5,
)
def repetition(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """More repeated 4-grams than at the start, or far fewer different bigrams in as many answers."""
    repeated, which, lines = _of_answers(history, "repeated_4", "repeated_4")
    distinct, *_ = _of_answers(history, "distinct_2", "distinct_2")
    score, *_ = _of_answers(history, "score", "score")
    severity: Severity = "major" if _rose(score) else "warn"
    rises = ", while the score rose" if severity == "major" else ""
    if len(repeated) > 1:
        now, before = repeated.mean(lines), repeated.start(lines)
        if now > max(2 * before, before + at["repeated"]):
            text = f"At step {history.step} {percent(now)} of the 4-grams within the {which} are repetitions, "
            return Seen(severity, f"{text}{percent(before)} at the start{rises}", {"repeated_4": now})
    if len(distinct) > 1:
        now, before = distinct.mean(lines), distinct.start(lines)
        if now < at["distinct"] * before:
            text = f"At step {history.step} {percent(now)} of the bigrams of the {which} are different ones, "
            return Seen(severity, f"{text}{percent(before)} at the start{rises}", {"distinct_2": now})
    return None


@detector(
    "mode-collapse",
    "always the same answer",
    "those that sample",
    "The policy has stopped exploring: fresh answers differ too little for a judge to choose among them.",
    "Raise beta or advantage.kl_weight, lower learning_rate, and see whether one answer fits all prompts.",
    "Kirk et al. 2023 (arXiv:2310.06452) for the loss of diversity; thresholds measured here",
    samples,
    entropy=0.5,
    opening=0.5,
    rise=0.3,
)
def mode_collapse(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """The policy's entropy on its own tokens, and how many answers open with the same words."""
    entropy = history["entropy"]
    if len(entropy) >= 10 and entropy.mean(5) < at["entropy"] * entropy.start(3):
        text = f"At step {history.step} the entropy of the next token is {entropy.mean(5):.2g} nats"
        return Seen("warn", f"{text}, {entropy.start(3):.2g} at the start", {"entropy": entropy.mean(5)})
    opening, which, lines = _of_answers(history, "same_opening", "same_opening")
    if len(opening) < 2:
        return None
    now, before = opening.mean(lines), opening.start(lines)
    if now <= at["opening"] or now - before <= at["rise"]:
        return None
    text = (
        f"At step {history.step} {percent(now)} of the {which} open with the same words, {percent(before)} at the start"
    )
    return Seen("warn", text, {"same_opening": now})


@detector(
    "undecided",
    "the judge sees no difference between the answers to most prompts",
    "those that sample",
    "These prompts are lost to training: their answers are too alike, the prompts too easy or too hard, or the judge "
    "is too coarse.",
    "Raise sampling.temperature or sampling.completions, choose other prompts, or take a finer judge.",
    "Yu et al. 2025 (DAPO, arXiv:2503.14476), dynamic sampling; threshold chosen here",
    samples,
    share=0.5,
    rounds=3,
)
def undecided(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """The share of prompts whose answers all score alike, over the latest rounds."""
    track = history["samples/undecided"]
    rounds = min(int(at["rounds"]), facts.rounds or 1)
    if len(track) < rounds or track.mean(_LINES) <= at["share"]:
        return None
    lines = min(_LINES, len(track))
    text = (
        f"Up to step {history.step} the answers to {percent(track.mean(_LINES))} of the prompts scored alike (over the"
    )
    return Seen("warn", f"{text} last {lines} rounds told of)", {"undecided": track.mean(_LINES)})


@detector(
    "low-acceptance",
    "rejection sampling accepts next to nothing",
    "rso",
    "What it keeps is hardly more than the best few answers, not what the optimal policy would say.",
    "Raise online.accept_beta or sampling.completions.",
    "Liu et al. 2023 (RSO, arXiv:2309.06657); threshold chosen here",
    samples,
    share=0.05,
)
def low_acceptance(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """The share of answers that would be accepted at first sight."""
    track = history["samples/acceptance"]
    if not len(track) or track.mean(_LINES) >= at["share"]:
        return None
    text = f"Up to step {history.step} rejection sampling accepts {percent(track.mean(_LINES))} of the answers at first"
    return Seen("warn", f"{text} sight", {"acceptance": track.mean(_LINES)})


@detector(
    "clipped-tokens",
    "too many tokens are clipped",
    "grpo and its kin, ppo",
    "The policy has moved so far within a round that most of what was sampled teaches nothing any more.",
    "Lower learning_rate, take fewer steps a round (num_train_epochs), or smaller rounds (online.prompts_per_round).",
    "Schulman et al. 2017 (PPO, arXiv:1707.06347), Eq. 7; thresholds measured here",
    lambda facts: facts.advantages,
    warn=0.2,
    major=0.5,
)
def clipped_tokens(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """The share of tokens beyond the clip range, over the latest lines."""
    track = history["clipped"]
    if len(track) < 10 or track.mean(10) <= at["warn"]:
        return None
    share = track.mean(10)
    text = f"On the last 10 lines up to step {history.step} {percent(share)} of the tokens were clipped"
    return Seen("major" if share > at["major"] else "warn", text, {"clipped": share})


@detector(
    "blind-values",
    "the value head foresees nothing",
    "ppo",
    "Advantages are then as noisy as the rewards themselves, and training is slow and unsteady.",
    "Raise advantage.value_learning_rate, or use rloo or grpo, which need no value head.",
    "Schulman et al. 2016 (GAE, arXiv:1506.02438); thresholds measured here",
    lambda facts: facts.is_any("ppo"),
    explained=0.01,
    rounds=8,
    share=0.5,
)
def blind_values(history: History, facts: Facts, at: Thresholds) -> Seen | None:
    """The share of the returns' variance that the values foresaw, late in the run."""
    track = history["samples/explained"]
    if len(track) < at["rounds"] or share_done(history, facts) < at["share"]:
        return None
    if max(track.values(_LINES)) >= at["explained"]:  # single rounds are noisy, and the noise goes both ways
        return None
    share = track.mean(_LINES)
    text = f"Up to step {history.step} the value head foresaw {percent(share)} of the variance of the returns"
    return Seen("warn", text, {"explained": share})

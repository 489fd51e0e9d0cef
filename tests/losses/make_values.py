"""Makes values.json: every loss by its paper's equation, in 50 digits, with nothing of this package and no torch.

    python tests/losses/make_values.py

Each function is the equation as printed, without a rearrangement for the sake of numerics: the digits are many enough.
It takes a batch of inputs and hyperparameters and gives the loss of each example and the implicit rewards. Inputs are
whole multiples of 1/64, so float32 holds them and their differences exactly. Who changes them also has to run
make_trl_values.py again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import product
from math import lcm
from pathlib import Path
from typing import Any

from mpmath import diff, exp, log, mp, mpf

mp.dps = 50

Batch = dict[str, Any]
Values = list[Any]
PATH = Path(__file__).with_name("values.json")


def sigmoid(x: Any) -> Any:
    return 1 / (1 + exp(-x))


def log_sigmoid(x: Any) -> Any:
    return log(sigmoid(x))


def mean(values: Values) -> Any:
    return sum(values, mpf(0)) / len(values)


# Pairs: r(y) = log pi(y|x) - log pi_ref(y|x), h = r(chosen) - r(rejected).


def log_ratios(pairs: Batch) -> tuple[Values, Values]:
    won = [policy - ref for policy, ref in zip(pairs["policy_chosen"], pairs["ref_chosen"], strict=True)]
    lost = [policy - ref for policy, ref in zip(pairs["policy_rejected"], pairs["ref_rejected"], strict=True)]
    return won, lost


def per_token(sums: Values, lengths: list[int]) -> Values:
    return [total / length for total, length in zip(sums, lengths, strict=True)]


def each(loss: Callable[..., Any], *columns: Values) -> Values:
    return [loss(*row) for row in zip(*columns, strict=True)]


def on_rewards(won: Values, lost: Values, beta: Any, loss: Callable[..., Any], *columns: Values) -> tuple[Values, Any]:
    """`loss(beta won, beta lost, ...)` of each pair; the rewards are beta won and beta lost."""
    rewards = [beta * r for r in won], [beta * r for r in lost]
    return each(loss, *rewards, *columns), rewards


def dpo(pairs: Batch, beta: Any, label_smoothing: Any) -> tuple[Values, Any]:
    e = label_smoothing
    return on_rewards(*log_ratios(pairs), beta, lambda w, lo: -(1 - e) * log_sigmoid(w - lo) - e * log_sigmoid(lo - w))


def robust(pairs: Batch, beta: Any, label_smoothing: Any) -> tuple[Values, Any]:
    e = label_smoothing
    return on_rewards(
        *log_ratios(pairs),
        beta,
        lambda w, lo: ((1 - e) * -log_sigmoid(w - lo) - e * -log_sigmoid(lo - w)) / (1 - 2 * e),
    )


def ipo(pairs: Batch, beta: Any, length_normalize: bool) -> tuple[Values, Any]:
    won, lost = log_ratios(pairs)
    if length_normalize:
        won, lost = per_token(won, pairs["chosen_lengths"]), per_token(lost, pairs["rejected_lengths"])
    losses = each(lambda w, lo: (w - lo - 1 / (2 * beta)) ** 2, won, lost)
    return losses, ([beta * r for r in won], [beta * r for r in lost])


def hinge(pairs: Batch, beta: Any) -> tuple[Values, Any]:
    return on_rewards(*log_ratios(pairs), beta, lambda w, lo: max(mpf(0), 1 - (w - lo)))


def odpo(pairs: Batch, beta: Any, alpha: Any) -> tuple[Values, Any]:
    return on_rewards(*log_ratios(pairs), beta, lambda w, lo, m: -log_sigmoid(w - lo - alpha * m), pairs["margins"])


def dpop(pairs: Batch, beta: Any, penalty: Any) -> tuple[Values, Any]:
    won, lost = log_ratios(pairs)
    losses = each(lambda w, lo: -log_sigmoid(beta * (w - lo - penalty * max(mpf(0), -w))), won, lost)
    return losses, ([beta * r for r in won], [beta * r for r in lost])


def exo(pairs: Batch, beta: Any, label_smoothing: Any) -> tuple[Values, Any]:
    def reverse_kl(w: Any, lo: Any) -> Any:
        model = exp(w) / (exp(w) + exp(lo)), exp(lo) / (exp(w) + exp(lo))
        label = 1 - label_smoothing, label_smoothing
        return sum(q * log(q / p) for q, p in zip(model, label, strict=True))

    return on_rewards(*log_ratios(pairs), beta, reverse_kl)


def discopop(pairs: Batch, beta: Any, tau: Any) -> tuple[Values, Any]:
    def blend(w: Any, lo: Any) -> Any:
        gate = sigmoid((w - lo) / tau)
        return (1 - gate) * -log_sigmoid(w - lo) + gate * exp(-(w - lo))

    return on_rewards(*log_ratios(pairs), beta, blend)


def f_dpo(pairs: Batch, beta: Any, divergence: str, alpha: Any) -> tuple[Values, Any]:
    """f itself from the definition D_f = E_ref f(pi / pi_ref); its slope is taken by differences."""

    def f(u: Any) -> Any:
        if divergence == "reverse_kl":
            return u * log(u) - u  # less u, which moves the slope by a constant
        if divergence == "forward_kl":
            return -log(u)
        if divergence == "js":
            return u * log(u) - (u + 1) * log((u + 1) / 2)
        return (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))

    won, lost = ([diff(f, exp(r)) for r in side] for side in log_ratios(pairs))
    return on_rewards(won, lost, beta, lambda w, lo: -log_sigmoid(w - lo))


def wpo(pairs: Batch, beta: Any) -> tuple[Values, Any]:
    def weight(side: str) -> Values:
        rows = zip(pairs[f"policy_{side}_tokens"], pairs[f"{side}_log_collisions"], strict=True)
        return [exp(mean([p - c for p, c in zip(*row, strict=True)])) for row in rows]

    return on_rewards(
        *log_ratios(pairs),
        beta,
        lambda w, lo, a, b: -min(mpf(1), a * b) * log_sigmoid(w - lo),
        weight("chosen"),
        weight("rejected"),
    )


def aot(pairs: Batch, beta: Any, label_smoothing: Any) -> tuple[Values, Any]:
    policy = each(lambda w, lo: w - lo, pairs["policy_chosen"], pairs["policy_rejected"])
    ref = sorted(each(lambda w, lo: w - lo, pairs["ref_chosen"], pairs["ref_rejected"]))
    losses = []
    for value in policy:
        d = beta * (value - ref[sum(other < value for other in policy)])  # ref's value of the same rank
        losses.append(-(1 - label_smoothing) * log_sigmoid(d) - label_smoothing * log_sigmoid(-d))
    won, lost = log_ratios(pairs)
    return losses, ([beta * r for r in won], [beta * r for r in lost])


def ln_dpo(pairs: Batch, beta: Any) -> tuple[Values, Any]:
    won, lost = log_ratios(pairs)
    won, lost = per_token(won, pairs["chosen_lengths"]), per_token(lost, pairs["rejected_lengths"])
    return on_rewards(won, lost, beta, lambda w, lo: -log_sigmoid(w - lo))


def r_dpo(pairs: Batch, beta: Any, alpha: Any) -> tuple[Values, Any]:
    return on_rewards(
        *log_ratios(pairs),
        beta,
        lambda w, lo, a, b: -log_sigmoid(w - lo + alpha * a - alpha * b),
        pairs["chosen_lengths"],
        pairs["rejected_lengths"],
    )


def ld_dpo(pairs: Batch, beta: Any, alpha: Any) -> tuple[Values, Any]:
    shared = [min(a, b) for a, b in zip(pairs["chosen_lengths"], pairs["rejected_lengths"], strict=True)]

    def log_ratio(side: str) -> Values:
        rows = zip(pairs[f"policy_{side}_tokens"], pairs[f"ref_{side}_tokens"], shared, strict=True)
        return [
            sum(policy[:s]) + alpha * sum(policy[s:]) - sum(ref[:s]) - alpha * sum(ref[s:]) for policy, ref, s in rows
        ]

    return on_rewards(log_ratio("chosen"), log_ratio("rejected"), beta, lambda w, lo: -log_sigmoid(w - lo))


def nca(pairs: Batch, beta: Any) -> tuple[Values, Any]:
    return on_rewards(
        *log_ratios(pairs), beta, lambda w, lo: -log_sigmoid(w) - log_sigmoid(-w) / 2 - log_sigmoid(-lo) / 2
    )


def bco_pair(pairs: Batch, beta: Any) -> tuple[Values, Any]:
    won, lost = log_ratios(pairs)
    shift = beta * mean(won + lost)
    return on_rewards(won, lost, beta, lambda w, lo: -log_sigmoid(w - shift) - log_sigmoid(-(lo - shift)))


def apo_zero(pairs: Batch, beta: Any) -> tuple[Values, Any]:
    return on_rewards(*log_ratios(pairs), beta, lambda w, lo: 1 - sigmoid(w) + sigmoid(lo))


def apo_down(pairs: Batch, beta: Any) -> tuple[Values, Any]:
    return on_rewards(*log_ratios(pairs), beta, lambda w, lo: sigmoid(w) + 1 - sigmoid(w - lo))


def sppo(pairs: Batch, eta: Any, soft: bool) -> tuple[Values, Any]:
    won, lost = log_ratios(pairs)
    chances = pairs["win_probabilities"] if soft else [[mpf(1), mpf(0)]] * len(won)
    half = mpf(1) / 2
    losses = each(
        lambda w, lo, p: half * (w - eta * (p[0] - half)) ** 2 + half * (lo - eta * (p[1] - half)) ** 2,
        won,
        lost,
        chances,
    )
    return losses, ([r / eta for r in won], [r / eta for r in lost])


def simpo(pairs: Batch, beta: Any, gamma_beta_ratio: Any) -> tuple[Values, Any]:
    gamma = beta * gamma_beta_ratio
    won = per_token(pairs["policy_chosen"], pairs["chosen_lengths"])
    lost = per_token(pairs["policy_rejected"], pairs["rejected_lengths"])
    return on_rewards(won, lost, beta, lambda w, lo: -log_sigmoid(w - lo - gamma))


def orpo(pairs: Batch, odds_ratio_weight: Any, nll_on_prompt: bool) -> tuple[Values, Any]:
    def odds(side: str) -> Values:
        p = [exp(lp) for lp in per_token(pairs[f"policy_{side}"], pairs[f"{side}_lengths"])]
        return [each_p / (1 - each_p) for each_p in p]

    likelihood, lengths = pairs["policy_chosen"], pairs["chosen_lengths"]
    if nll_on_prompt:
        likelihood = each(lambda a, b: a + b, likelihood, pairs["policy_prompt"])
        lengths = each(lambda a, b: a + b, lengths, pairs["prompt_lengths"])
    won, lost = odds("chosen"), odds("rejected")
    losses = each(
        lambda lp, w, lo: -lp + odds_ratio_weight * -log_sigmoid(log(w / lo)), per_token(likelihood, lengths), won, lost
    )
    return losses, ([log(o) for o in won], [log(o) for o in lost])


def cpo(pairs: Batch, beta: Any, nll_weight: Any) -> tuple[Values, Any]:
    return on_rewards(
        pairs["policy_chosen"],
        pairs["policy_rejected"],
        beta,
        lambda w, lo, lp: -log_sigmoid(w - lo) - nll_weight * lp,
        per_token(pairs["policy_chosen"], pairs["chosen_lengths"]),
    )


def slic(pairs: Batch, beta: Any) -> tuple[Values, Any]:
    return on_rewards(pairs["policy_chosen"], pairs["policy_rejected"], beta, lambda w, lo: max(mpf(0), 1 - (w - lo)))


def likelihood_losses(logps: Values, lengths: list[int], is_trained: list[bool], per: str, tokens: Any) -> Values:
    """By token, their mean over the batch is the mean over all trained tokens."""
    if per == "sequence":
        return [-lp / n if trained else mpf(0) for lp, n, trained in zip(logps, lengths, is_trained, strict=True)]
    if tokens is None:
        tokens = mpf(sum(n for n, trained in zip(lengths, is_trained, strict=True) if trained)) / len(lengths)
    return [-lp / tokens if trained else mpf(0) for lp, trained in zip(logps, is_trained, strict=True)]


def sft(batch: Batch, per: str) -> tuple[Values, Any]:
    tokens = batch.get("tokens_per_example")
    if "is_desirable" in batch:
        losses = likelihood_losses(batch["policy"], batch["lengths"], batch["is_desirable"], per, tokens)
        return losses, per_token(batch["policy"], batch["lengths"])
    every = [True] * len(batch["policy_chosen"])
    losses = likelihood_losses(batch["policy_chosen"], batch["chosen_lengths"], every, per, tokens)
    return losses, tuple(
        per_token(batch[f"policy_{side}"], batch[f"{side}_lengths"]) for side in ("chosen", "rejected")
    )


# Single completions, desirable or not.


def on_sequences(sequences: Batch, beta: Any, desirable: Callable, undesirable: Callable) -> tuple[Values, Any]:
    rewards = [beta * (policy - ref) for policy, ref in zip(sequences["policy"], sequences["ref"], strict=True)]
    judged = zip(rewards, sequences["is_desirable"], strict=True)
    return [desirable(r) if good else undesirable(r) for r, good in judged], rewards


def kto(sequences: Batch, beta: Any, desirable_weight: Any, undesirable_weight: Any) -> tuple[Values, Any]:
    z = beta * sequences["kl"]
    return on_sequences(
        sequences,
        beta,
        lambda r: desirable_weight * (1 - sigmoid(r - z)),
        lambda r: undesirable_weight * (1 - sigmoid(z - r)),
    )


def bco(sequences: Batch, beta: Any) -> tuple[Values, Any]:
    _, rewards = on_sequences(sequences, beta, mpf, mpf)
    sides = [
        [r for r, good in zip(rewards, sequences["is_desirable"], strict=True) if good == wanted]
        for wanted in (True, False)
    ]
    shift = mean([mean(side) for side in sides if side])
    return on_sequences(sequences, beta, lambda r: -log_sigmoid(r - shift), lambda r: -log_sigmoid(-(r - shift)))


def apo_zero_unpaired(sequences: Batch, beta: Any) -> tuple[Values, Any]:
    return on_sequences(sequences, beta, lambda r: 1 - sigmoid(r), sigmoid)


def aot_unpaired(sequences: Batch, beta: Any, label_smoothing: Any) -> tuple[Values, Any]:
    """Both sides are repeated to one common number and held against each other in order."""
    _, rewards = on_sequences(sequences, beta, mpf, mpf)
    places = {
        wanted: sorted((r, n) for n, r in enumerate(rewards) if sequences["is_desirable"][n] == wanted)
        for wanted in (True, False)
    }
    losses = [mpf(0)] * len(rewards)
    if not places[True] or not places[False]:
        return losses, rewards
    number = lcm(len(places[True]), len(places[False]))
    good, bad = ([place for place in side for _ in range(number // len(side))] for side in places.values())
    for (high, first), (low, second) in zip(good, bad, strict=True):
        d = high - low
        couple = -(1 - label_smoothing) * log_sigmoid(d) - label_smoothing * log_sigmoid(-d)
        for place in (first, second):  # half of it at each; the mean over completions is the mean over couples
            losses[place] += couple / 2 * len(rewards) / number
    return losses, rewards


# Rankings, the best first.


def pl_dpo(rankings: Batch, beta: Any) -> tuple[Values, Any]:
    losses, rewards = [], []
    for policy, ref in zip(rankings["policy"], rankings["ref"], strict=True):
        scores = [beta * (p - q) for p, q in zip(policy, ref, strict=True)]
        chance = mpf(1)
        for k, score in enumerate(scores):
            chance *= exp(score) / sum(exp(rest) for rest in scores[k:])
        losses.append(-log(chance))
        rewards.append(scores)
    return losses, rewards


# Without a reference: unlikelihood, and scores in the place of log-probabilities.


def unlikelihood(pairs: Batch, alpha: Any) -> tuple[Values, Any]:
    losses = [
        -sum(chosen) - alpha * sum(log(1 - exp(logp)) for logp in rejected)
        for chosen, rejected in zip(pairs["policy_chosen_tokens"], pairs["policy_rejected_tokens"], strict=True)
    ]
    return losses, (pairs["policy_chosen"], pairs["policy_rejected"])


def reward(pairs: Batch, alpha: Any, centering: Any) -> tuple[Values, Any]:
    won, lost = pairs["policy_chosen"], pairs["policy_rejected"]
    losses = [
        -log_sigmoid(w - lo - alpha * m) + centering * (w + lo) ** 2
        for w, lo, m in zip(won, lost, pairs["margins"], strict=True)
    ]
    return losses, (won, lost)


# Sampled completions, token by token.


def surrogate(ratio: Any, advantage: Any, low: Any, high: Any) -> Any:
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def by_completion(rollouts: Batch, *names: str) -> list[list[tuple[Any, ...]]]:
    """Of each completion the tokens, each with its numbers of these names."""
    tokens, found = list(zip(*(rollouts[name] for name in names), strict=True)), []
    for length in rollouts["lengths"]:
        found.append(tokens[:length])
        tokens = tokens[length:]
    return found


def risen(rollouts: Batch) -> Values:
    return [sum(now - old for now, old in own) for own in by_completion(rollouts, "policy_now", "old")]


def grpo(rollouts: Batch, clip: Any, clip_high: Any, beta: Any, per: str, constant: Any) -> tuple[Values, Any]:
    losses = []
    for own in by_completion(rollouts, "policy_now", "old", "ref_now", "advantages"):
        tokens = [
            surrogate(exp(now - old), advantage, clip, clip if clip_high is None else clip_high)
            + beta * (exp(ref - now) - (ref - now) - 1)
            for now, old, ref, advantage in own
        ]
        size = {"sequence": len(own), "token": mean(rollouts["lengths"]), "constant": constant}[per]
        losses.append(sum(tokens) / size)
    return losses, risen(rollouts)


def ppo(rollouts: Batch, clip: Any, clip_high: Any, value_weight: Any, value_clip: Any) -> tuple[Values, Any]:
    losses = []
    names = ("policy_now", "old", "advantages", "values", "old_values", "returns")
    for own in by_completion(rollouts, *names):
        tokens = []
        for now, old, advantage, value, before, to_come in own:
            near = min(max(value, before - value_clip), before + value_clip)
            error = max((value - to_come) ** 2, (near - to_come) ** 2) / 2
            high = clip if clip_high is None else clip_high
            tokens.append(surrogate(exp(now - old), advantage, clip, high) + value_weight * error)
        losses.append(sum(tokens) / mean(rollouts["lengths"]))
    return losses, risen(rollouts)


# Inputs.


def make_inputs() -> dict[str, Batch]:
    """Log-probabilities of -5 to -300 nats, lengths of 1 to 200; every set on its own seed."""
    source = random.Random(7)

    def number(low: float, high: float) -> float:
        return round(source.uniform(low, high) * 64) / 64

    def sums(lengths: list[int]) -> list[float]:
        drawn = [-number(0.4, 2.5) * length for length in lengths]
        return [
            value if -300 <= value <= -5 else number(-300, -250) if value < -5 else number(-20, -5) for value in drawn
        ]

    def near(values: list[float], spread: float) -> list[float]:
        return [min(value + number(-spread, spread), -1 / 64) for value in values]

    pairs: Batch = {
        "chosen_lengths": [1, 200, 12, 57, 88, 140, 33, 5],
        "rejected_lengths": [4, 170, 12, 90, 41, 1, 60, 19],
    }
    for side in ("chosen", "rejected"):
        pairs[f"policy_{side}"] = sums(pairs[f"{side}_lengths"])
        pairs[f"ref_{side}"] = near(pairs[f"policy_{side}"], 24)
    pairs["margins"] = [number(0.1, 4) for _ in range(8)]
    pairs["win_probabilities"] = [[number(0.4, 1), number(0, 0.6)] for _ in range(8)]
    pairs["prompt_lengths"] = [source.randint(1, 90) for _ in range(8)]
    pairs["policy_prompt"] = sums(pairs["prompt_lengths"])

    tokens: Batch = {"chosen_lengths": [3, 41, 1, 90, 17], "rejected_lengths": [9, 17, 26, 44, 17]}
    for side in ("chosen", "rejected"):
        policy = [[number(-5, 0) for _ in range(length)] for length in tokens[f"{side}_lengths"]]
        ref = [near(row, 1) for row in policy]
        tokens[f"policy_{side}_tokens"], tokens[f"ref_{side}_tokens"] = policy, ref
        tokens[f"policy_{side}"], tokens[f"ref_{side}"] = [sum(row) for row in policy], [sum(row) for row in ref]
        # Some completions likelier than a sample (their weight is cut off at 1), some less likely.
        usual = [-3.5, -2.0, -2.75, -2.25, -1.5]
        tokens[f"{side}_log_collisions"] = [
            near([usual[n]] * length, 1) for n, length in enumerate(tokens[f"{side}_lengths"])
        ]

    def sequences(is_desirable: list[bool], kl: float) -> Batch:
        lengths = [source.randint(1, 200) for _ in is_desirable]
        policy = sums(lengths)
        return {
            "policy": policy,
            "ref": near(policy, 24),
            "lengths": lengths,
            "is_desirable": is_desirable,
            "kl": kl,
        }

    rankings: Batch = {"lengths": [[source.randint(1, 200) for _ in range(k)] for k in (3, 5, 2, 4)]}
    rankings["policy"] = [sums(row) for row in rankings["lengths"]]
    rankings["ref"] = [near(row, 24) for row in rankings["policy"]]
    made = {
        "pairs": pairs,
        "token pairs": tokens,
        "sequences": sequences([True, False] * 4, 2.5),
        "uneven sequences": sequences([True, False, False, True, False, True, False, False, True, False], 0.0),
        "desirable sequences": sequences([True] * 3, 1.0),
        "rankings": rankings,
    }
    # Later kinds come last: their numbers must not change those before them.
    rollouts: Batch = {"lengths": [7, 1, 19, 4]}
    num_tokens = sum(rollouts["lengths"])
    rollouts["policy_now"] = [number(-5, -1 / 64) for _ in range(num_tokens)]
    rollouts["old"], rollouts["ref_now"] = near(rollouts["policy_now"], 1), near(rollouts["policy_now"], 2)
    for name in ("advantages", "values", "returns"):
        rollouts[name] = [number(-2, 2) for _ in range(num_tokens)]
    rollouts["old_values"] = [value + number(-0.5, 0.5) for value in rollouts["values"]]
    scores = {**pairs, "policy_chosen": [], "policy_rejected": []}
    for side in ("chosen", "rejected"):
        scores[f"policy_{side}"] = [number(-4, 4) for _ in range(8)]
    unsure = {**tokens, "policy_rejected_tokens": [near(row, 0) for row in tokens["policy_rejected_tokens"]]}
    unsure["policy_rejected"] = [sum(row) for row in unsure["policy_rejected_tokens"]]
    columns = ("policy_chosen", "policy_rejected", "chosen_lengths", "rejected_lengths", "margins")
    return {
        **made,
        "unsure token pairs": unsure,
        "rollouts": rollouts,
        "scores": {name: scores[name] for name in columns},
    }


def columns(**values: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Settings column by column: the first of each, the second of each, ..."""
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


WITH_BOTH = ("sequences", "uneven sequences", "desirable sequences")
LOSSES: list[tuple[str, Callable[..., Any], tuple[str, ...], list[dict[str, Any]]]] = [
    ("dpo", dpo, ("pairs",), columns(beta=(0.1, 0.5, 0.1, 0.01), label_smoothing=(0.0, 0.0, 0.1, 0.45))),
    ("robust", robust, ("pairs",), columns(beta=(0.1, 0.3, 0.3), label_smoothing=(0.1, 0.4, 0.0))),
    ("ipo", ipo, ("pairs",), columns(beta=(0.1, 0.5, 0.01), length_normalize=(True,) * 3)),
    ("ipo", ipo, ("pairs",), columns(beta=(0.1, 0.5, 0.01), length_normalize=(False,) * 3)),
    ("hinge", hinge, ("pairs",), columns(beta=(0.05, 0.2))),
    ("odpo", odpo, ("pairs",), columns(beta=(0.1, 0.5), alpha=(1.0, 0.25))),
    ("dpop", dpop, ("pairs",), columns(beta=(0.3, 0.1, 0.1), penalty=(50.0, 5.0, 0.0))),
    ("exo", exo, ("pairs",), columns(beta=(0.1, 0.5), label_smoothing=(0.001, 0.2))),
    ("discopop", discopop, ("pairs",), columns(beta=(0.05, 0.1), tau=(0.05, 1.0))),
    ("f-dpo", f_dpo, ("pairs",), columns(beta=(0.1, 2.0), divergence=("reverse_kl",) * 2, alpha=(None,) * 2)),
    ("f-dpo", f_dpo, ("pairs",), columns(beta=(0.1, 0.001), divergence=("forward_kl",) * 2, alpha=(None,) * 2)),
    ("f-dpo", f_dpo, ("pairs",), columns(beta=(0.1, 2.0), divergence=("js",) * 2, alpha=(None,) * 2)),
    ("f-dpo", f_dpo, ("pairs",), columns(beta=(0.1, 0.1, 0.01), divergence=("alpha",) * 3, alpha=(0.1, 0.5, 0.9))),
    ("wpo", wpo, ("token pairs",), columns(beta=(0.01, 0.1))),
    ("aot", aot, ("pairs",), columns(beta=(0.1, 0.02), label_smoothing=(0.0, 0.2))),
    ("ln-dpo", ln_dpo, ("pairs",), columns(beta=(5.0, 0.7))),
    ("r-dpo", r_dpo, ("pairs",), columns(beta=(0.1, 0.2, 0.1), alpha=(0.01, 0.05, 0.0))),
    ("ld-dpo", ld_dpo, ("token pairs",), columns(beta=(0.1, 0.1, 0.1, 0.3), alpha=(0.5, 0.0, 1.0, 0.2))),
    ("nca", nca, ("pairs",), columns(beta=(0.1, 0.01))),
    ("bco-pair", bco_pair, ("pairs",), columns(beta=(0.1, 0.4))),
    ("apo-zero", apo_zero, ("pairs",), columns(beta=(0.1, 0.4))),
    ("apo-down", apo_down, ("pairs",), columns(beta=(0.1, 0.4))),
    ("sppo", sppo, ("pairs",), columns(eta=(1000.0, 20.0, 1000.0, 20.0), soft=(False, False, True, True))),
    ("simpo", simpo, ("pairs",), columns(beta=(2.0, 10.0, 2.5), gamma_beta_ratio=(0.5, 0.3, 0.0))),
    ("orpo", orpo, ("pairs",), columns(odds_ratio_weight=(0.1, 1.0), nll_on_prompt=(False, False))),
    ("orpo", orpo, ("pairs",), columns(odds_ratio_weight=(0.1, 1.0), nll_on_prompt=(True, True))),
    ("cpo", cpo, ("pairs",), columns(beta=(0.1, 0.02, 0.01), nll_weight=(1.0, 0.0, 0.3))),
    ("slic", slic, ("pairs",), columns(beta=(0.05, 0.005))),
    ("sft", sft, ("pairs", "pairs of a larger batch"), columns(per=("token", "sequence"))),
    ("sft", sft, ("uneven sequences", "sequences of a larger batch"), columns(per=("token", "sequence"))),
    (
        "kto",
        kto,
        ("sequences", "uneven sequences"),
        columns(beta=(0.1, 0.5, 0.05), desirable_weight=(1.0, 1.33, 0.0), undesirable_weight=(1.0, 0.4, 2.0)),
    ),
    ("bco", bco, WITH_BOTH, columns(beta=(0.1, 0.02))),
    ("apo-zero-unpaired", apo_zero_unpaired, WITH_BOTH, columns(beta=(0.1, 0.02))),
    ("aot-unpaired", aot_unpaired, WITH_BOTH, columns(beta=(0.1, 0.02), label_smoothing=(0.0, 0.2))),
    ("pl-dpo", pl_dpo, ("rankings",), columns(beta=(0.1, 0.5))),
    ("unlikelihood", unlikelihood, ("unsure token pairs",), columns(alpha=(0.5, 1.0, 0.0))),
    ("reward", reward, ("scores",), columns(alpha=(0.0, 1.0, 0.3), centering=(0.0, 0.01, 0.5))),
    (
        "grpo",
        grpo,
        ("rollouts",),
        columns(
            clip=(0.2, 0.2, 0.1, 0.2),
            clip_high=(None, 0.28, None, None),
            beta=(0.04, 0.0, 0.5, 0.0),
            per=("sequence", "token", "constant", "constant"),
            constant=(128.0, 128.0, 20.0, 1.0),
        ),
    ),
    (
        "ppo",
        ppo,
        ("rollouts",),
        columns(clip=(0.2, 0.1), clip_high=(None, 0.3), value_weight=(0.1, 1.0), value_clip=(0.2, 0.1)),
    ),
]


def exact(value: Any) -> Any:
    """Floats as numbers of 50 digits, at any depth, with the very value that the computer's 0.1 has."""
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [exact(item) for item in value]
    return mpf(value) if isinstance(value, float) else value


def rounded(value: Any) -> Any:
    """Back to the nearest float."""
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else float(value)


def make_values() -> dict[str, Any]:
    """The inputs by name and the rows: loss, settings, name of the inputs, losses, rewards."""
    inputs = make_inputs()
    for name, base in (("pairs of a larger batch", "pairs"), ("sequences of a larger batch", "uneven sequences")):
        inputs[name] = {**inputs[base], "tokens_per_example": 61.5}
    rows = []
    for name, function, batches, every_settings in LOSSES:
        for batch, settings in product(batches, every_settings):
            losses, rewards = function(exact(inputs[batch]), **exact(settings))
            rows.append([name, settings, batch, rounded(losses), rounded(rewards)])
    return {"inputs": inputs, "rows": rows}


def as_json(values: dict[str, Any]) -> str:
    """One input column or row a line."""
    batches = []
    for name, batch in values["inputs"].items():
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(column)}" for key, column in batch.items())
        batches.append(f"{json.dumps(name)}: {{\n{lines}}}")
    rows = ",\n".join(json.dumps(row) for row in values["rows"])
    return '{"inputs": {\n' + ",\n".join(batches) + '},\n"rows": [\n' + rows + "]}\n"


if __name__ == "__main__":
    PATH.write_text(as_json(make_values()))

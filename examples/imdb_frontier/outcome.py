"""What came of the frontier's runs: the measured policies, as tables and as a chart."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cost import Cost
from experiment import World, offline_runs, online_runs
from numpy.typing import NDArray

from penchant.evaluate.wins import mean_with_interval

Numbers = NDArray[np.float64]

DISTANCES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""In nats a completion."""
REWARDS = (0.56, 0.58, 0.6, 0.62, 0.64, 0.66, 0.68, 0.7, 0.75)


@dataclass(frozen=True)
class Measured:
    """A policy on the way, or at the end, of one seed's run; rewards and KL are those of each test prefix."""

    name: str
    seed: int
    step: int
    rewards: tuple[float, ...]
    golds: tuple[float, ...]
    kls: tuple[float, ...]
    length: float
    seconds: float
    """Of training, up to here."""

    @property
    def method(self) -> str:
        """The run's name without its strength."""
        return self.name.split(" ")[0]

    @property
    def reward(self) -> float:
        """The mean true reward."""
        return float(np.mean(self.rewards))

    @property
    def gold(self) -> float:
        """The mean gold reward."""
        return float(np.mean(self.golds))

    @property
    def kl(self) -> float:
        """The mean distance from the start, nats a completion."""
        return float(np.mean(self.kls))


def measured(world: World, seeds: Sequence[int]) -> list[Measured]:
    """All policies that were measured, in the order of runs, steps and seeds."""
    found = []
    for name in [*offline_runs(), *online_runs(world), "best-of-n"]:
        for seed in seeds:
            folder = world.folder / "runs" / f"{name.replace(' ', '-')}-{seed}" / "measured"
            for path in folder.glob("*.json"):
                told = json.loads(path.read_text(encoding="utf-8"))
                each = (tuple(told[key]) for key in ("reward", "gold", "kl"))
                found.append(Measured(name, seed, told["step"], *each, told["length"], told["seconds"]))
    names = list(dict.fromkeys(one.name for one in found))
    return sorted(found, key=lambda one: (names.index(one.name), one.step, one.seed))


def rewards_at(found: Iterable[Measured], method: str, kl: float) -> dict[int, Numbers]:
    """Seed -> the rewards of a method's test prefixes at this KL, by the best of its runs that went so far.

    Between two measured policies of a run, and between the start and its first, reward is taken to grow evenly with KL.
    """
    runs: dict[tuple[int, str], list[Measured]] = {}
    starts: dict[int, Measured] = {}
    for one in found:
        if one.method == method:
            runs.setdefault((one.seed, one.name), []).append(one)
        if one.kl == 0:  # the best of one
            starts[one.seed] = one
    best: dict[int, Numbers] = {}
    for (seed, _), own in runs.items():
        way = sorted({starts[seed], *own}, key=lambda one: one.kl)
        after = next((place for place, one in enumerate(way) if one.kl >= kl and place), None)
        if after is None:
            continue
        here, there = way[after - 1], way[after]
        share = (kl - here.kl) / (there.kl - here.kl)
        rewards = (1 - share) * np.array(here.rewards) + share * np.array(there.rewards)
        if seed not in best or rewards.mean() > best[seed].mean():
            best[seed] = rewards
    return best


def _over_prefixes(by_seed: Sequence[Numbers]) -> str:
    """The mean with its 95% interval over prefixes (a prefix's mean over seeds is one observation), and each seed's."""
    mean = mean_with_interval(np.mean(by_seed, axis=0))
    seeds = ", ".join(f"{own.mean():.3f}" for own in by_seed)
    return f"{mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f}; {seeds})"


def reached(found: Sequence[Measured]) -> str:
    """The reward of each method at some distances, where it went so far in all seeds."""
    seeds = {one.seed for one in found}
    lines = _head("method", *(f"KL {kl:g}" for kl in DISTANCES))
    for method in dict.fromkeys(one.method for one in found):
        best = [rewards_at(found, method, kl) for kl in DISTANCES]
        lines.append(_row(method, *(_over_prefixes([*own.values()]) if {*own} == seeds else "" for own in best)))
    return "\n".join(lines)


def leads(found: Sequence[Measured]) -> str:
    """By how much DPO's reward is higher than each other method's at the same distance, prefix by prefix."""
    seeds = sorted({one.seed for one in found})
    lines = _head("DPO less", *(f"KL {kl:g}" for kl in DISTANCES))
    for method in dict.fromkeys(one.method for one in found if one.method != "dpo"):
        cells = []
        for kl in DISTANCES:
            ours, theirs = rewards_at(found, "dpo", kl), rewards_at(found, method, kl)
            is_there = {*ours} == {*theirs} == {*seeds}
            cells.append(_over_prefixes([ours[seed] - theirs[seed] for seed in seeds]) if is_there else "")
        lines.append(_row(method, *cells))
    return "\n".join(lines)


def cost_table(found: Sequence[Measured], costs: Mapping[str, Cost]) -> str:
    """What DPO and PPO (with a learned reward) took until a reward, within a KL that both reached it at.

    That KL is, in each seed, the farther one of the two methods' nearest policies with this reward. PPO's cost holds
    that of its reward model; the pairs, which both learn from, count for neither. Medians over seeds.
    """
    seeds = sorted({one.seed for one in found})
    lines = _head("reward", "KL up to", "dpo, s", "ppo, s", "ppo / dpo", "dpo, TFLOP", "ppo, TFLOP", "ppo / dpo")
    for reward in REWARDS if costs else ():
        couples = [couple for seed in seeds if (couple := _first_two(found, seed, reward))]
        if len(couples) < len(seeds):
            continue
        dpo, ppo = zip(*couples, strict=True)
        seconds = [float(np.median([one.seconds for one in side])) for side in (dpo, ppo)]
        steps = [float(np.median([one.step for one in side])) for side in (dpo, ppo)]
        work = [
            steps[0] * costs["dpo"].flops / 1e12,
            (steps[1] * costs["ppo"].flops + costs["reward"].flops) / 1e12,
        ]
        lines.append(
            _row(
                f"{reward:.2f}",
                f"{np.mean([max(one.kl, other.kl) for one, other in couples]):.1f}",
                *(f"{value:.0f}" for value in seconds),
                f"{seconds[1] / seconds[0]:.1f}",
                *(f"{value:.1f}" for value in work),
                f"{work[1] / work[0]:.1f}",
            )
        )
    memory = [f"{name} {each.peak_bytes / 2**30:.2f} GiB" for name, each in costs.items()]
    return "\n".join(lines) + f"\n\nMost memory of a process: {', '.join(memory)}."


def _first_two(found: Sequence[Measured], seed: int, reward: float) -> tuple[Measured, Measured] | None:
    """The quickest policies of DPO and PPO with this reward, no farther away than both can be."""
    able = {
        method: [one for one in found if one.seed == seed and one.method == method and one.reward >= reward]
        for method in ("dpo", "ppo")
    }
    if not all(able.values()):
        return None
    kl = max(min(one.kl for one in own) for own in able.values())
    dpo, ppo = (min((one for one in own if one.kl <= kl), key=lambda one: one.seconds) for own in able.values())
    return dpo, ppo


def table(found: Sequence[Measured]) -> str:
    """All points: means over seeds, with intervals over prefixes (a prefix's mean over seeds is one observation)."""
    lines = _head("run", "step", "KL, nats", "true reward", "by seed", "gold reward", "tokens", "seconds")
    for own in _by_policy(found):
        reward, gold = (
            mean_with_interval(np.mean([getattr(one, key) for one in own], axis=0)) for key in ("rewards", "golds")
        )
        lines.append(
            _row(
                own[0].name,
                str(own[0].step),
                f"{np.mean([one.kl for one in own]):.2f}",
                f"{reward.value:.3f} ({reward.low:.3f} to {reward.high:.3f})",
                ", ".join(f"{one.reward:.3f}" for one in own),
                f"{gold.value:.3f} ({gold.low:.3f} to {gold.high:.3f})",
                f"{np.mean([one.length for one in own]):.0f}",
                f"{np.median([one.seconds for one in own]):.0f}",
            )
        )
    return "\n".join(lines)


def _by_policy(found: Sequence[Measured]) -> list[list[Measured]]:
    """The seeds of each run and step."""
    groups: dict[tuple[str, int], list[Measured]] = {}
    for one in found:
        groups.setdefault((one.name, one.step), []).append(one)
    return [*groups.values()]


def _head(*names: str) -> list[str]:
    return [_row(*names), "|---|" + "---:|" * (len(names) - 1)]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def draw(found: Sequence[Measured], path: Path) -> None:
    """The chart: reward against KL, a colour and a mark for each method; a bar reaches from seed to seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True)
    marks = "osD^vP*X"
    for number, method in enumerate(dict.fromkeys(one.method for one in found)):
        policies = [own for own in _by_policy(found) if own[0].method == method]
        distances = [np.mean([one.kl for one in own]) for own in policies]
        for panel, key in zip(panels, ("reward", "gold"), strict=True):
            values = [[getattr(one, key) for one in own] for own in policies]
            middle = np.array([np.mean(each) for each in values])
            ends = [middle - [min(each) for each in values], [max(each) for each in values] - middle]
            panel.errorbar(
                distances, middle, ends, linestyle="", marker=marks[number % len(marks)], alpha=0.75, label=method,
                linewidth=1,
            )  # fmt: skip
    for panel, title in zip(panels, ("true reward", "gold reward, never trained on"), strict=True):
        panel.set(xlabel="KL from the start, nats a completion", ylabel="mean reward", title=title)
        panel.set_xscale("symlog", linthresh=0.5)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)

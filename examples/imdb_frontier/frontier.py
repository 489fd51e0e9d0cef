"""Reward against KL: which method goes furthest for its distance from where it began?

The controlled-sentiment experiment of the DPO paper (section 6.1 of Rafailov et al. 2023, arXiv:2305.18290) at the size
of a laptop: a small model that writes openings of film reviews is to write positive ones. Everybody learns from the
same pairs, except PPO, which samples its own completions: `ppo` is rewarded by a model that was trained on the pairs,
`ppo-gt` by the true reward.

    python examples/imdb_frontier/frontier.py --workers 2         # the whole: a seed takes longer than half an hour
    python examples/imdb_frontier/frontier.py --smoke             # does every line work?

Stopped, the same command goes on. The table comes out at the end, and with --output FILE as Markdown, beside a chart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from experiment import FULL, SMOKE, World, common, offline_runs, online_runs, prepare, train_reward_model

from penchant import train
from penchant.config import JudgeConfig
from penchant.disk import write_json
from penchant.evaluate.answers import answer, distance
from penchant.evaluate.wins import mean_with_interval
from penchant.online.judges import RuleJudge, make_judge
from penchant.scoring.policy import Policy

ROOT = Path(__file__).resolve().parents[2]
BEST_OF = (2, 4, 8, 16)


def main() -> int:
    """Does what is not done yet, and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where everything is kept; default: runs/frontier")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each, that share the runs")
    parser.add_argument("--runs", nargs="+", help="only these, by the beginnings of their names")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--output", type=Path, help="file for the table, Markdown; the chart stands beside it")
    parser.add_argument("--share", help=argparse.SUPPRESS)  # of a worker: its number, and of how many
    options = parser.parse_args()
    options.folder = options.folder or ROOT / "runs" / ("frontier-smoke" if options.smoke else "frontier")
    world = prepare(options.folder, SMOKE if options.smoke else FULL)
    if options.workers > 1:
        if any(_is_wanted(name, options.runs) for name in online_runs(world)):
            for seed in options.seeds:
                train_reward_model(world, seed)  # which several workers would begin at once
        _work_in_parallel(options)
    else:
        _work(world, options)
    if not options.share:
        _publish(world, options)
    return 0


def _work_in_parallel(options: Any) -> None:
    """Starts the workers, each with a part of the runs, and waits for them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, __file__, *_without_workers(sys.argv[1:]), "--share", share], env=environment)
        for share in (f"{number}/{options.workers}" for number in range(options.workers))
    ]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise SystemExit("a worker failed; the same command goes on")


def _without_workers(words: Sequence[str]) -> list[str]:
    kept = list(words)
    place = kept.index("--workers")
    return kept[:place] + kept[place + 2 :]


def _work(world: World, options: Any) -> None:
    """All runs, or those of this worker's share, trained and measured."""
    number, of = map(int, (options.share or "0/1").split("/"))
    names = [*online_runs(world), *offline_runs(), "best-of-n"]  # the longest first
    wanted = [(seed, name) for seed in options.seeds for name in names if _is_wanted(name, options.runs)]
    for seed, name in wanted[number::of]:
        run_dir = world.folder / "runs" / f"{name.replace(' ', '-')}-{seed}"
        if name == "best-of-n":
            _measure_best_of_n(world, run_dir, seed)
            continue
        if not _is_finished(run_dir):
            done = _train(world, name, seed, run_dir)
            if done.summary["status"] == "interrupted":
                raise SystemExit(f"stopped; the same command goes on from {run_dir}")
        _measure(world, run_dir, seed)


def _is_wanted(name: str, beginnings: Sequence[str] | None) -> bool:
    return beginnings is None or any(name.startswith(beginning) for beginning in beginnings)


def _train(world: World, name: str, seed: int, run_dir: Path) -> Any:
    settings = common(world, seed)
    if name in offline_runs():
        return train(world.start, world.pairs, output_dir=str(run_dir), **settings, **offline_runs()[name])
    own = online_runs(world)[name]
    rounds = own["online"]["rounds"]
    settings |= {"batch_size": 32, "save_steps": max(1, rounds * 8 // 4)}
    if name.startswith("ppo-gt"):
        judge: Any = RuleJudge(world.reward)
    else:
        judge = make_judge(JudgeConfig(name="reward", model=train_reward_model(world, seed)), "cpu", "float32")
    prompts = str(world.folder / "train.jsonl")
    return train(world.start, prompts, output_dir=str(run_dir), judge=judge, **{**settings, **own})


def _is_finished(run_dir: Path) -> bool:
    place = run_dir / "summary.json"
    return place.exists() and json.loads(place.read_text(encoding="utf-8"))["status"] == "finished"


def _measure(world: World, run_dir: Path, seed: int) -> None:
    """True reward, gold reward and KL of the run's checkpoints and its end, on prefixes that nobody trained on."""
    places = {int(place.name[5:]): place for place in (run_dir / "checkpoints").glob("step-*")}
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    places[summary["steps"]] = run_dir / "model"
    times = _times(run_dir)
    before = 0.0  # PPO has to learn its reward first
    if run_dir.name.startswith("ppo-kl"):
        before = json.loads((world.folder / f"reward-{seed}" / "summary.json").read_text(encoding="utf-8"))["wall_s"]
    start: Policy | None = None
    for step, place in sorted(places.items()):
        file = run_dir / "measured" / f"{step}.json"
        if file.exists():
            continue
        start = start or Policy.from_pretrained(world.start)
        told = _told(world, Policy.from_pretrained(str(place)), start, seed)
        file.parent.mkdir(exist_ok=True)
        write_json(file, {**told, "step": step, "seconds": before + times[step]})
        print(f"measured   {run_dir.name} step {step}: {_short(told)}", flush=True)


def _told(world: World, policy: Policy, start: Policy, seed: int) -> dict[str, Any]:
    prefixes = world.prefixes("test")
    answers = [own[0] for own in answer(policy, prefixes, world.sampling, seed=1000 + seed, max_rows=256)]
    texts = [prefix + one.text for prefix, one in zip(prefixes, answers, strict=True)]
    return {
        "reward": world.labeller(texts).tolist(),
        "gold": world.gold(texts).tolist(),
        "kl": distance(policy, start, prefixes, answers),
        "length": float(np.mean([len(one.token_ids) for one in answers])),
    }


def _measure_best_of_n(world: World, run_dir: Path, seed: int) -> None:
    """The best of n completions of the first policy, by the true reward; its KL is at most log n - (n - 1) / n."""
    prefixes = world.prefixes("test")
    missing = [n for n in (1, *BEST_OF) if not (run_dir / "measured" / f"{n}.json").exists()]
    if not missing:
        return
    (run_dir / "measured").mkdir(parents=True, exist_ok=True)
    policy, most = Policy.from_pretrained(world.start), max(missing)
    samples = answer(policy, prefixes, world.sampling, 2000 + seed, max_rows=256, num_samples=most)
    scores = [world.reward(prefix, [one.text for one in own]) for prefix, own in zip(prefixes, samples, strict=True)]
    for n in missing:
        best = [int(np.argmax(own[:n])) for own in scores]
        texts = [prefix + own[place].text for prefix, own, place in zip(prefixes, samples, best, strict=True)]
        told = {
            "reward": [own[place] for own, place in zip(scores, best, strict=True)],
            "gold": world.gold(texts).tolist(),
            "kl": [math.log(n) - (n - 1) / n] * len(prefixes),
            "length": float(np.mean([len(own[p].token_ids) for own, p in zip(samples, best, strict=True)])),
        }
        write_json(run_dir / "measured" / f"{n}.json", {**told, "step": n, "seconds": 0.0})
        print(f"measured   {run_dir.name} n {n}: {_short(told)}", flush=True)


def _short(told: dict[str, Any]) -> str:
    return f"reward {np.mean(told['reward']):.3f}, gold {np.mean(told['gold']):.3f} at KL {np.mean(told['kl']):.2f}"


def _times(run_dir: Path) -> dict[int, float]:
    """Seconds from the run's beginning until each step was done."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["time_s"] for line in lines}


@dataclass(frozen=True)
class Point:
    """A measured policy: means over prefixes and seeds, with 95% intervals of the rewards."""

    name: str
    step: int
    kl: float
    reward: float
    low: float
    high: float
    gold: float
    gold_low: float
    gold_high: float
    length: float
    seconds: float
    by_seed: tuple[float, ...]
    """The mean reward of each seed."""


def points_of(world: World, seeds: Sequence[int]) -> list[Point]:
    """What has been measured: for each run and step the mean over the seeds that have it."""
    found = []
    for name in [*offline_runs(), *online_runs(world), "best-of-n"]:
        folders = [world.folder / "runs" / f"{name.replace(' ', '-')}-{seed}" / "measured" for seed in seeds]
        steps = {int(path.stem) for folder in folders for path in folder.glob("*.json")}
        for step in sorted(steps):
            paths = [folder / f"{step}.json" for folder in folders]
            told = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
            found.append(_point(name, step, told))
    return found


def _point(name: str, step: int, told: Sequence[dict[str, Any]]) -> Point:
    # A prefix is the unit: its mean over seeds is one observation.
    reward, gold, kl = (np.mean([one[key] for one in told], axis=0) for key in ("reward", "gold", "kl"))
    rewards, golds = mean_with_interval(reward), mean_with_interval(gold)
    return Point(
        name, step, float(kl.mean()), rewards.value, rewards.low, rewards.high, golds.value, golds.low, golds.high,
        float(np.mean([one["length"] for one in told])), float(np.median([one["seconds"] for one in told])),
        tuple(float(np.mean(one["reward"])) for one in told),
    )  # fmt: skip


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats in both: a higher reward at a smaller KL."""
    return [
        one
        for one in points
        if not any(
            (other.reward, -other.kl) != (one.reward, -one.kl) and other.reward >= one.reward and other.kl <= one.kl
            for other in points
        )
    ]


def family_of(name: str) -> str:
    """The method of a run without its strength."""
    return name.split(" ")[0]


def table(points: Sequence[Point]) -> str:
    """All points, the method in the first column."""
    lines = [
        "| run | step | KL, nats | true reward | by seed | gold reward | tokens | seconds |",
        "|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    best = {(one.name, one.step) for one in frontier(points)}
    for one in points:
        mark = "**" if (one.name, one.step) in best else ""
        lines.append(
            f"| {mark}{one.name}{mark} | {one.step} | {one.kl:.2f} | {one.reward:.3f} ({one.low:.3f} to {one.high:.3f})"
            f" | {', '.join(f'{value:.3f}' for value in one.by_seed)} | {one.gold:.3f} ({one.gold_low:.3f} to "
            f"{one.gold_high:.3f}) | {one.length:.0f} | {one.seconds:.0f} |"
        )
    return "\n".join(lines)


def reward_at(points: Sequence[Point], family: str, kl: float) -> float | None:
    """The highest reward that a method reached at no more than this KL."""
    reached = [one.reward for one in points if family_of(one.name) == family and one.kl <= kl]
    return max(reached) if reached else None


def summary(points: Sequence[Point]) -> str:
    """What each method reached within some distances from the start."""
    distances = (1.0, 2.0, 4.0, 8.0, 16.0)
    lines = [
        "| method | " + " | ".join(f"KL up to {kl:g}" for kl in distances) + " |",
        "|---|" + "---:|" * len(distances),
    ]
    for family in dict.fromkeys(family_of(one.name) for one in points):
        reached = [reward_at(points, family, kl) for kl in distances]
        lines.append(f"| {family} | " + " | ".join("" if r is None else f"{r:.3f}" for r in reached) + " |")
    return "\n".join(lines)


def cost(points: Sequence[Point]) -> str:
    """How long DPO and PPO took until they first had a reward, at no more than a KL that both reached it with.

    The time of PPO holds that of its reward model; the pairs, which both learn from, count for neither.
    """
    lines = ["| reward | KL up to | dpo, s | ppo, s | ppo / dpo |", "|---:|---:|---:|---:|---:|"]
    for reward in (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9):
        reaching = {
            family: [one for one in points if family_of(one.name) == family and one.reward >= reward]
            for family in ("dpo", "ppo")
        }
        if not all(reaching.values()):
            continue
        kl = max(min(one.kl for one in own) for own in reaching.values())
        dpo, ppo = (min(one.seconds for one in own if one.kl <= kl) for own in reaching.values())
        lines.append(f"| {reward:.2f} | {kl:.1f} | {dpo:.0f} | {ppo:.0f} | {ppo / dpo:.1f} |")
    return "\n".join(lines)


def draw(points: Sequence[Point], path: Path) -> None:
    """The chart: reward against KL, a colour and a mark for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True)
    marks = "osD^vP*X"
    for number, family in enumerate(dict.fromkeys(family_of(one.name) for one in points)):
        own = [one for one in points if family_of(one.name) == family]
        for panel, key in zip(panels, ("reward", "gold"), strict=True):
            panel.plot(
                [max(one.kl, 0.01) for one in own], [getattr(one, key) for one in own],
                linestyle="", marker=marks[number % len(marks)], alpha=0.75, label=family,
            )  # fmt: skip
    for panel, title in zip(panels, ("true reward", "gold reward, never trained on"), strict=True):
        panel.set(xlabel="KL from the start, nats a completion", ylabel="mean reward", title=title, xscale="symlog")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def _publish(world: World, options: Any) -> None:
    points = points_of(world, options.seeds)
    parts = {
        "What each method reached": summary(points),
        "The time to the same reward": cost(points),
        "All points": table(points),
    }
    text = "\n\n".join(f"### {title}\n\n{part}" for title, part in parts.items())
    print("\n" + text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
        draw(points, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    sys.exit(main())

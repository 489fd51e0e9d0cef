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
from pathlib import Path
from typing import Any

import numpy as np
from cost import Cost, measured_costs
from experiment import FULL, SMOKE, World, common, offline_runs, online_runs, prepare, train_reward_model
from outcome import cost_table, draw, leads, measured, reached, table

from penchant import train
from penchant.config import JudgeConfig
from penchant.disk import write_json
from penchant.evaluate.answers import answer, distance
from penchant.online.judges import RuleJudge, make_judge
from penchant.scoring.policy import Policy

ROOT = Path(__file__).resolve().parents[2]
BEST_OF = (2, 4, 8, 16)


def main() -> int:
    """Does what is not done yet, and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where everything is kept; default: runs/frontier")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
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
    settings["save_steps"] = max(1, rounds * 8 // 4)
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


def _publish(world: World, options: Any) -> None:
    found = measured(world, options.seeds)
    methods = {one.method for one in found}
    costs: dict[str, Cost] = measured_costs(world) if {"dpo", "ppo"} <= methods else {}
    parts = {
        "What each method reached": reached(found),
        "DPO's lead": leads(found),
        "The cost of the same reward": cost_table(found, costs),
        "All points": table(found),
    }
    text = "\n\n".join(f"### {title}\n\n{part}" for title, part in parts.items())
    print("\n" + text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
        draw(found, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    sys.exit(main())

"""What a step of DPO, of PPO and of the reward model costs: operations and memory, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from experiment import FULL, SMOKE, World, common, online_runs, prepare, reward_settings
from torch.utils.flop_counter import FlopCounterMode

from penchant import train
from penchant.config import JudgeConfig
from penchant.disk import write_json
from penchant.online.judges import make_judge

STEPS = 8
"""That are counted: of PPO one round, so that its sampling and scoring is in them."""


@dataclass(frozen=True)
class Cost:
    """Floating-point operations in matrix products, and the most memory of the process."""

    flops: float
    """Of a step; of the reward model: of its whole training."""
    peak_bytes: int


def measured_costs(world: World) -> dict[str, Cost]:
    """The costs by method, measured once a folder."""
    file = world.folder / "costs.json"
    if not file.exists():
        costs = {}
        for method in ("dpo", "reward", "ppo"):
            command = [sys.executable, __file__, method, "--folder", str(world.folder)]
            done = subprocess.run(
                command + ["--smoke"] * (world.size is SMOKE), stdout=subprocess.PIPE, text=True, check=True
            )
            costs[method] = json.loads(done.stdout.splitlines()[-1])
        write_json(file, costs)
    return {name: Cost(**told) for name, told in json.loads(file.read_text(encoding="utf-8")).items()}


def cost_of(world: World, method: str) -> Cost:
    """Takes a few steps of a method and counts, by PyTorch's own counter of operations."""
    settings = {**common(world, 0), "save_steps": None}
    rows, judge, steps = world.pairs, None, 1
    if method == "dpo":
        # A reference that is asked in every step: what is computed before the first one belongs to all steps alike.
        settings |= {"method": "dpo", "reference": {"kind": "copy"}, "max_steps": STEPS}
    elif method == "reward":
        settings |= {**reward_settings(world, 0), "max_steps": STEPS, "eval_size": 0}
        summary = json.loads((world.folder / "reward-0" / "summary.json").read_text(encoding="utf-8"))
        steps = summary["steps"]
    else:
        settings |= online_runs(world)["ppo kl 0.05"]
        settings["online"] = {**settings["online"], "rounds": 1}
        rows = str(world.folder / "train.jsonl")
        judge = make_judge(JudgeConfig(name="reward", model=str(world.folder / "reward-0" / "model")), "cpu", "float32")
    with tempfile.TemporaryDirectory() as folder, FlopCounterMode(display=False) as counter:
        run = train(world.start, rows, output_dir=str(Path(folder, "run")), judge=judge, quiet=True, **settings)
    flops = counter.get_total_flops() / run.summary["steps"]
    return Cost(flops * steps, run.summary["peak_memory_bytes"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=("dpo", "reward", "ppo"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    found = cost_of(prepare(options.folder, SMOKE if options.smoke else FULL), options.method)
    print(json.dumps(asdict(found)))

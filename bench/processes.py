"""Several processes against one: memory at the peak of each, beside what `penchant plan` says, and seconds a step.

Starts torchrun on this machine for each number of processes, and trains the same few steps of DPO with all weights on
the same pairs. The losses must agree to 1e-5, or nothing is printed. On one machine the processes share its cores, so
the seconds show what sharding costs, not what more machines bring.

    python bench/processes.py --model MODEL [--processes 1 2 4] [--steps 6] [--data PAIRS] [-- more settings]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from penchant.config import RunConfig, config_from, parse_value
from penchant.disk import read_json_lines
from penchant.training import hardware
from penchant.training.logger import RunLog
from penchant.training.plan import Plan, plan

ROOT = Path(__file__).parents[1]


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    pairs = zip(options.more[::2], options.more[1::2], strict=True)
    return {
        "model": options.model,
        "data": options.data,
        "max_steps": options.steps,
        "batch_size": 8,
        "reference": {"kind": "copy"},
        "num_samples": 0,
        "eval_size": 0,
        "logging_steps": 1,
        "save_minutes": 1000,
        **{name.removeprefix("--"): parse_value(text) for name, text in pairs},
    }


def work(folder: Path) -> None:
    """What torchrun starts: trains, and notes the peak of this process."""
    from penchant.training.run import execute

    config = config_from(json.loads((folder / "settings.json").read_text()))
    result = execute(config, log=RunLog(quiet=True))
    peak = hardware.peak_memory_bytes(torch.device(result.summary["device"]))
    (folder / f"peak-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(peak))


def measured(number: int, settings: dict[str, Any], folder: Path) -> tuple[int, float, list[float]]:
    """The largest peak of the processes, seconds of a step (median, the first left out), and the losses."""
    folder.mkdir()
    run_dir = folder / "run"
    (folder / "settings.json").write_text(json.dumps({**settings, "output_dir": str(run_dir)}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)] if number > 1 else []
    command = [sys.executable, *launcher, str(Path(__file__).resolve()), "--work", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // number))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    peaks = [json.loads((folder / f"peak-{rank}.json").read_text()) for rank in range(number)]
    records = [record for record in read_json_lines(run_dir / "metrics.jsonl") if "loss" in record]
    stamps = [record["time_s"] for record in records]
    seconds = statistics.median(later - before for before, later in itertools.pairwise(stamps))
    return max(peaks), seconds, [record["loss"] for record in records]


def plan_of(config: RunConfig, number: int) -> Plan:
    device = hardware.resolve_device(config.device)
    return plan(config, number, device, hardware.resolve_precision(config.dtype, device), RunLog(quiet=True))[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--data", default=str(ROOT / "examples" / "direct_answers" / "train.jsonl"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("more", nargs="*", help="settings of the run: --lora.rank 8")
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return
    settings = settings_of(options)
    print("| processes | planned GiB | measured GiB | measured / planned | seconds a step |")
    print("|---:|---:|---:|---:|---:|")
    losses: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in options.processes:
            expected = plan_of(config_from(settings), number)
            peak, seconds, losses[number] = measured(number, settings, Path(folder) / str(number))
            first = losses[options.processes[0]]
            torch.testing.assert_close(torch.tensor(losses[number]), torch.tensor(first), rtol=1e-5, atol=1e-5)
            cells = expected.memory_bytes / 2**30, peak / 2**30, peak / expected.memory_bytes
            print(f"| {number} | {' | '.join(f'{cell:.2f}' for cell in cells)} | {seconds:.1f} |", flush=True)
            print({name: f"{size / 2**20:.0f}" for name, size in expected.memory.items()}, file=sys.stderr)


if __name__ == "__main__":
    main()

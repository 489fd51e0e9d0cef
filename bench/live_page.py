"""How long the live page takes over a log of many lines: to the first page, to all of it, and for each update.

python bench/live_page.py [--lines 1000000]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path

from starlette.requests import Request

from penchant.dash.pages import Pages
from penchant.dash.runs import Runs


def main() -> None:
    """Prints the times, and the memory of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    lines = parser.parse_args().lines
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "runs" / "long"
        run_dir.mkdir(parents=True)
        (run_dir / "run.yaml").write_text("model: m\nmethod: dpo\n")
        (run_dir / "summary.json").write_text(json.dumps({"status": "interrupted", "total_steps": 2 * lines}))
        noise = random.Random(0)
        with (run_dir / "metrics.jsonl").open("w") as log:
            for step in range(1, lines + 1):
                log.write(json.dumps(line(step, lines, noise)) + "\n")
        size = (run_dir / "metrics.jsonl").stat().st_size
        print(f"{lines:,} lines, {size / 1e6:,.0f} MB")

        pages = Pages(Runs([run_dir.parent]), "token")
        before = peak_mib()
        took = [look(pages)]
        print(f"first page                {took[0][0]:6.2f} s, {took[0][1] / 1e3:,.0f} kB")
        while pages_behind(pages):
            took.append(look(pages))
        print(f"all of the log            {sum(seconds for seconds, _ in took):6.2f} s, in {len(took)} looks")
        with (run_dir / "metrics.jsonl").open("a") as log:
            updates = []
            for step in range(lines + 1, lines + 21):
                log.write(json.dumps(line(step, lines, noise)) + "\n")
                log.flush()
                updates.append(look(pages)[0])
        print(f"an update with a new line {statistics.median(updates):6.2f} s, the slowest {max(updates):.2f} s")
        print(f"memory                    {peak_mib():6.0f} MiB, {peak_mib() - before:.0f} of it for the log")


def line(step: int, lines: int, noise: random.Random) -> dict[str, float]:
    """A line as a run of DPO writes it."""
    margin = 2 * (1 - math.exp(-3 * step / lines)) + noise.gauss(0, 0.3)
    return {
        "step": step,
        "epoch": round(step / 1000, 4),
        "time_s": round(step * 0.7, 3),
        "loss": math.log1p(math.exp(-margin)),
        "rewards/accuracies": min(1.0, max(0.0, 0.5 + 0.2 * margin)),
        "rewards/margins": margin,
        "rewards/chosen": noise.gauss(0, 0.1),
        "rewards/rejected": -margin,
        "logps/chosen": -120 + noise.gauss(0, 4),
        "logps/rejected": -150 + noise.gauss(0, 4),
        "length/chosen": 42 + noise.gauss(0, 4),
        "length/rejected": 60 + noise.gauss(0, 4),
        "entropy": 1.4 + noise.gauss(0, 0.02),
        "kl": 0.1 * step / lines,
        "grad_norm": abs(noise.gauss(3, 1)),
        "tokens_per_s": 812.5,
        "learning_rate": 1e-5 * (1 - step / lines),
    }


def look(pages: Pages) -> tuple[float, int]:
    """Asks for the page of the run once: the seconds that took, and the bytes it has."""
    scope = {
        "type": "http", "method": "GET", "path": "/run/runs/long", "headers": [], "query_string": b"",
        "path_params": {"name": "runs/long"},
    }  # fmt: skip
    started = time.perf_counter()
    answer = pages.run(Request(scope))
    return time.perf_counter() - started, len(answer.body)


def pages_behind(pages: Pages) -> bool:
    """Whether some of the log is still unread."""
    (run,) = pages._runs.find().values()
    return run.metrics.share_read < 1


def peak_mib() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()

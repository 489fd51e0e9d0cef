"""How often each detector of the watch fires on runs with the fault that it looks for, and on runs without it.

The runs are those of `planted_runs.py`, real ones of a second or two each. Clean runs, of several methods, are counted
against every detector. The logs are kept, so that a run that is there is not trained again; how the watch judges them
is always reckoned anew, as `penchant doctor` does it, which is what the watch says beside training.

    TMPDIR=/dev/shm taskset -c 1 python bench/planted_faults.py --seeds 20        # goes on where it was stopped
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from planted_runs import CLEAN, FAULTS, Case, World, run

from penchant.disk import new_folder
from penchant.doctor.diagnosis import diagnose
from penchant.watch import DETECTORS

ROOT = Path(__file__).parents[1]
LOGS = ("metrics.jsonl", "events.jsonl", "run.yaml", "summary.json", "data.json")
"""What is kept of a run."""

CASES: list[tuple[str, str, Case]] = [
    *(("clean", name, case) for name, case in CLEAN.items()),
    *(("fault", name, case) for name, (_, case) in FAULTS.items()),
]


def place_of(folder: Path, kind: str, name: str, seed: int) -> Path:
    """Where the log of a run is kept."""
    return folder / kind / name.replace(",", "").replace(" ", "-") / str(seed)


def train_missing(folder: Path, cases: Sequence[tuple[str, str, Case]], seeds: Sequence[int], say: bool = True) -> None:
    """Trains the runs whose logs are not in the folder yet."""
    for seed in seeds:
        missing = [one for one in cases if not place_of(folder, *one[:2], seed).exists()]
        world = World(seed) if missing else None
        for kind, name, case in missing:
            assert world is not None
            started = time.process_time()
            with tempfile.TemporaryDirectory() as trained:
                run(case, world, Path(trained) / "run")
                place = place_of(folder, kind, name, seed)
                place.parent.mkdir(parents=True, exist_ok=True)
                with new_folder(place) as kept:
                    for log in LOGS:
                        if (Path(trained) / "run" / log).exists():  # a run of which nothing was told has no events
                            shutil.copy(Path(trained) / "run" / log, kept)
                    seconds = round(time.process_time() - started, 2)
                    (kept / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
            if say:
                print(f"{kind:<6}{name:<31}{seed:>3} {seconds:6.1f} s  {told(place)}", flush=True)


def told(run_dir: Path) -> dict[str, Any]:
    """What the watch says of a run: the codes, with severity and first step."""
    troubles = diagnose(run_dir).troubles
    return {trouble.first.code: (trouble.worst.severity, trouble.first.step) for trouble in troubles}


def table(folder: Path, seeds: Sequence[int]) -> tuple[str, bool]:
    """The confusion table of the runs that are there, as Markdown, and whether all detectors keep to 95% and 5%."""
    rows, seconds = [], 0.0
    for kind, name, _ in CASES:
        for seed in seeds:
            place = place_of(folder, kind, name, seed)
            if place.exists():
                rows.append((kind, name, told(place)))
                seconds += json.loads((place / "seconds.json").read_text(encoding="utf-8"))
    lines, holds = ["| detector | planted | fires on faulty runs | fires on clean runs |", "|---|---|---|---|"], True
    clean = [found for kind, _, found in rows if kind == "clean"]
    for code in DETECTORS:
        names = [name for name, (codes, _) in FAULTS.items() if code in codes]
        faulty = [found for kind, name, found in rows if kind == "fault" and name in names]
        hits, alarms = sum(code in found for found in faulty), sum(code in found for found in clean)
        lines.append(f"| {code} | {', '.join(names)} | {hits} of {len(faulty)} | {alarms} of {len(clean)} |")
        holds &= bool(faulty) and hits >= 0.95 * len(faulty) and alarms <= 0.05 * len(clean)
    quiet = sum(not found for found in clean)
    lines += ["", f"Of {len(clean)} clean runs {quiet} were told nothing at all. {len(rows)} runs, ", ""]
    lines[-2] += f"{seconds / 60:.0f} minutes of one core."
    return "\n".join(lines), holds


def main() -> None:
    """Runs, prints the table, and ends with exit code 1 where a detector misses its mark of 95% and 5%."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed: others than those that thresholds fit")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="train these runs alone")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "planted_faults", help="where logs are kept")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [case for case in CASES if not options.only or case[1] in options.only]
    seeds = range(options.first, options.first + options.seeds)
    train_missing(options.folder, cases, seeds)
    text, holds = table(options.folder, seeds)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    if not holds:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

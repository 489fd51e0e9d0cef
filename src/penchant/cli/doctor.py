"""The verb that looks at a run: what went wrong, and what to do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from penchant.cli.plugins import Verb

_EPILOG = """examples:
  penchant doctor runs/my-run              # finished or still running
  penchant doctor trl_output               # of TRL or Axolotl: with a trainer_state.json, or checkpoint-*/
  penchant doctor trl_output --method ipo --beta 0.05

What it looks for, with thresholds and sources, is in docs/watch.md. Nothing is written, no model is loaded. Exit code 2
where a finding is serious (major or stop), else 0."""


def add_verbs(verb: Verb) -> None:
    """The verbs of this file."""
    doctor = verb("doctor", _doctor, "Say what went wrong in a run, and what to do about it.", epilog=_EPILOG)
    doctor.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run directory, or a folder of TRL or Axolotl")
    doctor.add_argument("--method", metavar="NAME", help="the loss of another library's run, where it cannot be told")
    doctor.add_argument("--beta", type=float, metavar="B", help="its beta, which its log does not tell")
    doctor.add_argument("--json", action="store_true", help="print it as JSON")


def _doctor(options: argparse.Namespace) -> int:
    from penchant.doctor.diagnosis import diagnose

    diagnosis = diagnose(options.run_dir, options.method, options.beta)
    print(json.dumps(diagnosis.as_dict(), ensure_ascii=False, indent=2) if options.json else diagnosis)
    return 2 if diagnosis.is_serious else 0

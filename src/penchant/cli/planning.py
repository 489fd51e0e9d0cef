"""The verb that says what a run will need, before a weight is loaded."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from penchant.cli.plugins import Verb
from penchant.cli.training import add_keys, config_of
from penchant.errors import UserError

if TYPE_CHECKING:
    from penchant.training.plan import Plan

_EPILOG = """examples:
  penchant plan run.yaml --gpus 8 --memory 80GB
  penchant plan run.yaml --gpus 64 --memory 80GB --tokens-per-s 2500
  penchant plan run.yaml --gpus 64 --like runs/on-one-gpu
  penchant plan --model ./sft-model --data pairs.jsonl --processes 4 --device cpu
  penchant plan run.yaml --gpus 2 --memory 24GB --lora.rank 16 --gradient_checkpointing true

Reads the data and the shape of the model; weights are not loaded, so a laptop plans for a cluster. Memory is that of
one process at its peak, by kind. Time needs a rate, given or taken from a run: tokens a second that one process learns
from; what processes tell each other is not in it. Keys of the run file may follow, as with `penchant train`. Exit code
2 where --memory does not suffice."""

_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add_verbs(verb: Verb) -> None:
    """The verbs of this file."""
    plan = verb(
        "plan",
        _plan,
        "Say what memory and time a run takes in one or many processes.",
        usage="penchant plan [RUN.yaml | RECIPE] [--gpus N | --processes N] [--memory SIZE] [--tokens-per-s X | --like "
        "RUN_DIR] [--json] [--KEY VALUE ...]",
        epilog=_EPILOG,
    )
    plan.add_argument("run_file", nargs="?", metavar="RUN.yaml", help="run file or recipe; options on the line win")
    number = plan.add_mutually_exclusive_group()
    number.add_argument(
        "--gpus", type=int, metavar="N", help="processes, each with a GPU: cuda, bf16 unless dtype says"
    )
    number.add_argument("--processes", type=int, metavar="N", help="processes on this machine's device (default 1)")
    plan.add_argument("--memory", metavar="SIZE", help="what each process has: 80GB, 24GiB")
    rate = plan.add_mutually_exclusive_group()
    rate.add_argument("--tokens-per-s", type=float, metavar="X", help="that one process learns from, for the time")
    rate.add_argument("--like", type=Path, metavar="RUN_DIR", help="take that rate from a run of the same model")
    plan.add_argument("--json", action="store_true", help="print it as JSON")
    add_keys(plan)


def _plan(options: argparse.Namespace) -> int:
    import torch

    from penchant.training import hardware
    from penchant.training.logger import RunLog
    from penchant.training.plan import plan

    config = config_of(options)
    number = next(given for given in (options.gpus, options.processes, 1) if given is not None)
    if number < 1:
        raise UserError("--gpus, --processes: must be at least 1.")
    memory = None if options.memory is None else _bytes(options.memory)
    device = torch.device("cuda") if options.gpus else hardware.resolve_device(config.device)
    is_bf16 = config.dtype == "bf16" or (config.dtype == "auto" and options.gpus)
    precision = "bf16" if is_bf16 else hardware.resolve_precision(config.dtype, device)
    plans = plan(config, number, device, precision, RunLog(quiet=True))
    fits = memory is None or plans[-1].memory_bytes <= memory
    if options.json:
        facts = {"device": device.type, "dtype": precision, "memory_limit_bytes": memory, "fits": fits}
        print(json.dumps({**facts, "plans": [one.as_dict() for one in plans]}, indent=2))
    else:
        _show(plans, device.type, precision, memory, options.tokens_per_s or _rate_of(options.like))
    return 0 if fits else 2


def _show(plans: list[Plan], device: str, precision: str, memory: int | None, rate: float | None) -> None:
    from penchant.training.logger import duration

    last = plans[-1]
    trained = "all" if last.num_trained == last.num_parameters else f"{last.num_trained / 1e6:,.1f}M"
    print(f"model      {last.num_parameters / 1e6:,.1f}M parameters, {trained} trained; {precision} on {device}")
    print(f"work       {last.steps:,} steps, {last.tokens / 1e6:,.2f}M tokens; layout {last.layout}")
    names = list(dict.fromkeys(name for one in plans for name in one.memory))
    width = max(map(len, [*names, "processes"]))
    print("\nGiB a process at its peak")
    print("  ".join([f"{'processes':{width}}", *(f"{one.processes:>11}" for one in plans)]))
    for name in names:
        print("  ".join([f"{name:{width}}", *(f"{one.memory.get(name, 0) / 2**30:11.2f}" for one in plans)]))
    print("  ".join([f"{'all':{width}}", *(f"{one.memory_bytes / 2**30:11.2f}" for one in plans)]))
    if rate:
        times = [duration(one.tokens / (rate * one.processes)) for one in plans]
        print("  ".join([f"{'time':{width}}", *(f"{own:>11}" for own in times)]))
    if memory is not None:
        fitting = [one.processes for one in plans if one.memory_bytes <= memory]
        room = f"{memory / 2**30:.1f} GiB a process"
        print(f"\n{room}: {_verdict(fitting, last)}")


def _verdict(fitting: list[int], last: Plan) -> str:
    if last.processes in fitting:
        fewer = f"; {fitting[0]} would do" if fitting[0] != last.processes else ""
        return f"enough for {last.processes}{fewer}"
    largest = max(last.memory, key=lambda name: last.memory[name])
    mend = {
        "activations": "gradient_checkpointing: true, or a smaller microbatch_tokens, takes less",
        "reference": "reference.kind: precomputed keeps no second model",
    }.get(largest, "more processes, or lora.rank, take less")
    return f"not enough for {last.processes}; the most goes to {largest}: {mend}"


def _rate_of(run_dir: Path | None) -> float | None:
    """Tokens a second that each process of a run learned from."""
    if run_dir is None:
        return None
    from penchant.training.rundir import read_summary

    summary = read_summary(run_dir)
    if not summary.get("tokens_per_s"):
        raise UserError(f"--like: '{run_dir}' holds no run that says how fast it was.")
    return float(summary["tokens_per_s"]) / int(summary.get("processes", 1))


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise UserError(f"--memory: '{text}' is no size; say 80GB or 24GiB.")
    return int(float(found[1]) * _UNITS[found[2].upper()])

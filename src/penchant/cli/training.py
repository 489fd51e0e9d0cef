"""The verbs that train."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.cli.plugins import Verb, add_import_option, import_file
from penchant.cli.showing import show_comparison
from penchant.config import RunConfig, load_config, load_stages, option_names, parse_value
from penchant.errors import UserError

if TYPE_CHECKING:
    from penchant.training.run import RunResult

STOPPED_BY_THE_WATCH = 4
"""Exit code of a run that ended before its time at a finding that watch.stop_on names."""

_TRAIN_EPILOG = """examples:
  penchant train --model ./sft-model --data pairs.jsonl
  penchant train run.yaml --method ipo --loss.beta 0.05 --lora.rank 16 --output_dir runs/ipo
  penchant train run.yaml --sweep method=dpo,ipo,kto --sweep loss.beta=0.05,0.1
  penchant train zephyr-7b --model ./sft-model --data pairs.jsonl        (a recipe; `penchant recipes` lists them)
"""


def add_verbs(verb: Verb) -> None:
    """The verbs of this file."""
    train = verb(
        "train",
        _train,
        "Train a model on preferences.",
        usage="penchant train [RUN.yaml | RECIPE] [--model M --data D] [--KEY VALUE ...] [--sweep KEY=V,V] [--dry-run]",
        epilog=_TRAIN_EPILOG,
    )
    train.add_argument(
        "run_file", nargs="?", metavar="RUN.yaml", help="run file or recipe; options on the line win over it"
    )
    train.add_argument("--dry-run", action="store_true", help="stop before step 1 and show the first rows and the cost")
    train.add_argument("--overwrite", action="store_true", help="replace a run that is already in output_dir")
    train.add_argument("--json", action="store_true", help="print the run's summary as JSON on standard output")
    train.add_argument(
        "--sweep",
        action="append",
        metavar="KEY=V,V,...",
        help="a run for each value, compared at the end; given twice, for each combination",
    )
    add_import_option(train)
    _add_allow_change(train)
    add_keys(train)
    resume = verb(
        "resume",
        _resume,
        "Go on with a run that was stopped or killed, from its newest whole checkpoint.",
        usage="penchant resume RUN_DIR [--KEY VALUE ...] [--allow-change KEY,KEY]",
    )
    resume.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    _add_allow_change(resume)
    resume.add_argument("--json", action="store_true", help="print the run's summary as JSON on standard output")
    add_import_option(resume)
    add_keys(resume)
    status = verb(
        "status", _status, "Say how far a run is, whether it is being worked on, and from where it can go on."
    )
    status.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    status.add_argument("--json", action="store_true", help="print it as JSON")


def _add_allow_change(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY,KEY",
        help="keys that may differ from what they were when the run was begun: beta, learning_rate, data, ...",
    )


def add_keys(parser: argparse.ArgumentParser) -> None:
    """Every key of a run file as an option."""
    keys = parser.add_argument_group("keys (in the run file as KEY: VALUE, on the line as --KEY VALUE)")
    for name, help_text in option_names().items():
        keys.add_argument(
            f"--{name}",
            dest=f"key:{name}",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=help_text.replace("%", "%%"),
        )
    keys.add_argument("--loss.NAME", metavar="VALUE", help="a setting of the loss; `penchant methods` lists them")
    keys.add_argument("--stages.N.KEY", metavar="VALUE", help="a key for stage N alone of a run file with stages")


def is_one_of_several() -> bool:
    """Whether torchrun has started more processes than this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def config_of(options: argparse.Namespace) -> RunConfig:
    """The one run that a run file and options describe.

    Raises:
        UserError: the run file has stages, or something in it is wrong.
    """
    run_file, overrides = _run_file(options.run_file), _overrides(options)
    if run_file and load_stages(run_file, overrides):
        raise UserError(f"{run_file}: has stages; give the run file of one.")
    return load_config(run_file, overrides)


def _train(options: argparse.Namespace) -> int:
    overrides = _overrides(options)
    for path in options.imports:
        import_file(path)
    run_file = _run_file(options.run_file)
    stages = load_stages(run_file, overrides) if run_file else None
    if is_one_of_several() and (stages or options.sweep or options.dry_run):
        raise UserError("stages, --sweep, --dry-run: start them without torchrun; under it, one run at a time.")
    if options.sweep:
        if stages:
            raise UserError("--sweep: cannot go through a run file with stages.")
        return _sweep(run_file, overrides, options)
    if stages:
        if options.dry_run or options.allow_change:
            raise UserError("--dry-run, --allow-change: are for one run; a run file with stages has several.")
        return _stages(stages, options.overwrite, options.json)
    from penchant.training.run import dry_run, execute

    config = load_config(run_file, overrides)

    if options.dry_run:
        plan = dry_run(config)
        if options.json:
            print(json.dumps(plan, ensure_ascii=False, indent=2))
        return 0
    return _end(execute(config, overwrite=options.overwrite, allow_change=_allowed(options)), options.json)


def _resume(options: argparse.Namespace) -> int:
    for path in options.imports:
        import_file(path)
    from penchant.training.pipeline import STAGES
    from penchant.training.resume import config_of as config_to_resume
    from penchant.training.run import execute
    from penchant.training.rundir import read_summary

    overrides = _overrides(options)
    if (options.run_dir / STAGES).exists():
        if is_one_of_several():
            raise UserError(f"{options.run_dir}: has stages; resume them without torchrun, or one stage at a time.")
        if overrides or options.allow_change:
            raise UserError(f"{options.run_dir}: has stages, which go on with the settings that they have.")
        stages = load_stages(str(options.run_dir / STAGES), {"output_dir": str(options.run_dir)})
        assert stages is not None
        return _stages(stages, False, options.json)
    if read_summary(options.run_dir).get("status") == "finished" and not overrides:
        from penchant.training.session import round_off

        if os.environ.get("RANK", "0") != "0":
            return 0
        round_off(options.run_dir)
        print(f"{options.run_dir} is finished; there is nothing to go on with.", file=sys.stderr)
        return 0
    return _end(execute(config_to_resume(options.run_dir, overrides), allow_change=_allowed(options)), options.json)


def _status(options: argparse.Namespace) -> int:
    from penchant.training.status import status_of

    status = status_of(options.run_dir)
    print(json.dumps(status.to_json(), ensure_ascii=False, indent=2) if options.json else status)
    return 0


def _allowed(options: argparse.Namespace) -> list[str]:
    return [key.strip().replace("-", "_") for keys in options.allow_change for key in keys.split(",") if key.strip()]


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    keys = {name.removeprefix("key:"): value for name, value in vars(options).items() if name.startswith("key:")}
    return {name: parse_value(text) for name, text in keys.items()} | options.loss_settings


def _end(result: RunResult, as_json: bool) -> int:
    """What a command that trained leaves with: the summary if asked for, and the exit code."""
    if as_json and os.environ.get("RANK", "0") == "0":
        print(json.dumps({"run_dir": str(result.run_dir), **result.summary}, ensure_ascii=False, indent=2))
    if result.summary["status"] == "stopped":
        return STOPPED_BY_THE_WATCH
    return 128 + result.summary["signal"] if result.summary["status"] == "interrupted" else 0


def _sweep(run_file: str | None, overrides: dict[str, Any], options: argparse.Namespace) -> int:
    if options.dry_run:
        raise UserError("--dry-run shows one run; leave --sweep out.")
    from penchant.training.sweep import parse_sweep, run_sweep

    done = run_sweep(run_file, overrides, parse_sweep(options.sweep), options.overwrite)
    if done.run_dirs:
        from penchant.report.compare import compare, write_comparison

        comparison = compare(done.run_dirs)
        show_comparison(comparison, options.json)
        print(write_comparison(comparison, done.folder / "compare.html"), file=sys.stderr)
    if done.stopped_by is not None:
        return 128 + done.stopped_by
    return 2 if done.failures else 0


def _stages(stages: tuple[Path, str, list[RunConfig]], overwrite: bool, as_json: bool) -> int:
    from penchant.report.compare import compare, write_comparison
    from penchant.training.pipeline import run_stages
    from penchant.training.rundir import read_summary

    done = run_stages(*stages, overwrite)
    report = write_comparison(compare(done.run_dirs), done.folder / "report.html")
    print(f"report     {report}", file=sys.stderr)
    if as_json:
        print(json.dumps({run.name: read_summary(run) for run in done.run_dirs}, ensure_ascii=False, indent=2))
    return 0 if done.stopped_by is None else 128 + done.stopped_by


def _run_file(name: str | None) -> str | None:
    """A run file, or a recipe where there is no such file."""
    from penchant import recipes

    return str(recipes.path_of(name)) if name in recipes.names() and not Path(name).exists() else name

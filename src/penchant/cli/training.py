"""The verbs that train."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from penchant.cli.plugins import Verb, add_import_option, import_file
from penchant.cli.showing import show_comparison
from penchant.config import load_config, option_names, parse_value
from penchant.errors import UserError

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
    _add_keys(train)


def _add_keys(parser: argparse.ArgumentParser) -> None:
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


def _train(options: argparse.Namespace) -> int:
    keys = {name.removeprefix("key:"): value for name, value in vars(options).items() if name.startswith("key:")}
    overrides = {name: parse_value(text) for name, text in keys.items()} | options.loss_settings
    for path in options.imports:
        import_file(path)
    run_file = _run_file(options.run_file)
    if options.sweep:
        return _sweep(run_file, overrides, options)
    config = load_config(run_file, overrides)
    from penchant.training.run import dry_run, execute

    if options.dry_run:
        plan = dry_run(config)
        if options.json:
            print(json.dumps(plan, ensure_ascii=False, indent=2))
        return 0
    result = execute(config, overwrite=options.overwrite)
    if options.json:
        print(json.dumps({"run_dir": str(result.run_dir), **result.summary}, ensure_ascii=False, indent=2))
    return 130 if result.summary["status"] == "interrupted" else 0


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
    if done.interrupted:
        return 130
    return 2 if done.failures else 0


def _run_file(name: str | None) -> str | None:
    """A run file, or a recipe where there is no such file."""
    from penchant import recipes

    return str(recipes.path_of(name)) if name in recipes.names() and not Path(name).exists() else name

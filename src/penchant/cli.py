"""The command line. Verbs import what they need when they are used, so that help comes at once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from penchant.config import METHODS, RunConfig, load_config, option_names, parse_value
from penchant.errors import UserError, nearest

EXIT_CODES = "Exit codes: 0 done; 1 a fault in Penchant; 2 something you can mend (the message says what); 130 stopped."

_TRAIN_EPILOG = """examples:
  penchant train --model ./sft-model --data pairs.jsonl
  penchant train run.yaml --method ipo --loss.beta 0.05 --lora.rank 16 --output_dir runs/ipo
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; see EXIT_CODES."""
    words, loss_settings = _split_loss_settings(list(sys.argv[1:] if arguments is None else arguments))
    options, unknown = _parser().parse_known_args(words)
    try:
        if unknown:
            raise UserError(f"there is no option '{unknown[0]}'{_nearest_option(unknown[0])}")
        if loss_settings and options.verb != "train":
            raise UserError(f"settings of the loss belong to `penchant train`, not to `penchant {options.verb}`.")
        options.loss_settings = loss_settings
        return options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stdout = None
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="penchant",
        description="Trains language models on preferences: Direct Preference Optimization and its family.",
        epilog=f"`penchant VERB --help` tells more. {EXIT_CODES}",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"penchant {_version()}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], summary: str, **more: Any) -> Any:
        added = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **more,
        )
        added.set_defaults(run=run)
        return added

    train = verb(
        "train",
        _train,
        "Train a model on preference pairs.",
        usage="penchant train [RUN.yaml] [--model M --data D] [--KEY VALUE ...] [--dry-run] [--overwrite] [--json]",
        epilog=_TRAIN_EPILOG,
    )
    train.add_argument("run_file", nargs="?", metavar="RUN.yaml", help="run file; options on the line win over it")
    train.add_argument("--dry-run", action="store_true", help="stop before step 1 and show the first rows and the cost")
    train.add_argument("--overwrite", action="store_true", help="replace a run that is already in output_dir")
    train.add_argument("--json", action="store_true", help="print the run's summary as JSON on standard output")
    keys = train.add_argument_group("keys (in the run file as KEY: VALUE, on the line as --KEY VALUE)")
    for name, help_text in option_names().items():
        keys.add_argument(
            f"--{name}",
            dest=f"key:{name}",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=help_text.replace("%", "%%"),
        )
    keys.add_argument("--loss.NAME", metavar="VALUE", help="a setting of the loss; `penchant methods` lists them")

    methods = verb("methods", _methods, "List the methods and what can be set under `loss` for each.")
    methods.add_argument("--json", action="store_true", help="print them as JSON")
    report = verb("report", _report, "Write report.html of a run directory again.")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    verb("schema", _schema, "Print the JSON Schema of a run file, for editors.")
    return parser


def _train(options: argparse.Namespace) -> int:
    keys = {name.removeprefix("key:"): value for name, value in vars(options).items() if name.startswith("key:")}
    overrides = {name: parse_value(text) for name, text in keys.items()}
    config = load_config(options.run_file, overrides | options.loss_settings)
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


def _methods(options: argparse.Namespace) -> int:
    import dataclasses
    import inspect
    import textwrap

    from penchant.losses import build_loss

    losses = {method: build_loss(preset) for method, preset in METHODS.items()}
    if options.json:
        print(json.dumps({name: {"name": loss.name, **dataclasses.asdict(loss)} for name, loss in losses.items()}))
        return 0
    for method, loss in losses.items():
        print(f"{method}\n")
        print(textwrap.indent(inspect.getdoc(loss) or "", "    ") + "\n")
        for name, value in dataclasses.asdict(loss).items():
            print(f"    --loss.{name} (default {value})")
        print()
    return 0


def _report(options: argparse.Namespace) -> int:
    if not (options.run_dir / "run.yaml").exists():
        raise UserError(f"'{options.run_dir}' is no run directory: it holds no run.yaml.")
    from penchant.report import write_report

    print(write_report(options.run_dir))
    return 0


def _schema(options: argparse.Namespace) -> int:
    print(json.dumps(RunConfig.model_json_schema(), indent=2))
    return 0


def _split_loss_settings(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes `--loss.NAME VALUE` out of the words: which names there are is known only to the losses.

    Hyphens in the names of keys may stand for underscores.
    """
    kept: list[str] = []
    settings: dict[str, Any] = {}
    known = option_names()
    while words:
        word = words.pop(0)
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if word.startswith("--loss."):
            if not equals and (not words or words[0].startswith("--")):
                settings[name] = None  # reported with the loss's own settings, which know the type
                continue
            settings[name] = parse_value(text if equals else words.pop(0))
        else:
            kept.append(f"--{name}{equals}{text}" if word.startswith("--") and name in known else word)
    return kept, settings


def _nearest_option(word: str) -> str:
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    return nearest(name, option_names()) or "; `penchant VERB --help` lists them"


def _version() -> str:
    from importlib.metadata import version

    return version("penchant")

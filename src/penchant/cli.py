"""The command line. Verbs import what they need when they are used, so that help comes at once."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from penchant.config import METHODS, RunConfig, add_methods, load_config, option_names, parse_value
from penchant.errors import UserError, nearest

UNITS = {"pair": "pairs", "unpaired": "single completions, labelled", "ranking": "rankings"}
"""What a method judges, in words."""

EXIT_CODES = "Exit codes: 0 done; 1 a fault in Penchant; 2 something you can mend (the message says what); 130 stopped."

_TRAIN_EPILOG = """examples:
  penchant train --model ./sft-model --data pairs.jsonl
  penchant train run.yaml --method ipo --loss.beta 0.05 --lora.rank 16 --output_dir runs/ipo
  penchant train run.yaml --sweep method=dpo,ipo,kto --sweep loss.beta=0.05,0.1
  penchant train zephyr-7b --model ./sft-model --data pairs.jsonl        (a recipe; `penchant recipes` lists them)
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
    _add_import(train)
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
    methods.add_argument("name", nargs="?", metavar="NAME", help="tell all of this one")
    _add_import(methods)
    methods.add_argument("--json", action="store_true", help="print them as JSON")
    compare = verb("compare", _compare, "Compare runs: one table, and with --html one page with a chart.")
    compare.add_argument(
        "run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="run directories, or folders of them"
    )
    compare.add_argument("--html", type=Path, metavar="FILE", help="write the page here")
    compare.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    compare.add_argument("--json", action="store_true", help="print it as JSON")
    recipes = verb("recipes", _recipes, "List published set-ups, or print one as a run file.")
    recipes.add_argument("name", nargs="?", metavar="NAME")
    report = verb("report", _report, "Write report.html of a run directory again.")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    verb("schema", _schema, "Print the JSON Schema of a run file, for editors.")
    return parser


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE.py",
        help="run this Python file first: the losses that it defines become methods",
    )


def _train(options: argparse.Namespace) -> int:
    keys = {name.removeprefix("key:"): value for name, value in vars(options).items() if name.startswith("key:")}
    overrides = {name: parse_value(text) for name, text in keys.items()} | options.loss_settings
    for path in options.imports:
        _import(path)
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
        _show(comparison, options.json)
        print(write_comparison(comparison, done.folder / "compare.html"), file=sys.stderr)
    if done.interrupted:
        return 130
    return 2 if done.failures else 0


def _run_file(name: str | None) -> str | None:
    """A run file, or a recipe where there is no such file."""
    from penchant import recipes

    return str(recipes.path_of(name)) if name in recipes.names() and not Path(name).exists() else name


def _import(path: str) -> None:
    """Runs a Python file; the losses that it defines become methods."""
    import importlib.util

    if not Path(path).is_file():
        raise UserError(f"--import: there is no file '{path}'.")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--import: '{path}' is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--import: '{path}' fails with {type(error).__name__}: {error}") from error
    from penchant.losses import LOSSES

    add_methods(LOSSES)


def _methods(options: argparse.Namespace) -> int:
    from penchant.losses import LOSSES, build_loss

    for path in options.imports:
        _import(path)
    if options.name and options.name not in METHODS:
        raise UserError(f"there is no method '{options.name}'{nearest(options.name, METHODS)}")
    shown = {name: METHODS[name] for name in ([options.name] if options.name else METHODS)}
    if options.json:
        print(json.dumps({name: build_loss(preset).settings() for name, preset in shown.items()}, indent=2))
    elif options.name:
        _describe_method(options.name)
    else:
        for name, preset in METHODS.items():
            summary = (inspect.getdoc(LOSSES[name]) or "").splitlines()[0] if name in LOSSES else _preset(preset)
            print(f"{name:<18} {summary}")
        print("\n`penchant methods NAME` tells more of one.")
    return 0


def _preset(settings: dict[str, Any]) -> str:
    """A preset in words: `dpo with label_smoothing 0.1`, or `dpo (beta 0.1) + sft (weight 1.0)`."""

    def with_values(fields: dict[str, Any]) -> str:
        return ", ".join(f"{key} {value}" for key, value in fields.items() if key != "name")

    if "name" in settings:
        return f"{settings['name']} with {with_values(settings)}"
    return " + ".join(f"{name} ({with_values(fields)})" for name, fields in settings.items())


def _describe_method(method: str) -> None:
    from penchant.losses import LOSSES, NEEDS, build_loss, field_help

    preset = METHODS[method]
    loss = build_loss(preset)
    if method not in LOSSES:
        print(f"{method}: {_preset(preset)}\n")
    terms = {"": loss.settings()} if "name" in preset else {f"{name}.": f for name, f in loss.settings().items()}
    for prefix, settings in terms.items():
        name = settings.get("name", prefix.rstrip("."))
        print(f"{name}\n\n{textwrap.indent(inspect.getdoc(LOSSES[name]) or '', '    ')}\n")
        if prefix:
            print(f"    --loss.{prefix}weight (default {settings['weight']})\n        Weight of this term in the sum.")
        for key, sentence in field_help(LOSSES[name]).items():
            print(f"    --loss.{prefix}{key} (default {settings[key]})\n{textwrap.indent(sentence, '        ')}")
        print()
    print(f"Judges {' or '.join(UNITS[unit] for unit in loss.units)}. Reads, beyond the policy's log-probabilities:")
    print("\n".join(f"    {NEEDS[need]}" for need in sorted(loss.needs)) or "    nothing")


def _compare(options: argparse.Namespace) -> int:
    from penchant.report.compare import as_markdown, compare, write_comparison

    comparison = compare(_runs_within(options.run_dirs))
    if options.markdown:
        print(as_markdown(comparison))
    else:
        _show(comparison, options.json)
    if options.html:
        print(write_comparison(comparison, options.html), file=sys.stderr)
    return 0


def _show(comparison: Any, as_json: bool) -> None:
    from rich.console import Console

    from penchant.report.compare import print_comparison, to_json

    if as_json:
        print(json.dumps(to_json(comparison), ensure_ascii=False, indent=2))
    else:
        print_comparison(comparison, Console())


def _runs_within(folders: Sequence[Path]) -> list[Path]:
    """Run directories as they are; in the place of a folder of runs, its runs."""
    found: list[Path] = []
    for folder in folders:
        runs = sorted(path.parent for path in folder.glob("*/run.yaml"))
        found += runs if runs and not (folder / "run.yaml").exists() else [folder]
    return found


def _recipes(options: argparse.Namespace) -> int:
    from penchant import recipes

    if options.name:
        print(recipes.path_of(options.name).read_text(encoding="utf-8"), end="")
        return 0
    for name in recipes.names():
        first = recipes.path_of(name).read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:<24} {first.removeprefix('# ')}")
    print("\n`penchant recipes NAME` prints one; `penchant train NAME --model M --data D` runs it.")
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

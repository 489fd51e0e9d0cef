"""The verbs that show: methods, recipes, reports, comparisons."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penchant.cli.plugins import Verb, add_import_option, import_file
from penchant.config import METHODS, ONLINE_METHODS, ONLINE_SUMMARIES, RunConfig
from penchant.errors import UserError, nearest

UNITS = {"pair": "pairs", "unpaired": "single completions, labelled", "ranking": "rankings"}
"""What a method judges, in words."""


_DASH = """examples:
  penchant dash                        # all runs under runs/
  penchant dash runs/beta-0.05         # one run

It prints an address with a token; whoever has it can read the runs, stop them and leave notes. The page listens on
127.0.0.1 alone. To see that of another machine: ssh -L 8765:127.0.0.1:8765 HOST, and open the address here."""


def add_verbs(verb: Verb) -> None:
    """The verbs of this file."""
    methods = verb("methods", _methods, "List the methods and what can be set under `loss` for each.")
    methods.add_argument("name", nargs="?", metavar="NAME", help="tell all of this one")
    add_import_option(methods)
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
    dash = verb("dash", _dash, "Serve a live page of runs, on this machine only (needs the extra ui).", epilog=_DASH)
    dash.add_argument(
        "folders",
        type=Path,
        nargs="*",
        metavar="RUN_DIR",
        default=[Path("runs")],
        help="run directories, or folders of them; default: runs",
    )
    dash.add_argument("--port", type=int, default=8765, help="0 takes any that is free; default: 8765")
    verb("schema", _schema, "Print the JSON Schema of a run file, for editors.")


def _methods(options: argparse.Namespace) -> int:
    from penchant.losses import LOSSES, build_loss

    for path in options.imports:
        import_file(path)
    if options.name and options.name not in METHODS:
        raise UserError(f"there is no method '{options.name}'{nearest(options.name, METHODS)}")
    shown = {name: METHODS[name] for name in ([options.name] if options.name else METHODS)}
    if options.json:
        print(json.dumps({name: build_loss(preset).settings() for name, preset in shown.items()}, indent=2))
    elif options.name:
        _describe_method(options.name)
    else:
        for name, preset in METHODS.items():
            if name not in ONLINE_METHODS:
                summary = (inspect.getdoc(LOSSES[name]) or "").splitlines()[0] if name in LOSSES else _preset(preset)
                print(f"{name:<18} {summary}")
        print("\nThese take prompts, sample completions and have them judged (judge.name):")
        for name in ONLINE_METHODS:
            print(f"{name:<18} {ONLINE_SUMMARIES[name]}")
        print("\n`penchant methods NAME` tells more of one.")
    return 0


def _preset(settings: dict[str, Any]) -> str:
    """A preset in words: `dpo with label_smoothing 0.1`, or `dpo (beta 0.1) + sft (weight 1.0)`."""

    def with_values(fields: dict[str, Any]) -> str:
        return ", ".join(f"{key} {value}" for key, value in fields.items() if key != "name")

    if "name" in settings:
        return f"{settings['name']} with {with_values(settings)}".removesuffix(" with ")
    return " + ".join(f"{name} ({with_values(fields)})" for name, fields in settings.items())


def _describe_method(method: str) -> None:
    from penchant.losses import LOSSES, NEEDS, build_loss, field_help

    preset = METHODS[method]
    loss = build_loss(preset)
    if method in ONLINE_METHODS:
        print(f"{method}: {ONLINE_SUMMARIES[method]}\n")
        print(f"Unless the run says otherwise: {_online_preset(method)}. Its loss, which --loss.name exchanges:\n")
    elif method not in LOSSES:
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


def _online_preset(method: str) -> str:
    config = RunConfig.model_construct(method=method)
    sampling, online = config.filled_sampling(), config.filled_online()
    values = {
        **{f"sampling.{key}": getattr(sampling, key) for key in ("completions", "temperature", "top_p", "top_k")},
        **{f"online.{key}": value for key, value in online.model_dump(exclude_defaults=True).items()},
    }
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _compare(options: argparse.Namespace) -> int:
    from penchant.report.compare import as_markdown, compare, write_comparison

    comparison = compare(_runs_within(options.run_dirs))
    if options.markdown:
        print(as_markdown(comparison))
    else:
        show_comparison(comparison, options.json)
    if options.html:
        print(write_comparison(comparison, options.html), file=sys.stderr)
    return 0


def show_comparison(comparison: Any, as_json: bool) -> None:
    """Prints a comparison as a table or as JSON."""
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


def _dash(options: argparse.Namespace) -> int:
    from penchant.dash import serve

    def announce(address: str) -> None:
        print(f"open {address}\nCtrl-C ends the page; the runs go on.", file=sys.stderr, flush=True)

    serve(options.folders, options.port, announce)
    return 0


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

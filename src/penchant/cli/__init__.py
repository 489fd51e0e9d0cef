"""The command line. Verbs import what they need when they are used, so that help comes at once."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from penchant.cli import data, doctor, evaluating, online, planning, showing, training
from penchant.cli.training import is_one_of_several
from penchant.config import option_names, parse_value
from penchant.errors import UserError, nearest

EXIT_CODES = (
    "Exit codes: 0 done; 1 a fault in Penchant; 2 something you can mend (the message says what); 3 no checkpoint is "
    "whole; 4 the watch has ended the run, as watch.stop_on asks for; 130 stopped by Ctrl-C, 143 by SIGTERM (both "
    "after a checkpoint)."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; see EXIT_CODES."""
    words, loss_settings = _split_loss_settings(list(sys.argv[1:] if arguments is None else arguments))
    options, unknown = _parser().parse_known_args(words)
    try:
        if unknown:
            raise UserError(f"there is no option '{unknown[0]}'{_nearest_option(unknown[0])}")
        if loss_settings and options.verb not in ("train", "resume", "plan"):
            raise UserError(f"settings of the loss belong to `penchant train`, not to `penchant {options.verb}`.")
        if is_one_of_several() and options.verb not in ("train", "resume"):
            raise UserError(f"`penchant {options.verb}` works in one process; start it without torchrun.")
        options.loss_settings = loss_settings
        return options.run(options)
    except UserError as error:
        where = f"[process {os.environ['RANK']}] " if is_one_of_several() else ""
        print(f"{where}error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        print("stopped.", file=sys.stderr)
        return 128 + getattr(stop, "signum", signal.SIGINT)
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

    for room in (training, planning, data, doctor, online, evaluating, showing):
        room.add_verbs(verb)
    return parser


def _split_loss_settings(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes `--loss.NAME VALUE` and `--stages.N.KEY VALUE` out of the words: losses and run files know these names.

    Hyphens in the names of keys may stand for underscores.
    """
    kept: list[str] = []
    settings: dict[str, Any] = {}
    known = option_names()
    while words:
        word = words.pop(0)
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if word.startswith(("--loss.", "--stages.")):
            if not equals and (not words or words[0].startswith("--")):
                settings[name] = None  # reported with the settings themselves, which know the type
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

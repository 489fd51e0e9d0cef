"""The verbs that look at data before anything is trained."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.cli.plugins import Verb
from penchant.config import RunConfig, option_names
from penchant.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from penchant.doctor.checkup import Checkup, Reader
    from penchant.doctor.findings import Finding
    from penchant.doctor.preview import PreviewedRow
    from penchant.examples import Example

_CHECK_EPILOG = """examples:
  penchant check pairs.jsonl
  penchant check pairs.jsonl --eval_data held.jsonl --model ./sft-model --max_length 2048

Without --model only the texts are looked at, lengths are in words and nothing heavy is loaded; with it also what the
model would see: ends, special tokens, what max_length cuts off. Exit code 2 where a run would refuse to start."""

_CONVERT_EPILOG = """example:
  penchant convert ultrafeedback.parquet pairs.jsonl --to openai

Rows that cannot be used are left out and named. Every row is read back before it is written, and must say the same."""

_COLOURS = {"stop": "bold red", "major": "red", "warn": "yellow", "info": "cyan"}
_SECONDS_BETWEEN_LINES = 5.0
_MOST_NAMED = 5


def add_verbs(verb: Verb) -> None:
    """The verbs of this file."""
    check = verb("check", _check, "Examine preference data before training on it.", epilog=_CHECK_EPILOG)
    check.add_argument("data", metavar="DATA", help=_help("data"))
    check.add_argument("--eval_data", metavar="E", help="held-out rows; looked for among the training rows, too")
    check.add_argument("--model", metavar="M", help="the model to be trained; its tokenizer and chat template are used")
    _add_keys(check)
    check.add_argument("--max_bad_rows", type=float, default=_default("max_bad_rows"), help=_help("max_bad_rows"))
    check.add_argument("--json", action="store_true", help="print what was found as JSON")
    preview = verb("preview", _preview, "Show rows as the model sees them: what is trained on, and where it is cut.")
    preview.add_argument("data", metavar="DATA", help=_help("data"))
    preview.add_argument("--model", metavar="M", required=True, help="the model whose tokenizer reads the rows")
    _add_keys(preview)
    preview.add_argument("--rows", type=int, default=3, metavar="N", help="how many rows, from the first (default 3)")
    preview.add_argument("--json", action="store_true", help="print the rows as JSON, token by token")

    convert = verb("convert", _convert, "Write preference data again as rows of another kind.", epilog=_CONVERT_EPILOG)
    convert.add_argument("data", metavar="DATA", help=_help("data"))
    convert.add_argument("output", metavar="OUT.jsonl", help="the file to write, also .jsonl.gz")
    convert.add_argument(
        "--to", required=True, metavar="FAMILY", help="the row family to write: trl, sharegpt or openai"
    )
    convert.add_argument("--data_family", metavar="FAMILY", help=_help("data_family"))
    convert.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def _add_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_family", metavar="FAMILY", help=_help("data_family"))
    parser.add_argument("--max_length", type=int, default=_default("max_length"), metavar="N", help=_help("max_length"))
    parser.add_argument("--chat_template", metavar="FILE", help=_help("chat_template"))


def _default(key: str) -> Any:
    return RunConfig.model_fields[key].default


def _help(key: str) -> str:
    field = RunConfig.model_fields[key]
    told = "" if field.is_required() or field.default is None else f" (default {field.default})"
    return option_names()[key].replace("%", "%%") + told


# check


def _check(options: argparse.Namespace) -> int:
    from penchant.doctor.checkup import check_file
    from penchant.doctor.findings import worst_first

    if options.model is None and options.chat_template:
        raise UserError("--chat_template: has no effect without --model.")
    reader = _reader(options) if options.model else None
    checkups: list[Checkup] = []
    for path in filter(None, (options.data, options.eval_data)):
        with _progress(path) as advance:
            checkups.append(check_file(path, reader, advance, options.data_family))
    findings = [checkup.findings() for checkup in checkups]
    if len(checkups) > 1:
        # A held-out file is small by its nature; what it has in common with the training rows is the question.
        findings[1] = [found for found in findings[1] if found.name != "too-few"]
        leak = checkups[0].scan.leak_into(checkups[1].scan)
        findings[1] = worst_first([*findings[1], *([leak] if leak else [])])
    if options.json:
        told = {
            split: _as_dict(checkup, found)
            for split, checkup, found in zip(("train", "eval"), checkups, findings, strict=False)
        }
        print(json.dumps(told, ensure_ascii=False, indent=2))
    else:
        for checkup, found in zip(checkups, findings, strict=True):
            _show_checkup(checkup, found, options.max_bad_rows)
    is_refused = any(checkup.num_bad > options.max_bad_rows * checkup.num_rows for checkup in checkups)
    return 2 if is_refused or any(found.severity == "stop" for one in findings for found in one) else 0


def _as_dict(checkup: Checkup, findings: Sequence[Finding]) -> dict[str, Any]:
    from penchant.doctor.checkup import reason_of

    return {
        "path": checkup.path,
        "rows": checkup.num_rows,
        "usable": len(checkup.scan),
        "families": dict(checkup.families.most_common()),
        "problems": {
            code: {"rows": count, "reason": reason_of(code), "first": checkup.named[code]}
            for code, count in checkup.problems.most_common()
        },
        "checks": [found.as_dict() for found in findings],
    }


def _show_checkup(checkup: Checkup, findings: Sequence[Finding], limit: float) -> None:
    from rich.markup import escape

    from penchant.doctor.checkup import reason_of

    console = _console()
    families = ", ".join(f"{family} {count:,}" for family, count in checkup.families.most_common())
    console.print(f"[bold]{escape(checkup.path)}[/bold]: {checkup.num_rows:,} rows, {len(checkup.scan):,} usable")
    console.print(f"rows by family: {escape(families)}")
    if checkup.problems:
        share, verdict = checkup.num_bad / checkup.num_rows, ""
        if share > limit:
            verdict = f"; [red]more than max_bad_rows {limit:g} allows, so no run would start[/red]"
        console.print(f"\n[bold]Rows that cannot be used[/bold] ({share:.1%} are faulty{verdict})")
        for code, count in checkup.problems.most_common():
            console.print(f"{count:>7,}  {code}  {escape(reason_of(code))}")
            for line in checkup.named[code][:3]:
                console.print(f"         {escape(line)}", style="dim")
    if not findings:
        console.print("\nNothing was found that speaks against training on these rows.")
        return
    console.print("\n[bold]Findings[/bold]")
    for found in findings:
        colour = _COLOURS[found.severity]
        console.print(
            f"[{colour}]{found.severity:<5}[/{colour}]  {found.code}  {escape(found.name)}: {escape(found.seen)}"
        )
        if found.rows:
            more = f", ... (the first {len(found.rows)} are named with --json)" if len(found.rows) > 3 else ""
            console.print(f"            {escape(', '.join(found.rows[:3]))}{more}", style="dim")
    console.print("\n[bold]What they mean, and what to do[/bold]")
    for found in findings:
        meaning = found.message.removeprefix(f"{found.seen}: ")
        console.print(f"{found.code}  {escape(found.name)}: {escape(meaning)}. To mend it: {escape(found.fix)}.")
    console.print()


# preview


def _preview(options: argparse.Namespace) -> int:
    from penchant.data.formats import RowProblem
    from penchant.doctor.preview import as_dict, preview_rows

    if options.rows < 1:
        raise UserError(f"--rows: must be at least 1, got {options.rows}.")
    reader = _reader(options)
    rows = list(islice(preview_rows(options.data, reader, options.data_family), options.rows))
    if options.json:
        print(json.dumps([as_dict(row, reader.tokenizer) for row in rows], ensure_ascii=False, indent=2))
        return 0
    console = _console()
    if reader.lacks_template:
        console.print("The tokenizer has no chat template: turns are written out as 'Human:' and 'Assistant:'.\n")
    where = "green" if console.is_terminal else "[brackets]"
    console.print(f"Tokens in {where} are trained on, the others only read.", markup=False)
    for row in rows:
        if isinstance(row, RowProblem):
            console.print(f"\n{row.source}: left out\n{row}", markup=False)
        else:
            _show_row(row, reader, console)
    return 0


def _show_row(row: PreviewedRow, reader: Reader, console: Console) -> None:
    from rich.text import Text

    decode = reader.tokenizer.decode
    console.print(Text(f"\n{row.source}", style="bold"))
    console.print(Text(f"prompt, {len(row.prompt_ids)} tokens", style="bold"))
    console.print(Text(decode(row.prompt_ids), style="dim"))
    for completion in row.completions:
        console.print(Text(f"{completion.name}, {len(completion.ids)} tokens", style="bold"))
        console.print(_trained_text(decode(completion.ids[:-1]), decode(completion.ids[-1:]), console))
        if completion.num_cut:
            at = f"cut at max_length {reader.max_length}: {completion.num_cut} more tokens, the end among them"
            console.print(Text(at, style="red"))
        else:
            console.print(Text(f"ends with {decode(completion.ids[-1:])!r}, token {completion.ids[-1]}", style="dim"))


def _trained_text(text: str, last: str, console: Console) -> Text:
    from rich.text import Text

    if not console.is_terminal:
        return Text(f"[{text}{last}]")
    return Text.assemble((text, "green"), (last, "green reverse"))


# convert


def _convert(options: argparse.Namespace) -> int:
    from penchant.data.formats import RowProblem, stream_examples
    from penchant.data.writing import write_rows

    if Path(options.output).exists() and not options.overwrite:
        raise UserError(f"{options.output}: is there already; choose another name, or give --overwrite.")
    left_out: list[RowProblem] = []

    def usable() -> Iterator[Example]:
        with _progress(options.data) as advance:
            for _, found in stream_examples(options.data, options.data_family):
                advance(1)
                if not isinstance(found, RowProblem):
                    yield found
                else:
                    left_out.append(found)

    num_rows = write_rows(usable(), options.output, options.to)
    for problem in left_out[:_MOST_NAMED]:
        print(problem, file=sys.stderr)
    print(f"{options.output}: {num_rows:,} rows written, {len(left_out):,} left out", file=sys.stderr)
    return 0


# all


def _reader(options: argparse.Namespace) -> Reader:
    """The tokenizer of the model that was named, with the template that a run would use."""
    if options.max_length < 2:
        raise UserError(f"--max_length: must be at least 2, got {options.max_length}.")
    from penchant.doctor.checkup import Reader
    from penchant.models.load import load_tokenizer

    tokenizer = load_tokenizer(options.model)
    if options.chat_template:
        try:
            tokenizer.chat_template = Path(options.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat_template: '{options.chat_template}' cannot be read: {error}") from None
    return Reader(tokenizer, options.max_length)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


@contextmanager
def _progress(path: str) -> Iterator[Callable[[int], None]]:
    """Counts rows on standard error while a file is read; without a terminal a line every few seconds."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    num_rows = 0
    if console.is_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:,} rows")
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(Path(path).name, total=None)

            def count(rows: int) -> None:
                nonlocal num_rows
                num_rows += rows
                if num_rows % 100 == 0:
                    bar.update(task, completed=num_rows)

            yield count
        return
    last = time.monotonic()

    def tell(rows: int) -> None:
        nonlocal num_rows, last
        num_rows += rows
        if num_rows % 100 == 0 and time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{path}: {num_rows:,} rows", file=sys.stderr)

    yield tell

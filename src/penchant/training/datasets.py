"""From files to tokenised examples, with an account of every row that fell away."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penchant.config import RunConfig
from penchant.data.chat import TOKEN_CHECKS, Split, TokenizedData, tokenize_examples
from penchant.data.filters import FILTER_CHECKS, filter_by_margin
from penchant.data.flat import UNJUDGED, FlatExamples, flat_columns, flattened, in_parts
from penchant.data.formats import CHECKS, ExampleData, RowProblem, examples_from_rows, read_examples
from penchant.data.prompts import PromptData
from penchant.data.units import UNIT_CHECKS, Unit, as_unit, every_answer
from penchant.doctor.findings import PROBLEMS, SOUND, Finding
from penchant.errors import UserError
from penchant.losses import Loss
from penchant.training.checks import DROP_REASONS, examine
from penchant.training.logger import RunLog
from penchant.types import Example, Pair, Ranking, TokenizedExample, Unpaired

_REASONS = CHECKS | TOKEN_CHECKS | UNIT_CHECKS | FILTER_CHECKS | DROP_REASONS
"""Code -> why a row was left out, in a few words."""

COLUMNS = {"margins": "margin", "win_probabilities": "win_probabilities"}
"""What a loss may need of the data beyond the texts -> where a pair has it."""

Rows = str | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class ReadRows:
    """Training and held-out examples as texts, in the unit of the loss."""

    train: ExampleData
    heldout: ExampleData
    has_messages: bool
    """Whether a prompt is messages, which only a chat template makes a text of."""


@dataclass(frozen=True)
class Datasets:
    """Training and held-out examples of a run; `findings` is the account of both, as `data.json` keeps it."""

    train: Split
    heldout: Split
    findings: dict[str, Any]
    has_messages: bool = False
    """Whether a prompt was messages."""


def read_rows(config: RunConfig, loss: Loss, data: Rows | None = None, eval_data: Rows | None = None) -> ReadRows:
    """The rows that a run file names, or those in memory, split into training and held-out ones and fit to the loss.

    Raises:
        UserError: too many rows cannot be used, none is left, or an option or the loss asks for what they do not have.
    """
    rows = _read(data if data is not None else config.data, "data", config.data_family)
    refuse_bad_rows(config, rows)
    given = eval_data if eval_data is not None else config.eval_data
    heldout = None
    if given is not None:
        heldout = _read(given, "eval_data", config.data_family)
        refuse_bad_rows(config, heldout)
    refuse_idle_data_options(config, loss, [*rows.examples, *(heldout.examples if heldout else [])])
    has_messages = any(not isinstance(example.prompt, str) for example in rows.examples)
    train, heldout = (rows, heldout) if heldout is not None else _split_by_prompt(rows, config.eval_size, config.seed)
    return ReadRows(
        fit_to_loss(config, loss, train, is_heldout=False),
        fit_to_loss(config, loss, heldout, is_heldout=True),
        has_messages,
    )


def _read(data: Rows, name: str, family: str | None) -> ExampleData:
    return read_examples(data, family) if isinstance(data, str) else examples_from_rows(data, name, family)


def refuse_bad_rows(config: RunConfig, data: ExampleData) -> None:
    """Stops where too many rows cannot be used, or none is left.

    Raises:
        UserError: naming the first bad rows.
    """
    refuse_rows(config, data.problems, data.num_rows)
    if not data.examples:
        raise UserError("data: no usable row is left.\n" + _examples(data.problems))


def unit_for(loss: Loss, examples: Sequence[Example]) -> Unit:
    """What the examples must be for this loss; one that takes pairs and single completions takes them as they come."""
    if any_of(examples, Unpaired) and "unpaired" in loss.units:
        return "unpaired"
    return loss.units[0]  # type: ignore[return-value]


def any_of(examples: Sequence[Example], kind: type) -> bool:
    """Whether one of the examples is of this kind."""
    return any(isinstance(example, kind) for example in examples)


def fit_to_loss(config: RunConfig, loss: Loss, data: ExampleData, is_heldout: bool) -> ExampleData:
    """The examples in the unit that the loss takes; those that cannot be are among the problems.

    Held-out pairs stay pairs for a loss over single completions too: they tell more. Training pairs are filtered and
    weighed by their margin, where the run asks for it; held-out ones stay as they are, so that runs can be compared.

    Raises:
        UserError: the loss, or the run, needs a column that a row does not have.
    """
    unit = unit_for(loss, data.examples)
    if is_heldout and unit == "unpaired" and not any_of(data.examples, Unpaired):
        unit = "pair"
    examples, problems = data.examples, list(data.problems)
    goes_by_margin = not is_heldout and (config.min_margin is not None or config.weigh_by_margin)
    if goes_by_margin and unit != "pair":  # only pairs have margins: what they become later has none
        examples, unsure = filter_by_margin(examples, config.min_margin, config.weigh_by_margin)
        problems += unsure
    examples, misfits = as_unit(examples, unit, config.pairs_from_rankings)
    problems += misfits
    if goes_by_margin and unit == "pair":
        examples, unsure = filter_by_margin(examples, config.min_margin, config.weigh_by_margin)
        problems += unsure
    if config.turns == "all" and "labels" not in loss.needs:
        examples = every_answer(examples)
    if "labels" in loss.needs:
        problems += [_unlabelled(example) for example in examples if _lacks_label(example)]
        examples = [example for example in examples if not _lacks_label(example)]
    for need, column in COLUMNS.items():
        lacking = [example.source for example in examples if getattr(example, column, None) is None]
        if need in loss.needs and lacking:
            raise UserError(f"data: the loss '{loss.name}' needs {column} for every pair; {lacking[0]} has none.")
    return ExampleData(examples, problems, data.families, data.num_rows)


def refuse_idle_data_options(config: RunConfig, loss: Loss, examples: Sequence[Example]) -> None:
    """Stops where an option about rows has nothing to act on.

    Raises:
        UserError: naming the option.
    """
    if config.pairs_from_rankings != "best_worst" and (not any_of(examples, Ranking) or "pair" not in loss.units):
        why = "there are no rankings in the data" if "pair" in loss.units else f"'{loss.name}' takes no pairs"
        raise UserError(f"pairs_from_rankings: has no effect: {why}.")


def tokenize_datasets(config: RunConfig, loss: Loss, rows: ReadRows, tokenizer: Any, log: RunLog) -> Datasets:
    """Tokenised training and held-out examples, examined by the data doctor; those that `drop` names are left out.

    Raises:
        UserError: too many rows cannot be used, none is left, or the doctor advises against the run.
    """
    train, heldout = rows.train, rows.heldout
    tokenized = []
    first_index = 0
    for data in (train, heldout):
        with log.progress("tokenizing", len(data.examples)) as meter:
            tokenized.append(_tokenized(config, data.examples, tokenizer, first_index, meter.advance))
        first_index += len(data.examples)
        refuse_rows(config, [*data.problems, *tokenized[-1].problems], data.num_rows)
    checks = examine(config, loss, (train, heldout), (tokenized[0], tokenized[1]), tokenizer)
    if not tokenized[0].examples:
        raise UserError("data: no row is left to train on.\n" + _examples([*train.problems, *tokenized[0].problems]))
    if config.eval_data and not tokenized[1].examples:
        problems = [*heldout.problems, *tokenized[1].problems]
        raise UserError("eval_data: no row is left to hold against.\n" + _examples(problems))
    findings = {
        "train": _findings(config.data, train, tokenized[0], checks[0]),
        "eval": (
            _findings(config.eval_data or config.data, heldout, tokenized[1], checks[1])
            if tokenized[1].examples
            else None
        ),
    }
    return Datasets(tokenized[0], tokenized[1], findings, rows.has_messages)


def _tokenized(
    config: RunConfig, examples: Sequence[Example], tokenizer: Any, first_index: int, advance: Callable[[int], None]
) -> TokenizedData:
    """Some examples at a time as token ids, which soon take a few bytes each instead of an object of Python's."""
    columns, num_truncated = [], 0
    texts: dict[int, Example] = {}
    problems: list[RowProblem] = []
    for part in in_parts(examples):
        made = tokenize_examples(part, tokenizer, config.max_length, config.truncation, first_index, advance)
        first_index += len(part)
        columns.append(flat_columns(made.examples))
        texts.update(made.texts)
        problems += made.problems
        num_truncated += made.num_truncated
    return TokenizedData(FlatExamples.joined(columns), texts, problems, num_truncated)


def fingerprint(examples: Iterable[TokenizedExample]) -> str:
    """sha256 over the token ids and labels of the examples, in order."""
    said = (([list(e.prompt_ids), *map(list, e.completion_ids)], e.is_desirable) for e in examples)
    return _sha256(said)


def columns_fingerprint(examples: Iterable[TokenizedExample]) -> str:
    """sha256 over what the data's columns say of the examples, in order."""
    return _sha256((e.weight, e.margin, e.win_probabilities) for e in examples)


def _sha256(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode())
    return digest.hexdigest()


def _lacks_label(example: Example) -> bool:
    return isinstance(example, Unpaired) and example.is_desirable is None


def _unlabelled(example: Example) -> RowProblem:
    return RowProblem("D13", example.source, "the completion has no label; add label: true or false, or train with sft")


def _split_by_prompt(data: ExampleData, size: float, seed: int) -> tuple[ExampleData, ExampleData]:
    """Splits off about `size` examples (a share below 1); those with the same prompt stay together."""
    examples = data.examples
    wanted = int(size * len(examples)) if size < 1 else int(size)
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(repr(example.prompt), []).append(example)
    if wanted >= len(examples):
        raise UserError(f"eval_size: {wanted} of {len(examples)} rows held out would leave none to train on.")
    held: set[str] = set()
    num_held = 0
    names = list(groups)
    for place in np.random.default_rng([seed, 1]).permutation(len(names)):
        if num_held + len(groups[names[place]]) <= wanted:
            held.add(names[place])
            num_held += len(groups[names[place]])
    train = [example for example in examples if repr(example.prompt) not in held]
    heldout = [example for example in examples if repr(example.prompt) in held]
    rest = data.num_rows - len(heldout)
    return ExampleData(train, data.problems, data.families, rest), ExampleData(heldout, [], data.families)


def _findings(path: Any, data: ExampleData, tokenized: TokenizedData, checks: list[Finding]) -> dict[str, Any]:
    problems, examples = [*data.problems, *tokenized.problems], flattened(tokenized.examples)
    kinds = {Pair: "pair", Unpaired: "completion", Ranking: "ranking"}
    unit = kinds[type(tokenized.texts[examples[0].index])] if examples else "pair"
    labels, first, last = examples.labels, examples.first_lengths, examples.last_lengths
    lengths = {"prompt": examples.prompt_lengths}
    if unit == "completion":
        kinds_of_labels = {"desirable": True, "undesirable": False, "completion": UNJUDGED}
        lengths |= {name: first[labels == label] for name, label in kinds_of_labels.items()}
    elif unit == "pair":
        lengths |= {"chosen": first, "rejected": last}
    else:
        lengths |= {"best": first, "worst": last}
    longer = np.sign(first - last) / 2 + 0.5 if unit != "completion" else []
    return {
        "path": path if isinstance(path, str) else "rows in memory",
        "unit": unit,
        "rows": data.num_rows,
        "families": dict(data.families),
        "used": len(examples),
        "truncated": tokenized.num_truncated,
        "dropped": _counted(problems),
        "examples": [str(problem) for problem in problems[:20]],
        "checks": [found.as_dict() for found in checks],
        "lengths": {name: _length_figures(values) for name, values in lengths.items() if len(values)},
        "desirable": int(np.sum(labels == 1)) if unit == "completion" else None,
        "longer_wins": float(np.mean(longer)) if len(longer) else None,
        "most_completions": examples.most_completions,
        "sha256": fingerprint(examples),
        "columns_sha256": columns_fingerprint(examples),
    }


def findings_of_prompts(path: Any, data: PromptData, tokenized: TokenizedData) -> dict[str, Any]:
    """The account of a file that prompts alone were taken from."""
    problems, examples = [*data.problems, *tokenized.problems], tokenized.examples
    lengths = [len(example.prompt_ids) for example in examples]
    return {
        "path": path if isinstance(path, str) else "rows in memory",
        "unit": "prompt",
        "rows": data.num_rows,
        "families": {},
        "used": len(examples),
        "repeated": data.num_repeated,
        "truncated": 0,
        "dropped": _counted(problems),
        "examples": [str(problem) for problem in problems[:20]],
        "checks": [],
        "lengths": {"prompt": _length_figures(lengths)},
        "desirable": None,
        "longer_wins": None,
        "most_completions": 0,
        "sha256": fingerprint(examples),
        "columns_sha256": None,
    }


def _counted(problems: Iterable[RowProblem]) -> dict[str, int]:
    return dict(Counter(f"{problem.code}: {_REASONS[problem.code]}" for problem in problems))


def _length_figures(values: Sequence[int] | NDArray[np.int64]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "median": float(np.median(values)), "max": int(np.max(values))}


def refuse_rows(config: RunConfig, problems: list[RowProblem], num_rows: int) -> None:
    """Stops where more rows than max_bad_rows allows cannot be used; those that `drop` names do not count.

    Raises:
        UserError: naming the first bad rows.
    """
    accepted = {*SOUND, *FILTER_CHECKS, *(PROBLEMS.get(name, "") for name in config.drop)}
    bad = [problem for problem in problems if problem.code not in accepted]
    if len(bad) > config.max_bad_rows * num_rows:
        raise UserError(
            f"data: {len(bad)} of {num_rows} rows cannot be used, more than max_bad_rows {config.max_bad_rows:g} "
            f"allows. Mend them, or set max_bad_rows to leave them out.\n{_examples(bad)}"
        )


def _examples(problems: list[RowProblem], most: int = 5) -> str:
    lines = [f"  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  ... and {len(problems) - most} more")
    return "\n".join(lines)

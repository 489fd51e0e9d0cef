"""From files to tokenised pairs, with an account of every row that fell away."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from penchant.config import RunConfig
from penchant.data.chat import TOKEN_CHECKS, TokenizedData, tokenize_pairs
from penchant.data.formats import CHECKS, PairData, RowProblem, pairs_from_rows, read_pairs
from penchant.errors import UserError
from penchant.training.logger import RunLog
from penchant.types import Pair, Text

_TOO_LONG = {"T01", "T04", "T05"}
"""Codes of rows that are sound and only do not fit: they do not count against max_bad_rows."""

Rows = str | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Datasets:
    """Training and held-out pairs of a run; `findings` is the account of both, as `data.json` keeps it."""

    train: TokenizedData
    heldout: TokenizedData
    findings: dict[str, Any]


def read_rows(data: Rows, name: str) -> PairData:
    """The pairs of a file, or of rows in memory."""
    return read_pairs(data) if isinstance(data, str) else pairs_from_rows(data, name)


def refuse_bad_rows(data: PairData, limit: float) -> None:
    """Stops where more than `limit` of the rows cannot be used.

    Raises:
        UserError: naming the first bad rows.
    """
    _refuse(data.problems, data.num_rows, limit)
    if not data.pairs:
        raise UserError("data: no usable pair is left.\n" + _examples(data.problems))


def tokenize_datasets(
    config: RunConfig, train: PairData, heldout: PairData | None, tokenizer: Any, log: RunLog
) -> Datasets:
    """Tokenised training and held-out pairs; without a held-out file some prompts are split off.

    Raises:
        UserError: too many rows cannot be used, or none is left.
    """
    held_out_file = heldout is not None
    if heldout is None:
        train, heldout = _split_by_prompt(train, config.eval_size, config.seed)
    tokenized = []
    first_index = 0
    for data in (train, heldout):
        with log.progress("tokenizing", len(data.pairs)) as meter:
            tokenized.append(
                tokenize_pairs(data.pairs, tokenizer, config.max_length, config.truncation, first_index, meter.advance)
            )
        first_index += len(data.pairs)
        bad = [problem for problem in tokenized[-1].problems if problem.code not in _TOO_LONG]
        _refuse([*data.problems, *bad], max(1, data.num_rows), config.max_bad_rows)
    if not tokenized[0].pairs:
        raise UserError("data: no pair is left to train on.\n" + _examples(tokenized[0].problems))
    findings = {
        "train": _findings(config.data, train, tokenized[0]),
        "eval": _findings(config.eval_data if held_out_file else config.data, heldout, tokenized[1])
        if tokenized[1].pairs
        else None,
    }
    return Datasets(tokenized[0], tokenized[1], findings)


def fingerprint(data: TokenizedData) -> str:
    """sha256 over the token ids of the pairs, in order."""
    digest = hashlib.sha256()
    for pair in data.pairs:
        digest.update(repr((list(pair.prompt_ids), list(pair.chosen_ids), list(pair.rejected_ids))).encode())
    return digest.hexdigest()


def plain_text(text: Text) -> str:
    """A prompt or completion as one readable text."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return text[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in text)


def _split_by_prompt(data: PairData, size: float, seed: int) -> tuple[PairData, PairData]:
    """Splits off about `size` pairs (a share below 1); pairs with the same prompt stay together."""
    wanted = int(size * len(data.pairs)) if size < 1 else int(size)
    groups: dict[str, list[Pair]] = {}
    for pair in data.pairs:
        groups.setdefault(repr(pair.prompt), []).append(pair)
    if wanted >= len(data.pairs):
        raise UserError(f"eval_size: {wanted} of {len(data.pairs)} pairs held out would leave none to train on.")
    held: set[str] = set()
    num_held = 0
    names = list(groups)
    for place in np.random.default_rng([seed, 1]).permutation(len(names)):
        if num_held + len(groups[names[place]]) <= wanted:
            held.add(names[place])
            num_held += len(groups[names[place]])
    train = [pair for pair in data.pairs if repr(pair.prompt) not in held]
    heldout = [pair for pair in data.pairs if repr(pair.prompt) in held]
    return PairData(train, data.problems, data.families), PairData(heldout, [], data.families)


def _findings(path: Any, data: PairData, tokenized: TokenizedData) -> dict[str, Any]:
    problems = [*data.problems, *tokenized.problems]
    reasons = CHECKS | TOKEN_CHECKS
    lengths = {
        "prompt": [len(pair.prompt_ids) for pair in tokenized.pairs],
        "chosen": [len(pair.chosen_ids) for pair in tokenized.pairs],
        "rejected": [len(pair.rejected_ids) for pair in tokenized.pairs],
    }
    longer_wins = [np.sign(len(pair.chosen_ids) - len(pair.rejected_ids)) / 2 + 0.5 for pair in tokenized.pairs]
    return {
        "path": path if isinstance(path, str) else "rows in memory",
        "rows": len(data.pairs) + len(data.problems),
        "families": dict(data.families),
        "used": len(tokenized.pairs),
        "truncated": tokenized.num_truncated,
        "dropped": dict(Counter(f"{problem.code}: {reasons[problem.code]}" for problem in problems)),
        "examples": [str(problem) for problem in problems[:20]],
        "lengths": {
            name: {
                "mean": float(np.mean(values)),
                "median": float(np.median(values)),
                "max": int(np.max(values)),
            }
            for name, values in lengths.items()
            if values
        },
        "longer_wins": float(np.mean(longer_wins)) if longer_wins else None,
        "sha256": fingerprint(tokenized),
    }


def _refuse(problems: list[RowProblem], num_rows: int, limit: float) -> None:
    if len(problems) > limit * num_rows:
        raise UserError(
            f"data: {len(problems)} of {num_rows} rows cannot be used, more than max_bad_rows {limit:g} allows. "
            f"Mend them, or set max_bad_rows to leave them out.\n{_examples(problems)}"
        )


def _examples(problems: list[RowProblem], most: int = 5) -> str:
    lines = [f"  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  ... and {len(problems) - most} more")
    return "\n".join(lines)

"""What a trained policy thinks of single examples, kept for whoever reads the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from penchant.disk import write_json_lines
from penchant.evaluate.heldout import Evaluation, evaluate
from penchant.examples import plain_text
from penchant.scoring.reference import Reference
from penchant.training.setup import Setup
from penchant.types import Example, TokenizedExample

_MOST_TRAINING_EXAMPLES = 256
_MOST_BY_TOKEN = 64
"""Pairs of which every token is kept: a megabyte, whatever is held out."""


def write_judgements(setup: Setup, reference: Reference | None, evaluation: Evaluation | None, run_dir: Path) -> None:
    """Keeps the rewards after training: of the held-out examples or, without any, of some training examples.

    Pairs, and of rankings the best and the worst, go to pairs.jsonl; single completions to completions.jsonl. Of some
    pairs, among them the most and the least learned, every token is kept with its log-ratio.
    """
    if evaluation is not None:
        split, data = "eval", setup.datasets.heldout
    else:
        split, data = "train", setup.datasets.train
        examples, mismatched = setup.visited()
        batches = setup.batches_to_score(examples[:_MOST_TRAINING_EXAMPLES])
        kl_batches = setup.batches_to_score(mismatched[:_MOST_TRAINING_EXAMPLES])
        evaluation = evaluate(setup.policy, reference, setup.loss, batches, lambda _: None, kl_batches)
    rewards, ratios = evaluation.rewards, evaluation.token_log_ratios
    by_token = set(_worth_reading(rewards)) if ratios else set()
    pairs: list[dict[str, Any]] = []
    completions: list[dict[str, Any]] = []
    for example in data.examples:
        if example.index in rewards:
            own = [reward if math.isfinite(reward) else None for reward in rewards[example.index]]
            record = _record(split, data.texts[example.index], example, own)
            if example.index in by_token:
                record |= _tokens(setup.policy.tokenizer, example, ratios[example.index])
            (pairs if len(own) > 1 else completions).append(record)
    for name, records in (("pairs.jsonl", pairs), ("completions.jsonl", completions)):
        if records:
            write_json_lines(run_dir / name, records)


def _record(split: str, text: Example, example: TokenizedExample, rewards: list[float | None]) -> dict[str, Any]:
    record: dict[str, Any] = {"split": split, "source": text.source, "prompt": plain_text(text.prompt)}
    if len(rewards) == 1:
        return record | {
            "completion": plain_text(text.completions[0]),
            "desirable": example.is_desirable,
            "reward": rewards[0],
            "length": len(example.completion_ids[0]),
        }
    for name, place in (("chosen", 0), ("rejected", -1)):
        record |= {
            name: plain_text(text.completions[place]),
            f"{name}_reward": rewards[place],
            f"{name}_length": len(example.completion_ids[place]),
        }
    return record


def _worth_reading(rewards: Mapping[int, Sequence[float]]) -> list[int]:
    """The pairs with the highest and the lowest margins, as many of each, and some evenly spread between."""
    margins = {index: own[0] - own[-1] for index, own in rewards.items() if len(own) > 1}
    order = sorted((index for index, margin in margins.items() if math.isfinite(margin)), key=margins.__getitem__)
    if len(order) <= _MOST_BY_TOKEN:
        return order
    ends = _MOST_BY_TOKEN * 3 // 8
    between = order[ends:-ends]
    step = len(between) / (_MOST_BY_TOKEN - 2 * ends)
    return [*order[:ends], *order[-ends:], *(between[int(n * step)] for n in range(_MOST_BY_TOKEN - 2 * ends))]


def _tokens(tokenizer: Any, example: TokenizedExample, ratios: Sequence[Tensor]) -> dict[str, Any]:
    """The texts of both completions' tokens and their log-ratios, which add up to the completion's."""
    record: dict[str, Any] = {}
    for name, place in (("chosen", 0), ("rejected", -1)):
        values = ratios[place].tolist()
        record[f"{name}_tokens"] = token_texts(tokenizer, example.completion_ids[place])
        record[f"{name}_log_ratios"] = [float(f"{value:.7g}") if math.isfinite(value) else None for value in values]
    return record


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of every token; joined they are the text of all. Of a character in several tokens the last one has it.

    A token alone may read otherwise than behind others (its space is gone, it is half a character), so each is read
    behind the one before it.
    """

    def text(start: int, stop: int) -> str:
        ids_there = [int(one) for one in ids[start:stop]]
        return str(tokenizer.decode(ids_there, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts: list[str] = []
    context = start = 0
    for stop in range(1, len(ids) + 1):
        known, now = text(context, start), text(context, stop)
        if now.endswith("\ufffd") and stop < len(ids):
            texts.append("")
            continue
        texts.append(now[len(known) :])
        context, start = start, stop
    return texts

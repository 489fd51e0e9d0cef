"""What a trained policy thinks of single examples, kept for whoever reads the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from penchant.disk import write_json_lines
from penchant.evaluate.heldout import Evaluation, evaluate
from penchant.examples import plain_text
from penchant.scoring.reference import Reference
from penchant.training.setup import Setup
from penchant.types import Example, TokenizedExample

_MOST_TRAINING_EXAMPLES = 256


def write_judgements(setup: Setup, reference: Reference | None, evaluation: Evaluation | None, run_dir: Path) -> None:
    """Keeps the rewards after training: of the held-out examples or, without any, of some training examples.

    Pairs, and of rankings the best and the worst, go to pairs.jsonl; single completions to completions.jsonl.
    """
    if evaluation is not None:
        split, data, rewards = "eval", setup.datasets.heldout, evaluation.rewards
    else:
        split, data = "train", setup.datasets.train
        examples, mismatched = setup.visited()
        batches = setup.batches_to_score(examples[:_MOST_TRAINING_EXAMPLES])
        kl_batches = setup.batches_to_score(mismatched[:_MOST_TRAINING_EXAMPLES])
        rewards = evaluate(setup.policy, reference, setup.loss, batches, lambda _: None, kl_batches).rewards
    pairs: list[dict[str, Any]] = []
    completions: list[dict[str, Any]] = []
    for example in data.examples:
        if example.index in rewards:
            own = [reward if math.isfinite(reward) else None for reward in rewards[example.index]]
            record = _record(split, data.texts[example.index], example, own)
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

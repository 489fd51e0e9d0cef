"""Steps that must not reach the weights, and those that stand out: not finite, spikes, out of memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from penchant import distributed
from penchant.data.loader import Draw
from penchant.disk import make_folder, write_json
from penchant.errors import UserError
from penchant.training import hardware
from penchant.training.logger import RunLog
from penchant.training.setup import Setup
from penchant.training.step import StepOutcome
from penchant.types import TokenizedExample

MOST_BAD_STEPS_IN_A_ROW = 3

T = TypeVar("T")


class Spikes:
    """Finds a loss or gradient norm far above those of the last steps: 6 standard deviations above the mean of 128.

    (The rule and both numbers are those of OLMo-core's SkipStepOptimizer, Allen AI 2024.) A spike does not enter what
    later steps are held against, or it would hide the next one. After three in a row the level has changed, and what
    is held against begins anew.
    """

    WINDOW, SIGMAS, FEWEST, MOST_IN_A_ROW = 128, 6.0, 32, 3

    def __init__(self) -> None:
        self._seen: dict[str, list[float]] = {"loss": [], "grad_norm": []}
        self._in_a_row = 0

    def look(self, loss: float, grad_norm: float) -> str | None:
        """Takes a step in; what stands out about it in words, or None."""
        found = [
            f"{name} {value:.4g} is {self._sigmas(name, value):.0f} standard deviations above the last "
            f"{len(self._seen[name])} steps (mean {statistics.fmean(self._seen[name]):.4g})"
            for name, value in (("loss", loss), ("grad_norm", grad_norm))
            if self._sigmas(name, value) > self.SIGMAS
        ]
        self._in_a_row = self._in_a_row + 1 if found else 0
        if self._in_a_row > self.MOST_IN_A_ROW:
            self._seen = {name: [] for name in self._seen}
            self._in_a_row, found = 0, []
        if not found:
            for name, value in (("loss", loss), ("grad_norm", grad_norm)):
                self._seen[name] = [*self._seen[name], value][-self.WINDOW :]
        return "; ".join(found) or None

    def _sigmas(self, name: str, value: float) -> float:
        seen = self._seen[name]
        if len(seen) < self.FEWEST:
            return 0.0
        # Without any spread the tiniest change would be infinitely many deviations.
        spread = max(statistics.pstdev(seen), 1e-6 * abs(statistics.fmean(seen)), 1e-12)
        return (value - statistics.fmean(seen)) / spread

    def to_json(self) -> dict[str, Any]:
        """The state, to the bit."""
        return {
            "seen": {name: [value.hex() for value in seen] for name, seen in self._seen.items()},
            "in_a_row": self._in_a_row,
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Spikes:
        """The inverse of `to_json`."""
        spikes = cls()
        spikes._seen = {name: [float.fromhex(value) for value in seen] for name, seen in state["seen"].items()}
        spikes._in_a_row = state["in_a_row"]
        return spikes


def report_bad_step(
    log: RunLog, run_dir: Path, setup: Setup, draw: Draw, step: int, outcome: StepOutcome, in_a_row: int
) -> None:
    """Says that a step was not finite and keeps its batch in bad_steps/step-N.json.

    Raises:
        UserError: it was the third in a row.
    """
    place = run_dir / "bad_steps" / f"step-{step}.json"
    make_folder(place.parent)
    write_json(place, _replayable(setup, draw, step, outcome))
    message = (
        f"step {step}: the loss ({outcome.loss:.4g}) or its gradient ({outcome.grad_norm:.4g}) is not finite; the step "
        f"was skipped, the weights are unharmed and its batch is in {place} ({in_a_row} in a row; training stops at "
        f"{MOST_BAD_STEPS_IN_A_ROW})"
    )
    log.event("major", "non-finite", message, step)
    if in_a_row == MOST_BAD_STEPS_IN_A_ROW:
        raise UserError(
            f"training: {in_a_row} steps in a row had a loss or gradient that is not finite; stopped, and nothing of "
            f"them is in the weights or in a checkpoint. Their batches are in {place.parent}. Usual causes: a learning "
            "rate that is far too high, weights that already hold nan, or bf16 on a model made for float32."
        )


def in_smaller_pieces(setup: Setup, log: RunLog, step: int, work: Callable[[], T]) -> T:
    """Does `work`, which takes its batches from `setup`; where memory does not suffice, again with half as many tokens.

    How a batch is cut changes no gradient, so the batch stays what it was.

    Raises:
        UserError: a single example does not fit.
    """
    before = setup.max_tokens
    while True:
        try:
            done = work()
        except RuntimeError as error:
            if not hardware.is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
            if distributed.world().size > 1:  # the others are in the middle of what this one cannot do
                raise UserError(
                    f"memory: process {distributed.world().rank} ran out of it ({reason}); several processes cannot "
                    f"cut a batch smaller on the way: set microbatch_tokens below {setup.max_tokens}."
                ) from error
        else:
            break
        # Here the error is gone, and with it the tensors that its traceback held.
        if setup.policy.device.type == "cuda":
            torch.cuda.empty_cache()
        if setup.max_tokens <= 1:  # every example went by itself
            raise UserError(
                f"memory: a single example does not fit ({reason}); lower max_length ({setup.config.max_length}), or "
                "train with lora.rank."
            )
        setup.max_tokens //= 2
    if setup.max_tokens < before:
        message = f"out of memory: from here on up to {setup.max_tokens} tokens at once; the batch stays the same"
        log.event("warn", "out-of-memory", message, step)
    return done


def _replayable(setup: Setup, draw: Draw, step: int, outcome: StepOutcome) -> dict[str, Any]:
    """The batch of a step, with all that is needed to look at it or to compute it again."""
    decode = setup.policy.tokenizer.decode

    def record(example: TokenizedExample) -> dict[str, Any]:
        return {
            "source": setup.source_of(example),
            "prompt": decode(example.prompt_ids),
            "completions": [decode(ids) for ids in example.completion_ids],
            "prompt_ids": [*example.prompt_ids],
            "completion_ids": [[*ids] for ids in example.completion_ids],
            "weight": example.weight,
            "margin": example.margin,
            "win_probabilities": example.win_probabilities,
            "is_desirable": example.is_desirable,
        }

    return {
        "step": step,
        "loss": _finite(outcome.loss),
        "grad_norm": _finite(outcome.grad_norm),
        "microbatch_tokens": setup.max_tokens,
        "examples": [record(example) for example in draw.examples],
        "mismatched": [record(example) for example in draw.mismatched],
    }


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)

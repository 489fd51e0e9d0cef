"""How a policy that samples its own completions does on held-out prompts: its answers, and what the judge says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from penchant.disk import make_folder, read_json_lines, write_json_lines
from penchant.evaluate.answers import answer, describe, same_opening
from penchant.evaluate.heldout import Evaluation
from penchant.evaluate.wins import mean_with_interval, outcome
from penchant.examples import Answer, Text
from penchant.online.judges import Question
from penchant.scoring.reference import AdapterOff, Precomputed, Reference
from penchant.training.online import OnlineSetup, sequences

ANSWERS = "answers.jsonl"
"""The file of answers in a run directory."""


class HeldoutAnswers:
    """Answers held-out prompts, one sample each, always with the same random numbers, and has them judged.

    A judge that only compares is asked for each answer against the one from before training.
    """

    def __init__(self, setup: OnlineSetup, reference: Reference | None, run_dir: Path) -> None:
        self.setup, self.path = setup, run_dir / ANSWERS
        self.prompts = [setup.prompts[example.index] for example in setup.datasets.heldout.examples]
        self.texts = [prompt.text for prompt in self.prompts]
        self.anchor = AdapterOff(setup.policy) if setup.config.lora.rank else reference
        if isinstance(self.anchor, Precomputed):
            self.anchor = None  # it knows nothing of fresh answers

    def evaluate(self, step: int, advance: Callable[[int], None]) -> Evaluation:
        """Judges the policy as it stands; keeps the answers of step 0 and the latest, and the scores of all.

        Metrics: `score`, the mean of the judge's, and its standard error `score_error`; `win_rate` against the answers
        before training, ties counting half; `answer_length` in tokens; `finished`, `distinct_2` and `repeated_4` as
        `evaluate.answers.describe` tells them; `same_opening`, the share that open with the same words; and where the
        policy is sampled as it is, `answer_kl`, the mean of log pi - log pi_ref over the answers, in nats a completion,
        which estimates KL(pi || pi_ref).
        """
        setup = self.setup
        size = setup.sampling_plan.batch_size
        sampled = answer(setup.policy, self.texts, setup.sampling, setup.config.seed, size, advance)
        answers = [own[0] for own in sampled]
        first = [row["before"] for row in read_json_lines(self.path)] if step > 0 else []
        scores, wins = self._judge(answers, first)
        told = describe(answers)
        metrics = {
            "score": _mean(scores),
            "win_rate": _mean(wins),
            "answer_length": told["num_tokens"],
            "score_error": _error(scores),
            **{name: told[name] for name in ("finished", "distinct_2", "repeated_4")},
            "same_opening": same_opening(answers),
            "answer_kl": self._kl(answers),
        }
        self._keep(answers, scores, wins, step)
        return Evaluation({name: value for name, value in metrics.items() if value is not None}, {})

    def _judge(self, answers: Sequence[Answer], first: Sequence[str]) -> tuple[list[float | None], list[float | None]]:
        """Scores of the answers, and how they do against the first ones: 1 a win, 0.5 a tie, 0 a loss."""
        others: list[tuple[str, ...]] = [(text,) for text in first] or [()] * len(answers)
        questions = [
            Question(prompt.text, (one.text, *other), prompt.row)
            for prompt, one, other in zip(self.prompts, answers, others, strict=True)
        ]
        verdicts = self.setup.judge.judge(questions)
        compares = self.setup.config.judge.name == "server"
        scores = [None if compares else verdict.scores[0] for verdict in verdicts]
        return scores, [outcome(verdict) if first else None for verdict in verdicts]

    @torch.no_grad()
    def _kl(self, answers: Sequence[Answer]) -> float | None:
        setup = self.setup
        if self.anchor is None or not setup.samples_itself:
            return None
        scored = sequences(setup.datasets.heldout.examples, [one.token_ids for one in answers])
        batches = [batch.to(setup.policy.device) for batch in setup.layout.batches(scored, 2 * setup.max_tokens)]
        said, refs = setup.policy.score_all(batches), self.anchor.token_logps(batches)
        ratios = [batch.sum_by_sequence(own.logps - ref) for batch, own, ref in zip(batches, said, refs, strict=True)]
        return float(np.mean(torch.cat(ratios).tolist()))

    def _keep(
        self,
        answers: Sequence[Answer],
        scores: Sequence[float | None],
        wins: Sequence[float | None],
        step: int,
    ) -> None:
        known = read_json_lines(self.path) if step > 0 else []
        rows = []
        for place, (text, one) in enumerate(zip(self.texts, answers, strict=True)):
            earlier = known[place] if known else {"before": one.text, "score_before": scores[place], "scores": {}}
            rows.append(
                {
                    "prompt": _plain(text),
                    "before": earlier["before"],
                    "score_before": earlier["score_before"],
                    "answer": one.text,
                    "score": scores[place],
                    "wins": wins[place],
                    "step": step,
                    "scores": {**earlier["scores"], str(step): scores[place]},
                }
            )
        make_folder(self.path.parent)
        write_json_lines(self.path, rows)


def summary_of(setup: OnlineSetup, run_dir: Path) -> dict[str, Any]:
    """What came of the held-out answers, with 95% intervals over the prompts, and what the judge noticed."""
    rows = read_json_lines(run_dir / ANSWERS)
    scores = [(row["score_before"], row["score"]) for row in rows]
    known = [(before, after) for before, after in scores if before is not None and after is not None]
    found: dict[str, Any] = {"prompts": len(rows)}
    if known:
        before, after = np.array(known).T
        for name, values in (("score_before", before), ("score", after), ("difference", after - before)):
            found[name] = mean_with_interval(values).as_dict()
    wins = [row["wins"] for row in rows if row["wins"] is not None]
    if wins:
        found["win_rate"] = mean_with_interval(wins).as_dict()
    return {"answers": found, "judge": {"description": setup.judge.description, **setup.judge.report()}}


def _plain(text: Text) -> Any:
    return text if isinstance(text, str) else [dict(turn) for turn in text]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _error(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1) / np.sqrt(len(known))) if len(known) > 1 else None

"""Answers of a model as a judge sees them, alone or beside those of a baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from penchant.evaluate.answers import describe
from penchant.evaluate.wins import mean_with_interval, outcome, win_rate
from penchant.examples import Answer, Prompt, plain_text
from penchant.online.judges import Judge, Question, Verdict

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Comparison:
    """One answer to each of some prompts, those of a baseline if there are any, and the verdicts on them."""

    prompts: Sequence[Prompt]
    answers: Sequence[Answer]
    others: Sequence[Answer] | None
    verdicts: Sequence[Verdict]
    distances: Sequence[float] = ()
    """log pi - log pi_ref of the answers, where they are an estimate of the KL divergence."""

    @property
    def outcomes(self) -> list[float | None]:
        """Against the baseline: 1 won, 0.5 tie, 0 lost; None where there is no valid verdict, or no baseline."""
        return [outcome(verdict) if self.others is not None else None for verdict in self.verdicts]

    def scores(self, place: int) -> list[float | None]:
        """The scores of the answers (place 0) or of the baseline's (1); None where the judge only compares."""
        return [None if verdict.wins is not None else verdict.scores[place] for verdict in self.verdicts]

    def summary(self, seed: int) -> dict[str, Any]:
        """What there is to say of both sides, with intervals over the prompts.

        `win_rate` and `score_difference` take the prompts with a valid verdict; `invalid` counts the others.
        """
        scores = self.scores(0)
        told = describe(self.answers, scores, self.distances, seed)
        if self.others is not None:
            valid = [place for place, won in enumerate(self.outcomes) if won is not None]
            other_scores = self.scores(1)
            gains = [
                one - other
                for one, other in zip(scores, other_scores, strict=True)
                if one is not None and other is not None
            ]
            told |= {
                "win_rate": self._win_rate(valid, seed) if valid else None,
                "score_difference": mean_with_interval(gains, seed).as_dict() if gains else None,
                "baseline": describe(self.others, other_scores, seed=seed),
                "invalid": len(self.verdicts) - len(valid),
            }
        else:
            told["invalid"] = scores.count(None)
        return told

    def records(self, setting: str) -> list[dict[str, Any]]:
        """A line for each prompt: what was asked, what was answered, and what the judge said."""
        records = []
        for place, (prompt, one, verdict) in enumerate(zip(self.prompts, self.answers, self.verdicts, strict=True)):
            record: dict[str, Any] = {"setting": setting, "prompt": plain_text(prompt.text), "answer": one.text}
            record |= {"finished": one.is_finished, "scores": verdict.scores}
            if self.others is not None:
                record |= {"baseline": self.others[place].text, "outcome": self.outcomes[place]}
            records.append(record | {"notes": verdict.notes, "source": prompt.source})
        return records

    def _win_rate(self, valid: Sequence[int], seed: int) -> dict[str, Any]:
        assert self.others is not None
        rate = win_rate(
            [won for won in self.outcomes if won is not None],
            [len(self.answers[place].text) for place in valid],
            [len(self.others[place].text) for place in valid],
            seed,
        )
        return rate.as_dict()


def compare(
    judge: Judge,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    others: Sequence[Answer] | None,
    distances: Sequence[float] = (),
    advance: Advance = lambda questions: None,
) -> Comparison:
    """Has the answers judged, each beside the baseline's to the same prompt if there is one."""
    sides = [answers] if others is None else [answers, others]
    texts = zip(*([one.text for one in side] for side in sides), strict=True)
    questions = [Question(prompt.text, both, prompt.row) for prompt, both in zip(prompts, texts, strict=True)]
    return Comparison(prompts, answers, others, judge.judge(questions, advance), distances)


def best_of(
    judge: Judge,
    prompts: Sequence[Prompt],
    samples: Sequence[Sequence[Answer]],
    advance: Advance = lambda questions: None,
) -> list[Answer]:
    """Of each prompt's samples the one that the judge likes best, of equals the first."""
    questions = [
        Question(prompt.text, tuple(one.text for one in own), prompt.row)
        for prompt, own in zip(prompts, samples, strict=True)
    ]
    best = []
    for own, verdict in zip(samples, judge.judge(questions, advance), strict=True):
        scored = [(score, -place) for place, score in enumerate(verdict.scores) if score is not None]
        best.append(own[-max(scored)[1]] if scored else own[0])
    return best

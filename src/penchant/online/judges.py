"""Who says which completion is better: a rule, a reward model, the log-ratio of two models, or a server.

All answer the same question: the scores of the completions of a prompt, higher is better.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from penchant.config import JudgeConfig
from penchant.errors import UserError
from penchant.examples import Text
from penchant.online.rules import Rule, given_rule, load_rule, shortened

if TYPE_CHECKING:
    import torch

    from penchant.scoring.policy import Policy
    from penchant.scoring.reward import RewardModel


_QUESTIONS_AT_ONCE = 64


@dataclass(frozen=True)
class Question:
    """Which of these completions of a prompt is better?"""

    prompt: Text
    completions: tuple[str, ...]
    row: Mapping[str, Any] | None = None
    """The row of the data that the prompt comes from, where it is known."""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of the completions of one prompt."""

    scores: tuple[float | None, ...]
    """Higher is better; None where there is no valid verdict."""
    wins: tuple[tuple[float | None, ...], ...] | None = None
    """`wins[i][j]`: the chance that completion i beats j, 0.5 on the diagonal; only from judges that compare."""
    notes: tuple[str, ...] = ()
    """What was odd, in a word each: invalid, order, injection."""


class Judge(ABC):
    """Whoever judges completions."""

    description: str
    """One sentence for people."""
    identity: str
    """Hash of all that the verdicts depend on, so that those of another judge are never taken for its own."""

    @abstractmethod
    def judge(self, questions: Sequence[Question], advance: Callable[[int], None] = lambda n: None) -> list[Verdict]:
        """A verdict on each question, in their order; calls `advance(questions)` as they are done."""

    def report(self) -> dict[str, Any]:
        """What was noticed so far, by name; empty where nothing was."""
        return {}


class RuleJudge(Judge):
    """Scores by a Python function, `score(prompt, completions) -> list of numbers`.

    `prompt` is the text or the messages as they stand in the data, `completions` are plain strings. A function with a
    third parameter is given the prompt's row as well: `score(prompt, completions, row)`.
    """

    def __init__(self, rule: str | Callable[..., Sequence[float]]) -> None:
        """Takes the function, or its name as `file.py:name`.

        Raises:
            UserError: there is no such function.
        """
        self._rule: Rule = load_rule(rule) if isinstance(rule, str) else given_rule(rule)
        self.description = f"the rule {self._rule.name}"
        self.identity = _hash("rule", self._rule.sha256)

    def judge(self, questions: Sequence[Question], advance: Callable[[int], None] = lambda n: None) -> list[Verdict]:
        """The rule's scores.

        Raises:
            UserError: the rule fails, or gives anything but one finite number for each completion.
        """
        verdicts = []
        for question in questions:
            verdicts.append(Verdict(self._rule.scores(question.prompt, question.completions, question.row)))
            advance(1)
        return verdicts


class RewardJudge(Judge):
    """Scores by a reward model: a sequence classifier with one label (its logit), or two (logit 1 less logit 0)."""

    def __init__(self, model: RewardModel) -> None:
        self._model = model
        self._num_truncated = 0
        self.description = f"the reward model {model.name}"
        self.identity = _hash("reward", model.sha256)

    def judge(self, questions: Sequence[Question], advance: Callable[[int], None] = lambda n: None) -> list[Verdict]:
        """The model's scores.

        Raises:
            UserError: its chat template refuses a prompt, or a score is not finite.
        """
        return _in_parts(questions, self._scores, self.description, advance)

    def report(self) -> dict[str, Any]:
        """How many texts lost their beginning because the model reads no more."""
        return {"truncated": self._num_truncated} if self._num_truncated else {}

    def _scores(self, prompts: Sequence[Text], completions: Sequence[str]) -> list[float]:
        encoded = [self._model.encode(*text) for text in zip(prompts, completions, strict=True)]
        self._num_truncated += sum(text.is_truncated for text in encoded)
        return self._model.scores([text.ids for text in encoded])


class ImplicitJudge(Judge):
    """Scores by the implicit reward of DPO at beta 1: log pi(y | x) - log pi_ref(y | x), in nats.

    Rafailov et al. 2023 (arXiv:2305.18290), equation 5, without its term in x alone. Sums run over the completion's
    tokens and its end token; each model reads the text with its own tokenizer and chat template.
    """

    def __init__(self, policy: Policy, reference: Policy) -> None:
        from penchant.models.fingerprints import template_sha256, tokenizer_sha256, weights_sha256

        self._policy, self._reference = policy, reference
        self.description = "the log-ratio of two language models"
        parts = [
            part
            for one in (policy, reference)
            for part in (
                weights_sha256(one.model),
                tokenizer_sha256(one.tokenizer),
                template_sha256(one.tokenizer),
                one.precision,
            )
        ]
        self.identity = _hash("implicit", *parts)

    def judge(self, questions: Sequence[Question], advance: Callable[[int], None] = lambda n: None) -> list[Verdict]:
        """The log-ratios.

        Raises:
            UserError: a chat template refuses a prompt, or a log-ratio is not finite.
        """
        return _in_parts(questions, self._log_ratios, self.description, advance)

    def _log_ratios(self, prompts: Sequence[Text], completions: Sequence[str]) -> list[float]:
        from penchant.online.logps import sequence_logps

        policy_logps = sequence_logps(self._policy, prompts, completions)
        ref_logps = sequence_logps(self._reference, prompts, completions)
        return [policy - ref for policy, ref in zip(policy_logps, ref_logps, strict=True)]


def make_judge(
    config: JudgeConfig, device: torch.device | str = "cpu", precision: Literal["float32", "bf16"] = "float32"
) -> Judge:
    """The judge that the section `judge` of a run file describes.

    Raises:
        UserError: it names none, or what its keys name cannot be loaded.
    """
    if config.name is None:
        raise UserError("judge.name: is missing; give rule, reward, implicit or server.")
    if config.name == "rule":
        return RuleJudge(str(config.function))
    if config.name == "reward":
        from penchant.scoring.reward import RewardModel

        with _named("judge.model"):
            return RewardJudge(RewardModel.from_pretrained(str(config.model), device, precision))
    if config.name == "implicit":
        from penchant.scoring.policy import Policy

        with _named("judge.model"):
            policy = Policy.from_pretrained(str(config.model), device, precision)
        with _named("judge.reference"):
            reference = Policy.from_pretrained(str(config.reference), device, precision)
        return ImplicitJudge(policy, reference)
    from penchant.online.language_judge import LanguageJudge

    return LanguageJudge.from_config(config)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Within it, errors that speak of the key `model` speak of this one."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("model:", f"{key}:", 1)) from error.__cause__


def _in_parts(
    questions: Sequence[Question],
    score: Callable[[Sequence[Text], Sequence[str]], Sequence[float]],
    whose: str,
    advance: Callable[[int], None],
) -> list[Verdict]:
    """Verdicts by a model that scores pairs of prompt and completion, some questions at a time."""
    verdicts: list[Verdict] = []
    for start in range(0, len(questions), _QUESTIONS_AT_ONCE):
        part = questions[start : start + _QUESTIONS_AT_ONCE]
        prompts = [question.prompt for question in part for _ in question.completions]
        scores = iter(score(prompts, [completion for question in part for completion in question.completions]))
        for question in part:
            own = tuple(next(scores) for _ in question.completions)
            if not all(map(math.isfinite, own)):
                raise UserError(f"judge: {whose} gives {own} on the prompt {shortened(question.prompt)}; use another.")
            verdicts.append(Verdict(own))
        advance(len(part))
    return verdicts


def _hash(*parts: Any) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()

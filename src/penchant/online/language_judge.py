"""A language model as the judge: it compares two completions in a sentence, then says A or B.

The protocol of Rafailov et al. 2023 (arXiv:2305.18290, appendix C.2), in other words, and with both orders, since
judges lean to a place (Zheng et al. 2023, arXiv:2306.05685, section 3.3).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from penchant.config import JudgeConfig
from penchant.errors import UserError
from penchant.examples import Text, plain_text
from penchant.online.client import Ask, ChatClient, Failure
from penchant.online.judges import Judge, Question, Verdict
from penchant.online.protocol import ChatRequest, Reply
from penchant.online.suspicion import suspicious, without_suspicious

_PROTOCOL = "1"
"""Another number wherever the same replies would come to other verdicts."""

_ATTEMPTS = 3
_TEMPERATURE_OF_REPEATS = 0.7
_MAX_TOKENS = 1024
_FEW = 20
"""Comparisons below which no share is a reason to stop."""

_OWN_QUESTION = Path(__file__).with_name("question.txt")
_PLACEHOLDERS = ("prompt", "first", "second")
_LETTER = re.compile(r"\W*(?:[\w *]*:|(?i:answer) )?\W*([AB])\W*")
_LONGEST_VERDICT = 80
"""Characters of a line that may still be a verdict; the pattern would take long over a very long one."""


@dataclass(frozen=True)
class Couple:
    """Two completions of one prompt, in the order in which a judge reads them."""

    prompt: Text
    first: str
    second: str

    @property
    def swapped(self) -> Couple:
        """The same two in the other order."""
        return Couple(self.prompt, self.second, self.first)

    @property
    def digest(self) -> str:
        """Hash of the content."""
        prompt = self.prompt if isinstance(self.prompt, str) else [dict(turn) for turn in self.prompt]
        return hashlib.sha256(json.dumps([prompt, self.first, self.second], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What came of a comparison: the first one's `win` (1, 0, or 0.5 for a tie; None without a verdict), and notes."""

    win: float | None
    notes: tuple[str, ...] = ()


class LanguageJudge(Judge):
    """Compares every two completions of a prompt by asking a language model.

    With `orders` both, either completion stands first once: when the two verdicts agree one of them has won, else it is
    a tie. With random each couple is asked once, in an order drawn from its content. A comparison counts as invalid,
    and for neither, unless every order has a verdict, and if a completion speaks to the judge (`suspicion.py`) unless
    the outcome is the same without the sentences that do. A completion's score is the mean of its wins over all
    completions with which it has a valid comparison, and itself, 0.5.
    """

    def __init__(
        self,
        client: ChatClient,
        question: str,
        orders: Literal["both", "random"] = "both",
        max_invalid: float = 0.1,
    ) -> None:
        """`question` is its text, with places for what is compared, as `question_text` gives it.

        Raises:
            UserError: the question has no place for what is compared.
        """
        self._client, self._orders, self._max_invalid = client, orders, max_invalid
        self._template = _sections(question)
        self._counts: Counter[str] = Counter()
        self._flagged: set[str] = set()
        self._example = ""
        self.description = f"the language model {client.model} at {client.url}, asked for A or B"
        self.identity = hashlib.sha256(json.dumps([_PROTOCOL, client.model, question, orders]).encode()).hexdigest()

    @classmethod
    def from_config(cls, config: JudgeConfig) -> LanguageJudge:
        """The judge of the section `judge` of a run file, which names a server and its model.

        Raises:
            UserError: the file of the question or the server's URL cannot be used.
        """
        client = ChatClient(
            str(config.url), str(config.model), config.key_from, config.parallel, config.timeout_s, config.retries
        )
        return cls(client, question_text(config.question), config.orders, config.max_invalid)

    def judge(self, questions: Sequence[Question], advance: Callable[[int], None] = lambda n: None) -> list[Verdict]:
        """A verdict on each question, with the chances of each completion to beat each other one.

        Raises:
            UserError: the server refuses, or too few of the comparisons have a valid outcome.
            StopRequested: somebody asked to stop; what the server had answered is kept.
        """
        places = [
            (number, i, j)
            for number, question in enumerate(questions)
            for i, j in itertools.combinations(range(len(question.completions)), 2)
        ]
        waiting = Counter(number for number, _, _ in places)
        advance(len(questions) - len(waiting))
        couples = [_couple(questions[number], i, j) for number, i, j in places]
        num_comparisons = self._counts["comparisons"] + sum(couple.first != couple.second for couple in couples)

        def job(number: int, couple: Couple) -> Callable[[Ask], Any]:
            async def compare(ask: Ask) -> Outcome:
                outcome = await self._compare(couple, ask)
                self._refuse_too_many_invalid(num_comparisons)
                waiting[number] -= 1
                if waiting[number] == 0:
                    advance(1)
                return outcome

            return compare

        outcomes = self._client.run([job(place[0], couple) for place, couple in zip(places, couples, strict=True)])
        own: list[dict[tuple[int, int], Outcome]] = [{} for _ in questions]
        for (number, i, j), outcome in zip(places, outcomes, strict=True):
            own[number][i, j] = outcome
        return [_verdict(len(question.completions), of) for question, of in zip(questions, own, strict=True)]

    def report(self) -> dict[str, Any]:
        """What was asked, and what about the answers should make one doubt them."""
        counts, tally = self._counts, self._client.tally
        if not counts["comparisons"]:
            return {}
        report: dict[str, Any] = {
            "comparisons": counts["comparisons"],
            "asked": tally.asked,
            "from_cache": tally.from_cache,
            "retries": tally.retries,
            "failed": tally.failed,
            "tokens": tally.tokens,
            "invalid": counts["invalid"],
            "flagged": counts["flagged"],
            "flagged_examples": sorted(self._flagged)[:5],
        }
        if counts["both orders"]:
            report["both_orders"] = counts["both orders"]
            report["order_disagreement"] = counts["order"] / counts["both orders"]
            report["first_wins"] = counts["first wins"] / (2 * counts["both orders"])
        return report | {"warnings": _warnings(report)}

    async def _compare(self, couple: Couple, ask: Ask) -> Outcome:
        """Who of a couple wins."""
        if couple.first == couple.second:
            return Outcome(0.5)
        wins = await self._wins(couple, ask)
        outcome = _outcome(wins)
        reasons = {reason for text in (couple.first, couple.second) if (reason := suspicious(text))}
        if reasons:
            if outcome.win is not None and await self._is_talked_round(couple, outcome, ask):
                self._example = min(reasons)
                outcome = Outcome(None, ("invalid",))
            outcome = Outcome(outcome.win, (*outcome.notes, "injection"))
            self._flagged |= reasons
        self._counts.update(comparisons=1, flagged=bool(reasons), invalid=outcome.win is None)
        if len(wins) == 2 and None not in wins:
            stood_first = (wins[0] == 1) + (wins[1] == 0)
            self._counts.update({"both orders": 1, "first wins": stood_first, "order": wins[0] != wins[1]})
        return outcome

    async def _is_talked_round(self, couple: Couple, outcome: Outcome, ask: Ask) -> bool:
        """Whether it ends in another way without the sentences that speak to the judge."""
        silent = Couple(couple.prompt, without_suspicious(couple.first), without_suspicious(couple.second))
        return _outcome(await self._wins(silent, ask)).win != outcome.win

    async def _wins(self, couple: Couple, ask: Ask) -> list[float | None]:
        """For each order that is asked in, whether the couple's first has won; ends with the first None."""
        if couple.first == couple.second:
            return [0.5]
        wins: list[float | None] = []
        for is_swapped in [False, True] if self._orders == "both" else [_is_swapped(couple)]:
            letter = await self._letter(couple.swapped if is_swapped else couple, ask)
            wins.append(None if letter is None else float((letter == "A") != is_swapped))
            if letter is None:
                break
        return wins

    async def _letter(self, couple: Couple, ask: Ask) -> str | None:
        """A or B; None where the judge says neither though it is asked again."""
        messages = self._messages(couple)
        for attempt in range(_ATTEMPTS):
            # At temperature 0 the same would come again.
            temperature = _TEMPERATURE_OF_REPEATS if attempt else 0.0
            reply = await ask(ChatRequest(messages, temperature, max_tokens=_MAX_TOKENS, seed=attempt))
            if isinstance(reply, Failure):
                self._example = reply.reason
                return None
            letter = parse_letter(reply)
            if letter is not None:
                return letter
            self._example = reply.text
        return None

    def _messages(self, couple: Couple) -> list[dict[str, str]]:
        # The mark depends on the whole content, so that no completion can know it and close its own block.
        mark = couple.digest[:16]
        blocks = {
            "prompt": _block("request", plain_text(couple.prompt), mark),
            "first": _block("answer A", couple.first, mark),
            "second": _block("answer B", couple.second, mark),
        }
        # In one go: what stands in a completion is no placeholder.
        places = re.compile("{(" + "|".join(blocks) + ")}")
        return [
            {"role": role, "content": places.sub(lambda found: blocks[found[1]], text)} for role, text in self._template
        ]

    def _refuse_too_many_invalid(self, num_comparisons: int) -> None:
        invalid = self._counts["invalid"]
        if num_comparisons >= _FEW and invalid > self._max_invalid * num_comparisons:
            raise UserError(
                f"judge: {invalid} of {num_comparisons} comparisons have no valid verdict, more than judge.max_invalid"
                f" ({self._max_invalid:g}) allows. For example: '{' '.join(self._example.split())[:300]}'. Use a model"
                " that does as it is asked, or change the question (judge.question)."
            )


def question_text(file: str | None) -> str:
    """The text of the question: our own, or that in a file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return (_OWN_QUESTION if file is None else Path(file).expanduser()).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"judge.question: '{file}' cannot be read as a text ({error}).") from error


def parse_letter(reply: Reply) -> str | None:
    """The verdict in the last line that is not empty, `A` or `B`, also as `**A**`, `Answer: A.` or `[[A]]`.

    What was cut off at the limit of tokens holds none.
    """
    last = reply.text.strip().split("\n")[-1].strip()
    found = _LETTER.fullmatch(last) if len(last) <= _LONGEST_VERDICT else None
    return found[1] if found and reply.finish != "length" else None


def _couple(question: Question, i: int, j: int) -> Couple:
    return Couple(question.prompt, question.completions[i], question.completions[j])


def _outcome(wins: list[float | None]) -> Outcome:
    """What the verdicts in each order come to."""
    valid = [win for win in wins if win is not None]
    if len(valid) < len(wins):
        return Outcome(None, ("invalid",))
    return Outcome(valid[0]) if len(set(valid)) == 1 else Outcome(0.5, ("order",))


def _verdict(num_completions: int, outcomes: dict[tuple[int, int], Outcome]) -> Verdict:
    wins: list[list[float | None]] = [
        [0.5 if i == j else None for j in range(num_completions)] for i in range(num_completions)
    ]
    for (i, j), outcome in outcomes.items():
        if outcome.win is not None:
            wins[i][j], wins[j][i] = outcome.win, 1 - outcome.win
    notes = sorted({note for outcome in outcomes.values() for note in outcome.notes})
    return Verdict(tuple(map(_score, wins)), tuple(map(tuple, wins)), tuple(notes))


def _score(wins: list[float | None]) -> float | None:
    valid = [win for win in wins if win is not None]
    return sum(valid) / len(valid) if len(valid) > 1 else None


def _is_swapped(couple: Couple) -> bool:
    """Which of the two stands first, drawn from their content whichever place they have in the data."""
    ordered = couple if couple.first < couple.second else couple.swapped
    return (int(ordered.digest, 16) % 2 == 1) != (ordered != couple)


def _block(name: str, text: str, mark: str) -> str:
    return f"----- {name} {mark} -----\n{text}\n----- end of {name} {mark} -----"


def _sections(question: str) -> list[tuple[str, str]]:
    """Role and text of each message: what stands behind a line `system:` or `user:`, else all is the user's.

    Raises:
        UserError: a placeholder is missing.
    """
    missing = [f"{{{name}}}" for name in _PLACEHOLDERS if f"{{{name}}}" not in question]
    if missing:
        raise UserError(f"judge.question: lacks {', '.join(missing)}, where what is judged shall stand; put it in.")
    before, *parts = re.split(r"^(system|user):[ \t]*$", question, flags=re.MULTILINE)
    if before.strip():
        return [("user", question.strip())]
    return [(role, text.strip()) for role, text in zip(parts[::2], parts[1::2], strict=True)]


def _warnings(report: dict[str, Any]) -> list[str]:
    """What about a judge's verdicts should make one doubt them, in sentences."""
    warnings = []
    verdicts = 2 * report.get("both_orders", 0)
    if verdicts >= 200 and not 0.45 <= report["first_wins"] <= 0.55:
        share = f"{report['first_wins']:.0%} of {verdicts}"
        warnings.append(f"It preferred what stood first in {share} verdicts; a fair judge does in half.")
    if report.get("order_disagreement", 0) > 0.3:
        share = f"{report['order_disagreement']:.0%} of {report['both_orders']}"
        warnings.append(f"In {share} comparisons its verdict changed with the order, and counts as a tie.")
    if report["invalid"] > 0.02 * report["comparisons"]:
        share = f"{report['invalid']} of {report['comparisons']}"
        warnings.append(f"In {share} comparisons it gave no valid verdict, and they count for neither.")
    return warnings

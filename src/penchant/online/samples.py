"""Sampled completions in files, and what judges say of them.

One line for each prompt, which `penchant train` reads as the family `ranked` once it is judged:

    {"prompt": ..., "completions": [...], "finished": [...], "num_tokens": [...],
     "scores": [...], "wins": [[...], ...], "notes": [...], "preferred": 0, "source": ...}

What is not known is not there: a served model does not tell token ids, a judge that gives scores has no `wins`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from penchant.data.columns import number_of
from penchant.data.files import read_rows
from penchant.data.formats import RowProblem, fields_of, stream_rows
from penchant.data.messages import RefusedError, Row, check_prompt, is_list, kind_of, text_or_messages
from penchant.data.rankings import finished_in_order
from penchant.errors import UserError
from penchant.examples import Answer, Finished, Pair, Prompt, Text
from penchant.online.growing import GrowingFile, Settings, refuse_unfinished
from penchant.online.judges import Judge, Question, Verdict
from penchant.online.pairs import Preference
from penchant.online.seeds import prompt_seed

if TYPE_CHECKING:
    from penchant.models.generation import Sampling
    from penchant.scoring.policy import Policy

Advance = Callable[[int], None]
"""Is told how many more are done; may raise to stop."""


@runtime_checkable
class Sampler(Protocol):
    """Whoever answers prompts."""

    def sample(
        self, prompts: Sequence[Text], sampling: Sampling, num_samples: int, seeds: Sequence[int], *, advance: Advance
    ) -> list[list[Answer]]:
        """`num_samples` answers to each prompt, drawn with its seed; calls `advance(answers)` as they are done."""


@dataclass(frozen=True)
class PolicySampler:
    """A policy that answers up to `max_rows` at once."""

    policy: Policy
    max_rows: int = 64

    def sample(
        self, prompts: Sequence[Text], sampling: Sampling, num_samples: int, seeds: Sequence[int], *, advance: Advance
    ) -> list[list[Answer]]:
        """The policy's answers."""
        return self.policy.sample(prompts, sampling, num_samples, seeds, self.max_rows, advance=advance)

    def settings(self) -> Settings:
        """What the answers depend on: weights, tokenizer, template and arithmetic."""
        from penchant.models.fingerprints import template_sha256, tokenizer_sha256, weights_sha256

        return {
            "model": weights_sha256(self.policy.model),
            "tokenizer": tokenizer_sha256(self.policy.tokenizer),
            "chat_template": template_sha256(self.policy.tokenizer),
            "dtype": self.policy.precision,
        }


@dataclass(frozen=True)
class Sampled:
    """A prompt with completions, and what a judge said of them."""

    prompt: Text
    answers: tuple[Answer, ...]
    source: str = ""
    num_tokens: tuple[int, ...] | None = None
    """Tokens of each completion, the end token included, where they are known."""
    verdict: Verdict | None = None
    preferred: int | None = None
    """The completion that people preferred, where they were asked."""

    @property
    def question(self) -> Question:
        """What a judge is asked."""
        return Question(self.prompt, tuple(answer.text for answer in self.answers))

    def as_record(self) -> dict[str, Any]:
        """As it stands in a file."""
        verdict = self.verdict or Verdict(())
        record = {
            "prompt": _plain(self.prompt),
            "completions": [answer.text for answer in self.answers],
            "finished": [answer.is_finished for answer in self.answers],
            "num_tokens": self.num_tokens,
            "scores": verdict.scores or None,
            "wins": verdict.wins,
            "notes": verdict.notes or None,
            "preferred": self.preferred,
            "source": self.source or None,
        }
        return {name: value for name, value in record.items() if value is not None}


def sample_settings(prompts: Sequence[Prompt], sampling: Sampling, num_samples: int, seed: int) -> Settings:
    """What sampled completions depend on, beside whoever gives them."""
    return {
        "prompts": _json_sha256([_plain(prompt.text) for prompt in prompts]),
        "seed": seed,
        "sampling.completions": num_samples,
        **{f"sampling.{name}": value for name, value in vars(sampling).items()},
    }


def judge_settings(asked: Sequence[Sampled], judge: Judge) -> Settings:
    """What verdicts depend on."""
    return {"data": _json_sha256([replace(one, source="").as_record() for one in asked]), "judge": judge.identity}


def sample_to(
    file: GrowingFile,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    sampling: Sampling,
    num_samples: int,
    seed: int,
    advance: Advance = lambda completions: None,
) -> None:
    """Samples completions of the prompts that the file still lacks."""
    for chunk in file.chunks(prompts):
        texts = [prompt.text for prompt in chunk]
        seeds = [prompt_seed(seed, text) for text in texts]
        answers = sampler.sample(texts, sampling, num_samples, seeds, advance=advance)
        file.append([_answered(*one).as_record() for one in zip(chunk, answers, strict=True)])


def judge_to(
    file: GrowingFile, asked: Sequence[Sampled], judge: Judge, advance: Advance = lambda questions: None
) -> None:
    """Has those judged that the file still lacks; earlier verdicts are replaced."""
    for chunk in file.chunks(asked):
        verdicts = judge.judge([one.question for one in chunk], advance)
        judged = [replace(one, verdict=verdict) for one, verdict in zip(chunk, verdicts, strict=True)]
        file.append([one.as_record() for one in judged])


def preference_rows(one: Sampled, preferences: Sequence[Preference]) -> list[dict[str, Any]]:
    """What was preferred among the completions of a prompt, as rows of the family trl; the best alone has a label."""
    rows = []
    for preference in preferences:
        better = one.answers[preference.better]
        row: dict[str, Any] = {"prompt": _plain(one.prompt)}
        if preference.worse is None:
            row |= {"completion": better.text, "label": True, "finished": better.is_finished}
        else:
            worse, chances = one.answers[preference.worse], preference.probabilities
            row |= {"chosen": better.text, "rejected": worse.text, "margin": preference.gap}
            row |= {"chosen_win_probability": chances[0], "rejected_win_probability": chances[1]}
            row |= {"chosen_finished": better.is_finished, "rejected_finished": worse.is_finished}
        rows.append(row)
    return rows


def read_samples(path: str | Path) -> list[Sampled]:
    """What `sample_to` and `judge_to` wrote, or others in the same form.

    Raises:
        UserError: there is no such file, it is not finished, or a row is of another form.
    """
    found: list[Sampled] = []
    for one in stream_samples(path):
        if isinstance(one, RowProblem):
            raise UserError(str(one))
        found.append(one)
    return found


def stream_samples(path: str | Path, family: str | None = None) -> Iterator[Sampled | RowProblem]:
    """Rows with completions to be judged: sampled ones, and preference data of any family.

    Completions of messages count as their text where they are one answer of the assistant.

    Args:
        path: a file, a directory of files, a pattern, or a dataset of the hub.
        family: the row family to read every row as; without it each row's own is recognised.

    Raises:
        UserError: a file as a whole cannot be read, or its making is not finished.
    """
    refuse_unfinished(Path(path))
    for source, row in read_rows(path):
        try:
            fields = fields_of(row)
            yield _of_record(fields, source) if family is None and _is_record(fields) else _of_row(row, source, family)
        except RefusedError as refused:
            yield RowProblem(refused.code, source, str(refused))


def _answered(prompt: Prompt, answers: Sequence[Answer]) -> Sampled:
    knows_tokens = all(answer.token_ids for answer in answers)
    num_tokens = tuple(len(answer.token_ids) for answer in answers) if knows_tokens else None
    return Sampled(prompt.text, tuple(answers), prompt.source, num_tokens)


def _is_record(row: Row) -> bool:
    completions = row.get("completions", "")
    return "prompt" in row and is_list(completions) and all(isinstance(one, str) for one in completions)


def _of_record(row: Row, source: str) -> Sampled:
    """A row in our own form; of another's it may lack all but prompt and completions."""
    completions = row["completions"]
    if not completions:
        raise RefusedError("D20", "completions is empty; sample some, or delete the row")
    prompt = text_or_messages(row, "prompt")
    check_prompt(prompt)
    number = len(completions)
    num_tokens = _entries(row, "num_tokens", number, _count)
    return Sampled(
        prompt,
        _answers(completions, finished_in_order(row, range(number))),
        str(row.get("source", source)),
        None if num_tokens is None else tuple(num_tokens),
        _verdict(row, number),
        _preferred(row, number),
    )


def _verdict(row: Row, number: int) -> Verdict | None:
    scores = _entries(row, "scores", number, _score)
    if scores is None:
        return None
    wins = _entries(row, "wins", number, lambda value, name: tuple(_listed(value, name, number, _score)))
    notes = row.get("notes", ())
    return Verdict(
        tuple(scores), None if wins is None else tuple(wins), tuple(map(str, notes)) if is_list(notes) else ()
    )


def _preferred(row: Row, number: int) -> int | None:
    value = row.get("preferred")
    if value is not None and (type(value) is not int or value not in range(number)):
        raise RefusedError("D04", f"preferred is not the place, from 0, of one of {number} completions; correct it")
    return value


def _entries(row: Row, key: str, number: int, read: Callable[[Any, str], Any]) -> list[Any] | None:
    """The entries of a list beside the completions; None where there is no such list."""
    return None if row.get(key) is None else _listed(row[key], key, number, read)


def _listed(values: Any, name: str, number: int, read: Callable[[Any, str], Any]) -> list[Any]:
    if not is_list(values):
        raise RefusedError("D04", f"{name} is {kind_of(values)}; write a list with an entry for each completion")
    if len(values) != number:
        raise RefusedError("D21", f"{name} has {len(values)} entries for {number} completions; make them agree")
    return [read(value, f"entry {place} of {name}") for place, value in enumerate(values, start=1)]


def _score(value: Any, name: str) -> float | None:
    return None if value is None else number_of(value, name)


def _count(value: Any, name: str) -> int:
    return int(number_of(value, name))


def _of_row(row: Any, source: str, family: str | None) -> Sampled | RowProblem:
    """A row of preference data; that chosen is preferred is kept, scores and ranks are not."""
    ((_, found),) = stream_rows([row], family=family)
    if isinstance(found, RowProblem):
        return replace(found, source=source)
    texts = [_text_of(completion) for completion in found.completions]
    answers = _answers(texts, found.finished)
    return Sampled(found.prompt, answers, source, preferred=0 if isinstance(found, Pair) else None)


def _answers(texts: Sequence[str], finished: Finished) -> tuple[Answer, ...]:
    flags = finished or (True,) * len(texts)
    return tuple(Answer(text, is_finished=flag) for text, flag in zip(texts, flags, strict=True))


def _text_of(completion: Text) -> str:
    if isinstance(completion, str):
        return completion
    if len(completion) > 1:
        raise RefusedError("D04", "a completion has several messages, and judges read one answer; delete the row")
    return completion[0]["content"]


def _plain(text: Text) -> str | list[dict[str, str]]:
    return text if isinstance(text, str) else [dict(message) for message in text]


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

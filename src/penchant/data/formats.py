"""Row families: the shapes in which preference data is published, each known by its keys, read as a `Pair`.

trl        prompt, chosen, rejected: text or lists of messages; a prompt of messages may also be implied
hh         chosen and rejected (and perhaps prompt) as one text of "\\n\\nHuman:" and "\\n\\nAssistant:" turns
sharegpt   conversations (or messages), chosen and rejected one message each, {from, value} or {role, content}
alpaca     instruction, perhaps input, system and history, with chosen and rejected texts

A row that cannot train is never an exception: it becomes a `RowProblem` and its neighbours are read on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.data.files import Unreadable, read_rows
from penchant.data.messages import (
    Messages,
    Parts,
    RefusedError,
    Row,
    check_filled,
    check_pair,
    is_list,
    keys_of,
    kind_of,
    opens_with_answer,
    sides_of,
    split_implicit,
    split_repeated,
    text_of,
    text_or_messages,
    turns_of,
    with_system,
)
from penchant.types import Pair, Text

CHECKS: dict[str, str] = {
    "D01": "not a JSON object",
    "D02": "prompt, chosen or rejected is missing",
    "D03": "keys of no known row family",
    "D04": "a field of the wrong type",
    "D05": "chosen and rejected are identical",
    "D06": "a completion is empty",
    "D07": "the prompt is empty",
    "D08": "a message without a known role or without content",
    "D09": "the prompt ends with an assistant turn",
    "D10": "a completion does not begin with an assistant turn",
    "D11": "a completion does not end with an assistant turn",
    "D12": "a NUL or half a surrogate pair in the text",
    "D13": "one completion, not a pair",
    "D14": "a prompt without completions",
    "D15": "where the prompt ends is not clear",
    "D16": "the prompts of the two sides differ",
    "D17": "a message part that is not text",
}
"""Code of a row problem -> the reason in a few words, for counts by reason."""

_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class RowProblem:
    """One row that cannot train: `code` is a key of `CHECKS`, `source` names the row, `message` the mend."""

    code: str
    source: str
    message: str

    def __str__(self) -> str:
        return f"{self.source}: [{self.code}] {self.message}"


@dataclass(frozen=True)
class PairData:
    """What a file held: its pairs and its problems in the order of the rows; each row is one or the other.

    `families` counts the rows by recognised family, problems included, the most frequent first.
    """

    pairs: list[Pair]
    problems: list[RowProblem]
    families: dict[str, int]

    @property
    def num_rows(self) -> int:
        """Rows read, good and bad."""
        return len(self.pairs) + len(self.problems)


@dataclass(frozen=True)
class Family:
    """One shape of row: `recognises` looks at the keys, `read` takes the row apart or refuses it."""

    name: str
    recognises: Callable[[Row], bool]
    read: Callable[[Row], Parts]


def read_pairs(path: str | Path) -> PairData:
    """The pairs of a .json or .jsonl file, plain or .gz.

    Raises:
        UserError: the file as a whole cannot be read; bad single rows become problems instead.
    """
    return _collect(read_rows(path))


def pairs_from_rows(rows: Iterable[Any], name: str = "rows") -> PairData:
    """The pairs of rows in memory; the source of the first is `rows[0]`."""
    return _collect((f"{name}[{index}]", row) for index, row in enumerate(rows))


def _collect(rows: Iterable[tuple[str, Any]]) -> PairData:
    pairs: list[Pair] = []
    problems: list[RowProblem] = []
    families: Counter[str] = Counter()
    for source, row in rows:
        try:
            family = _recognise(row)
            families[family.name] += 1
            prompt, chosen, rejected = family.read(row)
            pair = Pair(prompt, chosen, rejected, source)
            check_pair(pair)
            pairs.append(pair)
        except RefusedError as refused:
            problems.append(RowProblem(refused.code, source, str(refused)))
    return PairData(pairs, problems, dict(families.most_common()))


def _recognise(row: Any) -> Family:
    if isinstance(row, Unreadable):
        raise RefusedError("D01", row.reason)
    if not isinstance(row, Mapping):
        raise RefusedError("D01", f"the row is {kind_of(row)}; write one JSON object with prompt, chosen, rejected")
    for family in FAMILIES:
        if family.recognises(row):
            return family
    raise RefusedError(
        "D03",
        f"no row family has the keys {keys_of(row)}; expected are chosen and rejected with prompt,"
        " conversations or instruction: rename the columns",
    )


# The families, one function each.


def _read_trl(row: Row) -> Parts:
    chosen, rejected = sides_of(row)
    if "prompt" not in row:
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise RefusedError(
                "D15",
                "there is no prompt, and where it ends inside chosen and rejected cannot be told from plain"
                " text; add a prompt column, or write both sides as lists of messages",
            )
        return with_system(row, split_implicit(chosen, rejected))
    prompt = text_or_messages(row, "prompt")
    if isinstance(prompt, str):
        if isinstance(chosen, str) and row.get("system") in (None, ""):
            return prompt, chosen, rejected
        if not (opens_with_answer(chosen) and opens_with_answer(rejected)):
            return with_system(row, split_repeated(prompt, chosen, rejected))
    before = turns_of(prompt, "user")
    sides = [turns_of(side, "assistant") for side in (chosen, rejected)]
    chosen, rejected = (side[len(before) :] if side[: len(before)] == before else side for side in sides)
    return with_system(row, (before, chosen, rejected))


def _read_hh(row: Row) -> Parts:
    texts = {key: text_of(row, key) for key in ("chosen", "rejected")}
    if "prompt" in row:
        return _read_hh_prompt(text_of(row, "prompt"), texts)
    prompts, completions = [], []
    for key, text in texts.items():
        check_filled(key, text)
        turns = _hh_turns(text)
        answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers:
            raise RefusedError("D11", f"{key} has no Assistant turn; add its answer or delete the row")
        prompts.append(turns[: answers[-1]])
        completions.append(turns[answers[-1] :])
    if prompts[0] != prompts[1]:
        raise RefusedError(
            "D16",
            "chosen and rejected differ before their last Assistant turn; a pair has one prompt: delete the row",
        )
    return prompts[0], completions[0], completions[1]


def _read_hh_prompt(prompt: str, texts: dict[str, str]) -> Parts:
    """The prompt column says where the prompt ends; the sides hold what follows it, or repeat it first."""
    turns = _hh_turns(prompt)
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns = turns[:-1]  # the cue "\n\nAssistant:" belongs to the answer
    completions: list[Text] = []
    start = prompt.strip()
    for text in texts.values():
        answer = text.strip()
        repeats = start if start.endswith("Assistant:") else f"{start}\n\nAssistant:"
        if answer.startswith(repeats):
            answer = answer.removeprefix(start).strip()
        has_speaker = answer.startswith(("Assistant:", "Human:"))
        completions.append(_hh_turns(answer if has_speaker or not answer else f"Assistant: {answer}"))
    return turns, completions[0], completions[1]


def _hh_turns(text: str) -> Messages:
    """The turns of HH-RLHF text, stripped; text before the first one is a system message.

    Turns of one role in a row are joined: the data has some, and many chat templates refuse them.
    """
    preamble, *pieces = _HH_TURN.split(text)
    turns: list[dict[str, str]] = []
    if preamble.strip():
        turns.append({"role": "system", "content": preamble.strip()})
    for speaker, said in zip(pieces[::2], pieces[1::2], strict=True):
        role = _HH_ROLES[speaker]
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{said.strip()}".strip()
        else:
            turns.append({"role": role, "content": said.strip()})
    return list(turns)


def _read_sharegpt(row: Row) -> Parts:
    key = "conversations" if "conversations" in row else "messages"
    prompt = text_or_messages(row, key)
    chosen, rejected = sides_of(row)
    return with_system(row, (turns_of(prompt, "user"), turns_of(chosen, "assistant"), turns_of(rejected, "assistant")))


def _read_alpaca(row: Row) -> Parts:
    prompt: Messages = []
    history = row.get("history") or []
    if not is_list(history):
        raise RefusedError("D04", f"history is {kind_of(history)}; write a list of [user, assistant] texts")
    for turn in history:
        if not (is_list(turn) and len(turn) == 2 and all(isinstance(said, str) for said in turn)):
            raise RefusedError("D04", "history holds something else than [user, assistant] texts; mend the row")
        prompt += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = text_of(row, "instruction")
    if row.get("input") not in (None, ""):
        question += "\n" + text_of(row, "input")
    prompt.append({"role": "user", "content": question})
    chosen, rejected = sides_of(row)
    return with_system(row, (prompt, turns_of(chosen, "assistant"), turns_of(rejected, "assistant")))


def _refuse_unpaired(row: Row) -> Parts:
    raise RefusedError(
        "D13",
        f"the row holds one completion, not a pair (keys {keys_of(row)}); KTO and BCO train on single"
        " completions with a label, pair methods need chosen and rejected",
    )


def _refuse_prompt_only(row: Row) -> Parts:
    raise RefusedError(
        "D14",
        f"the row holds a prompt without chosen and rejected (keys {keys_of(row)}); online methods train on"
        " prompts alone, pair methods need both: add or rename the columns",
    )


def _is_pair(row: Row) -> bool:
    return "chosen" in row or "rejected" in row


def _is_hh(row: Row) -> bool:
    if "prompt" in row:
        prompt = row["prompt"]
        if not isinstance(prompt, str) or not prompt.lstrip().startswith("Human:"):
            return False
        texts = isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str)
        return texts and (prompt.startswith("\n\n") or "\n\nAssistant:" in prompt)
    sides = [row.get("chosen"), row.get("rejected")]
    return any(isinstance(side, str) and ("\n\nHuman:" in side or "\n\nAssistant:" in side) for side in sides)


def _is_sharegpt(row: Row) -> bool:
    # UltraFeedback carries a `messages` column beside prompt and full lists: that one is trl.
    return "conversations" in row or ("messages" in row and "prompt" not in row and not is_list(row.get("chosen")))


def _is_single(row: Row) -> bool:
    return any(key in row for key in ("kto_tag", "completion", "messages", "conversations", "output"))


FAMILIES: tuple[Family, ...] = (
    Family("sharegpt", lambda row: _is_pair(row) and _is_sharegpt(row), _read_sharegpt),
    Family("alpaca", lambda row: _is_pair(row) and "instruction" in row and "prompt" not in row, _read_alpaca),
    Family("hh", lambda row: _is_pair(row) and _is_hh(row), _read_hh),
    Family("trl", _is_pair, _read_trl),
    Family("unpaired", _is_single, _refuse_unpaired),
    Family("prompt only", lambda row: "prompt" in row, _refuse_prompt_only),
)
"""The row families; the first that recognises a row reads it."""

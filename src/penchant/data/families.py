"""Row families: the shapes in which preference data is published, each known by its keys, read as an `Example`.

trl        prompt, chosen, rejected: text or lists of messages; a prompt of messages may also be implied
hh         chosen and rejected (and perhaps prompt) as one text of "\\n\\nHuman:" and "\\n\\nAssistant:" turns
sharegpt   conversations (or messages), chosen and rejected one message each, {from, value} or {role, content}
alpaca     instruction, perhaps input, system and history, with chosen and rejected texts
ranked     prompt (or instruction) with a list of completions and their scores or ranks; `rankings` takes it apart
unpaired   one completion, perhaps with a label: prompt and completion; messages (or conversations) that end with it;
           instruction and output

The first four are pairs. Whatever cannot train is refused with a `RefusedError`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from penchant.data.columns import label_of, margin_of, weight_of, win_probabilities_of
from penchant.data.messages import (
    SIDES,
    Messages,
    Parts,
    RefusedError,
    Row,
    check_example,
    check_filled,
    is_list,
    keys_of,
    kind_of,
    listed,
    opens_with_answer,
    sides_of,
    split_implicit,
    split_repeated,
    text_of,
    text_or_messages,
    turns_of,
    with_system,
)
from penchant.data.rankings import completions_of, has_completions, names_of, order_of
from penchant.types import Example, Pair, Ranking, Text, Unpaired

_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Family:
    """One shape of row, and the kind of example it holds.

    `recognises` looks at the keys, `read` takes the texts apart, `build` checks them and adds the other columns; both
    may refuse the row.
    """

    name: str
    recognises: Callable[[Row], bool]
    read: Callable[[Row], Parts]
    build: Callable[[Row, Parts, str], Example]


def family_of(row: Row) -> Family:
    """The first family that recognises the row."""
    for family in FAMILIES:
        if family.recognises(row):
            return family
    raise RefusedError(
        "D03",
        f"no row family has the keys {keys_of(row)}; expected are chosen and rejected, a completion or completions,"
        " with prompt, conversations or instruction: rename the columns",
    )


# The kinds of example, one function each.


def _build_pair(row: Row, parts: Parts, source: str) -> Pair:
    check_example(parts, SIDES)
    prompt, chosen, rejected = parts
    return Pair(prompt, chosen, rejected, source, weight_of(row), margin_of(row), win_probabilities_of(row))


def _build_unpaired(row: Row, parts: Parts, source: str) -> Unpaired:
    check_example(parts, ["completion"])
    prompt, completion = parts
    return Unpaired(prompt, completion, label_of(row), source, weight_of(row))


def _build_ranking(row: Row, parts: Parts, source: str) -> Ranking:
    prompt, *completions = parts
    check_example(parts, names_of(completions))
    order, scores = order_of(row)
    best_first = tuple(completions[place] for place in order)
    return Ranking(prompt, best_first, source, weight_of(row), scores)


# The families, one function each.


def _read_trl(row: Row) -> Parts:
    return _join(row, SIDES, sides_of(row))


def _join(row: Row, names: Sequence[str], sides: Sequence[Text]) -> Parts:
    """The `prompt` column with the completions; without that column the prompt that all completions repeat."""
    plain = all(isinstance(side, str) for side in sides)
    if "prompt" not in row and len(sides) > 1:
        if plain:
            raise RefusedError(
                "D15",
                f"there is no prompt, and where it ends inside {listed(names)} cannot be told from plain"
                " text; add a prompt column, or write the completions as lists of messages",
            )
        return with_system(row, split_implicit(names, sides))
    prompt = text_or_messages(row, "prompt")
    if isinstance(prompt, str):
        if plain and _is_hh_prompt(prompt):
            return with_system(row, _split_hh(prompt, sides))
        if plain and row.get("system") in (None, ""):
            return prompt, *sides
        if not all(opens_with_answer(side) for side in sides):
            return with_system(row, split_repeated(prompt, names, sides))
    before = turns_of(prompt, "user")
    completions = [turns_of(side, "assistant") for side in sides]
    bare = (side[len(before) :] if side[: len(before)] == before else side for side in completions)
    return with_system(row, (before, *bare))


def _read_hh(row: Row) -> Parts:
    texts = {key: text_of(row, key) for key in ("chosen", "rejected")}
    if "prompt" in row:
        return _split_hh(text_of(row, "prompt"), list(texts.values()))
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


def _split_hh(prompt: str, texts: Sequence[Text]) -> Parts:
    """The prompt column says where the prompt ends; the texts hold what follows it, or repeat it first."""
    turns = _hh_turns(prompt)
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns = turns[:-1]  # the cue "\n\nAssistant:" belongs to the answer
    completions: list[Text] = []
    start = prompt.strip()
    for text in texts:
        answer = str(text).strip()
        repeats = start if start.endswith("Assistant:") else f"{start}\n\nAssistant:"
        if answer.startswith(repeats):
            answer = answer.removeprefix(start).strip()
        has_speaker = answer.startswith(("Assistant:", "Human:"))
        completions.append(_hh_turns(answer if has_speaker or not answer else f"Assistant: {answer}"))
    return turns, *completions


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
    prompt = text_or_messages(row, _conversation_key(row))
    chosen, rejected = sides_of(row)
    return with_system(row, (turns_of(prompt, "user"), turns_of(chosen, "assistant"), turns_of(rejected, "assistant")))


def _read_alpaca(row: Row) -> Parts:
    prompt = _alpaca_prompt(row)
    chosen, rejected = sides_of(row)
    return with_system(row, (prompt, turns_of(chosen, "assistant"), turns_of(rejected, "assistant")))


def _alpaca_prompt(row: Row) -> Messages:
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
    return prompt


def _read_ranked(row: Row) -> Parts:
    completions = completions_of(row)
    if "instruction" in row and "prompt" not in row:
        return with_system(row, (_alpaca_prompt(row), *(turns_of(each, "assistant") for each in completions)))
    return _join(row, names_of(completions), completions)


def _read_unpaired(row: Row) -> Parts:
    if "completion" in row:
        return _join(row, ["completion"], [text_or_messages(row, "completion")])
    if "conversations" in row or "messages" in row:
        return with_system(row, _split_conversation(row, _conversation_key(row)))
    if "instruction" in row or "output" in row:
        answer = turns_of(text_or_messages(row, "output"), "assistant")
        return with_system(row, (_alpaca_prompt(row), answer))
    raise RefusedError(
        "D02",
        f"the row has a label but no completion (keys {keys_of(row)}); add prompt and completion, or messages",
    )


def _split_conversation(row: Row, key: str) -> Parts:
    """The last turn of a conversation is the completion, and everything before it the prompt."""
    turns = text_or_messages(row, key)
    if isinstance(turns, str):
        raise RefusedError("D04", f"{key} is text; it must be a list of messages here")
    check_filled(f"the last turn of {key}", turns)
    if turns[-1]["role"] != "assistant":
        raise RefusedError("D11", f"{key} ends with a {turns[-1]['role']} turn; cut it off or add the answer")
    return turns[:-1], turns[-1:]


def _conversation_key(row: Row) -> str:
    return "conversations" if "conversations" in row else "messages"


def _refuse_prompt_only(row: Row) -> Parts:
    raise RefusedError(
        "D14",
        f"the row holds a prompt without chosen and rejected (keys {keys_of(row)}); online methods train on"
        " prompts alone, pair methods need both: add or rename the columns",
    )


def _is_pair(row: Row) -> bool:
    return "chosen" in row or "rejected" in row


def _is_hh(row: Row) -> bool:
    sides = [row.get(key) for key in SIDES]
    if "prompt" in row:
        return all(isinstance(side, str) for side in sides) and _is_hh_prompt(row["prompt"])
    return any(isinstance(side, str) and ("\n\nHuman:" in side or "\n\nAssistant:" in side) for side in sides)


def _is_hh_prompt(prompt: Any) -> bool:
    if not isinstance(prompt, str) or not prompt.lstrip().startswith("Human:"):
        return False
    return prompt.startswith("\n\n") or "\n\nAssistant:" in prompt


def _is_sharegpt(row: Row) -> bool:
    # UltraFeedback carries a `messages` column beside prompt and full lists: that one is trl.
    return "conversations" in row or ("messages" in row and "prompt" not in row and not is_list(row.get("chosen")))


def _is_ranked(row: Row) -> bool:
    # A conversation of its own, or a single answer, says more than a list beside it.
    if "completion" in row or "output" in row:
        return False
    asked = "prompt" in row or "instruction" in row
    return has_completions(row) and (asked or not ("conversations" in row or "messages" in row))


def _is_single(row: Row) -> bool:
    return any(key in row for key in ("kto_tag", "completion", "messages", "conversations", "output"))


FAMILIES: tuple[Family, ...] = (
    Family("sharegpt", lambda row: _is_pair(row) and _is_sharegpt(row), _read_sharegpt, _build_pair),
    Family(
        "alpaca", lambda row: _is_pair(row) and "instruction" in row and "prompt" not in row, _read_alpaca, _build_pair
    ),
    Family("hh", lambda row: _is_pair(row) and _is_hh(row), _read_hh, _build_pair),
    Family("trl", _is_pair, _read_trl, _build_pair),
    Family("ranked", _is_ranked, _read_ranked, _build_ranking),
    Family("unpaired", _is_single, _read_unpaired, _build_unpaired),
    Family("prompt only", lambda row: "prompt" in row, _refuse_prompt_only, _build_unpaired),
)
"""The row families; the first that recognises a row reads it."""

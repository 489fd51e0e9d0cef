"""From the fields of a row to texts and messages, and what every example must be, whatever its family."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from penchant.examples import Message, Text

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles a message may have."""

Row = Mapping[str, Any]
Messages = list[Message]
Parts = tuple[Text, ...]
"""The prompt of one row, then its completions in the order of the row; of a pair chosen, rejected."""

SIDES = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
)
"""Columns that hold the completions of a pair, the better first; the first with either of them filled counts."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
_BAD_CHARACTER = re.compile("[\x00\ud800-\udfff]")


class RefusedError(Exception):
    """Why a row cannot be an example; `formats` turns it into a `RowProblem`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def split_implicit(names: Sequence[str], sides: Sequence[Text]) -> Parts:
    """The prompt is the longest common beginning of two or more sides in whole messages, never inside a text."""
    turns = [list(turns_of(side, "assistant")) for side in sides]
    for name, side in zip(names, turns, strict=True):
        check_filled(name, side)
    check_differ(names, turns)
    shortest = min(map(len, turns))
    shared = 0
    while shared < shortest and all(side[shared] == turns[0][shared] for side in turns):
        shared += 1
    if shared == shortest:
        shorter = names[[len(side) for side in turns].index(shortest)]
        others = "the other side" if len(sides) == 2 else "all others"
        raise RefusedError(
            "D15", f"all of {shorter} stands at the start of {others}, so no prompt is left; add a prompt"
        )
    if shared == 0 or all(side[shared]["role"] != "assistant" for side in turns):
        raise RefusedError(
            "D16",
            f"{listed(names)} differ before the assistant answers; there is one prompt for all: delete the row",
        )
    return turns[0][:shared], *(side[shared:] for side in turns)


def split_repeated(prompt: str, names: Sequence[str], sides: Sequence[Text]) -> Parts:
    """Sides that repeat a prompt given as text (UltraFeedback): it must be their first or their last user turn.

    The prompt of several sides is all they share; that of a single one ends with its first user turn.
    """
    if len(sides) > 1:
        before, *rest = split_implicit(names, sides)
    else:
        check_filled(names[0], sides[0])
        turns = turns_of(sides[0], "assistant")
        questions = [number for number, turn in enumerate(turns, start=1) if turn["role"] == "user"]
        end = questions[0] if questions else 0
        before, rest = turns[:end], [turns[end:]]
    asked = [turn["content"].strip() for turn in turns_of(before, "user") if turn["role"] == "user"]
    if prompt.strip() not in (*asked[:1], *asked[-1:]):
        repeat = "repeat" if len(sides) > 1 else "repeats"
        raise RefusedError("D16", f"the prompt is not the user turn that {listed(names)} {repeat}; make them agree")
    return before, *rest


def side_names(row: Row) -> tuple[str, str]:
    """What the completions of a pair are called in this row."""
    return next((names for names in SIDES if names[0] in row or names[1] in row), SIDES[0])


def sides_of(row: Row) -> tuple[Text, Text]:
    """The completions of a pair, both text or both messages."""
    names = side_names(row)
    chosen, rejected = (text_or_messages(row, name) for name in names)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RefusedError("D04", f"one of {listed(names)} is text, the other messages; write both the same way")
    return chosen, rejected


def with_system(row: Row, parts: Parts) -> Parts:
    """Puts a `system` column before the prompt, unless the conversation has a system message of its own."""
    if row.get("system") in (None, ""):
        return parts
    prompt = turns_of(parts[0], "user")
    if not prompt or prompt[0]["role"] == "system":
        return parts
    return [{"role": "system", "content": text_of(row, "system")}, *prompt], *parts[1:]


def _field(row: Row, key: str) -> Any:
    if row.get(key) is None:
        raise RefusedError("D02", f"{key} is missing or null; fill it in or delete the row")
    return row[key]


def text_of(row: Row, key: str) -> str:
    """A field that must be text."""
    value = _field(row, key)
    if not isinstance(value, str):
        raise RefusedError("D04", f"{key} is {kind_of(value)}; it must be text here")
    return value


def text_or_messages(row: Row, key: str) -> Text:
    """A field that may be text, one message or a list of messages; messages come out in one spelling."""
    value = _field(row, key)
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return [_message(value, key)]
    if is_list(value):
        return [_message(entry, key) for entry in value]
    raise RefusedError("D04", f"{key} is {kind_of(value)}; it must be text or a list of messages")


def _message(value: Any, key: str) -> Message:
    """A message with `role` and `content` alone, from {role, content} or ShareGPT's {from, value}."""
    if not isinstance(value, Mapping):
        raise RefusedError("D04", f"{key} holds {kind_of(value)}; a message is an object with role and content")
    refuse_tools(value, f"a message of {key}")
    role = value.get("role", value.get("from"))
    role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        found = f"the role {_show(role)}" if isinstance(role, str) else "no role"
        raise RefusedError("D08", f"a message of {key} has {found}; write one of {', '.join(ROLES)}")
    content = value.get("content", value.get("value"))
    if content is None:
        raise RefusedError("D08", f"a message of {key} has no content; fill it in or delete the row")
    if is_list(content):
        content = "".join(_part(part, key) for part in content)
    if not isinstance(content, str):
        raise RefusedError("D04", f"the content of a message of {key} is {kind_of(content)}; it must be text")
    return {"role": role, "content": content}


def refuse_tools(fields: Row, name: str) -> None:
    """Refuses what would have to be rendered with the messages and is not: tools, and calls of them."""
    for key in ("tools", "tool_calls", "function_call"):
        if (tools := fields.get(key)) and tools != "[]":
            raise RefusedError(
                "D27", f"{name} has {key}, which no message text holds; write them into the texts and remove {key}"
            )


def _part(part: Any, key: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise RefusedError("D17", f"a message of {key} has a part that is not text; only text is trained: delete the row")


def turns_of(text: Text, role: str) -> Messages:
    """Messages as they are, and text as one message of `role`."""
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def opens_with_answer(text: Text) -> bool:
    """Whether a side is the completion alone, not a conversation that repeats the prompt."""
    return isinstance(text, str) or (len(text) > 0 and text[0]["role"] == "assistant")


# What every example must be, whatever its family.


def check_example(parts: Parts, names: Sequence[str]) -> None:
    """Refuses an example that cannot train, for the first reason found; `names` are those of its completions."""
    for name, text in zip(("prompt", *names), parts, strict=True):
        check_characters(name, text)
    check_prompt(parts[0], "the completion" if len(names) == 1 else "the completions")
    for name, side in zip(names, parts[1:], strict=True):
        check_filled(name, side)
        turns = turns_of(side, "assistant")
        if turns[0]["role"] != "assistant":
            raise RefusedError(
                "D10", f"{name} begins with a {turns[0]['role']} turn; it must begin with the assistant's"
            )
        if turns[-1]["role"] != "assistant":
            raise RefusedError("D11", f"{name} ends with a {turns[-1]['role']} turn; cut it off or add the answer")
    check_differ(names, parts[1:])


def check_characters(name: str, text: Text) -> None:
    """Refuses what no tokenizer takes."""
    for content in [text] if isinstance(text, str) else [turn["content"] for turn in text]:
        if bad := _BAD_CHARACTER.search(content):
            raise RefusedError("D12", f"{name} holds the character U+{ord(bad[0]):04X}, which is no text; remove it")


def check_prompt(text: Text, completions: str = "the completions") -> None:
    """Refuses a prompt that nobody can answer; `completions` is what the message calls its answers."""
    prompt = turns_of(text, "user")
    if not prompt or not prompt[-1]["content"].strip():
        raise RefusedError("D07", "the prompt is empty; fill it in or delete the row")
    if prompt[-1]["role"] == "assistant":
        raise RefusedError(
            "D09",
            f"the prompt ends with an assistant turn, which {completions} would continue;"
            f" move that turn into {completions} or delete the row",
        )


def check_filled(name: str, side: Text) -> None:
    """Refuses a completion without a message, or with a blank last one."""
    turns = turns_of(side, "assistant")
    if not turns or not turns[-1]["content"].strip():
        raise RefusedError("D06", f"{name} is empty; fill it in or delete the row")


def check_differ(names: Sequence[str], sides: Sequence[Text]) -> None:
    """Refuses sides of which two are the same but for blanks around the texts."""
    seen: dict[tuple[tuple[str, str], ...], str] = {}
    for name, side in zip(names, sides, strict=True):
        content = tuple((turn["role"], turn["content"].strip()) for turn in turns_of(side, "assistant"))
        if content in seen:
            mend = "delete the row" if len(sides) == 2 else "delete one of the two"
            raise RefusedError("D05", f"{seen[content]} and {name} are identical, so nothing is preferred; {mend}")
        seen[content] = name


# How values are shown in messages: short, and printable whatever they hold.


def is_list(value: Any) -> bool:
    """Whether a field is an array."""
    return isinstance(value, (list, tuple))


def kind_of(value: Any) -> str:
    """The type of a field in words."""
    kinds = ((str, "text"), (bool, "true or false"), (int | float, "a number"), (Mapping, "an object"))
    if value is None:
        return "null"
    if is_list(value):
        return "a list"
    return next((name for kind, name in kinds if isinstance(value, kind)), f"a {type(value).__name__}")


def listed(names: Sequence[str]) -> str:
    """The names of one or two completions; more of them are `the completions`."""
    return " and ".join(names) if len(names) <= 2 else "the completions"


def _show(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:40] + "...")


def keys_of(row: Row) -> str:
    """The keys of a row, the first twelve."""
    shown = [_show(str(key)) for key in list(row)[:12]]
    return ", ".join(shown) + (", ..." if len(row) > 12 else "") or "none"

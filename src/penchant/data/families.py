"""Row families: the shapes in which preference data is published, each known by its keys, read as an `Example`.

trl        prompt, chosen, rejected: text or lists of messages; a prompt of messages may also be implied. UltraFeedback,
           Tulu and Axolotl's prompt_pairs, ultra and argilla_chat are of this shape
hh         chosen and rejected (and perhaps prompt) as one text of "\\n\\nHuman:" and "\\n\\nAssistant:" turns
sharegpt   conversations (or messages), chosen and rejected one message each, {from, value} or {role, content}
openai     input with a list of messages, preferred_output and non_preferred_output
alpaca     instruction, perhaps input and history, with chosen and rejected
argilla    instruction (or question, or input) with chosen_response and rejected_response; input with chosen, rejected
intel      question with chosen and rejected
ranked     prompt (or instruction, question, input) with a list of completions and their scores or ranks; `rankings`
           takes it apart
unpaired   one completion, perhaps with a label: prompt (or instruction, question, input) and completion; messages (or
           conversations, or completion) that end with it; instruction and output; question and answer

A `system` column may stand beside all but openai. All but the last two are pairs. Whatever cannot train is refused with
a `RefusedError`. Of every row that has one the prompt alone can be had, also where no completion stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from penchant.data.columns import FINISHED, finished_of, label_of, margin_of, weight_of, win_probabilities_of
from penchant.data.hh import is_hh, is_hh_prompt, read_hh, split_hh
from penchant.data.messages import (
    SIDES,
    Messages,
    Parts,
    RefusedError,
    Row,
    check_characters,
    check_example,
    check_filled,
    check_prompt,
    is_list,
    keys_of,
    kind_of,
    listed,
    opens_with_answer,
    refuse_tools,
    side_names,
    sides_of,
    split_implicit,
    split_repeated,
    text_of,
    text_or_messages,
    turns_of,
    with_system,
)
from penchant.data.rankings import completions_of, finished_in_order, has_completions, names_of, order_of
from penchant.errors import UserError, nearest
from penchant.examples import Example, Message, Pair, Ranking, Text, Unpaired, has_answers

_QUESTIONS = ("instruction", "question", "input")
"""Columns that hold the question where there is no `prompt`; the first that is filled counts."""

_SIDE_COLUMNS = frozenset(chain(*SIDES))


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
    for family in PAIRS if _is_pair(row) else (*OTHERS, _PROMPT_ONLY):
        if family.recognises(row):
            return family
    raise RefusedError(
        "D03",
        f"no row family has the keys {keys_of(row)}; expected are chosen and rejected, a completion or completions,"
        " with prompt, conversations or instruction: rename the columns",
    )


def prompt_of(row: Row, family: Family | None = None) -> Text:
    """The prompt of a row, whatever there is of completions; `family` is the one to read it as."""
    refuse_tools(row, "the row")
    prompt = (family or (_PROMPT_ONLY if _has_prompt_alone(row) else family_of(row))).read(row)[0]
    check_characters("prompt", prompt)
    check_prompt(prompt)
    return prompt


def family_named(name: str) -> Family:
    """The family that a user names, to read every row as one of it.

    Raises:
        UserError: there is no such family.
    """
    families = {family.name: family for family in PAIRS + OTHERS}
    if name not in families:
        raise UserError(
            f"data_family: there is no row family '{name}'{nearest(name, families)}; there are {', '.join(families)}"
        )
    return families[name]


# The kinds of example, one function each.


def _build_pair(row: Row, parts: Parts, source: str) -> Pair:
    refuse_tools(row, "the row")
    check_example(parts, side_names(row))
    prompt, chosen, rejected = parts
    columns = weight_of(row), margin_of(row), win_probabilities_of(row), finished_of(row, FINISHED)
    return Pair(prompt, chosen, rejected, source, *columns)


def _build_unpaired(row: Row, parts: Parts, source: str) -> Unpaired:
    refuse_tools(row, "the row")
    check_example(parts, ["completion"])
    prompt, completion = parts
    label, columns = label_of(row), (weight_of(row), finished_of(row, ["finished"]))
    is_conversation = label is None and _is_conversation(row) and has_answers(prompt)
    return Unpaired(prompt, completion, label, source, *columns, is_conversation=is_conversation)


def _build_ranking(row: Row, parts: Parts, source: str) -> Ranking:
    prompt, *completions = parts
    refuse_tools(row, "the row")
    check_example(parts, names_of(completions))
    order, scores = order_of(row)
    best_first = tuple(completions[place] for place in order)
    return Ranking(prompt, best_first, source, weight_of(row), scores, finished_in_order(row, order))


# The families, one function each.


def _read_trl(row: Row) -> Parts:
    return _join(row, side_names(row), sides_of(row))


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
        if plain and is_hh_prompt(prompt):
            return with_system(row, split_hh(prompt, sides))
        if plain and row.get("system") in (None, ""):
            return prompt, *sides
        if not all(opens_with_answer(side) for side in sides):
            return with_system(row, split_repeated(prompt, names, sides))
    before = turns_of(prompt, "user")
    completions = [turns_of(side, "assistant") for side in sides]
    bare = (side[len(before) :] if side[: len(before)] == before else side for side in completions)
    return with_system(row, (before, *bare))


def _read_hh(row: Row) -> Parts:
    return with_system(row, read_hh(row))


def _read_sharegpt(row: Row) -> Parts:
    prompt = text_or_messages(row, _conversation_key(row))
    chosen, rejected = sides_of(row)
    return with_system(row, (turns_of(prompt, "user"), turns_of(chosen, "assistant"), turns_of(rejected, "assistant")))


def _read_openai(row: Row) -> Parts:
    prompt = _openai_prompt(row)
    chosen, rejected = sides_of(row)
    return prompt, turns_of(chosen, "assistant"), turns_of(rejected, "assistant")


def _openai_prompt(row: Row) -> Messages:
    asked = row.get("input", {})
    if not isinstance(asked, Mapping):
        raise RefusedError("D04", f"input is {kind_of(asked)}; it must be an object with a list of messages here")
    refuse_tools(asked, "input")
    return turns_of(text_or_messages(asked, "messages"), "user")


def _read_question(row: Row) -> Parts:
    return _answered(row, side_names(row), sides_of(row))


def _answered(row: Row, names: Sequence[str], sides: Sequence[Text]) -> Parts:
    """The question with the completions to it, or with conversations that repeat it and hold more than it."""
    question = _question_of(row)
    if not all(opens_with_answer(side) for side in sides):
        return with_system(row, split_repeated(question[-1]["content"], names, sides))
    return with_system(row, (question, *(turns_of(side, "assistant") for side in sides)))


def _question_of(row: Row) -> Messages:
    prompt: Messages = []
    history = row.get("history") or []
    if not is_list(history):
        raise RefusedError("D04", f"history is {kind_of(history)}; write a list of [user, assistant] texts")
    for turn in history:
        if not (is_list(turn) and len(turn) == 2 and all(isinstance(said, str) for said in turn)):
            raise RefusedError("D04", "history holds something else than [user, assistant] texts; mend the row")
        prompt += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    key = next((key for key in _QUESTIONS if key in row), "instruction")
    question = text_of(row, key)
    if key == "instruction" and row.get("input") not in (None, ""):
        question += "\n" + text_of(row, "input")
    prompt.append({"role": "user", "content": question})
    return prompt


def _read_ranked(row: Row) -> Parts:
    completions = completions_of(row)
    return (_answered if _is_question(row) else _join)(row, names_of(completions), completions)


def _read_unpaired(row: Row) -> Parts:
    if "completion" in row:
        completion = text_or_messages(row, "completion")
        if _is_question(row):
            return _answered(row, ["completion"], [completion])
        if "prompt" in row or isinstance(completion, str):
            return _join(row, ["completion"], [completion])
        return with_system(row, _split_conversation(row, "completion"))
    if "conversations" in row or "messages" in row:
        return with_system(row, _split_conversation(row, _conversation_key(row)))
    name = "answer" if "answer" in row and "output" not in row else "output"
    if "instruction" in row or name in row:
        return _answered(row, [name], [text_or_messages(row, name)])
    raise RefusedError(
        "D02",
        f"the row has a label but no completion (keys {keys_of(row)}); add prompt and completion, or messages",
    )


def _split_conversation(row: Row, key: str) -> Parts:
    """The last turn of a conversation is the completion, and everything before it the prompt."""
    turns = _conversation_of(row, key)
    check_filled(f"the last turn of {key}", turns)
    if turns[-1]["role"] != "assistant":
        raise RefusedError("D11", f"{key} ends with a {turns[-1]['role']} turn; cut it off or add the answer")
    return turns[:-1], turns[-1:]


def _conversation_of(row: Row, key: str) -> Sequence[Message]:
    turns = text_or_messages(row, key)
    if isinstance(turns, str):
        raise RefusedError("D04", f"{key} is text; it must be a list of messages here")
    return turns


def _conversation_key(row: Row) -> str:
    return "conversations" if "conversations" in row else "messages"


def _read_prompt(row: Row) -> Parts:
    """The prompt without completions; an answer at the end of a conversation is left out."""
    if "conversations" in row or "messages" in row:
        turns = _conversation_of(row, _conversation_key(row))
        is_answered = len(turns) > 0 and turns[-1]["role"] == "assistant"
        return with_system(row, (turns[:-1] if is_answered else turns,))
    if isinstance(row.get("input"), Mapping):
        return (_openai_prompt(row),)
    return (_answered if _is_question(row) else _join)(row, (), ())


def _refuse_prompt_only(row: Row, parts: Parts, source: str) -> Example:
    raise RefusedError(
        "D14",
        f"the row holds a prompt without chosen and rejected (keys {keys_of(row)}); online methods train on"
        " prompts alone, pair methods need both: add or rename the columns",
    )


def _is_pair(row: Row) -> bool:
    return not _SIDE_COLUMNS.isdisjoint(row)


def _is_openai(row: Row) -> bool:
    return side_names(row) == SIDES[2] or isinstance(row.get("input"), Mapping)


def _is_question(row: Row) -> bool:
    return "prompt" not in row and any(key in row for key in _QUESTIONS)


def _is_argilla(row: Row) -> bool:
    only_input = not ("instruction" in row or "question" in row)
    return _is_question(row) and (side_names(row) == SIDES[1] or only_input)


def _is_sharegpt(row: Row) -> bool:
    # UltraFeedback carries a `messages` column beside prompt and full lists: that one is trl.
    return "conversations" in row or ("messages" in row and "prompt" not in row and not is_list(row.get("chosen")))


def _is_ranked(row: Row) -> bool:
    # A conversation of its own, or a single answer, says more than a list beside it.
    if "completion" in row or "output" in row:
        return False
    asked = "prompt" in row or _is_question(row)
    return has_completions(row) and (asked or not ("conversations" in row or "messages" in row))


def _has_prompt_alone(row: Row) -> bool:
    if _is_pair(row) or has_completions(row) or "completion" in row or "output" in row:
        return False
    return _is_question(row) or any(key in row for key in ("prompt", "messages", "conversations"))


def _is_conversation(row: Row) -> bool:
    return "completion" not in row and ("conversations" in row or "messages" in row)


def _is_single(row: Row) -> bool:
    if any(key in row for key in ("label", "kto_tag", "completion", "messages", "conversations", "output")):
        return True
    return "answer" in row and _is_question(row)


PAIRS: tuple[Family, ...] = (
    Family("sharegpt", _is_sharegpt, _read_sharegpt, _build_pair),
    Family("openai", _is_openai, _read_openai, _build_pair),
    Family("argilla", _is_argilla, _read_question, _build_pair),
    Family("alpaca", lambda row: _is_question(row) and "instruction" in row, _read_question, _build_pair),
    Family("intel", _is_question, _read_question, _build_pair),
    Family("hh", is_hh, _read_hh, _build_pair),
    Family("trl", lambda row: True, _read_trl, _build_pair),
)
"""The families of rows with both completions of a pair; the first that recognises a row reads it."""

OTHERS: tuple[Family, ...] = (
    Family("ranked", _is_ranked, _read_ranked, _build_ranking),
    Family("unpaired", _is_single, _read_unpaired, _build_unpaired),
)
"""The families of the other rows."""

_PROMPT_ONLY = Family("prompt only", lambda row: "prompt" in row, _read_prompt, _refuse_prompt_only)
"""Rows with a prompt and nothing else: they are read, and make no example."""

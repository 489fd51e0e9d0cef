"""Dialogues as one text, with turns that begin "\\n\\nHuman:" and "\\n\\nAssistant:" (HH-RLHF)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from penchant.data.messages import Messages, Parts, RefusedError, Row, check_filled, text_of
from penchant.examples import Text

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_SIDES = ("chosen", "rejected")


def is_hh(row: Row) -> bool:
    """Whether a pair is written as dialogue text."""
    sides = [row.get(key) for key in _SIDES]
    if "prompt" in row:
        return all(isinstance(side, str) for side in sides) and is_hh_prompt(row["prompt"])
    return any(isinstance(side, str) and ("\n\nHuman:" in side or "\n\nAssistant:" in side) for side in sides)


def is_hh_prompt(prompt: Any) -> bool:
    """Whether a prompt is dialogue text."""
    if not isinstance(prompt, str) or not prompt.lstrip().startswith("Human:"):
        return False
    return prompt.startswith("\n\n") or "\n\nAssistant:" in prompt


def read_hh(row: Row) -> Parts:
    """A pair of dialogue texts; without a prompt column the prompt ends before the last Assistant turn of both."""
    texts = {key: text_of(row, key) for key in _SIDES}
    if "prompt" in row:
        return split_hh(text_of(row, "prompt"), list(texts.values()))
    prompts, completions = [], []
    for key, text in texts.items():
        check_filled(key, text)
        turns = _turns(text)
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


def split_hh(prompt: str, texts: Sequence[Text]) -> Parts:
    """The prompt column says where the prompt ends; the texts hold what follows it, or repeat it first."""
    turns = _turns(prompt)
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
        completions.append(_turns(answer if has_speaker or not answer else f"Assistant: {answer}"))
    return turns, *completions


def _turns(text: str) -> Messages:
    """The turns of HH-RLHF text, stripped; text before the first one is a system message.

    Turns of one role in a row are joined: the data has some, and many chat templates refuse them.
    """
    preamble, *pieces = _TURN.split(text)
    turns: list[dict[str, str]] = []
    if preamble.strip():
        turns.append({"role": "system", "content": preamble.strip()})
    for speaker, said in zip(pieces[::2], pieces[1::2], strict=True):
        role = _ROLES[speaker]
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{said.strip()}".strip()
        else:
            turns.append({"role": role, "content": said.strip()})
    return list(turns)

"""From texts to token ids: the chat template, the end of a turn, the length limit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from penchant.data.formats import RowProblem
from penchant.data.messages import turns_of
from penchant.errors import UserError
from penchant.examples import Example, Finished, Message, Pair, Text, TokenizedExample, Unpaired

TOKEN_CHECKS = {
    "T01": "the prompt alone fills max_length",
    "T02": "the chat template refuses the messages",
    "T03": "the rendered prompt does not begin the rendered conversation",
    "T04": "longer than max_length",
    "T05": "completions that are the same tokens within max_length",
    "T06": "the chat template hides where an answer was cut off",
}
"""What can be wrong with a row once it is rendered and tokenised, by code."""


PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n\nAssistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ '\n\nHuman: ' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
"""A chat template for tokenizers without one: the turns of the HH dialogues, written out."""

_CUT_OFF = "\uf8ff"
"""Put behind a completion that was cut off, to find its end in what a template renders: a letter of no language."""

TEMPLATE_SECONDS = 10.0
"""Most time a chat template has for one conversation."""


@dataclass
class Split:
    """Examples as token ids, and the texts they came from."""

    examples: Sequence[TokenizedExample]
    texts: Mapping[int, Example]
    """What stands behind each `TokenizedExample.index`."""


@dataclass
class TokenizedData(Split):
    """What became of a data set: its examples, and the rows that fell away."""

    problems: list[RowProblem] = field(default_factory=list)
    num_truncated: int = 0
    """How many of `examples` have a completion that was cut at max_length."""


def tokenize_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    max_length: int,
    truncation: Literal["truncate", "drop", "error"] = "truncate",
    first_index: int = 0,
    advance: Callable[[int], None] = lambda examples: None,
) -> TokenizedData:
    """Examples as token ids, numbered from `first_index`; calls `advance(1)` for each.

    They go through the tokenizer all at once, which is faster than one by one; some hundred at a time suffice.

    A sequence (prompt and completion) has at most `max_length` tokens. Where a completion reaches beyond, `truncate`
    cuts all completions of the prompt at the same place, `drop` leaves the example out and `error` stops. A prompt is
    never cut: an example whose prompt leaves no room is left out.

    Raises:
        UserError: the rows are messages and the tokenizer has no chat template; or an example is too long and
            `truncation` is "error".
    """
    made: list[TokenizedExample] = []
    texts: dict[int, Example] = {}
    problems: list[RowProblem] = []
    num_truncated = 0
    for index, (example, ids) in enumerate(_encoded(examples, tokenizer, advance), start=first_index):
        if isinstance(ids, RenderError):
            problems.append(RowProblem(ids.code, example.source, str(ids)))
            continue
        prompt_ids, completion_ids = ids
        room, length = max_length - len(prompt_ids), max(map(len, completion_ids))
        problem = _misfit(example, len(prompt_ids), length, max_length, truncation)
        if problem is not None:
            problems.append(problem)
            continue
        completion_ids = [ids[:room] for ids in completion_ids]
        if len(set(map(tuple, completion_ids))) < len(completion_ids):
            message = f"completions are the same tokens within max_length {max_length}; raise it, or drop the row"
            problems.append(RowProblem("T05", example.source, message))
            continue
        num_truncated += length > room
        made.append(_tokenized(example, prompt_ids, completion_ids, index))
        texts[index] = example
    return TokenizedData(made, texts, problems, num_truncated)


def _misfit(example: Example, prompt: int, length: int, max_length: int, truncation: str) -> RowProblem | None:
    """What is wrong with the lengths of an example, if it cannot stay."""
    if prompt >= max_length:
        message = (
            f"the prompt has {prompt} tokens, which leaves no room for an answer within max_length {max_length}; raise "
            "max_length or shorten the prompt"
        )
        return RowProblem("T01", example.source, message)
    if prompt + length <= max_length or truncation == "truncate":
        return None
    message = (
        f"the row has {prompt + length} tokens and max_length is {max_length}; raise max_length, or set truncation: "
        "truncate"
    )
    problem = RowProblem("T04", example.source, message)
    if truncation == "error":
        raise UserError(str(problem))
    return problem


def _tokenized(
    example: Example, prompt_ids: list[int], completion_ids: Sequence[list[int]], index: int
) -> TokenizedExample:
    return TokenizedExample(
        prompt_ids,
        tuple(completion_ids),
        index,
        weight=example.weight,
        margin=example.margin if isinstance(example, Pair) else None,
        win_probabilities=example.win_probabilities if isinstance(example, Pair) else None,
        is_desirable=example.is_desirable if isinstance(example, Unpaired) else None,
    )


def encode(
    tokenizer: Any, prompt: Text, completions: Sequence[Text], finished: Finished = None
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and of completions to it.

    Messages are rendered by the tokenizer's chat template. Plain text is taken as it is: the prompt with the
    tokenizer's special tokens in front, the completion with the end-of-sequence token behind. A completion that is not
    finished has no end token. Prompt and completion are tokenised apart, as they are when a model is asked and answers,
    so the seam is always a token boundary.

    Raises:
        RenderError: the template refuses the messages, or does not render the prompt as the beginning of the
            conversation, or an unfinished completion as it stands.
    """
    return _encode_rendered(tokenizer, [_render_row(tokenizer, prompt, completions, finished)])[0]


@dataclass(frozen=True)
class _RenderedRow:
    """A prompt and its completions as the model sees them, before they are tokens."""

    is_plain: bool
    prompt: str
    completions: Sequence[str]
    finished: Sequence[bool]


def _render_row(tokenizer: Any, prompt: Text, completions: Sequence[Text], finished: Finished) -> _RenderedRow:
    flags = finished or (True,) * len(completions)
    return _RenderedRow(isinstance(prompt, str), *render(tokenizer, prompt, completions, flags), flags)


def _encoded(
    examples: Sequence[Example], tokenizer: Any, advance: Callable[[int], None]
) -> Iterator[tuple[Example, tuple[list[int], list[list[int]]] | RenderError]]:
    """Each example with the ids of its prompt and completions, or with what keeps it from being rendered."""
    rendered: list[_RenderedRow | RenderError] = []
    with _time_limit(TEMPLATE_SECONDS) as begin:
        for example in examples:
            begin(example)
            advance(1)
            try:
                rendered.append(_render_row(tokenizer, example.prompt, example.completions, example.finished))
            except RenderError as error:
                rendered.append(error)
    encoded = iter(_encode_rendered(tokenizer, [row for row in rendered if isinstance(row, _RenderedRow)]))
    for example, row in zip(examples, rendered, strict=True):
        yield example, row if isinstance(row, RenderError) else next(encoded)


def _encode_rendered(tokenizer: Any, rows: Sequence[_RenderedRow]) -> list[tuple[list[int], list[list[int]]]]:
    """Token ids of prompt and completions of each row."""
    prompts = {
        is_plain: iter(_token_ids(tokenizer, [row.prompt for row in rows if row.is_plain is is_plain], is_plain))
        for is_plain in (True, False)
    }
    completions = iter(_token_ids(tokenizer, [text for row in rows for text in row.completions], False))
    # A turn's end need not be among the tokenizer's named tokens (Llama 3: <|eot_id|>).
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    return [
        (
            _begun(tokenizer, next(prompts[row.is_plain]), row.is_plain),
            [
                _ended(tokenizer, ids, special) if is_finished else ids
                for ids, is_finished in zip(islice(completions, len(row.completions)), row.finished, strict=True)
            ],
        )
        for row in rows
    ]


def _token_ids(tokenizer: Any, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False).input_ids


def _begun(tokenizer: Any, ids: list[int], is_plain: bool) -> list[int]:
    """A prompt's ids without an end, and never empty."""
    if is_plain and ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        ids = ids[:-1]  # some tokenizers end every text, and the prompt goes on
    if not ids:  # the first completion token needs something before it
        ids = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    return ids


class RenderError(Exception):
    """A conversation that the chat template cannot render into prompt and completion; `code` is one of TOKEN_CHECKS."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def render(
    tokenizer: Any, prompt: Text, completions: Sequence[Text], finished: Finished = None
) -> tuple[str, list[str]]:
    """Prompt and completions as the text that the model sees; an unfinished one without what the template adds."""
    if isinstance(prompt, str):
        texts = [completion for completion in completions if isinstance(completion, str)]
        if len(texts) < len(completions):
            raise ValueError("a plain prompt takes plain completions; messages as completions need messages as prompt")
        return prompt, texts
    prompt_text = _apply_template(tokenizer, prompt, add_generation_prompt=True)
    flags = finished or (True,) * len(completions)
    return prompt_text, [
        _render_completion(tokenizer, prompt, prompt_text, turns_of(completion, "assistant"), is_finished)
        for completion, is_finished in zip(completions, flags, strict=True)
    ]


def _render_completion(
    tokenizer: Any, prompt: Sequence[Message], prompt_text: str, completion: Sequence[Message], is_finished: bool
) -> str:
    """What stands behind the rendered prompt."""
    if not is_finished:
        *before, last = completion
        completion = [*before, {**last, "content": last["content"] + _CUT_OFF}]
    whole = _apply_template(tokenizer, [*prompt, *completion], add_generation_prompt=False)
    if not whole.startswith(prompt_text):
        raise RenderError("T03", "the chat template renders the prompt differently once an answer follows")
    if is_finished:
        return whole[len(prompt_text) :]
    text, mark, _ = whole[len(prompt_text) :].rpartition(_CUT_OFF)
    if not mark:
        raise RenderError("T06", "the chat template hides where the answer was cut off; drop the row")
    return text


def _apply_template(tokenizer: Any, messages: Sequence[Any], add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise UserError(
            "the data are messages and the model's tokenizer has no chat template; give one as chat_template: FILE"
        )
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except UserError:
        raise  # its time is over
    except Exception as error:  # a template is a program, often by strangers: whatever it raises is its refusal
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RenderError("T02", f"the chat template refuses the messages: {reason}") from None


@contextmanager
def _time_limit(seconds: float) -> Iterator[Callable[[Example], None]]:
    """Gives a function that says which example begins, and stops one that takes longer than `seconds`.

    It may take up to twice as long, and there is no limit outside the main thread, on Windows, and within a single
    gigantic operation. The clock looks in from time to time, for setting it anew at every row would cost more than
    rendering the row.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield lambda example: None
        return
    now: Example | None = None
    seen: Example | None = None

    def begin(example: Example) -> None:
        nonlocal now
        now = example

    def look_in(*_: Any) -> None:
        nonlocal seen
        if now is not None and now is seen:
            raise UserError(
                f"{now.source}: the chat template takes more than {seconds:g} s for this conversation and may never "
                "end; give another as chat_template: FILE"
            )
        seen = now

    handler = signal.signal(signal.SIGALRM, look_in)
    others = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield begin
    finally:
        signal.setitimer(signal.ITIMER_REAL, *others)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)


def _ended(tokenizer: Any, ids: list[int], special: Collection[int]) -> list[int]:
    """A completion's ids with exactly one end token, which is one of the `special` ones, at their end.

    A template ends the turn itself and often adds a line break behind, which no model ever has to produce; plain text
    has no end yet.
    """
    end = len(ids)
    while end and ids[end - 1] not in special and not tokenizer.decode(ids[end - 1]).strip():
        end -= 1
    if end and ids[end - 1] in special:
        return ids[:end]
    return [*ids, tokenizer.eos_token_id]

"""From texts to token ids: the prompt is a prompt, the answer ends once, and what does not fit is accounted for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from penchant.data.chat import (
    PLAIN_CHAT_TEMPLATE,
    TOKEN_CHECKS,
    RenderError,
    TokenizedData,
    encode,
    render,
    tokenize_examples,
)
from penchant.errors import UserError
from penchant.types import Pair, Ranking, TokenizedExample, Unpaired

ASK = [{"role": "user", "content": "what is one"}]
CHATML_PROMPT = "<|im_start|>user\nwhat is one<|im_end|>\n<|im_start|>assistant\n"
BOS, END = 1, 2


@pytest.fixture
def own(tokenizer: Any) -> Any:
    """A tokenizer that the test may change."""
    return copy.deepcopy(tokenizer)


def with_bos(tokenizer: Any) -> Any:
    """The tokenizer as many are: a special token in front of every text."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", BOS)]
    )
    assert tokenizer("one").input_ids[0] == BOS
    return tokenizer


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


# Messages.


def test_messages_become_the_rendered_prompt_and_the_rest_of_the_conversation(tokenizer: Any) -> None:
    prompt_ids, (completion_ids,) = encode(tokenizer, ASK, ["two three"])
    assert tokenizer.decode(prompt_ids) == CHATML_PROMPT
    assert tokenizer.decode(completion_ids) == "two three<|im_end|>"


def test_plain_answer_to_messages_is_the_assistants_turn(tokenizer: Any) -> None:
    answer = [{"role": "assistant", "content": "two three"}]
    assert encode(tokenizer, ASK, ["two three"]) == encode(tokenizer, ASK, [answer])


def test_answer_of_several_turns_is_one_completion(tokenizer: Any) -> None:
    answer = [
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": "no"},
    ]
    prompt_ids, (completion_ids,) = encode(tokenizer, ASK, [answer])
    assert tokenizer.decode(prompt_ids) == CHATML_PROMPT
    expected = "two<|im_end|>\n<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    assert tokenizer.decode(completion_ids) == expected


def test_prompt_is_the_same_whatever_the_answers(tokenizer: Any) -> None:
    prompt_ids, completions = encode(tokenizer, ASK, ["two", "", "the cat"])
    assert [tokenizer.decode(ids) for ids in completions] == ["two<|im_end|>", "<|im_end|>", "the cat<|im_end|>"]
    assert all(encode(tokenizer, ASK, [answer])[0] == prompt_ids for answer in ("two", "", "the cat"))
    assert encode(tokenizer, ASK, []) == (prompt_ids, [])


TEMPLATES = {
    "no end of its own": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "an end and blank lines": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|> \n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "an end that the tokenizer does not name": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] "
    "+ '<|endoftext|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "ours for tokenizers without": PLAIN_CHAT_TEMPLATE,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_completion_has_exactly_one_end_token_at_its_end(template: str, own: Any) -> None:
    own.chat_template = TEMPLATES[template]
    own.pad_token = None
    prompt_ids, (completion_ids,) = encode(own, ASK, ["two three"])
    text = own.decode(completion_ids)
    end = "<|endoftext|>" if "does not name" in template else "<|im_end|>"
    assert text.strip().removeprefix("two three").strip() == end
    assert own.decode(completion_ids[-1]) == end
    assert sum(token in (0, END) for token in completion_ids) == 1
    assert own.decode(prompt_ids) == render(own, ASK, [])[0]


def test_template_that_writes_the_first_token_itself_gives_it_once(own: Any) -> None:
    with_bos(own).chat_template = "{{ bos_token }}" + TEMPLATES["an end and blank lines"]
    prompt_ids, (completion_ids,) = encode(own, ASK, ["two"])
    assert prompt_ids == [BOS, *plain_ids(own, "user: what is one<|im_end|> \n\nassistant: ")]
    assert completion_ids == [*plain_ids(own, "two"), END]


def test_our_template_ends_every_assistant_turn_and_starts_every_human_one(own: Any) -> None:
    own.chat_template = PLAIN_CHAT_TEMPLATE
    prompt = [{"role": "system", "content": "Be kind."}, *ASK, {"role": "assistant", "content": "two"}, *ASK]
    expected = "Be kind.\n\nHuman: what is one\n\nAssistant: two<|im_end|>\n\nHuman: what is one\n\nAssistant:"
    assert render(own, prompt, ["three"]) == (expected, [" three<|im_end|>"])


def test_template_that_rewrites_the_prompt_is_refused(own: Any) -> None:
    own.chat_template = "{{ messages | length }}" + own.chat_template
    with pytest.raises(RenderError) as caught:
        encode(own, ASK, ["two"])
    assert caught.value.code == "T03"


def test_template_that_refuses_is_quoted(own: Any) -> None:
    own.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RenderError, match="roles must alternate") as caught:
        encode(own, ASK, ["two"])
    assert caught.value.code == "T02"


def test_messages_without_a_chat_template_are_refused(own: Any) -> None:
    own.chat_template = None
    with pytest.raises(UserError, match="chat_template: FILE"):
        encode(own, ASK, ["two"])


# Plain text.


def test_plain_text_is_taken_as_it_is_and_ended(tokenizer: Any) -> None:
    prompt_ids, (first, second) = encode(tokenizer, "what is one\n", [" two \n", ""])
    assert prompt_ids == plain_ids(tokenizer, "what is one\n")
    assert first == [*plain_ids(tokenizer, " two \n"), END]
    assert second == [END]


def test_plain_text_that_is_ended_already_is_not_ended_twice(tokenizer: Any) -> None:
    assert encode(tokenizer, "one", ["two<|im_end|>"])[1] == [[*plain_ids(tokenizer, "two"), END]]


def test_first_token_stands_before_a_plain_prompt_and_not_before_its_completion(own: Any) -> None:
    prompt_ids, (completion_ids,) = encode(with_bos(own), "what is one", ["two"])
    assert prompt_ids == [BOS, *plain_ids(own, "what is one")]
    assert completion_ids == [*plain_ids(own, "two"), END]


def test_end_that_a_tokenizer_puts_behind_every_text_is_not_in_the_prompt(own: Any) -> None:
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", END)]
    )
    prompt_ids, (completion_ids,) = encode(own, "what is one", ["two"])
    assert prompt_ids == plain_ids(own, "what is one")
    assert completion_ids == [*plain_ids(own, "two"), END]


@pytest.mark.parametrize(("bos_token", "expected"), [("<|im_start|>", [BOS]), (None, [END])])
def test_empty_prompt_is_one_token_that_the_completion_can_follow(
    bos_token: str | None, expected: list[int], own: Any
) -> None:
    own.bos_token = bos_token
    assert encode(own, "", ["two"])[0] == expected


def test_messages_as_the_answer_to_plain_text_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="plain"):
        encode(tokenizer, "what is one", [ASK])


# The length limit. The prompt has 4 tokens; chosen and rejected with their ends 5 and 3.

PROMPT, CHOSEN, REJECTED = "what is one two", " cat dog mat tree", " cat sat"


def check_lengths(tokenizer: Any) -> Pair:
    prompt_ids, completions = encode(tokenizer, PROMPT, [CHOSEN, REJECTED])
    assert [len(prompt_ids), *map(len, completions)] == [4, 5, 3]
    return Pair(PROMPT, CHOSEN, REJECTED, source="data.jsonl:1")


def codes(data: TokenizedData) -> list[tuple[str, str]]:
    return [(problem.code, problem.source) for problem in data.problems]


@pytest.mark.parametrize("truncation", ["truncate", "drop", "error"])
def test_pair_that_just_fits_is_kept_whole(truncation: Any, tokenizer: Any) -> None:
    pair = check_lengths(tokenizer)
    data = tokenize_examples([pair], tokenizer, 9, truncation)
    prompt_ids, (chosen_ids, rejected_ids) = encode(tokenizer, PROMPT, [CHOSEN, REJECTED])
    (found,) = data.examples
    assert found == TokenizedExample(prompt_ids, (chosen_ids, rejected_ids), 0)
    assert found.num_tokens == 9
    assert (data.num_truncated, data.problems) == (0, [])
    assert data.texts == {0: pair}


@pytest.mark.parametrize(("max_length", "lengths"), [(8, (4, 3)), (6, (2, 2))])
def test_truncate_cuts_both_completions_at_the_same_place(
    max_length: int, lengths: tuple[int, int], tokenizer: Any
) -> None:
    data = tokenize_examples([check_lengths(tokenizer)], tokenizer, max_length)
    _, (chosen_ids, rejected_ids) = encode(tokenizer, PROMPT, [CHOSEN, REJECTED])
    (found,) = data.examples
    assert found.completion_ids == (chosen_ids[: lengths[0]], rejected_ids[: lengths[1]])
    assert found.num_tokens == max_length
    assert data.num_truncated == 1


def test_drop_leaves_out_a_pair_that_is_too_long(tokenizer: Any) -> None:
    pair = check_lengths(tokenizer)
    data = tokenize_examples([pair, Pair("one", "two", "three")], tokenizer, 8, "drop")
    assert codes(data) == [("T04", "data.jsonl:1")]
    assert "9 tokens and max_length is 8" in str(data.problems[0])
    assert [found.index for found in data.examples] == [1]
    assert (data.num_truncated, list(data.texts)) == (0, [1])


def test_error_stops_at_a_pair_that_is_too_long(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.jsonl:1: .*9 tokens and max_length is 8"):
        tokenize_examples([check_lengths(tokenizer)], tokenizer, 8, "error")


@pytest.mark.parametrize("max_length", [3, 4])
@pytest.mark.parametrize("truncation", ["truncate", "drop", "error"])
def test_prompt_is_never_cut(max_length: int, truncation: Any, tokenizer: Any) -> None:
    data = tokenize_examples([check_lengths(tokenizer)], tokenizer, max_length, truncation)
    assert codes(data) == [("T01", "data.jsonl:1")]
    assert data.examples == []
    assert data.texts == {}


def test_pair_that_differs_only_beyond_the_limit_falls_away(tokenizer: Any) -> None:
    data = tokenize_examples([check_lengths(tokenizer)], tokenizer, 5)  # leaves " cat" of both
    assert codes(data) == [("T05", "data.jsonl:1")]
    assert data.examples == []
    assert data.num_truncated == 0  # counted once, among the problems


def test_rows_that_cannot_be_rendered_are_listed_and_the_others_kept(own: Any) -> None:
    own.chat_template = (
        "{% if messages[0]['content'] == 'dog' %}{{ raise_exception('no dogs') }}{% endif %}"
        "{% if messages[0]['content'] == 'cat' %}{{ messages | length }}{% endif %}" + own.chat_template
    )
    pairs = [
        Pair([{"role": "user", "content": content}], "yes", "no", source=f"data.jsonl:{line}")
        for line, content in enumerate(["dog", "tree", "cat", "mat"], start=1)
    ]
    data = tokenize_examples(pairs, own, 100, first_index=10)
    assert codes(data) == [("T02", "data.jsonl:1"), ("T03", "data.jsonl:3")]
    assert [example.index for example in data.examples] == [11, 13]
    assert data.texts == {11: pairs[1], 13: pairs[3]}
    assert {"T01", "T02", "T03", "T04", "T05", "T06"} <= set(TOKEN_CHECKS)


# Every kind of example.


def ids_of(tokenizer: Any, prompt: str, *completions: str) -> tuple[list[int], tuple[list[int], ...]]:
    return plain_ids(tokenizer, prompt), tuple([*plain_ids(tokenizer, text), END] for text in completions)


def test_what_the_data_say_of_an_example_goes_with_its_tokens(tokenizer: Any) -> None:
    examples = [
        Pair(PROMPT, "yes", "no", weight=2.5, margin=1.5, win_probabilities=(0.75, 0.5)),
        Unpaired(PROMPT, "yes", True, weight=0.5),
        Unpaired(PROMPT, "no", False),
        Unpaired(PROMPT, "two", None),
        Ranking(PROMPT, ("one", "two", "three"), weight=3.0, scores=(3.0, 2.0, 1.0)),
    ]
    data = tokenize_examples(examples, tokenizer, 100, first_index=4)
    pair = ids_of(tokenizer, PROMPT, "yes", "no")
    assert data.examples == [
        TokenizedExample(*pair, 4, weight=2.5, margin=1.5, win_probabilities=(0.75, 0.5)),
        TokenizedExample(pair[0], pair[1][:1], 5, weight=0.5, is_desirable=True),
        TokenizedExample(pair[0], pair[1][1:], 6, is_desirable=False),
        TokenizedExample(*ids_of(tokenizer, PROMPT, "two"), 7),
        TokenizedExample(*ids_of(tokenizer, PROMPT, "one", "two", "three"), 8, weight=3.0),
    ]
    assert data.texts == dict(enumerate(examples, start=4))


def test_one_completion_alone_is_cut_at_the_limit(tokenizer: Any) -> None:
    _, (whole,) = encode(tokenizer, PROMPT, [CHOSEN])
    _, (short,) = encode(tokenizer, PROMPT, [REJECTED])
    data = tokenize_examples([Unpaired(PROMPT, CHOSEN, True), Unpaired(PROMPT, REJECTED, True)], tokenizer, 8)
    assert [example.completion_ids for example in data.examples] == [(whole[:4],), (short,)]
    assert data.num_truncated == 1


@pytest.mark.parametrize("truncation", ["truncate", "drop"])
def test_all_completions_of_a_ranking_share_one_limit(truncation: Any, tokenizer: Any) -> None:
    texts = (REJECTED, " mat", CHOSEN)
    data = tokenize_examples([Ranking(PROMPT, texts, "data.jsonl:1")], tokenizer, 8, truncation)
    if truncation == "drop":
        assert codes(data) == [("T04", "data.jsonl:1")]
        assert "9 tokens and max_length is 8" in str(data.problems[0])
        return
    _, whole = encode(tokenizer, PROMPT, texts)
    assert data.examples[0].completion_ids == tuple(ids[:4] for ids in whole)
    assert [len(ids) for ids in data.examples[0].completion_ids] == [3, 2, 4]
    assert data.num_truncated == 1


def test_ranking_of_which_two_are_the_same_within_the_limit_falls_away(tokenizer: Any) -> None:
    ranking = Ranking(PROMPT, (" mat tree", " cat dog mat", " cat dog tree"), "data.jsonl:1")
    assert codes(tokenize_examples([ranking], tokenizer, 7)) == []
    assert codes(tokenize_examples([ranking], tokenizer, 6)) == [("T05", "data.jsonl:1")]


def test_progress_is_told_after_every_example(tokenizer: Any) -> None:
    told: list[int] = []
    examples = [Unpaired(PROMPT, "yes", True), check_lengths(tokenizer)]
    tokenize_examples(examples, tokenizer, 8, "drop", advance=told.append)
    assert told == [1, 1]


def test_unnamed_end_of_turn_survives_saving(own: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    template = own.chat_template
    base = PreTrainedTokenizerFast(tokenizer_object=own.backend_tokenizer, eos_token="<|endoftext|>")
    base.chat_template = template
    base.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.all_special_ids == [0]  # the end of a turn is not among the named tokens
    assert loaded.decode(encode(loaded, ASK, ["two"])[1][0]) == "two<|im_end|>"


# Completions that were cut off.


def test_cut_off_plain_text_is_its_own_tokens_and_no_more(tokenizer: Any) -> None:
    prompt_ids, completion_ids = encode(tokenizer, "the cat", [" sat on", " ran "], (False, True))
    assert completion_ids == [plain_ids(tokenizer, " sat on"), [*plain_ids(tokenizer, " ran "), END]]
    assert prompt_ids == encode(tokenizer, "the cat", [" sat on"])[0]


CUT_TEMPLATES = {
    "chatml": None,
    "plain": PLAIN_CHAT_TEMPLATE,
    "no special token behind the answer": (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}. The end.\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    ),
    "trimmed": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


@pytest.mark.parametrize(
    "answer", ["two three", "two ", "two\n\n", "end", "im_end|>", ".", "one<|im_end|>", "\uf8ff one"]
)
@pytest.mark.parametrize("template", CUT_TEMPLATES)
def test_cut_off_messages_end_where_the_answer_does(template: str, answer: str, own: Any) -> None:
    own.chat_template = CUT_TEMPLATES[template] or own.chat_template
    start = " " if template == "plain" else ""  # which stands behind its "Assistant:"
    prompt_ids, (cut, whole) = encode(own, ASK, [answer, "yes"], (False, True))
    assert cut == plain_ids(own, start + answer)
    assert (prompt_ids, [whole]) == encode(own, ASK, ["yes"])


def test_only_the_last_turn_of_an_answer_is_cut_off(tokenizer: Any) -> None:
    answer = [
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": "no"},
    ]
    _, ((*cut,), whole) = encode(tokenizer, ASK, [answer, answer], (False, True))
    assert [*cut, END] == whole


def test_a_template_that_hides_the_end_of_a_cut_off_answer_is_a_problem(own: Any) -> None:
    own.chat_template = (
        "{% for m in messages %}{{ m['content'][:20] }}{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    pair = Pair(ASK, "two " * 10, "one", "data.jsonl:1", finished=(False, True))
    assert codes(tokenize_examples([pair], own, 100)) == [("T06", "data.jsonl:1")]


def test_examples_are_tokenised_with_the_ends_that_they_have(tokenizer: Any) -> None:
    pair, single = Pair("the", " cat", " dog", finished=(False, True)), Unpaired("the", " cat", True, finished=(False,))
    ranking = Ranking("the", (" cat", " dog"), finished=(True, False))
    data = tokenize_examples([pair, single, ranking], tokenizer, 20)
    cat, dog = plain_ids(tokenizer, " cat"), plain_ids(tokenizer, " dog")
    assert [example.completion_ids for example in data.examples] == [
        (cat, [*dog, END]),
        (cat,),
        ([*cat, END], dog),
    ]
    assert data.num_truncated == 0

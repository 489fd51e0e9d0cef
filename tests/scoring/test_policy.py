"""A policy scores texts as its model alone would, and answers without leaving traces."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penchant.models.generation import Sampling
from penchant.scoring.policy import Policy

from ..conftest import make_tiny_model

PROMPTS = ["what is one", "the cat sat on the red mat under a blue tree", "the capital of France is"]
COMPLETIONS = ["two three", "", "Paris yes no yes"]


@pytest.fixture
def policy(tiny_model: nn.Module, tokenizer: Any) -> Policy:
    return Policy(tiny_model, tokenizer)


def expected_log_prob(model: nn.Module, prompt_ids: list[int], completion_ids: list[int]) -> Tensor:
    """Sum over the completion of log_softmax of the model on the ids written one behind the other."""
    log_probs = torch.log_softmax(model(torch.tensor([prompt_ids + completion_ids])).logits[0], -1)
    return sum(log_probs[len(prompt_ids) + t - 1, token] for t, token in enumerate(completion_ids))


def test_log_prob_of_plain_text_is_the_sum_over_the_completion_and_its_end(policy: Policy, tokenizer: Any) -> None:
    found = policy.log_prob(PROMPTS, COMPLETIONS)
    expected = torch.stack(
        [
            expected_log_prob(
                policy.model, tokenizer(prompt).input_ids, [*tokenizer(completion).input_ids, tokenizer.eos_token_id]
            )
            for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_log_prob_is_differentiable(policy: Policy, tokenizer: Any) -> None:
    found = policy.log_prob(PROMPTS, COMPLETIONS)[2]
    found.backward()
    gradient = {name: each.grad.clone() for name, each in policy.model.named_parameters()}
    policy.model.zero_grad()
    completion_ids = [*tokenizer(COMPLETIONS[2]).input_ids, tokenizer.eos_token_id]
    expected_log_prob(policy.model, tokenizer(PROMPTS[2]).input_ids, completion_ids).backward()
    for name, each in policy.model.named_parameters():
        torch.testing.assert_close(gradient[name], each.grad, rtol=1e-3, atol=1e-4)
    assert policy.model.lm_head.weight.grad.abs().max() > 0.1


def test_log_prob_of_messages_is_that_of_the_rendered_conversation(policy: Policy, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "what is one"}]
    prompt_ids = tokenizer("<|im_start|>user\nwhat is one<|im_end|>\n<|im_start|>assistant\n").input_ids
    completion_ids = tokenizer("two three<|im_end|>").input_ids
    expected = expected_log_prob(policy.model, prompt_ids, completion_ids).item()
    assert policy.log_prob([messages], ["two three"]).item() == pytest.approx(expected, abs=1e-4)
    answer = [{"role": "assistant", "content": "two three"}]
    assert policy.log_prob([messages], [answer]).item() == pytest.approx(expected, abs=1e-4)


def test_unequal_numbers_of_prompts_and_completions_are_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match="3 prompts and 1 completions"):
        policy.log_prob(PROMPTS, ["two"])


def test_messages_as_the_answer_to_plain_text_are_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match="plain"):
        policy.log_prob(["what is one"], [[{"role": "assistant", "content": "two"}]])


def test_policy_from_a_folder_scores_like_its_model(model_folder: Path, policy: Policy) -> None:
    loaded = Policy.from_pretrained(str(model_folder))  # the same seed made both
    assert torch.equal(loaded.log_prob(PROMPTS, COMPLETIONS), policy.log_prob(PROMPTS, COMPLETIONS))


def test_bf16_rounds_the_numbers_and_keeps_float32_weights_and_gradients(policy: Policy, tokenizer: Any) -> None:
    rounding = Policy(policy.model, tokenizer, precision="bf16")
    found, exact = rounding.log_prob(PROMPTS, COMPLETIONS), policy.log_prob(PROMPTS, COMPLETIONS)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.5)
    found.sum().backward()
    assert {each.grad.dtype for each in rounding.parameters()} == {torch.float32}


def greedy(model: nn.Module, ids: list[int], num_tokens: int, end: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < num_tokens and end not in answer:
        answer.append(model(torch.tensor([ids + answer])).logits[0, -1].argmax().item())
    return answer


def test_greedy_answers_are_the_most_likely_tokens_one_by_one(policy: Policy, tokenizer: Any) -> None:
    # Such settings come with many published models; greedy is greedy all the same.
    policy.model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.5, repetition_penalty=5.0)
    answers = policy.generate(PROMPTS, max_new_tokens=6)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = greedy(policy.model, tokenizer(prompt).input_ids, 6, tokenizer.eos_token_id)
        assert answer == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert any(answers)


def test_answers_of_a_batch_are_those_of_one_by_one(policy: Policy) -> None:
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    for prompts in (PROMPTS, messages):
        together = policy.generate(prompts, max_new_tokens=6)
        assert together == [policy.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]
        assert len(set(together)) > 1


def test_sampling_depends_on_its_seed_alone_and_leaves_the_random_state(policy: Policy) -> None:
    first = policy.generate(PROMPTS, max_new_tokens=6, temperature=1.0, seed=1)
    state = torch.get_rng_state()
    assert policy.generate(PROMPTS, max_new_tokens=6, temperature=1.0, seed=1) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.generate(PROMPTS, max_new_tokens=6, temperature=1.0, seed=2) != first


def test_generating_leaves_modes_and_padding_side_as_they_were(policy: Policy) -> None:
    policy.model.train()
    policy.model.model.layers[0].eval()
    modes = [part.training for part in policy.model.modules()]
    policy.tokenizer.padding_side = "right"
    seen: list[bool] = []
    hook = policy.model.lm_head.register_forward_hook(lambda part, *_: seen.append(part.training))
    policy.generate(PROMPTS, max_new_tokens=2)
    hook.remove()
    assert seen
    assert not any(seen)
    assert [part.training for part in policy.model.modules()] == modes
    assert policy.tokenizer.padding_side == "right"


def test_modes_survive_a_failure(policy: Policy) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("out of memory")

    policy.model.train()
    policy.model.lm_head.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        policy.generate(PROMPTS)
    assert policy.model.training


@pytest.mark.parametrize("eos_token", ["<|im_end|>", "<|endoftext|>"])
def test_answer_ends_with_the_templates_turn_whatever_the_end_of_text(
    eos_token: str, tiny_model: nn.Module, tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = eos_token
    policy = Policy(tiny_model, tokenizer)
    policy.generate(["one"], max_new_tokens=1)  # the first call of all holds the model against itself
    calls: list[int] = []

    def end_at_third(_: nn.Module, __: Any, logits: Tensor) -> Tensor:
        calls.append(1)
        wanted = tokenizer.convert_tokens_to_ids("<|im_end|>" if len(calls) == 3 else "a")
        return logits.index_fill(-1, torch.tensor([wanted]), 1e4)

    tiny_model.lm_head.register_forward_hook(end_at_third)
    (answer,) = policy.sample([[{"role": "user", "content": "one"}]], Sampling(0.0, max_new_tokens=8))[0]
    assert answer.text == "aa"
    assert answer.is_finished
    assert tokenizer.convert_ids_to_tokens(answer.token_ids) == ["a", "a", "<|im_end|>"]
    assert len(calls) == 3


def test_sampled_texts_are_exactly_what_follows_the_prompt(policy: Policy, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "what is one"}]
    prompts = [*PROMPTS, messages]
    rendered = [*PROMPTS, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)]
    answers = policy.sample(prompts, Sampling(max_new_tokens=12), 8)
    assert [len(group) for group in answers] == [8] * 4
    for text, group in zip(rendered, answers, strict=True):
        for answer in group:
            ids = tokenizer(text).input_ids + list(answer.token_ids)
            whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for special in tokenizer.all_special_tokens:
                whole, text = whole.replace(special, ""), text.replace(special, "")
            assert text + answer.text == whole
            assert answer.is_finished == (answer.token_ids[-1] == tokenizer.eos_token_id)
    texts = [answer.text for group in answers for answer in group]
    assert any(text != text.strip() for text in texts)
    assert len(set(texts)) > 20


def test_samples_of_a_prompt_hang_on_its_seed_and_not_on_its_company(policy: Policy) -> None:
    sampling = Sampling(0.8, top_p=0.9, max_new_tokens=6)
    together = policy.sample(PROMPTS, sampling, 3, seeds=[5, 6, 7])
    assert policy.sample(PROMPTS[1:2], sampling, 3, seeds=[6], max_rows=2) == together[1:2]
    assert policy.sample(PROMPTS, sampling, 3) == policy.sample(PROMPTS, sampling, 3, seeds=[0, 1, 2]) != together


def test_equal_prompts_get_different_answers(policy: Policy) -> None:
    assert len(set(policy.generate([PROMPTS[0]] * 6, max_new_tokens=8, temperature=1.0))) == 6


def test_a_tokenizer_that_drops_the_first_space_loses_none(tiny_model: nn.Module) -> None:
    """As sentencepiece's do: the words carry their space in front, and at the start of a text it is not shown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, **{f"▁{word}": number for number, word in enumerate(["cat", "dog", "sat"], 2)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    assert tokenizer.decode([2, 3]) == "cat dog"
    model = make_tiny_model(vocab_size=5)
    answers = Policy(model, tokenizer).sample(["cat sat"], Sampling(max_new_tokens=1), 12)[0]
    assert {answer.text for answer in answers} == {" cat", " dog", " sat", ""}

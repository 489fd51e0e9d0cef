"""What the tests share: shapes checked at run time, tiny models made on the spot."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What is kept between runs (converted models, answers, the reference's numbers) is never kept with the user's.
_CACHE = tempfile.TemporaryDirectory(prefix="penchant-tests-")
os.environ["PENCHANT_CACHE"] = _CACHE.name

# Every signature with shapes is checked in every test: a silent (3,) against (1,) broadcast becomes an error.
install_import_hook("penchant", "beartype.beartype")

# Tiny tensors gain nothing from more threads, and sums keep their order: here and in every process a test starts.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another one has kept."""
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{uuid.uuid4().hex}"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options for the tests of faults, which are many."""
    parser.addoption("--full", action="store_true", help="try every fault, not a few of each kind")
    parser.addoption("--table", metavar="FILE", help="write the table of faults, as Markdown, to FILE")


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether every fault is tried (`make faults`), or a few of each kind."""
    return bool(request.config.getoption("--full"))


WORDS = "the a cat dog sat ran on under red blue mat tree what is one two three capital of France Paris yes no"
WORDS = WORDS.split()
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on a few words, with ChatML turns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", bos_token="<|im_start|>")
    made.pad_token = "<|endoftext|>"
    made.chat_template = CHAT_TEMPLATE
    return made


def make_tiny_model(vocab_size: int = 320, seed: int = 0, **settings: Any) -> nn.Module:
    """A two-layer Llama with random weights, large enough to differ between tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **settings,
        }
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def tiny_model() -> nn.Module:
    """A fresh tiny Llama."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny Llama with its tokenizer, saved as transformers saves."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

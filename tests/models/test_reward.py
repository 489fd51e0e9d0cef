"""Loading reward models: what is no reward model, or could do harm, is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from penchant.errors import UserError
from penchant.models.reward import load_reward_model

from ..scoring.test_reward import reward_model


def test_a_language_model_is_no_reward_model(model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"It is no reward model: it has no weights score\.weight"):
        load_reward_model(str(model_folder))


def test_pickled_weights_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = reward_model(tokenizer)
    model.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="a pickle"):
        load_reward_model(str(tmp_path))


def test_adapters_are_refused_before_their_base_is_fetched(tokenizer: Any, tmp_path: Path) -> None:
    reward_model(tokenizer).model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(UserError, match="It is an adapter; merge it into its base model first"):
        load_reward_model(str(tmp_path))

"""The run file: YAML in, YAML out, strict."""

from __future__ import annotations

from pathlib import Path

import pytest

from penchant.config import METHODS, RunConfig, config_from, load_config, option_names, parse_value
from penchant.errors import UserError
from penchant.losses import build_loss


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7),
        ("1E+3", 1000.0),
        ("0.05", 0.05),
        ("3", 3),
        ("true", True),
        ("a/b.jsonl", "a/b.jsonl"),
        ("1e", "1e"),
    ],
)
def test_values_are_read_as_yaml_with_numbers_in_scientific_notation(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_options_win_over_the_run_file_and_leave_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\nlearning_rate: 1e-6\nlora: {rank: 8, alpha: 32}\nloss: {beta: 0.5}\n")
    config = load_config(str(path), {"lora.rank": 4, "loss.label_smoothing": 0.2})
    assert config.lora.rank == 4
    assert config.lora.alpha == 32
    assert config.learning_rate == 1e-6
    assert config.loss_settings() == {"name": "dpo", "beta": 0.5, "label_smoothing": 0.2}


def test_what_is_written_is_read_back_the_same() -> None:
    config = config_from({"model": "m", "data": "d", "method": "ipo", "lora": {"rank": 3}, "loss": {"beta": 0.3}})
    import yaml

    assert config_from(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds_a_loss(method: str) -> None:
    config = RunConfig(model="m", data="d", method=method)
    assert build_loss(config.loss_settings()).name == METHODS[method]["name"]


def test_another_loss_than_the_methods_takes_none_of_its_settings() -> None:
    config = RunConfig(model="m", data="d", method="cdpo", loss={"name": "ipo"})
    assert config.loss_settings() == {"name": "ipo"}


def test_every_option_has_a_sentence_of_help() -> None:
    for name, help_text in option_names().items():
        assert len(help_text) > 10, name


def test_a_section_that_is_a_value_is_refused() -> None:
    with pytest.raises(UserError, match=r"lora\.rank: 'lora' is a value"):
        load_config(None, {"model": "m", "data": "d", "lora": 3, "lora.rank": 4})

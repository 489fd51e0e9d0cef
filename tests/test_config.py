"""The run file: YAML in, YAML out, strict."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from penchant.config import (
    METHODS,
    ONLINE_METHODS,
    JudgeConfig,
    RunConfig,
    config_from,
    load_config,
    option_names,
    parse_value,
)
from penchant.errors import UserError
from penchant.losses import LOSSES, DPOLoss, SFTLoss, WeightedSum, build_loss


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
    assert config_from(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds_a_loss(method: str) -> None:
    judge = JudgeConfig(name="rule", function="f.py:f") if method in ONLINE_METHODS else JudgeConfig()
    loss = build_loss(RunConfig(model="m", data="d", method=method, judge=judge).loss_settings())
    given, made = METHODS[method], loss.settings()
    if "name" in given:
        assert {key: made[key] for key in given} == given
    else:
        assert loss.name == " + ".join(given)
        for name, fields in given.items():
            assert {key: made[name][key] for key in fields} == fields


def test_every_loss_is_a_method_by_its_own_name_and_every_method_is_made_of_losses() -> None:
    assert {name for name, settings in METHODS.items() if settings == {"name": name}} == set(LOSSES) - {"sppo"}
    assert METHODS["sppo-hard"] == {"name": "sppo"}  # sppo is the whole method, rounds and all
    for method, settings in METHODS.items():
        named = {settings["name"]} if "name" in settings else set(settings)
        assert named <= set(LOSSES), method


@pytest.mark.parametrize(
    ("method", "loss", "sentence"),
    [
        ("cdpo", {"name": "ipo"}, "loss.name: is ipo, and method cdpo stands for dpo; leave one out"),
        ("rpo", {"name": "ipo"}, r"loss.name: is ipo, and method rpo stands for dpo \+ sft; leave one out"),
        ("ipo", {"slic": {}, "sft": {}}, "loss: is a sum, and method ipo stands for ipo alone; leave method out"),
    ],
)
def test_a_method_and_another_loss_are_refused_together(method: str, loss: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config_from({"model": "m", "data": "d", "method": method, "loss": loss})


@pytest.mark.parametrize(
    ("settings", "name", "rate"),
    [
        ({}, "dpo", 5e-7),
        ({"loss": {"beta": 0.2}}, "dpo", 5e-7),
        ({"loss": {"name": "orpo"}}, "orpo", 8e-6),
        ({"loss": {"slic": {}, "sft": {}}}, "slic + sft", 5e-7),
        ({"method": "cdpo", "loss": {"name": "dpo"}}, "cdpo", 5e-7),
    ],
)
def test_the_method_is_what_the_loss_names_where_nothing_else_is_said(
    settings: dict[str, Any], name: str, rate: float
) -> None:
    config = config_from({"model": "m", "data": "d", **settings})
    assert (config.method_name(), config.peak_learning_rate()) == (name, rate)


def test_every_option_has_a_sentence_of_help() -> None:
    for name, help_text in option_names().items():
        assert len(help_text) > 10, name


def test_a_section_that_is_a_value_is_refused() -> None:
    with pytest.raises(UserError, match=r"lora\.rank: 'lora' is a value"):
        load_config(None, {"model": "m", "data": "d", "lora": 3, "lora.rank": 4})


def loss_of(**settings: Any) -> Any:
    return build_loss(config_from({"model": "m", "data": "d", **settings}).loss_settings())


def test_settings_of_the_terms_of_a_sum_come_on_top_of_the_methods() -> None:
    assert loss_of(method="rpo") == WeightedSum(((1.0, DPOLoss(0.1)), (1.0, SFTLoss("sequence"))))
    assert loss_of(method="rpo", loss={"sft": {"weight": 0.25}}) == WeightedSum(
        ((1.0, DPOLoss(0.1)), (0.25, SFTLoss("sequence")))
    )
    assert loss_of(method="rpo", loss={"dpo": {"beta": 0.5, "weight": 3}, "sft": {"per": "token"}}) == WeightedSum(
        ((3.0, DPOLoss(0.5)), (1.0, SFTLoss("token")))
    )


def test_a_sum_may_gain_a_term_and_may_stand_alone() -> None:
    assert loss_of(method="rpo", loss={"nca": {"weight": 2}}).name == "dpo + sft + nca"
    assert loss_of(loss={"slic": {}, "sft": {"weight": 0.1}}).name == "slic + sft"
    assert loss_of(loss={"name": "ipo"}).name == "ipo"


def test_dotted_options_reach_the_terms_of_a_sum() -> None:
    config = load_config(None, {"model": "m", "data": "d", "method": "rpo", "loss.sft.weight": 0.5})
    assert config.loss_settings() == {"dpo": {"beta": 0.1}, "sft": {"weight": 0.5, "per": "sequence"}}


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        *((method, {}) for method in (None, "dpo", "cdpo", "kto", "rpo")),
        ("rpo", {"dpo": {"beta": 0.3}, "sft": {"weight": 0.5}}),
        (None, {"dpo": {"beta": 0.3}, "sft": {"weight": 0.5}}),
        (None, {"name": "ipo", "beta": 0.2}),
        ("ipo", {"beta": 0.2}),
    ],
)
def test_the_run_file_that_is_written_builds_the_same_loss(method: str | None, loss: dict[str, Any]) -> None:
    config = config_from({"model": "m", "data": "d", "method": method, "loss": loss})
    made = build_loss(config.loss_settings())
    again = config_from(yaml.safe_load(config.to_yaml(loss=made.settings())))
    assert build_loss(again.loss_settings()) == made


@pytest.mark.parametrize(
    ("method", "loss", "sentence"),
    [
        (
            "rpo",
            {"beta": 0.2},
            r"loss\.beta: this loss is a sum \(of dpo, sft\); say of which loss, as in loss\.dpo\.beta",
        ),
        ("rpo", {"sft": {"wieght": 1}}, r"loss\.sft\.wieght: the loss 'sft' has no such setting"),
        ("rpo", {"dpo": {"betta": 1}}, r"loss\.dpo\.betta: .*did you mean 'beta'"),
        ("rpo", {"sft": {"weight": "much"}}, r"loss\.sft\.weight: expected float, got 'much'"),
        ("rpo", {"sft": {"per": "word"}}, r"loss\.sft\.per: must be token or sequence, got word"),
        ("rpo", {"sfft": {}}, r"there is no loss 'sfft'; did you mean 'sft'"),
        ("rpo", {"kto": {}}, r"judge different things \(dpo: pair, sft: pair or unpaired, kto: unpaired\)"),
        ("dpo", {"sft": {"weight": 1}, "beta": 0.2}, r"loss\.sft: the loss 'dpo' has no such setting"),
    ],
    ids=str,
)
def test_a_wrong_key_in_a_sum_is_named(method: str, loss: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        loss_of(method=method, loss=loss)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"warmup_steps": 0, "warmup_ratio": 0.0}, "warmup_ratio: has no effect with warmup_steps"),
        ({"optimizer": "rmsprop", "adam_beta1": 0.0}, "adam_beta1, adam_beta2: have no effect with optimizer rmsprop"),
        ({"num_samples": 0, "sample_max_new_tokens": 3}, "sample_max_new_tokens: has no effect with num_samples 0"),
        ({"adam_beta2": 1.0}, "adam_beta2: "),
        ({"warmup_steps": -1}, "warmup_steps: "),
        ({"lr_scheduler": "polynomial"}, "lr_scheduler: "),
        ({"optimizer": "sgd"}, "optimizer: "),
        ({"pairs_from_rankings": "some"}, "pairs_from_rankings: "),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config_from({"model": "m", "data": "d", **settings})


def test_options_at_their_defaults_are_no_trouble_to_the_ones_that_rule_them_out() -> None:
    defaults = {"warmup_ratio": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.999, "sample_max_new_tokens": 128}
    settings = {"warmup_steps": 5, "optimizer": "rmsprop", "num_samples": 0, **defaults}
    config = config_from({"model": "m", "data": "d", **settings})
    assert {key: getattr(config, key) for key in settings} == settings


ONLINE = {"model": "m", "data": "d", "judge": {"name": "rule", "function": "rule.py:score"}}


def test_a_method_that_samples_fills_in_what_the_run_leaves_open() -> None:
    rso = config_from({**ONLINE, "method": "rso", "sampling": {"top_k": 0}})
    assert rso.filled_sampling().model_dump(include={"completions", "temperature", "top_p", "top_k"}) == {
        "completions": 64,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
    }
    assert (rso.filled_online().accept, rso.filled_online().pairs) == (8, "random")
    assert config_from({**ONLINE, "method": "online-dpo", "batch_size": 7}).filled_online().prompts_per_round == 7
    assert config_from({**ONLINE, "method": "sppo"}).filled_online().renew_reference is True


def test_the_loss_of_a_method_that_samples_may_be_exchanged() -> None:
    assert config_from({**ONLINE, "method": "online-dpo", "loss": {"name": "ipo"}}).loss_settings() == {"name": "ipo"}
    assert config_from({**ONLINE, "method": "rso", "loss": {"beta": 0.2}}).loss_settings() == {
        "name": "dpo",
        "beta": 0.2,
    }


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "dpo"}, "judge: has no effect with method dpo, which samples nothing"),
        ({"method": "online-dpo", "judge": {}}, "judge.name: method online-dpo needs a judge"),
        ({"method": "online-dpo", "judge": {"name": "rule"}}, "judge.function: is missing"),
        ({"method": "rso", "judge": {"name": "server", "model": "m"}}, "judge.url: is missing"),
        ({"method": "rso", "judge": {"name": "reward", "model": "m", "url": "u"}}, "judge.url: has no effect"),
        ({"method": "sppo", "drop": ["leak"]}, "drop: has no effect with method sppo"),
        ({"method": "sppo", "sampling": {"completions": 1}}, "sampling.completions: a pair needs two"),
        ({"method": "rso", "sampling": {"completions": 4}}, "online.accept: 8 of 4 completions"),
        ({"method": "sppo", "online": {"accept_beta": 1}}, "online.accept_beta: has no effect without online.accept"),
        ({"method": "dpo", "judge": {}, "sampling": {"top_k": 3}}, "sampling: has no effect with method dpo"),
    ],
)
def test_settings_of_sampling_that_do_nothing_or_lack_something_are_refused(
    settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        config_from({**ONLINE, **settings})

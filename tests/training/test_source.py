"""With tokenised rows kept from an earlier run everything is as without them, but for the time it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

import penchant
from penchant.config import RunConfig, config_from
from penchant.data.store import TokenStore
from penchant.losses import build_loss
from penchant.training import source
from penchant.training.datasets import Datasets
from penchant.training.logger import RunLog
from penchant.training.setup import set_up
from penchant.training.shared import Shared
from penchant.training.source import DataSource, identity_of, identity_of_rows

from ..data.test_flat import as_lists
from ..faults.disks import SmallDisk
from .test_run import findings_of, lines_of, ranked_rows, rows, single_rows, train, write_rows


def pairs(number: int = 24) -> list[dict[str, Any]]:
    """Pairs with all that the columns can hold; one is much longer than the others."""
    made = [
        {**row, "margin": 0.5 + place, "weight": 1.0 + place / 8, "chosen_win_probability": 0.75,
         "rejected_win_probability": 0.25}
        for place, row in enumerate(rows(number))
    ]  # fmt: skip
    made[3]["chosen"] = [{"role": "assistant", "content": "the cat sat on the mat " * 12}]
    return made


def config_of(folder: Path, **settings: Any) -> RunConfig:
    usual = {"model": "m", "data": str(folder / "data.jsonl"), "eval_size": 4, "max_length": 100}
    return config_from({**usual, "data_cache": str(folder / "tokens"), **settings})


def opened(config: RunConfig, tokenizer: Any, log: RunLog | None = None) -> Datasets:
    return DataSource(config, build_loss(config.loss_settings())).datasets(tokenizer, log or RunLog(quiet=True))


def content_of(data: Datasets) -> Any:
    splits = [
        ([as_lists(example) for example in split.examples], [split.texts[e.index] for e in split.examples])
        for split in (data.train, data.heldout)
    ]
    return splits, data.findings, data.has_messages


@pytest.fixture
def reads_nothing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on no row is read."""

    def refuse(*_: Any) -> None:
        raise AssertionError("rows are read")

    return lambda: monkeypatch.setattr(source, "read_rows", refuse)


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (pairs(), {"method": "dpo"}),
        (pairs(), {"method": "odpo", "drop": "truncated", "min_margin": 2.0}),
        (pairs(), {"method": "kto"}),
        (single_rows(), {"method": "kto"}),
        (single_rows(labels=(True, None)), {"method": "sft", "eval_size": 0}),
        (ranked_rows(), {"method": "pl-dpo"}),
        (ranked_rows(), {"method": "dpo", "pairs_from_rankings": "all"}),
        ([{"prompt": "one two", "chosen": "the cat", "rejected": "a dog"}] * 3, {"method": "ipo", "eval_size": 0}),
    ],
    ids=lambda value: value.get("method") if isinstance(value, dict) else "",
)
def test_a_second_opening_gives_the_same_and_reads_nothing(
    tmp_path: Path, tokenizer: Any, data: Any, settings: Any, reads_nothing: Callable[[], None]
) -> None:
    write_rows(tmp_path / "data.jsonl", data)
    plain = content_of(opened(config_of(tmp_path, **{**settings, "data_cache": "none"}), tokenizer))
    config = config_of(tmp_path, **settings)
    assert content_of(opened(config, tokenizer)) == plain
    reads_nothing()
    assert content_of(opened(config, tokenizer)) == plain


def test_a_run_is_the_same_to_the_bit_without_the_store_and_at_either_opening(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], reads_nothing: Callable[[], None]
) -> None:
    data = write_rows(tmp_path / "data.jsonl", pairs())
    told = []
    for name in ("none", "first", "second"):
        if name == "second":
            reads_nothing()
        where = "none" if name == "none" else str(tmp_path / "tokens")
        settings = {"data": data, "eval_data": None, "eval_size": 4, "data_cache": where, "max_length": 100}
        result = train(model_folder, tmp_path / name, quiet=False, num_train_epochs=2, method="kto", **settings)
        metrics = [
            {key: value for key, value in line.items() if key not in ("time_s", "tokens_per_s")}
            for line in lines_of(result.run_dir / "metrics.jsonl")
        ]
        beside = [lines_of(result.run_dir / file) for file in ("events.jsonl", "pairs.jsonl", "samples.jsonl")]
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("data", "held", "doctor"))]
        told.append((metrics, beside, findings_of(result), said))
    assert told[1] == told[0]
    assert told[2] == told[0]
    assert len(told[0][0]) > 4
    assert len(told[0][3]) > 2


CHANGES: dict[str, dict[str, Any]] = {
    "eval_size": {"eval_size": 5},
    "eval_data": {"eval_data": "other.jsonl", "eval_size": 0},
    "data_family": {"data_family": "trl"},
    "seed": {"seed": 1},
    "max_length": {"max_length": 99},
    "truncation": {"truncation": "drop"},
    "max_bad_rows": {"max_bad_rows": 0.5},
    "drop": {"drop": ["truncated"]},
    "min_margin": {"min_margin": 3.0},
    "weigh_by_margin": {"weigh_by_margin": True},
    "units": {"method": "kto"},
    "needs": {"method": "odpo"},
    "label weights": {"method": "kto", "loss": {"desirable_weight": 0.5}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_after_a_change_of_settings_all_is_made_anew(tmp_path: Path, tokenizer: Any, name: str) -> None:
    write_rows(tmp_path / "data.jsonl", pairs())
    change = dict(CHANGES[name])
    if "eval_data" in change:
        change["eval_data"] = write_rows(tmp_path / change["eval_data"], pairs(4))
    before = {"method": "kto"} if name == "label weights" else {}
    opened(config_of(tmp_path, **before), tokenizer)
    config = config_of(tmp_path, **change)
    assert identity_of_rows(config, build_loss(config.loss_settings())) != identity_of_rows(
        config_of(tmp_path, **before), build_loss(config_of(tmp_path, **before).loss_settings())
    )
    plain = opened(config.model_copy(update={"data_cache": "none"}), tokenizer)
    assert content_of(opened(config, tokenizer)) == content_of(plain)


def test_settings_that_rows_do_not_depend_on_share_them(
    tmp_path: Path, tokenizer: Any, reads_nothing: Callable[[], None]
) -> None:
    write_rows(tmp_path / "data.jsonl", pairs())
    first = opened(config_of(tmp_path), tokenizer)
    reads_nothing()
    others = {"learning_rate": 1e-3, "batch_size": 2, "method": "ipo", "loss": {"beta": 0.7}, "output_dir": "elsewhere"}
    assert content_of(opened(config_of(tmp_path, **others), tokenizer)) == content_of(first)


def test_one_changed_byte_of_the_data_makes_it_anew(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "data.jsonl"
    write_rows(path, pairs())
    first = opened(config_of(tmp_path), tokenizer)
    path.write_bytes(path.read_bytes().replace(b"the cat", b"the rat", 1))
    second = opened(config_of(tmp_path), tokenizer)
    assert second.findings["train"]["sha256"] != first.findings["train"]["sha256"]
    assert content_of(second) == content_of(opened(config_of(tmp_path, data_cache="none"), tokenizer))


def test_a_line_that_moves_to_another_file_is_known_by_its_new_name(tmp_path: Path, tokenizer: Any) -> None:
    """The rows of two files say from which they are."""
    folder = tmp_path / "files"
    folder.mkdir()
    write_rows(folder / "a.jsonl", pairs())
    config = config_of(tmp_path, data=str(folder))
    opened(config, tokenizer)
    (folder / "a.jsonl").rename(folder / "b.jsonl")
    texts = opened(config, tokenizer).train.texts
    assert all(text.source.startswith(str(folder / "b.jsonl")) for text in texts.values())


def changed_template(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] + '.'")


def added_token(tokenizer: Any) -> None:
    tokenizer.add_tokens(["the cat"])


def another_special_token(tokenizer: Any) -> None:
    tokenizer.unk_token = "<|endoftext|>"


@pytest.mark.parametrize("change", [changed_template, added_token, another_special_token])
def test_another_tokenizer_or_template_finds_nothing(
    tmp_path: Path, model_folder: Path, change: Callable[[Any], None]
) -> None:
    from transformers import AutoTokenizer

    write_rows(tmp_path / "data.jsonl", pairs())
    one, other = (AutoTokenizer.from_pretrained(model_folder) for _ in range(2))
    change(other)
    assert identity_of(one) != identity_of(other)
    opened(config_of(tmp_path), one)
    plain = content_of(opened(config_of(tmp_path, data_cache="none"), other))
    assert content_of(opened(config_of(tmp_path), other)) == plain
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_a_template_that_may_write_the_date_is_held_against_the_day(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert identity_of(tokenizer)["day"] is None
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    today = identity_of(tokenizer)

    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date.fromordinal(date.today().toordinal() + 1)

    monkeypatch.setattr(source, "date", Tomorrow)
    assert identity_of(tokenizer) != today


def test_rows_that_may_not_be_used_stop_every_run(tmp_path: Path, tokenizer: Any) -> None:
    """Nothing is kept of them, so that no later run passes over what is wrong."""
    bad = pairs()
    bad[5]["rejected"] = bad[5]["chosen"]
    write_rows(tmp_path / "data.jsonl", bad)
    for _ in range(2):
        with pytest.raises(penchant.UserError, match="more than max_bad_rows"):
            opened(config_of(tmp_path), tokenizer)
    write_rows(tmp_path / "data.jsonl", rows())
    opened(config_of(tmp_path), tokenizer)
    with pytest.raises(penchant.UserError, match="needs margin for every pair"):
        opened(config_of(tmp_path, method="odpo"), tokenizer)


def test_data_that_change_while_they_are_read_are_not_kept(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.jsonl"
    write_rows(path, pairs())
    read = source.read_rows

    def read_and_write(*arguments: Any) -> Any:
        found = read(*arguments)
        with path.open("a") as file:
            file.write(json.dumps(rows(1)[0]) + "\n")
        return found

    monkeypatch.setattr(source, "read_rows", read_and_write)
    assert opened(config_of(tmp_path), tokenizer).findings["train"]["used"] == 20
    assert not (tmp_path / "tokens").exists()


def events_of(log: RunLog, folder: Path) -> dict[str, str]:
    folder.mkdir()
    log.keep_in(folder)
    return {event["code"]: event["message"] for event in lines_of(folder / "events.jsonl")}


def test_a_damaged_set_is_told_and_made_anew(tmp_path: Path, tokenizer: Any) -> None:
    write_rows(tmp_path / "data.jsonl", pairs())
    first = content_of(opened(config_of(tmp_path), tokenizer))
    (ids,) = tmp_path.glob("tokens/*/train-ids.npy")
    whole = ids.read_bytes()
    ids.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    log = RunLog(quiet=True)
    assert content_of(opened(config_of(tmp_path), tokenizer, log)) == first
    assert "is not as it was written; the rows are tokenised again" in events_of(log, tmp_path / "run")["data-cache"]
    assert ids.read_bytes() == whole


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_where_nothing_can_be_written_one_sentence_is_said(tmp_path: Path, tokenizer: Any, trouble: str) -> None:
    write_rows(tmp_path / "data.jsonl", pairs())
    disk = SmallDisk(tmp_path / "disk")
    disk.mount(8192)
    try:
        if trouble == "read-only":
            disk.change("ro")
        log = RunLog(quiet=True)
        config = config_of(tmp_path, data_cache=str(disk.folder / "tokens"))
        found = content_of(opened(config, tokenizer, log))
        assert not list(disk.folder.glob("tokens/*"))
    finally:
        disk.unmount()
    assert found == content_of(opened(config_of(tmp_path, data_cache="none"), tokenizer))
    assert events_of(log, tmp_path / "run").keys() == {"data-cache"}


def test_a_plain_template_is_given_and_announced_at_every_opening(tmp_path: Path, model_folder: Path) -> None:
    from transformers import AutoTokenizer

    write_rows(tmp_path / "data.jsonl", rows())
    seen = []
    for attempt in range(2):
        tokenizer, log = AutoTokenizer.from_pretrained(model_folder), RunLog(quiet=True)
        tokenizer.chat_template = None
        found = content_of(opened(config_of(tmp_path), tokenizer, log))
        seen.append((found, tokenizer.chat_template, events_of(log, tmp_path / str(attempt))))
    assert seen[0] == seen[1]
    assert "plain-template" in seen[0][2]


def test_runs_of_a_sweep_tokenise_once_even_without_a_store(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "data.jsonl", rows())
    calls: list[Any] = []
    tokenize = source.tokenize_datasets
    monkeypatch.setattr(source, "tokenize_datasets", lambda *given: calls.append(given) or tokenize(*given))
    shared = Shared()
    for beta in (0.1, 0.5):
        config = config_of(tmp_path, model=str(model_folder), loss={"beta": beta}, data_cache="none", device="cpu")
        set_up(config, RunLog(quiet=True), shared=shared)
    assert len(calls) == 1
    config = config_of(tmp_path, model=str(model_folder), method="kto", data_cache="none", device="cpu")
    set_up(config, RunLog(quiet=True), shared=shared)
    assert len(calls) == 2


def test_rows_in_memory_are_not_kept(model_folder: Path, tmp_path: Path) -> None:
    train(model_folder, tmp_path, max_steps=1, data_cache=str(tmp_path / "tokens"))
    assert not (tmp_path / "tokens").exists()


def test_the_place_is_penchants_cache_folder(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "home"))
    write_rows(tmp_path / "data.jsonl", pairs())
    config = config_of(tmp_path, data_cache="auto")
    opened(config, tokenizer)
    rows_alone = identity_of_rows(config, build_loss(config.loss_settings()))
    assert rows_alone is not None
    assert TokenStore(tmp_path / "home" / "tokens").may_hold(rows_alone)

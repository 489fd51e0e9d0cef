"""What a reference said is paid for once: by later runs, sweeps and resumes, and by nobody whom it does not fit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penchant.cli import main
from penchant.config import config_from
from penchant.scoring.policy import Policy
from penchant.scoring.reference import LogpsCache
from penchant.training.logger import RunLog
from penchant.training.run import execute
from penchant.training.setup import set_up
from penchant.training.sweep import parse_sweep, run_sweep
from penchant.types import TokenizedExample

from ..conftest import CHAT_TEMPLATE, make_tiny_model
from ..faults.disks import SmallDisk
from .test_run import rows, single_rows, write_rows

NUM_COMPLETIONS = 2 * (12 + 4)
"""Of the pairs below, held-out ones included."""


@pytest.fixture
def settings(model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(model_folder),
        "data": write_rows(tmp_path / "pairs.jsonl", rows()),
        "eval_data": write_rows(tmp_path / "heldout.jsonl", rows(4, seed=1)),
        "method": "dpo",
        "batch_size": 4,
        "max_steps": 3,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "num_samples": 0,
        "microbatch_tokens": 60,
        "reference": {"cache": str(tmp_path / "logps")},
    }


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The completions that each batch of every reference pass has computed."""
    batches: list[int] = []
    fill = LogpsCache.fill

    def counting(self: LogpsCache, source: Policy, parts: Any, advance: Any) -> None:
        def counted() -> Iterator[Any]:
            for batch in parts:
                batches.append(len(batch.lengths))
                yield batch

        fill(self, source, counted(), advance)

    monkeypatch.setattr(LogpsCache, "fill", counting)
    return batches


def losses_of(settings: dict[str, Any], run_dir: Path) -> list[str]:
    """Trains; every loss of the run, training and held out, to the bit."""
    execute(config_from({**settings, "output_dir": str(run_dir)}), log=RunLog(quiet=True))
    return recorded_losses(run_dir)


def recorded_losses(run_dir: Path) -> list[str]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [float(record.get("loss", record.get("eval_loss"))).hex() for record in records]


def warnings_of(run_dir: Path) -> list[str]:
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event["message"] for event in events if event["code"] == "reference-cache"]


# Paid once.


@pytest.mark.parametrize(
    "other",
    [
        {"method": "ipo", "loss": {"beta": 0.5}, "learning_rate": 1e-4, "optimizer": "rmsprop"},
        {"method": "kto"},
        {"seed": 3, "batch_size": 3, "max_steps": 4, "microbatch_tokens": 200},
        {"layout": "padded"},
        {"lora": {"rank": 2}, "reference": {"kind": "precomputed"}},
    ],
    ids=str,
)
def test_a_later_run_computes_nothing_that_is_known(
    other: dict[str, Any], settings: dict[str, Any], computed: list[int], tmp_path: Path
) -> None:
    losses_of(settings, tmp_path / "first")
    assert sum(computed) == NUM_COMPLETIONS
    reference = {**settings["reference"], **other.get("reference", {})}
    found = losses_of({**settings, **other, "reference": reference}, tmp_path / "second")
    mismatched = sum(computed) - NUM_COMPLETIONS
    assert (mismatched > 0) == (other.get("method") == "kto")  # which asks for completions behind others' prompts
    before = sum(computed)
    reference["cache"] = "none"
    expected = losses_of({**settings, **other, "reference": reference}, tmp_path / "by itself")
    assert sum(computed) > before
    assert [float.fromhex(loss) for loss in found] == pytest.approx(
        [float.fromhex(loss) for loss in expected], abs=1e-5
    )


def test_only_rows_that_are_new_are_computed_and_a_line_says_so(
    settings: dict[str, Any], computed: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses_of(settings, tmp_path / "first")
    write_rows(tmp_path / "pairs.jsonl", rows(15))
    execute(config_from({**settings, "max_steps": 4, "output_dir": str(tmp_path / "second")}))
    assert sum(computed) == NUM_COMPLETIONS + 6
    assert "reference  38 completions: 32 known already, 6 to compute" in capsys.readouterr().err


def test_a_sweep_over_beta_pays_once(settings: dict[str, Any], computed: list[int], tmp_path: Path) -> None:
    for cache, paid in [("none", 1), (str(tmp_path / "logps"), 2)]:
        sweep = run_sweep(
            None,
            {**settings, "reference": {"cache": cache}, "output_dir": str(tmp_path / "sweep")},
            parse_sweep(["loss.beta=0.05,0.5"]),
            overwrite=True,
            log=RunLog(quiet=True),
        )
        assert len(sweep.run_dirs) == 2
        assert sweep.failures == {}
        assert sum(computed) == paid * NUM_COMPLETIONS


def test_numbers_are_kept_in_the_cache_folder_unless_told_otherwise(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENCHANT_CACHE", str(tmp_path / "home"))
    losses_of({**settings, "reference": {"cache": "none"}}, tmp_path / "in memory")
    assert not (tmp_path / "home" / "logps").exists()
    losses_of({**settings, "reference": {}}, tmp_path / "kept")
    (store,) = (tmp_path / "home" / "logps").iterdir()
    assert store.name.endswith("-float32-cpu.sqlite")


# Never for another source.


def change_a_weight(folder: Path, settings: dict[str, Any]) -> None:
    model = make_tiny_model()
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[7, 3] = torch.nextafter(weight[7, 3], torch.tensor(1e9))
    model.save_pretrained(folder)


def change_a_number_of_the_config(folder: Path, settings: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


def change_the_precision(folder: Path, settings: dict[str, Any]) -> None:
    settings["dtype"] = "bf16"


def change_the_template(folder: Path, settings: dict[str, Any]) -> None:
    place = folder.parent / "template.jinja"
    place.write_text("no " + CHAT_TEMPLATE)
    settings["chat_template"] = str(place)


def change_a_token_of_each_prompt(folder: Path, settings: dict[str, Any]) -> None:
    for key in ("data", "eval_data"):
        place = Path(settings[key])
        place.write_text(place.read_text().replace('"role": "user", "content": "', '"role": "user", "content": "no '))


@pytest.mark.parametrize(
    "change",
    [
        change_a_weight,
        change_a_number_of_the_config,
        change_the_precision,
        change_the_template,
        change_a_token_of_each_prompt,
    ],
)
def test_what_changes_a_number_is_computed_anew(
    change: Any, settings: dict[str, Any], model_folder: Path, computed: list[int], tmp_path: Path
) -> None:
    losses_of(settings, tmp_path / "first")
    settings["model"] = str(shutil.copytree(model_folder, tmp_path / "moved"))
    losses_of(settings, tmp_path / "from another folder")
    assert sum(computed) == NUM_COMPLETIONS
    change(tmp_path / "moved", settings)
    losses_of(settings, tmp_path / "second")
    assert sum(computed) == 2 * NUM_COMPLETIONS


def test_completions_that_another_length_cuts_are_computed_anew_and_no_others(
    settings: dict[str, Any], computed: list[int], tmp_path: Path
) -> None:
    losses_of(settings, tmp_path / "first")
    pairs = [
        max(len(example.prompt_ids) + len(ids) for ids in example.completion_ids) for example in _examples(settings)
    ]
    limit = sorted(pairs)[-4]
    losses_of({**settings, "max_length": limit}, tmp_path / "second")
    num_cut = sum(length > limit for length in pairs)
    assert sum(computed) == NUM_COMPLETIONS + 2 * num_cut  # a pair is computed as a whole
    assert num_cut > 0


def _examples(settings: dict[str, Any]) -> list[TokenizedExample]:
    """All tokenised pairs of a run."""
    datasets = set_up(config_from({**settings, "output_dir": "-"}), RunLog(quiet=True)).datasets
    return [*datasets.train.examples, *datasets.heldout.examples]


def test_another_model_as_reference_has_a_store_of_its_own(
    settings: dict[str, Any], tokenizer: Any, computed: list[int], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    make_tiny_model(seed=4).save_pretrained(other)
    tokenizer.save_pretrained(other)
    losses_of(settings, tmp_path / "first")
    settings["reference"] |= {"kind": "precomputed", "model": str(other)}
    expected = losses_of(settings, tmp_path / "second")
    assert sum(computed) == 2 * NUM_COMPLETIONS
    assert losses_of(settings, tmp_path / "third") == expected
    assert sum(computed) == 2 * NUM_COMPLETIONS
    assert len(list((tmp_path / "logps").iterdir())) == 2


# Kills and resumes.

_KILLED = """
import os, signal, sys
from penchant.cli import main
from penchant.scoring import reference
from penchant.training.loop import Training
reference._SECONDS_BETWEEN_WRITES = 0.0
place, number = sys.argv[1], int(sys.argv[2])
owner, name = (reference.LogpsCache, "_write") if place == "pass" else (Training, "_step")
real, calls = getattr(owner, name), []
def dying(*words):
    calls.append(place)
    if len(calls) > number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*words)
setattr(owner, name, dying)
main(sys.argv[3:])
"""


def killed(place: str, number: int, settings: dict[str, Any], run_dir: Path, *more: str) -> None:
    """A run that dies before it does a thing one time more than `number`."""
    run_file = run_dir.parent / "run.json"
    run_file.write_text(json.dumps(settings))
    words = [sys.executable, "-c", _KILLED, place, str(number), "train", str(run_file), "--output_dir", str(run_dir)]
    done = subprocess.run([*words, *more], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_after_a_kill_half_way_only_the_rest_is_computed_to_the_same_bits(
    settings: dict[str, Any], computed: list[int], tmp_path: Path
) -> None:
    whole = losses_of({**settings, "reference": {"cache": "none"}}, tmp_path / "whole")
    batches = list(computed)
    assert len(batches) > 4
    computed.clear()
    killed("pass", 3, settings, tmp_path / "run")
    assert losses_of(settings, tmp_path / "run") == whole
    assert computed == batches[3:]


def test_a_resumed_run_computes_nothing_again(settings: dict[str, Any], computed: list[int], tmp_path: Path) -> None:
    whole = losses_of({**settings, "reference": {"cache": "none"}}, tmp_path / "whole")
    computed.clear()
    killed("step", 2, settings, tmp_path / "run", "--save_steps", "1")
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert computed == []
    assert recorded_losses(tmp_path / "run") == whole


def test_a_resumed_run_may_keep_its_numbers_elsewhere(
    settings: dict[str, Any], computed: list[int], tmp_path: Path
) -> None:
    killed("step", 2, settings, tmp_path / "run", "--save_steps", "1")
    assert main(["resume", str(tmp_path / "run"), "--reference.cache", "none"]) == 0
    assert sum(computed) == NUM_COMPLETIONS


# Stores that do not do.


def test_a_damaged_store_is_told_and_computed_anew(
    settings: dict[str, Any], computed: list[int], tmp_path: Path
) -> None:
    expected = losses_of(settings, tmp_path / "first")
    (store,) = (tmp_path / "logps").iterdir()
    content = bytearray(store.read_bytes())
    content[-40] ^= 1  # rows grow from the end of a page
    store.write_bytes(content)
    assert losses_of(settings, tmp_path / "second") == expected
    assert sum(computed) == 2 * NUM_COMPLETIONS
    (message,) = warnings_of(tmp_path / "second")
    assert "was damaged" in message
    assert losses_of(settings, tmp_path / "third") == expected
    assert sum(computed) == 2 * NUM_COMPLETIONS
    assert warnings_of(tmp_path / "third") == []


def test_a_store_that_fails_on_the_way_leaves_nothing_missing(
    settings: dict[str, Any], computed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = losses_of(settings, tmp_path / "first")
    write_rows(tmp_path / "pairs.jsonl", rows(15))
    fill = LogpsCache.fill

    def failing(self: LogpsCache, *words: Any) -> None:
        for store in (tmp_path / "logps").iterdir():
            store.write_bytes(b"?" * store.stat().st_size)
        fill(self, *words)

    monkeypatch.setattr(LogpsCache, "fill", failing)
    found = losses_of(settings, tmp_path / "second")
    assert len(warnings_of(tmp_path / "second")) == 1
    monkeypatch.setattr(LogpsCache, "fill", fill)
    alone = losses_of({**settings, "reference": {"cache": "none"}}, tmp_path / "alone")
    assert [float.fromhex(loss) for loss in found] == pytest.approx([float.fromhex(loss) for loss in alone], abs=1e-6)
    assert len(found) == len(expected)


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_that_takes_nothing_is_told_once_and_changes_no_number(
    trouble: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    expected = losses_of({**settings, "reference": {"cache": "none"}}, tmp_path / "whole")
    disk = SmallDisk(tmp_path / "disk")
    disk.mount(8192 if trouble == "full" else 10_000_000)
    try:
        if trouble == "read-only":
            disk.change("ro")
        settings["reference"]["cache"] = str(disk.folder / "logps")
        assert losses_of(settings, tmp_path / "run") == expected
    finally:
        disk.unmount()
    assert len(warnings_of(tmp_path / "run")) == 1


def test_what_nobody_can_tell_apart_stays_in_memory(
    settings: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    """A model whose forward pass was exchanged by hand looks like any other."""
    policy = Policy.from_pretrained(str(model_folder))
    policy.model.lm_head.register_forward_hook(lambda _, __, logits: 0.5 * logits)
    config = config_from({**settings, "output_dir": str(tmp_path / "run")})
    execute(config, policy=policy, log=RunLog(quiet=True))
    assert not (tmp_path / "logps").exists()


def test_single_completions_are_known_from_their_pairs(
    settings: dict[str, Any], computed: list[int], tmp_path: Path
) -> None:
    losses_of(settings, tmp_path / "first")
    settings |= {"data": write_rows(tmp_path / "singles.jsonl", single_rows()), "method": "bco", "eval_size": 0}
    del settings["eval_data"]
    losses_of(settings, tmp_path / "second")
    assert sum(computed) == NUM_COMPLETIONS

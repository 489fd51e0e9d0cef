"""A dataset of the hub is the data files of one split, and every way in which it cannot be had is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from penchant.data.formats import read_examples
from penchant.data.hub import is_hub_id, split_files
from penchant.errors import UserError

ROW = json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n"
ULTRA = [
    "README.md",
    "load.py",
    "data/train_prefs-00000-of-00001.parquet",
    "data/train_sft-00000-of-00001.parquet",
    "data/test_prefs-00000-of-00001.parquet",
]


@pytest.mark.parametrize("name", ["owner/name", "owner/name:train", "own-er/na.me_2:train_prefs"])
def test_an_owner_and_a_name_are_a_dataset(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["name", "a/b/c", "/owner/name", "./name", "../name", "owner/", "owner/name:", "o w/n"]
)
def test_paths_are_no_datasets(name: str) -> None:
    assert not is_hub_id(name)


SPLITS: dict[str, tuple[str, list[str], list[str]]] = {
    "one file": ("o/n", ["train.jsonl", "test.jsonl", ".gitattributes"], ["train.jsonl"]),
    "shards": (
        "o/n",
        ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"],
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
    ),
    "a file for each subset": (
        "o/n:test",
        ["a/train.jsonl.gz", "a/test.jsonl.gz", "b/test.jsonl.gz"],
        ["a/test.jsonl.gz", "b/test.jsonl.gz"],
    ),
    "a folder for each split": (
        "o/n",
        ["train/1.jsonl", "train/2.jsonl", "test/1.jsonl"],
        ["train/1.jsonl", "train/2.jsonl"],
    ),
    "a split of a longer name": ("o/n:train_prefs", ULTRA, ["data/train_prefs-00000-of-00001.parquet"]),
    "a name that ends with the split": ("o/n", ["dpo_train.json", "dpo_test.json"], ["dpo_train.json"]),
    "no split named anywhere": ("o/n", ["b.jsonl", "a.jsonl"], ["a.jsonl", "b.jsonl"]),
    "the same rows in two kinds": ("o/n", ["train.jsonl", "data/train-0.parquet"], ["data/train-0.parquet"]),
    "a name that leads out": ("o/n", ["../train.jsonl", "train.jsonl"], ["train.jsonl"]),
}


@pytest.mark.parametrize("case", SPLITS)
def test_the_files_of_a_split_are_those_that_bear_its_name(case: str) -> None:
    name, there, files = SPLITS[case]
    assert split_files(name, there) == files


def test_a_split_that_is_not_there_names_the_files_that_are() -> None:
    with pytest.raises(UserError, match=r"o/n: no file of the dataset is called train \(it has data/train_prefs.*"):
        split_files("o/n", ULTRA)
    with pytest.raises(UserError, match="is called valid"):
        split_files("o/n:valid", ["rows.jsonl"])


def test_code_and_pickles_are_no_data() -> None:
    with pytest.raises(UserError, match="has no file that can be read"):
        split_files("o/n", ["train.py", "train.pkl", "train.pt", "train.arrow"])


def make_snapshot(folder: Path, files: list[str]) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(ROW)


def test_the_files_of_a_split_are_fetched_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = ["load.py", "data[1]/train.jsonl", "data[1]/test.jsonl"]
    make_snapshot(tmp_path, there)
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in there])
    asked: dict[str, Any] = {}

    def snapshot_download(dataset: str, **options: Any) -> str:
        asked.update(dataset=dataset, **options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, dataset: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    data = read_examples("owner/name")
    assert [example.source for example in data.examples] == [f"{tmp_path}/data[1]/train.jsonl:1"]
    patterns = ["data[[]1]/train.jsonl"]
    assert asked == {"dataset": "owner/name", "repo_type": "dataset", "allow_patterns": patterns}


def refuse_to_connect(*args: Any, **options: Any) -> Any:
    raise OfflineModeIsEnabled("no line")


def test_without_a_connection_an_earlier_download_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_snapshot(tmp_path, ["train.jsonl", "test.jsonl"])
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse_to_connect)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, local_files_only, **options: str(tmp_path))
    data = read_examples("owner/name:test")
    assert [example.source for example in data.examples] == [f"{tmp_path}/test.jsonl:1"]


def test_without_a_connection_and_a_download_the_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_there(*args: Any, **options: Any) -> Any:
        raise LocalEntryNotFoundError("nothing")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse_to_connect)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing_there)
    with pytest.raises(UserError, match=r"owner/name: there is no such file here, and .* cannot be reached"):
        read_examples("owner/name")

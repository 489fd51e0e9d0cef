"""Datasets of the Hugging Face hub: `owner/name`, or `owner/name:split`. Data files alone are fetched, never code."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from penchant.data.streams import LISTED_EXTENSIONS, extension_of
from penchant.errors import UserError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
_SPLIT_WORDS = re.compile(r"(?:^|[/._-])(train|test|valid|validation|dev|eval)(?=$|[/._-])")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a dataset's id."""
    return _HUB_ID.fullmatch(name) is not None


def download(name: str) -> list[Path]:
    """The local files of one split of a dataset (`train` where none is named), fetched where they are not there yet.

    Without a connection what an earlier download left is used.

    Raises:
        UserError: there is no such dataset, no such split, or no connection.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import HTTPError as LineError  # type: ignore[attr-defined]  # of its own httpx

    dataset = name.partition(":")[0]
    try:
        info = HfApi().dataset_info(dataset)
        files = split_files(name, [sibling.rfilename for sibling in info.siblings or []])
        patterns = [glob.escape(file) for file in files]
        folder = snapshot_download(dataset, repo_type="dataset", allow_patterns=patterns)
    except GatedRepoError as fault:
        raise UserError(f"{name}: the dataset is gated; accept its terms on the hub and log in there") from fault
    except RepositoryNotFoundError as fault:
        raise UserError(
            f"{name}: there is no such file here, and no such dataset on the hub; check the name"
        ) from fault
    except (LineError, OSError) as fault:  # no connection: some errors are of the one kind, some of the other
        try:
            folder = snapshot_download(dataset, repo_type="dataset", local_files_only=True)
        except LocalEntryNotFoundError:
            raise UserError(
                f"{name}: there is no such file here, and as a dataset of the hub it cannot be reached"
                f" ({type(fault).__name__}); check the path, or fetch the dataset where there is a connection"
            ) from fault
        files = split_files(name, [str(path.relative_to(folder)) for path in Path(folder).rglob("*")])
    return [Path(folder, file) for file in files]


def split_files(name: str, there: Sequence[str]) -> list[str]:
    """Those files of a dataset that hold the split: their path has its name, `train.jsonl` or `data/train-00000-of-1`.

    Where no path names any split all files are `train`. The same rows are often there in several kinds of file; one
    kind is taken, parquet first.

    Raises:
        UserError: no file holds this split.
    """
    split = name.partition(":")[2] or "train"
    files = [file for file in there if extension_of(Path(file)) and ".." not in Path(file).parts]
    for before in (r"(?:^|/)", r"[._-]"):
        word = re.compile(rf"{before}{re.escape(split)}(?=[/.]|-\d)")
        if found := [file for file in files if word.search(file)]:
            return _one_kind(found)
    if split == "train" and files and not any(_SPLIT_WORDS.search(file) for file in files):
        return _one_kind(files)
    if not files:
        raise UserError(f"{name}: the dataset has no file that can be read; convert it to {LISTED_EXTENSIONS}")
    shown = ", ".join(files[:5]) + (", ..." if len(files) > 5 else "")
    raise UserError(
        f"{name}: no file of the dataset is called {split} (it has {shown}); name a split, owner/name:SPLIT"
    )


def _one_kind(files: Sequence[str]) -> list[str]:
    kinds = {file: extension_of(Path(file)) for file in files}
    kind = ".parquet" if ".parquet" in kinds.values() else kinds[min(files)]
    return sorted(file for file in files if kinds[file] == kind)

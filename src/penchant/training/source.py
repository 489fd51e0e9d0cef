"""The data of a run: opened where they were tokenised before, else read, tokenised and kept for the next run."""

from __future__ import annotations

from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from penchant.config import RunConfig
from penchant.data.chat import PLAIN_CHAT_TEMPLATE
from penchant.data.files import files_of
from penchant.data.hub import is_hub_id
from penchant.data.store import DamagedError, Identity, TokenStore
from penchant.disk import sha256_of
from penchant.errors import UserError
from penchant.losses import Loss
from penchant.models.fingerprints import template_sha256, tokenizer_sha256
from penchant.models.load import cache_folder
from penchant.training.checks import label_weights
from penchant.training.datasets import COLUMNS, Datasets, ReadRows, Rows, read_rows, tokenize_datasets
from penchant.training.logger import RunLog

_SETTINGS = (
    *("data", "eval_data", "eval_size", "data_family", "turns", "pairs_from_rankings", "seed"),
    *("max_length", "truncation", "max_bad_rows", "drop", "min_margin", "weigh_by_margin"),
)
"""The keys of a run file that tokenised rows depend on, beside those that choose loss, tokenizer and template."""


class DataSource:
    """What a run file names as data, or rows in memory, on the way to token ids.

    What is wrong with rows shows at once, before a model is loaded: only rows of which tokens may lie ready, and which
    were sound then, are not read yet.
    """

    def __init__(self, config: RunConfig, loss: Loss, data: Rows | None = None, eval_data: Rows | None = None) -> None:
        self._config, self._loss, self._in_memory = config, loss, (data, eval_data)
        self._store = TokenStore(_folder(config.data_cache))
        is_kept = config.data_cache != "none" and are_named(config, data, eval_data)
        self._identity = identity_of_rows(config, loss) if is_kept else None
        self._rows: ReadRows | None = None
        self._datasets: Datasets | None = None
        if self._identity is None or not self._store.may_hold(self._identity):
            self._rows = self._read()

    def datasets(self, tokenizer: Any, log: RunLog) -> Datasets:
        """Token ids, and the account of them; a tokenizer that lacks a chat template for messages is given a plain one.

        Raises:
            UserError: too many rows cannot be used, none is left, or the doctor advises against the run.
        """
        identity = Identity(self._identity, identity_of(tokenizer)) if self._identity is not None else None
        if self._datasets is None and identity is not None:
            self._datasets = self._opened(identity, log)
        if self._datasets is not None:
            if self._datasets.has_messages:
                give_template(tokenizer, log)
            return self._datasets
        rows = self._rows or self._read()
        if rows.has_messages:
            give_template(tokenizer, log)
        self._datasets = tokenize_datasets(self._config, self._loss, rows, tokenizer, log)
        self._rows = None
        if identity is not None and identity.rows == identity_of_rows(
            self._config, self._loss
        ):  # nobody wrote meanwhile
            self._datasets = self._kept(identity, self._datasets, log)
        return self._datasets

    def _read(self) -> ReadRows:
        return read_rows(self._config, self._loss, *self._in_memory)

    def _opened(self, identity: Identity, log: RunLog) -> Datasets | None:
        """The data as an earlier run has kept them."""
        try:
            stored = self._store.open(identity)
        except DamagedError as error:
            log.event("warn", "data-cache", f"data_cache: {error}; the rows are tokenised again", step=0)
            return None
        return None if stored is None else Datasets(stored.splits["train"], stored.splits["eval"], **stored.facts)

    def _kept(self, identity: Identity, made: Datasets, log: RunLog) -> Datasets:
        """The same data from the disk, where they take no memory; those in memory where they cannot be kept."""
        facts = {"findings": made.findings, "has_messages": made.has_messages}
        try:
            self._store.keep(identity, {"train": made.train, "eval": made.heldout}, facts)
        except OSError as error:
            if not self._store.place_of(identity).exists():  # else another run has just kept the very same
                message = (
                    f"data_cache: the tokenised rows cannot be kept in '{self._store.folder}' "
                    f"({error.strerror or error}), so the next run tokenises them again; make room, or name another"
                    " folder"
                )
                log.event("warn", "data-cache", message, step=0)
                return made
        return self._opened(identity, log) or made


def give_template(tokenizer: Any, log: RunLog) -> None:
    """Gives a tokenizer without a chat template a plain one, and says so."""
    if tokenizer.chat_template is not None:
        return
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    message = (
        "the data are messages and the tokenizer has no chat template: turns are written out as 'Human:' and "
        "'Assistant:', and the saved tokenizer keeps this template (chat_template: FILE gives another)"
    )
    log.event("warn", "plain-template", message, step=0)


def are_named(config: RunConfig, data: Rows | None, eval_data: Rows | None) -> bool:
    """Whether all data are what the run file names, and none are rows in memory."""
    both = ((data, config.data), (eval_data, config.eval_data))
    return all(given is None or (isinstance(given, str) and given == name) for given, name in both)


def settings_of(config: RunConfig, loss: Loss) -> dict[str, Any]:
    """The settings that tokenised rows depend on, whatever the tokenizer is."""
    return {
        **{key: getattr(config, key) for key in _SETTINGS},
        "units": loss.units,
        "needs": tuple(sorted(loss.needs & {"labels", *COLUMNS})),
        "label_weights": label_weights(loss),
    }


def identity_of_rows(config: RunConfig, loss: Loss) -> dict[str, Any] | None:
    """Everything that rows depend on, and what becomes of them; None where files of one's own do not tell it.

    The names of files belong to it, for each row is known by file and line.
    """
    files: dict[str, list[tuple[str, str]]] = {}
    for key in ("data", "eval_data"):
        name = getattr(config, key)
        if name is None:
            continue
        if is_hub_id(name) and not Path(name).exists():
            return None
        try:
            found = files_of(name)
            if not all(file.is_file() for file in found):  # a pipe can be read only once
                return None
            files[key] = [(str(file), sha256_of(file)) for file in found]
        except (UserError, OSError):
            return None  # who reads them will say why they cannot be read
    return {"settings": settings_of(config, loss), "files": files}


def identity_of(tokenizer: Any) -> dict[str, Any]:
    """Everything about a tokenizer that token ids depend on, and what the doctor says of them."""
    return {
        "tokenizer": tokenizer_sha256(tokenizer),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
        "chat_template": template_sha256(tokenizer),
        # Some templates write today's date.
        "day": date.today().isoformat() if "strftime_now" in str(tokenizer.chat_template) else None,
        "versions": {package: version(package) for package in ("transformers", "tokenizers")},
    }


def _folder(data_cache: str) -> Path:
    return cache_folder() / "tokens" if data_cache == "auto" else Path(data_cache).expanduser()

"""Going on with a run: what must be the same as when it began, and what may be told to differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from penchant.config import RunConfig, load_config, option_names
from penchant.disk import read_json_lines, read_mapping, sha256_of, write_json, write_json_lines
from penchant.errors import UserError, nearest
from penchant.models.fingerprints import template_sha256, tokenizer_sha256
from penchant.training.online import OnlineSetup
from penchant.training.rundir import read_summary
from penchant.training.setup import Setup

_FREE = {
    *("output_dir", "logging_steps", "eval_steps", "save_minutes", "save_steps", "save_best", "keep_checkpoints"),
    *("num_samples", "sample_max_new_tokens", "max_bad_rows", "microbatch_tokens", "device", "method"),
    *("gradient_checkpointing", "sampling.batch_size", "reference.cache", "data_cache", "trackers"),
    *("watch.enabled", "watch.stop_on", "watch.thresholds"),
}
"""Keys that may change without a word: no step's result depends on them (`method` only names the loss).

A single threshold of the watch is a key of its own (`watch.thresholds.displaced.warn`), which is compared."""

_BY_CONTENT = ("model", "data", "eval_data", "chat_template", "reference.model")
"""Keys that name files: their content is compared, not where it lies."""

_BESIDE = ("judge.function", "judge.question", "judge.model", "judge.reference")
"""Further keys that may name files; the judge as a whole is compared by what its verdicts depend on."""

_ALLOWED = "allowed_changes.json"

Fingerprint = dict[str, Any]
"""What the result of a run depends on, by the name of the key: settings as they are, files as hashes."""

Changes = dict[str, tuple[Any, Any]]
"""Name -> what it was, and what it is now."""


def fingerprint(setup: Setup) -> Fingerprint:
    """Everything that the rest of the run depends on."""
    config, findings, tokenizer = setup.config, setup.datasets.findings, setup.policy.tokenizer
    heldout = findings["eval"]
    found = {
        **_settings(config),
        **_flat({"loss": setup.loss.settings()}),
        "learning_rate": config.peak_learning_rate(),
        "dtype": setup.policy.precision,
        "model": setup.base_sha256,
        "tokenizer": tokenizer_sha256(tokenizer),
        "chat_template": template_sha256(tokenizer),
        "data": findings["train"]["sha256"],
        "data (columns)": findings["train"]["columns_sha256"],
        "eval_data": heldout and heldout["sha256"],
        "judge": setup.judge.identity if isinstance(setup, OnlineSetup) else None,
        "reference.model": config.reference.model and _content_of(config.reference.model),
    }
    return dict(json.loads(json.dumps(found)))  # as a checkpoint will give it back


def changes_since(then: Fingerprint, now: Fingerprint) -> Changes:
    """What differs. A setting that a run of an older version did not know yet had its default."""
    defaults = _settings(RunConfig(model="", data=""))
    names = sorted({*then, *now})
    both = {name: (then.get(name, defaults.get(name)), now.get(name, defaults.get(name))) for name in names}
    return {name: (old, new) for name, (old, new) in both.items() if old != new}


def check_allowed(allowed: Iterable[str], now: Fingerprint, changes: Changes) -> None:
    """Holds the words of `--allow-change` against the keys that there are, whether they have changed or not.

    A section (`loss`) stands for its keys, and a loss's setting may stand alone (`beta`).

    Raises:
        UserError: naming the word that there is no key for, and the nearest that there is.
    """
    known = {*option_names(), *now, *changes}
    for word in allowed:
        if not any(_covers(word, name) for name in known):
            hint = nearest(word, [name.removeprefix("loss.") for name in known])
            raise UserError(f"--allow-change: there is no key '{word}'{hint}")


def refuse_changes(changes: Changes, allowed: Sequence[str], run_dir: Path, step: int) -> None:
    """Stops where something changed that was not allowed to; `allowed` is what `check_allowed` has seen.

    Raises:
        UserError: with all differences.
    """
    refused = {name: both for name, both in changes.items() if not any(_covers(word, name) for word in allowed)}
    if refused:
        lines = [f"  {name}: {_shown(name, old)} then, {_shown(name, new)} now" for name, (old, new) in refused.items()]
        names = ",".join(name.partition(" ")[0] for name in refused)
        raise UserError(
            f"output_dir: '{run_dir}' holds a run that stands at step {step}, and this one differs from it:\n"
            + "\n".join(lines)
            + f"\nGo on all the same with --allow-change {names}, begin anew with `penchant train ... "
            "--overwrite`, or choose another output_dir."
        )


def remember_allowed(run_dir: Path, current: Fingerprint) -> None:
    """Keeps what was allowed, should the run be killed before a checkpoint says so."""
    write_json(run_dir / _ALLOWED, current)


def was_allowed(run_dir: Path, current: Fingerprint) -> bool:
    """Whether exactly this was allowed before."""
    return read_mapping(run_dir / _ALLOWED) == current


def describe_changes(changes: Changes) -> str:
    """`loss.beta: 0.1 then, 0.2 now; ...`."""
    return "; ".join(
        f"{name}: {_shown(name, old)} then, {_shown(name, new)} now" for name, (old, new) in changes.items()
    )


def config_of(run_dir: Path, overrides: Mapping[str, Any]) -> RunConfig:
    """The run file of a run directory, with some settings replaced; files are found from anywhere.

    Raises:
        UserError: it is no run directory, or the run was begun from Python with rows or a model in memory.
    """
    if not (run_dir / "run.yaml").exists():
        raise UserError(f"'{run_dir}' is no run directory: it holds no run.yaml.")
    config = load_config(str(run_dir / "run.yaml"), {})
    begun_in = Path(read_summary(run_dir).get("working_directory") or ".")
    found: dict[str, Any] = {}
    for key in (*_BY_CONTENT, *_BESIDE):
        value = _at(config, key)
        if value in ("rows in memory", "model in memory", "function in memory") and key not in overrides:
            raise UserError(
                f"{key}: was handed over in memory; call penchant.train(..., output_dir='{run_dir}') again, as it was "
                "begun."
            )
        if not isinstance(value, str):
            continue
        name = value.rpartition(":")[0] if key == "judge.function" else value
        if not Path(name).expanduser().exists() and (begun_in / name).exists():
            found[key] = str(begun_in / value)
    return load_config(str(run_dir / "run.yaml"), {**found, **overrides, "output_dir": str(run_dir)})


def cut_logs(run_dir: Path, step: int, evaluated_at: int) -> None:
    """Takes out of metrics and events what came after the state that a run goes on from."""
    for name in ("metrics.jsonl", "events.jsonl"):
        path = run_dir / name
        if path.exists():
            kept = [
                record
                for record in read_json_lines(path)
                if record.get("step", 0) <= (evaluated_at if "eval_loss" in record else step)
            ]
            write_json_lines(path, kept)


def _content_of(model: str) -> str:
    """Hash of a model's weights as they lie there; one from the hub is known by its name."""
    place = Path(model).expanduser()
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest() if files else model


def _covers(word: str, name: str) -> bool:
    return name == word or name.startswith((f"{word}.", f"{word} (")) or name == f"loss.{word}"


def _shown(name: str, value: Any) -> str:
    is_hash = isinstance(value, str) and len(value) == 64
    return f"sha256 {value[:12]}" if is_hash else json.dumps(value)


def _settings(config: RunConfig) -> Fingerprint:
    settings = _flat(config.model_dump(exclude={"loss", "judge"}))
    return {name: value for name, value in settings.items() if name not in _FREE.union(_BY_CONTENT)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Fingerprint:
    flat: Fingerprint = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _at(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value

"""What a model from strangers may bring along: numbers, words and settings, never code.

The checks of this file come before transformers or peft read anything. docs/security.md lists them all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from penchant.errors import UserError

FLOORS = {
    "torch": ("2.10", "reading weights could overwrite memory"),
    "transformers": ("5.3", "the settings of a model could run code"),
}
"""Below these versions a file from strangers can do harm whatever is checked here: what it could do (CVE-2026-24747,
CVE-2026-4372)."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files that are programs for Python's unpickler."""


def refuse_old_versions() -> None:
    """Refuses torch and transformers below FLOORS.

    Raises:
        UserError: an older one is installed.
    """
    for package, (floor, harm) in FLOORS.items():
        if _release(version(package)) < _release(floor):
            raise UserError(
                f"{package} {version(package)} is not safe: before {floor}, {harm}; "
                f"pip install --upgrade '{package}>={floor}'"
            )


def refuse_harm(folder: Path) -> None:
    """Refuses a model's or adapter's folder that holds pickled weights, asks for code, or leads out of itself.

    Raises:
        UserError: which file it is, and what to do.
    """
    _refuse_links(folder)
    _refuse_pickled_weights(folder)
    _refuse_code_in_settings(folder / "config.json")
    _refuse_code_in_adapter(folder / "adapter_config.json")


def _release(text: str) -> tuple[int, ...]:
    from packaging.version import Version

    return Version(text).release[:2]


def _refuse_links(folder: Path) -> None:
    """A link out of the folder could carry a private file into the model that is saved and shared."""
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # in the hub's cache, files are links to the folder `blobs`
        allowed.append(home.parents[1] / "blobs")
    for path in [*home.iterdir(), *home.glob("additional_chat_templates/*")]:
        if path.is_file() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise UserError(f"model: '{path}' is a link that leads out of its folder; put the file itself there.")


def _refuse_pickled_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if not pickles:
            raise UserError(f"model: the folder '{folder}' holds no weights (*.safetensors).")
        raise UserError(
            f"model: '{folder}' holds its weights as {pickles[0]}, a pickle, which can run any code when it is read. "
            "Take the same model with .safetensors files; or, if you trust whoever made it, convert it once: "
            f"`AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('NEW')` "
            "(AutoPeftModelForCausalLM for an adapter), and copy the tokenizer's files."
        )
    for index in folder.glob("*.safetensors.index.json"):
        for _, shard in _entries(_settings(index).get("weight_map")):
            if isinstance(shard, str) and (Path(shard).name != shard or not shard.endswith(".safetensors")):
                raise UserError(f"model: '{index}' names '{shard}', which is no .safetensors file in its folder.")


def _refuse_code_in_settings(file: Path) -> None:
    for key, value in _entries(_settings(file)):
        if "_implementation" in key and "/" in str(value):
            raise UserError(
                f"model: {key} in '{file}' is '{value}', which fetches compiled code from the hub; take the line out."
            )
        if key == "transformers_weights" and value is not None and not str(value).endswith(".safetensors"):
            raise UserError(f"model: {key} in '{file}' is '{value}', which is no .safetensors file; take the line out.")
        if key == "quantization_config" and value:
            method = value.get("quant_method", "unknown") if isinstance(value, dict) else value
            raise UserError(
                f"model: the weights in '{file.parent}' are quantized ({method}): they cannot be trained, and reading "
                "them takes code from other packages; give the model with plain weights, or a .gguf file."
            )


def _refuse_code_in_adapter(file: Path) -> None:
    if _settings(file).get("megatron_config"):
        raise UserError(f"model: megatron_config in '{file}' imports a module of its choice; take the line out.")


def _settings(file: Path) -> dict[str, Any]:
    """What a JSON file holds, nothing where there is none."""
    if not file.exists():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model: '{file}' cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"model: '{file}' holds no settings by name.")
    return settings


def _entries(settings: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested settings with the last name on the way to it."""
    yield key, settings
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from _entries(value, name)
    elif isinstance(settings, list):
        for value in settings:
            yield from _entries(value, key)

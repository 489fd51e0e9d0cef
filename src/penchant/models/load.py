"""Loading causal language models from a folder, a hub id or a GGUF file, and saving them again."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from penchant.errors import UserError

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n\nAssistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ '\n\nHuman: ' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
"""For tokenizers that bring no chat template of their own: the turns of the HH dialogues, written out."""


def load_model_and_tokenizer(name: str, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """A causal model with float32 weights and its tokenizer, dropout off.

    Args:
        name: a local folder, a hub id, a `.gguf` file (converted once and kept in the cache folder), or a folder with
            a peft adapter (loaded on its base and merged, so that its weights are the starting point).

    Raises:
        UserError: there is no such model, it is not a causal language model, or it would need code from strangers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = _local_folder(name)
    try:
        if (Path(path) / "adapter_config.json").exists():
            model = _merged_adapter(path)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model: '{name}' cannot be loaded. {_first_sentence(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model: the tokenizer of '{name}' has no end-of-sequence token, so no answer could end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    disable_dropout(model)
    return model.to(device), tokenizer


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout to 0, the functional ones too.

    Two passes over the same pair must agree: with dropout on, policy and reference differ before the first step. Some
    attention layers read their probability from the config or keep it as a float, so modules alone are not enough.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if _is_dropout(name, value):
                setattr(module, name, 0.0)
    config = getattr(model, "config", None)
    for part in [config, config.get_text_config()] if config is not None else []:
        for name, value in vars(part).items():
            if _is_dropout(name, value):
                setattr(part, name, 0.0)


def save_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Writes model (or peft adapter) and tokenizer so that transformers (or peft) loads them; safetensors only.

    The folder appears whole or not at all.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for path in (partial, *partial.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)  # temporary folders and files are made private
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def weights_sha256(model: nn.Module) -> str:
    """Hash of all parameters by name: says which weights a run began from."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where converted models are kept: `$PENCHANT_CACHE`, else `penchant` under the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penchant"
    return Path(os.environ.get("PENCHANT_CACHE") or default)


def _local_folder(name: str) -> str:
    """The folder to load `name` from, or the name itself where it can only be a hub id."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model: there is no file '{name}'.")
        return str(_converted_gguf(path))
    if path.is_dir():
        if not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
            raise UserError(f"model: the folder '{name}' holds no config.json, so it is not a transformers model.")
        return str(path)
    if path.is_file():
        raise UserError(f"model: '{name}' is a file; give the folder of a transformers model, or a .gguf file.")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"model: there is no folder '{name}'.")
    return name


def _converted_gguf(path: Path) -> Path:
    """The transformers folder of a GGUF file, made on first use and found by the file's content afterwards."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}"
    if folder.exists():
        return folder

    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf  # noqa: F401  (transformers reads GGUF files through it, and says so less clearly)
    except ImportError:
        raise UserError("model: reading .gguf files needs the package gguf: pip install 'penchant[gguf]'.") from None
    source, file_name = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file_name)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file_name, dtype=torch.float32)
    # What was loaded still counts as quantized and could not be saved: its float32 weights go into a plain model.
    settings = loaded.config.to_dict()
    del settings["quantization_config"]
    config = type(loaded.config)(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    save_model(model, tokenizer, folder)
    return folder


def _merged_adapter(folder: str) -> nn.Module:
    """The base model that a peft adapter names, with the adapter folded into its weights."""
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).merge_and_unload()


def _is_dropout(name: str, value: Any) -> bool:
    return ("dropout" in name or "pdrop" in name) and isinstance(value, float)


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

"""Loading causal language models from a folder, a hub id or a GGUF file, and saving them again."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from penchant.errors import UserError
from penchant.models.logps import evaluation_mode


def load_model_and_tokenizer(name: str, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """A causal model with float32 weights and its tokenizer, dropout off.

    Args:
        name: a local folder, a hub id, a `.gguf` file (converted once and kept in the cache folder), or a folder with
            a peft adapter (loaded on its base and merged, so that its weights are the starting point).

    Raises:
        UserError: there is no such model, it is not a causal language model, or it would need code from strangers.
    """
    try:
        path = _local_folder(name)
        with _without_bars() if Path(path).is_dir() else nullcontext():  # a download does want its bar
            is_adapter = (Path(path) / "adapter_config.json").exists()
            model, tokenizer = _merged_adapter(path) if is_adapter else (_complete_model(path), _tokenizer(path))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        where = "" if Path(name).expanduser().exists() else " is no local folder and"
        raise UserError(f"model: '{name}'{where} cannot be loaded. {_first_sentence(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model: the tokenizer of '{name}' has no end-of-sequence token, so no answer could end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    disable_dropout(model)
    model = model.to(device)
    if not _is_causal(model):
        raise UserError(f"model: '{name}' is no causal language model: its predictions depend on later tokens.")
    return model, tokenizer


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout to 0, the functional ones too, and what else is random in training: layer drop, router jitter.

    Two passes over the same pair must agree: with dropout on, policy and reference differ before the first step. Some
    attention layers read their probability from the config or keep it as a float, so modules alone are not enough.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if _is_dropout(name, value):
                setattr(module, name, 0.0)
    config = getattr(model, "config", None)
    for part in [config, config.get_text_config()] if config is not None else []:
        for name, value in vars(part).items():
            if _is_dropout(name, value):
                setattr(part, name, 0.0)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes model (or peft adapter) and tokenizer so that transformers (or peft) loads them; safetensors only.

    The folder appears whole or not at all.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with _without_bars():
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


@contextmanager
def _without_bars() -> Iterator[None]:
    """Within it, transformers shows no bars of its own for work of a second."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


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

    from transformers import AutoModelForCausalLM

    try:
        import gguf  # noqa: F401  (transformers reads GGUF files through it, and says so less clearly)
    except ImportError:
        raise UserError("model: reading .gguf files needs the package gguf: pip install 'penchant[gguf]'.") from None
    tokenizer = _tokenizer(str(path.parent), gguf_file=path.name)
    loaded = _complete_model(str(path.parent), gguf_file=path.name, **_unpacked())
    # What was loaded still counts as quantized and could not be saved: its float32 weights go into a plain model.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(loaded.config)(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    save_model(model, tokenizer, folder)
    return folder


def _unpacked() -> dict[str, Any]:
    """How to ask for plain weights: newer transformers may otherwise leave those of a GGUF file in packed blocks."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _complete_model(path: str, **where: Any) -> Any:
    """A causal model of which every weight was found: transformers alone would make up the missing ones at random."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **where
    )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"It lacks {len(missing)} of the weights of {type(model).__name__}, such as {missing[0]}.")
    return model


def _tokenizer(path: str, **where: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **where)


def _merged_adapter(folder: str) -> tuple[nn.Module, Any]:
    """The base model that a peft adapter names, with the adapter folded into its weights, and its tokenizer."""
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.peft_config["default"]
    if config.is_prompt_learning:
        raise ValueError(f"An adapter of type {config.peft_type.value} cannot be merged into its base model.")
    has_tokenizer = (Path(folder) / "tokenizer_config.json").exists()
    return model.merge_and_unload(), _tokenizer(folder if has_tokenizer else config.base_model_name_or_path)


@torch.no_grad()
def _is_causal(model: nn.Module) -> bool:
    """Whether what stands last changes nothing before it (a BERT loads as a causal model, too)."""
    ids = torch.tensor([[3, 4, 5, 1], [3, 4, 5, 2]], device=next(model.parameters()).device)
    with evaluation_mode(model):
        one, other = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def _is_dropout(name: str, value: Any) -> bool:
    return ("drop" in name or "jitter" in name) and isinstance(value, float)


def _first_sentence(error: Exception) -> str:
    return re.split(r"(?<=[.!?]) ", " ".join(str(error).split()))[0][:300]

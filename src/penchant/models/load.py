"""Loading causal language models from a folder, a hub id or a GGUF file, and saving them again."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from penchant import distributed
from penchant.errors import UserError
from penchant.models.gradient_checkpointing import layers_of
from penchant.models.logps import evaluation_mode
from penchant.models.trust import refuse_harm, refuse_old_versions
from penchant.models.weights import fill, fit, save_model, weight_files, without_bars


def load_model_and_tokenizer(name: str, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """A causal model with float32 weights and its tokenizer, dropout off.

    Where several processes work together each reads and keeps its share of the weights alone, unless they have to be
    converted on the way; then it reads them all.

    Args:
        name: a local folder, a hub id, a `.gguf` file (converted once and kept in the cache folder), or a folder with
            a peft adapter (loaded on its base and merged, so that its weights are the starting point).

    Raises:
        UserError: there is no such model, it is not a causal language model, or it would need code from strangers.
    """
    with _explained(name):
        folder = distributed.first_alone(lambda: _local_folder(name))  # with bars: this may be a download
        with without_bars():
            if _is_adapter(folder):
                model, tokenizer = _merged_adapter(folder)
            else:
                model, tokenizer = _sharded_model(folder, device) or _complete_model(folder), _tokenizer(folder)
    _require_end(tokenizer, name)
    disable_dropout(model)
    if not distributed.is_sharded(model):
        model = model.to(device)
    if not _is_causal(model):
        raise UserError(f"model: '{name}' is no causal language model: its predictions depend on later tokens.")
    return model, tokenizer


def load_tokenizer(name: str) -> Any:
    """The tokenizer alone of what `load_model_and_tokenizer` loads.

    Raises:
        UserError: there is no such model, or its tokenizer has no end token.
    """
    with _explained(name):
        folder = _local_folder(name)
        of_base = _is_adapter(folder) and not _has_tokenizer(folder)
        tokenizer = _tokenizer(_base_of(folder) if of_base else folder)
    _require_end(tokenizer, name)
    return tokenizer


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


def has_to_be_converted(name: str) -> bool:
    """Whether this is a GGUF file that has not been converted yet, which takes a minute."""
    path = Path(name).expanduser()
    return path.suffix == ".gguf" and path.is_file() and not _folder_of_gguf(path).exists()


def cache_folder() -> Path:
    """Where converted models are kept: `$PENCHANT_CACHE`, else `penchant` under the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penchant"
    return Path(os.environ.get("PENCHANT_CACHE") or default)


def _local_folder(name: str, revision: str | None = None) -> Path:
    """The folder to load `name` from, checked; what stands on the hub is fetched first."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model: there is no file '{name}'.")
        return _converted_gguf(path)
    if path.is_dir():
        if not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
            raise UserError(f"model: the folder '{name}' holds no config.json, so it is not a transformers model.")
    elif path.is_file():
        raise UserError(f"model: '{name}' is a file; give the folder of a transformers model, or a .gguf file.")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"model: there is no folder '{name}'.")
    else:
        path = _fetched(name, revision)
    refuse_harm(path)
    return path


def _fetched(hub_id: str, revision: str | None) -> Path:
    """The folder of a model from the hub: settings, words and safetensors; neither pickles nor Python come along."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
    doubled = ["*/*", "consolidated*"]  # the same weights for other programs
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted, ignore_patterns=doubled))
    except LocalEntryNotFoundError:
        raise UserError(f"model: '{hub_id}' is no local folder, and the hub cannot be reached to ask there.") from None


def _converted_gguf(path: Path) -> Path:
    """The transformers folder of a GGUF file, made on first use and found by the file's content afterwards."""
    folder = _folder_of_gguf(path)
    if folder.exists():
        return folder

    from transformers import AutoModelForCausalLM

    try:
        import gguf  # noqa: F401  (transformers reads GGUF files through it, and says so less clearly)
    except ImportError:
        raise UserError("model: reading .gguf files needs the package gguf: pip install 'penchant[gguf]'.") from None
    tokenizer = _tokenizer(path.parent, gguf_file=path.name)
    loaded = _complete_model(path.parent, gguf_file=path.name, **_unpacked())
    # What was loaded still counts as quantized and could not be saved: its float32 weights go into a plain model.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(loaded.config)(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    save_model(model, tokenizer, folder)
    return folder


def _folder_of_gguf(path: Path) -> Path:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}"


def _unpacked() -> dict[str, Any]:
    """How to ask for plain weights: newer transformers may otherwise leave those of a GGUF file in packed blocks."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _complete_model(folder: Path, **where: Any) -> Any:
    """A causal model of which every weight was found: transformers alone would make up the missing ones at random."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **where,
    )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"It lacks {len(missing)} of the weights of {type(model).__name__}, such as {missing[0]}.")
    return model


def copy_of_model(model: Any) -> nn.Module:
    """A model of the same weights that shares none of them, sharded where the other one is.

    Raises:
        UserError: it is sharded, and has an adapter or is none of transformers' models.
    """
    if not distributed.is_sharded(model):
        return copy.deepcopy(model)
    if hasattr(model, "peft_config") or not hasattr(type(model), "_from_config"):
        raise UserError("reference.kind: several processes copy plain transformers models only; say auto.")
    twin = _unfilled(lambda: type(model)._from_config(copy.deepcopy(model.config), dtype=torch.float32))
    disable_dropout(twin)
    distributed.shard(twin, layers_of(twin), next(model.parameters()).device)
    with torch.no_grad():
        for own, value in zip(twin.parameters(), model.parameters(), strict=True):
            distributed.here(own).copy_(distributed.here(value))
    return twin


def _sharded_model(folder: Path, device: torch.device | str) -> Any | None:
    """A causal model of which each process has read its share; None where there is one process, or no other way than
    to read them all."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if distributed.world().size == 1:
        return None
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    model = _unfilled(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    files = weight_files(folder)
    if not fit(files, model):
        return None
    distributed.shard(model, layers_of(model), torch.device(device))
    fill(model, files)
    if (folder / "generation_config.json").exists():
        model.generation_config = type(model.generation_config).from_pretrained(str(folder))
    return model.eval()


def empty_model(name: str, is_reward: bool = False) -> Any:
    """The model of a folder or hub id without its weights, dropout off: what it looks like.

    Raises:
        UserError: there is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    with _explained(name):
        folder = _local_folder(name)
        config = AutoConfig.from_pretrained(str(_base_of(folder) if _is_adapter(folder) else folder))
        if is_reward:
            config.num_labels = 1
        family = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
        model = _unfilled(lambda: family.from_config(config, dtype=torch.float32))
    disable_dropout(model)
    return model


def _unfilled(make: Callable[[], Any]) -> Any:
    """A model whose weights nobody has touched: until somebody does they take no memory."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = make()
    model.tie_weights()
    return model


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Within it, whatever keeps a model from being loaded becomes a UserError."""
    refuse_old_versions()
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError, SafetensorError) as error:
        where = "" if Path(name).expanduser().exists() else " is no local folder and"
        raise UserError(f"model: '{name}'{where} cannot be loaded. {_reason(error)}") from error


def _require_end(tokenizer: Any, name: str) -> None:
    if tokenizer.eos_token_id is None:
        raise UserError(f"model: the tokenizer of '{name}' has no end-of-sequence token, so no answer could end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").exists()


def _tokenizer(folder: Path, **where: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **where)


def _merged_adapter(folder: Path) -> tuple[nn.Module, Any]:
    """The base model that a peft adapter names, with the adapter folded into its weights, and its tokenizer.

    The base comes in by the same door as any other model; peft's own way would import what the adapter asks for.
    """
    from peft import PeftModel

    base_folder = _base_of(folder)
    tokenizer = _tokenizer(folder if _has_tokenizer(folder) else base_folder)
    base = _complete_model(base_folder)
    if len(tokenizer) > base.get_input_embeddings().num_embeddings:  # the adapter brings new words
        base.resize_token_embeddings(len(tokenizer))
    merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    return merged.requires_grad_(True), tokenizer  # peft has frozen the base, which is what will be trained


def _base_of(adapter: Path) -> Path:
    """The folder of the base model that a peft adapter names."""
    from peft import PeftConfig, PeftType

    config = PeftConfig.from_pretrained(str(adapter))
    if config.is_prompt_learning or config.peft_type == PeftType.XLORA:
        raise ValueError(f"An adapter of type {config.peft_type.value} cannot be merged into its base model.")
    if not config.base_model_name_or_path:
        raise ValueError("Its adapter_config.json names no base model.")
    folder = _local_folder(config.base_model_name_or_path, config.revision)
    if _is_adapter(folder):
        raise ValueError(f"Its base '{folder}' is an adapter, too; merge that one first.")
    return folder


@torch.no_grad()
def _is_causal(model: nn.Module) -> bool:
    """Whether what stands last changes nothing before it (a BERT loads as a causal model, too)."""
    ids = torch.tensor([[3, 4, 5, 1], [3, 4, 5, 2]], device=next(model.parameters()).device)
    with evaluation_mode(model):
        one, other = distributed.within(model, lambda: model(input_ids=ids, use_cache=False).logits)[:, :-1]
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def _is_dropout(name: str, value: Any) -> bool:
    return ("drop" in name or "jitter" in name) and isinstance(value, float)


def _reason(error: Exception) -> str:
    """The first sentence of an error from below, or ours where theirs advises to run code from strangers."""
    if "trust_remote_code" in str(error):
        return "It needs Python code that comes with it, and Penchant runs no code from strangers."
    return re.split(r"(?<=[.!?]) ", " ".join(str(error).split()))[0][:300]

"""Fingerprints: which weights, which tokenizer and which chat template a run began from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from penchant import distributed
from penchant.models.attention import IMPLEMENTATION

_NO_NUMBERS = {
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict"),
    *("output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type"),
}
"""Keys of a model's config that change none of its numbers; the weights tell their own type."""


def weights_sha256(model: nn.Module) -> str:
    """Hash of all parameters by name: says which weights a run began from."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        full = distributed.whole(parameter.detach())  # one after another, so that no process holds them all
        digest.update(full.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def architecture_sha256(model: nn.Module) -> str | None:
    """Hash of all that a model's log-probabilities depend on beside its weights, or None where not all can be seen.

    That is the release of transformers, the config but for names, paths and flags, the classes of all modules and the
    numbers that they hold, the buffers (rotary frequencies), and the types of the weights. What runs code of others'
    (also by hooks, or by an adapter) or computes in float64 cannot be seen: log-probabilities are kept as float32.
    """
    import transformers

    config: Any = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    if attention in (None, IMPLEMENTATION):  # ours hides which one it stands for
        return None
    if not all(map(_is_plain, model.modules())) or any(p.dtype == torch.float64 for p in model.parameters()):
        return None
    parts = {
        "transformers": transformers.__version__,
        "config": _numbers_of(json.loads(config.to_json_string(use_diff=False))),
        "attention": attention,
        "modules": [
            (name, str(distributed.plain_class(module)), _own_numbers(module)) for name, module in model.named_modules()
        ],
        "buffers": {name: _content_sha256(buffer) for name, buffer in model.named_buffers()},
        "weights": {name: (str(weight.dtype), weight.shape) for name, weight in model.named_parameters()},
    }
    return _json_sha256(parts)


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of what turns text into ids: normaliser, vocabulary, merges, added tokens, first and last token.

    How a tokenizer was last told to truncate and pad is left out, and so is the token that fills up: no id that a
    model learns from depends on them. The chat template has a fingerprint of its own.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:  # a tokenizer written in Python keeps its rules in code, so its class stands for them
        added = {str(place): repr(token) for place, token in tokenizer.added_tokens_decoder.items()}
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "added": added}
    return _json_sha256([rules, tokenizer.bos_token_id, tokenizer.eos_token_id])


def template_sha256(tokenizer: Any) -> str | None:
    """Hash of the chat template, or None where there is none."""
    template = tokenizer.chat_template
    if template is None:
        return None
    if isinstance(template, str):
        return hashlib.sha256(template.encode("utf-8", errors="surrogatepass")).hexdigest()
    return _json_sha256(template)  # several templates by name


def _is_plain(module: nn.Module) -> bool:
    """Whether a module runs the code of transformers or torch and no other."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    has_hooks = any(not distributed.is_hook_of_shards(hook) for hook in hooks)
    is_theirs = distributed.plain_class(module).__module__.partition(".")[0] in ("torch", "transformers")
    return is_theirs and not (has_hooks or "forward" in vars(module))


def _numbers_of(settings: Any) -> Any:
    """Settings without the keys that change no number, also within the parts of a config."""
    if not isinstance(settings, dict):
        return settings
    return {name: _numbers_of(value) for name, value in settings.items() if name not in _NO_NUMBERS}


def _own_numbers(module: nn.Module) -> dict[str, int | float]:
    """The numbers that a module keeps as attributes: epsilons, scales, windows."""
    return {name: value for name, value in vars(module).items() if type(value) in (int, float)}


def _content_sha256(tensor: Tensor) -> str:
    exact = tensor.detach().cpu()
    exact = exact.double() if exact.is_floating_point() else exact  # numpy knows no bfloat16
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + exact.numpy().tobytes()).hexdigest()


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

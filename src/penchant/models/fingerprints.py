"""Fingerprints: which weights, which tokenizer and which chat template a run began from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn


def weights_sha256(model: nn.Module) -> str:
    """Hash of all parameters by name: says which weights a run began from."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


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


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

"""The seed that the completions of a prompt are sampled with."""

from __future__ import annotations

import hashlib
import json

from penchant.examples import Text


def prompt_seed(seed: int, prompt: Text) -> int:
    """A number below 2^63 that depends on the run's seed and on what stands in the prompt, and on nothing else.

    So the samples of a prompt are the same in whatever file, order and company it comes.
    """
    plain = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    content = json.dumps([seed, plain], sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1

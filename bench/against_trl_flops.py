"""The arithmetic that training on pairs cannot do without, and how fast the machine multiplies matrices of its shapes.

Of P, C and R tokens (prompt, chosen, rejected) of one pair, Nb parameters in the matrices of the layers, Nh in the
head, with the reference's log-probabilities known:

    matrices    6 Nb (P + C + R)       forward 2, backward 4 operations per weight and token; each prompt once
    head        6 Nh (C + R)           only where a completion's token is predicted
    attention   12 L W S               L layers of W = heads x head size; S keys, summed over all queries: the prompt
                                       sees itself, each completion the prompt and itself; two products forward (q k
                                       and p v, 2 operations each) and twice that backward

The time that this would take at the rate of bare products, over the time that a side took, is the share of the machine
that it put to use. Attention is counted at the rate of the layers' products.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from against_trl_sides import Job

REPEATS = 5


@dataclass(frozen=True)
class Products:
    """A model's matrices and how fast this machine multiplies by them: forward, and both products backward."""

    body_parameters: int
    head_parameters: int
    attention_parameters: int
    """Layers times heads times head size: L W."""
    body_rate: float
    """Operations a second."""
    head_rate: float

    def least_seconds(self, lengths: Iterable[tuple[int, int, int]]) -> float:
        """How long one pass over pairs of (P, C, R) tokens takes if nothing but the necessary products took time."""
        body = head = 0
        for prompt, chosen, rejected in lengths:
            body += 6 * self.body_parameters * (prompt + chosen + rejected)
            body += 12 * self.attention_parameters * num_keys(prompt, chosen, rejected)
            head += 6 * self.head_parameters * (chosen + rejected)
        return body / self.body_rate + head / self.head_rate


def num_keys(prompt: int, chosen: int, rejected: int) -> int:
    """Keys that the queries of a pair look at, each prompt computed once."""
    own = sum(length * (length + 1) // 2 for length in (prompt, chosen, rejected))
    return own + prompt * (chosen + rejected)


def measure_products(job: Job) -> dict[str, Any]:
    """Multiplies matrices of the model's own shapes, as many rows at once as Penchant's microbatches have."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from penchant.training.hardware import default_microbatch_tokens

    config = AutoConfig.from_pretrained(job.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    body = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    head_shape = tuple(head.weight.shape)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    device, dtype = torch.device(job.device), torch.bfloat16 if job.precision == "bf16" else torch.float32
    rows = default_microbatch_tokens(device)
    return {
        "body_parameters": sum(out * size for out, size in body),
        "head_parameters": head_shape[0] * head_shape[1],
        "attention_parameters": config.num_hidden_layers * config.num_attention_heads * width,
        "body_rate": _rate(body, rows, device, dtype),
        "head_rate": _rate([head_shape], rows, device, dtype),
    }


def _rate(shapes: list[tuple[int, int]], rows: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of x W', dy W and dy' x, for every matrix in turn; of some passes the median."""
    import torch

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    # As many as the model has: a single one would stay in the processor's cache, which cannot hold them all.
    matrices = [random(*shape) for shape in shapes]
    of_width = {size: random(rows, size) for shape in shapes for size in shape}
    seconds = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        for matrix in matrices:
            dy, x = (of_width[size] for size in matrix.shape)
            _ = x @ matrix.T, dy @ matrix, dy.T @ x
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 6 * rows * sum(out * size for out, size in shapes) / statistics.median(seconds[1:])

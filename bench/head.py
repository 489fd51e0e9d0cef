"""Completion-only, chunked head against logits for every position: time and peak memory of one gradient, side by side.

Both sides compute the same numbers on the same random model (SmolLM2-135M's shape, fewer layers) and the same batch;
each measurement is a process of its own, the sides take turns, and medians are printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time


def measure(side: str, layers: int, pairs: int) -> dict[str, float]:
    """Seconds of one gradient (best of three), peak memory, and the summed log-probabilities as a check."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from penchant.layouts.padded import collate
    from penchant.models.logps import token_logps
    from penchant.types import TokenizedExample

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(10, 40000, (pairs, 210)).tolist()
    batch = collate([TokenizedExample(row[:120], (row[120:160], row[160:210]), i) for i, row in enumerate(ids)])

    def penchant() -> torch.Tensor:
        return token_logps(model, batch).logps.sum()

    def full_logits() -> torch.Tensor:
        logits = model(**batch.model_inputs, use_cache=False).logits.float().log_softmax(-1)
        return logits.flatten(0, 1)[batch.hidden_rows, batch.target_ids].sum()

    total = penchant if side == "penchant" else full_logits
    seconds = []
    for _ in range(3):
        model.zero_grad()
        started = time.perf_counter()
        value = total()
        value.backward()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": min(seconds), "peak_bytes": peak, "value": value.item()}


def main() -> None:
    """Runs both sides in turn and prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=("penchant", "full_logits"), help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.layers, options.pairs)))
        return
    found: dict[str, list[dict[str, float]]] = {"full_logits": [], "penchant": []}
    for _ in range(options.rounds):
        for side, results in found.items():
            command = [sys.executable, __file__, "--side", side, "--layers", str(options.layers)]
            command += ["--pairs", str(options.pairs)]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    median = {
        side: {name: statistics.median(result[name] for result in results) for name in results[0]}
        for side, results in found.items()
    }
    difference = abs(median["penchant"]["value"] / median["full_logits"]["value"] - 1)
    if difference > 1e-5:
        sys.exit(f"the two sides disagree: {median}")
    print("| side | s a gradient | peak memory, GiB |\n|---|---|---|")
    for side, values in median.items():
        print(f"| {side} | {values['seconds']:.2f} | {values['peak_bytes'] / 2**30:.2f} |")
    time_ratio = median["full_logits"]["seconds"] / median["penchant"]["seconds"]
    memory_ratio = median["full_logits"]["peak_bytes"] / median["penchant"]["peak_bytes"]
    print(f"\n{time_ratio:.2f}x faster, {memory_ratio:.2f}x less memory; same sums to {difference:.0e}")


if __name__ == "__main__":
    main()

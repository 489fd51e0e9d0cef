"""Sampling with prompts shared against transformers' own `generate`: seconds, tokens per second and their ratio.

Both sides sample at temperature 1 from the same model in the same process, in turn, and medians are printed. On a busy
machine `--threads 1 --processor-time` still compares them fairly. Unless it
says "natural ends", every completion is forced to the same length. Transformers pads prompts on the left and repeats
them for their samples, as its `num_return_sequences` does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from penchant.models.generation import Generated, Sampling, generate
from penchant.scoring.policy import Policy

TEXT = (
    "The river had carried the town for two hundred years, and the town had never thanked it. Barges came in spring "
    "with grain and went in autumn with cloth; in between there were children on the banks, a ferry that ran when the "
    "ferryman was sober, and an old argument about a bridge. Those who wanted it pointed at the price of bread. Those "
    "who did not spoke of their grandfathers, of floods, and of what a road brings besides bread. "
)

CASES = {
    # name: prompts, tokens of the shortest and the longest prompt, samples of each, new tokens, ends by itself
    "32 short prompts x 1": (32, 12, 40, 1, 64, False),
    "16 prompts of 100 x 4": (16, 80, 120, 4, 64, False),
    "4 prompts of 800 x 8": (4, 700, 900, 8, 64, False),
    "16 prompts of 100 x 4, natural ends": (16, 80, 120, 4, 128, True),
}


def make_prompts(tokenizer: Any, number: int, shortest: int, longest: int) -> list[list[int]]:
    """Cuts of one text, of lengths spread evenly and in no order."""
    ids = tokenizer(TEXT * 40).input_ids
    lengths = [shortest + (longest - shortest) * (7 * i % number) // max(1, number - 1) for i in range(number)]
    return [ids[13 * i : 13 * i + length] for i, length in enumerate(lengths)]


def by_penchant(policy: Policy, prompts: list[list[int]], num_samples: int, length: int, ends: set[int]) -> int:
    """Samples; how many tokens they have."""
    samples: list[list[Generated]] = generate(
        policy.model, prompts, Sampling(max_new_tokens=length), num_samples, range(len(prompts)), ends
    )
    return sum(len(sample.ids) for group in samples for sample in group)


@torch.no_grad()
def by_transformers(policy: Policy, prompts: list[list[int]], num_samples: int, length: int, ends: set[int]) -> int:
    """Samples; how many tokens they have."""
    model: Any = policy.model
    policy.tokenizer.padding_side = "left"
    inputs = policy.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    output = model.generate(
        **inputs.to(policy.device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        num_return_sequences=num_samples,
        max_new_tokens=length,
        min_new_tokens=None if ends else length,
        eos_token_id=sorted(ends) if ends else None,
        pad_token_id=policy.tokenizer.pad_token_id,
    )
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    return sum(next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids)) for ids in answers)


def seconds_and_tokens(clock: Callable[[], float], side: Callable[..., int], *arguments: Any) -> tuple[float, int]:
    """How long one side takes, and for how many tokens."""
    started = clock()
    tokens = side(*arguments)  # ends with numbers on the host, so a device has done its work
    return clock() - started, tokens


def main() -> None:
    """Runs both sides in turn and prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder, hub id or .gguf file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true", help="count the seconds of the processor")
    parser.add_argument("--small", action="store_true", help="fewer prompts and tokens, one round")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.processor_time else time.perf_counter
    policy = Policy.from_pretrained(options.model, options.device, options.precision)
    sides = {"transformers": by_transformers, "penchant": by_penchant}
    print(f"{'':38} {'transformers':>22} {'penchant':>22}   ratio of tokens/s")
    for name, (number, shortest, longest, num_samples, length, by_itself) in CASES.items():
        if options.small:
            number, length = max(2, number // 4), 16
        prompts = make_prompts(policy.tokenizer, number, shortest, longest)
        ends = {policy.tokenizer.eos_token_id} if by_itself else set()
        measured: dict[str, list[tuple[float, int]]] = {side: [] for side in sides}
        with policy._arithmetic():
            by_penchant(policy, prompts[:1], 1, 1, ends)  # the first call holds the model against itself
            for _ in range(1 if options.small else options.rounds):
                for side, function in sides.items():
                    found = seconds_and_tokens(clock, function, policy, prompts, num_samples, length, ends)
                    measured[side].append(found)
        seconds = {side: statistics.median(each[0] for each in found) for side, found in measured.items()}
        speeds = {side: statistics.median(each[1] / each[0] for each in found) for side, found in measured.items()}
        cells = " ".join(f"{seconds[side]:9.2f} s {speeds[side]:7.0f} t/s" for side in sides)
        print(f"{name:38} {cells}   {speeds['penchant'] / speeds['transformers']:.2f}", flush=True)


if __name__ == "__main__":
    main()

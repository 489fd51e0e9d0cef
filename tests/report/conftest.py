"""A run directory as a real run leaves it, made from closed-form curves."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

QUESTIONS = ("What is the capital of France?", "Why is the sky blue?", "Name three fruits.", "How do I boil an egg?")
DPO = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}
IPO = {"name": "ipo", "beta": 0.1}
MakeOne = Callable[..., Path]
SHORT = ("Paris.", "Air scatters blue light more than red.", "Apple, pear, plum.", "Eight minutes in boiling water.")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def training_line(step: int, num_steps: int, random_: random.Random, spread: float = 1.0) -> dict[str, Any]:
    def noise(deviation: float) -> float:
        return random_.gauss(0, spread * deviation)

    done = step / num_steps
    margin = 2.4 * (1 - math.exp(-3 * done)) + noise(0.25)
    return {
        "step": step,
        "epoch": round(3 * done, 3),
        "time_s": 1.3 * step,
        "loss": math.log1p(math.exp(-margin)),
        "rewards/chosen": -0.6 * done + noise(0.1),
        "rewards/rejected": -0.6 * done - margin,
        "rewards/accuracies": min(1.0, 0.5 + 0.45 * (1 - math.exp(-4 * done)) + noise(0.06)),
        "rewards/margins": margin,
        "logps/chosen": -120 - 6 * done + noise(4),
        "logps/rejected": -150 - 10 * margin + noise(4),
        "kl": 0.12 * done + abs(noise(0.008)),
        "entropy": 1.4 - 0.3 * done + noise(0.02),
        "length/chosen": 42 + noise(5),
        "length/rejected": 61 + noise(5),
        "grad_norm": 9 * math.exp(-2 * done) + abs(noise(1.5)),
        "learning_rate": 1e-5 * min(1.0, 10 * done) * (1 - done),
        "tokens_per_s": 812.5 + noise(20),
    }


def held_out_line(step: int, num_steps: int) -> dict[str, Any]:
    line = training_line(step, num_steps, random.Random(step), spread=0.2 if step else 0.0)
    for name in ("grad_norm", "learning_rate", "tokens_per_s"):
        del line[name]
    keep = ("step", "epoch", "time_s")
    return {name if name in keep else f"eval_{name}": value for name, value in line.items()}


def metric_lines(num_steps: int, eval_every: int) -> list[dict[str, Any]]:
    noise = random.Random(7)
    lines = [held_out_line(0, num_steps)]
    for step in range(1, num_steps + 1):
        lines.append(training_line(step, num_steps, noise))
        if step % eval_every == 0:
            lines.append(held_out_line(step, num_steps))
    return lines


def findings(path: str, used: int) -> dict[str, Any]:
    return {
        "path": path,
        "unit": "pair",
        "rows": used + 9,
        "families": {"prompt/chosen/rejected": used, "conversations": 9},
        "used": used,
        "dropped": {"chosen and rejected are the same": 6, "prompt longer than max_length": 3},
        "examples": ["pairs.jsonl:17: chosen and rejected are the same", "pairs.jsonl:80: the prompt has 2,310 tokens"],
        "lengths": {
            "prompt": {"mean": 31.4, "median": 27, "max": 160},
            "chosen": {"mean": 42.1, "median": 38, "max": 210},
            "rejected": {"mean": 61.8, "median": 57, "max": 333},
        },
        "longer_wins": 0.446,
    }


def summary() -> dict[str, Any]:
    return {
        "status": "finished",
        "method": "dpo",
        "loss": {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0},
        "loss_doc": "Direct Preference Optimization: -log sigmoid(beta h), h the difference of the two log-ratios.",
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "model_sha256": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
        "reference": "A frozen copy of the model as it was at the start.",
        "layout": "Packed rows of 2,048 tokens, because lengths differ a lot.",
        "device": "cpu",
        "dtype": "float32",
        "num_parameters": 134_515_008,
        "num_trainable": 134_515_008,
        "steps": 120,
        "examples_seen": 960,
        "started": "2026-03-01T09:30:00+00:00",
        "wall_s": 412.7,
        "peak_memory_bytes": 3_400_000_000,
        "tokens_per_s": 812.5,
        "versions": {"torch": "2.13.0", "penchant": "0.1.0", "transformers": "5.3.0", "python": "3.11.7"},
        "data_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    }


def pair_lines() -> list[dict[str, Any]]:
    noise = random.Random(3)
    lines = []
    for i in range(400):
        chosen, rejected = noise.gauss(-0.5, 0.8), noise.gauss(-2.6, 1.3)
        question, short = QUESTIONS[i % 4], SHORT[i % 4]
        lines.append(
            {
                "source": f"pairs.jsonl:{i + 1}",
                "prompt": question,
                "chosen": short,
                "rejected": f"That is a great question! {short} There is much more to say about it. " * 2,
                "chosen_reward": chosen,
                "rejected_reward": rejected,
                "chosen_length": 12,
                "rejected_length": 48,
                "split": "eval" if i % 4 == 0 else "train",
            }
        )
    return lines


def sample_lines() -> list[dict[str, Any]]:
    return [
        {"prompt": question, "before": f"Great question! {short} " * 6, "after": short, "chosen": short}
        for question, short in zip(QUESTIONS, SHORT, strict=True)
    ]


def parts_of_a_run(num_steps: int = 120, eval_every: int = 20) -> dict[str, Any]:
    return {
        "run.yaml": "model: HuggingFaceTB/SmolLM2-135M-Instruct\nmethod: dpo\nbeta: 0.1\n",
        "metrics.jsonl": metric_lines(num_steps, eval_every),
        "events.jsonl": [
            {"step": 0, "severity": "info", "code": "layout", "message": "Rows are packed: lengths differ a lot."},
            {"step": 60, "severity": "warn", "code": "kl-high", "message": "KL is above 0.1 nats per token."},
        ],
        "samples.jsonl": sample_lines(),
        "pairs.jsonl": pair_lines(),
        "data.json": {
            "train": findings("/home/ada/data/pairs.jsonl", 300),
            "eval": findings("/home/ada/data/held.jsonl", 96),
        },
        "summary.json": summary(),
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Makes a complete run directory; a part given by its file name replaces that part, None leaves it out."""

    def make(parts: Mapping[str, Any] | None = None, **size: int) -> Path:
        run_dir = tmp_path / "smollm2-concise"
        run_dir.mkdir()
        for name, content in {**parts_of_a_run(**size), **(parts or {})}.items():
            if isinstance(content, str):
                (run_dir / name).write_text(content, encoding="utf-8")
            elif name.endswith(".jsonl") and content is not None:
                write_jsonl(run_dir / name, content)
            elif content is not None:
                write_json(run_dir / name, content)
        return run_dir

    return make


def held_out(step: int, accuracy: float, **more: float) -> dict[str, Any]:
    line = {"rewards/accuracies": accuracy, "rewards/chosen": 0.0, "rewards/rejected": 0.0, **more}
    return {"step": step, **{f"eval_{name}": value for name, value in line.items()}}


@pytest.fixture
def make_one(tmp_path: Path) -> MakeOne:
    """Makes a small run directory; settings go into the run file, `summary` and `data` over what is there."""

    def make(
        name: str,
        accuracy: float | None = 0.875,
        *,
        loss: dict[str, Any] = DPO,
        method: str = "dpo",
        before: dict[str, Any] | None = None,
        after: dict[str, float] | None = None,
        summary: dict[str, Any] | None = None,
        train_data: dict[str, Any] | None = None,
        held_out_data: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Path:
        run_dir = tmp_path / name
        run_dir.mkdir(parents=True)
        run = {"model": "owner/tiny", "data": "pairs.jsonl", "output_dir": str(run_dir), "method": method, "loss": loss}
        run |= {"learning_rate": 5e-7, "batch_size": 8, "seed": 0, "logging_steps": 1, **settings}
        (run_dir / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
        lines = [before or held_out(0, 0.5)]
        lines += [] if accuracy is None else [held_out(20, accuracy, **(after or {}))]
        write_jsonl(run_dir / "metrics.jsonl", lines)
        evaluated = {"unit": "pair", "used": 96, "longer_wins": 0.3, "sha256": "e" * 64, **(held_out_data or {})}
        trained = {"path": "pairs.jsonl", "unit": "pair", "families": {"trl": 256}, "used": 160, "sha256": "t" * 64}
        write_json(run_dir / "data.json", {"train": {**trained, **(train_data or {})}, "eval": evaluated})
        told = {"status": "finished", "method": method, "loss": loss, "steps": 20, "examples_seen": 160}
        told |= {"wall_s": 250.0, "peak_memory_bytes": 3 * 2**30, "model_sha256": "m" * 64, **(summary or {})}
        write_json(run_dir / "summary.json", told)
        return run_dir

    return make

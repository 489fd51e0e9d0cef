"""Several processes do what one does: the same losses, the same weights, the same order of examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ..conftest import make_tiny_model
from .several import together, train_all
from .test_run import rows, single_rows, write_rows

LAYOUTS = ("padded", "packed", "prefix_shared")
KINDS: dict[str, dict[str, Any]] = {
    "paired, copy": {"method": "dpo", "reference": {"kind": "copy"}},
    "paired, cached": {"method": "dpo", "reference": {"kind": "precomputed"}},
    "paired, another model": {"method": "ipo", "reference": {"kind": "model", "model": "OTHER"}},
    "paired, adapter off": {"method": "dpo", "lora": {"rank": 4}, "learning_rate": 1e-2},
    "reference-free": {"method": "orpo"},
    "unpaired, copy": {"method": "kto", "reference": {"kind": "copy"}},
    "unpaired, adapter off": {"method": "bco", "lora": {"rank": 4}, "learning_rate": 1e-2},
    "reward model": {"method": "reward"},
}


@pytest.fixture(scope="module")
def shelf(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models and data of very different lengths."""
    folder = tmp_path_factory.mktemp("shelf")
    for name, seed in (("model", 0), ("other", 1)):
        make_tiny_model(seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    long = {"prompt": "one two three " * 20, "chosen": "the cat " * 9, "rejected": "a dog"}
    short = {"prompt": "what", "chosen": "cat", "rejected": "dog"}
    write_rows(folder / "pairs.jsonl", [*rows(11), long, short])
    write_rows(folder / "singles.jsonl", single_rows(13))
    return folder


def run_on(shelf: Path, kind: str, layout: str, run_dir: Path, **more: Any) -> dict[str, Any]:
    """What `penchant.train` is given for a run of a kind."""
    settings = json.loads(json.dumps(KINDS[kind]).replace("OTHER", str(shelf / "other")))
    data = "singles" if kind.startswith("unpaired") else "pairs"
    return {
        "model": str(shelf / "model"),
        "data": str(shelf / f"{data}.jsonl"),
        "layout": layout,
        "output_dir": str(run_dir),
        "batch_size": 4,
        "num_train_epochs": 5,
        "eval_size": 2,
        "num_samples": 0,
        "logging_steps": 1,
        "learning_rate": 3e-3,
        "microbatch_tokens": 40,
        "quiet": True,
        **settings,
        **more,
    }


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    clocks = {"time_s", "tokens_per_s"}
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in clocks} for record in records]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*model*.safetensors")):
        weights |= load_file(file)
    return weights


def distance(one: Path, other: Path) -> float:
    """Between the trained weights of two runs, relative."""
    ours, theirs = weights_of(one / "model"), weights_of(other / "model")
    assert ours.keys() == theirs.keys() and ours
    off = sum((ours[name] - theirs[name]).double().square().sum() for name in ours)
    size = sum(value.double().square().sum() for value in ours.values())
    return float((off / size).sqrt())


def test_the_numbers_are_those_of_one_process(shelf: Path, tmp_path: Path) -> None:
    worst = {}
    cases = [(kind, layout) for layout in LAYOUTS for kind in KINDS]
    for number in (1, 2, 4):
        runs = [run_on(shelf, kind, layout, tmp_path / str(number) / f"{kind} {layout}") for kind, layout in cases]
        import time
        t=time.time()
        together(number, train_all, runs, said_in=tmp_path / str(number))
        print(number, time.time()-t)
    for kind, layout in cases:
        one, two, four = (tmp_path / str(number) / f"{kind} {layout}" for number in (1, 2, 4))
        for other in (two, four):
            gap=0
            for a,b in zip(metrics_of(one),metrics_of(other),strict=True):
                assert a.keys()==b.keys()
                for k in a:
                    if a[k] is None: assert b[k] is None; continue
                    gap=max(gap,abs(a[k]-b[k])/max(1,abs(a[k])))
            worst[kind,layout,other.parent.name]=(gap,distance(one,other))
    for k,v in worst.items(): print(k,v)

"""Several processes on this machine that work as one, as torchrun would start them, forked within milliseconds."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from penchant.disk import append_json_line

from ..conftest import make_tiny_model
from .test_run import rows, single_rows, write_rows

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "peft", "transformers.models.llama", "penchant.training.run"])

MOST_SECONDS = 300.0
"""How long processes may take before they count as hanging."""


def together(number: int, work: Callable[..., None], *arguments: Any, said_in: Path) -> list[str]:
    """Does `work(*arguments)` in so many processes, which find the environment that torchrun gives them.

    Returns:
        What each of them said, on both streams. All have ended well.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said_in.mkdir(parents=True, exist_ok=True)
    processes = [
        _FORKS.Process(target=_live, args=(rank, number, port, said_in / f"{rank}.txt", work, arguments))
        for rank in range(number)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(MOST_SECONDS)
    for process in processes:
        if process.is_alive():
            process.kill()
    said = [(said_in / f"{rank}.txt").read_text() for rank in range(number)]
    codes = [process.exitcode for process in processes]
    assert codes == [0] * number, f"exit codes {codes}\n" + "\n".join(text[-4000:] for text in said)
    return said


def train_all(runs: Sequence[dict[str, Any]]) -> None:
    """Trains one model after another; in a process that may be one of several."""
    import penchant
    from penchant import distributed

    with distributed.joined():
        for run in runs:
            penchant.train(**run)


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


def make_shelf(folder: Path, tokenizer: Any) -> Path:
    """Fills a folder with two models, data of very different lengths, and rules."""
    for name, seed in (("model", 0), ("other", 1)):
        make_tiny_model(seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    long = {"prompt": "one two three " * 20, "chosen": "the cat " * 9, "rejected": "a dog"}
    short = {"prompt": "what", "chosen": "cat", "rejected": "dog"}
    write_rows(folder / "pairs.jsonl", [*rows(13), long, short])
    write_rows(folder / "others.jsonl", rows(15, seed=9))
    write_rows(folder / "singles.jsonl", single_rows(15))
    (folder / "rule.py").write_text("def score(prompt, completions):\n    return [len(text) for text in completions]\n")
    (folder / "noting.py").write_text(
        "import os\n\ndef score(prompt, completions):\n"
        f"    with open({str(folder / 'asked.txt')!r}, 'a') as file:\n        print(os.getpid(), file=file)\n"
        "    return [len(text) for text in completions]\n"
    )
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
        "learning_rate": 1e-3,
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
    assert ours.keys() == theirs.keys()
    assert ours
    off = sum((ours[name] - theirs[name]).double().square().sum() for name in ours)
    size = sum(value.double().square().sum() for value in ours.values())
    return float((off / size).sqrt())


def assert_same_course(one: Path, other: Path) -> None:
    """Both runs logged the same numbers, to 1e-5, and ended with the same weights."""
    ours, theirs = metrics_of(one), metrics_of(other)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.keys() == its.keys()
        for name, value in mine.items():
            # A correlation of rewards that are hardly more than rounding is that of the rounding.
            within = 1e-3 if name.endswith("correlation") else 1e-5
            assert its[name] == (None if value is None else pytest.approx(value, rel=within, abs=within)), (name, mine)
    assert distance(one, other) < 1e-5


def train_from_to(run: dict[str, Any], last_step: int | None, drawn: Path) -> None:
    """Trains until somebody sends the last process a SIGTERM behind a step; notes what is drawn."""
    import penchant
    from penchant import distributed
    from penchant.training.loop import Training

    take_step = Training._step

    def noting(training: Training, draw: Any) -> str:
        said = take_step(training, draw)
        me = distributed.world()
        if me.is_first:
            append_json_line(drawn, {"drawn": [example.index for example in draw.examples]})
        if training.progress.step == last_step and me.rank == me.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return said

    Training._step = noting  # type: ignore[method-assign]
    result = penchant.train(**run)
    assert result.summary["status"] == ("finished" if last_step is None else "interrupted")


def _live(
    rank: int, number: int, port: int, said_in: Path, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    with said_in.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    work(*arguments)

"""Runs to strike: two dozen steps on a tiny model, of every kind that keeps its state differently."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penchant.disk import read_json_lines, sha256_of
from penchant.watch import DETECTORS

from ..training.test_run import rows, single_rows, write_rows
from .nursery import Command, Fault

STEPS = 24

_BY_STEPS = "--save_steps 3 --logging_steps 2"
_JUDGED = "--judge.name rule --judge.function RULE:score --sampling.max_new_tokens 6 --sampling.batch_size 20"
KINDS = {
    "dpo": f"--method dpo --microbatch_tokens 60 {_BY_STEPS}",
    "kto": f"--method kto --microbatch_tokens 60 {_BY_STEPS}",
    "dpo, lora": f"--method dpo --lora.rank 4 --microbatch_tokens 60 {_BY_STEPS}",
    "ipo, best kept": f"--method ipo --save_best true --keep_checkpoints 1 --optimizer rmsprop {_BY_STEPS}",
    "dpo, saved by the clock": "--method dpo --microbatch_tokens 60 --save_minutes 0.001 --logging_steps 3",
    "online-dpo": f"--method online-dpo --online.rounds 24 --num_train_epochs 1 {_JUDGED} {_BY_STEPS}",
    "sppo": f"--method sppo --online.rounds 3 --num_train_epochs 2 {_JUDGED} {_BY_STEPS}",
}
"""Kind -> its options. Metrics are averaged over steps that a checkpoint may part."""

_COMMON = (
    f"--batch_size 6 --num_train_epochs {STEPS // 4} --eval_steps 7 --learning_rate 3e-3 "
    "--num_samples 2 --sample_max_new_tokens 4"
)

_TEXTS = ("pairs.jsonl", "samples.jsonl", "answers.jsonl")
_CLOCKS = {"time_s", "tokens_per_s"}


class Workshop:
    """Where runs are begun, struck and begun again: model, data and a folder for each run."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._model = model
        self._pairs = write_rows(folder / "pairs.jsonl", rows(24))
        self._singles = write_rows(folder / "singles.jsonl", single_rows(24))
        self._heldout = write_rows(folder / "heldout.jsonl", rows(4, seed=1))
        self._rule = folder / "rule.py"
        self._rule.write_text("def score(prompt, completions):\n    return [len(text) for text in completions]\n")
        self._commands: list[Command] = []
        self._whole: dict[str, Path] = {}
        self.whole_s: dict[str, float] = {}
        """Seconds that the undisturbed run of a kind took."""

    def run_dir(self, name: str) -> Path:
        """The directory of a run of this name."""
        return self._folder / name

    def train(self, kind: str, run_dir: Path, *more: str) -> list[str]:
        """The words that begin a run of a kind, or go on with it."""
        data = self._singles if "kto" in kind else self._pairs
        return [
            *("train", "--model", str(self._model), "--data", data, "--eval_data", self._heldout),
            *_COMMON.split(),
            *KINDS[kind].replace("RULE", str(self._rule)).split(),
            *("--output_dir", str(run_dir)),
            # Else what the first run read and computed would serve all, and no fault could meet it.
            *("--reference.cache", str(run_dir.parent / "logps" / run_dir.name)),
            *("--data_cache", str(run_dir.parent / "tokens" / run_dir.name)),
            *more,
        ]

    def again(self, kind: str, run_dir: Path, dice: random.Random) -> list[str]:
        """The words that go on with a run after a fault: those that began it, or `resume`.

        A finished run, of which only the pages may be missing, is not begun twice.
        """
        is_finished = summary_of(run_dir).get("status") == "finished"
        if is_finished or ((run_dir / "run.yaml").exists() and dice.random() < 0.5):
            return ["resume", str(run_dir)]
        return self.train(kind, run_dir)

    def start(self, words: Sequence[str], *faults: Fault, cwd: Path | None = None) -> Command:
        """Starts a command in a process of its own."""
        said_in = self._folder / f"said-{len(self._commands)}.txt"
        self._commands.append(Command(words, said_in, faults, cwd))
        return self._commands[-1]

    def close(self) -> None:
        """Leaves no process behind, frozen ones neither."""
        for command in self._commands:
            command.send(signal.SIGKILL)

    def finish(self, words: Sequence[str]) -> None:
        """Runs a command that must end well."""
        command = self.start(words)
        assert command.wait() == 0, command.said

    def whole(self, kind: str) -> Path:
        """The directory of a run of this kind that nothing disturbed; it is made once."""
        if kind not in self._whole:
            run_dir = self.run_dir(f"whole-{len(self._whole)}")
            started = time.monotonic()
            self.finish(self.train(kind, run_dir))
            self.whole_s[kind] = time.monotonic() - started
            self._whole[kind] = run_dir
        return self._whole[kind]


def summary_of(run_dir: Path) -> dict[str, Any]:
    """What a run says of itself; nothing where it has not begun."""
    path = run_dir / "summary.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def assert_same(run_dir: Path, whole: Path) -> None:
    """Two runs came to the same end: every number to the bit, every file that is kept, and nothing beside."""
    one, other = _outcome(run_dir), _outcome(whole)
    for name in other:
        assert one[name] == other[name], name
    kept, kept_by_whole = _weights(run_dir / "checkpoints"), _weights(whole / "checkpoints")
    for name in {*kept} & {*kept_by_whole}:  # a run that was asked to stop keeps another one
        assert kept[name] == kept_by_whole[name], name


def _outcome(run_dir: Path) -> dict[str, Any]:
    summary = summary_of(run_dir)
    return {
        "metrics": [_exact(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()],
        "summary": {key: summary[key] for key in ("status", "steps", "examples_seen", "total_steps", "reference")},
        "weights": _weights(run_dir / "model"),
        "texts": {name: (run_dir / name).read_text() for name in _TEXTS if (run_dir / name).exists()},
        "rounds": {path.name: sha256_of(path) for path in (run_dir / "rounds").glob("*")},
        "findings": [event for event in read_json_lines(run_dir / "events.jsonl") if event["code"] in DETECTORS],
        "files": sorted(path.name for path in run_dir.iterdir()),
        "checkpoints": len(list((run_dir / "checkpoints").iterdir())),
    }


def _weights(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*.safetensors"))}


def _exact(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.hex() if isinstance(value, float) else value
        for name, value in record.items()
        if name not in _CLOCKS
    }

"""`penchant sample` and `penchant judge` struck at any moment: the same command goes on, and the file is the same."""

from __future__ import annotations

import itertools
import json
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..training.test_run import rows, write_rows
from .matrix import Matrix, some
from .nursery import Fault
from .runs import Workshop

_PROMPTS, _CHUNK = 24, 4
_SETTINGS = "--sampling.completions 2 --sampling.batch_size 2 --sampling.max_new_tokens 24 --device cpu"
_APPEND = "penchant.online.growing:GrowingFile.append"

_RULE = """
def score(prompt, completions):
    return [len(text) for text in completions]
"""


@dataclass
class Desk:
    """Where files are sampled and judged again and again, each by a command of its own."""

    workshop: Workshop
    model: Path
    folder: Path
    prompts: str
    samples: Path
    """Completions that nobody disturbed."""
    samples_s: float
    """How long they took."""
    judged: Path

    def sample(self, output: Path) -> list[str]:
        """The words that sample into a file."""
        return f"sample --model {self.model} --data {self.prompts} --output {output} {_SETTINGS}".split()

    def judge(self, output: Path) -> list[str]:
        """The words that judge the undisturbed completions."""
        rule = f"--judge.name rule --judge.function {self.folder}/rules.py:score"
        return f"judge --data {self.samples} --output {output} {rule}".split()


@pytest.fixture(scope="module")
def desk(workshop: Workshop, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("sampled")
    (folder / "rules.py").write_text(_RULE)
    prompts = write_rows(folder / "prompts.jsonl", rows(_PROMPTS))
    made = Desk(workshop, model_folder, folder, prompts, folder / "whole.jsonl", 0.0, folder / "judged.jsonl")
    workshop.finish(made.sample(made.samples))  # the first command waits until all is imported
    started = time.monotonic()
    workshop.finish(made.sample(folder / "again.jsonl"))
    made.samples_s = time.monotonic() - started
    workshop.finish(made.judge(made.judged))
    return made


def whole_chunks(path: Path) -> bytes:
    """What of a file must outlive whatever comes."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    kept = lines if len(lines) == _PROMPTS else lines[: len(lines) // _CHUNK * _CHUNK]
    return b"".join(line + b"\n" for line in kept)


def test_sampling_killed_at_random_moments_ends_as_if_nothing_had_happened(
    desk: Desk, matrix: Matrix, full: bool
) -> None:
    dice, kills = random.Random(1), 0
    for life in itertools.count():
        if kills >= (20 if full else 3):
            break
        output = desk.folder / f"killed {life}.jsonl".replace(" ", "-")
        kept, own_kills = b"", 0
        while True:
            command = desk.workshop.start(desk.sample(output))
            if own_kills < 3:
                command.leave_alone(dice.uniform(0.3, 1.0) * desk.samples_s)
                command.send(signal.SIGKILL)
            code = command.wait()
            assert code in (0, -signal.SIGKILL), command.said
            now = output.read_bytes() if output.exists() else b""
            assert now.startswith(kept), "what was there was made again"
            kept = whole_chunks(output)
            if code == 0:
                break
            own_kills += 1
        if own_kills:
            with matrix.trial(1, "kill -9 while completions are sampled", own_kills):
                assert output.read_bytes() == desk.samples.read_bytes()
        kills += own_kills


_WEAK = {
    "before the settings": (Fault("penchant.online.growing:write_json"), 0),
    "between settings and file": (Fault("penchant.online.growing:write_json", returned=True), 0),
    "before a chunk is written": (Fault(_APPEND, 3), 2),
    "before a chunk is forced to the disk": (Fault("os:fsync", 2, within=_APPEND), 2),
    "behind a chunk": (Fault(_APPEND, 4, returned=True), 4),
    "behind the last chunk": (Fault(_APPEND, 6, returned=True), 6),
}
"""Moment -> the fault, and how many chunks it leaves."""


@pytest.mark.parametrize("moment", some(_WEAK, "between settings and file", "before a chunk is forced to the disk"))
def test_sampling_killed_at_a_weak_moment_ends_as_if_nothing_had_happened(
    moment: str, desk: Desk, matrix: Matrix
) -> None:
    fault, num_chunks = _WEAK[moment]
    output = desk.folder / f"{moment.replace(' ', '-')}.jsonl"
    struck = desk.workshop.start(desk.sample(output), fault)
    assert struck.wait() == -signal.SIGKILL, struck.said
    assert whole_chunks(output).count(b"\n") == _CHUNK * num_chunks
    with matrix.trial(1, "kill -9 between two chunks of samples"):
        desk.workshop.finish(desk.sample(output))
        assert output.read_bytes() == desk.samples.read_bytes()


def test_judging_that_was_killed_ends_as_if_nothing_had_happened(desk: Desk, matrix: Matrix) -> None:
    output = desk.folder / "judging-killed.jsonl"
    struck = desk.workshop.start(desk.judge(output), Fault("os:fsync", 1, within=_APPEND))
    assert struck.wait() == -signal.SIGKILL, struck.said
    with matrix.trial(1, "kill -9 while completions are judged"):
        desk.workshop.finish(desk.judge(output))
        assert output.read_bytes() == desk.judged.read_bytes()
        assert all(json.loads(line)["scores"] for line in output.read_text().splitlines())


_STOPS = {
    "loading": Fault("penchant.scoring.policy:Policy.from_pretrained", 1, signal.SIGTERM),
    "the first chunk": Fault("penchant.scoring.policy:Policy.sample", 1, signal.SIGTERM),
    "a later chunk": Fault("penchant.scoring.policy:Policy.sample", 3, signal.SIGTERM),
    "the writing of a chunk": Fault(_APPEND, 2, signal.SIGTERM),
    "the last chunk": Fault("penchant.scoring.policy:Policy.sample", 6, signal.SIGTERM),
}
"""Where SIGTERM comes."""


@pytest.mark.parametrize("place", some(_STOPS, "a later chunk", "the writing of a chunk"))
def test_sigterm_ends_sampling_with_143_and_whole_chunks(place: str, desk: Desk, matrix: Matrix) -> None:
    output = desk.folder / f"stopped-in-{place.replace(' ', '-')}.jsonl"
    with matrix.trial(8, "SIGTERM while completions are sampled"):
        stopped = desk.workshop.start(desk.sample(output), _STOPS[place])
        assert stopped.wait(at_most_s=30) == 143, stopped.said
        assert "Traceback" not in stopped.said
        if output.exists():
            assert output.read_bytes() == whole_chunks(output)
            assert f"{output} keeps what is done; the same command goes on" in stopped.said
        desk.workshop.finish(desk.sample(output))
        assert output.read_bytes() == desk.samples.read_bytes()


def test_ctrl_c_ends_sampling_with_130_and_whole_chunks(desk: Desk, matrix: Matrix) -> None:
    output = desk.folder / "ctrl-c.jsonl"
    with matrix.trial(9, "Ctrl-C while completions are sampled"):
        stopped = desk.workshop.start(
            desk.sample(output), Fault("penchant.scoring.policy:Policy.sample", 3, signal.SIGINT)
        )
        assert stopped.wait(at_most_s=30) == 130, stopped.said
        assert output.read_bytes().count(b"\n") == 2 * _CHUNK
        desk.workshop.finish(desk.sample(output))
        assert output.read_bytes() == desk.samples.read_bytes()

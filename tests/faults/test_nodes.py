"""Two machines, as the kernel sees it: network namespaces with addresses of their own, and a cable between them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penchant.disk import read_json_lines
from penchant.training.rundir import read_summary

from ..training.several import assert_same_course
from .matrix import Matrix

ROOT = Path(__file__).parents[2]
NODES = {"penchant-a": "10.77.0.1", "penchant-b": "10.77.0.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def cable() -> Iterator[None]:
    """Two namespaces, connected."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs the right to make network namespaces")
    cards = [f"veth-{name[-1]}" for name in NODES]
    try:
        ip("link", "add", cards[0], "type", "veth", "peer", "name", cards[1])
        for (name, address), card in zip(NODES.items(), cards, strict=True):
            ip("netns", "add", name)
            ip("link", "set", card, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", card)
            ip("-n", name, "link", "set", card, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NODES:
            held = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True)
            for pid in held.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start_node(name: str, words: list[str], said_in: Path) -> subprocess.Popen[str]:
    """A machine's share of a run, by the script of the example."""
    environment = {
        **os.environ,
        "NODES": "2",
        "FIRST": NODES["penchant-a"],
        "OWN": NODES[name],
        "RESTARTS": "0",
        "GLOO_SOCKET_IFNAME": f"veth-{name[-1]}",
        "PENCHANT_PATIENCE_MINUTES": "0.2",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["ip", "netns", "exec", name, "sh", "examples/many_processes/node.sh", *words]
    with said_in.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, text=True)


def start_both(run_dir: Path, model: Path, folder: Path) -> dict[str, tuple[subprocess.Popen[str], Path]]:
    os.environ["MODEL"] = str(model)
    words = f"--output_dir {run_dir} --batch_size 8 --num_samples 0 --learning_rate 1e-3 --save_steps 4".split()
    words += ["--logging_steps", "2", "--eval_steps", "1000"]
    folder.mkdir(exist_ok=True)
    return {name: (start_node(name, words, folder / f"{name}.txt"), folder / f"{name}.txt") for name in NODES}


@pytest.mark.full
def test_two_machines_train_and_survive_a_cut_cable(
    cable: None, model_folder: Path, matrix: Matrix, tmp_path: Path
) -> None:
    with matrix.trial("15a", "two network namespaces as machines: the cable is cut, put back, and the run goes on"):
        for process, said in start_both(tmp_path / "whole", model_folder, tmp_path / "first").values():
            assert process.wait(300) == 0, said.read_text()[-5000:]
        assert read_summary(tmp_path / "whole")["processes"] == 2

        nodes = start_both(tmp_path / "run", model_folder, tmp_path / "cut")
        until = time.monotonic() + 120
        while read_summary(tmp_path / "run").get("steps", 0) < 8 and time.monotonic() < until:
            time.sleep(0.02)
        ip("-n", "penchant-a", "link", "set", "veth-a", "down")
        for process, said in nodes.values():
            until = time.monotonic() + 60
            while "has lost the others" not in said.read_text() and time.monotonic() < until:
                time.sleep(0.1)
            assert "has lost the others" in said.read_text(), said.read_text()[-5000:]
            process.kill()  # torchrun itself asks for the other machine for minutes
        assert read_summary(tmp_path / "run")["status"] != "finished"

        ip("-n", "penchant-a", "link", "set", "veth-a", "up")
        for process, said in start_both(tmp_path / "run", model_folder, tmp_path / "again").values():
            assert process.wait(300) == 0, said.read_text()[-5000:]
        assert [event for event in read_json_lines(tmp_path / "run" / "events.jsonl") if event["code"] == "resumed"]
        assert_same_course(tmp_path / "whole", tmp_path / "run")

"""Several processes on this machine that work as one, as torchrun would start them, forked within milliseconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
    import torch

    torch.set_num_threads(1)
    work(*arguments)

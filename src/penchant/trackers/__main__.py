"""`python -m penchant.trackers NAME RUN_DIR`: sends the metrics of a run to a tracker until its input ends."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from pydantic_core import from_json

from penchant.disk import GrowingLines, make_folder, read_mapping, write_json, write_text
from penchant.trackers import FOLDER, LONGEST_END_S, log_of
from penchant.trackers.clients import CLIENTS, Client, new_name

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_NOTES = 10.0
_HELD_OUT = "eval_"
_NO_VALUE = ("step", "time_s")
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|TRACKING_URI", re.IGNORECASE)


def main(name: str, run_dir: Path) -> int:
    """Follows the run to its end; 1 when the tracker failed, and then its log says why."""
    ended = threading.Event()
    threading.Thread(target=_wait_for_the_end, args=(ended,), daemon=True).start()
    with suppress(OSError):
        os.nice(5)  # the training goes first
    try:
        make_folder(run_dir / FOLDER)
        # An earlier attempt's may still be sending; it has so long to come to its end.
        with FileLock(run_dir / FOLDER / f"{name}.lock", timeout=LONGEST_END_S + 10):
            _follow(name, run_dir, ended)
    except BaseException:
        write_text(log_of(run_dir, name), without_secrets(traceback.format_exc()))
        return 1
    return 0


def _follow(name: str, run_dir: Path, ended: threading.Event) -> None:
    notes = run_dir / FOLDER / f"{name}.json"
    known = read_mapping(notes)
    state = {"name": known.get("name") or new_name(run_dir), "training": -1, "held_out": -1, **known}
    write_json(notes, state)  # first: should this be killed, the next attempt goes on with the same run
    client = CLIENTS[name](run_dir, state["name"], _settings(run_dir), bool(known))
    lines, noted_at = GrowingLines(run_dir / "metrics.jsonl"), time.monotonic()
    while True:
        is_over = ended.is_set()  # before the last look, so that nothing is missed
        if _send(client, lines, state) and time.monotonic() - noted_at > _SECONDS_BETWEEN_NOTES:
            _note(notes, state)
            noted_at = time.monotonic()
        if is_over:
            break
        ended.wait(_SECONDS_BETWEEN_LOOKS)
    _note(notes, state)
    status = read_mapping(run_dir / "summary.json").get("status")
    client.finish("killed" if status == "running" else str(status))


def _note(notes: Path, state: Mapping[str, Any]) -> None:
    """Keeps how much was sent, unless another run has begun in this directory meanwhile."""
    if read_mapping(notes).get("name") == state["name"]:
        write_json(notes, dict(state))


def _send(client: Client, lines: GrowingLines, state: dict[str, Any]) -> bool:
    """Sends what is new; whether there was any. What an earlier attempt sent already is the same again."""
    has_sent = False
    while (found := lines.read()[0]) != []:
        for row in _rows(found):
            kind = "held_out" if any(key.startswith(_HELD_OUT) for key in row) else "training"
            if row["step"] > state[kind]:
                client.send(row["step"], _values(row))
                state[kind], has_sent = row["step"], True
    if has_sent:
        client.flush()
    return has_sent


def _rows(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(ValueError):
            row = from_json(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                yield row


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if name not in _NO_VALUE and type(value) in (int, float)}


def _settings(run_dir: Path) -> dict[str, Any]:
    file = yaml.safe_load((run_dir / "run.yaml").read_text(encoding="utf-8"))
    return dict(_flat(file)) if isinstance(file, dict) else {}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def without_secrets(text: str) -> str:
    """The text without the values of environment variables that look like keys."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) > 5:
            text = text.replace(value, f"(${name})")
    return text


def _wait_for_the_end(ended: threading.Event) -> None:
    """The run holds the other end of this process's input; it ends with the run, however that ends."""
    sys.stdin.buffer.read()
    ended.set()
    time.sleep(LONGEST_END_S)
    os._exit(3)


if __name__ == "__main__":
    # Not through the interpreter's own end: clients wait there for what they could not send.
    os._exit(main(sys.argv[1], Path(sys.argv[2])))

"""The pairs that contradict the others: the lowest margins of the first pass, with their texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from penchant.disk import read_json_lines
from penchant.training.run import train
from penchant.training.suspects import MOST, Suspects


def test_the_lowest_margins_below_zero_are_kept_in_their_order() -> None:
    suspects = Suspects()
    suspects.look({1: (0.0, 1.0), 2: (2.0, 1.0), 3: (1.0, 1.0), 4: (-1.0,)}, step=1)
    suspects.look({5: (0.0, 0.5, 3.0), 6: (0.5, 1.0)}, step=2)
    assert suspects.to_json() == [[-3.0, 2, 5], [-1.0, 1, 1], [-0.5, 2, 6]]
    again = Suspects.from_json(json.loads(json.dumps(suspects.to_json())))
    again.look({100 + place: (0.0, 2.0 + place) for place in range(MOST + 5)}, step=3)
    kept = again.to_json()
    assert len(kept) == MOST
    assert kept[0] == [-2.0 - MOST - 4, 3, 100 + MOST + 4]


def test_a_pair_with_a_wrong_label_is_among_them(model_folder: Path, tmp_path: Path) -> None:
    """All chosen answers speak of Paris but one, which comes with the others' rejected answer."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"the {one} {two}", "chosen": " Paris yes", "rejected": " mat no"}
        for one in ("cat", "dog", "tree", "red", "blue")
        for two in ("sat", "ran", "on", "under", "what", "is", "one", "two")
    ]
    rows[17] |= {"chosen": " mat no", "rejected": " Paris yes"}
    settings = {"batch_size": 4, "learning_rate": 1e-2, "warmup_ratio": 0.0, "num_samples": 0, "eval_size": 0}
    train(str(model_folder), rows, output_dir=str(tmp_path / "run"), quiet=True, **settings)
    first, *_ = read_json_lines(tmp_path / "run" / "suspicious.jsonl")
    assert first["chosen"].strip() == "mat no"
    assert first["prompt"] == rows[17]["prompt"]
    assert first["margin"] < 0

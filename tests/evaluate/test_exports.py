"""Files for other tools, read as those tools read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from penchant.evaluate.exports import write_alpaca_eval, write_lm_eval_task
from penchant.examples import Answer, Pair, plain_text

MESSAGES = [{"role": "user", "content": "the capital of France"}]
PAIRS = [
    Pair("what is one", " the cat", " a dog"),
    Pair("what is two", " a dog", " the cat"),
    Pair(MESSAGES, [{"role": "assistant", "content": "Paris"}], [{"role": "assistant", "content": "no"}]),
]


def test_alpaca_eval_finds_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "alpaca_eval.json"
    write_alpaca_eval(path, ["“what”", MESSAGES], [Answer("one\n"), Answer("Paris")], "my-model", "held")
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"instruction": "“what”", "output": "one\n", "generator": "my-model", "dataset": "held"},
        {"instruction": "the capital of France", "output": "Paris", "generator": "my-model", "dataset": "held"},
    ]


def test_a_task_names_data_that_hold_what_it_asks_for(tmp_path: Path, tokenizer: Any) -> None:
    write_lm_eval_task(tmp_path / "task", "held_pairs", PAIRS, tokenizer)
    task = yaml.safe_load((tmp_path / "task" / "held_pairs.yaml").read_text())
    data = Path(task["dataset_kwargs"]["data_files"][task["test_split"]])
    assert data.is_absolute()
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert {task["doc_to_text"], task["doc_to_choice"], task["doc_to_target"]} == set(rows[0])
    for row, pair in zip(rows[:2], PAIRS[:2], strict=True):
        assert row["prompt"] == pair.prompt
        assert row["choices"][row["label"]] == pair.chosen
        assert row["choices"][1 - row["label"]] == pair.rejected
    assert {row["label"] for row in rows[:2]} == {0, 1}, "chosen has no place of its own, for ties go to the first"


def test_messages_stand_in_a_task_as_the_model_reads_them(tmp_path: Path, tokenizer: Any) -> None:
    write_lm_eval_task(tmp_path, "held_pairs", PAIRS[2:], tokenizer)
    (row,) = [json.loads(line) for line in (tmp_path / "held_pairs.jsonl").read_text().splitlines()]
    assert row["prompt"] == "<|im_start|>user\nthe capital of France<|im_end|>\n<|im_start|>assistant\n"
    assert row["choices"][row["label"]] == "Paris<|im_end|>\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        (MESSAGES, "the capital of France"),
        (
            [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what"}],
            "system: be brief\n\nuser: what",
        ),
    ],
)
def test_texts_are_readable(text: Any, expected: str) -> None:
    assert plain_text(text) == expected

"""What is kept of single examples: rewards, and of some pairs every token, exactly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from penchant.disk import read_json_lines
from penchant.training import judgements, loop

from .test_run import ranked_rows, train


def test_the_log_ratios_of_the_tokens_add_up_to_the_reward(model_folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    result = train(model_folder, tmp_path, loss={"name": "dpo", "beta": 0.25})
    pairs = read_json_lines(result.run_dir / "pairs.jsonl")
    assert len(pairs) == 4
    for pair in pairs:
        for side in ("chosen", "rejected"):
            ratios, tokens = pair[f"{side}_log_ratios"], pair[f"{side}_tokens"]
            assert len(ratios) == len(tokens) == pair[f"{side}_length"]
            # The reward is made of two float32 sums of some tens of nats, the ratios are differences in float64.
            assert math.fsum(ratios) == pytest.approx(pair[f"{side}_reward"] / 0.25, abs=2e-5)
            assert "".join(tokens) == pair[side] + tokenizer.eos_token
    assert max(abs(pair["chosen_reward"]) for pair in pairs) > 0.1, "else the sums would prove nothing"


def test_a_ranking_keeps_the_tokens_of_its_best_and_its_worst(model_folder: Path, tmp_path: Path) -> None:
    held_out = ranked_rows(3, seed=1)
    result = train(model_folder, tmp_path, data=ranked_rows(), eval_data=held_out, method="pl-dpo", loss={"beta": 0.5})
    for pair, row in zip(read_json_lines(result.run_dir / "pairs.jsonl"), held_out, strict=True):
        assert "".join(pair["chosen_tokens"]).startswith(row["completions"][2])
        assert "".join(pair["rejected_tokens"]).startswith(row["completions"][1])
        assert math.fsum(pair["rejected_log_ratios"]) == pytest.approx(pair["rejected_reward"] / 0.5, abs=2e-5)


def test_without_a_reference_there_are_no_log_ratios(model_folder: Path, tmp_path: Path) -> None:
    result = train(model_folder, tmp_path, method="simpo")
    assert all("chosen_tokens" not in pair for pair in read_json_lines(result.run_dir / "pairs.jsonl"))


def test_of_many_pairs_both_ends_and_some_between_are_kept() -> None:
    rewards = {index: (float(index), 0.0) for index in range(1000)}
    kept = judgements._worth_reading(rewards)
    assert len(kept) == len(set(kept)) == 64
    assert set(range(24)) | set(range(976, 1000)) < set(kept)
    between = sorted(set(kept) - set(range(24)) - set(range(976, 1000)))
    assert between == [24 + int(n * 952 / 16) for n in range(16)]
    assert judgements._worth_reading({1: (2.0, 1.0), 2: (0.0, 1.0), 3: (math.nan, 1.0), 4: (1.0,)}) == [2, 1]


@pytest.mark.parametrize("text", ["the cat sat", "naïve 🐈 東京", " two  spaces\n\nand lines", "🐈", "a"])
def test_the_texts_of_the_tokens_join_to_the_text(text: str, tokenizer: Any) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    texts = judgements.token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: Any) -> None:
    ids = tokenizer("a🐈", add_special_tokens=False).input_ids
    assert judgements.token_texts(tokenizer, ids[:-1])[-1] == "\ufffd"


def test_held_out_pairs_can_be_read_while_the_run_goes_on(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    record = loop.Training._record

    def looking(training: Any, values: dict[str, Any]) -> None:
        record(training, values)
        seen.append((training.progress.step, len(read_json_lines(tmp_path / "run" / "pairs.jsonl"))))

    monkeypatch.setattr(loop.Training, "_record", looking)
    train(model_folder, tmp_path, eval_steps=4)
    assert [num for step, num in seen if step <= 4] == [0] * 6
    assert {num for step, num in seen if step > 4} == {4}


def test_a_full_disk_under_the_judgements_ends_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "write_judgements", full)
    result = train(model_folder, tmp_path, eval_steps=4)
    assert result.summary["status"] == "finished"
    told = [event for event in read_json_lines(result.run_dir / "events.jsonl") if event["code"] == "judgements"]
    assert [event["step"] for event in told] == [4, 8]
    assert "No space left" in told[0]["message"]

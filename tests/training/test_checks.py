"""The data doctor before training: what it finds is kept, told and shown; what `drop` names is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import penchant
from penchant.report import write_report

from .test_run import findings_of, lines_of, ranked_rows, rows, single_rows, train_unseen


def many(number: int = 120) -> list[dict[str, Any]]:
    """Clean rows: every prompt is another one."""
    made = rows(number)
    for place, row in enumerate(made):
        row["prompt"] = [{"role": "user", "content": f"{row['prompt'][0]['content']} {place} {place * place}"}]
        row["rejected"] = [{"role": "assistant", "content": f"a dog {row['chosen'][0]['content'][8:]} {place}"}]
    return made


def run(model_folder: Path, tmp_path: Path, data: list[dict[str, Any]], **settings: Any) -> Any:
    return train_unseen(model_folder, tmp_path, data=data, **{"max_steps": 1, **settings})


def names_of(result: Any, severities: tuple[str, ...] = ("info", "warn", "major")) -> list[str]:
    return [check["name"] for check in findings_of(result)["train"]["checks"] if check["severity"] in severities]


def events_of(result: Any) -> dict[str, dict[str, Any]]:
    return {event["code"]: event for event in lines_of(result.run_dir / "events.jsonl")}


def test_findings_are_kept_told_and_shown(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = many()
    data += [{**data[place], "prompt": data[place]["prompt"]} for place in range(30)]
    data[40]["chosen"] = [{"role": "assistant", "content": "<b>the cat</b> </s> sat"}]
    result = run(model_folder, tmp_path, data, quiet=False)
    checks = {check["name"]: check for check in findings_of(result)["train"]["checks"]}
    assert checks["duplicate"]["severity"] == "major"
    assert checks["duplicate"]["rows"][0] == "data[120] (as data[0])"
    assert checks["special-token"]["rows"] == ["data[40]"]
    assert events_of(result)["duplicate"]["severity"] == "major"
    assert "30 of 150 rows (20.0%)" in events_of(result)["duplicate"]["message"]
    page = (result.run_dir / "report.html").read_text()
    assert "S04 duplicate" in page
    assert "data[120] (as data[0])" in page
    said = " ".join(capfd.readouterr().err.split())
    assert re.search(r"doctor .*duplicate \(major\)", said)


def test_of_clean_rows_one_sentence_is_said(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = [
        {**row, "rejected": [{"role": "assistant", "content": "a dog " + str(i)}]} for i, row in enumerate(many(500))
    ]
    for place, row in enumerate(made):
        row["chosen"] = [{"role": "assistant", "content": f"the cat {place}"}]
    result = run(model_folder, tmp_path, made, quiet=False)
    assert names_of(result) == []
    # The model was never trained, so that any answer is far from what it would say.
    assert set(events_of(result)) <= {"identity", "weak-reference"}
    assert re.search(r"doctor .*23 checks of 500 examples: nothing to say", " ".join(capfd.readouterr().err.split()))


def test_rows_that_drop_names_are_left_out_and_counted_by_reason(model_folder: Path, tmp_path: Path) -> None:
    data = many()
    data += [dict(data[place]) for place in range(6)]
    data += [{**data[9], "chosen": data[9]["rejected"], "rejected": data[9]["chosen"]}]
    result = run(model_folder, tmp_path, data, drop="duplicate, contradiction")
    found = findings_of(result)["train"]
    assert found["rows"] == 127
    assert found["used"] == 119
    assert found["dropped"] == {"S04: duplicate, named by drop": 6, "S05: contradiction, named by drop": 2}
    assert "data[120]: [S04] left out, for drop names duplicate" in found["examples"]
    assert not {"duplicate", "contradiction"} & set(names_of(result, ("warn", "major")))
    assert {"duplicate", "contradiction"} <= set(names_of(result, ("info",)))
    plain = run(model_folder, tmp_path / "plain", [*data[:9], *data[10:120]])
    assert findings_of(plain)["train"]["sha256"] == found["sha256"]


def test_rows_cut_by_max_length_can_be_dropped_and_are_no_longer_counted_as_cut(
    model_folder: Path, tmp_path: Path
) -> None:
    data = many()
    data[5]["chosen"] = [{"role": "assistant", "content": "the cat sat on " * 60}]
    result = run(model_folder, tmp_path, data, max_length=120)
    assert findings_of(result)["train"]["truncated"] == 1
    result = run(model_folder, tmp_path / "dropped", data, max_length=120, drop=["truncated"])
    assert findings_of(result)["train"]["truncated"] == 0
    assert findings_of(result)["train"]["used"] == 119


def test_a_training_prompt_among_the_held_out_ones_is_a_leak_and_can_be_dropped(
    model_folder: Path, tmp_path: Path
) -> None:
    data = many()
    heldout = [{**data[7], "rejected": [{"role": "assistant", "content": "no dog at all"}]}, *rows(3, seed=5)]
    result = run(model_folder, tmp_path, data, eval_data=heldout)
    assert [check["name"] for check in findings_of(result)["eval"]["checks"]] == ["leak"]
    assert events_of(result)["leak"]["message"].startswith("held-out data: 1 of 4 rows")
    result = run(model_folder, tmp_path / "dropped", data, eval_data=heldout, drop=["leak"])
    assert findings_of(result)["train"]["dropped"] == {"S06: leak, named by drop": 1}
    assert findings_of(result)["eval"]["used"] == 4


def test_inverted_scores_stop_a_run_until_drop_names_them(model_folder: Path, tmp_path: Path) -> None:
    data = [{**row, "score_chosen": 2.0, "score_rejected": 1.0} for row in many()]
    data[3]["score_rejected"] = 3.0
    with pytest.raises(penchant.UserError, match=r"(?s)score rejected higher.*drop: \[inverted\].*data\[3\]"):
        run(model_folder, tmp_path, data)
    assert not (tmp_path / "run").exists()
    result = run(model_folder, tmp_path, data, drop="inverted")
    assert findings_of(result)["train"]["used"] == 119


def test_rows_that_drop_names_do_not_count_as_bad_ones(model_folder: Path, tmp_path: Path) -> None:
    data = many()
    for place in range(10):
        data[place]["rejected"] = data[place]["chosen"]
    with pytest.raises(penchant.UserError, match="more than max_bad_rows"):
        run(model_folder, tmp_path, data)
    assert findings_of(run(model_folder, tmp_path, data, drop=["identical"]))["train"]["used"] == 110


def test_a_word_that_drop_does_not_know_is_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(penchant.UserError, match=r"drop.*'near-identical'.*got 'duplicates'"):
        run(model_folder, tmp_path, many(), drop="duplicates")


def test_pairs_below_min_margin_are_left_out_of_training_alone(model_folder: Path, tmp_path: Path) -> None:
    data = [{**row, "margin": place / 10} for place, row in enumerate(many(20))]
    result = run(model_folder, tmp_path, data, min_margin=0.95, eval_data=data[:4])
    found = findings_of(result)
    assert found["train"]["used"] == 10
    assert found["train"]["dropped"] == {"F01: a margin below min_margin": 10}
    assert found["eval"]["used"] == 4


def test_weighing_by_margin_scales_the_gradient_as_weights_do(model_folder: Path, tmp_path: Path) -> None:
    margins = [0.2, 1.0, 2.5, 4.0]
    data = many(4)
    weighed = [{**row, "margin": margin} for row, margin in zip(data, margins, strict=True)]
    given = [{**row, "weight": 2 / (1 + 2.718281828459045**-m) - 1} for row, m in zip(data, margins, strict=True)]
    one = run(model_folder, tmp_path / "one", weighed, weigh_by_margin=True, max_steps=3)
    other = run(model_folder, tmp_path / "other", given, max_steps=3)
    losses = [[line["loss"] for line in lines_of(result.run_dir / "metrics.jsonl")] for result in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(losses[0]) == 3


def test_margins_come_from_the_scores_of_rankings_and_go_with_the_labels_of_pairs(
    model_folder: Path, tmp_path: Path
) -> None:
    ranked = run(model_folder, tmp_path / "ranked", ranked_rows(6), min_margin=2.5, pairs_from_rankings="all")
    assert findings_of(ranked)["train"]["used"] == 6  # of 4 - 1, 4 - 3 and 3 - 1 only the first is large enough
    data = [{**row, "margin": float(place)} for place, row in enumerate(many(8))]
    judged = run(model_folder, tmp_path / "judged", data, method="kto", min_margin=4.0)
    assert findings_of(judged)["train"]["used"] == 8  # two completions of four pairs


def test_filters_by_margin_need_margins(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(penchant.UserError, match="min_margin: no pair has a margin"):
        run(model_folder, tmp_path, many(4), min_margin=1.0)
    with pytest.raises(penchant.UserError, match="weigh_by_margin: no pair has a margin"):
        run(model_folder, tmp_path, single_rows(4), method="kto", weigh_by_margin=True)


def test_labels_are_weighed_as_the_loss_weighs_them(model_folder: Path, tmp_path: Path) -> None:
    data = single_rows(20, labels=(True, True, True, False))
    result = run(model_folder, tmp_path, data, method="kto")
    assert "desirable_weight to a value from 0.333 to 0.444" in events_of(result)["label-balance"]["message"]
    mended = run(model_folder, tmp_path / "mended", data, method="kto", loss={"desirable_weight": 0.4})
    assert "label-balance" not in names_of(mended)
    assert "label-balance" not in names_of(run(model_folder, tmp_path / "bco", data, method="bco"))


def test_findings_are_escaped_in_the_report(model_folder: Path, tmp_path: Path) -> None:
    result = run(model_folder, tmp_path, many(8))
    findings = findings_of(result)
    findings["train"]["checks"] = [
        {"code": "S04", "severity": "<i>", "name": "<script>", "message": "<img src=x>", "fix": "&", "rows": ["<b>:1"]},
        "no check",
    ]
    (result.run_dir / "data.json").write_text(json.dumps(findings))
    page = write_report(result.run_dir).read_text()
    assert "&lt;img src=x&gt;" in page
    assert "&lt;b&gt;:1" in page
    assert "<script>" not in page
    assert "<img" not in page

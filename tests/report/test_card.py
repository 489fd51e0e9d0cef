"""The model card: loadable front matter, the figures, and no secrets of the machine it was made on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from penchant.report import write_model_card
from penchant.report.card import is_hub_id, without_paths

MakeRun = Callable[..., Path]


def card_of(run_dir: Path) -> tuple[dict[str, Any], str]:
    _, front, body = write_model_card(run_dir).read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def summary_with(**fields: Any) -> dict[str, Any]:
    return {"status": "finished", "method": "dpo", "model": "owner/name", **fields}


def test_the_front_matter_is_what_the_hub_reads(make_run: MakeRun) -> None:
    front, _ = card_of(make_run())
    assert front == {
        "library_name": "transformers",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "tags": ["dpo", "preference-optimization", "penchant"],
    }


def test_an_adapter_says_so_and_loads_with_peft(make_run: MakeRun) -> None:
    front, body = card_of(make_run({"summary.json": summary_with(lora=True)}))
    assert front["library_name"] == "peft"
    assert 'AutoPeftModelForCausalLM.from_pretrained("model")' in body


def test_results_stand_with_their_interval(make_run: MakeRun) -> None:
    metrics = [{"step": 0, "eval_rewards/accuracies": 0.4, "eval_loss": 0.693147}]
    metrics.append({"step": 9, "eval_rewards/accuracies": 0.875, "eval_loss": 0.41})
    _, body = card_of(make_run({"metrics.jsonl": metrics}))
    # Wilson for p = 0.875, n = 96.
    assert "| 40.0% | 87.5% (95% interval 79.4% to 92.7%) |" in body
    assert "| loss | 0.693 | 0.41 |" in body
    assert "44.6% of the pairs" in body


def test_the_card_tells_the_equation_and_the_data(make_run: MakeRun) -> None:
    _, body = card_of(make_run())
    assert "-log sigmoid(beta h), h the difference" in body
    assert "Training data: pairs.jsonl, 300 pairs of 309 rows" in body
    assert "beta = 0.1" in body


@pytest.mark.parametrize(
    "model", ["/home/ada/models/tiny", "./tiny", "../models/tiny", "C:\\models\\tiny", "~/tiny", "a/b/tiny"]
)
def test_no_local_path_gets_into_the_card(make_run: MakeRun, model: str) -> None:
    reference = f"A frozen copy of {model} (cache in /home/ada/.cache/penchant)."
    summary = summary_with(model=model, reference=reference if model.startswith("/") else "A frozen copy.")
    run_dir = make_run({"summary.json": summary})
    front, body = card_of(run_dir)
    assert "base_model" not in front
    assert "`tiny`" in body
    for part in ("ada", "/home", "models", str(run_dir.parent)):
        assert part not in body.replace("Language models", "")


def test_hub_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/name-1.5_b")
    assert not any(is_hub_id(model) for model in ("name", "/a/b", "a/b/c", "a/b c", "a/b\n", "../b", "a/"))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_id("owner/name")


def test_paths_in_sentences_are_shortened() -> None:
    assert without_paths("from /home/ada/x.jsonl, cached") == "from x.jsonl, cached"
    assert without_paths("file:///home/ada/x and C:\\Users\\ada\\y") == "x and y"
    assert (
        without_paths("1 / (2 beta) and a/b, https://arxiv.org/abs/1")
        == "1 / (2 beta) and a/b, https://arxiv.org/abs/1"
    )


def test_odd_names_break_neither_yaml_nor_markdown(make_run: MakeRun) -> None:
    odd = 'x": [\n---\n# <script>`|*_\x00\ud800'
    summary = summary_with(method=odd, model=odd, reference=odd, loss={"name": odd, "beta": 0.1}, versions={odd: odd})
    front, body = card_of(make_run({"summary.json": summary}))
    assert front["tags"] == ["x-script", "preference-optimization", "penchant"]
    assert "\n# <script>" not in body
    assert "\n---" not in body
    assert "\x00" not in body


def test_an_unfinished_run_without_anything_has_a_card_that_says_so(tmp_path: Path) -> None:
    front, body = card_of(tmp_path)
    assert front["tags"] == ["preference-optimization", "penchant"]
    assert "had not finished" in body
    assert "nothing is known about pairs" in body


def test_the_run_file_and_the_texts_stay_out_of_the_card(make_run: MakeRun) -> None:
    parts = {"run.yaml": "token: hf_secret\n", "samples.jsonl": [{"prompt": "private", "before": "b", "after": "a"}]}
    _, body = card_of(make_run(parts))
    assert "hf_secret" not in body
    assert "private" not in body

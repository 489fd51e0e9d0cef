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
    assert "44.6% of the pairs." in body


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
    assert "nothing is known about examples" in body


def test_the_run_file_and_the_texts_stay_out_of_the_card(make_run: MakeRun) -> None:
    parts = {"run.yaml": "token: hf_secret\n", "samples.jsonl": [{"prompt": "private", "before": "b", "after": "a"}]}
    _, body = card_of(make_run(parts))
    assert "hf_secret" not in body
    assert "private" not in body


LENGTHS = {"desirable": {"median": 7}, "undesirable": {"median": 10.5}}
COMPLETIONS = {"unit": "completion", "rows": 30, "used": 20, "desirable": 8, "lengths": {"prompt": {}, **LENGTHS}}


def test_single_completions_are_called_so(make_run: MakeRun) -> None:
    metrics = [{"step": 0, "eval_rewards/accuracies": 0.4}, {"step": 9, "eval_rewards/accuracies": 0.75}]
    metrics[1] |= {"eval_logps/chosen": -8.5, "eval_logps/rejected": -9.5}
    data = {"train": COMPLETIONS, "eval": COMPLETIONS}
    summary = summary_with(steps=4, examples_seen=20)
    _, body = card_of(make_run({"metrics.jsonl": metrics, "data.json": data, "summary.json": summary}))
    assert "trained on single judged completions with Penchant (method `dpo`): 4 steps, 20 completions seen." in body
    assert (
        "Held-out data: unnamed, 20 completions of 30 rows, 8 of them desirable; "
        "median length in tokens: desirable 7, undesirable 10.5." in body
    )
    assert "| on held-out completions | before | after |" in body
    # Hanley and McNeil for A = 0.75 of 8 and 12.
    couples = "couples whose desirable completion has the higher reward"
    assert f"| {couples} | 40.0% | 75.0% (95% interval 51.9% to 98.1%) |" in body
    assert "| log-probability of the undesirable completion, nats | – | −9.5 |" in body
    assert not [word for word in ("pair", "chosen", "rejected") if word in body]


def test_rankings_are_called_so(make_run: MakeRun) -> None:
    part = {
        "unit": "ranking",
        "used": 40,
        "longer_wins": 0.3,
        "lengths": {"best": {"median": 5}, "worst": {"median": 6}},
    }
    metrics = [{"step": 9, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -8.5}]
    _, body = card_of(make_run({"metrics.jsonl": metrics, "data.json": {"train": part, "eval": part}}))
    assert "trained on rankings of completions with Penchant" in body
    assert "120 steps, 960 rankings seen" in body
    assert "40 rankings; median length in tokens: best 5, worst 6; the best completion is longer than the worst" in body
    assert "| couples whose better completion has the higher reward | – | 75.0% |" in body
    assert "30.0% of the rankings, best against worst." in body
    assert "pair" not in body


def test_a_weighted_sum_is_told_term_by_term(make_run: MakeRun) -> None:
    terms = {"dpo": {"weight": 1.0, "beta": 0.1}, "sft": {"weight": 0.25, "per": "sequence"}}
    doc = "A sum of losses.\n\nRaises:\n    ValueError: never."
    _, body = card_of(make_run({"summary.json": summary_with(method="rpo", loss=terms, loss_doc=doc)}))
    assert "(method `rpo`, `1 × dpo, beta = 0.1; 0.25 × sft, per = sequence`)" in body
    assert "A sum of losses." in body
    assert "ValueError" not in body


def test_a_loss_without_settings_is_not_told_twice(make_run: MakeRun) -> None:
    _, body = card_of(make_run({"summary.json": summary_with(loss={"name": "dpo"})}))
    assert "(method `dpo`)" in body


def test_a_reward_model_loads_as_a_classifier_whatever_was_trained(make_run: MakeRun) -> None:
    summary = summary_with(method="reward", loss={"name": "reward", "alpha": 0.0}, lora=True)
    front, body = card_of(make_run({"summary.json": summary}))
    assert front["library_name"] == "transformers"
    assert 'AutoModelForSequenceClassification.from_pretrained("model")' in body
    assert "CausalLM" not in body

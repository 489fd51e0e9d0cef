"""What the model thinks of pairs, completions and rankings: each run is told in the words of its own examples."""

import json
import re
import tracemalloc
from pathlib import Path
from xml.etree import ElementTree

import pytest

from penchant.report.rundir import read_run
from tests.report.conftest import pair_lines
from tests.report.test_page import Dom, MakeRun, charts_of, page_of

BOTH = {"prompt": {"mean": 3.5}, "desirable": {"mean": 6.5, "median": 6, "max": 12}, "undesirable": {"mean": 7.5}}
COMPLETIONS = {"unit": "completion", "used": 30, "desirable": 12, "lengths": BOTH}
RANKINGS = {"unit": "ranking", "used": 100, "longer_wins": 0.3, "lengths": {"best": {"mean": 6.5}, "worst": {}}}


def completion_line(i: int, reward: float | None, desirable: bool | None, split: str = "eval") -> dict[str, object]:
    texts = {"source": f"rows:{i}", "prompt": f"prompt {i}.", "completion": f"completion {i}."}
    return {"split": split, **texts, "desirable": desirable, "reward": reward, "length": 9}


def on_completions(make_run: MakeRun, lines: list[dict[str, object]]) -> Path:
    parts = {"pairs.jsonl": None, "completions.jsonl": lines, "data.json": {"train": COMPLETIONS, "eval": COMPLETIONS}}
    return make_run(parts)


def test_completions_that_the_model_and_the_label_disagree_on_are_shown(make_run: MakeRun) -> None:
    # Rewards 0 to 2,999 in a scattered order; every third completion is undesirable.
    lines = [completion_line(i, float(i * 37 % 3000), i % 3 != 0) for i in range(3000)]
    page = page_of(on_completions(make_run, [*lines, completion_line(9999, None, True)]))
    shown = [int(number) for number in re.findall(r"completion (\d+)\.", page)]
    desirable = sorted((i for i in range(3000) if i % 3), key=lambda i: i * 37 % 3000)[:5]
    undesirable = sorted((i for i in range(3000) if i % 3 == 0), key=lambda i: -(i * 37 % 3000))[:5]
    assert shown == desirable + undesirable
    said = Dom(page).text()
    assert "The rewards of 3,000 held-out completions: 2,000 desirable, 1,000 undesirable." in said
    assert "Desirable, with the lowest reward A very low reward may mark a wrong label" in said
    assert said.index("Undesirable, with the highest reward") > said.index("reward 5 rows:")


def test_the_histogram_of_completions_holds_each_reward_once(make_run: MakeRun) -> None:
    rewards = [(0.1, True), (0.3, True), (0.9, True), (-0.7, False), (0.2, False), (0.5, None)]
    page = page_of(on_completions(make_run, [completion_line(i, r, d) for i, (r, d) in enumerate(rewards)]))
    (svg,) = re.findall(r"<svg [^>]*hist-rewards.*?</svg>", page, flags=re.DOTALL)
    assert ElementTree.fromstring(svg).findtext("desc") == (
        "desirable: 3 values, lowest 0.1, median 0.3, highest 0.9; undesirable: 2 values, lowest −0.7, median 0.2, "
        "highest 0.2; unlabelled: 1 values, lowest 0.5, median 0.5, highest 0.5"
    )
    columns = page.partition('<th scope="col">from</th>')[2].partition("</table>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", columns)]
    assert [sum(int(row[place]) for row in rows) for place in (2, 3, 4)] == [3, 2, 1]


def test_completions_without_a_label_are_shown_without_a_verdict(make_run: MakeRun) -> None:
    lengths = {"prompt": {"mean": 3.5}, "completion": {"mean": 6.5}}
    part = {"unit": "completion", "used": 3, "desirable": 0, "lengths": lengths}
    lines = [completion_line(i, float(-i), None, "train") for i in range(3)]
    parts = {"pairs.jsonl": None, "completions.jsonl": lines, "data.json": {"train": part, "eval": None}}
    page = page_of(make_run(parts))
    said = Dom(page).text()
    assert "The rewards of 3 training completions: 3 unlabelled." in said
    assert [int(number) for number in re.findall(r"completion (\d)\.", page)] == [2, 1, 0]
    assert "wrong label" not in said
    assert "Desirable" not in said


def test_a_run_on_completions_speaks_of_completions(make_run: MakeRun) -> None:
    page = page_of(on_completions(make_run, [completion_line(0, 0.5, True), completion_line(1, 0.25, False)]))
    dom = Dom(page)
    assert dom.open == []
    assert "Completions after training" in [data for tag, data in dom.texts if tag == "h2"]
    said = dom.text()
    assert "Completions seen 960" in said
    assert "Accuracy % of couples with the desirable one ahead" in said
    assert "Loss mean over completions" in said
    assert "Used 30 completions Desirable 40.0%" in said
    assert "desirable 6.5 6 12 undesirable 7.5 – –" in said
    assert "Completion in the data" in said
    description = charts_of(page)["Log-probabilities"].findtext("desc") or ""
    assert [part.split(":")[0] for part in description.split("; ")] == [
        *("desirable", "desirable, held-out", "undesirable", "undesirable, held-out")
    ]
    told = page.partition("</style>")[2].replace("pairs.jsonl", "")
    assert not [word for word in ("pair", "hosen", "ejected", "Longer") if word in told]


def test_a_method_for_completions_held_against_pairs_speaks_of_both(make_run: MakeRun) -> None:
    held_out = {"unit": "pair", "used": 96, "longer_wins": 0.446}
    page = page_of(make_run({"data.json": {"train": COMPLETIONS, "eval": held_out}}))
    said = Dom(page).text()
    assert "Training completions" in said
    assert "Held-out pairs" in said
    assert "The rewards of the chosen and the rejected completion of 100 held-out pairs." in said
    assert "Accuracy % of couples with the better one ahead" in said
    description = charts_of(page)["Rewards"].findtext("desc") or ""
    assert [part.split(":")[0] for part in description.split("; ")] == [
        *("desirable", "chosen, held-out", "undesirable", "rejected, held-out")
    ]


def test_a_run_on_rankings_speaks_of_their_best_and_worst(make_run: MakeRun) -> None:
    page = page_of(make_run({"data.json": {"train": RANKINGS, "eval": RANKINGS}}))
    said = Dom(page).text()
    lines = [row for row in pair_lines() if row["split"] == "eval"]
    num_wrong = sum(row["chosen_reward"] <= row["rejected_reward"] for row in lines)
    assert (
        f"The rewards of the best and the worst completion of 100 held-out rankings. In {num_wrong} of them the worst "
        "one still has the higher reward, or an equal one."
    ) in said
    assert "Best and worst rewards" in charts_of(page)
    assert "Longer one wins 30.0%, best against worst" in said
    assert "longer one wins, best against worst 30" in said
    assert "Best in the data" in said
    told = page.partition("</style>")[2].replace("pairs.jsonl", "")
    assert not [word for word in ("pair", "hosen", "ejected") if word in told]


def test_a_weighted_sum_is_told_term_by_term(make_run: MakeRun) -> None:
    terms = {"dpo": {"weight": 1.0, "beta": 0.1}, "sft": {"weight": 0.25, "per": "sequence"}}
    said = Dom(page_of(make_run({"summary.json": {"method": "rpo", "loss": terms}}))).text()
    assert "Loss 1 × dpo, beta = 0.1; 0.25 × sft, per = sequence" in said


@pytest.mark.parametrize("name", ["pairs.jsonl", "completions.jsonl"])
def test_of_very_long_texts_only_those_shown_are_held(make_run: MakeRun, name: str) -> None:
    run_dir = make_run({name: None})
    text = "x" * 20_000
    with (run_dir / name).open("w", encoding="utf-8") as lines:
        for i in range(3000):
            rewards = {"reward": float(i), "chosen_reward": float(i), "rejected_reward": 0.0}
            row = {"split": "eval", "completion": text, "chosen": text, "desirable": i % 2 == 0, **rewards}
            lines.write(json.dumps(row) + "\n")
    tracemalloc.start()
    run = read_run(run_dir)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    of_name = run.completions if name == "completions.jsonl" else run.pairs
    assert list(of_name) == ["eval"]
    # The file holds 120 MB; at both ends of each kind there are five rows.
    assert peak < 8e6

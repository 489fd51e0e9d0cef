"""Runs side by side: the figures are those of the run directories, and what cannot be compared is said to be so."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penchant.errors import UserError
from penchant.report import as_markdown, compare, to_json, write_comparison
from tests.report.conftest import DPO, IPO, MakeOne, held_out, write_json, write_jsonl
from tests.report.test_page import EVIL, Dom
from tests.report.test_table import page_of, printed


def test_a_row_holds_the_figures_of_its_run(make_one: MakeOne) -> None:
    after = {"loss": 0.41, "rewards/chosen": -0.5, "rewards/rejected": -2.0, "rewards/margins": 1.5, "kl": 0.03}
    before = held_out(0, 0.6, **{"rewards/chosen": 0.25, "logps/chosen": -90.0})
    run_dir = make_one("a", 0.875, before=before, after={**after, "logps/chosen": -96.5})
    samples = [{"prompt": "p", "before": "b", "after": text} for text in ("four", "sixsix")]
    write_jsonl(run_dir / "samples.jsonl", samples)
    (row,) = compare([run_dir]).rows
    assert (row.name, row.path, row.method, row.loss) == ("a", str(run_dir), "dpo", DPO)
    for end in row.figures.pop("interval"):  # Wilson's ends are where the score test just rejects.
        assert abs(0.875 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 96))
    assert row.figures == {
        "status": "finished",
        "accuracy": 0.875,
        "num_held_out": 96,
        "accuracy_before": 0.6,
        "longer_wins": 0.3,
        "kl": 0.03,
        "score": None,
        "answer_kl": None,
        "answer_length": 5.0,
        "held_out_loss": 0.41,
        "margin": 1.5,
        "chosen_reward": -0.5,
        "rejected_reward": -2.0,
        "chosen_logps_change": -6.5,
        "steps": 20,
        "examples_seen": 160,
        "wall_s": 250.0,
        "peak_memory_bytes": 3 * 2**30,
    }


def test_runs_that_were_judged_are_ordered_by_their_scores(make_one: MakeOne) -> None:
    for name, score in (("a", 1.5), ("b", 2.5)):
        run_dir = make_one(name, None)
        summary = json.loads((run_dir / "summary.json").read_text())
        summary["answers"] = {"prompts": 8, "score": {"value": score, "low": score - 1, "high": score + 1}}
        (run_dir / "summary.json").write_text(json.dumps(summary))
    comparison = compare([run_dir.parent / name for name in ("a", "b")])
    assert [row.name for row in comparison.rows] == ["b", "a"]
    assert comparison.headline == (
        "b comes first: its answers to held-out prompts have a mean score of 2.5 (95% interval 1.5 to 3.5)."
    )


def test_the_accuracy_of_a_model_that_is_its_own_reference_is_left_out(make_one: MakeOne) -> None:
    (row,) = compare([make_one("a", before=held_out(0, 0.43))]).rows
    assert row.figures["accuracy_before"] is None


def test_the_most_accurate_comes_first_and_the_unmeasured_last(make_one: MakeOne) -> None:
    accuracies = {"fair": 0.75, "none": None, "best": 0.9375, "twin": 0.75, "poor": 0.25}
    comparison = compare([make_one(name, accuracy) for name, accuracy in accuracies.items()])
    assert [row.name for row in comparison.rows] == ["best", "fair", "twin", "poor", "none"]


def test_a_name_of_a_loss_that_the_method_does_not_tell_is_a_column(make_one: MakeOne) -> None:
    runs = [make_one("a", loss=IPO), make_one("b", loss={"name": "dpo", "beta": 0.1})]
    assert compare(runs).different == ("loss.name",)


def test_comparable_runs_come_without_a_warning(make_one: MakeOne) -> None:
    comparison = compare([make_one("a"), make_one("b", seed=1)])
    assert comparison.warnings == ()
    assert not [note for note in comparison.notes if "units" in note]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"held_out_data": {"sha256": "f" * 64}}, "the held-out pairs are not the same (2 kinds: a, b; c)"),
        ({"held_out_data": {"sha256": None}}, "not known whether these were held against the same pairs"),
        ({"summary": {"model_sha256": "0"}}, "did not start from the same model (2 kinds: a, b; c)"),
        ({"summary": {"steps": 30, "examples_seen": 240}}, "20 to 30 steps and 160 to 240 pairs seen"),
        ({"summary": {"examples_seen": 80}}, "not go equally far: 80 to 160 pairs seen."),
        ({"summary": {"status": "running"}}, "Not finished, so these figures may change: c (running)."),
    ],
)
def test_what_cannot_be_compared_is_said(make_one: MakeOne, changes: dict[str, Any], words: str) -> None:
    comparison = compare([make_one("a"), make_one("b"), make_one("c", **changes)])
    (warning,) = comparison.warnings
    assert words in warning
    assert words in " ".join(line.strip() for line in printed(comparison))


def test_other_training_pairs_are_said(make_one: MakeOne) -> None:
    other = make_one("b", train_data={"sha256": "x"})
    assert compare([make_one("a"), other]).warnings == ("The runs were not trained on the same pairs (2 kinds: a; b).",)


def test_many_names_in_a_warning_are_counted(make_one: MakeOne) -> None:
    runs = [make_one(f"r{i}", held_out_data={"sha256": f"{i // 7}"}) for i in range(35)]
    (warning,) = compare(runs).warnings
    assert "5 kinds: r0, r1, r2, r3 and 3 more; r10, r11, r12, r13 and 3 more; " in warning
    assert warning.count("more") == 5


@pytest.mark.parametrize(("method", "loss"), [("ipo", IPO), ("dpo", {**DPO, "beta": 0.5})])
def test_units_that_differ_are_noted(make_one: MakeOne, method: str, loss: dict[str, Any]) -> None:
    (note,) = (n for n in compare([make_one("a"), make_one("b", method=method, loss=loss)]).notes if "units" in n)
    assert "only accuracy, KL and lengths can be compared" in note


def test_the_headline_tells_who_is_first_and_how_surely(make_one: MakeOne) -> None:
    runs = [make_one("a", 0.875), make_one("b", 0.8125), make_one("c", 0.5)]
    # Wilson for n = 96: 0.8125 reaches up to 0.878, 0.5 up to 0.598; 0.875 begins at 0.794.
    assert compare(runs).headline == (
        "a comes first: the chosen completion has the higher reward in 87.5% of 96 held-out pairs (95% interval 79.4% "
        "to 92.7%). The interval of 1 other run overlaps with it, so the order among these may be chance."
    )
    assert "overlap" not in compare([runs[0], runs[2]]).headline
    assert compare([make_one("d", None)]).headline.startswith("No accuracy on held-out pairs")


def test_one_run_is_a_comparison_too(make_one: MakeOne, tmp_path: Path) -> None:
    comparison = compare([make_one("a")])
    assert (comparison.different, comparison.warnings, comparison.notes) == ((), (), ())
    assert "Settings: method dpo" in " ".join(printed(comparison))
    page = page_of(comparison, tmp_path)
    assert "<h1>1 run compared</h1>" in page
    assert "<h2>Settings</h2>" in page


def test_runs_of_one_name_are_told_apart_and_one_given_twice_counts_once(make_one: MakeOne) -> None:
    runs = [make_one("x/run"), make_one("y/run"), make_one("z/other")]
    names = [row.name for row in compare([*runs, runs[0], runs[0] / ".." / "run"]).rows]
    assert sorted(names) == ["other", "x/run", "y/run"]


def test_a_run_that_has_just_begun_stands_at_the_end(make_one: MakeOne, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "run.yaml").write_text("method: dpo\nlearning_rate: 5e-7\n", encoding="utf-8")
    comparison = compare([fresh, make_one("a")])
    assert comparison.rows[1].settings == {"method": "dpo", "learning_rate": 5e-7}
    assert set(comparison.rows[1].figures.values()) == {None}
    assert "fresh (not begun)" in " ".join(comparison.warnings)
    assert "Not drawn, for want of a held-out accuracy: 1." in page_of(comparison, tmp_path)


@pytest.mark.parametrize(
    ("run_file", "words"),
    [
        (None, "is no run directory: it holds no run.yaml"),
        ("a: [", "run.yaml: is not YAML"),
        ("a: 2026-99-99", "is not"),
    ],
)
def test_what_is_no_run_is_the_users_to_mend(tmp_path: Path, run_file: str | None, words: str) -> None:
    if run_file is not None:
        (tmp_path / "run.yaml").write_text(run_file, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        compare([tmp_path])


def test_nothing_and_nowhere_are_the_users_to_mend(make_one: MakeOne, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one run directory"):
        compare([])
    with pytest.raises(UserError, match="no such run directory"):
        compare([make_one("a"), tmp_path / "nowhere"])
    with pytest.raises(UserError, match="cannot be written"):
        write_comparison(compare([tmp_path / "a"]), tmp_path / "nowhere" / "compare.html")


def test_json_holds_the_numbers_and_every_program_reads_it(make_one: MakeOne) -> None:
    run_dir = make_one("a", after={"kl": 0.03})
    (run_dir / "run.yaml").write_text("learning_rate: .nan\nseed: .inf\nx: 2026-01-01\nlist: [a, 2]\n")
    told = json.loads(json.dumps(to_json(compare([run_dir, make_one("b", 0.5)])), allow_nan=False))
    assert [(run["name"], run["accuracy"], run["kl"]) for run in told["runs"]] == [("a", 0.875, 0.03), ("b", 0.5, None)]
    assert told["runs"][0]["interval"] == pytest.approx([0.794, 0.927], abs=5e-4)
    settings = {"learning_rate": "nan", "seed": "inf", "x": "2026-01-01", "list": "a, 2"}
    assert settings.items() <= told["runs"][0]["settings"].items()
    assert told["baselines"]["longer one wins"] == 0.3
    assert told["runs"][0]["hashes"] == {"model": "m" * 64, "train": "t" * 64, "eval": "e" * 64}


def test_nothing_in_the_page_can_run_or_fetch(make_one: MakeOne, tmp_path: Path) -> None:
    page = page_of(compare([make_one("a"), make_one("b", 0.5)]), tmp_path)
    dom = Dom(page)
    assert dom.open == []
    assert not {tag for tag, _ in dom.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in dom.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style", "href")]
    (policy,) = (a["content"] for t, a in dom.tags if a.get("http-equiv") == "Content-Security-Policy")
    (css,) = re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL)
    import base64
    import hashlib

    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_texts_are_shown_and_never_obeyed(make_one: MakeOne, tmp_path: Path) -> None:
    odd = make_one("<img src=x onerror=alert(1)>\x1b[31m&amp;\n", method="dpo")
    summary = {"status": EVIL, "method": EVIL, "loss": {"name": EVIL, EVIL: EVIL}, "model_sha256": {"a": EVIL}}
    write_json(odd / "summary.json", {**summary, "steps": EVIL})
    run = {"model": EVIL.replace("\ud800", ""), EVIL.replace("\ud800", ""): "\x07", "seed": {"a": [EVIL[:30]]}}
    (odd / "run.yaml").write_text(json.dumps(run), encoding="utf-8")
    comparison = compare([odd, make_one("b", 0.5)])
    page = page_of(comparison, tmp_path)
    dom = Dom(page)
    assert dom.open == []
    assert not {tag for tag, _ in dom.tags} & {"script", "img", "textarea"}
    assert not [a for _, a in dom.tags if "onerror" in a]
    assert "<img src=x onerror=alert(1)>␛[31m&amp;" in dom.text()
    assert dom.text().count("<script>alert(1)</script>") >= 3
    for text in (page, as_markdown(comparison), json.dumps(to_json(comparison), ensure_ascii=False)):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "".join(printed(comparison)))


def test_a_comparison_is_made_without_torch(make_one: MakeOne, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from penchant.report import compare, write_comparison; "
        f"path = pathlib.Path({str(make_one('a'))!r}); write_comparison(compare([path]), path / 'c.html'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "Held-out accuracy" in (tmp_path / "a" / "c.html").read_text(encoding="utf-8")


BOTH = {"lengths": {"desirable": {}, "undesirable": {}}}
COMPLETIONS = {"unit": "completion", "used": 320, "desirable": 160, "sha256": "c" * 64, **BOTH}
TWICE = {"steps": 40, "examples_seen": 320}


def test_the_same_rows_taken_as_completions_are_no_other_data(make_one: MakeOne) -> None:
    kto = make_one("k", 0.75, method="kto", train_data=COMPLETIONS, summary=TWICE)
    comparison = compare([make_one("a"), make_one("b"), kto])
    assert comparison.warnings == ()
    assert comparison.notes[0] == (
        "All learned from the same rows, taken as pairs (a, b) and as completions (k): hence 20 to 40 steps and "
        "160 to 320 examples seen."
    )
    assert [row.units for row in comparison.rows] == [{"train": "pair", "eval": "pair"}] * 2 + [
        {"train": "completion", "eval": "pair"}
    ]
    assert "87.5% of 96 held-out pairs (95% interval 79.4% to 92.7%). The intervals of 2 others" in comparison.headline


def test_completions_of_another_file_are_other_data(make_one: MakeOne) -> None:
    for change in ({"path": "other.jsonl"}, {"families": {"trl": 255}}):
        name = next(iter(change))
        other = make_one(f"{name}/k", method="kto", train_data={**COMPLETIONS, **change}, summary=TWICE)
        warnings = compare([make_one(f"{name}/a"), other]).warnings
        assert warnings == (
            "The runs were not trained on the same examples (2 kinds: a; k).",
            "The runs did not go equally far: 20 to 40 steps and 160 to 320 examples seen.",
        )


def test_runs_of_one_kind_that_differ_are_not_excused_by_another_kind(make_one: MakeOne) -> None:
    kto = make_one("k", method="kto", train_data=COMPLETIONS, summary=TWICE)
    half = make_one("h", summary={"steps": 10, "examples_seen": 80})
    assert compare([make_one("a"), half, kto]).warnings == (
        "The runs did not go equally far: 10 to 40 steps and 80 to 320 examples seen.",
    )
    other = make_one("o", train_data={"sha256": "x"})
    (warning,) = compare([make_one("b"), other, kto]).warnings[:1]
    assert warning == "The runs were not trained on the same examples (3 kinds: b; k; o)."


def test_runs_on_completions_are_compared_in_their_words(make_one: MakeOne, tmp_path: Path) -> None:
    part = {"unit": "completion", "used": 20, "desirable": 8, "longer_wins": None, "sha256": "e", **BOTH}
    runs = [make_one(name, share, train_data=part, held_out_data=part) for name, share in (("a", 0.75), ("b", 0.5))]
    comparison = compare(runs)
    # Hanley and McNeil of 8 and 12: 0.75 down to 0.519; 0.5 up to 0.5 + 1.96 sqrt(0.0182292) = 0.765.
    assert comparison.headline == (
        "a comes first: the desirable completion has the higher reward in 75.0% of the couples of a desirable and an "
        "undesirable one among 20 held-out completions (95% interval 51.9% to 98.1%). The interval of 1 other run "
        "overlaps with it, so the order among these may be chance."
    )
    assert comparison.baselines == {"chance": 0.5}
    page = page_of(comparison, tmp_path)
    assert "% of held-out couples with the desirable one ahead" in page
    assert '<th scope="col" class="number">Undesirable reward</th>' in page
    assert "Held out<small>completions</small>" in page
    assert not [
        word
        for word in ("pair", "hosen", "ejected")
        if word in page.partition("</style>")[2].replace("pairs.jsonl", "")
    ]


def test_rankings_beside_pairs_are_told_in_words_true_of_both(make_one: MakeOne, tmp_path: Path) -> None:
    ranking = {"unit": "ranking", "sha256": "r"}
    runs = [make_one("a", 0.75), make_one("r", train_data=ranking, held_out_data=ranking)]
    comparison = compare(runs)
    agreement = "the better completion has the higher reward in 87.5% of the couples within 96 held-out rankings"
    assert comparison.headline == f"r comes first: {agreement}."
    assert comparison.warnings == (
        "Not comparable: the held-out examples are not the same (2 kinds: r; a), so accuracies answer different "
        "questions.",
    )
    assert "All learned from the same rows, taken as rankings (r) and as pairs (a)." in comparison.notes
    # The length rule is about all pairs of the one and about best and worst of the other: no line for both.
    assert comparison.baselines == {"chance": 0.5}
    assert "% of held-out couples with the better one ahead" in page_of(comparison, tmp_path)


def test_the_length_rule_of_rankings_says_what_it_is_about(make_one: MakeOne) -> None:
    runs = [make_one(name, held_out_data={"unit": "ranking"}) for name in "ab"]
    assert compare(runs).baselines == pytest.approx(
        {
            "chance": 0.5,
            "longer one wins, best against worst": 0.3,
            "shorter one wins, at most, best against worst": 0.7,
        }
    )


@pytest.mark.parametrize(
    ("references", "is_said"),
    [(("a frozen copy", "none"), True), (("a frozen copy", "precomputed"), False), (("none", "none"), False)],
)
def test_accuracies_with_and_without_a_reference_are_said_to_answer_different_questions(
    make_one: MakeOne, references: tuple[str, str], is_said: bool
) -> None:
    runs = [make_one(name, summary={"reference": kind}) for name, kind in zip("ab", references, strict=True)]
    said = [note for note in compare(runs).notes if "answer different questions" in note]
    assert bool(said) == is_said
    assert all(note.startswith("Without a reference (b) a completion's reward is its likelihood") for note in said)

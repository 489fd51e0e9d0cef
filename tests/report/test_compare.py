"""Runs side by side: the figures are those of the run directories, and what cannot be compared is said to be so."""

import io
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from rich.cells import cell_len
from rich.console import Console

from penchant.errors import UserError
from penchant.report import as_markdown, compare, print_comparison, to_json, write_comparison
from penchant.report.compare import Comparison
from penchant.report.figures import percent
from penchant.report.intervals import Interval, interval_chart, short_names
from tests.report.conftest import write_json, write_jsonl
from tests.report.test_page import EVIL, Dom, charts_of

DPO = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}
IPO = {"name": "ipo", "beta": 0.1}
MakeOne = Callable[..., Path]


def held_out(step: int, accuracy: float, **more: float) -> dict[str, Any]:
    line = {"rewards/accuracies": accuracy, "rewards/chosen": 0.0, "rewards/rejected": 0.0, **more}
    return {"step": step, **{f"eval_{name}": value for name, value in line.items()}}


@pytest.fixture
def make_one(tmp_path: Path) -> MakeOne:
    """Makes a small run directory; settings go into the run file, `summary` and `data` over what is there."""

    def make(
        name: str,
        accuracy: float | None = 0.875,
        *,
        loss: dict[str, Any] = DPO,
        method: str = "dpo",
        before: dict[str, Any] | None = None,
        after: dict[str, float] | None = None,
        summary: dict[str, Any] | None = None,
        held_out_data: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Path:
        run_dir = tmp_path / name
        run_dir.mkdir(parents=True)
        run = {"model": "owner/tiny", "data": "pairs.jsonl", "output_dir": str(run_dir), "method": method, "loss": loss}
        run |= {"learning_rate": 5e-7, "batch_size": 8, "seed": 0, "logging_steps": 1, **settings}
        (run_dir / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
        lines = [before or held_out(0, 0.5)]
        lines += [] if accuracy is None else [held_out(20, accuracy, **(after or {}))]
        write_jsonl(run_dir / "metrics.jsonl", lines)
        evaluated = {"used": 96, "longer_wins": 0.3, "sha256": "e" * 64, **(held_out_data or {})}
        write_json(run_dir / "data.json", {"train": {"used": 160, "sha256": "t" * 64}, "eval": evaluated})
        told = {"status": "finished", "method": method, "loss": loss, "steps": 20, "pairs_seen": 160}
        told |= {"wall_s": 250.0, "peak_memory_bytes": 3 * 2**30, "model_sha256": "m" * 64, **(summary or {})}
        write_json(run_dir / "summary.json", told)
        return run_dir

    return make


def printed(comparison: Comparison, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_comparison(comparison, console)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def table_of(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr.*?</tr>", page, flags=re.DOTALL)
    return [[Dom(cell).text() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.DOTALL)] for row in rows]


def page_of(comparison: Comparison, tmp_path: Path) -> str:
    return write_comparison(comparison, tmp_path / "compare.html").read_text(encoding="utf-8")


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
        "answer_length": 5.0,
        "held_out_loss": 0.41,
        "margin": 1.5,
        "chosen_reward": -0.5,
        "rejected_reward": -2.0,
        "chosen_logps_change": -6.5,
        "steps": 20,
        "pairs_seen": 160,
        "wall_s": 250.0,
        "peak_memory_bytes": 3 * 2**30,
    }


def test_the_accuracy_of_a_model_that_is_its_own_reference_is_left_out(make_one: MakeOne) -> None:
    (row,) = compare([make_one("a", before=held_out(0, 0.43))]).rows
    assert row.figures["accuracy_before"] is None


def test_the_most_accurate_comes_first_and_the_unmeasured_last(make_one: MakeOne) -> None:
    accuracies = {"fair": 0.75, "none": None, "best": 0.9375, "twin": 0.75, "poor": 0.25}
    comparison = compare([make_one(name, accuracy) for name, accuracy in accuracies.items()])
    assert [row.name for row in comparison.rows] == ["best", "fair", "twin", "poor", "none"]


def test_baselines_stand_where_their_accuracy_puts_them(make_one: MakeOne, tmp_path: Path) -> None:
    runs = [make_one(name, share) for name, share in (("good", 0.75), ("even", 0.5), ("bad", 0.25))]
    comparison = compare([*runs, make_one("none", None)])
    assert comparison.baselines == pytest.approx(
        {"chance": 0.5, "longer one wins": 0.3, "shorter one wins, at most": 0.7}
    )
    order = ["good", "shorter one wins, at most", "even", "chance", "longer one wins", "bad", "none"]
    assert [row[0] for row in table_of(page_of(comparison, tmp_path))[1:]] == order


def test_different_shares_of_longer_completions_are_a_column_and_no_line(make_one: MakeOne, tmp_path: Path) -> None:
    comparison = compare([make_one("a"), make_one("b", held_out_data={"longer_wins": 0.62})])
    assert comparison.baselines == {"chance": 0.5}
    head, *rows = table_of(page_of(comparison, tmp_path))
    place = next(i for i, label in enumerate(head) if label.startswith("Longer wins"))
    assert [row[place] for row in rows] == ["30.0%", "62.0%", ""]


def test_settings_that_differ_are_columns_and_the_others_are_told_once(make_one: MakeOne, tmp_path: Path) -> None:
    runs = [make_one(f"r{i}", loss={**DPO, "beta": beta}, logging_steps=i) for i, beta in enumerate((0.1, 0.05), 1)]
    comparison = compare([*runs, make_one("r3", loss={**DPO, "beta": 0.0123456}, lora={"rank": 8})])
    assert comparison.different == ("loss.beta", "lora.rank", "logging_steps")
    same = {"method": "dpo", "loss.name": "dpo", "loss.label_smoothing": 0.0, "model": "owner/tiny"}
    assert comparison.same == same | {"data": "pairs.jsonl", "learning_rate": 5e-7, "batch_size": 8, "seed": 0}
    head, *rows = table_of(page_of(comparison, tmp_path))
    assert head[:4] == ["Run", "loss.beta", "lora.rank", "logging_steps"]
    cells = {row[0]: row[1:4] for row in rows}
    # A setting is not rounded: two that differ in the fourth digit must not look the same.
    assert cells["r1"] == ["0.1", "–", "1"]
    assert cells["r3"] == ["0.0123456", "8", "1"]
    said = " ".join(" ".join(printed(comparison)).split())
    assert "The same in all: method dpo, loss.name dpo, loss.label_smoothing 0, model owner/tiny" in said
    assert "learning_rate 5e-7" in said


def test_losses_with_settings_of_their_own_share_one_column(make_one: MakeOne, tmp_path: Path) -> None:
    terms = {"dpo": {"weight": 1.0, "beta": 0.1}, "sft": {"weight": 0.2}}
    runs = [make_one("d"), make_one("i", loss=IPO, method="ipo"), make_one("r", loss=terms, method="rpo")]
    comparison = compare(runs)
    assert comparison.different == ("method", "loss")
    assert not [key for key in comparison.same if key.startswith("loss")]
    cells = {row[0]: row[1:3] for row in table_of(page_of(comparison, tmp_path))}
    assert cells["d"] == ["dpo", "beta = 0.1, label_smoothing = 0"]
    assert cells["i"] == ["ipo", "beta = 0.1"]
    assert cells["r"] == ["rpo", "1 × dpo, beta = 0.1; 0.2 × sft"]
    assert comparison.rows[2].loss == terms


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
        ({"summary": {"steps": 30, "pairs_seen": 240}}, "20 to 30 steps and 160 to 240 pairs seen"),
        ({"summary": {"pairs_seen": 80}}, "not go equally far: 80 to 160 pairs seen."),
        ({"summary": {"status": "running"}}, "Not finished, so these figures may change: c (running)."),
    ],
)
def test_what_cannot_be_compared_is_said(make_one: MakeOne, changes: dict[str, Any], words: str) -> None:
    comparison = compare([make_one("a"), make_one("b"), make_one("c", **changes)])
    (warning,) = comparison.warnings
    assert words in warning
    assert words in " ".join(line.strip() for line in printed(comparison))


def test_other_training_pairs_are_said(make_one: MakeOne) -> None:
    other = make_one("b")
    write_json(other / "data.json", {"train": {"sha256": "x"}, "eval": {"used": 96, "sha256": "e" * 64}})
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


def many(make_one: MakeOne, num_runs: int) -> Comparison:
    accuracies = {i: (i * 37 % 97) / 96 for i in range(num_runs)}
    methods = ("dpo", "ipo", "kto")
    runs = [
        make_one(f"SmolLM2-135M-Instruct-{methods[i % 3]}-{i}", accuracy, loss={**DPO, "beta": i / 10}, seed=i)
        for i, accuracy in accuracies.items()
    ]
    return compare(runs)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_printed_table_fits_the_terminal(make_one: MakeOne, width: int) -> None:
    comparison = many(make_one, 35)
    lines = printed(comparison, width)
    assert max(map(cell_len, lines)) <= width
    head = next(i for i, line in enumerate(lines) if line.startswith("Run "))
    table = lines[head : lines.index("", head)]
    for row in comparison.rows:
        (line,) = (line for line in table if line.split(" ")[0].endswith(f"-{row.settings['seed']}"))
        assert percent(row.figures["accuracy"]) in line
        if width >= 80:
            low, high = row.figures["interval"]
            assert f"{100 * low:.1f}–{100 * high:.1f}%" in line
            assert f"{row.settings['loss.beta']:g}" in line.split()
    gone = " ".join(lines).partition("No room for: ")[2].partition(". ")[0]
    for label in ("Pairs", "Memory", "Steps", "Time"):
        assert (label in table[0]) != (label in gone)


def test_names_are_no_markup_in_the_terminal(make_one: MakeOne) -> None:
    text = "\n".join(printed(compare([make_one("[red]a"), make_one("\\[b]", model="[bold]")])))
    for name in ("[red]a ", "\\[b] ", "[bold] "):
        assert name in text


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


def test_markdown_is_one_table_of_even_rows_without_local_paths(make_one: MakeOne) -> None:
    model = "/home/ada/models/tiny|x"
    text = as_markdown(compare([make_one("a|b*", model=model), make_one("c", 0.5, model=model, seed=3)]))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert lines[0].startswith("| run | seed | Accuracy, held-out | 95% interval, of the accuracy | Held out, pairs |")
    assert lines[2].startswith(r"| a\|b\* | 0 | 87.5% | 79.4–92.7% | 96 |")
    assert "ada" not in text
    assert r"model tiny\|x" in text


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


def coordinate(element: ElementTree.Element, name: str) -> float:
    return float(element.get(name, ""))


@pytest.mark.parametrize("num_runs", [1, 2, 40])
def test_the_chart_shows_the_figures_of_the_table(make_one: MakeOne, tmp_path: Path, num_runs: int) -> None:
    comparison = many(make_one, num_runs)
    page = page_of(comparison, tmp_path)
    chart = charts_of(page)["Held-out accuracy"]
    ticks = [t for t in chart.iter("text") if t.get("class") == "tick x"]
    ticks = [t for t in ticks if t.get("y") == ticks[0].get("y")]
    (x0, v0), (x1, v1) = ((coordinate(t, "x"), float(t.text or "")) for t in (ticks[0], ticks[-1]))

    def value(x: float) -> float:
        return v0 + (x - x0) * (v1 - v0) / (x1 - x0)

    def close(found: float, expected: float) -> bool:
        return abs(found - expected) <= 0.11 * (v1 - v0) / (x1 - x0)  # a coordinate has one decimal

    table = {row[0]: row for row in table_of(page)}
    groups = list(chart.iter("g"))
    assert len(groups) == num_runs
    for group, row in zip(groups, comparison.rows, strict=True):
        (dot,), (bar,) = group.iter("circle"), (e for e in group.iter("line") if "held-out" in e.get("class", ""))
        low, high = row.figures["interval"]
        assert close(value(coordinate(dot, "cx")), 100 * row.figures["accuracy"])
        assert close(value(coordinate(bar, "x1")), 100 * low)
        assert close(value(coordinate(bar, "x2")), 100 * high)
        assert (group.findtext("title") or "").startswith(f"{row.name}: {percent(row.figures['accuracy'])}, 95% ")
        assert percent(row.figures["accuracy"]) in table[row.name]
        assert f"{100 * low:.1f}–{100 * high:.1f}%" in table[row.name]
        assert row.name in (chart.findtext("desc") or "")
    lines = [line for line in chart if line.get("class") in ("zero", "base")]
    assert [line.get("class") for line in lines] == ["zero", "base", "base"]
    for line, expected in zip(lines, (50.0, 30.0, 70.0), strict=True):
        assert close(value(coordinate(line, "x1")), expected)


@pytest.mark.parametrize("num_runs", [2, 40])
def test_forty_rows_neither_touch_nor_leave_the_drawing(make_one: MakeOne, tmp_path: Path, num_runs: int) -> None:
    chart = charts_of(page_of(many(make_one, num_runs), tmp_path))["Held-out accuracy"]
    width, height = map(float, chart.get("viewBox", "").split()[2:])
    rows = [coordinate(dot, "cy") for dot in chart.iter("circle")]
    # Letters are 11 high; the bottom holds the ticks and the unit.
    assert all(b - a >= 15 for a, b in itertools.pairwise(rows))
    assert rows[-1] < height - 40
    assert width == 360
    names = [text for group in chart.iter("g") for text in group.iter("text")][::2]
    assert len({text.text for text in names}) == num_runs
    bars = [coordinate(bar, "x1") for bar in chart.iter("line") if "held-out" in bar.get("class", "")]
    assert max(6.1 * cell_len(text.text or "") for text in names) < min(bars)


def test_a_share_without_an_interval_is_a_mark_alone() -> None:
    svg = ElementTree.fromstring(interval_chart("c", "T", "%", [Interval("a", 0.5), Interval("b", 0.5)], []))
    assert len(list(svg.iter("circle"))) == 2
    assert not [line for line in svg.iter("line") if "held-out" in line.get("class", "")]
    assert svg.findtext("desc") == "a: 50.0%; b: 50.0%"


def test_names_lose_their_common_beginning_before_their_middle() -> None:
    assert short_names(["model-dpo", "model-ipo"], 24) == ["model-dpo", "model-ipo"]
    assert short_names(["model-dpo", "model-dpo-2", "model-ipo"], 8) == ["…dpo", "…dpo-2", "…ipo"]
    assert short_names(["abcdefghijkl"], 7) == ["abc…jkl"]
    assert short_names(["runs and more", "other"], 24) == ["runs and more", "other"]
    wide = short_names(["模型" * 20, "x"], 11)
    assert wide[0].count("…") == 1
    assert cell_len(wide[0]) <= 11
    assert short_names(["same-long-name"] * 2, 8) == ["same…ame"] * 2


def test_a_comparison_is_made_without_torch(make_one: MakeOne, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from penchant.report import compare, write_comparison; "
        f"path = pathlib.Path({str(make_one('a'))!r}); write_comparison(compare([path]), path / 'c.html'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "Held-out accuracy" in (tmp_path / "a" / "c.html").read_text(encoding="utf-8")

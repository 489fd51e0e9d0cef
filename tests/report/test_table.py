"""The table and the chart of a comparison: everywhere the figures of the runs, in a terminal those it has room for."""

import io
import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.cells import cell_len
from rich.console import Console

from penchant.report import as_markdown, compare, print_comparison, write_comparison
from penchant.report.compare import Comparison
from penchant.report.figures import percent
from penchant.report.intervals import Interval, interval_chart, short_names
from tests.report.conftest import DPO, IPO, MakeOne
from tests.report.test_page import Dom, charts_of


def printed(comparison: Comparison, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_comparison(comparison, console)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def table_of(page: str) -> list[list[str]]:
    page = page.partition('<section id="runs">')[2].partition("</section>")[0]
    rows = re.findall(r"<tr.*?</tr>", page, flags=re.DOTALL)
    return [[Dom(cell).text() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.DOTALL)] for row in rows]


def page_of(comparison: Comparison, tmp_path: Path) -> str:
    return write_comparison(comparison, tmp_path / "compare.html").read_text(encoding="utf-8")


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
    head, *rows = table_of(page_of(comparison, tmp_path))
    place = head.index("loss settings")
    cells = {row[0]: (row[1], row[place]) for row in rows}
    assert cells["d"] == ("dpo", "beta = 0.1, label_smoothing = 0")
    assert cells["i"] == ("ipo", "beta = 0.1")
    assert cells["r"] == ("rpo", "1 × dpo, beta = 0.1; 0.2 × sft")
    assert comparison.rows[2].loss == terms


def sweep(make_one: MakeOne) -> Comparison:
    """Methods times beta, called as a sweep calls its runs; each method has loss settings of its own."""
    after = {"loss": 0.4, "kl": 0.0312, "rewards/margins": 0.75, "rewards/chosen": 0.25, "rewards/rejected": -0.5}
    losses = {"dpo": {"label_smoothing": 0.0}, "kto": {"desirable_weight": 1.0, "undesirable_weight": 1.0}}
    runs = [
        make_one(
            f"sweep/{name},beta={beta}", 0.875, loss={"name": name, "beta": beta, **more}, method=name, after=after
        )
        for name, more in losses.items()
        for beta in (0.05, 0.5)
    ]
    return compare(runs)


def test_eighty_cells_go_to_the_figures_before_what_the_names_say_already(make_one: MakeOne) -> None:
    lines = printed(sweep(make_one), 80)
    (row,) = (line for line in lines if line.startswith("kto,beta=0.05 "))
    assert row.split() == ["kto,beta=0.05", "87.5%", "79.4–92.7%", "0.0312", "0.75", "0.25", "−0.5", "0.4"]
    gone = " ".join(lines).partition("No room for: ")[2].partition(". ")[0]
    assert gone.startswith("loss settings, Time, Steps,")
    assert "method" not in gone


def test_with_room_for_all_the_table_says_it_all(make_one: MakeOne) -> None:
    lines = printed(sweep(make_one), 200)
    assert "No room for" not in " ".join(lines)
    (head,) = (line.split() for line in lines if line.startswith("Run "))
    assert head[-1] == "method"
    (row,) = (line for line in lines if line.startswith("kto,beta=0.05 "))
    assert "beta = 0.05, …" in row


def test_a_method_that_the_name_does_not_tell_stands_beside_it(make_one: MakeOne) -> None:
    lines = printed(compare([make_one("a"), make_one("b", 0.5, loss=IPO, method="ipo")]), 48)
    assert [line.split() for line in lines if line.startswith(("a  ", "b  "))] == [
        ["a", "dpo", "87.5%", "79.4–92.7%"],
        ["b", "ipo", "50.0%", "40.2–59.8%"],
    ]


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
    for label in ("Examples", "Memory", "Steps", "Time"):
        assert (label in table[0]) != (label in gone)


def test_names_are_no_markup_in_the_terminal(make_one: MakeOne) -> None:
    text = "\n".join(printed(compare([make_one("[red]a"), make_one("\\[b]", model="[bold]")])))
    for name in ("[red]a ", "\\[b] ", "[bold] "):
        assert name in text


def test_markdown_is_one_table_of_even_rows_without_local_paths(make_one: MakeOne) -> None:
    model = "/home/ada/models/tiny|x"
    text = as_markdown(compare([make_one("a|b*", model=model), make_one("c", 0.5, model=model, seed=3)]))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert lines[0].startswith("| run | seed | Accuracy, held-out | 95% interval, of the accuracy | Chosen reward |")
    assert lines[0].endswith(" | Held out, pairs | Examples, seen | Memory, peak |")
    assert lines[2].startswith(r"| a\|b\* | 0 | 87.5% | 79.4–92.7% | 0 | 0 |")
    assert lines[2].endswith(" | 96 | 160 | 3 GiB |")
    assert "ada" not in text
    assert r"model tiny\|x" in text


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

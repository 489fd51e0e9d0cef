"""The page: whole or in part, it tells what the directory holds, and nothing in it can run."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from penchant.errors import UserError
from penchant.report import write_report
from penchant.report.rundir import read_run

MakeRun = Callable[..., Path]
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Dom(HTMLParser):
    """The elements of a page as a browser's parser would see them: tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, tag: str | None = None) -> str:
        return " ".join(" ".join(data for inside, data in self.texts if tag in (None, inside)).split())


def page_of(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def charts_of(page: str) -> dict[str, ElementTree.Element]:
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg [^>]*role=.*?</svg>", page, flags=re.DOTALL)]
    return {chart.findtext("title") or "": chart for chart in charts}


def test_a_finished_run_is_told_in_full(make_run: MakeRun) -> None:
    page = page_of(make_run())
    dom = Dom(page)
    assert dom.open == []
    headings = [data for tag, data in dom.texts if tag == "h2"]
    order = ["Key figures", "Curves", "Pairs after training", "Samples before and after", "Data", "Events", "Run file"]
    assert headings == [*order, "Versions and hashes"]
    said = dom.text()
    for figure in ("44.6%", "6 min 53 s", "3.17 GiB", "135 million", "dpo, beta = 0.1", "5af571cbf074e6d2", "2.13.0"):
        assert figure in said
    for sentence in (
        "the prompt has 2,310 tokens",
        "KL is above 0.1 nats",
        "method: dpo",
        "/home/ada/data/pairs.jsonl",
    ):
        assert sentence in said
    titles = ["Loss", "Accuracy", "Reward margin", "Rewards", "Log-probabilities", "KL to the reference", "Entropy"]
    titles += ["Lengths", "Learning rate", "Gradient norm", "Chosen and rejected rewards"]
    assert set(charts_of(page)) == set(titles)


def test_curves_and_tables_end_at_the_values_of_the_log(make_run: MakeRun) -> None:
    metrics = [{"step": 0, "eval_loss": 0.7}, *({"step": s, "loss": 1 / s} for s in range(1, 41))]
    metrics.append({"step": 40, "eval_loss": 0.125})
    page = page_of(make_run({"metrics.jsonl": metrics}))
    chart = charts_of(page)["Loss"]
    description = chart.findtext("desc") or ""
    assert "training: first 1 at step 1, last 0.025 at step 40" in description
    assert "held-out: first 0.7 at step 0, last 0.125 at step 40" in description
    ticks = [(float(t.get("y", "")), float(t.text or "")) for t in chart.iter("text") if t.get("class") == "tick y"]
    (y0, v0), (y1, v1) = ticks[0], ticks[-1]
    ends = [float(p.get("points", "").split()[-1].split(",")[1]) for p in chart.iter("polyline")]
    assert [v0 + (y - y0) * (v1 - v0) / (y1 - y0) for y in ends] == pytest.approx([0.025, 0.125], abs=0.001)
    assert re.search(r"<td>40</td><td>0.025</td><td>0.125</td>", page)


def test_accuracy_is_drawn_against_the_longer_completion(make_run: MakeRun) -> None:
    chart = charts_of(page_of(make_run()))["Accuracy"]
    bases = [line for line in chart.iter("line") if line.get("class") == "base"]
    ticks = [(float(t.get("y", "")), float(t.text or "")) for t in chart.iter("text") if t.get("class") == "tick y"]
    (y0, v0), (y1, v1) = ticks[0], ticks[-1]
    levels = [v0 + (float(base.get("y1", "")) - y0) * (v1 - v0) / (y1 - y0) for base in bases]
    assert levels == pytest.approx([44.6, 55.4], abs=0.1)


def test_nothing_in_the_page_can_run_or_fetch(make_run: MakeRun) -> None:
    page = page_of(make_run())
    dom = Dom(page)
    assert not {tag for tag, _ in dom.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in dom.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style", "xlink:href")]
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in page
    assert "@import" not in page
    (policy,) = (a["content"] for t, a in dom.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_the_policy_names_the_style_sheet_that_is_in_the_page(make_run: MakeRun) -> None:
    import base64
    import hashlib

    page = page_of(make_run())
    (css,) = re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL)
    assert f"sha256-{base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()}" in page


EVIL = "<script>alert(1)</script></textarea></pre></style>\"'><img src=x onerror=alert(2)>&amp;\x00\x1b[31m\ud800\x9f"


@pytest.mark.parametrize("idle", ["pairs.jsonl", "completions.jsonl"])
def test_texts_are_shown_and_never_obeyed(make_run: MakeRun, idle: str) -> None:
    names = ("source", "prompt", "chosen", "rejected")
    lengths = {"mean": 1, "median": EVIL, "max": None}
    data = {"path": EVIL, "rows": 2, "families": {EVIL: 1}, "used": 1, "dropped": {EVIL: 1}, "examples": [EVIL]}
    parts = {
        "samples.jsonl": [{"prompt": EVIL, "before": EVIL, "after": EVIL, "chosen": EVIL}],
        "pairs.jsonl": [{**dict.fromkeys(names, EVIL), "chosen_reward": 1.0, "rejected_reward": 0.5, "split": EVIL}],
        "completions.jsonl": [{**dict.fromkeys(names, EVIL), "completion": EVIL, "desirable": EVIL, "reward": 1.0}],
        "events.jsonl": [{"step": EVIL, "severity": EVIL, "code": EVIL, "message": EVIL}],
        "metrics.jsonl": [{"step": 1, "loss": 1.0, EVIL: 2.0}],
        "data.json": {"train": {**data, "lengths": {EVIL: lengths}, "unit": EVIL}, "eval": None},
        "summary.json": {"model": EVIL, "loss": {"name": EVIL}, "versions": {EVIL: EVIL}, "reference": EVIL},
        "run.yaml": EVIL.replace("\ud800", ""),
    }
    page = page_of(make_run({**parts, idle: None}))
    dom = Dom(page)
    assert dom.open == []
    assert not {tag for tag, _ in dom.tags} & {"script", "img", "textarea"}
    assert not [a for _, a in dom.tags if "onerror" in a]
    shown = "<script>alert(1)</script></textarea></pre></style>\"'><img src=x onerror=alert(2)>&amp;␀␛[31m"
    assert dom.text().count(shown) >= 15
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", page)


@pytest.mark.parametrize(
    "name", ["run.yaml", "metrics.jsonl", "events.jsonl", "samples.jsonl", "pairs.jsonl", "data.json", "summary.json"]
)
def test_any_part_may_be_missing(make_run: MakeRun, name: str) -> None:
    dom = Dom(page_of(make_run({name: None})))
    assert dom.open == []
    assert len([tag for tag, _ in dom.tags if tag == "section"]) == 8


def test_an_empty_directory_makes_a_page_of_short_sentences(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "Nothing has been measured yet." in page
    assert "No measurements have been written." in page
    assert not charts_of(page)


def test_a_directory_that_is_not_there_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        write_report(tmp_path / "nowhere")


def test_a_cut_last_line_is_passed_over_and_a_broken_one_counted(make_run: MakeRun) -> None:
    run_dir = make_run(
        {"metrics.jsonl": '{"step": 1, "loss": 0.5}\nnonsense\n{"step": 2, "loss": 0.4}\n{"step": 3, "lo'}
    )
    run = read_run(run_dir)
    assert run.series("loss").points == ((1, 0.5), (2, 0.4))
    assert run.num_unreadable == 1
    assert "could not be read and were passed over: 1." in page_of(run_dir)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "samples.jsonl", "pairs.jsonl", "completions.jsonl"])
@pytest.mark.parametrize("rows", ['[]\n"x"\n3\nnull\n{}\n', '{"step": {}, "prompt": 3, "chosen": [1, {"role": 2}]}\n'])
def test_rows_of_another_make_do_no_harm(make_run: MakeRun, name: str, rows: str) -> None:
    assert Dom(page_of(make_run({name: rows}))).open == []


def test_a_resumed_run_counts_the_later_line_of_a_step(make_run: MakeRun) -> None:
    metrics = [{"step": s, "loss": 1.0} for s in (1, 2, 3)] + [{"step": s, "loss": 0.5} for s in (2, 3, 4)]
    run = read_run(make_run({"metrics.jsonl": metrics}))
    assert run.series("loss").points == ((1, 1.0), (2, 0.5), (3, 0.5), (4, 0.5))


def test_values_that_are_not_finite_are_gaps(make_run: MakeRun) -> None:
    lines = '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n{"step": 3, "loss": NaN}\n{"step": 4, "loss": 0.3}\n'
    page = page_of(make_run({"metrics.jsonl": lines}))
    assert len(list(charts_of(page)["Loss"].iter("polyline"))) == 2
    assert "2 values are not finite" in page
    assert "<td>3</td><td>not finite</td>" in page


def test_only_values_that_are_not_finite_make_no_chart(make_run: MakeRun) -> None:
    page = page_of(make_run({"metrics.jsonl": [{"step": 1, "loss": None}]}))
    assert not set(charts_of(page)) & {"Loss", "Accuracy"}
    assert "the training has diverged" in page


def test_a_single_line_makes_a_chart(make_run: MakeRun) -> None:
    page = page_of(make_run({"metrics.jsonl": [{"step": 1, "loss": 0.69}]}))
    assert len(list(charts_of(page)["Loss"].iter("circle"))) == 1


def test_a_hundred_thousand_lines_make_a_small_page_in_seconds(make_run: MakeRun) -> None:
    run_dir = make_run(num_steps=100_000, eval_every=1000)
    start = time.perf_counter()
    # A process of its own, where no signature is checked: that would cost more than the work.
    code = f"import pathlib; from penchant.report import write_report; write_report(pathlib.Path({str(run_dir)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.perf_counter() - start < 30
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 3_000_000
    loss = charts_of(page)["Loss"]
    assert max(len(p.get("points", "").split()) for p in loss.iter("polyline")) <= 400
    assert "200 of 100,001 rows, evenly spread." in page
    assert all(table.count("<tr>") <= 201 for table in page.split("<table")[1:])


def test_the_pairs_at_both_ends_are_the_right_ones(make_run: MakeRun) -> None:
    rows = [
        {"source": f"row:{i}", "prompt": "p", "chosen": "c", "rejected": "r", "chosen_reward": (i * 37) % 3001 / 10}
        | {"rejected_reward": 0.0, "split": "train"}
        for i in range(3001)
    ]
    pairs = read_run(make_run({"pairs.jsonl": rows})).pairs["train"]
    assert [round(row["margin"] * 10) for row in pairs.margins.highest] == [3000, 2999, 2998, 2997, 2996]
    assert [round(row["margin"] * 10) for row in pairs.margins.lowest] == [0, 1, 2, 3, 4]
    assert len(pairs.margins.values) == 3001


def test_long_texts_are_cut_with_a_note(make_run: MakeRun) -> None:
    page = page_of(make_run({"samples.jsonl": [{"prompt": "p", "before": "b" * 50_000, "after": "a"}]}))
    assert "(46,000 more characters)" in page
    assert "b" * 4001 not in page


def test_conversations_are_shown_turn_by_turn(make_run: MakeRun) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    page = page_of(make_run({"samples.jsonl": [{"prompt": prompt, "before": "b", "after": "a"}]}))
    assert "system: Be brief.\n\nuser: Hello?" in page


def test_of_very_many_events_the_serious_ones_stay(make_run: MakeRun) -> None:
    events = [{"step": s, "severity": "warn", "code": "w", "message": f"warning {s}."} for s in range(1000)]
    events[3] = {"step": 3, "severity": "stop", "code": "s", "message": "The one that counts."}
    page = page_of(make_run({"events.jsonl": events}))
    assert "The one that counts." in page
    assert "warning 999." in page
    assert "200 of 1,000 events" in page


def test_a_report_replaces_the_old_one_and_leaves_nothing_beside_it(make_run: MakeRun) -> None:
    run_dir = make_run()
    before = {path.name for path in run_dir.iterdir()}
    first = page_of(run_dir)
    assert page_of(run_dir) == first
    assert {path.name for path in run_dir.iterdir()} == before | {"report.html"}


def test_the_report_is_made_without_torch(make_run: MakeRun) -> None:
    code = (
        "import sys, pathlib; from penchant.report import write_report, write_model_card; "
        f"d = pathlib.Path({json.dumps(str(make_run()))}); write_report(d); write_model_card(d); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""What the pages tell, without a script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penchant.cli import main
from penchant.dash import pages
from penchant.dash.pairs import PairIndex, tokens_of
from penchant.dash.runs import Runs
from penchant.disk import append_json_line
from penchant.errors import UserError
from penchant.locking import locked

from ..report.test_page import EVIL, Dom, charts_of
from .conftest import MakeRun, Site


def test_runs_are_found_in_folders_and_in_stages(make_run: MakeRun, folder: Path) -> None:
    for name in ("alone", "stages/sft", "stages/dpo", "deep/er/still/run"):
        make_run(name)
    make_run("too/deep/to/be/found")
    make_run("alone/checkpoints/step-1")  # what is within a run is no run
    assert sorted(Runs([folder]).find()) == [
        "runs/alone",
        "runs/deep/er/still/run",
        "runs/stages/dpo",
        "runs/stages/sft",
    ]
    assert sorted(Runs([folder / "alone", folder / "stages", folder / "stages"]).find()) == [
        "alone",
        "stages/dpo",
        "stages/sft",
    ]


def test_runs_of_the_same_name_have_addresses_of_their_own(make_run: MakeRun, folder: Path) -> None:
    make_run("a/run")
    make_run("b/run")
    found = Runs([folder / "a" / "run", folder / "b" / "run"]).find()
    assert {name: run.path.parent.name for name, run in found.items()} == {"run": "a", "run (2)": "b"}


def test_the_list_tells_of_each_run_how_it_stands(make_run: MakeRun, site: Site) -> None:
    make_run("done")
    make_run("dead", {"summary.json": {"status": "running", "method": "ipo", "steps": 40, "total_steps": 400}})
    going = make_run("going", {"summary.json": {"status": "running", "steps": 40, "total_steps": 400}})
    make_run("begun", {"summary.json": None, "metrics.jsonl": None})
    with locked(going):
        page = Dom(site.ask("/").text)
    said = page.text()
    assert "runs/going running" in said
    assert "runs/dead killed ipo step 120 of 400" in said
    assert "runs/done finished" in said
    assert "runs/begun not begun" in said
    assert said.index("runs/going") < said.index("runs/done"), "those that go on come first"


def test_a_new_run_appears_in_the_list(make_run: MakeRun, site: Site) -> None:
    first = site.ask("/")
    assert "There is no run in these folders yet" in first.text
    assert site.ask("/", if_none_match=first.headers["etag"]).status == 304
    make_run("later")
    assert "runs/later" in site.ask("/", if_none_match=first.headers["etag"]).text


def test_the_curves_are_those_of_the_log_and_grow_with_it(make_run: MakeRun, site: Site) -> None:
    metrics = [{"step": 0, "eval_loss": 0.7}, *({"step": s, "loss": 1 / s, "time_s": 2.0 * s} for s in range(1, 41))]
    run_dir = make_run(parts={"metrics.jsonl": metrics})
    first = site.ask("/run/runs/concise")
    assert "training: first 1 at step 1, last 0.025 at step 40" in (
        charts_of(first.text)["Loss"].findtext("desc") or ""
    )
    mark = first.headers["etag"]
    assert site.ask("/run/runs/concise", if_none_match=mark).status == 304
    append_json_line(run_dir / "metrics.jsonl", {"step": 41, "loss": 0.0125})
    append_json_line(run_dir / "events.jsonl", {"step": 41, "severity": "warn", "code": "new", "message": "just now"})
    later = site.ask("/run/runs/concise", if_none_match=mark)
    assert later.status == 200
    assert "last 0.0125 at step 41" in (charts_of(later.text)["Loss"].findtext("desc") or "")
    assert "just now" in later.text


def test_time_left_is_told_of_a_run_that_goes_on(make_run: MakeRun, site: Site) -> None:
    metrics = [{"step": s, "loss": 1.0, "time_s": 30.0 * s} for s in range(1, 41)]
    run_dir = make_run(parts={"metrics.jsonl": metrics, "summary.json": {"status": "running", "total_steps": 50}})
    with locked(run_dir):
        assert "about 5 min 0 s left" in Dom(site.ask("/run/runs/concise").text).text()
    assert "left" not in Dom(site.ask("/run/runs/concise").text).text().partition("Curves")[0]


def test_a_log_that_was_cut_back_is_noticed(make_run: MakeRun, site: Site) -> None:
    metrics = [{"step": s, "loss": 1.0} for s in range(1, 41)]
    run_dir = make_run(parts={"metrics.jsonl": metrics, "summary.json": {"status": "running", "total_steps": 50}})
    with locked(run_dir):
        site.ask("/run/runs/concise")
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics[:20]))
        page = Dom(site.ask("/run/runs/concise").text).text()
    assert "The log had come to step 40" in page
    assert "step 20 of 50" in page


@pytest.mark.parametrize("page", ["run", "pairs", "report"])
def test_texts_of_models_and_data_stay_text(page: str, make_run: MakeRun, site: Site) -> None:
    pair = {"prompt": EVIL, "chosen": EVIL, "rejected": EVIL, "source": EVIL}
    pair |= {"chosen_reward": 1.0, "rejected_reward": 0.5, "split": "eval"}
    pair |= {"chosen_tokens": [EVIL, EVIL], "chosen_log_ratios": [1.0, -1.0]}
    parts = {
        "samples.jsonl": [{"prompt": EVIL, "before": EVIL, "after": EVIL, "chosen": EVIL}],
        "pairs.jsonl": [pair],
        "events.jsonl": [{"step": EVIL, "severity": EVIL, "code": EVIL, "message": EVIL}],
        "notes.jsonl": [{"text": EVIL, "time": EVIL}],
        "metrics.jsonl": [{"step": 1, "loss": 1.0, EVIL: 2.0}],
        "summary.json": {"model": EVIL, "status": EVIL, "method": EVIL, "loss": {"name": EVIL}},
        "data.json": {"eval": {"unit": EVIL}},
        "run.yaml": EVIL.replace("\ud800", ""),
    }
    make_run("<b>&'\"run", parts)
    address = "/runs/%3Cb%3E%26%27%22run"
    dom = Dom(site.ask(f"/{page}{address}").text)
    assert dom.open == []
    assert not {tag for tag, _ in dom.tags} & {"img", "iframe"}
    scripts = [attributes for tag, attributes in dom.tags if tag == "script"]
    assert scripts == ([] if page == "report" else [{"src": "/static/dash.js", "defer": None}])
    assert not [name for _, attributes in dom.tags for name in attributes if name.startswith("on") or name == "style"]
    assert "<script>alert(1)</script>" in dom.text()


def test_pairs_are_shown_by_margin_a_page_at_a_time(make_run: MakeRun, site: Site) -> None:
    rows = [
        {"prompt": f"prompt {i}", "chosen": "yes", "rejected": "no", "split": "eval", "source": f"row {i}"}
        | {"chosen_reward": float(i), "rejected_reward": 12.5}
        for i in (5, 0, 24, *range(1, 5), *range(6, 24))
    ]
    make_run(parts={"pairs.jsonl": rows})

    def shown(query: str) -> list[int]:
        page = Dom(site.ask(f"/pairs/runs/concise?{query}").text)
        return [int(text.split()[1]) for _, text in page.texts if text.startswith("row ")]

    assert shown("") == list(range(10))
    assert shown("start=10") == list(range(10, 20))
    assert shown("start=999") == list(range(20, 25))
    assert shown("order=most") == list(range(24, 14, -1))
    assert shown("order=file")[:3] == [5, 0, 24]
    assert shown("tokens=1") == []
    assert site.ask("/pairs/runs/concise?order=no").status == 404
    assert "in 13 of them the rejected completion" in Dom(site.ask("/pairs/runs/concise").text).text()


def test_tokens_are_coloured_by_what_training_did_to_them(tmp_path: Path) -> None:
    pair = {
        "chosen_tokens": ["a", "b", "", "c", "d", "e"],
        "chosen_log_ratios": [0.04, 0.05, 0.3, 0.3, -2.5, None],
    }
    tokens = tokens_of(pair, "chosen")
    assert [(token.text, token.look) for token in tokens] == [
        ("a", ""), ("b", "up1"), ("c", "up3"), ("d", "down5"), ("e", "unknown"),
    ]  # fmt: skip
    assert tokens[2].log_ratio == pytest.approx(0.6), "of a character in two tokens, both"
    assert tokens_of({**pair, "chosen_tokens": ["a"]}, "chosen") == []
    assert tokens_of(pair, "rejected") == []
    assert PairIndex(tmp_path / "none.jsonl").places("least") == []


def test_runs_stand_side_by_side(make_run: MakeRun, site: Site) -> None:
    for name, last in (("a", 0.5), ("b", 0.25)):
        make_run(name, {"metrics.jsonl": [{"step": 0, "eval_loss": 0.7}, {"step": 9, "eval_loss": last}]})
    page = site.ask("/compare?run=runs/a&run=runs/b").text
    description = charts_of(page)["Loss"].findtext("desc") or ""
    assert "a: first 0.7 at step 0, last 0.5 at step 9" in description
    assert "b: first 0.7 at step 0, last 0.25 at step 9" in description
    assert site.ask("/compare?run=runs/a&run=no").status == 404
    assert "Tick the runs" in site.ask("/compare").text


def test_a_long_log_is_read_in_several_answers(make_run: MakeRun, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_READING_S", 0.02)
    monkeypatch.setattr(pages, "_FIRST_READING_S", 0.02)
    run_dir = make_run()
    line = json.dumps({"step": 1, "loss": 0.5, **{f"metric-{i}": 0.123456789 for i in range(20)}})
    with (run_dir / "metrics.jsonl").open("w") as file:
        for block in range(0, 40_000, 1000):
            file.write("".join(line.replace('"step": 1', f'"step": {block + i}') + "\n" for i in range(1000)))
    assert (run_dir / "metrics.jsonl").stat().st_size > 16e6
    page, looks = site.ask("/run/runs/concise").text, 1
    assert "Reading the log" in page
    while "Reading the log" in page:
        page, looks = site.ask("/run/runs/concise").text, looks + 1
    assert "step 39,999" in page
    assert looks > 2
    assert len(page) < 2e6


def commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    return main(words), capsys.readouterr()


def test_the_command_says_what_is_wrong(
    folder: Path, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path / "runs")
    code, said = commands(["dash"], capsys)
    assert (code, said.err) == (2, "error: 'runs' is no folder; name run directories or folders of them.\n")
    code, said = commands(["dash", str(folder), "--port", str(site.port)], capsys)
    assert code == 2
    assert f"--port: {site.port} cannot be had" in said.err
    code, said = commands(["dash", str(folder), "--port", "99999"], capsys)
    assert code == 2
    with pytest.raises(UserError, match="no folder"):
        Runs([folder / "nothing"])


def test_the_page_needs_no_torch() -> None:
    heavy = ("torch", "transformers", "peft")
    code = f"import sys, penchant.dash.server; sys.exit(any(name in sys.modules for name in {heavy!r}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

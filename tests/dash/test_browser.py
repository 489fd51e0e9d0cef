"""The pages in a real browser: no error on the console, the right values in the drawings, life without reloading."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from penchant.disk import append_json_line, read_json_lines
from penchant.locking import is_asked_to_stop, locked
from penchant.report import write_report
from penchant.report.compare import compare, write_comparison
from penchant.report.rundir import read_run

from ..report.conftest import parts_of_a_run
from .conftest import MakeRun, Site

WIDTHS = (360, 800, 1400)
OpenPage = Callable[..., Any]


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """One browser for all tests of this file."""
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])  # tests may run as root
        yield launched
        launched.close()


@pytest.fixture
def opened(browser: Browser) -> OpenPage:
    """A page of its own, with `complaints`: whatever the console was told, and every request to elsewhere."""

    @contextmanager
    def opening(width: int = 1400, **settings: Any) -> Iterator[tuple[Page, list[str]]]:
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        context.set_default_timeout(10_000)
        page, complaints = context.new_page(), []
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append("a dialog opened"))
        page.on(
            "request",
            lambda request: (
                None
                if re.match(r"(file:///|http://127\.0\.0\.1:|data:)", request.url)
                else complaints.append(request.url)
            ),
        )
        yield page, complaints
        context.close()

    return opening


def drawn_ends(page: Page, figure: str) -> list[float]:
    """The value at which each line of a chart ends, read off the drawing by its ticks."""
    told = page.evaluate(
        """(id) => {
            const svg = document.querySelector(`#${id} > svg`);
            const place = (element, name) => parseFloat(element.getAttribute(name));
            const ticks = [...svg.querySelectorAll("text.tick.y")];
            const lines = [...svg.querySelectorAll("polyline")];
            return [ticks.map((tick) => [place(tick, "y"), tick.textContent]),
                    lines.map((line) => line.getAttribute("points").split(" ").at(-1).split(",").map(Number))];
        }""",
        figure,
    )
    ticks = [(y, float(text.replace("−", "-").replace(",", ""))) for y, text in told[0]]
    (y0, v0), (y1, v1) = ticks[0], ticks[-1]
    return [v0 + (y - y0) * (v1 - v0) / (y1 - y0) for _, y in told[1]]


def is_within(page: Page) -> bool:
    """Whether nothing stands out of the page to the right."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_opens_from_the_disk_without_network_and_script(
    width: int, opened: OpenPage, make_run: MakeRun
) -> None:
    run_dir = make_run()
    last = read_run(run_dir).metrics
    with opened(width, java_script_enabled=True, offline=True) as (page, complaints):
        page.goto(write_report(run_dir).as_uri())
        assert page.locator("figure.chart").count() == 12
        ends = {round(value, 2) for value in drawn_ends(page, "curve-loss-figure")}
        assert ends == {round(float(last[name].last or 0), 2) for name in ("loss", "eval_loss")}
        page.locator("#curve-loss-figure summary").click()
        expect(page.locator("#curve-loss-figure tbody tr").last).to_contain_text("120")
        assert is_within(page)
        assert complaints == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_comparison_opens_and_shows_every_run(
    width: int, opened: OpenPage, make_run: MakeRun, tmp_path: Path
) -> None:
    runs = [make_run("short"), make_run("long", num_steps=200)]
    page_file = write_comparison(compare(runs), tmp_path / "compare.html")
    with opened(width, offline=True) as (page, complaints):
        page.goto(page_file.as_uri())
        last = [read_run(run).metrics["eval_loss"].last or 0.0 for run in runs]
        assert sorted(drawn_ends(page, "over-loss-figure")) == pytest.approx(sorted(last), abs=0.003)
        assert page.locator("#runs tbody tr").count() >= 3
        assert is_within(page)
        assert complaints == []


@pytest.mark.parametrize("width", WIDTHS)
def test_all_live_pages_open_without_a_complaint(width: int, opened: OpenPage, make_run: MakeRun, site: Site) -> None:
    run_dir = make_run("a")
    make_run("b", num_steps=60)
    scheme = "dark" if width == 800 else "light"
    with opened(width, color_scheme=scheme) as (page, complaints):
        page.goto(site.entrance)
        assert "token" not in page.url
        for path in (
            "/",
            "/run/runs/a",
            "/pairs/runs/a",
            "/compare",
            "/compare?run=runs/a&run=runs/b",
            "/report/runs/a",
        ):
            page.goto(site.origin + path)
            assert page.locator("h1").count() == 1
            assert is_within(page), path
        assert complaints == []
        page.goto(f"{site.origin}/run/runs/a")
        last = {name: series.last for name, series in read_run(run_dir).metrics.items()}
        ends = drawn_ends(page, "curve-loss-figure")
        assert sorted(ends) == pytest.approx(sorted([last["loss"] or 0, last["eval_loss"] or 0]), abs=0.01)


def test_new_lines_and_events_come_by_themselves(opened: OpenPage, make_run: MakeRun, site: Site) -> None:
    run_dir = make_run(parts={"summary.json": {"status": "running", "steps": 120, "total_steps": 500}})
    with locked(run_dir), opened() as (page, complaints):
        page.goto(site.entrance)
        page.goto(f"{site.origin}/run/runs/concise")
        expect(page.locator("#event-list li")).to_have_count(2)
        page.locator("#curve-loss-figure summary").click()
        page.locator("#note-text").fill("half a thought")
        line = {**parts_of_a_run()["metrics.jsonl"][-2], "step": 140, "loss": 3.0}
        append_json_line(run_dir / "metrics.jsonl", line)
        append_json_line(
            run_dir / "events.jsonl", {"step": 140, "severity": "major", "code": "x", "message": "<b>up</b>"}
        )
        expect(page.locator("#event-list li").last).to_contain_text("<b>up</b>")
        expect(page.locator("#state")).to_contain_text("step 140 of 500")
        assert max(drawn_ends(page, "curve-loss-figure")) == pytest.approx(3.0, abs=0.01)
        expect(page.locator("#curve-loss-figure tbody tr").last).to_contain_text("140")
        assert page.locator("#curve-loss-figure details").get_attribute("open") is not None, "it was opened before"
        assert page.locator("#note-text").input_value() == "half a thought"
        append_json_line(run_dir / "metrics.jsonl", {"step": 141, "brand new": 1.0})
        expect(page.locator("#curve-brand-new-figure")).to_be_visible()
        assert complaints == []


def test_a_script_in_a_completion_stays_text(opened: OpenPage, make_run: MakeRun, site: Site) -> None:
    evil = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
    pair = {"prompt": evil, "chosen": evil, "rejected": evil, "chosen_reward": 1.0, "rejected_reward": 0.0}
    pair |= {"chosen_tokens": [evil], "chosen_log_ratios": [1.0], "split": "eval"}
    parts = {"samples.jsonl": [{"prompt": evil, "before": evil, "after": evil}], "pairs.jsonl": [pair]}
    run_dir = make_run(parts=parts)
    with opened() as (page, complaints):
        page.goto(site.entrance)
        for address in ("/run/runs/concise", "/pairs/runs/concise", "/report/runs/concise"):
            page.goto(site.origin + address)
            assert page.get_by_text("<script>document.title").count() >= 2
            assert page.locator("img").count() == 0
        page.goto(f"{site.origin}/run/runs/concise")
        append_json_line(run_dir / "notes.jsonl", {"text": evil})  # and what comes later, by the script
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        expect(page.locator("#note-list")).to_contain_text("<script>")
        page.goto(write_report(run_dir).as_uri())
        assert page.title() == "concise: training report"
        assert complaints == []


def test_an_injected_script_would_not_run(opened: OpenPage, make_run: MakeRun, site: Site) -> None:
    """The second wall: even markup that got into the page is forbidden to run."""
    make_run()
    with opened() as (page, complaints):
        page.goto(site.entrance)
        page.goto(f"{site.origin}/run/runs/concise")
        page.evaluate(
            """() => {
                const script = document.createElement("script");
                script.textContent = "document.title = 'taken'";
                document.body.append(script);
                document.body.insertAdjacentHTML("beforeend", `<img src=x onerror="document.title = 'taken'">`);
            }"""
        )
        page.wait_for_timeout(200)
        assert page.title() == "runs/concise · Penchant"
        assert any("Content Security Policy" in complaint for complaint in complaints)


def test_another_site_can_neither_frame_nor_post(
    opened: OpenPage, make_run: MakeRun, site: Site, tmp_path: Path
) -> None:
    run_dir = make_run()
    evil = tmp_path / "evil.html"
    evil.write_text(
        f'<iframe src="{site.origin}/run/runs/concise"></iframe>'
        f'<form id="f" action="{site.origin}/note/runs/concise" method="post"><input name="text" value="x"></form>'
    )
    with opened() as (page, complaints):
        page.goto(site.entrance)
        page.goto(evil.as_uri())
        page.wait_for_timeout(300)
        assert not any(
            "runs/concise" in (frame.title() if frame is not page.main_frame else "") for frame in page.frames
        )
        with page.expect_navigation():
            page.evaluate("document.getElementById('f').submit()")
        assert "token of its address" in page.content(), "the cookie does not come along from elsewhere"
        assert not (run_dir / "notes.jsonl").exists()
        assert complaints


@pytest.mark.parametrize("with_script", [True, False])
def test_notes_and_stopping_work_with_and_without_script(
    with_script: bool, opened: OpenPage, make_run: MakeRun, site: Site
) -> None:
    run_dir = make_run(parts={"summary.json": {"status": "running", "steps": 7, "total_steps": 500}})
    with locked(run_dir), opened(java_script_enabled=with_script) as (page, complaints):
        page.goto(site.entrance)
        page.get_by_role("link", name="runs/concise").click()
        page.get_by_label("A note").fill("beta looks too high")
        page.get_by_role("button", name="Keep it").click()
        expect(page.locator("#note-list")).to_contain_text("beta looks too high")
        assert [note["text"] for note in read_json_lines(run_dir / "notes.jsonl")] == ["beta looks too high"]
        page.get_by_text("Stop this run").click()
        page.get_by_role("button", name="Stop it now").click()
        expect(page.locator("#state")).to_contain_text("stopping")
        assert is_asked_to_stop(run_dir)
        assert complaints == []


def test_the_token_is_needed_and_told_about(opened: OpenPage, make_run: MakeRun, site: Site) -> None:
    make_run()
    with opened() as (page, _):
        response = page.goto(site.origin)
        assert response is not None
        assert response.status == 403
        assert "penchant dash" in page.content()
        page.goto(site.entrance)
        assert page.evaluate("document.cookie") == "", "scripts cannot read it"


def test_the_keyboard_reaches_everything(opened: OpenPage, make_run: MakeRun, site: Site) -> None:
    make_run("a")
    make_run("b")
    with opened() as (page, _):
        page.goto(site.entrance)
        reached = []
        for _ in range(9):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("(document.activeElement.textContent || document.activeElement.value).trim()"))
        assert reached[:4] == ["To the content", "Penchant", "Runs", "Compare"]
        assert {"runs/a", "runs/b", "Compare those that are ticked"} <= set(reached)
        charts = f"{site.origin}/run/runs/a"
        page.goto(charts)
        names = page.evaluate(
            """[...document.querySelectorAll("svg[role=img]")].map((svg) => svg.getAttribute("aria-labelledby")
                .split(" ").map((id) => document.getElementById(id).textContent).join(": "))"""
        )
        assert len(names) == 10
        assert all(re.search(r": .*first .* at step .*, last ", name) for name in names), json.dumps(names)

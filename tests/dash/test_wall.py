"""Who gets in, and what is answered: requests as they stand on the wire, against the page served for real."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlencode

import pytest

from penchant.dash.wall import form_key
from penchant.disk import read_json_lines
from penchant.locking import is_asked_to_stop, locked

from .conftest import TOKEN, MakeRun, Site


def form(**fields: str) -> str:
    return urlencode({"key": form_key(TOKEN), **fields})


def test_the_token_of_the_address_becomes_a_cookie_and_goes(make_run: MakeRun, site: Site) -> None:
    make_run()
    answer = site.ask(f"/run/runs/concise?x=1&token={TOKEN}&y=2", signed_in=False)
    assert answer.status == 303
    assert answer.headers["location"] == "/run/runs/concise?x=1&y=2"
    cookie = answer.headers["set-cookie"].lower()
    assert {"httponly", "samesite=strict", "path=/"} <= {part.strip() for part in cookie.split(";")}
    assert site.ask("/").status == 200
    assert site.ask(f"/?token={TOKEN}").headers["location"] == "/", "also for whoever is in already"
    assert site.ask(f"//evil.example/?token={TOKEN}", signed_in=False).headers["location"] == "/evil.example/"


@pytest.mark.parametrize("query", ["", "?token=", "?token=wrong", f"?token={TOKEN}&token=x", f"?tokens={TOKEN}"])
@pytest.mark.parametrize("path", ["/", "/run/runs/concise", "/static/dash.js", "/report/runs/concise", "/nothing"])
def test_without_the_token_nothing_is_shown(path: str, query: str, make_run: MakeRun, site: Site) -> None:
    make_run()
    answer = site.ask(path + query, signed_in=False)
    assert answer.status == 403
    assert "concise" not in answer.text
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "cookie", ["penchant-{port}=wrong", "penchant-1={token}", "{token}", "=;;=", "penchant-{port}="]
)
def test_other_cookies_open_nothing(cookie: str, site: Site) -> None:
    assert site.ask("/", cookie=cookie.format(port=site.port, token=TOKEN)).status == 403


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil:{port}", "0.0.0.0", "", "[::]"],
)
@pytest.mark.parametrize("path", ["/", f"/?token={TOKEN}", "/static/style.css"])
def test_a_foreign_host_is_refused_with_and_without_the_token(host: str, path: str, site: Site) -> None:
    answer = site.ask(path, host=host.format(port=site.port))
    assert answer.status == 421
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST", "[::1]:9999", "localhost:8888"])
def test_this_machine_may_be_called_by_its_names_and_any_forwarded_port(host: str, site: Site) -> None:
    assert site.ask("/", host=host.format(port=site.port)).status == 200


TRICKS = [
    "/run/../../../etc/passwd", "/../../etc/passwd", "/run/runs/concise/../../..", "/run/%2e%2e/%2e%2e/etc/passwd",
    "/run/..%2f..%2fetc%2fpasswd", "/run/%2e%2e%2f", "/static/../server.py", "/static/..%2fserver.py",
    "/static/%2fetc%2fpasswd", "/run//etc/passwd", "/run/%2fetc%2fpasswd", "/report//etc", "/run/runs/concise%00",
    "/run/runs\\..\\..\\x", "/run/runs/concise/metrics.jsonl", "/pairs/runs/outside", "/report/runs/outside",
    "/run/runs/outside", "/run/.", "/run/", "/static/", "/run/runs/concise/.", "/static/dash.css/x",
    "/run/" + "a" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("path", TRICKS)
def test_no_path_leads_out_of_the_folder(path: str, make_run: MakeRun, site: Site, folder: Path) -> None:
    make_run()
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "run.yaml").write_text("model: secret-outside\n")
    (folder / "outside").symlink_to(outside)
    answer = site.ask(path)
    assert 400 <= answer.status < 500
    assert "secret-outside" not in answer.text
    assert "root:" not in answer.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.yaml", "notes.jsonl", "pairs.jsonl", ".lock"])
def test_a_file_that_is_a_link_out_of_the_folder_is_neither_read_nor_written(
    name: str, make_run: MakeRun, site: Site, folder: Path
) -> None:
    run_dir = make_run()
    secret = folder.parent / "secret.txt"
    secret.write_text('{"step": 1, "text": "very secret", "prompt": "very secret", "loss": 12345.0}\n')
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to(secret)
    before = secret.read_text()
    for page in ("run", "pairs", "report"):
        answer = site.ask(f"/{page}/runs/concise")
        assert answer.status == 403
        assert "very secret" not in answer.text
    assert site.ask("/compare?run=runs/concise").status == 403
    assert "12,345" not in site.ask("/").text
    origin = site.origin
    assert site.ask("/note/runs/concise", "POST", form(text="hello"), origin=origin).status == 403
    assert secret.read_text() == before


def test_a_link_within_the_folder_is_followed(make_run: MakeRun, site: Site, folder: Path) -> None:
    run_dir = make_run()
    os.replace(run_dir / "samples.jsonl", folder / "shared.jsonl")
    (run_dir / "samples.jsonl").symlink_to(folder / "shared.jsonl")
    assert site.ask("/run/runs/concise").status == 200


@pytest.mark.parametrize("action", ["stop", "note"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "null", "sec_fetch_site": "cross-site"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "https://127.0.0.1:{port}"},
        {"origin": "http://127.0.0.1:{port}", "sec_fetch_site": "same-site"},
        {"origin": "http://localhost:{port}"},
    ],
)
def test_only_the_page_itself_can_ask_for_something(
    action: str, headers: dict[str, str], make_run: MakeRun, site: Site
) -> None:
    run_dir = make_run()
    with locked(run_dir):
        sent = {name: value.format(port=site.port) for name, value in headers.items()}
        assert site.ask(f"/{action}/runs/concise", "POST", form(text="hello"), **sent).status == 403
        assert not is_asked_to_stop(run_dir)
    assert not (run_dir / "notes.jsonl").exists()


@pytest.mark.parametrize("body", ["", "text=hello", "key=wrong&text=hello", "key=&text=hello"])
def test_a_form_that_this_server_did_not_make_is_refused(body: str, make_run: MakeRun, site: Site) -> None:
    run_dir = make_run()
    assert site.ask("/note/runs/concise", "POST", body, origin=site.origin).status == 403
    assert not (run_dir / "notes.jsonl").exists()


def test_what_asks_for_something_cannot_be_got_by_a_link(make_run: MakeRun, site: Site) -> None:
    make_run()
    assert site.ask("/stop/runs/concise").status == 405
    assert site.ask(f"/note/runs/concise?{form(text='x')}").status == 405
    assert site.ask("/", "DELETE").status == 405
    assert site.ask("/", "POST", form(), origin=site.origin).status == 405


def test_a_note_is_kept_and_shown(make_run: MakeRun, site: Site) -> None:
    run_dir = make_run()
    answer = site.ask("/note/runs/concise", "POST", form(text=" lowered beta \r\nafter this "), origin=site.origin)
    assert (answer.status, answer.headers["location"]) == (303, "/run/runs/concise")
    (note,) = read_json_lines(run_dir / "notes.jsonl")
    assert (note["text"], note["step"]) == ("lowered beta \nafter this", 120)
    assert "lowered beta \nafter this" in site.ask("/run/runs/concise").text
    assert "lowered beta \nafter this" in site.ask("/report/runs/concise").text


def test_the_report_on_the_disk_gets_a_note_that_comes_after_the_end(make_run: MakeRun, site: Site) -> None:
    run_dir = make_run()
    (run_dir / "report.html").write_text("old")
    site.ask("/note/runs/concise", "POST", form(text="seen later"), origin=site.origin)
    assert "seen later" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize("text", ["", "   ", "x" * 4001])
def test_a_note_without_words_or_with_too_many_is_refused_in_a_sentence(
    text: str, make_run: MakeRun, site: Site
) -> None:
    run_dir = make_run()
    answer = site.ask("/note/runs/concise", "POST", form(text=text), origin=site.origin)
    assert answer.status == 400
    assert "a note has 1 to 4,000 characters" in answer.text
    assert not (run_dir / "notes.jsonl").exists()


def test_a_form_of_a_megabyte_is_cut_off(make_run: MakeRun, site: Site) -> None:
    make_run()
    assert site.ask("/note/runs/concise", "POST", form(text="x" * (1 << 20)), origin=site.origin).status == 413


def test_a_stop_reaches_the_run_that_is_worked_on(make_run: MakeRun, site: Site) -> None:
    run_dir = make_run(parts={"summary.json": {"status": "running", "steps": 3, "total_steps": 9}})
    assert site.ask("/stop/runs/concise", "POST", form(), origin=site.origin).status == 400
    with locked(run_dir):
        assert "Stop this run" in site.ask("/run/runs/concise").text
        assert site.ask("/stop/runs/concise", "POST", form(), origin="null", sec_fetch_site="same-origin").status == 303
        assert is_asked_to_stop(run_dir)
        assert "It was asked to stop" in site.ask("/run/runs/concise").text
    assert ">killed<" in site.ask("/run/runs/concise").text


@pytest.mark.parametrize(
    "path", ["/", "/run/runs/concise", "/report/runs/concise", "/static/dash.js", "/no", "/run/no"]
)
def test_every_answer_forbids_what_pages_do_not_need(path: str, make_run: MakeRun, site: Site) -> None:
    make_run()
    headers = site.ask(path).headers
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy.get("script-src", "'none'") in ("'none'", "'self'")
    assert "unsafe" not in headers["content-security-policy"]
    assert (headers["referrer-policy"], headers["x-content-type-options"]) == ("no-referrer", "nosniff")
    assert "server" not in headers or "uvicorn" in headers["server"]

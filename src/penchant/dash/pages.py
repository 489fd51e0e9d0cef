"""What the server answers: pages made anew from the run directories, which need no script to be read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from penchant.dash.pairs import ORDERS, tokens_of
from penchant.dash.runs import LONGEST_NOTE, Run, Runs, held_out_value, last_mean
from penchant.dash.wall import form_key, is_form_key
from penchant.errors import UserError
from penchant.locking import ask_to_stop
from penchant.report import verdict, write_report
from penchant.report.compare import compare, page_parts
from penchant.report.curves import drawn_curves
from penchant.report.figures import Number, duration, magnitude, number, percent
from penchant.report.page import MAX_ITEMS, render_report, scored, setup_facts, shown_events
from penchant.report.render import environment, style_hash, style_sheet
from penchant.report.rundir import RunRecord, read_run
from penchant.report.series import finite

_HERE = Path(__file__).parent
_STATIC = {"dash.js": "text/javascript", "icon.svg": "image/svg+xml"}
_LARGEST_FORM = 1 << 16
_PAIRS_ON_A_PAGE = 10
_TABLE_ROWS = 40
_FIRST_READING_S, _READING_S = 0.25, 1.0
"""How long an answer, the first one and those that follow, may read on in a log; the next one reads the rest."""


class Pages:
    """One method for each address; see `server.make_app`."""

    def __init__(self, runs: Runs, token: str) -> None:
        self._runs, self._token = runs, token
        self._environment = environment(_HERE / "templates")
        self._environment.filters.update(percent=percent, address=lambda name: quote(name, safe="/"))
        css = style_sheet() + (_HERE / "static" / "dash.css").read_text(encoding="utf-8")
        self._static = {"style.css": (css, "text/css")}
        for name, kind in _STATIC.items():
            self._static[name] = ((_HERE / "static" / name).read_text(encoding="utf-8"), kind)
        self.failures: Mapping[Any, Callable[[Request, Any], Any]] = {
            HTTPException: self._failed,
            UserError: self._refused,
        }

    # reading

    def index(self, request: Request) -> Response:
        """All runs."""
        runs = self._runs.find()
        mark = _etag(sorted((name, run.mark()) for name, run in runs.items()))
        if request.headers.get("if-none-match") == mark:
            return Response(status_code=304)
        rows = [_row(run) for run in runs.values()]
        rows.sort(key=lambda row: (not row["is_going"], -(row["changed"] or 0)))
        return self._page("index.html.j2", mark, rows=rows)

    def run(self, request: Request) -> Response:
        """One run, live."""
        run = self._run(request)
        is_whole = _read_on(run)
        mark = _etag((run.mark(), run.metrics.num_lines, is_whole))
        if request.headers.get("if-none-match") == mark:
            return Response(status_code=304)
        return self._page("run.html.j2", mark, **self._live(run, is_whole))

    def pairs(self, request: Request) -> Response:
        """The judged pairs of a run, a few at a time."""
        run = self._run(request)
        order = request.query_params.get("order", "least")
        if order not in ORDERS:
            raise HTTPException(404, "There is no such order of pairs.")
        only_tokens = request.query_params.get("tokens") == "1"
        places = run.pairs.places(order, only_tokens)
        start = min(_whole(request.query_params.get("start")), max(0, len(places) - 1))
        start -= start % _PAIRS_ON_A_PAGE
        shown = run.pairs.read(places[start : start + _PAIRS_ON_A_PAGE])
        rows = [{**pair, "sides": [_side(pair, side) for side in ("chosen", "rejected")]} for pair in shown]
        return self._page(
            "pairs.html.j2",
            None,
            run=run,
            unit=run.record().unit("eval"),
            rows=rows,
            orders=ORDERS,
            order=order,
            only_tokens=only_tokens,
            start=start,
            size=_PAIRS_ON_A_PAGE,
            total=len(places),
            num_wrong=run.pairs.num_wrong(),
        )

    def report(self, request: Request) -> Response:
        """The report of a run as it would be written now."""
        run = self._run(request)
        page = render_report(read_run(run.path))  # all of the log, not what was followed of it
        policy = f"default-src 'none'; style-src 'sha256-{style_hash()}'; base-uri 'none'; form-action 'none'; "
        return HTMLResponse(page, headers={"content-security-policy": policy + "frame-ancestors 'none'"})

    def compare(self, request: Request) -> Response:
        """Some runs side by side."""
        known = self._runs.find()
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        chosen = [self._checked(known.get(name)) for name in names]
        if not chosen:
            return self._page("together.html.j2", None, runs=list(known), chosen=[], is_whole=True)
        is_whole = not [run for run in chosen if not _read_on(run)]
        mark = _etag([(run.mark(), run.metrics.num_lines) for run in chosen])
        if request.headers.get("if-none-match") == mark:
            return Response(status_code=304)
        by_path = {run.path: run for run in chosen}
        parts = page_parts(compare(list(by_path), lambda path: by_path[path].record()))
        return self._page("together.html.j2", mark, runs=list(known), chosen=names, is_whole=is_whole, **parts)

    def static(self, request: Request) -> Response:
        """The style sheet, the script, the icon."""
        name = request.path_params["file"]
        if name not in self._static:
            raise HTTPException(404, "There is no such file.")
        text, kind = self._static[name]
        return Response(text, media_type=kind, headers={"cache-control": "private, max-age=60"})

    # doing

    async def stop(self, request: Request) -> Response:
        """Asks a run to save a checkpoint and end."""
        await self._form(request)
        run = await run_in_threadpool(self._run, request)
        try:
            is_asked = await run_in_threadpool(ask_to_stop, run.path)
        except OSError as error:
            raise UserError(f"the request to stop cannot be written ({error.strerror}).") from None
        if not is_asked:
            raise UserError("nobody works on this run, so there is nothing to stop.")
        return _back_to(run)

    async def note(self, request: Request) -> Response:
        """Keeps a note."""
        fields = await self._form(request)
        run = await run_in_threadpool(self._run, request)

        def keep() -> None:
            run.add_note(fields.get("text", [""])[0])
            if run.state() not in ("running", "stopping") and (run.path / "report.html").is_file():
                write_report(run.path)  # a run that goes on writes its report itself, with all notes

        await run_in_threadpool(keep)
        return _back_to(run)

    # parts

    def _run(self, request: Request) -> Run:
        return self._checked(self._runs.find().get(request.path_params["name"]))

    def _checked(self, run: Run | None) -> Run:
        # Names are looked up among the runs that were found; no part of an address ever becomes a path.
        if run is None:
            raise HTTPException(404, "There is no such run (any more).")
        if (name := run.stray_link()) is not None:
            raise HTTPException(403, f"{name} of this run is a link that leads out of the folder; it is not followed.")
        return run

    async def _form(self, request: Request) -> dict[str, list[str]]:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _LARGEST_FORM:
                raise HTTPException(413, "That is too much.")
        fields = parse_qs(body.decode(errors="replace"), keep_blank_values=True)
        if not is_form_key(fields.get("key", [""])[0], self._token):
            raise HTTPException(403, "This was not sent by the page itself.")
        return fields

    def _live(self, run: Run, is_whole: bool) -> dict[str, Any]:
        record = run.record()
        state = run.state(record.summary)
        step, total = run.metrics.step or finite(record.summary.get("steps")), finite(record.summary.get("total_steps"))
        speed = run.metrics.seconds_per_step()
        left = speed * (total - step) if state == "running" and speed and total and step else None
        accuracy = verdict.held_out_accuracy(record)
        return {
            "run": run,
            "record": record,
            "state": state,
            "step": step,
            "total": total,
            "left": None if left is None else duration(left),
            "is_whole": is_whole,
            "share": run.metrics.share_read,
            "cut_back_at": run.metrics.cut_back_at,
            "num_unreadable": run.metrics.num_unreadable,
            "headline": verdict.headline(record) if state == "finished" and accuracy else verdict.on_answers(record),
            "figures": _figures(record),
            "setup": setup_facts(record.summary),
            "curves": drawn_curves(record, _TABLE_ROWS),
            "events": shown_events(record.events),
            "samples": record.samples[:MAX_ITEMS],
            "scored": scored,
            "unit": record.unit("eval"),
            "num_pairs": len(run.pairs.places("file")),
            "longest_note": LONGEST_NOTE,
        }

    def _page(self, template: str, mark: str | None, **context: Any) -> HTMLResponse:
        html = self._environment.get_template(template).render(key=form_key(self._token), mark=mark or "", **context)
        return HTMLResponse(html, headers={"etag": mark} if mark else None)

    async def _failed(self, request: Request, error: HTTPException) -> Response:
        page = self._page("failed.html.j2", None, code=error.status_code, said=error.detail)
        page.status_code = error.status_code
        return page

    async def _refused(self, request: Request, error: UserError) -> Response:
        page = self._page("failed.html.j2", None, code=400, said=str(error))
        page.status_code = 400
        return page


_NOW = (
    ("Loss", "loss", number),
    ("Accuracy", "rewards/accuracies", percent),
    ("Reward margin", "rewards/margins", number),
    ("Score", "score", number),
    ("KL", "kl", number),
    ("KL of answers", "answer_kl", number),
)


def _figures(record: RunRecord) -> list[tuple[str, str, str]]:
    """Label, value and remark of what counts now: held out where it is, else the mean of the last training lines."""
    found = []
    for label, name, show in _NOW:
        held_out, training = record.series(f"eval_{name}"), record.series(name)
        now = last_mean(training)
        if held_out.last is not None:
            remark = f"training {show(now)}" if now is not None else ""
            found.append((f"{label}, held out", show(held_out.last), remark))
        elif now is not None:
            found.append((label, show(now), "training, last 20 lines" if len(training.points) > 1 else "training"))
    for label, name, remark in (("Learning rate", "learning_rate", ""), ("Speed", "tokens_per_s", "tokens per second")):
        if (value := record.series(name).last) is not None:
            found.append((label, number(value), remark))
    parameters = finite(record.summary.get("num_parameters"))
    return found + ([("Parameters", magnitude(parameters), "")] if parameters is not None else [])


def _row(run: Run) -> dict[str, Any]:
    """A line of the list of runs, from the end of its log alone."""
    if (link := run.stray_link()) is not None:
        return {"run": run, "state": "refused", "said": link, "is_going": False, "changed": 0.0}
    summary, latest = run.summary(), run.latest()
    state = run.state(summary)
    metrics = run.path / "metrics.jsonl"
    return {
        "run": run,
        "state": state,
        "is_going": state in ("running", "stopping"),
        "said": "",
        "method": summary.get("method"),
        "step": latest.get("step", finite(summary.get("steps"))),
        "total": finite(summary.get("total_steps")),
        "loss": held_out_value(latest, ("loss",)) if "eval_loss" in latest else latest.get("loss"),
        "accuracy": held_out_value(latest, (verdict.ACCURACY,)),
        "score": held_out_value(latest, ("score",)),
        "changed": metrics.stat().st_mtime if metrics.exists() else None,
    }


def _side(pair: Mapping[str, Any], side: str) -> dict[str, Any]:
    reward: Number | None = finite(pair.get(f"{side}_reward"))
    return {"name": side, "text": pair.get(side), "reward": reward, "tokens": tokens_of(dict(pair), side)}


def _read_on(run: Run) -> bool:
    """Reads what is new in the log; whether that is all there is."""
    return run.metrics.read_on(_READING_S if run.metrics.num_lines else _FIRST_READING_S)


def _etag(seen: Any) -> str:
    return '"' + hashlib.sha256(repr(seen).encode()).hexdigest()[:32] + '"'


def _whole(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 10 else 0


def _back_to(run: Run) -> Response:
    return RedirectResponse("/run/" + quote(run.name, safe="/"), status_code=303)

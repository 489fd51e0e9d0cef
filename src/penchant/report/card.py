"""The model card: what was trained, on what, how well it did, how to load it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from penchant.disk import write_text
from penchant.report import verdict
from penchant.report.figures import number, percent
from penchant.report.rundir import RunRecord, as_mapping, read_run
from penchant.report.series import finite
from penchant.report.settings import loss_doc, loss_text

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_PATH = re.compile(r"(?<![\w./:])(?:~|[A-Za-z]:)?(?:[\\/]+[^\s\\/'\"`]+)+[\\/]*")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|&~])")


def write_model_card(run_dir: Path) -> Path:
    """Writes `README.md` into the run directory and returns its path.

    Of paths only the last part is told, and nothing of the run file or of the texts in the data.

    Raises:
        UserError: there is no such directory.
    """
    run_dir = Path(run_dir)
    card = run_dir / "README.md"
    write_text(card, _render(read_run(run_dir)))
    return card


def _render(run: RunRecord) -> str:
    # The card is Markdown: `plain` and `quoted` do what HTML escaping would do elsewhere.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(plain=plain, code=code, quoted=quoted, number=number, percent=percent)
    summary = run.summary
    model, method = str(summary.get("model") or ""), str(summary.get("method") or "")
    accuracy = verdict.held_out_accuracy(run)
    is_reward_model = as_mapping(summary.get("loss")).get("name") == "reward"  # saved whole, whatever was trained
    return environment.get_template("card.md.j2").render(
        name=last_part(model) or run.name,
        model=model if is_hub_id(model) else last_part(model),
        base_model=model if is_hub_id(model) else "",
        method=method,
        tag=re.sub(r"[^a-z0-9]+", "-", method.lower()).strip("-"),
        lora=summary.get("lora") is True and not is_reward_model,
        is_reward_model=is_reward_model,
        loss=without_paths(loss_text(as_mapping(summary.get("loss")), method)),
        loss_doc=loss_doc(summary).replace("`", ""),
        reference=str(summary.get("reference") or "").strip(),
        steps=finite(summary.get("steps")),
        examples_seen=finite(summary.get("examples_seen")),
        trained=run.unit("train"),
        measured=run.unit("eval"),
        finished=summary.get("status") in ("finished", "stopped"),
        data=[_data_sentence(run, split, title) for split, title in (("train", "Training"), ("eval", "Held-out"))],
        accuracy=accuracy,
        answers=verdict.on_answers(run),
        results=_results(run, accuracy),
        versions=sorted((str(name), str(version)) for name, version in as_mapping(summary.get("versions")).items()),
        hashes=[
            (label, str(summary[key]))
            for label, key in (("Model", "model_sha256"), ("Data", "data_sha256"))
            if summary.get(key)
        ],
    )


def is_hub_id(model: str) -> bool:
    """Whether the name is one of the hub, "owner/name", and not a path that exists here."""
    return _HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def last_part(path: str) -> str:
    """The last part of a path, whichever way its slashes lean."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def without_paths(text: str) -> str:
    """The text with every absolute path shortened to its last part."""
    return _PATH.sub(lambda match: last_part(match[0]), text.replace("file://", ""))


def plain(text: Any) -> str:
    """One line of text that Markdown shows as it stands, without local paths."""
    return _MARKDOWN.sub(r"\\\1", " ".join(without_paths(str(text)).split()))


def code(text: Any) -> str:
    """One line as a code span."""
    line = " ".join(str(text).split()).replace("`", "'").replace("|", "¦")
    return f"`{line}`" if line else ""


def quoted(text: str) -> str:
    """A YAML string: JSON's quoting is YAML's double-quoted style."""
    return json.dumps(text, ensure_ascii=False)


def _data_sentence(run: RunRecord, split: str, title: str) -> str:
    part = run.part(split)
    if not part:
        return ""
    unit = run.unit(split)
    used, rows, desirable = (finite(part.get(key)) for key in ("used", "rows", "desirable"))
    sentence = f"{title} data: {plain(last_part(str(part.get('path') or 'unnamed')))}"
    if used is not None:
        sentence += f", {unit.counted(used, '')}" + (f" of {number(rows)} rows" if rows not in (None, used) else "")
        sentence += f", {number(desirable)} of them desirable" if desirable is not None and unit.first else ""
    lengths = as_mapping(part.get("lengths"))
    medians = {which: finite(as_mapping(of).get("median")) for which, of in lengths.items() if which != "prompt"}
    if told := [f"{plain(which)} {number(median)}" for which, median in medians.items() if median is not None]:
        sentence += f"; median length in tokens: {', '.join(told)}"
    share = finite(part.get("longer_wins"))
    if share is not None:
        sentence += f"; the {unit.first} completion is longer than the {unit.last} one in {percent(share)}"
    return sentence + "."


def _results(run: RunRecord, accuracy: verdict.Accuracy | None) -> list[tuple[str, str, str]]:
    rows = []
    unit = run.unit("eval")
    of_first, of_last = (f"of the {side} completion".replace("  ", " ") for side in (unit.first, unit.last))
    if accuracy is not None:
        before = percent(None if accuracy.starts_at_reference else accuracy.before)
        after = percent(accuracy.after)
        if accuracy.interval:
            after += " (95% interval {} to {})".format(*map(percent, accuracy.interval))
        rows.append((f"{unit.couples} whose {unit.better} completion has the higher reward", before, after))
    for label, name in (
        ("loss", "loss"),
        ("reward margin", "rewards/margins"),
        (f"log-probability {of_first}, nats", "logps/chosen"),
        (f"log-probability {of_last}, nats", "logps/rejected"),
        ("KL to the reference on these completions, nats per token", "kl"),
    ):
        measured = verdict.change(run, name)
        if measured.after is not None:
            rows.append((label, number(measured.before), number(measured.after)))
    return rows

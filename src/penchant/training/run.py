"""A whole run: from a run file to a trained model and a page that shows what happened."""

from __future__ import annotations

import inspect
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from penchant.config import RunConfig, config_from
from penchant.losses import Loss, WeightedSum, build_loss
from penchant.models.load import save_model
from penchant.report import write_model_card, write_report
from penchant.scoring.policy import Policy
from penchant.scoring.reference import Reference
from penchant.training import hardware
from penchant.training.datasets import Rows, plain_text
from penchant.training.describe import describe, expected_cost, layout_sentence, num_parameters
from penchant.training.identity import check_identity
from penchant.training.judgements import write_judgements
from penchant.training.logger import RunLog, count
from penchant.training.loop import fit
from penchant.training.rundir import (
    check_run_dir,
    choose_run_dir,
    open_run_dir,
    write_json,
    write_json_lines,
    write_text,
)
from penchant.training.setup import Setup, make_reference, set_up
from penchant.training.shared import Shared
from penchant.types import Example, TokenizedExample


@dataclass(frozen=True)
class RunResult:
    """A finished run: where it is and what it came to (`summary.json`)."""

    run_dir: Path
    summary: dict[str, Any]


def train(
    model: str | Policy,
    data: Rows,
    eval_data: Rows | None = None,
    loss: Loss | str | Mapping[str, Any] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> RunResult:
    """Trains a model on preferences: what `penchant train` does, from Python.

    Args:
        model: a local folder, a hub id or a `.gguf` file; or a `Policy`, which is trained in place.
        data: a file of rows, or an iterable of them, such as `{"prompt": ..., "chosen": ..., "rejected": ...}`.
        eval_data: held-out rows, likewise.
        loss: a loss, its name, or its settings; default: that of `method`.
        overwrite: replace a run that is already in `output_dir`.
        quiet: say nothing while working.
        settings: any other key of a run file (`learning_rate=1e-6`, `lora={"rank": 16}`, ...).

    Raises:
        UserError: something the caller can mend; the message says what.
    """
    settings = {"model": _name_of(model), "data": _name_of(data), **settings}
    if eval_data is not None:
        settings["eval_data"] = _name_of(eval_data)
    if isinstance(loss, Loss):
        settings["loss"] = loss.settings()
    elif loss is not None:
        settings["loss"] = {"name": loss} if isinstance(loss, str) else dict(loss)
    policy = model if isinstance(model, Policy) else None
    return execute(config_from(settings), data, eval_data, policy, overwrite, RunLog(quiet=quiet))


def execute(
    config: RunConfig,
    data: Rows | None = None,
    eval_data: Rows | None = None,
    policy: Policy | None = None,
    overwrite: bool = False,
    log: RunLog | None = None,
    shared: Shared | None = None,
) -> RunResult:
    """The run that `config` describes; data and policy in hand stand in for the files it names.

    Raises:
        UserError: something the caller can mend; the message says what.
    """
    log = log or RunLog()
    hardware.forget_peak_memory()
    run_dir = choose_run_dir(config)
    check_run_dir(run_dir, overwrite)
    setup = set_up(config, log, data, eval_data, policy, shared)
    describe(setup, log)
    open_run_dir(run_dir, overwrite)
    log.keep_in(run_dir)
    write_text(
        run_dir / "run.yaml",
        config.to_yaml(output_dir=str(run_dir), loss=setup.loss.settings(), learning_rate=config.peak_learning_rate()),
    )
    write_json(run_dir / "data.json", setup.datasets.findings)
    summary = _first_summary(setup)
    started = time.monotonic()

    def keep(**news: Any) -> None:
        peak = hardware.peak_memory_bytes(setup.policy.device)
        summary.update(news, wall_s=round(time.monotonic() - started, 2), peak_memory_bytes=peak)
        write_json(run_dir / "summary.json", summary)

    keep()
    try:
        _work(setup, log, run_dir, keep)
    except BaseException as error:
        keep(status="interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        log.event("stop", "failed", f"{type(error).__name__}: {error}", step=summary["steps"])
        raise
    finally:
        report = write_report(run_dir)
    log.say("report", str(report))
    return RunResult(run_dir, summary)


def resolved_run_file(config: RunConfig, run_dir: Path) -> str:
    """The run file that repeats a run, without anything left to defaults."""
    loss = build_loss(config.loss_settings()).settings()
    return config.to_yaml(output_dir=str(run_dir), loss=loss, learning_rate=config.peak_learning_rate())


def dry_run(config: RunConfig, log: RunLog | None = None, num_rows: int = 2) -> dict[str, Any]:
    """Everything up to the first step: says what was found, shows rows as the model sees them, writes nothing.

    Returns:
        `steps`, `seconds` and `memory_bytes` expected, and `rows`: the texts that the model is trained on.
    """
    log = log or RunLog()
    setup = set_up(config, log)
    describe(setup, log)
    tokenizer = setup.policy.tokenizer
    rows = []
    for example in setup.datasets.train.examples[:num_rows]:
        completions = zip(_completion_names(example), example.completion_ids, strict=True)
        rows.append({name: tokenizer.decode(ids) for name, ids in [("prompt", example.prompt_ids), *completions]})
    for row in rows:
        for name, text in row.items():
            log.say(name, repr(text))
    cost = expected_cost(setup)
    return {
        "steps": setup.steps,
        "seconds": round(cost.seconds, 1),
        "memory_bytes": cost.memory_bytes,
        "data": setup.datasets.findings,
        "rows": rows,
    }


def _work(setup: Setup, log: RunLog, run_dir: Path, keep: Callable[..., None]) -> None:
    """From a set-up to a trained, evaluated and saved model."""
    policy = setup.policy
    prompts = _sample_prompts(setup)
    before = _answers(setup, prompts, log, "before")
    reference = make_reference(setup, log)
    if reference is not None:
        keep(reference=reference.description)
        log.say("reference", reference.description)
        _check_identity(setup, reference, log)
    done = fit(setup, reference, log, run_dir, keep)
    keep(tokens_per_s=round(done.tokens_seen / done.train_s, 1))
    write_judgements(setup, reference, done, run_dir)
    if done.interrupted:
        keep(status="interrupted")
        return
    after = _answers(setup, prompts, log, "after")
    samples = [
        {
            "prompt": plain_text(example.prompt),
            "before": old,
            "after": new,
            "chosen": plain_text(example.completions[0]),
        }
        for example, old, new in zip(prompts, before, after, strict=True)
    ]
    write_json_lines(run_dir / "samples.jsonl", samples)
    save_model(policy.model, policy.tokenizer, run_dir / "model")
    keep(status="finished")
    write_model_card(run_dir)
    log.say("model", str(run_dir / "model"))


def _check_identity(setup: Setup, reference: Reference, log: RunLog) -> None:
    """Holds policy and reference against each other on a part of the first step's examples."""
    draw = next(setup.draws())
    parts, kl_parts = setup.batches(draw.examples)[-2:], setup.batches_to_score(draw.mismatched)[-2:]
    found, expected = check_identity(setup.policy, reference, setup.loss, parts, kl_parts)
    message = f"loss before the first step {found:.6f}, at policy = reference {expected:.6f}"
    log.event("info", "identity", message, step=0)


def _completion_names(example: TokenizedExample) -> list[str]:
    if len(example.completion_ids) == 1:
        return [{True: "desirable", False: "undesirable", None: "completion"}[example.is_desirable]]
    if len(example.completion_ids) == 2:
        return ["chosen", "rejected"]
    return [f"rank {place}" for place in range(1, len(example.completion_ids) + 1)]


def _sample_prompts(setup: Setup) -> list[Example]:
    source = setup.datasets.heldout if setup.datasets.heldout.examples else setup.datasets.train
    return [source.texts[example.index] for example in source.examples[: setup.config.num_samples]]


def _answers(setup: Setup, prompts: list[Example], log: RunLog, when: str) -> list[str]:
    if not prompts:
        return []
    log.say("samples", f"answering {count(len(prompts), 'prompt')} {when} training")
    return setup.policy.generate([example.prompt for example in prompts], setup.config.sample_max_new_tokens)


def _first_summary(setup: Setup) -> dict[str, Any]:
    config, policy = setup.config, setup.policy
    packages = ("penchant", "torch", "transformers", "peft", "tokenizers")
    return {
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": config.method_name(),
        "loss": setup.loss.settings(),
        "loss_doc": _documentation(setup.loss),
        "model": config.model,
        "model_sha256": setup.base_sha256,
        "data_sha256": setup.datasets.findings["train"]["sha256"],
        "lora": bool(config.lora.rank),
        "reference": setup.reference_kind,
        "layout": layout_sentence(setup),
        "device": str(policy.device),
        "dtype": policy.precision,
        "num_parameters": num_parameters(policy.model)[1],
        "num_trainable": num_parameters(policy.model)[0],
        "steps": 0,
        "examples_seen": 0,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
    }


def _documentation(loss: Loss) -> str:
    """Equation and source of a loss, or of each loss of a sum."""
    terms = [term for _, term in loss.terms] if isinstance(loss, WeightedSum) else [loss]
    return "\n\n".join(inspect.getdoc(term) or "" for term in terms)


def _name_of(source: Any) -> str:
    """What a run file says of a model or of data that were handed over in memory."""
    if isinstance(source, str):
        return source
    if isinstance(source, Policy):
        return getattr(source.model, "name_or_path", "") or "model in memory"
    return str(source) if isinstance(source, Path) else "rows in memory"

"""A whole run: from a run file to a trained model and a page that shows what happened."""

from __future__ import annotations

import dataclasses
import inspect
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from penchant.config import RunConfig, config_from
from penchant.data import loader
from penchant.evaluate.pairs import evaluate_pairs
from penchant.losses import PairLoss
from penchant.models.load import save_model
from penchant.report import write_model_card, write_report
from penchant.scoring.policy import Policy
from penchant.scoring.reference import Reference
from penchant.training import hardware
from penchant.training.datasets import Rows, plain_text
from penchant.training.identity import check_identity
from penchant.training.logger import RunLog, count
from penchant.training.loop import Fit, fit
from penchant.training.rundir import (
    check_run_dir,
    choose_run_dir,
    open_run_dir,
    write_json,
    write_json_lines,
    write_text,
)
from penchant.training.setup import Setup, expected_cost, layout_sentence, make_reference, num_parameters, set_up
from penchant.types import Pair


@dataclass(frozen=True)
class RunResult:
    """A finished run: where it is and what it came to (`summary.json`)."""

    run_dir: Path
    summary: dict[str, Any]


def train(
    model: str | Policy,
    data: Rows,
    eval_data: Rows | None = None,
    loss: PairLoss | str | Mapping[str, Any] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> RunResult:
    """Trains a model on preference pairs: what `penchant train` does, from Python.

    Args:
        model: a local folder, a hub id or a `.gguf` file; or a `Policy`, which is trained in place.
        data: a file of pairs, or an iterable of rows such as `{"prompt": ..., "chosen": ..., "rejected": ...}`.
        eval_data: held-out pairs, likewise.
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
    if isinstance(loss, PairLoss):
        settings["loss"] = _settings_of(loss)
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
) -> RunResult:
    """The run that `config` describes; data and policy in hand stand in for the files it names.

    Raises:
        UserError: something the caller can mend; the message says what.
    """
    log = log or RunLog()
    run_dir = choose_run_dir(config)
    check_run_dir(run_dir, overwrite)
    setup = set_up(config, log, data, eval_data, policy)
    open_run_dir(run_dir, overwrite)
    log.keep_in(run_dir)
    write_text(
        run_dir / "run.yaml",
        config.to_yaml(
            output_dir=str(run_dir), loss=_settings_of(setup.loss), learning_rate=config.peak_learning_rate()
        ),
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


def dry_run(config: RunConfig, log: RunLog | None = None, num_rows: int = 2) -> dict[str, Any]:
    """Everything up to the first step: says what was found, shows rows as the model sees them, writes nothing.

    Returns:
        `steps`, `seconds` and `memory_bytes` expected, and `rows`: the texts that the model is trained on.
    """
    log = log or RunLog()
    setup = set_up(config, log)
    tokenizer = setup.policy.tokenizer
    rows = [
        {
            name: tokenizer.decode(ids)
            for name, ids in (("prompt", row.prompt_ids), ("chosen", row.chosen_ids), ("rejected", row.rejected_ids))
        }
        for row in setup.datasets.train.pairs[:num_rows]
    ]
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
    _write_pairs(setup, reference, done, run_dir)
    if done.interrupted:
        keep(status="interrupted")
        return
    after = _answers(setup, prompts, log, "after")
    samples = [
        {"prompt": plain_text(pair.prompt), "before": old, "after": new, "chosen": plain_text(pair.chosen)}
        for pair, old, new in zip(prompts, before, after, strict=True)
    ]
    write_json_lines(run_dir / "samples.jsonl", samples)
    save_model(policy.model, policy.tokenizer, run_dir / "model")
    keep(status="finished")
    write_model_card(run_dir)
    log.say("model", str(run_dir / "model"))


def _check_identity(setup: Setup, reference: Reference, log: RunLog) -> None:
    """Holds policy and reference against each other on a part of the first step's pairs."""
    first = next(loader.batches(setup.datasets.train.pairs, setup.config.batch_size, setup.config.seed))
    parts = setup.layout.parts(first, setup.max_tokens)[-2:]
    found, expected = check_identity(setup.policy, reference, setup.loss, map(setup.layout.collate, parts))
    message = f"loss before the first step {found:.6f}, at policy = reference {expected:.6f}"
    log.event("info", "identity", message, step=0)


def _sample_prompts(setup: Setup) -> list[Pair]:
    source = setup.datasets.heldout if setup.datasets.heldout.pairs else setup.datasets.train
    return [source.texts[pair.index] for pair in source.pairs[: setup.config.num_samples]]


def _answers(setup: Setup, prompts: list[Pair], log: RunLog, when: str) -> list[str]:
    if not prompts:
        return []
    log.say("samples", f"answering {count(len(prompts), 'prompt')} {when} training")
    return setup.policy.generate([pair.prompt for pair in prompts], setup.config.sample_max_new_tokens)


def _write_pairs(setup: Setup, reference: Reference | None, done: Fit, run_dir: Path) -> None:
    """Keeps each pair's rewards after training: of the held-out pairs or, without any, of some training pairs."""
    datasets = setup.datasets
    if done.evaluations:
        split, data, rewards = "eval", datasets.heldout, done.evaluations[-1].rewards
    else:
        split, data = "train", datasets.train
        batches = setup.layout.batches(setup.visited_pairs()[:256], 2 * setup.max_tokens)
        rewards = evaluate_pairs(setup.policy, reference, setup.loss, batches, lambda _: None).rewards
    lengths = {pair.index: (len(pair.chosen_ids), len(pair.rejected_ids)) for pair in data.pairs}
    records = [
        {
            "split": split,
            "source": data.texts[index].source,
            "prompt": plain_text(data.texts[index].prompt),
            "chosen": plain_text(data.texts[index].chosen),
            "rejected": plain_text(data.texts[index].rejected),
            "chosen_reward": chosen if math.isfinite(chosen) else None,
            "rejected_reward": rejected if math.isfinite(rejected) else None,
            "chosen_length": lengths[index][0],
            "rejected_length": lengths[index][1],
        }
        for index, (chosen, rejected) in sorted(rewards.items())
    ]
    write_json_lines(run_dir / "pairs.jsonl", records)


def _first_summary(setup: Setup) -> dict[str, Any]:
    config, policy = setup.config, setup.policy
    packages = ("penchant", "torch", "transformers", "peft", "tokenizers")
    return {
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": config.method,
        "loss": _settings_of(setup.loss),
        "loss_doc": inspect.cleandoc(setup.loss.__doc__ or ""),
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
        "pairs_seen": 0,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
    }


def _settings_of(loss: PairLoss) -> dict[str, Any]:
    """A loss as a run file describes it."""
    return {"name": loss.name, **dataclasses.asdict(loss)}


def _name_of(source: Any) -> str:
    """What a run file says of a model or of data that were handed over in memory."""
    if isinstance(source, str):
        return source
    if isinstance(source, Policy):
        return getattr(source.model, "name_or_path", "") or "model in memory"
    return str(source) if isinstance(source, Path) else "rows in memory"

"""A whole run: from a run file to a trained model and a page that shows what happened."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from penchant.config import RunConfig, config_from
from penchant.data import loader
from penchant.errors import UserError
from penchant.evaluate.pairs import evaluate_pairs
from penchant.losses import PairLoss, build_loss
from penchant.models.adapters import add_lora
from penchant.models.load import save_model, weights_sha256
from penchant.models.logps import builds_full_logits
from penchant.report import write_model_card, write_report
from penchant.scoring.layout import Layout, choose_layout, trouble_with_sharing
from penchant.scoring.policy import Policy
from penchant.scoring.reference import AdapterOff, FrozenModel, Precomputed, Reference
from penchant.training import hardware
from penchant.training.estimate import Estimate, estimate_run
from penchant.training.identity import check_identity
from penchant.training.logger import RunLog, duration
from penchant.training.loop import Fit, eval_interval, fit, num_steps, scoring_batches
from penchant.training.prepare import (
    Datasets,
    Rows,
    plain_text,
    read_rows,
    refuse_bad_rows,
    tokenize_datasets,
)
from penchant.training.rundir import (
    check_run_dir,
    choose_run_dir,
    open_run_dir,
    write_json,
    write_json_lines,
    write_text,
)
from penchant.training.step import trainable_parameters
from penchant.types import Pair, TokenizedPair


@dataclass(frozen=True)
class RunResult:
    """A finished run: where it is and what it came to (`summary.json`)."""

    run_dir: Path
    summary: dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs before its first pass over the data."""

    config: RunConfig
    loss: PairLoss
    policy: Policy
    datasets: Datasets
    reference_kind: str
    layout: Layout
    max_tokens: int
    base_sha256: str


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
        settings["loss"] = {"name": loss.name, **dataclasses.asdict(loss)}
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
    prepared = prepare(config, log, data, eval_data, policy)
    open_run_dir(run_dir, overwrite)
    log.run_dir = run_dir
    write_text(run_dir / "run.yaml", config.to_yaml())
    write_json(run_dir / "data.json", prepared.datasets.findings)
    summary = _first_summary(prepared)
    started = time.monotonic()

    def keep(**news: Any) -> None:
        peak = hardware.peak_memory_bytes(prepared.policy.device)
        summary.update(news, wall_s=round(time.monotonic() - started, 2), peak_memory_bytes=peak)
        write_json(run_dir / "summary.json", summary)

    keep()
    try:
        _work(prepared, log, run_dir, keep)
    except BaseException as error:
        keep(status="interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        log.event("stop", "failed", f"{type(error).__name__}: {error}", step=summary["steps"])
        raise
    finally:
        report = write_report(run_dir)
    log.say("report", str(report))
    return RunResult(run_dir, summary)


def dry_run(config: RunConfig, log: RunLog | None = None, num_rows: int = 2) -> dict[str, Any]:
    """Everything up to the first step: says what was found, shows the first rows as the model sees them, writes nothing.

    Returns:
        `steps`, `seconds` and `memory_bytes` expected, and `rows`: the texts that the model is trained on.
    """
    log = log or RunLog()
    prepared = prepare(config, log)
    tokenizer = prepared.policy.tokenizer
    rows = [
        {
            name: tokenizer.decode(ids)
            for name, ids in (("prompt", row.prompt_ids), ("chosen", row.chosen_ids), ("rejected", row.rejected_ids))
        }
        for row in prepared.datasets.train.pairs[:num_rows]
    ]
    for row in rows:
        for name, text in row.items():
            log.say(name, repr(text))
    cost = expected_cost(prepared)
    return {
        "steps": num_steps(config, len(prepared.datasets.train.pairs)),
        "seconds": round(cost.seconds, 1),
        "memory_bytes": cost.memory_bytes,
        "data": prepared.datasets.findings,
        "rows": rows,
    }


def prepare(
    config: RunConfig,
    log: RunLog,
    data: Rows | None = None,
    eval_data: Rows | None = None,
    policy: Policy | None = None,
) -> Prepared:
    """Reads data and model, says what was found, and refuses what cannot work before anything is written."""
    _refuse_several_processes()
    loss = build_loss(config.loss_settings())
    _refuse_idle_options(config, loss)
    train_rows = read_rows(data if data is not None else config.data, "data")
    refuse_bad_rows(train_rows, config.max_bad_rows)
    heldout_rows = None
    if eval_data is not None or config.eval_data:
        heldout_rows = read_rows(eval_data if eval_data is not None else str(config.eval_data), "eval_data")
        refuse_bad_rows(heldout_rows, config.max_bad_rows)

    device = hardware.resolve_device(config.device) if policy is None else policy.device
    precision = hardware.resolve_precision(config.dtype, device)
    if policy is None:
        log.say("model", f"loading {config.model}")
        torch.manual_seed(config.seed)
        policy = Policy.from_pretrained(config.model, device, precision)
    if config.chat_template:
        policy.tokenizer.chat_template = _read_template(config.chat_template)
    datasets = tokenize_datasets(config, train_rows, heldout_rows, policy.tokenizer)
    base_sha256 = weights_sha256(policy.model)
    layout = choose_layout(policy, config.layout, datasets.train.pairs)
    if config.lora.rank:
        adapted = add_lora(
            policy.model,
            config.lora.rank,
            config.lora.alpha or 2 * config.lora.rank,
            config.lora.target_modules,
        )
        policy = Policy(adapted, policy.tokenizer, policy.precision)
    prepared = Prepared(
        config=config,
        loss=loss,
        policy=policy,
        datasets=datasets,
        reference_kind=_reference_kind(config, loss),
        layout=layout,
        max_tokens=config.microbatch_tokens or hardware.default_microbatch_tokens(device),
        base_sha256=base_sha256,
    )
    _say_what_was_found(prepared, log)
    return prepared


def _work(prepared: Prepared, log: RunLog, run_dir: Path, keep: Callable[..., None]) -> None:
    """From prepared parts to a trained, evaluated and saved model."""
    config, policy, datasets = prepared.config, prepared.policy, prepared.datasets
    if policy.precision == "bf16" and not hardware.multiplies_bf16(policy.device):
        log.event(
            "warn",
            "slow-bf16",
            "dtype: this machine has no bf16 arithmetic; float32 is many times faster here",
            0,
        )
    prompts = _sample_prompts(datasets, config.num_samples)
    before = _answers(prepared, prompts, log, "before")
    reference = make_reference(prepared, log)
    if reference is not None:
        keep(reference=reference.description)
        log.say("reference", reference.description)
        first = next(loader.batches(datasets.train.pairs, config.batch_size, config.seed))
        parts = loader.microbatches(first, prepared.max_tokens, prepared.layout.cost)[-2:]
        found, expected = check_identity(policy, reference, prepared.loss, map(prepared.layout.collate, parts))
        log.event(
            "info",
            "identity",
            f"loss before the first step {found:.6f}, at policy = reference {expected:.6f}",
            0,
        )

    done = fit(
        policy,
        reference,
        prepared.loss,
        datasets.train.pairs,
        datasets.heldout.pairs,
        config,
        prepared.layout,
        prepared.max_tokens,
        log,
        run_dir,
    )
    keep(steps=done.steps, pairs_seen=done.pairs_seen, tokens_per_s=round(done.tokens_seen / done.train_s, 1))
    _write_pairs(prepared, reference, done, run_dir)
    if done.interrupted:
        keep(status="interrupted")
        return
    after = _answers(prepared, prompts, log, "after")
    write_json_lines(
        run_dir / "samples.jsonl",
        [
            {
                "prompt": plain_text(pair.prompt),
                "before": old,
                "after": new,
                "chosen": plain_text(pair.chosen),
            }
            for pair, old, new in zip(prompts, before, after, strict=True)
        ],
    )
    save_model(policy.model, policy.tokenizer, run_dir / "model")
    keep(status="finished")
    write_model_card(run_dir)
    log.say("model", str(run_dir / "model"))


def make_reference(prepared: Prepared, log: RunLog) -> Reference | None:
    """The reference of the run, from the policy's weights as they stand or from another model."""
    config, policy = prepared.config, prepared.policy
    kind = prepared.reference_kind
    if kind == "none":
        return None
    if kind == "adapter_off":
        return AdapterOff(policy)
    source = policy
    if config.reference.model:
        source = Policy.from_pretrained(config.reference.model, policy.device, policy.precision)
        _refuse_other_tokenizer(policy, source, config.reference.model)
        if prepared.layout.name == "prefix_shared" and (
            trouble := trouble_with_sharing(source, prepared.datasets.train.pairs)
        ):
            raise UserError(f"reference.model: does not fit the layout prefix_shared: {trouble}; set layout: padded.")
    if kind == "copy":
        return FrozenModel.copy_of(policy, config.reference.offload)
    if kind == "model":
        return FrozenModel(source, is_start_of_policy=False, offload=config.reference.offload)
    pairs = [*_visited_pairs(prepared), *prepared.datasets.heldout.pairs]
    with log.progress("reference", len(pairs)) as meter:
        batches = scoring_batches(pairs, prepared.layout, prepared.max_tokens)
        return Precomputed.from_batches(source, batches, source is policy, meter.advance)


def expected_cost(prepared: Prepared) -> Estimate:
    """Time and memory that the run will take."""
    config, datasets = prepared.config, prepared.datasets
    steps = num_steps(config, len(datasets.train.pairs))
    learned, largest = 0, 0
    order = loader.batches(datasets.train.pairs, config.batch_size, config.seed)
    sampled = min(steps, 50)  # a run may be long; its batches resemble each other
    for _ in range(sampled):
        costs = [
            prepared.layout.cost(part)
            for part in loader.microbatches(next(order), prepared.max_tokens, prepared.layout.cost)
        ]
        learned += sum(costs)
        largest = max(largest, *costs)
    learned_in_all = learned / sampled * steps
    heldout = sum(
        prepared.layout.cost(part)
        for part in loader.microbatches(datasets.heldout.pairs, prepared.max_tokens, prepared.layout.cost)
    )
    scored = float(heldout * (2 + (steps - 1) // eval_interval(config, steps)))
    if prepared.reference_kind == "precomputed":
        epochs = steps / loader.steps_per_epoch(len(datasets.train.pairs), config.batch_size)
        scored += heldout + learned_in_all / max(1.0, epochs)
    elif prepared.reference_kind != "none":
        scored += scored + learned_in_all
    has_copy = prepared.reference_kind in ("copy", "model")
    return estimate_run(
        prepared.policy, prepared.layout, datasets.train.pairs, learned_in_all, scored, largest, has_copy
    )


def _visited_pairs(prepared: Prepared) -> list[TokenizedPair]:
    """The training pairs that the run's steps will see; with few steps not all of them."""
    config, pairs = prepared.config, prepared.datasets.train.pairs
    steps = min(num_steps(config, len(pairs)), loader.steps_per_epoch(len(pairs), config.batch_size))
    order = loader.batches(pairs, config.batch_size, config.seed)
    return [pair for _ in range(steps) for pair in next(order)]


def _reference_kind(config: RunConfig, loss: PairLoss) -> str:
    if not loss.needs_reference:
        return "none"
    if config.reference.kind != "auto":
        return config.reference.kind
    return "adapter_off" if config.lora.rank and not config.reference.model else "precomputed"


def _refuse_several_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this version trains in one process; start it without torchrun")


def _refuse_idle_options(config: RunConfig, loss: PairLoss) -> None:
    if not loss.needs_reference and config.reference.model_fields_set:
        raise UserError(f"reference: the loss '{loss.name}' uses no reference, so its settings have no effect.")


def _refuse_other_tokenizer(policy: Policy, other: Policy, name: str) -> None:
    if policy.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise UserError(
            f"reference.model: '{name}' has another vocabulary than the policy; its token ids mean other words."
        )


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template: '{path}' cannot be read: {error}") from None


def _name_of(source: Any) -> str:
    """What a run file says of a model or of data that were handed over in memory."""
    if isinstance(source, str):
        return source
    if isinstance(source, Policy):
        return getattr(source.model, "name_or_path", "") or "model in memory"
    return str(source) if isinstance(source, Path) else "rows in memory"


def _say_what_was_found(prepared: Prepared, log: RunLog) -> None:
    config, policy = prepared.config, prepared.policy
    for label, data in (
        ("data", prepared.datasets.findings["train"]),
        ("held out", prepared.datasets.findings["eval"]),
    ):
        log.say(
            label,
            _data_sentence(data) if data else "none: the run will not know whether what it learns carries over",
        )
    for example in prepared.datasets.findings["train"]["examples"][:3]:
        log.say("", example)
    trainable = sum(parameter.numel() for parameter in trainable_parameters(policy.model))
    total = sum(parameter.numel() for parameter in policy.model.parameters())
    trained = (
        "all trained"
        if trainable == total
        else f"{trainable / 1e6:.2f}M of them trained (LoRA rank {config.lora.rank})"
    )
    log.say(
        "model",
        f"{_short(config.model)}: {total / 1e6:.1f}M parameters, {trained}; {policy.precision} on {policy.device}",
    )
    log.say("method", f"{config.method}: {prepared.loss}")
    steps = num_steps(config, len(prepared.datasets.train.pairs))
    log.say("layout", _layout_sentence(prepared))
    cost = expected_cost(prepared)
    log.say(
        "plan",
        f"{steps} steps of {min(config.batch_size, len(prepared.datasets.train.pairs))} pairs at learning rate "
        f"{config.peak_learning_rate():g}; about {duration(cost.seconds)} and {cost.memory_bytes / 2**30:.1f} GiB expected",
    )


def _data_sentence(data: dict[str, Any]) -> str:
    families = ", ".join(data["families"])
    dropped = sum(data["dropped"].values())
    reasons = "; ".join(f"{count} {reason}" for reason, count in data["dropped"].items())
    lengths = ", ".join(f"{name} {v['mean']:.0f}" for name, v in data["lengths"].items())
    return (
        f"{data['used']} pairs from {_short(data['path'])} ({families})"
        + (f"; {dropped} left out ({reasons})" if dropped else "")
        + (f"; {data['truncated']} cut at max_length" if data["truncated"] else "")
        + f"; mean tokens: {lengths}; the longer answer is the chosen one in {data['longer_wins']:.1%}"
    )


def _layout_sentence(prepared: Prepared) -> str:
    sentence = f"{prepared.layout.reason}; up to {prepared.max_tokens} tokens at once"
    if builds_full_logits(prepared.policy.model):
        return sentence + "; this model's head is not a plain projection, so it builds logits for every position"
    return sentence


def _sample_prompts(datasets: Datasets, number: int) -> list[Pair]:
    source = datasets.heldout if datasets.heldout.pairs else datasets.train
    return [source.texts[pair.index] for pair in source.pairs[:number]]


def _answers(prepared: Prepared, prompts: list[Pair], log: RunLog, when: str) -> list[str]:
    if not prompts:
        return []
    log.say("samples", f"answering {len(prompts)} prompts {when} training")
    return prepared.policy.generate([pair.prompt for pair in prompts], prepared.config.sample_max_new_tokens)


def _write_pairs(prepared: Prepared, reference: Reference | None, done: Fit, run_dir: Path) -> None:
    """Keeps each pair's rewards after training: of the held-out pairs, or of some training pairs where there are none."""
    datasets = prepared.datasets
    if done.evaluations:
        split, data, rewards = "eval", datasets.heldout, done.evaluations[-1].rewards
    else:
        split, data = "train", datasets.train
        batches = scoring_batches(_visited_pairs(prepared)[:256], prepared.layout, prepared.max_tokens)
        rewards = evaluate_pairs(prepared.policy, reference, prepared.loss, batches, lambda _: None).rewards
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


def _first_summary(prepared: Prepared) -> dict[str, Any]:
    config, policy = prepared.config, prepared.policy
    packages = ("penchant", "torch", "transformers", "peft", "tokenizers")
    return {
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": config.method,
        "loss": {"name": prepared.loss.name, **dataclasses.asdict(prepared.loss)},
        "loss_doc": inspect.cleandoc(prepared.loss.__doc__ or ""),
        "model": config.model,
        "model_sha256": prepared.base_sha256,
        "data_sha256": prepared.datasets.findings["train"]["sha256"],
        "lora": bool(config.lora.rank),
        "reference": "none" if prepared.reference_kind == "none" else prepared.reference_kind,
        "layout": _layout_sentence(prepared),
        "device": str(policy.device),
        "dtype": policy.precision,
        "num_parameters": sum(parameter.numel() for parameter in policy.model.parameters()),
        "num_trainable": sum(parameter.numel() for parameter in trainable_parameters(policy.model)),
        "steps": 0,
        "pairs_seen": 0,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
    }


def _short(path: str) -> str:
    """The last part of a path; a hub id stays whole."""
    return Path(path).name if Path(path).exists() else path

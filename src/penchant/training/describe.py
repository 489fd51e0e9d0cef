"""What people are told of a run before it begins, its expected cost included."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from penchant.data.flat import has_column
from penchant.models.logps import builds_full_logits
from penchant.scoring.noise import margin_noise
from penchant.training import hardware
from penchant.training.checks import tell
from penchant.training.datasets import COLUMNS
from penchant.training.estimate import Estimate, estimate_run, measure
from penchant.training.logger import RunLog, count, duration
from penchant.training.online import OnlineSetup
from penchant.training.optim import trainable_parameters
from penchant.training.schedule import eval_interval
from penchant.training.setup import Setup
from penchant.training.state import expected_checkpoint_bytes


def describe(setup: Setup, log: RunLog) -> None:
    """Says what was found and what will be done."""
    config, policy, findings = setup.config, setup.policy, setup.datasets.findings
    log.say("data", _data_sentence(findings["train"]))
    for example in findings["train"]["examples"][:3]:
        log.say("", example)
    for need, column in COLUMNS.items():
        if has_column(setup.datasets.train.examples, column) and need not in setup.loss.needs:
            words, reader = need.replace("_", " "), {"margins": "odpo", "win_probabilities": "sppo-soft"}[need]
            log.say("", f"the rows carry {words}, which {setup.loss.name} does not read ({reader} does)")
    nothing = "nothing: nobody will see whether what is learned carries over (eval_data, eval_size)"
    log.say("held out", _data_sentence(findings["eval"]) if findings["eval"] else nothing)
    if isinstance(setup, OnlineSetup):
        _describe_rounds(setup, log)
    else:
        tell(findings, log)
    trainable, total = num_parameters(policy.model)
    trained = "all trained" if trainable == total else f"{trainable / 1e6:.2f}M trained (LoRA rank {config.lora.rank})"
    arithmetic = f"{policy.precision} on {policy.device}"
    log.say("model", f"{short_path(config.model)}: {total / 1e6:.1f}M parameters, {trained}; {arithmetic}")
    if policy.precision == "bf16" and not hardware.multiplies_bf16(policy.device):
        log.event("warn", "slow-bf16", "dtype: this machine has no bf16 arithmetic; float32 is far faster here", 0)
    log.say("method", f"{config.method_name()}: {setup.loss}")
    log.say("layout", layout_sentence(setup))
    _describe_noise(setup, log)
    cost = expected_cost(setup)
    examples, unit = min(config.batch_size, len(setup.datasets.train.examples)), findings["train"]["unit"]
    if isinstance(setup, OnlineSetup):
        kinds = {"best": "completion", "none": "prompt"}
        examples, unit = config.batch_size, kinds.get(setup.plan.pairs or "", "pair")
    log.say(
        "plan",
        f"{count(setup.steps, 'step')} of {count(examples, unit)} at learning rate {config.peak_learning_rate():g}; "
        f"about {duration(cost.seconds)} and {cost.memory_bytes / 2**30:.1f} GiB expected; a checkpoint of "
        f"{expected_checkpoint_bytes(policy, config) / 1e9:.2g} GB every "
        + (count(config.save_steps, "step") if config.save_steps else f"{config.save_minutes:g} min"),
    )


def _describe_noise(setup: Setup, log: RunLog) -> None:
    """How much of a margin rounding makes up, under bf16."""
    if setup.policy.precision == "float32":
        return
    noise = margin_noise(setup.policy, setup.layout, setup.datasets.train.examples)
    if noise is not None:
        what = "log-probabilities" if setup.datasets.findings["train"]["unit"] == "completion" else "margins"
        log.say("arithmetic", f"bf16 products over float32 weights: {what} are good to about {noise:.2g} nats")


def _describe_rounds(setup: OnlineSetup, log: RunLog) -> None:
    """What is sampled, who judges it, and what is made of it."""
    plan, sampling = setup.plan, setup.sampling
    kept = f", {plan.accept} kept by rejection sampling at beta {plan.accept_beta or 0.5:g}" if plan.accept else ""
    narrowed = [f"top-p {sampling.top_p:g}"] * (sampling.top_p < 1) + [f"top-k {sampling.top_k}"] * (sampling.top_k > 0)
    log.say("judge", setup.judge.description)
    log.say(
        "rounds",
        f"{count(setup.num_rounds, 'round')} of {count(setup.prompts_per_round, 'prompt')}, "
        f"{count(setup.num_completions, 'completion')} each, up to {sampling.max_new_tokens} tokens ("
        + ", ".join([f"temperature {sampling.temperature:g}", *narrowed])
        + f"){kept}; {setup.weighing()}; {count(setup.steps_per_round, 'step')} a round"
        + ("; each round's first policy is its reference" if plan.renew_reference else ""),
    )


def expected_cost(setup: Setup) -> Estimate:
    """Time and memory that the run will take."""
    config, layout = setup.config, setup.layout
    train_examples, heldout_examples = setup.datasets.train.examples, setup.datasets.heldout.examples
    looked_at = min(setup.steps, 50)  # a run may be long; its batches resemble each other
    drawn = list(islice(setup.draws(), looked_at))
    parts = [part for draw in drawn for part in layout.parts(draw.examples, setup.max_tokens)]
    learned = sum(map(layout.cost, parts)) / looked_at * setup.steps
    mismatched = sum(layout.cost([e]) for draw in drawn for e in draw.mismatched) / looked_at * setup.steps
    if isinstance(setup, OnlineSetup):
        train_examples = [example for draw in drawn for example in draw.examples]
        heldout = len(heldout_examples) * setup.sampling_plan.max_new_tokens
    else:
        heldout = sum(map(layout.cost, layout.parts(heldout_examples, 2 * setup.max_tokens)))
        heldout += sum(layout.cost([example]) for example in setup.heldout_mismatched)
    scored = float(heldout * (2 + (setup.steps - 1) // eval_interval(config, setup.steps))) + mismatched
    if setup.reference_kind == "precomputed":
        scored += heldout + mismatched + learned / max(1.0, setup.steps / setup.steps_per_epoch)
    elif setup.reference_kind != "none":
        scored += scored + learned
    if "whole_batch" in setup.loss.needs and len(parts) > len(drawn):
        scored += learned  # the first of the two passes
    scored += setup.tokens_to_sample()
    arithmetic = (
        *(setup.base_sha256, config.lora.rank, config.gradient_checkpointing),
        *(layout.name, setup.policy.precision, str(setup.policy.device)),
    )
    data = setup.datasets.findings["train"]["sha256"]
    speed = setup.shared.once(("speed", arithmetic, data), lambda: measure(setup.policy, layout, train_examples))
    has_copy = setup.reference_kind in ("copy", "model")
    return estimate_run(setup.policy, speed, learned, scored, max(map(layout.cost, parts)), has_copy)


def layout_sentence(setup: Setup) -> str:
    """The layout and why."""
    sentence = f"{setup.layout.reason}; up to {setup.max_tokens} tokens at once"
    if builds_full_logits(setup.policy.model):
        return sentence + "; this model's head is not a plain projection, so it builds logits for every position"
    return sentence


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """Trained parameters, and all."""
    return (
        sum(parameter.numel() for parameter in trainable_parameters(model)),
        sum(parameter.numel() for parameter in model.parameters()),
    )


def short_path(path: str) -> str:
    """The last part of a path; a hub id stays whole."""
    return Path(path).name if Path(path).exists() else path


def _data_sentence(data: dict[str, Any]) -> str:
    families = ", ".join(data["families"])
    dropped = sum(data["dropped"].values())
    reasons = "; ".join(f"{rows} {reason}" for reason, rows in data["dropped"].items())
    lengths = ", ".join(f"{name} {v['mean']:.0f}" for name, v in data["lengths"].items())
    return (
        f"{count(data['used'], data['unit'])} from {short_path(data['path'])}"
        + (f" ({families})" if families else "")
        + (f"; {dropped} left out ({reasons})" if dropped else "")
        + (f"; {data['truncated']} cut at max_length" if data["truncated"] else "")
        + f"; mean tokens: {lengths}"
        + (f"; {data['desirable']} desirable" if data["desirable"] is not None else "")
        + (
            f"; the longer answer is the better one in {data['longer_wins']:.1%}"
            if data["longer_wins"] is not None
            else ""
        )
    )

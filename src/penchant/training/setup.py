"""Before the first step: data, model, layout and reference of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from penchant.config import ReferenceConfig, RunConfig
from penchant.data import loader
from penchant.data.chat import PLAIN_CHAT_TEMPLATE
from penchant.data.formats import ExampleData
from penchant.errors import UserError
from penchant.losses import Loss, build_loss
from penchant.models.adapters import add_lora
from penchant.models.fingerprints import weights_sha256
from penchant.models.trust import refuse_old_versions
from penchant.scoring.layout import Layout, choose_layout, trouble_with_sharing
from penchant.scoring.policy import Policy
from penchant.scoring.reference import AdapterOff, FrozenModel, LogpsCache, Precomputed, Reference
from penchant.training import hardware
from penchant.training.checks import label_weights
from penchant.training.datasets import (
    Datasets,
    Rows,
    fit_to_loss,
    read_data,
    refuse_bad_rows,
    refuse_idle_data_options,
    split_heldout,
    tokenize_datasets,
)
from penchant.training.logger import RunLog
from penchant.training.schedule import num_steps
from penchant.training.shared import Shared
from penchant.types import Batch, Text, TokenizedExample


@dataclass
class Setup:
    """Everything that a run needs before its first pass over the data."""

    config: RunConfig
    loss: Loss
    policy: Policy
    datasets: Datasets
    layout: Layout
    base_sha256: str
    """Hash of the weights that the policy begins from."""
    shared: Shared = field(default_factory=Shared, kw_only=True)
    heldout_mismatched: list[TokenizedExample] = field(default_factory=list, kw_only=True)
    """The held-out prompts with completions of others, where the loss needs the KL divergence."""
    max_tokens: int = field(init=False)
    """Tokens computed at once in training, halved when memory runs out; passes without gradient take twice as many."""

    def __post_init__(self) -> None:
        self.max_tokens = self.config.microbatch_tokens or hardware.default_microbatch_tokens(self.policy.device)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return num_steps(self.config, len(self.datasets.train.examples))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that visit every training example once."""
        return loader.steps_per_epoch(len(self.datasets.train.examples), self.config.batch_size)

    @property
    def reference_kind(self) -> str:
        """The kind of reference with `auto` resolved; `none` where the loss needs none."""
        if "reference" not in self.loss.needs:
            return "none"
        if self.config.reference.kind != "auto":
            return self.config.reference.kind
        return "adapter_off" if self.config.lora.rank and not self.config.reference.model else "precomputed"

    def draws(self, start_step: int = 0) -> Iterator[loader.Draw]:
        """The optimizer batches of the run behind its first `start_step`, without end."""
        within = self.config.max_length if "kl" in self.loss.needs else None
        return loader.draws(self.datasets.train.examples, self.config.batch_size, self.config.seed, start_step, within)

    def batches(self, examples: Sequence[TokenizedExample]) -> list[Batch]:
        """Microbatches to learn from."""
        return list(self.layout.batches(examples, self.max_tokens, "prompts" in self.loss.needs))

    def batches_to_score(self, examples: Sequence[TokenizedExample]) -> list[Batch]:
        """Batches for a pass without gradient."""
        return list(self.layout.batches(examples, 2 * self.max_tokens, "prompts" in self.loss.needs))

    def visited(self) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
        """The training examples that the run's steps will see, each once, and the mismatched ones of all steps."""
        drawn = list(
            islice(self.draws(), self.steps if "kl" in self.loss.needs else min(self.steps, self.steps_per_epoch))
        )
        examples = [example for draw in drawn[: self.steps_per_epoch] for example in draw.examples]
        return examples, [example for draw in drawn for example in draw.mismatched]

    def tokens_to_sample(self) -> float:
        """Tokens that training will sample."""
        return 0.0

    def shown_prompts(self) -> list[tuple[Text, Text | None]]:
        """Some prompts for the report, held-out ones if there are any, each with the better of its completions."""
        source = self.datasets.heldout if self.datasets.heldout.examples else self.datasets.train
        texts = [source.texts[example.index] for example in source.examples[: self.config.num_samples]]
        return [(text.prompt, text.completions[0]) for text in texts]

    def source_of(self, example: TokenizedExample) -> str:
        """The row that an example comes from."""
        texts = self.datasets.train.texts
        return texts[example.index].source


def set_up(
    config: RunConfig,
    log: RunLog,
    data: Rows | None = None,
    eval_data: Rows | None = None,
    policy: Policy | None = None,
    shared: Shared | None = None,
) -> Setup:
    """Reads data and model, and refuses what cannot work before anything is written."""
    shared = shared or Shared()
    loss = build_loss(config.loss_settings())
    refuse_what_never_works(config, loss)
    rows = _rows(shared, data if data is not None else config.data, "data", config.data_family)
    refuse_bad_rows(config, rows)
    heldout_rows = None
    if eval_data is not None or config.eval_data:
        rows_or_name = eval_data if eval_data is not None else str(config.eval_data)
        heldout_rows = _rows(shared, rows_or_name, "eval_data", config.data_family)
        refuse_bad_rows(config, heldout_rows)
    refuse_idle_data_options(config, loss, [*rows.examples, *(heldout_rows.examples if heldout_rows else [])])
    train_rows, heldout_rows = split_heldout(config, rows, heldout_rows)
    train_rows = fit_to_loss(config, loss, train_rows, is_heldout=False)
    heldout_rows = fit_to_loss(config, loss, heldout_rows, is_heldout=True)
    policy = load_policy(config, log, [example.prompt for example in rows.examples], policy)
    tokenizer = policy.tokenizer

    def tokenized() -> Datasets:
        return tokenize_datasets(config, loss, train_rows, heldout_rows, tokenizer, log)

    datasets = (
        tokenized()
        if data is not None or eval_data is not None
        else shared.once(_tokenization(config, loss), tokenized)
    )
    layout, base_sha256 = lay_out(policy, config, datasets.train.examples)
    return Setup(
        config=config,
        loss=loss,
        policy=make_adapter(policy, config),
        datasets=datasets,
        layout=layout,
        base_sha256=base_sha256,
        shared=shared,
        heldout_mismatched=_heldout_mismatched(config, loss, datasets),
    )


def refuse_what_never_works(config: RunConfig, loss: Loss) -> None:
    """Stops where versions, processes or options cannot do, whatever data and model are.

    Raises:
        UserError: naming what.
    """
    refuse_old_versions()
    _refuse_several_processes()
    _refuse_idle_options(config, loss)


def load_policy(config: RunConfig, log: RunLog, prompts: Iterable[Text], policy: Policy | None) -> Policy:
    """The model of the run file, or the policy in hand as the run file wants it, with the chat template to use."""
    torch.manual_seed(config.seed)
    if policy is not None:
        policy = _as_configured(policy, config)
    else:
        device = hardware.resolve_device(config.device)
        precision = hardware.resolve_precision(config.dtype, device)
        note = " (converted on first use, which takes a minute)" if config.model.endswith(".gguf") else ""
        log.say("model", f"loading {config.model}{note}")
        policy = Policy.from_pretrained(config.model, device, precision)
    _choose_template(policy.tokenizer, config, prompts, log)
    return policy


def lay_out(policy: Policy, config: RunConfig, examples: Sequence[TokenizedExample]) -> tuple[Layout, str]:
    """The layout, tried on some examples, and the hash of the weights as they are before training."""
    base_sha256 = weights_sha256(policy.model)
    return choose_layout(policy, config.layout, examples), base_sha256


def make_adapter(policy: Policy, config: RunConfig) -> Policy:
    """The policy that is trained: with a LoRA adapter where the run file asks for one."""
    lora = config.lora
    if not lora.rank:
        return policy
    adapted = add_lora(policy.model, lora.rank, lora.alpha or 2 * lora.rank, lora.target_modules)
    return Policy(adapted, policy.tokenizer, policy.precision)


def make_reference(setup: Setup, log: RunLog) -> Reference | None:
    """The reference of the run, from the policy's weights as they stand or from another model."""
    config, policy = setup.config, setup.policy
    kind = setup.reference_kind
    if kind == "none":
        return None
    if kind == "adapter_off":
        return AdapterOff(policy)
    source, source_sha256 = policy, setup.base_sha256
    if config.reference.model:
        source = Policy.from_pretrained(config.reference.model, policy.device, policy.precision)
        source_sha256 = weights_sha256(source.model)
        _refuse_other_tokenizer(policy, source, config.reference.model)
        if setup.layout.name == "prefix_shared" and (
            trouble := trouble_with_sharing(source, setup.datasets.train.examples)
        ):
            raise UserError(f"reference.model: does not fit the layout prefix_shared: {trouble}; set layout: padded.")
    if kind == "copy":
        return FrozenModel.copy_of(policy, config.reference.offload)
    if kind == "model":
        return FrozenModel(source, is_start_of_policy=False, offload=config.reference.offload)
    if not setup.datasets.train.examples[0].completion_ids:  # bare prompts: what is sampled is scored as it comes
        return Precomputed(LogpsCache(), is_start_of_policy=True)
    cache = setup.shared.once(("logps", source_sha256, source.precision, source.device.type), LogpsCache)
    visited, mismatched = setup.visited()
    examples = cache.missing([*visited, *mismatched, *setup.datasets.heldout.examples, *setup.heldout_mismatched])
    with log.progress("reference", len(examples)) as meter:
        cache.fill(source, setup.layout.batches(examples, 2 * setup.max_tokens), meter.advance)
    return Precomputed(cache, is_start_of_policy=source is policy)


def _as_configured(policy: Policy, config: RunConfig) -> Policy:
    """A policy in hand with the arithmetic of the run file; it stays on the device where it is."""
    if config.device != "auto" and hardware.resolve_device(config.device).type != policy.device.type:
        raise UserError(f"device: the policy in hand is on {policy.device}; move it there, or leave device out.")
    if config.dtype == "auto":
        return policy
    return Policy(policy.model, policy.tokenizer, hardware.resolve_precision(config.dtype, policy.device))


def _refuse_several_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this version trains in one process; start it without torchrun")


def _rows(shared: Shared, data: Rows, name: str, family: str | None) -> ExampleData:
    """The examples of a file, read once; rows in memory are not kept."""
    if not isinstance(data, str):
        return read_data(data, name, family)
    return shared.once(("rows", data, family), lambda: read_data(data, name, family))


def _tokenization(config: RunConfig, loss: Loss) -> tuple[Any, ...]:
    """The settings that tokenised examples depend on."""
    keys = (
        "model",
        "data",
        "eval_data",
        "eval_size",
        "data_family",
        "seed",
        "max_length",
        "truncation",
        "chat_template",
        "max_bad_rows",
        "drop",
        "min_margin",
        "weigh_by_margin",
    )
    return (
        *(getattr(config, key) for key in keys),
        config.pairs_from_rankings,
        loss.units,
        "labels" in loss.needs,
        label_weights(loss),
    )


def _heldout_mismatched(config: RunConfig, loss: Loss, datasets: Datasets) -> list[TokenizedExample]:
    if "kl" not in loss.needs:
        return []
    heldout, train = datasets.heldout.examples, datasets.train.examples
    try:
        loader.mismatched(train, config.max_length)  # what every epoch will ask for
        # Behind the held-out examples stand the training ones, should all held-out prompts be the same.
        return loader.mismatched([*heldout, *train], config.max_length)[: len(heldout)]
    except ValueError as error:
        raise UserError(f"data: the loss '{loss.name}' estimates a KL divergence: {error}.") from None


def _refuse_idle_options(config: RunConfig, loss: Loss) -> None:
    if "reference" not in loss.needs and config.reference != ReferenceConfig():
        raise UserError(f"reference: the loss '{loss.name}' uses no reference, so its settings have no effect.")


def _refuse_other_tokenizer(policy: Policy, other: Policy, name: str) -> None:
    if policy.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise UserError(
            f"reference.model: '{name}' has another vocabulary than the policy; its token ids mean other words."
        )


def _choose_template(tokenizer: Any, config: RunConfig, prompts: Iterable[Text], log: RunLog) -> None:
    """The template of the run file, else the tokenizer's own, else (for messages) a plain one, which is announced."""
    if config.chat_template:
        try:
            tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"chat_template: '{config.chat_template}' cannot be read: {error}") from None
    elif tokenizer.chat_template is None and any(not isinstance(prompt, str) for prompt in prompts):
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
        message = (
            "the data are messages and the tokenizer has no chat template: turns are written out as 'Human:' and "
            "'Assistant:', and the saved tokenizer keeps this template (chat_template: FILE gives another)"
        )
        log.event("warn", "plain-template", message, step=0)

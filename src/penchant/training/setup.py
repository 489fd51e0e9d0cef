"""Before the first step: data, model, layout and reference of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from penchant import distributed
from penchant.config import ReferenceConfig, RunConfig
from penchant.data import loader
from penchant.data.flat import Reordered
from penchant.errors import UserError
from penchant.losses import Loss, build_loss
from penchant.models.adapters import add_lora
from penchant.models.fingerprints import architecture_sha256, weights_sha256
from penchant.models.gradient_checkpointing import set_gradient_checkpointing
from penchant.models.load import cache_folder, has_to_be_converted
from penchant.models.trust import refuse_old_versions
from penchant.scoring.layout import PADDED, Layout, choose_layout, trouble_with
from penchant.scoring.logps_store import LogpsStore, store_name
from penchant.scoring.policy import Policy
from penchant.scoring.reference import AdapterOff, FrozenModel, LogpsCache, Precomputed, Reference, distinct
from penchant.scoring.reward import RewardLearner
from penchant.trackers import refuse_missing
from penchant.training import hardware
from penchant.training.datasets import Datasets, Rows
from penchant.training.logger import RunLog
from penchant.training.schedule import num_steps
from penchant.training.shared import Shared
from penchant.training.source import DataSource, are_named, give_template, settings_of
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
    architecture_sha256: str | None = field(default=None, kw_only=True)
    """Hash of what else its log-probabilities depend on, or None where that cannot be told."""
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
    def uses_reference(self) -> bool:
        """Whether anything of the run compares with a reference."""
        return "reference" in self.loss.needs

    @property
    def reference_kind(self) -> str:
        """The kind of reference with `auto` resolved; `none` where the run needs none."""
        return reference_kind_of(self.config, self.uses_reference)

    def draws(self, start_step: int = 0) -> Iterator[loader.Draw]:
        """The optimizer batches of the run behind its first `start_step`, without end."""
        within = self.config.max_length if "kl" in self.loss.needs else None
        return loader.draws(self.datasets.train.examples, self.config.batch_size, self.config.seed, start_step, within)

    def batches(self, examples: Sequence[TokenizedExample]) -> list[Batch]:
        """Microbatches to learn from."""
        return list(self.layout.batches(examples, self._at_once(examples, self.max_tokens), self._with_prompts))

    def batches_to_score(self, examples: Sequence[TokenizedExample]) -> list[Batch]:
        """Batches for a pass without gradient."""
        return list(self.layout.batches(examples, self._at_once(examples, 2 * self.max_tokens), self._with_prompts))

    @property
    def _with_prompts(self) -> bool:
        return "prompts" in self.loss.needs

    def _at_once(self, examples: Sequence[TokenizedExample], most: int) -> int:
        return tokens_at_once(self.layout, examples, most, distributed.world().size)

    def visited(self) -> tuple[Sequence[TokenizedExample], list[TokenizedExample]]:
        """The training examples that the run's steps will see, each once, and the mismatched ones of all steps."""
        config, train = self.config, self.datasets.train.examples
        order = loader.epoch_order(len(train), config.seed, epoch=0)
        drawn = islice(self.draws(), self.steps if "kl" in self.loss.needs else 0)
        mismatched = [example for draw in drawn for example in draw.mismatched]
        return Reordered(train, order[: self.steps * config.batch_size]), mismatched

    def tokens_to_sample(self) -> float:
        """Tokens that training will sample."""
        return 0.0

    def shown_prompts(self) -> list[tuple[Text, Text | None]]:
        """Some prompts for the report, held-out ones if there are any, each with the better of its completions."""
        if isinstance(self.policy, RewardLearner):
            return []  # it cannot answer
        source = self.datasets.heldout if self.datasets.heldout.examples else self.datasets.train
        texts = [source.texts[example.index] for example in source.examples[: self.config.num_samples]]
        return [(text.prompt, text.completions[0]) for text in texts]

    def source_of(self, example: TokenizedExample) -> str:
        """The row that an example comes from."""
        texts = self.datasets.train.texts
        return texts[example.index].source


def tokens_at_once(layout: Layout, examples: Sequence[TokenizedExample], most: int, processes: int) -> int:
    """Tokens of a batch that are computed at once: no more than leave a part for every process."""
    return min(most, -(-layout.cost(examples) // processes)) if examples else most


def reference_kind_of(config: RunConfig, is_used: bool) -> str:
    """The kind of reference with `auto` resolved; `none` where the run needs none."""
    if not is_used:
        return "none"
    if config.reference.kind != "auto":
        return config.reference.kind
    return "adapter_off" if config.lora.rank and not config.reference.model else "precomputed"


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
    if "rollout" in loss.units:
        raise UserError(f"loss.name: '{loss.name}' learns from what the policy samples; say method: {loss.name}.")
    refuse_what_never_works(config, loss)
    source = _data_source(shared, config, loss, data, eval_data)
    policy = load_policy(config, log, (), policy, RewardLearner if "scores" in loss.needs else Policy)
    datasets = distributed.first_alone(lambda: source.datasets(policy.tokenizer, log))
    architecture = architecture_sha256(policy.model)  # as it came: the layout may exchange its attention
    layout, base_sha256 = lay_out(policy, config, datasets.train.examples)
    return Setup(
        config=config,
        loss=loss,
        policy=make_adapter(policy, config),
        datasets=datasets,
        layout=layout,
        base_sha256=base_sha256,
        architecture_sha256=architecture,
        shared=shared,
        heldout_mismatched=_heldout_mismatched(config, loss, datasets),
    )


def refuse_what_never_works(config: RunConfig, loss: Loss) -> None:
    """Stops where versions, processes or options cannot do, whatever data and model are.

    Raises:
        UserError: naming what.
    """
    refuse_old_versions()
    _refuse_idle_options(config, loss)
    refuse_missing(config.trackers)


def load_policy(
    config: RunConfig, log: RunLog, prompts: Iterable[Text], policy: Policy | None, kind: type[Policy] = Policy
) -> Policy:
    """The model of the run file, or the policy in hand as the run file wants it, with the chat template to use."""
    torch.manual_seed(config.seed)
    if policy is not None:
        policy = _as_configured(policy, config, kind)
    else:
        device = hardware.resolve_device(config.device)
        precision = hardware.resolve_precision(config.dtype, device)
        note = " (converted on first use, which takes a minute)" if has_to_be_converted(config.model) else ""
        log.say("model", f"loading {config.model}{note}")
        policy = kind.from_pretrained(config.model, device, precision)
    policy.shard()
    _choose_template(policy.tokenizer, config, prompts, log)
    return policy


def lay_out(policy: Policy, config: RunConfig, examples: Sequence[TokenizedExample]) -> tuple[Layout, str]:
    """The layout, tried on some examples, and the hash of the weights as they are before training."""
    base_sha256 = weights_sha256(policy.model)
    return choose_layout(policy, config.layout, examples), base_sha256


def make_adapter(policy: Policy, config: RunConfig) -> Policy:
    """The policy that is trained: with a LoRA adapter and gradient checkpointing where the run file asks for them."""
    lora = config.lora
    if lora.rank:
        adapted = add_lora(policy.model, lora.rank, lora.alpha or 2 * lora.rank, lora.target_modules)
        distributed.replicate_trained(adapted)
        policy = type(policy)(adapted, policy.tokenizer, policy.precision)
    set_gradient_checkpointing(policy.model, config.gradient_checkpointing)
    return policy


def make_reference(setup: Setup, log: RunLog) -> Reference | None:
    """The reference of the run, from the policy's weights as they stand or from another model."""
    config, policy = setup.config, setup.policy
    kind = setup.reference_kind
    if kind == "none":
        return None
    if kind == "adapter_off":
        return AdapterOff(policy)
    source, weights, architecture = policy, setup.base_sha256, setup.architecture_sha256
    if config.reference.model:
        source = Policy.from_pretrained(config.reference.model, policy.device, policy.precision)
        weights, architecture = weights_sha256(source.model), architecture_sha256(source.model)
        _refuse_other_tokenizer(policy, source, config.reference.model)
        layout = setup.layout
        if layout is not PADDED and (trouble := trouble_with(layout, source, setup.datasets.train.examples)):
            raise UserError(f"reference.model: does not fit the layout {layout.name}: {trouble}; set layout: padded.")
    if kind == "copy":
        return FrozenModel.copy_of(policy, config.reference.offload)
    if kind == "model":
        return FrozenModel(source, is_start_of_policy=False, offload=config.reference.offload)
    if not setup.datasets.train.examples[0].completion_ids:  # bare prompts: what is sampled is scored as it comes
        return Precomputed(LogpsCache(), is_start_of_policy=True)
    cache = _logps_cache(setup, source, weights, architecture)
    _fill(cache, setup, source, log)
    return Precomputed(cache, is_start_of_policy=source is policy)


def _logps_cache(setup: Setup, source: Policy, weights: str, architecture: str | None) -> LogpsCache:
    """Where `source`'s log-probabilities are kept: on the disk for all runs, or in memory for those of a sweep."""
    where, kind = setup.config.reference.cache, (weights, source.precision, source.device.type)
    if where == "none" or architecture is None:
        return setup.shared.once(("logps", *kind), LogpsCache)
    folder = cache_folder() / "logps" if where == "auto" else Path(where).expanduser()
    path = folder / store_name(architecture, *kind)
    return setup.shared.once(("logps", path), lambda: LogpsCache(LogpsStore(path)))


def _fill(cache: LogpsCache, setup: Setup, source: Policy, log: RunLog) -> None:
    """Scores with `source` what the run needs and `cache` does not have yet."""
    visited, mismatched = setup.visited()
    examples = distinct([*visited, *mismatched, *setup.datasets.heldout.examples, *setup.heldout_mismatched])
    # Cut before what is known is left out, so that a pass that was broken off goes on in the same company, to the bit.
    parts = setup.layout.parts(examples, 2 * setup.max_tokens)

    def missing() -> list[list[TokenizedExample]]:
        lacking = {id(example) for part in parts for example in cache.missing(part)}
        # What one process lacks all compute, for they do it together.
        flags = distributed.any_of([id(one) in lacking for part in parts for one in part], source.device)
        is_lacking = iter(flags)
        found = [rest for part in parts if (rest := [one for one in part if next(is_lacking)])]
        for trouble in cache.new_troubles():
            log.event("warn", "reference-cache", trouble, step=0)
        return found

    unknown = missing()
    total, to_compute = _num_completions(examples), sum(map(_num_completions, unknown))
    log.say("reference", f"{total:,} completions: {total - to_compute:,} known already, {to_compute:,} to compute")
    while unknown:
        with log.progress("reference", sum(map(len, unknown))) as meter:
            cache.fill(source, map(setup.layout.collate, unknown), meter.advance)
        unknown = missing()  # a store that failed meanwhile has taken with it what was known


def _num_completions(examples: Iterable[TokenizedExample]) -> int:
    return sum(len(example.completion_ids) for example in examples)


def _as_configured(policy: Policy, config: RunConfig, kind: type[Policy]) -> Policy:
    """A policy in hand with the arithmetic of the run file; it stays on the device where it is."""
    if type(policy) is not kind:
        raise UserError(f"model: the method needs a {kind.__name__}, and the one in hand is a {type(policy).__name__}.")
    if config.device != "auto" and hardware.resolve_device(config.device).type != policy.device.type:
        raise UserError(f"device: the policy in hand is on {policy.device}; move it there, or leave device out.")
    if config.dtype == "auto":
        return policy
    return kind(policy.model, policy.tokenizer, hardware.resolve_precision(config.dtype, policy.device))


def _data_source(
    shared: Shared, config: RunConfig, loss: Loss, data: Rows | None, eval_data: Rows | None
) -> DataSource:
    """The data of the run; those of files are the same for all runs that agree on what becomes of them."""
    if not are_named(config, data, eval_data):
        return DataSource(config, loss, data, eval_data)
    key = ("data", config.model, config.chat_template, *settings_of(config, loss).values())
    return shared.once(key, lambda: DataSource(config, loss))


def _heldout_mismatched(config: RunConfig, loss: Loss, datasets: Datasets) -> list[TokenizedExample]:
    if "kl" not in loss.needs:
        return []
    heldout, train = datasets.heldout.examples, datasets.train.examples
    first = train[0].prompt_ids
    other = next((example for example in train if example.prompt_ids != first), train[0])
    try:
        loader.mismatched([train[0], other], config.max_length)  # what every epoch will ask for
        # Behind the held-out examples stand training ones, should all held-out prompts be the same.
        return loader.mismatched([*heldout, train[0], other], config.max_length)[: len(heldout)]
    except ValueError as error:
        raise UserError(f"data: the loss '{loss.name}' estimates a KL divergence: {error}.") from None


def _refuse_idle_options(config: RunConfig, loss: Loss) -> None:
    if (
        "reference" not in loss.needs
        and not config.filled_advantage().kl_weight
        and config.reference != ReferenceConfig()
    ):
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
    elif any(not isinstance(prompt, str) for prompt in prompts):
        give_template(tokenizer, log)

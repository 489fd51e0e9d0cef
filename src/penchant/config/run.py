"""A whole run: every knob on one page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from penchant.config.methods import METHODS, ONLINE_METHODS, RATES
from penchant.config.sections import (
    AdvantageConfig,
    JudgeConfig,
    LoraConfig,
    OnlineConfig,
    ReferenceConfig,
    SamplingConfig,
    Section,
    WatchConfig,
    filled,
)
from penchant.errors import nearest

Drop = Literal[
    "identical", "prefix", "near-identical", "duplicate", "contradiction", "leak", "prompt-leak", "no-end",
    "doubled-token", "truncated", "special-token", "tie", "inverted", "user-turns",
]  # fmt: skip
"""Findings of the data doctor that point at rows; `data/findings.py` says what each is."""


Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class RunConfig(Section):
    """A whole run. Only `model` and `data` have no default."""

    model: str
    """The model to train: a local folder, a hub id or a .gguf file."""
    data: str
    """Preferences: a file (.jsonl, .json, .csv, .tsv, also .gz or .zst; .parquet), a directory, a pattern, or a dataset
    of the hub (owner/name:split); pairs, single judged completions or rankings are recognised."""
    eval_data: str | None = None
    """Held-out preferences, named as data is. Without it, eval_size of the rows in data are held out."""
    data_family: str | None = None
    """Read all rows as this row family (trl, hh, sharegpt, ...) instead of recognising each; docs/guide.md has them."""
    eval_size: float = Field(default=0.05, ge=0)
    """Held out from data when there is no eval_data: a share below 1, or a number of rows; 0 holds out none."""
    turns: Literal["all", "last"] = "all"
    """Which answers of a conversation (messages or conversations) without a label are learned: all, or the last."""
    pairs_from_rankings: Literal["best_worst", "best_rest", "all"] = "best_worst"
    """Which pairs a method over pairs takes from a ranking: best and worst, best and each other, or all of them."""
    output_dir: str | None = None
    """The run directory; default: runs/MODEL-METHOD, numbered when taken."""
    method: str | None = None
    """The method, one word: dpo, ipo, kto, orpo, simpo, rpo, ... (see: penchant methods); default dpo."""
    loss: dict[str, Any] = Field(default_factory=dict)
    """Settings of the loss, on top of the method's: name, beta, label_smoothing, ... (see: penchant methods)."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate; default 5e-7 (sft 2e-5, orpo 8e-6, kto 5e-6), with LoRA ten times that."""
    batch_size: int = Field(default=32, ge=1)
    """Examples (pairs, single completions or rankings) per optimizer step, over all processes."""
    num_train_epochs: float = Field(default=1.0, gt=0)
    """Passes over the training examples."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps, whatever num_train_epochs says."""
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps over which the learning rate rises from 0, instead of warmup_ratio."""
    lr_scheduler: Literal["linear", "cosine", "inverse_sqrt", "constant"] = "linear"
    """How the learning rate falls after the warm-up: to 0, or with the root of the steps, or (constant) not at all."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """adamw, or rmsprop (one moment instead of two; the DPO paper's)."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay, on matrices only (in AdamW decoupled from the gradient)."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of the examples, the held-out split and the adapter's first weights."""

    max_length: int = Field(default=1024, ge=2)
    """Most tokens of prompt and completion together."""
    truncation: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to completions beyond max_length: both are cut at the same place, the pair is dropped, or stop."""
    chat_template: str | None = None
    """File with a Jinja chat template, instead of the tokenizer's own."""
    max_bad_rows: float = Field(default=0.01, ge=0, le=1)
    """Share of unusable rows above which the run does not start."""
    drop: tuple[Drop, ...] = ()
    """Findings whose training rows are left out: near-identical, duplicate, ... (see: penchant check)."""
    data_cache: str = "auto"
    """Folder in which tokenised rows outlive the run, for all later ones; auto: `tokens` in Penchant's cache folder
    ($PENCHANT_CACHE); none: kept in memory only."""
    min_margin: float | None = Field(default=None, gt=0)
    """Leave out training pairs whose margin (or difference of scores) is below this."""
    weigh_by_margin: bool = False
    """Multiply the weight of a training pair by 2 sigmoid(margin) - 1: how sure chosen is the better one."""

    lora: LoraConfig = Field(default_factory=LoraConfig)
    reference: ReferenceConfig = Field(default_factory=ReferenceConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    online: OnlineConfig = Field(default_factory=OnlineConfig)
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig)
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: Literal["auto", "float32", "bf16"] = "auto"
    """Arithmetic: float32, or bf16 products over float32 weights; auto: bf16 where the hardware is fast at it."""
    layout: Literal["auto", "padded", "packed", "prefix_shared"] = "auto"
    """How examples are laid out: padded rows, packed in one row, or with each prompt computed once (prefix_shared);
    auto: prefix_shared where it is exact for the model, else padded."""
    microbatch_tokens: int | None = Field(default=None, ge=1)
    """Most tokens, filling included, computed at once; changes memory, never results. Default 1024, on a GPU 16384."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory for one more forward pass."""

    logging_steps: int = Field(default=1, ge=1)
    """Metrics are averaged and written every so many steps."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Held-out evaluation every so many steps; default: four times in the run. Always before and after it."""
    save_minutes: float = Field(default=15.0, gt=0)
    """Save a checkpoint to resume from every so many minutes; these go when the run is finished."""
    save_steps: int | None = Field(default=None, ge=1)
    """Save a checkpoint every so many steps instead, and keep the newest ones."""
    save_best: bool = False
    """Also save, and keep, the checkpoint whose held-out loss is the lowest so far."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the newest checkpoints are kept."""
    watch: WatchConfig = Field(default_factory=WatchConfig)
    skip_spikes: bool = False
    """Skip a step whose loss or gradient norm lies 6 standard deviations above the last 128; default: only say so."""
    trackers: tuple[Tracker, ...] = ()
    """Where the metrics go beside the run directory: tensorboard, wandb, trackio, mlflow (extras of these names)."""
    num_samples: int = Field(default=5, ge=0)
    """Held-out prompts answered before and after training, for the report."""
    sample_max_new_tokens: int = Field(default=128, ge=1)
    """Longest sampled answer, in tokens."""

    @field_validator("drop", "trackers", mode="before")
    @classmethod
    def _listed(cls, names: Any) -> Any:
        """On the line the names stand behind each other: `--drop duplicate,leak`."""
        return [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else names

    @model_validator(mode="after")
    def _options_fit_together(self) -> RunConfig:
        self._refuse_two_losses()
        if self.reference.kind == "adapter_off" and not self.lora.rank:
            raise ValueError("reference.kind: adapter_off needs an adapter; set lora.rank")
        if self.reference.kind == "model" and not self.reference.model:
            raise ValueError("reference.kind: model needs reference.model")
        if self.reference.model and self.reference.kind in ("copy", "adapter_off"):
            raise ValueError(f"reference.model: has no effect with reference.kind {self.reference.kind}")
        if self.reference.offload and self.reference.kind not in ("copy", "model"):
            raise ValueError("reference.offload: only a reference of kind copy or model can be kept in host memory")
        if not self.lora.rank and self.lora != LoraConfig():
            raise ValueError("lora: its settings have no effect without lora.rank")
        if self.warmup_steps is not None and self.warmup_ratio != self._default("warmup_ratio"):
            raise ValueError("warmup_ratio: has no effect with warmup_steps")
        if self.optimizer != "adamw" and (self.adam_beta1, self.adam_beta2) != (
            self._default("adam_beta1"),
            self._default("adam_beta2"),
        ):
            raise ValueError(f"adam_beta1, adam_beta2: have no effect with optimizer {self.optimizer}")
        if not self.num_samples and self.sample_max_new_tokens != self._default("sample_max_new_tokens"):
            raise ValueError("sample_max_new_tokens: has no effect with num_samples 0")
        if self.eval_steps and not self.eval_data and not self.eval_size:
            raise ValueError("eval_steps: has no effect without held-out rows (eval_data, eval_size)")
        if self.eval_data and self.eval_size not in (0, self._default("eval_size")):
            raise ValueError("eval_size: has no effect with eval_data")
        self._refuse_idle_sections()
        return self

    def _refuse_idle_sections(self) -> None:
        if not self.is_online:
            for name in ("sampling", "judge", "online", "advantage"):
                section = getattr(self, name)
                if section != type(section)():
                    raise ValueError(
                        f"{name}: has no effect with method {self.method_name()}, which samples nothing; these do: "
                        + ", ".join(ONLINE_METHODS)
                    )
            return
        if self.judge.name is None:
            raise ValueError(
                f"judge.name: method {self.method} needs a judge: rule (a Python function), reward (a model), implicit "
                "(two language models) or server (a language model behind a URL)"
            )
        for name in ("turns", "drop", "min_margin", "weigh_by_margin", "pairs_from_rankings", "truncation"):
            if getattr(self, name) != self._default(name):
                raise ValueError(f"{name}: has no effect with method {self.method}, which takes only prompts from data")
        self._refuse_idle_advantage()
        online, sampling = self.filled_online(), self.filled_sampling()
        if online.pairs not in ("best", "none") and sampling.completions == 1:
            raise ValueError("sampling.completions: a pair needs two")
        if online.accept is None and online.accept_beta is not None:
            raise ValueError("online.accept_beta: has no effect without online.accept")
        if online.accept is not None and online.accept > (sampling.completions or 1):
            raise ValueError(
                f"online.accept: {online.accept} of {sampling.completions} completions (sampling.completions) cannot be"
                " accepted"
            )

    def _refuse_idle_advantage(self) -> None:
        """Holds online.pairs, which a method may exchange, against what only pairs or only advantages make use of."""
        online, advantage, own = self.filled_online(), self.filled_advantage(), self.advantage
        if (online.pairs == "none") != (advantage.kind is not None):
            what = "learns from advantages" if advantage.kind else "learns from pairs"
            raise ValueError(f"online.pairs: method {self.method} {what}, so it cannot be {online.pairs}")
        if advantage.kind is None and own != AdvantageConfig():
            raise ValueError(f"advantage: has no effect with method {self.method}, which learns from pairs")
        if online.pairs == "none" and (online.min_gap or online.accept):
            raise ValueError(f"online.min_gap, online.accept: have no effect with method {self.method}")
        if advantage.kind != "gae":
            for name in ("gamma", "gae_lambda", "value_learning_rate"):
                if getattr(own, name) != AdvantageConfig.model_fields[name].default:
                    raise ValueError(f"advantage.{name}: has no effect with advantage.kind {advantage.kind}")
        if advantage.kind not in (None, "gae") and self.filled_sampling().completions == 1:
            raise ValueError(f"sampling.completions: advantage.kind {advantage.kind} needs two or more")

    @property
    def is_online(self) -> bool:
        """Whether the method samples completions of its own and has them judged."""
        return self.method in ONLINE_METHODS

    def filled_advantage(self) -> AdvantageConfig:
        """`advantage` with the method's values where the run says nothing; `kind` is None for methods over pairs."""
        preset = ONLINE_METHODS.get(self.method or "", {})
        return filled(self.advantage, {"kl_weight": 0.0, "whiten": False, **preset})

    def filled_sampling(self) -> SamplingConfig:
        """`sampling` with the method's values where the run says nothing."""
        usual = {"completions": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        return filled(self.sampling, {**usual, **ONLINE_METHODS.get(self.method or "", {})})

    def filled_online(self) -> OnlineConfig:
        """`online` with the method's values where the run says nothing; `rounds` may still be open."""
        preset = ONLINE_METHODS.get(self.method or "", {})
        num_batches = preset.get("batches_per_round")
        size = {"prompts_per_round": num_batches * self.batch_size} if num_batches else {}
        return filled(self.online, {"pairs": "best_worst", "renew_reference": False, **preset, **size})

    def _refuse_two_losses(self) -> None:
        if self.method is None:
            return
        if self.method not in METHODS:
            raise ValueError(
                f"method: there is no method '{self.method}'{nearest(self.method, METHODS)}; a loss of your own comes "
                "with --import FILE.py"
            )
        if self.is_online:
            return  # its loss may be exchanged
        stands_for = METHODS[self.method].get("name", " + ".join(METHODS[self.method]))
        if "name" in self.loss and self.loss["name"] != stands_for:
            raise ValueError(
                f"loss.name: is {self.loss['name']}, and method {self.method} stands for {stands_for}; leave one out"
            )
        if self._own_sum() and "name" in METHODS[self.method]:
            raise ValueError(
                f"loss: is a sum, and method {self.method} stands for {stands_for} alone; leave method out"
            )

    def _own_sum(self) -> bool:
        return bool(self.loss) and all(isinstance(value, Mapping) for value in self.loss.values())

    def method_name(self) -> str:
        """The method in a word: `method`, or what `loss` names."""
        if self.method is None and self._own_sum():
            return " + ".join(self.loss)
        name = str(self.loss.get("name", "dpo"))
        return self.method or (f"{name}-hard" if name in ONLINE_METHODS else name)

    def loss_settings(self) -> dict[str, Any]:
        """The loss as `build_loss` takes it: the method's settings, then the run's own."""
        own, preset = self.loss, METHODS[self.method or "dpo"]
        is_another = self._own_sum() or own.get("name", preset.get("name")) != preset.get("name")
        if is_another and (self.method is None or self.is_online):
            return dict(own)
        if self._own_sum():
            return {name: {**preset.get(name, {}), **own.get(name, {})} for name in [*preset, *own]}
        return {**preset, **own}

    def peak_learning_rate(self) -> float:
        """`learning_rate`, or the method's default for full weights or LoRA."""
        default = RATES.get(self.method_name(), 5e-7)
        if self.lora.rank:
            default = float(f"{10 * default:g}")  # 10 * 5e-7 is 4.9999999999999996e-06, which no run file should say
        return self.learning_rate or default

    def _default(self, key: str) -> Any:
        return type(self).model_fields[key].default

    def to_yaml(self, **resolved: Any) -> str:
        """The run file that repeats this run, with what was `resolved` in the place of defaults."""
        settings = {**self.model_dump(exclude_none=True), **resolved}
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)

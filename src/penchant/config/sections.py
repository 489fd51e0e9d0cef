"""The sections of a run file, each a few knobs of one thing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from penchant.errors import nearest
from penchant.watch import DETECTORS, SEVERITIES


class Section(BaseModel):
    """A group of keys; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


class LoraConfig(Section):
    """Low-rank adapters instead of full weights (needs little memory; the base model is the reference)."""

    rank: int = Field(default=0, ge=0)
    """Rank of the LoRA adapter; 0 trains all weights."""
    alpha: int | None = Field(default=None, gt=0)
    """Scale of the adapter is alpha / rank; default: twice the rank."""
    target_modules: str | list[str] = "all-linear"
    """Which layers get an adapter: all-linear, or a list of module names."""


class ReferenceConfig(Section):
    """Where the reference's log-probabilities come from."""

    kind: Literal["auto", "precomputed", "copy", "adapter_off", "model"] = "auto"
    """auto: adapter_off with LoRA, else precomputed (one pass before training, no second model in memory);
    copy: a frozen copy of the starting weights; model: the one that reference.model names, kept beside the policy."""
    model: str | None = None
    """Another model as the reference: folder, hub id or .gguf file. It must share the policy's tokenizer."""
    offload: bool = False
    """Keep the frozen reference in host memory and move it to the device once a step."""
    cache: str = "auto"
    """Folder in which precomputed numbers outlive the run, for all later ones; auto: `logps` in Penchant's cache folder
    ($PENCHANT_CACHE); none: kept in memory only."""


T = TypeVar("T", bound=Section)


def filled(section: T, preset: Mapping[str, Any]) -> T:
    """A copy of `section` in which what is None has its value from `preset`."""
    fields = type(section).model_fields
    values = {name: value for name, value in preset.items() if name in fields and getattr(section, name) is None}
    return section.model_copy(update=values)


class SamplingConfig(Section):
    """How completions are sampled from the policy; what is not given depends on the method."""

    completions: int | None = Field(default=None, ge=1)
    """Completions of each prompt; default: online-dpo 2, iterative-dpo and rloo 4, sppo 5, grpo 8, best-of-n 16, rso
    64, ppo 1."""
    temperature: float | None = Field(default=None, ge=0)
    """Divides the logits; 0 takes the likeliest token. Default 1; rso and sppo 0.7."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Only the likeliest tokens that together have this probability; default 1 (all); sppo 0.9."""
    top_k: int | None = Field(default=None, ge=0)
    """Only so many of the likeliest tokens; default 0 (all); rso 40."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest completion, in tokens."""
    batch_size: int = Field(default=64, ge=1)
    """Completions sampled at once: memory and speed."""


class JudgeConfig(Section):
    """Who says which completion is better."""

    name: Literal["rule", "reward", "implicit", "server"] | None = None
    """rule: a Python function; reward: a model that gives a score; implicit: log-ratio of two language models; server:
    a language model behind an OpenAI-compatible URL, asked for A or B."""
    function: str | None = None
    """The rule, as file.py:name; name(prompt, completions) or name(prompt, completions, row) gives a list of numbers,
    higher is better."""
    model: str | None = None
    """The reward model (folder or hub id), the trained one of an implicit reward, or the server's name of its model."""
    reference: str | None = None
    """What an implicit reward compares judge.model with."""
    url: str | None = None
    """The server, as http://host:8000/v1."""
    key_from: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key; a server without keys needs none."""
    question: str | None = None
    """File with the text of the question, instead of `penchant judge --show-question`."""
    orders: Literal["both", "random"] = "both"
    """Ask with either completion first, and count disagreement as a tie; or once, in an order drawn by content."""
    parallel: int = Field(default=8, ge=1)
    """Questions under way at once."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Longest wait for one whole answer."""
    retries: int = Field(default=5, ge=0)
    """Further tries when the server is busy, fails or answers nonsense."""
    max_invalid: float = Field(default=0.1, ge=0, le=1)
    """Share of questions without a valid verdict above which it stops."""

    @model_validator(mode="after")
    def _complete(self) -> JudgeConfig:
        """Names what a kind of judge lacks, and what it makes no use of."""
        needed = {
            "rule": ("function",),
            "reward": ("model",),
            "implicit": ("model", "reference"),
            "server": ("url", "model"),
        }
        own = needed.get(self.name or "", ())
        for key in own:
            if getattr(self, key) is None:
                raise ValueError(f"judge.{key}: is missing; a judge of kind {self.name} needs it")
        for key in ("function", "model", "reference", "url"):
            if getattr(self, key) is not None and key not in own:
                why = f"a judge of kind {self.name}" if self.name else "no judge.name"
                raise ValueError(f"judge.{key}: has no effect with {why}")
        return self


class OnlineConfig(Section):
    """What becomes of judged completions, and how often fresh ones are drawn."""

    rounds: int | None = Field(default=None, ge=1)
    """How often fresh completions are drawn; default: iterative-dpo and sppo 3, else until every prompt was asked."""
    prompts_per_round: int | None = Field(default=None, ge=1)
    """Prompts asked in a round; default: all; online-dpo and grpo batch_size, so that each step has fresh completions;
    ppo four times that."""
    pairs: Literal["best_worst", "random", "all", "best", "none"] | None = None
    """best_worst; random: disjoint pairs; all pairs; best: the best alone, for sft; none: every completion, weighed by
    its advantage (grpo, ppo). Equal scores make no pair."""
    min_gap: float = Field(default=0.0, ge=0)
    """The scores of a pair must differ by more than this."""
    accept: int | None = Field(default=None, ge=1)
    """Keep so many of the completions by rejection sampling before they are paired; rso 8."""
    accept_beta: float | None = Field(default=None, gt=0)
    """Temperature of the rejection sampling, in units of the score; default 0.5."""
    renew_reference: bool | None = None
    """Make each round's first policy its reference; default: sppo only."""


class AdvantageConfig(Section):
    """How the scores of completions become what each token is weighed by (grpo, ppo and their kin)."""

    kind: Literal["standardized", "centered", "leave_one_out", "gae"] | None = None
    """Against the other completions of the prompt: standardized (grpo), centered (dr-grpo), leave_one_out (rloo); or
    against a value head's expectation, token by token: gae (ppo)."""
    kl_weight: float | None = Field(default=None, ge=0)
    """Taken off the rewards: so much for each nat of KL divergence from the reference; ppo and rloo 0.05, else 0."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of what comes later, per token (gae)."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Between the value head's next expectation (0) and the rewards to come (1) (gae)."""
    whiten: bool | None = None
    """Give the advantages of all tokens of a round mean 0 and variance 1; default: ppo only."""
    unfinished_score: float | None = None
    """Score of completions that were cut off at sampling.max_new_tokens, instead of the judge's."""
    value_learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of the value head (gae)."""


class WatchConfig(Section):
    """What the watch does beside telling what it sees; codes are those of docs/watch.md."""

    enabled: bool = True
    """Look for trouble in the metrics while training, and tell each finding once."""
    stop_on: tuple[str, ...] = ()
    """End the run in good order at a finding of one of these codes or severities (warn, major, stop, and above)."""
    lower_learning_rate_on: tuple[str, ...] = ()
    """Halve the learning rate, once for each finding, at one of these codes or severities (and above)."""
    thresholds: dict[str, float] = Field(default_factory=dict)
    """Thresholds in the place of the detectors' own, as CODE.NAME: VALUE, such as displaced.warn: 1.0."""

    @field_validator("stop_on", "lower_learning_rate_on", mode="before")
    @classmethod
    def _listed(cls, names: Any) -> Any:
        """On the line the names stand behind each other: `--watch.stop_on displaced,stop`."""
        return [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else names

    @model_validator(mode="after")
    def _known(self) -> WatchConfig:
        """Names codes and thresholds that there are not, and what has no effect."""
        known = [*DETECTORS, *SEVERITIES]
        for key in ("stop_on", "lower_learning_rate_on"):
            for name in getattr(self, key):
                if name not in known:
                    raise ValueError(f"watch.{key}: there is no finding '{name}'{nearest(name, known)}")
            if getattr(self, key) and not self.enabled:
                raise ValueError(f"watch.{key}: has no effect without watch.enabled")
        there = [f"{code}.{name}" for code, detector in DETECTORS.items() for name in detector.thresholds]
        for name in self.thresholds:
            if name not in there:
                raise ValueError(f"watch.thresholds: there is no threshold '{name}'{nearest(name, there)}")
        return self

    def by_detector(self) -> dict[str, dict[str, float]]:
        """`thresholds` by the code of the detector."""
        found: dict[str, dict[str, float]] = {}
        for name, value in self.thresholds.items():
            code, _, key = name.partition(".")
            found.setdefault(code, {})[key] = value
        return found

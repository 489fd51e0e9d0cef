"""Before the first step of a run that samples its own completions: prompts, judge, and the plan of its rounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np

from penchant.config import AdvantageConfig, OnlineConfig, RunConfig, SamplingConfig
from penchant.data import loader
from penchant.data.chat import RenderError, TokenizedData, encode
from penchant.data.formats import RowProblem
from penchant.data.prompts import PromptData, read_prompts
from penchant.errors import UserError
from penchant.examples import Prompt, Text, TokenizedExample
from penchant.losses import Loss, build_loss
from penchant.models.generation import Sampling
from penchant.models.value import make_value_head
from penchant.online.judges import Judge, make_judge
from penchant.scoring.policy import Policy
from penchant.training.datasets import Datasets, Rows, findings_of_prompts, refuse_rows
from penchant.training.logger import RunLog
from penchant.training.panel import judge_of_all
from penchant.training.setup import Setup, lay_out, load_policy, make_adapter, refuse_what_never_works

_PAIRS_PER_PROMPT = {
    "best_worst": lambda completions: 1,
    "best": lambda completions: 1,
    "random": lambda completions: completions // 2,
    "all": lambda completions: completions * (completions - 1) // 2,
    "none": lambda completions: 1,  # an example is a prompt with all its completions
}
_UNITS = {"best": "unpaired", "none": "rollout"}


@dataclass
class OnlineSetup(Setup):
    """What a run needs that draws fresh completions in rounds; the examples of `datasets` are bare prompts."""

    judge: Judge
    prompts: dict[int, Prompt]
    """What stands behind each `TokenizedExample.index`."""
    plan: OnlineConfig
    sampling_plan: SamplingConfig
    """Both with all values filled in but `rounds`."""
    advantage_plan: AdvantageConfig
    """With all values filled in; `kind` is None where pairs are learned from."""

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        plan = self.sampling_plan
        assert plan.temperature is not None
        assert plan.top_p is not None
        assert plan.top_k is not None
        return Sampling(plan.temperature, plan.top_p, plan.top_k, plan.max_new_tokens)

    @property
    def samples_itself(self) -> bool:
        """Whether completions are drawn from the policy as it is."""
        return (self.sampling.temperature, self.sampling.top_p, self.sampling.top_k) == (1.0, 1.0, 0)

    @property
    def num_completions(self) -> int:
        """Completions of each prompt."""
        return self.sampling_plan.completions or 1

    @property
    def prompts_per_round(self) -> int:
        """Prompts asked in a round."""
        return min(self.plan.prompts_per_round or math.inf, len(self.datasets.train.examples))  # type: ignore[return-value]

    @property
    def num_rounds(self) -> int:
        """How often fresh completions are drawn."""
        return self.plan.rounds or math.ceil(len(self.datasets.train.examples) / self.prompts_per_round)

    @property
    def batches_per_pass(self) -> int:
        """Optimizer batches that visit the examples of a round once, were every pair of completions one."""
        kept = min(self.plan.accept or self.num_completions, self.num_completions)
        most = self.prompts_per_round * _PAIRS_PER_PROMPT[self.plan.pairs or "best_worst"](kept)
        return loader.steps_per_epoch(most, self.config.batch_size)

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps between two samplings."""
        return math.ceil(self.config.num_train_epochs * self.batches_per_pass)

    @property
    def steps(self) -> int:
        steps = self.num_rounds * self.steps_per_round
        return min(steps, self.config.max_steps or steps)

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.datasets.train.examples) * self.steps_per_round // self.prompts_per_round)

    @property
    def uses_reference(self) -> bool:
        return super().uses_reference or bool(self.advantage_plan.kl_weight)

    @property
    def reference_kind(self) -> str:
        wanted = self.config.reference
        if not self.uses_reference or wanted.kind != "auto":
            return super().reference_kind
        if self.plan.renew_reference:
            return "precomputed"
        if self.config.lora.rank and not wanted.model:
            return "adapter_off"
        if wanted.model:
            return "model"
        return "precomputed" if self.num_rounds == 1 and self.advantage_plan.kind is None else "copy"

    def weighing(self) -> str:
        """What becomes of judged completions, in a few words."""
        plan = self.advantage_plan
        if plan.kind is None:
            return str(self.plan.pairs)
        kl = f", {plan.kl_weight:g} a nat of KL taken off" if plan.kl_weight else ""
        names = {"gae": f"advantages over a value head (lambda {plan.gae_lambda:g})"}
        return names.get(plan.kind, f"{plan.kind.replace('_', ' ')} advantages") + kl

    def round_prompts(self, number: int) -> list[TokenizedExample]:
        """The prompts of a round, counted from 0: the next ones in an order that is shuffled for every pass."""
        prompts, first = self.datasets.train.examples, number * self.prompts_per_round
        places = range(first, first + self.prompts_per_round)
        orders: dict[int, list[int]] = {}
        found = []
        for place in places:
            epoch, offset = divmod(place, len(prompts))
            if epoch not in orders:
                orders[epoch] = loader.epoch_order(len(prompts), self.config.seed, epoch)
            found.append(prompts[orders[epoch][offset]])
        return found

    def draws(self, start_step: int = 0) -> Iterator[loader.Draw]:
        """Batches like those to come, to plan with: the prompts of each step with stand-ins for its completions.

        The completions are as long as they may become, so what is expected from them is the most there can be.
        """
        for number in range(start_step, self.steps):
            prompts = self.round_prompts(number // self.steps_per_round)
            batch = islice(cycle(prompts), min(self.config.batch_size, self.batches_per_pass * len(prompts)))
            yield loader.Draw([self.stand_in(prompt) for prompt in batch], [])

    def stand_in(self, prompt: TokenizedExample) -> TokenizedExample:
        """A prompt with pieces of itself as completions, as long as they may become."""
        room = min(self.sampling_plan.max_new_tokens, self.config.max_length - len(prompt.prompt_ids))
        number = {"best": 1, "none": self.num_completions}.get(self.plan.pairs or "", 2)
        completions = tuple(list(islice(cycle(prompt.prompt_ids), room)) for _ in range(number))
        return TokenizedExample(prompt.prompt_ids, completions, prompt.index)

    def visited(self) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
        return [], []

    def tokens_to_sample(self) -> float:
        """The most tokens that may be sampled in training."""
        rounds = math.ceil(self.steps / self.steps_per_round)
        return float(rounds * self.prompts_per_round * self.num_completions * self.sampling_plan.max_new_tokens)

    def shown_prompts(self) -> list[tuple[Text, Text | None]]:
        source = self.datasets.heldout if self.datasets.heldout.examples else self.datasets.train
        return [(self.prompts[e.index].text, None) for e in source.examples[: self.config.num_samples]]

    def source_of(self, example: TokenizedExample) -> str:
        return self.prompts[example.index].source


def set_up_online(
    config: RunConfig,
    log: RunLog,
    data: Rows | None = None,
    eval_data: Rows | None = None,
    policy: Policy | None = None,
    judge: Judge | None = None,
) -> OnlineSetup:
    """Reads prompts, model and judge, and refuses what cannot work before anything is written.

    Raises:
        UserError: something the user can mend.
    """
    loss = build_loss(config.loss_settings())
    refuse_what_never_works(config, loss)
    plan, sampling_plan, advantage_plan = config.filled_online(), config.filled_sampling(), config.filled_advantage()
    _refuse_other_units(loss, plan)
    train, heldout = _read(config, data, eval_data)
    policy = load_policy(config, log, [prompt.text for prompt in (*train.prompts, *heldout.prompts)], policy)
    device, precision, in_hand = policy.device, policy.precision, judge
    judge = judge_of_all(
        lambda: in_hand or make_judge(config.judge, device, precision), is_shared_out=config.judge.name == "implicit"
    )
    prompts: dict[int, Prompt] = {}
    parts = [_tokenized(part, policy.tokenizer, config.max_length, prompts) for part in (train, heldout)]
    for part, tokenized in zip((train, heldout), parts, strict=True):
        refuse_rows(config, [*part.problems, *tokenized.problems], part.num_rows)
    if not parts[0].examples:
        raise UserError("data: no prompt is left to sample completions for.")
    findings = {
        "train": findings_of_prompts(config.data, train, parts[0]),
        "eval": findings_of_prompts(config.eval_data or config.data, heldout, parts[1]) if parts[1].examples else None,
    }
    datasets = Datasets(parts[0], parts[1], findings)
    layout, base_sha256 = lay_out(policy, config, [_pieces(example) for example in datasets.train.examples])
    policy = make_adapter(policy, config)
    if "values" in loss.needs:
        policy.value_head = make_value_head(policy.model)
    setup = OnlineSetup(
        config=config,
        loss=loss,
        policy=policy,
        datasets=datasets,
        layout=layout,
        base_sha256=base_sha256,
        judge=judge,
        prompts=prompts,
        plan=plan,
        sampling_plan=sampling_plan,
        advantage_plan=advantage_plan,
    )
    _refuse_unfit_reference(setup)
    if advantage_plan.kind is not None and not setup.samples_itself:
        message = (
            "what is sampled is not the policy as it is (sampling.temperature, top_p, top_k), and its log-probabilities"
            " are: the gradient is that of other completions than those that the policy gives"
        )
        log.event("warn", "narrowed", message, step=0)
    return setup


def _read(config: RunConfig, data: Rows | None, eval_data: Rows | None) -> tuple[PromptData, PromptData]:
    """The prompts to train on, and those held out: of a file of their own, or split off."""
    train = read_prompts(data if data is not None else config.data, "data", config.data_family)
    refuse_rows(config, train.problems, train.num_rows)
    given = eval_data if eval_data is not None else config.eval_data
    if given is not None:
        heldout = read_prompts(given, "eval_data", config.data_family)
        refuse_rows(config, heldout.problems, heldout.num_rows)
        return train, heldout
    size, everything = config.eval_size, train.prompts
    wanted = int(size * len(everything)) if size < 1 else int(size)
    if wanted and wanted >= len(everything):
        raise UserError(f"eval_size: {wanted} of {len(everything)} prompts held out would leave none to train on.")
    held = set(np.random.default_rng([config.seed, 1]).permutation(len(everything))[:wanted].tolist())
    kept = [prompt for place, prompt in enumerate(everything) if place not in held]
    apart = [everything[place] for place in sorted(held)]
    return (
        PromptData(kept, train.problems, train.num_rows - len(apart), train.num_repeated),
        PromptData(apart, [], len(apart), 0),
    )


def _tokenized(data: PromptData, tokenizer: Any, max_length: int, prompts: dict[int, Prompt]) -> TokenizedData:
    """Bare prompts as token ids, entered into `prompts` by their index."""
    examples: list[TokenizedExample] = []
    problems: list[RowProblem] = []
    for prompt in data.prompts:
        index = len(prompts)
        try:
            prompt_ids, _ = encode(tokenizer, prompt.text, ["."])
        except RenderError as error:
            problems.append(RowProblem(error.code, prompt.source, str(error)))
            continue
        if len(prompt_ids) >= max_length:
            message = f"the prompt has {len(prompt_ids)} tokens, which leaves no room within max_length {max_length}"
            problems.append(RowProblem("T01", prompt.source, message))
            continue
        prompts[index] = prompt
        examples.append(TokenizedExample(prompt_ids, (), index))
    return TokenizedData(examples, {}, problems)


def _pieces(prompt: TokenizedExample) -> TokenizedExample:
    """Two short completions to try a layout with."""
    ids = list(islice(cycle(prompt.prompt_ids), 8))
    return TokenizedExample(prompt.prompt_ids, (ids, ids[:6]), prompt.index)


def _refuse_other_units(loss: Loss, plan: OnlineConfig) -> None:
    wanted = _UNITS.get(plan.pairs or "", "pair")
    if wanted not in loss.units or "kl" in loss.needs:
        kinds = {"unpaired": "the best completions alone (sft)", "rollout": "weighed completions (grpo, ppo)"}
        what = kinds.get(wanted, "pairs")
        raise UserError(f"loss.name: with online.pairs {plan.pairs} a loss over {what} is needed, not '{loss.name}'.")


def _refuse_unfit_reference(setup: OnlineSetup) -> None:
    kind, wanted = setup.reference_kind, setup.config.reference.kind
    if kind == "precomputed" and setup.advantage_plan.kl_weight:
        raise UserError(
            "reference.kind: with advantage.kl_weight the reference is asked about fresh completions in every round, "
            "which precomputed (and online.renew_reference) cannot; use copy, or lora.rank with adapter_off."
        )
    if setup.plan.renew_reference and kind not in ("precomputed", "none"):
        raise UserError(
            f"reference.kind: with online.renew_reference each round's first policy is the reference, not '{kind}'; "
            "leave one out."
        )
    if kind == "precomputed" and wanted == kind and not setup.plan.renew_reference and setup.num_rounds > 1:
        raise UserError(
            "reference.kind: precomputed needs the completions before training, and this run samples fresh ones in "
            f"{setup.num_rounds} rounds; use copy, or lora.rank with adapter_off."
        )
    if kind == "precomputed" and setup.config.reference.model:
        raise UserError("reference.model: takes reference.kind model with methods that sample.")


def sequences(examples: Sequence[TokenizedExample], completions: Sequence[Sequence[int]]) -> list[TokenizedExample]:
    """Each prompt with one completion, to be scored."""
    return [TokenizedExample(e.prompt_ids, (ids,), e.index) for e, ids in zip(examples, completions, strict=True)]

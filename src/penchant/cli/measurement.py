"""The work of `penchant eval`: a model scores pairs, answers prompts and is judged, and what came of it is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penchant.cli.evaluating import Data, Plan
from penchant.disk import make_folder, write_json, write_json_lines
from penchant.errors import UserError
from penchant.evaluate.answers import answer_to, distance, read_answers
from penchant.evaluate.comparison import Comparison, best_of, compare
from penchant.evaluate.exports import write_alpaca_eval, write_lm_eval_task
from penchant.evaluate.pairs import pair_accuracy
from penchant.examples import Answer, Prompt, Text
from penchant.models.fingerprints import tokenizer_sha256
from penchant.online.growing import growing_file
from penchant.online.judges import Judge, make_judge
from penchant.online.pairs import kl_of_best_of
from penchant.online.samples import PolicySampler, sample_settings
from penchant.scoring.policy import Policy
from penchant.training.logger import RunLog
from penchant.training.setup import load_policy

_BATCHES_AT_ONCE = 4
"""Batches of answers between two writes."""


def measure(plan: Plan, data: Data, log: RunLog) -> dict[str, Any]:
    """Does what the plan asks for and writes it; gives back the summary.

    Raises:
        UserError: something the user can mend.
    """
    summary = _Measurement(plan, data, log).summary()
    make_folder(plan.output)
    write_json(plan.output / "summary.json", summary)
    return summary


class _Measurement:
    def __init__(self, plan: Plan, data: Data, log: RunLog) -> None:
        """Loads all that is needed, so that what cannot be loaded shows before anything is computed."""
        self.plan, self.data, self.log = plan, data, log
        options = plan.options
        self.policy = self._load(options.model)
        self.reference = self._load_reference(options.reference) if options.reference else None
        self.baseline = self._load(options.baseline) if options.baseline else None
        self.judge = make_judge(plan.judge, self.policy.device, self.policy.precision) if plan.judge.name else None

    def summary(self) -> dict[str, Any]:
        options, pairs = self.plan.options, self.data.pairs
        if pairs:
            write_lm_eval_task(self.plan.output / "lm_eval", "penchant_pairs", pairs, self.policy.tokenizer)
        summary = {
            "model": options.model,
            "data": options.data,
            "reference": options.reference,
            "pairs": self._pair_accuracy(),
        }
        return summary if self.judge is None else {**summary, **self._answers(self.judge)}

    # models

    def _load(self, name: str) -> Policy:
        config = self.plan.config.model_copy(update={"model": name})
        return load_policy(config, self.log, [prompt.text for prompt in self.data.prompts], None)

    def _load_reference(self, name: str) -> Policy:
        """The reference, reading with the policy's tokenizer, which must be its own."""
        loaded, tokenizer = self._load(name), self.policy.tokenizer
        if tokenizer_sha256(loaded.tokenizer) != tokenizer_sha256(tokenizer):
            raise UserError(f"--reference: '{name}' has another tokenizer than the model; give one that shares it.")
        return Policy(loaded.model, tokenizer, loaded.precision)

    # pairs

    def _pair_accuracy(self) -> dict[str, Any] | None:
        pairs = self.data.pairs
        if not pairs:
            return None
        if self.reference is None:
            self.log.say("pairs", f"{len(pairs):,}; with --reference R the accuracy on them is told")
            return None
        with self.log.progress("pairs", 4 * len(pairs)) as meter:
            return pair_accuracy(self.policy, self.reference, pairs, meter.advance).as_dict()

    # answers

    def _answers(self, judge: Judge) -> dict[str, Any]:
        """Samples, has judged and writes: what the summary says of the answers."""
        plan = self.plan
        self.log.say("judge", judge.description)
        prompts, chosen = self._prompts_to_answer()
        compared: dict[str, Comparison] = {}
        told: dict[str, dict[str, Any]] = {}
        for temperature in plan.temperatures:
            samples = self._sampled("model", self.policy, prompts, temperature, plan.samples_at(temperature))
            others = chosen
            if self.baseline is not None:
                others = [own[0] for own in self._sampled("baseline", self.baseline, prompts, temperature, 1)]
            answers = [own[0] for own in samples]
            distances = self._distances(prompts, answers, temperature)
            setting = f"temperature {temperature:g}"
            compared[setting] = self._compared(judge, prompts, answers, others, distances)
            told[setting] = compared[setting].summary(plan.config.seed)
            if (number := len(samples[0])) > 1:
                setting = f"best of {number} at {temperature:g}"
                compared[setting] = self._compared(judge, prompts, self._best(judge, prompts, samples), others)
                told[setting] = compared[setting].summary(plan.config.seed)
                told[setting]["kl_bound_from_model"] = kl_of_best_of(number)
        self._write(compared)
        return {
            "baseline": plan.options.baseline or plan.options.against,
            "prompts": len(prompts),
            "seed": plan.config.seed,
            "sampling": plan.sampling.model_dump(exclude_none=True, exclude={"temperature", "batch_size"}),
            "judge": {"description": judge.description, "identity": judge.identity, **judge.report()},
            "answers": told,
        }

    def _prompts_to_answer(self) -> tuple[list[Prompt], list[Answer] | None]:
        """All prompts, or those with a chosen answer to compare with, and these answers."""
        data = self.data
        if not self.plan.options.against:
            return data.prompts, None
        places = sorted(data.chosen)
        if len(places) < len(data.prompts):
            self.log.say("against", f"{len(places):,} of {len(data.prompts):,} prompts have a chosen answer")
        return [data.prompts[place] for place in places], [data.chosen[place] for place in places]

    def _sampled(
        self, side: str, policy: Policy, prompts: Sequence[Prompt], temperature: float, number: int
    ) -> list[list[Answer]]:
        """The answers of one side: those that its file holds, and those that it still lacked."""
        plan = self.plan
        path = plan.output / "answers" / f"{side}-temperature-{temperature:g}.jsonl"
        sampling, rows, seed = plan.sampling_at(temperature), plan.sampling.batch_size, plan.config.seed
        settings = {**PolicySampler(policy).settings(), **sample_settings(prompts, sampling, number, seed)}
        chunk = max(1, _BATCHES_AT_ONCE * rows // number)
        texts = _texts(prompts)
        with (
            growing_file(path, settings, len(prompts), chunk, plan.options.overwrite) as file,
            self.log.progress(side, (len(prompts) - file.num_done) * number) as meter,
        ):
            answer_to(file, policy, texts, sampling, seed, rows, meter.advance, number)
        return read_answers(path)

    def _distances(self, prompts: Sequence[Prompt], answers: Sequence[Answer], temperature: float) -> Sequence[float]:
        """Estimates of the KL divergence from the reference, where the answers are samples of the model as it is."""
        sampling = self.plan.sampling_at(temperature)
        is_plain = (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
        if self.reference is None or not is_plain:
            return ()
        with self.log.progress("kl", 2 * len(prompts)) as meter:
            return distance(self.policy, self.reference, _texts(prompts), answers, meter.advance)

    def _compared(
        self,
        judge: Judge,
        prompts: Sequence[Prompt],
        answers: Sequence[Answer],
        others: Sequence[Answer] | None,
        distances: Sequence[float] = (),
    ) -> Comparison:
        with self.log.progress("judging", len(prompts)) as meter:
            return compare(judge, prompts, answers, others, distances, meter.advance)

    def _best(self, judge: Judge, prompts: Sequence[Prompt], samples: Sequence[Sequence[Answer]]) -> list[Answer]:
        with self.log.progress("choosing", len(prompts)) as meter:
            return best_of(judge, prompts, samples, meter.advance)

    def _write(self, compared: dict[str, Comparison]) -> None:
        """Every answer with its verdict; and those of the first setting once more, as AlpacaEval reads them."""
        folder, options = self.plan.output, self.plan.options
        write_json_lines(folder / "answers.jsonl", (row for name in compared for row in compared[name].records(name)))
        first = next(iter(compared.values()))
        sides = [("alpaca_eval.json", first.answers, options.model)]
        if first.others is not None:
            sides.append(("alpaca_eval_baseline.json", first.others, options.baseline or "chosen"))
        for name, answers, generator in sides:
            write_alpaca_eval(folder / name, _texts(first.prompts), answers, generator, options.data)


def _texts(prompts: Sequence[Prompt]) -> list[Text]:
    return [prompt.text for prompt in prompts]

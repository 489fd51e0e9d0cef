"""The verb that measures a model on held-out data: pair accuracy, win rates, distance from the reference."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant import stopping
from penchant.cli.plugins import Verb
from penchant.cli.sections import add_section_keys, section_from
from penchant.config import JudgeConfig, RunConfig, SamplingConfig, config_from, option_names, parse_value
from penchant.errors import UserError

if TYPE_CHECKING:
    from penchant.examples import Answer, Pair, Prompt, Text
    from penchant.models.generation import Sampling

_EPILOG = """examples:
  penchant eval --model runs/dpo/model --data heldout.jsonl --reference ./sft-model
  penchant eval --model runs/dpo/model --data heldout.jsonl --baseline ./sft-model --reference ./sft-model
      --judge.name reward --judge.model ./reward-model --temperatures 0,0.5,1
  penchant eval --model runs/dpo/model --data articles.jsonl --against chosen
      --judge.name server --judge.url http://localhost:8000/v1 --judge.model qwen3

Pairs tell how often the implicit reward (log-ratio of M and the reference) ranks chosen first. With a judge M also
answers the prompts; intervals are over prompts, and beside every win rate stands what the lengths alone would give.
How M does on prompts unlike those of its training is told by giving other --data. A command that was stopped goes on
when it is given again; answers that are there are not sampled anew."""

_PLAIN_KEYS = ("data_family", "seed", "chat_template", "device", "dtype")
_NEED_A_JUDGE = ("baseline", "against", "temperatures", "best_of")
_MOST_NAMED = 5


def add_verbs(verb: Verb) -> None:
    """The verbs of this file."""
    evaluate = verb("eval", _eval, "Measure a model on held-out pairs and prompts.", epilog=_EPILOG)
    evaluate.add_argument("--model", required=True, metavar="M", help="the model to measure")
    evaluate.add_argument("--data", required=True, metavar="D", help="held-out pairs, or any rows with prompts")
    evaluate.add_argument("--reference", metavar="R", help="the model that M's log-probabilities are compared with")
    evaluate.add_argument("--baseline", metavar="B", help="a model whose answers M's are compared with")
    evaluate.add_argument("--against", choices=["chosen"], help="compare with the chosen answers of D instead")
    evaluate.add_argument("--temperatures", metavar="T,T,...", help="answer at each of these temperatures")
    evaluate.add_argument(
        "--best-of", type=int, metavar="N", help="also take the best of N answers, by the judge, at each prompt"
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="only the first N prompts, and their pairs")
    evaluate.add_argument("--output", type=Path, metavar="DIR", help="where to write; default: evals/MODEL-DATA")
    evaluate.add_argument("--overwrite", action="store_true", help="sample the answers anew")
    evaluate.add_argument("--json", action="store_true", help="print the summary as JSON on standard output")
    for name in _PLAIN_KEYS:
        evaluate.add_argument(f"--{name}", metavar="VALUE", help=option_names()[name].replace("%", "%%"))
    add_section_keys(evaluate, "judge")
    add_section_keys(evaluate, "sampling", ("temperature", "top_p", "top_k", "max_new_tokens", "batch_size"))


@dataclass(frozen=True)
class Plan:
    """What the options ask for, checked."""

    options: argparse.Namespace
    config: RunConfig
    """Of the run file's keys those that loading models and reading data need."""
    judge: JudgeConfig
    sampling: SamplingConfig
    temperatures: tuple[float, ...]
    output: Path

    def sampling_at(self, temperature: float) -> Sampling:
        """How tokens are drawn."""
        from penchant.models.generation import Sampling

        section = self.sampling
        return Sampling(temperature, section.top_p or 1.0, section.top_k or 0, section.max_new_tokens)

    def samples_at(self, temperature: float) -> int:
        """How many answers of M to each prompt; at temperature 0 all are the same."""
        return (self.options.best_of or 1) if temperature > 0 else 1


@dataclass(frozen=True)
class Data:
    """What the data hold: prompts, pairs, and chosen answers by the places of their prompts."""

    prompts: list[Prompt]
    pairs: list[Pair]
    chosen: dict[int, Answer]


def _eval(options: argparse.Namespace) -> int:
    plan = _planned(options)
    data = _read(plan)
    _refuse_nothing_to_do(plan, data)
    from penchant.cli.measurement import measure
    from penchant.training.logger import RunLog

    with _goes_on(plan), stopping.listening():
        summary = measure(plan, data, RunLog())
    if options.json:
        print(json.dumps({"output": str(plan.output), **summary}, ensure_ascii=False, indent=2))
    else:
        from penchant.cli.eval_table import print_summary

        print_summary(summary, plan.output)
    return 0


@contextmanager
def _goes_on(plan: Plan) -> Iterator[None]:
    """Says how to go on where somebody stops the work within it."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{plan.output} keeps the answers so far; the same command goes on.", file=sys.stderr)
        raise


# what is asked for


def _planned(options: argparse.Namespace) -> Plan:
    given = {name: parse_value(text) for name in _PLAIN_KEYS if (text := getattr(options, name)) is not None}
    config = config_from({"model": options.model, "data": options.data, **given})
    judge, sampling = section_from(JudgeConfig, options, "judge"), section_from(SamplingConfig, options, "sampling")
    for name, least in (("limit", 1), ("best_of", 2)):
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: must be at least {least}, got {value}.")
    if judge.name is None:
        idle = [name for name in _NEED_A_JUDGE if getattr(options, name) is not None]
        idle += ["sampling"] if sampling != SamplingConfig() else []
        if idle:
            raise UserError(f"--{idle[0].replace('_', '-')}: has no effect without a judge; give --judge.name.")
    if options.baseline and options.against:
        raise UserError("--baseline, --against: are two things to compare with; leave one out.")
    if judge.name == "server" and not (options.baseline or options.against):
        raise UserError("judge.name: a server compares two answers; give --baseline B or --against chosen.")
    temperatures = _temperatures(options.temperatures, sampling)
    if options.best_of and not any(temperatures):
        raise UserError("--best-of: at temperature 0 all answers are the same; give a temperature above 0.")
    return Plan(options, config, judge, sampling, temperatures, options.output or _default_output(options))


def _temperatures(given: str | None, sampling: SamplingConfig) -> tuple[float, ...]:
    if given is None:
        return (1.0 if sampling.temperature is None else sampling.temperature,)
    if sampling.temperature is not None:
        raise UserError("sampling.temperature: has no effect with --temperatures; leave one out.")
    try:
        temperatures = tuple(dict.fromkeys(float(part) for part in given.split(",")))
    except ValueError:
        temperatures = (-1.0,)
    if not all(0 <= temperature < math.inf for temperature in temperatures):
        raise UserError(f"--temperatures: must be numbers from 0 on, as 0,0.5,1; got '{given}'.")
    return temperatures


def _default_output(options: argparse.Namespace) -> Path:
    model = Path(options.model).absolute()
    name = model.parent.name if (model.parent / "run.yaml").exists() else model.name  # RUN/model is named by its run
    data = re.sub(r"\W+", "-", Path(options.data).name.split(".")[0]).strip("-")
    return Path("evals") / f"{name}-{data or 'data'}"


# what is there


def _read(plan: Plan) -> Data:
    from penchant.data.formats import read_examples
    from penchant.data.prompts import read_prompts
    from penchant.data.units import as_unit, key_of
    from penchant.examples import Pair, Ranking

    path, family = plan.config.data, plan.config.data_family
    found = read_prompts(path, family=family)
    for problem in found.problems[:_MOST_NAMED]:
        print(problem, file=sys.stderr)
    if found.problems:
        print(f"{path}: {len(found.problems):,} rows left out", file=sys.stderr)
    if not found.prompts:
        raise UserError(f"{path}: holds no prompt that can be used.")
    prompts = found.prompts[: plan.options.limit]
    places = {key_of(prompt.text): place for place, prompt in enumerate(prompts)}
    examples = [one for one in read_examples(path, family).examples if key_of(one.prompt) in places]
    pairs, _ = as_unit([one for one in examples if isinstance(one, Pair | Ranking)], "pair")
    chosen: dict[int, Answer] = {}
    for one in examples:
        answer = _chosen(one)
        if answer is not None:
            chosen.setdefault(places[key_of(one.prompt)], answer)
    return Data(prompts, [pair for pair in pairs if isinstance(pair, Pair)], chosen)


def _chosen(example: Any) -> Answer | None:
    """The answer that people preferred, or gave, where there is one and it is one message."""
    from penchant.examples import Answer, plain_text

    best: Text = example.completions[0]
    is_disliked = getattr(example, "is_desirable", True) is False
    return Answer(plain_text(best)) if not is_disliked and (isinstance(best, str) or len(best) == 1) else None


def _refuse_nothing_to_do(plan: Plan, data: Data) -> None:
    if plan.judge.name is None and not (data.pairs and plan.options.reference):
        why = "no reference is given" if data.pairs else f"{plan.config.data} holds no pairs"
        raise UserError(
            f"there is nothing to measure: {why}; give --reference R and pairs for the accuracy on them, or "
            "--judge.name for what a judge says of the answers."
        )
    if plan.options.against and not data.chosen:
        raise UserError(f"--against: {plan.config.data} holds no chosen answers; give --baseline B.")

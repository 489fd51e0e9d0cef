"""The verbs between a model and its preferences: sample completions, have them judged, make pairs of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant import stopping
from penchant.cli.plugins import Verb
from penchant.cli.sections import add_section_keys, section_from
from penchant.config import JudgeConfig, OnlineConfig, RunConfig, SamplingConfig, config_from, option_names, parse_value
from penchant.config.sections import filled
from penchant.errors import UserError

if TYPE_CHECKING:
    from penchant.data.formats import RowProblem
    from penchant.examples import Example, Prompt
    from penchant.online.growing import GrowingFile, Settings
    from penchant.online.judges import Judge
    from penchant.online.samples import Sampled, Sampler
    from penchant.training.logger import RunLog

_SAMPLE_EPILOG = """examples:
  penchant sample --model ./sft-model --data prompts.jsonl --output samples.jsonl --sampling.completions 4
  penchant sample --model qwen3 --url http://localhost:8000/v1 --data prompts.jsonl --output samples.jsonl

Of preference data the prompts are taken. A command that was stopped goes on when it is given again, and the file comes
out as if it had not been stopped."""

_JUDGE_EPILOG = """examples:
  penchant judge --data samples.jsonl --output judged.jsonl --judge.name rule --judge.function rules.py:brevity
  penchant judge --data labelled-pairs.jsonl --output checked.jsonl --judge.name reward --judge.model ./reward-model

Pairs that people have labelled check the judge: how often it agrees with them is told. What comes out of sampled
completions is for `penchant pair`, or for `penchant train` as it is. A command that was stopped goes on when it is
given again."""

_PAIR_EPILOG = """example:
  penchant pair --data judged.jsonl --output pairs.jsonl --online.pairs best_worst --online.min_gap 0.5"""

_PAIR_KEYS = ("pairs", "min_gap", "accept", "accept_beta")

_BATCHES_AT_ONCE = 4
"""Batches of completions between two writes: so many can be lost, and the last of them is not full."""
_QUESTIONS_AT_ONCE = 64
_MOST_NAMED = 5


def add_verbs(verb: Verb) -> None:
    """The verbs of this file."""
    names = option_names()
    sample = verb("sample", _sample, "Sample completions of prompts from a model, for a judge.", epilog=_SAMPLE_EPILOG)
    sample.add_argument(
        "--model", required=True, metavar="M", help="folder, hub id or .gguf file; with --url the server's name of it"
    )
    sample.add_argument("--data", required=True, metavar="D", help="rows with prompts, whatever else is in them")
    _add_output(sample, "samples.jsonl")
    sample.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    sample.add_argument("--seed", metavar="S", help="another one gives other completions (default 0)")
    _add_plain_keys(sample, "data_family", "chat_template", "device", "dtype")
    sample.add_argument("--url", metavar="URL", help="a server to ask instead, as http://host:8000/v1")
    sample.add_argument("--key_from", metavar="VAR", help=names["judge.key_from"])
    add_section_keys(sample, "sampling")

    judge = verb("judge", _judge, "Have completions judged, and see what kind of judge it is.", epilog=_JUDGE_EPILOG)
    judge.add_argument("--data", metavar="D", help="sampled completions, pairs or rankings")
    _add_output(judge, "judged.jsonl", required=False)
    judge.add_argument("--show-question", action="store_true", help="print the text that a server is asked, and stop")
    _add_plain_keys(judge, "data_family", "device", "dtype")
    add_section_keys(judge, "judge")

    pair = verb("pair", _pair, "Make preference pairs of judged completions.", epilog=_PAIR_EPILOG)
    pair.add_argument("--data", required=True, metavar="D", help="what `penchant judge` wrote")
    _add_output(pair, "pairs.jsonl")
    pair.add_argument("--seed", metavar="S", help="another one draws other pairs, where they are drawn (default 0)")
    add_section_keys(pair, "online", _PAIR_KEYS)


def _add_output(parser: argparse.ArgumentParser, example: str, required: bool = True) -> None:
    parser.add_argument("--output", required=required, type=Path, metavar="OUT", help=f"the file to write: {example}")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON on standard output")


def _add_plain_keys(parser: argparse.ArgumentParser, *names: str) -> None:
    for name in names:
        parser.add_argument(f"--{name}", metavar="VALUE", help=option_names()[name].replace("%", "%%"))


# sample


def _sample(options: argparse.Namespace) -> int:
    from penchant.models.generation import Sampling
    from penchant.online.growing import growing_file
    from penchant.online.samples import sample_settings, sample_to
    from penchant.training.logger import RunLog

    _refuse_own_data(options)
    config, log = _config(options, "seed", "chat_template", "device", "dtype"), RunLog()
    section = filled(section_from(SamplingConfig, options, "sampling"), config.filled_sampling().model_dump())
    number = section.completions or 1
    sampling = Sampling(**section.model_dump(exclude={"completions", "batch_size"}))
    chunk = max(1, _BATCHES_AT_ONCE * section.batch_size // number)
    with _goes_on(options), stopping.listening():
        sampler, whose, prompts = _sampler(options, config, section.batch_size, log)
        settings = {**whose, **sample_settings(prompts, sampling, number, config.seed)}
        made = growing_file(options.output, settings, len(prompts), chunk, options.overwrite)
        with made as file, log.progress("sampling", _left(file, log) * number) as meter:
            sample_to(file, prompts, sampler, sampling, number, config.seed, meter.advance)
    _tell_samples(options, log)
    return 0


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    from penchant.data.prompts import read_prompts

    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit: must be at least 1, got {options.limit}.")
    found = read_prompts(options.data, family=options.data_family)
    _name_left_out(options.data, found.problems)
    if not found.prompts:
        raise UserError(f"{options.data}: holds no prompt that can be used.")
    return found.prompts[: options.limit]


def _sampler(
    options: argparse.Namespace, config: RunConfig, batch_size: int, log: RunLog
) -> tuple[Sampler, Settings, list[Prompt]]:
    """Who answers, what the answers depend on by that, and the prompts that it can answer."""
    if options.url:
        from penchant.online.client import ChatClient
        from penchant.online.server_sampler import ServerSampler

        _refuse_idle(options, "with --url", "chat_template", "device", "dtype")
        client = ChatClient(options.url, options.model, options.key_from or JudgeConfig().key_from)
        return ServerSampler(client), {"model": options.model}, _prompts(options)
    _refuse_idle(options, "without --url", "key_from")
    from penchant.online.samples import PolicySampler
    from penchant.training.setup import load_policy

    prompts = _prompts(options)
    policy = load_policy(config, log, [prompt.text for prompt in prompts], None)
    sampler = PolicySampler(policy, batch_size)
    return sampler, sampler.settings(), _rendered(options, prompts, policy.tokenizer)


def _rendered(options: argparse.Namespace, prompts: Sequence[Prompt], tokenizer: Any) -> list[Prompt]:
    """Those prompts that the chat template does not refuse; the others are named."""
    from penchant.data.chat import RenderError, encode
    from penchant.data.formats import RowProblem

    kept: list[Prompt] = []
    refused: list[RowProblem] = []
    for prompt in prompts:
        try:
            encode(tokenizer, prompt.text, ["."])
            kept.append(prompt)
        except RenderError as error:
            refused.append(RowProblem(error.code, prompt.source, str(error)))
    _name_left_out(options.data, refused)
    if not kept:
        raise UserError(f"{options.data}: the chat template refuses all prompts; give another as --chat_template FILE.")
    return kept


def _tell_samples(options: argparse.Namespace, log: RunLog) -> None:
    from penchant.online.samples import read_samples
    from penchant.online.summaries import summary_of_samples
    from penchant.report.figures import number, percent

    summary = summary_of_samples(read_samples(options.output))
    _print_json(options, summary)
    log.say(
        "samples",
        f"{options.output}: {summary['completions']:,} completions of {summary['prompts']:,} prompts, "
        f"{percent(summary['finished'])} of them finished, {number(summary['mean_tokens'])} tokens on average",
    )


# judge


def _judge(options: argparse.Namespace) -> int:
    from penchant.online.growing import growing_file
    from penchant.online.samples import judge_settings, judge_to
    from penchant.training.logger import RunLog

    config = section_from(JudgeConfig, options, "judge")
    if options.show_question:
        print(files("penchant.online").joinpath("question.txt").read_text(encoding="utf-8"), end="")
        return 0
    for name in ("data", "output"):
        if getattr(options, name) is None:
            raise UserError(f"--{name}: is missing.")
    _refuse_own_data(options)
    asked, log = _to_judge(options), RunLog()
    with _goes_on(options), stopping.listening():
        judge = _judge_of(options, config)
        log.say("judge", judge.description)
        settings = judge_settings(asked, judge)
        made = growing_file(options.output, settings, len(asked), _QUESTIONS_AT_ONCE, options.overwrite)
        with made as file, log.progress("judging", _left(file, log)) as meter:
            judge_to(file, asked, judge, meter.advance)
    _tell_verdicts(options, judge, log)
    return 0


def _to_judge(options: argparse.Namespace) -> list[Sampled]:
    from penchant.data.formats import RowProblem
    from penchant.online.samples import stream_samples

    found = list(stream_samples(options.data, options.data_family))
    _name_left_out(options.data, [one for one in found if isinstance(one, RowProblem)])
    asked = [one for one in found if not isinstance(one, RowProblem)]
    if not asked:
        raise UserError(f"{options.data}: holds no completion that can be judged.")
    return asked


def _judge_of(options: argparse.Namespace, config: JudgeConfig) -> Judge:
    from penchant.online.judges import make_judge

    if config.name not in ("reward", "implicit"):
        _refuse_idle(options, f"with a judge of kind {config.name}", "device", "dtype")
        return make_judge(config)
    from penchant.training.hardware import resolve_device, resolve_precision

    device = resolve_device(options.device or "auto")
    return make_judge(config, device, resolve_precision(options.dtype or "auto", device))


def _tell_verdicts(options: argparse.Namespace, judge: Judge, log: RunLog) -> None:
    from penchant.online.samples import read_samples
    from penchant.online.summaries import summary_of_verdicts
    from penchant.report.figures import number, percent

    summary, noticed = summary_of_verdicts(read_samples(options.output)), judge.report()
    _print_json(options, {**summary, "judge": noticed})
    log.say(
        "judged",
        f"{options.output}: {summary['completions']:,} completions of {summary['prompts']:,} prompts, mean score "
        f"{number(summary['mean_score'])}; {summary['ties']:,} prompts with equal scores, {summary['invalid']:,} "
        "completions without a verdict",
    )
    if agreement := summary["agreement"]:
        log.say(
            "agreement",
            f"the judge agrees with the labels of {percent(agreement['share'])} of {agreement['pairs']:,} pairs (95% "
            f"interval {' to '.join(map(percent, agreement['interval']))}), a tie counted as half",
        )
    for name, value in noticed.items():
        for said in value if isinstance(value, list) else [f"{name.replace('_', ' ')} {number(value)}"]:
            log.say("judge", said)


# pair


def _pair(options: argparse.Namespace) -> int:
    from penchant.data.formats import RowProblem, stream_rows
    from penchant.data.writing import write_rows
    from penchant.online.samples import read_samples

    plan = section_from(OnlineConfig, options, "online")
    if plan.pairs == "none":
        raise UserError("online.pairs: none makes no pairs; it is for methods that weigh completions (grpo, ppo).")
    if plan.accept is None and plan.accept_beta is not None:
        raise UserError("online.accept_beta: has no effect without online.accept.")
    _refuse_own_data(options)
    if options.output.exists() and not options.overwrite:
        raise UserError(f"{options.output}: is there already; choose another name, or give --overwrite.")
    judged = read_samples(options.data)
    if not any(one.verdict for one in judged):
        raise UserError(f"{options.data}: holds no scores; have it judged with `penchant judge` first.")
    counts: Counter[str] = Counter()
    examples: list[Example] = []
    left_out: list[RowProblem] = []
    for source, row in _rows(judged, plan, _config(options, "seed").seed, counts):
        ((_, found),) = stream_rows([row])
        if isinstance(found, RowProblem):
            left_out.append(replace(found, source=source))
        else:
            examples.append(found)
    _name_left_out(options.data, left_out)
    if not examples:
        raise UserError(f"{options.data}: gives no pair; its completions score the same, or differ too little.")
    num_rows = write_rows(examples, options.output, "trl")
    _print_json(options, {"rows": num_rows, "left_out": len(left_out), "prompts": len(judged), **counts})
    what = "best completions" if plan.pairs == "best" else "pairs"
    accepted = f"; {counts['accepted']:,} of {counts['scored']:,} completions accepted" if plan.accept else ""
    print(
        f"{options.output}: {num_rows:,} {what} from {counts['used']:,} of {len(judged):,} prompts; {counts['ties']:,} "
        f"prompts with equal scores{accepted}",
        file=sys.stderr,
    )
    return 0


def _rows(
    judged: Iterable[Sampled], plan: OnlineConfig, seed: int, counts: Counter[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The preferences as rows, each with the source of its prompt; counts what became of the prompts."""
    import numpy as np

    from penchant.online.pairs import choose
    from penchant.online.samples import preference_rows
    from penchant.online.seeds import prompt_seed
    from penchant.online.summaries import is_tie

    for one in judged:
        if one.verdict is None:
            continue
        num_scored = sum(score is not None for score in one.verdict.scores)
        counts["scored"] += num_scored
        counts["accepted"] += min(plan.accept or num_scored, num_scored)
        counts["ties"] += is_tie(one.verdict)
        dice = np.random.default_rng(prompt_seed(seed, one.prompt))
        rows = preference_rows(
            one,
            choose(one.verdict, plan.pairs or "best_worst", dice, plan.min_gap, plan.accept, plan.accept_beta or 0.5),
        )
        counts["used"] += bool(rows)
        for row in rows:
            yield one.source, row


# all


def _config(options: argparse.Namespace, *names: str) -> RunConfig:
    """A run with the options of these names, for what they mean there; it is not run."""
    given = {name: parse_value(text) for name in names if (text := getattr(options, name)) is not None}
    return config_from({"model": getattr(options, "model", ""), "data": options.data, **given})


def _refuse_own_data(options: argparse.Namespace) -> None:
    """What is read must not be written over: with --overwrite it would be gone before anything is there instead."""
    if options.output.resolve() == Path(options.data).resolve():
        raise UserError("--output: is the file that --data names; choose another.")


def _refuse_idle(options: argparse.Namespace, why: str, *names: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: has no effect {why}.")


def _left(file: GrowingFile, log: RunLog) -> int:
    """How many records are still to be made; says so where some are there."""
    left = file.num_records - file.num_done
    if file.num_done:
        log.say("goes on", f"{file.path} holds {file.num_done:,} of {file.num_records:,} prompts")
    return left


@contextmanager
def _goes_on(options: argparse.Namespace) -> Iterator[None]:
    """Says how to go on where somebody stops the work within it."""
    try:
        yield
    except KeyboardInterrupt:
        if options.output.exists():
            again = "the same command without --overwrite" if options.overwrite else "the same command"
            print(f"{options.output} keeps what is done; {again} goes on.", file=sys.stderr)
        raise


def _name_left_out(data: str, problems: Sequence[RowProblem]) -> None:
    for problem in problems[:_MOST_NAMED]:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{data}: {len(problems):,} rows left out", file=sys.stderr)


def _print_json(options: argparse.Namespace, summary: Mapping[str, Any]) -> None:
    if options.json:
        print(json.dumps({"output": str(options.output), **summary}, ensure_ascii=False, indent=2))

"""Answers of a policy to held-out prompts: sampled, kept, and described."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from penchant.disk import read_json_lines
from penchant.evaluate.wins import mean_with_interval
from penchant.examples import Answer, Text
from penchant.models.generation import Sampling
from penchant.online.growing import GrowingFile
from penchant.online.logps import sequence_logps
from penchant.online.seeds import prompt_seed
from penchant.scoring.policy import Policy

Advance = Callable[[int], None]


def answer(
    policy: Policy,
    prompts: Sequence[Text],
    sampling: Sampling,
    seed: int = 0,
    max_rows: int = 64,
    advance: Advance = lambda answers: None,
    num_samples: int = 1,
) -> list[list[Answer]]:
    """`num_samples` answers to each prompt, at most `max_rows` sampled at a time; calls `advance(answers)` on the way.

    The same seed gives the same answers to a prompt whatever the others are, and sample k does not depend on how many
    there are.
    """
    seeds = [prompt_seed(seed, prompt) for prompt in prompts]
    return policy.sample(prompts, sampling, num_samples, seeds, max_rows, advance=advance)


def answer_to(
    file: GrowingFile,
    policy: Policy,
    prompts: Sequence[Text],
    sampling: Sampling,
    seed: int = 0,
    max_rows: int = 64,
    advance: Advance = lambda answers: None,
    num_samples: int = 1,
) -> None:
    """Answers the prompts that the file still lacks, as `answer` does, a record for each prompt."""
    for chunk in file.chunks(prompts):
        sampled = answer(policy, chunk, sampling, seed, max_rows, advance, num_samples)
        file.append([{"answers": [_as_record(one) for one in answers]} for answers in sampled])


def read_answers(path: Path) -> list[list[Answer]]:
    """What `answer_to` wrote: the answers to each prompt."""
    return [
        [Answer(one["text"], tuple(one["token_ids"]), one["is_finished"]) for one in record["answers"]]
        for record in read_json_lines(path)
    ]


def distance(
    policy: Policy,
    reference: Policy,
    prompts: Sequence[Text],
    answers: Sequence[Answer],
    advance: Advance = lambda answers: None,
) -> list[float]:
    """log pi(y | x) - log pi_ref(y | x) of each answer, summed over its tokens, in nats.

    Where the answers are the policy's own samples at temperature 1, with nothing cut off, each is an unbiased estimate
    of KL(pi || pi_ref) at its prompt, for completions up to the limit of tokens (estimator k1 of Schulman 2020,
    "Approximating KL divergence"). A single one may be negative. Both models must share the tokenizer.
    """
    ratios = zip(
        sequence_logps(policy, prompts, answers, advance),
        sequence_logps(reference, prompts, answers, advance),
        strict=True,
    )
    return [logp - ref_logp for logp, ref_logp in ratios]


def describe(
    answers: Sequence[Answer],
    scores: Sequence[float | None] = (),
    distances: Sequence[float] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """What there is to say of answers, at least one; None where nothing is known.

    Means of scores and distances come as `value`, `low`, `high`: with the 95% interval over prompts.

    `score`: of a judge, over the answers with a valid one. `num_tokens`: mean length, the end token included.
    `finished`: the share that ended by themselves. `distinct_2`: distinct bigrams of words over all bigrams of all
    answers (Li et al. 2016, arXiv:1510.03055); it falls with the number of answers, so compare equal numbers.
    `repeated_4`: the share of an answer's 4-grams of words that repeat an earlier one, averaged over the answers that
    have any (Welleck et al. 2020, arXiv:1908.04319). `kl`: the mean of `distances`.
    """
    known = [score for score in scores if score is not None]
    lengths = [len(one.token_ids) for one in answers if one.token_ids]
    return {
        "answers": len(answers),
        "score": _estimate(known, seed),
        "num_tokens": sum(lengths) / len(lengths) if lengths else None,
        "finished": sum(one.is_finished for one in answers) / len(answers),
        "distinct_2": _distinct([_ngrams(one.text, 2) for one in answers]),
        "repeated_4": _repeated([_ngrams(one.text, 4) for one in answers]),
        "kl": _estimate(distances, seed),
    }


def same_opening(answers: Sequence[Answer], words: int = 5) -> float:
    """The share of the answers, at least one, that open with the commonest first words (shorter ones: with all)."""
    openings = Counter(tuple(one.text.split()[:words]) for one in answers)
    return max(openings.values()) / len(answers)


def _as_record(one: Answer) -> dict[str, Any]:
    return {"text": one.text, "token_ids": one.token_ids, "is_finished": one.is_finished}


def _estimate(values: Sequence[float], seed: int) -> dict[str, float] | None:
    return mean_with_interval(values, seed).as_dict() if values else None


def _ngrams(text: str, length: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def _distinct(ngrams: Sequence[Counter[tuple[str, ...]]]) -> float | None:
    together: Counter[tuple[str, ...]] = Counter()
    for counts in ngrams:
        together.update(counts)
    return len(together) / together.total() if together else None


def _repeated(ngrams: Sequence[Counter[tuple[str, ...]]]) -> float | None:
    shares = [1 - len(counts) / counts.total() for counts in ngrams if counts]
    return sum(shares) / len(shares) if shares else None

"""Rounds: prompts are answered by the policy, the answers judged, and the preferences trained on until the next round.

What a round sampled and how it was judged is kept in `rounds/` as it comes, a line a prompt. A run that is gone on with
reads it again, so nothing is sampled or judged twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save

from penchant.data.loader import Draw, epoch_order
from penchant.disk import make_folder, new_file, read_json_lines, read_mapping, write_json
from penchant.errors import UserError
from penchant.evaluate.answers import describe, same_opening
from penchant.examples import Answer, TokenizedExample
from penchant.online.growing import GrowingFile
from penchant.online.judges import Question, Verdict
from penchant.online.pairs import choose
from penchant.online.seeds import prompt_seed
from penchant.scoring.reference import Precomputed, Reference
from penchant.training.identity import check_identity
from penchant.training.logger import RunLog, count
from penchant.training.online import OnlineSetup

ROUNDS = "rounds"
"""Where they are in a run directory."""


@dataclass(frozen=True)
class Judged:
    """A prompt, the policy's answers and what the judge says of them."""

    prompt: TokenizedExample
    answers: tuple[Answer, ...]
    verdict: Verdict


class Rounds:
    """Where the examples of a run come from that samples its own.

    In round r the policy as it then stands answers the next `online.prompts_per_round` prompts. What it drew depends
    on its weights, the seed, r and the prompt, and on nothing else. Ties make the batches of a round smaller; the
    number of its steps stays, so that the schedule is known from the beginning.
    """

    def __init__(self, setup: OnlineSetup, reference: Reference | None, log: RunLog, run_dir: Path) -> None:
        self.setup, self.reference, self.log, self.folder = setup, reference, log, run_dir / ROUNDS

    def draws(self, start_step: int = 0) -> Iterator[Draw]:
        """The optimizer batches behind the first `start_step`; each round is sampled when it is asked for."""
        setup, step = self.setup, start_step
        while True:
            number, place = divmod(step, setup.steps_per_round)
            judged = self._judged(number, may_sample=place == 0)
            examples, seen = self._examples(number, judged, is_new=place == 0)
            if isinstance(self.reference, Precomputed):
                self._score(number, examples, may_score=place == 0)
            if step == 0 and examples and self.reference is not None:
                self._check_identity(examples)
            for batch in self._batches(number, examples)[place:]:
                yield Draw(batch, [], seen if place == 0 else {})
                place += 1
                step += 1

    def _judged(self, number: int, may_sample: bool) -> list[Judged]:
        """The prompts of a round with answers and verdicts: what is kept already, then the rest, sampled now.

        Prompts go through in fixed chunks, of which only whole ones are kept, so that a round that was broken off and
        one that was not are computed in the same company, to the bit.
        """
        setup, path = self.setup, self.folder / f"{number + 1:04d}.jsonl"
        prompts = setup.round_prompts(number)
        size = max(1, setup.sampling_plan.batch_size // setup.num_completions)
        make_folder(self.folder)
        file = GrowingFile.at(path, len(prompts), size)
        if file.num_done < len(prompts) and not may_sample:
            raise UserError(
                f"output_dir: '{path}' is not whole, and this round's training has begun; begin anew with "
                "`penchant train ... --overwrite`."
            )
        kept = [_from_row(row, prompt) for row, prompt in zip(read_json_lines(path), prompts, strict=False)]
        with self.log.progress(f"round {number + 1}", len(prompts)) as meter:
            meter.advance(len(kept))
            for chunk in file.chunks(prompts):
                judged = self._sample(number, chunk)
                file.append([self._row(one) for one in judged])
                kept += judged
                score = _mean_score(kept)
                meter.advance(len(judged), "" if score is None else f"score {score:.3f}")
        return kept

    def _sample(self, number: int, prompts: Sequence[TokenizedExample]) -> list[Judged]:
        setup = self.setup
        texts = [setup.prompts[prompt.index].text for prompt in prompts]
        seed = int(np.random.SeedSequence([setup.config.seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        answers = setup.policy.sample(
            texts,
            setup.sampling,
            setup.num_completions,
            [prompt_seed(seed, text) for text in texts],
            setup.sampling_plan.batch_size,
        )
        questions = [
            Question(text, tuple(answer.text for answer in own), setup.prompts[prompt.index].row)
            for prompt, text, own in zip(prompts, texts, answers, strict=True)
        ]
        verdicts = setup.judge.judge(questions)
        return [
            Judged(prompt, tuple(own), verdict) for prompt, own, verdict in zip(prompts, answers, verdicts, strict=True)
        ]

    def _examples(
        self, number: int, judged: Sequence[Judged], is_new: bool
    ) -> tuple[list[TokenizedExample], dict[str, Sequence[float]]]:
        """What training takes of a round, and what is seen of its answers; `is_new` before the round's first step."""
        setup, plan = self.setup, self.setup.plan
        assert plan.pairs is not None
        assert plan.pairs != "none"
        examples, gaps, undecided = [], [], 0
        for place, one in enumerate(judged):
            rng = np.random.default_rng([setup.config.seed, 2, number, place])
            found = choose(one.verdict, plan.pairs, rng, plan.min_gap, plan.accept, plan.accept_beta or 0.5)
            room = setup.config.max_length - len(one.prompt.prompt_ids)
            ids = [answer.token_ids[:room] for answer in one.answers]
            usable = [p for p in found if p.worse is None or ids[p.better] != ids[p.worse]]
            undecided += not usable
            gaps += [preference.gap for preference in usable]
            examples += [
                TokenizedExample(
                    one.prompt.prompt_ids,
                    (ids[p.better],) if p.worse is None else (ids[p.better], ids[p.worse]),
                    one.prompt.index,
                    margin=None if p.worse is None else p.gap,
                    win_probabilities=None if p.worse is None else p.probabilities,
                    is_desirable=True if p.worse is None else None,
                )
                for p in usable
            ]
        answers = [answer for one in judged for answer in one.answers]
        scores = [score for one in judged for score in one.verdict.scores if score is not None]
        seen = {
            "samples/score": scores,
            **seen_of_answers(answers),
            "samples/gap": gaps,
            "samples/undecided": [undecided / len(judged)],
        }
        if plan.accept is not None:
            seen["samples/acceptance"] = [_acceptance(one.verdict, plan.accept_beta or 0.5) for one in judged]
        self._tell(number, judged, examples, undecided, seen)
        return examples, {name: values for name, values in seen.items() if values}

    def _tell(
        self,
        number: int,
        judged: Sequence[Judged],
        examples: Sequence[TokenizedExample],
        undecided: int,
        seen: Mapping[str, Sequence[float]],
    ) -> None:
        """A line for people about a round; what is wrong with rounds the watch tells."""
        setup = self.setup
        if setup.steps_per_round > 1:
            unit = "completion" if setup.plan.pairs == "best" else "pair"
            score = f"mean score {np.mean(seen['samples/score']):.4g}; " if seen["samples/score"] else ""
            self.log.say(
                f"round {number + 1}",
                f"{count(len(judged), 'prompt')}, {len(judged) * setup.num_completions} answers; {score}"
                f"{np.mean(seen['samples/length']):.0f} tokens on average, {np.mean(seen['samples/finished']):.0%} "
                f"ended by themselves; {count(len(examples), unit)}, {undecided} without a decision",
            )

    def _batches(self, number: int, examples: Sequence[TokenizedExample]) -> list[list[TokenizedExample]]:
        """The batches of a round's steps, in passes over its examples, each in an order of its own."""
        setup = self.setup
        batches: list[list[TokenizedExample]] = []
        passes = math.ceil(setup.config.num_train_epochs)
        for number_of_pass in range(passes):
            order = epoch_order(len(examples), setup.config.seed, number * passes + number_of_pass)
            batches += [[examples[i] for i in part] for part in np.array_split(order, setup.batches_per_pass)]
        return batches[: setup.steps_per_round]

    def _score(self, number: int, examples: Sequence[TokenizedExample], may_score: bool) -> None:
        """Gives the reference what the policy thinks of the examples as the round begins, and keeps it for a resume."""
        assert isinstance(self.reference, Precomputed)
        setup, cache = self.setup, self.reference.cache
        path = self.folder / f"{number + 1:04d}.reference.safetensors"
        cache.clear()
        if path.exists():
            cache.put(examples, load_file(path)["logps"])
            return
        if not may_score:
            raise UserError(
                f"output_dir: '{path}' is gone, and with it what this round's reference said; begin anew with "
                "`penchant train ... --overwrite`."
            )
        with self.log.progress("reference", len(examples)) as meter:
            cache.fill(setup.policy, setup.layout.batches(examples, 2 * setup.max_tokens), meter.advance)
        with new_file(path) as file:
            file.write(save({"logps": cache.flat(examples)}))

    def _check_identity(self, examples: Sequence[TokenizedExample]) -> None:
        assert self.reference is not None
        setup = self.setup
        parts = setup.batches(examples[: setup.config.batch_size])[-2:]
        found, expected = check_identity(setup.policy, self.reference, setup.loss, parts)
        message = f"loss before the first step {found:.6f}, at policy = reference {expected:.6f}"
        self.log.event("info", "identity", message, step=0)

    def _row(self, judged: Judged) -> dict[str, Any]:
        prompt = self.setup.prompts[judged.prompt.index]
        return {
            "prompt": prompt.text if isinstance(prompt.text, str) else [dict(turn) for turn in prompt.text],
            "completions": [answer.text for answer in judged.answers],
            "finished": [answer.is_finished for answer in judged.answers],
            "scores": list(judged.verdict.scores),
            **({} if judged.verdict.wins is None else {"wins": [list(row) for row in judged.verdict.wins]}),
            **({"notes": list(judged.verdict.notes)} if judged.verdict.notes else {}),
            "ids": [list(answer.token_ids) for answer in judged.answers],
            "source": prompt.source,
        }


def seen_of_answers(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """What is seen of the answers of a round, whatever is done with them: length, end, repetition, sameness."""
    told = describe(answers)
    found = {f"samples/{name}": [told[name]] for name in ("distinct_2", "repeated_4") if told[name] is not None}
    return {
        "samples/length": [float(len(answer.token_ids)) for answer in answers],
        "samples/finished": [float(answer.is_finished) for answer in answers],
        "samples/same_opening": [same_opening(answers)],
        **found,
    }


def claim_rounds(run_dir: Path, setup: OnlineSetup, made_with: Mapping[str, Any], step: int) -> None:
    """Keeps of earlier rounds what a run may go on with at `step`, and notes what rounds are made with from here on.

    Where that is something else than before, rounds that were sampled at `step` or later are removed.
    """
    note = run_dir / ROUNDS / "made_with.json"
    if read_mapping(note) != made_with:
        for path in (run_dir / ROUNDS).glob("[0-9]*"):
            if (int(path.name.partition(".")[0]) - 1) * setup.steps_per_round >= step:
                path.unlink()
        make_folder(note.parent)
        write_json(note, made_with)


def _from_row(row: dict[str, Any], prompt: TokenizedExample) -> Judged:
    answers = tuple(
        Answer(text, tuple(ids), finished)
        for text, ids, finished in zip(row["completions"], row["ids"], row["finished"], strict=True)
    )
    wins = row.get("wins")
    verdict = Verdict(
        tuple(row["scores"]), None if wins is None else tuple(map(tuple, wins)), tuple(row.get("notes", ()))
    )
    return Judged(prompt, answers, verdict)


def _mean_score(judged: Sequence[Judged]) -> float | None:
    scores = [score for one in judged for score in one.verdict.scores if score is not None]
    return float(np.mean(scores)) if scores else None


def _acceptance(verdict: Verdict, beta: float) -> float:
    """The share of the answers that rejection sampling is expected to accept in its first pass."""
    scores = np.array([score for score in verdict.scores if score is not None])
    return float(np.exp((scores - scores.max()) / beta).mean()) if len(scores) else 0.0

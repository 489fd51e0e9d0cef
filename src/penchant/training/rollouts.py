"""Rounds of reinforcement learning: the policy's answers, their scores, and the advantage of each token.

What policy, reference and value head said of the answers as the round began is kept beside them, so that a run that is
gone on with weighs every token as it did before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from penchant.disk import new_file
from penchant.errors import UserError
from penchant.examples import Rollout, TokenizedExample
from penchant.online.advantages import Numbers, gae, group_advantages, token_rewards, whitened
from penchant.training.logger import count
from penchant.training.rounds import Judged, Rounds, seen_of_answers


@dataclass(frozen=True)
class _Said:
    """What was said of the tokens of one completion as the round began."""

    logps: Numbers
    ref_logps: Numbers
    values: Numbers


class Rollouts(Rounds):
    """Where the examples of a run come from that weighs every answer of its own: prompts with all their answers."""

    def _examples(
        self, number: int, judged: Sequence[Judged], is_new: bool
    ) -> tuple[list[TokenizedExample], dict[str, Sequence[float]]]:
        bare, scores = self._scored(judged)
        said = self._said(number, bare, is_new)
        plan = self.setup.advantage_plan
        assert plan.kl_weight is not None
        rewards = [
            [token_rewards(score, own.logps, own.ref_logps, plan.kl_weight) for score, own in zip(*both, strict=True)]
            for both in zip(scores, said, strict=True)
        ]
        advantages, returns = self._advantages(rewards, said)
        if plan.whiten:
            flat = iter(whitened([tokens for own in advantages for tokens in own]))
            advantages = [[next(flat) for _ in own] for own in advantages]
        examples = [
            self._example(example, own, own_returns, own_said)
            for example, own, own_returns, own_said in zip(bare, advantages, returns, said, strict=True)
        ]
        seen = self._seen(judged, scores, said, returns)
        self._tell_of(number, judged, seen)
        return examples, {name: values for name, values in seen.items() if len(values)}

    def _scored(self, judged: Sequence[Judged]) -> tuple[list[TokenizedExample], list[list[float]]]:
        """The prompts with those of their answers that have a score, and these scores."""
        setup, plan = self.setup, self.setup.advantage_plan
        examples, scores = [], []
        for one in judged:
            room = setup.config.max_length - len(one.prompt.prompt_ids)
            kept = []
            for answer, score in zip(one.answers, one.verdict.scores, strict=True):
                if plan.unfinished_score is not None and not answer.is_finished:
                    score = plan.unfinished_score
                if score is not None:
                    kept.append((answer.token_ids[:room], float(score)))
            if kept:
                ids, own = zip(*kept, strict=True)
                examples.append(TokenizedExample(one.prompt.prompt_ids, ids, one.prompt.index))
                scores.append(list(own))
        return examples, scores

    def _said(self, number: int, examples: Sequence[TokenizedExample], is_new: bool) -> list[list[_Said]]:
        """What policy, reference and value head say of each completion before the round's first step."""
        names = self._needed()
        lengths = [[len(ids) for ids in example.completion_ids] for example in examples]
        flat: Mapping[str, torch.Tensor] = {}
        if names and examples:
            path = self.folder / f"{number + 1:04d}.said.safetensors"
            flat = load_file(path) if path.exists() else self._ask(path, names, examples, is_new)
        nothing = torch.zeros(sum(map(sum, lengths)))
        columns = [
            iter(flat.get(name, nothing).double().split([length for own in lengths for length in own]))
            for name in ("logps", "ref_logps", "values")
        ]
        return [[_Said(*(next(column).numpy() for column in columns)) for _ in own] for own in lengths]

    def _needed(self) -> set[str]:
        """What has to be asked: nothing where each step has answers of its own, which the policy is just giving."""
        setup = self.setup
        needed = {"values"} if setup.policy.value_head is not None else set()
        if setup.advantage_plan.kl_weight:
            needed.add("ref_logps")
        return needed | {"logps"} if needed or setup.steps_per_round > 1 else needed

    @torch.no_grad()
    def _ask(
        self, path: Path, names: set[str], examples: Sequence[TokenizedExample], is_new: bool
    ) -> dict[str, torch.Tensor]:
        """Asks, and keeps the answers for a resume."""
        if not is_new:
            raise UserError(
                f"output_dir: '{path}' is gone, and with it what the policy said as this round began; begin anew with "
                "`penchant train ... --overwrite`."
            )
        setup, policy = self.setup, self.setup.policy
        pieces: dict[int, dict[str, torch.Tensor]] = {}
        places = {id(example): place for place, example in enumerate(examples)}
        policy.model.eval()
        with self.log.progress("scoring", len(examples)) as meter:
            batches = [batch.to(policy.device) for batch in setup.layout.batches(examples, 2 * setup.max_tokens)]
            refs: Sequence[torch.Tensor | None] = [None] * len(batches)
            if "ref_logps" in names:
                assert self.reference is not None
                refs = self.reference.token_logps(batches)
            every = policy.score_all(batches, advance=meter.advance)
            for batch, scored, ref in zip(batches, every, refs, strict=True):
                found = {"logps": scored.logps, "values": scored.values, "ref_logps": ref}
                tokens = [sum(map(len, example.completion_ids)) for example in batch.examples]
                for name in names:
                    column = found[name]
                    assert column is not None
                    for example, own in zip(batch.examples, column.float().cpu().split(tokens), strict=True):
                        pieces.setdefault(places[id(example)], {})[name] = own
        flat = {name: torch.cat([pieces[place][name] for place in range(len(examples))]) for name in names}
        with new_file(path) as file:
            file.write(save(flat))
        return flat

    def _advantages(
        self, rewards: Sequence[Sequence[Numbers]], said: Sequence[Sequence[_Said]]
    ) -> tuple[list[list[Numbers]], list[list[Numbers]]]:
        """The advantages of all tokens, and the returns that a value head is to learn (empty without one)."""
        plan = self.setup.advantage_plan
        if plan.kind == "gae":
            advantages = [
                [gae(tokens, own.values, plan.gamma, plan.gae_lambda) for tokens, own in zip(*both, strict=True)]
                for both in zip(rewards, said, strict=True)
            ]
            returns = [
                [tokens + own.values for tokens, own in zip(*both, strict=True)]
                for both in zip(advantages, said, strict=True)
            ]
            return advantages, returns
        assert plan.kind is not None
        by_completion = [group_advantages([tokens.sum() for tokens in own], plan.kind) for own in rewards]
        advantages = [
            [np.full(len(tokens), value) for tokens, value in zip(own, values, strict=True)]
            for own, values in zip(rewards, by_completion, strict=True)
        ]
        return advantages, [[np.empty(0)] * len(own) for own in rewards]

    def _example(
        self,
        example: TokenizedExample,
        advantages: Sequence[Numbers],
        returns: Sequence[Numbers],
        said: Sequence[_Said],
    ) -> TokenizedExample:
        has_values = self.setup.policy.value_head is not None
        has_logps = self.setup.steps_per_round > 1
        rollouts = tuple(
            Rollout(
                own.tolist(),
                old_logps=told.logps.tolist() if has_logps else None,
                returns=to_come.tolist() if has_values else None,
                old_values=told.values.tolist() if has_values else None,
            )
            for own, to_come, told in zip(advantages, returns, said, strict=True)
        )
        return TokenizedExample(example.prompt_ids, example.completion_ids, example.index, rollouts=rollouts)

    def _seen(
        self,
        judged: Sequence[Judged],
        scores: Sequence[Sequence[float]],
        said: Sequence[Sequence[_Said]],
        returns: Sequence[Sequence[Numbers]],
    ) -> dict[str, Sequence[float]]:
        """What is seen of a round's answers, before any training on them."""
        answers = [answer for one in judged for answer in one.answers]
        seen: dict[str, Sequence[float]] = {
            "samples/score": [score for own in scores for score in own],
            **seen_of_answers(answers),
        }
        plan = self.setup.advantage_plan
        if plan.kind != "gae":
            seen["samples/undecided"] = [float(max(own) == min(own)) for own in scores]
        if plan.kl_weight:
            seen["samples/kl"] = [float((own.logps - own.ref_logps).sum()) for group in said for own in group]
        if plan.kind == "gae" and scores:
            seen["samples/explained"] = [_explained(said, returns)]
        return seen

    def _tell_of(self, number: int, judged: Sequence[Judged], seen: Mapping[str, Sequence[float]]) -> None:
        setup = self.setup
        if setup.steps_per_round > 1:
            score = f"mean score {np.mean(seen['samples/score']):.4g}; " if seen["samples/score"] else ""
            self.log.say(
                f"round {number + 1}",
                f"{count(len(judged), 'prompt')}, {len(judged) * setup.num_completions} answers; {score}"
                f"{np.mean(seen['samples/length']):.0f} tokens on average, {np.mean(seen['samples/finished']):.0%} "
                "ended by themselves",
            )


def _explained(said: Sequence[Sequence[_Said]], returns: Sequence[Sequence[Numbers]]) -> float:
    """The share of the returns' variance that the values foresaw: 1 all, 0 none, below 0 they mislead."""
    values = np.concatenate([own.values for group in said for own in group])
    to_come = np.concatenate([own for group in returns for own in group])
    variance = to_come.var()
    return float(1 - (to_come - values).var() / variance) if variance > 0 else 0.0

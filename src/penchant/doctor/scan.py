"""The data doctor: one pass over the rows of a data set that looks for what would go wrong in training.

The checks are listed in `findings`; docs/data-doctor.md tells thresholds and sources. Memory stays flat but for what
`memory` keeps of each row.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from math import sqrt

from rapidfuzz.distance import Levenshtein

from penchant.data.formats import RowProblem
from penchant.doctor.duplicates import words_of
from penchant.doctor.findings import MAX_ROWS, PROBLEMS, Finding, finding, finding_by_share, worst_first
from penchant.doctor.lengths import SURE, Lengths
from penchant.doctor.memory import RowMemory, joined, sides_of
from penchant.doctor.tokens import MARKERS, TokenChecks
from penchant.examples import Example, Pair, Ranking, TokenizedExample, Unpaired

NEAR_IDENTICAL = 0.1
"""Share of tokens (of words, without a tokenizer) that differ, below which two completions are nearly identical."""
SAME_ROW = 0.8
"""Jaccard similarity of prompts, and of completions, from which on a row repeats another."""
SAME_PROMPT = 0.9
"""Jaccard similarity from which on a held-out prompt counts as one of the training prompts."""
LONG_PROMPT = 50
"""Characters; a completion may begin like a shorter prompt by chance."""
UNEQUAL_CUT = 0.05
"""By how much the shares of better and of worse completions that are cut off may differ."""
FEW, VERY_FEW = 500, 100
"""Examples below which there are few, and very few."""
LABEL_BALANCE = (1.0, 4 / 3)
"""Total weight of desirable over that of undesirable completions, as KTO's authors advise it."""
BALANCE_SLACK = 0.1
"""How far outside of these bounds, relatively, nothing is said yet: they are a rule of thumb."""

_OF_PAIRS = ("prefix", "near-identical")
_OF_EXAMPLES = ("prompt-leak", "special-token", "user-turns", "no-end", "doubled-token", "truncated")
_MAX_MARKERS = 100


class DataScan:
    """One pass over the rows of a data set, and what there is to say after it.

    With `token_checks` every example comes with its token ids; lengths and edit distances are then taken over these.
    """

    def __init__(self, token_checks: TokenChecks | None = None) -> None:
        self._token_checks = token_checks
        self._markers = token_checks.markers() if token_checks else re.compile(MARKERS)
        self._plain_markers: set[str] = set()
        self._rows = RowMemory()
        self._flagged: dict[str, array[int]] = {}
        self._originals: dict[int, int] = {}
        self._refused: dict[str, list[str]] = {}
        self._num_refused: Counter[str] = Counter()
        self._num_pairs = self._num_scored = 0
        self._num_cut = [0, 0]
        self._lengths = Lengths()
        self._total_weights = {True: 0.0, False: 0.0}

    def __len__(self) -> int:
        """Examples so far."""
        return len(self._rows)

    def flagged(self, name: str) -> Collection[int]:
        """Places (0 for the first example) that a check points at; what rows have in common only after `findings`."""
        return self._flagged.get(name, ())

    def add_problem(self, problem: RowProblem) -> None:
        """Takes note of a row that cannot be used."""
        self._num_refused[problem.code] += 1
        if problem.code in PROBLEMS.values() and self._num_refused[problem.code] <= MAX_ROWS:
            self._refused.setdefault(problem.code, []).append(problem.source)

    def add(self, example: Example, tokens: TokenizedExample | None = None) -> None:
        """Looks at an example, and at its token ids where the scan has `token_checks`."""
        texts = [joined(side) for side in sides_of(example)]
        words = [words_of(text) for text in texts]
        sequences: Sequence[Sequence[int]] = words
        faults = [*self._faults_of_text(example, texts)]
        if tokens is not None and self._token_checks is not None:
            sequences = [tokens.completion_ids[0], tokens.completion_ids[-1]][: len(texts)]
            faults += self._token_checks.faults(tokens, example.finished)
            if len(sequences) == 2:
                self._num_cut = [
                    number + self._token_checks.is_cut(tokens, ids)
                    for number, ids in zip(self._num_cut, sequences, strict=True)
                ]
        faults += self._compare(example, sequences)
        for name in faults:
            self._flagged.setdefault(name, array("L")).append(len(self))
        self._rows.add(example, words)

    def _faults_of_text(self, example: Example, texts: Sequence[str]) -> Iterator[str]:
        """Names of the checks that the texts of a row fail; `texts` are those of its sides."""
        question = example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]
        question = question.strip()
        if len(question) > LONG_PROMPT and any(text.lstrip().startswith(question) for text in texts):
            yield "prompt-leak"
        if any(
            not isinstance(side, str) and any(turn["role"] != "assistant" for turn in side)
            for side in sides_of(example)
        ):
            yield "user-turns"
        if self._holds_markers(example, texts):
            yield "special-token"
        if len(texts) == 2:
            shorter, longer = sorted((text.strip() for text in texts), key=len)
            if longer.startswith(shorter):
                yield "prefix"

    def _holds_markers(self, example: Example, texts: Sequence[str]) -> bool:
        """Whether special tokens stand in a text by mistake: in messages, or within a plain completion.

        In a plain prompt, and at the end of a plain completion, people write them on purpose.
        """
        if not isinstance(example.prompt, str):
            return any(self._markers.search(text) for text in (joined(example.prompt), *texts))
        found = [match for text in (example.prompt, *texts) for match in self._markers.finditer(text)]
        if len(self._plain_markers) < _MAX_MARKERS:
            self._plain_markers.update(match[0] for match in found)
        return any(match.string is not example.prompt and match.string[match.end() :].strip() for match in found)

    def _compare(self, example: Example, sequences: Sequence[Sequence[int]]) -> Iterator[str]:
        """Takes down lengths, weights and scores; names the checks that the two sides of a row fail together."""
        if isinstance(example, Unpaired):
            if example.is_desirable is not None:
                self._lengths.add(len(sequences[0]), example.is_desirable)
                self._total_weights[example.is_desirable] += example.weight
            return
        better, worse = sequences
        self._num_pairs += 1
        self._lengths.add_pair(len(better), len(worse))
        if Levenshtein.normalized_distance(better, worse, score_cutoff=NEAR_IDENTICAL) < NEAR_IDENTICAL:
            yield "near-identical"
        if (margin := _margin_of(example)) is not None:
            self._num_scored += 1
            if margin == 0:
                yield "tie"

    def findings(
        self, num_rows: int | None = None, drop: Collection[str] = (), label_weights: tuple[float, float] | None = None
    ) -> list[Finding]:
        """What there is to say, the worst first.

        Args:
            num_rows: rows read, where they are not the examples and the problems.
            drop: checks whose rows are left out anyway.
            label_weights: what the loss multiplies desirable and undesirable completions with, if it does.
        """
        self._originals = self._rows.repeats(SAME_ROW)
        self._flagged["duplicate"] = array("L", sorted(self._originals))
        self._flagged["contradiction"] = array("L", self._rows.contradictions())
        found = [*self._of_problems(num_rows or len(self) + self._num_refused.total(), drop), *self._of_flags(drop)]
        found += [one for one in (self._length_bias(), self._unequal_cut(), self._too_few()) if one]
        if label_weights is not None:
            found += self._label_balance(*label_weights)
        if self._token_checks is not None:
            found += self._token_checks.of_tokenizer(self._plain_markers)
        return worst_first(found)

    def leak_into(self, heldout: DataScan, drop: Collection[str] = ()) -> Finding | None:
        """The held-out rows whose prompt is a training prompt; the training rows are flagged as `leak`."""
        self._flagged["leak"] = array("L", self._rows.with_prompts_of(heldout._rows, SAME_PROMPT))
        leaked = heldout._rows.with_prompts_of(self._rows, SAME_PROMPT)
        rows = [heldout._rows.source(place) for place in leaked[:MAX_ROWS]]
        return finding_by_share("leak", len(leaked), len(heldout), rows, "leak" in drop)

    def _of_problems(self, num_rows: int, drop: Collection[str]) -> Iterator[Finding]:
        for name, code in PROBLEMS.items():
            rows = self._refused.get(code, [])
            if found := finding_by_share(name, self._num_refused[code], num_rows, rows, name in drop):
                yield found

    def _of_flags(self, drop: Collection[str]) -> Iterator[Finding]:
        totals = {"tie": self._num_scored, **dict.fromkeys(_OF_PAIRS, self._num_pairs)}
        for name in (*_OF_PAIRS, "tie", "duplicate", "contradiction", *_OF_EXAMPLES):
            places = self.flagged(name)
            rows = [self._named(name, place) for place in islice(places, MAX_ROWS)]
            if found := finding_by_share(name, len(places), totals.get(name, len(self)), rows, name in drop):
                yield found

    def _named(self, name: str, place: int) -> str:
        source = self._rows.source(place)
        return f"{source} (as {self._rows.source(self._originals[place])})" if name == "duplicate" else source

    def _length_bias(self) -> Finding | None:
        bias = self._lengths.bias("tokens" if self._token_checks else "words")
        return finding("length-bias", *bias) if bias else None

    def _unequal_cut(self) -> Finding | None:
        if not self._num_pairs:
            return None
        better, worse = (cut / self._num_pairs for cut in self._num_cut)
        # As if the sides were independent; they are cut together, so few rows are even less likely to show this.
        error = sqrt((better * (1 - better) + worse * (1 - worse)) / self._num_pairs)
        if abs(better - worse) < max(UNEQUAL_CUT, SURE * error):
            return None
        seen = f"max_length cuts off {better:.1%} of the better completions and {worse:.1%} of the worse ones"
        return finding("unequal-cut", "warn", seen)

    def _too_few(self) -> Finding | None:
        if len(self) >= FEW:
            return None
        return finding("too-few", "warn" if len(self) < VERY_FEW else "info", f"there are {len(self)} examples")

    def _label_balance(self, desirable_weight: float, undesirable_weight: float) -> Iterator[Finding]:
        desirable, undesirable = self._total_weights[True], self._total_weights[False]
        if not (desirable and undesirable and desirable_weight and undesirable_weight):
            return
        ratio = desirable_weight * desirable / (undesirable_weight * undesirable)
        low, high = (bound * undesirable_weight * undesirable / desirable for bound in LABEL_BALANCE)
        if LABEL_BALANCE[0] * (1 - BALANCE_SLACK) <= ratio <= LABEL_BALANCE[1] * (1 + BALANCE_SLACK):
            return
        seen = f"desirable completions weigh {ratio:.3g} times as much as undesirable ones"
        fix = f"set --loss.desirable_weight to a value from {low:.3g} to {high:.3g}"
        if undesirable_weight != 1:
            fix += f" (with undesirable_weight {undesirable_weight:g})"
        yield finding("label-balance", "warn", seen, fix=fix)


def _margin_of(example: Pair | Ranking) -> float | None:
    if isinstance(example, Pair):
        return example.margin
    return None if example.scores is None else example.scores[0] - example.scores[-1]

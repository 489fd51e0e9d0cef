"""Whether length alone tells better completions from worse ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

SMALL_EFFECT, LARGE_EFFECT = 0.3, 0.8
"""Cohen's d of log length from which on there is a bias, and from which on a large one."""
SMALL_GAP, LARGE_GAP = 0.05, 0.10
"""By how much, relatively, the mean lengths have to differ besides."""
LONGER_WINS = (0.35, 0.65)
"""Share of pairs in which the longer completion is the better one: outside of these bounds there is a bias."""
SURE = 3.0
"""Standard errors that a difference has to be away from none; few rows differ by chance."""
FEWEST = 20
"""Completions of either kind below which nothing is said: standard errors mean little then."""


@dataclass
class _Sums:
    count: int = 0
    lengths: float = 0.0
    logs: float = 0.0
    squares: float = 0.0

    def add(self, length: int) -> None:
        log = math.log(max(length, 1))
        self.count += 1
        self.lengths += length
        self.logs += log
        self.squares += log * log

    @property
    def mean(self) -> float:
        return self.lengths / self.count

    @property
    def mean_log(self) -> float:
        return self.logs / self.count

    @property
    def variance(self) -> float:
        """Of log length, unbiased."""
        return max(0.0, (self.squares - self.logs * self.mean_log) / (self.count - 1))


@dataclass
class Lengths:
    """Lengths of better and of worse completions, added up."""

    better: _Sums = field(default_factory=_Sums)
    worse: _Sums = field(default_factory=_Sums)
    pairs: int = 0
    longer_wins: float = 0.0
    """Pairs in which the longer completion is the better one; equally long ones count one half."""

    def add_pair(self, better: int, worse: int) -> None:
        """Lengths of the two completions of a pair."""
        self.add(better, True)
        self.add(worse, False)
        self.pairs += 1
        self.longer_wins += 0.5 if better == worse else float(better > worse)

    def add(self, length: int, is_better: bool) -> None:
        """Length of a completion that was judged by itself."""
        (self.better if is_better else self.worse).add(length)

    def effect(self) -> float:
        """Cohen's d: the difference of the mean logs over the pooled standard deviation."""
        better, worse = self.better, self.worse
        freedom = better.count + worse.count - 2
        pooled = ((better.count - 1) * better.variance + (worse.count - 1) * worse.variance) / freedom
        difference = better.mean_log - worse.mean_log
        return difference / math.sqrt(pooled) if pooled else math.copysign(math.inf, difference) if difference else 0.0

    def bias(self, unit: str = "tokens") -> tuple[Literal["warn", "major"], str] | None:
        """How bad the bias is and what shows it, None where there is none or too few rows to be sure.

        `unit` is what the lengths count.
        """
        if min(self.better.count, self.worse.count) < FEWEST:
            return None
        effect, gap = self.effect(), self.better.mean / self.worse.mean - 1
        is_sure = abs(effect) >= SURE * math.sqrt(1 / self.better.count + 1 / self.worse.count)
        share = self.longer_wins / self.pairs if self.pairs else 0.5
        is_lopsided = not LONGER_WINS[0] <= share <= LONGER_WINS[1]
        is_lopsided &= abs(share - 0.5) * math.sqrt(self.pairs) >= SURE * 0.5
        is_large = is_sure and abs(effect) >= LARGE_EFFECT and abs(gap) >= LARGE_GAP
        is_small = is_sure and abs(effect) >= SMALL_EFFECT and abs(gap) >= SMALL_GAP
        if not (is_small or is_lopsided):
            return None
        longer = f"; the longer one is the better one in {share:.0%} of the pairs" if self.pairs else ""
        seen = (
            f"better completions have {self.better.mean:.0f} {unit} on average, worse ones {self.worse.mean:.0f} "
            f"(Cohen's d of log length {effect:+.2f}){longer}"
        )
        return ("major" if is_large else "warn"), seen

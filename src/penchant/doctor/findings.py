"""The table of what the data doctor looks for, and what it says when it finds something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["info", "warn", "major", "stop"]
"""info: worth knowing; warn: look at it; major: the run will teach something else; stop: no run with these data."""

SEVERITIES: tuple[Severity, ...] = ("info", "warn", "major", "stop")

MAX_ROWS = 20
"""How many rows a finding names."""


@dataclass(frozen=True)
class Check:
    """One thing that can be wrong with a data set as a whole.

    `levels` gives for each severity the share of rows from which on it holds (0: one row is enough); a check without
    levels decides by other numbers than a share. `what` continues the sentence "12 of 240 rows (5.0%) ...".
    """

    name: str
    what: str
    meaning: str
    fix: str
    levels: Mapping[Severity, float] | None = None
    can_be_dropped: bool = False
    """Whether the key `drop` may name it: it points at rows."""


DOCTOR_CHECKS: dict[str, Check] = {
    "S01": Check(
        "identical",
        "have two identical completions",
        "nothing is preferred there, so these rows are left out",
        "mend whatever made the pairs",
        {"warn": 0.0, "stop": 0.01},
        can_be_dropped=True,
    ),
    "S02": Check(
        "prefix",
        "have a completion that is the beginning of the other",
        "only where the answer ends is judged; often one was cut off by a limit on its length",
        "look whether the shorter one is complete",
        {"info": 0.0},
        can_be_dropped=True,
    ),
    "S03": Check(
        "near-identical",
        "have completions that differ in less than a tenth of their tokens",
        "what they share outweighs what differs, and DPO lowers the likelihood of both",
        "use --method dpop or rpo, or ipo",
        {"info": 0.0, "warn": 0.10},
        can_be_dropped=True,
    ),
    "S04": Check(
        "duplicate",
        "repeat an earlier row (nearly) word for word",
        "repeated rows count several times and are learned by heart",
        "keep one of each",
        {"info": 0.0, "warn": 0.05, "major": 0.20},
        can_be_dropped=True,
    ),
    "S05": Check(
        "contradiction",
        "stand against another row with the opposite preference",
        "the two cancel each other",
        "keep the judgement of the majority",
        {"info": 0.0, "warn": 0.005},
        can_be_dropped=True,
    ),
    "S06": Check(
        "leak",
        "of the held-out data have a prompt of the training data",
        "what is measured on them is memory, not what carries over",
        "split by prompt",
        {"info": 0.0, "warn": 0.001},
        can_be_dropped=True,
    ),
    "S07": Check(
        "prompt-leak",
        "have a completion that repeats the prompt first",
        "the model learns to repeat the question",
        "cut the prompt off the completions",
        {"warn": 0.0, "major": 0.10},
        can_be_dropped=True,
    ),
    "S08": Check(
        "length-bias",
        "",
        "length alone tells the completions apart, and the model learns length first",
        "use a loss that allows for length (--method r-dpo, ln-dpo or simpo), or balance the lengths",
    ),
    "S09": Check(
        "no-end",
        "have a completion without the token that ends an answer",
        "the model learns to go on after the answer",
        "give the tokenizer its end token, or mend the chat template",
        {"warn": 0.0, "major": 0.50},
        can_be_dropped=True,
    ),
    "S10": Check(
        "doubled-token",
        "hold the same special token twice in a row",
        "the start or the end was written into the text and added again",
        "take the special tokens out of the text; they are added by themselves",
        {"warn": 0.0, "major": 0.50},
        can_be_dropped=True,
    ),
    "S11": Check(
        "truncated",
        "have a completion that max_length cuts off",
        "its end is never seen, so the model does not learn to stop there",
        "raise max_length, or set truncation: drop",
        {"info": 0.0, "warn": 0.05, "major": 0.20},
        can_be_dropped=True,
    ),
    "S12": Check(
        "unequal-cut",
        "",
        "one side often lacks its end, so having an end is what gets judged",
        "raise max_length, or set truncation: drop",
    ),
    "S13": Check(
        "no-template",
        "",
        "turns would be written out as 'Human:' and 'Assistant:', which the model may never have seen",
        "give the model's own template as chat_template: FILE",
    ),
    "S14": Check(
        "special-token",
        "hold the text of a special token, such as <|im_end|> or </s>",
        "the tokenizer may read it as the token itself, which ends or begins a turn in the middle of a text",
        "take it out of the texts",
        {"warn": 0.0},
        can_be_dropped=True,
    ),
    "S15": Check(
        "split-special",
        "",
        "the tokenizer does not know them as tokens of their own and splits them into pieces of text",
        "use the template that belongs to the model, unless it was trained with these pieces",
    ),
    "S16": Check(
        "template-prefix",
        "are rendered by the chat template so that the prompt changes once an answer follows",
        "where the answer begins cannot be told, so these rows are left out",
        "give a template that renders turn by turn as chat_template: FILE",
        {"warn": 0.0, "major": 0.50},
    ),
    "S17": Check(
        "unknown-role",
        "have a message without a known role or without content",
        "so many of them mean that the roles have other names here",
        "rename the roles to system, user, assistant and tool",
        {"info": 0.0, "warn": 0.10},
    ),
    "S18": Check(
        "tie",
        "score chosen and rejected the same",
        "these pairs are coin flips",
        "set min_margin, or use --method cdpo",
        {"info": 0.0, "warn": 0.05},
        can_be_dropped=True,
    ),
    "S19": Check(
        "inverted",
        "score rejected higher than chosen",
        "the columns may be swapped, or the scores may mean something else",
        "swap chosen and rejected, or mend the scores",
        {"stop": 0.0},
        can_be_dropped=True,
    ),
    "S20": Check(
        "label-balance",
        "",
        "KTO wants desirable and undesirable completions in balance, a ratio of total weights between 1 and 4/3",
        "",  # the weights that mend it depend on the data
    ),
    "S21": Check(
        "too-few",
        "",
        "so few are learned by heart rather than generalised from",
        "find some more, and hold out enough to see what carries over",
    ),
    "S22": Check(
        "user-turns",
        "have turns of others than the assistant inside a completion",
        "these turns are trained on as well, so the model learns to speak for the user",
        "move all but the last answer into the prompt",
        {"warn": 0.0, "major": 0.50},
        can_be_dropped=True,
    ),
    "S23": Check(
        "long-prompt",
        "have a prompt that fills max_length by itself",
        "no room is left for an answer, so these rows are left out",
        "raise max_length, or shorten the prompts",
        {"info": 0.0, "warn": 0.05, "major": 0.20},
    ),
}
"""Code -> what is looked for. Thresholds and their sources are explained in docs/data-doctor.md."""

CODES: dict[str, str] = {check.name: code for code, check in DOCTOR_CHECKS.items()}
"""Name of a check -> its code."""

PROBLEMS: dict[str, str] = {
    "identical": "D05",
    "unknown-role": "D08",
    "template-prefix": "T03",
    "inverted": "D25",
    "long-prompt": "T01",
}
"""Checks that count the rows refused for one reason -> the code of that reason."""


SOUND = frozenset({"T01", "T04", "T05", "U01", "U02"})
"""Codes of rows that are sound and only do not fit: they do not count as bad rows."""


@dataclass(frozen=True)
class Finding:
    """A check that fires: what was seen, how bad it is, and the first rows it was seen in."""

    code: str
    severity: Severity
    seen: str
    fix: str
    rows: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The check's name."""
        return DOCTOR_CHECKS[self.code].name

    @property
    def message(self) -> str:
        """What was seen and what it means."""
        return f"{self.seen}: {DOCTOR_CHECKS[self.code].meaning}"

    def as_dict(self) -> dict[str, Any]:
        """The finding as JSON keeps it."""
        told = {"code": self.code, "severity": self.severity, "name": self.name, "message": self.message}
        return {**told, "fix": self.fix, "rows": list(self.rows)}


def finding(
    name: str, severity: Severity, seen: str, rows: Iterable[str] = (), fix: str = "", dropped: bool = False
) -> Finding:
    """The finding of a check; its fix, unless given, is the table's. Where its rows are dropped it is only told."""
    check = DOCTOR_CHECKS[CODES[name]]
    if dropped:
        return Finding(CODES[name], "info", seen, f"nothing: drop names {name}", tuple(rows))
    or_drop = f", or leave the rows out with drop: [{name}]" if check.can_be_dropped else ""
    return Finding(CODES[name], severity, seen, (fix or check.fix) + or_drop, tuple(rows))


def finding_by_share(name: str, count: int, total: int, rows: Iterable[str], dropped: bool = False) -> Finding | None:
    """The finding of a check that counts rows, None where its levels are not reached."""
    check = DOCTOR_CHECKS[CODES[name]]
    if check.levels is None:
        raise ValueError(f"the check '{name}' does not go by a share")
    severity = severity_of(count, total, check.levels)
    if severity is None:
        return None
    seen = f"{count:,} of {total:,} rows ({_percent(count / total)}) {check.what}"
    return finding(name, severity, seen, rows, dropped=dropped)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "below 0.1%"


def severity_of(count: int, total: int, levels: Mapping[Severity, float]) -> Severity | None:
    """The worst severity whose level the share of `count` in `total` reaches."""
    if not count:
        return None
    return max((s for s, level in levels.items() if count >= level * total), key=SEVERITIES.index, default=None)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Findings by severity, then by code."""
    return sorted(findings, key=lambda found: (-SEVERITIES.index(found.severity), found.code))

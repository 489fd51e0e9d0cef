"""How often each check of the data doctor fires on data with the fault that it looks for, and on data without it.

Clean sets are made of words drawn as in language (Zipf), with the habits of real ones: prompts from a few moulds, one
system message in all rows, polite openings, several turns. Each fault is planted into a share of the rows that the
check has to notice. Clean sets are counted against a check at every severity, planted ones only from `warn` on (from
`info` on where a check knows nothing worse).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from penchant.doctor.checkup import Reader, check_file
from penchant.doctor.findings import DOCTOR_CHECKS, SEVERITIES, Finding

Row = dict[str, Any]

MAX_LENGTH = 1000
MOULDS = (
    "Write a short text about {} and do not leave out any detail that matters",
    "What is the difference between {}?",
    "Please explain to a child of six years what is meant by {}",
    "Translate the following sentence into plain English and keep its tone: {}",
    "{}",
    "I have been thinking about {} for some days now, what would you advise me to do about it?",
)
OPENINGS = ("", "", "Sure, here is what you asked for. ", "That is a good question. ", "I am sorry, but ")
SYSTEM = (
    "You are a helpful assistant. Answer as truthfully as you can, say so where you do not know, and never give advice "
    "that could harm anyone. Keep your answers short unless the user asks for detail, and write in plain words."
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNKNOWN_MARKERS = CHATML.replace("im_start", "turn").replace("im_end", "over")
FORGETFUL = CHATML.replace(
    "{% for", "{% if messages[-1].role == 'assistant' and 'oboe' in messages[0].content %}-{% endif %}{% for"
)


class Writer:
    """Writes rows that nothing is wrong with."""

    def __init__(self, seed: int, num_rows: int = 500) -> None:
        self.num_rows = num_rows
        self.random = random.Random(seed)
        letters = "etaoinshrdlucmfwypvbgk"
        self.vocabulary = ["".join(self.random.choices(letters, k=self.random.randint(2, 8))) for _ in range(5000)]
        self.weights = list(accumulate(1 / (rank + 3) for rank in range(5000)))
        self.system = [{"role": "system", "content": SYSTEM}] if seed % 2 else []

    def words(self, number: int) -> str:
        """So many words."""
        return " ".join(self.random.choices(self.vocabulary, cum_weights=self.weights, k=number))

    def question(self) -> str:
        """What a user asks."""
        return self.random.choice(MOULDS).format(self.words(self.random.randint(8, 40)))

    def answer(self) -> str:
        """What an assistant answers; better and worse ones are equally long on average."""
        return self.random.choice(OPENINGS) + self.words(int(self.random.lognormvariate(3.6, 0.5)) + 5)

    def pair(self) -> Row:
        """A scored pair of messages."""
        turns = [("user", self.question())]
        if self.random.random() < 0.2:
            turns = [("user", self.question()), ("assistant", self.answer()), *turns]
        better = round(self.random.uniform(5, 10), 3)
        return {
            "prompt": self.system + [{"role": role, "content": text} for role, text in turns],
            "chosen": [{"role": "assistant", "content": self.answer()}],
            "rejected": [{"role": "assistant", "content": self.answer()}],
            "score_chosen": better,
            "score_rejected": round(better - self.random.uniform(0.1, 5), 3),
        }

    def pairs(self) -> list[Row]:
        """A clean set of pairs."""
        return [self.pair() for _ in range(self.num_rows)]

    def singles(self, desirable: float = 0.535) -> list[Row]:
        """A clean set of judged completions: KTO wants slightly more desirable ones."""
        return [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": place < desirable * self.num_rows}
            for place, row in enumerate(self.pairs())
        ]

    def some(self, rows: list[Row], share: float) -> Iterator[Row]:
        """A share of the rows, drawn at random."""
        return iter(self.random.sample(rows, max(1, round(share * len(rows)))))

    def edited(self, text: str) -> str:
        """The text with one word in forty changed, one at least."""
        words = text.split()
        for place in self.random.sample(range(len(words)), max(1, len(words) // 40)):
            words[place] = self.words(1)
        return " ".join(words)


def content(row: Row, key: str) -> str:
    """The last text of a column."""
    return row[key][-1]["content"]


def put(row: Row, key: str, text: str) -> None:
    """Sets the last text of a column."""
    row[key] = [*row[key][:-1], {**row[key][-1], "content": text}]


# One function for each fault: it gets clean rows and changes some of them.


def identical(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.02):
        row["rejected"] = row["chosen"]


def prefix(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.02):
        put(row, "rejected", content(row, "chosen")[: len(content(row, "chosen")) // 2])


def near_identical(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.15):
        put(row, "chosen", writer.words(60))
        put(row, "rejected", writer.edited(content(row, "chosen")))


def duplicate(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.10):
        put(row, "chosen", writer.words(100))
        rows.append({**row, "chosen": row["chosen"]})
        put(rows[-1], "chosen", writer.edited(content(row, "chosen")))


def contradiction(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.02):
        rows.append({**row, "chosen": row["rejected"], "rejected": row["chosen"]})


def prompt_leak(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.01):
        put(row, "prompt", MOULDS[0].format(writer.words(20)))
        put(row, "chosen", content(row, "prompt") + "\n" + content(row, "chosen"))


def length_bias(rows: list[Row], writer: Writer) -> None:
    for row in rows:
        put(row, "chosen", content(row, "chosen") + " " + writer.words(len(content(row, "chosen").split()) // 2))


def no_end(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.01):
        # Plain text that ends with a special token gets no other: here it is one that ends nothing.
        row["prompt"], row["rejected"] = content(row, "prompt"), content(row, "rejected")
        row["chosen"] = content(row, "chosen") + "<|endoftext|>"


def doubled_token(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.01):
        put(row, "chosen", content(row, "chosen") + "<|im_end|>")


def truncated(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.10):
        for key in ("chosen", "rejected"):
            put(row, key, writer.words(MAX_LENGTH))


def unequal_cut(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.15):
        put(row, "rejected", writer.words(MAX_LENGTH))


def special_token(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.005):
        put(row, "chosen", content(row, "chosen") + "</s> " + writer.words(5))


def unknown_role(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.15):
        row["chosen"] = [{**row["chosen"][0], "role": "bot"}]


def template_prefix(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.03):
        row["prompt"] = [{"role": "user", "content": "oboe " + writer.question()}]


def tie(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.08):
        row["score_rejected"] = row["score_chosen"]


def inverted(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.005):
        row["score_chosen"], row["score_rejected"] = row["score_rejected"], row["score_chosen"]


def label_balance(rows: list[Row], writer: Writer) -> None:
    rows[:] = writer.singles(desirable=0.70)


def too_few(rows: list[Row], writer: Writer) -> None:
    del rows[80:]


def user_turns(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.01):
        row["chosen"] = [*row["chosen"], {"role": "user", "content": writer.question()}, *row["rejected"]]


def long_prompt(rows: list[Row], writer: Writer) -> None:
    for row in writer.some(rows, 0.08):
        put(row, "prompt", writer.words(MAX_LENGTH))


def nothing(rows: list[Row], writer: Writer) -> None:
    """Where the fault is not in the rows."""


@dataclass(frozen=True)
class Fault:
    """What is planted, whether a tokenizer is needed to see it, and the tokenizer's chat template."""

    plant: Callable[[list[Row], Writer], None]
    with_tokenizer: bool = False
    template: str | None = CHATML


FAULTS: dict[str, Fault] = {
    "identical": Fault(identical),
    "prefix": Fault(prefix),
    "near-identical": Fault(near_identical),
    "duplicate": Fault(duplicate),
    "contradiction": Fault(contradiction),
    "leak": Fault(nothing),
    "prompt-leak": Fault(prompt_leak),
    "length-bias": Fault(length_bias),
    "no-end": Fault(no_end, with_tokenizer=True),
    "doubled-token": Fault(doubled_token, with_tokenizer=True),
    "truncated": Fault(truncated, with_tokenizer=True),
    "unequal-cut": Fault(unequal_cut, with_tokenizer=True),
    "no-template": Fault(nothing, with_tokenizer=True, template=None),
    "special-token": Fault(special_token),
    "split-special": Fault(nothing, with_tokenizer=True, template=UNKNOWN_MARKERS),
    "template-prefix": Fault(template_prefix, with_tokenizer=True, template=FORGETFUL),
    "unknown-role": Fault(unknown_role),
    "tie": Fault(tie),
    "inverted": Fault(inverted),
    "label-balance": Fault(label_balance),
    "too-few": Fault(too_few),
    "user-turns": Fault(user_turns),
    "long-prompt": Fault(long_prompt, with_tokenizer=True),
}


@cache
def trained_bpe() -> Any:
    """A byte-level tokenizer that knows ChatML's tokens, trained on the words of one writer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([Writer(0).words(5000), SYSTEM, *MOULDS, *OPENINGS], trainer)
    return bpe


def reader(template: str | None, max_length: int = MAX_LENGTH) -> Reader:
    """How rows become tokens with a chat template, or without one."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained_bpe(), eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return Reader(tokenizer, max_length)


def findings_of(rows: list[Row], folder: Path, how: Reader | None) -> list[Finding]:
    """What the doctor says of rows."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return check_file(str(path), how).findings()


def leak_findings(train: list[Row], heldout: list[Row], folder: Path) -> list[Finding]:
    """What the doctor says of training and held-out rows together."""
    scans = []
    for name, rows in (("train", train), ("heldout", heldout)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        scans.append(check_file(str(path)).scan)
    leak = scans[0].leak_into(scans[1])
    return [leak] if leak else []


def on_clean(writer: Writer, folder: Path) -> set[str]:
    """The checks that fire, at whatever severity, on clean pairs (with a tokenizer and without) and judged answers."""
    rows = writer.pairs()
    found = findings_of(rows, folder, reader(CHATML, 4 * MAX_LENGTH))  # so that nothing is cut
    found += findings_of(rows, folder, None)
    found += findings_of(writer.singles(), folder, None)
    found += leak_findings(rows, writer.pairs(), folder)
    return {finding.name for finding in found}


def on_planted(name: str, writer: Writer, folder: Path) -> bool:
    """Whether the check fires on rows with its fault, from `warn` on where it knows a warning."""
    fault, rows = FAULTS[name], writer.pairs()
    fault.plant(rows, writer)
    if name == "leak":
        heldout = writer.pairs()
        for row, leaked in zip(writer.some(heldout, 0.01), writer.some(rows, 0.01), strict=True):
            put(leaked, "prompt", writer.words(80))
            row["prompt"] = leaked["prompt"]
            put(row, "prompt", "Please: " + content(leaked, "prompt"))
        found = leak_findings(rows, heldout, folder)
    else:
        found = findings_of(rows, folder, reader(fault.template) if fault.with_tokenizer else None)
    least = "info" if name == "prefix" else "warn"
    return any(one.name == name and SEVERITIES.index(one.severity) >= SEVERITIES.index(least) for one in found)


def measure(num_seeds: int, num_rows: int = 500) -> dict[str, tuple[int, int]]:
    """Name of each check -> in how many of the seeds it fires on planted and on clean data."""
    planted: Counter[str] = Counter()
    clean: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(num_seeds):
            clean.update(on_clean(Writer(seed, num_rows), Path(folder)))
            planted.update(name for name in FAULTS if on_planted(name, Writer(1000 + seed, num_rows), Path(folder)))
    return {name: (planted[name], clean[name]) for name in FAULTS}


def main() -> None:
    """Prints the table, and ends with exit code 1 where a check misses its mark of 95% and 5%."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=500, help="fewer than 500 are too few, which S21 then says of all")
    options = parser.parse_args()
    seeds = options.seeds
    print(f"| check | fires on planted, of {seeds} | fires on clean, of {seeds} |\n|---|---|---|")
    result = measure(seeds, options.rows)
    for name, (planted, clean) in result.items():
        code = next(code for code, check in DOCTOR_CHECKS.items() if check.name == name)
        print(f"| {code} {name} | {planted} | {clean} |")
    if any(planted < 0.95 * seeds or clean > 0.05 * seeds for planted, clean in result.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

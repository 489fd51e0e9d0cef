"""Each check of the data doctor on rows made for it, and all of them on many rows with planted faults."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from penchant.data.chat import tokenize_examples
from penchant.data.formats import RowProblem
from penchant.doctor.findings import DOCTOR_CHECKS, Finding
from penchant.doctor.scan import DataScan
from penchant.doctor.tokens import TokenChecks
from penchant.examples import Example, Pair, Ranking, TokenizedExample, Unpaired

from ..conftest import WORDS

ROOT = Path(__file__).parents[2]
ROW_OF_TABLE = re.compile(r"\| S\d\d ([\w-]+) \| (\d+) \| (\d+) \|")
QUESTION = "Could you please tell me what the capital of France is, and why?"


def words(number: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=number))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def pair(seed: int = 0, **fields: Any) -> Pair:
    """A clean pair of messages; fields replace its own."""
    own = {
        "prompt": user(words(6, 3 * seed)),
        "chosen": assistant(words(12, 3 * seed + 1)),
        "rejected": assistant(words(12, 3 * seed + 2)),
        "source": f"f:{seed}",
    }
    return Pair(**{**own, **fields})


def scanned(examples: Iterable[Example], problems: Iterable[RowProblem] = ()) -> DataScan:
    scan = DataScan()
    for example in examples:
        scan.add(example)
    for problem in problems:
        scan.add_problem(problem)
    return scan


def scanned_with(tokenizer: Any, examples: list[Example], max_length: int = 200) -> DataScan:
    scan = DataScan(TokenChecks(tokenizer, max_length))
    data = tokenize_examples(examples, tokenizer, max_length)
    for tokens in data.examples:
        scan.add(data.texts[tokens.index], tokens)
    for problem in data.problems:
        scan.add_problem(problem)
    return scan


def named(findings: Iterable[Finding]) -> dict[str, Finding]:
    """The findings by name, but for the one that there are few rows."""
    return {found.name: found for found in findings if found.name != "too-few"}


def test_clean_rows_have_no_finding() -> None:
    assert named(scanned(pair(seed) for seed in range(200)).findings()) == {}


def test_a_completion_that_begins_with_a_long_prompt_leaks_it_and_one_with_a_short_prompt_does_not() -> None:
    clean = [pair(seed) for seed in range(20)]
    leaking = pair(20, prompt=user(QUESTION), chosen=assistant(f" {QUESTION}\nParis."))
    short = pair(21, prompt=user("Say hello"), chosen=assistant("Say hello to whom?"))
    found = named(scanned([*clean, leaking, short]).findings())
    assert list(found) == ["prompt-leak"]
    assert found["prompt-leak"].severity == "warn"
    assert found["prompt-leak"].rows == ("f:20",)
    assert named(scanned([leaking]).findings())["prompt-leak"].severity == "major"


def test_turns_of_the_user_inside_a_completion_are_found() -> None:
    several = [*assistant("yes"), *user("really?"), *assistant("no")]
    found = named(scanned([*(pair(seed) for seed in range(9)), pair(9, rejected=several)]).findings())
    assert found["user-turns"].rows == ("f:9",)


@pytest.mark.parametrize(
    "text", ["a</s> b", "<|im_end|>", "say <|eot_id|> now", "[INST] hi [/INST]", "<start_of_turn>"]
)
def test_special_tokens_in_messages_are_found(text: str) -> None:
    found = named(scanned([pair(0), pair(1, chosen=assistant(text))]).findings())
    assert found["special-token"].rows == ("f:1",)


@pytest.mark.parametrize(
    "text", ["a <b>bold</b> <s>struck word", "x <| y", "if a < b and c > d: [1, 2]", "<|two words|>"]
)
def test_what_only_resembles_a_special_token_is_left_alone(text: str) -> None:
    assert "special-token" not in named(scanned([pair(0, chosen=assistant(text))]).findings())


def test_special_tokens_written_into_plain_text_on_purpose_are_left_alone() -> None:
    rendered = Pair("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "yes<|im_end|>\n", "no<|im_end|>", "f:0")
    within = Pair("hi", "yes<|im_end|> and no", "no", "f:1")
    found = named(scanned([rendered, within]).findings())
    assert found["special-token"].rows == ("f:1",)


def test_completions_of_which_one_begins_the_other_are_told() -> None:
    found = named(scanned([pair(0, chosen=assistant("yes, of course"), rejected=assistant("yes"))]).findings())
    assert found["prefix"].severity == "info"


def test_completions_that_differ_in_less_than_a_tenth_are_nearly_identical() -> None:
    text = words(40, 1).split()
    three, four = (assistant(" ".join([*text[:-number], *["other"] * number])) for number in (3, 4))
    near = [pair(seed, chosen=assistant(" ".join(text)), rejected=three) for seed in range(2)]
    far = [pair(seed, chosen=assistant(" ".join(text)), rejected=four) for seed in range(2, 10)]
    found = named(scanned([*near, *far]).findings())
    assert found["near-identical"].rows == ("f:0", "f:1")
    assert found["near-identical"].severity == "warn"


def test_a_repeated_row_is_named_with_the_row_that_it_repeats() -> None:
    again = pair(3, source="f:99")
    found = named(scanned([*(pair(seed) for seed in range(10)), again]).findings())
    assert found["duplicate"].rows == ("f:99 (as f:3)",)


def test_several_pairs_of_one_prompt_are_no_repetition() -> None:
    assert "duplicate" not in named(scanned(pair(seed, prompt=user(QUESTION)) for seed in range(50)).findings())


def test_opposite_judgements_contradict_each_other() -> None:
    one = pair(0)
    found = named(
        scanned([one, pair(1), pair(2, prompt=one.prompt, chosen=one.rejected, rejected=one.chosen)]).findings()
    )
    assert found["contradiction"].rows == ("f:0", "f:2")
    assert found["contradiction"].severity == "warn"


def test_a_held_out_prompt_of_the_training_data_is_a_leak_on_both_sides() -> None:
    train = scanned(pair(seed) for seed in range(20))
    heldout = scanned([pair(100), pair(101, prompt=pair(7).prompt)])
    found = train.leak_into(heldout)
    assert found is not None
    assert found.rows == ("f:101",)
    assert list(train.flagged("leak")) == [7]
    assert train.leak_into(scanned([pair(100)])) is None


def test_ties_are_counted_among_the_rows_with_scores() -> None:
    rows = [pair(0, margin=0.0), *(pair(seed, margin=1.0) for seed in range(1, 10)), *map(pair, range(10, 40))]
    rows.append(Ranking(user("who"), ("a one", "b two", "c three"), "f:50", scores=(2.0, 1.0, 0.5)))
    found = named(scanned(rows).findings())["tie"]
    assert found.seen.startswith("1 of 11 rows")
    assert found.severity == "warn"


@pytest.mark.parametrize(
    ("code", "count", "name", "severity"),
    [
        ("D05", 1, "identical", "warn"),
        ("D05", 3, "identical", "stop"),
        ("D08", 5, "unknown-role", "info"),
        ("D08", 40, "unknown-role", "warn"),
        ("D25", 1, "inverted", "stop"),
        ("T03", 1, "template-prefix", "warn"),
        ("T01", 30, "long-prompt", "warn"),
    ],
)
def test_rows_refused_for_one_reason_are_counted(code: str, count: int, name: str, severity: str) -> None:
    problems = [RowProblem(code, f"g:{place}", "wrong") for place in range(count)]
    found = named(scanned([pair(seed) for seed in range(200)], problems).findings())[name]
    assert found.severity == severity
    assert found.rows == tuple(f"g:{place}" for place in range(min(count, 20)))
    assert found.seen.startswith(f"{count} of {200 + count} rows")


def test_dropping_a_check_makes_its_finding_harmless() -> None:
    scan = scanned([pair(0)], [RowProblem("D25", "g:0", "wrong")])
    assert named(scan.findings(drop=["inverted"]))["inverted"].severity == "info"


@pytest.mark.parametrize(("desirable", "weights", "is_said"), [
    (50, (1.0, 1.0), False), (57, (1.0, 1.0), False), (70, (1.0, 1.0), True), (30, (1.0, 1.0), True),
    (70, (0.5, 1.0), False), (70, (1.0, 2.0), False), (50, (4.0, 1.0), True),
])  # fmt: skip
def test_labels_out_of_balance_are_told_with_the_weights_that_mend_it(
    desirable: int, weights: tuple[float, float], is_said: bool
) -> None:
    rows = [Unpaired(words(5, seed), words(9, -seed), seed < desirable, f"f:{seed}") for seed in range(100)]
    found = named(scanned(rows).findings(label_weights=weights)).get("label-balance")
    assert (found is not None) == is_said
    if found is not None:
        low, high = (bound * weights[1] * (100 - desirable) / desirable for bound in (1, 4 / 3))
        assert f"from {low:.3g} to {high:.3g}" in found.fix


def test_without_weights_of_a_loss_labels_need_no_balance() -> None:
    assert named(scanned([Unpaired("p", words(9, seed), seed < 9) for seed in range(10)]).findings()) == {}


@pytest.mark.parametrize(("number", "severity"), [(99, "warn"), (100, "info"), (499, "info"), (500, None)])
def test_few_rows_are_told(number: int, severity: str | None) -> None:
    found = [found.severity for found in scanned(map(pair, range(number))).findings() if found.name == "too-few"]
    assert found == ([severity] if severity else [])


def test_with_a_tokenizer_cut_completions_are_counted_by_side(tokenizer: Any) -> None:
    rows: list[Example] = [
        pair(seed, rejected=assistant(words(60 if seed % 5 == 0 else 10, seed))) for seed in range(100)
    ]
    length = len(tokenizer(words(60, 0), add_special_tokens=False).input_ids)
    found = named(scanned_with(tokenizer, rows, length).findings())
    assert found["truncated"].seen.startswith("20 of 100 rows (20.0%)")
    assert found["truncated"].severity == "major"
    assert found["truncated"].rows[:2] == ("f:0", "f:5")
    assert "0.0% of the better completions and 20.0% of the worse ones" in found["unequal-cut"].seen


def test_few_cut_completions_may_stand_on_one_side_by_chance(tokenizer: Any) -> None:
    rows: list[Example] = [pair(seed, rejected=assistant(words(60 if seed == 0 else 10, seed))) for seed in range(10)]
    length = len(tokenizer(words(60, 0), add_special_tokens=False).input_ids)
    found = named(scanned_with(tokenizer, rows, length).findings())
    assert "truncated" in found
    assert "unequal-cut" not in found


def test_an_end_written_into_the_text_is_doubled(tokenizer: Any) -> None:
    scan = scanned_with(tokenizer, [pair(0), pair(1, chosen=assistant("the cat<|im_end|>"))])
    assert named(scan.findings())["doubled-token"].rows == ("f:1",)


def test_completions_without_an_end_are_found_but_not_those_that_are_cut(tokenizer: Any) -> None:
    checks = TokenChecks(tokenizer, 10)
    end = tokenizer.eos_token_id
    assert list(checks.faults(TokenizedExample([5, 6], ([7, end], [8, end]), 0))) == []
    assert list(checks.faults(TokenizedExample([5, 6], ([7, end], [8, 9]), 0))) == ["no-end"]
    assert list(checks.faults(TokenizedExample([5, 6], ([7, end], [8] * 8), 0))) == ["truncated"]
    assert list(checks.faults(TokenizedExample([5, 6], ([7] * 7 + [end], [8, end]), 0))) == []


def test_the_token_that_the_template_puts_behind_an_answer_ends_it(tokenizer: Any) -> None:
    import copy

    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|endoftext|>"  # as Llama 3's base tokenizer: turns end with another token than texts
    scan = scanned_with(other, [pair(0), pair(1, prompt="what is", chosen="Paris", rejected="yes")])
    assert "no-end" not in named(scan.findings())


def test_markers_of_a_template_that_the_tokenizer_splits_are_told(tokenizer: Any) -> None:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("im_start", "turn")
    found = named(scanned_with(other, [pair(0)]).findings())
    assert found["split-special"].seen.startswith("<|turn|> in the template")
    assert "split-special" not in named(scanned_with(tokenizer, [pair(0)]).findings())


def test_lengths_and_edit_distances_are_taken_over_tokens_where_there_are_some(tokenizer: Any) -> None:
    tokens = TokenizedExample([5], ([7] * 30 + [2], [7] * 29 + [8, 2]), 0)
    scan = DataScan(TokenChecks(tokenizer, 100))
    scan.add(pair(0), tokens)
    assert "near-identical" in named(scan.findings())


def test_planted_faults_are_found_and_clean_data_are_left_in_peace() -> None:
    """In a process of its own: shapes checked at every call would take most of the time."""
    command = [sys.executable, str(ROOT / "bench" / "detectors.py"), "--seeds", "3", "--rows", "120"]
    table = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    counts = {name: (int(planted), int(clean)) for name, planted, clean in ROW_OF_TABLE.findall(table)}
    expected = {check.name: (3, 0) for check in DOCTOR_CHECKS.values()}
    assert counts == {**expected, "too-few": (3, 3)}  # of 120 rows it is true

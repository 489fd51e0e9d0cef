"""Signatures against exact similarities, and what counts as the same row or the same prompt."""

from __future__ import annotations

import random

import numpy as np
import pytest

from penchant.doctor.duplicates import NUM_HASHES, matches, repeats, signature, unpacked, words_of


def some_words(number: int, seed: int) -> list[str]:
    return [f"w{random.Random(seed * 1000 + place).randrange(3000)}" for place in range(number)]


def with_changes(words: list[str], number: int) -> list[str]:
    changed = list(words)
    for place in random.Random(number).sample(range(len(words)), number):
        changed[place] = "changed"
    return changed


def signatures_of(texts: list[str]) -> np.ndarray:
    return unpacked(bytearray(b"".join(signature([words_of(text)]) for text in texts)))


def exact_jaccard(one: list[str], other: list[str]) -> float:
    first, second = (set(zip(["", "", *words], ["", *words], words, strict=False)) for words in (one, other))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize("changes", [0, 4, 10, 30])
def test_signatures_agree_as_often_as_the_exact_similarity_says(changes: int) -> None:
    couples = [(some_words(200, seed), with_changes(some_words(200, seed), changes)) for seed in range(60)]
    exact = np.array([exact_jaccard(*couple) for couple in couples])
    estimated = np.array([(np.equal(*signatures_of([" ".join(text) for text in couple]))).mean() for couple in couples])
    error = np.sqrt(exact.mean() * (1 - exact.mean()) / NUM_HASHES)
    assert abs((estimated - exact).mean()) <= 4 * error / np.sqrt(len(couples)) + 1e-12
    assert (estimated - exact).std() <= 1.5 * error + 1e-12


def test_words_are_alike_in_upper_and_lower_case_and_characters_beyond_ascii_stand_alone() -> None:
    assert words_of("Hello, World!") == words_of("hello ,world !")
    assert len(words_of("你好吗")) == 3
    assert words_of("a b") != words_of("b a")


def test_a_row_repeats_another_only_if_prompt_and_completions_are_alike() -> None:
    long = [" ".join(some_words(80, seed)) for seed in range(6)]
    nearly = " ".join(with_changes(long[0].split(), 1))
    prompts = signatures_of([long[0], nearly, long[0], long[3], long[0]])
    completions = signatures_of([long[1], long[1], long[4], long[1], long[1]])
    assert repeats(prompts, completions, 0.8) == {1: 0, 4: 0}


def test_many_rows_alike_are_each_traced_to_an_earlier_one() -> None:
    prompts = signatures_of([" ".join(some_words(50, seed % 3)) for seed in range(300)])
    found = repeats(prompts, prompts, 0.8)
    assert sorted(found) == list(range(3, 300))
    assert all(later % 3 == earlier % 3 and earlier < later for later, earlier in found.items())


def test_the_order_of_texts_and_their_places_count() -> None:
    one, other = words_of("yes of course it is"), words_of("no never ever was")
    assert signature([one, other]) != signature([other, one])
    assert signature([one]) != signature([one], first=1)
    assert signature([one]) == signature([one])


def test_a_text_without_any_word_has_a_signature() -> None:
    assert len(signature([words_of("\x01")])) == NUM_HASHES
    assert len(signature([words_of("word")])) == NUM_HASHES


def test_matches_finds_which_of_theirs_resemble_one_of_ours() -> None:
    texts = [some_words(100, seed) for seed in range(40)]
    ours = signatures_of([" ".join(text) for text in texts])
    theirs = signatures_of([" ".join(with_changes(texts[7], 1)), " ".join(some_words(100, 99)), " ".join(texts[31])])
    assert matches(ours, theirs, 0.9) == {0: 7, 2: 31}
